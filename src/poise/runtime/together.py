"""Ranks in step: before every exchange each rank tells all what it is about to do, and all raise the error of one.

A checksum of a rank's :class:`Place` travels in the gather that carries the counts. Where checksums differ, or a rank
has found an error, every rank sees it in the same numbers: then all exchange their places in words, and all raise.
Meetings have a process group of their own: a rank that is out of step may be in a collective of another library (FSDP2,
a barrier), which must not be paired with a meeting.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from poise.runtime.collectives import begin_gather, lost, twin
from poise.util.errors import CommunicationError, PoiseError

SHOWN = 60
"""Characters of a value that are shown."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank is about to do; equal on all ranks, or they are out of step.

    Parameters
    ----------
    doing : forward, backward, recomputation, or what all ranks do together between passes.
    run, layer, number : model, among those of the process group; its MoE layer, -1: none; and its forward pass.
    more : what else must be equal, by name.
    """

    doing: str
    run: int
    layer: int
    number: int
    more: tuple[tuple[str, Any], ...] = ()

    def sum(self) -> int:
        """A checksum: places that differ have different ones."""
        return zlib.crc32(repr((self.doing, self.run, self.layer, self.number, *self.more)).encode())

    def __str__(self) -> str:
        model = f" of model {self.run}" if self.run else ""
        return (f"{self.doing}" if self.layer < 0 else f"layer {self.layer}, {self.doing}, pass {self.number}") + model


class Meeting:
    """All ranks of a group; made, and used, by all of them together.

    Parameters
    ----------
    group : the ranks that meet; meetings have connections of their own.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.runs = twin(group), 0
        self._zeros = torch.zeros(0, dtype=torch.int64)

    def join(self, width: int, device: torch.device) -> int:
        """Let one more run meet here, with at most ``width`` numbers at a time; the number of the run."""
        # one width for all runs: ranks that are in different runs can still gather, and so find it out
        self._zeros = torch.zeros(max(len(self._zeros), width), dtype=torch.int64, device=device)
        self.runs += 1
        return self.runs - 1

    def meet(
        self, place: Place, numbers_X: Tensor | None = None, problem: PoiseError | None = None
    ) -> NDArray[np.int64]:
        """Numbers of every rank, int64 [D, X], once all are at the same place and none has a problem.

        Raises
        ------
        CommunicationError : on every rank, if one is elsewhere; names it and where it is.
        PoiseError : on every rank, the problem of one.
        """
        return self.announce(place, numbers_X, problem).hold()

    def announce(self, place: Place, numbers_X: Tensor | None = None, problem: PoiseError | None = None) -> Announced:
        """Begin :meth:`meet`; its ranks may already send what they meet for."""
        parts = [self._zeros.new_tensor([place.sum(), problem is not None]), self._zeros]
        count = 0 if numbers_X is None else len(numbers_X)
        if numbers_X is not None:
            parts[1:] = [numbers_X, self._zeros[count:]]
        return Announced(self, place, problem, count, begin_gather(torch.cat(parts), self.group))

    def settle(self, place: Place, problem: PoiseError | None) -> NoReturn:
        """Every rank knows that something is wrong: all exchange places and problems in words, and raise."""
        told: list[Any] = [None] * dist.get_world_size(self.group)
        said = None if problem is None else (type(problem), problem.message, problem.hint)
        try:
            dist.all_gather_object(told, (place, said), group=self.group)
        except RuntimeError as error:
            raise CommunicationError(*lost(error)) from error
        if problem is not None:
            raise problem
        for rank, (_, theirs) in enumerate(told):
            if theirs is not None:
                kind, message, hint = theirs
                raise kind(f"rank {rank}: {message}", hint=hint)
        raise CommunicationError(
            f"ranks are out of step: {_difference([where for where, _ in told])}",
            hint="every rank runs the same layers, passes and steps: what one leaves out, all leave out",
        )


class Announced:
    """A meeting that this rank has come to."""

    def __init__(
        self, meeting: Meeting, place: Place, problem: PoiseError | None, count: int, told: Callable[[], Tensor]
    ) -> None:
        self._meeting, self._place, self._problem, self._count, self._told = meeting, place, problem, count, told

    def hold(self, beside: Callable[[], Any] | None = None) -> NDArray[np.int64]:
        """As :meth:`Meeting.meet`. ``beside`` waits for what the ranks have begun to send meanwhile: if all are at the
        same place and one has a problem, it is called before the error is raised, so that nothing stays on its way.
        """
        told = self._told().cpu().numpy()
        together = bool((told[:, 0] == told[0, 0]).all())
        if told[:, 1].any() or not together:
            if together and beside is not None:
                beside()
            self._meeting.settle(self._place, self._problem)
        return np.asarray(told[:, 2 : 2 + self._count])


_meetings: weakref.WeakKeyDictionary[Any, Meeting] = weakref.WeakKeyDictionary()


def meeting_of(group: Any) -> Meeting:
    """The meeting of a process group, made at the first call; all its ranks call it together."""
    if group not in _meetings:
        _meetings[group] = Meeting(group)
    return _meetings[group]


def _difference(places: Sequence[Place]) -> str:
    """The first rank that is elsewhere than rank 0, and where both are."""
    other = next(rank for rank, place in enumerate(places) if place != places[0])
    there, here = places[other], places[0]
    if str(there) != str(here):
        return f"rank {other} is in {there}; rank 0 in {here}"
    name, mine, theirs = next((name, a, b) for (name, a), (_, b) in zip(here.more, there.more, strict=True) if a != b)
    mine, theirs = str(mine), str(theirs)
    same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), 0)
    start = max(0, same - SHOWN // 2)
    shown = [text[start : start + SHOWN] for text in (theirs, mine)]
    return f"in {here}, {name}: {shown[0]} on rank {other}, {shown[1]} on rank 0"
