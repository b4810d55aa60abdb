"""backends/openai.py against scripted servers and recorded streams: what is sent, what is made of the answer."""

from __future__ import annotations

import itertools
import json
import random
import time
import unittest
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from portway import config
from portway.backends import openai
from portway.backends.openai import BATCH, OpenAIBackend, StreamAnswer, _Relay, only_model, request_body, splice
from portway.backends.transport import Patience
from portway.call import Answer, Call, Endpoint, Limits, Tally
from portway.call import finish as run
from portway.errors import BackendError
from portway.watch import NoClient
from portway.wire.events import SSEReader, sse
from tests.blocking import close, pieces, whole
from tests.doubles import (
    CLOSE,
    LAST_CHUNK,
    Bytewise,
    ScriptedServer,
    chunk,
    json_reply,
    sse_body,
    sse_reply,
    stream_head,
)
from tests.targets import FOREVER, MadeUpReply, delta, finish, frames, text_of, usage

BACKEND = config.Backend("up", "openai", "http://127.0.0.1:1/v1", "http", "127.0.0.1", 1)
MODEL = config.Model("fast", BACKEND, "physical")
HI = [{"role": "user", "content": "hi"}]

# llama-server b11434, as recorded; the second line came with the first
RECORDED = b"""\
data: {"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],"created":1795236731,"id":"chatcmpl-IQofMTIW6UwKTVpfnXuhwk3rDTLdhgGz","model":"tiny","system_fingerprint":"b11434-sdist","object":"chat.completion.chunk"}

data: {"choices":[{"finish_reason":null,"index":0,"delta":{"reasoning_content":" hm"}}],"created":1795236731,"id":"chatcmpl-IQofMTIW6UwKTVpfnXuhwk3rDTLdhgGz","model":"tiny","system_fingerprint":"b11434-sdist","object":"chat.completion.chunk"}

data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" warm"}}],"created":1795236731,"id":"chatcmpl-IQofMTIW6UwKTVpfnXuhwk3rDTLdhgGz","model":"tiny","system_fingerprint":"b11434-sdist","object":"chat.completion.chunk"}

:

data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" \\"model\\":\\"tiny\\" \\"error\\" \\"usage\\""}}],"created":1795236731,"id":"chatcmpl-IQofMTIW6UwKTVpfnXuhwk3rDTLdhgGz","model":"tiny","system_fingerprint":"b11434-sdist","object":"chat.completion.chunk"}

data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" d\xc3\xa9j\xc3\xa0 \xf0\x9f\x99\x82"}}],"created":1795236731,"id":"chatcmpl-IQofMTIW6UwKTVpfnXuhwk3rDTLdhgGz","model":"tiny","system_fingerprint":"b11434-sdist","object":"chat.completion.chunk"}

data: {"choices":[{"finish_reason":null,"index":0,"delta":{"tool_calls":[{"index":0,"id":"h7v","type":"function","function":{"name":"weather","arguments":"{"}}]}}],"created":1795236731,"id":"chatcmpl-IQofMTIW6UwKTVpfnXuhwk3rDTLdhgGz","model":"tiny","system_fingerprint":"b11434-sdist","object":"chat.completion.chunk"}

data: {"choices":[{"finish_reason":null,"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"\\"model\\":\\"tiny\\"}"}}]}}],"created":1795236731,"id":"chatcmpl-IQofMTIW6UwKTVpfnXuhwk3rDTLdhgGz","model":"tiny","system_fingerprint":"b11434-sdist","object":"chat.completion.chunk"}

data: {"choices":[{"finish_reason":"length","index":0,"delta":{}}],"created":1795236731,"id":"chatcmpl-IQofMTIW6UwKTVpfnXuhwk3rDTLdhgGz","model":"tiny","system_fingerprint":"b11434-sdist","object":"chat.completion.chunk"}

data: {"choices":[],"created":1795236731,"id":"chatcmpl-IQofMTIW6UwKTVpfnXuhwk3rDTLdhgGz","model":"tiny","system_fingerprint":"b11434-sdist","object":"chat.completion.chunk","usage":{"completion_tokens":4,"prompt_tokens":26,"total_tokens":30,"prompt_tokens_details":{"cached_tokens":0}},"timings":{"cache_n":0,"prompt_n":26,"predicted_n":4,"predicted_ms":523.0}}

data: [DONE]

"""  # noqa: E501


def call(endpoint: Endpoint = "chat", raw: bytes | None = None, **fields: Any) -> Call:
    """A Call as request.py makes it; chats stream unless told otherwise."""
    body = {"model": "fast", **({"messages": HI} if endpoint == "chat" else {}), **fields}
    raw = raw if raw is not None else json.dumps(body).encode()
    body = json.loads(raw)
    stream = bool(body.get("stream"))
    options = body.get("stream_options") or {}
    return Call(endpoint, body, raw, MODEL, stream, bool(options.get("include_usage")), "chatcmpl-own", 1)


def sent(asked: Call, **model: Any) -> bytes:
    return request_body(asked, replace(MODEL, **model))[0]


def _spliced(raw: bytes, **additions: Any) -> bytes:
    return splice(raw, only_model(raw), json.loads(raw), "new", additions)


class SpliceTest(unittest.TestCase):
    """The request is the client's own bytes but for the model's name."""

    def test_untouched(self):
        """Wherever the model stands and however it is written, not another byte changes."""
        shapes = [
            b'{@,"messages":[{"role":"user","content":"hi"}]}',
            b'{"messages":[{"role":"user","content":"hi"}],@}',
            b'{ "a" : 1.50 ,\t@ , "b" : [1e5, -0.0, 12345678901234567890] }\r\n',
            b'{"x":"d\xc3\xa9j\xc3\xa0 \\u00e9 \\n \\/",@,"y":null}',
            b'{"messages":[{"role":"user","content":"say \\"model\\": \\"fast\\""}],@}',
            b'{@,"metadata":{"models":"x","the model":"y"}}',
        ]
        members = [
            (b'"model":', b'"fast"'),
            (b'"model"\n:\t', b'"fast"'),
            (b'"model":', b'"fa\\"st\\\\"'),
            (b'"model":', b'""'),
            (b'"model" : ', b'"\xf0\x9f\x99\x82"'),
        ]
        for shape, (key, value) in itertools.product(shapes, members):
            raw = shape.replace(b"@", key + value)
            with self.subTest(raw=raw):
                self.assertEqual(shape.replace(b"@", key + b'"new"'), _spliced(raw))

    def test_the_first_member(self):
        """A request whose model stands first is not searched, and not another byte changes, whatever follows."""
        shapes = [
            b'{"model":"@","metadata":{"model":"keep", "mod\\u0065l" : 1}}',
            b'\xef\xbb\xbf \r\n{\t"model" : "@" , "messages":[]}',
            b'{"model":"@"}',
            b'{"model":"@","messages":"' + b" \\\\ \\u0065" * 16_384 + b'"}',
        ]
        for shape in shapes:
            raw = shape.replace(b"@", b'f\\"a\\\\')
            with self.subTest(raw=raw[:80]):
                first = raw.index(b"{")
                asked = replace(call("completions"), raw=raw, body=json.loads(raw[first:]))
                self.assertEqual(shape.replace(b"@", b"physical")[first:], sent(asked))

    def test_a_member_that_looks_like_the_first(self):
        """Only the model's own member is taken for it."""
        for raw in (b'{"model":5,"x":{"model":"y"}}', b'{"x":{"model":"y"},"model":"z"}'):
            asked = replace(call("completions"), raw=raw, body=json.loads(raw))
            self.assertEqual({**asked.body, "model": "physical"}, json.loads(sent(asked)))

    def test_rewritten(self):
        """Where the bytes could mean something else the whole body is written anew, and means the same."""
        shapes = [
            b'{"model":"fast","metadata":{"model":"keep"}}',
            b'{"metadata":{"model":"keep"},"model":"fast"}',
            b'{"model":"old","model":"fast"}',
            b'{"mod\\u0065l":"fast","metadata":{"model":"keep"}}',
            b'{"mod\\u0065l":"fast","x":{"a":"\\"model\\":\\"b\\""}}',
            b'{"model":"fast","messages":[{"content":"model"}]}',
            b'{"a":"ends with \\"model","model":"fast"}',
            b'{"metadata":{"model":"keep"}}',
            b'{"model":5,"x":{}}',
            b'{"model":null}',
        ]
        for raw in shapes:
            with self.subTest(raw=raw):
                got = json.loads(_spliced(raw, more=1), object_pairs_hook=list)
                plain = dict(json.loads(raw, object_pairs_hook=list))
                self.assertEqual({**plain, "more": 1, "model": "new"}, dict(got))
                self.assertEqual(len(dict(got)), len(got))

    def test_additions(self):
        """What is added stands first, so that nothing need be known of what follows."""
        self.assertEqual(
            b'{"a":"\xc3\xa9","b":[1],"model":"n\\"w"}',
            splice(b'{"model":"x"}', only_model(b'{"model":"x"}'), {"model": "x"}, 'n"w', {"a": "\u00e9", "b": [1]}),
        )
        self.assertEqual(b'{"model":"new"}', _spliced(b'\xef\xbb\xbf{"model":"x"}'))

    def test_random(self):
        """Any object comes out as it was, with the new model."""
        dice = random.Random(7)
        for _ in range(300):
            body = {**_object(dice, 3), "model": "fast"}
            items = list(body.items())
            dice.shuffle(items)
            raw = json.dumps(dict(items), ensure_ascii=dice.random() < 0.5, indent=dice.choice([None, 1])).encode()
            got = _spliced(raw, added=1)
            self.assertEqual({**body, "added": 1, "model": "new"}, json.loads(got), raw)


def _object(dice: random.Random, depth: int) -> dict[str, Any]:
    keys = ["model", "messages", "a", 'quo"te', "back\\slash", "\u00e9", "model ", '"model"', "error", "x\n"]
    values: list[Any] = ["model", '"model":"x"', "\u6c34", 1, 1.5, None, True, "", "fast", '\\"model\\":']
    if depth:
        values += [_object(dice, depth - 1), [_object(dice, depth - 1)]]
    return {dice.choice(keys): dice.choice(values) for _ in range(dice.randrange(5))}


class RequestTest(unittest.TestCase):
    def test_usage_is_always_asked(self):
        """A stream asks for its usage, beside whatever other option the client has; a plain call does not."""
        self.assertNotIn("stream_options", json.loads(sent(call())))
        for options in (None, {}, {"x": 1}, {"include_usage": False}, {"include_usage": None, "x": 1}):
            with self.subTest(options=options):
                got = json.loads(sent(call(stream=True, stream_options=options)))
                self.assertEqual({**(options or {}), "include_usage": True}, got["stream_options"])
        raw = b'{"model":"fast" ,"stream":true,"stream_options": {"include_usage":true} }'
        self.assertEqual(raw.replace(b'"model":"fast"', b'"model":"physical"'), sent(call(raw=raw)))
        raw = b'{"model":"fast" ,"stream":true }'
        added = b'{"stream_options":{"include_usage":true},"model":"physical" ,"stream":true }'
        self.assertEqual(added, sent(call(raw=raw)))

    def test_params_where_the_client_is_silent(self):
        """A param counts where the client says nothing, or null."""
        params = {"temperature": 0.7, "top_k": 5}
        got = json.loads(sent(call(temperature=0.1), params=params))
        self.assertEqual((0.1, 5), (got["temperature"], got["top_k"]))
        got = json.loads(sent(call(temperature=None), params=params))
        self.assertEqual(0.7, got["temperature"])
        self.assertEqual(0, json.loads(sent(call(temperature=0), params=params))["temperature"])

    def test_thinking(self):
        """think is a level or a switch of the chat template; a client that says either itself is left alone."""
        cases: dict[Any, dict[str, Any]] = {
            False: {"chat_template_kwargs": {"enable_thinking": False}},
            True: {"chat_template_kwargs": {"enable_thinking": True}},
            "low": {"reasoning_effort": "low"},
            None: {},
        }
        for think, expected in cases.items():
            with self.subTest(think=think):
                got = json.loads(sent(call(), think=think))
                self.assertEqual({"model": "physical", "messages": HI, **expected}, got)
        owns: list[dict[str, Any]] = [{"reasoning_effort": "high"}, {"chat_template_kwargs": {"a": 1}}]
        for own in owns:
            self.assertEqual({"model": "physical", "messages": HI, **own}, json.loads(sent(call(**own), think=True)))
        got = json.loads(sent(call(reasoning_effort=None), think="low"))
        self.assertEqual("low", got["reasoning_effort"])
        got = json.loads(sent(call(), think=True, params={"chat_template_kwargs": {"a": 1}}))
        self.assertEqual({"a": 1, "enable_thinking": True}, got["chat_template_kwargs"])
        self.assertNotIn("chat_template_kwargs", json.loads(sent(call("completions", prompt="p"), think=True)))

    def test_ceiling(self):
        """max_tokens of the model holds, whichever of the names the client uses; only then it is warned."""
        cases: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
            ({}, {"max_tokens": 100}, False),
            ({"max_tokens": None}, {"max_tokens": 100}, False),
            ({"max_tokens": 50}, {"max_tokens": 50}, False),
            ({"max_tokens": 100}, {"max_tokens": 100}, False),
            ({"max_tokens": 101}, {"max_tokens": 100}, True),
            ({"max_tokens": -1}, {"max_tokens": 100}, True),
            ({"max_completion_tokens": 50}, {"max_completion_tokens": 50}, False),
            ({"max_completion_tokens": 500}, {"max_completion_tokens": 100}, True),
            ({"max_completion_tokens": 50, "max_tokens": 500}, {"max_completion_tokens": 50, "max_tokens": 100}, True),
            ({"n_predict": 500}, {"n_predict": 100}, True),
            ({"max_tokens": 50.0}, {"max_tokens": 50.0}, False),
            ({"max_tokens": "many"}, {"max_tokens": "many"}, False),
        ]
        for fields, expected, warned in cases:
            for asked in (call(**fields), call("completions", prompt="p", **fields)):
                with self.subTest(fields=fields):
                    got, warnings = request_body(asked, replace(MODEL, max_tokens=100))
                    limits = {key: value for key, value in json.loads(got).items() if key.startswith(("max", "n_"))}
                    self.assertEqual(expected, limits)
                    self.assertEqual(["capped(max_tokens)"] if warned else [], warnings)
        embedding = call("embeddings", input="text")
        self.assertEqual({"model": "physical", "input": "text"}, json.loads(sent(embedding, max_tokens=100)))
        self.assertEqual(100, json.loads(sent(call(), max_tokens=100, params={"max_tokens": 500}))["max_tokens"])
        self.assertEqual(7, json.loads(sent(call(), max_tokens=100, params={"max_tokens": 7}))["max_tokens"])

    def test_merge_system(self):
        """Several system messages, or a later one, become one first one where the model asks for it."""
        user, text = (
            {"role": "user", "content": "u"},
            [{"type": "text", "text": "b"}, {"type": "x"}, {"type": "text", "text": "c"}],
        )
        messages = [
            {"role": "system", "content": "a"},
            user,
            {"role": "developer", "content": text},
            {"role": "system", "content": None},
        ]
        asked = call(messages=messages)
        self.assertEqual(messages, json.loads(sent(asked))["messages"])
        merged = [{"role": "system", "content": "a\n\nb\nc\n\n"}, user]
        self.assertEqual(merged, json.loads(sent(asked, merge_system=True))["messages"])
        for fine in ([user], [{"role": "system", "content": text}, user]):
            self.assertEqual(fine, json.loads(sent(call(messages=fine), merge_system=True))["messages"])


# --- answers --------------------------------------------------------------------------------------


def relay(**fields: Any) -> _Relay:
    return _Relay(call(stream=True, **fields), MODEL, Tally())


def quick(each: _Relay, data: bytes) -> bytes | None:
    """One chunk, unread."""
    return each.block(sse(data))


def relayed(each: _Relay, stream: bytes, sizes: Iterator[int] | None = None) -> list[Any]:
    """The frames that a stream leads to, fed in pieces."""
    reader, body = SSEReader(), b""
    while stream:
        size = next(sizes) if sizes else len(stream)
        got, error = each.frames(reader.feed(stream[:size]))
        if error:
            raise error
        body, stream = body + got, stream[size:]
    return frames(body)


class RelayTest(unittest.TestCase):
    def test_quick_is_frame(self):
        """The quick way and the long way make the same of each frame of a recorded stream."""
        for asked in ({}, {"stream_options": {"include_usage": True}}):
            learned, quick_ones = relay(**asked), 0
            for data in SSEReader().feed(RECORDED):
                if data == b"[DONE]":
                    continue
                slow = learned.frame(data) if (fast := quick(learned, data)) is None else self.long_way(data, asked)
                quick_ones += fast is not None
                if fast is not None:
                    self.assertEqual(json.loads(slow[6:]), json.loads(fast[6:]))
            self.assertEqual(5, quick_ones)  # three texts and two parts of a call

    def long_way(self, data: bytes, asked: dict[str, Any]) -> bytes:
        each = relay(**asked)
        for earlier in SSEReader().feed(RECORDED)[:2]:
            each.frame(earlier)
        return each.frame(data)

    def test_recorded(self):
        """A recorded stream gives the same whole, byte by byte and cut at every place; only the name is new."""
        for asked in ({}, {"stream_options": {"include_usage": True}}):
            whole = relayed(relay(**asked), RECORDED)
            sent_frames = [json.loads(data) for data in SSEReader().feed(RECORDED)[:-1]]
            expected = [{**each, "model": "fast"} for each in sent_frames if asked or each["choices"]]
            expected[1]["choices"][0]["delta"]["reasoning"] = " hm"
            self.assertEqual([*expected, "[DONE]"], whole)
            self.assertEqual(whole, relayed(relay(**asked), RECORDED, iter(lambda: 1, 0)))
            for cut in range(1, len(RECORDED)):
                self.assertEqual(whole, relayed(relay(**asked), RECORDED, iter([cut, len(RECORDED)])))

    def test_counted(self):
        """What was relayed unread is counted in the end."""
        each = relay()
        relayed(each, RECORDED)
        each.count()
        each.count()
        text = ' warm "model":"tiny" "error" "usage" d\u00e9j\u00e0 \U0001f642'
        expected = Tally("length", 26, 4, len(text), len(" hm"), 1, None, 0.523)
        self.assertEqual(expected, each._tally)

    def test_a_long_stream_is_counted_on_its_way(self):
        """All of it, and never is more of it kept than what is counted in a moment."""
        each = relay()
        data = json.dumps(delta(content="x" * 1000)).encode()
        each.frame(data)
        most = 0
        for _ in range(1000):
            self.assertIsNotNone(quick(each, data))
            most = max(most, sum(map(len, each._kept)))
        each.count()
        self.assertEqual(1001 * 1000, each._tally.content_chars)
        self.assertLess(most, BATCH)
        self.assertGreater(most, BATCH // 2)

    def test_relayed_junk_is_not_counted(self):
        """What the quick way let through unread may be anything: it counts for nothing, and does no harm."""
        each = relay()
        good = json.dumps(delta(content="a")).encode()
        each.frame(good)
        for junk in (good.replace(b'"a"', b"a"), good.replace(b'"delta": {"content": "a"}', b'"delta": 5')):
            self.assertIsNotNone(quick(each, junk))
        for cut in (good[:-1], good.replace(b'"a"', b'"\xc3"')):
            self.assertIsNone(quick(each, cut))
        self.assertIsNotNone(quick(each, good))
        each.count()
        self.assertEqual(2, each._tally.content_chars)

    def test_what_the_quick_way_must_see(self):
        """After the first content still an error, a usage, reasoning, an end, another id: nothing slips through."""
        ordinary = delta(content="b")
        special: dict[str, Any] = {
            "usage": {**ordinary, "usage": {"prompt_tokens": 1, "completion_tokens": 1}},
            "reasoning": delta(reasoning="r"),
            "finish": finish(),
            "another id": {**ordinary, "id": "other"},
            "another time": {**ordinary, "created": 17000000001},
            "a longer time": {**ordinary, "created": 1700000000123},
            "another model": {**ordinary, "model": "up2"},
            "no model": {key: value for key, value in ordinary.items() if key != "model"},
            "a nested model": {"x": {"model": "up"}, **ordinary},
        }
        for dump in (json.dumps, lambda value: json.dumps(value, separators=(",", ":"))):
            for name, value in special.items():
                with self.subTest(name):
                    each = relay()
                    each.frame(dump(delta(content="a")).encode())
                    self.assertIsNotNone(quick(each, dump(ordinary).encode()))
                    self.assertIsNone(quick(each, dump(value).encode()))
            each = relay()
            each.frame(dump(delta(content="a")).encode())
            for data in (
                dump({**ordinary, "error": {"message": "x"}}),
                json.dumps(ordinary, indent=1),
                f"[{dump(ordinary)}]",
                dump(ordinary)[:-1],
            ):
                self.assertIsNone(quick(each, data.encode()))

    def test_several_chunks_at_once(self):
        """Ordinary chunks that came together are relayed unread together, and counted; one among them that is not,
        a comment or an event in another form has all of them taken apart."""
        ordinary = [sse(json.dumps(delta(content=text)).encode()) for text in ("b", "cc", "\u20ac")]
        each = relay()
        each.frame(json.dumps(delta(content="a")).encode())
        got = each.block(b"".join(ordinary))
        self.assertEqual("bcc\u20ac", text_of(frames(got or b"")))
        self.assertEqual({"fast"}, {json.loads(data)["model"] for data in SSEReader().feed(got or b"")})
        each.count()
        self.assertEqual(5, each._tally.content_chars)
        for other in (
            sse(json.dumps(finish()).encode()),
            sse(json.dumps({**delta(content="x"), "model": "other"}).encode()),
            b": comment\n\n",
            b"event: x\n" + ordinary[0],
            ordinary[0].replace(b"\n", b"\r\n"),
            ordinary[0][:-1],
            b"data: [DONE]\n\n",
        ):
            for place in range(4):
                block = b"".join([*ordinary[:place], other, *ordinary[place:]])
                self.assertIsNone(each.block(block), block)

    def test_what_comes_with_the_first_content(self):
        """Whatever comes together, nothing is lost, and what is like the first content is relayed unread."""
        chunks = [delta(role="assistant", content=""), *(delta(content=text) for text in "abcd"), finish(), usage()]
        chunks[0]["choices"][0]["delta"]["content"] = None  # as llama-server has it
        events = [json.dumps(chunk).encode() for chunk in chunks] + [b"[DONE]"]
        alone = relay(stream_options={"include_usage": True})
        expected = b"".join(alone.frames([event])[0] for event in events)
        for first in range(1, len(events)):
            for second in range(first, len(events)):
                each = relay(stream_options={"include_usage": True})
                parts = (events[:first], events[first:second], events[second:])
                got = b"".join(each.frames(part)[0] for part in parts)
                self.assertEqual(expected, got, (first, second))
                each.count()
                self.assertEqual(4, each._tally.content_chars)
        with mock.patch.object(openai, "_document", side_effect=openai._document) as parsed:
            relay().frames(events[:5])
        self.assertEqual(2, parsed.call_count)

    def test_two_choices_in_one_chunk(self):
        """Do not make up for a chunk without any, such as the last one: each is looked at."""
        two = delta(content="b")
        two["choices"].append({**two["choices"][0], "index": 1})
        chunks = [delta(content="a"), two, finish()]
        each = relay()
        each.frames([json.dumps(chunk).encode() for chunk in chunks])
        self.assertTrue(each.finished)

    def test_reasoning_that_is_no_text(self):
        """It stands under both names, too."""
        for name, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
            chunk = delta()
            chunk["choices"][0]["delta"] = {name: [{"text": "why"}]}
            got = json.loads(relay().frame(json.dumps(chunk).encode())[6:])
            self.assertEqual([{"text": "why"}], got["choices"][0]["delta"][other])

    def test_counts_beyond_measure(self):
        """Are none: arithmetic would fail on them, and with it the log's line."""
        for huge in (10**400, -(10**400)):
            counts = {"prompt_tokens": huge, "completion_tokens": 5}
            each = relay()
            each.frame(json.dumps({**usage(), "usage": counts, "timings": {"predicted_ms": huge}}).encode())
            tally = each._tally
            self.assertEqual((None, 5, None), (tally.prompt_tokens, tally.completion_tokens, tally.decode_s))

    def test_what_can_stand_in_an_id(self):
        """One with quotes and commas is an id like any other, and so is one that is no text."""
        for id in ('a",",b":"c', "x,", "\ud800", "", 7, [1]):
            chunk = {**delta(content="a"), "id": id}
            for separators in ((",", ":"), (", ", ": ")):
                data = json.dumps(chunk, separators=separators).encode()
                each = relay()
                long = each.frame(data)
                self.assertEqual(id != "", quick(each, data) is not None, id)
                self.assertEqual(json.loads(long[6:])["id"], id or "chatcmpl-own")

    def test_half_a_character(self):
        """Text beyond ASCII goes the quick way as long as it is UTF-8; half of a character is a broken answer."""
        each = relay()
        each.frame(json.dumps(delta(content="a")).encode())
        whole = json.dumps(delta(content="d\u00e9j\u00e0"), ensure_ascii=False).encode()
        half = whole.replace("\u00e0".encode(), "\u00e0".encode()[:1])
        self.assertIsNotNone(quick(each, whole))
        self.assertIsNone(quick(each, half))
        with self.assertRaises(BackendError) as caught:
            each.frame(half)
        self.assertEqual("bad_answer", caught.exception.reason)

    def test_several_lines_of_data(self):
        """An event of several data lines comes out as one line."""
        pretty = json.dumps(delta(content="a"), indent=1)
        event = "".join(f"data: {line}\n" for line in pretty.split("\n")) + "\n"
        got = relayed(relay(), (event * 3).encode())
        self.assertEqual("aaa", text_of(got))

    def test_null_usage(self):
        """OpenAI's own "usage": null on every chunk goes the quick way; the counts at the end do not."""
        each = relay()
        with_null = {**delta(content="a"), "usage": None}
        each.frame(json.dumps(with_null).encode())
        self.assertIsNotNone(quick(each, json.dumps(with_null).encode()))
        self.assertIsNone(quick(each, json.dumps({**with_null, "usage": {"prompt_tokens": 1}}).encode()))
        self.assertIsNone(quick(each, json.dumps(delta(content="a")).encode()))

    def test_false_usage(self):
        """Counts that are all zero are no counts: they are not shown, also to one who asks."""
        zero = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        each = relay(stream_options={"include_usage": True})
        self.assertNotIn(b"usage", each.frame(json.dumps({**delta(content="a"), "usage": zero}).encode()))
        self.assertEqual(b"", each.frame(json.dumps({**usage(), "usage": zero}).encode()))
        self.assertIsNone(each._tally.prompt_tokens)

    def test_own_id_and_time(self):
        """A stream has one id and one time: the server's first, ours where it has none."""
        first, second = delta(content="a"), {**delta(content="b"), "id": "other", "created": 5}
        got = [
            json.loads(frame[6:])
            for frame in map(relay().frame, (json.dumps(first).encode(), json.dumps(second).encode()))
        ]
        self.assertEqual("chatcmpl-up", got[0]["id"])
        each = relay()
        got = [json.loads(each.frame(json.dumps(value).encode())[6:]) for value in (first, second)]
        self.assertEqual([("chatcmpl-up", 1700000000)] * 2, [(frame["id"], frame["created"]) for frame in got])
        bare = json.dumps({"choices": first["choices"]}).encode()
        got = json.loads(relay().frame(bare)[6:])
        self.assertEqual(("chatcmpl-own", 1, "fast"), (got["id"], got["created"], got["model"]))

    def test_think_tags(self):
        """A leading <think> never reaches the text, however it is cut; then the quick way is open."""
        text = "\n<think>\nI wonder.</think>\n\nYes, <think> is a tag."
        for size in range(1, len(text)):
            parts = [text[start : start + size] for start in range(0, len(text), size)]
            chunks = [delta(role="assistant", content=""), *(delta(content=part) for part in parts), finish()]
            each = relay()
            got = relayed(
                each, b"".join(b"data: %s\n\n" % json.dumps(value).encode() for value in chunks) + b"data: [DONE]\n\n"
            )
            self.assertEqual(
                ("\nI wonder.", "Yes, <think> is a tag."), (text_of(got, "reasoning_content"), text_of(got))
            )
            self.assertEqual(text_of(got, "reasoning"), text_of(got, "reasoning_content"))
            self.assertTrue(each._needles or size > 20)

    def test_what_only_looks_like_a_tag(self):
        """A text that begins like a tag, a server that splits by itself, two choices, an end within."""
        cases: dict[str, tuple[list[dict[str, Any]], str, str]] = {
            "no tag": ([delta(content="<th"), delta(content="ou>"), finish()], "", "<thou>"),
            "cut off": ([delta(content="<th"), finish("length")], "", "<th"),
            "cut off without a finish": ([delta(content="<thi")], "", "<thi"),
            "thinking cut off": ([delta(content="<think>hm</th"), finish("length")], "hm</th", ""),
            "splits by itself": ([delta(reasoning="r"), delta(content="<think>x"), finish()], "r", "<think>x"),
            "a call beside an empty text": (
                [delta(content="", tool_calls=[{"index": 0, "id": "c"}]), delta(content="<think>x"), finish()],
                "",
                "<think>x",
            ),
            "a call after a blank": (
                [delta(content="\n"), delta(tool_calls=[{"index": 0, "id": "c"}]), delta(content="<think>"), finish()],
                "",
                "\n<think>",
            ),
            "white space only": ([delta(content="  "), finish("length")], "", "  "),
        }
        for name, (chunks, thought, text) in cases.items():
            with self.subTest(name):
                stream = (
                    b"".join(b"data: %s\n\n" % json.dumps(value).encode() for value in chunks) + b"data: [DONE]\n\n"
                )
                got = relayed(relay(), stream)
                self.assertEqual((thought, text), (text_of(got, "reasoning_content"), text_of(got)))
                ends = [bool(each["choices"][0]["finish_reason"]) for each in got[:-1]]
                self.assertFalse(any(ends[:-1]))  # what was held back comes before the end

    def test_two_choices(self):
        """Each choice has its own tags and its own end; the stream is whole when both have ended."""
        each = relay(n=2)
        stream = [
            {
                **delta(content="<think>a</think>b"),
                "choices": [{"index": index, "delta": {"content": f"<think>a{index}</think>b{index}"}}],
            }
            for index in (0, 1)
        ]
        got = [json.loads(each.frame(json.dumps(value).encode())[6:])["choices"][0]["delta"] for value in stream]
        self.assertEqual([("a0", "b0"), ("a1", "b1")], [(part["reasoning_content"], part["content"]) for part in got])
        each.frame(json.dumps(finish()).encode())
        self.assertFalse(each.finished)
        each.frame(json.dumps({**finish(), "choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}).encode())
        self.assertTrue(each.finished)

    def test_legacy_completions(self):
        """Legacy text is relayed as it is, tags and all; it may be empty."""
        each = _Relay(call("completions", prompt="p", stream=True), MODEL, Tally())
        value = {
            "id": "c",
            "created": 5,
            "model": "up",
            "choices": [{"index": 0, "text": "<think>x", "finish_reason": None}],
        }
        self.assertIn(b'"text":"<think>x"', each.frame(json.dumps(value).encode()))
        self.assertIsNotNone(quick(each, json.dumps(value).encode()))
        empty = _Relay(call("completions", prompt="p", stream=True), MODEL, Tally())
        self.assertEqual(b"data: [DONE]\n\n", empty.end())

    def test_weird_chunks(self):
        """Whatever JSON a server sends, the worst is a BackendError."""
        dice = random.Random(11)
        for _ in range(3000):
            each = relay(n=dice.choice([None, 1, 2, "x", [], True, 2.5]))
            for _ in range(3):
                data = json.dumps(weird_chunk(dice)).encode()
                try:
                    got = quick(each, data) or each.frame(data)
                    self.assertTrue(got == b"" or (got.startswith(b"data: {") and got.endswith(b"}\n\n")))
                    if dice.random() < 0.3:
                        each.end()
                except BackendError:
                    pass
                each.count()


def weird(dice: random.Random, depth: int = 2) -> Any:
    """Any JSON value."""
    plain: list[Any] = [None, True, 0, -1, 1.5, "", "text", "<think>", [], {}, 10**30, "stop", "\ud800"]
    if depth and dice.random() < 0.3:
        return dice.choice([[weird(dice, depth - 1)], {dice.choice(_KEYS): weird(dice, depth - 1)}])
    return dice.choice(plain)


_KEYS = (
    "choices delta message content text role tool_calls reasoning_content reasoning finish_reason index usage error "
    "prompt_tokens completion_tokens timings predicted_ms id created model object refusal audio function_call data"
).split()


def weird_chunk(dice: random.Random) -> Any:
    """A chunk, or an answer, with something wrong in it somewhere."""
    if dice.random() < 0.1:
        return weird(dice)
    part = {"content": "a", **{dice.choice(_KEYS): weird(dice) for _ in range(2)}}
    choice = {"index": 0, dice.choice(["delta", "message"]): part, "finish_reason": None}
    if dice.random() < 0.5:
        choice[dice.choice(_KEYS)] = weird(dice)
    value = {"id": "x", "created": 5, "model": "m", "choices": [choice], "usage": {"prompt_tokens": 1}}
    if dice.random() < 0.7:
        value[dice.choice(_KEYS)] = weird(dice)
    return value


class AnswerTest(unittest.TestCase):
    """Whole answers from a scripted server."""

    def answer(self, server: ScriptedServer, asked: Call) -> Answer:
        target = replace(BACKEND, url=server.url, port=server.port)
        backend = OpenAIBackend(target)
        self.addCleanup(backend.close)
        soon = time.monotonic() + 5
        limits = Limits(5, 5, 5, 5, soon, soon)
        return run(backend.open(asked, replace(MODEL, backend=target), limits, NoClient()))

    def whole(self, reply: bytes, **fields: Any) -> tuple[Any, Answer]:
        with ScriptedServer([reply]) as server:
            answer = self.answer(server, call(**fields))
            try:
                return json.loads(whole(answer)), answer
            finally:
                close(answer)

    def streamed(self, reply: Any, **fields: Any) -> list[bytes]:
        with ScriptedServer([reply]) as server:
            answer = self.answer(server, call(stream=True, **fields))
            try:
                return list(pieces(answer))
            finally:
                close(answer)

    def test_plain(self):
        """Every byte but the model's name is the server's."""
        choices = b'[{"message":{"content":"say \\"model\\""},"finish_reason":"stop"}]'
        body = b'{ "id" : "x", "model":"up" , "choices":%s}' % choices
        with ScriptedServer([b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)]) as server:
            answer = self.answer(server, call())
            got = whole(answer)
            close(answer)
        self.assertEqual(body.replace(b'"model":"up"', b'"model":"fast"'), got)

    def test_plain_shapes(self):
        """Reasoning under both names and out of the text; no model, a nested one; usage that is none."""
        stop = {"finish_reason": "stop", "index": 0}
        got, _ = self.whole(json_reply({"choices": [{"message": {"reasoning": "r", "content": "a"}, **stop}]}))
        self.assertEqual({"reasoning": "r", "reasoning_content": "r", "content": "a"}, got["choices"][0]["message"])
        self.assertEqual("fast", got["model"])
        got, answer = self.whole(
            json_reply({"model": "m", "choices": [{"message": {"content": "\n<think>r</think>\na"}, **stop}]})
        )
        self.assertEqual({"reasoning": "r", "reasoning_content": "r", "content": "a"}, got["choices"][0]["message"])
        self.assertEqual((1, 1), (answer.tally.content_chars, answer.tally.reasoning_chars))
        for name in ("reasoning", "reasoning_content"):  # who takes it apart means the rest as it is
            got, _ = self.whole(json_reply({"choices": [{"message": {name: "r", "content": "<think>a"}, **stop}]}))
            self.assertEqual("<think>a", got["choices"][0]["message"]["content"])
        got, _ = self.whole(json_reply({"choices": [{"message": {"content": "a", "model": "keep"}, **stop}]}))
        self.assertEqual(("fast", "keep"), (got["model"], got["choices"][0]["message"]["model"]))
        got, _ = self.whole(
            json_reply({"choices": [{"message": {"content": "a <think>b"}, **stop}], "usage": {"prompt_tokens": 0}})
        )
        self.assertEqual("a <think>b", got["choices"][0]["message"]["content"])
        self.assertNotIn("usage", got)

    def test_weird_answers(self):
        """Whatever JSON a server answers, the worst is a BackendError."""
        dice = random.Random(13)
        replies = [json_reply(weird_chunk(dice)) for _ in range(400)]
        with ScriptedServer(replies) as server:
            target = replace(BACKEND, url=server.url, port=server.port)
            backend = OpenAIBackend(target)
            for number in range(len(replies)):
                asked = (
                    call("embeddings", input="x")
                    if number % 4 == 0
                    else call("completions" if number % 4 == 1 else "chat")
                )
                soon = time.monotonic() + 5
                limits = Limits(5, 5, 5, 5, soon, soon)
                answer = run(backend.open(asked, replace(MODEL, backend=target), limits, NoClient()))
                try:
                    self.assertEqual("fast", json.loads(whole(answer))["model"])
                except BackendError:
                    pass
                close(answer)
            backend.close()

    def test_first_piece_ends_with_the_first_content(self):
        """Roles and empty texts are held until there is content, whatever the packets are."""
        for silent in (1, 5):
            held = [delta(role="assistant", content=None)] + [delta(content="")] * silent
            reply = sse_reply([*held, delta(content="a"), finish()])
            for script in (reply, [Bytewise(reply)]):
                first = self.streamed(script)[0]
                self.assertEqual(
                    [*[""] * (silent + 1), "a"], [text_of([value]) for value in frames(first)][: silent + 2]
                )

    def test_events_without_end_before_any_content(self):
        """They are held, but not without bound: then the next in the chain may answer."""
        role = chunk(sse(json.dumps(delta(role="assistant", pad="x" * 60_000)).encode()))
        for count, reason in ((10, "empty_answer"), (40, "bad_answer")):
            script = [stream_head(), *[role] * count, *map(chunk, sse_body([finish()])), LAST_CHUNK]
            with self.subTest(count=count), self.assertRaises(BackendError) as caught:
                self.streamed(script)
            self.assertEqual(reason, caught.exception.reason)

    def test_a_first_content_may_be_large(self):
        """An image or a long text is content, however much it is."""
        events = sse_body([delta(role="assistant"), delta(images=["x" * 3_000_000]), finish()])
        first = self.streamed([stream_head(), *map(chunk, events), LAST_CHUNK])[0]
        self.assertGreater(len(first), 3_000_000)

    def test_tally(self):
        """Once closed, an answer knows all that it said."""
        with ScriptedServer(
            [sse_reply([*(delta(content=text) for text in ("a", "bc", "def")), finish(), usage(9, 3)])]
        ) as server:
            answer = self.answer(server, call(stream=True))
            list(pieces(answer))
            close(answer)
        self.assertEqual(Tally("stop", 9, 3, 6), answer.tally)

    def test_bytewise(self):
        """A stream in single bytes, in odd chunks and with CRLF line ends is the same stream."""
        chunks = [delta(role="assistant", content=None), *(delta(content=text) for text in "abc"), finish(), usage()]
        expected = frames(b"".join(self.streamed(sse_reply(chunks))))
        for reply in (
            [Bytewise(sse_reply(chunks))],
            sse_reply(chunks, chunk_sizes=[1, 2, 3]),
            sse_reply(chunks, crlf=True, chunk_sizes=7),
            sse_reply(chunks, comments=["hi", ""]),
        ):
            self.assertEqual(expected, frames(b"".join(self.streamed(reply))))

    def test_cut_off_everywhere(self):
        """A stream cut off at any byte before its end is an error, never a whole answer; after it, it is whole."""
        chunks = [delta(role="assistant", content=None), delta(content="a"), delta(content="b"), finish()]
        body = b"".join(b"data: %s\n\n" % json.dumps(value, separators=(",", ":")).encode() for value in chunks)
        complete = len(body) - 2  # only line ends are missing
        content = body.index(b"data: ", body.index(b'"a"'))
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        for cut in [*range(0, complete, 7), *range(complete, len(body) + 1)]:
            with self.subTest(cut=cut):
                got: list[bytes] = []
                with ScriptedServer([[head + body[:cut], CLOSE]]) as server:
                    answer = self.answer(server, call(stream=True))
                    try:
                        got.extend(pieces(answer))
                        self.assertGreaterEqual(cut, complete)
                        self.assertTrue(got[-1].endswith(b"data: [DONE]\n\n"))
                    except BackendError as error:
                        self.assertLess(cut, complete)
                        before = {"connection_lost", "empty_answer", "bad_answer"}
                        self.assertIn(error.reason, {"stream_broken"} if cut >= content else before)
                        self.assertEqual(cut >= content, bool(got))
                    finally:
                        close(answer)

    def test_tool_calls_untouched(self):
        """The parts of tool calls come out as they went in, several at once."""
        calls = [
            [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}],
            [{"index": 0, "function": {"arguments": '"model": "up"}'}}],
            [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}}],
        ]
        got = frames(
            b"".join(self.streamed(sse_reply([*(delta(tool_calls=each) for each in calls), finish("tool_calls")])))
        )
        self.assertEqual(calls, [each["choices"][0]["delta"]["tool_calls"] for each in got[:-2]])
        self.assertEqual("tool_calls", got[-2]["choices"][0]["finish_reason"])

    def test_error_then_done(self):
        """An error in the stream is one, though [DONE] follows; its status is what it says."""
        error = {"error": {"message": "temperature: wrong", "code": 400, "type": "BadRequestError"}}
        with self.assertRaises(BackendError) as caught:
            self.streamed(sse_reply([delta(role="assistant"), error]))
        self.assertEqual(("bad_request", 400), (caught.exception.reason, caught.exception.status))

    def test_error_in_content_is_none(self):
        """Words in a text are words."""
        text = '"error" {"error": {"message": "x"}} data: [DONE] "finish_reason":"stop"'
        got = frames(b"".join(self.streamed(sse_reply([delta(content=text), delta(content=text), finish()]))))
        self.assertEqual(text * 2, text_of(got))

    def test_embeddings(self):
        """Vectors pass through; an answer without them is an error."""
        body = {
            "object": "list",
            "model": "up",
            "data": [{"embedding": [0.1], "index": 0}],
            "usage": {"prompt_tokens": 3, "total_tokens": 3},
        }
        with ScriptedServer([json_reply(body), json_reply({"data": "x"})]) as server:
            answer = self.answer(server, call("embeddings", input="x"))
            self.assertEqual({**body, "model": "fast"}, json.loads(whole(answer)))
            self.assertEqual(3, answer.tally.prompt_tokens)
            close(answer)
            answer = self.answer(server, call("embeddings", input="x"))
            with self.assertRaises(BackendError):
                whole(answer)
            close(answer)

    def test_open_ended(self):
        """A stream of an HTTP/1.0-like server that ends by closing, without a content type."""
        body = b"".join(b"data: %s\n\n" % json.dumps(value).encode() for value in (delta(content="a"), finish()))
        reply = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body
        self.assertEqual("a", text_of(frames(b"".join(self.streamed([reply, CLOSE])))))

    def test_the_last_bytes_of_a_stream(self):
        """Only a stream that was read to its [DONE] is settled, so that its connection can be kept."""
        body = b"".join(b"data: %s\n\n" % json.dumps(value).encode() for value in (delta(content="a"), finish()))
        for end, done in ((b"data: [DONE]\n\n", ["settle", "close"]), (b"", ["close"])):
            reply = MadeUpReply("text/event-stream", [body, end])
            answer = StreamAnswer(call(stream=True), MODEL, reply, Patience(FOREVER), [])  # type: ignore[arg-type]
            reading = pieces(answer)
            next(reading)
            if end:
                next(reading)
            close(answer)
            self.assertEqual(done, reply.done)

    def test_nothing_after_the_end_is_read(self):
        """What a server sends behind [DONE] does not reach the next answer."""
        reply = stream_head() + chunk(b"data: %s\n\n" % json.dumps(delta(content="a")).encode())
        reply += chunk(b"data: [DONE]\n\ndata: {}\n\n") + LAST_CHUNK
        self.assertEqual(["a", ""], [text_of([each]) for each in frames(b"".join(self.streamed(reply)))])
