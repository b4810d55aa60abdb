"""Everything that can go wrong with a request, split by whose fault it is.

`ClientError` is the caller's: it is answered at once and blames no backend.
`BackendError` is a target's: its `reason` decides, by the table `FAILURES`, whether the
next member of the chain is tried and whether the target cools down. Both render to
OpenAI's envelope, so that each SDK raises its own class; nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def let_go(error: BaseException | None) -> None:
    """It has been dealt with. The frames it came through hold the request's body, and hold it: garbage, which is not
    collected before there are 10,000 objects of it."""
    while error is not None and error.__traceback__ is not None:  # an error may be its own cause
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class PortwayError(Exception):
    """An error with an HTTP status and OpenAI's `{"error":{message,type,param,code}}`."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def envelope(self) -> dict[str, Any]:
        """The body that OpenAI's SDKs understand."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ClientError(PortwayError):
    """The request is at fault, whoever would serve it."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, status=status, type=type, code=code, param=param, headers=headers)


class Stopping(PortwayError):
    """The daemon ends, and this request with it."""

    def __init__(self) -> None:
        super().__init__(
            "Portway is stopping.", status=503, type="api_error", code="stopping", headers={"Retry-After": "1"}
        )


class NoThread(PortwayError):
    """The system has no thread left, and what is asked can only be done on one."""

    def __init__(self) -> None:
        super().__init__(
            "The system has no thread left for this request. Way out: try again later.",
            status=503,
            type="api_error",
            code="no_thread",
            headers={"Retry-After": "1"},
        )


class ClientGone(Exception):
    """The client closed its socket. Not an error of anybody's; no backend is blamed."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What follows from one way of failing: a row of the fallback table.

    falls_back: "yes", "no", "once" (a second target that fails so ends it), "other_backend" (only to a
    target behind another backend) or "larger_window" (only to a target with a larger context window).
    cools: "no", "count" (after repeated failures), "short" (likewise, not for long), "long" (at once, for long) or
    "told" (for as long as Retry-After says, else it counts).
    status: what the client sees when the chain ends here.
    """

    falls_back: str
    cools: str
    status: int
    type: str = "api_error"


# reason -> consequence. The reasons are public: they stand in X-Portway-Attempts and the log.
FAILURES: Mapping[str, Failure] = {
    "connect_failed": Failure("yes", "short", 502),
    "connect_timeout": Failure("yes", "count", 502),
    "connection_lost": Failure("yes", "short", 502),  # closed or reset before any content
    "bad_answer": Failure("yes", "count", 502),  # not HTTP, not JSON, not the shape that was asked for
    "loading_timeout": Failure("yes", "no", 503),
    "busy": Failure("yes", "told", 503),
    "rate_limited": Failure("yes", "told", 429, "rate_limit_error"),
    "server_error": Failure("yes", "count", 502),
    "first_token_timeout": Failure("yes", "count", 504),
    "answer_timeout": Failure("yes", "count", 504),  # a plain answer, of which no token can be seen coming
    "idle_timeout": Failure("yes", "count", 504),
    "total_timeout": Failure("no", "no", 504),
    "model_not_found": Failure("yes", "no", 404, "invalid_request_error"),
    "backend_auth": Failure("other_backend", "long", 502),
    "context_length_exceeded": Failure("larger_window", "no", 400, "invalid_request_error"),
    "bad_request": Failure("no", "no", 400, "invalid_request_error"),
    "template_error": Failure("yes", "no", 500),  # deterministic; but another model has another template
    "empty_answer": Failure("once", "count", 502),
    "stream_broken": Failure("yes", "count", 502),  # after content; a stream can't fall back then
    "unsupported": Failure("yes", "no", 400, "invalid_request_error"),  # this target can't do what is asked
    "cooling": Failure("yes", "no", 503),  # skipped, not tried
    "queue_full": Failure("yes", "no", 429, "rate_limit_error"),  # our own queue for its backend
    "no_room": Failure("yes", "no", 503),  # the memory, or the place, that it waited for did not become free
    "does_not_fit": Failure("yes", "no", 503),  # into this machine's memory, or the budget for it, ever
    "cold": Failure("yes", "no", 503),  # skipped, as another member is loaded (prefer_warm)
}


class BackendError(PortwayError):
    """A target failed. `reason` is a key of FAILURES; `detail` goes into the attempt, in brackets.

    retry_after: seconds that the backend asked for, if it did.
    way_out: one sentence in plain words ("ollama pull qwen3.5:9b"), "" if there is none.
    body: the backend's own error body, to be forwarded where the table says verbatim.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        detail: str = "",
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        way_out: str = "",
        body: bytes | None = None,
    ) -> None:
        failure = FAILURES[reason]
        super().__init__(message, status=status or failure.status, type=failure.type, code=code or reason, param=param)
        self.reason = reason
        self.failure = failure
        self.detail = detail
        self.retry_after = retry_after
        self.way_out = way_out
        self.body = body
