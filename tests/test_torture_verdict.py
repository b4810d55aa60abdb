"""The torturers' own eyes: what they must not overlook in an answer, a log, a row of samples; and what they report."""

from __future__ import annotations

import io
import json
import socket
import tempfile
import threading
import unittest
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from scripts.torture_rows import Row, command, report, soak
from scripts.torture_rows.client import Broken, Client, Reply, read_events
from scripts.torture_rows.machine import is_clear_error
from scripts.torture_rows.verdict import Expected, judge, judge_line, judge_lines, read_attempts

RIGHT = Expected("m", stream=False, served_by="m", text="hello", attempts=(("m", "ok"),))
STREAMED = replace(RIGHT, stream=True)
BROKEN = replace(STREAMED, code="stream_broken", begun=True)
FAILED = Expected("m", stream=False, attempts=(("m", "busy"),), code="busy", status=503)
FACTS = {"x-served-by": "m", "x-cache": "MISS"}


def plain(text: str = "hello", model: str = "m", status: int = 200, **headers: str) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = json.dumps({"model": model, "choices": [choice]}).encode()
    return Reply(status, {**FACTS, "content-type": "application/json", **named(headers)}, body)


def chunk(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "i", "model": "m", "choices": [choice], **more}).encode() + b"\n\n"


def streamed(*events: bytes, **headers: str) -> Reply:
    reply = Reply(200, {**FACTS, "content-type": "text/event-stream", **named(headers)}, b"".join(events))
    read_events(reply)
    return reply


def failed(status: int = 503, code: str = "busy", **headers: str) -> Reply:
    body = json.dumps(envelope(code)).encode()
    told = {"content-type": "application/json", "x-should-retry": "false", "x-portway-attempts": "m=busy(0.1s)"}
    return Reply(status, {**told, **named(headers)}, body)


def envelope(code: str) -> dict[str, Any]:
    return {"error": {"message": "no", "type": "api_error", "param": None, "code": code}}


def named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


DONE = b"data: [DONE]\n\n"
ERROR = b"data: " + json.dumps(envelope("stream_broken")).encode() + b"\n\n"
WHOLE = (chunk("hel"), chunk("lo"), chunk(finish="stop"), DONE)


class JudgeTest(unittest.TestCase):
    def test_right_ones(self) -> None:
        """Nothing is wrong with what is right, in each form."""
        self.assertEqual([], judge(plain(), RIGHT))
        self.assertEqual([], judge(streamed(*WHOLE), STREAMED))
        self.assertEqual([], judge(streamed(chunk("hel"), ERROR), BROKEN))
        self.assertEqual([], judge(failed(), FAILED))

    def test_wrong_ones(self) -> None:
        """Each of these is complained of, in the word that stands before it."""
        slow = plain()
        slow.last = 100.0
        cases: tuple[tuple[str, Reply, Expected], ...] = (
            ("text", plain("help"), RIGHT),
            ("model", plain(model="other"), RIGHT),
            ("X-Served-By", plain(x_served_by="other"), RIGHT),
            ("X-Cache", plain(x_cache="HIT"), RIGHT),
            ("X-Portway-Attempts", plain(x_portway_attempts="m=busy(0.1s); n=ok"), RIGHT),
            ("status", plain(status=502), RIGHT),
            ("it took", slow, RIGHT),
            ("it took", plain(), replace(RIGHT, least=1.0)),
            ("form", plain(), STREAMED),
            ("[DONE]", streamed(*WHOLE[:-1]), STREAMED),
            ("text", streamed(chunk("hel"), chunk(finish="stop"), DONE), STREAMED),
            ("text", streamed(chunk("hello"), chunk("hello"), chunk(finish="stop"), DONE), STREAMED),
            ("finish_reasons", streamed(chunk("hello"), DONE), STREAMED),
            ("models", streamed(chunk("hello", model="x"), *WHOLE[2:]), STREAMED),
            ("number of ids", streamed(chunk("hello", id="x"), *WHOLE[2:]), STREAMED),
            ("errors", streamed(chunk("hello"), ERROR), STREAMED),
            ("no heartbeat", streamed(*WHOLE), replace(STREAMED, beats=True)),
            ("[DONE]", streamed(*WHOLE), BROKEN),
            ("0 errors", streamed(*WHOLE[:2]), BROKEN),
            ("text", streamed(chunk("other"), ERROR), BROKEN),
            ("text", streamed(ERROR), BROKEN),
            ("code", streamed(chunk("hel"), ERROR), replace(BROKEN, code="idle_timeout")),
            ("status", failed(502), FAILED),
            ("code", failed(code="internal"), FAILED),
            ("x-should-retry", failed(x_should_retry="true"), FAILED),
            ("X-Portway-Attempts", failed(x_portway_attempts=""), FAILED),
            ("X-Served-By", failed(x_served_by="m"), FAILED),
            ("Retry-After", failed(retry_after="1"), FAILED),
            ("Retry-After", failed(), replace(FAILED, retry_after=True)),
            ("body", failed(), replace(FAILED, body=b"{}")),
            ("says", failed(), replace(FAILED, never_says="n")),
            ("status", plain(), FAILED),
        )
        for word, reply, expected in cases:
            with self.subTest(word, reply=reply.body):
                complaints = judge(reply, expected)
                self.assertTrue(any(complaint.startswith(word) for complaint in complaints), complaints)

    def test_facts_behind_a_heartbeat(self) -> None:
        """They count where they stand in the first event, and only if a heartbeat had sent the head before."""
        facts = {"served_by": "n", "cache": "MISS", "attempts": "m=busy(0.1s); n=ok"}
        first = chunk("hello", model="n", portway=facts)
        last = chunk(finish="stop", model="n")
        demoted = replace(STREAMED, served_by="n", attempts=(("m", "busy"), ("n", "ok")))
        for beat, right in ((b": portway\n", True), (b"", False)):
            reply = Reply(200, {"content-type": "text/event-stream"}, beat + first + last + DONE)
            read_events(reply)
            self.assertEqual(right, judge(reply, demoted) == [], judge(reply, demoted))

    def test_attempts(self) -> None:
        """Names and reasons, whatever stands in the brackets."""
        told = "a=connect_failed(Connection refused, 0.0s); b=cooling(3s left, 0.0s); c-1=ok"
        self.assertEqual([("a", "connect_failed"), ("b", "cooling"), ("c-1", "ok")], read_attempts(told))
        self.assertEqual([], read_attempts(""))

    def test_clear_errors(self) -> None:
        """An envelope with a code of the reference, and its status."""
        self.assertTrue(is_clear_error(failed()))
        self.assertFalse(is_clear_error(failed(500)))
        self.assertFalse(is_clear_error(failed(code="whatever")))
        self.assertFalse(is_clear_error(plain()))
        self.assertTrue(is_clear_error(failed(500, "internal")))


class LogTest(unittest.TestCase):
    LINE: ClassVar[dict[str, Any]] = {
        "client": "c",
        "endpoint": "chat",
        "model": "m",
        "stream": False,
        "served_by": "m",
        "demoted": False,
        "status": 200,
        "exit_code": 0,
        "error": None,
        "cancelled_in": None,
        "truncated": False,
        "attempts": [{"model": "m", "reason": "ok", "seconds": 0.1}],
        "cache_hit": False,
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "response_chars": 5,
    }

    def test_every_field_counts(self) -> None:
        """The right line is right; with any field changed it is not."""
        self.assertEqual([], judge_line(self.LINE, RIGHT))
        for key in self.LINE:
            changed = {**self.LINE, key: [] if key == "attempts" else "x"}
            with self.subTest(key):
                self.assertEqual(key == "client", judge_line(changed, RIGHT) == [])

    def test_one_line_each(self) -> None:
        """None and two are wrong alike."""
        self.assertEqual({}, judge_lines([self.LINE], {"c": RIGHT}))
        self.assertEqual({"c": ["log: 0 lines"]}, judge_lines([], {"c": RIGHT}))
        self.assertEqual({"c": ["log: 2 lines"]}, judge_lines([self.LINE] * 2, {"c": RIGHT}))


class ClientTest(unittest.TestCase):
    @contextmanager
    def told(self, data: bytes, *, stays: bool = False) -> Iterator[Client]:
        """A client of a server that says this to whatever comes, and leaves."""
        over = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve() -> None:
                sock, _ = listener.accept()
                with sock:
                    sock.recv(65536)
                    sock.sendall(data)
                    if stays:
                        over.wait(10)

            server = threading.Thread(target=serve)
            server.start()
            try:
                with Client(listener.getsockname()[1], patience=1.0) as client:
                    yield client
            finally:
                over.set()
                server.join()

    def test_what_is_no_whole_answer(self) -> None:
        """Cut off anywhere, ended in another way than it says, said twice, or followed by something: it is Broken."""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        event = b'd\r\ndata: {"a":1}\r\n'
        whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
        for data in (
            b"",
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.0 200 OK\r\n\r\n",
            whole[:-1],
            whole + whole,
            whole.replace(b"Content-Length: 2", b"Content-Length: 2\r\nContent-Length: 2"),
            whole.replace(b"Content-Length: 2", b"Connection: close\r\nContent-Length: 1"),
            head,
            head + b"3\r\nabc\r\n",
            head + b"3\r\nabcde0\r\n\r\n",
            head + event + b"0\r\n\r\n",  # no blank line behind the event
            head + b"e\r\ndata: [DONE]\n\n\r\n" * 2 + b"0\r\n\r\n",  # said twice
            b"HTTP/1.1 200 OK\r\n\r\nuntil when?",
        ):
            with self.subTest(data), self.told(data) as client, self.assertRaises(Broken):
                client.ask("GET", "/")

    def test_silence(self) -> None:
        """Nothing for as long as the client's patience lasts is Broken as well."""
        with self.told(b"HTTP/1.1 200 OK\r\n", stays=True) as client, self.assertRaises(Broken):
            client.ask("GET", "/")

    def test_whole_answers(self) -> None:
        """Of each framing."""
        for data, body in (
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", b"{}"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", b"{}"),
            (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{}", b"{}"),
        ):
            with self.subTest(data), self.told(data) as client:
                self.assertEqual(body, client.ask("GET", "/").body)


class SoakTest(unittest.TestCase):
    def samples(self, **grown: float) -> soak.Samples:
        at = [float(second) for second in range(100)]

        def grow(base: float, name: str) -> list[float]:
            return [base + (second % 3) + grown.get(name, 0.0) * second / 100 for second in range(100)]

        answers = [(second, 0.005 + grown.get("p99", 0.0) * (second > 60)) for second in at for _ in range(9)]
        return soak.Samples(at, grow(12, "threads"), grow(30, "descriptors"), grow(31, "memory"), answers)

    def test_flat(self) -> None:
        """What only goes up and down does not grow."""
        self.assertEqual([], soak.judge(self.samples(), 100.0)[0])

    def test_growth(self) -> None:
        """Each of the four is seen."""
        for name, much in (("threads", 5.0), ("descriptors", 8.0), ("memory", 8.0), ("p99", 0.1)):
            with self.subTest(name):
                self.assertEqual(1, len(soak.judge(self.samples(**{name: much}), 100.0)[0]))

    def test_wrong_answers(self) -> None:
        """One is enough."""
        samples = self.samples()
        samples.wrong.append("x")
        self.assertEqual(["x"], soak.judge(samples, 100.0)[0])

    def test_slope(self) -> None:
        """Of a line, its own; of too little, none."""
        self.assertAlmostEqual(2.0, soak.slope([0.0, 1.0, 5.0], [1.0, 3.0, 11.0]))
        self.assertEqual(0.0, soak.slope([1.0], [1.0]))
        self.assertEqual(0.0, soak.slope([1.0, 1.0], [1.0, 2.0]))

    def test_p99(self) -> None:
        """The nearest rank."""
        self.assertEqual(100.0, soak.p99([float(n) for n in range(1, 102)]))
        self.assertEqual(0.0, soak.p99([]))


ROWS = {"A part": [Row("all | of it", 3, 3, "fine"), Row("not here", 0, 0, "why")], "Another": [Row("some", 4, 2, "2")]}


class ReportTest(unittest.TestCase):
    def test_document(self) -> None:
        """What does not hold is named, what was not tried as well."""
        said = report.document(ROWS, {})
        self.assertEqual(
            (False, 7, ["some"], ["not here"]), tuple(said[k] for k in ("held", "tries", "failed", "not_tried"))
        )
        self.assertTrue(report.document({"A part": ROWS["A part"]}, {})["held"])
        self.assertFalse(report.document({}, {})["held"])

    def test_markdown(self) -> None:
        """A summary, a row for each, and the limits."""
        text = report.markdown(ROWS, {"date": "today"}, ["--quick"])
        for line in (
            "| A part | 1 | 3 | all |",
            "| Another | 1 | 4 | **2** |",
            "| all / of it | 3 | all | fine |",
            "| not here | 0 | not tried | why |",
            "| some | 4 | **2** | 2 |",
            "python3 scripts/torture.py --quick",
            "| date | today |",
            "## What cannot be held",
        ):
            self.assertIn(line, text)

    def test_quoted(self) -> None:
        """README gets the new summary in place of the old one, and nothing else changes."""
        old = report.quoted(f"before\n\n{report.MARK}\n| old |\n\nafter\n", {"X": [Row("x", 5, 5)]})
        self.assertEqual(
            f"before\n\n{report.MARK}\n| | ways | tried | held |\n|---|---|---|---|\n| X | 1 | 5 | all |\n\nafter\n",
            old,
        )
        self.assertNotIn("| X |", report.quoted(old, ROWS))
        self.assertEqual(old, report.quoted(report.quoted(old, ROWS), {"X": [Row("x", 5, 5)]}))
        self.assertEqual("no mark", report.quoted("no mark", ROWS))

    def test_command(self) -> None:
        """The last line is one JSON document; what failed is the exit code, also what could not be tried to its end."""

        def breaks(_: command.Effort) -> Iterator[Row]:
            yield Row("first", 1, 1)
            raise OSError("no more")

        for rows, code in (((Row("x", 1, 1),), 0), ((Row("x", 2, 1),), 1), (None, 1)):
            making = {"Part": {"x": breaks if rows is None else lambda _, rows=rows: iter(rows)}}
            out = io.StringIO()
            with (
                mock.patch.object(command, "groups", return_value=making),
                tempfile.TemporaryDirectory() as folder,
                redirect_stdout(out),
            ):
                self.assertEqual(code, command.main(["--write", f"{folder}/r.md"]))
                self.assertIn("# Reliability", Path(folder, "r.md").read_text("utf-8"))
            self.assertEqual(code == 0, json.loads(out.getvalue().splitlines()[-1])["held"])

    def test_usage(self) -> None:
        """What is not there can't be asked for."""
        for words in (["--only", "nothing"], ["--soak", "0"], ["--soak", "x"]):
            with self.subTest(words), redirect_stderr(io.StringIO()), self.assertRaises(SystemExit) as caught:
                command.main(words)
            self.assertEqual(2, caught.exception.code)


if __name__ == "__main__":
    unittest.main()
