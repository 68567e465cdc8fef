"""One training step rank by rank: the replay's plans, but nobody waits for all where it only needs some.

:mod:`poise.replay.training` adds the terms of a layer: every rank dispatches, then the slowest computes, then all
combine. In a run, a rank that has its tokens computes while others still receive, and one that is done sends while the
slowest computes; only the exchange of counts makes all wait for all. Where loads differ, that hides a part of the
all-to-all. Replicas that are fetched after the gate travel with the tokens, mostly the other way through the same
ports: their owner is the rank that receives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from poise.cost.exchange import ExchangeModel
from poise.replay.work import LayerWork
from poise.simulate.clockwork import Act, AllToAll, Busy, Clockwork, Collective, Mark, Meet, Post, Wait, meanwhile

WEIGHTS = ("weights and gradients", "their rounds")
"""What the backward pass of a layer posts: both are waited for, since the first one's bytes are not cut into rounds."""


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
    clock = Clockwork(node_D, model)
    for layer, work in enumerate(layers):
        clock.run(forward_acts(work, node_D, window_s, counts_s, planning_s), marks[layer, 0])
    for layer in reversed(range(len(layers))):
        before = layers[layer - 1] if layer else None
        clock.run(backward_acts(layers[layer], before, node_D, window_s), marks[layer, 1])
    return RankStep(marks, clock.now_D)


def forward_acts(
    work: LayerWork, node_D: NDArray[np.int32], window_s: float, counts_s: float, planning_s: float
) -> Iterator[Act]:
    """The forward pass of a layer."""
    yield Mark((Forward.START,))
    yield Post("early", (Meet(), Collective(work.early)))
    yield Busy(window_s)
    yield Mark((Forward.ATTENTION,))
    yield Wait(("early",))  # what is still on its way delays the counts
    yield Meet(counts_s)
    yield Mark((Forward.COUNTED,))
    yield Busy(planning_s)
    yield Mark((Forward.PLANNED, Forward.SENT))
    beside = None
    if work.late:
        beside = meanwhile(work.late[0], work.bytes_DD, node_D)
        yield Post("late", (AllToAll(work.late[0], work.bytes_DD),))
    yield AllToAll(work.bytes_DD, beside)
    yield Mark((Forward.DISPATCHED, Forward.ARRANGED))
    yield Wait(("late",))
    yield Collective(work.late[1:])
    yield Mark((Forward.READY,))
    yield Busy(work.compute_D)
    yield Mark((Forward.COMPUTED, Forward.RETURNED))
    yield AllToAll(work.bytes_DD.T)
    yield Mark((Forward.COMBINED,))


def backward_acts(
    work: LayerWork, before: LayerWork | None, node_D: NDArray[np.int32], window_s: float
) -> Iterator[Act]:
    """The backward pass of a layer; replicas of the layer ``before`` it (which comes next) come back meanwhile."""
    yield Mark((Backward.START,))
    yield Wait(WEIGHTS)
    yield Mark((Backward.READY, Backward.SENT))
    yield AllToAll(work.bytes_DD)
    yield Mark((Backward.DISPATCHED, Backward.ARRANGED))
    yield Busy(2.0 * work.compute_D)
    yield Mark((Backward.COMPUTED, Backward.POSTED, Backward.RETURNED))
    tokens_DD, beside = work.bytes_DD.T, None
    moves = work.back + (before.early + before.late if before is not None and before.again else ())
    if moves:  # on their way before the tokens are; of short rounds all travel in that time
        whole_DD: NDArray[np.float64] = np.sum(moves, axis=0)
        beside = meanwhile(whole_DD, tokens_DD, node_D)
        yield Post(WEIGHTS[0], (Meet(), AllToAll(whole_DD, tokens_DD), Meet()))
        yield Post(WEIGHTS[1], (Meet(), Collective(moves)))
    yield AllToAll(tokens_DD, beside)
    yield Mark((Backward.COMBINED,))
    yield Busy(2.0 * window_s)
    yield Mark((Backward.ATTENTION,))
    if before is None:
        yield Wait(WEIGHTS)
