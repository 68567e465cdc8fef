"""What rows of any engine ask of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.engines_live.running import Ran
from tests.engines_live.runs import TURNS, Runs


def right(runs: Runs, ran: Ran) -> int:
    """How many rounds were answered, on the rank that answered most; all that was is the reference's."""
    ours = runs.reference.tokens()
    for rank in range(len(ran.codes)):
        assert ran.tokens(rank) == [ours[number] for number in ran.numbers[rank]], f"rank {rank}\n{ran.tail()}"
    return max(len(rounds) for rounds in ran.rounds)


def same_tokens(runs: Runs, ran: Ran, row: Callable[[float, str], None], more: str = "") -> None:
    """Every round on all ranks, token for token."""
    assert ran.fine, ran.tail()
    rounds = right(runs, ran)
    assert all(set(numbers) == set(range(len(runs.rounds))) for numbers in ran.numbers)
    count = sum(len(answer) for answers in ran.tokens() for answer in answers)
    row(
        ran.seconds, f"{count} tokens of {rounds} rounds equal on {len(ran.codes)} rank(s), log-probabilities within "
        f"{near(ran, runs.reference):.1g}{more}",
    )  # fmt: skip


def maps_of(ran: Ran) -> NDArray[Any]:
    """Maps that ran, int [N, L, S], the same on all ranks."""
    assert len(ran.maps[0]) and all(maps == ran.maps[0] for maps in ran.maps), "ranks ran different maps"
    return np.array(ran.maps[0])


def planned(ran: Ran) -> list[str]:
    """What poise said of its maps, the same on all ranks; one may have ended before it could say its last."""
    each = [ran.planned(rank) for rank in range(len(ran.codes))]
    fewest = min(map(len, each))
    assert all(one[:fewest] == each[0][:fewest] and len(one) <= fewest + 1 for one in each), each
    return each[0][:fewest]


def came(ran: Ran) -> None:
    """What the run waited for came. Where it did not, and the planner was late or its engine slow to take its maps at
    more than half of its rearrangements, that is said, and nothing is asked of the run; a planner that answers in time has to do it.
    """
    assert ran.fine, ran.tail()
    phase = ran.phases[0][-1]
    if not phase["short"]:
        return
    counts = {name: number - phase["began"].get(name, 0) for name, number in phase["ended"].items()}
    idle = counts.get("late", 0) + max(0, TURNS * phase["rounds"] - counts.get("turns", 0))
    said = f"in {phase['rounds']} rounds, {TURNS} rearrangements each, came {counts}"
    if idle > phase["rounds"] * TURNS // 2:
        pytest.skip(f"inconclusive, machine too busy: {said}")
    pytest.fail(said)


def near(ran: Ran, reference: Ran) -> float:
    """The largest difference of a token's log-probability."""
    ours, theirs = ran.rounds[0], reference.rounds[0]
    pairs = [
        (a["logprobs"], b["logprobs"])
        for one, other in zip(ours, theirs, strict=False)
        for a, b in zip(one, other, strict=True)
    ]
    return float(max(np.abs(np.subtract(*pair)).max() for pair in pairs))
