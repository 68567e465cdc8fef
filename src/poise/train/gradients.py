"""One global gradient norm, every expert counted once; and optimizer groups that keep experts and the rest apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from poise.errors import ModelError, OptionError
from poise.train.sharding import ShardedExperts


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
    device, infinite = schedule.device, norm_type == float("inf")
    mine = [weight.grad for weight in experts if weight.grad is not None and weight.grad.numel()]
    part = _norm(mine, norm_type, device)
    part = part if infinite else part**norm_type
    dist.all_reduce(part, op=dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM, group=schedule.tokens_group)
    plain = [w.grad for w in dense if w.grad is not None and not isinstance(w.grad, DTensor)]
    shards = [w.grad for w in dense if isinstance(w.grad, DTensor)]
    rest = [_norm(plain, norm_type, device)]
    if shards:
        norm: Any = torch.nn.utils.get_total_norm(shards, norm_type)
        rest.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device, part.dtype))
    if infinite:
        total = torch.stack([part, *rest]).max()
    else:
        total = (part + torch.stack(rest).pow(norm_type).sum()) ** (1.0 / norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in (*mine, *plain, *shards):
        grad.mul_(scale.to(grad.device))
    return total


def _norm(grads: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), device=device, dtype=torch.float64)
    each = [torch.linalg.vector_norm(grad, norm_type).to(device, torch.float64) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(each), norm_type)
