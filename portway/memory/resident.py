"""What a backend has in memory, and how it is told to load and to unload: one class a kind of server.

    Ollama        GET /api/ps, /api/tags, POST /api/show; an empty /api/chat loads, keep_alive 0 unloads
    llama-server  as a router GET /v1/models with each model's status, POST /models/load and /models/unload;
                  with one model it has that one, always
    llama-swap    GET /running, POST /api/models/unload/NAME; a GET of the model's own /health loads it (llama_swap.py)

Only `load`, and `keep` on what is loaded, may ever load something; everything else is asked of a server's list. What
follows from an answer is decided elsewhere (arbiter.py). What no such server answers is told by BackendError.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from portway.backends.transport import Patience, Pool
from portway.backends.upstream import MAX_ERROR, error_of, request_head
from portway.call import Limits, Watch, finish
from portway.errors import BackendError
from portway.memory import llama_swap
from portway.memory.arbiter import Seen, Shape
from portway.memory.footprint import need_of, per_token
from portway.wire.events import SSEReader, WireError, dumps, loads
from portway.wire.translate import chat_request, embed_request

if TYPE_CHECKING:
    from portway.config import Backend, Model

QUESTION = 3.0  # seconds for a question that is answered from memory
FIRST_PAUSE = 0.02  # seconds between two looks at what offers no event, doubled from one to the other
LONGEST_PAUSE = 0.5
WINDING_UP = 0.2  # seconds for which a server may count a request whose answer has ended
FIRST_EVENTS = 1.0  # seconds for what llama-swap sends at once; an older one keeps us waiting in vain
STOPPING = 30.0  # seconds llama-swap may take to stop a server; it kills it after 10, if not told otherwise
MAX_LIST = 16 * MAX_ERROR  # bytes of a list of models
# Ollama's options that a runner is started with; another value loads the model anew
RUNNER_OPTIONS = ("num_gpu", "num_batch", "main_gpu", "use_mmap", "num_thread")


@dataclass(frozen=True, slots=True)
class Known:
    """What a backend says of a model that need not be loaded. runner: what it tells loaded ones apart by.
    weights: bytes. per_token: bytes of each token of the window. trained: tokens it can have at most. elsewhere:
    nothing is ever loaded under this name here."""

    runner: str
    present: bool | None = None
    weights: int | None = None
    per_token: float | None = None
    trained: int | None = None
    window: int | None = None  # tokens, of a server that decides it itself
    capabilities: frozenset[str] | None = None
    elsewhere: bool = False


class Engine(Protocol):
    """One backend's memory. None of it is for two threads at once but the pool below it.

    kind: what it turned out to be. expires: it drops models by itself, as keep_alive tells it.
    measures: the sizes it tells are what a model really takes.
    """

    kind: str
    expires: bool
    measures: bool

    def look(self, models: Sequence[Model], watch: Watch, until: float) -> list[Seen] | None:
        """What is loaded; None = this kind of server does not tell. `models`: those to be `known` from then on."""
        ...

    def known(self, model: Model) -> Known:
        """What was learnt of a configured model."""
        ...

    def is_busy(self, name: str, watch: Watch) -> bool:
        """Whether it works for anybody with that model now, as far as it tells."""
        ...

    def unload(self, name: str, watch: Watch) -> None:
        """Tell it to unload; it may take a while over it."""
        ...

    def load(self, model: Model, watch: Watch, until: float) -> None:
        """Load, and return once it is loaded."""
        ...

    def keep(self, model: Model, watch: Watch) -> None:
        """Tell it the model's keep_alive anew; only for what is loaded in this very shape."""
        ...

    def close(self) -> None:
        """Close idle connections."""
        ...


def engine_of(backend: Backend) -> Engine:
    """The engine behind a backend."""
    return OllamaEngine(backend) if backend.kind == "ollama" else OpenAIEngine(backend)


def shape_of(model: Model, known: Known) -> Shape:
    """What a request for `model` has its runner started with."""
    if model.backend.kind != "ollama":
        return Shape()
    window = model.num_ctx
    if window is not None and known.trained is not None:
        window = min(window, known.trained)  # Ollama gives no more
    return Shape(window, tuple((name, model.params[name]) for name in RUNNER_OPTIONS if name in model.params))


# --- questions ------------------------------------------------------------------------------------


class Server:
    """Questions to one backend, over connections of their own, so that none waits behind an answer."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._pool = Pool(backend)

    def ask(
        self, method: str, path: str, watch: Watch, *, body: Mapping[str, Any] | None = None, until: float | None = None
    ) -> Any:
        """What it answers, as JSON; None where that is none. Raises BackendError, also for another status than 200."""
        end = time.monotonic() + QUESTION if until is None else until
        span = max(0.0, end - time.monotonic())
        limits = Limits(min(QUESTION, span), span, span, span, end, end)
        content = b"" if body is None else dumps(body)
        request = b"%s%d\r\n\r\n%s" % (request_head(self.backend, path, method), len(content), content)
        reply = finish(self._pool.exchange(request, limits, watch, Patience(limits, plain=True)))
        if reply.head.status != 200:
            raise finish(error_of(reply, str((body or {}).get("model", "")), self.backend))
        try:
            return loads(finish(reply.read_all(MAX_LIST)))
        except WireError:
            return None
        finally:
            reply.close()

    def events(self, path: str, watch: Watch, until: float) -> Iterator[bytes]:
        """The data of the server-sent events at `path`, as long as whoever reads them wants more and the time lasts.
        Raises BackendError."""
        span = max(0.0, until - time.monotonic())
        limits = Limits(min(QUESTION, span), span, span, span, until, until)
        request = b"%s0\r\n\r\n" % request_head(self.backend, path, "GET")
        reply = finish(self._pool.exchange(request, limits, watch, Patience(limits, plain=True)))
        if reply.head.status != 200:
            raise finish(error_of(reply, "", self.backend))
        reader, size = SSEReader(MAX_LIST), 0
        try:
            while (data := finish(reply.read())) and (size := size + len(data)) <= MAX_LIST:
                yield from reader.feed(data)
        except WireError as exc:
            raise BackendError("bad_answer", f"it answered {path} with {exc}") from None
        finally:
            reply.close()

    def asking(self, watch: Watch, until: float) -> Ask:
        """For several questions that have to be answered by then, each within its own time."""

        def ask(method: str, path: str, *, body: Mapping[str, Any] | None = None) -> Any:
            return self.ask(method, path, watch, body=body, until=min(until, time.monotonic() + QUESTION))

        return ask

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()


class Ask(Protocol):
    """Server.ask with its patience settled."""

    def __call__(self, method: str, path: str, *, body: Mapping[str, Any] | None = None) -> Any:
        """See Server.ask."""
        ...


class Pauses:
    """Longer and longer waits between two looks, for as long as the client is there and until a time."""

    def __init__(self, watch: Watch, until: float) -> None:
        self._watch = watch
        self._until = until
        self._pause = FIRST_PAUSE

    def wait(self) -> bool:
        """False once the time is over."""
        now = time.monotonic()
        if now >= self._until:
            return False
        finish(self._watch.pause(min(now + self._pause, self._until)))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return True


def await_gone(engine: Engine, runner: str, watch: Watch, until: float) -> bool:
    """Wait until a backend that was told to unload has done so; False if it has not by then."""
    pauses = Pauses(watch, until)
    while True:
        seen = engine.look((), watch, math.inf)
        if seen is None or all(one.name != runner for one in seen):
            return True
        if not pauses.wait():
            return False


# --- Ollama ---------------------------------------------------------------------------------------


class OllamaEngine:
    """See Engine. Ollama's runners are told apart by the file they were loaded from, so that two names of the
    same weights are one; which file that is stands only in /api/show."""

    kind = "ollama"
    expires = True
    measures = True

    def __init__(self, backend: Backend) -> None:
        self._server = Server(backend)
        self._listed: dict[str, tuple[int, str]] | None = None  # full name -> bytes, digest
        self._shown: dict[str, Known] = {}  # digest -> what /api/show says
        self._names: dict[str, str] = {}  # full name -> digest

    def look(self, models: Sequence[Model], watch: Watch, until: float) -> list[Seen] | None:
        """See Engine.look."""
        ask = self._server.asking(watch, until)
        wanted = {full_name(model.model) for model in models}
        if wanted - self._names.keys():
            self._list(wanted, ask)
        return [self._seen(entry, ask) for entry in _entries(ask("GET", "/api/ps"), "models")]

    def known(self, model: Model) -> Known:
        """See Engine.known."""
        name = full_name(model.model)
        if self._listed is None:
            return Known(name)
        if name not in self._listed:
            return Known(name, present=False)
        return self._shown.get(self._names.get(name, ""), Known(name, present=True, weights=self._listed[name][0]))

    def is_busy(self, name: str, watch: Watch) -> bool:  # noqa: ARG002 - Ollama lets whoever uses it end by itself
        """See Engine.is_busy."""
        return False

    def unload(self, name: str, watch: Watch) -> None:
        """See Engine.unload. Ollama takes this of an embedding model, too."""
        self._server.ask("POST", "/api/chat", watch, body={"model": name, "messages": [], "keep_alive": 0})

    def load(self, model: Model, watch: Watch, until: float) -> None:
        """See Engine.load."""
        path, body = _empty_call(model, self.known(model))
        self._server.ask("POST", path, watch, body=body, until=until)

    def keep(self, model: Model, watch: Watch) -> None:
        """See Engine.keep."""
        path, body = _empty_call(model, self.known(model))
        self._server.ask("POST", path, watch, body=body)

    def forget(self) -> None:
        """Ask anew what there is: something may have been pulled or deleted."""
        self._names.clear()

    def close(self) -> None:
        """See Engine.close."""
        self._server.close()

    def _list(self, wanted: set[str], ask: Ask) -> None:
        entries = _entries(ask("GET", "/api/tags"), "models")
        self._listed = {
            full_name(str(e.get("name"))): (_count(e.get("size")) or 0, str(e.get("digest"))) for e in entries
        }
        for name in wanted:
            size, digest = self._listed.get(name, (0, ""))
            if digest:
                self._learn(name, digest, size, ask)
            self._names[name] = digest  # only now: what could not be learnt is asked for again

    def _learn(self, name: str, digest: str, size: int | None, ask: Ask) -> Known:
        """What /api/show says of it, once a digest: a name whose content changes gets another one."""
        known = self._shown.get(digest)
        if known is None:
            known = self._shown[digest] = self._show(name, size, ask)
        return known

    def _show(self, name: str, size: int | None, ask: Ask) -> Known:
        try:
            shown = ask("POST", "/api/show", body={"model": name})
        except BackendError as exc:
            if exc.reason not in ("model_not_found", "server_error", "bad_request"):
                raise
            shown = {}  # it has gone again, or its file is damaged
        shown = shown if isinstance(shown, dict) else {}
        info = shown.get("model_info")
        info = info if isinstance(info, dict) else {}
        blob = re.search(r"^FROM .*(sha256[-:][0-9a-f]{64})\s*$", str(shown.get("modelfile")), re.MULTILINE)
        trained = _count(info.get(f"{info.get('general.architecture')}.context_length"))
        said = shown.get("capabilities")
        capabilities = frozenset(map(str, said)) if isinstance(said, list) else None
        return Known(blob[1] if blob else name, True, size, per_token(info), trained, capabilities=capabilities)

    def _seen(self, entry: Mapping[str, Any], ask: Ask) -> Seen:
        name = full_name(str(entry.get("name")))
        known = self._learn(name, str(entry.get("digest")), None, ask)
        return Seen(
            known.runner,
            _count(entry.get("size")),
            _count(entry.get("context_length")),
            _seconds_left(entry.get("expires_at")),
            told=name,
        )


def _empty_call(model: Model, known: Known) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request that only loads. Made from a real one, so that it asks for the very same runner."""
    if model.capabilities is None:
        model = replace(model, capabilities=known.capabilities)
    if model.capabilities is not None and "completion" not in model.capabilities:
        body, _ = embed_request({"input": "-"}, model)
        return "/api/embed", {**body, "input": []}
    body, _ = chat_request({"messages": [{"role": "user", "content": "-"}]}, model, stream_upstream=False)
    body.pop("think", None)  # it shapes an answer, and some models refuse it
    return "/api/chat", {**body, "messages": []}


def full_name(name: str) -> str:
    """Ollama takes "llama3.2" and "llama3.2:latest" for the same."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _seconds_left(when: Any) -> float | None:
    """Until an expires_at; far beyond a lifetime where it is "for ever"."""
    try:
        return datetime.fromisoformat(str(when)).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None


# --- servers that speak OpenAI's API ---------------------------------------------------------------


class OpenAIEngine:
    """See Engine. What kind of server it is shows in its answers, and is looked for anew each time."""

    expires = False
    measures = False

    def __init__(self, backend: Backend) -> None:
        self.kind = "unknown"
        self._server = Server(backend)
        self._known: dict[str, Known] = {}
        self._started: dict[str, llama_swap.Command] = {}  # llama-swap: model -> how it was started the last time

    def look(
        self,
        models: Sequence[Model],  # noqa: ARG002 - its list has them all
        watch: Watch,
        until: float,
    ) -> list[Seen] | None:
        """See Engine.look."""
        ask = self._server.asking(watch, until)
        listed = _entries(ask("GET", "/v1/models"), "data")
        if llama_swap.is_swap(listed):
            self.kind = "llama-swap"
            return self._swapped(listed, _entries(ask("GET", "/running"), "running"))
        if any(isinstance(entry.get("status"), dict) for entry in listed):
            self.kind = "llama-server router"
            return self._routed(listed)
        if len(listed) == 1 and listed[0].get("owned_by") == "llamacpp":
            self.kind = "llama-server"
            return self._single(listed[0])
        self.kind = "unknown"
        return None

    def known(self, model: Model) -> Known:
        """See Engine.known. A llama-server with one model answers to any name."""
        only = next(iter(self._known.values())) if self.kind == "llama-server" and self._known else None
        present = None if self.kind == "unknown" else False
        return self._known.get(model.model) or only or Known(model.model, present)

    def is_busy(self, name: str, watch: Watch) -> bool:
        """See Engine.is_busy. Unloading would break off whatever another client has it do."""
        busy = {"llama-server router": self._has_busy_slot, "llama-swap": self._has_request}.get(self.kind)
        pauses = Pauses(watch, time.monotonic() + WINDING_UP)
        while busy is not None and busy(name, watch):
            if not pauses.wait():
                return True
        return False

    def _has_busy_slot(self, name: str, watch: Watch) -> bool:
        try:
            slots = self._server.ask("GET", f"/slots?model={quote(name, safe='')}&autoload=false", watch)
        except BackendError:
            return False  # it was started without /slots, or the model has gone meanwhile
        return isinstance(slots, list) and any(isinstance(slot, dict) and slot.get("is_processing") for slot in slots)

    def _has_request(self, name: str, watch: Watch) -> bool:
        try:
            for data in self._server.events("/api/events", watch, time.monotonic() + FIRST_EVENTS):
                if (used := llama_swap.requests_for(name, data)) is not None:
                    return used
        except BackendError:
            pass  # an older one, which does not tell
        return False

    def unload(self, name: str, watch: Watch) -> None:
        """See Engine.unload."""
        if self.kind == "llama-swap":
            self._server.ask("POST", f"/api/models/unload/{quote(name)}", watch, until=time.monotonic() + STOPPING)
        elif self.kind == "llama-server router":
            try:
                self._server.ask("POST", "/models/unload", watch, body={"model": name})
            except BackendError as exc:
                if exc.reason != "bad_request":  # it is not running: somebody was quicker
                    raise
        else:
            raise self._cannot("unload")

    def load(self, model: Model, watch: Watch, until: float) -> None:
        """See Engine.load."""
        if self.kind == "llama-swap":
            self._load_swapped(model, watch, until)
        elif self.kind == "llama-server router":
            self._load_routed(model, watch, until)
        elif self.kind != "llama-server":
            raise self._cannot("load")

    def keep(self, model: Model, watch: Watch) -> None:
        """See Engine.keep. It keeps what nobody unloads."""

    def close(self) -> None:
        """See Engine.close."""
        self._server.close()

    def _load_swapped(self, model: Model, watch: Watch, until: float) -> None:
        """Whatever its server answers, it is up then; what llama-swap itself says may be that it is not."""
        try:
            self._server.ask("GET", f"/upstream/{quote(model.model)}/health", watch, until=until)
        except BackendError as exc:
            running = _entries(self._server.ask("GET", "/running", watch), "running")
            name = self.known(model).runner
            if all((one.get("model"), one.get("state")) != (name, "ready") for one in running):
                raise exc from None

    def _load_routed(self, model: Model, watch: Watch, until: float) -> None:
        try:
            self._server.ask("POST", "/models/load", watch, body={"model": model.model})
        except BackendError as exc:
            if exc.reason != "bad_request":  # it is running already
                raise
        pauses = Pauses(watch, until)
        while True:
            listed = _entries(self._server.ask("GET", "/v1/models", watch), "data")
            status = next((_status(entry) for entry in listed if entry.get("id") == model.model), {})
            if status.get("value") == "loaded":
                return
            if status.get("failed"):
                code = status.get("exit_code")
                raise BackendError("server_error", f"{model.model} could not be loaded (exit {code})")
            if not pauses.wait():
                raise BackendError("loading_timeout", f"{model.model} was not loaded in time")

    def _cannot(self, what: str) -> BackendError:
        backend = self._server.backend
        return BackendError("unsupported", f"the server of backend {backend.name} can't be told to {what} a model")

    def _routed(self, listed: list[Mapping[str, Any]]) -> list[Seen]:
        known: dict[str, Known] = {}
        seen: list[Seen] = []
        for entry in listed:
            name, state = str(entry.get("id")), _status(entry).get("value")
            weights = _meta(entry, "size") or llama_swap.read_command(_status(entry).get("args")).weights
            one = Known(name, True, weights, None, _meta(entry, "n_ctx_train"), _meta(entry, "n_ctx"))
            known |= {str(other): one for other in (name, *_aliases(entry))}
            if state in ("loading", "loaded"):
                seen.append(Seen(name, _whole_size(one), loading=state == "loading", told=name))
        self._known = known  # whole: another thread may be reading it
        return seen

    def _single(self, entry: Mapping[str, Any]) -> list[Seen]:
        name = str(entry.get("id"))
        known = Known(name, True, _meta(entry, "size"), None, _meta(entry, "n_ctx_train"), _meta(entry, "n_ctx"))
        self._known = {name: known}
        return [Seen(name, _whole_size(known), fixed=True, told=name)]

    def _swapped(self, listed: list[Mapping[str, Any]], running: list[Mapping[str, Any]]) -> list[Seen]:
        there = [one for one in running if one.get("state") in llama_swap.THERE]
        self._started |= {str(one.get("model")): llama_swap.read_command(one.get("cmd")) for one in there}
        listing = [*llama_swap.names(listed), *(llama_swap.Entry(name, name) for name in self._started)]
        self._known = {
            entry.name: Known(entry.real, True, *self._command(entry.real), elsewhere=entry.elsewhere)
            for entry in reversed(listing)
        }
        return [
            Seen(name, _whole_size(Known(name, True, *self._command(name))), loading=state == "starting", told=name)
            for name, state in ((str(one.get("model")), one.get("state")) for one in there)
        ]

    def _command(self, name: str) -> tuple[int | None, None, None, int | None]:
        """The weights and the window of Known, by how the model was started."""
        weights, window = self._started.get(name, llama_swap.Command())
        return weights, None, None, window


def _whole_size(known: Known) -> int | None:
    need = need_of(
        weights=known.weights, said=None, name=known.runner, window=known.window or 0, per_token=known.per_token
    )
    return need.size if need else None


def _status(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    status = entry.get("status")
    return status if isinstance(status, dict) else {}


def _meta(entry: Mapping[str, Any], key: str) -> int | None:
    meta = entry.get("meta")
    return _count(meta.get(key)) if isinstance(meta, dict) else None


def _aliases(entry: Mapping[str, Any]) -> list[Any]:
    aliases = entry.get("aliases")
    return aliases if isinstance(aliases, list) else []


def _entries(value: Any, key: str) -> list[Mapping[str, Any]]:
    listed = value.get(key) if isinstance(value, dict) else None
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
