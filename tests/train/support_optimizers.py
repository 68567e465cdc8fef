"""Cases about optimizers and scalers of PyTorch: states that move with owners, norms, hooks, groups."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_runs import (
    EXACT,
    STEPS,
    dense_run,
    error_of,
    everyone,
    fsdp,
    mine,
    pair,
    shard,
    some_owners,
    train,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim.optimizer import register_optimizer_step_post_hook

from poise.stepwise.sharding import Heterogeneous
from poise.train import full_state_dict, parameter_groups
from poise.util.errors import OptionError


@case
def optimizers_move() -> dict:
    """States of every optimizer of PyTorch that works element by element go with their experts."""
    world, errors = dist.get_world_size(), {}
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
        "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
        "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
        "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001, centered=True, momentum=0.5),
        "Rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
        "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    }
    for name in few_or(list(makers), ["SGD with momentum", "Adam, amsgrad", "ASGD"]):
        make = makers[name]
        dense, model = h.build(), h.build()
        run = shard(model, owners=some_owners(9), policy="expert-parallelism")
        opts = [make(dense.parameters()), make(model.parameters())]
        run.attach(opts[1])
        for step in range(2):
            for opt in opts:
                opt.zero_grad()
            h.loss_of(dense, h.batch("hot-expert-a-rank", step, world, 2, None, torch.float64)).backward()
            c.plain_loss("hot-expert-a-rank")(model, step).backward()
            c.average_dense(model, run)
            for weight in dense.parameters():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            for opt in opts:
                opt.step()
            if step == 0:
                assert c.agreed(float(run.reshard(some_owners(10)))) > 0
        wanted = {key: weight.detach() for key, weight in dense.named_parameters()}
        errors[name] = c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, wanted)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def optimizers_that_cannot_move() -> dict:
    """States without a row an expert: an error on all ranks, of those where they look as if they had one too."""
    world, said = dist.get_world_size(), {}
    owners = np.arange(h.EXPERTS) % (world - 1)
    owners[0] = world - 1  # one expert alone: [1, ...] looks like a row
    before = np.stack([owners] * h.LAYERS)
    model = h.build("list")
    run = shard(model, owners=before)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    run.attach(optimizer)
    c.plain_loss("hot-expert-a-rank")(model, 0).backward()
    c.average_dense(model, run)
    said["Adafactor"] = c.raised(OptionError, optimizer.step)  # it scales by norms, and all experts have one here
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    run.attach(optimizer)
    optimizer.step()
    weight = next(iter(run.parameters()))
    optimizer.state[weight]["odd"] = torch.zeros(len(weight) + 1, *weight.shape[1:])
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    said["odd state"] = c.raised(OptionError, lambda: run.reshard(some_owners(10)))
    assert (run.owners == before).all()
    assert c.agreed(h.worst(c.of_all(model, "weight"), weights)) == 0 == c.agreed(h.worst(c.of_all(model), grads))
    optimizer.zero_grad()  # and the run goes on
    c.plain_loss("hot-expert-a-rank")(model, 1).backward()
    optimizer.step()
    run.schedule.moves.optimizers.clear()
    assert c.agreed(float(run.reshard(some_owners(10)))) > 0
    said["LBFGS"] = c.raised(OptionError, lambda: run.attach(torch.optim.LBFGS(model.parameters())))
    return {name: text.splitlines()[0] for name, text in said.items()}


@case
def optimizers_that_scale_by_norms() -> dict:
    """Adafactor (stacked weights) and LAMB's trust ratio, which are wrong by a rank's own norm."""

    class Lamb(torch.optim.Optimizer):
        def __init__(self, weights: Any) -> None:
            super().__init__(weights, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:
            with torch.no_grad():
                for group in self.param_groups:
                    for weight in group["params"]:
                        weight.sub_(weight.grad * (group["lr"] * weight.norm() / weight.grad.norm()))

    errors = {}
    for kind in (Lamb, torch.optim.Adafactor):
        expected, _ = dense_run(make=kind)
        model = h.build()
        run = shard(model)
        train(model, run, kind(model.parameters()), range(STEPS))
        errors[kind.__name__] = error_of(model, dict(expected.named_parameters()))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def optimizers_and_owners() -> dict:
    """Built too early: said. Never attached: its states move with owners all the same."""
    early = h.build()
    optimizer = torch.optim.AdamW(early.parameters())
    run = shard(early)
    first = c.raised(OptionError, lambda: run.attach(optimizer))
    h.loss_of(early, mine()).backward()
    second = c.raised(OptionError, optimizer.step)
    dense, model, run = pair()
    theirs, ours = h.make_optimizer("adamw", dense), h.make_optimizer("adamw", model)
    for step in range(4):
        theirs.zero_grad(), ours.zero_grad()
        h.loss_of(dense, everyone(step)).backward()
        h.loss_of(model, mine(step)).backward()
        h.reduce_dense(model, run)
        for weight in dense.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        theirs.step(), ours.step()
        if step == 1:
            run.reshard(run.owners[:, ::-1].copy())
    full = {name: weight.detach() for name, weight in dense.named_parameters()}
    error = c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, full)))
    assert error <= EXACT, error
    return {"error": error, "said": [first.splitlines()[0], second.splitlines()[0]]}


@case
def arrays_and_optimizers_that_change() -> dict:
    """The caller's array of owners is not the run's; an optimizer that takes another's place counts steps as well."""
    world = dist.get_world_size()
    owners = np.arange(h.LAYERS * h.EXPERTS).reshape(h.LAYERS, -1) % world
    model = h.build()
    run = shard(model, owners=owners, sharding=Heterogeneous(interval=2, overlap=1))
    owners[:] = owners[:, ::-1].copy()
    assert c.agreed(float(run.reshard(owners))) > 0 and (run.owners == owners).all()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(7):
        h.loss_of(model, mine(step)).backward()
        optimizer.step()
        if step == 0:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert run.schedule.steps == 7 and len([ref for ref in run.schedule.moves.optimizers if ref() is not None]) == 1
    assert (run.owners != owners).any()
    said = c.raised(OptionError, lambda: run.set_policy("hecate", step_slots=-1))
    return {"steps": run.schedule.steps, "said": said}


@case
def runs_that_end_while_optimizers_step() -> dict:
    """Runs are collected at any moment, also amid the hooks of a step; those that are left still know of it."""
    model = h.build()
    run = shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gone = [shard(h.build()) for _ in range(4)]
    handle = register_optimizer_step_post_hook(lambda *_: (gone and gone.pop(), gc.collect()) and None)
    try:
        for step in range(4):
            h.loss_of(model, mine(step)).backward()
            optimizer.step()
    finally:
        handle.remove()
    assert not gone and run.schedule.steps == 4
    return {"steps": run.schedule.steps}


@case
def optimizer_in_backward() -> dict:
    """Hooks that step as soon as a gradient is accumulated see the complete one, once a step."""
    world, errors = dist.get_world_size(), {}
    dense = h.build()
    plain = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        plain.zero_grad()
        h.loss_of(dense, h.batch("hot-expert-a-rank", step, world, 2, None, torch.float64)).backward()
        for weight in dense.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        plain.step()
    expected = {name: weight.detach() for name, weight in dense.named_parameters()}
    for again in (False, True):
        model = h.build()
        shard(model, rematerialise=again)
        fsdp(model, h.MESH(world))
        calls: list[int] = []

        def step_now(weight: Any, optimizers: dict, calls: list[int] = calls) -> None:
            calls.append(1)
            optimizers[weight].step()
            optimizers[weight].zero_grad()

        each = {weight: torch.optim.SGD([weight], lr=0.05, momentum=0.9) for weight in model.parameters()}
        for weight in each:
            weight.register_post_accumulate_grad_hook(partial(step_now, optimizers=each))
        for step in range(3):
            c.plain_loss("hot-expert-a-rank")(model, step).backward()
            assert all(weight.grad is None for weight in model.parameters())
        assert len(calls) == 3 * len(each), (len(calls), len(each))
        errors[f"rematerialise {again}"] = c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, expected)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def groups_by_dimensions() -> dict:
    """Weight decay for what has two dimensions or more: biases of a list of experts have one, as in the dense model."""

    def groups(weights: Any) -> torch.optim.Optimizer:
        every = list(weights)
        return torch.optim.AdamW([{"params": [w for w in every if w.dim() >= 2], "weight_decay": 0.5},
                                  {"params": [w for w in every if w.ndim < 2], "weight_decay": 0.0}], lr=0.02)  # fmt: skip

    expected, _ = dense_run("list", groups)
    model = h.build("list")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = shard(model)
    assert [str(one.message).partition(":")[0] for one in said] == ["experts of a list"]
    train(model, run, groups(model.parameters()), range(STEPS))
    found = [full_state_dict(model)]
    dist.broadcast_object_list(found, 0)
    error = h.worst(found[0], dict(expected.state_dict()))
    assert error <= EXACT, error
    return {"error": error}


@case
def grad_scaler() -> dict:
    """``ShardedGradScaler``, an optimizer for the experts and one for the rest: exact, and all ranks skip alike.

    In one optimizer torch refuses FSDP2's DTensors beside plain tensors; plain ``GradScaler`` decides rank by rank.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    dense, model = h.build(), h.build()
    run = shard(model)
    fsdp(model, h.MESH(world))
    rest, experts = (group["params"] for group in parameter_groups(model))
    plain = torch.optim.SGD(dense.parameters(), lr=0.1)
    both = [torch.optim.SGD(weights, lr=0.1) for weights in (rest, experts)]
    scaler = ShardedGradScaler("cpu", init_scale=1024.0, process_group=dist.group.WORLD)
    for step in range(3):
        plain.zero_grad()
        h.loss_of(dense, h.batch("hot-expert-a-rank", step, world, 2, None, torch.float64)).backward()
        plain.step()
        for optimizer in both:
            optimizer.zero_grad()
        scaler.scale(c.plain_loss("hot-expert-a-rank")(model, step)).backward()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found a non-scalar tensor")  # torch's, of FSDP2's gradients
            for optimizer in both:
                scaler.unscale_(optimizer)
        run.clip_grad_norm_(1e9)
        for optimizer in both:
            scaler.step(optimizer)
        scaler.update()
    wanted = {name: weight.detach() for name, weight in dense.named_parameters()}
    error = c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, wanted)))
    assert error <= EXACT and scaler.get_scale() == 1024.0, (error, scaler.get_scale())
    kept = [weight.detach().clone() for weight in experts]
    scaler.scale(c.plain_loss("hot-expert-a-rank")(model, 3)).backward()
    if rank == 1:
        experts[0].grad.fill_(float("inf"))
    scaler.step(both[1])
    scaler.update()
    skipped = all(torch.equal(weight, value) for weight, value in zip(experts, kept, strict=True))
    assert c.agreed(float(not skipped)) == 0, "a rank made a step"
    assert c.agreed(scaler.get_scale()) == 512.0 == scaler.get_scale()
    return {"error": error}


@case
def grad_scaler_of_stock() -> dict:
    """One rank's experts overflow: every rank skips the step."""
    model = h.build()
    run = shard(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    scaler.scale(c.plain_loss("hot-expert-a-rank")(model, 0)).backward()
    c.average_dense(model, run)
    if dist.get_rank() == 1:
        next(iter(run.parameters())).grad[0, 0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    return {}
