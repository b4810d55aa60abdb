"""What each backend says of itself and of the models that are configured behind it, and whether these fit.

Asked over the paths that wake and load nothing: /api/version, /api/tags and /api/show at Ollama; /v1/models elsewhere,
and then /props at a llama-server, /api/version and /running at a llama-swap. It finds out and judges; what a person is
told of it is doctor.py's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from portway.commands.first_config import LADDER, budget
from portway.config import Backend, Config, Model
from portway.memory import llama_swap
from portway.memory.fits import Footprint, footprint

if TYPE_CHECKING:
    from portway.commands.probe import Told
    from portway.memory.machine import Reading

Ask = Callable[..., "Told"]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one configured model. size: bytes of its file; info: its own numbers; num_ctx: its server's;
    per_token: bytes of context for each token, of a recommended model that is not there."""

    present: bool
    size: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    num_ctx: int | None = None
    per_token: int | None = None


@dataclass(slots=True)
class Seen:
    """What one backend said. problem: why it could not be asked. refused: the status that it refused with.
    clock: what time it has. models: by logical name."""

    backend: Backend
    program: str = ""
    version: str = ""
    problem: OSError | None = None
    refused: int = 0
    refused_path: str = ""
    clock: float | None = None
    listed: Sequence[str] = ()
    models: dict[str, Known] = field(default_factory=dict)

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine, so that its models live in this memory."""
        said = self.backend.local
        return _is_loopback(self.backend.host) if said is None else said

    @property
    def is_lan(self) -> bool:
        """Whether it is another machine of the local network."""
        return _is_lan(self.backend.host)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one model fits. room: bytes for models beside open programs; most: with all of them closed.
    sure: nothing in it is estimated. beside: it fits together with the everyday model."""

    name: str
    footprint: Footprint
    room: int
    most: int
    sure: bool
    everyday: bool
    beside: bool

    @property
    def fits(self) -> bool:
        """Alone."""
        return self.footprint.total <= self.room


def look_at(backend: Backend, config: Config, ask: Ask) -> Seen:
    """Ask one backend."""
    models = [model for model in config.models.values() if model.backend == backend]
    seen = Seen(backend)
    try:
        if backend.kind == "ollama":
            _look_at_ollama(seen, models, ask)
        else:
            _look_at_openai(seen, models, ask)
    except OSError as exc:
        seen.problem = exc
    return seen


def _question(seen: Seen, ask: Ask, path: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    backend = seen.backend
    host = f"[{backend.host}]" if ":" in backend.host else backend.host
    told = ask(f"{backend.scheme}://{host}:{backend.port}{backend.base}", path, body, key=backend.api_key)
    seen.clock = told.time if told.time is not None else seen.clock
    if told.status in (401, 403):
        seen.refused, seen.refused_path = told.status, path
    return told.value if told.status == 200 else {}


def _look_at_ollama(seen: Seen, models: Sequence[Model], ask: Ask) -> None:
    version = _question(seen, ask, "/api/version").get("version")
    seen.program, seen.version = "Ollama", version if isinstance(version, str) else ""
    sizes = {
        _full(str(entry.get("name"))): entry.get("size")
        for entry in _entries(_question(seen, ask, "/api/tags"), "models")
    }
    seen.listed = list(sizes)
    for model in models:
        if _full(model.model) not in sizes:
            seen.models[model.name] = _absent(model.model)
            continue
        info = _question(seen, ask, "/api/show", {"model": model.model}).get("model_info")
        known = info if isinstance(info, dict) else {}
        seen.models[model.name] = Known(True, _whole(sizes[_full(model.model)]), known)


def _look_at_openai(seen: Seen, models: Sequence[Model], ask: Ask) -> None:
    entries = _entries(_question(seen, ask, "/v1/models"), "data")
    seen.listed = [str(entry.get("id")) for entry in entries]
    commands = _identify(seen, entries, ask)
    is_single = seen.program == "llama-server" and len(entries) == 1 and "status" not in entries[0]
    only = entries[0] if is_single else None  # one model answers to any name
    for model in models:
        entry = next((entry for entry in entries if model.model in (entry.get("id"), *_aliases(entry))), only)
        meta = entry.get("meta") if entry else None
        meta = meta if isinstance(meta, dict) else {}
        started = commands.get(str(entry.get("id")) if entry else "", llama_swap.Command())
        size, window = _whole(meta.get("size")) or started.weights, _whole(meta.get("n_ctx")) or started.window
        if not seen.refused:
            seen.models[model.name] = Known(entry is not None, size, {}, window)


def _identify(seen: Seen, entries: Sequence[Mapping[str, Any]], ask: Ask) -> Mapping[str, llama_swap.Command]:
    """Which server it is, of what version, and how it started each model, as far as it tells. It is asked for more
    only where it is known: some servers would load a model for a path that they don't know."""
    if any(entry.get("owned_by") == "llamacpp" for entry in entries):
        seen.program, build = "llama-server", _question(seen, ask, "/props").get("build_info")
        seen.version = build if isinstance(build, str) else ""
        states = {str(entry.get("id")): entry.get("status") for entry in entries}  # a router's
        return {n: llama_swap.read_command(s.get("args")) for n, s in states.items() if isinstance(s, dict)}
    if llama_swap.is_swap(entries):
        seen.program, version = "llama-swap", _question(seen, ask, "/api/version").get("version")
        seen.version = version if isinstance(version, str) else ""
        running = _entries(_question(seen, ask, "/running"), "running")
        return {str(one.get("model")): llama_swap.read_command(one.get("cmd")) for one in running}
    seen.program = "an OpenAI-compatible server"
    return {}


def _aliases(entry: Mapping[str, Any]) -> Sequence[Any]:
    aliases = entry.get("aliases")
    return [*(aliases if isinstance(aliases, list) else []), *llama_swap.aliases_of(entry)]


def _entries(value: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    listed = value.get(key)
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _full(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _absent(name: str) -> Known:
    """A model that is not there; its size is known if it is one that `portway init` recommends."""
    places = (place for rung in LADDER.values() for place in rung if _full(place.model) == _full(name))
    place = next(places, None)
    return Known(present=False, size=place.size, per_token=place.per_token) if place else Known(present=False)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_lan(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.endswith((".local", ".lan", ".home.arpa", ".internal")) or (
            "." not in host and not _is_loopback(host)
        )
    return address.is_private and not address.is_loopback


# --- whether they fit ------------------------------------------------------------------------


def verdicts(config: Config, seen: Mapping[str, Seen], reading: Reading) -> list[Verdict]:
    """Of each model that would live in this machine's memory and whose size is known, in the file's order."""
    if reading.total is None or reading.apart:
        return []
    found = ((model.name, _footprint(model, seen)) for model in config.models.values())
    sizes = {name: fit for name, fit in found if fit is not None}
    everyday = config.flagged("default")
    first = sizes.get(everyday.name) if everyday else None
    room, most = _room(config, reading.total)
    return [
        Verdict(
            name=name,
            footprint=fit,
            room=room,
            most=most,
            sure=fit.known and _is_present(config.models[name], seen),
            everyday=everyday is not None and name == everyday.name,
            beside=first is not None and _is_other(config.models[name], everyday) and first.total + fit.total <= room,
        )
        for name, fit in sizes.items()
    ]


def _room(config: Config, total: int) -> tuple[int, int]:
    """Bytes for models (beside open programs, with all of them closed), as the configuration has it or as is usual."""
    if config.memory.budget is not None:
        return config.memory.budget, config.memory.budget
    most = max(0, total - config.memory.reserve)
    return min(budget(total), most), most


def _footprint(model: Model, seen: Mapping[str, Seen]) -> Footprint | None:
    backend = seen.get(model.backend.name)
    known = backend.models.get(model.name) if backend else None
    if backend is None or known is None or not backend.is_here:
        return None
    if model.size is not None:  # the configuration says what it takes, all together
        return footprint(model.size, model.num_ctx, each=0)
    if known.size is None:
        return None
    return footprint(known.size, model.num_ctx or known.num_ctx, known.info, known.per_token)


def _is_present(model: Model, seen: Mapping[str, Seen]) -> bool:
    backend = seen.get(model.backend.name)
    known = backend.models.get(model.name) if backend else None
    return known is not None and known.present


def _is_other(model: Model, everyday: Model | None) -> bool:
    """Whether it is another thing in memory, and not the same weights under another name."""
    return everyday is not None and (model.backend, model.model) != (everyday.backend, everyday.model)
