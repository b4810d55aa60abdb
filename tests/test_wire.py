"""wire/events.py: JSON text, SSE and NDJSON, however the bytes are cut."""

import json
import time
import unittest
from collections.abc import Iterator
from json.encoder import encode_basestring, encode_basestring_ascii
from unittest import mock

from portway.errors import ClientError
from portway.wire.events import (
    DONE,
    MAX_DEPTH,
    NDJSONReader,
    SSEReader,
    WireError,
    _encoder,
    dumps,
    loads,
    loads_object,
    sse,
)

BOM = b"\xef\xbb\xbf"


def fed(reader: SSEReader | NDJSONReader, pieces: list[bytes]) -> tuple[list[bytes], bytes | str | None]:
    """All events of `pieces`, then what finish() returns or "cut"."""
    events = [event for piece in pieces for event in reader.feed(piece)]
    try:
        return events, reader.finish()
    except WireError:
        return events, "cut"


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """`data` whole, byte by byte, cut in two at every position, and in three around it."""
    yield [data]
    yield [data[i : i + 1] for i in range(len(data))]
    for i in range(len(data) + 1):
        yield [data[:i], data[i:]]
        yield [data[:i], b"", data[i : i + 2], data[i + 2 :]]


class Objects(unittest.TestCase):
    def refused(self, data: bytes) -> str:
        with self.assertRaises(ClientError) as caught:
            loads_object(data)
        self.assertEqual(caught.exception.status, 400)
        self.assertEqual(caught.exception.type, "invalid_request_error")
        return caught.exception.message

    def test_an_object_is_read(self):
        """A body is a dict, with text beyond ASCII and with escapes."""
        self.assertEqual(loads_object('{"a": [1, 2.5, "é\\u00e9", null]}'.encode()), {"a": [1, 2.5, "éé", None]})
        self.assertEqual(loads_object(b'{"a":{"a":1},"b":[{"a":2},{"a":2}]}')["b"], [{"a": 2}, {"a": 2}])

    def test_a_byte_order_mark_is_skipped_once(self):
        """PowerShell's mark is tolerated; a second one is no JSON."""
        self.assertEqual(loads_object(BOM + b"{}"), {})
        self.assertIn("line 1, column 1 (character 0)", self.refused(BOM + BOM + b"{}"))

    def test_every_kind_of_broken_body_is_a_plain_400(self):
        """Each message says what is wrong and, where it is known, the position."""
        for data, message in (
            (b"", "The request body is empty; a JSON object is needed."),
            (b" \r\n", "The request body is empty; a JSON object is needed."),
            (BOM, "The request body is empty; a JSON object is needed."),
            (b'{"a":\n 1,}', "at line 2, column "),
            (b'{"a" 1}', "Expecting ':' delimiter, at line 1, column 6 (character 5)."),
            (b'{"a":"\xff"}', "The request body is not UTF-8: byte 6 (invalid start byte)."),
            ('{"a":"\ud800"}'.encode("utf-8", "surrogatepass"), "not UTF-8: byte 6"),
            ('{"a":1}'.encode("utf-16"), "not UTF-8: byte 0"),
            (b'{"a":NaN}', "The request body is not valid JSON: NaN is not a JSON value."),
            (b'{"a":-Infinity}', "-Infinity is not a JSON value."),
            (b'{"a":1e999}', "The request body is not valid JSON: a number is too large."),
            (b'{"a":' + b"1" * 5000 + b"}", "The request body is not valid JSON: a number has too many digits."),
            (b'{"a":1,"a":1}', "The request body is not valid JSON: a name stands twice in one object."),
            (b'{"b":[{"a":1,"\\u0061":2}]}', "a name stands twice in one object."),
            (b"[]", "The request body must be a JSON object ({...})."),
            (b'"text"', "The request body must be a JSON object ({...})."),
            (b"{} {}", "Extra data, at line 1, column 4"),
        ):
            with self.subTest(data=data[:40]):
                self.assertIn(message, self.refused(data))

    def test_no_message_quotes_the_body(self):
        """What a client wrote does not end up in a log by way of an error."""
        self.assertNotIn("secret", self.refused(b'{"a": secret}'))

    def test_nesting_is_bounded(self):
        """The last level that is read, the first that is not, and depths that would end the parser."""
        inside = MAX_DEPTH - 1
        self.assertEqual(len(loads_object(b'{"a":' + b"[" * inside + b"]" * inside + b"}")), 1)
        for depth in (MAX_DEPTH, 900, 100_000, 2_000_000):
            for opened, closed in ((b"[", b"]"), (b'{"b":', b"}")):
                with self.subTest(depth=depth, opened=opened):
                    middle = b"1" if opened != b"[" else b""
                    message = self.refused(b'{"a":' + opened * depth + middle + closed * depth + b"}")
                    self.assertIn("nested too deeply", message)

    def test_both_kinds_of_nesting_count(self):
        """Half of the levels lists, half objects: as deep as either alone."""
        pairs = MAX_DEPTH // 2
        deepest = b'{"a":' * pairs + b"[" * (MAX_DEPTH - pairs) + b"]" * (MAX_DEPTH - pairs) + b"}" * pairs
        self.assertEqual(1, len(loads_object(deepest)))
        self.assertIn("nested too deeply", self.refused(deepest.replace(b"[]", b"[[]]")))
        self.assertIn("nested too deeply", self.refused(deepest.replace(b"[]", b'[{"b":[]}]')))
        long = b'"%b"' % (b"x" * 20_000)
        self.assertEqual(1, len(loads_object(deepest.replace(b"[]", b"[%b]" % long))))
        self.assertIn("nested too deeply", self.refused(deepest.replace(b"[]", b"[[%b]]" % long)))

    def test_many_containers_are_not_deep(self):
        """Width is no depth: a long history of messages passes."""
        body = {"messages": [{"content": [{"text": str(i)}]} for i in range(1000)]}
        self.assertEqual(loads_object(json.dumps(body).encode()), body)

    def test_a_servers_json_is_read_or_a_wire_error(self):
        """loads has one error for everything that can be wrong with a server's text."""
        self.assertEqual(loads(b'{"a":1e5}'), {"a": 1e5})
        for data in (b"", b"{", b"\xff", b"NaN", b"[" * 100_000, b"1" * 5000):
            with self.subTest(data=data[:10]), self.assertRaises(WireError):
                loads(data)

    def test_json_is_written_compact_and_unescaped(self):
        """No blanks, UTF-8 as it is."""
        self.assertEqual(dumps({"a": [1, "é\n"], "b": None}), b'{"a":[1,"\xc3\xa9\\n"],"b":null}')

    def test_json_is_written_without_the_encoder_in_c(self):
        """Where Python has none, or one that wants other arguments, the text is the same."""
        value = {"a": [1, 2.5, "é\n\ud800", None, True], "b": {}}
        for escape in (encode_basestring, encode_basestring_ascii):
            expected = json.dumps(value, ensure_ascii=escape is encode_basestring_ascii, separators=(",", ":"))
            self.assertEqual(expected, _encoder(escape)(value))
            for make in (None, mock.Mock(side_effect=TypeError)):
                with mock.patch("json.encoder.c_make_encoder", make):
                    encode = _encoder(escape)
                self.assertEqual(expected, encode(value))

    def test_lone_surrogates_survive_as_escapes(self):
        """What came as an escape leaves as one, since UTF-8 has no form for it."""
        body = loads_object(b'{"a":"x\\ud800\xc3\xa9","b":1}')
        self.assertEqual(dumps(body), b'{"a":"x\\ud800\\u00e9","b":1}')
        self.assertEqual(loads_object(dumps(body)), body)


SSE_CASES = {
    "line ends \\n": (b"data: {}\n\ndata: [DONE]\n\n", [b"{}", b"[DONE]"], None),
    "line ends \\r\\n": (b"data: {}\r\n\r\ndata: [DONE]\r\n\r\n", [b"{}", b"[DONE]"], None),
    "line ends \\r": (b"data: {}\r\rdata: [DONE]\r\r", [b"{}", b"[DONE]"], None),
    "mixed line ends": (b"data: a\r\n\ndata: b\r\r\ndata: c\n\r", [b"a", b"b", b"c"], None),
    "several data lines": (b"data: a\ndata: b\ndata:\ndata\n\n", [b"a\nb\n\n"], None),
    "several data lines, \\r\\n": (
        b"data: a\r\ndata: b\r\n\r\ndata: c\r\n: x\r\ndata: d\r\n\r\n",
        [b"a\nb", b"c\nd"],
        None,
    ),
    "several data lines, \\r": (b"data: a\rdata: b\r\rdata: c\r\r", [b"a\nb", b"c"], None),
    "no space, one space, two spaces": (b"data:a\n\ndata: b\n\ndata:  c\n\n", [b"a", b"b", b" c"], None),
    "other fields": (b"event: x\nid: 1\ndata: a\nretry: 5\nfoo\n\n", [b"a"], None),
    "a field that only begins like data": (b"database: a\n\ndat: b\n\n", [], None),
    "comments and pings": (b":\n\n: portway\n: more\ndata: a\n:\n\n:\n\n", [b"a"], None),
    "empty frames": (b"\n\n\ndata: a\n\n\n\n\ndata: b\n\n\n", [b"a", b"b"], None),
    "events without data": (b"event: ping\n\ndata:\n\ndata: \n\ndata: a\n\n", [b"a"], None),
    "byte order mark": (BOM + b"data: a\n\n", [b"a"], None),
    "byte order mark later on": (b"data: a\n\n" + BOM + b"data: b\n\n", [b"a"], None),
    "no space at the start": (b" data: a\n\n", [], None),
    "nothing": (b"", [], None),
    "ends in a comment": (b"data: a\n\n: bye\n", [b"a"], None),
    "last blank line missing": (b'data: a\n\ndata: {"b":1}\n', [b"a"], b'{"b":1}'),
    "last line end missing": (b"data: a\n\ndata: [DONE]", [b"a"], b"[DONE]"),
    "cut inside the data": (b'data: a\n\ndata: {"b":', [b"a"], "cut"),
    "cut inside a number": (b"data: 12", [], "cut"),
    "cut inside the field": (b"data: a\n\nda", [b"a"], "cut"),
    "cut before the data": (b"event: x\n", [], "cut"),
    "cut inside a byte order mark": (BOM[:2], [], "cut"),
    "bytes of a character": (b"data: \xe2\x82\xac\n\n", [b"\xe2\x82\xac"], None),
}


class Events(unittest.TestCase):
    def test_every_case_however_it_is_cut(self):
        """Whole, byte by byte and cut at each position, the same events and the same end."""
        for name, (data, events, end) in SSE_CASES.items():
            for pieces in cuts(data):
                with self.subTest(name, pieces=pieces):
                    self.assertEqual(fed(SSEReader(), pieces), (events, end))

    def test_an_event_is_given_as_soon_as_its_blank_line_is_in(self):
        """Nothing is held back until the next read, also after a CR that an LF may follow."""
        for end in (b"\n\n", b"\r\n\r\n", b"\r\r"):
            reader = SSEReader()
            blank = b"\r\n\r" if end == b"\r\n\r\n" else end
            self.assertEqual(reader.feed(b"data: a" + blank), [b"a"])

    def test_the_limit_is_the_largest_event(self):
        """An event of exactly the limit passes, one more byte does not, whatever the cut."""
        exact = b"data: " + b"x" * 14
        for pieces in cuts(exact + b"\n\n" + exact + b"\n\n"):
            self.assertEqual(fed(SSEReader(limit=20), pieces)[0], [b"x" * 14] * 2)
        for pieces in cuts(b"data: a\n\n" + exact + b"x\n\n"):
            with self.assertRaises(WireError):
                fed(SSEReader(limit=20), pieces)

    def test_an_endless_event_is_refused_before_it_ends(self):
        """A server that never sends the blank line can't fill the memory."""
        reader = SSEReader(limit=1000)
        with self.assertRaises(WireError):
            for _ in range(20):
                reader.feed(b"data: " + b"x" * 94)

    def test_a_written_event_is_read_back(self):
        """sse and DONE have the form that OpenAI's clients know."""
        self.assertEqual(sse(b'{"a":1}'), b'data: {"a":1}\n\n')
        self.assertEqual(DONE, b"data: [DONE]\n\n")
        self.assertEqual(SSEReader().feed(sse(b'{"a":1}') + DONE), [b'{"a":1}', b"[DONE]"])


NDJSON_CASES = {
    "lines": (b'{"a":1}\n{"b":2}\n', [b'{"a":1}', b'{"b":2}'], None),
    "line ends \\r\\n, blanks": (b' {"a":1} \r\n\r\n\n \n{"b":2}\r\n', [b'{"a":1}', b'{"b":2}'], None),
    "last line end missing": (b'{"a":1}\n{"b":2}', [b'{"a":1}'], b'{"b":2}'),
    "only blanks at the end": (b'{"a":1}\n \r', [b'{"a":1}'], None),
    "cut": (b'{"a":1}\n{"b":', [b'{"a":1}'], "cut"),
    "cut number": (b"12", [], "cut"),
    "nothing": (b"", [], None),
    "a separator that is no line end": ('{"a":"\u2028\x85"}\n'.encode(), ['{"a":"\u2028\x85"}'.encode()], None),
}


class Lines(unittest.TestCase):
    def test_every_case_however_it_is_cut(self):
        """Whole, byte by byte and cut at each position, the same lines and the same end."""
        for name, (data, lines, end) in NDJSON_CASES.items():
            for pieces in cuts(data):
                with self.subTest(name, pieces=pieces):
                    self.assertEqual(fed(NDJSONReader(), pieces), (lines, end))

    def test_the_limit_is_the_longest_line(self):
        """A line of exactly the limit passes, one more byte does not, whatever the cut."""
        for pieces in cuts(b"x" * 20 + b"\n" + b"y" * 20 + b"\n"):
            self.assertEqual(fed(NDJSONReader(limit=20), pieces)[0], [b"x" * 20, b"y" * 20])
        for pieces in cuts(b"x\n" + b"y" * 21 + b"\n"):
            with self.assertRaises(WireError):
                fed(NDJSONReader(limit=20), pieces)

    def test_an_endless_line_is_refused_before_it_ends(self):
        """A server that never ends its line can't fill the memory."""
        reader = NDJSONReader(limit=1000)
        with self.assertRaises(WireError):
            for _ in range(20):
                reader.feed(b"x" * 100)


class Cost(unittest.TestCase):
    def test_a_large_event_is_not_copied_at_each_of_its_pieces(self):
        """2 MB in pieces of 64 bytes: a copy each would be 30 GB, many seconds; without it is some hundredths."""
        readers: list[tuple[SSEReader | NDJSONReader, bytes, bytes]]
        readers = [(SSEReader(), b"data: ", b"\n\n"), (NDJSONReader(), b"", b"\n")]
        for reader, begin, end in readers:
            started = time.process_time()
            events = reader.feed(begin)
            for _ in range(32_768):
                events += reader.feed(b"x" * 64)
            events += reader.feed(end)
            self.assertLess(time.process_time() - started, 1.0)
            self.assertEqual([len(event) for event in events], [2_097_152])


if __name__ == "__main__":
    unittest.main()
