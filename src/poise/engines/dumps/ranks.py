"""Records that name their rank and pass: is a rank missing, or a pass of one, and which slots did nobody count?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import ReadOptions
from poise.routing.ranks import absent, away_text, own_blocks, spans, told, within
from poise.util.errors import TraceError

RAGGED = 2
"""Passes by which ranks may start and stop apart: a request to do so reaches them one after another."""


@dataclass(frozen=True, slots=True, eq=False)
class RankRecord:
    """What one rank recorded.

    Parameters
    ----------
    rank : its number.
    used_LS : bool [L, S], slots (or experts) that it counted in some pass.
    passes : ids of the passes.
    """

    rank: int
    used_LS: NDArray[np.bool_]
    passes: frozenset[int]


def check_ranks(
    records: Sequence[RankRecord], alike: Sequence[set[int]], options: ReadOptions, *, expected: int | None = None,
    map_LS: NDArray[np.int64] | None = None, what: str = "slots", unit: str = "passes",
    ragged: int = RAGGED,
) -> tuple[set[int], list[str]]:  # fmt: skip
    """Passes at the beginning and the end that not all ranks recorded, which are to be left out, and notes.

    Parameters
    ----------
    records : of one rank several ones where it wrote several files.
    alike : sets of ranks that recorded the same tokens.
    options : whether ranks may be missing.
    expected : number of ranks, if known.
    map_LS : the expert of each slot, where it is known.
    what, unit : what is counted, and in what, for messages.
    ragged : passes at either end that some ranks may lack: these are left out.

    Raises
    ------
    TraceError : a rank is missing, or passes of one are.
    """
    groups = _joined([*alike, *({record.rank} for record in records)])
    there = sorted({record.rank for record in records})
    used_RLS = np.stack([np.stack([r.used_LS for r in records if r.rank == rank]).any(axis=0) for rank in there])
    found = own_blocks(used_RLS, there)
    if found is not None:
        away = sorted(set(range(found[0])) - set(there))
        columns = within(away, used_RLS.shape[2] // found[0])
        text = f"{away_text(away, found[0])}: {what} {spans(columns)} are counted by none"
        text += "" if map_LS is None else _experts(map_LS, columns, np.asarray(used_RLS.any(axis=(0, 2))))
    else:
        away = absent(groups, expected)
        text = f"{away_text(away, max([*there, *away]) + 1)}: what its tokens chose is counted nowhere"
    lone = len(there) == 1 and found is None  # who names one rank's file means it; all may hold the same tokens
    if lone and away:
        text = f"rank {there[0]} alone was read: other ranks' tokens, where they have their own, are not in it"
    notes = told(text, lone or options.allow_missing_ranks) if away else []
    passes = [frozenset().union(*(r.passes for r in records if r.rank in group)) for group in groups]
    left, more = _ragged(groups, passes, ragged, unit, options.allow_missing_ranks)
    return left, notes + more


def one_run(rank: int, pass_id: int, first_L: NDArray[np.bool_], second_L: NDArray[np.bool_], unit: str) -> None:
    """Raise TraceError if two records of one rank and pass, no copies, have load (bool [L]) in the same layer."""
    both = np.flatnonzero(first_L & second_L)
    if both.size:
        raise TraceError(
            f"two files of rank {rank} hold different counts of {unit} {pass_id} in layer {both[0]}",
            hint="give the files of one run",
        )


def _joined(groups: Sequence[set[int]]) -> list[set[int]]:
    """Sets that share a rank as one."""
    out: list[set[int]] = []
    for group in groups:
        near = [other for other in out if other & group]
        out = [other for other in out if not other & group] + [group.union(*near)]
    return sorted(out, key=min)


def _experts(map_LS: NDArray[np.int64], columns: Sequence[int], busy_L: NDArray[np.bool_]) -> str:
    """Experts that have no other slot in the first layer with load."""
    row = map_LS[int(np.argmax(busy_L))]
    lost = np.setdiff1d(row[columns], np.delete(row, columns))
    lost = lost[lost >= 0]
    return f", in layer {int(np.argmax(busy_L))} the only ones of experts {spans(lost.tolist())}" if lost.size else ""


def _ragged(
    groups: Sequence[set[int]], passes: Sequence[frozenset[int]], most: int, unit: str, allow: bool
) -> tuple[set[int], list[str]]:
    everywhere, anywhere = frozenset.intersection(*passes), sorted(frozenset().union(*passes))
    lacking = [key for key in anywhere if key not in everywhere]
    if not lacking:
        return set(), []
    before = sum(key < min(everywhere, default=0) for key in lacking)
    after = sum(key > max(everywhere, default=0) for key in lacking)
    if everywhere and before + after == len(lacking) and max(before, after) <= most:
        return set(lacking), [f"{unit} that not all ranks recorded were left out: {spans(lacking)}"]
    group, found = next((g, p) for g, p in zip(groups, passes, strict=True) if len(p) < len(anywhere))
    gone = [key for key in anywhere if key not in found]
    return set(), told(
        f"rank {min(group)} lacks {unit} {spans(gone)} of {anywhere[0]} to {anywhere[-1]}, which others recorded",
        allow,
    )
