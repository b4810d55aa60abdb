"""commands/stats.py: what `portway stats` says of a log, whatever state the log is in."""

import contextlib
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from portway.cache.store import Cache
from portway.commands import probe, stats
from portway.commands.stats import HELP, Figures, Piece, main, parse, quantile, read, read_options, summarize
from portway.telemetry import LogFile, Price, Record, line, old_files
from tests.daemon import Daemon
from tests.doubles import ScriptedServer, json_reply
from tests.llama_server import wait_for

ROOT = Path(__file__).resolve().parent.parent
NOON = 1795003200.0  # 2026-11-18T12:00:00Z


def a_line(number: int = 0, **fields: Any) -> bytes:
    """A request that came `number` minutes after noon, as the daemon writes it."""
    given = {"model": "fast-9b", "served_by": "fast-9b", "endpoint": "chat", "status": 200, "host": "127.0.0.1"}
    record = Record(NOON + 60 * number, 100.0, **{"ended": 101.0, **given, **fields})
    return line(record, Price(1.0, 2.0))


class InAFolder(unittest.TestCase):
    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory(prefix="portway-stats-"))
        self.path = os.path.join(self.folder, "log.jsonl")

    def write(self, *lines: bytes) -> None:
        Path(self.path).write_bytes(b"".join(lines))

    def run_main(self, *words: str, environ: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            words = words if environ is not None else (*words, "--log", self.path)
            status = main(words, environ or {})
        return status, out.getvalue(), err.getvalue()

    def as_json(self, *words: str) -> dict[str, Any]:
        status, out, _ = self.run_main("--json", *words)
        self.assertEqual(status, 0)
        found: dict[str, Any] = json.loads(out)
        return found


class Figured(InAFolder):
    """The numbers."""

    def test_a_model_in_numbers(self):
        """Each number from lines of which the answer is known."""
        self.write(
            *(a_line(n, ended=100.0 + n, first=100.0 + n / 10, cache_hit=False) for n in range(1, 101)),
            a_line(200, cache_hit=True, host="api.openai.com", prompt_tokens=1_000_000, completion_tokens=1_000_000),
            a_line(201, served_by="fast-1b", host="api.openai.com", completion_tokens=50, decode_s=2.0),
            a_line(202, status=502, served_by="", host="", error="server_error", ended=900.0),
            a_line(203, status=200, cancelled_in="answer", ended=900.0),
        )
        found = self.as_json()["models"]["fast-9b"]
        expected = {
            "requests": 104,
            "answered": 102,
            "errors": 1,
            "cancelled": 1,
            "demoted": 1,
            "demotion_rate": round(1 / 104, 6),
            "cache_lookups": 101,
            "cache_hits": 1,
            "hit_rate": round(1 / 101, 6),
            "latency_s": {"p50": 49.0, "p95": 95.0, "p99": 99.0},
            "ttft_s": {"p50": 5.0, "p95": 9.5, "p99": 9.9},
            "tokens_per_s": 25.0,
            "prompt_tokens": 1_000_000,
            "completion_tokens": 1_000_050,
            "local_rate": round(101 / 102, 6),
            "saved_usd": 3.0,
        }
        self.assertEqual(found, expected)
        self.assertEqual(self.as_json()["total"], expected)

    def test_models_are_ranked_and_added_up(self):
        """The most used first; what names no model is told apart, and `ask`'s own lines are not counted."""
        self.write(
            a_line(model="b"), a_line(model="b"), a_line(model="a"), a_line(model="", endpoint="/health"),
            a_line(model="a", endpoint="ask", exit_code=4),
        )  # fmt: skip
        found = self.as_json()
        self.assertEqual(list(found["models"]), ["b", "a"])
        self.assertEqual((found["total"]["requests"], found["without_model"]), (3, 1))

    def test_since_and_model_choose(self):
        """By time, by name, by both."""
        self.write(*(a_line(n, model=name) for n in range(4) for name in ("a", "b")))
        self.assertEqual(self.as_json("--since", "2026-11-18T12:02")["total"]["requests"], 4)
        self.assertEqual(self.as_json("--model", "a")["total"]["requests"], 4)
        self.assertEqual(list(self.as_json("--model=a")["models"]), ["a"])
        self.assertEqual(self.as_json("--since=2026-11-18T12:03", "--model", "a")["total"]["requests"], 1)

    def test_a_quantile_is_a_value_that_was_measured(self):
        """The nearest rank."""
        self.assertIsNone(quantile([], 0.5))
        for share, value in ((0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4), (0.99, 4), (1.0, 4), (0.0, 1)):
            self.assertEqual(quantile([1, 2, 3, 4], share), value, share)

    def test_figures_merge(self):
        """Two halves say what the whole says."""
        halves, whole = (Figures(), Figures()), Figures()
        for number in range(20):
            text = a_line(number, first=100.5, cache_hit=number % 3 == 0, prompt_tokens=number, completion_tokens=9)
            found = json.loads(text)
            halves[number % 2].add(found)
            whole.add(found)
        halves[0].merge(halves[1])
        halves[0].latency, halves[0].saved_usd = whole.latency, whole.saved_usd  # order, and rounding
        self.assertEqual(halves[0], whole)


class Reading(InAFolder):
    """Files in every state."""

    def test_broken_lines_are_counted_and_skipped(self):
        """Half lines, glued lines, alien lines, wrong types, NULs after a crash, in the midst of good ones."""
        good = a_line()
        for bad in (
            b"\n\n",
            b"\0\0\0\0\n",
            b"not json\n",
            good[:40] + b"\n",
            good[:40] + good,
            good[:-1] + good,
            b"[]\n",
            b"null\n",
            b"7\n",
            b'{"ts":"x"}\n',
            b'{"ts":7,"model":"m","endpoint":"chat"}\n',
            b'{"ts":"2026-11-18T12","model":["m"],"endpoint":"chat"}\n',
            b'{"ts":"2026-11-18T12","model":"m","endpoint":"chat","exit_code":0,"latency_s":"x"}\n',
            b'{"ts":"\xff\xfe"}\n',
            b'{"ts":' + b"[" * 5000 + b"\n",
            b'{"ts":"a","x":[{}\n{"ts":"b"}]}\n',
        ):
            with self.subTest(bad=bad[:30]):
                self.write(good, bad, good)
                found = self.as_json()
                blank = not bad.strip()
                self.assertEqual(found["broken_lines"], 0 if blank else 2 if bad.count(b"\n") == 2 else 1)
                self.assertEqual(found["models"]["fast-9b"]["requests"], 2)

    def test_lines_in_one_array_are_what_they_are_one_by_one(self):
        """Also when a broken pair could pass for one line and a glued one for two."""
        block = b'{"ts":"1","a":[{}\n{"ts":"2"}]}\n{"ts":"3"},{"ts":"4"}\n'
        self.assertEqual(parse(block), ([], 3))
        for glued in (b'{"ts":"3"},{}\n', b'{"ts":"3"},7\n'):
            self.assertEqual(parse(b'{"a":[{}\n{"ts":"2"}]}\n' + glued), ([], 3))
            self.assertEqual(parse(b'{"ts":"1","a":[{}\n{"ts":"2"}]}\n' + glued), ([], 3))
        block = b'{"ts":"1"}\n{"ts":"2","a":"}"}\n'
        self.assertEqual(parse(block), stats._parse_each(block))
        self.assertEqual(len(parse(block)[0]), 2)

    def test_a_last_line_without_its_end_counts_if_it_is_whole(self):
        """The end may come with the next write."""
        self.write(a_line(), a_line()[:-1])
        self.assertEqual(self.as_json()["total"]["requests"], 2)

    def test_every_line_belongs_to_one_piece(self):
        """However a file is cut into pieces and blocks."""
        lines = [a_line(n, client="x" * (n % 50)) for n in range(60)]
        self.write(*lines)
        size = os.path.getsize(self.path)
        for share, at_once in ((1, 1), (len(lines[0]), 7), (1000, 3000), (997, 1), (size, 100), (size + 1, size + 1)):
            with self.subTest(share=share, at_once=at_once), mock.patch.object(stats, "BLOCK", at_once):
                pieces = [Piece(self.path, at, min(at + share, size)) for at in range(0, size, share)]
                found = [text for piece in pieces for block in stats._blocks(piece) for text in block.splitlines(True)]
                self.assertEqual(found, lines)

    def test_rotated_files_are_read_too(self):
        """Compressed or not, a damaged one as far as it goes."""
        self.write(a_line(3))
        Path(f"{self.path}.1").write_bytes(a_line(2))
        Path(f"{self.path}.2.gz").write_bytes(gzip.compress(a_line(1)))
        self.assertEqual(self.as_json()["total"]["requests"], 3)
        Path(f"{self.path}.3.gz").write_bytes(gzip.compress(os.urandom(10_000))[:5_000])
        Path(f"{self.path}.4.gz").write_bytes(b"no gzip")
        found = self.as_json()
        self.assertEqual(found["total"]["requests"], 3)
        self.assertGreaterEqual(found["broken_lines"], 2)

    def test_files_from_before_are_not_opened(self):
        """A rotated file that was closed before `--since` has nothing to say."""
        old = f"{self.path}.1.gz"
        Path(old).write_bytes(b"no gzip")
        os.utime(old, (NOON - 3600, NOON - 3600))
        self.write(a_line(1))
        self.assertEqual(summarize(self.path, "2026-11-18T12:00").broken, 0)
        self.assertEqual(summarize(self.path, "2026-11-18T11:00").broken, 1)

    def test_several_processes_say_what_one_says(self):
        """A log large enough to be shared."""
        self.write(*(a_line(n, model=f"m{n % 3}", first=100.5) for n in range(300)))
        alone = self.as_json()
        with mock.patch.object(stats, "SHARE", 40_000), mock.patch.object(os, "cpu_count", lambda: 2):
            self.assertEqual(self.as_json(), alone)

    def test_no_file_is_renamed_while_all_are_read(self):
        """Else a line could be counted twice, or never: rotation waits, lines don't."""
        self.write(a_line())
        pieces = stats._pieces

        def write_meanwhile(paths: list[str], since: str) -> list[Piece]:
            file = LogFile(self.path, max_bytes=10)
            file.append([a_line(1)])
            file.close()
            return list(pieces(paths, since))

        with mock.patch.object(stats, "_pieces", write_meanwhile):
            self.assertEqual(self.as_json()["total"]["requests"], 2)
        self.assertEqual(old_files(self.path), [])

    def test_read_gives_the_lines(self):
        """In order, from a moment on, without the broken ones."""
        self.write(a_line(1), b"broken\n", a_line(2))
        Path(f"{self.path}.1.gz").write_bytes(gzip.compress(a_line(0)))
        paths = [f"{self.path}.1.gz", self.path, f"{self.path}.absent"]
        self.assertEqual([found["ts"][14:16] for found in read(paths)], ["00", "01", "02"])
        self.assertEqual([found["ts"][14:16] for found in read(paths, "2026-11-18T12:01")], ["01", "02"])


class CommandLine(InAFolder):
    def test_no_log_yet(self):
        """That is no error, in either form, with or without its folder; nothing is made."""
        status, out, err = self.run_main(environ={"XDG_DATA_HOME": self.folder})
        self.assertEqual((status, err), (0, ""))
        self.assertIn(f"No log yet at {self.folder}/portway/log.jsonl", out)
        self.assertIn("No log yet", self.run_main()[1])
        self.assertEqual(self.as_json()["total"]["requests"], 0)
        self.assertIsNone(self.as_json()["total"]["latency_s"]["p50"])
        self.assertFalse(os.path.exists(os.path.join(self.folder, "portway")))

    def test_no_request_of_the_kind(self):
        """A log in which nothing fits says so."""
        self.write(a_line())
        self.assertIn(
            "No requests for nobody since 2026-12-01", self.run_main("--model=nobody", "--since=2026-12-01")[1]
        )

    def test_wrong_words_exit_2_with_help(self):
        """On stderr, the reason first."""
        for words, reason in (
            (["--sinse", "7d"], "unknown argument '--sinse'"),
            (["fast-9b"], "unknown argument 'fast-9b'"),
            (["--json=1"], "unknown argument '--json=1'"),
            (["--since"], "--since needs a value"),
            (["--model="], "--model needs a value"),
            (["--since", "7 days"], "--since 7 days: neither a time span"),
            (["--since", "2026-13-01"], "--since 2026-13-01: neither"),
        ):
            with self.subTest(words=words):
                status, out, err = self.run_main(*words, environ={})
                self.assertEqual((status, out), (2, ""))
                self.assertIn(reason, err.splitlines()[0])
                self.assertIn("usage: portway stats", err)

    def test_help_names_every_option(self):
        """And is no wider than a terminal."""
        self.assertEqual(self.run_main("--help"), (0, HELP, ""))
        for option in ("--since", "--model", "--json", "--log"):
            self.assertIn(option, HELP)
        self.assertLessEqual(max(map(len, HELP.splitlines())), 80)

    def test_since(self):
        """Spans count back from now; dates stand for their beginning."""
        for given, ts in (
            ("90s", "2026-11-18T11:58:30.000Z"),
            ("45m", "2026-11-18T11:15:00.000Z"),
            ("12h", "2026-11-18T00:00:00.000Z"),
            ("7d", "2026-11-11T12:00:00.000Z"),
            ("4w", "2026-10-21T12:00:00.000Z"),
            ("9999w", "1970-01-01T00:00:00.000Z"),
            ("2026-11-01", "2026-11-01"),
            ("2026-11-01T08:30Z", "2026-11-01T08:30"),
        ):
            self.assertEqual(read_options(["--since", given], NOON).since, ts)

    def test_the_table(self):
        """A row for each model and one for all, aligned; plain where stdout is no terminal."""
        self.write(
            *(a_line(n, ended=100.0025, cache_hit=n % 2 == 0) for n in range(10)),
            a_line(11, model="fast-1b", served_by="fast-1b", first=100.3, ended=112.3, completion_tokens=241),
            a_line(12, model="", endpoint="/health"),
            b"broken\n",
        )
        _, out, _ = self.run_main()
        self.assertTrue(out.isascii())
        rows = [re.split(r"  +", row) for row in out.splitlines()[2:6]]
        ms = "2.5ms/2.5ms/2.5ms"
        self.assertEqual(rows[1], ["fast-9b", "10", "50%", "0%", "0%", ms, "-", "-", "100%", "0.00"])
        self.assertEqual(rows[2][5:8], ["12.3s/12.3s/12.3s", "300ms/300ms/300ms", "20"])
        self.assertEqual((rows[3][0], len({len(row) for row in out.splitlines()[2:6]})), ("all", 1))
        self.assertIn("1 more requests named no model.", out)
        self.assertIn("1 lines could not be read.", out)

    def test_the_daemons_troubles_are_told(self):
        """What the running daemon says of log and cache, below the table and in the document; not of another log."""
        self.write(a_line(1))
        health = {
            "log": {"dropped": 1200, "problem": "the log can't be written: x"},
            "cache": {"dropped": 3, "problem": "the cache's file \x1b is locked", "notice": "it was corrupt"},
        }
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            self.assertEqual(0, main([], {}, log=self.path, health=lambda: health))
            main(["--log", self.path], {}, health=lambda: health)
            main([], {}, log=self.path, health=lambda: {"log": None, "cache": {"dropped": 0, "problem": None}})
            main([], {}, log=self.path)
        expected = ["Now: the log can't be written: x.", "1,200 lines were lost since Portway was started."]
        expected += ["Now: the cache's file ? is locked.", "3 answers were not stored since Portway was started."]
        expected += ["Note: it was corrupt."]
        told = [
            line for line in out.getvalue().splitlines() if line.startswith(("Now", "Note")) or "since Port" in line
        ]
        self.assertEqual(expected, told)
        for said, beside in (
            (health, health),
            (None, None),
            ({"log": None, "uptime_s": 1}, {"log": None, "cache": None}),
        ):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                main(["--json"], {}, log=self.path, health=lambda: said)  # noqa: B023
            self.assertEqual(beside, json.loads(out.getvalue())["daemon"])

    def test_the_running_daemon_is_asked(self):
        """Through GET /health, with the configured key; nobody there, or another program, is no answer."""
        broken = Cache("/dev/null/cache.sqlite3", say=lambda _: None)
        self.addCleanup(broken.close)
        toml = '[server]\napi_keys = ["sk-1"]\n[backends.b]\nkind = "ollama"\nurl = "http://127.0.0.1:9"\n'
        with Daemon(f'{toml}[models.m]\nbackend = "b"\nmodel = "m"\n', cache=broken) as daemon:
            config = replace(daemon.config, server=replace(daemon.config.server, port=daemon.port))
            wait_for(lambda: bool(broken.problem), "the cache's trouble")
            told = probe.health(config, {})
            assert told is not None
            self.assertIn("can't be used", told["cache"]["problem"])
        self.assertIsNone(probe.health(config, {}))
        with ScriptedServer() as other:
            other.add(json_reply({"status": "ok"}))
            self.assertIsNone(probe.health(replace(config, server=replace(config.server, port=other.port)), {}))

    def test_bars_are_for_terminals_that_can_show_them(self):
        """A UTF-8 terminal has a sparkline; each row's busiest time is a full block."""
        self.write(*(a_line(60 * hour) for hour in range(24) for _ in range(1 + hour)))

        class Terminal(io.StringIO):
            encoding = "UTF-8"

            def isatty(self):
                return True

        terminal = Terminal()
        with contextlib.redirect_stdout(terminal):
            main(["--log", self.path], {})
        bars = re.findall("[\u2581-\u2588]+", terminal.getvalue())
        self.assertEqual(bars, ["\u2581\u2582\u2582\u2583\u2584\u2584\u2585\u2586\u2586\u2587\u2588\u2588"])

    def test_shares_are_never_rounded_to_none_or_all(self):
        """One failure in 100,000 is not 0%, and not all is not 100%."""
        for rate, text in (
            (None, "-"),
            (0.0, "0%"),
            (1.0, "100%"),
            (0.00001, "0.1%"),
            (0.99999, "99.9%"),
            (0.5, "50%"),
        ):
            self.assertEqual(stats._percent(rate), text)

    def test_no_name_in_a_log_commands_the_terminal(self):
        """Escapes are shown as question marks, in rows and in what was asked for."""
        self.write(a_line(model="\x1b[2J"))
        self.assertNotIn("\x1b", self.run_main()[1])
        self.assertNotIn("\x1b", self.run_main("--model", "\x1b[1m")[1])

    def test_a_large_log_as_a_program(self):
        """With its helper processes, isolated as a service or a zipapp would run it."""
        block = b"".join(a_line(n) for n in range(1000))
        self.write(*([block] * (-(-(stats.SHARE + 1) // len(block)))))
        program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom portway.commands import stats\n"
        program += "if __name__ == '__main__': sys.exit(stats.main(sys.argv[1:]))\n"
        script = Path(self.folder, "run.py")
        script.write_text(program)
        command = [sys.executable, "-I", "-S", str(script), "--json", "--log", self.path]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        self.assertEqual(done.stderr, b"")
        self.assertEqual(json.loads(done.stdout)["total"]["requests"], os.path.getsize(self.path) // len(block) * 1000)


if __name__ == "__main__":
    unittest.main()
