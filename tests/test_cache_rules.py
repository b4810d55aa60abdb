"""What may be stored under which key, and an answer played again: cache/rules.py and cache/replay.py."""

from __future__ import annotations

import json
import unittest
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import Any
from unittest import mock

from portway.cache import replay
from portway.cache.rules import Control, Keys, is_storable, parse_control, request_key, why_bypassed
from portway.call import Attempt, Call, Served, Tally
from portway.config import Backend, Model
from portway.wire.events import SSEReader, WireError, dumps

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

    def test_two_chats_share_a_key_only_if_they_are_the_same(self):
        """The same of messages, which are mostly a role and a text, in either order."""
        random = Random(6)
        texts: list[Any] = ["", "a", "aa", "1", ",1", "m1:", "u", None, ["a"], {"a": "b"}]

        def message() -> Any:
            names = random.choice((("role", "content"), ("content", "role"), ("role",), ("role", "content", "name")))
            weights = [9] * 7 + [1] * 3
            if not random.randrange(30):
                return random.choice(("a", ["role", "content"]))
            return {name: random.choices(texts, weights)[0] for name in names}

        found: dict[bytes, str] = {}
        for _ in range(20_000):
            given = [message() for _ in range(random.randrange(4))]
            told = json.dumps(given, sort_keys=True)
            self.assertEqual(told, found.setdefault(request_key(a_call(messages=given), MODEL), told))
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


if __name__ == "__main__":
    unittest.main()
