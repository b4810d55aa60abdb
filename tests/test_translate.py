"""wire/translate.py: OpenAI's requests in Ollama's words, Ollama's lines in OpenAI's."""

import base64
import itertools
import json
import struct
import unittest
from typing import Any

from portway.call import Call, Endpoint
from portway.config import Backend, Model
from portway.errors import BackendError, ClientError
from portway.wire.events import SSEReader
from portway.wire.translate import (
    ChatStream,
    chat_request,
    embed_request,
    embed_response,
    generate_request,
    new_call_id,
    prompt_chars,
)

BACKEND = Backend("ollama", "ollama", "http://127.0.0.1:11434", "http", "127.0.0.1", 11434)
HI = [{"role": "user", "content": "Hi"}]
PNG = base64.b64encode(b"\x89PNG").decode()
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def model(**more: Any) -> Model:
    return Model(name="fast", backend=BACKEND, model="qwen:9b", **more)


def embed(**more: Any) -> dict[str, Any]:
    return {"model": "qwen:9b", "input": ["a"], "truncate": False, **more}


class Requests(unittest.TestCase):
    def chat(self, target: Model | None = None, /, **body: Any) -> tuple[dict[str, Any], list[str]]:
        return chat_request({"model": "fast", "messages": HI, **body}, target or model())

    def payload(self, target: Model | None = None, /, **body: Any) -> dict[str, Any]:
        payload, warnings = self.chat(target, **body)
        self.assertEqual(warnings, [])
        return payload

    def messages(self, *messages: Any, target: Model | None = None) -> Any:
        return self.payload(target, messages=list(messages))["messages"]

    def client_error(self, param: str, **body: Any) -> ClientError:
        with self.assertRaises(ClientError) as caught:
            self.chat(**body)
        self.assertEqual((caught.exception.status, caught.exception.param), (400, param))
        return caught.exception

    def unsupported(self, detail: str, target: Model | None = None, **body: Any) -> BackendError:
        with self.assertRaises(BackendError) as caught:
            self.chat(target, **body)
        self.assertEqual((caught.exception.reason, caught.exception.detail), ("unsupported", detail))
        return caught.exception


class Policy(Requests):
    def test_the_least_request(self):
        """Nothing the client left out is made up; what would chop text in silence is off."""
        self.assertEqual(
            self.payload(),
            {"model": "qwen:9b", "messages": HI, "stream": True, "truncate": False, "shift": False},
        )

    def test_the_body_is_not_changed(self):
        """Another target may still need it as it came."""
        body = {
            "messages": [{"role": "developer", "content": "x"}],
            "tools": [{"function": {"name": "f"}}],
            "stop": "a",
        }
        before = json.dumps(body)
        chat_request(body, model(params={"seed": 1}, merge_system=True))
        self.assertEqual(json.dumps(body), before)

    def test_residency_goes_with_every_call(self):
        """keep_alive in seconds, as an integer where it is one, and num_ctx: on all three endpoints."""
        target = model(keep_alive=900.0, num_ctx=16384)
        for payload in (
            self.payload(target),
            generate_request({"prompt": "x"}, target)[0],
            embed_request({"input": "x"}, target)[0],
        ):
            self.assertEqual((payload["keep_alive"], payload["options"]), (900, {"num_ctx": 16384}))
            self.assertIs(type(payload["keep_alive"]), int)
        self.assertEqual(self.payload(model(keep_alive=0.5))["keep_alive"], 0.5)
        self.assertEqual(self.payload(model(keep_alive=-1.0))["keep_alive"], -1)
        self.assertEqual(self.payload(model(keep_alive=0.0))["keep_alive"], 0)

    def test_a_client_can_not_change_the_policy(self):
        """What would reload or unload the model is not the client's to say, and it hears so."""
        body = {"num_ctx": 99, "keep_alive": 0, "options": {"num_ctx": 1}, "num_gpu": 0, "use_mmap": False}
        payload, warnings = self.chat(model(num_ctx=4096, params={"num_gpu": 7}), **body)
        self.assertEqual(payload["options"], {"num_gpu": 7, "num_ctx": 4096})
        self.assertNotIn("keep_alive", payload)
        self.assertEqual(
            sorted(warnings),
            ["ignored(keep_alive)", "ignored(num_ctx)", "ignored(num_gpu)", "ignored(options)", "ignored(use_mmap)"],
        )

    def test_params_fill_in_where_the_client_is_silent(self):
        """A value of the client's wins; null is silence."""
        target = model(params={"temperature": 0.7, "top_k": 20, "stop": ["END"], "num_thread": 4})
        options = self.payload(target, temperature=0, top_k=None)["options"]
        self.assertEqual(options, {"num_thread": 4, "temperature": 0, "top_k": 20, "stop": ["END"]})
        names = ("num_gpu", "num_batch", "main_gpu", "use_mmap", "num_thread", "num_keep", "draft_num_predict")
        runner: dict[str, Any] = dict.fromkeys(names, 1)
        self.assertEqual(self.payload(model(params=runner))["options"], runner)
        self.assertEqual(embed_request({"input": "a"}, model(params=runner)), (embed(options=runner), []))

    def test_sampling_keeps_its_names(self):
        """Each option by the same name and value; integers as integers."""
        asked = {
            "temperature": 0.5,
            "top_p": 1,
            "min_p": 0.1,
            "typical_p": 0.9,
            "presence_penalty": -1,
            "frequency_penalty": 0.0,
            "repeat_penalty": 1.1,
            "seed": 3.0,
            "top_k": 5,
            "repeat_last_n": 64,
        }
        options = self.payload(**asked)["options"]
        self.assertEqual(options, asked)
        self.assertIs(type(options["seed"]), int)

    def test_stop_is_a_list(self):
        """A string or a list, without empty words."""
        self.assertEqual(self.payload(stop="a")["options"], {"stop": ["a"]})
        self.assertEqual(self.payload(stop=["a", "", "b"])["options"], {"stop": ["a", "b"]})
        self.assertNotIn("options", self.payload(stop=[]))

    def test_the_limit_of_an_answer(self):
        """max_completion_tokens before max_tokens, both under the model's ceiling; -1 is no limit."""
        for body, ceiling, expected, warnings in (
            ({"max_tokens": 5}, None, 5, []),
            ({"max_tokens": 5, "max_completion_tokens": 7}, None, 7, []),
            ({"max_tokens": 5}, 5, 5, []),
            ({"max_tokens": 6}, 5, 5, ["capped(max_tokens)"]),
            ({"max_completion_tokens": 6}, 5, 5, ["capped(max_tokens)"]),
            ({}, 5, 5, []),
            ({"max_tokens": -1}, 5, 5, []),
            ({"max_tokens": -1}, None, None, []),
            ({"max_tokens": 8.0}, None, 8, []),
        ):
            with self.subTest(body=body, ceiling=ceiling):
                payload, warned = self.chat(model(max_tokens=ceiling), **body)
                self.assertEqual(payload.get("options", {}).get("num_predict"), expected)
                self.assertEqual(warned, warnings)

    def test_effort_maps_to_think(self):
        """OpenAI's efforts, either spelling, before the configured value; unknown ones are clamped and named."""
        for effort, think in (
            ("none", False),
            ("minimal", "low"),
            ("low", "low"),
            ("Medium", "medium"),
            ("high", "high"),
            ("xhigh", "max"),
            ("max", "max"),
        ):
            with self.subTest(effort=effort):
                self.assertEqual(self.payload(reasoning_effort=effort)["think"], think)
                self.assertEqual(self.payload(model(think=True), reasoning={"effort": effort})["think"], think)
        self.assertEqual(self.payload(think=False)["think"], False)
        self.assertEqual(self.payload(think=True, reasoning_effort="low")["think"], "low")
        payload, warnings = self.chat(reasoning_effort="ultra")
        self.assertEqual((payload["think"], warnings), ("medium", ["clamped(reasoning_effort)"]))
        payload, warnings = self.chat(reasoning={"effort": "low", "summary": "auto", "max_tokens": 9})
        self.assertEqual((payload["think"], warnings), ("low", ["ignored(reasoning.max_tokens)"]))

    def test_the_configured_think(self):
        """It holds where the client is silent; false is sent, since a thinking model without it thinks."""
        self.assertEqual(self.payload(model(think="high"))["think"], "high")
        self.assertEqual(self.payload(model(think=False))["think"], False)
        self.assertNotIn("think", self.payload(model(think=None)))

    def test_a_model_that_can_not_think(self):
        """It is not sent what Ollama would refuse; only a client that asked hears of it."""
        target = model(think=True, capabilities=frozenset({"completion"}))
        self.assertNotIn("think", self.payload(target))
        self.assertEqual(self.payload(target, reasoning_effort="none")["think"], False)
        thinks = model(think=True, capabilities=frozenset({"completion", "thinking"}))
        self.assertEqual(self.payload(thinks, reasoning_effort="high")["think"], "high")
        payload, warnings = self.chat(target, reasoning_effort="high")
        self.assertNotIn("think", payload)
        self.assertEqual(warnings, ["ignored(reasoning_effort)"])

    def test_what_shapes_nothing_is_silent(self):
        """Fields without a bearing on the answer, nulls, and values that ask for nothing."""
        self.payload(
            user="me",
            metadata={},
            stream_options={"include_usage": True},
            store=True,
            service_tier="auto",
            safety_identifier="x",
            prompt_cache_key="x",
            n=1,
            logit_bias={},
            best_of=1,
            parallel_tool_calls=True,
            modalities=["text"],
            verbosity="medium",
            web_search_options=None,
            logprobs=False,
            stream=True,
        )

    def test_what_can_not_be_carried_over_is_named(self):
        """Each field that would shape the answer, known or not."""
        body = {
            "logit_bias": {"1": 5},
            "parallel_tool_calls": False,
            "modalities": ["text", "audio"],
            "verbosity": "low",
            "prediction": {"type": "content"},
            "web_search_options": {},
            "typo": 1,
        }
        self.assertEqual(self.chat(**body)[1], [f"ignored({name})" for name in body])

    def test_warnings_fit_a_header(self):
        """Names are reduced to harmless characters and their number is bounded."""
        self.assertEqual(self.chat(**{"a\r\nb: é": 1})[1], ["ignored(a__b___)"])
        self.assertEqual(self.chat(**{"": 1})[1], ["ignored(_)"])
        self.assertEqual(self.chat(**{"x" * 99: 1})[1], ["ignored(" + "x" * 64 + ")"])
        self.assertEqual(self.chat(**{f"x{i}": 1 for i in range(16)})[1], [f"ignored(x{i})" for i in range(16)])
        many = self.chat(**{f"x{i}": 1 for i in range(40)})[1]
        self.assertEqual((len(many), many[14:]), (16, ["ignored(x14)", "ignored(25_more)"]))

    def test_wrong_types_are_the_clients(self):
        """A 400 that names the field, whoever would serve it."""
        for param, value in (
            ("temperature", "hot"),
            ("temperature", True),
            ("top_p", []),
            ("seed", 1.5),
            ("seed", True),
            ("seed", 2**63),
            ("top_k", "1"),
            ("max_tokens", 0),
            ("max_tokens", -2),
            ("max_completion_tokens", "9"),
            ("stop", 1),
            ("stop", ["a", 1]),
            ("n", 0),
            ("n", "2"),
            ("reasoning_effort", 3),
            ("reasoning", "high"),
            ("think", 1),
            ("logprobs", 1),
            ("response_format", "json"),
            ("response_format", {"type": "xml"}),
            ("tools", {}),
        ):
            with self.subTest(param=param, value=value):
                self.client_error(param, **{param: value})
        self.client_error("reasoning.effort", reasoning={"effort": 1})
        self.client_error("top_logprobs", logprobs=True, top_logprobs=21)
        self.client_error("response_format.json_schema.schema", response_format={"type": "json_schema"})

    def test_formats(self):
        """A schema for both kinds of JSON, since Ollama's own word for it does not work everywhere."""
        schema = {"type": "object", "properties": {"a": {"type": "string"}}}
        wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        self.assertEqual(self.payload(response_format=wrapped)["format"], schema)
        self.assertEqual(self.payload(response_format={"type": "json_object"})["format"], {"type": "object"})
        self.assertNotIn("format", self.payload(response_format={"type": "text"}))

    def test_logprobs(self):
        """Asked for by a flag; the number of alternatives only along with it."""
        payload = self.payload(logprobs=True, top_logprobs=3)
        self.assertEqual((payload["logprobs"], payload["top_logprobs"]), (True, 3))
        for most in (0, 20):
            self.assertEqual(self.payload(logprobs=True, top_logprobs=most)["top_logprobs"], most)
        self.assertNotIn("top_logprobs", self.payload(logprobs=True))
        self.assertNotIn("top_logprobs", self.payload(logprobs=False, top_logprobs=3))

    def test_what_ollama_has_no_form_for(self):
        """Several answers, retired functions, a chat with an embedding model: the next target's turn."""
        self.assertEqual(self.unsupported("n", n=2).param, "n")
        self.unsupported("functions", functions=[{"name": "f"}])
        self.unsupported("functions", function_call="auto")
        self.unsupported("chat", model(capabilities=frozenset({"embedding"})))


class Tools(Requests):
    def test_tools_are_sent_as_they_are(self):
        """OpenAI's form is Ollama's."""
        self.assertEqual(self.payload(tools=[WEATHER, CLOCK])["tools"], [WEATHER, CLOCK])
        self.assertNotIn("tools", self.payload(tools=[]))

    def test_what_ollama_needs_is_filled_in(self):
        """A missing type or schema, legal at OpenAI, is a 400 or 500 there."""
        filled = {"type": "object", "properties": {}}
        for function in ({"name": "f"}, {"name": "f", "parameters": None}, {"name": "f", "parameters": {}}):
            sent = self.payload(tools=[{"function": function}])["tools"]
            self.assertEqual(sent, [{"type": "function", "function": {"name": "f", "parameters": filled}}])
        loose = {"type": ["object", "null"], "properties": {"a": True, "b": {"type": "string"}}, "required": ["a"]}
        sent = self.payload(tools=[{"type": "function", "function": {"name": "f", "parameters": loose}}])["tools"]
        self.assertEqual(
            sent[0]["function"]["parameters"],
            {"type": "object", "properties": {"a": {}, "b": {"type": "string"}}, "required": ["a"]},
        )

    def test_tool_choice(self):
        """None offers none, a named one only itself; what can't be enforced is said."""
        both = [WEATHER, CLOCK]
        unenforced = ["not_enforced(tool_choice)"]
        named = {"type": "function", "function": {"name": "clock"}}
        for choice, offered, warnings in (
            ("auto", both, []),
            (None, both, []),
            ("none", None, []),
            ("required", both, unenforced),
            (named, [CLOCK], unenforced),
            ({"type": "allowed_tools", "allowed_tools": {}}, both, unenforced),
        ):
            with self.subTest(choice=choice):
                payload, warned = self.chat(tools=both, tool_choice=choice)
                self.assertEqual((payload.get("tools"), warned), (offered, warnings))
        for wrong in ("maybe", {"type": "function", "function": {"name": "x"}}, {"type": "function"}, 5):
            self.client_error("tool_choice", tools=both, tool_choice=wrong)

    def test_strict_is_not_enforced(self):
        """Ollama holds no call to its schema."""
        strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
        self.assertEqual(self.chat(tools=[strict])[1], ["not_enforced(strict)"])

    def test_a_model_without_tools(self):
        """Skipped where it is known; unknown is for Ollama to judge; no tools offered is no matter."""
        target = model(capabilities=frozenset({"completion"}))
        self.assertEqual(self.unsupported("tools", target, tools=[WEATHER]).param, "tools")
        self.assertNotIn("tools", self.payload(target, tools=[WEATHER], tool_choice="none"))
        self.assertIn("tools", self.payload(model(capabilities=None), tools=[WEATHER]))

    def test_malformed_tools(self):
        """Each is named by its place."""
        for tool, param in (
            (5, "tools[1]"),
            ({"type": "function"}, "tools[1].function"),
            ({"function": {"name": 5}}, "tools[1].function"),
            ({"function": {"name": "f", "parameters": "x"}}, "tools[1].function.parameters"),
            ({"function": {"name": "f", "parameters": {"properties": [1]}}}, "tools[1].function.parameters"),
        ):
            with self.subTest(tool=tool):
                self.client_error(param, tools=[WEATHER, tool])
        self.assertEqual(self.unsupported("tools", tools=[{"type": "custom"}]).param, "tools[0].type")


class Messages(Requests):
    def test_roles_and_texts(self):
        """Content as a string, parts or null; developer is system; names are dropped."""
        self.assertEqual(
            self.messages(
                {"role": "developer", "content": "a"},
                {
                    "role": "user",
                    "name": "me",
                    "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}],
                },
                {"role": "assistant", "content": None},
                {"role": "assistant"},
                {"role": "user", "content": []},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "assistant", "content": None, "refusal": "never"},
            ),
            [
                {"role": "system", "content": "a"},
                {"role": "user", "content": "b\nc"},
                {"role": "assistant", "content": ""},
                {"role": "assistant", "content": ""},
                {"role": "user", "content": ""},
                {"role": "assistant", "content": "no"},
                {"role": "assistant", "content": "never"},
            ],
        )

    def test_past_reasoning_becomes_thinking(self):
        """Either name; forms that no model can read are left out."""
        said = {"role": "assistant", "content": "x"}
        self.assertEqual(
            self.messages(
                {**said, "reasoning_content": "r"},
                {**said, "reasoning": "s"},
                {**said, "reasoning": {"id": "rs_1"}},
                {"role": "user", "content": "x", "reasoning": "t"},
            ),
            [{**said, "thinking": "r"}, {**said, "thinking": "s"}, said, {"role": "user", "content": "x"}],
        )

    def test_a_tool_round_trip(self):
        """Arguments become objects, results get their tool's name by the call's id, ids are kept."""
        calls = [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}},
            {"id": "c2", "type": "function", "function": {"name": "clock", "arguments": ""}},
            {"function": {"name": "clock", "arguments": {"tz": 1}}},
            {"id": "c4", "function": {"name": "clock"}},
        ]
        self.assertEqual(
            self.messages(
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": "c2", "content": "noon"},
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
                {"role": "tool", "tool_call_id": "c9", "name": "other", "content": "x"},
                {"role": "tool", "tool_call_id": None, "content": "y"},
                {"role": "assistant", "content": "done", "tool_calls": None},
            ),
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"function": {"name": "weather", "arguments": {"city": "Paris"}}, "id": "c1"},
                        {"function": {"name": "clock", "arguments": {}}, "id": "c2"},
                        {"function": {"name": "clock", "arguments": {"tz": 1}}},
                        {"function": {"name": "clock", "arguments": {}}, "id": "c4"},
                    ],
                },
                {"role": "tool", "content": "noon", "tool_call_id": "c2", "tool_name": "clock"},
                {"role": "tool", "content": "rain", "tool_call_id": "c1", "tool_name": "weather"},
                {"role": "tool", "content": "x", "tool_call_id": "c9", "tool_name": "other"},
                {"role": "tool", "content": "y"},
                {"role": "assistant", "content": "done"},
            ],
        )

    def test_broken_arguments_do_not_end_a_conversation(self):
        """What a model once wrote wrong is wrapped, so that it can read it, and the client hears of it."""
        for arguments in ('{"city": "Par', "[1]", '{"a":' * 999, '{"a":NaN}', "\ud800", 5, [1]):
            with self.subTest(arguments=str(arguments)[:20].encode("ascii", "replace")):
                call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
                payload, warnings = self.chat(messages=[{"role": "assistant", "tool_calls": [call]}])
                sent = payload["messages"][0]["tool_calls"][0]["function"]["arguments"]
                self.assertEqual(sent, {"arguments": arguments})
                self.assertEqual(warnings, ["wrapped(tool_calls.arguments)"])

    def test_images(self):
        """data: URLs, as an object or bare, become base64 alone beside the text."""
        for url in (f"data:image/png;base64,{PNG}", f"DATA:image/png;charset=x;BASE64,{PNG}"):
            for image in (url, {"url": url, "detail": "low"}):
                parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": image}]
                self.assertEqual(
                    self.messages({"role": "user", "content": parts}),
                    [{"role": "user", "content": "what?", "images": [PNG]}],
                )

    def test_images_that_are_none(self):
        """Addresses are never fetched; broken ones are named by their place."""
        where = "messages[1].content[1].image_url"
        for url, words in (
            ("http://10.0.0.1/x.png", "send a data: URL"),
            ("HTTPS://example.com/x.png", "send a data: URL"),
            ("file:///etc/passwd", "send a data: URL"),
            (PNG, "must be a data: URL"),
            ("data:image/png," + PNG, "must be a data: URL"),
            ("data:image/png;base64,", "empty"),
            ("data:image/png;base64,abc", "broken base64"),
            ("data:image/png;base64,ab c=", "broken base64"),
            ("data:image/png;base64,é===", "broken base64"),
        ):
            with self.subTest(url=url):
                parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}]
                error = self.client_error(where, messages=[*HI, {"role": "user", "content": parts}])
                self.assertIn(words, error.message)

    def test_a_model_without_vision(self):
        """Skipped where it is known; unknown is for Ollama to judge."""
        parts = [{"type": "image_url", "image_url": f"data:image/png;base64,{PNG}"}]
        messages = [{"role": "user", "content": parts}]
        error = self.unsupported("vision", model(capabilities=frozenset({"completion"})), messages=messages)
        self.assertEqual(error.param, "messages[0].content")
        self.payload(model(capabilities=frozenset({"completion", "vision"})), messages=messages)

    def test_system_messages_are_merged_where_the_template_wants_it(self):
        """All in one, first; nothing else moves, and without any nothing is added."""
        messages = [
            {"role": "system", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "developer", "content": "c"},
            {"role": "user", "content": "d"},
        ]
        merged = self.messages(*messages, target=model(merge_system=True))
        self.assertEqual(
            merged,
            [
                {"role": "system", "content": "a\n\nc"},
                {"role": "user", "content": "b"},
                {"role": "user", "content": "d"},
            ],
        )
        self.assertEqual(len(self.messages(*messages)), 4)
        self.assertEqual(self.messages(*HI, target=model(merge_system=True)), HI)

    def test_malformed_messages(self):
        """Each is named by its place. An empty list would make Ollama load or unload the model."""
        for messages, param in (
            (None, "messages"),
            ([], "messages"),
            ("hi", "messages"),
            ([*HI, 5], "messages[1]"),
            ([{"content": "x"}], "messages[0].role"),
            ([{"role": "wizard"}], "messages[0].role"),
            ([{"role": []}], "messages[0].role"),
            ([{"role": "user", "content": 5}], "messages[0].content"),
            ([{"role": "user", "content": ["x"]}], "messages[0].content[0].type"),
            ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].image_url.url"),
            ([{"role": "user", "content": [{"type": "poem"}]}], "messages[0].content[0].type"),
            ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls"),
            ([{"role": "assistant", "tool_calls": [5]}], "messages[0].tool_calls[0].function"),
            ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls[0].function"),
            ([{"role": "tool", "tool_call_id": 5}], "messages[0].tool_call_id"),
        ):
            with self.subTest(messages=messages):
                self.client_error(param, messages=messages)

    def test_parts_and_roles_that_ollama_lacks(self):
        """Sound and files, and OpenAI's retired function calls."""
        for kind in ("input_audio", "file", "video_url"):
            self.unsupported(kind, messages=[{"role": "user", "content": [{"type": kind}]}])
        self.unsupported("functions", messages=[{"role": "function", "content": "x"}])
        self.unsupported("functions", messages=[{"role": "assistant", "function_call": {"name": "f"}}])


class Completions(unittest.TestCase):
    def unsupported(self, detail: str, target: Model | None = None, **body: Any) -> None:
        with self.assertRaises(BackendError) as caught:
            generate_request({"prompt": "x", **body}, target or model())
        self.assertEqual((caught.exception.reason, caught.exception.detail), ("unsupported", detail))

    def test_a_completion(self):
        """The prompt as text, the suffix, and the same policy and options as a chat."""
        body = {"model": "fast", "prompt": "def f(", "suffix": "return", "max_tokens": 9, "logprobs": 2, "echo": False}
        payload, warnings = generate_request(body, model(num_ctx=512, think=False, keep_alive=5.0))
        self.assertEqual(
            payload,
            {
                "model": "qwen:9b",
                "prompt": "def f(",
                "suffix": "return",
                "stream": True,
                "truncate": False,
                "shift": False,
                "keep_alive": 5,
                "think": False,
                "options": {"num_ctx": 512, "num_predict": 9},
                "logprobs": True,
                "top_logprobs": 2,
            },
        )
        self.assertEqual(warnings, [])

    def test_one_prompt_in_a_list(self):
        """It is as good as a bare one; so are the bounds of logprobs."""
        for most in (0, 20):
            self.assertEqual(generate_request({"prompt": "x", "logprobs": most}, model())[0]["top_logprobs"], most)
        self.assertEqual(generate_request({"prompt": ["x"]}, model())[0]["prompt"], "x")

    def test_what_ollama_has_no_form_for(self):
        """Tokens, several prompts, an empty prompt (it would unload the model), echo, a model without insert."""
        self.unsupported("tokens", prompt=[1, 2])
        self.unsupported("tokens", prompt=[[1, 2]])
        self.unsupported("prompts", prompt=["a", "b"])
        self.unsupported("empty_prompt", prompt="")
        self.unsupported("empty_prompt", prompt="", suffix="x")
        self.unsupported("echo", echo=True)
        self.unsupported("n", n=2)
        self.unsupported("insert", model(capabilities=frozenset({"completion"})), suffix="x")
        self.unsupported("completion", model(capabilities=frozenset({"embedding"})))

    def test_wrong_types(self):
        """A 400 that names the field; fields of a chat are no fields here."""
        for param, value in (("prompt", None), ("prompt", []), ("prompt", 5), ("suffix", 5), ("logprobs", True)):
            with self.subTest(param=param, value=value), self.assertRaises(ClientError) as caught:
                generate_request({"prompt": "x", param: value}, model())
            self.assertEqual(caught.exception.param, param)
        _, warnings = generate_request({"prompt": "x", "tools": [], "best_of": 3}, model())
        self.assertEqual(warnings, ["ignored(tools)", "ignored(best_of)"])

    def test_the_prompts_size(self):
        """Texts and past thinking count; images, tools and the template do not."""
        self.assertEqual(prompt_chars({"prompt": "abc", "suffix": "de"}), 5)
        messages = [{"content": "abc", "images": ["xxxx"]}, {"content": "", "thinking": "de"}]
        self.assertEqual(prompt_chars({"messages": messages}), 5)


class Embeddings(unittest.TestCase):
    def test_a_request(self):
        """The input always as a list, since "" alone gets no vector; nothing is cut in silence."""
        body = {"model": "e", "input": "a", "dimensions": 64, "encoding_format": "base64", "user": "me"}
        self.assertEqual(
            embed_request(body, model(num_ctx=512, keep_alive=60.0)),
            (
                {
                    "model": "qwen:9b",
                    "input": ["a"],
                    "truncate": False,
                    "keep_alive": 60,
                    "dimensions": 64,
                    "options": {"num_ctx": 512},
                },
                [],
            ),
        )
        self.assertEqual(embed_request({"input": ["a", ""]}, model())[0]["input"], ["a", ""])
        body = {"input": "a", "dimensions": 1, "encoding_format": "float"}
        self.assertEqual(embed_request(body, model())[0], embed(dimensions=1))

    def test_what_can_not_be_embedded(self):
        """Tokens are for another backend, the rest is the client's mistake."""
        for tokens in ([1, 2], [[1], [2]], ["a", 1]):
            with self.assertRaises(BackendError) as failed:
                embed_request({"input": tokens}, model())
            self.assertEqual(failed.exception.detail, "tokens")
        for body, param in (
            ({}, "input"),
            ({"input": []}, "input"),
            ({"input": 5}, "input"),
            ({"input": [None]}, "input"),
            ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
            ({"input": "a", "dimensions": 0}, "dimensions"),
        ):
            with self.subTest(body=body), self.assertRaises(ClientError) as caught:
                embed_request(body, model())
            self.assertEqual(caught.exception.param, param)
        with self.assertRaises(BackendError) as failed:
            embed_request({"input": "a"}, model(capabilities=frozenset({"completion"})))
        self.assertEqual(failed.exception.detail, "embedding")

    def test_floats(self):
        """OpenAI's list, in order, with the usage that Ollama counted."""
        answer = {"model": "x", "embeddings": [[0.5, -1], [0.25, 2]], "prompt_eval_count": 9}
        self.assertEqual(
            embed_response(answer, "embed", None, 2),
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": 0, "embedding": [0.5, -1]},
                    {"object": "embedding", "index": 1, "embedding": [0.25, 2]},
                ],
                "model": "embed",
                "usage": {"prompt_tokens": 9, "total_tokens": 9},
            },
        )

    def test_base64_is_float32_little_endian(self):
        """The form that the SDKs ask for when nothing is said; no usage where nothing was counted."""
        response = embed_response({"embeddings": [[0.5, -1, 3]]}, "embed", "base64")
        self.assertNotIn("usage", response)
        raw = base64.b64decode(response["data"][0]["embedding"])
        self.assertEqual(raw, struct.pack("<3f", 0.5, -1, 3))

    def test_answers_of_another_shape(self):
        """No vector is ever guessed, or stored under another's text."""
        for answer, count in (
            ({}, None),
            ({"embeddings": 5}, None),
            ({"embeddings": [5]}, None),
            ({"embeddings": [["x"]]}, None),
            ({"embeddings": [[10**400]]}, None),
            ({"embeddings": [[1.0]]}, 2),
            ({"embeddings": []}, 1),
        ):
            with self.subTest(answer=str(answer)[:40]), self.assertRaises(BackendError) as failed:
                embed_response(answer, "embed", "base64", count)
            self.assertEqual(failed.exception.reason, "bad_answer")


def call(endpoint: Endpoint = "chat", *, stream: bool = True, usage: bool = False) -> Call:
    return Call(endpoint, {}, b"", model(), stream, usage, "id-1", 1700000000)


def line(content: str = "", **more: Any) -> dict[str, Any]:
    """One of Ollama's chat lines; `thinking` and `tool_calls` go into its message."""
    message = {"role": "assistant", "content": content}
    message |= {key: more.pop(key) for key in ("thinking", "tool_calls") if key in more}
    return {"model": "qwen:9b", "created_at": "2026-01-01T00:00:00Z", "message": message, "done": False, **more}


def last(**more: Any) -> dict[str, Any]:
    counts = {
        "load_duration": 250_000_000,
        "prompt_eval_count": 26,
        "eval_count": 3,
        "eval_duration": 1_500_000_000,
    }
    return line(**{"done": True, "done_reason": "stop", **counts, **more})


def tool_call(name: str = "f", arguments: Any = None, **more: Any) -> dict[str, Any]:
    return {"function": {"index": 0, "name": name, "arguments": arguments or {}}, **more}


HEAD = b'{"id":"id-1","object":"chat.completion.chunk","created":1700000000,"model":"fast","choices":['
ROLE = b"data: " + HEAD + b'{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'


def delta(inside: bytes, finish: bytes = b"null") -> bytes:
    return b"data: " + HEAD + b'{"index":0,"delta":' + inside + b',"finish_reason":' + finish + b"}]}\n\n"


class Answers(unittest.TestCase):
    def stream(self, *lines: dict[str, Any], of: Call | None = None, **more: Any) -> tuple[ChatStream, list[Any]]:
        """(the stream, the chunks it gave as objects), with [DONE] as a string."""
        ids = (f"call_{i}" for i in itertools.count())
        stream = ChatStream(of or call(), more.pop("target", model()), new_id=lambda: next(ids), **more)
        events = SSEReader().feed(b"".join(stream.feed(one)[0] for one in lines))
        return stream, [json.loads(event) if event != b"[DONE]" else "[DONE]" for event in events]

    def whole(self, *lines: dict[str, Any], endpoint: Endpoint = "chat") -> Any:
        stream, chunks = self.stream(*lines, of=call(endpoint, stream=False))
        self.assertEqual(chunks, [])
        return stream.whole()

    def failure(self, *lines: dict[str, Any], of: Call | None = None) -> BackendError:
        with self.assertRaises(BackendError) as caught:
            self.stream(*lines, of=of)
        return caught.exception


class Stream(Answers):
    def test_a_stream_byte_for_byte(self):
        """Role with the first content, one chunk a token, the finish, [DONE]; no usage that was not asked for."""
        stream = ChatStream(call(), model())
        self.assertEqual(stream.feed(line("")), (b"", False))
        self.assertEqual(stream.feed(line("Hé")), (ROLE + delta('{"content":"Hé"}'.encode()), True))
        self.assertEqual(stream.feed(line(' "x"\n')), (delta(b'{"content":" \\"x\\"\\n"}'), True))
        self.assertFalse(stream.done)
        self.assertEqual(stream.feed(last()), (delta(b"{}", b'"stop"') + b"data: [DONE]\n\n", False))
        self.assertTrue(stream.done)

    def test_usage_when_asked_for(self):
        """Null on every chunk, then a chunk of its own without choices, before [DONE]."""
        _, chunks = self.stream(line("a"), last(), of=call(usage=True))
        self.assertEqual([chunk["usage"] for chunk in chunks[:3]], [None, None, None])
        base = {"id": "id-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "fast"}
        usage = {"prompt_tokens": 26, "completion_tokens": 3, "total_tokens": 29}
        self.assertEqual(chunks[3:], [{**base, "choices": [], "usage": usage}, "[DONE]"])

    def test_no_false_zeros(self):
        """A count that is missing is not zero, except that Ollama leaves out an eval_count of 0."""
        silent = {key: value for key, value in last().items() if not key.endswith("_count")}
        for end, said, usage in (
            (silent, "a", None),
            ({**silent, "eval_count": 3}, "a", None),
            ({**silent, "prompt_eval_count": 26}, "a", None),
            ({**silent, "eval_count": True, "prompt_eval_count": -1}, "a", None),
            ({**silent, "eval_count": 10**400, "prompt_eval_count": 10**400, "eval_duration": 10**400}, "a", None),
            (
                {**silent, "eval_count": 0, "prompt_eval_count": 1},
                "a",
                {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1},
            ),
            (
                {**silent, "prompt_eval_count": 26, "done_reason": "length"},
                "",
                {"prompt_tokens": 26, "completion_tokens": 0, "total_tokens": 26},
            ),
        ):
            with self.subTest(end=end):
                stream, chunks = self.stream(line(said), end, of=call(usage=True))
                self.assertEqual([chunk["usage"] for chunk in chunks[:-1] if chunk["usage"]], [usage] if usage else [])
                self.assertEqual(chunks[-1], "[DONE]")
                self.assertEqual(stream.whole().get("usage"), usage)

    def test_the_tally(self):
        """What telemetry wants, in seconds, tokens and characters."""
        stream, _ = self.stream(line(thinking="hmm"), line("ab"), line("c", tool_calls=[tool_call()]), last())
        tally = stream.tally
        self.assertEqual((tally.prompt_tokens, tally.completion_tokens, tally.finish_reason), (26, 3, "tool_calls"))
        self.assertEqual((tally.content_chars, tally.reasoning_chars, tally.tool_calls), (3, 3, 1))
        self.assertEqual((tally.load_s, tally.decode_s, tally.truncated), (0.25, 1.5, False))
        bare = {"message": {}, "done": True, "eval_count": 1}
        stream, _ = self.stream(line("a"), bare)
        self.assertEqual((stream.tally.load_s, stream.tally.decode_s, stream.tally.prompt_tokens), (None, None, None))
        self.assertEqual(stream.tally.finish_reason, "stop")

    def test_reasoning_by_both_names(self):
        """It comes before the text, is content for the first token, and is never inside `content`."""
        _, chunks = self.stream(line(thinking="hm"), line("a", thinking="m"), last())
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
        self.assertEqual(
            deltas,
            [
                {"role": "assistant", "content": ""},
                {"reasoning_content": "hm", "reasoning": "hm"},
                {"reasoning_content": "m", "reasoning": "m"},
                {"content": "a"},
                {},
            ],
        )
        chunk = delta(b'{"reasoning_content":"hm","reasoning":"hm"}')
        self.assertEqual(ChatStream(call(), model()).feed(line(thinking="hm")), (ROLE + chunk, True))

    def test_thinking_that_was_left_in_the_text(self):
        """A tag that opens the answer is taken off, whatever pieces it comes in; its logprobs go with it."""
        text = "<think>a < b</think>\n\nYes <think>"
        for cut in range(len(text) + 1):
            with self.subTest(cut=cut):
                answer = self.whole(line(text[:cut]), line(text[cut:]), last())["choices"][0]["message"]
                self.assertEqual((answer["reasoning_content"], answer["content"]), ("a < b", "Yes <think>"))
        self.assertEqual(self.whole(line("<thi"), last())["choices"][0]["message"]["content"], "<thi")
        self.assertEqual(
            self.whole(line("<thi"), line(thinking="x"), last())["choices"][0]["message"]["content"], "<thi"
        )
        self.assertEqual(ChatStream(call(), model()).feed(line("<thi")), (b"", False))
        tokens = ("<", "think>", "a", "</think>", "b")
        lines = [line(token, logprobs=[{"token": token, "logprob": -1}]) for token in tokens]
        logprobs = self.whole(*lines, last())["choices"][0]["logprobs"]["content"]
        self.assertEqual([one["token"] for one in logprobs], ["b"])

    def test_tags_after_thinking_of_its_own_are_text(self):
        """A server that splits thinking off is believed about the rest."""
        answer = self.whole(line(thinking="x"), line("<think>y"), last())["choices"][0]["message"]
        self.assertEqual((answer["reasoning"], answer["content"]), ("x", "<think>y"))

    def test_tool_calls(self):
        """Running indexes over all lines, ids kept if they are new, arguments as text, no content chunk."""
        stream, chunks = self.stream(
            line(tool_calls=[tool_call("f", {"é": [1, None]}, id="x"), tool_call("g", id="x")]),
            line(tool_calls=[tool_call("h"), tool_call("i", '{"a":1}', id=5)]),
            last(),
        )
        calls = [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks[1:5]]
        self.assertEqual([one["index"] for one in calls], [0, 1, 2, 3])
        self.assertEqual({chunk["choices"][0]["index"] for chunk in chunks[:-1]}, {0})
        self.assertEqual([one["id"] for one in calls], ["x", "call_0", "call_1", "call_2"])
        self.assertEqual({one["type"] for one in calls}, {"function"})
        self.assertEqual(
            [one["function"] for one in calls],
            [
                {"name": "f", "arguments": '{"é":[1,null]}'},
                {"name": "g", "arguments": "{}"},
                {"name": "h", "arguments": "{}"},
                {"name": "i", "arguments": '{"a":1}'},
            ],
        )
        self.assertEqual(chunks[5]["choices"], [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}])
        self.assertEqual(stream.tally.tool_calls, 4)

    def test_tool_calls_on_the_last_line(self):
        """Where models with a Jinja template have them."""
        stream = ChatStream(call(), model())
        frames, content = stream.feed(last(tool_calls=[tool_call("f", id="x")]))
        self.assertTrue(content)
        called = b'{"index":0,"id":"x","type":"function","function":{"name":"f","arguments":"{}"}}'
        end = delta(b"{}", b'"tool_calls"') + b"data: [DONE]\n\n"
        self.assertEqual(frames, ROLE + delta(b'{"tool_calls":[' + called + b"]}") + end)

    def test_length_passes_through(self):
        """An answer that was cut says so, with a tool call or without any word."""
        for lines in ([line("a")], [line(tool_calls=[tool_call()])], []):
            stream, chunks = self.stream(*lines, last(done_reason="length"))
            self.assertEqual(chunks[-2]["choices"][0]["finish_reason"], "length")
            self.assertEqual(chunks[0]["choices"][0]["delta"], {"role": "assistant", "content": ""})
            self.assertTrue(stream.done)

    def test_generated_ids_differ(self):
        """An id is never given twice."""
        self.assertRegex(new_call_id(), r"\Acall_[0-9a-f]{24}\Z")
        self.assertEqual(len({new_call_id() for _ in range(100)}), 100)

    def test_lone_surrogates_survive(self):
        """Half a character, which Ollama may send as an escape, does not end the stream."""
        stream = ChatStream(call(), model())
        frames, _ = stream.feed(line("é\ud83d"))
        self.assertIn(b'"content":"\\u00e9\\ud83d"', frames)
        _, chunks = self.stream(line("a"), line(thinking="\ud800"), line(tool_calls=[tool_call("f", "\ud800")]))
        self.assertEqual(chunks[2]["choices"][0]["delta"]["reasoning"], "\ud800")

    def test_logprobs(self):
        """OpenAI's shape on the chunk of their text; those of tokens without text wait for it."""
        entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -1.5}]}
        shaped = {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [{"token": "b", "logprob": -1.5, "bytes": None}],
        }
        lines = [
            line(thinking="hm", logprobs=[entry]),
            line("", logprobs=[entry]),
            line("a", logprobs=[entry, 5, {"token": 1}]),
            line("b"),
            last(logprobs=[entry]),
        ]
        _, chunks = self.stream(*lines)
        logprobs = [chunk["choices"][0].get("logprobs") for chunk in chunks[:-1]]
        both = {"content": [shaped, shaped], "refusal": None}
        self.assertEqual(logprobs, [None, None, both, None, {"content": [shaped], "refusal": None}])
        choice = self.whole(*lines)["choices"][0]
        self.assertEqual(choice["logprobs"], {"content": [shaped] * 3, "refusal": None})

    def test_truncation_that_can_not_be_honest(self):
        """Fewer tokens than the prompt must have, where it may have been too long for the window."""
        for chars, window, counted, truncated in (
            (8001, 1000, 1000, True),
            (8000, 1000, 1000, False),
            (4001, 1000, 500, True),
            (4000, 1000, 500, False),
            (2001, 1000, 10, True),
            (2000, 1000, 10, False),
            (99999, None, 500, False),
            (99999, 1000, None, False),
            (0, 1000, 500, False),
        ):
            with self.subTest(chars=chars, window=window, counted=counted):
                end = last(prompt_eval_count=counted)
                stream, _ = self.stream(line("a"), end, prompt_chars=chars, target=model(num_ctx=window))
                self.assertEqual(stream.tally.truncated, truncated)

    def test_errors_inside_a_200(self):
        """A line that is an error is one, also with words of its own or none."""
        self.assertEqual(self.failure(line("a"), {"error": "unexpected EOF"}).reason, "server_error")
        self.assertEqual(self.failure({"error": "prompt is too long"}).reason, "context_length_exceeded")
        self.assertEqual(self.failure({"error": ""}).reason, "server_error")
        self.stream({**line("a"), "error": None})

    def test_lines_of_another_shape(self):
        """They fail the answer and never reach the client."""
        for bad in (
            {"message": 5},
            {"message": {"content": 5}},
            {"message": {"thinking": ["x"]}},
            line(tool_calls={"x": 1}),
            line(tool_calls=[5]),
            line(tool_calls=[{"function": {}}]),
            last(done_reason="load"),
            last(done_reason="unload"),
        ):
            with self.subTest(bad=bad):
                self.assertEqual(self.failure(bad).reason, "bad_answer")

    def test_an_empty_answer_is_a_failure(self):
        """A chat that stops without a word; for a completion that may be right."""
        self.assertEqual(self.failure(line(""), last()).reason, "empty_answer")
        self.assertEqual(self.failure(last(), of=call(stream=False)).reason, "empty_answer")
        self.stream({"response": "", "done": True, "done_reason": "stop"}, of=call("completions"))


class Whole(Answers):
    def test_nothing_is_sent_on_the_way(self):
        """A client that does not stream gets no event."""
        stream = ChatStream(call(stream=False), model())
        lines = [line(thinking="h"), line("a"), line(tool_calls=[tool_call()])]
        self.assertEqual([stream.feed(one) for one in lines], [(b"", True)] * 3)
        self.assertEqual(stream.feed(last()), (b"", False))

    def test_a_chat_completion(self):
        """One document of all the pieces."""
        self.assertEqual(
            self.whole(line(thinking="h"), line("a", thinking="m"), line("b"), last()),
            {
                "id": "id-1",
                "object": "chat.completion",
                "created": 1700000000,
                "model": "fast",
                "choices": [
                    {
                        "index": 0,
                        "message": {
                            "role": "assistant",
                            "content": "ab",
                            "reasoning_content": "hm",
                            "reasoning": "hm",
                        },
                        "logprobs": None,
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 26, "completion_tokens": 3, "total_tokens": 29},
            },
        )

    def test_tool_calls(self):
        """Content is null only where there is nothing but calls; they carry no index."""
        expected = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}]
        calls = [tool_call("f", {"a": 1}, id="x")]
        choice = self.whole(line(tool_calls=calls), last())["choices"][0]
        self.assertEqual(choice["message"], {"role": "assistant", "content": None, "tool_calls": expected})
        self.assertEqual(choice["finish_reason"], "tool_calls")
        self.assertEqual(self.whole(line("a", tool_calls=calls), last())["choices"][0]["message"]["content"], "a")

    def test_no_text_is_an_empty_one(self):
        """An answer that was all thinking has content "", which clients can read."""
        choice = self.whole(line(thinking="hm"), last(done_reason="length"))["choices"][0]
        self.assertEqual((choice["message"]["content"], choice["finish_reason"]), ("", "length"))

    def test_a_text_completion(self):
        """The legacy shape; thinking stays beside the text."""
        lines = ({"response": "", "thinking": "h"}, {"response": "a"}, {"response": "b", "done": True, "eval_count": 2})
        answer = self.whole(*lines, endpoint="completions")
        self.assertEqual(answer["object"], "text_completion")
        self.assertEqual(
            answer["choices"],
            [
                {
                    "index": 0,
                    "text": "ab",
                    "reasoning_content": "h",
                    "reasoning": "h",
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
        )
        self.assertNotIn("usage", answer)


class LegacyStream(Answers):
    def test_a_stream_byte_for_byte(self):
        """text_completion chunks: no role, no delta."""
        head = b'data: {"id":"id-1","object":"text_completion","created":1700000000,"model":"fast","choices":['
        stream = ChatStream(call("completions"), model())
        chunk = head + b'{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}\n\n'
        self.assertEqual(stream.feed({"response": "a", "done": False}), (chunk, True))
        end = head + b'{"index":0,"text":"","logprobs":null,"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
        self.assertEqual(stream.feed({"response": "", "done": True, "done_reason": "length"}), (end, False))

    def test_reasoning(self):
        """Beside an empty text, by both names."""
        _, chunks = self.stream({"response": "", "thinking": "hm"}, of=call("completions"))
        self.assertEqual(
            chunks[0]["choices"],
            [
                {
                    "index": 0,
                    "text": "",
                    "reasoning_content": "hm",
                    "reasoning": "hm",
                    "logprobs": None,
                    "finish_reason": None,
                }
            ],
        )

    def test_logprobs(self):
        """Parallel lists, offsets running on over the chunks."""
        first = {"token": "ab", "logprob": -1, "top_logprobs": [{"token": "ab", "logprob": -1}]}
        lines = (
            {"response": "ab", "logprobs": [first]},
            {"response": "c", "logprobs": [{"token": "c", "logprob": -2}]},
        )
        _, chunks = self.stream(*lines, of=call("completions"))
        self.assertEqual(
            [chunk["choices"][0]["logprobs"] for chunk in chunks],
            [
                {"tokens": ["ab"], "token_logprobs": [-1], "top_logprobs": [{"ab": -1}], "text_offset": [0]},
                {"tokens": ["c"], "token_logprobs": [-2], "top_logprobs": [{}], "text_offset": [2]},
            ],
        )
        whole = self.whole(*lines, {"done": True}, endpoint="completions")
        self.assertEqual(whole["choices"][0]["logprobs"]["text_offset"], [0, 2])


if __name__ == "__main__":
    unittest.main()
