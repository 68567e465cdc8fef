"""Entries say what the counts say, price alike, and take room for slots, not for experts times devices."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import FLOW_SPLITS, few_or, load_batch, random_count, tiny_batch, tiny_cluster, tiny_model

from poise.cost.entries import HeldEntries, LayerEntries, entries_of, picked_layers
from poise.cost.quota import holders_of, make_holders
from poise.cost.step import BatchCost, batch_cost
from poise.planning.placement import Placement

SEEDS = st.integers(0, 2**32 - 1)


def counts_of(held: HeldEntries) -> np.ndarray:
    out = np.zeros(held.shape, int)
    np.add.at(out, (held.layer_X(), held.expert_X, held.device_X), held.count_X)
    return out


def counts(seed: int) -> np.ndarray:
    """Int [L, E, D], some experts twice on a device, some devices bare."""
    rng = np.random.default_rng(seed)
    layers, experts, devices = rng.integers(1, 5, 3)
    out = random_count(rng, layers, experts, devices, 0.3) * rng.integers(1, 3, (layers, experts, devices))
    return out.astype(int)


@given(SEEDS)
@settings(max_examples=few_or(200, 40), deadline=None)
def test_entries_are_what_is_not_0(seed):
    count = counts(seed)
    held = entries_of(count)
    layer, device, expert = np.nonzero(count.transpose(0, 2, 1))
    assert held.shape == count.shape and entries_of(held) is held
    np.testing.assert_array_equal(np.stack([held.layer_X(), held.device_X, held.expert_X]), [layer, device, expert])
    np.testing.assert_array_equal(counts_of(held), count)
    np.testing.assert_array_equal(counts_of(HeldEntries.of_layers(LayerEntries.of_counts(one) for one in count)), count)
    np.testing.assert_array_equal(counts_of(held.once()), count > 0)
    np.testing.assert_array_equal(held.used_LD(), count.sum(axis=1))
    np.testing.assert_array_equal(held.used_LD(different=True), (count > 0).sum(axis=1))
    np.testing.assert_array_equal(held.replicas_LE(), count.sum(axis=2))
    for one, own in zip(held.layers(), count, strict=True):
        np.testing.assert_array_equal(one.held_ED(), own > 0)
        np.testing.assert_array_equal(one.replicas_E(), own.sum(axis=1))
        np.testing.assert_array_equal(one.dense(one.count_H[None] * 1.0)[0], own)
        order, compiled = one.by_expert(), make_holders(own)
        mine = holders_of(one.expert_H[order], one.device_H[order], *own.shape)
        for got, wanted, name in zip(mine, compiled, compiled._fields, strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=name)


@given(SEEDS)
@settings(max_examples=few_or(200, 40), deadline=None)
def test_a_placement_is_its_entries(seed):
    count = counts(seed)
    rng = np.random.default_rng(seed)
    slots = count.sum(axis=1).max(axis=0) + rng.integers(0, 2, count.shape[2])
    made = [Placement.from_counts(count, slots_D=slots), Placement.from_entries(entries_of(count), slots_D=slots)]
    start = np.concatenate([[0], np.cumsum(slots)])
    for placement in made:
        np.testing.assert_array_equal(placement.count_LED(), count)
        for layer, device in np.ndindex(count.shape[0], count.shape[2]):
            wanted = np.repeat(np.arange(count.shape[1]), count[layer, :, device])
            row = placement.slot_expert_LS[layer, start[device] : start[device + 1]]
            assert row.tolist() == [*wanted, *[-1] * (slots[device] - len(wanted))]
    shuffled = rng.permutation(np.argwhere(count).repeat(count[count > 0], axis=0))
    again = HeldEntries.of_slots(shuffled[:, 0], shuffled[:, 1], shuffled[:, 2], count.shape)
    np.testing.assert_array_equal(counts_of(again), count)


@given(SEEDS)
@settings(max_examples=few_or(60, 20), deadline=None)
def test_layers_are_picked(seed):
    rng = np.random.default_rng(seed)
    options = [random_count(rng, 3, 4, 2, 0.3) for _ in range(3)]
    best = rng.integers(3, size=3)
    picked = counts_of(picked_layers([entries_of(one) for one in options], best))
    np.testing.assert_array_equal(picked, [options[pick][layer] for layer, pick in enumerate(best)])


@given(SEEDS, st.sampled_from(FLOW_SPLITS), st.booleans())
@settings(max_examples=few_or(80, 20), deadline=None)
def test_entries_and_counts_cost_the_same(seed, priced, loads):
    rng = np.random.default_rng(seed)
    cluster, flow = tiny_cluster(rng, (1, 2)), "home" if loads else priced[0]
    batch = load_batch(rng, layers=2) if loads else tiny_batch(rng, devices=3, layers=2, tokens=(7, 0, 4))
    count = random_count(rng, 2, 4, 3) * rng.integers(1, 3, (2, 4, 3))
    one, other = (batch_cost(batch, form, cluster, tiny_model(batch), traffic=flow, split=priced[1])
                  for form in (count, entries_of(count)))  # fmt: skip
    for name in BatchCost.__slots__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("split", ["even", "exact"])
def test_a_price_takes_room_for_slots(split):
    """256 experts on 1,024 devices: an array of both, of bytes, is 256 kB; steps times devices is 16."""
    rng = np.random.default_rng(0)
    devices, experts = 1024, 256
    cluster = tiny_cluster(rng, (512, 512))
    batch = load_batch(rng, steps=2, layers=1, experts=experts)
    order = np.concatenate([np.arange(experts), rng.integers(experts, size=devices - experts)]).astype(np.int32)
    held = Placement(order[None], np.arange(devices, dtype=np.int32), experts, devices).entries()
    priced = [batch, held, cluster, tiny_model(batch)]
    batch_cost(*priced, traffic="home", split=split)  # compiles
    tracemalloc.start()
    batch_cost(*priced, traffic="home", split=split)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 * experts * devices / 3
