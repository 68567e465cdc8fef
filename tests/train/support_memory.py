"""Cases about where weights lie: meta device, offload."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case, case_like
from tests.train.support_runs import EXACT, fsdp, hf_loss_of_step, record_of_dense, shard
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

FULL = StateDictOptions(full_state_dict=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def given_memory(model: nn.Module, run: Any) -> None:
    """``to_empty``; what nobody loads stays NaN."""
    assert all(weight.is_meta for weight in model.parameters())
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
    assert all(weight.device.type == "cpu" for weight in run.parameters())


@case
def meta_device() -> dict:
    """Built without memory, sharded, given memory, loaded from a full state on all ranks or on the first alone."""
    world, errors = dist.get_world_size(), {}
    ways = (("gated", {}, False), ("list", {}, False), ("gated", {"offload": True, "rematerialise": True}, True))
    for kind, options, from_first in ways[few_or(0, 1) :]:
        with torch.device("meta"):
            model = h.build(kind)
        run = shard(model, **options)
        fsdp(model, h.MESH(world))
        given_memory(model, run)
        full = h.build(kind).state_dict() if not from_first or dist.get_rank() == 0 else {}
        set_model_state_dict(model, full, options=FROM_FIRST if from_first else FULL)
        record = (
            record_of_dense() if kind == "gated" else h.dense("hot-expert-a-rank", 2, "adamw", world, kind, steps=3)
        )
        errors[f"{kind}, from the first {from_first}"] = c.follow(model, run, record, c.plain_loss("hot-expert-a-rank"))
    with torch.device("meta"):
        model = h.build()
    run = shard(model)  # without FSDP2 load_state_dict does
    given_memory(model, run)
    model.load_state_dict(h.build().state_dict())
    errors["alone"] = c.follow(model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), average=True)
    assert max(errors.values()) <= EXACT, errors
    return errors


@case_like("meta_device")
def meta_device_hugging_face() -> dict:
    """Buffers that are not in the state (of rotary embeddings) come back by Hugging Face's own initialisation."""
    world = dist.get_world_size()
    with torch.device("meta"):
        model = c.hf_model("qwen3_moe")
    run = shard(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=h.MESH(world))
    fully_shard(model, mesh=h.MESH(world))
    given_memory(model, run)
    rotary = model.model.rotary_emb
    model._init_weights(rotary)
    set_model_state_dict(model, c.hf_model("qwen3_moe").state_dict(), options=FULL)
    assert rotary.inv_freq.isfinite().all()
    error = c.follow(model, run, c.hf_dense("qwen3_moe"), hf_loss_of_step)
    assert error <= EXACT, error
    return {"error": error}


@case
def offload() -> dict:
    """Owned weights computed with elsewhere, or in another type: copies come and go and are counted.

    "cpu:0" is another device than "cpu" by name alone, so that the copies are made where there is but one device.
    """
    world, errors, peaks = dist.get_world_size(), {}, {}
    for where, again in (("cpu", False), ("cpu:0", False), ("cpu:0", True)):
        model = h.build()
        run = shard(model, offload=True, rematerialise=again)
        object.__setattr__(run.schedule.deployment, "device", torch.device(where))  # only another device makes copies
        fsdp(model, h.MESH(world))
        optimizer = h.make_optimizer("adamw", model)
        run.attach(optimizer)
        errors[f"{where}, rematerialise {again}"] = c.follow(
            model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), optimizer=optimizer
        )
        for weight in run.parameters():
            tensors = [weight, weight.grad, *(v for v in optimizer.state[weight].values() if v.dim())]
            assert len(tensors) == 4 and all(t.device.type == "cpu" and t.shape == weight.shape for t in tensors)
        owned = sum(weight.nbytes for weight in run.parameters())
        found = run.memory(optimizer)
        assert found["parameters"] == found["gradients"] == owned and found["states"] >= 2 * owned
        peaks[where, again] = found.get("peak: copies of owned experts", 0), owned
        assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    plain, copies, freed = (peaks[key] for key in (("cpu", False), ("cpu:0", False), ("cpu:0", True)))
    assert c.agreed(float(plain[0] != 0)) == c.agreed(float(copies[0] != copies[1])) == 0, peaks
    assert c.agreed(float(freed[0] > freed[1])) == 0, peaks
    return {**errors, "copies": copies, "re-materialised": freed}


@case_like("offload")
def offload_mixed_precision() -> dict:
    """float32 on the CPU, bfloat16 copies, float32 on the wire: at most 4 times the error of a dense bfloat16 run."""
    world, rank = dist.get_world_size(), dist.get_rank()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    everything = h.batch("hot-expert-a-rank", 0, world, 2, None, torch.float64)
    exact, coarse = h.build(), h.build(dtype=torch.bfloat16)
    h.loss_of(exact, everything).backward()
    truth = {name: weight.grad for name, weight in exact.named_parameters()}
    low = everything.x.to(torch.bfloat16)
    ((coarse(low, everything.ids).double() - everything.target).square().sum() / everything.total).backward()
    bound = h.worst({name: weight.grad for name, weight in coarse.named_parameters()}, truth)
    layers, peaks = 4, {}
    for again in (False, True):
        model = h.build(dtype=torch.float32)
        run = shard(model, offload=True, mp_policy=policy, rematerialise=again)
        fsdp(model, h.MESH(world), mp_policy=policy)
        mine = h.batch("hot-expert-a-rank", 0, world, 2, rank, torch.float32)
        ((model(mine.x, mine.ids).double() - mine.target).square().sum() / mine.total * world).backward()
        assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in model.parameters())
        error = c.agreed(h.worst(c.of_all(model), h.local_rows(model, truth)))
        assert 1e-6 < error <= 4 * bound, (error, bound)
        deep = h.build(dtype=torch.float32, layers=layers)
        run = shard(
            deep, offload=True, mp_policy=policy, rematerialise=again, policy="expert-parallelism", step_slots=0
        )
        data = h.batch("hot-expert-a-rank", 0, world, 2, rank, torch.float32, layers=layers)
        h.loss_of(deep, data).backward()
        owned = [sum(weight.nbytes for weight in one.parameters()) // 2 for one in run.schedule.layers]
        most = sum(owned) if not again else max(a + b for a, b in pairwise(owned))
        peaks[again] = run.schedule.ledger.peak_parts.get("copies of owned experts", 0), most
        assert sum(run.schedule.ledger.now.values()) == 0
    assert c.agreed(float(peaks[False][0] != peaks[False][1])) == 0, peaks
    assert c.agreed(float(not 0 < peaks[True][0] <= peaks[True][1] < peaks[False][0])) == 0, peaks
    return {"error": error, "bound": bound, "copies": peaks[False], "re-materialised": peaks[True]}
