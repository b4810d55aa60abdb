"""All that follows from one configuration, built whole and swapped whole by a reload."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from portway.answers import Answers, Shared
from portway.backends.catalogue import Catalogue
from portway.backends.ollama import OllamaBackend
from portway.backends.openai import OpenAIBackend
from portway.cache.file import default_path
from portway.cache.store import LIFETIME, Cache
from portway.config import PANELS
from portway.council.cascade import CascadeBackend
from portway.council.council import CouncilBackend, unknown
from portway.guards import Guards
from portway.memory.residency import anywhere
from portway.routing import Router
from portway.telemetry import Log, Price, log_path

if TYPE_CHECKING:
    from portway.cache.flights import Flights
    from portway.call import Backend
    from portway.config import Config, Model
    from portway.memory.residency import Residency
    from portway.routing import Cooling


@dataclass(frozen=True, slots=True)
class State:
    """A request keeps the one it began with. since: time.time() of its being built."""

    config: Config
    guards: Guards
    backends: Mapping[str, Backend]
    catalogue: Catalogue
    answers: Answers
    since: float

    @classmethod
    def of(
        cls,
        config: Config,
        cooling: Cooling,
        cache: Cache | None,
        flights: Flights[Shared],
        residency: Residency | None = None,
    ) -> Self:
        """What follows from `config`; the rest outlives it. residency: None = no model waits for memory."""
        backends: dict[str, Backend] = {
            name: _KINDS[backend.kind](backend) for name, backend in config.backends.items()
        }
        catalogue = Catalogue(config)
        place = residency.place if residency is not None else anywhere
        router = Router(config, backends, cooling, catalogue.completed, place)
        # pseudo-models ask others through the same router
        together = residency.fit_together if residency is not None else unknown
        backends[PANELS["council"].name] = CouncilBackend(config, router, catalogue.completed, together)
        backends[PANELS["cascade"].name] = CascadeBackend(config, router)
        return cls(config, Guards(config), backends, catalogue, Answers(router, cache, flights), time.time())

    def card(self, model: Model) -> dict[str, Any]:
        """A model as /v1/models shows it. The window stands under the three names that clients look for."""
        card: dict[str, Any] = {
            "id": model.name,
            "object": "model",
            "created": int(self.since),
            "owned_by": "portway",
        }
        window = self.catalogue.completed(model).num_ctx
        if window is not None:
            card |= {"context_length": window, "context_window": window, "meta": {"n_ctx": window}}
        card["portway"] = {
            "backend": model.backend.name,
            "kind": model.backend.kind,
            "model": model.model,
            "family": model.family,
            "chain": [member.name for member in self.config.chain(model)],
            "aliases": list(model.aliases),
            "flag": self.config.flag_of(model) or None,
        }
        return card

    def close(self) -> None:
        """Close idle connections to the backends; answers in flight end by themselves."""
        for backend in self.backends.values():
            backend.close()


_KINDS: Mapping[str, Callable[[Any], Backend]] = {"ollama": OllamaBackend, "openai": OpenAIBackend}


# What counts when the daemon starts, and not again: a thread pool, files that are open
AT_START = {
    "server": ("max_requests", "max_connections", "write_timeout"),
    "log": ("enabled", "file"),
    "cache": ("enabled", "file"),
}


def left_for_the_start(old: Config, new: Config) -> list[str]:
    """The settings in which they differ and which a reload does not take over."""
    return [
        f"{section}.{key}"
        for section, keys in AT_START.items()
        for key in keys
        if getattr(getattr(old, section), key) != getattr(getattr(new, section), key)
    ]


def open_log(config: Config, environ: Mapping[str, str]) -> Log | None:
    """The log that `config` wants; None = none. It outlives reloads."""
    if not config.log.enabled:
        return None
    price = Price(config.price.input, config.price.output)
    path = config.log.file or log_path(environ)
    return Log(path, max_bytes=config.log.max_size, keep=config.log.keep, price=price)


def open_cache(config: Config, environ: Mapping[str, str]) -> Cache | None:
    """The cache that `config` wants; None = none. It outlives reloads."""
    if not config.cache.enabled:
        return None
    return Cache(config.cache.file or default_path(environ), config.cache.max_size, _lifetime(config))


def adjust(config: Config, log: Log | None, cache: Cache | None) -> None:
    """Have log and cache go on by another configuration, but for what AT_START says."""
    if log:
        log.price = Price(config.price.input, config.price.output)
        log.limit(config.log.max_size, config.log.keep)
    if cache:
        cache.limit(config.cache.max_size, _lifetime(config))


def _lifetime(config: Config) -> float:
    """Seconds for which an answer of any model may be wanted."""
    return max((model.cache for model in config.models.values()), default=0.0) or LIFETIME
