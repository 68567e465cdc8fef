"""``poise``: replicas from predicted loads, tokens split exactly after the gate, weights moved only when they pay.

Before the gate, from predicted loads
    Step 1  The work of each expert (seconds under the roofline) is split exactly over its present holders.
    Step 2  While a device lies above the mean, the expert that gives most on a fullest device gets a replica on the
            idlest device with a free step slot, or in place of a step replica that brings less than half as much
            ("surplus fill"). Replicas stay until they are replaced: what is predicted again is not fetched again.
    Step 3  ``seconds``: of all the plans passed on the way, from "move nothing" on, the one with the least
            predicted layer time + exposed fetch / ``horizon`` steps. If leaving the engine's even split over the
            static placement alone is predicted to be as fast, nothing is exchanged and nothing moves.
            ``tokens``: all of them; slots still free get the experts with most tokens a holder, as slack for what the
            prediction misses.
After the gate, from exact loads
    Step 4  ``tokens``: the exact split. ``seconds``: of the exact split, one that leaves more tokens at home, and one
            by seconds (experts bound by reading their weights stay whole), the fastest for these sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from poise.cost.links import latency_seconds
from poise.cost.quota import balance
from poise.cost.weights import fetch_seconds
from poise.policies import kernels as k
from poise.policies.plan import LayerView, StepPlan
from poise.policies.split import even_quota

Objective = Literal["seconds", "tokens"]


@lru_cache(maxsize=8)
def _desk(num_experts: int, num_devices: int, num_entries: int) -> k.Desk:
    return k.make_desk(num_experts, num_devices, num_entries)


@dataclass(frozen=True, slots=True)
class Poise:
    """See the module docstring.

    Parameters
    ----------
    objective : ``seconds`` weighs everything; ``tokens`` balances tokens whatever it costs.
    horizon : steps over which an exposed fetch is written off; replicas that stay serve many.
    margin : least predicted gain, as a share of the passive layer time, that wakes the loop.
    slack : the second split may exceed the best maximum by this share to keep tokens at home.
    """

    name: ClassVar[str] = "poise"
    summary: ClassVar[str] = "predicted replicas where they pay, exact split after the gate"
    keeps: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    grid: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    objective: Objective = "seconds"
    horizon: float = 8.0
    margin: float = 0.02
    slack: float = 0.05

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Steps 1 to 3."""
        rates = k.make_rates(view.price)
        desk = self._desk_of(view)
        held = view.before_ED.copy()
        if self.objective == "tokens":
            return self._fill(view, held, rates, desk, view.predicted_E)[-1]
        work_E = np.maximum(view.predicted_E * rates.per_token, np.minimum(view.predicted_E, 1.0) * rates.per_expert)
        plans = self._fill(view, held, rates, desk, work_E)
        best, best_seconds = view.before_ED, np.inf
        for plan in plans:
            holders = k.compile_all(plan, desk)
            seconds = k.plan_seconds(view.predicted_E, holders, rates, view.price.control_s, desk)
            fetch = fetch_seconds(view.before_ED, plan & ~view.before_ED, view.price)
            seconds += max(0.0, fetch - view.price.window_s) / self.horizon
            if seconds < best_seconds * (1 - 1e-6):
                best, best_seconds = plan, seconds
        return view.before_ED if best_seconds > self._wake_below(view, rates, desk) else best

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Step 4."""
        rates, desk = k.make_rates(view.price), self._desk_of(view)
        if self.objective == "seconds":
            holders = k.compile_all(holders_ED, desk)
            predicted = k.plan_seconds(view.predicted_E, holders, rates, view.price.control_s, desk)
            if predicted > self._wake_below(view, rates, desk):
                return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), view.static_ED), passive=True)
        quota = self.split(load_SE, holders_ED, rates, desk)
        return StepPlan(holders_ED, quota)

    def split(
        self, load_SE: NDArray[np.int64], holders_ED: NDArray[np.bool_], rates: k.Rates, desk: k.Desk
    ) -> NDArray[np.int64]:
        """Quotas, int64 [E, D], of exact loads, int64 [D, E]."""
        holders = k.compile_all(holders_ED, desk)
        load_E = load_SE.sum(axis=0)
        entries = holders.device_H.size
        local_H = np.ascontiguousarray(load_SE[holders.device_H, holders.expert_H])
        best = np.zeros(entries, np.int64)
        least = np.inf
        for slack in (0.0,) if self.objective == "tokens" else (0.0, self.slack):
            balance(load_E, local_H, holders, rates.speed_D, slack, desk.quota_H, desk.scratch)
            desk.tokens_H[:entries] = desk.quota_H[:entries]
            seconds = k.layer_seconds(desk.tokens_H, holders, load_SE, rates, desk)
            if seconds < least:
                best, least = desk.quota_H[:entries].copy(), seconds
        if self.objective == "seconds":
            k.split_by_seconds(load_E.astype(np.float64), holders, rates, desk.tokens_H, desk)
            if k.layer_seconds(desk.tokens_H, holders, load_SE, rates, desk) < least:
                best = np.rint(desk.tokens_H[:entries]).astype(np.int64)
        out = np.zeros(holders_ED.shape, np.int64)
        out[holders.expert_H, holders.device_H] = best
        return out

    def _desk_of(self, view: LayerView) -> k.Desk:
        return _desk(*view.static_ED.shape, int(view.slots_D.sum()) + view.static_ED.shape[0])

    def _wake_below(self, view: LayerView, rates: k.Rates, desk: k.Desk) -> float:
        """Predicted seconds below which the loop is worth its control time."""
        passive = k.passive_seconds(view.predicted_E, k.compile_all(view.static_ED, desk), rates, desk)
        return float(passive * (1.0 - self.margin) - self.margin * latency_seconds(view.price.cluster))

    def _fill(
        self, view: LayerView, held_ED: NDArray[np.bool_], rates: k.Rates, desk: k.Desk, work_E: NDArray[np.float64]
    ) -> list[NDArray[np.bool_]]:
        """Step 2: the holders after every replica, the present ones first."""
        out = [held_ED.copy()]
        slots_D = view.slots_D
        for _ in range(2 * view.step_slots * len(slots_D)):
            holders = k.compile_all(held_ED, desk)
            expert, to, drop = k.next_replica(work_E, held_ED, view.static_ED, slots_D, holders, rates, desk, True)
            if expert < 0:
                break
            held_ED[expert, to] = True
            if drop >= 0:
                held_ED[drop, to] = False
            out.append(held_ED.copy())
        if self.objective == "tokens":
            free_D = slots_D - held_ED.sum(axis=0)
            for _ in range(int(free_D.sum())):
                to = int(np.argmax(free_D))
                each_E = np.where(held_ED[:, to], -1.0, work_E / held_ED.sum(axis=1))
                expert = int(np.argmax(each_E))
                if each_E[expert] <= 0:
                    break
                held_ED[expert, to] = True
                free_D[to] -= 1
            out.append(held_ED.copy())
        return out
