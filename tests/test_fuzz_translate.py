"""Translation against generated requests and answers: what goes in comes out, over the wire and at the functions."""

from __future__ import annotations

import base64
import json
import re
import unittest
from typing import Any, ClassVar, NamedTuple

from portway.call import Call
from portway.config import Backend, Model
from portway.errors import BackendError, ClientError
from portway.wire.events import SSEReader, dumps
from portway.wire.translate import ChatStream, chat_request, embed_request, embed_response, generate_request
from tests.daemon import Daemon
from tests.doubles import RawClient, ScriptedRequest, json_reply, ndjson_reply, sse_reply
from tests.targets import CHAT, KINDS, Target, delta, frames, last_line, line, usage

try:
    from hypothesis import assume, given
    from hypothesis import strategies as st
except ImportError as exc:
    raise unittest.SkipTest(f"{exc.name} is not installed") from exc

from tests.hypotheses import effort

# --- what is asked ---------------------------------------------------------------------------------

words = st.text(max_size=20)
names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)
pictures = st.binary(min_size=1, max_size=12).map(lambda data: base64.b64encode(data).decode())
text_parts = st.fixed_dictionaries({"type": st.just("text"), "text": words})
image_parts = pictures.map(lambda data: {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
contents = st.one_of(words, st.lists(st.one_of(text_parts, image_parts), max_size=3))
scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(-1e300, 1e300), words)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=8
)
arguments = st.dictionaries(names, values, max_size=3)
said = st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user"]), "content": contents})
answered = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": words}, optional={"reasoning_content": words}
)
talks = st.lists(st.one_of(said, answered), min_size=1, max_size=4)
properties = st.dictionaries(names, st.just({"type": "string"}), max_size=2)
parameters = st.fixed_dictionaries({"type": st.just("object"), "properties": properties})
functions = st.fixed_dictionaries({"name": names, "description": words, "parameters": parameters})
tools = st.lists(functions.map(lambda function: {"type": "function", "function": function}), min_size=1, max_size=3)
options = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "seed": st.integers(0, 2**31),
        "max_tokens": st.integers(1, 9999),
        "stop": st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3),
        "tools": tools,
        "user": words,
        "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    },
)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A valid chat completion's body, without its model."""
    messages: list[dict[str, Any]] = list(draw(talks))
    for number, given_arguments in enumerate(draw(st.lists(arguments, max_size=2))):
        function = {"name": draw(names), "arguments": json.dumps(given_arguments)}
        call = {"id": f"c{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": draw(words)})
    return {"messages": messages, **draw(options)}


def plainly(message: dict[str, Any]) -> dict[str, Any]:
    """What an OpenAI message says, whichever way it says it."""
    content = message.get("content")
    parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return {
        "role": {"developer": "system"}.get(message["role"], message["role"]),
        "text": "\n".join(part["text"] for part in parts if part["type"] == "text"),
        "images": [part["image_url"]["url"].partition(",")[2] for part in parts if part["type"] == "image_url"],
        "thinking": message.get("reasoning_content") or None,
        "calls": [(call["name"], json.loads(call["arguments"])) for call in calls],
        "result_of": message.get("tool_call_id"),
    }


def plainly_ollama(message: dict[str, Any]) -> dict[str, Any]:
    """What an Ollama message says."""
    return {
        "role": message["role"],
        "text": message["content"],
        "images": message.get("images", []),
        "thinking": message.get("thinking"),
        "calls": [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())],
        "result_of": message.get("tool_call_id"),
    }


# --- what is answered ------------------------------------------------------------------------------


class Said(NamedTuple):
    """An answer, whichever way it is told. usage: tokens of the prompt and of the answer."""

    thinking: str
    text: str
    calls: list[tuple[str, Any]]
    reason: str
    usage: tuple[int, int]


class Told(NamedTuple):
    """The same in the pieces in which a server tells it. sizes: those of the chunks it is cut into."""

    thinking: list[str]
    text: list[str]
    calls: list[tuple[str, Any]]
    reason: str
    usage: tuple[int, int]
    sizes: list[int]


HI = Told([], ["hi"], [], "stop", (1, 1), [9])
pieces = st.lists(st.text(min_size=1, max_size=12), max_size=4)
calls = st.lists(st.tuples(names, arguments), max_size=2)
sizes = st.lists(st.integers(1, 60), min_size=1, max_size=5)
counts = st.tuples(st.integers(1, 10**6), st.integers(1, 10**6))


def opens_a_tag(text: str) -> bool:
    """Whether it may be taken for thinking that was left in the text."""
    return text.lstrip().startswith("<") or "<think>".startswith(text.lstrip())


def in_openai(told: Told, *, stream: bool) -> bytes:
    """An OpenAI server's answer."""
    functions = [{"name": name, "arguments": json.dumps(given)} for name, given in told.calls]
    made = [{"index": i, "id": f"call_{i}", "type": "function", "function": each} for i, each in enumerate(functions)]
    if stream:
        chunks = [delta(role="assistant", content=None)]
        chunks += [delta(reasoning_content=piece) for piece in told.thinking]
        chunks += [delta(content=piece) for piece in told.text]
        chunks += [delta(tool_calls=[call]) for call in made]
        return sse_reply([*chunks, delta(told.reason), usage(*told.usage)], chunk_sizes=told.sizes)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(told.text) or None}
    if told.thinking:
        message["reasoning_content"] = "".join(told.thinking)
    if made:
        message["tool_calls"] = made
    choice = {"index": 0, "message": message, "finish_reason": told.reason}
    document = {"id": "x", "object": "chat.completion", "created": 1, "model": "up", "choices": [choice]}
    return json_reply({**document, "usage": usage(*told.usage)["usage"]})


def in_ollama(told: Told) -> bytes:
    """Ollama's answer, which is streamed in any case."""
    lines = [line(thinking=piece) for piece in told.thinking] + [line(piece) for piece in told.text]
    for number, (name, given) in enumerate(told.calls):
        lines.append(line(tool_calls=[{"id": f"call_{number}", "function": {"name": name, "arguments": given}}]))
    prompt, completion = told.usage
    reason = "length" if told.reason == "length" else "stop"
    return ndjson_reply(
        [*lines, last_line(reason, prompt_eval_count=prompt, eval_count=completion)], chunk_sizes=told.sizes
    )


def heard(body: bytes, stream: bool) -> Said:
    """What a client understands."""
    if not stream:
        answer = json.loads(body)
        message, reason = answer["choices"][0]["message"], answer["choices"][0]["finish_reason"]
        told = [call["function"] for call in message.get("tool_calls") or ()]
        counted = answer["usage"]
        thinking, text = message.get("reasoning_content") or "", message.get("content") or ""
    else:
        *events, done = frames(body)
        assert done == "[DONE]", done
        assert len({event["id"] for event in events}) == 1, events
        deltas = [choice for event in events for choice in event["choices"]]
        thinking = "".join(choice["delta"].get("reasoning_content") or "" for choice in deltas)
        text = "".join(choice["delta"].get("content") or "" for choice in deltas)
        told = [call["function"] for choice in deltas for call in choice["delta"].get("tool_calls") or ()]
        (reason,) = [choice["finish_reason"] for choice in deltas if choice.get("finish_reason")]
        counted = events[-1]["usage"]
    made = [(call["name"], json.loads(call["arguments"])) for call in told]
    return Said(thinking, text, made, reason, (counted["prompt_tokens"], counted["completion_tokens"]))


SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop")


class OverTheWire(unittest.TestCase):
    """A client, the daemon, and a backend of each kind."""

    targets: ClassVar[dict[str, Target]]
    daemon: ClassVar[Daemon]
    reply: ClassVar[bytes] = b""

    @classmethod
    def setUpClass(cls) -> None:
        def play(request: ScriptedRequest) -> bytes:
            return json_reply({}, 404) if request.method == "GET" or request.path == "/api/show" else cls.reply

        toml = ""
        cls.targets = {}
        for kind in KINDS:
            target = cls.enterClassContext(Target())
            target._then = play
            cls.targets[kind] = target
            toml += f'[backends.{kind}]\nkind = "{kind}"\nurl = "{target.url}"\n'
            toml += f'[models.m-{kind}]\nbackend = "{kind}"\nmodel = "physical"\n'
        cls.daemon = cls.enterClassContext(Daemon(toml))

    def setUp(self) -> None:
        self.client: RawClient = self.enterContext(self.daemon.client())

    def post(self, kind: str, raw: bytes) -> tuple[bytes, Any]:
        """(the answer's body, what the backend was sent)."""
        before = len(self.targets[kind].asked)
        response = self.client.call("POST", CHAT, raw)
        self.assertEqual(200, response.status, response.body)
        self.assertEqual(f"m-{kind}", response.header("x-served-by"))
        (sent,) = self.targets[kind].asked[before:]
        return response.body, sent.json

    @given(requests(), st.booleans(), st.sampled_from([None, 1]))
    @effort(150)
    def test_a_request_comes_through_to_openai(self, body, ascii_only, indent):
        """Every member as it was, but for the model's name and the usage that is always wanted."""
        type(self).reply = in_openai(HI, stream=False)
        raw = json.dumps({"model": "m-openai", **body}, ensure_ascii=ascii_only, indent=indent)
        assume(not re.search("[\ud800-\udfff]", raw))
        _, sent = self.post("openai", raw.encode())
        self.assertEqual({**body, "model": "physical"}, sent)

    @given(requests())
    @effort(150)
    def test_a_request_comes_through_to_ollama(self, body):
        """Every message says what it said, every option is the number it was, every tool can still be called."""
        type(self).reply = in_ollama(HI)
        _, sent = self.post("ollama", json.dumps({"model": "m-ollama", **body}).encode())
        messages = json.loads(json.dumps(body["messages"]))  # as any reader has them
        self.assertEqual(list(map(plainly, messages)), list(map(plainly_ollama, sent["messages"])))
        wanted = {name: value for name, value in body.items() if name in SAMPLING}
        wanted |= {"num_predict": body["max_tokens"]} if "max_tokens" in body else {}
        self.assertEqual(wanted, sent.get("options", {}))
        self.assertEqual(body.get("tools", []), sent.get("tools", []))
        is_json = body.get("response_format") == {"type": "json_object"}
        self.assertEqual({"type": "object"} if is_json else None, sent.get("format"))
        self.assertEqual(("physical", True, False), (sent["model"], sent["stream"], sent["truncate"]))

    @given(pieces, pieces, calls, st.booleans(), counts, sizes, st.sampled_from(KINDS))
    @effort(300)
    def test_an_answer_comes_through(self, thinking, text, made, cut_off, counted, cut, kind):
        """Plain and streamed, whatever it was cut into: thinking, text, calls, the reason of its end, its cost."""
        assume((thinking or text or made) and not (text and opens_a_tag("".join(text))))
        reason = "length" if cut_off else "tool_calls" if made else "stop"
        told = Told(thinking, text, made, reason, counted, cut)
        expected = Said("".join(thinking), "".join(text), made, reason, counted)
        for stream in (False, True):
            type(self).reply = in_ollama(told) if kind == "ollama" else in_openai(told, stream=stream)
            asked: dict[str, Any] = {
                "model": f"m-{kind}",
                "stream": stream,
                "messages": [{"role": "user", "content": "x"}],
            }
            asked["stream_options"] = {"include_usage": True} if stream else None
            body, _ = self.post(kind, json.dumps(asked).encode())
            self.assertEqual(expected, heard(body, stream), (kind, stream))


# --- at the functions: anything at all --------------------------------------------------------------

BACKEND = Backend("ollama", "ollama", "http://127.0.0.1:11434", "http", "127.0.0.1", 11434)
TARGET = Model(name="fast", backend=BACKEND, model="qwen:9b", num_ctx=4096)
FIELDS = (
    "messages prompt suffix input tools tool_choice response_format stop stream n seed top_k temperature max_tokens "
    "max_completion_tokens reasoning reasoning_effort think logprobs top_logprobs logit_bias echo dimensions "
    "encoding_format functions function_call modalities num_ctx keep_alive user"
).split()
KEYS = "role content type text image_url url tool_calls function name arguments id tool_call_id effort schema".split()
LINE = "message response thinking done done_reason error logprobs eval_count prompt_eval_count eval_duration".split()
typical = st.sampled_from(
    ["user", "assistant", "tool", "function", "text", "image_url", "json_schema", "data:;base64,AA=="]
)
keys = st.one_of(st.sampled_from(KEYS), words)
anything = st.recursive(
    st.one_of(scalars, typical),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
bodies = st.dictionaries(st.one_of(st.sampled_from(FIELDS), words), anything, max_size=6)
inside = st.dictionaries(st.sampled_from(["content", "thinking", "tool_calls", "role"]), anything, max_size=3)
lines = st.dictionaries(st.sampled_from(LINE), st.one_of(anything, inside), max_size=5)
WARNING = re.compile(r"[a-z_]+\([A-Za-z0-9_.+-]+\)")


class Anything(unittest.TestCase):
    @given(bodies)
    @effort(400)
    def test_any_body(self, body):
        """A payload that is JSON, with warnings fit for a header; or one clear error that says whose fault it is."""
        for translate in (chat_request, generate_request, embed_request):
            before = json.dumps(body)
            try:
                payload, warnings = translate(body, TARGET)
            except ClientError as exc:
                self.assertEqual(400, exc.status)
                self.assertTrue(exc.message)
            except BackendError as exc:
                self.assertEqual("unsupported", exc.reason)
            else:
                self.assertEqual("qwen:9b", json.loads(dumps(payload))["model"])
                self.assertTrue(all(map(WARNING.fullmatch, warnings)), warnings)
            self.assertEqual(before, json.dumps(body))

    @given(st.lists(lines, max_size=5), st.booleans(), st.sampled_from(["chat", "completions"]))
    @effort(400)
    def test_any_line(self, told, stream, endpoint):
        """Events in order, under the model's own name; or a BackendError."""
        call = Call(endpoint, {}, b"", TARGET, stream, True, "id-1", 1)
        answer = ChatStream(call, TARGET)
        sent = b""
        try:
            for each in told:
                events, _ = answer.feed(each)
                sent += events
            if not stream:
                self.assertEqual("fast", json.loads(dumps(answer.whole()))["model"])
        except BackendError as exc:
            self.assertTrue(exc.message)
        reader = SSEReader()
        for event in reader.feed(sent):
            self.assertTrue(event == b"[DONE]" or json.loads(event)["model"] == "fast")
        self.assertIsNone(reader.finish())

    @given(anything, st.sampled_from([None, "float", "base64"]), st.integers(0, 3))
    @effort(300)
    def test_any_vectors(self, embeddings, encoding, count):
        """As many as were asked for, or a BackendError."""
        try:
            found = embed_response({"embeddings": embeddings}, "fast", encoding, count)
        except BackendError as exc:
            self.assertEqual("bad_answer", exc.reason)
        else:
            self.assertEqual(count, len(found["data"]))


if __name__ == "__main__":
    unittest.main()
