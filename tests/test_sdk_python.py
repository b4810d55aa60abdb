"""OpenAI's own Python package as a client: of a real llama-server, and of the stand-in for Ollama."""

from __future__ import annotations

import array
import asyncio
import base64
import json
import math
import os
import socket
import subprocess
import sys
import threading
import unittest
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

from portway.standin.server import Fault, StandIn
from tests import clients_doc
from tests.daemon import ROOT, Daemon, DaemonProcess
from tests.doubles import LAST_CHUNK, Action, ScriptedServer, chunk, sse_body, stream_head
from tests.llama_server import LlamaServer, wait_for
from tests.tiny_gguf import TinyModel

try:
    import openai
    from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam, ChatCompletionToolParam  # noqa: TC002
except ImportError:
    if os.environ.get("CI") == "true":
        raise
    raise unittest.SkipTest("the package `openai` is not installed") from None

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "We walk over the bridge"}]
TOOLS: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Lima", "Oslo"]}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "population")
]
CALL_TWICE: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Ask weather, then population"}]
SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["question", "other"]}}, "required": ["kind"]}
WORDY = {"ignore_eos": True}  # llama-server's own; a tiny model may well end before the first word
SLOTS = ("-np", "2", "-t", "1")
HEARTBEAT = 0.02  # seconds
ASKED = "/api/chat"  # what the stand-in is told to fail; not what it is asked about its models

OLLAMA_MODELS = """
    [models.chat]
    backend = "ollama"
    model = "qwen3.5:9b"
    num_ctx = 4096
    think = false
    [models.thinker]
    backend = "ollama"
    model = "qwen3.5:9b"
    num_ctx = 4096
    think = true
    [models.fim]
    backend = "ollama"
    model = "qwen3-coder:30b"
    [models.embed]
    backend = "ollama"
    model = "nomic-embed-text"
"""


def ollama(url: str, server: str = "", models: str = OLLAMA_MODELS) -> str:
    """A configuration with all models behind one Ollama."""
    return f'[server]\n{server}\n[backends.ollama]\nkind = "ollama"\nurl = "{url}"\n{models}'


def sdk(url: str, **options: Any) -> openai.OpenAI:
    """A client as anyone makes it: its retries are on."""
    return openai.OpenAI(base_url=url, **{"api_key": "unused", "timeout": 30.0, **options})


class Joined(NamedTuple):
    """A stream's chunks put together as an application would."""

    chunks: list[ChatCompletionChunk]
    text: str
    reasoning: str
    finish_reasons: list[str]
    calls: dict[int, dict[str, str]]


def join(stream: Iterable[ChatCompletionChunk]) -> Joined:
    """Read a stream to its end."""
    chunks = list(stream)
    choices = [choice for each in chunks for choice in each.choices]
    calls: dict[int, dict[str, str]] = {}
    for piece in (piece for choice in choices for piece in choice.delta.tool_calls or ()):
        call = calls.setdefault(piece.index, {"id": piece.id or "", "name": "", "arguments": ""})
        if piece.function:
            call["name"] += piece.function.name or ""
            call["arguments"] += piece.function.arguments or ""
    return Joined(
        chunks,
        "".join(choice.delta.content or "" for choice in choices),
        "".join(getattr(choice.delta, "reasoning_content", None) or "" for choice in choices),
        [choice.finish_reason for choice in choices if choice.finish_reason],
        calls,
    )


class Both:
    """What has to hold with either kind of backend. The models are chat, tools, thinker and embed."""

    url: ClassVar[str]
    tools_model: ClassVar[str]
    client: openai.OpenAI

    def setUp(self) -> None:
        assert isinstance(self, unittest.TestCase)
        self.client = self.enterContext(sdk(self.url))

    def test_chat(self: Any) -> None:
        """A plain answer has the logical name, text, true token counts, and in a header who served it."""
        fields = {"model": "chat", "messages": HELLO, "temperature": 0, "max_tokens": 200}
        raw = self.client.chat.completions.with_raw_response.create(**fields)
        answer = raw.parse()
        self.assertEqual("chat", answer.model)
        self.assertEqual("chat", raw.headers["x-served-by"])
        self.assertTrue(answer.choices[0].message.content)
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        self.assertGreater(answer.usage.prompt_tokens, 5)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)

    def test_stream_is_the_plain_answer(self: Any) -> None:
        """The pieces of a stream are the plain answer, under one id; nothing but choices comes unasked."""
        fields = {"model": "chat", "messages": HELLO, "temperature": 0, "max_tokens": 30}
        plain = self.client.chat.completions.create(**fields).choices[0]
        streamed = join(self.client.chat.completions.create(**fields, stream=True))
        self.assertEqual(plain.message.content, streamed.text)
        self.assertEqual([plain.finish_reason], streamed.finish_reasons)
        self.assertEqual({"chat"}, {each.model for each in streamed.chunks})
        self.assertEqual(1, len({(each.id, each.created) for each in streamed.chunks}))
        self.assertTrue(all(each.choices and each.usage is None for each in streamed.chunks))

    def test_stream_with_usage(self: Any) -> None:
        """include_usage adds one last chunk without choices, with the numbers of the plain answer."""
        fields: dict[str, Any] = {"model": "chat", "messages": HELLO, "temperature": 0, "max_tokens": 8}
        plain = self.client.chat.completions.create(**fields).usage
        options = {"include_usage": True}
        streamed = join(self.client.chat.completions.create(**fields, stream=True, stream_options=options))
        *others, last = streamed.chunks
        self.assertEqual([], last.choices)
        self.assertTrue(all(each.usage is None for each in others))
        usage: Any = last.usage
        self.assertEqual((plain.prompt_tokens, plain.completion_tokens), (usage.prompt_tokens, usage.completion_tokens))

    def test_max_tokens_under_both_names(self: Any) -> None:
        """max_tokens and max_completion_tokens both cut the answer, and finish_reason says so."""
        for name in ("max_tokens", "max_completion_tokens"):
            fields = {name: 1, "extra_body": WORDY}
            answer = self.client.chat.completions.create(model="chat", messages=HELLO, **fields)
            self.assertEqual("length", answer.choices[0].finish_reason, name)
            self.assertEqual(1, answer.usage.completion_tokens, name)

    def test_stop_and_seed(self: Any) -> None:
        """The same seed gives the same text, and a stop word from it ends it there."""
        fields = {"model": "chat", "messages": HELLO, "seed": 5, "max_tokens": 30}
        said = {self.client.chat.completions.create(**fields).choices[0].message.content for _ in range(2)}
        (text,) = said
        word = text.split()[2]
        cut = self.client.chat.completions.create(**fields, stop=[word]).choices[0]
        self.assertEqual(text[: text.index(word)].strip(), cut.message.content.strip())
        self.assertEqual("stop", cut.finish_reason)

    def test_logprobs(self: Any) -> None:
        """logprobs has one entry for each token, with the alternatives that were asked for."""
        answer = self.client.chat.completions.create(
            model="chat", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=4, extra_body=WORDY
        )
        tokens = answer.choices[0].logprobs.content
        self.assertEqual(4, len(tokens))
        for token in tokens:
            self.assertLessEqual(token.logprob, 0)
            self.assertEqual(2, len(token.top_logprobs))

    def test_response_format(self: Any) -> None:
        """A JSON schema binds the answer, plain and streamed."""
        wanted = {"type": "json_schema", "json_schema": {"name": "kind", "schema": SCHEMA}}
        fields = {"model": "chat", "messages": HELLO, "response_format": wanted}
        plain = self.client.chat.completions.create(**fields).choices[0].message.content
        streamed = join(self.client.chat.completions.create(**fields, stream=True)).text
        for text in (plain, streamed):
            self.assertIn(json.loads(text)["kind"], ("question", "other"))

    def test_tool_call_and_its_result(self: Any) -> None:
        """A call has an id and arguments as JSON text; sent back with its result, it is answered in words."""
        create = self.client.chat.completions.create
        one = [{"role": "user", "content": "Ask weather"}]
        fields = {"model": self.tools_model, "tools": TOOLS[:1]}
        choice = create(**fields, messages=one, tool_choice="required", temperature=0).choices[0]
        self.assertEqual("tool_calls", choice.finish_reason)
        (call,) = choice.message.tool_calls
        self.assertTrue(call.id)
        self.assertEqual(("function", "weather"), (call.type, call.function.name))
        self.assertIn(json.loads(call.function.arguments)["city"], ("Lima", "Oslo"))
        result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
        words = {"max_tokens": 20, "extra_body": WORDY}
        said = create(model="chat", tools=TOOLS[:1], messages=[*one, choice.message, result], **words)
        self.assertTrue(said.choices[0].message.content)

    def test_several_streamed_calls(self: Any) -> None:
        """Several calls in one stream have indexes 0, 1, .., an id each, and arguments that stay apart."""
        streamed = self.stream_of_calls()
        self.assertEqual(list(range(len(streamed.calls))), sorted(streamed.calls))
        self.assertEqual(len(streamed.calls), len({call["id"] for call in streamed.calls.values()} - {""}))
        for call in streamed.calls.values():
            self.assertIn(call["name"], ("weather", "population"))
            self.assertIn(json.loads(call["arguments"])["city"], ("Lima", "Oslo"))
        self.assertEqual(["tool_calls"], streamed.finish_reasons)

    def stream_of_calls(self: Any) -> Joined:
        """The first stream with two calls or more; a tiny model needs some seeds for that."""
        for seed in range(50):
            streamed = join(
                self.client.chat.completions.create(
                    model=self.tools_model,
                    messages=CALL_TWICE,
                    tools=TOOLS,
                    tool_choice="required",
                    parallel_tool_calls=True,
                    seed=seed,
                    temperature=1,
                    stream=True,
                )
            )
            if len(streamed.calls) > 1:
                return streamed
        raise AssertionError("no seed gave two calls")

    def test_helper_that_joins_a_stream(self: Any) -> None:
        """The SDK's own helper for streams (chat.completions.stream) comes to the same calls."""
        fields = {"model": self.tools_model, "messages": CALL_TWICE, "tools": TOOLS, "temperature": 0, "seed": 1}
        with self.client.chat.completions.stream(**fields, tool_choice="required") as stream:
            final = stream.get_final_completion()
        self.assertEqual("tool_calls", final.choices[0].finish_reason)
        for call in final.choices[0].message.tool_calls:
            self.assertIn(json.loads(call.function.arguments)["city"], ("Lima", "Oslo"))

    def test_reasoning(self: Any) -> None:
        """Reasoning is in reasoning_content, plain and streamed, never in content; both names are kept."""
        fields = {"model": "thinker", "messages": HELLO, "temperature": 0, "max_tokens": 200}
        message = self.client.chat.completions.create(**fields).choices[0].message
        streamed = join(self.client.chat.completions.create(**fields, stream=True))
        self.assertTrue(message.reasoning_content)
        self.assertEqual(message.reasoning_content, message.reasoning)
        self.assertEqual(message.reasoning_content.strip(), streamed.reasoning.strip())
        self.assertNotIn("<think>", (message.content or "") + streamed.text)
        again = [*HELLO, message, {"role": "user", "content": "And then?"}]
        self.client.chat.completions.create(model="thinker", messages=again, max_tokens=5, extra_body=WORDY)

    def test_embeddings(self: Any) -> None:
        """The SDK asks for base64 unless told otherwise; it decodes to the floats that it gets when it says float."""
        texts = ["over the bridge", "under the window"]
        default = self.client.embeddings.create(model="embed", input=texts)
        floats = self.client.embeddings.create(model="embed", input=texts, encoding_format="float")
        self.assertEqual([0, 1], [item.index for item in default.data])
        self.assertNotEqual(default.data[0].embedding, default.data[1].embedding)
        for one, other in zip(default.data, floats.data, strict=True):
            self.assertAlmostEqual(1.0, math.hypot(*one.embedding), places=3)
            for a, b in zip(one.embedding, other.embedding, strict=True):
                self.assertAlmostEqual(a, b, places=5)
        self.assertGreater(default.usage.prompt_tokens, 0)
        coded: Any = self.client.embeddings.create(model="embed", input=texts, encoding_format="base64")
        self.assertEqual(default.data[0].embedding, list(array.array("f", base64.b64decode(coded.data[0].embedding))))

    def test_models(self: Any) -> None:
        """models.list and models.retrieve have the names of the configuration, with their context windows."""
        listed = {model.id: model for model in self.client.models.list()}
        self.assertLess({"chat", "thinker", "embed"}, set(listed))
        one = self.client.models.retrieve("chat")
        self.assertEqual(listed["chat"], one)
        self.assertEqual("model", one.object)
        self.assertEqual((4096, 4096, {"n_ctx": 4096}), (one.context_length, one.context_window, one.meta))

    def test_unknown_model(self: Any) -> None:
        """A name that nobody knows is NotFoundError for each endpoint, and names one that is near."""
        for ask in (
            lambda: self.client.chat.completions.create(model="chatt", messages=HELLO),
            lambda: self.client.chat.completions.create(model="chatt", messages=HELLO, stream=True),
            lambda: self.client.completions.create(model="chatt", prompt="a"),
            lambda: self.client.embeddings.create(model="chatt", input="a"),
            lambda: self.client.models.retrieve("chatt"),
        ):
            with self.assertRaises(openai.NotFoundError) as caught:
                ask()
            self.assertEqual("model_not_found", caught.exception.code)
            self.assertIn("chat", caught.exception.message)

    def test_overlong_prompt(self: Any) -> None:
        """A prompt longer than the window is BadRequestError with the code that agents look for."""
        long: list[ChatCompletionMessageParam] = [{"role": "user", "content": "we walk over the bridge " * 2000}]
        for stream in (False, True):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.client.chat.completions.create(model="chat", messages=long, stream=stream)
            self.assertEqual("context_length_exceeded", caught.exception.code)

    def test_bad_parameters(self: Any) -> None:
        """A parameter of a wrong kind is BadRequestError."""
        for fields in ({"temperature": "hot"}, {"messages": "hello"}, {"max_tokens": "many"}):
            with self.assertRaises(openai.BadRequestError, msg=str(fields)):
                self.client.chat.completions.create(**{"model": "chat", "messages": HELLO, **fields})

    def test_async_client(self: Any) -> None:
        """The asynchronous client streams several answers at once, each its own."""

        async def text(client: openai.AsyncOpenAI) -> str:
            stream = await client.chat.completions.create(
                model="chat", messages=HELLO, temperature=0, max_tokens=10, stream=True
            )
            return "".join([each.choices[0].delta.content or "" async for each in stream])

        async def texts() -> list[str]:
            async with openai.AsyncOpenAI(base_url=self.url, api_key="unused") as client:
                return await asyncio.gather(*(text(client) for _ in range(4)))

        said = asyncio.run(texts())
        self.assertEqual(4, len(said))
        self.assertEqual(1, len(set(said)))
        self.assertTrue(said[0])


class LlamaServerTest(Both, unittest.TestCase):
    """Against llama-server, whose answers are relayed."""

    tools_model = "tools"
    talker: ClassVar[LlamaServer]

    @classmethod
    def setUpClass(cls) -> None:
        kinds: dict[str, tuple[TinyModel, tuple[str, ...]]] = {
            "chat": (TinyModel(context=4096), ()),
            "endless": (TinyModel(context=65536, endless=True), ()),
            "tools": (TinyModel(tools=True), ()),
            "thinker": (TinyModel(reasoning=True), ()),
            "embed": (TinyModel(embedding=True), ("--embeddings",)),
        }
        toml = ""
        for name, (model, args) in kinds.items():
            slots = ("-c", "8192", *SLOTS) if name == "chat" else SLOTS  # 4096 for each
            server = cls.enterClassContext(LlamaServer(model, *slots, *args))
            toml += f'[backends.{name}]\nkind = "openai"\nurl = "{server.url}/v1"\n'
            toml += f'[models.{name}]\nbackend = "{name}"\nmodel = "tiny"\n'
            if name == "endless":
                cls.talker = server
        cls.url = cls.enterClassContext(Daemon(toml)).url

    def test_n(self) -> None:
        """n gives so many choices."""
        answer = self.client.chat.completions.create(model="chat", messages=HELLO, n=2, max_tokens=4, extra_body=WORDY)
        self.assertEqual([0, 1], sorted(choice.index for choice in answer.choices))

    def test_completions(self) -> None:
        """The older endpoint gives text, plain and streamed."""
        fields: dict[str, Any] = {"prompt": "we walk", "max_tokens": 4, "extra_body": WORDY}
        plain = self.client.completions.create(model="chat", temperature=0, **fields)
        stream = self.client.completions.create(model="chat", temperature=0, stream=True, **fields)
        self.assertEqual("chat", plain.model)
        self.assertTrue(plain.choices[0].text)
        self.assertEqual(plain.choices[0].text, "".join(c.text for each in stream for c in each.choices))

    def test_leaving_a_stream_stops_the_server(self) -> None:
        """Breaking out of a stream and closing it frees llama-server's slot."""
        with self.client.chat.completions.create(model="endless", messages=HELLO, stream=True) as stream:
            for each in stream:
                if each.choices and each.choices[0].delta.content:
                    break
            self.assertEqual(1, self.talker.busy_slots())
        wait_for(lambda: self.talker.busy_slots() == 0, "the slot's being free", lambda: self.talker.log[-2000:])


class StandInCase(unittest.TestCase):
    """A stand-in, a daemon and a client for each test."""

    server = ""
    models = OLLAMA_MODELS

    def setUp(self) -> None:
        self.standin = self.enterContext(StandIn())
        self.daemon = self.enterContext(Daemon(ollama(self.standin.url, self.server, self.models)))
        self.url = self.daemon.url
        self.client = self.enterContext(sdk(self.url))

    def asked(self) -> int:
        """How often the backend was asked for an answer."""
        return sum(request.path == ASKED for request in self.standin.requests)


class StandInTest(Both, unittest.TestCase):
    """Against Ollama's native protocol, from which everything is translated."""

    tools_model = "chat"

    @classmethod
    def setUpClass(cls) -> None:
        standin = cls.enterClassContext(StandIn())
        cls.url = cls.enterClassContext(Daemon(ollama(standin.url))).url

    def test_n(self) -> None:
        """Ollama knows no n: more than one choice is BadRequestError, not silently one."""
        with self.assertRaises(openai.BadRequestError):
            self.client.chat.completions.create(model="chat", messages=HELLO, n=2)

    def test_completions_with_suffix(self) -> None:
        """The older endpoint fills in between prompt and suffix."""
        fields: dict[str, Any] = {"prompt": "def add(a, b):", "suffix": "    return c", "max_tokens": 50}
        plain = self.client.completions.create(model="fim", **fields)
        stream = self.client.completions.create(model="fim", stream=True, **fields)
        self.assertIn("filled in", plain.choices[0].text)
        self.assertEqual(plain.choices[0].text, "".join(c.text for each in stream for c in each.choices))

    def test_image(self) -> None:
        """An image as a data: URL reaches a model that can see."""
        pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
        answer = self.client.chat.completions.create(
            model="chat",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixel}"}},
                    ],
                }
            ],
        )
        self.assertIn("1 image", answer.choices[0].message.content or "")


class ErrorTest(StandInCase):
    """Which class of the SDK each failure raises, and that the SDK's retries do not multiply it."""

    FAILURES = (
        ("server_error", openai.InternalServerError, 502),
        ("bad_answer", openai.InternalServerError, 502),
        ("connection_lost", openai.InternalServerError, 502),
        ("busy", openai.InternalServerError, 503),
        ("rate_limited", openai.RateLimitError, 429),
        ("model_not_found", openai.NotFoundError, 404),
        ("backend_auth", openai.InternalServerError, 502),
        ("bad_request", openai.BadRequestError, 400),
        ("context_length_exceeded", openai.BadRequestError, 400),
    )

    def test_each_failure(self) -> None:
        """A failing backend is asked once, whatever the SDK would repeat, and the class tells what happened."""
        for fault, kind, status in self.FAILURES:
            for stream in (False, True):
                with self.subTest(fault=fault, stream=stream), self.fresh() as client:
                    self.standin.fail(ASKED, fault, None)
                    before = self.asked()
                    with self.assertRaises(openai.APIStatusError) as caught:
                        client.chat.completions.create(model="chat", messages=HELLO, stream=stream)
                    self.assertEqual((kind, status), (type(caught.exception), caught.exception.status_code))
                    if fault != "bad_request":
                        self.assertEqual(fault, caught.exception.code)
                    self.assertEqual(1, self.asked() - before)
                    self.standin.heal()

    def fresh(self) -> openai.OpenAI:
        """A client of a daemon on which nothing has failed yet."""
        return sdk(self.enterContext(Daemon(ollama(self.standin.url))).url)

    def test_backend_that_is_not_there(self) -> None:
        """With no backend running the error says so, and the SDK does not repeat the request."""
        self.standin.refuse()
        with self.assertRaises(openai.InternalServerError) as caught:
            self.client.chat.completions.create(model="chat", messages=HELLO)
        self.assertEqual("connect_failed", caught.exception.code)
        self.assertEqual("false", caught.exception.response.headers["x-should-retry"])

    def test_stream_that_breaks(self) -> None:
        """A stream that breaks after its first words raises APIError; what came before it stays readable."""
        for fault in ("cut", "error_line", "reset_mid_stream", "eof"):
            with self.subTest(fault=fault), self.fresh() as client:
                self.standin.fail(ASKED, Fault(fault, after=2))
                before = self.asked()
                said = []
                with self.assertRaises(openai.APIError) as caught:
                    for each in client.chat.completions.create(model="chat", messages=HELLO, stream=True):
                        said += [choice.delta.content for choice in each.choices if choice.delta.content]
                self.assertNotIsInstance(caught.exception, openai.APIConnectionError)
                self.assertEqual(2, len(said))
                self.assertTrue(caught.exception.message)
                self.assertEqual("stream_broken", caught.exception.code)
                self.assertEqual(1, self.asked() - before)

    def test_nothing_listens(self) -> None:
        """Without Portway it is APIConnectionError."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        with sdk(f"http://127.0.0.1:{port}/v1", max_retries=0) as client, self.assertRaises(openai.APIConnectionError):
            client.models.list()

    def test_client_that_gives_up(self) -> None:
        """The SDK's own timeout is APITimeoutError, and the backend is let go at once."""
        self.standin.fail(ASKED, "hang_before_content")
        with self.assertRaises(openai.APITimeoutError):
            self.client.with_options(timeout=0.2, max_retries=0).chat.completions.create(model="chat", messages=HELLO)
        self.assertTrue(self.standin.wait_for(lambda standin: any(request.left for request in standin.requests)))


class KeyTest(StandInCase):
    server = 'api_keys = ["sk-right"]'

    def test_keys(self) -> None:
        """A wrong key is AuthenticationError; the right one is served, and stays with Portway."""
        with self.assertRaises(openai.AuthenticationError) as caught:
            self.client.chat.completions.create(model="chat", messages=HELLO)
        self.assertEqual("invalid_api_key", caught.exception.code)
        with sdk(self.url, api_key="sk-right") as client:
            client.chat.completions.create(model="chat", messages=HELLO)
        (request,) = [request for request in self.standin.requests if request.path == ASKED]
        self.assertIsNone(request.header("authorization"))


class FallbackTest(StandInCase):
    models = """
        [models.first]
        backend = "ollama"
        model = "qwen3.5:9b"
        fallback = ["second"]
        [models.second]
        backend = "ollama"
        model = "llama3.2:3b"
    """

    def test_who_answered(self) -> None:
        """When the next model answers, the SDK shows it in `model` and in the headers; the stream likewise."""
        for stream in (False, True):
            self.standin.fail(ASKED, "server_error")
            raw = self.client.chat.completions.with_raw_response.create(model="first", messages=HELLO, stream=stream)
            self.assertEqual("second", raw.headers["x-served-by"])
            self.assertRegex(raw.headers["x-portway-attempts"], r"^first=server_error.*; second=ok$")
            answer = raw.parse()
            said = {each.model for each in answer} if isinstance(answer, openai.Stream) else {answer.model}
            self.assertEqual({"second"}, said)

    def test_honest_failure_on_request(self) -> None:
        """With X-Portway-Fallback: off the failure comes through."""
        self.standin.fail(ASKED, "server_error")
        with self.assertRaises(openai.InternalServerError):
            self.client.chat.completions.create(
                model="first", messages=HELLO, extra_headers={"X-Portway-Fallback": "off"}
            )


class HeartbeatTest(unittest.TestCase):
    """Comments in a stream are nothing that an application sees."""

    def setUp(self) -> None:
        self.standin = self.enterContext(StandIn())
        self.daemon = self.enterContext(Daemon(ollama(self.standin.url, f"heartbeat = {HEARTBEAT}")))
        self.client = self.enterContext(sdk(self.daemon.url))
        self.received = b""  # by the SDK

    def stream(self, client: openai.OpenAI, on_beat: Callable[[], None]) -> openai.Stream[ChatCompletionChunk]:
        """A stream that calls `on_beat` when a heartbeat has come through the SDK's own connection."""
        stream = client.chat.completions.create(model="chat", messages=HELLO, stream=True)
        read = stream.response.iter_bytes

        def watched(*args: Any) -> Iterable[bytes]:
            for data in read(*args):
                self.received += data
                if b": portway\n" in data:
                    on_beat()
                yield data

        stream.response.iter_bytes = watched  # type: ignore[method-assign,assignment]
        return stream

    def test_before_the_first_chunk(self) -> None:
        """Heartbeats while a model loads disturb nothing; who answered stands in the first chunk."""
        self.standin.fail(ASKED, "hang_before_content")
        streamed = join(self.stream(self.client, self.standin.release))
        self.assertIn("stand-in", streamed.text)
        self.assertEqual(["stop"], streamed.finish_reasons)
        self.assertEqual("chat", (streamed.chunks[0].model_extra or {})["portway"]["served_by"])

    def test_between_chunks(self) -> None:
        """Nor do they in the middle of an answer."""
        self.standin.fail(ASKED, Fault("hang_mid_stream", after=3))
        streamed = join(self.stream(self.client, self.standin.release))
        self.assertIn("I keep nothing between requests", streamed.text)
        self.assertEqual(["stop"], streamed.finish_reasons)

    def test_after_events_with_an_id(self) -> None:
        """Nor where a backend's events have ids, after which the SDK takes any blank line for an event."""
        beaten = threading.Event()
        frames = [b"id: %d\ndata: %s\n\n" % (i, json.dumps(piece).encode()) for i, piece in enumerate(self.pieces())]
        script: list[Action] = [stream_head(), chunk(frames[0]), beaten, *map(chunk, frames[1:])]
        script += [chunk(sse_body([])[-1]), LAST_CHUNK]
        with ScriptedServer(then=script) as server:
            toml = f'[server]\nheartbeat = {HEARTBEAT}\n[backends.other]\nkind = "openai"\nurl = "{server.url}"\n'
            toml += '[models.chat]\nbackend = "other"\nmodel = "m"\n'
            with Daemon(toml) as daemon, sdk(daemon.url) as client:
                streamed = join(self.stream(client, beaten.set))
        self.assertTrue(beaten.is_set())
        self.assertEqual("one two three", streamed.text)
        self.assertNotIn(b"id:", self.received)

    def pieces(self) -> list[dict[str, Any]]:
        """Three words as a server streams them, and the end."""
        deltas: list[dict[str, str]] = [{"content": word} for word in ("one", " two", " three")]
        ends = [None, None, None, "stop"]
        return [
            {
                "id": "c",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [{"index": 0, "delta": delta, "finish_reason": end}],
            }
            for delta, end in zip([*deltas, {}], ends, strict=True)
        ]

    def test_failure_after_a_heartbeat(self) -> None:
        """When the headers have gone out with a heartbeat, a failure is APIError with its own words."""
        self.standin.fail(ASKED, "hang_before_content")
        models = """
            [models.chat]
            backend = "ollama"
            model = "qwen3.5:9b"
            timeouts = { first_token = 0.3 }
        """
        daemon = self.enterContext(Daemon(ollama(self.standin.url, f"heartbeat = {HEARTBEAT}", models)))
        beaten = threading.Event()
        stream = self.stream(self.enterContext(sdk(daemon.url)), beaten.set)
        with self.assertRaises(openai.APIError) as caught:
            join(stream)
        self.assertTrue(beaten.is_set())
        self.assertEqual("first_token_timeout", caught.exception.code)


class LeavingTest(StandInCase):
    """Who stops reading stops the backend."""

    def left(self) -> bool:
        return self.standin.wait_for(lambda standin: any(request.left for request in standin.requests))

    def test_breaking_out_of_a_stream(self) -> None:
        """Leaving the loop and the stream's `with` ends the generation."""
        self.standin.fail(ASKED, "hang_mid_stream")
        with self.client.chat.completions.create(model="chat", messages=HELLO, stream=True) as stream:
            for each in stream:
                if each.choices[0].delta.content:
                    break
        self.assertTrue(self.left())

    def test_cancelled_task(self) -> None:
        """So does cancelling the task of the asynchronous client, also of a plain request."""

        async def ask_and_cancel() -> None:
            async with openai.AsyncOpenAI(base_url=self.url, api_key="unused") as client:
                task = asyncio.create_task(client.chat.completions.create(model="chat", messages=HELLO))
                hangs = asyncio.to_thread(self.standin.wait_for, lambda s: any(r.phase == "hang" for r in s.requests))
                self.assertTrue(await hangs)
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task

        self.standin.fail(ASKED, "hang")
        asyncio.run(ask_and_cancel())
        self.assertTrue(self.left())


class DocumentTest(unittest.TestCase):
    """What the documents show, run as it stands, by the configuration that comes with Portway."""

    def setUp(self) -> None:
        self.standin = self.enterContext(StandIn())
        self.daemon = self.enterContext(DaemonProcess(clients_doc.shipped(self.standin.url)))

    def run_python(self, *args: str) -> str:
        """What such a program prints, which must end well."""
        environ = {**os.environ, "PORTWAY_URL": f"http://127.0.0.1:{self.daemon.port}"}
        done = subprocess.run(
            [sys.executable, *args], env=environ, capture_output=True, text=True, timeout=60, check=False
        )
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        return done.stdout

    def test_snippet(self) -> None:
        """The lines for Python in docs/clients.md run, and print what they say they do."""
        printed = self.run_python("-c", clients_doc.block("OpenAI SDK for Python", "python", self.daemon.port))
        plain, streamed, error = printed.splitlines()
        self.assertEqual(f"fast-9b: {streamed}", plain)
        self.assertIn("I am the Portway stand-in", streamed)
        self.assertEqual("404 model_not_found", error)

    def test_example(self) -> None:
        """examples/demo.py makes its round trip."""
        printed = self.run_python(str(ROOT / "examples" / "demo.py"))
        self.assertIn("fast-9b was asked, fast-9b answered:", printed)
        self.assertIn("after two turns", printed)


if __name__ == "__main__":
    unittest.main()
