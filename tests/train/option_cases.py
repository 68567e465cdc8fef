"""Random combinations of options of ``fully_shard_experts``, and of what a loop does with them, against a dense run.

torchrun --standalone --nproc-per-node 2 tests/train/option_cases.py --out results.jsonl [case ...]

A seed is a case: its number draws everything, alike on all ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.matrix import POLICIES
from tests.train.support_runs import apart, shard

EXACT = 1e-11
SEEDS = few_or(range(300), range(8))
STEPS = 3
WORKLOADS = tuple(h.WORKLOADS)


def drawn(rng: np.random.Generator) -> dict[str, Any]:
    """Options of a run."""

    def one_of(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    world = dist.get_world_size()
    policy = one_of(*h.policies())
    return {
        "policy": POLICIES.get(policy, policy), "rematerialise": one_of(False, True, 3000.0),
        "prefetch": one_of(0, 1, 2), "accumulate_bytes": one_of(None, 0.0, 3000.0),
        "traffic": one_of("home", "home_device_dedup", "auto"), "form": one_of("auto", "direct", "node", "tree"),
        "step_slots": one_of(0, 1, 2, 4), "sharding": one_of("even", "balanced"), "gather_dtype": None,
        "owners": one_of(None, rng.integers(0, world, (h.LAYERS, h.EXPERTS))),
    }  # fmt: skip


def frozen(rng: np.random.Generator, dense: nn.Module, model: nn.Module) -> list[str]:
    """Some weights of experts are not trained: whole names of a layer, as they are stacked."""
    names = [name for name, _ in dense.named_parameters() if ".experts." in name]
    chosen = [name for name in names if rng.random() < 0.2] if rng.random() < 0.4 else []
    for name in chosen:
        for one in (dense, model):
            one.get_parameter(name).requires_grad_(False)
    return chosen


def loss_of(model: nn.Module, workload: str, number: int, top_k: int, rank: int | None) -> Tensor:
    return h.loss_of(model, h.batch(workload, number, dist.get_world_size(), top_k, rank, torch.float64))


def difference(seed: int) -> dict[str, Any]:
    """The largest relative error of any loss, gradient and weight of a run, on any rank."""
    rng = np.random.default_rng([seed, 77])
    kind, top_k = ("gated", "plain")[int(rng.integers(2))], int(rng.integers(1, 4))
    dense, model = h.build(kind), h.build(kind)
    held, options = frozen(rng, dense, model), drawn(rng)
    run = shard(model, **options)
    run.set_gradient_divide_factor(1.0)
    name = ("sgd", "adamw")[int(rng.integers(2))]
    optimizers = [h.make_optimizer(name, one) for one in (dense, model)]
    run.attach(optimizers[1])
    error, number, done = 0.0, 0, []
    for _ in range(STEPS):
        micro, every, drop = int(rng.integers(1, 4)), rng.random() < 0.3, int(rng.integers(-2, 3))
        to_none = bool(rng.random() < 0.5)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for at in range(micro):
            workload, number = WORKLOADS[int(rng.integers(len(WORKLOADS)))], number + 1
            run.set_requires_gradient_sync(every or at == micro - 1)
            losses = [
                loss_of(dense, workload, number, top_k, None),
                loss_of(model, workload, number, top_k, dist.get_rank()),
            ]
            for loss in losses:
                loss.backward()
            total = losses[1].detach().clone()
            dist.all_reduce(total)
            error = max(error, abs(total.item() / losses[0].item() - 1.0))
            if at == drop < micro - 1:
                for one in (dense, model):
                    one.zero_grad(set_to_none=to_none)
            done.append((workload, every, at == drop < micro - 1))
        error = max(error, apart(model, run, dense))
        for weight in dense.parameters():
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        for optimizer in optimizers:
            optimizer.step()
        if rng.random() < 0.5:
            run.reshard(rng.integers(0, dist.get_world_size(), (h.LAYERS, h.EXPERTS)))
    expected = {name: weight.detach() for name, weight in dense.named_parameters()}
    error = c.agreed(max(error, h.worst(c.of_all(model, "weight"), h.local_rows(model, expected))))
    run.schedule.weights_changed()
    assert sum(run.schedule.ledger.now.values()) == 0, run.schedule.ledger.now
    said = {"error": error, "kind": kind, "top_k": top_k, "frozen": held, "optimizer": name, "passes": done,
            **{key: str(value) for key, value in options.items() if key != "owners"}}  # fmt: skip
    assert error <= EXACT, said
    return said


MINE: dict[str, Callable[[], Any]] = {f"seed_{seed}": partial(difference, seed) for seed in SEEDS}

if __name__ == "__main__":
    run_cases(MINE, read_options())
