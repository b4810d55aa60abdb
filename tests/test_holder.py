"""Who listens on a port: on this system, and by recorded output of the other."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from portway.commands import holder

# lsof 4.91 of macOS: a process's fields, then each of its files'; blanks in a name are escaped
LSOF = "p24901\ncollama\nf3\nn127.0.0.1:11434\np512\ncLM\\x20Studi\nf21\nn[::1]:11434\nf22\nn*:11434\n"
PS = {"24901": "/opt/homebrew/opt/ollama/bin/ollama serve\n", "512": ""}
TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:2CAC 00000000:0000 0A 00000000:00000000 00:00000000 00000000   501        0 4711 1 0 100 0 0 10 0
   1: 0100007F:2CAC 0100007F:D431 01 00000000:00000000 00:00000000 00000000   501        0 4712 1 0 20 4 30 10 -1
"""


def output(command):
    """What lsof and ps print."""
    return LSOF if command[0].endswith("lsof") else PS[command[-1]]


def pid_at(host, port):
    """The process that listens there."""
    found = holder.who_listens(host, port)
    return found.pid if found else None


class LsofTest(unittest.TestCase):
    def test_address(self):
        """The listener that keeps us from our address is told, with its program and subcommand."""
        self.assertEqual((24901, "ollama serve"), holder.from_lsof("127.0.0.1", 11434, output))

    def test_other_address(self):
        """One on another address is none of ours, and one on every address is; lsof's own name will do."""
        self.assertEqual((512, "LM Studi"), holder.from_lsof("192.168.1.7", 11434, output))

    def test_nobody(self):
        """Without output, as when lsof finds nothing or is not there, nobody is told."""
        self.assertIsNone(holder.from_lsof("127.0.0.1", 1, lambda _: ""))

    def test_asks_for_listeners_only(self):
        """lsof resolves no names, which may hang, and shows no clients of the port."""
        ask = mock.Mock(return_value="")
        holder.from_lsof("127.0.0.1", 8080, ask)
        ask.assert_called_once_with(["/usr/sbin/lsof", "-nP", "-iTCP:8080", "-sTCP:LISTEN", "-F", "pcn"])


class ProcTest(unittest.TestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.root / "net").mkdir()
        (self.root / "net" / "tcp").write_text(TCP)
        for pid, inode, words in (
            (12, 4712, b"curl\0"),
            (34, 4711, b"/usr/bin/python3\0-I\0-S\0/o/portway.pyz\0serve\0"),
        ):
            folder = self.root / str(pid)
            (folder / "fd").mkdir(parents=True)
            (folder / "cmdline").write_bytes(words)
            (folder / "fd" / "3").symlink_to(f"socket:[{inode}]")

    @unittest.skipUnless(sys.byteorder == "little", "recorded on a little-endian machine")
    def test_listener(self):
        """The process that listens is told, and not one that is connected."""
        self.assertEqual((34, "python3 portway.pyz"), holder.from_proc("127.0.0.1", 11436, str(self.root)))
        self.assertIsNone(holder.from_proc("127.0.0.2", 11436, str(self.root)))
        self.assertIsNone(holder.from_proc("127.0.0.1", 11437, str(self.root)))

    @unittest.skipUnless(sys.byteorder == "little", "recorded on a little-endian machine")
    def test_bounded(self):
        """With very many processes it gives up in time."""
        times = iter([0.0, holder.PATIENCE + 1])
        self.assertIsNone(holder.from_proc("127.0.0.1", 11436, str(self.root), clock=lambda: next(times)))

    def test_nothing_to_read(self):
        """Where there is no such folder nobody is told."""
        self.assertIsNone(holder.from_proc("127.0.0.1", 11436, str(self.root / "none")))


class HereTest(unittest.TestCase):
    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "Linux only")
    def test_ourselves(self):
        """A listener of this process is found, on IPv4, on IPv6, and by a name."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            for host in ("127.0.0.1", "0.0.0.0", "localhost"):
                self.assertEqual(os.getpid(), pid_at(host, port))
            self.assertIsNone(holder.who_listens("::1", port))
            self.assertIn(f"pid {os.getpid()} (", holder.describe("127.0.0.1", port))
        self.assertEqual("", holder.describe("127.0.0.1", port))

    @unittest.skipUnless(os.path.isdir("/proc/self/fd") and socket.has_ipv6, "Linux with IPv6 only")
    def test_both_families(self):
        """A listener on every address of both families keeps an IPv4 one away, too."""
        try:
            listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as exc:
            self.skipTest(str(exc))
        with listener:
            self.assertEqual(os.getpid(), pid_at("127.0.0.1", listener.getsockname()[1]))

    def test_other_systems(self):
        """macOS is asked by lsof."""
        with mock.patch.object(sys, "platform", "darwin"), mock.patch.object(holder, "_output", output):
            self.assertEqual(24901, pid_at("127.0.0.1", 11434))


class NameTest(unittest.TestCase):
    def test_names(self):
        """A name is a program and its script; nothing behind an option is shown, since it may be a key."""
        for words, name in {
            ("/usr/bin/ollama", "serve"): "ollama serve",
            ("llama-server", "--api-key", "sk-secret"): "llama-server",
            ("/usr/bin/python3", "-I", "-S", "/x/portway.pyz", "serve"): "python3 portway.pyz",
            ("python3.12", "-m", "portway"): "python3.12 portway",
            ("python3", "-c", "secret = 1"): "python3",
            ("Python", "/work/portway/"): "Python portway",
            ("evil\x1b[2J",): "evil?[2J",
        }.items():
            self.assertEqual(name, holder.name_of(words))


if __name__ == "__main__":
    unittest.main()
