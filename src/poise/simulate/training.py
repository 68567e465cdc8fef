"""One training step rank by rank: the replay's plans, but nobody waits for all where it only needs some.

:mod:`poise.replay.training` adds the terms of a layer: every rank dispatches, then the slowest computes, then all
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
from poise.replay.work import LayerWork, Rounds

FORWARD = ("start", "attention", "counted", "planned", "sent", "dispatched", "arranged", "ready", "computed",
           "returned", "combined")  # fmt: skip
BACKWARD = (
    "start",
    "ready",
    "sent",
    "dispatched",
    "arranged",
    "computed",
    "posted",
    "returned",
    "combined",
    "attention",
)
"""Ends of the parts of a layer, in the order of the last axis of marks (backwards the last place is empty).

``sent`` and ``returned``: tokens are in order to leave; ``arranged``: those that came are in order for the experts."""


@dataclass(frozen=True, slots=True, eq=False)
class RankStep:
    """Marks float64 [L, 2, D, 11] (seconds since the step began; see FORWARD and BACKWARD) and ends of ranks [D]."""

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
    marks = np.zeros((len(layers), 2, len(node_D), len(FORWARD)))
    now_D = np.zeros(len(node_D))
    for layer, work in enumerate(layers):
        at = marks[layer, 0].T
        at[0], at[1] = now_D, now_D + window_s
        here_s = now_D.max() + rounds_seconds(work.early, node_D, model)
        at[2] = max(at[1].max(), here_s) + counts_s  # what is still on its way delays the counts
        at[3] = at[4] = at[2] + planning_s
        beside = meanwhile(work.late[0], work.bytes_DD, node_D) if work.late else None
        at[5] = at[6] = exchange_ends(work.bytes_DD, at[4], node_D, model, beside)
        at[7] = at[6]
        if work.late:
            at[7] = np.maximum(at[6], exchange_ends(work.late[0], at[4], node_D, model, work.bytes_DD))
            at[7] += rounds_seconds(work.late[1:], node_D, model)
        at[8] = at[9] = at[7] + work.compute_D
        at[10] = now_D = exchange_ends(work.bytes_DD.T, at[9], node_D, model)
    weights_s = 0.0
    for layer in reversed(range(len(layers))):
        work, at = layers[layer], marks[layer, 1].T
        at[0] = now_D
        at[1] = at[2] = np.maximum(now_D, weights_s)
        at[3] = at[4] = exchange_ends(work.bytes_DD, at[2], node_D, model)
        at[5] = at[6] = at[7] = at[4] + 2.0 * work.compute_D
        moves, tokens_DD = work.back, work.bytes_DD.T
        if layer and layers[layer - 1].again:
            moves = (*moves, *layers[layer - 1].early, *layers[layer - 1].late)
        weights_s, beside = 0.0, None
        if moves:  # on their way before the tokens are; of short rounds all travel in that time
            whole_DD: NDArray[np.float64] = np.sum(moves, axis=0)
            beside = meanwhile(whole_DD, tokens_DD, node_D)
            began_D = np.full(len(node_D), at[7].max())
            together_s = exchange_ends(whole_DD, began_D, node_D, model, tokens_DD).max()
            weights_s = max(float(together_s), began_D[0] + rounds_seconds(moves, node_D, model))
        at[8] = exchange_ends(tokens_DD, at[7], node_D, model, beside)
        at[9] = now_D = at[8] + 2.0 * window_s
    return RankStep(marks, np.maximum(now_D, weights_s))


def meanwhile(
    weights_DD: NDArray[np.float64], tokens_DD: NDArray[np.float64], node_D: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Bytes of weights that pass before tokens that share their ports are through: messages share a port evenly."""
    near_DD = node_D[:, None] == node_D[None, :]
    out = np.zeros_like(weights_DD)
    for ports_DD in (near_DD & ~np.eye(len(node_D), dtype=bool), ~near_DD):
        sent_DD = tokens_DD * ports_DD
        longest_DD = np.maximum(sent_DD.max(axis=1)[:, None], sent_DD.max(axis=0)[None, :])
        out += np.minimum(weights_DD, longest_DD) * ports_DD
    return out


def rounds_seconds(rounds: Rounds, node_D: NDArray[np.int32], model: ExchangeModel) -> float:
    """A sparse collective, round after round."""
    none_D = np.zeros(len(node_D))
    return sum(float(exchange_ends(bytes_DD, none_D, node_D, model).max()) for bytes_DD in rounds)
