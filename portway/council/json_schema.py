"""Whether a JSON value is what a JSON schema asks for, as far as language models are asked for it. Pure.

Looked at: type (also several), enum, const, properties, required, additionalProperties, items, prefixItems,
minItems, maxItems, minLength, maxLength, minimum, maximum, exclusiveMinimum, exclusiveMaximum, anyOf, oneOf,
allOf, not, true and false as schemas, and $ref within the document. Not looked at: pattern and format
(another dialect of regular expressions, and a way to stop the daemon), uniqueItems, contains, if, dependent..,
unevaluated.., $dynamicRef, and $refs elsewhere: what only they would refuse passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MOST_STEPS = 100_000  # a schema that points to itself twice at each level would take for ever; it is given up
MOST_REFS = 50  # one behind another, without going deeper into the value

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def mismatch(value: Any, schema: Any) -> str:
    """Where `value` is not what `schema` asks for, in a few words; "" if it is, or could not be told."""
    try:
        return next(_Check(schema).problems(value, schema, "$"), "")
    except (_GivenUp, RecursionError):
        return ""


class _GivenUp(Exception):
    """The schema takes more work than an answer is worth."""


class _Check:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._steps = 0

    def problems(self, value: Any, schema: Any, at: str) -> Iterator[str]:
        """Everything that is wrong, the first first."""
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise _GivenUp
        schema = self._resolved(schema)
        if schema is False:
            yield f"{at}: nothing is allowed here"
        if not isinstance(schema, dict):
            return
        yield from _kind(value, schema, at)
        yield from self._combined(value, schema, at)
        if isinstance(value, dict):
            yield from self._members(value, schema, at)
        elif isinstance(value, list):
            yield from self._items(value, schema, at)
        elif isinstance(value, str):
            yield from _bounds(len(value), schema, ("minLength", "maxLength"), f"{at}: its length")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield from _bounds(value, schema, ("minimum", "maximum"), f"{at}: it")
            yield from _outside(value, schema, at)

    def _resolved(self, schema: Any) -> Any:
        """The schema behind a $ref. One that points elsewhere, or only to itself, asks for nothing."""
        for _ in range(MOST_REFS):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                return schema
            schema = self._found(schema["$ref"])
        return True

    def _found(self, reference: str) -> Any:
        if not reference.startswith("#"):
            return True
        found = self._root
        for step in filter(None, reference[1:].split("/")):
            key = step.replace("~1", "/").replace("~0", "~")
            found = found.get(key, True) if isinstance(found, dict) else True
        return found

    def _combined(self, value: Any, schema: Mapping[str, Any], at: str) -> Iterator[str]:
        for part in _list(schema.get("allOf")):
            yield from self.problems(value, part, at)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                fitting = sum(self._fits(value, part, at) for part in _list(schema[key]))
                if not fitting or (key == "oneOf" and fitting > 1):
                    yield f"{at}: fits {fitting or 'none'} of {key}"
        if "not" in schema and self._fits(value, schema["not"], at):
            yield f"{at}: is what it should not be"

    def _fits(self, value: Any, schema: Any, at: str) -> bool:
        return next(self.problems(value, schema, at), None) is None

    def _members(self, value: Mapping[str, Any], schema: Mapping[str, Any], at: str) -> Iterator[str]:
        yield from (f"{at}: lacks {name!r}" for name in _list(schema.get("required")) if name not in value)
        known = schema.get("properties")
        known = known if isinstance(known, dict) else {}
        # patternProperties may allow what nothing else does, and patterns are not looked at
        others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        for name, member in value.items():
            if name in known:
                yield from self.problems(member, known[name], f"{at}.{name}")
            elif others is False:
                yield f"{at}: {name!r} is not allowed"
            else:
                yield from self.problems(member, others, f"{at}.{name}")

    def _items(self, value: list[Any], schema: Mapping[str, Any], at: str) -> Iterator[str]:
        yield from _bounds(len(value), schema, ("minItems", "maxItems"), f"{at}: its length")
        first = _list(schema.get("prefixItems"))
        for index, item in enumerate(value):
            part = first[index] if index < len(first) else schema.get("items", True)
            yield from self.problems(item, part, f"{at}[{index}]")


def _kind(value: Any, schema: Mapping[str, Any], at: str) -> Iterator[str]:
    wanted = schema.get("type")
    types = wanted if isinstance(wanted, list) else [wanted]
    if wanted is not None and not any(_is_a(value, type) for type in types):
        yield f"{at}: not of type {' or '.join(map(str, types))}"
    if "enum" in schema and not any(_same(value, option) for option in _list(schema["enum"])):
        yield f"{at}: none of its enum"
    if "const" in schema and not _same(value, schema["const"]):
        yield f"{at}: not the one value it may have"


def _is_a(value: Any, type: Any) -> bool:
    """JSON has one kind of number: 3.0 is an integer, and true is none."""
    if isinstance(value, bool):
        return bool(type == "boolean")
    if type == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return not isinstance(type, str) or isinstance(value, _TYPES.get(type, object))


def _same(one: Any, other: Any) -> bool:
    """Python takes True for 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _bounds(size: float, schema: Mapping[str, Any], keys: tuple[str, str], what: str) -> Iterator[str]:
    least, most = (schema.get(key) for key in keys)
    if isinstance(least, int | float) and size < least:
        yield f"{what} is below {keys[0]} {least}"
    if isinstance(most, int | float) and size > most:
        yield f"{what} is above {keys[1]} {most}"


def _outside(value: float, schema: Mapping[str, Any], at: str) -> Iterator[str]:
    least, most = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if isinstance(least, int | float) and not isinstance(least, bool) and value <= least:
        yield f"{at}: it is not above {least}"
    if isinstance(most, int | float) and not isinstance(most, bool) and value >= most:
        yield f"{at}: it is not below {most}"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
