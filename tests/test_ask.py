from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from portway import __version__, fields
from portway.ask import command as ask
from portway.ask import install as ask_install
from portway.ask import manual as ask_help
from portway.ask import terminal
from portway.ask.client import Address, dumps, loads
from portway.ask.terminal import harmless
from tests.doubles import (
    CLOSE,
    HANG,
    LAST_CHUNK,
    PATIENCE,
    RESET,
    Action,
    Bytewise,
    ScriptedServer,
    Step,
    chunk,
    http_reply,
    json_reply,
    sse_reply,
    stream_head,
)

ROOT = str(pathlib.Path(__file__).resolve().parent.parent)
COMMAND = [
    sys.executable,
    "-I",
    "-S",
    "-c",
    f"import sys; sys.path.append({ROOT!r}); from portway.ask.command import run; run()",
]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def completion(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as the daemon answers it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46}
    return {"id": "c", "object": "chat.completion", "model": "fast-9b", "choices": [choice], "usage": usage}


def delta(text: str = "", finish: str | None = None, portway: Any = None, **fields: Any) -> dict[str, Any]:
    """A chunk of a streamed one."""
    body = {"id": "c", "object": "chat.completion.chunk", "model": "fast-9b"}
    if portway is not None:
        body["portway"] = portway
    return {**body, "choices": [{"index": 0, "delta": {"content": text, **fields}, "finish_reason": finish}]}


def event(payload: Mapping[str, Any]) -> bytes:
    """One event in a chunk of its own."""
    return chunk(b"data: " + json.dumps(payload).encode() + b"\n\n")


END = chunk(b"data: [DONE]\n\n") + LAST_CHUNK
SERVED = {"X-Served-By": "fast-9b"}
DEMOTED = {"X-Served-By": "fast-1b", "X-Portway-Attempts": "fast-9b=connect_failed; fast-3b=busy; fast-1b=ok"}
UNKNOWN = json_reply({"error": {"message": "There is no model 'x'.", "code": "model_not_found"}}, 404)
MODELS = json_reply(
    {
        "object": "list",
        "data": [
            {"id": "fast-9b", "portway": {"flag": "9b"}},
            {"id": "fast-3b", "portway": {"flag": "3b"}},
            {"id": "embed", "portway": {}},
        ],
    }
)


class AskTestCase(unittest.TestCase):
    """Runs the real process against a scripted server."""

    def setUp(self) -> None:
        self.server = self.enterContext(ScriptedServer())
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.environ = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self.folder),
            "LC_ALL": "C.UTF-8",
            "TERM": "xterm",
            "PORTWAY_URL": self.server.url,
        }

    def ask(
        self, *arguments: str | bytes, given: bytes = b"", environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        environ = {**self.environ, **(environ or {})}
        command = [*COMMAND, *arguments]
        return subprocess.run(command, input=given, env=environ, capture_output=True, timeout=PATIENCE, check=False)

    def answered(self, text: str, *arguments: str, given: bytes = b"", **message: Any) -> bytes:
        """stdout of an ask that is answered with `text`."""
        self.server.add(json_reply(completion(text, **message), headers=SERVED))
        done = self.ask(*arguments, given=given)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        return done.stdout

    def sent(self) -> dict[str, Any]:
        """The body of the latest request."""
        body: dict[str, Any] = self.server.requests[-1].json
        return body

    def prompt(self) -> Any:
        return self.sent()["messages"][-1]["content"]

    def file(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        """An ask that goes on while the test does."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        process = subprocess.Popen([*COMMAND, *arguments], env=self.environ, **streams)
        self.addCleanup(self._end, process)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


class TestQuestion(AskTestCase):
    def test_the_answer_and_nothing_else_goes_to_stdout(self):
        """Words of the question need no quotes; the answer ends with a line end."""
        self.assertEqual(self.answered("Blue.", "what", "colour", "is the sky?"), b"Blue.\n")
        request = self.server.requests[0]
        self.assertEqual((request.method, request.path), ("POST", "/v1/chat/completions"))
        self.assertEqual(request.header("X-Portway-Client"), "ask")
        self.assertIsNone(request.header("Authorization"))
        self.assertEqual(
            self.sent(), {"model": "flag:default", "messages": [{"role": "user", "content": "what colour is the sky?"}]}
        )

    def test_a_pipe_goes_before_the_question_in_a_fence(self):
        """`git diff | ask "..."` shows the model what is material and what is the question."""
        self.answered("ok", "a one-line commit message", given=b"-old\n+new\n")
        self.assertEqual(self.prompt(), "standard input:\n```\n-old\n+new\n```\n\na one-line commit message")

    def test_a_pipe_without_a_question_is_the_question(self):
        """`echo question | ask`, also with a file and with `-`."""
        self.answered("ok", given=b"why?\n")
        self.assertEqual(self.prompt(), "why?")
        path = self.file("a.txt", b"A")
        self.answered("ok", "-f", path, "-", given=b"why?\n")
        self.assertEqual(self.prompt(), f"{path}:\n```\nA\n```\n\nwhy?")

    def test_standard_input_can_be_left_alone(self):
        """-n neither takes what a loop is reading nor waits for a pipe that nobody closes."""
        self.server.add(json_reply(completion("ok")))
        read_end, write_end = os.pipe()
        self.addCleanup(os.close, write_end)
        process = self.start("-n", "why?", stdin=read_end)
        os.close(read_end)
        self.assertEqual(process.communicate(timeout=PATIENCE), (b"ok\n", b""))
        self.assertEqual(self.prompt(), "why?")

    def test_files_have_their_names_and_their_own_fences(self):
        """A fence that stands in a file can't end the file's own; a mark at the beginning is dropped."""
        one = self.file("one.md", b"\xef\xbb\xbftext\n```sh\nls\n```\n")
        two = self.file("two.py", b"x = 1")
        self.answered("ok", "-f", one, f"--file={two}", "-f", one, "sum up")
        self.assertEqual(
            self.prompt(), f"{one}:\n````\ntext\n```sh\nls\n```\n````\n\n{two}:\n```\nx = 1\n```\n\nsum up"
        )

    def test_a_quoted_pattern_is_expanded(self):
        """In order, into folders, without the folders; a file whose name looks like one is a file."""
        for name in ("src/b.py", "src/a.py", "src/sub/c.py", "x[1].txt"):
            self.file(name, name.encode())
        self.answered("ok", "-f", f"{self.folder}/src/**/*", "-f", f"{self.folder}/x[1].txt", "q")
        self.assertEqual(re.findall(r"^.*/(\S+):$", self.prompt(), re.MULTILINE), ["a.py", "b.py", "c.py", "x[1].txt"])

    def test_a_picture_goes_along_as_a_picture(self):
        """By its content, not its name; the text follows it. From a pipe as well."""
        url = "data:image/png;base64,iVBORw0KGgo"
        self.answered("a cat", "-f", self.file("p", PNG), "what is this?")
        picture, text = self.prompt()
        self.assertEqual((picture["type"], picture["image_url"]["url"][: len(url)]), ("image_url", url))
        self.assertEqual(text, {"type": "text", "text": "what is this?"})
        self.answered("a cat", "what is this?", given=PNG)
        self.assertEqual(self.prompt()[0], picture)

    def test_what_cannot_be_asked_about_is_refused(self):
        """Binary, missing or unmatched files, folders: exit 2 with the name, and nothing was sent."""
        cases = {
            self.file("prog", b"\x7fELF\0\0"): b"neither text in UTF-8 nor",
            self.file("latin1", b"caf\xe9"): b"neither text in UTF-8 nor",
            str(self.folder / "missing"): b"No such file",
            str(self.folder): b"Is a directory",
            str(self.folder / "*.none"): b"no file matches",
        }
        for path, reason in cases.items():
            with self.subTest(reason=reason, path=path):
                done = self.ask("-f", path, "q")
                self.assertEqual((done.returncode, done.stdout), (2, b""))
                self.assertIn(os.fsencode(path), done.stderr)
                self.assertIn(reason, done.stderr)
        self.assertEqual(self.server.connections, 0)

    def test_bytes_that_are_no_text_are_replaced(self):
        """An argument in another encoding than the locale's is no reason to fail."""
        self.server.add(json_reply(completion("ok")))
        self.assertEqual(self.ask(b"caf\xe9?").returncode, 0)
        self.assertEqual(self.prompt(), "caf\ufffd?")


class TestOptions(AskTestCase):
    def test_a_tier_is_the_daemons_to_know(self):
        """Any other --name asks for the model with that flag; -m and $PORTWAY_MODEL name one."""
        for arguments, environ, model in (
            (["--9b", "q"], {"PORTWAY_MODEL": "coder-30b"}, "flag:9b"),
            (["q", "--think"], {}, "flag:think"),
            (["-m", "fast-3b", "q"], {"PORTWAY_MODEL": "coder-30b"}, "fast-3b"),
            (["-mfast-3b", "q"], {}, "fast-3b"),
            (["--model=fast-3b", "q"], {}, "fast-3b"),
            (["q"], {"PORTWAY_MODEL": "coder-30b"}, "coder-30b"),
        ):
            with self.subTest(arguments=arguments):
                self.server.add(json_reply(completion("ok")))
                self.assertEqual(self.ask(*arguments, environ=environ).returncode, 0)
                self.assertEqual(self.sent()["model"], model)

    def test_an_unknown_tier_lists_those_that_there_are(self):
        """Exit 2, with a near one; a mistyped option of ask's own is found as well."""
        for word, near in (("--9bb", "--9b"), ("--no-cahce", "--no-cache")):
            self.server.add(UNKNOWN, MODELS)
            done = self.ask(word, "q")
            self.assertEqual((done.returncode, done.stdout), (2, b""))
            expected = f"ask: no tier {word}; there are --9b, --3b; did you mean {near}?\n"
            self.assertEqual(done.stderr.decode(), expected)

    def test_a_server_without_tiers_is_asked_by_name(self):
        """Exit 2 with the names, for a tier and where there is no default."""
        models = json_reply({"object": "list", "data": [{"id": "one"}, {"id": "two"}]})
        for arguments, reason in ((["--9b"], "no tier --9b"), ([], "no default model")):
            self.server.add(UNKNOWN, models)
            done = self.ask(*arguments, "q")
            self.assertEqual((done.returncode, done.stdout), (2, b""))
            self.assertRegex(done.stderr.decode(), f"{reason}.* -m.*: one, two\n")

    def test_an_unknown_model_is_a_usage_error(self):
        """In the daemon's words; the same code from a backend, after attempts, is a failure."""
        self.server.add(UNKNOWN)
        done = self.ask("-m", "x", "q")
        self.assertEqual((done.returncode, done.stderr), (2, b"ask: There is no model 'x'.\n"))
        error = {"error": {"message": "ollama pull qwen3.5:9b", "code": "model_not_found"}}
        self.server.add(json_reply(error, 404, {"X-Portway-Attempts": "fast-9b=model_not_found"}))
        self.assertEqual(self.ask("--9b", "q").returncode, 1)

    def test_options_become_the_requests_fields(self):
        """System prompt, temperature, and short options in one word."""
        self.answered("ok", "-s", "be brief", "-nt0.2", "q")
        body = self.sent()
        self.assertEqual(body["messages"][0], {"role": "system", "content": "be brief"})
        self.assertEqual(body["temperature"], 0.2)

    def test_options_become_the_requests_headers(self):
        """The cache is steered by the standard's own header."""
        for option, name, value in (
            ("--refresh", "Cache-Control", "no-cache"),
            ("--no-cache", "Cache-Control", "no-store, no-cache"),
            ("--strict", "X-Portway-Fallback", "off"),
        ):
            self.answered("ok", option, "q")
            self.assertEqual(self.server.requests[-1].header(name), value)

    def test_the_key_and_the_address_come_from_the_environment(self):
        """With or without /v1, and behind a path."""
        for suffix, path in (("/", "/v1/models"), ("/v1/", "/v1/models"), ("/portway", "/portway/v1/models")):
            self.server.add(MODELS)
            environ = {"PORTWAY_URL": self.server.url + suffix, "PORTWAY_API_KEY": "sk-1"}
            self.assertEqual(self.ask("--tiers", environ=environ).stdout, b"--9b\tfast-9b\n--3b\tfast-3b\n\tembed\n")
            request = self.server.requests[-1]
            self.assertEqual((request.path, request.header("Authorization")), (path, "Bearer sk-1"))

    def test_the_command_line_is_checked_before_anything_is_sent(self):
        """Exit 2 and one line that says what is wrong."""
        for arguments, reason in (
            ([], "no question"),
            (["-q", "x"], "unknown option -q"),
            (["- what is this"], "unknown option - "),
            (["--what is this"], "begins with a dash"),
            (["--nope=1", "x"], "unknown option --nope"),
            (["-m"], "-m needs a value"),
            (["-t", "hot", "x"], "-t hot"),
            (["-t", "nan", "x"], "-t nan"),
            (["--9b", "--3b", "x"], "--9b and --3b"),
            (["--schema", "/nonexistent", "x"], "/nonexistent: No such file"),
            (["--completion", "tcsh"], "bash, zsh, fish"),
            (["--last", "x"], "takes no question"),
        ):
            with self.subTest(arguments=arguments):
                done = self.ask(*arguments)
                self.assertEqual((done.returncode, done.stdout, done.stderr.count(b"\n")), (2, b"", 1))
                self.assertIn(reason, done.stderr.decode())
        self.assertEqual(self.server.connections, 0)

    def test_an_address_that_is_none_is_a_usage_error(self):
        """So is a key that could smuggle in a header."""
        for environ in (
            {"PORTWAY_URL": "127.0.0.1:11436"},
            {"PORTWAY_URL": "ftp://host"},
            {"PORTWAY_URL": "http://host:99999"},
            {"PORTWAY_URL": "http://"},
            {"PORTWAY_API_KEY": "sk\r\nX-Evil: 1"},
        ):
            self.assertEqual(self.ask("q", environ=environ).returncode, 2, environ)
        self.assertEqual(self.server.requests, [])

    def test_a_question_may_begin_with_a_dash(self):
        """After --."""
        self.answered("ok", "-n", "--", "--9b", "-x")
        self.assertEqual(self.prompt(), "--9b -x")

    def test_no_tier_can_hide_behind_an_option(self):
        """What ask understands itself is no flag of a model; the configuration refuses all of these."""
        own = {name.removeprefix("--") for name in (*ask.SWITCHES, *ask.VALUES) if name.startswith("--")}
        self.assertEqual({*own, "default"}, fields._ASK_OPTIONS)


class TestAnswer(AskTestCase):
    def test_a_demotion_is_always_said(self):
        """From the headers, in UTF-8; with --last again."""
        self.server.add(json_reply(completion("Hi."), headers=DEMOTED))
        for arguments in (["q"], ["--last"]):
            done = self.ask(*arguments)
            self.assertEqual((done.returncode, done.stdout), (0, b"Hi.\n"))
            self.assertEqual(done.stderr.decode(), "[degraded: fast-9b \u2192 fast-1b]\n")

    def test_a_council_that_is_not_complete_is_said(self):
        """Who of it failed, was cut off, or was stood in for. One that is complete is none, nor is a cascade's step."""
        seat = {"model": "a", "served_by": "a", "status": "ok"}
        broken = {"model": "b", "served_by": None, "status": "server_error"}
        other = {"model": "c", "served_by": "d", "status": "ok"}
        council = {"served_by": "council(a>c)", "council": "degraded", "members": [seat, broken], "chairman": other}
        whole = {**council, "council": "ok", "members": [seat, seat], "chairman": seat}
        steps = {"steps": [{"model": "b", "served_by": "b", "reason": "cut"}, {"model": "a", "served_by": "a"}]}
        demoted = {"steps": [*steps["steps"], {"model": "c", "served_by": "d"}]}
        attempts = {"X-Portway-Attempts": "b=cut(0.1s); a=ok"}
        for facts, by, headers, note in (
            (council, "council(a>c)", {}, "[degraded: b: server_error, c \u2192 d]\n"),
            (whole, "council(a,a>a)", {}, ""),
            (steps, "cascade(b>a)", attempts, ""),
            (demoted, "cascade(b>a>d)", attempts, "[degraded: c \u2192 d]\n"),
        ):
            with self.subTest(facts):
                body = {**completion("Hi."), "portway": facts}
                self.server.add(json_reply(body, headers={"X-Served-By": by, **headers}))
                done = self.ask("q")
                self.assertEqual((done.returncode, done.stderr.decode()), (0, note))
        self.assertEqual(self.ask("--last").stderr.decode(), "[degraded: c \u2192 d]\n")

    def test_warnings_of_the_daemon_are_passed_on(self):
        """They say that the answer is not quite what was asked for."""
        self.server.add(json_reply(completion("Hi."), headers={"X-Portway-Warning": "seed was ignored"}))
        self.assertEqual(self.ask("q").stderr, b"[warning: seed was ignored]\n")

    def test_verbose_says_who_and_how(self):
        """Served by, attempts, cache with its age, tokens, seconds."""
        self.server.add(json_reply(completion("Hi."), headers={**DEMOTED, "X-Cache": "HIT", "Age": "60"}))
        stderr = self.ask("-v", "q").stderr.decode()
        self.assertRegex(
            stderr.splitlines()[-1],
            r"^\[served by fast-1b; fast-9b=connect_failed, fast-3b=busy, fast-1b=ok; "
            r"cache hit \(60 s old\); 12 \+ 34 tokens; \d\.\d\d s\]$",
        )

    def test_only_the_code_block(self):
        """-x prints the first fenced block, without its fences."""
        text = "Sure:\n\n```sh\necho hi\n```\nand\n```\nmore\n```\n"
        self.assertEqual(self.answered(text, "-x", "q"), b"echo hi\n")
        self.assertEqual(self.ask("--last", "-x").stdout, b"echo hi\n")

    def test_no_code_block_is_a_failure(self):
        """Prose must not reach the shell that stdout is piped into; it is not lost either."""
        for body, reason in (
            (completion("I can't."), b"no code block"),
            (completion("```sh\nrm -rf /tmp", "length"), b"not complete"),
        ):
            self.server.add(json_reply(body))
            done = self.ask("-x", "q")
            self.assertEqual((done.returncode, done.stdout), (1, b""))
            self.assertIn(reason, done.stderr)
            self.assertIn(body["choices"][0]["message"]["content"].encode(), done.stderr)

    def test_json_is_checked(self):
        """Exit 0 means that the answer parses; one that doesn't is still shown."""
        self.assertEqual(self.answered('{"a": 1}', "--json", "q"), b'{"a": 1}\n')
        self.assertEqual(self.sent()["response_format"], {"type": "json_object"})
        self.server.add(json_reply(completion('{"a": ')))
        done = self.ask("--json", "q")
        self.assertEqual((done.returncode, done.stdout), (1, b'{"a": \n'))
        self.assertIn(b"not valid JSON", done.stderr)
        self.server.add(json_reply(completion('{"a": ')))
        self.assertEqual(self.ask("--schema", self.file("s.json", b"{}"), "q").returncode, 1)

    def test_a_schema_is_sent_as_it_is(self):
        """Whatever JSON it holds."""
        schema = {"type": "object", "properties": {"n\u00e9": {"enum": [1, -2.5, 1e300, True, None, "\U0001f600"]}}}
        self.answered("{}", "--schema", self.file("s.json", json.dumps(schema).encode()), "q")
        sent = self.sent()["response_format"]
        self.assertEqual((sent["type"], sent["json_schema"]["schema"]), ("json_schema", schema))

    def test_a_schema_that_is_none_is_refused(self):
        """With what is wrong with it."""
        for content in (b"{", b"[]", b'{"a": NaN}', b"\xff", b"{} x", b"[" * 100_000):
            done = self.ask("--schema", self.file("s.json", content), "q")
            self.assertEqual(done.returncode, 2, content[:20])
        self.assertEqual(self.server.connections, 0)

    def test_thinking_goes_to_stderr_if_wanted(self):
        """Without colours where stderr is no terminal."""
        self.server.add(*[json_reply(completion("Hi.", reasoning_content="Hm."))] * 2)
        self.assertEqual(self.ask("q").stderr, b"")
        done = self.ask("--show-thinking", "q")
        self.assertEqual((done.stdout, done.stderr), (b"Hi.\n", b"Hm."))

    def test_a_cut_or_empty_answer_is_no_secret(self):
        """finish_reason length is said; an empty answer is a failure."""
        self.server.add(json_reply(completion("and then", "length")))
        done = self.ask("q")
        self.assertEqual((done.returncode, done.stdout), (0, b"and then\n"))
        self.assertIn(b"cut off", done.stderr)
        self.server.add(json_reply(completion(None, "length", reasoning="Hm.")))
        done = self.ask("q")
        self.assertEqual((done.returncode, done.stdout), (1, b""))
        self.assertIn(b"went into thinking", done.stderr)

    def test_a_pipe_gets_the_answer_as_it_is(self):
        """UTF-8 whatever the locale, escapes untouched, a lone surrogate replaced."""
        self.server.add(json_reply(completion("\x1b[31m\u2192 \ud83d")))
        done = self.ask("q", environ={"LC_ALL": "POSIX", "PYTHONIOENCODING": "latin-1"})
        self.assertEqual(done.stdout, "\x1b[31m\u2192 ?\n".encode())

    def test_a_stream_is_read_as_well(self):
        """Whatever the server makes of the request; cut in any way, with comments and CRLF."""
        chunks = [delta(role="assistant"), delta("Hel"), delta("lo \u00e9"), delta("", "stop")]
        for crlf in (False, True):
            self.server.add([Bytewise(sse_reply(chunks, comments=["portway"], chunk_sizes=[3, 1, 7], crlf=crlf))])
            done = self.ask("q")
            self.assertEqual((done.returncode, done.stdout.decode(), done.stderr), (0, "Hello \u00e9\n", b""))

    def test_an_answer_may_end_with_the_connection(self):
        """No length, no chunks; and 1xx heads ahead of it."""
        body = json.dumps(completion("Hi.")).encode()
        head = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"
        self.server.add([head + body, CLOSE])
        self.assertEqual(self.ask("q").stdout, b"Hi.\n")


class TestFailure(AskTestCase):
    def test_nothing_runs_there(self):
        """Exit 3 and how to start it, or the address if it was given."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        done = self.ask("q", environ={"PORTWAY_URL": url})
        self.assertEqual((done.returncode, done.stdout), (3, b""))
        self.assertIn(f"nothing answers at PORTWAY_URL={url}".encode(), done.stderr)

    def test_an_error_is_told_in_the_daemons_words(self):
        """Exit 1, and a hint where a key is missing."""
        self.server.add(json_reply({"error": {"message": "too long", "code": "context_length_exceeded"}}, 400))
        done = self.ask("q")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (1, b"", b"ask: too long\n"))
        self.server.add(json_reply({"error": {"message": "a key is needed"}}, 401))
        self.assertIn(b"PORTWAY_API_KEY is not set", self.ask("q").stderr)

    def test_strict_tells_its_refusal_from_other_failures(self):
        """Exit 4 only when the model was tried."""
        error = {"error": {"message": "fast-9b is down"}}
        for status, headers, arguments, code in (
            (502, {"X-Portway-Attempts": "fast-9b=connect_failed"}, ["--strict"], 4),
            (502, {"X-Portway-Attempts": "fast-9b=connect_failed"}, [], 1),
            (400, {}, ["--strict"], 1),
        ):
            self.server.add(json_reply(error, status, headers))
            self.assertEqual(self.ask(*arguments, "q").returncode, code)
        frame = {**error, "portway": {"attempts": "fast-9b=first_token_timeout(120.0s)"}}
        self.server.add(sse_reply([frame], done=False, comments=["portway"]))
        self.assertEqual(self.ask("--strict", "q").returncode, 4)

    def test_a_broken_answer_is_a_failure(self):
        """Closed, reset, cut, or from something else that listens there: exit 1, one line, no traceback."""
        whole = json_reply(completion("Hi."))
        steps: list[Step] = [
            [CLOSE],
            [RESET],
            [whole[:-5], CLOSE],
            [stream_head() + b"zz\r\n", CLOSE],
            sse_reply([delta("Hi")], done=False),
            [b"SSH-2.0-OpenSSH_9.6\r\n", CLOSE],
            [b"x" * 100_000, CLOSE],
            [b"x" * 100_000, HANG],
            [b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100_000, HANG],
            http_reply(b"<html>", content_type="text/html"),
            http_reply(b"<html>", status=502, content_type="text/html"),
            json_reply({"error": "in 200"}),
            json_reply([1]),
        ]
        for step in steps:
            self.server.add(step)
            done = self.ask("q")
            self.assertEqual((done.returncode, done.stderr[:5], done.stderr.count(b"\n")), (1, b"ask: ", 1), step)

    def test_a_refusal_is_read_though_the_request_was_not(self):
        """A server may answer 413 while a large question is still being sent, and read the rest of it or close."""
        refusal = json_reply({"error": {"message": "larger than server.max_body"}}, 413, keep_alive=False)
        for reads in (True, False):
            with self.subTest(reads=reads), socket.create_server(("127.0.0.1", 0)) as listener:
                thread = threading.Thread(target=self._refuse, args=(listener, refusal, reads))
                thread.start()
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                done = self.ask("q", given=b"x" * 30_000_000, environ={"PORTWAY_URL": url})
                thread.join(PATIENCE)
                self.assertEqual((done.returncode, done.stderr), (1, b"ask: larger than server.max_body\n"))

    def _refuse(self, listener: socket.socket, refusal: bytes, reads: bool) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(refusal)
            connection.shutdown(socket.SHUT_WR)
            while reads and connection.recv(1 << 20):
                pass

    def test_interrupting_closes_the_connection(self):
        """Exit 130 without a traceback; the daemon sees the client go."""
        self.server.add([HANG])
        process = self.start("q")
        self.server.wait_requests(1)
        process.send_signal(signal.SIGINT)
        self.server.wait_closed()
        self.assertEqual((process.communicate(timeout=PATIENCE), process.returncode), ((b"", b""), 130))

    def test_a_closed_pipe_ends_quietly(self):
        """Exit 141, as of any filter."""
        go_on = threading.Event()
        self.server.add([go_on, json_reply(completion("Hi."))])
        process = self.start("q")
        assert process.stdout and process.stderr
        self.server.wait_requests(1)
        process.stdout.close()
        go_on.set()
        self.assertEqual((process.stderr.read(), process.wait(PATIENCE)), (b"", 141))

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_said(self):
        """Exit 1."""
        self.server.add(json_reply(completion("Hi.")))
        with open("/dev/full", "wb") as full:
            process = self.start("q", stdout=full)
            _, stderr = process.communicate(timeout=PATIENCE)
        self.assertEqual((stderr, process.returncode), (b"ask: can't write the answer: No space left on device\n", 1))


class TestLast(AskTestCase):
    def test_the_last_answer_is_kept_for_its_owner_only(self):
        """0600 in 0700, where --help says; asked of nobody."""
        self.answered("First.", "q")
        self.answered("Second.\n\x1b[0m", "q")
        done = self.ask("--last", environ={"PORTWAY_URL": "http://127.0.0.1:1"})
        self.assertEqual((done.returncode, done.stdout), (0, b"Second.\n\x1b[0m\n"))
        path = self.folder / ".local" / "state" / "portway" / "last-answer"
        self.assertEqual((path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777), (0o600, 0o700))
        self.assertEqual(os.listdir(path.parent), ["last-answer"])

    def test_without_one_it_fails(self):
        """With where it looked."""
        done = self.ask("--last", environ={"XDG_STATE_HOME": str(self.folder / "s")})
        self.assertEqual((done.returncode, done.stdout), (1, b""))
        self.assertIn(str(self.folder / "s" / "portway" / "last-answer").encode(), done.stderr)

    def test_an_answer_that_cannot_be_kept_is_an_answer(self):
        """A state folder that can't be made changes nothing."""
        self.server.add(json_reply(completion("Hi.")))
        done = self.ask("q", environ={"XDG_STATE_HOME": self.file("not-a-folder", b"")})
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"Hi.\n", b""))


class Screen:
    """A pseudo-terminal that an ask runs on. `seen` is all that came, line ends as they were written."""

    def __init__(self, case: AskTestCase) -> None:
        self.master, self.slave = os.openpty()
        case.addCleanup(os.close, self.master)
        self.seen = ""
        self._bytes = b""

    def wait_for(self, text: str) -> None:
        """Read until `text` was written; AssertionError if it isn't."""
        until = time.monotonic() + PATIENCE
        while text not in self.seen:
            if not self._read(until):
                raise AssertionError(f"{text!r} is not in {self.seen!r}")

    def wait_for_more(self) -> None:
        """Read what comes next; after PATIENCE, or at the end, nothing."""
        self._read(time.monotonic() + PATIENCE)

    def wait_end(self) -> str:
        """Read until nobody has the terminal open any more."""
        until = time.monotonic() + PATIENCE
        while self._read(until):
            pass
        return self.seen

    def _read(self, until: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], max(0, until - time.monotonic()))
        data = b""
        if ready:
            with contextlib.suppress(OSError):  # Linux: EIO at the end
                data = os.read(self.master, 65536)
        self._bytes += data
        self.seen = self._bytes.decode("utf-8", "ignore").replace("\r\n", "\n")
        return bool(data)


class TestTerminal(AskTestCase):
    def on_terminal(self, *arguments: str, script: Sequence[Action] = ()) -> tuple[Screen, subprocess.Popen[bytes]]:
        """An ask that has the terminal to itself: stdin, stdout, stderr, and Ctrl-C."""
        self.server.add(script)
        screen = Screen(self)
        options = {"stdin": screen.slave, "stdout": screen.slave, "stderr": screen.slave}
        process = self.start(*arguments, **options, preexec_fn=lambda: os.login_tty(0))
        os.close(screen.slave)
        return screen, process

    def test_the_answer_comes_as_it_is_made(self):
        """Each piece is on the screen before the next one exists; a line end closes it."""
        go_on = threading.Event()
        script: list[Action] = [
            stream_head(headers=SERVED) + event(delta("Hel")),
            go_on,
            event(delta("lo.", "stop")) + END,
        ]
        screen, process = self.on_terminal("q", script=script)
        screen.wait_for("Hel")
        self.assertTrue(self.sent()["stream"])
        go_on.set()
        self.assertEqual((screen.wait_end(), process.wait(PATIENCE)), ("Hello.\n", 0))

    def test_a_demotion_is_said_before_the_answer(self):
        """Also if only the first chunk could tell, as a heartbeat had sent the headers."""
        facts = {"served_by": "fast-3b", "attempts": "fast-9b=first_token_timeout(120.0s); fast-3b=ok"}
        beat = stream_head() + chunk(b": portway\n")
        script = [beat, event(delta("Hi.", "stop", portway=facts)) + END]
        screen, _ = self.on_terminal("-v", "q", script=script)
        lines = screen.wait_end().splitlines()
        self.assertEqual(lines[:2], ["[degraded: fast-9b \u2192 fast-3b]", "Hi."])
        self.assertIn("served by fast-3b", lines[2])
        self.assertEqual(self.sent()["stream_options"], {"include_usage": True})

    def test_a_spinner_counts_while_nothing_comes(self):
        """It names what is waited for, and is gone when the answer comes."""
        go_on = threading.Event()
        script: list[Action] = [stream_head(), go_on, event(delta("Hi.", "stop")) + END]
        screen, _ = self.on_terminal("--9b", "q", script=script)
        screen.wait_for("waiting for --9b 1s")
        go_on.set()
        self.assertTrue(screen.wait_end().endswith("\r\x1b[KHi.\n"), screen.seen)

    def test_no_spinner_where_it_could_not_be_erased(self):
        """TERM=dumb, and stderr in a file."""
        self.environ["TERM"] = "dumb"
        go_on = threading.Event()
        screen, process = self.on_terminal("q", script=[stream_head(), go_on, event(delta("Hi.")) + END])
        self.server.wait_requests(1)
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(0.6)
        go_on.set()
        self.assertEqual(screen.wait_end(), "Hi.\n")

    def test_a_model_cannot_command_the_terminal(self):
        """Escapes are shown; so they are in the reasoning and in the daemon's messages."""
        evil = "\x1b]0;owned\x07\x9b31m\u202e\r\n\tok"
        script = [stream_head() + event(delta(reasoning="\x1b[2J")) + event(delta(evil, "stop")) + END]
        screen, _ = self.on_terminal("--show-thinking", "q", script=script)
        shown = screen.wait_end()
        self.assertIn("\x1b[2m\u241b[2J\x1b[22m\n", shown)
        self.assertTrue(shown.endswith("\u241b]0;owned\u2407<009B>31m<202E>\n\tok\n"), shown)
        screen, _ = self.on_terminal("q", script=[json_reply({"error": {"message": "\x1b[2J"}}, 500)])
        self.assertEqual(screen.wait_end(), "ask: \u241b[2J\n")

    def test_no_color_is_respected(self):
        """Then thinking is not dimmed."""
        self.environ["NO_COLOR"] = "1"
        script = [stream_head() + event(delta(reasoning="Hm.")) + event(delta("Hi.", "stop")) + END]
        screen, _ = self.on_terminal("--show-thinking", "q", script=script)
        self.assertEqual(screen.wait_end(), "Hm.\nHi.\n")

    def test_another_encoding_than_utf_8_is_no_obstacle(self):
        """What a screen can't show is replaced."""
        self.environ["PYTHONIOENCODING"] = "ascii"
        command = [*COMMAND[:1], "-S", *COMMAND[3:], "q"]  # -I would ignore the variable
        self.server.add([stream_head(headers=DEMOTED) + event(delta("\u00e9!", "stop")) + END])
        screen = Screen(self)
        process = subprocess.Popen(
            command, env=self.environ, stdin=screen.slave, stdout=screen.slave, stderr=screen.slave
        )
        os.close(screen.slave)
        self.assertEqual((screen.wait_end(), process.wait(PATIENCE)), ("[degraded: fast-9b -> fast-1b]\n?!\n", 0))

    def test_ctrl_c_cancels_the_generation(self):
        """Pressed on the keyboard: what came stays, the connection closes, exit 130."""
        screen, process = self.on_terminal("q", script=[stream_head() + event(delta("Hel")), HANG])
        screen.wait_for("Hel")
        os.write(screen.master, b"\x03")
        self.server.wait_closed()
        self.assertEqual(process.wait(PATIENCE), 130)
        self.assertEqual(screen.wait_end(), "Hel^C\n")

    def test_a_stream_that_breaks_keeps_what_came(self):
        """An error frame, or an end without [DONE]: the text, then the reason on a line of its own; exit 1."""
        begin = stream_head(headers=SERVED) + event(delta("Hel"))
        for rest, reason in (
            (event({"error": {"message": "the model died"}}) + LAST_CHUNK, "ask: the model died"),
            (LAST_CHUNK, "ask: the connection was closed in the middle of the answer"),
        ):
            screen, process = self.on_terminal("--strict", "q", script=[begin, rest])
            self.assertEqual(screen.wait_end(), f"Hel\n{reason}\n")
            self.assertEqual(process.wait(PATIENCE), 1)
        self.assertEqual(self.ask("--last").returncode, 1)

    def test_code_is_not_streamed(self):
        """With -x only the end shows which part is code."""
        screen, _ = self.on_terminal("-x", "q", script=[json_reply(completion("So:\n```\nls\n```"))])
        self.assertEqual(screen.wait_end(), "ls\n")
        self.assertNotIn("stream", self.sent())

    def test_a_spinner_for_a_piped_answer(self):
        """`x=$(ask ..)` on a terminal: the spinner is on stderr, and erased."""
        go_on = threading.Event()
        self.server.add([go_on, json_reply(completion("Hi."))])
        screen = Screen(self)
        process = self.start("q", stderr=screen.slave)
        os.close(screen.slave)
        screen.wait_for("waiting")
        go_on.set()
        self.assertEqual(process.communicate(timeout=PATIENCE)[0], b"Hi.\n")
        self.assertTrue(screen.wait_end().endswith("\r\x1b[K"))


class TestManual(AskTestCase):
    def test_it_has_every_option_and_every_exit_code(self):
        """The table that is read, the one that is printed and the completions have the same options."""
        documented = {name: option.value for option in ask_help.OPTIONS for name in option.names}
        self.assertEqual(set(documented), {*ask.SWITCHES, *ask.VALUES})
        self.assertEqual({name for name, value in documented.items() if value}, set(ask.VALUES))
        manual = self.ask("--help").stdout.decode()
        for option in ask_help.OPTIONS:
            self.assertIn(f"    {', '.join(option.names)}", manual)
        for code in (
            ask.ANSWERED,
            ask.FAILED,
            ask.USAGE,
            ask.NOT_RUNNING,
            ask.REFUSED,
            ask.INTERRUPTED,
            ask.PIPE_CLOSED,
        ):
            self.assertRegex(manual, rf"(?m)^    {code} +\w")
        self.assertLessEqual(max(map(len, manual.splitlines())), 80)

    def test_version(self):
        """The project's own."""
        self.assertEqual(self.ask("--version").stdout.decode(), f"ask {__version__}\n")

    def test_the_shells_accept_their_completions(self):
        """Each script names every option, and the shell that is installed finds no mistake in it."""
        for shell, check in (("bash", ["bash", "-n"]), ("zsh", ["zsh", "-n"]), ("fish", ["fish", "--no-execute"])):
            with self.subTest(shell=shell):
                script = self.ask("--completion", shell).stdout
                for name in (*ask.SWITCHES, *ask.VALUES):
                    self.assertIn(f"-l {name[2:]}" if shell == "fish" and name[1] == "-" else name[1:], script.decode())
                if shutil.which(shell):
                    done = subprocess.run(check, input=script, capture_output=True, timeout=PATIENCE, check=False)
                    self.assertEqual((done.returncode, done.stderr), (0, b""))


class TestInstall(AskTestCase):
    def test_it_starts_without_site_packages(self):
        """A script in the folder, for the Python that wrote it, isolated; it answers."""
        path = ask_install.install(str(self.folder / "bin"), self.environ)
        self.assertEqual(path, str(self.folder / "bin" / "ask"))
        self.server.add(json_reply(completion("Hi.")))
        done = subprocess.run(
            [path, "q"], env=self.environ, input=b"", capture_output=True, timeout=PATIENCE, check=False
        )
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"Hi.\n", b""))
        self.assertEqual(pathlib.Path(path).read_text().splitlines()[0], f"#!{sys.executable} -IS")

    def test_a_path_that_no_first_line_can_hold(self):
        """With a space, and too long: the shell starts Python then."""
        for name in ("a folder", "long" * 50):
            python = self.folder / name / "python3"
            python.parent.mkdir()
            python.symlink_to(sys.executable)
            path = ask_install.install(str(self.folder / "bin"), self.environ, python=str(python))
            done = subprocess.run(
                [path, "--version"], env=self.environ, capture_output=True, timeout=PATIENCE, check=False
            )
            self.assertEqual((done.stdout, done.stderr), (f"ask {__version__}\n".encode(), b""))

    def test_it_replaces_itself_and_nothing_else(self):
        """Another program's ask stays."""
        for _ in range(2):
            path = ask_install.install(str(self.folder), self.environ)
        self.assertTrue(ask_install.is_on_path(path, {"PATH": f"/nonexistent:{self.folder}"}))
        self.assertFalse(ask_install.is_on_path(path, {"PATH": "/nonexistent"}))
        pathlib.Path(path).write_text("#!/bin/sh\necho mine\n")
        with self.assertRaisesRegex(ask_install.CannotInstall, "another program"):
            ask_install.install(str(self.folder), self.environ)
        self.assertIn("mine", pathlib.Path(path).read_text())

    def test_from_a_zipapp_it_is_unpacked(self):
        """Only what ask consists of, into the data folder; the zipapp is not needed after that."""
        archive = self.folder / "portway.pyz"
        with zipfile.ZipFile(archive, "w") as zipped:
            for module in pathlib.Path(ROOT, "portway").rglob("*.py"):
                zipped.write(module, module.relative_to(ROOT))
        program = f"import sys; sys.path.insert(0, {str(archive)!r}); from portway.ask.install import install; "
        program += f"print(install({str(self.folder / 'bin')!r}, {{'XDG_DATA_HOME': {str(self.folder)!r}}}))"
        command = [sys.executable, "-I", "-c", program]
        path = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True, text=True).stdout.strip()
        archive.unlink()
        self.server.add(json_reply(completion("Hi.")))
        done = subprocess.run(
            [path, "q"], env=self.environ, input=b"", capture_output=True, timeout=PATIENCE, check=False
        )
        self.assertEqual((done.stdout, done.stderr), (b"Hi.\n", b""))


class TestStart(AskTestCase):
    SLOW = ("argparse", "email", "json", "re", "socket", "ssl", "typing", "urllib", "enum", "dataclasses", "site")

    def test_a_plain_question_imports_nothing_slow(self):
        """Time is not measured here, its cause is: which modules are loaded by the end."""
        self.server.add(json_reply(completion("Hi.")))
        program = f"""
import os, sys
sys.path.append({ROOT!r})
from portway.ask.command import main
status = main(["-v", "q"], os.environ)
print(status, *sorted(set(sys.modules) & set({self.SLOW!r})))
"""
        command = [sys.executable, "-I", "-S", "-c", program]
        done = subprocess.run(
            command, env=self.environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
        )
        self.assertEqual(done.stdout, b"Hi.\n0\n", done.stderr)


class TestPieces(unittest.TestCase):
    def test_code_blocks(self):
        """As CommonMark has them: longer fences, tildes, indentation, info strings."""
        for text, code in (
            ("no code", None),
            ("a `span` and ``` not a fence ``` here", None),
            ("```inline``` x\n", None),
            ("```py\nx\n```", "x\n"),
            ("````md\n```\nx\n```\n````\n", "```\nx\n```\n"),
            ("~~~\nx\n```\n~~~~\n", "x\n```\n"),
            ("1. do\n   ```sh\n   a\n     b\n   ```\n", "a\n  b\n"),
            ("```\n```\n", ""),
            ("```\nopen", "open"),
        ):
            with self.subTest(text=text):
                found = ask.code_block(text)
                self.assertEqual(found and found.text, code)

    def test_addresses(self):
        """IPv6, default ports, a path in front."""
        for url, host, port, path in (
            ("http://127.0.0.1:11436", "127.0.0.1", 11436, "/v1"),
            ("http://[::1]:8080/v1", "::1", 8080, "/v1"),
            ("HTTPS://box.lan/portway/v1/", "box.lan", 443, "/portway/v1"),
        ):
            address = Address(url)
            self.assertEqual((address.host, address.port, address.path), (host, port, path))

    def test_json_both_ways(self):
        """What is written is read back, by the json module as well."""
        value = {"a": [1, -2.5, 1e300, True, False, None, 'x"\\\n\u00e9\U0001f600'], "b": {}}
        self.assertEqual(json.loads(dumps(value)), value)
        self.assertEqual(loads(f" {json.dumps(value)}\n"), value)
        for text in ("", "{", "[1,", "{} {}", "NaN", '{"a": Infinity}', "'x'", '"\n"'):
            with self.assertRaises(ValueError, msg=text):
                loads(text)

    def test_all_is_written(self):
        """However little the system takes at once."""
        taken: list[bytes] = []

        def write(_: int, data: bytes) -> int:
            taken.append(data[:3])
            return len(taken[-1])

        with mock.patch.object(os, "write", write):
            terminal._write(1, b"Hello there.")
        self.assertEqual([b"Hel", b"lo ", b"the", b"re."], taken)

    def test_harmless_text_stays_as_it_is(self):
        """Line ends, tabs, every script, emoji."""
        for text in ("a\tb\nc", "\u0627\u0644", "\U0001f600\u200d\u2764\ufe0f", ""):
            self.assertEqual(harmless(text), text)


if __name__ == "__main__":
    unittest.main()
