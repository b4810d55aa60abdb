"""What a request leaves behind: nothing of its text, as soon as it has ended, and without a collection of garbage.

A connection can idle for minutes and prompts are large: 512 connections of an editor would hold 100 MB of them.
"""

from __future__ import annotations

import gc
import os
import socket
import tempfile
import threading
import unittest
from typing import Any

from portway.answers import Found
from portway.cache.store import Cache
from portway.call import Call, Served
from portway.telemetry import Log, Record
from portway.wire.http1 import Request
from tests.daemon import Daemon
from tests.doubles import Close, Hang, Reset, chunk, json_reply
from tests.llama_server import wait_for
from tests.targets import CHAT, MESSAGES, Reply, Target, answer, begun, chain
from tests.test_council import BROKEN, Sitting, plain, said

OF_A_REQUEST = (Call, Found, Request, Served)
LARGE = "a" * 1_200_000  # is read on a worker


def left_over() -> list[object]:
    """What there still is of any request; garbage that waits to be collected counts."""
    found: list[object] = [each for each in gc.get_objects() if isinstance(each, OF_A_REQUEST)]
    records = [each for each in gc.get_objects() if isinstance(each, Record)]
    return found + [each for each in records if each.body is not None or each.document]


class Held(unittest.TestCase):
    """Each kind of end, on a connection that is kept and on one that closes."""

    def setUp(self) -> None:
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(folder, "log.jsonl")
        cache = Cache(os.path.join(folder, "cache.sqlite3"))
        self.addCleanup(cache.close)
        self.cache = cache
        self.backend = self.enterContext(Target())
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)

    def start(self, *, logged: bool = True) -> Daemon:
        log = Log(self.path) if logged else None
        if log is not None:
            self.addCleanup(log.close, 5.0)
        models = {"first": 'cache = "1h"\n'}
        return self.enterContext(Daemon(chain(self.backend.url, models=models), log=log, cache=self.cache))

    def assert_nothing_is_left(self) -> None:
        self.cache.flush(5.0)
        wait_for(lambda: not left_over(), "the end of all that a request has made")

    def ask(self, daemon: Daemon, status: int, text: str = "why?", **fields: Any) -> None:
        """On a connection that stays, then on one that closes."""
        body = {"model": "first", "messages": [{"role": "user", "content": text}], **fields}
        with daemon.client() as client:
            self.assertEqual(status, client.call("POST", CHAT, body).status)
            self.assert_nothing_is_left()
        with daemon.client() as client:
            self.assertEqual(status, client.call("POST", CHAT, body, {"Connection": "close"}).status)
            self.assert_nothing_is_left()

    def test_an_answer(self) -> None:
        """The first is a target's, the second the cache's."""
        daemon = self.start()
        for stream in (False, True):
            for text in ("short", LARGE):
                with self.subTest(stream=stream, length=len(text)):
                    self.backend.add_answer(answer("openai", "because", stream=stream))
                    self.ask(daemon, 200, text + str(stream), stream=stream)
        self.assertEqual(0, self.backend.left)

    def test_an_answer_without_a_log(self) -> None:
        self.backend.add_answer(answer("openai", "because"))
        self.ask(self.start(logged=False), 200)

    def test_an_error(self) -> None:
        """Of the backend, in each way that there is, and of the client."""
        daemon = self.start()
        broken = json_reply({"error": {"message": "it broke"}}, 500)
        for reply in (broken, [Reset()], [Close()], b"nonsense\r\n\r\n", json_reply({"choices": []})):
            for stream in (False, True):
                with self.subTest(reply=reply, stream=stream):
                    self.backend.add_answer(reply, reply)
                    self.ask(daemon, 502, stream=stream)
        self.ask(daemon, 400, stream="yes")
        self.ask(daemon, 404, model="nobody")

    def test_a_stream_that_breaks(self) -> None:
        daemon = self.start()
        for end in ([Reset()], [Close()], [chunk(b'data: {"error": {"message": "it broke"}}\n\n')]):
            with self.subTest(end=end):
                self.backend.add_answer([begun("openai", "be"), *end], [begun("openai", "be"), *end])
                self.ask(daemon, 200, stream=True)

    def test_a_client_that_leaves(self) -> None:
        daemon = self.start()
        self.backend.add_answer([Hang()])
        with daemon.client() as client:
            client.request("POST", CHAT, {"model": "first", "messages": MESSAGES})
            wait_for(lambda: bool(self.backend.asked), "the backend's being asked")
            self.assertTrue(left_over())
        self.assert_nothing_is_left()

    def test_a_client_that_leaves_a_shared_answer(self) -> None:
        """It is read to its end for the one who waits."""
        daemon = self.start()
        go = threading.Event()
        self.backend.add_answer([go, answer("openai", "because")])
        with daemon.client() as leader, daemon.client() as other:
            for client in (leader, other):
                client.request("POST", CHAT, {"model": "first", "messages": MESSAGES})
                wait_for(lambda: bool(self.backend.asked), "the backend's being asked")
            wait_for(lambda: daemon.sharing == 1, "the other's waiting")
            leader.reset()
            go.set()
            self.assertEqual(200, other.response().status)
            self.assert_nothing_is_left()

    def test_an_address_that_fails(self) -> None:
        """The name has two; the server has only the second."""
        try:
            server = self.enterContext(socket.create_server(("::1", 0), family=socket.AF_INET6))
        except OSError as exc:
            self.skipTest(f"no IPv6 here: {exc}")
        port = server.getsockname()[1]
        toml = f'[backends.six]\nkind = "openai"\nurl = "http://localhost:{port}/v1"\n'
        daemon = self.enterContext(Daemon(f'{toml}[models.first]\nbackend = "six"\nmodel = "one"\n'))
        with daemon.client() as client:
            client.request("POST", CHAT, {"model": "first", "messages": MESSAGES})
            self.answer_once(server)
            self.assertEqual(200, client.response().status)
            self.assert_nothing_is_left()

    def answer_once(self, server: socket.socket) -> None:
        """The first connection that brings a chat; the daemon asks for the list of models, too."""
        server.settimeout(30.0)
        while True:
            connection, _ = server.accept()
            self.addCleanup(connection.close)
            if connection.recv(65_536).startswith(b"POST"):
                connection.sendall(answer("openai", "because"))
                return


class HeldByPanels(unittest.TestCase):
    """The same, of councils and cascades: however a member, a step or the chairman fares."""

    def setUp(self) -> None:
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)

    def sit(self, *members: Reply, chair: Reply, status: int = 200, **fields: Any) -> None:
        with Sitting(*members, chair=chair) as sitting:
            self.assertEqual(status, sitting.ask(**fields).status)
            wait_for(lambda: not left_over(), "the end of all that a council has made")

    def test_a_council(self) -> None:
        self.sit(said("a"), said("b"), chair=plain("c"))
        self.sit(said("a"), said("b"), chair=said("c"), stream=True)

    def test_a_member_that_fails(self) -> None:
        self.sit(said("a"), BROKEN, said("c"), chair=plain("d"))

    def test_a_chairman_that_fails(self) -> None:
        self.sit(said("a"), said("b"), chair=BROKEN)

    def test_no_quorum(self) -> None:
        self.sit(BROKEN, BROKEN, chair=plain("c"), status=502)

    def test_cascades(self) -> None:
        """Its first does; its first fails; all fail."""
        rows = ((plain("a"), plain("b"), 200), (BROKEN, plain("b"), 200), (BROKEN, BROKEN, 502))
        for first, second, status in rows:
            with self.subTest(status=status), Target(then=first) as one, Target(then=second) as two:
                toml = chain(one.url, two.url)
                toml += '[models.steps]\nkind = "cascade"\nmembers = ["first", "second"]\n'
                with Daemon(toml.replace('fallback = ["second"]', "")) as daemon, daemon.client() as client:
                    response = client.call("POST", CHAT, {"model": "steps", "messages": MESSAGES})
                    self.assertEqual(status, response.status)
                    wait_for(lambda: not left_over(), "the end of all that a cascade has made")


if __name__ == "__main__":
    unittest.main()
