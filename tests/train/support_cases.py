"""Sharded experts beside the rest of PyTorch and Hugging Face, all cases in one launch.

    torchrun --standalone --nproc-per-node 4 tests/train/support_cases.py --out results.jsonl [case ...]

Every case asserts on all ranks alike and returns what it measured.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case, case_like
from tests.train.support_runs import EXACT, fsdp, record_of_dense, shard

from poise.train import clip_grad_norm_, parameter_groups
from poise.train.gradients import update_correction_bias

# ---- 1. Hugging Face families -------------------------------------------------------------------------------------


def family(name: str) -> dict:
    record = c.hf_dense(name)
    rank, world, errors, moved = dist.get_rank(), dist.get_world_size(), {}, 0
    for policy, again in (("hecate", False), ("poise", True)):
        model = c.hf_model(name)
        run = shard(model, policy=policy, rematerialise=again)
        assert run.owners.shape == (2, c.HF_EXPERTS)
        errors[policy] = c.follow(
            model, run, record, lambda m, s: c.hf_loss(m, c.hf_tokens(s, rank, world)), average=True
        )
        moved += run.schedule.moved_bytes["gather"]
    assert max(errors.values()) <= EXACT, errors
    assert moved > 0, "no replica was ever made"
    return errors


@case
def hf_mixtral() -> dict:
    return family("mixtral")


@case_like("hf_mixtral")
def hf_qwen3_moe() -> dict:
    return family("qwen3_moe")


@case_like("hf_mixtral")
def hf_olmoe() -> dict:
    return family("olmoe")


@case
def hf_gpt_oss() -> dict:
    return family("gpt_oss")


@case
def hf_deepseek_v3() -> dict:
    """Shared experts, a dense first layer, and the correction bias moved by global loads.

    Its router multiplies in float32, where the last bits depend on how many tokens come at once. Against a dense run
    that takes the ranks' tokens one after the other, the error is that of float64; against one that takes them at once,
    that of those two dense runs.
    """
    rank, world, rate = dist.get_rank(), dist.get_world_size(), 0.05

    def dense_run(together: bool) -> tuple[nn.Module, h.RunRecord]:
        loads: dict[str, torch.Tensor] = {}

        def count(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, out: Any) -> None:
                loads[name] = loads.get(name, 0) + torch.bincount(out[2].reshape(-1), minlength=c.HF_EXPERTS)

            return hook

        def by_hand(model: nn.Module, step: int) -> None:
            for name, module in model.named_modules():
                if name in loads:
                    load = loads.pop(name).double()
                    module.e_score_correction_bias += rate * torch.sign(load.mean() - load)

        def loss_of(model: nn.Module, step: int) -> torch.Tensor:
            if together:
                return c.hf_loss(model, c.hf_tokens(step, None, world))
            return torch.stack([c.hf_loss(model, c.hf_tokens(step, one, world)) for one in range(world)]).mean()

        dense = c.hf_model("deepseek_v3")
        for name, module in dense.named_modules():
            if hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(count(name))
        return dense, c.dense_record(dense, loss_of, 4, by_hand)

    dense, record = dense_run(together=False)
    _, other = dense_run(together=True)
    bound = max(
        h.worst(a, b) for a, b in zip([*other.grads, other.weights], [*record.grads, record.weights], strict=True)
    )
    model = c.hf_model("deepseek_v3")
    run = shard(model)

    def by_poise(m: nn.Module, step: int) -> None:
        assert update_correction_bias(m, rate) == 2

    error = c.follow(
        model, run, record, lambda m, s: c.hf_loss(m, c.hf_tokens(s, rank, world)), average=True, after=by_poise
    )
    biases = dict(model.named_buffers())
    for name, bias in dense.named_buffers():
        if name.endswith("e_score_correction_bias"):
            assert bias.abs().max() > 0.9 * rate and torch.equal(bias, biases[name])
    assert error <= EXACT, error
    assert bound <= 1e-5, bound
    fresh = c.hf_model("deepseek_v3")
    shard(fresh)
    said = c.raised(ValueError, lambda: update_correction_bias(fresh, rate))
    return {"error": error, "two dense runs": bound, "said": said.splitlines()[0]}


# ---- 2. the dense rest under FSDP2, HSDP, DDP ----------------------------------------------------------------------


@case
def fsdp2_passes_over_experts() -> dict:
    """No ``ignored_params``: FSDP2 leaves the experts alone, and plain AdamW on ``model.parameters()`` is right."""
    model = h.build()
    mesh = h.MESH(dist.get_world_size())
    run = shard(model, rematerialise=True)
    fsdp(model, mesh)
    owned = run.parameters()
    kinds = {name: type(weight).__name__ for name, weight in model.named_parameters()}
    assert all((kind == "ExpertRows") == (".experts." in name) for name, kind in kinds.items()), kinds
    assert sum(".experts." in name for name in kinds) == len(owned)
    error = c.follow(model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"))
    assert error <= EXACT, error
    return {"error": error}


@case
def fsdp2_ignored_params() -> dict:
    model, mesh = h.build(), h.MESH(dist.get_world_size())
    run = shard(model)
    fsdp(model, mesh, ignored_params=run.parameters(), reshard_after_forward=False)
    error = c.follow(model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"))
    assert error <= EXACT, error
    return {"error": error}


@case
def hsdp() -> dict:
    """A mesh (nodes, devices): experts over all ranks, the rest sharded in a node and replicated over nodes."""
    world, model = dist.get_world_size(), h.build()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    run = shard(model, mesh=mesh)
    fsdp(model, mesh)
    error = c.follow(model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"))
    assert error <= EXACT, error
    return {"error": error}


@case
def ddp() -> dict:
    from torch.nn.parallel import DistributedDataParallel

    model = h.build()
    run = shard(model)
    error = c.follow(
        model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), called=DistributedDataParallel(model)
    )
    assert error <= EXACT, error
    return {"error": error}


@case_like("fsdp2_passes_over_experts")
def hf_fsdp2() -> dict:
    """A Hugging Face model, FSDP2 per decoder layer, gradient checkpointing on."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = c.hf_model("qwen3_moe")
    run = shard(model, rematerialise=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer, mesh=h.MESH(world))
    fully_shard(model, mesh=h.MESH(world))
    error = c.follow(model, run, c.hf_dense("qwen3_moe"), lambda m, s: c.hf_loss(m, c.hf_tokens(s, rank, world)))
    assert error <= EXACT, error
    return {"error": error}


@case
def groups_foreach_fused() -> dict:
    errors = {}
    for kind in ("foreach", "fused"):
        model = h.build()
        run = shard(model)
        fsdp(model, h.MESH(dist.get_world_size()))
        groups = parameter_groups(model, lr=0.01, weight_decay=0.1)
        errors[kind] = c.follow(
            model,
            run,
            record_of_dense(),
            c.plain_loss("hot-expert-a-rank"),
            optimizer=torch.optim.AdamW(groups, **{kind: True}),
        )
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def clip_norms() -> dict:
    """The norm and the clipped gradients equal torch's on the dense model; ten experts on four ranks."""
    world, worst = dist.get_world_size(), 0.0
    for wrap in (True, False):
        dense, model = h.build(), h.build()
        h.loss_of(dense, h.batch("hot-expert-a-rank", 0, world, 2, None, torch.float64)).backward()
        run = shard(model)
        if wrap:
            fsdp(model, h.MESH(world))
        c.plain_loss("hot-expert-a-rank")(model, 0).backward()
        if not wrap:
            c.average_dense(model, run)
        kept = [(w.grad, w.grad.clone()) for one in (dense, model) for w in one.parameters() if w.grad is not None]
        for p in (1.0, 2.0, 3.0, float("inf")):
            for grad, before in kept:
                grad.copy_(before)
            expected = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.01, norm_type=p)
            norm = clip_grad_norm_(model, 0.01, norm_type=p)
            clipped = h.local_rows(model, {name: w.grad for name, w in dense.named_parameters()})
            worst = max(worst, abs(norm.item() / expected.item() - 1), h.worst(c.of_all(model), clipped))
    assert c.agreed(worst) <= EXACT, worst
    return {"error": worst}


# ---- 3. precision --------------------------------------------------------------------------------------------------


@case_like("precision_bfloat16")
def precision_float32() -> dict:
    """Sharded and dense differ by at most 4 times what dense runs differ that add up in other orders."""
    world, out = dist.get_world_size(), {}
    for workload in ("two-hot", "hot-expert-a-rank"):
        dense = h.dense(workload, 2, "sgd", world, dtype=torch.float32, steps=3)
        others = [h.dense(workload, 2, "sgd", world, dtype=torch.float32, steps=3, order=k) for k in (1, 2)]
        bound = max(h.apart(other, dense) for other in others)
        model = h.build(dtype=torch.float32)
        run = shard(model)
        fsdp(model, h.MESH(world))
        error = c.follow(
            model, run, dense, c.plain_loss(workload, torch.float32), optimizer=h.make_optimizer("sgd", model)
        )
        out[workload] = [error, bound]
        assert error <= 4 * bound, out
    return out


@case
def precision_bfloat16() -> dict:
    """``MixedPrecisionPolicy`` for both: against a float64 run, at most 4 times the error of a dense bfloat16 run."""
    world, rank, out = dist.get_world_size(), dist.get_rank(), {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for workload in ("two-hot", "hot-expert-a-rank"):
        exact, coarse = h.build(), h.build(dtype=torch.float32).to(torch.bfloat16)
        exact.load_state_dict(h.build(dtype=torch.float32).state_dict())
        everything = h.batch(workload, 0, world, 2, None, torch.float64)
        h.loss_of(exact, everything).backward()
        truth = {name: weight.grad for name, weight in exact.named_parameters()}
        low = h.Batch(everything.x.to(torch.bfloat16), everything.target, everything.ids, everything.total)
        ((coarse(low.x, low.ids).double() - low.target).square().sum() / low.total).backward()
        bound = h.worst({name: weight.grad for name, weight in coarse.named_parameters()}, truth)
        model = h.build(dtype=torch.float32)
        run = shard(model, mp_policy=policy)
        fsdp(model, h.MESH(world), mp_policy=policy)
        mine = h.batch(workload, 0, world, 2, rank, torch.float32)
        ((model(mine.x, mine.ids).double() - mine.target.double()).square().sum() / mine.total * world).backward()
        assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in model.parameters())
        assert run.schedule.deployment.compute_dtype == torch.bfloat16
        assert run.schedule.deployment.reduce_dtype == torch.float32
        error = c.agreed(h.worst(c.of_all(model), h.local_rows(model, truth)))
        out[workload] = [error, bound]
        assert error <= 4 * bound, out
    return out


@case
def autocast() -> dict:
    """Autocast reaches into the experts; a rank without tokens sends the same type as the others."""
    world, rank = dist.get_world_size(), dist.get_rank()
    dense, model = h.build(dtype=torch.float32), h.build(dtype=torch.float32)
    everything = h.batch("ragged", 0, world, 2, None, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = dense(everything.x, everything.ids)
    ((out.float() - everything.target).square().sum() / everything.total).backward()
    exact = h.build(dtype=torch.float32)
    h.loss_of(exact, everything).backward()
    truth = {name: weight.grad for name, weight in exact.named_parameters()}
    bound = h.worst({name: weight.grad for name, weight in dense.named_parameters()}, truth)
    run = shard(model)
    mine = h.batch("ragged", 0, world, 2, rank, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(mine.x, mine.ids)
    ((out.float() - mine.target).square().sum() / mine.total * world).backward()
    c.average_dense(model, run)
    error = c.agreed(h.worst(c.of_all(model), h.local_rows(model, truth)))
    assert 1e-4 < error <= 4 * bound, (error, bound)
    return {"error": error, "bound": bound}


# ---- all of them ---------------------------------------------------------------------------------------------------


def main() -> None:
    sys.modules.setdefault("tests.train.support_cases", sys.modules["__main__"])
    from tests.train.support import MINE as every

    run_cases(every, read_options())


if __name__ == "__main__":
    main()
