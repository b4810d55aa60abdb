"""OpenCode, a coding agent, without its screen: through Portway to a real llama-server, and to the stand-in."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

from portway.standin.server import StandIn
from tests import clients_doc
from tests.daemon import DaemonProcess
from tests.llama_server import LlamaServer
from tests.node_packages import Program, packages
from tests.tiny_gguf import TinyModel

LONGEST = 100  # tokens of an answer
CONTEXT = 65536  # OpenCode's first prompt takes some 26,000 of the tiny model's tokens


def program() -> Path:
    """OpenCode itself. It is a program for one kind of machine; on all others the test is skipped, in CI too."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise unittest.SkipTest("tests/node has OpenCode for Linux on x86-64 only")
    found = packages() / "node_modules" / "opencode-linux-x64" / "bin" / "opencode"
    if not found.exists():
        raise AssertionError(f"npm left out OpenCode: {found} is not there")
    return found


class OpenCodeTest(unittest.TestCase):
    """`opencode run` in a project of its own and with a home of its own."""

    def setUp(self) -> None:
        self.program = program()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="portway-opencode-")))
        self.project = self.folder / "project"
        self.project.mkdir()
        (self.project / "README.md").write_text("Hello.\n", encoding="utf-8")
        if shutil.which("git"):
            subprocess.run(["git", "init", "--quiet"], cwd=self.project, check=True)

    def serve(self, backend: str) -> DaemonProcess:
        """Portway, with two models at that backend, and with keys."""
        toml = f"""
            [server]
            api_keys = ["sk-test"]
            [log]
            file = "{self.folder / "log.jsonl"}"
            {backend}
        """
        models = ("qwen3-coder:30b", "llama3.2:3b") if "ollama" in backend else ("tiny", "tiny")
        for name, model in zip(("coder-30b", "fast-3b"), models, strict=True):
            toml += f'[models.{name}]\nbackend = "real"\nmodel = "{model}"\nnum_ctx = {CONTEXT}\n'
            toml += f"max_tokens = {LONGEST}\n"
        return DaemonProcess(toml)

    def set_up_project(self, daemon: DaemonProcess) -> None:
        """Put opencode.json there as docs/clients.md has it, and with what it says of windows, keys and titles."""
        settings = json.loads(clients_doc.block("OpenCode", "json", daemon.port))
        with daemon.client() as client:
            listed = client.call("GET", "/v1/models", headers={"Authorization": "Bearer sk-test"}).json["data"]
        limits = {model["id"]: {"context": model["context_length"], "output": LONGEST} for model in listed}
        portway = settings["provider"]["portway"]
        self.assertEqual(["coder-30b"], list(portway["models"]))
        portway["models"] = {name: {"name": name, "limit": limit} for name, limit in limits.items()}
        portway["options"]["apiKey"] = "{env:PORTWAY_KEY}"
        settings["small_model"] = "portway/fast-3b"
        (self.project / "opencode.json").write_text(json.dumps(settings), encoding="utf-8")

    def run_opencode(self, text: str) -> str:
        """What the document's command prints, with other words to say."""
        (command,) = clients_doc.blocks("OpenCode", "sh")
        name, *arguments = command.strip().replace('"say hi"', text).split(" ", 4)
        self.assertEqual("opencode", name)
        environ = {"HOME": str(self.folder / "home"), "PATH": os.environ["PATH"], "PORTWAY_KEY": "sk-test"}
        with Program((str(self.program), *arguments), self.project, environ) as running:
            output = running.rest()
            return output + running.errors()

    def logged(self) -> list[dict[str, Any]]:
        """What Portway, once it has ended, has logged of the answers; each has to be a good stream."""
        lines = [json.loads(line) for line in (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        answers = [line for line in lines if line["endpoint"] == "chat"]
        for line in answers:
            self.assertEqual((True, 200, None), (line["stream"], line["status"], line["error"]), line)
            self.assertTrue(line["client"].startswith("opencode/"), line)
        return answers

    def test_on_llama_server(self) -> None:
        """It shows what a real model said to its long prompt; a small model is asked for a title."""
        talker = TinyModel(context=CONTEXT, endless=True)  # others may end before the first word
        server = self.enterContext(LlamaServer(talker, "-c", str(2 * CONTEXT), "-np", "2"))
        with self.serve(f'[backends.real]\nkind = "openai"\nurl = "{server.url}/v1"\n') as daemon:
            self.set_up_project(daemon)
            said = self.run_opencode("say hi").splitlines()[0].strip()
        title, main = sorted(self.logged(), key=lambda line: str(line["model"]), reverse=True)
        self.assertEqual(("fast-3b", "coder-30b"), (title["model"], main["model"]))
        self.assertEqual(LONGEST, main["completion_tokens"])
        self.assertAlmostEqual(len(said), main["response_chars"], delta=2)  # white space
        self.assertGreater(main["prompt_tokens"], 10_000)

    def test_on_the_stand_in(self) -> None:
        """A tool that the model calls is run, its result goes back, and the answer to that is shown."""
        (self.project / "stand-in").write_text("Forty-two.\n", encoding="utf-8")  # the stand-in's idea of a file name
        standin = self.enterContext(StandIn())
        with self.serve(f'[backends.real]\nkind = "ollama"\nurl = "{standin.url}"\n') as daemon:
            self.set_up_project(daemon)
            printed = self.run_opencode("please read")
        requests = [request.json for request in standin.requests if request.path == "/api/chat"]
        self.assertIn("The tool answered", printed)
        self.assertEqual(len(requests), len(self.logged()))
        *_, called, told = (request for request in requests if request.get("tools"))
        self.assertTrue(called["stream"])
        self.assertIn("read", [tool["function"]["name"] for tool in called["tools"]])
        self.assertEqual(("tool", "read"), (told["messages"][-1]["role"], told["messages"][-1]["tool_name"]))
        self.assertIn("Forty-two.", told["messages"][-1]["content"])


if __name__ == "__main__":
    unittest.main()
