"""At scale, on paper: DeepSeek-V3 and Kimi-K2 on 64 to 2048 devices, modelled; stragglers, break-even, planning time.

    python benchmarks/scale.py DATA

DATA holds deepseek-r1/*.json. Writes reports/DATE-scale.md and its plots.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from common import REPORTS, line_chart, table, write
from scale_cases import DECODE, DRIFT, EFFORT, PREFILL, SEED, WARM_UP, Case, Phase, token_batch

from poise.cluster import Cluster
from poise.cost.compute import expert_seconds
from poise.cost.links import latency_seconds, network_ports
from poise.cost.route import locality_pairs
from poise.cost.split import split_share_BED
from poise.cost.traffic import Copies, Traffic, port_load
from poise.cost.weights import PLAN_SECONDS_BASE, PLAN_SECONDS_PER_PAIR
from poise.errors import PoiseError
from poise.evaluate.replay import Replay, replay
from poise.evaluate.stepwise import FastLoop, replay_steps
from poise.modelspec import ModelSpec
from poise.observe.batch import RoutingBatch
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import solve
from poise.policies.plan import LayerView, StepPlan, StepPolicy
from poise.policies.registry import POLICIES

MODELS = ("deepseek-v3", "kimi-k2")
STATIC = ("contiguous", "round-robin", "lpt", "eplb", "eplb-global", "moetuner-equal", "poise")
FAST = ("split", "lplb", "hecate", "llep", "ultra-ep", "moon-ep", "poise")
STEP_SLOTS = (1, 2)
TUNED_TO, MOETUNER_TO, POISE_TO = 512, 128, 256
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
        compute = expert_seconds(tokens_ED.astype(float), cluster, model).sum(axis=0) / cluster.speed_D
        load = port_load(Copies(pairs_DD[None].astype(float)), cluster)
        inner = np.maximum(load.intra_out_BD, load.intra_in_BD)[0] / cluster.intra_bytes_per_s
        ports = [network_ports(x, cluster)[0] for x in (load.net_out_BD, load.net_in_BD)]
        net = np.maximum(*ports) / cluster.inter_bytes_per_s
        name, port = max(zip(PORTS, (inner, net), strict=True), key=lambda item: item[1].max())
        over = [1.0 - x.mean() / max(x.max(), 1e-300) for x in (compute, port)]
        return cls(over[0], name, over[1], bool(np.argmax(compute) == np.argmax(port)))


class Recorder:
    """A step policy that measures another: seconds of its calls, and who lags under its plans."""

    def __init__(self, policy: StepPolicy, first: int) -> None:
        self.policy, self.first = policy, first
        self.before_s: dict[tuple[int, int], float] = Counter()
        self.after_s: dict[tuple[int, int], float] = Counter()
        self.lags: dict[tuple[int, int], Lag] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def before_gate(self, view: LayerView) -> Any:
        """Timed."""
        began = time.perf_counter()
        out = self.policy.before_gate(view)
        self.before_s[view.step, view.layer] += time.perf_counter() - began
        return out

    def in_background(self, view: LayerView, holders_ED: Any) -> Any:
        """Timed."""
        began = time.perf_counter()
        out = self.policy.in_background(view, holders_ED)
        self.before_s[view.step, view.layer] += time.perf_counter() - began
        return out

    def after_gate(self, view: LayerView, holders_ED: Any, load_SE: Any) -> StepPlan:
        """Timed; then who lags."""
        began = time.perf_counter()
        plan = self.policy.after_gate(view, holders_ED, load_SE)
        self.after_s[view.step, view.layer] += time.perf_counter() - began
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
    latency = 2 * latency_seconds(case.cluster)
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
    share_LBED = [split_share_BED(batch.load_BLE[:, layer], count, case.cluster.speed_D, split)
                  for layer, count in enumerate(placement.count_LED())]  # fmt: skip
    for step, load_LE in enumerate(batch.load_BLE):
        for load_E, share_BED in zip(load_LE, share_LBED, strict=True):
            tokens_ED = load_E[:, None] * share_BED[min(step, len(share_BED) - 1)]
            pairs = np.broadcast_to(tokens_ED.sum(axis=0) / devices, (devices, devices))
            out.append(Lag.of(tokens_ED, pairs, case.cluster, case.model))
    return out


def static_rows(case: Case, data: Path, batch: RoutingBatch) -> dict[str, tuple[Row, Placement]]:
    """Every static map under the even split; LPT's and poise's under the exact one too."""
    judged, out, maps = batch.steps_from(WARM_UP), {}, {}
    for name in STATIC:
        for split in ("even", "exact") if name in ("eplb-global", "poise") else ("even",):
            if not runs(name, case, static=True):
                continue
            if name == "poise" or name not in maps:
                problem = PlacementProblem(case.fitted(data), case.cluster, case.model, case.slots_D, "home", split)
                try:
                    maps[name] = solve(problem, method=name, time_limit_s=10.0 if "moe" in name else 1.0)
                except PoiseError as error:
                    print(case.devices, name, error)
                    continue
            found = maps[name]
            got = replay(judged, found.placement, case.cluster, case.model, traffic="home", split=split)
            label = name if split == "even" else f"{name}, exact split"
            seconds = found.seconds / len(case.picked)
            lags = static_lags(judged, found.placement, case, split)
            out[label] = make_row(label, got, lags, case, before_s=seconds), found.placement
    return out


def runs(name: str, case: Case, *, static: bool = False) -> bool:
    """Whether a row is run at this size; the report says why not."""
    if name == "moetuner-equal":
        return case.devices <= MOETUNER_TO and case.model_name == MODELS[0]
    if name != "poise":
        return True
    if static:
        return case.devices <= POISE_TO
    if case.model_name != MODELS[0] or case.tokens:
        return case.devices <= POISE_TO
    return case.devices <= (1024 if case.phase is PREFILL else 512)


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
    grid = policy.grid[:2] if policy.name == "lplb" else policy.grid  # the rest place replicas where the map has none

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
        if not runs(name, case):
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


HEAD = ["policy", "ms a layer", "static / it", "planning free", "planning as here", "compute", "exchange", "weights",
        "control", "efficiency", "max / mean", "sets the layer", "lost to lag", "same device", "plan ahead ms", "/ layer",
        "plan after gate ms", "/ layer", "setting"]  # fmt: skip


def cells(row: Row, base: float) -> list[object]:
    """A row of the long tables."""
    ms = {key: f"{1e3 * value:.3f}" for key, value in row.cost.items()}
    fast = row.name.startswith("+")
    return [row.name, f"{1e3 * row.seconds:.3f}", f"{base / row.seconds:.2f}",
            f"{base / row.planned_free:.2f}" if row.cost["planning"] else "",
            f"{base / row.planned_here:.2f}" if row.cost["planning"] else "", ms["compute"], ms["exchange"], ms["weights"],
            f"{1e3 * (row.cost['control'] + row.cost['planning']):.3f}", f"{row.efficiency:.2f}", f"{row.imbalance:.2f}",
            row.sets, f"{row.lost:.0%}", f"{row.same:.0%}", f"{1e3 * row.before_s:.2f}", f"{row.before_s / row.seconds:.2g}",
            f"{1e3 * row.after_s:.2f}" if fast else "", f"{row.after_s / row.seconds:.2g}" if fast else "", row.setting]  # fmt: skip


Key = tuple[str, str, int]
Found = dict[Key, tuple[str, list[Row]]]
Series = dict[str, list[tuple[float, float]]]


def main_table(data: Path) -> Found:
    """All rows of every model, phase and size; with the best static map's name."""
    out = {}
    for model in MODELS:
        for phase in (PREFILL, DECODE):
            for devices in EFFORT:
                case = Case(model, devices, phase)
                batch = case.batch(data)
                static = static_rows(case, data, batch)
                best = best_static(static)
                rows = [row for row, _ in static.values()] + fast_rows(case, data, batch, static[best][1])
                out[model, phase.name, devices] = best, rows
    return out


def find(rows: list[Row], name: str) -> Row | None:
    """The row of that name."""
    return next((row for row in rows if row.name == name), None)


def speedups(found: Found, model: str, phase: str, names: Iterable[str]) -> Series:
    """Best static time / policy time by devices."""
    out: Series = {}
    for (m, p, devices), (best, rows) in found.items():
        base = find(rows, best)
        for name in names:
            row = find(rows, f"+ {name}")
            if (m, p) == (model, phase) and base and row:
                out.setdefault(name, []).append((devices, base.seconds / row.seconds))
    return out


def summary_table(found: Found, model: str, phase: str) -> str:
    """Milliseconds of the maps and speedup of the policies, by devices."""
    keys = [key for key in found if key[:2] == (model, phase)]
    names = list(dict.fromkeys(row.name for key in keys for row in found[key][1]))
    lines: list[list[object]] = []
    for name in names:
        line: list[object] = [name]
        for key in keys:
            best, rows = found[key]
            row, base = find(rows, name), find(rows, best)
            assert base
            if row is None:
                line.append("not run")
            elif name.startswith("+"):
                line.append(f"{base.seconds / row.seconds:.2f}")
            else:
                line.append(f"**{1e3 * row.seconds:.2f}**" if name == best else f"{1e3 * row.seconds:.2f}")
        lines.append(line)
    return table(["row", *(str(key[2]) for key in keys)], lines)


def lag_table(found: Found) -> str:
    """Who lags under the best static map and under the best policy over it."""
    lines: list[list[object]] = []
    for (model, phase, devices), (best, rows) in found.items():
        base = find(rows, best)
        fast = min((row for row in rows if row.name.startswith("+")), key=lambda row: row.seconds)
        assert base
        lines.append([f"{model} {phase}", devices, best, base.sets, f"{base.lost:.0%}", f"{base.same:.0%}",
                      f"{base.imbalance:.2f}", fast.name, f"{base.seconds / fast.seconds:.2f}", fast.sets,
                      f"{fast.lost:.0%}", f"{fast.imbalance:.2f}"])  # fmt: skip
    return table(["case", "devices", "best static", "sets the layer", "lost to lag", "same device", "max / mean",
                  "fastest policy", "static / it", "sets the layer", "lost to lag", "max / mean"], lines)  # fmt: skip


def over_eplb(
    case: Case, data: Path, split: Literal["even", "exact"] = "even"
) -> tuple[RoutingBatch, Placement, Replay]:
    """Steps, EPLB's global map, and what it costs on the judged ones."""
    batch = case.batch(data)
    problem = PlacementProblem(case.fitted(data), case.cluster, case.model, case.slots_D, "home")
    placement = solve(problem, method="eplb-global").placement
    judged = batch.steps_from(WARM_UP)
    return batch, placement, replay(judged, placement, case.cluster, case.model, traffic="home", split=split)


CURVE_DEVICES, CURVE_TOKENS = (64, 256, 1024), (16, 64, 256, 1024, 4096, 16384)


def curve(data: Path) -> dict[int, Series]:
    """EPLB's time / policy time by tokens a device, on the decode loads."""
    out: dict[int, Series] = {}
    for devices in CURVE_DEVICES:
        for tokens in CURVE_TOKENS:
            case = Case(MODELS[0], devices, DECODE, tokens, layers=1, steps=3)
            batch, placement, base = over_eplb(case, data)
            for row in fast_rows(case, data, batch, placement):
                point = (tokens, float(base.step_seconds_B.mean()) / row.seconds)
                out.setdefault(devices, {}).setdefault(row.name[2:], []).append(point)
    return out


def pays_from(points: list[tuple[float, float]]) -> str:
    """Least size from which on it gains 1 % at every larger one."""
    good = [y >= 1.01 for _, y in points]
    steady = [x for i, (x, _) in enumerate(points) if all(good[i:])]
    return f"{steady[0]:g}" if steady else "not steadily" if any(good) else "never"


def curve_table(curves: dict[int, Series]) -> str:
    """A line for each number of devices and policy."""
    lines: list[list[object]] = []
    for devices, series in curves.items():
        for name, points in series.items():
            lines.append([devices, name, *(f"{y:.2f}" for _, y in points), pays_from(points)])
    return table(["devices", "policy", *(str(x) for x in CURVE_TOKENS), "pays from"], lines)


def drift_table(data: Path) -> str:
    """How much of the main table hangs on the assumed drift."""
    lines: list[list[object]] = []
    names = ("split", "ultra-ep", "moon-ep", "poise")
    for drift in (0.0, DRIFT, 0.6):
        for devices in (64, 512):
            case = Case(MODELS[0], devices, PREFILL, layers=1, steps=3, drift=drift)
            batch, placement, base = over_eplb(case, data)
            seconds = float(base.step_seconds_B.mean())
            rows = fast_rows(case, data, batch, placement, names)
            lines.append([devices, drift, f"{1e3 * seconds:.2f}", f"{base.imbalance:.2f}",
                          *(f"{seconds / row.seconds:.2f}" for row in rows)])  # fmt: skip
    return table(["devices", "drift", "static ms a layer", "max / mean", *names], lines)


def slots_table(data: Path) -> str:
    """More redundant slots in place of a fast loop."""
    lines: list[list[object]] = []
    for phase in (PREFILL, DECODE):
        for devices in (256, 512, 1024):
            line: list[object] = [phase.name, devices]
            for extra in (0, 1, 2):
                case = Case(MODELS[0], devices, phase, layers=2, steps=3, extra=extra)
                even, exact = (over_eplb(case, data, split)[2] for split in ("even", "exact"))
                line += [int(case.slots_D[0]), f"{1e3 * float(even.step_seconds_B.mean()) / 2:.2f}", f"{even.imbalance:.2f}",
                         f"{1e3 * float(exact.step_seconds_B.mean()) / 2:.2f}"]  # fmt: skip
            lines.append(line)
    return table(["phase", "devices", *["slots a device", "even ms", "max / mean", "exact ms"] * 3], lines)


FLOWS: tuple[Traffic, ...] = ("home", "home_device_dedup", "home_node_dedup")


def dedup_table(data: Path) -> str:
    """Synthetic tokens: what deduplication does."""
    lines: list[list[object]] = []
    names = ("split", "ultra-ep", "poise")
    for devices in (64, 128, 256):
        case = Case(MODELS[0], devices, DECODE, layers=1, steps=2)
        ids, tokens = case.layer_ids(), devices * DECODE.tokens
        fit = token_batch(case.share(data, DECODE.fit[0]), tokens, 1, 0.0, ids)
        batch = token_batch(case.share(data, DECODE.judge), tokens, WARM_UP + 2, DRIFT, ids)
        fit = RoutingBatch(fit.load_BLE.copy(), np.ones(1), fit.top_k, ids)
        problem = PlacementProblem(fit, case.cluster, case.model, case.slots_D, "home")
        placement = solve(problem, method="eplb-global").placement
        for flow in FLOWS:
            base = replay(batch.steps_from(WARM_UP), placement, case.cluster, case.model, traffic=flow, split="even")
            seconds = float(base.step_seconds_B.mean())
            dispatch = float(base.cost.dispatch_BL.mean())
            line: list[object] = [
                devices,
                flow,
                f"{1e3 * seconds:.3f}",
                f"{1e3 * dispatch:.3f}",
                f"{base.imbalance:.2f}",
            ]
            for name in names:
                setting = next((v for k, v in TUNED.items() if k[:3] == (name, "decode", 128) and k[4] == devices), {})
                loop = FastLoop(replace(POLICIES[name], **setting), 1)
                got = replay_steps(batch, placement, loop, case.cluster, case.model, traffic=flow, warm_up=WARM_UP,
                                   prior_LE=fit.load_LE())  # fmt: skip
                line.append(f"{seconds / float(got.step_seconds_B.mean()):.2f}")
            lines.append(line)
            print(line, flush=True)
    return table(["devices", "flow", "static ms a layer", "dispatch ms", "max / mean", *names], lines)


def planning_table(found: Found, phase: str) -> str:
    """Milliseconds of planning a layer by devices, DeepSeek-V3."""
    keys = [key for key in found if key[:2] == (MODELS[0], phase)]
    charged = [PLAN_SECONDS_BASE + PLAN_SECONDS_PER_PAIR * 256 * key[2] for key in keys]
    lines: list[list[object]] = [["the layer itself, best static map", *(f"{1e3 * must(found, key).seconds:.2f}" for key in keys)],
                                 ["charged after the gate by the model", *(f"{1e3 * s:.2f}" for s in charged)]]  # fmt: skip
    for name in FAST:
        rows = [find(found[key][1], f"+ {name}") for key in keys]
        lines.append([f"{name}, after the gate", *(f"{1e3 * row.after_s:.2f}" if row else "not run" for row in rows)])
        if name in ("hecate", "poise"):
            said = [f"{1e3 * row.before_s:.1f} ({1e3 * row.worst_s:.0f})" if row else "not run" for row in rows]
            lines.append([f"{name}, ahead, mean (worst)", *said])
    for name in ("lpt", "eplb-global", "poise"):
        rows = [find(found[key][1], name) for key in keys]
        lines.append([f"static {name}, once", *(f"{1e3 * row.before_s:.1f}" if row else "not run" for row in rows)])
    return table(["ms a layer", *(str(key[2]) for key in keys)], lines)


def must(found: Found, key: Key) -> Row:
    """The best static row."""
    best, rows = found[key]
    return next(row for row in rows if row.name == best)


def planning_chart(found: Found) -> Series:
    """log10 of (planning seconds / layer seconds) by devices, DeepSeek-V3 prefill."""
    out: Series = {}
    for (model, phase, devices), (_, rows) in found.items():
        for name in ("split", "llep", "ultra-ep", "moon-ep", "poise"):
            row = find(rows, f"+ {name}")
            if row and (model, phase) == (MODELS[0], "prefill"):
                share = (row.before_s + row.after_s) / row.seconds
                out.setdefault(name, []).append((devices, float(np.log10(share))))
    return out


def plot(name: str, series: Series, x_label: str, y_label: str) -> str:
    """Writes a plot; its markdown."""
    path = REPORTS / f"{datetime.date.today().isoformat()}-scale-{name}.svg"
    path.write_text(line_chart(series, x_label, y_label) + "\n", encoding="utf-8")
    return f"![{y_label}]({path.name})"


def slot_words() -> str:
    """The slot rule, spelt out."""
    slots = {model: [int(Case(model, d, PREFILL).slots_D[0]) for d in EFFORT] for model in MODELS}
    return "; ".join(f"{NAMES[model].split(' ')[0]} {', '.join(map(str, counts))}" for model, counts in slots.items())


def phase_words(phase: Phase) -> str:
    return f"{phase.name}: {phase.tokens} tokens a device, fitted on {' and '.join(phase.fit)}, judged on {phase.judge}"


SHOWN = ("split", "hecate", "ultra-ep", "moon-ep", "poise")
NAMES = {"deepseek-v3": "DeepSeek-V3", "kimi-k2": "Kimi-K2 (synthetic loads)"}
FINDINGS = """\
**On paper only.** Every number is modelled. The model has been measured on emulated machines of up to 16 ranks (other
reports of this date), never at these sizes or on a GPU; rates are datasheet peaks, flows are `home` (no deduplication),
the drift from step to step is assumed, and Kimi-K2's loads are synthetic. Read ratios, not milliseconds; only planning
seconds are measured, on this CPU. Few layers and steps are judged at the large sizes: differences of 5 % mean nothing.

- **The straggler is one network port**, of the device with the hottest expert, which is mostly the fullest in compute
  too. Under the best static map it sets 70 to 83 % of the layer, and 17 to 71 % of the layer is what it takes beyond the
  mean device. That grows until a device holds one expert (DeepSeek-V3 prefill: max / mean 1.45 on 64, 2.98 on 512) and
  eases little with more copies (2.6 on 2048). Efficiency there: 0.34 to 0.39.
- **Prefill, 4096 tokens a device: moving weights pays at every size**: the fastest policy is 1.38 to 2.28 times as fast
  as the best static map (Kimi-K2 1.38 to 2.90), most on 512. `poise` leads up to 256 devices on DeepSeek-V3 and is no
  longer first on 512 and 1024 (2.24 against UltraEP's 2.28, 1.82 against 1.86); on Kimi-K2 it **loses** on 128 (1.31
  against 1.42) and 256 (1.99 against 2.06). UltraEP wins with replicas across nodes, not its published form.
- **Decode, 128 tokens a device: no fast loop pays at any size.** Best: Hecate's 1.04 on 64 devices, 1.00 from 512 on.
  Policies that need exact loads take 1.3 (64) to 9 times (2048) the static layer, mostly charged control; with planning
  free the split would gain at most 5 %, up to 256 devices. One expert's weights take 0.9 ms on the network, a whole
  layer. `poise` stays passive and costs nothing but its planning.
- **The exact split stops paying where a device has one slot**, from 512 devices on: there the even split is exact, and
  what is left is control (0.96 on 512, 0.85 on 2048). Below, it gains 13 to 17 % in prefill (Kimi-K2 4 to 21 %).
- **One more redundant slot a device is the better answer in decode**, and half of it in prefill: on 512 devices a
  second slot takes decode from 1.36 to 0.99 ms and prefill from 53.3 to 35.4 ms under the even split, for 2.6 GB a device.
- **Break-even** (decode loads): 1024 to 4096 tokens a device for every policy that moves weights after the gate and for
  `poise`, on 64, 256 and 1024 devices alike. Hecate loses from 4096 on (exposed fetches); the split alone pays on 256 only.
- **Planning is the wall at scale.** The model charges all exact policies alike, 7.4 ms a layer on 2048 devices. Measured,
  the split takes 1 ms and LLEP 4, but MoonEP 17, UltraEP 53 and LPLB 21 to 70 ms: with those seconds UltraEP's 1.59 is
  0.60 and MoonEP's 1.61 is 1.19, LLEP's 1.53 is 1.75. `poise` plans ahead, uncharged: below the layer's time in prefill up to 256
  devices, 0.2 s a layer on 512 and 4 s on 1024; in decode 27 layer times on 64 devices already, to decide to do nothing.
- **Static planning saturates.** `poise`'s map is 8 to 18 % faster than LPT's and EPLB's in prefill up to 256 devices (Kimi-K2
  2 to 4 %) and -2 to +4 % in decode, for 0.2 to 4 s a layer; with one slot a device it is LPT's and global EPLB's. MoETuner's equal
  clusters use no redundant slots and lose to contiguous blocks on 128 devices."""
SPEED = (
    "Static rows: modelled ms a layer (bold: the least under the even split; the policies run over that map). Policies (+): "
    "that map's time / the policy's; above 1 it pays. Static rows with the exact split pay no control time: what a split "
    "that costs nothing would do."
)
LAG = (
    "Sets the layer: the largest of compute, exchange (the port class of its fullest device), latency, exposed weights, "
    "control and planning, and its share of the layer. Lost to lag: what of the layer the fullest device's compute and port "
    "take beyond the mean device's. Same device: how often one device is the fullest of both."
)
BREAK_EVEN = (
    "DeepSeek-V3, decode loads, one layer, EPLB's map; its time under the even split / the policy's. Pays from: tokens a "
    "device from which on it gains 1 % or more. `poise` was not run at 1024 (planning)."
)
PLANNING = (
    "Measured on this CPU, one core, judged steps; Python around compiled kernels. After the gate: on the critical path, "
    "every layer; the model charges the same 10 us + 14 ns x E x D to every policy that needs exact loads (Hecate needs "
    "none). Ahead: before the gate and in the background, not charged at all: hidden only where it takes less than the "
    "layer; the worst is over all steps, warm-up included. Hecate and LPLB build the rows of all sources up to 256 devices "
    "(a rank needs one), beyond that quotas only."
)
SLOTS = (
    "DeepSeek-V3, EPLB's map, two layers: the slot rule, one and two slots a device more. A slot more a device is 44 MB a "
    "layer, 2.6 GB over 58 layers, taken from the key/value cache. `poise` keeps its step replicas, so its M = 1 costs as much; "
    "UltraEP, LLEP and MoonEP share one buffer among the layers. The exact columns pay no control time."
)
DEDUP = (
    "DeepSeek-V3 decode, one layer, two judged steps of synthetic tokens: Gumbel scores on the log shares, the 4 of 8 groups "
    "with the best two experts, the top 8 of those; homes in turn. Drawing without replacement flattens the loads a little. "
    "Policies (M = 1): static time / theirs. Under `home_node_dedup` copies land on the device with the sender's index, so "
    "the network lags by node, not by device."
)
ROWS = (
    "Milliseconds, means over the judged steps and layers. Static / it: as charged; planning free: the exact policies' counts "
    "are exchanged but planning takes no time; planning as here: with the seconds measured after the gate. Exchange without "
    "latency (2 x 40 us). Plan ahead: static maps, once; policies, every step. Setting: best of the published grid."
)


def how() -> str:
    """Traffic, machines and effort, spelt out."""
    effort = ", ".join(f"{d} devices {layers} and {steps}" for d, (layers, steps) in EFFORT.items())
    return "\n".join([
        f"- Loads: DeepSeek-R1's recorded counts. {phase_words(PREFILL)}; {phase_words(DECODE)} (the two decode workloads differ "
        "little: 0.07 in the logarithm of a share, the prefill ones 0.28 and 0.40). A map is fitted on the workloads' shares "
        "scaled to a step, one scenario each.",
        f"- Kimi-K2: synthetic. Per layer the 256 experts are sorted by mean share over the five workloads; that curve is read at "
        "384 equally spaced quantiles (log-linear); each new expert takes the workload / mean ratios of the recorded expert "
        f"nearest in rank, so the drift between workloads is kept; renumbered at random (seed {SEED}).",
        f"- Steps: share x exp({DRIFT} z), z a standard normal AR(1) with 0.97 a step, at most 1/8; then a multinomial draw of "
        f"D x tokens x 8 pairs (seeds {SEED}, {SEED + 1}). The drift is an assumption: no step-level counts of these models are public.",
        "- Only loads are known, so traffic is `home` (a copy for each token and expert), homes spread evenly.",
        "- Machines: N x 8 H100, datasheet rates, 400 Gb/s a device, start-up 10 + 30 us an exchange at every size.",
        f"- Slots a device: the fewest, the same on all devices, that leave an eighth of the experts redundant, as DeepSeek's 32 of 256. For "
        f"{', '.join(map(str, EFFORT))} devices: {slot_words()}. From 512 devices on: one expert a device, as in DeepSeek's "
        "decoding with EP320; at 2048 an expert has 8 (5.3) copies on average.",
        f"- Judged layers (spread over the 58 recorded) and steps: {effort}; {WARM_UP} steps of warm-up.",
        f"- Step-wise policies: M = 1 or 2 step slots (1 above 512 devices; poise above 128), best of each published grid on two "
        f"judged steps of one layer, chosen anew for every case up to {TUNED_TO} devices, beyond that as at {TUNED_TO}. Tuned and chosen on judged traffic, which favours "
        "the rivals; so is the best static map.",
        f"- Not run: MoETuner's ILPs above {MOETUNER_TO} devices (clusters of one expert) and on the synthetic loads; poise's static search above "
        f"{POISE_TO} (with one slot a device, tried once beside this run, it took 9 s for two layers on 512 and 91 s on 2048 to find LPT's map, whose greedy "
        "replication is optimal there for one scenario); poise's fast loop above 512 (decode), 1024 (prefill), 256 (Kimi-K2): planning ahead takes seconds a layer, and at 2048 the plans it compares "
        "would not fit into memory (4 GB).",
        "- EPLB is hierarchical where groups or experts divide by nodes: DeepSeek-V3 (8 groups) on 64 devices only.",
    ])  # fmt: skip


def text(found: Found, curves: dict[int, Series], tables: dict[str, str], plots: dict[str, str]) -> list[str]:
    """The report."""
    out = [FINDINGS, "## Speed by devices", SPEED]
    for model in MODELS:
        for phase in ("prefill", "decode"):
            out += [f"### {NAMES[model]}, {phase}", summary_table(found, model, phase)]
    out += [plots["prefill"], plots["decode"], "## Who is the straggler", LAG, lag_table(found)]
    out += ["## Where policies stop paying", BREAK_EVEN, curve_table(curves), *(plots[f"tokens-{d}"] for d in curves)]
    out += ["## Planning", PLANNING, "### Prefill", planning_table(found, "prefill"), "### Decode",
            planning_table(found, "decode"), plots["planning"]]  # fmt: skip
    out += ["## More slots instead", SLOTS, tables["slots"]]
    out += ["## How much hangs on the drift", "DeepSeek-V3 prefill, one layer, EPLB's map; the standard deviation of the "
            "logarithm of an expert's popularity about its workload's share.", tables["drift"]]  # fmt: skip
    out += ["## Deduplicating flows", DEDUP, tables["dedup"], "## How", how(), "## Every row", ROWS]
    for key, (_, rows) in found.items():
        base = must(found, key).seconds
        out += [f"### {NAMES[key[0]]}, {key[1]}, {key[2]} devices", table(HEAD, [cells(row, base) for row in rows])]
    return out


def draw(found: Found, curves: dict[int, Series]) -> dict[str, str]:
    """All plots, by name."""
    out = {}
    for phase in ("prefill", "decode"):
        series = speedups(found, MODELS[0], phase, SHOWN)
        out[phase] = plot(phase, series, "devices", f"DeepSeek-V3 {phase}: best static map's time / policy's")
    for devices, lines in curves.items():
        series = {name: lines[name] for name in SHOWN if name in lines}
        out[f"tokens-{devices}"] = plot(f"tokens-{devices}", series, "tokens a device",
                                        f"DeepSeek-V3, {devices} devices: static time / policy's")  # fmt: skip
    label = "log10 of planning time / layer time, DeepSeek-V3 prefill"
    out["planning"] = plot("planning", planning_chart(found), "devices", label)
    return out


def main() -> None:
    data, began = Path(sys.argv[1]), time.time()
    found, curves = main_table(data), curve(data)
    tables = {"drift": drift_table(data), "slots": slots_table(data), "dedup": dedup_table(data)}
    parts = text(found, curves, tables, draw(found, curves))
    write("At scale, on paper", [*parts, f"Run time {time.time() - began:.0f} s."])


if __name__ == "__main__":
    main()
