"""Streams through the whole daemon: their bytes, heartbeats, and clients that leave in each phase."""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from portway.telemetry import Log
from tests.daemon import Daemon
from tests.doubles import (
    CLOSE,
    HANG,
    LAST_CHUNK,
    Action,
    RawClient,
    SseEvent,
    chunk,
    http_reply,
    json_reply,
    sse_reply,
    stream_head,
)
from tests.llama_server import wait_for
from tests.targets import (
    CHAT,
    KINDS,
    MESSAGES,
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
    next_json,
    part,
    raw_part,
    text_of,
    usage,
)

STREAM = {"model": "first", "messages": MESSAGES, "stream": True}
LOADING = json_reply(error_body("openai", "Loading model", "unavailable_error", 503), 503, keep_alive=False)
PROMPTLY = 2.0  # seconds in which a leaving client must have closed the upstream; a millisecond is usual


class BytesTest(unittest.TestCase):
    def test_exactly(self):
        """The stream as it is sent, byte for byte: one id, one time, the logical name, the server's own bytes."""
        first_content, second_content = delta(content="one"), delta(content=" two")
        reply = sse_reply([delta(role="assistant", content=None), first_content, second_content, finish(), usage()])
        with Target(reply) as first, client_of(chain(first.url)) as client:
            response = ask(client, stream=True)
        self.assertEqual("text/event-stream; charset=utf-8", response.header("content-type"))
        self.assertEqual(
            ("no-cache", "chunked"), (response.header("cache-control"), response.header("transfer-encoding"))
        )
        self.assertEqual(("first", None), (response.header("x-served-by"), response.header("x-portway-attempts")))
        tight = [delta(role="assistant", content=None), first_content]
        frames = [b"data: " + json.dumps({**each, "model": "first"}, separators=(",", ":")).encode() for each in tight]
        relayed = b"data: " + json.dumps(second_content).encode().replace(b'"model": "up"', b'"model":"first"')
        last = b"data: " + json.dumps({**finish(), "model": "first"}, separators=(",", ":")).encode()
        self.assertEqual(b"\n\n".join([*frames, relayed, last, b"data: [DONE]", b""]), response.body)

    def test_nothing_waits(self):
        """Each piece reaches the client before the server sends the next one."""
        for kind in KINDS:
            gates = [threading.Event() for _ in range(3)]
            script: list[Action] = [begun(kind, "0")]
            for number, gate in enumerate(gates, 1):
                script += [gate, part(kind, str(number))]
            with self.subTest(kind=kind), ExitStack() as stack:
                first = stack.enter_context(Target([*script, ended(kind)]))
                client = stack.enter_context(client_of(chain(first.url, kinds=[kind])))
                client.request("POST", CHAT, STREAM)
                events = client.events(client.head())
                for number in range(4):
                    self.assertEqual(str(number), next_text(events))
                    if number < 3:
                        gates[number].set()
                *_, last = events
                self.assertEqual("[DONE]", last.data)

    def test_usage_exactly_when_asked(self):
        """The usage chunk is shown to whoever asked for it, whatever the server does by itself."""
        legacy = [
            {"id": "c", "created": 1, "model": "up", "choices": [{"text": text, "index": 0, "finish_reason": reason}]}
            for text, reason in (("a", None), ("b", None), ("", "stop"))
        ]
        legacy[-1]["usage"] = usage()["usage"]
        replies: dict[str, tuple[str, bytes]] = {
            "chat": (CHAT, sse_reply([delta(content="a"), finish(), usage()])),
            "usage beside the finish": (CHAT, sse_reply([delta(content="a"), {**finish(), "usage": usage()["usage"]}])),
            "usage in the last text": ("/v1/completions", sse_reply(legacy)),
        }
        for name, (path, reply) in replies.items():
            for asked in (None, {"include_usage": False}, {"include_usage": True}):
                with self.subTest(name, asked=asked), Target(reply) as first, client_of(chain(first.url)) as client:
                    chunks = frames(ask(client, path=path, prompt="p", stream=True, stream_options=asked).body)
                    counts = [each["usage"] for each in chunks[:-1] if each.get("usage")]
                    self.assertEqual([usage()["usage"]] if asked and asked["include_usage"] else [], counts)
                    self.assertEqual("[DONE]", chunks[-1])
                    self.assertTrue(first.asked[0].json["stream_options"]["include_usage"])

    def test_usage_of_ollama(self):
        """Ollama always counts; who asked sees it, in a last chunk without choices."""
        for asked in (False, True):
            with self.subTest(asked=asked), Target(answer("ollama", "a")) as first:
                with client_of(chain(first.url, kinds=["ollama"])) as client:
                    body = ask(client, stream=True, stream_options={"include_usage": asked}).body
                counts = [each for each in frames(body)[:-1] if each.get("usage")]
                self.assertEqual([[]] if asked else [], [each["choices"] for each in counts])

    def test_an_empty_line_in_between(self):
        """Ollama's lines without text in the middle of an answer are nothing, least of all the end of the stream."""
        gates = [threading.Event(), threading.Event()]
        script: Reply = [
            begun("ollama", "a"),
            gates[0],
            part("ollama", ""),
            gates[1],
            part("ollama", "b"),
            ended("ollama"),
        ]
        toml = "[server]\nheartbeat = 0.02\n"
        with Target(script) as first, client_of(chain(first.url, kinds=["ollama"], rest=toml)) as client:
            client.request("POST", CHAT, STREAM)
            events = client.events(client.head())
            self.assertEqual("a", next_text(events))
            gates[0].set()
            beats = [next(events).comment for _ in range(3)]  # by then it has been read, all by itself
            gates[1].set()
            self.assertEqual("b", next_text(event for event in events if event.data))
            self.assertEqual("[DONE]", list(events)[-1].data)
        self.assertEqual(["portway"] * 3, beats)

    def test_ends_that_servers_have(self):
        """No [DONE], [DONE] without finish_reason, a last event without its blank line, no clean end: all whole."""
        head = stream_head() + raw_part("openai", delta(content="a"))
        end = raw_part("openai", finish())
        ends: dict[str, list[Action]] = {
            "no [DONE]": [head + end + LAST_CHUNK],
            "no finish": [head + chunk(b"data: [DONE]\n\n") + LAST_CHUNK],
            "no blank line": [head + end + chunk(b"data: [DONE]") + LAST_CHUNK],
            "cut off after the finish": [head + end, CLOSE],
            "more after the end": [
                head + end + chunk(b'data: [DONE]\n\ndata: {"error":{"message":"x"}}\n\n') + LAST_CHUNK
            ],
        }
        for name, script in ends.items():
            with self.subTest(name), Target(script) as first, client_of(chain(first.url)) as client:
                chunks = frames(ask(client, stream=True).body)
                self.assertEqual(("a", "[DONE]"), (text_of(chunks), chunks[-1]))
                self.assertEqual(1, chunks.count("[DONE]"))

    def test_what_is_no_stream(self):
        """JSON or HTML where a stream was asked for; an error in it is read as such."""
        cases: dict[str, tuple[bytes, int, str]] = {
            "answer": (answer("openai", "whole"), 502, "bad_answer"),
            "html": (http_reply(b"<p>hello", content_type="text/html"), 502, "bad_answer"),
            "text": (http_reply(b"hello", content_type="text/plain"), 502, "bad_answer"),
            "error": (json_reply(error_body("openai", "wrong", "invalid_request_error", 400)), 400, "bad_request"),
            "bare error": (json_reply({"object": "error", "message": "wrong", "code": 400}), 400, "bad_request"),
            "error in the stream": (sse_reply([error_body("openai", "wrong", "x", 400)]), 400, "bad_request"),
            "nothing": (stream_head() + LAST_CHUNK, 502, "empty_answer"),
            "only comments": (stream_head() + chunk(b":\n\n") + LAST_CHUNK, 502, "empty_answer"),
        }
        for name, (reply, status, code) in cases.items():
            with self.subTest(name), Target(reply) as first, client_of(chain(first.url)) as client:
                response = ask(client, stream=True)
                self.assertEqual((status, code), (response.status, response.json["error"]["code"]))

    def test_prompt_truncated(self):
        """An Ollama that chops in spite of truncate: false: a header, or a field of the last chunk if it shows late."""
        toml, gate = {"first": "num_ctx = 100"}, threading.Event()
        thoughts = {"role": "assistant", "content": "a", "reasoning_content": "word " * 200}
        long, whole = [*MESSAGES, thoughts, *MESSAGES], answer("ollama", "a")
        with Target(whole, whole, whole, [begun("ollama", "a"), gate, ended("ollama")]) as first:
            with client_of(chain(first.url, kinds=["ollama"], models=toml)) as client:
                self.assertIsNone(ask(client).header("x-portway-warning"))
                self.assertEqual("prompt_truncated", ask(client, messages=long).header("x-portway-warning"))
                at_once = ask(client, messages=long, stream=True)
                self.assertEqual("prompt_truncated", at_once.header("x-portway-warning"))
                client.request("POST", CHAT, {**STREAM, "messages": long})
                head = client.head()
                events = client.events(head)
                next_json(events)
                gate.set()
                chunks = [event.json for event in events if event.data != "[DONE]"]
            self.assertIsNone(head.header("x-portway-warning"))
            self.assertEqual(["prompt_truncated"], chunks[-1]["portway"]["warnings"])


class HeartbeatTest(unittest.TestCase):
    QUICK = "[server]\nheartbeat = 0.02\n"

    def test_bytes(self):
        """A client that hears nothing gets a comment of one line, in one chunk; then the stream as ever."""
        for kind in KINDS:
            gate = threading.Event()
            with self.subTest(kind=kind), Target([gate, begun(kind, "Hello"), ended(kind)]) as first:
                with client_of(chain(first.url, kinds=[kind], rest=self.QUICK)) as client:
                    client.request("POST", CHAT, STREAM)
                    head = client.head()
                    self.assertEqual((200, None), (head.status, head.header("x-served-by")))
                    self.assertEqual(b"a\r\n: portway\n\r\n" * 2, take(client, 30))
                    gate.set()
                    chunks = [event.json for event in client.events(head) if event.data not in (None, "[DONE]")]
                self.assertEqual("first", chunks[0]["portway"]["served_by"])
                self.assertNotIn("attempts", chunks[0]["portway"])
                self.assertFalse(any("portway" in each for each in chunks[1:]))
                self.assertEqual("Hello", text_of(chunks))

    def test_then_a_fallback(self):
        """The headers are gone, so the first chunk says who serves and what was tried."""
        for kind in KINDS:
            good = answer(kind, "Hello", stream=True)
            with self.subTest(kind=kind), Target([HANG]) as first, Target(good) as second:
                toml = chain(first.url, second.url, kinds=[kind], timeouts="first_token = 0.2", rest=self.QUICK)
                with client_of(toml) as client:
                    response = ask(client, stream=True)
                seen = frames(response.body)
                beats = seen.count(b": portway\n")
                self.assertGreaterEqual(beats, 1)
                self.assertEqual([b": portway\n"] * beats, seen[:beats])
                first_chunk = seen[beats]
                self.assertEqual("second", first_chunk["portway"]["served_by"])
                attempts = r"^first=first_token_timeout\(0\.\ds\); second=ok$"
                self.assertRegex(first_chunk["portway"]["attempts"], attempts)
                self.assertEqual(("Hello", "[DONE]"), (text_of(seen), seen[-1]))

    def test_stop_at_the_timeout(self):
        """A heartbeat must not hide a death: after the timeout one error frame, and the end without [DONE]."""
        for kind in KINDS:
            with self.subTest(kind=kind), Target([HANG]) as first:
                toml = chain(first.url, kinds=[kind], timeouts="first_token = 0.1", rest=self.QUICK)
                with client_of(toml) as client:
                    response = ask(client, stream=True)
                    self.assertEqual(200, client.call("GET", "/health").status)
                *beats, error = frames(response.body)
                self.assertTrue(response.complete)
                self.assertEqual({b": portway\n"}, set(beats))
                self.assertEqual("first_token_timeout", error["error"]["code"])
                self.assertRegex(error["portway"]["attempts"], r"^first=first_token_timeout\(0\.\ds\)$")

    def test_in_a_pause(self):
        """Silence in the middle of an answer is filled too."""
        for kind in KINDS:
            gate = threading.Event()
            with self.subTest(kind=kind), Target([begun(kind, "a"), gate, ended(kind)]) as first:
                with client_of(chain(first.url, kinds=[kind], rest=self.QUICK)) as client:
                    client.request("POST", CHAT, STREAM)
                    head = client.head()
                    events = client.events(head)
                    content = json.loads(next(event.data for event in events if event.data))
                    self.assertIsNotNone(next(event for event in events if event.comment == "portway"))
                    gate.set()
                    rest = list(events)
                # a machine that is slow has filled the silence before the content, too, with the head
                self.assertEqual("first", head.header("x-served-by") or content["portway"]["served_by"])
                self.assertEqual("[DONE]", rest[-1].data)

    def test_none_for_a_plain_answer(self):
        """Of a plain answer nothing may be sent before it is there."""
        gate = threading.Event()
        first = Target([gate, answer("openai", "Hello")])
        with first, Daemon(chain(first.url, rest=self.QUICK)) as daemon, daemon.client() as client:
            client.request("POST", CHAT, {**STREAM, "stream": False})
            asked(client, first)
            wait_for(lambda: first.left == 0, "its reply's being taken")  # which is a moment after it was asked
            with daemon.client() as other:
                self.beats_elsewhere(first, other)
            gate.set()
            response = client.response()
        self.assertEqual((200, "first"), (response.status, response.header("x-served-by")))
        self.assertNotIn(b": portway", response.body)

    def beats_elsewhere(self, first: Target, other: RawClient) -> None:
        """Long enough for a heartbeat: a streaming client beside has had several."""
        gate = threading.Event()
        first.put_first([gate, answer("openai", "a", stream=True)])
        other.request("POST", CHAT, STREAM)
        other.head()
        self.assertEqual(b"a\r\n: portway\n\r\n" * 3, take(other, 45))
        gate.set()

    def test_comments_of_the_server_are_not_relayed(self):
        """A server's own pings are its own matter; they are no token either."""
        pings = chunk(b":\n\n") * 3 + chunk(b": ping\n\n")
        reply = stream_head() + pings + raw_part("openai", delta(content="a")) + pings
        with (
            Target([reply + raw_part("openai", finish()) + LAST_CHUNK]) as first,
            client_of(chain(first.url)) as client,
        ):
            response = ask(client, stream=True)
        self.assertNotIn(b":\n", response.body.replace(b'":', b""))
        self.assertEqual("a", text_of(frames(response.body)))


class LeavingTest(unittest.TestCase):
    """Whoever leaves, in whatever phase, is noticed at once: upstream is closed, and the log says when it was."""

    WAYS: tuple[Callable[[RawClient], None], ...] = (RawClient.close, RawClient.reset, RawClient.half_close)

    def run_case(
        self, kind: str, stream: bool, script: Reply, ready: Callable[[RawClient, Target], object]
    ) -> list[str]:
        """Leave in each way once `ready`; the phases as logged."""
        phases = []
        for leave in self.WAYS:
            with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
                log = Log(str(Path(folder) / "log"))
                first, second = stack.enter_context(Target(script)), stack.enter_context(Target())
                rest = "[cooldown]\nfailures = 1\n"
                daemon = stack.enter_context(Daemon(chain(first.url, second.url, kinds=[kind], rest=rest), log=log))
                client = stack.enter_context(daemon.client())
                client.request("POST", CHAT, {**STREAM, "stream": stream})
                ready(client, first)
                left = time.monotonic()
                leave(client)
                took = first.wait_closed(first.asked[0].connection) - left
                self.assertLess(took, PROMPTLY)
                wait_for(partial(_has_line, log), "the line in the log")
                self.assertEqual([], second.asked)
                with daemon.client() as other:
                    self.assertEqual([], other.call("GET", "/health").json["cooling"])
                log.close(5)
                phases.append(json.loads(Path(log.path).read_text())["cancelled_in"])
        return phases

    def test_each_phase(self):
        """Waiting for the head, for the first token, for the next one; streamed or not."""
        for kind, stream in itertools.product(KINDS, (False, True)):
            head = begun(kind) if stream or kind == "ollama" else b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"
            waiting = "waiting" if stream and kind == "openai" else "prompt"
            with self.subTest(kind=kind, stream=stream):
                phases = self.run_case(kind, stream, [HANG], asked)
                self.assertEqual([waiting] * 3, phases)
                phases = self.run_case(kind, stream, [head, HANG], asked)
                self.assertLessEqual(set(phases), {waiting, "prompt"})  # the head may still be on its way
        for kind in KINDS:
            with self.subTest(kind=kind, phase="answer"):
                self.assertEqual(["answer"] * 3, self.run_case(kind, True, [begun(kind, "a"), HANG], begun_to_read))

    def test_while_a_model_loads(self):
        """A server that says "Loading model" is not asked any more."""
        with tempfile.TemporaryDirectory() as folder, Target(then=LOADING) as first:
            log = Log(str(Path(folder) / "log"))
            with Daemon(chain(first.url), log=log) as daemon:
                with daemon.client() as client:
                    client.request("POST", CHAT, STREAM)
                    wait_for(lambda: len(first.asked) == 2, "the second question")
                wait_for(partial(_has_line, log), "the line in the log")
                asked = len(first.asked)
            log.close(5)
            self.assertEqual("loading", json.loads(Path(log.path).read_text())["cancelled_in"])
            self.assertEqual(asked, len(first.asked))

    def test_while_connecting(self):
        """A connection that is still being made is given up."""
        for kind in ("openai", "ollama"):
            with self.subTest(kind=kind), tempfile.TemporaryDirectory() as folder, full_listener() as port:
                log = Log(str(Path(folder) / "log"))
                toml = chain(f"http://127.0.0.1:{port}", kinds=[kind], timeouts="connect = 60")
                with Daemon(toml, log=log) as daemon, daemon.client() as client:
                    client.request("POST", CHAT, STREAM)
                    wait_for(partial(_is_at_work, daemon), "the request's being worked on")
                    client.close()
                    wait_for(partial(_has_line, log), "the line in the log")
                log.close(5)
                record = json.loads(Path(log.path).read_text())
                # an Ollama is first asked what it has in memory; either connection may be the one that is waited for
                self.assertIn(record["cancelled_in"], ("waiting", "prompt"))
                self.assertLess(record["latency_s"], PROMPTLY)

    def test_the_next_request_is_no_leaving(self):
        """Bytes that a client sends ahead are its next request: both are answered, in order."""
        for kind, stream in itertools.product(KINDS, (False, True)):
            gate = threading.Event()
            script: Reply = [begun(kind, "one"), gate, ended(kind)] if stream else [gate, answer(kind, "one")]
            with self.subTest(kind=kind, stream=stream), Target(script, answer(kind, "two")) as first:
                with client_of(chain(first.url, kinds=[kind])) as client:
                    client.request("POST", CHAT, {**STREAM, "stream": stream})
                    asked(client, first)
                    client.request("POST", CHAT, {**STREAM, "stream": False})
                    client.request("GET", "/v1/models/first")
                    gate.set()
                    replies = [client.response() for _ in range(3)]
                self.assertEqual([200] * 3, [each.status for each in replies])
                self.assertIn(b"one", replies[0].body)
                self.assertIn(b"two", replies[1].body)
                self.assertEqual("first", replies[2].json["id"])


class ReuseTest(unittest.TestCase):
    def test_after_each_kind_of_answer(self):
        """A plain answer and a refusal leave the upstream connection to whatever comes next."""
        for kind in KINDS:
            script = [answer(kind, "b"), json_reply({"error": {"message": "no"}}, 400), answer(kind, "a", stream=True)]
            with self.subTest(kind=kind), Target(*script) as first, client_of(chain(first.url, kinds=[kind])) as client:
                self.assertEqual(
                    [200, 400, 200], [ask(client, stream=stream).status for stream in (False, False, True)]
                )
                self.assertEqual(1, len({request.connection for request in first.asked}))

    def test_a_server_that_closes_after_each_stream(self):
        """llama-server says Keep-Alive and closes; the next request goes over a new connection, unnoticed."""
        kept = {"Keep-Alive": "timeout=5, max=100"}
        script: Reply = [sse_reply([delta(content="a"), finish()], headers=kept), CLOSE]
        with Target(then=script) as first, client_of(chain(first.url)) as client:
            for number in range(10):
                self.assertEqual("a", text_of(frames(ask(client, stream=True).body)))
                first.wait_closed(first.asked[number].connection)
            self.assertEqual(10, len(first.asked))

    def test_nothing_of_the_client_reaches_a_backend(self):
        """No Authorization, cookie or conversation id of the client's, no Origin, no Accept-Encoding."""
        headers = {
            "Authorization": "Bearer client",
            "Cookie": "a=b",
            "X-Conversation-Id": "c",
            "Accept-Encoding": "gzip, br",
            "X-Forwarded-For": "1.2.3.4",
            "OpenAI-Organization": "o",
        }
        for kind in KINDS:
            with self.subTest(kind=kind), Target(answer(kind, "a")) as first:
                with client_of(chain(first.url, kinds=[kind])) as client:
                    ask(client, headers=headers)
                (request,) = first.asked
                names = {name.lower() for name, _ in request.headers}
                self.assertEqual({"host", "user-agent", "accept-encoding", "content-type", "content-length"}, names)
                self.assertEqual("identity", request.header("accept-encoding"))

    def test_the_backends_own_key(self):
        """It is the configured key that a backend gets."""
        toml = 'api_key = "sk-backend"\n'
        with Target(answer("openai", "a")) as first:
            with client_of(chain(first.url).replace("[models", f"{toml}[models", 1)) as client:
                ask(client, headers={"Authorization": "Bearer client"})
            self.assertEqual("Bearer sk-backend", first.asked[0].header("authorization"))


def _is_at_work(daemon: Daemon) -> bool:
    with daemon.client() as other:
        return bool(other.call("GET", "/health").json["in_flight"] == 2)  # this one, and the one that is looked for


def _has_line(log: Log) -> bool:
    return log.written == 1


def asked(_client: RawClient, first: Target) -> None:
    wait_for(lambda: bool(first.asked), "the request")


def begun_to_read(client: RawClient, _first: Target) -> None:
    next_json(client.events(client.head()))


def next_text(events: Iterable[SseEvent]) -> str:
    """The next text that a stream brings; what comes before it is the role at most."""
    while not (text := text_of([next_json(events)])):
        pass
    return text


def take(client: RawClient, count: int) -> bytes:
    """Exactly so many raw bytes."""
    data = b""
    while len(data) < count:
        data += client._reader.some(count - len(data)) or b"(end)"
    return data
