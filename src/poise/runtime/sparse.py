"""SparseAllGather and SparseReduceScatter of experts' weights and gradients, by plans of transfers in rounds.

A batch of point-to-point operations a round. On a CPU, rounds after the first are posted in :meth:`Pending.wait`, or,
after :func:`poise.runtime.collectives.run_on_thread`, on a thread of their own; on CUDA all are queued at once on a
stream of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from poise.cost.transfers import Transfer, TransferPlan
from poise.runtime.collectives import Batch, Operation, next_tag, thread_of
from poise.runtime.spans import ended

ExpertTensors = Callable[[int], Sequence[Tensor]]
"""An expert's tensors on this rank, each contiguous: what is sent, or filled, or added to."""
Count = Callable[[int], None]


class Pending:
    """A sparse collective on its way.

    Parameters
    ----------
    plan, group : what moves, and over which process group (group ranks are the plan's ranks).
    rows : this rank's tensors of an expert.
    device : where what travels lies; rows that are added to may lie elsewhere.
    wire : None: a gather. Else a reduction in this type: the plan is read backwards and what arrives is added;
        temporary buffers are as large as what arrives in a round.
    count : told of the bytes of buffers that come and (negative) go.
    """

    def __init__(
        self,
        plan: TransferPlan,
        group: Any,
        rows: ExpertTensors,
        device: torch.device,
        *,
        wire: torch.dtype | None = None,
        count: Count | None = None,
    ) -> None:
        self.group, self.rows, self.device, self.wire, self.count = group, rows, device, wire, count
        self.reduce = wire is not None
        self.rank = dist.get_rank(group)
        self.rounds = list(plan.backwards() if self.reduce else plan.rounds)
        self.tag = next_tag(group)
        self.batch: Batch | None = None
        self.arrived: list[tuple[Transfer, list[Tensor]]] = []
        self._buffer_bytes = 0
        self._done = not self.rounds
        self._stream: Any = None
        self._running: Future[None] | None = None
        self._began = time.monotonic()
        if self._done:
            return
        thread = thread_of(group)
        if device.type == "cuda":  # all rounds at once, on a stream of their own
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                self._run()
        elif thread is not None:
            self._running = thread.submit(self._run)
        else:
            self._post()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _run(self) -> None:
        """All rounds, one after the other."""
        self._began = time.monotonic()  # others may have been before it on the thread
        while not self._done:
            self._post()
            self._land()

    def _post(self) -> None:
        operations = []
        for move in self.rounds.pop(0):
            if self.rank == move.source:
                operations += [Operation(True, row, move.target, self.tag) for row in self.rows(move.expert)]
            elif self.rank == move.target:
                rows = list(self.rows(move.expert))
                if self.reduce:
                    rows = [torch.empty(row.shape, dtype=self.wire, device=self.device) for row in rows]
                    self.arrived.append((move, rows))
                    self._counted(sum(row.nbytes for row in rows))
                operations += [Operation(False, row, move.source, self.tag) for row in rows]
        self.batch = Batch(operations, self.group)

    def _land(self) -> None:
        if self.batch is not None:
            self.batch.wait()
        self.batch = None
        for move, rows in sorted(self.arrived, key=lambda item: (item[0].expert, item[0].source)):
            for into, row in zip(self.rows(move.expert), rows, strict=True):
                into.add_(row.to(into.device))
        self.arrived = []
        self._counted(-self._buffer_bytes)
        self._done = not self.rounds
        if self._done:
            ended("reduce" if self.reduce else "gather", self._began)

    def _counted(self, nbytes: int) -> None:
        self._buffer_bytes += nbytes
        if self.count is not None and nbytes:
            self.count(nbytes)

    def wait(self) -> None:
        """Until everything this rank sends and receives is done; may be called again."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            return
        if self._running is not None:
            self._running.result()
            return
        while not self._done:
            self._land()
            if self.rounds:
                self._post()


def sparse_all_gather(plan: TransferPlan, group: Any, rows: ExpertTensors, device: torch.device) -> Pending:
    """Start SparseAllGather. After ``wait()``, ``rows(e)`` of every target of the plan equals the owner's."""
    return Pending(plan, group, rows, device)


def sparse_reduce_scatter(
    plan: TransferPlan,
    group: Any,
    rows: ExpertTensors,
    wire: torch.dtype,
    device: torch.device,
    count: Count | None = None,
) -> Pending:
    """Start SparseReduceScatter. After ``wait()``, the owner's ``rows(e)`` are the sum over it and all targets.

    Replicas' rows are of type ``wire``; the owner's may be wider. The order of the sum is the plan's: what arrives in
    a round is added by rank. Relays' rows hold partial sums after. ``count`` is told of bytes for what arrives.
    """
    return Pending(plan, group, rows, device, wire=wire, count=count)
