"""The stand-in for Ollama over real sockets, and the scripted peers that other tests rely on."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Callable
from typing import Any

from portway.standin import answers, faults, protocol
from portway.standin.memory import Memory, Resident
from portway.standin.server import Fault, Request, StandIn, StandInModel, parse_failure, parse_model, parse_size
from portway.standin.wire import Bell
from tests.doubles import (
    CLOSE,
    HALF_CLOSE,
    HANG,
    LAST_CHUNK,
    RESET,
    Action,
    Bytewise,
    OnAccept,
    RawClient,
    RawResponse,
    ScriptedServer,
    chunk,
    json_reply,
    ndjson_reply,
    sse_reply,
    stream_head,
)

MODELS = (
    StandInModel("all:9b", 6_000, ("completion", "tools", "thinking", "vision", "insert"), 4096, kv_bytes_per_token=1),
    StandInModel("plain", 3_000, ("completion",), 2048),
    StandInModel("chops", 1_000, ("completion",), 2048, chops=True),
    StandInModel("embed", 500, ("embedding",), 512),
    StandInModel("native", 2_000, ("completion", "tools"), 2048, native=True),
    StandInModel("twin", 6_000, ("completion",), 4096, kv_bytes_per_token=1, blob="all:9b"),
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}


def say(text: str = "Why is the sky blue?", **more: Any) -> dict[str, Any]:
    """A chat request to the model that can do everything, not thinking and not streamed."""
    return {"model": "all:9b", "messages": [user(text)], "stream": False, "think": False, **more}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def lines(response: RawResponse) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.body.splitlines()]


def text_of(parts: list[dict[str, Any]], key: str = "content") -> str:
    return "".join(part["message"].get(key, "") for part in parts)


class StandInCase(unittest.TestCase):
    """A stand-in and one connection to it."""

    standin: StandIn

    def setUp(self) -> None:
        self.standin = self.enterContext(self.make())
        self.client = self.enterContext(RawClient(self.standin.url))

    def make(self) -> StandIn:
        return StandIn(MODELS)

    def chat(self, body: dict[str, Any], path: str = "/api/chat") -> RawResponse:
        return self.client.call("POST", path, body)

    def send_and_wait(self, client: RawClient, body: dict[str, Any], phase: str) -> Request:
        """Send a request and wait until the stand-in has it in this phase."""
        before = len(self.standin.requests)
        client.request("POST", "/api/chat", body)
        arrived = self.standin.wait_for(lambda s: any(r.phase == phase for r in s.requests[before:]))
        self.assertTrue(arrived, phase)
        return self.standin.requests[before]

    def assert_error(self, status: int, message: str, body: Any, path: str = "/api/chat") -> None:
        response = self.chat(body, path)
        self.assertEqual((status, {"error": message}), (response.status, response.json))


class Answers(StandInCase):
    def test_it_says_what_it_is(self):
        """Header, version, greeting and every answer name the stand-in."""
        root, version = self.client.call("GET", "/"), self.client.call("GET", "/api/version")
        self.assertIn("stand-in", root.header("Server") or "")
        self.assertIn(b"stand-in", root.body)
        self.assertIn("stand-in", version.json["version"])
        self.assertIn("stand-in", self.chat(say()).json["message"]["content"])

    def test_unknown_paths_and_methods_are_answered_as_by_ollama(self):
        """404 and 405 are plain text, and 405 says what is allowed."""
        self.assertEqual((404, b"404 page not found"), self.status_and_body("GET", "/api/nope"))
        refused = self.client.call("PUT", "/api/chat", {})
        self.assertEqual((405, "POST"), (refused.status, refused.header("Allow")))
        self.assertEqual((200, b""), self.status_and_body("HEAD", "/"))

    def status_and_body(self, method: str, path: str) -> tuple[int, bytes]:
        response = self.client.call(method, path)
        return response.status, response.body

    def test_tags_ps_and_show_describe_the_models(self):
        """The three lists have Ollama's fields, and asking loads nothing."""
        tags = self.client.call("GET", "/api/tags").json["models"]
        names = ["all:9b", "plain:latest", "chops:latest", "embed:latest", "native:latest", "twin:latest"]
        self.assertEqual(names, [model["name"] for model in tags])
        self.assertEqual((6_000, 4096), (tags[0]["size"], tags[0]["details"]["context_length"]))
        shown = self.chat({"model": "all:9b"}, "/api/show").json
        self.assertIn("thinking", shown["capabilities"])
        self.assertEqual(4096, shown["model_info"]["standin.context_length"])
        self.assertEqual({"models": []}, self.client.call("GET", "/api/ps").json)
        self.assertEqual(0, self.standin.memory.stats().loads)

    def test_a_stream_and_a_whole_answer_say_the_same(self):
        """The lines of a stream add up to the answer of stream: false; the last one alone is done."""
        whole, streamed = self.chat(say()), self.chat(say(stream=True))
        parts = lines(streamed)
        self.assertEqual("application/x-ndjson", streamed.header("Content-Type"))
        self.assertEqual(whole.json["message"]["content"], text_of(parts))
        self.assertEqual([False] * (len(parts) - 1) + [True], [part["done"] for part in parts])
        self.assertEqual("stop", parts[-1]["done_reason"])
        self.assertEqual(whole.json["prompt_eval_count"], parts[-1]["prompt_eval_count"])
        self.assertEqual(len(parts), parts[-1]["eval_count"])  # its end is a token, too

    def test_the_prompt_count_grows_with_the_turns(self):
        """One turn and five differ visibly, in the count and in what the answer says of itself."""
        one = self.chat(say("a b")).json
        five = self.chat(say(messages=[user("a b")] * 5)).json
        self.assertEqual(4 * (2 + answers.MESSAGE_TOKENS), five["prompt_eval_count"] - one["prompt_eval_count"])
        self.assertIn("5 messages", five["message"]["content"])

    def test_the_seed_decides_and_repeats(self):
        """The same request gives the same text; among several seeds the texts differ."""
        texts = [self.chat(say(options={"seed": seed})).json["message"]["content"] for seed in (1, 1, 2, 3, 4, 5, 6)]
        self.assertEqual(texts[0], texts[1])
        self.assertGreater(len(set(texts)), 1)

    def test_num_predict_and_stop_end_an_answer(self):
        """num_predict cuts after so many tokens (length), stop cuts before its text (stop)."""
        short = self.chat(say(options={"num_predict": 3})).json
        self.assertEqual(("length", 3), (short["done_reason"], short["eval_count"]))
        stopped = self.chat(say(options={"stop": ["nothing", "You asked"]})).json
        self.assertTrue(stopped["message"]["content"].endswith("here. "))
        self.assertEqual("stop", stopped["done_reason"])

    def test_reasoning_is_apart_and_has_levels(self):
        """A thinking model thinks unless told not to, at greater length at a higher level."""
        silent = self.chat(say()).json["message"]
        self.assertNotIn("thinking", silent)
        lengths = [len(self.chat(say(think=t)).json["message"]["thinking"]) for t in ("low", "medium", "high", "max")]
        self.assertEqual(sorted(set(lengths)), lengths)
        default = self.chat({**say(), "think": None}).json["message"]
        self.assertEqual(lengths[1], len(default["thinking"]))
        exhausted = self.chat(say(think=True, options={"num_predict": 2})).json
        self.assertEqual(("", "length"), (exhausted["message"]["content"], exhausted["done_reason"]))

    def test_tools_are_called_when_the_prompt_names_them(self):
        """Each mention is a call, in order, with an id of its own and arguments that fit the schema."""
        parts = lines(self.chat(say("get_time, then get_weather, get_weather", tools=[WEATHER, TIME], stream=True)))
        calls = [call for part in parts for call in part["message"].get("tool_calls", ())]
        self.assertEqual(["get_time", "get_weather", "get_weather"], [call["function"]["name"] for call in calls])
        self.assertEqual([0, 1, 2], [call["function"]["index"] for call in calls])
        self.assertEqual(3, len({call["id"] for call in calls}))
        self.assertEqual([{}, {"city": "stand-in"}, {"city": "stand-in"}], [c["function"]["arguments"] for c in calls])
        self.assertEqual("stop", parts[-1]["done_reason"])

    def test_tools_are_left_alone_otherwise(self):
        """No mention or a tool's result at the end gives a text, which quotes the result."""
        self.assertNotIn("tool_calls", self.chat(say("hello", tools=[WEATHER])).json["message"])
        messages = [user("get_weather"), {"role": "tool", "content": "12 degrees", "tool_name": "get_weather"}]
        answer = self.chat(say(messages=messages, tools=[WEATHER])).json["message"]
        self.assertIn("12 degrees", answer["content"])

    def test_formats_are_kept(self):
        """format json gives JSON, a schema gives an instance of it."""
        self.assertTrue(json.loads(self.chat(say(format="json")).json["message"]["content"])["stand_in"])
        schema = {"type": "object", "properties": {"label": {"enum": ["question", "other"]}}, "required": ["label"]}
        self.assertEqual({"label": "question"}, json.loads(self.chat(say(format=schema)).json["message"]["content"]))

    def test_logprobs_come_with_each_token(self):
        """As many entries as tokens, each with the alternatives that were asked for."""
        answer = self.chat(say(logprobs=True, top_logprobs=2, options={"num_predict": 4})).json
        self.assertEqual(4, len(answer["logprobs"]))
        self.assertEqual({2}, {len(entry["top_logprobs"]) for entry in answer["logprobs"]})
        self.assertEqual(answer["message"]["content"], "".join(entry["token"] for entry in answer["logprobs"]))

    def test_generate_completes_and_fills_in(self):
        """/api/generate answers in `response`, and with a suffix fills the gap."""
        plain = self.chat({"model": "plain", "prompt": "hello", "stream": False}, "/api/generate").json
        self.assertIn('"hello"', plain["response"])
        whole = self.chat({"model": "plain", "prompt": "hello", "stream": False}, "/api/generate").json
        self.assertEqual(whole["prompt_eval_count"] + whole["eval_count"], len(whole["context"]))
        filled = self.chat({**say(), "prompt": "def f():", "suffix": "pass", "stream": True}, "/api/generate")
        self.assertIn("filled in", "".join(part["response"] for part in lines(filled)))

    def test_embeddings_are_unit_vectors_that_repeat(self):
        """Every input has a vector of length one, equal inputs equal ones, cut to `dimensions` on demand."""
        answer = self.chat({"model": "embed", "input": ["a b", "a b", "c"]}, "/api/embed").json
        first, again, other = answer["embeddings"]
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)
        self.assertAlmostEqual(1.0, math.hypot(*first))
        self.assertEqual(5, answer["prompt_eval_count"])
        cut = self.chat({"model": "embed", "input": "a b", "dimensions": 8}, "/api/embed").json["embeddings"][0]
        self.assertEqual(8, len(cut))
        self.assertAlmostEqual(1.0, math.hypot(*cut))
        self.assertEqual([], self.chat({"model": "embed", "input": []}, "/api/embed").json["embeddings"])

    def test_images_are_taken_by_models_that_see(self):
        """An image costs tokens and is mentioned."""
        answer = self.chat(say(messages=[{**user("what is this"), "images": ["aGk="]}])).json
        self.assertIn("1 image", answer["message"]["content"])
        self.assertGreater(answer["prompt_eval_count"], answers.IMAGE_TOKENS)


class Refusals(StandInCase):
    def test_what_ollama_refuses_is_refused_in_its_words(self):
        """Status and text are the ones that Ollama 0.33 was seen to answer."""
        think = '(must be "high", "medium", "low", "max", true, or false)'
        field = "json: cannot unmarshal array into Go struct field ChatRequest.messages.content of type string"
        no_tools = "registry.ollama.ai/library/plain:latest does not support tools"
        for status, message, body in (
            (400, "missing request body", b""),
            (400, "unexpected EOF", b"{"),
            (400, "json: cannot unmarshal array into Go value of type api.ChatRequest", []),
            (400, field, say(messages=[{"role": "user", "content": []}])),
            (400, "model is required", {"messages": []}),
            (404, "model 'x' not found", say(model="x")),
            (400, 'time: missing unit in duration "300"', say(keep_alive="300")),
            (400, 'time: missing unit in duration "-1"', say(keep_alive="-1")),
            (400, 'time: missing unit in duration "1h30"', say(keep_alive="1h30")),
            (400, 'time: unknown unit "x" in duration "5x"', say(keep_alive="5x")),
            (400, 'time: invalid duration ""', say(keep_alive="")),
            (400, "Unsupported type: 'bool'", say(keep_alive=True)),
            (400, f'invalid think value: "maybe" {think}', say(think="maybe")),
            (400, f"think must be a boolean or string {think.replace('must be ', '')}", say(think=3)),
            (400, '"plain" does not support thinking', say(model="plain", think=True)),
            (400, '"embed" does not support chat', say(model="embed")),
            (400, no_tools, say(model="plain", tools=[TIME])),
            (400, "top_logprobs must be between 0 and 20", say(top_logprobs=21)),
            (400, "illegal base64 data at input byte 0", say(messages=[{**user("x"), "images": ["@@"]}])),
        ):
            with self.subTest(message):
                self.assert_error(status, message, body)

    def test_the_other_endpoints_refuse_in_their_own_words(self):
        """generate, embed and show differ from chat in what they call a missing model."""
        for status, message, body, path in (
            (404, "model '' not found", {}, "/api/generate"),
            (400, "registry.ollama.ai/library/plain:latest does not support insert", _fim("plain"), "/api/generate"),
            (404, 'model "x" not found, try pulling it first', {"model": "x"}, "/api/embed"),
            (400, "invalid input type", {"model": "x", "input": 3}, "/api/embed"),
            (404, "model 'x:latest' not found", {"model": "x"}, "/api/show"),
        ):
            with self.subTest(message):
                self.assert_error(status, message, body, path)

    def test_an_overlong_prompt_is_refused_or_chopped(self):
        """truncate false: 400 with both numbers; true: old messages go, and the count shows it."""
        long = say(messages=[user("one two three")] * 9, options={"num_ctx": 30})
        refused = self.chat({**long, "truncate": False})
        self.assertEqual(400, refused.status)
        inner = json.loads(refused.json["error"])["error"]
        self.assertEqual(
            (66, 30, "exceed_context_size_error"), (inner["n_prompt_tokens"], inner["n_ctx"], inner["type"])
        )
        self.assertEqual(24, self.chat(long).json["prompt_eval_count"])

    def test_one_overlong_message_is_cut_in_half(self):
        """What dropping messages can't mend is shifted out; some models do so even when told not to."""
        words = "word " * 5000
        chopped = self.chat(say(words, model="chops", truncate=False, options={"num_ctx": 2048})).json
        self.assertEqual(1027, chopped["prompt_eval_count"])
        self.assertEqual(
            1027, self.chat(say(words, model="plain", options={"num_ctx": 2048})).json["prompt_eval_count"]
        )
        self.assertIn("exceed_context_size_error", self.chat(say(words, model="native")).json["error"])

    def test_embed_refuses_or_cuts_what_is_too_long(self):
        """truncate false is a 400, else the input is cut at the context."""
        body = {"model": "embed", "input": "word " * 600, "options": {"num_ctx": 512}}
        self.assert_error(400, "the input length exceeds the context length", {**body, "truncate": False}, "/api/embed")
        self.assertEqual(511, self.chat(body, "/api/embed").json["prompt_eval_count"])

    def test_a_native_template_shows_on_the_wire(self):
        """Tool calls on the last line, plain text for format json, a schema for every tool, no logprobs beside."""
        (only,) = lines(self.chat(say("get_weather", model="native", tools=[WEATHER], stream=True)))
        self.assertEqual([True, 1], [only["done"], len(only["message"]["tool_calls"])])
        self.assertRegex(only["message"]["tool_calls"][0]["id"], "^[0-9a-z]{32}$")
        text = self.chat(say(model="native", format="json")).json["message"]["content"]
        self.assertFalse(text.startswith("{"))
        for status, cause, body in (
            (400, "Unrecognized schema", say(model="native", tools=[TIME])),
            (500, "Unsupported tool type", say(model="native", tools=[{"function": TIME["function"]}])),
            (400, "logprobs is not supported", say(model="native", tools=[WEATHER], logprobs=True)),
        ):
            refused = self.chat(body)
            self.assertEqual(status, refused.status)
            self.assertIn(cause, json.loads(refused.json["error"])["error"]["message"])
        (tags,) = [m for m in self.client.call("GET", "/api/tags").json["models"] if m["name"] == "native:latest"]
        self.assertEqual(["completion"], tags["capabilities"])

    def test_blind_and_other_models_refuse_when_the_answer_would_begin(self):
        """Images without vision and vectors without embedding are the runner's refusal, streams included."""
        image = [{**user("what is this"), "images": ["aGk="]}]
        for model, status, cause in (("plain", 400, "multimodal"), ("native", 500, "mmproj")):
            refused = self.chat(say(model=model, messages=image, stream=True))
            self.assertEqual((status, "application/json"), (refused.status, refused.header("Content-Type")))
            self.assertEqual("chunked", refused.header("Transfer-Encoding"))
            self.assertIn(cause, refused.json["error"])
        text = "This server does not support embeddings. Start it with `--embeddings`"
        self.assert_error(501, text, {"model": "plain", "input": "x"}, "/api/embed")

    def test_foreign_hosts_and_pages_are_turned_away(self):
        """A Host or Origin that isn't local is 403 with no body, whatever is asked."""
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
            refused = self.client.call("GET", "/api/version", headers=headers)
            self.assertEqual((403, b""), (refused.status, refused.body))
        local = {"Host": "localhost:1", "Origin": "http://127.0.0.1:3000"}
        self.assertEqual(200, self.client.call("GET", "/api/version", headers=local).status)

    def test_a_full_queue_is_503(self):
        """Beyond max_queue requests that wait for a load Ollama says that it is busy."""
        self.standin.max_queue = 0
        self.standin.fail("all:9b", Fault("slow_load", seconds=60.0))
        with RawClient(self.standin.url) as first:
            self.send_and_wait(first, say(), "load")
            self.assert_error(503, protocol.BUSY, say(model="plain"))


def _fim(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": "a", "suffix": "b"}


class Residency(StandInCase):
    def make(self) -> StandIn:
        return StandIn(MODELS, budget=10_000, evict=True)

    def ps(self) -> dict[str, dict[str, Any]]:
        return {model["name"]: model for model in self.client.call("GET", "/api/ps").json["models"]}

    def test_an_empty_request_loads_and_unloads(self):
        """No messages load the model, with keep_alive 0 unload it; done_reason says so."""
        body = {"model": "all:9b", "messages": [], "keep_alive": "10m", "options": {"num_ctx": 1024}}
        self.assertEqual("load", self.chat(body).json["done_reason"])
        self.assertEqual((7_024, 1024), (self.ps()["all:9b"]["size"], self.ps()["all:9b"]["context_length"]))
        self.assertEqual("unload", self.chat({**body, "keep_alive": 0}).json["done_reason"])
        self.assertEqual({}, self.ps())

    def test_another_num_ctx_reloads(self):
        """num_ctx belongs to the loaded model, and not to give one means the default."""
        for options in ({"num_ctx": 1024}, {}, {"num_ctx": 2048}, {"num_ctx": 999_999}):
            self.chat(say(options=options))
        stats = self.standin.memory.stats()
        self.assertEqual((4, 3, 3), (stats.loads, stats.unloads, stats.reloads))
        self.assertEqual(4096, self.ps()["all:9b"]["context_length"])

    def test_what_a_loaded_model_is_bound_to(self):
        """shift reloads it like num_ctx, and a model of the same blob shares it."""
        self.chat(say())
        self.chat(say(model="twin"))
        self.assertEqual(1, self.standin.memory.stats().loads)
        self.assertEqual({"all:9b"}, set(self.ps()))
        self.chat(say(shift=False))
        self.assertEqual(1, self.standin.memory.stats().reloads)

    def test_the_shortest_keep_alive_makes_room(self):
        """What does not fit beside the others evicts as Ollama does, and the budget holds."""
        self.chat(say(model="plain", keep_alive="1h"))
        self.chat(say(model="chops", keep_alive="1m"))
        self.chat(say(options={"num_ctx": 1000}))
        self.assertEqual({"plain:latest", "all:9b"}, set(self.ps()))
        stats = self.standin.memory.stats()
        self.assertEqual((0, 10_000), (stats.overcommits, stats.peak))

    def test_for_ever_is_far_away(self):
        """keep_alive -1 has no end, which Ollama shows as a date in another century."""
        self.chat(say(keep_alive=-1))
        self.assertGreater(self.ps()["all:9b"]["expires_at"][:4], "2200")


class MemoryAlone(unittest.TestCase):
    def setUp(self) -> None:
        self.now = 0.0
        self.big, self.small = StandInModel("big", 7), StandInModel("small", 5)

    def load(self, memory: Memory, model: StandInModel, keep_alive: float | None = None, owner: str = "a") -> Resident:
        resident = memory.claim(owner, model, 8, keep_alive)
        assert resident is not None
        if resident.loading:
            memory.loaded(resident)
        return resident

    def test_keep_alive_ends_by_the_clock(self):
        """The time runs from the last use; a use without keep_alive leaves it as it was."""
        memory = Memory(clock=lambda: self.now)
        memory.release(self.load(memory, self.big, 10.0))
        self.now = 9.0
        memory.release(self.load(memory, self.big))
        self.now = 18.0
        self.assertEqual([1.0], [left for _, left in memory.residents()])
        self.now = 19.0
        self.assertEqual([], memory.residents())
        self.assertEqual((1, 1), (memory.stats().loads, memory.stats().unloads))

    def test_without_eviction_overcommits_are_counted(self):
        """Each load that leaves more resident than the budget counts once, and the peak is kept."""
        memory = Memory(10)
        self.load(memory, self.big)
        self.load(memory, self.small)
        self.assertEqual((1, 12), (memory.stats().overcommits, memory.stats().peak))

    def test_engines_that_share_a_machine_do_not_see_each_other(self):
        """Each evicts its own models only, so the sum goes over the budget: what a proxy is to prevent."""
        memory = Memory(10, evict=True)
        memory.release(self.load(memory, self.big, owner="a"))
        memory.release(self.load(memory, self.small, owner="b"))
        self.assertEqual(1, memory.stats().overcommits)
        memory.forget("a")
        self.assertEqual(5, memory.stats().resident)

    def test_nothing_in_use_is_evicted_or_reloaded(self):
        """A load that needs the room of a model in use waits, and hears when it is free."""
        memory, bell = Memory(10, evict=True), Bell()
        self.addCleanup(bell.close)
        memory.watch(bell)
        in_use = self.load(memory, self.big)
        self.assertIsNone(memory.claim("a", self.small, 8))
        self.assertIsNone(memory.claim("a", self.big, in_use.num_ctx + 1))
        bell.silence()
        memory.release(in_use)
        self.assertTrue(os.read(bell.fileno(), 1))
        self.assertIsNotNone(memory.claim("a", self.small, 8))
        self.assertEqual(0, memory.stats().overcommits)

    def test_a_load_is_joined_not_repeated(self):
        """While a model loads, nobody else gets one; afterwards as many as `parallel` allows."""
        memory = Memory()
        loader = memory.claim("a", self.big, 8, parallel=2)
        assert loader is not None
        self.assertIsNone(memory.claim("a", self.big, 8, parallel=2))
        self.assertIsNone(memory.claim("a", self.small, 8))
        memory.loaded(loader)
        self.assertIs(loader, memory.claim("a", self.big, 8, parallel=2))
        self.assertIsNone(memory.claim("a", self.big, 8, parallel=2))
        self.assertEqual(1, memory.stats().loads)


class Faults(StandInCase):
    def outcome(self, body: dict[str, Any]) -> tuple[int, bytes, bool] | str:
        """What a client gets: status, body and whether it was complete, or the exception's name."""
        with RawClient(self.standin.url) as client:
            try:
                response = client.call("POST", "/api/chat", body)
            except OSError as exc:
                return type(exc).__name__
            return response.status, response.body, response.complete

    def test_what_comes_instead_of_an_answer(self):
        """Each kind does what it says, streamed or not, and strikes once."""
        expected: dict[str, Callable[[Any], bool]] = {
            "reset": lambda got: got == "ConnectionResetError",
            "close": lambda got: got == "ConnectionError",
            "status": lambda got: got[0] == 500 and b'"error"' in got[1],
            "garbage": lambda got: got == "ConnectionError",
            "html": lambda got: got[0] == 200 and got[1].startswith(b"<!doctype"),
            "empty": lambda got: got == (200, b"", True),
            "bad_json": lambda got: got[0] == 200 and got[1].startswith(b"{"),
            "wrong_length": lambda got: got[0] == 200 and not got[2],
        }
        for stream in (True, False):
            for kind, holds in expected.items():
                with self.subTest(kind, stream=stream):
                    self.standin.fail("all:9b", kind)
                    got = self.outcome(say(stream=stream))
                    self.assertTrue(holds(got), got)
                    self.assertEqual(200, self.chat(say()).status)
        self.assertEqual(set(expected) | {"hang"}, {kind for kind in faults.KINDS if Fault(kind).instead})

    def test_what_happens_within_a_stream(self):
        """Two pieces get through, then each kind ends the stream in its way; none of them says done."""
        expected: dict[str, Callable[[list[bytes], bool], bool]] = {
            "error_line": lambda tail, whole: whole and b'{"error":' in tail[0],
            "eof": lambda tail, whole: whole and not tail,
            "half_line": lambda tail, whole: whole and tail[0].startswith(b'{"model"'),
            "bad_line": lambda tail, whole: whole and tail == [b'{"model": oops'],
            "half_utf8": lambda tail, whole: not whole and tail[0].endswith(b"\xc3"),
            "cut": lambda tail, whole: not whole and not tail,
        }
        for kind, holds in expected.items():
            with self.subTest(kind):
                self.standin.fail("all:9b", kind)
                got = self.outcome(say(stream=True))
                assert isinstance(got, tuple)
                parts = got[1].splitlines()
                self.assertEqual(["I", " am"], [json.loads(part)["message"]["content"] for part in parts[:2]])
                self.assertTrue(holds(parts[2:], got[2]), got)
        self.standin.fail("all:9b", "reset_mid_stream")
        self.assertEqual("ConnectionResetError", self.outcome(say(stream=True)))
        within = {kind for kind in faults.KINDS if Fault(kind).within and not Fault(kind).hangs}
        self.assertEqual(set(expected) | {"reset_mid_stream"}, within)

    def test_what_happens_within_a_whole_answer(self):
        """The same kinds spoil the one body of stream: false."""
        expected: dict[str, Callable[[Any], bool]] = {
            "error_line": lambda got: got[0] == 500,
            "eof": lambda got: json.loads(got[1])["done"] is False,
            "half_line": lambda got: got[2] and not got[1].endswith(b"}"),
            "bad_line": lambda got: got[2] and got[1].endswith(b"oops"),
            "half_utf8": lambda got: not got[2] and got[1].endswith(b"\xc3"),
            "cut": lambda got: not got[2],
            "reset_mid_stream": lambda got: got == "ConnectionResetError",
        }
        for kind, holds in expected.items():
            with self.subTest(kind):
                self.standin.fail("all:9b", kind)
                got = self.outcome(say())
                self.assertTrue(holds(got), got)

    def test_a_hang_shows_what_it_lets_through_and_can_be_released(self):
        """Nothing, a head, a line without content, or content comes first; after release() the rest."""
        for kind, before in (
            ("hang", None),
            ("hang_after_headers", 0),
            ("hang_before_content", 1),
            ("hang_mid_stream", 2),
        ):
            with self.subTest(kind), RawClient(self.standin.url) as client:
                self.standin.fail("all:9b", kind)
                self.send_and_wait(client, say(stream=True), "hang")
                pieces = []
                head = None
                if before is not None:
                    head = client.head()
                    body = client.pieces(head)
                    pieces = [next(body) for _ in range(before)]
                client.sock.settimeout(0.02)
                self.assertRaises(TimeoutError, client.sock.recv, 1)
                client.sock.settimeout(10)
                self.standin.release()
                rest = b"".join(pieces) + (client.response().body if head is None else b"".join(body))
                self.assertTrue(json.loads(rest.splitlines()[-1])["done"])

    def test_an_empty_answer_is_proper_but_says_nothing(self):
        """Done, stop, and no content at all."""
        self.standin.fail("all:9b", "empty_answer", times=2)
        self.assertEqual("", self.chat(say()).json["message"]["content"])
        (only,) = lines(self.chat(say(stream=True)))
        self.assertEqual((True, "stop", ""), (only["done"], only["done_reason"], only["message"]["content"]))

    def test_slow_kinds_are_right_but_late(self):
        """The head drips, tokens and loads take their time, and the answer is whole."""
        for kind, seconds in (("slow_headers", 0.0005), ("slow_tokens", 0.001), ("slow_load", 0.05)):
            with self.subTest(kind):
                self.chat(say(messages=[], keep_alive=0))
                self.standin.fail("all:9b", Fault(kind, seconds=seconds))
                start = time.monotonic()
                self.assertEqual("stop", self.chat(say()).json["done_reason"])
                self.assertGreater(time.monotonic() - start, 0.04)

    def test_faults_are_used_up_in_order(self):
        """Each request takes one; paths and "*" have queues of their own; heal() clears."""
        self.standin.fail("all:9b", Fault("status", status=429, headers={"Retry-After": "7"}), times=2)
        self.standin.fail("all:9b", "503")
        got = [self.chat(say()) for _ in range(4)]
        self.assertEqual([429, 429, 503, 200], [response.status for response in got])
        self.assertEqual("7", got[0].header("Retry-After"))
        self.standin.fail("/api/tags", "401", times=None)
        self.assertEqual([401, 401], [self.client.call("GET", "/api/tags").status for _ in range(2)])
        self.standin.heal()
        self.assertEqual(200, self.client.call("GET", "/api/tags").status)
        self.standin.fail("*", "529")
        self.assertEqual(529, self.client.call("GET", "/api/version").status)

    def test_every_preset_and_kind_is_known_by_name(self):
        """Names make faults; an unknown one is refused with those that there are."""
        for name in (*faults.PRESETS, *faults.KINDS):
            self.assertIsInstance(faults.named(name), Fault)
        with self.assertRaisesRegex(ValueError, "first.*hang_mid_stream"):
            faults.named("first")

    def test_refused_connections_and_coming_back(self):
        """refuse() ends what is open and refuses what comes; start() listens on the same port again."""
        port = self.standin.port
        self.standin.refuse()
        self.assertTrue(self.client.at_end())
        with self.assertRaises(ConnectionRefusedError):
            RawClient(port)
        self.standin.start()
        self.assertEqual(port, self.standin.port)
        with RawClient(port) as client:
            self.assertEqual(200, client.call("GET", "/").status)


class Watching(StandInCase):
    def test_requests_are_recorded_as_they_came(self):
        """Method, path, headers, bytes, JSON and the connection, for Content-Length and chunked bodies."""
        raw = json.dumps(say()).encode()
        self.client.call("POST", "/api/chat?x=1", raw, {"X-Case": "Kept"})
        self.client.send(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.client.send(chunk(raw[:10]) + chunk(raw[10:]) + LAST_CHUNK)
        self.assertEqual(200, self.client.response().status)
        with RawClient(self.standin.url) as other:
            other.call("GET", "/")
        first, second, third = self.standin.requests
        self.assertEqual(("POST", "/api/chat", raw, say()), (first.method, first.path, first.body, first.json))
        self.assertIn(("X-Case", "Kept"), first.headers)
        self.assertEqual(raw, second.body)
        self.assertEqual([0, 0, 1], [first.connection, second.connection, third.connection])

    def assert_left(self, phase: str, leave: Callable[[RawClient], None], body: dict[str, Any]) -> None:
        with RawClient(self.standin.url) as client:
            request = self.send_and_wait(client, body, phase)
            left_at = time.monotonic()
            leave(client)
            self.assertTrue(self.standin.wait_for(lambda _: request.left))
            self.assertEqual(phase, request.phase)
            assert request.ended is not None
            self.assertLess(request.ended - left_at, 0.5)

    def test_a_client_that_leaves_is_seen_in_every_phase(self):
        """Loading, before the first token, streaming, whole answers and hangs; close, reset or half-close."""
        for leave in (RawClient.close, RawClient.reset, RawClient.half_close):
            for phase, kind, stream in (
                ("load", "slow_load", True),
                ("stream", "slow_tokens", True),
                ("stream", "slow_tokens", False),
                ("hang", "hang", True),
                ("hang", "hang_mid_stream", True),
            ):
                with self.subTest(phase, how=leave.__name__, stream=stream):
                    self.chat(say(messages=[], keep_alive=0))
                    self.standin.fail("all:9b", Fault(kind, seconds=30.0))
                    self.assert_left(phase, leave, say(stream=stream))
        self.standin.first_token_delay = 30.0
        self.assert_left("prompt", RawClient.close, say())

    def test_a_client_that_leaves_the_queue_is_seen(self):
        """A request that waits for another's load notices too, and gives its place back."""
        self.standin.fail("all:9b", Fault("slow_load", seconds=30.0))
        with RawClient(self.standin.url) as first:
            self.send_and_wait(first, say(), "load")
            self.assert_left("queue", RawClient.close, say(model="plain"))
        self.assertTrue(self.standin.wait_for(lambda s: s.in_flight == 0))
        self.assertEqual(0, self.standin.memory.stats().resident)

    def test_a_further_request_is_no_sign_of_leaving(self):
        """Pipelined requests are answered one after the other, however slow the first."""
        self.standin.fail("all:9b", Fault("slow_tokens", seconds=0.001))
        self.client.request("POST", "/api/chat", say())
        self.assertTrue(self.standin.wait_for(lambda s: bool(s.requests)))
        self.client.request("GET", "/api/version")
        self.assertEqual("stop", self.client.response().json["done_reason"])
        self.assertIn("version", self.client.response().json)

    def test_stop_ends_what_hangs_at_once(self):
        """No hang and no delay outlives stop(), and nothing is left behind."""
        self.standin.fail("all:9b", "hang", times=None)
        clients = [self.enterContext(RawClient(self.standin.url)) for _ in range(5)]
        for client in clients:
            client.request("POST", "/api/chat", say())
        self.assertTrue(self.standin.wait_for(lambda s: sum(r.phase == "hang" for r in s.requests) == 5))
        start = time.monotonic()
        self.standin.stop()
        self.assertLess(time.monotonic() - start, 1.0)
        self.assertEqual((0, 0), (self.standin.connections, self.standin.in_flight))
        self.assertTrue(all(client.at_end() for client in clients))

    def test_many_clients_share_one_load(self):
        """Twenty at once load the model a single time, and all are answered."""
        self.standin.load_delay = 0.05
        statuses: list[int] = []

        def ask() -> None:
            with RawClient(self.standin.url) as client:
                statuses.append(client.call("POST", "/api/chat", say()).status)

        threads = [threading.Thread(target=ask) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        self.assertEqual([200] * 20, statuses)
        self.assertEqual(1, self.standin.memory.stats().loads)


class PureParts(unittest.TestCase):
    def test_tokens_join_to_the_text(self):
        """Cutting into tokens loses nothing, whatever the text."""
        for text in ("", " ", "a", "  two  words \n", "x" * 100, "h\u00e9llo w\u00f6rld\t\u4f60\u597d", "end \n\n"):
            self.assertEqual(text, "".join(answers.tokens(text)))

    def test_instances_fit_their_schemas(self):
        """One small instance for each construct that is understood."""
        for schema, instance in (
            ({"type": "array", "minItems": 2, "items": {"type": "boolean"}}, [True, True]),
            ({"type": ["null", "string"]}, None),
            ({"type": "integer", "minimum": 2.5}, 3),
            ({"type": "number", "exclusiveMinimum": 1}, 1.5),
            ({"type": "integer", "maximum": -4}, -4),
            ({"type": "string", "maxLength": 3}, "sta"),
            ({"anyOf": [{"const": 7}, {"type": "string"}]}, 7),
            ({"allOf": [_object("a"), _object("b")]}, {"a": "stand-in", "b": "stand-in"}),
            ({"$ref": "#/$defs/x", "$defs": {"x": {"enum": ["y"]}}}, "y"),
        ):
            with self.subTest(schema=schema):
                self.assertEqual(instance, answers.instance(schema))

    def test_a_schema_that_contains_itself_ends(self):
        """Recursion stops, required or not."""
        node = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
        self.assertIn("next", answers.instance(node))
        self.assertIn("next", answers.instance({k: v for k, v in node.items() if k != "required"}))

    def test_durations_are_gos(self):
        """Numbers are seconds, strings have units, anything negative is for ever."""
        for value, seconds in (
            ("1h30m", 5400.0),
            ("1.5s", 1.5),
            ("250ms", 0.25),
            ("0", 0.0),
            (15, 15.0),
            (-1, math.inf),
        ):
            self.assertEqual(seconds, protocol.duration(value))
        self.assertEqual(math.inf, protocol.duration("-1m"))


def _object(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string"}}}


class CommandLine(unittest.TestCase):
    def test_it_serves_until_it_is_told_to_stop(self):
        """One line says where; options take effect; SIGTERM ends it with 0."""
        options = ["--model", "m:1b=1GB,tools,thinking", "--fail", "m:1b=busy*1", "--budget", "2GB"]
        process = subprocess.Popen(
            [sys.executable, "-m", "portway.standin", *options], stdout=subprocess.PIPE, text=True
        )
        self.addCleanup(process.wait, 10)
        self.addCleanup(process.kill)
        assert process.stdout is not None
        self.addCleanup(process.stdout.close)
        url = process.stdout.readline().removeprefix("listening on ").strip()
        with RawClient(url) as client:
            self.assertEqual(503, client.call("POST", "/api/chat", say(model="m:1b")).status)
            self.assertEqual(200, client.call("POST", "/api/chat", say(model="m:1b")).status)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(0, process.wait(10))

    def test_options_are_read(self):
        """Sizes, models and failures as they stand on a command line."""
        self.assertEqual([6_600_000_000, 2**20, 5], [parse_size(text) for text in ("6.6GB", "1MiB", "5")])
        self.assertEqual(("completion", "tools"), parse_model("a:b=1GB").capabilities)
        self.assertEqual(("embedding",), parse_model("a=1GB,embedding").capabilities)
        self.assertEqual(("a:b", Fault("hang"), 2), parse_failure("a:b=hang*2"))
        self.assertEqual(529, parse_failure("a=529")[1].status)


class Doubles(unittest.TestCase):
    def test_a_script_is_played_step_by_step(self):
        """Bytes, pieces between events, and single bytes reach the client as they are."""
        gate = threading.Event()
        parts: list[Action] = [stream_head(), chunk(b"data: 1\n\n"), gate, chunk(b": later\n"), LAST_CHUNK]
        with ScriptedServer([json_reply({"a": 1}), parts, [Bytewise(json_reply([1]))]]) as server:
            with RawClient(server.url) as client:
                self.assertEqual({"a": 1}, client.call("POST", "/x", {"q": 1}).json)
                client.request("GET", "/y")
                events = client.events(client.head())
                self.assertEqual("1", next(events).data)
                gate.set()
                self.assertEqual(["later"], [event.comment for event in events])
                self.assertEqual([1], client.call("GET", "/z").json)
                self.assertEqual(500, client.call("GET", "/beyond the script".replace(" ", "-")).status)
            self.assertEqual({"q": 1}, server.requests[0].json)
            self.assertTrue(server.requests[0].raw.startswith(b"POST /x HTTP/1.1\r\n"))
            self.assertTrue(server.requests[0].raw.endswith(b'\r\n\r\n{"q": 1}'))
            server.wait_closed(0)

    def test_streams_are_cut_into_chunks_as_told(self):
        """Neither chunk sizes nor line ends change the events; NDJSON likewise."""
        for options in ({}, {"chunk_sizes": 1}, {"chunk_sizes": [3, 7]}, {"crlf": True}, {"comments": ["hi"]}):
            with self.subTest(options), ScriptedServer([sse_reply([{"n": 1}, {"n": 2}], **options)]) as server:
                with RawClient(server.port) as client:
                    client.request("GET", "/")
                    data = [event.data for event in client.events(client.head()) if event.comment is None]
                self.assertEqual(['{"n": 1}', '{"n": 2}', "[DONE]"], data)
        with ScriptedServer([ndjson_reply([{"n": 1}], chunk_sizes=2)]) as server, RawClient(server.port) as client:
            self.assertEqual(b'{"n": 1}\n', client.call("GET", "/").body)

    def test_connections_end_as_told(self):
        """FIN, RST, half-close and RST on accept look like that from outside."""
        with ScriptedServer([[CLOSE], [RESET], [HALF_CLOSE], OnAccept([RESET])]) as server:
            for error in (ConnectionError, ConnectionResetError, ConnectionError):
                with RawClient(server.url) as client:
                    client.request("GET", "/")
                    self.assertRaises(error, client.response)
            with self.assertRaises(ConnectionResetError), RawClient(server.url) as client:  # it may come that early
                client.sock.recv(1)

    def test_a_leaving_peer_is_timed_while_a_step_hangs(self):
        """HANG ends when the peer goes, at once, and release() lets it go on."""
        with ScriptedServer([[HANG], [HANG, json_reply({})]]) as server:
            with RawClient(server.url) as client:
                client.request("GET", "/")
                server.wait_requests(1)
                left_at = time.monotonic()
                client.reset()
                self.assertLess(server.wait_closed(0) - left_at, 0.5)
                self.assertEqual("ConnectionResetError", server.connection(0).error)
            with RawClient(server.url) as client:
                client.request("GET", "/")
                server.wait_requests(2)
                server.release()
                self.assertEqual(200, client.response().status)

    def test_a_cut_body_is_told_from_a_whole_one(self):
        """A missing last chunk or byte makes a response incomplete, and an iteration fail."""
        cut = sse_reply([{"n": 1}], finish=False)
        with ScriptedServer([[cut, CLOSE], [json_reply({})[:-1], CLOSE], [cut, CLOSE]]) as server:
            for _ in range(2):
                with RawClient(server.url) as client:
                    self.assertFalse(client.call("GET", "/").complete)
            with RawClient(server.url) as client:
                client.request("GET", "/")
                self.assertRaises(ConnectionError, list, client.events(client.head()))

    def test_stop_leaves_nothing_waiting(self):
        """A server that is stopped ends its connections and its port."""
        server = ScriptedServer([[threading.Event()]])
        with RawClient(server.url) as client:
            client.request("GET", "/")
            server.wait_requests(1)
            server.stop()
            self.assertTrue(client.at_end())
        with self.assertRaises(OSError):
            socket.create_connection(("127.0.0.1", server.port), 1).close()


if __name__ == "__main__":
    unittest.main()
