"""The guards: what each promises, the words of the source that are it, and the tests that fail without it."""

from __future__ import annotations

from typing import NamedTuple


class Guard(NamedTuple):
    """edits: (file, its words, what they are replaced by to take the guard away)."""

    promise: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


_WEB = "tests.test_attacks_web.WebTest."
_FRAMING = "tests.test_attacks_framing.FramingTest.test_framing"
_LOAD = "tests.test_attacks_load."
_JSON = f"{_LOAD}LoadTest.test_hostile_json"
_UPSTREAM = "tests.test_attacks_upstream."
_KEYS = "tests.test_attacks_keys."


def _in(file: str, words: str, others: str) -> tuple[tuple[str, str, str], ...]:
    return ((f"portway/{file}", words, others),)


_BROWSERS = (
    Guard(
        "a foreign Host is refused",
        _in("guards.py", 'if not self._is_own_host(headers.get("host", "")):', "if False:"),
        (f"{_WEB}test_dns_rebinding", f"{_WEB}test_allowed_hosts"),
    ),
    Guard(
        "a Host is a name or an address and a port, to its end",
        _in("guards.py", "_HOST.fullmatch(host.lower())", "_HOST.match(host.lower())"),
        (f"{_WEB}test_dns_rebinding",),
    ),
    Guard(
        "only a whole IP literal counts as one",
        _in("guards.py", "_IPV4.fullmatch(name)", "_IPV4.match(name)"),
        (f"{_WEB}test_dns_rebinding",),
    ),
    Guard(
        "an empty Host is 400",
        _in(
            "wire/http1.py",
            'if not headers.get("host") and (minor or "host" in headers):',
            'if minor and "host" not in headers:',
        ),
        (_FRAMING,),
    ),
    Guard(
        "a doubled Host is 400",
        _in(
            "wire/http1.py",
            '("host", "content-length", "transfer-encoding",',
            '("content-length", "transfer-encoding",',
        ),
        (_FRAMING,),
    ),
    Guard(
        "who was let in before a reload is looked at anew",
        _in(
            "proxy.py",
            "_build(config)\n        self.heads = self._fresh_heads()\n        adjust",
            "_build(config)\n        adjust",
        ),
        ("tests.test_attacks_web.ReloadTest",),
    ),
    Guard(
        "a foreign Origin is refused",
        _in("guards.py", "is_own = origin is None or", "is_own = True or"),
        (f"{_WEB}test_web_pages",),
    ),
    Guard(
        "Sec-Fetch-Site is believed",
        _in(
            "guards.py", 'if is_own and headers.get("sec-fetch-site", "none") in ("none", "same-origin"):', "if is_own:"
        ),
        (f"{_WEB}test_web_pages",),
    ),
    Guard(
        "a browser's POST is JSON",
        _in("guards.py", "and not _is_json(headers) and _from_browser(headers):", "and False:"),
        (f"{_WEB}test_web_pages",),
    ),
    Guard(
        "no wildcard origin",
        _in("guards.py", '"Access-Control-Allow-Origin": origin', '"Access-Control-Allow-Origin": "*"'),
        (f"{_WEB}test_a_listed_page",),
    ),
    Guard(
        "preflights are answered for listed origins alone",
        _in("proxy.py", "**(_PREFLIGHT if self._cors else {})", "**_PREFLIGHT"),
        (f"{_WEB}test_a_listed_page",),
    ),
)
_MESSAGES = (
    Guard(
        "both lengths are refused",
        _in("wire/http1.py", 'raise BadMessage("both Content-Length and Transfer-Encoding")', "length = None"),
        (_FRAMING,),
    ),
    Guard(
        "a doubled Content-Length is refused",
        _in("wire/http1.py", '("host", "content-length", "transfer-encoding",', '("host", "transfer-encoding",'),
        ("tests.test_http1.Fields.test_fields_that_must_stand_alone_do",),
    ),
    Guard(
        "Content-Length is digits",
        _in(
            "wire/http1.py",
            "if not (length.isascii() and length.isdigit() and len(length) <= 18):",
            "if not length.strip('+ ,').isdigit():",
        ),
        (_FRAMING,),
    ),
    Guard(
        "chunked is the only coding",
        _in("wire/http1.py", 'if coding.lower() != "chunked":', 'if "chunked" not in coding.lower():'),
        (_FRAMING,),
    ),
    Guard(
        "no coding in HTTP/1.0",
        _in("wire/http1.py", "if minor == 0:\n            raise", "if minor == 7:\n            raise"),
        (_FRAMING,),
    ),
    Guard(
        "no bare CR, LF or control character in a head",
        _in("wire/http1.py", 'if block.translate(None, _TEXT) != b"\\r\\n" * (len(lines) - 1):', "if False:"),
        (_FRAMING,),
    ),
    Guard(
        "a field's name is a token up to its colon",
        _in("wire/http1.py", 'if "".join(headers).encode("latin-1").translate(None, _TOKEN):', "if False:"),
        (_FRAMING,),
    ),
    Guard(
        "no line without a colon, so no folding",
        _in("wire/http1.py", "if not (colon and name):", "if not name:"),
        (_FRAMING,),
    ),
    Guard(
        "a target is a path",
        _in("wire/http1.py", 'if target[:1] != b"/" or target.translate', "if target.translate"),
        (_FRAMING,),
    ),
    Guard(
        "a target is visible ASCII without a fragment",
        _in("wire/http1.py", " or target.translate(None, _TARGET):", ":"),
        (_FRAMING,),
    ),
    Guard(
        "a head is bounded, its end in or not",
        (
            ("portway/wire/http1.py", "if len(head) > MAX_HEAD:", "if False:"),
            ("portway/proxy.py", "if len(self._buffer) > MAX_HEAD:", "if False:"),
        ),
        (_FRAMING,),
    ),
    Guard(
        "fields are counted",
        _in("wire/http1.py", "if len(lines) > MAX_FIELDS:", "if False:"),
        (_FRAMING,),
    ),
    Guard(
        "a chunk's size is hexadecimal digits",
        _in("wire/http1.py", "if not 0 < len(size) <= 15 or size.translate(None, _HEX):", "if not size.strip():"),
        (_FRAMING,),
    ),
    Guard(
        "a chunk is as long as its size says",
        _in(
            "wire/http1.py", "if line:\n                raise BadMessage", "if False:\n                raise BadMessage"
        ),
        (_FRAMING,),
    ),
    Guard(
        "no control character in a chunk's extension",
        _in("wire/http1.py", "if line.translate(None, _TEXT):", "if False:"),
        (_FRAMING,),
    ),
    Guard(
        "chunk extensions are bounded",
        _in("wire/http1.py", "if len(line) > MAX_CHUNK_LINE or self._extensions > MAX_EXTENSIONS:", "if False:"),
        (_FRAMING,),
    ),
    Guard(
        "trailers are bounded",
        (
            ("portway/wire/http1.py", "if self._trailers > MAX_HEAD:", "if False:"),
            ("portway/wire/http1.py", "elif self._trailers + len(tail) > MAX_HEAD:", "elif False:"),
        ),
        ("tests.test_http1.Chunks.test_the_trailers_are_bounded",),
    ),
    Guard(
        "behind a body that is broken the connection ends",
        _in("wire/http1.py", "self.complete = self.poisoned = True", "self.complete = True"),
        (_FRAMING,),
    ),
)
_LOADS = (
    Guard(
        "a body that says it is too large is not read",
        _in("wire/http1.py", "if head.length and head.length > max_body:", "if False:"),
        (f"{_LOAD}LoadTest.test_huge_bodies",),
    ),
    Guard(
        "a body that becomes too large is not read on",
        _in("wire/http1.py", "if self._size > self._limit:", "if False:"),
        (f"{_LOAD}LoadTest.test_huge_bodies",),
    ),
    Guard(
        "a head has its time",
        _in("proxy.py", "self.expires, self.began = now + config.header_timeout, now", "self.began = now"),
        (f"{_LOAD}LoadTest.test_slow_heads",),
    ),
    Guard(
        "a body has its time",
        _in("proxy.py", "self.expires = self.began + config.body_timeout", "self.expires = self.began + 1e9"),
        (f"{_LOAD}LoadTest.test_slow_bodies",),
    ),
    Guard(
        "who does not read has its time",
        _in("proxy.py", "elif time.monotonic() >= until:", "elif False:"),
        (f"{_LOAD}UnreadStreamTest.test_a_stream_that_is_never_read",),
    ),
    Guard(
        "descriptors for the clients that are allowed",
        _in("commands/serve.py", "descriptors.allow(config.server.max_connections)", "pass"),
        (f"{_LOAD}DescriptorTest.test_the_daemon_raises_its_own",),
    ),
    Guard(
        "idle connections make room when descriptors run out",
        _in("proxy.py", "and not self._evict(16):", "and True:"),
        (f"{_LOAD}FewDescriptorsTest",),
    ),
    Guard(
        "JSON is not nested without end",
        _in("wire/events.py", "and _deeper_than(value, MAX_DEPTH):", "and False:"),
        (_JSON,),
    ),
    Guard(
        "NaN is no JSON", _in("wire/events.py", "parse_constant=_refuse_constant, parse_float", "parse_float"), (_JSON,)
    ),
    Guard("1e999 is no number", _in("wire/events.py", "parse_float=_finite, object", "object"), (_JSON,)),
    Guard("no name twice in an object", _in("wire/events.py", ", object_pairs_hook=_unique)", ")"), (_JSON,)),
    Guard(
        "a body is UTF-8",
        _in(
            "wire/events.py",
            'value = _decoded(_DECODER, data.decode("utf-8"))',
            'value = _decoded(_DECODER, data.decode("utf-8", "replace"))',
        ),
        (_JSON,),
    ),
)
_INJECTIONS = (
    Guard(
        "a header's value stays on its line",
        _in("wire/http1.py", "{value if value.isprintable() else _on_one_line(value)}", "{value}"),
        ("tests.test_http1.Fields.test_what_is_sent_stays_on_its_line",),
    ),
    Guard(
        "a name in the configuration is fit for a header",
        _in("fields.py", 're.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]*", value)', 're.match(r"[A-Za-z0-9]", value)'),
        ("tests.test_config.Refusals.test_sections",),
    ),
    Guard(
        "a key in the configuration is fit for a header",
        _in("fields.py", 'if re.fullmatch(r"[!-~]+", secret):', "if secret:"),
        ("tests.test_config.Refusals.test_sections",),
    ),
    Guard(
        "a warning names fields in letters that no header minds",
        _in("wire/translate.py", "{_NO_NAME.sub('_', name)[:64] or '_'}", "{name}"),
        ("tests.test_fuzz_translate.Anything.test_any_body",),
    ),
    Guard(
        "a backend's head is HTTP, or it is no answer",
        _in("wire/http1.py", 'if block.translate(None, _TEXT) != b"\\r\\n" * (len(lines) - 1):', "if False:"),
        (f"{_UPSTREAM}HeaderTest",),
    ),
    Guard(
        "nothing on stderr passes for another message",
        _in("stderr.py", '*(f"  {line}" for line in rest if line)', "*rest"),
        (f"{_UPSTREAM}WordsTest.test_on_stderr",),
    ),
    Guard(
        "nothing on stderr commands a terminal",
        _in("stderr.py", 'f"{printable(line)}\\n" for line in lines', 'f"{line}\\n" for line in lines'),
        ("tests.test_stderr.MessageTest.test_what_a_terminal_would_obey",),
    ),
    Guard(
        "the log is ASCII, a line a request",
        _in(
            "telemetry.py",
            'return encode_basestring_ascii(text[:MAX_NAME]) if text else "null"',
            "return f'\"{text}\"' if text else 'null'",
        ),
        (f"{_UPSTREAM}WordsTest.test_they_stay_where_they_belong", "tests.test_telemetry.Lines"),
    ),
    Guard(
        "`portway ps` spells escapes out",
        _in("commands/residency.py", "yield printable(line.rstrip())", "yield line.rstrip()"),
        (f"{_UPSTREAM}WordsTest.test_on_the_terminal_of_ps",),
    ),
    Guard(
        "an answer does not command ask's terminal",
        _in("ask/terminal.py", "(harmless(text) if self.answers_shown else text)", "text"),
        ("tests.test_ask.TestTerminal.test_a_model_cannot_command_the_terminal",),
    ),
    Guard(
        "a pipe gets the answer as it is",
        _in("ask/terminal.py", "(harmless(text) if self.answers_shown else text)", "harmless(text)"),
        ("tests.test_ask.TestAnswer.test_a_pipe_gets_the_answer_as_it_is",),
    ),
)
_REACHES = (
    Guard(
        "SSRF: image addresses are refused",
        _in("request.py", "        _refuse_addresses(body)\n", "        pass\n"),
        (f"{_WEB}test_remote_images",),
    ),
    Guard(
        "SSRF: wherever content may stand",
        _in("request.py", '_PROMPT = ("messages", "input", "prompt")', '_PROMPT = ("messages",)'),
        (f"{_WEB}test_remote_images",),
    ),
    Guard(
        "SSRF: a redirect is an error",
        _in("backends/upstream.py", "if 300 <= status < 400:", "if False:"),
        (f"{_UPSTREAM}RedirectTest.test_redirects_are_not_followed",),
    ),
    Guard(
        "SSRF: a path is in the route table, or it is 404",
        _in("proxy.py", 'methods, rest = ROUTES.get(bare), ""', 'methods, rest = ROUTES.get(bare.rstrip("/")), ""'),
        (f"{_WEB}test_foreign_paths",),
    ),
    Guard(
        "TLS: certificates and names are verified",
        _in("backends/transport.py", "ssl.create_default_context()", "ssl._create_unverified_context()"),
        ("tests.test_transport.Tls.test_a_server_that_is_not_trusted",),
    ),
)
_ENTRANCES = (
    Guard(
        "keys: none, or a wrong one, is 401",
        _in(
            "guards.py",
            '        if found is None:\n            raise ClientError(\n                "A valid',
            '        if False:\n            raise ClientError(\n                "A valid',
        ),
        (f"{_KEYS}ScopeTest.test_without_a_key", "tests.test_guards.KeyTest.test_wrong_keys"),
    ),
    Guard(
        "keys: compared in constant time",
        _in("guards.py", "if hmac.compare_digest(digest, known.digest):", "if digest == known.digest:"),
        ("tests.test_guards.KeyTest.test_every_key_is_compared",),
    ),
    Guard(
        "keys: a backend's is cut out of its errors",
        _in("backends/failures.py", "if backend.api_key is not None:", "if False:"),
        (f"{_UPSTREAM}KeyTest.test_a_key_is_never_told",),
    ),
    Guard(
        "keys: each backend gets its own",
        _in("backends/upstream.py", "Bearer {backend.api_key}", "Bearer sk-first"),
        (f"{_UPSTREAM}KeyTest.test_keys_stay_apart",),
    ),
    Guard(
        "keys: env:NAME must be set",
        _in("fields.py", "if not environ.get(name):", "if name not in environ:\n        return 'k'\n    if False:"),
        ("tests.test_config.Refusals.test_sections",),
    ),
    Guard(
        "keys: a readable file that holds one is warned of",
        _in("config.py", "or not source.mode & 0o077:", "or True:"),
        ("tests.test_config.Warnings.test_readable_keys",),
    ),
    Guard(
        "keys: a keys.toml that others may read is refused",
        _in("keys.py", ".st_mode) & 0o077:", ".st_mode) & 0:"),
        ("tests.test_keys.CommandTest.test_a_file_that_others_may_read",),
    ),
    Guard(
        "keys: one that vanishes lets nobody in",
        _in(
            "config.py",
            "if source.keys is None and self._read is not None and self._read.keys is not None:",
            "if False:",
        ),
        ("tests.test_keys.WatcherTest.test_a_file_that_is_gone_lets_nobody_in",),
    ),
    Guard(
        "keys: only the hash is stored",
        _in("commands/keys.py", '"key": keys.HASH + digest', '"key": key'),
        ("tests.test_keys.CommandTest.test_new",),
    ),
    Guard(
        "keys: no open address without one",
        _in("config.py", "if is_loopback(host) or own_keys or", "if True or own_keys or"),
        ("tests.test_config.Refusals.test_open_to_the_network", f"{_KEYS}OpenTest.test_a_bind_without_a_key"),
    ),
    Guard(
        "keys: nor by --host",
        _in("cli.py", "if host is not None and not config.server.api_keys", "if False and not config.server.api_keys"),
        (f"{_KEYS}OpenTest.test_a_bind_without_a_key",),
    ),
    Guard(
        "keys: nor by a reload",
        _in(
            "proxy.py", "if not config.server.api_keys and not is_loopback(self.state.config.server.host):", "if False:"
        ),
        (f"{_KEYS}OpenTest.test_a_reload_that_takes_the_last_key_away",),
    ),
    Guard(
        "keys: models",
        _in("request.py", "        key.check_model(model.name)\n", "        pass\n"),
        (f"{_KEYS}ScopeTest.test_a_key_for_some_models",),
    ),
    Guard(
        "keys: the list shows a key its models",
        _in("proxy.py", "if self._key is None or self._key.knows(model.name)", "if True"),
        (f"{_KEYS}ScopeTest.test_it_learns_of_no_other",),
    ),
    Guard(
        "keys: messages name a key its models",
        _in("request.py", "if config.names[other] in names]", "if True]"),
        (f"{_KEYS}ScopeTest.test_it_learns_of_no_other",),
    ),
    Guard(
        "keys: the server as a whole is not for one with models",
        _in("guards.py", "if route not in _FOR_MODELS:", "if False:"),
        (f"{_KEYS}ScopeTest.test_what_concerns_the_server",),
    ),
    Guard(
        "keys: requests a minute",
        _in("quotas.py", "used.requests.wait(key.rpm, now)", "0.0"),
        (f"{_KEYS}RateTest.test_requests_a_minute",),
    ),
    Guard(
        "keys: tokens a minute",
        _in("quotas.py", "used.tokens.wait(key.tpm, now)", "0.0"),
        (f"{_KEYS}TokenTest.test_tokens_a_minute",),
    ),
    Guard(
        "keys: an answer that is left counts",
        _in(
            "quotas.py", "completion = (tally.content_chars + tally.reasoning_chars) // CHARS_A_TOKEN", "completion = 0"
        ),
        (f"{_KEYS}TokenTest.test_a_stream_that_is_left",),
    ),
    Guard(
        "keys: /health tells strangers nothing",
        _in("proxy.py", "self.server.daemon.health() if knows else BRIEF", "self.server.daemon.health()"),
        (f"{_KEYS}ScopeTest.test_health_tells_strangers_nothing",),
    ),
)
GUARDS: tuple[Guard, ...] = (*_BROWSERS, *_MESSAGES, *_LOADS, *_INJECTIONS, *_REACHES, *_ENTRANCES)
