"""What attackers send, as data: hosts, origins, framings, bodies. Who judges the answers is attacks.py.

The framings follow RFC 9112 and cpython#150499 (what the standard library's own server lets through). A
`Framing` is the bytes of one or more requests and what an honest server makes of them: either as many answers
as it names, or one refusal and the end of the connection. Whatever hides in a body is a request for
`/v1/models/smuggled`, so that its being served would show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# --- DNS rebinding and web pages ------------------------------------------------------------------

FOREIGN_HOSTS = (
    "evil.example",
    "evil.example:11436",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "127.0.0.1.nip.io:11436",
    "notlocalhost",
    "localhost.",
    "localhost@evil.example",
    "localhost:evil.example",
    "localhost:11436:80",
    "localhost:\xb2",  # a digit to str.isdigit(), and to nobody else
    "xlocalhost",
    "evil",
    "0.0.0.0",  # noqa: S104 - what some browsers let a page call in place of loopback
    "0.0.0.0:11436",
    "192.168.1.5",
    "10.0.0.1:11436",
    "127.0.0.256",
    "127...1",
    "127.0.0.1.",
    "2130706433",
    "0x7f000001",
    "[::]",
    "[::ffff:10.0.0.1]",
    "[fe80::1]:11436",
    "[::1",
    "[::1]evil.example",
    "[evil.example:1]",
    "::1",
    ":11436",
)
OWN_HOSTS = (
    "localhost",
    "LOCALHOST:1",
    "localhost:65535",
    "127.0.0.1",
    "127.0.0.1:80",
    "127.1.2.3:11436",
    "[::1]",
    "[::1]:11436",
    "app.localhost",
    "a.b.localhost:3000",
)
FOREIGN_ORIGINS = (
    "https://evil.example",
    "http://evil.example:11436",
    "null",
    "file://",
    "http://localhost",
    "http://localhost:3001",
    "http://127.0.0.1",
    "https://localhost:11436",
    "chrome-extension://abcdefghijklmnop",
    "*",
    "",
)
FOREIGN_SITES = ("cross-site", "same-site", "Cross-Site", "none, cross-site", "anything", "")
FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain;charset=UTF-8", "")

# every kind of path, and every method that a browser can be made to send
PATHS = (
    "/",
    "/health",
    "/metrics",
    "/v1/models",
    "/v1/models/x",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/portway/residency",
    "/portway/load",
    "/portway/unload",
    "/api/tags",
    "/nowhere",
)
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH")

# what some server behind Portway has, and nobody may reach through it
FOREIGN_PATHS = (
    "/api/tags",
    "/api/pull",
    "/api/push",
    "/api/create",
    "/api/delete",
    "/api/chat",
    "/api/generate",
    "/v1/api/tags",
    "/props",
    "/slots",
    "/slots/0?action=erase",
    "/lora-adapters",
    "/completion",
    "/infill",
    "/models/load",
    "/upstream/fast/props",
    "/unload",
    "/v1/responses",
    "/v1/files",
    "/v1/models/../../api/tags",
    "/v1/../api/tags",
    "/v1/%2e%2e/api/tags",
    "/v1/..%2fapi/tags",
    "//api/tags",
    "//evil.example/v1/models",
    "/v1//chat/completions",
    "/v1/chat/completions/",
    "/v1/chat%2fcompletions",
    "/v1/chat/completions%00",
    "/v1/chat/completions;x",
    "/V1/chat/completions",
    "/v1/v1/chat/completions",
    "/\\evil.example/v1/models",
)

# --- framing ---------------------------------------------------------------------------------------

SMUGGLED = b"GET /v1/models/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
HOST = b"Host: localhost\r\n"
OK = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Framing(NamedTuple):
    """Bytes, and the statuses of the answers to them. `answers` () = one refusal (400, 413, 431, 501, 505), then
    the end of the connection; nothing that comes behind is read."""

    name: str
    data: bytes
    answers: tuple[int, ...] = ()


def framings() -> Iterator[Framing]:
    """All of them. Each POST is one with a body that no route takes (404, 400), so that no model has work."""
    yield from _lengths()
    yield from _codings()
    yield from _lines()
    yield from _targets()
    yield from _fields()
    yield from _chunks()
    yield from _bounds()
    yield from _behind()


def _post(fields: bytes, body: bytes) -> bytes:
    return POST + fields + b"\r\n" + body


def _lengths() -> Iterator[Framing]:
    inside = SMUGGLED
    size = b"%d" % len(inside)
    yield Framing("Content-Length", _post(b"Content-Length: " + size + b"\r\n", inside), (400,))
    yield Framing("zeros in front", _post(b"Content-Length: 000" + size + b"\r\n", inside), (400,))
    yield Framing("spaces around", _post(b"Content-Length: \t " + size + b" \t\r\n", inside), (400,))
    yield Framing("no length: no body", _post(b"", b""), (400,))
    odd = {
        "a sign": b"+" + size,
        "negative": b"-1",
        "empty": b"",
        "a list of the same": size + b", " + size,
        "a list of different": b"0, " + size,
        "hexadecimal": b"0x10",
        "an exponent": b"1e1",
        "a fraction": b"5.0",
        "an underscore": b"1_0",
        "a space inside": b"1 0",
        "superscript": b"\xb2",
        "with a word": b"5 bytes",
        "twenty digits": b"99999999999999999999",
        "beyond 64 bits": b"18446744073709551617",
        "quoted": b'"5"',
        "a NUL": b"5\x00",
        "vertical tab": b"\x0b5",
        "form feed behind": b"5\x0c",
    }
    for name, value in odd.items():
        yield Framing(f"Content-Length: {name}", _post(b"Content-Length: " + value + b"\r\n", inside))
    twice = b"Content-Length: " + size + b"\r\n"
    yield Framing("the same Content-Length twice", _post(twice + twice, inside))
    yield Framing("two Content-Lengths", _post(twice + b"Content-Length: 0\r\n", inside))
    yield Framing("two, in other letters", _post(twice + b"content-length: 0\r\n", inside))


def _codings() -> Iterator[Framing]:
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
    coding = b"Transfer-Encoding: chunked\r\n"
    yield Framing("chunked", _post(coding, chunked), (400,))
    yield Framing("chunked, in other letters", _post(b"TRANSFER-encoding:  CHUNKED \r\n", chunked), (400,))
    yield Framing("both lengths (CL.TE)", _post(b"Content-Length: 5\r\n" + coding, b"0\r\n\r\n" + SMUGGLED))
    yield Framing("both lengths (TE.CL)", _post(coding + b"Content-Length: 4\r\n", chunked))
    yield Framing("both, the length 0", _post(b"Content-Length: 0\r\n" + coding, chunked))
    yield Framing("chunked twice (TE.TE)", _post(coding + coding, b"0\r\n\r\n" + SMUGGLED))
    yield Framing("chunked and another", _post(coding + b"Transfer-Encoding: x\r\n", b"0\r\n\r\n" + SMUGGLED))
    other = {
        "identity": b"identity",
        "gzip": b"gzip",
        "gzip, chunked": b"gzip, chunked",
        "chunked, identity": b"chunked, identity",
        "chunked, chunked": b"chunked, chunked",
        "xchunked": b"xchunked",
        "chunked in quotes": b'"chunked"',
        "chunked;q=1": b"chunked;q=1",
        "chunk": b"chunk",
        "empty": b"",
        "a comma behind": b"chunked,",
        "a comma in front": b", chunked",
        "a vertical tab": b"\x0bchunked",
        "a no-break space": b"\xa0chunked",
    }
    for name, value in other.items():
        data = _post(b"Transfer-Encoding: " + value + b"\r\n", b"0\r\n\r\n" + SMUGGLED)
        yield Framing(f"Transfer-Encoding: {name}", data)
    yield Framing("a space before the colon", _post(b"Transfer-Encoding : chunked\r\n", chunked))
    yield Framing("folded", _post(b"Transfer-Encoding:\r\n chunked\r\n", chunked))
    yield Framing("behind a bare LF", _post(b"X: y\nTransfer-Encoding: chunked\r\n", chunked))
    yield Framing("behind a bare CR", _post(b"X: y\rTransfer-Encoding: chunked\r\n", chunked))
    old = b"POST /v1/embeddings HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n"
    yield Framing("chunked in HTTP/1.0", old + coding + b"\r\n" + chunked)
    yield Framing("an underscore for the hyphen", _post(b"Transfer_Encoding: chunked\r\n", b""), (400,))


def _lines() -> Iterator[Framing]:
    line = b"GET /v1/models HTTP/1.1"
    yield Framing("bare LF throughout", OK.replace(b"\r\n", b"\n"))
    yield Framing("bare LF behind the request line", line + b"\n" + HOST + b"\r\n")
    yield Framing("bare LF behind a field", line + b"\r\nHost: localhost\n\r\n")
    yield Framing("bare CR throughout", OK.replace(b"\r\n", b"\r"))
    yield Framing("bare CR inside a value", line + b"\r\n" + HOST + b"X: a\rb\r\n\r\n")
    yield Framing("bare LF inside a value", line + b"\r\n" + HOST + b"X: a\nGET /v1/models/smuggled HTTP/1.1\r\n\r\n")
    yield Framing("CR CR LF", line + b"\r\r\n" + HOST + b"\r\n")
    yield Framing("LF LF as the end", line + b"\r\n" + HOST[:-2] + b"\n\n" + b"\r\n\r\n")
    yield Framing("a folded field", line + b"\r\n" + HOST + b"X: a\r\n b\r\n\r\n")
    yield Framing("a folded field, by a tab", line + b"\r\n" + HOST + b"X: a\r\n\tb\r\n\r\n")
    yield Framing("a folded first field", line + b"\r\n X: a\r\n" + HOST + b"\r\n")
    yield Framing("a field without a colon", line + b"\r\n" + HOST + b"X\r\n\r\n")
    yield Framing("a field without a name", line + b"\r\n" + HOST + b": x\r\n\r\n")
    yield Framing("a NUL in a value", line + b"\r\n" + HOST + b"X: a\x00b\r\n\r\n")
    yield Framing("an escape in a value", line + b"\r\n" + HOST + b"X: a\x1b[2Jb\r\n\r\n")
    yield Framing("a delete in a value", line + b"\r\n" + HOST + b"X: a\x7fb\r\n\r\n")
    yield Framing("two spaces", b"GET  /v1/models HTTP/1.1\r\n" + HOST + b"\r\n")
    yield Framing("a tab for a space", b"GET\t/v1/models\tHTTP/1.1\r\n" + HOST + b"\r\n")
    yield Framing("a space behind", b"GET /v1/models HTTP/1.1 \r\n" + HOST + b"\r\n")
    yield Framing("a space in front", b" GET /v1/models HTTP/1.1\r\n" + HOST + b"\r\n")
    yield Framing("one word", b"nonsense\r\n\r\n")
    yield Framing("HTTP/0.9", b"GET /v1/models\r\n\r\n")
    yield Framing("HTTP/1.2", b"GET /v1/models HTTP/1.2\r\n" + HOST + b"\r\n")
    yield Framing("HTTP/2 by prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    yield Framing("a version in small letters", b"GET /v1/models http/1.1\r\n" + HOST + b"\r\n")
    yield Framing("HTTP/1.1 with more digits", b"GET /v1/models HTTP/1.10\r\n" + HOST + b"\r\n")
    yield Framing("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n")
    yield Framing("a method with a colon", b"GET: /v1/models HTTP/1.1\r\n" + HOST + b"\r\n")
    yield Framing("an empty line ahead", b"\r\n" + OK, (200,))
    yield Framing("two empty lines ahead", b"\r\n\r\n" + OK, (200,))
    yield Framing("an empty line ahead that is none", b"\n" + OK)


def _targets() -> Iterator[Framing]:
    for name, target in {
        "absolute": b"http://localhost/v1/models",
        "absolute, of another host": b"http://evil.example/v1/models",
        "https": b"https://localhost/v1/models",
        "an authority": b"localhost:11436",
        "a star": b"*",
        "no slash": b"v1/models",
        "empty": b"",
        "a query alone": b"?a=b",
        "a fragment": b"/v1/models#x",
        "beyond ASCII": b"/v1/models/\xc3\xa9",
        "a NUL": b"/v1/models\x00",
        "a space": b"/v1/models x",
    }.items():
        yield Framing(f"target: {name}", b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    yield Framing("CONNECT", b"CONNECT evil.example:443 HTTP/1.1\r\n" + HOST + b"\r\n")
    for name, target in {
        "dots": b"/v1/../api/tags",
        "dots to a route": b"/x/../v1/models",
        "a dot": b"/./v1/models",
        "two slashes": b"//v1/models",
        "two slashes and a host": b"//evil.example/v1/models",
        "two slashes inside": b"/v1//models",
        "encoded dots": b"/%2e%2e/v1/models",
        "an encoded slash": b"/v1%2fmodels",
    }.items():
        yield Framing(f"target: {name}", b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n", (404,))


def _fields() -> Iterator[Framing]:
    line = b"GET /v1/models HTTP/1.1\r\n"
    yield Framing("no Host", line + b"\r\n")
    yield Framing("an empty Host", line + b"Host:\r\n\r\n")
    yield Framing("a blank Host", line + b"Host: \t \r\n\r\n")
    yield Framing("two Hosts", line + HOST + HOST + b"\r\n")
    yield Framing("two Hosts, the second foreign", line + HOST + b"Host: evil.example\r\n\r\n")
    yield Framing("a space before Host's colon", line + b"Host : localhost\r\n\r\n")
    yield Framing("an empty Host in HTTP/1.0", b"GET /v1/models HTTP/1.0\r\nHost:\r\n\r\n")
    yield Framing("two Origins", line + HOST + b"Origin: http://a\r\nOrigin: http://b\r\n\r\n")
    yield Framing("two keys", line + HOST + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n")
    yield Framing("an upgrade", line + HOST + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n", (200,))
    yield Framing(
        "Connection: keep-alive, Transfer-Encoding", line + HOST + b"Connection: keep-alive, x\r\n\r\n", (200,)
    )
    yield Framing("latin-1 in a value", line + HOST + b"X: \xe9\xff\r\n\r\n", (200,))


def _chunks() -> Iterator[Framing]:
    coding = b"Transfer-Encoding: chunked\r\n"

    def chunked(name: str, body: bytes, *answers: int) -> Framing:
        return Framing(f"chunks: {name}", _post(coding, body), answers)

    yield chunked("an extension", b"2;a=b\r\n{}\r\n0\r\n\r\n", 400)
    yield chunked("a quoted extension", b'2 ; a="b"\r\n{}\r\n0;c\r\n\r\n', 400)
    yield chunked("zeros in front", b"0002\r\n{}\r\n000\r\n\r\n", 400)
    yield chunked("a trailer", b"2\r\n{}\r\n0\r\nX: y\r\n\r\n", 400)
    yield chunked("a trailer that would frame", b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n", 400)
    yield chunked("an LF inside an extension", b"2;a\n\r\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("an LF behind the size", b"2\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("an LF behind the data", b"2\r\n{}\n0\r\n\r\n" + SMUGGLED)
    yield chunked("a CR in an extension", b"2;a\rb\r\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("an LF at the end", b"2\r\n{}\r\n0\n\n" + SMUGGLED)
    yield chunked("a sign", b"+2\r\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("negative", b"-2\r\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("0x", b"0x2\r\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("an underscore", b"0_2\r\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("no size", b"\r\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("a space in front", b" 2\r\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("a size that overflows", b"10000000000000002\r\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("more data than its size", b"2\r\n{}}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("a word for the size", b"two\r\n{}\r\n0\r\n\r\n" + SMUGGLED)
    yield chunked("a trailer that is none", b"2\r\n{}\r\n0\r\nX\r\n\r\n" + SMUGGLED)
    yield chunked("a folded trailer", b"2\r\n{}\r\n0\r\nX: a\r\n b\r\n\r\n" + SMUGGLED)


def _bounds() -> Iterator[Framing]:
    line = b"GET /v1/models HTTP/1.1\r\n"
    yield Framing("a long path", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    yield Framing("a path without an end", b"GET /" + b"a" * 70_000)
    yield Framing("a long field", line + HOST + b"X: " + b"a" * 70_000 + b"\r\n\r\n")
    yield Framing("a head without an end", line + HOST + b"X: y\r\n" * 12_000)
    yield Framing("129 fields", line + HOST + b"".join(b"X-%d: y\r\n" % n for n in range(128)) + b"\r\n")
    yield Framing("128 fields", line + HOST + b"".join(b"X-%d: y\r\n" % n for n in range(127)) + b"\r\n", (200,))
    coding = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    yield Framing("a long extension", coding + b"2;" + b"a" * 2000 + b"\r\n{}\r\n0\r\n\r\n")
    yield Framing("an extension without an end", coding + b"2;" + b"a" * 70_000)
    yield Framing("many extensions", coding + b"".join(b"1;%b\r\n \r\n" % (b"a" * 1000) for _ in range(80)))
    yield Framing("trailers without an end", coding + b"0\r\n" + b"X: y\r\n" * 12_000)
    yield Framing("a size without an end", coding + b"0" * 70_000)


def _behind() -> Iterator[Framing]:
    yield Framing("garbage behind a request", OK + b"garbage\r\n\r\n" + SMUGGLED, (200, 400))
    yield Framing("binary garbage behind", OK + bytes(range(256)) + b"\r\n\r\n" + SMUGGLED, (200, 400))
    yield Framing("garbage behind a body", _post(b"Content-Length: 2\r\n", b"{}garbage\r\n\r\n") + SMUGGLED, (400, 400))
    yield Framing(
        "garbage behind chunks", _post(b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\nx y\r\n\r\n"), (400, 400)
    )
    yield Framing("pipelined", OK * 3 + OK.replace(b"/models", b"/models/none") + OK, (200, 200, 200, 404, 200))
    yield Framing("a body with GET", OK[:-2] + b"Content-Length: %d\r\n\r\n%b" % (len(SMUGGLED), SMUGGLED), (200,))
    yield Framing("close, then more", OK[:-2] + b"Connection: close\r\n\r\n" + SMUGGLED, (200,))
    yield Framing("HTTP/1.0, then more", OK.replace(b"HTTP/1.1", b"HTTP/1.0") + SMUGGLED, (200,))


# --- bodies ----------------------------------------------------------------------------------------

_CHAT = b'{"model":"%b","messages":[{"role":"user","content":"hi"}]%b}'


class Body(NamedTuple):
    """A body for POST /v1/chat/completions, `%b` in it being a model's name; None = any answer in order will do."""

    name: str
    data: bytes
    status: int | None = 400


def bodies(model: bytes) -> Iterator[Body]:
    """JSON that is none, or that would cost or confuse."""
    yield from _deep_or_large(model)
    yield from _said_twice(model)
    yield from _not_text(model)
    yield from _not_json(model)
    yield from _legal(model)


def _deep_or_large(model: bytes) -> Iterator[Body]:
    deep = 100_000
    yield Body("100,000 lists deep", b"[" * deep)
    yield Body("100,000 lists deep, closed", b"[" * deep + b"]" * deep)
    yield Body("100,000 objects deep", b'{"a":' * deep + b"1" + b"}" * deep)
    yield Body("deep inside a field", _CHAT % (model, b',"x":' + b"[" * 900 + b"]" * 900))
    yield Body("a number of 100,000 digits", _CHAT % (model, b',"seed":' + b"1" * 100_000))
    yield Body("1e999", _CHAT % (model, b',"temperature":1e999'))
    yield Body("-1e999", _CHAT % (model, b',"temperature":-1e999'))
    yield Body("NaN", _CHAT % (model, b',"temperature":NaN'))
    yield Body("Infinity", _CHAT % (model, b',"temperature":Infinity'))
    yield Body("-Infinity", _CHAT % (model, b',"temperature":-Infinity'))


def _said_twice(model: bytes) -> Iterator[Body]:
    yield Body("the model twice", _CHAT % (model, b',"model":"other"'))
    yield Body("the messages twice", _CHAT % (model, b',"messages":[{"role":"user","content":"other"}]'))
    yield Body("a key twice, deep inside", _CHAT % (model, b',"metadata":{"a":{"b":1,"b":2}}'))
    yield Body("a key twice, once in escapes", _CHAT % (model, b',"m\\u006fdel":"other"'))


def _not_text(model: bytes) -> Iterator[Body]:
    yield Body("bad UTF-8", _CHAT % (model, b',"user":"\xff\xfe"'))
    yield Body("overlong UTF-8", _CHAT % (model, b',"user":"\xc0\xaf"'))
    yield Body("a surrogate in UTF-8", _CHAT % (model, b',"user":"\xed\xa0\x80"'))
    yield Body("cut off inside a character", _CHAT[:-1] % (model, b',"user":"\xe2\x82'))
    yield Body("UTF-16", (_CHAT % (model, b"")).decode().encode("utf-16"))
    yield Body("UTF-16 without a mark", (_CHAT % (model, b"")).decode().encode("utf-16-le"))
    yield Body("a NUL between tokens", _CHAT % (model, b"\x00"))
    yield Body("a bare NUL in a string", _CHAT % (model, b',"user":"a\x00b"'))
    yield Body("a control character in a string", _CHAT % (model, b',"user":"a\nb"'))


def _not_json(model: bytes) -> Iterator[Body]:
    yield Body("something behind", _CHAT % (model, b"") + b"{}")
    yield Body("single quotes", (_CHAT % (model, b"")).replace(b'"', b"'"))
    yield Body("a comment", b"/* */" + _CHAT % (model, b""))
    yield Body("a trailing comma", _CHAT % (model, b","))
    yield Body("no body", b"")
    yield Body("a list", b"[]")
    yield Body("a string", b'"x"')
    yield Body("null", b"null")
    yield Body("an array of the wrong things", b'{"model":"%b","messages":[1,null,[],{}]}' % model)
    yield Body("a model that is no string", b'{"model":{"$gt":""},"messages":[{"role":"user","content":"x"}]}')


def _legal(model: bytes) -> Iterator[Body]:
    yield Body("a lone surrogate in an escape", _CHAT % (model, b',"user":"\\ud800"'), 200)
    yield Body("a NUL in an escape", _CHAT % (model, b',"user":"a\\u0000b"'), 200)
    yield Body(
        "a surrogate in the prompt", b'{"model":"%b","messages":[{"role":"user","content":"\\udfff"}]}' % model, 200
    )
    yield Body("a NUL in the prompt", b'{"model":"%b","messages":[{"role":"user","content":"\\u0000"}]}' % model, 200)
    yield Body("a byte order mark", b"\xef\xbb\xbf" + _CHAT % (model, b""), 200)
    yield Body("a huge whole number", _CHAT % (model, b',"seed":' + b"9" * 400), None)
    yield Body("ten thousand unknown fields", _CHAT % (model, b"".join(b',"f%d":1' % n for n in range(10_000))), None)


REMOTE = (
    "http://169.254.169.254/latest/meta-data/",
    "https://evil.example/a.png",
    "HTTP://127.0.0.1:8080/slots",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "ftp://evil.example/a.png",
    "gopher://127.0.0.1:6379/_INFO",
    "//evil.example/a.png",
    "/etc/passwd",
    "../../etc/passwd",
    " data:image/png;base64,AAAA",
    "blob:http://localhost/x",
    "javascript:alert(1)",
    "",
)
