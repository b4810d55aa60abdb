"""How the values of a TOML file are read: each into its final form, or into a mistake.

A `Leaf` is a function that reads one value or raises `Refused`; `ListOf`, `Table` and `Named` put
leaves together; `Reader` walks them and keeps every `Mistake`, so that all are told at once. What
the sections are called and what they mean is config.py's. No message holds a key or a password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong. `key` is dotted ("models.fast-9b.num_ctx"), "" = the file as a whole.

    str() gives one line of printable text, whatever the file holds.
    """

    key: str
    problem: str
    allowed: str = ""
    near: str = ""

    def __str__(self) -> str:
        text = f"{self.key}: {self.problem}" if self.key else self.problem
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        if self.near:
            text += f"; did you mean {self.near}?"
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# --- Kinds of values -------------------------------------------------------------------------

# Reads one value: returns its final form, or raises Refused.
Leaf = Callable[[object], Any]


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list, read as a tuple; `allowed` is said of what is no list."""

    item: Kind
    allowed: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table with known keys, read as a dict. `required`: key -> what is allowed there."""

    fields: Mapping[str, Kind]
    required: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Named:
    """A table whose keys the user chooses, read as a dict; `name` reads a key, `item` each value."""

    name: Leaf
    item: Kind


@dataclass(frozen=True, slots=True)
class Either:
    """A single value, or a table in its place that says more."""

    leaf: Leaf
    table: Table


@dataclass(frozen=True, slots=True)
class Tagged:
    """A table of which one key, `tag`, says what else may stand in it; `tables[""]` is for one without that key."""

    tag: str
    tables: Mapping[str, Table]


Kind = Leaf | ListOf | Table | Named | Either | Tagged


# --- Reading it ------------------------------------------------------------------------------

BAD: Any = object()  # stands for a value that was refused


class Refused(Exception):
    """A value can't be used. `Reader` adds the key and makes it a Mistake."""

    def __init__(self, problem: str, allowed: str = "", near: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.allowed = allowed
        self.near = near


class Reader:
    """Reads values by their kinds and keeps every mistake; what was refused is left out or BAD."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []

    def refuse(self, key: str, problem: str, allowed: str = "", near: str = "") -> None:
        """Keep a mistake."""
        self.mistakes.append(Mistake(key, problem, allowed, near))

    def value(self, kind: Kind, value: object, key: str) -> Any:
        """`value` read as `kind`, or what is left of it."""
        match kind:
            case ListOf():
                return self.items(kind, value, key)
            case Table():
                return self.table(kind, value, key)
            case Named():
                return self.named(kind, value, key)
            case Tagged():
                return self.tagged(kind, value, key)
            case Either():
                return self.value(kind.table if isinstance(value, dict) else kind.leaf, value, key)
        try:
            return kind(value)
        except Refused as refused:
            self.refuse(key, refused.problem, refused.allowed, refused.near)
            return BAD

    def items(self, kind: ListOf, value: object, key: str) -> tuple[Any, ...]:
        """The list at `key`; an item that was refused stands in it as BAD, so that the others keep their index."""
        if not isinstance(value, list):
            self.refuse(key, f"{_type(value)}, and no list", kind.allowed)  # not shown: it may be a key
            return ()
        return tuple(self.value(kind.item, item, f"{key}[{index}]") for index, item in enumerate(value))

    def table(self, kind: Table, value: object, key: str) -> dict[str, Any]:
        """What could be read of the table at `key`; what was refused is left out."""
        given = self._given(value, key)
        for name, allowed in kind.required.items():
            if isinstance(value, dict) and name not in value:
                self.refuse(dotted(key, name), "missing", allowed)
        read = {}
        for name, item in given.items():
            if name in kind.fields:
                read[name] = self.value(kind.fields[name], item, dotted(key, name))
            else:
                self.refuse(dotted(key, name), "unknown key", one_of(*kind.fields), first_near(name, kind.fields))
        return {name: item for name, item in read.items() if item is not BAD}

    def named(self, kind: Named, value: object, key: str) -> dict[str, Any]:
        """Every entry of the table at `key`, BAD where it was refused as a whole."""
        given = self._given(value, key)
        for name in given:
            self.value(kind.name, name, dotted(key, name))
        return {name: self.value(kind.item, item, dotted(key, name)) for name, item in given.items()}

    def tagged(self, kind: Tagged, value: object, key: str) -> dict[str, Any]:
        """The table at `key`, by the kind that it says it is of."""
        if not isinstance(value, dict) or kind.tag not in value:
            return self.table(kind.tables[""], value, key)
        tag = value[kind.tag]
        options = [option for option in kind.tables if option]
        if tag in options:
            return self.table(kind.tables[tag], value, key)
        near = first_near(tag, options) if isinstance(tag, str) else ""
        self.refuse(dotted(key, kind.tag), _unfit(tag, str), f"{one_of(*options)}, or none", near)
        return {}

    def _given(self, value: object, key: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self.refuse(key, f"{_type(value)}, and no table", "a table")
        return {}


# --- Reading single values -------------------------------------------------------------------


def whole(low: int, high: int) -> Leaf:
    """An int from `low` to `high`."""

    def read(value: object) -> int:
        if type(value) is int and low <= value <= high:  # type(): a boolean is an int, and no number here
            return value
        raise Refused(_unfit(value, int), f"a whole number, {low} to {high}")

    return read


def seconds(low: float, high: float) -> Leaf:
    """A length of time, read as a float of seconds from `low` to `high`."""

    def read(value: object) -> float:
        found = _duration(value)
        if found is not None and low <= found <= high:
            return found
        raise Refused(_unfit(value, int, float, str), f'seconds or "1m30s", {low:g} to {high:g} s')

    return read


def keep_alive(value: object) -> float:
    """How long a model stays loaded: seconds, 0 = unload after, -1.0 = for ever (anything negative)."""
    found = _duration(value)
    if found is not None and found <= _FAR:
        return found if found >= 0 else -1.0
    allowed = '"30s", "1h30m", seconds (up to 10 years), 0 (unload after) or -1 (for ever)'
    raise Refused(_unfit(value, int, float, str), allowed)


_FAR = 10 * 365 * 86_400  # seconds; longer is a slip, and Go's durations end at 292 years
_UNITS = MappingProxyType({"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0})
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")


def _duration(value: object) -> float | None:
    """Seconds from a number, "90", "-1" or Go's form "1h30m", to which days are added; None = none of these."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if -_FAR <= value <= _FAR else None  # compared first: float() can overflow
    if not isinstance(value, str):
        return None
    sign, text = (-1, value[1:]) if value.startswith("-") else (1, value)
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", text):
        return sign * float(text)
    if text and not _SPAN.sub("", text):
        return sign * sum(float(count) * _UNITS[unit] for count, unit in _SPAN.findall(text))
    return None


def lifetime(value: object) -> float:
    """How long answers are kept: seconds, 0.0 = "off"."""
    found = 0.0 if value == "off" else _duration(value)
    if found is not None and 0 <= found <= _FAR and (found or value == "off"):
        return found
    raise Refused(_unfit(value, int, float, str), '"off", or how long, like "30d" or "12h"')


def dollars(value: object) -> float:
    """A price."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1_000_000:
        return float(value)
    raise Refused(_unfit(value, int, float), "dollars, 0 or more")


def probability(value: object) -> float:
    """A share between nothing and all."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
        return float(value)
    raise Refused(_unfit(value, int, float), "a number between 0 and 1")


def tier(value: object) -> str:
    """A flag of `ask`, without its hyphens."""
    if isinstance(value, str) and re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", value) and value not in _ASK_OPTIONS:
        return value
    raise Refused(_unfit(value, str), "small letters, digits and hyphens, and none of ask's own options")


# what `ask` already understands behind two hyphens (a test compares), and "flag:default"
_ASK_OPTIONS = frozenset(
    "completion default extract file help json last model no-cache no-input refresh schema show-thinking strict system"
    " temperature tiers verbose version".split()
)


def path(value: object) -> str:
    """A file's path, ~ expanded; relative to where the daemon is started. "" = the usual one."""
    return "" if value == "" else os.path.expanduser(text(value))


def size(low: int, high: int) -> Leaf:
    """A number of bytes from `low` to `high`; K, M and G are powers of 1024."""
    factors = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}

    def read(value: object) -> int:
        found = value if type(value) is int else None
        if isinstance(value, str) and (parts := re.fullmatch(r"([0-9]{1,12}) ?(?:([KMG])(?:I?B)?|B)?", value.upper())):
            found = int(parts[1]) * factors[parts[2] or ""]
        if found is not None and low <= found <= high:
            return found
        raise Refused(_unfit(value, int, str), f'bytes, or "512KB", "32MB", "1GB"; {low} to {high} bytes')

    return read


def budget(value: object) -> int | None:
    """Bytes, from 64 MB on, or None for "auto"."""
    if value == "auto":
        return None
    try:
        return int(size(64 * 1024**2, 1024**5)(value))
    except Refused as refused:
        raise Refused(refused.problem, '"auto", or how much, like "10GB"; 64 MB or more') from None


def choice(*options: object) -> Leaf:
    """One of `options`, and of its type: 1 is not true."""

    def read(value: object) -> object:
        for option in options:
            if type(value) is type(option) and value == option:
                return option
        near = first_near(value, map(_word, options)) if isinstance(value, str) else ""
        raise Refused(_unfit(value, *map(type, options)), one_of(*options), near)

    return read


def flag(value: object) -> bool:
    """true or false."""
    if isinstance(value, bool):
        return value
    raise Refused(_unfit(value), "true or false")


def text(value: object) -> str:
    """Text that can be shown on one line; not empty."""
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    raise Refused(_unfit(value, str), "text without control characters, not empty")


_PROSE = 20_000  # characters; a longer prompt is some file's name mistaken


def prose(value: object) -> str:
    """Text of any number of lines; may be empty."""
    if isinstance(value, str) and len(value) <= _PROSE and all(char.isprintable() or char in "\n\t" for char in value):
        return value
    allowed = f"text of up to {_PROSE} characters, without control characters"
    raise Refused(_unfit(value, str), allowed)


_NAME_LENGTH = 128


def name(value: object) -> str:
    """A logical name: it goes into headers and URLs as it stands."""
    well_formed = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]*", value)
    if well_formed and len(str(value)) <= _NAME_LENGTH and not str(value).startswith("flag:"):
        return str(value)
    allowed = f"a letter or digit, then letters, digits and . _ : / -, up to {_NAME_LENGTH} characters, not flag:.."
    raise Refused(_unfit(value, str), allowed)


def host(value: object) -> str:
    """What to listen on, lower-case."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._:%-]{1,255}", value):
        return value.lower()
    near = value[1:-1] if isinstance(value, str) and re.fullmatch(r"\[[0-9A-Fa-f:.]+\]", value) else ""
    raise Refused(_unfit(value, str), "a host name or an IP address, without brackets and port", near)


def host_name(value: object) -> str:
    """A name that a client may send as Host, lower-case."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:]+", value):
        return value.lower()
    raise Refused(_unfit(value, str), "a host name, without scheme, port and wildcards")


def origin(value: object) -> str:
    """What a browser sends as Origin, lower-case."""
    pattern = r"[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+"
    if isinstance(value, str) and re.fullmatch(pattern, value.lower()):
        return value.lower()
    near = value[:-1] if isinstance(value, str) and re.fullmatch(pattern, value[:-1].lower()) else ""
    allowed = 'what a browser sends, like "http://localhost:3000", without a path; no "*"'
    raise Refused(_unfit(value, str), allowed, near)


def secret(environ: Mapping[str, str]) -> Leaf:
    """A key or "env:NAME" -> the key. No message ever holds the key."""
    allowed = 'a key of printable ASCII without spaces, or "env:NAME"'

    def read(value: object) -> str:
        if not isinstance(value, str) or not value:
            raise Refused("empty" if isinstance(value, str) else _type(value), allowed)
        secret, whose = value, "the key"
        if value.startswith("env:"):
            secret, whose = _from_environment(value[4:], environ), value[4:]
        if re.fullmatch(r"[!-~]+", secret):
            return secret
        raise Refused(f"{whose} holds a character that can't stand in a header (not shown)", allowed)

    return read


def _from_environment(name: str, environ: Mapping[str, str]) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise Refused("no name of an environment variable after env:", '"env:NAME"')
    if not environ.get(name):
        how = "empty" if name in environ else "not set"
        raise Refused(f"the environment variable {name} is {how}", "one that is set where the daemon starts")
    return environ[name]


class Url(NamedTuple):
    """A backend's address, lower-case where case means nothing; `path` as given, an IPv6 `host` without brackets."""

    text: str
    scheme: Literal["http", "https"]
    host: str
    port: int
    path: str


URL_ALLOWED = "http://HOST[:PORT][/PATH] or https://.., without user, query and fragment"
# by hand: urllib.parse would be the slowest import of all, for one pattern
_URL_FORM = re.compile(
    r"""(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?(/[!"$->@-~]*)?""", re.IGNORECASE | re.ASCII
)


def url(value: object) -> Url:
    """An http or https address that holds no secret."""
    found = _URL_FORM.fullmatch(value) if isinstance(value, str) else None
    if not isinstance(value, str) or found is None:
        raise _bad_url(value)
    scheme: Literal["http", "https"] = "https" if found[1].lower() == "https" else "http"
    port = int(found[3] or {"http": 80, "https": 443}[scheme])
    if not 1 <= port <= 65_535:
        raise Refused(f"{shown(value)}: no such port", "a port from 1 to 65535")
    return Url(value, scheme, found[2].strip("[]").lower(), port, found[4] or "")


def _bad_url(value: object) -> Refused:
    if isinstance(value, str) and ("@" in value or "?" in value):
        return Refused("holds a user, a password or a query (not shown)", URL_ALLOWED)
    near = f"http://{value}" if isinstance(value, str) and _URL_FORM.fullmatch(f"http://{value}") else ""
    return Refused(_unfit(value, str), URL_ALLOWED, near)


def json_value(value: object) -> Any:
    """What can go into a JSON body, as it is: TOML has dates, inf and nan, JSON has none."""
    if isinstance(value, dict):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_value(item) for item in value]
    if isinstance(value, str | bool) or (isinstance(value, int | float) and abs(value) <= 1e300):
        return value
    raise Refused(f"{shown(value)} can't stand in JSON", "text, numbers, booleans, lists and tables")


# --- Words -----------------------------------------------------------------------------------

_TYPES: Mapping[type, str] = MappingProxyType(
    {bool: "a boolean", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a table"}
)


def _unfit(value: object, *types: type) -> str:
    """Why a value can't be used where `types` can: "'16k' is text", "0 is out of range"."""
    if isinstance(value, list | dict):
        return _type(value)
    if type(value) not in types:
        return f"{shown(value)} is {_type(value)}"
    return f"{shown(value)} does not fit" if isinstance(value, str) else f"{shown(value)} is out of range"


def _type(value: object) -> str:
    return _TYPES.get(type(value), "a date or time")


def shown(value: object) -> str:
    """A value from the file, short and printable ASCII, whatever it holds; of an address without user and password."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 200:  # str() refuses numbers of thousands of digits
        return "a huge number"
    text = ascii(value) if isinstance(value, str) else ascii(str(value))[1:-1]
    text = re.sub(r"//[^/]*@", "//..@", text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _word(option: object) -> str:
    return str(option).lower() if isinstance(option, bool) else str(option)


_MANY = 20


def one_of(*options: object) -> str:
    """Options as a sentence lists them: "false, true or low"; "" for none, and not too many."""
    words = [_word(option) for option in options]
    if len(words) > _MANY:
        return f"{', '.join(words[:_MANY])}, and {len(words) - _MANY} more"
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def dotted(key: str, name: str) -> str:
    """`name` below `key`, quoted where TOML would have to quote it."""
    bare = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{ascii(name)[1:-1]}"'
    return f"{key}.{bare}" if key else bare


def nearest(word: str, words: Iterable[str]) -> list[str]:
    """Up to three of `words` that look like `word`, the likeliest first, whatever their case."""
    import difflib  # only on the way to an error

    by_lower = {other.lower(): other for other in words}
    start = word[:_NAME_LENGTH].lower()  # a client's word may be of any length, and the comparison is quadratic
    return [by_lower[found] for found in difflib.get_close_matches(start, by_lower, 3)]


def first_near(word: str, words: Iterable[str]) -> str:
    """The one of `words` that looks most like `word`, "" if none does."""
    return next(iter(nearest(word, words)), "")
