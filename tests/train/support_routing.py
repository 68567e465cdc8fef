"""Cases about ranks that are out of step, and about ids that name no expert: right, or the same error on every rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_runs import EXACT, apart, everyone, mine, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from poise.runtime.moe import ExpertList
from poise.train.gradients import update_correction_bias
from poise.util.errors import CommunicationError, ModelError, OptionError, PoiseError

POLICIES = ("expert-parallelism", "hecate", "poise", "ultra-ep", "llep", "full-replication")
SOME_POLICIES = few_or(POLICIES, POLICIES[:3])
E = h.EXPERTS


def alone(model: nn.Module, policy: str = "poise", **options: Any) -> Any:
    """On process groups of its own: ranks that were out of step have begun unequally many exchanges on them."""
    group = dist.new_group()
    return shard(model, mesh=DeviceMesh.from_group(group, "cpu"), policy=policy, **options)


def said_by_all(action: Callable[[], Any], kind: type[PoiseError] = CommunicationError) -> str:
    """The error that every rank gets, by a meeting and not by a time-out; the same words on all."""
    said = c.raised(kind, action)
    words: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(words, said.replace(f"rank {dist.get_rank()}: ", ""))
    assert "failed on rank" not in said, said
    assert kind is not CommunicationError or len(set(words)) == 1, words
    return said.splitlines()[0]


def odd() -> bool:
    """Whether this is the rank that does otherwise than the others."""
    return dist.get_rank() == 1


# ---- 1. out of step -------------------------------------------------------------------------------------------------


@case
def blocks_that_ranks_leave_out() -> dict:
    """Each rank leaves out another block: tokens would meet the experts of another layer."""
    said = {}
    for number, policy in enumerate(SOME_POLICIES):
        model = h.build()
        alone(model, policy, rematerialise=number % 2 == 1)
        data, leave_out = mine(), dist.get_rank() % 2

        def run(model: nn.Module = model, data: h.Batch = data, leave_out: int = leave_out) -> None:
            x = data.x
            for block, ids in list(zip(model.blocks, data.ids, strict=True))[leave_out : leave_out + 1]:
                x = block(x, ids)

        said[policy] = said_by_all(run)
        assert "rank 1 is in layer 1, forward, pass 1; rank 0 in layer 0, forward, pass 1" in said[policy]
    return said


@case
def backward_passes_that_one_rank_leaves_out() -> dict:
    """It goes forward again, while the others compute again under their checkpoint, or go backward."""
    said = {}
    for number, policy in enumerate(SOME_POLICIES):
        for again in few_or((False, True), (number % 2 == 1,)):
            model = h.build()
            alone(model, policy, rematerialise=again)

            def steps(model: nn.Module = model, again: bool = again) -> None:
                for step in range(3):
                    loss = dropping_loss(model, mine(step), again)
                    if step != 1 or not odd():
                        loss.backward()

            said[policy] = said_by_all(steps)
            doing = "recomputation" if again else "backward"
            assert f"rank 1 is in layer 0, forward, pass 3; rank 0 in layer 1, {doing}, pass 2" in said[policy]
    return said


@case
def parts_of_a_backward_pass_on_one_rank() -> dict:
    """A block detached on one rank; losses in another order; checkpoints, or weights' gradients, on one rank alone."""
    said = {}

    def attempt(name: str, action: Callable[[nn.Module, Any], None], expected: str, **options: Any) -> None:
        model = h.build()
        run = alone(model, "full-replication", **options)
        said[name] = said_by_all(lambda: action(model, run))
        assert expected in said[name], said[name]

    def detached(model: nn.Module, run: Any) -> None:
        data = mine()
        x = model.blocks[0](data.x, data.ids[0])
        model.blocks[1](x.detach().requires_grad_() if odd() else x, data.ids[1]).sum().backward()

    def first_only(model: nn.Module, run: Any) -> None:
        data = mine()
        x = model.blocks[0](data.x, data.ids[0])
        (y := model.blocks[1](x, data.ids[1]))
        (x if odd() else y).sum().backward()

    def order(model: nn.Module, run: Any) -> None:
        losses = [h.loss_of(model, mine(step)) for step in (0, 1)]
        for loss in losses[::-1] if odd() else losses:
            loss.backward()

    def checkpointed(model: nn.Module, run: Any) -> None:
        dropping_loss(model, mine(), odd()).backward()

    def unsynchronised(model: nn.Module, run: Any) -> None:
        run.set_requires_gradient_sync(not odd())
        h.loss_of(model, mine()).backward()

    def of_tokens_alone(model: nn.Module, run: Any) -> None:
        data = mine()
        data.x.requires_grad_()
        loss = h.loss_of(model, data)
        torch.autograd.grad(loss, data.x) if odd() else loss.backward()

    attempt("detached", detached, "layers still to come: 0 on rank 1, 1 on rank 0")
    attempt("first only", first_only, "rank 1 is in layer 0, backward, pass 1; rank 0 in layer 1, backward, pass 1")
    attempt("order", order, "rank 1 is in layer 1, backward, pass 2; rank 0 in layer 1, backward, pass 1")
    attempt("checkpoint", checkpointed, "activation checkpointing: True on rank 1, False on rank 0")
    attempt("sync", unsynchronised, "synchronised: False on rank 1, True on rank 0")
    attempt("tokens alone", of_tokens_alone, "whether weights get gradients: False on rank 1, True on rank 0")
    return said


@case
def what_one_rank_is_told() -> dict:
    """Modes, options, models and optimizer steps that differ between ranks, where plans would silently differ."""
    said = {}

    def attempt(name: str, action: Callable[[nn.Module, Any], Any], expected: str) -> None:
        model = h.build()
        run = alone(model, "poise")
        h.loss_of(model, mine()).backward()
        said[name] = said_by_all(lambda: action(model, run))
        assert expected in said[name], said[name]

    def evaluates(model: nn.Module, run: Any) -> None:
        with torch.no_grad() if odd() else nullcontext():
            h.loss_of(model, mine(1))

    def mode(model: nn.Module, run: Any) -> None:
        h.loss_of(model.train(not odd()), mine(1))

    def policy(model: nn.Module, run: Any) -> None:
        if odd():
            run.set_policy("hecate:overlap=3")
        h.loss_of(model, mine(1))

    def frozen(model: nn.Module, run: Any) -> None:
        model.blocks[0].experts.requires_grad_(not odd())
        h.loss_of(model, mine(1))

    def steps(model: nn.Module, run: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if not odd():  # a loss that is not finite on one rank
            optimizer.step()
        h.loss_of(model, mine(1))

    def third_step(model: nn.Module, run: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):  # windows are measured after the third
            if step < 2 or not odd():
                optimizer.step()
            h.loss_of(model, mine(step)).backward()

    def owners(model: nn.Module, run: Any) -> None:
        run.reshard(run.owners[:, ::-1].copy() if odd() else run.owners)

    def other_model(model: nn.Module, run: Any) -> None:
        second = h.build()
        shard(second, mesh=DeviceMesh.from_group(run.schedule.deployment.tokens_group, "cpu"))
        h.loss_of(second if odd() else model, mine(1))

    attempt("gradients", evaluates, "whether gradients are recorded: False on rank 1, True on rank 0")
    attempt("mode", mode, "training: False on rank 1, True on rank 0")
    attempt("policy", policy, "options: ")
    attempt("frozen", frozen, "trained weights: [] on rank 1")
    attempt("steps", steps, "optimizer steps: 0 on rank 1, 1 on rank 0")
    attempt("third step", third_step, "rank 1 is in layer 0, forward, pass 4; rank 0 in optimizer step")
    attempt("owners", owners, "in moving owners, owners: ")
    attempt(
        "model", other_model, "rank 1 is in layer 0, forward, pass 1 of model 1; rank 0 in layer 0, forward, pass 2"
    )
    return said


@case
def experts_that_fail_on_one_rank() -> dict:
    """It raises its own error and skips the batch: nobody waits for its tokens, forward or backward."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if trap["forward"] and odd():
                raise FloatingPointError("forward")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            if trap["backward"] and odd():
                raise FloatingPointError("backward")
            return grads[0]

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(h.WIDTH, h.INNER), nn.Linear(h.INNER, h.WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(Fails.apply(torch.tanh(self.up(x))))

    said = {}
    for way in ("forward", "backward"):
        trap = {"forward": False, "backward": False}
        model = h.build("list", layers=1)
        model.blocks[0].experts = ExpertList(Expert().double() for _ in range(E))
        alone(model, "full-replication", rematerialise=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def steps(model: nn.Module = model, trap: dict[str, bool] = trap, way: str = way, o: Any = optimizer) -> None:
            for step in range(3):
                trap[way] = step == 1
                try:
                    h.loss_of(model, mine(step, layers=1)).backward()
                    o.step()
                except FloatingPointError:
                    assert odd()

        said[way] = said_by_all(steps)
        assert any(weight.grad.isnan().any() for weight in model.parameters()) == (way == "backward")
    return said


# ---- 2. ids ---------------------------------------------------------------------------------------------------------


def step_of(block: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """A block whose router gives no number where it names no expert: whatever stands there counts for nothing."""
    x = x + torch.tanh(block.mix(x))
    named = (ids >= 0) & (ids < E)
    weights = block.gate(x).softmax(-1).gather(1, ids.clamp(0, E - 1))
    return x + block.experts(x, ids, torch.where(named, weights, torch.nan))


def dropping_loss(model: nn.Module, data: h.Batch, again: bool) -> Tensor:
    x = data.x
    for block, ids in zip(model.blocks, data.ids, strict=True):
        x = checkpoint(step_of, block, x, ids, use_reentrant=False) if again else step_of(block, x, ids)
    return (model.head(x) - data.target).square().sum() / data.total


def dropped(data: h.Batch, how: str, first: int) -> h.Batch:
    """Ids of -1 and E in place of some; ``first``: the number of the first token among all ranks'."""
    out = []
    for layer, ids in enumerate(data.ids):
        token = torch.arange(first, first + len(ids))[:, None]
        k = torch.arange(ids.shape[1])
        drop = (token * 7 + 3 * k + layer) % 3 == 0
        if how == "a rank":
            drop = drop | (token // h.TOKENS == 1)
        if how == "all":
            drop = torch.ones_like(drop)
        out.append(torch.where(drop, torch.where((token + k) % 2 == 0, -1, E), ids))
    return h.Batch(data.x, data.target, out, data.total)


WAYS = ("some", "a rank", "all")


Cell = tuple[str, str, bool, bool]
"""Policy, which tokens are without experts, whether blocks are under a checkpoint, whether replicas are gathered again."""
CELLS: list[Cell] = [
    (policy, how, (number + way) % 2 == 0, number % 2 == 1)
    for number, policy in enumerate(POLICIES)
    for way, how in few_or(list(enumerate(WAYS)), [(number % 3, WAYS[number % 3])])
]
SOME_CELLS: list[Cell] = [
    ("expert-parallelism", "all", True, False),
    ("poise", "some", False, True),
    ("full-replication", "a rank", True, True),
]


@case
def pairs_without_an_expert(cells: list[Cell] = CELLS) -> dict:
    """-1 and E are not sent, computed, counted or differentiated; with every policy, and when computed again."""
    errors, rank = {}, dist.get_rank()
    for policy, how, again, rematerialise in cells:
        dense, model = h.build(), h.build()
        run = shard(model, policy=policy, rematerialise=rematerialise)
        run.set_gradient_divide_factor(1.0)
        for step in range(2):
            model.zero_grad(), dense.zero_grad()
            whole, part = dropped(everyone(step), how, 0), dropped(mine(step), how, rank * h.TOKENS)
            whole.x.requires_grad_(), part.x.requires_grad_()
            dropping_loss(dense, whole, False).backward()
            dropping_loss(model, part, again).backward()
            finite = all(grad.isfinite().all() for grad in (part.x.grad, *c.of_all(model).values()))
            assert c.agreed(float(not finite)) == 0, (policy, how)  # the largest of a number and NaN is the number
            rows = slice(rank * h.TOKENS, (rank + 1) * h.TOKENS)
            of_tokens = c.agreed((part.x.grad - whole.x.grad[rows]).abs().max().item())
            key = f"{policy}, {how}"
            errors[key] = max(errors.get(key, 0.0), of_tokens, apart(model, run, dense))
            real = int(sum((ids >= 0).sum() - (ids == E).sum() for ids in whole.ids))
            assert sum(one.tokens_D.sum() for one in run.metrics) == real
            assert run.schedule.planner.history.of(0)[-1].sum() <= real
    assert max(errors.values()) <= EXACT, errors
    return errors


def some_pairs_without_an_expert() -> dict:
    """Another way of tokens: in ``make test`` each way of leaving experts out once, with replicas that are gathered again."""
    return pairs_without_an_expert(few_or(CELLS, SOME_CELLS))


@case
def pairs_without_an_expert_when_forced() -> dict:
    """``force_balance`` evens out what the router named, and no more."""
    model = h.build()
    run = shard(model, force_balance=True)
    data = dropped(mine(), "some", dist.get_rank() * h.TOKENS)
    dropping_loss(model, data, False).backward()
    real = torch.tensor([sum(int(((ids >= 0) & (ids < E)).sum()) for ids in data.ids)])
    dist.all_reduce(real)
    assert sum(one.tokens_D.sum() for one in run.metrics) == real.item()
    return {"pairs": real.item()}


@case
def ids_that_cannot_be() -> dict:
    """Wrong on one rank, refused on all; then the run goes on, and is exact."""
    dense, model = h.build(), h.build()
    run = shard(model, policy="poise")
    run.set_gradient_divide_factor(1.0)
    data, said = mine(), {}
    weights = torch.full(data.ids[0].shape, 0.5, dtype=torch.float64)
    ids = data.ids[0]
    wrong: dict[str, tuple[Tensor, Tensor, Tensor]] = {
        "too large": (data.x, torch.where(ids == ids[0, 0], E + 1, ids), weights),
        "too small": (data.x, torch.where(ids == ids[0, 0], -2, ids), weights),
        "float": (data.x, ids.double(), weights),
        "shape of weights": (data.x, ids, weights[:, :1]),
        "number of weights": (data.x, ids, weights[:-1]),
        "number of ids": (data.x, ids[:-1], weights[:-1]),
        "width": (data.x[:, :-1], ids, weights),
    }
    for name, given in wrong.items():
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                experts = model.blocks[0].experts
                said[name] = said_by_all(
                    lambda given=given, experts=experts: experts(*(given if odd() else (data.x, ids, weights))),
                    ModelError,
                )
        assert ("rank 1: " in said[name]) != odd(), said[name]
    assert f"outside 0..{E - 1}, as {E + 1} does" in said["too large"]
    c.raised(ModelError, lambda: dense.blocks[0].experts(*wrong["too large"]))
    h.loss_of(dense, everyone(1)).backward()
    h.loss_of(model, mine(1)).backward()
    error = apart(model, run, dense)
    assert error <= EXACT, error

    def by_weights() -> None:
        loss = h.loss_of(model, mine(2))
        torch.autograd.grad(loss, model.blocks[1].experts.down_proj) if odd() else loss.backward()

    said["gradients"] = said_by_all(by_weights, ModelError)
    h.loss_of(model, mine(3))  # what that pass has left behind is given up
    return {"error": error, **said}


# ---- 3. loads -------------------------------------------------------------------------------------------------------


class Biased(nn.Module):
    """A block whose choice is moved by a correction bias; notes what it chose when it was trained."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.experts = block, block.experts
        del block.experts
        self.register_buffer("e_score_correction_bias", torch.zeros(E, dtype=torch.float32))
        self.seen = torch.zeros(E)

    def forward(self, x: Tensor) -> Tensor:
        score = self.block.gate(x).sigmoid()
        ids = (score + self.e_score_correction_bias).topk(2, dim=-1).indices
        if self.training and torch._C._current_graph_task_id() == -1:
            self.seen += torch.bincount(ids.flatten(), minlength=E)
        return x + self.experts(x, ids, score.gather(1, ids))


@case
def loads_of_the_first_iteration() -> dict:
    """Micro-batches of every iteration, also before an optimizer is known; no evaluation, nothing computed again."""
    moved, rate = {}, 1e-3
    for number, policy in enumerate(("poise", "hecate")):
        for dropped_by in few_or(("step", "zero_grad"), (("step", "zero_grad")[number],)):
            model = h.build(dtype=torch.float32)
            model.blocks = nn.ModuleList(Biased(block) for block in model.blocks)
            shard(model, policy=policy)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            want = [torch.zeros(E) for _ in model.blocks]
            for step in range(few_or(3, 2)):
                for micro in range(few_or(3, 2)):
                    x = mine(3 * step + micro, dtype=torch.float32).x
                    for block in model.blocks:
                        x = checkpoint(block, x, use_reentrant=False)
                    x.square().sum().backward()
                    with torch.no_grad():
                        for block in model.eval().blocks:
                            x = block(x.detach())
                        model.train()
                for block, bias in zip(model.blocks, want, strict=True):
                    dist.all_reduce(block.seen)
                    bias += rate * torch.sign(block.seen.mean() - block.seen)
                    block.seen.zero_()
                assert update_correction_bias(model, rate) == len(model.blocks)
                if dropped_by == "step":
                    optimizer.step()
                optimizer.zero_grad()
            error = max(
                (b.e_score_correction_bias - w).abs().max().item() for b, w in zip(model.blocks, want, strict=True)
            )
            assert c.agreed(error) <= 1e-7, (policy, dropped_by, error)
            moved[f"{policy}, {dropped_by}"] = want[0].abs().max().item()
    return moved


@case
def biases_that_would_not_move() -> dict:
    """Steps of 1e-3 are rounded away near 1 in bfloat16, and to others near 0."""
    model = h.build(dtype=torch.bfloat16)
    model.blocks = nn.ModuleList(Biased(block) for block in model.blocks)
    model.to(torch.bfloat16)
    shard(model)
    x = mine(dtype=torch.bfloat16).x
    for block in model.blocks:
        x = block(x)
    x.sum().backward()
    said = said_by_all(lambda: update_correction_bias(model, 1e-3), OptionError)
    assert "0.0078125" in said and "0.001" in said and "bfloat16" in said
    for block in model.blocks:
        block.e_score_correction_bias = block.e_score_correction_bias.float() + 1
    assert update_correction_bias(model, 1e-3) == 2
    step = (model.blocks[0].e_score_correction_bias - 1).abs()
    assert np.isclose(step[step > 0].numpy(), 1e-3, rtol=1e-3).all() and step.max() > 0
    return {"said": said}
