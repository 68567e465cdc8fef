"""What loads show of themselves, as all layers route the same tokens: exchanged axes, counts that wrapped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.routing.trace import LoadProfile
from poise.util.errors import TraceError

FEW = 3
"""Of fewer layers, or experts, it is no proof that they have as many tokens."""


def refuse_exchanged(profile: LoadProfile) -> None:
    """Raise TraceError where every expert, and not every layer, has as many tokens: each stands for the other."""
    load_LE = profile.load_BLE.sum(axis=0, dtype=np.float64)
    if min(load_LE.shape) < FEW or (load_LE == load_LE[:, :1]).all():
        return
    layer_L, expert_E = load_LE.sum(axis=1), load_LE.sum(axis=0)
    if _alike(expert_E) and not _alike(layer_L):
        raise TraceError(
            f"{profile.name}: every expert has {expert_E[0]:g} tokens, and layers from {layer_L.min():g} to "
            f"{layer_L.max():g}: it seems that layers and experts are exchanged",
            hint="exchange them; or, if they are right, name the format by 'poise convert --format'",
        )


def refuse_wrapped(profile: LoadProfile) -> None:
    """Raise TraceError where tokens of layers differ by whole turns of a counter of 8 or 16 bits."""
    load_BLE, layer_ids_L = profile.load_BLE, profile.layer_ids
    bits = 8 * load_BLE.itemsize
    if load_BLE.dtype.kind not in "iu" or bits > 16:
        return
    tokens_BL = load_BLE.sum(axis=2, dtype=np.int64)
    apart_BL = tokens_BL - tokens_BL[:, :1]
    high_end = int(load_BLE.max()) >= 3 << (bits - 2)  # counts that wrapped are anything up to the last number
    if high_end and apart_BL.shape[1] >= FEW and apart_BL.any() and not (apart_BL % (1 << bits)).any():
        step = int(np.argmax(apart_BL.any(axis=1)))
        low, high = int(np.argmin(tokens_BL[step])), int(np.argmax(tokens_BL[step]))
        raise TraceError(
            f"{profile.name}: counts of {load_BLE.dtype} wrapped: layer {layer_ids_L[low]} has {tokens_BL[step, low]} "
            f"pairs, layer {layer_ids_L[high]} {tokens_BL[step, high]}, whole turns of a counter of {bits} bits apart",
            hint="count in 64 bits",
        )


def _alike(sums: NDArray[np.float64]) -> bool:
    return bool(sums[0] > 0 and np.allclose(sums, sums[0], rtol=1e-9, atol=0))
