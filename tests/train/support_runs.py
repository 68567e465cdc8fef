"""Sharded and dense runs, data and comparisons that the cases share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.matrix import machine
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from poise.train import fully_shard_experts, parameter_groups

EXACT = 1e-9
"""Of float64 runs. Hugging Face's norms and routers pass through float32, so that a last bit may flip there: measured
errors are 1e-15 without a flip."""
STEPS = 3


def shard(model: nn.Module, **options: Any) -> Any:
    """On a machine for which replicas pay."""
    world = dist.get_world_size()
    options.setdefault("mesh", h.MESH(world))
    options.setdefault("cluster", machine(options["mesh"].size()))
    options.setdefault("policy", "hecate")
    return fully_shard_experts(model, **options)


def fsdp(model: nn.Module, mesh: Any, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def record_of_dense() -> h.RunRecord:
    return h.dense("hot-expert-a-rank", 2, "adamw", dist.get_world_size())


def mine(
    step: int = 0, workload: str = "hot-expert-a-rank", layers: int = h.LAYERS, dtype: torch.dtype = torch.float64
) -> h.Batch:
    return h.batch(workload, step, dist.get_world_size(), 2, dist.get_rank(), dtype, layers)


def everyone(step: int = 0, workload: str = "hot-expert-a-rank") -> h.Batch:
    return h.batch(workload, step, dist.get_world_size(), 2, None, torch.float64)


def through(model: nn.Module, data: h.Batch, blocks: tuple[int, ...]) -> Tensor:
    """The loss by calling parts of the model: the model's own hooks do not run."""
    x = data.x
    for number in blocks:
        x = model.blocks[number](x, data.ids[number])
    return (model.head(x) - data.target).square().sum() / data.total


def pair(kind: str = "gated", **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    dense, model = h.build(kind), h.build(kind)
    run = shard(model, **options)
    run.set_gradient_divide_factor(1.0)
    return dense, model, run


def apart(model: nn.Module, run: Any, dense: nn.Module) -> float:
    """Largest relative error of any gradient on any rank."""
    h.reduce_dense(model, run)
    wanted = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in dense.named_parameters()}
    return c.agreed(h.worst(c.of_all(model), h.local_rows(model, wanted)))


def some_owners(seed: int, layers: int = h.LAYERS, experts: int = h.EXPERTS) -> np.ndarray:
    """Random: ranks with none or most experts of a layer are likely."""
    return np.random.default_rng(seed).integers(0, dist.get_world_size(), (layers, experts))


def hf_loss_of_step(model: nn.Module, step: int) -> torch.Tensor:
    return c.hf_loss(model, c.hf_tokens(step, dist.get_rank(), dist.get_world_size()))


def dense_run(
    kind: str = "gated", make: Any = None, before_step: Any = None, after: Any = None, steps: int = STEPS
) -> Any:
    """Model and optimizer of a dense run on all tokens; callables see (model, step)."""
    world, model = dist.get_world_size(), h.build(kind)
    optimizer = (make or adamw)(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        h.loss_of(model, h.batch("hot-expert-a-rank", step, world, 2, None, torch.float64)).backward()
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if before_step is not None:
            before_step(model, step)
        optimizer.step()
        if after is not None:
            after(model, step)
    return model, optimizer


def adamw(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.02, weight_decay=0.1)


def train(model: nn.Module, run: Any, optimizer: Any, steps: Any, before_step: Any = None, after: Any = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        c.plain_loss("hot-expert-a-rank")(model, step).backward()
        if not isinstance(next(iter(model.parameters())), c.DTensor):
            c.average_dense(model, run)
        if before_step is not None:
            before_step(model, step)
        optimizer.step()
        if after is not None:
            after(model, step)


def error_of(model: nn.Module, expected: dict[str, Tensor]) -> float:
    """Of all weights against the dense ones, [E, ...]."""
    return c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, expected)))


def turned(run: Any) -> np.ndarray:
    """Other owners for every layer: one expert more here, one less there."""
    owners = run.owners.copy()
    owners[:, 0], owners[:, -1] = owners[:, -1].copy(), owners[:, 0].copy()
    owners[:, 1] = (owners[:, 1] + 1) % dist.get_world_size()
    return owners


def plain_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def trained(kind: str = "gated", wrap: bool = True) -> Any:
    """A model whose owners have moved, its run and its optimizer; and the dense ones."""
    whole, whole_optimizer = dense_run(kind)
    model = h.build(kind)
    run = shard(model)
    if wrap:
        fsdp(model, h.MESH(dist.get_world_size()))
    optimizer = adamw(parameter_groups(model))
    train(model, run, optimizer, range(1))
    run.reshard(turned(run))
    train(model, run, optimizer, range(1, STEPS))
    return model, run, optimizer, whole, whole_optimizer


def moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    return {name: optimizer.state[weight]["exp_avg"] for name, weight in model.named_parameters()}


def moments_error(model: nn.Module, optimizer: Any, whole: nn.Module, whole_optimizer: Any) -> float:
    mine = {name: c.whole(value) for name, value in moments(model, optimizer).items()}
    return c.agreed(h.worst(mine, h.local_rows(model, moments(whole, whole_optimizer))))
