"""Parts 5 and 6 of benchmarks/gpu.py: whole layers on one device, with a process group of one rank.

The layer without a host (poise.runtime.device.layer) eagerly and from a captured graph, and poise.train: against one dense
process in float64 on the CPU, memory against the allocator's count, and a timeline of streams. At small sizes also on a CPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from poise.cost.compute import expert_times
from poise.cost.weights import step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import settle
from poise.runtime.device.layer import DeviceLayer
from poise.runtime.device.planner import DeviceKernels
from poise.runtime.device.products import slot_product, triton_code
from poise.runtime.device.slot_weights import SlotWeights
from poise.runtime.experts import recognise
from poise.runtime.moe import GatedExperts, MoE
from poise.stepwise.kernels import LayerSlots
from poise.train import fully_shard_experts

EXACT, CLOSE = 1e-11, 0.02
"""Relative distance from float64 on the CPU that is right: of float64, and of bfloat16."""


class Size(NamedTuple):
    """Tokens a step, experts a token, experts, widths, type."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    inner: int
    dtype: torch.dtype


SMALL = Size(6, 2, 4, 16, 8, torch.float64)
STEP_SIZES = (Size(64, 8, 32, 4096, 1536, torch.bfloat16), Size(4096, 8, 32, 4096, 1536, torch.bfloat16))
"""Qwen3-235B's experts, a rank's 32 of them: a decode step and a prefill."""
TRAINED = Size(2048, 4, 16, 2048, 1024, torch.float32)


@contextmanager
def one_rank(where: str) -> Iterator[Any]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("nccl" if where == "cuda" else "gloo", store=store, rank=0, world_size=1)
        try:
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()


def made(size: Size, where: str, group: Any) -> tuple[DeviceLayer, GatedExperts]:
    """A layer with all of its experts on this device, and the dense module of the same weights."""
    with torch.device(where):
        dense = GatedExperts(size.experts, size.hidden, size.inner).to(size.dtype)
    table = LayerSlots.of(np.ones((size.experts, 1), bool), 0, np.zeros(1, np.int32))
    weights = {name: weight.detach().requires_grad_() for name, weight in dense.named_parameters()}
    price = step_price(float(size.tokens), size.experts, Cluster.parse("1x1:h200+datasheet"), spec(size))
    kernels = DeviceKernels(table, price, size.tokens * size.top_k, where)
    product = slot_product if where == "cuda" else partial(slot_product, code=triton_code())  # the interpreter
    held = SlotWeights(table, weights, group)
    return DeviceLayer(recognise(dense, probe=False), kernels, table, held, tokens=size.tokens,
                       top_k=size.top_k, group=group, product=product), dense  # fmt: skip


def spec(size: Size) -> ModelSpec:
    return ModelSpec(
        "experts", 1, (0,), size.experts, size.top_k, size.hidden, size.inner, kv_bytes_per_token_layer=2048.0
    )


def batch(rng: np.random.Generator, size: Size, where: str, skew: float) -> tuple[torch.Tensor, ...]:
    """Tokens, their experts and router weights, in float64 on the CPU and as they are given."""
    score = rng.gumbel(size=(size.tokens, size.experts)) + skew * rng.standard_normal(size.experts)
    ids = torch.from_numpy(np.argsort(-score, axis=1)[:, : size.top_k].astype(np.int64))
    x = torch.from_numpy(rng.standard_normal((size.tokens, size.hidden))).to(size.dtype)
    router = torch.from_numpy(rng.uniform(0.1, 1.0, (size.tokens, size.top_k))).to(size.dtype)
    return x.to(where), ids.to(where), router.to(where)


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative distance."""
    want = want.double().cpu()
    return float((got.double().cpu() - want).norm() / want.norm().clamp(min=1e-300))


def predictions(gpu: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Part 5, before anything ran: experts alone by the machine's measured constants; the rest of a layer is not known."""
    rows = []
    for size in STEP_SIZES:
        times = expert_times(settle(Cluster.parse(f"1x1:{gpu}+vllm.bf16"), spec(size), size.tokens), spec(size))
        ids = batch(rng, size._replace(hidden=1), "cpu", 1.0)[1]
        count_E = np.bincount(ids.numpy().ravel(), minlength=size.experts)
        work = np.maximum(np.minimum(count_E, 1) * times.read_s, count_E * times.compute_s)
        rows.append({"tokens": size.tokens, "predicted_us": 1e6 * (times.start_s + float((work + count_E * times.activation_s).sum()))})  # fmt: skip
    return rows


def hostless(rng: np.random.Generator, where: str, rows: list[dict[str, Any]], timed: Any) -> dict[str, Any]:
    """Part 5: parity forward and backward; on a GPU, a graph replayed with other routing, its time, and bytes."""
    out: dict[str, Any] = {"parity": {}, "sizes": []}
    with one_rank(where) as group:
        layer, dense = made(SMALL, where, group)
        layer.prepare()
        given = batch(rng, SMALL, where, 1.0)
        x = given[0].clone().requires_grad_()
        y = layer(x, *given[1:])
        y.square().sum().backward()
        mine, dense = given[0].cpu().clone().requires_grad_(), dense.cpu()
        want = dense(mine, given[1].cpu(), given[2].cpu())
        want.square().sum().backward()
        layer.check()
        pairs = {"outputs": (y.detach(), want.detach()), "tokens": (x.grad, mine.grad)}
        pairs |= {name: (layer.weights.owned[name].grad, weight.grad) for name, weight in dense.named_parameters()}
        out["parity"] = {name: apart(*pair) for name, pair in pairs.items()}
        out["right"] = max(out["parity"].values()) <= EXACT
        for size, row in zip(STEP_SIZES, rows, strict=True) if where == "cuda" else ():
            out["sizes"].append({**row, **captured(rng, size, group, timed)})
            out["right"] = (
                out["right"] and out["sizes"][-1]["graph_apart"] <= CLOSE and out["sizes"][-1]["trained_apart"] <= CLOSE
            )
    return out


def captured(rng: np.random.Generator, size: Size, group: Any, timed: Any) -> dict[str, Any]:
    """Forward, and forward with backward, each in a graph; captured with one routing, replayed with another."""
    before = torch.cuda.memory_allocated()
    layer = made(size, "cuda", group)[0]
    held = torch.cuda.memory_allocated() - before
    counted = sum(weight.nbytes for weight in layer.weights.bank.values())
    first, other = (batch(rng, size, "cuda", skew) for skew in (0.0, 1.0))
    static = [each.clone() for each in first]

    def forward() -> torch.Tensor:
        layer.prepare()
        with torch.no_grad():
            return layer(*static)

    graph, y = graph_of(forward)
    for into, each in zip(static, other, strict=True):
        into.copy_(each)
    graph.replay()
    replayed = y.clone()
    eager = forward()
    layer.check()
    x = static[0].requires_grad_()

    def trained() -> torch.Tensor:
        x.grad = None
        for weight in layer.weights.owned.values():
            weight.grad = None
        y = layer(*static)
        y.float().square().sum().backward()
        return y

    step, _ = graph_of(trained)
    step.replay()
    torch.cuda.synchronize()
    from_graph = [x.grad.clone(), *(weight.grad.clone() for weight in layer.weights.owned.values())]
    trained()
    again = [x.grad, *(weight.grad for weight in layer.weights.owned.values())]
    layer.check()
    return {
        "graph_apart": apart(replayed, eager), "graph_us": timed(graph.replay, 50), "eager_us": timed(forward, 20),
        "trained_apart": max(apart(a, b) for a, b in zip(from_graph, again, strict=True)),
        "trained_us": timed(step.replay, 20), "weights_counted_MB": counted / 1e6, "weights_allocated_MB": held / 1e6,
    }  # fmt: skip


def graph_of(call: Any) -> tuple[Any, Any]:
    """A captured graph of a call, after three calls on a stream of their own, and what it returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


class Tower(torch.nn.Module):
    """MoE layers, one on the other."""

    def __init__(self, size: Size, layers: int = 2) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            MoE(GatedExperts(size.experts, size.hidden, size.inner), size.hidden, size.experts, size.top_k) for _ in range(layers)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, d] -> [T, d]."""
        for block in self.blocks:
            x = x + block(x)
        return x


def trained(rng: np.random.Generator, where: str) -> dict[str, Any]:
    """Part 6: poise.train with a world of one."""
    out: dict[str, Any] = {}
    with one_rank(where):
        mesh = init_device_mesh(where, (1,))
        out["apart"] = parity(rng, where, mesh)
        out["right"] = out["apart"] <= EXACT * 100  # three steps on each other's weights
        size = TRAINED if where == "cuda" else SMALL
        before = torch.cuda.memory_allocated() if where == "cuda" else 0
        with torch.device(where):
            model = Tower(size).to(size.dtype)
        run = fully_shard_experts(model, mesh=mesh, cluster=Cluster.parse("1x1:h200+datasheet"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run.attach(optimizer)
        x = torch.from_numpy(rng.standard_normal((size.tokens, size.hidden))).to(size.dtype).to(where)

        def step() -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        step()
        kept = [*model.parameters(), *(weight.grad for weight in model.parameters())]
        kept += [
            each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)
        ]
        out["counted_MB"] = (
            sum(each.nbytes for each in kept if each is not None and each.device.type == where) + x.nbytes
        ) / 1e6
        if where == "cuda":
            torch.cuda.synchronize()
            out["allocated_MB"] = (torch.cuda.memory_allocated() - before) / 1e6
            torch.cuda.reset_peak_memory_stats()
            step()
            out["peak_MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            out["ledger_peak_MB"] = run.schedule.ledger.peak / 1e6
        kinds = [
            torch.profiler.ProfilerActivity.CPU,
            *([torch.profiler.ProfilerActivity.CUDA] if where == "cuda" else []),
        ]
        with torch.profiler.profile(activities=kinds) as profiler:
            step()
            if where == "cuda":
                torch.cuda.synchronize()
        out["streams"] = streams(profiler)
    return out


def parity(rng: np.random.Generator, where: str, mesh: Any) -> float:
    """Three steps of SGD in float64, sharded on the device and dense on the CPU: the largest distance of any weight."""
    dense = Tower(SMALL).double()
    model = Tower(SMALL).double()
    model.load_state_dict(dense.state_dict())
    model = model.to(where)
    run = fully_shard_experts(model, mesh=mesh, cluster=Cluster.parse("1x1:h200+datasheet"))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, dense)]
    run.attach(optimizers[0])
    for _ in range(3):
        x = torch.from_numpy(rng.standard_normal((SMALL.tokens, SMALL.hidden)))
        for each, optimizer in zip((model, dense), optimizers, strict=True):
            optimizer.zero_grad()
            each(x.to(where) if each is model else x).square().mean().backward()
            optimizer.step()
    mine = dict(model.named_parameters())
    return max(apart(mine[name].detach(), weight.detach()) for name, weight in dense.named_parameters())


def streams(profiler: Any) -> list[dict[str, Any]]:
    """Of every stream of the device, and every thread of the host: how long it was busy, and beside another one."""
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for event in profiler.profiler.kineto_results.events():
        kind = str(event.device_type()).rpartition(".")[2]
        spans = found.setdefault((kind, event.device_resource_id()), [])
        spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    merged = {key: union(spans) for key, spans in found.items()}
    rows = []
    for (kind, number), spans in sorted(merged.items()):
        others = union([span for key, each in merged.items() if key[0] == kind and key[1] != number for span in each])
        beside = sum(max(0, min(b, d) - max(a, c)) for a, b in spans for c, d in others)
        busy = sum(b - a for a, b in spans)
        rows.append({"where": kind, "stream": number, "events": len(found[kind, number]), "busy_us": busy / 1e3, "beside_another_us": beside / 1e3})  # fmt: skip
    return rows


def union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that do not overlap."""
    out: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((begin, end))
    return out


def tried(part: Any, *given: Any) -> dict[str, Any]:
    """A part's result and seconds; what it raises is its result, and wrong."""
    began = time.monotonic()
    try:
        out = part(*given)
    except Exception as error:  # the parts after it are still run
        out = {"right": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {**out, "seconds": round(time.monotonic() - began, 1)}
