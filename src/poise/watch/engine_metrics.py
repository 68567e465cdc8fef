"""What an engine's ``/metrics`` says about its own speed: vLLM's and SGLang's names, in one shape.

Read in vLLM 0.32 (``v1/metrics/loggers.py``) and SGLang 0.5.x (``observability/metrics_collector.py``). Counters, and
the sums and counts of histograms, only grow until the engine is started anew: what matters is how they differ between
two scrapes. Series of several ranks and models of one engine are added up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from poise.util.errors import TraceError

MAX_LINES = 200_000
"""Lines of a scrape that are read at most."""
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(\{.*\})?[ \t]+([^ \t]+)(?:[ \t]+-?[0-9]+)?[ \t]*")


@dataclass(frozen=True, slots=True)
class MetricNames:
    """How an engine calls what is read; the first name that a scrape has counts.

    Parameters
    ----------
    running : gauge, requests that run.
    generated, prompt : counters of tokens.
    gap : histogram of seconds between two tokens of a request (TPOT); the older name after the newer.
    balance : summary of mean over fullest rank, 0 to 1; "": the engine has none.
    """

    running: str
    generated: str
    prompt: str
    gap: tuple[str, ...]
    balance: str = ""


NAMES: dict[str, MetricNames] = {
    "vllm": MetricNames(
        "vllm:num_requests_running",
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    ),
    "sglang": MetricNames(
        "sglang:num_running_reqs",
        "sglang:generation_tokens_total",
        "sglang:prompt_tokens_total",
        ("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
        "sglang:eplb_balancedness",
    ),
}
START = "process_start_time_seconds"
"""Of every Prometheus client that runs alone; with several processes (SGLang's) it is not there."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading of an engine.

    Parameters
    ----------
    at_s : when, seconds.
    engine : a name of :data:`NAMES`.
    running : requests that run now.
    counters : what only grows, by name: ``generated``, ``prompt``, ``gap_sum`` (seconds), ``gap_count``, and where the
        engine has them ``balance_sum``, ``balance_count``.
    started_s : when the engine's process began; None: it does not say.
    """

    at_s: float
    engine: str
    running: float
    counters: Mapping[str, float]
    started_s: float | None = None


def read_scrape(text: bytes, at_s: float) -> Scrape:
    """One ``/metrics`` answer in Prometheus' text format; OpenMetrics' ends the same lines with more, which is left.

    Parameters
    ----------
    text : the answer.
    at_s : when it came, seconds.

    Raises
    ------
    TraceError : it is not such text, is too long, or has not the metrics of an engine that is known.
    """
    sums = _sums(text)
    found = [name for name, known in NAMES.items() if known.running in sums]
    if len(found) != 1:
        what = " and ".join(found) or "no engine that is known"
        raise TraceError(
            f"metrics of {what}: neither {' nor '.join(one.running for one in NAMES.values())} alone is there",
            hint="is it the engine's own /metrics? SGLang has it with --enable-metrics",
        )
    engine = found[0]
    known = NAMES[engine]
    gap = next((one for one in known.gap if f"{one}_count" in sums), known.gap[0])
    sources = {
        "generated": known.generated,
        "prompt": known.prompt,
        "gap_sum": f"{gap}_sum",
        "gap_count": f"{gap}_count",
    }
    if known.balance:
        sources |= {"balance_sum": f"{known.balance}_sum", "balance_count": f"{known.balance}_count"}
    counters = {name: sums[source] for name, source in sources.items() if source in sums}
    return Scrape(at_s, engine, sums[known.running], counters, sums.get(START))


def _sums(text: bytes) -> dict[str, float]:
    """The samples of every name that is asked for, added up over their labels."""
    asked = {START}
    for known in NAMES.values():
        asked |= {known.running, known.generated, known.prompt}
        asked |= {f"{one}_{part}" for one in (*known.gap, known.balance) if one for part in ("sum", "count")}
    try:
        lines = text.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise TraceError("metrics are not UTF-8 text", hint="is it the engine's /metrics?") from None
    if len(lines) > MAX_LINES:
        raise TraceError(f"metrics of {len(lines)} lines, at most {MAX_LINES} are read")
    out: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        name = re.split(r"[{ \t]", line, maxsplit=1)[0]
        if name not in asked:
            continue
        found = _SAMPLE.fullmatch(line.split(" # ", 1)[0].rstrip("\r"))
        try:
            value = float("nan") if found is None else float(found[3])
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise TraceError(f"line {number}: {line[:80]!r} is no sample of a count")
        out[name] = out.get(name, 0.0) + value
        if not math.isfinite(out[name]):
            raise TraceError(f"line {number}: the samples of {name} add up to {out[name]}, beyond any count")
    return out
