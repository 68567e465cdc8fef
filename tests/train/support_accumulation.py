"""Cases about gradient accumulation: what waits of replicas, and what drops it or does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.ranks import everywhere
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_runs import EXACT, fsdp, shard, some_owners
from torch import Tensor

from poise.train import local_rows
from poise.util.errors import CommunicationError, ModelError, OptionError


@case
def accumulation() -> dict:
    """Three micro-batches, replica gradients kept until the last one, equal one large batch; plans differ between."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    workloads = ("two-hot", "hot-expert-a-rank", "hot-rank")
    dense = h.build()
    for step, workload in enumerate(workloads):
        h.loss_of(dense, h.batch(workload, step, world, 2, None, torch.float64)).backward()
    expected = {name: weight.grad for name, weight in dense.named_parameters()}
    norm = torch.nn.utils.get_total_norm(expected.values()).item()
    for again in (False, True):
        for wrap in (False, True):
            model = h.build()
            run = shard(model, rematerialise=again, policy="hecate:overlap=3")
            if wrap:
                fsdp(model, h.MESH(world))
            reduced, plans = [], []
            for step, workload in enumerate(workloads):
                last = step == len(workloads) - 1
                run.set_requires_gradient_sync(last)
                if wrap:
                    model.set_requires_gradient_sync(last)
                h.loss_of(model, h.batch(workload, step, world, 2, rank, torch.float64)).mul(world).backward()
                plans.append([one.tokens_D.tolist() for one in run.metrics])
                reduced.append(run.schedule.moved_bytes["reduce"])
                if not last:
                    said = c.raised(OptionError, lambda run=run: run.reshard(run.owners[:, ::-1].copy()))
                    assert "gradients" in said
                    early = torch.optim.SGD(model.parameters(), lr=1.0)
                    said = c.raised(OptionError, early.step)
                    assert f"{h.LAYERS} of {h.LAYERS} layers" in said and "set_requires_gradient_sync(True)" in said
            assert reduced[0] == reduced[1] == 0 < reduced[2], reduced
            assert plans[0] != plans[1] != plans[2]
            if not wrap:
                c.average_dense(model, run)
            mine = run.clip_grad_norm_(1e9).item()
            errors[f"rematerialise {again}, FSDP2 {wrap}"] = c.agreed(
                max(abs(mine / norm - 1), h.worst(c.of_all(model), h.local_rows(model, expected)))
            )
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def accumulation_within_bytes() -> dict:
    """Three micro-batches of one plan: what may wait is sent once, what may not thrice; between passes no more waits."""
    world, rank, micro = dist.get_world_size(), dist.get_rank(), 3
    data = [h.batch("hot-expert-a-rank", 0, world, 2, which, torch.float64) for which in (None, rank)]
    dense = h.build()
    h.loss_of(dense, data[0]).mul(micro).backward()
    expected = {name: weight.grad for name, weight in dense.named_parameters()}
    found, errors, most = {}, {}, {}
    for limit in (None, 0.0, 0.6):  # of what None keeps
        model = h.build()
        run = shard(model, policy="full-replication", rematerialise=True,
                    accumulate_bytes=None if limit is None else limit * most[None])  # fmt: skip
        waiting, kept = run.schedule.backward.replica_gradients, []
        for step in range(micro):
            run.set_requires_gradient_sync(step == micro - 1)
            h.loss_of(model, data[1]).mul(world).backward()
            assert waiting.waiting == (step < micro - 1 and limit != 0.0) and not waiting.reductions
            held = run.schedule.ledger.now
            kept.append(held["replica gradients"] + held.get("arriving gradients", 0))
            if waiting.waiting:
                said = c.raised(OptionError, lambda run=run: run.reshard(run.owners[:, ::-1].copy()))
                assert "gradients" in said
        assert sum(run.schedule.ledger.now.values()) == 0
        most[limit] = max(max(everywhere(kept[:-1])))
        found[limit] = run.schedule.moved_bytes["reduce"]
        c.average_dense(model, run)
        errors[str(limit)] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
    assert max(errors.values()) <= EXACT, errors
    assert most[0.0] == 0 < most[0.6] <= 0.6 * most[None], most
    assert found[0.0] == micro * found[None], found
    assert found[None] < found[0.6] < found[0.0], found
    return {"errors": errors, "reduced": {str(limit): moved for limit, moved in found.items()}}


# ---- what drops it ---------------------------------------------------------------------------------------------------

THROWN, KEPT = "two-hot", "hot-expert-a-rank"


def data_of(workload: str, rank: int | None, owners: bytes = b"") -> h.Batch:
    """Tokens of one rank, or of all. ``crossed``: they choose experts of other ranks alone (``owners``: int64 [L, E]),
    so that no rank adds anything to its own; ``two alone``: experts 0 and 1.
    """
    world = dist.get_world_size()
    if workload not in ("crossed", "two alone"):
        return h.batch(workload, 0, world, 2, rank, torch.float64)
    if rank is None:
        parts = [data_of(workload, one, owners) for one in range(world)]
        ids = [torch.cat(of_layer) for of_layer in zip(*(part.ids for part in parts), strict=True)]
        return h.Batch(torch.cat([p.x for p in parts]), torch.cat([p.target for p in parts]), ids, parts[0].total)
    data, ids = h.batch(THROWN, 0, world, 2, rank, torch.float64), []
    for owner_E, chosen in zip(np.frombuffer(owners, np.int64).reshape(h.LAYERS, -1), data.ids, strict=True):
        others = [int(e) for e in np.flatnonzero(owner_E != rank)]
        two = [0, 1] if workload == "two alone" else sorted({*others[:2], *range(2 - len(others))})
        ids.append(torch.tensor([two]).expand(len(chosen), 2).contiguous())
    return h.Batch(data.x, data.target, ids, data.total)


def loss(model: Any, workload: str, owners: bytes = b"") -> Tensor:
    """This rank's; the mean over ranks is the dense model's."""
    return h.loss_of(model, data_of(workload, dist.get_rank(), owners)).mul(dist.get_world_size())


@cache
def summed(*workloads: str, owners: bytes = b"") -> dict[str, Tensor]:
    """Gradients of the dense model, added up."""
    dense = h.build()
    for workload in workloads:
        h.loss_of(dense, data_of(workload, None, owners)).backward()
    return {name: weight.grad for name, weight in dense.named_parameters()}


def begun(*workloads: str, seed: int | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """A model, its run and what waits of replicas after unsynchronised passes; the next pass is synchronised."""
    model = h.build()
    if seed is not None:
        options["owners"] = some_owners(seed)
    run = shard(model, **{"policy": "full-replication", "rematerialise": True, **options})
    run.set_requires_gradient_sync(False)
    for workload in workloads:
        loss(model, workload, run.owners.tobytes()).backward()
    run.set_requires_gradient_sync(True)
    return model, run, run.schedule.backward.replica_gradients


def error_of(model: Any, run: Any, *workloads: str) -> float:
    """Of all gradients on any rank, once nothing waits."""
    assert not run.schedule.backward.replica_gradients.waiting and sum(run.schedule.ledger.now.values()) == 0
    c.average_dense(model, run)
    wanted = summed(*workloads, owners=run.owners.tobytes() if {"crossed", "two alone"} & {*workloads} else b"")
    return c.agreed(h.worst(c.of_all(model), h.local_rows(model, wanted)))


def each(model: Any, action: Callable[[Any], Any]) -> None:
    for weight in model.parameters():
        action(weight)


def put_back(weight: Any) -> None:
    aside, weight.grad = weight.grad, None
    weight.grad = aside


def taken_away(weight: Any) -> None:
    del weight.grad


def its_own(run: Any, model: Any) -> None:
    """Expert weights get gradients by themselves after they were dropped, as a penalty gives them."""
    model.zero_grad()
    for weight in model.parameters():
        if weight in run.parameters():
            (weight * 0).sum().backward()


DROPS: dict[str, Callable[[Any, Any], Any]] = {
    "module": lambda model, run: model.zero_grad(),
    "module, to zeros": lambda model, run: model.zero_grad(set_to_none=False),
    "optimizer": lambda model, run: torch.optim.AdamW(model.parameters()).zero_grad(),
    "optimizer, to zeros": lambda model, run: torch.optim.SGD(model.parameters()).zero_grad(set_to_none=False),
    "foreach": lambda model, run: torch.optim.Adam(model.parameters(), foreach=True).zero_grad(),
    "foreach, to zeros": lambda model, run: (
        torch.optim.Adam(model.parameters(), foreach=True).zero_grad(set_to_none=False)
    ),
    "fused, to zeros": lambda model, run: (
        torch.optim.Adam(model.parameters(), fused=True).zero_grad(set_to_none=False)
    ),
    "data": lambda model, run: each(model, lambda weight: weight.grad.data.zero_()),
    "detached": lambda model, run: each(model, lambda weight: weight.grad.detach().zero_()),
    "deleted": lambda model, run: each(model, taken_away),
    "then gradients of their own": lambda model, run: its_own(run, model),
    "after another took its place": lambda model, run: (
        each(model, lambda weight: setattr(weight, "grad", weight.grad.clone())),
        model.zero_grad(set_to_none=False),
    ),
}  # fmt: skip
TOUCHES: dict[str, Callable[[Any, Any], Any]] = {
    "nothing": lambda model, run: None,
    "in place": lambda model, run: each(model, lambda weight: weight.grad.mul_(1.0)),
    "clipped": lambda model, run: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9),
    "clipped by poise": lambda model, run: run.clip_grad_norm_(1e9),
    "no NaN": lambda model, run: each(model, lambda weight: weight.grad.nan_to_num_()),
    "another took its place": lambda model, run: each(
        model, lambda weight: setattr(weight, "grad", weight.grad.clone())
    ),
    "put aside": lambda model, run: each(model, put_back),
    "a copy of it zeroed": lambda model, run: each(model, lambda weight: weight.grad.clone().zero_()),
    "a copy of the model": lambda model, run: copy.deepcopy(model).zero_grad(set_to_none=False),
}


@case
def accumulation_dropped() -> dict:
    """``zero_grad`` after unsynchronised passes, in all its forms: what waits of replicas goes as well, on all ranks."""
    errors = {}
    for number, (name, drop) in enumerate(DROPS.items()):
        for seed in few_or((None, 5), ((None, 5)[number % 2],)):
            model, run, waiting = begun(THROWN, seed=seed)
            assert waiting.layers_waiting == h.LAYERS
            drop(model, run)
            loss(model, KEPT).backward()
            errors[f"{name}, owners {seed}"] = error_of(model, run, KEPT)
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def accumulation_touched() -> dict:
    """What is no ``zero_grad`` drops nothing, also where owners' gradients are zeros, or a rank owns nothing."""
    errors, zeros = {}, 0
    everything = np.zeros((h.LAYERS, h.EXPERTS), np.int64)
    ways = (("even", None), ("one rank", everything), ("random", some_owners(5)))
    for turn, routing in enumerate(("crossed", "two alone")):
        for number, (name, touch) in enumerate(TOUCHES.items()):
            for label, owners in few_or(ways, (ways[(number + turn) % 3],)):
                model, run, waiting = begun(routing, owners=owners)
                assert waiting.layers_waiting == h.LAYERS
                zeros += sum(not local_rows(weight.grad).any() for weight in run.parameters() if len(weight))
                touch(model, run)
                loss(model, KEPT).backward()
                errors[f"{routing}, {name}, owners {label}"] = error_of(model, run, routing, KEPT)
    assert max(errors.values()) <= EXACT, {name: error for name, error in errors.items() if error > EXACT}
    assert zeros, "no gradient was zero"
    return errors


@case
def accumulation_dropped_between() -> dict:
    """The pass after ``zero_grad`` is none that trains, owners move first, several passes are open, nothing waits."""
    errors = {}
    model, run, waiting = begun(THROWN, seed=5)
    model.zero_grad()
    with torch.no_grad():
        loss(model, KEPT)
    assert not waiting.layers_waiting
    loss(model, KEPT).backward()
    errors["evaluation next"] = error_of(model, run, KEPT)
    model, run, _ = begun(seed=5)
    run.set_requires_gradient_sync(False)
    first, second, third = loss(model, THROWN), loss(model, THROWN), loss(model, KEPT)
    first.backward()
    second.backward()
    model.zero_grad()
    run.set_requires_gradient_sync(True)
    third.backward()
    errors["three passes open"] = error_of(model, run, KEPT)
    model, run, waiting = begun(THROWN, seed=5, accumulate_bytes=0.0)
    assert not waiting.layers_waiting
    model.zero_grad()
    loss(model, KEPT).backward()
    errors["no bytes may wait"] = error_of(model, run, KEPT)
    model, run, _ = begun(seed=5)
    loss(model, THROWN).backward()
    run.set_requires_gradient_sync(False)
    loss(model, THROWN).backward()
    model.zero_grad()
    run.set_requires_gradient_sync(True)
    loss(model, KEPT).backward()
    errors["after a synchronised pass"] = error_of(model, run, KEPT)
    assert run.schedule.planner.history.seen(0) == 2
    model, run, waiting = begun(THROWN, seed=5)
    model.zero_grad()
    run.reshard(run.owners[:, ::-1].copy())
    assert not waiting.layers_waiting
    loss(model, KEPT).backward()
    errors["owners move next"] = error_of(model, run, KEPT)
    model, run, waiting = begun(THROWN, sharding="balanced")
    assert not run.schedule._owners_due() and waiting.layers_waiting
    if dist.get_rank() == 0:
        model.zero_grad()
    assert not run.schedule._owners_due() and waiting.layers_waiting
    model.zero_grad()
    assert run.schedule._owners_due() and not waiting.layers_waiting
    loss(model, KEPT).backward()
    errors["owners due next"] = error_of(model, run, KEPT)
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def accumulation_dropped_in_part() -> dict:
    """By one rank, or some weights: all ranks raise, what waits stays, and goes when the rest is dropped."""
    errors, rank = {}, dist.get_rank()
    model, run, waiting = begun(THROWN)
    if rank == 0:
        model.zero_grad()
    said = [c.raised(CommunicationError, lambda: loss(model, KEPT))]
    said.append(c.raised(CommunicationError, lambda: run.reshard(run.owners[:, ::-1].copy())))
    assert all("waiting gradients were dropped" in text for text in said) and waiting.layers_waiting == h.LAYERS
    if rank:
        model.blocks[0].experts.zero_grad()
    said.append(c.raised(ModelError, lambda: loss(model, KEPT)))
    said.append(c.raised(ModelError, lambda: run.reshard(run.owners[:, ::-1].copy())))
    assert all("were dropped while" in text for text in said[2:]) and waiting.layers_waiting == h.LAYERS
    model.zero_grad()
    said.append(c.raised(OptionError, torch.optim.SGD(model.parameters(), lr=1.0).step))
    assert "zero_grad()" in said[-1]
    loss(model, KEPT).backward()
    errors["at last by all"] = error_of(model, run, KEPT)
    model, run, waiting = begun(THROWN, seed=5)
    owned = [weight for weight in model.parameters() if weight in run.parameters()]
    up, down = (torch.optim.SGD(half, lr=1.0) for half in (owned[::2], owned[1::2]))
    up.zero_grad()
    said.append(c.raised(ModelError, lambda: loss(model, KEPT)))
    down.zero_grad()
    model.zero_grad()
    loss(model, KEPT).backward()
    errors["two optimizers"] = error_of(model, run, KEPT)
    assert max(errors.values()) <= EXACT, errors
    return {"errors": errors, "said": [text.splitlines()[0] for text in said]}


@case
def accumulation_that_failed_on_one_rank() -> dict:
    """A rank's own code fails when its experts are done: it has nothing that waits, the others have; ``zero_grad`` on
    all ranks ends that, and without it all raise."""
    model, run, _ = begun(THROWN)
    run.set_requires_gradient_sync(False)
    wrong, failed = loss(model, THROWN), False

    def fail(grad: Tensor) -> None:
        raise ArithmeticError("injected")

    first = next(weight for name, weight in model.named_parameters() if "experts" not in name)
    handle = first.register_hook(fail) if dist.get_rank() == 0 else None
    try:
        wrong.backward()
    except ArithmeticError:
        failed = True
    assert failed == (handle is not None)
    if handle is not None:
        handle.remove()
    run.set_requires_gradient_sync(True)
    said = c.raised(CommunicationError, lambda: loss(model, KEPT))
    assert "waiting gradients were dropped" in said
    errors = {}
    for again in range(2):
        model.zero_grad()
        loss(model, KEPT).backward()
        errors[f"pass {again}"] = error_of(model, run, KEPT)
    assert len(set(everywhere(run.schedule.planner.history.seen(0)))) == 1
    assert max(errors.values()) <= EXACT, errors
    return {"errors": errors, "said": said.splitlines()[0]}
