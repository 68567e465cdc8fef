"""Cases about steps: activation checkpointing, errors, derivatives."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case, case_like
from tests.train.support_runs import EXACT, record_of_dense, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from poise.machine.cluster import Cluster
from poise.runtime import spans
from poise.runtime.collectives import run_on_thread
from poise.runtime.moe import ExpertList, GatedExperts, MoE
from poise.runtime.recompute import in_backward
from poise.train import clip_grad_norm_, fully_shard_experts
from poise.train.gradients import update_correction_bias
from poise.util.errors import CommunicationError, InputError, ModelError, OptionError

# ---- what a step tells ----------------------------------------------------------------------------------------------

FORWARD = ["counts", "plan", "dispatch", "arrange", "weights", "experts", "combine"]
BACKWARD = [f"backward {name}" for name in ("weights", "dispatch", "arrange", "reduce", "combine")]


@case
def spans_of_steps() -> dict:
    """The hook is told every part of every layer in order; with sparse collectives on a thread gradients are the same."""
    group = dist.new_group()  # what runs on a thread stays there
    model = h.build()
    run = shard(model, mesh=DeviceMesh.from_group(group, "cpu"), rematerialise=True, policy="full-replication")
    run_on_thread(run.schedule.deployment.weights_group)
    told: list[tuple[str, int, float, float]] = []
    before = spans.record(lambda name, began, ended: told.append((name, threading.get_ident(), began, ended)))
    try:
        record = record_of_dense()
        error = c.follow(model, run, record, c.plain_loss("hot-expert-a-rank"), average=True)
    finally:
        assert spans.record(before) is not before
    assert error <= EXACT, error
    here = threading.get_ident()
    mine = [name for name, thread, *_ in told if thread == here and name not in ("early plan", "backward experts")]
    assert mine == [*FORWARD * h.LAYERS, *BACKWARD * h.LAYERS] * len(record.losses), mine
    assert all(began <= ended for *_, began, ended in told)
    threads = {name: {thread for other, thread, *_ in told if other == name} for name, *_ in told}
    assert threads["gather"] == threads["reduce"] and len(threads["gather"]) == 1 and here not in threads["gather"]
    assert len(threads["early plan"] - {here}) == 1
    return {"error": error, "spans": len(told)}


# ---- 5. activation checkpointing -----------------------------------------------------------------------------------


def checkpointed(module: nn.Module, reentrant: bool = False) -> None:
    """Recompute the module in the backward pass."""
    module.forward = partial(checkpoint, module.forward, use_reentrant=reentrant)


def counted_once(run: Any, steps: int) -> None:
    schedule = run.schedule
    assert [one.layer for one in run.metrics] == list(range(h.LAYERS))
    assert [len(schedule.planner.history.of(layer)) for layer in range(h.LAYERS)] == [steps] * h.LAYERS
    assert [schedule.planner.history.seen(layer) for layer in range(h.LAYERS)] == [steps] * h.LAYERS


def checkpoint_case(part: str) -> dict:
    errors = {}
    for workload, again in (
        ("hot-expert-a-rank", False),
        ("hot-expert-a-rank", True),
        ("ragged", False),
        ("ragged", True),
    ):
        record = (
            record_of_dense()
            if workload == "hot-expert-a-rank"
            else h.dense("ragged", 2, "adamw", dist.get_world_size(), steps=3)
        )
        model = h.build()
        run = shard(model, rematerialise=again)
        for block in model.blocks:
            checkpointed(block if part == "block" else block.experts)
        error = c.follow(model, run, record, c.plain_loss(workload), average=True)
        counted_once(run, len(record.losses))
        errors[f"{workload}, rematerialise {again}"] = error
        assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def checkpoint_block() -> dict:
    """One rank has no token."""
    return checkpoint_case("block")


@case_like("checkpoint_block")
def checkpoint_experts_only() -> dict:
    return checkpoint_case("experts")


@case_like("checkpoint_block")
def checkpoint_hugging_face() -> dict:
    rank, world, errors = dist.get_rank(), dist.get_world_size(), {}
    record = c.hf_dense("mixtral")
    for again in (False, True):
        model = c.hf_model("mixtral")
        run = shard(model, rematerialise=again)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        error = c.follow(model, run, record, lambda m, s: c.hf_loss(m, c.hf_tokens(s, rank, world)), average=True)
        counted_once(run, len(record.losses))
        errors[f"rematerialise {again}"] = error
    assert max(errors.values()) <= EXACT, errors
    return errors


def flipped(ids: Tensor, how: str) -> Tensor:
    """What a router may say when it computes again: two of a token's experts swapped, or a tied one in their place."""
    out = ids.clone()
    if in_backward() and len(ids):
        if how == "swap":
            out[0] = ids[0].flip(0)
        else:
            out[ids == 3] = 5
    return out


@case
def checkpoint_router_flips() -> dict:
    """Experts 3 and 5 tie for every token: ids change in the recomputation, plan, splits and results do not.

    The router's own gradient then goes to the expert it names the second time; the tie's sum is exact.
    """
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    everything = h.batch("hot-expert-a-rank", 0, world, 2, None, torch.float64)
    for chosen in everything.ids:
        chosen[::3, 0] = 3
        chosen[::3, 1] = 4
        chosen[1::3] = torch.tensor([6, 7])
        chosen[2::3] = torch.tensor([3, 8])
    per = len(everything.x) // world
    rows = slice(rank * per, (rank + 1) * per)

    def tied() -> nn.Module:
        model = h.build()
        for block in model.blocks:
            block.gate.weight.data[5] = block.gate.weight.data[3]
        return model

    dense = tied()
    h.loss_of(dense, everything).backward()
    expected = {name: weight.grad for name, weight in dense.named_parameters()}
    mine = h.Batch(
        everything.x[rows], everything.target[rows], [ids[rows] for ids in everything.ids], len(everything.x)
    )
    for how in ("swap", "tie"):
        for again in (False, True):
            model = tied()
            run = shard(model, rematerialise=again)
            for block in model.blocks:
                inner = block.forward
                block.forward = partial(checkpoint, lambda x, ids, inner=inner, how=how: inner(x, flipped(ids, how)),
                                        use_reentrant=False)  # fmt: skip
            (h.loss_of(model, mine) * world).backward()
            c.average_dense(model, run)
            found, wanted = c.of_all(model), h.local_rows(model, expected)
            for name in wanted:
                if "gate" in name and how == "tie":
                    found[name], wanted[name] = (
                        torch.cat([g[:3], g[4:5], g[6:], g[3:4] + g[5:6]]) for g in (found[name], wanted[name])
                    )
            counted_once(run, 1)
            errors[f"{how}, rematerialise {again}"] = c.agreed(h.worst(found, wanted))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case_like("nested_checkpoint_two_passes_open")
def checkpoint_two_passes_open() -> dict:
    """Two forward passes before their backward passes, in either order; one rank has no token in both."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    for order in ((0, 1), (1, 0)):
        dense, model = h.build(), h.build()
        run = shard(model, rematerialise=True)
        for block in model.blocks:
            checkpointed(block)
        losses = []
        for step in (0, 1):
            data = h.batch("two-hot" if step else "hot-expert-a-rank", step, world, 2, None, torch.float64)
            per = len(data.x) // world
            keep = slice(per, None)  # the first rank's tokens are nobody's
            h.loss_of(
                dense, h.Batch(data.x[keep], data.target[keep], [i[keep] for i in data.ids], data.total)
            ).backward()
            rows = slice(rank * per, (rank + 1) * per if rank else 0)
            losses.append(
                h.loss_of(model, h.Batch(data.x[rows], data.target[rows], [i[rows] for i in data.ids], data.total))
            )
        for step in order:
            (losses[step] * world).backward()
        c.average_dense(model, run)
        expected = {name: weight.grad for name, weight in dense.named_parameters()}
        errors[str(order)] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def checkpoint_reentrant_is_refused() -> dict:
    world, rank, model = dist.get_world_size(), dist.get_rank(), h.build()
    run = shard(model)
    plain = model.blocks[0].forward
    checkpointed(model.blocks[0], reentrant=True)
    data = h.batch("hot-expert-a-rank", 0, world, 2, rank, torch.float64)
    data.x.requires_grad_()
    said = c.raised(ModelError, lambda: h.loss_of(model, data).backward())
    assert "use_reentrant=False" in said
    model.blocks[0].forward = plain  # and the run goes on
    model.zero_grad()
    error = c.follow(model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), average=True)
    assert error <= EXACT, error
    return {"said": said}


# ---- 9. what is refused --------------------------------------------------------------------------------------------


@case
def errors() -> dict:
    world, rank, said = dist.get_world_size(), dist.get_rank(), {}
    mesh = h.MESH(world)

    def refused(what: str, kind: type[Exception], action: Any) -> None:
        said[what] = c.raised(kind, action).splitlines()[0]

    def deep_mesh() -> None:
        fully_shard_experts(h.build(), mesh=init_device_mesh("cpu", (1, 1, world)))

    def after(change: Any, kind: str = "gated") -> Any:
        model = h.build(kind)
        change(model)
        return lambda: fully_shard_experts(model, mesh=mesh)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    class OneInput(GatedExperts):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = OneInput(4, 8, 8)

    refused("three dimensions", OptionError, deep_mesh)
    refused(
        "cluster",
        OptionError,
        lambda: fully_shard_experts(h.build(), mesh=mesh, cluster=Cluster.uniform(1, 64, "a100")),
    )
    refused("bare list", ModelError, lambda: fully_shard_experts(Bare(), mesh=mesh))
    refused("one input", ModelError, lambda: fully_shard_experts(Owner(), mesh=mesh))
    refused("no experts", ModelError, lambda: fully_shard_experts(nn.Linear(2, 2), mesh=mesh))
    refused(
        "widths differ",
        ModelError,
        after(lambda m: setattr(m.blocks[1], "experts", GatedExperts(h.EXPERTS, h.WIDTH, 4))),
    )
    refused(
        "counts differ", ModelError, after(lambda m: setattr(m.blocks[1], "experts", GatedExperts(4, h.WIDTH, h.INNER)))
    )
    unequal = ExpertList([nn.Linear(4, 4), nn.Linear(4, 5)])
    refused("experts differ", ModelError, lambda: fully_shard_experts(MoE(unequal, 4, 2, 1), mesh=mesh))
    dropping = ExpertList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)) for _ in range(2))
    refused("dropout", ModelError, lambda: fully_shard_experts(MoE(dropping, 4, 2, 1), mesh=mesh))
    model = h.build()
    refused("unknown policy", OptionError, lambda: fully_shard_experts(model, mesh=mesh, policy="magic"))
    refused("unknown setting", OptionError, lambda: fully_shard_experts(model, mesh=mesh, policy="hecate:magic=1"))
    refused("unknown sharding", OptionError, lambda: fully_shard_experts(model, mesh=mesh, sharding="magic"))
    refused("slots", OptionError, lambda: fully_shard_experts(model, mesh=mesh, step_slots=-1))
    refused(
        "owners",
        OptionError,
        lambda: fully_shard_experts(model, mesh=mesh, owners=np.full((h.LAYERS, h.EXPERTS), world)),
    )
    refused("owners' shape", OptionError, lambda: fully_shard_experts(model, mesh=mesh, owners=np.zeros((1, 3))))
    refused("not sharded", ModelError, lambda: clip_grad_norm_(model, 1.0))
    run = shard(model)  # none of the refusals left a trace
    refused("twice", ModelError, lambda: fully_shard_experts(model, mesh=mesh))
    refused("norm", OptionError, lambda: clip_grad_norm_(model, 1.0, norm_type=0.0))
    refused("no bias", ModelError, lambda: update_correction_bias(model, 0.1))
    refused("reshard shape", OptionError, lambda: run.reshard(np.zeros((1, 1), int)))
    refused("reshard range", OptionError, lambda: run.reshard(run.owners - world))
    refused("policy later", OptionError, lambda: run.set_policy("magic"))
    refused("divide factor", OptionError, lambda: run.set_gradient_divide_factor(0.0))
    loss = h.loss_of(model, h.batch("hot-expert-a-rank", 0, world, 2, rank, torch.float64))
    refused("reshard in a step", OptionError, lambda: run.reshard(run.owners[:, ::-1].copy()))
    loss.backward()
    assert all(isinstance(text, str) and text for text in said.values())
    assert issubclass(ModelError, InputError) and issubclass(OptionError, InputError)
    run.reshard(run.owners[:, ::-1].copy())
    return said


@case
def failed_backward_is_forgotten() -> dict:
    """An error in the middle of a backward pass, the same on all ranks, leaves nothing behind."""
    model = h.build()
    run = shard(model, rematerialise=True)

    def fail(grad: Tensor) -> None:
        raise ArithmeticError("injected")

    handle = model.blocks[0].register_forward_hook(lambda m, i, out: out.register_hook(fail) and None)
    c.raised(ArithmeticError, lambda: c.plain_loss("hot-expert-a-rank")(model, 0).backward())
    handle.remove()
    error = c.follow(model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), average=True)
    assert error <= EXACT, error
    return {"error": error}


@case
def a_norm_that_one_rank_alone_asks_for() -> dict:
    """Its error says what is asked of all ranks; those that go on wait for it, and get one that says so, none of gloo's
    own. A process group of its own: nothing is exchanged in it afterwards."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    model = h.build()
    run = shard(model, mesh=DeviceMesh.from_group(group, "cpu"), policy="expert-parallelism")
    first = dist.get_rank() == 0
    weight = next(iter(model.blocks[0].experts.parameters()))
    error = None
    try:
        _ = weight.norm() if first else c.plain_loss("hot-expert-a-rank")(model, 0)
    except CommunicationError as caught:
        error = caught
    assert c.agreed(float(error is None)) == 0 and error is not None and run.metrics is not None
    assert "every rank asks" in error.hint and "local_rows" in error.hint, error.hint
    assert "a collective failed on rank" in error.message
    return {"said": error.message}


# ---- 10. derivatives -----------------------------------------------------------------------------------------------


@case
def gradcheck() -> dict:
    """``torch.autograd.gradcheck`` through gather, dispatch, experts and combine, by tokens and routing weights.

    All ranks check at once, each its own tokens, equally many: so all make the same number of forward and backward
    passes, and each pass is one collective step. A token's output depends on that token alone, so that what the other
    ranks perturb at the same time does not enter a rank's Jacobian. gradcheck goes backward many times through one
    graph, with ``retain_graph``. One policy gets every column of the Jacobian, the others random combinations of them.
    """
    world, rank, done = dist.get_world_size(), dist.get_rank(), 0
    for policy, again in (("hecate", False), ("poise", True), ("full-replication", True)):
        model = h.build(layers=1)
        run = shard(model, policy=policy, rematerialise=again)
        rng = torch.Generator().manual_seed(rank)
        x = torch.randn(3, h.WIDTH, dtype=torch.float64, generator=rng, requires_grad=True)
        weights = torch.rand(3, 2, dtype=torch.float64, generator=rng).requires_grad_()
        ids = torch.tensor([[0, 2], [2, 5], [2, 9]])
        assert torch.autograd.gradcheck(lambda x, w, m=model, i=ids: m.blocks[0].experts(x, i, w), (x, weights),
                                        atol=1e-7, fast_mode=few_or(False, policy != "poise"))  # fmt: skip
        done += run.schedule.moved_bytes["gather"] > 0
    assert done >= 2, "replicas took part too seldom"
    return {"with replicas": done, "world": world}


@case
def directional_derivative_of_expert_weights() -> dict:
    """Central differences along a random direction of all owned weights, against ``.grad``."""
    world, rank, worst = dist.get_world_size(), dist.get_rank(), 0.0
    for kind in ("gated", "plain", "list"):
        model = h.build(kind)
        run = shard(model, policy="hecate")
        run.set_gradient_divide_factor(1.0)
        data = h.batch("two-hot", 0, world, 2, rank, torch.float64)
        h.loss_of(model, data).backward()
        owned = sorted(run.parameters(), key=lambda weight: tuple(weight.shape))
        rng = torch.Generator().manual_seed(10 + rank)
        along = [torch.randn(weight.shape, dtype=torch.float64, generator=rng) for weight in owned]
        grads = [c.whole(weight.grad) for weight in owned]
        slope = torch.stack([(grad * v).sum() for grad, v in zip(grads, along, strict=True)]).sum()
        dist.all_reduce(slope)
        ends = []
        for shift in (1e-5, -2e-5):
            for weight, v in zip(owned, along, strict=True):
                weight.data.add_(v, alpha=shift)
            with torch.no_grad():
                ends.append(h.loss_of(model, data))
        total = torch.stack(ends)
        dist.all_reduce(total)
        worst = max(worst, abs((total[0] - total[1]).item() / 2e-5 / slope.item() - 1))
    assert c.agreed(worst) <= 1e-6, worst
    return {"error": worst}


@case
def second_backward() -> dict:
    """Kept graphs go backward again; freed ones, and derivatives of derivatives, raise."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = h.build()
    run = shard(model, rematerialise=True)
    data = h.batch("hot-expert-a-rank", 0, world, 2, rank, torch.float64)
    loss = h.loss_of(model, data)
    loss.backward(retain_graph=True)
    once = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    loss.backward()
    error = max(h.worst({name: w.grad}, {name: 2 * once[name]}) for name, w in model.named_parameters())
    assert c.agreed(error) <= EXACT, error
    x = data.x.clone().requires_grad_()
    ids = data.ids[0]
    out = model.blocks[0].experts(x, ids, torch.full(ids.shape, 0.5, dtype=torch.float64))
    out.sum().backward()
    freed = c.raised(RuntimeError, lambda: out.sum().backward())
    out = model.blocks[0].experts(x, ids, torch.full(ids.shape, 0.5, dtype=torch.float64)).square().sum()
    # refused at once: by ``autograd.grad`` a second derivative would lack what goes through the experts, silently
    twice = c.raised(ModelError, lambda: torch.autograd.grad(out, x, create_graph=True))
    assert "derivatives of derivatives" in twice
    assert run.schedule.ledger.now.get("replicas", 0) >= 0
    return {"freed": freed.splitlines()[0], "twice": twice.splitlines()[0][:120]}
