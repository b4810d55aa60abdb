"""The fallback table through the whole daemon: what falls back, what cools down, what the client sees."""

from __future__ import annotations

import itertools
import json
import select
import socket
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.daemon import Daemon
from tests.doubles import (
    CLOSE,
    HANG,
    LAST_CHUNK,
    RESET,
    Action,
    Bytewise,
    RawClient,
    RawResponse,
    chunk,
    http_reply,
    json_reply,
    ndjson_reply,
    sse_reply,
    stream_head,
)
from tests.llama_server import wait_for
from tests.targets import (
    CHAT,
    KINDS,
    MESSAGES,
    NAMES,
    Reply,
    Target,
    answer,
    ask,
    begun,
    chain,
    client_of,
    delta,
    ended,
    error_body,
    finish,
    frames,
    full_listener,
    last_line,
    line,
    part,
    raw_part,
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
    """A row of the table. falls: to the second target. cools: it is skipped next time."""

    name: str
    reply: Callable[[str, bool], Reply]
    reason: str
    status: int
    cools: bool
    falls: bool = True
    type: str = "api_error"
    way_out: str = ""  # stands in the message
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
        type=INVALID,
        way_out="shorten the prompt",
    ),
    Row(
        "400", refuse(400, "temperature: wrong", INVALID), "bad_request", 400, False, False, type=INVALID, verbatim=True
    ),
    Row("413", refuse(413, "too big", INVALID), "bad_request", 413, False, False, type=INVALID, verbatim=True),
    Row("415", refuse(415, "wrong type", INVALID), "bad_request", 415, False, False, type=INVALID, verbatim=True),
    Row("422", refuse(422, "unprocessable", INVALID), "bad_request", 422, False, False, type=INVALID, verbatim=True),
    Row("template", refuse(500, "Jinja Exception: roles must alternate"), "template_error", 500, False),
    Row("empty", empty, "empty_answer", 502, True),
    Row("nothing", same(http_reply(b"")), "empty_answer", 502, True),
    Row("garbage", same(b"\x16\x03\x01 no HTTP\r\n\r\n", CLOSE), "bad_answer", 502, True, way_out="backends.first.url"),
    Row("HTML", same(http_reply(b"<!doctype html><p>Sign in", content_type="text/html")), "bad_answer", 502, True),
    Row(
        "redirect",
        same(http_reply(b"", status=307, headers={"Location": "/"})),
        "bad_answer",
        502,
        True,
        way_out="redirects are not followed",
    ),
)


CASES = tuple(itertools.product(ROWS, KINDS, (False, True)))


class TableTest(unittest.TestCase):
    """Every row, for both kinds of backend, streamed and not, alone and with somebody behind it."""

    def test_alone(self):
        """Without a chain the client sees the row's status, code and way out, and is told not to retry."""
        for row, kind, stream in CASES:
            with self.subTest(row.name, kind=kind, stream=stream), Target(row.reply(kind, stream)) as first:
                with Daemon(chain(first.url, kinds=[kind], timeouts=row.timeouts)) as daemon, daemon.client() as client:
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
            self.assertTrue(joined(row.reply(kind, stream)).endswith(b"\r\n\r\n" + response.body))
            return
        error = response.json["error"]
        self.assertEqual({"message", "type", "param", "code"}, set(error))
        self.assertEqual((row.type, reason), (error["type"], error["code"]))
        self.assertTrue(error["message"].startswith("first could not answer: "), error["message"])
        self.assertIn(row.way_out, error["message"])

    def test_with_a_chain(self):
        """What falls back is answered by the next one, which says so; what does not, is the first one's failure."""
        for row, kind, stream in CASES:
            bad, good = row.reply(kind, stream), answer(kind, "Hello", stream=stream)
            with (
                self.subTest(row.name, kind=kind, stream=stream),
                Target(then=bad) as first,
                Target(then=good) as second,
            ):
                windows = {"first": "num_ctx = 2048", "second": "num_ctx = 4096"}
                urls = (first.url, second.url)
                toml = chain(*urls, kinds=[kind], models=windows, timeouts=row.timeouts, rest=EAGER)
                with Daemon(toml) as daemon, daemon.client() as client:
                    self.check_chain(row, kind, stream, [ask(client, stream=stream), ask(client, stream=stream)])
                asked = 1 if row.falls and row.cools else 2
                self.assertEqual((asked, 2 if row.falls else 0), (len(first.asked), len(second.asked)))

    def check_chain(self, row: Row, kind: str, stream: bool, responses: list[RawResponse]) -> None:
        """Two requests, one after the other: what the first one leads to, and whether the second one skips."""
        if not row.falls:
            self.check_failure(row, kind, stream, responses[0])
            return
        failed = rf"^first={reason_of(row, kind, stream)}\([^;]*\d\.\ds\); second=ok$"
        skipped = r"^first=cooling\(\d+s left, 0\.0s\); second=ok$"
        self.check_served(responses[0], stream, failed)
        self.check_served(responses[1], stream, skipped if row.cools else failed)

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
        for kind, stream in itertools.product(KINDS, (False, True)):
            reply = ndjson_reply([last_line("length")])
            if kind == "openai":
                choice = {"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "length"}
                reply = (
                    sse_reply([delta(role="assistant"), finish("length")])
                    if stream
                    else json_reply({"choices": [choice]})
                )
            with self.subTest(kind=kind, stream=stream), Target(reply) as first:
                with Daemon(chain(first.url, kinds=[kind])) as daemon, daemon.client() as client:
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
        with (
            Target(json_reply({"error": words}, 500)) as first,
            client_of(chain(first.url, kinds=["ollama"])) as client,
        ):
            response = ask(client)
        self.assertEqual((400, "bad_request"), (response.status, response.json["error"]["code"]))
        self.assertEqual(f"first could not answer: {words}.", response.json["error"]["message"])


class CommitTest(unittest.TestCase):
    """The first content is the point of no return: not the head, not the role, not a comment."""

    def test_what_is_no_content(self):
        """Roles, empty deltas, comments and blank frames are no answer: the stream still falls back."""
        before = {
            "openai": stream_head() + chunk(b": hi\n\n\n\n:\n\ndata:\n\n") + raw_part("openai", delta(role="assistant"))
            + raw_part("openai", delta(content="")) + raw_part("openai", delta(content=None, reasoning_content="")),
            "ollama": begun("ollama", "", "") + chunk(b"\n"),
        }  # fmt: skip
        for kind in KINDS:
            cuts: list[list[Action]] = [[RESET], [CLOSE], [LAST_CHUNK]]
            cuts.append([raw_part(kind, error_body(kind, "it broke")), LAST_CHUNK])
            for cut in cuts:
                bad: list[Action] = [before[kind], *cut]
                good = answer(kind, "Hello", stream=True)
                with self.subTest(kind=kind, cut=cut), Target(bad) as first, Target(good) as second:
                    with Daemon(chain(first.url, second.url, kinds=[kind])) as daemon, daemon.client() as client:
                        response = ask(client, stream=True)
                    chunks = frames(response.body)
                    self.assertEqual("second", response.header("x-served-by"))
                    self.assertEqual(("Hello", "[DONE]"), (text_of(chunks), chunks[-1]))
                    self.assertEqual(1, sum("role" in each["choices"][0]["delta"] for each in chunks[:-1]))

    def test_after_content(self):
        """After content an error is one last frame without [DONE], and nobody else is asked."""
        first_content = {
            "text": {"openai": delta(content="a"), "ollama": line("a")},
            "reasoning": {"openai": delta(reasoning_content="a"), "ollama": line("", thinking="a")},
            "tool call": {
                "openai": delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]),
                "ollama": line("", tool_calls=[{"function": {"name": "f", "arguments": {}}}]),
            },
        }
        for (what, content), kind in itertools.product(first_content.items(), KINDS):
            broken = raw_part(kind, error_body(kind, "it broke"))
            ends: dict[str, list[Action]] = {
                "connection_lost": [CLOSE],
                "server_error": [broken, part(kind, "more"), ended(kind)],
            }
            for reason, end in ends.items():
                bad: list[Action] = [begun(kind) + raw_part(kind, content[kind]), *end]
                with self.subTest(what, kind=kind, reason=reason), Target(bad) as first, Target() as second:
                    with Daemon(chain(first.url, second.url, kinds=[kind])) as daemon, daemon.client() as client:
                        response = ask(client, stream=True)
                        self.assertEqual(404, ask(client, "nobody").status)  # the connection lives on
                    *chunks, error = frames(response.body)
                    self.assertTrue(response.complete)
                    self.assertEqual((200, "first"), (response.status, response.header("x-served-by")))
                    self.assertNotIn("[DONE]", chunks)
                    self.assertTrue(all("choices" in each for each in chunks))
                    self.assertEqual({"error"}, set(error))
                    self.assertEqual("stream_broken", error["error"]["code"])
                    self.assertRegex(error["error"]["message"], r"^first broke off its answer: .*(closed|it broke)")
                    self.assertNotIn("more", text_of(chunks))
                    self.assertEqual([], second.asked)

    def test_what_is_no_first_token(self):
        """A server that sends its head, its role and comments, and then nothing, has still not begun to answer."""
        before = {"openai": begun("openai", "") + chunk(b":\n\n"), "ollama": begun("ollama", "", "")}
        for kind in KINDS:
            bad: list[Action] = [before[kind], HANG]
            good = answer(kind, "Hello", stream=True)
            with self.subTest(kind=kind), Target(bad) as first, Target(good) as second:
                toml = chain(first.url, second.url, kinds=[kind], timeouts="first_token = 0.1, idle = 60")
                with client_of(toml) as client:
                    attempts = ask(client, stream=True).header("x-portway-attempts") or ""
                self.assertRegex(attempts, r"^first=first_token_timeout\(0\.\ds\); second=ok$")

    def test_content_and_error_in_one_read(self):
        """How the bytes are cut does not decide: content that came together with an error has come."""
        for kind in KINDS:
            reply = begun(kind, "one") + raw_part(kind, error_body(kind, "it broke")) + LAST_CHUNK
            ways: tuple[Reply, ...] = (reply, [Bytewise(reply)])
            for bad in ways:
                with self.subTest(kind=kind, bad=bad), Target(bad) as first, Target() as second:
                    with Daemon(chain(first.url, second.url, kinds=[kind])) as daemon, daemon.client() as client:
                        chunks = frames(ask(client, stream=True).body)
                    self.assertEqual(("one", "stream_broken"), (text_of(chunks), chunks[-1]["error"]["code"]))
                    self.assertEqual([], second.asked)

    def test_silence_after_content(self):
        """A stream that stops ends with idle_timeout, and that counts against its target."""
        for kind in KINDS:
            good = answer(kind, "Hello", stream=True)
            with self.subTest(kind=kind), Target(then=[begun(kind, "one"), HANG]) as first, Target(good) as second:
                toml = chain(first.url, second.url, kinds=[kind], timeouts="idle = 0.05", rest=EAGER)
                with Daemon(toml) as daemon, daemon.client() as client:
                    chunks = frames(ask(client, stream=True).body)
                    after = ask(client, stream=True)
                self.assertEqual(("one", "idle_timeout"), (text_of(chunks), chunks[-1]["error"]["code"]))
                self.assertRegex(after.header("x-portway-attempts") or "", r"^first=cooling\(.*second=ok$")

    def test_a_plain_answer_falls_back_late(self):
        """Of a plain answer the client has seen nothing, so that it can fall back at the last byte."""
        half = json_reply({"choices": [{"message": {"content": "one"}, "finish_reason": "stop"}]})[:-1]
        bad: dict[str, list[Action]] = {"openai": [half, CLOSE], "ollama": [begun("ollama", "one", "two"), RESET]}
        for kind in KINDS:
            with self.subTest(kind=kind), Target(bad[kind]) as first, Target(answer(kind, "Hello")) as second:
                with Daemon(chain(first.url, second.url, kinds=[kind])) as daemon, daemon.client() as client:
                    response = ask(client)
                self.assertEqual("Hello", response.json["choices"][0]["message"]["content"])
                self.assertRegex(response.header("x-portway-attempts") or "", r"^first=connection_lost\(.*second=ok$")


class BudgetTest(unittest.TestCase):
    """One deadline for all attempts, shared out among them."""

    def test_a_hanging_first_leaves_time_for_the_rest(self):
        """Though each may wait a minute for its first token, the first of three gets a third of the whole."""
        for kind, stream in itertools.product(KINDS, (False, True)):
            good = answer(kind, "Hello", stream=stream)
            with self.subTest(kind=kind, stream=stream), Target([HANG]) as first, Target([HANG]) as second:
                with Target(good) as third:
                    toml = chain(
                        first.url, second.url, third.url, kinds=[kind], timeouts="first_token = 60, total = 1.5"
                    )
                    with Daemon(toml) as daemon, daemon.client() as client:
                        response = ask(client, stream=stream)
                reason = "answer_timeout" if kind == "openai" and not stream else "first_token_timeout"
                self.assertEqual("third", response.header("x-served-by"))
                self.assertRegex(
                    response.header("x-portway-attempts") or "", rf"^first={reason}\(0.*second={reason}\(0.*third=ok$"
                )

    def test_the_deadline_ends_a_stream(self):
        """A stream that never pauses ends with the whole request's deadline."""
        for kind in KINDS:
            with self.subTest(kind=kind), Target([begun(kind, "a"), HANG]) as first:
                toml = chain(first.url, kinds=[kind], timeouts="total = 0.2")
                with Daemon(toml) as daemon, daemon.client() as client:
                    chunks = frames(ask(client, stream=True).body)
                self.assertEqual("total_timeout", chunks[-1]["error"]["code"])

    def test_nobody_is_asked_after_the_deadline(self):
        """When the last share is used up nobody else is tried, and the client gets what decided."""
        toml = chain("URL1", "URL2", timeouts="first_token = 60, total = 0.2")
        with Target([HANG]) as first, Target([HANG]) as second:
            toml = toml.replace("URL1", first.url).replace("URL2", second.url)
            with Daemon(toml) as daemon, daemon.client() as client:
                response = ask(client, stream=True)
        self.assertEqual((504, "first_token_timeout"), (response.status, response.json["error"]["code"]))
        self.assertIn("raise models.first.timeouts.first_token", response.json["error"]["message"])

    def test_connecting(self):
        """A server that takes no connection is left after `connect`, or after its share of the time."""
        with full_listener() as port, Target(then=answer("openai", "Hello")) as second:
            for timeouts in ("connect = 0.05", "connect = 60, total = 0.4"):
                with self.subTest(timeouts):
                    toml = chain(f"http://127.0.0.1:{port}", second.url, timeouts=timeouts)
                    with Daemon(toml) as daemon, daemon.client() as client:
                        attempts = ask(client).header("x-portway-attempts") or ""
                    self.assertRegex(attempts, r"^first=connect_timeout\(.*second=ok$")


class LoadingTest(unittest.TestCase):
    """503 "Loading model" is no failure as long as the load may take."""

    LOADING = json_reply(error_body("openai", "Loading model", "unavailable_error", 503), 503, keep_alive=False)

    def test_waited_for(self):
        """The model is there after a while: the same target answers, and there is only one attempt."""
        for stream in (False, True):
            with self.subTest(stream=stream), Target(self.LOADING, answer("openai", "Hello", stream=stream)) as first:
                with Daemon(chain(first.url)) as daemon, daemon.client() as client:
                    response = ask(client, stream=stream)
                self.assertEqual((200, None), (response.status, response.header("x-portway-attempts")))
                self.assertEqual(2, len(first.asked))
                self.assertEqual(first.asked[0].body, first.asked[1].body)

    def test_too_long(self):
        """After timeouts.load it falls back without a cooldown; alone it is 503 with Retry-After."""
        good = answer("openai", "Hello")
        with Target(then=self.LOADING) as first, Target(then=good) as second:
            limits = "load = 0.01"
            with Daemon(chain(first.url, second.url, timeouts=limits, rest=EAGER)) as daemon, daemon.client() as client:
                for _ in range(2):
                    attempts = ask(client).header("x-portway-attempts") or ""
                    self.assertRegex(attempts, r"^first=loading_timeout\(\d\.\ds\); second=ok$")
            with Daemon(chain(first.url, timeouts=limits)) as daemon, daemon.client() as client:
                response = ask(client)
        self.assertEqual((503, "loading_timeout"), (response.status, response.json["error"]["code"]))
        self.assertEqual("10", response.header("retry-after"))
        self.assertIn("raise models.first.timeouts.load", response.json["error"]["message"])


class CooldownTest(unittest.TestCase):
    """Counted by the requests that a target gets."""

    def test_after_so_many_failures(self):
        """Three failures in a row are needed by default; a success between them starts anew."""
        bad, good = json_reply(error_body("openai", "it broke"), 500), answer("openai", "Hello")
        first, second = Target(bad, bad, good, bad, bad, bad, then=good), Target(then=good)
        with first, second, client_of(chain(first.url, second.url)) as client:
            served = [ask(client).header("x-served-by") for _ in range(8)]
        self.assertEqual(["second", "second", "first", *["second"] * 5], served)
        self.assertEqual(6, len(first.asked))

    def test_when_all_are_cooling(self):
        """The least recently failed one is tried anyway; its success makes it the one to ask again."""
        bad, good = json_reply(error_body("openai", "it broke"), 500), answer("openai", "Hello")
        with Target(bad, then=good) as first, Target(bad) as second:
            with Daemon(chain(first.url, second.url, rest=EAGER)) as daemon, daemon.client() as client:
                self.assertEqual(502, ask(client).status)
                last_resort = ask(client)
                after = ask(client)
            self.assertEqual((2 + 1, 1), (len(first.asked), len(second.asked)))
        self.assertRegex(
            last_resort.header("x-portway-attempts") or "",
            r"^first=cooling\(\d+s left, 0\.0s\); second=cooling\(\d+s left, 0\.0s\); first=ok$",
        )
        self.assertIsNone(after.header("x-portway-attempts"))

    def test_probe(self):
        """After its time one request probes it and others pass it over; its client's leaving frees the place."""
        bad, good = json_reply(error_body("openai", "it broke"), 500), answer("openai", "Hello")
        rest = "[cooldown]\nfailures = 1\nseconds = 0.01\nlongest = 0.01\n"
        first, second = Target(bad, [HANG], then=good), Target(then=good)
        with first, second, Daemon(chain(first.url, second.url, rest=rest)) as daemon, daemon.client() as client:
            self.assertEqual("second", ask(client).header("x-served-by"))
            with daemon.client() as prober:
                wait_for(lambda: self.probes(prober, first), "the probe")
                passed = ask(client)
                self.assertEqual("first=cooling(being probed, 0.0s); second=ok", passed.header("x-portway-attempts"))
            first.wait_closed(first.asked[1].connection)
            wait_for(lambda: ask(client).header("x-served-by") == "first", "another probe")
        self.assertEqual(3, len(first.asked))

    def probes(self, prober: RawClient, first: Target) -> bool:
        """Ask until the request is the one that probes, which hangs."""
        prober.request("POST", CHAT, {"model": "first", "messages": MESSAGES})
        wait_for(lambda: len(first.asked) > 1 or readable(prober), "the request's way")
        return len(first.asked) > 1 or prober.response().status != 200

    def test_kept_over_a_reload(self):
        """A reload forgets no failure, but a target whose backend was corrected starts anew."""
        bad, good = json_reply(error_body("openai", "it broke"), 500), answer("openai", "Hello")
        with Target(bad) as first, Target(then=good) as second, Target(then=good) as moved:
            toml = chain(first.url, second.url, rest=EAGER)
            with Daemon(toml) as daemon, daemon.client() as client:
                ask(client)
                daemon.use(toml + "# changed\n")
                self.assertRegex(ask(client).header("x-portway-attempts") or "", "^first=cooling")
                daemon.use(toml.replace(first.url, moved.url))
                self.assertEqual("first", ask(client).header("x-served-by"))

    def test_health_tells(self):
        """GET /health lists what is skipped."""
        bad = json_reply(error_body("openai", "it broke"), 500)
        with Target(bad) as first, Daemon(chain(first.url, rest=EAGER)) as daemon, daemon.client() as client:
            ask(client)
            (cooling,) = client.call("GET", "/health").json["cooling"]
        self.assertEqual(("first", "physical-first"), (cooling["backend"], cooling["model"]))


class WhoMayServeTest(unittest.TestCase):
    """What the client, the configuration and the request itself allow."""

    BAD = json_reply(error_body("openai", "it broke"), 500)

    def attempts(self, toml: str, **kwargs: Any) -> tuple[RawResponse, str]:
        with Daemon(toml) as daemon, daemon.client() as client:
            response = ask(client, **kwargs)
        return response, response.header("x-portway-attempts") or ""

    def test_no_fallback(self):
        """X-Portway-Fallback: off and strict = true are an honest failure; another value is a 400."""
        with Target(then=self.BAD) as first, Target() as second:
            toml = chain(first.url, second.url)
            for name, response in {
                "header": self.attempts(toml, headers={"X-Portway-Fallback": "off"})[0],
                "strict": self.attempts(chain(first.url, second.url, models={"first": "strict = true"}))[0],
            }.items():
                with self.subTest(name):
                    self.assertEqual((502, "server_error"), (response.status, response.json["error"]["code"]))
                    self.assertRegex(
                        response.header("x-portway-attempts") or "", r"^first=server_error\(500, 0\.\ds\)$"
                    )
            self.assertEqual([], second.asked)
            self.assertEqual(400, self.attempts(toml, headers={"X-Portway-Fallback": "perhaps"})[0].status)

    def test_embeddings_never_fall_back(self):
        """Vectors of another model would poison an index."""
        for kind in KINDS:
            with self.subTest(kind=kind), Target(then=self.BAD) as first, Target() as second:
                toml = chain(first.url, second.url, kinds=[kind])
                response, _ = self.attempts(toml, path="/v1/embeddings", input="text")
                self.assertEqual(502, response.status)
                self.assertEqual([], second.asked)

    def test_capabilities(self):
        """A target without vision, tools or insertion is passed over where they are needed, and only there."""
        image = [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}
        ]
        tools = [{"type": "function", "function": {"name": "f"}}]
        needs: dict[str, dict[str, Any]] = {
            "vision": {"messages": image},
            "tools": {"tools": tools},
            "insert": {"path": "/v1/completions", "prompt": "a", "suffix": "b"},
        }
        text = json_reply({"choices": [{"text": "Hello", "message": {"content": "Hello"}, "finish_reason": "stop"}]})
        with Target() as first, Target(then=text) as second:
            toml = chain(first.url, second.url, models={"first": 'capabilities = ["completion"]'})
            for missing, fields in needs.items():
                with self.subTest(missing):
                    response, attempts = self.attempts(toml, **fields)
                    self.assertEqual(200, response.status)
                    self.assertEqual(f"first=unsupported(no {missing}, 0.0s); second=ok", attempts)
            self.assertEqual([], first.asked)
            alone, _ = self.attempts(toml, tools=tools, headers={"X-Portway-Fallback": "off"})
            self.assertEqual((400, "unsupported"), (alone.status, alone.json["error"]["code"]))
            self.assertEqual(
                "first could not answer: skipped, as it can't do this: tools. "
                "Way out: ask a model that can, or correct models.first.capabilities.",
                alone.json["error"]["message"],
            )
            first.add_answer(text)
            self.assertEqual("first", self.attempts(toml, tools=tools, tool_choice="none")[0].header("x-served-by"))

    def test_a_prompt_that_cannot_fit(self):
        """A window too small for any tokenizer is passed over without asking; alone it is 400."""
        long = [{"role": "user", "content": "x" * 9000}]
        with Target(then=answer("openai", "Hello")) as first, Target(then=answer("openai", "Hello")) as second:
            toml = chain(first.url, second.url, models={"first": "num_ctx = 1024", "second": "num_ctx = 2048"})
            _, attempts = self.attempts(toml, messages=long)
            self.assertEqual("first=context_length_exceeded(num_ctx 1024, 0.0s); second=ok", attempts)
            alone, _ = self.attempts(toml, messages=long, headers={"X-Portway-Fallback": "off"})
            self.assertEqual((400, "context_length_exceeded"), (alone.status, alone.json["error"]["code"]))
            fits = self.attempts(toml, messages=[{"role": "user", "content": "x" * 8000}])[0]
            self.assertEqual("first", fits.header("x-served-by"))

    def test_a_skipped_target_does_not_decide(self):
        """The first is too small and was not asked, the second is down: that is 502, not 400."""
        with Target() as first, Target([RESET]) as second:
            toml = chain(first.url, second.url, models={"first": "num_ctx = 1"})
            response, _ = self.attempts(toml)
        self.assertEqual((502, "connection_lost"), (response.status, response.json["error"]["code"]))

    def test_overflow_goes_to_a_larger_window_only(self):
        """Of two behind it, the one with no larger window is passed over."""
        too_long = json_reply(error_body("openai", OVERFLOW, "exceed_context_size_error", 400), 400)
        for windows, expected in {
            (2048, 2048, 4096): r"^first=context_.*; second=context_length_exceeded\(num_ctx 2048, 0\.0s\); third=ok$",
            (2048, 2049, 4096): r"^first=context_[^;]*; second=ok$",
            (2048, None, 4096): r"^first=context_[^;]*; second=ok$",
        }.items():
            sizes = {name: f"num_ctx = {size}" for name, size in zip(NAMES, windows, strict=True) if size}
            good = answer("openai", "Hello")
            with (
                self.subTest(windows=windows),
                Target(too_long) as first,
                Target(good) as second,
                Target(good) as third,
            ):
                _, attempts = self.attempts(chain(first.url, second.url, third.url, models=sizes))
                self.assertRegex(attempts, expected)

    def test_refused_credentials_go_to_another_backend_only(self):
        """What the backend's key does not open, it does not open for another model either."""
        refused, good = json_reply(error_body("openai", "Invalid API Key"), 401), answer("openai", "Hello")
        with Target(refused) as first, Target(good) as third:
            toml = chain(first.url, first.url, third.url).replace('backend = "second"', 'backend = "first"')
            _, attempts = self.attempts(toml)
            self.assertEqual(1, len(first.asked))
        self.assertRegex(
            attempts, r"^first=backend_auth\(401, .*; second=backend_auth\(same backend, 0\.0s\); third=ok$"
        )

    def test_never_sent_twice(self):
        """No target is asked a second time by one request."""
        with Target(then=[RESET]) as first, Target(then=[CLOSE]) as second:
            self.attempts(chain(first.url, second.url))
            self.assertEqual((1, 1), (len(first.asked), len(second.asked)))


def joined(reply: Reply) -> bytes:
    """The bytes of a reply."""
    return reply if isinstance(reply, bytes) else b"".join(action for action in reply if isinstance(action, bytes))


def reason_of(row: Row, kind: str, stream: bool) -> str:
    """A plain answer of an openai backend shows no first token, so it is the answer that is missing."""
    if row.reason == "first_token_timeout" and kind == "openai" and not stream:
        return "answer_timeout"
    return row.reason


def unused_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def readable(client: RawClient) -> bool:
    return bool(select.select([client.sock], [], [], 0)[0])
