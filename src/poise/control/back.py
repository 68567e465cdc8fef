"""A part of the way back to a placement, of a bounded number of fetches. No model of costs says which part is best: by
it what runs is the better one. So whole layers come first, in their order, and where none fits, chains of one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.control.chains import LayerMoves, after_chain, count_fetched
from poise.planning.placement import Placement
from poise.util.errors import NoResultError


def part_back(current: Placement, older: Placement, max_moves: int | None, *, whole: bool = False) -> Placement:
    """The older placement, or what at most ``max_moves`` fetched experts lead to on the way there.

    Parameters
    ----------
    current, older : placements of one shape.
    whole : layers only as a whole: routing groups must not be torn.

    Raises
    ------
    NoResultError : the shortest step on the way fetches more.
    """
    count_LED, want_LED = current.count_LED().copy(), older.count_LED()
    changed = np.flatnonzero((want_LED != count_LED).any(axis=(1, 2))).tolist()
    fetched = {layer: count_fetched(count_LED[layer], want_LED[layer]) for layer in changed}
    left = sum(fetched.values()) if max_moves is None else max_moves
    if sum(fetched.values()) <= left:
        return older
    moved, shortest = False, min(fetched.values())
    for layer in changed:
        if fetched[layer] <= left:
            count_LED[layer], left, moved = want_LED[layer], left - fetched[layer], True
    for layer in [] if moved or whole else changed:
        count_LED[layer], taken, least = _chains(count_LED[layer], want_LED[layer], older.slots_D, left)
        left, moved, shortest = left - taken, moved or taken > 0, min(shortest, least)
    if not moved:
        raise NoResultError(
            f"no part of the way back fetches at most max_moves = {max_moves} experts: the shortest fetches {shortest}",
            hint="--max-moves with more",
        )
    return Placement.from_counts(count_LED, slots_D=older.slots_D, layer_ids_L=older.layer_ids_L, method=older.method)


def _chains(
    have_ED: NDArray[np.int64], want_ED: NDArray[np.int64], slots_D: NDArray[np.int64], left: int
) -> tuple[NDArray[np.int64], int, int]:
    """A layer after the chains that fit, the shortest first; fetches they took, and of the shortest of all."""
    taken, least = 0, count_fetched(have_ED, want_ED)
    while True:
        work = LayerMoves(have_ED, want_ED)
        room_D, buffers_D = (slots_D - have_ED.sum(axis=0)).tolist(), [1] * len(slots_D)
        ways = [work.chain(e, d, room_D, buffers_D) for d, comers in enumerate(work.comers_D) for e in sorted(comers)]
        steps: list[tuple[int, int, NDArray[np.int64]]] = []
        for way in filter(None, ways):
            after = after_chain(have_ED, way)
            steps.append((count_fetched(have_ED, after), len(steps), after))
        if not steps:
            return have_ED, taken, least
        more, _, after = min(steps, key=lambda each: each[:2])
        least = more if taken == 0 else least
        if more > left - taken:
            return have_ED, taken, least
        have_ED, taken = after, taken + more
