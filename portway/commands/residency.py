"""`portway ps`, `load`, `unload` and `models`: what is in memory, by asking the running daemon.

Everything is drawn from the JSON of memory/api.py; nothing here knows a backend.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portway.keys import plain
from portway.memory.footprint import shown
from portway.stderr import printable

if TYPE_CHECKING:
    from portway.config import Config

OK = 0
FAILED = 1
USAGE = 2
NOT_RUNNING = 3  # as `ask` has it

PATIENCE = 15.0  # seconds for what is answered from memory, or by asking the backends
LOADING = 900.0  # seconds; a large model on a slow disk
BAR = 40  # characters

HELP: Mapping[str, str] = {
    "ps": """\
usage: portway ps [--config FILE] [--json]

What is loaded where, how much memory it takes, until when it stays and how many
requests use it; what waits; and the budget as a bar. Asks the running Portway,
which asks its backends. Loads and wakes nothing.

Options:
  --config FILE  the configuration of the Portway that is asked; `portway --help`
                 says what is read without it
  --json         print what the daemon said, for programs
""",
    "models": """\
usage: portway models [--config FILE] [--json]

Every name, the model behind it, what it takes in memory (~ estimated, until it
was loaded once), whether the backend has it, and whether it fits into memory:
alone, and beside the model that `ask` means without a flag.

Options:
  --config FILE  the configuration of the Portway that is asked; `portway --help`
                 says what is read without it
  --json         print what the daemon said, for programs
""",
    "load": """\
usage: portway load [--config FILE] NAME

Loads a model and returns once it is there. Makes room as a request would: idle
models go, one in use is waited for. It stays as long as its keep_alive says.

Options:
  --config FILE  the configuration of the Portway that is asked; `portway --help`
                 says what is read without it
""",
    "unload": """\
usage: portway unload [--config FILE] NAME

Unloads a model, unless a request uses it.

Options:
  --config FILE  the configuration of the Portway that is asked; `portway --help`
                 says what is read without it
""",
}


class _UsageError(Exception):
    """The command line can't be understood. str() says why, in one line."""


def main(command: str, words: Sequence[str], config: Config) -> int:
    """Run `portway COMMAND WORDS...` on the daemon of `config`. Returns the exit code."""
    if "--help" in words or "-h" in words:
        print(HELP[command], end="")
        return OK
    try:
        return _run(command, list(words), Daemon(config))
    except _UsageError as exc:
        print(f"portway {command}: {exc}; see `portway {command} --help`", file=sys.stderr)
        return USAGE
    except Refused as exc:
        print(f"portway {command}: {printable(str(exc))}", file=sys.stderr)
        return FAILED
    except (OSError, http.client.HTTPException) as exc:
        where = f"{config.server.host}:{config.server.port}"
        print(f"portway {command}: no Portway answers at {where} ({exc}); start it: portway serve", file=sys.stderr)
        return NOT_RUNNING


def _run(command: str, words: list[str], daemon: Daemon) -> int:
    if command in ("load", "unload"):
        if len(words) != 1 or words[0].startswith("-"):
            raise _UsageError("one model's name is wanted")
        said = daemon.post(f"/portway/{command}", {"model": words[0]})
        print(_done(said))
        return OK
    if words not in ([], ["--json"]):
        raise _UsageError(f"unknown word {words[0]!r}")
    said = daemon.get("/portway/residency")
    if words:
        print(json.dumps(said, indent=2))
        return OK
    for line in _ps(said) if command == "ps" else _models(said):
        print(line)
    return OK


class Refused(Exception):
    """The daemon answered with an error. str() is its message."""


class Daemon:
    """The running daemon's HTTP."""

    def __init__(self, config: Config) -> None:
        server = config.server
        self._host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)  # noqa: S104 - not bound to
        self._port = server.port
        key = plain(server.api_keys, os.environ)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str) -> Any:
        """The JSON at `path`. Raises Refused, OSError and HTTPException."""
        return self._ask("GET", path, None, PATIENCE)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What `body` is answered with. Raises likewise."""
        return self._ask("POST", path, json.dumps(body).encode(), LOADING)

    def _ask(self, method: str, path: str, body: bytes | None, timeout: float) -> Any:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **self._headers})
            response = connection.getresponse()
            said = json.loads(response.read())
        except ValueError as exc:
            raise Refused("what answers there is no Portway") from exc
        finally:
            connection.close()
        if response.status != 200:
            error = said.get("error") if isinstance(said, dict) else None
            raise Refused(str(error.get("message")) if isinstance(error, dict) else f"status {response.status}")
        return said


# --- what is printed ------------------------------------------------------------------------------


def _done(said: Mapping[str, Any]) -> str:
    if "loaded" in said:
        return f"{said['model']}: loaded, after {said['seconds']:.1f} s"
    return f"{said['model']}: {'unloaded' if said['unloaded'] else 'was not loaded'}"


def _ps(said: Mapping[str, Any]) -> Iterator[str]:
    yield _bar(said["memory"])
    rows = [
        (
            ", ".join(one["names"]) or "-",
            one["model"],
            one["backend"],
            shown(one["size"]) if one["size"] else "?",
            "-" if one["num_ctx"] is None else str(one["num_ctx"]),
            one["status"],
            str(one["in_flight"]),
            "always" if one["fixed"] else _span(one["expires_in"]),
        )
        for one in said["loaded"]
    ]
    if rows:
        yield ""
        yield from _table(("name", "model", "backend", "size", "window", "state", "requests", "stays"), rows)
    else:
        yield "Nothing is loaded."
    for wish in said["waiting"]:
        yield f"{wish['model']} waits for {wish['for']}, {wish['seconds']:.0f} s so far"
    for name, backend in said["backends"].items():
        if backend["problem"]:
            yield printable(f"backend {name}: {backend['problem']}; its models are not minded")


def _bar(memory: Mapping[str, Any]) -> str:
    limit, resident = memory["limit"], memory["resident"]
    if memory["budget"] == "off":
        return "memory.enabled is false: each backend minds its own models."
    if limit is None:
        apart = "models live in a graphics card's memory"
        why = apart if memory["graphics_apart"] else "this machine's memory is unknown"
        return f"{shown(resident)} of models; no budget, as {why} (memory.budget sets one)"
    filled = BAR if resident >= limit else BAR * resident // limit
    source = {"set": "memory.budget", "auto": "what nobody else uses"}[memory["budget"]]
    over = ", too much" if resident > limit else ""
    return f"[{'#' * filled}{'.' * (BAR - filled)}] {shown(resident)} of {shown(limit)} ({source}){over}"


def _models(said: Mapping[str, Any]) -> Iterator[str]:
    beside = next((model["beside"] for model in said["models"] if model["beside"]), None)
    head = ("name", "model", "backend", "size", "there", "loaded", "fits", f"beside {beside or '-'}")
    yield from _table(head, [_model(model) for model in said["models"]])


def _model(model: Mapping[str, Any]) -> tuple[str, ...]:
    size = "?" if model["size"] is None else ("" if model["measured"] else "~") + shown(model["size"])
    return (
        model["name"],
        model["model"],
        model["backend"],
        size,
        _word(model["present"]),
        _word(model["loaded"]),
        _word(model["fits"]),
        _word(model["fits_beside"]),
    )


def _word(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for name, length in (("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{name}"
    return f"{seconds:.0f}s"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield printable(line.rstrip())
