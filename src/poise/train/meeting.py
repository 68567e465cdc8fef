"""Where the ranks of one run meet: before every exchange all are about to do the same, or all raise."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from poise.runtime.collectives import exchanges
from poise.runtime.dispatch import counted, out_of_range
from poise.runtime.together import Announced, Place, meeting_of
from poise.train.settings import Deployment, Settings
from poise.train.totals import OF_ALL
from poise.util.errors import OptionError, PoiseError

T = TypeVar("T")
Facts = tuple[tuple[str, Any], ...]
"""What else must be equal on all ranks, by name."""
ABSENT = f"a rank that does not come has ended, or waits in what this one has not begun; {OF_ALL}"


def tried(action: Callable[[], T], given_to: str, hint: str) -> tuple[T | None, PoiseError | None]:
    """What a rank finds before it meets the others, or what is wrong: whatever that is, they wait for this rank.

    ``given_to``: whose arguments they are that cannot be read; ``hint``: what they have to be.
    """
    try:
        return action(), None
    except PoiseError as error:
        return None, error
    except Exception as error:
        problem = OptionError(
            f"what was given to {given_to} cannot be read: {type(error).__name__}: {error}", hint=hint
        )
        problem.__cause__ = error
        return None, problem


class OptionsText(str):
    """All options of a run in one text, which is compared whole and shown as its sum."""

    def __repr__(self) -> str:
        return self.short

    def __init__(self, text: str) -> None:
        self.short = str(zlib.crc32(text.encode()))


class RunMeeting:
    """The ranks of one run, among the runs of its process group.

    Parameters
    ----------
    deployment : its ranks.
    num_experts : E.

    ``steps`` counts the optimizer steps of the run; it is part of every place.
    """

    def __init__(self, deployment: Deployment, num_experts: int) -> None:
        self.deployment, self.num_experts, self.steps = deployment, num_experts, 0
        self._meeting = meeting_of(deployment.tokens_group)
        self._run = self._meeting.join(num_experts + 4, deployment.device, ABSENT)
        self._options: tuple[Any, OptionsText] = (None, OptionsText(""))

    def meet(
        self, doing: str, layer: int = -1, number: int = -1, *, numbers_X: Tensor | None = None,
        problem: PoiseError | None = None, more: Facts = (),
    ) -> NDArray[np.int64]:  # fmt: skip
        """Numbers of every rank, int64 [D, X], once all are about to do the same.

        Parameters
        ----------
        doing, layer, number : as in :class:`poise.runtime.together.Place`.
        numbers_X : int64 [X] of this rank.
        problem : what this rank cannot do.
        more : what else must be equal.

        Raises
        ------
        CommunicationError : on every rank, if one is about to do something else.
        PoiseError : on every rank, the problem of one.
        """
        return self.announce(doing, layer, number, numbers_X=numbers_X, problem=problem, more=more).hold()

    def announce(
        self, doing: str, layer: int = -1, number: int = -1, *, numbers_X: Tensor | None = None,
        problem: PoiseError | None = None, more: Facts = (), sends: int | None = None,
    ) -> Announced:  # fmt: skip
        """Begin :meth:`meet`; ``sends``: number of the pass whose rows the ranks begin to send meanwhile, if any."""
        tokens = exchanges(self.deployment.tokens_group)
        place = Place(doing, self._run, layer, number, (
            *more, ("optimizer steps", self.steps), ("exchanges of tokens", tokens),
            ("transfers of weights", exchanges(self.deployment.weights_group)),
        ), () if sends is None else (sends, tokens))  # fmt: skip
        return self._meeting.announce(place, numbers_X, problem)

    def loads(
        self, layer: int, number: int, ids_TK: Tensor, *, problem: PoiseError | None, more: Facts
    ) -> NDArray[np.int64]:
        """Pairs of every rank and expert, int64 [D, E], once all ranks are in this layer of this forward pass.

        Raises
        ------
        CommunicationError, PoiseError : as :meth:`meet`. ModelError : on every rank, ids out of range on one.
        """
        count = self.num_experts
        told = self.meet("forward", layer, number, numbers_X=counted(ids_TK, count), problem=problem, more=more)
        if told[:, 0].any() or told[:, -1].any():
            self._meeting.settle(Place("forward", self._run, layer, number), out_of_range(ids_TK, count))
        return np.ascontiguousarray(told[:, 2 : count + 2])  # as compiled functions take it

    def options(self, settings: Settings) -> OptionsText:
        """What all ranks must have been told alike."""
        if self._options[0] is not settings:
            there = self.deployment
            types = f"{there.compute_dtype}, {there.reduce_dtype}, {there.packing}"
            text = f"{settings!r}, {there.form}, {there.cluster!r}, {types}"
            self._options = settings, OptionsText(re.sub(r" at 0x[0-9a-f]+", "", text))
        return self._options[1]
