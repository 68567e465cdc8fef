"""poise inspect: what a trace holds, and how skewed it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from poise.cli import options as o
from poise.routing import sources
from poise.routing.profile import dead_share_L, load_LE, mutual_information, skew_L
from poise.routing.trace import NO_EXPERT, LoadProfile, RoutingTrace, row_blocks
from poise.util.executors import executor_of

MOST_LAYERS = 24
"""Of a table: a screen shows them at once."""


def inspect(traces: o.Traces, executor: o.Executor = "serial", json: o.Json = False) -> None:
    """Say what recorded traffic holds: sizes, domains, and per layer skew, dead experts and mutual information.

    Example: poise inspect trace.npz --json
    """
    with o.errors():
        with executor_of(executor) as workers:
            found = sources.load(list(traces), workers)
        facts: dict[str, Any] = {"name": found.name, "layers": found.num_layers, "experts": found.num_experts}
        if isinstance(found, RoutingTrace):
            load = load_LE(found.experts, found.num_experts)
            facts |= {
                "tokens": found.num_tokens,
                "requests": len(found.requests()),
                "top_k": found.top_k,
                "decode_share": float(np.mean(found.is_decode)),
                "domains": _domains(found),
            }
            real, null = mutual_information(found.experts, found.num_experts)
        else:
            load = found.load_BLE.sum(axis=0, dtype=np.float64)
            facts |= {"recorded_loads": found.num_steps, "tokens_per_layer": float(load.sum(axis=1).max())}
            if found.notes:
                facts["notes"] = list(found.notes)
            real = null = np.zeros(0)
        idle, all_picks = _idle(found)
        if idle:
            facts["identity_share"] = idle / all_picks
        facts["per_layer"] = [
            {
                "layer": int(found.layer_ids[index]),
                "max_over_mean": float(skew_L(load)[index]),
                "dead_share": float(dead_share_L(load)[index]),
                "information_to_next_nats": float(real[index]) if index < real.size else None,
                "shuffled_nats": float(null[index]) if index < null.size else None,
            }
            for index in range(found.num_layers)
        ]
        if json:
            o.print_json("inspect", facts)
        else:
            _show(facts)


def _idle(found: RoutingTrace | LoadProfile) -> tuple[float, float]:
    """Picks that compute nothing, and all picks."""
    if isinstance(found, RoutingTrace):
        none = sum(int((found.experts[rows] == NO_EXPERT).sum()) for rows in row_blocks(found.experts))
        return float(none), float(found.experts.size)
    idle = 0.0 if found.idle_BL is None else float(found.idle_BL.sum())
    return idle, idle + float(found.load_BLE.sum(dtype=np.float64))


def _domains(trace: RoutingTrace) -> dict[str, int]:
    if trace.domain is None:
        return {}
    return {name: int((trace.domain == index).sum()) for index, name in enumerate(trace.domain_names)}


def _show(facts: dict[str, Any]) -> None:
    for key, value in facts.items():
        if key == "domains" and value:
            o.out.print("domains: " + ", ".join(f"{name} {count} tokens" for name, count in value.items()))
        elif key not in ("per_layer", "domains"):
            o.out.print(f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}")
    rows = facts["per_layer"]
    most = max(rows, key=lambda row: row["max_over_mean"])
    skews = [row["max_over_mean"] for row in rows if row["dead_share"] < 1]  # a layer without load is not even
    among = "layers" if len(skews) == len(rows) else f"the {len(skews)} layers with load"
    o.out.print(
        f"fullest expert over the mean: {np.mean(skews or [0.0]):.2f} in the mean of {among}, "
        f"at most {most['max_over_mean']:.2f} (layer {most['layer']})"
    )
    shown = rows if len(rows) <= MOST_LAYERS else sorted(rows, key=lambda row: -row["max_over_mean"])[:MOST_LAYERS]
    informed = any(row["information_to_next_nats"] is not None for row in rows)  # not by loads, nor by one layer alone
    heads = ["layer", "max / mean load", "dead experts"]
    heads += ["information to next, nats", "shuffled"] if informed else []
    table = o.table("per layer" if shown is rows else "per layer, most skewed first", heads)
    for row in shown:
        nats = (row["information_to_next_nats"], row["shuffled_nats"]) if informed else ()
        table.add_row(
            str(row["layer"]), f"{row['max_over_mean']:.2f}", f"{row['dead_share']:.1%}",
            *("" if value is None else f"{value:.3f}" for value in nats),
        )  # fmt: skip
    o.out.print(table)
    o.out.print(
        "load: tokens of an expert"
        + ("; information: between a token's heaviest experts of this layer and of the next, and what is left of it "
           "when tokens are shuffled" if informed else "")
    )  # fmt: skip
    if shown is not rows:
        o.out.print(f"{len(rows) - len(shown)} more layers: --json shows all")
