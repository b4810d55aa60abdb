"""What each kind of server tells of its memory, and how it is told: a real llama-server, the others played."""

from __future__ import annotations

import http.client
import threading
import time
import unittest
from dataclasses import replace
from typing import Any

from portway import config
from portway.backends.openai import OpenAIBackend
from portway.call import Limits
from portway.errors import BackendError
from portway.memory import api as residency_api
from portway.memory import machine as memory
from portway.memory.budget import is_here
from portway.memory.residency import Place, Residency
from portway.watch import NoClient
from tests.daemon import Daemon
from tests.doubles import ScriptedRequest, ScriptedServer, http_reply, json_reply
from tests.llama_server import LlamaServer, wait_for
from tests.test_residency import GB, SOON, chat
from tests.tiny_gguf import TinyModel


class LlamaServerTest(unittest.TestCase):
    """A real llama-server as a router, with two tiny models of which only one fits at a time."""

    def setUp(self) -> None:
        tiny = {"left": TinyModel(), "right": TinyModel(context=4096)}
        self.server = self.enterContext(LlamaServer.router(tiny, "-t", "1", "-np", "1"))
        toml = '[memory]\nbudget = "64MB"\nmin_stay = 0\n'
        toml += f'[backends.router]\nkind = "openai"\nurl = "{self.server.url}/v1"\n'
        for name, keep_alive in (("left", 0), ("right", -1)):
            toml += f'[models.{name}]\nbackend = "router"\nmodel = "{name}"\nsize = "40MB"\nkeep_alive = {keep_alive}\n'
        self.config = config.parse(toml, "models.toml", {})
        self.residency = Residency(self.config, read=memory.Reading)
        self.addCleanup(self.residency.stop)

    def statuses(self) -> dict[str, str]:
        return {entry["id"]: entry["status"]["value"] for entry in self.server.get("/v1/models")["data"]}

    def ask(self, name: str) -> None:
        target = self.config.models[name]
        backend = OpenAIBackend(target.backend)
        until = time.monotonic() + 30.0
        with self.residency.place(target, NoClient(), until) as place:
            limits = Limits(5.0, 30.0, 30.0, 30.0, until, until)
            answer = place.hold(backend.open(chat(target), target, limits, NoClient()))
            try:
                self.assertIn(b"[DONE]", b"".join(answer.pieces()))
            finally:
                answer.close()
                backend.close()

    def test_load_evict_unload(self) -> None:
        """One makes room for the other; the policy unloads the one that has outstayed, and keeps the other."""
        self.ask("right")
        self.assertEqual({"left": "unloaded", "right": "loaded"}, self.statuses())
        self.ask("left")
        self.assertEqual({"left": "loaded", "right": "unloaded"}, self.statuses())
        self.residency.check()
        self.assertEqual({"left": "unloaded", "right": "unloaded"}, self.statuses())
        self.residency.load(self.config.models["right"], NoClient(), time.monotonic() + 30.0)
        self.residency.check()
        self.assertEqual({"left": "unloaded", "right": "loaded"}, self.statuses())
        self.assertTrue(self.residency.unload(self.config.models["right"], NoClient(), time.monotonic() + 30.0))
        self.assertEqual({"left": "unloaded", "right": "unloaded"}, self.statuses())

    def test_one_that_is_busy(self) -> None:
        """A router would break off an answer by unloading, so what another client uses is left alone."""
        self.residency.load(self.config.models["right"], NoClient(), time.monotonic() + 30.0)
        engine = self.residency._engines["router"]
        self.assertFalse(engine.is_busy("right", NoClient()))
        self.assertFalse(engine.is_busy("left", NoClient()))
        self.assertEqual({"left": "unloaded", "right": "loaded"}, self.statuses())
        slots = threading.Thread(target=self.generate, daemon=True)
        slots.start()
        wait_for(lambda: engine.is_busy("right", NoClient()), "a busy slot")
        with self.assertRaises(BackendError) as caught:
            self.residency.unload(self.config.models["right"], NoClient(), time.monotonic() + 30.0)
        self.assertEqual("busy", caught.exception.reason)
        self.assertEqual("loaded", self.statuses()["right"])
        self.server.kill()  # it would let its answer end
        slots.join(SOON)

    def generate(self) -> None:
        try:
            body = {"model": "right", "prompt": "we", "max_tokens": 3000, "ignore_eos": True}
            self.server.post("/v1/completions", body)
        except (OSError, http.client.HTTPException):
            return  # the server has ended before


class OneModelTest(unittest.TestCase):
    """A real llama-server with one model, which it has for as long as it runs."""

    def test_unload(self) -> None:
        """To unload it is 400 with the way out, at once and whoever uses it; to load it is nothing to do."""
        server = self.enterContext(LlamaServer(TinyModel(), "-t", "1"))
        toml = f'[memory]\nbudget = "1GB"\n[backends.single]\nkind = "openai"\nurl = "{server.url}/v1"\n'
        toml += '[models.tiny]\nbackend = "single"\nmodel = "tiny"\n'
        with Daemon(toml) as daemon, daemon.client() as client:
            self.assertTrue(client.call("POST", "/portway/load", b'{"model": "tiny"}').json["loaded"])
            refused = client.call("POST", "/portway/unload", b'{"model": "tiny"}')
        self.assertEqual(400, refused.status)
        error = refused.json["error"]
        self.assertEqual(("unsupported", "invalid_request_error"), (error["code"], error["type"]))
        self.assertIn("tiny can't be unloaded: the server of backend single has that one model", error["message"])
        self.assertIn("Way out: stop that server; one that unloads is llama-server without --model", error["message"])
        self.assertIn("tiny", [entry["id"] for entry in server.get("/v1/models")["data"]])


class LlamaSwapTest(unittest.TestCase):
    """llama-swap as its source has it, played: what runs, and unloading by name."""

    def setUp(self) -> None:
        self.running = {"left": "ready"}
        self.unloaded: list[str] = []
        server = self.enterContext(ScriptedServer(then=self.answer))
        toml = f'[memory]\nbudget = "10GB"\nmin_stay = 0\n[backends.swap]\nkind = "openai"\nurl = "{server.url}/v1"\n'
        toml += '[models.left]\nbackend = "swap"\nmodel = "left"\nsize = "6GB"\nkeep_alive = 0\n'
        toml += '[models.right]\nbackend = "swap"\nmodel = "org/right-7b-q8_0"\n'
        self.config = config.parse(toml, "models.toml", {})
        self.residency = Residency(self.config, read=memory.Reading)
        self.addCleanup(self.residency.stop)

    def answer(self, request: ScriptedRequest) -> bytes:
        if request.path == "/v1/models":
            names = ("left", "org/right-7b-q8_0")
            return json_reply({"data": [{"id": name, "owned_by": "llama-swap"} for name in names]})
        if request.path == "/running":
            return json_reply({"running": [{"model": name, "state": state} for name, state in self.running.items()]})
        if request.path.startswith("/api/models/unload/"):
            name = request.path.removeprefix("/api/models/unload/")
            self.unloaded.append(name)
            self.running.pop(name, None)
            return http_reply(b"OK", content_type="text/plain")
        return json_reply({"path": request.path}, 404)

    def test_it_makes_room(self) -> None:
        """What has no size is estimated by its name; what runs makes room, by its own way to unload."""
        with self.residency.place(self.config.models["right"], NoClient(), time.monotonic() + SOON):
            self.assertEqual(["left"], self.unloaded)
        said = residency_api.overview(self.residency, NoClient())
        self.assertEqual("llama-swap", said["backends"]["swap"]["server"])
        sizes = {model["name"]: model["size"] for model in said["models"]}
        self.assertTrue(7.0 * 1e9 < sizes["right"] < 8.5 * 1e9, sizes)

    def test_it_outstays(self) -> None:
        """keep_alive holds for it as well: after a use, and not before one."""
        with self.residency.place(self.config.models["left"], NoClient(), time.monotonic() + SOON) as place:
            self.residency.check()
            self.assertEqual([], self.unloaded)
            place.began()
        self.residency.check()
        self.assertEqual(["left"], self.unloaded)


class OtherServersTest(unittest.TestCase):
    def residency(self, answer: Any, more: str = "") -> tuple[Residency, config.Config]:
        server = self.enterContext(ScriptedServer(then=answer))
        toml = f'[memory]\nbudget = "10GB"\n[backends.x]\nkind = "openai"\nurl = "{server.url}/v1"\n{more}\n'
        parsed = config.parse(toml + '[models.a]\nbackend = "x"\nmodel = "a-70b"\n', "models.toml", {})
        residency = Residency(parsed, read=memory.Reading)
        self.addCleanup(residency.stop)
        return residency, parsed

    def test_one_that_does_not_tell(self) -> None:
        """vLLM and the like: requests go on, and it is told why nobody minds them."""

        def answer(request: ScriptedRequest) -> bytes:
            known = {"data": [{"id": "a-70b", "owned_by": "vllm"}]} if request.path == "/v1/models" else {}
            return json_reply(known, 200 if known else 404)

        residency, parsed = self.residency(answer)
        with residency.place(parsed.models["a"], NoClient(), time.monotonic() + SOON):
            pass
        self.assertEqual({"x": "it does not tell what it has loaded"}, residency_api.health(residency)["unasked"])
        for act in (residency.load, residency.unload):
            with self.assertRaises(BackendError) as caught:
                act(parsed.models["a"], NoClient(), time.monotonic() + SOON)
            self.assertEqual("unsupported", caught.exception.reason)

    def test_a_llama_server_with_one_model(self) -> None:
        """It has that one, always, under any name; it takes its part of the budget."""
        entry = {"id": "weights.gguf", "owned_by": "llamacpp", "meta": {"size": 6 * GB, "n_ctx": 4096}}
        residency, parsed = self.residency(lambda _: json_reply({"data": [entry]}))
        with residency.place(parsed.models["a"], NoClient(), time.monotonic() + SOON) as place:
            assert isinstance(place, Place)
            self.assertFalse(place.wish.loads)
        [loaded] = residency_api.overview(residency, NoClient())["loaded"]
        self.assertEqual((["a"], True), (loaded["names"], loaded["fixed"]))
        self.assertGreater(loaded["size"], 6 * GB)

    def test_one_elsewhere(self) -> None:
        """A server that is not in this machine's memory is not asked."""
        residency, parsed = self.residency(json_reply({}), "local = false")
        self.assertNotIsInstance(residency.place(parsed.models["a"], NoClient(), 0.0), Place)

    def test_where_a_server_is(self) -> None:
        """By its address, unless the configuration says it."""
        base = config.Backend("x", "ollama", "", "http", "127.0.0.1", 1)
        self.assertTrue(is_here(base))
        self.assertTrue(is_here(replace(base, host="localhost")))
        self.assertFalse(is_here(replace(base, host="192.168.1.5")))
        self.assertFalse(is_here(replace(base, local=False)))
        self.assertTrue(is_here(replace(base, host="box.lan", local=True)))


if __name__ == "__main__":
    unittest.main()
