"""Cascades: the next member answers where an answer does not do."""

from __future__ import annotations

import json
import math
import threading
import unittest
from contextlib import ExitStack
from typing import Any, Self

from portway.council import cascade
from tests.daemon import Daemon
from tests.doubles import HANG, LAST_CHUNK, Action, RawResponse, json_reply
from tests.llama_server import wait_for
from tests.targets import (
    CHAT,
    MESSAGES,
    Reply,
    Target,
    answer,
    ask,
    begun,
    ended,
    error_body,
    frames,
    next_json,
    part,
    text_of,
)

NAMES = ("small", "middle", "large")
BROKEN = json_reply(error_body("openai", "it broke"), 500)
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "required": ["a"]}}}


class Steps:
    """A cascade of scripted members behind a server each, a daemon, and a client of it."""

    def __init__(self, *members: Reply, options: str = "", rest: str = "") -> None:
        self._stack = ExitStack()
        self.targets = [self._stack.enter_context(Target(then=reply)) for reply in members]
        names = NAMES[: len(members)]
        self.toml = rest + "".join(
            f'[backends.{name}]\nkind = "openai"\nurl = "{target.url}"\n'
            f'[models.{name}]\nbackend = "{name}"\nmodel = "physical-{name}"\n'
            for name, target in zip(names, self.targets, strict=True)
        )
        members_line = "" if "members" in options else f"members = {json.dumps(names)}\n"
        self.toml += f'[models.cascade]\nkind = "cascade"\n{members_line}{options}\n'

    def __enter__(self) -> Self:
        self.daemon = self._stack.enter_context(Daemon(self.toml))
        self.client = self._stack.enter_context(self.daemon.client())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, **fields: Any) -> RawResponse:
        return ask(self.client, "cascade", **fields)


def plain(text: str = "", reason: str = "stop", **choice: Any) -> bytes:
    """A plain answer; those who may have to give way are never streamed."""
    body = json.loads(answer("openai", text).split(b"\r\n\r\n", 1)[1])
    body["choices"][0].update({"finish_reason": reason, **choice})
    return json_reply(body)


def sure(probability: float) -> dict[str, Any]:
    """The log probabilities of two tokens that are so on average."""
    return {"content": [{"token": "x", "logprob": math.log(p)} for p in (probability - 0.1, probability + 0.1)]}


class JudgingTest(unittest.TestCase):
    CASES: tuple[tuple[str, bytes, dict[str, Any], str], ...] = (
        ("empty", plain("", "length"), {}, "cut"),  # thinking took all of the tokens
        ("nothing at all", plain(), {}, "empty_answer"),
        ("only thoughts", plain(message={"content": None, "reasoning_content": "hm"}), {}, "empty"),
        ("cut", plain("so far", "length"), {}, "cut"),
        ("refused", plain("I'm sorry, but I can't help with that."), {}, "refused"),
        ("refused in typographic words", plain("I\u2019m unable to say."), {}, "refused"),
        ("filtered", plain("x", "content_filter"), {}, "refused"),
        ("no JSON", plain("Sure: {}"), {"response_format": {"type": "json_object"}}, "schema"),
        ("no object", plain("[1]"), {"response_format": {"type": "json_object"}}, "schema"),
        ("another shape", plain('{"b": 1}'), {"response_format": SCHEMA}, "schema"),
        ("down", BROKEN, {}, "server_error"),
    )

    def test_next_one_answers(self) -> None:
        """Each reason leads to the next member, and is told in the header and in the body; plain and streamed."""
        for name, reply, fields, reason in self.CASES:
            for stream in (False, True):
                last = answer("openai", '{"a": "fine"}', stream=stream)
                with self.subTest(name, stream=stream), Steps(reply, last) as steps:
                    response = steps.ask(stream=stream, **fields)
                    chunks = frames(response.body) if stream else []
                    told = chunks[-2]["portway"] if stream else response.json["portway"]
                    text = text_of(chunks) if stream else response.json["choices"][0]["message"]["content"]
                self.assertEqual('{"a": "fine"}', text)
                self.assertEqual(
                    [("small", reason), ("middle", "ok")], [(s["model"], s["reason"]) for s in told["steps"]]
                )
                self.assertEqual("cascade(small>middle)", response.header("x-served-by"))
                self.assertRegex(response.header("x-portway-attempts") or "", rf"^small={reason}\(.*\); middle=ok$")

    def test_first_one_answers(self) -> None:
        """An answer that does is sent as it is, under the cascade's name; nobody else is asked."""
        fine = {"text": "I can help with that.", "JSON": '{"a": []}'}
        for name, text in fine.items():
            for stream in (False, True):
                fields = {"response_format": SCHEMA} if name == "JSON" else {}
                with self.subTest(name, stream=stream), Steps(plain(text), BROKEN) as steps:
                    response = steps.ask(
                        stream=stream, stream_options={"include_usage": True} if stream else None, **fields
                    )
                    self.assertEqual([], steps.targets[1].asked)
                    self.assertNotIn("stream_options", steps.targets[0].asked[0].json)  # it is asked plainly
                self.assertEqual(
                    ("cascade(small)", None), tuple(map(response.header, ("x-served-by", "x-portway-attempts")))
                )
                if stream:
                    *chunks, last, done = frames(response.body)
                    self.assertEqual((text, "[DONE]", 7), (text_of(chunks), done, last["usage"]["total_tokens"]))
                    self.assertEqual({"cascade"}, {each["model"] for each in chunks})
                else:
                    self.assertEqual(
                        ("cascade", text), (response.json["model"], response.json["choices"][0]["message"]["content"])
                    )

    def test_the_request_is_at_fault(self) -> None:
        """A message that can't be read is the client's own mistake: nobody else is asked."""
        with Steps(plain("x"), plain("y")) as steps:
            steps.daemon.use(steps.toml.replace('kind = "openai"', 'kind = "ollama"', 1))
            response = steps.ask(messages=[{"role": "user", "content": 5}])
            self.assertEqual((400, "messages[0].content"), (response.status, response.json["error"]["param"]))
            self.assertEqual([], steps.targets[1].asked)

    def test_a_tool_call_does(self) -> None:
        """A cascade takes tools; a call of one is an answer."""
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        reply = plain("", "tool_calls", message={"role": "assistant", "content": None, "tool_calls": [call]})
        with Steps(reply, BROKEN, options="min_probability = 0.5") as steps:
            response = steps.ask(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
            self.assertNotIn("logprobs", steps.targets[0].asked[0].json)
        self.assertEqual([call], response.json["choices"][0]["message"]["tool_calls"])

    def test_unsure(self) -> None:
        """Below min_probability the next one answers. Probabilities are asked for, and kept to ourselves unless
        the client wants them."""
        for probability, by in ((0.45, "cascade(small>middle)"), (0.55, "cascade(small)")):
            for wanted in (None, True):
                reply, last = plain("a", logprobs=sure(probability)), plain("b", logprobs=None)
                with (
                    self.subTest(probability, wanted=wanted),
                    Steps(reply, last, options="min_probability = 0.5") as steps,
                ):
                    response = steps.ask(logprobs=wanted)
                    self.assertTrue(steps.targets[0].asked[0].json["logprobs"])
                self.assertEqual(by, response.header("x-served-by"))
                shown = response.json["choices"][0].get("logprobs") is not None
                self.assertEqual(bool(wanted) and probability > 0.5, shown)
        with Steps(
            plain("a"), BROKEN, options="min_probability = 0.5"
        ) as steps:  # where there are none, nothing is judged
            self.assertEqual("cascade(small)", steps.ask().header("x-served-by"))

    def test_usage_is_summed(self) -> None:
        """An answer that did not do has cost its tokens, too."""
        with Steps(plain("x", "length"), plain("y", "length"), plain("z")) as steps:
            response = steps.ask()
        self.assertEqual({"prompt_tokens": 15, "completion_tokens": 6, "total_tokens": 21}, response.json["usage"])
        self.assertEqual("cascade(small>middle>large)", response.header("x-served-by"))

    def test_params(self) -> None:
        """A member's params are sent to it, before the client's own."""
        options = 'members = [{ name = "small", params = { temperature = 0 } }, "middle"]'
        with Steps(plain("x", "length"), plain("y"), options=options) as steps:
            steps.ask(temperature=1)
            first, second = (target.asked[0].json for target in steps.targets)
        self.assertEqual((0, 1), (first["temperature"], second["temperature"]))

    def test_refusals(self) -> None:
        """Only what an answer begins with counts; an apology before it does not hide it."""
        for text in (
            "Sorry, I cannot provide that.",
            "I apologize, but I'm not able to.",
            "I am very sorry, but I can't do that.",
        ):
            self.assertTrue(cascade._refuses(text), text)
        for text in (
            "Sorry for the wait: 42.",
            'It says "I can\'t help with that".',
            "As an AI language model, I can say: 42.",
        ):
            self.assertFalse(cascade._refuses(text), text)


class LastTest(unittest.TestCase):
    def test_whatever_comes_of_it(self) -> None:
        """The last member's answer is sent, even if it would not do."""
        with Steps(plain("x", "length"), plain("so far", "length")) as steps:
            response = steps.ask()
        self.assertEqual(
            ("so far", "length"),
            (response.json["choices"][0]["message"]["content"], response.json["choices"][0]["finish_reason"]),
        )

    def test_live(self) -> None:
        """The last member is streamed as it speaks; heartbeats bridge the time until then."""
        first, gate = threading.Event(), threading.Event()
        live: list[Action] = [begun("openai", "one"), gate, part("openai", " two"), ended("openai")]
        with Steps([first, plain("x", "length")], live, rest="[server]\nheartbeat = 0.01\n") as steps:
            steps.client.request("POST", CHAT, {"model": "cascade", "messages": MESSAGES, "stream": True})
            events = steps.client.events(steps.client.head())
            self.assertEqual("portway", next(events).comment)
            first.set()
            chunk = next_json(events)
            self.assertEqual("one", chunk["choices"][0]["delta"]["content"])
            self.assertEqual("cascade(small>middle)", chunk["portway"]["served_by"])
            gate.set()
            rest = [event.json for event in events if event.data not in (None, "[DONE]")]
        self.assertEqual(" two", text_of(rest))
        self.assertEqual(["cut", "ok"], [step["reason"] for step in rest[-1]["portway"]["steps"]])

    def test_nobody(self) -> None:
        """If the last one has no answer, the error is its own, and tells every step."""
        with Steps(plain("x", "length"), BROKEN) as steps:
            response = steps.ask()
        error = response.json["error"]
        self.assertEqual((502, "server_error"), (response.status, error["code"]))
        self.assertIn("small: cut; middle could not answer: it broke", error["message"])
        self.assertRegex(response.header("x-portway-attempts") or "", "^small=cut.*middle=server_error")
        self.assertEqual(["cut", "server_error"], [step["reason"] for step in response.json["portway"]["steps"]])

    def test_breaks_off(self) -> None:
        """A last answer that breaks off ends the stream with an error; it is not the cascade that cools down."""
        with Steps(plain("x", "length"), [begun("openai", "half"), LAST_CHUNK]) as steps:
            for _ in range(4):
                *_, last = frames(steps.ask(stream=True).body)
                self.assertEqual("stream_broken", last["error"]["code"])
            cooling = steps.client.call("GET", "/health").json["cooling"]
        self.assertEqual(["middle"], [each["backend"] for each in cooling])

    def test_time(self) -> None:
        """A member that hangs leaves the next one its time."""
        with Steps([HANG], plain("y"), options="timeouts = { total = 0.6 }") as steps:
            told = steps.ask().json["portway"]["steps"]
        self.assertEqual(["answer_timeout", "ok"], [step["reason"] for step in told])
        self.assertLess(told[0]["seconds"], 0.5)

    def test_client_gone(self) -> None:
        """The client leaves: whoever works for it is let go, and nobody else is asked."""
        with Steps([HANG], plain("y")) as steps:
            client = steps.daemon.client()
            client.request("POST", CHAT, {"model": "cascade", "messages": MESSAGES})
            wait_for(lambda: bool(steps.targets[0].asked), "the first member's being asked")
            client.close()
            number = steps.targets[0].asked[0].connection
            connections = [steps.targets[0].connection(i) for i in range(steps.targets[0].connections)]
            self.assertTrue(next(each for each in connections if each.number == number).closed.wait(10))
            self.assertEqual([], steps.targets[1].asked)

    def test_refused(self) -> None:
        """Only chats, and one answer each."""
        with Steps(plain("x"), plain("y")) as steps:
            for fields in (
                {"n": 2},
                {"path": "/v1/embeddings", "input": "x"},
                {"path": "/v1/completions", "prompt": "x"},
            ):
                with self.subTest(fields):
                    response = steps.ask(**fields)
                    self.assertEqual((400, "unsupported"), (response.status, response.json["error"]["code"]))

    def test_a_council_as_its_last_member(self) -> None:
        """One panel may be a part of another."""
        council = '[models.council]\nkind = "council"\nmembers = ["middle", "middle"]\nchairman = "middle"\n'
        options = f'members = ["small", "council"]\n{council}'
        with Steps(plain("x", "length"), answer("openai", "fine", stream=True), options=options) as steps:
            chunks = frames(steps.ask(stream=True).body)
        self.assertEqual("fine", text_of(chunks))
        self.assertEqual(["small", "council"], [step["served_by"] for step in chunks[-2]["portway"]["steps"]])


if __name__ == "__main__":
    unittest.main()
