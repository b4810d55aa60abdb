"""One question to a server and its answer, for the commands that look at a machine from outside.

Not for the request path: a connection for each question, no pool, and the system's own errors, since an errno
says more to `portway doctor` than any word for it. Loads no model: it only asks what it is told to.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from portway import keys

if TYPE_CHECKING:
    from portway.config import Config

PATIENCE = 3.0  # seconds; what is asked here is answered from memory
AT_ONCE = 1.0  # seconds, for what a command can do without
MAX_ANSWER = 4 * 1024 * 1024  # bytes; a long list of models


@dataclass(frozen=True, slots=True)
class Told:
    """An answer. value: its JSON object, {} if it is none. time: the server's clock, Unix seconds, None if unsaid."""

    status: int
    value: Mapping[str, Any]
    time: float | None = None


class NoAnswer(ConnectionError):
    """Something is there and doesn't speak HTTP."""


def ask(
    url: str, path: str, body: Mapping[str, Any] | None = None, *, key: str | None = None, patience: float = PATIENCE
) -> Told:
    """GET `path` under `url` (POST if there is a body), whatever its status. Raises OSError."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=patience)
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", parts.path.rstrip("/") + path, data, headers)
        answer = connection.getresponse()
        raw = answer.read(MAX_ANSWER)
        return Told(answer.status, _object(raw), _time(answer.headers.get("Date")))
    except http.client.HTTPException as exc:
        raise NoAnswer(f"no HTTP: {str(exc) or type(exc).__name__}") from exc
    finally:
        connection.close()


def health(config: Config, environ: Mapping[str, str]) -> Mapping[str, Any] | None:
    """What the daemon of `config` says of itself (GET /health); None if none answers there, or not at once, or
    if no key is known that lets us hear more than that it is well."""
    server = config.server
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)  # noqa: S104 - not bound to
    try:
        url = f"http://{f'[{host}]' if ':' in host else host}:{server.port}"
        told = ask(url, "/health", key=keys.plain(server.api_keys, environ), patience=AT_ONCE)
    except OSError:
        return None
    return told.value if told.status == 200 and "uptime_s" in told.value else None


def _object(raw: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _time(date: str | None) -> float | None:
    try:
        return parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return None
