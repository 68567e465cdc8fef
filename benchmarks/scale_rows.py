"""One case of benchmarks/scale.py: every static map and every step-wise policy, priced, with who lags and planning seconds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from grids import grid_of
from scale_cases import DECODE, PREFILL, WARM_UP, Case

from poise.cost.compute import device_compute
from poise.cost.entries import LayerEntries
from poise.cost.route import locality_pairs
from poise.cost.split import split_shares
from poise.cost.traffic import Copies, port_load
from poise.cost.weights import PLAN_SECONDS_BASE, PLAN_SECONDS_PER_PAIR
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import solve
from poise.replay.links import kind_seconds
from poise.replay.serving import FastLoop, replay_steps
from poise.replay.static import Replay, replay
from poise.routing.batch import RoutingBatch
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy
from poise.stepwise.registry import POLICIES
from poise.util.errors import PoiseError

MODELS = ("deepseek-v3", "kimi-k2")
STATIC = ("contiguous", "round-robin", "lpt", "eplb", "eplb-global", "moetuner-equal", "poise")
FAST = ("split", "lplb", "hecate", "llep", "ultra-ep", "moon-ep", "poise")
STEP_SLOTS = (1, 2)
TUNED_TO, MOETUNER_TO = 512, 128
FAST_TO = {PREFILL: 1024, DECODE: 512}
"""Devices up to which poise's fast loop is run: beyond, it plans for seconds a layer."""
WORK = 30.0
"""Units of work a layer for poise's map: a nominal second."""
PREDICTED_FROM = 5
"""Steps before the judged ones that matter to policies without memory: those that predictions look at."""
PORTS = ("intra port", "network port")


@dataclass(frozen=True)
class Lag:
    """Of one layer in one step: the fullest device's share over the mean, of compute and of the deciding port."""

    compute_excess: float
    port: str
    port_excess: float
    same: bool

    @classmethod
    def of(cls, tokens_ED: np.ndarray, pairs_DD: np.ndarray, cluster: Cluster, model: ModelSpec) -> Lag:
        """From tokens on devices, and pairs from device to device."""
        compute = device_compute(tokens_ED, cluster, model)
        kinds = kind_seconds(port_load(Copies(pairs_DD[None].astype(float)), cluster), cluster, cluster.dispatch_wire)
        name, port = max(zip(PORTS, (kind_BD[0] for kind_BD in kinds), strict=True), key=lambda item: item[1].max())
        over = [1.0 - x.mean() / max(x.max(), 1e-300) for x in (compute, port)]
        return cls(over[0], name, over[1], bool(np.argmax(compute) == np.argmax(port)))


class Recorder(StepPolicy):
    """A step policy that measures another: seconds of its calls, and who lags under its plans."""

    def __init__(self, policy: StepPolicy, first: int) -> None:
        self.policy, self.first = policy, first
        self.name, self.summary, self.exact = policy.name, policy.summary, policy.exact
        self.keeps, self.unbounded = policy.keeps, policy.unbounded
        self.before_s: dict[tuple[int, int], float] = Counter()
        self.after_s: dict[tuple[int, int], float] = Counter()
        self.lags: dict[tuple[int, int], Lag] = {}

    def before_gate(self, view: LayerView) -> Any:
        """Timed."""
        began = time.process_time()
        out = self.policy.before_gate(view)
        self.before_s[view.step, view.layer] += time.process_time() - began
        return out

    def in_background(self, view: LayerView, holders_ED: Any) -> Any:
        """Timed."""
        began = time.process_time()
        out = self.policy.in_background(view, holders_ED)
        self.before_s[view.step, view.layer] += time.process_time() - began
        return out

    def after_gate(self, view: LayerView, holders_ED: Any, load_SE: Any) -> StepPlan:
        """Timed; then who lags."""
        began = time.process_time()
        plan = self.policy.after_gate(view, holders_ED, load_SE)
        self.after_s[view.step, view.layer] += time.process_time() - began
        if view.step >= self.first:
            cluster, rows = view.price.cluster, plan.rows_SED
            pairs = locality_pairs(load_SE, plan.quota_ED, cluster.node_D) if rows is None else rows.sum(axis=1)
            self.lags[view.step, view.layer] = Lag.of(plan.quota_ED, pairs, cluster, view.price.model)
        return plan

    def mean(self, seconds: dict[tuple[int, int], float]) -> float:
        """Of the judged steps."""
        return float(np.mean([s for (step, _), s in seconds.items() if step >= self.first]))


@dataclass(frozen=True)
class Row:
    """What one line of the tables says; seconds are means of a layer."""

    name: str
    cost: dict[str, float]
    efficiency: float
    imbalance: float
    sets: str
    lost: float
    same: float
    before_s: float
    after_s: float
    setting: str = ""
    worst_s: float = 0.0

    @property
    def seconds(self) -> float:
        """All terms."""
        return sum(self.cost.values())

    @property
    def planned_free(self) -> float:
        """Seconds if planning after the gate took none: counts are still exchanged."""
        return self.seconds - self.cost["planning"]

    @property
    def planned_here(self) -> float:
        """Seconds if planning after the gate took what it took on this CPU."""
        return self.planned_free + (self.after_s if self.cost["planning"] else 0.0)


def make_row(name: str, got: Replay, lags: Iterable[Lag], case: Case, *, before_s: float = 0.0, after_s: float = 0.0,
             setting: str = "", worst_s: float = 0.0) -> Row:  # fmt: skip
    """A row; lags in the order of (step, layer)."""
    cost, shape = got.cost, got.cost.compute_BL.shape
    zero = np.zeros(shape)
    weights, control = (zero if x is None else x for x in (cost.weights_BL, cost.control_BL))
    latency = case.cluster.dispatch_wire.start_s + case.cluster.combine_wire.start_s
    planning = PLAN_SECONDS_BASE + PLAN_SECONDS_PER_PAIR * case.model.num_experts * case.devices
    planned = np.where(control > 0, planning, 0.0)
    terms = {"compute": cost.compute_BL, "exchange": cost.dispatch_BL + cost.combine_BL - latency, "latency": zero + latency,
             "weights": weights, "control": control - planned, "planning": planned}  # fmt: skip
    lags = list(lags)
    excess = np.reshape([lag.compute_excess for lag in lags], shape) * terms["compute"]
    excess = excess + np.reshape([lag.port_excess for lag in lags], shape) * terms["exchange"]
    mean = {key: float(value.mean()) for key, value in terms.items()}
    largest = max(mean, key=mean.__getitem__)
    sets = Counter(lag.port for lag in lags).most_common(1)[0][0] if largest == "exchange" else largest
    total = sum(mean.values())
    return Row(name, mean, got.efficiency, got.imbalance, f"{sets} {mean[largest] / total:.0%}", float(excess.mean()) / total,
               float(np.mean([lag.same for lag in lags])), before_s, after_s, setting, worst_s)  # fmt: skip


def static_lags(batch: RoutingBatch, placement: Placement, case: Case, split: str) -> list[Lag]:
    """Lags under a static placement; homes spread evenly."""
    devices, out = case.devices, []
    shares = [split_shares(batch.load_BLE[:, layer], LayerEntries.of_counts(count), case.cluster.speed_D, split)
              for layer, count in enumerate(placement.count_LED())]  # fmt: skip
    share_LBED = [one.held.dense(one.share_BH) for one in shares]
    for step, load_LE in enumerate(batch.load_BLE):
        for load_E, share_BED in zip(load_LE, share_LBED, strict=True):
            tokens_ED = load_E[:, None] * share_BED[min(step, len(share_BED) - 1)]
            pairs = np.broadcast_to(tokens_ED.sum(axis=0) / devices, (devices, devices))
            out.append(Lag.of(tokens_ED, pairs, case.cluster, case.model))
    return out


def static_rows(case: Case, data: Path, batch: RoutingBatch) -> dict[str, tuple[Row, Placement]]:
    """Every static map under the even split; LPT's and poise's under the exact one too."""
    judged, out = batch.steps_from(WARM_UP), {}
    maps: dict[str, Placement] = {}
    seconds: dict[str, float] = {}
    for name in STATIC:
        for split in ("even", "exact") if name in ("eplb-global", "poise") else ("even",):
            if name == "moetuner-equal" and (case.devices > MOETUNER_TO or case.model_name != MODELS[0]):
                continue
            if name == "poise" or name not in maps:
                problem = PlacementProblem(case.fitted(data), case.cluster, case.model, case.slots_D, "home", split)
                began = time.process_time()
                try:
                    maps[name] = solve(problem, method=name, work=WORK * len(case.picked)).placement
                except PoiseError as error:
                    print(case.devices, name, error)
                    continue
                seconds[name] = (time.process_time() - began) / len(case.picked)
            placement = maps[name]
            got = replay(judged, placement, case.cluster, case.model, traffic="home", split=split)
            label = name if split == "even" else f"{name}, exact split"
            lags = static_lags(judged, placement, case, split)
            out[label] = make_row(label, got, lags, case, before_s=seconds[name]), placement
    return out


def best_static(rows: dict[str, tuple[Row, Placement]]) -> str:
    """The map with the least time under the even split on the judged traffic."""
    return min((name for name in rows if "exact" not in name), key=lambda name: rows[name][0].seconds)


TUNED: dict[tuple[str, str, int, int, int], dict[str, Any]] = {}


def setting_for(
    policy: StepPolicy, slots: int, case: Case, batch: RoutingBatch, placement: Placement
) -> dict[str, Any]:
    """The best of the published grid on two judged steps of one layer; beyond ``TUNED_TO`` devices that of fewer."""
    key = (policy.name, case.phase.name, case.tokens_per_device, slots, case.devices)
    known = [k for k in TUNED if k[:4] == key[:4] and k[4] <= case.devices]
    if key in TUNED or (known and case.devices > TUNED_TO):
        return TUNED[max(known, key=lambda k: k[4])]
    first = batch.load_BLE[:, :1]
    two = first[WARM_UP : WARM_UP + 2].copy()
    small = RoutingBatch(two, np.full(2, 0.5), batch.top_k, batch.layer_ids_L[:1].copy())
    one = Placement.from_counts(placement.count_LED()[:1], layer_ids_L=small.layer_ids_L)
    grid = grid_of(policy)
    grid = grid[:2] if policy.name == "lplb" else grid  # the rest place replicas where the map has none

    def seconds(setting: dict[str, Any]) -> float:
        loop = FastLoop(replace(policy, **setting), slots)
        got = replay_steps(small, one, loop, case.cluster, case.model, traffic="home", warm_up=0,
                           prior_LE=first[:WARM_UP].mean(axis=0))  # fmt: skip
        return float(got.step_seconds_B.mean())

    TUNED[key] = min(grid, key=seconds) if len(grid) > 1 else {}
    return TUNED[key]


def fast_rows(
    case: Case, data: Path, batch: RoutingBatch, placement: Placement, names: Iterable[str] = FAST
) -> list[Row]:
    """Every step-wise policy over one map, at the best of its grid and of the step slots."""
    prior, out = case.fitted(data).load_LE(), []
    for name in names:
        if name == "poise" and case.devices > FAST_TO[case.phase]:
            continue
        best: Row | None = None
        for slots in slots_of(name, case):
            setting = setting_for(POLICIES[name], slots, case, batch, placement)
            history = WARM_UP if name == "poise" else PREDICTED_FROM
            timed = Recorder(replace(POLICIES[name], **setting), history)
            got = replay_steps(batch.steps_from(WARM_UP - history), placement, FastLoop(timed, slots), case.cluster,
                               case.model, traffic="home", warm_up=history, prior_LE=prior)  # fmt: skip
            lags = [timed.lags[key] for key in sorted(timed.lags)]
            words = ", ".join([*(f"{k}={v}" for k, v in setting.items()), *([f"M={slots}"] if moves(name) else [])])
            row = make_row(f"+ {name}", got, lags, case, before_s=timed.mean(timed.before_s), setting=words,
                           after_s=timed.mean(timed.after_s), worst_s=max(timed.before_s.values()))  # fmt: skip
            best = row if best is None or row.seconds < best.seconds else best
        assert best is not None
        out.append(best)
        print(case.model_name, case.devices, case.phase.name, best.name, f"{1e3 * best.seconds:.2f} ms", flush=True)
    return out


def moves(name: str) -> bool:
    """Whether it uses step slots over a map with replicas."""
    return name not in ("split", "lplb")


def slots_of(name: str, case: Case) -> tuple[int, ...]:
    """M to try: two where that is cheap."""
    if not moves(name):
        return (1,)
    return STEP_SLOTS if case.devices <= (128 if name == "poise" else 512) else STEP_SLOTS[:1]


def eplb(case: Case, fitted: RoutingBatch) -> Placement:
    """EPLB's global map."""
    return solve(
        PlacementProblem(fitted, case.cluster, case.model, case.slots_D, "home"), method="eplb-global"
    ).placement


def over_eplb(
    case: Case, data: Path, split: Literal["even", "exact"] = "even"
) -> tuple[RoutingBatch, Placement, Replay]:
    """Steps, EPLB's global map, and what it costs on the judged ones."""
    batch, placement = case.batch(data), eplb(case, case.fitted(data))
    judged = batch.steps_from(WARM_UP)
    return batch, placement, replay(judged, placement, case.cluster, case.model, traffic="home", split=split)
