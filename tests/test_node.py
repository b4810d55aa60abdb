"""OpenAI's Node SDK and the AI SDK as clients: of a real llama-server, and of the stand-in for Ollama.

What they do stands in tests/node; what has to come of it, here.
"""

from __future__ import annotations

import json
import math
import unittest
from typing import Any, ClassVar

from portway.standin.server import Fault, StandIn
from tests import clients_doc
from tests.daemon import ROOT, Daemon, DaemonProcess
from tests.llama_server import LlamaServer
from tests.node_packages import SOURCE, Program, Workshop
from tests.tiny_gguf import TinyModel

ASKED = "/api/chat"  # what the stand-in is told to fail; not what it is asked about its models
OLLAMA = """
    [server]
    heartbeat = 0.02
    {server}
    [backends.ollama]
    kind = "ollama"
    url = "{url}"
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
    [models.embed]
    backend = "ollama"
    model = "nomic-embed-text"
"""


class NodeCase(unittest.TestCase):
    """A workshop with the scripts of tests/node."""

    url: str
    script: ClassVar[str] = "openai.mjs"
    workshop: ClassVar[Workshop]

    @classmethod
    def setUpClass(cls) -> None:
        cls.workshop = cls.enterClassContext(Workshop())
        for path in SOURCE.glob("*.mjs"):
            cls.workshop.write(path.name, path.read_text(encoding="utf-8"))

    def play(self, url: str, scenario: str, *args: str) -> Any:
        """What a scenario comes to."""
        return json.loads(self.workshop.run(self.script, scenario, url, *args).splitlines()[-1])

    def begin(self, url: str, scenario: str, *args: str) -> Program:
        """A scenario that something is to happen in."""
        return self.enterContext(self.workshop.start(self.script, scenario, url, *args))


class StandInCase(NodeCase):
    """A stand-in and a daemon for each test. Heartbeats come every 0.02 s of silence."""

    server = ""

    def setUp(self) -> None:
        self.standin = self.enterContext(StandIn())
        self.url = self.enterContext(Daemon(OLLAMA.format(url=self.standin.url, server=self.server))).url

    def asked(self) -> int:
        """How often the backend was asked for an answer."""
        return sum(request.path == ASKED for request in self.standin.requests)

    def let_go(self) -> None:
        """Let the request that hangs, or is about to, go on."""

        def hangs(standin: StandIn) -> bool:
            return [request.phase for request in standin.requests if request.path == ASKED][-1:] == ["hang"]

        self.assertTrue(self.standin.wait_for(hangs))
        self.standin.release()

    def left(self) -> bool:
        """A client's leaving was seen, or is within seconds."""
        return self.standin.wait_for(lambda standin: any(request.left for request in standin.requests))


class Both:
    """What OpenAI's SDK finds with either kind of backend."""

    url: str
    tools_model: ClassVar[str]

    def test_chat(self: Any) -> None:
        """A plain answer has the logical name, text, true counts, and in a header who served it."""
        said = self.play(self.url, "chat")
        self.assertEqual(("chat", "chat"), (said["answer"]["model"], said["servedBy"]))
        usage = said["answer"]["usage"]
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])
        self.assertGreater(usage["prompt_tokens"], 5)

    def test_streams(self: Any) -> None:
        """A stream's pieces are the plain answer under one id; usage comes exactly when it is asked for."""
        said = self.play(self.url, "streams")
        for streamed in (said["silent"], said["counted"]):
            self.assertEqual(said["plain"], streamed["text"])
            self.assertEqual((["chat"], 1), (streamed["models"], len(streamed["ids"])))
            self.assertEqual(1, len(streamed["finishReasons"]))
        self.assertEqual([], said["silent"]["usages"])
        (usage,) = said["counted"]["usages"]
        self.assertGreater(usage["prompt_tokens"], 5)

    def test_tools(self: Any) -> None:
        """Several calls in one stream: an id each, and arguments that stay apart."""
        choice = self.play(self.url, "tools", self.tools_model)
        self.assertEqual("tool_calls", choice["finish_reason"])
        calls = choice["message"]["tool_calls"]
        self.assertEqual(len(calls), len({call["id"] for call in calls}))
        for call in calls:
            self.assertIn(call["function"]["name"], ("weather", "population"))
            self.assertIn(json.loads(call["function"]["arguments"])["city"], ("Lima", "Oslo"))

    def test_reasoning(self: Any) -> None:
        """Reasoning is in reasoning_content, plain and streamed."""
        said = self.play(self.url, "reasoning")
        self.assertTrue(said["plain"]["reasoning_content"])
        self.assertEqual(said["plain"]["reasoning_content"].strip(), said["streamed"]["reasoning"].strip())
        self.assertNotIn("<think>", said["streamed"]["text"])

    def test_embeddings(self: Any) -> None:
        """The SDK asks for base64 unless told otherwise, and decodes it to the same numbers as the floats."""
        said = self.play(self.url, "embeddings")
        for one, other in zip(said["coded"], said["floats"], strict=True):
            self.assertAlmostEqual(1.0, math.hypot(*one), places=3)
            for a, b in zip(one, other, strict=True):
                self.assertAlmostEqual(a, b, places=5)

    def test_models(self: Any) -> None:
        """The models are listed, each with its window."""
        said = self.play(self.url, "models")
        self.assertLess({"chat", "thinker", "embed"}, {*said["listed"], ""})
        self.assertEqual(4096, said["one"]["context_length"])

    def test_refusals(self: Any) -> None:
        """What is the client's fault raises the class that says so."""
        long = [{"role": "user", "content": "we walk over the bridge " * 2000}]
        for fields, kind, code in (
            ({"model": "chatt"}, "NotFoundError", "model_not_found"),
            ({"messages": long}, "BadRequestError", "context_length_exceeded"),
            ({"messages": long, "stream": True}, "BadRequestError", "context_length_exceeded"),
            ({"temperature": "hot"}, "BadRequestError", None),
        ):
            failure = self.play(self.url, "failure", json.dumps(fields))
            self.assertEqual(kind, failure["kind"], failure)
            if code:
                self.assertEqual(code, failure["code"], failure)


class LlamaServerCase(NodeCase):
    """Some llama-servers and a daemon for all tests of a class."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        kinds: dict[str, tuple[TinyModel, tuple[str, ...]]] = {
            "chat": (TinyModel(context=4096), ()),
            "tools": (TinyModel(tools=True), ()),
            "thinker": (TinyModel(reasoning=True), ()),
            "embed": (TinyModel(embedding=True), ("--embeddings",)),
        }
        toml = ""
        for name, (model, args) in kinds.items():
            server = cls.enterClassContext(LlamaServer(model, "-np", "1", "-t", "1", *args))
            toml += f'[backends.{name}]\nkind = "openai"\nurl = "{server.url}"\n'
            toml += f'[models.{name}]\nbackend = "{name}"\nmodel = "tiny"\n'
        cls.url = cls.enterClassContext(Daemon(toml)).url


class LlamaServerTest(Both, LlamaServerCase):
    """OpenAI's SDK against llama-server."""

    tools_model = "tools"


class StandInTest(Both, StandInCase):
    """OpenAI's SDK against Ollama's protocol."""

    tools_model = "chat"

    def test_each_failure(self) -> None:
        """A failing backend is asked once, whatever the SDK would repeat, and the class tells what happened."""
        for fault, kind, status in (
            ("server_error", "InternalServerError", 502),
            ("busy", "InternalServerError", 503),
            ("rate_limited", "RateLimitError", 429),
        ):
            self.standin.fail(ASKED, fault, None)
            before = self.asked()
            with self.subTest(fault=fault), Daemon(OLLAMA.format(url=self.standin.url, server="")) as daemon:
                failure = self.play(daemon.url, "failure", "{}")
                self.assertEqual((kind, status, fault), (failure["kind"], failure["status"], failure["code"]))
                self.assertEqual(1, self.asked() - before)
            self.standin.heal()

    def test_stream_that_breaks(self) -> None:
        """A stream that breaks after its first words raises APIError, once those have been read."""
        self.standin.fail(ASKED, Fault("cut", after=2))
        failure = self.play(self.url, "failure", '{"stream": true}')
        self.assertTrue(failure["isAPIError"], failure)
        self.assertEqual("stream_broken", failure["code"])
        self.assertTrue("".join(failure["said"]))

    def test_client_that_gives_up(self) -> None:
        """The SDK's own timeout lets the backend go at once."""
        self.standin.fail(ASKED, "hang_before_content")
        failure = self.play(self.url, "failure", '{"options": {"timeout": 200, "maxRetries": 0}}')
        self.assertEqual("APIConnectionTimeoutError", failure["kind"])
        self.assertTrue(self.left())

    def test_nothing_listens(self) -> None:
        """Without Portway it is APIConnectionError."""
        failure = self.play("http://127.0.0.1:1/v1", "failure", '{"options": {"maxRetries": 0}}')
        self.assertEqual("APIConnectionError", failure["kind"])

    def test_heartbeats(self) -> None:
        """Heartbeats before and within an answer disturb nothing; who answered stands in a chunk."""
        for fault in ("hang_before_content", "hang_mid_stream"):
            self.standin.fail(ASKED, fault)
            program = self.begin(self.url, "heartbeat")
            program.await_line("beat")
            self.let_go()
            said = json.loads(program.rest().splitlines()[-1])
            self.assertIn("I keep nothing between requests", said["text"])
            self.assertEqual(["stop"], said["finishReasons"])
            if fault == "hang_before_content":
                self.assertEqual("chat", said["portway"]["served_by"])

    def test_leaving_a_stream(self) -> None:
        """abort() stops the backend, and so does breaking out of the loop."""
        for way in ("abort", "break"):
            with self.subTest(way=way), StandIn() as self.standin:
                url = self.enterContext(Daemon(OLLAMA.format(url=self.standin.url, server=""))).url
                self.standin.fail(ASKED, "hang_mid_stream")
                program = self.begin(url, "leave", way)
                program.await_line("left")
                self.assertTrue(self.left())
                program.rest()


class KeyTest(StandInCase):
    server = 'api_keys = ["sk-right"]'

    def test_keys(self) -> None:
        """A wrong key is AuthenticationError; the right one is served."""
        failure = self.play(self.url, "failure", '{"options": {"apiKey": "sk-wrong"}}')
        self.assertEqual(("AuthenticationError", "invalid_api_key"), (failure["kind"], failure["code"]))
        self.assertIsNone(self.play(self.url, "failure", '{"options": {"apiKey": "sk-right"}}')["kind"])


class AiSdkTest(StandInCase):
    """The AI SDK with @ai-sdk/openai-compatible, against Ollama's protocol."""

    script = "ai.mjs"

    def test_text(self) -> None:
        """A plain answer, with the logical name and who served it."""
        said = self.play(self.url, "text")
        self.assertIn("stand-in", said["text"])
        self.assertEqual(("chat", "chat"), (said["model"], said["servedBy"]))

    def test_stream(self) -> None:
        """A stream has its text, one finish and true counts."""
        said = self.play(self.url, "stream")
        self.assertIn("I keep nothing between requests", said["text"])
        self.assertEqual(["stop"], said["finishReasons"])
        self.assertGreater(said["usages"][0]["inputTokens"], 5)
        self.assertGreater(said["usages"][0]["outputTokens"], 5)
        self.assertEqual([], said["errors"])

    def test_tools(self) -> None:
        """Two calls in one stream are both run, and their results answered."""
        said = self.play(self.url, "tools")
        self.assertEqual(["weather", "population"], [call["toolName"] for call in said["calls"]])
        self.assertEqual(2, len({call["toolCallId"] for call in said["calls"]}))
        self.assertEqual([{"city": "Lima"}] * 2, [call["input"] for call in said["calls"]])
        self.assertEqual({"It rains in Lima.", "Many live in Lima."}, set(said["results"]))
        self.assertEqual(["tool-calls", "stop"], said["finishReasons"])
        self.assertIn("The tool answered", said["text"])

    def test_reasoning(self) -> None:
        """Reasoning comes as reasoning."""
        said = self.play(self.url, "reasoning")
        self.assertIn("reasoning", said["reasoning"])
        self.assertIn("stand-in", said["text"])

    def test_embedding(self) -> None:
        """An embedding has the model's length."""
        self.assertEqual(768, len(self.play(self.url, "embedding")))

    def test_refusals(self) -> None:
        """An unknown model and an overlong prompt are errors of the stream, with status and Portway's words."""
        for fields, status, code in (
            ({"model": "chatt"}, 404, "model_not_found"),
            ({"words": 9000}, 400, "context_length_exceeded"),
        ):
            (error,) = self.play(self.url, "failure", json.dumps(fields))["errors"]
            self.assertEqual(("AI_APICallError", status), (error["kind"], error["status"]))
            self.assertEqual(code, json.loads(error["body"])["error"]["code"])

    def test_stream_that_breaks(self) -> None:
        """A stream that breaks has an error behind its words."""
        self.standin.fail(ASKED, Fault("cut", after=2))
        said = self.play(self.url, "failure")
        self.assertTrue(said["text"])
        self.assertEqual(1, len(said["errors"]), said)
        self.assertEqual(1, self.asked())

    def test_its_retries(self) -> None:
        """It does not know x-should-retry and repeats a 5xx twice, as docs/clients.md says; maxRetries: 0 ends that."""
        self.standin.fail(ASKED, Fault("status", status=500), None)
        for fields, times in (("{}", 3), ('{"maxRetries": 0}', 1)):
            before = self.asked()
            (error,) = self.play(self.url, "failure", fields)["errors"]
            self.assertEqual(502, error["status"])
            self.assertEqual(times, self.asked() - before, fields)

    def test_heartbeats(self) -> None:
        """Heartbeats before and within an answer disturb nothing."""
        for fault in ("hang_before_content", "hang_mid_stream"):
            self.standin.fail(ASKED, fault)
            program = self.begin(self.url, "stream")
            program.await_line("beat")
            self.let_go()
            said = json.loads(program.rest().splitlines()[-1])
            self.assertIn("I keep nothing between requests", said["text"])
            self.assertEqual([], said["errors"])

    def test_leaving_a_stream(self) -> None:
        """Its abort signal stops the backend."""
        self.standin.fail(ASKED, "hang_mid_stream")
        program = self.begin(self.url, "leave")
        program.await_line("left")
        self.assertTrue(self.left())
        program.rest()


class AiSdkOnLlamaServerTest(LlamaServerCase):
    """The AI SDK against llama-server, which sends the arguments of a call in pieces."""

    script = "ai.mjs"

    def test_stream(self) -> None:
        """A stream has its text, one finish and true counts."""
        said = self.play(self.url, "stream")
        self.assertEqual((1, []), (len(said["finishReasons"]), said["errors"]))
        self.assertGreater(said["usages"][0]["inputTokens"], 5)

    def test_calls(self) -> None:
        """Several calls in one stream stay apart."""
        said = self.play(self.url, "calls")
        self.assertEqual(([], ["tool-calls"]), (said["errors"], said["finishReasons"]))
        self.assertGreater(len(said["calls"]), 1)
        self.assertEqual(len(said["calls"]), len({call["toolCallId"] for call in said["calls"]}))
        for call in said["calls"]:
            self.assertIn(call["input"]["city"], ("Lima", "Oslo"))

    def test_reasoning(self) -> None:
        """Reasoning comes as reasoning."""
        said = self.play(self.url, "reasoning")
        self.assertTrue(said["reasoning"])
        self.assertNotIn("<think>", said["text"])


class DocumentTest(NodeCase):
    """What the documents show, run as it stands, by the configuration that comes with Portway."""

    def setUp(self) -> None:
        standin = self.enterContext(StandIn())
        self.daemon = self.enterContext(DaemonProcess(clients_doc.shipped(standin.url)))

    def run_block(self, section: str) -> str:
        self.workshop.write("snippet.mjs", clients_doc.block(section, "js", self.daemon.port))
        return self.workshop.run("snippet.mjs")

    def test_openai(self) -> None:
        """The lines for OpenAI's SDK print an answer, a stream and an error."""
        plain, streamed, error = self.run_block("OpenAI SDK for Node").splitlines()
        self.assertEqual(f"fast-9b: {streamed}", plain)
        self.assertIn("I am the Portway stand-in", streamed)
        self.assertEqual("404 model_not_found", error)

    def test_ai_sdk(self) -> None:
        """The lines for the AI SDK print a stream with a tool's result in it."""
        printed = self.run_block("Vercel AI SDK")
        self.assertIn("The tool answered", printed)

    def test_example(self) -> None:
        """examples/classify.ts has no type error, and says what kind of text it was given."""
        self.workshop.write("classify.ts", (ROOT / "examples" / "classify.ts").read_text(encoding="utf-8"))
        self.workshop.write("tsconfig.json", json.dumps(TSCONFIG))
        self.workshop.run("node_modules/typescript/bin/tsc")
        environ = {"PORTWAY_URL": f"http://127.0.0.1:{self.daemon.port}"}
        text = "Why is my parcel late again?"
        printed = self.workshop.run("node_modules/tsx/dist/cli.mjs", "classify.ts", text, environ=environ)
        self.assertIn(text, printed)
        self.assertRegex(printed, r"\n(question|request|complaint|other) \(says fast-9b\)\n$")


TSCONFIG = {
    "compilerOptions": {
        "strict": True,
        "noEmit": True,
        "noUncheckedIndexedAccess": True,
        "skipLibCheck": True,
        "target": "es2022",
        "module": "nodenext",
        "types": ["node"],
    },
    "files": ["classify.ts"],
}


if __name__ == "__main__":
    unittest.main()
