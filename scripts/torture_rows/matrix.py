"""The matrix: every fault, streamed or not, behind each kind of backend, with and without a chain.

A cell is three requests on one connection: one while its backend fails, then the same two after it has healed. The
first must be answered right, by whoever X-Served-By says, or fail with one clear error in time; the second one must
work, and not be answered from anything wrong that the first had left in the cache; the third one shows what was kept.
Each has its line in the log. When all are through, the daemon must hold what it held before: threads, descriptors,
connections, and every place in the queues of its backends.
"""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from scripts.torture_rows import PortwayProcess, Row, hold, open_files, wait_for
from scripts.torture_rows.client import Broken, Client
from scripts.torture_rows.faults import FAULTS, RIGHT, Consequence, contract
from scripts.torture_rows.saboteur import Saboteur, Step
from scripts.torture_rows.speech import KINDS, Order, Speech, pieces
from scripts.torture_rows.stage import SPARE, Cell, Stage, has_certificates, limits
from scripts.torture_rows.verdict import EARLY, LATE, SLACK, Expected, judge, judge_lines

AT_ONCE = 16  # cells under way
ENOUGH = 2 * AT_ONCE  # requests without an answer, after which no more are made: each takes the client's patience
PLACES = AT_ONCE + 4  # of each backend that several cells share
NO_HEARTBEAT = 3600.0  # seconds
HEARTBEAT = 0.3
SETTLED = 30.0  # seconds that threads and descriptors have to go
WHO = "X-Portway-Client"


def cells(names: Iterable[str] = FAULTS) -> list[Cell]:
    """All of some faults' cells. Those that can't be played here are left out."""
    return [
        Cell(name, kind, stream, chain)
        for name in names
        if FAULTS[name].where != "certificate" or has_certificates()
        for kind in FAULTS[name].kinds
        for stream in (False, True)
        for chain in (False, True)
    ]


def waiting_cells() -> list[Cell]:
    """Those in which a stream's client waits for long, so that heartbeats make a difference."""
    return [cell for cell in cells() if cell.what.limit and cell.stream]


# --- what must come of a cell -----------------------------------------------------------------------


class Oracle:
    """What the reference, whose table of reasons is `table`, says of a cell's requests. heartbeat: seconds."""

    def __init__(self, cell: Cell, table: Mapping[str, Consequence], heartbeat: float = NO_HEARTBEAT) -> None:
        self._cell = cell
        self._fault = cell.what
        self._reason = cell.what.reason(cell.kind, stream=cell.stream)
        self._row = table.get(self._reason, Consequence("", "", 200))
        self._spare = SPARE[cell.kind]
        self._heartbeat = heartbeat

    def requests(self) -> list[Expected]:
        """What is due for each, in their order."""
        first = self.failing()
        is_silent = self._fault.where == "answer" and self._fault.limit != "total"
        first = replace(first, beats=first.stream and is_silent and first.least > 2 * self._heartbeat)
        if self._fault.again:
            return [first, first]
        second = self.healed()
        kept = second.served_by == self._cell.name
        return [first, second, self._right((), hit=True) if kept else second]

    def failing(self) -> Expected:
        """While its backend fails."""
        cell, fault = self._cell, self._fault
        least, most = self._time()
        went_well = self._right(((cell.name, "ok"),), least=least, most=most)
        if self._reason == RIGHT:
            return went_well
        if fault.late and cell.stream:
            return replace(went_well, code=self._reason, begun=True)
        if cell.chain and self._falls_back:
            return self._demoted(self._reason, least, most)
        return self._error(least, most)

    def healed(self) -> Expected:
        """The same once more, when it works again."""
        name = self._cell.name
        if self._reason == RIGHT:
            return self._right((), hit=True)
        if not self._is_skipped:
            return self._right(((name, "ok"),))
        if self._cell.chain:
            return self._demoted("cooling")
        return self._right(((name, "cooling"), (name, "ok")))

    def _right(
        self, attempts: Sequence[tuple[str, str]], *, hit: bool = False, least: float = 0.0, most: float = SLACK
    ) -> Expected:
        cell = self._cell
        text = "".join(pieces("first", cell.name))
        return Expected(cell.name, cell.stream, cell.name, text, attempts, hit=hit, least=least, most=most)

    def _demoted(self, reason: str, least: float = 0.0, most: float = SLACK) -> Expected:
        cell = self._cell
        text = "".join(pieces("spare", cell.name))
        attempts = ((cell.name, reason), (self._spare, "ok"))
        return Expected(cell.name, cell.stream, self._spare, text, attempts, least=least, most=most)

    def _error(self, least: float, most: float) -> Expected:
        cell, fault = self._cell, self._fault
        attempts = [(cell.name, self._reason)]
        if cell.chain and self._row.falls_back == "only with a larger window":
            attempts.append((self._spare, self._reason))  # its window is no larger
        return Expected(
            cell.name,
            cell.stream,
            attempts=attempts,
            code=self._reason,
            status=fault.status or self._row.status,
            retry_after=fault.retry_after is not None or self._reason == "loading_timeout",
            body=self._own_body() if fault.verbatim and cell.kind == "openai" else None,
            never_says=fault.never_says,
            least=least,
            most=most,
        )

    def _own_body(self) -> bytes:
        cell = self._cell
        [whole] = self._fault.act(Speech(Order(cell.kind, cell.name, cell.name, cell.stream), "first"))
        return whole.partition(b"\r\n\r\n")[2] if isinstance(whole, bytes) else b""

    @property
    def _falls_back(self) -> bool:
        """Whether the next of the chain is asked. It is behind another backend, and has the same window."""
        return self._row.falls_back.startswith(("yes", "only behind another backend", "plain: yes"))

    @property
    def _is_skipped(self) -> bool:
        """Whether one failure is enough to be skipped next time."""
        told = self._row.cools == "as Retry-After says" and self._fault.retry_after is not None
        return told or self._row.cools == "long, at once"

    def _time(self) -> tuple[float, float]:
        """Seconds until the answer's end: at least, at most."""
        limit = self._fault.limit
        if not limit:
            return 0.0, SLACK
        times = limits(self._cell)
        seconds = times[limit]
        if self._reason == "answer_timeout":
            seconds = times["total"] / (2 if self._cell.chain else 1)
        return seconds - EARLY, seconds + LATE


# --- running them -----------------------------------------------------------------------------------


class Matrix:
    """Runs cells against a daemon of its own. `wrong`: complaints by cell, where there are any."""

    def __init__(self, chosen: Sequence[Cell], heartbeat: float = NO_HEARTBEAT) -> None:
        self.cells = list(chosen)
        self.wrong: dict[Cell, list[str]] = {}
        self.left: list[str] = []  # what it held on to that it should have let go
        self._heartbeat = heartbeat
        self._expected: dict[str, Expected] = {}  # by client
        self._unanswered = 0  # requests

    def run(self) -> list[Row]:
        """All of them, some at a time. A row for each fault, and one for what was left behind."""
        with (
            tempfile.TemporaryDirectory(prefix="portway-torture-") as folder,
            Stage(self.cells, Path(folder), PLACES) as stage,
            PortwayProcess(Path(folder), stage.toml(self._heartbeat)) as portway,
        ):
            self._run(stage, portway)
        return self._rows()

    def _run(self, stage: Stage, portway: PortwayProcess) -> None:
        _use_all_places(stage.first, portway)
        wait_for(lambda: len(portway.lines()) == PLACES * len(KINDS), lambda: "requests are missing in the log")
        reload(portway)
        before = _held(portway)
        table = contract()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            complaints = pool.map(lambda cell: self._cell(cell, stage, portway, table), self.cells)
            for cell, wrong in zip(self.cells, complaints, strict=True):
                self._complain(cell, wrong)
        self._look_at_the_log(portway)
        try:
            _use_all_places(stage.first, portway)
            _holds_no_more(portway, before, stage)
            hold("unforeseen error" not in portway.said, portway.said)
        except AssertionError as exc:
            self.left.append(str(exc))

    def _cell(self, cell: Cell, stage: Stage, portway: PortwayProcess, table: Mapping[str, Consequence]) -> list[str]:
        """What is wrong with a cell's answers."""
        wrong: list[str] = []
        if self._unanswered > ENOUGH:
            return [f"not tried, as {self._unanswered} requests had been left without an answer"]
        if not cell.stream:
            stage.saw(cell)
        with ExitStack() as connection:
            client: Client | None = None
            for number, expected in enumerate(Oracle(cell, table, self._heartbeat).requests(), 1):
                if number == 2:
                    stage.heal(cell)
                if client is None or not client.is_open:
                    client = connection.enter_context(Client(portway.port, on_event=lambda: stage.saw(cell)))
                wrong += [f"request {number}: {complaint}" for complaint in self._ask(client, cell, number, expected)]
                wrong += _asked_too_often(stage, cell, number, expected)
        return wrong

    def _ask(self, client: Client, cell: Cell, number: int, expected: Expected) -> list[str]:
        who = f"{cell.name}-{number}"
        self._expected[who] = expected
        try:
            return judge(client.chat(cell.name, cell.name, stream=cell.stream, headers={WHO: who}), expected)
        except (Broken, OSError) as exc:
            self._unanswered += 1
            client.close()
            return [f"{type(exc).__name__}: {exc}"]

    def _look_at_the_log(self, portway: PortwayProcess) -> None:
        def are_there() -> bool:
            return len({line["client"] for line in portway.lines()} & set(self._expected)) == len(self._expected)

        try:
            wait_for(are_there, lambda: "not all requests are in the log")
        except AssertionError as exc:
            self.left.append(str(exc))
        by_client = judge_lines(portway.lines(), self._expected)
        for cell in self.cells:
            for number in (1, 2, 3):
                complaints = by_client.get(f"{cell.name}-{number}", ())
                self._complain(cell, [f"request {number}: {complaint}" for complaint in complaints])

    def _complain(self, cell: Cell, complaints: Sequence[str]) -> None:
        if complaints:
            self.wrong.setdefault(cell, []).extend(complaints)

    def _rows(self) -> list[Row]:
        rows = []
        for fault in dict.fromkeys(cell.fault for cell in self.cells):
            mine = [cell for cell in self.cells if cell.fault == fault]
            bad = [cell for cell in mine if cell in self.wrong]
            note = "; ".join(f"{cell.name}: {self.wrong[cell][0]}" for cell in bad[:2])
            rows.append(Row(FAULTS[fault].what, len(mine), len(mine) - len(bad), note))
        held = 0 if self.left else 1
        rows.append(Row("after them: threads, descriptors, connections, places", 1, held, "; ".join(self.left)))
        return rows


def _asked_too_often(stage: Stage, cell: Cell, number: int, expected: Expected) -> list[str]:
    """A request is sent once for each attempt, and never again: it may have been worked on. A reset alone, on a
    connection that was used before, says that it was not even read (docs/design.md)."""
    if cell.what.where != "answer" or cell.fault.startswith("loading"):
        return []
    due = sum(model == cell.name and reason != "cooling" for model, reason in expected.attempts)
    seen = stage.first.asked(cell.name)
    stage.first.forget(cell.name)
    if seen == due or (cell.fault == "reset" and number == 1 and seen == 2):
        return []
    return [f"request {number}: its backend was asked {seen} times, not {due}"]


# --- what must not leak -----------------------------------------------------------------------------


def _use_all_places(first: Saboteur, portway: PortwayProcess) -> None:
    """As many requests at once as each backend takes: all of them must get there."""
    for kind in KINDS:
        gate = f"gate-{kind}"
        first.fail(gate, lambda say: [Step.HANG, say.whole()])
        answers: list[str] = []
        askers = [threading.Thread(target=_ask_at, args=(portway.port, gate, n, answers)) for n in range(PLACES)]
        for asker in askers:
            asker.start()
        there = first.wait_hanging(PLACES, SETTLED)
        first.heal(gate)
        first.release()
        for asker in askers:
            asker.join()
        hold(there, f"of {PLACES} places behind first-{kind} some are lost")
        hold(len(answers) == PLACES, f"of {PLACES} requests at once only {len(answers)} were answered")


def _ask_at(port: int, model: str, number: int, answers: list[str]) -> None:
    with Client(port) as client:
        answers.append(client.chat(model, f"number {number}").text)


def reload(portway: PortwayProcess) -> None:
    """Have it read its configuration again, and wait until it has. It then closes the connections that it keeps to
    its backends, once they are not in use."""
    before = portway.said.count("configuration reloaded")
    with portway.configuration.open("a", encoding="utf-8") as file:
        file.write("# again\n")
    portway.send(signal.SIGHUP)
    wait_for(lambda: portway.said.count("configuration reloaded") > before, lambda: portway.said)


class Held(NamedTuple):
    """What a daemon holds. descriptors: all but the cache's own, a few of which it opens for as many look-ups at
    once. threads: a worker stays for a minute, so that there may be AT_ONCE more; one left by each cell is far more."""

    threads: int
    descriptors: int
    in_flight: int
    connections: int


def _held(portway: PortwayProcess) -> Held:
    health = portway.health()
    files = [name for name in open_files(portway.pid) if portway.cache_file.name not in name]
    return Held(portway.counts().threads or 0, len(files), health["in_flight"], health["connections"])


def _holds_no_more(portway: PortwayProcess, before: Held, stage: Stage) -> None:
    stage.end_the_incurable()  # a reload asks every backend for its models
    reload(portway)

    def is_settled() -> bool:
        now, most = _held(portway), before._replace(threads=before.threads + AT_ONCE)
        return all(map(int.__le__, now, most)) and not stage.first.connections and not stage.spare.connections

    def what_is_left() -> str:
        return f"held {before}, now {_held(portway)}; connections of backends: {stage.first.connections}"

    wait_for(is_settled, what_is_left, SETTLED)
