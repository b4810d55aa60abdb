# /// script
# requires-python = ">=3.11"
# dependencies = ["openai>=1.60"]
# ///
"""A round trip through Portway with the official OpenAI SDK, and the proof that the server is stateless.

    portway demo                       # or portway serve, in another terminal
    uv run examples/demo.py            # or: pip install openai && python3 examples/demo.py

$PORTWAY_URL and $PORTWAY_MODEL choose another server and model than the ones below.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import openai

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

URL = os.environ.get("PORTWAY_URL", "http://127.0.0.1:11436")
MODEL = os.environ.get("PORTWAY_MODEL", "fast-9b")
QUESTION = "What is my cat called?"
EARLIER: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "My cat is called Ada."},
    {"role": "assistant", "content": "A fine name for a cat."},
    {"role": "user", "content": "She is three years old."},
    {"role": "assistant", "content": "A good age for a cat."},
]


def main() -> int:
    """Run both parts; the exit code."""
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("PORTWAY_API_KEY", "unused"))
    try:
        round_trip(client)
        no_memory(client)
    except openai.APIConnectionError:
        print(f"Nothing answers at {URL}. Start it with `portway demo` or `portway serve`.", file=sys.stderr)
        return 1
    except openai.APIStatusError as exc:
        print(f"{exc.status_code}: {exc.message}", file=sys.stderr)
        return 1
    return 0


def round_trip(client: openai.OpenAI) -> None:
    """One question, plain and streamed, and who answered it."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello in one sentence."}]
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=messages, max_tokens=100)
    answer = raw.parse()
    print(f"{MODEL} was asked, {raw.headers['x-served-by']} answered: {answer.choices[0].message.content}")
    print("The same as a stream: ", end="")
    for chunk in client.chat.completions.create(model=MODEL, messages=messages, max_tokens=100, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()


def no_memory(client: openai.OpenAI) -> None:
    """The same question alone and after a conversation: what the server knows is what the prompt holds."""
    question: ChatCompletionMessageParam = {"role": "user", "content": QUESTION}
    for label, messages in (("alone", [question]), ("after two turns", [*EARLIER, question])):
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=100)
        tokens = answer.usage.prompt_tokens if answer.usage else "uncounted"
        print(f"{QUESTION!r} {label}: {tokens} prompt tokens. {answer.choices[0].message.content}")


if __name__ == "__main__":
    sys.exit(main())
