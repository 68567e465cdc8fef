"""Seconds of one layer of a training step under a plan, by term, and of owners that move.

The one place where a plan of training is priced: what replays add up (:mod:`poise.replay.training`) is what owners are
chosen by (:mod:`poise.stepwise.owners`). Policies plan with the faster and less exact
:func:`poise.cost.weights.fetch_seconds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import device_compute
from poise.cost.links import port_seconds
from poise.cost.route import locality_rows
from poise.cost.traffic import Copies, independent_copies, port_load
from poise.cost.transfers import Form, Transfer, TransferPlan, plan_transfers
from poise.cost.weights import STATE_RATIO, StepPrice, fetch_seconds
from poise.machine.cluster import Wire
from poise.stepwise.driver import Outcome
from poise.stepwise.sharding import owned_ED

Moves = tuple[tuple[Transfer, ...], ...]
TOLD_BYTES = 8.0
"""Of a pair: which copy, and which of its weights, it is of."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerSeconds:
    """What one layer takes in one step, and what it moves for that.

    Parameters
    ----------
    compute_s, exchange_s : the slowest device's experts, and all-to-alls, of all passes.
    shown_s : weights that a run sees, there and back (:meth:`poise.cost.weights.StepPrice.shown_seconds`).
    switch_s : states that move to holders which stay, exposed.
    control_s : exchange of counts, planning, synchronisation.
    moved, exposed : bytes of weights, gradients and states, and the part of them that shows.
    pairs_DD : int64 [D, D], (token, expert) pairs from device to device.
    replicas_ED : bool [E, D], holders beside one owner each.
    transfers : rounds of the early gather, the late one and the reduction, and bytes of one expert in each.
    """

    compute_s: float
    exchange_s: float
    shown_s: float
    switch_s: float
    control_s: float
    moved: float
    exposed: float
    pairs_DD: NDArray[np.int64]
    replicas_ED: NDArray[np.bool_]
    transfers: tuple[tuple[Moves, float], ...]

    @property
    def total_s(self) -> float:
        """All terms; attention beside it is the same under every plan."""
        return self.compute_s + self.exchange_s + self.shown_s + self.switch_s + self.control_s


def layer_seconds(
    done: Outcome, load_SE: NDArray[np.int64], price: StepPrice, *, again: bool, keeps: bool
) -> LayerSeconds:
    """The price of what a driver has decided.

    Parameters
    ----------
    done : plan and holders.
    load_SE : int64 [D, E], the loads that the plan is for.
    price : of :func:`poise.cost.weights.training_price`.
    again : replicas are freed after the forward pass and gathered again.
    keeps : holders stay from step to step (``keeps_in_training``).
    """
    plan, cluster = done.plan, price.cluster
    flow = plan.rows_SED
    if flow is None:
        flow = locality_rows(load_SE, plan.quota_ED, cluster.node_D)
    pairs_DD = flow.sum(axis=1)
    size = price.gathered_bytes
    passes = 1.0 + price.gradient_ratio + (1.0 if again else 0.0)
    switch_s, new = 0.0, 0
    if keeps:
        base = done.view.static_ED & plan.holders_ED
        moved_E = ~base.any(axis=1)
        base[moved_E, plan.holders_ED[moved_E].argmax(axis=1)] = True
        added = plan.holders_ED & ~done.view.before_ED
        new = int(added.sum())
        switch_s = STATE_RATIO * sparse_gather_seconds(done.view.before_ED, added, price)
        parts = [plan.holders_ED & ~base]
    else:
        base = done.view.before_ED
        parts = [done.early_ED & ~base, plan.holders_ED & ~done.early_ED & ~base]
    gathers = [_transfers(base, part, price, size) for part in parts]
    seconds = [gather.seconds(cluster, size) for gather in gathers]
    replicas = plan.holders_ED & ~base
    gradient_bytes = size * price.gradient_ratio
    reduction = _transfers(base, replicas & (plan.quota_ED > 0), price, gradient_bytes)
    back_s = (sum(seconds) if again else 0.0) + reduction.back_seconds(cluster, gradient_bytes)
    shown_s = price.shown_seconds(seconds[0], sum(seconds[1:]), back_s)
    synced, states = float(replicas.sum()) * size * passes, new * price.model.expert_bytes * STATE_RATIO
    whole_s = sum(seconds) + back_s
    late: Moves = sum((gather.rounds for gather in gathers[1:]), ())
    return LayerSeconds(
        compute_s=compute_seconds(plan.quota_ED, price), exchange_s=exchange_seconds(pairs_DD, price),
        shown_s=shown_s, switch_s=switch_s, control_s=done.control_s, moved=synced + states,
        exposed=(synced * shown_s / whole_s if whole_s else 0.0) + states, pairs_DD=pairs_DD, replicas_ED=replicas,
        transfers=((gathers[0].rounds, size), (late, size), (reduction.backwards(), gradient_bytes)),
    )  # fmt: skip


def sparse_gather_seconds(held_ED: NDArray[np.bool_], new_ED: NDArray[np.bool_], price: StepPrice) -> float:
    """Seconds of the runtime's sparse gather, round by round, from each expert's first holder; bool [E, D] both.

    :func:`poise.cost.weights.fetch_seconds`, which policies plan with, is faster and less exact.
    """
    size = price.model.expert_bytes
    return _transfers(held_ED, new_ED, price, size).seconds(price.cluster, size)


def _transfers(
    held_ED: NDArray[np.bool_], new_ED: NDArray[np.bool_], price: StepPrice, expert_bytes: float
) -> TransferPlan:
    form: Form = "auto" if price.fan_out else "direct"
    return plan_transfers(held_ED.argmax(axis=1), new_ED, price.cluster, expert_bytes=expert_bytes, form=form)


def compute_seconds(quota_ED: NDArray[np.int64], price: StepPrice) -> float:
    """Expert compute of one layer in a step, all passes: the slowest device."""
    seconds_D = device_compute(quota_ED.astype(np.float64), price.cluster, price.model)
    return float(seconds_D.max() * price.compute_passes)


def exchange_seconds(pairs_DD: NDArray[Any], price: StepPrice) -> float:
    """All-to-alls of one layer in a step for (token, expert) pairs from device to device, [D, D]."""
    return price.exchange_passes * _there_and_back(pairs_DD, price)


def once_seconds(pairs_DD: NDArray[np.int64], top_k: int, price: StepPrice) -> float:
    """The same, forward and back, where a token goes to a device once (:mod:`poise.runtime.once`); int64 [D, D].

    Its K router weights lie behind it in the dispatch of a pass forward and in the combine of one back: in half of all
    exchanges. Which copy a pair is of is told before, in an integer a pair.
    """
    told_s = _all_to_all(pairs_DD, TOLD_BYTES, price.cluster.dispatch_wire, price)
    copies_DD = independent_copies(pairs_DD, top_k)
    return price.exchange_passes * _there_and_back(copies_DD, price, 0.5 * top_k) + told_s


def _there_and_back(rows_DD: NDArray[Any], price: StepPrice, more: float = 0.0) -> float:
    """One dispatch and one combine of rows of d + ``more`` elements."""
    cluster, model = price.cluster, price.model
    out = (model.expert_width + more) * model.dispatch_bytes
    back = (model.expert_width + more) * model.combine_bytes
    return _all_to_all(rows_DD, out, cluster.dispatch_wire, price) + _all_to_all(
        rows_DD, back, cluster.combine_wire, price
    )


def _all_to_all(rows_DD: NDArray[Any], row_bytes: float, wire: Wire, price: StepPrice) -> float:
    load = port_load(Copies(rows_DD[None].astype(np.float64)), price.cluster)
    return float(port_seconds(load, row_bytes, price.cluster, wire)[0]) + wire.start_s


def reshard_seconds(old_LE: NDArray[np.int64], new_LE: NDArray[np.int64], price: StepPrice) -> float:
    """Seconds to move parameters and optimizer states from old to new owners, all layers at once, exposed."""
    devices = price.cluster.num_devices
    old = owned_ED(old_LE.ravel(), devices)
    moved = owned_ED(new_LE.ravel(), devices) & ~old
    return STATE_RATIO / price.gather_ratio * fetch_seconds(old, moved, price)
