"""poise demo: the main job on the routing trace that ships with the package."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

from poise import api
from poise.cli import options as o
from poise.cli.compare import show
from poise.machine.model import ModelSpec
from poise.routing.trace import RoutingTrace

OTHER = "python"
"""The domain that methods never see."""
CLUSTER, REDUNDANT, WORK = "2x4:h100", 8, 300.0
"""No clock unless one is asked for: the demo's table is the same on every machine."""
MODEL = ModelSpec(
    "experts of OLMoE-1B-7B's size", 8, tuple(range(8)), 32, 4, 2048, 1024, kv_bytes_per_token_layer=2048.0
)
"""The recorded model itself is too small to serve: its layers, experts and top-k, with the sizes of its big sister."""


def demo(
    html: Annotated[Path, o.flag("html", "Where the report goes.")] = Path("report.html"),
    cluster: o.ClusterSpec = CLUSTER,
    redundant: o.Redundant = REDUNDANT,
    tokens_per_step: o.TokensPerStep = 2048,
    time_limit: Annotated[float | None, o.flag("time_limit", "Seconds a method may take, instead of --work.")] = None,
    work: o.Work = None,
    json: o.Json = False,
) -> None:
    """Plan and compare on the trace that ships with poise: a small MoE language model on five kinds of text.

    Methods are fitted on half of the requests of four domains, and judged on the other half and on the fifth domain.
    """
    with o.errors():
        o.writable(html)
        with as_file(files("poise") / "data" / "demo_trace.npz") as path:
            trace = api.load(path)
        assert isinstance(trace, RoutingTrace)
        seen = trace.select(domains=[name for name in trace.domain_names if name != OTHER])
        fit, held_out = seen.split_requests()
        with o.progress() as report:
            result = api.compare(
                held_out, cluster, fit=fit, others={f"other domain ({OTHER})": trace.select(domains=[OTHER])},
                redundant=redundant, model=MODEL, tokens_per_step=tokens_per_step,
                work=WORK if work is None and time_limit is None else work, progress=report,
                time_limit_s=10.0 if time_limit is None else time_limit,
            )  # fmt: skip
        show(result, html, json)
