"""Requests that two readers could take for different ones: alone, and behind nginx and HAProxy."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import unittest
from pathlib import Path
from typing import ClassVar, Self

from scripts.torture_rows import attack_cases, attacks
from scripts.torture_rows.attack_cases import Framing
from scripts.torture_rows.attacks import Answer, Broken, Connection, converse
from tests.attacked import AttackCase
from tests.doubles import ScriptedServer, json_reply
from tests.llama_server import wait_for

NGINX = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/errors;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_header_timeout 1s;
    client_body_timeout 1s;
    keepalive_timeout 1s;
    upstream portway {{ server 127.0.0.1:{behind}; keepalive 1; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://portway;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host localhost;
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 2s;
        }}
    }}
}}
"""
HAPROXY = """
global
    pidfile {folder}/pid
defaults
    mode http
    option http-keep-alive
    http-reuse always
    timeout connect 2s
    timeout client 1s
    timeout server 2s
    timeout http-request 1s
    timeout http-keep-alive 1s
frontend front
    bind 127.0.0.1:{port}
    http-request set-header Host localhost
    default_backend back
backend back
    server portway 127.0.0.1:{behind} maxconn 1
"""


class Proxy:
    """nginx or HAProxy on a free port, in front of what listens on `behind`, with one connection kept to it."""

    def __init__(self, name: str, behind: int) -> None:
        program = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise unittest.SkipTest(f"{name} is not installed")
        self._folder = tempfile.TemporaryDirectory(prefix="portway-proxy-")
        self.port = free_port()
        text = {"nginx": NGINX, "haproxy": HAPROXY}[name]
        path = Path(self._folder.name) / "config"
        path.write_text(text.format(folder=self._folder.name, behind=behind, port=self.port))
        options = ["-c", str(path), "-p", self._folder.name] if name == "nginx" else ["-f", str(path)]
        self._output = (Path(self._folder.name) / "output").open("wb")
        self._process = subprocess.Popen(
            [program, *options], stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def __enter__(self) -> Self:
        try:
            wait_for(self._is_up, "the proxy's being up", self._said)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGTERM)
            self._process.wait(10.0)
        self._output.close()
        self._folder.cleanup()

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError(self._said())
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def _said(self) -> str:
        return (Path(self._folder.name) / "output").read_text(errors="replace")


def free_port() -> int:
    """A port that nobody listens on now; programs that can't be given port 0 need one."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class FramingTest(AttackCase):
    def test_framing(self):
        """Each framing is answered right, or refused once with the connection's end; nothing hidden is served."""
        before = len(self.world.reached)
        self.holds(attacks.attack_framing)
        self.assertEqual([], self.world.reached[before:])

    def test_bytes_changed_at_random(self):
        """An answer in order or the connection's end, in time, whatever a request has become."""
        self.holds(attacks.attack_garbage)

    def test_a_byte_at_a_time(self):
        """How the bytes are cut changes no verdict."""
        for framing in attack_cases.framings():
            # one that goes on behind its own last word may find the connection reset, answer and all
            if len(framing.data) < 300 and not framing.name.endswith("then more"):
                with self.subTest(framing.name), attacks.connect(self.world.port) as sock:
                    said = b""
                    try:
                        for index in range(len(framing.data)):
                            sock.sendall(framing.data[index : index + 1])
                        sock.sendall(attacks.SENTINEL)
                        while more := sock.recv(65_536):
                            said += more
                    except OSError:
                        pass  # it was refused before all of it was sent
                    answers = attacks.read_answers(said)
                    self.assertTrue(attacks.is_right(framing, answers), (framing, answers))

    def test_the_next_client_of_the_same_connection(self):
        """A refused request's connection takes no other one; an answered one's takes the next in order."""
        with Connection(self.world.port) as client:
            for _ in range(20):
                self.assertEqual(400, client.ask("POST", "/v1/embeddings", {}, attack_cases.SMUGGLED).status)
                self.assertEqual(404, client.ask("GET", "/v1/models/mine").status)


class Proxies:  # so that the case itself is not collected
    class Case(AttackCase):
        """Each subclass names a program. `front` is before Portway, `alone` before a server that takes everything."""

        program = ""
        # what this one refuses of its own accord though it is in order: a bound, a stricter reading
        stricter: ClassVar[frozenset[str]] = frozenset()

        recorder: ClassVar[ScriptedServer]
        front: ClassVar[Proxy]
        alone: ClassVar[Proxy]

        @classmethod
        def setUpClass(cls):
            super().setUpClass()
            cls.recorder = cls.enterClassContext(ScriptedServer(then=json_reply({"recorded": True})))
            cls.front = cls.enterClassContext(Proxy(cls.program, cls.world.port))
            cls.alone = cls.enterClassContext(Proxy(cls.program, cls.recorder.port))

        def test_nobody_gets_anothers_answer(self):
            """After each framing, the next client of the same proxy, and so of the same connection, gets its own."""
            for number, framing in enumerate(attack_cases.framings()):
                with self.subTest(framing.name):
                    conversation(self.front.port, framing)
                    with Connection(self.front.port) as victim:
                        answer = victim.ask("GET", f"/v1/models/victim-{number}")
                    self.assertEqual(404, answer.status)
                    self.assertIn(f"victim-{number}", answer.body.decode())

        def test_no_more_requests_here_than_there(self):
            """Portway never finds more requests in the same bytes than the proxy that handed them on."""
            for framing in attack_cases.framings():
                with self.subTest(framing.name):
                    there = conversation(self.alone.port, framing)
                    here = conversation(self.front.port, framing)
                    if there is not None and here is not None:
                        self.assertLessEqual(len(here), len(there))

        def test_what_it_refuses_is_refused_here(self):
            """Portway is at least as strict: what the proxy refuses by itself, it does, but for the proxy's bounds."""
            taken = set()
            for framing in attack_cases.framings():
                before = len(self.recorder.requests)
                conversation(self.alone.port, framing)
                if len(self.recorder.requests) > before:
                    taken.add(framing.name)
            in_order = {framing.name for framing in attack_cases.framings() if framing.answers}
            self.assertLessEqual(in_order - taken, self.stricter)
            self.assertGreater(len(taken - in_order), 5, "what the proxy repairs, or takes though it is broken")


def conversation(port: int, framing: Framing) -> list[Answer] | None:
    """The answers; None where the proxy's own are no HTTP/1.1 (it took the bytes for HTTP/0.9 or HTTP/2)."""
    try:
        return converse(port, framing.data + attacks.SENTINEL)[0]
    except (OSError, Broken):
        return None


class NginxTest(Proxies.Case):
    program = "nginx"
    stricter = frozenset({"spaces around", "target: encoded dots"})


class HAProxyTest(Proxies.Case):
    program = "haproxy"
    stricter = frozenset({"128 fields"})


if __name__ == "__main__":
    unittest.main()
