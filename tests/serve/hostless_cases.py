"""Serving without the host in any layer, on two processes, against the plain model and the present path.

torchrun --standalone --nproc-per-node 2 tests/serve/hostless_cases.py --out results.jsonl [case ...]
"""

from __future__ import annotations

import copy
import sys
import warnings
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
from poise.planning.solve.repair import prepared
from poise.runtime.device.choose import OnHost
from poise.runtime.device.layer import DeviceLayer
from poise.runtime.device.padded import RowCapacity
from poise.serve import Engine, HostlessPolicy, ServingPolicy
from poise.serve import hostless as code
from poise.serve.hostless import HostlessLayer
from poise.serve.layer import ServedLayer
from poise.serve.recover import recover
from poise.stepwise.host_kernels import HostKernels
from poise.stepwise.kernels import LayerSlots
from poise.stepwise.registry import parse_policy
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
                each.fill_up(int(sizes.max()))
                each.prefetch(pairs)
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


def twice_on_a_device() -> Placement:
    """Expert 0 of the last layer lies twice on rank 0, and all others lie there once."""
    count_LED = np.zeros((2, m.EXPERTS, dist.get_world_size()), np.int64)
    count_LED[:, :, 0] = 1
    count_LED[1, 0, 0] = 2
    return Placement.from_counts(count_LED)


@case
def a_swap_that_cannot_be_changes_nothing() -> dict:
    """A placement that has no slot table is refused before it begins; one among as many slots, written over in place,
    fails once at its end, is tried again after the next step, and takes place. No token is wrong all the while.
    """
    served, calls, failed, whole = engine("olmoe", "contiguous"), [], 0, code.kernels_for
    before = served.placement
    shifted = Placement.from_counts(np.roll(before.count_LED(), 1, axis=2), method="shifted")

    def fails_once(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("none left for the second layer")
        return whole(*given, **options)

    requests = [served.submit(prompt, 12) for prompt in m.prompts()]
    with mock.patch.object(code, "kernels_for", fails_once):
        while served.busy:
            if len(served.steps) == 2 and not served.swapping:
                with pytest.raises(PlacementError, match="lies 2 times on device 0"):
                    served.swap(twice_on_a_device())
                assert not served.swapping
                served.swap(shifted)
            try:
                served.step()
            except MemoryError:
                failed += 1
                assert served.swapping and served.placement is before
    assert failed == 1 and len(served.swaps) == 1 and len(calls) == 4, (failed, len(calls))
    assert (served.placement.count_LED() == shifted.count_LED()).all()
    assert [request.sampled for request in requests] == answers("olmoe", 12)
    return {}


@case
def loads_known_before_are_of_any_scale() -> dict:
    """Replicas come before the first step, the same for shares as for counts."""
    share_LE, tables = np.full((2, m.EXPERTS), 0.3 / (m.EXPERTS - 1)), []
    share_LE[:, 3] = 0.7
    for scale in (1.0, 1e-9, 1e6):
        served = engine("olmoe", "contiguous", policy(prior_LE=scale * share_LE))
        served.submit(m.prompts()[1], 1)
        served.step()
        tables.append([each.layer.expert_DS.tolist() for each in layers_of(served)])
        assert all(replicas_of(each) for each in layers_of(served)), scale
    assert tables[0] == tables[1] == tables[2]
    return {}


@case
def the_host_in_a_gpus_place_is_told_once() -> dict:
    def on_host(like: Any, table: Any, price: Any, most: int, *, margin: float) -> OnHost:
        return OnHost(HostKernels(table, price, margin), "devices have two speeds", refused=True)

    with mock.patch.object(code, "kernels_for", on_host), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        served = engine("olmoe", "contiguous")
        served.swap(place("replicas", "olmoe"))
        while served.swapping:
            served.step()
    told = [str(each.message) for each in said if "devices have two speeds" in str(each.message)]
    assert len(told) == 1, told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine()  # a CPU that was asked for
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
            layer.fill_up(5)
            layer.prefetch(5 * m.TOP_K * dist.get_world_size())
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
    for options, said in (
        ({"every": 0}, "a look every 0 steps"), ({"sent": 0}, "send 0 experts"), ({"margin": np.nan}, "a margin of nan"),
        ({"margin": -0.1}, "a margin of -0.1"), ({"margin": 1.0}, "a margin of 1"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            policy(**options)
    with pytest.raises(PlacementError, match="lies 2 times on device 0"):
        Engine(copy.deepcopy(plain("olmoe")), twice_on_a_device(), machine(), fast=policy())
    negative = np.ones((2, m.EXPERTS))
    negative[1, 2] = -1
    for prior, said in (
        (np.ones((2, m.EXPERTS + 1)), r"\(2, 9\), the model has \[layers, experts\] \(2, 8\)"),
        (np.full((2, m.EXPERTS), np.nan), "prior loads of nan"), (negative, "prior loads of -1"),
    ):  # fmt: skip
        for fast in (policy(prior_LE=prior), policy(prior_LE=prior).elsewhere()):
            with pytest.raises(OptionError, match=said):
                engine(fast=fast)
    larger = replace(price(), cluster=Cluster.uniform(1, dist.get_world_size() + 1))
    for fast in (replace(policy(), price=larger), replace(policy(), price=larger).elsewhere()):
        with pytest.raises(OptionError, match="a price of 3 devices where 2 run"):
            engine(fast=fast)
    with pytest.raises(OptionError, match="no flow 'stay' by a HostlessLayer"):
        layers_of(engine())[0].move(*[torch.zeros(1, 1)] * 4, lambda x: x)
    table = LayerSlots.in_order([[3, 0], [1], [2, 3]], 4, 1, np.zeros(3))
    assert table.expert_DS.tolist() == [[3, 0, -1], [1, -1, -1], [2, 3, -1]]
    assert table.turn_DS.tolist() == [[0, 0, -1], [0, -1, -2], [0, 1, -1]]
    return {}


@case
def a_fast_loop_on_what_is_left() -> dict:
    """The second rank is given up amid the run: the first goes on alone, at the price of one device and with the room
    that was given last. The last case, as the ranks are not at one any more.
    """
    hostless, room = policy(capacity=RowCapacity(6, 1 << 20)), RowCapacity(BUDGET * m.TOP_K, 1 << 20)
    assert dist.get_world_size() == 2
    count_LED = np.ones((2, m.EXPERTS, 2), np.int64)
    for fast in (hostless, ServingPolicy(parse_policy("poise"), price(), step_slots=2)):
        served = Engine(copy.deepcopy(plain("olmoe")), Placement.from_counts(count_LED), machine(), fast=fast,
                        budget=BUDGET)  # fmt: skip
        losses = prepared(served.placement, "device", machine().node_D, np.ones((2, m.EXPERTS)), np.ones(2))
        requests = [served.submit(prompt, 8) for prompt in m.prompts()]
        served.give_room(room)
        for _ in range(4):
            served.step()
        if dist.get_rank():
            continue
        alone = recover(served, losses, mock.Mock(side_effect=AssertionError("every expert is here")), gone=[1])
        assert alone.ranks == 1 and alone.fast is not None and alone.fast.price.cluster.num_devices == 1
        if fast is hostless:
            assert alone.fast.capacity == room and all(each.layer.capacity == room for each in layers_of(alone))
        while alone.busy:
            alone.step()
        assert [request.sampled for request in requests] == answers("olmoe")
    return {}


if __name__ == "__main__":
    run_cases(CASES, read_options())
