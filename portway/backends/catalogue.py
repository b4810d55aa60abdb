"""What each backend says of itself and of its models, asked without loading or waking any.

Ollama: GET /api/tags and POST /api/show. The others: GET /v1/models. It is asked off the request path, on a
thread of its own, and remembered; a request only reads what is known by then. Knows no HTTP server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from portway.backends.transport import Patience, Pool
from portway.backends.upstream import MAX_ERROR, error_of, request_head
from portway.call import Limits, finish
from portway.errors import BackendError
from portway.memory import llama_swap
from portway.watch import NoClient
from portway.wire.events import WireError, dumps, loads

if TYPE_CHECKING:
    from portway.backends.transport import Reply
    from portway.config import Backend, Config, Model

PATIENCE = 3.0  # seconds for one question; these are answered from memory
FRESH = 60.0  # seconds an answer is believed
RETRY = 5.0  # seconds before a backend that gave none is asked again
MAX_LIST = 16 * MAX_ERROR  # bytes of a list of models


@dataclass(frozen=True, slots=True)
class Facts:
    """What a backend says of one of its models; None = it does not say."""

    present: bool
    context_length: int | None = None  # tokens
    capabilities: frozenset[str] | None = None
    size: int | None = None  # bytes


class Catalogue:
    """The facts of one configuration's models.

    `_lock` lets one thread at a time ask; readers take what is there without it.
    """

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._ask_at: float | None = None  # when the answers are no longer fresh; None = never asked
        self._facts: Mapping[str, Facts] = {}
        self._completed: Mapping[str, Model] = config.models
        self._problems: Mapping[str, BackendError] = {}

    def completed(self, model: Model) -> Model:
        """The model with what its backend says where the configuration is silent: its capabilities, and
        the window of a server that can't be told one; Ollama's window stays what is configured."""
        return self._completed.get(model.name, model)

    def facts(self, model: Model) -> Facts | None:
        """What its backend said when it last answered; None as long as it never did."""
        return self._facts.get(model.name)

    def problems(self) -> Mapping[str, BackendError]:
        """backend -> why it could not be asked the last time."""
        return self._problems

    def refresh_soon(self) -> None:
        """Ask again on another thread, unless the answers are fresh or one does so already."""
        is_fresh = self._ask_at is not None and self._clock() < self._ask_at
        if not is_fresh and not self._lock.locked():
            try:
                threading.Thread(target=self.refresh, name="portway-catalogue", daemon=True).start()
            except RuntimeError:
                pass  # the system has no thread left: what is known has to do until the next time

    def refresh(self) -> None:
        """Ask every backend that a model uses; at once if another thread is doing so."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._ask_all()
            self._ask_at = self._clock() + (RETRY if self._problems else FRESH)
        finally:
            self._lock.release()

    def missing(self) -> list[str]:
        """A line for each thing that keeps a configured model from working, with the way out."""
        lines = [_line(self._config.backends[name], error) for name, error in self._problems.items()]
        for model in self._config.models.values():
            facts = self._facts.get(model.name)
            if facts is not None and not facts.present and model.backend.name not in self._problems:
                is_ollama = model.backend.kind == "ollama"
                way_out = f"ollama pull {model.model}" if is_ollama else "see its own list of models"
                lines.append(f"{model.name}: backend {model.backend.name} has no {model.model}; {way_out}")
        return lines

    def _ask_all(self) -> None:
        facts = dict(self._facts)  # of a backend that is away for a moment, what it said before
        problems: dict[str, BackendError] = {}
        for backend in self._asked_backends():
            models = [model for model in self._config.models.values() if model.backend == backend]
            pool = Pool(backend)
            try:
                facts |= _ASK[backend.kind](pool, backend, models)
            except BackendError as exc:
                problems[backend.name] = exc
            finally:
                pool.close()
        self._facts, self._problems = facts, problems
        self._completed = {name: _complete(model, facts.get(name)) for name, model in self._config.models.items()}

    def _asked_backends(self) -> list[Backend]:
        """Those that a model uses; behind a pseudo-model there is none."""
        used = {model.backend.name: model.backend for model in self._config.models.values() if model.panel is None}
        return list(used.values())


def _line(backend: Backend, error: BackendError) -> str:
    """A problem in one line that says whose it is."""
    is_named = backend.url in error.message
    message = error.message if is_named else f"backend {backend.name} ({backend.url}): {error.message}"
    return f"{message}; {error.way_out}" if error.way_out else message


def _complete(model: Model, facts: Facts | None) -> Model:
    if facts is None:
        return model
    if model.capabilities is None and facts.capabilities is not None:
        model = replace(model, capabilities=facts.capabilities)
    if model.num_ctx is None and model.backend.kind == "openai" and facts.context_length is not None:
        model = replace(model, num_ctx=facts.context_length)
    return model


# --- the two kinds --------------------------------------------------------------------------------


def _ask_ollama(pool: Pool, backend: Backend, models: list[Model]) -> dict[str, Facts]:
    listed = _entries(_question(pool, backend, "GET", "/api/tags"), "models")
    sizes = {_full_name(str(entry.get("name"))): entry.get("size") for entry in listed}
    shown = {name: _shown(pool, backend, name, sizes) for name in {model.model for model in models}}
    return {model.name: shown[model.model] for model in models}


def _shown(pool: Pool, backend: Backend, name: str, sizes: Mapping[str, Any]) -> Facts:
    """The list's own capabilities are not those of the template; only /api/show looks into the file."""
    if _full_name(name) not in sizes:
        return Facts(present=False)
    size = _count(sizes[_full_name(name)])
    try:
        shown = _question(pool, backend, "POST", "/api/show", dumps({"model": name}))
    except _Refused:
        return Facts(present=True, size=size)  # a damaged one, say; the others' facts are still worth having
    capabilities = shown.get("capabilities")
    info = shown.get("model_info")
    info = info if isinstance(info, dict) else {}
    return Facts(
        present=True,
        context_length=_count(info.get(f"{info.get('general.architecture')}.context_length")),
        capabilities=frozenset(map(str, capabilities)) if isinstance(capabilities, list) else None,
        size=size,
    )


def _full_name(name: str) -> str:
    """As Ollama lists it: TINY, library/tiny and tiny:latest are one model to it."""
    name = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _ask_openai(pool: Pool, backend: Backend, models: list[Model]) -> dict[str, Facts]:
    """llama-server with one model answers to any name, so there a name that is not listed is not missing.
    Its router, which tells each model's status, does not."""
    listed = _entries(_question(pool, backend, "GET", "/v1/models"), "data")
    entries = {str(name): entry for entry in listed for name in (*_aliases(entry), entry.get("id"))}
    is_single = len(listed) == 1 and listed[0].get("owned_by") == "llamacpp" and "status" not in listed[0]
    anything = listed[0] if is_single else None
    return {
        model.name: _listed(entries.get(model.model) or entries.get(f"{model.model}:latest", anything))  # Ollama's /v1
        for model in models
    }


def _listed(entry: Mapping[str, Any] | None) -> Facts:
    if entry is None:
        return Facts(present=False)
    meta = entry.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    # llama-server's, then the names that vLLM, LM Studio and OpenRouter use
    sources = (meta.get("n_ctx"), entry.get("max_model_len"), entry.get("context_length"), entry.get("context_window"))
    lengths = [length for length in map(_count, sources) if length]
    return Facts(present=True, context_length=lengths[0] if lengths else None, size=_count(meta.get("size")))


def _aliases(entry: Mapping[str, Any]) -> list[Any]:
    aliases = entry.get("aliases")
    return [*(aliases if isinstance(aliases, list) else []), *llama_swap.aliases_of(entry)]


_ASK: Mapping[str, Callable[[Pool, Any, list[Any]], dict[str, Facts]]] = {"ollama": _ask_ollama, "openai": _ask_openai}


# --- one question ---------------------------------------------------------------------------------


class _Refused(BackendError):
    """The backend is there, but its answer to this question is an error."""


def _question(pool: Pool, backend: Backend, method: str, path: str, body: bytes = b"") -> dict[str, Any]:
    """The JSON object that the backend answers. Raises BackendError."""
    end = time.monotonic() + PATIENCE
    limits = Limits(PATIENCE, PATIENCE, PATIENCE, PATIENCE, end, end)
    request = b"%s%d\r\n\r\n%s" % (request_head(backend, path, method), len(body), body)
    reply = finish(pool.exchange(request, limits, NoClient(), Patience(limits, plain=True)))
    try:
        if reply.head.status != 200:
            raise _refusal(reply, path, backend)
        value = loads(finish(reply.read_all(MAX_LIST)))
    except WireError as exc:
        raise BackendError("bad_answer", f"it answered {path} with {exc}") from None
    finally:
        reply.close()
    if not isinstance(value, dict):
        raise BackendError("bad_answer", f"it answered {path} with no JSON object")
    return value


def _refusal(reply: Reply, path: str, backend: Backend) -> _Refused:
    status = reply.head.status
    if status in (404, 405, 501):  # not of a model, which is what error_of() would take it for
        way_out = f"correct backends.{backend.name}.url or its kind"
        return _Refused("bad_answer", f"it has no {path} ({status})", way_out=way_out)
    error = finish(error_of(reply, path, backend))
    return _Refused(error.reason, f"it answered {path} with {status}: {error.message}", way_out=error.way_out)


def _entries(value: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    listed = value.get(key)
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _count(value: Any) -> int | None:
    """A number of tokens or bytes; None for anything that is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
