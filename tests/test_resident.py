"""What each kind of server tells of its memory, and how it is told: a real llama-server, the others played."""

from __future__ import annotations

import http.client
import json
import math
import tempfile
import threading
import time
import unittest
from dataclasses import replace
from pathlib import Path
from typing import Any

from portway import config
from portway.backends.openai import OpenAIBackend
from portway.call import Limits, finish
from portway.errors import BackendError
from portway.memory import api as residency_api
from portway.memory import llama_swap
from portway.memory import machine as memory
from portway.memory.budget import is_here
from portway.memory.residency import Place, Residency
from portway.watch import NoClient
from tests.blocking import close, read
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
        with finish(self.residency.place(target, NoClient(), until)) as place:
            limits = Limits(5.0, 30.0, 30.0, 30.0, until, until)
            answer = place.hold(finish(backend.open(chat(target), target, limits, NoClient())))
            try:
                self.assertIn(b"[DONE]", read(answer, place))
            finally:
                close(answer)
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

    def test_somebody_was_quicker(self) -> None:
        """What is loaded or unloaded already is no error."""
        right = self.config.models["right"]
        engine = self.residency._engines["router"]
        self.residency.refresh(NoClient())
        engine.unload("right", NoClient())
        for _ in range(2):
            engine.load(right, NoClient(), time.monotonic() + 30.0)
        self.assertEqual("loaded", self.statuses()["right"])
        for name in ("nobody", ""):
            with self.assertRaises(BackendError):
                engine.unload(name, NoClient())

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
    """llama-swap, played as it was seen on the wire: what runs, and unloading by name."""

    def setUp(self) -> None:
        self.running = {"left": "ready"}
        self.unloaded: list[str] = []
        self.used: list[str] = []
        self.looked_for_requests = 0
        self.winds_up_after = math.inf
        self.tells_status = True  # since 2026
        self.url = f"{self.enterContext(ScriptedServer(then=self.answer)).url}/v1"
        toml = f'[memory]\nbudget = "10GB"\nmin_stay = 0\n[backends.swap]\nkind = "openai"\nurl = "{self.url}"\n'
        toml += '[models.left]\nbackend = "swap"\nmodel = "l"\nsize = "6GB"\nkeep_alive = 0\n'
        toml += '[models.right]\nbackend = "swap"\nmodel = "org/right-7b-q8_0"\n'
        toml += '[models.far]\nbackend = "swap"\nmodel = "peer/huge-400b"\n'
        self.config = config.parse(toml, "models.toml", {})
        self.residency = Residency(self.config, read=memory.Reading)
        self.addCleanup(self.residency.stop)

    def answer(self, request: ScriptedRequest) -> bytes:
        if request.path == "/v1/models":
            return json_reply({"data": [*map(self.listed, ("left", "org/right-7b-q8_0", "peer/huge-400b"))]})
        if request.path == "/running":
            return json_reply({"running": [{"model": name, "state": state} for name, state in self.running.items()]})
        if request.path == "/api/events":
            self.looked_for_requests += 1
            if self.looked_for_requests > self.winds_up_after:
                self.used = []
            requests = [{"id": "2", "model": name} for name in self.used]
            snapshot = json.dumps({"operation": "snapshot", **({"requests": requests} if requests else {})})
            event = json.dumps({"type": "inflight", "data": snapshot})
            log = json.dumps({"type": "logData", "data": "{}"})
            body = f"event:message\ndata:{log}\n\nevent:message\ndata:{event}\n\n"
            return http_reply(body.encode(), content_type="text/event-stream")
        if request.path.startswith("/api/models/unload/"):
            name = request.path.removeprefix("/api/models/unload/")
            self.unloaded.append(name)
            self.running.pop(name, None)
            return http_reply(b"OK", content_type="text/plain")
        return json_reply({"path": request.path}, 404)

    def listed(self, name: str) -> dict[str, Any]:
        own: dict[str, Any] = {"type": "peer" if name.startswith("peer/") else "model"}
        if name == "left":
            own["aliases"] = ["l"]
        entry: dict[str, Any] = {"id": name, "owned_by": "llama-swap", "meta": {"llamaswap": own}}
        if self.tells_status:
            entry["status"] = {"value": "loaded" if name in self.running else "unloaded"}
        return entry

    def test_it_makes_room(self) -> None:
        """What has no size is estimated by its name; what runs makes room, by its own way to unload."""
        with finish(self.residency.place(self.config.models["right"], NoClient(), time.monotonic() + SOON)):
            self.assertEqual(["left"], self.unloaded)
        said = residency_api.overview(self.residency, NoClient())
        self.assertEqual("llama-swap", said["backends"]["swap"]["server"])
        sizes = {model["name"]: model["size"] for model in said["models"]}
        self.assertTrue(7.0 * 1e9 < sizes["right"] < 8.5 * 1e9, sizes)

    def test_an_older_one(self) -> None:
        """Without a status in its list it is the same server."""
        self.tells_status = False
        self.test_it_makes_room()

    def test_an_alias(self) -> None:
        """A model under another of its names is the one that runs."""
        [loaded] = residency_api.overview(self.residency, NoClient())["loaded"]
        self.assertEqual(("left", ["left"], 6 * GB), (loaded["model"], loaded["names"], loaded["size"]))
        self.assertTrue(self.residency.unload(self.config.models["left"], NoClient(), time.monotonic() + SOON))
        self.assertEqual(["left"], self.unloaded)

    def test_a_size_that_one_name_says(self) -> None:
        """Of two names for the same model one may say its size; it is the model's."""
        for first, second in (('size = "6GB"', ""), ("", 'size = "6GB"')):
            toml = f'[memory]\nbudget = "10GB"\n[backends.swap]\nkind = "openai"\nurl = "{self.url}"\n'
            for name, more in (("one", first), ("two", second)):
                toml += f'[models.{name}]\nbackend = "swap"\nmodel = "left"\n{more}\n'
            residency = Residency(config.parse(toml, "models.toml", {}), read=memory.Reading)
            self.addCleanup(residency.stop)
            [loaded] = residency_api.overview(residency, NoClient())["loaded"]
            self.assertEqual(6 * GB, loaded["size"])

    def test_what_is_elsewhere(self) -> None:
        """A peer's model takes no memory here, so nothing makes room for it, and it is never too large."""
        with finish(self.residency.place(self.config.models["far"], NoClient(), time.monotonic() + SOON)):
            self.assertEqual([], self.unloaded)

    def test_what_another_client_uses(self) -> None:
        """Unloading would break off its answer; whoever does not use it is no reason."""
        self.used = ["left"]
        with self.assertRaises(BackendError) as caught:
            self.residency.unload(self.config.models["left"], NoClient(), time.monotonic() + SOON)
        self.assertEqual(("busy", []), (caught.exception.reason, self.unloaded))
        self.used = ["org/right-7b-q8_0"]
        self.assertTrue(self.residency.unload(self.config.models["left"], NoClient(), time.monotonic() + SOON))

    def test_what_is_just_ending(self) -> None:
        """A request whose answer has ended may be listed a moment longer: that is looked at again."""
        self.used, self.winds_up_after = ["left"], 2
        self.assertTrue(self.residency.unload(self.config.models["left"], NoClient(), time.monotonic() + SOON))
        self.assertEqual(3, self.looked_for_requests)

    def test_load(self) -> None:
        """Loaded is what runs, whatever its own /health says; what does not run then has failed."""
        self.residency.load(self.config.models["left"], NoClient(), time.monotonic() + SOON)
        with self.assertRaises(BackendError):
            self.residency.load(self.config.models["right"], NoClient(), time.monotonic() + SOON)

    def test_it_outstays(self) -> None:
        """keep_alive holds for it as well: after a use, and not before one."""
        with finish(self.residency.place(self.config.models["left"], NoClient(), time.monotonic() + SOON)) as place:
            self.residency.check()
            self.assertEqual([], self.unloaded)
            place.began()
        self.residency.check()
        self.assertEqual(["left"], self.unloaded)

    def test_at_once(self) -> None:
        """keep_alive 0 is not kept waiting for the monitor's next round."""
        text = '[memory]\nbudget = "10GB"\nmin_stay = 0\ncheck = 3600\n[backends.swap]\nkind = "openai"\n'
        text += f'url = "{self.url}"\n[models.left]\nbackend = "swap"\nmodel = "left"\nsize = "1GB"\nkeep_alive = 0\n'
        parsed = config.parse(text, "models.toml", {})
        residency = Residency(parsed, read=memory.Reading)
        self.addCleanup(residency.stop)
        residency.start()
        with finish(residency.place(parsed.models["left"], NoClient(), time.monotonic() + SOON)) as place:
            place.began()
            wait_for(lambda: residency._asleep or not residency._poke.is_set(), "the monitor's round after the load")
        wait_for(lambda: self.unloaded == ["left"], "its unloading")

    def test_it_is_awaited(self) -> None:
        """One whose time is over stays where somebody waits for it, for a place at its server say."""
        text = f'[memory]\nbudget = "99GB"\n[backends.swap]\nkind = "openai"\nurl = "{self.url}"\nmax_parallel = 1\n'
        for name, keep_alive in (("left", 0), ("org/right-7b-q8_0", -1)):
            text += f'[models."{name}"]\nbackend = "swap"\nmodel = "{name}"\nsize = "1GB"\nkeep_alive = {keep_alive}\n'
        parsed = config.parse(text, "models.toml", {})
        residency = Residency(parsed, read=memory.Reading)
        self.addCleanup(residency.stop)

        def place(name: str) -> Any:
            return finish(residency.place(parsed.models[name], NoClient(), time.monotonic() + SOON))

        with place("left") as first:
            first.began()
        with place("org/right-7b-q8_0"):
            waiting = threading.Thread(target=lambda: place("left").leave())
            waiting.start()
            wait_for(lambda: len(residency.snapshot().waiting) == 1, "its waiting")
            residency.check()
            self.assertEqual([], self.unloaded)
        waiting.join(SOON)
        residency.check()
        self.assertEqual(["left"], self.unloaded)


class LlamaSwapWordsTest(unittest.TestCase):
    def test_names(self) -> None:
        """Models with their aliases, listed apart or not; what is not loaded under its own name is told apart."""
        listed: list[dict[str, Any]] = [
            {"id": "a", "meta": {"llamaswap": {"type": "model", "aliases": ["x"]}}},
            {"id": "y", "meta": {"llamaswap": {"type": "alias", "modelID": "a"}}},
            {"id": "s", "meta": {"llamaswap": {"type": "selector"}}},
            {"id": "old", "meta": None},
        ]
        self.assertEqual(
            [("a", "a", False), ("x", "a", False), ("y", "a", False), ("s", "s", True), ("old", "old", False)],
            list(map(tuple, llama_swap.names(listed))),
        )

    def test_commands(self) -> None:
        """The file's size, of all its parts, and the window, however the options are written; else nothing."""
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        for number in (1, 2, 3):
            (folder / f"big-0000{number}-of-00003.gguf").write_bytes(b"x" * number)
        (folder / "a b.gguf").write_bytes(b"1234")
        first = folder / "big-00001-of-00003.gguf"
        commands: list[tuple[Any, tuple[int | None, int | None]]] = [
            (f"llama-server --model {first} -c 4096", (6, 4096)),
            (f"llama-server \\\n  -m '{folder}/a b.gguf' --ctx-size=512 -c 1024", (4, 1024)),
            (["--model", str(folder / "a b.gguf"), "-c", "0"], (4, None)),
            (f"llama-server --model {folder}/none.gguf", (None, None)),
            ("llama-server -hf org/model:q4 -c many", (None, None)),
            ("vllm serve 'unclosed", (None, None)),
            ("--model", (None, None)),
            ("--model \0", (None, None)),
            ("", (None, None)),
            (None, (None, None)),
        ]
        for command, expected in commands:
            self.assertEqual(expected, tuple(llama_swap.read_command(command)), command)
        (folder / "big-00002-of-00003.gguf").unlink()
        self.assertIsNone(llama_swap.read_command(["-m", str(first)]).weights)

    def test_events(self) -> None:
        """Only the whole list of requests says who is used; what is no such event says nothing."""

        def event(snapshot: object, kind: str = "inflight") -> bytes:
            return json.dumps({"type": kind, "data": json.dumps(snapshot)}).encode()

        requests = {"operation": "snapshot", "requests": [{"model": "a"}, 7]}
        self.assertIs(True, llama_swap.requests_for("a", event(requests)))
        self.assertIs(False, llama_swap.requests_for("b", event(requests)))
        self.assertIs(False, llama_swap.requests_for("a", event({"operation": "snapshot"})))
        silent = [event(requests, "logData"), event({"operation": "upsert"}), event(7), b"{", b"[]", b"{}", b"7"]
        silent += [b'{"type": "inflight", "data": 7}', b'{"type": "inflight", "data": "{"}']
        for data in silent:
            self.assertIsNone(llama_swap.requests_for("a", data), data)


class RouterTest(unittest.TestCase):
    def test_a_load_that_fails(self) -> None:
        """What its router says has failed is an error with its exit code, at once."""

        def answer(request: ScriptedRequest) -> bytes:
            if request.path == "/v1/models":
                status = {"value": "unloaded", "failed": True, "exit_code": 134}
                return json_reply({"data": [{"id": "a", "owned_by": "llamacpp", "status": status}]})
            return json_reply({"success": True})

        server = self.enterContext(ScriptedServer(then=answer))
        toml = f'[backends.x]\nkind = "openai"\nurl = "{server.url}/v1"\n[models.a]\nbackend = "x"\nmodel = "a"\n'
        parsed = config.parse(toml, "models.toml", {})
        residency = Residency(parsed, read=memory.Reading)
        self.addCleanup(residency.stop)
        with self.assertRaises(BackendError) as caught:
            residency.load(parsed.models["a"], NoClient(), time.monotonic() + SOON)
        self.assertEqual(("server_error", "a could not be loaded (exit 134)"), (
            caught.exception.reason, caught.exception.message
        ))  # fmt: skip


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
        asked: list[str] = []

        def answer(request: ScriptedRequest) -> bytes:
            asked.append(request.path)
            known = {"data": [{"id": "a-70b", "owned_by": "vllm"}]} if request.path == "/v1/models" else {}
            return json_reply(known, 200 if known else 404)

        residency, parsed = self.residency(answer)
        with finish(residency.place(parsed.models["a"], NoClient(), time.monotonic() + SOON)):
            pass
        self.assertEqual({"x": "it does not tell what it has loaded"}, residency_api.health(residency)["unasked"])
        before = len(asked)
        residency._hearing["x"].looked_at = -math.inf
        residency.refresh(NoClient())
        self.assertEqual(before, len(asked))  # it won't tell the next minute either
        for act in (residency.load, residency.unload):
            with self.assertRaises(BackendError) as caught:
                act(parsed.models["a"], NoClient(), time.monotonic() + SOON)
            self.assertEqual("unsupported", caught.exception.reason)

    def test_a_llama_server_with_one_model(self) -> None:
        """It has that one, always, under any name; it takes its part of the budget."""
        entry = {"id": "weights.gguf", "owned_by": "llamacpp", "meta": {"size": 6 * GB, "n_ctx": 4096}}
        residency, parsed = self.residency(lambda _: json_reply({"data": [entry]}))
        with finish(residency.place(parsed.models["a"], NoClient(), time.monotonic() + SOON)) as place:
            assert isinstance(place, Place)
            self.assertFalse(place.wish.loads)
        [loaded] = residency_api.overview(residency, NoClient())["loaded"]
        self.assertEqual((["a"], True), (loaded["names"], loaded["fixed"]))
        self.assertGreater(loaded["size"], 6 * GB)

    def test_one_elsewhere(self) -> None:
        """A server that is not in this machine's memory is not asked."""
        residency, parsed = self.residency(json_reply({}), "local = false")
        self.assertNotIsInstance(finish(residency.place(parsed.models["a"], NoClient(), 0.0)), Place)

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
