"""Cases about other ways to recompute: saved-tensor hooks, checkpoints that are selective, nested, retained."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case, case_like
from tests.train.support_runs import EXACT, shard
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten


def moved() -> Any:
    """Saved tensors are kept as copies, as ``save_on_cpu`` does from another device; here it would copy nothing."""
    return saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x)


def record_of(workload: str) -> h.RunRecord:
    """A hot expert on every rank, or ragged tokens and a rank without any; three steps."""
    return h.dense(workload, 2, "adamw", dist.get_world_size(), steps=3)


def composed(change: Any, *, around: Any = None, workloads: tuple[str, ...] = ("hot-expert-a-rank", "ragged")) -> dict:
    """``change`` a block's forward; ``around`` is a context of the model's forward pass.

    With few cases weights are gathered again in the ragged workload alone.
    """
    errors = {}
    for workload in workloads:
        for again in few_or((False, True), (workload == "ragged",)):
            model = h.build()
            run = shard(model, rematerialise=again)
            for block in model.blocks:
                block.forward = change(block.forward)
            loss_of = c.plain_loss(workload)

            def inside(m: nn.Module, step: int, loss_of: Any = loss_of) -> Tensor:
                with around() if around is not None else nullcontext():
                    return loss_of(m, step)

            errors[f"{workload}, rematerialise {again}"] = c.follow(
                model, run, record_of(workload), inside, average=True
            )
            assert sum(run.schedule.ledger.now.values()) == 0, run.schedule.ledger.now
            assert [one.layer for one in run.metrics] == list(range(h.LAYERS))
    assert max(errors.values()) <= EXACT, errors
    return errors


def recomputed(forward: Any, **options: Any) -> Any:
    return partial(checkpoint, forward, use_reentrant=False, **options)


def under(context: Any, forward: Any) -> Any:
    def call(*inputs: Any) -> Any:
        with context():
            return forward(*inputs)

    return call


@case
def saved_tensors_elsewhere() -> dict:
    """Hooks around the forward pass: ``save_on_cpu``, and copies; weights that come and go are copied too."""
    out = composed(lambda forward: forward, around=save_on_cpu, workloads=("hot-expert-a-rank",))
    return {"save_on_cpu": out, "copies": composed(lambda forward: forward, around=moved, workloads=("ragged",))}


@case_like("saved_tensors_inside_checkpoint")
def saved_tensors_around_checkpoint() -> dict:
    return composed(recomputed, around=moved)


@case
def saved_tensors_inside_checkpoint() -> dict:
    """Nothing inside is computed again then, but what is outside may be."""
    return {
        "all of a block": composed(lambda forward: recomputed(under(moved, forward)), workloads=("hot-expert-a-rank",)),
        "its experts": experts_under_hooks(),
    }


def experts_under_hooks() -> dict:
    def change(forward: Any) -> Any:
        block = forward.__self__
        block.experts.forward = under(moved, block.experts.forward)
        return recomputed(forward)

    return composed(change)


@case
def selective_checkpoint() -> dict:
    """Outputs of chosen operations are kept, outside of the experts: those are always computed again, all of them."""
    out = {}
    for name, chosen in {
        **few_or({"products": [aten.mm.default, aten.addmm.default]}, {}),
        "what planning uses too": [
            aten.index.Tensor, aten.sort.stable, aten.index_select.default, aten.gather.default, aten.tanh.default,
            aten.cumsum.default, aten.new_empty.default, aten.select.int,
        ],
    }.items():  # fmt: skip
        contexts = partial(create_selective_checkpoint_contexts, chosen)
        out[name] = composed(
            lambda forward, contexts=contexts: recomputed(forward, context_fn=contexts), workloads=("ragged",)
        )

    def everything(*_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    contexts = partial(create_selective_checkpoint_contexts, everything)
    out["everything"] = composed(lambda forward: recomputed(forward, context_fn=contexts), workloads=("ragged",))
    return out


def after_tanh(forward: Any) -> Any:
    return lambda *inputs: torch.tanh(forward(*inputs))


@case_like("nested_checkpoint_two_passes_open")
def nested_checkpoint() -> dict:
    """Checkpoints of the experts in one of the block, three deep; and two passes open, of equal tokens."""

    def thrice(forward: Any) -> Any:
        block = forward.__self__
        block.experts.forward = recomputed(recomputed(block.experts.forward))
        return recomputed(forward)

    return composed(thrice)


@case
def nested_checkpoint_two_passes_open() -> dict:
    """Equal ids in both, which do not tell which is computed again, or other ids, which a rank without tokens lacks."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    whole = [h.batch(workload, 0, world, 2, None, torch.float64) for workload in ("hot-expert-a-rank", "two-hot")]
    per = len(whole[0].x) // world
    rows = slice(rank * per, (rank + 1) * per if rank else 0)
    keep = slice(per, None)  # the first rank's tokens are nobody's

    def part(data: h.Batch, number: int, where: slice) -> h.Batch:
        return h.Batch((1 + number) * data.x[where], data.target[where], [i[where] for i in data.ids], data.total)

    for order in ((0, 1), (1, 0)):
        for equal in few_or((True, False), (order == (1, 0),)):
            dense, model = h.build(), h.build()
            for block in (*dense.blocks, *model.blocks):  # something after the experts keeps a tensor
                block.forward = after_tanh(block.forward)
            run = shard(model, rematerialise=True)
            for block in model.blocks:
                block.experts.forward = recomputed(block.experts.forward)
                block.forward = recomputed(block.forward)
            losses = []
            for number in range(2):
                data = whole[0 if equal else number]
                h.loss_of(dense, part(data, number, keep)).backward()
                run.set_policy("hecate" if number else "full-replication")
                losses.append(h.loss_of(model, part(data, number, rows)))
            for number in order:
                (losses[number] * world).backward()
            c.average_dense(model, run)
            expected = {name: weight.grad for name, weight in dense.named_parameters()}
            errors[f"{order}, equal {equal}"] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def checkpoint_retained() -> dict:
    """Twice backward through a kept graph under checkpointing, plain and nested."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    for workload in ("hot-expert-a-rank", "ragged"):
        for depth in few_or((1, 2), (1 + (workload == "ragged"),)):
            for again in few_or((False, True), (workload == "ragged",)):
                dense, model = h.build(), h.build()
                h.loss_of(dense, h.batch(workload, 0, world, 2, None, torch.float64)).mul(2).backward()
                expected = {name: weight.grad for name, weight in dense.named_parameters()}
                run = shard(model, rematerialise=again)
                for block in model.blocks:
                    block.forward = recomputed(recomputed(block.forward) if depth == 2 else block.forward)
                loss = h.loss_of(model, h.batch(workload, 0, world, 2, rank, torch.float64)) * world
                loss.backward(retain_graph=True)
                loss.backward()
                c.average_dense(model, run)
                what = f"{workload}, depth {depth}, rematerialise {again}"
                errors[what] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
                assert sum(run.schedule.ledger.now.values()) == 0, what
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def checkpoint_same_layer_twice() -> dict:
    """One region runs a layer twice, on equal ids and on others: again in the same order, on a rank without tokens."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}

    def twice(forward: Any, shift: int) -> Any:
        return lambda x, ids: forward(torch.tanh(forward(x, ids)), (ids + shift) % h.EXPERTS)

    for shift in (0, 3):
        for depth in few_or((1, 2), (2 - shift // 3,)):
            dense, model = h.build(), h.build()
            run = shard(model, policy="hecate:overlap=3", rematerialise=True)
            for block in dense.blocks:
                block.forward = twice(block.forward, shift)
            for block in model.blocks:
                block.forward = recomputed(twice(recomputed(block.forward) if depth == 2 else block.forward, shift))
            for step in range(2):
                dense.zero_grad()
                h.loss_of(dense, h.batch("ragged", step, world, 2, None, torch.float64)).backward()
                model.zero_grad()
                (h.loss_of(model, h.batch("ragged", step, world, 2, rank, torch.float64)) * world).backward()
            c.average_dense(model, run)
            expected = {name: c.whole(weight.grad) for name, weight in dense.named_parameters()}
            errors[f"shift {shift}, depth {depth}"] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case_like("checkpoint_retained")
def checkpoint_retained_over_another_step() -> dict:
    """A kept graph goes backward again after another forward and backward pass."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    for depth in (0, 1, 2):
        dense, model = h.build(), h.build()
        run = shard(model, rematerialise=True)
        for block in model.blocks:
            for _ in range(depth):
                block.forward = recomputed(block.forward)
        for step, times in ((0, 2), (1, 1)):
            h.loss_of(dense, h.batch("ragged", step, world, 2, None, torch.float64)).mul(times).backward()
        first = h.loss_of(model, h.batch("ragged", 0, world, 2, rank, torch.float64)) * world
        first.backward(retain_graph=True)
        second = h.loss_of(model, h.batch("ragged", 1, world, 2, rank, torch.float64)) * world
        second.backward()
        first.backward()
        c.average_dense(model, run)
        expected = {name: weight.grad for name, weight in dense.named_parameters()}
        errors[f"depth {depth}"] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
        assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    return errors
