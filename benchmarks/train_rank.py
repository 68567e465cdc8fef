"""What every rank of an emulated cluster runs for benchmarks/measured_train.py and measured_foresight.py: given routing through the real runtime.

    train_rank.py JOB.json COUNTS.npz OUT.npz

A model of MoE layers under ``fully_shard_experts``: routers answer what COUNTS says, tokens, weights and gradients are
real bytes with a little arithmetic, a device clock stands for experts and attention. ``stream`` in the job: sparse
collectives run on a thread, one after the other, as they do on a stream of their own with NCCL; without it gloo posts
their later rounds only when they are waited for. In the first repeat gradients are compared with a dense run.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Generator, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from measured import in_turn, on_ranks, until
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from poise.lab.emulate import DeviceClock, ExpertCurve
from poise.machine.cluster import Cluster
from poise.routing.trace import RoutingTrace
from poise.runtime import spans
from poise.runtime.collectives import run_on_thread
from poise.runtime.moe import ExpertList
from poise.simulate.training import Backward, Forward
from poise.stepwise.registry import as_policy
from poise.train import Rollout, fully_shard_experts
from poise.train.history import LoadHistory


class Clock:
    """The device: what experts and attention take. One a process: experts are copied without values."""

    forward: DeviceClock
    backward: DeviceClock
    began = 0.0
    window_s = 0.0

    @classmethod
    def start(cls, curve: ExpertCurve, window_s: float) -> None:
        """Before the first computation."""
        cls.forward, cls.backward = DeviceClock(curve), DeviceClock(lambda tokens: 2.0 * curve(tokens))
        cls.window_s = window_s


class Marks:
    """Moments of the step that runs, float64 [L, 2, 11] (:mod:`poise.simulate.training` names them), and spans of weights."""

    at_LXM = np.zeros((0, 2, 11))
    layer = 0
    spans: ClassVar[list[tuple[str, float, float]]] = []


class _Enter(torch.autograd.Function):
    """An expert begins; backwards it ends here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Clock.began, ctx.tokens = time.monotonic(), len(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        Clock.backward.compute([ctx.tokens], since=Clock.began)
        return grads[0]


class _Leave(torch.autograd.Function):
    """An expert ends; backwards it begins here."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        Clock.forward.compute([len(y)], since=Clock.began)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        Clock.began = time.monotonic()
        return grads[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: int) -> Tensor:
        ctx.layer = Marks.layer = layer
        began = time.monotonic()
        until(began + Clock.window_s)
        Marks.at_LXM[layer, 0, : Forward.COUNTED] = began, time.monotonic()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        until(time.monotonic() + 2.0 * Clock.window_s)
        Marks.at_LXM[ctx.layer, 1, Backward.ATTENTION] = time.monotonic()
        Marks.layer = ctx.layer - 1
        return grads[0], None


class Expert(nn.Module):
    """Multiplies by its first row; the other rows are there to be moved."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, d]."""
        return _Leave.apply(_Enter.apply(x) * self.weight[0])


class Block(nn.Module):
    """Attention by the clock, and experts whose router is given."""

    def __init__(self, number: int, experts: int, rows: int, width: int) -> None:
        super().__init__()
        self.number = number
        self.experts = ExpertList(Expert(rows, width) for _ in range(experts))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Tokens [T, d] to experts [T, K]."""
        x = _Attention.apply(x, self.number)
        return x + self.experts(x, ids, torch.full(ids.shape, 1.0 / ids.shape[1]))


class Model(nn.Module):
    """Blocks one after the other."""

    def __init__(self, layers: int, experts: int, rows: int, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.blocks = nn.ModuleList(Block(layer, experts, rows, width) for layer in range(layers))

    def forward(self, x: Tensor, ids: list[Tensor]) -> Tensor:
        """Tokens [T, d]; experts of every layer."""
        for block, chosen in zip(self.blocks, ids, strict=True):
            x = block(x, chosen)
        return x


BEGINS = {"dispatch": Forward.SENT, "combine": Forward.RETURNED, "backward weights": Backward.START,
          "backward dispatch": Backward.SENT, "backward reduce": Backward.COMPUTED,
          "backward combine": Backward.RETURNED}  # fmt: skip
ENDS = {"counts": Forward.COUNTED, "plan": Forward.PLANNED, "dispatch": Forward.DISPATCHED, "arrange": Forward.ARRANGED,
        "weights": Forward.READY, "experts": Forward.COMPUTED, "combine": Forward.COMBINED,
        "backward weights": Backward.READY, "backward dispatch": Backward.DISPATCHED,
        "backward arrange": Backward.ARRANGED, "backward reduce": Backward.POSTED,
        "backward combine": Backward.COMBINED}  # fmt: skip
"""Parts of a layer that the runtime tells of, and the marks at which they begin and end."""


def note(name: str, began: float, ended: float) -> None:
    """The runtime's hook (:mod:`poise.runtime.spans`). Backwards, layers come in reverse: each ends with its attention."""
    if name in ("gather", "reduce"):
        Marks.spans.append((name, began, ended))
    for marks, when in ((BEGINS, began), (ENDS, ended)):
        if name in marks:
            Marks.at_LXM[Marks.layer, int(name.startswith("backward ")), marks[name]] = when


class Traffic:
    """Counts by step, layer, source and expert, and what follows for this rank."""

    def __init__(self, load_BLSE: np.ndarray, job: dict[str, Any]) -> None:
        self.load_BLSE, self.top_k, self.width = load_BLSE, int(job["top_k"]), int(job["width"])

    def ids(self, step: int, rank: int) -> list[Tensor]:
        """Experts of a rank's tokens in every layer, [T, K]; those of a token differ, as a record has them."""
        out = []
        for layer, load_SE in enumerate(self.load_BLSE[step]):
            ids_TK = np.repeat(np.arange(load_SE.shape[1]), load_SE[rank]).reshape(self.top_k, -1).T.copy()
            np.random.default_rng([step, layer, rank]).shuffle(ids_TK)
            out.append(torch.from_numpy(ids_TK))
        return out

    def rollout(self, steps: range, rank: int) -> tuple[Rollout, list[np.ndarray]]:
        """What a rank knows of steps to come: its tokens' experts, and which token is which row of the record."""
        ids = [torch.stack(self.ids(step, rank), dim=1).numpy() for step in steps]
        ends = np.cumsum([len(one) for one in ids])
        rows = [np.arange(end - len(one), end) for end, one in zip(ends, ids, strict=True)]
        return Rollout(RoutingTrace(np.concatenate(ids).astype(np.int16), self.load_BLSE.shape[3])), rows

    def tokens(self, step: int, rank: int) -> Tensor:
        """Inputs of a rank, [T, d]."""
        count = int(self.load_BLSE[step, 0, rank].sum()) // self.top_k
        make = torch.Generator().manual_seed(1000 * step + rank)
        return torch.randn(count, self.width, generator=make)


class Row:
    """One row of the table on this rank: a model of its own under a policy."""

    def __init__(self, job: dict[str, Any], row: dict[str, Any], traffic: Traffic, mesh: Any) -> None:
        self.job, self.traffic, self.name = job, traffic, row["name"]
        self.owners = np.array(row["owners"])
        self.rank = dist.get_rank()
        model = Model(job["layers"], job["experts"], job["rows_per_expert"], job["width"])
        self.run = fully_shard_experts(
            model, mesh=mesh, policy=as_policy(row["policy"]), step_slots=row["step_slots"], sharding=None,
            rematerialise=row.get("rematerialise", False), cluster=Cluster.parse(job["cluster"]),
            window_s=job["window_s"], form=row.get("form", "auto"), owners=self.owners,
        )  # fmt: skip
        self.run.set_gradient_divide_factor(1.0)
        self.model, self.planner = model, self.run.schedule.planner
        self.planner.top_k = traffic.top_k
        if job["stream"]:
            run_on_thread(self.run.schedule.deployment.weights_group)
        self.foresees = bool(row.get("foresee"))
        self._turns: Iterator[int] = iter(())
        self._known: tuple[LoadHistory, list[np.ndarray], np.ndarray] | None = None
        self.tokens: list[np.ndarray] = []
        self.worst = 0.0
        """What :meth:`gap` said of the step that was not timed."""

    def reset(self, warm_up: int) -> None:
        """As after the warm-up steps: what they taught the policy, the replicas it keeps, owners that it moved."""
        planner = self.planner
        if self._known is None:
            self._known = self._rehearse(warm_up)
        history, held, owners = self._known
        if (owners != self.run.owners).any():
            self.run.reshard(owners)
        self.run.schedule.restart()
        if self.foresees:
            self._foresee(range(warm_up, warm_up + self.job["steps"]))
            return
        planner.history = copy.deepcopy(history)
        for driver, held_ED in zip(planner.drivers, held, strict=True):
            driver.held_ED = held_ED.copy()
        for layer in range(self.job["layers"]):
            planner.plan_ahead(layer)
        for layer in range(self.job["layers"]):
            planner.early_plan(layer)

    def _foresee(self, steps: range) -> None:
        """The steps to come are one optimizer step's micro-batches, whose routing is known; as with the other rows, the
        first one is planned before it is timed.
        """
        self._turns.close() if isinstance(self._turns, Generator) else None
        rollout, rows = self.traffic.rollout(steps, self.rank)
        self._turns = self.run.foresee(rollout, rows)
        next(self._turns)
        self._at = steps.start
        for layer in range(self.job["layers"]):
            self.planner.early_plan(layer)

    def _rehearse(self, warm_up: int) -> tuple[LoadHistory, list[np.ndarray], np.ndarray]:
        planner, load = self.planner, self.traffic.load_BLSE
        for step in range(warm_up):
            for layer in range(load.shape[1]):
                load_SE = load[step, layer].astype(np.int64)
                driver = planner.drivers[layer]
                early_ED = driver.choose(planner.view(layer))
                driver.finish(planner.view(layer, load_SE.sum()), early_ED, load_SE)
                planner.history.record(layer, load_SE.sum(axis=0))
            planner.history.close()
        owners = self.owners.copy()
        kept = [driver.held_ED for driver in planner.drivers]
        for layer, held_ED in enumerate(kept):  # who no longer holds an expert does not own it
            gone = ~held_ED[np.arange(len(held_ED)), owners[layer]]
            owners[layer, gone] = held_ED[gone].argmax(axis=1)
        return copy.deepcopy(planner.history), kept, owners

    def rehearse(self, step: int) -> None:
        """A step whose gradients are compared with a dense run's."""
        self.step(step)
        self.worst = self.gap(step)

    def step(self, step: int) -> tuple[np.ndarray, float, float]:
        """Marks of every layer [L, 2, 11], and when the step began and ended."""
        x, ids = self.traffic.tokens(step, self.rank).requires_grad_(True), self.traffic.ids(step, self.rank)
        for weight in self.run.parameters():
            weight.grad = None
        Marks.at_LXM, Marks.spans = np.zeros((len(ids), 2, 11)), []
        if self.foresees and step != self._at:
            next(self._turns)
            self._at = step
        dist.barrier()
        began = time.monotonic()
        self.model(x, ids).square().sum().backward()
        ended = time.monotonic()
        self.tokens = [one.tokens_D for one in self.run.metrics]
        return Marks.at_LXM, began, ended

    def gap(self, step: int) -> float:
        """Largest relative error of this rank's gradients against a dense run over all tokens."""
        world = dist.get_world_size()
        dense = Model(self.job["layers"], self.job["experts"], self.job["rows_per_expert"], self.job["width"])
        scale = [torch.stack([one.weight.detach()[0] for one in block.experts]) for block in dense.blocks]
        for weight in scale:
            weight.requires_grad_(True)
        x = torch.cat([self.traffic.tokens(step, rank) for rank in range(world)])
        every = zip(*(self.traffic.ids(step, rank) for rank in range(world)), strict=True)
        for weight, ids in zip(scale, every, strict=True):
            x = x + (x.unsqueeze(1) * weight[torch.cat(ids)]).mean(dim=1)
        x.square().sum().backward()
        worst = 0.0
        for layer, weight in zip(self.run.schedule.layers, scale, strict=True):
            for name, mine in layer.owned().items():
                assert name.endswith("weight") and weight.grad is not None
                want, got = weight.grad[layer.mine], mine.grad
                if got is None:
                    worst = max(worst, float(want.abs().max()) if len(want) else 0.0)
                    continue
                worst = max(worst, float((got[:, 0] - want).norm() / want.norm().clamp(min=1e-9)),
                            float(got[:, 1:].abs().max()) if len(got) else 0.0)  # fmt: skip
        return worst


def work(job: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """All rows on this rank."""
    Clock.start(ExpertCurve.from_csv(job["curve"]), job["window_s"])
    spans.record(note)
    traffic = {name: Traffic(load, job) for name, load in arrays.items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = [Row(job, row, traffic[row.get("traffic", "load")], mesh) for row in job["table"]]
    marks = np.zeros((len(rows), job["repeats"], job["steps"], job["layers"], 2, 11))
    ends = np.zeros((*marks.shape[:3], 2))
    tokens = np.zeros((len(rows), job["steps"], job["layers"], dist.get_world_size()), np.int64)
    kept: dict[str, list[Any]] = {}
    for which, repeat, step in in_turn(rows, job):
        marks[which, repeat, step], *ends[which, repeat, step] = rows[which].step(job["warm_up"] + step)
        tokens[which, step] = rows[which].tokens
        if repeat == 0:
            kept[rows[which].name] = list(Marks.spans)
    clocks = Clock.forward.report(), Clock.backward.report()
    return {
        "marks": marks, "ends": ends, "gaps": [row.worst for row in rows], "tokens": tokens, "spans": kept,
        "overruns": sum(clock["overruns"] for clock in clocks), "late_p99_s": max(clock["late_p99_s"] for clock in clocks),
    }  # fmt: skip


def together(every: list[dict[str, Any]]) -> dict[str, Any]:
    """Marks [rows, repeats, steps, L, D, 2, 11], ends [rows, repeats, steps, D, 2]; tokens are the same on all."""
    axis = {"marks": 4, "ends": 3, "gaps": 0, "overruns": 0, "late_p99_s": 0}
    out = {name: np.stack([one[name] for one in every], axis=at) for name, at in axis.items()}
    return {**out, "tokens": every[0]["tokens"], "spans": json.dumps([one["spans"] for one in every])}


if __name__ == "__main__":
    on_ranks(work, together)
