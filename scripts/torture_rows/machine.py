"""What the machine runs out of, and what its clock does: the daemon is to go on, or to say clearly why it can't.

Each is played on the daemon's process alone, from outside, and taken back: what it did without must be made good then.
"""

from __future__ import annotations

import resource
import shutil
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from scripts.torture_rows import PATIENCE, PROGRAM, PortwayProcess, Row, open_files, wait_for
from scripts.torture_rows.client import Broken, Client, Reply, chat_body
from scripts.torture_rows.faults import contract
from scripts.torture_rows.matrix import NO_HEARTBEAT, WHO, Oracle, cells, reload
from scripts.torture_rows.saboteur import Step
from scripts.torture_rows.speech import pieces
from scripts.torture_rows.stage import NOWHERE, Cell, Stage
from scripts.torture_rows.verdict import Expected, judge, judge_lines, read_attempts

PLACES = 64
HALF_A_LINE = 300  # bytes
RECOVERY = 90.0  # seconds; log and cache try a file that refused again after 30 at the latest
OUR_CODES = ("stopping", "no_thread", "internal")


Play = Callable[[], Row]


class NotHere(Exception):
    """It can't be played on this machine; str() says why."""


class Tries:
    """Counts what was tried, and keeps what did not hold."""

    def __init__(self) -> None:
        self.count = 0
        self.wrong: list[str] = []
        self.errors = 0  # clear ones, where they may be
        self._lock = threading.Lock()

    def note(self, what: str, complaints: Sequence[str]) -> None:
        """One try."""
        with self._lock:
            self.count += 1
            if complaints:
                self.wrong.append(f"{what}: {'; '.join(complaints)}")

    def check(self, what: str, true: bool, seen: object) -> None:
        """One try, which holds if it is `true`."""
        self.note(what, [] if true else [str(seen)[:500]])

    def row(self, name: str, note: str = "") -> Row:
        """All of them."""
        return Row(name, self.count, self.count - len(self.wrong), " | ".join(self.wrong[:3]) or note)


class Ground:
    """A daemon with models of both kinds, alone and in chains of which the first member fails; `ask` asks them all."""

    def __init__(self, stage: Stage, portway: PortwayProcess, chosen: Sequence[Cell]) -> None:
        self.portway = portway
        self.stage = stage
        self.cells = chosen
        self.expected: dict[str, Expected] = {}  # by client
        self._table = contract()
        self._round = 0

    def ask(self, tries: Tries, *, strictly: bool = True) -> None:
        """A request to each model, all at the same time, with a prompt that was never asked before. Each must be
        answered right, by whom the reference says; if not `strictly`, by anybody, or fail with a clear error."""
        self._round += 1
        number = self._round

        def one(cell: Cell) -> None:
            tries.note(f"{cell.name} {number}", self._one(tries, cell, number, strictly=strictly))

        with ThreadPoolExecutor(len(self.cells)) as pool:
            list(pool.map(one, self.cells))

    def _one(self, tries: Tries, cell: Cell, number: int, *, strictly: bool) -> list[str]:
        text, who = f"{cell.name} {number}", f"{cell.name}-{number}"
        due = Oracle(cell, self._table).failing()
        due = replace(due, text="".join(pieces(due.text.partition(" ")[0], text)), most=60.0)
        try:
            with Client(self.portway.port) as client:
                reply = client.chat(cell.name, text, stream=cell.stream, headers={WHO: who})
        except (Broken, OSError) as exc:
            return [f"{type(exc).__name__}: {exc}"]
        if strictly:
            self.expected[who] = due
            return judge(reply, due)
        if is_clear_error(reply):
            tries.errors += 1
            return []
        return judge_by_itself(reply, due, text)

    def check_log(self, tries: Tries) -> None:
        """Every request that was answered right has its one line, whole."""
        there = {line["client"] for line in self.portway.lines()}
        wait_for(lambda: self.expected.keys() <= {line["client"] for line in self.portway.lines()}, lambda: str(there))
        wrong = judge_lines(self.portway.lines(), self.expected)
        for who in self.expected:
            tries.note(f"log of {who}", wrong.get(who, ()))

    def check_cache(self, tries: Tries) -> None:
        """A new question is answered by its model once, then out of the cache, which is whole."""
        self._round += 1
        cell = next(cell for cell in self.cells if not cell.chain)
        replies = [self.portway.chat(cell.name, f"twice {self._round}") for _ in range(2)]
        seen = [(reply.status, reply.headers.get("x-cache")) for reply in replies]
        tries.check("a miss, then a hit", seen == [(200, "MISS"), (200, "HIT")], seen)
        age = replies[1].headers.get("age", "none")
        tries.check("Age", age.isdecimal() and int(age) < RECOVERY, age)
        with closing(sqlite3.connect(self.portway.cache_file)) as db:
            said = db.execute("PRAGMA integrity_check").fetchall()
        tries.check("integrity_check", said == [("ok",)], said)


def judge_by_itself(reply: Reply, due: Expected, text: str) -> list[str]:
    """What is wrong with an answer that anybody may have given, for whatever reason."""
    served_by = reply.told("x-served-by", "served_by") or ""
    said = "".join(pieces("spare" if served_by.startswith("spare") else "first", text))
    told = read_attempts(reply.told("x-portway-attempts", "attempts") or "")
    return judge(reply, replace(due, served_by=served_by, text=said, attempts=told or ((served_by, "ok"),)))


def is_clear_error(reply: Reply) -> bool:
    """One envelope whose code stands in the reference, with a status that fits it."""
    if reply.is_stream or reply.status < 400 or len(reply.errors) != 1:
        return False
    code = str(reply.errors[0].get("code"))
    return code in OUR_CODES or (code in contract() and contract()[code].status in (reply.status, 0))


@contextmanager
def ground(rest: str = "", *, limits: Sequence[str] = (), program: Sequence[str] = PROGRAM) -> Iterator[Ground]:
    """A Ground with a daemon of its own. rest: more of its configuration, where {first} is its backend's address."""
    chosen = [cell for cell in cells(("early-hints", "500")) if (cell.fault == "500") == cell.chain]
    with tempfile.TemporaryDirectory(prefix="portway-torture-") as name, Stage(chosen, Path(name), PLACES) as stage:
        toml = "\n".join([stage.toml(NO_HEARTBEAT), MORE, rest.replace("{first}", stage.first.url)])
        with PortwayProcess(Path(name), toml, limits=limits, program=program) as portway:
            yield Ground(stage, portway, chosen)


ONE_PLACE = """
[backends.one]
kind = "openai"
url = "{first}"
max_parallel = 1
[models.one-place]
backend = "one"
model = "one-place"
[models.council]
kind = "council"
members = ["one-place", "one-place"]
chairman = "one-place"
"""

# what fails here fails by plan, and is no reason to skip it; and there is a model behind a name
MORE = f"""
[cooldown]
failures = 1000
[backends.name]
kind = "openai"
url = "http://{NOWHERE}:1"
[models.unknown-name]
backend = "name"
model = "x"
"""


# --- no room on the disk ----------------------------------------------------------------------------


def fault_disk_full() -> Row:
    """Log and cache lie on a disk that becomes full, and later has room again."""
    tries = Tries()
    with tempfile.TemporaryDirectory(prefix="portway-torture-disk-") as disk:
        rest = f'[log]\nfile = "{disk}/log.jsonl"\n[cache]\nfile = "{disk}/cache.sqlite3"\n'
        with ground(rest, limits=_on_a_small_disk(disk)) as here:
            inside = Path(f"/proc/{here.portway.pid}/root{disk}")
            here.portway.log_file, here.portway.cache_file = inside / "log.jsonl", inside / "cache.sqlite3"
            filler = inside / "filler"
            _without_room(here, tries, lambda: _fill(filler), filler.unlink)
    return tries.row("the disk is full")


def fault_no_file_may_grow() -> Row:
    """The same by a limit of the process: none for stderr's file either, then one inside the log's next line."""
    tries = Tries()
    with ground() as here:
        pid = here.portway.pid
        unlimited = _limit(pid, "RLIMIT_FSIZE")

        def grow(most: int) -> None:
            _limit(pid, "RLIMIT_FSIZE", most)

        _without_room(here, tries, lambda: grow(0), lambda: grow(unlimited))
        size = here.portway.log_file.stat().st_size
        _without_room(here, tries, lambda: grow(size + HALF_A_LINE), lambda: grow(unlimited))
    return tries.row("no file may grow, stderr's neither")


def _without_room(here: Ground, tries: Tries, fill: Callable[[], object], clear: Callable[[], object]) -> None:
    portway = here.portway
    here.ask(tries)
    fill()
    for _ in range(20):
        here.ask(tries)
        if all(_problems(portway)):
            break
    tries.check("/health says so", all(_problems(portway)), portway.health())
    clear()
    here.ask(tries)
    wait_for(lambda: not any(_problems(portway)), lambda: str(portway.health()), RECOVERY)
    here.ask(tries)
    here.check_log(tries)
    tries.check("no line is lost", portway.health()["log"]["dropped"] == 0, portway.health())
    here.check_cache(tries)


def _problems(portway: PortwayProcess) -> list[str | None]:
    health = portway.health()
    return [health["log"]["problem"], health["cache"]["problem"]]


def _on_a_small_disk(folder: str) -> list[str]:
    """Words in front of a command that runs it where `folder` is a disk of its own. Raises NotHere."""
    words = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=8m x "$0" && exec "$@"',
        folder,
    ]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        raise NotHere("needs Linux with user namespaces")
    return words


def _fill(path: Path) -> None:
    """Use up all the room there is."""
    with path.open("wb", buffering=0) as file:
        for size in (65_536, 4096, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                pass  # so much is not there any more


# --- no descriptors, no threads ---------------------------------------------------------------------

FEW = (2, 4, 8)  # descriptors beyond those of an idle daemon
AT_ONCE = 3  # requests at a backend with one place
IDLE = 20  # connections that only hold one


def fault_no_descriptors() -> Row:
    """Fewer descriptors than requests, and idle connections that hold some: right answers or clear errors."""
    tries = Tries()
    with ground() as here:
        portway = here.portway
        before = _limit(portway.pid, "RLIMIT_NOFILE")
        for few in FEW:
            here.ask(tries)
            reload(portway)
            wait_for(lambda: portway.health()["connections"] == 1, lambda: "connections stay")
            _limit(portway.pid, "RLIMIT_NOFILE", len(open_files(portway.pid)) + few)
            idle = [Client(portway.port) for _ in range(IDLE)]
            here.ask(tries, strictly=False)
            here.ask(tries, strictly=False)
            for client in idle:
                client.close()
            _limit(portway.pid, "RLIMIT_NOFILE", before)
        here.ask(tries)
        here.check_log(tries)
        tries.check("nothing unforeseen", "unforeseen" not in portway.said, portway.said)
    return tries.row("no descriptors", f"{tries.errors} clear errors meanwhile")


def fault_no_threads() -> Row:
    """No thread can be started, for requests that would need one, for a reload, a look at the backends, a name."""
    tries = Tries()
    with tempfile.TemporaryDirectory(prefix="portway-torture-threads-") as folder:
        flag = Path(folder) / "none"
        program = [*PROGRAM[:-1], "-c", THREADLESS, str(flag), PROGRAM[-1]]
        with ground(ONE_PLACE, program=program) as here:
            portway = here.portway
            flag.touch()  # there is none for requests yet: what needs one is told so
            here.ask(tries, strictly=False)
            _ask_for_one_place(here, tries)
            _what_needs_a_thread(portway, tries)
            flag.unlink()
            here.ask(tries)
            flag.touch()  # now there are some, and who needs one waits for them
            here.ask(tries)
            _ask_for_one_place(here, tries)
            answer = portway.chat("council", "together")
            tries.check("a council", answer.json.get("error", {}).get("code") == "no_thread", answer)
            reload(portway)
            here.ask(tries)
            flag.unlink()
            here.ask(tries)
            tries.check("a council later", portway.chat("council", "together").status == 200, portway.said)
            for path in ("/metrics", "/portway/residency"):
                tries.check(f"{path} later", portway.call("GET", path).status == 200, path)
            here.check_log(tries)
            tries.check("nothing unforeseen", "unforeseen" not in portway.said, portway.said)
    return tries.row("no threads")


THREADLESS = """
import os, runpy, sys, threading
flag, program, *sys.argv[1:] = sys.argv[1:]
start = threading.Thread.start

def refuse(thread):
    if os.path.exists(flag):
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = refuse
runpy.run_path(program, run_name="__main__")
"""


def _ask_for_one_place(here: Ground, tries: Tries) -> None:
    """Several at once at a backend that takes one: who has to wait may need a thread for it."""
    first, seen = here.stage.first, []
    first.fail("one-place", lambda say: [Step.HANG, say.whole()])

    def one(number: int) -> None:
        reply = here.portway.chat("one-place", f"at once {number}")
        seen.append((reply.status, reply.json))

    def is_decided() -> bool:
        under_way = int(here.portway.health()["in_flight"]) - 1  # whoever asks is one of them
        return len(seen) + under_way >= AT_ONCE

    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [pool.submit(one, number) for number in range(AT_ONCE)]
        wait_for(is_decided, lambda: str(seen))
        first.heal("one-place")
        first.release()
        for each in asked:
            each.result()
    for status, said in seen:
        clear = status == 503 and said["error"]["code"] in ("no_room", "no_thread")
        tries.check("one place", status == 200 or clear, said)


def _what_needs_a_thread(portway: PortwayProcess, tries: Tries) -> None:
    """A right answer, or one clear error."""
    unknown = portway.chat("unknown-name")
    tries.check("a name", unknown.status == 502, unknown)
    for method, path, body in (
        ("GET", "/v1/models", None),
        ("GET", "/metrics", None),
        ("GET", "/portway/residency", None),
        ("POST", "/portway/load", {"model": "one-place"}),
        ("POST", "/v1/chat/completions", chat_body("one-place", "long " * 100_000)),
    ):
        answer = portway.call(method, path, body)
        clear = answer.status < 500 or answer.json["error"]["code"] in ("no_thread", "no_room")
        tries.check(f"{method} {path}", clear, answer)


def _limit(pid: int, name: str, value: int | None = None) -> int:
    """The soft limit of another process; with `value` it is set before. Raises NotHere."""
    if not hasattr(resource, "prlimit"):
        raise NotHere("needs Linux")
    which = getattr(resource, name)
    soft, hard = resource.prlimit(pid, which)
    if value is not None:
        resource.prlimit(pid, which, (value, hard))
    return soft


# --- the clock --------------------------------------------------------------------------------------

DAY = 86_400.0
HOUR = 3600  # seconds for which answers are kept here
JUMPS = (DAY, -2 * DAY, 40 * DAY, -10 * 365 * DAY, 0.5, -0.5, 0.0)  # seconds by which the clock is off
JUMPY = """
import runpy, sys, time
offset, program, *sys.argv[1:] = sys.argv[1:]
right = time.time

def wrong():
    with open(offset, encoding="ascii") as file:
        return right() + float(file.read())

time.time = wrong
runpy.run_path(program, run_name="__main__")
"""


def fault_clock_jumps() -> Row:
    """The machine's clock is set, forward and back, while requests are under way and between them."""
    tries = Tries()
    with tempfile.TemporaryDirectory(prefix="portway-torture-clock-") as folder:
        offset = Path(folder) / "offset"
        offset.write_text("0", encoding="ascii")
        program = [*PROGRAM[:-1], "-c", JUMPY, str(offset), PROGRAM[-1]]
        with ground(program=program) as here:
            here.ask(tries)
            for jump in JUMPS:
                _jump(here, tries, offset, jump)
            here.check_log(tries)
            _check_times(here, tries)
            tries.check("nothing unforeseen", "unforeseen" not in here.portway.said, here.portway.said)
    return tries.row("the clock jumps")


def _jump(here: Ground, tries: Tries, offset: Path, jump: float) -> None:
    """Under a stream that is in flight; then all the models, and the cache."""
    first, portway = here.stage.first, here.portway
    first.fail("gate-openai", lambda say: [say.until("after"), Step.HANG, say.rest_after()])
    with Client(portway.port) as client:
        client.send("POST", "/v1/chat/completions", chat_body("gate-openai", f"at {jump}", stream=True))
        client.begin()
        offset.with_suffix(".new").write_text(repr(jump), encoding="ascii")
        offset.with_suffix(".new").rename(offset)
        first.wait_hanging(1, PATIENCE)
        first.release()
        reply = client.read()
        tries.check(f"in flight at {jump:+g} s", reply.is_done and not reply.errors, reply)
    here.ask(tries)
    here.check_cache(tries)
    with Client(
        portway.port
    ) as client:  # a question that was asked before the jumps: its answer may be from the future
        reply = client.chat(here.cells[0].name, "from before")
        age = reply.headers.get("age", "0")
        right = reply.status == 200 and reply.text == "".join(pieces("first", "from before"))
        tries.check(f"a kept answer at {jump:+g} s", right and age.isdecimal() and int(age) <= HOUR, (age, reply))
    health = portway.health()
    tries.check(f"/health at {jump:+g} s", 0 <= health["uptime_s"] < RECOVERY and not health["cooling"], health)


def _check_times(here: Ground, tries: Tries) -> None:
    """Durations are what a stopwatch says, and `ts` what the clock said."""
    years = {line["ts"][:4] for line in here.portway.lines()}
    tries.check("the clock did jump", len(years) > 1, years)
    for line in here.portway.lines():
        times = [line[key] for key in ("latency_s", "ttft_s", "queue_s", "load_s") if line[key] is not None]
        right = all(0 <= value < RECOVERY for value in times) and line["latency_s"] > 0
        tries.check(f"times of {line['client']}", right, line)


FAULTS = (
    fault_disk_full,
    fault_no_file_may_grow,
    fault_no_descriptors,
    fault_no_threads,
    fault_clock_jumps,
)
