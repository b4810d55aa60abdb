"""The core's coroutines as plain calls, for tests whose waits block: one step after the other, on the test's thread.

Each needs a Watch that blocks (watch.NoClient, or a ClientWatch without a Task); see call.finish.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from portway.backends.transport import Patience, Pool, Reply
from portway.call import finish

if TYPE_CHECKING:
    from portway.call import Answer, Limits, Served, Watch
    from portway.memory.residency import Free, Place
    from portway.wire.http1 import ResponseHead


def pieces(answer: Answer) -> Iterator[bytes]:
    """All pieces of an answer, each when it is asked for."""
    while piece := finish(answer.piece()):
        yield piece


def read(answer: Answer, place: Place | Free) -> bytes:
    """The whole of a stream that holds a place, which is told of its first content, as the router does."""
    text = b""
    for piece in pieces(answer):
        place.began()
        text += piece
    return text


def rest(served: Served) -> Iterator[bytes]:
    """All pieces of a stream but the first."""
    while served.piece is not None and (piece := finish(served.piece())):
        yield piece


def whole(answer: Answer) -> bytes:
    """A plain answer."""
    return finish(answer.whole())


def close(answer: Answer) -> None:
    """The answer's end."""
    finish(answer.close())


class BlockingReply:
    """A transport.Reply whose reads block."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply

    @property
    def head(self) -> ResponseHead:
        """See Reply.head."""
        return self.reply.head

    def read(self) -> bytes:
        """See Reply.read."""
        return finish(self.reply.read())

    def read_all(self, *limit: int) -> bytes:
        """See Reply.read_all."""
        return finish(self.reply.read_all(*limit))

    def settle(self, *seconds: float) -> None:
        """See Reply.settle."""
        finish(self.reply.settle(*seconds))

    def close(self) -> None:
        """See Reply.close."""
        self.reply.close()


def exchange(pool: Pool, request: bytes, limits: Limits, watch: Watch, patience: Patience) -> BlockingReply:
    """See Pool.exchange."""
    return BlockingReply(finish(pool.exchange(request, limits, watch, patience)))
