"""Scrapes and windows: both engines' own text formats, written by Prometheus' own client; restarts; hostile text."""

import json

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.util.errors import OptionError, TraceError
from poise.watch.engine_metrics import Scrape, read_scrape
from poise.watch.helped import MapJudge
from poise.watch.metric_windows import LEAST_TOKENS, MetricWindows


class Engine:
    """The metrics of an engine with two ranks, as its own code makes them: names, types and labels."""

    def __init__(self, engine, *, old=False):
        self.registry = registry = prometheus_client.CollectorRegistry()
        labels = {"vllm": ["model_name", "engine"], "sglang": ["model_name", "tp_rank"]}[engine]
        running = {"vllm": "vllm:num_requests_running", "sglang": "sglang:num_running_reqs"}[engine]
        gap = "time_per_output_token_seconds" if old else "inter_token_latency_seconds"
        self.gauge = prometheus_client.Gauge(running, "running", labels, registry=registry)
        self.generated = prometheus_client.Counter(f"{engine}:generation_tokens", "g", labels, registry=registry)
        self.prompt = prometheus_client.Counter(f"{engine}:prompt_tokens", "p", labels, registry=registry)
        self.gap = prometheus_client.Histogram(f"{engine}:{gap}", "tpot", labels, registry=registry)
        self.balance = (
            prometheus_client.Summary("sglang:eplb_balancedness", "b", labels, registry=registry)
            if engine == "sglang"
            else None
        )

    def serve(self, rank, running, tokens, seconds, balance=0.8):
        labels = ("m", str(rank))
        self.gauge.labels(*labels).set(running)
        self.generated.labels(*labels).inc(tokens)
        self.prompt.labels(*labels).inc(3 * tokens)
        for _ in range(tokens):
            self.gap.labels(*labels).observe(seconds)
        if self.balance is not None:
            self.balance.labels(*labels).observe(balance)

    def text(self):
        return prometheus_client.generate_latest(self.registry)


@pytest.mark.parametrize(("engine", "old"), [("vllm", False), ("vllm", True), ("sglang", False), ("sglang", True)])
def test_what_an_engine_says(engine, old):
    ranks = Engine(engine, old=old)
    ranks.serve(0, 5, 100, 0.02)
    ranks.serve(1, 7, 300, 0.04)
    got = read_scrape(ranks.text(), 10.0)
    assert (got.engine, got.running, got.at_s, got.started_s) == (engine, 12.0, 10.0, None)
    want = {"generated": 400.0, "prompt": 1200.0, "gap_sum": 14.0, "gap_count": 400.0}
    want |= {"balance_sum": 1.6, "balance_count": 2.0} if engine == "sglang" else {}
    assert dict(got.counters) == pytest.approx(want)


def test_a_window_is_the_difference_of_two_scrapes():
    ranks, windows = Engine("sglang"), MetricWindows(20.0)
    ranks.serve(0, 4, 100, 0.5)
    assert windows.add(read_scrape(ranks.text(), 100.0)) == (None, False)
    ranks.serve(0, 8, 50, 0.02, balance=0.5)
    assert windows.add(read_scrape(ranks.text(), 110.0)) == (None, False)
    ranks.serve(0, 6, 150, 0.04, balance=0.7)
    window, restarted = windows.add(read_scrape(ranks.text(), 120.0))
    assert not restarted and (window.begin_s, window.end_s) == (100.0, 120.0)
    assert window.running == pytest.approx(7.0) and window.tokens_per_s == pytest.approx(10.0)
    assert window.prompt_per_s == pytest.approx(30.0) and window.balance == pytest.approx(0.6)
    assert window.tpot_s == pytest.approx((50 * 0.02 + 150 * 0.04) / 200)


def test_a_start_of_the_engine_is_in_no_window():
    windows, ranks = MetricWindows(20.0), Engine("vllm")
    ranks.serve(0, 4, 500, 0.02)
    windows.add(read_scrape(ranks.text(), 0.0))
    ranks = Engine("vllm")
    ranks.serve(0, 4, 400, 0.02)
    assert windows.add(read_scrape(ranks.text(), 30.0)) == (None, True)
    ranks.serve(0, 4, 300, 0.03)
    window, restarted = windows.add(read_scrape(ranks.text(), 55.0))
    assert not restarted and window.begin_s == 30.0 and window.tpot_s == pytest.approx(0.03)
    first = Scrape(0.0, "vllm", 1.0, {"generated": 5.0}, started_s=1.0)
    for second in (
        Scrape(1.0, "vllm", 1.0, {"generated": 9.0}, started_s=2.0),
        Scrape(1.0, "vllm", 1.0, {}, started_s=1.0),
    ):
        windows = MetricWindows(20.0)
        windows.add(first)
        assert windows.add(second) == (None, True)


def test_an_idle_window_is_none_and_time_does_not_go_back():
    windows, ranks = MetricWindows(20.0), Engine("vllm")
    ranks.serve(0, 4, 500, 0.02)
    windows.add(read_scrape(ranks.text(), 0.0))
    ranks.serve(0, 4, LEAST_TOKENS - 1, 0.02)
    assert windows.add(read_scrape(ranks.text(), 30.0)) == (None, False)
    assert windows.add(read_scrape(ranks.text(), 29.0)) == (None, False)
    ranks.serve(0, 4, LEAST_TOKENS, 0.02)
    assert windows.add(read_scrape(ranks.text(), 60.0))[0] is not None
    with pytest.raises(OptionError, match="above 0 s"):
        MetricWindows(0.0)


counts = st.one_of(st.floats(0.0, 1e4), st.floats(0.0), st.sampled_from([5e-324, 1e-300, 1e308, float("nan")]))


@given(st.lists(st.tuples(counts, counts, counts, counts, counts), min_size=3, max_size=6))
def test_whatever_numbers_come_a_window_can_be_judged(rows):
    """Extremes of floats: no window, or one of which all that is said later can be computed."""
    windows, made, names = MetricWindows(20.0), [], ("prompt", "generated", "gap_sum", "balance_sum", "balance_count")
    total = dict.fromkeys(names, 0.0)
    for at, row in enumerate(rows):
        total = {name: total[name] + more for name, more in zip(names, row, strict=True)}
        window, _ = windows.add(Scrape(30.0 * at, "vllm", row[0], {**total, "gap_count": 1e3 * at}))
        made += [] if window is None else [window]
    judge = MapJudge(made)
    for one in made:
        assert one.tpot_s > 0
        json.dumps(judge.add(one).to_json(), allow_nan=False)


@pytest.mark.parametrize("gap_s", [5e-324, float("nan"), float("inf"), 1e300])
def test_a_tpot_of_no_engine_is_no_window(gap_s):
    windows = MetricWindows(20.0)
    windows.add(Scrape(0.0, "vllm", 1.0, {"gap_sum": 0.0, "gap_count": 0.0}))
    assert windows.add(Scrape(30.0, "vllm", 1.0, {"gap_sum": gap_s, "gap_count": 1e3})) == (None, False)


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff", b"up 1\n", b"vllm:num_requests_running 1\nsglang:num_running_reqs 1\n", b"vllm:num_requests_running\n",
     b"vllm:num_requests_running NaN\n", b"vllm:num_requests_running -1\n", b"vllm:num_requests_running{a=\"b\" 1\n",
     b"vllm:num_requests_running 1e999\n", b"\n" * 200_001,
     b'vllm:num_requests_running{engine="0"} 1e308\nvllm:num_requests_running{engine="1"} 1e308\n'],
)  # fmt: skip
def test_what_is_refused(text):
    with pytest.raises(TraceError):
        read_scrape(text, 0.0)


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(more):
    try:
        got = read_scrape(b'vllm:num_requests_running{engine="0"} 3.0\n' + more, 0.0)
    except TraceError:
        return
    assert got.running >= 3.0
