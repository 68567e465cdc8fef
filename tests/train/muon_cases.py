"""Muon on sharded experts (test_muon.py).

torchrun --standalone --nproc-per-node 2 tests/train/muon_cases.py --out results.jsonl [case ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.helpers import few_or
from tests.ranks import registry
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_runs import fsdp, mine, shard, some_owners

from poise.train import Muon, full_optimizer_state_dict, full_state_dict
from poise.train.hf import ShardedExpertsMixin
from poise.train.rows import plain
from poise.train.states import speak_of_experts
from poise.util.errors import ModelError, OptionError

EXACT = 1e-11
MINE, case = registry()
STEPS = 3


def in_order(model: nn.Module) -> list[Any]:
    return [weight for name, weight in model.named_parameters() if ".experts." in name]


def dense_run(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A dense run on all tokens."""
    world, model = dist.get_world_size(), h.build(kind)
    stacked = [weight for weight in in_order(model) if kind != "list" or weight.dim() == 2]
    muon = Muon(stacked, lr=0.05, ns_dtype=torch.float64)
    held = {id(weight) for weight in stacked}
    adamw = torch.optim.AdamW([weight for weight in model.parameters() if id(weight) not in held], lr=0.01)
    for step in range(STEPS):
        model.zero_grad()
        h.loss_of(model, h.batch("hot-expert-a-rank", step, world, 2, None, torch.float64)).backward()
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        muon.step(), adamw.step()
    return model, muon


def sharded_run(kind: str) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    """The same sharded, with owners that move after every step."""
    model = h.build(kind)
    run = shard(model, owners=some_owners(3))
    run.set_gradient_divide_factor(1.0)
    stacked = [weight for weight in in_order(model) if kind != "list" or len(weight.shape) == 3]
    muon = Muon(stacked, lr=0.05, ns_dtype=torch.float64)
    held = {id(weight) for weight in stacked}
    adamw = torch.optim.AdamW([weight for weight in model.parameters() if id(weight) not in held], lr=0.01)
    for step in range(STEPS):
        model.zero_grad()
        h.loss_of(model, mine(step)).backward()
        h.reduce_dense(model, run)
        muon.step(), adamw.step()
        assert c.agreed(float(run.reshard(some_owners(4 + step)))) > 0
    return model, run, muon


@case
def owned_experts() -> dict:
    """Stacked, or a list whose experts are matrices of their own in the dense model; momentum goes with owners."""
    errors = {}
    for kind in few_or(("gated", "plain", "list"), ("gated", "list")):
        dense, theirs = dense_run(kind)
        model, _, ours = sharded_run(kind)
        wanted = {name: weight.detach() for name, weight in dense.named_parameters()}
        errors[kind] = c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, wanted)))
        if kind == "gated":
            full, weights = full_optimizer_state_dict(ours), in_order(dense)
            if dist.get_rank() == 0:
                for number, weight in enumerate(weights):
                    got = full["state"][number]["momentum_buffer"]
                    assert torch.allclose(got, theirs.state[weight]["momentum_buffer"], rtol=1e-10, atol=1e-14)
    assert max(errors.values()) <= EXACT, errors
    return errors


class Trainer:
    """What the mixin needs of Hugging Face's Trainer: it loads an optimizer's states."""

    def __init__(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        self.optimizer, self.state = optimizer, state

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.optimizer.load_state_dict(self.state)


class Resumes(ShardedExpertsMixin, Trainer):
    """As a user writes it."""


@case
def owners_that_move_before_the_first_step() -> dict:
    """A momentum that Trainer has loaded goes with owners that move at once; left behind, Muon refuses it."""
    model, run, before = sharded_run("gated")
    told = [full_optimizer_state_dict(before)]
    dist.broadcast_object_list(told, 0)
    weights = [weight for weight in in_order(model) if len(weight.shape) == 3]
    after = Muon(weights, lr=0.05, ns_dtype=torch.float64)
    Resumes(after, told[0])._load_optimizer_and_scheduler(None)
    stray = Muon(weights, lr=0.05, ns_dtype=torch.float64)
    for weight in weights:
        stray.state[weight]["momentum_buffer"] = torch.zeros_like(weight).detach()
    speak_of_experts(stray)
    run.reshard(some_owners(9))
    for weight in weights:
        mine, theirs = (plain(one.state[weight]["momentum_buffer"]) for one in (after, before))
        assert mine.shape == plain(weight).shape and torch.equal(mine, theirs), "it stayed with the old owner"
    said = c.raised(ModelError, stray.step)
    assert "before and after a move of owners" in said, said
    after.step()
    return {"said": said}


@case
def what_has_no_whole_matrices() -> dict:
    """FSDP2's shards, and biases of stacked experts, are refused."""
    model = h.build("list")
    shard(model)
    said = [c.raised(OptionError, lambda: Muon([one for one in in_order(model) if len(one.shape) == 2]))]
    assert "2 axes for all experts" in said[0], said
    other = h.build()
    shard(other)
    fsdp(other, h.MESH(dist.get_world_size()))
    said.append(c.raised(OptionError, lambda: Muon([other.head.weight])))
    assert "a part of one" in said[1], said
    full_state_dict(other)
    return {"said": said}


if __name__ == "__main__":
    run_cases(MINE, read_options())
