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
PROOF_CELLS = 16
"""Counts of a record that rise, while none falls, for it to be no chance: once in 2^16."""
FEW = 2
"""Records that rise so in which growing traffic is as likely; more of them are asked about."""
RISING = 0.75
"""Share of records that rise, where the others begin anew."""
ASK = (
    "'poise convert --counters running' takes the differences, '--counters steps' takes the records as they are, if "
    "traffic only grew"
)


def refuse_running(load_BLE: NDArray[Any], layer_ids_L: NDArray[Any], name: str) -> None:
    """Raise TraceError where records [B, L, E] are running totals."""
    if len(load_BLE) <= FEW:
        return
    rises = [_rises(before, after) for before, after in pairwise(load_BLE)]
    if None in rises or sum(map(bool, rises)) < max(FEW, RISING * len(rises)):
        return
    at = rises.index(True)
    layer, expert = np.unravel_index(int(np.argmax(load_BLE[at + 1] - load_BLE[at])), load_BLE.shape[1:])
    first, second = load_BLE[at : at + 2, layer, expert]
    anew = ", but where all begin anew" if any(np.any(b < a) for a, b in pairwise(load_BLE)) else ""
    raise TraceError(
        f"{name}: of {len(load_BLE)} records no count falls from one to the next{anew}: running totals, not steps "
        f"(layer {layer_ids_L[layer]}, expert {expert}: {first:g} in record {at}, {second:g} in the next)",
        hint=ASK,
    )


def may_contain(later_BLE: NDArray[Any], earlier_BLE: NDArray[Any]) -> bool:
    """Whether no expert has fewer tokens in all later records than in all earlier ones: a longer window, or one that
    holds the earlier.
    """
    earlier_LE, later_LE = (load.sum(axis=0, dtype=np.float64) for load in (earlier_BLE, later_BLE))
    return earlier_LE.shape == later_LE.shape and _rises(earlier_LE, later_LE) is True


def differences(load_BLE: NDArray[Any], name: str) -> tuple[NDArray[np.float64], list[str]]:
    """What came between records that are running totals, float64 [B, ...], the first one as it is; and notes.

    A record whose sum is less than that before it began anew, and is as it is.

    Raises
    ------
    TraceError : a count falls while the others rise.
    """
    out = load_BLE.astype(np.float64)
    anew = 0
    for at in range(len(load_BLE) - 1, 0, -1):
        before, after = out[at - 1], out[at]
        if after.sum() < before.sum():
            anew += 1
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
    return sealed(out), notes + [f"{anew} of them began anew"] * bool(anew)


def _rises(before: NDArray[Any], after: NDArray[Any]) -> bool | None:
    """True: no count falls and many rise; False: all stay, or it began anew; None: neither."""
    if (after < before).any():
        return False if after.sum(dtype=np.float64) < before.sum(dtype=np.float64) else None
    rising = int(np.count_nonzero(after > before))
    return True if rising >= PROOF_CELLS else None if rising else False
