"""wire/http1.py against generated input: it agrees with h11, and how bytes are cut changes nothing."""

import unittest
from typing import Any

from portway.wire.http1 import (
    MAX_HEAD,
    BadMessage,
    Heads,
    Incoming,
    RequestHead,
    parse_request,
    parse_response,
)

try:
    import h11
    from hypothesis import given
    from hypothesis import strategies as st
except ImportError as exc:
    raise unittest.SkipTest(f"{exc.name} is not installed") from exc

from scripts.fuzz import decoded
from tests.hypotheses import effort

TOKEN = "!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# what requests are smuggled with, and what stands around it
PIECES = [
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"\x00",
    b"\x0b",
    b"\x7f",
    b"\xa0",
    b"0",
    b"5",
    b"a",
    b"/",
]
PIECES += [b"GET", b"POST", b" / HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"Host: a\r\n", b"Content-Length: 5\r\n", b"hello"]
PIECES += [b"Transfer-Encoding: chunked\r\n", b"Content-Length:", b"Transfer-Encoding:", b"chunked", b"identity"]
PIECES += [b"Connection: close\r\n", b"X : y\r\n", b" folded\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 ", b"204"]

soup = st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=3)), max_size=16).map(b"".join)
names = st.text(TOKEN, min_size=1, max_size=12)
values = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=20)
fields = st.lists(st.tuples(names, values), max_size=8)
paths = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#"), max_size=20).map(
    "/".__add__
)
payloads = st.lists(st.binary(min_size=1, max_size=30), max_size=6)
quickly = effort(400)


def theirs(data: bytes) -> Any:
    """What h11, as a server, makes of a request's head: the Request, or None for what it refuses."""
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * MAX_HEAD)
    server.receive_data(data)
    try:
        event = server.next_event()
    except h11.RemoteProtocolError:
        return None
    return event if isinstance(event, h11.Request) else None


def ours(data: bytes) -> Any:
    head, end, _ = data.partition(b"\r\n\r\n")
    try:
        return parse_request(head) if end else None
    except BadMessage:
        return None


def cut(data: bytes, positions: list[int]) -> list[bytes]:
    at = sorted({position % (len(data) + 1) for position in positions})
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


def coded(payload: list[bytes], extension: bytes = b"") -> bytes:
    return b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in payload) + b"0\r\n\r\n"


class Requests(unittest.TestCase):
    @given(st.text(TOKEN, min_size=1, max_size=10), paths, fields, st.sampled_from(["", "0", "5", "17"]))
    @quickly
    def test_a_valid_request_is_read_as_h11_reads_it(self, method, path, others, length):
        """Method, target and every header."""
        lines = [f"{method} {path} HTTP/1.1", "Host: a", *(f"X{name}: {value}" for name, value in others)]
        lines += [f"Content-Length: {length}"] if length else []
        data = "\r\n".join([*lines, "", ""]).encode("latin-1")
        head, event = ours(data), theirs(data)
        self.assertIsNotNone(event)
        self.assertIsNotNone(head)
        target = head.path + (f"?{head.query}" if "?" in path else "")
        self.assertEqual((event.method.decode(), event.target.decode()), (head.method, target))
        expected: dict[str, list[str]] = {}
        for name, value in event.headers:
            expected.setdefault(name.decode(), []).append(value.decode("latin-1"))
        self.assertEqual({name: ", ".join(found) for name, found in expected.items()}, head.headers)
        self.assertEqual(int(length) if length else None, head.length)

    @given(soup)
    @quickly
    def test_what_is_taken_here_is_taken_by_h11(self, middle):
        """Strict as h11 at least: no soup of dangerous bytes is a request here alone, or one of another length."""
        for data in (middle + b"\r\n\r\n", b"POST / HTTP/1.1\r\nHost: a\r\n" + middle + b"\r\n\r\n"):
            head = ours(data)
            if head is None or data.startswith(b"\r\n"):
                continue  # an empty line ahead is the connection's matter
            event = theirs(data)
            self.assertIsNotNone(event, data)
            found = dict(event.headers)
            self.assertEqual(found.get(b"content-length"), None if head.length is None else b"%d" % head.length, data)
            self.assertEqual(b"transfer-encoding" in found, head.chunked, data)

    @given(soup)
    @quickly
    def test_nothing_else_is_ever_raised(self, data):
        """Whatever comes in is a head or a BadMessage."""
        for parse in (parse_request, parse_response):
            for head in (data, b"GET / HTTP/1.1\r\nHost: a\r\n" + data, b"HTTP/1.1 200 OK\r\n" + data):
                try:
                    parse(head)
                except BadMessage as exc:
                    self.assertIn(exc.status, (400, 431, 501, 505))


def without_length(head: RequestHead) -> RequestHead:
    """The header itself is 0 in a head that is remembered; what counts is `length`."""
    return head._replace(headers={name: value for name, value in head.headers.items() if name != "content-length"})


class Remembered(unittest.TestCase):
    @given(st.lists(st.tuples(soup, st.sampled_from(["", "0", "5", "17", "007", "9" * 18, "9" * 19])), max_size=4))
    @quickly
    def test_a_head_that_is_remembered_is_the_one_that_was_sent(self, heads):
        """Whatever came before it, and with whichever Content-Length: the same head, or as well refused."""
        memory = Heads(parse_request)
        for middle, length in heads * 2:
            line = f"Content-Length: {length}\r\n".encode() if length else b""
            for head in (
                b"POST / HTTP/1.1\r\nHost: a\r\n" + line + middle,
                b"POST / HTTP/1.1\r\n" + middle + line + b"Host: a",
            ):
                try:
                    expected = parse_request(head)
                except BadMessage:
                    with self.assertRaises(BadMessage, msg=head):
                        memory.read(head)
                else:
                    kind, own = memory.read(head)
                    found = kind if own is None else kind._replace(length=own)
                    self.assertEqual(without_length(expected), without_length(found), head)


class Chunks(unittest.TestCase):
    @given(payloads, st.sampled_from([b"", b";a", b' ; a="b"']), st.lists(st.integers(0, 400)), st.binary(max_size=5))
    @quickly
    def test_a_valid_body_comes_out_whole(self, payload, extension, positions, behind):
        """Whatever it was cut into on its way, with what is behind it."""
        data = coded(payload, extension) + behind
        self.assertEqual((b"".join(payload), True, behind), decoded(cut(data, positions)))

    @given(payloads, soup, st.integers(0, 400), st.lists(st.integers(0, 400)))
    @quickly
    def test_the_verdict_does_not_depend_on_the_cut(self, payload, dirt, position, positions):
        """Also for broken bodies: refused or not, the payload, the end."""
        data = coded(payload)
        position %= len(data) + 1
        data = data[:position] + dirt + data[position:]
        self.assertEqual(decoded([data]), decoded(cut(data, positions)), data)
        self.assertEqual(decoded([data]), decoded([data[i : i + 1] for i in range(len(data))]), data)

    @given(payloads, soup, st.integers(0, 400))
    @quickly
    def test_what_is_taken_here_h11_decodes_alike(self, payload, dirt, position):
        """No body is longer or shorter here than there."""
        data = coded(payload)
        position %= len(data) + 1
        data = data[:position] + dirt + data[position:]
        found = decoded([data])
        if found is None or not found[1]:
            return
        server = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * MAX_HEAD)
        server.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
        server.next_event()
        body = b""
        while isinstance(event := server.next_event(), h11.Data):
            body += bytes(event.data)
        self.assertIsInstance(event, h11.EndOfMessage)
        self.assertEqual((body, server.trailing_data[0]), (found[0], found[2]), data)

    @given(st.binary(max_size=40), soup, st.integers(0, 60), st.lists(st.integers(0, 100)), st.booleans())
    @quickly
    def test_a_body_never_takes_the_next_requests_bytes(self, body, behind, limit, positions, chunked):
        """Taken or refused for its size: where the message ends, the next one begins, or the connection ends."""
        head = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
        incoming = Incoming(parse_request(b"POST / HTTP/1.1\r\nHost: a\r\n" + head), limit)
        data = coded([body] if body else []) if chunked else body
        rest = b"".join([incoming.feed(piece) for piece in cut(data + behind, positions)])
        self.assertTrue(incoming.complete)
        self.assertEqual(len(body) > limit, incoming.refusal is not None)
        if not incoming.poisoned:
            self.assertEqual(behind, rest)
        if not incoming.refusal:
            self.assertEqual(body, incoming.body)


if __name__ == "__main__":
    unittest.main()
