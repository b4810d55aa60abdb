"""`portway key`: makes API keys, lists them, takes them back. Only their hashes are kept, in keys.toml.

A running daemon notices within seconds. What a key may do is keys.py's and quotas.py's.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from portway import config, keys
from portway.stderr import printable

OK = 0
FAILED = 1
USAGE = 2
BAD_CONFIG = 78

HELP = """\
usage: portway key new [--name NAME] [--models A,B] [--rpm N] [--tpm N] [--config FILE]
       portway key list [--config FILE]
       portway key remove NAME [--config FILE]

  new     make a key and print it, this once: only its hash is kept, in
          keys.toml beside the configuration (mode 0600). From the first key
          on, every request needs one
  list    each key's name and what it may do, those in models.toml too
  remove  take a key back; with the last one requests need none again, if
          only this machine can send them. Keys in models.toml are removed there

Options of new:
  --name NAME    what the log, `list` and `remove` call it; else a part of its
                 hash
  --models A,B   it may ask for these models alone, and for nothing that
                 concerns the server as a whole
  --rpm N        requests a minute
  --tpm N        tokens a minute, as the answers count them
  --config FILE  the configuration that it goes with; `portway --help` says
                 which one without it

The key goes to stdout and all else to stderr: KEY=$(portway key new --name laptop)
"""


class _UsageError(Exception):
    """The command line can't be understood. str() says why, in one line."""


class _Failure(Exception):
    """It can't be done. str() says why, in one line."""


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run `portway key WORDS...`. Returns the exit code."""
    if not words or "--help" in words or "-h" in words:
        print(HELP, end="", file=sys.stdout if words else sys.stderr)
        return OK if words else USAGE
    try:
        options = _read(list(words))
        file = _File(options.config, environ)
        _DO[options.what](options, file)
    except _UsageError as exc:
        print(f"portway key: {printable(str(exc))}; see `portway key --help`", file=sys.stderr)
        return USAGE
    except config.ConfigError as exc:
        print(exc, file=sys.stderr)
        return BAD_CONFIG
    except _Failure as exc:
        print(f"portway key: {printable(str(exc))}", file=sys.stderr)
        return FAILED
    except OSError as exc:
        print(f"portway key: {printable(exc.strerror or str(exc))}", file=sys.stderr)
        return FAILED
    return OK


# --- the commands ---------------------------------------------------------------------------------


def _new(options: _Options, file: _File) -> None:
    key = keys.new()
    digest = keys.digest_of(key).hex()
    entry = {"name": options.name or f"key-{digest[:8]}", "key": keys.HASH + digest, **options.limits}
    written = file.write([*file.entries, entry])
    print(key)
    print(f"{entry['name']}: its hash is in {file.path}; the key is not shown again.", file=sys.stderr)
    if len(written.server.api_keys) == 1:
        print("It is the first one: from now on every request needs a key.", file=sys.stderr)


def _list(_: _Options, file: _File) -> None:
    for key in file.loaded().server.api_keys:
        print(f"{key.name or '(no name)':24} {', '.join(key.models) or 'all models'}{_minute(key)}")


def _minute(key: keys.Key) -> str:
    limits = ((key.rpm, "requests"), (key.tpm, "tokens"))
    return "".join(f"; {limit} {what} a minute" for limit, what in limits if limit is not None)


def _remove(options: _Options, file: _File) -> None:
    left = [entry for entry in file.entries if entry.get("name") != options.name]
    if len(left) == len(file.entries):
        elsewhere = any(key.name == options.name for key in file.loaded().server.api_keys)
        where = "models.toml; remove it there" if elsewhere else "no key of that name; see `portway key list`"
        raise _Failure(f"{options.name}: {where}")
    file.write(left)
    print(f"{options.name} is removed.", file=sys.stderr)


# --- the file -------------------------------------------------------------------------------------


class _File:
    """keys.toml, as it goes with a configuration. entries: as TOML has them. Raises ConfigError, OSError."""

    def __init__(self, path: str | None, environ: Mapping[str, str]) -> None:
        self._config = path
        self._environ = environ
        self.path = os.path.realpath(config.keys_path(config.find(path, environ), environ))
        self.entries = _entries(self.path)

    def loaded(self) -> config.Config:
        """The configuration with the keys as they are."""
        return config.load(self._config, self._environ)

    def write(self, entries: Sequence[Mapping[str, Any]]) -> config.Config:
        """Put these in the place of what is there, once the configuration is seen to be right with them; it."""
        text = keys.text_of(entries)
        loaded = config.load_with(self._config, self._environ, text)
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        new = f"{self.path}.new"
        try:
            file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise _Failure(f"{new} is there: another `portway key` writes, or was ended; remove it then") from None
        try:
            with open(file, "w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(file)
            os.replace(new, self.path)
        except BaseException:
            os.unlink(new)
            raise
        return loaded


def _entries(path: str) -> list[dict[str, Any]]:
    text = keys.read_file(path)
    try:
        entries = tomllib.loads((text or b"").decode()).get("keys", [])
    except ValueError as exc:
        raise _Failure(f"{path} can't be read: {exc}") from exc
    if not isinstance(entries, list):
        raise _Failure(f"{path} can't be read: `keys` is no list")
    return [entry if isinstance(entry, dict) else {"key": entry} for entry in entries]


# --- the command line -----------------------------------------------------------------------------


@dataclass
class _Options:
    what: str
    name: str
    limits: dict[str, Any]
    config: str | None


def _read(words: list[str]) -> _Options:
    what, rest = words[0], iter(words[1:])
    if what not in _DO:
        raise _UsageError(f"unknown word {what!r}")
    given: dict[str, str] = {}
    for word in rest:
        option, equals, value = word.partition("=")
        if what == "remove" and not word.startswith("-") and "--name" not in given:
            given["--name"] = word
        elif option in (_OF_NEW if what == "new" else ("--config",)):
            given[option] = value if equals else next(rest, "")
            if not given[option]:
                raise _UsageError(f"{option} needs a value")
        else:
            raise _UsageError(f"unknown option {word!r}")
    if what == "remove" and "--name" not in given:
        raise _UsageError("whose? name one key")
    limits: dict[str, Any] = {}
    if "--models" in given:
        limits["models"] = [name.strip() for name in given["--models"].split(",")]
    for name in ("rpm", "tpm"):
        if f"--{name}" in given:
            limits[name] = _number(f"--{name}", given[f"--{name}"])
    return _Options(what, given.get("--name", ""), limits, given.get("--config"))


def _number(option: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= keys.MOST_A_MINUTE):
        raise _UsageError(f"{option} {text}: not a whole number from 1 to {keys.MOST_A_MINUTE}")
    return int(text)


_OF_NEW = ("--name", "--models", "--rpm", "--tpm", "--config")
_DO = {"new": _new, "list": _list, "remove": _remove}
