"""Counters that were never set back: each record holds what came before it, too, and is no step.

Loads of steps rise and fall. Where every expert of every layer has at least as many tokens as in the record before,
again and again, the records are running totals; read as steps they count early tokens many times, and no two windows of
them are apart. A counter that began anew in between (an engine was started again) falls as a whole.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.routing.trace import sealed
from poise.util.errors import TraceError

Counters = Literal["steps", "running"]
COUNTERS: tuple[Counters, ...] = ("steps", "running")
PROOF_CELLS = 32
"""Counts that rise, over all records together, while none falls: by chance once in 2^32."""
MANY_CELLS = 16
"""Counts that rise between two windows alone, while none falls: by chance once in 2^16."""
FEW = 2
"""Records that rise so in which growing traffic is as likely; more of them are asked about."""
RISING = 0.75
"""Share of records that rise, where the others begin anew."""
ASK = (
    "'poise convert --counters running' takes the differences, '--counters steps' takes the records as they are, if "
    "traffic only grew"
)


def refuse_running(load_BLE: NDArray[Any], layer_ids_L: NDArray[Any], name: str) -> None:
    """Raise TraceError where records [B, L, E] are running totals. Those without tokens show nothing."""
    busy = [at for at, load_LE in enumerate(load_BLE) if load_LE.any()]
    if len(busy) <= FEW:
        return
    cells, first, anew = [], None, False
    for before, after in pairwise(busy):
        rising = _rising(load_BLE[before], load_BLE[after])
        if rising is None:
            return
        anew |= rising < 0
        if rising:
            cells.append(max(0, rising))
            first = (before, after) if first is None and rising > 0 else first
    risen = sum(map(bool, cells))
    if first is None or risen < max(FEW, RISING * len(cells)) or sum(cells) < PROOF_CELLS:
        return
    one, other = load_BLE[first[0]], load_BLE[first[1]]
    layer, expert = np.unravel_index(int(np.argmax(other - one)), one.shape)
    raise TraceError(
        f"{name}: of {len(busy)} records no count falls from one to the next{', but where all begin anew' * anew}: "
        f"running totals, not steps (layer {layer_ids_L[layer]}, expert {expert}: {one[layer, expert]:g} in record "
        f"{first[0]}, {other[layer, expert]:g} in record {first[1]})",
        hint=ASK,
    )


def may_contain(later_BLE: NDArray[Any], earlier_BLE: NDArray[Any]) -> bool:
    """Whether no expert has fewer tokens in all later records than in all earlier ones: a longer window, or one that
    holds the earlier.
    """
    earlier_LE, later_LE = (load.sum(axis=0, dtype=np.float64) for load in (earlier_BLE, later_BLE))
    return earlier_LE.shape == later_LE.shape and (_rising(earlier_LE, later_LE) or 0) >= MANY_CELLS


def began_anew(*counts_B: NDArray[Any]) -> NDArray[np.bool_]:
    """Records before which the counters of one run began anew, bool [B]: a sum of a record is less than before.

    Parameters
    ----------
    counts_B : [B, ...] each, what was counted side by side: tokens of experts, of slots, picks that compute nothing.
    """
    anew_B = np.zeros(len(counts_B[0]), bool)
    for count_B in counts_B:
        sum_B = count_B.sum(axis=tuple(range(1, count_B.ndim)), dtype=np.float64)
        anew_B[1:] |= sum_B[1:] < sum_B[:-1]
    return anew_B


def differences(
    load_BLE: NDArray[Any], name: str, anew_B: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float64], list[str]]:
    """What came between records that are running totals, float64 [B, ...], the first one as it is; and notes.

    A record that began anew is as it is.

    Parameters
    ----------
    anew_B : which do, of counts that have others beside them; None: as :func:`began_anew`.

    Raises
    ------
    TraceError : a count falls while the others rise.
    """
    out = load_BLE.astype(np.float64)
    anew_B = began_anew(load_BLE) if anew_B is None else anew_B
    for at in range(len(load_BLE) - 1, 0, -1):
        before, after = out[at - 1], out[at]
        if anew_B[at]:
            continue
        if (after < before).any():
            cell = np.unravel_index(int(np.argmin(after - before)), before.shape)
            raise TraceError(
                f"{name}: a running total never falls, the {'. number of the '.join(str(i + 1) for i in cell[::-1])}. "
                f"layer is {before[cell]:g} in record {at - 1} and {after[cell]:g} in the next",
                hint="leave --counters out, or say --counters steps",
            )
        out[at] = after - before
    notes = [f"{len(out)} records are running totals: differences were taken, the first one is as it is"]
    anew = sum(bool(out[at].any()) for at in np.flatnonzero(anew_B))
    return sealed(out), notes + [f"{anew} of them began anew"] * bool(anew)


def _rising(before: NDArray[Any], after: NDArray[Any]) -> int | None:
    """How many counts rise, where none falls; -1: it began anew; None: some fall, and not all together."""
    if (after < before).any():
        return -1 if after.sum(dtype=np.float64) < before.sum(dtype=np.float64) else None
    return int(np.count_nonzero(after > before))
