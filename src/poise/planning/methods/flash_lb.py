"""FlashLB ("FlashTree"): vllm-ascend's policy 3, replicas and places chosen together on the statistics of many steps.

Source: github.com/vllm-project/vllm-ascend, vllm_ascend/eplb/core/policy/policy_flashlb.py, as in the wheels of 0.23.0
and 0.26.0rc1; its constants are :data:`PUBLISHED`. There is no paper; the steps are those of the code, layer by layer:

Step 1  Samples: one token is added to every expert in every step; then the last steps, consecutive ones added up until
        fewer than 128, then the last 64 of them. Mean, variance and covariance of the experts' loads over them.
Step 2  Experts in descending mean + z std (z = 0.674, the 75 % quantile) are cut into 4 groups (depth).
Step 3  For each group but the last: how many of the redundant replicas left go to it, the rest going to all later
        groups. Start from its part in an allotment over both together; try up to 8 (width) fewer and more, nearest
        first, fewer before more, and keep the first with the least score. Inside a group and among the later ones
        each replica goes to the largest (mean + z std) / replicas (in proportion to mean + z std in release 0.18.0 and
        in the version offered to vLLM, pull request 37656).
Step 4  Score of a choice: all replicas are placed by step 5; mean over samples of max/mean over devices, even split.
Step 5  Covariance-aware LPT: experts in descending mean / replicas; each replica to the device with a free slot,
        without the expert, where mean + z std of the device's load (with all covariances on it) is least.
Step 6  Devices renumbered by the Hungarian method so that most experts stay, then slots inside each device.
Step 7  Keep a layer's new placement only if its score is below that of the one in use, which is scored on all steps as
        they came.

Loads and variances of devices and the scores of steps are float32, as in the code.

Chosen where the source is silent or cannot be followed (docs/planning.md says it for users):

- Without a current placement the layout is the one the engine starts with: physical expert p holds p mod E.
- Steps have weights here, so statistics are weighted (with equal weights they are the code's). A layer without tokens
  stays as it is.
- The code's history of past scores (re-plan only below 90 % of the last one or below 0.85) starts empty, which means
  every layer is planned: a plan here is the first call.
- No expert gets more replicas than there are devices with slots: the excess goes to the next largest. A replica that
  fits nowhere is left out, and the score counts the replicas there are (the code then writes past the end of a row, or
  keeps the layer where it sees an empty slot).
- Slots may differ, loads are divided by the speed of their device, and only devices with as many slots and the same
  speed are renumbered among each other. A second copy on one device of the current placement is dropped first.
- Equal values: lower expert, lower device first; experts of equal mean / replicas in step 5 in the order of numba's
  sort, as in the code. Newcomers take a device's slots in ascending order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from poise.planning.budget import Budget, Limit
from poise.planning.methods.swift_balance import keep_slots, start_table, to_placement, uneven
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.routing.batch import RoutingBatch
from poise.util.compiled import compiled, plain
from poise.util.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashLBSetting:
    """Constants of the code.

    Parameters
    ----------
    z_score : standard deviations added to a mean load.
    depth : groups of experts whose replicas are decided one after the other; 1 = no search.
    width : farthest distance of a tried number of replicas from the first guess.
    samples : samples that steps are merged into where there are enough, or None to use every step.
    added : tokens added to every expert in every step.
    """

    z_score: float = 0.6744897501960817
    depth: int = 4
    width: int = 8
    samples: int | None = 64
    added: float = 1.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.z_score) and self.z_score >= 0):
            raise OptionError(f"the z score must be at least 0, got {self.z_score}")
        if self.depth < 1 or self.width < 0 or (self.samples is not None and self.samples < 1):
            raise OptionError(
                f"depth {self.depth} and samples {self.samples} must be at least 1, width {self.width} at least 0"
            )
        if not (np.isfinite(self.added) and self.added >= 0):
            raise OptionError(f"the tokens added to every expert must be at least 0, got {self.added}")


PUBLISHED = FlashLBSetting()


def samples(
    batch: RoutingBatch, most: int | None, added: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Step 1: loads float64 [T, L, E], of a sample's steps together, and weights float64 [T], summing to 1."""
    load, weight = batch.load_BLE + added, batch.weight_B
    window = 1 if most is None else max(batch.num_steps // most, 1)
    last = batch.num_steps if most is None else min(batch.num_steps, window * most)
    if weight[-last:].sum() > 0:
        load, weight = load[-last:], weight[-last:]
    else:
        window = 1
    parts_TW = weight.reshape(-1, window)
    sum_T = parts_TW.sum(axis=1)
    share_TW = np.divide(parts_TW, sum_T[:, None], out=np.zeros_like(parts_TW), where=sum_T[:, None] > 0)
    merged = np.einsum("tw,twle->tle", share_TW * window, load.reshape(-1, window, *load.shape[1:]))
    return merged, sum_T / sum_T.sum()


def statistics(
    load_TE: NDArray[np.float64], weight_T: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [E] and unbiased covariance [E, E] of weighted samples; zero covariance where one sample has all weight.

    With equal weights the sums and divisors are numpy's own, to the last digit.
    """
    count_T = weight_T / weight_T.max()
    total = float(count_T.sum())
    mean_E = (load_TE * count_T[:, None]).sum(axis=0) / total
    freedom = total - float((count_T**2).sum()) / total
    if freedom < 1e-9 * total:
        return mean_E, np.zeros((len(mean_E), len(mean_E)))
    off = load_TE - mean_E
    return mean_E, (off * count_T[:, None]).T @ off / freedom


def allot(value_E: NDArray[np.float64], extra: int, most: int) -> NDArray[np.int64]:
    """Replicas after 0, 1, ..., ``extra`` redundant ones, int [extra + 1, E], at most ``most`` each.

    ``extra`` must not exceed E * (most - 1).
    """
    out = np.ones((extra + 1, len(value_E)), np.int64)
    for r in range(1, extra + 1):
        out[r] = out[r - 1]
        out[r, np.argmax(np.where(out[r] < most, value_E / out[r], -1.0))] += 1
    return out


@compiled
def _place(mean, cov, replicas, slots, speed, z):  # type: ignore[no-untyped-def]
    """Step 5: experts of each device [D, K], and how many [D]."""
    devices = len(slots)
    held = np.full((devices, slots.max()), -1, np.int64)
    used = np.zeros(devices, np.int64)
    load, var = np.zeros(devices, np.float32), np.zeros(devices, np.float32)
    for e in np.argsort(-(mean / replicas)):
        for _ in range(replicas[e]):
            best, best_risk, best_var = -1, np.inf, 0.0
            for d in range(devices):
                if used[d] >= slots[d]:
                    continue
                new_var = var[d] + cov[e, e] / replicas[e] ** 2
                has = False
                for k in range(used[d]):
                    other = held[d, k]
                    has = has or other == e
                    new_var += 2.0 * cov[e, other] / replicas[e] / replicas[other]
                if has:
                    continue
                risk = (load[d] + mean[e] / replicas[e] + z * np.sqrt(max(new_var, 0.0))) / speed[d]
                if risk < best_risk:
                    best, best_risk, best_var = d, risk, new_var
            if best >= 0:
                held[best, used[best]] = e
                used[best] += 1
                load[best] = load[best] + mean[e] / replicas[e]
                var[best] = best_var
    return held, used


@compiled
def _score(load, weight, held, used, speed):  # type: ignore[no-untyped-def]
    """Step 4: weighted mean over samples [T] of max/mean of load / speed over devices; 1 for an empty sample.

    0.01 keeps an empty sample from dividing by zero; single precision decides which of two choices comes first.
    """
    steps, experts = load.shape
    count = np.zeros(experts)
    for d in range(len(used)):
        for k in range(used[d]):
            count[held[d, k]] += 1.0
    score = 0.0
    for t in range(steps):
        most = total = 0.0
        for d in range(len(used)):
            own = 0.0
            for k in range(used[d]):
                own += load[t, held[d, k]] / count[held[d, k]]
            total += own
            most = max(most, own / speed[d])
        score += weight[t] * np.float32((most * speed.sum() + 0.01) / (total + 0.01))
    return np.float32(score)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer's samples and devices: load [T, E], weight [T], mean [E], covariance [E, E], slots and speed [D]."""

    load_TE: NDArray[np.float64]
    weight_T: NDArray[np.float64]
    mean_E: NDArray[np.float64]
    cov_EE: NDArray[np.float64]
    slots_D: NDArray[np.int64]
    speed_D: NDArray[np.float64]

    def place(self, replicas_E: NDArray[np.int64], z: float) -> tuple[float, NDArray[np.bool_]]:
        """Steps 5 and 4: score, and what devices hold, bool [D, E]."""
        held, used = _place(self.mean_E, self.cov_EE, replicas_E, self.slots_D, self.speed_D, z)
        holds = np.zeros((len(used), len(self.mean_E)), np.bool_)
        for d, n in enumerate(used):
            holds[d, held[d, :n]] = True
        return float(_score(self.load_TE, self.weight_T, held, used, self.speed_D)), holds

    def score(self, holds_DE: NDArray[np.bool_]) -> float:
        """Step 4 for any placement."""
        used = holds_DE.sum(axis=1)
        held = np.full((len(used), max(int(used.max()), 1)), -1, np.int64)
        for d, n in enumerate(used):
            held[d, :n] = np.flatnonzero(holds_DE[d])
        return float(_score(self.load_TE, self.weight_T, held, used, self.speed_D))


def search(layer: Layer, s: FlashLBSetting) -> tuple[float, NDArray[np.bool_]]:
    """Steps 2 to 5: score and placement, bool [D, E], of one layer."""
    experts, most = len(layer.mean_E), int((layer.slots_D > 0).sum())
    value_E = layer.mean_E + s.z_score * np.sqrt(np.maximum(np.diag(layer.cov_EE), 0.0))
    left = int(layer.slots_D.sum()) - experts
    replicas = allot(value_E, left, most)[-1]
    order = np.argsort(-value_E, kind="stable")
    size = -(-experts // s.depth)
    for node in range(s.depth - 1):
        rest = order[node * size :]
        own, later = rest[:size], rest[size:]
        room, beyond = len(own) * (most - 1), len(later) * (most - 1)
        own_RE = allot(value_E[own], min(left, room), most)
        later_RE = allot(value_E[later], min(left, beyond), most)
        low, high = max(0, left - beyond), min(left, room)
        guess = int((allot(value_E[rest], left, most)[-1][:size] - 1).sum())
        best, best_score = guess, np.inf
        tried = [guess, *(guess + sign * r for r in range(1, s.width + 1) for sign in (-1, 1))]
        for r in (r for r in tried if low <= r <= high):
            replicas[own], replicas[later] = own_RE[r], later_RE[left - r]
            score, _ = layer.place(replicas, s.z_score)
            if score < best_score:
                best, best_score = r, score
        replicas[own], replicas[later] = own_RE[best], later_RE[left - best]
        left -= best
        if left == 0:
            break
    return layer.place(replicas, s.z_score)


def renumber(
    old_DE: NDArray[np.bool_], new_DE: NDArray[np.bool_], slots_D: NDArray[np.int64], speed_D: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Step 6: rows of ``new_DE`` in the order, among equal devices, in which most experts stay where they are."""
    out = new_DE.copy()
    kind_D = np.unique(np.stack([slots_D.astype(np.float64), speed_D]), axis=1, return_inverse=True)[1].reshape(-1)
    for kind in range(int(kind_D.max()) + 1):
        alike = np.flatnonzero(kind_D == kind)
        stay = old_DE[alike].astype(np.int64) @ new_DE[alike].astype(np.int64).T
        to, source = linear_sum_assignment(stay, maximize=True)
        out[alike[to]] = new_DE[alike[source]]
    return out


def plan(
    problem: PlacementProblem,
    *,
    time_limit_s: Limit,
    seed: int = 0,
    progress: Progress | None = None,
    setting: FlashLBSetting = PUBLISHED,
) -> MethodResult:
    """FlashLB on the batch's steps; layers that the clock cuts off stay as they are. The seed plays no part.

    ``details``: layers changed, samples used, slots left empty, mean score over layers before and after, and
    ``adapted`` where slots, speeds or the current placement are not what the code knows.
    """
    budget = Budget.of(time_limit_s)
    batch, speed_D = problem.batch, plain(problem.cluster.speed_D, np.float64)
    table = start_table(problem)
    holds_LDE = table.holds_LDE(batch.num_experts)
    load_TLE, weight_T = samples(batch, setting.samples, setting.added)
    every_TLE = batch.load_BLE + setting.added
    out = table.expert_LDK.copy()
    before, after = np.ones(batch.num_layers), np.ones(batch.num_layers)
    for index in range(batch.num_layers):
        slots_D = plain(table.capacity_LD[index], np.int64)
        if load_TLE[weight_T > 0, index].max() > setting.added and not budget.over("flash-lb"):
            load_TE = np.ascontiguousarray(load_TLE[weight_T > 0, index])
            weight = weight_T[weight_T > 0]
            layer = Layer(load_TE, weight, *statistics(load_TE, weight), slots_D, speed_D)
            every_TE = np.ascontiguousarray(every_TLE[:, index])
            all_steps = replace(layer, load_TE=every_TE, weight_T=plain(batch.weight_B, np.float64))
            before[index] = after[index] = all_steps.score(holds_LDE[index])
            score, holds = search(layer, setting)
            if score < before[index]:
                after[index] = score
                holds = renumber(holds_LDE[index], holds, slots_D, speed_D)
                out[index] = keep_slots(table.expert_LDK[index], holds, table.room_D)
        if progress is not None:
            progress("flash-lb", (index + 1) / batch.num_layers)
    details: dict[str, Any] = {
        "changed_layers": int((after < before).sum()), "samples": len(weight_T),
        "empty_slots": int(table.room_D.sum() * batch.num_layers - (out >= 0).sum()),
        "score_before": float(before.mean()), "score": float(after.mean()),
    }  # fmt: skip
    notes = [*table.notes, *uneven(problem, table)]
    if notes:
        details["adapted"] = "; ".join(notes)
    return MethodResult(to_placement(problem, out, table.room_D, "flash-lb"), details)
