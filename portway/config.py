"""The configuration: config/models.toml as immutable values, or every mistake in it at once.

`load` finds, reads and checks a file; `parse` does the same for text; `ConfigWatcher` notices
that the file has changed. What may stand in the file is a table (`schema`): a key and how its
value is read, by fields.py. What several keys have to agree on is checked afterwards, by the `_check_*`
functions, so that one slip never hides another. Nothing here knows HTTP, opens a socket or
remembers anything between two calls.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from portway import fields, keys, panels
from portway.fields import Mistake


@dataclass(frozen=True, slots=True)
class Server:
    """[server]. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 11436  # 0 = the system picks one
    api_keys: tuple[keys.Key, ...] = ()  # those of keys.toml, too
    allowed_hosts: tuple[str, ...] = ()  # lower-case
    allowed_origins: tuple[str, ...] = ()  # lower-case
    heartbeat: float = 15.0  # silence after which a streaming client hears `: portway`
    max_body: int = 32 * 1024 * 1024
    max_requests: int = 256  # requests worked on at once; others wait for their turn
    max_connections: int = 12_000  # open client connections, idle ones included
    header_timeout: float = 10.0  # from a request's first byte to the end of its head
    body_timeout: float = 60.0  # from the end of its head to the end of its body
    idle_timeout: float = 300.0  # a kept-alive connection without a request
    write_timeout: float = 60.0  # a client that does not read its answer
    drain: float = 30.0  # SIGTERM: how long requests in flight may go on


@dataclass(frozen=True, slots=True)
class Backend:
    """[backends.NAME]. `base` is the path before the API's own ("" or "/proxy"), without /v1."""

    name: str
    kind: Literal["ollama", "openai", "council", "cascade"]  # the last two: see PANELS
    url: str  # as configured
    scheme: Literal["http", "https"]
    host: str
    port: int
    base: str = ""
    api_key: str | None = None  # resolved
    max_idle: int = 64  # kept-alive connections held for reuse; of more that are used at once, some are dialled anew
    local: bool | None = None  # whether its models are in this machine's memory; None = as its address says
    max_parallel: int | None = None  # requests sent to it at once; None = any number
    max_queue: int = 64  # requests that may wait for it


# What stands behind a pseudo-model (panels.py) in a backend's place. No [backends.NAME] can be called so.
PANELS: Mapping[str, Backend] = MappingProxyType(
    {
        "council": Backend("(council)", kind="council", url="", scheme="http", host="", port=0),
        "cascade": Backend("(cascade)", kind="cascade", url="", scheme="http", host="", port=0),
    }
)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """models.NAME.timeouts, seconds."""

    connect: float = 2.0
    load: float = 300.0  # how long a server may say "Loading model"
    first_token: float = 120.0  # until the first text, reasoning or tool call; includes Ollama's load
    idle: float = 60.0  # between two pieces of an answer
    total: float = 600.0  # the whole request, with every attempt


@dataclass(frozen=True, slots=True)
class Model:
    """[models.NAME]: a logical model. One with a `panel` is a pseudo-model: others answer for it."""

    name: str
    backend: Backend
    model: str  # the backend's own name
    family: str = ""
    keep_alive: float | None = None  # seconds; 0 = unload after, -1 = for ever; None = the server's own
    num_ctx: int | None = None  # tokens
    think: bool | str | None = None
    fallback: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    timeouts: Timeouts = Timeouts()
    strict: bool = False  # never fall back
    capabilities: frozenset[str] | None = None  # of CAPABILITIES; None = asked of the backend
    max_tokens: int | None = None  # ceiling for one answer
    merge_system: bool = False  # join system messages into one first one (strict chat templates)
    cache: float = 0.0  # seconds for which answers are kept; 0.0 = off
    flag: str = ""  # `ask --FLAG` means this model
    default: bool = False  # what `ask` means without a flag
    size: int | None = None  # bytes it takes in memory; None = asked of the backend, else estimated
    preload: bool = False  # load it when the daemon starts
    prefer_warm: bool = False  # if loading it takes too long, a loaded member of its chain answers
    panel: panels.Council | panels.Cascade | None = None


FLAG = "flag:"  # what a flag of `ask` is sent as; no logical name may begin so

# what `capabilities` may list; Ollama's own words where it has one
CAPABILITIES = ("completion", "tools", "vision", "thinking", "embedding", "insert")


@dataclass(frozen=True, slots=True)
class Cooldown:
    """[cooldown]."""

    failures: int = 3  # in a row before a target is skipped
    seconds: float = 30.0  # how long; a failing probe doubles it, up to `longest`
    longest: float = 300.0


@dataclass(frozen=True, slots=True)
class Log:
    """[log]."""

    enabled: bool = True
    file: str = ""  # "" = where telemetry.log_path() says
    max_size: int = 32 * 1024 * 1024  # bytes before it is rotated
    keep: int = 5  # rotated files


@dataclass(frozen=True, slots=True)
class Cache:
    """[cache]."""

    enabled: bool = True
    file: str = ""  # "" = where cache_file.cache_path() says
    max_size: int = 512 * 1024 * 1024  # bytes; beyond it the least recently used answers go


@dataclass(frozen=True, slots=True)
class Memory:
    """[memory]. Sizes in bytes, times in seconds."""

    enabled: bool = True
    budget: int | None = None  # for all models together; None = "auto", as the machine has it
    reserve: int = 2 * 1024**3  # "auto" leaves this much to everything else
    min_stay: float = 10.0  # how long a model stays at least once it is loaded
    patience: float = 15.0  # how long requests for what is loaded go before one that would swap it
    check: float = 10.0  # between two looks at what is loaded, while anything is used


@dataclass(frozen=True, slots=True)
class Price:
    """[price]: what the reference model asks for a million tokens, in dollars."""

    input: float = 0.15
    output: float = 0.6


@dataclass(frozen=True, slots=True)
class Config:
    """A whole, valid configuration."""

    path: str  # where it was read
    server: Server
    backends: Mapping[str, Backend]
    models: Mapping[str, Model]
    names: Mapping[str, str]  # every name and alias -> the model's name
    cooldown: Cooldown = Cooldown()
    log: Log = Log()
    cache: Cache = Cache()
    price: Price = Price()
    memory: Memory = Memory()
    warnings: tuple[str, ...] = ()

    def resolve(self, name: str) -> Model | None:
        """The model that a client means by `name`: a logical name or an alias, letter for letter, or
        "flag:9b" for the one whose `flag` that is ("flag:default": the one that `ask` means without)."""
        if name.startswith(FLAG):
            return self.flagged(name.removeprefix(FLAG))
        known = self.names.get(name)
        return None if known is None else self.models[known]

    def flagged(self, flag: str) -> Model | None:
        """The model behind a flag of `ask`; "default": the one marked so, else the first; "council": the
        one that has it, else the first of that kind."""
        models = self.models.values()
        if flag == "default":
            return next((model for model in models if model.default), next(iter(models)))
        found = next((model for model in models if model.flag == flag), None)
        if found is None and flag == "council":
            return next((model for model in models if isinstance(model.panel, panels.Council)), None)
        return found

    def flag_of(self, model: Model) -> str:
        """The flag by which `ask` means that model; "" if it has none."""
        return model.flag or ("council" if self.flagged("council") is model else "")

    def near(self, name: str) -> list[str]:
        """Up to three names to ask for instead of an unknown one, the likeliest first.

        A backend's own name ("qwen3.5:9b") leads to the logical names that stand for it.
        """
        same = [model.name for model in self.models.values() if model.model == name]
        return (same + [other for other in fields.nearest(name, self.names) if other not in same])[:3]

    def chain(self, model: Model) -> list[Model]:
        """Who may serve a request for `model`, in order: itself, then its own `fallback`.

        The members' own fallbacks are not followed. A strict model stands alone.
        """
        return [model] if model.strict else [model, *(self.models[name] for name in model.fallback)]


class ConfigError(Exception):
    """A configuration that can't be used, with every mistake in it. str() has a line for each."""

    def __init__(self, path: str, mistakes: Sequence[Mistake]) -> None:
        count = _counted(len(mistakes), "mistake")
        super().__init__("\n".join([f"{path}: {count}", *(f"  {mistake}" for mistake in mistakes)]))
        self.path = path
        self.mistakes = tuple(mistakes)


# --- Finding and loading ---------------------------------------------------------------------


def find(path: str | None, environ: Mapping[str, str]) -> str:
    """Where the configuration is: `path` (--config), else $PORTWAY_CONFIG, else the user's own
    ${XDG_CONFIG_HOME:-~/.config}/portway/models.toml, else the shipped file.

    A file that was asked for need not exist: that is for `load` to say.
    """
    asked = path if path is not None else environ.get("PORTWAY_CONFIG")
    if asked:
        return os.path.expanduser(asked)
    own = _own_path(environ)
    # lexists: a broken link is the user's mistake to hear of, not a reason to use another file
    return own if os.path.lexists(own) else _shipped_path()


def load(path: str | None, environ: Mapping[str, str]) -> Config:
    """Find, read and check the configuration. Raises ConfigError."""
    return _checked(_read(find(path, environ), environ), environ)


def load_with(path: str | None, environ: Mapping[str, str], key_text: str) -> Config:
    """The same as if keys.toml held `key_text`: what would be if that were written. Raises ConfigError."""
    return _checked(_read(find(path, environ), environ)._replace(keys=key_text.encode()), environ)


def keys_path(path: str, environ: Mapping[str, str]) -> str:
    """Where keys.toml is: beside the configuration at `path`, in the user's own folder if that is the shipped one."""
    beside = _own_path(environ) if path == _shipped_path() else os.path.abspath(path)
    return os.path.join(os.path.dirname(beside), keys.FILE)


def parse(text: str, path: str, environ: Mapping[str, str]) -> Config:
    """Check `text` as if it had been read from `path`, which is only named. Raises ConfigError."""
    return _checked(_Source(path, text.encode("utf-8", "surrogateescape")), environ)


def describe(config: Config) -> list[str]:
    """What `portway check` prints of a valid configuration: a line for it, a line for each warning."""
    models, backends = _counted(len(config.models), "model"), _counted(len(config.backends), "backend")
    return [f"{config.path}: ok, {models}, {backends}", *(f"warning: {text}" for text in config.warnings)]


class ConfigWatcher:
    """Notices that the configuration has changed. One thread owns it; it starts none itself.

    A change counts once the file has looked the same twice in a row, so that a file still being
    written is left alone, and a file that is missing (some editors remove before they write) has
    not changed. Once the user's own file has been read, its removal never leads to the shipped one.
    """

    def __init__(self, path: str | None, environ: Mapping[str, str]) -> None:
        self._asked = path
        self._environ = environ
        self._read: _Source | None = None  # what was read last, valid or not
        self._stamp: _Stamp | None = None  # the file's, when it was read last
        self._seen: _Stamp | None = None  # the file's, at the last look

    def reload(self) -> Config:
        """Read the file now, changed or not: the start and SIGHUP. Raises ConfigError."""
        source = self._read_again()
        self._read, self._stamp, self._seen = source, source.stamp, source.stamp
        return _checked(source, self._environ)

    def changed(self) -> bool:
        """Look at the file: does it differ from what was read last, and hold still?"""
        stamp = _look(self._path(), self._environ)
        settled = stamp == self._seen
        self._seen = stamp
        return settled and stamp is not None and stamp != self._stamp

    def poll(self) -> Config | None:
        """For every second: the new configuration if the file has changed, else None.

        Raises ConfigError once for each content that is no good; a file that was only touched is None.
        """
        if not self.changed():
            return None
        before = self._read
        self._stamp = self._seen  # also if reading fails: said once, not every second
        source = self._read_again()
        self._read, self._stamp = source, source.stamp
        if before is not None and before[:3] == source[:3]:
            return None
        return _checked(source, self._environ)

    def _read_again(self) -> _Source:
        """Keys that were there do not go with their file: that would let everybody in."""
        source = _read(self._path(), self._environ)
        if source.keys is None and self._read is not None and self._read.keys is not None:
            problem = f"{keys_path(source.path, self._environ)} is gone; its keys stay in force until a restart"
            raise ConfigError(source.path, [Mistake("", problem, "`portway key remove` for each")])
        return source

    def _path(self) -> str:
        found = find(self._asked, self._environ)
        return self._read.path if self._read is not None and found == _shipped_path() else found


class _Stamp(NamedTuple):
    """What tells one state of a file, and of the keys.toml that goes with it, from another without reading it."""

    path: str
    mtime_ns: int
    size: int
    inode: int
    keys: tuple[int, int, int] | None = None


class _Source(NamedTuple):
    """A configuration as read. keys: keys.toml's text. mode, stamp: None where there is no file of its own."""

    path: str
    data: bytes
    keys: bytes | None = None
    mode: int | None = None
    stamp: _Stamp | None = None


def _own_path(environ: Mapping[str, str]) -> str:
    base = environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):  # unset, empty or relative: to be ignored, says the XDG specification
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".config")
    return os.path.join(base, "portway", "models.toml")


def _shipped_path() -> str:
    """portway/models.toml in a wheel and in a zipapp, config/models.toml in a clone."""
    package = os.path.dirname(os.path.abspath(__file__))
    packed = os.path.join(package, "models.toml")
    cloned = os.path.join(os.path.dirname(package), "config", "models.toml")
    return cloned if os.path.exists(cloned) and not os.path.exists(packed) else packed


def _read(path: str, environ: Mapping[str, str]) -> _Source:
    own_keys = _read_keys(keys_path(path, environ))
    try:
        with open(path, "rb") as file:
            data = file.read()
            status = os.fstat(file.fileno())
        return _Source(path, data, own_keys, status.st_mode, _stamp(path, status, environ))
    except (FileNotFoundError, NotADirectoryError) as exc:
        packed = _read_packed(path)
        if packed is None:
            raise _unreadable(path, exc) from exc
        return _Source(path, packed, own_keys)
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _read_keys(path: str) -> bytes | None:
    try:
        return keys.read_file(path)
    except NotADirectoryError:
        return None
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _read_packed(path: str) -> bytes | None:
    """A file inside the archive that Portway itself was imported from, if it was.

    By the module's own loader: importlib.resources takes longer to import than all of Portway.
    """
    get_data: Callable[[str], bytes] | None = getattr(__spec__.loader, "get_data", None)
    try:
        return None if get_data is None else get_data(path)
    except OSError:
        return None


def _look(path: str, environ: Mapping[str, str]) -> _Stamp | None:
    try:
        return _stamp(path, os.stat(path), environ)
    except OSError:  # missing for a moment, or in an archive, which doesn't change
        return None


def _stamp(path: str, status: os.stat_result, environ: Mapping[str, str]) -> _Stamp:
    try:
        beside = os.stat(keys_path(path, environ))
    except OSError:
        return _Stamp(path, status.st_mtime_ns, status.st_size, status.st_ino)
    its = (beside.st_mtime_ns, beside.st_size, beside.st_ino)
    return _Stamp(path, status.st_mtime_ns, status.st_size, status.st_ino, its)


def _unreadable(path: str, exc: OSError) -> ConfigError:
    return ConfigError(path, [Mistake("", f"can't be read: {exc.strerror}", "a file in TOML")])


def _checked(source: _Source, environ: Mapping[str, str]) -> Config:
    document = _toml(source)
    reader = fields.Reader()
    values = reader.table(schema(environ), document, "")
    backends, models = values.get("backends", {}), values.get("models", {})
    own_keys = _own_keys(reader, source, environ)
    _check_any(reader, document)
    _check_server(reader, values.get("server", {}), document, own_keys)
    _check_keys(reader, values.get("server", {}), own_keys, models)
    _check_loop(reader, values.get("server", {}), backends)
    _check_cooldown(reader, values.get("cooldown", {}))
    _check_backends(reader, models, backends)
    _check_fallbacks(reader, models, backends)
    _check_cycles(reader, models)
    panels.check(reader, models)
    _check_aliases(reader, models)
    _check_flags(reader, models)
    if reader.mistakes:
        raise ConfigError(source.path, reader.mistakes)
    return _built(source, values, document, own_keys)


def _own_keys(reader: fields.Reader, source: _Source, environ: Mapping[str, str]) -> tuple[Any, ...]:
    """The entries of keys.toml."""
    if source.keys is None:
        return ()
    document = _toml(_Source(keys_path(source.path, environ), source.keys))
    read: tuple[Any, ...] = reader.table(keys.file_table(environ), document, keys.FILE).get("keys", ())
    return read


def _toml(source: _Source) -> dict[str, Any]:
    try:
        text = source.data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line, column = _position(source.data[: exc.start].decode("utf-8-sig"))
        problem = f"line {line}, column {column}: not UTF-8 (byte 0x{source.data[exc.start]:02x})"
        raise ConfigError(source.path, [Mistake("", problem, "TOML in UTF-8")]) from exc
    try:
        return tomllib.loads(text)
    except RecursionError as exc:
        raise ConfigError(source.path, [Mistake("", "nested too deeply to be read")]) from exc
    except ValueError as exc:  # TOMLDecodeError, and int()'s own refusal of thousands of digits
        raise ConfigError(source.path, [Mistake("", _syntax(str(exc), text))]) from exc


def _syntax(message: str, text: str) -> str:
    """tomllib's message with its position in front: "line 3, column 5: Expected '='.."."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if found is None:
        return f"not TOML: {message}"
    line, column = (found[2], found[3]) if found[2] else _position(text)
    return f"line {line}, column {column}: not TOML: {found[1]}"


def _position(text: str) -> tuple[int, int]:
    """Line and column, from 1, of what comes after `text`."""
    return text.count("\n") + 1, len(text) - text.rfind("\n")


# --- What may stand in the file --------------------------------------------------------------

_DAY = 86_400.0  # seconds

# what `params` may not set: the client's question and the daemon's own business
_OWNED_PARAMS = frozenset({"model", "messages", "prompt", "input", "stream", "stream_options"})


def schema(environ: Mapping[str, str]) -> fields.Table:
    """The whole file: every section and key, and how its value is read."""
    return fields.Table(
        {
            "server": _server(environ),
            "backends": fields.Named(fields.name, _backend(environ)),
            "models": fields.Named(fields.name, fields.Tagged("kind", {"": _model(), **_panels()})),
            "cooldown": _cooldown(),
            "log": _log(),
            "cache": _cache(),
            "price": fields.Table({"input": fields.dollars, "output": fields.dollars}),
            "memory": _memory(),
        }
    )


def _server(environ: Mapping[str, str]) -> fields.Table:
    return fields.Table(
        {
            "host": fields.host,
            "port": fields.whole(0, 65_535),
            "api_keys": fields.ListOf(keys.kind(environ), f"a list of keys: {keys.ALLOWED}, or a table with `key`"),
            "allowed_hosts": fields.ListOf(fields.host_name, 'a list of host names, like "box.lan"'),
            "allowed_origins": fields.ListOf(fields.origin, 'a list of origins, like "http://localhost:3000"'),
            "heartbeat": fields.seconds(0.01, 3600),
            "max_body": fields.size(1, 4 * 1024**3),
            "max_requests": fields.whole(1, 10_000),
            "max_connections": fields.whole(1, 1_000_000),
            "header_timeout": fields.seconds(0.01, _DAY),
            "body_timeout": fields.seconds(0.01, _DAY),
            "idle_timeout": fields.seconds(0.01, _DAY),
            "write_timeout": fields.seconds(0.01, _DAY),
            "drain": fields.seconds(0, _DAY),
        }
    )


def _backend(environ: Mapping[str, str]) -> fields.Table:
    kind = fields.choice("ollama", "openai")
    return fields.Table(
        {
            "kind": kind,
            "url": fields.url,
            "api_key": fields.secret(environ),
            "max_idle": fields.whole(0, 10_000),
            "local": fields.flag,
            "max_parallel": fields.whole(1, 10_000),
            "max_queue": fields.whole(0, 10_000),
        },
        {"kind": fields.one_of("ollama", "openai"), "url": fields.URL_ALLOWED},
    )


def _model() -> fields.Table:
    timeout = fields.seconds(0.01, _DAY)
    return fields.Table(
        {
            "backend": fields.text,
            "model": fields.text,
            "family": fields.text,
            "keep_alive": fields.keep_alive,
            "num_ctx": fields.whole(1, 2**24),
            "think": fields.choice(False, True, "low", "medium", "high"),
            "fallback": fields.ListOf(fields.text, "a list of logical names"),
            "aliases": fields.ListOf(fields.name, "a list of further names"),
            "params": fields.Named(_param_name, fields.json_value),
            "timeouts": fields.Table(dict.fromkeys(("connect", "load", "first_token", "idle", "total"), timeout)),
            "strict": fields.flag,
            "capabilities": fields.ListOf(fields.choice(*CAPABILITIES), f"a list of {fields.one_of(*CAPABILITIES)}"),
            "max_tokens": fields.whole(1, 2**24),
            "merge_system": fields.flag,
            "cache": fields.lifetime,
            "flag": fields.tier,
            "default": fields.flag,
            "size": fields.size(1, 1024**4),
            "preload": fields.flag,
            "prefer_warm": fields.flag,
        },
        {"backend": "the name of a [backends.NAME]", "model": "the backend's own name for the model"},
    )


def _panels() -> Mapping[str, fields.Table]:
    aside: dict[str, fields.Kind] = {
        "timeouts": fields.Table({"total": fields.seconds(0.01, _DAY)}),
        "aliases": fields.ListOf(fields.name, "a list of further names"),
        "flag": fields.tier,
        "default": fields.flag,
    }
    return panels.tables(fields.Named(_param_name, fields.json_value), aside)


def _param_name(value: object) -> str:
    if value in _OWNED_PARAMS:
        raise fields.Refused("belongs to the request", "sampling and other options of the model")
    return fields.text(value)


def _cooldown() -> fields.Table:
    span = fields.seconds(0, _DAY)
    return fields.Table({"failures": fields.whole(1, 1000), "seconds": span, "longest": span})


def _log() -> fields.Table:
    size, keep = fields.size(64 * 1024, 4 * 1024**3), fields.whole(0, 1000)
    return fields.Table({"enabled": fields.flag, "file": fields.path, "max_size": size, "keep": keep})


def _memory() -> fields.Table:
    return fields.Table(
        {
            "enabled": fields.flag,
            "budget": fields.budget,
            "reserve": fields.size(0, 1024**4),
            "min_stay": fields.seconds(0, _DAY),
            "patience": fields.seconds(0, _DAY),
            "check": fields.seconds(0.01, _DAY),
        }
    )


def _cache() -> fields.Table:
    size = fields.size(1024**2, 1024**4)
    return fields.Table({"enabled": fields.flag, "file": fields.path, "max_size": size})


# --- What several keys must agree on ---------------------------------------------------------

_Values = Mapping[str, Any]  # a section as far as it could be read


def _check_any(reader: fields.Reader, document: _Values) -> None:
    if document.get("models", {}) == {}:
        reader.refuse("models", "missing: there is nothing to ask for", "at least one [models.NAME]")


def _check_server(reader: fields.Reader, server: _Values, document: _Values, own_keys: Sequence[Any]) -> None:
    host = server.get("host", Server().host)
    section = document.get("server", {})
    if is_loopback(host) or own_keys or (isinstance(section, dict) and section.get("api_keys")):
        return
    reader.refuse(
        "server.host",
        f"{fields.shown(host)} can be reached from other machines, and server.api_keys is empty",
        "127.0.0.1, ::1 or localhost, or any host together with api_keys",
    )


def _check_keys(reader: fields.Reader, server: _Values, own_keys: Sequence[Any], models: _Values) -> None:
    entries = [(f"server.api_keys[{index}]", entry) for index, entry in enumerate(server.get("api_keys", ()))]
    entries += [(f"{keys.FILE}.keys[{index}]", entry) for index, entry in enumerate(own_keys)]
    keys.check(reader, entries, _names(models))


def _names(models: _Values) -> dict[str, str]:
    """Every name and alias -> the model's name."""
    found = {name: name for name in models}
    for name, model in models.items():
        found |= {alias: name for alias in model.get("aliases", ()) if alias is not fields.BAD and alias not in models}
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", host) is not None


def _check_loop(reader: fields.Reader, server: _Values, backends: _Values) -> None:
    own_host, own_port = server.get("host", Server().host), server.get("port", Server().port)
    for name, backend in backends.items():
        url = backend.get("url")
        if url is not None and url.port == own_port and (is_loopback(url.host) or url.host == own_host):
            key = f"{fields.dotted('backends', name)}.url"
            reader.refuse(key, f"{fields.shown(url.text)} is where Portway itself listens", "another server")


def _check_cooldown(reader: fields.Reader, values: _Values) -> None:
    cooldown = Cooldown(**values)
    if cooldown.longest < cooldown.seconds:
        problem = f"{cooldown.longest:g} is less than cooldown.seconds"
        reader.refuse("cooldown.longest", problem, f"{cooldown.seconds:g} or more")


def _check_backends(reader: fields.Reader, models: _Values, backends: _Values) -> None:
    for name, model in models.items():
        backend = model.get("backend")
        if backend is not None and backend not in backends:
            reader.refuse(
                f"{fields.dotted('models', name)}.backend",
                f"{fields.shown(backend)} is no backend",
                fields.one_of(*backends) or "none: there is no [backends.NAME] yet",
                fields.first_near(backend, backends),
            )


def _check_fallbacks(reader: fields.Reader, models: _Values, backends: _Values) -> None:
    """Each member exists, once, and no two members are the same thing behind the same backend."""
    aliases = {alias: name for name, model in models.items() for alias in model.get("aliases", ())}
    for name, model in models.items():
        members: set[str] = set()
        targets = {_target(model, backends): name}
        for key, member in _members(name, model):
            if member not in models:
                near = aliases.get(member) or fields.first_near(member, models)
                reader.refuse(key, f"{fields.shown(member)} is no model", fields.one_of(*models), near)
                continue
            target = _target(models[member], backends)
            if member in members:
                reader.refuse(key, f"{fields.shown(member)} stands in this chain already", "each model once")
            elif member != name and target is not None and target in targets:
                same = f"{member} and {targets[target]} are both {fields.shown(target[1])} behind {target[0]}"
                reader.refuse(key, f"{same}: what breaks one breaks the other", "each (backend, model) once in a chain")
            members.add(member)
            targets.setdefault(target, member)


def _members(name: str, model: _Values) -> Iterator[tuple[str, str]]:
    """The dotted key and the name of each member of a model's own fallback."""
    for index, member in enumerate(model.get("fallback", ())):
        if member is not fields.BAD:
            yield f"{fields.dotted('models', name)}.fallback[{index}]", member


def _target(model: _Values, backends: _Values) -> tuple[str, str] | None:
    """(backend, the backend's own name): what is loaded, as far as it is known."""
    backend, own = model.get("backend", ""), model.get("model", "")
    if not own or backend not in backends:
        return None
    return backend, _full_name(own, backends[backend].get("kind"))


def _full_name(own: str, kind: str | None) -> str:
    """Ollama takes "llama3.2" and "llama3.2:latest" for the same."""
    return f"{own}:latest" if kind == "ollama" and ":" not in own.rpartition("/")[2] else own


def _check_cycles(reader: fields.Reader, models: _Values) -> None:
    """No model comes back to itself along fallbacks; each cycle is told once, where it is first met."""
    told = set()
    for name, model in models.items():
        for key, member in _members(name, model):
            way = _way(models, member, name)
            if way and frozenset(way) not in told:
                told.add(frozenset(way))
                reader.refuse(key, f"a cycle: {' -> '.join([name, *way])}", "a chain that ends")


def _way(models: _Values, start: str, end: str) -> list[str]:
    """The shortest way from `start` to `end` along fallbacks, both included; [] = there is none."""
    ways = {start: [start]}
    queue = deque(ways)
    while queue:
        name = queue.popleft()
        if name == end:
            return ways[name]
        for _, member in _members(name, models.get(name, {})):
            if member not in ways:
                ways[member] = [*ways[name], member]
                queue.append(member)
    return []


def _check_aliases(reader: fields.Reader, models: _Values) -> None:
    taken = {name: f"the model {name}" for name in models}
    for name, model in models.items():
        for index, alias in enumerate(model.get("aliases", ())):
            if alias in taken:
                key = f"{fields.dotted('models', name)}.aliases[{index}]"
                reader.refuse(key, f"{fields.shown(alias)} is taken by {taken[alias]}", "a name that nothing else has")
            elif alias is not fields.BAD:
                taken[alias] = f"an alias of {name}"


def _check_flags(reader: fields.Reader, models: _Values) -> None:
    """Each flag of `ask` means one model, and so does its absence."""
    taken: dict[object, str] = {}
    for key in ("flag", "default"):
        for name, model in models.items():
            value = model.get(key)
            if value is None or value is False or value is fields.BAD:
                continue
            if value in taken:
                dotted = f"{fields.dotted('models', name)}.{key}"
                reader.refuse(dotted, f"{fields.shown(value)} is what {taken[value]} has", "once")
            else:
                taken[value] = name


# --- Building the values ---------------------------------------------------------------------


def _built(source: _Source, values: _Values, document: _Values, own_keys: Sequence[Any]) -> Config:
    backends = {name: _built_backend(name, given) for name, given in values.get("backends", {}).items()}
    models = {name: _built_model(name, given, backends) for name, given in values["models"].items()}
    names = {name: name for name in models} | {alias: name for name, model in models.items() for alias in model.aliases}
    server = dict(values.get("server", {}))
    server["api_keys"] = keys.built((*server.get("api_keys", ()), *own_keys), names)
    return Config(
        path=source.path,
        server=Server(**server),
        backends=MappingProxyType(backends),
        models=MappingProxyType(models),
        names=MappingProxyType(names),
        cooldown=Cooldown(**values.get("cooldown", {})),
        log=Log(**values.get("log", {})),
        cache=Cache(**values.get("cache", {})),
        price=Price(**values.get("price", {})),
        memory=Memory(**values.get("memory", {})),
        warnings=tuple(_warnings(source, document, models)),
    )


def _built_backend(name: str, values: _Values) -> Backend:
    given = dict(values)
    url: fields.Url = given.pop("url")
    # "with or without /v1", and Ollama's own /api as it stands in its manual: both are only prefixes here
    base = url.path.rstrip("/").removesuffix("/v1")
    if given["kind"] == "ollama":
        base = base.removesuffix("/api")
    return Backend(name, url=url.text, scheme=url.scheme, host=url.host, port=url.port, base=base.rstrip("/"), **given)


def _built_model(name: str, values: _Values, backends: Mapping[str, Backend]) -> Model:
    given = dict(values)
    if "timeouts" in given:
        given["timeouts"] = Timeouts(**given["timeouts"])
    if "kind" in given:
        shared = {key: given[key] for key in ("timeouts", "aliases", "flag", "default") if key in given}
        return Model(name, PANELS[given["kind"]], name, panel=panels.built(given), **shared)
    given["backend"] = backends[given["backend"]]
    if "capabilities" in given:
        given["capabilities"] = frozenset(given["capabilities"])
    return Model(name, **given)


# --- Warnings: valid, and still likely to hurt -----------------------------------------------


def _warnings(source: _Source, document: _Values, models: Mapping[str, Model]) -> Iterator[str]:
    yield from _warn_readable(source, document)
    for model in models.values():
        key = fields.dotted("models", model.name)
        yield from (f"{key}.{text}" for text in _warn_chain(model, models))
        yield from (f"{key}.{text}" for text in _warn_model(model, document["models"][model.name]))
        if model.panel is not None:
            yield from (f"{key}.{text}" for text in panels.warnings(model.panel))
    yield from _warn_windows(models.values())


def _warn_readable(source: _Source, document: _Values) -> Iterator[str]:
    if source.mode is None or os.name != "posix" or not source.mode & 0o077:
        return
    for key, secret in _secrets(document):
        if not secret.startswith("env:"):
            yield f"{key}: a key in a file that others on this machine may read: chmod 600 {source.path}"
            return


def _secrets(document: _Values) -> Iterator[tuple[str, str]]:
    yield from keys.inside(document.get("server", {}))
    for name, backend in document.get("backends", {}).items():
        if "api_key" in backend:
            yield f"{fields.dotted('backends', name)}.api_key", backend["api_key"]


def _warn_chain(model: Model, models: Mapping[str, Model]) -> Iterator[str]:
    if not model.fallback:
        return
    if model.strict:
        yield "fallback: no effect: strict is true"
        return
    if model.capabilities == frozenset({"embedding"}):
        yield "fallback: no effect: embeddings never come from another model"
    families = {models[name].family.lower() for name in (model.name, *model.fallback)}
    if len(families) == 1 and "" not in families:
        chain = " -> ".join((model.name, *model.fallback))
        yield f"fallback: {chain} is all {model.family}: the same blob hits the same broken state"


def _warn_model(model: Model, given: _Values) -> Iterator[str]:
    if model.prefer_warm and (model.strict or not model.fallback):
        yield "prefer_warm: no effect: nobody else may answer"
    times = given.get("timeouts", {})
    for name in ("connect", "load", "first_token", "idle"):
        if name in times and "total" in times and getattr(model.timeouts, name) > model.timeouts.total:
            limit = f"{model.timeouts.total:g} s of timeouts.total"
            yield f"timeouts.{name}: {getattr(model.timeouts, name):g} s can't be reached: the {limit} end first"


def _warn_windows(models: Iterable[Model]) -> Iterator[str]:
    """Ollama loads a model anew for each window; elsewhere num_ctx only says what there is."""
    first: dict[tuple[str, str], Model] = {}
    for model in models:
        if model.backend.kind == "ollama":
            other = first.setdefault((model.backend.name, _full_name(model.model, "ollama")), model)
            if other.num_ctx != model.num_ctx:
                key = f"{fields.dotted('models', model.name)}.num_ctx"
                same = f"{fields.shown(model.model)} behind {model.backend.name}"
                differ = f"{_window(model)} here, {_window(other)} in {other.name}"
                yield f"{key}: {differ}, and both are {same}: each switch reloads the model"


def _window(model: Model) -> str:
    return "not set" if model.num_ctx is None else str(model.num_ctx)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
