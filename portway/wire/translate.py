"""OpenAI's API <-> Ollama's native one, both ways, without any I/O.

Requests: `chat_request`, `generate_request` and `embed_request` turn an OpenAI body into the payload
of /api/chat, /api/generate and /api/embed, and say in warnings what they could not carry over. Answers:
`ChatStream` turns Ollama's lines into OpenAI's chunks or one document; `embed_response` does the vectors.
The native API and not Ollama's own /v1, because /v1 drops keep_alive, num_ctx and think in silence.
Protocol facts are from Ollama's api/types.go, server/routes.go and llm/llama_server.go (0.33) and from
OpenAI's API reference. How a request is sent, and what follows from an error, is known elsewhere.
"""

from __future__ import annotations

import base64
import re
import secrets
import sys
from array import array
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import TYPE_CHECKING, Any

from portway.backends import failures
from portway.call import MOST, Tally, Usage
from portway.errors import BackendError, ClientError
from portway.wire import events as wire
from portway.wire.asked import Payload, boolean, integer, number, require, string, unsupported, wrong
from portway.wire.messages import messages_for_ollama
from portway.wire.think_tags import ThinkTags

if TYPE_CHECKING:
    from portway.call import Call
    from portway.config import Model

# --- What is carried over, and what is only named in a warning ------------------------------------

# Fields that are one number in Ollama's options, by the same name.
_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repeat_penalty")
_INTEGERS = ("seed", "top_k", "repeat_last_n")
# Options of the runner: a change reloads the model, so they are the configuration's alone (models.NAME.params).
_RUNNER = ("num_gpu", "num_batch", "main_gpu", "use_mmap", "num_thread", "num_keep", "draft_num_predict")

_COMMON_FIELDS = frozenset(
    "model stream max_tokens max_completion_tokens stop n reasoning_effort reasoning think logprobs".split()
).union(_NUMBERS, _INTEGERS)
_CHAT_FIELDS = _COMMON_FIELDS | {"messages", "tools", "tool_choice", "response_format", "top_logprobs"}
_COMPLETION_FIELDS = _COMMON_FIELDS | {"prompt", "suffix", "echo"}
_EMBED_FIELDS = frozenset(("model", "input", "dimensions", "encoding_format"))

# Fields that shape no answer: nothing is lost without them.
_SHAPELESS = frozenset(
    "user metadata stream_options safety_identifier prompt_cache_key prompt_cache_retention service_tier store".split()
)
# Fields that Ollama has no form for, by the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "verbosity": ("medium",),
}
_MAX_WARNINGS = 16  # they travel in a header
_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]")

# reasoning_effort -> think: whether, and at which of Ollama's levels.
_EFFORTS: Mapping[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}


# --- Requests -------------------------------------------------------------------------------------


def chat_request(body: Payload, target: Model, stream_upstream: bool = True) -> tuple[Payload, list[str]]:
    """(the payload of POST /api/chat, warnings) for the body of a chat completion.

    Raises ClientError for what no backend could serve, BackendError("unsupported") for what this
    target can't. Upstream is streamed even when the client is not, so that its leaving is noticed.
    """
    require(target, "completion", "chat", None)
    asked = _with_params(body, target)
    warnings = _ignored(asked, body, _CHAT_FIELDS)
    _one_answer(asked)
    if asked.get("functions") or asked.get("function_call"):
        raise unsupported("functions", "'functions' was retired by OpenAI; send 'tools' instead.", "functions")
    payload = _payload(target, asked, warnings, stream_upstream)
    payload["messages"] = messages_for_ollama(asked, target, warnings)
    if tools := _tools(asked, target, warnings):
        payload["tools"] = tools
    if (form := _format(asked)) is not None:
        payload["format"] = form
    if boolean(asked, "logprobs"):
        payload["logprobs"] = True
        if (top := integer(asked, "top_logprobs", 0, 20)) is not None:
            payload["top_logprobs"] = top
    return payload, _listed(warnings)


def generate_request(body: Payload, target: Model, stream_upstream: bool = True) -> tuple[Payload, list[str]]:
    """(the payload of POST /api/generate, warnings) for the body of a legacy completion.

    The model's template is applied, as in Ollama's own /v1/completions: `raw` would also switch off
    the fill-in-the-middle form that `suffix` needs. Raises as chat_request does.
    """
    require(target, "completion", "completion", None)
    asked = _with_params(body, target)
    warnings = _ignored(asked, body, _COMPLETION_FIELDS)
    _one_answer(asked)
    if boolean(asked, "echo"):
        raise unsupported("echo", "Ollama does not repeat the prompt (echo).", "echo")
    prompt = _prompt(asked)
    payload = _payload(target, asked, warnings, stream_upstream)
    payload["prompt"] = prompt
    if suffix := string(asked, "suffix"):
        require(target, "insert", "insert", "suffix")
        payload["suffix"] = suffix
    if (top := integer(asked, "logprobs", 0, 20)) is not None:
        payload["logprobs"] = True
        payload["top_logprobs"] = top
    return payload, _listed(warnings)


def embed_request(body: Payload, target: Model) -> tuple[Payload, list[str]]:
    """(the payload of POST /api/embed, warnings) for the body of an embeddings request.

    encoding_format is checked here and applied on the way back. Raises as chat_request does.
    """
    require(target, "embedding", "embedding", None)
    asked = _with_params(body, target)
    warnings = _ignored(asked, body, _EMBED_FIELDS)
    if asked.get("encoding_format") not in (None, "float", "base64"):
        raise ClientError("encoding_format must be 'float' or 'base64'.", param="encoding_format")
    payload = {"model": target.model, "input": _input(asked), "truncate": False, **_residency(target)}
    if (dimensions := integer(asked, "dimensions", 1)) is not None:
        payload["dimensions"] = dimensions
    if options := _runner_options(target):
        payload["options"] = options
    return payload, _listed(warnings)


def prompt_chars(payload: Payload) -> int:
    """Characters of prompt text in a payload made here: what the server must read at least.

    Tool definitions, images and the template's own words are left out, so the truth is larger.
    """
    texts = [payload.get("prompt"), payload.get("suffix")]
    texts += [message.get(key) for message in payload.get("messages", ()) for key in ("content", "thinking")]
    return sum(len(text) for text in texts if isinstance(text, str))


# --- Requests: policy and options -----------------------------------------------------------------


def _with_params(body: Payload, target: Model) -> Payload:
    """The body with the model's params where the client is silent; OpenAI's null means absent."""
    return {**target.params, **{name: value for name, value in body.items() if value is not None}}


def _payload(target: Model, asked: Payload, warnings: list[str], stream: bool) -> Payload:
    """What /api/chat and /api/generate have in common.

    truncate and shift are off: an overlong prompt must be an error, and an answer that fills the
    window must end with "length"; both default to dropping old text in silence. shift is an option of
    the runner (another value reloads the model), so it must be the same on every call.
    """
    payload: Payload = {"model": target.model, "stream": stream, "truncate": False, "shift": False}
    payload |= _residency(target)
    if (think := _think(asked, target, warnings)) is not None:
        payload["think"] = think
    if options := _runner_options(target) | _sampling_options(asked, target, warnings):
        payload["options"] = options
    return payload


def _residency(target: Model) -> Payload:
    """keep_alive as a number of seconds, on every call: one without it leaves an earlier caller's value."""
    if target.keep_alive is None:
        return {}
    seconds = target.keep_alive
    return {"keep_alive": int(seconds) if seconds == int(seconds) else seconds}


def _runner_options(target: Model) -> Payload:
    options = {name: target.params[name] for name in _RUNNER if name in target.params}
    if target.num_ctx is not None:
        options["num_ctx"] = target.num_ctx
    return options


def _sampling_options(asked: Payload, target: Model, warnings: list[str]) -> Payload:
    options: Payload = {}
    for name in _NUMBERS:
        options[name] = number(asked, name)
    for name in _INTEGERS:
        options[name] = integer(asked, name)
    options = {name: value for name, value in options.items() if value is not None}
    if stop := _stop(asked):
        options["stop"] = stop
    if (limit := _num_predict(asked, target, warnings)) is not None:
        options["num_predict"] = limit
    return options


def _num_predict(asked: Payload, target: Model, warnings: list[str]) -> int | None:
    """The answer's limit in tokens: the client's, under the model's ceiling."""
    name = "max_completion_tokens" if asked.get("max_completion_tokens") is not None else "max_tokens"
    wanted = integer(asked, name, -1)
    if wanted == 0:
        raise ClientError(f"{name} must be at least 1.", param=name)
    if wanted is None or wanted == -1:  # -1: "no limit" to clients that grew up with llama.cpp
        return target.max_tokens
    if target.max_tokens is not None and wanted > target.max_tokens:
        warnings.append("capped(max_tokens)")
        return target.max_tokens
    return wanted


def _think(asked: Payload, target: Model, warnings: list[str]) -> bool | str | None:
    """Ollama's think: what the client asks, else what is configured; None = not sent.

    Without it a thinking model thinks. Sent as true or a level to a model that can't, it is a 400;
    a level to one that thinks but knows no levels counts as true.
    """
    effort = _effort(asked, warnings)
    wanted = target.think if effort is None else effort
    if wanted and target.capabilities is not None and "thinking" not in target.capabilities:
        if effort:
            warnings.append("ignored(reasoning_effort)")
        return None
    return wanted


def _effort(asked: Payload, warnings: list[str]) -> bool | str | None:
    """reasoning_effort, reasoning.effort or Ollama's own think, as a value of think; None = not asked."""
    reasoning = asked.get("reasoning")
    if not isinstance(reasoning, dict | None):
        raise wrong("reasoning", "an object")
    warnings += [_ignored_field(f"reasoning.{name}") for name in reasoning or () if name not in ("effort", "summary")]
    named = (("reasoning_effort", asked.get("reasoning_effort")), ("reasoning.effort", (reasoning or {}).get("effort")))
    name, effort = next((pair for pair in named if pair[1] is not None), ("think", asked.get("think")))
    if effort is None or (name == "think" and isinstance(effort, bool)):
        return effort
    if not isinstance(effort, str):
        raise wrong(name, "a string")
    known = _EFFORTS.get(effort.strip().lower())
    if known is None:
        warnings.append("clamped(reasoning_effort)")
        return "medium"
    return known


def _stop(asked: Payload) -> list[str]:
    stop = asked.get("stop")
    if isinstance(stop, str):
        stop = [stop]
    if stop is None:
        return []
    if not isinstance(stop, list) or not all(isinstance(word, str) for word in stop):
        raise wrong("stop", "a string or a list of strings")
    return [word for word in stop if word]


def _format(asked: Payload) -> Any:
    """response_format as Ollama's format: a JSON schema, or None.

    json_object is a schema too: Ollama's own word "json" does nothing for models that bring a Jinja template.
    """
    asked_format = asked.get("response_format")
    if asked_format is None:
        return None
    kind = asked_format.get("type") if isinstance(asked_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        message = "response_format.type must be 'text', 'json_object' or 'json_schema'."
        raise ClientError(message, param="response_format")
    wrapper = asked_format.get("json_schema")
    schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
    if not isinstance(schema, dict):
        raise wrong("response_format.json_schema.schema", "an object")
    return schema


# --- Requests: tools ------------------------------------------------------------------------------


def _tools(asked: Payload, target: Model, warnings: list[str]) -> list[Payload]:
    """The tools to offer. Ollama has no tool_choice: "none" offers no tool, a named one offers only that."""
    given = asked.get("tools")
    if given is not None and not isinstance(given, list):
        raise wrong("tools", "a list")
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(given or ())]
    choice = asked.get("tool_choice")
    if not tools or choice == "none":
        return []
    require(target, "tools", "tools", "tools")
    if any(tool["function"].get("strict") for tool in tools):
        warnings.append("not_enforced(strict)")
    if choice in (None, "auto"):
        return tools
    warnings.append("not_enforced(tool_choice)")
    if choice == "required":
        return tools
    return _named_tool(choice, tools)


def _tool(tool: Any, where: str) -> Payload:
    """One tool, with what Ollama can't do without filled in: OpenAI lets parameters and its type be absent."""
    if not isinstance(tool, dict):
        raise wrong(where, "an object")
    if tool.get("type", "function") != "function":
        raise unsupported("tools", "Ollama knows only tools of the type 'function'.", f"{where}.type")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(f"{where}.function", "an object with a 'name'")
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {} if isinstance(parameters, dict) else None
    if not isinstance(properties, dict):
        raise wrong(f"{where}.function.parameters", "a JSON schema of an object")
    anything = {name: {} if schema is True else schema for name, schema in properties.items()}
    filled = {**parameters, "type": "object", "properties": anything}
    return {**tool, "type": "function", "function": {**function, "parameters": filled}}


def _named_tool(choice: Any, tools: list[Payload]) -> list[Payload]:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "allowed_tools":
        return tools
    function = choice.get("function") if kind == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        message = "tool_choice must be 'none', 'auto', 'required' or name one of the tools."
        raise ClientError(message, param="tool_choice")
    return named


# --- Requests: text ------------------------------------------------------------------------------


def _prompt(asked: Payload) -> str:
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and prompt:
        if not all(isinstance(one, str) for one in prompt):
            raise unsupported("tokens", "Ollama takes the prompt as text, not as tokens.", "prompt")
        if len(prompt) > 1:
            raise unsupported("prompts", "Ollama takes one prompt a request.", "prompt")
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise wrong("prompt", "a string")
    if not prompt:  # Ollama would load or unload the model and answer nothing
        raise unsupported("empty_prompt", "Ollama generates nothing from an empty prompt.", "prompt")
    return prompt


def _input(asked: Payload) -> list[str]:
    """The texts to embed, always as a list: to "" alone Ollama answers no vector, to [""] one."""
    value = asked.get("input")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong("input", "a string or a list of strings")
    if any(isinstance(one, int | list) for one in value):
        raise unsupported("tokens", "Ollama takes the input as text, not as tokens.", "input")
    if not all(isinstance(one, str) for one in value):
        raise wrong("input", "a string or a list of strings")
    return value


# --- Requests: what can't be had ------------------------------------------------------------------


def _one_answer(asked: Payload) -> None:
    count = integer(asked, "n", 1)
    if count is not None and count > 1:
        raise unsupported("n", "Ollama gives one answer a request (n = 1).", "n")


def _ignored(asked: Payload, body: Payload, known: frozenset[str]) -> list[str]:
    """A warning for each field that would shape the answer and can't be carried over."""
    warnings = []
    for name, value in asked.items():
        ours = name in _RUNNER and body.get(name) is None  # from the configuration
        if not (ours or name in known or name in _SHAPELESS or value in _NEUTRAL.get(name, ())):
            warnings.append(_ignored_field(name))
    return warnings


def _ignored_field(name: str) -> str:
    """Fit for a header, whatever the client called it."""
    return f"ignored({_NO_NAME.sub('_', name)[:64] or '_'})"


def _listed(warnings: list[str]) -> list[str]:
    """Each once, and not more than a header should hold."""
    once = list(dict.fromkeys(warnings))
    if len(once) <= _MAX_WARNINGS:
        return once
    return [*once[: _MAX_WARNINGS - 1], f"ignored({len(once) - _MAX_WARNINGS + 1}_more)"]


# --- Answers --------------------------------------------------------------------------------------

_MARK = "\0"  # stands for the text in a rendered chunk; no configured name can hold it
_MARK_JSON = b'"\\u0000"'


def new_call_id() -> str:
    """An id for a tool call that came without one."""
    return "call_" + secrets.token_hex(12)


class ChatStream:
    """Ollama's lines -> OpenAI's answer to one chat or legacy completion.

    `feed` every line; where the client streams it returns the events to send, else `whole` gives
    the document at the end. What never changes in an answer's chunks is rendered once, so a token
    costs one JSON escape and one join. `tally` holds what is known so far; `done` turns true with
    Ollama's last line: a stream that ends before it was cut off.

    call: the request. target: the model that serves, whose logical name stands in the answer.
    prompt_chars: as prompt_chars() counts them; 0 = unknown. new_id: ids for tool calls without one.
    """

    def __init__(
        self, call: Call, target: Model, prompt_chars: int = 0, new_id: Callable[[], str] = new_call_id
    ) -> None:
        self.tally = Tally()
        self.done = False
        self._call = call
        self._target = target
        self._prompt_chars = prompt_chars
        self._new_id = new_id
        self._chat = call.endpoint == "chat"
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if call.stream else "chat.completion"
        self._base = {"id": call.id, "object": kind, "created": call.created, "model": target.name}
        self._begun = not self._chat  # the role was sent; legacy completions have none
        self._call_ids: set[str] = set()
        self._logprobs: list[Payload] = []  # of tokens whose text is still to come
        self._tags: ThinkTags | None = ThinkTags()  # None once no tag can come any more
        self._offset = 0  # characters before the next token, for legacy text_offset
        # for `whole`
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: list[Payload] = []
        self._all_logprobs: list[Payload] = []
        if call.stream:
            self._text_parts = self._event(self._text_choice(_MARK)).split(_MARK_JSON)
            self._reasoning_parts: list[bytes] = []  # made with the first of it: few answers have any

    def feed(self, line: Payload) -> tuple[bytes, bool]:
        """(events to send, whether this line held content: text, reasoning or a tool call).

        Events are b"" where the client does not stream. The role is held until content or the end.
        Raises BackendError: an {"error"} line as failures.in_stream reads it, `bad_answer` for
        another shape, `empty_answer` for a chat answer that ended without any content.
        """
        if line.get("error") is not None:
            raise failures.in_stream(line["error"], model=self._target.model, backend=self._target.backend)
        reasoning, text, calls = self._read(line)
        content = bool(text or reasoning or calls)
        frames = self._begin() if content and not self._begun else b""
        if reasoning:
            frames += self._add_reasoning(reasoning)
        if text:
            frames += self._add_text(text)
        if calls:
            frames += self._add_calls(calls)
        if line.get("done"):
            frames += self._end(line)
        return frames, content

    def _read(self, line: Payload) -> tuple[str, str, Any]:
        """(reasoning, text, tool calls) of a line."""
        source = line.get("message", {}) if self._chat else line
        if not isinstance(source, dict):
            raise _bad_answer("'message' is not an object")
        text = source.get("content" if self._chat else "response") or ""
        reasoning = source.get("thinking") or ""
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise _bad_answer("text is not a string")
        if "logprobs" in line and not reasoning:  # OpenAI gives them for the answer alone
            self._logprobs += _logprobs(line["logprobs"])
        if self._tags is not None:
            reasoning, text = self._split(self._tags, reasoning, text, bool(line.get("done")))
        return reasoning, text, source.get("tool_calls")

    def _split(self, tags: ThinkTags, reasoning: str, text: str, last: bool) -> tuple[str, str]:
        thought, text = tags.split(text)
        if last or reasoning:
            held_thought, held_text = tags.flush()
            thought, text = thought + held_thought, text + held_text
        if thought or (tags.opened and not text):
            self._logprobs.clear()  # they were the thinking's, or a tag's
        if reasoning or tags.settled:  # the server splits by itself, or the answer has begun
            self._tags = None
        return reasoning + thought, text

    def whole(self) -> Payload:
        """The chat.completion or text_completion object of what was fed."""
        text = "".join(self._text)
        reasoning = "".join(self._reasoning)
        extra = {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}
        choice: Payload = {"index": 0}
        if not self._chat:
            choice |= {"text": text, **extra}
        elif self._tool_calls:
            choice["message"] = {
                "role": "assistant",
                "content": text or None,
                **extra,
                "tool_calls": self._tool_calls,
            }
        else:
            choice["message"] = {"role": "assistant", "content": text, **extra}
        choice |= {"logprobs": self._shaped(self._all_logprobs), "finish_reason": self.tally.finish_reason}
        usage = self._usage()
        return {**self._base, "choices": [choice], **({"usage": usage} if usage else {})}

    # the kinds of content

    def _begin(self) -> bytes:
        """The role, in a chunk of its own as OpenAI sends it."""
        self._begun = True
        if not self._call.stream:
            return b""
        return self._event({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def _add_text(self, text: str) -> bytes:
        self.tally.content_chars += len(text)
        if not self._call.stream:
            self._text.append(text)
            self._all_logprobs += self._logprobs
            self._logprobs = []
            return b""
        if self._logprobs:
            return self._event(self._text_choice(text, self._take_logprobs()))
        return _quoted(text).join(self._text_parts)

    def _add_reasoning(self, text: str) -> bytes:
        self.tally.reasoning_chars += len(text)
        if not self._call.stream:
            self._reasoning.append(text)
            return b""
        if not self._reasoning_parts:
            self._reasoning_parts = self._event(self._reasoning_choice(_MARK)).split(_MARK_JSON)
        return _quoted(text).join(self._reasoning_parts)

    def _add_calls(self, calls: Any) -> bytes:
        """Each call whole and with its own running index; Ollama counts from 0 on every line."""
        if not isinstance(calls, list):
            raise _bad_answer("'tool_calls' is not a list")
        frames = b""
        for call in calls:
            tool_call = self._tool_call(call)
            if self._call.stream:
                delta = {"tool_calls": [{"index": self.tally.tool_calls, **tool_call}]}
                frames += self._event({"index": 0, "delta": delta, "finish_reason": None})
            else:
                self._tool_calls.append(tool_call)
            self.tally.tool_calls += 1
        return frames

    def _tool_call(self, call: Any) -> Payload:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _bad_answer("a tool call without a name")
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = wire.dumps({} if arguments is None else arguments).decode("utf-8")
        call_id = call.get("id")
        if not isinstance(call_id, str) or not call_id or call_id in self._call_ids:
            call_id = self._new_id()
        self._call_ids.add(call_id)
        return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}

    # the end

    def _end(self, line: Payload) -> bytes:
        """Counts, finish reason, usage, [DONE]."""
        reason = line.get("done_reason")
        if reason in ("load", "unload"):  # it took the request for one to move the model, and answered nothing
            raise _bad_answer(f"the model was only told to {reason}")
        self._count(line)
        tally = self.tally
        if reason == "length":
            tally.finish_reason = "length"
        else:
            tally.finish_reason = "tool_calls" if tally.tool_calls else "stop"
        if self._chat and tally.finish_reason == "stop" and not self._begun:
            raise BackendError("empty_answer", f"Model '{self._target.name}' ended its answer without a word.")
        self.done = True
        if not self._call.stream:
            self._all_logprobs += self._logprobs
            return b""
        frames = b"" if self._begun else self._begin()
        frames += self._event(self._last_choice(tally.finish_reason))
        if self._call.include_usage and (usage := self._usage()):
            frames += wire.sse(wire.dumps({**self._base, "choices": [], "usage": usage}))
        return frames + wire.DONE

    def _count(self, line: Payload) -> None:
        """What the last line counts. Ollama omits zeros, so an absent eval_count is 0 if nothing was
        said, but an absent prompt_eval_count is unknown: no prompt has no tokens."""
        tally = self.tally
        tally.prompt_tokens = _count(line.get("prompt_eval_count"))
        tally.completion_tokens = _count(line.get("eval_count"))
        said = tally.content_chars or tally.reasoning_chars or tally.tool_calls
        if tally.completion_tokens is None and tally.prompt_tokens is not None and not said:
            tally.completion_tokens = 0
        tally.load_s = _seconds(line.get("load_duration"))
        tally.decode_s = _seconds(line.get("eval_duration"))
        tally.truncated = self._was_truncated()

    def _was_truncated(self) -> bool:
        """Whether the server chopped the prompt in spite of truncate: false, as some runners do.

        A token of real text is about 4 characters and hardly ever more than 8 on average: counted fewer
        tokens than that means that some of the prompt was not read. Only a prompt that may have been
        longer than the window, at 2 characters a token, can have been chopped at all.
        """
        window, counted = self._target.num_ctx, self.tally.prompt_tokens
        if window is None or counted is None:
            return False
        return self._prompt_chars > 2 * window and self._prompt_chars > 8 * counted

    def _usage(self) -> dict[str, int] | None:
        """OpenAI's usage, or None where a count is not known: a zero there would be believed."""
        prompt, completion = self.tally.prompt_tokens, self.tally.completion_tokens
        if prompt is None or completion is None:
            return None
        return Usage(prompt, completion).to_json()

    # the shapes

    def _event(self, choice: Payload) -> bytes:
        """One chunk as an event. With include_usage each but the last carries "usage": null, as OpenAI's do."""
        usage = {"usage": None} if self._call.include_usage else {}
        return wire.sse(wire.dumps({**self._base, "choices": [choice], **usage}))

    def _text_choice(self, text: str, logprobs: Payload | None = None) -> Payload:
        if not self._chat:
            return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None}
        with_logprobs = {"logprobs": logprobs} if logprobs else {}
        return {"index": 0, "delta": {"content": text}, **with_logprobs, "finish_reason": None}

    def _reasoning_choice(self, text: str) -> Payload:
        """Both names that clients read: reasoning_content (llama.cpp, DeepSeek) and reasoning (vLLM, Ollama)."""
        reasoning = {"reasoning_content": text, "reasoning": text}
        if self._chat:
            return {"index": 0, "delta": reasoning, "finish_reason": None}
        return {"index": 0, "text": "", **reasoning, "logprobs": None, "finish_reason": None}

    def _last_choice(self, finish_reason: str) -> Payload:
        choice = self._text_choice("", self._take_logprobs())
        if self._chat:
            choice["delta"] = {}
        choice["finish_reason"] = finish_reason
        return choice

    def _take_logprobs(self) -> Payload | None:
        entries, self._logprobs = self._logprobs, []
        return self._shaped(entries)

    def _shaped(self, entries: list[Payload]) -> Payload | None:
        """Ollama's log probabilities in OpenAI's chat or legacy shape; None without any."""
        if not entries:
            return None
        if self._chat:
            return {"content": [_chat_logprob(entry) for entry in entries], "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in _logprobs(entry.get("top_logprobs"))} for entry in entries
            ],
            "text_offset": offsets,
        }


def _quoted(text: str) -> bytes:
    """`text` as JSON. A lone surrogate has no UTF-8 form, so such text is escaped whole."""
    try:
        return encode_basestring(text).encode("utf-8")
    except UnicodeEncodeError:
        return encode_basestring_ascii(text).encode("ascii")


def _logprobs(entries: Any) -> list[Payload]:
    """The well-formed ones of Ollama's {token, logprob, bytes, top_logprobs}."""
    if not isinstance(entries, list):
        return []
    return [
        entry
        for entry in entries
        if isinstance(entry, dict)
        and isinstance(entry.get("token"), str)
        and isinstance(entry.get("logprob"), int | float)
    ]


def _chat_logprob(entry: Payload) -> Payload:
    tops = [_token_logprob(top) for top in _logprobs(entry.get("top_logprobs"))]
    return {**_token_logprob(entry), "top_logprobs": tops}


def _token_logprob(entry: Payload) -> Payload:
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry.get("bytes")}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST else None


def _seconds(nanoseconds: Any) -> float | None:
    count = _count(nanoseconds)
    return None if count is None else count / 1e9


def _bad_answer(problem: str) -> BackendError:
    return BackendError("bad_answer", f"Ollama's answer has an unknown shape: {problem}.")


def embed_response(answer: Payload, name: str, encoding_format: str | None, count: int | None = None) -> Payload:
    """OpenAI's embeddings list from /api/embed's answer, under the logical name that served.

    encoding_format: "base64" = float32, little-endian, in base64 (what the SDKs ask for by default);
    else floats. count: how many inputs were sent. Raises BackendError("bad_answer") if the vectors are not
    as many, so that none is stored under another's text.
    """
    vectors = answer.get("embeddings")
    if not isinstance(vectors, list) or not all(isinstance(vector, list) for vector in vectors):
        raise _bad_answer("'embeddings' is not a list of vectors")
    if count is not None and len(vectors) != count:
        raise _bad_answer(f"{len(vectors)} vectors for {count} inputs")
    encode = _float32_base64 if encoding_format == "base64" else list
    data = [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(vectors)]
    response: Payload = {"object": "list", "data": data, "model": name}
    if (tokens := _count(answer.get("prompt_eval_count"))) is not None:
        response["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return response


def _float32_base64(vector: list[Any]) -> str:
    try:
        floats = array("f", vector)
    except (TypeError, OverflowError):
        raise _bad_answer("a vector holds something else than float32 numbers") from None
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode("ascii")
