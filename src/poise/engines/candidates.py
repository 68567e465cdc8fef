"""The maps that could run where a plan should: what a reported balance is tested against. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from poise.cost.split import even_share
from poise.engines.slots import trivial_row
from poise.planning.methods.contiguous import deal
from poise.planning.methods.eplb import rebalance_experts
from poise.planning.placement import Placement
from poise.util.errors import PlacementError

PLAN, TRIVIAL, CONTIGUOUS, RANDOM = "plan", "trivial map", "contiguous map", "map made at random"
OWN, STALE = "engine's own balancer", "map made for other traffic"
RANDOM_LAYERS, FEWEST_MAPS, MOST_MAPS = 64, 2, 12
"""Maps of a random kind are as many as it takes for so many layers: over many layers they are all alike."""


def could_run(
    placement: Placement, layer_ids_L: NDArray[np.int32], load_LE: NDArray[np.float64],
    against: Mapping[str, Placement], *, own_balancer: bool,
) -> dict[str, tuple[NDArray[np.float64], ...]]:  # fmt: skip
    """Each device's share of each expert's tokens under the plan and under what may run in its place, by name.

    A layer that a placement lacks runs the trivial map. Maps that give devices the same as the plan are left out.

    Parameters
    ----------
    placement : the plan; it comes first.
    layer_ids_L, load_LE : decoder layers of the traffic, and their loads.
    against : other placements, by name.
    own_balancer : the engine may have made maps itself (EPLB, at its best: on these very loads).

    Returns
    -------
    Shares, float64 [L, E, D], of one map or of several of a kind.

    Raises
    ------
    PlacementError : a placement to test against has other experts or devices.
    """
    experts, devices, layers = placement.num_experts, placement.num_devices, len(layer_ids_L)
    start_S = trivial_row(experts, placement.num_slots)
    trivial_LED = _shares(placement, np.tile(start_S, (layers, 1)))
    plan_LED = _planned(placement, layer_ids_L, trivial_LED)
    dealt_ED = deal(experts, placement.slots_D, in_turn=False)
    rng = np.random.default_rng(0)
    maps = range(int(np.clip(RANDOM_LAYERS // layers, FEWEST_MAPS, MOST_MAPS)))
    shuffled = tuple(_shares(placement, np.stack([rng.permutation(start_S) for _ in range(layers)])) for _ in maps)
    out = {PLAN: (plan_LED,), TRIVIAL: (trivial_LED,), CONTIGUOUS: (np.tile(even_share(dealt_ED), (layers, 1, 1)),),
           RANDOM: shuffled}  # fmt: skip
    if placement.num_slots % devices == 0:
        out[STALE] = tuple(_balanced(placement, rng.permuted(load_LE, axis=1)) for _ in maps)
        if own_balancer:
            out[OWN] = (_balanced(placement, load_LE),)
    for name, other in against.items():
        if (other.num_experts, other.num_devices) != (experts, devices):
            raise PlacementError(
                f"{name} has {other.num_experts} experts on {other.num_devices} devices, "
                f"the plan {experts} on {devices}"
            )
        out[name] = (_planned(other, layer_ids_L, trivial_LED),)
    return {name: each for name, each in out.items()
            if name in (PLAN, TRIVIAL) or not any(np.array_equal(share, plan_LED) for share in each)}  # fmt: skip


def _shares(placement: Placement, table_LS: NDArray[np.int32]) -> NDArray[np.float64]:
    made = Placement(table_LS, placement.slot_device_S, placement.num_experts, placement.num_devices)
    return even_share(made.count_LED())


def _balanced(placement: Placement, load_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """What EPLB makes of loads."""
    devices, slots = placement.num_devices, placement.num_slots
    table_LS = rebalance_experts(load_LE, slots, 1, 1, devices, sums="double")[0].astype(np.int32)
    device_S = np.repeat(np.arange(devices, dtype=np.int32), slots // devices)
    return even_share(Placement(table_LS, device_S, placement.num_experts, devices).count_LED())


def _planned(
    placement: Placement, layer_ids_L: NDArray[np.int32], trivial_LED: NDArray[np.float64]
) -> NDArray[np.float64]:
    share_LED = even_share(placement.count_LED())
    row = {layer_id: index for index, layer_id in enumerate(placement.layer_ids_L.tolist())}
    ids = enumerate(layer_ids_L.tolist())
    return np.stack([share_LED[row[layer_id]] if layer_id in row else trivial_LED[at] for at, layer_id in ids])
