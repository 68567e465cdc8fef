"""Planners on several nodes, everything priced on machines as measured: fast loops beside a plan that knows each step,
static maps for the split near, bounds, and traffic that stays.

    python benchmarks/planners2.py DATA [--only settled,sizes,near,bounds,stay] [--layers 4] [--warm-up 200] [--steps 100]
        [--quick]

DATA holds llama4-maverick/*.npz (two subjects). The static map is EPLB's for the one, judged is the other. A section is a
function that returns the parts of a report; ``SECTIONS`` names them. Writes reports/DATE-planners2.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import bounds
import held_out
import numpy as np
import static_near
from common import problem, table, write
from numpy.typing import NDArray

from poise.cost.bound import bound_terms
from poise.cost.weights import compiled_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import settle
from poise.planning.placement import Placement
from poise.planning.solve.solve import solve
from poise.replay.serving import FastLoop, replay_steps
from poise.replay.static import replay
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.routing.trace import RoutingTrace
from poise.stepwise.methods.hecate import Hecate
from poise.stepwise.methods.split import even_quota
from poise.stepwise.poise.near import PoiseNear
from poise.stepwise.poise.outlook import site_of
from poise.stepwise.poise.policy import Poise
from poise.stepwise.poise.shares import deal_rows
from poise.stepwise.poise.spread import even_seconds
from poise.stepwise.poise.ways import targets
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy

MODEL, REDUNDANT, SLOTS = "llama-4-maverick", 1, 2
"""Redundant slots and step slots a GPU."""
HIDDEN_S = 1e9
"""A window in which every fetch hides."""
SETTLED = (("2x8:h200", 32768), ("2x8:h200", 8192), ("4x8:h200", 32768), ("4x8:h200", 8192))
SIZES = (64, 256, 1024, 4096, 16384, 65536)
MACHINES = ("1x8:h200", "2x8:h200", "4x8:h200", "8x8:h200")


@dataclass(frozen=True)
class Clairvoyant(StepPolicy):
    """Plans each step for its own loads, with weights that are there at once. Feasible but for that."""

    name: ClassVar[str] = "clairvoyant"
    summary: ClassVar[str] = "each step planned for its own loads, weights free"
    exact: ClassVar[bool] = True

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """``view.predicted_E`` are the step's own loads."""
        return self._plan(view)[0]

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Shares planned for these very loads."""
        _, tokens_ED = self._plan(view)
        if tokens_ED is None:
            return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), view.static_ED), passive=True)
        machine = compiled_price(view.price).machine
        rows_SED = deal_rows(np.ascontiguousarray(load_SE), tokens_ED, holders_ED, machine)
        return StepPlan(holders_ED, rows_SED.sum(axis=0), rows_SED)

    def _plan(self, view: LayerView) -> tuple[NDArray[np.bool_], NDArray[np.float64] | None]:
        site = site_of(view)
        seconds, spread = min(targets(site, view.static_ED, view.predicted_E), key=lambda one: one[0])
        if even_seconds(view.predicted_E, view.static_ED, site.machine) <= seconds:
            return view.static_ED, None
        return spread.held_ED, spread.tokens_ED


@dataclass(frozen=True)
class Oracle:
    """The step's own loads."""

    name: ClassVar[str] = "oracle"

    def predict_BLE(self, batch: RoutingBatch, prior_LE: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """See :class:`poise.routing.predict.Predictor`."""
        return batch.load_BLE


@dataclass(frozen=True)
class Case:
    """Traffic on a machine, and the map below.

    Parameters
    ----------
    batch : its first ``warm_up`` steps let loops settle.
    static : EPLB's map for the other subject.
    """

    batch: RoutingBatch
    static: Placement
    cluster: Cluster
    model: ModelSpec
    warm_up: int

    @property
    def scale(self) -> float:
        """Milliseconds of all MoE layers from seconds of those that ran."""
        return 1e3 * len(self.model.moe_layer_ids) / self.batch.num_layers

    def even_B(self) -> NDArray[np.float64]:
        """Seconds of every step under the static map and the engine's even split."""
        return replay(self.batch, self.static, self.cluster, self.model, traffic="home", split="even").step_seconds_B

    def loop_B(self, policy: StepPolicy, slots: int = SLOTS) -> NDArray[np.float64]:
        """Seconds of every step under a policy."""
        loop = FastLoop(policy, slots)
        return replay_steps(
            self.batch, self.static, loop, self.cluster, self.model, traffic="home", warm_up=0
        ).step_seconds_B

    def clairvoyant_B(self, steps: slice) -> NDArray[np.float64]:
        """Seconds of some steps, each planned for itself."""
        start = self.batch.start_B
        assert start is not None
        part = self.batch.steps_from(steps.start)
        loop = FastLoop(Clairvoyant(), SLOTS, predictor=Oracle(), window_s=HIDDEN_S, control_s=0.0)
        got = replay_steps(part, self.static, loop, self.cluster, self.model, traffic="home", warm_up=0)
        return got.step_seconds_B[: steps.stop - steps.start]

    def bound_B(self) -> NDArray[np.float64]:
        """Seconds below which no placement and split of a step can be."""
        slots_D = np.bincount(self.static.slot_device_S, minlength=self.cluster.num_devices) + SLOTS
        found = bound_terms(self.batch, self.cluster, self.model, traffic="home", slots_D=slots_D)
        return np.asarray(found.seconds_BL.sum(axis=1))


def layers_of(trace: RoutingTrace, layers: int) -> list[int]:
    """So many layers of a trace, evenly from the first to the last."""
    return sorted({round(x) for x in np.linspace(1, trace.num_layers - 2, layers)})


def make_case(traces: dict[str, RoutingTrace], judge: str, spec: str, tokens: int, given: argparse.Namespace) -> Case:
    """Traffic of one subject on the map of the other."""
    model, fit = ModelSpec.parse(MODEL), next(name for name in traces if name != judge)
    cluster = settle(Cluster.parse(spec), model, tokens)
    spare = REDUNDANT * cluster.num_devices
    made = problem(make_batch(traces[fit], tokens_per_step=512), spec, spare, traffic="home")
    static = solve(made, method="eplb-global").placement
    rows = layers_of(traces[judge], given.layers)
    part = replace(traces[judge], experts=traces[judge].experts[:, rows], weights=None,
                   layer_ids=np.asarray(traces[judge].layer_ids)[rows])  # fmt: skip
    batch = make_batch(part, tokens_per_step=tokens, steps=given.warm_up + given.steps, sample=False)
    static = replace(static, slot_expert_LS=static.slot_expert_LS[rows], layer_ids_L=static.layer_ids_L[rows].copy())
    return Case(batch, static, cluster, model, given.warm_up)


def settled(traces: dict[str, RoutingTrace], given: argparse.Namespace) -> list[str]:
    """Loops that have settled, and loops from their first step, beside the clairvoyant plan and the bound."""
    fit, judge = sorted(traces)[:2]
    rows: list[list[object]] = []
    for subject, spec, tokens in (
        *((judge, *one) for one in SETTLED),
        (fit, "4x8:h200", 32768),
        (fit, "4x8:h200", 8192),
    )[slice(1, 2) if given.quick else slice(None)]:
        began = time.perf_counter()
        case = make_case(traces, subject, spec, tokens, given)
        every = {"static map, even split (EPLB)": case.even_B(), "static map, nearest holders": case.loop_B(Hecate(), 0),
                 "poise": case.loop_B(Poise()), "poise-near": case.loop_B(PoiseNear()), "bound": case.bound_B()}  # fmt: skip
        for name, part in (
            ("settled", slice(given.warm_up, None)),
            ("from the first step", slice(0, min(given.steps, given.warm_up))),
        ):
            first = slice(part.start, part.start + given.clairvoyant_steps)
            knows_B = case.clairvoyant_B(first)
            for row, seconds_B in every.items():
                found_s = float(seconds_B[part].mean())
                rows.append([subject, spec, tokens, name, row, f"{found_s * case.scale:.2f}",
                             f"{found_s / every['poise'][part].mean():.3f}", f"{seconds_B[first].mean() / knows_B.mean():.3f}",
                             f"{every['bound'][part].mean() / found_s:.3f}"])  # fmt: skip
            rows.append([subject, spec, tokens, name, "clairvoyant", f"{knows_B.mean() * case.scale:.2f}",
                         f"{knows_B.mean() / every['poise'][first].mean():.3f}", "1.000",
                         f"{every['bound'][first].mean() / knows_B.mean():.3f}"])  # fmt: skip
        print(table(["subject"] * 9, rows[-12:]), f"{time.perf_counter() - began:.0f} s", flush=True)
    return ["## Loops on several nodes",
            f"{MODEL}, EPLB's map for the other subject, {REDUNDANT} redundant and {SLOTS} step slots a GPU, homes equal; ms a step of all "
            f"{len(ModelSpec.parse(MODEL).moe_layer_ids)} MoE layers, from {given.layers} of them. Settled: steps "
            f"{given.warm_up} to {given.warm_up + given.steps}; from the first step: the first {min(given.steps, given.warm_up)}. "
            "Fetches, windows, control priced; planning of poise-near, beside the steps, is not. Clairvoyant: every step "
            f"planned for its own loads, weights and control free; its row and the column `/ clairvoyant` are of the first "
            f"{given.clairvoyant_steps} of the steps.",
            table(["judged", "machine", "tokens a step", "steps", "row", "ms", "/ poise", "/ clairvoyant", "efficiency"], rows)]  # fmt: skip


def sizes(traces: dict[str, RoutingTrace], given: argparse.Namespace) -> list[str]:
    """Every size of batch: is a loop ever slower than doing nothing?"""
    judge = sorted(traces)[1]
    rows: list[list[object]] = []
    for spec in given.machines:
        for tokens in SIZES[: 1 if given.quick else None]:
            case = make_case(traces, judge, spec, tokens, given)
            even, poise, near = case.even_B(), case.loop_B(Poise()), case.loop_B(PoiseNear())
            parts = (slice(0, min(given.steps, given.warm_up)), slice(given.warm_up, None))
            rows.append([spec, tokens, f"{even[parts[1]].mean() * case.scale:.2f}",
                         *(f"{loop[part].mean() / even[part].mean():.3f}" for part in parts for loop in (poise, near))])  # fmt: skip
            print(rows[-1], flush=True)
    return ["## Never slower than doing nothing",
            f"Step time over that of the static map (EPLB for the other subject, even split), {given.layers} layers; first "
            f"{min(given.steps, given.warm_up)} steps, and steps {given.warm_up} to {given.warm_up + given.steps}.",
            table(["machine", "tokens a step", "static, ms", "poise, first steps", "poise-near, first steps", "poise, settled",
                   "poise-near, settled"], rows)]  # fmt: skip


def near(traces: dict[str, RoutingTrace], given: argparse.Namespace) -> list[str]:
    """benchmarks/static_near.py with its own settings."""
    few = static_near.Setting(layers=2, work=6.0, rival_work=6.0, steps=2)
    one = "abstract_algebra, fitted on other requests, 2x8:h200, N = 2048"
    return static_near.section(given.data, *((few, one) if given.quick else (static_near.Setting(),)))


def gaps(traces: dict[str, RoutingTrace], given: argparse.Namespace) -> list[str]:
    """benchmarks/bounds.py."""
    return bounds.section(given.data, *(("home_device_dedup", 6.0) if given.quick else ()))


def stay(traces: dict[str, RoutingTrace], given: argparse.Namespace) -> list[str]:
    """The section of that name of benchmarks/held_out.py."""
    return held_out.stay(traces, *(((6.0, 6.0),) if given.quick else ()))


SECTIONS = {"settled": settled, "sizes": sizes, "near": near, "bounds": gaps, "stay": stay}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--clairvoyant-steps", type=int, default=30)
    parser.add_argument("--machines", nargs="*", default=list(MACHINES), help="of the section sizes")
    parser.add_argument("--quick", action="store_true", help="a case of each section, little work, no report")
    given = parser.parse_args()
    if given.quick:
        given.layers, given.warm_up, given.steps, given.clairvoyant_steps = 1, 4, 2, 1
    traces = {path.stem: read(path) for path in sorted((given.data / "llama4-maverick").glob("*.npz"))}
    parts: list[str] = []
    wanted = given.only.split(",")
    for name in wanted:
        parts += SECTIONS[name](traces, given)
    if given.quick:
        print("\n\n".join(parts))
        return
    write("Planners on several nodes", parts, "" if set(wanted) == set(SECTIONS) else "-" + "-".join(wanted))


if __name__ == "__main__":
    main()
