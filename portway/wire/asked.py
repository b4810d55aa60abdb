"""Reading what a client asks: typed fields, each wrong one a 400 that names it; and what a target can't do.

Bodies stay plain dicts. An absent field and OpenAI's null are the same: None. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portway.errors import BackendError, ClientError

if TYPE_CHECKING:
    from portway.config import Model

Payload = dict[str, Any]


def wrong(name: str, needed: str) -> ClientError:
    """The 400 for a field of the wrong type or range; `name` is its path: messages[0].role."""
    return ClientError(f"{name} must be {needed}.", param=name)


def number(asked: Payload, name: str) -> int | float | None:
    """A number; true and false, which Python counts as numbers, are none."""
    value = asked.get(name)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise wrong(name, "a number")


def integer(asked: Payload, name: str, least: int | None = None, most: int | None = None) -> int | None:
    """An integer; 3.0 counts, since many clients know only one kind of number, but Ollama wants 3."""
    value = asked.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise wrong(name, "an integer")
    if least is not None and value < least:
        raise wrong(name, f"at least {least}")
    if most is not None and value > most:
        raise wrong(name, f"at most {most}")
    return value


def boolean(asked: Payload, name: str) -> bool:
    """A flag; absent is false."""
    value = asked.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise wrong(name, "true or false")


def string(asked: Payload, name: str) -> str:
    """A text; absent is ""."""
    value = asked.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    raise wrong(name, "a string")


def require(target: Model, capability: str, detail: str, param: str | None) -> None:
    """Refuse what the target is known to lack; unknown capabilities are left for Ollama to judge."""
    if target.capabilities is not None and capability not in target.capabilities:
        raise unsupported(detail, f"Model '{target.name}' does not support {detail}.", param)


def unsupported(detail: str, message: str, param: str | None) -> BackendError:
    """The error that moves on to the next target: this one can't do what `detail` names in a word."""
    return BackendError("unsupported", message, detail=detail, param=param)
