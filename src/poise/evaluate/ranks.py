"""One training step rank by rank: the replay's plans, but nobody waits for all where it only needs some.

:mod:`poise.evaluate.training` adds the terms of a layer: every rank dispatches, then the slowest computes, then all
combine. In a run, a rank that has its tokens computes while others still receive, and one that is done sends while the
slowest computes; only the exchange of counts makes all wait for all. Where loads differ, that hides a part of the
all-to-all. Replicas that are fetched after the gate travel with the tokens, mostly the other way through the same
ports: their owner is the rank that receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.cost.exchange import ExchangeModel, exchange_ends

FORWARD = ("start", "attention", "counted", "planned", "dispatched", "ready", "computed", "combined")
BACKWARD = ("start", "ready", "dispatched", "computed", "posted", "combined", "attention")
"""Ends of the parts of a layer, in the order of the last axis of marks (backwards the last place is empty)."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerWork:
    """What one layer does in one step.

    Parameters
    ----------
    bytes_DD : float64 [D, D], tokens from rank to rank, one way.
    compute_D : float64 [D], seconds of the forward pass's experts.
    early_s : gather before the gate.
    late_DD : float64 [D, D], bytes of weights fetched after the gate.
    back_s : reduction, and second gather, under the attention of the backward pass.
    """

    bytes_DD: NDArray[np.float64]
    compute_D: NDArray[np.float64]
    early_s: float
    late_DD: NDArray[np.float64]
    back_s: float


@dataclass(frozen=True, slots=True, eq=False)
class RankStep:
    """Marks float64 [L, 2, D, 8] (seconds since the step began; see FORWARD and BACKWARD) and ends of ranks [D]."""

    marks_LXDM: NDArray[np.float64]
    end_D: NDArray[np.float64]


def rank_step(
    layers: Sequence[LayerWork],
    node_D: NDArray[np.int32],
    model: ExchangeModel,
    *,
    window_s: float,
    counts_s: float = 0.0,
    planning_s: float = 0.0,
) -> RankStep:
    """Simulate a step.

    Parameters
    ----------
    layers : in the order they run.
    node_D, model : machine.
    window_s : attention of a layer, forward; backward twice that.
    counts_s, planning_s : exchange of counts (all wait for all) and planning of a layer.
    """
    devices = len(node_D)
    marks = np.zeros((len(layers), 2, devices, len(FORWARD)))
    now_D = np.zeros(devices)
    for layer, work in enumerate(layers):
        at = marks[layer, 0].T
        at[0], at[1] = now_D, now_D + window_s
        at[2] = max(at[1].max(), now_D.max() + work.early_s) + counts_s
        at[3] = at[2] + planning_s
        at[4] = exchange_ends(work.bytes_DD, at[3], node_D, model, work.late_DD)
        at[5], at[6] = at[4], at[4] + work.compute_D
        at[7] = now_D = exchange_ends(work.bytes_DD.T, at[6], node_D, model)
    weights_s = 0.0
    for layer in reversed(range(len(layers))):
        work, at = layers[layer], marks[layer, 1].T
        at[0], at[1] = now_D, np.maximum(now_D, weights_s)
        at[2] = exchange_ends(work.bytes_DD, at[1], node_D, model)
        at[3] = at[4] = at[2] + 2.0 * work.compute_D
        at[5] = exchange_ends(work.bytes_DD.T, at[4], node_D, model)
        at[6] = now_D = at[5] + 2.0 * window_s
        weights_s = at[4].max() + work.back_s if work.back_s else 0.0
    return RankStep(marks, np.maximum(now_D, weights_s))
