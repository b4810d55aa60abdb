"""A backend that fails as it is told, and else answers right: either kind's protocol on one port.

Which request fails how goes by the physical model it names, so that many ways of failing can be played at the same
time. As a program of its own it is there to be killed:

    python -m scripts.torture_rows.saboteur --name NAME --port PORT [--act FAULT]

SIGUSR1 tells it that the client has seen the first content.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from scripts.torture_rows.speech import Order, Speech, read_order, response

RECEIVE = 65_536
LONGEST = 60.0  # seconds that a hang lasts when nobody ends it


class Step(Enum):
    """What may follow an act's bytes."""

    CLOSE = "FIN"
    RESET = "RST"
    HANG = "nothing, until the peer leaves or release()"
    SEEN = "nothing, until saw() says that the client has got what was sent so far"
    KILL = "SIGKILL to the process that plays it"


@dataclass(frozen=True, slots=True)
class Drip:
    """Bytes one by one, or `size` by `size`, `gap` seconds apart."""

    data: bytes
    gap: float
    size: int = 1


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing for so many seconds, unless the peer leaves."""

    seconds: float


Action = bytes | Drip | Pause | Step
Act = Callable[[Speech], Iterable[Action]]


class _Over(Exception):
    """The connection has been ended, from either side."""


class Saboteur:
    """A server on 127.0.0.1. listener: a listening socket of the caller's; None = one of its own, on `port`.
    raw: played as soon as anything comes on a connection, whatever it is."""

    def __init__(
        self, name: str, listener: socket.socket | None = None, port: int = 0, raw: Sequence[Action] | None = None
    ) -> None:
        self.name = name
        self._raw = raw
        self._listener = listener or socket.create_server(("127.0.0.1", port), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self._changed = threading.Condition()  # guards what follows; notified on every change
        self._acts: dict[str, Act] = {}
        self._asked: Counter[str] = Counter()
        self._seen: set[str] = set()  # models
        self._connections: set[socket.socket] = set()
        self._hanging = 0
        self._released = 0
        self._stopped = False
        threading.Thread(target=self._accept, name=f"saboteur-{name}", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Its address, for a backend of either kind."""
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Stop listening and end every connection."""
        with self._changed:
            self._stopped = True
            connections = list(self._connections)
            self._changed.notify_all()
        for sock in (self._listener, *connections):
            _shut(sock)
        self._listener.close()

    def fail(self, model: str, act: Act) -> None:
        """Play `act` for every request for `model` from now on."""
        with self._changed:
            self._acts[model] = act

    def heal(self, model: str) -> None:
        """Answer them right."""
        with self._changed:
            self._acts.pop(model, None)

    def saw(self, model: str) -> None:
        """The client of `model` has got its first content; "*" = every client."""
        with self._changed:
            self._seen.add(model)
            self._changed.notify_all()

    def release(self) -> None:
        """Let what hangs now go on to its next action."""
        with self._changed:
            self._released += 1
            self._changed.notify_all()

    def asked(self, model: str) -> int:
        """How many requests for `model` have come in whole."""
        with self._changed:
            return self._asked[model]

    def forget(self, model: str) -> None:
        """Count them anew."""
        with self._changed:
            del self._asked[model]

    @property
    def connections(self) -> int:
        """How many are open."""
        with self._changed:
            return len(self._connections)

    @property
    def hanging(self) -> int:
        """How many requests hang."""
        with self._changed:
            return self._hanging

    def wait_hanging(self, count: int, timeout: float) -> bool:
        """Wait until so many requests hang at the same time; whether they do."""
        with self._changed:
            return self._changed.wait_for(lambda: self._hanging >= count, timeout)

    # --- connections

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(LONGEST)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                if self._stopped:
                    sock.close()
                    return
                self._connections.add(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            rest = b""
            if self._raw is not None:
                rest = _receive(sock)
                self._play("", sock, self._raw)
            while True:
                path, body, rest = _read_request(sock, rest)
                if isinstance(body, dict) and "messages" in body:
                    self._answer(read_order(path, body), sock)
                else:  # what the daemon asks of its own accord
                    sock.sendall(response("404 Not Found", "application/json", b'{"error":"not now"}'))
        except (OSError, _Over):
            pass
        finally:
            with self._changed:
                self._connections.discard(sock)
                self._changed.notify_all()
            sock.close()

    def _answer(self, order: Order, sock: socket.socket) -> None:
        with self._changed:
            self._asked[order.model] += 1
            act = self._acts.get(order.model) or self._acts.get("*")
        speech = Speech(order, self.name)
        self._play(order.model, sock, act(speech) if act else [speech.whole()])

    def _play(self, model: str, sock: socket.socket, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case bytes():
                    sock.sendall(action)
                case Drip():
                    for at in range(0, len(action.data), action.size):
                        sock.sendall(action.data[at : at + action.size])
                        self._wait(sock, action.gap)
                case Pause():
                    self._wait(sock, action.seconds)
                case Step():
                    self._take(action, model, sock)

    def _take(self, step: Step, model: str, sock: socket.socket) -> None:
        match step:
            case Step.SEEN:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or not self._seen.isdisjoint((model, "*")), LONGEST)
            case Step.HANG:
                self._hang(sock)
            case Step.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Step.CLOSE:
                raise _Over
            case Step.RESET:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raise _Over

    def _hang(self, sock: socket.socket) -> None:
        with self._changed:
            self._hanging += 1
            before = self._released
            self._changed.notify_all()
        until = time.monotonic() + LONGEST
        try:
            while time.monotonic() < until:
                self._wait(sock, 0.02)
                with self._changed:
                    if self._released > before or self._stopped:
                        return
        finally:
            with self._changed:
                self._hanging -= 1

    @staticmethod
    def _wait(sock: socket.socket, seconds: float) -> None:
        """Raises _Over as soon as it does."""
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        if poller.poll(seconds * 1000) and not sock.recv(1, socket.MSG_PEEK):
            raise _Over


def _read_request(sock: socket.socket, rest: bytes) -> tuple[str, Any, bytes]:
    """(path, body as JSON or None, what came behind it). Raises _Over and OSError."""
    while b"\r\n\r\n" not in rest:
        rest += _receive(sock)
    head, _, rest = rest.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(fields.get("content-length", "0"))
    while len(rest) < length:
        rest += _receive(sock)
    body, rest = rest[:length], rest[length:]
    try:
        return first.split(" ")[1], json.loads(body), rest
    except ValueError:
        return first.split(" ")[1], None, rest


def _receive(sock: socket.socket) -> bytes:
    data = sock.recv(RECEIVE)
    if not data:
        raise _Over
    return data


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was faster


_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


def main(argv: Sequence[str]) -> int:
    """The program: serve until a signal ends it. Returns the exit code."""
    from scripts.torture_rows.faults import FAULTS

    parser = argparse.ArgumentParser(prog="saboteur", description="A backend that is there to be killed.")
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--act", choices=sorted(FAULTS), help="how every request ends; none = with a right answer")
    options = parser.parse_args(argv)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # before there are threads, which inherit it
    saboteur = Saboteur(options.name, port=options.port)
    if options.act:
        saboteur.fail("*", FAULTS[options.act].act)
    print(f"listening on {saboteur.url}", flush=True)
    while signal.sigwait(_SIGNALS) == signal.SIGUSR1:
        saboteur.saw("*")
    saboteur.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
