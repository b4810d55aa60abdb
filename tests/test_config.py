"""config.py and fields.py: what a configuration means, and what is said of a bad one."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import unittest
import zipfile
from pathlib import Path
from typing import Any

from portway import config, fields, keys, panels
from portway.config import Config, ConfigError, ConfigWatcher
from portway.fields import Mistake

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "config" / "models.toml"

BACKENDS = """
[backends.ollama]
kind = "ollama"
url = "http://127.0.0.1:11434"
[backends.llamacpp]
kind = "openai"
url = "http://127.0.0.1:8080/v1"
"""
MODEL = '[models.{name}]\nbackend = "ollama"\nmodel = "{name}-weights"\n'
A = BACKENDS + MODEL.format(name="a")
ABC = A + MODEL.format(name="b") + MODEL.format(name="c")


def parsed(text: str, environ: dict[str, str] | None = None) -> Config:
    return config.parse(text, "test.toml", environ or {})


def mistakes(text: str, environ: dict[str, str] | None = None) -> list[Mistake]:
    try:
        parsed(text, environ)
    except ConfigError as error:
        return list(error.mistakes)
    return []


def one_model(lines: str, backend: str = "ollama") -> config.Model:
    return parsed(f'{BACKENDS}[models.a]\nbackend = "{backend}"\nmodel = "x"\n{lines}').models["a"]


def with_fallbacks(**chains: list[str]) -> str:
    return BACKENDS + "".join(MODEL.format(name=name) + f"fallback = {chain}\n" for name, chain in chains.items())


class Values(unittest.TestCase):
    """Valid text becomes the dataclasses."""

    def test_defaults(self) -> None:
        """A section that is absent, or a key that is, has the dataclass's default."""
        got = parsed(A)
        self.assertEqual(config.Server(), got.server)
        self.assertEqual(config.Cooldown(), got.cooldown)
        self.assertEqual(config.Model("a", got.backends["ollama"], "a-weights"), got.models["a"])
        self.assertEqual("test.toml", got.path)
        self.assertEqual((), got.warnings)

    def test_every_model_key(self) -> None:
        """Every key of a model arrives in its final type."""
        text = """
        family = "qwen"
        keep_alive = "15m"
        num_ctx = 16384
        think = "low"
        aliases = ["x", "y/z:1"]
        params = { temperature = 0.7, stop = ["a"], nested = { k = [1, true] } }
        timeouts = { connect = 1, load = "1m", first_token = 3.5, idle = 4, total = 500 }
        strict = true
        capabilities = ["tools", "vision"]
        max_tokens = 9
        merge_system = true
        cache = "30d"
        flag = "9b"
        default = true
        """
        got = one_model(text)
        expected = config.Model(
            "a", got.backend, "x", "qwen", 900.0, 16384, "low", (), ("x", "y/z:1"),
            {"temperature": 0.7, "stop": ["a"], "nested": {"k": [1, True]}},
            config.Timeouts(1.0, 60.0, 3.5, 4.0, 500.0), True, frozenset({"tools", "vision"}), 9, True,
            2_592_000.0, "9b", True,
        )  # fmt: skip
        self.assertEqual(expected, got)
        self.assertIs(float, type(got.timeouts.connect))

    def test_log_cache_and_price(self) -> None:
        """The sections beside the path arrive in their final types; a path's ~ is the user's folder."""
        got = parsed(
            A
            + """
        [log]
        enabled = false
        file = "~/x.jsonl"
        max_size = "1MB"
        keep = 0
        [cache]
        enabled = false
        file = ""
        max_size = "2MB"
        [price]
        input = 1
        output = 2.5
        """
        )
        self.assertEqual(config.Log(False, os.path.expanduser("~/x.jsonl"), 1024**2, 0), got.log)
        self.assertEqual(config.Cache(False, "", 2 * 1024**2), got.cache)
        self.assertEqual(config.Price(1.0, 2.5), got.price)

    def test_memory(self) -> None:
        """What models may take, and how backends share it, arrives in its final types."""
        got = parsed(
            A
            + """size = "6600MB"
        preload = true
        prefer_warm = true
        [memory]
        enabled = false
        budget = "10GB"
        reserve = 0
        min_stay = "1m"
        patience = 2
        check = 0.5
        """
        )
        self.assertEqual(config.Memory(False, 10 * 1024**3, 0, 60.0, 2.0, 0.5), got.memory)
        model = got.models["a"]
        self.assertEqual((6600 * 1024**2, True, True), (model.size, model.preload, model.prefer_warm))
        self.assertIsNone(parsed(A + '[memory]\nbudget = "auto"').memory.budget)
        more = "\nlocal = false\nmax_parallel = 2\nmax_queue = 0\n"
        backend = parsed(A.replace('11434"\n', f'11434"{more}', 1)).backends["ollama"]
        self.assertEqual((False, 2, 0), (backend.local, backend.max_parallel, backend.max_queue))

    def test_cache_lifetimes(self) -> None:
        """`cache` is a time, days included, or "off"; nothing in between."""
        lifetimes = [one_model(f"cache = {text}").cache for text in ('"off"', '"12h"', "60")]
        self.assertEqual([0.0, 43_200.0, 60.0], lifetimes)
        for text in ("0", '"on"', "true", '"-1d"', '"never"'):
            refused = mistakes(f'{BACKENDS}[models.a]\nbackend = "ollama"\nmodel = "x"\ncache = {text}\n')
            self.assertEqual(["models.a.cache"], [mistake.key for mistake in refused], text)

    def test_flags(self) -> None:
        """`flag:9b` resolves to the model with that flag; without one, to the default or the first."""
        two = BACKENDS + MODEL.format(name="a") + 'flag = "9b"\n' + MODEL.format(name="b") + 'flag = "1b"\n'
        got = parsed(two)
        flagged = [got.resolve(f"flag:{flag}") for flag in ("9b", "1b", "2b")]
        self.assertEqual([got.models["a"], got.models["b"], None], flagged)
        self.assertIs(got.models["a"], got.resolve("flag:default"))
        got = parsed(two + "default = true\n")
        self.assertIs(got.models["b"], got.resolve("flag:default"))

    def test_the_flag_of_a_council(self) -> None:
        """`ask --council` means the first one, unless another model has that flag; and the list of models says so."""
        council = '[models.{}]\nkind = "council"\nmembers = ["a", "a"]\nchairman = "a"\n'
        alone = BACKENDS + MODEL.format(name="a") + council.format("first") + council.format("second")
        for more, meant in (("", "first"), ('flag = "council"\n', "second")):
            got = parsed(alone + more)
            self.assertIs(got.models[meant], got.resolve("flag:council"))
            flags = {name: got.flag_of(model) for name, model in got.models.items()}
            self.assertEqual({"a": "", "first": "", "second": ""} | {meant: "council"}, flags)
        self.assertEqual(
            "all", parsed(alone.replace("[models.second]", 'flag = "all"\n[models.second]')).models["first"].flag
        )
        self.assertIsNone(parsed(BACKENDS + MODEL.format(name="a")).resolve("flag:council"))

    def test_flags_that_clash(self) -> None:
        """A flag means one model, can't be an option of ask's own, and no name may look like one."""
        a, b = MODEL.format(name="a"), MODEL.format(name="b")
        same = mistakes(f'{BACKENDS}{a}flag = "9b"\ndefault = true\n{b}flag = "9b"\ndefault = true\n')
        self.assertEqual(["models.b.flag", "models.b.default"], [mistake.key for mistake in same])
        own = mistakes(f'{BACKENDS}{a}flag = "json"\n{b}flag = "9B"\n')
        self.assertEqual(["models.a.flag", "models.b.flag"], [mistake.key for mistake in own])
        named = mistakes(f'{BACKENDS}{a}aliases = ["flag:x"]\n')
        self.assertEqual(["models.a.aliases[0]"], [mistake.key for mistake in named])

    def test_every_server_key(self) -> None:
        """Every key of [server] and [cooldown] arrives in its final type; names are lower-cased."""
        text = """
        [server]
        host = "::1"
        port = 0
        api_keys = ["sk-1", "env:KEY"]
        allowed_hosts = ["Box.LAN"]
        allowed_origins = ["HTTP://Localhost:3000", "vscode-webview://abc", "http://[::1]:80"]
        heartbeat = 1
        max_body = "1MB"
        max_requests = 2
        max_connections = 3
        header_timeout = 4
        body_timeout = 5
        idle_timeout = "6s"
        write_timeout = 7
        drain = 0
        [cooldown]
        failures = 1
        seconds = 2
        longest = 3
        """
        got = parsed(text + A, {"KEY": "sk-2"})
        origins = ("http://localhost:3000", "vscode-webview://abc", "http://[::1]:80")
        secrets = tuple(keys.Key(keys.digest_of(secret), secret=secret) for secret in ("sk-1", "sk-2"))
        expected = config.Server("::1", 0, secrets, ("box.lan",), origins, 1.0, 1024**2, 2, 3, 4.0, 5.0, 6.0, 7.0, 0.0)
        self.assertEqual(expected, got.server)
        self.assertEqual(config.Cooldown(1, 2.0, 3.0), got.cooldown)
        self.assertEqual(config.Cooldown(3, 0.0, 0.0), parsed(A + "[cooldown]\nseconds = 0\nlongest = 0").cooldown)

    def test_urls(self) -> None:
        """A url is taken with or without /v1 (and Ollama's /api), and its parts are known."""
        table = {
            ("openai", "http://127.0.0.1:8080"): ("http", "127.0.0.1", 8080, ""),
            ("openai", "http://127.0.0.1:8080/v1"): ("http", "127.0.0.1", 8080, ""),
            ("openai", "https://API.Example.com/proxy/v1/"): ("https", "api.example.com", 443, "/proxy"),
            ("openai", "http://h/api"): ("http", "h", 80, "/api"),
            ("openai", "http://[::1]:9/v1"): ("http", "::1", 9, ""),
            ("ollama", "http://h:1/api"): ("http", "h", 1, ""),
            ("ollama", "http://h:1/x/v1"): ("http", "h", 1, "/x"),
            ("ollama", "HTTP://h/"): ("http", "h", 80, ""),
        }
        for (kind, url), expected in table.items():
            with self.subTest(url=url):
                text = f'[backends.o]\nkind = "{kind}"\nurl = "{url}"\nmax_idle = 0\napi_key = "k"\n'
                got = parsed(text + '[models.a]\nbackend = "o"\nmodel = "x"\n').backends["o"]
                self.assertEqual(expected, (got.scheme, got.host, got.port, got.base))
                self.assertEqual((url, "k", 0, kind), (got.url, got.api_key, got.max_idle, got.kind))

    def test_keep_alive(self) -> None:
        """keep_alive is Go's duration or seconds; anything negative is for ever."""
        table = {
            '"30s"': 30.0, '"1h30m"': 5400.0, '"1.5h"': 5400.0, '"500ms"': 0.5, '"300"': 300.0, '"0"': 0.0,
            '"-1"': -1.0, '"-5m"': -1.0, "0": 0.0, "-1": -1.0, "-7": -1.0, "90": 90.0, "2.5": 2.5, "-0.5": -1.0,
        }  # fmt: skip
        for text, expected in table.items():
            with self.subTest(text):
                self.assertEqual(expected, one_model(f"keep_alive = {text}").keep_alive)

    def test_think(self) -> None:
        """think is a boolean or a level, each as itself."""
        for text, expected in {"false": False, "true": True, '"low"': "low", '"medium"': "medium"}.items():
            with self.subTest(text):
                self.assertIs(expected, one_model(f"think = {text}").think)

    def test_sizes(self) -> None:
        """A size is bytes or a number with a unit, in powers of 1024."""
        table = {"7": 7, '"7"': 7, '"512 KB"': 512 * 1024, '"32MB"': 32 * 1024**2, '"32MiB"': 32 * 1024**2}
        table |= {'"1g"': 1024**3, '"9B"': 9}
        for text, expected in table.items():
            with self.subTest(text):
                self.assertEqual(expected, parsed(f"[server]\nmax_body = {text}\n{A}").server.max_body)

    def test_names(self) -> None:
        """resolve() takes names and aliases letter for letter; near() offers what looks like one."""
        got = parsed(ABC.replace("[models.b]", '[models.fast-3b]\naliases = ["gpt-4o-mini"]'))
        self.assertIs(got.models["fast-3b"], got.resolve("gpt-4o-mini"))
        self.assertIs(got.models["a"], got.resolve("a"))
        self.assertIsNone(got.resolve("A"))
        self.assertIsNone(got.resolve("b"))
        self.assertEqual(["fast-3b"], got.near("fast-9b"))
        self.assertEqual(["gpt-4o-mini"], got.near("GPT-4o"))
        self.assertEqual(["fast-3b"], got.near("b-weights"))
        self.assertEqual([], got.near("zzzzzz"))

    def test_near_is_at_most_three(self) -> None:
        """near() has three names at the most, and those that stand for a backend's own name come first."""
        same = "".join(f'[models.n{i}]\nbackend = "ollama"\nmodel = "weights"\n' for i in range(4))
        self.assertEqual(["n0", "n1", "n2"], parsed(BACKENDS + same).near("weights"))

    def test_near_of_a_huge_name_is_quick(self) -> None:
        """A client can't keep a thread busy by asking for a name of a million letters."""
        start = time.monotonic()
        parsed(ABC).near("ab" * 500_000)
        self.assertLess(time.monotonic() - start, 1.0)

    def test_chain(self) -> None:
        """A chain is the model and its own fallback, not the members' fallbacks; strict stands alone."""
        got = parsed(with_fallbacks(a=["b"], b=["c"], c=[], d=["a", "c"]) + "strict = true\n")
        chains = {name: [member.name for member in got.chain(model)] for name, model in got.models.items()}
        self.assertEqual({"a": ["a", "b"], "b": ["b", "c"], "c": ["c"], "d": ["d"]}, chains)

    def test_tables_are_read_only(self) -> None:
        """Nobody can change a configuration that requests in flight still use."""
        got: Any = parsed(A)
        with self.assertRaises(TypeError):
            got.models["z"] = None
        with self.assertRaises(dataclasses.FrozenInstanceError):
            got.path = "elsewhere"

    def test_bom(self) -> None:
        """A byte order mark, as some editors write, is no mistake."""
        self.assertIn("a", parsed("\ufeff" + A).models)

    def test_describe(self) -> None:
        """describe() counts, and has a line for each warning."""
        self.assertEqual(["test.toml: ok, 1 model, 2 backends"], config.describe(parsed(A)))
        text = ABC.replace('model = "b-weights"', 'model = "a-weights"\nnum_ctx = 1')
        lines = config.describe(parsed(text))
        self.assertEqual("test.toml: ok, 3 models, 2 backends", lines[0])
        self.assertEqual(["warning: models.b.num_ctx"], [line.split(": 1")[0] for line in lines[1:]])


class Refusals(unittest.TestCase):
    """Each mistake has its exact key, and says what is wrong and what is allowed."""

    # what is added to [section] of a valid file -> the keys that are refused
    SINGLE = (
        ("memory", "budget = true", "memory.budget"),
        ("memory", 'budget = "off"', "memory.budget"),
        ("memory", 'budget = "63MB"', "memory.budget"),
        ("memory", 'reserve = "much"', "memory.reserve"),
        ("memory", "min_stay = -1", "memory.min_stay"),
        ("memory", "check = 0", "memory.check"),
        ("server", 'colour = "red"', "server.colour"),
        ("server", "host = 1", "server.host"),
        ("server", 'host = ""', "server.host"),
        ("server", 'host = "a b"', "server.host"),
        ("server", "port = 65536", "server.port"),
        ("server", "port = -1", "server.port"),
        ("server", "port = true", "server.port"),
        ("server", 'port = "80"', "server.port"),
        ("server", "port = 1.0", "server.port"),
        ("server", 'api_keys = "sk"', "server.api_keys"),
        ("server", 'api_keys = ["ok", 1]', "server.api_keys[1]"),
        ("server", 'api_keys = [""]', "server.api_keys[0]"),
        ("server", 'api_keys = ["a b"]', "server.api_keys[0]"),
        ("server", 'api_keys = ["a\\nb"]', "server.api_keys[0]"),
        ("server", 'api_keys = ["env:"]', "server.api_keys[0]"),
        ("server", 'api_keys = ["env:UNSET"]', "server.api_keys[0]"),
        ("server", 'api_keys = ["env:EMPTY"]', "server.api_keys[0]"),
        ("server", 'api_keys = ["env:BROKEN"]', "server.api_keys[0]"),
        ("server", 'allowed_hosts = ["http://x"]', "server.allowed_hosts[0]"),
        ("server", "allowed_hosts = [1]", "server.allowed_hosts[0]"),
        ("server", "allowed_origins = [1]", "server.allowed_origins[0]"),
        ("backends.b2", 'kind = "ollama"\nurl = 1', "backends.b2.url"),
        ("server", 'allowed_hosts = ["*.lan"]', "server.allowed_hosts[0]"),
        ("server", 'allowed_origins = ["*"]', "server.allowed_origins[0]"),
        ("server", 'allowed_origins = ["http://x/"]', "server.allowed_origins[0]"),
        ("server", 'allowed_origins = ["http://x\\r\\n"]', "server.allowed_origins[0]"),
        ("server", "heartbeat = 0", "server.heartbeat"),
        ("server", "heartbeat = 3601", "server.heartbeat"),
        ("server", "heartbeat = nan", "server.heartbeat"),
        ("server", 'max_body = "big"', "server.max_body"),
        ("server", "max_body = 0", "server.max_body"),
        ("server", 'max_body = "9GB"', "server.max_body"),
        ("server", "max_body = true", "server.max_body"),
        ("server", "max_requests = 0", "server.max_requests"),
        ("server", "max_connections = 0", "server.max_connections"),
        ("server", "header_timeout = 0", "server.header_timeout"),
        ("server", "body_timeout = inf", "server.body_timeout"),
        ("server", "idle_timeout = -1", "server.idle_timeout"),
        ("server", 'write_timeout = "soon"', "server.write_timeout"),
        ("server", "drain = -1", "server.drain"),
        ("server", "drain = 2020-01-01", "server.drain"),
        ("cooldown", "failures = 0", "cooldown.failures"),
        ("cooldown", "seconds = -1", "cooldown.seconds"),
        ("cooldown", "longest = 29", "cooldown.longest"),
        ("cooldown", "seconds = 301", "cooldown.longest"),
        ("cooldown", "second = 1", "cooldown.second"),
        ("backends.b2", 'kind = "ollama"', "backends.b2.url"),
        ("backends.b2", 'url = "http://h"', "backends.b2.kind"),
        ("backends.b2", 'kind = "olama"\nurl = "http://h"', "backends.b2.kind"),
        ("backends.b2", 'kind = "ollama"\nurl = "http://127.0.0.1:11436"', "backends.b2.url"),
        ("backends.b2", 'kind = "ollama"\nurl = "http://h"\nmax_idle = -1', "backends.b2.max_idle"),
        ("backends.b2", 'kind = "ollama"\nurl = "http://h"\napi_key = "env:UNSET"', "backends.b2.api_key"),
        ('backends."b 2"', 'kind = "ollama"\nurl = "http://h"', 'backends."b 2"'),
        ("models.m", 'backend = "ollama"', "models.m.model"),
        ("models.m", 'model = "x"', "models.m.backend"),
        ("models.m", 'backend = "olama"\nmodel = "x"', "models.m.backend"),
        ("models.m", 'backend = "ollama"\nmodel = ""', "models.m.model"),
        ("models.m", 'backend = "ollama"\nmodel = "x\\ry"', "models.m.model"),
        ('models."m\\n"', 'backend = "ollama"\nmodel = "x"', 'models."m\\n"'),
        ('models."-m"', 'backend = "ollama"\nmodel = "x"', "models.-m"),
        (f"models.{'m' * 129}", 'backend = "ollama"\nmodel = "x"', f"models.{'m' * 129}"),
    )

    def test_sections(self) -> None:
        """A bad value in a section is refused under its own key, and nothing else is."""
        environ = {"EMPTY": "", "BROKEN": "a\r\nb"}
        for section, line, key in self.SINGLE:
            with self.subTest(section=section, line=line):
                found = mistakes(f"{A}[{section}]\n{line}\n", environ)
                self.assertEqual([key], [mistake.key for mistake in found])
                self.assertTrue(found[0].problem)
                self.assertTrue(found[0].allowed)
                self.assertTrue(str(found[0]).isprintable())

    def test_model_keys(self) -> None:
        """A bad value in a model is refused under its own key, and nothing else is."""
        table = {
            "colour = 1": "colour",
            'family = "a\\u0000"': "family",
            'keep_alive = "soon"': "keep_alive",
            'keep_alive = ""': "keep_alive",
            'keep_alive = "1h 30m"': "keep_alive",
            'keep_alive = "1h30"': "keep_alive",
            "keep_alive = true": "keep_alive",
            "keep_alive = inf": "keep_alive",
            "keep_alive = nan": "keep_alive",
            "keep_alive = 999999999999": "keep_alive",
            f"keep_alive = {'9' * 400}": "keep_alive",
            f"num_ctx = 0x{'f' * 5000}": "num_ctx",
            "num_ctx = 0": "num_ctx",
            'num_ctx = "16k"': "num_ctx",
            "num_ctx = true": "num_ctx",
            "think = 1": "think",
            'think = "max"': "think",
            'fallback = "b"': "fallback",
            "fallback = [1]": "fallback[0]",
            'aliases = ["ok", "a b"]': "aliases[1]",
            "aliases = [1]": "aliases[0]",
            'family = " "': "family",
            "keep_alive = 315360001": "keep_alive",
            'keep_alive = "87601h"': "keep_alive",
            "params = 1": "params",
            "params = { when = 2020-01-01 }": "params.when",
            "params = { top_p = nan }": "params.top_p",
            'params = { "a\\nb" = 1 }': 'params."a\\nb"',
            "timeouts = 5": "timeouts",
            "timeouts = { total = 0 }": "timeouts.total",
            "timeouts = { first = 1 }": "timeouts.first",
            'strict = "yes"': "strict",
            'capabilities = ["tool"]': "capabilities[0]",
            "max_tokens = 0": "max_tokens",
            "merge_system = 1": "merge_system",
            'size = "big"': "size",
            "preload = 1": "preload",
            'prefer_warm = "yes"': "prefer_warm",
        }
        owned = ("model", "messages", "prompt", "input", "stream", "stream_options")
        table |= {f"params = {{ {name} = 1 }}": f"params.{name}" for name in owned}
        for line, key in table.items():
            with self.subTest(line=line[:60]):
                found = mistakes(A + line)
                self.assertEqual([f"models.a.{key}"], [mistake.key for mistake in found])
                self.assertTrue(str(found[0]).isprintable())

    def test_sections_that_are_no_tables(self) -> None:
        """A section or an entry that is no table is one mistake, not many."""
        table = {
            "server = 1": "server",
            "backends = []": "backends",
            "models = 2": "models",
            "cooldown = ''": "cooldown",
        }
        for line, key in table.items():
            with self.subTest(line):
                text = f"{line}\n" + ("" if key == "models" else MODEL.format(name="a"))
                keys = [mistake.key for mistake in mistakes(text)]
                self.assertEqual(key, keys[0])
                self.assertEqual(1 if key == "models" else 2, len(keys), keys)
        self.assertEqual(["models.z"], [mistake.key for mistake in mistakes(f"models.z = 1\n{A}")])

    def test_no_models(self) -> None:
        """A file without any model is refused."""
        for text in ("", BACKENDS, "models = {}"):
            with self.subTest(text):
                self.assertEqual(["models"], [mistake.key for mistake in mistakes(text)])

    def test_unknown_top_level(self) -> None:
        """An unknown section is refused, with the near name."""
        (found,) = mistakes(A + "[servr]\nport = 1")
        self.assertEqual(("servr", "server"), (found.key, found.near))

    def test_everything_at_once(self) -> None:
        """All mistakes of a file are told together, each on one line of the error."""
        text = A + 'num_ctx = 0\nfallback = ["zz"]\naliases = ["a"]\n[server]\nhost = "0.0.0.0"\nprot = 1\n'
        with self.assertRaises(ConfigError) as caught:
            parsed(text)
        expected = {"models.a.num_ctx", "models.a.fallback[0]", "models.a.aliases[0]", "server.host", "server.prot"}
        self.assertEqual(expected, {mistake.key for mistake in caught.exception.mistakes})
        lines = str(caught.exception).split("\n")
        self.assertEqual("test.toml: 5 mistakes", lines[0])
        self.assertEqual([f"  {mistake}" for mistake in caught.exception.mistakes], lines[1:])
        self.assertEqual("test.toml", caught.exception.path)

    def test_the_line_of_a_mistake(self) -> None:
        """A mistake's line has the key, the value, what is allowed and the near name."""
        (found,) = mistakes(A.replace('"ollama"\nmodel', '"olama"\nmodel'))
        expected = "models.a.backend: 'olama' is no backend; allowed: ollama or llamacpp; did you mean ollama?"
        self.assertEqual(expected, str(found))

    def test_the_words_of_a_mistake(self) -> None:
        """What is wrong and what is allowed are told in the same few forms."""
        table = {
            "num_ctx = 0": "0 is out of range; allowed: a whole number, 1 to 16777216",
            'num_ctx = "x"': "'x' is text; allowed: a whole number, 1 to 16777216",
            "num_ctx = true": "true is a boolean; allowed: a whole number, 1 to 16777216",
            "num_ctx = [1]": "a list; allowed: a whole number, 1 to 16777216",
            "num_ctx = 2020-01-01": "2020-01-01 is a date or time; allowed: a whole number, 1 to 16777216",
            f"num_ctx = 0x{'f' * 60}": "a huge number is out of range; allowed: a whole number, 1 to 16777216",
            "max_tokens = 1.5": "1.5 is a number; allowed: a whole number, 1 to 16777216",
            "think = 1": "1 is a whole number; allowed: false, true, low, medium or high",
            'think = "x"': "'x' does not fit; allowed: false, true, low, medium or high",
            f'think = "{"x" * 100}"': f"'{'x' * 76}... does not fit; allowed: false, true, low, medium or high",
            f'think = "{"x" * 78}"': f"'{'x' * 78}' does not fit; allowed: false, true, low, medium or high",
            "fallback = 1": "a whole number, and no list; allowed: a list of logical names",
            "timeouts = 1": "a whole number, and no table; allowed: a table",
            'fallback = ["\u00e9"]': "'\\xe9' is no model; allowed: a",
        }
        for line, words in table.items():
            with self.subTest(line):
                (found,) = mistakes(A + line)
                self.assertEqual(words, str(found).split(": ", 1)[1])

    def test_the_words_of_a_bad_secret(self) -> None:
        """A key that is empty, of the wrong type or not in the environment is told apart, unseen."""
        table = {'""': "empty", "1": "a whole number", '"env:NO"': "the environment variable NO is not set"}
        table |= {'"env:NIL"': "the environment variable NIL is empty", '"env:1"': "no name of an environment variable"}
        for value, start in table.items():
            with self.subTest(value):
                (found,) = mistakes(f"{A}[server]\napi_keys = [{value}]", {"NIL": "", "1": "k"})
                self.assertEqual(start, found.problem[: len(start)])

    def test_long_lists_of_what_is_allowed(self) -> None:
        """Of many names only the first twenty are listed."""
        many = "".join(MODEL.format(name=f"m{i}") for i in range(25))
        (found,) = mistakes(BACKENDS + many + 'fallback = ["zz"]')
        self.assertEqual(", ".join(f"m{i}" for i in range(20)) + ", and 5 more", found.allowed)

    def test_words_keep_what_can_be_printed(self) -> None:
        """A mistake's line escapes what can't be printed, and nothing else."""
        self.assertEqual("k: a\u00e9\\x1b\\n", str(Mistake("k", "a\u00e9\x1b\n")))

    def test_near_names(self) -> None:
        """What looks like a slip of the pen gets the right name."""
        table = {
            "numctx = 1": "num_ctx",
            'think = "hihg"': "high",
            'think = "true"': "true",
            'fallback = ["bb1"]': "bb12",
            'fallback = ["other"]': "bb12",  # an alias: its model is what a chain is made of
            'capabilities = ["tool"]': "tools",
        }
        other = MODEL.format(name="bb12") + 'aliases = ["other"]\n'
        for line, near in table.items():
            with self.subTest(line):
                self.assertEqual(
                    [near], [found.near for found in mistakes(BACKENDS + other + MODEL.format(name="a") + line)]
                )
        origins = {'allowed_origins = ["http://X/"]': "http://X", 'allowed_origins = ["*.x"]': ""}
        origins |= {'host = "[::1]"': "::1", 'host = "a b"': ""}
        for line, near in origins.items():
            with self.subTest(line):
                self.assertEqual([near], [found.near for found in mistakes(f"{A}[server]\n{line}")])

    def test_bad_urls(self) -> None:
        """A url that isn't plain http or https is refused."""
        bad = (
            "",
            "h:1",
            "ftp://h",
            "http://",
            "http://u:p@h",
            "http://h/?q=1",
            "http://h/#f",
            "http://h:0",
            "http://h:65536",
        )
        for url in (*bad, "http://h:x", "http://h/ x", "http://h\\r\\nX: y", "http://h/\\u00e9", "http://::1"):
            with self.subTest(url):
                text = A.replace("http://127.0.0.1:11434", url)
                self.assertEqual(["backends.ollama.url"], [found.key for found in mistakes(text)])
        for url, near in {"box:11434": "http://box:11434", "ftp://h": "", "http://h/ x": ""}.items():
            (found,) = mistakes(A.replace("http://127.0.0.1:11434", url))
            self.assertEqual(near, found.near)

    def test_secrets_are_never_shown(self) -> None:
        """No message holds a key or a password, however it was misplaced."""
        texts = (
            f'{A}[server]\napi_keys = "sk-geheim"',
            f'{A}[server]\napi_keys = ["sk-geheim x"]',
            f'{A}[server]\napi_keys = [["sk-geheim"]]',
            f'{A}[server]\napi_keys = ["env:sk-geheim"]',
            f'{A}[server]\napi_keys = ["env:KEY"]',
            f'{A}[server]\napi_key = "sk-geheim"',
            A.replace('"http://127.0.0.1:11434"', '"http://u:geheim@h"'),
            f'{A}[server]\nhost = "http://u:geheim@h"',
            f'{A}keep_alive = "https://geheim@h/x"',
            A.replace('"http://127.0.0.1:11434"', '"http://h?key=geheim"'),
            'backends = "geheim"\n' + MODEL.format(name="a"),
        )
        for text in texts:
            with self.subTest(text[-60:]), self.assertRaises(ConfigError) as caught:
                parsed(text, {"KEY": "geheim\n"})
            self.assertNotIn("geheim", str(caught.exception))

    def test_control_characters_never_reach_the_terminal(self) -> None:
        """Whatever the file holds, each mistake is one printable line."""
        text = A + '"k\\u001b[2J" = 1\nfallback = ["\\u001b]0;x\\u0007"]\n[models."x\\r\\ny"]\nbackend = "\\u0000"\n'
        with self.assertRaises(ConfigError) as caught:
            parsed(text)
        lines = str(caught.exception).split("\n")
        self.assertEqual(len(caught.exception.mistakes) + 1, len(lines))
        self.assertTrue(all(line.isprintable() for line in lines))

    def test_open_to_the_network(self) -> None:
        """A host that other machines can reach needs a key; loopback doesn't."""
        for host in ("0.0.0.0", "::", "192.168.1.2", "box.lan", "127.0.0.1.example.com", "1127.0.0.1"):
            with self.subTest(host):
                text = f'{A}[server]\nhost = "{host}"\n'
                self.assertEqual(["server.host"], [found.key for found in mistakes(text)])
                self.assertEqual([], mistakes(text + 'api_keys = ["k"]'))
                self.assertEqual(["server.host"], [found.key for found in mistakes(text + "api_keys = []")])
        for host in ("127.0.0.1", "127.1.2.3", "localhost", "LOCALHOST", "::1"):
            with self.subTest(host):
                self.assertEqual([], mistakes(f'{A}[server]\nhost = "{host}"\n'))

    def test_bad_key_on_an_open_host_is_one_mistake(self) -> None:
        """Where a key was meant but is no good, only the key is told."""
        text = f'{A}[server]\nhost = "0.0.0.0"\napi_keys = ["env:UNSET"]'
        self.assertEqual(["server.api_keys[0]"], [found.key for found in mistakes(text)])

    def test_portway_behind_itself(self) -> None:
        """A backend that is Portway's own address is refused: it would call itself for ever."""
        for server, url in (
            ("port = 9", "http://localhost:9"),
            ('host = "box"\nport = 9\napi_keys = ["k"]', "http://box:9"),
        ):
            with self.subTest(url):
                text = f"{A.replace('http://127.0.0.1:11434', url)}[server]\n{server}"
                self.assertEqual(["backends.ollama.url"], [found.key for found in mistakes(text)])
        self.assertEqual([], mistakes(A.replace("127.0.0.1:11434", "box:11436")))

    def test_cycles(self) -> None:
        """A way along fallbacks that comes back is refused once, with the way."""
        table = {
            "a -> a": (with_fallbacks(a=["a"]), "models.a.fallback[0]"),
            "a -> b -> a": (with_fallbacks(a=["b"], b=["a"]), "models.a.fallback[0]"),
            "b -> c -> b": (with_fallbacks(a=["b"], b=["c"], c=["b"]), "models.b.fallback[0]"),
            "a -> c -> d -> a": (with_fallbacks(a=["b", "c"], b=[], c=["d"], d=["a"]), "models.a.fallback[1]"),
        }
        for way, (text, key) in table.items():
            with self.subTest(way):
                self.assertEqual([(key, f"a cycle: {way}")], [(found.key, found.problem) for found in mistakes(text)])

    def test_two_ways_to_one_model_are_no_cycle(self) -> None:
        """Chains may share members, as long as none comes back."""
        self.assertEqual([], mistakes(with_fallbacks(a=["b", "c"], b=["c"], c=[])))

    def test_a_long_chain(self) -> None:
        """A thousand models one behind the other are followed without recursion."""
        chain = {f"m{i}": [f"m{i + 1}"] for i in range(300)} | {"m300": ["m0"]}
        self.assertEqual(1, len(mistakes(with_fallbacks(**chain))))

    def test_the_same_twice(self) -> None:
        """A chain has each model once, and each (backend, model) once; :latest is the same model."""
        self.assertEqual(
            ["models.a.fallback[1]"], [found.key for found in mistakes(with_fallbacks(a=["b", "b"], b=[]))]
        )
        (found,) = mistakes(with_fallbacks(a=["b", "b"], b=[]))
        self.assertEqual("'b' stands in this chain already", found.problem)
        for other in ("a-weights", "a-weights:latest"):
            with self.subTest(other):
                text = with_fallbacks(a=["b"], b=[]).replace('"b-weights"', f'"{other}"')
                self.assertEqual(["models.a.fallback[0]"], [found.key for found in mistakes(text)])
        text = with_fallbacks(a=["b", "c"], b=[], c=[]).replace('"c-weights"', '"b-weights"')
        self.assertEqual(["models.a.fallback[1]"], [found.key for found in mistakes(text)])
        text = text.replace('"ollama"\nmodel', '"nowhere"\nmodel')
        self.assertEqual({"models.a.backend", "models.b.backend", "models.c.backend"}, {m.key for m in mistakes(text)})
        text = with_fallbacks(a=["b"], b=[]).replace('"ollama"\nmodel', '"llamacpp"\nmodel')
        self.assertEqual([], mistakes(text.replace('"b-weights"', '"a-weights:latest"')))
        text = with_fallbacks(a=["b"], b=[]).replace('"ollama"\nmodel = "b-weights"', '"llamacpp"\nmodel = "a-weights"')
        self.assertEqual([], mistakes(text))

    def test_aliases_collide(self) -> None:
        """An alias is nobody else's name and nobody else's alias."""
        table = {
            'aliases = ["a"]': "models.c.aliases[0]",
            'aliases = ["c"]': "models.c.aliases[0]",
            'aliases = ["x", "x"]': "models.c.aliases[1]",
        }
        for line, key in table.items():
            with self.subTest(line):
                self.assertEqual([key], [found.key for found in mistakes(ABC + line)])
        text = ABC.replace("[models.b]", '[models.b]\naliases = ["x"]') + 'aliases = ["x"]'
        self.assertEqual(["models.c.aliases[0]"], [found.key for found in mistakes(text)])


class Syntax(unittest.TestCase):
    """A file that is no TOML."""

    def test_position(self) -> None:
        """A slip in the syntax is told with its line and column."""
        table = {
            "[server]\nport 1": "line 2, column 6: not TOML: ",
            'a = "x': "line 1, column 7: not TOML: ",
            "[server]\na = [": "line 2, column 6: not TOML: ",
            "[a]\n[a]": "line 2, column 3: not TOML: ",
        }
        for text, start in table.items():
            with self.subTest(text):
                (found,) = mistakes(text)
                self.assertEqual(start, found.problem[: len(start)])

    def test_python_s_own_limits(self) -> None:
        """Numbers and nestings that Python refuses are mistakes, not tracebacks."""
        for text in (f"a = {'9' * 5000}", f"a = {'[' * 100_000}"):
            with self.subTest(text[:10]):
                self.assertEqual(1, len(mistakes(text)))

    def test_not_utf8(self) -> None:
        """Bytes that are no UTF-8 are told with their place."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "m.toml")
            path.write_bytes(b"# \xc3\xa4\nx = '\xff'\n")
            with self.assertRaises(ConfigError) as caught:
                config.load(str(path), {})
        self.assertIn("line 2, column 6: not UTF-8 (byte 0xff)", str(caught.exception))


class Warnings(unittest.TestCase):
    """Valid, and still likely to hurt."""

    @staticmethod
    def keys(text: str) -> list[str]:
        return [warning.split(": ")[0] for warning in parsed(text).warnings]

    def test_one_family(self) -> None:
        """A chain inside one family is warned of, with the chain; a mixed or unnamed one is not."""
        text = with_fallbacks(a=["b", "c"], b=[], c=[])
        families = text.replace("fallback", 'family = "Qwen"\nfallback')
        self.assertEqual(["models.a.fallback"], self.keys(families))
        self.assertIn("a -> b -> c is all Qwen", parsed(families).warnings[0])
        self.assertEqual([], self.keys(families.replace('"Qwen"', '"llama"', 1)))
        self.assertEqual(["models.a.fallback"], self.keys(families.replace('"Qwen"', '"qwen"', 1)))
        self.assertEqual([], self.keys(text))

    def test_windows(self) -> None:
        """Two names with different num_ctx on one Ollama model are warned of; on another kind they aren't."""
        text = BACKENDS + "".join(
            f'[models.{n}]\nbackend = "ollama"\nmodel = "x"\nnum_ctx = {c}\n' for n, c in ("a1", "b2")
        )
        self.assertEqual(["models.b.num_ctx"], self.keys(text))
        self.assertEqual(["models.b.num_ctx"], self.keys(text.replace("num_ctx = 2", "")))
        self.assertIn("not set here, 1 in a", parsed(text.replace("num_ctx = 2", "")).warnings[0])
        self.assertEqual(["models.b.num_ctx"], self.keys(text.replace('"x"', '"x:latest"', 1)))
        self.assertEqual([], self.keys(text.replace("num_ctx = 2", "num_ctx = 1")))
        self.assertEqual([], self.keys(text.replace('backend = "ollama"', 'backend = "llamacpp"')))

    def test_no_effect(self) -> None:
        """What can have no effect is warned of."""
        openai = BACKENDS + '[models.a]\nbackend = "llamacpp"\nmodel = "x"\nnum_ctx = 5\n'
        self.assertEqual([], self.keys(openai))
        self.assertEqual(["models.a.prefer_warm"], self.keys(openai + "prefer_warm = true"))
        chain = with_fallbacks(b=[], a=["b"])
        self.assertEqual(["models.a.fallback"], self.keys(chain + "strict = true"))
        self.assertEqual(["models.a.fallback"], self.keys(chain + 'capabilities = ["embedding"]'))
        self.assertEqual([], self.keys(chain + 'capabilities = ["embedding", "tools"]'))

    def test_timeouts(self) -> None:
        """A timeout beyond the total is warned of where both are set; a default gives way silently."""
        for name in ("connect", "load", "first_token", "idle"):
            with self.subTest(name):
                self.assertEqual([f"models.a.timeouts.{name}"], self.keys(f"{A}timeouts = {{ {name} = 9, total = 8 }}"))
                self.assertEqual([], self.keys(f"{A}timeouts = {{ {name} = 8, total = 8 }}"))
        self.assertEqual([], self.keys(A + "timeouts = { total = 1 }"))
        self.assertEqual([], self.keys(A + "timeouts = { first_token = 3000 }"))

    @unittest.skipUnless(os.name == "posix", "file modes")
    def test_readable_keys(self) -> None:
        """A file that others may read and that holds a key itself is warned of."""
        keys = {
            "server.api_keys[1]": f'{A}[server]\napi_keys = ["env:K", "sk-1"]',
            "backends.llamacpp.api_key": A.replace('8080/v1"', '8080/v1"\napi_key = "sk-1"'),
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "m.toml")
            for key, text in keys.items():
                for mode, expected in ((0o600, []), (0o640, [key]), (0o604, [key])):
                    with self.subTest(key=key, mode=oct(mode)):
                        path.write_text(text, "utf-8")
                        path.chmod(mode)
                        got = config.load(str(path), {"K": "v"}).warnings
                        self.assertEqual(expected, [warning.split(": ")[0] for warning in got])
            path.write_text(f'{A}[server]\napi_keys = ["env:K"]', "utf-8")
            self.assertEqual((), config.load(str(path), {"K": "v"}).warnings)


class Folder(unittest.TestCase):
    """A test with a folder of its own."""

    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        return str(path)


class Finding(Folder):
    """Where the file is looked for."""

    def test_order(self) -> None:
        """--config, then $PORTWAY_CONFIG, then the XDG folder, then ~/.config, then the shipped file."""
        xdg = self.write("xdg/portway/models.toml", A)
        home = self.write("home/.config/portway/models.toml", A)
        environ = {
            "PORTWAY_CONFIG": "/x/env",
            "XDG_CONFIG_HOME": str(self.folder / "xdg"),
            "HOME": str(self.folder / "home"),
        }
        self.assertEqual("/x/opt", config.find("/x/opt", environ))
        self.assertEqual("/x/env", config.find(None, environ))
        self.assertEqual(xdg, config.find(None, environ | {"PORTWAY_CONFIG": ""}))
        for other in ("", "relative"):
            self.assertEqual(home, config.find(None, environ | {"PORTWAY_CONFIG": "", "XDG_CONFIG_HOME": other}))
        self.assertEqual(str(SHIPPED), config.find(None, {"HOME": str(self.folder)}))

    def test_a_broken_link_is_not_passed_over(self) -> None:
        """The user's own file that leads nowhere is a mistake, not a reason to use the shipped one."""
        own = self.folder / "portway" / "models.toml"
        own.parent.mkdir()
        own.symlink_to("nowhere")
        with self.assertRaises(ConfigError):
            config.load(None, {"XDG_CONFIG_HOME": str(self.folder)})

    def test_unreadable(self) -> None:
        """A file that can't be read says so, with the path and the reason."""
        for path in (str(self.folder / "none"), str(self.folder), "/dev/null/x"):
            with self.subTest(path):
                with self.assertRaises(ConfigError) as caught:
                    config.load(path, {})
                self.assertRegex(str(caught.exception), f"^{re.escape(path)}: 1 mistake\n  can't be read: [A-Z]")

    def test_from_a_zipapp(self) -> None:
        """The shipped file is found and read where Portway is a zip archive, and a user's file still is."""
        archive = self.folder / "portway.pyz"
        with zipfile.ZipFile(archive, "w") as out:
            for name in ("__init__.py", "config.py", "errors.py", "fields.py", "keys.py", "panels.py"):
                out.write(ROOT / "portway" / name, f"portway/{name}")
            out.write(SHIPPED, "portway/models.toml")
        self.check_installed(str(archive), str(archive / "portway" / "models.toml"))

    def test_from_a_wheel(self) -> None:
        """The shipped file is found beside the package where it was installed."""
        for name in ("__init__.py", "config.py", "errors.py", "fields.py", "keys.py", "panels.py"):
            self.write(f"site/portway/{name}", (ROOT / "portway" / name).read_text("utf-8"))
        shipped = self.write("site/portway/models.toml", SHIPPED.read_text("utf-8"))
        self.write("site/config/models.toml", A)  # somebody else's
        self.check_installed(str(self.folder / "site"), shipped)

    def check_installed(self, place: str, shipped: str) -> None:
        own = self.write("own.toml", A)
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); from portway import config as c\n"
            "print(c.find(None, {'HOME': '/none'}))\n"
            "print(len(c.load(None, {'HOME': '/none'}).models), len(c.load(sys.argv[2], {}).models))"
        )
        command = [sys.executable, "-I", "-S", "-c", program, place, own]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        self.assertEqual((f"{shipped}\n9 1\n", ""), (done.stdout, done.stderr))


class Watching(Folder):
    """ConfigWatcher: the file's changes, each once."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.write("m.toml", A)
        self.watcher = ConfigWatcher(self.path, {})
        self.watcher.reload()

    def polls(self, count: int = 3) -> list[Config | ConfigError]:
        """What some seconds of polling bring, without what is None."""
        found: list[Config | ConfigError] = []
        for _ in range(count):
            try:
                got = self.watcher.poll()
            except ConfigError as error:
                found.append(error)
            else:
                found += [got] if got is not None else []
        return found

    def test_unchanged(self) -> None:
        """A file that stays as it is brings nothing."""
        self.assertEqual([], self.polls())
        self.assertFalse(self.watcher.changed())

    def test_written_in_place(self) -> None:
        """A file that was written anew is read, once."""
        self.write("m.toml", ABC)
        (got,) = self.polls()
        self.assertEqual(["a", "b", "c"], list(got.models) if isinstance(got, Config) else got)
        self.assertEqual([], self.polls())

    def test_replaced(self) -> None:
        """A file of the same size and time that was renamed over the old one is read."""
        status = os.stat(self.path)
        other = self.write("new.toml", A.replace("models.a", "models.z"))
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(other, self.path)
        (got,) = self.polls()
        self.assertEqual(["z"], list(got.models) if isinstance(got, Config) else got)

    def test_still_being_written(self) -> None:
        """A file is left alone until it looks the same twice."""
        for count in range(1, 5):
            self.write("m.toml", ABC + "#" * count)
            self.assertFalse(self.watcher.changed())
        self.assertTrue(self.watcher.changed())

    def test_missing_for_a_moment(self) -> None:
        """A file that is away changes nothing, and is read when it comes back changed."""
        os.remove(self.path)
        self.assertEqual([], self.polls())
        self.write("m.toml", ABC)
        self.assertEqual(1, len(self.polls()))

    def test_broken_once(self) -> None:
        """A content that is no good is told once, however often it is touched; the next good one is taken."""
        self.write("m.toml", "[")
        (error,) = self.polls()
        self.assertIsInstance(error, ConfigError)
        os.utime(self.path, ns=(1, 1))
        self.assertEqual([], self.polls())
        self.write("m.toml", "[[")
        self.assertEqual(1, len(self.polls()))
        self.write("m.toml", A)
        (got,) = self.polls()
        self.assertIsInstance(got, Config)

    def test_unreadable_once(self) -> None:
        """A file that can't be read any more is told once."""
        os.remove(self.path)
        os.mkdir(self.path)
        (error,) = self.polls(5)
        self.assertIsInstance(error, ConfigError)

    def test_touched(self) -> None:
        """A file that was only touched brings nothing."""
        os.utime(self.path, ns=(1, 1))
        self.assertEqual([], self.polls())

    def test_sighup(self) -> None:
        """reload() reads at once, changed or not, and tells a broken file each time."""
        self.write("m.toml", ABC)
        self.assertEqual(3, len(self.watcher.reload().models))
        self.assertEqual([], self.polls())
        self.write("m.toml", "[")
        for _ in range(2):
            self.assertRaises(ConfigError, self.watcher.reload)
        self.assertEqual([], self.polls())

    def test_own_file_comes_and_goes(self) -> None:
        """The user's file is taken when it appears; when it goes, the shipped one is not."""
        environ = {"XDG_CONFIG_HOME": str(self.folder)}
        self.watcher = ConfigWatcher(None, environ)
        self.assertEqual(str(SHIPPED), self.watcher.reload().path)
        own = self.write("portway/models.toml", A)
        (got,) = self.polls()
        self.assertEqual(own, got.path)
        os.remove(own)
        self.assertEqual([], self.polls())
        self.write("portway/models.toml", ABC)
        (got,) = self.polls()
        self.assertEqual(own, got.path)


class Shipped(unittest.TestCase):
    """config/models.toml itself."""

    # the dataclass, where its options stand in the file, and the fields that are derived
    SECTIONS: tuple[tuple[type[Any], str, set[str]], ...] = (
        (config.Server, "server", set()),
        (config.Cooldown, "cooldown", set()),
        (config.Backend, "backends.ollama", {"name", "scheme", "host", "port", "base"}),
        (config.Model, "models.fast-9b", {"name", "timeouts", "panel"}),
        (config.Timeouts, "models.fast-9b.timeouts", set()),
        (config.Log, "log", set()),
        (config.Cache, "cache", set()),
        (config.Price, "price", set()),
        (config.Memory, "memory", set()),
    )

    def options(self) -> dict[str, dict[str, str]]:
        """section -> option -> what its comment states as the default."""
        found: dict[str, dict[str, str]] = {}
        for line in SHIPPED.read_text("utf-8").splitlines():
            if header := re.match(r"\[([a-z0-9.-]+)\]", line):
                section = found.setdefault(header[1], {})
            elif option := re.match(
                r"(?:# )?([a-z_]+) = .*?\s# (?:default (.+?)|(required))(?: s| [a-z][a-z ]*)?(?:;|$)", line
            ):
                section[option[1]] = option[2] or option[3]
        return found

    def test_valid(self) -> None:
        """It is valid, without a warning, and has the models it promises."""
        got = config.load(str(SHIPPED), {})
        self.assertEqual((), got.warnings)
        self.assertEqual(
            ["fast-9b", "fast-3b", "fast-1b", "think-9b", "coder-30b", "heavy", "embed", "council", "cascade"],
            list(got.models),
        )
        self.assertEqual(3, len({model.family for model in got.chain(got.models["fast-9b"])}))
        self.assertEqual((900.0, 30.0), (got.models["fast-9b"].keep_alive, got.models["coder-30b"].keep_alive))
        self.assertEqual("openai", got.models["heavy"].backend.kind)
        self.assertIs(got.models["fast-9b"], got.resolve("gpt-4o-mini"))

    def test_every_option_with_its_default(self) -> None:
        """Every option stands in it, and the default in its comment is the true one."""
        options = self.options()
        for owner, section, derived in self.SECTIONS:
            names = {item.name for item in dataclasses.fields(owner)} - derived
            self.assertEqual(names, set(options[section]), section)
            for item in dataclasses.fields(owner):
                if item.name in names:
                    with self.subTest(section=section, option=item.name):
                        self.assertEqual(
                            self.default(item), self.stated(section, item.name, options[section][item.name])
                        )

    def default(self, item: dataclasses.Field[Any]) -> object:
        if item.default_factory is not dataclasses.MISSING:
            return item.default_factory()
        return "required" if item.default is dataclasses.MISSING else item.default

    def stated(self, section: str, option: str, text: str) -> object:
        """The default that a comment states, read as the option itself would be."""
        if text in ("none", "required"):
            return {"none": "" if option in ("family", "flag") else None}.get(text, text)
        return fields.Reader().value(self.table(section).fields[option], tomllib.loads(f"x = {text}")["x"], option)

    def table(self, section: str, kind: str = "") -> fields.Table:
        """What may stand in a section; in one of models, in that of a kind."""
        found: Any = config.schema({})
        for part in section.split("."):
            found = found.item if isinstance(found, fields.Named) else found.fields[part]
            found = found.tables[kind] if isinstance(found, fields.Tagged) else found
        assert isinstance(found, fields.Table)
        return found

    def test_every_option_can_be_set(self) -> None:
        """What the dataclasses hold and what the file may hold are the same."""
        for owner, section, derived in self.SECTIONS:
            names = {item.name for item in dataclasses.fields(owner)} - (derived - {"timeouts"})
            self.assertEqual(names, set(self.table(section).fields), section)

    def test_options_of_pseudo_models(self) -> None:
        """A council's and a cascade's options can all be set, stand in it, and have the defaults it states."""
        aside = {"kind", "timeouts", "aliases", "flag", "default"}
        options = self.options()
        options["models.cascade"] = {**options["models.council"], **options["models.cascade"]}
        for owner, kind in ((panels.Council, "council"), (panels.Cascade, "cascade")):
            table = self.table(f"models.{kind}", kind)
            self.assertEqual({item.name for item in dataclasses.fields(owner)} | aside, set(table.fields))
            for item in dataclasses.fields(owner):
                with self.subTest(kind=kind, option=item.name):
                    text = options[f"models.{kind}"][item.name]
                    stated: object = {"none": None, "required": "required"}.get(text, text.strip('"'))
                    self.assertEqual(self.default(item), stated)

    def test_commented_options_are_valid(self) -> None:
        """What is commented out is right as it stands, once the # is taken away."""
        text = re.sub(r"^# ([a-z_]+ = )", r"\1", SHIPPED.read_text("utf-8"), flags=re.MULTILINE)
        self.assertNotEqual(SHIPPED.read_text("utf-8"), text)
        self.assertEqual([], mistakes(text, {"NAME": "k"}))

    def test_width(self) -> None:
        """No line is longer than 120 characters."""
        self.assertLessEqual(max(map(len, SHIPPED.read_text("utf-8").splitlines())), 120)


if __name__ == "__main__":
    unittest.main()
