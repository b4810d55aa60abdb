"""portway doctor: each finding, its fix and the exit code, on machines of every kind."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import tempfile
import threading
import unittest
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from portway import __version__, cli
from portway.commands import doctor, probe
from portway.commands.doctor import Machine
from portway.commands.holder import Holder
from portway.commands.probe import Told
from portway.memory.machine import Reading
from portway.standin.answers import StandInModel
from portway.standin.server import StandIn
from tests.daemon import Daemon

GIB = 1024**3
NOW = 4_000_000_000.0  # later than any file of a clone
SIZES = {"qwen3.5:9b": 6 * GIB, "granite4:3b": 2 * GIB, "qwen3-coder:30b": 18 * GIB}
INFO = {"general.architecture": "x", "x.block_count": 32, "x.embedding_length": 4096, "x.attention.head_count": 32,
        "x.attention.head_count_kv": 8}  # fmt: skip
CONFIG = """
[server]
port = 18436
[backends.ollama]
kind = "ollama"
url = "http://127.0.0.1:11434"
[models.fast-9b]
backend = "ollama"
model = "qwen3.5:9b"
num_ctx = 16384
family = "qwen"
default = true
fallback = ["fast-3b"]
[models.fast-3b]
backend = "ollama"
model = "granite4:3b"
num_ctx = 16384
family = "granite"
[models.coder-30b]
backend = "ollama"
model = "qwen3-coder:30b"
num_ctx = 32768
family = "qwen"
fallback = ["fast-9b", "fast-3b"]
"""
LLAMA = """
[backends.llama]
kind = "openai"
url = "http://127.0.0.1:8080/v1"
[models.heavy]
backend = "llama"
model = "gpt-oss"
fallback = ["fast-9b"]
"""
LAN = CONFIG.replace("127.0.0.1:11434", "192.168.1.20:11434")


class DoctorTest(unittest.TestCase):
    """With a machine where all is well; a test changes what it is about."""

    def setUp(self):
        self.home = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.sizes = dict(SIZES)
        self.portway = None  # what answers on Portway's own port: an answer, or an error
        self.answers = {}  # path -> an answer or an error in place of Ollama's
        self.asked = []
        self.reading = Reading(24 * GIB, 16 * GIB)
        self.changes = {}

    def ask(self, url, path, *_, **__):
        self.asked.append(path)
        if path == "/health" and url.endswith(":18436"):
            given = (
                self.portway
                if self.portway is not None
                else ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            )
        else:
            given = self.answers.get(path, self.ollama(path))
        if isinstance(given, OSError):
            raise given
        return given if isinstance(given, Told) else Told(200, given, NOW)

    def ollama(self, path):
        models = [{"name": name, "size": size} for name, size in self.sizes.items()]
        return {
            "/api/version": {"version": "0.33.0"},
            "/api/tags": {"models": models},
            "/api/show": {"model_info": INFO},
        }.get(path, {})

    def examine(self, text=CONFIG, **changes):
        path = self.home / "models.toml"
        path.write_text(text)
        path.chmod(0o600)
        values: Any = {"platform": "linux", "parent": 4711, "ask": self.ask, "who_listens": lambda *_: None,
                  "memory": lambda: self.reading, "now": lambda: NOW, "stalls": "/nonexistent"} | changes  # fmt: skip
        return doctor.examine(str(path), Machine({"HOME": str(self.home)}, **values))

    def only(self, examined, severity):
        """The findings of one severity."""
        return [finding for finding in examined.findings if finding.severity == severity]

    def assert_found(self, examined, severity, about, text, fix):
        found = [each for each in self.only(examined, severity) if each.about == about and text in each.text]
        self.assertEqual(1, len(found), "\n".join(doctor.as_lines(examined)))
        self.assertIn(fix, found[0].fix)
        self.assertNotIn("\n", found[0].fix)


class WellTest(DoctorTest):
    def test_all_is_well(self):
        """On a machine where all is there the worst is a note, the coder that needs other programs closed."""
        examined = self.examine()
        self.assertEqual([], self.only(examined, "error") + self.only(examined, "warning"))
        self.assertEqual("note", examined.worst)
        self.assert_found(examined, "ok", "backend", "Ollama 0.33.0, 3 models", "")
        self.assert_found(examined, "ok", "port", "127.0.0.1:18436 is free", "")
        self.assert_found(
            examined, "note", "fit", "coder-30b: 18.0 GB + 4.0 GB for 32768 tokens = 22.0 GB", "close other programs"
        )

    def test_loads_nothing(self):
        """It asks only what loads no model: a stand-in that counts has loaded none."""
        with StandIn([StandInModel(name, size) for name, size in SIZES.items()]) as standin:
            text = CONFIG.replace("http://127.0.0.1:11434", standin.url)
            examined = self.examine(text, ask=probe.ask)
            self.assertEqual(0, standin.memory.stats().loads)
            self.assertLessEqual(
                {request.path for request in standin.requests}, {"/api/version", "/api/tags", "/api/show"}
            )
        self.assertIn("ok", {finding.severity for finding in examined.findings if finding.about == "backend"})

    def test_changes_nothing(self):
        """It leaves no file behind."""
        self.examine()
        self.assertEqual(["models.toml"], os.listdir(self.home))

    def test_report(self):
        """The report has a line for each finding, its fix below, and a count; as JSON it has the models' arithmetic."""
        self.sizes.pop("granite4:3b")
        examined = self.examine()
        lines = list(doctor.as_lines(examined))
        self.assertIn("error    models   ollama has no granite4:3b; needed by fast-3b", lines)
        self.assertIn("                  -> ollama pull granite4:3b", lines)
        self.assertRegex(lines[-1], r"^1 error, 1 note, \d+ ok$")
        document = json.loads(json.dumps(doctor.as_document(examined)))
        self.assertEqual(("error", 1), (document["worst"], document["exit_code"]))
        fast = document["models"][0]
        self.assertEqual(("fast-9b", False, True), (fast["name"], fast["estimate"], fast["fits"]))
        self.assertEqual(
            (6 * GIB, 2 * GIB, 8 * GIB), tuple(fast[f"{part}_bytes"] for part in ("weights", "context", "total"))
        )

    def test_exit_codes(self):
        """0 up to a note, 3 for warnings, 1 for errors; none is one of the command line's own."""
        self.assertEqual({"ok": 0, "note": 0, "warning": 3, "error": 1}, doctor.EXIT_CODES)
        self.assertFalse({cli.USAGE, cli.BAD_CONFIG, cli.INTERRUPTED} & set(doctor.EXIT_CODES.values()))
        for severity, code in doctor.EXIT_CODES.items():
            examined = doctor.Examined([doctor.Finding("ok", "x", "y"), doctor.Finding(severity, "x", "y")])
            patch = mock.patch.object(doctor, "examine", return_value=examined)
            with patch, contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual(code, cli.main(["doctor"]))
                self.assertEqual(code, cli.main(["doctor", "--json"]))
            self.assertIn(str(code), cli.DOCTOR_HELP)

    def test_terminal(self):
        """What a server calls itself is no command to the terminal."""
        self.answers["/api/version"] = {"version": "\x1b[2J"}
        self.assertNotIn("\x1b", "\n".join(doctor.as_lines(self.examine())))


class ConfigurationTest(DoctorTest):
    def test_mistakes(self):
        """Each mistake is an error with what is allowed; memory and clock are examined all the same, backends not."""
        examined = self.examine(CONFIG.replace("num_ctx = 32768", "num_ctx = 0").replace("fast-3b]", "fast-33b]"))
        self.assertEqual(1, doctor.EXIT_CODES[examined.worst])
        self.assert_found(examined, "error", "config", "models.coder-30b.num_ctx: 0 is out of range", "1 to 16777216")
        self.assertTrue(any(finding.fix == "change it to fast-33b" for finding in examined.findings))
        self.assert_found(examined, "ok", "memory", "24.0 GB", "")
        self.assertEqual([], self.asked)

    def test_warnings(self):
        """A warning of `portway check` is one here."""
        examined = self.examine(CONFIG.replace('"granite"', '"qwen"'))
        self.assertEqual(3, doctor.EXIT_CODES[examined.worst])
        self.assertTrue(any("is all qwen" in finding.text for finding in self.only(examined, "warning")))

    def test_others_may_change_it(self):
        """A configuration that others may write to could send prompts elsewhere."""
        with mock.patch.object(Path, "chmod", lambda path, _: os.chmod(path, 0o666)):
            self.assert_found(self.examine(), "warning", "files", "others on this machine may change", "chmod go-w")


class BackendTest(DoctorTest):
    def test_not_running(self):
        """An Ollama that isn't there is an error, as nothing else can answer; one with another behind it a warning."""
        refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        self.answers = dict.fromkeys(("/v1/models",), refused)
        examined = self.examine(CONFIG + LLAMA)
        self.assert_found(
            examined, "warning", "backend", "llama (http://127.0.0.1:8080/v1) can't be reached", "backends.llama.url"
        )
        self.answers["/api/version"] = refused
        self.assert_found(self.examine(), "error", "backend", "Connection refused", "ollama serve")

    def test_missing_models(self):
        """What is not pulled is told once for each model, with the command; an error only where nobody takes over."""
        self.sizes = {}
        examined = self.examine(
            CONFIG
            + '[models.again]\nbackend = "ollama"\nmodel = "granite4:3b"\nnum_ctx = 16384\nfallback = ["fast-9b"]\n'
        )
        self.assert_found(
            examined, "error", "models", "no granite4:3b; needed by fast-3b, again", "ollama pull granite4:3b"
        )
        self.assert_found(examined, "warning", "models", "no qwen3.5:9b; needed by fast-9b", "ollama pull qwen3.5:9b")
        self.assertTrue(any("(an estimate)" in finding.text for finding in examined.findings if finding.about == "fit"))

    def test_llama_server(self):
        """A llama-server's one model answers to any name; its size and window are its own."""
        meta = {"size": 12 * GIB, "n_ctx": 8192}
        self.answers = {"/v1/models": {"data": [{"id": "m.gguf", "owned_by": "llamacpp", "meta": meta}]},
                        "/props": {"build_info": "b9999-abc"}}  # fmt: skip
        examined = self.examine(CONFIG + LLAMA)
        self.assert_found(examined, "ok", "backend", "llama-server b9999-abc, 1 models", "")
        fit = next(
            finding for finding in examined.findings if finding.about == "fit" and finding.text.startswith("heavy: ")
        )
        self.assertIn("12.0 GB + ~", fit.text)
        self.assertIn("for 8192 tokens", fit.text)
        self.assertIn("(an estimate)", fit.text)

    def test_llama_server_as_a_router(self):
        """It answers to its own names only; what is not loaded has the size of its file."""
        weights = self.home / "weights.gguf"
        weights.write_bytes(b"x" * 5000)
        status = {"value": "unloaded", "args": ["llama-server", "--model", str(weights), "-c", "512"]}
        self.answers = {"/v1/models": {"data": [{"id": "gpt-oss", "owned_by": "llamacpp", "status": status}]},
                        "/props": {"role": "router"}}  # fmt: skip
        examined = self.examine(CONFIG + LLAMA)
        self.assert_found(examined, "ok", "fit", "heavy: 5 KB + ", "")
        self.answers["/v1/models"]["data"][0]["id"] = "other"
        self.assert_found(self.examine(CONFIG + LLAMA), "warning", "models", "llama has no gpt-oss", "see what llama")

    def test_llama_swap(self):
        """By its name and version; what runs has the size of its file, an alias is a name."""
        weights = self.home / "weights.gguf"
        weights.write_bytes(b"x" * 5000)
        own = {"llamaswap": {"type": "model", "aliases": ["gpt-oss"]}}
        self.answers = {
            "/v1/models": {"data": [{"id": "oss", "owned_by": "llama-swap", "meta": own, "status": {}}]},
            "/api/version": {"version": "v240"},
            "/running": {"running": [{"model": "oss", "cmd": f"llama-server -m {weights} --ctx-size 512"}]},
        }
        examined = self.examine(CONFIG + LLAMA)
        self.assert_found(examined, "ok", "backend", "llama-swap v240, 1 models", "")
        self.assert_found(examined, "ok", "fit", "heavy: 5 KB + ", "")

    def test_unknown_servers_are_asked_little(self):
        """A server that is not known to be llama-server is asked for its list and nothing else."""
        self.answers = {"/v1/models": {"data": [{"id": "gpt-oss"}]}}
        self.examine(CONFIG + LLAMA)
        self.assertNotIn("/props", self.asked)

    def test_key_refused(self):
        """A refused key is named by its option, never shown."""
        self.answers = {"/v1/models": Told(401, {"error": "who are you"})}
        examined = self.examine(CONFIG + LLAMA.replace("[models.heavy]", 'api_key = "sk-wrong"\n[models.heavy]'))
        self.assert_found(examined, "error", "backend", "answered 401 to GET /v1/models", "backends.llama.api_key")
        self.assertNotIn("sk-wrong", "\n".join(doctor.as_lines(examined)))

    def test_local_network_privacy(self):
        """On macOS errno 65 for a machine of the LAN is the Local Network Privacy block, by its name; nowhere else."""
        self.answers["/api/version"] = OSError(65, "No route to host")
        examined = self.examine(LAN, platform="darwin", parent=1)
        self.assert_found(examined, "error", "backend", "Local Network Privacy", "ssh -N -L 11434:127.0.0.1:11434")
        self.assertIn("launchd started this", "\n".join(doctor.as_lines(examined)))
        for text, platform in ((LAN, "linux"), (CONFIG, "darwin"), (LAN.replace("192.168.1.20", "8.8.8.8"), "darwin")):
            self.assertNotIn("Privacy", "\n".join(doctor.as_lines(self.examine(text, platform=platform))))

    def test_local_network_privacy_of_the_service(self):
        """Seen from a terminal, which may pass: the running daemon does not reach what this program does."""
        self.portway = {
            "version": __version__,
            "in_flight": 0,
            "unreachable": {"ollama": "can't be reached: No route to host"},
        }
        examined = self.examine(LAN, platform="darwin")
        self.assert_found(
            examined, "error", "backend", "the running Portway does not reach it, and this program does", "tunnel"
        )
        self.assertNotIn("Privacy", "\n".join(doctor.as_lines(self.examine(LAN))))

    def test_clock_of_a_server(self):
        """A server whose clock differs is told."""
        self.answers["/api/show"] = Told(200, {"model_info": INFO}, NOW + 3600)
        self.assert_found(self.examine(), "warning", "clock", "3600 s ahead of this machine's", "set the one")


class MemoryTest(DoctorTest):
    def test_together(self):
        """Which models fit beside the everyday one is told: the small one does, the coder doesn't."""
        beside = {verdict.name: verdict.beside for verdict in self.examine().verdicts}
        self.assertEqual({"fast-9b": False, "fast-3b": False, "coder-30b": False}, beside)  # 8 + 4 GB, of 10.8
        self.sizes["granite4:3b"] = GIB // 2
        self.assertTrue(self.examine().verdicts[1].beside)

    def test_never(self):
        """What the machine can't hold at all is a warning with the arithmetic."""
        self.reading = Reading(16 * GIB, 8 * GIB)
        self.assert_found(
            self.examine(), "warning", "fit", "= 22.0 GB: this machine can't hold it (14.0 GB at most)", "smaller"
        )

    def test_configured_budget(self):
        """A budget in the configuration is what counts."""
        examined = self.examine(CONFIG + '[memory]\nbudget = "30GB"\n')
        self.assertTrue(all(verdict.fits for verdict in examined.verdicts))
        self.assertTrue(examined.verdicts[1].beside)
        examined = self.examine(CONFIG + '[memory]\nbudget = "20GB"\n')
        self.assert_found(
            examined, "warning", "fit", "22.0 GB, more than memory.budget (20.0 GB)", "raise that, or a smaller"
        )

    def test_every_finding_has_a_fix(self):
        """Whatever is wrong, there is a line of what to do about it."""
        self.sizes = {}
        self.reading = Reading(24 * GIB, GIB)
        self.answers["/v1/models"] = OSError(61, "Connection refused")
        examined = self.examine(CONFIG + LLAMA + '[memory]\nbudget = "1GB"\n')
        wrong = [finding for finding in examined.findings if finding.severity in ("warning", "error")]
        self.assertGreater(len(wrong), 4)
        self.assertEqual([], [finding for finding in wrong if not finding.fix])

    def test_elsewhere(self):
        """Models behind another machine, or in a card's own memory, are not judged by this one's."""
        self.assertEqual([], list(self.examine(LAN).verdicts))
        self.reading = Reading(24 * GIB, 16 * GIB, apart=True)
        examined = self.examine()
        self.assertEqual([], list(examined.verdicts))
        self.assert_found(examined, "note", "fit", "a graphics card's own memory", "")

    def test_pressure(self):
        """Little free memory and programs that wait for it are warnings."""
        self.reading = Reading(24 * GIB, 2 * GIB)
        self.assert_found(self.examine(), "warning", "memory", "only 8 % is left", "ollama stop")
        self.reading = Reading(24 * GIB, 16 * GIB, 5)
        self.assert_found(self.examine(), "warning", "memory", "only 5 % is left", "ollama stop")
        self.reading = Reading(24 * GIB, 16 * GIB)
        stalls = self.home / "stalls"
        stalls.write_text(
            "some avg10=0.00 avg60=31.20 avg300=2.1 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
        )
        self.assert_found(
            self.examine(stalls=str(stalls)), "warning", "memory", "in 31 % of the last minute", "close programs"
        )
        self.assertIsNone(doctor.stall("nonsense"))
        self.assertIsNone(doctor.stall("some avg10=x"))

    def test_unknown(self):
        """A system that doesn't tell its memory gets a note."""
        self.reading = Reading()
        self.assert_found(self.examine(), "note", "memory", "does not say", "")


class PortTest(DoctorTest):
    def test_taken(self):
        """A port that something else has is an error with its pid, if the system tells it."""
        for portway in ({}, {"version": "2.0"}, probe.NoAnswer("no HTTP"), TimeoutError("timed out")):
            self.portway = portway
            examined = self.examine(who_listens=lambda *_: Holder(321, "python3 other.py"))
            self.assert_found(
                examined, "error", "port", "127.0.0.1:18436 is taken by pid 321 (python3 other.py)", "server.port"
            )
        self.assert_found(self.examine(), "error", "port", "another user's program", "server.port")

    def test_portway_runs(self):
        """A Portway that runs is no error; what it knows to be wrong is told."""
        self.portway = {"version": "0.0.1", "in_flight": 0, "config": {"path": "/other.toml", "problem": "1 mistake"},
                        "log": {"problem": "disk full"}, "cache": None, "unreachable": {}}  # fmt: skip
        examined = self.examine(who_listens=lambda *_: Holder(321, "python3 portway.pyz"))
        self.assert_found(examined, "ok", "port", "Portway 0.0.1 answers on 127.0.0.1:18436, pid 321", "")
        self.assert_found(examined, "note", "daemon", "another one is running", "restart")
        self.assert_found(examined, "warning", "daemon", "serves by the one before", "portway check")
        self.assert_found(examined, "note", "daemon", "/other.toml", "--config")
        self.assert_found(examined, "warning", "daemon", "log: disk full", "space")

    def test_a_real_one(self):
        """A running daemon is recognised by its /health."""
        with Daemon(CONFIG) as daemon:
            told = probe.ask(f"http://127.0.0.1:{daemon.port}", "/health")
        self.assertIn("in_flight", told.value)
        self.assertEqual(__version__, told.value["version"])
        self.assertIsNotNone(told.time)


class FileTest(DoctorTest):
    def setUp(self):
        super().setUp()
        self.log = self.home / ".local" / "share" / "portway" / "log.jsonl"
        self.log.parent.mkdir(parents=True)
        self.log.write_text("")
        self.log.chmod(0o600)
        os.utime(self.log, (NOW, NOW))

    def test_readable_by_others(self):
        """A log that others may read is a warning with the command."""
        self.log.chmod(0o644)
        self.assert_found(self.examine(), "warning", "files", "may read the log", f"chmod 600 {self.log}")

    @unittest.skipIf(os.geteuid() == 0, "root may write anywhere")
    def test_folder_not_writable(self):
        """A folder in which no log can be made is an error."""
        self.log.unlink()
        self.log.parent.chmod(0o500)
        self.addCleanup(self.log.parent.chmod, 0o700)
        self.assert_found(self.examine(), "error", "files", "is not writable", "chmod u+wx")

    def test_only_what_is_used(self):
        """Without a log and a cache there is nothing to say of their files."""
        examined = self.examine(CONFIG + "[log]\nenabled = false\n[memory]\nenabled = false\n")
        self.assertEqual([], [finding for finding in examined.findings if finding.about == "files"])
        self.assert_found(
            self.examine(CONFIG.replace("default = true", 'default = true\ncache = "1d"')), "ok", "files", "cache: ", ""
        )

    def test_measures(self):
        """What was measured of models is its owner's, too; where it can't be kept, that is only a warning."""
        measured = self.home / ".local" / "state" / "portway" / "measured.json"
        self.assert_found(self.examine(), "ok", "files", f"measures: {measured}, to be made", "")
        measured.parent.mkdir(parents=True)
        measured.write_text("{}")
        measured.chmod(0o640)
        self.assert_found(self.examine(), "warning", "files", "may read the models' measures", f"chmod 600 {measured}")
        with mock.patch("portway.commands.doctor.os.access", lambda path, _mode: path != str(measured)):
            measured.chmod(0o600)
            self.assert_found(self.examine(), "warning", "files", "can't be written", "chown")

    def test_clock_went_back(self):
        """A log from the future, and a clock from before Portway, are told."""
        os.utime(self.log, (NOW + 7200, NOW + 7200))
        self.assert_found(self.examine(), "warning", "clock", "7200 s in the future", "set the clock")
        self.assert_found(
            self.examine(now=lambda: 1.7e9 + 1), "warning", "clock", "own files are from later", "set the clock"
        )
        self.assert_found(self.examine(now=lambda: 1000.0), "error", "clock", "1970-01-01", "set the clock")


class Fixed(BaseHTTPRequestHandler):
    """Answers every request with `reply`."""

    reply = b""

    def do_GET(self):
        self.wfile.write(self.reply)

    def log_message(self, *_):
        pass


class ProbeTest(unittest.TestCase):
    def ask(self, reply):
        server = HTTPServer(("127.0.0.1", 0), type("Answering", (Fixed,), {"reply": reply}))
        self.addCleanup(server.server_close)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        self.addCleanup(thread.join, 5)
        return probe.ask(f"http://127.0.0.1:{server.server_port}/base/", "/x")

    def test_answers(self):
        """An answer's status, object and time are told; what is no object is an empty one."""
        told = self.ask(b'HTTP/1.1 503 X\r\nDate: Sat, 21 Nov 2026 05:00:00 GMT\r\nContent-Length: 7\r\n\r\n{"a":1}')
        self.assertEqual(Told(503, {"a": 1}, 1795237200.0), told)
        for body in (b"[1]", b"nonsense"):
            self.assertEqual(
                Told(200, {}), self.ask(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            )

    def test_no_http(self):
        """What speaks no HTTP is an error of the system's kind."""
        for reply in (b"SSH-2.0-OpenSSH\r\n", b""):
            with self.assertRaises(OSError):
                self.ask(reply)


if __name__ == "__main__":
    unittest.main()
