"""curl as a client: the document's lines as they stand, and the ways in which it sends a request."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import unittest
from typing import NamedTuple

from portway.standin.server import Fault, StandIn
from tests import clients_doc
from tests.daemon import ROOT, Daemon, DaemonProcess

ASK = {"model": "fast", "messages": [{"role": "user", "content": "Say hello"}]}
TOML = """
    [backends.ollama]
    kind = "ollama"
    url = "{url}"
    [models.fast]
    backend = "ollama"
    model = "qwen3.5:9b"
    num_ctx = 262144
    think = false
"""


class Answer(NamedTuple):
    """The last answer that curl has received; `interim` counts those with 1xx before it."""

    status: int
    headers: dict[str, str]
    body: str
    interim: int


def needs(program):
    """Skip the test where there is no such program, and fail in CI."""
    if shutil.which(program) is None:
        if os.environ.get("CI") == "true":
            raise AssertionError(f"no {program}")
        raise unittest.SkipTest(f"no {program}")


def setUpModule():
    needs("curl")


class CurlTest(unittest.TestCase):
    def setUp(self):
        self.standin = self.enterContext(StandIn())
        self.daemon = self.enterContext(Daemon(TOML.format(url=self.standin.url)))

    def curl(self, *args, path="/v1/chat/completions", sent=b""):
        """Run curl with `sent` on its standard input, and read what it has received."""
        done = subprocess.run(
            ["curl", "-q", "-sS", "-i", *args, f"http://127.0.0.1:{self.daemon.port}{path}"],
            input=sent,
            capture_output=True,
            timeout=30,
            check=False,
        )
        self.assertEqual(0, done.returncode, done.stderr)
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        interim = 0
        while head.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):
            interim += 1
            head, _, body = body.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return Answer(int(first.split()[1]), headers, body.decode(), interim)

    def good(self, answer):
        """The text of an answer that has to be 200."""
        self.assertEqual(200, answer.status, answer.body)
        return json.loads(answer.body)["choices"][0]["message"]["content"]

    def test_plain(self):
        """-d alone is enough, although it calls the JSON a form; the header says who answered."""
        answer = self.curl("-d", json.dumps(ASK))
        self.assertIn('You asked: "Say hello"', self.good(answer))
        self.assertEqual("fast", answer.headers["x-served-by"])

    def test_stream(self):
        """-N shows each event when it comes."""
        self.standin.fail("/api/chat", Fault("hang_mid_stream", after=2))
        with self.streaming() as process:
            seen = ""
            while seen.count('"content":" ') < 1:  # what comes behind the second word is held back
                line = process.stdout.readline()
                self.assertTrue(line, seen)
                seen += line
            self.assertNotIn("[DONE]", seen)
            self.assertTrue(self.standin.wait_for(lambda standin: any(r.phase == "hang" for r in standin.requests)))
            self.standin.release()
            seen += process.stdout.read()
        self.assertTrue(seen.endswith("data: [DONE]\n\n"), seen)
        self.assertEqual(0, process.returncode)

    def test_leaving(self):
        """Ctrl-C in a stream stops the generation."""
        self.standin.fail("/api/chat", "hang_mid_stream")
        with self.streaming() as process:
            self.assertTrue(process.stdout.readline())
            process.send_signal(signal.SIGINT)
        self.assertTrue(self.standin.wait_for(lambda standin: any(request.left for request in standin.requests)))

    def streaming(self):
        """curl as it shows a stream."""
        body = json.dumps({**ASK, "stream": True})
        command = ["curl", "-q", "-sS", "-N", "--max-time", "30", "-d", body, f"{self.daemon.url}/chat/completions"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def test_head(self):
        """-I gets the head alone, for a list as for an error."""
        for path, status in (("/v1/models", 200), ("/health", 200), ("/v1/models/none", 404)):
            answer = self.curl("-I", path=path)
            self.assertEqual((status, ""), (answer.status, answer.body), path)
            self.assertGreater(int(answer.headers["content-length"]), 10)

    def test_large_body_is_announced(self):
        """A body for which curl asks with Expect: 100-continue is asked for, and taken."""
        long = {**ASK, "messages": [{"role": "user", "content": "walk " * 200_000}]}
        answer = self.curl("-H", "Expect: 100-continue", "-d", "@-", sent=json.dumps(long).encode())
        self.assertIn("200000 words", self.good(answer))
        self.assertEqual(1, answer.interim)

    def test_large_body_is_refused_unread(self):
        """One that is too large is refused before it has been sent."""
        with Daemon('[server]\nmax_body = "128KB"\n' + TOML.format(url=self.standin.url)) as self.daemon:
            answer = self.curl("-H", "Expect: 100-continue", "-d", "@-", sent=b"x" * 2_000_000)
        self.assertEqual((413, 0), (answer.status, answer.interim))
        self.assertEqual("body_too_large", json.loads(answer.body)["error"]["code"])

    def test_chunked_upload(self):
        """A body of unknown length is taken in chunks, whichever way curl is told to."""
        sent = json.dumps(ASK).encode()
        for args in (
            ("-X", "POST", "-T", "-"),
            ("-H", "Transfer-Encoding: chunked", "-d", "@-"),
            ("-H", "Transfer-Encoding: chunked", "-H", "Expect:", "-d", "@-"),
        ):
            self.assertIn("Say hello", self.good(self.curl(*args, sent=sent)), args)

    def test_upload_with_put(self):
        """Without -X POST, -T means PUT, which is told what to do instead."""
        answer = self.curl("-T", "-", sent=json.dumps(ASK).encode())
        self.assertEqual(405, answer.status)
        self.assertIn("POST", answer.headers["allow"])

    def test_old_http(self):
        """HTTP/1.0 gets a plain answer and a stream, without chunks, and the connection's end."""
        answer = self.curl("-0", "-d", json.dumps(ASK))
        self.assertIn("Say hello", self.good(answer))
        answer = self.curl("-0", "-d", json.dumps({**ASK, "stream": True}))
        self.assertNotIn("transfer-encoding", answer.headers)
        self.assertTrue(answer.body.endswith("data: [DONE]\n\n"), answer.body)

    def test_unknown_model(self):
        """A model that nobody knows is 404 and named; --fail-with-body makes it curl's own failure."""
        body = json.dumps({**ASK, "model": "fasst"})
        answer = self.curl("-d", body)
        self.assertEqual(404, answer.status)
        self.assertIn("fast", json.loads(answer.body)["error"]["message"])
        url = f"{self.daemon.url}/chat/completions"
        command = ["curl", "-q", "-s", "--fail-with-body", "-d", body, url]
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
        self.assertEqual(22, done.returncode)
        self.assertEqual("model_not_found", json.loads(done.stdout)["error"]["code"])

    def test_one_connection_for_many(self):
        """Several requests of one curl go over one connection, whatever they were answered with."""
        url = f"{self.daemon.url}/chat/completions"
        shown = ["-s", "-o", "/dev/null", "-w", "%{http_code} %{num_connects}\n", url]
        bodies = [json.dumps(ASK), "{", json.dumps({**ASK, "stream": True}), json.dumps(ASK)]
        command = ["curl", "-q", *shown, "-d", bodies[0]]
        for body in bodies[1:]:
            command += ["--next", *shown, "-d", body]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        self.assertEqual("200 1\n400 0\n200 0\n200 0\n", done.stdout)


class DocumentTest(unittest.TestCase):
    """The document's lines, run by a shell with the configuration that comes with Portway."""

    def setUp(self):
        standin = self.enterContext(StandIn())
        self.daemon = self.enterContext(DaemonProcess(clients_doc.shipped(standin.url)))
        self.models, self.plain, self.stream, self.piped = clients_doc.blocks("curl", "sh")

    def run_block(self, text):
        """What a block prints."""
        environ = {**os.environ, "HOME": "/nonexistent", "CURL_HOME": "/nonexistent"}  # without anybody's .curlrc
        command = ["sh", "-e", "-c", clients_doc.at(text, self.daemon.port)]
        done = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, encoding="utf-8", timeout=60, check=False
        )
        self.assertEqual(0, done.returncode, done.stderr)
        return done.stdout

    def test_models(self):
        """The first lists the models."""
        self.assertIn("fast-9b", [model["id"] for model in json.loads(self.run_block(self.models))["data"]])

    def test_plain(self):
        """The second shows headers and an answer."""
        printed = self.run_block(self.plain)
        self.assertIn("X-Served-By: fast-9b\n", printed)
        self.assertIn('You asked: \\"Say hello\\"', printed)

    def test_stream(self):
        """The third shows a stream to its end."""
        self.assertTrue(self.run_block(self.stream).endswith("data: [DONE]\n\n"))

    def test_piped(self):
        """The fourth sends a file."""
        needs("jq")
        self.assertIn("Sum up: # Portway", self.run_block(self.piped))


if __name__ == "__main__":
    unittest.main()
