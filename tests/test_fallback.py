"""The fallback table through the whole daemon: what falls back, what cools down, what the client sees."""

from __future__ import annotations

import itertools
import json
import re
import socket
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.daemon import Daemon
from tests.doubles import CLOSE, HANG, RESET, RawResponse, http_reply, json_reply, ndjson_reply, sse_reply
from tests.llama_server import wait_for
from tests.targets import (
    KINDS,
    Reply,
    Target,
    answer,
    ask,
    begun,
    chain,
    delta,
    error_body,
    finish,
    frames,
    last_line,
    text_of,
)

OVERFLOW = "request (3623 tokens) exceeds the available context size (2048 tokens), try increasing it"
EAGER = "[cooldown]\nfailures = 1\n"  # the first failure of a target makes it be skipped


def refuse(status: int, message: str, type: str = "server_error", **headers: str) -> Callable[[str, bool], Reply]:
    """An error answer in either kind's own form."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda kind, _stream: json_reply(error_body(kind, message, type, status), status, fields)


def same(*actions: Any) -> Callable[[str, bool], Reply]:
    return lambda _kind, _stream: list(actions)


def empty(kind: str, stream: bool) -> bytes:
    if kind == "ollama":
        return ndjson_reply([last_line()])
    return sse_reply([delta(role="assistant"), finish()]) if stream else answer(kind, "")


@dataclass(frozen=True)
class Row:
    """A row of the table. falls: to which second target; "" = to none. cools: whether it is skipped next time."""

    name: str
    reply: Callable[[str, bool], Reply]
    reason: str
    status: int
    cools: bool
    falls: str = "any"
    code: str = ""
    type: str = "api_error"
    way_out: str = ""
    retry_after: str | None = None
    timeouts: str = ""
    verbatim: bool = False


INVALID = "invalid_request_error"
ROWS = (
    Row("reset", same(RESET), "connection_lost", 502, True, way_out="log of the server of [backends.first]"),
    Row("closed", same(CLOSE), "connection_lost", 502, True),
    Row("503 busy", refuse(503, "server busy"), "busy", 503, True, way_out="try again later"),
    Row("503 for a while", refuse(503, "overloaded", Retry_After="7"), "busy", 503, True, retry_after="7"),
    Row(
        "429",
        refuse(429, "slow down", Retry_After="9"),
        "rate_limited",
        429,
        True,
        type="rate_limit_error",
        retry_after="9",
    ),
    Row("500", refuse(500, "it broke"), "server_error", 502, True, way_out="log of the server of [backends.first]"),
    Row("502", refuse(502, "bad gateway"), "server_error", 502, True),
    Row("504", refuse(504, "gateway timeout"), "server_error", 502, True),
    Row("out of memory", refuse(500, "CUDA error: out of memory"), "server_error", 502, True),
    Row("crash", refuse(500, "llama runner process has terminated: signal: killed"), "server_error", 502, True),
    Row("silence", same(HANG), "first_token_timeout", 504, True, timeouts="first_token = 0.05, total = 0.4"),
    Row("404", refuse(404, "model 'physical-first' not found"), "model_not_found", 404, False, type=INVALID),
    Row("401", refuse(401, "Invalid API Key"), "backend_auth", 502, True),
    Row("403", refuse(403, "forbidden"), "backend_auth", 502, True),
    Row(
        "overflow",
        refuse(400, OVERFLOW, "exceed_context_size_error"),
        "context_length_exceeded",
        400,
        False,
        "larger",
        type=INVALID,
        way_out="shorten the prompt",
    ),
    Row("400", refuse(400, "temperature: wrong", INVALID), "bad_request", 400, False, "", type=INVALID, verbatim=True),
    Row("413", refuse(413, "too big", INVALID), "bad_request", 413, False, "", type=INVALID, verbatim=True),
    Row("415", refuse(415, "wrong type", INVALID), "bad_request", 415, False, "", type=INVALID, verbatim=True),
    Row("422", refuse(422, "unprocessable", INVALID), "bad_request", 422, False, "", type=INVALID, verbatim=True),
    Row("template", refuse(500, "Jinja Exception: roles must alternate"), "template_error", 500, False),
    Row("empty", empty, "empty_answer", 502, True),
    Row("nothing", same(http_reply(b"")), "empty_answer", 502, True),
    Row("garbage", same(b"\x16\x03\x01 no HTTP\r\n\r\n", CLOSE), "bad_answer", 502, True, way_out="backends.first.url"),
    Row("HTML", same(http_reply(b"<!doctype html><p>Sign in", content_type="text/html")), "bad_answer", 502, True),
    Row("redirect", same(http_reply(b"", status=307, headers={"Location": "/"})), "bad_answer", 502, True),
)


class TableTest(unittest.TestCase):
    """Every row, for both kinds of backend, streamed and not, alone and with somebody behind it."""

    def each(self, rows: tuple[Row, ...] = ROWS):
        for row, kind, stream in itertools.product(rows, KINDS, (False, True)):
            with self.subTest(row.name, kind=kind, stream=stream):
                yield row, kind, stream

    def test_alone(self):
        """Without a chain the client sees the row's status, code and way out, and is told not to retry."""
        for row, kind, stream in self.each():
            toml = chain("URL", kinds=[kind], timeouts=plain(row, kind, stream))
            with Target(row.reply(kind, stream)) as first, Daemon(toml.replace("URL", first.url)) as daemon:
                with daemon.client() as client:
                    response = ask(client, stream=stream)
                self.check_failure(row, kind, stream, response)
                self.assertEqual(1, len(first.asked))

    def check_failure(self, row: Row, kind: str, stream: bool, response: RawResponse) -> None:
        reason = reason_of(row, kind, stream)
        self.assertEqual(row.status, response.status)
        self.assertEqual("application/json", response.header("content-type"))
        self.assertEqual("false", response.header("x-should-retry"))
        self.assertEqual(row.retry_after, response.header("retry-after"))
        self.assertIsNone(response.header("x-served-by"))
        self.assertRegex(response.header("x-portway-attempts") or "", rf"^first={reason}\([^;]*\d\.\ds\)$")
        if row.verbatim and kind == "openai":
            self.assertEqual(bytes(row.reply(kind, stream))[-len(response.body) :], response.body)
            return
        error = response.json["error"]
        self.assertEqual({"message", "type", "param", "code"}, set(error))
        self.assertEqual((row.type, row.code or reason), (error["type"], error["code"]))
        self.assertTrue(error["message"].startswith("first could not answer: "), error["message"])
        self.assertIn(row.way_out, error["message"])

    def test_with_a_chain(self):
        """What falls back is answered by the next one, which says so; what does not, is the first one's failure."""
        for row, kind, stream in self.each():
            larger = {"first": "num_ctx = 2048", "second": "num_ctx = 4096"}
            toml = chain("URL1", "URL2", kinds=[kind], models=larger, timeouts=plain(row, kind, stream), rest=EAGER)
            bad, good = row.reply(kind, stream), answer(kind, "Hello", stream=stream)
            with Target(then=bad) as first, Target(then=good) as second:
                with Daemon(toml.replace("URL1", first.url).replace("URL2", second.url)) as daemon:
                    with daemon.client() as client:
                        response = ask(client, stream=stream)
                        again = ask(client, stream=stream)
                if not row.falls:
                    self.check_failure(row, kind, stream, response)
                    self.assertEqual(0, len(second.asked))
                    self.assertEqual(2, len(first.asked))
                    continue
                reason = reason_of(row, kind, stream)
                self.check_served(response, stream, rf"^first={reason}\([^;]*\d\.\ds\); second=ok$")
                skipped = rf"^first=cooling\(\d+s left, 0\.0s\); second=ok$"
                self.check_served(again, stream, skipped if row.cools else rf"^first={reason}\(.*")
                self.assertEqual(1 if row.cools else 2, len(first.asked))

    def check_served(self, response: RawResponse, stream: bool, attempts: str) -> None:
        self.assertEqual(200, response.status)
        self.assertEqual("second", response.header("x-served-by"))
        self.assertRegex(response.header("x-portway-attempts") or "", attempts)
        if stream:
            chunks = frames(response.body)
            self.assertEqual("[DONE]", chunks.pop())
            self.assertEqual("Hello", text_of(chunks))
            self.assertEqual({"second"}, {chunk["model"] for chunk in chunks})
        else:
            self.assertEqual("Hello", response.json["choices"][0]["message"]["content"])
            self.assertEqual("second", response.json["model"])

    def test_refused_connection(self):
        """A server that is not there: 502 with how to start it, a fallback, and a short cooldown."""
        gone = unused_port()
        for kind, stream in itertools.product(KINDS, (False, True)):
            with self.subTest(kind=kind, stream=stream), Target(then=answer(kind, "Hello", stream=stream)) as second:
                alone = chain(f"http://127.0.0.1:{gone}", kinds=[kind])
                both = chain(f"http://127.0.0.1:{gone}", second.url, kinds=[kind], rest=EAGER)
                with Daemon(alone) as daemon, daemon.client() as client:
                    response = ask(client, stream=stream)
                self.assertEqual((502, "connect_failed"), (response.status, response.json["error"]["code"]))
                self.assertEqual(
                    f"first could not answer: backend first (http://127.0.0.1:{gone}) can't be reached: Connection "
                    "refused. Way out: start first, or correct backends.first.url.",
                    response.json["error"]["message"],
                )
                with Daemon(both) as daemon, daemon.client() as client:
                    refused = r"^first=connect_failed\(Connection refused, \d\.\ds\); second=ok$"
                    self.check_served(ask(client, stream=stream), stream, refused)
                    skipped = r"^first=cooling\([0-5]s left, 0\.0s\); second=ok$"
                    self.check_served(ask(client, stream=stream), stream, skipped)

    def test_all_fail(self):
        """An exhausted chain names every attempt, what each said and what would help; the first one decides."""
        for kind, stream in itertools.product(KINDS, (False, True)):
            with self.subTest(kind=kind, stream=stream):
                first, second = Target(refuse(404, "model 'x' not found")(kind, stream)), Target([RESET])
                third = Target(refuse(429, "slow down", Retry_After="3")(kind, stream))
                toml = chain(first.url, second.url, third.url, kinds=[kind])
                with first, second, third, Daemon(toml) as daemon, daemon.client() as client:
                    response = ask(client, stream=stream)
                self.assertEqual((404, "model_not_found"), (response.status, response.json["error"]["code"]))
                self.assertRegex(
                    response.header("x-portway-attempts") or "",
                    r"^first=model_not_found\(\d\.\ds\); second=connection_lost\(.*\); third=rate_limited\(\d\.\ds\)$",
                )
                message = response.json["error"]["message"]
                self.assertIn("first could not answer, nor could a fallback. first: Backend 'first' has no", message)
                self.assertIn("; second: the connection", message)
                self.assertIn("; third: slow down. Way out: ", message)
                pull = "ollama pull physical-first" if kind == "ollama" else "correct models.first.model"
                self.assertIn(pull, message)
                self.assertEqual("false", response.header("x-should-retry"))
                self.assertIsNone(response.header("retry-after"))  # 404 is not a matter of time

    def test_only_one_fallback_for_an_empty_answer(self):
        """Two models that have nothing to say will not be followed by a third."""
        for kind, stream in itertools.product(KINDS, (False, True)):
            with self.subTest(kind=kind, stream=stream):
                targets = Target(empty(kind, stream)), Target(empty(kind, stream)), Target()
                with targets[0] as first, targets[1] as second, targets[2] as third:
                    toml = chain(first.url, second.url, third.url, kinds=[kind])
                    with Daemon(toml) as daemon, daemon.client() as client:
                        response = ask(client, stream=stream)
                    self.assertEqual((502, "empty_answer"), (response.status, response.json["error"]["code"]))
                    self.assertEqual((1, 1, 0), (len(first.asked), len(second.asked), len(third.asked)))

    def test_an_answer_cut_short_by_its_limit_is_not_empty(self):
        """finish_reason length explains why there is no content."""
        for stream in (False, True):
            for kind in KINDS:
                with self.subTest(kind=kind, stream=stream):
                    reply = sse_reply([delta(role="assistant"), finish("length")])
                    if kind == "ollama":
                        reply = ndjson_reply([last_line("length")])
                    elif not stream:
                        reply = answer(kind, "").replace(b'"stop"', b'"length"').replace(b"Content-Length: 2", b"Content-Length: 2")
                        head, _, body = answer(kind, "").partition(b"\r\n\r\n")
                        reply = http_reply(body.replace(b'"stop"', b'"length"'))
                    with Target(reply) as first, Daemon(chain(first.url, kinds=[kind])) as daemon:
                        with daemon.client() as client:
                            response = ask(client, stream=stream)
                    self.assertEqual(200, response.status)
                    self.assertIn(b'"finish_reason":"length"', response.body.replace(b": ", b":"))

    def test_a_refusal_behind_a_failure_is_still_verbatim(self):
        """The first is down, the second says that the request is wrong: that is what the client must hear."""
        body = {"error": {"code": 422, "message": "temperature: wrong", "type": INVALID, "more": [1, 2]}}
        first, second, third = Target([RESET]), Target(json_reply(body, 422)), Target()
        with first, second, third, Daemon(chain(first.url, second.url, third.url)) as daemon:
            with daemon.client() as client:
                response = ask(client)
            self.assertEqual((422, json.dumps(body).encode()), (response.status, response.body))
            self.assertRegex(response.header("x-portway-attempts") or "", r"^first=connection_lost.*second=bad_request")
            self.assertEqual(0, len(third.asked))

    def test_ollama_refusal_is_an_envelope(self):
        """Ollama's {"error": "text"} would be no error to an SDK: its words travel in OpenAI's envelope."""
        words = 'option "stop" must be of type array'
        with Target(json_reply({"error": words}, 500)) as first, Daemon(chain(first.url, kinds=["ollama"])) as daemon:
            with daemon.client() as client:
                response = ask(client)
        self.assertEqual((400, "bad_request"), (response.status, response.json["error"]["code"]))
        self.assertEqual(f"first could not answer: {words}.", response.json["error"]["message"])


def plain(row: Row, kind: str, stream: bool) -> str:
    return row.timeouts


def reason_of(row: Row, kind: str, stream: bool) -> str:
    """A plain answer of an openai backend shows no first token, so it is the answer that is missing."""
    if row.reason == "first_token_timeout" and kind == "openai" and not stream:
        return "answer_timeout"
    return row.reason


def unused_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
