"""wire/http1.py: which bytes are HTTP/1.1, where a message ends, and what becomes of a refused body."""

import unittest
from collections.abc import Iterator

from portway.errors import ClientError
from portway.wire.http1 import (
    MAX_CHUNK_LINE,
    MAX_EXTENSIONS,
    MAX_FIELDS,
    MAX_HEAD,
    MAX_UNREAD,
    BadMessage,
    ChunkedDecoder,
    Incoming,
    RequestHead,
    as_client_error,
    field_lines,
    parse_request,
    parse_response,
)

SDK = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:11436\r\nAccept-Encoding: gzip, deflate\r\n"
    b"Connection: keep-alive\r\nContent-Type: application/json\r\nUser-Agent: OpenAI/Python 1.99.1\r\n"
    b"X-Stainless-Lang: python\r\nAuthorization: Bearer sk-portway\r\nContent-Length: 123"
)


def get(*fields: bytes, minor: bytes = b"1", line: bytes = b"") -> bytes:
    """A request's head with a Host and with these fields."""
    return b"\r\n".join((line or b"GET /health HTTP/1." + minor, b"Host: localhost", *fields))


def answer(*fields: bytes, line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((line, *fields))


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """`data` whole, byte by byte, cut in two at every position, and in three around it."""
    yield [data]
    yield [data[i : i + 1] for i in range(len(data))]
    for i in range(len(data) + 1):
        yield [data[:i], data[i:]]
        yield [data[:i], b"", data[i : i + 2], data[i + 2 :]]


class HeadCase(unittest.TestCase):
    def refused(self, head: bytes, status: int = 400) -> str:
        with self.assertRaises(BadMessage, msg=head) as caught:
            parse_request(head)
        self.assertEqual(status, caught.exception.status, head)
        return str(caught.exception)

    def bad_answer(self, head: bytes) -> str:
        with self.assertRaises(BadMessage, msg=head) as caught:
            parse_response(head)
        return str(caught.exception)


class RequestLines(HeadCase):
    def test_a_head_of_the_sdk_is_read(self):
        """Every part of a real client's head is where it belongs."""
        head = parse_request(SDK)
        self.assertEqual(("POST", "/v1/chat/completions", "", 1), head[:4])
        self.assertEqual((123, False, True), (head.length, head.chunked, head.keep_alive))
        self.assertEqual(
            {
                "host": "127.0.0.1:11436",
                "accept-encoding": "gzip, deflate",
                "connection": "keep-alive",
                "content-type": "application/json",
                "user-agent": "OpenAI/Python 1.99.1",
                "x-stainless-lang": "python",
                "authorization": "Bearer sk-portway",
                "content-length": "123",
            },
            head.headers,
        )

    def test_the_target_is_split_at_the_first_question_mark(self):
        """Path and query are handed on as they came."""
        for target, path, query in (
            (b"/", "/", ""),
            (b"/a?b=c", "/a", "b=c"),
            (b"/a?b?c", "/a", "b?c"),
            (b"/a?", "/a", ""),
            (b"/%2e%2e/a%00", "/%2e%2e/a%00", ""),
            (b"//a/../b", "//a/../b", ""),  # no route has such a path
        ):
            head = parse_request(get(line=b"GET " + target + b" HTTP/1.1"))
            self.assertEqual((path, query), (head.path, head.query))

    def test_any_token_is_a_method(self):
        """An unknown one is a matter of the route table."""
        for method in ("GET", "QUERY", "get", "M-SEARCH", "!#$%&'*+-.^_`|~09aZ"):
            self.assertEqual(method, parse_request(get(line=method.encode() + b" / HTTP/1.1")).method)

    def test_broken_request_lines_are_refused(self):
        """One space between three words, a method that is a token, a target that is a path."""
        for line in (
            b"",
            b"GET",
            b"GET /",
            b"GET  / HTTP/1.1",
            b" GET / HTTP/1.1",
            b"GET / HTTP/1.1 ",
            b"GET / x HTTP/1.1",
            b"GET\t/\tHTTP/1.1",
            b"G\x00T / HTTP/1.1",
            b"G(T / HTTP/1.1",
            b"G\xc3T / HTTP/1.1",
            b"GET /\x00 HTTP/1.1",
            b"GET /\x7f HTTP/1.1",
            b"GET /\xc3\xa9 HTTP/1.1",
            b"GET /a\rb HTTP/1.1",
            b"GET /a\nb HTTP/1.1",
            b"GET / HTTP/1.1\rX: y",
            b"GET / HTTP/1.1\nX: y",
            b"GET http://localhost/ HTTP/1.1",
            b"GET * HTTP/1.1",
            b"OPTIONS * HTTP/1.1",
            b"CONNECT localhost:80 HTTP/1.1",
            b"GET ?a HTTP/1.1",
            b"GET /a#b HTTP/1.1",
            b"GET /a?b#c HTTP/1.1",
            b"GET / http/1.1",
            b"GET / HTP/1.1",
            b"GET / HTTP",
        ):
            self.refused(line + b"\r\nHost: localhost")

    def test_other_versions_are_505(self):
        """HTTP/2 by prior knowledge, HTTP/0.9 and what does not exist."""
        for line in (
            b"PRI * HTTP/2.0",
            b"GET / HTTP/0.9",
            b"GET / HTTP/1.2",
            b"GET / HTTP/1.10",
            b"GET / HTTP/1.",
            b"GET / HTTP/",
        ):
            self.refused(line + b"\r\nHost: localhost", 505)

    def test_http_1_1_needs_a_host(self):
        """HTTP/1.0 does not; an empty one is none, and which machine was meant is not known."""
        self.refused(b"GET / HTTP/1.1")
        self.refused(b"GET / HTTP/1.1\r\nX-Host: a")
        self.refused(b"GET / HTTP/1.1\r\nHost:")
        self.refused(b"GET / HTTP/1.0\r\nHost: \t")
        self.assertEqual({}, parse_request(b"GET / HTTP/1.0").headers)


class Fields(HeadCase):
    def test_names_are_lower_case_and_values_bare(self):
        """Spaces and tabs around a value are not part of it, those inside are; a colon may be."""
        head = parse_request(get(b"X-A: \t b \t c: d\t ", b"x-B:", b"X-c:e", b"!#$%&'*+-.^_`|~0Z: 1"))
        self.assertEqual("b \t c: d", head.headers["x-a"])
        self.assertEqual("", head.headers["x-b"])
        self.assertEqual("e", head.headers["x-c"])
        self.assertEqual("1", head.headers["!#$%&'*+-.^_`|~0z"])

    def test_bytes_beyond_ascii_are_latin_1(self):
        """No header can fail to decode; a no-break space is no space."""
        self.assertEqual("\xe9\xa0", parse_request(get(b"X-A: \xe9\xa0")).headers["x-a"])

    def test_repeated_fields_are_joined(self):
        """In their order."""
        self.assertEqual("1, 2, 3", parse_request(get(b"A: 1", b"a:2", b"A: 3")).headers["a"])

    def test_fields_that_must_stand_alone_do(self):
        """Twice is a message that two readers understand differently, also when both say the same."""
        for name in (
            b"Host",
            b"Content-Length",
            b"Transfer-Encoding",
            b"Content-Type",
            b"Authorization",
            b"Origin",
            b"Expect",
        ):
            self.assertIn("two ", self.refused(b"POST / HTTP/1.1\r\nHost: a\r\n%b: 1\r\n%b: 1" % (name, name.lower())))

    def test_an_answer_may_repeat_its_date(self):
        """Servers on uvicorn that hand on headers do; it means nothing to us."""
        self.assertEqual("1, 1", parse_response(answer(b"Date: 1", b"Date: 1")).headers["date"])

    def test_broken_fields_are_refused(self):
        """Names are tokens right up to the colon; no folding; no control characters; no bare CR or LF."""
        for field in (
            b"",
            b"X",
            b":",
            b": a",
            b"X : a",
            b"X\t: a",
            b" X: a",
            b"\tfolded",
            b" folded: a",
            b"X(: a",
            b"X\xe9: a",
            b"X\x00: a",
            b"X: a\x00",
            b"X: a\x0b",
            b"X: a\x1b[2J",
            b"X: a\x7f",
            b"X: a\rb",
            b"X: a\nb: c",
            b"X: a\rb\nc",
            b"X: a\r",
            b"X: a\n",
            b"\nX: a",
            b"\rX: a",
            b"X: a\n\rY: b",
            b"X: a\r\r\nY: b",
        ):
            self.refused(get(field))
            self.refused(get(field, b"Y: z"))
            self.bad_answer(answer(b"Z: y", field, b"Y: z"))

    def test_their_number_is_bounded(self):
        """431 says what is wrong."""
        fields = [b"X-%d: a" % number for number in range(MAX_FIELDS - 1)]
        self.assertEqual(MAX_FIELDS, len(parse_request(get(*fields)).headers))
        self.refused(get(*fields, b"Y: a"), 431)

    def test_a_head_is_bounded(self):
        """Also one that came in a single piece, with its end."""
        self.assertEqual("/", parse_request(get(b"X: " + b"a" * (MAX_HEAD - 50))).path[:1])
        self.refused(get(b"X: " + b"a" * MAX_HEAD), 431)

    def test_what_is_sent_stays_on_its_line(self):
        """No value, wherever it came from, begins a header of its own; the rest of it is shown."""
        lines = field_lines({"X-A": "a\r\nX-Evil: 1", "X-B": "\x1b[2J\x00b\x85", "X-C": "\xe9 plain"})
        self.assertEqual(["X-A: a  X-Evil: 1\r\n", "X-B:  [2J b \r\n", "X-C: \xe9 plain\r\n"], lines)


class Framing(HeadCase):
    def test_the_length_is_digits(self):
        """Zeros in front are; no sign, no list, no other base or script."""
        for value, length in ((b"0", 0), (b"5", 5), (b"005", 5), (b"9" * 18, 10**18 - 1)):
            self.assertEqual(length, parse_request(get(b"Content-Length: " + value)).length)
        for value in (
            b"",
            b"+5",
            b"-5",
            b"5, 5",
            b"5,5",
            b"5 5",
            b"0x5",
            b"5.0",
            b"1e3",
            b"5;",
            b"\xb2",
            b"9" * 19,
            b"5_0",
        ):
            self.refused(get(b"Content-Length: " + value))

    def test_without_a_length_there_is_no_body(self):
        """In a request; a POST may well have none."""
        head = parse_request(get(line=b"POST / HTTP/1.1"))
        self.assertEqual((None, False), (head.length, head.chunked))

    def test_chunked_is_the_only_coding(self):
        """In any case of letters; whatever else is 501, also where it ends in chunked."""
        for value in (b"chunked", b"Chunked", b"CHUNKED\t"):
            head = parse_request(get(b"Transfer-Encoding: " + value))
            self.assertEqual((None, True), (head.length, head.chunked))
        for value in (
            b"",
            b"gzip",
            b"gzip, chunked",
            b"chunked, chunked",
            b"identity",
            b"chunked;q=1",
            b"xchunked",
            b"\xa0chunked",
        ):
            self.refused(get(b"Transfer-Encoding: " + value), 501)

    def test_both_lengths_are_refused(self):
        """In either order, in requests and in answers."""
        both = (b"Content-Length: 5", b"Transfer-Encoding: chunked")
        for fields in (both, both[::-1], (b"Content-Length: 0", b"Transfer-Encoding: identity")):
            self.refused(get(*fields))
            self.bad_answer(answer(*fields))

    def test_http_1_0_knows_no_coding(self):
        """A proxy that speaks it would not have read the body."""
        self.refused(get(b"Transfer-Encoding: chunked", minor=b"0"))
        self.bad_answer(answer(b"Transfer-Encoding: chunked", line=b"HTTP/1.0 200 OK"))

    def test_who_keeps_the_connection(self):
        """HTTP/1.1 unless told to close, HTTP/1.0 only when told to keep it; close wins."""
        for minor, connection, keeps in (
            (b"1", b"", True),
            (b"1", b"keep-alive", True),
            (b"1", b"Close", False),
            (b"1", b"upgrade , close", False),
            (b"1", b"keep-alive, close", False),
            (b"1", b"closed", True),
            (b"0", b"", False),
            (b"0", b"Keep-Alive", True),
            (b"0", b"te, keep-alive", True),
            (b"0", b"keep-alive, close", False),
        ):
            self.assertEqual(
                keeps, parse_request(get(b"Connection: " + connection, minor=minor)).keep_alive, connection
            )


class Answers(HeadCase):
    def test_status_lines(self):
        """The reason may be anything that is text, or missing with its space."""
        for line, status in (
            (b"HTTP/1.1 200 OK", 200),
            (b"HTTP/1.1 200 ", 200),
            (b"HTTP/1.1 200", 200),
            (b"HTTP/1.0 404 Not Found", 404),
            (b"HTTP/1.1 599 \xe9\t!", 599),
            (b"HTTP/1.1 100 Continue", 100),
        ):
            self.assertEqual(status, parse_response(line).status)

    def test_what_is_no_status_line(self):
        """Garbage, other protocols, numbers that are no status, control characters."""
        for line in (
            b"",
            b"H",
            b"garbage",
            b"HTTP/1.1",
            b"HTTP/1.1 ",
            b"HTTP/1. 200 OK",
            b"HTTP/1.1  200 OK",
            b"HTTP/1.1 20",
            b"HTTP/1.1 20 OK",
            b"HTTP/1.1 2000 OK",
            b"HTTP/1.1 200OK",
            b"HTTP/1.1 099 OK",
            b"HTTP/1.1 600 OK",
            b"HTTP/1.1 +20 OK",
            b"HTTP/1.1 \xb2\xb2\xb2 OK",
            b"HTTP/2 200",
            b"HTTP/1.2 200 OK",
            b"http/1.1 200 OK",
            b"ICY 200 OK",
            b"HTTP/1.1 200 OK\nX: y",
            b"HTTP/1.1 200 O\x00K",
            b"HTTP/1.1 200 OK\x1b[2J",
        ):
            self.bad_answer(line)
            self.bad_answer(line + b"\r\nContent-Length: 0")

    def test_where_the_body_ends(self):
        """By its length, by its chunks, with the connection; some statuses have none."""
        for head, length, chunked, keeps in (
            (answer(b"Content-Length: 5"), 5, False, True),
            (answer(b"Transfer-Encoding: chunked"), None, True, True),
            (answer(), None, False, False),
            (answer(b"Connection: keep-alive"), None, False, False),
            (answer(b"Content-Length: 5", b"Connection: close"), 5, False, False),
            (answer(b"Content-Length: 5", line=b"HTTP/1.0 200 OK"), 5, False, False),
            (answer(b"Content-Length: 5", b"Connection: keep-alive", line=b"HTTP/1.0 200 OK"), 5, False, True),
            (answer(b"Content-Length: 5", line=b"HTTP/1.1 304 Not Modified"), 0, False, True),
            (answer(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 204 No Content"), 0, False, True),
            (answer(line=b"HTTP/1.1 103 Early Hints"), 0, False, True),
            # llama-server's router: a chunked answer that names both
            (answer(b"Connection: close", b"Keep-Alive: timeout=5", b"Transfer-Encoding: chunked"), None, True, False),
        ):
            found = parse_response(head)
            self.assertEqual((length, chunked, keeps), (found.length, found.chunked, found.keep_alive), head)

    def test_headers_without_a_value(self):
        """llama-server sends one with every answer."""
        self.assertEqual(
            "", parse_response(answer(b"Access-Control-Allow-Origin: ")).headers["access-control-allow-origin"]
        )

    def test_client_errors(self):
        """What a server answers bytes with that it can't read."""
        error = as_client_error(BadMessage("no", 431))
        self.assertEqual((431, "bad_http"), (error.status, error.code))
        self.assertIn("no", error.message)


class Chunks(unittest.TestCase):
    def decoded(self, pieces: list[bytes]) -> tuple[bytes, bool, bytes]:
        """(payload, done, rest), fed as a body is: what comes behind the end is not fed any more."""
        decoder = ChunkedDecoder()
        payload, behind = b"", b""
        for piece in pieces:
            if decoder.done:
                behind += piece
            else:
                payload += decoder.feed(piece)
        return payload, decoder.done, decoder.rest + behind

    def fails(self, pieces: list[bytes]) -> bool:
        try:
            self.decoded(pieces)
        except BadMessage:
            return True
        return False

    def test_however_it_is_cut(self):
        """The payload, the end and what is behind it are the same for every cut."""
        for data, expected in (
            (b"0\r\n\r\n", (b"", True, b"")),
            (b"5\r\nhello\r\n0\r\n\r\n", (b"hello", True, b"")),
            (b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\nGET /", (b"hello world", True, b"GET /")),
            (b"2\r\n\r\n\r\n1\r\n\r\r\n0\r\n\r\n\r\n", (b"\r\n\r", True, b"\r\n")),
            (b"00A\r\n0123456789\r\n000\r\n\r\n", (b"0123456789", True, b"")),
            (b'a;x\r\n0123456789\r\n1 ; x="y"\r\n.\r\n0;z=\xe9\r\n\r\n', (b"0123456789.", True, b"")),
            (b"0\r\nX-Sum: 1\r\ny:\r\n\r\n0\r\n\r\n", (b"", True, b"0\r\n\r\n")),
            (b"5\r\nhel", (b"hel", False, b"")),
            (b"5\r\nhello", (b"hello", False, b"")),
            (b"5\r\nhello\r", (b"hello", False, b"")),
            (b"5\r\nhello\r\n0\r\n", (b"hello", False, b"")),
            (b"5\r\nhello\r\n0\r\nX: y\r\n", (b"hello", False, b"")),
            (b"1" * 15, (b"", False, b"")),
        ):
            for pieces in cuts(data):
                self.assertEqual(expected, self.decoded(pieces), pieces)

    def test_what_is_refused_however_it_is_cut(self):
        """Sizes that are none, chunks of another length, bare CR and LF, control characters, broken trailers."""
        for data in (
            b"\r\n",
            b"g\r\n",
            b"-1\r\n",
            b"+1\r\n",
            b"0x1\r\n",
            b"1_0\r\n",
            b" 1\r\n",
            b"1 \r\n",
            b"1 1\r\n",
            b";x\r\n",
            b"\xb2\r\n",
            b"1" * 16 + b"\r\n",
            b"5\n",
            b"5\nhello\r\n",
            b"5\rx\r\n",
            b"5;\x00\r\n",
            b"5;a\nb\r\n",
            b"5;a\rb\r\n",
            b"5\r\nhello!",
            b"5\r\nhello\n",
            b"5\r\nhello\rx",
            b"5\r\nhell\r\n0\r\n\r\n",
            b"5\r\nhello0\r\n\r\n",
            b"0\r\n\n",
            b"0\r\nX: a\nb\r\n\r\n",
            b"0\r\nX: a\rb\r\n\r\n",
            b"0\r\nX: \x00\r\n\r\n",
            b"0\r\nGET / HTTP/1.1\r\n\r\n",
            b"0\r\n folded\r\n\r\n",
            b"0\r\nX : y\r\n\r\n",
            b"0\r\n: y\r\n\r\n",
        ):
            for pieces in cuts(data):
                self.assertTrue(self.fails(pieces), pieces)

    def test_the_size_line_is_bounded(self):
        """To the byte, wherever it is cut; and a line that never ends is not waited for."""
        line = b"1;" + b"x" * (MAX_CHUNK_LINE - 2)
        for pieces in ([line + b"\r\na"], [line, b"\r\na"], [line + b"\r", b"\na"]):
            self.assertEqual((b"a", False, b""), self.decoded(pieces))
        for pieces in ([line + b"x\r\na"], [line + b"x", b"\r\na"], [line + b"x\r", b"\na"], [line + b"xx"]):
            self.assertTrue(self.fails(pieces))

    def test_all_extensions_together_are_bounded(self):
        """Else a byte of payload could cost a kilobyte of them, without an end."""
        one = b"1;" + b"x" * 999 + b"\r\na\r\n"
        fits = MAX_EXTENSIONS // 1000
        self.assertEqual(b"a" * fits, self.decoded([one * fits])[0])
        self.assertTrue(self.fails([one] * (fits + 1)))

    def test_the_trailers_are_bounded(self):
        """To the byte, one long or many short ones, wherever they are cut."""
        long = b"X: " + b"y" * (MAX_HEAD - 5)
        for pieces in (
            [b"0\r\n", long, b"\r\n\r\n"],
            [b"0\r\n" + long + b"\r", b"\n\r\n"],
            [b"0\r\n" + long + b"\r\n\r\n"],
        ):
            self.assertEqual((b"", True, b""), self.decoded(pieces))
        for pieces in (
            [b"0\r\n", long + b"y", b"\r\n\r\n"],
            [b"0\r\n" + long + b"y\r\n\r\n"],
            [b"0\r\n", b"y" * MAX_HEAD, b"y"],
        ):
            self.assertTrue(self.fails(pieces))
        self.assertTrue(self.fails([b"0\r\n", *[b"X: y\r\n"] * (MAX_HEAD // 6 + 1)]))
        self.assertTrue(self.fails([b"0\r\nX: y\r\n" + b"X" * (MAX_HEAD - 5)]))


class Bodies(unittest.TestCase):
    def incoming(self, length: int | None = None, limit: int = 10**6, *, chunked: bool = False) -> Incoming:
        return Incoming(RequestHead("POST", "/", "", 1, {}, length, chunked, True), limit)

    def test_no_body(self):
        """It is complete at once, and all bytes belong to the next request."""
        for length in (None, 0):
            incoming = self.incoming(length)
            self.assertTrue(incoming.complete)
            self.assertEqual(b"GET", incoming.feed(b"GET"))
            self.assertEqual(b"", incoming.body)

    def test_a_body_with_a_length(self):
        """However it is cut; what is behind it is the next request's."""
        for pieces in cuts(b"hello worldGET /"):
            incoming = self.incoming(11)
            rest = b"".join([incoming.feed(piece) for piece in pieces])
            self.assertEqual((b"hello world", b"GET /"), (incoming.body, rest))
            self.assertTrue(incoming.complete)
            self.assertFalse(incoming.poisoned)

    def test_a_chunked_body(self):
        """The same."""
        for pieces in cuts(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\nGET /"):
            incoming = self.incoming(chunked=True)
            rest = b"".join([incoming.feed(piece) for piece in pieces])
            self.assertEqual((b"hello world", b"GET /"), (incoming.body, rest))
            self.assertTrue(incoming.complete)
            self.assertFalse(incoming.poisoned)

    def test_an_unfinished_body(self):
        """It goes on being waited for, until somebody gives up; then the connection is of no more use."""
        for incoming, part in ((self.incoming(6), b"hello"), (self.incoming(chunked=True), b"5\r\nhello")):
            self.assertEqual(b"", incoming.feed(part))
            self.assertEqual(b"hello", incoming.body)
            self.assertFalse(incoming.complete)
            incoming.give_up()
            self.assertTrue(incoming.complete and incoming.poisoned)

    def test_giving_up_a_whole_one_changes_nothing(self):
        """Where the next request begins is known."""
        incoming = self.incoming(1)
        incoming.feed(b"x")
        incoming.give_up()
        self.assertFalse(incoming.poisoned)

    def test_a_small_refused_body_is_read_and_dropped(self):
        """So that the connection can live on behind a 401, say."""
        for length in (1, MAX_UNREAD):
            incoming = self.incoming(length)
            incoming.refuse(ClientError("no"))
            self.assertFalse(incoming.complete)
            self.assertEqual(b"GET", incoming.feed(b"x" * length + b"GET"))
            self.assertEqual((b"", True, False), (incoming.body, incoming.complete, incoming.poisoned))

    def test_any_other_refused_body_is_not_waited_for(self):
        """It may be endless: the answer goes out at once, and then the connection closes."""
        for incoming in (self.incoming(MAX_UNREAD + 1), self.incoming(chunked=True)):
            incoming.refuse(ClientError("no"))
            self.assertTrue(incoming.complete and incoming.poisoned)

    def test_the_first_refusal_stands(self):
        """A later one may be but its consequence."""
        incoming = self.incoming(10)
        first = ClientError("first")
        incoming.refuse(first)
        incoming.refuse(ClientError("second"))
        self.assertIs(first, incoming.refusal)

    def test_a_body_that_says_it_is_too_large(self):
        """413 before a byte of it is read."""
        self.assertIsNone(self.incoming(10**6).refusal)
        incoming = self.incoming(10**6 + 1)
        assert incoming.refusal is not None
        self.assertEqual((413, "body_too_large"), (incoming.refusal.status, incoming.refusal.code))
        self.assertTrue(incoming.complete and incoming.poisoned)

    def test_too_large_for_a_small_limit(self):
        """A body beyond the limit but small enough to be read ends where it ends, for every cut."""
        for pieces in cuts(b"hello worldGET /"):
            incoming = self.incoming(11, limit=4)
            rest = b"".join([incoming.feed(piece) for piece in pieces])
            assert incoming.refusal is not None
            self.assertEqual((413, b"GET /", b""), (incoming.refusal.status, rest, incoming.body))
            self.assertEqual((True, False), (incoming.complete, incoming.poisoned))

    def test_a_chunked_body_past_the_limit(self):
        """It is refused as soon as it is too large, and never kept."""
        incoming = self.incoming(limit=10, chunked=True)
        incoming.feed(b"a\r\n0123456789\r\n")
        self.assertIsNone(incoming.refusal)
        incoming.feed(b"1\r\n0")
        assert incoming.refusal is not None
        self.assertEqual(413, incoming.refusal.status)
        self.assertEqual((True, True, b""), (incoming.complete, incoming.poisoned, incoming.body))

    def test_broken_chunks_are_the_callers_to_answer(self):
        """BadMessage goes through; refused, the body is given up."""
        incoming = self.incoming(chunked=True)
        with self.assertRaises(BadMessage) as caught:
            incoming.feed(b"x\r\n")
        incoming.refuse(as_client_error(caught.exception))
        self.assertTrue(incoming.complete and incoming.poisoned)

    def test_a_broken_head(self):
        """It is answered at once, and the connection closes."""
        incoming = Incoming.broken(BadMessage("no", 505))
        assert incoming.refusal is not None
        self.assertEqual((505, True, True), (incoming.refusal.status, incoming.complete, incoming.poisoned))


if __name__ == "__main__":
    unittest.main()
