"""Pseudo-models: names behind which several models answer. What [models.NAME] holds if it has a `kind`.

    council   members answer each for themselves, then a chairman writes one answer out of theirs
    cascade   the first member answers; where its answer does not do, the next one does

Their values, their tables in models.toml, and what has to be right about them. How they answer is
council/council.py's and council/cascade.py's. Nothing here does I/O.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from portway import fields

MOST_MEMBERS = 8  # each costs a whole answer, and a chairman's window is soon full
RESPONSES = "{responses}"  # where the members' answers go in a chairman's prompt


@dataclass(frozen=True, slots=True)
class Member:
    """One that is asked. params: sent to it in any case, before what its model's own `params` say."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Council:
    """kind = "council"."""

    members: tuple[Member, ...]
    chairman: str
    quorum: int | None = None  # so many members must have answered; None = half of them, rounded up
    on_partial: Literal["go_on", "fail"] = "go_on"  # what a member's failure leads to while there is a quorum
    parallel: bool | Literal["auto"] = "auto"  # members at the same time; auto = if they fit in memory together
    member_prompt: str = ""  # a system message for the members; "" = they see what the client sent
    chairman_prompt: str = ""  # "" = council/prompts.py

    @property
    def needed(self) -> int:
        """So many members must have answered."""
        if self.on_partial == "fail":
            return len(self.members)
        return (len(self.members) + 1) // 2 if self.quorum is None else self.quorum


@dataclass(frozen=True, slots=True)
class Cascade:
    """kind = "cascade"."""

    members: tuple[Member, ...]
    min_probability: float | None = None  # of a token, on average; needs a backend that gives logprobs


# --- What may stand in the file --------------------------------------------------------------

_Values = Mapping[str, Any]  # a section as far as it could be read


def tables(params: fields.Kind, aside: Mapping[str, fields.Kind]) -> dict[str, fields.Table]:
    """kind -> its table. params: how a model's params are read. aside: keys that every kind has."""
    member = fields.Either(fields.text, fields.Table({"name": fields.text, "params": params}, {"name": _NAME}))
    members = fields.ListOf(member, 'a list of logical names, or of { name = "..", params = { .. } }')
    council: dict[str, fields.Kind] = {
        "kind": fields.choice("council"),
        "members": members,
        "chairman": fields.text,
        "quorum": fields.whole(1, MOST_MEMBERS),
        "on_partial": fields.choice("go_on", "fail"),
        "parallel": fields.choice("auto", True, False),
        "member_prompt": fields.prose,
        "chairman_prompt": _chairman_prompt,
    }
    cascade: dict[str, fields.Kind] = {
        "kind": fields.choice("cascade"),
        "members": members,
        "min_probability": fields.probability,
    }
    needed = {"members": "a list of at least two logical names"}
    return {
        "council": fields.Table({**council, **aside}, {**needed, "chairman": _NAME}),
        "cascade": fields.Table({**cascade, **aside}, needed),
    }


_NAME = "a logical name"


def _chairman_prompt(value: object) -> str:
    text = fields.prose(value)
    if text and text.count(RESPONSES) != 1:
        raise fields.Refused(f"{RESPONSES} does not stand in it once", f"a text with {RESPONSES} for the answers")
    return text


def built(values: _Values) -> Council | Cascade:
    """The panel of a section whose values are right."""
    kind: type[Council | Cascade] = Council if values["kind"] == "council" else Cascade
    given = {each.name: values[each.name] for each in dataclasses.fields(kind) if each.name in values}
    members = [Member(**member) if isinstance(member, dict) else Member(member) for member in values["members"]]
    return kind(**{**given, "members": tuple(members)})


# --- What must be right about them -----------------------------------------------------------


def check(reader: fields.Reader, models: _Values) -> None:
    """Every mistake in the sections that have a kind, and in those that should not point to them."""
    for name, model in models.items():
        if "kind" in model:
            _check_members(reader, name, model, models)
            _check_quorum(reader, name, model)
        else:
            _check_fallback(reader, name, model, models)
    _check_cycles(reader, models)


def _check_members(reader: fields.Reader, name: str, model: _Values, models: _Values) -> None:
    members = model.get("members")
    if members is not None and not 2 <= len(members) <= MOST_MEMBERS:
        key = f"{fields.dotted('models', name)}.members"
        reader.refuse(key, f"{len(members)} of them", f"2 to {MOST_MEMBERS}; a name may stand there twice")
    aliases = {alias: other for other, values in models.items() for alias in values.get("aliases", ())}
    for key, member in _parts(name, model):
        if member not in models:
            near = aliases.get(member) or fields.first_near(member, models)
            reader.refuse(key, f"{fields.shown(member)} is no model", fields.one_of(*models), near)
        elif models[member].get("capabilities") == ("embedding",):
            reader.refuse(key, f"{fields.shown(member)} only makes embeddings", "a model that answers")


def _check_quorum(reader: fields.Reader, name: str, model: _Values) -> None:
    count = len(model.get("members", ()))
    if count and model.get("quorum", 1) > count:
        reader.refuse(f"{fields.dotted('models', name)}.quorum", f"there are {count} members", f"1 to {count}")


def _check_fallback(reader: fields.Reader, name: str, model: _Values, models: _Values) -> None:
    """A pseudo-model is asked for by its name: nobody who asks one model wants several in its place."""
    for index, member in enumerate(model.get("fallback", ())):
        if member is not fields.BAD and "kind" in models.get(member, {}):
            key = f"{fields.dotted('models', name)}.fallback[{index}]"
            reader.refuse(key, f"{fields.shown(member)} is a {models[member]['kind']}", "a model")


def _check_cycles(reader: fields.Reader, models: _Values) -> None:
    """Nobody is a part of itself, also not by way of others; each cycle is told once."""
    told = set()
    for name in models:
        way = _way_back(models, name)
        if way and frozenset(way) not in told:
            told.add(frozenset(way))
            key = next(key for key, member in _parts(name, models[name]) if member == way[1])
            reader.refuse(key, f"a cycle: {' -> '.join(way)}", "members that do not lead back here")


def _way_back(models: _Values, start: str) -> list[str]:
    """A way from `start` over its parts to itself, both ends included; [] = there is none."""
    ways = [[start]]
    seen: set[str] = set()
    while ways:
        way = ways.pop(0)
        for _, member in _parts(way[-1], models.get(way[-1], {})):
            if member == start:
                return [*way, start]
            if member not in seen:
                seen.add(member)
                ways.append([*way, member])
    return []


def _parts(name: str, model: _Values) -> Iterator[tuple[str, str]]:
    """The dotted key and the name of each model that a panel asks, as far as they could be read."""
    if "kind" not in model:
        return
    key = fields.dotted("models", name)
    for index, member in enumerate(model.get("members", ())):
        named = member.get("name") if isinstance(member, dict) else member
        if isinstance(named, str):
            yield f"{key}.members[{index}]", named
    if "chairman" in model:
        yield f"{key}.chairman", model["chairman"]


def warnings(panel: Council | Cascade) -> Iterator[str]:
    """What is valid and still likely to hurt: key and words, without the model's own key."""
    if isinstance(panel, Cascade):
        return
    if {member.name for member in panel.members} == {panel.chairman}:
        yield f"chairman: {panel.chairman} is all of the members, too: it will hardly see what they have missed"
    if panel.on_partial == "fail" and panel.quorum is not None and panel.quorum < len(panel.members):
        yield 'quorum: no effect: on_partial is "fail", so every member is needed'
