"""Cases about ``torch.compile`` and other parallelism: pipelines, tensor and sequence parallel."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case, case_like
from tests.train.support_runs import EXACT, fsdp, record_of_dense, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from poise.runtime.moe import GatedExperts, MoE
from poise.train import clip_grad_norm_
from poise.util.errors import ModelError

WIDTH, EXPERTS, MICRO = 8, 6, 4


class Layer(nn.Module):
    """Two matrices in place of attention, and experts that a router chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.moe = MoE(GatedExperts(EXPERTS, WIDTH, 12), WIDTH, EXPERTS, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(x)))
        return x + self.moe(x)


class Stack(nn.Sequential):
    """Layers; :meth:`part` is one stage of them."""

    @staticmethod
    def built(layers: int = 4) -> Stack:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            model = Stack(*(Layer() for _ in range(layers))).to(torch.float64)
            for name, weight in model.named_parameters():
                if "experts" in name:
                    nn.init.normal_(weight, std=0.4)
        return model


def tokens(step: int, number: int, count: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one data-parallel rank, [tokens, WIDTH]."""
    rng = torch.Generator().manual_seed(100 * step + number)
    x, y = (torch.randn(count, WIDTH, dtype=torch.float64, generator=rng) for _ in range(2))
    return x, y


def mean_square(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().mean()


# ---- torch.compile -------------------------------------------------------------------------------------------------


def compiled(backend: str, whole: bool, again: bool, checkpointed: bool = False) -> float:
    """Two steps; the error against dense."""
    torch._dynamo.reset()
    model = h.build()
    run = shard(model, rematerialise=again)
    fsdp(model, h.MESH(dist.get_world_size()))
    if checkpointed:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for part in (model,) if whole else model.blocks:
        part.compile(backend=backend)
    known = record_of_dense()
    record = h.RunRecord(known.losses[:2], known.norms[:2], known.grads[:2], {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        error = c.follow(model, run, record, c.plain_loss("hot-expert-a-rank"), weights=False)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert c.agreed(float(graphs == 0)) == 0, "nothing was compiled"
    assert run.schedule.moved_bytes["gather"] > 0
    assert sum(run.schedule.ledger.now.values()) == 0
    return error


@case
def compile_aot_eager() -> dict:
    """``torch.compile`` of the whole model or of its blocks: the experts break the graph, the rest is compiled."""
    errors = {}
    for whole, again, checkpointed in ((True, True, False), (False, False, True))[: few_or(2, 1)]:
        what = f"whole {whole}, rematerialise {again}, checkpointed {checkpointed}"
        errors[what] = compiled("aot_eager", whole, again, checkpointed)
    assert max(errors.values()) <= EXACT, errors
    return errors


# ---- pipelines ------------------------------------------------------------------------------------------------------


def pipelined(make: Any, *, wrap: bool = False, told: bool = False, layers: int = 4, again: bool = False) -> float:
    """Two stages (or twice two) of two data-parallel ranks; gradients against a dense run, two steps."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    place, dp = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    stages = 4 if make is ScheduleInterleaved1F1B else 2
    per = layers // stages
    dense = Stack.built(layers)
    example = torch.zeros(2, WIDTH, dtype=torch.float64, requires_grad=True) if told else None
    parts, runs, numbers = [], [], range(place, stages, 2)
    for number in numbers:
        part = Stack(*Stack.built(layers)[number * per : (number + 1) * per])
        runs.append(shard(part, mesh=mesh["dp"], rematerialise=again))
        if wrap:
            for layer in part:
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(part, mesh=mesh["dp"])
        parts.append(
            PipelineStage(part, number, stages, torch.device("cpu"), group=mesh["pp"].get_group(),
                          input_args=example, output_args=example)
        )  # fmt: skip
    schedule = make(parts if len(parts) > 1 else parts[0], n_microbatches=MICRO, loss_fn=mean_square)
    worst = 0.0
    for step in range(2):
        dense.zero_grad()
        for number in range(2):
            x, y = tokens(step, number)
            (mean_square(dense(x), y) / 2).backward()
        x, y = tokens(step, dp)
        losses: list[Tensor] = []
        if step:
            for part in parts:
                part.submod.zero_grad()
        if place == 0 and place == (stages - 1) % 2:
            schedule.step(x, target=y, losses=losses)
        elif place == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=losses)
        expected = {name: weight.grad for name, weight in dense.named_parameters()}
        for number, part, run in zip(numbers, parts, runs, strict=True):
            for weight in part.submod.parameters():
                if not wrap and weight not in run.parameters():
                    dist.all_reduce(weight.grad, group=mesh["dp"].get_group())
                    weight.grad /= 2
            names = {name: f"{number * per + int(name.split('.')[0])}.{name.partition('.')[2]}"
                     for name, _ in part.submod.named_parameters()}  # fmt: skip
            wanted = h.local_rows(part.submod, {mine: expected[full] for mine, full in names.items()})
            worst = max(worst, h.worst(c.of_all(part.submod), wanted))
            assert sum(run.schedule.ledger.now.values()) == 0
            assert len(run.metrics) == per and run.schedule.moved_bytes["gather"] > 0
    return c.agreed(worst)


@case_like("pipeline_1f1b")
def pipeline_gpipe() -> dict:
    """Four micro-batches, forward passes all before backward passes."""
    errors = {
        "shapes given": pipelined(ScheduleGPipe, told=True),
        "shapes inferred, FSDP2, rematerialise": pipelined(ScheduleGPipe, wrap=True, again=True),
    }
    if few_or(True, False):
        errors["shapes inferred"] = pipelined(ScheduleGPipe)
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def pipeline_1f1b() -> dict:
    """Forward and backward passes in turn, also with two stages a rank."""
    errors = {
        "one stage a rank": pipelined(Schedule1F1B, told=True, again=True),
        "two stages a rank": pipelined(ScheduleInterleaved1F1B, told=True),
    }
    if few_or(True, False):
        errors["FSDP2"] = pipelined(Schedule1F1B, wrap=True)
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def pipeline_zero_bubble_is_refused() -> dict:
    """It asks autograd for the weights' gradients in a second pass; experts' come into ``.grad`` alone.

    By the two halves of its backward pass: in a pipeline the other stages would wait for the rank that got the error.
    """
    model = Stack.built(1)
    shard(model)
    x, y = tokens(0, dist.get_rank())
    x.requires_grad_()
    _, groups = stage_backward_input([mean_square(model(x), y)], None, [x], model.parameters())
    assert all(weight.grad is None for weight in model.parameters())
    said = c.raised(ModelError, lambda: stage_backward_weight(model.parameters(), groups))
    return {"said": said}


# ---- tensor parallel -----------------------------------------------------------------------------------------------


def tensor_parallel(over: str, wrap: bool, sequence: bool = False, again: bool = False) -> float:
    """Gradients, norm and clipped gradients against a dense run; (dp, tp) is (2, 2).

    ``over``: the mesh of the experts, "dp" or both. ``sequence``: ranks of tp have their own halves of the tokens
    between the parallel parts.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp, tp = mesh.get_local_rank("dp"), mesh.get_local_rank("tp")
    dense, model = Stack.built(2), Stack.built(2)
    run = shard(model, mesh=mesh["dp"] if over == "dp" else mesh, rematerialise=again)
    if sequence:
        run.set_gradient_divide_factor(2)
    layout = Shard(0) if sequence else Replicate()
    for layer in model:
        parallelize_module(
            layer, mesh["tp"], {"up": ColwiseParallel(input_layouts=layout), "down": RowwiseParallel(output_layouts=layout)}
        )  # fmt: skip
        if wrap:
            fully_shard(layer, mesh=mesh["dp"])
    if wrap:
        fully_shard(model, mesh=mesh["dp"])
    for number in range(2):
        x, y = tokens(0, number)
        (mean_square(dense(x), y) / 2).backward()
    x, y = (one.chunk(2)[tp] if sequence else one for one in tokens(0, dp))
    (mean_square(model(x), y) / (2 if sequence else 1)).backward()
    assert run.schedule.moved_bytes["gather"] > 0
    for weight in model.parameters():
        if weight in run.parameters():
            continue
        local = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        if not wrap:
            dist.all_reduce(local, group=mesh["dp"].get_group())
            local /= 2
        if sequence and "tp" not in getattr(weight, "device_mesh", mesh["dp"]).mesh_dim_names:
            dist.all_reduce(local, group=mesh["tp"].get_group())
    expected = {name: weight.grad for name, weight in dense.named_parameters()}
    worst = h.worst(c.of_all(model), h.local_rows(model, expected))
    norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.01).item()
    worst = max(worst, abs(clip_grad_norm_(model, 0.01).item() / norm - 1))
    return c.agreed(max(worst, h.worst(c.of_all(model), h.local_rows(model, expected))))


@case
def tensor_parallel_dense_rest() -> dict:
    """Experts over dp (tp ranks compute the same twice), or over all ranks; the dense rest over tp, alone or FSDP2."""
    errors = {
        f"experts over {over}, FSDP2 {wrap}": tensor_parallel(over, wrap, again=wrap)
        for over in ("dp", "all") for wrap in few_or((False, True), (over == "all",))
    }  # fmt: skip
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def sequence_parallel_dense_rest() -> dict:
    """Tokens split over tp between the parallel parts: experts over all ranks, divided by dp alone."""
    errors = {f"FSDP2 {wrap}": tensor_parallel("all", wrap, sequence=True, again=wrap) for wrap in (False, True)}
    assert max(errors.values()) <= EXACT, errors
    return errors
