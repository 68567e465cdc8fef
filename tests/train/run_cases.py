"""Cases that need several ranks, all in one launch.

torchrun --standalone --nproc-per-node 4 tests/train/run_cases.py --out results.jsonl [--steps 1000] [case ...]
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

import itertools

from tests import journal
from tests.cases import read_options, run_cases
from tests.helpers import few_or
from tests.ranks import everywhere, registry
from tests.train import harness as h
from tests.train.matrix import machine

from poise.cost.transfers import Transfer, TransferPlan, plan_transfers
from poise.runtime import sparse as wires
from poise.runtime.collectives import timeout_of
from poise.runtime.sparse import sparse_all_gather, sparse_reduce_scatter
from poise.stepwise.owners import LoadSamples, OwnerSeconds
from poise.stepwise.sharding import Balanced, Heterogeneous, check_sharding
from poise.train import fully_shard_experts
from poise.util.errors import ModelError, OptionError

CPU = torch.device("cpu")
MINE, case = registry()


def same(value: Any) -> None:
    """Every rank has the same value."""
    parts = everywhere(value)
    assert all(part == parts[0] for part in parts), parts


@case
def collectives(options) -> dict:
    """Pre- and post-conditions, bytes on every link, and the order of the sum, against sums on one process."""
    world, rank = dist.get_world_size(), dist.get_rank()
    cluster, worst = machine(world), 0.0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        experts = int(rng.integers(1, 9))
        owner = rng.integers(0, world, experts)
        wanted = rng.random((experts, world)) < 0.5
        form = ("direct", "node", "tree", "auto")[seed % 4]
        plan = plan_transfers(owner, wanted, cluster, form=form)
        value = lambda e, d: torch.tensor(np.random.default_rng([seed, e, d]).standard_normal(17))  # noqa: B023, E731
        store = {e: [value(e, rank), value(e, rank)[:5].clone()] for e in range(experts)}
        sparse_all_gather(plan, dist.group.WORLD, store.__getitem__, CPU).wait()
        for e in range(experts):
            held = wanted[e, rank] or owner[e] == rank
            expected = value(e, int(owner[e])) if held else value(e, rank)
            assert torch.equal(store[e][0], expected) and torch.equal(store[e][1], expected[:5])
        store = {e: [value(e, rank)] for e in range(experts)}
        once = None
        for _ in range(2):  # the same sum to the last bit
            rows = {e: [value(e, rank)] for e in range(experts)}
            sparse_reduce_scatter(plan, dist.group.WORLD, rows.__getitem__, torch.float64, CPU).wait()
            for e in np.flatnonzero(owner == rank):
                full = sum(value(int(e), d) for d in range(world) if wanted[e, d] or d == rank)
                worst = max(worst, (rows[int(e)][0] - full).abs().max().item())
            now = [rows[int(e)][0] for e in np.flatnonzero(owner == rank)]
            assert once is None or all(torch.equal(a, b) for a, b in zip(once, now, strict=True))
            once = now
    assert worst < 1e-13
    return {"worst": worst}


@case
def changes(options) -> dict:
    """Policies, owners and slots change between steps: nothing but speed does."""
    world = dist.get_world_size()
    names = [
        "hecate",
        "poise",
        "full-replication",
        "smart-moe:interval=1,threshold=0.0",
        "hecate-calibrated",
        "moon-ep",
    ]
    received = []

    def change(run, step):
        run.set_policy(names[step % len(names)], step_slots=1 + step % 3)
        if step % 2 == 1:
            owners = np.random.default_rng(step).integers(0, world, (h.LAYERS, h.EXPERTS))
            received.append(run.reshard(owners))
            assert (run.owners == owners).all()

    worst = 0.0
    for optimizer in ("sgd", "adamw"):
        for again in few_or((False, True, 4000.0), (False, 4000.0) if optimizer == "adamw" else (True,)):
            reference = h.dense("moving-hot", 2, optimizer, world, steps=8)
            error, moved, _ = h.sharded_run("moving-hot", 2, optimizer, "poise", reference, steps=8, change=change,
                                            rematerialise=again, cluster=machine(world))  # fmt: skip
            assert moved > 0
            worst = max(worst, error)
    assert worst <= 1e-11, worst
    return {"worst": worst, "received": sum(received)}


@case
def schedules(options) -> dict:
    """Prefetch depth, wire types and both sharding policies that move owners by themselves."""
    world, worst, moved_owners = dist.get_world_size(), 0.0, 0
    for prefetch, again in ((0, True), (1, True), (2, True), (2, False), (0, False)):
        reference = h.dense("two-hot", 2, "adamw", world)
        error, _, _ = h.sharded_run("two-hot", 2, "adamw", "hecate", reference, prefetch=prefetch, rematerialise=again,
                                    cluster=machine(world))  # fmt: skip
        worst = max(worst, error)
    reference = h.dense("moving-hot", 1, "adamw", world, steps=9)
    seen = []

    def watch(run, step):
        check_sharding(run.owners, world)
        seen.append(run.owners.tolist())

    error, _, _ = h.sharded_run("moving-hot", 1, "adamw", "hecate:overlap=1", reference, steps=9, change=watch,
                                sharding=Heterogeneous(interval=2, overlap=1), cluster=machine(world))  # fmt: skip
    moved_owners = sum(a != b for a, b in itertools.pairwise(seen))
    assert moved_owners > 0
    worst = max(worst, error)
    assert worst <= 1e-11, worst
    same(seen)
    return {"worst": worst, "plans": moved_owners}


@case
def owners_by_price(options) -> dict:
    """Owners that move by the modelled time: planned on a thread, the same on every rank to the last bit, and exact."""
    world, out = dist.get_world_size(), {}
    for policy, sharding in (("expert-parallelism", Balanced(interval=2)),
                             ("hecate:overlap=1", Heterogeneous(interval=1, overlap=1, by_price=True))):  # fmt: skip
        reference, seen = h.dense("hot-rank", 1, "adamw", world, steps=6), []

        def watch(run, step, seen=seen):
            check_sharding(run.owners, world)
            pairs = run.schedule.planner.history.mean_LE()
            price = run.schedule.planner.price(pairs.sum(axis=1).mean())
            history = [run.schedule.planner.history.of(layer) for layer in range(h.LAYERS)]
            seconds = OwnerSeconds(run.schedule.settings.policy, 2, price, LoadSamples.of_history(history, world))
            seen.append([run.owners.tolist(), seconds.step(run.owners).hex()])

        error, _, _ = h.sharded_run("hot-rank", 1, "adamw", policy, reference, steps=6, change=watch, sharding=sharding,
                                    cluster=machine(world))  # fmt: skip
        assert error <= 1e-11, (policy, error)
        same(seen)
        out[policy] = sum(a[0] != b[0] for a, b in itertools.pairwise(seen))
    assert out["expert-parallelism"] > 0, out
    return out


@case
def memory(options) -> dict:
    """Bytes that live at once, to the byte: full replication has the same replicas in every layer."""
    world, rank, layers = dist.get_world_size(), dist.get_rank(), 4
    expert = 3 * h.WIDTH * h.INNER * 8
    out = {}
    for again, prefetch in ((False, 1), (True, 1), (True, 2), (True, 0)):
        model = h.build(layers=layers)
        run = fully_shard_experts(model, mesh=h.MESH(world), policy="full-replication", rematerialise=again,
                                  prefetch=prefetch, cluster=machine(world), form="direct")  # fmt: skip
        run.set_gradient_divide_factor(1.0)
        optimizer = h.make_optimizer("adamw", model)
        ledger, most = run.schedule.ledger, [0]
        count = type(ledger).add

        def add(kind, nbytes, ledger=ledger, most=most, count=count):
            count(ledger, kind, nbytes)
            held = sum(value for name, value in ledger.now.items() if name != "arriving gradients")
            most[0] = max(most[0], held)

        ledger.add = add
        for step in range(3):
            data = h.batch("even", step, world, 2, rank, torch.float64, layers)
            optimizer.zero_grad()
            h.loss_of(model, data).backward()
            optimizer.step()
            gc.collect()
            assert sum(run.schedule.ledger.now.values()) == 0, run.schedule.ledger.now
        found = run.memory(optimizer)
        owned = int((run.owners == rank).sum())
        assert found["parameters"] == owned * expert and found["gradients"] == owned * expert
        assert found["states"] == 2 * owned * expert + 2 * layers * 4, found  # AdamW: two moments and a float32 count
        replicas = max(h.EXPERTS - int((one == rank).sum()) for one in run.owners)
        # no more gradients arrive at an owner at once than the most replicas that a rank has
        arriving = max(h.EXPERTS - np.bincount(one, minlength=world).min() for one in run.owners) * expert
        peak = found["materialised peak"]
        if again:
            flight = max(1, prefetch)
            expected = (
                replicas * flight * 2 * expert
            )  # (replicas a layer) x (layers in flight) x (parameter + gradient)
            assert most[0] == expected if prefetch < 2 else most[0] <= expected, (most, expected)
            assert peak <= expected + arriving
        else:
            assert peak >= layers * replicas * expert
        out[f"rematerialise {again}, prefetch {prefetch}"] = peak // expert
    return out


@case
def slots_from_memory(options) -> dict:
    """``replica_bytes`` in place of a number of slots: what the ledger counts stays within it."""
    world, rank, out = dist.get_world_size(), dist.get_rank(), {}
    expert = 3 * h.WIDTH * h.INNER * 8
    for again in (False, True):
        for budget in (0, 12 * expert, 33 * expert):
            model = h.build()
            run = fully_shard_experts(model, mesh=h.MESH(world), policy="hecate:overlap=9", replica_bytes=budget,
                                      rematerialise=again, cluster=machine(world))  # fmt: skip
            for step in range(2):
                model.zero_grad()  # a second gradient would lie beside the first until it is added
                h.loss_of(model, h.batch("two-hot", step, world, 2, rank, torch.float64)).backward()
            peak, slots = run.schedule.ledger.peak, run.schedule.settings.step_slots
            assert peak <= budget and (peak > 0) == (slots > 0), (peak, budget, slots)
            out[f"{budget // expert}, {again}"] = slots
    assert out["12, True"] >= out["12, False"] and out["33, False"] > 0, out
    return out


@contextmanager
def posted(group: Any) -> Iterator[dict[str, np.ndarray]]:
    """Bytes that are really sent to and received from each rank in a group, counted where they are posted."""
    world = dist.get_world_size()
    bytes_D = {"isend": np.zeros(world, np.int64), "irecv": np.zeros(world, np.int64)}
    before = wires.Batch

    def count(operations, where):
        for one in operations if where is group else ():
            bytes_D["isend" if one.sends else "irecv"][one.peer] += one.tensor.nbytes
        return before(operations, where)

    wires.Batch = count
    try:
        yield bytes_D
    finally:
        wires.Batch = before


@case
def wire(options) -> dict:
    """Bytes on the wire are expert bytes times new holders, in all and on each link, forward and back."""
    world, rank = dist.get_world_size(), dist.get_rank()
    expert = 3 * h.WIDTH * h.INNER * 8
    every = list(itertools.product(("hecate", "poise", "moon-ep"), ("direct", "node", "tree")))
    for policy, form in few_or(every, every[::4]):  # each policy and each form once
        model = h.build()
        run = fully_shard_experts(model, mesh=h.MESH(world), policy=policy, cluster=machine(world), form=form,
                                  rematerialise=True)  # fmt: skip
        for step in range(3):
            before = dict(run.schedule.moved_bytes)
            with posted(run.schedule.deployment.weights_group) as there:
                loss = h.loss_of(model, h.batch("two-hot", step, world, 2, rank, torch.float64))
            held = [part for one in run.schedule.passes.open() for part in one.weights.parts]
            links_DD = expert * sum((part.plan.links_DD(world) for part in held), np.zeros((world, world), np.int64))
            mine = expert * sum(len(part.mine) for part in held)
            assert there["irecv"].sum() == mine <= expert * h.LAYERS * h.EXPERTS  # no rank more than lambda S
            assert (there["irecv"] == links_DD[:, rank]).all() and (there["isend"] == links_DD[rank]).all()
            with posted(run.schedule.deployment.weights_group) as back:
                loss.backward()
            sent = torch.tensor([there["isend"].sum(), back["isend"].sum()])
            dist.all_reduce(sent)
            moved = {key: run.schedule.moved_bytes[key] - before[key] for key in before}
            assert moved["gather"] == sent[0] == sum(one.replicas for one in run.metrics) * expert
            again = sent[1] - moved["reduce"]  # second gathers: not of the last layer, whose backward comes at once
            assert again == sum(one.replicas for one in run.metrics[:-1]) * expert, (again, moved)
            assert moved["reduce"] <= moved["gather"]
            assert all(one.tokens_D.sum() == 2 * h.TOKENS * world for one in run.metrics)
        assert run.schedule.moved_bytes["gather"] > 0
        same([one.tokens_D.tolist() for one in run.metrics])
    return {"bytes": run.schedule.moved_bytes}


def gathers(group: Any) -> Any:
    """Starts a gather of two rounds, told by a number: every rank sends an expert to the next one, then another."""
    world, rank = dist.get_world_size(), dist.get_rank()
    owner_E = np.arange(2 * world) % world
    rounds = [[Transfer(turn * world + d, d, (d + 1) % world) for d in range(world)] for turn in range(2)]
    plan = TransferPlan(tuple(map(tuple, rounds)), "direct")

    def start(number: int) -> tuple[Any, dict[int, list[torch.Tensor]]]:
        rows = {e: [torch.full((9,), 100.0 * number + e if owner == rank else -1.0)] for e, owner in enumerate(owner_E)}
        return sparse_all_gather(plan, group, rows.__getitem__, CPU), rows

    return start


def arrived(number: int, begun: tuple[Any, dict[int, list[torch.Tensor]]]) -> None:
    pending, rows = begun
    pending.wait()
    held = [e for e in rows if (dist.get_rank() - e) % dist.get_world_size() < 2]
    assert len(held) == 4 and all((rows[e][0] == 100 * number + e).all() for e in held), rows


@case
def given_up_gathers(options) -> dict:
    """What was posted and forgotten neither blocks a connection nor is taken for what comes later.

    gloo stops to read from a connection when a message comes for a receive that was collected: here the victim's are,
    before the others have posted their sends; and its sends, before the others have posted their receives.
    """
    start = gathers(dist.new_group(timeout=timedelta(seconds=20)))
    for victim in range(dist.get_world_size()):
        for number in range(2):
            if dist.get_rank() == victim:
                start(number)
                gc.collect()
            dist.barrier()
            if dist.get_rank() != victim:
                start(number)
                gc.collect()
        arrived(2, start(2))
    return {}


@case
def gathers_posted_in_another_order(options) -> dict:
    """Later rounds are posted when somebody waits: on half the ranks before another gather begins, on half after."""
    start = gathers(dist.new_group(timeout=timedelta(seconds=20)))
    if dist.get_rank() % 2:
        first, second = start(1), start(2)
        arrived(1, first)
    else:
        arrived(1, start(1))
        second = start(2)
    arrived(2, second)
    return {}


@case
def runs_given_up_in_backward(options) -> dict:
    """A run that fails amid its backward pass, the same on all ranks, and is collected while weights are on their way.

    gloo's threads sleep for a second on one rank, so that what it is sent comes after it has forgotten all. This hung:
    the ranks of the next run waited for one that waited for its weights, and that for half an hour.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    victims = (0, world - 1)
    for number, victim in enumerate(victims):
        model = h.build()
        run = fully_shard_experts(
            model, mesh=h.MESH(world), policy="hecate", rematerialise=True, cluster=machine(world)
        )
        group = run.schedule.deployment.weights_group
        assert timeout_of(group) == timeout_of(run.schedule.deployment.tokens_group)
        loss = h.loss_of(model, h.batch("hot-expert-a-rank", number, world, 2, rank, torch.float64))
        assert run.schedule.moved_bytes["gather"] > 0
        dist.barrier()
        if rank == victim:
            for thread in journal.loops():
                journal.stall(thread)
        try:  # refused by the first layer, once the last has started what the first will need
            torch.autograd.grad(loss, model.blocks[0].experts.down_proj)
        except ModelError as error:
            said = str(error).splitlines()[0]
        del model, run, loss
        gc.collect()
        reference = h.dense("hot-expert-a-rank", 2, "sgd", world, steps=2)
        error, moved, _ = h.sharded_run(
            "hot-expert-a-rank", 2, "sgd", "hecate", reference, steps=2, cluster=machine(world)
        )
        assert moved > 0 and error <= 1e-11, error
    return {"said": said}


@case
def steady(options) -> dict:
    """Many steps, a new plan in each and new owners every 100: no leak, no drift."""
    world, rank, steps = dist.get_world_size(), dist.get_rank(), options.steps
    model, reference = h.build(), h.build()
    run = fully_shard_experts(model, mesh=h.MESH(world), policy="hecate:overlap=3", cluster=machine(world),
                              rematerialise=True, sharding=Heterogeneous(interval=max(10, steps // 10), overlap=1))  # fmt: skip
    run.set_gradient_divide_factor(1.0)
    mine = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    run.attach(mine)
    theirs = torch.optim.SGD(reference.parameters(), lr=1e-3, momentum=0.9)
    owners, objects = [run.owners.tolist()], []
    for step in range(steps):
        mine.zero_grad()
        h.loss_of(model, h.batch("moving-hot", step, world, 2, rank, torch.float64)).backward()
        h.reduce_dense(model, run)
        mine.step()
        theirs.zero_grad()
        h.loss_of(reference, h.batch("moving-hot", step, world, 2, None, torch.float64)).backward()
        theirs.step()
        if run.owners.tolist() != owners[-1]:
            owners.append(run.owners.tolist())
        if step in (steps // 4, steps - 1):
            gc.collect()
            objects.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
            assert sum(run.schedule.ledger.now.values()) == 0
    full = dict(reference.named_parameters())
    error = h.worst(dict(model.named_parameters()), h.local_rows(model, {k: v.detach() for k, v in full.items()}))
    assert len(owners) > 1, "owners never moved"
    assert objects[1] <= objects[0] + 8, objects
    assert error <= 1e-9, error
    return {"steps": steps, "error": error, "owner plans": len(owners), "tensors": objects}


@case
def refusals(options) -> dict:
    """What cannot be done is said, on every rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = h.build()
    run = fully_shard_experts(model, mesh=h.MESH(world), policy="poise", cluster=machine(world))
    loss = h.loss_of(model, h.batch("two-hot", 0, world, 2, rank, torch.float64))
    said = []
    for owners in (run.owners[::-1].copy() * 0, np.zeros((1, 2), int), run.owners + world):
        try:
            run.reshard(owners)
        except OptionError as error:
            said.append(error.message)
    assert len(said) == 3 and "backward" in said[0] and "(1, 2)" in said[1] and "owner" in said[2], said
    loss.backward()
    run.reshard(run.owners * 0)  # everything on one rank is legal, if unwise
    h.loss_of(model, h.batch("two-hot", 1, world, 2, rank, torch.float64)).backward()
    return {"said": said}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=few_or(60, 24))
    given = read_options(parser)
    run_cases({name: partial(function, given) for name, function in MINE.items()}, given, timeout_s=120)


if __name__ == "__main__":
    main()
