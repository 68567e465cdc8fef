"""MoETuner's two programmes: gaps, what two stages lose, how large a profile must be, and a published run's size.

python benchmarks/moetuner.py DATA
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
from common import REPORTS, problem, table, write
from linear_stay import linear_stay_objective
from pictures import line_chart, save

from poise.planning.methods import moetuner
from poise.planning.solve.solve import solve
from poise.replay.static import replay
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.routing.synthetic import zipf_trace
from poise.routing.trace import RoutingTrace

MIXTRAL = {"num_layers": 32, "num_experts": 8, "top_k": 2, "exponent": 0.35, "stickiness": 0.5}
"""A synthetic trace of Mixtral's scale, with mild skew and sparse transitions."""
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)


def gaps(data: Path) -> str:
    rows = []
    for path in sorted((data / "llama4-maverick").glob("*.npz")):
        case = problem(make_batch(read(path)), "1x8", 0, model="llama-4-maverick", pooled=True)
        got = solve(case, method="moetuner", time_limit_s=60)
        notes = got.details["ilp1"]
        solver = sum(note["proved_by"] == "highs" for note in notes)
        rows.append([path.stem, len(notes), f"{got.details['ilp1_worst_gap_of_tokens']:.4%}", solver, f"{got.seconds:.2f}",
                     f"{got.imbalance:.3f}"])  # fmt: skip
    head = [
        "file",
        "layers",
        "worst ILP 1 gap, of the layer's tokens",
        "layers that needed HiGHS",
        "seconds",
        "imbalance",
    ]
    return "## Llama-4, 1 x 8, no redundant experts\n\nAsked: 0.25 % of a layer's tokens.\n\n" + table(head, rows)


def two_stages() -> str:
    rows = []
    for seed in range(5):
        batch = make_batch(zipf_trace(num_tokens=20_000, seed=seed, **MIXTRAL), tokens_per_step=2000)
        case = problem(batch, "1x4", 0, model="mixtral-8x7b", traffic="stay")
        best = solve(case, method="exact", time_limit_s=60)
        value = best.details["linear_stay_objective"]
        row: list[object] = [seed, f"{1e6 * value:.2f}", f"{best.seconds:.1f}"]
        for name in ("moetuner-equal", "contiguous", "lpt", "eplb", "poise"):
            device = solve(case, method=name, time_limit_s=5).placement.count_LED().argmax(axis=2)
            lost = linear_stay_objective(device, batch, case.cluster, case.model) / value - 1
            row.append(f"{lost:.2%}")
        published = solve(replace(case, pooled=True), method="moetuner", time_limit_s=60).details
        row.append(f"{published['ilp2_objective'] / max(published['ilp2_bound'], 1e-300) - 1:.2%}")
        rows.append(row)
    return (
        "## What two stages lose to the joint optimum\n\n**Synthetic** traces of Mixtral's scale (32 layers, 8 experts, top-2, "
        "4 devices; five seeds). `exact` proves the optimum of compute + linear stay traffic over equal-size placements; the "
        "other columns are what a method loses on that objective (poise and the others were not fitted to it; poise searches "
        "the full, non-linear cost). Last: the published variant's ILP 2 over its proven bound, asked within 2.5 %.\n\n"
        + table(
            ["seed", "exact us", "seconds", "moetuner-equal", "contiguous", "lpt", "eplb", "poise", "ILP 2 gap"], rows
        )
    )


def sample_sizes(data: Path) -> str:
    paths = [*sorted((data / "llama4-maverick").glob("*.npz")), Path(str(files("poise") / "data" / "demo_trace.npz"))]
    parts = []
    for path in paths:
        trace = read(path)
        assert isinstance(trace, RoutingTrace)
        fit, judge = trace.split_requests()
        held_out = make_batch(judge)
        lines: dict[str, list[tuple[float, float]]] = {name: [] for name in ("lpt", "moetuner-equal", "poise")}
        rows = []
        ids = np.random.default_rng(0).permutation(fit.requests())
        for share in SHARES:
            few = fit.rows(np.isin(fit.request, ids[: max(1, round(share * ids.size))]))
            case = problem(make_batch(few, tokens_per_step=min(few.num_tokens, 512)), "1x8", 0)
            row: list[object] = [f"{share:.0%}", few.num_tokens]
            for name, line in lines.items():
                placement = solve(case, method=name, time_limit_s=4).placement
                got = replay(held_out, placement, case.cluster, case.model, traffic=case.traffic, split="even")
                line.append((100 * share, got.imbalance))
                row += [f"{got.imbalance:.3f}", f"{1e3 * got.step_seconds_B.mean():.3f}"]
            rows.append(row)
        picture = f"sample-size-{path.stem.replace('_', '-')}.svg"
        save(REPORTS / picture, line_chart(lines, "% of the fitted requests", "held-out imbalance, max / mean"))
        head = ["sample", "tokens", *(f"{name} {what}" for name in lines for what in ("imbalance", "step ms"))]
        parts.append(f"### {path.stem}\n\n![held-out imbalance by sample size]({picture})\n\n{table(head, rows)}")
    intro = (
        "## Does a sample suffice?\n\nThe paper's premise. Fitted on a share of the requests of the first half, judged on the "
        "second half of the requests; 1 x 8, no redundant experts, generic model sizes.\n\n"
    )
    return intro + "\n\n".join(parts)


def large() -> str:
    rows = []
    for name, draw in (("Zipf 0.5", None), ("lognormal 0.6", 0.6), ("lognormal 1.0", 1.0)):
        for sizes in (None, np.full(8, 16)):
            worst, seconds, imbalance, solver = 0.0, 0.0, [], 0
            for layer in range(94):
                rng = np.random.default_rng(layer)
                load = (
                    rng.permutation(np.arange(1, 129) ** -0.5) if draw is None else rng.lognormal(sigma=draw, size=128)
                )
                load = np.rint(load / load.sum() * 200_000)
                began = time.monotonic()
                cluster, value, bound, by = moetuner.ilp1(load, 8, sizes, time_limit_s=5)
                seconds += time.monotonic() - began
                worst = max(worst, (value - bound) / load.sum())
                solver += by == "highs"
                imbalance.append(np.bincount(cluster, weights=load).max() / load.mean() / 16)
            rows.append(
                [
                    name,
                    "equal" if sizes is not None else "free",
                    f"{seconds:.2f}",
                    f"{worst:.4%}",
                    solver,
                    f"{np.mean(imbalance):.5f}",
                ]
            )
    return (
        "## 94 layers x 128 experts x 8 devices\n\nSynthetic loads. A published run of ILP 1 with a commercial solver took "
        "1015.5 s for this size (equal sizes, gap 0.5 %, imbalance 1.000).\n\n"
        + table(
            [
                "loads",
                "cluster sizes",
                "seconds, all layers",
                "worst gap, of tokens",
                "layers that needed HiGHS",
                "mean imbalance",
            ],
            rows,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    moetuner.ilp1(np.arange(1.0, 9.0), 2, None, time_limit_s=1)  # compiles
    write("MoETuner", [gaps(data), two_stages(), sample_sizes(data), large()])


if __name__ == "__main__":
    main()
