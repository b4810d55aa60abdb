"""The lines that `ask` itself adds to the log: where the daemon can't know how it ended, and nowhere else."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import threading
import time
import unittest
from typing import Any
from unittest import mock

from portway import telemetry
from portway.ask import journal
from portway.ask.command import Errand
from portway.commands import stats
from tests.doubles import CLOSE, PATIENCE, Action, json_reply, stream_head
from tests.test_ask import END, AskTestCase, Screen, completion, delta, event

ID = "chatcmpl-1"


class JournalCase(AskTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.log = self.folder / ".local" / "share" / "portway" / "log.jsonl"
        self.log.parent.mkdir(parents=True)
        self.log.touch(0o600)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def line(self) -> tuple[int, str, str | None]:
        """The one line's exit code, error and id; the file is emptied."""
        (line,) = self.lines()
        self.log.write_text("")
        self.assertEqual(("ask", "ask"), (line["client"], line["endpoint"]))
        return line["exit_code"], line["error"], line["id"]

    def answer(self, text: str, *arguments: str, **options: Any) -> int:
        """The exit code of an ask that is answered so."""
        self.server.add(json_reply({**completion(text), "id": ID}))
        return self.ask("q", *arguments, **options).returncode


class Noted(JournalCase):
    def test_no_daemon(self) -> None:
        """Exit code 3: there is nobody else to write it down."""
        done = self.ask("-m", "fast-9b", "q", environ={"PORTWAY_URL": "http://127.0.0.1:9"})
        self.assertEqual(3, done.returncode)
        self.assertEqual(["fast-9b"], [line["model"] for line in self.lines()])
        self.assertEqual((3, "not_running", None), self.line())
        self.ask("--9b", "q", environ={"PORTWAY_URL": "http://127.0.0.1:9"})
        self.assertIsNone(self.lines()[0]["model"])  # what the tier stands for, only the daemon knows

    def test_an_answer_that_will_not_do(self) -> None:
        """The daemon has answered, and ask has nothing to hand on: exit code 1, under the answer's id."""
        for text, option, error in (("prose", "-x", "no_code_block"), ("prose", "--json", "not_json")):
            self.assertEqual(1, self.answer(text, option))
            self.assertEqual((1, error, ID), self.line())
        self.assertEqual(1, self.answer(""))
        self.assertEqual((1, "empty_answer", ID), self.line())

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_an_answer_that_can_not_be_written(self) -> None:
        """A full disk."""
        self.server.add(json_reply({**completion("Hi."), "id": ID}))
        with open("/dev/full", "wb") as full:
            process = self.start("q", stdout=full)
            self.assertEqual(1, process.wait(PATIENCE))
        self.assertEqual((1, "not_written", ID), self.line())

    def test_a_reader_that_has_gone(self) -> None:
        """Exit code 141, whose cause looks from the daemon like an answer that was read."""
        self.server.add(json_reply({**completion("Hi."), "id": ID}))
        process = self.start("q", stdin=subprocess.PIPE)
        assert process.stdin and process.stdout
        process.stdout.close()
        process.stdin.close()
        self.assertEqual(141, process.wait(PATIENCE))
        self.assertEqual((141, "pipe_closed", ID), self.line())

    def test_a_half_line_is_not_continued(self) -> None:
        """A daemon that was killed may have left one."""
        self.log.write_text('{"ts":"2026-')
        self.ask("q", environ={"PORTWAY_URL": "http://127.0.0.1:9"})
        half, whole = self.log.read_text().splitlines()
        self.assertEqual(('{"ts":"2026-', 3), (half, json.loads(whole)["exit_code"]))


class LeftToTheDaemon(JournalCase):
    """What it knows is not written twice."""

    def tearDown(self) -> None:
        self.assertEqual([], self.lines())
        super().tearDown()

    def test_what_was_answered(self) -> None:
        """Also in code, in JSON, and cut short."""
        self.assertEqual(0, self.answer("Hi."))
        self.assertEqual(0, self.answer("```\nx\n```", "-x"))
        self.assertEqual(0, self.answer("{}", "--json"))

    def test_what_was_refused(self) -> None:
        """Unknown models, failed chains, --strict, broken answers."""
        for status, arguments in ((400, []), (502, []), (502, ["--strict"])):
            error = {"error": {"message": "no", "code": "server_error"}}
            self.server.add(json_reply(error, status, {"X-Portway-Attempts": "a=server_error(0.0s)"}))
            self.assertIn(self.ask("q", *arguments).returncode, (1, 4))
        self.server.add([CLOSE])
        self.assertEqual(1, self.ask("q").returncode)

    def test_what_was_never_asked(self) -> None:
        """Mistakes on the command line, the manual, the last answer."""
        for arguments in (["--help"], ["-t", "9", "q"], ["-f", "/nonexistent"], ["--last"], ["--completion", "x"]):
            self.ask(*arguments)

    def test_a_ctrl_c(self) -> None:
        """The daemon sees the client leave."""
        screen = Screen(self)
        script: list[Action] = [stream_head() + event(delta("Hi")), threading.Event()]
        self.server.add(script)
        options = {"stdin": screen.slave, "stdout": screen.slave, "stderr": screen.slave}
        process = self.start("q", **options, preexec_fn=lambda: os.login_tty(0))
        os.close(screen.slave)
        screen.wait_for("Hi")
        process.send_signal(signal.SIGINT)
        self.assertEqual(130, process.wait(PATIENCE))

    def test_a_stream_that_fails(self) -> None:
        """It said so itself."""
        screen = Screen(self)
        self.server.add([stream_head() + event(delta("Hi")) + event({"error": {"message": "no"}}) + END])
        options = {"stdin": screen.slave, "stdout": screen.slave, "stderr": screen.slave}
        process = self.start("q", **options, preexec_fn=lambda: os.login_tty(0))
        os.close(screen.slave)
        screen.wait_end()
        self.assertEqual(1, process.wait(PATIENCE))


class NoLog(AskTestCase):
    def test_none_is_made(self) -> None:
        """Who never ran the daemon, or wants no log, gets none; nor does it matter."""
        done = self.ask("q", environ={"PORTWAY_URL": "http://127.0.0.1:9"})
        self.assertEqual(3, done.returncode)
        folder = self.folder / ".local" / "share" / "portway" / "log.jsonl"
        folder.parent.mkdir(parents=True)
        self.ask("q", environ={"PORTWAY_URL": "http://127.0.0.1:9"})
        self.assertEqual([], list(self.folder.rglob("log.jsonl")))
        folder.mkdir()
        done = self.ask("q", environ={"PORTWAY_URL": "http://127.0.0.1:9"})
        self.assertEqual((3, 1), (done.returncode, done.stderr.count(b"\n")))


class Together(JournalCase):
    """With the daemon, which writes the same file."""

    def test_its_form_is_the_daemons(self) -> None:
        """The same fields in the same order, and the same place."""
        errand = Errand()
        errand.model, errand.id = "m", ID
        journal.note(errand, 1, "not_json", self.environ)
        ours = self.lines()[0]
        theirs = json.loads(telemetry.line(telemetry.Record(0.0, 0.0), telemetry.Price()))
        self.assertEqual(list(theirs), list(ours))
        self.assertRegex(ours["ts"], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertTrue(self.log.read_bytes().startswith(telemetry.LINE_START))
        for environ in ({"XDG_DATA_HOME": "/d"}, {"XDG_DATA_HOME": "d", "HOME": "/h"}, {"HOME": "/h"}):
            self.assertEqual(telemetry.log_path(environ), journal.log_path(environ))

    def test_whoever_writes_just_now_is_waited_for(self) -> None:
        """For a moment, and no longer."""
        with self.log.open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            journal.note(Errand(), 3, "not_running", self.environ)
            self.assertEqual("", self.log.read_text())
            with mock.patch.object(journal, "PATIENCE", PATIENCE):
                waiting = threading.Thread(target=journal.note, args=(Errand(), 3, "not_running", self.environ))
                waiting.start()
                fcntl.flock(held, fcntl.LOCK_UN)
                waiting.join(PATIENCE)
        self.assertEqual((3, "not_running", None), self.line())

    def test_a_rotation_in_between(self) -> None:
        """If the file was renamed before it could be locked, the line goes to the new one."""
        rotated = self.folder / "rotated"
        lock = journal._locked

        def locked(file: int) -> bool:
            if not rotated.exists():
                self.log.rename(rotated)
                self.log.touch(0o600)
            return lock(file)

        with mock.patch.object(journal, "_locked", locked):
            journal.note(Errand(), 3, "not_running", self.environ)
        self.assertEqual((3, "not_running", None), self.line())
        self.assertEqual("", rotated.read_text())

    def test_stats_counts_it_apart(self) -> None:
        """A request that the daemon has a line for is not counted twice, and one without a daemon is told."""
        record = telemetry.Record(time.time(), 1.0, model="m", served_by="m", endpoint="chat", status=200, ended=2.0)
        self.log.write_bytes(telemetry.line(record, telemetry.Price()))
        for error in ("not_json", "not_running", "not_running"):
            journal.note(Errand(), 1, error, self.environ)
        report = stats.summarize(str(self.log))
        self.assertEqual((1, 2, 0), (report.total().requests, report.not_running, report.broken))
        self.assertEqual(["m"], list(report.models))
        table = stats.as_table(report, str(self.log), stats.Options(), bars=False)
        self.assertIn("2 times `ask` found no Portway running.", table)
        self.assertEqual(2, stats.as_json(report, "", stats.Options())["ask_found_no_daemon"])


if __name__ == "__main__":
    unittest.main()
