"""What several ranks of one run recorded, as one workload: added up, copies once, a rank that is missing named.

Ranks count in one of two ways: each the columns (slots, experts) that it holds, which are one block of equal blocks
and counted by no other rank; or each its own tokens, whatever they choose. Ranks that share their tokens
(tensor-parallel attention) count alike, and counts that the engine has summed are alike on all ranks. Files of one rank
are its recordings one after another: steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.routing.counters import Counters, differences
from poise.routing.trace import sealed
from poise.util.errors import TraceError

Reading = Literal["sum", "steps"]
READINGS: tuple[Reading, ...] = ("sum", "steps")
PROOF_BITS = 16.0
"""Counts show how ranks count if it would look so by chance once in 2^16 times."""
MAX_RANKS = 65_536
MOST_SAID = 6
"""Runs of numbers that a message names."""
RANK_NAME = re.compile(r"(?<![a-z])rank[-_]?(\d{1,5})(?!\d)", re.IGNORECASE)
ASK = "'poise convert --ranks sum' adds them up, '--ranks steps' takes them one after another"
MISSING = "give the files of all ranks; 'poise convert --allow-missing-ranks' takes what is there for all traffic"


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """Loads of one file.

    Parameters
    ----------
    name : of the file, for messages.
    rank : the rank that wrote it; None: it does not say.
    load_BLE : [B, L, E], finite, in the type of the record.
    """

    name: str
    rank: int | None
    load_BLE: NDArray[Any]


def one_workload(
    files: Sequence[Recorded], reading: Reading | None = None, *, allow_missing: bool = False,
    unnamed: Reading | None = None, counters: Counters | None = None,
) -> tuple[NDArray[np.float64], list[str]]:  # fmt: skip
    """Loads of all files together, float64 [B, L, E], and notes.

    Files of one rank are steps, in the order given; the n-th files of several ranks are of the same steps. Files of
    several ranks, or that name none, are added up where their counts show that each rank counts its own experts, and
    read once where they are alike.

    Parameters
    ----------
    files : of equal [L, E].
    reading : what files of several ranks are, where the user says it.
    allow_missing : a note instead of an error where a rank is missing.
    unnamed : what files that name no rank are where their counts do not show it; None: ask.
    counters : ``running``: each rank's records are totals, of which the differences are taken; a rank may begin anew
        alone, which a sum of ranks would hide.

    Raises
    ------
    TraceError : files may be read either way; ranks recorded different numbers of steps; or a rank is missing.
    """
    names = {file.rank for file in files}
    if reading == "steps":
        return _counted(files, counters)
    if len(names) == 1 and (len(files) == 1 or (reading is None and None not in names)):
        kept, notes = _without_copies([[file] for file in files])
        loads, more = _counted([mine[0] for mine, _ in kept], counters)
        return loads, notes + more + ([] if None in names else _missing([loads], [names], allow_missing))
    kept, notes = _without_copies(_by_rank(files, apart=len(names) == 1))
    who = [ranks for _, ranks in kept]
    loads_R = [_in_order(mine) for mine, _ in kept]
    if len(kept) == 1:
        loads, more = _counted(kept[0][0], counters)
        return loads, notes + more
    if reading is None and not _own_experts(loads_R, who):
        if names == {None} and unnamed == "steps":
            return _counted(files, counters)
        raise TraceError(_question(files, who), hint=ASK)
    if counters == "running":
        for at, (mine, _) in enumerate(kept):
            loads_R[at], more = _counted(mine, counters)
            notes += [f"{mine[0].name}: {note}" for note in more]
    loads_R, more = _aligned(loads_R, [mine[0] for mine, _ in kept], allow_missing)
    notes.append(f"{len(files)} files of {_ranks(who)} were added up: each counts a part of the same passes")
    return sealed(np.asarray(np.sum(loads_R, axis=0, dtype=np.float64))), notes + more + _missing(
        loads_R, who, allow_missing
    )


def named_rank(path: Path, value: Any = None) -> int | None:
    """The rank that a file says it is of, or else its name (``rank3``), or None.

    Raises
    ------
    TraceError : what it says is no rank.
    """
    if value is None:
        found = RANK_NAME.search(path.name)
        return None if found is None else int(found[1])
    if type(value) is not int or not 0 <= value < MAX_RANKS:
        raise TraceError(f"{path.name}: rank must be a whole number in 0..{MAX_RANKS - 1}, got {str(value)[:40]}")
    return value


def own_blocks(used_RLS: NDArray[np.bool_], ranks: Sequence[int | None]) -> tuple[int, list[int | None]] | None:
    """Number of equal blocks of columns, and that of each rank, if each rank uses its own block alone.

    Parameters
    ----------
    used_RLS : bool [R, L, S], columns that have a count in some pass.
    ranks : [R], block that must be a rank's; None: any that no other has.

    Returns
    -------
    The fewest blocks that fit, of one rank the most; None: none do, or so few columns are used that they may by chance.
    """
    columns, cells = used_RLS.shape[2], int(used_RLS.sum())
    used = [np.flatnonzero(row.any(axis=0)) for row in used_RLS]
    low = 1 + max([1, *(rank for rank in ranks if rank is not None)])
    for blocks in range(low, columns + 1)[:: 1 if len(used) > 1 else -1]:
        if columns % blocks or cells * math.log2(blocks) < PROOF_BITS:
            continue
        width = columns // blocks
        found = [{rank} if rank is not None else set() for rank in ranks]
        for block, row in zip(found, used, strict=True):
            block |= set((row[[0, -1]] // width).tolist()) if row.size else set()
        known = [next(iter(block)) for block in found if block]
        if all(len(block) <= 1 for block in found) and len(set(known)) == len(known):
            return blocks, [next(iter(block), None) for block in found]
    return None


def absent(groups: Sequence[set[int]], expected: int | None = None) -> list[int]:
    """Ranks of 0 to the largest one (or to ``expected``) that recorded nothing, nor a rank that shares their tokens.

    Parameters
    ----------
    groups : ranks that recorded, those with the same tokens in one set.
    expected : number of ranks, if known.

    Raises
    ------
    TraceError : a rank of more than MAX_RANKS.
    """
    there = set().union(*groups)
    most = max(max(there) + 1, expected or 0)
    if most > MAX_RANKS:
        raise TraceError(f"rank {most - 1}, at most {MAX_RANKS} ranks are read")
    if len(groups) == 1 and len(there) > 1:
        return []
    size = _shared(groups)
    held = {rank // size for rank in there}
    return [rank for rank in range(most) if rank not in there and (size == 1 or rank // size not in held)]


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers as text: ``0 to 2, 5``."""
    values = list(numbers)
    breaks = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1] + 1), len(values)]
    runs = [(values[a], values[b - 1]) for a, b in pairwise(breaks) if b > a]
    said = [str(a) if a == b else f"{a}{',' if b == a + 1 else ' to'} {b}" for a, b in runs]
    return ", ".join(said[:MOST_SAID]) + (f" and {len(said) - MOST_SAID} more" if len(said) > MOST_SAID else "")


def told(text: str, allowed: bool) -> list[str]:
    """What is missing: a note where that is allowed, else a TraceError."""
    if not allowed:
        raise TraceError(text, hint=MISSING)
    return [text]


def _shared(groups: Sequence[set[int]]) -> int:
    """Neighbouring ranks that share their tokens: the least number that explains the groups, 1 where none do."""
    if all(len(group) == 1 for group in groups):
        return 1
    for size in range(2, max(max(group) for group in groups) + 2):
        blocks = [{rank // size for rank in group} for group in groups]
        if all(len(block) == 1 for block in blocks) and len(set().union(*blocks)) == len(blocks):
            return size
    return 1


def _by_rank(files: Sequence[Recorded], *, apart: bool) -> list[list[Recorded]]:
    """Files of each rank in order; those without one, or all if they are to be apart, each by itself."""
    out: dict[int, list[Recorded]] = {}
    for index, file in enumerate(files):
        out.setdefault(-1 - index if apart or file.rank is None else file.rank, []).append(file)
    return [out[key] for key in sorted(out, key=lambda key: (key < 0, abs(key)))]


def _without_copies(
    ranks: list[list[Recorded]],
) -> tuple[list[tuple[list[Recorded], set[int | None]]], list[str]]:
    """Ranks whose loads are no copy of another one's, and the ranks that hold these."""
    kept: list[tuple[list[Recorded], set[int | None]]] = []
    for mine in ranks:
        same = next((held for other, held in kept if _alike(mine, other)), None)
        if same is None:
            kept.append((mine, {mine[0].rank}))
        else:
            same.add(mine[0].rank)
    left = len(ranks) - len(kept)
    return kept, [f"{left} of {len(ranks)} hold the same counts as another one and were left out"] * bool(left)


def _alike(mine: list[Recorded], other: list[Recorded]) -> bool:
    return len(mine) == len(other) and all(
        a.load_BLE.any() and np.array_equal(a.load_BLE, b.load_BLE) for a, b in zip(mine, other, strict=True)
    )


def _aligned(
    loads_R: list[NDArray[np.float64]], firsts: Sequence[Recorded], allow_missing: bool
) -> tuple[list[NDArray[np.float64]], list[str]]:
    """Loads of each rank over the same steps; steps that it lacks are empty where that is allowed."""
    sizes = [len(load) for load in loads_R]
    least, most = int(np.argmin(sizes)), int(np.argmax(sizes))
    if sizes[least] == sizes[most]:
        return loads_R, []
    one, other = (file.name if file.rank is None else f"rank {file.rank}" for file in (firsts[least], firsts[most]))
    notes = told(f"{one} recorded {sizes[least]} steps, {other} {sizes[most]}: they are not the same", allow_missing)
    return [np.concatenate([x, np.zeros((sizes[most] - len(x), *x.shape[1:]))]) for x in loads_R], notes


def _own_experts(loads_R: Sequence[NDArray[np.float64]], ranks: Sequence[set[int | None]]) -> bool:
    """Whether counts show that each rank counts experts which no other one counts."""
    total_RLE = np.stack([load.sum(axis=0, dtype=np.float64) for load in loads_R])
    used_RLE = total_RLE > 0
    if (used_RLE.sum(axis=0) > 1).any() or any((load != np.floor(load)).any() for load in loads_R):
        return False  # shares of a rank's own tokens cannot be added, so they are no proof
    if own_blocks(used_RLE, _firsts(ranks)) is not None:
        return True
    share_R = total_RLE.sum(axis=(1, 2)) / max(1.0, total_RLE.sum())
    again_R = total_RLE.sum(axis=(1, 2)) - used_RLE.sum(axis=(1, 2))  # tokens that came to an expert seen before
    bits = -again_R[share_R > 0] * np.log2(share_R[share_R > 0])
    return float(bits.sum()) >= PROOF_BITS


def _missing(loads_R: Sequence[NDArray[np.float64]], ranks: Sequence[set[int | None]], allow: bool) -> list[str]:
    """A note on ranks that are missing, and the experts nobody counted; raises where that is not allowed."""
    used_RLE = np.stack([load.any(axis=0) for load in loads_R])
    experts = used_RLE.shape[2]
    found = own_blocks(used_RLE, _firsts(ranks))
    if found is not None:
        blocks, mine = found
        away = sorted(set(range(blocks)) - {block for block in mine if block is not None})
        return told(f"{away_text(away, blocks)}: experts {spans(within(away, experts // blocks))} are counted by none",
                    allow) if away else []  # fmt: skip
    if len(ranks) == 1:
        return []
    groups = [{rank for rank in held if rank is not None} for held in ranks]
    away = absent(groups) if all(groups) else []
    of = max(set().union(*groups), default=0) + 1
    if (used_RLE.sum(axis=0) > 1).any():
        return told(f"{away_text(away, of)}: what its tokens chose is counted nowhere", allow) if away else []
    busy = np.asarray(used_RLE.any(axis=(0, 2)))
    each, nobody = int(used_RLE.sum(axis=2).max()), int(np.sum(~used_RLE[:, busy].any(axis=0)))
    count_LE = np.sum([load.sum(axis=0, dtype=np.float64) for load in loads_R], axis=0)
    by_chance = np.sum(count_LE == 1) ** 2 / (2 * max(1, np.sum(count_LE == 2)))  # Chao: experts too rare to be seen
    if not away and (each * (len(ranks) + 1) > experts or nobody <= 2 * by_chance):
        return []
    text = away_text(away, of) if away else f"{len(ranks)} ranks have up to {each} experts each, others are missing"
    return told(f"{text}: {nobody / busy.sum():.4g} of {experts} experts of a layer are counted by none", allow)


def within(blocks: Sequence[int], width: int) -> list[int]:
    """Columns of some blocks."""
    return [column for block in blocks for column in range(block * width, (block + 1) * width)]


def _firsts(ranks: Sequence[set[int | None]]) -> list[int | None]:
    return [next(iter(held)) if len(held) == 1 else None for held in ranks]


def _in_order(files: Sequence[Recorded]) -> NDArray[np.float64]:
    return files[0].load_BLE if len(files) == 1 else sealed(np.concatenate([file.load_BLE for file in files]))


def _counted(files: Sequence[Recorded], counters: Counters | None) -> tuple[NDArray[np.float64], list[str]]:
    """Files of one rank in order, as the steps that they are, or between running totals; and notes."""
    loads = _in_order(files)
    return differences(loads, files[0].name) if counters == "running" else (loads, [])


def away_text(ranks: Sequence[int], of: int) -> str:
    """Which ranks are missing of how many."""
    return f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks)} of {of} {'are' if len(ranks) > 1 else 'is'} missing"


def _ranks(ranks: Sequence[set[int | None]]) -> str:
    held = set().union(*ranks)
    return "several ranks" if None in held else f"ranks {spans(sorted(rank for rank in held if rank is not None))}"


def _question(files: Sequence[Recorded], ranks: Sequence[set[int | None]]) -> str:
    of = "that name no rank" if None in set().union(*ranks) else f"of {_ranks(ranks)}"
    return (
        f"{len(files)} files {of} ({files[0].name}, ...): their counts may be parts of the same passes, which add up, "
        "or of passes one after another"
    )
