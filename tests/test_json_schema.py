"""council/json_schema.py: what an answer in JSON has to look like."""

from __future__ import annotations

import unittest
from typing import Any

from portway.council.json_schema import mismatch

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "number"}},
    "required": ["x"],
    "additionalProperties": False,
}


class SchemaTest(unittest.TestCase):
    # schema, what fits it, what does not
    TABLE: tuple[tuple[Any, list[Any], list[Any]], ...] = (
        (True, [None, {}, 1], []),
        (False, [], [None, {}, 1]),
        ({"type": "string"}, ["", "x"], [1, None, []]),
        ({"type": "integer"}, [1, -1, 3.0], [1.5, True, "1"]),
        ({"type": "number"}, [1, 1.5], [False, "1"]),
        ({"type": "boolean"}, [True], [1, 0, "true"]),
        ({"type": ["string", "null"]}, ["", None], [0]),
        ({"enum": ["a", 1]}, ["a", 1], [True, "b"]),
        ({"const": 0}, [0], [False, None]),
        (POINT, [{"x": 1}, {"x": 1, "y": 0.5}], [{}, {"x": "1"}, {"x": 1, "z": 2}, []]),
        ({"properties": {"a": {"type": "string"}}}, [{}, {"b": 1}, 7], [{"a": 1}]),
        ({"additionalProperties": {"type": "integer"}}, [{"a": 1}], [{"a": "1"}]),
        ({"additionalProperties": False, "patternProperties": {"^a": True}}, [{"a": 1}], []),
        (
            {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
            [[1], [1, 2]],
            [[], [1, 2, 3], ["1"]],
        ),
        ({"prefixItems": [{"type": "string"}], "items": False}, [[], ["a"]], [[1], ["a", 1]]),
        ({"minLength": 1, "maxLength": 2}, ["a", "ab", 12345], ["", "abc"]),
        ({"minimum": 1, "maximum": 2}, [1, 2, "0"], [0.5, 3]),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 2}, [1.5], [1, 2]),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["", None], [1]),
        ({"oneOf": [{"type": "integer"}, {"minimum": 5}]}, [1, 5.5], [7, 1.5]),
        ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, [1], [0, 3]),
        ({"not": {"type": "string"}}, [1], ["x"]),
        ({"$ref": "#/$defs/p", "$defs": {"p": POINT}}, [{"x": 1}], [{}]),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}}, [None], [1]),
        ({"$ref": "http://elsewhere/"}, [1, None], []),
        ({"$ref": "#/nowhere"}, [1, None], []),
        ({"pattern": "^a"}, ["b"], []),  # not looked at
        ({"type": "strange"}, [1], []),
        ("no schema", [1], []),
    )

    def test_table(self) -> None:
        """What each keyword lets pass, and what it does not."""
        for schema, fitting, other in self.TABLE:
            for value in fitting:
                with self.subTest(schema=schema, value=value):
                    self.assertEqual("", mismatch(value, schema))
            for value in other:
                with self.subTest(schema=schema, value=value):
                    self.assertNotEqual("", mismatch(value, schema))

    def test_where(self) -> None:
        """What is said names the place."""
        schema = {"properties": {"points": {"items": POINT}}}
        self.assertEqual("$.points[1]: lacks 'x'", mismatch({"points": [{"x": 1}, {}]}, schema))

    def test_recursion(self) -> None:
        """A schema may speak of itself; one that does nothing else asks for nothing."""
        tree = {"$ref": "#/$defs/t", "$defs": {"t": {"properties": {"left": {"$ref": "#/$defs/t"}}, "required": ["v"]}}}
        self.assertEqual("$.left: lacks 'v'", mismatch({"v": 1, "left": {}}, tree))
        self.assertEqual("", mismatch(1, {"$ref": "#"}))

    def test_too_much(self) -> None:
        """A schema that would take for ever is given up."""
        twice: dict[str, Any] = {"allOf": [{"$ref": "#/$defs/t"}, {"$ref": "#/$defs/t"}]}
        self.assertEqual("", mismatch(1, {"$ref": "#/$defs/t", "$defs": {"t": twice}}))
        deep: Any = 1
        for _ in range(5000):
            deep = [deep]
        self.assertEqual("", mismatch(deep, {"$ref": "#/$defs/t", "$defs": {"t": {"items": {"$ref": "#/$defs/t"}}}}))


if __name__ == "__main__":
    unittest.main()
