"""telemetry.py: what a line says, the queue, and the file under several processes, full disks and kill -9."""

import contextlib
import gzip
import json
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import unittest
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from portway import telemetry
from portway.call import Attempt
from portway.commands import stats
from portway.errors import BackendError, ClientError
from portway.telemetry import Log, LogFile, Price, Record, is_local, line, log_path, old_files
from tests.llama_server import wait_for

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0  # seconds a test waits for what should come at once


def a_record(number: int = 0, **fields: Any) -> Record:
    """A request answered without a hitch."""
    given = {"id": f"r{number}", "model": "fast-9b", "served_by": "fast-9b", "status": 200, "ended": 101.5, **fields}
    return Record(1795000000.25, 100.0, **given)


def vars_of(attempt: Attempt) -> dict[str, Any]:
    return {"model": attempt.model, "reason": attempt.reason, "seconds": attempt.seconds}


def a_line(number: int, width: int = 40) -> bytes:
    """A line of `width` bytes or more that looks like one of ours."""
    return (b'{"ts":"2026-11-21T00:00:00.000Z","n":%d}' % number).ljust(width - 1) + b"\n"


def lines_of(path: str) -> list[dict[str, Any]]:
    """All lines of a log, the oldest first; a broken one fails the test."""
    found: list[dict[str, Any]] = []
    for name in [*old_files(path), path]:
        with gzip.open(name) if name.endswith(".gz") else open(name, "rb") as file:
            found += [json.loads(text) for text in file.read().split(b"\n")[:-1]]
    return found


def full_after(size: int) -> Callable[[int, bytes], int]:
    """An os.write() for a disk that has room for `size` bytes, until that has been said once."""
    steps = [size, 0]

    def write(file: int, data: bytes) -> int:
        if not steps:
            return os.write(file, data)
        room = steps.pop(0)
        if not room:
            steps.clear()
            raise OSError(28, "No space left on device")
        return os.write(file, data[:room])

    return write


def mode_of(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


class InAFolder(unittest.TestCase):
    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory(prefix="portway-log-"))
        self.path = os.path.join(self.folder, "portway", "log.jsonl")
        self.said: list[str] = []
        self.told = threading.Event()

    def say(self, text: str) -> None:
        self.said.append(text)
        self.told.set()

    def log(self, **options: Any) -> Log:
        log = Log(self.path, say=self.say, retry_after=0.01, **options)
        self.addCleanup(log.close, PATIENCE)
        return log


class Lines(unittest.TestCase):
    """What is written of a request."""

    def line(self, price: Price | None = None, **fields: Any) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(line(a_record(**fields), price or Price()))
        return found

    def test_every_field_of_the_issue_is_there(self):
        """The names are public; a line has all of them, with null for what is not known."""
        names = """ts model served_by prompt_hash prompt_chars response_chars latency_s cache_hit demoted exit_code id
            client endpoint stream status error attempts queue_s load_s ttft_s decode_tps overhead_ms prompt_tokens
            completion_tokens truncated cancelled_in saved_usd local key"""
        self.assertEqual(set(names.split()), set(json.loads(line(Record(0.0, 0.0), Price()))))

    def test_ts_leads_and_sorts_as_text(self):
        """A line begins with its time, to the millisecond, in UTC."""
        self.assertEqual(next(iter(self.line())), "ts")
        self.assertEqual(self.line()["ts"], "2026-11-18T11:06:40.250Z")
        self.assertTrue(line(a_record(), Price()).startswith(telemetry.LINE_START))

    def test_times_are_derived(self):
        """Latency, time to first token, own share and speed come from the moments that were noted."""
        found = self.line(first=100.25, waited=1.499, completion_tokens=26)
        self.assertEqual((found["latency_s"], found["ttft_s"], found["overhead_ms"]), (1.5, 0.25, 1))
        self.assertEqual(found["decode_tps"], 20.0)
        self.assertEqual(self.line(first=100.25, decode_s=0.5, completion_tokens=26)["decode_tps"], 52.0)
        self.assertEqual(0, self.line(waited=1.6)["overhead_ms"])  # two clocks, and no work done before it came
        self.assertEqual(self.line(decode_s=0.5, completion_tokens=26)["decode_tps"], 52.0)  # a plain answer
        self.assertIsNone(self.line(completion_tokens=26)["decode_tps"])
        self.assertIsNone(self.line(first=100.25, completion_tokens=26, cache_hit=True)["decode_tps"])

    def test_exit_codes(self):
        """0 for an answer, else the class of the status; a stream that broke after its 200 is a failure."""
        for code, fields in (
            (0, {"status": 200}),
            (0, {"status": 204}),
            (4, {"status": 404}),
            (5, {"status": 502, "error": "server_error"}),
            (5, {"status": 200, "error": "stream_broken"}),
            (4, {"status": 200, "cancelled_in": "answer"}),
            (5, {"status": 0}),
            (3, {"status": 0, "exit_code": 3}),
        ):
            with self.subTest(fields=fields):
                self.assertEqual(self.line(**fields)["exit_code"], code)

    def test_a_client_that_left_before_its_answer_has_a_status(self):
        """499, as nginx writes; one that left during the answer keeps what it was sent."""
        early, late = a_record(status=0, cancelled_in="prompt"), a_record(cancelled_in="answer")
        early.finish(102.0)
        late.finish(102.0)
        self.assertEqual((early.status, late.status), (499, 200))

    def test_demotion_is_another_model_than_asked_for(self):
        """Who was not served at all was not demoted either."""
        self.assertTrue(self.line(served_by="fast-1b")["demoted"])
        self.assertFalse(self.line()["demoted"])
        self.assertFalse(self.line(served_by="")["demoted"])

    def test_attempts_have_reason_and_seconds_but_no_words_of_a_server(self):
        """A detail may quote a prompt; it stays out."""
        attempts = [Attempt("fast-9b", "server_error", 0.123456, "in 'my secret'"), Attempt("fast-1b", "ok", 2.0)]
        self.assertEqual(
            self.line(attempts=attempts)["attempts"],
            [
                {"model": "fast-9b", "reason": "server_error", "seconds": 0.123456},
                {"model": "fast-1b", "reason": "ok", "seconds": 2.0},
            ],
        )

    def test_an_error_is_its_code(self):
        """Also with the attempts it knows of; never the message."""
        record = a_record()
        error = BackendError("server_error", "my secret")
        vars(error)["attempts"] = [Attempt("fast-9b", "server_error")]
        record.failed(error)
        self.assertEqual((record.error, len(record.attempts)), ("server_error", 1))
        record.failed(ClientError("my secret"))
        self.assertEqual((record.error, len(record.attempts)), ("invalid_request_error", 1))
        self.assertNotIn(b"secret", line(record, Price()))

    def test_the_hash_is_the_prompts(self):
        """Options, the model and the order of keys don't change it; any word, role or picture does."""
        messages = [{"role": "user", "content": "why?"}]
        expected = blake2b(b"user\0why?\0", digest_size=32).hexdigest()[:16]
        self.assertEqual(self.line(body={"messages": messages})["prompt_hash"], expected)
        self.assertEqual(self.line(body={"stream": True, "model": "x", "messages": messages})["prompt_hash"], expected)
        for other in ("Why?", [{"type": "text", "text": "why?"}], [{"type": "image_url", "image_url": {"url": "x"}}]):
            body = {"messages": [{"role": "user", "content": other}]}
            self.assertNotEqual(self.line(body=body)["prompt_hash"], expected)

    def test_prompt_chars_count_text_alone(self):
        """In chats, completions and embeddings; neither roles nor pictures nor token ids."""
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        parts = [{"type": "text", "text": "three"}, picture]
        for chars, body in (
            (9, {"messages": [{"role": "system", "content": "b\u00e9 g"}, {"role": "user", "content": parts}]}),
            (5, {"prompt": ["ab", "cde"]}),
            (4, {"input": "four"}),
            (0, {"input": [1, 2, 3]}),
            (0, {"messages": None}),
            (0, {"messages": [7, None, {"content": None}]}),
            (None, None),
        ):
            with self.subTest(body=body):
                self.assertEqual(self.line(body=body)["prompt_chars"], chars)

    def test_lone_surrogates_are_hashed(self):
        """JSON may hold them; UTF-8 may not."""
        self.assertEqual(self.line(body={"prompt": "\ud800"})["prompt_chars"], 1)

    def test_names_from_outside_are_bounded(self):
        """A client may call itself, and a server its error, whatever it likes."""
        found = self.line(client="c" * 1000, error="e" * 1000, model="m" * 1000)
        self.assertEqual(["c" * 128, "e" * 128, "m" * 128], [found[name] for name in ("client", "error", "model")])

    def test_what_is_saved(self):
        """The reference price of answers that cost nothing: own servers' and the cache's, nobody else's."""
        price = Price(0.15, 0.60)
        tokens = {"prompt_tokens": 1_000_000, "completion_tokens": 500_000}
        for saved, fields in (
            (0.45, {"host": "127.0.0.1"}),
            (0.45, {"host": "api.openai.com", "cache_hit": True}),
            (0.0, {"host": "api.openai.com"}),
            (0.0, {"host": ""}),
            (0.0, {"host": "127.0.0.1", "status": 502}),
        ):
            with self.subTest(fields=fields):
                self.assertEqual(self.line(price, **tokens, **fields)["saved_usd"], saved)
        self.assertIsNone(self.line(price, host="127.0.0.1")["saved_usd"])
        self.assertEqual(self.line(price, host="localhost", prompt_tokens=1_000_000)["saved_usd"], 0.15)

    def test_what_is_local(self):
        """This machine and private networks, by name or number."""
        for host in ("127.0.0.1", "localhost", "::1", "192.168.1.9", "10.0.0.1", "box", "box.local", "100.100.1.1"):
            self.assertTrue(is_local(host), host)
        for host in ("api.openai.com", "8.8.8.8", "2606:4700::1111", "100.128.0.1"):
            self.assertFalse(is_local(host), host)

    def test_numbers_that_json_has_not(self):
        """A server's infinity becomes null."""
        self.assertIsNone(self.line(load_s=math.inf)["load_s"])
        self.assertIsNone(self.line(load_s=math.nan)["load_s"])
        self.assertIsNone(self.line(decode_s=5e-324, completion_tokens=3)["decode_tps"])

    def test_sizes_of_a_stored_answer(self):
        """As it has them; what a server sent for a number that is none is not known."""
        choice = {"message": {"content": "four"}}
        usage: Any
        for usage, counts in (({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4)), (None, (None, None))):
            document = json.dumps({"choices": [choice], "usage": usage}).encode()
            found = self.line(document=document, cache_hit=True)
            self.assertEqual(
                (*counts, 4), tuple(found[name] for name in ("prompt_tokens", "completion_tokens", "response_chars"))
            )
        for usage in (
            {"prompt_tokens": "3", "completion_tokens": [4]},
            {"prompt_tokens": 10**400},
            {"prompt_tokens": -1},
        ):
            found = self.line(document=json.dumps({"usage": usage}).encode(), cache_hit=True)
            self.assertIsNone(found["prompt_tokens"])

    def test_a_chat_is_hashed_like_any_prompt(self):
        """A role and a text each goes a shorter way to the same hash; whatever else it may hold takes the long one."""
        plain = [{"role": "system", "content": "\ud800 be"}, {"content": "brief", "role": "user"}]
        rows: list[tuple[list[Any], list[str], int]] = [
            (plain, ["system", "\ud800 be", "brief", "user"], 9),
            ([{**plain[1], "name": "me"}], ["brief", "user", "me"], 5),
            ([{"role": "user", "content": None}], ["user"], 0),
            ([{"role": "user", "content": 5}], ["user", "5"], 0),
            ([["role", "content"], "role", 7], ["role", "content", "role", "7"], 0),
            ([], [], 0),
        ]
        for messages, texts, chars in rows:
            with self.subTest(messages=messages):
                told = "".join(f"{text}\0" for text in texts).encode("utf-8", "surrogatepass")
                found = self.line(body={"messages": messages})
                self.assertEqual(
                    (blake2b(told, digest_size=32).hexdigest()[:16], chars),
                    (found["prompt_hash"], found["prompt_chars"]),
                )

    def test_requests_alike_share_a_form(self):
        """Only what is named is in it: each line has its own numbers, also where one has none that another has."""
        rows: list[dict[str, Any]] = [{}, {"prompt_tokens": 3}, {"prompt_tokens": 4, "completion_tokens": 2}]
        rows += [{"load_s": 0.5}, {"first": 101.0, "completion_tokens": 3}, {"waited": 1.0, "response_chars": 9}, {}]
        rows += [{"attempts": [Attempt("fast-9b", "ok", seconds)]} for seconds in (0.25, 0.5)]
        rows += [{"attempts": [Attempt("fast-9b", "busy", 0.25)]}]
        rows += [
            {"attempts": [Attempt("fast-9b", "busy", 0.25), Attempt("fast-1b", "ok", 1.0)]},
            {"client": "100% %s %d"},
        ]
        for fields in rows:
            record, found = a_record(**fields), self.line(Price(1.0, 1.0), host="localhost", **fields)
            expected = {
                name: getattr(record, name) for name in ("prompt_tokens", "completion_tokens", "response_chars")
            }
            expected |= {"load_s": record.load_s, "ttft_s": record.ttft, "decode_tps": record.decode_tps}
            expected |= {"overhead_ms": None if record.overhead is None else 1000 * record.overhead}
            expected |= {"client": record.client or None, "exit_code": 0, "latency_s": 1.5}
            expected["attempts"] = [vars_of(attempt) for attempt in record.attempts]
            tokens = [each for each in (record.prompt_tokens, record.completion_tokens) if each is not None]
            expected["saved_usd"] = sum(tokens) / 1e6 if tokens else None
            with self.subTest(fields=fields):
                self.assertEqual(expected, {name: found[name] for name in expected})

    def test_what_a_stranger_sends_is_not_remembered(self):
        """The forms that are kept are short: a long name of a client is not among them."""
        telemetry._form.cache_clear()
        given: list[dict[str, Any]] = [{"client": "x" * 500}, {"endpoint": "x" * 500}, {"error": "x" * 500}]
        for fields in given:
            self.assertEqual(128, len(self.line(**fields)[next(iter(fields))]))
        self.assertEqual(0, telemetry._form.cache_info().currsize)
        self.line(client="x")
        self.assertEqual(1, telemetry._form.cache_info().currsize)

    def test_nothing_but_what_there_is(self):
        """A record has its fields and no others."""
        with self.assertRaises(AttributeError):
            a_record(nonsense=1)

    def test_any_depth_and_length_of_a_prompt(self):
        """The hash is of each text and a zero byte, in the order sent, also of texts that are hashed by themselves."""
        long = "\u00e9" * 10_000
        parts = [{"type": "text", "text": long}, {"type": "text", "text": "b", "x": [[True, None, 2.5]]}]
        messages = [{"role": "user", "content": "a"}, {"role": "user", "content": parts}]
        texts = ["user", "a", "user", "text", long, "text", "b", "True", "2.5", long]
        expected = blake2b("".join(f"{text}\0" for text in texts).encode(), digest_size=32).hexdigest()[:16]
        found = self.line(body={"input": long, "messages": messages})
        self.assertEqual((expected, 20_002), (found["prompt_hash"], found["prompt_chars"]))

    def test_served_takes_what_the_backend_counted(self):
        """From a Served, as routing makes them."""
        tally = SimpleNamespace(
            load_s=1.0, decode_s=2.0, prompt_tokens=3, completion_tokens=4, content_chars=5, truncated=True
        )
        model = SimpleNamespace(name="fast-1b", backend=SimpleNamespace(host="127.0.0.1"))
        served: Any = SimpleNamespace(
            model=model, answer=SimpleNamespace(tally=tally), attempts=[], queued=0.5, hosts=("127.0.0.1",)
        )
        call: Any = SimpleNamespace(
            model=SimpleNamespace(name="fast-9b"), endpoint="chat", id="chatcmpl-1", stream=True, body={}, raw=b"{}"
        )
        record = Record(0.0, 0.0)
        record.begin(call)
        record.served(served, 7.0)
        found = json.loads(line(record, Price()))
        expected = {"model": "fast-9b", "served_by": "fast-1b", "demoted": True, "load_s": 1.0, "decode_tps": 2.0}
        expected |= {"queue_s": 0.5}
        expected |= {"prompt_tokens": 3, "response_chars": 5, "truncated": True, "ttft_s": 7.0, "local": True}
        expected |= {"endpoint": "chat", "id": "chatcmpl-1", "stream": True}
        self.assertEqual({key: found[key] for key in expected}, expected)
        self.assertEqual(record.size, 2)


class Places(unittest.TestCase):
    def test_the_log_is_where_xdg_says(self):
        """A relative $XDG_DATA_HOME is to be ignored."""
        self.assertEqual(log_path({"XDG_DATA_HOME": "/data"}), "/data/portway/log.jsonl")
        for environ in ({"HOME": "/home/me"}, {"HOME": "/home/me", "XDG_DATA_HOME": "data"}):
            self.assertEqual(log_path(environ), "/home/me/.local/share/portway/log.jsonl")


class Queue(InAFolder):
    def test_records_arrive_in_order_and_whole(self):
        """More than one batch of them, each a line."""
        log = self.log()
        for number in range(1500):
            log.record(a_record(number))
        self.assertTrue(log.close(PATIENCE))
        self.assertEqual([found["id"] for found in lines_of(self.path)], [f"r{number}" for number in range(1500)])
        self.assertEqual((log.written, log.dropped, log.problem, self.said), (1500, 0, None, []))

    def test_a_line_appears_without_close(self):
        """`tail -f` sees it soon."""
        appeared = threading.Event()

        def write(file: int, data: bytes) -> int:
            count = os.write(file, data)
            appeared.set()
            return count

        self.log(write=write).record(a_record())
        self.assertTrue(appeared.wait(PATIENCE))
        self.assertEqual(len(lines_of(self.path)), 1)

    def test_nothing_in_a_line_can_forge_another(self):
        """Line ends of every alphabet, escapes and letters beyond ASCII come out as escapes."""
        evil = 'x"\n{"ts":"0"}\r\x1b[2J\x7f\u2028\u0085\u00e9\ud800'
        log = self.log()
        log.record(a_record(client=evil, error=evil))
        log.close(PATIENCE)
        data = Path(self.path).read_bytes()
        self.assertEqual(data.count(b"\n"), 1)
        self.assertTrue(all(0x20 <= byte < 0x7F for byte in data[:-1]))
        self.assertEqual(json.loads(data)["client"], evil)

    def test_only_the_owner_may_read_it_whatever_the_umask(self):
        """0600 in 0700, with a umask that would give more and one that would give less; also what was there."""
        for umask in (0, 0o777):
            with self.subTest(umask=oct(umask)), tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "portway", "log.jsonl")
                old = os.umask(umask)
                try:
                    file = LogFile(path, max_bytes=60)
                    file.append([a_line(1)])
                    os.chmod(path, 0o644)
                    file.close()
                    file.append([a_line(2)])
                finally:
                    os.umask(old)
                file.close()
                self.assertEqual(mode_of(os.path.dirname(path)), 0o700)
                for name in os.listdir(os.path.dirname(path)):
                    self.assertEqual(mode_of(os.path.join(os.path.dirname(path), name)), 0o600, name)
                self.assertEqual(len(old_files(path)), 1)

    def test_a_full_queue_drops_and_counts(self):
        """A file that hangs costs lines, not time: record() returns while the writer is stuck."""
        stuck, go_on = threading.Event(), threading.Event()

        def write(file: int, data: bytes) -> int:
            stuck.set()
            go_on.wait(PATIENCE)
            return os.write(file, data)

        log = self.log(write=write)
        log.record(a_record())
        self.assertTrue(stuck.wait(PATIENCE))
        with mock.patch.object(telemetry, "MAX_WAITING", 10):
            for number in range(25):
                log.record(a_record(number))
        self.assertEqual((log.dropped, log.close(0.01)), (15, False))
        log.record(a_record())
        self.assertEqual(log.dropped, 16)
        go_on.set()
        self.assertTrue(log.close(PATIENCE))
        self.assertEqual(len(lines_of(self.path)), log.written)
        self.assertEqual(log.written, 11)

    def test_bodies_that_wait_are_bounded(self):
        """Beyond that a line goes without its hash; what has been written makes room again."""
        body = {"prompt": "x"}
        log = self.log()
        self.enterContext(mock.patch.object(telemetry, "MAX_AT_ONCE", 99))
        with mock.patch.object(telemetry, "MAX_WAITING_BYTES", 100):
            log.record(a_record(1, body=body, size=101))
            log.record(a_record(2, body=body, size=100))
            while not log.written:
                self.assertTrue(log._writer.is_alive())
            with mock.patch.object(telemetry, "GATHER", 10_000.0):
                log.record(a_record(3, body=body, size=100))
                log.record(a_record(4, body=body, size=100))
                log.close(PATIENCE)
        hashed = {found["id"]: found["prompt_hash"] is not None for found in lines_of(self.path)}
        self.assertEqual(hashed, {"r1": False, "r2": True, "r3": True, "r4": False})

    def test_a_body_is_let_go(self):
        """The record that its daemon may still hold keeps no prompt: a short one not for a moment."""
        log = self.log()
        short, long = (a_record(body={"prompt": "x"}, size=size, document=b"{}") for size in (10, 100_000))
        log.record(short)
        self.assertEqual((None, b""), (short.body, short.document))
        log.record(long)
        log.close(PATIENCE)
        self.assertEqual((None, b""), (long.body, long.document))

    def test_long_and_short_ones_keep_their_order(self):
        """Whether the line was made at once or is made by the writer."""
        log = self.log()
        for number in range(200):
            log.record(a_record(number, body={"prompt": "x"}, size=number % 3 * telemetry.MAX_AT_ONCE))
        log.close(PATIENCE)
        lines = lines_of(self.path)
        self.assertEqual([f"r{number}" for number in range(200)], [found["id"] for found in lines])
        self.assertEqual(1, len({found["prompt_hash"] for found in lines}))

    def test_lines_gather(self):
        """The writer wakes for the first one, and writes those that come meanwhile with it; close() waits for none."""
        sizes: list[int] = []
        written = threading.Event()

        def write(file: int, data: bytes) -> int:
            sizes.append(data.count(b"\n"))
            written.set()
            return os.write(file, data)

        with mock.patch.object(telemetry, "GATHER", 0.2):
            log = self.log(write=write)
            for number in range(100):
                log.record(a_record(number))
            self.assertTrue(written.wait(PATIENCE))
            with mock.patch.object(telemetry, "GATHER", 10_000.0):
                for number in range(100):
                    log.record(a_record(number))
                self.assertTrue(log.close(PATIENCE))
        self.assertEqual((200, True), (sum(sizes), len(sizes) < 20), sizes)

    def test_large_bodies_are_not_gathered(self):
        """As soon as those that wait hold much, they are written."""
        bounds = {"GATHER": 10_000.0, "MAX_AT_ONCE": 99, "MAX_GATHERED": 150}
        for name, value in bounds.items():
            self.enterContext(mock.patch.object(telemetry, name, value))
        log = self.log()
        log.record(a_record(1, body={"prompt": "x"}, size=100))
        wait_for(lambda: bool(vars(log._changed)["_waiters"]), "the writer's waiting for more")
        log.record(a_record(2, body={"prompt": "x"}, size=100))
        wait_for(lambda: log.written == 2, "both lines")

    def test_the_price_may_change(self):
        """From the next line on."""
        log = self.log(price=Price(1.0, 1.0))
        log.price = Price(2.0, 2.0)
        log.record(a_record(host="localhost", prompt_tokens=1_000_000))
        log.close(PATIENCE)
        self.assertEqual(lines_of(self.path)[0]["saved_usd"], 2.0)


class Trouble(InAFolder):
    def failing(self, error: int) -> tuple[Callable[[int, bytes], int], threading.Event]:
        """An os.write() that fails until the event is set."""
        healed = threading.Event()

        def write(file: int, data: bytes) -> int:
            if not healed.is_set():
                raise OSError(error, os.strerror(error))
            return os.write(file, data)

        return write, healed

    def until_told(self, words: str) -> None:
        """Wait until something with these words has been said."""
        while not any(words in text for text in self.said):
            self.told.clear()
            if any(words in text for text in self.said):
                return
            self.assertTrue(self.told.wait(PATIENCE), f"nobody said {words!r}: {self.said}")

    def test_a_full_disk_is_said_once_and_healed(self):
        """Nothing that was in hand is lost, and the end is said as well."""
        write, healed = self.failing(28)
        log = self.log(write=write)
        log.record(a_record(1))
        self.until_told("No space left")
        self.assertIn("No space left", log.problem or "")
        log.record(a_record(2))
        healed.set()
        self.until_told("works again")
        log.close(PATIENCE)
        self.assertEqual((len(self.said), log.problem, log.dropped), (2, None, 0))
        self.assertEqual([found["id"] for found in lines_of(self.path)], ["r1", "r2"])

    def test_a_full_disk_for_stderr_as_well(self):
        """What can't be said is not said; the log goes on all the same."""
        write, healed = self.failing(28)
        refused = threading.Event()

        def refuse(*_: object) -> None:
            refused.set()
            raise OSError(28, "No space left on device")

        with mock.patch("sys.stderr", SimpleNamespace(write=refuse, flush=refuse)):
            log = Log(self.path, retry_after=0.01, write=write)
            log.record(a_record(1))
            self.assertTrue(refused.wait(PATIENCE))
            healed.set()
            wait_for(lambda: log.written == 1, "the line's being written")
            log.record(a_record(2))
            self.assertTrue(log.close(PATIENCE))
        self.assertEqual((2, 0, None), (log.written, log.dropped, log.problem))

    def test_a_file_where_the_folder_should_be(self):
        """The same as a folder that can't be written, which root always can: said, then used once it is there."""
        Path(self.folder, "portway").write_text("in the way")
        log = self.log()
        log.record(a_record(1))
        self.until_told("can't be written")
        os.unlink(os.path.join(self.folder, "portway"))
        self.until_told("works again")
        self.assertEqual(len(lines_of(self.path)), 1)

    def test_what_is_no_file_is_left_alone(self):
        """Nobody may read what goes into a FIFO; it is said, and nothing hangs."""
        os.mkdir(os.path.join(self.folder, "portway"))
        os.mkfifo(self.path)
        self.log().record(a_record(1))
        self.until_told("not a regular file")

    def test_closing_gives_up_a_file_that_refuses(self):
        """At once, and what was waiting counts as dropped."""
        write, _ = self.failing(28)
        log = self.log(write=write)
        log.record(a_record(1))
        self.until_told("No space left")
        log.record(a_record(2))
        self.assertTrue(log.close(PATIENCE))
        self.assertEqual((log.written, log.dropped), (0, 2))

    def test_a_file_that_was_removed_is_made_again(self):
        """With its folder."""
        file = LogFile(self.path)
        file.append([a_line(1)])
        os.unlink(self.path)
        os.rmdir(os.path.dirname(self.path))
        file.append([a_line(2)])
        file.close()
        self.assertEqual([found["n"] for found in lines_of(self.path)], [2])

    def test_a_cut_write_leaves_whole_lines(self):
        """Wherever it is cut: the rest goes in the next write, no line is glued or doubled."""
        lines = [a_line(1), a_line(2), a_line(3)]
        whole = b"".join(lines)
        for cut in range(len(whole)):
            with self.subTest(cut=cut), tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "log.jsonl")
                file = LogFile(path, write=full_after(cut))
                count = 0
                if cut < len(lines[0]):
                    with self.assertRaises(OSError):
                        file.append(lines)
                else:
                    count = file.append(lines)
                self.assertEqual(count, cut // len(lines[0]))
                self.assertEqual(Path(path).read_bytes(), b"".join(lines[:count]))
                file.append(lines[count:])
                file.close()
                self.assertEqual(Path(path).read_bytes(), whole)

    def test_short_writes_are_completed(self):
        """A write may take less than it was given without anything being wrong."""
        file = LogFile(self.path, write=lambda fd, data: os.write(fd, data[:7]))
        self.assertEqual(file.append([a_line(1), a_line(2)]), 2)
        file.close()
        self.assertEqual(Path(self.path).read_bytes(), a_line(1) + a_line(2))

    def test_a_disk_that_takes_less_than_a_line_is_no_reason_to_spin(self):
        """It counts as full, is said, and tried again only after a pause."""
        writes: list[int] = []

        def write(file: int, data: bytes) -> int:
            writes.append(len(data))
            if len(writes) % 2 == 0:
                raise OSError(28, "No space left on device")
            return os.write(file, data[:5])

        log = self.log(write=write)
        log.record(a_record())
        self.until_told("No space left")
        self.assertTrue(log.close(PATIENCE))
        self.assertEqual((log.written, log.dropped), (0, 1))
        self.assertEqual(Path(self.path).read_bytes(), b"")

    def test_a_half_line_of_a_killed_writer_goes(self):
        """But not one that somebody else wrote."""
        for before, after in (
            (a_line(1) + a_line(2)[:20], a_line(1)),
            (a_line(1) + b"{", a_line(1)),
            (a_line(2)[:20], b""),
            (b"my own notes", b"my own notes\n"),
            (a_line(1) + b"my own notes", a_line(1) + b"my own notes\n"),
        ):
            with self.subTest(before=before):
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                Path(self.path).write_bytes(before)
                file = LogFile(self.path)
                file.append([a_line(3)])
                file.close()
                self.assertEqual(Path(self.path).read_bytes(), after + a_line(3))

    def test_a_disk_that_is_full_at_a_byte(self):
        """With the kernel's own limit (RLIMIT_FSIZE): whole lines up to it, and all of them once there is room."""
        program = """
import resource, sys
from tests.test_telemetry import LogFile, a_line
path, limit = sys.argv[1], 1000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
file, lines = LogFile(path), [a_line(number) for number in range(40)]
done = file.append(lines)
try:
    file.append(lines[done:])
except OSError as exc:
    print(done, exc.errno)
print(open(path, "rb").read().endswith(b"}\\n"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.append(lines[done:])
"""
        if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
            self.skipTest("a limit is in force already")
        printed = subprocess.run(
            [sys.executable, "-c", program, self.path], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
        ).stdout
        self.assertEqual(printed.split(), [str(1000 // len(a_line(10))), "27", "True"])
        self.assertEqual([found["n"] for found in lines_of(self.path)], list(range(40)))


WRITER = """
import sys
from tests.test_telemetry import LogFile, a_line
path, name, count, max_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
file = LogFile(path, max_bytes, 1000)
print("ready", flush=True)
sys.stdin.read(1)
number = 0
while number < count:
    lines = [a_line(name * 1_000_000 + n, 200) for n in range(number, min(number + 7, count))]
    number += file.append(lines)
"""


class SeveralProcesses(InAFolder):
    def start(self, name: int, count: int, max_bytes: int) -> subprocess.Popen[bytes]:
        """A process that waits for a byte on stdin, then appends `count` lines."""
        command = [sys.executable, "-c", WRITER, self.path, str(name), str(count), str(max_bytes)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(process.wait, PATIENCE)
        self.addCleanup(process.kill)
        assert process.stdout is not None
        assert process.stdin is not None
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stdin.close)
        self.assertEqual(process.stdout.readline(), b"ready\n")
        return process

    def release(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        process.stdin.write(b"g")
        process.stdin.flush()

    def test_no_line_is_lost_broken_or_doubled(self):
        """Four of them, through many rotations."""
        processes = [self.start(name, 1000, 16_000) for name in range(4)]
        for process in processes:
            self.release(process)
        for process in processes:
            self.assertEqual(process.wait(PATIENCE), 0)
        found = [line["n"] for line in lines_of(self.path)]
        self.assertEqual(sorted(found), [name * 1_000_000 + n for name in range(4) for n in range(1000)])
        for name in range(4):  # the files are in order: each process's lines are
            own = [number for number in found if number // 1_000_000 == name]
            self.assertEqual(own, sorted(own))
        self.assertGreater(len(old_files(self.path)), 4)
        self.assertTrue(all(old.endswith(".gz") for old in old_files(self.path)))

    def test_kill_9_in_the_middle(self):
        """Whoever is killed holds up nobody, and leaves at most what the next writer mends."""
        for _ in range(5):
            doomed = self.start(1, 1_000_000, 10_000)
            self.release(doomed)
            size = -1
            while size < 5_000 and doomed.poll() is None:
                with contextlib.suppress(FileNotFoundError):  # it is being rotated
                    size = os.stat(self.path).st_size
            doomed.send_signal(signal.SIGKILL)
            doomed.wait(PATIENCE)
            file = LogFile(self.path, 10_000, 1000)
            self.assertEqual(file.append([a_line(7)]), 1)
            file.close()
        numbers = [found["n"] for found in lines_of(self.path)]
        self.assertEqual(numbers.count(7), 5)

    def test_who_is_killed_while_compressing_leaves_no_line_twice(self):
        """The next rotation finishes what lies about, whichever step it was."""
        for leftovers in (("1",), ("1", "1.gz"), ("1", "1.gz.new"), ("1", "1.gz", "1.gz.new")):
            with self.subTest(leftovers=leftovers), tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "log.jsonl")
                Path(path).write_bytes(a_line(2))
                for suffix in leftovers:
                    data = a_line(1) if suffix == "1" else gzip.compress(a_line(1))
                    Path(f"{path}.{suffix}").write_bytes(data if suffix != "1.gz.new" else b"half of it")
                self.assertEqual([found["n"] for found in lines_of(path)], [1, 2])
                file = LogFile(path, max_bytes=50)
                file.append([a_line(3)])
                file.close()
                self.assertEqual([found["n"] for found in lines_of(path)], [1, 2, 3])
                expected = ["log.jsonl", "log.jsonl.1.gz", "log.jsonl.2.gz", "log.jsonl.lock"]
                self.assertEqual(sorted(os.listdir(folder)), expected)


class Rotation(InAFolder):
    def test_old_files_are_compressed_and_bounded(self):
        """`keep` of them, the newest; keep = 0 is none at all."""
        for keep, left in ((3, [6, 7, 8, 9]), (0, [9])):
            with self.subTest(keep=keep), tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "log.jsonl")
                file = LogFile(path, max_bytes=50, keep=keep)
                for number in range(10):
                    file.append([a_line(number)])
                file.close()
                self.assertEqual([found["n"] for found in lines_of(path)], left)
                names = [f"{path}.{number}.gz" for number in range(keep, 0, -1)]
                self.assertEqual(old_files(path), names)

    def test_fewer_are_kept_when_told_so(self):
        """A smaller `keep` removes what is beyond it."""
        for keep in (4, 1):
            file = LogFile(self.path, max_bytes=50, keep=keep)
            for number in range(6):
                file.append([a_line(number)])
            file.close()
            self.assertEqual(len(old_files(self.path)), keep)

    def test_a_batch_larger_than_a_file_is_not_split(self):
        """It gets a file to itself; an empty file is not rotated for it."""
        file = LogFile(self.path, max_bytes=50)
        file.append([a_line(number) for number in range(5)])
        self.assertEqual(old_files(self.path), [])
        os.truncate(self.path, 0)
        file.append([a_line(number) for number in range(5)])
        self.assertEqual(old_files(self.path), [])
        file.append([a_line(5)])
        file.close()
        self.assertEqual([found["n"] for found in lines_of(self.path)], list(range(6)))
        self.assertEqual(len(old_files(self.path)), 1)

    def test_a_rotation_that_is_under_way_elsewhere_is_not_waited_for(self):
        """Lines go on into the file as it is, and it is rotated later."""
        file = LogFile(self.path, max_bytes=50)
        file.append([a_line(1)])
        with telemetry.undisturbed(self.path):
            file.append([a_line(2)])
            self.assertEqual(old_files(self.path), [])
        file.append([a_line(3)])
        file.close()
        self.assertEqual([found["n"] for found in lines_of(self.path)], [1, 2, 3])
        self.assertEqual(len(old_files(self.path)), 1)

    def test_a_rotation_that_somebody_else_has_done_meanwhile(self):
        """Whoever gets the lock second finds a new file with room in it, which stays."""
        file = LogFile(self.path, max_bytes=50)
        file.append([a_line(1)])
        file._rotate(1)  # as if it had looked full a moment before
        self.assertEqual(old_files(self.path), [])
        file.close()
        self.assertEqual([found["n"] for found in lines_of(self.path)], [1])

    def test_a_rotation_that_fails_loses_no_line(self):
        """The file grows, `problem` says so, and it ends by itself."""
        log = self.log(max_bytes=50)
        os.mkdir(os.path.dirname(self.path))
        os.mkdir(f"{self.path}.lock")  # in the way of the lock
        for number in range(3):
            log.record(a_record(number))
            while log.written <= number:
                self.assertTrue(log._writer.is_alive())
        self.assertIn("can't be rotated", log.problem or "")
        self.assertEqual(len(self.said), 1)
        os.rmdir(f"{self.path}.lock")
        log.record(a_record(3))
        log.close(PATIENCE)
        self.assertIsNone(log.problem)
        self.assertEqual([found["id"] for found in lines_of(self.path)], ["r0", "r1", "r2", "r3"])

    def test_no_room_to_compress(self):
        """What could not be compressed is kept as it is, counts once, and is compressed later."""
        file = LogFile(self.path, max_bytes=50)
        file.append([a_line(1)])
        with mock.patch("gzip.GzipFile", side_effect=OSError(28, "No space left on device")):
            file.append([a_line(2)])
        self.assertIsNotNone(file.trouble)
        self.assertEqual(old_files(self.path), [f"{self.path}.1"])
        self.assertFalse(os.path.exists(f"{self.path}.1.gz.new"))
        file.append([a_line(3)])
        file.close()
        self.assertIsNone(file.trouble)
        self.assertEqual([found["n"] for found in lines_of(self.path)], [1, 2, 3])
        self.assertEqual(old_files(self.path), [f"{self.path}.2.gz", f"{self.path}.1.gz"])

    def test_what_is_written_is_what_stats_reads(self):
        """From the record to the report, over rotated files."""
        log = self.log(max_bytes=2000)
        for number in range(20):
            log.record(a_record(number))
            while log.written <= number:
                self.assertTrue(log._writer.is_alive())
        log.close(PATIENCE)
        self.assertGreater(len(old_files(self.path)), 1)
        report = stats.summarize(self.path)
        self.assertEqual(report.broken, 0)
        self.assertEqual(report.models["fast-9b"].requests, len(lines_of(self.path)))


if __name__ == "__main__":
    unittest.main()
