"""What a backend can try: redirects, headers and words of its own, keys it should not see; and what stands in logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unittest
from typing import Any

from tests.daemon import ROOT, DaemonProcess
from tests.doubles import ScriptedServer, http_reply, json_reply
from tests.llama_server import wait_for
from tests.targets import KINDS, Target, answer, ask, chain

EVIL = 'evil"\r\nX-Evil: 1\r\n\nportway: listening on nothing\n{"ts":"forged"}\x1b]0;owned\x07\x1b[2J'
EVIL += "\x9b31m\u202e\x85\u2028"
PATIENT = "[cooldown]\nfailures = 1000\nseconds = 0\nlongest = 0\n"
OTHER_HEADERS = {
    "X-Served-By": "liar",
    "X-Portway-Attempts": "liar=ok",
    "X-Evil": "1",
    "Set-Cookie": "a=b",
    "Access-Control-Allow-Origin": "*",
    "Server": "liar",
    "Location": "http://127.0.0.1:1/",
    "Content-Encoding": "identity",
    "Strict-Transport-Security": "max-age=1",
}


def log_of(daemon: DaemonProcess, least: int) -> list[str]:
    """The lines of its log, once there are so many."""
    wait_for(lambda: len(daemon.lines()) >= least, "the log's lines")
    return daemon.lines()


class RedirectTest(unittest.TestCase):
    def test_redirects_are_not_followed(self):
        """Whatever a backend answers with a Location, nobody goes there; the client is told of a redirect."""
        with ScriptedServer(then=json_reply({"trap": True})) as trap, Target() as target:
            for kind in KINDS:
                with DaemonProcess(chain(target.url, kinds=(kind,))) as daemon, daemon.client() as client:
                    for status in (301, 302, 303, 307, 308):
                        for stream in (False, True):
                            reply = http_reply(b"", status=status, headers={"Location": f"{trap.url}/v1/secret"})
                            target.add_answer(reply)
                            response = ask(client, stream=stream)
                            self.assertEqual((502, "bad_answer"), (response.status, response.json["error"]["code"]))
                            self.assertIn("redirect", response.json["error"]["message"])
                            self.assertIsNone(response.header("location"))
            self.assertEqual(0, trap.connections)

    def test_nor_by_what_is_asked_of_its_own_accord(self):
        """The list of models and the doctor's questions stay with the configured server, too."""
        with ScriptedServer(then=json_reply({"models": []})) as trap:
            away = http_reply(b"", status=307, headers={"Location": f"{trap.url}/api/tags"})
            with ScriptedServer(then=away) as server, DaemonProcess(chain(server.url, kinds=("ollama",))) as daemon:
                server.wait_requests(1)
                wait_for(lambda: "/api/tags" in daemon.log or "redirect" in daemon.log, "its complaint")
                with daemon.client() as client:
                    self.assertEqual(200, client.call("GET", "/portway/residency").status)
                command = [sys.executable, "-m", "portway", "doctor", "--config", str(daemon.configuration), "--json"]
                subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
            self.assertEqual(0, trap.connections)


class HeaderTest(unittest.TestCase):
    def test_no_header_of_a_backend_reaches_the_client(self):
        """Headers are Portway's own; a backend's name for itself, its cookies and its CORS stay behind."""
        for kind in KINDS:
            for stream in (False, True):
                whole = answer(kind, "hello", stream=stream)
                head, body = whole.split(b"\r\n\r\n", 1)
                extra = "".join(f"\r\n{name}: {value}" for name, value in OTHER_HEADERS.items()).encode()
                with (
                    Target(head + extra + b"\r\n\r\n" + body) as target,
                    DaemonProcess(chain(target.url, kinds=(kind,))) as daemon,
                    daemon.client() as client,
                ):
                    response = ask(client, stream=stream)
                self.assertEqual((200, "first"), (response.status, response.header("x-served-by")))
                known = {"server", "date", "content-type", "content-length", "transfer-encoding", "cache-control"}
                known |= {"x-served-by", "x-cache"}
                self.assertLessEqual({name.lower() for name, _ in response.headers}, known)
                self.assertEqual("portway", response.header("server"))

    def test_headers_that_would_split_an_answer(self):
        """A backend whose head holds a bare CR or LF, a NUL or two lengths is no HTTP server to Portway."""
        bodies = (
            b"X: a\nX-Evil: 1",
            b"X: a\rX-Evil: 1",
            b"X: a\0",
            b"Content-Length: 2\r\nContent-Length: 3",
            b" a: b",
        )
        with Target() as target, DaemonProcess(chain(target.url)) as daemon, daemon.client() as client:
            for field in bodies:
                target.add_answer(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + field + b"\r\n\r\n{}")
                response = ask(client)
                self.assertEqual((502, "bad_answer"), (response.status, response.json["error"]["code"]))
                self.assertIsNone(response.header("x-evil"))


class WordsTest(unittest.TestCase):
    """A backend's own words, in every place where they are told again."""

    def errors(self, kind: str) -> list[bytes]:
        """Errors in a backend's words: by status, and inside a 200."""
        body: Any = {"error": EVIL} if kind == "ollama" else {"error": {"message": EVIL, "type": EVIL, "code": EVIL}}
        statuses = (400, 401, 404, 413, 422, 429, 500, 503)
        odd = [json_reply(body), json_reply(body, 503, {"Retry-After": "1, 2"})]
        return [json_reply(body, status) for status in statuses] + odd

    def test_they_stay_where_they_belong(self):
        """No header, no line of the log and no line on stderr is theirs, and no terminal would obey any."""
        for kind in KINDS:
            with Target() as target, DaemonProcess(chain(target.url, kinds=(kind,), rest=PATIENT)) as daemon:
                replies = self.errors(kind)
                for reply in replies:
                    target.add_answer(reply, reply)
                for stream in (False, True) * len(replies):
                    self.ask_and_look(daemon, stream)
                lines = log_of(daemon, 2 * len(replies))
                self.assertEqual(2 * len(replies), len(lines))
                for line in lines:
                    self.assertTrue(line.isascii() and line.isprintable())
                    self.assertEqual("first", json.loads(line)["model"])

    def ask_and_look(self, daemon: DaemonProcess, stream: bool) -> None:
        headers = {"User-Agent": "a\x85b\x9b2Jc", "X-Portway-Client": "\xa0\xad" + "x" * 5000}
        with daemon.client() as client:
            response = ask(client, stream=stream, headers=headers)
        for name, value in response.headers:
            self.assertTrue(value.isprintable() and name.lower() != "x-evil", (name, value))
        if response.header("content-type") == "application/json":
            self.assertIn("error", response.json)

    def test_on_stderr(self):
        """What a backend answers to the daemon's own questions can't forge a message in the journal."""
        with ScriptedServer(then=json_reply({"error": EVIL}, 500)) as server:
            daemon = self.enterContext(DaemonProcess(chain(server.url, kinds=("ollama",))))
            wait_for(lambda: "owned" in daemon.log, "its complaint", lambda: daemon.log)
        log = daemon.log
        self.assertTrue(log.replace("\n", "").isprintable(), log)
        self.assertEqual(
            [], [line for line in log.splitlines() if line.startswith(('{"ts"', "portway: listening on n"))]
        )

    def test_on_the_terminal_of_ps(self):
        """A model's name with escape codes is shown with them spelt out."""
        name, until = "x\x1b[2Jy", "2030-01-01T00:00:00Z"
        loaded = {"name": name, "model": name, "size": 1000, "size_vram": 0, "expires_at": until}

        def play(request: Any) -> bytes:
            return json_reply({"models": [loaded]}) if request.path == "/api/ps" else json_reply({"models": []})

        with ScriptedServer(then=play) as server:
            memory = '[memory]\nbudget = "1GB"\n'
            toml = chain(server.url, kinds=("ollama",), rest=memory)
            with DaemonProcess(toml) as daemon:
                daemon.configuration.write_text(f"[server]\nport = {daemon.port}\n{toml}")
                environ = {**os.environ, "PORTWAY_CONFIG": str(daemon.configuration)}
                command = [sys.executable, "-m", "portway", "ps"]
                done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, timeout=60, check=False)
        self.assertEqual(b"", done.stderr)
        self.assertIn(b"x\\x1b[2Jy", done.stdout)
        self.assertNotIn(b"\x1b", done.stdout)


class KeyTest(unittest.TestCase):
    """Each backend's key is for that backend; the client's is for Portway."""

    def test_keys_stay_apart(self):
        """Along a chain each backend sees its own key and no other, and none that a client sent."""
        for kind in KINDS:
            with Target(then=json_reply({"error": "no"}, 500)) as first, Target(then=answer(kind, "hi")) as second:
                toml = chain(first.url, second.url, kinds=(kind,), rest='[server]\napi_keys = ["sk-door"]\n')
                for name in ("first", "second"):
                    toml = toml.replace(f"[backends.{name}]", f'[backends.{name}]\napi_key = "sk-{name}"')
                headers = {"Authorization": "Bearer sk-door", "Cookie": "a=sk-cookie", "X-Api-Key": "sk-other"}
                with DaemonProcess(toml) as daemon, daemon.client() as client:
                    self.assertEqual("second", ask(client, headers=headers).header("x-served-by"))
                for target, own in ((first, "sk-first"), (second, "sk-second")):
                    for request in target.requests:
                        self.assertEqual(f"Bearer {own}", request.header("authorization"))
                        self.assertEqual({own}, {word for word in SECRETS if word.encode() in request.raw})

    def test_a_key_is_never_told(self):
        """Not in an error, though the backend quotes it; not in the log, on stderr, in /health or anywhere else."""
        for kind in KINDS:
            quoting = {"error": "bad key sk-first"} if kind == "ollama" else {"error": {"message": "bad key sk-first"}}
            replies = [json_reply(quoting, status) for status in (200, 400, 401, 403, 404, 422, 429, 500, 503)]
            with Target(*replies, *replies) as target:
                toml = chain(target.url, kinds=(kind,), rest='[server]\napi_keys = ["sk-door"]\n' + PATIENT)
                toml = toml.replace("[backends.first]", '[backends.first]\napi_key = "sk-first"')
                with DaemonProcess(toml) as daemon:
                    told = self.everything_told(daemon, len(replies))
                    told += [line.encode() for line in log_of(daemon, 2 * len(replies))]
                for text in told:
                    self.assertEqual([], [word for word in SECRETS if word.encode() in text], text)

    def everything_told(self, daemon: DaemonProcess, errors: int) -> list[bytes]:
        key = {"Authorization": "Bearer sk-door"}
        with daemon.client() as client:
            told = [ask(client, headers=key, stream=stream).body for stream in (False, True) for _ in range(errors)]
            paths = ("/v1/models", "/health", "/metrics", "/portway/residency", "/nowhere?key=sk-door")
            told += [client.call("GET", path, headers=key).body for path in paths]
            told += [client.call("GET", "/v1/models", headers={"Authorization": "Bearer sk-wrong"}).body]
        return [*told, daemon.log.encode()]


SECRETS = ("sk-door", "sk-first", "sk-second", "sk-cookie", "sk-other", "sk-wrong")


class ProxyTest(unittest.TestCase):
    def test_proxies_of_the_environment(self):
        """HTTP_PROXY and its kin are not looked at, by the daemon or by a command: a prompt goes where it is sent."""
        with ScriptedServer(then=json_reply({"trap": True})) as trap, Target(then=answer("openai", "hello")) as target:
            names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
            environ = {**dict.fromkeys(names, trap.url), "no_proxy": "", "NO_PROXY": ""}
            with DaemonProcess(chain(target.url), environ) as daemon, daemon.client() as client:
                self.assertEqual(200, ask(client).status)
                for words in (["doctor", "--config", str(daemon.configuration)], ["ps"]):
                    command = [sys.executable, "-m", "portway", *words]
                    given = {**os.environ, **environ, "PORTWAY_CONFIG": str(daemon.configuration)}
                    subprocess.run(command, cwd=ROOT, env=given, capture_output=True, timeout=60, check=False)
                given = {**os.environ, **environ, "PORTWAY_URL": f"http://127.0.0.1:{daemon.port}"}
                command = [
                    sys.executable,
                    "-c",
                    "from portway.ask.command import run; run()",
                    "-m",
                    "first",
                    "-n",
                    "hi",
                ]
                done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, timeout=60, check=False)
                self.assertEqual((0, b"hello\n"), (done.returncode, done.stdout), done.stderr)
            self.assertEqual(0, trap.connections)


if __name__ == "__main__":
    unittest.main()
