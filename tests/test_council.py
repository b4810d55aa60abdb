"""Councils: members that answer apart, and a chairman that makes one answer of theirs."""

from __future__ import annotations

import json
import os
import threading
import time
import unittest
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Self
from unittest import mock

from portway import config
from portway.config import Model
from portway.council import council
from tests.daemon import Daemon
from tests.doubles import (
    HANG,
    LAST_CHUNK,
    Action,
    Close,
    RawClient,
    RawResponse,
    ScriptedConnection,
    json_reply,
    sse_reply,
)
from tests.llama_server import LlamaServer, wait_for
from tests.targets import (
    CHAT,
    MESSAGES,
    Reply,
    Target,
    answer,
    ask,
    begun,
    delta,
    ended,
    error_body,
    finish,
    frames,
    next_json,
    part,
    text_of,
)
from tests.tiny_gguf import TinyModel

NAMES = ("alpha", "beta", "gamma")
BROKEN = json_reply(error_body("openai", "it broke"), 500)
OVERLONG = json_reply(error_body("openai", "the request exceeds the available context size", code=400), 400)


class Sitting:
    """A council of scripted members behind a server each, its chairman, a daemon, and a client of it.

    members, chair: what each answers, request after request; `spare` is who follows the chairman in its chain.
    options: lines of [models.council]. backends: of every backend. models: further lines of one of the models.
    """

    def __init__(
        self,
        *members: Reply,
        chair: Reply = b"",
        spare: Reply | None = None,
        options: str = "",
        models: Mapping[str, str] | None = None,
        rest: str = "",
        backends: str = "",
    ) -> None:
        scripts = dict(zip(NAMES, members, strict=False)) | {"chair": chair} | ({"spare": spare} if spare else {})
        self._stack = ExitStack()
        self.targets = {name: self._stack.enter_context(Target(then=reply)) for name, reply in scripts.items()}
        lines = {"chair": 'fallback = ["spare"]\n'} if spare else {}
        self._toml = rest + "".join(
            f'[backends.{name}]\nkind = "openai"\nurl = "{target.url}"\n{backends}\n'
            f'[models.{name}]\nbackend = "{name}"\nmodel = "physical-{name}"\n'
            f"{lines.get(name, '')}{(models or {}).get(name, '')}\n"
            for name, target in self.targets.items()
        )
        names = json.dumps(NAMES[: len(members)])
        options = options if "members" in options else f"members = {names}\n{options}"
        self._toml += f'[models.council]\nkind = "council"\nchairman = "chair"\n{options}\n'

    def __enter__(self) -> Self:
        self.daemon = self._stack.enter_context(Daemon(self._toml))
        self.client = self._stack.enter_context(self.daemon.client())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, **fields: Any) -> RawResponse:
        return ask(self.client, "council", **fields)

    def asked(self, name: str) -> list[Any]:
        """The bodies that a member, or the chairman, was sent."""
        return [request.json for request in self.targets[name].asked]

    def await_asked(self, name: str) -> None:
        wait_for(lambda: bool(self.asked(name)), f"{name}'s being asked")

    def begin(self, **fields: Any) -> tuple[RawResponse, Iterator[Any]]:
        """The head of a streamed answer, and its events."""
        self.client.request("POST", CHAT, {"model": "council", "messages": MESSAGES, "stream": True, **fields})
        head = self.client.head()
        return head, self.client.events(head)


def said(*texts: str) -> bytes:
    """A member's answer: it is always streamed."""
    return answer("openai", *texts, stream=True)


def plain(text: str) -> bytes:
    """The chairman's answer to a client that does not stream."""
    return answer("openai", text)


def calm() -> Any:
    """Progress is told nearly at once."""
    return mock.patch.object(council, "PROGRESS_EVERY", 0.02)


def member_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("portway-member")]


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


class PlainTest(unittest.TestCase):
    def test_one_answer(self) -> None:
        """The chairman's answer comes under the council's name, with everybody's part in it and all of their tokens."""
        with Sitting(said("from al", "pha"), said("from beta"), chair=plain("both are right")) as sitting:
            response = sitting.ask()
        body = response.json
        self.assertEqual(
            ("council(alpha,beta>chair)", "ok", "BYPASS"),
            tuple(map(response.header, ("x-served-by", "x-council", "x-cache"))),
        )
        self.assertEqual("both are right", body["choices"][0]["message"]["content"])
        self.assertEqual(("council", "chat.completion"), (body["model"], body["object"]))
        told = body["portway"]
        self.assertEqual(
            ("council(alpha,beta>chair)", "ok", "parallel"), (told["served_by"], told["council"], told["mode"])
        )
        self.assertEqual(
            [("alpha", "ok"), ("beta", "ok")], [(each["model"], each["status"]) for each in told["members"]]
        )
        self.assertEqual(("chair", "ok", 2), tuple(told["chairman"][key] for key in ("served_by", "status", "tokens")))
        self.assertTrue(all(each["seconds"] >= 0 and each["tokens"] for each in told["members"]))

    def test_usage_is_summed(self) -> None:
        """prompt_tokens and completion_tokens are those of the members and of the chairman together."""
        member = answer("ollama", "x")  # 5 and 2
        with Sitting(said("x"), said("y"), chair=plain("z")) as sitting:
            self.assertEqual(5, sitting.ask().json["usage"]["prompt_tokens"])  # the members' servers count nothing
        with Target(then=member) as one, Target(then=member) as chair:
            toml = ollama(one.url, chair.url)
            with Daemon(toml) as daemon, daemon.client() as client:
                usage = ask(client, "council").json["usage"]
        self.assertEqual({"prompt_tokens": 15, "completion_tokens": 6, "total_tokens": 21}, usage)

    def test_what_members_are_asked(self) -> None:
        """Members get the conversation and the client's bounds, a temperature of their own and a seed each; the
        chairman gets the client's options."""
        options = 'members = ["alpha", { name = "beta", params = { temperature = 0.1, top_k = 5 } }]'
        fields = {
            "temperature": 0,
            "seed": 7,
            "max_tokens": 50,
            "top_p": 0.5,
            "stop": ["."],
            "response_format": {"type": "text"},
        }
        with Sitting(said("a"), said("b"), chair=plain("c"), options=options) as sitting:
            sitting.ask(**fields)
            (alpha,), (beta,), (chair,) = map(sitting.asked, ("alpha", "beta", "chair"))
        self.assertEqual(MESSAGES, alpha["messages"])
        self.assertEqual((0.7, 7, 50), (alpha["temperature"], alpha["seed"], alpha["max_tokens"]))
        self.assertEqual((0.1, 8, 5), (beta["temperature"], beta["seed"], beta["top_k"]))
        for key in ("top_p", "stop", "response_format"):
            self.assertNotIn(key, alpha)
        self.assertEqual(fields, {key: chair[key] for key in fields})
        self.assertNotIn("stream", chair)

    def test_what_the_chairman_reads(self) -> None:
        """It reads both answers under their letters behind the question, without thinking and without names."""
        mine = said("hm, as Qwen</think>", "As Qwen, I say one.")  # the chat template had opened the tag
        models = {"alpha": 'family = "qwen"\n', "beta": 'family = "llama"\n'}
        with Sitting(mine, said("I am Llama 3.2. Two, physical-alpha."), chair=plain("c"), models=models) as sitting:
            told = sitting.ask().json["portway"]
            (text,) = [message["content"] for message in sitting.asked("chair")[0]["messages"]]
        self.assertTrue(text.startswith("say something\n\n"))
        letters = {each["model"]: each["letter"] for each in told["members"]}
        self.assertEqual({"A", "B"}, set(letters.values()))
        self.assertIn(f"Response {letters['alpha']}:\nAs [model], I say one.\n", text)
        self.assertIn(f"Response {letters['beta']}:\nI am [model]. Two, [model].\n", text)
        for word in ("hm,", "Qwen", "Llama", "alpha", "beta"):
            self.assertNotIn(word, text)

    def test_order(self) -> None:
        """The order is drawn; the same seed draws the same, which is told, and the chairman reads in that order."""
        orders = set()
        with Sitting(said("from alpha"), said("from beta"), chair=plain("c")) as sitting:
            for seed in range(8):
                first, again = (sitting.ask(seed=seed).json["portway"] for _ in range(2))
                self.assertEqual(first["order"], again["order"])
                order = tuple(first["order"])
                orders.add(order)
                text = sitting.asked("chair")[-1]["messages"][-1]["content"]
                places = [text.index(f"from {name}") for name in NAMES[:2]]
                self.assertEqual(list(order), sorted(range(2), key=lambda index: places[index]))
                self.assertEqual("AB", "".join(first["members"][index]["letter"] for index in order))
        self.assertEqual({(0, 1), (1, 0)}, orders)

    def test_prompts(self) -> None:
        """Both prompts can be one's own."""
        options = 'member_prompt = "Be brief."\nchairman_prompt = "Pick: {responses} Now."'
        system = [{"role": "system", "content": "You are kind."}, *MESSAGES]
        with Sitting(said("a"), said("b"), chair=plain("c"), options=options) as sitting:
            sitting.ask()
            sitting.ask(messages=system)
            plainly, kindly = sitting.asked("alpha")
            chair = sitting.asked("chair")[0]["messages"][-1]["content"]
        self.assertEqual([{"role": "system", "content": "Be brief."}, *MESSAGES], plainly["messages"])
        self.assertEqual("You are kind.\n\nBe brief.", kindly["messages"][0]["content"])
        self.assertRegex(chair, r"(?s)^say something\n\nPick: <response .* Now\.$")

    def test_a_long_answer_is_cut(self) -> None:
        """What does not fit the chairman's window is cut at its end, with a note; a short answer beside it is not."""
        with Sitting(
            said("word " * 5000), said("short"), chair=plain("c"), models={"chair": "num_ctx = 2048\n"}
        ) as sitting:
            sitting.ask()
            text = sitting.asked("chair")[0]["messages"][-1]["content"]
        self.assertRegex(text, r"word\n\[Cut to fit: \d+ more characters\.\]")
        self.assertIn(":\nshort\n", text)
        self.assertLess(len(text), 2048 * 3)

    def test_images(self) -> None:
        """Members are shown an image; a chairman that can't see is told of it."""
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
        messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, image]}]
        for capabilities, seen in (('["completion"]', False), ('["completion", "vision"]', True)):
            models = {"chair": f"capabilities = {capabilities}\n"}
            with self.subTest(seen=seen), Sitting(said("a"), said("b"), chair=plain("c"), models=models) as sitting:
                self.assertEqual(200, sitting.ask(messages=messages).status)
                self.assertIn(image, sitting.asked("alpha")[0]["messages"][0]["content"])
                content = sitting.asked("chair")[0]["messages"][0]["content"]
                self.assertEqual(seen, image in content)
                self.assertIn("Response A", content[-1]["text"])

    def test_refused(self) -> None:
        """What only one model could do is a 400 that says so, and nobody is asked."""
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        wrong: dict[str, dict[str, Any]] = {
            "tools": {"tools": [tool]},
            "functions": {"functions": [tool["function"]]},
            "n": {"n": 2},
            "logprobs": {"logprobs": True},
            "model": {"path": "/v1/embeddings", "input": "x"},
        }
        with Sitting(said("a"), said("b"), chair=plain("c")) as sitting:
            for param, fields in wrong.items():
                with self.subTest(param):
                    response = sitting.ask(**fields)
                    error = response.json["error"]
                    self.assertEqual((400, "unsupported", param), (response.status, error["code"], error["param"]))
                    self.assertIn("council 'council'", error["message"])
            self.assertEqual(400, sitting.ask(path="/v1/completions", prompt="x").status)
            self.assertEqual([], [request for target in sitting.targets.values() for request in target.asked])


def ollama(member: str, chair: str, options: str = "") -> str:
    """A council of one model twice, and a chairman, each behind an Ollama."""
    return (
        f'[backends.o]\nkind = "ollama"\nurl = "{member}"\n[backends.c]\nkind = "ollama"\nurl = "{chair}"\n'
        '[models.m]\nbackend = "o"\nmodel = "m"\n[models.chair]\nbackend = "c"\nmodel = "c"\n'
        f'[models.council]\nkind = "council"\nmembers = ["m", "m"]\nchairman = "chair"\n{options}\n'
    )


class StreamTest(unittest.TestCase):
    def test_chairman_is_live(self) -> None:
        """Each piece of the chairman's answer is there before it goes on; one id, one role, the council's name."""
        gates = [threading.Event(), threading.Event()]
        script: list[Action] = [begun("openai", "one"), gates[0], part("openai", " two"), gates[1], ended("openai")]
        with Sitting(said("a"), said("b"), chair=script) as sitting:
            head, events = sitting.begin()
            chunks = [next_json(events)]
            gates[0].set()
            chunks.append(next_json(events))
            gates[1].set()
            *rest, done = events
        chunks += [event.json for event in rest]
        self.assertEqual("[DONE]", done.data)
        self.assertEqual(["one", " two"], [each["choices"][0]["delta"]["content"] for each in chunks[:2]])
        self.assertEqual(
            {("council", chunks[0]["id"], chunks[0]["created"])}, {(c["model"], c["id"], c["created"]) for c in chunks}
        )
        self.assertEqual([True, False, False], ["role" in each["choices"][0]["delta"] for each in chunks])
        self.assertEqual(("council(alpha,beta>chair)", "ok"), (head.header("x-served-by"), head.header("x-council")))

    def test_last_chunk(self) -> None:
        """The chunk with the finish reason, or the one with the usage if that was asked for, tells everybody's part."""
        chair = answer("openai", "fine", stream=True)
        for options in (None, {"include_usage": True}):
            with self.subTest(options=options), Sitting(said("a"), said("b"), chair=chair) as sitting:
                *chunks, last, done = frames(sitting.ask(stream=True, stream_options=options).body)
                self.assertEqual("[DONE]", done)
                self.assertEqual(["ok"] * 2, [each["status"] for each in last["portway"]["members"]])
                self.assertFalse(any("portway" in each for each in chunks))
                reasons = [c["finish_reason"] for each in (*chunks, last) for c in each["choices"]]
                self.assertEqual("stop", reasons[-1])

    def test_usage(self) -> None:
        """A client that asks for the usage gets that of all, once."""
        with ExitStack() as stack:
            one, chair = (stack.enter_context(Target(then=answer("ollama", "x"))) for _ in range(2))
            daemon = stack.enter_context(Daemon(ollama(one.url, chair.url)))
            client = stack.enter_context(daemon.client())
            asked = frames(ask(client, "council", stream=True, stream_options={"include_usage": True}).body)
            plainly = frames(ask(client, "council", stream=True).body)
        counts = [each["usage"]["total_tokens"] for each in asked[:-1] if each.get("usage")]
        self.assertEqual([21], counts)
        self.assertFalse([each for each in plainly[:-1] if "usage" in each])

    def progress(self, events: Iterator[Any], words: str) -> Any:
        """The first chunk that tells just this; those before it tell less."""
        return next(event.json for event in events if event.data and text_of([event.json], "reasoning") == words)

    def test_progress(self) -> None:
        """As long as members speak, their tokens are told as reasoning, under both of its names."""
        gate = threading.Event()
        slow: list[Action] = [begun("openai", "x", "y"), gate, ended("openai")]
        with calm(), Sitting(slow, said("b"), chair=said("c")) as sitting:
            head, events = sitting.begin(seed=1)
            first = next_json(events)
            self.assertRegex(text_of([first], "reasoning"), r"^Response A: .*; Response B: .*\n$")
            self.assertEqual("assistant", first["choices"][0]["delta"]["role"])
            sides = {"alpha": "2 tokens ..", "beta": "done, 1 token"}
            words = [sides[NAMES[index]] for index in council._drawn(2, 1)]
            line = f"Response A: {words[0]}; Response B: {words[1]}\n"
            if text_of([first], "reasoning") != line:
                self.progress(events, line)
            gate.set()
            *rest, done = events
        self.assertEqual(("[DONE]", None), (done.data, head.header("x-council")))
        chunks = [event.json for event in rest if event.data]
        self.assertEqual("c", text_of(chunks))
        self.assertFalse(any("role" in choice["delta"] for each in chunks for choice in each["choices"]))
        self.assertEqual("ok", chunks[-1]["portway"]["council"])

    def test_progress_is_calm(self) -> None:
        """Nothing is told as long as nothing is new, before the first token and after it; heartbeats keep the
        client awake."""
        start, go_on = threading.Event(), threading.Event()
        member: Reply = [start, begun("openai", "x"), go_on, ended("openai")]
        with calm(), Sitting(member, member, chair=said("c"), rest="[server]\nheartbeat = 0.01\n") as sitting:
            _, events = sitting.begin()
            for _ in range(10):
                self.assertEqual("portway", next(events).comment)
            start.set()
            told = self.progress(events, "Response A: 1 token ..; Response B: 1 token ..\n")
            for _ in range(10):
                self.assertEqual("portway", next(events).comment)
            go_on.set()
            chunks = [event.json for event in events if event.data not in (None, "[DONE]")]
        self.assertEqual(text_of([told], "reasoning"), text_of([told], "reasoning_content"))
        self.assertEqual("c", text_of(chunks))

    def test_facts_after_a_heartbeat(self) -> None:
        """Where a heartbeat has sent the headers, the first chunk says who answers, and the last one how it went."""
        gate = threading.Event()
        with Sitting([gate, said("a")], said("b"), chair=said("c"), rest="[server]\nheartbeat = 0.01\n") as sitting:
            head, events = sitting.begin()
            self.assertEqual("portway", next(events).comment)
            gate.set()
            chunks = [event.json for event in events if event.data not in (None, "[DONE]")]
        self.assertIsNone(head.header("x-served-by"))
        self.assertEqual("council(alpha,beta>chair)", chunks[0]["portway"]["served_by"])
        self.assertEqual("ok", chunks[-1]["portway"]["council"])

    def test_chairman_breaks_off(self) -> None:
        """A chairman that breaks off in its answer ends the stream with an error, and without [DONE]."""
        with Sitting(said("a"), said("b"), chair=[begun("openai", "half"), LAST_CHUNK]) as sitting:
            for _ in range(4):
                *chunks, last = frames(sitting.ask(stream=True).body)
                self.assertEqual("half", text_of(chunks))
                self.assertEqual("stream_broken", last["error"]["code"])
                self.assertEqual("failed", last["portway"]["council"])
            cooling = sitting.client.call("GET", "/health").json["cooling"]
        self.assertEqual(["chair"], [each["backend"] for each in cooling])


class PartialTest(unittest.TestCase):
    """Some of them can't."""

    def test_a_member_failed(self) -> None:
        """The rest go on, and it is told."""
        for stream in (False, True):
            chair = answer("openai", "fine", stream=stream)
            with self.subTest(stream=stream), Sitting(BROKEN, said("b"), chair=chair) as sitting:
                response = sitting.ask(stream=stream)
                text = sitting.asked("chair")[0]["messages"][-1]["content"]
                told = frames(response.body)[-2]["portway"] if stream else response.json["portway"]
                self.assertEqual(
                    ("degraded", "council(beta>chair)"), tuple(map(response.header, ("x-council", "x-served-by")))
                )
                self.assertEqual(["server_error", "ok"], [each["status"] for each in told["members"]])
                self.assertEqual((1, 0), (text.count("</response>"), text.count("it broke")))

    def test_a_member_broke_off(self) -> None:
        """Half an answer is none."""
        with Sitting([begun("openai", "half"), LAST_CHUNK], said("b"), chair=plain("c")) as sitting:
            told = sitting.ask().json["portway"]
            self.assertNotIn("half", sitting.asked("chair")[0]["messages"][-1]["content"])
        self.assertEqual("stream_broken", told["members"][0]["status"])

    def test_a_members_chain(self) -> None:
        """Where a member fails, or breaks off what nobody has read yet, the next in its chain answers; it is told."""
        for alpha in (BROKEN, [begun("openai", "half"), LAST_CHUNK], said("<think>x</think>")):
            models = {"alpha": 'fallback = ["beta"]\n'}
            options = 'members = ["alpha", "alpha"]'
            with Sitting(alpha, said("b"), chair=plain("c"), models=models, options=options) as sitting:
                response = sitting.ask()
                text = sitting.asked("chair")[0]["messages"][-1]["content"]
                self.assertEqual((2, 0), (text.count(":\nb\n"), text.count("half")))
                self.assertEqual(
                    ("degraded", "council(beta,beta>chair)"), tuple(map(response.header, ("x-council", "x-served-by")))
                )
                off = sitting.ask(headers={"X-Portway-Fallback": "off"})
                self.assertEqual((502, "no_quorum"), (off.status, off.json["error"]["code"]))

    def test_only_thinking(self) -> None:
        """An answer that is all thinking is empty."""
        with Sitting(said("<think>x</think>"), said("b"), chair=plain("c")) as sitting:
            self.assertEqual("empty_answer", sitting.ask().json["portway"]["members"][0]["status"])

    def test_out_of_time(self) -> None:
        """What a member has said when its time is over counts, with a note; the chairman still has its time."""
        slow: list[Action] = [begun("openai", "so far"), HANG]
        with Sitting(slow, said("b"), chair=plain("c"), options="timeouts = { total = 1.0 }") as sitting:
            response = sitting.ask()
            text = sitting.asked("chair")[0]["messages"][-1]["content"]
        self.assertEqual("cut", response.json["portway"]["members"][0]["status"])
        self.assertIn("so far\n[It was cut off here.]", text)
        self.assertLess(response.json["portway"]["members"][0]["seconds"], 0.9)

    def test_cut_by_length(self) -> None:
        """An answer that its limit has cut off is marked so."""
        reply = sse_of("long", "length")
        with Sitting(reply, said("b"), chair=plain("c")) as sitting:
            self.assertEqual("cut", sitting.ask().json["portway"]["members"][0]["status"])
            self.assertIn("long\n[It was cut off here.]", sitting.asked("chair")[0]["messages"][-1]["content"])

    def test_fail_on_partial(self) -> None:
        """on_partial = "fail": one failure is everybody's, at once; who still speaks is sent home."""
        gate, options = threading.Event(), 'on_partial = "fail"'
        with Sitting([gate, BROKEN], [begun("openai", "x"), HANG], chair=plain("c"), options=options) as sitting:
            sitting.client.request("POST", CHAT, {"model": "council", "messages": MESSAGES})
            sitting.await_asked("beta")
            gate.set()
            response = sitting.client.response()
            self.assertEqual((502, "no_quorum"), (response.status, response.json["error"]["code"]))
            self.assertEqual("failed", response.header("x-council"))
            self.assertTrue(connection_of(sitting.targets["beta"]).closed.wait(10))
            self.assertEqual([], sitting.asked("chair"))
            statuses = [each["status"] for each in response.json["portway"]["members"]]
            self.assertEqual(["server_error", "dismissed"], statuses)

    def test_no_quorum(self) -> None:
        """Too few answers are a 502 that tells what became of each; no error's text is ever an answer."""
        for stream in (False, True):
            with self.subTest(stream=stream), Sitting(BROKEN, said("b"), BROKEN, chair=plain("c")) as sitting:
                response = sitting.ask(stream=stream)
                error = response.json["error"]
                self.assertEqual((502, "no_quorum", "api_error"), (response.status, error["code"], error["type"]))
                for word in ("2 of its 3 members failed, and 2 have to answer", "alpha", "gamma", "it broke"):
                    self.assertIn(word, error["message"])
                self.assertEqual("false", response.header("x-should-retry"))
                self.assertRegex(response.header("x-portway-attempts") or "", r"alpha=server_error.*gamma=server_error")
                self.assertNotIn("choices", response.json)
                self.assertEqual([], sitting.asked("chair"))

    def test_no_quorum_after_progress(self) -> None:
        """Once progress was told, the error is the stream's last event."""
        gate = threading.Event()
        script: list[Action] = [begun("openai", "x"), gate, LAST_CHUNK]
        with calm(), Sitting(script, script, chair=said("c")) as sitting:
            _, events = sitting.begin()
            self.assertIn("token", next_json(events)["choices"][0]["delta"]["reasoning"])
            gate.set()
            *_, last = (event.json for event in events if event.data is not None)
        self.assertEqual("no_quorum", last["error"]["code"])
        self.assertEqual(["stream_broken"] * 2, [each["status"] for each in last["portway"]["members"]])

    def test_quorum_is_configured(self) -> None:
        """`quorum` is how many answers are enough."""
        for quorum, status in ((1, 200), (2, 502)):
            with (
                self.subTest(quorum=quorum),
                Sitting(BROKEN, said("b"), chair=plain("c"), options=f"quorum = {quorum}") as s,
            ):
                self.assertEqual(status, s.ask().status)

    def test_the_request_is_at_fault(self) -> None:
        """A prompt that is too long for every member is a 400, so that an agent makes it shorter."""
        with Sitting(OVERLONG, OVERLONG, chair=plain("c")) as sitting:
            response = sitting.ask()
        self.assertEqual((400, "context_length_exceeded"), (response.status, response.json["error"]["code"]))

    def test_nobody_could_serve_it(self) -> None:
        """A message that can't be read is the client's own mistake, with its place, whoever would be asked."""
        with Target() as target, Daemon(ollama(target.url, target.url)) as daemon, daemon.client() as client:
            response = ask(client, "council", messages=[{"role": "user", "content": 5}])
        self.assertEqual((400, "messages[0].content"), (response.status, response.json["error"]["param"]))
        self.assertNotIn("portway", response.json)

    def test_chairmans_chain(self) -> None:
        """A chairman that fails is followed by the next in its chain, and that is told."""
        with Sitting(said("a"), said("b"), chair=BROKEN, spare=plain("from spare")) as sitting:
            response = sitting.ask()
        self.assertEqual("from spare", response.json["choices"][0]["message"]["content"])
        self.assertEqual(
            ("degraded", "council(alpha,beta>spare)"), tuple(map(response.header, ("x-council", "x-served-by")))
        )

    def test_the_next_chairman_reads_what_it_can(self) -> None:
        """Who follows the chairman and has a smaller window, or no eyes, is asked what fits it."""
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, image]}]
        models = {
            "chair": "num_ctx = 32768\n",
            "spare": 'num_ctx = 2048\ncapabilities = ["completion"]\n',
        }
        with Sitting(
            said("word " * 5000), said("b"), chair=BROKEN, spare=plain("from spare"), models=models
        ) as sitting:
            response = sitting.ask(messages=messages)
            [[*_, first]] = [body["messages"] for body in sitting.asked("chair")]
            [[*_, second]] = [body["messages"] for body in sitting.asked("spare")]
        self.assertEqual("council(alpha,beta>spare)", response.header("x-served-by"))
        self.assertEqual(["text", "image_url", "text"], [each["type"] for each in first["content"]])
        self.assertNotIn("Cut to fit", first["content"][-1]["text"])
        self.assertEqual(["text", "text", "text"], [each["type"] for each in second["content"]])
        self.assertIn("Cut to fit", second["content"][-1]["text"])
        self.assertLess(len(second["content"][-1]["text"]), 2048 * 3)

    def test_the_next_chairman_has_a_smaller_window(self) -> None:
        """The same where only the windows differ; without fallback nobody follows; nor once the time is over."""
        models = {"chair": "num_ctx = 32768\n", "spare": "num_ctx = 2048\n"}
        with Sitting(said("word " * 5000), said("b"), chair=BROKEN, spare=plain("c"), models=models) as sitting:
            self.assertEqual("council(alpha,beta>spare)", sitting.ask().header("x-served-by"))
            texts = [sitting.asked(name)[0]["messages"][-1]["content"] for name in ("chair", "spare")]
            self.assertEqual([False, True], ["Cut to fit" in text for text in texts])
            off = sitting.ask(headers={"X-Portway-Fallback": "off"})
            self.assertEqual(("council(alpha)", 1), (off.header("x-served-by"), len(sitting.asked("spare"))))
        late = "timeouts = { total = 0.6 }"
        with Sitting(
            said("a"), said("b"), chair=HANG_AT_ONCE, spare=HANG_AT_ONCE, models=models, options=late
        ) as sitting:
            self.assertEqual("council(alpha)", sitting.ask().header("x-served-by"))
            self.assertEqual(1, len(sitting.asked("spare")))

    def test_no_chairman_is_asked_twice_for_nothing(self) -> None:
        """Where all of the chain can read the same, each of them is asked once."""
        models = {"chair": "num_ctx = 4096\n", "spare": "num_ctx = 4096\n"}
        with Sitting(said("a"), said("b"), chair=BROKEN, spare=BROKEN, models=models) as sitting:
            self.assertEqual("council(alpha)", sitting.ask().header("x-served-by"))
            self.assertEqual([1, 1], [len(sitting.asked(name)) for name in ("chair", "spare")])

    def test_no_fallback(self) -> None:
        """X-Portway-Fallback: off holds for everybody within."""
        with Sitting(said("a"), said("b"), chair=BROKEN, spare=plain("from spare")) as sitting:
            response = sitting.ask(headers={"X-Portway-Fallback": "off"})
            self.assertEqual([], sitting.asked("spare"))
        self.assertEqual("council(alpha)", response.header("x-served-by"))

    def test_no_fallback_further_down(self) -> None:
        """It also holds for a council within a council."""
        inner = '[models.inner]\nkind = "council"\nmembers = ["alpha", "alpha"]\nchairman = "chair"\n'
        options = f'members = ["inner", "inner"]\n{inner}'
        with Sitting(said("a"), chair=BROKEN, spare=said("from spare"), options=options) as sitting:
            response = sitting.ask(headers={"X-Portway-Fallback": "off"})
            self.assertEqual([], sitting.asked("spare"))
        self.assertEqual(200, response.status)

    def test_a_member_in_the_chairmans_place(self) -> None:
        """Without any chairman a member's answer is sent, and says plainly what it is."""
        for stream in (False, True):
            with self.subTest(stream=stream), Sitting(BROKEN, said("As Qwen, I say b."), chair=BROKEN) as sitting:
                response = sitting.ask(stream=stream)
                chunks = frames(response.body) if stream else []
                text = text_of(chunks) if stream else response.json["choices"][0]["message"]["content"]
                told = chunks[-2]["portway"] if stream else response.json["portway"]
                label, own = text.split("\n\n", 1)
                self.assertEqual(
                    "[The chairman chair could not answer (server_error). "
                    "This is the answer of one member, beta, as it was.]",
                    label,
                )
                self.assertEqual("As Qwen, I say b.", own)
                self.assertEqual(
                    ("degraded", "council(beta)"), tuple(map(response.header, ("x-council", "x-served-by")))
                )
                self.assertEqual("server_error", told["chairman"]["status"])

    def test_the_best_member_in_the_chairmans_place(self) -> None:
        """A whole answer rather than one that was cut off, and that one rather than none, told as what it is."""
        for second, who, reason in ((said("b"), "beta", "stop"), (BROKEN, "alpha", "length")):
            with Sitting(sse_of("long", "length"), second, chair=BROKEN) as sitting:
                response = sitting.ask()
            self.assertEqual(f"council({who})", response.header("x-served-by"))
            self.assertEqual(reason, response.json["choices"][0]["finish_reason"])

    def test_no_member_in_the_chairmans_place(self) -> None:
        """Where a form was asked for that only the chairman knew of, its failure stays a failure."""
        with Sitting(said("a"), said("b"), chair=BROKEN) as sitting:
            response = sitting.ask(response_format={"type": "json_object"})
            self.assertEqual((502, "server_error"), (response.status, response.json["error"]["code"]))
        wrong = json_reply(error_body("openai", "temperature: wrong", "invalid_request_error", 400), 400)
        with Sitting(said("a"), said("b"), chair=wrong) as sitting:
            self.assertEqual(400, sitting.ask().status)


def sse_of(text: str, reason: str) -> bytes:
    return sse_reply([delta(content=text), finish(reason)])


def connection_of(target: Target) -> ScriptedConnection:
    """The connection on which it was asked first."""
    number = target.asked[0].connection
    return next(found for found in map(target.connection, range(target.connections)) if found.number == number)


class ChainTest(unittest.TestCase):
    """Where a chain goes on after its first: behind the one that broke off, not at that one's own fallback."""

    @contextmanager
    def council(self, lines: Mapping[str, str], **scripts: Reply) -> Iterator[tuple[RawResponse, dict[str, int]]]:
        """The answer, and how often each was asked."""
        with ExitStack() as stack:
            targets = {name: stack.enter_context(Target(then=reply)) for name, reply in scripts.items()}
            toml = "".join(
                f'[backends.{name}]\nkind = "openai"\nurl = "{target.url}"\n'
                f'[models.{name}]\nbackend = "{name}"\nmodel = "physical-{name}"\n{lines.get(name, "")}'
                for name, target in targets.items()
            )
            toml += '[models.council]\nkind = "council"\nmembers = ["alpha", "beta"]\nchairman = "chair"\n'
            daemon = stack.enter_context(Daemon(toml))
            response = ask(stack.enter_context(daemon.client()), "council")
            self.assertEqual([], [line for line in daemon.log if "unforeseen" in line])
            yield response, {name: len(target.asked) for name, target in targets.items()}

    def test_a_member_that_breaks_off(self) -> None:
        """Its second fallback answers, though the first fails or breaks off as well, and has one of its own."""
        halves: list[Action] = [begun("openai", "half"), Close()]
        lines = {"alpha": 'fallback = ["gamma", "delta"]\n', "gamma": 'fallback = ["other"]\n'}
        rest: dict[str, Reply] = {"beta": said("b"), "delta": said("d"), "other": halves, "chair": plain("c")}
        for gamma in (BROKEN, halves):
            with self.subTest(gamma=gamma), self.council(lines, alpha=halves, gamma=gamma, **rest) as (response, asked):
                self.assertEqual((200, 1, 0), (response.status, asked["delta"], asked["other"]))

    def test_a_chairman_that_can_not_read_it(self) -> None:
        """Those behind it are asked anew, with those behind them as their chain."""
        lines = {"chair": 'num_ctx = 8000\nfallback = ["first", "second"]\n', "first": "num_ctx = 4000\n"}
        lines |= {"second": "num_ctx = 4000\n"}
        scripts = {"alpha": said("a"), "beta": said("b"), "chair": OVERLONG, "first": BROKEN, "second": plain("c")}
        with self.council(lines, **scripts) as (response, asked):
            self.assertEqual((200, 1), (response.status, asked["second"]))
            self.assertEqual("council(alpha,beta>second)", response.header("x-served-by"))


class ClientGoneTest(unittest.TestCase):
    def check(self, sitting: Sitting, waiting: Sequence[str], client: RawClient) -> None:
        """Once the client goes, those who work for it are let go at once, and nothing of them is left."""
        for name in waiting:
            sitting.await_asked(name)
        left = time.monotonic()
        client.close()
        for name in waiting:
            connection = connection_of(sitting.targets[name])
            self.assertTrue(connection.closed.wait(10))
            self.assertLess(connection.closed_at - left, 0.3)
        wait_for(lambda: not member_threads(), "the members' threads to end")

    def test_while_members_answer(self) -> None:
        """All members are cancelled: before and in the middle of their answers, streamed and not."""
        for stream in (False, True):
            with (
                self.subTest(stream=stream),
                Sitting(HANG_AT_ONCE, [begun("openai", "x"), HANG], chair=plain("c")) as sitting,
            ):
                client = sitting.daemon.client()
                client.request("POST", CHAT, {"model": "council", "messages": MESSAGES, "stream": stream})
                self.check(sitting, ("alpha", "beta"), client)
                self.assertEqual([], sitting.asked("chair"))

    def test_while_the_chairman_answers(self) -> None:
        """So is the chairman."""
        with Sitting(said("a"), said("b"), chair=[begun("openai", "x"), HANG]) as sitting:
            client = sitting.daemon.client()
            client.request("POST", CHAT, {"model": "council", "messages": MESSAGES, "stream": True})
            next(client.events(client.head()))
            self.check(sitting, ("chair",), client)

    def test_nothing_is_left(self) -> None:
        """After many councils, whole, failed and cancelled, there are no more threads and sockets than before."""
        rest = "[cooldown]\nfailures = 1000\n"
        with ExitStack() as stack:
            sitting = Sitting(said("a"), BROKEN, chair=plain("c"), rest=rest, backends="max_idle = 0")
            stack.enter_context(sitting)
            forgotten = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always", ResourceWarning)
            sitting.ask()
            before = descriptors()
            for stream in (False, True) * 10:
                self.assertEqual(200, sitting.ask(stream=stream).status)
                self.assertEqual(400, sitting.ask(n=2).status)
            self.assertEqual([], member_threads())
            wait_for(lambda: descriptors() <= before, "the last connections' end")
            self.assertEqual([], [each.message for each in forgotten])


HANG_AT_ONCE: Reply = [HANG]


class TogetherTest(unittest.TestCase):
    """Whether members run at the same time."""

    def models(self, *places: tuple[str, str, str]) -> list[Model]:
        """(kind, backend, model) each."""
        backends = {name: config.Backend(name, kind, "", "http", "h", 1) for kind, name, _ in places}  # type: ignore[arg-type]
        return [Model(f"m{index}", backends[name], model) for index, (_, name, model) in enumerate(places)]

    def test_rule(self) -> None:
        """Two different models behind one Ollama run one after the other unless it is known that they fit;
        everybody else runs at once."""
        same = self.models(("ollama", "o", "x"), ("ollama", "o", "x"))
        different = self.models(("ollama", "o", "x"), ("ollama", "o", "y"))
        apart = self.models(("ollama", "o", "x"), ("ollama", "p", "y"), ("openai", "q", "a"), ("openai", "q", "b"))
        for models, unknown in ((same, True), (different, False), (apart, True)):
            self.assertEqual(unknown, council.run_together(models, "auto", lambda _: None))
            for fits, never in ((False, True), (True, False)):
                answers = {True: lambda _: True, False: lambda _: False}
                self.assertEqual(fits, council.run_together(models, "auto", answers[fits]))
                self.assertEqual(fits, council.run_together(models, fits, answers[never]))

    def test_one_after_the_other(self) -> None:
        """In turn, nobody is asked before the one before has ended; the answer says so."""
        gate = threading.Event()
        with Sitting(
            [begun("openai", "a"), gate, ended("openai")], said("b"), chair=plain("c"), options="parallel = false"
        ) as s:
            s.client.request("POST", CHAT, {"model": "council", "messages": MESSAGES})
            s.await_asked("alpha")
            self.assertEqual([], s.asked("beta"))
            gate.set()
            self.assertEqual("serial", s.client.response().json["portway"]["mode"])
            self.assertGreater(s.targets["beta"].asked[0].at, s.targets["alpha"].asked[0].at)

    def test_at_once(self) -> None:
        """In parallel both are asked before either has answered."""
        gate = threading.Event()
        with Sitting([gate, said("a")], [gate, said("b")], chair=plain("c")) as sitting:
            sitting.client.request("POST", CHAT, {"model": "council", "messages": MESSAGES})
            for name in NAMES[:2]:
                sitting.await_asked(name)
            gate.set()
            self.assertEqual("parallel", sitting.client.response().json["portway"]["mode"])

    def test_turns(self) -> None:
        """In turn, the same model is asked twice in a row, and the chairman's own comes last."""
        models = self.models(("ollama", "o", "c"), ("ollama", "o", "x"), ("ollama", "o", "y"), ("ollama", "o", "x"))
        seats = [council.Seat("", model, {}) for model in models]
        (lane,) = council._lanes(seats, models[0], together=False)
        self.assertEqual(["m1", "m3", "m2", "m0"], [seat.model.name for seat in lane])

    def test_shares_of_time(self) -> None:
        """In turn, a member that hangs leaves the next one its time."""
        options = "parallel = false\ntimeouts = { total = 1.2 }"
        with Sitting(HANG_AT_ONCE, said("b"), chair=plain("c"), options=options) as sitting:
            told = sitting.ask().json["portway"]
        self.assertEqual(["first_token_timeout", "ok"], [each["status"] for each in told["members"]])
        self.assertLess(told["members"][0]["seconds"], 0.6)


class RealServerTest(unittest.TestCase):
    """A real llama-server, and OpenAI's own package as the client."""

    server: ClassVar[LlamaServer]
    toml: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = cls.enterClassContext(LlamaServer(TinyModel(), "-np", "2", "-t", "1"))
        cls.toml = (
            f'[backends.l]\nkind = "openai"\nurl = "{cls.server.url}/v1"\n'
            '[models.m]\nbackend = "l"\nmodel = "tiny"\nparams = { ignore_eos = true }\n'
            '[models.council]\nkind = "council"\nmembers = ["m", "m"]\nchairman = "m"\n'
        )

    def test_plain(self) -> None:
        """Two members and a chairman, each a request to the server; all tokens are counted."""
        with Daemon(self.toml) as daemon, daemon.client() as client:
            response = ask(client, "council", max_tokens=8)
        body = response.json
        self.assertEqual(("council(m,m>m)", 200), (response.header("x-served-by"), response.status))
        self.assertEqual(24, body["usage"]["completion_tokens"])
        self.assertEqual(["cut", "cut"], [each["status"] for each in body["portway"]["members"]])  # by max_tokens

    def test_sdk_reads_the_stream(self) -> None:
        """The SDK reads progress as reasoning, then the chairman's text, the finish reason and the usage."""
        try:
            import openai
        except ImportError:
            self.skipTest("the package `openai` is not installed")
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(council, "PROGRESS_EVERY", 0.01))
            daemon = stack.enter_context(Daemon(self.toml))
            client = stack.enter_context(openai.OpenAI(base_url=daemon.url, api_key="unused", timeout=30.0))
            stream = client.chat.completions.create(
                model="council",
                messages=[{"role": "user", "content": "we walk over the bridge"}],
                max_tokens=64,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
        choices = [choice for each in chunks for choice in each.choices]
        self.assertTrue("".join(choice.delta.content or "" for choice in choices))
        self.assertEqual(["length"], [choice.finish_reason for choice in choices if choice.finish_reason])
        self.assertEqual(192, chunks[-1].usage.completion_tokens if chunks[-1].usage else None)
        told = (chunks[-1].model_extra or {})["portway"]
        self.assertEqual("council(m,m>m)", told["served_by"])
        self.assertEqual({"council"}, {each.model for each in chunks})

    def test_client_gone(self) -> None:
        """When the client leaves, the server stops working on both members' answers."""
        with LlamaServer(TinyModel(context=65536, endless=True), "-np", "2", "-t", "1") as server:
            toml = self.toml.replace(self.server.url, server.url)
            with Daemon(toml) as daemon:
                client = daemon.client()
                client.request("POST", CHAT, {"model": "council", "messages": MESSAGES})
                wait_for(lambda: server.busy_slots() == 2, "both members' working")
                client.close()
                wait_for(lambda: server.busy_slots() == 0, "the end of the work")
                wait_for(lambda: not member_threads(), "the members' threads to end")


if __name__ == "__main__":
    unittest.main()
