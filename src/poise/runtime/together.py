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

from poise.runtime.collectives import begin_gather, lost, not_refused, refuse, twin
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
    sends : numbers that tell which rows it begins to send meanwhile; (): none.
    """

    doing: str
    run: int
    layer: int
    number: int
    more: tuple[tuple[str, Any], ...] = ()
    sends: tuple[int, ...] = ()

    @property
    def facts(self) -> tuple[tuple[str, Any], ...]:
        """All that must be equal beside the place itself, by name."""
        return *self.more, ("rows on their way", self.sends)

    def sends_with(self, other: Place) -> bool:
        """Whether what a rank sends here is what another expects there: whatever else differs, it will come."""
        mine, theirs = ((one.doing, one.run, one.layer, one.number, one.sends) for one in (self, other))
        return bool(self.sends) and mine == theirs

    def sum(self) -> int:
        """A checksum: places that differ have different ones."""
        return zlib.crc32(repr((self.doing, self.run, self.layer, self.number, *self.facts)).encode())

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
        self.group, self.runs, self._of = twin(group), 0, weakref.ref(group)
        self._zeros, self._hint = torch.zeros(0, dtype=torch.int64), ""

    def join(self, width: int, device: torch.device, hint: str = "") -> int:
        """Let one more run meet here, with at most ``width`` numbers at a time; the number of the run. ``hint``: why a
        rank may not come.
        """
        self._hint = hint or self._hint
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
        CommunicationError : on every rank, if one is elsewhere; names it and where it is. Also where ranks were apart
            before while rows were on their way.
        PoiseError : on every rank, the problem of one.
        """
        return self.announce(place, numbers_X, problem).hold()

    def announce(self, place: Place, numbers_X: Tensor | None = None, problem: PoiseError | None = None) -> Announced:
        """Begin :meth:`meet`; its ranks may already send what they meet for (:attr:`Place.sends`)."""
        not_refused(self._of())
        parts = [self._zeros.new_tensor([place.sum(), problem is not None]), self._zeros]
        count = 0 if numbers_X is None else len(numbers_X)
        if numbers_X is not None:
            parts[1:] = [numbers_X, self._zeros[count:]]
        return Announced(self, place, problem, count, begin_gather(torch.cat(parts), self.group, self._hint))

    def settle(self, place: Place, problem: PoiseError | None, beside: Callable[[], Any] | None = None) -> NoReturn:
        """Every rank knows that something is wrong: all exchange places and problems in words, and raise.

        What they have begun to send one another is waited for by ``beside``, so that nothing stays on its way. Where
        they have begun different exchanges, it would be for ever: the group exchanges nothing any more.
        """
        told: list[Any] = [None] * dist.get_world_size(self.group)
        said = None if problem is None else (type(problem), problem.message, problem.hint)
        try:
            dist.all_gather_object(told, (place, said), group=self.group)
        except RuntimeError as error:
            raise CommunicationError(*lost(error)) from error
        places = [where for where, _ in told]
        if any(where.sends for where in places):
            if beside is not None and all(where.sends_with(places[0]) for where in places):
                beside()
            else:
                refuse(self._of(), f"some were on their way when ranks were out of step: {_difference(places)}", beside)
        if problem is not None:
            raise problem
        for rank, (_, theirs) in enumerate(told):
            if theirs is not None:
                kind, message, hint = theirs
                raise kind(f"rank {rank}: {message}", hint=hint)
        raise CommunicationError(
            f"ranks are out of step: {_difference(places)}",
            hint="every rank runs the same layers, passes and steps: what one leaves out, all leave out",
        )


class Announced:
    """A meeting that this rank has come to."""

    def __init__(
        self, meeting: Meeting, place: Place, problem: PoiseError | None, count: int, told: Callable[[], Tensor]
    ) -> None:
        self._meeting, self._place, self._problem, self._count, self._told = meeting, place, problem, count, told

    def hold(self, beside: Callable[[], Any] | None = None) -> NDArray[np.int64]:
        """As :meth:`Meeting.meet`. ``beside`` waits for what the ranks have begun to send meanwhile; it is called
        before an error is raised, where it will come (:meth:`Meeting.settle`).
        """
        told = self._told().cpu().numpy()
        if told[:, 1].any() or (told[:, 0] != told[0, 0]).any():
            self._meeting.settle(self._place, self._problem, beside)
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
    name, mine, theirs = next((name, a, b) for (name, a), (_, b) in zip(here.facts, there.facts, strict=True) if a != b)
    mine, theirs = str(mine), str(theirs)
    same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), 0)
    start = max(0, same - SHOWN // 2)
    shown = [text[start : start + SHOWN] for text in (theirs, mine)]
    return f"in {here}, {name}: {shown[0]} on rank {other}, {shown[1]} on rank 0"
