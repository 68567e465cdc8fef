"""A change of placement, also of how many ranks there are: who fetches what from whom, in the ranks' own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.control.moves import MoveList, move_list
from poise.machine.cluster import Cluster
from poise.planning.elastic import Frame, RankMap
from poise.planning.placement import Placement
from poise.replay.moving import Moving, moving
from poise.util.errors import OptionError


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """From one placement to another.

    Parameters
    ----------
    before, after : the placements on all devices of ``frame``.
    ranks, frame : which rank is which, and the devices that stay, join and leave.
    lost : ranks that leave are gone with what they held; else they can send.
    moves : who sends what to whom, in devices of ``frame``.
    leaving : layer (of the decoder) and expert of all that no rank holds that stays.
    """

    before: Placement
    after: Placement
    ranks: RankMap
    frame: Frame
    lost: bool
    moves: Moving
    leaving: list[tuple[int, int]]

    @classmethod
    def of(
        cls, old: Placement, new: Placement, ranks: RankMap, cluster: Cluster | None = None, *, lost: bool = False
    ) -> Change:  # fmt: skip
        """The change from ``old`` to ``new``; ``cluster`` as in :meth:`poise.planning.elastic.RankMap.frame`.

        Raises
        ------
        PlacementError : the placements are of different models. OptionError : the cluster has another size, or ranks
        that leave are lost and none leaves.
        """
        if lost and not ranks.leave:
            raise OptionError(
                f"no rank leaves: {len(ranks.new_O)} before, {ranks.num_new} after, so none is lost",
                hint="--rank-map names those that stay, as in 0:0,1:1,3:2",
            )
        frame = ranks.frame(cluster)
        before, after = frame.before(old), frame.after(new)
        gone = _gone(frame) if lost else []
        moves = moving(before, after, None if frame.cluster is None else frame.cluster.node_D, lost=gone)
        held_LE = np.delete(before.count_LED(), _gone(frame), axis=2).any(axis=2)
        leaving = [(int(moves.layer_ids_L[layer]), int(expert)) for layer, expert in np.argwhere(~held_LE)]
        return cls(before, after, ranks, frame, lost, moves, leaving)

    @property
    def arrive_LD(self) -> NDArray[np.int64]:
        """Experts that each new rank must fetch, int64 [L, D_new]."""
        out = np.zeros((self.before.num_layers, self.ranks.num_new), np.int64)
        there = self.frame.new_F >= 0
        out[:, self.frame.new_F[there]] = self.moves.arrive_LD[:, there]
        return out

    @property
    def from_leaving(self) -> int:
        """Fetches from ranks that leave."""
        return int(self.moves.links_DD()[_gone(self.frame)].sum())

    @property
    def assumed(self) -> str | None:
        """What the price of links rests on that was not said."""
        if self.lost or not self.frame.assumed:
            return None
        return (
            f"the cluster of {self.ranks.num_new} devices does not say where {numbers(self.ranks.leave)} are: they are "
            "taken to be on further nodes"
        )

    def fetches(self) -> list[list[tuple[int, int | None, int]]]:
        """Of each layer: expert, old rank that sends it (None: read from the checkpoint), new rank that fetches it."""
        out: list[list[tuple[int, int | None, int]]] = []
        old_F, new_F = self.frame.old_F.tolist(), self.frame.new_F.tolist()
        for layer, moves in enumerate(self.moves.transfers):
            every: list[tuple[int, int | None, int]] = [(m.expert, old_F[m.source], new_F[m.target]) for m in moves]
            every += [(int(e), None, new_F[d]) for e, d in np.argwhere(self.moves.reads_LED[layer])]
            out.append(sorted(every, key=lambda each: (each[0], each[2])))
        return out

    def rounds(self, expert_bytes: float, staging: int) -> MoveList:
        """Rounds of moves, in devices of ``frame`` (:func:`poise.control.moves.move_list`)."""
        node_D = None if self.frame.cluster is None else self.frame.cluster.node_D
        return move_list(self.before, self.after, expert_bytes=expert_bytes, staging=staging, node_D=node_D,
                         lost=_gone(self.frame) if self.lost else ())  # fmt: skip


def _gone(frame: Frame) -> list[int]:
    """Devices of the frame that leave."""
    return [int(device) for device in np.flatnonzero(frame.new_F < 0)]


def numbers(ranks: Sequence[int]) -> str:
    """Ascending ranks for people: ``rank 3``, ``ranks 0-7, 9``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
