"""`ask`: one question from the command line to the daemon, the answer on stdout.

It is a client like any other and knows no more of Portway than its API. What it does first is be
quick: on a cache hit the whole process must feel like `cat`, so this path imports nothing that it
could do without, and what is rare (help, completions, globs, pictures) is imported where it is used.
"""

from __future__ import annotations

import os
import sys
from time import monotonic

from portway.ask.client import Address, Broken, Exchange, Unreachable, dumps, loads
from portway.ask.terminal import Terminal

TYPE_CHECKING = False  # typing itself is not imported: it would take longer than all of this
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn

ANSWERED = 0
FAILED = 1
USAGE = 2
NOT_RUNNING = 3
REFUSED = 4
INTERRUPTED = 130  # what a shell makes of SIGINT
PIPE_CLOSED = 141  # and of SIGPIPE

DEFAULT_URL = "http://127.0.0.1:11436"
TIER = "flag:"  # a model of this name is the one whose `flag` in the daemon's configuration is the rest
DEFAULT_MODEL = "flag:default"

SWITCHES = {
    "-x": "extract",
    "--extract": "extract",
    "--json": "json",
    "--no-cache": "no_cache",
    "--refresh": "refresh",
    "--strict": "strict",
    "--show-thinking": "show_thinking",
    "-v": "verbose",
    "--verbose": "verbose",
    "-n": "no_input",
    "--no-input": "no_input",
    "--last": "last",
    "--tiers": "tiers",
    "-h": "help",
    "--help": "help",
    "--version": "version",
}
VALUES = {
    "-f": "file",
    "--file": "file",
    "-m": "model",
    "--model": "model",
    "-s": "system",
    "--system": "system",
    "-t": "temperature",
    "--temperature": "temperature",
    "--schema": "schema",
    "--completion": "completion",
}


def run() -> NoReturn:
    """The command. Leaves without Python's tidying up, as nothing is buffered: that saves 1 to 2 ms."""
    os._exit(main(sys.argv[1:], os.environ))


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Do what `arguments` ask for. Returns the exit code; whatever goes wrong is said on stderr."""
    terminal, errand = Terminal(environ), Errand()
    status, error = ANSWERED, ""
    try:
        _do(read_options(arguments), environ, terminal, errand)
    except Failure as exc:
        status, error = exc.status, exc.code
        terminal.note(f"ask: {exc}")
    except Broken as exc:
        status = FAILED
        terminal.note(f"ask: {exc}")
    except KeyboardInterrupt:
        status, error = INTERRUPTED, "interrupted"
        terminal.break_off()
    except BrokenPipeError:
        status, error = PIPE_CLOSED, "pipe_closed"
        terminal.break_off()
    except OSError as exc:  # stdout on a full disk, say
        status, error = FAILED, "not_written"
        terminal.note(f"ask: can't write the answer: {exc.strerror}")
    if status and errand.ends_unseen(error):
        from portway.ask import journal

        journal.note(errand, status, error, environ)
    return status


class Failure(Exception):
    """ask can't do what it was asked. str() says why; `status` is the exit code, `code` the log's word for it."""

    def __init__(self, message: str, status: int = FAILED, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Errand:
    """One question on its way, as far as the log may have to be told of it by ask itself (journal.py).

    phase: "" = nobody was asked; "calling", "answering", "answered": how far it came. model: as it was asked
    for, a tier with its `flag:`. id: the answer's. started: time.monotonic().
    """

    def __init__(self) -> None:
        self.phase = self.model = self.id = ""
        self.stream = False
        self.started = monotonic()

    def ends_unseen(self, error: str) -> bool:
        """Whether the daemon's own line of this question can't say that it ended with `error`."""
        if self.phase == "calling":
            return error == "not_running"
        if self.phase == "answering":
            return error in ("pipe_closed", "not_written")  # which look like a Ctrl-C from there
        return self.phase == "answered"


def _do(options: Options, environ: Mapping[str, str], terminal: Terminal, errand: Errand) -> None:
    if options.help or options.version or options.completion is not None:
        from portway.ask import manual as ask_help

        try:
            terminal.answer(ask_help.text(options))
        except ValueError as exc:
            raise Failure(str(exc), USAGE) from None
    elif options.last:
        _show_last(options, environ, terminal)
    elif options.tiers:
        for flag, name in _tiers(_address(environ), environ):
            terminal.answer(f"{flag and '--' + flag}\t{name}\n")
    else:
        _ask(options, environ, terminal, errand)


# --- The options -----------------------------------------------------------------------------


class Options:
    """What the command line says. A value that was not given is None, a switch False."""

    def __init__(self) -> None:
        self.words: list[str] = []  # of the question
        self.files: list[str] = []
        self.model: str | None = None
        self.system: str | None = None
        self.temperature: float | None = None
        self.schema: str | None = None
        self.completion: str | None = None
        self.extract = self.json = self.no_cache = self.refresh = self.strict = False
        self.show_thinking = self.verbose = self.no_input = False
        self.last = self.tiers = self.help = self.version = False


def read_options(arguments: Iterable[str]) -> Options:
    """Raises Failure (2). Options may stand anywhere; what follows `--` is question."""
    options = Options()
    rest = iter(arguments)
    for word in rest:
        if word == "--":
            options.words += rest
        elif word.startswith("--"):
            _read_long(options, word, rest)
        elif word.startswith("-") and word != "-":
            _read_short(options, word, rest)
        elif word != "-":  # stdin, which is read anyway
            options.words.append(word)
    if options.last and (options.words or options.files or options.model):
        raise Failure("--last shows the last answer again; it takes no question", USAGE)
    return options


def _read_long(options: Options, word: str, rest: Iterator[str]) -> None:
    name, equals, value = word.partition("=")
    if name in VALUES:
        _set_value(options, name, value if equals else next(rest, None))
    elif equals or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise Failure(f"unknown option {name}; put -- before a question that begins with a dash", USAGE)
    elif name in SWITCHES:
        setattr(options, SWITCHES[name], True)
    else:  # the tiers are the daemon's to name: it knows whether this is one
        _choose_model(options, TIER + name[2:])


def _read_short(options: Options, word: str, rest: Iterator[str]) -> None:
    """`-x`, `-xv`, `-t 0.2`, `-t0.2`, `-xt 0.2`."""
    for place, letter in enumerate(word[1:], 2):
        name = f"-{letter}"
        if name in VALUES:
            _set_value(options, name, word[place:] or next(rest, None))
            return
        if name not in SWITCHES:
            hint = "put -- before a question that begins with a dash, or see ask --help"
            raise Failure(f"unknown option {name}; {hint}", USAGE)
        setattr(options, SWITCHES[name], True)


def _set_value(options: Options, name: str, value: str | None) -> None:
    if value is None:
        raise Failure(f"{name} needs a value", USAGE)
    attribute = VALUES[name]
    if attribute == "file":
        options.files.append(value)
    elif attribute == "model":
        _choose_model(options, value)
    elif attribute == "temperature":
        options.temperature = _temperature(value)
    else:
        setattr(options, attribute, value)


def _choose_model(options: Options, name: str) -> None:
    if options.model not in (None, name):
        raise Failure(f"{_spoken(options.model or '')} and {_spoken(name)}: only one model can be asked", USAGE)
    options.model = name


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise Failure(f"-t {text}: not a temperature, which is a number from 0 to 2", USAGE)
    return value


def _spoken(model: str) -> str:
    """A model as it stands on the command line."""
    return "--" + model.removeprefix(TIER) if model.startswith(TIER) else model


# --- The question ----------------------------------------------------------------------------


def _ask(options: Options, environ: Mapping[str, str], terminal: Terminal, errand: Errand) -> None:
    address = _address(environ)
    model = errand.model = options.model or environ.get("PORTWAY_MODEL") or DEFAULT_MODEL
    # A plain answer is quicker than a stream, and the daemon may still replace a model that fails halfway.
    stream = errand.stream = terminal.answers_shown and not options.extract
    body = dumps(_request(options, model, stream=stream)).encode()
    headers = _headers(options, environ)
    errand.phase, errand.started = "calling", monotonic()
    answer = Answer(options, terminal, "waiting" if model == DEFAULT_MODEL else f"waiting for {_spoken(model)}")
    with _connect(address, environ, answer.wait if terminal.spins else None) as exchange:
        exchange.send("POST", "/chat/completions", headers, body)
        if exchange.status != 200:
            raise _refusal(exchange, options, model, environ)
        errand.phase = "answering"
        try:
            answer.read(exchange)
        finally:
            errand.id = answer.id
    errand.phase = "answered"
    answer.finish(monotonic() - errand.started)
    _save_last(answer, environ)


def _address(environ: Mapping[str, str]) -> Address:
    url = environ.get("PORTWAY_URL") or DEFAULT_URL
    try:
        return Address(url)
    except ValueError as exc:
        raise Failure(f"PORTWAY_URL={url}: {exc}", USAGE) from None


def _request(options: Options, model: str, *, stream: bool) -> dict[str, Any]:
    """The body of POST /v1/chat/completions."""
    messages: list[Any] = [{"role": "system", "content": _clean(options.system)}] if options.system else []
    messages.append({"role": "user", "content": _content(options)})
    body: dict[str, Any] = {"model": _clean(model), "messages": messages}
    if stream:
        body["stream"] = True
        if options.verbose:
            body["stream_options"] = {"include_usage": True}
    if options.temperature is not None:
        body["temperature"] = options.temperature
    if options.schema is not None:
        schema = {"name": "answer", "strict": True, "schema": _schema(options.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif options.json:
        body["response_format"] = {"type": "json_object"}
    return body


def _content(options: Options) -> str | list[Any]:
    """The user's message: what it is about first and the question last, as models read it best (and
    as a backend can keep what it computed for the same files when the next question comes).
    """
    question = _clean(" ".join(options.words))
    given = b"" if options.no_input else _standard_input()
    pictures: list[Any] = []
    texts: list[str] = []
    for path in _paths(options.files):
        _add(path, _read_file(path), texts, pictures)
    if given.strip():
        if question:
            _add("standard input", given, texts, pictures)
        else:
            question = _text("standard input", given).strip()
    if not question:
        raise Failure('no question. Try: ask "why is the sky blue?", or ask --help', USAGE)
    text = "\n\n".join([*texts, question])
    return [*pictures, {"type": "text", "text": text}] if pictures else text


def _standard_input() -> bytes:
    """All of stdin unless it is a terminal, or closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return b""
    parts = []
    while part := os.read(0, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _paths(names: Iterable[str]) -> list[str]:
    """The files meant, each once; a pattern that the shell left alone (it was quoted) is expanded."""
    paths: list[str] = []
    for name in names:
        if os.path.exists(name) or not any(mark in name for mark in "*?["):
            paths.append(name)
            continue
        import glob

        found = [path for path in sorted(glob.glob(name, recursive=True)) if os.path.isfile(path)]
        if not found:
            raise Failure(f"-f {name}: no file matches", USAGE)
        paths += found
    return list(dict.fromkeys(paths))


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb", 0) as file:
            return file.read()
    except OSError as exc:
        raise Failure(f"{path}: {exc.strerror}", USAGE) from None


def _add(name: str, data: bytes, texts: list[str], pictures: list[Any]) -> None:
    """A picture goes along as a part of its own, a text in a fence that nothing inside can close."""
    kind = _picture_kind(data)
    if kind:
        import binascii

        url = f"data:image/{kind};base64,{binascii.b2a_base64(data, newline=False).decode()}"
        pictures.append({"type": "image_url", "image_url": {"url": url}})
        return
    text = _text(name, data)
    fence = "```"
    while fence in text:
        fence += "`"
    end = "" if text.endswith("\n") else "\n"
    texts.append(f"{_clean(name)}:\n{fence}\n{text}{end}{fence}")


def _picture_kind(data: bytes) -> str:
    """The format, by the bytes it begins with; "" for what is no picture that models read."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    marks = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
    return next((kind for mark, kind in marks.items() if data.startswith(mark)), "")


def _text(name: str, data: bytes) -> str:
    try:
        if b"\0" in data:
            raise ValueError
        return data.decode("utf-8-sig")
    except ValueError:
        what = "neither text in UTF-8 nor a PNG, JPEG, GIF or WebP picture"
        raise Failure(f"{name}: {what}, so it can't be asked about", USAGE) from None


def _schema(path: str) -> Any:
    try:
        schema = loads(_text(path, _read_file(path)))
    except ValueError as exc:
        raise Failure(f"--schema {path}: {exc}", USAGE) from None
    if not isinstance(schema, dict):
        raise Failure(f"--schema {path}: a JSON Schema is an object", USAGE)
    return schema


def _clean(text: str) -> str:
    """Without the lone surrogates that stand for bytes of an argument which its locale can't read."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# --- The answer ------------------------------------------------------------------------------


class Answer:
    """An answer while it comes in: shows it, and keeps what has to be known at its end.

    How it came to this answer may be known from the headers, or, where a heartbeat had sent those
    before, from a chunk's `portway` field.
    """

    def __init__(self, options: Options, terminal: Terminal, label: str) -> None:
        self.demotion = ""
        self.id = ""
        self._options = options
        self._terminal = terminal
        self._label = label
        self._streamed = False
        self._parts: list[str] = []
        self._served_by = ""
        self._attempts = ""
        self._cache = ""
        self._usage: dict[str, Any] = {}
        self._finish = ""
        self._thought = False

    @property
    def text(self) -> str:
        """What has come in so far."""
        return "".join(self._parts)

    def wait(self) -> None:
        """Show that nothing has come in yet."""
        self._terminal.wait(self._label)

    def read(self, exchange: Exchange) -> None:
        """Take the whole answer in. Raises Failure or Broken; what was shown until then stays."""
        headers = exchange.headers
        age = headers.get("age", "")
        self._cache = headers.get("x-cache", "").lower() + (f" ({age} s old)" if age else "")
        names = (
            ("served_by", "x-served-by"),
            ("attempts", "x-portway-attempts"),
            ("council", "x-council"),
            ("warnings", "x-portway-warning"),
        )
        self._learn({fact: headers[header] for fact, header in names if header in headers})
        if headers.get("content-type", "").startswith("text/event-stream"):
            self._streamed = True
            self._read_stream(exchange.body())
        else:
            self._read_whole(_object(exchange.whole_body()))

    def finish(self, seconds: float) -> None:
        """Everything is in: what can only be shown or judged then. Raises Failure."""
        terminal, text = self._terminal, self.text
        if not text:
            thought = ": all its tokens went into thinking" if self._thought else ""
            raise Failure(f"{self._served_by or 'the model'} gave an empty answer{thought}", code="empty_answer")
        if self._options.extract:
            terminal.answer(self._code(text))
        elif not self._streamed:
            terminal.answer(text)
        terminal.finish_line()
        if self._options.verbose:
            terminal.note(self._summary(seconds))
        if self._finish == "length":
            terminal.note("[cut off: the answer reached its token limit]")
        if self._options.json or self._options.schema is not None:
            _check_json(text)

    def _read_stream(self, pieces: Iterable[bytes]) -> None:
        for data in _events(pieces):
            if data == b"[DONE]":
                return
            chunk = _object(data)
            facts = chunk.get("portway") or {}
            if "error" in chunk:
                refused = self._options.strict and "attempts" in facts and not self._parts
                raise Failure(_message(chunk), REFUSED if refused else FAILED)
            self._learn(facts)
            self._take(chunk, "delta")
        raise Broken("the connection was closed in the middle of the answer")

    def _read_whole(self, body: dict[str, Any]) -> None:
        if "error" in body:
            raise Failure(_message(body))
        self._learn(body.get("portway") or {})
        self._take(body, "message")

    def _take(self, chunk: dict[str, Any], part: str) -> None:
        self.id = self.id or str(chunk.get("id") or "")
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            message = choice.get(part) or {}
            self._think(message.get("reasoning_content") or message.get("reasoning") or "")
            text = message.get("content") or ""
            if text:
                self._parts.append(text)
                if self._streamed and not self._options.extract:
                    self._terminal.answer(text)
            self._finish = choice.get("finish_reason") or self._finish

    def _think(self, text: str) -> None:
        if text:
            self._thought = True
            self._label = "thinking"
            if self._options.show_thinking:
                self._terminal.thinking(text)

    def _learn(self, facts: Mapping[str, Any]) -> None:
        """Who answers, instead of whom, and what the daemon warns of: said before the answer."""
        self._served_by = facts.get("served_by") or self._served_by
        self._attempts = facts.get("attempts") or self._attempts
        asked = self._attempts.partition("=")[0]
        how = ""
        if "(" in self._served_by:  # council(a,b>c): then the attempts are those of its members, and no chain's
            how = _stood_in(facts)
        elif asked and self._served_by not in ("", asked):
            how = f"{asked} \u2192 {self._served_by}"
        if how and not self.demotion:
            self.demotion = f"[degraded: {how}]"
            self._terminal.note(self.demotion)
        warnings = facts.get("warnings") or []
        for warning in [warnings] if isinstance(warnings, str) else warnings:
            self._terminal.note(f"[warning: {warning}]")

    def _code(self, text: str) -> str:
        code = code_block(text)
        if code is None or (self._finish == "length" and not code.closed):
            self._terminal.note(text)  # a person may want it; a shell that runs stdout must not get it
            what = "no code block in the answer" if code is None else "the code block is not complete"
            raise Failure(what, code="no_code_block")
        return code.text

    def _summary(self, seconds: float) -> str:
        usage, facts = self._usage, [f"served by {self._served_by or 'an unnamed model'}"]
        if self._attempts:
            facts.append(self._attempts.replace("; ", ", "))
        if self._cache:
            facts.append(f"cache {self._cache}")
        if "completion_tokens" in usage:
            facts.append(f"{usage.get('prompt_tokens', '?')} + {usage['completion_tokens']} tokens")
        return f"[{'; '.join(facts)}; {seconds:.{2 if seconds < 10 else 0}f} s]"


def _stood_in(facts: Mapping[str, Any]) -> str:
    """Who of a council, or of a cascade's last step, did not answer as itself; "" if all did, or if that is not
    known yet."""
    seats = [*(facts.get("members") or ()), facts.get("chairman") or {}] if facts.get("council") == "degraded" else []
    said = []
    for seat in (*seats, *(facts.get("steps") or ())[-1:]):
        name, served_by, status = seat.get("model") or "", seat.get("served_by") or "", seat.get("status") or "ok"
        if status != "ok":
            said.append(f"{name}: {status}")
        elif served_by not in ("", name):
            said.append(f"{name} \u2192 {served_by}")
    return ", ".join(said)


def _events(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The data of a stream's events, of which each is one line here (JSON has no line ends)."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = loads(data.decode("utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Failure("the server's answer is no JSON object; is PORTWAY_URL right?")
    return value


def _check_json(text: str) -> None:
    """Exit code 0 has to mean that a program can read the answer."""
    try:
        loads(text)
    except ValueError as exc:
        raise Failure(f"the answer is not valid JSON: {exc}", code="not_json") from None


class Code:
    """A fenced code block. `closed`: its end was there."""

    def __init__(self, lines: list[str], *, closed: bool) -> None:
        self.text = "".join(lines)
        self.closed = closed


def code_block(text: str) -> Code | None:
    """The first fenced code block of a Markdown text, without its fences and their indentation."""
    lines = iter(text.splitlines(keepends=True))
    for line in lines:
        bare = line.lstrip(" ")
        fence = bare[: len(bare) - len(bare.lstrip(bare[:1]))]
        if fence[:3] in ("```", "~~~") and not (fence[0] == "`" and "`" in bare[len(fence) :]):
            return _rest_of_block(lines, fence, len(line) - len(bare))
    return None


def _rest_of_block(lines: Iterator[str], fence: str, indent: int) -> Code:
    code: list[str] = []
    for line in lines:
        bare = line.strip()
        if bare.startswith(fence) and not bare.strip(fence[0]):
            return Code(code, closed=True)
        code.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
    return Code(code, closed=False)


# --- The daemon ------------------------------------------------------------------------------


def _connect(address: Address, environ: Mapping[str, str], tick: Any = None) -> Exchange:
    try:
        return Exchange(address, tick)
    except Unreachable as exc:
        if environ.get("PORTWAY_URL"):
            message = f"nothing answers at PORTWAY_URL={address.url} ({exc})"
        else:
            message = f"Portway is not running ({exc}). Start it: portway serve"
        raise Failure(message, NOT_RUNNING, "not_running") from None


def _headers(options: Options, environ: Mapping[str, str]) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "X-Portway-Client": "ask"}
    key = environ.get("PORTWAY_API_KEY")
    if key:
        if not (key.isascii() and key.isprintable()):
            raise Failure("PORTWAY_API_KEY has characters that no key has", USAGE)
        headers["Authorization"] = f"Bearer {key}"
    if options.no_cache or options.refresh:
        headers["Cache-Control"] = "no-store, no-cache" if options.no_cache else "no-cache"
    if options.strict:
        headers["X-Portway-Fallback"] = "off"
    return headers


def _refusal(exchange: Exchange, options: Options, model: str, environ: Mapping[str, str]) -> Failure:
    """An answer other than 200, in words."""
    body = exchange.whole_body()
    try:
        envelope = _object(body)
    except Failure:
        return Failure(f"HTTP {exchange.status} and no OpenAI error; is PORTWAY_URL right?")
    message = _message(envelope)
    error = envelope.get("error")
    was_tried = "x-portway-attempts" in exchange.headers
    if exchange.status == 404 and isinstance(error, dict) and error.get("code") == "model_not_found" and not was_tried:
        return Failure(_unknown_tier(model, environ) or message, USAGE)
    if exchange.status == 401 and not environ.get("PORTWAY_API_KEY"):
        message += " (PORTWAY_API_KEY is not set)"
    return Failure(message, REFUSED if options.strict and was_tried else FAILED)


def _message(envelope: Mapping[str, Any]) -> str:
    error = envelope.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or "the server failed and does not say why")


def _unknown_tier(model: str, environ: Mapping[str, str]) -> str:
    """What to say of a flag that neither ask nor the daemon knows; "" if there is nothing to add."""
    if not model.startswith(TIER):
        return ""
    tiers = _tiers(_address(environ), environ)
    names = ", ".join(name for _, name in tiers)
    if model == DEFAULT_MODEL:
        return f"the server has no default model; choose one with -m or PORTWAY_MODEL: {names}"
    flags = [f"--{flag}" for flag, _ in tiers if flag]
    if not flags:
        return f"no tier {_spoken(model)}, nor any other; choose a model with -m: {names}"
    import difflib

    own = [name for name in (*SWITCHES, *VALUES) if name.startswith("--")]
    near = difflib.get_close_matches(_spoken(model), [*flags, *own], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"no tier {_spoken(model)}; there are {', '.join(flags)}{hint}"


def _tiers(address: Address, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each of the daemon's models: its flag ("" for none) and its name."""
    with _connect(address, environ) as exchange:
        exchange.send("GET", "/models", _headers(Options(), environ))
        body = _object(exchange.whole_body())
    if exchange.status != 200:
        raise Failure(_message(body))
    return [((card.get("portway") or {}).get("flag") or "", card.get("id") or "") for card in body.get("data") or ()]


# --- The last answer -------------------------------------------------------------------------


def last_answer_path(environ: Mapping[str, str]) -> str:
    """Where the last answer is kept for --last: a line that says how it was demoted, if it was, and the text."""
    state = environ.get("XDG_STATE_HOME", "")
    if not state.startswith("/"):
        state = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".local", "state")
    return os.path.join(state, "portway", "last-answer")


def _save_last(answer: Answer, environ: Mapping[str, str]) -> None:
    """In one step, so that two asks at once leave one of two answers. It is a convenience: if it can't
    be kept (a read-only home, a full disk), the answer that was shown is no less an answer.
    """
    path = last_answer_path(environ)
    fresh = f"{path}.{os.getpid()}"
    data = f"{answer.demotion}\n{answer.text}".encode("utf-8", "replace")
    try:
        try:
            descriptor = _create(fresh)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), 0o700)
            descriptor = _create(fresh)
        with open(descriptor, "wb", 0) as file:
            file.write(data)
        os.replace(fresh, path)
    except OSError:
        pass


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def _show_last(options: Options, environ: Mapping[str, str], terminal: Terminal) -> None:
    path = last_answer_path(environ)
    try:
        with open(path, "rb", 0) as file:
            demotion, _, text = file.read().decode("utf-8", "replace").partition("\n")
    except FileNotFoundError:
        raise Failure(f"there is no last answer yet ({path})") from None
    except OSError as exc:
        raise Failure(f"{path}: {exc.strerror}") from None
    if demotion:
        terminal.note(demotion)
    code = code_block(text) if options.extract else Code([text], closed=True)
    if code is None:
        raise Failure("no code block in the last answer")
    terminal.answer(code.text)
    terminal.finish_line()
