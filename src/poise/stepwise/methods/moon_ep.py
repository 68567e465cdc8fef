"""MoonEP (Moonshot AI, 2026): exactly as many tokens on every rank, from exact loads.

Every expert has a home; the experts of a device are its home group. After the gate, weights sent in full sight:

    Step 1  Surplus of a home group = its tokens - the capacity of a rank (a rank's equal share of all tokens).
    Step 2  Receivers. While a group has a surplus: the most overloaded home group gives to the roomiest rank, and fills
            it completely. (A group may give more than its surplus; it is then a receiver itself.) A rank receives
            once, so all that it receives comes from one home group.
    Step 3  Experts. Within a home group: hand the expert with most tokens left to the receiver with the largest quota
            left, until the quotas are used up.

Guarantee: all ranks end equally full, and a rank needs no more slots than its one remote home group has experts (E / D
where E divides). The official text was not at hand: written from a public fork's reference planner.

Chosen here. Tokens that do not divide by D: the fullest home groups have a capacity one larger, so max - min <= 1. The
home is the first static holder; other static replicas are not used, except that a receiver that happens to hold an
expert needs no slot for it. Ties go to the first. The published planner assumes that the experts of a whole home group
fit (its code can read weights in place over NVLink): it is what runs here when step slots M reach the largest home
group. With fewer slots the published method does not fit. ``bounded`` then runs a truncated form that is ours: a
receiver whose slots are full is handed no further expert, and its remaining quota stays at home; home groups give in
the order in which they stop giving, so that a receiver that gave less than planned also receives less. Without
``bounded``, plain expert parallelism runs instead. Device speeds are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.methods.split import even_quota
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy
from poise.util.compiled import compiled


class Receivers(NamedTuple):
    """Tokens from home group to receiver, int64 [D, D], and each group's last turn to give, int64 [D] (0: none)."""

    give_DD: NDArray[np.int64]
    last_D: NDArray[np.int64]


@compiled
def choose_receivers(tokens_D: NDArray[np.int64], capacity_D: NDArray[np.int64]) -> Receivers:
    """Steps 1 and 2."""
    devices = tokens_D.size
    surplus_D = tokens_D - capacity_D
    give_DD = np.zeros((devices, devices), np.int64)
    last_D = np.zeros(devices, np.int64)
    for turn in range(1, devices + 1):
        giver, taker = np.argmax(surplus_D), np.argmin(surplus_D)
        if surplus_D[giver] <= 0:
            break
        give_DD[giver, taker] = -surplus_D[taker]
        surplus_D[giver] += surplus_D[taker]
        surplus_D[taker] = 0
        last_D[giver] = turn
    return Receivers(give_DD, last_D)


@compiled
def hand_experts(
    load_E: NDArray[np.int64],
    home_E: NDArray[np.int64],
    capacity_D: NDArray[np.int64],
    receivers: Receivers,
    static_ED: NDArray[np.bool_],
    slots: int,
) -> NDArray[np.int64]:
    """Step 3: quotas, int64 [E, D]. At most ``slots`` experts that a receiver does not hold already."""
    give_DD, last_D = receivers
    experts, devices = static_ED.shape
    quota_ED = np.zeros((experts, devices), np.int64)
    load_D = np.zeros(devices, np.int64)
    for e in range(experts):
        quota_ED[e, home_E[e]] = load_E[e]
        load_D[home_E[e]] += load_E[e]
    free_D = np.full(devices, slots)
    for home in np.argsort(last_D, kind="mergesort"):
        if last_D[home] == 0:
            continue
        quota_D = give_DD[home].copy()
        for d in range(devices):
            quota_D[d] = min(quota_D[d], max(0, capacity_D[d] - load_D[d]))
        while True:
            to = np.argmax(quota_D)
            if quota_D[to] <= 0:
                break
            best = -1
            for e in range(experts):
                if home_E[e] != home or quota_ED[e, home] == 0:
                    continue
                if free_D[to] == 0 and not static_ED[e, to] and quota_ED[e, to] == 0:
                    continue
                if best < 0 or quota_ED[e, home] > quota_ED[best, home]:
                    best = e
            if best < 0:
                quota_D[to] = 0
                continue
            if not static_ED[best, to] and quota_ED[best, to] == 0:
                free_D[to] -= 1
            take = min(quota_ED[best, home], quota_D[to])
            quota_ED[best, home] -= take
            quota_ED[best, to] += take
            load_D[home] -= take
            load_D[to] += take
            quota_D[to] -= take
    return quota_ED


def equal_capacity(tokens_D: NDArray[np.int64]) -> NDArray[np.int64]:
    """Equal shares of all tokens, int64 [D]; the fullest devices take what does not divide."""
    base, rest = divmod(int(tokens_D.sum()), tokens_D.size)
    capacity_D = np.full(tokens_D.size, base, np.int64)
    capacity_D[np.argsort(-tokens_D, kind="stable")[:rest]] += 1
    return capacity_D


@dataclass(frozen=True, slots=True)
class MoonEp(StepPolicy):
    """See the module docstring.

    Parameters
    ----------
    bounded : with fewer step slots than a home group has experts, run the truncated form (True) or nothing (False).
    """

    name: ClassVar[str] = "moon-ep"
    summary: ClassVar[str] = "exact loads: equal tokens on every rank, each receiver served by one home group"
    exact: ClassVar[bool] = True
    bounded: bool = True

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """All steps."""
        load_E, home_E = load_SE.sum(axis=0), view.owner_E
        devices = view.static_ED.shape[1]
        group_D = np.bincount(home_E, minlength=devices)
        fits = view.step_slots >= group_D.max()
        plain = view.step_slots == 0 and not (view.static_ED.sum(axis=1) > 1).any()
        if plain or not (fits or self.bounded):
            return StepPlan(view.static_ED, even_quota(load_E, view.static_ED), passive=True)
        tokens_D = np.zeros(devices, np.int64)
        np.add.at(tokens_D, home_E, load_E)
        capacity_D = equal_capacity(tokens_D)
        receivers = choose_receivers(tokens_D, capacity_D)
        quota_ED = hand_experts(load_E, home_E, capacity_D, receivers, view.static_ED, view.step_slots)
        return StepPlan(view.static_ED | (quota_ED > 0), quota_ED, details={"published": bool(fits)})
