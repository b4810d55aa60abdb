"""The command line: what it accepts, what it says, what it returns."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from portway import __version__, cli

ROOT = Path(__file__).resolve().parent.parent
VALID = '[backends.b]\nkind = "ollama"\nurl = "http://127.0.0.1:1"\n[models.m]\nbackend = "b"\nmodel = "x"\n'
KEYED = f'[server]\napi_keys = ["sk-1"]\n{VALID}'


class Outcome(NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str


def run(*argv: str) -> Outcome:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(argv)
    return Outcome(status, out.getvalue(), err.getvalue())


class CliTest(unittest.TestCase):
    """With a folder for configurations, and what a command starts replaced by a recorder."""

    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        clean = {"HOME": str(self.folder), "PATH": "/usr/bin:/bin"}
        self.enterContext(mock.patch.dict("os.environ", clean, clear=True))

    def write(self, text: str) -> str:
        """The path of a new configuration."""
        path = self.folder / "models.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def record(self, module: str, function: str) -> mock.Mock:
        """Replace portway.`module` by one whose `function` records its calls and returns 0."""
        recorder = mock.Mock(return_value=0)
        name = f"portway.{module}"
        package, _, leaf = name.rpartition(".")
        double = types.ModuleType(name)
        setattr(double, function, recorder)
        self.enterContext(mock.patch.dict(sys.modules, {name: double}))
        self.enterContext(mock.patch.object(importlib.import_module(package), leaf, double, create=True))
        return recorder


class HelpTest(CliTest):
    """What Portway says of itself."""

    def test_version(self) -> None:
        """--version is one line."""
        self.assertEqual((0, f"portway {__version__}\n", ""), run("--version"))

    def test_help(self) -> None:
        """--help, -h and help are the same, name every command, and go to stdout."""
        self.assertEqual((0, cli.HELP, ""), run("--help"))
        self.assertEqual(run("--help"), run("-h"))
        self.assertEqual(run("--help"), run("help"))
        for command in (*cli._commands(), "standin"):
            self.assertRegex(cli.HELP, rf"(?m)^  {command} +\w")

    def test_command_help_has_every_option(self) -> None:
        """Each command's own help describes exactly the options that it takes."""
        for name, command in cli._commands().items():
            with self.subTest(command=name):
                outcome = run(name, "--help")
                self.assertEqual((0, command.help, ""), outcome)
                described = re.findall(r"^  (--[a-z]+)", command.help.partition("Options:")[2], re.MULTILINE)
                self.assertEqual(sorted(command.options), sorted(described))
                in_usage = re.findall(r"\[(--[a-z]+)", command.help.splitlines()[0])
                self.assertEqual(sorted(command.options), sorted(in_usage))

    def test_exit_codes_are_documented(self) -> None:
        """The help lists every exit code there is."""
        listed = re.findall(r"^  (\d+) ", cli.HELP.partition("Exit status:")[2], re.MULTILINE)
        codes = [cli.OK, cli.FAILED, cli.USAGE, cli.BAD_CONFIG, cli.INTERRUPTED]
        self.assertEqual(sorted(codes), sorted(map(int, listed)))

    def test_lines_fit(self) -> None:
        """Help fits a terminal of 80 columns."""
        for text in (cli.HELP, *(command.help for command in cli._commands().values())):
            self.assertLess(max(map(len, text.splitlines())), 80)


class UsageTest(CliTest):
    """Command lines that can't be understood."""

    def test_nothing(self) -> None:
        """Without a command the help goes to stderr and the exit code is 2."""
        self.assertEqual((2, "", cli.HELP), run())

    def test_mistakes(self) -> None:
        """Each mistake is one line on stderr that says what was meant, or where to look; the exit code is 2."""
        for argv, said in {
            ("sevre",): "unknown command 'sevre'; did you mean serve?",
            ("--verison",): "unknown command '--verison'; did you mean --version?",
            ("frobnicate",): "unknown command 'frobnicate'; see `portway --help`",
            ("check", "--confg", "x"): "unknown option '--confg'; did you mean --config?",
            ("check", "models.toml"): "unknown argument 'models.toml'; see `portway check --help`",
            ("check", "--config"): "--config needs a value",
            ("check", "--config="): "--config needs a value",
            ("demo", "--once=1"): "--once takes no value",
            ("serve", "--port", "http"): "--port http: not a port, which is a whole number from 0 to 65535",
            ("serve", "--port=65536"): "--port 65536: not a port, which is a whole number from 0 to 65535",
            ("serve", "--port=-1"): "--port -1: not a port, which is a whole number from 0 to 65535",
        }.items():
            with self.subTest(argv=argv):
                self.assertEqual((2, "", f"portway: {said}\n"), run(*argv))


class CheckTest(CliTest):
    """portway check."""

    def test_shipped(self) -> None:
        """The configuration that comes with Portway is valid."""
        outcome = run("check")
        self.assertEqual((0, ""), (outcome.status, outcome.err))
        self.assertIn("models.toml: ok, ", outcome.out)

    def test_given(self) -> None:
        """--config FILE and --config=FILE read that file."""
        path = self.write(VALID)
        for argv in (("--config", path), (f"--config={path}",)):
            outcome = run("check", *argv)
            self.assertEqual(0, outcome.status, outcome.err)
            self.assertIn(path, outcome.out)

    def test_mistakes(self) -> None:
        """All mistakes are on stderr, one a line, and the exit code is 78."""
        path = self.write(VALID.replace("ollama", "olama").replace("model =", "modle ="))
        outcome = run("check", "--config", path)
        self.assertEqual((78, ""), (outcome.status, outcome.out))
        self.assertIn("backends.b.kind", outcome.err)
        self.assertIn("models.m.modle", outcome.err)
        self.assertIn("models.m.model: missing", outcome.err)

    def test_missing_file(self) -> None:
        """A file that is asked for and not there is a mistake, not a reason to read another one."""
        outcome = run("check", "--config", str(self.folder / "none.toml"))
        self.assertEqual(78, outcome.status)
        self.assertIn("none.toml", outcome.err)


class ServeTest(CliTest):
    """portway serve, up to where the daemon takes over."""

    def serve(self, *argv: str) -> Any:
        """The recorded call of serve.serve."""
        serve = self.record("commands.serve", "serve")
        outcome = run("serve", *argv)
        self.assertEqual((0, "", ""), outcome)
        return serve.call_args

    def test_configuration(self) -> None:
        """The daemon gets the checked configuration, and where it came from, to read it again."""
        path = self.write(VALID)
        call = self.serve("--config", path)
        self.assertEqual(path, call.args[0].path)
        self.assertEqual(path, call.kwargs["config_path"])
        self.assertEqual(11436, call.args[0].server.port)

    def test_found_configuration(self) -> None:
        """Without --config the daemon is told that it was found, so that it is found again."""
        self.assertIsNone(self.serve().kwargs["config_path"])

    def test_address(self) -> None:
        """--host and --port take the place of the file's."""
        server = self.serve("--config", self.write(VALID), "--host", "::1", "--port", "0").args[0].server
        self.assertEqual(("::1", 0), (server.host, server.port))

    def test_open_address_needs_keys(self) -> None:
        """An address that other machines can reach is refused on the command line as it is in the file."""
        serve = self.record("commands.serve", "serve")
        for host in ("0.0.0.0", "192.168.1.7", "::", "box.lan"):
            outcome = run("serve", "--config", self.write(VALID), "--host", host)
            self.assertEqual(2, outcome.status)
            self.assertIn("server.api_keys is empty", outcome.err)
        serve.assert_not_called()
        self.assertEqual("0.0.0.0", self.serve("--config", self.write(KEYED), "--host", "0.0.0.0").args[0].server.host)

    def test_bad_configuration(self) -> None:
        """With a mistake in the configuration nothing is started."""
        serve = self.record("commands.serve", "serve")
        self.assertEqual(78, run("serve", "--config", self.write("[modles]")).status)
        serve.assert_not_called()

    def test_exit_code(self) -> None:
        """The daemon's exit code is the command's."""
        self.record("commands.serve", "serve").return_value = 1
        self.assertEqual(1, run("serve", "--config", self.write(VALID)).status)


class OtherCommandsTest(CliTest):
    """What is only handed on."""

    def test_demo(self) -> None:
        """The demo gets its options."""
        demo = self.record("commands.demo", "main")
        self.assertEqual(0, run("demo").status)
        self.assertEqual(0, run("demo", "--live", "--port", "0", "--once").status)
        self.assertEqual(
            [mock.call(live=False, port=None, once=False), mock.call(live=True, port=0, once=True)],
            demo.call_args_list,
        )

    def test_standin(self) -> None:
        """The stand-in reads its own arguments, --help included."""
        standin = self.record("standin.server", "main")
        self.assertEqual(0, run("standin", "--port", "0", "--help").status)
        standin.assert_called_once_with(["--port", "0", "--help"])

    def test_residency(self) -> None:
        """ps, load, unload and models ask the daemon of the configuration that --config names, wherever it stands."""
        main = self.record("commands.residency", "main")
        path = self.write(f"[server]\nport = 12345\n{VALID}")
        for words in (["--config", path], [f"--config={path}"]):
            for name, more in (("ps", ["--json"]), ("models", []), ("load", ["m"]), ("unload", ["m"])):
                self.assertEqual(0, run(name, *words, *more).status)
                command, left, loaded = main.call_args.args
                self.assertEqual((name, more, 12345), (command, left, loaded.server.port))
        self.assertEqual(0, run("load", "m", "--config", path).status)
        self.assertEqual(["m"], main.call_args.args[1])
        self.assertEqual(2, run("ps", "--config").status)
        self.assertEqual(78, run("ps", "--config", "/nowhere.toml").status)

    def test_interrupt(self) -> None:
        """Ctrl-C ends a command without a traceback."""
        self.record("commands.demo", "main").side_effect = KeyboardInterrupt
        self.assertEqual((130, "", ""), run("demo"))


class OwnWordsTest(unittest.TestCase):
    """`stats`, `cache`, `ps`, .. read their words themselves, but for --config."""

    def setUp(self) -> None:
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(self.folder, "models.toml")
        more = f'[log]\nfile = "{self.folder}/a.jsonl"\n[cache]\nfile = "{self.folder}/a.sqlite3"\n'
        Path(self.path).write_text(f"{VALID}\n{more}\n[server]\nport = 2\n", encoding="utf-8")

    def test_they_read_the_named_configuration(self) -> None:
        """Wherever it stands among their words."""
        self.assertIn("a.jsonl", run("stats", f"--config={self.path}").out)
        self.assertIn("a.jsonl", run("stats", "--config", self.path, "--json").out)
        self.assertIn("a.sqlite3", run("cache", "--config", self.path).out)
        self.assertEqual((0, "0 entries deleted\n", ""), run("cache", "purge", "--config", self.path, "--model=x"))
        done = run("ps", "--json", "--config", self.path)
        self.assertEqual((3, ""), (done.status, done.out))
        self.assertIn("127.0.0.1:2 ", done.err)
        self.assertEqual(2, run("stats", "--config").status)

    def test_the_environments_configuration(self) -> None:
        """Without the option $PORTWAY_CONFIG says it, as for `serve`."""
        with mock.patch.dict(os.environ, {"PORTWAY_CONFIG": self.path}):
            self.assertIn("a.jsonl", run("stats").out)
            self.assertIn("a.sqlite3", run("cache").out)

    def test_a_broken_configuration(self) -> None:
        """It is 78, but help is still given."""
        Path(self.path).write_text("[models", encoding="utf-8")
        for command in ("stats", "cache", "ps", "models", "load", "unload"):
            self.assertEqual(78, run(command, "--config", self.path).status)
            done = run(command, "--config", self.path, "--help")
            self.assertEqual((0, ""), (done.status, done.err))
            self.assertIn("--config FILE", done.out)


class ProcessTest(unittest.TestCase):
    """The command line as a program."""

    def test_reader_leaves(self) -> None:
        """When whoever reads the output has seen enough, there is no traceback."""
        command = [sys.executable, "-I", "-S", str(ROOT / "portway"), "--help"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.close()
            _, err = process.communicate(timeout=10)
        self.assertEqual((1, b""), (process.returncode, err))

    def test_check_is_light(self) -> None:
        """`check` starts without the modules that only serving needs."""
        code = "import sys; from portway.cli import main; main(['check']); print(*sys.modules, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        heavy = {"argparse", "asyncio", "email", "http.client", "http.server", "json", "logging", "pathlib"}
        heavy |= {"selectors", "socket", "ssl", "subprocess", "threading", "urllib.request"}
        self.assertEqual(set(), heavy & set(done.stderr.split()))

    def test_serve_is_light(self) -> None:
        """The daemon starts without what http.server would bring and it seldom needs; who needs it finds it."""
        code = (
            "import sys; from portway import cli\n"
            "cli.main(['serve', '--config', '/nowhere.toml'])\n"
            "heavy = [name for name in ('ssl', '_hashlib', 'bz2', 'lzma') if name in sys.modules]\n"
            "print(*heavy, 'http.server' in sys.modules)\n"
            "import ssl, bz2, lzma"
        )
        done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        self.assertEqual("True", done.stdout.strip())

    def test_sha256_is_there_in_every_python(self) -> None:
        """Some have it from OpenSSL alone: keys are compared by it."""
        code = (
            "import sys; sys.modules.update(_sha2=None, _sha256=None, _sha512=None)\n"
            "from portway import cli; cli.main(['serve', '--config', '/nowhere.toml'])\n"
            "from portway.keys import digest_of; print(digest_of('').hex()[:8])"
        )
        done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        self.assertEqual("e3b0c442", done.stdout.strip())
