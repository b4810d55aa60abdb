"""Which target answers a call: the chain, its attempts, the time they may take, and cooldown.

The user has picked the model; the chain only keeps that name working. A target is left before the
first content or not at all, each step is written down as an Attempt, and what a way of failing
leads to stands in errors.FAILURES. Knows no HTTP and no sockets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from portway.call import Attempt, Limits, Served
from portway.errors import BackendError, PortwayError

if TYPE_CHECKING:
    from portway.call import Backend, Call, Watch
    from portway.config import Config, Cooldown, Model

# No tokenizer gets more than this out of running text on average (English is 4 to 5, code 3), so a
# prompt of more than 8 * num_ctx characters can't fit. What is shorter is for the backend to count.
MOST_CHARS_PER_TOKEN = 8
SHORT = 5.0  # seconds an unreachable server is skipped: it is often just being started
SKIPPED = ("cooling", "unsupported")  # reasons that say nothing of how the target is


class ChainExhausted(PortwayError):
    """No target answered. `attempts` and the message name each; status and code are those of the
    first that was really tried. `body` is a backend's own error where the table says verbatim."""

    def __init__(self, asked: Model, attempts: list[Attempt], errors: list[BackendError]) -> None:
        decisive = next((error for error in errors if error.reason not in SKIPPED), errors[0])
        waits = [error.retry_after for error in errors if error.retry_after is not None]
        headers = {"x-should-retry": "false"}
        if waits and decisive.status in (429, 503):
            headers["Retry-After"] = str(max(1, round(min(waits))))
        super().__init__(
            _in_plain_words(asked, attempts, errors),
            status=decisive.status,
            type=decisive.type,
            code=decisive.code,
            param=decisive.param,
            headers=headers,
        )
        self.attempts = attempts
        self.body = decisive.body if len(errors) == 1 else None


class Router:
    """Serves calls by one configuration. `cooling` outlives it, so that a reload forgets no failure.

    complete: gives a model back with what is known of it beyond the configuration (catalogue.py).
    """

    def __init__(
        self,
        config: Config,
        backends: Mapping[str, Backend],
        cooling: Cooling,
        complete: Callable[[Model], Model] = lambda model: model,
    ) -> None:
        self._config = config
        self._backends = backends
        self._cooling = cooling
        self._complete = complete

    def serve(self, call: Call, watch: Watch, *, fallback: bool = True) -> Served:
        """The first target of the chain that begins to answer (a stream) or answers (else).

        Raises ChainExhausted, ClientGone, or ClientError where the call itself is at fault.
        """
        course = _Course(call, self._chain(call, fallback))
        spare: list[Model] = []  # cooling, but nothing else is against them
        for target in course.targets():
            wait = self._cooling.wait(target)
            if wait is not None:
                course.skip(target, "cooling", f"{wait:.0f}s left")
                spare.append(target)
                continue
            served = self._attempt(course, target, watch)
            if served is not None:
                return served
        if spare and len(spare) == course.skipped == len(course.attempts):
            served = self._attempt(course, self._cooling.least_recently_failed(spare), watch)
            if served is not None:
                return served
        raise ChainExhausted(call.model, course.attempts, course.errors)

    def _chain(self, call: Call, fallback: bool) -> list[Model]:
        """Embeddings of two models do not compare, so a fallback would poison an index in silence."""
        if not fallback or call.model.strict or call.endpoint == "embeddings":
            return [self._complete(call.model)]
        return [self._complete(member) for member in self._config.chain(call.model)]

    def _attempt(self, course: _Course, target: Model, watch: Watch) -> Served | None:
        """Try one target; None if it failed in a way that lets the next one try."""
        started = time.monotonic()
        limits = course.limits(target)
        outcome: BackendError | None = None
        try:
            served = _begin(self._backends[target.backend.name], course, target, limits, watch)
        except BackendError as exc:
            outcome = exc
        except BaseException:
            self._cooling.leave(target)
            raise
        seconds = time.monotonic() - started
        if outcome is None:
            self._cooling.succeeded(target)
            course.attempts.append(Attempt(target.name, "ok", seconds))
            return served
        self._cooling.failed(target, outcome)
        course.failed(target, outcome, seconds)
        return None


def _begin(backend: Backend, course: _Course, target: Model, limits: Limits, watch: Watch) -> Served:
    answer = backend.open(course.call, target, limits, watch)
    try:
        if not course.call.stream:
            return Served(target, answer, course.attempts, whole=answer.whole())
        pieces = answer.pieces()
        return Served(target, answer, course.attempts, first=next(pieces), rest=pieces)
    except BaseException:
        answer.close()
        raise


class _Course:
    """One call's way down its chain: what was tried, what is still open, and how long it may take."""

    def __init__(self, call: Call, chain: list[Model]) -> None:
        self.call = call
        self.attempts: list[Attempt] = []
        self.errors: list[BackendError] = []
        self.skipped = 0
        self._chain = chain
        self._left = len(chain)
        self._deadline = time.monotonic() + call.model.timeouts.total
        self._blocks: list[Callable[[Model], str]] = []  # each says why a target is out, or ""
        self._over = False

    def targets(self) -> Iterator[Model]:
        """The members that may be tried, in order, as long as none of them has ended the call."""
        for position, target in enumerate(self._chain):
            self._left = len(self._chain) - position
            if self._over:
                return
            if reason := self._blocked(target):
                self.skip(target, *reason)
            else:
                yield target

    def skip(self, target: Model, reason: str, detail: str) -> None:
        self.skipped += 1
        self._note(target, BackendError(reason, f"skipped: {detail}", detail=detail), 0.0)

    def failed(self, target: Model, error: BackendError, seconds: float) -> None:
        self._note(target, error, seconds)
        rule = error.failure.falls_back
        if rule == "no" or time.monotonic() >= self._deadline:
            self._over = True
        elif rule == "other_backend":
            self._blocks.append(lambda other: "same backend" if other.backend == target.backend else "")
        elif rule == "larger_window":
            self._blocks.append(lambda other: _no_larger(other, target))

    def limits(self, target: Model) -> Limits:
        """This attempt's share: what is left of the whole, divided among those still to come."""
        now = time.monotonic()
        times = target.timeouts
        answer_by = now + max(0.0, self._deadline - now) / max(1, self._left)
        return Limits(times.connect, times.load, times.first_token, times.idle, answer_by, self._deadline)

    def _note(self, target: Model, error: BackendError, seconds: float) -> None:
        self.attempts.append(Attempt(target.name, error.reason, seconds, error.detail))
        self.errors.append(error)

    def _blocked(self, target: Model) -> tuple[str, str] | None:
        for block in self._blocks:
            if detail := block(target):
                return ("backend_auth" if detail == "same backend" else "context_length_exceeded"), detail
        if missing := _missing(self.call, target):
            return "unsupported", f"no {missing}"
        if _too_long(self.call, target):
            return "context_length_exceeded", f"num_ctx {target.num_ctx}"
        return None


def _no_larger(other: Model, than: Model) -> str:
    """A window that is not known may be larger: it is tried."""
    if other.num_ctx is None or than.num_ctx is None or other.num_ctx > than.num_ctx:
        return ""
    return f"num_ctx {other.num_ctx} is no larger"


def _missing(call: Call, target: Model) -> str:
    """What the call needs and the target, as far as is known, lacks; "" if nothing."""
    known = target.capabilities
    if known is None:
        return ""
    if "tools" not in known and call.body.get("tools") and call.body.get("tool_choice") != "none":
        return "tools"
    if "vision" not in known and b'"image_url"' in call.raw and has_images(call.body):
        return "vision"
    if "insert" not in known and call.endpoint == "completions" and call.body.get("suffix"):
        return "insert"
    if "embedding" not in known and call.endpoint == "embeddings":
        return "embedding"
    return ""


def has_images(body: Mapping[str, Any]) -> bool:
    """Whether any message carries an image."""
    return any(part.get("type") == "image_url" for part in parts(body))


def parts(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The content parts of all messages, whatever else stands there."""
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                yield part


def _too_long(call: Call, target: Model) -> bool:
    if target.num_ctx is None or len(call.raw) <= target.num_ctx * MOST_CHARS_PER_TOKEN:
        return False
    return prompt_chars(call.body) > target.num_ctx * MOST_CHARS_PER_TOKEN


def prompt_chars(body: Mapping[str, Any]) -> int:
    """Characters of text in the prompt: messages' texts, or `prompt` and `suffix`. Images do not count."""
    total = sum(len(part["text"]) for part in parts(body) if isinstance(part.get("text"), str))
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        total += len(content) if isinstance(content, str) else 0
    return total + sum(len(text) for text in (body.get("prompt"), body.get("suffix")) if isinstance(text, str))


# --- cooldown -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Health:
    failures: int = 0  # in a row
    failed_at: float = 0.0
    until: float = 0.0  # cooling until then; 0.0 = not cooling
    probing: bool = False  # the one request that finds out whether it is over is under way


class Cooling:
    """How each (backend, physical model) fares. Failing ones are skipped for a while, then one
    request probes them.

    The lock guards the table and each entry; nothing is waited for under it.
    """

    def __init__(self, rule: Cooldown, clock: Callable[[], float] = time.monotonic) -> None:
        self.rule = rule
        self._clock = clock
        self._lock = threading.Lock()
        self._table: dict[tuple[str, str], _Health] = {}

    def wait(self, target: Model) -> float | None:
        """Seconds for which the target is still to be skipped; None = try it. Whoever gets None for
        a target that has cooled is its probe and must report by succeeded, failed or leave."""
        health = self._table.get(_key(target))  # no lock: most targets have never failed
        if health is None or not health.until:
            return None
        with self._lock:
            left = health.until - self._clock()
            if left > 0 or health.probing:
                return max(0.0, left)
            health.probing = True
            return None

    def succeeded(self, target: Model) -> None:
        if self._table.get(_key(target)) is not None:
            with self._lock:
                self._table.pop(_key(target), None)

    def leave(self, target: Model) -> None:
        """The attempt ended without a word on the target: its client left."""
        health = self._table.get(_key(target))
        if health is not None:
            health.probing = False

    def failed(self, target: Model, error: BackendError) -> None:
        rule = error.failure.cools
        if rule == "no":
            self.leave(target)
            return
        now = self._clock()
        with self._lock:
            health = self._table.setdefault(_key(target), _Health())
            health.probing = False
            health.failures += 1
            health.failed_at = now
            seconds = self._seconds(rule, health.failures, error.retry_after)
            if seconds:
                health.until = max(health.until, now + seconds)

    def least_recently_failed(self, targets: list[Model]) -> Model:
        with self._lock:
            return min(targets, key=lambda target: self._table.get(_key(target), _Health()).failed_at)

    def cooling(self) -> dict[tuple[str, str], float]:
        """(backend, physical model) -> seconds left, of those that are being skipped now."""
        now = self._clock()
        with self._lock:
            return {key: health.until - now for key, health in self._table.items() if health.until > now}

    def _seconds(self, rule: str, failures: int, told: float | None) -> float:
        """0.0 = not yet. Each further failure in a row doubles the time, up to `longest`."""
        longest = self.rule.longest
        if rule == "long":
            return longest
        if rule == "told" and told is not None:
            return min(told, longest)
        if rule == "short":
            return min(SHORT, self.rule.seconds) if failures >= self.rule.failures else 0.0
        over = failures - self.rule.failures
        return min(self.rule.seconds * 2.0 ** min(over, 16), longest) if over >= 0 else 0.0


def _key(target: Model) -> tuple[str, str]:
    return target.backend.name, target.model


# --- words ----------------------------------------------------------------------------------------


def _in_plain_words(asked: Model, attempts: list[Attempt], errors: list[BackendError]) -> str:
    """What happened at each target, and what would help."""
    said = "; ".join(f"{attempt.model}: {error.message.rstrip('.')}" for attempt, error in zip(attempts, errors, strict=True))
    ways = list(dict.fromkeys(error.way_out for error in errors if error.way_out))
    text = f"{asked.name} could not answer. {said}"
    return f"{text}. Way out: {'; '.join(ways)}." if ways else f"{text}."


