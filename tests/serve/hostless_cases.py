"""Serving without the host in any layer, on two processes, against the plain model and the present path.

torchrun --standalone --nproc-per-node 2 tests/serve/hostless_cases.py --out results.jsonl [case ...]
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.ranks import registry
from tests.runtime.device.mirror import MirrorKernels
from tests.runtime.device.traced import GraphRules
from tests.serve import models as m

from poise.cost.weights import StepPrice, step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.runtime.device.layer import DeviceLayer
from poise.runtime.device.padded import RowCapacity
from poise.serve import Engine, HostlessPolicy
from poise.serve import hostless as code
from poise.serve.hostless import HostlessLayer
from poise.serve.layer import ServedLayer
from poise.stepwise.kernels import LayerSlots
from poise.util.errors import CapacityError, OptionError, PlacementError

CASES, case = registry()
BUDGET = 16
DENSE: dict[str, Any] = {}


def plain(family: str) -> Any:
    return DENSE.setdefault(family, m.dense(family))


def answers(family: str, new: int = 8) -> list[list[int]]:
    return [m.plain_greedy(plain(family), prompt, new) for prompt in m.prompts()]


def place(kind: str, family: str, seed: int = 0) -> Placement:
    return m.placement(kind, m.moe_layers(plain(family)), dist.get_world_size(), seed)


def machine() -> Cluster:
    """So slow that replicas pay even for these few tokens."""
    world = dist.get_world_size()
    return Cluster(
        np.zeros(world, np.int32), np.ones(world), 1e6, 1e6, 1e9, 1e12, 1e12, intra_latency_s=1e-9, inter_latency_s=1e-9
    )


def price() -> StepPrice:
    model = ModelSpec("tiny", 2, (0, 1), m.EXPERTS, m.TOP_K, hidden_size=32, expert_intermediate_size=16,
                      num_expert_matrices=3, dispatch_bytes=8.0, combine_bytes=8.0, kv_bytes_per_token_layer=1.0)  # fmt: skip
    return step_price(8, m.EXPERTS, machine(), model, window_s=1.0, control_s=0.0)


def policy(**options: Any) -> HostlessPolicy:
    return HostlessPolicy(price(), **({"step_slots": 2, "every": 1, "where": ("cpu",)} | options))


def engine(family: str = "olmoe", kind: str = "replicas", fast: Any = None, **options: Any) -> Engine:
    fast = policy() if fast is None else fast
    return Engine(copy.deepcopy(plain(family)), place(kind, family), machine(), fast=fast, budget=BUDGET, **options)


def layers_of(served: Engine) -> list[HostlessLayer]:
    found = [each for each in served.experts.values() if isinstance(each, HostlessLayer)]
    assert len(found) == len(served.experts)
    return found


def replicas_of(layer: HostlessLayer) -> int:
    return int(((layer.layer.kernels.host.table.turn_DS == -1) & (layer.layer.expert_DS.numpy() >= 0)).sum())


@case
def the_plain_models_tokens() -> dict:
    """Prompts in chunks and decode steps of several families and placements; replicas come, and are used."""
    seen: dict[str, Any] = {}
    for family, kind in (
        ("olmoe", "replicas"),
        ("olmoe", "contiguous"),
        ("gpt_oss", "replicas"),
        ("deepseek_v3", "contiguous"),
    ):
        served = engine(family, kind)
        replicas, planned = 0, 0

        def look(now: Engine) -> None:
            nonlocal replicas, planned
            replicas = max(replicas, *(replicas_of(each) for each in layers_of(now)))
            planned += sum(1 - int(each.layer.leave) for each in layers_of(now))

        assert served.generate(m.prompts(), 8, before_step=look) == answers(family), (family, kind)
        seen[f"{family}, {kind}"] = replicas, planned
    assert all(min(each) > 0 for each in seen.values()), f"no replica was ever placed, or none used: {seen}"
    return seen


@case
def where_tensors_lie_decides() -> dict:
    """On a device that the policy does not name, the same policy is the present path, with the same tokens."""
    served = engine(fast=policy(where=("cuda",)))
    assert all(isinstance(each, ServedLayer) for each in served.experts.values())
    assert served.generate(m.prompts(), 8) == answers("olmoe")
    return {}


@case
def a_layer_equals_the_present_path() -> dict:
    """The same tokens through both, step by step: outputs in float64."""
    old, new = engine(fast=policy(where=("cuda",))), engine(fast=policy(sent=1, every=2))
    rank, world = dist.get_rank(), dist.get_world_size()
    apart, make, looks = 0.0, np.random.default_rng(0), mock.Mock(wraps=DeviceLayer.prepare)
    for each in layers_of(new):
        each.layer.prepare = partial(looks, each.layer)
    for step in range(6):
        sizes = make.integers(0, BUDGET + 1, world) if step != 3 else np.array([0, BUDGET])[:world]
        x = torch.from_numpy(make.standard_normal((world, BUDGET, 32)))[rank, : sizes[rank]]
        law = make.dirichlet(np.full(m.EXPERTS, 0.3)) * 0.9 + 0.1 / m.EXPERTS
        ids = torch.from_numpy(
            np.stack([make.choice(m.EXPERTS, m.TOP_K, replace=False, p=law) for _ in range(world * BUDGET)])
        )
        ids = ids.view(world, BUDGET, m.TOP_K)[rank, : sizes[rank]]
        router = torch.from_numpy(make.uniform(0.1, 1.0, (world, BUDGET, m.TOP_K)))[rank, : sizes[rank]]
        for number in new.experts:
            pairs = int(sizes.sum()) * m.TOP_K
            outs = []
            for each in (old.experts[number], new.experts[number]):
                each.prefetch(pairs, int(sizes.max()))
                outs.append(each.run(x, ids, router))
            assert outs[0].shape == outs[1].shape == x.shape
            assert int(new.experts[number].layer.load_E.sum()) == pairs, "what fills up the step is counted"
            apart = max(apart, float((outs[0] - outs[1]).abs().max()) if len(x) else 0.0)
    for each in layers_of(new):
        each.layer.check()
    assert apart <= 1e-11, apart
    assert looks.call_count == 3 * len(new.experts), "steps 1, 3 and 5 of six: every second one that has a past"
    return {"apart": apart}


@case
def across_a_swap() -> dict:
    """Other holders, another number of slots, in the middle; then back."""
    for kinds in (("contiguous", "replicas"), ("replicas", "contiguous")):
        served, begun = engine("olmoe", kinds[0]), []

        def change(now: Engine, kinds: Any = kinds, begun: Any = begun) -> None:
            if len(now.steps) in (2, 7) and not now.swapping:
                begun.append(1)
                now.swap(place(kinds[len(begun) % 2], "olmoe", seed=len(begun)))

        assert served.generate(m.prompts(), 12, before_step=change) == answers("olmoe", 12)
        assert len(begun) == len(served.swaps) == 2 and not any(swap.wrong for swap in served.swaps)
    return {}


@case
def too_little_room_is_one_error_on_all_ranks() -> dict:
    """No token is booked; with more room the same step goes on, to the plain model's tokens."""
    served = engine(fast=policy(capacity=RowCapacity(6, 1 << 20)))
    for prompt in m.prompts():
        served.submit(prompt, 8)
    said = None
    while served.busy:
        try:
            served.step()
        except CapacityError as error:
            assert said is None, "it has room for every routing now"
            said = str(error)
            before = [request.cached for request in served.book.requests.values()]
            with pytest.raises(CapacityError):
                served.step()
            assert [request.cached for request in served.book.requests.values()] == before
            served.give_room()
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, said)
    assert said is not None and told == [said] * len(told) and "room is for 6" in said, told
    assert [request.sampled for request in served.book.requests.values()] == answers("olmoe")
    return {"said": said}


@case
def no_word_to_the_host() -> dict:
    """What a layer does before attention and after the gate is what a CUDA graph allows, and always the same."""
    with mock.patch.object(
        code, "kernels_for", lambda like, table, price, most, margin: MirrorKernels(table, price, margin)
    ):
        served = engine("olmoe", "contiguous")
    layer, make, seen = layers_of(served)[0], np.random.default_rng(dist.get_rank()), []
    for step in range(4):
        x, router = (torch.from_numpy(make.standard_normal(shape)) for shape in ((5, 32), (5, m.TOP_K)))
        ids = torch.from_numpy(make.integers(0, m.EXPERTS, (5, m.TOP_K)))
        with GraphRules() as rules, torch.no_grad():
            layer.prefetch(5 * m.TOP_K * dist.get_world_size(), 5)
            layer.run(x, ids, router)
        if step:  # there is nothing to prepare for before the first
            seen.append(rules.seen)
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) > 100
    return {"operations": len(seen[0])}


@case
def what_is_refused() -> dict:
    for options in ({"traffic": "home_device_dedup"}, {"split": "near"}, {"clock": mock.Mock()}):
        with pytest.raises(OptionError, match="without the host"):
            engine(**options)
    with pytest.raises(OptionError, match="a look every 0 steps"):
        policy(every=0)
    twice = np.zeros((2, m.EXPERTS, 2), np.int64)
    twice[:, :, 0] = 1
    twice[0, 0, 0] = 2
    with pytest.raises(PlacementError, match="lies 2 times on device 0"):
        Engine(copy.deepcopy(plain("olmoe")), Placement.from_counts(twice), machine(), fast=policy())
    served = engine(fast=replace(policy(), prior_LE=np.arange(2.0 * m.EXPERTS).reshape(2, -1)))
    assert served.generate(m.prompts(), 8) == answers("olmoe")
    table = LayerSlots.in_order([[3, 0], [1], [2, 3]], 4, 1, np.zeros(3))
    assert table.expert_DS.tolist() == [[3, 0, -1], [1, -1, -1], [2, 3, -1]]
    assert table.turn_DS.tolist() == [[0, 0, -1], [0, -1, -2], [0, 1, -1]]
    return {}


if __name__ == "__main__":
    run_cases(CASES, read_options())
