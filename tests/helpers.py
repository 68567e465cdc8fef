"""Small random machines, traffic and placements that brute force can go through."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from poise.cost.entries import LayerEntries
from poise.cost.split import SPLITS, split_shares
from poise.cost.traffic import DATA_FLOWS
from poise.machine.cluster import Cluster
from poise.machine.kernel import AllToAllLinks, ExchangeWay, ExpertKernel
from poise.machine.model import ModelSpec
from poise.routing.batch import RoutingBatch
from poise.routing.trace import RoutingTrace

FLOW_SPLITS = [(flow, split) for flow in DATA_FLOWS for split in SPLITS if (flow, split) != ("stay", "near")]
"""Data flows and the splits that can be priced under them."""


def few_or(many: Any, few: Any) -> Any:
    """How many random examples, or which cases: ``few`` in ``make test``, ``many`` in ``make test-all`` (POISE_MANY=1).

    What is few has one of each kind; benchmarks/slices.py names the files (MANY, CASES), which it runs with POISE_MANY=1.
    """
    return many if os.environ.get("POISE_MANY") else few


def split_share_BED(load_BE, count_ED, speed_D, split: str):
    """Share of each expert's tokens on each device in each step, float64 [B, E, D] (B = 1 for the even split)."""
    held, share_BH = split_shares(load_BE, LayerEntries.of_counts(count_ED), speed_D, split)
    return held.dense(share_BH)


def many_only(like: str) -> Any:
    """A mark of a test that ``make test`` leaves out, as ``like`` tells why it may; ``make test-all`` runs it."""
    import pytest  # what ranks import has no need of it

    return pytest.mark.skipif(few_or(False, True), reason=f"POISE_MANY=1 runs it; {like}")


def tiny_cluster(
    rng, nodes: Sequence[int] = (2, 1), *, shared: bool | None = None, equal: bool = False, measured: bool | None = None
) -> Cluster:
    """Nodes of these sizes with constants that make compute, fabric and network each matter now and then.

    ``measured`` (default: unless ``equal``): a third has a measured kernel, and half of them measured all-to-alls.
    """
    devices = sum(nodes)
    cluster = Cluster(
        node_D=np.repeat(np.arange(len(nodes)), nodes),
        speed_D=np.ones(devices) if equal else rng.choice([0.5, 1.0, 1.5, 2.0], devices),
        flops_per_s=32.0,
        memory_bytes_per_s=float(rng.choice([8.0, 32.0, 128.0])),
        memory_bytes=1e6,
        intra_bytes_per_s=float(rng.choice([2.0, 8.0, 32.0])),
        inter_bytes_per_s=float(rng.choice([2.0, 8.0, 32.0])),
        nic_shared=bool(rng.integers(2)) if shared is None else shared,
        intra_latency_s=0.25,
        inter_latency_s=0.5,
    )
    return with_constants(cluster) if measured or (measured is None and not equal) else cluster


def with_constants(cluster: Cluster) -> Cluster:
    """The same with measured constants, or without, as its rates have it: no draw of the caller's is taken."""
    rates = (cluster.memory_bytes_per_s, cluster.intra_bytes_per_s, cluster.inter_bytes_per_s, cluster.num_devices)
    own = np.random.default_rng([int(rate) for rate in rates])
    kernel = (
        ExpertKernel("k", "bf16", 2.0, 0.3, *own.uniform(0.5, 3.0, 3), 32.0, 16.0) if own.random() < 1 / 3 else None
    )
    ways = [ExchangeWay(0.2, *own.choice([2.0, 8.0, 32.0], 2), peer_s=0.1, nodes_start_s=0.4) for _ in range(2)]
    return replace(cluster, kernel=kernel, links=AllToAllLinks("l", *ways) if own.random() < 0.5 else None)


def tiny_model(batch: RoutingBatch) -> ModelSpec:
    """One second a token at speed 1 on :func:`tiny_cluster`; 4 bytes out, 8 bytes back, 6 bytes of keys and values."""
    layers = batch.num_layers
    return ModelSpec(
        "tiny", layers, tuple(range(layers)), batch.num_experts, batch.top_k, hidden_size=4,
        expert_intermediate_size=2, num_expert_matrices=2, dispatch_bytes=1.0, combine_bytes=2.0,
        kv_bytes_per_token_layer=6.0,
    )  # fmt: skip


def token_batch(
    experts_TLK, tokens_B: Sequence[int], num_experts: int, *, home_T=None, request_T=None, weight_B=None
) -> RoutingBatch:
    """A batch of given tokens: the first ``tokens_B[0]`` rows are step 0, and so on. Loads are counted one by one."""
    experts = np.asarray(experts_TLK, dtype=np.int16)
    start = np.concatenate([[0], np.cumsum(tokens_B)]).astype(np.int64)
    load = np.zeros((len(tokens_B), experts.shape[1], num_experts))
    for b in range(len(tokens_B)):
        for token in experts[start[b] : start[b + 1]]:
            for layer, chosen in enumerate(token):
                for expert in chosen[chosen >= 0]:
                    load[b, layer, expert] += 1
    weight = np.full(len(tokens_B), 1 / len(tokens_B)) if weight_B is None else np.asarray(weight_B, dtype=float)
    return RoutingBatch(
        load, weight, experts.shape[2], np.arange(experts.shape[1], dtype=np.int32), experts, start,
        None if request_T is None else np.asarray(request_T, dtype=np.int32),
        None if home_T is None else np.asarray(home_T, dtype=np.int32),
    )  # fmt: skip


def tiny_batch(
    rng, *, devices: int, experts: int = 4, layers: int = 2, top_k: int = 2, tokens: Sequence[int] = (4, 0, 3),
    idle: float = 0.0,
) -> RoutingBatch:  # fmt: skip
    """Random skewed tokens in steps of these sizes; home ranks recorded, from requests, or dealt in turn.

    Of all picks a share ``idle`` computes nothing.
    """
    total = sum(tokens)
    score = rng.gumbel(size=(total, layers, experts)) + 2.0 * rng.random((1, layers, experts))
    ids = np.argsort(-score, axis=2)[:, :, :top_k]
    if idle:
        ids = no_experts(rng, ids, idle)
    homes = [{"home_T": rng.integers(devices, size=total)}, {"request_T": rng.integers(9, size=total)}, {}]
    weight = rng.random(len(tokens)) + 0.1
    return token_batch(ids, tokens, experts, weight_B=weight / weight.sum(), **homes[rng.integers(3)])


def no_experts(rng, experts_TLK, share: float) -> np.ndarray:
    """The picks with a share of them -1, which computes nothing; those of a token come last. The first one stays."""
    none = rng.random(experts_TLK.shape) < share
    none[:1, :1, :1] = False
    order = np.argsort(none, axis=2, kind="stable")
    return np.take_along_axis(np.where(none, -1, experts_TLK), order, axis=2)


def load_batch(rng, *, experts: int = 4, layers: int = 2, top_k: int = 2, steps: int = 2) -> RoutingBatch:
    """Random loads without tokens, some fractions, some steps of a layer empty."""
    load = rng.integers(0, 9, (steps, layers, experts)) * rng.choice([0.0, 0.3, 1.0, 2.5], (steps, layers, 1))
    weight = rng.random(steps) + 0.1
    load[0, 0, 0] += 1.0
    return RoutingBatch(load, weight / weight.sum(), top_k, np.arange(layers, dtype=np.int32))


def with_unseen(batch: RoutingBatch) -> RoutingBatch:
    """The batch with loads of which a part belongs to no token, for every expert; they sum to what they did."""
    mass_BL1 = batch.load_BLE.sum(axis=2, keepdims=True)
    load = (batch.load_BLE + 0.3 * (mass_BL1 > 0)) * (mass_BL1 / (mass_BL1 + 0.3 * batch.num_experts))
    return replace(batch, load_BLE=load)


def random_count(rng, layers: int, experts: int, devices: int, share: float = 0.3) -> np.ndarray:
    """Random replicas, int [L, E, D] of 0 and 1, at least one an expert."""
    count = (rng.random((layers, experts, devices)) < share).astype(np.int64)
    for layer, expert in product(range(layers), range(experts)):
        count[layer, expert, rng.integers(devices)] = 1
    return count


def random_slots(rng, experts: int, devices: int, spare: int) -> np.ndarray:
    """Uneven slots, int [D], that sum to experts + spare; none above the number of experts."""
    slots = np.zeros(devices, np.int64)
    while slots.sum() < experts + spare and slots.min() < experts:
        slots[rng.choice(np.flatnonzero(slots < experts))] += 1
    return slots


def all_counts(experts: int, slots_D) -> Iterator[np.ndarray]:
    """Every way to fill one layer, int [E, D]: each expert on a set of devices, none beyond its slots."""
    devices = len(slots_D)
    sets = [np.array(held) for held in product([0, 1], repeat=devices) if any(held)]

    def fill(rows: list[np.ndarray], used: np.ndarray) -> Iterator[np.ndarray]:
        if (used > slots_D).any():
            return
        if len(rows) == experts:
            yield np.array(rows)
            return
        for held in sets:
            yield from fill([*rows, held], used + held)

    yield from fill([], np.zeros(devices, np.int64))


def planted_affinity(
    *, num_tokens: int = 512, num_layers: int = 4, num_devices: int = 4, experts_per_device: int = 4, seed: int = 0
) -> tuple[RoutingTrace, np.ndarray]:
    """Tokens that stay in one group of experts through all layers, and the placement [L, E] that keeps groups whole.

    Under ``stay`` that placement moves nothing after the first layer, and every device gets the same number of tokens:
    no placement can do better. ``num_tokens`` should be a multiple of num_devices * experts_per_device.
    """
    rng = np.random.default_rng(seed)
    num_experts = num_devices * experts_per_device
    group_LE = np.stack(
        [rng.permutation(np.repeat(np.arange(num_devices), experts_per_device)) for _ in range(num_layers)]
    )
    members = np.stack([np.argsort(row, kind="stable").reshape(num_devices, -1) for row in group_LE])
    token_group = np.arange(num_tokens) % num_devices
    even = (np.arange(num_tokens) // num_devices) % experts_per_device
    pick = (even[:, None] + rng.integers(experts_per_device, size=num_layers)) % experts_per_device
    experts = members[np.arange(num_layers)[None, :], token_group[:, None], pick]
    return RoutingTrace(experts.astype(np.int16), num_experts, name="synthetic planted affinity"), group_LE
