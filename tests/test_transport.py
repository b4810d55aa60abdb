"""backends/transport.py over real sockets: the pool, what is sent again and what never is, each limit, each failure."""

import contextlib
import errno
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from portway.backends import transport
from portway.backends.transport import Patience, Pool
from portway.call import Limits, Watch, finish
from portway.config import Backend
from portway.errors import BackendError, ClientGone
from portway.watch import ClientWatch, NoClient
from portway.wire.http1 import MAX_HEAD
from tests.blocking import BlockingReply, exchange
from tests.doubles import (
    CLOSE,
    HALF_CLOSE,
    HANG,
    LAST_CHUNK,
    RESET,
    Bytewise,
    ScriptedRequest,
    ScriptedServer,
    chunk,
    http_reply,
    sse_reply,
    stream_head,
)

LONG = 10.0  # seconds; nothing here takes so long
SHORT = 0.05  # seconds; a limit that passes
REQUEST = b"POST /v1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
OK = http_reply(b"{}")
SERVED = (200, b"{}")


def large_request(size: int = 32 * 1024 * 1024) -> bytes:
    """More than the kernel's buffers hold."""
    return b"POST /v1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (size, bytes(size))


def backend(port: int, host: str = "127.0.0.1", scheme: Any = "http", max_idle: int = 16) -> Backend:
    return Backend("b", "openai", f"{scheme}://{host}:{port}", scheme, host, port, max_idle=max_idle)


def limits(**changes: float) -> Limits:
    """Generous ones but for `changes`; answer_by and deadline count from now."""
    now = time.monotonic()
    for name in ("answer_by", "deadline"):
        changes[name] = now + changes.get(name, LONG)
    return Limits(LONG, LONG, LONG, LONG, now, now)._replace(**changes)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


class Client:
    """A client's connection under a ClientWatch; `leave` closes its side, `reset` breaks it."""

    def __init__(self, test: unittest.TestCase) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._theirs = socket.create_connection(listener.getsockname())
            self.ours, _ = listener.accept()
        test.addCleanup(self.ours.close)
        test.addCleanup(self._theirs.close)
        self.watch = ClientWatch(self.ours, lambda: bool(self.ours.recv(100, socket.MSG_DONTWAIT)))

    def leave(self) -> None:
        self._theirs.close()

    def reset(self) -> None:
        self._theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._theirs.close()


class TransportCase(unittest.TestCase):
    def serve(self, *script: Any, then: Any = None, max_idle: int = 16) -> tuple[ScriptedServer, Pool]:
        server = ScriptedServer(script, then=then)
        self.addCleanup(server.stop)
        return server, self.pool(backend(server.port, max_idle=max_idle))

    def pool(self, of: Backend) -> Pool:
        pool = Pool(of)
        self.addCleanup(pool.close)
        return pool

    def open(
        self, pool: Pool, request: bytes = REQUEST, watch: Watch | None = None, plain: Any = False, **changes: float
    ) -> BlockingReply:
        within = limits(**changes)
        reply = exchange(pool, request, within, watch or NoClient(), Patience(within, plain=plain))
        self.addCleanup(reply.close)
        return reply

    def ask(self, pool: Pool, request: bytes = REQUEST, **changes: float) -> tuple[int, bytes]:
        """One whole exchange; its connection goes back to the pool."""
        reply = self.open(pool, request, None, False, **changes)
        body = reply.read_all()
        reply.close()
        return reply.head.status, body

    def fails(self, reason: str, act: Callable[..., Any], *args: Any, **kwargs: Any) -> BackendError:
        with self.assertRaises(BackendError) as caught:
            act(*args, **kwargs)
        self.assertEqual(reason, caught.exception.reason, caught.exception)
        return caught.exception

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for what another thread is about to do and offers no event for."""
        end = time.monotonic() + LONG
        while not holds():
            self.assertLess(time.monotonic(), end)
            threading.Event().wait(0.002)

    def idle(self, pool: Pool) -> int:
        return len(pool._idle)


class Reuse(TransportCase):
    def test_one_connection_serves_one_after_another(self):
        """Kept alive, and the bytes arrive as they are."""
        server, pool = self.serve(then=OK)
        for _ in range(5):
            self.assertEqual(SERVED, self.ask(pool))
        self.assertEqual(1, server.connections)
        self.assertEqual([REQUEST] * 5, [request.raw for request in server.requests])

    def test_the_last_one_used_is_the_first_one_used_again(self):
        """So that those that are not needed grow old and go."""
        server, pool = self.serve(then=OK)
        first, second = self.open(pool), self.open(pool)
        for reply in (first, second):
            reply.read_all()
            reply.close()
        self.ask(pool)
        self.ask(pool)
        self.assertEqual([0, 1, 1, 1], [request.connection for request in server.requests])

    def test_no_more_are_kept_than_configured(self):
        """The others are closed as they come back."""
        server, pool = self.serve(then=OK, max_idle=1)
        replies = [self.open(pool) for _ in range(3)]
        for reply in replies:
            reply.read_all()
            reply.close()
        self.assertEqual(1, self.idle(pool))
        server.wait_closed(1)
        server.wait_closed(2)

    def test_a_crowd_comes_back_to_its_connections(self):
        """64 requests at once, again and again, need 64 of them by default: to close some each time and to make
        others anew cost a quarter of the rate."""
        server = ScriptedServer(then=OK)
        self.addCleanup(server.stop)
        pool = self.pool(Backend("b", "openai", server.url, "http", "127.0.0.1", server.port))
        for _ in range(2):
            replies = [self.open(pool) for _ in range(64)]
            for reply in replies:
                reply.read_all()
                reply.close()
        self.assertEqual(64, server.connections)

    def test_a_closed_pool_keeps_none(self):
        """Idle ones are closed at once, those in use as they come back; it still serves."""
        server, pool = self.serve(then=OK)
        used, idle = self.open(pool), self.open(pool)
        idle.read_all()
        idle.close()
        pool.close()
        server.wait_closed(1)
        self.assertEqual(b"{}", used.read_all())
        used.close()
        server.wait_closed(0)
        self.assertEqual(0, self.idle(pool))

    def test_closing_a_reply_twice_pools_it_once(self):
        """Else two requests would share a connection and get each other's answers."""
        _, pool = self.serve(then=OK)
        reply = self.open(pool)
        reply.read_all()
        reply.close()
        reply.close()
        self.assertEqual(1, self.idle(pool))

    def test_closing_again_does_not_touch_whoever_has_it_now(self):
        """A second close() of an unfinished reply's neighbour would cancel it."""
        server, pool = self.serve(then=OK)
        old = self.open(pool)
        old.read_all()
        old.close()
        new = self.open(pool)
        old.close()
        self.assertEqual(b"", old.read())
        self.assertEqual(b"{}", new.read_all())
        self.assertEqual(1, server.connections)

    def test_the_server_says_how_long_it_keeps_one(self):
        """Past Keep-Alive's timeout, less a margin, a connection is not trusted any more."""
        for value, connections in (
            ("timeout=5, max=100", 1),
            ("timeout=1", 2),
            ("timeout=0", 2),
            ("max=3, Timeout=1", 2),
            ("max=3", 1),
            ("timeout=\xb2", 1),
            ("timeout=", 1),
            ("timeout=" + "9" * 400, 1),
        ):
            server, pool = self.serve(then=http_reply(b"{}", headers={"Keep-Alive": value}))
            self.ask(pool)
            self.ask(pool)
            self.assertEqual(connections, server.connections, value)

    def test_none_is_kept_for_ever(self):
        """A connection idle for longer than MAX_IDLE_AGE is replaced."""
        server, pool = self.serve(then=OK)
        with mock.patch.object(transport, "MAX_IDLE_AGE", 0.0):
            self.ask(pool)
        self.ask(pool)
        self.assertEqual(2, server.connections)

    def test_what_can_not_be_kept_is_not(self):
        """Connection: close, an answer without an end of its own, HTTP/1.0, bytes behind the answer."""
        for answer in (
            http_reply(b"{}", keep_alive=False),
            [b"HTTP/1.1 200 OK\r\n\r\n{}", CLOSE],
            b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            OK + b"x",
            OK + OK,
            stream_head() + chunk(b"{}") + LAST_CHUNK + b"x",
        ):
            server, pool = self.serve(then=answer)
            self.assertEqual(SERVED, self.ask(pool))
            self.assertEqual(0, self.idle(pool))
            server.wait_closed(0)

    def test_bytes_that_come_while_idle_spoil_it(self):
        """They answer nothing that was asked: the next request gets a fresh connection."""
        more = threading.Event()
        server, pool = self.serve([OK, more, http_reply(b"not for you")], OK)
        self.ask(pool)
        more.set()
        self.until(lambda: not pool._idle[0].is_open())
        self.assertEqual(SERVED, self.ask(pool))
        self.assertEqual(2, server.connections)

    def test_an_unread_answer_is_cancelled(self):
        """Closing it closes the connection: the server learns that nobody listens."""
        server, pool = self.serve([stream_head() + chunk(b"1"), HANG])
        reply = self.open(pool)
        self.assertEqual(b"1", reply.read())
        reply.close()
        server.wait_closed(0)


class Streams(TransportCase):
    """llama-server promises to keep a connection behind a stream, and then closes it."""

    STREAM = sse_reply([{"a": 1}])

    def test_behind_a_stream_a_connection_rests(self):
        """Until it is known whether the server keeps it, another is used."""
        server, pool = self.serve(self.STREAM, then=OK)
        self.ask(pool)
        self.ask(pool)
        self.ask(pool)
        self.assertEqual([0, 1, 1], [request.connection for request in server.requests])

    def test_a_server_that_keeps_it_is_believed_from_then_on(self):
        """Ollama and vLLM do; their connections need no rest."""
        server, pool = self.serve(then=self.STREAM)
        with mock.patch.object(transport, "REST", 0.0):
            self.ask(pool)
            self.ask(pool)
        self.assertTrue(pool.keeps_streams)
        self.ask(pool)
        self.assertEqual(1, server.connections)

    def test_a_server_that_closes_it_is_not(self):
        """Also where it was believed before: it may be another program by now."""
        server, pool = self.serve([self.STREAM, CLOSE], OK)
        pool.keeps_streams = True
        self.ask(pool)
        self.until(lambda: not pool._idle[0].is_open())
        self.assertEqual(SERVED, self.ask(pool))
        self.assertFalse(pool.keeps_streams)
        self.assertEqual(2, server.connections)

    def test_age_is_no_proof_that_the_server_closes(self):
        """A connection that is too old to be used was still kept."""
        _, pool = self.serve(then=self.STREAM)
        pool.keeps_streams = True
        with mock.patch.object(transport, "MAX_IDLE_AGE", 0.0):
            self.ask(pool)
        self.ask(pool)
        self.assertTrue(pool.keeps_streams)

    def test_a_request_lost_behind_a_stream_teaches_too(self):
        """It met the end that it was believed not to come."""
        _, pool = self.serve(self.STREAM, [CLOSE])
        pool.keeps_streams = True
        self.ask(pool)
        self.fails("connection_lost", self.ask, pool)
        self.assertFalse(pool.keeps_streams)

    def test_settle_reads_the_closing_bytes(self):
        """The last chunk may come a moment after the last event; then the connection is kept."""
        later = threading.Event()
        _, pool = self.serve([stream_head() + chunk(b"data: [DONE]\n\n"), later, LAST_CHUNK])
        reply = self.open(pool)
        reply.read()
        later.set()
        reply.settle(LONG)
        reply.close()
        self.assertEqual(1, self.idle(pool))

    def test_settle_does_not_wait_for_long(self):
        """A server that never ends its answer loses the connection, that is all; also one that never stops."""
        for more in ([HANG], [chunk(b"x" * 60_000)] * 200):
            server, pool = self.serve([stream_head() + chunk(b"1"), *more])
            reply = self.open(pool)
            reply.read()
            reply.settle(0.001)
            reply.close()
            self.assertEqual(0, self.idle(pool))
            server.wait_closed(0)

    def test_settle_is_no_matter_of_the_clients(self):
        """It has all that it needs and may hang up: the connection is kept nevertheless."""
        later = threading.Event()
        _, pool = self.serve([stream_head() + chunk(b"1"), later, LAST_CHUNK])
        client = Client(self)
        reply = self.open(pool, watch=client.watch)
        reply.read()
        client.leave()
        threading.Timer(SHORT, later.set).start()
        reply.settle(LONG)
        reply.close()
        self.assertEqual(1, self.idle(pool))


class Resending(TransportCase):
    def always_open(self) -> None:
        """The race: the server closes behind the look at an idle connection and before the request."""
        patch = mock.patch.object(transport._Connection, "is_open", return_value=True)
        patch.start()
        self.addCleanup(patch.stop)

    def test_a_connection_closed_while_idle_is_replaced(self):
        """Unnoticed: by the look at it before it is used."""
        server, pool = self.serve([OK, CLOSE], OK)
        self.ask(pool)
        self.until(lambda: not pool._idle[0].is_open())
        self.assertEqual(SERVED, self.ask(pool))
        self.assertEqual([0, 1], [request.connection for request in server.requests])

    def test_a_connection_closed_just_before_the_request_is_replaced(self):
        """The server never saw the request on the old one; it sees it once."""
        self.always_open()
        server, pool = self.serve([OK, CLOSE], OK)
        self.ask(pool)
        self.until(lambda: server.connection(0).sock.fileno() < 0)
        self.assertEqual(SERVED, self.ask(pool))
        self.assertEqual([0, 1], [request.connection for request in server.requests])

    def test_a_reset_on_a_reused_connection_is_tried_again_once(self):
        """On a fresh connection, however many pooled ones there are."""
        self.always_open()
        server, pool = self.serve([OK, CLOSE], [OK, CLOSE], [OK, CLOSE], OK)
        replies = [self.open(pool) for _ in range(3)]
        for reply in replies:
            reply.read_all()
            reply.close()
        self.until(lambda: all(server.connection(number).sock.fileno() < 0 for number in range(3)))
        self.assertEqual(SERVED, self.ask(pool))
        self.assertEqual((4, 4, 3), (server.connections, len(server.requests), self.idle(pool)))

    def test_a_reset_after_the_request_was_sent(self):
        """Before a byte of an answer, on a reused connection: sent again, once; then it is an error."""
        server, pool = self.serve(OK, [RESET], OK)
        self.ask(pool)
        self.assertEqual(SERVED, self.ask(pool))
        self.assertEqual([0, 0, 1], [request.connection for request in server.requests])
        server, pool = self.serve(OK, [RESET], [RESET], OK)
        self.ask(pool)
        self.fails("connection_lost", self.ask, pool)
        self.assertEqual([0, 0, 1], [request.connection for request in server.requests])

    def test_a_clean_end_after_the_request_was_read(self):
        """The program may have worked on it: an error, never a second time."""
        for end in (CLOSE, HALF_CLOSE):
            server, pool = self.serve(OK, [end], OK)
            self.ask(pool)
            error = self.fails("connection_lost", self.ask, pool)
            self.assertIn("closed before an answer", error.message)
            self.assertEqual([0, 0], [request.connection for request in server.requests])

    def test_a_fresh_connection_is_never_tried_again(self):
        """Reset or closed, it says that the server is in trouble."""
        for end, word in ((RESET, "reset"), (CLOSE, "closed")):
            server, pool = self.serve([end], OK)
            error = self.fails("connection_lost", self.ask, pool)
            self.assertIn(f"{word} before an answer", error.message)
            self.assertEqual(1, len(server.requests))

    def test_an_answer_that_has_begun_is_never_tried_again(self):
        """Not even one byte of it, on a reused connection."""
        for begun in (b"H", OK[:30]):
            for end in (RESET, CLOSE):
                sent = threading.Event()
                server, pool = self.serve(OK, [begun, sent, end], OK)
                self.ask(pool)
                watch = Noticing(sent)
                within = limits()
                self.fails("connection_lost", exchange, pool, REQUEST, within, watch, Patience(within))
                self.assertEqual(2, len(server.requests))

    def test_a_reused_connection_that_breaks_under_a_large_request(self):
        """The server did not read all of it, so it did not work on it: sent again."""
        self.always_open()
        server, pool = self.serve([OK, CLOSE], OK)
        self.ask(pool)
        self.until(lambda: server.connection(0).sock.fileno() < 0)
        self.assertEqual(SERVED, self.ask(pool, large_request(8 * 1024 * 1024)))
        self.assertEqual([0, 1], [request.connection for request in server.requests])


class Noticing(NoClient):
    """Sets `event` as soon as something has come in and more is waited for."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event
        self._waits = 0

    async def readable(self, sock: socket.socket, until: float) -> bool:
        self._waits += 1
        if self._waits == 2:
            self._event.set()
        return await super().readable(sock, until)


class Connecting(TransportCase):
    def test_nobody_listens(self):
        """connect_failed, with what the system says and with the way out."""
        pool = self.pool(backend(free_port()))
        error = self.fails("connect_failed", self.ask, pool)
        self.assertEqual("Connection refused", error.detail)
        self.assertIn("backend b (http://127.0.0.1:", error.message)
        self.assertIn("start b, or correct backends.b.url", error.way_out)

    def test_nobody_accepts(self):
        """A full backlog lets a connection hang: connect_timeout at the limit, or at the attempt's end."""
        with full_listener(self) as port:
            pool = self.pool(backend(port))
            self.fails("connect_timeout", self.ask, pool, connect=SHORT)
            self.fails("connect_timeout", self.ask, pool, answer_by=SHORT)

    def test_localhost_is_both_loopbacks(self):
        """A server that listens on one of them is found, whatever the resolver prefers."""
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with self.subTest(host), answering_once(self, family, host) as port:
                self.assertEqual(SERVED, self.ask(self.pool(backend(port, "localhost"))))

    def test_localhost_in_vain(self):
        """The first address's error is told: IPv6 may not even exist here."""
        error = self.fails("connect_failed", self.ask, self.pool(backend(free_port(), "localhost")))
        self.assertEqual("Connection refused", error.detail)

    def test_without_ipv6(self):
        """A kernel that knows no such family is no crash."""
        real = socket.socket

        def only_ipv4(family: int = socket.AF_INET, *args: Any, **kwargs: Any) -> socket.socket:
            if family == socket.AF_INET6:
                raise OSError(97, "Address family not supported by protocol")
            return real(family, *args, **kwargs)

        with mock.patch("socket.socket", only_ipv4):
            self.fails("connect_failed", self.ask, self.pool(backend(free_port(), "localhost")))
            self.fails("connect_failed", self.ask, self.pool(backend(free_port(), "::1")))

    def test_without_a_descriptor_left(self):
        """The request fails with a word; it does not look as if the client had gone."""
        pool = self.pool(backend(free_port()))
        with mock.patch("socket.socket", side_effect=OSError(24, "Too many open files")):
            error = self.fails("connect_failed", self.ask, pool)
        self.assertEqual("Too many open files", error.detail)
        with mock.patch("socket.socketpair", side_effect=OSError(24, "Too many open files")):
            self.fails("connect_failed", self.ask, self.pool(backend(free_port(), "a.test")))

    def test_an_ipv6_address(self):
        """As it stands in the configuration, without brackets."""
        with answering_once(self, socket.AF_INET6, "::1") as port:
            self.assertEqual(SERVED, self.ask(self.pool(backend(port, "::1"))))

    def test_a_name_that_does_not_exist(self):
        """The resolver says so at once, or is not waited for beyond the limit."""
        with self.assertRaises(BackendError) as caught:
            self.ask(self.pool(backend(80, "nope.invalid")), connect=1.0)
        self.assertIn(caught.exception.reason, ("connect_failed", "connect_timeout"))

    def test_what_is_no_name_at_all(self):
        """Also where Python's own encoding of it fails."""
        for host in ("a..b", "x" * 64 + ".test", "999.1.1.1.invalid"):
            with self.assertRaises(BackendError) as caught:
                self.ask(self.pool(backend(80, host)), connect=1.0)
            self.assertIn(caught.exception.reason, ("connect_failed", "connect_timeout"))

    def test_a_resolver_that_hangs(self):
        """getaddrinfo() can't be told a limit, but nobody waits for it past ours."""
        release = threading.Event()
        self.addCleanup(release.set)

        def hang(*_: Any, **__: Any) -> list[Any]:
            release.wait(LONG)
            return []

        with mock.patch("socket.getaddrinfo", hang):
            error = self.fails("connect_timeout", self.ask, self.pool(backend(80, "slow.test")), connect=SHORT)
        self.assertIn("did not resolve", error.message)

    def test_a_name_without_a_thread_to_look_it_up(self):
        """The attempt fails like any that can't connect; it is no mistake of Portway's."""
        with mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
            error = self.fails("connect_failed", self.ask, self.pool(backend(80, "some.test")))
        self.assertIn("no thread", error.message)

    def test_a_name_without_an_address(self):
        """An empty answer of the resolver."""
        with mock.patch("socket.getaddrinfo", return_value=[]):
            self.fails("connect_failed", self.ask, self.pool(backend(80, "empty.test")))

    def test_a_name_with_several_addresses(self):
        """A dead one does not hide a live one: each gets its share of the time."""
        server, _ = self.serve(then=OK)
        with full_listener(self) as hanging:
            for dead in (free_port(), hanging):
                found = [
                    (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (dead, server.port)
                ]
                with mock.patch("socket.getaddrinfo", return_value=found):
                    self.assertEqual(SERVED, self.ask(self.pool(backend(80, "two.test")), connect=0.5))

    def test_each_address_has_its_share_of_the_time(self):
        """Of three a third, of the last two a half; in vain, the first one's error is told."""
        port = ("127.0.0.1", 80)
        errors = [BackendError("connect_timeout", "first"), *[BackendError("connect_failed", "then")] * 2]
        with (
            mock.patch("socket.getaddrinfo", return_value=[(socket.AF_INET, socket.SOCK_STREAM, 6, "", port)] * 3),
            mock.patch.object(transport._Dialer, "_open", side_effect=errors) as opened,
        ):
            started = time.monotonic()
            self.fails("connect_timeout", self.ask, self.pool(backend(80, "three.test")), connect=9.0)
        shares = [call.args[3] - started for call in opened.call_args_list]
        for expected, share in zip((3.0, 4.5, 9.0), shares, strict=True):  # no time passed, here
            self.assertAlmostEqual(expected, share, delta=1.0)

    def test_a_scoped_address_keeps_its_scope(self):
        """fe80::1%eth0 means nothing without it."""
        info = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 7))
        with (
            mock.patch("socket.getaddrinfo", return_value=[info]),
            mock.patch.object(transport._Dialer, "_open", side_effect=BackendError("connect_failed", "")) as opened,
        ):
            self.fails("connect_failed", self.ask, self.pool(backend(80, "mac.test")))
        self.assertEqual((socket.AF_INET6, ("fe80::1", 80, 0, 7)), opened.call_args.args[:2])

    def test_a_lan_that_macos_closes(self):
        """errno 65 there (EHOSTUNREACH) comes with its own way out."""
        with mock.patch("socket.socket") as make:
            make.return_value.connect_ex.return_value = errno.EHOSTUNREACH
            error = self.fails("connect_failed", self.ask, self.pool(backend(80, "10.0.0.1")))
        self.assertIn("Local Network", error.way_out)


@contextlib.contextmanager
def full_listener(test: unittest.TestCase) -> Iterator[int]:
    """A port on which connections hang: its backlog is full and nobody accepts."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(200):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            if not finish(NoClient().writable(sock, time.monotonic() + 0.1)):
                yield listener.getsockname()[1]
                return
        test.skipTest("a backlog can't be filled here")


@contextlib.contextmanager
def answering_once(test: unittest.TestCase, family: int, host: str) -> Iterator[int]:
    """A server for one request on this address."""
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError as exc:
        test.skipTest(f"no {host} here: {exc}")

    def answer() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(65536)
            sock.sendall(OK)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    with listener:
        yield listener.getsockname()[1]
        thread.join(LONG)


class Answers(TransportCase):
    def body(self, *answer: Any) -> bytes:
        _, pool = self.serve(answer)
        return self.ask(pool)[1]

    def test_bodies_of_every_kind(self):
        """With a length, in chunks, up to the end of the connection, none; whole and byte by byte."""
        for answer, body in (
            (http_reply(b"hello"), b"hello"),
            (http_reply(b""), b""),
            (stream_head() + chunk(b"hel") + chunk(b"lo") + LAST_CHUNK, b"hello"),
            (stream_head() + b"5;x=y\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n", b"hello"),
            (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
            (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b""),
        ):
            self.assertEqual(body, self.body(answer))
            self.assertEqual(body, self.body(Bytewise(answer)))

    def test_a_body_up_to_the_end_of_the_connection(self):
        """HTTP/1.0 servers, and whoever says Connection: close without a length."""
        for head in (b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"):
            self.assertEqual(b"hello", self.body(head + b"hello", CLOSE))
            self.assertEqual(b"hello", self.body(head, b"hello", HALF_CLOSE, HANG))
            self.assertEqual(b"", self.body(head, CLOSE))

    def test_what_comes_before_the_answer_is_skipped(self):
        """100 Continue and 103 Early Hints, one or many, with or without headers."""
        early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        self.assertEqual(b"{}", self.body(early * 20 + OK))
        self.assertEqual(b"{}", self.body(Bytewise(early + OK)))

    def test_a_change_of_protocol_is_no_answer(self):
        """What follows a 101 is not HTTP, and nobody asked for it."""
        self.fails("bad_answer", self.body, b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK)

    def test_what_is_not_http(self):
        """Garbage, another protocol, a broken head: bad_answer, at once."""
        for garbage in (
            b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
            b"\x15\x03\x01\x00\x02\x02\x16\r\n\r\n",
            b"<html>\r\n\r\n",
            b"\r\n\r\n" + OK,
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nX : y\r\n\r\n",
        ):
            error = self.fails("bad_answer", self.body, garbage)
            self.assertIn("not HTTP", error.message)

    def test_a_head_is_bounded(self):
        """Whether it ends at all, ends too late in one read, or is cut."""
        at_most = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: ".ljust(MAX_HEAD, b"y")
        self.assertEqual(b"{}", self.body(at_most + b"\r\n\r\n{}"))
        for answer in (
            at_most + b"y\r\n\r\n{}",
            b"y" * (MAX_HEAD + 1),
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 3 * MAX_HEAD,
        ):
            self.fails("bad_answer", self.body, answer, HANG)

    def test_an_end_in_the_middle(self):
        """Of the head, of a body with a length, of a chunk, between chunks: connection_lost."""
        for part in (
            b"H",
            b"HTTP/1.1 200 OK\r\nContent-Le",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            http_reply(b"hello")[:-1],
            http_reply(b"hello")[:-5],
            stream_head() + b"5\r\nhel",
            stream_head() + b"5\r\nhello\r\n",
            stream_head() + b"5\r\nhello\r\n0\r\n",
        ):
            for end in (CLOSE, RESET):
                self.fails("connection_lost", self.body, part, end)

    def test_broken_chunks(self):
        """bad_answer, and the connection is not kept."""
        for coding in (b"x\r\n", b"5\r\nhello!", b"5\nhello", b"-1\r\n", b"0\r\nbad trailer\r\n\r\n"):
            self.fails("bad_answer", self.body, stream_head() + coding, HANG)

    def test_more_than_the_length_is_not_part_of_it(self):
        """A wrong Content-Length cuts, and the rest never becomes the next answer."""
        server, pool = self.serve(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n", OK)
        self.assertEqual(SERVED, self.ask(pool))
        self.assertEqual(SERVED, self.ask(pool))
        self.assertEqual(2, server.connections)

    def test_read_gives_what_is_there(self):
        """Piece by piece as it comes, and b"" at the end, again and again."""
        going = [threading.Event(), threading.Event()]
        _, pool = self.serve([stream_head() + chunk(b"1"), going[0], chunk(b"2"), going[1], LAST_CHUNK])
        reply = self.open(pool)
        self.assertEqual(b"1", reply.read())
        going[0].set()
        self.assertEqual(b"2", reply.read())
        going[1].set()
        self.assertEqual([b"", b""], [reply.read(), reply.read()])

    def test_read_all_is_bounded(self):
        """To the byte: by the length that is told, by what comes in one piece, by many pieces."""
        for answer in ([http_reply(b"hello")], [stream_head() + chunk(b"hello") + LAST_CHUNK], chunks(b"hello")):
            for limit, fits in ((5, True), (4, False), (0, False)):
                _, pool = self.serve(answer)
                reply = self.open(pool)
                if fits:
                    self.assertEqual(b"hello", reply.read_all(limit))
                else:
                    self.fails("bad_answer", reply.read_all, limit)

    def test_a_length_beyond_the_limit_is_not_read_at_all(self):
        """Nothing of it need come."""
        _, pool = self.serve([b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n", HANG])
        self.fails("bad_answer", self.open(pool).read_all, 1000)

    def test_a_refusal_before_the_request_was_read(self):
        """Ollama answers 400 to a large body before it has read it: the answer counts, not the broken or
        stuck connection, and nothing else is sent on that."""
        for then in (CLOSE, RESET, HANG):
            with early_refusal(then) as port:
                pool = self.pool(backend(port))
                reply = self.open(pool, large_request())
                self.assertEqual((413, b"no"), (reply.head.status, reply.read_all()))
                reply.close()
                self.assertEqual(0, self.idle(pool))


@contextlib.contextmanager
def early_refusal(then: Any) -> Iterator[int]:
    """A server that answers a request without reading all of it; then it closes, or it just stays."""
    done = threading.Event()

    def refuse() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(100)
            sock.sendall(http_reply(b"no", status=413))
            if then is CLOSE:
                sock.shutdown(socket.SHUT_RDWR)
            elif then is HANG:
                done.wait(LONG)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        done.set()
        thread.join(LONG)


def chunks(data: bytes) -> list[Any]:
    return [stream_head(), *(chunk(data[i : i + 1]) for i in range(len(data))), LAST_CHUNK]


class Times(TransportCase):
    def test_no_head_in_time(self):
        """A stream's limit is first_token, and answer_by if that is sooner; a plain answer's answer_by alone."""
        for plain, changes, reason in (
            (False, {"first_token": SHORT}, "first_token_timeout"),
            (False, {"answer_by": SHORT}, "first_token_timeout"),
            (True, {"answer_by": SHORT}, "answer_timeout"),
            (True, {"answer_by": SHORT, "first_token": 0.0}, "answer_timeout"),
        ):
            server, pool = self.serve([HANG])
            self.fails(reason, self.open, pool, plain=plain, **changes)
            server.wait_closed(0)

    def test_no_content_in_time(self):
        """The head alone, and bytes that are no content, do not stop the clock."""
        for sent in (stream_head(), stream_head() + chunk(b": ping\n\n")):
            _, pool = self.serve([sent, HANG])
            self.fails("first_token_timeout", drain, self.open(pool, first_token=SHORT))

    def test_half_a_head_in_time(self):
        """No more does a head that never ends."""
        _, pool = self.serve([b"HTTP/1.1 200 OK\r\n", HANG])
        self.fails("first_token_timeout", self.open, pool, first_token=SHORT)

    def test_after_the_content(self):
        """Silence is idle_timeout, the whole request's end is total_timeout."""
        for changes, reason in (({"idle": SHORT}, "idle_timeout"), ({"deadline": SHORT}, "total_timeout")):
            within = limits(**changes)
            _, pool = self.serve([stream_head() + chunk(b"1"), HANG])
            patience = Patience(within)
            reply = exchange(pool, REQUEST, within, NoClient(), patience)
            self.addCleanup(reply.close)
            self.assertEqual(b"1", reply.read())
            patience.content()
            self.fails(reason, reply.read)

    def test_a_server_that_never_stops(self):
        """One that always has something to be read ends at its limit nevertheless."""
        endless = [chunk(b"x" * 60_000)] * 10_000
        within = limits(deadline=0.2)
        _, pool = self.serve([stream_head(), *endless])
        patience = Patience(within)
        reply = exchange(pool, REQUEST, within, NoClient(), patience)
        self.addCleanup(reply.close)
        patience.content()
        self.fails("total_timeout", drain, reply)
        _, pool = self.serve([b"HTTP/1.1 100 Continue\r\n\r\n" * 1000] * 10_000)
        self.fails("first_token_timeout", self.open, pool, first_token=0.2)

    def test_time_that_is_over(self):
        """Then nothing is sent any more, on a pooled connection or a fresh one."""
        server, pool = self.serve(then=OK)
        self.ask(pool)
        over: tuple[dict[str, Any], ...] = ({"answer_by": 0.0}, {"answer_by": -5.0}, {"first_token": 0.0})
        for changes in over:
            self.fails("first_token_timeout", self.open, pool, **changes)
            with self.assertRaises(BackendError):
                self.open(self.pool(backend(server.port)), **changes)
        self.assertEqual(1, len(server.requests))

    def test_a_server_that_does_not_read(self):
        """A large request that is not taken ends at the limit."""
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            pool = self.pool(backend(deaf.getsockname()[1]))
            self.fails("first_token_timeout", self.open, pool, large_request(), first_token=SHORT)

    def test_patience_alone(self):
        """Which limit counts when, and what it is called."""
        now = 1000.0
        with mock.patch("time.monotonic", side_effect=lambda: now):
            within = Limits(1, 2, first_token=30, idle=5, answer_by=1020, deadline=1100)
            stream, plain = Patience(within), Patience(within, plain=True)
            self.assertEqual((1020, 1020), (stream.until(), plain.until()))
            sooner = Patience(within._replace(first_token=7))
            now = 1003.0
            self.assertEqual(1007, sooner.until())
            self.assertIn("no answer within 3.0 s", sooner.expired().message)
            self.assertEqual("answer_timeout", plain.expired().reason)
            stream.content()
            self.assertEqual(1008, stream.until())
            self.assertEqual("idle_timeout", stream.expired().reason)
            now = 1006.0
            self.assertEqual(1008, stream.until())  # however often it is asked: pings are no content
            now = 1099.0
            stream.content()
            self.assertEqual(1100, stream.until())
            now = 1100.0
            self.assertEqual("total_timeout", stream.expired().reason)
            plain.last_call(1100.5)
            self.assertEqual(1100, plain.until())


def drain(reply: BlockingReply) -> None:
    while reply.read():
        pass


class Leaving(TransportCase):
    """The client's leaving ends every wait, and the connection to the backend with it."""

    def test_while_it_waits_for_the_head(self):
        """ClientGone, and the server sees the connection close."""
        for leave in (Client.leave, Client.reset):
            client = Client(self)
            server, pool = self.serve(lambda _, leave=leave, client=client: leave(client) or [HANG])
            with self.assertRaises(ClientGone):
                self.open(pool, watch=client.watch)
            server.wait_closed(0)

    def test_while_it_waits_for_the_body(self):
        """The reader closes the reply, as always."""
        client = Client(self)
        server, pool = self.serve([stream_head() + chunk(b"1"), HANG])
        reply = self.open(pool, watch=client.watch)
        reply.read()
        client.leave()
        with self.assertRaises(ClientGone):
            reply.read()
        reply.close()
        server.wait_closed(0)

    def test_while_the_server_does_not_read(self):
        """A large request stuck half-way."""
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            client = Client(self)
            client.leave()
            with self.assertRaises(ClientGone):
                self.open(self.pool(backend(deaf.getsockname()[1])), large_request(), watch=client.watch)

    def test_while_it_connects(self):
        """Also by a reset, which must not look like the backend's."""
        with full_listener(self) as port:
            for leave in (Client.leave, Client.reset):
                client = Client(self)
                leave(client)
                with self.assertRaises(ClientGone):
                    self.open(self.pool(backend(port)), watch=client.watch)

    def test_while_a_name_is_resolved(self):
        """The resolver's thread is left to itself."""
        release = threading.Event()
        self.addCleanup(release.set)
        client = Client(self)
        client.leave()
        resolver: Any = mock.patch("socket.getaddrinfo", lambda *_, **__: release.wait(LONG) and [])
        with resolver, self.assertRaises(ClientGone):
            self.open(self.pool(backend(80, "slow.test")), watch=client.watch)


class Descriptors(TransportCase):
    def test_none_is_left(self):
        """After every way to fail, twice: as many are open as before."""
        before = descriptors()
        with full_listener(self) as full:
            base = descriptors()
            for _ in range(2):
                self._fail_in_every_way(full)
            self.until(lambda: descriptors() <= base)
        self.until(lambda: descriptors() <= before)

    def _fail_in_every_way(self, full: int) -> None:
        broken: list[Any] = [[RESET], [CLOSE], [b"garbage\r\n\r\n"], [stream_head() + b"x\r\n"], [OK[:-1], CLOSE]]
        for script in broken:
            with ScriptedServer([script]) as server:
                self._once(backend(server.port))
        with ScriptedServer([[HANG]]) as server:
            self._once(backend(server.port), first_token=SHORT)
        with ScriptedServer([OK, [RESET], OK], then=OK) as server:
            self._once(backend(server.port), times=3)
        with answering_once(self, socket.AF_INET, "127.0.0.1") as port:
            self._once(backend(port, scheme="https"))
        self._once(backend(full), connect=SHORT)
        self._once(backend(full, scheme="https"), connect=SHORT)
        self._once(backend(free_port(), "localhost"))
        self._once(backend(80, "a..b"))
        gone, left = socket.socketpair()
        with gone, left, ScriptedServer([[HANG]]) as server:
            left.close()
            self._once(backend(server.port), watch=ClientWatch(gone, lambda: False))

    def _once(self, of: Backend, times: int = 1, watch: Watch | None = None, **changes: float) -> None:
        pool = Pool(of)
        for _ in range(times):
            within = limits(**changes)
            with contextlib.suppress(BackendError, ClientGone):
                reply = exchange(pool, REQUEST, within, watch or NoClient(), Patience(within))
                with contextlib.closing(reply):
                    reply.read_all()
        pool.close()

    def test_a_number_used_again(self):
        """The next upstream may get the descriptor of a closed one; the watch looks at the new one."""
        client = Client(self)
        numbers = set()
        for _ in range(5):
            _, pool = self.serve([OK[:-1], HANG], max_idle=0)
            reply = self.open(pool, watch=client.watch)
            numbers.add(reply.reply._connection._sock.fileno())
            self.assertEqual(b"{", reply.read())
            reply.close()
        for end in (CLOSE, HANG):
            _, pool = self.serve([stream_head(), end])
            reply = self.open(pool, watch=client.watch, first_token=SHORT)
            self.fails("connection_lost" if end is CLOSE else "first_token_timeout", reply.read)
            reply.close()

    def test_many_at_once(self):
        """Eight threads on one pool: each gets its own answers, and no more connections than threads are made."""

        def echo(request: ScriptedRequest) -> bytes:
            return http_reply(request.body)

        server, pool = self.serve(then=echo)
        problems: list[Any] = []

        def work(number: int) -> None:
            for turn in range(50):
                word = b"%d-%d" % (number, turn)
                request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(word), word)
                found = self.ask(pool, request)
                if found != (200, word):
                    problems.append((word, found))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        self.assertEqual([], problems)
        self.assertEqual(400, len(server.requests))
        self.assertLessEqual(server.connections, 8)


# --- TLS ------------------------------------------------------------------------------------------


def wake(listener: socket.socket) -> None:
    """End its accept(); some systems can't do that, and it goes with its thread."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


# with all that Python 3.13's stricter check asks for
CA = """[req]
distinguished_name = name
[name]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
"""


class Tls(TransportCase):
    folder: str

    @classmethod
    def setUpClass(cls) -> None:
        if shutil.which("openssl") is None:
            raise unittest.SkipTest("openssl is not installed")
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory(prefix="portway-tls-"))
        cls.write("ca.conf", CA)
        making = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -config ca.conf -extensions ca"
        cls.openssl(f"{making} -keyout ca.key -out ca.pem")
        for name, alternative in (("right", "IP:127.0.0.1,DNS:localhost"), ("wrong", "DNS:other.test")):
            cls.write(f"{name}.ext", f"subjectAltName={alternative}\nauthorityKeyIdentifier=keyid\n")
            cls.openssl(
                f"req -newkey rsa:2048 -nodes -subj /CN={name} -config ca.conf -keyout {name}.key -out {name}.csr"
            )
            signing = "-CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
            cls.openssl(f"x509 -req -in {name}.csr {signing} -extfile {name}.ext -out {name}.pem")

    @classmethod
    def write(cls, name: str, text: str) -> None:
        with open(f"{cls.folder}/{name}", "w", encoding="ascii") as file:
            file.write(text)

    @classmethod
    def openssl(cls, arguments: str) -> None:
        subprocess.run(["openssl", *arguments.split()], cwd=cls.folder, check=True, capture_output=True, timeout=60)

    def serve_tls(self, *answers: bytes, certificate: str = "right", stays: bool = True) -> Backend:
        """A server that sends these to one request each, after the handshake; then waits for the end, or leaves."""

        def play(secure: ssl.SSLSocket) -> None:
            for answer in answers:
                secure.recv(65536)
                secure.sendall(answer)
            if stays:
                secure.recv(1)

        return self.play_tls(play, certificate)

    def play_tls(self, play: Callable[[ssl.SSLSocket], None], certificate: str = "right") -> Backend:
        """A server that hands each connection to `play` after the handshake."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"{self.folder}/{certificate}.pem", f"{self.folder}/{certificate}.key")
        listener = socket.create_server(("127.0.0.1", 0))

        def accept() -> None:
            with contextlib.suppress(OSError):  # the listener's end
                while True:
                    sock, _ = listener.accept()
                    threading.Thread(target=handle, args=(sock,), daemon=True).start()

        def handle(sock: socket.socket) -> None:
            with contextlib.suppress(OSError), sock:
                sock.settimeout(LONG)
                with context.wrap_socket(sock, server_side=True) as secure:
                    play(secure)

        threading.Thread(target=accept, daemon=True).start()
        self.addCleanup(listener.close)
        self.addCleanup(wake, listener)
        return backend(listener.getsockname()[1], scheme="https")

    def trusted(self) -> None:
        patch = mock.patch.dict(os.environ, {"SSL_CERT_FILE": f"{self.folder}/ca.pem"})
        patch.start()
        self.addCleanup(patch.stop)

    def test_a_verified_server(self):
        """Two requests on one connection, with an authority named in SSL_CERT_FILE."""
        self.trusted()
        handshakes: list[int] = []

        def play(secure: ssl.SSLSocket) -> None:
            handshakes.append(1)
            while secure.recv(65536):
                secure.sendall(OK)

        pool = self.pool(self.play_tls(play))
        self.assertEqual([SERVED, SERVED], [self.ask(pool), self.ask(pool)])
        self.assertEqual(1, len(handshakes))

    def test_a_server_that_is_not_trusted(self):
        """An authority that nobody named, or a certificate for another name: connect_failed that says so."""
        of = self.serve_tls()
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": self.folder}):
            error = self.fails("connect_failed", self.ask, self.pool(of))
        self.assertIn("certificate is not trusted", error.message)
        self.assertIn("SSL_CERT_FILE", error.message)
        self.trusted()
        of = self.serve_tls(certificate="wrong")
        error = self.fails("connect_failed", self.ask, self.pool(of))
        self.assertIn("127.0.0.1", error.detail)

    def test_a_server_without_tls(self):
        """https asked of plain HTTP is told in words."""
        with answering_once(self, socket.AF_INET, "127.0.0.1") as port:
            error = self.fails("connect_failed", self.ask, self.pool(backend(port, scheme="https")))
        self.assertIn("TLS failed", error.detail)

    def test_a_handshake_that_does_not_end(self):
        """connect_timeout; and the client's leaving ends it too."""
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            of = backend(deaf.getsockname()[1], scheme="https")
            error = self.fails("connect_timeout", self.ask, self.pool(of), connect=SHORT)
            self.assertIn("handshake", error.message)
            client = Client(self)
            client.leave()
            with self.assertRaises(ClientGone):
                self.open(self.pool(of), watch=client.watch)

    def test_bytes_that_the_tls_layer_holds(self):
        """poll() does not see what is decrypted already: it must not be waited for."""
        self.trusted()
        of = self.serve_tls(http_reply(b"x" * 5000))
        with mock.patch.object(transport, "RECEIVE", 7):
            self.assertEqual((200, b"x" * 5000), self.ask(self.pool(of)))

    def test_bytes_that_the_tls_layer_holds_spoil_an_idle_connection(self):
        """They would become the next request's answer."""
        self.trusted()
        of = self.serve_tls(OK + OK)
        pool = self.pool(of)
        with mock.patch.object(transport, "RECEIVE", len(OK)):
            self.ask(pool)
            self.assertFalse(pool._idle[0].is_open())

    def test_a_large_request_and_answer(self):
        """Megabytes both ways, with a server that reads slowly."""
        self.trusted()
        request = large_request(4 * 1024 * 1024)

        def play(secure: ssl.SSLSocket) -> None:
            got = 0
            while got < len(request):
                got += len(secure.recv(65536))
            secure.sendall(http_reply(b"y" * 3_000_000))
            secure.recv(1)

        status, body = self.ask(self.pool(self.play_tls(play)), request)
        self.assertEqual((200, 3_000_000), (status, len(body)))

    def test_an_end_without_a_word(self):
        """A connection cut in the middle of an answer is lost, as without TLS."""
        self.trusted()
        of = self.serve_tls(http_reply(b"hello")[:-1], stays=False)
        self.fails("connection_lost", self.ask, self.pool(of))

    def test_no_descriptor_is_left(self):
        """After failed and good handshakes."""
        self.trusted()
        of = self.serve_tls(OK)
        wrong = self.serve_tls(certificate="wrong")
        before = descriptors()
        for _ in range(3):
            pool = Pool(of)
            self.ask(pool)
            pool.close()
            self.fails("connect_failed", self.ask, Pool(wrong))
        self.until(lambda: descriptors() <= before)


if __name__ == "__main__":
    unittest.main()
