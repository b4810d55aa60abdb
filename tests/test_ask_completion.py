"""`ask --completion`: the scripts in the shells that they are for, with a real TAB."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import unittest
from collections.abc import Mapping

from portway.ask import install as ask_install
from tests.doubles import PATIENCE
from tests.test_ask import MODELS, AskTestCase, Screen

CONTROL = re.compile(r"\x1b(\[[0-9;?>=]*[A-Za-z]|\][^\x07]*\x07|[=>()][A-Z0-9]?)|\x07|\r")


# what is typed before a tab -> what stands there after it
COMPLETED = {
    "ask --9": "ask --9b ",
    "ask why --3": "ask why --3b ",
    "ask -m fast-3": "ask -m fast-3b ",
    "ask --model=fast-9": "ask --model=fast-9b ",
    "ask --model emb": "ask --model embed ",
    "ask --completion f": "ask --completion fish ",
    "ask --show": "ask --show-thinking ",
    "ask -f notes.": "ask -f notes.md ",
    "ask -f notes\\ ": "ask -f notes\\ of\\ mine.txt ",
    "ask --schema=notes.": "ask --schema=notes.md ",
}


class Shell(AskTestCase):
    """An interactive shell on a terminal, with `ask` on its PATH and a server that knows some tiers."""

    def setUp(self) -> None:
        super().setUp()
        ask_install.install(str(self.folder / "bin"), self.environ)
        self.work = self.folder / "work"
        self.work.mkdir()
        for name in ("notes.md", "notes of mine.txt"):
            (self.work / name).write_text("x")
        self.shell_environ = {**self.environ, "PATH": f"{self.folder}/bin:{self.environ['PATH']}", "TERM": "xterm"}
        for _ in range(50):
            self.server.add(MODELS)

    def script(self, shell: str) -> str:
        """Where the shell's script now lies."""
        path = self.folder / f"_{shell}"
        path.write_bytes(self.ask("--completion", shell).stdout)
        return str(path)

    def begin(self, command: list[str], *lines: str) -> None:
        """Start the shell and have it run these lines."""
        self.screen = Screen(self)
        slave = self.screen.slave
        process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=self.work,
            env=self.shell_environ,
            preexec_fn=lambda: os.login_tty(0),  # noqa: PLW1509 - a system call, and nothing of Python's
        )
        os.close(slave)
        self.addCleanup(process.wait, PATIENCE)
        self.addCleanup(os.killpg, process.pid, signal.SIGKILL)
        for line in (*lines, "printf 'read%s\\n' y"):
            os.write(self.screen.master, line.encode() + b"\n")
        self.screen.wait_for("ready")

    def completes(self, rows: Mapping[str, str]) -> None:
        """Each line, as far as it was typed, becomes the other one by a TAB."""
        for typed, whole in rows.items():
            with self.subTest(typed):
                self.screen.seen, self.screen._bytes = "", b""
                os.write(self.screen.master, typed.encode() + b"\t")
                self.shows(whole)
                os.write(self.screen.master, b"\x15")

    def shows(self, text: str) -> None:
        """Wait until the screen has the text; what only moves the cursor is passed over."""
        plain = ""
        while text not in plain:
            before = self.screen._bytes
            self.screen.wait_for_more()
            plain = CONTROL.sub("", self.screen.seen)
            self.assertNotEqual(before, self.screen._bytes, f"{text!r} is not in {plain!r}")


class OfBash(Shell):
    @unittest.skipUnless(shutil.which("bash"), "needs bash")
    def test_a_tab(self) -> None:
        """The daemon's tiers and models, ask's own options, and file names, also behind a `=`."""
        self.begin(
            ["bash", "--norc", "--noprofile", "-i"],
            "bind 'set bell-style none'; bind 'set enable-bracketed-paste off'; PS1='> '",
            'eval "$(ask --completion bash)"',
        )
        self.completes(COMPLETED)


class OfZsh(Shell):
    @unittest.skipUnless(shutil.which("zsh"), "needs zsh")
    def test_a_tab(self) -> None:
        """Likewise, from a folder of $fpath and read by `source`."""
        functions = self.folder / "functions"
        functions.mkdir()
        shutil.copy(self.script("zsh"), functions / "_ask")
        for load in (f"fpath=({functions} $fpath); autoload -Uz compinit; compinit -u -D",
                     f"autoload -Uz compinit; compinit -u -D; source {self.script('zsh')}"):  # fmt: skip
            self.begin(["zsh", "-f", "-i"], "PROMPT='> '; unsetopt PROMPT_SP BEEP; stty cols 200", load)
            self.completes({**COMPLETED, "ask -mfast-3": "ask -mfast-3b "})


class OfFish(Shell):
    @unittest.skipUnless(shutil.which("fish"), "needs fish")
    def test_what_it_offers(self) -> None:
        """Likewise, and what each of them is."""
        script = self.script("fish")
        rows = {
            "ask --9": "--9b\tfast-9b",
            "ask why --3": "--3b\tfast-3b",
            "ask -m fast-3": "fast-3b\task this model",
            "ask --model=fast-9": "--model=fast-9b\task this model",
            "ask --completion f": "fish\tprint a completion script",
            "ask --show": "--show-thinking\tshow the reasoning",
            "ask -f notes.": "notes.md",
            "ask --schema notes.": "notes.md",
        }
        program = "".join(f"complete -C '{line}'; echo ---;" for line in rows)
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source {script}; {program}"],
            cwd=self.work,
            env=self.shell_environ,
            capture_output=True,
            encoding="utf-8",
            timeout=PATIENCE,
            check=False,
        )
        self.assertEqual("", done.stderr)
        self.assertEqual(list(rows.values()), [text.strip() for text in done.stdout.split("---\n")[:-1]])


if __name__ == "__main__":
    unittest.main()
