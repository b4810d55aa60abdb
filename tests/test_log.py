"""The log through the daemon: one line for each request, whatever becomes of it, and no text of any."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import unittest
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from portway import proxy, telemetry
from portway.cache.store import Cache
from portway.standin.server import DEFAULT_MODELS, Fault, StandIn
from portway.telemetry import Log, Price
from tests.daemon import Daemon
from tests.doubles import LAST_CHUNK, RawClient, chunk, json_reply, sse_body, stream_head
from tests.llama_server import wait_for
from tests.targets import CHAT, Target, chain, delta, finish

SECRET = "xyzzy-plugh"  # stands in each prompt, answer and key: nowhere else may it turn up
QUESTION = [{"role": "user", "content": f"Say {SECRET}"}]
KEY = f"sk-{SECRET}"
MODELS = """
[models.nine]
backend = "box"
model = "qwen3.5:9b"
think = false
fallback = ["three"]
cache = "1h"
[models.three]
backend = "box"
model = "llama3.2:3b"
cache = "1h"
[models.coder]
backend = "box"
model = "qwen3-coder:30b"
[models.embed]
backend = "box"
model = "nomic-embed-text"
capabilities = ["embedding"]
cache = "1h"
"""
SERVER = """
[server]
api_keys = ["{key}"]
max_body = 10000
header_timeout = 0.2
body_timeout = 0.2
write_timeout = 0.5
[cooldown]
failures = 1000
[memory]
enabled = false
[backends.box]
kind = "ollama"
url = "{url}"
"""
PATIENT = SERVER.replace("header_timeout = 0.2\nbody_timeout = 0.2\n", "")  # for requests that are slow on purpose
FIELDS = {
    "ts", "id", "client", "key", "endpoint", "model", "served_by", "local", "stream", "status", "exit_code", "error",
    "cache_hit", "demoted", "attempts", "prompt_hash", "prompt_chars", "response_chars", "prompt_tokens",
    "completion_tokens", "truncated", "cancelled_in", "latency_s", "queue_s", "load_s", "ttft_s", "decode_tps",
    "overhead_ms", "saved_usd",
}  # fmt: skip
BROKEN = Fault("status", status=500, error=f"it broke at {SECRET}")


def chat(model: str = "nine", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": QUESTION, **fields}


class LogCase(unittest.TestCase):
    """A daemon with log and cache in front of a stand-in."""

    def setUp(self) -> None:
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.path = Path(folder) / "log.jsonl"
        self.said: list[str] = []
        self.backend = self.enterContext(StandIn(DEFAULT_MODELS))
        self.log = Log(str(self.path), price=Price(1.0, 2.0), say=self.said.append)
        self.addCleanup(self.log.close, 5.0)
        cache = self.enterContext(closing(Cache(os.path.join(folder, "cache.sqlite3"), say=self.said.append)))
        toml = SERVER.format(url=self.backend.url, key=KEY) + MODELS
        self.daemon = self.enterContext(Daemon(toml, log=self.log, cache=cache))
        self.client = self.enterContext(self.daemon.client())
        self.seen = 0
        self.addCleanup(self.no_text_anywhere)

    def no_text_anywhere(self) -> None:
        self.assertNotIn(SECRET, self.path.read_text() if self.path.exists() else "")
        self.assertNotIn(SECRET, "\n".join([*self.said, *self.daemon.log]))

    def ask(self, body: Any, path: str = CHAT, client: RawClient | None = None, **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        (client or self.client).request("POST", path, body, {"Authorization": f"Bearer {KEY}", **named})
        return client.response() if client else self.client.response()

    def await_hanging(self) -> None:
        """Wait until a request hangs at the backend."""
        self.assertTrue(
            self.backend.wait_for(
                lambda backend: any(each.phase == "hang" and each.ended is None for each in backend.requests)
            )
        )

    def line(self) -> dict[str, Any]:
        """The line that is new since the last call."""
        (line,) = self.lines(1)
        return line

    def lines(self, count: int) -> list[dict[str, Any]]:
        """The new lines, which are as many."""
        wait_for(lambda: self.log.written >= self.seen + count, "lines in the log")
        texts = self.path.read_text().splitlines()
        new, self.seen = texts[self.seen :], len(texts)
        self.assertEqual(count, len(new), new)
        found = [json.loads(text) for text in new]
        for line in found:
            self.assertEqual(FIELDS, line.keys())
        return found

    def assert_says(self, line: dict[str, Any], **expected: Any) -> None:
        self.assertEqual(expected, {name: line[name] for name in expected})


class Answered(LogCase):
    def test_a_plain_answer(self) -> None:
        """Every field of an ordinary line."""
        answer = self.ask(chat(), X_Portway_Client="my-script").json
        line = self.line()
        text = answer["choices"][0]["message"]["content"]
        usage = answer["usage"]
        self.assert_says(
            line,
            id=answer["id"],
            client="my-script",
            endpoint="chat",
            model="nine",
            served_by="nine",
            local=True,
            stream=False,
            status=200,
            exit_code=0,
            error=None,
            cache_hit=False,
            demoted=False,
            prompt_chars=len(QUESTION[0]["content"]),
            response_chars=len(text),
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            truncated=False,
            cancelled_in=None,
            ttft_s=None,
        )
        (attempt,) = line["attempts"]
        self.assertEqual(("nine", "ok"), (attempt["model"], attempt["reason"]))
        self.assertRegex(line["prompt_hash"], "^[0-9a-f]{16}$")
        self.assertRegex(line["ts"], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assert_plausible(line)
        self.assertAlmostEqual((usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1e6, line["saved_usd"])

    def assert_plausible(self, line: dict[str, Any]) -> None:
        self.assertGreaterEqual(line["latency_s"], 0)
        self.assertGreaterEqual(line["load_s"], 0)
        self.assertTrue(0 <= line["queue_s"] <= line["latency_s"])
        self.assertGreaterEqual(line["overhead_ms"], 0)
        self.assertLessEqual(line["overhead_ms"], 1000 * line["latency_s"])
        self.assertGreater(line["decode_tps"], 0)
        for attempt in line["attempts"]:
            self.assertLessEqual(attempt["seconds"], line["latency_s"])

    def test_a_stream(self) -> None:
        """The same, and the time until its first content."""
        self.ask(chat(stream=True))
        line = self.line()
        self.assert_says(line, stream=True, status=200, exit_code=0, cache_hit=False, served_by="nine")
        self.assertGreater(line["completion_tokens"], 10)
        self.assertGreater(line["response_chars"], 100)
        self.assertTrue(0 < line["ttft_s"] <= line["latency_s"])
        self.assert_plausible(line)

    def test_times_are_told_apart(self) -> None:
        """What the backend took is not Portway's: a slow answer has a large latency and no larger overhead."""
        self.backend.fail("/api/chat", Fault("slow_load", seconds=0.3))
        self.ask(chat(stream=True))
        line = self.line()
        self.assertTrue(0.3 <= line["load_s"] <= line["ttft_s"] <= line["latency_s"], line)
        self.assertLess(line["overhead_ms"], 1000 * line["latency_s"] - 290)

    def test_a_hit(self) -> None:
        """The sizes are those of the stored answer; it cost no time and saved what it would have cost."""
        for number, (first, second) in enumerate(((False, False), (False, True), (True, False), (True, True))):
            with self.subTest(first=first, second=second):
                for stream in (first, second):
                    self.ask(chat(stream=stream, seed=number))
                miss, hit = self.lines(2)
                self.assert_says(miss, cache_hit=False)
                self.assert_says(hit, cache_hit=True, served_by="nine", demoted=False, status=200, error=None)
                same = ("prompt_hash", "prompt_chars", "response_chars", "prompt_tokens", "completion_tokens")
                self.assertEqual([miss[name] for name in same], [hit[name] for name in same])
                self.assertEqual(miss["saved_usd"], hit["saved_usd"])
                self.assertGreater(hit["saved_usd"], 0)
                self.assertIsNone(hit["decode_tps"])
                self.assertEqual(second, hit["ttft_s"] is not None)
                self.assertGreaterEqual(hit["overhead_ms"], 0)

    def test_a_hit_of_embeddings_and_completions(self) -> None:
        """The other endpoints, likewise."""
        bodies = {"/v1/embeddings": {"model": "embed", "input": SECRET}}
        bodies["/v1/completions"] = {"model": "nine", "prompt": SECRET}
        for path, body in bodies.items():
            for _ in range(2):
                self.ask(body, path)
            miss, hit = self.lines(2)
            self.assert_says(hit, endpoint=path.removeprefix("/v1/"), cache_hit=True)
            same = ("prompt_hash", "prompt_chars", "response_chars", "prompt_tokens", "completion_tokens")
            self.assertEqual([miss[name] for name in same], [hit[name] for name in same])
            self.assertEqual(len(SECRET), hit["prompt_chars"])

    def test_bypassed(self) -> None:
        """A cache that was not asked is neither hit nor miss."""
        self.ask(chat("coder"))
        self.assert_says(self.line(), cache_hit=None, status=200)

    def test_the_prompts_hash(self) -> None:
        """The same prompt has the same hash, whatever else is asked; another one has another."""
        bodies = [chat(), chat("three", temperature=1, stream=True), chat(messages=[*QUESTION, *QUESTION])]
        for body in bodies:
            self.ask(body)
        hashes = [line["prompt_hash"] for line in self.lines(3)]
        self.assertEqual((hashes[0], 2), (hashes[1], len(set(hashes))))

    def test_demoted(self) -> None:
        """Both attempts, with what each took; and for those who share the answer."""
        self.backend.fail("/api/chat", BROKEN)
        self.backend.fail("/api/chat", "hang")
        with self.daemon.client() as first, self.daemon.client() as second:
            for number, client in enumerate((first, second)):
                client.request("POST", CHAT, chat(), {"Authorization": f"Bearer {KEY}"})
                self.await_hanging()
                wait_for(lambda: self.daemon.sharing == number, "its place")  # noqa: B023
            self.backend.release()
            for client in (first, second):
                self.assertEqual(200, client.response().status)
        lines = sorted(self.lines(2), key=lambda line: bool(line["cache_hit"]))
        for line in lines:
            self.assert_says(line, model="nine", served_by="three", demoted=True, status=200, exit_code=0)
            steps = [(attempt["model"], attempt["reason"]) for attempt in line["attempts"]]
            self.assertEqual([("nine", "server_error"), ("three", "ok")], steps)
        self.assertEqual([False, True], [line["cache_hit"] for line in lines])

    def test_several_models(self) -> None:
        """A council or a cascade is local, and saves something, if all who had a part in it are."""
        panels = ['[models.both]\nkind = "council"\nmembers = ["coder", "far"]\nchairman = "coder"\n']
        panels += ['[models.two]\nkind = "council"\nmembers = ["coder", "coder"]\nchairman = "coder"\n']
        panels += ['[models.outer]\nkind = "council"\nmembers = ["coder", "both"]\nchairman = "coder"\n']
        panels += ['[models.told]\nkind = "council"\nmembers = ["coder", "coder"]\nchairman = "far"\n']
        panels += ['[models.up]\nkind = "cascade"\nmembers = ["coder", "far"]\n']
        far = self.backend.url.replace("127.0.0.1", "localhost")
        panels += [f'[backends.cloud]\nkind = "ollama"\nurl = "{far}"\n']
        panels += ['[models.far]\nbackend = "cloud"\nmodel = "gemma3:1b"\n']
        self.daemon.use(SERVER.format(url=self.backend.url, key=KEY) + MODELS + "".join(panels))
        self.enterContext(mock.patch.object(telemetry, "is_local", lambda host: host != "localhost"))
        rows = (("coder", True), ("far", False), ("both", False), ("two", True), ("outer", False), ("told", False))
        for stream in (False, True):
            for name, local in (*rows, ("up", True)):
                with self.subTest(name, stream=stream):
                    self.ask(chat(name, stream=stream))
                    line = self.line()
                    self.assert_says(line, status=200, local=local)
                    self.assertEqual(local, line["saved_usd"] > 0)
        self.backend.fail("qwen3-coder:30b", BROKEN)
        self.ask(chat("up"))
        self.assert_says(self.line(), status=200, local=False, saved_usd=0)

    def test_questions_about_models(self) -> None:
        """They have their line, too; GET /health and GET /metrics, asked again and again, have none."""
        for path in ("/v1/models", "/v1/models/nine", "/health", "/metrics", "/v1/models/none"):
            self.client.call("GET", path, headers={"Authorization": f"Bearer {KEY}"})
        lines = self.lines(3)
        self.assertEqual([200, 200, 404], [line["status"] for line in lines])
        self.assertEqual([None] * 3, [line["model"] for line in lines])


class Refused(LogCase):
    def test_each_refusal(self) -> None:
        """Whatever was wrong: status, code, class of the status."""
        good, bad = {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {SECRET}"}
        rows: list[tuple[str, str, Any, dict[str, str], int, str | None]] = [
            ("POST", CHAT, b"{" + SECRET.encode(), good, 400, "invalid_request_error"),
            ("POST", CHAT, {"model": "nine"}, good, 400, "invalid_request_error"),
            ("POST", CHAT, chat(SECRET), good, 404, "model_not_found"),
            ("POST", CHAT, chat(), bad, 401, "invalid_api_key"),
            ("POST", CHAT, chat(), {**good, "Host": "evil.example"}, 403, "host_not_allowed"),
            ("POST", CHAT, chat(), {**good, "Origin": "http://evil.example"}, 403, "origin_not_allowed"),
            ("GET", "/v1/nothing", None, good, 404, "not_found"),
            ("GET", CHAT, None, good, 405, "method_not_allowed"),
            ("POST", CHAT, chat(messages=[{"role": "user", "content": "x" * 20_000}]), good, 413, "body_too_large"),
            ("POST", CHAT, chat("coder"), {**good, "Cache-Control": "only-if-cached"}, 504, "not_cached"),
            ("POST", CHAT, chat(), {**good, "X-Portway-Fallback": "maybe"}, 400, "invalid_request_error"),
        ]
        for method, path, body, headers, status, error in rows:
            with self.subTest(error=error, status=status), self.daemon.client() as client:
                self.assertEqual(status, client.call(method, path, body, headers).status)
                line = self.line()
                self.assert_says(line, status=status, exit_code=status // 100, error=error, served_by=None)
                self.assert_says(line, cancelled_in=None, cache_hit=None, demoted=False, attempts=[])

    def test_the_backends_refusal(self) -> None:
        """A whole chain that failed: every attempt, and nothing of the backend's words."""
        self.backend.fail("/api/chat", BROKEN, 2)
        self.ask(chat())
        line = self.line()
        self.assert_says(line, status=502, exit_code=5, error="server_error", served_by=None, demoted=False)
        steps = [(attempt["model"], attempt["reason"]) for attempt in line["attempts"]]
        self.assertEqual([("nine", "server_error"), ("three", "server_error")], steps)
        self.assert_says(line, saved_usd=None, completion_tokens=None, response_chars=0)

    def test_a_broken_stream(self) -> None:
        """It has sent its 200; the error stands beside it, with what had come until then."""
        self.backend.fail("/api/chat", Fault("cut", after=3))
        self.ask(chat(stream=True))
        line = self.line()
        self.assert_says(line, status=200, exit_code=5, error="stream_broken", served_by="nine", cancelled_in=None)
        self.assertGreater(line["response_chars"], 0)
        self.assertGreater(line["ttft_s"], 0)

    def test_a_request_that_does_not_come_in(self) -> None:
        """Too slow in its head or its body: 408 with what is known of it, and how long it was waited for."""
        half = f"POST {CHAT} HTTP/1.1\r\nHost: "
        whole = f"{half}127.0.0.1\r\nUser-Agent: slow/1\r\nContent-Length: 99\r\n\r\n{{"
        rows = [(half, None, None, 4), (whole, "slow/1", CHAT, 4)]
        rows.append((whole.replace("slow/1", "x\r\nX-Portway-Client: ask"), "ask", CHAT, 1))
        rows.append(
            (whole.replace("127.0.0.1", "evil.example"), "slow/1", CHAT, 4)
        )  # its body is waited for all the same
        for text, client, endpoint, code in rows:
            with self.subTest(text), self.daemon.client() as slow:
                slow.send(text.encode())
                self.assertEqual(408, slow.response().status)
                line = self.line()
                self.assert_says(line, client=client, endpoint=endpoint, status=408, error="request_timeout")
                self.assert_says(line, exit_code=code, model=None, cancelled_in=None, overhead_ms=None)
                self.assertGreaterEqual(line["latency_s"], 0.2)

    def test_the_time_of_a_request_begins_with_its_first_byte(self) -> None:
        """However little was left of the connection's idle time then."""
        server = SERVER.replace("header_timeout = 0.2", "header_timeout = 0.4\nidle_timeout = 0.3")
        self.daemon.use(server.format(key=KEY, url=self.backend.url) + MODELS)
        for ask_first in (False, True):
            with self.subTest(ask_first=ask_first), self.daemon.client() as slow:
                if ask_first:
                    self.assertEqual(200, slow.call("GET", "/health").status)
                slow.send(b"GET /v1/mod")
                began = time.monotonic()
                self.assertEqual(408, slow.response().status)
                self.assertGreaterEqual(time.monotonic() - began, 0.4)
                self.assertLessEqual(self.line()["latency_s"], time.monotonic() - began + 0.1)

    def test_what_is_no_http(self) -> None:
        """Refused with a line, though nothing is known of it; so is a body that is not what its head says."""
        with self.daemon.client() as client:
            client.send(b"hello, is this " + SECRET.encode() + b"?\r\n\r\n")
            self.assertEqual(400, client.response().status)
        self.assert_says(self.line(), status=400, error="bad_http", exit_code=4, endpoint=None, client=None)
        with self.daemon.client() as client:
            client.send(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n".encode())
            self.assertEqual(400, client.response().status)
        self.assert_says(self.line(), status=400, error="bad_http", endpoint=CHAT)

    def test_a_connection_without_a_request(self) -> None:
        """Nothing was asked, so there is nothing to write down."""
        with self.daemon.client() as client:
            wait_for(lambda: bool(self.daemon.idle), "the connection")
            client.send(b"\r\n")
        self.ask(chat())
        self.assert_says(self.line(), status=200)


class Cancelled(LogCase):
    def cancel(self, body: Any, fault: str) -> dict[str, Any]:
        """The line of a request whose client leaves while the backend hangs."""
        self.backend.fail("/api/chat", fault)
        with self.daemon.client() as client:
            client.request("POST", CHAT, body, {"Authorization": f"Bearer {KEY}"})
            self.await_hanging()
            if fault == "hang_mid_stream" and body.get("stream"):
                next(event for event in client.events(client.head()) if event.data)
        return self.line()

    def test_before_the_answer(self) -> None:
        """The client left while the prompt was read (or, with Ollama, the model loaded)."""
        for stream in (False, True):
            line = self.cancel(chat(stream=stream), "hang")
            self.assert_says(line, cancelled_in="prompt", status=499, exit_code=4, error=None, served_by=None)
            self.assertTrue(self.backend.wait_for(lambda backend: any(each.left for each in backend.requests)))

    def test_while_it_sent_its_request(self) -> None:
        """In the middle of its head or its body, whether the daemon was reading or had parked it."""
        self.daemon.use(PATIENT.format(url=self.backend.url, key=KEY) + MODELS)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        rows = [(head, None), (f"{head}Content-Length: 99\r\n\r\n{{", CHAT)]
        rows += [(f"{text.replace('99', '98')}", endpoint) for text, endpoint in rows]
        for number, (text, endpoint) in enumerate(rows):
            with self.subTest(text):
                with self.daemon.client() as client:
                    client.send(text.encode())
                    if number > 1:
                        wait_for(lambda: any(each.began for each in self.daemon.idle), "its parking")
                line = self.line()
                self.assert_says(line, cancelled_in="request", status=499, exit_code=4, error=None, endpoint=endpoint)

    def test_in_the_middle_of_it(self) -> None:
        """A stream keeps the status that it has sent; a plain answer has sent none."""
        self.assert_says(self.cancel(chat(stream=True), "hang_mid_stream"), cancelled_in="answer", status=200)
        plain = self.cancel(chat("three"), "hang_mid_stream")
        self.assert_says(plain, status=499, exit_code=4)
        self.assertIn(plain["cancelled_in"], ("prompt", "answer"))  # whether any of it had come in is not to be seen

    def test_while_another_is_waited_for(self) -> None:
        """A request that waited for an identical one, and one that others go on waiting for."""
        self.backend.fail("/api/chat", "hang")
        clients = []
        for number in range(3):
            client = self.enterContext(self.daemon.client())
            client.request("POST", CHAT, chat(), {"Authorization": f"Bearer {KEY}"})
            self.await_hanging()
            wait_for(lambda: self.daemon.sharing == number, "its place")  # noqa: B023
            clients.append(client)
        clients[1].close()
        self.assert_says(self.line(), cancelled_in="waiting", status=499, exit_code=4, cache_hit=None)
        clients[0].close()
        self.backend.release()
        self.assertEqual(200, clients[2].response().status)
        lines = {line["status"]: line for line in self.lines(2)}
        self.assert_says(lines[499], cancelled_in="prompt", exit_code=4, cache_hit=False, served_by="nine")
        self.assert_says(lines[200], cancelled_in=None, cache_hit=True)

    def test_a_client_that_does_not_read(self) -> None:
        """It is there, but its connection is full."""
        events = sse_body([delta(content="x" * 1_000_000) for _ in range(9)] + [finish()])
        reply = [stream_head(), *map(chunk, events), LAST_CHUNK]
        with Target(reply) as target:
            self.daemon.use(chain(target.url, rest=f'[server]\napi_keys = ["{KEY}"]\n'))
            self.client.request("POST", CHAT, chat("first", stream=True), {"Authorization": f"Bearer {KEY}"})
            self.assert_says(self.line(), cancelled_in="stalled", status=200, exit_code=4)


class Ended(LogCase):
    """What Portway itself ends."""

    def test_half_a_request_when_the_daemon_stops(self) -> None:
        """It is told, and written down."""
        with self.daemon.client() as client:
            self.daemon.use(PATIENT.format(url=self.backend.url, key=KEY) + MODELS)
            client.send(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{{".encode())
            wait_for(lambda: any(each.began for each in self.daemon.idle), "its parking")
            self.daemon.stop()
            answer = client.response()
            self.assertEqual((503, "stopping"), (answer.status, answer.json["error"]["code"]))
        self.assert_says(self.line(), status=503, error="stopping", exit_code=5, endpoint=CHAT)

    def test_half_a_request_that_makes_room(self) -> None:
        """When there are more connections than there may be."""
        server = PATIENT.format(url=self.backend.url, key=KEY).replace("[server]", "[server]\nmax_connections = 3")
        with Daemon(server + MODELS, log=self.log) as daemon, daemon.client() as client, ExitStack() as others:
            self.enterContext(mock.patch.object(proxy, "FRESH", 0.0))
            for slow in (client, *(others.enter_context(daemon.client()) for _ in range(2))):
                begun = len([each for each in daemon.idle if each.began])
                slow.send(b"POST ")
                wait_for(partial(self.has_more_than, daemon, begun), "its coming")
            self.assertEqual(200, others.enter_context(daemon.client()).call("GET", "/health").status)
            self.assertEqual(408, client.response().status)
        self.assert_says(self.lines(3)[0], status=408, error="request_timeout", exit_code=4)

    @staticmethod
    def has_more_than(daemon: Daemon, count: int) -> bool:
        return len([each for each in daemon.idle if each.began]) > count


class AsksExitCodes(LogCase):
    """The lines of `ask` have the exit codes that ask itself ends with."""

    def code(self, body: Any, **headers: str) -> int:
        with self.daemon.client() as client:
            self.ask(body, client=client, X_Portway_Client="ask", **headers)
        line = self.line()
        self.assertEqual("ask", line["client"])
        return int(line["exit_code"])

    def test_each(self) -> None:
        """Answered, failed, no such model, refused under --strict."""
        self.assertEqual(0, self.code(chat()))
        self.assertEqual(2, self.code(chat("flag:nothing")))
        self.backend.fail("/api/chat", BROKEN, 2)
        self.assertEqual(1, self.code(chat(seed=1)))
        for stream in (False, True):
            self.backend.fail("/api/chat", BROKEN)
            self.assertEqual(4, self.code(chat(seed=2, stream=stream), X_Portway_Fallback="off"))
        self.assertEqual(1, self.code({"model": "nine"}))

    def test_refused_after_a_heartbeat(self) -> None:
        """Under --strict it is 4 also if the stream's head was already sent to keep the client waiting."""
        gate = threading.Event()
        with Target([gate, json_reply({"error": {"message": "no"}}, 500)]) as target:
            server = f'[server]\napi_keys = ["{KEY}"]\nheartbeat = 0.02\n'
            self.daemon.use(chain(target.url, rest=server))
            headers = {"Authorization": f"Bearer {KEY}", "X-Portway-Client": "ask", "X-Portway-Fallback": "off"}
            self.client.request("POST", CHAT, chat("first", stream=True), headers)
            events = self.client.events(self.client.head())
            self.assertEqual("portway", next(events).comment)
            gate.set()
            self.assertIn("error", [event.json for event in events if event.data][-1])
            self.assert_says(self.line(), status=200, exit_code=4, error="server_error")

    def test_interrupted(self) -> None:
        """Ctrl-C, however its leaving is noticed."""
        self.backend.fail("/api/chat", "hang")
        with self.daemon.client() as client:
            client.request("POST", CHAT, chat(), {"Authorization": f"Bearer {KEY}", "X-Portway-Client": "ask"})
            self.await_hanging()
        self.assert_says(self.line(), exit_code=130, cancelled_in="prompt")

    def test_interrupted_while_it_is_written_to(self) -> None:
        """The same if a write is what fails: here it does not read for as long as it may."""
        events = sse_body([delta(content="x" * 1_000_000) for _ in range(9)] + [finish()])
        with Target([stream_head(), *map(chunk, events), LAST_CHUNK]) as target:
            self.daemon.use(chain(target.url, rest=f'[server]\napi_keys = ["{KEY}"]\n'))
            headers = {"Authorization": f"Bearer {KEY}", "X-Portway-Client": "ask"}
            self.client.request("POST", CHAT, chat("first", stream=True), headers)
            self.assert_says(self.line(), exit_code=130, cancelled_in="stalled")


if __name__ == "__main__":
    unittest.main()
