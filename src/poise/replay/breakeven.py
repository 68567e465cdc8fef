"""breakeven: from which batch size step-wise balancing pays on a cluster, and how many step slots it wants.

For every batch size the same traffic is run three ways: the static placement under the engine's even split, the
balance that is kept whatever it costs (``poise`` with ``objective="tokens"``), and ``poise``, which wakes only where it
expects to gain. Everything that a fast loop moves and waits for is priced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import settle
from poise.planning.placement import Placement
from poise.replay.serving import WARM_UP, FastLoop, replay_steps
from poise.replay.static import replay
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.trace import RoutingTrace
from poise.stepwise.poise.policy import Poise
from poise.util.errors import OptionError

PAYS = 0.01
"""Least gain that counts."""
GOAL = 0.95
"""Efficiency that :attr:`BreakEven.efficient_from` asks for."""
SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
LAYERS = 6


@dataclass(frozen=True, slots=True)
class BreakEvenRow:
    """One batch size: modelled milliseconds of the sampled layers, speedups over static, efficiency of the best."""

    tokens: int
    static_seconds: float
    always_speedup: float
    speedups: tuple[float, ...]
    efficiency: float


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Rows by batch size; ``slots`` are the step slots of their speedups, ``layers`` how many MoE layers they cover."""

    rows: tuple[BreakEvenRow, ...]
    slots: tuple[int, ...]
    traffic_words: str
    layers: int

    @property
    def pays_from(self) -> int | None:
        """Least batch from which on ``poise`` gains 1 % at every larger size, or None."""
        return self._from([max(row.speedups) >= 1 + PAYS for row in self.rows])

    @property
    def always_pays_from(self) -> int | None:
        """The same for balance at any cost."""
        return self._from([row.always_speedup >= 1 + PAYS for row in self.rows])

    @property
    def efficient_from(self) -> int | None:
        """Least batch from which on the efficiency is 0.95 or more."""
        return self._from([row.efficiency >= GOAL for row in self.rows])

    def _from(self, good: Sequence[bool]) -> int | None:
        out = None
        for row, fine in zip(reversed(self.rows), reversed(good), strict=True):
            if not fine:
                break
            out = row.tokens
        return out

    def slots_wanted(self) -> int:
        """Fewest step slots within 1 % of the best at the largest batch."""
        best = self.rows[-1].speedups
        return next(m for m, gain in zip(self.slots, best, strict=True) if gain >= max(best) * (1 - PAYS))

    def verdict(self) -> str:
        """One sentence."""
        if self.pays_from is None:
            return "Not worth it: at no batch size tried does step-wise balancing gain 1 %."
        text = (
            f"Step-wise balancing pays from {self.pays_from} tokens a step and wants {self.slots_wanted()} step slots"
        )
        if self.always_pays_from != self.pays_from:
            always = self.always_pays_from
            text += f"; balancing at any cost pays from {always}" if always else "; balancing at any cost never pays"
        return text + "."

    def to_json(self) -> dict[str, Any]:
        """Everything that the table shows."""
        return {
            "pays_from": self.pays_from, "always_pays_from": self.always_pays_from,
            "efficient_from": self.efficient_from, "slots_wanted": self.slots_wanted(), "verdict": self.verdict(),
            "traffic": self.traffic_words, "layers": self.layers,
            "rows": [
                {"tokens": row.tokens, "static_seconds": row.static_seconds, "always_speedup": row.always_speedup,
                 "speedup": dict(zip(map(str, self.slots), row.speedups, strict=True)), "efficiency": row.efficiency}
                for row in self.rows
            ],
        }  # fmt: skip


def drifting_batch(
    tokens: int, steps: int, num_layers: int, num_experts: int, top_k: int, *, skew: float, seed: int
) -> RoutingBatch:
    """Loads of log-normal popularity exp(skew * z), z an autoregressive drift of 0.97 a step; drawn token by token."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((num_layers, num_experts))
    load = np.empty((steps, num_layers, num_experts))
    for step in range(steps):
        share = np.exp(skew * z)
        share = np.minimum(share / share.sum(axis=1, keepdims=True), 1.0 / top_k)  # a token uses an expert once
        for layer in range(num_layers):
            load[step, layer] = rng.multinomial(tokens * top_k, share[layer] / share[layer].sum())
        z = 0.97 * z + np.sqrt(1 - 0.97**2) * rng.standard_normal(z.shape)
    words = f"synthetic log-normal loads, skew {skew:g}, drift 0.97 a step, N = {tokens}"
    return RoutingBatch(load, np.full(steps, 1 / steps), top_k, np.arange(num_layers, dtype=np.int32), order=words)


def breakeven(
    cluster: Cluster,
    model: ModelSpec,
    *,
    trace: RoutingTrace | None = None,
    placement: Placement | None = None,
    sizes: Sequence[int] = SIZES,
    slots: Sequence[int] = (0, 1, 2, 4),
    skew: float = 1.0,
    steps: int = 12,
    traffic: DataFlow = "home",
    window_s: float | None = None,
    control_s: float | None = None,
    seed: int = 0,
) -> BreakEven:
    """Run every batch size, static and with each number of step slots.

    Parameters
    ----------
    trace : traffic to draw steps from; without it synthetic loads of the model's shape and of this ``skew``.
    placement : what lies below the fast loop; default contiguous blocks.
    sizes : tokens a step, ascending.
    slots : step slots a device to try.
    steps : judged steps a size, after 5 of warm-up.
    window_s, control_s : measured seconds instead of modelled ones (:mod:`poise.cost.weights`).

    Raises
    ------
    OptionError : sizes or slots out of range, or shapes that disagree.
    """
    if list(sizes) != sorted(set(sizes)) or not sizes or sizes[0] < 1:
        raise OptionError(f"batch sizes must ascend from at least 1, got {list(sizes)[:8]}")
    if not slots or min(slots) < 0:
        raise OptionError(f"step slots must be at least 0, got {list(slots)}")
    rows, words, layers = [], "", 0
    for tokens in sizes:
        if trace is None:
            batch = drifting_batch(
                tokens, steps + WARM_UP, LAYERS, model.num_experts, model.top_k, skew=skew, seed=seed
            )
        else:
            batch = make_batch(trace, tokens_per_step=tokens, steps=steps + WARM_UP, seed=seed, sample=False)
        layers, machine = batch.num_layers, settle(cluster, model, tokens)
        words = batch.order if trace is None else f"{trace.name}: {batch.order}"
        static = placement or contiguous_blocks(batch, machine)
        batch = batch.at_home(cluster.num_devices)
        judged = batch.steps_from(WARM_UP)
        base = replay(judged, static, machine, model, traffic=traffic, split="even")
        base_s = float(base.step_seconds_B.mean())

        def run(
            policy: Poise,
            many: int,
            batch: RoutingBatch = batch,
            static: Placement = static,
            machine: Cluster = machine,
        ) -> tuple[float, float]:
            loop = FastLoop(policy, many, window_s=window_s, control_s=control_s)
            got = replay_steps(batch, static, loop, machine, model, traffic=traffic)
            return float(got.step_seconds_B.mean()), got.efficiency

        always, _ = run(Poise(objective="tokens"), max(slots))
        found = [run(Poise(), many) for many in slots]
        best = int(np.argmin([seconds for seconds, _ in found]))
        rows.append(BreakEvenRow(tokens, base_s, base_s / always, tuple(base_s / s for s, _ in found), found[best][1]))
    return BreakEven(tuple(rows), tuple(slots), words, layers)


def contiguous_blocks(batch: RoutingBatch, cluster: Cluster) -> Placement:
    """Blocks of experts in order, no replicas."""
    device = np.arange(batch.num_experts) * cluster.num_devices // batch.num_experts
    return Placement.from_devices(np.tile(device, (batch.num_layers, 1)), cluster.num_devices,
                                  layer_ids_L=batch.layer_ids_L, method="contiguous")  # fmt: skip
