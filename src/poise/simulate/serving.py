"""Serving steps rank by rank: the tokens, plans and copies of a run, and nobody waits for all where it need not.

:mod:`poise.cost.step` and :mod:`poise.replay.serving` add the terms of a layer, as planners do: all dispatch, the
slowest computes, all combine. In a run a rank that has its tokens computes while others still receive, and one that is
done sends while the slowest computes; only the exchange of sizes makes all wait for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import device_compute
from poise.cost.exchange import ExchangeModel
from poise.cost.near import near_count
from poise.cost.route import assign_tokens, count_sources, deal_evenly, locality_rows, token_copies
from poise.cost.split import Split, check_split
from poise.cost.traffic import DataFlow
from poise.cost.weights import step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.replay.serving import FastLoop
from poise.routing.batch import RoutingBatch
from poise.routing.trace import NO_EXPERT
from poise.simulate.clockwork import Act, AllToAll, Busy, Clockwork, Mark, Meet, Post, Wait
from poise.stepwise.driver import LayerDriver
from poise.stepwise.protocol import LayerView
from poise.util.errors import OptionError


class ServingMark(IntEnum):
    """Ends of the parts of a layer: places on the last axis of marks."""

    START = 0
    ATTENTION = 1
    PLANNED = 2
    DISPATCHED = 3
    COMPUTED = 4
    COMBINED = 5


@dataclass(frozen=True, slots=True, eq=False)
class ServedWork:
    """What one layer does in one step.

    Parameters
    ----------
    out_DD, back_DD : float64 [D, D], bytes from rank to rank, dispatch and combine.
    keys_DD : float64 [D, D], keys and values under ``stay``, before attention.
    compute_D : float64 [D], seconds of the experts.
    early_s, late_s : fetches before and after the gate.
    planned : whether a fast loop exchanged counts and planned.
    tokens_D : int64 [D], pairs computed.
    """

    out_DD: NDArray[np.float64]
    back_DD: NDArray[np.float64]
    keys_DD: NDArray[np.float64]
    compute_D: NDArray[np.float64]
    early_s: float
    late_s: float
    planned: bool
    tokens_D: NDArray[np.int64]


def served_work(
    batch: RoutingBatch,
    placement: Placement,
    cluster: Cluster,
    model: ModelSpec,
    *,
    traffic: DataFlow,
    loop: FastLoop | None = None,
    prior_LE: NDArray[np.float64] | None = None,
    split: Split = "even",
) -> list[list[ServedWork]]:
    """The work of every step and layer, with the very split of the tokens that :mod:`poise.serve` makes.

    Raises
    ------
    OptionError : the batch has loads only, the flow is ``home_node_dedup`` (its two hops are not simulated), or the
        split is not one that engines make of this flow.
    """
    if batch.experts_TLK is None or batch.start_B is None or traffic == "home_node_dedup":
        raise OptionError("ranks are simulated for known tokens and flows of one hop", hint="use the replay")
    check_split(split, traffic)
    if split == "exact":
        raise OptionError("no split 'exact' without a fast loop", hint="its policy split")
    count_LED = placement.count_LED()
    drivers, predicted_BLE = None, None
    if loop is not None:
        tokens = float(batch.tokens_BL().max(axis=1).mean())
        price = step_price(tokens, batch.num_experts, cluster, model, window_s=loop.window_s, control_s=loop.control_s)
        drivers = [LayerDriver(loop.policy, held > 0, step_slots=loop.step_slots, layer=layer)
                   for layer, held in enumerate(count_LED)]  # fmt: skip
        predicted_BLE = loop.predictor.predict_BLE(batch, prior_LE)
    home_T, out = batch.home_of_tokens(cluster.num_devices).astype(np.int64), []
    for step in range(batch.num_steps):
        rows = slice(*batch.start_B[step : step + 2])
        source_T, works = home_T[rows], []
        for layer in range(batch.num_layers):
            experts_TK = batch.experts_TLK[rows, layer].astype(np.int64)
            fetches, device_TK = (0.0, 0.0), None
            if drivers is not None and predicted_BLE is not None:
                view = drivers[layer].view(step, predicted_BLE[step, layer], batch.load_BLE[:step, layer], price)
                device_TK, fetches = _planned(drivers[layer], view, experts_TK, source_T)
            planned = device_TK is not None
            if device_TK is None:
                device_TK = np.empty_like(experts_TK)
                for source in range(cluster.num_devices):
                    mine = source_T == source
                    count_ED = count_LED[layer]
                    may_ED = near_count(count_ED, cluster.node_D, source) if split == "near" else count_ED
                    device_TK[mine] = deal_evenly(experts_TK[mine], may_ED, source)
            works.append(_work(experts_TK, device_TK, source_T, cluster, model, traffic, fetches, planned))
            if traffic == "stay":
                source_T = np.where(device_TK[:, 0] < 0, source_T, device_TK[:, 0])
        out.append(works)
    return out


def _planned(
    driver: LayerDriver, view: LayerView, experts_TK: NDArray[np.int64], source_T: NDArray[np.int64]
) -> tuple[NDArray[np.int64] | None, tuple[float, float]]:
    """Devices by the policy's plan, None where it leaves the engine's split alone; seconds of both fetches."""
    cluster = view.price.cluster
    load_SE = np.zeros((cluster.num_devices, len(view.predicted_E)), np.int64)
    count_sources(experts_TK, source_T, load_SE)
    done = driver.finish(view, driver.choose(view), load_SE)
    fetches = (done.early_s, done.late_s)
    if done.plan.passive:
        return None, fetches
    rows_SED = done.plan.rows_SED
    rows_SED = locality_rows(load_SE, done.plan.quota_ED, cluster.node_D) if rows_SED is None else rows_SED.copy()
    device_TK = np.empty_like(experts_TK)
    assign_tokens(experts_TK, source_T, rows_SED, device_TK)
    return device_TK, fetches


def _work(
    experts_TK: NDArray[np.int64], device_TK: NDArray[np.int64], source_T: NDArray[np.int64], cluster: Cluster,
    model: ModelSpec, traffic: DataFlow, fetches: tuple[float, float], planned: bool,
) -> ServedWork:  # fmt: skip
    devices = cluster.num_devices
    out, back = token_copies(device_TK, source_T, cluster, traffic)
    back_DD = back.device_BDD[0] if traffic == "stay" else back.device_BDD[0].T
    quota_ED = np.zeros((model.num_experts, devices), np.int64)
    real_TK = experts_TK != NO_EXPERT
    np.add.at(quota_ED, (experts_TK[real_TK], device_TK[real_TK]), 1)
    compute_D = device_compute(quota_ED, cluster, model)
    keys_DD = np.zeros((devices, devices))
    if traffic == "stay":
        keys_DD += np.bincount(source_T, minlength=devices)[:, None] * model.kv_bytes_per_token_layer
    return ServedWork(
        out.device_BDD[0] * model.dispatch_bytes_per_token, back_DD * model.combine_bytes_per_token, keys_DD, compute_D,
        *fetches, planned, quota_ED.sum(axis=0),
    )  # fmt: skip


def serve_step(
    layers: Sequence[ServedWork],
    node_D: NDArray[np.int32],
    model: ExchangeModel,
    *,
    window_s: float,
    counts_s: float = 0.0,
    planning_s: float = 0.0,
) -> NDArray[np.float64]:
    """Simulate a step: marks float64 [L, D, 6], seconds since it began (places: :class:`ServingMark`).

    Parameters
    ----------
    layers : in the order they run.
    node_D, model : machine.
    window_s : attention of a layer.
    counts_s : an exchange of counts or sizes, for which all wait; a dispatch has one, a plan another.
    planning_s : planning of a layer.
    """
    marks, clock = np.zeros((len(layers), len(node_D), len(ServingMark))), Clockwork(node_D, model)
    for layer, work in enumerate(layers):
        clock.run(served_acts(work, window_s, counts_s, planning_s), marks[layer])
    return marks


def served_acts(work: ServedWork, window_s: float, counts_s: float, planning_s: float) -> Iterator[Act]:
    """A layer of a serving step."""
    yield Mark((ServingMark.START,))
    if work.early_s:
        yield Post("weights", (Meet(work.early_s),))
    if work.keys_DD.any():
        yield Post("keys", (Meet(counts_s), AllToAll(work.keys_DD)))
    yield Busy(window_s)
    yield Wait(("keys",))
    yield Mark((ServingMark.ATTENTION,))
    if work.planned:
        yield Meet(counts_s)
        yield Busy(planning_s)
        yield Busy(work.late_s)
    yield Wait(("weights",))
    yield Mark((ServingMark.PLANNED,))
    yield Meet(counts_s)
    yield AllToAll(work.out_DD)
    yield Mark((ServingMark.DISPATCHED,))
    yield Busy(work.compute_D)
    yield Mark((ServingMark.COMPUTED,))
    yield AllToAll(work.back_DD)
    yield Mark((ServingMark.COMBINED,))
