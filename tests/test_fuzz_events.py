"""wire/events.py against generated input: it reads as the standards say, however bytes are cut, and fails one way."""

from __future__ import annotations

import json
import re
import unittest
from typing import Any

from portway.errors import ClientError
from portway.wire.events import MAX_DEPTH, NDJSONReader, SSEReader, WireError, dumps, loads, loads_object, sse

try:
    from hypothesis import given
    from hypothesis import strategies as st
except ImportError as exc:
    raise unittest.SkipTest(f"{exc.name} is not installed") from exc

from tests.hypotheses import effort

PIECES = [b"\n", b"\r", b"\r\n", b"\n\n", b"data", b"data:", b"data: ", b"data: {}", b":", b" ", b"event: x", b"id: 1"]
PIECES += [b"retry: 1", b"\xef\xbb\xbf", b"\x00", b"\xff", b'{"a":1}', b"[DONE]", b"{", b"}", b'"', b"\t", b"datax: 1"]
soup = st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=4)), max_size=24).map(b"".join)
cuts = st.lists(st.integers(0, 400), max_size=8)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
objects = st.dictionaries(st.text(), values, max_size=6)


def cut(data: bytes, positions: list[int]) -> list[bytes]:
    at = sorted({position % (len(data) + 1) for position in positions})
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


def read(reader: SSEReader | NDJSONReader, pieces: list[bytes]) -> tuple[list[bytes], Any]:
    """(what came out, what finish() said or why it was refused)."""
    found: list[bytes] = []
    try:
        for piece in pieces:
            found += reader.feed(piece)
        return found, reader.finish()
    except WireError as exc:
        return found, str(exc)


def events_by_the_standard(data: bytes) -> list[bytes]:
    """The data of each event, as HTML's "event stream interpretation" tells it step by step; empty ones left out."""
    found: list[bytes] = []
    lines: list[bytes] = []
    text = data.removeprefix(b"\xef\xbb\xbf")
    for line in re.split(rb"\r\n|\n|\r", text)[:-1]:  # what has no line end yet is no line
        if not line:
            if any(lines) or len(lines) > 1:
                found.append(b"\n".join(lines))
            lines = []
            continue
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value[1:] if value[:1] == b" " else value)
    return found


class Sse(unittest.TestCase):
    @given(soup, cuts)
    @effort(600)
    def test_as_the_standard_reads_it(self, data, positions):
        """Any bytes give the events that the standard's own steps give, whatever they are cut into."""
        expected = events_by_the_standard(data)
        for pieces in ([data], cut(data, positions), [data[i : i + 1] for i in range(len(data))]):
            found, _ = read(SSEReader(), pieces)
            if data.endswith(b"\r") and found != expected:
                found, _ = read(SSEReader(), [*pieces, b"\n"])  # half of a line end: the other half decides nothing
            self.assertEqual(expected, found, data)

    @given(soup, cuts, st.integers(3, 30))  # a mark that is not all in counts
    @effort(400)
    def test_the_verdict_does_not_depend_on_the_cut(self, data, positions, limit):
        """Nor does what finish() says, nor whether it is too long."""
        whole = read(SSEReader(limit), [data])
        bytewise = read(SSEReader(limit), [data[i : i + 1] for i in range(len(data))])
        pieces = read(SSEReader(limit), cut(data, positions))
        self.assertEqual([str(whole[1])] * 2, [str(bytewise[1]), str(pieces[1])], data)
        if not isinstance(whole[1], str):
            self.assertEqual([whole[0]] * 2, [bytewise[0], pieces[0]])

    @given(st.lists(values, max_size=6), cuts)
    @effort(200)
    def test_what_is_written_is_read(self, written, positions):
        """Each event comes back as the value it was made of."""
        data = b"".join(sse(dumps(value)) for value in written)
        found, rest = read(SSEReader(), cut(data, positions))
        self.assertEqual((written, None), ([json.loads(each) for each in found], rest))


class Ndjson(unittest.TestCase):
    @given(soup, cuts, st.integers(0, 30))
    @effort(400)
    def test_lines(self, data, positions, limit):
        """Lines are what stands between line feeds, without white space around; too long is too long at any cut."""
        *lines, tail = data.split(b"\n")
        expected = [line.strip() for line in lines if line.strip()]
        for pieces in ([data], cut(data, positions), [data[i : i + 1] for i in range(len(data))]):
            self.assertEqual(expected, read(NDJSONReader(), pieces)[0])
            found, rest = read(NDJSONReader(limit), pieces)
            self.assertEqual(max(map(len, [*lines, tail])) > limit, isinstance(rest, str) and "larger" in rest, data)
            self.assertEqual(expected[: len(found)], found)

    @given(st.lists(objects, max_size=6), cuts)
    @effort(200)
    def test_what_is_written_is_read(self, written, positions):
        """Each line comes back as the value it was made of."""
        data = b"".join(dumps(value) + b"\n" for value in written)
        found, rest = read(NDJSONReader(), cut(data, positions))
        self.assertEqual((written, None), ([json.loads(each) for each in found], rest))


class Json(unittest.TestCase):
    @given(st.one_of(soup, st.binary(max_size=60), st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))))
    @effort(600)
    def test_a_body_is_a_dict_or_one_clear_400(self, data):
        """Whatever comes in; and what is taken here, the standard library takes too."""
        try:
            value = loads_object(data)
        except ClientError as exc:
            self.assertEqual((400, True), (exc.status, exc.message.isprintable()))
            return
        self.assertEqual(json.loads(data), value)

    @given(objects, st.booleans(), st.sampled_from([None, 0, 2]))
    @effort(300)
    def test_every_object_is_read_back(self, value, ascii_only, indent):
        """Written with or without escapes, compact or not; by us or by others."""
        text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
        if not re.search("[\ud800-\udfff]", text):
            self.assertEqual(value, loads_object(text.encode()))
        self.assertEqual(value, loads_object(dumps(value)))
        self.assertEqual(value, loads(dumps(value)))

    @given(objects, st.integers(0, 2**32), st.text(max_size=3))
    @effort(300)
    def test_a_name_said_twice_is_refused(self, value, place, name):
        """At any depth, whatever the two say."""
        found = [value]
        for each in found:
            inner = each.values() if isinstance(each, dict) else each
            found += [one for one in inner if isinstance(one, (dict, list))]
        inside = [each for each in found if isinstance(each, dict)]
        chosen = inside[place % len(inside)]
        chosen[name] = "\0twice\0"
        text = json.dumps(value).replace('"\\u0000twice\\u0000"', f"1, {json.dumps(name)}: 2")
        with self.assertRaises(ClientError) as caught:
            loads_object(text.encode())
        self.assertIn("twice", caught.exception.message)

    @given(st.integers(1, 3 * MAX_DEPTH), st.sampled_from(["[", '{"a":']))
    @effort(100)
    def test_depth(self, depth, opened):
        """Up to MAX_DEPTH levels are read, none deeper, and nothing else decides."""
        text = '{"x":' + opened * depth + "1" + ("]" if opened == "[" else "}") * depth + "}"
        try:
            loads_object(text.encode())
            self.assertLess(depth, MAX_DEPTH)
        except ClientError:
            self.assertGreaterEqual(depth, MAX_DEPTH)


if __name__ == "__main__":
    unittest.main()
