from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any
from unittest import mock

from portway.cache import file as cache_file
from portway.cache import replay
from portway.cache import store as cache
from portway.cache.file import CacheFile, Counts, Row, Unusable
from portway.cache.rules import Control, Keys, is_storable, parse_control, request_key, why_bypassed
from portway.cache.store import Cache, Entry
from portway.call import Attempt, Call, Served, Tally
from portway.commands import cache as cache_cli
from portway.config import Backend, Model
from portway.wire.events import SSEReader, WireError, dumps
from tests.llama_server import wait_for

PATIENCE = 20.0  # seconds; no wait may take longer
ROOT = str(Path(__file__).resolve().parent.parent)
BACKEND = Backend("box", "openai", "http://127.0.0.1:8080", "http", "127.0.0.1", 8080)
MODEL = Model("fast-9b", BACKEND, "qwen3.5:9b")
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]


def a_call(endpoint: Any = "chat", model: Model = MODEL, **body: Any) -> Call:
    body = {"model": model.name, "messages": MESSAGES, **body}
    options = body.get("stream_options") or {}
    return Call(
        endpoint=endpoint,
        body=body,
        raw=json.dumps(body).encode(),
        model=model,
        stream=bool(body.get("stream")),
        include_usage=bool(options.get("include_usage")),
        id="chatcmpl-new",
        created=1_700_000_000,
    )


def key_of(number: int) -> bytes:
    return sha256(str(number).encode()).digest()


def chat_answer(text: str | None = "Rayleigh scattering.", finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-old",
        "object": "chat.completion",
        "created": 1,
        "model": "fast-9b",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }


def raw(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode()


def events(stream: bytes) -> list[Any]:
    """The data of each event, parsed; [DONE] as it is."""
    found = SSEReader().feed(stream)
    return [data.decode() if data == b"[DONE]" else json.loads(data) for data in found]


def a_stream(*chunks: dict[str, Any], done: bool = True) -> list[bytes]:
    pieces = [
        b"data: " + json.dumps({"id": "x", "model": "m", "created": 1, **chunk}).encode() + b"\n\n" for chunk in chunks
    ]
    return [*pieces, b"data: [DONE]\n\n"] if done else pieces


def delta(finish: str | None = None, **members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": members, "finish_reason": finish}]}


class RequestKeys(unittest.TestCase):
    def test_a_stream_and_a_plain_request_share_a_key(self):
        """What shapes no answer is not in the key: stream, stream_options, user, metadata, and the alias used."""
        plain = request_key(a_call(), MODEL)
        other = a_call(stream=True, stream_options={"include_usage": True}, user="me", metadata={"a": "b"}, model=MODEL)
        other.body["model"] = "gpt-4o-mini"
        self.assertEqual(plain, request_key(other, MODEL))

    def test_the_order_of_members_does_not_matter(self):
        """Two programs that write the same request in another order share an answer."""
        first, second = a_call(seed=1, top_p=0.5), a_call(top_p=0.5, seed=1)
        self.assertEqual(request_key(first, MODEL), request_key(second, MODEL))

    def test_whatever_else_the_client_says_counts(self):
        """Every other member changes the key, also one that nobody knows yet, and 1 is not true."""
        bodies: list[dict[str, Any]] = [{}, {"temperature": 0}, {"temperature": 1}, {"temperature": True}]
        bodies += [{"seed": 1}, {"not_invented_yet": "x"}, {"response_format": {"type": "json_object"}}]
        bodies += [{"messages": [{"role": "user", "content": "\ud800"}]}]
        keys = {request_key(a_call(**body), MODEL) for body in bodies}
        self.assertEqual(len(bodies), len(keys))

    def test_what_the_configuration_adds_counts(self):
        """The same request to another backend, model or setting is another request."""
        backends = [replace(BACKEND, name="b"), replace(BACKEND, kind="ollama"), replace(BACKEND, url="http://x")]
        targets = [MODEL, *(replace(MODEL, backend=backend) for backend in backends)]
        changes: list[dict[str, Any]] = [{"name": "other"}, {"model": "qwen3.5:27b"}, {"num_ctx": 8192}]
        changes += [{"think": False}, {"max_tokens": 5}, {"merge_system": True}]
        changes += [{"params": MappingProxyType({"top_k": 1})}, {"params": MappingProxyType({"top_k": 2})}]
        targets += [replace(MODEL, **change) for change in changes]
        self.assertEqual(len(targets), len({request_key(a_call(), target) for target in targets}))

    def test_how_long_a_model_stays_loaded_does_not_count(self):
        """keep_alive shapes no answer."""
        self.assertEqual(request_key(a_call(), MODEL), request_key(a_call(), replace(MODEL, keep_alive=60.0)))

    def test_members_within_members_may_come_in_any_order_too(self):
        """At every depth, and with texts of any length."""
        for text in ("why?", "y" * 10_000):
            part, trap = {"type": "text", "text": text, "cache": {"a": 1, "b": [2]}}, {"role": "user", "content": text}
            messages = [trap, {**trap, "name": "me"}, {"role": "user", "content": [part, {"a": "1", "b": "2"}]}]
            turned = json.loads(json.dumps(messages), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
            self.assertNotEqual(json.dumps(messages), json.dumps(turned))
            self.assertEqual(request_key(a_call(messages=messages), MODEL), request_key(a_call(messages=turned), MODEL))

    def test_two_values_share_a_key_only_if_they_are_the_same(self):
        """Of many values that look alike: what is told apart as JSON with sorted members has another key."""
        random = Random(5)
        leaves = ["", "a", 1, True, None]

        def value(depth: int) -> Any:
            kind = random.randrange(3) if depth else 0
            if kind == 0:
                return random.choice(leaves)
            values = [value(depth - 1) for _ in range(random.randrange(4))]
            return values if kind == 1 else dict(zip(random.sample(("a", "", "1"), 3), values, strict=False))

        found: dict[bytes, str] = {}
        for _ in range(20_000):
            given = value(3)
            told = json.dumps(given, sort_keys=True)
            self.assertEqual(told, found.setdefault(request_key(a_call(x=given), MODEL), told))
        self.assertEqual(len(set(found.values())), len(found))
        self.assertGreater(len(found), 2_000)

    def test_no_text_passes_for_a_structure(self):
        """Texts that hold what stands between texts are told apart from those that have it between them."""
        long = "x" * 10_000
        alike: list[dict[str, Any]] = [{"x": text, "y": 1} for text in ("a", "1", long)]
        alike += [{"x": f'{text}"1:y=1,'} for text in ("a", "1", long)]
        values: list[Any] = [["a", "b"], ['a"1:b'], 'a"1:b', ["ab"], "1", 1, 1.0, True, "=1,", "[0", [], {}]
        alike += [{"x": each} for each in values]
        alike += [{"x": {"a": "b", "c": "d"}}, {"x": "1:a1:b1:c1:d"}, {"x": "&1:a1:b1:c1:d"}, {"x": {"a": "b1:c1:d"}}]
        alike += [{"x": {"a": "p", "c": "q1:d1:r"}}, {"x": {"a": "p1:c7:q", "d": "r"}}]
        alike += [{"x": {"a": "b", "c": 'd"1:y=1,'}}, {"x": {"a": "b", "c": "d"}, "y": 1}]
        alike += [{"x": {"a": "b", "c": "q1:r"}}, {"x": {"a": "b", "c4:q": "r"}}]
        alike += [{"x": "\ud83d\ude00"[:1]}, {"x": "\u00e9"}, {"x": "e\u0301"}]
        self.assertEqual(len(alike), len({request_key(a_call(**body), MODEL) for body in alike}))

    def test_what_is_prepared_is_the_models(self):
        """Keys gives the same key each time, and another one for another model of the same name."""
        keys, other = Keys(), replace(MODEL, num_ctx=8192)
        for model in (MODEL, MODEL, other, MODEL):
            for endpoint in ("chat", "completions"):
                self.assertEqual(request_key(a_call(endpoint), model), keys.of(a_call(endpoint), model))

    def test_the_endpoint_counts(self):
        """A completion is no chat, whatever the bodies hold."""
        self.assertNotEqual(request_key(a_call("chat"), MODEL), request_key(a_call("completions"), MODEL))


class Rules(unittest.TestCase):
    def test_what_bypasses_the_cache(self):
        """Tools and more than one answer are never looked up; empty lists of tools are none."""
        self.assertEqual("", why_bypassed(a_call(tools=[], n=1), 60))
        self.assertEqual("", why_bypassed(a_call("embeddings", input="x"), 60))
        self.assertEqual("off", why_bypassed(a_call(), 0))
        self.assertEqual("tools", why_bypassed(a_call(tools=[{"type": "function"}]), 60))
        self.assertEqual("functions", why_bypassed(a_call(functions=[{"name": "f"}]), 60))
        self.assertEqual("web_search_options", why_bypassed(a_call(web_search_options={"a": 1}), 60))
        self.assertEqual("n", why_bypassed(a_call(n=2), 60))

    def test_cache_control(self):
        """The standard's directives, in any case and order, with what is unknown ignored."""
        cases = {
            "": Control(),
            "no-cache": Control(no_cache=True),
            "No-Store, max-stale=3": Control(no_store=True),
            "only-if-cached,max-age=60": Control(only_if_cached=True, max_age=60.0),
            'max-age="60", max-age=30': Control(max_age=30.0),
            "max-age=0": Control(no_cache=True, max_age=0.0),
            "max-age=soon": Control(no_cache=True, max_age=0.0),
            "max-age=99999999999999999999": Control(max_age=999999999999.0),
        }
        for header, control in cases.items():
            with self.subTest(header):
                self.assertEqual(control, parse_control({"cache-control": header}))
        self.assertEqual(Control(), parse_control({}))

    def test_what_is_storable(self):
        """Only an answer that came to its own end, from the model that was asked for and the whole prompt."""
        for expected, name, tally in (
            (True, "fast-9b", Tally(finish_reason="stop")),
            (True, "fast-9b", Tally()),
            (False, "fast-3b", Tally(finish_reason="stop")),
            (False, "fast-9b", Tally(finish_reason="length")),
            (False, "fast-9b", Tally(finish_reason="stop", tool_calls=1)),
            (False, "fast-9b", Tally(finish_reason="stop", truncated=True)),
        ):
            with self.subTest(name=name, tally=tally):
                answer = mock.Mock(tally=tally)
                served = Served(replace(MODEL, name=name), answer, [Attempt(name, "ok")])
                self.assertEqual(expected, is_storable(a_call(), served))


class Documents(unittest.TestCase):
    def test_only_clean_answers_are_kept(self):
        """Cut, empty, tool-calling, failed and several answers give no document."""
        several = chat_answer()
        several["choices"] *= 2
        calling = chat_answer(tool_calls=[{"id": "c"}])
        unclean = [
            chat_answer(finish="length"),
            chat_answer(finish="content_filter"),
            chat_answer(" \n"),
            chat_answer(None),
            calling,
            several,
        ]
        unclean += [{"error": {"message": "x"}}, {"choices": []}, {"object": "list", "data": []}, {"choices": 5}]
        unclean += [{**chat_answer(), "error": "late"}, chat_answer(function_call={"name": "f"})]
        for answer in unclean:
            with self.subTest(answer=answer):
                self.assertIsNone(replay.clean_plain(raw(answer)))
        self.assertIsNotNone(replay.clean_plain(raw(chat_answer())))

    def test_what_is_no_answer_is_refused(self):
        """Bytes that are not JSON, or no object, raise WireError."""
        for body in (b"", b"[1]", b"{"):
            with self.subTest(body), self.assertRaises(WireError):
                replay.plain_document(body)

    def test_a_plain_answer_comes_back_with_its_own_id(self):
        """All but id, created and model is as it was."""
        document = replay.clean_plain(raw(chat_answer(reasoning_content="Hm.")))
        assert document is not None
        told = json.loads(replay.replay(document, a_call(), "fast-9b"))
        expected = {**chat_answer(reasoning_content="Hm."), "id": "chatcmpl-new", "created": 1_700_000_000}
        self.assertEqual(expected, told)

    def test_what_is_the_requests_own_is_cut_out_wherever_it_stands(self):
        """At the top and nowhere else, in any order and spacing, with values of any kind: the rest is as it was."""
        random = Random(3)
        own: dict[str, list[Any]] = {"id": ["x", "", 'a"id":1', "\\", None, 5, {"id": "x"}, ["x"]]}
        own |= {"object": ["chat.completion"], "created": [1, 1.5, -1, True], "model": ["m", "\u00e9", "a,b}"]}
        inner: list[Any] = [
            1,
            None,
            "text",
            '"id":"x",',
            '\\"model":"m",',
            {"id": "x"},
            {"a": [{"model": "m", "b": 1}]},
        ]
        cut = 0
        for _ in range(3000):
            members = [(name, random.choice(values)) for name, values in own.items() if random.random() < 0.8]
            members += [(name, random.choice(inner)) for name in random.sample(("usage", "timings", "x"), 2)]
            members.append(("choices", [{"message": {"content": random.choice(inner[2:5])}}]))
            random.shuffle(members)
            space = random.choice((None, (",", ":"), (" , ", "  :\n")))
            text = json.dumps(dict(members), separators=space, ensure_ascii=random.random() < 0.5)
            with self.subTest(text), mock.patch("portway.cache.replay.dumps", wraps=dumps) as written:
                document = replay.plain_document(f" {text}\n".encode())
                self.assertEqual({name: each for name, each in members if name not in own}, json.loads(document))
                self.assertEqual((b"{", b"}"), (document[:1], document[-1:]))
            cut += not written.called
        self.assertGreater(cut, 500)  # it is worth its while

    def test_members_that_come_twice(self):
        """The last one counts, as in every parser; none is left over."""
        for text in ('{"id":"a","choices":[],"id":"b"}', '{"model":"a","model":"a","choices":[]}'):
            self.assertEqual(b'{"choices":[]}', replay.plain_document(text.encode()))
        self.assertEqual(b'{"x":2}', replay.plain_document(b'{"x":1,"id":"a","x":2,"id":{}}'))

    def test_embeddings_come_back_as_they_were(self):
        """A list of vectors has no id."""
        answer = {"object": "list", "data": [{"embedding": [0.5, 1e-9]}], "model": "e", "usage": {"total_tokens": 1}}
        document = replay.clean_plain(raw(answer))
        assert document is not None
        told = json.loads(replay.replay(document, a_call("embeddings", input="x"), "e"))
        self.assertEqual(answer, told)

    def test_a_stream_is_put_together(self):
        """Deltas, log probabilities, usage and unknown members become the plain answer; comments are skipped."""
        one, two = {"content": [{"token": "Ra"}], "refusal": None}, {"content": [{"token": "y"}], "refusal": None}
        first, second = delta(content="Ra"), delta(content="y")
        first["choices"][0]["logprobs"], second["choices"][0]["logprobs"] = one, two
        ending = delta("stop")
        ending["choices"][0]["stop_reason"] = "eos"
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        pieces = a_stream(
            delta(role="assistant", content=""),
            {**delta(reasoning_content="H", reasoning="H"), "system_fingerprint": "fp"},
            delta(reasoning_content="m", reasoning="m"),
            first,
            {**second, "usage": None},
            ending,
            {"choices": [], "usage": usage, "timings": {"predicted_ms": 1}},
        )
        document = replay.stream_document([b": portway\n", *pieces], Tally())
        logprobs = {"content": [{"token": "Ra"}, {"token": "y"}], "refusal": None}
        message = {"role": "assistant", "content": "Ray", "reasoning_content": "Hm", "reasoning": "Hm"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs, "stop_reason": "eos"}
        expected = {"choices": [choice], "system_fingerprint": "fp", "usage": usage, "timings": {"predicted_ms": 1}}
        self.assertEqual(expected, json.loads(document))
        self.assertEqual(document, replay.clean_stream([b"".join(pieces)], Tally()))

    def test_a_stream_without_usage_gets_it_from_the_tally(self):
        """The counts are there for a later client that asks for them; unknown ones are left out."""
        pieces = a_stream(delta(content="x"), delta("stop"))
        known = json.loads(replay.stream_document(pieces, Tally(prompt_tokens=2, completion_tokens=1)))
        self.assertEqual({"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}, known["usage"])
        self.assertNotIn("usage", json.loads(replay.stream_document(pieces, Tally(prompt_tokens=2))))

    def test_a_broken_stream_gives_no_document(self):
        """Without [DONE], with an error in it or of another shape it raises WireError; cut by length it is not kept."""
        broken: list[list[bytes]] = [
            a_stream(delta(content="x"), delta("stop"), done=False),
            a_stream(delta(content="x"), {"error": {"message": "boom"}}),
            a_stream({"choices": [5]}),
            a_stream({"choices": [{"index": [], "delta": {}}]}),
            a_stream({"choices": 7}),
            [b"data: [1]\n\n", b"data: [DONE]\n\n"],
        ]
        for pieces in broken:
            with self.subTest(pieces=pieces), self.assertRaises(WireError):
                replay.clean_stream(pieces, Tally())
        self.assertIsNone(replay.clean_stream(a_stream(delta(content="x"), delta("length")), Tally()))
        self.assertIsNone(replay.clean_stream(a_stream(delta("stop")), Tally()))

    def test_a_chat_is_streamed_again(self):
        """Role, reasoning, content with its log probabilities, finish, usage, [DONE]: each with the new id."""
        answer = {
            **chat_answer(reasoning_content="Hm.", reasoning="Hm."),
            "system_fingerprint": "fp",
            "timings": {"a": 1},
        }
        answer["choices"][0]["logprobs"] = {"content": [{"token": "R"}]}
        document = replay.plain_document(raw(answer))
        *chunks, done = events(replay.replay(document, a_call(stream=True), "fast-9b"))
        self.assertEqual("[DONE]", done)
        role, reasoning, content, ending = chunks
        for chunk in chunks:
            own = ("chatcmpl-new", "chat.completion.chunk", 1_700_000_000, "fast-9b", "fp")
            self.assertEqual(
                own, tuple(chunk[key] for key in ("id", "object", "created", "model", "system_fingerprint"))
            )
            self.assertNotIn("usage", chunk)
        self.assertEqual({"role": "assistant", "content": ""}, role["choices"][0]["delta"])
        self.assertEqual({"reasoning_content": "Hm.", "reasoning": "Hm."}, reasoning["choices"][0]["delta"])
        self.assertEqual({"content": "Rayleigh scattering."}, content["choices"][0]["delta"])
        self.assertEqual({"content": [{"token": "R"}]}, content["choices"][0]["logprobs"])
        self.assertEqual([{"index": 0, "delta": {}, "finish_reason": "stop"}], ending["choices"])
        self.assertEqual({"a": 1}, ending["timings"])
        self.assertNotIn("timings", content)

    def test_usage_is_streamed_to_who_asks(self):
        """With include_usage each chunk says null, and a last one without choices says what was used."""
        document = replay.plain_document(raw(chat_answer()))
        call = a_call(stream=True, stream_options={"include_usage": True})
        *chunks, last, _ = events(replay.replay(document, call, "fast-9b"))
        self.assertEqual([None] * 3, [chunk["usage"] for chunk in chunks])
        self.assertEqual([[], chat_answer()["usage"]], [last["choices"], last["usage"]])

    def test_a_completion_is_streamed_again(self):
        """Text and finish, as a legacy completion has them."""
        logprobs = {"tokens": ["a"], "token_logprobs": [-1.0]}
        answer = {"choices": [{"index": 0, "text": "a", "logprobs": logprobs, "finish_reason": "stop"}]}
        document = replay.plain_document(raw(answer))
        first, last, _ = events(replay.replay(document, a_call("completions", stream=True), "fast-9b"))
        self.assertEqual("text_completion", first["object"])
        self.assertEqual([{"index": 0, "text": "a", "logprobs": logprobs, "finish_reason": None}], first["choices"])
        self.assertEqual([{"index": 0, "finish_reason": "stop", "text": "", "logprobs": None}], last["choices"])

    def test_both_ways_lead_back(self):
        """A document that is streamed and put together again is the same document, for chats and completions."""
        completion = {
            "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": "stop"}],
            "usage": {"x": 1},
        }
        logged = chat_answer(reasoning_content="Hm.", reasoning="Hm.")
        logged["choices"][0]["logprobs"] = {"content": [{"token": "R"}], "refusal": None}
        for endpoint, answer in (("chat", chat_answer()), ("chat", logged), ("completions", completion)):
            with self.subTest(endpoint):
                document = replay.plain_document(raw(answer))
                call = a_call(endpoint, stream=True, stream_options={"include_usage": True})
                again = replay.stream_document([replay.replay(document, call, "fast-9b")], Tally())
                self.assertEqual(json.loads(document), json.loads(again))


class InFolder(unittest.TestCase):
    """A temporary folder, a cache in it, and what it said."""

    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(self.folder, "deep", "portway", "cache.sqlite3")
        self.enterContext(mock.patch.object(cache, "RETRY_AFTER", 0.05))
        self.said: list[str] = []
        self.spoke = threading.Condition()

    def say(self, text: str) -> None:
        with self.spoke:
            self.said.append(text)
            self.spoke.notify_all()

    def wait_for_word(self, word: str) -> None:
        with self.spoke:
            heard = self.spoke.wait_for(lambda: any(word in text for text in self.said), PATIENCE)
        self.assertTrue(heard, f"{word!r} was not said: {self.said}")

    def a_cache(self, **options: Any) -> Cache:
        made = Cache(self.path, say=self.say, **options)
        self.addCleanup(made.close, PATIENCE)
        self.assertTrue(made.flush(PATIENCE) or made.problem)
        return made

    def put(self, made: Cache, number: int, text: str = "x", model: str = "fast-9b") -> None:
        document = text.encode()
        made.put(key_of(number), lambda: document, model=model, size=len(document))

    def fill(self, made: Cache, numbers: range, text: str = "x") -> None:
        for number in numbers:
            self.put(made, number, text)
        self.assertTrue(made.flush(PATIENCE))

    def found(self, made: Cache, *numbers: int) -> list[int]:
        return [number for number in numbers if made.get(key_of(number), "fast-9b") is not None]


class Storing(InFolder):
    def test_what_was_put_is_found(self):
        """At once, from the file, and by the next Cache; with its words and its age."""
        made = self.a_cache()
        self.assertIsNone(made.get(key_of(1), "fast-9b"))
        made.put(key_of(1), lambda: b'{"a":1}', model="fast-9b", size=7, warning="seed ignored")
        at_once = made.get(key_of(1), "fast-9b")
        self.assertTrue(made.flush(PATIENCE))
        made.close()
        later = self.a_cache().get(key_of(1), "fast-9b")
        for entry in (at_once, later):
            assert entry is not None
            self.assertEqual((b'{"a":1}', "fast-9b", "seed ignored"), (entry.document, entry.served_by, entry.warning))
            self.assertLess(entry.age(), PATIENCE)
        self.assertEqual(at_once, later)

    def test_a_large_document_is_packed_and_comes_back(self):
        """What compresses takes less room, and reads the same."""
        made = self.a_cache()
        text = "a long answer " * 5000
        self.fill(made, range(1), text)
        entry = made.get(key_of(0), "fast-9b")
        assert entry is not None
        self.assertEqual(text.encode(), entry.document)
        stats = made.stats()
        assert stats is not None
        self.assertLess(stats.models["fast-9b"].size, len(text) // 10)

    def test_an_answer_that_is_not_to_be_kept_is_not(self):
        """A document that is None, or can't be made, is a miss before and after the writer has seen it."""
        made = self.a_cache()
        made.put(key_of(1), lambda: None, model="fast-9b", size=1)
        made.put(key_of(2), lambda: replay.clean_plain(b"no JSON"), model="fast-9b", size=1)
        self.assertEqual([], self.found(made, 1, 2))
        self.assertTrue(made.flush(PATIENCE))
        self.assertEqual([], self.found(made, 1, 2))

    def test_a_newer_answer_replaces_the_older(self):
        """One key has one entry, also while both wait."""
        made = self.a_cache()
        for text in ("one", "two"):
            self.put(made, 1, text)
        self.put(made, 1, "three")
        self.assertTrue(made.flush(PATIENCE))
        entry, stats = made.get(key_of(1), "fast-9b"), made.stats()
        assert entry is not None and stats is not None
        self.assertEqual((b"three", 1), (entry.document, stats.entries))

    def test_age_is_the_readers_business(self):
        """max_age passes over an older entry, and counts a miss; a clock set back makes none older."""
        made = self.a_cache()
        self.put(made, 1)
        for _ in range(2):  # as it waits, and as it is stored
            with mock.patch.object(time, "time", return_value=time.time() + 100):
                self.assertIsNotNone(made.get(key_of(1), "fast-9b", 200))
                self.assertIsNone(made.get(key_of(1), "fast-9b", 50))
            self.assertTrue(made.flush(PATIENCE))
        self.assertEqual(0.0, Entry(b"", "m", time.time() + 100).age())

    def test_two_keys_that_share_their_first_bytes_are_told_apart(self):
        """The whole key is compared."""
        made = self.a_cache()
        near, far = b"a" * 8 + b"1" * 24, b"a" * 8 + b"2" * 24
        made.put(near, lambda: b"{}", model="m", size=2)
        self.assertTrue(made.flush(PATIENCE))
        self.assertIsNotNone(made.get(near, "m"))
        self.assertIsNone(made.get(far, "m"))

    def test_only_the_owner_may_read_it(self):
        """0600 for the file, -wal and -shm, 0700 for a folder that was made; rights that are too wide are narrowed."""
        made = self.a_cache()
        self.fill(made, range(3))
        modes = {name: os.stat(self.path + name).st_mode & 0o777 for name in ("", "-wal", "-shm")}
        self.assertEqual({"": 0o600, "-wal": 0o600, "-shm": 0o600}, modes)
        self.assertEqual(0o700, os.stat(os.path.dirname(self.path)).st_mode & 0o777)
        made.close()
        os.chmod(self.path, 0o644)
        self.a_cache()
        self.assertEqual(0o600, os.stat(self.path).st_mode & 0o777)

    def test_where_it_lies(self):
        """$XDG_CACHE_HOME if it is absolute, else ~/.cache."""
        self.assertEqual("/x/portway/cache.sqlite3", cache_file.default_path({"XDG_CACHE_HOME": "/x", "HOME": "/h"}))
        self.assertEqual(
            "/h/.cache/portway/cache.sqlite3", cache_file.default_path({"XDG_CACHE_HOME": "x", "HOME": "/h"})
        )

    def test_a_path_with_odd_characters(self):
        """What means something in a URI means nothing in a file's name."""
        self.path = os.path.join(self.folder, "a?b#c%41", "cache.sqlite3")
        made = self.a_cache()
        self.fill(made, range(1))
        self.assertEqual([0], self.found(made, 0))
        self.assertTrue(os.path.exists(self.path))

    def test_what_is_put_last_is_in_the_file_after_close(self):
        """close() writes what waits, even if the file had not been opened yet."""
        made = Cache(self.path, say=self.say)
        for number in range(50):
            self.put(made, number)
        made.close(PATIENCE)
        self.assertEqual(list(range(50)), self.found(self.a_cache(), *range(50)))
        self.put(made, 99)
        self.assertEqual([], self.found(made, 99))

    def test_close_before_the_writer_has_begun(self):
        """Also then what was put is written."""
        gate, run = threading.Event(), Cache._run

        def late(made: Cache) -> None:
            gate.wait(PATIENCE)
            run(made)

        with mock.patch.object(Cache, "_run", late):
            made = Cache(self.path, say=self.say)
        self.put(made, 1)
        made.close(0)
        gate.set()
        made.close(PATIENCE)
        self.assertEqual([1], self.found(self.a_cache(), 1))

    def test_many_threads(self):
        """Looking up and storing at the same time, from many threads, finds everything and raises nothing."""
        made = self.a_cache()
        failed: list[int] = []

        def work(base: int) -> None:
            for number in range(base, base + 100):
                self.put(made, number, str(number))
                entry = made.get(key_of(number), "fast-9b")
                if entry is None or entry.document != str(number).encode():
                    failed.append(number)

        threads = [threading.Thread(target=work, args=(base * 1000,)) for base in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual([], failed)
        self.assertTrue(made.flush(PATIENCE))
        stats = made.stats()
        assert stats is not None
        self.assertEqual((800, 0), (stats.entries, made.dropped))


class Gathering(InFolder):
    """When the writer writes. Left to itself it would wait for hours here."""

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(cache, "GATHER", 10_000.0))
        self.enterContext(mock.patch.object(cache, "NOTES_DELAY", 10_000.0))

    def in_file(self) -> int:
        with closing(sqlite3.connect(self.path)) as db:
            (count,) = db.execute("SELECT count(*) FROM answers").fetchone()
        return int(count)

    def settle(self, made: Cache) -> None:
        """Wait until the writer has seen all there is and waits."""
        waits, wait = threading.Semaphore(0), made._changed.wait

        def told(timeout: float | None = None) -> bool:
            if threading.current_thread() is made._writer:
                waits.release()
            return wait(timeout)

        with mock.patch.object(made._changed, "wait", told):
            with made._changed:
                made._changed.notify_all()
            self.assertTrue(waits.acquire(timeout=PATIENCE))

    def wait_for_file(self, entries: int) -> None:
        until = time.monotonic() + PATIENCE
        while self.in_file() != entries and time.monotonic() < until:
            time.sleep(0.005)
        self.assertEqual(entries, self.in_file())

    def test_answers_gather_and_are_found_meanwhile(self):
        """Nothing is written yet, everything is there; flush() does not wait."""
        made = self.a_cache()
        for number in range(20):
            self.put(made, number)
        self.settle(made)
        self.assertEqual((list(range(20)), 0), (self.found(made, *range(20)), self.in_file()))
        self.assertTrue(made.flush(PATIENCE))
        self.assertEqual((list(range(20)), 20), (self.found(made, *range(20)), self.in_file()))

    def test_many_are_enough(self):
        """A full batch is written at once, again and again."""
        with mock.patch.object(cache, "BATCH", 5):
            made = self.a_cache()
            for total in (5, 10):
                for number in range(total - 5, total - 1):
                    self.put(made, number)
                self.settle(made)
                self.put(made, total - 1)
                self.wait_for_file(total)
            self.put(made, 10)
            self.assertEqual([10], self.found(made, 10))

    def test_close_does_not_wait(self):
        """What has gathered is written."""
        made = self.a_cache()
        self.fill(made, range(1))
        self.put(made, 1)
        made.close(PATIENCE)
        self.assertEqual(2, self.in_file())

    def test_gathering_ends(self):
        """After GATHER it is written by itself, and the next one, too."""
        with mock.patch.object(cache, "GATHER", 0.01):
            made = self.a_cache()
            for number in range(3):
                self.put(made, number)
                self.wait_for_file(number + 1)

    def test_the_writer_takes_no_more_than_its_share(self):
        """After a write it rests for as long as its share demands, whatever comes; then what comes is dropped, and
        counted. flush() and close() wait for no rest."""
        self.enterContext(mock.patch.object(cache, "SHARE", 1e-9))
        self.enterContext(mock.patch.object(cache, "BATCH", 5))
        self.enterContext(mock.patch.object(cache, "MAX_WAITING", 20))
        made = self.a_cache()  # with its first look at the file it has worked
        for number in range(30):
            self.put(made, number)
        self.settle(made)
        self.assertEqual((list(range(20)), 10), (self.found(made, *range(30)), made.dropped))
        self.assertEqual(0, self.in_file())
        self.assertTrue(made.flush(PATIENCE))
        self.assertEqual(20, self.in_file())
        for number in range(40, 45):
            self.put(made, number)
        self.settle(made)
        self.assertEqual(20, self.in_file())
        made.close(PATIENCE)
        self.assertEqual(25, self.in_file())


class Bounds(InFolder):
    def test_the_least_recently_used_make_room(self):
        """What was looked up stays, what was not goes, and the file stays near its bound."""
        made = self.a_cache(max_size=1024 * 1024)
        blob = os.urandom(4000).hex()
        self.fill(made, range(20), blob)
        for number in range(20, 1000, 20):
            self.assertIsNotNone(made.get(key_of(0), "fast-9b"), f"forgotten before {number}")
            self.fill(made, range(number, number + 20), blob)
        stats = made.stats()
        assert stats is not None
        self.assertEqual([0], self.found(made, 0, 1, 2))
        self.assertEqual([999], self.found(made, 999))
        self.assertLess(os.path.getsize(self.path), 1024 * 1024 * 1.25)
        self.assertGreater(stats.entries, 60)
        self.assertEqual(1000 - stats.entries, stats.counts.evictions)

    def test_old_entries_are_deleted(self):
        """What is older than the lifetime leaves the file by itself."""
        self.fill(self.a_cache(), range(600))
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1000), "fast-9b", time.time() - 90, "", b"{}")])
        with (
            mock.patch.object(time, "time", return_value=time.time() + 100),
            closing(sqlite3.connect(self.path)) as db,
        ):
            made = Cache(self.path, lifetime=150, say=self.say)
            self.addCleanup(made.close)
            left = 601
            while left > 600:
                made.flush(PATIENCE)
                (left,) = db.execute("SELECT count(*) FROM answers").fetchone()
        self.assertEqual([0], self.found(made, 0, 1000))

    def test_the_bounds_may_change(self):
        """A smaller size counts from the next write on, a shorter lifetime at once."""
        made = self.a_cache()
        self.fill(made, range(300), os.urandom(2000).hex())
        made.limit(200_000, 3600)
        self.fill(made, range(300, 301))
        stats = made.stats()
        assert stats is not None
        self.assertLess(stats.entries, 100)
        self.assertEqual([300], self.found(made, 300))
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1000), "fast-9b", time.time() - 90, "", b"{}")])
        made.limit(200_000, 60)
        with closing(sqlite3.connect(self.path)) as db:
            query = "SELECT count(*) FROM answers WHERE key = ?"
            wait_for(lambda: not db.execute(query, (key_of(1000),)).fetchone()[0], "its being deleted")
        self.assertEqual([300], self.found(made, 300))

    def test_the_queue_is_bounded(self):
        """What comes while the writer is far behind is dropped and counted; nobody waits."""
        self.enterContext(mock.patch.object(cache, "WRITE_PATIENCE", 0.01))
        with mock.patch.object(cache, "MAX_WAITING", 5), closing(self.locked_out()):
            made = self.a_cache()
            with mock.patch.object(cache, "MAX_WAITING_BYTES", 10):
                self.put(made, 0, "x" * 6)
                self.put(made, 0, "y" * 6)  # takes the place of the one before
                self.put(made, 1, "z" * 6)
            self.assertEqual((1, [0]), (made.dropped, self.found(made, 0, 1)))
            for number in range(8):
                self.put(made, number)
            self.assertEqual((4, [0, 1, 2, 3, 4]), (made.dropped, self.found(made, *range(8))))

    def test_one_answer_must_not_take_the_whole_file(self):
        """An eighth is the most."""
        made = self.a_cache(max_size=80_000)
        self.put(made, 1, "x" * 10_001)
        self.assertEqual((1, []), (made.dropped, self.found(made, 1)))

    def locked_out(self) -> sqlite3.Connection:
        """A connection that nobody else gets past, on a file of ours."""
        CacheFile(self.path, 5).close()
        db = sqlite3.connect(self.path, isolation_level=None)
        db.execute("PRAGMA locking_mode = EXCLUSIVE").fetchone()
        db.execute("BEGIN EXCLUSIVE")
        return db


class Counting(InFolder):
    def test_hits_misses_and_stores_are_kept_by_model(self):
        """They outlive the daemon."""
        made = self.a_cache()
        self.put(made, 1)
        self.put(made, 2, model="embed")
        for number, model in ((1, "fast-9b"), (1, "fast-9b"), (7, "fast-9b"), (2, "embed")):
            made.get(key_of(number), model)
        self.assertTrue(made.flush(PATIENCE))
        made.close()
        stats = self.a_cache().stats()
        assert stats is not None
        self.assertEqual(Counts(hits=2, misses=1, stores=1), stats.models["fast-9b"].counts)
        self.assertEqual(Counts(hits=3, misses=1, stores=2), stats.counts)
        self.assertEqual((2, 0.75), (stats.entries, stats.counts.hit_rate))
        assert stats.oldest is not None
        self.assertLess(time.time() - stats.oldest, PATIENCE)
        self.assertIsNone(Counts().hit_rate)

    def test_counts_outlive_a_failure_to_write_them(self):
        """They are written once the file can be written again."""
        self.enterContext(mock.patch.object(cache, "WRITE_PATIENCE", 0.01))
        made = self.a_cache()
        self.fill(made, range(1))
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            self.assertEqual([0], self.found(made, 0, 1))
            made.flush(0)
            self.wait_for_word("locked")
        self.wait_for_word("works again")
        self.assertTrue(made.flush(PATIENCE))
        stats = made.stats()
        assert stats is not None
        self.assertEqual(Counts(hits=1, misses=1, stores=1), stats.counts)

    def test_puts_tells_whether_a_miss_may_be_out_of_date(self):
        """It changes with each answer that is handed in, and with nothing else."""
        made = self.a_cache()
        before = made.puts
        made.get(key_of(1), "fast-9b")
        self.assertEqual(before, made.puts)
        self.put(made, 1)
        self.assertNotEqual(before, made.puts)

    def test_looking_up_writes_nothing(self):
        """A hit is only noted; the file has it with the next write."""
        made = self.a_cache()
        self.fill(made, range(1))
        size = os.path.getsize(self.path + "-wal")
        for _ in range(100):
            made.get(key_of(0), "fast-9b")
        self.assertEqual(size, os.path.getsize(self.path + "-wal"))
        self.assertTrue(made.flush(PATIENCE))
        self.assertLess(size, os.path.getsize(self.path + "-wal"))


class Trouble(InFolder):
    def test_kill_9_in_the_middle_of_writing(self):
        """Everything that was reported as stored is there, and the file is whole."""
        program = (
            "import sys\nfrom tests.test_cache import *\n"
            f"made = Cache({self.path!r})\n"
            "for number in range(100_000):\n"
            "    made.put(key_of(number), lambda: b'x' * 2000, model='fast-9b', size=2000)\n"
            "    if number % 7 == 0:\n"
            "        assert made.flush(20)\n"
            "        print(number, flush=True)\n"
        )
        child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        with child, child.stdout:
            last = -1
            while last < 1000:
                last = int(child.stdout.readline())
            child.kill()
            last = (
                [last] + [int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
            )[-1]
        self.assertEqual(-signal.SIGKILL, child.returncode)
        made = self.a_cache()
        self.assertEqual(list(range(last + 1)), self.found(made, *range(last + 1)))
        self.assertEqual("", made.problem)
        with closing(sqlite3.connect(self.path)) as db:
            self.assertEqual("ok", db.execute("PRAGMA integrity_check").fetchone()[0])

    def test_a_file_of_a_newer_version_is_left_alone(self):
        """The cache is off, says so, and takes nothing in; the file's bytes are as they were."""
        CacheFile(self.path, 5).close()
        with closing(sqlite3.connect(self.path)) as db:
            db.execute(f"PRAGMA user_version = {len(cache_file.MIGRATIONS) + 1}")
        before = Path(self.path).read_bytes()
        made = self.a_cache()
        self.put(made, 1)
        self.assertIn("newer Portway", made.problem)
        self.assertEqual([], self.found(made, 1))
        made.close()
        self.assertEqual(before, Path(self.path).read_bytes())
        self.assertEqual([made.problem], self.said)

    def test_another_programs_database_is_left_alone(self):
        """A path given by mistake costs nobody's data."""
        os.makedirs(os.path.dirname(self.path))
        with closing(sqlite3.connect(self.path)) as db:
            db.execute("CREATE TABLE theirs (a)")
        before = Path(self.path).read_bytes()
        made = self.a_cache()
        self.assertIn("another program", made.problem)
        made.close()
        self.assertEqual(before, Path(self.path).read_bytes())

    def test_a_file_that_is_no_database_is_set_aside(self):
        """It is kept, a new one begun at once, and that is said."""
        os.makedirs(os.path.dirname(self.path))
        Path(self.path).write_bytes(b"not a database " * 1000)
        made = self.a_cache()
        self.fill(made, range(3))
        self.assertEqual([0, 1, 2], self.found(made, 0, 1, 2))
        (kept,) = cache_file.aside(self.path)
        self.assertEqual(b"not a database " * 1000, Path(kept).read_bytes())
        self.assertEqual(("", [made.notice]), (made.problem, self.said))
        self.assertIn(kept, made.notice)

    def test_a_file_that_becomes_corrupt_is_set_aside(self):
        """A look-up that meets torn pages is a miss; the next answers go to a new file."""
        first = self.a_cache()
        self.fill(first, range(300), os.urandom(1000).hex())
        first.close()
        with open(self.path, "r+b") as file:
            file.seek(cache_file.PAGE)
            file.write(os.urandom(os.path.getsize(self.path) - cache_file.PAGE))
        made = self.a_cache()
        self.found(made, *range(300))
        self.wait_for_word("corrupt")
        self.fill(made, range(1000, 1003))
        self.assertEqual([1000, 1001, 1002], self.found(made, 1000, 1001, 1002))
        self.assertEqual(1, len(cache_file.aside(self.path)))

    def test_a_damaged_document_is_a_miss(self):
        """It does not stop the cache, and the next answer takes its place."""
        made = self.a_cache()
        self.fill(made, range(2), "text " * 1000)
        with closing(sqlite3.connect(self.path)) as db, db:
            db.execute("UPDATE answers SET document = x'00' WHERE key = ?", (key_of(1),))
        self.assertEqual([0], self.found(made, 0, 1))
        self.assertEqual("", made.problem)
        self.fill(made, range(1, 2))
        self.assertEqual([1], self.found(made, 1))

    def test_a_locked_file_costs_a_request_no_time(self):
        """While another process holds it there is no cache but in memory; then everything is stored."""
        program = (
            "import sqlite3, sys\n"
            f"db = sqlite3.connect({self.path!r}, isolation_level=None)\n"
            "db.execute('PRAGMA locking_mode = EXCLUSIVE').fetchone()\ndb.execute('BEGIN EXCLUSIVE')\n"
            "print('locked', flush=True)\nsys.stdin.read()\n"
        )
        CacheFile(self.path, 5).close()
        with (
            subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder,
            mock.patch.object(cache, "WRITE_PATIENCE", 0.01),
        ):
            assert holder.stdin is not None and holder.stdout is not None
            holder.stdout.readline()
            made = self.a_cache()
            self.put(made, 1)
            self.assertIn("locked", made.problem)
            started = time.monotonic()
            self.assertEqual([1], self.found(made, *range(500)))
            self.assertLess(time.monotonic() - started, 2.0)  # 500 waits of 5 ms would be 2.5 s
            self.assertFalse(made.flush(0.05))
            holder.stdin.close()
        self.wait_for_word("works again")
        self.assertTrue(made.flush(PATIENCE))
        self.assertEqual("", made.problem)
        made.close()
        self.assertEqual([1], self.found(self.a_cache(), 1))

    def test_a_full_disk(self):
        """Requests go on, `problem` says why, and when there is room again all is stored."""
        program = (
            "import resource\nfrom tests.test_cache import *\n"
            f"made = Cache({self.path!r}, say=print)\nassert made.flush(20)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))\n"
            "blob = os.urandom(1000)\n"
            "for number in range(500):\n"
            "    made.put(key_of(number), lambda: blob, model='fast-9b', size=1000)\n"
            "assert not made.flush(1)\n"
            "assert 'disk' in made.problem, made.problem\n"
            "assert made.get(key_of(499), 'fast-9b') is not None\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
            "assert made.flush(20) and not made.problem\n"
            "made.close()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertIn("works again", done.stdout)
        self.assertEqual(list(range(500)), self.found(self.a_cache(), *range(500)))

    def test_a_folder_that_may_not_be_written(self):
        """Also root is somebody else here, so that the rights count."""
        os.mkdir(os.path.join(self.folder, "closed"))
        program = (
            "import os, tempfile\nfrom tests.test_cache import *\n"
            f"os.chmod({self.folder!r}, 0o755)\nos.chmod({self.folder!r} + '/closed', 0o555)\n"
            "if os.getuid() == 0: os.seteuid(65534)\n"
            f"made = Cache({self.folder!r} + '/closed/cache.sqlite3', say=print)\nmade.flush(20)\n"
            "made.put(key_of(1), lambda: b'{}', model='m', size=2)\n"
            "assert made.get(key_of(1), 'm') is not None\n"
            "assert made.problem.endswith('Permission denied'), made.problem\nmade.close()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        self.assertEqual((0, ""), (done.returncode, done.stderr))

    def test_off_is_seen_by_a_cache_that_nobody_uses(self):
        """What was stored must not come out of it hours later, only because nobody asked in between."""
        self.enterContext(mock.patch.object(cache, "LOOK_EVERY", 0.02))
        self.enterContext(mock.patch.object(cache, "RETRY_AFTER", 0.02))
        made = self.a_cache()
        self.fill(made, range(1))
        with redirect_stdout(io.StringIO()):
            cache_cli.main(["off"], self.path)
            wait_for(lambda: made.is_off, "its being seen")
            self.assertEqual([], self.found(made, 0))
            cache_cli.main(["on"], self.path)
        wait_for(lambda: not made.is_off, "its end")
        self.assertEqual([0], self.found(made, 0))

    def test_a_folder_that_comes_later(self):
        """A path through a file can't be; once it can, the cache works by itself."""
        Path(self.folder, "deep").write_text("in the way", encoding="utf-8")
        made = self.a_cache()
        self.assertIn("can't be used", made.problem)
        self.put(made, 1)
        os.unlink(os.path.join(self.folder, "deep"))
        self.wait_for_word("works again")
        self.assertTrue(made.flush(PATIENCE))
        self.assertTrue(os.path.exists(self.path))

    def test_a_file_that_is_removed_is_begun_anew(self):
        """Deleting it is a way to purge, with the daemon running."""
        made = self.a_cache()
        self.fill(made, range(3))
        for suffix in ("", "-wal", "-shm"):
            os.unlink(self.path + suffix)
        self.fill(made, range(10, 12))
        self.assertEqual([10, 11], self.found(made, 0, 1, 2, 10, 11))
        self.assertTrue(os.path.exists(self.path))

    def test_a_mistake_in_portway_only_ends_the_cache(self):
        """The writer's death shows, and requests go on."""
        made = self.a_cache()
        died = threading.Event()
        with mock.patch.object(threading, "excepthook", lambda _: died.set()):
            made.put(key_of(1), lambda: bytes(1 // 0), model="m", size=1)
            self.assertTrue(died.wait(PATIENCE))
            made._writer.join(PATIENCE)
        self.assertIn("stopped", made.problem)
        self.put(made, 2)
        self.assertEqual([], self.found(made, 1, 2))


class Commands(InFolder):
    def run_cli(self, *words: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = cache_cli.main(words, self.path)
        return status, out.getvalue(), err.getvalue()

    def test_nothing_yet(self):
        """Asking makes no file."""
        status, out, _ = self.run_cli()
        self.assertEqual((0, f"{self.path}: nothing stored yet\n"), (status, out))
        self.assertEqual((0, "0 entries deleted\n", ""), self.run_cli("purge"))
        self.assertFalse(os.path.exists(self.path))

    def test_what_is_shown(self):
        """Entries, size, hit rate, age of the oldest; each model in a row."""
        made = self.a_cache()
        self.put(made, 1)
        self.found(made, 1, 2)
        made.close()
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(5), "embed", time.time() - 3 * 86_400, "", b"{}")])
        status, out, _ = self.run_cli()
        self.assertEqual(0, status)
        self.assertRegex(out, r"cache.sqlite3: 2 entries, [0-9.]+ KB on disk, the oldest 3 days old\n")
        self.assertIn("hit rate 50.0%: 1 of 2 look-ups\n", out)
        self.assertRegex(out, r"fast-9b +1 +1 B +1 +1 +50.0%\n")
        self.assertRegex(out, r"embed +1 +2 B +0 +0 +-\n")

    def test_purge(self):
        """By model, by age, or all, which begins the counts anew and takes corrupt files along."""
        old = time.time() - 8 * 86_400
        with closing(CacheFile(self.path, 5)) as file:
            rows = [
                Row(key_of(number), "fast-9b", old if number < 3 else time.time(), "", b"secret")
                for number in range(600)
            ]
            file.write([*rows, Row(key_of(1000), "embed", time.time(), "", b"{}")])
        Path(self.path + ".corrupt-1").write_text("x", encoding="utf-8")
        self.assertEqual((0, "3 entries deleted\n", ""), self.run_cli("purge", "--older-than", "7d"))
        self.assertEqual((0, "1 entry deleted\n", ""), self.run_cli("purge", "--model=embed"))
        self.assertTrue(os.path.exists(self.path + ".corrupt-1"))
        status, out, _ = self.run_cli("purge")
        self.assertEqual((0, f"597 entries deleted\n{self.path}.corrupt-1 deleted\n"), (status, out))
        with closing(CacheFile(self.path, 5)) as file:
            self.assertEqual((0, {}), (file.stats().entries, file.stats().models))
        self.assertNotIn(b"secret", Path(self.path).read_bytes())
        self.assertEqual([], cache_file.aside(self.path))

    def test_a_running_cache_sees_a_purge(self):
        """What was deleted by another process is a miss."""
        made = self.a_cache()
        self.fill(made, range(3))
        self.assertEqual(0, self.run_cli("purge")[0])
        self.assertEqual([], self.found(made, 0, 1, 2))
        self.fill(made, range(3))
        self.assertEqual(3, made.purge(model="fast-9b"))
        self.assertEqual([], self.found(made, 0, 1, 2))

    def test_off_and_on(self):
        """Off, nothing is found or stored; on again, what was stored is back."""
        made = self.a_cache()
        self.fill(made, range(3))
        self.assertEqual(0, self.run_cli("off")[0])
        made.flush(PATIENCE)
        self.assertIn("turned off", made.problem)
        self.put(made, 5)
        self.assertEqual([], self.found(made, 0, 5))
        self.assertIn("turned off", self.run_cli()[1])
        self.assertEqual(0, self.run_cli("on")[0])
        self.wait_for_word("works again")
        self.assertEqual([0], self.found(made, 0, 5))
        self.assertIn("not turned off", self.run_cli("on")[1])

    def test_what_is_not_understood(self):
        """Exit code 2 and a sentence; what the file refuses is 1."""
        for words in (
            ["clear"],
            ["purge", "--all"],
            ["purge", "--older-than", "7"],
            ["purge", "--model"],
            ["off", "x"],
        ):
            with self.subTest(words):
                status, out, err = self.run_cli(*words)
                self.assertEqual((2, ""), (status, out))
                self.assertIn("see `portway cache --help`", err)
        os.makedirs(os.path.dirname(self.path))
        Path(self.path).write_bytes(b"not a database " * 1000)
        status, _, err = self.run_cli()
        self.assertEqual(1, status)
        self.assertIn("not a database", err)
        self.assertEqual((0, cache_cli.HELP, ""), self.run_cli("--help"))


class Files(InFolder):
    def test_any_number_of_rows(self):
        """However many there are, each is written once, and each that was used is younger then."""
        with closing(CacheFile(self.path, 5)) as file, closing(sqlite3.connect(self.path)) as db:
            for count in (*range(8), 15, 16, 17, 37, 64, 100):
                self.assertGreaterEqual(file.purge(), 0)
                keys = [key_of(number) for number in range(count)]
                file.write([Row(key, "m", 1000.0, "w", key * 2) for key in keys], max_size=10**9)
                rows = db.execute("SELECT key, model, stored_at, used_at, warning, document FROM answers").fetchall()
                self.assertEqual({(key, "m", 1000.0, 1000.0, "w", key * 2) for key in keys}, set(rows))
                self.assertEqual(count, len(rows))
                for used in (0, count // 2, count):
                    file.write(used=keys[:used])
                    fresh = db.execute("SELECT key FROM answers WHERE used_at > 1e9").fetchall()
                    self.assertEqual({(key,) for key in keys[:used]}, set(fresh))

    def test_what_a_model_has_is_right_whatever_happens(self):
        """Rows that replace each other, in one write too, rows that make room, that expire, that are purged."""
        with closing(CacheFile(self.path, 5)) as file, closing(sqlite3.connect(self.path)) as db:

            def check() -> None:
                query = "SELECT model, count(*), sum(size) FROM answers GROUP BY model"
                known = {name: (each.entries, each.size) for name, each in file.stats().models.items() if each.entries}
                self.assertEqual({name: tuple(rest) for name, *rest in db.execute(query)}, known)

            twins = [b"a" * 8 + bytes(24), b"a" * 8 + bytes(23) + b"1"]
            for models in (("a", "b"), ("b", "a"), ("c", "d"), ("d", "d")):
                file.write([Row(key, model, 5.0, "", b"x" * 9) for key, model in zip(twins, models, strict=True)])
                check()
            self.assertEqual(1, file.stats().entries)
            for start in range(0, 400, 100):
                rows = [Row(key_of(n), "ab"[n % 2], 10.0 + n, "", os.urandom(2000)) for n in range(start, start + 100)]
                file.write(rows, max_size=400_000)
                check()
            stats = file.stats()
            self.assertEqual((408, 400 - stats.entries + 1), (stats.counts.stores, stats.counts.evictions))
            self.assertGreater(stats.counts.evictions, 200)
            file.expire(350.0)
            check()
            self.assertGreater(stats.entries, file.stats().entries)
            self.assertGreater(file.purge("a"), 0)
            check()
            self.assertEqual(0, file.stats().models["a"].entries)

    def test_counts_are_the_callers(self):
        """What is given is only read: after a failure it is given again."""
        given = {"m": Counts(hits=1)}
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1), "m", 1.0, "", b"x")], counts=given, max_size=1)
            self.assertEqual({"m": Counts(hits=1)}, given)
            self.assertEqual(Counts(hits=1, stores=1, evictions=1), file.stats().counts)

    def test_a_flood_is_not_compressed(self):
        """Beyond so many bytes in one write documents stay as they are; what is small always does."""
        text = b"a text that would become smaller. " * 100
        with closing(CacheFile(self.path, 5)) as file, closing(sqlite3.connect(self.path)) as db:
            file.write([Row(key_of(number), "m", 1.0, "", text) for number in range(50)])
            packed = [bool(row[0]) for row in db.execute("SELECT packed FROM answers ORDER BY id")]
            first = -(-cache_file.COMPRESS_AT_ONCE // len(text))
            self.assertEqual([True] * first + [False] * (50 - first), packed)
            with closing(cache_file.Readers(self.path)) as readers:
                self.assertEqual({text}, {found.document for n in range(50) if (found := readers.find(key_of(n)))})
            file.write([Row(key_of(99), "m", 1.0, "", text[:1000]), Row(key_of(98), "m", 1.0, "", text)])
            self.assertEqual([(0,), (1,)], db.execute("SELECT packed FROM answers WHERE id > 50").fetchall())

    def test_a_file_of_the_first_version(self):
        """Its answers go, as nothing would find them; what was counted stays, and it serves on."""
        with closing(CacheFile(self.path, 5)), closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            for table in ("answers", "models"):
                db.execute(f"DROP TABLE {table}")
            cache_file.MIGRATIONS[0](db)
            db.execute("PRAGMA user_version = 1")
            values = (1, key_of(1), "m", 1, 1.0, 1.0, "", 0, b"x")
            db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            db.execute("UPDATE models SET hits = 7, stores = 3")
        made = self.a_cache()
        stats = made.stats()
        assert stats is not None
        self.assertEqual((0, 0), (stats.entries, stats.models["m"].size))
        self.assertEqual(Counts(hits=7, stores=3), stats.counts)
        self.fill(made, range(3))
        self.assertEqual([0, 1, 2], self.found(made, 0, 1, 2))

    def test_a_transaction_is_whole_or_not_at_all(self):
        """An error in the middle leaves nothing behind, and the file usable."""
        with closing(CacheFile(self.path, 5)) as file:
            nobody: Any = None
            bad = Row(key_of(2), nobody, time.time(), "", b"x")
            with self.assertRaises(sqlite3.IntegrityError):
                file.write([Row(key_of(1), "m", time.time(), "", b"x"), bad])
            self.assertEqual(0, file.stats().entries)
            file.write([Row(key_of(1), "m", time.time(), "", b"x")])
            self.assertEqual(1, file.stats().entries)

    def test_a_purge_gives_room_back(self):
        """The file shrinks on disk."""
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(number), "m", time.time(), "", os.urandom(5000)) for number in range(400)])
            before = file.stats().size
            self.assertEqual(400, file.purge())
            self.assertLess(file.stats().size, before / 10)

    def test_looking_up_makes_no_file(self):
        """One that was removed is the writer's to make, with the right rights."""
        path = os.path.join(self.folder, "none.sqlite3")
        with closing(cache_file.Readers(path)) as readers, self.assertRaises(sqlite3.OperationalError):
            readers.find(key_of(1))
        self.assertFalse(os.path.exists(path))

    def test_errors_in_words(self):
        """Each says what is wrong with the file."""
        self.assertEqual("is odd", cache_file.describe(Unusable("is odd")))
        self.assertIn("No space", cache_file.describe(OSError(28, "No space left on device")))

    def test_a_file_of_an_older_version_is_brought_up_to_date(self):
        """Each step that it lacks is taken once, in order, and its answers stay; by whoever opens it first."""
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1), "m", 1.0, "w", b"x")])
        taken: list[str] = []

        def further(db: sqlite3.Connection) -> None:
            db.execute("ALTER TABLE answers ADD COLUMN more TEXT NOT NULL DEFAULT ''")
            taken.append("further")

        def yet_further(db: sqlite3.Connection) -> None:
            db.execute("CREATE TABLE more (id INTEGER PRIMARY KEY)")
            taken.append("yet further")

        steps = (*cache_file.MIGRATIONS, further, yet_further)
        with mock.patch.object(cache_file, "MIGRATIONS", steps):
            for _ in range(2):
                CacheFile(self.path, 5).close()
            self.assertEqual(["further", "yet further"], taken)
            with closing(cache_file.Readers(self.path)) as readers:
                self.assertEqual(("m", 1.0, "w", b"x"), readers.find(key_of(1)))
        known = len(cache_file.MIGRATIONS)
        with self.assertRaisesRegex(Unusable, f"format {known + 2}; this one knows {known}"):
            CacheFile(self.path, 5)

    def test_a_step_that_fails_changes_nothing(self):
        """All of them are one transaction: the file stays what it was, and what it was can be used."""

        def m002_half(db: sqlite3.Connection) -> None:
            db.execute("CREATE TABLE half (a)")

        def m003_broken(db: sqlite3.Connection) -> None:
            db.execute("CREATE TABLE half (a)")

        CacheFile(self.path, 5).close()
        steps = (*cache_file.MIGRATIONS, m002_half, m003_broken)
        with mock.patch.object(cache_file, "MIGRATIONS", steps), self.assertRaises(sqlite3.OperationalError):
            CacheFile(self.path, 5)
        with closing(CacheFile(self.path, 5)) as file:
            file.write([Row(key_of(1), "m", 1.0, "", b"x")])
            self.assertEqual(1, file.stats().entries)

    def test_many_open_a_new_file_at_once(self):
        """One of them makes the tables, and all can write."""
        for number in range(20):
            with self.subTest(number):
                self.open_together(os.path.join(self.folder, f"{number}.sqlite3"))

    def open_together(self, path: str) -> None:
        go, failed = threading.Barrier(8), []

        def write(number: int) -> None:
            try:
                go.wait(PATIENCE)
                with closing(CacheFile(path, PATIENCE)) as file:
                    file.write([Row(key_of(number), "m", 1.0, "", b"x")])
            except Exception as exc:  # noqa: BLE001 - whatever it is, it is shown
                failed.append(exc)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual([], failed)
        with closing(CacheFile(path, 5)) as file:
            self.assertEqual(8, file.stats().entries)

    def test_migrations_are_numbered(self):
        """m001, m002, ...: a file's user_version counts them."""
        numbers = [int(step.__name__[1:4]) for step in cache_file.MIGRATIONS]
        self.assertEqual(list(range(1, len(numbers) + 1)), numbers)
        with closing(CacheFile(self.path, 5)), closing(sqlite3.connect(self.path)) as db:
            self.assertEqual(len(numbers), db.execute("PRAGMA user_version").fetchone()[0])


if __name__ == "__main__":
    unittest.main()
