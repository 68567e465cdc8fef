"""Cases about tokens that go to a device once: rows that are sent, and what else a layer must still do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.ranks import everywhere
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_accumulation import accumulation_within_bytes
from tests.train.support_models import case
from tests.train.support_plans import force_balance
from tests.train.support_recompute import checkpoint_retained
from tests.train.support_routing import experts_that_fail_on_one_rank, some_pairs_without_an_expert
from tests.train.support_runs import EXACT, apart, shard
from tests.train.support_steps import checkpoint_router_flips

from poise.train import forward, plans
from poise.util.errors import OptionError


@contextmanager
def by_copies() -> Iterator[list[Any]]:
    """Every layer of every run sends a token to a device once; the exchanges that are made."""
    before, asked, made = forward.once, plans.RunPlanner.travels_once, []
    forward.once = lambda *given: made.append(before(*given)) or made[-1]
    plans.RunPlanner.travels_once = lambda *_, **__: True
    try:
        yield made
    finally:
        forward.once, plans.RunPlanner.travels_once = before, asked


@case
def a_token_goes_to_a_device_once() -> dict:
    """Copies are the distinct (token, owner) of a layer, for one to all experts a token; gradients as dense, the
    routers' too where nothing else is trained."""
    world, rank, saved, errors = dist.get_world_size(), dist.get_rank(), {}, {}
    for top_k in (1, 2, 8):
        for frozen in (False, True):
            data = [h.batch("ragged", 1, world, top_k, which, torch.float64) for which in (None, rank)]
            dense, model = h.build(), h.build()
            for one in (dense, model):
                for name, weight in one.named_parameters():
                    weight.requires_grad_(not frozen or "gate." in name)
            run = shard(model, policy="expert-parallelism")
            run.set_gradient_divide_factor(1.0)
            with by_copies() as made:
                h.loss_of(model, data[1]).backward()
            h.loss_of(dense, data[0]).backward()
            errors[f"top-{top_k}, frozen {frozen}"] = apart(model, run, dense)
            rows = pairs = 0
            for layer, way in enumerate(made):
                owner_TK = torch.from_numpy(run.owners[layer])[data[1].ids[layer]]
                goes_TD = torch.zeros(len(owner_TK), world, dtype=torch.bool).scatter_(1, owner_TK, True)
                came = [sent[rank] for sent in everywhere(way.sent_D)]
                assert c.agreed(float(way.sent_D != goes_TD.sum(dim=0).tolist() or way.got_D != came)) == 0
                rows, pairs = rows + sum(way.sent_D), pairs + sum(way.pairs.sent_D)
            saved[top_k] = sum(everywhere(pairs)) - sum(everywhere(rows))
            assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    assert saved[1] == 0 < saved[2] < saved[8], saved
    return {"errors": errors, "rows saved": saved}


def decided_by_the_size_of_a_pass(planner: Any, top_k: int) -> None:
    """A pass without tokens decides nothing, a small one not for large ones, a pass that is not trained for none."""
    world, before = dist.get_world_size(), dict(planner._once)
    even = np.ones((world, h.EXPERTS, world), np.int64)
    assert not planner.travels_once(0, 0 * even, keep=True) and planner._once == before
    large = planner.travels_once(0, even * 2**20, keep=False)
    assert large == (top_k == 8) and planner._once == before
    one = 0 * even
    one[0, 0, -1] = 1
    assert not planner.travels_once(0, one, keep=True) and planner._once == {**before, (0, 0): False}
    assert planner.travels_once(0, even * 2**20, keep=True) == large and len(planner._once) == len(before) + 2


@case
def tokens_travel_as_they_are_told_to() -> dict:
    """``auto`` sends copies where the price says so, on all ranks alike: eight experts of a token, and never one; what
    is decided in a training pass holds for passes of its size until owners move."""
    world, found = dist.get_world_size(), {}
    for traffic, top_k in (("home", 8), ("home_device_dedup", 1), ("auto", 8), ("auto", 1)):
        data = h.batch("even", 0, world, top_k, dist.get_rank(), torch.float64)
        model = h.build()
        run = shard(model, traffic=traffic, policy="expert-parallelism")
        before, made = forward.once, []
        forward.once = lambda *given, made=made, before=before: made.append(before(*given)) or made[-1]
        try:
            h.loss_of(model, data).backward()
        finally:
            forward.once = before
        found[f"{traffic}, top-{top_k}"] = len(made)
        planner = run.schedule.planner
        power = round(math.log2(h.TOKENS * world))
        kept = {(layer, power): top_k == 8 for layer in range(h.LAYERS)}
        assert planner._once == (kept if traffic == "auto" else {})
        if traffic == "auto":
            decided_by_the_size_of_a_pass(planner, top_k)
        run.reshard(run.owners[:, ::-1].copy())
        assert not planner._once
    layers = h.LAYERS
    assert list(found.values()) == [0, layers, layers, 0], found
    said = c.raised(OptionError, lambda: shard(h.build(), traffic="stay"))
    assert "stay" in said and "home_device_dedup" in str(said)
    return found


@case
def hard_cases_by_copies() -> dict:
    """Checkpoints and kept graphs, pairs without an expert, experts that fail on one rank."""
    out = {}
    for one in (checkpoint_retained, some_pairs_without_an_expert, experts_that_fail_on_one_rank):
        with by_copies() as made:
            out[one.__name__] = one()
        assert made
    return out


@case
def options_by_copies() -> dict:
    """Accumulation within bytes, an even choice in place of the router's, experts that are swapped where a layer is
    computed again; a pass that is only evaluated, which decides and leaves nothing."""
    out = {}
    for one in (accumulation_within_bytes, force_balance, checkpoint_router_flips):
        with by_copies() as made:
            out[one.__name__] = one()
        assert made
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    whole, part = (h.batch("ragged", 1, world, 3, which, torch.float64) for which in (None, rank))
    counts = h.tokens_of("ragged", 1, world)
    expected = h.build()(whole.x, whole.ids).detach()[sum(counts[:rank]) :][: counts[rank]]
    model = h.build()
    run = shard(model)
    for mode, train in ((torch.no_grad, True), (torch.no_grad, False), (torch.inference_mode, False)):
        model.train(train)
        with by_copies() as made, mode():
            got = model(part.x, part.ids)
        errors[f"{mode.__name__}, training {train}"] = c.agreed(
            float((got - expected).abs().max()) if len(got) else 0.0
        )
        assert len(made) == h.LAYERS and not run.schedule.planner.history.passes(0)
        assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    return {**out, "evaluated": errors}
