"""The daemon itself is killed, stopped and reloaded while it is busy: what it has said is kept, what it does ends."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from scripts.torture_rows import PATIENCE, PortwayProcess, Row, wait_for
from scripts.torture_rows.client import Broken, Client
from scripts.torture_rows.load import dice
from scripts.torture_rows.machine import Tries
from scripts.torture_rows.matrix import WHO, reload
from scripts.torture_rows.saboteur import Drip, Saboteur
from scripts.torture_rows.speech import Speech, pieces

CLIENTS = 8
LIFE = (0.05, 0.6)  # seconds of load before the daemon is killed, from .. to
SAID = 2.0  # seconds after which an answer's line must be in the log, whatever happens (it is written every 0.05)
BUSY = 24  # streams in flight when it is stopped
WARM_UP = 7  # reloads before it is counted what the daemon holds
FEW_MORE = 3  # threads that more requests at a time may have made; each reload's would be more
RESTART = 1.0  # seconds that a start should take at most; it is told, and fails nothing: the machine may be slow


class Load:
    """Clients that ask all the time, each on its connection: plain or streamed, of either kind, again or anew.

    A daemon that is killed ends a request with it; everything else that is not a right answer is in `wrong`.
    """

    def __init__(self, port: int, seed: object, *, mortal: bool = False) -> None:
        self.answered: dict[str, float] = {}  # client -> when its answer had come, by time.monotonic()
        self.wrong: list[str] = []
        self.count = 0
        self._port = port
        self._mortal = mortal
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards what the clients write
        self._threads = [threading.Thread(target=self._work, args=(f"{seed}-{n}",)) for n in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let each end what it has under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, name: str) -> None:
        chance = dice(name)
        number = 0
        client: Client | None = None
        while not self._stop.is_set():
            number += 1
            who = f"{name}-{number}"
            model, stream = chance.choice(MODELS), chance.random() < 0.5
            text = f"again {chance.randrange(20)}" if chance.random() < 0.3 else who
            try:
                client = client if client is not None and client.is_open else Client(self._port)
                reply = client.chat(model, text, stream=stream, headers={WHO: who})
            except (Broken, OSError) as exc:
                if self._mortal:
                    break
                self._note(who, f"{type(exc).__name__}: {exc}")
                continue
            due = "".join(pieces("first", text)) + (LARGE if model == "large" else "")
            right = reply.status == 200 and reply.text == due and not reply.errors
            self._note(who, "" if right else f"{reply.status} {reply.body[:200]!r}")
        if client is not None:
            client.close()

    def _note(self, who: str, wrong: str) -> None:
        with self._lock:
            self.count += 1
            self.answered[who] = time.monotonic()
            self.wrong += [f"{who}: {wrong}"] if wrong else []


MODELS = ("ollama", "openai", "large")
LARGE = dice("large").randbytes(30_000).hex()  # takes the cache many pages: a kill comes between two of them
CONFIG = """
[memory]
enabled = false
[server]
drain = 20
[backends.ollama]
kind = "ollama"
url = "{url}"
[backends.openai]
kind = "openai"
url = "{url}"
[models.ollama]
backend = "ollama"
model = "ollama"
cache = "1h"
[models.openai]
backend = "openai"
model = "openai"
cache = "1h"
[models.large]
backend = "ollama"
model = "large"
cache = "1h"
[models.slow-ollama]
backend = "ollama"
model = "slow"
[models.slow-openai]
backend = "openai"
model = "slow"
"""


@contextmanager
def scene(more: str = "") -> Iterator[tuple[Saboteur, PortwayProcess]]:
    """A backend of both kinds, and a daemon in front of it. more: of its configuration."""
    with (
        tempfile.TemporaryDirectory(prefix="portway-torture-") as folder,
        Saboteur("first") as first,
        PortwayProcess(Path(folder), CONFIG.format(url=first.url) + more) as portway,
    ):
        first.fail("large", _largely)
        yield first, portway


def _largely(say: Speech) -> list[bytes]:
    say.texts.append(LARGE)
    return [say.whole()]


# --- kill -9 ----------------------------------------------------------------------------------------


def fault_kill_9(times: int = 50) -> Row:
    """SIGKILL under load: the cache's database is whole, so is every line of the log, and it starts again."""
    tries = Tries()
    starts: list[float] = []
    with scene() as (_, portway):
        for number in range(times):
            with Load(portway.port, number, mortal=True) as load:
                time.sleep(dice(number).uniform(*LIFE))
                if number % 2:
                    _await_a_write(portway)
                portway.kill()
                killed = time.monotonic()
            complaints = load.wrong + _database_after(portway) + _log_after(portway, load, killed)
            began = time.monotonic()
            portway.start()
            answers = portway.call("GET", "/health").status == 200
            starts.append(time.monotonic() - began)
            complaints += [] if answers else ["it does not answer"]
            complaints += _works_after(portway, number)
            tries.note(f"kill {number + 1}", complaints)
        tries.note("stderr", [portway.said] if "unforeseen" in portway.said or "corrupt" in portway.said else [])
    slow = "" if max(starts) < RESTART else f", MORE THAN {RESTART:g} s"
    return tries.row(
        "kill -9 under load", f"started again in {statistics.median(starts):.2f} s, {max(starts):.2f} s at most{slow}"
    )


def _await_a_write(portway: PortwayProcess) -> None:
    """Until the cache's files are being written, for a moment at most: the kill comes in the middle of it."""
    files = [portway.cache_file, portway.cache_file.with_name(f"{portway.cache_file.name}-wal")]

    def stamps() -> list[int]:
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]

    before, until = stamps(), time.monotonic() + LIFE[1]
    while stamps() == before and time.monotonic() < until:
        pass


def _database_after(portway: PortwayProcess) -> list[str]:
    """What is wrong with the cache as the kill left it: a copy is looked at, so that the daemon finds it as it was."""
    if not portway.cache_file.exists():
        return []
    with tempfile.TemporaryDirectory(prefix="portway-torture-copy-") as folder:
        for file in portway.cache_file.parent.glob(f"{portway.cache_file.name}*"):
            shutil.copy(file, folder)
        with closing(sqlite3.connect(Path(folder) / portway.cache_file.name)) as db:
            said = db.execute("PRAGMA integrity_check").fetchall()
            db.execute("SELECT count(*) FROM answers").fetchone()
    return [] if said == [("ok",)] else [f"integrity_check: {said}"]


def _log_after(portway: PortwayProcess, load: Load, killed: float) -> list[str]:
    """Whole lines, the last one may be half; and what was answered a while ago has its line."""
    whole, _, _ = _log_bytes(portway).rpartition(b"\n")
    seen = set(re.findall(rb'"client":"([^"]*)"', whole))
    lost = [who for who, at in load.answered.items() if at < killed - SAID and who.encode() not in seen]
    return [f"log: no line of {who}" for who in lost[:3]]


def _log_bytes(portway: PortwayProcess) -> bytes:
    return portway.log_file.read_bytes() if portway.log_file.exists() else b""


def _works_after(portway: PortwayProcess, number: int) -> list[str]:
    """An answer that is not in the cache, then out of it; then every line of the log is whole."""
    who, seen = f"after-kill-{number}", []
    with Client(portway.port) as client:
        for _ in range(2):
            answer = client.chat("ollama", who, headers={WHO: who})
            seen.append((answer.status, answer.headers.get("x-cache")))
    wrong = [] if seen == [(200, "MISS"), (200, "HIT")] else [f"answers {seen}"]
    try:
        wait_for(lambda: who.encode() in _log_bytes(portway), lambda: "its line does not come")
        portway.lines()
    except (AssertionError, ValueError) as exc:
        wrong.append(f"log: {exc}")
    return wrong


# --- SIGTERM ----------------------------------------------------------------------------------------


def fault_sigterm(times: int = 20) -> Row:
    """SIGTERM with streams and plain answers in flight: each comes to its end, and the daemon ends by itself."""
    tries = Tries()
    with scene() as (first, portway):
        first.fail("slow", _slowly)
        for number in range(times):
            clients = [Client(portway.port) for _ in range(BUSY)]
            for n, client in enumerate(clients):
                model, stream = ("slow-ollama", "slow-openai")[n % 2], n % 4 < 2
                text = f"term {number} {n}"
                body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream}
                client.send("POST", "/v1/chat/completions", body)
            wait_for(lambda: portway.health()["in_flight"] == BUSY + 1, lambda: str(portway.health()))
            portway.send(signal.SIGTERM)
            for n, client in enumerate(clients):
                tries.note(f"stop {number + 1}", _ended_well(client, f"term {number} {n}"))
                client.close()
            code = _exit_code(portway)
            tries.check(
                f"exit of stop {number + 1}", code == 0 and "were cut" not in portway.said, f"{code} {portway.said}"
            )
            lines = [line for line in portway.lines() if line["model"].startswith("slow")]
            due = (number + 1) * BUSY
            tries.check(f"log of stop {number + 1}", len(lines) == due, f"{len(lines)} lines, not {due}")
            portway.start()
    return tries.row("SIGTERM with requests in flight")


def _slowly(say: Speech) -> list[bytes | Drip]:
    """In three or four pieces, a tenth of a second apart."""
    whole = say.whole()
    return [Drip(whole, 0.1, len(whole) // 4 + 1)]


def _ended_well(client: Client, text: str) -> list[str]:
    try:
        reply = client.read()
    except (Broken, OSError) as exc:
        return [f"{type(exc).__name__}: {exc}"]
    right = reply.status == 200 and not reply.errors and reply.text == "".join(pieces("first", text))
    right &= reply.is_done or not reply.is_stream
    return [] if right else [f"{reply.status} {reply.body[-200:]!r}"]


def _exit_code(portway: PortwayProcess) -> int | None:
    try:
        return portway.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        portway.kill()
        return None


# --- reload -----------------------------------------------------------------------------------------


def fault_reload(times: int = 100) -> Row:
    """The configuration is changed under load, now and then to a broken one: no request fails, nothing is left over."""
    tries = Tries()
    with scene() as (_, portway):
        right = portway.configuration.read_text(encoding="utf-8")
        with Load(portway.port, "before"):
            time.sleep(0.5)
        reload(portway)
        before = portway.counts()
        with Load(portway.port, "reload") as load:
            for number in range(times):
                more = f"[models.new-{number}]\nbackend = 'openai'\nmodel = 'x'\n"
                portway.configuration.write_text(right + more, encoding="utf-8")
                reload(portway)
                tries.check(
                    f"reload {number + 1}", portway.call("GET", f"/v1/models/new-{number}").status == 200, "404"
                )
                if number % 10 == 5:
                    tries.note(f"refusal {number + 1}", _refuses(portway, right + "[models.broken]\n"))
        for wrong in load.wrong:
            tries.note("under load", [wrong])
        tries.count += load.count - len(load.wrong)
        portway.configuration.write_text(right, encoding="utf-8")
        reload(portway)
        tries.note("what it holds", _is_back(portway, (before.threads or 0) + FEW_MORE))
        tries.check("nothing unforeseen", "unforeseen" not in portway.said, portway.said)
    return tries.row("configurations reloaded under load", f"{times} reloads under {load.count} requests")


def _reload_often(portway: PortwayProcess, right: str, tries: Tries, times: int) -> None:
    """Each time with another model, which must be there."""
    for number in range(times):
        more = f"[models.new-{number}]\nbackend = 'openai'\nmodel = 'x'\n"
        portway.configuration.write_text(right + more, encoding="utf-8")
        reload(portway)
        tries.check(f"reload {number + 1}", portway.call("GET", f"/v1/models/new-{number}").status == 200, "404")
        if number % 10 == 5:
            tries.note(f"refusal {number + 1}", _refuses(portway, right + "[models.broken]\n"))


def _refuses(portway: PortwayProcess, text: str) -> list[str]:
    portway.configuration.write_text(text, encoding="utf-8")
    portway.send(signal.SIGHUP)
    try:
        wait_for(lambda: bool(portway.health()["config"]["problem"]), lambda: "a broken configuration is not told of")
    except AssertionError as exc:
        return [str(exc)]
    return []


def _is_back(portway: PortwayProcess, threads: int) -> list[str]:
    def is_back() -> bool:
        return (portway.counts().threads or 0) <= threads and portway.health()["connections"] == 1

    try:
        wait_for(is_back, lambda: f"{portway.counts()} and {threads} threads before; {portway.health()['connections']}")
    except AssertionError as exc:
        return [str(exc)]
    return []
