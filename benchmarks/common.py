"""What the benchmarks share: problems from files, a dated report."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from poise.api import deal_slots
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.problem import PlacementProblem
from poise.routing.batch import RoutingBatch

REPORTS = Path(__file__).parent / "reports"
DEMO_SIZES = ModelSpec(
    "experts of OLMoE-1B-7B's size", 8, tuple(range(8)), 32, 4, 2048, 1024, kv_bytes_per_token_layer=2048.0
)
"""Sizes for the demo trace, whose own model is too small to serve: its layers, experts and top-k, the experts of its big
sister."""


def problem(
    batch: RoutingBatch,
    cluster: str,
    redundant: int,
    *,
    model: str | None = None,
    traffic: DataFlow | None = None,
    pooled: bool = False,
) -> PlacementProblem:
    """A placement problem with R redundant slots in all."""
    machine = Cluster.parse(cluster)
    sizes = ModelSpec.parse(model) if model else ModelSpec.generic(batch.num_experts, batch.top_k, batch.layer_ids_L)
    flow: DataFlow = traffic or ("home_node_dedup" if batch.has_tokens else "home")
    slots = deal_slots(batch.num_experts, redundant, machine.num_devices)
    return PlacementProblem(batch, machine, sizes, slots, flow, "even", pooled)


def table(head: list[str], rows: list[list[object]]) -> str:
    """A markdown table; numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---:" if i else "---" for i in range(len(head))) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def _commit() -> str:
    """The commit whose constants a run used."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPORTS, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


COMMIT = _commit()


def write(name: str, parts: list[str], suffix: str = "") -> None:
    """A report with date, command, machine and versions at its head; also printed."""
    date = datetime.date.today().isoformat()
    words = ["DATA" if Path(word).is_dir() else word for word in sys.argv[1:]]
    if "--keep" in words:  # where files were kept is not the report's business
        at = words.index("--keep")
        del words[at : at + 2]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    names = ("poise-moe", "numpy", "scipy", "highspy", "numba", *(["torch"] if "torch" in sys.modules else []))
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    data = ", DATA = the folder of routing data" if "DATA" in words else ""
    head = (
        f"# {name}\n\n{date}. `{command}`{data}. {os.cpu_count()} CPU cores "
        f"({platform.machine()}), commit {COMMIT}, Python {platform.python_version()}, {versions}. Wall clock, shared machine."
    )
    text = "\n\n".join([head, *parts]) + "\n"
    path = REPORTS / f"{date}-{Path(sys.argv[0]).stem}{suffix}.md"
    path.write_text(text, encoding="utf-8")
    print(text)
