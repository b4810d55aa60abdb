"""The processes that counts.py counts in: `counts_child.py upstream|instructions|memory|syscalls FOLDER PORT`.

upstream: a server whose every answer comes in one piece. The others: Portway in front of it, told on stdin to
`begin` and to `end REQUESTS`, which prints the counts. Each ends with its stdin.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from types import CodeType, FrameType
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
CHUNKS = 32
SETTLE = 0.2  # seconds for the log to write what it has
TOP = 60  # functions that are told

CONFIGURATION = """\
[log]
file = "{folder}/log.jsonl"
[cache]
file = "{folder}/cache.sqlite3"
[backends.openai]
kind = "openai"
url = "http://127.0.0.1:{port}/v1"
[backends.ollama]
kind = "ollama"
url = "http://127.0.0.1:{port}"
[models.openai]
backend = "openai"
model = "one"
[models.cached]
backend = "openai"
model = "one"
cache = "1h"
[models.ollama]
backend = "ollama"
model = "one"
"""


def main(what: str, folder: str, port: str) -> None:
    """Serve until stdin ends."""
    if what == "upstream":
        serve_upstream()
        return
    counter = COUNTERS[what]()
    daemon = start_daemon(folder, int(port))
    print(daemon.port, flush=True)
    for line in sys.stdin:
        words = line.split()
        time.sleep(SETTLE)
        daemon.cache.flush(10.0)  # what is written at some time or other is written now, and counts
        if words[0] == "begin":
            counter.begin()
            print("true", flush=True)
        else:
            print(json.dumps(counter.end(int(words[1]))), flush=True)
    os._exit(0)  # whatever its threads do


def start_daemon(folder: str, port: int) -> Any:
    """Portway with its log and its cache."""
    sys.path[0] = str(ROOT)
    from dataclasses import replace

    from portway import config, proxy
    from portway.cache.store import Cache
    from portway.telemetry import Log

    parsed = config.parse(CONFIGURATION.format(folder=folder, port=port), "models.toml", {})
    parsed = replace(parsed, server=replace(parsed.server, port=0))
    daemon = proxy.Daemon(parsed, say=lambda _: None, log=Log(parsed.log.file), cache=Cache(parsed.cache.file))
    daemon.start()
    return daemon


# --- the counters ---------------------------------------------------------------------------------


class Counts(Protocol):
    """Counts from `begin` to `end`, which tells them per request."""

    def begin(self) -> None:
        """The warm-up is over."""
        ...

    def end(self, requests: int) -> dict[str, Any]:
        """So many requests were made since."""
        ...


class Instructions:
    """Every instruction that the interpreter carries out, on all threads but this one."""

    def __init__(self) -> None:
        self._counts: Counter[CodeType] = Counter()
        self._main = threading.get_ident()
        self._counting = False
        if sys.version_info < (3, 12):
            threading.settrace(self._trace)

    def begin(self) -> None:
        """See Counts."""
        self._counting = True
        if sys.version_info >= (3, 12):
            monitoring = sys.monitoring
            monitoring.use_tool_id(monitoring.PROFILER_ID, "counts")
            monitoring.register_callback(monitoring.PROFILER_ID, monitoring.events.INSTRUCTION, self._instruction)
            monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.INSTRUCTION)

    def end(self, requests: int) -> dict[str, Any]:
        """See Counts; and in which functions they were."""
        self._counting = False
        if sys.version_info >= (3, 12):
            sys.monitoring.set_events(sys.monitoring.PROFILER_ID, 0)
        where = [(_place(code), round(count / requests, 1)) for code, count in self._counts.most_common(TOP)]
        return {"instructions": round(sum(self._counts.values()) / requests, 1), "where": where}

    def _instruction(self, code: CodeType, _offset: int) -> None:
        if threading.get_ident() != self._main:
            self._counts[code] += 1

    def _trace(self, frame: FrameType, event: str, _arg: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and self._counting:
            self._counts[frame.f_code] += 1
        return self._trace


def _place(code: CodeType) -> str:
    return f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_qualname}"


class Memory:
    """Blocks that are still there after the requests, and the most memory in use during one."""

    def __init__(self) -> None:
        self._blocks = 0
        self._before = 0
        tracemalloc.start()

    def begin(self) -> None:
        """See Counts."""
        gc.collect()
        self._blocks = sys.getallocatedblocks()
        tracemalloc.reset_peak()
        self._before = tracemalloc.get_traced_memory()[0]

    def end(self, requests: int) -> dict[str, Any]:
        """See Counts."""
        peak = tracemalloc.get_traced_memory()[1] - self._before
        gc.collect()
        kept = sys.getallocatedblocks() - self._blocks
        return {"kept_blocks": round(max(0, kept) / requests, 2), "peak_bytes": peak}


class Nothing:
    """strace counts from outside."""

    def begin(self) -> None:
        """Nothing to do."""

    def end(self, requests: int) -> dict[str, Any]:
        """Nothing to tell."""
        return {"requests": requests}


COUNTERS: Mapping[str, Callable[[], Counts]] = {"instructions": Instructions, "memory": Memory, "syscalls": Nothing}


# --- the upstream ---------------------------------------------------------------------------------


class Upstream(StreamRequestHandler):
    """Answers each request on a connection in one write, by its path and by whether it asks for a stream."""

    def handle(self) -> None:
        """Until the connection ends."""
        while line := self.rfile.readline():
            length = 0
            while (field := self.rfile.readline()) not in (b"\r\n", b""):
                if field.lower().startswith(b"content-length:"):
                    length = int(field[15:])
            body = self.rfile.read(length)
            self.wfile.write(_answer(line, body))


def _answer(line: bytes, body: bytes) -> bytes:
    if b" /api/chat" in line:
        return _chunked(b"application/x-ndjson", _ollama_lines())
    if b'"stream": true' in body or b'"stream":true' in body:
        return _chunked(b"text/event-stream", _openai_events())
    message = {"role": "assistant", "content": "x" * 1200}
    usage = {"prompt_tokens": 400, "completion_tokens": 240, "total_tokens": 640}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "one", "choices": choices, "usage": usage}
    text = json.dumps(whole).encode() if b" /v1/chat" in line else b"{}"
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


def _openai_events() -> list[bytes]:
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": "word "}, None)] * CHUNKS + [({}, "stop")]
    events = []
    for delta, reason in deltas:
        choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "one", "choices": choices}
        events.append(b"data: %b\n\n" % json.dumps(chunk, separators=(",", ":")).encode())
    return [*events, b"data: [DONE]\n\n"]


def _ollama_lines() -> list[bytes]:
    line = {"model": "one", "created_at": "2026-01-01T00:00:00Z"}
    words = [{**line, "message": {"role": "assistant", "content": "word "}, "done": False}] * CHUNKS
    counts = {"prompt_eval_count": 400, "eval_count": CHUNKS}
    last = {**line, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop", **counts}
    return [json.dumps(each).encode() + b"\n" for each in (*words, last)]


def _chunked(kind: bytes, parts: list[bytes]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


class Server(ThreadingTCPServer):
    """On a free port of 127.0.0.1."""

    daemon_threads = True
    allow_reuse_address = True


def serve_upstream() -> None:
    """Until stdin ends."""
    server = Server(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
