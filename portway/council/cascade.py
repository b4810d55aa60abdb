"""kind = "cascade": the first member answers; where its answer does not do, the next one does, and so on.

An answer does not do if it is empty, was cut off, refuses, is not the JSON that was asked for, or if its
model was too unsure of its words (`judged`). Until then nobody is shown anything of it; the last member's
answer is passed on live, whatever it is. Each step and its reason is told. Asked for by name, a cascade is
no routing: nothing here looks at the question.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from portway.cache import replay
from portway.call import Attempt, Composed, Tally, finish, pieces_of
from portway.council.json_schema import mismatch
from portway.council.nested import Bill, PanelFailed, Retelling, content_of, document, fate, refuse_others, within
from portway.errors import BackendError, ClientError, PortwayError, let_go
from portway.panels import Cascade
from portway.wire.events import WireError, dumps, loads

if TYPE_CHECKING:
    from portway.call import Call, Limits, Served, Watch
    from portway.config import Config, Model
    from portway.routing import Router


class CascadeBackend:
    """`open` a Call on a cascade (Backend, call.py)."""

    def __init__(self, config: Config, router: Router) -> None:
        self._models = config.models
        self._router = router

    async def open(self, call: Call, target: Model, limits: Limits, watch: Watch) -> CascadeAnswer:
        """Nobody is asked before the answer is read. Raises ClientError for what a cascade can't do. From here
        on the call is a thread's."""
        assert isinstance(target.panel, Cascade)  # noqa: S101 - State gives it no other
        refuse_others(call, target)
        await watch.on_thread(for_good=True)
        steps = [Step(self._models[member.name], member.params) for member in target.panel.members]
        return CascadeAnswer(call, target, steps, self._router, limits.deadline, watch)

    def close(self) -> None:
        """It has no connections of its own."""


# --- whether an answer does -----------------------------------------------------------------------

# How refusals begin, in lower case and with straight apostrophes. Only beginnings: a text may well speak of what
# it can't do further on. Short on purpose, and English: a wrong guess costs the next model's time.
REFUSALS = (
    "i can't help with",
    "i can't assist with",
    "i can't do that",
    "i can't provide",
    "i can't fulfill",
    "i can't comply",
    "i cannot help with",
    "i cannot assist with",
    "i cannot provide",
    "i cannot fulfill",
    "i cannot comply",
    "i am unable to",
    "i'm unable to",
    "i am not able to",
    "i'm not able to",
    "i won't be able to",
    "i don't know",
    "i do not know",
    "as an ai language model, i can't",
    "as an ai language model, i cannot",
)
_APOLOGY = re.compile(r"(?:(?:i'm |i am )?(?:very |so |really )?sorry|i apologi[sz]e|unfortunately)[,.:;]? (?:but )?")


def judged(body: Mapping[str, Any], wanted: Any, min_probability: float | None) -> tuple[str, str]:
    """(reason, detail) why an answer does not do; ("", "") if it does. wanted: the request's response_format."""
    choice = (body.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    if message.get("tool_calls"):
        return "", ""  # it acts; what comes of it is not ours to judge
    text = content_of(message).strip()
    if message.get("refusal") or choice.get("finish_reason") == "content_filter" or _refuses(text):
        return "refused", ""
    if choice.get("finish_reason") == "length":
        return "cut", ""
    if not text:
        return "empty", ""
    if problem := _misshapen(text, wanted):
        return "schema", problem
    probability = mean_probability(choice)
    if min_probability is not None and probability is not None and probability < min_probability:
        return "unsure", f"{probability:.2f}"
    return "", ""


def _refuses(text: str) -> bool:
    start = text[:200].lower().replace("\u2019", "'")
    return _APOLOGY.sub("", start, count=1).startswith(REFUSALS)


def _misshapen(text: str, wanted: Any) -> str:
    """Where the text is not the JSON that was asked for; "" if it is, or none was."""
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind not in ("json_object", "json_schema"):
        return ""
    try:
        value = loads(text.encode("utf-8", "surrogatepass"))
    except WireError:
        return "not JSON"
    if kind == "json_object":
        return "" if isinstance(value, dict) else "not an object"
    named = wanted.get("json_schema")
    return mismatch(value, named.get("schema") if isinstance(named, dict) else None)


def mean_probability(choice: Mapping[str, Any]) -> float | None:
    """Of the answer's tokens; None where the backend told none."""
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    told = [token.get("logprob") for token in tokens or () if isinstance(token, dict)]
    numbers = [math.exp(min(0.0, value)) for value in told if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers else None


# --- the answer -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Step:
    """One member's turn. reason: "" = not asked; "ok", why its answer does not do, or the code of its error."""

    model: Model
    params: Mapping[str, Any]
    reason: str = ""
    detail: str = ""
    started: float = 0.0  # time.monotonic()
    seconds: float = 0.0
    served_by: str = ""
    hosts: Sequence[str] = ()
    error: PortwayError | None = None
    warnings: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def failed(self, error: PortwayError) -> None:
        """It has no answer, or broke it off."""
        self.reason, self.error = error.code or error.type, error
        let_go(error)
        self.seconds = time.monotonic() - self.started

    def to_json(self) -> dict[str, Any]:
        """For the answer's `portway`."""
        told = {"model": self.model.name, "served_by": self.served_by or None, "seconds": round(self.seconds, 3)}
        return {**told, "tokens": self.tally.completion_tokens, "reason": self.reason, "detail": self.detail or None}

    @property
    def attempt(self) -> Attempt:
        """For X-Portway-Attempts and the log."""
        return Attempt(self.served_by or self.model.name, self.reason, self.seconds, self.detail)

    @property
    def fate(self) -> str:
        """In words."""
        return fate(self.model.name, self.error, f"{self.reason} ({self.detail})" if self.detail else self.reason)


class CascadeAnswer(Composed):
    """An Answer (call.py): that of the first member whose answer does, or of the last."""

    def __init__(
        self, call: Call, target: Model, steps: list[Step], router: Router, deadline: float, watch: Watch
    ) -> None:
        self.tally = Tally()
        self.warnings: list[str] = []
        self._call = call
        self._name = target.name
        self._steps = steps
        self._router = router
        self._deadline = deadline
        self._watch = watch
        self._min_probability = target.panel.min_probability if isinstance(target.panel, Cascade) else None
        # asked for to be judged, not to be passed on; with tools, servers refuse them
        self._adds_logprobs = self._min_probability is not None and not any(map(call.body.get, ("logprobs", "tools")))
        self._open: tuple[Step, Served] | None = None  # whose answer is being read
        self._pieces = self._told_pieces()

    @property
    def served_by(self) -> str:
        """cascade(fast-3b>fast-9b): who was asked, in order; the answer is the last one's."""
        return f"{self._name}({'>'.join(step.served_by or step.model.name for step in self._taken)})"

    @property
    def headers(self) -> Mapping[str, str]:
        """The steps, if there was more than one."""
        steps = self._taken
        return {"X-Portway-Attempts": "; ".join(str(step.attempt) for step in steps)} if len(steps) > 1 else {}

    @property
    def hosts(self) -> Sequence[str]:
        """Of every member that answered, whether its answer did or not."""
        return [host for step in self._taken for host in step.hosts]

    # Answer's methods

    async def whole(self) -> bytes:
        """See Answer.whole."""
        raw = self._first_that_does() or self._last(stream=False).whole or b""
        self._shut()
        self.warnings = self._all_warnings()
        return document(self._call, self._name, loads(raw), self._bill().usage, self._told())

    async def piece(self) -> bytes:
        """See Answer.piece."""
        return next(self._pieces, b"")

    def _told_pieces(self) -> Iterator[bytes]:
        retelling = Retelling(self._call, self._name)
        raw = self._first_that_does()
        if raw is not None:
            self._shut()
            self.warnings = self._all_warnings()
            told_again = replay.replay(replay.plain_document(raw), self._call, self._name)
            yield retelling.tell(told_again) + retelling.end(self._bill().usage, self._told())
            return
        served = self._last(stream=True)
        self.warnings = self._all_warnings()
        try:
            for piece in pieces_of(served):
                if told := retelling.tell(piece):
                    yield told
        except BackendError as error:  # as a PortwayError: the cascade is no target, and does not cool down
            raise self._failed(self._steps[-1], error) from error
        self._shut()
        yield retelling.end(self._bill().usage, self._told())

    async def close(self) -> None:
        """See Answer.close."""
        self._pieces = iter(())  # the others would hold this answer, and be held by it
        self._shut()

    def _shut(self) -> None:
        """Of the answer that is open nothing more is read; what is known of it is known now."""
        if self._open is None:
            return
        (step, served), self._open = self._open, None
        finish(served.answer.close())
        step.seconds = time.monotonic() - step.started
        self.tally = replace(step.tally, decode_s=None, load_s=None)  # which are not those of all the tokens
        bill = self._bill()
        self.tally.prompt_tokens, self.tally.completion_tokens = bill.prompt_tokens, bill.completion_tokens

    # one member after the other

    def _first_that_does(self) -> bytes | None:
        """The answer of the first member whose answer does; None if the last one has to answer."""
        wanted = self._call.body.get("response_format")
        for step in self._steps[:-1]:
            try:
                raw = self._ask(step, stream=False).whole or b""
            except ClientError:
                raise  # nobody could serve this request
            except PortwayError as error:
                step.failed(error)
                continue
            body = loads(raw)
            step.reason, step.detail = judged(body, wanted, self._min_probability)
            if not step.reason:
                step.reason = "ok"
                return dumps(_without_logprobs(body)) if self._adds_logprobs else raw
            self._shut()
        return None

    def _last(self, *, stream: bool) -> Served:
        step = self._steps[-1]
        try:
            return self._ask(step, stream=stream)
        except ClientError:
            raise
        except PortwayError as error:
            raise self._failed(step, error) from error

    def _ask(self, step: Step, *, stream: bool) -> Served:
        """Let it answer, within its share of the time that is left."""
        step.started = time.monotonic()
        left = len(self._steps) - self._steps.index(step)
        body = {**self._call.body, **step.params}
        if self._adds_logprobs and left > 1:
            body["logprobs"] = True
        call = within(self._call, step.model, body, (self._deadline - step.started) / left, stream=stream)
        served = finish(self._router.serve(call, self._watch, fallback=call.fallback))
        self._open = (step, served)
        step.reason, step.served_by, step.seconds = "ok", served.model.name, time.monotonic() - step.started
        step.warnings, step.tally, step.hosts = served.answer.warnings, served.answer.tally, served.hosts
        return served

    def _failed(self, step: Step, error: PortwayError) -> PanelFailed:
        step.failed(error)
        return PanelFailed(
            f"The cascade '{self._name}' came to its end without an answer. "
            f"{'; '.join(taken.fate for taken in self._taken)}.",
            status=error.status,
            code=error.code or error.type,
            type=error.type,
            attempts=[taken.attempt for taken in self._taken],
            told=self._told(),
        )

    # what is told of it

    @property
    def _taken(self) -> list[Step]:
        return [step for step in self._steps if step.reason]

    def _told(self) -> dict[str, Any]:
        """The `portway` of the body, or of the last chunk."""
        late = [warning for warning in self._all_warnings() if warning not in self.warnings]
        told = {"served_by": self.served_by, "steps": [step.to_json() for step in self._taken]}
        return {**told, "warnings": late} if late else told

    def _all_warnings(self) -> list[str]:
        return list(dict.fromkeys(warning for step in self._steps for warning in step.warnings))

    def _bill(self) -> Bill:
        bill = Bill()
        for step in self._steps:
            bill.add(step.tally)
        return bill


def _without_logprobs(body: dict[str, Any]) -> dict[str, Any]:
    """They were not asked for by the client."""
    for choice in body["choices"]:
        choice.pop("logprobs", None)
    return body
