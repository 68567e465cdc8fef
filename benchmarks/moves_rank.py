"""What every rank of an emulated cluster runs for benchmarks/moves.py: steps of replayed tokens while a placement changes.

moves_rank.py JOB.json ROUTING.npz OUT.npz
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measured import on_ranks, until
from serve_rank import Routing, scale_of, scaled_rows

from poise.lab.emulate import DeviceClock
from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.runtime.canary import Canary
from poise.runtime.collectives import Batch, twin
from poise.serve.layer import ServedLayer
from poise.serve.swap import Swap, align

EVERYTHING = 2**62
"""Bytes of a step that put all transfers into one batch."""


class InBackground(Swap):
    """All transfers at once, and steps do not wait for them."""

    def advance(self) -> float:
        """Post all at the first call; look at what came once a thread has waited for it."""
        if self._batch is None and self._posted < len(self.rounds):
            self._batch = Batch(self._operations(self.rounds[0]), self.group)
            self._posted = len(self.rounds)
            self._thread = threading.Thread(target=self._batch.wait, daemon=True)
            self._thread.start()
        elif self._batch is not None and not self._thread.is_alive():
            self.wrong += self._canary.wrong({place: self.arrived[place] for place in self._unseen})
            self._batch, self._unseen = None, []
        self.steps += 1
        return 0.0


class Served:
    """Layers that serve a placement, and change it."""

    def __init__(self, job: dict[str, Any], routing: Routing, weights: Any) -> None:
        self.job, self.routing, self.rank, self.weights = job, routing, dist.get_rank(), weights
        self.cluster = Cluster.uniform(*job["shape"])
        self.kind = scaled_rows(job["width"], job["expert_bytes"] // 2)
        self.clock = DeviceClock(lambda tokens: job["token_s"] * float(np.sum(tokens)))
        self.places = [Placement.load(path) for path in job["placements"]]
        self.layers: list[ServedLayer] = []

    def start(self) -> None:
        """On the first placement, with weights that are known by their number."""
        self.placement = self.places[0]
        banks = [self._bank(self.placement.experts_of(index, self.rank)) for index in range(self.placement.num_layers)]
        self.layers = [
            ServedLayer(index, self.kind, bank, self.placement, self.cluster, traffic="home", clock=self.clock)
            for index, bank in enumerate(banks)
        ]
        held = [self.placement.experts_of(index, self.rank) for index in range(len(banks))]
        self.canary = Canary.of(held, lambda layer, slot: [banks[layer]["w"][slot]], self.placement.num_experts,
                                dist.group.WORLD, torch.device("cpu"))  # fmt: skip

    def _bank(self, held: list[int]) -> dict[str, torch.Tensor]:
        bank = torch.zeros(len(held), self.kind.numel, dtype=torch.bfloat16)
        bank[:, 0] = scale_of(torch.tensor(held, dtype=torch.int64))
        bank[:, 1] = torch.tensor(held, dtype=torch.bfloat16)
        return {"w": bank}

    def swap(self, number: int, at_once: str) -> Swap:
        """To a placement of the job: rounds, or ``at_once``, ``waits`` or ``background``."""
        kind = InBackground if at_once == "background" else Swap
        banks = [layer.bank for layer in self.layers]
        return kind(self.placement, align(self.placement, self.places[number]), banks, [self.kind] * len(banks),
                    self.cluster.node_D, self.weights, EVERYTHING if at_once else 1, self.canary)  # fmt: skip

    def run(self, way: dict[str, Any]) -> list[tuple[float, int]]:
        """Seconds of every step, and what it was: 0 before, 1 with weights on their way, 2 after."""
        self.start()
        goals, swap, out, moving = list(way["goals"]), None, [], 0
        for step in range(self.job["steps"]):
            dist.barrier()
            began = time.monotonic()
            if step >= self.job["before"] and swap is None and goals:
                swap = self.swap(goals.pop(0), way["at_once"])
            state = 1 if swap is not None else 2 if step >= self.job["before"] and way["goals"] else 0
            if swap is not None:
                swap.advance()
            self._tokens(step)
            flag = torch.tensor(
                [int(swap is not None and not swap.complete), int(swap is not None and bool(swap.wrong))]
            )
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            assert not flag[1], "a copy is wrong"
            if swap is not None and not flag[0]:
                for layer, bank in zip(self.layers, swap.apply(), strict=True):
                    layer.switch(bank, swap.after)
                self.placement, swap = swap.after, None
            out.append((time.monotonic() - began, state))
            moving += state == 1
        assert swap is None and not goals, f"{moving} steps were too few for the moves of {way['name']}"
        return out

    def _tokens(self, step: int) -> None:
        routing = self.routing
        mine = routing.tokens(step % self.job["batch_steps"], self.rank)
        for index, layer in enumerate(self.layers):
            until(time.monotonic() + self.job["window_s"])
            x = torch.ones(len(mine), self.job["width"], dtype=torch.bfloat16)
            ids, weight = routing.experts[mine, index], routing.weight.expand(len(mine), -1)
            y = layer.run(x, ids, weight)
            if step in (0, self.job["steps"] - 1):
                want = (scale_of(ids) * routing.weight).sum(dim=1)
                assert torch.allclose(y[:, 0].float(), want, rtol=0.02), "a token met another expert"


def work(job: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """All ways in every repeat, in an order that turns."""
    served = Served(job, Routing(arrays), twin(dist.group.WORLD))
    shape = (len(job["ways"]), job["repeats"], job["steps"], 2)
    out = np.zeros(shape)
    served.run(job["ways"][0])  # connections and pages
    began = time.monotonic()
    for repeat in range(job["repeats"]):
        for turn in range(len(job["ways"])):
            which = (turn + repeat) % len(job["ways"])
            out[which, repeat] = served.run(job["ways"][which])
        if dist.get_rank() == 0:
            print(f"repeat {repeat + 1}/{job['repeats']}", flush=True)
        late = torch.tensor([int(time.monotonic() - began > 60 * job["minutes"])])
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if late:
            out = out[:, : repeat + 1]
            break
    return {"steps": out, "overruns": served.clock.report()["overruns"]}


def together(every: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of the slowest rank and state, [ways, repeats, steps, 2]; arithmetic that took longer than its device."""
    return {"steps": np.max([one["steps"] for one in every], axis=0), "overruns": sum(one["overruns"] for one in every)}


if __name__ == "__main__":
    on_ranks(work, together)
