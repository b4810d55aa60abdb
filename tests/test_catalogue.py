"""backends/catalogue.py over real sockets: what backends of every kind say of their models, and when they are asked."""

import json
import threading
import time
import unittest
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

from portway import config
from portway.backends import catalogue
from portway.backends.catalogue import FRESH, RETRY, Catalogue, Facts
from tests.doubles import CLOSE, HANG, ScriptedRequest, ScriptedServer, http_reply, json_reply
from tests.test_transport import free_port

LONG = 10.0  # seconds; nothing here takes so long

# as Ollama 0.33 sends them, shortened; the list's capabilities are wrong for a model whose template is in its file
TAGS = {
    "models": [
        {
            "name": "tiny:latest",
            "model": "tiny:latest",
            "size": 625880,
            "digest": "3c13",
            "details": {"format": "gguf", "family": "llama", "context_length": 2048},
            "capabilities": ["completion"],
        },
        {"name": "qwen3.5:9b", "model": "qwen3.5:9b", "size": 6594474711},
        {"name": "hf.co/a/B-GGUF:Q4", "model": "hf.co/a/B-GGUF:Q4", "size": 1},
    ]
}
SHOW = {
    "parameters": "num_ctx 1024",
    "template": "{{ .Prompt }}",
    "details": {"family": "llama"},
    "model_info": {
        "general.architecture": "llama",
        "clip.context_length": 77,
        "llama.context_length": 2048,
        "llama.rope.scaling.original_context_length": 512,
        "tokenizer.ggml.tokens": None,
    },
    "tensors": [{"name": "x", "type": "F32", "shape": [1]}] * 50,
    "capabilities": ["tools", "completion"],
}
LLAMA_SERVER = {
    "id": "tiny",
    "aliases": ["tiny", "tiny-alias"],
    "object": "model",
    "owned_by": "llamacpp",
    "meta": {"n_ctx": 2048, "n_ctx_train": 4096, "size": 12345},
}


def listing(*entries: Any) -> dict[str, Any]:
    return {"object": "list", "data": list(entries)}


def parsed(
    backends: Mapping[str, tuple[str, str]], models: Mapping[str, tuple[str, str]], extra: str = ""
) -> config.Config:
    """backends: name -> (kind, url); models: name -> (backend, its own name). extra: lines for each model."""
    lines = []
    for name, (kind, url) in backends.items():
        lines += [f"[backends.{name}]", f'kind = "{kind}"', f'url = "{url}"']
    for name, (backend, model) in models.items():
        lines += [f"[models.{name}]", f'backend = "{backend}"', f'model = "{model}"', extra]
    return config.parse("\n".join(lines), "models.toml", {})


class Ollama:
    """Answers like Ollama: the tags, and /api/show by model (a dict, bytes, or a status)."""

    def __init__(self, shows: Mapping[str, Any], tags: Any = None) -> None:
        self.shows = shows
        self.tags = TAGS if tags is None else tags

    def __call__(self, request: ScriptedRequest) -> bytes:
        if (request.method, request.path) == ("GET", "/api/tags"):
            return json_reply(self.tags)
        assert (request.method, request.path) == ("POST", "/api/show")
        found = self.shows.get(request.json["model"])
        if found is None:
            return json_reply({"error": f"model '{request.json['model']}' not found"}, 404)
        return found if isinstance(found, bytes) else json_reply(found)


class CatalogueCase(unittest.TestCase):
    def server(self, then: Any) -> ScriptedServer:
        server = ScriptedServer(then=then)
        self.addCleanup(server.stop)
        return server

    def asked(self, kind: str, then: Any, *models: str, extra: str = "") -> Catalogue:
        """The catalogue of one such server, refreshed; each model is named as it is there."""
        url = self.server(then).url
        self.config = parsed({"b": (kind, url)}, {f"m{i}": ("b", model) for i, model in enumerate(models)}, extra)
        found = Catalogue(self.config)
        found.refresh()
        return found

    def facts(self, of: Catalogue, index: int = 0) -> Facts:
        facts = of.facts(self.config.models[f"m{index}"])
        assert facts is not None, of.problems()
        return facts

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for what another thread is about to do and offers no event for."""
        end = time.monotonic() + LONG
        while not holds():
            self.assertLess(time.monotonic(), end)
            threading.Event().wait(0.002)


class OllamasModels(CatalogueCase):
    def test_what_it_says(self):
        """Its own architecture's window, the capabilities of /api/show, the size of the list."""
        found = self.asked("ollama", Ollama({"tiny": SHOW}), "tiny")
        self.assertEqual(Facts(True, 2048, frozenset({"tools", "completion"}), 625880), self.facts(found))
        self.assertEqual([], found.missing())
        model = found.completed(self.config.models["m0"])
        self.assertEqual(frozenset({"tools", "completion"}), model.capabilities)
        self.assertIsNone(model.num_ctx)

    def test_what_is_configured_stands(self):
        """The configuration is silent, or it is right."""
        found = self.asked("ollama", Ollama({"tiny": SHOW}), "tiny", extra='capabilities = ["vision"]\nnum_ctx = 512')
        model = found.completed(self.config.models["m0"])
        self.assertEqual((frozenset({"vision"}), 512), (model.capabilities, model.num_ctx))

    def test_one_model_has_many_names(self):
        """As Ollama resolves them."""
        names = ["tiny", "TINY", "tiny:latest", "library/tiny", "registry.ollama.ai/library/tiny", "hf.co/a/b-gguf:q4"]
        found = self.asked("ollama", Ollama(dict.fromkeys(names, SHOW)), *names)
        self.assertEqual([True] * 6, [self.facts(found, index).present for index in range(6)])

    def test_a_model_is_asked_for_once(self):
        """However many logical models stand on it."""
        server = self.server(Ollama({"tiny": SHOW}))
        found = Catalogue(
            parsed({"b": ("ollama", server.url)}, {"a": ("b", "tiny"), "c": ("b", "tiny")}, "num_ctx = 512")
        )
        found.refresh()
        self.assertEqual(["/api/tags", "/api/show"], [request.path for request in server.requests])
        self.assertEqual(1, server.connections)

    def test_a_missing_model(self):
        """It is told with the way out, and not asked for."""
        found = self.asked("ollama", Ollama({"tiny": SHOW}), "tiny", "nope:7b", "tiny:other", "b-gguf")
        self.assertEqual([True, False, False, False], [self.facts(found, index).present for index in range(4)])
        self.assertEqual("m1: backend b has no nope:7b; ollama pull nope:7b", found.missing()[0])
        self.assertEqual(3, len(found.missing()))

    def test_a_damaged_model_hides_no_other(self):
        """/api/show fails for it; it is there nevertheless."""
        shows = {"tiny": SHOW, "qwen3.5:9b": json_reply({"error": "unexpected EOF"}, 500)}
        found = self.asked("ollama", Ollama(shows), "qwen3.5:9b", "tiny")
        self.assertEqual(Facts(True, None, None, 6594474711), self.facts(found, 0))
        self.assertEqual(2048, self.facts(found, 1).context_length)
        self.assertEqual({}, found.problems())

    def test_answers_that_lack_something(self):
        """What is not said, or is no sense, is not known."""
        for show in (
            {},
            {"capabilities": None, "model_info": None},
            {"capabilities": "tools", "model_info": []},
            {"model_info": {"general.architecture": "llama", "llama.context_length": "2048"}},
            {"model_info": {"general.architecture": "llama", "llama.context_length": True}},
            {"model_info": {"general.architecture": None, "llama.context_length": 1}},
            {"model_info": {"general.architecture": "llama", "llama.context_length": -1}},
        ):
            found = self.asked("ollama", Ollama({"tiny": show}), "tiny")
            self.assertEqual(Facts(True, None, None, 625880), self.facts(found), show)
        for tags in ({}, {"models": None}, {"models": "x"}, {"models": [1, None, {}, {"name": 5}]}):
            self.assertFalse(self.facts(self.asked("ollama", Ollama({}, tags), "tiny")).present)


class OpenAIsModels(CatalogueCase):
    def window(self, model: str, *entries: Any) -> int | None:
        return self.facts(self.asked("openai", json_reply(listing(*entries)), model)).context_length

    def test_llama_server(self):
        """Its window is the one it runs with, not the one it was trained with."""
        found = self.asked("openai", json_reply(listing(LLAMA_SERVER)), "tiny")
        self.assertEqual(Facts(True, 2048, None, 12345), self.facts(found))
        self.assertEqual(2048, found.completed(self.config.models["m0"]).num_ctx)

    def test_llama_server_answers_to_any_name(self):
        """With one model; its aliases are names of it, too."""
        found = self.asked("openai", json_reply(listing(LLAMA_SERVER)), "tiny-alias", "whatever")
        self.assertEqual([2048, 2048], [self.facts(found, index).context_length for index in range(2)])
        self.assertEqual([], found.missing())

    def test_llama_servers_router_does_not(self):
        """It knows each model's status, a window only of those that are loaded, and no others."""
        loaded = {**LLAMA_SERVER, "status": {"value": "loaded"}}
        unloaded = {"id": "other", "object": "model", "owned_by": "llamacpp", "status": {"value": "unloaded"}}
        found = self.asked("openai", json_reply(listing(loaded, unloaded)), "tiny", "other", "nope")
        self.assertEqual((2048, None), tuple(self.facts(found, index).context_length for index in range(2)))
        self.assertEqual([True, True, False], [self.facts(found, index).present for index in range(3)])
        self.assertEqual(["m2: backend b has no nope; see its own list of models"], found.missing())
        found = self.asked("openai", json_reply(listing(unloaded)), "nope")
        self.assertFalse(self.facts(found).present)

    def test_llama_swaps_aliases(self):
        """It lists none of them; they stand beside the model they are names of."""
        entry = {"id": "q", "owned_by": "llama-swap", "meta": {"llamaswap": {"type": "model", "aliases": ["quick"]}}}
        found = self.asked("openai", json_reply(listing(entry)), "quick", "nope")
        self.assertEqual([True, False], [self.facts(found, index).present for index in range(2)])

    def test_the_others_names_for_it(self):
        """vLLM's, LM Studio's and OpenRouter's; none is no news."""
        self.assertEqual(40960, self.window("q", {"id": "q", "owned_by": "vllm", "max_model_len": 40960}))
        self.assertEqual(8192, self.window("q", {"id": "q", "context_length": 8192}))
        self.assertEqual(4096, self.window("q", {"id": "q", "context_window": 4096}))
        self.assertEqual(4096, self.window("q", {"id": "q", "meta": {"n_ctx": 0}, "context_window": 4096}))
        self.assertIsNone(self.window("q", {"id": "q", "meta": "?", "max_model_len": "many", "aliases": 5}))

    def test_another_servers_only_model_is_not_any_model(self):
        """vLLM answers 404 to other names."""
        found = self.asked("openai", json_reply(listing({"id": "q", "owned_by": "vllm"})), "p")
        self.assertFalse(self.facts(found).present)

    def test_ollamas_names(self):
        """An Ollama behind its own /v1 leaves out what it adds to a name."""
        found = self.asked(
            "openai", json_reply(listing({"id": "tiny:latest", "owned_by": "library"})), "tiny", "tiny:7b"
        )
        self.assertEqual([True, False], [self.facts(found, index).present for index in range(2)])

    def test_a_window_that_is_configured_stands(self):
        """It may be smaller on purpose."""
        found = self.asked("openai", json_reply(listing(LLAMA_SERVER)), "tiny", extra="num_ctx = 512")
        self.assertEqual(512, found.completed(self.config.models["m0"]).num_ctx)


class Problems(CatalogueCase):
    def problem(self, kind: str, then: Any) -> tuple[str, str]:
        """(reason, the line that a user sees)."""
        found = self.asked(kind, then, "tiny")
        self.assertIsNone(found.facts(self.config.models["m0"]))
        self.assertIs(self.config.models["m0"], found.completed(self.config.models["m0"]))
        (line,) = found.missing()
        self.assertIn("backend b (http://127.0.0.1:", line)
        return found.problems()["b"].reason, line

    def test_nobody_is_there(self):
        """The line says how to change that."""
        settings = parsed({"b": ("ollama", f"http://127.0.0.1:{free_port()}")}, {"m": ("b", "tiny")})
        found = Catalogue(settings)
        found.refresh()
        self.assertEqual("connect_failed", found.problems()["b"].reason)
        self.assertIn("start b, or correct backends.b.url", found.missing()[0])

    def test_something_else_is_there(self):
        """Another API, another protocol, broken JSON, JSON of another shape."""
        for kind, path in (("ollama", "/api/tags"), ("openai", "/v1/models")):
            for then, word in (
                (http_reply(b"404 page not found", status=404, content_type="text/plain"), f"no {path} (404)"),
                (http_reply(b"<html>", content_type="text/html"), "not JSON"),
                (http_reply(b""), "not JSON"),
                (http_reply(b'{"models": ['), "not JSON"),
                (http_reply(b"[" * 200_000), "nested too deeply"),
                (http_reply(b'"\xff"'), "not JSON"),
                (json_reply([]), "no JSON object"),
                (json_reply(None), "no JSON object"),
                ([b"SSH-2.0\r\n\r\n", CLOSE], "not HTTP"),
                (json_reply({"error": "broken"}, 500), "answered"),
            ):
                _, line = self.problem(kind, then)
                self.assertIn(word, line)
                self.assertNotIn("ollama pull", line)

    def test_a_key_is_refused(self):
        """The reason is the one that requests would get."""
        reason, line = self.problem("openai", json_reply({"error": {"message": "Invalid API Key"}}, 401))
        self.assertEqual("backend_auth", reason)
        self.assertIn("401", line)

    def test_an_answer_without_an_end(self):
        """A list is bounded in size and in time."""
        with mock.patch.object(catalogue, "MAX_LIST", 1000):
            reason, _ = self.problem("openai", json_reply(listing({"id": "x" * 1000})))
        self.assertEqual("bad_answer", reason)
        with mock.patch.object(catalogue, "PATIENCE", 0.05):
            reason, line = self.problem("openai", [HANG])
        self.assertEqual("answer_timeout", reason)
        self.assertIn("no answer within", line)

    def test_one_backends_trouble_is_not_anothers(self):
        """The others' facts are there."""
        good = self.server(json_reply(listing(LLAMA_SERVER)))
        backends = {"bad": ("ollama", f"http://127.0.0.1:{free_port()}"), "good": ("openai", good.url)}
        settings = parsed(backends, {"a": ("bad", "x"), "c": ("good", "tiny")})
        found = Catalogue(settings)
        found.refresh()
        self.assertEqual(["bad"], list(found.problems()))
        self.assertIsNone(found.facts(settings.models["a"]))
        self.assertIsNotNone(found.facts(settings.models["c"]))

    def test_a_backend_that_is_away_for_a_moment(self):
        """What it said before is still believed; that it is away is told."""
        server = ScriptedServer(then=json_reply(listing(LLAMA_SERVER)))
        settings = parsed({"b": ("openai", server.url)}, {"m": ("b", "tiny")})
        found = Catalogue(settings)
        found.refresh()
        server.stop()
        found.refresh()
        self.assertEqual(2048, found.completed(settings.models["m"]).num_ctx)
        self.assertEqual(1, len(found.missing()))
        self.assertIn("can't be reached", found.missing()[0])

    def test_an_unused_backend_is_not_asked(self):
        """Nobody waits for what no model needs."""
        server = self.server(json_reply(listing(LLAMA_SERVER)))
        unused = self.server(json_reply(listing()))
        found = Catalogue(parsed({"b": ("openai", server.url), "u": ("openai", unused.url)}, {"m": ("b", "tiny")}))
        found.refresh()
        self.assertEqual((1, 0), (len(server.requests), len(unused.requests)))


class Refreshing(CatalogueCase):
    def setUp(self) -> None:
        self.now = 1000.0
        self.going = threading.Event()
        self.going.set()
        body = json.dumps(listing(LLAMA_SERVER)).encode()
        self.backend = self.server([self.going, http_reply(body)])
        settings = parsed({"b": ("openai", self.backend.url)}, {"m": ("b", "tiny")})
        self.model = settings.models["m"]
        self.catalogue = Catalogue(settings, clock=lambda: self.now)

    def asks(self) -> int:
        """How often the backend has been asked, once nobody asks any more."""
        self.until(lambda: not any(thread.name == "portway-catalogue" for thread in threading.enumerate()))
        return len(self.backend.requests)

    def test_answers_stay_fresh_for_a_while(self):
        """Then they are asked for again, on another thread."""
        self.catalogue.refresh_soon()
        self.assertEqual(1, self.asks())
        self.assertIsNotNone(self.catalogue.facts(self.model))
        for later, asked in ((FRESH - 1, 1), (FRESH, 2), (FRESH + 1, 2)):
            self.now = 1000.0 + later
            self.catalogue.refresh_soon()
            self.assertEqual(asked, self.asks())

    def test_without_a_thread_to_ask(self):
        """What is known stays; it is asked for the next time."""
        with mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
            self.catalogue.refresh_soon()
        self.assertEqual(0, self.asks())
        self.catalogue.refresh_soon()
        self.assertEqual(1, self.asks())

    def test_a_backend_without_an_answer_is_asked_sooner(self):
        """It may just have been started."""
        settings = parsed({"b": ("openai", f"http://127.0.0.1:{free_port()}")}, {"m": ("b", "tiny")})
        found = Catalogue(settings, clock=lambda: self.now)
        found.refresh()
        with mock.patch.object(found, "refresh") as refresh:
            self.now += RETRY - 0.1
            found.refresh_soon()
            refresh.assert_not_called()
            self.now += 0.1
            found.refresh_soon()
        refresh.assert_called_once()

    def test_one_at_a_time(self):
        """While one thread asks, no other does, and none is made for it; readers do not wait."""
        self.going.clear()
        self.catalogue.refresh_soon()
        self.backend.wait_requests(1)
        with mock.patch("threading.Thread") as thread:
            self.catalogue.refresh_soon()
            self.catalogue.refresh()
        thread.assert_not_called()
        self.assertIsNone(self.catalogue.facts(self.model))
        self.assertEqual({}, self.catalogue.problems())
        self.going.set()
        self.assertEqual(1, self.asks())
        self.assertIsNotNone(self.catalogue.facts(self.model))

    def test_a_crash_lets_the_next_one_ask(self):
        """The lock is not lost with it."""
        with mock.patch.object(self.catalogue, "_ask_all", side_effect=RuntimeError), self.assertRaises(RuntimeError):
            self.catalogue.refresh()
        self.catalogue.refresh()
        self.assertEqual(1, self.asks())

    def test_nothing_is_left_open(self):
        """The connections of a refresh end with it."""
        self.catalogue.refresh()
        self.backend.wait_closed(0)


if __name__ == "__main__":
    unittest.main()
