"""Where the matrix takes place: the backends that fail, each in its way, and the configuration that names them.

Most faults are played by one server that fails by the name of the model. What fails before a request is read, a port
that nobody listens on, TLS, a process that is killed, is a backend for each cell, so that it can be healed by itself.
"""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from scripts.torture_rows import ROOT, Process
from scripts.torture_rows.faults import FAULTS, Fault
from scripts.torture_rows.saboteur import Action, Saboteur
from scripts.torture_rows.speech import KINDS, Kind, Speech

LIMITS = {"connect": 0.7, "load": 0.8, "first_token": 1.0, "idle": 1.0, "total": 3.0}  # seconds
SPARE: Mapping[Kind, str] = {"ollama": "spare-openai", "openai": "spare-ollama"}  # a chain goes on with the other kind
NOWHERE = ".".join(["nowhere"] * 40)  # longer than any name may be: the resolver says so without asking anybody
NO_NAME = "a..b"
FILLERS = 8  # connections that fill the queue of a listener that has none


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination; `name` is also its models', logical and physical."""

    fault: str
    kind: Kind
    stream: bool
    chain: bool

    @property
    def name(self) -> str:
        """As it stands in the configuration and the log."""
        return f"{self.fault}-{self.kind}-{'stream' if self.stream else 'plain'}-{'chain' if self.chain else 'alone'}"

    @property
    def what(self) -> Fault:
        """How it fails."""
        return FAULTS[self.fault]


class Stage:
    """The backends of `cells`, in `folder`. places: how many requests a backend of several cells takes at once."""

    def __init__(self, cells: Sequence[Cell], folder: Path, places: int) -> None:
        self._stack = ExitStack()
        self._folder = folder
        self._healing: dict[Cell, Callable[[], None]] = {}
        self._seeing: dict[Cell, Callable[[], None]] = {}
        self._ending: list[Callable[[], None]] = []  # what can't be healed
        self._backends: dict[str, tuple[Kind, str, int]] = {}  # name -> kind, address, places
        self._models: dict[str, tuple[str, str]] = {}  # name -> backend, further lines
        self.first = self._stack.enter_context(Saboteur("first"))
        self.spare = self._stack.enter_context(Saboteur("spare"))
        try:
            for kind in KINDS:
                self._backends[f"first-{kind}"] = (kind, self.first.url, places)
                self._backends[f"spare-{kind}"] = (kind, self.spare.url, places)
                self._models[f"spare-{kind}"] = (f"spare-{kind}", "")
                self._models[f"gate-{kind}"] = (f"first-{kind}", "")
            for cell in cells:
                self._add(cell)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def heal(self, cell: Cell) -> None:
        """From now on it works."""
        self._healing[cell]()

    def saw(self, cell: Cell) -> None:
        """Its client has seen the first content, or will see none before all of it: the fault may strike."""
        self._seeing[cell]()

    def end_the_incurable(self) -> None:
        """Nobody need wait any more for what only hangs."""
        for end in self._ending:
            end()

    def toml(self, heartbeat: float) -> str:
        """A models.toml with a model for each cell, one of either kind that nothing is wrong with, and a gate."""
        limits = ", ".join(f"{name} = {seconds:g}" for name, seconds in LIMITS.items())
        parts = [f"[memory]\nenabled = false\n[server]\nheartbeat = {heartbeat:g}\n"]
        for name, (kind, url, places) in self._backends.items():
            parts.append(f'[backends.{name}]\nkind = "{kind}"\nurl = "{url}"\nmax_parallel = {places}\n')
        for name, (backend, more) in self._models.items():
            own = "" if name.startswith(("spare", "gate")) else f'cache = "1h"\ntimeouts = {{ {limits} }}\n'
            parts.append(f'[models.{name}]\nbackend = "{backend}"\nmodel = "{name}"\nnum_ctx = 4096\n{own}{more}')
        return "\n".join(parts)

    # --- one cell

    def _add(self, cell: Cell) -> None:
        make = {
            "answer": self._answering,
            "refused": self._refused,
            "full": self._full,
            "name": lambda _: f"http://{NOWHERE}:1",
            "no name": lambda _: f"http://{NO_NAME}:1",
            "tls": self._tls,
            "certificate": self._untrusted,
            "process": self._process,
        }[cell.what.where]
        self._healing[cell] = self._seeing[cell] = lambda: None
        url = make(cell)
        backend = f"first-{cell.kind}"
        if url:
            backend = f"of-{cell.name}"
            self._backends[backend] = (cell.kind, url, 1)
        self._models[cell.name] = (backend, f'fallback = ["{SPARE[cell.kind]}"]\n' if cell.chain else "")

    def _answering(self, cell: Cell) -> str:
        self.first.fail(cell.name, cell.what.act)
        self._healing[cell] = lambda: self.first.heal(cell.name)
        self._seeing[cell] = lambda: self.first.saw(cell.name)
        return ""

    def _refused(self, cell: Cell) -> str:
        """A port that is ours, so that nobody else can listen on it."""
        sock = self._stack.enter_context(socket.socket())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))

        def heal() -> None:
            sock.listen(512)
            self._stack.callback(Saboteur("first", sock).stop)

        self._healing[cell] = heal
        return f"http://127.0.0.1:{sock.getsockname()[1]}"

    def _full(self, cell: Cell) -> str:
        """Somebody listens and takes no more connections: a further one stays under way."""
        sock = self._stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        waiting = self._stack.enter_context(ExitStack())
        for _ in range(FILLERS):
            filler = waiting.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(sock.getsockname())

        def heal() -> None:
            waiting.close()
            sock.listen(512)
            self._stack.callback(Saboteur("first", sock).stop)

        self._healing[cell] = heal
        return f"http://127.0.0.1:{sock.getsockname()[1]}"

    def _tls(self, cell: Cell) -> str:
        actions: Sequence[Action] = cell.what.act(_NOTHING)
        saboteur = self._stack.enter_context(Saboteur("first", raw=actions))
        self._ending.append(saboteur.stop)
        return f"https://127.0.0.1:{saboteur.port}"

    def _untrusted(self, _: Cell) -> str:
        return f"https://127.0.0.1:{self._stack.enter_context(_Untrusted(self._folder)).port}"

    def _process(self, cell: Cell) -> str:
        process = self._stack.enter_context(SaboteurProcess(self._folder, cell.name, cell.fault))
        self._healing[cell] = process.heal
        self._seeing[cell] = lambda: process.send(signal.SIGUSR1)
        return process.url


class SaboteurProcess(Process):
    """A saboteur as a process of its own, which plays `fault` until it is healed."""

    def __init__(self, folder: Path, name: str, fault: str) -> None:
        super().__init__([], folder, name)
        self._act = ["--act", fault]
        self.port = 0

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the port it had before if it had one."""
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts.torture_rows.saboteur import main; "
        words = ["--name", "first", "--port", str(self.port), *self._act]
        self._command = [sys.executable, "-S", "-c", f"{code}sys.exit(main(sys.argv[1:]))", *words]
        super().start()
        self.port = int(self.wait_for(r"listening on http://127\.0\.0\.1:(\d+)"))

    def heal(self) -> None:
        """It was killed, and is started again, to answer right."""
        self.wait()
        self._act = []
        self.start()


class _Untrusted:
    """A server with a certificate that nobody vouches for."""

    def __init__(self, folder: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*_certificate(folder))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            try:
                sock.settimeout(10.0)
                with sock, self._context.wrap_socket(sock, server_side=True) as secure:
                    secure.recv(1)
            except OSError:
                pass  # the client does not trust it


def has_certificates() -> bool:
    """Whether one can be made here."""
    return shutil.which("openssl") is not None


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of nobody's, and its key, made for this run."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    if not certificate.exists():
        making = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
        command = ["openssl", *making.split(), "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key


_NOTHING = Speech.__new__(Speech)  # for acts that say nothing of their own
