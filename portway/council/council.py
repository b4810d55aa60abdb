"""kind = "council": several models answer each for themselves, then a chairman writes one answer of theirs.

    CouncilAnswer.pieces / whole
      Meeting      the members: a thread each, or one for all; what they say, and their end
        Seat       one member: its letter, its words, how it fared
      chairman     reads the seats' words under letters (prompts.py), and is streamed live

Members and chairman are asked through the Router, so each has its chain, cooldown and time limits. A
member's failure is told and never hidden; its words are an answer or nothing. What nobody here does:
vote, rank, or drop who disagrees.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from portway.call import Attempt, Composed, Tally, finish, pieces_of
from portway.council.nested import (
    Bill,
    PanelFailed,
    Retelling,
    chunks_of,
    content_of,
    document,
    fate,
    message,
    not_by,
    refuse_others,
    within,
)
from portway.council.prompts import (
    Response,
    Scrubber,
    fitted,
    for_chairman,
    for_member,
    question,
    room_in,
    without_images,
    without_thinking,
)
from portway.errors import BackendError, ClientError, ClientGone, NoThread, PortwayError, let_go
from portway.panels import Council
from portway.wire.events import loads

if TYPE_CHECKING:
    from portway.call import Call, Limits, Served, Watch
    from portway.config import Config, Model
    from portway.panels import Member
    from portway.routing import Router

TEMPERATURE = 0.7  # of a member, unless its params say otherwise: equal models shall not answer alike
MEMBERS_SHARE = 0.6  # of the time: the members'. The rest is the chairman's, which reads all and writes last
PROGRESS_EVERY = 2.0  # seconds between two words on the members' progress: a sign of life, not a ticker
# What a member is sent of the client's options: the bounds. The others shape the answer, which is the chairman's.
_BOUNDS = ("max_tokens", "max_completion_tokens")
# What only a single model could do, and why not a council.
_REFUSED = {
    "tools": "calls no tools: its answer is put together from several",
    "functions": "calls no functions: its answer is put together from several",
    "web_search_options": "does not search the web",
    "logprobs": "has no log probabilities: its answer is put together from several",
    "top_logprobs": "has no log probabilities: its answer is put together from several",
}

Fits = Callable[[Sequence["Model"]], "bool | None"]


def unknown(_models: Sequence[Model]) -> bool | None:
    """Whether models fit in memory together, where nobody measures it."""
    return None


class CouncilBackend:
    """`open` a Call on a council (Backend, call.py).

    complete: gives a model back with what its backend says of it. fits_together: whether models can be in
    memory at the same time; None = not known.
    """

    def __init__(
        self, config: Config, router: Router, complete: Callable[[Model], Model], fits_together: Fits = unknown
    ) -> None:
        self._models = config.models
        self._chain = config.chain
        self._router = router
        self._complete = complete
        self._fits_together = fits_together
        self._scrubber = Scrubber(config.models.values())

    async def open(self, call: Call, target: Model, limits: Limits, watch: Watch) -> CouncilAnswer:
        """Nobody is asked before the answer is read. Raises ClientError for what a council can't do. From here
        on the call is a thread's: a council waits for threads, and each of those for sockets."""
        council = target.panel
        assert isinstance(council, Council)  # noqa: S101 - State gives it no other
        refuse_others(call, target)
        for name, why in _REFUSED.items():
            if call.body.get(name):
                raise not_by(target, why, name)
        await watch.on_thread(for_good=True)
        members = [self._complete(self._models[member.name]) for member in council.members]
        together = run_together(members, council.parallel, self._fits_together)
        chairman = self._complete(self._models[council.chairman])
        others = self._chain(chairman)[1:] if call.fallback else []
        chairs = [chairman, *map(self._complete, others)]
        now = time.monotonic()
        until = now + (limits.deadline - now) * MEMBERS_SHARE
        seats = _seats(call, council, members)
        lanes = _lanes(seats, chairman, together=together)
        meeting = Meeting(self._router, self._chain, call, seats, lanes, until)
        charter = Charter(target.name, council, chairs, self._router, self._scrubber)
        return CouncilAnswer(call, charter, meeting, limits.deadline, watch)

    def close(self) -> None:
        """It has no connections of its own."""


def run_together(members: Sequence[Model], wish: bool | str, fits_together: Fits) -> bool:
    """Whether the members run at the same time.

    Where nobody knows what fits, two different models behind one Ollama run one after the other: if they do
    not fit, it would throw out one for the other, again and again. The same model twice runs at once: it is
    loaded once, and the worst is that Ollama (OLLAMA_NUM_PARALLEL is 1 by default) makes one of the two wait,
    which is what `parallel = false` would do. Other servers hold what they serve in memory anyway.
    """
    if isinstance(wish, bool):
        return wish
    fits = fits_together(members)
    if fits is not None:
        return fits
    loaded = {(model.backend, model.model) for model in members if model.backend.kind == "ollama"}
    return len(loaded) == len({backend for backend, _ in loaded})


# --- the seats ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Seat:
    """One member's place. Its thread writes it; others read `tokens` at any time, the rest once it is `over`.

    status: "" as long as it runs; then "ok", "cut" (out of time, or of tokens, in the middle of an answer),
    "dismissed" (sent away, as the council was over) or the code of its error.
    """

    letter: str
    model: Model
    body: dict[str, Any]
    served_by: str = ""
    hosts: Sequence[str] = ()  # where it was answered
    tokens: int = 0  # as far as they came; each chunk is one, which the backend's own count corrects
    text: str = ""
    seconds: float = 0.0
    status: str = ""
    over: bool = False
    error: PortwayError | None = None
    warnings: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    @property
    def has_answered(self) -> bool:
        """Whether there is something to go on."""
        return self.status in ("ok", "cut")

    @property
    def progress(self) -> str:
        """In a few words, for the client that waits."""
        tokens = f"{self.tokens} token{'' if self.tokens == 1 else 's'}"
        if self.over:
            return f"done, {tokens}" if self.has_answered else f"failed ({self.status})"
        return f"{tokens} .." if self.tokens else "waiting"

    def to_json(self) -> dict[str, Any]:
        """For the answer's `portway`."""
        told = {"letter": self.letter, "model": self.model.name, "served_by": self.served_by or None}
        return {**told, "seconds": round(self.seconds, 3), "tokens": self.tokens, "status": self.status or "running"}


def _seats(call: Call, council: Council, members: Sequence[Model]) -> list[Seat]:
    """In the order of the configuration. Which letter each has is drawn by lot, so that neither the order nor
    a name tells who speaks; a request's `seed` makes it the same lot each time."""
    letters = dict(zip(_drawn(len(members), call.body.get("seed")), "ABCDEFGH", strict=False))
    bodies = [_body(call, council, member, index) for index, member in enumerate(council.members)]
    return [Seat(letters[index], model, body) for index, (model, body) in enumerate(zip(members, bodies, strict=True))]


def _drawn(count: int, seed: object) -> list[int]:
    """0 to count - 1, shuffled."""
    if isinstance(seed, int):
        return sorted(range(count), key=lambda index: sha256(f"portway {seed} {index}".encode()).digest())
    return sorted(range(count), key=lambda _: os.urandom(8))


def _body(call: Call, council: Council, member: Member, index: int) -> dict[str, Any]:
    """A member's question. The same seed for all would make equal models say the same."""
    asked = call.body
    body: dict[str, Any] = {"messages": for_member(asked["messages"], council.member_prompt)}
    body |= {name: asked[name] for name in _BOUNDS if asked.get(name) is not None}
    if isinstance(asked.get("seed"), int):
        body["seed"] = asked["seed"] + index
    return {**body, "temperature": TEMPERATURE, **member.params}


def _lanes(seats: Sequence[Seat], chairman: Model, *, together: bool) -> list[list[Seat]]:
    """Who waits for whom: a lane each, or one lane, in which nobody's model is loaded twice and the
    chairman's comes last, since it is needed right after."""
    if together:
        return [[seat] for seat in seats]
    loaded = [_loaded(seat.model) for seat in seats]
    turn = {model: (model == _loaded(chairman), loaded.index(model)) for model in loaded}
    return [sorted(seats, key=lambda seat: turn[_loaded(seat.model)])]


def _loaded(model: Model) -> tuple[str, str]:
    return model.backend.name, model.model


# --- the members' part ----------------------------------------------------------------------------


class Meeting:
    """The members while they answer. Whoever starts it must `end` it.

    Its threads are woken and waited for by sockets: a byte on the bell says that some seat is over, and the
    end of the leash, which every member's wait looks at, sends them all home. No lock: each seat is written by
    one thread, and its `over` is the last thing that is written.
    """

    def __init__(
        self,
        router: Router,
        chain_of: Callable[[Model], list[Model]],
        call: Call,
        seats: list[Seat],
        lanes: list[list[Seat]],
        until: float,
    ) -> None:
        self.seats = seats
        self.parallel = len(lanes) > 1
        self._router = router
        self._chain_of = chain_of
        self._call = call
        self._until = until
        self._lanes = lanes
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    @property
    def is_over(self) -> bool:
        """Whether nobody speaks any more."""
        return all(seat.over for seat in self.seats)

    def start(self) -> None:
        """Let the members begin."""
        self._bell, self._striker = socket.socketpair()
        self._leash, self._hand = socket.socketpair()
        self._sockets = [self._bell, self._striker, self._leash, self._hand]
        self._bell.setblocking(False)
        self._striker.setblocking(False)
        for number, lane in enumerate(self._lanes, 1):
            thread = threading.Thread(target=self._run, args=(lane,), name=f"portway-member-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:
                raise NoThread from exc
            self._threads.append(thread)

    def wait(self, watch: Watch, until: float) -> None:
        """Until some seat is over, or until then. Raises ClientGone."""
        if finish(watch.readable(self._bell, until)):
            self._bell.recv(64)

    def end(self) -> None:
        """Send home who still speaks; all threads have ended, and all their connections, when this returns."""
        if not self._sockets:
            return
        self._hand.close()
        for thread in self._threads:
            thread.join()  # each of its waits has just ended
        for sock in self._sockets:
            sock.close()
        self._threads, self._sockets = [], []

    def _run(self, lane: Sequence[Seat]) -> None:
        """On a thread: one seat after the other, each with its share of the time that is left."""
        for position, seat in enumerate(lane):
            started = time.monotonic()
            share = (self._until - started) / (len(lane) - position)
            try:
                self._speak(seat, started + share)
            except ClientGone:
                seat.status = "dismissed"
            except PortwayError as error:
                _failed(seat, error)
            finally:
                seat.status = seat.status or "internal"  # a bug, of which Python tells on stderr
                seat.seconds = time.monotonic() - started
                seat.over = True
                self._striker.send(b".")

    def _speak(self, seat: Seat, until: float) -> None:
        """Let it answer. Nobody has read its words yet: where they break off, the rest of its chain still may."""
        targets = self._chain_of(seat.model) if self._call.fallback else [seat.model]
        while True:
            model = replace(targets[0], fallback=tuple(other.name for other in targets[1:]))
            try:
                self._ask(seat, model, until - time.monotonic())
            except BackendError as error:
                tried = [target.name for target in targets].index(seat.served_by)
                targets = targets[tried + 1 :]
                if not targets or error.reason == "total_timeout":
                    raise
            else:
                return

    def _ask(self, seat: Seat, model: Model, seconds: float) -> None:
        call = within(self._call, model, seat.body, seconds, stream=True)
        served = finish(self._router.serve(call, LeashWatch(self._leash), fallback=call.fallback))
        seat.served_by, seat.tally = served.model.name, served.answer.tally
        words: list[str] = []
        try:
            self._listen(served, seat, words)
        finally:
            finish(served.answer.close())
            seat.text = without_thinking("".join(words))
            seat.warnings, seat.hosts = served.answer.warnings, served.hosts
        if not seat.text:
            raise BackendError("empty_answer", "the answer has no text")
        seat.status = "cut" if seat.tally.finish_reason == "length" else "ok"

    def _listen(self, served: Served, seat: Seat, words: list[str]) -> None:
        for chunk in chunks_of(pieces_of(served)):
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or {}
                words.append(content_of(delta))
                seat.tokens += bool(delta.get("content") or delta.get("reasoning_content"))
        seat.tokens = seat.tally.completion_tokens or seat.tokens


def _failed(seat: Seat, error: PortwayError) -> None:
    """What was said when the time was over is still an answer: to drop it would be to prefer who is quick
    over who is thorough (amiable-dev/llm-council#660)."""
    if error.code == "total_timeout" and seat.text:
        seat.status = "cut"
        return
    seat.error, seat.status, seat.text = error, error.code or error.type, ""
    let_go(error)


class LeashWatch:
    """The Watch (call.py) of a member's thread: its client is the council, which lets go of the leash when it
    is over."""

    def __init__(self, leash: socket.socket) -> None:
        self.phase = "waiting"
        self._leash = leash

    async def readable(self, sock: socket.socket, until: float) -> bool:
        """See Watch.readable."""
        return self._wait(sock.fileno(), select.POLLIN, until)

    async def writable(self, sock: socket.socket, until: float) -> bool:
        """See Watch.writable."""
        return self._wait(sock.fileno(), select.POLLOUT, until)

    async def send(self, sock: socket.socket, data: bytes | memoryview) -> int:
        """See Watch.send."""
        return sock.send(data)

    async def pause(self, until: float) -> None:
        """See Watch.pause."""
        self._wait(-1, 0, until)

    async def on_thread(self, *, for_good: bool = False) -> None:
        """See Watch.on_thread."""

    async def on_loop(self) -> None:
        """See Watch.on_loop."""

    def _wait(self, fd: int, events: int, until: float) -> bool:
        poller = select.poll()
        poller.register(self._leash, select.POLLIN)
        if fd >= 0:
            poller.register(fd, events)
        while True:
            left = until - time.monotonic()
            ready = {ready for ready, _ in poller.poll(max(0, int(left * 1000) + 1) if left > 0 else 0)}
            if self._leash.fileno() in ready:
                raise ClientGone
            if fd in ready or left <= 0:
                return fd in ready


# --- the answer -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Charter:
    """What a council goes by. chairs: the chairman, and who follows it where it fails."""

    name: str
    council: Council
    chairs: Sequence[Model]
    router: Router
    scrubber: Scrubber

    @property
    def readers(self) -> list[Model]:
        """Of the chairs those for each of which the question has to be made anew, with the chairs behind them as
        its fallback: what was made for the one before may be too long for it, or show it an image."""
        readers: list[Model] = []
        for number, chair in enumerate(self.chairs):
            if not readers or not _reads_as_much(chair, readers[-1]):
                readers.append(replace(chair, fallback=tuple(other.name for other in self.chairs[number + 1 :])))
        return readers


def _reads_as_much(model: Model, than: Model) -> bool:
    wide = model.num_ctx is None or (than.num_ctx is not None and model.num_ctx >= than.num_ctx)
    return wide and (_sees(model) or not _sees(than))


def _sees(model: Model) -> bool:
    """Whether it takes images, or may."""
    return model.capabilities is None or "vision" in model.capabilities


class CouncilAnswer(Composed):
    """An Answer (call.py): the members are heard, then the chairman answers."""

    def __init__(self, call: Call, charter: Charter, meeting: Meeting, deadline: float, watch: Watch) -> None:
        self.tally = Tally()
        self.warnings: list[str] = []
        self._call = call
        self._charter = charter
        self._meeting = meeting
        self._seats = meeting.seats
        self._deadline = deadline
        self._watch = watch
        self._chair = Seat("", charter.chairs[0], {})  # the chairman's own fate, told like a member's
        self._chair_taken = 0.0  # time.monotonic() when it was asked
        self._served: Served | None = None  # its answer, as long as that is open
        self._pieces = self._told_pieces()

    # what the client is told

    @property
    def served_by(self) -> str:
        """council(fast-9b,fast-9b>think-9b): who answered, or may yet. Without a > it is a member's answer."""
        if self._chair.error is not None:
            return f"{self._charter.name}({self._stand_in().served_by})"
        members = [seat.served_by or seat.model.name for seat in self._seats if not seat.over or seat.has_answered]
        return f"{self._charter.name}({','.join(members)}>{self._chair.served_by or self._chair.model.name})"

    @property
    def headers(self) -> Mapping[str, str]:
        """X-Council, once it is known how the members fared."""
        return {"X-Council": self._verdict()} if self._meeting.is_over else {}

    @property
    def hosts(self) -> Sequence[str]:
        """Of the members and the chairman."""
        return [host for seat in (*self._seats, self._chair) for host in seat.hosts]

    def _verdict(self) -> str:
        """X-Council: "ok" if everyone answered in full, and as itself."""
        everyone = [*self._seats, *([self._chair] if self._chair.over else [])]
        full = all(seat.status in ("", "ok") and seat.served_by in ("", seat.model.name) for seat in everyone)
        return "ok" if full else "degraded"

    def _told(self, verdict: str) -> dict[str, Any]:
        """The `portway` of the body, or of the last chunk."""
        order = sorted(range(len(self._seats)), key=lambda index: self._seats[index].letter)
        if self._chair_taken:
            self._chair.seconds = time.monotonic() - self._chair_taken
        chair = self._chair.to_json()
        del chair["letter"]
        told: dict[str, Any] = {
            "served_by": self.served_by if verdict != "failed" else None,
            "council": verdict,
            "mode": "parallel" if self._meeting.parallel else "serial",
            "members": [seat.to_json() for seat in self._seats],
            "order": order,
            "chairman": chair,
        }
        late = [warning for warning in self._all_warnings() if warning not in self.warnings]
        return {**told, "warnings": late} if late else told

    def _all_warnings(self) -> list[str]:
        return list(dict.fromkeys(warning for seat in (*self._seats, self._chair) for warning in seat.warnings))

    # Answer's methods

    async def piece(self) -> bytes:
        """See Answer.piece. The first word on the members' progress already counts as content: from then on
        nothing can be taken back, and a chairman that fails is dealt with in here."""
        return next(self._pieces, b"")

    def _told_pieces(self) -> Iterator[bytes]:
        retelling = Retelling(self._call, self._charter.name)
        for words in self._hear():
            yield retelling.say(reasoning_content=words, reasoning=words)
        served = self._ask_chairman(stream=True)
        try:
            yield from self._relayed(served, retelling) if served else self._stood_in(retelling)
        except BackendError as error:  # as a PortwayError: the council is no target, and does not cool down
            raise self._broken(error) from error
        yield retelling.end(self._bill().usage, self._told(self._verdict()))

    async def whole(self) -> bytes:
        """See Answer.whole."""
        for _ in self._hear():
            pass  # a plain answer has no place for words on its progress
        served = self._ask_chairman(stream=False)
        body = message(self._labelled(), self._stand_in_reason()) if served is None else loads(served.whole or b"")
        self.warnings = self._all_warnings()
        return document(self._call, self._charter.name, body, self._bill().usage, self._told(self._verdict()))

    async def close(self) -> None:
        """See Answer.close: all are sent home, and wait for no one."""
        self._pieces = iter(())  # the others would hold this answer, and be held by it
        self._meeting.end()
        if self._served is not None:
            await self._served.answer.close()
            self._take_stock(self._served.answer.tally)
            self._served = None

    # first the members

    def _hear(self) -> Iterator[str]:
        """Let the members answer; words on their progress every so often, once there is some. Raises
        PanelFailed as soon as too few of them can still answer."""
        self._meeting.start()
        self._watch.phase = "prompt"
        said, again = "", time.monotonic() + PROGRESS_EVERY
        while not self._meeting.is_over:
            self._meeting.wait(self._watch, again)
            self._check_quorum()
            if time.monotonic() >= again:
                again = time.monotonic() + PROGRESS_EVERY
                words = self._progress()
                if words != said and any(seat.tokens for seat in self._seats):
                    said = words
                    yield words
        self._check_quorum()
        self._meeting.end()
        self.warnings = self._all_warnings() if not said else []

    def _progress(self) -> str:
        by_letter = sorted(self._seats, key=lambda seat: seat.letter)
        return "; ".join(f"Response {seat.letter}: {seat.progress}" for seat in by_letter) + "\n"

    def _check_quorum(self) -> None:
        failed = [seat for seat in self._seats if seat.over and not seat.has_answered]
        for seat in failed:
            if isinstance(seat.error, ClientError):
                raise seat.error  # nobody could serve this request
        if len(self._seats) - len(failed) < self._charter.council.needed:
            self._meeting.end()
            raise self._no_quorum(failed)

    def _no_quorum(self, failed: Sequence[Seat]) -> PanelFailed:
        """502, unless all failed alike by the request's own fault: an agent that hears of its too long prompt
        makes it shorter."""
        count, needed = len(self._seats), self._charter.council.needed
        errors = [seat.error for seat in failed if seat.error is not None]
        alike = {(error.status, error.code or "", error.type) for error in errors}
        status, code, type = next(iter(alike)) if len(alike) == 1 else (502, "no_quorum", "api_error")
        if status != 400:
            status, code, type = 502, "no_quorum", "api_error"
        fates = "; ".join(fate(seat.model.name, seat.error, seat.status) for seat in failed)
        return PanelFailed(
            f"The council '{self._charter.name}' has no quorum: {len(failed)} of its {count} members failed, "
            f"and {needed} have to answer. {fates}.",
            status=status,
            code=code,
            type=type,
            attempts=[_attempt(seat) for seat in self._seats if seat.over],
            told=self._told("failed"),
            headers={"X-Council": "failed"},
        )

    # then the chairman

    def _ask_chairman(self, *, stream: bool) -> Served | None:
        """Its answer, or that of the next in its chain, each asked what it can read; None if a member's has to
        stand in for it."""
        self._chair_taken = time.monotonic()
        failures: list[PortwayError] = []
        for chair in self._charter.readers:
            try:
                served = self._served = self._ask_chair(chair, stream=stream)
            except PortwayError as error:
                if isinstance(error, ClientError) or error.code == "bad_request":
                    raise  # the request itself is at fault
                let_go(error)
                failures.append(error)
                if time.monotonic() >= self._deadline:
                    break
            else:
                self._take_chair(served)
                return served
        if self._wants_form():
            raise failures[0]
        self._chair.error, self._chair.status = failures[0], failures[0].code or failures[0].type
        self._chair.over = True
        return None

    def _ask_chair(self, chair: Model, *, stream: bool) -> Served:
        body = {**self._call.body, "messages": self._messages_for(chair)}
        call = within(self._call, chair, body, self._deadline - time.monotonic(), stream=stream)
        return finish(self._charter.router.serve(call, self._watch, fallback=call.fallback))

    def _take_chair(self, served: Served) -> None:
        chair = self._chair
        chair.served_by, chair.tally, chair.status = served.model.name, served.answer.tally, "ok"
        chair.warnings, chair.hosts = served.answer.warnings, served.hosts
        chair.over = True

    def _messages_for(self, chair: Model) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = self._call.body["messages"]
        subject, prompt = question(asked), self._charter.council.chairman_prompt
        seats = sorted((seat for seat in self._seats if seat.has_answered), key=lambda seat: seat.letter)
        texts = [self._charter.scrubber.scrub(seat.text, subject) for seat in seats]
        if chair.num_ctx is not None:
            texts = fitted(texts, room_in(chair.num_ctx, asked, prompt, self._most_tokens()))
        responses = [Response(seat.letter, text, seat.status == "ok") for seat, text in zip(seats, texts, strict=True)]
        return for_chairman(asked if _sees(chair) else without_images(asked), responses, prompt)

    def _most_tokens(self) -> int | None:
        said = [self._call.body.get(name) for name in _BOUNDS]
        return next((most for most in said if isinstance(most, int) and most > 0), None)

    def _wants_form(self) -> bool:
        """Whether a form was asked for, which only the chairman was told of: a member's answer would have none."""
        wanted = self._call.body.get("response_format")
        return isinstance(wanted, dict) and wanted.get("type") not in (None, "text")

    def _relayed(self, served: Served, retelling: Retelling) -> Iterator[bytes]:
        for piece in pieces_of(served):
            if told := retelling.tell(piece):
                yield told

    def _broken(self, error: BackendError) -> PanelFailed:
        self._chair.status = error.reason
        return PanelFailed(
            f"The chairman of '{self._charter.name}' broke off: {error.message}",
            status=error.status,
            code=error.reason,
            attempts=[_attempt(seat) for seat in (*self._seats, self._chair)],
            told=self._told("failed"),
        )

    # or a member in its place

    def _stood_in(self, retelling: Retelling) -> Iterator[bytes]:
        yield retelling.say(content=self._labelled())
        retelling.say_last(self._stand_in_reason())

    def _stand_in(self) -> Seat:
        """The first member, by the configuration, that came to its end; else the first that answered."""
        return next((seat for seat in self._seats if seat.status == "ok"), None) or next(
            seat for seat in self._seats if seat.has_answered
        )

    def _labelled(self) -> str:
        seat = self._stand_in()
        why = f"The chairman {self._chair.model.name} could not answer ({self._chair.status})"
        text = f"[{why}. This is the answer of one member, {seat.served_by}, as it was.]\n\n{seat.text}"
        self._take_stock(Tally(finish_reason=self._stand_in_reason(), content_chars=len(text)))
        return text

    def _stand_in_reason(self) -> str:
        return "stop" if self._stand_in().status == "ok" else "length"

    # what it all cost

    def _bill(self) -> Bill:
        self._chair.tokens = self._chair.tally.completion_tokens or 0
        bill = Bill()
        for seat in (*self._seats, self._chair):
            bill.add(seat.tally)
        self.tally.prompt_tokens, self.tally.completion_tokens = bill.prompt_tokens, bill.completion_tokens
        return bill

    def _take_stock(self, tally: Tally) -> None:
        """For the log: the answer is the chairman's, the tokens are everybody's."""
        self.tally.finish_reason = tally.finish_reason
        self.tally.content_chars = tally.content_chars
        self.tally.reasoning_chars = tally.reasoning_chars
        self.tally.truncated = tally.truncated
        self._bill()


def _attempt(seat: Seat) -> Attempt:
    return Attempt(seat.served_by or seat.model.name, seat.status, seat.seconds)
