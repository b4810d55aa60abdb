"""load.c and upstream.c in Python, for machines without a C compiler or without Linux: `slow.py load|upstream ...`.

They take the same words, speak the same and print the same, at a tenth of the speed. See the C programs' heads.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLACE = b"#" * 16
STAMP = re.compile(rb"@(\d{19})")
LIMIT = 1 << 22  # bytes of a line or head
CHUNK = '{{"id":"1","object":"chat.completion.chunk","created":1,"model":"{model}","choices":[{choice}]}}'
CALL = '[{"index":0,"id":"call_1","type":"function","function":{"name":"weather","arguments":"{}"}}]'
OLLAMA_CALL = '[{"function":{"name":"weather","arguments":{"city":"Oslo"}}}]'


# --- the upstream ---------------------------------------------------------------------------------


async def upstream() -> None:
    """Serve until stdin ends."""
    server = await asyncio.start_server(_serve, "127.0.0.1", 0, limit=LIMIT, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            await _answer(head, await reader.readexactly(int(length[1]) if length else 0), writer)
    except (OSError, asyncio.IncompleteReadError):
        writer.close()


async def _answer(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
    ollama = b" /api/" in head
    if head.startswith(b"GET") or b" /api/show" in head:
        _document(writer, 200, '{"models":[]}' if ollama else '{"object":"list","data":[]}')
        return
    asked = json.loads(body)
    model = asked["model"]
    kind, gap, count = model.split("-")
    if kind == "fail":
        _document(writer, 404, '{"error":{"message":"model not found"}}')
    elif ollama or asked.get("stream"):
        usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        await _stream(writer, model, int(gap) / 1e6, int(count), ollama=ollama, usage=usage)
    else:
        calls = f',"tool_calls":{CALL}' if kind == "tools" else ""
        message = f'{{"role":"assistant","content":"{"x" * 1200}"{calls}}}'
        choice = f'{{"index":0,"message":{message},"finish_reason":"{"tool_calls" if calls else "stop"}"}}'
        text = CHUNK.format(model=model, choice=choice).replace(".chunk", "")
        _document(writer, 200, f'{text[:-1]},"usage":{_usage(240)}}}')


def _usage(count: int) -> str:
    return f'{{"prompt_tokens":400,"completion_tokens":{count},"total_tokens":{400 + count}}}'


def _document(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    writer.write((head + text).encode())


async def _stream(
    writer: asyncio.StreamWriter, model: str, gap: float, count: int, *, ollama: bool, usage: bool
) -> None:
    kind = "application/x-ndjson" if ollama else "text/event-stream"
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    if not ollama:
        _put(writer, _event(model, '{"role":"assistant","content":""}', "null"))
    due = time.monotonic()
    for _ in range(count):
        if (left := due - time.monotonic()) > 0:
            await asyncio.sleep(left)
        stamp = f"@{time.monotonic_ns():019d} "
        _put(writer, _line(model, stamp) if ollama else _event(model, _delta(model, stamp), "null"))
        await writer.drain()
        due += gap
    _put(writer, _end(model, count, ollama=ollama, usage=usage))
    writer.write(b"0\r\n\r\n")


def _delta(model: str, stamp: str) -> str:
    calls = f',"tool_calls":{CALL}' if model.startswith("tools") else ""
    return f'{{"content":"{stamp}"{calls}}}'


def _event(model: str, delta: str, reason: str) -> str:
    choice = f'{{"index":0,"delta":{delta},"finish_reason":{reason}}}'
    return f"data: {CHUNK.format(model=model, choice=choice)}\n\n"


def _line(model: str, stamp: str) -> str:
    calls = f',"tool_calls":{OLLAMA_CALL}' if model.startswith("tools") else ""
    return f'{{"model":"{model}","message":{{"role":"assistant","content":"{stamp}"{calls}}},"done":false}}\n'


def _end(model: str, count: int, *, ollama: bool, usage: bool) -> str:
    if ollama:
        counts = f'"done":true,"done_reason":"stop","prompt_eval_count":400,"eval_count":{count}'
        return f'{{"model":"{model}","message":{{"role":"assistant","content":""}},{counts}}}\n'
    last = _event(model, "{}", '"tool_calls"' if model.startswith("tools") else '"stop"')
    told = f'data: {CHUNK.format(model=model, choice="")[:-1]},"usage":{_usage(count)}}}\n\n' if usage else ""
    return f"{last}{told}data: [DONE]\n\n"


def _put(writer: asyncio.StreamWriter, text: str) -> None:
    writer.write(f"{len(text):x}\r\n{text}\r\n".encode())


# --- the load -------------------------------------------------------------------------------------


class Run:
    """One run of the load generator."""

    def __init__(self, port: int, requests: Sequence[bytes], seconds: float, count: int, *, fresh: bool) -> None:
        self._port = port
        self._requests = requests
        self._until = time.monotonic() + seconds
        self._count = count
        self._fresh = fresh
        self._salt = time.monotonic_ns() & 0xFFFFFFFF
        self._begun = 0
        self.answers = self.errors = self.opened = self.active = 0
        self.whole: list[float] = []
        self.first: list[float] = []
        self.ages: list[float] = []

    async def connection(self, delay: float) -> None:
        """One connection's requests, one after the other."""
        await asyncio.sleep(delay)
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while time.monotonic() < self._until and not (self._count and self._begun >= self._count):
            request = self._requests[self._begun % len(self._requests)]
            request = request.replace(PLACE, b"%08x%08x" % (self._salt, self._begun), 1)
            self._begun += 1
            self.active += 1
            started = time.monotonic_ns()
            if streams is None:
                streams = await asyncio.open_connection("127.0.0.1", self._port, limit=LIMIT)
                self.opened += 1
            fine, closes = await self._exchange(request, started, *streams)
            self.active -= 1
            if self._fresh or closes or not fine:
                streams[1].close()
                streams = None
        if streams:
            streams[1].close()

    async def _exchange(
        self, request: bytes, started: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[bool, bool]:
        """(whether there was a good answer, whether the connection is to be closed)."""
        writer.write(request)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await self._body(head, started, reader)
        except (OSError, asyncio.IncompleteReadError, ValueError) as exc:
            print(f"load: {exc!r}", file=sys.stderr)
            self.errors += 1
            return False, True
        if not head.startswith(b"http/1.1 200"):
            if not self.errors:
                print(f"load: first error: {head[:200]!r}", file=sys.stderr)
            self.errors += 1
            return False, True
        self.answers += 1
        self.whole.append((time.monotonic_ns() - started) / 1000)
        return True, b"\r\nconnection: close" in head

    async def _body(self, head: bytes, started: int, reader: asyncio.StreamReader) -> None:
        if length := re.search(rb"\r\ncontent-length: *(\d+)", head):
            self._look(await reader.readexactly(int(length[1])), started)
            return
        rest = b""  # a stamp may be cut by a chunk's end
        while size := int((await reader.readline()).strip(), 16):
            data = await reader.readexactly(size + 2)
            rest = self._look(rest + data[:-2], started)
        await reader.readline()

    def _look(self, data: bytes, started: int) -> bytes:
        now, end, begun = time.monotonic_ns(), 0, True
        for found in STAMP.finditer(data):
            if begun and len(self.first) <= self.answers:
                self.first.append((now - started) / 1000)
            begun = False
            self.ages.append((now - int(found[1])) / 1000)
            end = found.end()
        cut = data.rfind(b"@", end)
        return data[cut:] if cut >= 0 else b""


def _quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    values.sort()
    at = {name: values[int((len(values) - 1) * q)] for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {"n": len(values), "mean": sum(values) / len(values), **at, "max": values[-1]}


def _requests(path: Path) -> list[bytes]:
    data, found, pos = path.read_bytes(), [], 0
    while pos < len(data):
        end = data.index(b"\n", pos)
        size = int(data[pos:end])
        found.append(data[end + 1 : end + 1 + size])
        pos = end + 1 + size
    return found


async def load(words: Sequence[str]) -> dict[str, Any]:
    """What load.c does with the same words."""
    port, path, connections, seconds, count, fresh, ramp = words
    run = Run(int(port), _requests(Path(path)), float(seconds), int(count), fresh=fresh == "1")
    started = time.monotonic()
    delays = [float(ramp) / 1000 * number / int(connections) for number in range(int(connections))]
    await asyncio.wait([asyncio.create_task(run.connection(delay)) for delay in delays], timeout=float(seconds) + 30)
    return {
        "answers": run.answers,
        "errors": run.errors,
        "unfinished": run.active,
        "opened": run.opened,
        "stamps": len(run.ages),
        "seconds": time.monotonic() - started,
        "cpu": time.process_time(),
        "whole": _quantiles(run.whole),
        "first": _quantiles(run.first),
        "ages": _quantiles(run.ages),
    }


if __name__ == "__main__":
    if sys.argv[1] == "upstream":
        asyncio.run(upstream())
    else:
        print(json.dumps(asyncio.run(load(sys.argv[2:]))))
