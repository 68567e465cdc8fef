"""``poise``: replicas from predicted loads, tokens split exactly after the gate, weights moved only when they pay.

Before the gate, from predicted loads
    Step 1  The work of each expert (seconds under the roofline) is split exactly over its present holders.
    Step 2  While a device lies above the mean, the expert that gives most on a fullest device gets a replica on the
            idlest device with a free step slot, or in place of a step replica that brings less than half as much
            ("surplus fill"). Replicas stay until they are replaced: what is predicted again is not fetched again.
    Step 3  ``seconds``: of all the plans passed on the way, from "move nothing" on, the one with the least
            predicted layer time + exposed fetch / ``horizon`` steps. No fetch stalls a layer by more than ``stall``
            times its own time, and what can come in the background within ``patience`` windows does, unless it gains
            ``urgency``. If leaving the engine's even split over the
            static placement alone is predicted to be as fast, nothing is exchanged and nothing moves.
            ``tokens``: all of them; slots still free get the experts with most tokens a holder, as slack for what the
            prediction misses. (``seconds`` offers such slots to the hottest experts, whose tokens then stay at home.)
    Step 4  ``seconds``: replicas that would pay were they here, but whose fetch would be seen, come in the background:
            at most one a device at a time.
After the gate, from exact loads
    Step 5  ``tokens``: the exact split. ``seconds``: the fastest for these sources of the exact split, one by work
            (experts bound by reading their weights stay whole), and one by work that leaves more tokens at home.

Training (``view.price.training``; ``view.before_ED`` holds owners only): the optimizer changes every weight, so no
replica is kept and none comes in the background. In place of steps 1 to 5, with three compute passes, four all-to-alls
and weights priced there and back (:mod:`poise.stepwise.poise.joint_plan`, whose steps 1 to 6 run):
    Step 6  Before the gate: the replicas with the least modelled time on predicted loads; none, and no exchange of
            counts, if that does not beat the owners alone.
    Step 7  After the gate: the fastest two-level split on exact loads, and at most ``extra`` late replicas that pay. No
            counts are exchanged where tokens sent to their nearest holders are predicted to be as fast, within
            ``margin``, as the exact split with its control time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine, expert_works
from poise.cost.weights import compiled_price, fetch_seconds
from poise.stepwise.methods.hecate import nearest_rows
from poise.stepwise.methods.split import even_quota, exact_split, spread_evenly
from poise.stepwise.poise import joint, joint_plan
from poise.stepwise.poise import kernels as k
from poise.stepwise.protocol import Fetch, LayerView, StepPlan, StepPolicy

Objective = Literal["seconds", "tokens"]
TRAIN_PLAN_SECONDS_BASE, TRAIN_PLAN_SECONDS_PER_PAIR = 25e-6, 100e-9
"""Step 7 on one core: seconds, and seconds per (expert, device), after benchmarks/train.py (part ``planner``)."""


@lru_cache(maxsize=32)
def _desk(num_experts: int, num_devices: int, num_entries: int, thread: int) -> k.Workspace:
    return k.make_workspace(num_experts, num_devices, num_entries)


@dataclass(frozen=True, slots=True)
class Poise(StepPolicy):
    """See the module docstring.

    Parameters
    ----------
    objective : ``seconds`` weighs everything; ``tokens`` balances tokens whatever it costs.
    horizon : steps over which an exposed fetch is written off; replicas that stay serve many.
    stall : most that one exposed fetch may take, in layer times.
    urgency : predicted gain, as a share of the layer time, for which a fetch that could wait is made at once.
    patience : most windows that a background fetch may take.
    margin : least predicted gain, as a share of the passive layer time, that wakes the loop (training: by which
        sending tokens to the nearest holders must be faster).
    slack : the second split may exceed the best maximum by this share to keep tokens at home.
    extra : training: most replicas that are fetched after the gate.
    """

    name: ClassVar[str] = "poise"
    summary: ClassVar[str] = "predicted replicas where they pay, exact split after the gate"
    keeps: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    objective: Objective = "seconds"
    horizon: float = 24.0
    stall: float = 6.0
    urgency: float = 0.2
    patience: float = 8.0
    margin: float = 0.03
    slack: float = 0.05
    extra: int = 4

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Steps 1 to 3, or 6."""
        if view.price.training and self.objective == "seconds":
            return self._materialise(view)
        machine = compiled_price(view.price).machine
        space = self._workspace_of(view)
        held = view.before_ED.copy()
        if view.coming_ED.any():
            return view.before_ED
        if self.objective == "tokens":
            return self._fill(view, held, machine, space, view.predicted_E)[-1]
        best, best_seconds = view.before_ED, np.inf
        wake = self._wake_below(view, machine, space)
        last, stay_s = view.before_ED, np.inf
        for plan in self._fill(view, held, machine, space, expert_works(view.predicted_E, machine)):
            seconds = self._planned(view, plan, machine, space)
            stay_s = min(stay_s, seconds) if not (plan & ~view.before_ED).any() else stay_s
            exposed = fetch_seconds(view.before_ED, plan & ~view.before_ED, view.price) - view.price.window_s
            if exposed > 0.0:
                if exposed > self.stall * wake:
                    break
                alone = fetch_seconds(view.before_ED, plan & ~last, view.price)
                if alone <= self.patience * view.price.window_s and seconds > (1.0 - self.urgency) * stay_s:
                    last = plan
                    continue  # step 4 will bring it in the background
                seconds += exposed / self.horizon
            last = plan
            if seconds < best_seconds * (1 - 1e-6):
                best, best_seconds = plan, seconds
        return view.before_ED if best_seconds > wake else best

    def in_background(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> Fetch | None:
        """Step 4."""
        if self.objective == "tokens" or view.price.training:
            return None
        machine, space = compiled_price(view.price).machine, self._workspace_of(view)
        plans = self._fill(view, holders_ED.copy(), machine, space, expert_works(view.predicted_E, machine))
        seconds = [self._planned(view, plan, machine, space) for plan in plans]
        wake = self._wake_below(view, machine, space)
        best = int(np.argmin(seconds))
        if best == 0 or seconds[best] > min(wake, seconds[0] * (1.0 - self.margin)):
            return None
        coming, reached = np.zeros_like(holders_ED), holders_ED
        for before, after in pairwise(plans[: best + 1]):
            new = after & ~before
            if coming[:, new.any(axis=0)].any():
                break
            coming, reached = coming | new, after
        wanted = coming & ~holders_ED
        if fetch_seconds(holders_ED, wanted, view.price) > self.patience * view.price.window_s:
            return None
        to = wanted.any(axis=0)
        dropped = holders_ED & ~reached & to & ~view.static_ED
        room = view.slots_D - holders_ED.sum(axis=0)
        dropped &= room < wanted.sum(axis=0)
        return Fetch(wanted, dropped) if wanted.any() and (dropped.sum(axis=0) <= 1).all() else None

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Steps 5 and 7."""
        machine, space = compiled_price(view.price).machine, self._workspace_of(view)
        if self.objective == "tokens":
            return StepPlan(holders_ED, exact_split(load_SE, holders_ED, machine.speed_D, node_D=machine.node_D))
        if view.price.training:
            return self._calibrated(view, holders_ED, load_SE)
        if self.leaves_alone(view, holders_ED):
            return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), view.static_ED), passive=True)
        holders = k.compile_all(holders_ED, space)
        k.best_split(load_SE, holders, machine, self.slack, space)
        quota = np.zeros(holders_ED.shape, np.int64)
        quota[holders.expert_H, holders.device_H] = np.rint(space.best_H[: holders.device_H.size])
        return StepPlan(holders_ED, quota)

    def leaves_alone(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> bool:
        """Whether :meth:`after_gate` will be passive whatever the exact loads are: then nobody need wait for them."""
        if self.objective == "tokens" or view.price.training:
            return False
        machine, space = compiled_price(view.price).machine, self._workspace_of(view)
        return self._planned(view, holders_ED, machine, space) > self._wake_below(view, machine, space)

    def _materialise(self, view: LayerView) -> NDArray[np.bool_]:
        """Step 6."""
        out, costs_s, saves_s = self.weighed(view)
        return out if costs_s < saves_s else view.before_ED

    def weighed(self, view: LayerView) -> tuple[NDArray[np.bool_], float, float]:
        """Step 6: the best replicas in training, seconds that they and their split add, and seconds that they save."""
        price, cluster = view.price, view.price.cluster
        out = view.before_ED.copy()
        free_D = view.slots_D - view.before_ED.sum(axis=0)
        counts = joint_plan.tried_counts(view.step_slots, int(cluster.devices_per_node_N.max()), len(out))
        least, alone = joint_plan.plan_layer(
            self._expected(view), view.before_ED, free_D, compiled_price(price), counts, out
        )
        if (out == view.before_ED).all():
            return view.before_ED, 0.0, 0.0
        near_s, exact_s = self.dispatch_seconds(view, out)
        return out, least - exact_s + min(near_s, exact_s + self.control_seconds(view)) - exact_s, alone - exact_s

    def _calibrated(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Step 7."""
        price = view.price
        if (holders_ED == view.static_ED).all():
            return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), view.static_ED), passive=True)
        near_s, exact_s = self.dispatch_seconds(view, holders_ED)
        if near_s * (1.0 + self.margin) < exact_s + self.control_seconds(view):
            rows = nearest_rows(load_SE, holders_ED, price.cluster.node_D)
            return StepPlan(holders_ED, rows.sum(axis=0), rows, passive=True)
        quota, held = np.zeros(holders_ED.shape, np.int64), holders_ED.copy()
        free_D = view.slots_D - holders_ED.sum(axis=0)
        joint_plan.calibrate(
            np.ascontiguousarray(load_SE), view.before_ED, held, free_D, compiled_price(price), self.extra, quota
        )
        return StepPlan(held, quota)

    def _expected(self, view: LayerView) -> NDArray[np.int64]:
        """Predicted tokens of each source, evenly spread, int64 [D, E]."""
        return spread_evenly(np.rint(view.predicted_E).astype(np.int64), view.price.cluster.num_devices)

    def control_seconds(self, view: LayerView) -> float:
        """Training: of the exact split, planning included."""
        return view.price.control_s + self.training_plan_seconds(*view.static_ED.shape)

    def dispatch_seconds(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> tuple[float, float]:
        """Predicted seconds of a layer if tokens go to the nearest holders, and if they are split exactly."""
        load_SE, machine = self._expected(view), compiled_price(view.price).machine
        quota = np.zeros(holders_ED.shape, np.int64)
        exact_s = float(joint.best_quotas(load_SE, holders_ED, machine, joint.SLACKS, quota))
        near = nearest_rows(load_SE, holders_ED, machine.node_D).sum(axis=0)
        need = joint.node_needs(load_SE, machine.node_D, machine.size_N.size)
        return float(joint.quota_seconds(near, load_SE, need, machine)), exact_s

    def training_plan_seconds(self, num_experts: int, num_devices: int) -> float:
        """What step 7 takes beside the control time that every exact method pays."""
        return TRAIN_PLAN_SECONDS_BASE + TRAIN_PLAN_SECONDS_PER_PAIR * num_experts * num_devices

    def _planned(self, view: LayerView, plan_ED: NDArray[np.bool_], machine: Machine, space: k.Workspace) -> float:
        """Predicted seconds of a plan's split, control included."""
        holders = k.compile_all(plan_ED, space)
        return float(k.plan_seconds(view.predicted_E, holders, machine, view.price.control_s, space))

    def _workspace_of(self, view: LayerView) -> k.Workspace:
        entries = int(view.slots_D.sum()) + view.static_ED.shape[0]
        return _desk(*view.static_ED.shape, entries, threading.get_ident())  # scratch: one for each thread

    def _wake_below(self, view: LayerView, machine: Machine, space: k.Workspace) -> float:
        """Predicted seconds below which the loop is worth its control time."""
        passive = k.passive_seconds(view.predicted_E, k.compile_all(view.static_ED, space), machine, space)
        return float(passive * (1.0 - self.margin) - self.margin * view.price.cluster.dispatch_wire.start_s)

    def _fill(
        self,
        view: LayerView,
        held_ED: NDArray[np.bool_],
        machine: Machine,
        space: k.Workspace,
        work_E: NDArray[np.float64],
    ) -> list[NDArray[np.bool_]]:
        """Step 2: the holders after every replica, the present ones first."""
        out = [held_ED.copy()]
        slots_D = view.slots_D
        for _ in range(2 * view.step_slots * len(slots_D)):
            holders = k.compile_all(held_ED, space)
            expert, to, drop = k.next_replica(work_E, held_ED, view.static_ED, slots_D, holders, machine, space, True)
            if expert < 0:
                break
            held_ED[expert, to] = True
            if drop >= 0:
                held_ED[drop, to] = False
            out.append(held_ED.copy())
        free_D = slots_D - held_ED.sum(axis=0)
        for _ in range(int(free_D.sum())):
            to = int(np.argmax(free_D))
            each_E = work_E / held_ED.sum(axis=1) if self.objective == "tokens" else view.predicted_E.copy()
            each_E[held_ED[:, to]] = -1.0
            if self.objective == "seconds":  # a node that lacks it saves network, a device only fabric
                each_E[held_ED[:, machine.node_D == machine.node_D[to]].any(axis=1)] *= 0.1
            expert = int(np.argmax(each_E))
            if each_E[expert] <= 0:
                break
            held_ED[expert, to] = True
            free_D[to] -= 1
            if self.objective == "seconds":
                out.append(held_ED.copy())
        out.append(held_ED.copy())
        return out
