"""The cache and single flight through the daemon: clients on one side, a backend on the other, sockets between."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import unittest
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from portway import cache as cache_module
from portway import cache_cli, cache_file
from portway.cache import Cache
from portway.standin import DEFAULT_MODELS, Fault, StandIn, StandInModel
from tests.daemon import Daemon, DaemonProcess
from tests.doubles import LAST_CHUNK, RawClient, RawResponse, chunk, json_reply, sse_body, stream_head
from tests.llama_server import LlamaServer, wait_for
from tests.targets import CHAT, Target, chain, delta, finish
from tests.tiny_gguf import TinyModel

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
    "chopper": 'model = "chopper"\nnum_ctx = 64\ncache = "1h"\n',
    "embed": 'model = "nomic-embed-text"\ncapabilities = ["embedding"]\ncache = "1h"\n',
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def configured(url: str, models: Mapping[str, str] = MODELS, rest: str = "") -> str:
    """A models.toml with these models behind one stand-in, which never cools down."""
    text = f'[cooldown]\nfailures = 1000\n[backends.box]\nkind = "ollama"\nurl = "{url}"\n{rest}'
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


class Headers(CachedCase):
    def test_a_miss_then_a_hit(self) -> None:
        """The second of two equal requests is answered without a backend, says so, and by whom and how old it is."""
        first = self.post(chat())
        self.assertEqual((200, "MISS"), verdict(first))
        self.assertIsNone(first.header("age"))
        second = self.post(chat())
        self.assertEqual((200, "HIT"), verdict(second))
        self.assertEqual(("nine", "nine"), (first.header("x-served-by"), second.header("x-served-by")))
        self.assertIn(second.header("age"), ("0", "1"))
        self.assertIsNone(second.header("x-portway-attempts"))
        self.assertNotEqual(first.json["id"], second.json["id"])
        own = {"id": None, "created": None}
        self.assertEqual(first.json | own, second.json | own)
        self.assertEqual(1, self.asked)

    def test_the_age_grows(self) -> None:
        """Age is in whole seconds since the answer was stored, also once it is in the file."""
        self.post(chat())
        self.written()
        with closing(sqlite3.connect(self.path)) as db, db:
            db.execute("UPDATE answers SET stored_at = stored_at - 100")
        self.assertIn(self.post(chat()).header("age"), ("100", "101", "102"))

    def test_warnings_are_told_again(self) -> None:
        """What could not be done for the first client was not done for the second either."""
        bodies = [chat(logit_bias={"1": 2}), chat(logit_bias={"1": 2}, stream=True)]
        told = [self.post(body).header("x-portway-warning") for body in bodies]
        self.assertEqual(["ignored(logit_bias)"] * 2, told)
        self.assertEqual(1, self.asked)

    def test_what_bypasses_it(self) -> None:
        """Tools and models without a cache are asked each time, and the answer says that no cache was."""
        for body in (chat(tools=[TOOL]), chat("coder"), chat(web_search_options={"x": 1})):
            with self.subTest(body=body):
                before = self.asked
                self.assertEqual([(200, "BYPASS")] * 2, [verdict(self.post(body)) for _ in range(2)])
                self.assertEqual(before + 2, self.asked)

    def test_a_daemon_without_a_cache(self) -> None:
        """It answers, and says BYPASS."""
        with Daemon(configured(self.backend.url)) as daemon, daemon.client() as client:
            self.assertEqual((200, "BYPASS"), verdict(client.call("POST", CHAT, chat())))


class Replay(CachedCase):
    def test_one_entry_for_a_stream_and_a_plain_answer(self) -> None:
        """Whichever came first, the other form of it says the same: text, reasoning, finish, usage."""
        for number, first_streams in enumerate((False, True)):
            with self.subTest(first_streams=first_streams):
                plain = chat("thinker", seed=number)
                stream = {**plain, "stream": True, "stream_options": {"include_usage": True}}
                order = [stream, plain] if first_streams else [plain, stream]
                answers = [self.post(body) for body in order]
                self.assertEqual(["MISS", "HIT"], [answer.header("x-cache") for answer in answers])
                events, whole = (answers if first_streams else answers[::-1])
                self.assertEqual(shape_of_plain(whole.json), shape_of_stream(streamed(events.body)))
                self.assertIn("reasoning_content", whole.json["choices"][0]["message"])

    def test_a_replayed_stream_is_the_live_one(self) -> None:
        """Event by event: one id, role first, then reasoning, text, the finish reason, usage if asked, [DONE]."""
        for number, options in enumerate(({}, {"stream_options": {"include_usage": True}})):
            body = chat("thinker", stream=True, seed=number, **options)
            live, again = (self.post(body) for _ in range(2))
            self.assertEqual(["MISS", "HIT"], [live.header("x-cache"), again.header("x-cache")])
            self.assertEqual(live.header("content-type"), again.header("content-type"))
            events = [streamed(answer.body) for answer in (live, again)]
            self.assertEqual(condensed(events[0]), condensed(events[1]))
            self.assertEqual(1, len({event["id"] for event in events[1][:-1]}))
            self.assertNotEqual(events[0][0]["id"], events[1][0]["id"])
            self.assertEqual({"thinker"}, {event["model"] for event in events[1][:-1]})
            self.assertEqual(bool(options), any(event.get("usage") for event in events[1][:-1]))

    def test_a_stream_that_did_not_ask_for_usage_serves_one_that_does(self) -> None:
        """The counts are stored although the first client did not want them."""
        live = self.post(chat(stream=True))
        self.assertFalse(any("usage" in event for event in streamed(live.body)[:-1]))
        again = self.post(chat(stream=True, stream_options={"include_usage": True}))
        self.assertEqual("HIT", again.header("x-cache"))
        usage = streamed(again.body)[-2]["usage"]
        self.assertEqual(usage, self.post(chat()).json["usage"])
        self.assertGreater(usage["completion_tokens"], 10)

    def test_embeddings(self) -> None:
        """Vectors come back to the bit; floats and base64 are two entries."""
        bodies = [{"model": "embed", "input": ["a", "b"], **more} for more in ({}, {"encoding_format": "base64"})]
        for body in bodies:
            first, second = (self.post(body, "/v1/embeddings") for _ in range(2))
            self.assertEqual(["MISS", "HIT"], [first.header("x-cache"), second.header("x-cache")])
            self.assertEqual(first.json, second.json)
        self.assertEqual(2, self.asked)

    def test_completions(self) -> None:
        """The old endpoint, in both forms."""
        body = {"model": "nine", "prompt": "Once upon a time"}
        plain = self.post(body, "/v1/completions")
        stream = self.post({**body, "stream": True}, "/v1/completions")
        self.assertEqual(["MISS", "HIT"], [plain.header("x-cache"), stream.header("x-cache")])
        *events, done = streamed(stream.body)
        self.assertEqual("[DONE]", done)
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        self.assertEqual(plain.json["choices"][0]["text"], text)
        self.assertEqual("stop", events[-1]["choices"][0]["finish_reason"])


def shape_of_plain(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    return {"said": choice["message"], "finish": choice["finish_reason"], "usage": answer["usage"]}


def shape_of_stream(events: list[Any]) -> dict[str, Any]:
    """The same of a stream's chunks."""
    said: dict[str, str] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            for key, value in choice["delta"].items():
                said[key] = value if key == "role" else said.get(key, "") + (value or "")
    finishes = [choice["finish_reason"] for event in events[:-1] for choice in event["choices"]]
    return {"said": said, "finish": next(filter(None, finishes)), "usage": events[-2].get("usage")}


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


class NeverStored(CachedCase):
    def twice(self, body: Mapping[str, Any], status: int = 200) -> None:
        """The same request again is a miss: of the first one nothing was kept."""
        self.assertEqual(status, self.post(body).status)
        self.assert_not_stored(body)

    def assert_not_stored(self, body: Mapping[str, Any]) -> None:
        before = self.asked
        self.assertEqual((504, None), verdict(self.post(body, Cache_Control="only-if-cached")))
        self.assertEqual("MISS", self.post(body).header("x-cache"))
        self.assertEqual(before + 1, self.asked)

    def test_demoted(self) -> None:
        """What another model answered never comes out later under the name of the first, nor under its own."""
        for stream in (False, True):
            self.backend.fail("/api/chat", BROKEN)
            demoted = self.post(chat(stream=stream, seed=int(stream)))
            self.assertEqual(("three", "MISS"), (demoted.header("x-served-by"), demoted.header("x-cache")))
            self.assertEqual("three", self.post(chat("three", seed=int(stream))).header("x-served-by"))
            later = self.post(chat(stream=stream, seed=int(stream)))
            self.assertEqual(("nine", "MISS"), (later.header("x-served-by"), later.header("x-cache")))
        self.assertEqual(6, self.asked - 2)  # twice, nine failed first

    def test_cut(self) -> None:
        """An answer that reached its token limit."""
        self.twice(chat(max_tokens=3))
        self.twice(chat(max_tokens=3, stream=True))

    def test_empty(self) -> None:
        """Not an answer at all."""
        for stream in (False, True):
            self.backend.fail("/api/chat", "empty_answer", 1)
            self.twice(chat("three", stream=stream, seed=int(stream)), 502)

    def test_failed_in_the_middle(self) -> None:
        """A stream that broke after its first words."""
        for number, kind in enumerate(("cut", "error_line", "eof", "half_line", "bad_line")):
            self.backend.fail("/api/chat", Fault(kind))
            body = chat("three", stream=True, seed=number)
            self.assertNotIn(b"[DONE]", self.post(body).body)
            self.assert_not_stored(body)

    def test_cancelled(self) -> None:
        """A stream whose client left halfway, and a plain request likewise."""
        for stream in (False, True):
            body = chat("three", stream=stream, seed=int(stream))
            self.backend.fail("/api/chat", "hang_mid_stream")
            with self.daemon.client() as client:
                client.request("POST", CHAT, body)
                self.await_phase("hang")
            number = 1 + stream
            self.assertTrue(self.backend.wait_for(lambda backend: self.left == number))  # noqa: B023
            self.assert_not_stored(body)

    def test_tool_calls(self) -> None:
        """With tools nothing is kept, called or not."""
        body = chat(tools=[TOOL], messages=[{"role": "user", "content": "the weather please"}])
        self.assertIn("tool_calls", self.post(body).json["choices"][0]["message"])
        self.assertEqual("BYPASS", self.post(body).header("x-cache"))

    def test_a_chopped_prompt(self) -> None:
        """The backend threw a part of the question away."""
        thoughts = {"role": "assistant", "content": "a", "reasoning_content": "word " * 200}
        words = [*QUESTION, thoughts, *QUESTION]
        for stream in (False, True):
            with self.subTest(stream=stream):
                body = chat("chopper", messages=words, stream=stream)
                answer = self.post(body)
                self.assertIn("prompt_truncated", f"{answer.header('x-portway-warning')}{answer.body!r}")
                self.assert_not_stored(body)

    def test_several_answers(self) -> None:
        """n = 2 is not looked up."""
        two = {"choices": [choice(0), choice(1)]}
        with Target(then=json_reply(two)) as target, closing(Cache(self.path + "2")) as cache:
            toml = chain(target.url, models={"first": 'cache = "1h"\n'})
            with Daemon(toml, cache=cache) as daemon, daemon.client() as client:
                for body in (chat("first", n=2), chat("first")):  # the second one's server gives two unasked
                    answers = [client.call("POST", CHAT, body) for _ in range(2)]
                    self.assertNotIn("HIT", [answer.header("x-cache") for answer in answers])
            self.assertEqual(4, len(target.asked))


def choice(index: int = 0, text: str = "Hello.") -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}


class Steering(CachedCase):
    def test_cache_control(self) -> None:
        """Each directive and what it does to a stored answer and to the next request, however it is written."""
        rows = [  # the header; this request's verdict with an entry there; whether the backend was asked
            ("no-cache", "MISS", True),
            ("NO-CACHE", "MISS", True),
            ("max-age=0", "MISS", True),
            ("Max-Age = 60", "HIT", False),
            ("max-age=60 , foo", "HIT", False),
            ('max-age="60"', "HIT", False),
            ("no-store", "BYPASS", True),
            ("No-Store,No-Cache", "BYPASS", True),
            ("only-if-cached", "HIT", False),
            ("only-if-cached, max-age=60", "HIT", False),
            ("private", "HIT", False),
        ]
        self.post(chat())
        for header, expected, asks in rows:
            with self.subTest(header):
                before = self.asked
                self.assertEqual((200, expected), verdict(self.post(chat(), Cache_Control=header)))
                self.assertEqual(before + asks, self.asked)

    def test_no_cache_stores_what_comes(self) -> None:
        """The old answer is replaced by the new one, also if it is older than max-age allows."""
        self.post(chat())
        self.age_by(100)
        self.assertEqual("HIT", self.post(chat(), Cache_Control="max-age=3600").header("x-cache"))
        self.assertEqual("MISS", self.post(chat(), Cache_Control="max-age=99").header("x-cache"))
        self.assertIn(self.post(chat()).header("age"), ("0", "1"))
        self.age_by(100)
        self.assertEqual("MISS", self.post(chat(), Cache_Control="no-cache").header("x-cache"))
        self.assertIn(self.post(chat()).header("age"), ("0", "1"))

    def test_no_store_stores_nothing(self) -> None:
        """Neither with nor without no-cache."""
        for header in ("no-store", "no-cache, no-store"):
            self.assertEqual("BYPASS", self.post(chat(), Cache_Control=header).header("x-cache"))
        self.assertEqual("MISS", self.post(chat()).header("x-cache"))

    def test_only_if_cached(self) -> None:
        """Without an entry that will do it is 504 in OpenAI's form, and no model is asked."""
        self.post(chat(seed=1))
        self.age_by(100)
        refused = [
            (chat(), "only-if-cached"),
            (chat(stream=True), "only-if-cached"),
            (chat(seed=1), "only-if-cached, max-age=50"),
            (chat(seed=1), "only-if-cached, no-cache"),
            (chat(seed=1), "only-if-cached, no-store"),
            (chat("coder"), "only-if-cached"),
        ]
        before = self.asked
        for body, header in refused:
            with self.subTest(header, body=body):
                answer = self.post(body, Cache_Control=header)
                error = answer.json["error"]
                self.assertEqual((504, "not_cached", "api_error"), (answer.status, error["code"], error["type"]))
        self.assertEqual(before, self.asked)

    def test_a_max_age_holds_for_who_waited_in_line(self) -> None:
        """Who takes over from a failed leader gets no answer that is older than it may be."""
        gate = threading.Event()
        good, old = (json_reply({"choices": [choice(text=text)]}) for text in ("new", "old"))
        models = dict.fromkeys(("first", "second"), 'cache = "1h"\nstrict = true\n')
        with ExitStack() as stack:
            target = stack.enter_context(Target(old, [gate, json_reply({"error": {"message": "no"}}, 500)], then=good))
            toml = chain(target.url, target.url, models=models)
            daemon = stack.enter_context(Daemon(toml, cache=self.cache))
            clients = [stack.enter_context(daemon.client()) for _ in range(3)]
            clients[0].call("POST", CHAT, chat("first"))
            clients[0].call("GET", "/health")
            self.age_by(100)
            for number, client in enumerate(clients[:2], 2):
                client.request("POST", CHAT, chat("first"), {"Cache-Control": "max-age=50"})
                wait_for(lambda: len(target.asked) + daemon.sharing == number, "its place")  # noqa: B023
            clients[2].call("POST", CHAT, chat("second"))  # so that something was stored meanwhile
            gate.set()
            self.assertEqual(502, clients[0].response().status)
            answer = clients[1].response()
            self.assertEqual(("new", "MISS"), (text_of(answer), answer.header("x-cache")))

    def age_by(self, seconds: int) -> None:
        self.written()
        with closing(sqlite3.connect(self.path)) as db, db:
            db.execute("UPDATE answers SET stored_at = stored_at - ?", (seconds,))



def facts_of(response: RawResponse) -> tuple[str, str, str]:
    """(served_by, cache, attempts), from the headers or, where a heartbeat had sent those, from the first chunk."""
    names = ("x-served-by", "x-cache", "x-portway-attempts")
    if response.header(names[0]):
        served_by, cache, attempts = (response.header(name) or "" for name in names)
        return served_by, cache, attempts
    facts = streamed(response.body)[0]["portway"]
    return facts["served_by"], facts["cache"], facts.get("attempts", "")


class Key(CachedCase):
    def test_each_option_that_shapes_the_answer_counts(self) -> None:
        """A reload that changes what a backend is asked makes the stored answer another request's."""
        plain = {"three": MODELS["three"]}
        lines = [
            "num_ctx = 4096",
            'think = false\ncapabilities = ["completion", "thinking"]',
            "max_tokens = 4000",
            "merge_system = true",
            "params = { seed = 1 }",
            "params = { seed = 2 }",
        ]
        changed = [{"three": MODELS["three"] + line + "\n"} for line in lines]
        changed.append({"three": MODELS["three"].replace("llama3.2:3b", "gemma3:1b")})
        for models in (plain, *changed):
            with self.subTest(models=models):
                self.daemon.use(configured(self.backend.url, models))
                self.assertEqual(["MISS", "HIT"], [self.post(chat("three")).header("x-cache") for _ in range(2)])
        same = [{"three": MODELS["three"] + line + "\n"} for line in ('keep_alive = "1h"', "timeouts = { total = 9 }")]
        for models in (plain, *same):
            with self.subTest(models=models):
                self.daemon.use(configured(self.backend.url, models))
                self.assertEqual("HIT", self.post(chat("three")).header("x-cache"))

    def test_the_backend_counts(self) -> None:
        """The same model behind another address is not known to be the same."""
        self.post(chat("three"))
        with StandIn() as other:
            self.daemon.use(configured(other.url, {"three": MODELS["three"]}))
            self.assertEqual("MISS", self.post(chat("three")).header("x-cache"))
            self.assertEqual(1, sum(request.path == "/api/chat" for request in other.requests))

    def test_each_field_of_the_body_counts(self) -> None:
        """Whatever the client says, known or not, but for what can't shape an answer."""
        fields: list[dict[str, Any]] = [{}, {"temperature": 0}, {"temperature": 1}, {"top_p": 0.5}, {"seed": 1}]
        fields += [{"max_tokens": 4000}, {"max_completion_tokens": 4000}, {"stop": ["x"]}, {"unheard_of": 1}]
        fields += [{"response_format": {"type": "json_object"}}, {"presence_penalty": 1}, {"top_k": 3}]
        fields += [{"reasoning_effort": "low"}, {"logprobs": True}, {"chat_template_kwargs": {"a": 1}}]
        fields += [{"messages": [*QUESTION, *QUESTION]}, {"messages": [{"role": "system", "content": "x"}, *QUESTION]}]
        for more in fields:
            with self.subTest(more):
                answers = [self.post(chat("three") | more) for _ in range(2)]
                self.assertEqual(["MISS", "HIT"], [answer.header("x-cache") for answer in answers])
        for more in ({"user": "me"}, {"metadata": {"a": "b"}}, {"stream": True}, {"stream": False}):
            with self.subTest(more):
                self.assertEqual("HIT", self.post(chat("three") | more).header("x-cache"))

    def test_an_alias_is_the_model(self) -> None:
        """Two names of one model share their answers."""
        self.daemon.use(configured(self.backend.url, {"three": MODELS["three"] + 'flag = "3b"\naliases = ["gpt"]\n'}))
        names = ("three", "gpt", "flag:3b")
        self.assertEqual(["MISS", "HIT", "HIT"], [self.post(chat(name)).header("x-cache") for name in names])


class FlightCase(CachedCase):
    """Requests for the same at the same time. The stand-in hangs until it is released."""

    SERVER = "[server]\nheartbeat = 0.05\n"

    @contextmanager
    def together(self, bodies: Iterable[Mapping[str, Any]], **headers: str) -> Iterator[list[RawClient]]:
        """Clients that have all sent their requests: the first one's hangs at the backend, the others wait for it."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with ExitStack() as stack:
            clients: list[RawClient] = []
            for body in bodies:
                client = stack.enter_context(self.daemon.client())
                client.request("POST", CHAT, body, named)
                clients.append(client)
                if len(clients) == 1:
                    self.await_phase("hang")
            wait_for(lambda: self.daemon.sharing == len(clients) - 1, "the others' waiting")
            yield clients


class AtOnce(FlightCase):
    def test_fifty_at_once_ask_once(self) -> None:
        """Plain, streamed and mixed; each gets the same text, under an id of its own."""
        for number, kind in enumerate(("plain", "streamed", "mixed")):
            with self.subTest(kind):
                self.backend.fail("/api/chat", "hang")
                before = self.asked
                forms = [kind == "streamed" or (kind == "mixed" and bool(place % 2)) for place in range(50)]
                bodies = [chat("three", stream=form, seed=number) for form in forms]
                with self.together(bodies) as clients:
                    self.backend.release()
                    answers = [client.response() for client in clients]
                self.assertEqual(before + 1, self.asked)
                self.assertEqual(1, len({text_of(answer) for answer in answers}))
                ids = {
                    streamed(answer.body)[0]["id"] if form else answer.json["id"]
                    for form, answer in zip(forms, answers, strict=True)
                }
                self.assertEqual(50, len(ids))
                self.assertEqual((200, "HIT"), verdict(self.post(bodies[0])))

    def test_who_waited_is_told_so(self) -> None:
        """An answer that no model had to work for is a HIT, of age 0."""
        self.backend.fail("/api/chat", "hang")
        with self.together([chat("three")] * 2) as clients:
            self.backend.release()
            answers = [client.response() for client in clients]
        told = [(answer.header("x-cache"), answer.header("age")) for answer in answers]
        self.assertEqual([("MISS", None), ("HIT", "0")], told)

    def test_heartbeats_reach_who_waits(self) -> None:
        """A streaming client hears that somebody is there, and then from the stream itself who answers."""
        self.backend.fail("/api/chat", "hang")
        with self.together([chat("three", stream=True)] * 3) as clients:
            streams = [client.events(client.head()) for client in clients]
            self.assertEqual(["portway"] * 3, [next(stream).comment for stream in streams])
            self.backend.release()
            firsts = [next(event.json for event in stream if event.data) for stream in streams]
        facts = [{"served_by": "three", "cache": verdict} for verdict in ("MISS", "HIT", "HIT")]
        self.assertEqual(facts, [first["portway"] for first in firsts])

    def test_a_demoted_answer_is_shared_but_not_kept(self) -> None:
        """Who waits gets what the first one got, with the truth about it; later the model itself is asked again."""
        self.backend.fail("/api/chat", BROKEN)
        self.backend.fail("/api/chat", "hang")
        with self.together([chat(), chat(), chat(stream=True)]) as clients:
            self.backend.release()
            told = [facts_of(client.response()) for client in clients]
        self.assertEqual([("three", "MISS"), ("three", "HIT"), ("three", "HIT")], [each[:2] for each in told])
        self.assertEqual(1, len({attempts for _, _, attempts in told}))
        self.assertRegex(told[0][2], r"^nine=server_error\(.*\); three=ok$")
        self.assertEqual(("nine", "MISS", ""), facts_of(self.post(chat())))

    def test_without_fallback_nobody_gets_a_demoted_answer(self) -> None:
        """X-Portway-Fallback: off does not wait for a request that may fall back."""
        self.backend.fail("/api/chat", BROKEN)
        self.backend.fail("/api/chat", "hang")
        with self.together([chat()]) as (lenient,):
            strict = self.post(chat(), X_Portway_Fallback="off")
            self.assertEqual(("nine", "MISS", ""), facts_of(strict))
            self.backend.release()
            self.assertEqual("three", lenient.response().header("x-served-by"))

    def test_too_many_for_one_flight(self) -> None:
        """Who comes beyond the bound is answered by itself."""
        self.backend.fail("/api/chat", "hang", 2)
        bodies = [chat("three")] * 130
        with ExitStack() as stack:
            clients = [stack.enter_context(self.daemon.client()) for _ in bodies]
            for client, body in zip(clients, bodies, strict=True):
                client.request("POST", CHAT, body)
            wait_for(lambda: self.daemon.sharing == 128, "a full flight")
            self.assertTrue(self.backend.wait_for(lambda _: self.in_phase("hang") == 2))
            self.backend.release()
            self.assertEqual({200}, {client.response().status for client in clients})
        self.assertEqual(2, self.asked)

    def test_nothing_leaks(self) -> None:
        """After ten storms no request is under way, no flight is left, and no more descriptors are open than before."""
        toml = configured(self.backend.url)
        self.daemon.use(toml.replace('kind = "ollama"', 'kind = "ollama"\nmax_idle = 0'))
        self.post(chat("three"))
        before = len(os.listdir("/dev/fd"))
        for number in range(10):
            self.backend.fail("/api/chat", "hang")
            with self.together([chat("three", stream=bool(place % 2), seed=number) for place in range(9)]) as clients:
                for client in clients[::3]:
                    client.close()
                wait_for(lambda: self.daemon.sharing == 6, "their leaving")
                self.backend.release()
                kept = [client for place, client in enumerate(clients) if place % 3]
                self.assertEqual({200}, {client.response().status for client in kept})
        wait_for(lambda: len(os.listdir("/dev/fd")) <= before + cache_file.IDLE_READERS, "the descriptors' being closed")
        self.assertEqual(0, self.daemon.flights)
        self.assertEqual(1, self.client.call("GET", "/health").json["in_flight"])


class Leaving(FlightCase):
    """What becomes of a flight when its members go, or fail."""

    def hang(self, kind: str = "hang") -> None:
        self.backend.fail("/api/chat", kind)

    def test_the_first_ones_leaving_does_not_cancel_the_others(self) -> None:
        """Before the answer or in the middle of it, plain or streamed: it goes on, once, and is kept."""
        for number, (kind, stream) in enumerate(
            [("hang", False), ("hang", True), ("hang_mid_stream", False), ("hang_mid_stream", True)]
        ):
            with self.subTest(kind, stream=stream):
                self.hang(kind)
                before = self.asked
                body = chat("three", stream=stream, seed=number)
                with self.together([body, body, {**body, "stream": not stream}]) as clients:
                    if stream and kind == "hang_mid_stream":
                        events = clients[0].events(clients[0].head())
                        next(event for event in events if event.data)
                    clients[0].close()
                    self.backend.release()
                    answers = [client.response() for client in clients[1:]]
                self.assertEqual([(200, "HIT")] * 2, [(each.status, facts_of(each)[1]) for each in answers])
                self.assertEqual(1, len({text_of(answer) for answer in answers}))
                self.assertEqual((200, "HIT"), verdict(self.post(body)))
                self.assertEqual(before + 1, self.asked)

    def test_when_all_have_left_the_generation_stops(self) -> None:
        """The last one's leaving reaches the backend, whether the first one left before or after it."""
        for number, order in enumerate(((0, 1, 2), (2, 1, 0))):
            with self.subTest(order):
                self.hang("hang_mid_stream")
                bodies = [chat("three", stream=bool(place % 2), seed=number) for place in range(3)]
                with self.together(bodies) as clients:
                    for place in order:
                        self.assertEqual(number, self.left)
                        clients[place].close()
                        waiting = sum(client.sock.fileno() >= 0 for client in clients[1:])
                        wait_for(lambda: self.daemon.sharing == waiting, "its leaving")  # noqa: B023
                    self.assertTrue(self.backend.wait_for(lambda _: self.left == number + 1))  # noqa: B023
                wait_for(lambda: self.daemon.flights == 0, "the flight's end")
                self.assertEqual("MISS", self.post(bodies[0]).header("x-cache"))

    def test_a_client_that_does_not_read_keeps_nobody_waiting_for_ever(self) -> None:
        """The first one's connection is full: it is given up, and the others get the whole answer."""
        gate = threading.Event()
        texts = ["x" * 1_000_000] * 7
        events = sse_body([delta(role="assistant"), *(delta(content=text) for text in texts), finish()])
        reply = [gate, stream_head(), *map(chunk, events), LAST_CHUNK]
        server = "[server]\nwrite_timeout = 1\n"
        with ExitStack() as stack:
            target = stack.enter_context(Target(reply))
            toml = chain(target.url, models={"first": 'cache = "1h"\n'}, rest=server)
            daemon = stack.enter_context(Daemon(toml, cache=self.cache))
            clients = [stack.enter_context(daemon.client()) for _ in range(2)]
            clients[0].request("POST", CHAT, chat("first", stream=True))
            target.wait_requests(1)
            wait_for(lambda: len(target.asked) == 1, "the first one")
            clients[1].request("POST", CHAT, chat("first"))
            wait_for(lambda: daemon.sharing == 1, "the second one's waiting")
            gate.set()
            answer = clients[1].response()
            self.assertEqual((200, "HIT"), verdict(answer))
            self.assertEqual("".join(texts), text_of(answer))


class Failing(CachedCase):
    """A flight whose leader's backend fails. The backends are scripted, so that they fail when a test says so."""

    @contextmanager
    def together(self, target: Target, forms: Iterable[bool]) -> Iterator[tuple[Daemon, list[RawClient]]]:
        toml = chain(target.url, models={"first": 'cache = "1h"\n'}, rest="[cooldown]\nfailures = 1000\n")
        with ExitStack() as stack:
            daemon = stack.enter_context(Daemon(toml, cache=self.cache))
            clients: list[RawClient] = []
            for form in forms:
                client = stack.enter_context(daemon.client())
                client.request("POST", CHAT, chat("first", stream=form))
                clients.append(client)
                wait_for(lambda: len(target.asked) + daemon.sharing == len(clients), "its place")
            yield daemon, clients

    def test_one_takes_over(self) -> None:
        """The first one fails, one of the others asks again, and all of these get its answer."""
        gate, again = threading.Event(), threading.Event()
        error = json_reply({"error": {"message": "no"}}, 500)
        with Target([gate, error], [again, json_reply({"choices": [choice()]})]) as target:
            with self.together(target, [False] * 10) as (daemon, clients):
                gate.set()
                wait_for(lambda: len(target.asked) == 2, "the second try")
                self.assertEqual(502, clients[0].response().status)
                again.set()
                answers = [client.response() for client in clients[1:]]
            self.assertEqual([200] * 9, [answer.status for answer in answers])
            self.assertEqual(8, sum(answer.header("x-cache") == "HIT" for answer in answers))
            self.assertEqual(2, len(target.asked))

    def test_a_second_failure_is_everybodys(self) -> None:
        """A backend that is down is asked twice, and everybody is told all about it, streaming or not."""
        gate = threading.Event()
        error = json_reply({"error": {"message": "no"}}, 500)
        with Target([gate, error], then=error) as target:
            with self.together(target, [False, True] * 5) as (daemon, clients):
                gate.set()
                answers = [client.response() for client in clients]
            self.assertEqual(2, len(target.asked))
            for answer in answers:
                self.assertEqual((502, "server_error"), (answer.status, answer.json["error"]["code"]))
                self.assertTrue((answer.header("x-portway-attempts") or "").startswith("first=server_error("))
                self.assertEqual("false", answer.header("x-should-retry"))

    def test_a_stream_that_breaks_for_its_client_is_begun_again_for_the_others(self) -> None:
        """What the first one got can't be taken back; who waited has got nothing yet and need not see it."""
        gate, more = threading.Event(), threading.Event()
        broken = [gate, stream_head(), *map(chunk, sse_body([delta(content="Hel")], done=False)), more, LAST_CHUNK]
        good = [stream_head(), *map(chunk, sse_body([delta(content="Hello."), finish()])), LAST_CHUNK]
        with Target(broken, good) as target, self.together(target, [True] * 3) as (_, clients):
            gate.set()
            events = clients[0].events(clients[0].head())
            self.assertEqual("Hel", next(events).json["choices"][0]["delta"]["content"])
            more.set()
            self.assertIn("error", [event.json for event in events][-1])
            answers = [client.response() for client in clients[1:]]
            self.assertEqual([200, 200], [answer.status for answer in answers])
            self.assertEqual({"Hello."}, {text_of(answer) for answer in answers})

    def test_what_is_too_long_to_be_shared(self) -> None:
        """Then everybody asks for himself, at once."""
        gate = threading.Event()
        events = sse_body([delta(content="x" * 5_000_000), delta(content="y" * 5_000_000), finish()])
        long = [gate, stream_head(), *map(chunk, events), LAST_CHUNK]
        short = [stream_head(), *map(chunk, sse_body([delta(content="Hello."), finish()])), LAST_CHUNK]
        with Target(long, then=short) as target, self.together(target, [True] * 3) as (_, clients):
            gate.set()
            answers = [client.response() for client in clients]
            self.assertEqual([10_000_000, 6, 6], [len(text_of(answer)) for answer in answers])
            self.assertEqual(3, len(target.asked))


class Trouble(CachedCase):
    """Whatever is wrong with the cache's file: requests go on, /health and stderr say so once, and it recovers."""

    def setUp(self) -> None:
        for name, seconds in (("RETRY_AFTER", 0.05), ("RETRY_AT_MOST", 0.1), ("WRITE_PATIENCE", 0.05)):
            self.enterContext(mock.patch.object(cache_module, name, seconds))
        super().setUp()

    @contextmanager
    def cached_at(self, path: str) -> Iterator[None]:
        """Another daemon, with its cache there."""
        self.cache.close()
        self.path, self.cache = path, Cache(path, say=self.said.append)
        with closing(self.cache), Daemon(configured(self.backend.url), cache=self.cache) as self.daemon:
            with self.daemon.client() as self.client:
                yield

    def assert_works(self) -> None:
        wait_for(lambda: self.health()["problem"] is None, "the cache's recovery", lambda: str(self.said))
        self.assertEqual(["MISS", "HIT"], [self.post(chat("three", top_k=9)).header("x-cache") for _ in range(2)])

    def assert_goes_on_without(self, words: str) -> None:
        """Requests are answered; the trouble is said, and said once."""
        wait_for(lambda: words in str(self.health()["problem"]), "the problem's being known", lambda: str(self.said))
        answers = [self.post(chat("three", seed=7)) for _ in range(3)]
        self.assertEqual([200] * 3, [answer.status for answer in answers])
        self.assertEqual(1, sum(words in line for line in self.said), self.said)

    def test_corrupt(self) -> None:
        """What is no database is kept aside, and a new one begun."""
        path = os.path.join(self.folder, "corrupt.sqlite3")
        Path(path).write_bytes(b"this is no database" * 1000)
        with self.cached_at(path):
            self.assert_works()
            self.assertIn("was corrupt; it is kept as", self.health()["notice"])
            self.assertEqual(1, len(self.said))
            self.assertEqual(1, len(cache_file.aside(path)))

    def test_torn_pages(self) -> None:
        """A file that looks right until it is read: the look-up is a miss, and then the same happens."""
        for seed in range(30):
            self.post(chat("three", seed=seed))
        self.cache.close()
        with open(self.path, "r+b") as file:
            file.seek(cache_file.PAGE)
            file.write(os.urandom(os.path.getsize(self.path) - cache_file.PAGE))
        with self.cached_at(self.path):
            self.assertEqual({(200, "MISS")}, {verdict(self.post(chat("three", seed=seed))) for seed in range(30)})
            wait_for(lambda: len(self.said) == 1 and not self.cache.problem, "a new file", lambda: str(self.said))
            self.assert_works()

    def test_locked(self) -> None:
        """Another process holds the file: answers wait in memory, where they are found, and are written later."""
        lock = (
            "import sqlite3, sys\n"
            "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "db.execute('BEGIN IMMEDIATE')\n"
            "print('locked', flush=True)\n"
            "sys.stdin.read()\n"
        )
        self.post(chat("three"))
        self.written()
        command = [sys.executable, "-c", lock, self.path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdin and other.stdout
            other.stdout.readline()
            self.assertEqual(["MISS", "HIT"], [self.post(chat("three", seed=1)).header("x-cache") for _ in range(2)])
            self.assert_goes_on_without("is locked by another process")
            other.stdin.close()
        self.assert_works()
        self.assertEqual("HIT", self.post(chat("three", seed=1)).header("x-cache"))
        self.assertEqual("the cache works again", self.said[-1])

    def test_of_a_newer_version(self) -> None:
        """It is left alone."""
        path = os.path.join(self.folder, "newer.sqlite3")
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE t (x)")
            db.execute("PRAGMA user_version = 99")
        before = Path(path).read_bytes()
        with self.cached_at(path):
            self.assert_goes_on_without("was written by a newer Portway")
            self.assertEqual(before, Path(path).read_bytes())
            os.unlink(path)
            self.assert_works()

    def test_where_no_file_can_be(self) -> None:
        """A folder that can't be made."""
        with self.cached_at("/dev/null/portway/cache.sqlite3"):
            self.assert_goes_on_without("can't be used")

    def test_off_and_on(self) -> None:
        """`portway cache off`: nothing is looked up, nothing kept, and answers say BYPASS; `on`: all of it is back."""
        self.post(chat("three"))
        self.written()
        with redirect_stdout(StringIO()):
            self.assertEqual(0, cache_cli.main(["off"], self.path))
        self.cache.flush(10)
        self.assert_goes_on_without("is turned off")
        self.assertEqual((200, "BYPASS"), verdict(self.post(chat("three"))))
        self.assertEqual(504, self.post(chat("three"), Cache_Control="only-if-cached").status)
        self.assertEqual(0, self.health()["dropped"])
        with redirect_stdout(StringIO()):
            self.assertEqual(0, cache_cli.main(["on"], self.path))
        self.assert_works()
        self.assertEqual("HIT", self.post(chat("three")).header("x-cache"))


class Killed(unittest.TestCase):
    """The daemon as a process, with the files of a user."""

    def setUp(self) -> None:
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.environ = {"XDG_CACHE_HOME": f"{folder}/cache", "XDG_DATA_HOME": f"{folder}/data"}
        self.path = f"{folder}/cache/portway/cache.sqlite3"
        self.log = Path(folder) / "data" / "portway" / "log.jsonl"
        self.backend = self.enterContext(StandIn())
        models = {name: MODELS[name] for name in ("three", "embed")}
        self.toml = configured(self.backend.url, models)

    def test_kill_9_in_the_middle_of_a_thousand_writes(self) -> None:
        """What was in the file stays there and is found again; the log has whole lines only."""
        with DaemonProcess(self.toml, self.environ) as daemon:
            threads = [threading.Thread(target=self.write, args=(daemon, place), daemon=True) for place in range(10)]
            for thread in threads:
                thread.start()
            wait_for(lambda: len(self.stored()) >= 300, "300 answers in the file")
            before = self.stored()
            daemon.send(signal.SIGKILL)
            daemon.wait()
            for thread in threads:
                thread.join(30)
        self.assertLess(len(before), 1000)
        with DaemonProcess(self.toml, self.environ) as daemon, daemon.client() as client:
            self.assertEqual(set(), before - self.stored())
            with closing(sqlite3.connect(self.path)) as db:
                self.assertEqual([("ok",)], db.execute("PRAGMA integrity_check").fetchall())
            verdicts = [client.call("POST", CHAT, chat("three", seed=seed)).header("x-cache") for seed in range(1000)]
            self.assertGreaterEqual(verdicts.count("HIT"), len(before))
            wait_for(lambda: self.log.read_bytes().count(b'"cache_hit":true') >= len(before), "the log")
            lines = self.log.read_bytes().split(b"\n")
        self.assertEqual(b"", lines.pop())
        for line in lines:
            self.assertIn("prompt_hash", json.loads(line))

    def write(self, daemon: DaemonProcess, place: int) -> None:
        """A tenth of the thousand, as far as the daemon lives."""
        try:
            with daemon.client() as client:
                for seed in range(place, 1000, 10):
                    client.call("POST", CHAT, chat("three", seed=seed))
        except (ConnectionError, TimeoutError):
            pass

    def stored(self) -> set[bytes]:
        """The keys in the file."""
        try:
            with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as db:
                return {key for (key,) in db.execute("SELECT key FROM answers")}
        except sqlite3.OperationalError:  # there is no table yet
            return set()

    @unittest.skipUnless(hasattr(resource, "prlimit"), "needs Linux, to take a process its disk away")
    def test_a_full_disk(self) -> None:
        """Requests go on, /health and stderr tell of log and cache, once; with room again both go on."""
        with DaemonProcess(self.toml, self.environ) as daemon, daemon.client() as client:
            first = client.call("POST", "/v1/embeddings", vectors(0))
            wait_for(lambda: len(self.stored()) == 1 and self.log.exists(), "the files")
            self.limit(daemon, 8192)
            answers = [client.call("POST", "/v1/embeddings", vectors(number)) for number in range(1, 40)]
            wait_for(lambda: all(self.problems(client)), "both problems", lambda: daemon.log)
            self.assertEqual({200}, {answer.status for answer in [first, *answers]})
            self.assertEqual(200, client.call("POST", "/v1/embeddings", vectors(99)).status)
            self.limit(daemon, resource.RLIM_INFINITY)
            wait_for(lambda: not any(self.problems(client)), "their end", lambda: daemon.log)
            again = [client.call("POST", "/v1/embeddings", vectors(100)) for _ in range(2)]
            self.assertEqual("HIT", again[1].header("x-cache"))
            self.assertEqual(1, daemon.log.count("the cache's file"), daemon.log)
            self.assertEqual(1, daemon.log.count("the log can't be written"), daemon.log)

    def problems(self, client: RawClient) -> list[str | None]:
        health = client.call("GET", "/health").json
        return [health[part]["problem"] for part in ("cache", "log")]

    def limit(self, daemon: DaemonProcess, size: int) -> None:
        """No file of the daemon may grow beyond `size` bytes."""
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def vectors(number: int) -> dict[str, Any]:
    return {"model": "embed", "input": [f"text {number}", f"more of {number}"]}


class ReplayedToTheSdk(CachedCase):
    """OpenAI's own package reads a stream out of the cache as it reads a live one."""

    def setUp(self) -> None:
        super().setUp()
        try:
            import openai
        except ImportError:
            self.skipTest("the package `openai` is not installed")
        self.sdk = self.enterContext(openai.OpenAI(base_url=self.daemon.url, api_key="unused"))

    def chunks(self, **fields: Any) -> tuple[str | None, list[dict[str, Any]]]:
        """X-Cache, and each event as the package gives it, without what belongs to the request."""
        body: dict[str, Any] = {"messages": QUESTION, "stream": True, **fields}
        raw = self.sdk.chat.completions.with_raw_response.create(**body)
        events = [event.model_dump() for event in raw.parse()]
        self.assertEqual(1, len({event.pop("id") for event in events}))
        for event in events:
            event.pop("created")
        return raw.headers.get("x-cache"), events

    def test_event_by_event(self) -> None:
        """From a server whose pieces are as large as ours, every event is the same."""
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        chunks = [
            delta(role="assistant", content=""),
            delta(reasoning_content="Hm."),
            delta(content="Blue."),
            finish(),
            {**finish(), "choices": [], "usage": usage},
        ]
        for ask_usage in (True, False):
            sent = [{**each, "usage": each.get("usage")} if ask_usage else each for each in chunks]
            reply = [stream_head(), *map(chunk, sse_body(sent if ask_usage else sent[:-1])), LAST_CHUNK]
            with Target(reply) as target:
                self.daemon.use(chain(target.url, models={"first": 'cache = "1h"\n'}))
                options = {"stream_options": {"include_usage": True}} if ask_usage else {}
                live, again = (self.chunks(model="first", **options) for _ in range(2))
            self.assertEqual(("MISS", "HIT"), (live[0], again[0]))
            self.assertEqual(live[1], again[1])
            self.assertEqual(5 if ask_usage else 4, len(again[1]))

    def test_from_the_stand_in(self) -> None:
        """Its many small pieces come again as few large ones, in the same order."""
        live, again = (self.chunks(model="thinker", stream_options={"include_usage": True}) for _ in range(2))
        self.assertEqual(("MISS", "HIT"), (live[0], again[0]))
        self.assertGreater(len(live[1]), len(again[1]))
        self.assertEqual(condensed(live[1]), condensed(again[1]))

    def test_from_llama_server(self) -> None:
        """A real server's stream, with its own additions, likewise; and the plain answer after it."""
        with LlamaServer(TinyModel(), "-np", "1", "-t", "1") as server:
            toml = chain(f"{server.url}/v1", models={"first": 'cache = "1h"\n'})
            self.daemon.use(toml.replace("physical-first", "tiny"))
            body = {"messages": QUESTION, "temperature": 0, "max_tokens": 20}
            words = server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"].split()
            fields = {"model": "first", "temperature": 0, "stop": [words[4]]}
            options = {"stream_options": {"include_usage": True}}
            live, again = (self.chunks(**fields, **options) for _ in range(2))
            self.assertEqual(("MISS", "HIT"), (live[0], again[0]))
            self.assertEqual(condensed(live[1]), condensed(again[1]))
            self.assertEqual(live[1][-1]["timings"], again[1][-1]["timings"])
