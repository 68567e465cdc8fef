"""Cases about placements that change amid a run: swaps and fast loops."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, replace
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from tests.helpers import few_or
from tests.serve import models as m
from tests.serve.harness import answers, banks, case, engine, place, plain, tiny_price

from poise.cost.traffic import DATA_FLOWS
from poise.planning.placement import Placement
from poise.serve import Engine, ServingPolicy
from poise.serve.swap import Swap
from poise.stepwise.methods.split import even_quota
from poise.stepwise.poise.near import PoiseNear
from poise.stepwise.protocol import Fetch, LayerView, StepPlan, StepPolicy
from poise.stepwise.registry import parse_policy
from poise.util.errors import CommunicationError


@case
def greedy_across_a_swap() -> dict:
    """Every flow: prompts of 1 to 23 tokens in chunks of 6, another placement in the middle, few bytes a step."""
    out = {}
    ways = (("contiguous", "replicas"), ("replicas", "uneven"), ("uneven", "contiguous"))
    for family in ("olmoe", "deepseek_v3"):
        for number, traffic in list(enumerate(DATA_FLOWS))[:: few_or(1, 2) if family == "deepseek_v3" else 1]:
            one = (ways[(number + (family == "olmoe")) % 3],)
            for before, after in few_or(ways, one) if family == "olmoe" else one:
                served = engine(family, before, traffic=traffic, budget=6)
                target = place(after, family, seed=3)

                def swap(running: Engine, target: Placement = target) -> None:
                    if len(running.steps) == 3:
                        running.swap(target, bytes_per_step=2**15)

                got = served.generate(m.prompts(), 8, before_step=swap)
                assert got == answers(family), (family, traffic, before)
                record = served.swaps[0]
                assert len(served.swaps) == 1 and not served.swapping
                assert (served.placement.count_LED() == target.count_LED()).all()
                steps = list(served.steps)
                assert 3 < 3 + record.steps < len(steps), "the switch came amid the run"
                assert [step.swapping for step in steps[3 : 3 + record.steps]] == [True] * record.steps
                assert all(step.stall_s == 0 for step in steps if not step.swapping)
                held = [served.placement.experts_of(row, served.rank) for row in range(target.num_layers)]
                for mine, bank, layer in zip(held, banks(served), m.moe_layers(plain(family)), strict=True):
                    for name, weight in bank.items():
                        full = getattr(m.block_of(plain(family), layer).experts, name)
                        assert torch.equal(weight, full[mine])
                out[f"{family} {traffic} {before}"] = [record.rounds, record.steps, record.fetched]
    assert max(rounds for rounds, *_ in out.values()) > 3
    return out


@case
def fast_loops() -> dict:
    """Step replicas planned every step, by policies that keep replicas and that do not, across a swap."""
    price, out = tiny_price(), {}
    for number, policy in enumerate(("poise", "hecate", "smart-moe:interval=1,threshold=0.0")):
        for traffic in DATA_FLOWS[number % few_or(2, 3) :: few_or(2, 3)]:
            fast = ServingPolicy(parse_policy(policy), price, step_slots=2)
            served = engine("olmoe", "contiguous", traffic=traffic, fast=fast)

            def swap(running: Engine) -> None:
                if len(running.steps) == 2:
                    running.swap(place("replicas", seed=3), bytes_per_step=2**15)

            assert served.generate(m.prompts(), 12, before_step=swap) == answers("olmoe", new=12), (policy, traffic)
            assert len(served.swaps) == 1
            out[f"{policy} {traffic}"] = len(served.steps)
    return out


@case
def shares_planned_without_counts() -> dict:
    """``poise-near``: tokens go by shares that every rank plans alike, and replicas come at once and in the background."""
    seen = {"planned": 0, "even": 0, "in the background": 0, "at once": 0}
    for number, traffic in list(enumerate(DATA_FLOWS))[:: few_or(1, 3)]:
        policy = PoiseNear(margin=0.0, refresh=2)
        price = tiny_price(fetches=1.5)
        uneven = replace(price.cluster, speed_D=np.array([0.2, 1.0, 1.0, 2.0]))  # so few tokens show no hot expert
        price = replace(price, cluster=uneven)
        if number % 2:  # weights so large that none is worth waiting for
            size = 1e12 / (price.model.expert_parameters * 0.5)
            cluster = replace(uneven, memory_bytes_per_s=1e18)
            price = replace(price, cluster=cluster, model=replace(price.model, weight_bytes=size), window_s=1.0)
        served = engine("olmoe", "contiguous", traffic=traffic, fast=ServingPolicy(policy, price, step_slots=2))

        def note(running: Engine) -> None:
            for layer in running.experts.values():
                done = layer.split.outcome
                if done is not None:
                    seen["planned" if done.plan.rows_SED is not None else "even"] += int(done.plan.passive)
                    seen["in the background"] += int(done.started_ED is not None)
                    seen["at once"] += int((done.early_ED & ~done.view.before_ED).sum())

        assert served.generate(m.prompts(), 12, before_step=note) == answers("olmoe", new=12), traffic
    assert seen["planned"] and seen["in the background"] and seen["at once"], seen
    return seen


@dataclass(frozen=True)
class OneByOne(StepPolicy):
    """Brings one replica after the other in the background."""

    name: ClassVar[str] = "one-by-one"
    summary: ClassVar[str] = ""
    keeps: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def before_gate(self, view: LayerView) -> np.ndarray:
        return view.before_ED

    def in_background(self, view: LayerView, holders_ED: np.ndarray) -> Fetch | None:
        coming = np.zeros_like(holders_ED)
        lacking = ~holders_ED & (holders_ED.sum(axis=0) < view.slots_D)
        if lacking.any():
            coming[tuple(np.argwhere(lacking)[view.step % lacking.sum()])] = True
        return Fetch(coming, np.zeros_like(coming)) if coming.any() else None

    def after_gate(self, view: LayerView, holders_ED: np.ndarray, load_SE: np.ndarray) -> StepPlan:
        return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), holders_ED))


@case
def replicas_in_the_background() -> dict:
    """A swap comes while a fast loop's own replicas are on their way: those are taken in first, then forgotten."""
    price, landed = tiny_price(fetches=3.5), 0
    for number, traffic in list(enumerate(DATA_FLOWS))[:: few_or(1, 3)]:
        for at in few_or((3, 4), (3 + number % 2,)):
            served = engine("olmoe", "contiguous", traffic=traffic, fast=ServingPolicy(OneByOne(), price, step_slots=2))

            def swap(running: Engine, at: int = at) -> None:
                if len(running.steps) == at:
                    running.swap(place("replicas", seed=3))

            assert served.generate(m.prompts(), 12, before_step=swap) == answers("olmoe", new=12), traffic
            for layer in served.experts.values():
                landed += int(layer.split._driver.held_ED.sum() > layer.placement.count_LED()[layer.index].sum())
    assert landed > 0
    return {"layers that kept replicas": landed}


@case
def swap_memory_and_bytes() -> dict:
    """Staged bytes: what came, and at most one layer made anew; a switch among equal counts makes nothing anew."""
    served = engine("olmoe", "contiguous")
    shifted = np.roll(served.placement.count_LED(), 1, axis=2)
    before = [{name: weight.data_ptr() for name, weight in bank.items()} for bank in banks(served)]
    served.swap(Placement.from_counts(shifted, method="shifted"), bytes_per_step=1)
    while served.swapping:
        served.step()  # without tokens
    record = served.swaps[0]
    one = sum(weight[0].nbytes for weight in banks(served)[0].values())
    assert record.fetched == 4 and record.bytes_fetched == 4 * one == record.bytes_staged
    assert record.rounds == 4, "a rank's four experts come one by one, all ranks at once"
    after = [{name: weight.data_ptr() for name, weight in bank.items()} for bank in banks(served)]
    assert before == after
    assert served.generate(m.prompts(), 8) == answers("olmoe")
    old, there, inner = [weakref.ref(next(iter(bank.values()))) for bank in banks(served)], [], Swap._layer

    def count(swap: Swap, layer: int) -> dict:
        there.append(sum(each() is not None for each in old))
        return inner(swap, layer)

    count_LED = served.placement.count_LED()
    served.swap(Placement.from_counts(count_LED + np.roll(count_LED, 1, axis=2), method="doubled"))
    with mock.patch.object(Swap, "_layer", count):
        while served.swapping:
            served.step()
    assert there == [2, 1], "the first layer's old stack is gone when the second's is made anew"
    return {"bytes": record.bytes_staged, "stall_s": record.stall_s, "worst_s": record.worst_s}


def damage(kind: str, arrived: dict, old: dict) -> None:
    """What a faulty transfer may leave in the first copy that came."""
    (layer, expert), weights = next(iter(arrived.items()))
    first = next(iter(weights.values()))
    if kind == "another expert":
        other = next(rows for (where, who), rows in old.items() if (where, who) != (layer, expert))
        for name, weight in weights.items():
            weight.copy_(other[name])
    elif kind == "half a tensor":
        first.view(-1)[: first.numel() // 2] = 0
    elif kind == "a stale one":
        for name, weight in weights.items():
            weight.copy_(old[layer, expert][name])
    elif kind == "two elements changed places":
        flat = first.view(-1)
        flat[:2] = flat[:2].flip(0).clone()
    else:
        first.view(-1)[-1] = -first.view(-1)[-1]


@case
def wrong_copies_serve_no_token() -> dict:
    """Whatever is wrong with one copy on one rank, all keep the old placement and its tokens, say so, and can try again.

    Weights are scaled before, so that there is an old version. Fails if a copy is taken unseen.
    """
    out, new = {}, few_or(8, 4)
    for number, kind in enumerate(
        ("another expert", "half a tensor", "a stale one", "two elements changed places", "a bit")
    ):
        served = engine("olmoe", "contiguous", traffic=DATA_FLOWS[number % len(DATA_FLOWS)])
        full = [m.block_of(plain("olmoe"), layer).experts for layer in m.moe_layers(plain("olmoe"))]
        old = {(row, expert): {name: getattr(experts, name)[expert].detach().clone() for name in banks(served)[row]}
               for row, experts in enumerate(full) for expert in range(m.EXPERTS)}  # fmt: skip
        for bank in banks(served):
            for weight in bank.values():
                weight.mul_(1.5)
        served.remember_weights()
        want = served.generate(m.prompts(), new)
        before = served.placement
        shifted = Placement.from_counts(np.roll(before.count_LED(), 1, axis=2), method="shifted")

        spoil = served.rank == number % served.ranks

        def swap(
            running: Engine, kind: str = kind, shifted: Placement = shifted, old: dict = old, spoil: bool = spoil
        ) -> None:
            moving = running._swap
            if spoil and moving is not None and moving._batch is not None:
                inner, arrived = moving._batch.wait, {place: moving.arrived[place] for place in moving._unseen}
                moving._batch.wait = lambda: (inner(), damage(kind, arrived, old))
            if not running.swaps and not running.swapping:
                running.swap(shifted, bytes_per_step=1)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert served.generate(m.prompts(), new, before_step=swap) == want, kind
        assert sum("given up" in str(one.message) for one in said) == 1, kind
        assert served.placement is before and not served.swapping and served.swaps[0].wrong is not None
        served.swap(shifted)
        assert served.generate(m.prompts(), new) == want and served.swaps[1].wrong is None
        assert (served.placement.count_LED() == shifted.count_LED()).all()
        out[kind] = list(served.swaps[0].wrong)
    return out


@case
def replicas_that_differ_are_refused() -> dict:
    """Weights changed on one rank alone: every rank learns it. The same on all holders: all right."""
    served = engine("olmoe", "replicas")
    expert = int(np.flatnonzero(served.placement.count_LED()[0].sum(axis=1) > 1)[0])
    holders = np.flatnonzero(served.placement.count_LED()[0, expert]).tolist()
    assert len(holders) > 1, "the case needs a replica"
    for rank in holders:
        if served.rank == rank:
            row = served.placement.experts_of(0, rank).index(expert)
            next(iter(banks(served)[0].values()))[row].view(-1)[3] += 0.5
        if rank == holders[-1]:
            served.remember_weights()
        else:
            with pytest.raises(CommunicationError, match=f"expert {expert} of MoE layer 0"):
                served.remember_weights()
    return {"holders": holders}


@case
def swap_twice_in_one_run() -> dict:
    served = engine("olmoe", "contiguous", traffic="stay")
    targets = [place("replicas", seed=5), place("uneven", seed=6), place("contiguous")]

    def swap(running: Engine) -> None:
        if targets and not running.swapping and len(running.steps) > 1:
            running.swap(targets.pop(0))

    assert served.generate(m.prompts(), 8, before_step=swap) == answers("olmoe")
    assert len(served.swaps) == 3
    return {"stalls": [record.stall_s for record in served.swaps]}
