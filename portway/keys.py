"""API keys: what one may do, how they stand in a configuration, and the file in which `portway key` keeps them.

A key is compared, and may be stored, as its SHA-256. That suffices for keys that nobody can guess, such as
`portway key new` makes; no message ever holds one. How much a key has used is quotas.py's.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from portway import fields
from portway.errors import ClientError

FILE = "keys.toml"  # beside models.toml; for its owner's eyes only
PREFIX = "sk-portway-"  # some clients want an OpenAI key's beginning; and who finds one knows what it opens
HASH = "sha256:"
ALLOWED = '"sk-..", "env:NAME" or "sha256:.." (a key\'s hash)'
MOST_A_MINUTE = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Key:
    """One of server.api_keys. models: logical names it may ask for, () = all. rpm, tpm: requests and tokens a
    minute, None = any number. secret: the key itself, where the configuration holds it; "" = it holds a hash."""

    digest: bytes
    name: str = ""
    models: tuple[str, ...] = ()
    rpm: int | None = None
    tpm: int | None = None
    secret: str = field(default="", repr=False)

    def knows(self, name: str) -> bool:
        """Whether it may ask for the model of that logical name."""
        return not self.models or name in self.models

    def check_model(self, name: str) -> None:
        """Raises ClientError 403 for a model that it may not ask for. name: the logical one."""
        if not self.knows(name):
            raise ClientError(
                f"This key may not ask for {name}. It may ask for: {', '.join(self.models)}.",
                status=403,
                code="model_not_allowed",
                param="model",
            )

    def check_everything(self) -> None:
        """Raises ClientError 403 if it is a key for some models alone: what concerns all of them is not for it."""
        if self.models:
            raise ClientError(
                "This key is for asking models. What concerns the whole server needs one without `models`.",
                status=403,
                code="key_not_allowed",
            )


def digest_of(key: str | bytes) -> bytes:
    """What a key is compared by."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key).digest()


def new() -> str:
    """A key that nobody can guess: 256 bits."""
    import secrets  # imports much, and one command needs it

    return PREFIX + secrets.token_urlsafe(32)


def plain(keys: Sequence[Key], environ: Mapping[str, str]) -> str:
    """A key for commands on this machine: $PORTWAY_API_KEY, else a configured one that may do everything, if the
    configuration holds it itself; "" = none is known."""
    return environ.get("PORTWAY_API_KEY") or next((key.secret for key in keys if key.secret and not key.models), "")


# --- in a configuration ---------------------------------------------------------------------------


def kind(environ: Mapping[str, str]) -> fields.Kind:
    """How an entry of server.api_keys is read: a key, or a table that says more."""
    key = _read_key(environ)
    table: dict[str, fields.Kind] = {
        "key": key,
        "name": key_name,
        "models": fields.ListOf(fields.text, "a list of models' names"),
        "rpm": fields.whole(1, MOST_A_MINUTE),
        "tpm": fields.whole(1, MOST_A_MINUTE),
    }
    return fields.Either(key, fields.Table(table, {"key": ALLOWED}))


def file_table(environ: Mapping[str, str]) -> fields.Table:
    """What may stand in keys.toml."""
    return fields.Table({"keys": fields.ListOf(kind(environ), "[[keys]]")})


def _read_key(environ: Mapping[str, str]) -> fields.Leaf:
    secret = fields.secret(environ)

    def read(value: object) -> str:
        found: str = secret(value)
        if found.startswith(HASH) and not re.fullmatch("[0-9a-f]{64}", found.removeprefix(HASH)):
            raise fields.Refused(
                "a hash that is none (not shown)", f"{HASH} and 64 hexadecimal digits, in small letters"
            )
        return found

    return read


def key_name(value: object) -> str:
    """What the log and messages call a key."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", value):
        return value
    raise fields.Refused(f"{fields.shown(value)} is no name", "a letter or digit, then letters, digits and . _ @ -")


def check(reader: fields.Reader, entries: Sequence[tuple[str, Any]], names: Mapping[str, str]) -> None:
    """Refuse what several keys, or a key and the models, do not agree on. entries: each with where it stands, as
    far as it could be read. names: every name and alias of a model -> its logical name."""
    digests: dict[bytes, str] = {}
    called: dict[str, str] = {}
    for where, entry in entries:
        if entry is fields.BAD:
            continue
        given = entry if isinstance(entry, dict) else {"key": entry}
        if "key" in given:
            _once(reader, where, digests, _digest(given["key"]), "this key", "each key once")
        if "name" in given:
            _once(reader, f"{where}.name", called, given["name"], given["name"], "a name of its own")
        if given.get("models") == () and not any(mistake.key == f"{where}.models" for mistake in reader.mistakes):
            reader.refuse(f"{where}.models", "empty: it could ask for nothing", "models' names, or no `models` for all")
        for index, name in enumerate(given.get("models", ())):
            if name is not fields.BAD and name not in names:
                near = fields.first_near(name, names)
                reader.refuse(
                    f"{where}.models[{index}]", f"{fields.shown(name)} is no model", fields.one_of(*names), near
                )


def _once(reader: fields.Reader, where: str, seen: dict[Any, str], value: Any, what: str, allowed: str) -> None:
    if value in seen:
        reader.refuse(where, f"{what} stands in {seen[value]} already", allowed)
    else:
        seen[value] = where


def built(entries: Sequence[Any], names: Mapping[str, str]) -> tuple[Key, ...]:
    """The keys of entries that `check` found nothing wrong with."""
    return tuple(_built(entry if isinstance(entry, dict) else {"key": entry}, names) for entry in entries)


def _built(given: Mapping[str, Any], names: Mapping[str, str]) -> Key:
    secret = "" if given["key"].startswith(HASH) else given["key"]
    models = tuple(dict.fromkeys(names[name] for name in given.get("models", ())))
    rest = {name: given[name] for name in ("name", "rpm", "tpm") if name in given}
    return Key(_digest(given["key"]), models=models, secret=secret, **rest)


def _digest(key: str) -> bytes:
    return bytes.fromhex(key.removeprefix(HASH)) if key.startswith(HASH) else digest_of(key)


def inside(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each key that the text of [server] itself holds, be it only the name of a variable, and where."""
    for index, entry in enumerate(document.get("api_keys", ())):
        key = entry.get("key") if isinstance(entry, dict) else entry
        if isinstance(key, str) and not key.startswith(HASH):
            yield f"server.api_keys[{index}]", key


# --- the file of `portway key` --------------------------------------------------------------------

HEADER = (
    "# Portway's keys, as hashes. `portway key new`, `list` and `remove` write this file; comments in it are lost.\n"
)


def read_file(path: str) -> bytes | None:
    """keys.toml's text, None if there is none. Raises OSError, and PermissionError if others may read or change it."""
    try:
        with open(path, "rb") as file:
            if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise PermissionError(0, f"others on this machine may read or change it: chmod 600 {path}")
            return file.read()
    except FileNotFoundError:
        return None


def text_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """keys.toml's text. entries: as TOML has them."""
    return HEADER + "".join(_text(entry) for entry in entries)


def _text(entry: Mapping[str, Any]) -> str:
    lines = ["", "[[keys]]"]
    for name, value in entry.items():
        listed = f"[{', '.join(map(_quoted, value))}]" if isinstance(value, list) else ""
        lines.append(f"{name} = {listed or (_quoted(value) if isinstance(value, str) else value)}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
