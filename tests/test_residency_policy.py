"""keep_alive as a policy that is kept to, preloading, and what people see and do: ps, models, load, unload."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import math
import threading
import time
import unittest
from dataclasses import replace
from typing import Any, ClassVar

from portway import config
from portway.commands import residency as residency_cli
from portway.errors import ClientError, PortwayError
from portway.memory import api as residency_api
from portway.memory import machine as memory
from portway.memory.arbiter import Shape
from portway.memory.residency import Residency
from portway.memory.resident import Known, shape_of
from portway.standin.server import StandInModel
from portway.watch import NoClient
from tests.llama_server import wait_for
from tests.test_residency import GB, SOON, Served, post


class PolicyTest(Served):
    """keep_alive is kept to, whatever other clients say."""

    models: ClassVar = {"b": "keep_alive = -1", "c": 'keep_alive = "30s"', "embed": 'keep_alive = "5m"'}

    def told(self, name: str, model: str, keep_alive: object) -> None:
        """Another client's own word."""
        body = {"model": model, "messages": [], "keep_alive": keep_alive, "shift": False, "options": {"num_ctx": 512}}
        self.settle()
        post(f"{self.standins[name].url}/api/chat", body)
        self.settle()

    def left(self) -> dict[str, float]:
        return {resident.model.name: left for resident, left in self.memory.residents()}

    def check(self) -> None:
        for hearing in self.residency._hearing.values():
            hearing.looked_at = -math.inf
        self.residency.check()
        self.settle()

    def test_repaired(self) -> None:
        """A keep_alive that another client has changed is told anew, in either direction, once."""
        for name, backend, keep_alive, least, most in (
            ("a", "one", "24h", 0, 301),
            ("c", "two", -1, 0, 31),
            ("a", "one", "20s", 290, 301),
        ):
            with self.subTest(name=name, keep_alive=keep_alive):
                self.ask(name)
                self.told(backend, name, keep_alive)
                self.check()
                self.assertTrue(least <= self.left()[name] <= most, self.left())
                before = len(self.paths(backend))
                self.check()
                self.assertNotIn("/api/chat", self.paths(backend)[before:])
        self.assertEqual(0, self.memory.stats().reloads)

    def test_while_it_is_used(self) -> None:
        """Its keep_alive counts from the end of its use, so until then nothing is to be corrected."""
        self.ask("a")
        self.told("one", "a", "24h")
        with self.place("a"):
            before = len(self.paths("one"))
            self.check()
            self.assertNotIn("/api/chat", self.paths("one")[before:])
        self.check()
        self.assertIn("/api/chat", self.paths("one")[before:])

    def test_about_to_go(self) -> None:
        """One that is about to go is let go: by the time it is told, it might have to be loaded again."""
        self.ask("a")
        self.told("one", "a", "5s")
        before = len(self.paths("one"))
        self.check()
        self.assertNotIn("/api/chat", self.paths("one")[before:])

    def test_what_loads(self) -> None:
        """An empty call asks for the runner of a real one, and for no thinking, which some models refuse."""
        model = replace(self.config.models["a"], think=True, params={"num_gpu": 0})
        self.residency.refresh(NoClient())
        self.residency.load(model, NoClient(), time.monotonic() + SOON)
        sent = self.standins["one"].requests[-1].json
        self.assertNotIn("think", sent)
        self.assertEqual({"num_ctx": 512, "num_gpu": 0}, sent["options"])
        self.assertEqual((False, []), (sent["shift"], sent["messages"]))
        clamped = shape_of(replace(model, num_ctx=9999), Known("a", trained=2048))
        self.assertEqual(Shape(2048, (("num_gpu", 0),)), clamped)

    def test_for_ever(self) -> None:
        """Also where the policy is to keep it for ever."""
        self.ask("b")
        self.told("one", "b", "5m")
        self.check()
        self.assertGreater(self.left()["b"], 1e8)

    def test_nothing_is_loaded(self) -> None:
        """A model that is gone stays gone; one that was never used through Portway is another's business."""
        self.ask("a")
        self.told("one", "a", 0)
        self.told("two", "c", "24h")
        loads = self.memory.stats().loads
        self.check()
        self.assertEqual((loads, {"c"}), (self.memory.stats().loads, self.in_memory()))
        self.assertGreater(self.left()["c"], 80_000)

    def test_another_window(self) -> None:
        """A model that another client has loaded with another window is left alone: telling it would reload it."""
        self.ask("a")
        body = {"model": "a", "messages": [], "keep_alive": "24h", "options": {"num_ctx": 99}}
        post(f"{self.standins['one'].url}/api/chat", body)
        self.settle()
        self.check()
        self.assertEqual([99], [resident.num_ctx for resident, _ in self.memory.residents()])

    def test_the_monitor(self) -> None:
        """It starts, looks after a load, and ends."""
        self.residency.start()
        self.ask("a")
        wait_for(lambda: self.residency._seats["a"].measured, "the monitor's look")
        self.residency.stop()
        thread = self.residency._thread
        assert thread is not None
        self.assertFalse(thread.is_alive())

    def test_embeddings(self) -> None:
        """A model that can't chat is loaded and unloaded as well."""
        model = self.config.models["embed"]
        self.residency.load(model, NoClient(), time.monotonic() + SOON)
        self.assertEqual({"embed"}, self.in_memory())
        self.assertTrue(self.residency.unload(model, NoClient(), time.monotonic() + SOON))
        self.assertEqual(set(), self.in_memory())


class SurplusTest(Served):
    """A model that takes more than is said of it."""

    models: ClassVar = {"a": 'keep_alive = "5m"\nsize = "6GB"'}

    def model(self, name: str, size: float) -> StandInModel:
        return super().model(name, 10.5 if name == "a" else size)

    def test_an_estimate_that_was_too_low(self) -> None:
        """What is idle goes when more was taken than the budget, at last the one that took it; it is told, and
        refused from then on, with what it took."""
        self.ask("embed", load=True)
        with self.place("a") as place:
            self.residency.load(self.config.models["a"], NoClient(), time.monotonic() + SOON)
            place.began()
            self.settle()
            self.residency.check()
            self.assertEqual({"a"}, self.in_memory())  # it is in use
        self.residency.check()
        self.assertEqual(set(), self.in_memory())
        names = ("embed:latest", "a:latest")
        self.assertEqual([f"unloaded {name}, as memory.budget is exceeded" for name in names], self.said)
        error = self.refused("does_not_fit", "a")
        self.assertEqual("a needs 10.5 GB, as measured; the budget is 10.0 GB", error.message)


class PreloadTest(Served):
    models: ClassVar = {"a": "preload = true", "giant": "preload = true"}

    def test_at_the_start(self) -> None:
        """What is to be there from the start is loaded; what can't be is told."""
        self.residency.start()
        wait_for(lambda: "a" in self.in_memory() and bool(self.said), "the preloading")
        self.assertIn("giant could not be loaded at the start: giant needs", self.said[0])


# --- people ---------------------------------------------------------------------------------------


class PeopleTest(Served):
    models: ClassVar = {"a": 'default = true\nkeep_alive = "5m"\naliases = ["gpt"]'}

    def test_load_and_unload(self) -> None:
        """A model is loaded and unloaded by name or alias; one in use is not unloaded, an unknown one is a 404."""
        watch = NoClient()
        self.assertTrue(residency_api.load(self.residency, {"model": "gpt"}, watch)["loaded"])
        self.assertEqual({"a"}, self.in_memory())
        with self.place("a"), self.assertRaises(ClientError) as caught:
            residency_api.unload(self.residency, {"model": "a"}, watch)
        self.assertEqual(409, caught.exception.status)
        self.assertEqual([True, False], [
            residency_api.unload(self.residency, {"model": "a"}, watch)["unloaded"] for _ in range(2)
        ])  # fmt: skip
        self.assertEqual(set(), self.in_memory())
        for body in ({"model": "nobody"}, {}, 5):
            with self.assertRaises(ClientError):
                residency_api.load(self.residency, body, watch)

    def test_overview(self) -> None:
        """What is loaded, what waits, and what would fit, alone and beside the usual model."""
        self.ask("a")
        with self.place("a"):
            waiting = self.in_thread("c")
            self.await_waiting(1)
            said = json.loads(json.dumps(residency_api.overview(self.residency, NoClient())))
        waiting.outcome()
        self.assertEqual(("set", 10 * GB), (said["memory"]["budget"], said["memory"]["limit"]))
        [loaded] = said["loaded"]
        shown = [loaded[key] for key in ("names", "model", "in_flight", "num_ctx", "expires_in")]
        self.assertEqual([["a"], "a:latest", 1, 512, 300.0], shown)
        self.assertEqual(("c", "a:latest to be idle"), (said["waiting"][0]["model"], said["waiting"][0]["for"]))
        fits = {model["name"]: (model["fits"], model["fits_beside"]) for model in said["models"]}
        self.assertEqual((True, True), fits["a"])
        self.assertEqual((True, False), fits["b"])
        self.assertEqual((False, False), fits["giant"])
        self.assertEqual((True, True), fits["embed"])
        self.assertEqual("ollama", said["backends"]["one"]["server"])

    def test_what_fits_a_machine_that_is_full_now(self) -> None:
        """Where the budget follows the machine, what would fit it once others have gone fits."""
        auto = Residency(
            config.parse(self.toml(""), "models.toml", {}), read=lambda: memory.Reading(10 * GB, GB, apart=False)
        )
        self.addCleanup(auto.stop)
        said = residency_api.overview(auto, NoClient())
        self.assertEqual(("auto", 0, 8 * GB), tuple(said["memory"][key] for key in ("budget", "limit", "ceiling")))
        self.assertEqual({"a": True, "giant": False}, {
            model["name"]: model["fits"] for model in said["models"] if model["name"] in ("a", "giant")
        })  # fmt: skip

    def test_the_commands(self) -> None:
        """ps, models, load and unload print what the daemon says; each way of failing has its own exit code."""
        with Api(self.residency) as port:
            toml = self.toml(self.memory_options) + f"[server]\nport = {port}\n"
            parsed = config.parse(toml, "models.toml", {})
            status, out, _ = self.run_command(parsed, "ps")
            self.assertEqual((0, "Nothing is loaded."), (status, out.splitlines()[1]))
            status, out, _ = self.run_command(parsed, "load", "a")
            self.assertEqual(0, status)
            self.assertRegex(out, r"^a: loaded, after \d+\.\d s\n$")
            status, out, _ = self.run_command(parsed, "ps")
            self.assertRegex(out, r"^\[#{24}\.{16}\] 6\.[01] GB of 10\.0 GB \(memory\.budget\)\n")
            self.assertRegex(out, r"\na +a:latest +one +6\.[01] GB +512 +loaded +0 +5m\n$")
            _, out, _ = self.run_command(parsed, "models")
            self.assertRegex(out, r"\ngiant +giant +two +~20\.\d GB +yes +no +no +no\n")
            status, out, err = self.run_command(parsed, "load", "giant")
            self.assertEqual((1, ""), (status, out))
            self.assertRegex(
                err, r"^portway load: giant needs .*; the budget is 10\.0 GB\. Way out: ask a smaller model"
            )
            self.assertEqual((0, "a: unloaded\n"), self.run_command(parsed, "unload", "a")[:2])
            self.assertEqual(2, self.run_command(parsed, "load")[0])
            self.assertEqual(2, self.run_command(parsed, "ps", "now")[0])
            self.assertIn("models", json.loads(self.run_command(parsed, "models", "--json")[1]))
        self.assertEqual(3, self.run_command(parsed, "ps")[0])
        self.assertIn("usage: portway ps", self.run_command(parsed, "ps", "--help")[1])

    def run_command(self, parsed: config.Config, *words: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = residency_cli.main(words[0], words[1:], parsed)
        return status, out.getvalue(), err.getvalue()


class Api:
    """The three routes, over HTTP, before one Residency."""

    def __init__(self, residency: Residency) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(lambda: residency_api.overview(residency, NoClient()))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                act = residency_api.load if self.path.endswith("/load") else residency_api.unload
                self.answer(lambda: act(residency, body, NoClient()))

            def answer(self, run: Any) -> None:
                status = 200
                try:
                    said = run()
                except PortwayError as exc:
                    status, said = exc.status, exc.envelope()
                content = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> int:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return int(self._server.server_address[1])

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


if __name__ == "__main__":
    unittest.main()
