#!/usr/bin/env python3
"""Look for inputs that break what reads bytes from outside, guided by the code that they reach.

    fuzz.py                        every target, for a minute each
    fuzz.py chunks --seconds 3600  one of them, for an hour

Needs atheris (`pip install atheris`), which the project itself does not: the suite fuzzes with hypothesis. Each target
runs as a process of its own. What is found lies in a file crash-.. in the present folder, and ends the run with 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone, with nothing installed

MAX_LENGTH = 512  # bytes of an input: what these readers get wrong, they get wrong in few


class Wrong(Exception):
    """A reader did what it must not."""


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Guided fuzzing, where atheris is installed.")
    parser.add_argument("target", nargs="*", help=f"of {', '.join(TARGETS)}; all, if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--run", metavar="TARGET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return _fuzz(options.run, options.seconds)
    if unknown := [name for name in options.target if name not in TARGETS]:
        parser.error(f"no such target: {unknown[0]}")
    if importlib.util.find_spec("atheris") is None:
        print("fuzz.py: atheris is not installed", file=sys.stderr)
        return 2
    status = 0
    for name in options.target or TARGETS:
        print(f"{name}: {options.seconds} s", flush=True)
        command = [sys.executable, __file__, "--run", name, "--seconds", str(options.seconds)]
        status |= subprocess.run(command, check=False).returncode != 0
    return status


def _fuzz(name: str, seconds: int) -> int:
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["portway"]):
        target = TARGETS[name]()
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", f"-max_len={MAX_LENGTH}", "-print_final_stats=1"], target)
    atheris.Fuzz()
    return 0


# --- the targets: each imports what it needs, so that it is instrumented, and returns what eats bytes -----------


def _heads() -> Callable[[bytes], None]:
    from portway.wire.http1 import BadMessage, parse_request, parse_response

    def eat(data: bytes) -> None:
        for parse in (parse_request, parse_response):
            for head in (data, b"POST / HTTP/1.1\r\nHost: a\r\n" + data, b"HTTP/1.1 200 OK\r\n" + data):
                try:
                    read = parse(head)
                except BadMessage:
                    continue
                if any(
                    not value.isprintable() and "\t" not in value for value in read.headers.values() if value.isascii()
                ):
                    raise Wrong(read)

    return eat


def decoded(pieces: list[bytes]) -> tuple[bytes, bool, bytes] | None:
    """Of the chunked coding: (payload, done, rest), or None for what is refused."""
    from portway.wire.http1 import BadMessage, ChunkedDecoder

    decoder, payload, behind = ChunkedDecoder(), b"", b""
    try:
        for piece in pieces:
            if decoder.done:
                behind += piece
            else:
                payload += decoder.feed(piece)
    except BadMessage:
        return None
    return payload, decoder.done, decoder.rest + behind


def _chunks() -> Callable[[bytes], None]:
    import portway.wire.http1  # noqa: F401 - here, so that it is instrumented

    def eat(data: bytes) -> None:
        _same(data, decoded)

    return eat


def _events() -> Callable[[bytes], None]:
    from portway.wire.events import NDJSONReader, SSEReader, WireError

    def read(kind: type[SSEReader | NDJSONReader], pieces: list[bytes]) -> object:
        reader = kind(64)
        found: list[bytes] = []
        try:
            for piece in pieces:
                found += reader.feed(piece)
            return found, reader.finish()
        except WireError as exc:
            return str(exc)

    def eat(data: bytes) -> None:
        _same(data, lambda pieces: read(SSEReader, pieces))
        _same(data, lambda pieces: read(NDJSONReader, pieces))

    return eat


def _same(data: bytes, read: Callable[[list[bytes]], object]) -> None:
    """Whatever the bytes are cut into."""
    whole = read([data])
    half = len(data) // 2
    for pieces in ([data[i : i + 1] for i in range(len(data))], [data[:half], data[half:]]):
        if read(pieces) != whole:
            raise Wrong(data)


def _json() -> Callable[[bytes], None]:
    from portway.errors import ClientError
    from portway.wire.events import dumps, loads_object

    def eat(data: bytes) -> None:
        try:
            value = loads_object(data)
        except ClientError:
            return
        if value != json.loads(data) or loads_object(dumps(value)) != value:
            raise Wrong(data)

    return eat


def _config() -> Callable[[bytes], None]:
    from portway import config

    base = '[backends.b]\nkind = "ollama"\nurl = "http://h"\n[models.m]\nbackend = "b"\nmodel = "x"\n'

    def eat(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        for whole in (text, base + text):
            try:
                config.parse(whole, "m.toml", {"K": "sk-1"})
            except config.ConfigError as exc:
                if not str(exc).replace("\n", "").isprintable():
                    raise Wrong(str(exc)) from exc

    return eat


def _requests() -> Callable[[bytes], None]:
    from portway import config
    from portway.errors import BackendError, ClientError
    from portway.request import read_call
    from portway.wire.events import dumps
    from portway.wire.translate import chat_request, embed_request, generate_request

    toml = '[backends.b]\nkind = "ollama"\nurl = "http://h"\n[models.m]\nbackend = "b"\nmodel = "x"\n'
    loaded = config.parse(toml, "m.toml", {})
    translate = {"chat": chat_request, "completions": generate_request, "embeddings": embed_request}

    def eat(data: bytes) -> None:
        for raw in (data, b'{"model":"m","messages":[{"role":"user","content":"x"}],' + data + b"}"):
            for endpoint, function in translate.items():
                try:
                    call = read_call(endpoint, raw, loaded)  # type: ignore[arg-type]
                    json.loads(dumps(function(call.body, call.model)[0]))
                except (ClientError, BackendError):
                    continue

    return eat


TARGETS: Mapping[str, Callable[[], Callable[[bytes], Any]]] = {
    "heads": _heads,
    "chunks": _chunks,
    "events": _events,
    "json": _json,
    "config": _config,
    "requests": _requests,
}

if __name__ == "__main__":
    sys.exit(main())
