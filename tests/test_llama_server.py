"""The daemon in front of a real llama-server with tiny models, seen as an OpenAI client sees it."""

from __future__ import annotations

import base64
import json
import math
import signal
import struct
import unittest
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tests.daemon import Daemon, DaemonProcess
from tests.doubles import RawClient, RawResponse
from tests.llama_server import LlamaServer, wait_for
from tests.tiny_gguf import TinyModel

CHAT = "/v1/chat/completions"
SLOTS = ("-np", "2", "-t", "1")  # two requests at a time, on one core
HELLO = [{"role": "user", "content": "we walk over the bridge"}]
LONG = [{"role": "user", "content": "we walk over the bridge " * 300}]
ENDLESS = TinyModel(context=65536, endless=True)  # a minute of text; nothing here waits for its end
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Lima", "Oslo"]}},
            "required": ["city"],
        },
    },
}


def configuration(servers: dict[str, LlamaServer], models: str) -> str:
    """A models.toml with a backend for each server, and `models` as it is."""
    backends = "".join(f'[backends.{name}]\nkind = "openai"\nurl = "{s.url}/v1"\n' for name, s in servers.items())
    return backends + models


@dataclass
class Streamed:
    """A streamed answer, read to its end or to its first content."""

    head: RawResponse
    chunks: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False  # by [DONE]

    @property
    def deltas(self) -> list[dict[str, Any]]:
        return [choice["delta"] for chunk in self.chunks for choice in chunk.get("choices", ())]

    @property
    def finish_reasons(self) -> list[str]:
        choices = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]
        return [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]

    def text(self, key: str = "content") -> str:
        return "".join(delta.get(key) or "" for delta in self.deltas)


def ask(client: RawClient, model: str = "local", path: str = CHAT, **fields: Any) -> RawResponse:
    """The answer to one request without a stream."""
    return client.call("POST", path, body(model, path, fields))


def body(model: str, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A request; one for so many tokens gets them, as a tiny model may well end before the first word."""
    defaults: dict[str, Any] = {"model": model}
    if path == CHAT:
        defaults["messages"] = HELLO
    if "max_tokens" in fields:
        defaults["ignore_eos"] = True
    return {**defaults, **fields}


def stream(client: RawClient, model: str = "local", *, until_content: bool = False, **fields: Any) -> Streamed:
    """A streamed answer; it must begin with 200, and may break off."""
    client.request("POST", CHAT, body(model, CHAT, {"stream": True, **fields}))
    streamed = Streamed(client.head())
    if streamed.head.status != 200:
        said = b"".join(client.pieces(streamed.head))
        raise AssertionError(f"the stream began with {streamed.head.status}: {said!r}")
    for event in client.events(streamed.head):
        if event.data == "[DONE]":
            streamed.ended = True
        elif event.data is not None:
            streamed.chunks.append(event.json)
            if until_content and streamed.text():
                break
    return streamed


class Case(unittest.TestCase):
    """Assertions about answers."""

    def good(self, response: RawResponse) -> Any:
        """The JSON of an answer that has to be 200."""
        self.assertEqual(200, response.status, response.body)
        return response.json

    def bad(self, status: int, code: str, response: RawResponse) -> Any:
        """The error of an answer that has to be one, in OpenAI's envelope."""
        self.assertEqual(status, response.status, response.body)
        error = response.json["error"]
        self.assertEqual({"message", "type", "param", "code"}, set(error))
        self.assertEqual(code, error["code"], error)
        return error


class Served(Case):
    """One llama-server, one daemon in front of it, and a connection for each test."""

    model: ClassVar[TinyModel] = TinyModel()
    args: ClassVar[Sequence[str]] = ()
    server: ClassVar[LlamaServer]
    daemon: ClassVar[Daemon]

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = cls.enterClassContext(LlamaServer(cls.model, *SLOTS, *cls.args))
        models = '[models.local]\nbackend = "llama"\nmodel = "tiny"\n'
        cls.daemon = cls.enterClassContext(Daemon(configuration({"llama": cls.server}, models)))

    def setUp(self) -> None:
        self.client = self.enterContext(self.daemon.client())


class ChatTest(Served):
    """Plain answers."""

    def test_answer_names_who_served_and_counts_tokens(self) -> None:
        """An answer has the logical name, in the body and the header, and the server's true token counts."""
        response = ask(self.client, max_tokens=5)
        answer = self.good(response)
        self.assertEqual("local", answer["model"])
        self.assertEqual("local", response.header("X-Served-By"))
        self.assertTrue(answer["choices"][0]["message"]["content"])
        self.assertGreater(answer["usage"]["prompt_tokens"], 10)
        self.assertEqual(5, answer["usage"]["completion_tokens"])
        self.assertEqual("length", answer["choices"][0]["finish_reason"])

    def test_parameters_reach_the_server(self) -> None:
        """With the same parameters the daemon's answer is, word for word, the server's own."""
        fields: dict[str, Any] = {"seed": 7, "temperature": 1.5, "stop": [" bridge"], "max_tokens": 40}
        own = self.server.post(CHAT, body("tiny", CHAT, fields))
        through = self.good(ask(self.client, **fields))
        self.assertEqual(own["choices"][0]["message"]["content"], through["choices"][0]["message"]["content"])
        self.assertEqual(own["choices"][0]["finish_reason"], through["choices"][0]["finish_reason"])

    def test_unknown_fields_reach_the_server(self) -> None:
        """A field that OpenAI does not know is passed on: llama-server's own ignore_eos has its effect."""
        answer = self.good(ask(self.client, max_tokens=60, ignore_eos=True))
        self.assertEqual(60, answer["usage"]["completion_tokens"])

    def test_choices_and_logprobs(self) -> None:
        """n gives as many choices, and logprobs one entry for each token."""
        answer = self.good(ask(self.client, n=2, logprobs=True, top_logprobs=2, max_tokens=4))
        self.assertEqual([0, 1], sorted(choice["index"] for choice in answer["choices"]))
        self.assertEqual([4, 4], [len(choice["logprobs"]["content"]) for choice in answer["choices"]])

    def test_response_format(self) -> None:
        """A JSON schema binds the answer."""
        schema = {"type": "object", "properties": {"kind": {"enum": ["question", "other"]}}, "required": ["kind"]}
        wanted = {"type": "json_schema", "json_schema": {"name": "kind", "schema": schema}}
        answer = self.good(ask(self.client, response_format=wanted, temperature=0))
        self.assertIn(json.loads(answer["choices"][0]["message"]["content"])["kind"], ("question", "other"))

    def test_completions(self) -> None:
        """The older endpoint answers with text."""
        answer = self.good(ask(self.client, path="/v1/completions", prompt="we walk", max_tokens=4))
        self.assertEqual("text_completion", answer["object"])
        self.assertEqual("local", answer["model"])
        self.assertTrue(answer["choices"][0]["text"])

    def test_models_tell_the_window(self) -> None:
        """The list of models has the context window that the running server really has."""
        (listed,) = self.good(self.client.call("GET", "/v1/models"))["data"]
        (own,) = self.server.get("/v1/models")["data"]
        self.assertEqual("local", listed["id"])
        self.assertEqual(
            [own["meta"]["n_ctx"]] * 3,
            [listed["context_length"], listed["context_window"], listed["meta"]["n_ctx"]],
        )

    def test_server_refusal_is_passed_on(self) -> None:
        """What the server calls a bad request stays one, with its words."""
        response = ask(self.client, temperature="hot")
        self.assertEqual(400, response.status, response.body)
        self.assertEqual("invalid_request_error", response.json["error"]["type"])

    def test_embeddings_of_a_chat_server(self) -> None:
        """A server that was not started for embeddings makes an error that says so, not an empty answer."""
        response = ask(self.client, path="/v1/embeddings", input="bridge")
        self.assertGreaterEqual(response.status, 400)
        self.assertIn("embeddings", response.json["error"]["message"])


class StreamTest(Served):
    """Streamed answers."""

    def test_stream_is_the_plain_answer_in_pieces(self) -> None:
        """At temperature 0 the pieces of a stream are the plain answer, under one id, one time and one name."""
        plain = self.good(ask(self.client, temperature=0, max_tokens=20))["choices"][0]
        streamed = stream(self.client, temperature=0, max_tokens=20)
        self.assertTrue(streamed.ended)
        self.assertEqual(plain["message"]["content"], streamed.text())
        self.assertEqual([plain["finish_reason"]], streamed.finish_reasons)
        for key in ("id", "created", "model", "object"):
            self.assertEqual(1, len({chunk[key] for chunk in streamed.chunks}), key)
        self.assertEqual("local", streamed.chunks[0]["model"])
        self.assertEqual("local", streamed.head.header("X-Served-By"))
        self.assertEqual(1, sum("role" in delta for delta in streamed.deltas))

    def test_usage_only_when_asked(self) -> None:
        """The usage chunk comes exactly when it is asked for, last and with true numbers."""
        silent = stream(self.client, max_tokens=5)
        self.assertEqual([], [chunk for chunk in silent.chunks if chunk.get("usage")])
        self.assertEqual([], [chunk for chunk in silent.chunks if not chunk["choices"]])
        asked = stream(self.client, max_tokens=5, stream_options={"include_usage": True})
        self.assertEqual([], asked.chunks[-1]["choices"])
        self.assertEqual(5, asked.chunks[-1]["usage"]["completion_tokens"])
        self.assertGreater(asked.chunks[-1]["usage"]["prompt_tokens"], 10)

    def test_connections_that_the_server_closes_after_a_stream(self) -> None:
        """The server closes each connection after a stream though it promised not to; no later request notices."""
        for turn in range(10):
            with self.subTest(turn=turn):
                self.assertTrue(stream(self.client, max_tokens=3).ended)
                self.good(ask(self.client, max_tokens=3))


class ToolsTest(Served):
    """Tool calls."""

    model = TinyModel(tools=True)

    def test_call(self) -> None:
        """A call has an id, the tool's name, and arguments as JSON text that keeps to the schema."""
        answer = self.good(ask(self.client, tools=[WEATHER], tool_choice="required", temperature=0))
        (choice,) = answer["choices"]
        self.assertEqual("tool_calls", choice["finish_reason"])
        (call,) = choice["message"]["tool_calls"]
        self.assertTrue(call["id"])
        self.assertEqual(("function", "weather"), (call["type"], call["function"]["name"]))
        self.assertIn(json.loads(call["function"]["arguments"])["city"], ("Lima", "Oslo"))

    def test_several_streamed_calls(self) -> None:
        """Several calls in one stream have indexes 0, 1, 2, an id each, and arguments that stay apart."""
        calls = self.streamed_calls(at_least=2)
        self.assertEqual(list(range(len(calls))), sorted(calls))
        self.assertEqual(len(calls), len({call["id"] for call in calls.values()}))
        for call in calls.values():
            self.assertEqual("weather", call["name"])
            self.assertIn(json.loads(call["arguments"])["city"], ("Lima", "Oslo"))

    def streamed_calls(self, at_least: int) -> dict[int, dict[str, str]]:
        """By index, the calls of the first seed that makes that many."""
        for seed in range(1, 50):
            streamed = stream(self.client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=True, seed=seed)
            calls: dict[int, dict[str, str]] = {}
            for piece in (piece for delta in streamed.deltas for piece in delta.get("tool_calls", ())):
                call = calls.setdefault(piece["index"], {"id": piece.get("id", ""), "name": "", "arguments": ""})
                call["name"] += piece["function"].get("name", "")
                call["arguments"] += piece["function"].get("arguments", "")
            if len(calls) >= at_least:
                self.assertEqual(["tool_calls"], streamed.finish_reasons)
                return calls
        raise AssertionError(f"no seed gave {at_least} calls")

    def test_result_in_the_history(self) -> None:
        """A call and its result can be sent back."""
        call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        messages = [
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
        ]
        self.good(ask(self.client, messages=messages, tools=[WEATHER], tool_choice="required", temperature=0))


class ReasoningTest(Served):
    """Reasoning is kept apart from the answer."""

    model = TinyModel(reasoning=True)
    args = ("--reasoning-budget", "8")

    def test_plain(self) -> None:
        """Reasoning stands in reasoning_content and in reasoning, and no tag of it in content."""
        message = self.good(ask(self.client, max_tokens=30))["choices"][0]["message"]
        self.assertTrue(message["reasoning_content"].strip())
        self.assertEqual(message["reasoning_content"], message["reasoning"])
        self.assertTrue(message["content"].strip())
        self.assertNotIn("think>", message["content"] + message["reasoning_content"])

    def test_streamed(self) -> None:
        """In a stream all reasoning comes before the first content."""
        streamed = stream(self.client, max_tokens=30)
        kinds = ["content" if delta.get("content") else "reasoning" for delta in streamed.deltas if any(delta.values())]
        self.assertTrue(streamed.text("reasoning_content").strip())
        self.assertTrue(streamed.text().strip())
        self.assertEqual(sorted(kinds, reverse=True), kinds)
        self.assertNotIn("think>", streamed.text())

    def test_in_the_history(self) -> None:
        """Reasoning can be sent back, and reaches the model: the prompt grows by it."""

        def prompt_tokens(**reasoning: str) -> int:
            said = {"role": "assistant", "content": "we walk", **reasoning}
            answer = self.good(ask(self.client, messages=[*HELLO, said, *HELLO], max_tokens=1))
            return int(answer["usage"]["prompt_tokens"])

        self.assertGreater(prompt_tokens(reasoning_content="look over the bridge"), prompt_tokens())


class EmbeddingsTest(Served):
    """Embeddings."""

    model = TinyModel(embedding=True)
    args = ("--embeddings", "--pooling", "mean")

    def embed(self, **fields: Any) -> Any:
        return self.good(ask(self.client, path="/v1/embeddings", **fields))

    def test_vectors(self) -> None:
        """Each input has its vector of length 1, in order, under the logical name, with the tokens counted."""
        answer = self.embed(input=["we walk", "over the bridge"], encoding_format="float")
        self.assertEqual("local", answer["model"])
        self.assertEqual([0, 1], [item["index"] for item in answer["data"]])
        self.assertGreater(answer["usage"]["prompt_tokens"], 2)
        for item in answer["data"]:
            self.assertAlmostEqual(1.0, math.hypot(*item["embedding"]), places=4)
        alone = self.embed(input="we walk", encoding_format="float")["data"][0]["embedding"]
        for one, other in zip(alone, answer["data"][0]["embedding"], strict=True):
            self.assertAlmostEqual(one, other, places=4)

    def test_base64(self) -> None:
        """base64, which SDKs ask for unasked, holds the same numbers as little-endian floats."""
        plain = self.embed(input="we walk", encoding_format="float")["data"][0]["embedding"]
        packed = base64.b64decode(self.embed(input="we walk", encoding_format="base64")["data"][0]["embedding"])
        for one, other in zip(plain, struct.unpack(f"<{len(plain)}f", packed), strict=True):
            self.assertAlmostEqual(one, other, places=5)

    def test_dimensions(self) -> None:
        """The server ignores them; the answer says so, in either form, unless it has as many as asked."""
        for form in ("float", "base64"):
            for asked, warning in ((8, "ignored(dimensions)"), (64, None)):
                body: dict[str, Any] = {"input": "we walk", "encoding_format": form, "dimensions": asked}
                answer = ask(self.client, path="/v1/embeddings", **body)
                self.assertEqual((200, warning), (answer.status, answer.header("x-portway-warning")))


class WindowTest(Case):
    """Prompts that are too long: a small server, and a larger one behind it."""

    daemon: ClassVar[Daemon]

    @classmethod
    def setUpClass(cls) -> None:
        servers = {
            "small": cls.enterClassContext(LlamaServer(TinyModel(context=512), *SLOTS, "-c", "1024")),
            "large": cls.enterClassContext(LlamaServer(TinyModel(context=8192), *SLOTS, "-c", "16384")),
        }
        models = """
            [models.alone]
            backend = "small"
            model = "tiny"
            [models.backed]
            backend = "small"
            model = "tiny"
            fallback = ["large"]
            [models.large]
            backend = "large"
            model = "tiny"
        """
        cls.daemon = cls.enterClassContext(Daemon(configuration(servers, models)))

    def setUp(self) -> None:
        self.client = self.enterContext(self.daemon.client())

    def test_overflow(self) -> None:
        """A prompt over the window is 400 context_length_exceeded, also for a stream."""
        for streamed in (False, True):
            with self.subTest(stream=streamed):
                response = ask(self.client, "alone", messages=LONG, stream=streamed)
                self.bad(400, "context_length_exceeded", response)

    def test_larger_window(self) -> None:
        """The fallback with a larger window takes it, and the answer says so."""
        response = ask(self.client, "backed", messages=LONG, max_tokens=3)
        answer = self.good(response)
        self.assertEqual("large", answer["model"])
        self.assertEqual("large", response.header("X-Served-By"))
        attempts = response.header("X-Portway-Attempts") or ""
        self.assertTrue(attempts.startswith("backed=context_length_exceeded"), attempts)
        self.assertTrue(attempts.endswith("large=ok"), attempts)

    def test_end_of_the_window(self) -> None:
        """An answer that reaches the window's end is no error: finish_reason is length."""
        answer = self.good(ask(self.client, "alone", ignore_eos=True))
        self.assertEqual("length", answer["choices"][0]["finish_reason"])
        self.assertEqual(512, answer["usage"]["total_tokens"])


class DisconnectTest(Served):
    """The client leaves: the server stops working for it."""

    model = ENDLESS
    args = ("-c", "131072")

    def await_idle(self) -> None:
        wait_for(lambda: self.server.busy_slots() == 0, "the slot's being free again", lambda: self.server.log[-2000:])

    def test_stream(self) -> None:
        """When a streaming client closes its connection, the slot stops."""
        streamed = stream(self.client, until_content=True)
        self.assertTrue(streamed.text())
        self.assertEqual(1, self.server.busy_slots())
        self.client.close()
        self.await_idle()

    def test_reset(self) -> None:
        """The same when the connection is reset."""
        stream(self.client, until_content=True)
        self.client.reset()
        self.await_idle()

    def test_replay_is_not_switched_on(self) -> None:
        """X-Conversation-Id, which makes llama-server work on for nobody, is not passed on."""
        asked = body("local", CHAT, {"stream": True})
        self.client.request("POST", CHAT, asked, {"X-Conversation-Id": "c1"})
        head = self.client.head()
        next(event for event in self.client.events(head) if event.data)
        self.client.close()
        self.await_idle()

    def test_plain(self) -> None:
        """When a client that waits for a whole answer closes its connection, the slot stops, too."""
        before = len(self.server.log)
        self.client.request("POST", CHAT, body("local", CHAT, {}))
        self.server.await_logged("processing task", since=before)
        self.client.close()
        self.server.await_logged("stop processing", since=before)
        self.await_idle()


class CrashTest(Case):
    """The server dies, and comes back."""

    def setUp(self) -> None:
        self.server = self.enterContext(LlamaServer(ENDLESS, *SLOTS, "-c", "131072"))
        self.spare = self.enterContext(LlamaServer(TinyModel(), *SLOTS))
        models = """
            [models.local]
            backend = "main"
            model = "tiny"
            [models.backed]
            backend = "main"
            model = "tiny"
            fallback = ["spare"]
            [models.spare]
            backend = "spare"
            model = "tiny"
        """
        daemon = self.enterContext(Daemon(configuration({"main": self.server, "spare": self.spare}, models)))
        self.client = self.enterContext(daemon.client())
        self.other = self.enterContext(daemon.client())

    def test_killed_in_the_middle_of_a_stream(self) -> None:
        """A stream that breaks ends with one error frame and no [DONE], fallback or not; the next request works."""
        for model in ("local", "backed"):
            with self.subTest(model=model):
                self.client.request("POST", CHAT, body(model, CHAT, {"stream": True}))
                head = self.client.head()
                events = self.client.events(head)
                while not (next(events).data or "").count('"content":"'):
                    pass
                self.server.kill()
                rest = [event.data for event in events if event.data is not None]
                self.assertIn("error", json.loads(rest[-1]))
                self.assertEqual(1, sum('"error"' in data for data in rest))
                self.assertNotIn("[DONE]", rest)
                self.server.start()
                self.good(ask(self.other, model, max_tokens=3))
                self.client = self.other

    def test_down(self) -> None:
        """While the server is down the fallback serves; a model without one is 502; afterwards all is as before."""
        self.good(ask(self.client, "backed", max_tokens=3))
        self.server.kill()
        response = ask(self.client, "backed", max_tokens=3)
        self.good(response)
        self.assertEqual("spare", response.header("X-Served-By"))
        self.assertIn("backed=connect_failed", response.header("X-Portway-Attempts") or "")
        refused = ask(self.client, "local", max_tokens=3)
        self.assertEqual(502, refused.status, refused.body)
        self.assertEqual("false", refused.header("x-should-retry"))
        self.server.start()
        response = ask(self.client, "backed", max_tokens=3)
        self.good(response)
        self.assertEqual("backed", response.header("X-Served-By"))

    def test_restarted_between_two_requests(self) -> None:
        """A kept connection that died with the old server is replaced without the client noticing."""
        self.good(ask(self.client, max_tokens=3))
        self.server.restart()
        response = ask(self.client, max_tokens=3)
        self.good(response)
        self.assertIsNone(response.header("X-Portway-Attempts"))


class RouterTest(Case):
    """llama-server's router mode: several models behind one address, loaded on demand."""

    server: ClassVar[LlamaServer]
    daemon: ClassVar[Daemon]

    @classmethod
    def setUpClass(cls) -> None:
        models = {"plain": TinyModel(), "thinker": TinyModel(reasoning=True), "endless": ENDLESS}
        cls.server = cls.enterClassContext(LlamaServer.router(models, "--models-max", "1", "-t", "1"))
        logical = """
            [models.fast]
            backend = "router"
            model = "plain"
            [models.think]
            backend = "router"
            model = "thinker"
            [models.long]
            backend = "router"
            model = "endless"
            [models.missing]
            backend = "router"
            model = "nobody"
            [models.backed]
            backend = "router"
            model = "nobody"
            fallback = ["fast"]
        """
        cls.daemon = cls.enterClassContext(Daemon(configuration({"router": cls.server}, logical)))

    def setUp(self) -> None:
        self.client = self.enterContext(self.daemon.client())

    def test_each_model_is_loaded(self) -> None:
        """Two logical models are two real ones, each loaded when it is asked for, over one connection."""
        for _ in range(2):
            fast = self.good(ask(self.client, "fast", max_tokens=4))
            think = self.good(ask(self.client, "think", max_tokens=4))
            self.assertEqual(["fast", "think"], [fast["model"], think["model"]])
            self.assertNotIn("reasoning_content", fast["choices"][0]["message"])
            self.assertTrue(think["choices"][0]["message"]["reasoning_content"])

    def test_stream(self) -> None:
        """Streams pass through the router, too."""
        streamed = stream(self.client, "fast", max_tokens=4)
        self.assertTrue(streamed.ended)
        self.assertTrue(streamed.text())

    def test_listing_loads_nothing(self) -> None:
        """Asking for the list of models wakes none of them."""

        def states() -> list[str]:
            return [model["status"]["value"] for model in self.server.get("/v1/models")["data"]]

        before = states()
        listed = {model["id"] for model in self.good(self.client.call("GET", "/v1/models"))["data"]}
        self.assertEqual({"fast", "think", "long", "missing", "backed"}, listed)
        self.assertEqual(before, states())

    def test_missing_model(self) -> None:
        """A model that the router does not have is model_not_found, and its fallback serves."""
        self.bad(404, "model_not_found", ask(self.client, "missing"))
        response = ask(self.client, "backed", max_tokens=3)
        self.good(response)
        self.assertEqual("fast", response.header("X-Served-By"))
        self.assertIn("backed=model_not_found", response.header("X-Portway-Attempts") or "")

    def test_disconnect(self) -> None:
        """When a streaming client leaves, the slot behind the router stops."""
        stream(self.client, "long", until_content=True)
        self.assertEqual(1, self.server.busy_slots("endless"))
        self.client.close()
        wait_for(lambda: self.server.busy_slots("endless") == 0, "the slot's being free again")


class KeyTest(Case):
    """A server that wants a key."""

    def test_key(self) -> None:
        """The configured key reaches the server; the client's own does not, and a wrong one is the backend's fault."""
        server = self.enterContext(LlamaServer(TinyModel(), *SLOTS, "--api-key", "sk-right"))
        text = ""
        for name, key in (("right", "env:LLAMA_KEY"), ("wrong", "sk-wrong")):
            text += f'[backends.{name}]\nkind = "openai"\nurl = "{server.url}"\napi_key = "{key}"\n'
            text += f'[models.{name}]\nbackend = "{name}"\nmodel = "tiny"\n'
        daemon = self.enterContext(Daemon(text, {"LLAMA_KEY": "sk-right"}))
        client = self.enterContext(daemon.client())
        self.good(ask(client, "right", max_tokens=3))
        asked = body("wrong", CHAT, {})
        self.bad(502, "backend_auth", client.call("POST", CHAT, asked, {"Authorization": "Bearer sk-right"}))


class ProcessTest(Case):
    """`portway serve` as a service runs it."""

    def test_sigterm_lets_an_answer_end(self) -> None:
        """At SIGTERM a stream that is under way ends as it should, then the program exits with 0."""
        server = self.enterContext(LlamaServer(ENDLESS, *SLOTS, "-c", "131072"))
        models = '[models.local]\nbackend = "llama"\nmodel = "tiny"\n'
        daemon = self.enterContext(DaemonProcess(configuration({"llama": server}, models)))
        client = self.enterContext(daemon.client())
        client.request("POST", CHAT, body("local", CHAT, {"stream": True, "max_tokens": 1000}))
        events = client.events(client.head())
        next(events)
        daemon.send(signal.SIGTERM)
        self.assertEqual("[DONE]", list(events)[-1].data)
        self.assertEqual(0, daemon.wait())
