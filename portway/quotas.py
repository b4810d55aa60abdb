"""How much each key has used in the last minute, against what it may. In memory: a restart forgets it."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from portway.errors import ClientError
from portway.request import prompt_chars

if TYPE_CHECKING:
    from portway.answers import Found
    from portway.keys import Key

MINUTE = 60
CHARS_A_TOKEN = 4  # of running text, roughly


class Quotas:
    """Outlives reloads, so that one resets nobody's count. Any thread may call anything.

    The lock guards the table and each entry; nothing is waited for under it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._used: dict[bytes, _Used] = {}

    def adopt(self, keys: Iterable[Key]) -> None:
        """Go on with these keys; of one that is gone nothing is remembered."""
        present = {key.digest for key in keys}
        with self._lock:
            self._used = {digest: used for digest, used in self._used.items() if digest in present}

    def admit(self, key: Key) -> None:
        """Count a request. Raises ClientError 429, and counts nothing, if the key has used up its minute."""
        if key.rpm is None and key.tpm is None:
            return
        now = self._clock()
        with self._lock:
            used = self._used.setdefault(key.digest, _Used())
            wait_requests = 0.0 if key.rpm is None else used.requests.wait(key.rpm, now)
            wait_tokens = 0.0 if key.tpm is None else used.tokens.wait(key.tpm, now)
            if not (wait_requests or wait_tokens):
                used.requests.add(1, now)
                return
        if wait_requests >= wait_tokens:
            raise _used_up(f"{key.rpm} requests", wait_requests)
        raise _used_up(f"{key.tpm} tokens", wait_tokens)

    def spend(self, key: Key, tokens: int) -> None:
        """Count the tokens of an answer."""
        if key.tpm is not None and tokens > 0:
            with self._lock:
                self._used.setdefault(key.digest, _Used()).tokens.add(tokens, self._clock())


def spent(found: Found) -> int:
    """The tokens that a model's answer cost: as the backend counts them; where it did not, or the answer was left
    before its end, as many as its characters make. An answer out of the cache cost nothing."""
    if found.served is None:
        return 0
    call, tally = found.call, found.served.answer.tally
    prompt, completion = tally.prompt_tokens, tally.completion_tokens
    if prompt is None:
        prompt = (len(call.raw) if call.endpoint == "embeddings" else prompt_chars(call.body)) // CHARS_A_TOKEN
    if completion is None:
        completion = (tally.content_chars + tally.reasoning_chars) // CHARS_A_TOKEN
    return prompt + completion


class _Used:
    __slots__ = ("requests", "tokens")

    def __init__(self) -> None:
        self.requests = _Window()
        self.tokens = _Window()


class _Window:
    """What came within the last minute, by whole seconds, so that its size is bounded. An amount counts from its
    second's beginning until a minute after that second's end: never too short, a second too long at most."""

    __slots__ = ("_amounts", "_total")

    def __init__(self) -> None:
        self._amounts: deque[tuple[int, int]] = deque()  # (second, amount)
        self._total = 0

    def add(self, amount: int, now: float) -> None:
        self._forget(now)
        self._total += amount
        second = int(now)
        if self._amounts and self._amounts[-1][0] == second:
            amount += self._amounts.pop()[1]
        self._amounts.append((second, amount))

    def wait(self, limit: int, now: float) -> float:
        """Seconds until less than `limit` is counted; 0.0 = it is."""
        self._forget(now)
        left = self._total
        if left < limit:
            return 0.0
        for second, amount in self._amounts:
            left -= amount
            if left < limit:
                return second + MINUTE + 1 - now
        return MINUTE + 1.0

    def _forget(self, now: float) -> None:
        while self._amounts and self._amounts[0][0] + MINUTE + 1 <= now:
            self._total -= self._amounts.popleft()[1]


def _used_up(what: str, seconds: float) -> ClientError:
    wait = max(1, math.ceil(seconds))
    return ClientError(
        f"This key may use {what} a minute, and has. Try again in {wait} s.",
        status=429,
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(wait)},
    )
