"""What ``poise-near``'s planning takes of hosts, and so how often it looks and how late that is in force.

A look at one layer plans the ways to better holders, shares and how tokens are sent: tens of milliseconds of a core,
more than a step has for every layer on every host. So layers are dealt to ranks in turn; each plans its own on a core
beside the steps, which do not wait, and tells the others. Looks at a layer are no closer than a rank needs for all of
its layers, and as close as that only while few steps are known; what one finds is in force once all have been told, in
a step that is known beforehand, so that nobody waits for it. Seconds of a look: benchmarks/fast_loop.py looks.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from poise.cost.machine import expert_work
from poise.cost.weights import StepPrice, compiled_price
from poise.stepwise.protocol import Looks

LOOK_SECONDS, LOOK_PAIRS, LOOK_POWER = 8e-3, 1024, 1.3
"""One look: seconds for so many (expert, device) pairs, and the power of their number with which it grows."""


def look_seconds(num_experts: int, num_devices: int) -> float:
    """One look at one layer on one core."""
    return float(LOOK_SECONDS * (num_experts * num_devices / LOOK_PAIRS) ** LOOK_POWER)


@lru_cache(maxsize=256)
def host_looks(price: StepPrice, num_experts: int, pairs: float, least: int) -> Looks:
    """For steps of so many (token, expert) pairs, at least ``least`` steps apart."""
    machine = compiled_price(price).machine
    devices, layers = len(machine.speed_D), price.model.num_moe_layers
    work_s = num_experts * expert_work(pairs / num_experts, machine) / float(machine.speed_D.sum())
    step_s = layers * (price.window_s + machine.start_s + work_s)  # as if no device ever waited: no look has more time
    told_s = price.cluster.plain_wire.start_s + 4.0 * num_experts * devices / price.cluster.slowest_bytes_per_s
    look_s, mine = look_seconds(num_experts, devices) + told_s, ceil(layers / devices)
    soonest = ceil(mine * look_s / step_s)
    return Looks(max(least, soonest), soonest, ceil(look_s / step_s))
