"""The cache through the daemon: a client on one side, a backend on the other, sockets between."""

from __future__ import annotations

import sqlite3
import threading
import unittest
from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

from portway.cache.store import Cache
from portway.standin.server import Fault, StandIn
from tests.cached import (
    BROKEN,
    MODELS,
    QUESTION,
    TOOL,
    CachedCase,
    chat,
    choice,
    condensed,
    configured,
    streamed,
    text_of,
    verdict,
)
from tests.daemon import Daemon
from tests.doubles import LAST_CHUNK, chunk, json_reply, sse_body, stream_head
from tests.llama_server import LlamaServer, wait_for
from tests.targets import CHAT, Target, chain, delta, finish
from tests.tiny_gguf import TinyModel


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
                events, whole = answers if first_streams else answers[::-1]
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
        for part in event["choices"]:
            for key, value in part["delta"].items():
                said[key] = value if key == "role" else said.get(key, "") + (value or "")
    finishes = [part["finish_reason"] for event in events[:-1] for part in event["choices"]]
    return {"said": said, "finish": next(filter(None, finishes)), "usage": events[-2].get("usage")}


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
            self.assertTrue(self.backend.wait_for(lambda _: self.left == number))  # noqa: B023
            self.assert_not_stored(body)

    def test_tool_calls(self) -> None:
        """With tools nothing is kept, called or not."""
        body = chat(tools=[TOOL], messages=[{"role": "user", "content": "the weather please"}])
        self.assertIn("tool_calls", self.post(body).json["choices"][0]["message"])
        self.assertEqual("BYPASS", self.post(body).header("x-cache"))

    def test_a_chopped_prompt(self) -> None:
        """The backend threw a part of the question away."""
        thoughts = {"role": "assistant", "content": "a", "reasoning_content": "word " * 600}
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


if __name__ == "__main__":
    unittest.main()
