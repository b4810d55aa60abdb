"""The daemon in front of a real Ollama: the one at $PORTWAY_OLLAMA, with the models that it has; else skipped.

Any models will do, the smaller the quicker: one is taken for each capability that is tested.
"""

from __future__ import annotations

import json
import os
import time
import unittest
import urllib.request
from datetime import datetime
from typing import Any, ClassVar, NamedTuple

from tests.daemon import Daemon
from tests.doubles import RawClient, RawResponse
from tests.llama_server import wait_for
from tests.targets import ask, frames, text_of

URL = os.environ.get("PORTWAY_OLLAMA", "").rstrip("/")
PATIENCE = 120.0  # seconds; a model may have to be loaded
NUM_CTX = 1024
MB = 1024**2
QUESTION = [{"role": "user", "content": "What is the weather like in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def ollama(path: str, body: dict[str, Any] | None = None) -> Any:
    """What Ollama itself says."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(URL + path, data), timeout=PATIENCE) as response:
        return json.load(response)


def by_capability() -> dict[str, list[str]]:
    """capability -> the models that have it, the smallest first."""
    found: dict[str, list[str]] = {}
    for entry in sorted(ollama("/api/tags")["models"], key=lambda entry: (entry["size"], entry["name"])):
        capabilities = ollama("/api/show", {"model": entry["name"]})["capabilities"]
        for capability in capabilities:
            if "completion" in capabilities or capability == "embedding":
                found.setdefault(capability, []).append(entry["name"])
    return found


@unittest.skipUnless(URL, "PORTWAY_OLLAMA names no running Ollama")
class RealOllamaTest(unittest.TestCase):
    models: ClassVar[dict[str, list[str]]]
    client: RawClient

    @classmethod
    def setUpClass(cls):
        cls.models = by_capability()
        toml = f'[backends.ollama]\nkind = "ollama"\nurl = "{URL}"\n'
        toml += '[models.missing]\nbackend = "ollama"\nmodel = "surely-not-there:1b"\n'
        for capability in ("completion", "tools", "thinking", "embedding"):
            for number, name in enumerate(cls.models.get(capability, ())):
                toml += f'[models.{capability}-{number}]\nbackend = "ollama"\nmodel = "{name}"\nkeep_alive = "1m"\n'
                toml += f"num_ctx = {NUM_CTX}\ntimeouts = {{ first_token = {PATIENCE} }}\n"
        daemon = cls.enterClassContext(Daemon(toml))
        cls.client = cls.enterClassContext(RawClient(daemon.port, PATIENCE))

    def need(self, capability: str, index: int = 0) -> str:
        if len(self.models.get(capability, ())) <= index:
            self.skipTest(f"it has no model for {capability}")
        return f"{capability}-{index}"

    def answered(self, model: str, **fields: Any) -> RawResponse:
        """An answer with something in it: a tiny model may well end before the first word, by chance."""
        for seed in range(20):
            response = ask(self.client, model, messages=QUESTION, seed=seed, **fields)
            if response.status == 200:
                break
            error = response.json["error"]
            if error["code"] != "empty_answer":  # or it begins a call that it can't end within max_tokens
                self.assertIn("raise max_tokens", error["message"])
        self.assertEqual(200, response.status)
        return response

    def test_chat(self):
        """A plain answer under the logical name, with true counts, and the model is kept as configured."""
        model = self.need("completion")
        response = self.answered(model, max_tokens=8)
        body = response.json
        self.assertEqual((200, model, model), (response.status, response.header("x-served-by"), body["model"]))
        message = body["choices"][0]["message"]
        self.assertTrue(message["content"] or message.get("reasoning_content"))
        self.assertIn(body["choices"][0]["finish_reason"], ("stop", "length"))
        usage = body["usage"]
        self.assertGreater(usage["prompt_tokens"], 5)
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])
        running = {each["name"]: each["context_length"] for each in ollama("/api/ps")["models"]}
        self.assertEqual(NUM_CTX, running[self.models["completion"][0]])

    def test_stream(self):
        """A stream says the same as the plain answer, and shows usage to who asks."""
        model = self.need("completion")
        fields: dict[str, Any] = {"messages": QUESTION, "max_tokens": 8, "seed": 1, "temperature": 0}
        plain = ask(self.client, model, **fields).json["choices"][0]
        chunks = frames(ask(self.client, model, stream=True, stream_options={"include_usage": True}, **fields).body)
        self.assertEqual("[DONE]", chunks.pop())
        self.assertEqual(plain["message"]["content"], text_of(chunks))
        self.assertGreater(chunks.pop()["usage"]["prompt_tokens"], 5)
        self.assertEqual(plain["finish_reason"], chunks[-1]["choices"][0]["finish_reason"])
        self.assertEqual(1, len({(each["id"], each["created"], each["model"]) for each in chunks}))

    def test_tools(self):
        """Every model that takes tools is offered one; what calls it makes have OpenAI's form, streamed or not."""
        self.need("tools")
        calls = 0
        for index in range(len(self.models["tools"][:6])):
            fields: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 64}
            choice = self.answered(f"tools-{index}", **fields).json["choices"][0]
            whole = choice["message"].get("tool_calls") or []
            chunks = frames(self.answered(f"tools-{index}", stream=True, **fields).body)[:-1]
            parts = [part for each in chunks for part in each["choices"][0]["delta"].get("tool_calls") or []]
            self.assertEqual(list(range(len(parts))), [part["index"] for part in parts])
            for call in [*whole, *parts]:
                self.assertEqual("function", call["type"])
                self.assertTrue(call["function"]["name"])
                self.assertIsInstance(json.loads(call["function"]["arguments"]), dict)
            self.assertEqual(len(whole), len({call["id"] for call in whole}))
            if whole:
                self.assertEqual("tool_calls", choice["finish_reason"])
            calls += len(whole) + len(parts)
        if not calls:
            self.skipTest("no model of it made a call")

    def test_reasoning(self):
        """Thinking stands beside the text, never in it."""
        model = self.need("thinking")
        message = self.answered(model, max_tokens=64).json["choices"][0]["message"]
        self.assertTrue(message["reasoning_content"])
        self.assertNotIn("<think>", message["content"])
        chunks = frames(self.answered(model, max_tokens=64, stream=True).body)
        self.assertTrue(text_of(chunks, "reasoning_content"))
        self.assertNotIn("<think>", text_of(chunks))

    def test_embeddings(self):
        """A vector for each text; base64 is what the SDKs ask for."""
        model = self.need("embedding")
        fields: dict[str, Any] = {"path": "/v1/embeddings", "input": ["one", "two"]}
        floats = ask(self.client, model, **fields).json
        packed = ask(self.client, model, encoding_format="base64", **fields).json
        self.assertEqual([0, 1], [item["index"] for item in floats["data"]])
        self.assertGreater(floats["usage"]["prompt_tokens"], 1)
        self.assertIsInstance(packed["data"][0]["embedding"], str)

    def test_overflow(self):
        """An overlong history is 400 context_length_exceeded, streamed or not: never a chopped answer."""
        model = self.need("completion")
        history = [{"role": "user", "content": "river stone " * 100} for _ in range(10)]  # more than the window
        for stream in (False, True):
            response = ask(self.client, model, messages=history, stream=stream)
            self.assertEqual((400, "context_length_exceeded"), (response.status, response.json["error"]["code"]))

    def test_missing_model(self):
        """404 with the command that gets it."""
        response = ask(self.client, "missing")
        self.assertEqual((404, "model_not_found"), (response.status, response.json["error"]["code"]))
        self.assertIn("ollama pull surely-not-there:1b", response.json["error"]["message"])

    def test_unsupported(self):
        """An embedding model does not chat: 400, with its reason."""
        model = self.need("embedding")
        response = ask(self.client, model)
        self.assertEqual((400, "unsupported"), (response.status, response.json["error"]["code"]))


class Loaded(NamedTuple):
    """A model as /api/ps has it. left: seconds that it still stays."""

    size: int
    num_ctx: int
    left: float


def in_memory() -> dict[str, Loaded]:
    """What Ollama itself says is loaded."""
    now = time.time()
    return {
        each["name"]: Loaded(
            each["size"], each["context_length"], datetime.fromisoformat(each["expires_at"]).timestamp() - now
        )
        for each in ollama("/api/ps")["models"]
    }


def say(model: str, keep_alive: object, num_ctx: int) -> None:
    """Another client's word, in the form in which Portway asks, so that nothing is loaded anew."""
    options = {"num_ctx": num_ctx}
    ollama("/api/chat", {"model": model, "messages": [], "keep_alive": keep_alive, "shift": False, "options": options})


@unittest.skipUnless(URL, "PORTWAY_OLLAMA names no running Ollama")
class RealResidencyTest(unittest.TestCase):
    """Two models, and a budget that has room for only one of them."""

    pair: ClassVar[dict[str, tuple[str, int]]]  # logical name -> Ollama's, num_ctx
    sizes: ClassVar[dict[str, int]]
    budget: ClassVar[int]

    @classmethod
    def setUpClass(cls):
        """The two smallest that are large enough for a budget, each with the window that makes them so."""
        found: dict[str, tuple[int, int]] = {}
        for entry in sorted(ollama("/api/tags")["models"], key=lambda entry: (entry["size"], entry["name"])):
            shown = ollama("/api/show", {"model": entry["name"]})
            if "completion" not in shown["capabilities"] or len(found) == 2:
                continue
            info = shown["model_info"]
            trained = info.get(f"{info['general.architecture']}.context_length", NUM_CTX)
            for num_ctx in (NUM_CTX, min(trained, 100_000)):
                say(entry["name"], "1m", num_ctx)
                size = in_memory()[entry["name"]].size
                say(entry["name"], 0, num_ctx)
                if size > 60 * MB:
                    found[entry["name"]] = (size, num_ctx)
                    break
        if len(found) < 2:
            raise unittest.SkipTest("it has no two models of 60 MB or more")
        cls.pair = dict(zip(("one", "two"), ((name, num_ctx) for name, (_, num_ctx) in found.items()), strict=True))
        cls.sizes = dict(zip(("one", "two"), (size for size, _ in found.values()), strict=True))
        cls.budget = (max(cls.sizes.values()) + min(cls.sizes.values()) // 2) // MB

    def setUp(self):
        self.unload_all()
        self.addCleanup(self.unload_all)
        toml = f'[memory]\nbudget = "{self.budget}MB"\nmin_stay = 0\npatience = 0\ncheck = 1\n'
        toml += f'[backends.ollama]\nkind = "ollama"\nurl = "{URL}"\n'
        for (name, (model, num_ctx)), keep_alive in zip(self.pair.items(), ("15m", "3m"), strict=True):
            toml += f'[models.{name}]\nbackend = "ollama"\nmodel = "{model}"\nkeep_alive = "{keep_alive}"\n'
            # said, as an estimate of a tiny model with a huge window is far too low
            toml += f'num_ctx = {num_ctx}\nsize = "{self.sizes[name] // MB}MB"\n'
            toml += f"timeouts = {{ first_token = {PATIENCE} }}\n"
        self.daemon = self.enterContext(Daemon(toml))
        self.client = self.enterContext(RawClient(self.daemon.port, PATIENCE))

    def unload_all(self):
        for name, loaded in in_memory().items():
            say(name, 0, loaded.num_ctx)
        wait_for(lambda: not in_memory(), "an empty Ollama")

    def post(self, what: str, name: str) -> RawResponse:
        response = self.client.call("POST", f"/portway/{what}", json.dumps({"model": name}).encode())
        self.assertEqual(200, response.status, response.body)
        return response

    def told(self, name: str) -> dict[str, Any]:
        """What Portway says of a model."""
        models = self.client.call("GET", "/portway/residency").json["models"]
        return next(model for model in models if model["name"] == name)

    def await_measured(self, name: str):
        wait_for(lambda: self.told(name)["measured"], f"{name}'s being measured")

    def test_one_makes_room_for_the_other(self):
        """Never are both there; each has its window and its keep_alive, and is as large as Ollama says."""
        for name, keep_alive in (("one", 900), ("two", 180), ("one", 900)):
            self.post("load", name)
            [(model, loaded)] = in_memory().items()
            self.assertEqual(self.pair[name], (model, loaded.num_ctx))
            self.assertTrue(keep_alive - 30 < loaded.left < keep_alive + 1, loaded)
            self.await_measured(name)
            self.assertEqual(loaded.size, self.told(name)["size"])
        self.assertTrue(self.post("unload", "one").json["unloaded"])
        self.assertEqual({}, in_memory())
        self.assertFalse(self.post("unload", "one").json["unloaded"])

    def test_an_answer(self):
        """A request evicts what is idle as well."""
        self.post("load", "two")
        response = ask(self.client, "one", messages=QUESTION, max_tokens=1)
        self.assertEqual("one", response.header("x-served-by"), response.body)
        self.assertEqual([self.pair["one"][0]], list(in_memory()))

    def test_keep_alive_is_kept_to(self):
        """What another client says is corrected without a reload; what it has unloaded stays unloaded."""
        self.post("load", "one")
        model, num_ctx = self.pair["one"]
        for word in ("24h", "1m", -1):
            say(model, word, num_ctx)
            wait_for(lambda: 600 < in_memory()[model].left <= 900, "its correction")
        said = [line for line in self.daemon.log if "corrected the keep_alive" in line]
        self.assertEqual(3, len(said), self.daemon.log)
        say(model, 0, num_ctx)
        wait_for(lambda: not in_memory(), "its unloading")
        wait_for(lambda: not self.told("one")["loaded"], "its being seen")
        self.assertEqual({}, in_memory())
