"""`portway doctor`: will it run here? What is there, what is missing, and one line of what to do about each.

    examine   every check in turn; each gives Findings and knows nothing of the others
      Backends  doctor_backends   what each server says of itself and its models
      Fit       fits              whether the models fit, alone and beside the everyday one
    report    findings -> text or JSON, and an exit code by the worst of them

It asks, reads and measures; it loads no model, writes nothing and changes nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from portway import __version__, config, telemetry
from portway.cache import file as cache_file
from portway.commands import first_config, holder, probe
from portway.commands.doctor_backends import Seen, Verdict, look_at, verdicts
from portway.keys import plain
from portway.memory import machine as memory
from portway.memory import measured
from portway.memory.fits import Footprint, gb
from portway.vitals import BRIEF

SEVERITIES = ("ok", "note", "warning", "error")
EXIT_CODES = {"ok": 0, "note": 0, "warning": 3, "error": 1}  # 2 is the command line's
LITTLE = 10  # percent of the memory; with less left the system itself begins to swap
STALLED = 10.0  # percent of the last minute in which Linux says that some program waited for memory
FUTURE = 300.0  # seconds that a file may be ahead of the clock before the clock is doubted
SKEW = 60.0  # seconds that a server's clock may differ


class Finding(NamedTuple):
    """One thing that was looked at. fix: one line of what to do, "" if there is nothing to."""

    severity: str
    about: str
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is examined, apart from the configuration. A test puts its own in its place."""

    environ: Mapping[str, str]
    platform: str = sys.platform
    parent: int = field(default_factory=os.getppid)
    ask: Callable[..., probe.Told] = probe.ask
    who_listens: Callable[[str, int], holder.Holder | None] = holder.who_listens
    memory: Callable[[], memory.Reading] = memory.read
    now: Callable[[], float] = time.time
    stalls: str = "/proc/pressure/memory"


@dataclass(frozen=True, slots=True)
class Examined:
    """Everything that was found."""

    findings: Sequence[Finding]
    verdicts: Sequence[Verdict] = ()

    @property
    def worst(self) -> str:
        """The severity of the worst finding."""
        return max((finding.severity for finding in self.findings), key=SEVERITIES.index, default="ok")


def main(path: str | None, as_json: bool, machine: Machine | None = None) -> int:
    """Examine and report. Returns the exit code: 0 all is well, 3 warnings, 1 errors."""
    examined = examine(path, machine or Machine(os.environ))
    print(json.dumps(as_document(examined), indent=2) if as_json else "\n".join(as_lines(examined)))
    return EXIT_CODES[examined.worst]


def examine(path: str | None, machine: Machine) -> Examined:
    """Every check; what needs a valid configuration is left out without one."""
    findings = [*_python(), *_clock(machine)]
    try:
        loaded = config.load(path, machine.environ)
    except config.ConfigError as exc:
        return Examined([*findings, *_mistakes(exc), *_memory(machine)])
    findings += _config(loaded, machine)
    health = _health(loaded, machine)
    findings += _port(loaded, machine, health)
    # pseudo-models (a council) have a backend in name only
    servers = (model.backend for model in loaded.models.values() if model.backend.kind in ("ollama", "openai"))
    backends = {backend.name: backend for backend in servers}
    seen = {name: look_at(backend, loaded, machine.ask) for name, backend in backends.items()}
    for each in seen.values():
        findings += _backend(each, loaded, machine, health)
    reading = machine.memory()
    judged = verdicts(loaded, seen, reading)
    findings += [*_missing(loaded, seen), *_memory(machine, reading), *_fit(judged, reading, loaded)]
    findings += _files(loaded, machine)
    return Examined(findings, judged)


# --- Python, clock ---------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", "python", f"Python {version}, {sys.executable}; Portway {__version__}")


def _clock(machine: Machine) -> Iterator[Finding]:
    """A clock that is behind makes stored answers live for ever, puts the log out of order, and refuses TLS."""
    now = machine.now()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    released = _modified(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    fix = "set the clock: automatic date and time in the system's settings, or `timedatectl set-ntp true`"
    if now < 1_700_000_000:  # November 2023, before there was any Portway
        yield Finding("error", "clock", f"it says {stamp}", fix)
    elif released is not None and released > now + FUTURE:
        yield Finding("warning", "clock", f"it says {stamp}, and Portway's own files are from later than that", fix)
    else:
        yield Finding("ok", "clock", stamp)


def _modified(path: str) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


# --- configuration ---------------------------------------------------------------------------


def _mistakes(exc: config.ConfigError) -> Iterator[Finding]:
    for mistake in exc.mistakes:
        where = f"{mistake.key}: {mistake.problem}" if mistake.key else mistake.problem
        fix = (
            f"change it to {mistake.near}" if mistake.near else f"allowed: {mistake.allowed}" if mistake.allowed else ""
        )
        yield Finding("error", "config", f"{exc.path}: {where}", fix or f"correct {exc.path}")


def _config(loaded: config.Config, machine: Machine) -> Iterator[Finding]:
    yield Finding("ok", "config", config.describe(loaded)[0])
    for warning in loaded.warnings:
        yield Finding("warning", "config", warning, f"correct it in {loaded.path}")
    own = first_config.own_path(machine.environ)
    if not os.path.lexists(own) and not machine.environ.get("PORTWAY_CONFIG") and not os.path.isfile(loaded.path):
        yield Finding(
            "note", "config", "you have none of your own; this is the one that comes with Portway", "portway init"
        )
    try:
        mode = os.stat(loaded.path).st_mode
    except OSError:
        return  # inside the program's own file
    if mode & 0o022:
        text = f"others on this machine may change {loaded.path}, and with it where prompts are sent"
        yield Finding("warning", "files", text, f"chmod go-w {loaded.path}")


# --- the port --------------------------------------------------------------------------------


def _health(loaded: config.Config, machine: Machine) -> Mapping[str, Any] | None:
    """What the Portway on our port says of itself; {} if something else is there, None if nothing is."""
    if loaded.server.port == 0:
        return None
    try:
        told = machine.ask(_url(loaded), "/health", key=plain(loaded.server.api_keys, machine.environ) or None)
    except ConnectionRefusedError:
        return None
    except OSError:
        return {}
    return told.value if "in_flight" in told.value or set(told.value) == set(BRIEF) else {}


def _url(loaded: config.Config) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(loaded.server.host, loaded.server.host)  # noqa: S104 - not bound
    return f"http://{f'[{host}]' if ':' in host else host}:{loaded.server.port}"


def _port(loaded: config.Config, machine: Machine, health: Mapping[str, Any] | None) -> Iterator[Finding]:
    server = loaded.server
    where = f"{server.host}:{server.port}"
    holder = None if health is None and server.port == 0 else machine.who_listens(server.host, server.port)
    who = f"pid {holder.pid} ({holder.command})" if holder else "another user's program, or one that can't be seen"
    if health is None and holder is None:
        yield Finding("ok", "port", f"{where} is free")
    elif not health:
        yield Finding("error", "port", f"{where} is taken by {who}", "stop that, or choose another server.port")
    else:
        yield Finding("ok", "port", f"Portway {health.get('version')} answers on {where}, {who}")
        yield from _running(loaded, health)


def _running(loaded: config.Config, health: Mapping[str, Any]) -> Iterator[Finding]:
    """What the running daemon itself knows to be wrong."""
    if health.get("version") != __version__:
        yield Finding("note", "daemon", f"this is Portway {__version__}, another one is running", "restart it")
    if "in_flight" not in health:
        yield Finding("note", "daemon", "it says no more of itself to whoever has no key", "set PORTWAY_API_KEY")
    its = health.get("config")
    its = its if isinstance(its, dict) else {}
    if its.get("problem"):
        text = "it could not take the newest configuration over and serves by the one before"
        yield Finding("warning", "daemon", text, "portway check")
    if isinstance(its.get("path"), str) and os.path.abspath(its["path"]) != os.path.abspath(loaded.path):
        yield Finding(
            "note", "daemon", f"it is configured by {its['path']}, this is {loaded.path}", "name one by --config"
        )
    for name in ("log", "cache"):
        part = health.get(name)
        if isinstance(part, dict) and part.get("problem"):
            yield Finding("warning", "daemon", f"{name}: {part['problem']}", "free space, or correct its permissions")


# --- backends --------------------------------------------------------------------------------


def _backend(
    seen: Seen, loaded: config.Config, machine: Machine, health: Mapping[str, Any] | None
) -> Iterator[Finding]:
    backend = seen.backend
    where = f"{backend.name} ({backend.url})"
    unreachable = (health or {}).get("unreachable")
    says = unreachable.get(backend.name) if isinstance(unreachable, dict) else None
    if seen.problem is not None:
        yield _unreachable(seen, loaded, machine, where)
        return
    version = f" {seen.version}" if seen.version else ""
    yield Finding("ok", "backend", f"{where}: {seen.program}{version}, {len(seen.listed)} models")
    if seen.refused:
        fix = f"set backends.{backend.name}.api_key"
        yield Finding("error", "backend", f"{where} answered {seen.refused} to GET {seen.refused_path}", fix)
    if says is not None and machine.platform == "darwin" and seen.is_lan:
        yield _local_network(where, "the running Portway does not reach it, and this program does")
    if seen.clock is not None and abs(seen.clock - machine.now()) > SKEW:
        off = seen.clock - machine.now()
        text = f"{where} has a clock that is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this machine's"
        yield Finding("warning", "clock", text, "set the one that is wrong; nothing here depends on more than order")


def _unreachable(seen: Seen, loaded: config.Config, machine: Machine, where: str) -> Finding:
    problem, backend = seen.problem, seen.backend
    code = problem.errno if problem is not None else None
    if machine.platform == "darwin" and code == MACOS_NO_ROUTE and seen.is_lan:
        who = "launchd started this program" if machine.parent == 1 else "no route to it (errno 65), at once"
        return _local_network(where, who)
    if backend.kind == "ollama" and seen.is_here:
        start = "start it: `ollama serve`, or the Ollama app"
    else:
        start = f"start it, or correct backends.{backend.name}.url"
    said = str(problem.strerror or problem) if problem is not None else ""
    severity = "warning" if all(_has_another(model, loaded) for model in _behind(backend, loaded)) else "error"
    return Finding(severity, "backend", f"{where} can't be reached: {said or type(problem).__name__}", start)


def _behind(backend: config.Backend, loaded: config.Config) -> list[config.Model]:
    return [model for model in loaded.models.values() if model.backend == backend]


def _has_another(model: config.Model, loaded: config.Config) -> bool:
    """Whether a model behind another backend answers in its place."""
    return any(member.backend != model.backend for member in loaded.chain(model))


MACOS_NO_ROUTE = 65  # EHOSTUNREACH there; Linux has another number for it


def _local_network(where: str, why: str) -> Finding:
    """The block has no error of its own: `ping` and Apple's curl get through, so the server seems at fault."""
    text = f"{where}: macOS Local Network Privacy keeps this Python from other machines of the network ({why})"
    fix = (
        "allow it in System Settings, Privacy & Security, Local Network; for a launchd service, which can't be asked, "
        "tunnel: `ssh -N -L 11434:127.0.0.1:11434 HOST`, and use 127.0.0.1 as its url"
    )
    return Finding("error", "backend", text, fix)


def _missing(loaded: config.Config, seen: Mapping[str, Seen]) -> Iterator[Finding]:
    """One line for each physical model that is not there, with the names that need it."""
    absent: dict[tuple[str, str], list[str]] = {}
    for model in loaded.models.values():
        backend_seen = seen.get(model.backend.name)
        known = backend_seen.models.get(model.name) if backend_seen else None
        if known is not None and not known.present:
            absent.setdefault((model.backend.name, model.model), []).append(model.name)
    for (backend, name), names in absent.items():
        fix = (
            f"ollama pull {name}"
            if seen[backend].backend.kind == "ollama"
            else f"see what {backend} lists, or load it there"
        )
        answering = [name for name in names if loaded.chain(loaded.models[name])[1:]]
        severity = "warning" if len(answering) == len(names) else "error"
        yield Finding(severity, "models", f"{backend} has no {name}; needed by {', '.join(names)}", fix)


# --- memory ----------------------------------------------------------------------------------


def _memory(machine: Machine, reading: memory.Reading | None = None) -> Iterator[Finding]:
    reading = machine.memory() if reading is None else reading
    if reading.total is None:
        yield Finding("note", "memory", "this system does not say how much there is")
        return
    text = f"{gb(reading.total)}"
    if reading.available is not None:
        text += f", {gb(reading.available)} of it available now"
    if reading.free_percent is not None:
        text += f"; macOS calls {reading.free_percent} % free"
    yield Finding("ok", "memory", text)
    left = reading.free_percent
    if left is None and reading.available is not None:
        left = round(100 * reading.available / reading.total)
    if left is not None and left < LITTLE:
        text = f"only {left} % is left: the next model to load makes the machine swap"
        yield Finding("warning", "memory", text, "close programs, or unload a model (`ollama stop NAME`)")
    stalled = stall(_text(machine.stalls))
    if stalled is not None and stalled > STALLED:
        text = f"programs waited for memory in {stalled:.0f} % of the last minute"
        yield Finding("warning", "memory", text, "close programs, or unload a model (`ollama stop NAME`)")


def stall(text: str) -> float | None:
    """The percentage of the last minute of /proc/pressure/memory; None where Linux doesn't measure it."""
    for line in text.splitlines():
        if line.startswith("some "):
            values = dict(word.partition("=")[::2] for word in line.split()[1:])
            try:
                return float(values["avg60"])
            except (KeyError, ValueError):
                return None
    return None


def _fit(judged: Sequence[Verdict], reading: memory.Reading, loaded: config.Config) -> Iterator[Finding]:
    if reading.apart:
        yield Finding("note", "fit", "models live in a graphics card's own memory here, which is not judged")
        return
    for each in judged:
        yield _verdict(each, is_set=loaded.memory.budget is not None)
    together = [each.name for each in judged if each.beside]
    first = next((each for each in judged if each.everyday), None)
    if first is not None:
        others = ", ".join(together) or "none; each takes its place"
        yield Finding("ok", "fit", f"in memory beside {first.name} fit, one at a time: {others}")


def _verdict(each: Verdict, *, is_set: bool) -> Finding:
    estimate = "" if each.sure else " (an estimate)"
    text = f"{each.name}: {each.footprint}{estimate}"
    if each.fits:
        return Finding("ok", "fit", f"{text}, of {gb(each.room)}")
    if each.footprint.total <= each.most:
        fix = "close other programs before you ask it, or give it a smaller num_ctx"
        return Finding("note", "fit", f"{text}, more than the {gb(each.room)} that are left beside open programs", fix)
    fix = f"a smaller num_ctx or a smaller model for models.{each.name}; its fallback answers till then"
    if is_set:
        return Finding("warning", "fit", f"{text}, more than memory.budget ({gb(each.most)})", f"raise that, or {fix}")
    return Finding("warning", "fit", f"{text}: this machine can't hold it ({gb(each.most)} at most)", fix)


# --- files -----------------------------------------------------------------------------------


def _files(loaded: config.Config, machine: Machine) -> Iterator[Finding]:
    """They hold what was asked and answered, or its traces: their owner's only."""
    places = []
    if loaded.log.enabled:
        places.append(("log", loaded.log.file or telemetry.log_path(machine.environ)))
    if loaded.cache.enabled and any(model.cache for model in loaded.models.values()):
        places.append(("cache", loaded.cache.file or cache_file.default_path(machine.environ)))
    if loaded.memory.enabled:
        places.append(("models' measures", measured.default_path(machine.environ)))
    for what, path in places:
        found = _file(what, str(path))
        needed = what in ("log", "cache")  # the other is a convenience
        yield found if needed or found.severity != "error" else found._replace(severity="warning")
        modified = _modified(str(path))
        if modified is not None and modified > machine.now() + FUTURE:
            text = f"{path} was written {modified - machine.now():.0f} s in the future: the clock went back"
            yield Finding("warning", "clock", text, "set the clock")


def _file(what: str, path: str) -> Finding:
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.exists(path):
        if os.stat(path).st_mode & 0o077:
            return Finding(
                "warning", "files", f"others on this machine may read the {what}, {path}", f"chmod 600 {path}"
            )
        if not os.access(path, os.R_OK | os.W_OK):
            return Finding("error", "files", f"the {what}, {path}, can't be written", f"chown {os.getuid()} {path}")
        return Finding("ok", "files", f"{what}: {path}")
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding(
            "error", "files", f"the {what}, {path}, can't be made: {folder} is not writable", f"chmod u+wx {folder}"
        )
    return Finding("ok", "files", f"{what}: {path}, to be made")


# --- the report ------------------------------------------------------------------------------


def as_lines(examined: Examined) -> Iterator[str]:
    """For people."""
    for finding in examined.findings:
        yield f"{finding.severity:8} {finding.about:8} {_printable(finding.text)}"
        if finding.fix:
            yield f"{'':17} -> {_printable(finding.fix)}"
    counts = [(name, sum(each.severity == name for each in examined.findings)) for name in reversed(SEVERITIES)]
    yield ""
    yield ", ".join(f"{count} {name}{'s' if count != 1 and name != 'ok' else ''}" for name, count in counts if count)


def _printable(text: str) -> str:
    """What a server says of itself is no command to the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def as_document(examined: Examined) -> dict[str, Any]:
    """For programs."""
    return {
        "version": __version__,
        "worst": examined.worst,
        "exit_code": EXIT_CODES[examined.worst],
        "findings": [finding._asdict() for finding in examined.findings],
        "models": [_as_entry(verdict) for verdict in examined.verdicts],
    }


def _as_entry(verdict: Verdict) -> dict[str, Any]:
    fit: Footprint = verdict.footprint
    return {
        "name": verdict.name,
        "weights_bytes": fit.weights,
        "context_bytes": fit.context,
        "num_ctx": fit.num_ctx,
        "total_bytes": fit.total,
        "estimate": not verdict.sure,
        "fits": verdict.fits,
        "fits_beside_everyday": verdict.beside,
    }


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
