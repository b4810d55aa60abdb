"""What a request leaves behind: nothing of its text, as soon as it has ended, and without a collection of garbage.

A connection can idle for minutes and prompts are large: 512 connections of an editor would hold 100 MB of them.
"""

from __future__ import annotations

import gc
import os
import tempfile
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
from tests.targets import CHAT, Target, answer, begun, chain

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
            client.request("POST", CHAT, {"model": "first", "messages": [{"role": "user", "content": "why?"}]})
            wait_for(lambda: bool(self.backend.asked), "the backend's being asked")
            self.assertTrue(left_over())
        self.assert_nothing_is_left()


if __name__ == "__main__":
    unittest.main()
