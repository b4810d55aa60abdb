"""request.py: from a body to a Call, or to one clear 400."""

from __future__ import annotations

import json
import unittest
from typing import Any

from portway import config
from portway.call import Call, Endpoint
from portway.errors import ClientError
from portway.request import has_images, prompt_chars, read_call

TOML = """
[backends.b]
kind = "openai"
url = "http://127.0.0.1:1"
[models.fast-9b]
backend = "b"
model = "qwen:9b"
aliases = ["gpt-4o-mini"]
[models.think-9b]
backend = "b"
model = "deep:9b"
"""
CONFIG = config.parse(TOML, "models.toml", {})
HI = [{"role": "user", "content": "hi"}]


def read(endpoint: Endpoint = "chat", **fields: Any) -> Call:
    return read_call(endpoint, json.dumps({"model": "fast-9b", "messages": HI, **fields}).encode(), CONFIG)


class ReadTest(unittest.TestCase):
    def test_call(self):
        """A Call holds the body as it is, as bytes and as an object, and an id of its endpoint's form."""
        raw = b'\xef\xbb\xbf{"model": "gpt-4o-mini", "messages": [{"role": "user"}], "stream": true, "x": 1}'
        call = read_call("chat", raw, CONFIG)
        self.assertEqual((raw, "fast-9b", True, False), (call.raw, call.model.name, call.stream, call.include_usage))
        self.assertEqual(1, call.body["x"])
        self.assertRegex(call.id, r"^chatcmpl-[0-9a-f]{24}$")
        self.assertNotEqual(call.id, read().id)
        self.assertRegex(read("completions", prompt="p").id, "^cmpl-")

    def test_streams(self):
        """stream and include_usage count as asked; null is absent; embeddings are never streamed."""
        asked: list[tuple[dict[str, Any], bool, bool]] = [
            ({}, False, False),
            ({"stream": None, "stream_options": None}, False, False),
            ({"stream": True, "stream_options": {}}, True, False),
            ({"stream": True, "stream_options": {"include_usage": None}}, True, False),
            ({"stream": True, "stream_options": {"include_usage": False, "x": 1}}, True, False),
            ({"stream": True, "stream_options": {"include_usage": True}}, True, True),
            ({"stream": False, "stream_options": {"include_usage": True}}, False, False),
        ]
        for fields, stream, usage in asked:
            with self.subTest(fields=fields):
                call = read(**fields)
                self.assertEqual((stream, usage), (call.stream, call.include_usage))
        self.assertFalse(read("embeddings", stream=True).stream)

    def test_refusals(self):
        """Each mistake is a 400 that names its field."""
        part = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}
        mistakes: dict[str, tuple[dict[str, Any], str]] = {
            "no model": ({"model": None}, "model"),
            "a number as model": ({"model": 5}, "model"),
            "an empty model": ({"model": ""}, "model"),
            "stream as text": ({"stream": "yes"}, "stream"),
            "stream as number": ({"stream": 1}, "stream"),
            "options as list": ({"stream_options": []}, "stream_options"),
            "usage as text": ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
            "no messages": ({"messages": None}, "messages"),
            "empty messages": ({"messages": []}, "messages"),
            "messages as text": ({"messages": "hi"}, "messages"),
            "a message as text": ({"messages": [*HI, "hi"]}, "messages[1]"),
            "no role": ({"messages": [*HI, {"content": "hi"}]}, "messages[1].role"),
            "an address": ({"messages": [{"role": "user", "content": [part]}]}, "messages"),
        }
        for name, (fields, param) in mistakes.items():
            with self.subTest(name), self.assertRaises(ClientError) as caught:
                read(**fields)
            self.assertEqual((400, param), (caught.exception.status, caught.exception.param))

    def test_only_chats_have_messages(self):
        """The other endpoints' fields are the backend's to judge."""
        self.assertEqual({"model": "fast-9b"}, read_call("completions", b'{"model": "fast-9b"}', CONFIG).body)

    def test_unknown_model(self):
        """404 with near names, or with all of them; a name of any length is cut."""
        for name, hint in {
            "fast-8b": "Did you mean fast-9b",
            "qwen:9b": "Did you mean fast-9b",
            "xyz": "There are: ",
        }.items():
            with self.subTest(name), self.assertRaises(ClientError) as caught:
                read(model=name)
            self.assertEqual((404, "model_not_found"), (caught.exception.status, caught.exception.code))
            self.assertIn(hint, caught.exception.message)
        with self.assertRaises(ClientError) as caught:
            read(model="x" * 10_000)
        self.assertLess(len(caught.exception.message), 300)

    def test_addresses(self):
        """What a server might fetch from inside is refused in each of its forms, also under an escaped key."""
        urls = ("http://10.0.0.1/x", "HTTPS://x", "file:///etc/passwd", "ftp://x", "//x", "/etc/passwd")
        for key in ("image_url", "video_url", "audio_url"):
            for value in [*urls, *({"url": url} for url in urls)]:
                body = {"model": "fast-9b", "messages": [*HI, {"role": "user", "content": [{"type": key, key: value}]}]}
                for raw in (json.dumps(body), json.dumps(body).replace("_url", "\\u005furl")):
                    with self.subTest(raw=raw), self.assertRaises(ClientError) as caught:
                        read_call("chat", raw.encode(), CONFIG)
                    self.assertEqual("remote_image", caught.exception.code)

    def test_addresses_elsewhere(self):
        """In an embedding's input or messages, inside a tool's result, in a part of a kind that is not known."""
        part = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/x"}}
        unknown = {"type": "picture", "source": {"type": "url", "url": "file:///etc/passwd"}}
        bodies: tuple[tuple[Endpoint, dict[str, Any]], ...] = (
            ("embeddings", {"input": "x", "messages": [{"role": "user", "content": [part]}]}),
            ("embeddings", {"input": [part]}),
            ("embeddings", {"input": [{"content": [part]}]}),
            ("completions", {"prompt": [part]}),
            ("chat", {"messages": [{"role": "tool", "content": [{"type": "tool_result", "content": [part]}]}]}),
            ("chat", {"messages": [{"role": "user", "content": [unknown]}]}),
            ("chat", {"messages": [{"role": "user", "content": part}]}),
        )
        for endpoint, body in bodies:
            with self.subTest(body=body), self.assertRaises(ClientError) as caught:
                read_call(endpoint, json.dumps({"model": "fast-9b", **body}).encode(), CONFIG)
            self.assertEqual("remote_image", caught.exception.code)

    def test_addresses_that_nobody_fetches(self):
        """A tool's arguments and an answer's citations are what they are about."""
        cited = [{"type": "url_citation", "url_citation": {"url": "https://x"}}]
        call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": {"url": "https://x"}}}
        read(messages=[*HI, {"role": "assistant", "content": "x", "annotations": cited, "tool_calls": [call]}])
        read(messages=[*HI, {"role": "assistant", "content": [{"type": "text", "text": "x", "annotations": cited}]}])
        read(messages=HI, tools=[{"type": "function", "function": {"name": "f", "parameters": {"url": "https://x"}}}])

    def test_data_urls(self):
        """The image itself may be sent; an address in a text is only text."""
        for url in ("data:image/png;base64,AA==", "DATA:image/png;base64,AA=="):
            for image in (url, {"url": url}):
                content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "http://x image_url"}]
                self.assertTrue(has_images(read(messages=[{"role": "user", "content": content}]).body))

    def test_weird_contents(self):
        """Parts of any shape are passed on."""
        contents: list[Any] = [None, 5, {}, [None], [5], [[]], [{"image_url": 5}], [{"image_url": {}}], [{"type": 5}]]
        for content in contents:
            with self.subTest(content=content):
                body = read(messages=[{"role": "user", "content": content}], image_url=1).body
                self.assertFalse(has_images(body))
                self.assertEqual(0, prompt_chars(body))

    def test_prompt_chars(self):
        """Texts of messages and parts, or prompt and suffix; nothing else counts."""
        parts = [{"type": "text", "text": "abc"}, {"type": "image_url", "image_url": {"url": "data:,xxxxxxx"}}]
        self.assertEqual(5, prompt_chars({"messages": [{"content": "ab"}, {"content": parts}, {"content": None}]}))
        self.assertEqual(5, prompt_chars({"prompt": "abc", "suffix": "de"}))
        self.assertEqual(0, prompt_chars({"prompt": ["abc"], "messages": "abc"}))
