"""A daemon with a cache in front of a stand-in, and what tests say of its answers."""

from __future__ import annotations

import json
import os
import tempfile
import unittest
from collections.abc import Mapping
from typing import Any

from portway.cache.store import Cache
from portway.standin.server import DEFAULT_MODELS, Fault, StandIn, StandInModel
from tests.daemon import Daemon
from tests.doubles import RawResponse
from tests.targets import CHAT

ASKED = ("/api/chat", "/api/generate", "/api/embed")
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
BUSY = Fault("status", status=503, error="server busy")
BROKEN = Fault("status", status=500, error="it broke")
CHOPPER = StandInModel("chopper", chops=True)
MODELS = {
    "nine": 'model = "qwen3.5:9b"\nthink = false\nfallback = ["three"]\ncache = "1h"\n',
    "three": 'model = "llama3.2:3b"\ncache = "1h"\n',
    "thinker": 'model = "qwen3.5:9b"\nthink = true\ncache = "1h"\n',
    "coder": 'model = "qwen3-coder:30b"\n',
    "chopper": 'model = "chopper"\nnum_ctx = 256\ncache = "1h"\n',
    "embed": 'model = "nomic-embed-text"\ncapabilities = ["embedding"]\ncache = "1h"\n',
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def configured(url: str, models: Mapping[str, str] = MODELS, rest: str = "") -> str:
    """A models.toml with these models behind one stand-in, which never cools down."""
    text = "[cooldown]\nfailures = 1000\n[memory]\nenabled = false\n"
    text += f'[backends.box]\nkind = "ollama"\nurl = "{url}"\n{rest}'
    return text + "".join(f'[models.{name}]\nbackend = "box"\n{lines}' for name, lines in models.items())


def chat(model: str = "nine", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": QUESTION, **fields}


def streamed(body: bytes) -> list[Any]:
    """A stream's events, parsed; [DONE] as it is. Comments and blank lines are passed over."""
    data = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def text_of(response: RawResponse) -> str:
    """The answer's text, of a stream or not."""
    if (response.header("content-type") or "").startswith("application/json"):
        return str(response.json["choices"][0]["message"]["content"])
    choices = [choice for event in streamed(response.body)[:-1] for choice in event["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def verdict(response: RawResponse) -> tuple[int, str | None]:
    return response.status, response.header("x-cache")


def facts_of(response: RawResponse) -> tuple[str, str, str]:
    """(served_by, cache, attempts), from the headers or, where a heartbeat had sent those, from the first chunk."""
    names = ("x-served-by", "x-cache", "x-portway-attempts")
    if response.header(names[0]):
        served_by, cache, attempts = (response.header(name) or "" for name in names)
        return served_by, cache, attempts
    facts = streamed(response.body)[0]["portway"]
    return facts["served_by"], facts["cache"], facts.get("attempts", "")


def condensed(events: list[Any]) -> list[Any]:
    """A stream in order, with neighbouring pieces of the same kind as one: what a client makes of it."""
    told: list[list[Any]] = []
    for event in events:
        if event == "[DONE]":
            told.append(["done"])
            continue
        for choice in event["choices"]:
            said = {key: value for key, value in choice["delta"].items() if value}
            if told and said and told[-1][0] == list(said) != ["role"]:
                told[-1][1] = {key: told[-1][1][key] + value for key, value in said.items()}
            elif said:
                told.append([list(said), said])
            if choice["finish_reason"]:
                told.append(["finish", choice["finish_reason"]])
        if event.get("usage"):
            told.append(["usage", event["usage"], len(event["choices"])])
    return told


def choice(index: int = 0, text: str = "Hello.") -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}


class CachedCase(unittest.TestCase):
    """A daemon with a cache in front of a stand-in."""

    SERVER = ""

    def setUp(self) -> None:
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(self.folder, "cache.sqlite3")
        self.said: list[str] = []
        self.backend = self.enterContext(StandIn([*DEFAULT_MODELS, CHOPPER]))
        self.cache = Cache(self.path, say=self.said.append)
        self.addCleanup(self.cache.close)
        self.daemon = self.enterContext(Daemon(configured(self.backend.url, rest=self.SERVER), cache=self.cache))
        self.client = self.enterContext(self.daemon.client())

    def post(self, body: Mapping[str, Any], path: str = CHAT, **headers: str) -> RawResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.call("POST", path, body, named)

    @property
    def asked(self) -> int:
        """How many answers the backend was asked for."""
        return sum(request.path in ASKED for request in self.backend.requests)

    def await_phase(self, phase: str) -> None:
        """Wait until a request at the backend is there."""
        self.assertTrue(self.backend.wait_for(lambda _: self.in_phase(phase) > 0))

    def in_phase(self, phase: str) -> int:
        """How many requests at the backend are there."""
        return sum(each.phase == phase and each.ended is None for each in self.backend.requests)

    def written(self) -> None:
        """Wait until what the client was answered is in the file. It is handed in after the answer was sent,
        but before the next one on the same connection."""
        self.client.call("GET", "/health")
        self.assertTrue(self.cache.flush(10))

    @property
    def left(self) -> int:
        """How many of them the backend saw cancelled."""
        return sum(request.left for request in self.backend.requests)

    def health(self) -> Any:
        return self.client.call("GET", "/health").json["cache"]
