"""Cases about what one rank alone cannot do, just when all are to send one another something: all raise, and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_routing import odd
from tests.train.support_runs import EXACT, mine, record_of_dense, shard
from torch import nn

from poise.runtime.collectives import exchanges
from poise.train import local_rows
from poise.train.rows import plainly
from poise.util.errors import ModelError, OptionError

PREFETCHES = (0, 1, 2)


def given(weight: Any, value: torch.Tensor) -> None:
    """Other numbers for a weight, as tools do that know no experts: past what would refuse them."""
    with plainly():
        weight.data = value


CHANGES: dict[str, Callable[[Any, str], Any]] = {
    "replaced": lambda experts, name: setattr(experts, name, nn.Parameter(torch.zeros(3, 12, 8).double())),
    "by nothing": lambda experts, name: experts._parameters.update({name: None}),
    "a shorter axis": lambda experts, name: given(
        getattr(experts, name), local_rows(getattr(experts, name))[..., :-1].clone()
    ),
    "fewer experts": lambda experts, name: given(getattr(experts, name), local_rows(getattr(experts, name))[1:].clone()),
    "whole numbers": lambda experts, name: setattr(
        experts, name, nn.Parameter(getattr(experts, name).data.long(), requires_grad=False)
    ),
}  # fmt: skip


@contextmanager
def changed(experts: Any, name: str, change: Callable[[Any, str], Any]) -> Iterator[None]:
    """On one rank alone, and put back."""
    weight, numbers = getattr(experts, name), local_rows(getattr(experts, name))
    if odd():
        change(experts, name)
    try:
        yield
    finally:
        experts._parameters[name] = weight
        given(weight, numbers)


def warmed(**options: Any) -> tuple[Any, Any]:
    """A model whose replicas are gathered before the gate: its policy has seen a step, which changed nothing."""
    model = h.build()
    run = shard(model, **options)
    h.loss_of(model, mine()).backward()
    model.zero_grad()
    return model, run


def goes_on(model: Any, run: Any) -> float:
    """Of a training after the error, against the dense one; nothing is left of what was gathered for nothing."""
    model.zero_grad()
    error = c.follow(model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), average=True)
    run.schedule.weights_changed()
    assert sum(run.schedule.ledger.now.values()) == 0, run.schedule.ledger.now
    return error


@case
def weights_that_one_rank_has_replaced() -> dict:
    """Before a pass, whose first gather begins before ranks meet, or between forward and backward; in the first layer or
    the last; packed on the wire, too. All raise, also where the gather is of weights that one rank has not.
    """
    said, errors, number = {}, {}, 0
    for name, change in CHANGES.items():
        for when in ("forward", "backward"):
            for options in ({}, {"rematerialise": True, "gather_dtype": torch.bfloat16}):
                number += 1
                for prefetch in few_or(PREFETCHES, (1,) if number % 3 else (number // 3 % 3,)):
                    model, run = warmed(policy="hecate", prefetch=prefetch, **options)
                    layer, weight = (0, "down_proj") if number % 2 else (h.LAYERS - 1, "gate_up_proj")
                    group = run.schedule.deployment.weights_group
                    before = exchanges(group)
                    loss = h.loss_of(model, mine()) if when == "backward" else None
                    experts, cell = model.blocks[layer].experts, f"{name}, {when}, prefetch {prefetch}, {[*options]}"
                    with changed(experts, weight, change):
                        step = loss.backward if loss is not None else partial(model, mine().x, mine().ids)
                        said[cell] = c.raised(ModelError, step).splitlines()[0]
                    assert "of sharded experts" in said[cell], said
                    assert exchanges(group) > before or not prefetch, cell
                    if "gather_dtype" not in options:  # else the weights are rounded
                        errors[cell] = goes_on(model, run)
                    else:
                        model.zero_grad()
                        h.loss_of(model, mine()).backward()
    assert max(errors.values()) <= EXACT, errors
    return {"said": said, "error": max(errors.values())}


@case
def weights_without_numbers_on_one_rank() -> dict:
    """The others were filled, and would wait for what it owns."""
    said, errors = {}, {}
    for prefetch in (0, 1):
        with torch.device("meta"):
            model = h.build()
        run = shard(model, policy="full-replication", prefetch=prefetch)
        model.to_empty(device="cpu")
        filled = h.build()
        for name, weight in model.named_parameters():
            if not odd() or "blocks.0.experts" not in name:
                value = h.local_rows(model, dict(filled.named_parameters()))[name]
                given(weight, value.detach().clone())
        said[prefetch] = c.raised(ModelError, lambda: model(mine().x, mine().ids))  # noqa: B023
        assert "has no numbers" in said[prefetch]
        model.load_state_dict(filled.state_dict())
        errors[prefetch] = goes_on(model, run)
    assert max(errors.values()) <= EXACT, errors
    return {"said": said[1].splitlines()[0], "error": max(errors.values())}


@case
def numbers_of_fewer_bits_on_one_rank() -> dict:
    """Are computed with as all are: rows of the same experts, and nothing to refuse."""
    model, _ = warmed(policy="hecate")
    experts = model.blocks[0].experts
    expected = model(mine().x, mine().ids).detach()
    with changed(experts, "down_proj", lambda e, name: given(e.down_proj, local_rows(e.down_proj).float())):
        loss = h.loss_of(model, mine())
        found = model(mine().x, mine().ids).detach()
        loss.backward()
    error = c.agreed(float((found - expected).abs().max()) if len(found) else 0.0)
    assert 0.0 < error < 1e-5, error
    return {"error": error}


@case
def a_gradient_hook_of_one_rank() -> dict:
    """On a gradient of more than one backward pass: said where ranks meet, before gradients leave."""
    model, run = warmed(policy="hecate")
    weight = model.blocks[-1].experts.down_proj
    handle = weight.register_hook(lambda grad: grad) if odd() else None
    h.loss_of(model, mine()).backward()
    said = c.raised(ModelError, lambda: h.loss_of(model, mine(1)).backward())
    assert "more than one backward pass" in said
    if handle is not None:
        handle.remove()
    error = goes_on(model, run)
    assert error <= EXACT, error
    return {"error": error, "said": said.splitlines()[0]}


@case
def owners_that_one_rank_cannot_move() -> dict:
    """Owners of another shape or none of the ranks, a weight that was replaced: no rank moves, and then all do."""
    model, run = warmed(policy="hecate")
    wanted, said = run.owners[:, ::-1].copy(), {}

    def bad(owners: Any) -> Any:
        return owners if odd() else wanted

    beyond = wanted + 100
    said["shape"] = c.raised(OptionError, lambda: run.reshard(bad(wanted[:1])))
    said["rank"] = c.raised(OptionError, lambda: run.reshard(bad(beyond)))
    said["no numbers"] = c.raised(OptionError, lambda: run.reshard(bad("even")))
    for name, change in CHANGES.items():
        with changed(model.blocks[1].experts, "down_proj", change):
            said[name] = c.raised(ModelError, lambda: run.reshard(wanted))
            assert "of sharded experts" in said[name], said
    assert (run.owners == wanted[:, ::-1]).all()
    run.reshard(wanted)
    assert (run.owners == wanted).all()
    error = goes_on(model, run)
    assert error <= EXACT, error
    return {"error": error, **{name: words.splitlines()[0] for name, words in said.items()}}


@case
def weights_replaced_where_gradients_wait() -> dict:
    """After a backward pass without a step, or one that is not synchronised: asked for before a pass begins."""
    said, errors = {}, {}
    for sync in (True, False):
        model, run = warmed(policy="hecate")
        run.set_requires_gradient_sync(sync)
        h.loss_of(model, mine()).backward()
        run.set_requires_gradient_sync(True)
        for name, change in few_or(
            CHANGES, {"replaced": CHANGES["replaced"], "by nothing": CHANGES["by nothing"]}
        ).items():
            with changed(model.blocks[0].experts, "down_proj", change):
                said[f"{sync}, {name}"] = c.raised(ModelError, lambda: model(mine().x, mine().ids))  # noqa: B023
        errors[sync] = goes_on(model, run)
    assert max(errors.values()) <= EXACT, errors
    return {"said": said, "error": max(errors.values())}


@case
def experts_that_fail_before_a_gather() -> dict:
    """One rank's experts raise in a layer after which all gather for the next one: it takes part, and raises then."""
    model, run = warmed(policy="hecate")
    group, kind = run.schedule.deployment.weights_group, model.blocks[0].experts.kind
    before = exchanges(group)
    fail = odd()
    step = run.schedule.forward
    real = type(kind).run_counted

    def run_counted(self: Any, *args: Any, **named: Any) -> Any:
        if fail:
            raise FloatingPointError("experts")
        return real(self, *args, **named)

    began: list[int] = []
    type(kind).run_counted = run_counted
    try:
        data = mine()
        x = data.x
        try:
            assert len(model.blocks[0](x, data.ids[0])) == len(x) and not odd()
        except FloatingPointError:
            assert odd()
        began.append(exchanges(group) - before)
    finally:
        type(kind).run_counted = real
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, began)
    assert len({str(one) for one in everyone}) == 1 and began[0] > 0, everyone
    step.drop_early()  # waits for what comes
    error = goes_on(model, run)
    assert error <= EXACT, error
    return {"error": error, "begun": np.asarray(everyone).tolist()}
