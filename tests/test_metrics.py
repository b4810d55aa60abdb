"""metrics.py: the page as Prometheus' own parser reads it."""

import math
import threading
import unittest
from typing import Any

from portway.metrics import LATENCY, Metrics, Reading
from portway.telemetry import Record

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
        self.assertEqual(found['portway_request_duration_seconds_count{model="other"}'], 0)
        self.assertEqual(found['portway_tokens_total{model="m",kind="prompt"}'], 3)
        self.assertEqual(found['portway_tokens_total{model="m",kind="completion"}'], 5)

    def test_readings_are_taken_at_each_scrape(self):
        """Numbers and mappings, also those that are no finite number."""
        queue = [3]
        readings = [
            Reading("queued_requests", "Waiting.", lambda: queue[0]),
            Reading("loaded_model", "Loaded.", lambda: {"fast-9b": 1, 'a"b\\c\nd': 0}),
            Reading("log_dropped_lines_total", "Lost.", lambda: math.inf, kind="counter"),
        ]
        metrics = Metrics([], readings)
        self.assertEqual(samples(metrics)["portway_queued_requests"], 3)
        queue[0] = 4
        page = metrics.render().decode()
        self.assertIn("\nportway_queued_requests 4\n", page)
        self.assertIn('\nportway_loaded_model{model="a\\"b\\\\c\\nd"} 0\n', page)
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


if __name__ == "__main__":
    unittest.main()
