"""What a request's answer and its line in the log must be, and what is wrong with them if they are not.

Everything here is a pure function from what was seen to complaints: an empty list = nothing is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.torture_rows.client import Reply
from scripts.torture_rows.speech import COMPLETION_TOKENS, FILLING, PROMPT_TOKENS

SLACK = 10.0  # seconds that an answer may take of which nothing is to be waited for: the machine may be busy
LATE = 5.0  # seconds by which a limit may be overrun, likewise
EARLY = 0.05  # seconds by which it may be undercut


@dataclass(frozen=True, slots=True)
class Expected:
    """What must come of one request.

    served_by: the logical model that answers, "" = nobody. text: the right answer. attempts: (model, reason) of each,
    in order. code: of the error, "" = none. status: HTTP's. begun: the error is a stream's last event, and what came
    before it is a beginning of `text`. hit: out of the cache; None = the cache was not asked. body: the error's very
    bytes. least, most: seconds until the answer's end.
    """

    model: str
    stream: bool
    served_by: str = ""
    text: str = ""
    attempts: Sequence[tuple[str, str]] = ()
    code: str = ""
    status: int = 200
    begun: bool = False
    hit: bool | None = False
    retry_after: bool = False
    body: bytes | None = None
    never_says: str = ""
    least: float = 0.0
    most: float = SLACK
    beats: bool = False

    @property
    def is_right(self) -> bool:
        """Whether a whole answer is due."""
        return bool(self.served_by) and not self.begun

    @property
    def told_attempts(self) -> Sequence[tuple[str, str]]:
        """Those that the client hears of: more than one, or any that led to nothing."""
        return self.attempts if len(self.attempts) > 1 or not self.served_by else ()


# --- the answer -------------------------------------------------------------------------------------


def judge(reply: Reply, expected: Expected) -> list[str]:
    """What is wrong with an answer."""
    late = [] if reply.last <= expected.most else [f"it took {reply.last:.2f} s, not {expected.most:.2f} s at most"]
    early = [] if reply.last >= expected.least else [f"it took {reply.last:.2f} s, though {expected.least:g} s are due"]
    still = ["no heartbeat came"] if expected.beats and not reply.comments else []
    wrong = late + early + still + _wrong_facts(reply, expected)
    if expected.is_right:
        return wrong + _wrong_answer(reply, expected)
    if expected.begun:
        return wrong + _wrong_break(reply, expected)
    return wrong + _wrong_error(reply, expected)


def _wrong_facts(reply: Reply, expected: Expected) -> list[str]:
    """X-Served-By, X-Portway-Attempts, X-Cache, wherever they stand."""
    verdict = None if not expected.served_by else {True: "HIT", False: "MISS", None: "BYPASS"}[expected.hit]
    wrong = _differs("X-Served-By", reply.told("x-served-by", "served_by"), expected.served_by or None)
    wrong += _differs("X-Cache", reply.told("x-cache", "cache"), verdict)
    told = read_attempts(reply.told("x-portway-attempts", "attempts") or "")
    return wrong + _differs("X-Portway-Attempts", told, list(expected.told_attempts))


def _wrong_answer(reply: Reply, expected: Expected) -> list[str]:
    wrong = _differs("status", reply.status, 200) + _differs("form", reply.is_stream, expected.stream)
    if wrong:
        return [*wrong, f"body {reply.body[:300]!r}"]
    wrong += _differs("errors", reply.errors, [])
    wrong += _differs("text", reply.text, expected.text)
    if expected.stream:
        wrong += _differs("[DONE] at its end", reply.is_done, True)
        wrong += _wrong_chunks(reply.chunks, expected)
    else:
        wrong += _differs("model", reply.json.get("model"), expected.served_by)
        wrong += _differs("finish_reason", reply.json["choices"][0].get("finish_reason"), "stop")
    return wrong


def _wrong_chunks(chunks: Sequence[Mapping[str, Any]], expected: Expected) -> list[str]:
    wrong = _differs("models", {chunk.get("model") for chunk in chunks}, {expected.served_by})
    wrong += _differs("number of ids", len({chunk.get("id") for chunk in chunks}), 1)
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    return wrong if expected.begun else wrong + _differs("finish_reasons", reasons, ["stop"])


def _wrong_break(reply: Reply, expected: Expected) -> list[str]:
    """A stream that breaks: a beginning of the right text, then one error, and no [DONE]."""
    wrong = _differs("status", reply.status, 200) + _differs("form", reply.is_stream, True)
    if wrong:
        return [*wrong, f"body {reply.body[:300]!r}"]
    wrong += _differs("[DONE]", "[DONE]" in reply.events, False)
    begin = re.sub(rf"(?:{FILLING})+$", "", reply.text)
    if not begin or not expected.text.startswith(begin):
        wrong.append(f"text {reply.text!r} is no beginning of {expected.text!r}")
    return wrong + _wrong_chunks(reply.chunks, expected) + _wrong_envelopes(reply, expected)


def _wrong_error(reply: Reply, expected: Expected) -> list[str]:
    """One clear error: with its status, or, where heartbeats had begun a stream, as its only event."""
    wrong = []
    if reply.is_stream and reply.comments and expected.stream:
        wrong += _differs("chunks", reply.chunks, [])
        wrong += _differs("[DONE]", "[DONE]" in reply.events, False)
    else:
        wrong += _differs("status", reply.status, expected.status)
        wrong += _differs("Content-Type", reply.headers.get("content-type"), "application/json")
        wrong += _differs("x-should-retry", reply.headers.get("x-should-retry"), "false")
        wrong += _differs("Retry-After there", "retry-after" in reply.headers, expected.retry_after)
    if expected.body is not None and not reply.is_stream:
        return wrong + _differs("body", reply.body, expected.body)
    return wrong + _wrong_envelopes(reply, expected)


def _wrong_envelopes(reply: Reply, expected: Expected) -> list[str]:
    if len(reply.errors) != 1:
        return [f"{len(reply.errors)} errors: {reply.body[-300:]!r}"]
    error = reply.errors[0]
    wrong = _differs("envelope", sorted(error), ["code", "message", "param", "type"])
    wrong += _differs("code", error.get("code"), expected.code)
    wrong += [] if error.get("type") and error.get("message") else [f"says nothing: {error}"]
    if expected.never_says and expected.never_says in error.get("message", ""):
        wrong.append(f"says {error['message']!r}")
    return wrong


def read_attempts(told: str) -> list[tuple[str, str]]:
    """(model, reason) of each attempt in X-Portway-Attempts."""
    return [(name, reason) for name, reason in re.findall(r"(?:^|; )([^=;]+)=([a-z_]+)(?:\([^;]*\))?", told)]


# --- the log line -----------------------------------------------------------------------------------


def judge_line(line: Mapping[str, Any], expected: Expected) -> list[str]:
    """What is wrong with a request's line in the log."""
    begun = expected.begun or (expected.stream and line.get("status") == 200)
    served = bool(expected.served_by)
    wanted: dict[str, Any] = {
        "endpoint": "chat",
        "model": expected.model,
        "stream": expected.stream,
        "served_by": expected.served_by or None,
        "demoted": served and expected.served_by != expected.model,
        "status": 200 if begun else expected.status,
        "exit_code": 0 if expected.is_right else 5 if begun else expected.status // 100,
        "error": expected.code or None,
        "cancelled_in": None,
        "truncated": False,
        "attempts": list(expected.attempts),
        "cache_hit": expected.hit if served else None,
    }
    if expected.is_right:
        wanted |= {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
        wanted["response_chars"] = len(expected.text)
    seen = dict(line, attempts=[(attempt["model"], attempt["reason"]) for attempt in line.get("attempts", ())])
    return [complaint for key, value in wanted.items() for complaint in _differs(f"log: {key}", seen.get(key), value)]


def judge_lines(lines: Iterable[Mapping[str, Any]], expected: Mapping[str, Expected]) -> dict[str, list[str]]:
    """Complaints by client, where there are any: each of `expected` has one line, as its client names itself."""
    seen: dict[str, list[Mapping[str, Any]]] = {client: [] for client in expected}
    for line in lines:
        if line.get("client") in seen:
            seen[line["client"]].append(line)
    wrong = {
        client: judge_line(found[0], expected[client]) if len(found) == 1 else [f"log: {len(found)} lines"]
        for client, found in seen.items()
    }
    return {client: complaints for client, complaints in wrong.items() if complaints}


def _differs(what: str, seen: object, wanted: object) -> list[str]:
    return [] if seen == wanted else [f"{what}: {seen!r}, not {wanted!r}"]
