"""backends/ollama.py: what Ollama gets, against the stand-in, and what is made of its lines, against scripts."""

from __future__ import annotations

import base64
import json
import random
import struct
import time
import unittest
from dataclasses import replace
from typing import Any

from portway import config
from portway.backends.ollama import EmbeddingAnswer, OllamaAnswer, OllamaBackend, Waiting
from portway.backends.transport import Patience
from portway.call import Answer, Call, Endpoint, Limits, finish
from portway.errors import BackendError, ClientError
from portway.standin.server import StandIn
from portway.watch import NoClient
from portway.wire.translate import ChatStream
from tests.blocking import close, pieces, whole
from tests.doubles import CLOSE, Bytewise, ScriptedServer, json_reply, ndjson_reply
from tests.targets import FOREVER, MadeUpReply, Reply, frames, last_line, line, text_of

BACKEND = config.Backend("up", "ollama", "http://127.0.0.1:1", "http", "127.0.0.1", 1)
MODEL = config.Model("fast", BACKEND, "qwen3.5:9b", keep_alive=900.0, num_ctx=4096, think=False)
HI = [{"role": "user", "content": "hi"}]


def call(endpoint: Endpoint = "chat", **fields: Any) -> Call:
    body = {"model": "fast", **({"messages": HI} if endpoint == "chat" else {}), **fields}
    stream = bool(body.get("stream"))
    return Call(endpoint, body, json.dumps(body).encode(), MODEL, stream, False, "chatcmpl-own", 1)


class _Case(unittest.TestCase):
    def open(self, server: Any, asked: Call, **model: Any) -> Answer:
        target = replace(BACKEND, url=server.url, port=server.port)
        backend = OllamaBackend(target)
        self.addCleanup(backend.close)
        soon = time.monotonic() + 5
        limits = Limits(5, 5, 5, 5, soon, soon)
        answer = finish(backend.open(asked, replace(MODEL, backend=target, **model), limits, NoClient()))
        self.addCleanup(close, answer)
        return answer


class RequestTest(_Case):
    """The requests as the stand-in received them."""

    def received(self, asked: Call, **model: Any) -> tuple[str, dict[str, Any], Answer]:
        with StandIn() as standin:
            answer = self.open(standin, asked, **model)
            if asked.stream:
                list(pieces(answer))
            else:
                whole(answer)
            (request,) = standin.requests
            return request.path, request.json, answer

    def test_residency_and_window(self):
        """keep_alive, num_ctx, think and truncate: false stand in every call; shift is always the same."""
        for asked, path in (
            (call(), "/api/chat"),
            (call(stream=True), "/api/chat"),
            (call("completions", prompt="p"), "/api/generate"),
            (call("completions", prompt="p", stream=True, temperature=0), "/api/generate"),
        ):
            with self.subTest(path, stream=asked.stream):
                got_path, payload, _ = self.received(asked)
                self.assertEqual(path, got_path)
                constant = {
                    key: payload[key] for key in ("model", "keep_alive", "think", "truncate", "shift", "stream")
                }
                expected = {"model": "qwen3.5:9b", "keep_alive": 900, "think": False, "truncate": False, "shift": False}
                self.assertEqual({**expected, "stream": True}, constant)
                self.assertEqual(4096, payload["options"]["num_ctx"])
        path, payload, _ = self.received(call("embeddings", input="x"), model="nomic-embed-text", num_ctx=2048)
        self.assertEqual(("/api/embed", 900, False), (path, payload["keep_alive"], payload["truncate"]))
        self.assertEqual({"num_ctx": 2048}, payload["options"])

    def test_types_of_keep_alive(self):
        """Seconds travel as a number; 0 and -1 too; nothing where nothing is configured."""
        for configured, sent in ((900.0, 900), (0.0, 0), (-1.0, -1), (0.5, 0.5), (None, None)):
            _, payload, _ = self.received(call(), keep_alive=configured)
            self.assertEqual(sent, payload.get("keep_alive"))

    def test_silence_stays_silence(self):
        """What neither the client nor the configuration says is not sent: the model's own values are better."""
        _, payload, _ = self.received(call(), num_ctx=None, think=None, keep_alive=None)
        self.assertEqual({"model", "messages", "stream", "truncate", "shift"}, set(payload))
        _, payload, _ = self.received(call(temperature=0.2), params={"temperature": 0.9, "top_k": 3})
        self.assertEqual({"temperature": 0.2, "top_k": 3, "num_ctx": 4096}, payload["options"])

    def test_what_cannot_be_carried_over(self):
        """Is named in a warning, never dropped in silence; what nobody could serve is the client's error."""
        _, _, answer = self.received(call(logit_bias={"4": 100}))
        self.assertEqual(["ignored(logit_bias)"], answer.warnings)
        with StandIn() as standin:
            with self.assertRaises(ClientError):
                self.open(standin, call(temperature="hot"))
            with self.assertRaises(BackendError) as caught:
                self.open(standin, call(n=2))
            self.assertEqual([], standin.requests)
        self.assertEqual("unsupported", caught.exception.reason)

    def test_one_connection(self):
        """All kinds of calls go over one kept connection, one after the other."""
        with StandIn() as standin:
            target = replace(BACKEND, url=standin.url, port=standin.port)
            backend = OllamaBackend(target)
            for asked in (call(stream=True), call(), call("completions", prompt="p"), call(stream=True)):
                soon = time.monotonic() + 5
                limits = Limits(5, 5, 5, 5, soon, soon)
                answer = finish(backend.open(asked, replace(MODEL, backend=target), limits, NoClient()))
                if asked.stream:
                    list(pieces(answer))
                else:
                    whole(answer)
                close(answer)
            self.assertEqual(1, len({request.connection for request in standin.requests}))
            backend.close()
            self.assertTrue(standin.wait_for(lambda seen: seen.connections == 0))

    def test_fill_in_the_middle(self):
        """prompt and suffix go to /api/generate, and the text comes back as a legacy completion."""
        with StandIn() as standin:
            answer = self.open(standin, call("completions", prompt="def f(", suffix="return"), model="qwen3-coder:30b")
            body = json.loads(whole(answer))
            (request,) = standin.requests
        self.assertEqual(("def f(", "return"), (request.json["prompt"], request.json["suffix"]))
        self.assertEqual(
            ("text_completion", "fast", "stop"), (body["object"], body["model"], body["choices"][0]["finish_reason"])
        )
        self.assertTrue(body["choices"][0]["text"])

    def test_embeddings(self):
        """Floats, or base64 of little-endian float32; a vector for each input, in order."""
        with StandIn() as standin:
            bodies = []
            for form in ("float", "base64", None):
                asked = call("embeddings", input=["a", "", "c"], **({"encoding_format": form} if form else {}))
                answer = self.open(standin, asked, model="nomic-embed-text", num_ctx=None)
                bodies.append(json.loads(whole(answer)))
            self.assertEqual(bodies[0]["usage"]["prompt_tokens"], answer.tally.prompt_tokens)
        floats = [item["embedding"] for item in bodies[0]["data"]]
        packed = [base64.b64decode(item["embedding"]) for item in bodies[1]["data"]]
        self.assertEqual([0, 1, 2], [item["index"] for item in bodies[0]["data"]])
        for vector, raw in zip(floats, packed, strict=True):
            self.assertEqual(
                [struct.pack("<f", number) for number in vector], [raw[i : i + 4] for i in range(0, len(raw), 4)]
            )
        self.assertEqual(bodies[0], bodies[2])

    def test_overlong(self):
        """An overlong prompt is an error with a code that agents compact on."""
        with StandIn() as standin, self.assertRaises(BackendError) as caught:
            self.open(standin, call(messages=[{"role": "user", "content": "word " * 600}]), num_ctx=256)
        self.assertEqual(("context_length_exceeded", 400), (caught.exception.code, caught.exception.status))


class AnswerTest(_Case):
    """Lines from scripts."""

    def run_script(
        self, reply: Reply, asked: Call | None = None, **model: Any
    ) -> tuple[list[Any], BackendError | None]:
        """The frames of a streamed answer as far as they came, and the error that ended it."""
        got: list[bytes] = []
        with ScriptedServer([reply]) as server:
            try:
                got.extend(pieces(self.open(server, asked or call(stream=True), **model)))
            except BackendError as error:
                return frames(b"".join(got)), error
        self.assertNotIn(b"", got)
        return frames(b"".join(got)), None

    def test_bytewise(self):
        """A stream in single bytes, or in any chunks, is the same stream."""
        lines = [
            line(""),
            line("d\u00e9"),
            line(" \U0001f642"),
            line("", thinking="hm"),
            line(""),
            line("b"),
            last_line(),
        ]
        expected, _ = self.run_script(ndjson_reply(lines))
        self.assertEqual(("d\u00e9 \U0001f642b", "hm"), (text_of(expected), text_of(expected, "reasoning")))
        for reply in ([Bytewise(ndjson_reply(lines))], ndjson_reply(lines, chunk_sizes=[1, 2, 3, 5, 7])):
            self.assertEqual((expected, None), self.run_script(reply))
        last = json.dumps(last_line()).encode()  # no line end behind it
        self.assertEqual((expected, None), self.run_script(ndjson_reply([*lines[:-1], last])))

    def test_cut_off_everywhere(self):
        """A stream cut off before its last line is complete is an error: broken if it had begun to answer."""
        lines = b"".join(json.dumps(each).encode() + b"\n" for each in (line(""), line("a"), last_line()))
        first, second = (place for place, byte in enumerate(lines[:-1]) if byte == ord("\n"))
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n"
        self.assertLess(first, second)
        for cut in range(0, len(lines) - 1, 9):
            with self.subTest(cut=cut):
                got, error = self.run_script([head + lines[:cut], CLOSE])
                self.assertIsNotNone(error)
                before = {"empty_answer"} if not cut else {"connection_lost", "bad_answer"}
                whole_line = cut >= second  # without its line end it counts too
                self.assertIn(error and error.reason, {"stream_broken"} if whole_line else before)
                self.assertEqual("a" if whole_line else "", text_of(got))

    def test_error_lines(self):
        """Before the content an error line is the target's failure, after it the stream is broken."""
        overflow = {
            "code": 400,
            "message": "request (60 tokens) exceeds the available context size",
            "type": "x",
            "n_ctx": 2,
        }
        for error, reason in (
            ({"error": "an error was encountered while running the model: unexpected EOF"}, "server_error"),
            ({"error": json.dumps({"error": overflow})}, "context_length_exceeded"),
        ):
            got, failure = self.run_script(ndjson_reply([line(""), error]))
            self.assertEqual(([], reason), (got, failure and failure.reason))
            got, failure = self.run_script(ndjson_reply([line("a"), error]))
            self.assertEqual(
                ("a", "stream_broken", reason), (text_of(got), failure and failure.reason, failure and failure.detail)
            )

    def test_nested_error_answers(self):
        """The runner's error inside Ollama's error text is unwrapped: its words, its meaning."""
        inner = {
            "error": {"code": 400, "message": "request (60 tokens) exceeds the available context size", "type": "x"}
        }
        with (
            ScriptedServer([json_reply({"error": json.dumps(inner)}, 400)]) as server,
            self.assertRaises(BackendError) as caught,
        ):
            self.open(server, call())
        self.assertEqual("context_length_exceeded", caught.exception.reason)
        self.assertEqual("request (60 tokens) exceeds the available context size", caught.exception.message)
        self.assertIsNone(caught.exception.body)

    def test_no_last_line(self):
        """A clean end without done: true is no end of an answer (a model that repeats itself is stopped so)."""
        got, error = self.run_script(ndjson_reply([line("same")] * 3))
        self.assertEqual(("samesamesame", "stream_broken"), (text_of(got), error and error.reason))
        with ScriptedServer([ndjson_reply([line("same")] * 3)]) as server, self.assertRaises(BackendError) as caught:
            whole(self.open(server, call()))
        self.assertEqual("connection_lost", caught.exception.reason)

    def test_not_json(self):
        """Lines and answers that are no JSON objects are bad answers."""
        for junk in (b"oops\n", b"[1]\n", b'"text"\n', b"\xff\n"):
            with self.subTest(junk=junk):
                self.assertEqual("bad_answer", getattr(self.run_script(ndjson_reply([junk]))[1], "reason", None))
                with ScriptedServer([ndjson_reply([junk])]) as server, self.assertRaises(BackendError) as caught:
                    whole(self.open(server, call("embeddings", input="x")))
                self.assertEqual("bad_answer", caught.exception.reason)

    def test_thinking_that_was_left_in_the_text(self):
        """<think> at the start of an answer is reasoning, also from /api/generate."""
        chat, _ = self.run_script(ndjson_reply([line("<thi"), line("nk>a</think>b"), last_line()]))
        self.assertEqual(("a", "b"), (text_of(chat, "reasoning_content"), text_of(chat)))

    def test_tool_calls(self):
        """Each call whole, with an id and its own index, arguments as text, and finish_reason tool_calls."""
        calls = [{"function": {"name": name, "index": 0, "arguments": {"a": "\u00e9"}}} for name in ("f", "g")]
        got, _ = self.run_script(
            ndjson_reply([line("", tool_calls=calls[:1]), line("", tool_calls=calls[1:]), last_line()])
        )
        sent = [call for each in got[:-1] for call in each["choices"][0]["delta"].get("tool_calls", ())]
        self.assertEqual([(0, "f", '{"a":"\u00e9"}'), (1, "g", '{"a":"\u00e9"}')], [
            (each["index"], each["function"]["name"], each["function"]["arguments"]) for each in sent
        ])  # fmt: skip
        self.assertEqual(2, len({each["id"] for each in sent}))
        self.assertEqual("tool_calls", got[-2]["choices"][0]["finish_reason"])

    def test_the_phase_says_that_it_answers(self):
        """A plain call's log can tell a model that answers from one that is still being loaded."""
        with ScriptedServer([ndjson_reply([line("a"), last_line()])]) as server:
            target = replace(BACKEND, url=server.url, port=server.port)
            backend, watch, soon = OllamaBackend(target), NoClient(), time.monotonic() + 5
            limits = Limits(5, 5, 5, 5, soon, soon)
            answer = finish(backend.open(call(), replace(MODEL, backend=target), limits, watch))
            self.assertEqual("prompt", watch.phase)
            whole(answer)
            self.assertEqual("answer", watch.phase)
            close(answer)
            backend.close()

    def test_embedding_failures(self):
        """Too few vectors, an error in a 200, an empty answer, strange counts: never a wrong vector."""
        replies: dict[str, tuple[bytes, str]] = {
            "too few": (json_reply({"embeddings": [[0.1]]}), "bad_answer"),
            "error": (json_reply({"error": "the input length exceeds the context length"}), "context_length_exceeded"),
            "no vectors": (json_reply({"embeddings": [0.1, 0.2]}), "bad_answer"),
            "empty": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "empty_answer"),
        }
        for name, (reply, reason) in replies.items():
            with self.subTest(name), ScriptedServer([reply]) as server, self.assertRaises(BackendError) as caught:
                whole(self.open(server, call("embeddings", input=["a", "b"])))
            self.assertEqual(reason, caught.exception.reason)
        with ScriptedServer([json_reply({"embeddings": [[0.1]], "prompt_eval_count": "x"})]) as server:
            answer = self.open(server, call("embeddings", input="a"))
            self.assertNotIn("usage", json.loads(whole(answer)))
            self.assertIsNone(answer.tally.prompt_tokens)
            self.assertIsInstance(answer, EmbeddingAnswer)
            with self.assertRaises(BackendError):
                list(pieces(answer))

    def test_weird_lines(self):
        """Whatever JSON a server sends, the worst is a BackendError."""
        dice = random.Random(17)
        with ScriptedServer([ndjson_reply([weird_line(dice) for _ in range(3)]) for _ in range(600)]) as server:
            target = replace(BACKEND, url=server.url, port=server.port)
            backend = OllamaBackend(target)
            for number in range(600):
                asked = (
                    call("completions", prompt="p", stream=True) if number % 3 == 0 else call(stream=number % 3 == 1)
                )
                if number % 5 == 4:
                    asked = call("embeddings", input="x", **({"encoding_format": "base64"} if number % 2 else {}))
                soon = time.monotonic() + 5
                limits = Limits(5, 5, 5, 5, soon, soon)
                answer = finish(backend.open(asked, replace(MODEL, backend=target), limits, NoClient()))
                try:
                    if asked.stream:
                        frames(b"".join(pieces(answer)))
                    else:
                        json.loads(whole(answer))
                except BackendError:
                    pass
                finally:
                    close(answer)
            backend.close()

    def test_the_last_bytes_of_a_stream(self):
        """Only a stream that was read to its last line is settled, so that its connection can be kept."""
        lines = [json.dumps(each).encode() + b"\n" for each in (line("a"), last_line())]
        for count, done in ((2, ["settle", "close"]), (1, ["close"])):
            reply = MadeUpReply("application/x-ndjson", lines)
            waiting, asked = Waiting(Patience(FOREVER), NoClient()), call(stream=True)
            answer = OllamaAnswer(ChatStream(asked, MODEL), MODEL, reply, waiting, [])  # type: ignore[arg-type]
            reading = pieces(answer)
            for _ in range(count):
                next(reading)
            close(answer)
            self.assertEqual(done, reply.done)

    def test_slots(self):
        """Both kinds of answer carry what the log needs."""
        with ScriptedServer([ndjson_reply([line("a"), last_line(load_duration=2_000_000_000)])]) as server:
            answer = self.open(server, call())
            self.assertIsInstance(answer, OllamaAnswer)
            whole(answer)
        tally = answer.tally
        self.assertEqual(
            (5, 2, 2.0, "stop"), (tally.prompt_tokens, tally.completion_tokens, tally.load_s, tally.finish_reason)
        )


def weird_line(dice: random.Random) -> Any:
    """A line with something wrong in it somewhere."""
    strange: list[Any] = [None, True, 0, -1, 1.5, "", "x", "<think>", [], {}, [None], [{}], {"a": 1}, 10**30]
    strange += [[{"function": {}}], [{"function": {"name": 5}}], [[0.1, "x"]], [[1e300]]]
    value = dict(
        dice.choice(
            [line("a"), line("", thinking="t"), last_line(), {"response": "a", "done": False}, {"embeddings": [[0.1]]}]
        )
    )
    for _ in range(dice.randrange(3)):
        keys: tuple[str, ...] = (
            "message",
            "done",
            "done_reason",
            "response",
            "thinking",
            "error",
            "prompt_eval_count",
            "eval_count",
        )
        keys += ("load_duration", "eval_duration", "logprobs", "embeddings", "model")
        value[dice.choice(keys)] = dice.choice(strange)
    if isinstance(value.get("message"), dict) and dice.random() < 0.5:
        inside = dice.choice(("content", "thinking", "tool_calls", "role", "images"))
        value["message"] = {**value["message"], inside: dice.choice(strange)}
    return value if dice.random() < 0.95 else json.dumps(dice.choice(strange)).encode() + b"\n"
