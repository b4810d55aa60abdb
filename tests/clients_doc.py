"""docs/clients.md as tests use it: its fenced blocks, by the section they stand in.

What a reader copies is what runs; only the port is another one. Nothing here starts anything.
"""

from __future__ import annotations

import re
from functools import cache

from tests.daemon import ROOT

DOCUMENT = ROOT / "docs" / "clients.md"
ADDRESS = "127.0.0.1:11436"  # as the document has it


@cache
def sections() -> dict[str, str]:
    """The text of each section, by its title."""
    _, *parts = re.split(r"^## (.+)\n", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def blocks(section: str, language: str) -> list[str]:
    """The fenced blocks of that language in a section, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", sections()[section], re.MULTILINE | re.DOTALL)


def block(section: str, language: str, port: int) -> str:
    """The one such block, for a Portway at `port`."""
    (text,) = blocks(section, language)
    return at(text, port)


def at(text: str, port: int) -> str:
    """A snippet for a Portway at `port`. It must name the address that the document tells everybody."""
    if ADDRESS not in text:
        raise AssertionError(f"{ADDRESS} doesn't occur in:\n{text}")
    return text.replace(ADDRESS, f"127.0.0.1:{port}")


def shipped(ollama: str) -> str:
    """The configuration that comes with Portway, for a stand-in at `ollama`, whose models take no memory."""
    toml = (ROOT / "config" / "models.toml").read_text(encoding="utf-8")
    toml, addresses = re.subn(r"http://127\.0\.0\.1:11434", ollama, toml)
    toml, switches = re.subn(r"(\n\[memory\].*\nenabled = )true", r"\1false", toml)
    if (addresses, switches) != (1, 1):
        raise AssertionError(f"Ollama's address occurs {addresses} times, [memory]'s switch {switches} times")
    return toml
