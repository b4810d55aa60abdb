"""Many requests over chains whose backends are killed and started again all the time.

Each request must be answered, by whom X-Served-By says and with the very words that one says to it, or fail with one
clear error; a stream that has begun may break, with an error as its last event. None may be left without a byte of an
answer, or be answered twice, and each has one line in the log that says the same.
"""

from __future__ import annotations

import itertools
import random
import re
import tempfile
import threading
import time
import unittest
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from portway.standin.answers import Ask, StandInModel, reply
from scripts.torture_rows import PortwayProcess, Row, StandInProcess, wait_for
from scripts.torture_rows.client import Broken, Client, Reply
from scripts.torture_rows.machine import is_clear_error
from scripts.torture_rows.matrix import WHO
from scripts.torture_rows.verdict import read_attempts

CLIENTS = 16
UP = (0.2, 0.8)  # seconds that a backend is left alone, from .. to
DOWN = (0.02, 0.4)  # seconds that it stays dead
RARELY = 5.0  # times as long for the last of the chain, as there would be little but errors else
STANDINS = ("a", "b", "c")
CONFIG = """
[memory]
enabled = false
[cooldown]
seconds = 0.5
"""


def dice(*seed: object) -> random.Random:
    """The same throws for the same seed."""
    return random.Random(repr(seed))  # noqa: S311 - nothing here is secret


class Mortal(Protocol):
    """A backend that can be killed, and started again on the port it had."""

    def kill(self) -> None:
        """End it at once."""

    def start(self) -> None:
        """Start it, and wait until it serves."""

    @property
    def url(self) -> str:
        """Its address."""
        ...


@dataclass(slots=True)
class Seen:
    """What came of the requests. wrong: what must not be."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    served_by: dict[str, str | None] = field(default_factory=dict)  # by client
    kills: int = 0


def fault_killed_backends(requests: int = 20_000, seed: int = 1) -> Row:
    """Backends are killed at random: stand-ins, and real llama-servers where there is one."""
    with tempfile.TemporaryDirectory(prefix="portway-torture-") as name, ExitStack() as stack:
        folder = Path(name)
        backends: dict[str, Mortal] = {
            each: stack.enter_context(StandInProcess(folder, each, "--model", f"model-{each}=1GB")) for each in STANDINS
        }
        backends |= dict(llama_servers(stack))
        toml, models = configured(backends)
        portway = stack.enter_context(PortwayProcess(folder, toml))
        seen = Seen()
        stop = threading.Event()
        killers = [
            threading.Thread(target=_kill, args=(backend, stop, dice(seed, each), seen, RARELY if each == "c" else 1.0))
            for each, backend in backends.items()
        ]
        for killer in killers:
            killer.start()
        started = time.monotonic()
        ask_all(portway, models, requests, seen, seed)
        seconds = time.monotonic() - started
        stop.set()
        for killer in killers:
            killer.join()
        check_log(portway, seen)
        if "unforeseen" in portway.said:
            seen.wrong.append(portway.said[:500])
    said = ", ".join(f"{count} {what}" for what, count in seen.outcomes.most_common())
    real = "stand-ins and real llama-servers" if len(backends) > len(STANDINS) else "stand-ins"
    note = f"{seen.kills} kills of {real} in {seconds:.0f} s: {said}"
    return Row(
        "backends killed and started again at random",
        requests,
        max(0, requests - len(seen.wrong)),
        " | ".join([*seen.wrong[:3], note]),
    )


def llama_servers(stack: ExitStack) -> Iterator[tuple[str, Mortal]]:
    """Two real llama-servers with tiny models, if there is the program."""
    from tests.llama_server import LlamaServer  # the tests know how to find the program, and to make a model
    from tests.tiny_gguf import TinyModel

    try:
        for name in ("real-a", "real-b"):
            yield name, stack.enter_context(LlamaServer(TinyModel(), "-np", "4", "-t", "1"))
    except unittest.SkipTest:
        return


def configured(backends: dict[str, Mortal]) -> tuple[str, list[str]]:
    """A models.toml, and the models to ask: each falls back to the next one, the last to nobody."""
    names: list[str] = [name for name in ("a", "real-a", "b", "real-b", "c") if name in backends]
    text = CONFIG
    for position, name in enumerate(names):
        kind = "openai" if name.startswith("real") else "ollama"
        text += f'[backends.{name}]\nkind = "{kind}"\nurl = "{backends[name].url}"\n'
        text += f'[models.{name}]\nbackend = "{name}"\nmodel = "model-{name}"\n'
        text += "timeouts = { connect = 2, first_token = 10, idle = 10, total = 20 }\n"
        text += f"fallback = {names[position + 1 : position + 4]}\n".replace("'", '"')
    return text, names


def _kill(backend: Mortal, stop: threading.Event, chance: random.Random, seen: Seen, rarely: float = 1.0) -> None:
    """Kill it, and start it again, until it is over; it lives then."""
    while not stop.wait(chance.uniform(*UP) * rarely):
        backend.kill()
        seen.kills += 1
        stop.wait(chance.uniform(*DOWN))
        backend.start()


def ask_all(portway: PortwayProcess, models: Sequence[str], requests: int, seen: Seen, seed: int = 1) -> None:
    """So many requests, by CLIENTS at a time, each on a connection that it keeps."""
    numbers = itertools.count()
    lock = threading.Lock()  # guards `seen`

    def work() -> None:
        client: Client | None = None
        while (number := next(numbers)) < requests:
            try:
                client = client if client is not None and client.is_open else Client(portway.port)
                ask = Request(number, models, seed)
                outcome, wrong, served_by = ask.outcome_of(client)
            except OSError as exc:  # not even a connection
                outcome, wrong, served_by = "not connected", [f"{number}: {exc}"], None
            with lock:
                seen.outcomes[outcome] += 1
                seen.wrong += wrong
                seen.served_by[f"n-{number}"] = served_by
        if client is not None:
            client.close()

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Request:
    """The number-th request: which model it asks and how follows from its number."""

    def __init__(self, number: int, models: Sequence[str], seed: int) -> None:
        chance = dice(seed, number)
        self.number = number
        self.model = chance.choice(models)
        self.stream = chance.random() < 0.5
        self.text = f"number {number}, {chance.randrange(10**9)}"

    def outcome_of(self, client: Client) -> tuple[str, list[str], str | None]:
        """What came of it in a word, what is wrong with that, and who served it."""
        headers = {WHO: f"n-{self.number}"}
        try:
            reply = client.chat(self.model, self.text, stream=self.stream, headers=headers, max_tokens=64)
        except (Broken, OSError) as exc:
            client.close()
            return "broken", [f"{self.number}: {type(exc).__name__}: {exc}"], None
        served_by = reply.headers.get("x-served-by")
        outcome, wrong = self._judge(reply, served_by)
        return outcome, [f"{self.number} ({self.model}, {outcome}): {each}" for each in wrong], served_by

    def _judge(self, reply: Reply, served_by: str | None) -> tuple[str, list[str]]:
        if reply.status >= 400:
            clear = is_clear_error(reply) and served_by is None
            return "clear errors", [] if clear else [f"{reply.status} {reply.headers} {reply.body[:300]!r}"]
        if served_by is None:
            return "nobody's", [str(reply.headers)]
        wrong = self._wrong_words(reply, served_by)
        if reply.errors:
            codes = [error.get("code") for error in reply.errors]
            wrong += [] if codes == ["stream_broken"] and not reply.is_done else [f"errors {codes}"]
            return "streams that broke", wrong
        wrong += [] if reply.is_stream == self.stream else ["another form than was asked for"]
        wrong += [] if not self.stream or reply.is_done else ["no [DONE]"]
        attempts = read_attempts(reply.headers.get("x-portway-attempts", ""))
        if served_by == self.model and attempts[:1] != [(self.model, "cooling")]:
            return "answers", wrong + ([] if not attempts else [f"attempts {attempts}"])
        wrong += [] if attempts and attempts[-1] == (served_by, "ok") else [f"attempts {attempts}"]
        return "fallbacks", wrong

    def _wrong_words(self, reply: Reply, served_by: str) -> list[str]:
        """A stand-in says the same to the same; a real model says something."""
        text = reply.text
        if served_by not in STANDINS:
            return [] if re.search(r"\w", text) else [f"says {text!r}"]
        right = said_by(served_by, self.text)
        if text == right or (reply.errors and text and right.startswith(text)):
            return []
        return [f"{served_by} says {text!r}, not {right!r}"]


def said_by(standin: str, text: str, most: int = 64) -> str:
    """What a stand-in says to a message."""
    ask = Ask([{"role": "user", "content": text}], limit=most)
    return "".join(reply(StandInModel(f"model-{standin}", capabilities=("completion",)), ask).content)


def check_log(portway: PortwayProcess, seen: Seen) -> None:
    """One whole line for each request, which says the same as the answer did."""

    def are_there() -> bool:
        return len(portway.lines()) >= len(seen.served_by)

    try:
        wait_for(are_there, lambda: f"{len(portway.lines())} lines of {len(seen.served_by)}")
    except (AssertionError, ValueError) as exc:
        seen.wrong.append(f"log: {exc}")
        return
    count: Counter[str] = Counter()
    for line in portway.lines():
        who = line["client"]
        count[who] += 1
        if line["served_by"] != seen.served_by.get(who):
            seen.wrong.append(f"log: {who} was served by {line['served_by']}, not {seen.served_by.get(who)}")
    seen.wrong += [f"log: {count[who]} lines of {who}" for who in seen.served_by if count[who] != 1]
