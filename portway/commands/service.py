"""`portway service`: Portway as a service of the user's own, under launchd or systemd.

It packs the Portway that runs now into one file, writes a unit that names everything by its absolute path
(service_units.py), and has the manager start it. All it does to the machine is in `_Paths`; `uninstall` undoes
that and leaves configuration, log and cache alone. Nothing here needs root.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from portway import config
from portway.commands import pack
from portway.commands.service_units import (
    LABEL,
    SHOWN,
    UNIT,
    BadUnit,
    Job,
    State,
    agent,
    read_launchctl,
    read_systemctl,
    unit,
    unquoted,
)

OK, FAILED, USAGE, BAD_CONFIG = 0, 1, 2, 78  # as `portway --help` has them
NOT_RUNNING = 3  # of `status`, as `systemctl status` has it
COMMAND_PATIENCE = 60.0  # seconds for one launchctl or systemctl; stopping waits for streams to end
UP_PATIENCE = 10.0  # seconds for the daemon to answer after it was started
GONE_PATIENCE = 60.0  # seconds for launchd to let go of an agent, which it does when its process has ended
LOOK_AGAIN = 0.2  # seconds between two looks
LOG_LINES = 50
FOLDERS = (
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_CACHE_HOME",
    "XDG_STATE_HOME",
)  # what a service wouldn't know of a shell's

HELP = """\
usage: portway service install   [--config FILE] [--print]
       portway service uninstall
       portway service status
       portway service logs

Runs `portway serve` from login on, and again when it has failed: a LaunchAgent
on macOS, a systemd user unit on Linux. No root, and no other place than these:

  the unit     ~/Library/LaunchAgents/io.github.portway.plist, or
               ${XDG_CONFIG_HOME:-~/.config}/systemd/user/portway.service
  the program  ${XDG_DATA_HOME:-~/.local/share}/portway/portway.pyz, one file,
               run as `python3 -I -S`: no site-packages, no current folder
  what it says ~/Library/Logs/portway.log, or the journal

  install    write both and start it; after an update, write and start anew
  uninstall  stop it and remove both; configuration, log, cache and
             measures stay
  status     whether it runs and answers; 0 if so, 3 if not
  logs       the last lines that it has said

Options:
  --config FILE  serve by this configuration, instead of the one that is found
  --print        print the unit and do nothing

Keys never go into the unit. Where models.toml says "env:NAME", on Linux write
NAME=.. into ${XDG_CONFIG_HOME:-~/.config}/portway/env (chmod 600). launchd has
no such file: there write the key itself into models.toml and chmod 600 that.
"""


class Done(NamedTuple):
    """What a program came to. code: 127 = there is no such program."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The last thing it said, in one line."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


Run = Callable[[Sequence[str]], Done]


class ServiceError(Exception):
    """It can't be done. str() says why and what would help."""


def run(command: Sequence[str]) -> Done:
    """Run a program of the system's and wait for it, for a while."""
    try:
        done = subprocess.run(  # noqa: S603 - launchctl, systemctl, journalctl, with words of our own
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_PATIENCE, check=False
        )
    except FileNotFoundError:
        return Done(127, "", f"there is no {command[0]} here")
    except subprocess.TimeoutExpired:
        return Done(124, "", f"{command[0]} did not end within {COMMAND_PATIENCE:g} s")
    return Done(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class System:
    """What `portway service` acts on. answers: the version of the Portway that answers at a URL, or None."""

    environ: Mapping[str, str]
    platform: str = sys.platform
    python: str = ""
    uid: int = field(default_factory=os.getuid)
    run: Run = run
    answers: Callable[[str], str | None] = lambda url: _version_at(url)  # noqa: PLW0108 - defined below
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep

    @property
    def is_mac(self) -> bool:
        """launchd's or systemd's."""
        return self.platform == "darwin"


def main(words: Sequence[str], system: System | None = None) -> int:
    """Do what `words`, those behind `portway service`, ask for. Returns the exit code."""
    system = system or System(os.environ)
    if "--help" in words or "-h" in words:
        print(HELP, end="")
        return OK
    try:
        action, options = _read(words)
        return _ACTIONS[action](system, options)
    except _Usage as exc:
        print(f"portway service: {exc}", file=sys.stderr)
        return USAGE
    except config.ConfigError as exc:
        print(exc, file=sys.stderr)
        return BAD_CONFIG
    except (ServiceError, BadUnit) as exc:
        print(f"portway service: {exc}", file=sys.stderr)
        return FAILED
    except OSError as exc:
        print(f"portway service: {exc.filename}: {exc.strerror}", file=sys.stderr)
        return FAILED


class _Usage(Exception):
    """The command line can't be understood."""


class _Options(NamedTuple):
    config: str | None = None
    only_print: bool = False


def _read(words: Sequence[str]) -> tuple[str, _Options]:
    actions, options = [], _Options()
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--config":
            path = value if equals else next(rest, "")
            if not path:
                raise _Usage("--config needs a value")
            options = options._replace(config=path)
        elif word == "--print":
            options = options._replace(only_print=True)
        elif word.startswith("-") or word not in _ACTIONS:
            raise _Usage(f"unknown {'option' if word.startswith('-') else 'action'} {word!r}; see its --help")
        else:
            actions.append(word)
    if len(actions) != 1:
        raise _Usage(f"say one of {', '.join(_ACTIONS)}")
    if actions[0] != "install" and options != _Options():
        raise _Usage(f"{actions[0]} takes no options")
    return actions[0], options


# --- install ---------------------------------------------------------------------------------


class _Paths(NamedTuple):
    """Every place that install writes to."""

    unit: str
    program: str
    log: str  # macOS only
    env_file: str  # never written, only named


def _install(system: System, options: _Options) -> int:
    paths = _paths(system)
    served, names = _configuration(options.config, system.environ)
    job = _job(system, paths, served, options.config)
    text = agent(job) if system.is_mac else unit(job)
    if options.only_print:
        print(text.decode(), end="")
        return OK
    _make_folder(os.path.dirname(paths.program), 0o700)
    pack.build(paths.program)
    print(f"{paths.program}: {os.path.getsize(paths.program) // 1024} KiB, Portway {_own_version()}")
    _make_folder(os.path.dirname(paths.unit), 0o755)
    _replace(paths.unit, text)
    print(paths.unit)
    _advise_keys(system, paths, names)
    if system.is_mac:
        _make_folder(os.path.dirname(paths.log), 0o755)
        _start_agent(system, paths.unit)
    else:
        _start_unit(system)
    return _await_answer(system, served)


def _paths(system: System) -> _Paths:
    home = _home(system.environ)
    settings = _folder(system.environ, "XDG_CONFIG_HOME", os.path.join(home, ".config"))
    data = _folder(system.environ, "XDG_DATA_HOME", os.path.join(home, ".local", "share"))
    mac_unit = os.path.join(home, "Library", "LaunchAgents", f"{LABEL}.plist")
    return _Paths(
        unit=mac_unit if system.is_mac else os.path.join(settings, "systemd", "user", UNIT),
        program=os.path.join(data, "portway", "portway.pyz"),
        log=os.path.join(home, "Library", "Logs", "portway.log"),
        env_file=os.path.join(settings, "portway", "env"),
    )


def _configuration(path: str | None, environ: Mapping[str, str]) -> tuple[config.Config, list[str]]:
    """What will be served, and the variables whose keys it needs. These need not be set here. Raises ConfigError."""
    names = _variables(config.find(path, environ))
    stand_ins = {name: environ.get(name) or "not-known-here" for name in names}
    return config.load(path, {**environ, **stand_ins}), names


def _variables(path: str) -> list[str]:
    """The NAMEs of "env:NAME" in a file; what is wrong with it is for config.load to say."""
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except (OSError, ValueError):
        return []
    found: list[str] = []
    _collect(document, found)
    return sorted(set(found))


def _collect(value: Any, found: list[str]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("api_key", "api_keys"):
                keys = [key.get("key") if isinstance(key, dict) else key for key in _listed(item)]
                found += [key[4:] for key in keys if isinstance(key, str) and re.fullmatch(r"env:[A-Za-z_]\w*", key)]
            else:
                _collect(item, found)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _job(system: System, paths: _Paths, served: config.Config, asked: str | None) -> Job:
    environ = system.environ
    chosen = asked or environ.get("PORTWAY_CONFIG")  # else `serve` finds it, also one that is written later
    return Job(
        python=system.python or _python(),
        program=paths.program,
        home=_home(environ),
        log=paths.log,
        config=os.path.abspath(served.path) if chosen else "",
        environment={name: environ[name] for name in FOLDERS if os.path.isabs(environ.get(name, ""))},
        env_file=paths.env_file if not system.is_mac else "",
        drain=served.server.drain,
    )


def _python() -> str:
    """This Python by the path that survives its updates: not what a link points to, and none in a virtual
    environment, which may be thrown away."""
    if sys.prefix == sys.base_prefix:
        return os.path.abspath(sys.executable)
    base = os.path.join(sys.base_exec_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    return base if os.access(base, os.X_OK) else os.path.abspath(sys.executable)


def _advise_keys(system: System, paths: _Paths, names: Sequence[str]) -> None:
    if not names:
        return
    wanted = ", ".join(names)
    if system.is_mac:
        print(f"models.toml takes {wanted} from the environment, which launchd doesn't have: write the keys themselves")
        print("into models.toml and chmod 600 it, or the service will refuse to start.")
        return
    missing = [name for name in names if name not in _names_in(paths.env_file)]
    if missing:
        print(
            f"models.toml takes {wanted} from the environment. Write a line NAME=key for each of {', '.join(missing)}"
        )
        print(f"into {paths.env_file}, chmod 600 it, and run this again.")
    elif os.stat(paths.env_file).st_mode & 0o077:
        print(f"{paths.env_file} holds keys, and others on this machine may read it: chmod 600 {paths.env_file}")


def _names_in(path: str) -> set[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return {line.partition("=")[0].strip() for line in file if "=" in line and not line.startswith("#")}
    except OSError:
        return set()


def _start_unit(system: System) -> None:
    for words in (("daemon-reload",), ("enable", UNIT), ("restart", UNIT)):
        done = system.run(["systemctl", "--user", *words])
        if done.code != 0:
            raise ServiceError(f"systemctl --user {' '.join(words)}: {done.said}{_way_out(done)}")


def _way_out(done: Done) -> str:
    if done.code == 127:
        return "; without systemd, have your own service manager run what `portway service install --print` shows"
    if _is_unreachable(done):
        return "; there is no user session here: log in as this user (not by su), or `loginctl enable-linger`"
    return ""


def _is_unreachable(done: Done) -> bool:
    """Whether there is no systemd of this user's to talk to."""
    return done.code == 127 or "failed to connect to bus" in done.said.lower()


def _start_agent(system: System, path: str) -> None:
    """Stop the one that may be loaded, and load this one. launchd lets go of it only when its process has ended:
    until then `bootstrap` fails with "5: Input/output error"."""
    _stop_agent(system)
    domain = f"gui/{system.uid}"
    system.run(["launchctl", "enable", f"{domain}/{LABEL}"])  # somebody may have disabled it
    done = system.run(["launchctl", "bootstrap", domain, path])
    if done.code != 0:
        raise ServiceError(
            f"launchctl bootstrap: {done.said}; an agent needs this user's graphical session: log in on the Mac itself"
        )


def _stop_agent(system: System) -> None:
    target = f"gui/{system.uid}/{LABEL}"
    if not _state(system).loaded:
        return
    done = system.run(["launchctl", "bootout", target])
    until = system.clock() + GONE_PATIENCE
    while _state(system).loaded:
        if system.clock() > until:
            raise ServiceError(f"launchctl bootout {target}: {done.said}; it is still there after {GONE_PATIENCE:g} s")
        system.pause(LOOK_AGAIN)


def _await_answer(system: System, served: config.Config) -> int:
    """Started is not yet up: the port may be taken."""
    url = _url(served)
    until = system.clock() + UP_PATIENCE
    while system.clock() < until:
        state = _state(system)
        if state.running and system.answers(url) is not None:
            print(f"running, pid {state.pid}, at {url}/v1")
            return OK
        if state.loaded and not state.running and state.last:
            break
        system.pause(LOOK_AGAIN)
    state = _state(system)
    how = f"it ended: {state.last}" if state.last else "it does not answer"
    raise ServiceError(f"{how}; `portway service logs` says why, `portway doctor` what else may be wrong")


# --- uninstall, status, logs -----------------------------------------------------------------


def _uninstall(system: System, _options: _Options) -> int:
    paths = _paths(system)
    if system.is_mac:
        _stop_agent(system)
    elif os.path.exists(paths.unit):
        done = system.run(["systemctl", "--user", "disable", "--now", UNIT])
        if done.code != 0 and not _is_unreachable(done):  # without systemd nothing runs that would have to be stopped
            raise ServiceError(f"systemctl --user disable --now {UNIT}: {done.said}")
    removed = [path for path in (paths.unit, paths.program) if _remove(path)]
    if removed and not system.is_mac:
        system.run(["systemctl", "--user", "daemon-reload"])
    for path in removed:
        print(f"removed {path}")
    print(
        "Configuration, log, cache and measures are where they were."
        if removed
        else "There is no service of Portway's here."
    )
    return OK


def _status(system: System, _options: _Options) -> int:
    paths = _paths(system)
    if not os.path.exists(paths.unit):
        print("not installed; `portway service install` does that")
        return NOT_RUNNING
    state = _state(system)
    served, _ = _configuration(_configured(paths.unit), system.environ)
    version = system.answers(_url(served)) if state.running else None
    print(_sentence(state, version, _url(served)))
    for problem in _broken(paths):
        print(f"warning: {problem}; `portway service install` mends it")
    return OK if state.running and version is not None else NOT_RUNNING


def _sentence(state: State, version: str | None, url: str) -> str:
    if not state.loaded:
        return "installed, but the service manager has not loaded it; `portway service install` does that"
    before = f"; before that it ended: {state.last}" if state.last else ""
    count = {0: "", 1: "once", 2: "twice"}.get(state.restarts or 0, f"{state.restarts} times")
    again = f"; started again {count}" if count else ""
    if not state.running:
        return f"not running{before.replace('before that ', '')}; `portway service logs` says more"
    if version is None:
        return f"running, pid {state.pid}, but {url} does not answer{again}{before}"
    older = (
        "" if version == _own_version() else f", while this is {_own_version()}: `portway service install` updates it"
    )
    return f"running, pid {state.pid}, Portway {version} at {url}/v1{older}{again}{before}"


def _logs(system: System, _options: _Options) -> int:
    if not system.is_mac:
        words = [
            "journalctl",
            "--user",
            "--unit",
            UNIT,
            "--lines",
            str(LOG_LINES),
            "--no-pager",
            "--output",
            "short-iso",
        ]
        done = system.run(words)
        if done.code != 0:
            raise ServiceError(f"journalctl: {done.said}")
        print(done.out, end="")
        return OK
    path = _paths(system).log
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 64 * 1024))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        raise ServiceError(f"{path} is not there: the service has not run yet") from None
    print(path, *lines[-LOG_LINES:], sep="\n")
    return OK


_ACTIONS: Mapping[str, Callable[[System, _Options], int]] = {
    "install": _install,
    "uninstall": _uninstall,
    "status": _status,
    "logs": _logs,
}


def _state(system: System) -> State:
    if system.is_mac:
        done = system.run(["launchctl", "print", f"gui/{system.uid}/{LABEL}"])
        return read_launchctl(done.code, done.out)
    done = system.run(["systemctl", "--user", "show", UNIT, f"--property={','.join(SHOWN)}"])
    if done.code != 0:
        raise ServiceError(f"systemctl --user show: {done.said}{_way_out(done)}")
    return read_systemctl(done.out)


def _configured(path: str) -> str | None:
    """The --config in a unit that is installed."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    in_agent = re.search(r"<string>--config</string>\s*<string>([^<]+)</string>", text)
    in_unit = re.search(r'^ExecStart=.* --config (?:"((?:[^"\\]|\\.)+)"|(\S+))$', text, re.MULTILINE)
    if in_agent:
        return _unescaped(in_agent[1])
    return unquoted(in_unit[1] or in_unit[2]) if in_unit else None


def _unescaped(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def _broken(paths: _Paths) -> list[str]:
    """What the unit names and is not there any more: Python was updated or removed, say."""
    with open(paths.unit, encoding="utf-8", errors="replace") as file:
        text = file.read()
    python = re.search(r'<string>(/[^<]+)</string>\s*<string>-I<|^ExecStart="?(/[^"\n]+?)"? -I ', text, re.MULTILINE)
    named = [paths.program, *([_unescaped(python[1] or python[2])] if python else [])]
    return [f"{path} is not there" for path in named if not os.path.exists(path)]


# --- the machine -----------------------------------------------------------------------------


def _home(environ: Mapping[str, str]) -> str:
    return environ.get("HOME") or os.path.expanduser("~")


def _folder(environ: Mapping[str, str], name: str, usual: str) -> str:
    given = environ.get(name, "")
    return given if os.path.isabs(given) else usual


def _url(served: config.Config) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(served.server.host, served.server.host)  # noqa: S104 - not bound
    return f"http://{f'[{host}]' if ':' in host else host}:{served.server.port}"


def _version_at(url: str) -> str | None:
    """What the Portway that answers there calls itself; None if none does."""
    from portway.commands.probe import ask

    try:
        version = ask(url, "/health", patience=2.0).value.get("version")
    except OSError:
        return None
    return version if isinstance(version, str) else None


def _own_version() -> str:
    from portway import __version__

    return __version__


def _make_folder(path: str, mode: int) -> None:
    os.makedirs(path, mode, exist_ok=True)


def _replace(path: str, data: bytes) -> None:
    fresh = f"{path}.{os.getpid()}"
    with open(fresh, "wb") as file:
        file.write(data)
    os.chmod(fresh, 0o644)
    os.replace(fresh, path)


def _remove(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
