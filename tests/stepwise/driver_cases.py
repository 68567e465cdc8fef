"""One trace through everything that runs a step-wise policy: the plans are the same, whoever asks for them.

torchrun --standalone --nproc-per-node 2 tests/stepwise/driver_cases.py --out results.jsonl [case ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.helpers import token_batch
from tests.train import harness as h
from tests.train.matrix import machine

from poise.cost.weights import StepPrice, fetch_seconds, step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.replay.serving import FastLoop, replay_steps
from poise.replay.training import SourceLoads, replay_training
from poise.routing.batch import RoutingBatch
from poise.runtime.dispatch import all_counts
from poise.serve import split
from poise.simulate.serving import served_work
from poise.stepwise.driver import LayerDriver, Outcome
from poise.stepwise.methods.split import even_quota
from poise.stepwise.protocol import Fetch, LayerView, StepPlan, StepPolicy
from poise.stepwise.registry import parse_policy
from poise.stepwise.sharding import Heterogeneous, ShardingPolicy, even_sharding, owned_ED
from poise.train import fully_shard_experts

WORLD, STEPS, LAYERS, TOKENS, TOP_K, SLOTS = 2, 12, 2, 24, 2, 2
PAIRS = WORLD * TOKENS * TOP_K
TRAINED = ("poise", "hecate", "hecate-calibrated", "smart-moe:interval=1,threshold=0.0", "flex-moe:trigger=1.0", "lplb")

Plans = dict[tuple[int, int], Outcome]
"""What was decided in each step and layer."""


@dataclass(frozen=True)
class OneByOne(StepPolicy):
    """Brings one replica after the other in the background, and drops them all when the slots are full."""

    name: ClassVar[str] = "one-by-one"
    summary: ClassVar[str] = ""
    exact: ClassVar[bool] = True
    keeps: ClassVar[bool] = True

    def before_gate(self, view: LayerView) -> np.ndarray:
        full = (view.before_ED | view.coming_ED).sum(axis=0) >= view.slots_D
        return view.static_ED if full.all() and not view.coming_ED.any() else view.before_ED

    def in_background(self, view: LayerView, holders_ED: np.ndarray) -> Fetch | None:
        coming = np.zeros_like(holders_ED)
        lacking = ~holders_ED & (holders_ED.sum(axis=0) < view.slots_D)
        coming[tuple(np.argwhere(lacking)[view.step % lacking.sum()])] = True
        return Fetch(coming, np.zeros_like(coming))

    def after_gate(self, view: LayerView, holders_ED: np.ndarray, load_SE: np.ndarray) -> StepPlan:
        return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), holders_ED))


SERVED: tuple[StepPolicy, ...] = (*map(parse_policy, ("poise", "poise:objective=tokens", "hecate:overlap=2", "lplb", "smart-moe:interval=2,threshold=0.0")),
                                  OneByOne())  # fmt: skip


def trace() -> RoutingBatch:
    """Skewed tokens whose favourites change half-way; the first half of every step lives on the first rank."""
    rng = np.random.default_rng(3)
    favour = np.repeat(2.0 * rng.random((2, LAYERS, h.EXPERTS)), STEPS * WORLD * TOKENS // 2, axis=0)
    ids_TLK = np.argsort(-(rng.gumbel(size=favour.shape) + favour), axis=2)[:, :, :TOP_K]
    home_T = np.tile(np.repeat(np.arange(WORLD), TOKENS), STEPS)
    return token_batch(ids_TLK, [WORLD * TOKENS] * STEPS, h.EXPERTS, home_T=home_T)


def mine(batch: RoutingBatch, step: int) -> torch.Tensor:
    """This rank's choices, int64 [T, L, K]."""
    first = (step * WORLD + dist.get_rank()) * TOKENS
    return torch.from_numpy(batch.experts_TLK[first : first + TOKENS].astype(np.int64))


@contextmanager
def recorded() -> Iterator[Plans]:
    """Every outcome of every driver meanwhile."""
    plans, finish = Plans(), LayerDriver.finish

    def note(driver: LayerDriver, view: LayerView, *rest: Any, **options: Any) -> Outcome:
        done = plans[view.step, view.layer] = finish(driver, view, *rest, **options)
        return done

    LayerDriver.finish = note
    try:
        yield plans
    finally:
        LayerDriver.finish = finish


def same(a: Plans, b: Plans) -> None:
    """All that was known and decided, to the last bit."""
    assert a.keys() == b.keys() and len(a) == STEPS * LAYERS, (len(a), len(b))
    for at, one in a.items():
        other = b[at]
        for name in ("static_ED", "before_ED", "predicted_E", "recent_HE", "coming_ED"):
            assert np.array_equal(getattr(one.view, name), getattr(other.view, name)), (at, name)
        for name in ("early_ED", "started_ED", "landed_ED"):
            x, y = getattr(one, name), getattr(other, name)
            assert (x is None) == (y is None) and (x is None or np.array_equal(x, y)), (at, name)
        assert np.array_equal(one.plan.holders_ED, other.plan.holders_ED), at
        assert np.array_equal(one.plan.quota_ED, other.plan.quota_ED), at
        assert one.plan.passive == other.plan.passive and one.control_s == other.control_s, at
        assert one.view.price == other.view.price, (at, one.view.price, other.view.price)


def moved(plans: Plans) -> int:
    """Replicas whose fetch began; those that were kept count once."""
    return sum(done.fetched for done in plans.values())


# ---- serving -----------------------------------------------------------------------------------------------------


class NoReplicas:
    """Nobody fetches here: plans alone are looked at."""

    def fetch(self, fetched_ED: np.ndarray, kept_ED: np.ndarray) -> None: ...

    def start(self, coming_ED: np.ndarray, kept_ED: np.ndarray) -> None: ...

    def land(self) -> None: ...


def window_of(cluster: Cluster, model: ModelSpec) -> float:
    """A fetch takes two windows and a half."""
    price = step_price(1.0, h.EXPERTS, cluster, model, window_s=1.0)
    one_ED = owned_ED(even_sharding(1, h.EXPERTS, WORLD)[0], WORLD)
    return fetch_seconds(one_ED, np.eye(h.EXPERTS, WORLD, -1, dtype=bool) & ~one_ED, price) / 2.5


def on_ranks(policy: StepPolicy, batch: RoutingBatch, price: StepPrice, count_ED: np.ndarray) -> None:
    """As :mod:`poise.serve` runs it, but for experts."""
    flow: Any = SimpleNamespace(rank=dist.get_rank(), group=dist.group.WORLD, extra_DX=None)
    loop = split.ServingPolicy(policy, price, step_slots=SLOTS)
    layers = [
        split.PlannedSplit(loop, layer, count_ED, split.EvenSplit(count_ED, flow.rank), flow, NoReplicas())
        for layer in range(LAYERS)
    ]
    for step in range(STEPS):
        ids_TLK = mine(batch, step)
        for layer, one in enumerate(layers):
            one.prefetch(PAIRS)
            one.devices(ids_TLK[:, layer])
            flow.extra_DX = torch.from_numpy(all_counts(ids_TLK[:, layer], h.EXPERTS, flow.group))
            one.finish()


def serving() -> dict[str, int]:
    """The replay, the simulation and the ranks."""
    batch, cluster = trace(), machine(WORLD)
    model = ModelSpec.generic(h.EXPERTS, TOP_K, batch.layer_ids_L)
    window_s = window_of(cluster, model)
    price = step_price(WORLD * TOKENS, h.EXPERTS, cluster, model, window_s=window_s, control_s=0.0)
    count_ED = owned_ED(even_sharding(1, h.EXPERTS, WORLD)[0], WORLD).astype(np.int32)
    placement = Placement.from_counts(np.stack([count_ED] * LAYERS), layer_ids_L=batch.layer_ids_L)
    out = {}
    for policy in SERVED:
        loop = FastLoop(policy, SLOTS, window_s=window_s, control_s=0.0)
        with recorded() as replayed:
            replay_steps(batch, placement, loop, cluster, model, traffic="home", warm_up=0)
        with recorded() as simulated:
            served_work(batch, placement, cluster, model, traffic="home", loop=loop)
        with recorded() as ran:
            on_ranks(policy, batch, price, count_ED)
        same(replayed, simulated)
        same(replayed, ran)
        out[policy.name] = moved(replayed)
        assert moved(replayed) > 0, policy
    assert any(done.landed_ED is not None for done in replayed.values())
    return out


# ---- training ----------------------------------------------------------------------------------------------------


def trained(
    policy: str, batch: RoutingBatch, *, sharding: ShardingPolicy | None = None, cluster: Cluster | None = None,
    window_s: float | None = 1e-7,
) -> tuple[StepPrice, Plans]:  # fmt: skip
    """A run on the ranks, with a window that is given or for ever modelled: the price of its steps, and its plans."""
    model = h.build(layers=LAYERS)
    run = fully_shard_experts(model, mesh=h.MESH(WORLD), policy=policy, step_slots=SLOTS, sharding=sharding,
                              cluster=cluster or machine(WORLD), window_s=window_s)  # fmt: skip
    run.schedule.forward.clock.median = lambda: None  # nothing is measured
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with recorded() as plans:
        for step in range(STEPS):
            model.zero_grad()
            ids_TLK = mine(batch, step)
            x = torch.ones(TOKENS, h.WIDTH, dtype=torch.float64)
            model(x, [ids_TLK[:, layer] for layer in range(LAYERS)]).sum().backward()
            optimizer.step()
            if step % 3 == 1:
                evaluated(model, x, ids_TLK, plans)
    return run.schedule.planner.price(PAIRS), plans


def evaluated(model: torch.nn.Module, x: torch.Tensor, ids_TLK: torch.Tensor, plans: Plans) -> None:
    """A pass between two steps that leaves no trace in those to come."""
    before = dict(plans)
    with torch.no_grad():
        model(x, [ids_TLK[:, 0].flip(1)] * LAYERS)
    plans.clear()
    plans.update(before)


def training(policy: str) -> dict[str, int]:
    """The replay and the ranks."""
    batch = trace()
    price, ran = trained(policy, batch)
    with recorded() as replayed:
        loop = FastLoop(parse_policy(policy), SLOTS, window_s=price.window_s)
        replay_training(SourceLoads.of_batch(batch, WORLD), loop, price, warm_up=0)
    same(replayed, ran)
    assert moved(replayed) > 0
    return {policy: moved(replayed)}


def first_pass() -> dict[str, int]:
    """A modelled window, in which more experts fit than in the first pass, where neither pairs nor K are known."""
    batch, out = trace(), {}
    for policy, wire in (("poise", 1e12), ("hecate", 2e6)):
        cluster = replace(machine(WORLD), inter_bytes_per_s=wire)
        price, ran = trained(policy, batch, cluster=cluster, window_s=None)
        with recorded() as replayed:
            replay_training(SourceLoads.of_batch(batch, WORLD), FastLoop(parse_policy(policy), SLOTS), price, warm_up=0)
        same(replayed, ran)
        early = [sum((ran[step, layer].early_ED & ~ran[step, layer].view.before_ED).sum() for layer in range(LAYERS))
                 for step in range(STEPS)]  # fmt: skip
        assert early[0] < max(early), (policy, early)
        out[policy] = moved(replayed)
    return out


def resharding() -> dict[str, int]:
    """Owners that move twice: their last plan looks further back than the policy's prediction."""
    batch, sharding = trace(), Heterogeneous(interval=4, overlap=1)
    price, ran = trained("hecate", batch, sharding=sharding)
    with recorded() as replayed:
        loop = FastLoop(parse_policy("hecate"), SLOTS, window_s=price.window_s)
        got = replay_training(SourceLoads.of_batch(batch, WORLD), loop, price, sharding=sharding, first_reshard=4,
                              warm_up=0)  # fmt: skip
    same(replayed, ran)
    assert got.moved_owners > 0
    return {"moved owners": got.moved_owners}


CASES: dict[str, Callable[[], Any]] = {
    "serving": serving,
    "first pass": first_pass,
    "resharding": resharding,
    **{f"training {spec}": partial(training, spec) for spec in TRAINED},
}

if __name__ == "__main__":
    run_cases(CASES, read_options())
