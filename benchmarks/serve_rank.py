"""What every rank of an emulated cluster runs for benchmarks/measured_serve.py: replayed routing through real exchanges.

    serve_rank.py JOB.json ROUTING.npz OUT.npz

The routing of each token is given, its row and the experts' weights are real bytes, a device clock stands for attention
and experts. Outputs are checked against one multiplication a token in the first repeat.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measured import in_turn, on_ranks, until

from poise.cost.weights import step_price
from poise.lab.emulate import DeviceClock, ExpertCurve
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.runtime import spans
from poise.runtime.collectives import exchange, twin
from poise.runtime.dispatch import all_counts
from poise.runtime.experts import ExpertKind
from poise.serve.layer import ServedLayer
from poise.serve.split import ServingPolicy
from poise.simulate.serving import ServingMark
from poise.stepwise.registry import parse_policy


def scaled_rows(width: int, numel: int) -> ExpertKind:
    """Experts that multiply by their first weight; the others are there to be moved."""
    return ExpertKind("scale", {"w": (numel,)}, lambda bank, x: x * bank["w"][0], None, 1, width, width)


class Routing:
    """The tokens of all steps."""

    def __init__(self, arrays: dict[str, np.ndarray], prefix: str = "") -> None:
        self.experts = torch.from_numpy(arrays[f"{prefix}experts"].astype(np.int64))
        self.home, self.start = arrays[f"{prefix}home"], arrays[f"{prefix}start"]
        self.top_k = self.experts.shape[2]
        weight = torch.arange(self.top_k, 0, -1, dtype=torch.float32)
        self.weight = weight / weight.sum()

    def tokens(self, step: int, rank: int) -> torch.Tensor:
        """Numbers of this rank's tokens in a step."""
        rows = np.arange(self.start[step], self.start[step + 1])
        return torch.from_numpy(rows[self.home[rows] == rank])

    def pairs(self, step: int) -> int:
        """Pairs of a token and an expert in a step, of all ranks."""
        return int(self.start[step + 1] - self.start[step]) * self.top_k


class Run:
    """One row of the table on this rank."""

    def __init__(
        self, job: dict[str, Any], row: dict[str, Any], routing: Routing, cluster: Cluster, weights: Any
    ) -> None:
        self.job, self.routing, self.rank = job, routing, dist.get_rank()
        self.placement = Placement.load(row["placement"])
        self.kind = scaled_rows(job["width"], job["expert_bytes"] // 2)
        self.curve, self.tokens = ExpertCurve.from_csv(job["curve"]), []
        self.clock = DeviceClock(self._seconds_of)
        fast = None
        if row["fast"]:
            model = ModelSpec(**{**job["model"], "moe_layer_ids": tuple(job["model"]["moe_layer_ids"])})
            price = step_price(job["tokens"], model.num_experts, cluster, model, window_s=job["window_s"])
            prior = np.array(job["prior"]) if job.get("prior") else None
            fast = ServingPolicy(parse_policy(row["fast"]), price, step_slots=row["step_slots"], prior_LE=prior)
        self.banks, self.layers = [], []
        for index in range(self.placement.num_layers):
            held = self.placement.experts_of(index, self.rank)
            bank = torch.zeros(len(held), self.kind.numel, dtype=torch.bfloat16)
            bank[:, 0] = scale_of(torch.tensor(held, dtype=torch.int64))
            self.banks.append({"w": bank})
            self.layers.append(ServedLayer(index, self.kind, self.banks[-1], self.placement, cluster,
                                           traffic=job["traffic"], split=row.get("split", "even"),
                                           weights_group=weights, fast=fast,
                                           clock=self.clock))  # fmt: skip
        self.fast = fast
        self.spans: dict[str, list[tuple[float, float]]] = {}

    def reset(self, warm_up: int) -> None:
        """As before the first step; a fast loop then plans, and fetches for, the warm-up steps without their tokens."""
        spans.record(self._note)
        for layer, bank in zip(self.layers, self.banks, strict=True):
            layer.switch(bank, self.placement)
        if self.fast is None:
            return
        for step in range(warm_up):
            mine = self.routing.tokens(step, self.rank)
            for index, layer in enumerate(self.layers):
                layer.prefetch(self.routing.pairs(step))
                ids, flow = self.routing.experts[mine, index], layer.flow
                layer.devices(ids)
                if flow.extra_X is not None:  # nothing is dispatched that would carry the counts
                    flow.extra_DX, flow.extra_X = torch.from_numpy(all_counts(ids, flow.num_experts, flow.group)), None
                layer.split.finish()
        for layer in self.layers:  # no time has passed in which weights could come
            layer.settle()

    def rehearse(self, step: int) -> None:
        """A step whose outputs are checked."""
        self.step(step, True)

    def _note(self, name: str, began: float, ended: float) -> None:
        self.spans.setdefault(name, []).append((began, ended))

    def _seconds_of(self, tokens: Any) -> float:
        self.tokens.append(int(np.sum(tokens)))
        return self.curve(tokens)

    def step(self, step: int, check: bool) -> tuple[np.ndarray, list[int]]:
        """Marks of every layer, float64 [L, 6], and the pairs that this rank computed in each."""
        job, routing = self.job, self.routing
        tag = routing.tokens(step, self.rank)
        x = torch.ones(len(tag), job["width"], dtype=torch.bfloat16)
        marks = np.zeros((len(self.layers), len(ServingMark)))
        stay = job["traffic"] == "stay"
        self.tokens.clear()
        dist.barrier()
        for index, layer in enumerate(self.layers):
            marks[index, ServingMark.START] = time.monotonic()
            layer.prefetch(routing.pairs(step))
            if stay:
                self._share_keys(len(tag))
            until(marks[index, ServingMark.START] + job["window_s"])
            marks[index, ServingMark.ATTENTION] = time.monotonic()
            ids, weight = routing.experts[tag, index], routing.weight.expand(len(tag), -1)
            self.spans.clear()
            if stay:
                moved = layer.move(x, ids, weight, tag, lambda rows: rows)
                tag, y = moved.tag_T, moved.y_Td
            else:
                y = layer.run(x, ids, weight)
            now = time.monotonic()
            sent, ran = self.spans["dispatch"], self.spans["experts"]
            marks[index, ServingMark.PLANNED :] = sent[0][0], sent[-1][1], ran[0][1], now
            if check:
                want = (scale_of(routing.experts[tag, index]) * routing.weight).sum(dim=1)
                assert torch.allclose(y[:, 0].float(), want, rtol=0.02), (y[:5, 0], want[:5])
            x = x.new_ones(len(tag), job["width"])
        return marks, self.tokens.copy()

    def _share_keys(self, tokens: int) -> None:
        """``stay``: new keys and values go to every rank."""
        world, width = dist.get_world_size(), self.job["kv_bytes"]
        mine = torch.tensor([tokens])
        counts = torch.empty(world, dtype=torch.int64)
        dist.all_gather_into_tensor(counts, mine)
        rows = torch.zeros(tokens, width, dtype=torch.uint8).repeat(world, 1)
        exchange(rows, [tokens] * world, counts.tolist(), dist.group.WORLD)


def scale_of(expert: torch.Tensor) -> torch.Tensor:
    """Powers of two, so that bfloat16 keeps them exactly."""
    return 2.0 ** ((expert % 7) - 3).to(torch.float32)


def work(job: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """All rows on this rank."""
    cluster, weights = Cluster.parse(job["cluster"]), twin(dist.group.WORLD)
    runs = [Run(job, row, Routing(arrays, row.get("routing", "")), cluster, weights) for row in job["rows"]]
    shape = (len(runs), job["repeats"], job["steps"], runs[0].placement.num_layers)
    marks, tokens = np.zeros((*shape, len(ServingMark))), np.zeros(shape, np.int64)
    for which, repeat, step in in_turn(runs, job):
        marks[which, repeat, step], tokens[which, repeat, step] = runs[which].step(job["warm_up"] + step, False)
    return {"marks": marks, "tokens": tokens, "overruns": [run.clock.report()["overruns"] for run in runs]}


def together(every: list[dict[str, Any]]) -> dict[str, Any]:
    """Marks [rows, repeats, steps, L, D, 6], tokens without the last axis, overruns [D, rows]."""
    axis = {"marks": 4, "tokens": 4, "overruns": 0}
    return {name: np.stack([one[name] for one in every], axis=at) for name, at in axis.items()}


if __name__ == "__main__":
    on_ranks(work, together)
