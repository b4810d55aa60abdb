"""What makes Portway recover: each promise, the words of the source that keep it, and the tests that fail without them.

The same as guard_list.py for faults instead of attacks; scripts/guards.py takes these away as well.
"""

from __future__ import annotations

from scripts.guard_list import Guard

_MATRIX = ("tests.test_torture_faults.MatrixTest.test_half_of_it",)
_HEARTBEATS = ("tests.test_torture_faults.MatrixTest.test_with_heartbeats",)
_SHARED = "tests.test_shared.Leaving."
_TORTURE = "tests.test_torture_load.TortureTest."
_TOGETHER = "tests.test_loop.AnsweredTogether"
_HELD = "tests.test_held.Held."


def _in(file: str, words: str, others: str) -> tuple[tuple[str, str, str], ...]:
    return ((f"portway/{file}", words, others),)


_LIMITS = (
    Guard(
        "a connection is made within `connect`",
        _in("backends/transport.py", "limits.connect, limits.answer_by)", "8 + limits.connect, 60 + limits.answer_by)"),
        _MATRIX,
    ),
    Guard(
        "the first content comes within `first_token`",
        _in("backends/transport.py", "return min(self._started + limits.first_token, limits.answer_by)", "return 1e12"),
        _MATRIX,
    ),
    Guard(
        "content goes on within `idle`; a server's pings are none",
        _in(
            "backends/transport.py", "return min(self._heard + limits.idle, limits.deadline)", "return limits.deadline"
        ),
        _MATRIX,
    ),
    Guard(
        "an answer that never ends, ends with `total`",
        _in(
            "backends/transport.py",
            "return min(self._heard + limits.idle, limits.deadline)",
            "return self._heard + limits.idle",
        ),
        _MATRIX,
    ),
    Guard(
        "a plain answer leaves its fallbacks their share of the time",
        _in(
            "backends/transport.py",
            "        if self.plain:\n            return limits.answer_by",
            "        if self.plain:\n            return limits.deadline",
        ),
        _MATRIX,
    ),
    Guard(
        "a server that loads its model is waited for",
        _in("backends/openai.py", "if now >= load_until:", "if True:"),
        _MATRIX,
    ),
    Guard(
        "and no longer than `load`",
        _in("backends/openai.py", "if now >= load_until:", "if False:"),
        _MATRIX,
    ),
)

_ANSWERS = (
    Guard(
        "an answer that is cut off is none",
        _in("backends/transport.py", "if self._chunks is not None or self._left is not None:", "if False:"),
        _MATRIX,
    ),
    Guard(
        "what may have been worked on is not sent again",
        _in("backends/transport.py", "if self._reused and was_reset:", "if self._reused:"),
        _MATRIX,
    ),
    Guard(
        "an answer that broke closes its connection",
        _in(
            "backends/transport.py",
            "            self._connection.release(self.head)\n        else:\n            self._connection.close()",
            "            self._connection.release(self.head)\n        else:\n            LOST.append(self._connection)",
        )
        + _in("backends/transport.py", "RECEIVE = 65_536", "LOST: list[Any] = []\nRECEIVE = 65_536"),
        _MATRIX,
    ),
    Guard(
        "certificates are verified",
        _in("backends/transport.py", "ssl.create_default_context()", "ssl._create_unverified_context()"),
        _MATRIX,
    ),
    Guard(
        "an error inside a 200 is seen (openai)",
        _in("backends/openai.py", "    if error:\n        raise in_stream", "    if False:\n        raise in_stream"),
        _MATRIX,
    ),
    Guard(
        "an error inside a 200 is seen (ollama)",
        _in("wire/translate.py", 'if line.get("error") is not None:', "if False:"),
        _MATRIX,
    ),
    Guard(
        "half of a character is not relayed",
        _in("backends/openai.py", "if not (data.isascii() or _is_utf8(data)):", "if False:"),
        _MATRIX,
    ),
    Guard(
        "a stream without an end is broken",
        _in("backends/openai.py", "if self._relay.finished:", "if True:"),
        _MATRIX,
    ),
    Guard(
        "an overlong prompt is known by its words",
        _in("backends/failures.py", "if any(phrase in words for phrase in CONTEXT_PHRASES):", "if False:"),
        _MATRIX,
    ),
    Guard(
        "a refused chat template is known by its words",
        _in("backends/failures.py", "if any(phrase in words for phrase in _TEMPLATE_PHRASES):", "if False:"),
        _MATRIX,
    ),
    Guard(
        "a broken stream ends with an error event",
        _in("proxy.py", "await self._write(sse(dumps(envelope)), last=True)", 'await self._write(b"", last=True)'),
        _MATRIX,
    ),
    Guard(
        "and without [DONE]",
        _in(
            "proxy.py",
            "self._write(sse(dumps(envelope)), last=True)",
            "self._write(sse(dumps(envelope)) + DONE, last=True)",
        ),
        _MATRIX,
    ),
)

_CHAINS = (
    Guard(
        "a failed member is followed by the next",
        _in("errors.py", '"server_error": Failure("yes"', '"server_error": Failure("no"'),
        _MATRIX,
    ),
    Guard(
        "a bad request is not asked of others",
        _in("errors.py", '"bad_request": Failure("no"', '"bad_request": Failure("yes"'),
        _MATRIX,
    ),
    Guard(
        "Retry-After is passed on, and kept to",
        _in("backends/upstream.py", "return float(value) if value.isascii()", "return None if value.isascii()"),
        _MATRIX,
    ),
    Guard(
        "a refused key is not tried again at once",
        _in("routing.py", 'if cools == "long":', "if False:"),
        _MATRIX,
    ),
    Guard(
        "if all are skipped, one is tried all the same",
        _in("routing.py", "if cooling and not course.tried:", "if False:"),
        _MATRIX,
    ),
    Guard(
        "X-Served-By is who answered",
        _in("answers.py", "Facts(served.model.name, verdict,", "Facts(call.model.name, verdict,"),
        _MATRIX,
    ),
    Guard(
        "an error tells each attempt",
        _in("proxy.py", 'headers["X-Portway-Attempts"] = _joined(error.attempts)', "pass"),
        _MATRIX,
    ),
    Guard(
        "an exhausted chain is not to be retried",
        _in("routing.py", 'headers = {"x-should-retry": "false"}', "headers: dict[str, str] = {}"),
        _MATRIX,
    ),
    Guard(
        "another model's answer is not kept for the one that was asked",
        _in("cache/rules.py", "served.model.name == call.model.name", "True"),
        _MATRIX,
    ),
    Guard(
        "the log says who answered",
        _in("telemetry.py", "self.served_by = served.model.name", "self.served_by = self.model"),
        _MATRIX,
    ),
    Guard(
        "a place is given back after a failure",
        _in("memory/residency.py", "        if not self._holds:\n            self.leave()", "        pass"),
        _MATRIX,
    ),
    Guard(
        "a client that stops reading holds up nobody who waits for the same answer",
        _in("proxy.py", "self._leader = found.leader", "self._leader = None"),
        (f"{_SHARED}test_a_client_that_does_not_read_keeps_nobody_waiting",),
    ),
    Guard(
        "nor does one that had stopped before they came",
        _in("proxy.py", "        if self._is_writing:\n", "        if False:\n"),
        (f"{_SHARED}test_what_is_owed_is_paid_as_soon_as_it_is_taken",),
    ),
    Guard(
        "what it has not taken it gets as soon as it reads again",
        _in("proxy.py", "| (POLLOUT if self._owed else 0)", "| 0"),
        (f"{_SHARED}test_what_is_owed_is_paid_as_soon_as_it_is_taken",),
    ),
    Guard(
        "nothing follows an answer that is cut off",
        _in("proxy.py", "        if self._torn:\n", "        if False:\n"),
        (f"{_SHARED}test_nothing_follows_what_is_cut_off",),
    ),
    Guard(
        "who leaves while its answer is about to be sent has had one, and the daemon's end cuts off none of these",
        _in("proxy.py", "        if self.task.is_sending:\n            return\n", ""),
        (_TOGETHER,),
    ),
    Guard(
        "a mistake in one request leaves no other unanswered that was to be sent with it",
        _in(
            "loop.py",
            "        if self._held_back or self._sent:\n            self._send()",
            "        if False:\n            pass",
        ),
        ("tests.test_loop.SendingTogether.test_a_mistake_of_one",),
    ),
    Guard(
        "what was sent to a client that has gone is forgotten at once",
        _in("answers.py", "            del error  # see", "            pass  # see"),
        (f"{_SHARED}test_an_answer_ends_with_its_request",),
    ),
    Guard(
        "an answer that is too long to be shared keeps nobody waiting",
        _in("answers.py", "                    self.leader.part()", "                    pass"),
        ("tests.test_attacks_load.StalledLeaderTest",),
    ),
    Guard(
        "events before any content are held, but not without bound",
        _in("backends/openai.py", "if len(held) > MAX_HELD:", "if False:"),
        ("tests.test_backend_openai.AnswerTest.test_events_without_end_before_any_content",),
    ),
    Guard(
        "who waits hears heartbeats",
        _in("watch.py", "if self._beat is not None and now >= self._beat_at:", "if False:"),
        _HEARTBEATS,
    ),
)

_SHORTAGES = (
    Guard(
        "half a line that did not fit is taken back",
        (
            (
                "portway/telemetry.py",
                "            except OSError:\n                _mend(file, self._write)\n",
                "            except OSError:\n",
            ),
            ("portway/telemetry.py", "            _mend(file, self._write)\n            try:", "            try:"),
        ),
        (f"{_TORTURE}test_no_file_may_grow",),
    ),
    Guard(
        "what stderr refuses ends nobody",
        _in("stderr.py", "except OSError:", "except ZeroDivisionError:"),
        (f"{_TORTURE}test_no_file_may_grow",),
    ),
    Guard(
        "a connection whose request is on its way makes no room for others",
        _in("proxy.py", "if each.expires <= latest and each.is_silent), count", "), count"),
        (f"{_TORTURE}test_no_descriptors",),
    ),
    Guard(
        "a request that needs a thread that can't be is told so",
        _in(
            "workers.py",
            "if is_needed and not self._start() and self._withdraw():",
            "if is_needed and not self._start() and False:",
        ),
        (f"{_TORTURE}test_no_threads",),
    ),
    Guard(
        "a reload needs no thread",
        _in(
            "proxy.py",
            "except RuntimeError as exc:  # the system has none left",
            "except ZeroDivisionError as exc:  # the system has none left",
        ),
        (f"{_TORTURE}test_no_threads",),
    ),
    Guard(
        "a name that can't be looked up is a failed attempt",
        _in(
            "backends/transport.py",
            "            except RuntimeError as exc:\n                there.close()",
            "            except ZeroDivisionError as exc:\n                there.close()",
        ),
        (f"{_TORTURE}test_no_threads",),
    ),
    Guard(
        "no age is below nothing",
        _in("cache/store.py", "return max(0.0, time.time() - self.stored_at)", "return time.time() - self.stored_at"),
        (f"{_TORTURE}test_clock_jumps",),
    ),
    Guard(
        "uptime goes by a clock that nobody sets",
        _in("vitals.py", "round(time.monotonic() - self._started, 1)", "round(time.time() - self._started_at, 1)"),
        (f"{_TORTURE}test_clock_jumps",),
    ),
)

_ENDS = (
    Guard(
        "lines of the log are written at once",
        _in("telemetry.py", "GATHER = 0.05", "GATHER = 60"),
        (f"{_TORTURE}test_kill_9",),
    ),
    Guard(
        "SIGTERM waits for what is in flight",
        _in("proxy.py", "ended = self._server.in_flight.wait_for_none(seconds)", "ended = True"),
        (f"{_TORTURE}test_sigterm",),
    ),
    Guard(
        "a reload leaves requests alone",
        _in("proxy.py", "        old.close()\n", "        old.close()\n        self._server.cut()\n"),
        (f"{_TORTURE}test_reload",),
    ),
    Guard(
        "a connection that idles holds nothing of its last request",
        _in("proxy.py", "        del self._record  #", "        #"),
        (f"{_HELD}test_an_answer_without_a_log",),
    ),
    Guard(
        "a failed attempt leaves no garbage that holds the prompt",
        _in("routing.py", "            let_go(error)\n", ""),
        (f"{_HELD}test_an_error",),
    ),
    Guard(
        "nor does a stream that breaks",
        _in("proxy.py", "            let_go(exc)\n        except (ClientGone", "        except (ClientGone"),
        (f"{_HELD}test_a_stream_that_breaks",),
    ),
    Guard(
        "nor does a client that leaves",
        _in("proxy.py", "            let_go(exc)\n        except Exception", "        except Exception"),
        (f"{_HELD}test_a_client_that_leaves_a_shared_answer",),
    ),
)

RECOVERIES = (*_LIMITS, *_ANSWERS, *_CHAINS, *_SHORTAGES, *_ENDS)
