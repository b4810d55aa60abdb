"""One client's connection as the stand-in sees it: bytes out, waits that never miss the client leaving.

Responses are put together here because a fault may strike between any two of their bytes.
Nothing here knows what is said.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from email.utils import formatdate
from http import HTTPStatus

SERVER = "portway-stand-in/1"

_LEFT = getattr(select, "POLLRDHUP", 0)  # the peer's FIN, seen past unread bytes; Linux alone has it


class ClientLeft(Exception):
    """The client closed or reset the connection, or half-closed it, which counts as the same."""


class Stopped(Exception):
    """The stand-in is being stopped."""


class HungUp(Exception):
    """The stand-in itself ended the connection, as a fault told it to."""


class Bell:
    """A wake-up call that poll() can wait for beside sockets. It keeps ringing until silenced."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._lock = threading.Lock()  # guards _open against ring() during close()
        self._open = True

    def fileno(self) -> int:
        """What poll() waits for."""
        return self._reader

    def ring(self) -> None:
        """Wake whoever waits, and whoever waits later. May be called at any time, by any thread."""
        with self._lock:
            if self._open:
                try:
                    os.write(self._writer, b"!")
                except BlockingIOError:
                    pass  # the pipe is full of rings already

    def silence(self) -> None:
        """Stop ringing."""
        try:
            os.read(self._reader, 65536)
        except BlockingIOError:
            pass  # it didn't ring

    def close(self) -> None:
        """Give the descriptors back."""
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._reader)
                os.close(self._writer)


class Wire:
    """Sends on one connection and waits beside it. Every method raises ClientLeft or Stopped."""

    def __init__(self, sock: socket.socket, stop: Bell) -> None:
        self._sock = sock
        self._stop = stop
        self._input = select.POLLIN  # until a further request is seen to be waiting there
        self.drip = 0.0  # seconds between two bytes of the head, 0 = all at once
        self.started = False  # some of the response was sent

    def wait(self, seconds: float | None, bell: Bell | None = None) -> bool:
        """Wait for the bell (True) or the time (False; None = for ever)."""
        until = None if seconds is None else time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        if bell is not None:
            poll.register(bell, select.POLLIN)
        while True:
            poll.register(self._sock, self._input | _LEFT)
            left = None if until is None else max(0.0, until - time.monotonic()) * 1000
            ready = {descriptor for descriptor, _ in poll.poll(left)}
            if self._stop.fileno() in ready:
                raise Stopped
            if self._sock.fileno() in ready:
                self._look()
            if bell is not None and bell.fileno() in ready:
                return True
            if until is not None and time.monotonic() >= until:
                return False

    def respond(
        self,
        status: int,
        content_type: str,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        head_only: bool = False,
    ) -> None:
        """One whole response; the answer to HEAD is its head."""
        fields = {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
        self._send_head(status, fields, b"" if head_only else body)

    def start(self, content_type: str, first: bytes = b"", status: int = 200) -> None:
        """A chunked response's head unless it was sent, with a chunk if there is one already."""
        if not self.started:
            fields = {"Content-Type": content_type, "Transfer-Encoding": "chunked"}
            self._send_head(status, fields, _chunk(first) if first else b"")
        elif first:
            self.chunk(first)

    def chunk(self, data: bytes) -> None:
        """One chunk, in one packet if it fits."""
        self.send(_chunk(data))

    def finish(self) -> None:
        """The last, empty chunk."""
        self.send(b"0\r\n\r\n")

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self.started = True
        try:
            self._sock.sendall(data)
        except OSError as exc:
            raise ClientLeft from exc

    def reset(self) -> None:
        """Abort the connection with RST. Raises HungUp."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self._sock.detach())  # close() would leave it open as long as http.server's reader is
        raise HungUp

    def hang_up(self) -> None:
        """Close the connection in an orderly way. Raises HungUp."""
        raise HungUp

    def _send_head(self, status: int, fields: Mapping[str, str], body: bytes) -> None:
        lines = [f"HTTP/1.1 {status} {_reason(status)}", f"Server: {SERVER}", f"Date: {formatdate(usegmt=True)}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        if not self.drip:
            self.send(head + body)
            return
        for piece in _bytewise(head):
            self.send(piece)
            self.wait(self.drip)
        self.send(body)

    def _look(self) -> None:
        try:
            waiting = self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as exc:
            raise ClientLeft from exc
        # A further request may wait behind the one in hand; it is no sign of leaving, its end would be.
        if not waiting or not self._input:
            raise ClientLeft
        self._input = 0


def somebody_is_there(listener: socket.socket, stop: Bell) -> bool:
    """Wait for a connection to accept (True), or for the bell (False)."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(stop, select.POLLIN)
    return stop.fileno() not in {descriptor for descriptor, _ in poll.poll()}


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _bytewise(data: bytes) -> Iterable[bytes]:
    return (data[index : index + 1] for index in range(len(data)))


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"  # 529 and its like are in no registry
