"""Cases about other parallelism and other ways to recompute: compile, pipeline, tensor parallel, saved-tensor hooks."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_cases import EXACT, fsdp, record_of_dense, shard
from tests.train.support_models import case, case_like
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from poise.runtime.moe import GatedExperts, MoE
from poise.train import clip_grad_norm_, parameter_groups
from poise.util.errors import ModelError

aten = torch.ops.aten
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


@case
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


@case
def grad_of_something_else() -> dict:
    """``torch.autograd.grad`` by the tokens leaves ``.grad`` alone, twice over; by experts' weights it is refused."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    for workload, again in (("hot-expert-a-rank", False), ("ragged", True)):
        everything = h.batch(workload, 0, world, 2, None, torch.float64)
        everything.x.requires_grad_()
        dense = h.build()
        h.loss_of(dense, everything).backward()
        model = h.build()
        run = shard(model, rematerialise=again)
        data = h.batch(workload, 0, world, 2, rank, torch.float64)
        data.x.requires_grad_()
        counts = h.tokens_of(workload, 0, world)
        wanted = {"x": everything.x.grad[sum(counts[:rank]) :][: counts[rank]]}
        fired: list[int] = []
        for weight in run.parameters():
            weight.register_post_accumulate_grad_hook(lambda _, fired=fired: fired.append(1))
        loss = h.loss_of(model, data)
        for last in (False, True):
            (slope,) = torch.autograd.grad(loss, data.x, retain_graph=not last)
            errors[f"tokens, {workload}, {last}"] = c.agreed(h.worst({"x": slope}, wanted))
            assert all(weight.grad is None for weight in model.parameters()) and not fired
        assert run.schedule.moved_bytes["reduce"] == 0 == sum(run.schedule.ledger.now.values())
        h.loss_of(model, data).mul(world).backward(inputs=[*model.parameters()])
        assert len(fired) == len(run.parameters()), (len(fired), len(run.parameters()))
        c.average_dense(model, run)
        expected = {name: weight.grad for name, weight in dense.named_parameters()}
        errors[f"weights, {workload}"] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
        weight = model.blocks[0].experts.down_proj
        said = c.raised(ModelError, partial(torch.autograd.grad, h.loss_of(model, data), weight))
    assert max(errors.values()) <= EXACT, errors
    return {**errors, "said": said}


@case
def optimizer_in_backward() -> dict:
    """Hooks that step as soon as a gradient is accumulated see the complete one, once a step."""
    world, errors = dist.get_world_size(), {}
    dense = h.build()
    plain = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        plain.zero_grad()
        h.loss_of(dense, h.batch("hot-expert-a-rank", step, world, 2, None, torch.float64)).backward()
        for weight in dense.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        plain.step()
    expected = {name: weight.detach() for name, weight in dense.named_parameters()}
    for again in (False, True):
        model = h.build()
        shard(model, rematerialise=again)
        fsdp(model, h.MESH(world))
        calls: list[int] = []

        def step_now(weight: Any, optimizers: dict, calls: list[int] = calls) -> None:
            calls.append(1)
            optimizers[weight].step()
            optimizers[weight].zero_grad()

        each = {weight: torch.optim.SGD([weight], lr=0.05, momentum=0.9) for weight in model.parameters()}
        for weight in each:
            weight.register_post_accumulate_grad_hook(partial(step_now, optimizers=each))
        for step in range(3):
            c.plain_loss("hot-expert-a-rank")(model, step).backward()
            assert all(weight.grad is None for weight in model.parameters())
        assert len(calls) == 3 * len(each), (len(calls), len(each))
        errors[f"rematerialise {again}"] = c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, expected)))
    assert max(errors.values()) <= EXACT, errors
    return errors


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


# ---- saved tensors and recomputation -------------------------------------------------------------------------------


def moved() -> Any:
    """Saved tensors are kept as copies, as ``save_on_cpu`` does from another device; here it would copy nothing."""
    return saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x)


def record_of(workload: str) -> h.RunRecord:
    """A hot expert on every rank, or ragged tokens and a rank without any; three steps."""
    if workload not in SHORT:
        SHORT[workload] = h.dense(workload, 2, "adamw", dist.get_world_size(), steps=3)
    return SHORT[workload]


SHORT: dict[str, h.RunRecord] = {}


def composed(change: Any, *, around: Any = None, workloads: tuple[str, ...] = ("hot-expert-a-rank", "ragged")) -> dict:
    """``change`` a block's forward; ``around`` is a context of the model's forward pass.

    With few cases weights are gathered again in the ragged workload alone.
    """
    errors = {}
    for workload in workloads:
        for again in few_or((False, True), (workload == "ragged",)):
            model = h.build()
            run = shard(model, rematerialise=again)
            for block in model.blocks:
                block.forward = change(block.forward)
            loss_of = c.plain_loss(workload)

            def inside(m: nn.Module, step: int, loss_of: Any = loss_of) -> Tensor:
                with around() if around is not None else nullcontext():
                    return loss_of(m, step)

            errors[f"{workload}, rematerialise {again}"] = c.follow(
                model, run, record_of(workload), inside, average=True
            )
            assert sum(run.schedule.ledger.now.values()) == 0, run.schedule.ledger.now
            assert [one.layer for one in run.metrics] == list(range(h.LAYERS))
    assert max(errors.values()) <= EXACT, errors
    return errors


def recomputed(forward: Any, **options: Any) -> Any:
    return partial(checkpoint, forward, use_reentrant=False, **options)


def under(context: Any, forward: Any) -> Any:
    def call(*inputs: Any) -> Any:
        with context():
            return forward(*inputs)

    return call


@case
def saved_tensors_elsewhere() -> dict:
    """Hooks around the forward pass: ``save_on_cpu``, and copies; weights that come and go are copied too."""
    out = composed(lambda forward: forward, around=save_on_cpu, workloads=("hot-expert-a-rank",))
    return {"save_on_cpu": out, "copies": composed(lambda forward: forward, around=moved, workloads=("ragged",))}


@case_like("saved_tensors_inside_checkpoint")
def saved_tensors_around_checkpoint() -> dict:
    return composed(recomputed, around=moved)


@case
def saved_tensors_inside_checkpoint() -> dict:
    """Nothing inside is computed again then, but what is outside may be."""
    return {
        "all of a block": composed(lambda forward: recomputed(under(moved, forward)), workloads=("hot-expert-a-rank",)),
        "its experts": experts_under_hooks(),
    }


def experts_under_hooks() -> dict:
    def change(forward: Any) -> Any:
        block = forward.__self__
        block.experts.forward = under(moved, block.experts.forward)
        return recomputed(forward)

    return composed(change)


@case
def selective_checkpoint() -> dict:
    """Outputs of chosen operations are kept, outside of the experts: those are always computed again, all of them."""
    out = {}
    for name, chosen in {
        "products": [aten.mm.default, aten.addmm.default],
        "what planning uses too": [
            aten.index.Tensor, aten.sort.stable, aten.index_select.default, aten.gather.default, aten.tanh.default,
            aten.cumsum.default, aten.new_empty.default, aten.select.int,
        ],
    }.items():  # fmt: skip
        contexts = partial(create_selective_checkpoint_contexts, chosen)
        out[name] = composed(
            lambda forward, contexts=contexts: recomputed(forward, context_fn=contexts), workloads=("ragged",)
        )

    def everything(*_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    contexts = partial(create_selective_checkpoint_contexts, everything)
    out["everything"] = composed(lambda forward: recomputed(forward, context_fn=contexts), workloads=("ragged",))
    return out


def after_tanh(forward: Any) -> Any:
    return lambda *inputs: torch.tanh(forward(*inputs))


@case_like("nested_checkpoint_two_passes_open")
def nested_checkpoint() -> dict:
    """Checkpoints of the experts in one of the block, three deep; and two passes open, of equal tokens."""

    def thrice(forward: Any) -> Any:
        block = forward.__self__
        block.experts.forward = recomputed(recomputed(block.experts.forward))
        return recomputed(forward)

    return composed(thrice)


@case
def nested_checkpoint_two_passes_open() -> dict:
    """Equal ids in both, which do not tell which is computed again, or other ids, which a rank without tokens lacks."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    whole = [h.batch(workload, 0, world, 2, None, torch.float64) for workload in ("hot-expert-a-rank", "two-hot")]
    per = len(whole[0].x) // world
    rows = slice(rank * per, (rank + 1) * per if rank else 0)
    keep = slice(per, None)  # the first rank's tokens are nobody's

    def part(data: h.Batch, number: int, where: slice) -> h.Batch:
        return h.Batch((1 + number) * data.x[where], data.target[where], [i[where] for i in data.ids], data.total)

    for order in ((0, 1), (1, 0)):
        for equal in (True, False):
            dense, model = h.build(), h.build()
            for block in (*dense.blocks, *model.blocks):  # something after the experts keeps a tensor
                block.forward = after_tanh(block.forward)
            run = shard(model, rematerialise=True)
            for block in model.blocks:
                block.experts.forward = recomputed(block.experts.forward)
                block.forward = recomputed(block.forward)
            losses = []
            for number in range(2):
                data = whole[0 if equal else number]
                h.loss_of(dense, part(data, number, keep)).backward()
                run.set_policy("hecate" if number else "full-replication")
                losses.append(h.loss_of(model, part(data, number, rows)))
            for number in order:
                (losses[number] * world).backward()
            c.average_dense(model, run)
            expected = {name: weight.grad for name, weight in dense.named_parameters()}
            errors[f"{order}, equal {equal}"] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def checkpoint_retained() -> dict:
    """Twice backward through a kept graph under checkpointing, plain and nested."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    for workload in ("hot-expert-a-rank", "ragged"):
        for depth in (1, 2):
            for again in few_or((False, True), ((depth == 2) == (workload == "ragged"),)):
                dense, model = h.build(), h.build()
                h.loss_of(dense, h.batch(workload, 0, world, 2, None, torch.float64)).mul(2).backward()
                expected = {name: weight.grad for name, weight in dense.named_parameters()}
                run = shard(model, rematerialise=again)
                for block in model.blocks:
                    block.forward = recomputed(recomputed(block.forward) if depth == 2 else block.forward)
                loss = h.loss_of(model, h.batch(workload, 0, world, 2, rank, torch.float64)) * world
                loss.backward(retain_graph=True)
                loss.backward()
                c.average_dense(model, run)
                what = f"{workload}, depth {depth}, rematerialise {again}"
                errors[what] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
                assert sum(run.schedule.ledger.now.values()) == 0, what
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def checkpoint_same_layer_twice() -> dict:
    """One region runs a layer twice, on equal ids and on others: again in the same order, on a rank without tokens."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}

    def twice(forward: Any, shift: int) -> Any:
        return lambda x, ids: forward(torch.tanh(forward(x, ids)), (ids + shift) % h.EXPERTS)

    for shift in (0, 3):
        for depth in (1, 2):
            dense, model = h.build(), h.build()
            run = shard(model, policy="hecate:overlap=3", rematerialise=True)
            for block in dense.blocks:
                block.forward = twice(block.forward, shift)
            for block in model.blocks:
                block.forward = recomputed(twice(recomputed(block.forward) if depth == 2 else block.forward, shift))
            for step in range(2):
                dense.zero_grad()
                h.loss_of(dense, h.batch("ragged", step, world, 2, None, torch.float64)).backward()
                model.zero_grad()
                (h.loss_of(model, h.batch("ragged", step, world, 2, rank, torch.float64)) * world).backward()
            c.average_dense(model, run)
            expected = {name: c.whole(weight.grad) for name, weight in dense.named_parameters()}
            errors[f"shift {shift}, depth {depth}"] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case_like("checkpoint_retained")
def checkpoint_retained_over_another_step() -> dict:
    """A kept graph goes backward again after another forward and backward pass."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    for depth in (0, 1, 2):
        dense, model = h.build(), h.build()
        run = shard(model, rematerialise=True)
        for block in model.blocks:
            for _ in range(depth):
                block.forward = recomputed(block.forward)
        for step, times in ((0, 2), (1, 1)):
            h.loss_of(dense, h.batch("ragged", step, world, 2, None, torch.float64)).mul(times).backward()
        first = h.loss_of(model, h.batch("ragged", 0, world, 2, rank, torch.float64)) * world
        first.backward(retain_graph=True)
        second = h.loss_of(model, h.batch("ragged", 1, world, 2, rank, torch.float64)) * world
        second.backward()
        first.backward()
        c.average_dense(model, run)
        expected = {name: weight.grad for name, weight in dense.named_parameters()}
        errors[f"depth {depth}"] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
        assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def grad_scaler() -> dict:
    """``ShardedGradScaler``, an optimizer for the experts and one for the rest: exact, and all ranks skip alike.

    In one optimizer torch refuses FSDP2's DTensors beside plain tensors; plain ``GradScaler`` decides rank by rank.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    dense, model = h.build(), h.build()
    run = shard(model)
    fsdp(model, h.MESH(world))
    rest, experts = (group["params"] for group in parameter_groups(model))
    plain = torch.optim.SGD(dense.parameters(), lr=0.1)
    both = [torch.optim.SGD(weights, lr=0.1) for weights in (rest, experts)]
    scaler = ShardedGradScaler("cpu", init_scale=1024.0, process_group=dist.group.WORLD)
    for step in range(3):
        plain.zero_grad()
        h.loss_of(dense, h.batch("hot-expert-a-rank", step, world, 2, None, torch.float64)).backward()
        plain.step()
        for optimizer in both:
            optimizer.zero_grad()
        scaler.scale(c.plain_loss("hot-expert-a-rank")(model, step)).backward()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found a non-scalar tensor")  # torch's, of FSDP2's gradients
            for optimizer in both:
                scaler.unscale_(optimizer)
        run.clip_grad_norm_(1e9)
        for optimizer in both:
            scaler.step(optimizer)
        scaler.update()
    wanted = {name: weight.detach() for name, weight in dense.named_parameters()}
    error = c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, wanted)))
    assert error <= EXACT and scaler.get_scale() == 1024.0, (error, scaler.get_scale())
    kept = [weight.detach().clone() for weight in experts]
    scaler.scale(c.plain_loss("hot-expert-a-rank")(model, 3)).backward()
    if rank == 1:
        experts[0].grad.fill_(float("inf"))
    scaler.step(both[1])
    scaler.update()
    skipped = all(torch.equal(weight, value) for weight, value in zip(experts, kept, strict=True))
    assert c.agreed(float(not skipped)) == 0, "a rank made a step"
    assert c.agreed(scaler.get_scale()) == 512.0 == scaler.get_scale()
    return {"error": error}
