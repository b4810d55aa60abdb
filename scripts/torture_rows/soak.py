"""A soak: mixed traffic for as long as one likes. What the daemon holds must not grow, nor what it takes to answer.

Every second it is seen how much memory, how many threads and descriptors the daemon has; a straight line is laid
through the samples (least squares), the first part of them left out, in which caches and pools fill. Requests are of
every kind: plain and streamed, anew and out of the cache, over a chain whose first member fails, given up by their
client in the middle, and refused.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.torture_rows import PortwayProcess, Row
from scripts.torture_rows.client import Broken, Client, Reply
from scripts.torture_rows.crash import scene
from scripts.torture_rows.load import dice
from scripts.torture_rows.saboteur import Drip, Saboteur
from scripts.torture_rows.speech import Speech, pieces, response

CLIENTS = 6
EVERY = 1.0  # seconds between two samples
WARM_UP = 0.3  # of the time
LEAST = 10.0  # seconds below which a slope means nothing
PAUSE = 0.005  # seconds between two requests of a client: a busy daemon, not a saturated one, whose p99 is a queue's

# what may be gained over the whole time that is looked at; a leak of a descriptor or a thread a thousand requests is
# far beyond it
MORE_THREADS = 2.0
MORE_DESCRIPTORS = 4.0
MORE_MEMORY = 3.0  # MB, and so much ..
MORE_MEMORY_RATE = 4.0  # .. MB an hour
SLOWER = 2.0  # times the p99 of the first third, and ..
SLOWER_MS = 30.0  # .. so much more than it: a busy machine
MORE = """
[models.chain]
backend = "openai"
model = "broken"
fallback = ["ollama"]
"""


@dataclass(slots=True)
class Samples:
    """What was seen: at each time (seconds) threads, descriptors, megabytes; and of each answer when and how long."""

    at: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)
    descriptors: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    answers: list[tuple[float, float]] = field(default_factory=list)  # of plain ones that a backend gave at once
    wrong: list[str] = field(default_factory=list)
    requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards what the clients write


def fault_soak(seconds: float = 180.0) -> Row:
    """Mixed traffic for so long."""
    samples = Samples()
    with scene(MORE) as (first, portway):
        _prepare(first)
        stop = threading.Event()
        clients = [threading.Thread(target=_work, args=(portway, n, stop, samples)) for n in range(CLIENTS)]
        started = time.monotonic()
        for client in clients:
            client.start()
        while time.monotonic() < started + seconds:
            stop.wait(EVERY)
            _sample(portway, samples, time.monotonic() - started)
        stop.set()
        for client in clients:
            client.join()
        if "unforeseen" in portway.said:
            samples.wrong.append(portway.said[:500])
    complaints, note = judge(samples, seconds)
    return Row(
        f"a soak of {seconds:g} s",
        samples.requests,
        samples.requests - len(complaints),
        "; ".join([*complaints[:5], note]),
    )


def judge(samples: Samples, seconds: float) -> tuple[list[str], str]:
    """What must not be, and the figures in words."""
    from_ = next((i for i, at in enumerate(samples.at) if at >= seconds * WARM_UP), 0)
    at = samples.at[from_:]
    span = (at[-1] - at[0]) if len(at) > 1 else 0.0
    slopes = {
        name: slope(at, values[from_:])
        for name, values in (
            ("threads", samples.threads),
            ("descriptors", samples.descriptors),
            ("MB", samples.memory),
        )
    }
    said = ", ".join(f"{value * span:+.2f} {name}" for name, value in slopes.items())
    early, late = (p99(part) for part in _thirds(samples.answers, seconds))
    note = (
        f"slopes over {span:.0f} s: {said} (at the end {samples.memory[-1]:.1f} MB, {samples.threads[-1]:.0f} threads, "
    )
    note += (
        f"{samples.descriptors[-1]:.0f} descriptors); p99 {early:.1f} ms in the first third, {late:.1f} ms in the last"
    )
    wrong = list(samples.wrong)
    if span >= LEAST:
        limits = {
            "threads": MORE_THREADS,
            "descriptors": MORE_DESCRIPTORS,
            "MB": MORE_MEMORY + MORE_MEMORY_RATE * span / 3600,
        }
        wrong += [
            f"{value * span:+.1f} {name} in {span:.0f} s"
            for name, value in slopes.items()
            if value * span > limits[name]
        ]
    if late > early * SLOWER and late > early + SLOWER_MS:
        wrong.append(f"p99 grew from {early:.1f} to {late:.1f} ms")
    return wrong, note


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """By least squares, in units a second."""
    count = len(at)
    if count < 2:
        return 0.0
    middle_at, middle = sum(at) / count, sum(values) / count
    wide = sum((x - middle_at) ** 2 for x in at)
    return sum((x - middle_at) * (y - middle) for x, y in zip(at, values, strict=True)) / wide if wide else 0.0


def p99(values: Sequence[float]) -> float:
    """Nearest rank; 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] if ordered else 0.0


def _thirds(answers: Sequence[tuple[float, float]], seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of those in the first third and of those in the last."""
    first = [took * 1000 for at, took in answers if at < seconds / 3]
    return first, [took * 1000 for at, took in answers if at >= seconds * 2 / 3]


def _sample(portway: PortwayProcess, samples: Samples, at: float) -> None:
    counts = portway.counts()
    samples.at.append(at)
    samples.threads.append(counts.threads or 0)
    samples.descriptors.append(counts.fds or 0)
    samples.memory.append((counts.rss or 0) / 1024**2)


# --- the traffic ------------------------------------------------------------------------------------


def _prepare(first: Saboteur) -> None:
    first.fail("broken", lambda _: [response("500 Internal Server Error", "application/json", b'{"error":"x"}')])
    first.fail("slow", _slowly)


def _slowly(say: Speech) -> list[bytes | Drip]:
    whole = say.whole()
    return [Drip(whole, 0.02, len(whole) // 4 + 1)]


def _work(portway: PortwayProcess, name: int, stop: threading.Event, samples: Samples) -> None:
    chance = dice("soak", name)
    started = time.monotonic()
    number = 0
    client = Client(portway.port)
    while not stop.wait(PAUSE):
        number += 1
        client = client if client.is_open else Client(portway.port)
        try:
            wrong, took = _one(client, chance, f"{name} {number}")
        except (Broken, OSError) as exc:
            wrong, took = f"{type(exc).__name__}: {exc}", None
            client.close()
        with samples.lock:
            samples.requests += 1
            samples.wrong += [f"{name} {number}: {wrong}"] if wrong else []
            samples.answers += [(time.monotonic() - started, took)] if took is not None else []
    client.close()


def _one(client: Client, chance: random.Random, text: str) -> tuple[str, float | None]:
    """One request of some kind: what is wrong with its answer, and the seconds that it took, if those are counted."""
    throw = chance.random()
    model, stream = chance.choice(("ollama", "openai")), chance.random() < 0.5
    if throw < 0.05:
        client.send("POST", "/v1/chat/completions", {"model": f"slow-{model}", "messages": [], "stream": True})
        return _refused(client.read(), 400), None
    if throw < 0.10:
        _leave_early(client, f"slow-{model}", text)
        return "", None
    if throw < 0.15:
        return _refused(client.chat("nobody", text), 404), None
    if throw < 0.20:
        return _answered(client.chat("chain", text, stream=stream), text, "ollama"), None
    if throw < 0.40:
        text = f"again {chance.randrange(50)}"
        return _answered(client.chat(model, text, stream=stream), text, model), None
    reply = client.chat(model, text, stream=stream)
    return _answered(reply, text, model), reply.last


def _leave_early(client: Client, model: str, text: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
    client.send("POST", "/v1/chat/completions", body)
    client.begin()
    client.close()


def _refused(reply: Reply, status: int) -> str:
    return "" if reply.status == status and len(reply.errors) == 1 else f"{reply.status} {reply.body[:200]!r}"


def _answered(reply: Reply, text: str, served_by: str) -> str:
    right = reply.status == 200 and not reply.errors and reply.text == "".join(pieces("first", text))
    right = right and reply.headers.get("x-served-by") == served_by
    return "" if right else f"{reply.status} {reply.headers.get('x-served-by')} {reply.body[:200]!r}"
