"""What both kinds of backend do alike: a request's head, the error in an answer's body, the end of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portway import __version__
from portway.backends.failures import classify, read_error
from portway.errors import BackendError

if TYPE_CHECKING:
    from portway.backends.transport import Reply
    from portway.config import Backend, Model

MAX_ERROR = 1_048_576  # bytes of an error's body that are read


def request_head(backend: Backend, path: str, method: str = "POST") -> bytes:
    """A request's head up to Content-Length's value. Built from scratch: nothing of the client's own
    headers, its key or cookies least of all, reaches a backend."""
    host = f"[{backend.host}]" if ":" in backend.host else backend.host
    lines = [
        f"{method} {backend.base}{path} HTTP/1.1",
        f"Host: {host}:{backend.port}",
        f"User-Agent: portway/{__version__}",
        "Accept-Encoding: identity",
        "Content-Type: application/json",
    ]
    if backend.api_key:
        lines.append(f"Authorization: Bearer {backend.api_key}")
    return "\r\n".join([*lines, "Content-Length: "]).encode("latin-1")


async def error_of(reply: Reply, model: str, backend: Backend) -> BackendError:
    """The BackendError of an answer whose status is not 200; reads and closes it. model: the backend's name of it."""
    try:
        body = await reply.read_all(MAX_ERROR)
    finally:
        reply.close()
    status, headers = reply.head.status, reply.head.headers
    if 300 <= status < 400:
        return BackendError("bad_answer", f"a redirect ({status}); redirects are not followed", detail=str(status))
    message, type = read_error(body)
    # only an openai backend's own words are OpenAI's envelope; Ollama's {"error": "text"} would be none to an SDK
    verbatim = backend.kind == "openai" and body.lstrip()[:1] == b"{"
    return classify(
        status,
        message,
        model=model,
        backend=backend,
        type=type,
        retry_after=_retry_after(headers),
        body=body if verbatim else None,
    )


def broken_once_begun(exc: BackendError, target: Model) -> BackendError:
    """What a failure is after a stream's first piece: `stream_broken`, but for running out of time."""
    if exc.reason in ("idle_timeout", "total_timeout"):
        return exc
    return BackendError("stream_broken", f"{target.name} broke off its answer: {exc.message}", detail=exc.reason)


def _retry_after(headers: dict[str, str]) -> float | None:
    """Seconds of a Retry-After header; its form as a date is not read (no local server sends it)."""
    value = headers.get("retry-after", "").strip()
    return float(value) if value.isascii() and value.isdigit() and len(value) < 9 else None
