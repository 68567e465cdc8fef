"""One global gradient norm, every expert counted once; optimizer groups that keep experts and the rest apart; and
the routers' correction bias, moved by global loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from poise.runtime.collectives import reduce_over
from poise.train.sharding import ShardedExperts
from poise.util.errors import ModelError, OptionError


def sharded_layers(model: nn.Module) -> list[ShardedExperts]:
    """The sharded experts of a model in the order they run.

    Raises
    ------
    ModelError : it has none.
    """
    found = [module for module in model.modules() if isinstance(module, ShardedExperts)]
    if not found:
        raise ModelError(f"{type(model).__name__} has no sharded experts", hint="call fully_shard_experts first")
    return sorted(found, key=lambda experts: experts.number)


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    experts = [weight for layer in sharded_layers(model) for weight in layer.parameters()]
    ids = {id(weight) for weight in experts}
    return [weight for weight in model.parameters() if id(weight) not in ids], experts


def parameter_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Two optimizer groups, the dense rest and the experts, with the same options.

    ``foreach`` and ``fused`` optimizers refuse a list that mixes FSDP2's DTensors with plain tensors; per group they
    run on owned shards. Without them ``model.parameters()`` does.
    """
    return [{"params": weights, **options} for weights in _split(model) if weights]


@torch.no_grad()  # type: ignore[untyped-decorator]
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Clip by the norm of all gradients together, the same on every rank; the norm before clipping.

    Experts are counted once, on their owners; the dense rest is FSDP2's DTensors, or replicated and counted once.

    Raises
    ------
    OptionError : the norm type is not above 0.
    """
    if not norm_type > 0:
        raise OptionError(f"norm_type must be above 0, got {norm_type}")
    dense, experts = _split(model)
    schedule = sharded_layers(model)[0].schedule
    assert schedule is not None
    device, infinite = schedule.deployment.device, norm_type == float("inf")
    mine = [weight.grad for weight in experts if weight.grad is not None]
    part = _total(torch._foreach_norm(mine, norm_type) if mine else (), norm_type, device)  # of all experts
    part = part if infinite else part**norm_type
    plain = [w.grad for w in dense if w.grad is not None and not isinstance(w.grad, DTensor)]
    shards = [w.grad for w in dense if isinstance(w.grad, DTensor)]
    rest = [_norm(plain, norm_type, device), *_norms_of_shards(shards, norm_type, device)]
    if infinite:
        total = torch.stack([part, *rest]).max()
    else:
        total = (part + torch.stack(rest).pow(norm_type).sum()) ** (1.0 / norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in (*mine, *plain, *shards):
        grad.mul_(scale.to(grad.device))
    return total


def _norms_of_shards(shards: list[Any], norm_type: float, device: torch.device) -> list[Tensor]:
    """Norms of DTensors, by mesh and placement: those of FSDP2 and of tensor parallelism do not mix in one stack.

    Computed from local shards: torch's own infinity norm raises for an empty shard, on the ranks that have one only.
    """
    groups: dict[Any, list[Any]] = {}
    for grad in shards:
        if any(placement.is_partial() for placement in grad.placements):
            grad = grad.redistribute(placements=[Replicate()] * grad.device_mesh.ndim)
        groups.setdefault((grad.device_mesh, grad.placements), []).append(grad.to_local())
    out, infinite = [], norm_type == float("inf")
    for (mesh, placements), grads in groups.items():
        norm = _norm([grad for grad in grads if grad.numel()], norm_type, device)
        norm = norm if infinite else norm**norm_type
        for dim, placement in enumerate(placements):
            if not placement.is_replicate():
                op = dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM
                reduce_over(norm, op, mesh.get_group(dim))
        out.append(norm if infinite else norm ** (1.0 / norm_type))
    return out


@torch.no_grad()  # type: ignore[untyped-decorator]
def update_correction_bias(model: nn.Module, rate: float) -> int:
    """Balance without an auxiliary loss: ``bias += rate * sign(mean load - load)``; the number of layers changed.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). Call it after the backward pass of a step, on every rank: loads are
    the exact pairs of all ranks and micro-batches, so that every rank makes the same change without a collective.

    Parameters
    ----------
    model : its routers have a buffer ``e_score_correction_bias`` [E], in the module beside the experts.
    rate : step of the bias, gamma in the paper.

    Raises
    ------
    OptionError : ``rate`` below 0, no backward pass was made yet, or a bias of less than float32's precision, in which
        small steps are rounded away. ModelError : no router has such a bias.
    """
    if not rate >= 0:
        raise OptionError(f"the rate must be at least 0, got {rate}")
    sharded_layers(model)
    changed = 0
    for name, module in model.named_modules():
        if not isinstance(module, ShardedExperts):
            continue
        bias = _correction_bias(model.get_submodule(name.rpartition(".")[0]))
        if bias is None:
            continue
        schedule: Any = module.schedule
        recent = schedule.planner.history.of(module.number)
        if not len(recent):
            raise OptionError(f"no loads are known of {name}", hint="call it after a backward pass")
        if bias.element_size() < 4:  # torch.finfo(bias.dtype).eps is what a step is rounded to, near 1
            raise OptionError(
                f"e_score_correction_bias beside {name} is {bias.dtype}, whose numbers near 1 are"
                f" {torch.finfo(bias.dtype).eps:g} apart: more than steps of {rate:g} can bear",
                hint="keep the buffer in float32",
            )
        load_E = torch.from_numpy(recent[-1])
        bias.add_(torch.sign(load_E.mean() - load_E).to(bias), alpha=rate)
        changed += 1
    if not changed:
        raise ModelError(f"no router of {type(model).__name__} has an e_score_correction_bias")
    return changed


def _correction_bias(parent: nn.Module) -> Tensor | None:
    for module in parent.modules():
        bias = getattr(module, "e_score_correction_bias", None)
        if isinstance(bias, Tensor):
            return bias
    return None


def _norm(grads: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    return _total([torch.linalg.vector_norm(grad, norm_type) for grad in grads], norm_type, device)


def _total(norms: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    each = [norm.to(device, torch.float64) for norm in norms] or [torch.zeros((), device=device, dtype=torch.float64)]
    return torch.linalg.vector_norm(torch.stack(each), norm_type)
