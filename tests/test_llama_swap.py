"""The daemon in front of a real llama-swap that runs real llama-servers: the one at $PORTWAY_LLAMA_SWAP or on PATH;
else skipped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import unittest
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, ClassVar, Self

from tests.build_llama_server import cache
from tests.daemon import Daemon
from tests.doubles import RawClient
from tests.llama_server import program, wait_for
from tests.tiny_gguf import TinyModel

PATIENCE = 60.0
CHAT = "/v1/chat/completions"
NAMES = {"left": "left", "right": "org/right:q8"}  # logical name -> llama-swap's own
MODELS = {"left": TinyModel(), "org/right:q8": TinyModel(seed=2), "endless": TinyModel(context=65536, endless=True)}


def llama_swap() -> str:
    """The program; skips the test where there is none."""
    found = os.environ.get("PORTWAY_LLAMA_SWAP") or shutil.which("llama-swap")
    if found and os.access(found, os.X_OK):
        return found
    raise unittest.SkipTest("no llama-swap: name one by PORTWAY_LLAMA_SWAP, or put it on PATH")


class LlamaSwap:
    """A llama-swap process on loopback with MODELS, one that is broken, and all of them at once if need be."""

    def __init__(self) -> None:
        self._program, server = llama_swap(), program()
        self._folder = tempfile.TemporaryDirectory(prefix="portway-swap-")
        self.port = _free_port()
        files = {name: model.write(cache()) for name, model in MODELS.items()} | {
            "broken": Path("/nowhere/at-all.gguf")
        }
        models = {name: _started_by(server, path, _free_port()) for name, path in files.items()}
        models["left"]["aliases"] = ["links"]
        self._config = {
            "unloadTimeout": 2,
            "performance": {"disabled": True},
            "models": models,
            "groups": {"all": {"swap": False, "exclusive": False, "members": list(models)}},
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        path = Path(self._folder.name, "config.yaml")
        path.write_text(json.dumps(self._config))  # which is YAML, too
        command = [self._program, "-config", str(path), "-listen", f"127.0.0.1:{self.port}"]
        with Path(self._folder.name, "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            wait_for(self._is_up, "llama-swap's being up", self.log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()  # it ends its servers
        try:
            self._process.wait(PATIENCE)
        finally:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
            self._process.wait(PATIENCE)
            self._folder.cleanup()

    def log(self) -> str:
        return Path(self._folder.name, "log").read_text(errors="replace")

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"llama-swap ended with {self._process.returncode}:\n{self.log()}")
        try:
            return bool(self.running() == {})
        except OSError:
            return False

    def running(self) -> dict[str, str]:
        """model -> state."""
        with urllib.request.urlopen(f"{self.url}/running", timeout=PATIENCE) as response:
            return {entry["model"]: entry["state"] for entry in json.load(response)["running"]}


def _started_by(server: Path, model: Path, port: int) -> dict[str, Any]:
    """A model's section."""
    command = f"{server} --host 127.0.0.1 --port {port} --model {model} --ctx-size 1024 --offline -t 1 -np 1"
    return {"cmd": command, "proxy": f"http://127.0.0.1:{port}"}


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class LlamaSwapTest(unittest.TestCase):
    """Two models of 40 MB, as the configuration says, of which only one fits into the budget at a time."""

    swap: ClassVar[LlamaSwap]

    @classmethod
    def setUpClass(cls) -> None:
        cls.swap = cls.enterClassContext(LlamaSwap())

    def setUp(self) -> None:
        self.addCleanup(self.unload_all)

    def unload_all(self) -> None:
        request = urllib.request.Request(f"{self.swap.url}/api/models/unload", b"")
        urllib.request.urlopen(request, timeout=PATIENCE).close()
        wait_for(lambda: self.swap.running() == {}, "an empty llama-swap")

    def daemon(self, more: str = "", keep_alive: float = -1) -> Daemon:
        toml = '[memory]\nbudget = "64MB"\nmin_stay = 0\npatience = 0\ncheck = 1\n'
        toml += f'[backends.swap]\nkind = "openai"\nurl = "{self.swap.url}/v1"\n'
        for name, model in NAMES.items():
            toml += f'[models.{name}]\nbackend = "swap"\nmodel = "{model}"\nsize = "40MB"\nkeep_alive = {keep_alive}\n'
        return Daemon(toml + more)

    def ask(self, client: RawClient, model: str, **more: Any) -> Any:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "we walk"}],
            "max_tokens": 5,
            "temperature": 0,
            **more,
        }
        return client.call("POST", CHAT, json.dumps(body).encode())

    def residency(self, client: RawClient) -> Any:
        return client.call("GET", "/portway/residency").json

    def test_it_is_recognised(self) -> None:
        """What kind of server it is, which models it has, also under an alias, and that nothing is loaded by asking."""
        alias = '[models.links]\nbackend = "swap"\nmodel = "links"\nsize = "40MB"\n'
        with self.daemon(alias) as daemon, daemon.client() as client:
            said = self.residency(client)
            self.assertEqual("llama-swap", said["backends"]["swap"]["server"])
            self.assertIsNone(said["backends"]["swap"]["problem"])
            self.assertEqual([True] * 3, [model["present"] for model in said["models"]])
            self.assertEqual({}, self.swap.running())
            self.ask(client, "links")
            [loaded] = self.residency(client)["loaded"]
            self.assertEqual(("left", {"left", "links"}), (loaded["model"], set(loaded["names"])))
            self.assertEqual([], [line for line in daemon.log if "has no" in line])

    def test_one_makes_room_for_the_other(self) -> None:
        """Streamed or not, loads evict what is idle, and never are both there."""
        with self.daemon() as daemon, daemon.client() as client:
            for name, stream in (("left", False), ("right", True), ("left", True), ("right", False)):
                answer = self.ask(client, name, stream=stream)
                self.assertEqual((200, name), (answer.status, answer.header("x-served-by")), answer.body)
                self.assertEqual({NAMES[name]: "ready"}, self.swap.running())
                [loaded] = self.residency(client)["loaded"]
                self.assertEqual((NAMES[name], "loaded"), (loaded["model"], loaded["status"]))

    def test_load_and_unload(self) -> None:
        """`portway load` and `portway unload`, also of a name with a slash and a colon; a broken one is an error."""
        broken = '[models.broken]\nbackend = "swap"\nmodel = "broken"\nsize = "1MB"\n'
        with self.daemon(broken) as daemon, daemon.client() as client:
            for name in ("left", "right"):
                loaded = client.call("POST", "/portway/load", json.dumps({"model": name}).encode())
                self.assertEqual((200, True), (loaded.status, loaded.json.get("loaded")), loaded.body)
                self.assertEqual({NAMES[name]: "ready"}, self.swap.running())
            for unloaded in (True, False):
                answer = client.call("POST", "/portway/unload", b'{"model": "right"}')
                self.assertEqual((200, unloaded), (answer.status, answer.json.get("unloaded")), answer.body)
                self.assertEqual({}, self.swap.running())
            failed = client.call("POST", "/portway/load", b'{"model": "broken"}')
            self.assertEqual((502, "server_error"), (failed.status, failed.json["error"]["code"]), failed.body)

    def test_policy(self) -> None:
        """keep_alive 0 unloads after the answer; -1 stays."""
        with self.daemon(keep_alive=0) as daemon, daemon.client() as client:
            self.ask(client, "left")
            wait_for(lambda: self.swap.running() == {}, "its unloading", lambda: "\n".join(daemon.log))
        with self.daemon(keep_alive=-1) as daemon, daemon.client() as client:
            self.ask(client, "left")
            self.residency(client)
            self.assertEqual({"left": "ready"}, self.swap.running())

    def test_what_another_client_uses(self) -> None:
        """llama-swap would kill an answer by unloading: what another client has it say is waited for."""
        endless = '[models.endless]\nbackend = "swap"\nmodel = "endless"\nsize = "40MB"\n'
        with self.daemon(endless) as daemon, daemon.client() as client:
            other = self.stream("endless")
            self.addCleanup(other.close)
            refused = client.call("POST", "/portway/unload", b'{"model": "endless"}')
            self.assertEqual((503, "busy"), (refused.status, refused.json["error"]["code"]), refused.body)
            waiting = threading.Thread(target=self.ask, args=(client, "left"))
            waiting.start()
            with daemon.client() as second:
                wait_for(lambda: bool(self.residency(second)["waiting"]), "its waiting")
            self.assertIn("endless", self.swap.running())
            self.assertTrue(other.recv(65_536))
            other.close()
            waiting.join(PATIENCE)
            self.assertEqual({"left": "ready"}, self.swap.running())

    def stream(self, model: str) -> socket.socket:
        """Another client's endless stream, once it has begun."""
        body = json.dumps({"model": model, "prompt": "we", "stream": True, "max_tokens": 60_000}).encode()
        sock = socket.create_connection(("127.0.0.1", self.swap.port), PATIENCE)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        sock.sendall(head.encode() + b"\r\n\r\n" + body)
        seen = b""
        while b"data: " not in seen:
            seen += sock.recv(65_536)
        return sock

    def test_fallback(self) -> None:
        """A model that does not come up, or that it does not know, falls back, and says so."""
        more = ""
        for name, model in (("broken", "broken"), ("unknown", "not-there")):
            more += f'[models.{name}]\nbackend = "swap"\nmodel = "{model}"\nsize = "1MB"\nfallback = ["left"]\n'
        with self.daemon(more) as daemon, daemon.client() as client:
            for name, reason in (("broken", "server_error"), ("unknown", "model_not_found")):
                for stream in (False, True):
                    answer = self.ask(client, name, stream=stream)
                    self.assertEqual((200, "left"), (answer.status, answer.header("x-served-by")), answer.body)
                    self.assertIn(f"{name}={reason}", answer.header("x-portway-attempts"))

    def test_sizes(self) -> None:
        """What the configuration does not say is the file's size, from how llama-swap says that it started it."""
        more = '[models.bare]\nbackend = "swap"\nmodel = "left"\n'
        toml = f'[memory]\nbudget = "10GB"\n[backends.swap]\nkind = "openai"\nurl = "{self.swap.url}/v1"\n{more}'
        size = MODELS["left"].write(cache()).stat().st_size
        with Daemon(toml) as daemon, daemon.client() as client:
            [model] = self.residency(client)["models"]
            self.assertIsNone(model["size"])
            self.ask(client, "bare")

            def sizes() -> tuple[int, int]:
                said = self.residency(client)
                return said["models"][0]["size"] or 0, said["loaded"][0]["size"]

            wait_for(lambda: min(sizes()) > size, "its size")


if __name__ == "__main__":
    unittest.main()
