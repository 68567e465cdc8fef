"""Static maps on an engine that keeps tokens near: every method under the splits even and near, poise planned for each.

python benchmarks/static_near.py DATA [--layers 6] [--work 150] [--rival-work 60] [--steps 8] [--only TEXT] [--no-report]

Every plan is fitted on half of a subject's requests, or on the other subject, and judged on the other half, on a machine
with measured kernel and all-to-alls and equal homes. Each map is priced under both splits; planned for even it is what
EPLB and the others make today, priced near it is what an engine that keeps tokens near does with it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from choice import RIVALS, by_method, judged
from common import problem, table, write

from poise.planning.placement import Placement
from poise.planning.solve.solve import solve
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.routing.trace import RoutingTrace
from poise.util.errors import NoResultError

MODEL = "llama-4-maverick"
HEAD = ["case", "LPT even", "near", "EPLB even", "near", "best other", "split", "ms", "imbalance", "poise even ms",
        "priced near", "poise near ms", "imbalance", "over the best other", "LPT's imbalance", "planning s"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """How much is planned and judged.

    Parameters
    ----------
    layers : so many, evenly spaced.
    work, rival_work : units of work of a plan of poise, and of another method.
    steps : fitted and judged steps each; requests are drawn again where they are too few.
    """

    layers: int = 6
    work: float = 150.0
    rival_work: float = 60.0
    steps: int = 8


def rows(data: Path, setting: Setting, only: str = "") -> Iterator[tuple[bool, list[object], dict[str, float]]]:
    """Whether a case is of the fitted subject, its row (:data:`HEAD`), and milliseconds of a step of all layers of the
    model under each method, on the split that is the faster one.
    """
    subjects = {path.stem: read(path) for path in sorted((data / "llama4-maverick").glob("*.npz"))}
    for (name, other), cluster, tokens, own in product(
        zip(subjects, list(subjects)[::-1], strict=True), ("2x8:h200", "4x8:h200"), (2048, 16384), (True, False)
    ):
        fit, judge = subjects[name].every_second_request()
        words = f"{name}, fitted on {'other requests' if own else other}, {cluster}, N = {tokens}"
        if only in words:
            row, ms = _row(fit if own else subjects[other], judge, cluster, tokens, setting)
            yield own, [words, *row], ms


def some_layers(trace: RoutingTrace, layers: int) -> RoutingTrace:
    """Evenly spaced layers of a trace."""
    keep = np.unique(np.linspace(0, trace.experts.shape[1] - 1, layers).round().astype(int))
    assert trace.layer_ids is not None
    weights = None if trace.weights is None else trace.weights[:, keep]
    return replace(trace, experts=trace.experts[:, keep], layer_ids=trace.layer_ids[keep], weights=weights)


def _row(
    fit: RoutingTrace, judge: RoutingTrace, cluster: str, tokens: int, setting: Setting
) -> tuple[list[object], dict[str, float]]:
    scale = 1e3 * judge.experts.shape[1] / setting.layers
    seen = make_batch(some_layers(fit, setting.layers), tokens_per_step=tokens, steps=setting.steps)
    later = make_batch(some_layers(judge, setting.layers), tokens_per_step=tokens, steps=setting.steps)
    asked = {"even": problem(seen, cluster, 8 * int(cluster[0]), model=MODEL)}
    asked["near"] = replace(asked["even"], split="near")

    def figures(placement: Placement, split: str) -> tuple[float, float]:
        seconds, imbalance = judged(asked[split], later, placement)
        return scale * seconds, imbalance

    found: dict[tuple[str, str], tuple[float, float]] = {}
    for name in RIVALS:
        try:
            made = solve(asked["even"], method=name, work=setting.rival_work).placement
        except NoResultError:
            continue
        found |= {(name, split): figures(made, split) for split in asked}
    began, ours = time.monotonic(), {}
    for split, one in asked.items():
        ours[split] = solve(one, method="poise", work=setting.work).placement
    seconds = time.monotonic() - began
    best = min(found, key=lambda key: found[key][0])
    even, moved, near = figures(ours["even"], "even"), figures(ours["even"], "near"), figures(ours["near"], "near")
    ms = [f"{found[key][0]:.2f}" for key in product(("lpt", "eplb-global"), ("even", "near"))]
    least = min(found["lpt", split][1] for split in asked)
    by_name = {name: min(found[name, split][0] for split in asked) for name, _ in found} | {"poise, near": near[0]}
    return [*ms, *best, f"{found[best][0]:.2f}", f"{found[best][1]:.3f}", f"{even[0]:.2f}", f"{moved[0]:.2f}",
            f"{near[0]:.2f}", f"{near[1]:.3f}", f"{1 - near[0] / found[best][0]:+.1%}", f"{least:.3f}",
            f"{seconds:.0f}"], by_name  # fmt: skip


def section(data: Path, setting: Setting, only: str = "") -> list[str]:
    """The parts of a report; ``only``: cases whose name has this."""
    out: list[list[object]] = []
    times: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for own, row, ms in rows(data, setting, only):
        out.append(row)
        times[own].append(ms)
        print(*row, sep=" | ", flush=True)
    words = (f"{setting.layers} of the model's MoE layers, evenly spaced, stand for all; {setting.steps} steps fitted, as many judged; "
             f"work {setting.work:g}, other methods {setting.rival_work:g}; one redundant slot a GPU.")  # fmt: skip
    parts = ["## Static maps on an engine that keeps tokens near", words, table(HEAD, out)]
    for own, judged_on in ((True, "other requests"), (False, "another subject")):
        if times[own]:
            names: list[str] = ["method", "cases", "lost to the best of all others", "lead over it, mean", "worst"]
            parts += [
                f"## Every method against the best of all others, {judged_on}",
                table(names, by_method(times[own])),
            ]
    return parts


def main() -> None:
    usual, parser = Setting(), argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", type=int, default=usual.layers)
    parser.add_argument("--work", type=float, default=usual.work)
    parser.add_argument("--rival-work", type=float, default=usual.rival_work)
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    setting = Setting(options.layers, options.work, options.rival_work, options.steps)
    found = section(options.data, setting, options.only)
    if options.no_report or options.only:
        print("\n\n".join(found))
    else:
        write("static maps near", found)


if __name__ == "__main__":
    main()
