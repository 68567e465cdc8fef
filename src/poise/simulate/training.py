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
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from poise.cost.exchange import ExchangeModel, exchange_ends
from poise.replay.work import LayerWork, Rounds


class Forward(IntEnum):
    """Ends of the parts of a layer, forward: places on the last axis of marks."""

    START = 0
    ATTENTION = 1
    COUNTED = 2
    PLANNED = 3
    SENT = 4
    """Tokens are in order to leave."""
    DISPATCHED = 5
    ARRANGED = 6
    """Tokens that came are in order for the experts."""
    READY = 7
    COMPUTED = 8
    RETURNED = 9
    """Results are in order to leave."""
    COMBINED = 10


class Backward(IntEnum):
    """Ends of the parts of a layer, backward; the last place of the axis is empty."""

    START = 0
    READY = 1
    SENT = 2
    DISPATCHED = 3
    ARRANGED = 4
    COMPUTED = 5
    POSTED = 6
    """Gradients of replicas are on their way, and weights of the layer before."""
    RETURNED = 7
    COMBINED = 8
    ATTENTION = 9


@dataclass(frozen=True, slots=True, eq=False)
class RankStep:
    """Marks float64 [L, 2, D, 11], seconds since the step began, and ends of ranks [D].

    The last axis of marks is read with :class:`Forward` and :class:`Backward`.
    """

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
    marks = np.zeros((len(layers), 2, len(node_D), len(Forward)))
    now_D = np.zeros(len(node_D))
    for layer, work in enumerate(layers):
        at = marks[layer, 0].T
        at[Forward.START], at[Forward.ATTENTION] = now_D, now_D + window_s
        here_s = now_D.max() + rounds_seconds(work.early, node_D, model)
        # what is still on its way delays the counts
        at[Forward.COUNTED] = max(at[Forward.ATTENTION].max(), here_s) + counts_s
        at[Forward.PLANNED] = at[Forward.SENT] = at[Forward.COUNTED] + planning_s
        beside = meanwhile(work.late[0], work.bytes_DD, node_D) if work.late else None
        at[Forward.DISPATCHED] = at[Forward.ARRANGED] = exchange_ends(
            work.bytes_DD, at[Forward.SENT], node_D, model, beside
        )
        at[Forward.READY] = at[Forward.ARRANGED]
        if work.late:
            at[Forward.READY] = np.maximum(
                at[Forward.ARRANGED], exchange_ends(work.late[0], at[Forward.SENT], node_D, model, work.bytes_DD)
            )
            at[Forward.READY] += rounds_seconds(work.late[1:], node_D, model)
        at[Forward.COMPUTED] = at[Forward.RETURNED] = at[Forward.READY] + work.compute_D
        at[Forward.COMBINED] = now_D = exchange_ends(work.bytes_DD.T, at[Forward.RETURNED], node_D, model)
    weights_s = 0.0
    for layer in reversed(range(len(layers))):
        work, at = layers[layer], marks[layer, 1].T
        at[Backward.START] = now_D
        at[Backward.READY] = at[Backward.SENT] = np.maximum(now_D, weights_s)
        at[Backward.DISPATCHED] = at[Backward.ARRANGED] = exchange_ends(work.bytes_DD, at[Backward.SENT], node_D, model)
        at[Backward.COMPUTED] = at[Backward.POSTED] = at[Backward.RETURNED] = (
            at[Backward.ARRANGED] + 2.0 * work.compute_D
        )
        moves, tokens_DD = work.back, work.bytes_DD.T
        if layer and layers[layer - 1].again:
            moves = (*moves, *layers[layer - 1].early, *layers[layer - 1].late)
        weights_s, beside = 0.0, None
        if moves:  # on their way before the tokens are; of short rounds all travel in that time
            whole_DD: NDArray[np.float64] = np.sum(moves, axis=0)
            beside = meanwhile(whole_DD, tokens_DD, node_D)
            began_D = np.full(len(node_D), at[Backward.RETURNED].max())
            together_s = exchange_ends(whole_DD, began_D, node_D, model, tokens_DD).max()
            weights_s = max(float(together_s), began_D[0] + rounds_seconds(moves, node_D, model))
        at[Backward.COMBINED] = exchange_ends(tokens_DD, at[Backward.RETURNED], node_D, model, beside)
        at[Backward.ATTENTION] = now_D = at[Backward.COMBINED] + 2.0 * window_s
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
