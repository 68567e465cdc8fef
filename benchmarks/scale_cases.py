"""What benchmarks/scale.py runs on: loads of DeepSeek-R1 and of a stand-in for Kimi-K2, steps, synthetic tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import settle
from poise.routing.batch import RoutingBatch

TOP_K, DENSE, LAYERS, DRIFT, KEPT, WARM_UP, SEED = 8, 3, 58, 0.3, 0.97, 12, 7
GROUPS, TOP_GROUPS = 8, 4
"""DeepSeek-V3 routes a token to 4 of 8 groups of experts."""


@dataclass(frozen=True)
class Phase:
    """Tokens a device, the workloads that maps are fitted on and the one, another, that they are judged on."""

    name: str
    tokens: int
    fit: tuple[str, ...]
    judge: str


PREFILL = Phase("prefill", 4096, ("prefill_in1000out1000", "prefill_in512"), "prefill_in4096")
DECODE = Phase("decode", 128, ("decode_in500out1500",), "decode_in1000out1000")
EFFORT = {64: (6, 6), 128: (4, 5), 256: (2, 4), 512: (1, 4), 1024: (1, 3), 2048: (1, 3)}
"""Devices -> layers, judged steps."""


@dataclass(frozen=True)
class Case:
    """A model on D devices in nodes of 8."""

    model_name: str
    devices: int
    phase: Phase
    tokens: int = 0
    layers: int = 0
    steps: int = 0
    drift: float = DRIFT
    extra: int = 0

    @property
    def model(self) -> ModelSpec:
        """Its sizes."""
        return ModelSpec.parse(self.model_name)

    @property
    def cluster(self) -> Cluster:
        """The machine."""
        open_cluster = Cluster.parse(f"{self.devices // 8}x8:h100")
        return settle(open_cluster, self.model, self.devices * self.tokens_per_device)

    @property
    def slots_D(self) -> np.ndarray:
        """The fewest equal slots a device that leave an eighth of the experts redundant (DeepSeek: 32 of 256); ``extra`` more."""
        needed = self.model.num_experts * 9 // 8
        return np.full(self.devices, -(-needed // self.devices) + self.extra, np.int64)

    @property
    def tokens_per_device(self) -> int:
        """Tokens whose home a device is, in a step."""
        return self.tokens or self.phase.tokens

    @property
    def pairs(self) -> int:
        """(token, expert) pairs of a step."""
        return self.devices * self.tokens_per_device * TOP_K

    @property
    def picked(self) -> np.ndarray:
        """Recorded MoE layers, spread over the 58."""
        count = self.layers or EFFORT[self.devices][0]
        return np.rint(np.linspace(0, LAYERS - 1, count + 2)[1:-1]).astype(int) if count < LAYERS else np.arange(LAYERS)

    @property
    def judged(self) -> int:
        """Judged steps."""
        return self.steps or EFFORT[self.devices][1]

    def share(self, data: Path, name: str) -> np.ndarray:
        """Share of each expert, [layers, E]."""
        recorded = shares(data)
        if self.model.num_experts != 256:
            return stand_in(data, self.model.num_experts)[list(recorded).index(name)][self.picked]
        return recorded[name][self.picked]

    def layer_ids(self) -> np.ndarray:
        """Decoder layers of the picked ones."""
        return (self.picked + DENSE).astype(np.int32)

    def fitted(self, data: Path) -> RoutingBatch:
        """One scenario a workload, scaled to the tokens of a step."""
        load = np.stack([self.share(data, name) for name in self.phase.fit]) * self.pairs
        return RoutingBatch(load, np.full(len(load), 1 / len(load)), TOP_K, self.layer_ids())

    def batch(self, data: Path) -> RoutingBatch:
        """Warm-up and judged steps."""
        share_LE = self.share(data, self.phase.judge)
        return drifting(share_LE, self.pairs, WARM_UP + self.judged, self.drift, self.layer_ids())


@cache
def shares(data: Path) -> dict[str, np.ndarray]:
    """Share of each expert by workload, [58, 256]."""
    out = {}
    for path in sorted((data / "deepseek-r1").glob("*.json")):
        count = np.array(json.loads(path.read_text())["logical_count"], dtype=float)[DENSE:]
        out[path.stem] = count / count.sum(axis=1, keepdims=True)
    return out


@cache
def stand_in(data: Path, experts: int) -> np.ndarray:
    """Shares of a model with more experts and the recorded skew and drift, [workloads, 58, E].

    Layer by layer: experts sorted by their mean share over the workloads; that sorted curve is read at E equally
    spaced quantiles (linear in the logarithm); each new expert takes the workload / mean ratios of the recorded expert
    nearest in rank; shares are scaled to 1 and the experts renumbered at random.
    """
    share = np.stack(list(shares(data).values()))
    workloads, layers, recorded = share.shape
    at = (np.arange(experts) + 0.5) / experts * recorded - 0.5
    rng, out = np.random.default_rng(SEED), np.empty((workloads, layers, experts))
    for layer in range(layers):
        mean = share[:, layer].mean(axis=0)
        order = np.argsort(-mean)
        curve = np.exp(np.interp(at, np.arange(recorded), np.log(mean[order])))
        ratio = (share[:, layer] / mean)[:, order[np.rint(at).astype(int).clip(0, recorded - 1)]]
        out[:, layer] = (curve * ratio)[:, rng.permutation(experts)]
    return out / out.sum(axis=2, keepdims=True)


def popularity(share_LE: np.ndarray, steps: int, drift: float, seed: int = SEED) -> np.ndarray:
    """Share of each expert in each step, [B, L, E]: times exp(drift * z), z an AR(1); at most 1 / K."""
    rng = np.random.default_rng(seed)
    z, out = rng.normal(size=share_LE.shape), []
    for _ in range(steps):
        p = share_LE * np.exp(drift * z)
        p = np.minimum(p / p.sum(axis=1, keepdims=True), 1.0 / TOP_K)
        out.append(p / p.sum(axis=1, keepdims=True))
        z = KEPT * z + np.sqrt(1 - KEPT**2) * rng.normal(size=z.shape)
    return np.stack(out)


def drifting(share_LE: np.ndarray, pairs: int, steps: int, drift: float, layer_ids: np.ndarray) -> RoutingBatch:
    """Loads of steps: drawn from :func:`popularity`."""
    rng = np.random.default_rng(SEED + 1)
    load = np.stack([[rng.multinomial(pairs, p) for p in step] for step in popularity(share_LE, steps, drift)])
    return RoutingBatch(load.astype(float), np.full(steps, 1 / steps), TOP_K, layer_ids)


def draw_tokens(share_LE: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Experts of synthetic tokens, int16 [T, L, K]: Gumbel scores, the 4 groups with the best two experts, the top 8."""
    layers, experts = share_LE.shape
    out = np.empty((tokens, layers, TOP_K), np.int16)
    for layer, share in enumerate(share_LE):
        score = np.log(share)[None] + rng.gumbel(size=(tokens, experts))
        grouped = score.reshape(tokens, GROUPS, -1)
        best_two = np.partition(grouped, -2, axis=2)[:, :, -2:].sum(axis=2)
        cut = np.partition(best_two, -TOP_GROUPS, axis=1)[:, -TOP_GROUPS, None]
        grouped[best_two < cut] = -np.inf
        top = np.argpartition(-score, TOP_K, axis=1)[:, :TOP_K]
        out[:, layer] = np.take_along_axis(top, np.argsort(-np.take_along_axis(score, top, 1), axis=1), 1)
    return out


def token_batch(share_LE: np.ndarray, tokens: int, steps: int, drift: float, layer_ids: np.ndarray) -> RoutingBatch:
    """Steps of synthetic tokens; homes in turn."""
    rng = np.random.default_rng(SEED + 2)
    experts = np.concatenate([draw_tokens(p, tokens, rng) for p in popularity(share_LE, steps, drift)])
    start = np.arange(steps + 1, dtype=np.int64) * tokens
    load = np.stack([[np.bincount(experts[a : a + tokens, layer].ravel(), minlength=share_LE.shape[1])
                      for layer in range(share_LE.shape[0])] for a in start[:-1]])  # fmt: skip
    return RoutingBatch(load.astype(float), np.full(steps, 1 / steps), TOP_K, layer_ids, experts, start)
