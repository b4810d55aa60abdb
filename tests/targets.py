"""Scripted backends of both kinds, the configuration of a chain of them, and what they say on the wire."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from portway.call import Limits
from portway.wire.http1 import ResponseHead
from tests.daemon import Daemon
from tests.doubles import (
    LAST_CHUNK,
    Action,
    RawClient,
    RawResponse,
    ScriptedRequest,
    ScriptedServer,
    SseEvent,
    chunk,
    json_reply,
    ndjson_reply,
    sse_reply,
    stream_head,
)

CHAT = "/v1/chat/completions"
KINDS = ("openai", "ollama")
NAMES = ("first", "second", "third")  # of the models that `chain` configures
MESSAGES = [{"role": "user", "content": "say something"}]
NOT_ASKED = ("/api/tags", "/api/show")  # what the daemon asks of its own accord

Reply = bytes | Sequence[Action]


class Target(ScriptedServer):
    """A backend that plays `script` for the requests that a client is behind, then `then` for ever.

    What the daemon asks by itself, for its list of models, is answered aside.
    """

    def __init__(self, *script: Reply, then: Reply | None = None) -> None:
        self._answers = list(script)
        self._for_ever = then
        super().__init__(then=self._answer)

    def _answer(self, request: ScriptedRequest) -> Reply:
        if request.method == "GET" or request.path in NOT_ASKED:
            return json_reply({"error": "not now"}, 404)
        if self._answers:
            return self._answers.pop(0)
        return self._for_ever if self._for_ever is not None else json_reply({"error": "the script has run out"}, 500)

    def add_answer(self, *replies: Reply) -> None:
        """Append to the script."""
        self._answers.extend(replies)

    def put_first(self, reply: Reply) -> None:
        """Play this for the next request."""
        self._answers.insert(0, reply)

    @property
    def left(self) -> int:
        """How many replies of the script are still to be played."""
        return len(self._answers)

    @property
    def asked(self) -> list[ScriptedRequest]:
        """The requests so far that a client is behind."""
        return [each for each in self.requests if each.method == "POST" and each.path not in NOT_ASKED]


def chain(
    *urls: str,
    kinds: Sequence[str] = ("openai",),
    models: Mapping[str, str] | None = None,
    timeouts: str = "",
    rest: str = "",
) -> str:
    """A models.toml: first -> second -> third, a backend each at `urls`; the last of `kinds` is repeated.

    models: further lines for some of them. timeouts: those of all. rest: further sections.
    """
    text = ""
    for name, url, kind in zip(NAMES, urls, [*kinds, *[kinds[-1]] * len(urls)], strict=False):
        text += f'[backends.{name}]\nkind = "{kind}"\nurl = "{url}"\n'
        text += f'[models.{name}]\nbackend = "{name}"\nmodel = "physical-{name}"\n'
        text += f"timeouts = {{ {timeouts} }}\n" if timeouts else ""
        if name == "first" and len(urls) > 1:
            text += f"fallback = {json.dumps(NAMES[1 : len(urls)])}\n"
        text += (models or {}).get(name, "") + "\n"
    return text + rest


# --- what a backend says --------------------------------------------------------------------------


def answer(kind: str, *texts: str, stream: bool = False) -> bytes:
    """A right answer. Ollama's is streamed in any case."""
    if kind == "ollama":
        return ndjson_reply([*map(line, texts), last_line()])
    if stream:
        return sse_reply([delta(role="assistant", content=None), *(delta(content=text) for text in texts), finish()])
    return json_reply(
        {
            "id": "chatcmpl-up",
            "object": "chat.completion",
            "created": 1700000000,
            "model": "up",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "".join(texts)}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
        }
    )


def delta(finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk of an OpenAI stream."""
    return {
        "choices": [{"finish_reason": finish_reason, "index": 0, "delta": fields}],
        "created": 1700000000,
        "id": "chatcmpl-up",
        "model": "up",
        "object": "chat.completion.chunk",
    }


def finish(reason: str = "stop") -> dict[str, Any]:
    return delta(reason)


def usage(prompt: int = 5, completion: int = 2) -> dict[str, Any]:
    """The chunk that an OpenAI stream ends with if usage is asked for."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**delta(), "choices": [], "usage": counts}


def line(text: str = "", **fields: Any) -> dict[str, Any]:
    """A line of Ollama's."""
    message = {"role": "assistant", "content": text, **fields}
    return {"model": "up", "created_at": "2026-11-21T04:01:25Z", "message": message, "done": False}


def last_line(reason: str = "stop", **fields: Any) -> dict[str, Any]:
    counts = {"prompt_eval_count": 5, "eval_count": 2, "load_duration": 1, "eval_duration": 1}
    return {**line(), "done": True, "done_reason": reason, **counts, **fields}


def error_body(kind: str, message: str, type: str = "server_error", code: int = 500) -> dict[str, Any]:
    """An error as the two kinds write it."""
    return {"error": message} if kind == "ollama" else {"error": {"code": code, "message": message, "type": type}}


def begun(kind: str, *texts: str) -> bytes:
    """The beginning of a stream; go on with `part`, and LAST_CHUNK."""
    head = stream_head("application/x-ndjson" if kind == "ollama" else "text/event-stream")
    return head + b"".join(part(kind, text) for text in texts)


def part(kind: str, text: str) -> bytes:
    """A piece of a stream with some text."""
    return raw_part(kind, line(text) if kind == "ollama" else delta(content=text))


def raw_part(kind: str, value: Mapping[str, Any]) -> bytes:
    """A piece of a stream with this object in it."""
    data = json.dumps(value).encode()
    return chunk(data + b"\n" if kind == "ollama" else b"data: " + data + b"\n\n")


def ended(kind: str) -> bytes:
    """The end of a stream that `begun` began."""
    if kind == "ollama":
        return raw_part(kind, last_line()) + LAST_CHUNK
    return raw_part(kind, finish()) + chunk(b"data: [DONE]\n\n") + LAST_CHUNK


@contextmanager
def client_of(toml: str) -> Iterator[RawClient]:
    """A client of a daemon that serves by this configuration."""
    with Daemon(toml) as daemon, daemon.client() as client:
        yield client


@contextmanager
def full_listener() -> Iterator[int]:
    """A port on which somebody listens but takes no more connections: they stay under way."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, ExitStack() as waiting:
        port = int(server.getsockname()[1])
        for _ in range(8):  # more than any system's least backlog
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        yield port


FOREVER = Limits(1e6, 1e6, 1e6, 1e6, 1e12, 1e12)


class MadeUpReply:
    """A transport.Reply without a connection: its reads are given, and what becomes of it is in `done`."""

    def __init__(self, content_type: str, reads: Sequence[bytes]) -> None:
        self.head = ResponseHead(200, {"content-type": content_type}, None, chunked=True, keep_alive=True)
        self.done: list[str] = []
        self._reads = [data for data in reads if data]

    async def read(self) -> bytes:
        return self._reads.pop(0) if self._reads else b""

    async def settle(self) -> None:
        self.done.append("settle")

    def close(self) -> None:
        self.done.append("close")


# --- what a client sees ---------------------------------------------------------------------------


def ask(
    client: RawClient, model: str = "first", headers: Mapping[str, str] | None = None, path: str = CHAT, **fields: Any
) -> RawResponse:
    """The whole answer to one request, streamed or not."""
    return client.call("POST", path, {"model": model, "messages": MESSAGES, **fields}, headers)


def frames(body: bytes) -> list[Any]:
    """The events of a streamed answer, as JSON but for [DONE]; a comment as its bytes. Nothing else may stand there."""
    found: list[Any] = []
    while body:
        if body.startswith(b": portway\n"):
            found.append(b": portway\n")
            body = body.removeprefix(b": portway\n")
            continue
        frame, end, body = body.partition(b"\n\n")
        if not frame.startswith(b"data: ") or not end or b"\n" in frame:
            raise AssertionError(f"not an event: {frame!r}")
        data = frame.removeprefix(b"data: ")
        found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return found


def text_of(chunks: Iterable[Any], key: str = "content") -> str:
    """The text of a streamed answer's chunks."""
    choices = [choice for each in chunks if isinstance(each, dict) for choice in each.get("choices", ())]
    return "".join(choice["delta"].get(key) or "" for choice in choices)


def next_json(events: Iterable[SseEvent]) -> Any:
    """The next event that is no comment."""
    return next(event.json for event in events if event.data is not None)
