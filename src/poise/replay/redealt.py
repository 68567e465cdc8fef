"""Traffic of another kind: as skewed as what was recorded, and other experts hot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from poise.routing.batch import RoutingBatch
from poise.util.errors import OptionError


def redealt(batch: RoutingBatch, groups: int = 1, seed: int = 0) -> RoutingBatch:
    """The batch with its experts permuted, in every step and layer anew: loads of experts, and what tokens take
    together, are those of other experts. Routing groups (blocks of E / ``groups`` experts) are permuted, and the
    experts within each, so that groups stay groups.

    What a map gains here is what it gains where its traffic tells nothing of the next.

    Raises
    ------
    OptionError : the groups are not of equal size.
    """
    rng = np.random.default_rng(seed)
    steps, layers, experts = batch.load_BLE.shape
    if experts % groups:
        raise OptionError(f"{experts} experts make no {groups} routing groups of equal size", hint="check --model")
    block = rng.permuted(np.tile(np.arange(groups), (steps, layers, 1)), axis=2)
    each = np.arange(experts // groups)
    within = rng.permuted(np.tile(each, (steps, layers, groups, 1)), axis=3)
    new_BLE = (block[..., None] * each.size + within).reshape(steps, layers, experts)
    load_BLE = np.empty_like(batch.load_BLE)
    np.put_along_axis(load_BLE, new_BLE, batch.load_BLE, axis=2)
    known, taken = batch.experts_TLK, None
    if known is not None:
        assert batch.start_B is not None
        taken = np.empty_like(known)
        for b, (first, last) in enumerate(zip(batch.start_B[:-1], batch.start_B[1:], strict=True)):
            for layer, new_E in enumerate(new_BLE[b]):
                taken[first:last, layer] = np.append(new_E, -1)[known[first:last, layer]]  # -1 stays -1
    return replace(batch, load_BLE=load_BLE, experts_TLK=taken, order=f"other experts hot: {batch.order}")
