"""Synthetic oracles: their planted placement is as good as the cost model says any placement can be."""

import numpy as np
import pytest
from tests.helpers import planted_affinity

from poise.cost.step import batch_cost
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.routing.batching import make_batch
from poise.routing.profile import affinity_LEE, load_LE, mutual_information
from poise.routing.synthetic import zipf_trace


def machine(devices: int) -> Cluster:
    return Cluster(np.zeros(devices, int), np.ones(devices), 1e14, 1e12, 1e11, 1e11, 1e10)


def model(layers: int, experts: int, top_k: int = 1) -> ModelSpec:
    return ModelSpec("tiny", layers, tuple(range(layers)), experts, top_k, 64, 128)


@pytest.mark.parametrize(("devices", "per_device", "layers"), [(2, 1, 2), (4, 4, 4), (8, 2, 3), (3, 5, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_planted_placement_moves_nothing_and_is_balanced(devices, per_device, layers, seed):
    trace, device_LE = planted_affinity(
        num_tokens=16 * devices * per_device, num_layers=layers, num_devices=devices, experts_per_device=per_device,
        seed=seed,
    )  # fmt: skip
    assert np.array_equal(np.sort(device_LE, axis=1), np.tile(np.repeat(np.arange(devices), per_device), (layers, 1)))
    batch = make_batch(trace, tokens_per_step=devices * per_device, order="file")
    cost = {}
    contiguous = np.tile(np.repeat(np.arange(devices), per_device), (layers, 1))
    for name, where in (("planted", device_LE), ("contiguous", contiguous)):
        count = Placement.from_devices(where, devices).count_LED()
        cost[name] = batch_cost(
            batch, count, machine(devices), model(layers, devices * per_device), traffic="stay", split="even"
        )
    assert cost["planted"].imbalance_BL() == pytest.approx(1.0)
    assert cost["planted"].cross_device_BL[:, 1:].max() == 0
    if not np.array_equal(contiguous, device_LE):
        assert cost["contiguous"].cross_device_BL[:, 1:].sum() > 0
    assert cost["planted"].seconds_BL.sum() <= cost["contiguous"].seconds_BL.sum() + 1e-12


def test_planted_tokens_stay_in_their_group():
    trace, device_LE = planted_affinity(seed=5)
    pairs = affinity_LEE(trace.experts, trace.num_experts)
    for layer, table in enumerate(pairs):
        crossing = device_LE[layer][:, None] != device_LE[layer + 1][None, :]
        assert table[crossing].sum() == 0 and table.sum() == trace.num_tokens


def test_zipf_loads_follow_their_exponent():
    flat, steep = (zipf_trace(num_tokens=20_000, num_layers=2, num_experts=16, exponent=x) for x in (0.0, 1.0))
    for trace, exponent in ((flat, 0.0), (steep, 1.0)):
        share = np.arange(1, 17) ** -exponent
        for load in load_LE(trace.experts, 16):
            assert np.sort(load)[::-1] / 20_000 == pytest.approx(share / share.sum(), abs=0.012)


def test_stickiness_is_what_links_layers():
    loose, sticky = (zipf_trace(num_tokens=3000, num_layers=3, num_experts=8, stickiness=x) for x in (0.0, 0.8))
    real, null = mutual_information(loose.experts, 8)
    assert (real < 4 * null).all()
    real, null = mutual_information(sticky.experts, 8)
    assert (real > 20 * null).all()
