"""`portway demo`: a tour of what Portway does, with real requests on real sockets, no model server needed.

Without Ollama the models are played by the stand-in (standin/server.py), which says so in every answer; with
--live they are the ones that a running Ollama has. Then the daemon goes on serving until Ctrl-C.
"""

from __future__ import annotations

import http.client
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from portway.config import Config, parse

PORT = 11436
OLLAMA = "http://127.0.0.1:11434"
REPLY_TOKENS = 100  # enough to show an answer, short enough for a slow machine
TURNS = (
    ("My cat is called Ada.", "A fine name for a cat."),
    ("She is three years old.", "A good age for a cat."),
    ("She likes to sit on keyboards.", "Most cats do."),
    ("Mine above all.", "I believe you."),
)
QUESTION = "What is my cat called?"


class DemoError(Exception):
    """The tour can't go on; str() says why and what would help."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one request came back with."""

    status: int
    headers: Mapping[str, str]
    body: dict[str, Any]


def main(live: bool = False, port: int | None = None, once: bool = False) -> int:
    """Take the tour; `once`: and end. port: where to serve, else 11436 or, if that is taken, any. The exit code."""
    from portway.proxy import Daemon

    try:
        with ExitStack() as stack:
            config, what = _live_config() if live else _standin_config(stack)
            daemon = _started(Daemon, config, port)
            stack.callback(daemon.stop, 1.0)
            print(f"Portway serves {daemon.url}/v1, and behind it is {what}.")
            _Tour(daemon.port).take()
            if not once:
                _go_on(daemon.url)
    except DemoError as exc:
        print(f"portway demo: {exc}", file=sys.stderr)
        return 1
    return 0


# --- what is behind it ----------------------------------------------------------------------------


def _standin_config(stack: ExitStack) -> tuple[Config, str]:
    from portway.standin.server import StandIn

    standin = stack.enter_context(StandIn(token_delay=0.02))
    config = _config(standin.url, "qwen3.5:9b", "llama3.2:3b")
    return config, "a stand-in for Ollama: it speaks Ollama's protocol, and there is no language model in it"


def _live_config() -> tuple[Config, str]:
    models = _chat_models()
    if not models:
        raise DemoError("Ollama has no model that can chat yet. Get a small one: `ollama pull llama3.2:1b`.")
    return _config(OLLAMA, models[0], models[-1]), f"your Ollama at {OLLAMA} with {models[0]}"


def _chat_models() -> list[str]:
    """The models of the Ollama on this machine that can chat, the smallest first."""
    connection = http.client.HTTPConnection(OLLAMA.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/api/tags")
        models = json.loads(connection.getresponse().read())["models"]
        return [model["name"] for model in sorted(models, key=lambda model: model["size"]) if _chats(connection, model)]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as exc:
        raise DemoError(
            f"No Ollama answers at {OLLAMA} ({exc}). Start it with `ollama serve`, or run the tour without --live."
        ) from None
    finally:
        connection.close()


def _chats(connection: http.client.HTTPConnection, model: Mapping[str, Any]) -> bool:
    connection.request("POST", "/api/show", json.dumps({"model": model["name"]}))
    return "completion" in json.loads(connection.getresponse().read()).get("capabilities", ["completion"])


def _config(url: str, first: str, second: str) -> Config:
    """Three logical names; what stands behind `broken-9b` does not exist, so that it shows its fallback."""
    text = f"""
        [backends.ollama]
        kind = "ollama"
        url = "{url}"

        [models.fast-9b]
        backend = "ollama"
        model = {json.dumps(first)}
        family = "first"
        keep_alive = "15m"
        num_ctx = 4096
        think = false

        [models.broken-9b]
        backend = "ollama"
        model = "portway-demo/not-there:9b"
        family = "second"
        fallback = ["fast-9b"]

        [memory]
        enabled = {"true" if url == OLLAMA else "false"}  # a stand-in's models take none
    """
    if second != first:
        text += f"""
        [models.fast-3b]
        backend = "ollama"
        model = {json.dumps(second)}
        family = "third"
        num_ctx = 4096
        """
    return parse(text, "the demo's own configuration", {})


def _started(make: Callable[..., Any], config: Config, port: int | None) -> Any:
    """The running daemon, on the asked port, or on a free one if nobody asked and 11436 is taken."""
    from dataclasses import replace

    for candidate in [PORT, 0] if port is None else [port]:
        server = replace(config.server, port=candidate)
        try:
            daemon = make(replace(config, server=server), say=lambda _: None)
        except OSError as exc:
            problem = exc.strerror
            continue
        daemon.start()
        return daemon
    raise DemoError(f"can't listen on port {port}: {problem}. Choose another with --port, or 0 for any.")


def _go_on(url: str) -> None:
    print(
        f"""
It goes on serving until Ctrl-C. Try, from another terminal:

  curl {url}/v1/models
  curl {url}/v1/chat/completions -d '{{"model": "fast-9b", "messages": [{{"role": "user", "content": "Hello"}}]}}'

  from openai import OpenAI      # pip install openai
  client = OpenAI(base_url="{url}/v1", api_key="unused")
  print(client.chat.completions.create(model="fast-9b", messages=[{{"role": "user", "content": "Hello"}}]))

Next: `portway serve` with your own models; config/models.toml explains each line of its configuration.""",
        flush=True,
    )
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    done.wait()


# --- the tour -------------------------------------------------------------------------------------


class _Tour:
    """Five stops; each prints the request that it sends and the answer that comes."""

    def __init__(self, port: int) -> None:
        self._port = port

    def take(self) -> None:
        self._round_trip()
        self._no_memory()
        self._stream(include_usage=False)
        self._stream(include_usage=True)
        self._fallback()

    def _round_trip(self) -> None:
        _title("1. A round trip")
        body = self._body([_user("Say hello in one sentence.")])
        said = self._ask(body)
        _show_request(body)
        print(f"< {said.status}  X-Served-By: {said.headers['x-served-by']}")
        print(f"< {_content(said)}")
        print(f"< usage: {_usage(said)}")

    def _no_memory(self) -> None:
        _title("2. The same question after 1 turn and after 5")
        alone = self._ask(self._body([_user(QUESTION)]))
        history = [message for user, assistant in TURNS for message in (_user(user), _assistant(assistant))]
        after = self._ask(self._body([*history, _user(QUESTION)]))
        _show_request({"model": "fast-9b", "messages": f"[the question alone: {QUESTION}]"})
        print(f"< prompt_tokens: {_usage(alone)['prompt_tokens']}")
        _show_request({"model": "fast-9b", "messages": "[4 earlier turns with their answers, then the same question]"})
        print(f"< prompt_tokens: {_usage(after)['prompt_tokens']}")
        print(
            "The server remembers nothing between two requests: a conversation is in the prompt each time,\n"
            "or it is not there at all. That is why the second number is larger, and grows with each turn."
        )

    def _stream(self, *, include_usage: bool) -> None:
        _title(f"{4 if include_usage else 3}. A stream, {'with' if include_usage else 'without'} include_usage")
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if include_usage else {}
        body = self._body([_user("Count from one to three.")], stream=True, **options)
        _show_request(body)
        events = list(self._events(body))
        for event in events[:3]:
            print(f"< {event}")
        if len(events) > 6:
            print(f"< ... {len(events) - 6} more ...")
        for event in events[-3:]:
            print(f"< {event}")
        told = any('"choices":[]' in event and '"usage":{' in event for event in events)
        print(f"A usage chunk came: {'yes' if told else 'no'}; it comes exactly when it is asked for.")

    def _fallback(self) -> None:
        _title("5. A model that fails")
        body = self._body([_user("Say hello in one sentence.")], model="broken-9b")
        said = self._ask(body)
        _show_request(body)
        print(f"< {said.status}  X-Served-By: {said.headers['x-served-by']}")
        print(f"<      X-Portway-Attempts: {said.headers['x-portway-attempts']}")
        print(f"< {_content(said)}")
        print("Another model answered, and says so. With `X-Portway-Fallback: off` the failure itself comes back:")
        said = self._ask(body, {"X-Portway-Fallback": "off"}, status=404)
        print(f"< {said.status}  {said.body['error']['message']}")

    def _body(self, messages: list[dict[str, str]], model: str = "fast-9b", **more: Any) -> dict[str, Any]:
        return {"model": model, "messages": messages, "max_tokens": REPLY_TOKENS, **more}

    def _ask(self, body: dict[str, Any], headers: Mapping[str, str] | None = None, status: int = 200) -> Said:
        answer = self._post(body, headers)
        said = Said(answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(answer.read()))
        if said.status != status:
            raise DemoError(f"{said.status} where {status} was expected: {said.body}")
        return said

    def _events(self, body: dict[str, Any]) -> Iterator[str]:
        answer = self._post(body)
        for line in answer:
            if line.strip():
                yield line.decode().rstrip()

    def _post(self, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {**kind, **(headers or {})})
        return connection.getresponse()


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def _show_request(body: Mapping[str, Any]) -> None:
    print(f"> POST /v1/chat/completions  {json.dumps(body)}")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _content(said: Said) -> str:
    message = said.body["choices"][0]["message"]
    text = message["content"] or message.get("reasoning_content") or ""
    return " ".join(text.split())


def _usage(said: Said) -> dict[str, Any]:
    usage: dict[str, Any] = said.body.get("usage") or {"prompt_tokens": "not counted"}
    return usage
