"""Rounds of transfers that do not meet: in a round a rank sends to one peer at most and receives from one at most.

All fetches of a migration at once let several senders meet at one receiver, and the tokens of a step queue behind them.
Rounds are colours of the edges of a graph with every rank twice, as sender and as receiver, and an edge a transfer.

Step 1  No schedule has fewer rounds than what one rank sends, or receives. So many are enough (Koenig 1916).
Step 2  Transfers take, one by one, a colour that their sender and their receiver both miss. Where there is none, a
        colour a that the sender misses and a colour b that the receiver misses change places along the path of these
        two colours that begins at the receiver. It never comes to the sender: it comes to senders by edges of a.
Step 3  Rounds are put in order by what they carry: transfers that come first in the list go early.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FREE = -1


def fewest_rounds(pairs: Sequence[tuple[int, int]], num_ranks: int) -> int:
    """Rounds that no schedule can do without: the most transfers that one rank sends, or receives.

    Parameters
    ----------
    pairs : (source, target) of each transfer, ranks below ``num_ranks``.
    """
    ends = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return int(max(np.bincount(ends[:, way], minlength=num_ranks).max() for way in (0, 1)))


def peer_rounds(pairs: Sequence[tuple[int, int]], num_ranks: int) -> list[list[int]]:
    """Numbers of the transfers of each round: :func:`fewest_rounds` rounds, all of them used.

    Parameters
    ----------
    pairs : (source, target) of each transfer; those that should be early come first.
    """
    count = fewest_rounds(pairs, num_ranks)
    taken = np.full((2 * num_ranks, count), FREE, np.int64)  # transfer by end and colour: senders, then receivers
    colour = np.full(len(pairs), FREE, np.int64)
    for number, (source, target) in enumerate(pairs):
        ends = source, num_ranks + target
        mine, other = (np.flatnonzero(taken[end] == FREE) for end in ends)
        both = np.intersect1d(mine, other)
        if not both.size:
            _exchange(ends[1], int(mine[0]), int(other[0]), pairs, taken, colour)
        chosen = int(both[0]) if both.size else int(mine[0])
        colour[number] = chosen
        taken[ends, chosen] = number
    rounds = [np.flatnonzero(colour == c).tolist() for c in range(count)]
    return sorted(rounds, key=lambda one: (sum(one) / len(one), one))


def _exchange(
    end: int,
    a: int,
    b: int,
    pairs: Sequence[tuple[int, int]],
    taken: NDArray[np.int64],
    colour: NDArray[np.int64],
) -> None:
    """Step 2: colours a and b change places along the path from ``end``, which has a and misses b."""
    num_ranks, path, follow = len(taken) // 2, [], a
    while (number := int(taken[end, follow])) != FREE:
        path.append(number)
        source, target = pairs[number]
        end = source if end == num_ranks + target else num_ranks + target
        follow = b if follow == a else a
    for number in path:
        source, target = pairs[number]
        taken[[source, num_ranks + target], colour[number]] = FREE
    for number in path:
        source, target = pairs[number]
        colour[number] = b if colour[number] == a else a
        taken[[source, num_ranks + target], colour[number]] = number
