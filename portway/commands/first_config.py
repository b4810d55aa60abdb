"""`portway init`: a models.toml for this machine's memory and the models it has, with the arithmetic shown.

A rung of `LADDER` says what suits a machine of so much memory. For each of its places a model that Ollama already
has is preferred, if it fits there as well. What comes out has been checked as `portway check` does before it is
written, and nothing is ever overwritten unasked. No model is loaded, and none is fetched.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from portway import config
from portway.commands.probe import ask
from portway.memory.fits import Footprint, context_bytes, footprint, gb, read_size

OLLAMA = "http://127.0.0.1:11434"
GIB = 1024**3
SYSTEM_ALONE = 3 * GIB  # with every program closed
SHARE = 0.55  # of the memory goes to the system and to open programs: 13 of 24 GB,
LEAST, MOST = 5 * GIB, 14 * GIB  # but not less, and not more
GPU_SHARE = 0.75  # macOS lets the GPU have no more of it; elsewhere the rest is no loss
LIKE_ENOUGH = (0.4, 1.35)  # what a model may have of the size of the one it takes the place of


@dataclass(frozen=True, slots=True)
class Place:
    """A logical model, and what is recommended for it. per_token: bytes of context for each token of num_ctx.

    shares: the place whose model it uses, too. fallback: roles, in order. lines: further lines of TOML.
    """

    role: str
    name: str
    model: str
    size: int
    per_token: int
    num_ctx: int
    family: str
    flag: str = ""
    keep_alive: str = "5m"
    shares: str = ""
    fallback: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A model that Ollama has."""

    name: str
    size: int
    family: str
    capabilities: frozenset[str]
    context_length: int | None
    per_token: float | None


@dataclass(frozen=True, slots=True)
class Choice:
    """A place and the model that takes it."""

    place: Place
    footprint: Footprint
    pulled: bool


_FAST = ('cache = "30d"', "think = false")
_SLOW = "timeouts = { first_token = 300, total = 900 }  # its load alone can take a minute or two"

_TINY = Place("tiny", "fast-1b", "llama3.2:1b", 1_321_000_000, 32_768, 16384, "llama", "1b", lines=('cache = "30d"',))
_SMALL = Place(
    "small", "fast-3b", "granite4:3b", 2_100_000_000, 81_920, 16384, "granite", "3b", lines=('cache = "30d"',)
)
# in their places if the everyday model is of their family: a chain inside one family breaks as one
_OTHERS: Mapping[str, Place] = {
    "small": replace(_SMALL, model="llama3.2:3b", size=2_019_000_000, per_token=114_688, family="llama"),
    "tiny": replace(_TINY, model="gemma3:1b", size=815_000_000, per_token=26_624, family="gemma"),
}
_FAST_4B = Place("fast", "fast-4b", "qwen3.5:4b", 3_400_000_000, 32_768, 16384, "qwen", "4b", "15m", lines=_FAST)
_FAST_9B = replace(_FAST_4B, name="fast-9b", model="qwen3.5:9b", size=6_600_000_000, flag="9b")
_THINK = replace(
    _FAST_9B,
    role="think",
    name="think-9b",
    flag="think",
    shares="fast",
    lines=("think = true", "timeouts = { first_token = 180, total = 900 }"),
)
_THINK_27B = replace(
    _THINK, name="think-27b", model="qwen3.5:27b", size=17_000_000_000, per_token=65_536, shares="", keep_alive="5m",
    lines=("think = true", _SLOW),
)  # fmt: skip
_CODER = Place(
    "coder", "coder-30b", "qwen3-coder:30b", 18_600_000_000, 98_304, 32768, "qwen", "coder", "5m", lines=(_SLOW,)
)
_HEAVY = Place("heavy", "heavy-20b", "gpt-oss:20b", 13_800_000_000, 24_576, 16384, "gpt", "heavy", "5m", lines=(_SLOW,))
_EMBED = Place(
    "embed", "embed", "nomic-embed-text", 274_000_000, 0, 2048, "nomic", keep_alive="15m",
    lines=('cache = "30d"', 'capabilities = ["embedding"]', 'aliases = ["text-embedding-3-small"]'),
)  # fmt: skip

# GiB of memory -> its models, the everyday one first
LADDER: Mapping[int, Sequence[Place]] = {
    8: (
        replace(_SMALL, role="fast", num_ctx=8192, keep_alive="15m", lines=_FAST[:1], fallback=("tiny",)),
        replace(_TINY, num_ctx=8192),
        _EMBED,
    ),
    16: (
        replace(_FAST_4B, fallback=("small", "tiny")),
        _SMALL,
        _TINY,
        replace(_THINK, name="think-4b", model="qwen3.5:4b", size=_FAST_4B.size, fallback=("small",)),
        _EMBED,
    ),
    24: (
        replace(_FAST_9B, fallback=("small", "tiny")),
        _SMALL,
        _TINY,
        replace(_THINK, fallback=("small",)),
        replace(_CODER, num_ctx=16384, keep_alive="30s", fallback=("fast", "small")),
        _EMBED,
    ),
    48: (
        replace(_FAST_9B, fallback=("small", "tiny")),
        _SMALL,
        _TINY,
        replace(_THINK_27B, fallback=("fast", "small")),
        replace(_CODER, fallback=("fast", "small")),
        replace(_HEAVY, fallback=("fast", "small")),
        _EMBED,
    ),
    96: (
        replace(_FAST_9B, num_ctx=32768, keep_alive="1h", fallback=("small", "tiny")),
        replace(_SMALL, num_ctx=32768),
        replace(_TINY, num_ctx=32768),
        replace(_THINK_27B, num_ctx=32768, keep_alive="15m", fallback=("fast", "small")),
        replace(_CODER, num_ctx=65536, keep_alive="15m", fallback=("fast", "small")),
        replace(_HEAVY, name="heavy-120b", model="gpt-oss:120b", size=65_400_000_000, per_token=36_864,
                num_ctx=32768, fallback=("think", "fast", "small")),
        _EMBED,
    ),
}  # fmt: skip


class InitError(Exception):
    """No configuration can be written. str() says why and what would help."""


def main(memory: str | None, force: bool, output: str | None, environ: Mapping[str, str] = os.environ) -> int:
    """Write the configuration and show how it came about. Returns the exit code."""
    try:
        path = os.path.abspath(os.path.expanduser(output)) if output else own_path(environ)
        if os.path.lexists(path) and not force:
            raise InitError(f"{path} is there already; --force replaces it and keeps the old one as {path}.old")
        size = _memory(memory)
        url = ollama_url(environ)
        found = pulled(url)
        choices = choose(size, found or [])
        text = write_down(size, choices, url)
        config.parse(text, path, {})
        for line in explain(size, choices, url, found):
            print(line)
        _save(path, text)
    except InitError as exc:
        print(f"portway init: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"portway init: {exc.filename}: {exc.strerror}", file=sys.stderr)
        return 1
    print(f"\nwrote {path}; `portway doctor` says whether all is there, `portway serve` serves it.")
    return 0


def own_path(environ: Mapping[str, str]) -> str:
    """Where a user's own configuration is looked for."""
    base = environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".config")
    return os.path.join(base, "portway", "models.toml")


def ollama_url(environ: Mapping[str, str]) -> str:
    """Where Ollama is, by the variable that Ollama itself reads, where that holds something plain."""
    given = re.fullmatch(r"(?:http://)?([A-Za-z0-9.-]+)(?::([0-9]{1,5}))?/?", environ.get("OLLAMA_HOST", ""))
    if given is None:
        return OLLAMA
    host = "127.0.0.1" if given[1] in ("0.0.0.0", "localhost") else given[1]  # noqa: S104 - not bound to
    return f"http://{host}:{given[2] or 11434}"


def budget(memory: int) -> int:
    """What is left for models on a machine in use."""
    reserve = min(MOST, max(LEAST, round(memory * SHARE)))
    return max(0, min(memory - reserve, round(memory * GPU_SHARE)))


def _memory(given: str | None) -> int:
    if given is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = read_size(given)
    if size is None or not GIB <= size <= 4096 * GIB:
        raise InitError(f"--memory {given}: not a size such as 24GB")
    return size


# --- what Ollama has -------------------------------------------------------------------------


def pulled(url: str) -> list[Found] | None:
    """The models that the Ollama there has, the largest first; None if none answers."""
    try:
        listed = ask(url, "/api/tags").value.get("models")
        models = [model for model in listed if _is_local(model)] if isinstance(listed, list) else []
        models.sort(key=lambda model: (-model["size"], model["name"]))
        return [_found(url, model) for model in models]
    except OSError:
        return None


def _is_local(model: Any) -> bool:
    """A model with weights here; Ollama lists cloud models, too, which have none."""
    if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not isinstance(model.get("size"), int):
        return False
    return model["size"] > 10_000_000 and model["name"].isprintable() and not model.get("remote_host")


def _found(url: str, model: Mapping[str, Any]) -> Found:
    shown = ask(url, "/api/show", {"model": model["name"]}).value
    info = shown.get("model_info")
    info = info if isinstance(info, dict) else {}
    capabilities = shown.get("capabilities")
    lengths = [value for key, value in info.items() if key.endswith(".context_length") and isinstance(value, int)]
    details = model.get("details")
    return Found(
        name=model["name"].removesuffix(":latest"),
        size=model["size"],
        family=family(model["name"], str(details.get("family", "")) if isinstance(details, dict) else ""),
        capabilities=frozenset(map(str, capabilities)) if isinstance(capabilities, list) else frozenset({"completion"}),
        context_length=lengths[0] if lengths else None,
        per_token=context_bytes(info),
    )


def family(name: str, told: str) -> str:
    """As "qwen" for qwen3.5:9b and qwen3-coder; what the backend tells counts where the name has a publisher."""
    letters = re.match(r"[a-z]+", (told if "/" in name else name).lower())
    return letters[0] if letters else "other"


# --- choosing --------------------------------------------------------------------------------


def choose(memory: int, found: Sequence[Found]) -> list[Choice]:
    """Who takes which place on a machine with so much memory."""
    places = LADDER[max((rung for rung in LADDER if rung * GIB <= memory * 1.1), default=min(LADDER))]
    room, taken, chosen = budget(memory), set[str](), dict[str, Choice]()
    recommended = {_full(place.model) for place in places}
    for place in places:
        shared = chosen.get(place.shares)
        if shared is not None and shared.place.model != place.model:
            choice = _sharing(place, shared, found)
        else:
            families = {chosen[role].place.family for role in ("fast", "small", "tiny") if role in chosen}
            if families == {place.family} and place.role in _OTHERS:
                other = _OTHERS[place.role]
                place = replace(other, num_ctx=place.num_ctx, fallback=place.fallback)  # noqa: PLW2901
            free = [model for model in found if _full(model.name) not in taken | (recommended - {_full(place.model)})]
            choice = _choice(place, free, found, room, memory, families)
        if choice is not None:
            choice = _distinct(choice, chosen.values())
            chosen[place.role] = choice
            taken.add(_full(choice.place.model))
    if "fast" not in chosen:
        raise InitError(f"{memory / GIB:.1f} GiB hold no model beside the system; 8 GB are the least")
    return [_with_chain(choice, chosen) for choice in chosen.values()]


def _choice(
    place: Place, free: Iterable[Found], found: Iterable[Found], room: int, memory: int, families: set[str]
) -> Choice | None:
    """The recommended model if it is there, else one that is and suits, else the recommended one all the same."""
    there = next((model for model in found if _full(model.name) == _full(place.model)), None)
    if there is None:
        for model in free:
            candidate = _taking(place, model)
            if _suits(place, model, families) and candidate.footprint.total <= room:
                return candidate
    planned = Choice(place, footprint(place.size, place.num_ctx, each=place.per_token), pulled=False)
    choice = planned if there is None else _taking(place, there, keep_name=True)
    return choice if choice.footprint.total <= memory - SYSTEM_ALONE else None


def _suits(place: Place, model: Found, families: set[str]) -> bool:
    low, high = LIKE_ENOUGH
    if not low * place.size <= model.size <= high * place.size:
        return False
    if place.role == "embed":
        return "embedding" in model.capabilities
    if "completion" not in model.capabilities:
        return False
    codes = re.search(r"cod(er|e)|devstral", model.name.lower()) is not None
    if place.role == "think":
        return "thinking" in model.capabilities and not codes
    if place.role in ("small", "tiny") and model.family in families:
        return False  # what breaks the first breaks its fallback
    return codes == (place.role == "coder")


def _taking(place: Place, model: Found, *, keep_name: bool = False) -> Choice:
    """The place with a model that is there."""
    window = min(place.num_ctx, model.context_length or place.num_ctx)
    lines = place.lines if "thinking" in model.capabilities else tuple(x for x in place.lines if x != "think = false")
    own = replace(place, model=model.name, size=model.size, family=model.family, num_ctx=window, lines=lines)
    if not keep_name and place.role != "embed":
        size = re.search(r"(\d+(?:\.\d+)?)b\b", model.name.lower())
        label = f"{float(size[1]):g}b" if size else re.sub(r"[^a-z0-9]+", "-", model.name.lower()).strip("-")
        prefix = place.name.partition("-")[0]
        own = replace(own, name=f"{prefix}-{label}", flag=_flag(place, label if size else ""))
    return Choice(own, footprint(model.size, window, each=model.per_token), pulled=True)


def _flag(place: Place, size: str) -> str:
    """`ask --coder` stays that, `--9b` says which size there is."""
    return size.replace(".", "-") if place.name.startswith("fast-") else place.flag


def _sharing(place: Place, shared: Choice, found: Iterable[Found]) -> Choice | None:
    """The place with the model that another one has; none if that can't do what this place is for."""
    model = next((model for model in found if _full(model.name) == _full(shared.place.model)), None)
    if model is None or "thinking" not in model.capabilities:
        return None
    name = f"{place.role}-{shared.place.name.partition('-')[2]}"
    same = replace(place, name=name, model=model.name, num_ctx=shared.place.num_ctx, family=shared.place.family)
    return Choice(same, shared.footprint, pulled=True)


def _distinct(choice: Choice, others: Iterable[Choice]) -> Choice:
    """Under a name and a flag that no other has."""
    place = choice.place
    names, flags = {other.place.name for other in others}, {other.place.flag for other in others}
    name = f"{place.name}-{place.family}" if place.name in names else place.name
    flag = "" if place.flag in flags else place.flag
    return replace(choice, place=replace(place, name=name, flag=flag))


def _with_chain(choice: Choice, chosen: Mapping[str, Choice]) -> Choice:
    """Its fallback as logical names, without the model that it is itself."""
    members = [chosen[role].place for role in choice.place.fallback if role in chosen]
    names = tuple(member.name for member in members if _full(member.model) != _full(choice.place.model))
    return replace(choice, place=replace(choice.place, fallback=names))


def _full(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


# --- writing it down -------------------------------------------------------------------------


def write_down(memory: int, choices: Sequence[Choice], url: str) -> str:
    """The models.toml."""
    lines = [
        f"# Portway's configuration for {memory / GIB:.0f} GB of memory, of which {gb(budget(memory))} are for models;",
        "# written by `portway init`. Every option with its default, unit and reason:",
        "# https://github.com/portway/portway/blob/main/config/models.toml; `portway check` finds mistakes.",
        "",
        "[backends.ollama]",
        'kind = "ollama"',
        f"url = {json.dumps(url)}",
    ]
    for number, choice in enumerate(choices):
        lines += ["", *_table(choice, first=number == 0, memory=memory)]
    lines += _council(choices)
    return "\n".join([*lines, ""])


def _table(choice: Choice, *, first: bool, memory: int) -> Iterator[str]:
    place = choice.place
    yield f"[models.{json.dumps(place.name) if '.' in place.name else place.name}]  # {choice.footprint}"
    yield 'backend = "ollama"'
    yield f"model = {json.dumps(place.model)}" + ("" if choice.pulled else f"  # ollama pull {place.model}")
    yield f"family = {json.dumps(place.family)}"
    yield f"keep_alive = {json.dumps(place.keep_alive)}"
    yield f"num_ctx = {place.num_ctx}"
    if place.fallback:
        yield f"fallback = {json.dumps(list(place.fallback))}"
    if place.flag:
        yield f"flag = {json.dumps(place.flag)}"
    if first:
        yield "default = true  # what `ask` means without a flag"
        yield 'aliases = ["gpt-4o-mini"]  # for programs that can\'t be told another name'
    yield from place.lines
    if choice.footprint.total > budget(memory):
        yield "# it needs nearly the whole machine: close other programs first"


def _council(choices: Sequence[Choice]) -> Iterator[str]:
    """Of the everyday model, twice, and the one that thinks, if there is one: `ask --council`."""
    names = {choice.place.role: choice.place.name for choice in choices}
    if "think" not in names:
        return
    yield ""
    yield "[models.council]  # two answer apart, the chairman makes one answer of theirs; `ask --council`"
    yield 'kind = "council"'
    yield f"members = {json.dumps([names['fast']] * 2)}"
    yield f"chairman = {json.dumps(names['think'])}"
    yield "timeouts = { total = 900 }"


def explain(memory: int, choices: Sequence[Choice], url: str, found: Sequence[Found] | None) -> Iterator[str]:
    """The arithmetic, for people."""
    room = budget(memory)
    yield f"memory       {gb(memory):>8}   (a GB is 1024 MB here; `ollama list` counts in thousands)"
    yield f"for others  -{gb(memory - room):>8}   the system and open programs"
    yield f"for models   {gb(room):>8}"
    yield ""
    if found is None:
        yield f"No Ollama answers at {url}, so these are recommendations; sizes are those of ollama.com."
    for choice in choices:
        place = choice.place
        verdict = f"fits, {gb(room - choice.footprint.total)} left"
        if choice.footprint.total > room:
            verdict = f"{gb(choice.footprint.total - room)} too much: only with other programs closed"
        pulled_yet = "" if choice.pulled else " (not pulled)"
        yield f"{place.name:11} {place.model:18} {choice.footprint}: {verdict}{pulled_yet}"
    yield from _together(room, choices)
    missing = dict.fromkeys(choice.place.model for choice in choices if not choice.pulled)
    if missing:
        yield ""
        yield "To fetch what is missing:"
        yield from (f"  ollama pull {name}" for name in missing)


def _together(room: int, choices: Sequence[Choice]) -> Iterator[str]:
    """Which models fit beside the everyday one."""
    first, others = choices[0], [each for each in choices[1:] if each.place.model != choices[0].place.model]
    beside = [each.place.name for each in others if first.footprint.total + each.footprint.total <= room]
    yield f"Beside {first.place.name} fit, one at a time: {', '.join(beside) or 'none; each takes its place'}."


def _save(path: str, text: str) -> None:
    """A file that its owner alone may read, since keys may come into it; the one before is kept."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    fresh = f"{path}.{os.getpid()}"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    if os.path.lexists(path):
        os.replace(path, f"{path}.old")
    os.replace(fresh, path)
