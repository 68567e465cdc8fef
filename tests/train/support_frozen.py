"""Cases about experts without gradients: frozen, in part or for a while, and evaluation."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_runs import EXACT, apart, everyone, fsdp, mine, pair, record_of_dense, shard

from poise.util.errors import ModelError


@case
def frozen_experts() -> dict:
    """Frozen before or after sharding: no gradient for them, none travels, the rest gets its own."""
    world, errors = dist.get_world_size(), {}
    dense = h.build()
    for block in dense.blocks:
        block.experts.requires_grad_(False)
    h.loss_of(dense, h.batch("hot-expert-a-rank", 0, world, 2, None, torch.float64)).backward()
    expected = {name: weight.grad for name, weight in dense.named_parameters() if weight.requires_grad}
    for before in (True, False):
        for again in (False, True):
            model = h.build()
            if before:
                for block in model.blocks:
                    block.experts.requires_grad_(False)
            run = shard(model, rematerialise=again)
            if not before:
                for weight in run.parameters():
                    weight.requires_grad_(False)
            fsdp(model, h.MESH(world))
            optimizer = h.make_optimizer("adamw", model)
            kept = {weight: weight.detach().clone() for weight in run.parameters()}
            c.plain_loss("hot-expert-a-rank")(model, 0).backward()
            assert all(weight.grad is None for weight in run.parameters()), "a frozen weight has a gradient"
            assert run.schedule.moved_bytes["gather"] > 0 == run.schedule.moved_bytes["reduce"]
            found = {name: c.whole(w.grad) for name, w in model.named_parameters() if w.requires_grad}
            assert found.keys() == expected.keys()
            errors[f"before {before}, rematerialise {again}"] = c.agreed(h.worst(found, expected))
            run.clip_grad_norm_(1.0)
            optimizer.step()
            assert all(torch.equal(weight, value) for weight, value in kept.items())
            assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def frozen_in_part() -> dict:
    """Only one of the experts' matrices trained; thawed later, both are."""
    world, errors = dist.get_world_size(), {}
    for part in ("gate_up_proj", "down_proj"):
        for thaw in (False, True):
            dense, model = h.build(), h.build()
            for block in (*dense.blocks, *model.blocks):
                getattr(block.experts, part).requires_grad_(False)
            run = shard(model)
            if thaw:
                for weight in (*dense.parameters(), *model.parameters()):
                    weight.requires_grad_(True)
            h.loss_of(dense, h.batch("hot-expert-a-rank", 0, world, 2, None, torch.float64)).backward()
            expected = {name: w.grad for name, w in dense.named_parameters() if w.grad is not None}
            c.plain_loss("hot-expert-a-rank")(model, 0).backward()
            names = {name for name, weight in model.named_parameters() if weight.grad is not None}
            assert names == expected.keys(), names ^ expected.keys()
            c.average_dense(model, run)
            full = {name: expected.get(name, torch.zeros_like(w)) for name, w in dense.named_parameters()}
            errors[f"{part}, thawed {thaw}"] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, full)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def frozen_and_thawed() -> dict:
    """``requires_grad`` is looked at in every pass; experts of a list must agree."""
    dense, model, run = pair()
    for weight in run.parameters():
        weight.requires_grad_(False)
    h.loss_of(model, mine()).backward()
    assert all(weight.grad is None for weight in run.parameters())
    for weight in run.parameters():
        weight.requires_grad_(True)
    model.zero_grad()
    h.loss_of(dense, everyone(1)).backward()
    h.loss_of(model, mine(1)).backward()
    error = apart(model, run, dense)
    assert error <= EXACT, error
    some = h.build("list")
    some.blocks[0].experts[3].requires_grad_(False)
    said = c.raised(ModelError, lambda: shard(some))
    assert "expert 3" in said
    return {"error": error, "said": said.splitlines()[0]}


@case
def evaluation() -> dict:
    """``no_grad`` and ``inference_mode`` equal dense, free all, and leave a training step between them alone."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    for again in (False, True):
        model, dense = h.build(), h.build()
        run = shard(model, rematerialise=again)
        fsdp(model, h.MESH(world))
        for name, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
            for workload in ("hot-expert-a-rank", "ragged"):
                data = h.batch(workload, 1, world, 2, rank, torch.float64)
                before = run.schedule.moved_bytes["gather"]
                with mode():
                    out, wanted = model(data.x, data.ids), dense(data.x, data.ids)
                assert c.agreed(float(run.schedule.moved_bytes["gather"] - before)) > 0
                errors[f"{name}, {workload}, {again}"] = c.agreed(h.worst({"": out}, {"": wanted}))
                assert sum(run.schedule.ledger.now.values()) == 0, run.schedule.ledger.now
        loss = c.plain_loss("hot-expert-a-rank")(model, 0)
        with torch.no_grad():  # between a forward pass and its backward
            model(data.x, data.ids)
        loss.backward()
        found = c.of_all(model)
        errors[f"backward after it, {again}"] = c.agreed(
            h.worst(found, h.local_rows(model, record_of_dense().grads[0]))
        )
        assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    return errors
