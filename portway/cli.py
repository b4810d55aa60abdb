"""The command line: what can be typed, what it says of itself, and what exit code comes back.

Each command imports its own part of Portway when it runs, so that `check` starts no slower for
what `serve` needs. Nothing here knows HTTP or models.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from portway import __version__

if TYPE_CHECKING:
    from portway.config import Config

OK = 0
FAILED = 1
USAGE = 2
BAD_CONFIG = 78  # EX_CONFIG of sysexits.h
INTERRUPTED = 130  # what a shell makes of SIGINT

HELP = """\
usage: portway COMMAND [OPTION]...
       portway COMMAND --help

One OpenAI API for the language models on this machine: clients ask for a
logical name ("fast-9b"), Portway finds the model behind it, falls back when it
has to, and always says who answered.

Commands:
  serve      answer on http://127.0.0.1:11436/v1 until stopped
  check      validate the configuration and do nothing else
  doctor     will it run here? what is missing, and what to do about it
  init       write a models.toml for this machine's memory and models
  service    run it from login on, under launchd or systemd
  ps         what is in memory, and of which model how much
  load, unload  a model, into memory and out of it
  models     every model: its size, whether it is there, whether it fits
  stats      what the log says: requests, hits, demotions, times, dollars saved
  cache      show, purge or switch off the stored answers
  key        make, list and remove API keys, each for some models or rates
  demo       show what Portway does, with no model server installed
  ask-install  put the `ask` command into ~/.local/bin
  standin    run the stand-in for Ollama by itself

Options:
  --version  print the version
  --help     print this, or a command's own help

The configuration is the first of these that there is:
  --config FILE
  $PORTWAY_CONFIG
  ${XDG_CONFIG_HOME:-~/.config}/portway/models.toml
  the one that comes with Portway, in which every option is explained

Exit status:
  0    done
  1    failed, and stderr says why
  2    the command line can't be understood
  78   the configuration has mistakes, and stderr lists all of them
  130  interrupted

Examples:
  portway demo
  portway serve --port 8000
  curl http://127.0.0.1:11436/v1/chat/completions \\
    -H 'Content-Type: application/json' \\
    -d '{"model": "fast-9b", "messages": [{"role": "user", "content": "Hi"}]}'
"""

SERVE_HELP = """\
usage: portway serve [--config FILE] [--host HOST] [--port N]

Answers OpenAI clients until it is stopped. The backends need not run yet: what
is missing is said on stderr, and used as soon as it is there.

Options:
  --config FILE  read this configuration; `portway --help` says what is read
                 without it
  --host HOST    listen on this address instead of server.host; one that other
                 machines can reach needs server.api_keys
  --port N       listen on this port instead of server.port; 0 = a free one

Signals:
  SIGTERM, SIGINT  accept nothing more, give requests in flight server.drain
                   seconds to end, and exit; a second one ends them at once
  SIGHUP           read the configuration again, as after any change of the
                   file; one with mistakes is reported and not used
"""

CHECK_HELP = """\
usage: portway check [--config FILE]

Reads the configuration, prints which file it was and what is doubtful in it,
and exits: 0 if `portway serve` would take it, 78 if not. Then stderr has every
mistake on a line of its own: its key, what is wrong, what is allowed.

Options:
  --config FILE  read this configuration; `portway --help` says what is read
                 without it
"""

DOCTOR_HELP = """\
usage: portway doctor [--config FILE] [--json]

Looks at Python, the configuration, each backend and the models it has, this
machine's memory and what fits into it, the port, files and clocks. Each
finding is ok, a note, a warning or an error, and says what to do. It loads no
model and changes nothing.

Options:
  --config FILE  examine this configuration; `portway --help` says which one
                 without it
  --json         print one JSON document instead

Exit status: 0 nothing worse than a note, 3 warnings, 1 errors.
"""

INIT_HELP = """\
usage: portway init [--memory SIZE] [--force] [--output FILE]

Writes a models.toml that suits this machine: its memory, and the models that
its Ollama already has, else recommended ones, which are not fetched. It shows
the arithmetic. The file passes `portway check` and is short; what else can be
set stands in the one that comes with Portway.

Options:
  --memory SIZE  for a machine of so much memory, like 24GB, instead of this
                 one's
  --force        replace the file if there is one, which becomes FILE.old
  --output FILE  write it there instead of
                 ${XDG_CONFIG_HOME:-~/.config}/portway/models.toml
"""

DEMO_HELP = """\
usage: portway demo [--live] [--port N] [--once]

Takes a short tour with real requests and answers, against a stand-in for
Ollama that runs inside, then goes on serving until Ctrl-C.

Options:
  --live    take the tour on the Ollama that runs on this machine
  --port N  listen on this port; 0 = a free one
  --once    exit after the tour
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what `argv` (by default the process's own arguments) asks for. Returns the exit code."""
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except _UsageError as exc:
        print(f"portway: {exc}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough (`portway demo | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return FAILED
    return status


ASK_INSTALL_HELP = """\
usage: portway ask-install [--bin FOLDER]

Writes the command `ask` into FOLDER. It starts faster than the one that pip
makes, because it reads no site-packages. Run it again after Portway or Python
has moved. `ask --help` is its manual.

Options:
  --bin FOLDER  where to, instead of ~/.local/bin
"""


class _UsageError(Exception):
    """The command line can't be understood. str() says why, in one line."""


class _Command(NamedTuple):
    """A command; `options` maps each option to what reads its value, None for a flag."""

    run: Callable[[dict[str, Any]], int]
    options: Mapping[str, Callable[[str], object] | None]
    help: str


def _commands() -> dict[str, _Command]:
    return {
        "serve": _Command(_serve, {"--config": str, "--host": str, "--port": _port}, SERVE_HELP),
        "check": _Command(_check, {"--config": str}, CHECK_HELP),
        "doctor": _Command(_doctor, {"--config": str, "--json": None}, DOCTOR_HELP),
        "init": _Command(_init, {"--memory": str, "--force": None, "--output": str}, INIT_HELP),
        "demo": _Command(_demo, {"--live": None, "--port": _port, "--once": None}, DEMO_HELP),
        "ask-install": _Command(_ask_install, {"--bin": str}, ASK_INSTALL_HELP),
    }


def _dispatch(words: list[str]) -> int:
    if not words:
        print(HELP, end="", file=sys.stderr)
        return USAGE
    name, *rest = words
    if name in ("--help", "-h", "help"):
        return _show(HELP)
    if name == "--version":
        return _show(f"portway {__version__}\n")
    # these read their words themselves
    own_words = {"standin": _standin, "stats": _stats, "cache": _cache, "key": _key, "service": _service}
    if name in own_words:
        return own_words[name](rest)
    if name in _RESIDENCY:
        return _residency(name, rest)
    commands = _commands()
    if name not in commands:
        raise _UsageError(_unknown("command", name, [*commands, *own_words, *_RESIDENCY, "--help", "--version"]))
    command = commands[name]
    if "--help" in rest or "-h" in rest:
        return _show(command.help)
    return command.run(_read_options(name, rest, command.options))


_RESIDENCY = ("ps", "load", "unload", "models")


# --- The commands ----------------------------------------------------------------------------


def _serve(options: dict[str, Any]) -> int:
    # http.server brings http.client and shutil, and they and hashlib bring these if they can: 5 MB and 15 ms
    with _unused("ssl", "bz2", "lzma", *_openssl_of_hashlib()):
        from portway import config
        from portway.commands import serve

    try:
        loaded = config.load(options.get("--config"), os.environ)
    except config.ConfigError as exc:
        return _refuse(exc)
    listening = _listen_elsewhere(loaded, options.get("--host"), options.get("--port"))
    return serve.serve(listening, config_path=options.get("--config"), environ=os.environ)


@contextmanager
def _unused(*names: str) -> Iterator[None]:
    """Modules that nobody finds meanwhile, unless they are there already; who needs one imports it later."""
    missing = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]  # None: `import` raises ImportError
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _openssl_of_hashlib() -> tuple[str, ...]:
    """hashlib's way to OpenSSL, unless Python was built without hashes of its own (--with-builtin-hashlib-hashes)."""
    sha2 = ("_sha2",) if sys.version_info >= (3, 12) else ("_sha256", "_sha512")
    try:
        for name in ("_blake2", "_md5", "_sha1", "_sha3", *sha2):  # without one of them it would complain
            __import__(name)
    except ImportError:
        return ()
    return ("_hashlib",)


def _check(options: dict[str, Any]) -> int:
    from portway import config

    try:
        loaded = config.load(options.get("--config"), os.environ)
    except config.ConfigError as exc:
        return _refuse(exc)
    for line in config.describe(loaded):
        print(line)
    return OK


def _doctor(options: dict[str, Any]) -> int:
    from portway.commands import doctor

    return doctor.main(options.get("--config"), "--json" in options)


def _init(options: dict[str, Any]) -> int:
    from portway.commands import first_config

    return first_config.main(options.get("--memory"), "--force" in options, options.get("--output"))


def _service(words: list[str]) -> int:
    from portway.commands import service

    return service.main(words)


def _demo(options: dict[str, Any]) -> int:
    from portway.commands import demo

    return demo.main(live="--live" in options, port=options.get("--port"), once="--once" in options)


def _ask_install(options: dict[str, Any]) -> int:
    from portway.ask import install as ask_install

    try:
        path = ask_install.install(options.get("--bin", "~/.local/bin"), os.environ)
    except (ask_install.CannotInstall, OSError) as exc:
        print(f"portway ask-install: {exc}", file=sys.stderr)
        return FAILED
    print(path)
    if not ask_install.is_on_path(path, os.environ):
        print(f"{os.path.dirname(path)} is not on PATH, or another `ask` comes first.", file=sys.stderr)
    return OK


def _standin(words: list[str]) -> int:
    from portway.standin import server as standin

    return standin.main(words)


def _stats(words: list[str]) -> int:
    from portway import config
    from portway.commands import probe, stats

    if _asks_for_help(words):
        return stats.main(words)
    path, words = _take_config(words)
    try:
        loaded = config.load(path, os.environ)
    except config.ConfigError as exc:
        return _refuse(exc)
    return stats.main(words, os.environ, log=loaded.log.file, health=lambda: probe.health(loaded, os.environ))


def _residency(name: str, words: list[str]) -> int:
    from portway import config
    from portway.commands import residency as residency_cli

    if _asks_for_help(words):
        return _show(residency_cli.HELP[name])
    path, words = _take_config(words)
    try:
        loaded = config.load(path, os.environ)
    except config.ConfigError as exc:
        return _refuse(exc)
    return residency_cli.main(name, words, loaded)


def _cache(words: list[str]) -> int:
    from portway import config
    from portway.cache import file as cache_file
    from portway.commands import cache as cache_cli

    if _asks_for_help(words):
        return _show(cache_cli.HELP)
    path, words = _take_config(words)
    try:
        file = config.load(path, os.environ).cache.file
    except config.ConfigError as exc:
        return _refuse(exc)
    return cache_cli.main(words, file or cache_file.default_path(os.environ))


def _key(words: list[str]) -> int:
    from portway.commands import keys

    return keys.main(words, os.environ)


def _show(text: str) -> int:
    print(text, end="")
    return OK


def _refuse(exc: Exception) -> int:
    print(exc, file=sys.stderr)
    return BAD_CONFIG


def _listen_elsewhere(config: Config, host: str | None, port: int | None) -> Config:
    """`config` with the address of the command line, under the rule that the file is under."""
    from dataclasses import replace

    from portway.config import is_loopback

    if host is not None and not config.server.api_keys and not is_loopback(host.lower()):
        raise _UsageError(f"--host {host}: other machines can reach it, and server.api_keys is empty")
    server = config.server
    server = replace(server, host=server.host if host is None else host, port=server.port if port is None else port)
    return replace(config, server=server)


# --- The options -----------------------------------------------------------------------------


def _read_options(
    command: str, words: Iterable[str], known: Mapping[str, Callable[[str], object] | None]
) -> dict[str, Any]:
    """What `words` say, by option; those that are not given are missing."""
    options: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in known:
            raise _UsageError(_unknown("option" if name.startswith("-") else "argument", name, known, command))
        read = known[name]
        if read is None:
            if equals:
                raise _UsageError(f"{name} takes no value")
            options[name] = True
            continue
        given = value if equals else next(rest, "")
        if not given:
            raise _UsageError(f"{name} needs a value")
        options[name] = read(given)
    return options


def _asks_for_help(words: Sequence[str]) -> bool:
    """Then no configuration is read: it may be what help is needed with."""
    return "--help" in words or "-h" in words


def _take_config(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --config, wherever it stands, and the words without it."""
    path, left = None, []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != "--config":
            left.append(word)
            continue
        path = value if equals else next(rest, "")
        if not path:
            raise _UsageError("--config needs a value")
    return path, left


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise _UsageError(f"--port {text}: not a port, which is a whole number from 0 to 65535")
    return int(text)


def _unknown(kind: str, word: str, known: Iterable[str], command: str = "") -> str:
    import difflib  # only on the way to an error

    near = difflib.get_close_matches(word, list(known), 1)
    hint = f"did you mean {near[0]}?" if near else f"see `{' '.join(filter(None, ['portway', command, '--help']))}`"
    return f"unknown {kind} {word!r}; {hint}"
