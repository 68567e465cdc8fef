"""Random layers for the device's kernels: uneven nodes, slots that some devices do not have, skewed counts."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from tests.helpers import tiny_cluster

from poise.cost.weights import StepPrice, step_price
from poise.machine.model import ModelSpec
from poise.stepwise.kernels import LayerSlots


class Case(NamedTuple):
    """A layer with its step slots partly filled, counts of every source, and a price."""

    table: LayerSlots
    expert_DS: np.ndarray
    load_SE: np.ndarray
    price: StepPrice

    @property
    def load_E(self) -> np.ndarray:
        return self.load_SE.sum(axis=0).astype(np.int32)

    @property
    def pairs(self) -> int:
        return int(self.load_SE.sum())


def random_case(rng, *, experts=None, nodes=None, step_slots=None, most=400, filled=None) -> Case:
    nodes = nodes or [int(n) for n in rng.integers(1, 4, rng.integers(1, 4))]
    devices, experts = sum(nodes), experts or int(rng.integers(2, 13))
    static_ED = np.zeros((experts, devices), bool)
    static_ED[np.arange(experts), rng.permutation(np.arange(experts) % devices)] = True
    static_ED |= rng.random((experts, devices)) < rng.choice([0.0, 0.1, 0.3]) * min(1.0, 12 / experts)
    step_slots = int(rng.integers(0, 4)) if step_slots is None else step_slots
    cluster = tiny_cluster(rng, nodes, equal=True)
    rates = {"flops_per_s": 8e14, "memory_bytes_per_s": 3e12, "intra_bytes_per_s": 3e11, "inter_bytes_per_s": 4e10}
    cluster = replace(cluster, **rates, memory_bytes=8e10, intra_latency_s=5e-6, inter_latency_s=2e-5)
    table = LayerSlots.of(static_ED, step_slots, cluster.node_D)
    expert_DS = table.expert_DS.copy()
    for device, slot in zip(*np.nonzero(table.turn_DS == -1), strict=True):
        expert = int(rng.integers(experts))
        if rng.random() < (0.5 if filled is None else filled) and expert not in expert_DS[device]:
            expert_DS[device, slot] = expert
    weight = rng.dirichlet(np.full(experts, rng.choice([0.2, 1.0, 5.0])))
    load_SE = np.stack([rng.multinomial(rng.integers(0, most), weight) for _ in range(devices)]).astype(np.int32)
    model = ModelSpec.generic(experts, 2, np.arange(1))
    return Case(table, expert_DS, load_SE, step_price(max(1, int(load_SE.sum()) // 2), experts, cluster, model))
