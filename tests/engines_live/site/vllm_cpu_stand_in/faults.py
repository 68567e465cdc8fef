"""Faults of one rank, by the word in ``STAND_IN_FAULT``."""

from __future__ import annotations

from typing import Any


def inject(word: str) -> None:
    """``planner:N``: poise's planner raises MemoryError from its Nth call on, N from 1."""
    name, _, number = word.partition(":")
    if name != "planner":
        raise ValueError(f"no fault is called {name!r}")
    from poise.engines.plugins.policy import Asked

    answer, calls, first = Asked.answer, [0], int(number)

    def fails(self: Any) -> Any:
        if self.load_LE.shape[1] > 8:  # not the small problems that warm it up
            calls[0] += 1
            if calls[0] >= first:
                raise MemoryError(f"asked for by the test, call {calls[0]}")
        return answer(self)

    Asked.answer = fails
