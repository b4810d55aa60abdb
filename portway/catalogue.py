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

from portway.call import Limits
from portway.errors import BackendError
from portway.transport import Patience, Pool
from portway.upstream import MAX_ERROR, error_of, request_head
from portway.watch import NoClient
from portway.wire import WireError, dumps, loads

if TYPE_CHECKING:
    from portway.config import Backend, Config, Model

PATIENCE = 3.0  # seconds for one question; these are answered from memory
FRESH = 60.0  # seconds an answer is believed
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
        self._asked_at: float | None = None
        self._facts: Mapping[str, Facts] = {}
        self._completed: Mapping[str, Model] = config.models
        self._problems: Mapping[str, BackendError] = {}

    def completed(self, model: Model) -> Model:
        """The model with what its backend says where the configuration is silent: its capabilities,
        and the window of a server that can't be told one. (Ollama's window stays what is configured.)"""
        return self._completed.get(model.name, model)

    def facts(self, model: Model) -> Facts | None:
        """None as long as its backend has not answered."""
        return self._facts.get(model.name)

    def problems(self) -> Mapping[str, BackendError]:
        """backend -> why it could not be asked the last time."""
        return self._problems

    def refresh_soon(self) -> None:
        """Ask again on another thread, unless the answers are fresh or one does so already."""
        if self._asked_at is None or self._clock() - self._asked_at > FRESH:
            threading.Thread(target=self.refresh, name="portway-catalogue", daemon=True).start()

    def refresh(self) -> None:
        """Ask every backend that a model uses."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._ask_all()
            self._asked_at = self._clock()
        finally:
            self._lock.release()

    def missing(self) -> list[str]:
        """A line for each thing that keeps a configured model from working, with the way out."""
        lines = [f"{error.message}; {error.way_out}" for error in self._problems.values()]
        for model in self._config.models.values():
            facts = self._facts.get(model.name)
            if facts is not None and not facts.present:
                way_out = f"ollama pull {model.model}" if model.backend.kind == "ollama" else "see its own list of models"
                lines.append(f"{model.name}: backend {model.backend.name} has no {model.model}; {way_out}")
        return lines

    def _ask_all(self) -> None:
        facts: dict[str, Facts] = {}
        problems: dict[str, BackendError] = {}
        for backend in {model.backend.name: model.backend for model in self._config.models.values()}.values():
            models = [model for model in self._config.models.values() if model.backend == backend]
            try:
                facts |= _ASK[backend.kind](backend, models)
            except BackendError as exc:
                problems[backend.name] = exc
        self._facts, self._problems = facts, problems
        self._completed = {name: _complete(model, facts.get(name)) for name, model in self._config.models.items()}


def _complete(model: Model, facts: Facts | None) -> Model:
    if facts is None:
        return model
    if model.capabilities is None and facts.capabilities is not None:
        model = replace(model, capabilities=facts.capabilities)
    if model.num_ctx is None and model.backend.kind == "openai" and facts.context_length is not None:
        model = replace(model, num_ctx=facts.context_length)
    return model


# --- the two kinds --------------------------------------------------------------------------------


def _ask_ollama(backend: Backend, models: list[Model]) -> dict[str, Facts]:
    pool = Pool(backend)
    try:
        listed = _entries(_question(pool, backend, "GET", "/api/tags", b""), "models")
        sizes = {str(entry.get("name")): entry.get("size") for entry in listed}
        return {model.name: _shown(pool, backend, model, sizes) for model in models}
    finally:
        pool.close()


def _shown(pool: Pool, backend: Backend, model: Model, sizes: Mapping[str, Any]) -> Facts:
    name = model.model if ":" in model.model else f"{model.model}:latest"
    if name not in sizes:
        return Facts(present=False)
    shown = _question(pool, backend, "POST", "/api/show", dumps({"model": model.model}))
    capabilities = shown.get("capabilities")
    info = shown.get("model_info")
    lengths = [value for key, value in info.items() if key.endswith(".context_length")] if isinstance(info, dict) else []
    return Facts(
        present=True,
        context_length=_whole(lengths[0]) if lengths else None,
        capabilities=frozenset(map(str, capabilities)) if isinstance(capabilities, list) else None,
        size=_whole(sizes[name]),
    )


def _ask_openai(backend: Backend, models: list[Model]) -> dict[str, Facts]:
    """A server with one model answers to any name (llama-server without a router), so a name that is not
    listed is only missing where several are."""
    pool = Pool(backend)
    try:
        listed = _entries(_question(pool, backend, "GET", "/v1/models", b""), "data")
    finally:
        pool.close()
    entries = {str(name): entry for entry in listed for name in (entry.get("id"), *_aliases(entry))}
    only = listed[0] if len(listed) == 1 and listed[0].get("owned_by") == "llamacpp" else None
    return {model.name: _listed(entries.get(model.model, only)) for model in models}


def _listed(entry: Mapping[str, Any] | None) -> Facts:
    if entry is None:
        return Facts(present=False)
    meta = entry.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    # llama-server's, then the names that vLLM, LM Studio and OpenRouter use
    sources = (meta.get("n_ctx"), entry.get("max_model_len"), entry.get("context_length"), entry.get("context_window"))
    lengths = [length for length in map(_whole, sources) if length]
    return Facts(present=True, context_length=lengths[0] if lengths else None, size=_whole(meta.get("size")))


def _aliases(entry: Mapping[str, Any]) -> list[Any]:
    aliases = entry.get("aliases")
    return aliases if isinstance(aliases, list) else []


_ASK: Mapping[str, Callable[[Any, list[Any]], dict[str, Facts]]] = {"ollama": _ask_ollama, "openai": _ask_openai}


# --- one question ---------------------------------------------------------------------------------


def _question(pool: Pool, backend: Backend, method: str, path: str, body: bytes) -> dict[str, Any]:
    """The JSON object that the backend answers. Raises BackendError."""
    end = time.monotonic() + PATIENCE
    limits = Limits(PATIENCE, PATIENCE, PATIENCE, PATIENCE, end, end)
    request = b"%s%d\r\n\r\n%s" % (request_head(backend, path, method), len(body), body)
    reply = pool.exchange(request, limits, NoClient(), Patience(limits, plain=True))
    if reply.head.status != 200:
        raise error_of(reply, path.lstrip("/"), backend)
    try:
        value = loads(reply.read_all(MAX_LIST))
    except WireError as exc:
        raise BackendError("bad_answer", f"backend {backend.name} ({backend.url}) answered {path} with {exc}") from None
    finally:
        reply.close()
    if not isinstance(value, dict):
        raise BackendError("bad_answer", f"backend {backend.name} ({backend.url}) answered {path} with no JSON object")
    return value


def _entries(value: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    listed = value.get(key)
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
