"""portway service: the units, what is run to install them, and what the managers' words mean."""

from __future__ import annotations

import contextlib
import io
import os
import plistlib
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from portway import __version__
from portway.commands import pack, service, service_units
from portway.commands.service import Done, System
from portway.commands.service_units import AGENT_KEYS, BadUnit, Job, agent, read_launchctl, read_systemctl, unit

ROOT = Path(__file__).resolve().parent.parent
VALID = '[backends.b]\nkind = "ollama"\nurl = "http://127.0.0.1:1"\n[models.m]\nbackend = "b"\nmodel = "x"\n'
KEYED = (
    VALID.replace("[models.m]", 'api_key = "env:CLOUD_KEY"\n[models.m]')
    + '[server]\napi_keys = ["env:OWN_KEY", "sk-1"]\n'
)

SAMPLE = Job(
    python="/usr/bin/python3",
    program="/home/you/.local/share/portway/portway.pyz",
    home="/home/you",
    log="/home/you/Library/Logs/portway.log",
    env_file="/home/you/.config/portway/env",
)
MAC_SAMPLE = Job(
    python="/opt/homebrew/bin/python3.13",
    program="/Users/you/.local/share/portway/portway.pyz",
    home="/Users/you",
    log="/Users/you/Library/Logs/portway.log",
)

RUNNING = """\
gui/501/io.github.portway = {
\tactive count = 1
\tpath = /Users/you/Library/LaunchAgents/io.github.portway.plist
\ttype = LaunchAgent
\tstate = running

\tprogram = /opt/homebrew/bin/python3.13
\targuments = {
\t\t/opt/homebrew/bin/python3.13
\t\t-I
\t}

\tdefault environment = {
\t\tPATH => /usr/bin:/bin:/usr/sbin:/sbin
\t}

\tdomain = gui/501 [100008]
\tminimum runtime = 10
\texit timeout = 40
\truns = 3
\tpid = 4242
\timmediate reason = inefficient
\tforks = 0
\texecs = 1
\tlast terminating signal = Killed: 9

\tspawn type = interactive (4)
\tjetsam coalition = {
\t\tID = 1442
\t\tstate = active
\t\tpid = 99
\t}
}
"""
FAILING = RUNNING.replace("state = running", "state = spawn scheduled").replace("\tpid = 4242\n", "").replace(
    "last terminating signal = Killed: 9", "last exit code = 78: EX_CONFIG"
)  # fmt: skip
ABSENT = Done(113, "", 'Bad request.\nCould not find service "io.github.portway" in domain for user gui: 501\n')


def shown(load="loaded", active="active", pid=4242, restarts=0, result="success", status=0):
    """What `systemctl --user show` prints."""
    return (
        f"LoadState={load}\nActiveState={active}\nSubState=any\nMainPID={pid}\nNRestarts={restarts}\n"
        f"Result={result}\nExecMainStatus={status}\n"
    )


SHOW = shown()
SHOW_FAILED = shown(active="failed", pid=0, restarts=5, result="exit-code", status=1)
SHOW_ABSENT = shown(load="not-found", active="inactive", pid=0)


class UnitTest(unittest.TestCase):
    def test_examples_are_what_is_written(self):
        """The two files in launchd/ are what install writes, for a user called you."""
        self.assertEqual(agent(MAC_SAMPLE), (ROOT / "launchd" / "io.github.portway.plist").read_bytes())
        self.assertEqual(unit(SAMPLE), (ROOT / "launchd" / "portway.service").read_bytes())

    def test_agent_is_a_plist(self):
        """The agent is a property list of launchd's own keys with values of their types, isolated and restarted."""
        values = plistlib.loads(agent(MAC_SAMPLE))
        for key, value in values.items():
            self.assertIs(AGENT_KEYS[key], type(value), key)
        self.assertEqual([MAC_SAMPLE.python, "-I", "-S", MAC_SAMPLE.program, "serve"], values["ProgramArguments"])
        self.assertEqual({"SuccessfulExit": False}, values["KeepAlive"])
        self.assertEqual(0o077, values["Umask"])
        self.assertGreater(values["ExitTimeOut"], MAC_SAMPLE.drain)

    def test_odd_paths(self):
        """Blanks, quotes, percent signs, dollars and angle brackets in a path survive both forms."""
        path = '/home/a "b" 100% $HOME <&>/m.toml'
        job = Job(
            "/usr/bin/python3", "/p/portway.pyz", "/home/a b", "/l", config=path, environment={"XDG_DATA_HOME": "/d 5%"}
        )
        self.assertEqual(path, plistlib.loads(agent(job))["ProgramArguments"][-1])
        text = unit(job).decode()
        self.assertIn('serve --config "/home/a \\"b\\" 100%% $$HOME <&>/m.toml"\n', text)
        self.assertIn('Environment="XDG_DATA_HOME=/d 5%%"\n', text)
        with tempfile.TemporaryDirectory() as folder:
            for data in (agent(job), unit(job)):
                written = Path(folder) / "unit"
                written.write_bytes(data)
                self.assertEqual(path, service._configured(str(written)))

    def test_refused(self):
        """A line break in a path can't become a directive of its own, and a relative path is no path."""
        for wrong in (
            Job("/usr/bin/python3", "/p", "/h", "/l", config="/m\nExecStartPre=/bin/evil"),
            Job("python3", "/p", "/h", "/l"),
        ):
            for render in (agent, unit):
                with self.assertRaises(BadUnit):
                    render(wrong)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "no systemd-analyze")
    def test_systemd_accepts_it(self):
        """systemd's own check finds nothing to say of the unit."""
        with tempfile.TemporaryDirectory() as folder:
            job = Job(
                sys.executable, "/p/portway.pyz", folder, "/l", "/a b%/m.toml", {"XDG_DATA_HOME": "/d 5%"}, "/e nv"
            )
            path = Path(folder) / "portway.service"
            path.write_bytes(unit(job))
            command = ["systemd-analyze", "verify", "--user", "--man=no", str(path)]
            environ = {"PATH": os.environ["PATH"], "HOME": folder, "XDG_RUNTIME_DIR": folder}
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
            self.assertEqual((0, "", ""), (done.returncode, done.stdout, done.stderr))

    @unittest.skipUnless(shutil.which("plutil"), "no plutil")
    def test_macos_accepts_it(self):
        """macOS's own check finds the agent right."""
        done = subprocess.run(
            ["plutil", "-lint", "-"], input=agent(MAC_SAMPLE), capture_output=True, timeout=60, check=False
        )
        self.assertEqual(0, done.returncode, done.stdout)


class WordsTest(unittest.TestCase):
    def test_launchctl(self):
        """Of what launchctl prints only the job's own lines count, and a signal says more than an exit code."""
        state = read_launchctl(0, RUNNING)
        self.assertEqual(
            (True, True, 4242, "killed: Killed: 9", 2),
            (state.loaded, state.running, state.pid, state.last, state.restarts),
        )
        state = read_launchctl(0, FAILING)
        self.assertEqual(
            (True, False, 0, "exit code 78: EX_CONFIG"), (state.loaded, state.running, state.pid, state.last)
        )
        for calm in ("last exit code = 0", "last exit code = (never exited)"):
            self.assertEqual("", read_launchctl(0, RUNNING.replace("last terminating signal = Killed: 9", calm)).last)
        self.assertFalse(read_launchctl(ABSENT.code, ABSENT.out).loaded)

    def test_systemctl(self):
        """So for systemctl show."""
        self.assertEqual(service_units.State(True, True, 4242, "", 0), read_systemctl(SHOW))
        self.assertEqual(service_units.State(True, False, 0, "exit-code, status 1", 5), read_systemctl(SHOW_FAILED))
        self.assertFalse(read_systemctl(SHOW_ABSENT).loaded)


class Manager:
    """Plays launchctl or systemctl: the answers to each kind of command, the last one for ever."""

    def __init__(self, answers):
        self.answers = {words: list(each) for words, each in answers.items()}
        self.commands = []

    def __call__(self, command):
        self.commands.append(" ".join(command))
        for words, answers in self.answers.items():
            if words in self.commands[-1]:
                return answers.pop(0) if len(answers) > 1 else answers[0]
        return Done(0, "", "")


class ServiceTest(unittest.TestCase):
    def setUp(self):
        self.home = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.environ = {"HOME": str(self.home)}
        self.now = 0.0
        self.answer: str | None = __version__

    def system(self, platform, answers):
        self.manager = Manager(answers)

        def pause(seconds):
            self.now += seconds

        return System(
            self.environ,
            platform,
            "/usr/bin/python3",
            501,
            self.manager,
            lambda _: self.answer,
            lambda: self.now,
            pause,
        )

    def linux(self, *shown):
        return self.system("linux", {"show": [Done(0, text, "") for text in shown or (SHOW,)]})

    def mac(self, *printed):
        return self.system("darwin", {"launchctl print": list(printed) or [ABSENT, Done(0, RUNNING, "")]})

    def run_service(self, system, *words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = service.main(words, system)
        return status, out.getvalue(), err.getvalue()

    def write(self, text):
        path = self.home / "models.toml"
        path.write_text(text)
        return str(path)

    @property
    def unit(self):
        return self.home / ".config" / "systemd" / "user" / "portway.service"

    @property
    def plist(self):
        return self.home / "Library" / "LaunchAgents" / "io.github.portway.plist"

    @property
    def pyz(self):
        return self.home / ".local" / "share" / "portway" / "portway.pyz"


class InstallTest(ServiceTest):
    def test_linux(self):
        """It packs Portway, writes the unit, has systemd start it, and waits until it answers."""
        status, out, err = self.run_service(self.linux(), "install", "--config", self.write(VALID))
        self.assertEqual((0, ""), (status, err))
        expected = [
            "systemctl --user daemon-reload",
            "systemctl --user enable portway.service",
            "systemctl --user restart portway.service",
        ]
        self.assertEqual(expected, self.manager.commands[:3])
        self.assertIn(
            f"ExecStart=/usr/bin/python3 -I -S {self.pyz} serve --config {self.home}/models.toml\n",
            self.unit.read_text(),
        )
        self.assertTrue(out.endswith("running, pid 4242, at http://127.0.0.1:11436/v1\n"), out)
        said = subprocess.run(
            [sys.executable, "-I", "-S", self.pyz, "--version"], capture_output=True, text=True, check=True
        )
        self.assertEqual(f"portway {__version__}\n", said.stdout)

    def test_macos(self):
        """On macOS an agent is bootstrapped into the user's graphical session."""
        status, out, err = self.run_service(self.mac(), "install", "--config", self.write(VALID))
        self.assertEqual((0, ""), (status, err))
        expected = ["launchctl print gui/501/io.github.portway", "launchctl enable gui/501/io.github.portway",
                    f"launchctl bootstrap gui/501 {self.plist}"]  # fmt: skip
        self.assertEqual(expected, self.manager.commands[:3])
        values = plistlib.loads(self.plist.read_bytes())
        self.assertEqual(str(self.pyz), values["ProgramArguments"][3])
        self.assertEqual(0o644, stat.S_IMODE(self.plist.stat().st_mode))
        self.assertIn("pid 4242", out)

    def test_macos_again(self):
        """A loaded agent is booted out first, and only when it has gone the new one is loaded."""
        loaded = Done(0, RUNNING, "")
        system = self.mac(loaded, loaded, loaded, ABSENT, loaded)
        self.assertEqual(0, self.run_service(system, "install", "--config", self.write(VALID))[0])
        kinds = [command.split()[1] for command in self.manager.commands]
        self.assertEqual(["print", "bootout", "print", "print", "print", "enable", "bootstrap"], kinds[:7])

    def test_macos_never_gone(self):
        """If launchd doesn't let go of it, that is an error in the end, and nothing is bootstrapped over it."""
        status, _, err = self.run_service(self.mac(Done(0, RUNNING, "")), "install", "--config", self.write(VALID))
        self.assertEqual(1, status)
        self.assertIn("still there after 60 s", err)
        self.assertNotIn("bootstrap", " ".join(self.manager.commands))

    def test_macos_without_session(self):
        """launchd's bare "Input/output error" is explained."""
        system = self.mac(ABSENT)
        self.manager.answers["bootstrap"] = [Done(5, "", "Bootstrap failed: 5: Input/output error\n")]
        status, _, err = self.run_service(system, "install", "--config", self.write(VALID))
        self.assertEqual(1, status)
        self.assertIn("Bootstrap failed: 5: Input/output error", err)
        self.assertIn("log in on the Mac itself", err)

    def test_does_not_come_up(self):
        """A daemon that ends, or does not answer, is a failed installation that says where to look."""
        status, _, err = self.run_service(self.linux(SHOW_FAILED), "install", "--config", self.write(VALID))
        self.assertEqual(1, status)
        self.assertIn("exit-code, status 1", err)
        self.assertIn("portway service logs", err)
        self.answer = None
        status, _, err = self.run_service(self.linux(), "install", "--config", self.write(VALID))
        self.assertIn("does not answer", err)
        self.assertGreater(self.now, service.UP_PATIENCE - 1)

    def test_bad_configuration(self):
        """With mistakes in the configuration nothing is written and nothing is run."""
        status, _, err = self.run_service(self.linux(), "install", "--config", self.write("[modles]"))
        self.assertEqual(78, status)
        self.assertIn("modles", err)
        self.assertEqual([], self.manager.commands)
        self.assertEqual(["models.toml"], os.listdir(self.home))

    def test_print(self):
        """--print shows the unit and changes nothing."""
        for system, mark in ((self.linux(), "ExecStart="), (self.mac(), "ProgramArguments")):
            status, out, _ = self.run_service(system, "install", "--config", self.write(VALID), "--print")
            self.assertEqual(0, status)
            self.assertIn(mark, out)
            self.assertEqual([], self.manager.commands)
        self.assertEqual(["models.toml"], os.listdir(self.home))

    def test_no_secrets(self):
        """No key gets into a unit, set here or not, and it is said where each goes."""
        self.environ |= {"CLOUD_KEY": "sk-cloud-secret"}
        config = self.write(KEYED)
        status, out, err = self.run_service(self.linux(), "install", "--config", config)
        self.assertEqual((0, ""), (status, err))
        self.assertNotIn("secret", self.unit.read_text() + out)
        self.assertIn(f"EnvironmentFile=-{self.home}/.config/portway/env\n", self.unit.read_text())
        self.assertIn("NAME=key for each of CLOUD_KEY, OWN_KEY", out)
        env = self.home / ".config" / "portway" / "env"
        env.parent.mkdir(parents=True)
        env.write_text("CLOUD_KEY=a\nOWN_KEY=b\n")
        env.chmod(0o644)
        self.assertIn(f"chmod 600 {env}", self.run_service(self.linux(), "install", "--config", config)[1])
        env.chmod(0o600)
        self.assertNotIn("chmod", self.run_service(self.linux(), "install", "--config", config)[1])
        out = self.run_service(self.mac(), "install", "--config", config)[1]
        self.assertIn("launchd doesn't have", out)
        self.assertNotIn("secret", self.plist.read_text())

    def test_folders_go_along(self):
        """The user's own folders, which no service manager knows, go into the unit; without --config none is named."""
        self.environ["XDG_DATA_HOME"] = str(self.home / "data")
        status, out, _ = self.run_service(self.linux(), "install", "--print")
        self.assertEqual(0, status)
        self.assertIn(f"Environment=XDG_DATA_HOME={self.home}/data\n", out)
        self.assertIn(f"{self.home}/data/portway/portway.pyz serve\n", out)

    def test_no_systemd(self):
        """Without systemd, or without a session of it, the way out is told."""
        for done, said in (
            (Done(127, "", "there is no systemctl here"), "service install --print"),
            (Done(1, "", "Failed to connect to bus: No medium found\n"), "loginctl enable-linger"),
        ):
            status, _, err = self.run_service(
                self.system("linux", {"systemctl": [done]}), "install", "--config", self.write(VALID)
            )
            self.assertEqual(1, status)
            self.assertIn(said, err)


class LifeTest(ServiceTest):
    def test_status(self):
        """Status is 0 if it runs and answers, else 3, and says what is known."""
        self.assertEqual(
            (3, "not installed; `portway service install` does that\n", ""), self.run_service(self.linux(), "status")
        )
        self.run_service(self.linux(), "install", "--config", self.write(VALID))
        python = "warning: /usr/bin/python3 is not there; `portway service install` mends it\n"
        for shown, answer, expected in (
            (SHOW, __version__, (0, f"running, pid 4242, Portway {__version__} at http://127.0.0.1:11436/v1\n")),
            (SHOW, "0.0.1", (0, "running, pid 4242, Portway 0.0.1 at")),
            (SHOW, None, (3, "running, pid 4242, but http://127.0.0.1:11436 does not answer\n")),
            (SHOW_FAILED, None, (3, "not running; it ended: exit-code, status 1; `portway service logs` says more\n")),
            (SHOW_ABSENT, None, (3, "installed, but the service manager has not loaded it")),
        ):
            self.answer = answer
            status, out, _ = self.run_service(self.linux(shown), "status")
            self.assertEqual(expected[0], status)
            self.assertTrue(out.replace(python, "").startswith(expected[1]), out)

    def test_status_of_a_broken_unit(self):
        """A unit that names what is gone, as Python after an update, is told."""
        self.run_service(self.linux(), "install", "--config", self.write(VALID))
        self.pyz.unlink()
        self.assertIn(f"warning: {self.pyz} is not there", self.run_service(self.linux(), "status")[1])

    def test_uninstall(self):
        """Uninstall stops it and removes what install wrote, and nothing else; twice is no error."""
        for system, path, command in (
            (self.linux, self.unit, "systemctl --user disable --now portway.service"),
            (lambda: self.mac(Done(0, RUNNING, ""), ABSENT), self.plist, "launchctl bootout gui/501/io.github.portway"),
        ):
            config = self.write(VALID)
            self.run_service(self.mac() if path == self.plist else self.linux(), "install", "--config", config)
            self.assertTrue(path.exists())
            status, out, err = self.run_service(system(), "uninstall")
            self.assertEqual((0, ""), (status, err))
            self.assertIn(command, self.manager.commands)
            self.assertIn(f"removed {path}\nremoved {self.pyz}\n", out)
            self.assertFalse(path.exists() or self.pyz.exists())
            self.assertTrue(os.path.exists(config))
        self.assertIn("There is no service", self.run_service(self.linux(), "uninstall")[1])
        self.assertIn("There is no service", self.run_service(self.mac(ABSENT), "uninstall")[1])

    def test_uninstall_without_systemd(self):
        """Where no systemd answers, what an attempt to install left behind is removed; where one refuses, it stays."""
        for code, words, status in (
            (1, "Failed to connect to bus: No medium found", 0),
            (127, "none", 0),
            (1, "denied", 1),
        ):
            done = Done(code, "", words)
            self.run_service(self.system("linux", {"systemctl": [done]}), "install", "--config", self.write(VALID))
            self.assertTrue(self.unit.exists())
            self.assertEqual(status, self.run_service(self.system("linux", {"systemctl": [done]}), "uninstall")[0])
            self.assertEqual(status == 1, self.unit.exists())

    def test_logs(self):
        """On Linux the journal's last lines are shown, on macOS the file's."""
        system = self.system("linux", {"journalctl": [Done(0, "2026-11-21 portway: listening\n", "")]})
        self.assertEqual((0, "2026-11-21 portway: listening\n", ""), self.run_service(system, "logs"))
        self.assertIn("--unit portway.service", self.manager.commands[0])
        self.assertIn("has not run yet", self.run_service(self.mac(), "logs")[2])
        log = self.home / "Library" / "Logs" / "portway.log"
        log.parent.mkdir(parents=True)
        log.write_text("".join(f"line {number}\n" for number in range(100)))
        status, out, _ = self.run_service(self.mac(), "logs")
        self.assertEqual([str(log), "line 50", "line 99"], [out.splitlines()[index] for index in (0, 1, -1)])
        self.assertEqual(0, status)


class UsageTest(ServiceTest):
    def test_mistakes(self):
        """What can't be understood is one line and exit code 2; --help is the manual, and fits a terminal."""
        for words in (
            (),
            ("instal",),
            ("install", "status"),
            ("install", "--config"),
            ("status", "--print"),
            ("--frob",),
        ):
            status, out, err = self.run_service(self.linux(), *words)
            self.assertEqual((2, ""), (status, out))
            self.assertRegex(err, r"\Aportway service: .+\n\Z")
            self.assertEqual([], self.manager.commands)
        self.assertEqual((0, service.HELP, ""), self.run_service(self.linux(), "--help"))
        self.assertLess(max(map(len, service.HELP.splitlines())), 80)


class PackTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_out_of_itself(self):
        """Out of the one file the same file comes, also onto itself."""
        pack.build(str(self.folder / "a.pyz"))
        code = "import sys; from portway.commands import pack; [pack.build(out) for out in sys.argv[1:]]"
        command = [sys.executable, "-S", "-c", code, "a.pyz", "b.pyz"]
        before = (self.folder / "a.pyz").read_bytes()
        subprocess.run(command, cwd=self.folder, env={"PYTHONPATH": "a.pyz"}, check=True, timeout=30)
        self.assertEqual(before, (self.folder / "a.pyz").read_bytes())
        self.assertEqual(before, (self.folder / "b.pyz").read_bytes())

    def test_not_half(self):
        """If it can't be written, nothing is left behind."""
        with self.assertRaises(OSError):
            pack.build(str(self.folder / "none" / "a.pyz"))
        self.assertEqual([], os.listdir(self.folder))


if __name__ == "__main__":
    unittest.main()
