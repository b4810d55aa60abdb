"""Which target answers a call: the chain, its attempts, the time they may take, and cooldown.

The user has picked the model; the chain only keeps that name working. A target is left before the
first content or not at all, each step is written down as an Attempt, and what a way of failing
leads to stands in errors.FAILURES. Knows no HTTP and no sockets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from portway.backends.failures import CUT_OFF_CALL
from portway.call import Attempt, Limits, Served
from portway.config import CAPABILITIES
from portway.errors import BackendError, PortwayError, let_go
from portway.fields import dotted
from portway.memory.residency import Free, Others, Place, anywhere
from portway.request import has_images, prompt_chars
from portway.wire.events import DONE

if TYPE_CHECKING:
    from portway.call import Answer, Backend, Call, Watch
    from portway.config import Backend as BackendConfig
    from portway.config import Config, Cooldown, Model

# No tokenizer gets more than this out of running text on average (English is 4 to 5, code 3), so a
# prompt of more than 8 * num_ctx characters can't fit. What is shorter is for the backend to count.
MOST_CHARS_PER_TOKEN = 8
SHORT = 5.0  # seconds an unreachable server is skipped: it is often just being started


class Router:
    """Serves calls by one configuration. `cooling` outlives it, so that a reload forgets no failure.

    complete: gives a model back with what is known of it beyond the configuration (backends/catalogue.py). place:
    a place in memory for each attempt (memory/residency.py).
    """

    def __init__(
        self,
        config: Config,
        backends: Mapping[str, Backend],
        cooling: Cooling,
        complete: Callable[[Model], Model] = lambda model: model,
        place: Callable[[Model, Watch, float, Others], Awaitable[Place | Free]] = anywhere,
    ) -> None:
        cooling.adopt(config)
        self._config = config
        self._backends = backends
        self._cooling = cooling
        self._complete = complete
        self._place = place

    async def serve(self, call: Call, watch: Watch, *, fallback: bool = True, deadline: float | None = None) -> Served:
        """The first target of the chain that begins to answer (a stream) or answers (else).

        deadline: time.monotonic() of the request's end; None = timeouts.total from now.
        Raises ChainExhausted, ClientGone, or ClientError where the call itself is at fault.
        """
        call.fallback = fallback
        course = _Course(call, self._chain(call, fallback), deadline)
        cooling: list[Model] = []
        for target in course.targets():
            left = self._cooling.claim(target, course)
            if left is not None:
                course.skip(target, _still_cooling(left))
                cooling.append(target)
            elif served := await self._attempt(course, target, watch):
                return served
        if cooling and not course.tried:  # better than failing at once (litellm#3646)
            target = self._cooling.least_recently_failed(cooling)
            if served := await self._attempt(course, target, watch):
                return served
        raise course.exhausted()

    def _chain(self, call: Call, fallback: bool) -> list[Model]:
        """Embeddings of two models do not compare, so a fallback would poison an index in silence."""
        if not fallback or call.endpoint == "embeddings":
            return [self._complete(call.model)]
        return list(map(self._complete, self._config.chain(call.model)))

    async def _attempt(self, course: _Course, target: Model, watch: Watch) -> Served | None:
        """Try one target; None if it failed before the first content."""
        watch.phase = "waiting"
        started = time.monotonic()
        answer: Answer | None = None
        try:
            limits = course.limits(target, started)
            with await self._place(target, watch, limits.answer_by, course.later) as place:
                course.queued += time.monotonic() - started
                # from here on the place is given back when the answer is closed
                backend = self._backends[target.backend.name]
                answer = place.hold(await backend.open(course.call, target, limits, watch))
            if course.call.stream:
                followed = _Followed(answer, target, self._cooling)
                first = await followed.piece()
                served = Served(target, answer, course.attempts, first, followed.piece, course.queued)
            else:
                served = Served(target, answer, course.attempts, whole=await answer.whole(), queued=course.queued)
                self._cooling.succeeded(target)
            place.began()
        except BackendError as error:
            await _close(answer)
            self._cooling.failed(target, error, course)
            course.failed(target, error, time.monotonic() - started)
            let_go(error)
            await watch.on_loop()  # it may have waited for a place on a worker
            return None
        except BaseException:  # the client left, or asks for what nobody could do: no word on the target
            await _close(answer)
            self._cooling.leave(target, course)
            raise
        course.attempts.append(Attempt(target.name, "ok", time.monotonic() - started))
        return served


async def _close(answer: Answer | None) -> None:
    if answer is not None:
        await answer.close()


class _Followed:
    """A stream's pieces as they are; how it goes on and ends is the target's success or failure."""

    __slots__ = ("_answer", "_begun", "_cooling", "_target")

    def __init__(self, answer: Answer, target: Model, cooling: Cooling) -> None:
        self._answer = answer
        self._target = target
        self._cooling = cooling
        self._begun = False

    async def piece(self) -> bytes:
        """See Answer.piece."""
        try:
            piece = await self._answer.piece()
        except BackendError as error:
            if self._begun:
                self._cooling.failed(self._target, error)
            raise
        if piece.endswith(DONE):
            self._cooling.succeeded(self._target)
        elif not self._begun:
            self._cooling.answers(self._target)
        self._begun = True
        return piece


class ChainExhausted(PortwayError):
    """No target answered. `attempts` and the message name each; status and code are those of `decisive`.
    `body` is the backend's own error where the table says verbatim."""

    def __init__(
        self, asked: Model, attempts: list[Attempt], failures: list[tuple[Model, BackendError]], decisive: BackendError
    ) -> None:
        headers = {"x-should-retry": "false"}
        waits = [error.retry_after for _, error in failures if error.retry_after is not None]
        if waits and decisive.status in (429, 503):
            headers["Retry-After"] = str(max(1, round(min(waits))))
        super().__init__(
            _in_plain_words(asked, failures),
            status=decisive.status,
            type=decisive.type,
            code=decisive.code,
            param=decisive.param,
            headers=headers,
        )
        self.attempts = attempts
        self.body = decisive.body


# --- one call's way down its chain ----------------------------------------------------------------


class _Course:
    """What was tried, what is still open, and how long it may take."""

    tried = False
    queued = 0.0  # seconds spent waiting for places
    _decisive: BackendError | None = None  # what the client is told: its status and code
    _over = False

    def __init__(self, call: Call, chain: list[Model], deadline: float | None) -> None:
        self.call = call
        self.attempts: list[Attempt] = []
        self._failures: list[tuple[Model, BackendError]] = []
        self._chain = chain
        self._left = len(chain)
        self._deadline = time.monotonic() + call.model.timeouts.total if deadline is None else deadline
        self._blocks: list[Callable[[Model], BackendError | None]] = []  # each says why a target is out

    def targets(self) -> Iterator[Model]:
        """The members that may be tried, in order, as long as none of them has ended the call."""
        for position, target in enumerate(self._chain):
            self._left = len(self._chain) - position
            if self._over:
                return
            if why := self._blocked(target):
                self.skip(target, why)
            else:
                yield target

    def later(self) -> Iterator[Model]:
        """The members behind the present one that may still be tried."""
        return (target for target in self._chain[len(self._chain) - self._left + 1 :] if not self._blocked(target))

    def limits(self, target: Model, now: float) -> Limits:
        """This attempt's share: what is left of the whole, divided among those still to come."""
        times = target.timeouts
        answer_by = now + max(0.0, self._deadline - now) / self._left
        return Limits(times.connect, times.load, times.first_token, times.idle, answer_by, self._deadline)

    def skip(self, target: Model, why: BackendError) -> None:
        """Pass a target over without trying it."""
        self._note(target, why, 0.0)

    def failed(self, target: Model, error: BackendError, seconds: float) -> None:
        """A target was tried in vain; what its way of failing leads to."""
        rule = error.failure.falls_back
        again = any(earlier.reason == error.reason for _, earlier in self._failures)
        self._note(target, error, seconds)
        if not self.tried or rule == "no":  # what ends the call says more than what began it
            self._decisive = error
        self.tried = True
        if rule == "no" or (rule == "once" and again) or time.monotonic() >= self._deadline:
            self._over = True
        elif rule == "other_backend":
            self._blocks.append(lambda other: _same_backend(other, target))
        elif rule == "larger_window":
            self._blocks.append(lambda other: _no_larger(other, target))

    def exhausted(self) -> ChainExhausted:
        """The error that tells the client of all this."""
        decisive = self._decisive or self._failures[0][1]
        return ChainExhausted(self.call.model, self.attempts, self._failures, decisive)

    def _note(self, target: Model, error: BackendError, seconds: float) -> None:
        self.attempts.append(Attempt(target.name, error.reason, seconds, error.detail))
        self._failures.append((target, error))

    def _blocked(self, target: Model) -> BackendError | None:
        for block in self._blocks:
            if why := block(target):
                return why
        if target.capabilities is not None and (missing := _missing(self.call, target.capabilities)):
            return BackendError("unsupported", f"skipped, as it can't do this: {missing}", detail=f"no {missing}")
        if _too_long(self.call, target):
            return _too_small(target, "the prompt can't fit its window")
        return None


# --- why a target is passed over ------------------------------------------------------------------


def _still_cooling(left: float) -> BackendError:
    if not left:
        return BackendError("cooling", "skipped while another request tries it again", detail="being probed")
    return BackendError("cooling", f"skipped for another {left:.0f} s, as it kept failing", detail=f"{left:.0f}s left")


def _same_backend(other: Model, than: Model) -> BackendError | None:
    if other.backend != than.backend:
        return None
    return BackendError("backend_auth", "skipped, as it is behind the same backend", detail="same backend")


def _no_larger(other: Model, than: Model) -> BackendError | None:
    """A window that is not known may be larger: it is tried."""
    if other.num_ctx is None or than.num_ctx is None or other.num_ctx > than.num_ctx:
        return None
    return _too_small(other, "its window is no larger")


def _too_small(target: Model, why: str) -> BackendError:
    message = f"skipped, as {why} ({target.num_ctx} tokens)"
    return BackendError("context_length_exceeded", message, detail=f"num_ctx {target.num_ctx}")


def _missing(call: Call, known: Collection[str]) -> str:
    """What the call needs and a target that has these capabilities lacks; "" if nothing."""
    if "tools" not in known and call.body.get("tools") and call.body.get("tool_choice") != "none":
        return "tools"
    if "vision" not in known and has_images(call.body):
        return "vision"
    if "insert" not in known and call.endpoint == "completions" and call.body.get("suffix"):
        return "insert"
    if "embedding" not in known and call.endpoint == "embeddings":
        return "embedding"
    return ""


def _too_long(call: Call, target: Model) -> bool:
    if target.num_ctx is None or len(call.raw) <= target.num_ctx * MOST_CHARS_PER_TOKEN:
        return False
    return prompt_chars(call.body) > target.num_ctx * MOST_CHARS_PER_TOKEN


# --- cooldown -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Health:
    failures: int = 0  # in a row
    rounds: int = 0  # cooldowns in a row
    failed_at: float = 0.0
    until: float = 0.0  # skipped until then; 0.0 = not cooling
    probe: object = None  # whose request finds out whether it is over


class Cooling:
    """How each target fares: one physical model behind one backend. A failing one is skipped for a
    while, then one request probes it.

    The lock guards the table and each entry; nothing is waited for under it. A table without an entry
    is looked at without it: most targets never fail.
    """

    def __init__(self, rule: Cooldown, clock: Callable[[], float] = time.monotonic) -> None:
        self.rule = rule
        self._clock = clock
        self._lock = threading.Lock()
        self._table: dict[tuple[BackendConfig, str], _Health] = {}

    def adopt(self, config: Config) -> None:
        """Go on by another configuration. A target stays what it is as long as its backend's address,
        key and kind do; one whose backend was corrected deserves a new start."""
        with self._lock:
            self.rule = config.cooldown
            present = set(config.backends.values())
            self._table = {key: health for key, health in self._table.items() if key[0] in present}

    def claim(self, target: Model, who: object) -> float | None:
        """Seconds for which the target is still to be skipped; None = try it; 0.0 = another request probes it.

        Whoever gets None must report by `succeeded`, `answers`, `failed` or `leave`, under the same name.
        """
        if not self._table:
            return None
        with self._lock:
            health = self._table.get(_key(target))
            if health is None or not health.until:
                return None
            left = health.until - self._clock()
            if left <= 0 and health.probe is None:
                health.probe = who
                return None
            return max(0.0, left)

    def succeeded(self, target: Model) -> None:
        """It answered to the end."""
        if self._table:
            with self._lock:
                self._table.pop(_key(target), None)

    def answers(self, target: Model) -> None:
        """It has begun to answer, so it need not be skipped; how that ends is still to be seen."""
        if self._table:
            with self._lock:
                health = self._table.get(_key(target))
                if health is not None:
                    health.until, health.probe = 0.0, None

    def leave(self, target: Model, who: object) -> None:
        """The attempt ended without a word on the target: its client left."""
        with self._lock:
            health = self._table.get(_key(target))
            if health is not None and health.probe is who:
                health.probe = None

    def failed(self, target: Model, error: BackendError, who: object = None) -> None:
        """It failed; whether and how long it is skipped for that."""
        self.leave(target, who)
        if error.failure.cools == "no":
            return
        now = self._clock()
        with self._lock:
            health = self._table.setdefault(_key(target), _Health())
            health.failures += 1
            health.failed_at = now
            # what fails while it cools anyway had begun before, or was the last resort: no further round
            already = health.until > now
            seconds = self._seconds(error, health.failures, health.rounds - already)
            if seconds:
                health.rounds += not already
                health.until = max(health.until, now + seconds)

    def least_recently_failed(self, targets: list[Model]) -> Model:
        """The one to try when all of them are cooling."""
        with self._lock:
            return min(targets, key=lambda target: self._table.get(_key(target), _Health()).failed_at)

    def cooling(self) -> dict[tuple[str, str], float]:
        """(backend, physical model) -> seconds left, of those that are being skipped now."""
        now = self._clock()
        with self._lock:
            table = [(backend.name, model, health.until) for (backend, model), health in self._table.items()]
        return {(backend, model): until - now for backend, model, until in table if until > now}

    def _seconds(self, error: BackendError, failures: int, rounds: int) -> float:
        """0.0 = not yet. Each round in a row takes twice as long, up to `longest`."""
        rule, cools = self.rule, error.failure.cools
        if cools == "long":
            return rule.longest
        if cools == "told" and error.retry_after is not None:
            return min(error.retry_after, rule.longest)
        if failures < rule.failures:
            return 0.0
        if cools == "short":
            return min(SHORT, rule.seconds)
        return min(rule.seconds * 2.0 ** min(rounds, 16), rule.longest)


def _key(target: Model) -> tuple[BackendConfig, str]:
    return target.backend, target.model


# --- words ----------------------------------------------------------------------------------------

# What helps against each way of failing, unless the error knows better. model, asked: the sections of
# the target and of the model asked for; backend: the section of the target's backend.
_WAYS_OUT: Mapping[str, str] = {
    "connect_timeout": "see whether the server of [{backend}] is up",
    "connection_lost": "see the log of the server of [{backend}]",
    "bad_answer": "see whether {backend}.url and kind are right",
    "loading_timeout": "try again soon, or raise {model}.timeouts.load",
    "busy": "try again later",
    "rate_limited": "try again later",
    "server_error": "see the log of the server of [{backend}]",
    "first_token_timeout": "raise {model}.timeouts.first_token and {asked}.timeouts.total",
    "answer_timeout": "stream the answer, or raise {asked}.timeouts.total",
    "idle_timeout": "raise {model}.timeouts.idle",
    "total_timeout": "raise {asked}.timeouts.total",
    "model_not_found": "correct {model}.model",
    "context_length_exceeded": "shorten the prompt, or ask a model with a larger num_ctx",
    "template_error": "ask a model with another chat template",
    "empty_answer": "ask in other words, or another model",
    "unsupported": "ask a model that can",
    "queue_full": "try again later, or raise {backend}.max_queue",
    "no_room": "try again later, or raise memory.budget or {asked}.timeouts.total",
    "cold": "set {model}.prefer_warm = false to have it loaded whatever it takes",
}


def _in_plain_words(asked: Model, failures: list[tuple[Model, BackendError]]) -> str:
    """What happened at each target, and what would help."""
    said: dict[str, list[str]] = {}  # message -> who; one server's being down is said once
    for target, error in failures:
        said.setdefault(error.message.rstrip("."), []).append(target.name)
    if {target.name for target, _ in failures} == {asked.name}:
        text = f"{asked.name} could not answer: {'; '.join(said)}."
    else:
        steps = "; ".join(f"{', '.join(names)}: {message}" for message, names in said.items())
        text = f"{asked.name} could not answer, nor could a fallback. {steps}."
    ways = list(dict.fromkeys(way for target, error in failures if (way := _way_out(asked, target, error))))
    return f"{text} Way out: {'; or '.join(ways)}." if ways else text


def _way_out(asked: Model, target: Model, error: BackendError) -> str:
    text = _WAYS_OUT.get(error.reason, "")
    if error.reason == "unsupported" and error.detail.removeprefix("no ") in CAPABILITIES:
        text += ", or correct {model}.capabilities"
    if error.detail == CUT_OFF_CALL:
        text = "raise max_tokens: they ended inside a tool call"
    return error.way_out or text.format(
        model=dotted("models", target.name),
        asked=dotted("models", asked.name),
        backend=dotted("backends", target.backend.name),
    )
