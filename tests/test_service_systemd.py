"""`portway service` with a real systemd: a user instance of its own, in a folder of its own, that ends with the test.

systemd refuses to run where the machine was not booted with it. In a mount namespace of its own it can be made to
believe that it was, which takes root; elsewhere this is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import ClassVar

from portway.standin.server import Fault, StandIn, StandInModel
from tests.daemon import ROOT
from tests.doubles import RawClient
from tests.llama_server import PATIENCE, wait_for

SYSTEMD = next((path for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if os.path.exists(path)), "")
MOUNT = "mount -t tmpfs portway-test /run/systemd && mkdir /run/systemd/system"
BOOT = ["unshare", "-m", "sh", "-c", f"{MOUNT} && exec {SYSTEMD} --user --log-target=null"]


def why_not() -> str:
    """What keeps systemd from being run here; "" if nothing does."""
    if not SYSTEMD or not all(map(shutil.which, ("systemctl", "unshare", "nsenter"))):
        return "there is no systemd"
    if os.geteuid() != 0 or not os.path.isdir("/run/systemd"):
        return "only root can have a /run/systemd of its own"
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "portway-test", "/run/systemd"]
    tried = subprocess.run(command, capture_output=True, check=False)
    return "" if tried.returncode == 0 else "no mount namespace can be had"


class RealSystemdTest(unittest.TestCase):
    home: ClassVar[Path]
    environ: ClassVar[dict[str, str]]
    inside: ClassVar[list[str]]  # what comes before a command that shall believe it, too

    @classmethod
    def setUpClass(cls) -> None:
        if why := why_not():
            raise unittest.SkipTest(why)
        folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="portway-systemd-")))
        cls.home, runtime = folder / "home", folder / "run"
        for each in (cls.home, runtime):
            each.mkdir(mode=0o700)
        cls.environ = {"HOME": str(cls.home), "PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(runtime)}
        systemd = subprocess.Popen(BOOT, env=cls.environ, stdin=subprocess.DEVNULL)
        cls.inside = ["nsenter", "-m", "-t", str(systemd.pid)]
        cls.addClassCleanup(systemd.wait, PATIENCE)
        cls.addClassCleanup(systemd.send_signal, signal.SIGTERM)

        def is_up() -> bool:
            if systemd.poll() is not None:
                raise unittest.SkipTest(f"systemd --user ends with {systemd.returncode}")
            return cls.systemctl("is-system-running") in ("running", "degraded")

        wait_for(is_up, "systemd's being up")

    @classmethod
    def systemctl(cls, *words: str) -> str:
        command = [*cls.inside, "systemctl", "--user", *words]
        done = subprocess.run(command, env=cls.environ, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return done.stdout.strip()

    def service(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*self.inside, sys.executable, "-I", "-S", str(ROOT / "portway"), "service", *words]
        return subprocess.run(
            command, env=self.environ, capture_output=True, text=True, timeout=2 * PATIENCE, check=False
        )

    def setUp(self) -> None:
        standin = self.enterContext(StandIn([StandInModel("tiny")]))
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        self.config = self.home / "my models.toml"
        self.config.write_text(
            f"[server]\nport = {self.port}\n[memory]\nenabled = false\n"
            f'[backends.b]\nkind = "ollama"\nurl = "{standin.url}"\n[models.m]\nbackend = "b"\nmodel = "tiny"\n'
        )
        self.standin = standin

    def pid(self) -> int:
        return int(self.systemctl("show", "-p", "MainPID", "--value", "portway.service") or 0)

    def test_its_life(self) -> None:
        """Installed, it runs and answers; killed, it is started again; stopped, it lets a stream end; uninstalled, it
        leaves nothing but configuration, log and the like."""
        done = self.service("install", "--config", str(self.config))
        self.addCleanup(self.service, "uninstall")
        self.assertEqual(0, done.returncode, done.stderr)
        first = self.pid()
        self.assertIn(f"running, pid {first}, at http://127.0.0.1:{self.port}/v1", done.stdout)
        command = Path(f"/proc/{first}/cmdline").read_text().split("\0")
        self.assertEqual(["-I", "-S"], command[1:3])
        self.assertEqual(["serve", "--config", str(self.config), ""], command[4:])
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: self.pid() not in (0, first), "its being started again")
        wait_for(lambda: self.service("status").returncode == 0, "its answering")
        self.assertIn("; started again once", self.service("status").stdout)
        self.stop_in_a_stream()
        self.assertEqual(3, self.service("status").returncode)
        self.assertIn("Result=success", self.systemctl("show", "-p", "Result", "portway.service"))
        self.assertEqual(0, self.service("uninstall").returncode)
        left = [path.relative_to(self.home).as_posix() for path in self.home.rglob("*") if path.is_file()]
        self.assertEqual([], [path for path in left if "systemd" in path or path.endswith(".pyz")])
        self.assertIn("not installed", self.service("status").stdout)

    def stop_in_a_stream(self) -> None:
        self.standin.fail("/api/chat", Fault("hang_mid_stream", after=3))
        with RawClient(self.port) as client:
            body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
            client.request("POST", "/v1/chat/completions", json.dumps(body).encode())
            head = client.head()
            events = client.events(head)
            next(events)
            self.systemctl("stop", "--no-block", "portway.service")
            with RawClient(self.port) as late:
                wait_for(lambda: late.call("GET", "/v1/models").status == 503, "its draining")
            self.assertTrue(self.standin.wait_for(lambda standin: any(r.phase == "hang" for r in standin.requests)))
            self.standin.release()
            self.assertEqual("[DONE]", list(events)[-1].data)
        wait_for(lambda: not self.pid(), "its end")

    def test_a_broken_configuration(self) -> None:
        """It is not started again and again for what another start would not mend."""
        self.assertEqual(0, self.service("install", "--config", str(self.config)).returncode)
        self.addCleanup(self.service, "uninstall")
        self.config.write_text("x = ")
        self.systemctl("restart", "portway.service")
        wait_for(lambda: self.systemctl("is-active", "portway.service") == "failed", "its failing")
        self.assertEqual("0", self.systemctl("show", "-p", "NRestarts", "--value", "portway.service"))
        self.assertEqual(78, self.service("status").returncode)


if __name__ == "__main__":
    unittest.main()
