"""SparseAllGather and SparseReduceScatter over one communicator, without copies: rows go straight from where they lie.

A batch of point-to-point operations a round. Every rank posts the operations of one round in the same order, so that
two ranks match them without tags. Rounds after the first are posted in :meth:`Pending.wait`; on NCCL all rounds of a
gather are queued at once, since one communicator runs them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from poise.errors import CommunicationError
from poise.runtime.transfers import Transfer, TransferPlan

Rows = Callable[[int], Sequence[Tensor]]
"""An expert's tensors on this rank, each contiguous: what is sent, or filled, or added to."""


def post(operations: list[dist.P2POp]) -> list[Any]:
    """Start a batch; its works."""
    if not operations:
        return []
    try:
        return list(dist.batch_isend_irecv(operations))
    except RuntimeError as error:
        raise CommunicationError(*lost(error)) from error


def finish(works: Sequence[Any]) -> None:
    """Wait for works; a lost rank becomes a typed error."""
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        raise CommunicationError(*lost(error)) from error


def lost(error: RuntimeError) -> tuple[str]:
    """What to say of an error of a collective."""
    return (f"a collective failed on rank {dist.get_rank()}: {str(error).splitlines()[0][:300]}",)


class Pending:
    """A sparse collective on its way.

    Parameters
    ----------
    plan, group : what moves, and over which process group (group ranks are the plan's ranks).
    rows : this rank's tensors of an expert.
    wire : None: a gather. Else a reduction in this type: the plan is read backwards and what arrives is added;
        temporary buffers are as large as what arrives in a round.
    """

    def __init__(self, plan: TransferPlan, group: Any, rows: Rows, *, wire: torch.dtype | None = None) -> None:
        self.group, self.rows, self.wire, self.reduce = group, rows, wire, wire is not None
        reduce = self.reduce
        self.rank = dist.get_rank(group)
        self.rounds = list(reversed(plan.rounds)) if reduce else list(plan.rounds)
        self.works: list[Any] = []
        self.arrived: list[tuple[Transfer, list[Tensor]]] = []
        self.buffer_bytes = 0
        self._done = False
        ahead = len(self.rounds) if not reduce and dist.get_backend(group) == "nccl" else 1
        for _ in range(min(ahead, len(self.rounds))):
            self._post()

    def _post(self) -> None:
        operations = []
        for move in self.rounds.pop(0):
            source, target = (move.target, move.source) if self.reduce else (move.source, move.target)
            if self.rank == source:
                operations += [self._op(dist.isend, row, target) for row in self.rows(move.expert)]
            elif self.rank == target:
                rows = list(self.rows(move.expert))
                if self.reduce:
                    rows = [torch.empty(row.shape, dtype=self.wire, device=row.device) for row in rows]
                    self.arrived.append((move, rows))
                    self.buffer_bytes += sum(row.nbytes for row in rows)
                operations += [self._op(dist.irecv, row, source) for row in rows]
        self.works += post(operations)

    def _op(self, kind: Any, row: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, row, dist.get_global_rank(self.group, peer), self.group)

    def wait(self) -> None:
        """Until everything this rank sends and receives is done; may be called again."""
        while not self._done:
            finish(self.works)
            self.works = []
            for move, rows in sorted(self.arrived, key=lambda item: (item[0].expert, item[0].target)):
                for into, row in zip(self.rows(move.expert), rows, strict=True):
                    into.add_(row)
            self.arrived = []
            if self.rounds:
                self._post()
            else:
                self._done = True


def sparse_all_gather(plan: TransferPlan, group: Any, rows: Rows) -> Pending:
    """Start SparseAllGather. After ``wait()``, ``rows(e)`` of every target of the plan equals the owner's."""
    return Pending(plan, group, rows)


def sparse_reduce_scatter(plan: TransferPlan, group: Any, rows: Rows, wire: torch.dtype) -> Pending:
    """Start SparseReduceScatter. After ``wait()``, the owner's ``rows(e)`` are the sum over it and all targets.

    Replicas' rows are of type ``wire``; the owner's may be wider. The order of the sum is the plan's: what arrives in
    a round is added by rank. Relays' rows hold partial sums after.
    """
    return Pending(plan, group, rows, wire=wire)
