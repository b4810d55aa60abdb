"""config.py against generated files: a configuration or its mistakes in printable lines, and nothing else ever."""

from __future__ import annotations

import json
import re
import unittest
from typing import Any

from portway import config, fields
from portway.config import Config, ConfigError
from portway.fields import Either, ListOf, Named, Table, Tagged
from tests.daemon import ROOT

try:
    from hypothesis import given
    from hypothesis import strategies as st
except ImportError as exc:
    raise unittest.SkipTest(f"{exc.name} is not installed") from exc

from tests.hypotheses import effort

SHIPPED = (ROOT / "config" / "models.toml").read_text("utf-8")
LINES = SHIPPED.splitlines()
SOUP = [*LINES, "[", "]", '"', "'", "\\", "=", "\n"]
ENVIRON = {"KEY": "sk-geheim", "EMPTY": "", "BROKEN": "a\nb"}

texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "fast-9b", "ollama", "openai", "council", "auto", "30s", "-1", "32MB", "off", "127.0.0.1"]),
    st.sampled_from(
        ["http://127.0.0.1:1", "https://u:geheim@h", "env:KEY", "env:BROKEN", "sha256:ab", "\x1b[2J", "a\nb"]
    ),
)
names = st.one_of(st.text(max_size=12), st.sampled_from(["fast-9b", "ollama", "key", "x.y", "\x1b[2J", ""]))
scalars = st.one_of(texts, st.booleans(), st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**63, 10**400]))
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)


def toml(value: Any) -> str:
    """A value as TOML writes it in one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(str(value), repr(value))
    if isinstance(value, str):
        return re.sub("[\x7f\ud800-\udfff]", "?", json.dumps(value))  # JSON's escapes are TOML's, but for surrogates'
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(name)} = {toml(item)}" for name, item in value.items()) + "}"
    return str(value)


def like(kind: fields.Kind) -> st.SearchStrategy[Any]:
    """Values of about the shape that `kind` reads: right keys, and anything in them."""
    if isinstance(kind, ListOf):
        return st.one_of(anything, st.lists(like(kind.item), max_size=3))
    if isinstance(kind, Table):
        return st.one_of(anything, _table(kind), _table(kind))
    if isinstance(kind, Named):
        return st.dictionaries(names, like(kind.item), max_size=3)
    if isinstance(kind, Tagged):
        return st.one_of(*(_table(table) for table in kind.tables.values()))
    if isinstance(kind, Either):
        return st.one_of(anything, like(kind.table))
    return anything


def _table(kind: Table) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: like(item) for name, item in kind.fields.items()})


documents = like(config.schema(ENVIRON))


class ConfigFuzz(unittest.TestCase):
    def judge(self, text: str) -> Config | None:
        """A Config, or a ConfigError whose every line can be shown and that tells no secret."""
        try:
            found = config.parse(text, "m.toml", ENVIRON)
        except ConfigError as exc:
            self.assertTrue(exc.mistakes)
            lines = str(exc).split("\n")
            self.assertEqual(len(exc.mistakes) + 1, len(lines))
            for line in lines:
                self.assertTrue(line.isprintable(), line)
                self.assertLess(len(line), 4000)
            self.assertNotIn("sk-geheim", str(exc))
            self.assertNotIn("u:geheim", str(exc))
            return None
        for warning in found.warnings:
            self.assertTrue(warning.isprintable())
        self.assertNotIn("sk-geheim", repr(found.server))
        return found

    @given(documents)
    @effort(300)
    def test_right_keys_with_anything_in_them(self, document):
        """Every section, every key, values of every type."""
        if isinstance(document, dict):
            self.judge("".join(f"{toml(name)} = {toml(value)}\n" for name, value in document.items()))

    @given(st.lists(st.tuples(st.integers(0, len(LINES) - 1), st.integers(0, 3), texts), max_size=4))
    @effort(300)
    def test_the_shipped_file_with_lines_changed(self, changes):
        """Lines lost, doubled, swapped for others, values replaced: what is taken can be served by."""
        lines = list(LINES)
        for index, how, text in changes:
            at = index % len(lines)
            if how == 0:
                del lines[at]
            elif how == 1:
                lines.insert(at, lines[at])
            elif how == 2:
                lines.insert(at, lines.pop())
            else:
                lines[at] = re.sub(r"= .*", f"= {toml(text)}".replace("\\", "\\\\"), lines[at], count=1)
        found = self.judge("\n".join(lines))
        if found is not None:
            for name in found.names:
                chain = found.chain(found.models[found.names[name]])
                self.assertEqual(len(chain), len({member.name for member in chain}))

    @given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(SOUP)).map("\n".join)))
    @effort(300)
    def test_any_text(self, text):
        """Not TOML, TOML that is no configuration, half of each."""
        self.judge(text)

    @given(st.binary(max_size=100))
    @effort(150)
    def test_any_bytes(self, data):
        """Also what is no text at all."""
        self.judge(data.decode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    unittest.main()
