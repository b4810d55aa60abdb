"""The log: one JSON line per request, written beside the request path and never in its way.

A request fills a `Record` and hands it to `Log.record` when its answer is out, which makes the line and
puts it into a bounded queue; a thread appends what has gathered to the file, whole lines in one write.
Several processes may write the same file (`LogFile`). What the file refuses becomes `problem` and is
tried again; what does not fit the queue meanwhile is dropped and counted.

No line holds text of a prompt or an answer, a key or an error's message (servers quote prompts in
theirs). What the lines say all together is commands/stats.py's business. Nothing here knows HTTP or sockets.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import stat
import threading
import time
from binascii import hexlify
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from json.encoder import encode_basestring_ascii
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

from portway import stderr
from portway.call import MOST
from portway.wire.digest import digest, is_plain_chat

if TYPE_CHECKING:
    from portway.answers import Found
    from portway.call import Attempt, Call, Served
    from portway.errors import PortwayError

MAX_BYTES = 32 * 1024 * 1024  # of the file before it is rotated: some 50,000 lines
KEEP = 5  # rotated files; they compress to about a tenth
MAX_WAITING = 10_000  # records in the queue; a writer that is stuck for long costs lines, never memory
MAX_WAITING_BYTES = 32 * 1024 * 1024  # of their request bodies; beyond it a line goes without its prompt_hash
MAX_AT_ONCE = 16 * 1024  # bytes of body up to which the line is made at once; to hash more is the writer's work
MAX_BATCH = 512  # lines in one write
MAX_GATHERED = 4 * 1024 * 1024  # bytes of bodies for which it begins at once: they are memory that others could use
GATHER = 0.05  # seconds the writer lets lines gather: it wakes 20 times a second at most, however many there are
RETRY_AFTER = 1.0  # seconds until a file that refused is tried again; doubled up to ...
RETRY_AT_MOST = 30.0
MAX_LINE = 65_536  # bytes; no line of ours comes near it
LINE_START = b'{"ts":"'  # of every line of ours
MAX_NAME = 128  # characters of a text that comes from outside
CLIENT_CLOSED = 499  # nginx's status for a client that left before it had an answer


def log_path(environ: Mapping[str, str]) -> str:
    """Where the log is without a word in the configuration: ${XDG_DATA_HOME:-~/.local/share}/portway/log.jsonl."""
    base = environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):  # unset, empty or relative: to be ignored, says the XDG specification
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".local", "share")
    return os.path.join(base, "portway", "log.jsonl")


# --- What is known of a request --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Price:
    """What the reference model would have cost, in dollars for a million tokens."""

    input_per_m: float = 0.0
    output_per_m: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars."""
        return (prompt_tokens * self.input_per_m + completion_tokens * self.output_per_m) / 1_000_000


class Record:
    """One request, filled while it goes on. Whoever has given it to Log.record leaves it alone.

    ts: time.time() when it came. started, first, ended: time.monotonic() when it came, when its first
    content was sent, when it was over. waited: seconds spent waiting for others, None = not measured.
    cache_hit: None = the cache was not asked. error: a code, never a message. cancelled_in: what the client
    left in: a phase (call.PHASES), "request" if it had not sent all of it, "stalled" if it did not read.
    host: the backend's, of several one that is not local; "" = not known. exit_code: None = made from the
    status. key: what the client's key is called. body: the request as parsed, for its prompt's hash and size.
    document: an answer out of the cache, whose sizes the writer takes from it. size: bytes of both.

    What is not said of a request is the class's: to give each its own 30 values costs more than to read these.
    """

    ts: float
    started: float
    client: str = ""
    endpoint: str = ""
    key: str = ""
    id: str = ""
    model: str = ""
    stream: bool = False
    body: Mapping[str, Any] | None = None
    size: int = 0
    served_by: str = ""
    host: str = ""
    cache_hit: bool | None = None
    status: int = 0
    error: str = ""
    attempts: Sequence[Attempt] = ()
    queue_s: float | None = None
    load_s: float | None = None
    decode_s: float | None = None
    first: float | None = None
    ended: float = 0.0
    waited: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    response_chars: int = 0
    truncated: bool = False
    cancelled_in: str | None = None
    exit_code: int | None = None
    document: bytes = b""

    def __init__(self, ts: float, started: float, client: str = "", endpoint: str = "", **known: Any) -> None:
        self.ts = ts
        self.started = started
        self.client = client
        self.endpoint = endpoint
        for name, value in known.items():
            getattr(self, name)  # AttributeError: there is no such thing
            setattr(self, name, value)

    def begin(self, call: Call) -> None:
        """It is a request to a model."""
        self.model = call.model.name
        self.endpoint = call.endpoint
        self.id = call.id
        self.stream = call.stream
        self.body = call.body
        self.size = len(call.raw)

    def served(self, served: Served, first: float | None) -> None:
        """A target has answered, or has begun to; `first` as above."""
        tally = served.answer.tally
        self.served_by = served.model.name
        self.host = _outermost(served.hosts)
        self.attempts = served.attempts
        self.first = first
        self.queue_s = served.queued
        self.load_s = tally.load_s
        self.decode_s = tally.decode_s
        self.prompt_tokens = tally.prompt_tokens
        self.completion_tokens = tally.completion_tokens
        self.response_chars = tally.content_chars
        self.truncated = tally.truncated

    def found(self, found: Found, first: float | None) -> None:
        """There was an answer, of a target or of the cache; `first` as above."""
        self.cache_hit = {"HIT": True, "MISS": False}.get(found.facts.cache)
        if found.served is not None:
            self.served(found.served, first)
            return
        self.served_by = found.facts.served_by
        self.attempts = found.attempts
        self.first = first
        self.document = found.document
        self.size += len(found.document)

    def failed(self, error: PortwayError) -> None:
        """It ends with an error, which knows of the attempts if there were any."""
        self.error = error.code or error.type
        self.attempts = getattr(error, "attempts", None) or self.attempts

    def finish(self, ended: float, waited: float | None = None) -> None:
        """It is over; what is derived below is right from now on."""
        self.ended = ended
        self.waited = waited
        if not self.status and self.cancelled_in:
            self.status = CLIENT_CLOSED

    @property
    def latency(self) -> float:
        """Seconds from its coming to its end."""
        return max(0.0, self.ended - self.started)

    @property
    def ttft(self) -> float | None:
        """Seconds to the first content; None for an answer that came in one piece."""
        return None if self.first is None else max(0.0, self.first - self.started)

    @property
    def overhead(self) -> float | None:
        """Seconds that were Portway's own."""
        return None if self.waited is None else max(0.0, self.latency - self.waited)

    @property
    def demoted(self) -> bool:
        """Whether another model answered than was asked for."""
        return bool(self.served_by) and self.served_by != self.model

    @property
    def outcome(self) -> int:
        """What stands in the log as exit_code."""
        return self.failure if self.exit_code is None else self.exit_code

    @property
    def failure(self) -> int:
        """0 = answered, else the class of the status: 4 = the request or its client, 5 = the servers.

        A stream that has begun keeps its 200, whatever then becomes of it.
        """
        return failure_of(self.cancelled_in, self.status, self.error)

    @property
    def decode_tps(self) -> float | None:
        """Tokens a second: by the backend's own clock, else from the first content to the last."""
        tokens = self.completion_tokens
        if not tokens or self.cache_hit:
            return None
        if self.decode_s:
            return tokens / self.decode_s
        seconds = 0.0 if self.first is None else self.ended - self.first
        return (tokens - 1) / seconds if tokens > 1 and seconds > 0.001 else None


def failure_of(cancelled_in: str | None, status: int, error: str) -> int:
    """See Record.failure."""
    if cancelled_in:
        return 4
    if status >= 400:
        return status // 100
    return 5 if error or not status else 0


def _outermost(hosts: Sequence[str]) -> str:
    """The one that is farthest away, as far as is known."""
    if len(hosts) > 1:
        return next((each for each in hosts if not is_local(each)), hosts[0])
    return hosts[0] if hosts else ""


# A request's names, most of which are those of the last one, and its numbers: each fetched by one call.
_NAMES = attrgetter(
    "client",
    "key",
    "endpoint",
    "model",
    "served_by",
    "host",
    "stream",
    "status",
    "exit_code",
    "error",
    "cache_hit",
    "truncated",
    "cancelled_in",
)
_NUMBERS = attrgetter(
    "response_chars", "prompt_tokens", "completion_tokens", "started", "first", "ended", "waited", "queue_s", "load_s"
)
_Names = tuple[str, str, str, str, str, str, bool, int, int | None, str, bool | None, bool, str | None]


def line(record: Record, price: Price) -> bytes:
    """A record's line in the log, with its line end: JSON in ASCII, each key always there. `ts` leads, so
    that lines sort by time as text.

    What is named stands in a form that is made once for requests alike; the numbers are put in. Field by
    field it takes twice as many instructions, and with json.dumps() six times.
    """
    prompt_hash, prompt_chars = _digest(record.body)
    if record.document:
        _measure(record)
    chars, prompt, completion, started, first, ended, waited, queue_s, load_s = _NUMBERS(record)
    latency = ended - started
    ttft = None if first is None else first - started
    overhead = None if waited is None else max(0.0, latency - waited) * 1000.0
    tps, load_s = _finite(record.decode_tps), _finite(load_s)
    attempts = record.attempts
    tried: tuple[str, str] | None = None
    seconds: float | bytes
    if len(attempts) == 1:
        (attempt,) = attempts
        tried, seconds = (attempt.model, attempt.reason), attempt.seconds
    else:
        seconds = ",".join(map(_attempt, attempts)).encode()
    names = _NAMES(record)
    numbers = (prompt_chars, chars, prompt, completion, latency, queue_s, load_s, ttft, tps, overhead)
    make = _form if len(record.client) + len(record.endpoint) + len(record.error) < 3 * MAX_NAME else _new_form
    form, is_saved = make(names, tried, tuple(map(type, numbers)))
    saved = price.of(prompt or 0, completion or 0) if is_saved else 0.0
    return form % (*_instant(record.ts), _text(record.id).encode(), seconds, prompt_hash, *numbers, saved)


def _new_form(names: _Names, tried: tuple[str, str] | None, kinds: tuple[type, ...]) -> tuple[bytes, bool]:
    """The line with a place for each number of these kinds, and whether the answer saved what it would have cost.
    tried: the only attempt's model and reason; None = there were none or several."""
    client, key, endpoint, model, served_by, host = names[:6]
    stream, status, exit_code, error, cache_hit, truncated, cancelled_in = names[6:]
    failure = failure_of(cancelled_in, status, error)
    prompt_chars, chars, prompt, completion, latency, queue_s, load_s, ttft, tps, overhead = map(_place, kinds)
    local = is_local(host) if host else None
    is_known = kinds[2] is int or kinds[3] is int  # the tokens
    attempt = f'{{"model":{_part(tried[0])},"reason":{_part(tried[1])},"seconds":%.6g}}' if tried else "%b"
    text = (
        f'{{"ts":"%b.%03dZ","id":%b,"client":{_part(client)},"key":{_part(key)},"endpoint":{_part(endpoint)}'
        f',"model":{_part(model)},"served_by":{_part(served_by)},"local":{_WORDS[local]},"stream":{_WORDS[stream]}'
        f',"status":{status},"exit_code":{failure if exit_code is None else exit_code},"error":{_part(error)}'
        f',"cache_hit":{_WORDS[cache_hit]},"demoted":{_WORDS[bool(served_by) and served_by != model]}'
        f',"attempts":[{attempt}],"prompt_hash":%b,"prompt_chars":{prompt_chars},"response_chars":{chars}'
        f',"prompt_tokens":{prompt},"completion_tokens":{completion},"truncated":{_WORDS[truncated]}'
        f',"cancelled_in":{_part(cancelled_in)},"latency_s":{latency},"queue_s":{queue_s},"load_s":{load_s}'
        f',"ttft_s":{ttft},"decode_tps":{tps},"overhead_ms":{overhead}'
        f',"saved_usd":{"%.6g" if is_known else _NOTHING}}}\n'
    )
    return text.encode("ascii"), is_known and not failure and bool(cache_hit or local)


_form = lru_cache(maxsize=256)(_new_form)


_NOTHING = "null%.0a"  # whatever is put there, it says null


def _place(kind: type) -> str:
    """Where a number of that kind is put: six digits that count, integers whole."""
    return {int: "%d", float: "%.6g"}.get(kind, _NOTHING)


def _part(text: str | None) -> str:
    """_text, within a form."""
    return _text(text).replace("%", "%%")


def _finite(value: float | None) -> float | None:
    """Infinity and NaN, which a server may have sent, are no JSON."""
    return value if value is not None and math.isfinite(value) else None


def _measure(record: Record) -> None:
    """Take the sizes of a stored answer, as its first asker's line had them."""
    document = json.loads(record.document)
    usage = document.get("usage") or {}
    record.prompt_tokens, record.completion_tokens = map(_count, map(usage.get, ("prompt_tokens", "completion_tokens")))
    for choice in document.get("choices") or ():
        record.response_chars += len(choice.get("message", {}).get("content") or choice.get("text") or "")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < MOST else None  # a server may have sent anything


def iso_time(ts: float) -> str:
    """time.time() as 2026-11-21T04:29:15.123Z."""
    return (b"%b.%03dZ" % _instant(ts)).decode()


def _instant(ts: float) -> tuple[bytes, int]:
    """Its second, and the milliseconds behind that."""
    seconds, milliseconds = divmod(int(ts * 1000), 1000)
    return _iso_second(seconds), milliseconds


@lru_cache(maxsize=16)  # the lines of one moment come together
def _iso_second(seconds: int) -> bytes:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode()


@lru_cache(maxsize=256)
def is_local(host: str) -> bool:
    """Whether a backend's host is one's own: this machine, or one in a private network. Nobody is asked."""
    import ipaddress  # as long to import as half of the rest

    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return "." not in host or host.lower().endswith((".localhost", ".local", ".lan", ".internal", ".home.arpa"))
    return address.is_private or address in ipaddress.ip_network("100.64.0.0/10")  # Tailscale's, and carriers'


_WORDS = {None: "null", False: "false", True: "true"}


def _text(text: str | None) -> str:
    """A JSON string, everything beyond printable ASCII escaped; null for none."""
    return encode_basestring_ascii(text[:MAX_NAME]) if text else "null"


def _attempt(attempt: Attempt) -> str:
    return f'{{"model":{_text(attempt.model)},"reason":{_text(attempt.reason)},"seconds":{attempt.seconds:.6g}}}'


def _digest(body: Mapping[str, Any] | None) -> tuple[bytes, int | None]:
    """The prompt's hash, 16 hexadecimal digits in quotation marks, and its characters.

    Only the prompt: the same question asked with other options, or of another model, has the same hash.
    """
    if body is None:
        return b"null", None
    messages = body.get("messages")
    if _OTHER_PROMPTS.isdisjoint(body) and is_plain_chat(messages):
        try:
            text = "\0".join((*chain.from_iterable(map(dict.values, messages)), ""))
            return b'"%b"' % hexlify(digest((text,))[:8]), sum(map(len, map(_CONTENT, messages)))
        except TypeError:
            pass  # something else than a text
    texts: list[str] = []
    chars = sum([_read(key, body[key], texts) for key in _PROMPT_KEYS if key in body])
    return b'"%b"' % hexlify(digest(texts)[:8]), chars


_PROMPT_KEYS = ("messages", "prompt", "suffix", "input")
_OTHER_PROMPTS = frozenset(_PROMPT_KEYS[1:])
_TEXT_KEYS = frozenset(("content", "text", "prompt", "suffix", "input"))  # beside roles, types and images
_CONTENT = itemgetter("content")


def _read(key: str, value: Any, texts: list[str]) -> int:
    """Add every text in `value`, which stands under `key`, in the order sent, and a mark behind each; numbers are
    token ids. Returns the characters of those that are text to a model."""
    kind = type(value)
    if kind is str:
        texts += (value, "\0")
        return len(value) if key in _TEXT_KEYS else 0
    if kind is list:
        return sum([_read(key, item, texts) for item in value])
    if kind is dict:
        return sum([_read(name, item, texts) for name, item in value.items()])
    if value is not None:
        texts += (repr(value), "\0")
    return 0


# --- The queue and its thread ----------------------------------------------------------------


class Log:
    """Appends records to a file. Make one, `close` it at the end; any thread may call the rest.

    path: the file. max_bytes, keep: see LogFile. price: for saved_usd; may be replaced at any time.
    say: told once of each problem, and of its end; default a line on stderr. retry_after: seconds.
    write: os.write, for tests.
    """

    def __init__(
        self,
        path: str,
        *,
        max_bytes: int = MAX_BYTES,
        keep: int = KEEP,
        price: Price | None = None,
        say: Callable[[str], None] | None = None,
        retry_after: float = RETRY_AFTER,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        self.price = price or Price()
        self._say = say or stderr.say
        self._retry_after = retry_after
        self._lock = threading.Lock()  # guards everything down to the blank line
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Record | bytes] = deque()
        self._bytes = 0  # of the bodies that wait
        self._dropped = 0
        self._closing = False
        self._idle = False  # the writer waits for a line, and has to be told of one

        self._file = LogFile(os.path.abspath(path), max_bytes, keep, write)  # this and the rest are the writer's
        self._written = 0
        self._problem: str | None = None
        self._said = ""  # the problem that was said last
        self._dropped_before = 0  # lines that were lost when things last went well
        self._writer = threading.Thread(target=self._run, name="portway-log", daemon=True)
        self._writer.start()

    @property
    def path(self) -> str:
        """The file's, absolute."""
        return self._file.path

    @property
    def written(self) -> int:
        """Lines that are in the file."""
        return self._written

    @property
    def dropped(self) -> int:
        """Lines that are lost: the queue was full, or the log closed with a file that refused them."""
        return self._dropped

    @property
    def problem(self) -> str | None:
        """Why the file can't be written now, in words; None = it can, as far as is known."""
        return self._problem

    def limit(self, max_bytes: int, keep: int) -> None:
        """Rotate by other numbers from the next write on: see LogFile."""
        self._file.max_bytes, self._file.keep = max_bytes, keep  # two numbers, which the writer only reads

    def record(self, record: Record) -> None:
        """Take a finished record. Never waits for the file and never fails for its sake.

        To make the line takes 6 us; to have the writer make it took the loop 10, since each time the writer took
        the interpreter from it and the loop had to get it back.
        """
        full = len(self._waiting) >= MAX_WAITING or self._closing
        made = self._line(record) if not full and record.size <= MAX_AT_ONCE else None
        with self._lock:
            if full or self._closing:
                self._dropped += 1
                return
            if made is None:
                self._bound(record)
            self._waiting.append(record if made is None else made)
            if self._idle or self._bytes > MAX_GATHERED:
                self._idle = False
                self._changed.notify()

    def close(self, timeout: float) -> bool:
        """Write what waits, for at most `timeout` seconds. False if that was too short."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._writer.join(timeout)
        return not self._writer.is_alive()

    def _bound(self, record: Record) -> None:
        """Let go of its body if too many wait. Called under the lock."""
        if self._bytes + record.size > MAX_WAITING_BYTES:
            record.body, record.document, record.size = None, b"", 0
        self._bytes += record.size

    # the writer's thread

    def _run(self) -> None:
        while waiting := self._take():
            lines = [each if isinstance(each, bytes) else self._line(each) for each in waiting]
            delay = self._retry_after
            while lines := lines[self._append(lines) :]:
                if self._problem and self._pause(delay):
                    self._lose(len(lines))
                    break
                delay = min(2 * delay, RETRY_AT_MOST)
        self._file.close()

    def _take(self) -> list[Record | bytes]:
        """What to write next; empty once the log is closed and nothing waits."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._idle = True
                self._changed.wait()
            self._idle = False
            self._changed.wait_for(self._is_urgent, GATHER)
            count = min(len(self._waiting), MAX_BATCH)
            taken = [self._waiting.popleft() for _ in range(count)]
            self._bytes -= sum([each.size for each in taken if not isinstance(each, bytes)])
        return taken

    def _is_urgent(self) -> bool:
        return self._closing or len(self._waiting) >= MAX_BATCH or self._bytes > MAX_GATHERED

    def _pause(self, seconds: float) -> bool:
        """Wait, unless the log is being closed. Returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closing, seconds)

    def _line(self, record: Record) -> bytes:
        made = line(record, self.price)
        record.body, record.document = None, b""  # the daemon may still hold the record; no text is kept
        return made

    def _append(self, lines: Sequence[bytes]) -> int:
        """How many of the lines are now in the file."""
        try:
            count = self._file.append(lines)
        except OSError as exc:
            self._file.close()
            self._complain("can't be written", exc)
            return 0
        self._written += count
        if self._file.trouble is not None:
            self._complain("can't be rotated, and grows", self._file.trouble)
        else:
            self._rejoice()
        return count

    def _complain(self, what: str, exc: OSError) -> None:
        self._problem = f"the log {what}: {self._file.path}: {exc.strerror or exc}"
        if self._problem != self._said:
            self._said = self._problem
            self._say(self._problem)

    def _rejoice(self) -> None:
        if self._problem is not None:
            lost = self._dropped - self._dropped_before
            self._say(f"the log works again; {lost} lines were lost")
        self._problem, self._said, self._dropped_before = None, "", self._dropped

    def _lose(self, count: int) -> None:
        """Give up: what is in hand, and what still waits."""
        with self._changed:
            self._dropped += count + len(self._waiting)
            self._waiting.clear()


# --- The file --------------------------------------------------------------------------------


class LogFile:
    """A file of whole lines that several processes append to. One thread owns each LogFile.

    Rotation: a file that would grow beyond `max_bytes` becomes PATH.1.gz, PATH.1.gz becomes PATH.2.gz
    and so on, up to `keep`. Two locks make that safe between processes, both of flock(2), so that the
    kernel frees them whoever dies. The log's own is held while lines are appended and while the file is
    renamed: who gets it looks whether the file is still the one at PATH. PATH.lock is held for all of a
    rotation, with compressing; who doesn't get that one appends to the file as it is.

    trouble: why the last rotation failed though lines can be written; None = it did not.
    """

    def __init__(
        self, path: str, max_bytes: int = MAX_BYTES, keep: int = KEEP, write: Callable[[int, bytes], int] = os.write
    ) -> None:
        self.path = path
        self.trouble: OSError | None = None
        self.max_bytes = max_bytes
        self.keep = keep
        self._write = write
        self._file: int | None = None

    def append(self, lines: Sequence[bytes]) -> int:
        """Write lines, each with its line end, in one piece. Returns how many of them are in the file: a disk
        that becomes full may take the first few. Raises OSError if it takes none."""
        data = b"".join(lines)
        self._rotate_for(len(data))
        done = 0
        with self._held() as file:
            _mend(file, self._write)
            try:
                while done < len(data):
                    done += self._write(file, data[done:])
            except OSError:
                _mend(file, self._write)
                if not data.count(b"\n", 0, done):
                    raise
        return data.count(b"\n", 0, done)

    def close(self) -> None:
        """Let go of the file; the next append opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @contextmanager
    def _held(self) -> Iterator[int]:
        """The file that is at `path` now, which nobody else writes or renames meanwhile."""
        while True:
            if self._file is None:
                self._file = _open(self.path)
            _lock(self._file, fcntl.LOCK_EX)
            if _is_at(self._file, self.path):
                break
            self.close()  # it was rotated or removed
        try:
            yield self._file
        finally:
            _lock(self._file, fcntl.LOCK_UN)

    def _rotate_for(self, room: int) -> None:
        """Make a new file if the present one has too little room. A failure is kept as `trouble`."""
        try:
            if self._is_full(os.stat(self.path).st_size, room):
                self._rotate(room)
            self.trouble = None
        except FileNotFoundError:
            self.trouble = None
        except OSError as exc:
            self.trouble = exc

    def _is_full(self, size: int, room: int) -> bool:
        return size > 0 and size + room > self.max_bytes

    def _rotate(self, room: int) -> None:
        lock = _open_private(f"{self.path}.lock", os.O_RDWR | os.O_CREAT)
        try:
            if _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._rotate_alone(room)
        finally:
            os.close(lock)

    def _rotate_alone(self, room: int) -> None:
        for old in old_files(self.path):
            _compress(old)  # whoever rotated before us was killed, or had no room for it
        with self._held() as file:
            if not self._is_full(os.fstat(file).st_size, room):
                return  # somebody else was quicker
            _shift(self.path, self.keep)
        self.close()
        if self.keep:
            _compress(f"{self.path}.1")


def old_files(path: str) -> list[str]:
    """The rotated files of the log at `path`, the oldest first. One that is being compressed counts once."""
    folder, name = os.path.split(path)
    form = re.compile(re.escape(name) + r"\.([1-9][0-9]{0,5})(\.gz)?")
    found: dict[int, str] = {}
    for entry in sorted(os.listdir(folder or ".")):  # .gz comes after the plain one and takes its place
        if match := form.fullmatch(entry):
            found[int(match[1])] = os.path.join(folder, entry)
    return [found[number] for number in sorted(found, reverse=True)]


@contextmanager
def undisturbed(path: str) -> Iterator[None]:
    """No file of the log at `path` is renamed or compressed meanwhile; lines still come. For who reads them all."""
    try:
        lock = _open_private(f"{path}.lock", os.O_RDWR | os.O_CREAT)
    except OSError:  # somebody else's log, which may only be read
        yield
        return
    try:
        _lock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


def _open(path: str) -> int:
    """The log, made if need be, for its owner's eyes only whatever the umask. Raises OSError."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        os.makedirs(folder, 0o700, exist_ok=True)
        os.chmod(folder, 0o700)  # one that was there may be shared with others on purpose, and stays as it is
    return _open_private(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)


def _open_private(path: str, flags: int) -> int:
    file = os.open(path, flags | os.O_CLOEXEC, 0o600)
    status = os.fstat(file)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if stat.S_IMODE(status.st_mode) != 0o600:
            os.fchmod(file, 0o600)
    except OSError:
        os.close(file)
        raise
    return file


def _lock(file: int, operation: int) -> bool:
    """flock(); False if somebody else has the lock. A file system without locks (some NFS) has one writer."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def _is_at(file: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), there)


def _mend(file: int, write: Callable[[int, bytes], int]) -> None:
    """Take away the half line at the end that a full disk or a killed writer left. The file is held."""
    end = os.fstat(file).st_size
    if not end or os.pread(file, 1, end - 1) == b"\n":
        return
    start = max(0, end - MAX_LINE)
    tail = os.pread(file, end - start, start)
    cut = tail.rfind(b"\n") + 1
    if tail.startswith(LINE_START, cut) or LINE_START.startswith(tail[cut:]):
        os.ftruncate(file, start + cut)
    else:
        write(file, b"\n")  # not a line of ours: not ours to take away


def _shift(path: str, keep: int) -> None:
    """Every file of the log becomes one older; those beyond `keep` go. The log is held."""
    for old in old_files(path):
        number, dot, suffix = old[len(path) + 1 :].partition(".")
        if int(number) >= keep:
            os.unlink(old)
        else:
            os.rename(old, f"{path}.{int(number) + 1}{dot}{suffix}")
    if keep:
        os.rename(path, f"{path}.1")
    else:
        os.unlink(path)


def _compress(path: str) -> None:
    """Replace PATH by PATH.gz. Whenever it is cut short, one of them is whole; raises OSError."""
    if path.endswith(".gz"):
        return
    import gzip  # seldom needed

    target = f"{path}.gz.new"
    file = _open_private(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with open(file, "wb") as raw, gzip.GzipFile("", "wb", 3, raw) as packed, open(path, "rb") as source:
            while block := source.read(1 << 20):
                packed.write(block)
    except OSError:
        os.unlink(target)  # a full disk needs the room
        raise
    os.rename(target, f"{path}.gz")
    os.unlink(path)
