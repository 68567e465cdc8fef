"""Parity of sharded training with one dense process: models, workloads, and the comparison.

The reference runs on every rank alike, over the tokens of all ranks at once: same code, no collective.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.runtime.expert_modules import PlainExperts
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from poise.runtime import collectives
from poise.runtime.moe import ExpertList, GatedExperts
from poise.stepwise.registry import POLICIES
from poise.train import fully_shard_experts

EXPERTS, WIDTH, INNER, LAYERS, TOKENS = 10, 8, 12, 2, 6
STEPS = few_or(5, 3)
"""At least three: one workload is skewed in every third step only."""
WORKLOADS = (
    "even",
    "two-hot",
    "hot-rank",
    "hot-expert-a-rank",
    "ragged",
    "half-idle",
    "moving-hot",
    "skewed-now-and-then",
)


@contextmanager
def messages(most_bytes: int) -> Iterator[None]:
    """Rows of more bytes between two ranks go by messages of their own; -1: all."""
    short, collectives.SHORT = collectives.SHORT, most_bytes
    try:
        yield
    finally:
        collectives.SHORT = short


def tokens_of(workload: str, step: int, world: int) -> list[int]:
    """Tokens of every rank; ``ragged`` has an empty rank."""
    if workload != "ragged":
        return [TOKENS] * world
    ragged = np.random.default_rng([4, step]).integers(1, 2 * TOKENS, world)
    ragged[(step + 1) % world] = 0
    return ragged.tolist()


def routing(workload: str, step: int, layer: int, world: int, top_k: int) -> np.ndarray:
    """Forced expert ids of all tokens, rank by rank, [T, K]."""
    total = sum(tokens_of(workload, step, world))
    rng = np.random.default_rng([WORKLOADS.index(workload), step, layer])
    score = rng.random((total, EXPERTS))
    if workload == "even":
        return (np.arange(total)[:, None] * top_k + np.arange(top_k)) % EXPERTS
    if workload == "two-hot":
        score[:, [2, 7]] += 0.8
    elif workload == "hot-rank":  # all of the first rank's experts
        score[:, : -(-EXPERTS // world)] += 2.0
    elif workload == "hot-expert-a-rank":  # one hot expert a rank
        score[:, :: max(1, EXPERTS // world)] += 0.6
    elif workload == "half-idle":  # the upper half never
        score[:, EXPERTS // 2 if top_k <= EXPERTS // 2 else top_k :] -= 3.0
    elif workload == "moving-hot":
        score[:, (3 * step + layer) % EXPERTS] += 2.0
    elif workload == "skewed-now-and-then" and step % 3 == 2:
        score[:, [1, 4]] += 2.0
    return np.argsort(-score, axis=1, kind="stable")[:, :top_k].copy()


class Block(nn.Module):
    """A dense map in place of attention, and an MoE layer whose routing is given; its gate still gets gradients."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate.top_k = 1
        if kind == "list":
            self.experts: nn.Module = ExpertList(
                nn.Sequential(nn.Linear(WIDTH, INNER), nn.Tanh(), nn.Linear(INNER, WIDTH)) for _ in range(EXPERTS)
            )
        else:
            self.experts = {"gated": GatedExperts, "plain": PlainExperts}[kind](EXPERTS, WIDTH, INNER)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = x + torch.tanh(self.mix(x))
        weights = self.gate(x).softmax(-1).gather(1, ids)
        return x + self.experts(x, ids, weights)


class Model(nn.Module):
    def __init__(self, kind: str = "gated", layers: int = LAYERS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, ids: list[Tensor]) -> Tensor:
        for block, chosen in zip(self.blocks, ids, strict=True):
            x = block(x, chosen)
        return self.head(x)


def build(kind: str = "gated", dtype: torch.dtype = torch.float64, layers: int = LAYERS) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Model(kind, layers).to(torch.float64)
        for name, weight in model.named_parameters():
            if "experts" in name:
                nn.init.normal_(weight, std=0.4)
    return model.to(dtype)


@dataclass
class Batch:
    x: Tensor
    target: Tensor
    ids: list[Tensor]
    total: int


def batch(
    workload: str, step: int, world: int, top_k: int, rank: int | None, dtype: torch.dtype, layers: int = LAYERS
) -> Batch:
    """One rank's tokens, or all of them (``rank`` None)."""
    counts = tokens_of(workload, step, world)
    total = sum(counts)
    rng = np.random.default_rng([99, step])
    x, target = rng.standard_normal((total, WIDTH)), rng.standard_normal((total, 3))
    start = 0 if rank is None else sum(counts[:rank])
    rows = slice(start, total if rank is None else start + counts[rank])
    ids = [torch.from_numpy(routing(workload, step, layer, world, top_k)[rows]) for layer in range(layers)]
    return Batch(torch.tensor(x[rows], dtype=dtype), torch.tensor(target[rows], dtype=dtype), ids, total)


def loss_of(model: nn.Module, data: Batch) -> Tensor:
    """Sum over tokens over the global number of tokens: exact for ragged and empty ranks."""
    return (model(data.x, data.ids) - data.target).square().sum() / data.total


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


@dataclass
class RunRecord:
    """What a run leaves: losses, gradient norms, gradients of every step, weights after the last."""

    losses: list[float]
    norms: list[float]
    grads: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def nearest_e4m3(value: Tensor) -> Tensor:
    """The nearest float8_e4m3fn, found among all of them; of two as near the one whose last bit is 0."""
    codes = torch.arange(127, dtype=torch.uint8)  # the last one, 127, is NaN
    table = codes.view(torch.float8_e4m3fn).double()
    above = torch.searchsorted(table, value.abs().contiguous()).clamp(1, 126)
    low, high = table[above - 1], table[above]
    left, right = value.abs() - low, high - value.abs()
    take_high = (right < left) | ((right == left) & (above % 2 == 0))
    return torch.where(take_high, high, low).copysign(value)


def as_gathered(weight: Tensor, gather: str) -> Tensor:
    """What a weight [E, ...] is after it was sent in another type, written down a second time."""
    if gather == "bfloat16":
        return weight.bfloat16().to(weight.dtype)
    most = weight.double().abs().amax(-1, keepdim=True)
    scale = torch.where(most > 0, 2.0 ** (torch.floor(torch.log2(most / 448.0)) + 1), 1.0)
    return (nearest_e4m3(weight.double() / scale) * scale).to(weight.dtype)


@cache
def dense(workload: str, top_k: int, optimizer: str, world: int, kind: str = "gated", dtype: torch.dtype = torch.float64,
          steps: int = STEPS, order: int = 0, gather: str = "") -> RunRecord:  # fmt: skip
    """The reference: all tokens at once. bfloat16: weights are float32, computed with in bfloat16.

    ``gather``: experts are computed with as they are after they were sent in that type; gradients are the masters'.

    ``order`` above 0 adds up otherwise: tokens are shuffled and come in ``world`` parts, and if it is odd the experts
    are numbered backwards.
    """
    low = dtype == torch.bfloat16
    model = build(kind, torch.float32 if low else dtype)
    apart = low or bool(gather)
    computing = copy.deepcopy(model).to(dtype) if apart else model
    backwards = order % 2 == 1
    if backwards:
        turn_experts(dict(model.named_parameters()))
    opt = make_optimizer(optimizer, model)
    record = RunRecord([], [], [], {})
    for step in range(steps):
        data = batch(workload, step, world, top_k, None, dtype)
        parts = [data]
        if order:
            shuffled = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(order))
            parts = [
                Batch(data.x[rows], data.target[rows], [EXPERTS - 1 - ids[rows] if backwards else ids[rows] for ids in data.ids],
                      data.total) for rows in shuffled.chunk(world)
            ]  # fmt: skip
        model.zero_grad()
        loss = 0.0
        for part in parts:
            if apart:
                computing.zero_grad()
                computing.load_state_dict(model.state_dict())
            for name, weight in computing.named_parameters():
                if gather and ".experts." in name:
                    weight.data = as_gathered(dict(model.named_parameters())[name].detach(), gather).to(dtype)
            one = loss_of(computing, part)
            one.backward()
            loss += one.item()
            for weight, used in zip(model.parameters(), computing.parameters(), strict=True):
                new = torch.zeros_like(weight) if used.grad is None else used.grad.to(weight.dtype)
                if apart:
                    weight.grad = new if weight.grad is None else weight.grad + new
                elif weight.grad is None:
                    weight.grad = new
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        record.losses.append(loss)
        record.norms.append(torch.stack([g.double().norm() for g in grads.values()]).norm().item())
        record.grads.append(grads)
        opt.step()
    record.weights = {name: w.detach().clone() for name, w in model.named_parameters()}
    if backwards:
        for values in (*record.grads, record.weights):
            turn_experts(values)
    return record


def turn_experts(values: dict[str, Tensor]) -> None:
    """Number stacked experts, and the gate's rows, backwards."""
    for name, value in values.items():
        if ".experts." in name or ".gate." in name:
            value.data = value.data.flip(0)


def reduce_dense(model: nn.Module, run: object) -> None:
    """Sum the replicated weights' gradients over ranks."""
    owned = run.parameters()
    for weight in model.parameters():
        if weight not in owned:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)


def local_rows(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of full tensors, what this rank has: rows of owned experts, the rest whole; a list of experts is stacked."""
    out = {}
    for name, _ in model.named_parameters():
        if ".experts." not in name and ".inner_experts." not in name:
            out[name] = values[name]
            continue
        prefix, _, attribute = name.rpartition(".")
        module = model.get_submodule(prefix)
        if module.listed:
            key = next(n for n, a in module._attribute.items() if a == attribute)
            full = torch.stack([values[f"{prefix}.{e}.{key}"] for e in range(EXPERTS)])
        else:
            full = values[name]
        out[name] = full[torch.tensor(module.mine, dtype=torch.int64)]
    return out


def worst(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest relative error ||a - b|| / ||b|| of any tensor; of an all-zero reference, ||a||."""
    out = 0.0
    for name, value in reference.items():
        norm = value.double().norm().item()
        gap = (mine[name].double() - value.double()).norm().item()
        out = max(out, gap / norm if norm > 0 else gap) if gap == gap else float("inf")  # max() passes over NaN
    return out


def worst_in_all(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The same over all ranks' rows of a tensor together, as it is between two dense runs."""
    squares = torch.stack([torch.stack([(mine[name].double() - value.double()).square().sum(), value.double().square().sum()])
                           for name, value in reference.items()])  # fmt: skip
    dist.all_reduce(squares)
    gap, norm = squares.sqrt().unbind(1)
    return torch.where(norm > 0, gap / norm, gap).max().item()


def apart(mine: RunRecord, reference: RunRecord) -> float:
    """The largest relative error of losses, norms, gradients and weights between two runs."""
    pairs = zip([*mine.losses, *mine.norms], [*reference.losses, *reference.norms], strict=True)
    tensors = zip([*mine.grads, mine.weights], [*reference.grads, reference.weights], strict=True)
    return max(*(abs(a - b) / abs(b) for a, b in pairs), *(worst(a, b) for a, b in tensors))


def sharded_run(workload: str, top_k: int, optimizer: str, policy: str, reference: RunRecord, *, rematerialise: bool | float = False,
                kind: str = "gated", dtype: torch.dtype = torch.float64, steps: int = STEPS, change=None, slots: int = 2,
                mutate: str = "", gather: str = "", **options: object) -> tuple[float, int, int]:  # fmt: skip
    """Train sharded; the largest relative error of losses, gradients, norms and weights; bytes gathered; replica rows
    that a mutation lost on rank 0."""
    rank, world = dist.get_rank(), dist.get_world_size()
    low = dtype == torch.bfloat16
    model = build(kind, torch.float32 if low else dtype)
    mesh = options.pop("mesh", None) or MESH(world)
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if low else None
    run = fully_shard_experts(model, mesh=mesh, policy=policy, step_slots=slots, rematerialise=rematerialise,
                              mp_policy=mixed, gather_dtype=getattr(torch, gather) if gather else None,
                              **options)  # fmt: skip
    if low:
        fully_shard(model, mesh=mesh, mp_policy=mixed)
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)
    run.set_gradient_divide_factor(2.0 if mutate == "divisor" else 1.0)
    opt = make_optimizer(optimizer, model)
    run.attach(opt)
    error, lost, compared = 0.0, 0, worst if dtype == torch.float64 else worst_in_all
    for step in range(steps):
        if change is not None:
            change(run, step)
        data = batch(workload, step, world, top_k, rank, dtype)
        if mutate == "token" and rank == 0 and len(data.x):
            data.ids[0][0, 0] = next(e for e in range(EXPERTS) if e not in data.ids[0][0])
        opt.zero_grad()
        loss = loss_of(model, data)
        with dropped(mutate == "replica") as count:
            loss.backward()
        lost += len(count)
        if not low:
            reduce_dense(model, run)
        total = loss.detach().double()
        dist.all_reduce(total)
        grads = {name: whole(weight.grad) for name, weight in model.named_parameters()}
        norm = run.clip_grad_norm_(1e9).item()
        error = max(
            error,
            abs(total.item() - reference.losses[step]) / abs(reference.losses[step]),
            abs(norm - reference.norms[step]) / reference.norms[step],
            compared(grads, local_rows(model, reference.grads[step])),
        )
        opt.step()
    weights = {name: whole(weight.detach()) for name, weight in model.named_parameters()}
    error = max(error, compared(weights, local_rows(model, reference.weights)))
    shared = torch.tensor([error], dtype=torch.float64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item(), run.schedule.moved_bytes["gather"], lost


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


_meshes: dict[int, object] = {}


def MESH(world: int) -> object:
    if world not in _meshes:
        _meshes[world] = init_device_mesh("cpu", (world,))
    return _meshes[world]


@contextmanager
def dropped(active: bool) -> Iterator[list]:
    """The mutation that forgets replica gradients: what arrives at an owner is not added."""
    from poise.train import reduce

    before, count = reduce.Reduction.wait, []
    if active:

        def wait(self: object) -> None:
            gradients = {name: self.experts.gradient(name).clone() for name in self.experts.trainable}
            count.extend([None] * self.count)
            before(self)
            for name, value in gradients.items():
                self.experts.gradient(name).copy_(value)

        reduce.Reduction.wait = wait
    try:
        yield count
    finally:
        reduce.Reduction.wait = before


def policies() -> list[str]:
    return list(POLICIES)
