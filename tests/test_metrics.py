"""metrics.py: the page as Prometheus' own parser reads it."""

import math
import re
import shutil
import subprocess
import threading
import unittest
from typing import Any
from unittest import mock

from portway import __version__
from portway.metrics import LATENCY, Metrics, Reading
from portway.standin.server import StandIn
from portway.telemetry import Record
from tests.cached import ASKED
from tests.daemon import ROOT, Daemon
from tests.doubles import RawClient
from tests.llama_server import wait_for
from tests.targets import CHAT

try:
    from prometheus_client.parser import text_string_to_metric_families
except ImportError:
    text_string_to_metric_families = None  # type: ignore[assignment]


def a_record(**fields: Any) -> Record:
    """A request answered in a second and a half."""
    model = fields.pop("model", "fast-9b")
    given = {"model": model, "served_by": model, "status": 200, "ended": 101.5, **fields}
    return Record(1795000000.0, 100.0, **given)


def samples(metrics: Metrics) -> dict[str, float]:
    """The page's samples as they stand, without the parser's help."""
    lines = [text for text in metrics.render().decode().splitlines() if not text.startswith("#")]
    return {name: float(value) for name, value in (text.rsplit(" ", 1) for text in lines)}


class Page(unittest.TestCase):
    def test_requests_by_how_they_ended(self):
        """Status class, cache and demotion, for configured models and one other."""
        metrics = Metrics(["fast-9b", "fast-1b"])
        for fields in (
            {},
            {},
            {"cache_hit": True},
            {"served_by": "fast-1b", "cache_hit": False},
            {"status": 404},
            {"status": 200, "error": "stream_broken"},
            {"cancelled_in": "answer"},
            {"model": "nobody's", "served_by": ""},
        ):
            metrics.observe(a_record(**fields))
        name = 'portway_requests_total{model="%s",status="%s",cache="%s",demoted="%s"}'
        found = {text: value for text, value in samples(metrics).items() if text.startswith("portway_requests_total")}
        expected = {
            name % ("fast-9b", "2xx", "none", "false"): 2,
            name % ("fast-9b", "2xx", "hit", "false"): 1,
            name % ("fast-9b", "2xx", "miss", "true"): 1,
            name % ("fast-9b", "4xx", "none", "false"): 1,
            name % ("fast-9b", "5xx", "none", "false"): 1,
            name % ("fast-9b", "cancelled", "none", "false"): 1,
            name % ("other", "2xx", "none", "false"): 1,
        }
        self.assertEqual(found, expected)

    def test_asks_exit_codes_are_not_http_classes(self):
        """Its 2 is a 404, its 4 a backend's failure, its 130 a client that left."""
        metrics = Metrics(["m"])
        rows = ((404, 2, None), (502, 4, None), (502, 1, None), (200, 130, "answer"), (200, 0, None))
        for status, code, left in rows:
            metrics.observe(a_record(model="m", status=status, exit_code=code, cancelled_in=left))
        found = {text.split('status="')[1][:3]: value for text, value in samples(metrics).items() if "status=" in text}
        self.assertEqual({"4xx": 1, "5xx": 2, "can": 1, "2xx": 1}, found)

    def test_histograms_are_cumulative_and_bounds_inclusive(self):
        """A value on a bound is within it; what is beyond all is in +Inf alone."""
        metrics = Metrics(["m"])
        for seconds in (0.5, 1.0, 1.0001, 1e6, -1.0):
            metrics.observe(a_record(model="m", ended=100.0 + seconds))
        found = samples(metrics)
        name = 'portway_request_duration_seconds_bucket{model="m",le="%s"}'
        counts = [found[name % bound] for bound in (LATENCY[0], 0.25, 0.5, 1.0, 2.5, 600.0, "+Inf")]
        self.assertEqual(counts, [1, 1, 2, 3, 4, 4, 5])
        self.assertEqual(found['portway_request_duration_seconds_count{model="m"}'], 5)
        self.assertAlmostEqual(found['portway_request_duration_seconds_sum{model="m"}'], 1000002.5001)

    def test_what_was_not_measured_is_not_counted(self):
        """A plain answer has no first token; a request without a model no times at all."""
        metrics = Metrics(["m"])
        metrics.observe(a_record(model="m"))
        metrics.observe(a_record(model="m", first=100.5, waited=1.4995, prompt_tokens=3, completion_tokens=5))
        metrics.observe(a_record(model="", served_by=""))
        found = samples(metrics)
        self.assertEqual(found['portway_time_to_first_token_seconds_count{model="m"}'], 1)
        self.assertEqual(found['portway_time_to_first_token_seconds_sum{model="m"}'], 0.5)
        self.assertEqual(found['portway_overhead_seconds_count{model="m"}'], 1)
        self.assertAlmostEqual(found['portway_overhead_seconds_sum{model="m"}'], 0.0005)
        metrics.observe(a_record(model="m", waited=9.0))  # by two clocks a wait may seem longer than the whole
        self.assertAlmostEqual(samples(metrics)['portway_overhead_seconds_sum{model="m"}'], 0.0005)
        self.assertEqual(found['portway_request_duration_seconds_count{model="other"}'], 0)
        self.assertEqual(found['portway_tokens_total{model="m",kind="prompt"}'], 3)
        self.assertEqual(found['portway_tokens_total{model="m",kind="completion"}'], 5)

    def test_readings_are_taken_at_each_scrape(self):
        """Numbers and mappings, also those that are no finite number."""
        queue = [3]
        readings = [
            Reading("queued_requests", "Waiting.", lambda: queue[0]),
            Reading(
                "loaded_model", "Loaded.", lambda: {("a", "fast-9b"): 1, ("b", 'a"b\\c\nd'): 0}, ("backend", "model")
            ),
            Reading("log_dropped_lines_total", "Lost.", lambda: math.inf, kind="counter"),
        ]
        metrics = Metrics([], readings)
        self.assertEqual(samples(metrics)["portway_queued_requests"], 3)
        queue[0] = 4
        page = metrics.render().decode()
        self.assertIn("\nportway_queued_requests 4\n", page)
        self.assertIn('\nportway_loaded_model{backend="b",model="a\\"b\\\\c\\nd"} 0\n', page)
        self.assertIn("\nportway_log_dropped_lines_total +Inf\n", page)

    def test_another_configuration(self):
        """A new model begins; one that is gone keeps its counters."""
        metrics = Metrics(["old"])
        metrics.observe(a_record(model="old"))
        metrics.use(["new"])
        metrics.use(["old", "new"])
        metrics.observe(a_record(model="new"))
        name = 'portway_request_duration_seconds_count{model="%s"}'
        self.assertEqual([samples(metrics)[name % model] for model in ("old", "new")], [1, 1])

    def test_no_count_is_lost_between_threads(self):
        """Nor is a page ever out of itself: +Inf is the count."""
        metrics, go = Metrics(["m"]), threading.Event()

        def observe() -> None:
            go.wait()
            for _ in range(2000):
                metrics.observe(a_record(model="m"))

        threads = [threading.Thread(target=observe) for _ in range(4)]
        for thread in threads:
            thread.start()
        go.set()
        while any(thread.is_alive() for thread in threads):
            found = samples(metrics)
            count = found['portway_request_duration_seconds_count{model="m"}']
            requests = found.get('portway_requests_total{model="m",status="2xx",cache="none",demoted="false"}', 0.0)
            self.assertEqual(count, requests)
        for thread in threads:
            thread.join()
        self.assertEqual(samples(metrics)['portway_request_duration_seconds_count{model="m"}'], 8000)


@unittest.skipIf(text_string_to_metric_families is None, "prometheus_client is not installed")
class Parsed(unittest.TestCase):
    def test_the_official_parser_reads_the_page(self):
        """Types, help, labels with every awkward character, and histograms that add up."""
        awkward = 'a "quoted" \\ back\nslash \u00e9'
        readings = [
            Reading("in_flight_requests", "Now.\nAnd a \\ in it.", lambda: 2),
            Reading("log_dropped_lines_total", "Lost.", lambda: 1, kind="counter"),
        ]
        metrics = Metrics([awkward, "m"], readings)
        metrics.observe(a_record(model=awkward, first=100.5, waited=1.0, completion_tokens=3, cache_hit=False))
        page = metrics.render().decode("utf-8")
        families = {family.name: family for family in text_string_to_metric_families(page)}
        kinds = {name: family.type for name, family in families.items()}
        expected = {
            "portway_requests": "counter",
            "portway_tokens": "counter",
            "portway_request_duration_seconds": "histogram",
            "portway_time_to_first_token_seconds": "histogram",
            "portway_overhead_seconds": "histogram",
            "portway_in_flight_requests": "gauge",
            "portway_log_dropped_lines": "counter",
        }
        self.assertEqual(kinds, expected)
        labels = families["portway_requests"].samples[0].labels
        self.assertEqual(labels, {"model": awkward, "status": "2xx", "cache": "miss", "demoted": "false"})
        for name in ("request_duration", "time_to_first_token", "overhead"):
            found = [each for each in families[f"portway_{name}_seconds"].samples if each.labels["model"] == awkward]
            buckets = [each.value for each in found if each.name.endswith("_bucket")]
            self.assertEqual(buckets, sorted(buckets))
            self.assertEqual(buckets[-1], 1)
            self.assertEqual([each.value for each in found if each.name.endswith("_count")], [1])


class OfADaemon(unittest.TestCase):
    """The page as Prometheus gets it."""

    MEMORY = '[memory]\nbudget = "40GB"\n'

    def setUp(self) -> None:
        self.backend = self.enterContext(StandIn())
        toml = f'{self.MEMORY}[backends.box]\nkind = "ollama"\nurl = "{self.backend.url}"\nmax_parallel = 1\n'
        toml += f'[backends.idle]\nkind = "ollama"\nurl = "{self.backend.url}/"\n'
        self.daemon = self.enterContext(
            Daemon(f'{toml}[models.three]\nbackend = "box"\nmodel = "llama3.2:3b"\nnum_ctx = 4096\n')
        )
        self.client = self.enterContext(self.daemon.client())

    def ask(self, client: RawClient) -> None:
        client.request("POST", CHAT, {"model": "three", "messages": [{"role": "user", "content": "Hello"}]})

    def page(self) -> str:
        response = self.client.call("GET", "/metrics")
        self.assertEqual("text/plain; version=0.0.4; charset=utf-8", response.header("content-type"))
        return response.body.decode()

    def value(self, sample: str) -> float | None:
        values = [line.rsplit(" ", 1)[1] for line in self.page().splitlines() if line.rsplit(" ", 1)[0] == sample]
        return float(values[0]) if values else None

    def test_an_answer_that_is_just_out(self) -> None:
        """It counts, although counting is put off until nobody waits for it."""
        with mock.patch("portway.loop.REST", 60.0):
            for count in (1.0, 2.0):
                self.ask(self.client)
                self.client.response()
                served = 'portway_requests_total{model="three",status="2xx",cache="none",demoted="false"}'
                self.assertEqual(count, self.value(served))

    def test_what_is_loaded_and_what_waits(self) -> None:
        """Each model with its backend and its bytes; the requests that wait for a backend; the rest of the numbers."""
        self.backend.fail("/api/chat", "hang")
        with self.daemon.client() as first, self.daemon.client() as second:
            self.ask(first)
            self.assertTrue(
                self.backend.wait_for(lambda _: any(each.phase == "hang" for each in self.backend.requests))
            )
            self.ask(second)
            wait_for(lambda: self.value('portway_backend_queue{backend="box"}') == 1, "its waiting")
            self.assertEqual(0, self.value('portway_backend_queue{backend="idle"}'))
            self.assertEqual(3, self.value("portway_in_flight"))
            self.assertEqual(3, self.value("portway_connections"))
            self.backend.release()
            for client in (first, second):
                self.assertEqual(200, client.response().status)
        loaded = 'portway_loaded_model_bytes{backend="box",model="llama3.2:3b"}'
        wait_for(lambda: (self.value(loaded) or 0) >= 2e9, "its size", self.page)
        counted = 'portway_requests_total{model="three",status="2xx",cache="none",demoted="false"}'
        wait_for(lambda: self.value(counted) == 2, "their being counted")
        self.assertEqual(1, self.value(f'portway_build_info{{version="{__version__}"}}'))
        self.assertGreater(self.value("portway_start_time_seconds") or 0, 1.7e9)

    def test_scraping_wakes_no_model(self) -> None:
        """Neither one that is loaded nor one that is not."""
        for asked in (0, 1):
            for _ in range(20):
                self.page()
            waking = [each.path for each in self.backend.requests if each.path in ASKED]
            self.assertEqual(["/api/chat"] * asked, waking)
            self.ask(self.client)
            self.client.response()

    @unittest.skipIf(shutil.which("promtool") is None, "promtool is not installed")
    def test_promtool_finds_nothing_to_blame(self) -> None:
        """Prometheus' own linter, with every metric there."""
        self.ask(self.client)
        self.client.response()
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=self.page(), capture_output=True, encoding="utf-8", check=False
        )
        self.assertEqual((0, "", ""), (checked.returncode, checked.stdout, checked.stderr))

    def test_the_reference_names_every_metric(self) -> None:
        """And no other."""
        names = {line.split()[2] for line in self.page().splitlines() if line.startswith("# TYPE ")}
        self.assertEqual(names, documented_metrics())


def documented_metrics() -> set[str]:
    text = (ROOT / "docs" / "reference.md").read_text("utf-8").split("\n## Metrics\n")[1].split("\n## ")[0]
    return set(re.findall(r"`(portway_[a-z_]+)", text))


if __name__ == "__main__":
    unittest.main()
