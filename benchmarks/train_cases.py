"""What benchmarks/train.py runs on: Hecate's models and clusters, real and synthetic routing counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from poise.cost.weights import StepPrice, training_price
from poise.machine.cluster import Cluster, from_preset
from poise.machine.model import ModelSpec
from poise.replay.training import SourceLoads

MODELS = {"gpt-moe-s": (2048, True, 50_257), "gpt-moe-l": (2048, True, 50_257),
          "bert-moe": (512, False, 30_522), "bert-moe-deep": (512, False, 30_522)}  # fmt: skip
TOKENS, SLOTS, STEPS, WARM_UP, SEED = 8192, 8, 6, 5, 11
REACHED = 0.45
"""Share of the peak FLOP/s that dense kernels reach."""


def clusters() -> dict[str, Cluster]:
    def make(nodes: int, preset: str, peak: float, gigabit: float, **more: float) -> Cluster:
        return from_preset([8] * nodes, preset, nic_shared=True, inter_bytes_per_s=gigabit * 1.25e8,
                           flops_per_s=peak * REACHED, name=f"{nodes}x8 {preset}", **more)  # fmt: skip

    small = {"memory_bytes": 40e9, "memory_bytes_per_s": 1555e9}
    return {"A": make(4, "v100", 125e12, 100), "B": make(4, "a100", 312e12, 400, **small),
            "A/2": make(2, "v100", 125e12, 100), "B/2": make(2, "a100", 312e12, 400, **small)}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model on a cluster."""

    name: str
    cluster: Cluster
    tokens: int = TOKENS

    @property
    def model(self) -> ModelSpec:
        """Its sizes; 32 experts on 16 devices (weak scaling)."""
        return replace(ModelSpec.parse(self.name), num_experts=64 if self.cluster.num_nodes == 4 else 32)

    def price(self, **options) -> StepPrice:
        """The training price of a step."""
        sequence, causal, _ = MODELS[self.name]
        tokens = self.tokens * self.cluster.num_devices
        return training_price(tokens, self.model.num_experts, self.cluster, self.model, sequence_length=sequence,
                              causal=causal, **options)  # fmt: skip

    def rest_seconds(self) -> float:
        """Output head (three passes) and Adam (28 bytes read and written a parameter owned or dense)."""
        model, cluster = self.model, self.cluster
        vocabulary = MODELS[self.name][2]
        head = 6.0 * model.hidden_size * vocabulary * self.tokens / cluster.flops_per_s
        owned = model.num_moe_layers * model.num_experts * model.expert_parameters / cluster.num_devices
        return head + 28.0 * (owned + dense_parameters(self.name)) / cluster.memory_bytes_per_s


def dense_parameters(name: str) -> float:
    model = ModelSpec.parse(name)
    return 4.0 * model.hidden_size**2 * model.num_hidden_layers + model.hidden_size * MODELS[name][2]


@cache
def shares(data: Path) -> np.ndarray:
    """Share of each expert in each domain and recorded layer, [domain, 3, 64]."""
    files = sorted((data / "olmoe" / "expert_counts").glob("*.npz"))
    counts = np.stack([np.load(file)["counts"] for file in files]).astype(float)
    return counts / counts.sum(axis=2, keepdims=True)


def skew(data: Path) -> float:
    share = shares(data)
    return float((share.max(axis=2) * share.shape[2]).mean())


@cache
def matched_sigma(data: Path) -> float:
    """Sigma of the log-normal popularity whose mean expert max / mean is that of the traces."""
    z = np.random.default_rng(0).normal(size=(2000, 64))

    def of(sigma: float) -> float:
        p = np.exp(sigma * z)
        return float((p.max(axis=1) / p.mean(axis=1)).mean())

    low, high = 0.1, 3.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if of(middle) < skew(data) else (low, middle)
    return round(low, 2)


def traced(data: Path, case: Case, steps: int, seed: int = SEED) -> SourceLoads:
    """Real counts (:func:`of_domains`); 32 experts are half of the 64."""
    model = case.model
    return of_domains(data, case.tokens, model.num_moe_layers, model.num_experts, model.top_k, MODELS[case.name][0],
                      steps, case.cluster.num_devices, seed)  # fmt: skip


def of_domains(
    data: Path, tokens: int, layers: int, experts: int, top_k: int, sequence: int, steps: int, devices: int, seed: int
) -> SourceLoads:
    """Every sequence is of one domain; the mixture drifts (softmax of 4 z, z an AR(1) with 0.97).

    ``tokens`` a device and step. Layer l of the model is the recorded layer l * 3 // L with its experts renumbered.
    """
    rng = np.random.default_rng(seed)
    share = shares(data)
    pick = [rng.permutation(64)[:experts] for _ in range(layers)]
    share_lGE = np.stack([share[:, layer * 3 // layers][:, pick[layer]] for layer in range(layers)])
    share_lGE /= share_lGE.sum(axis=2, keepdims=True)
    out = np.zeros((steps, layers, devices, experts), np.int32)
    z = rng.normal(size=len(share))
    for step in range(steps):
        z = 0.97 * z + np.sqrt(1 - 0.97**2) * rng.normal(size=len(share))
        weight = np.exp(4 * z) / np.exp(4 * z).sum()
        count_DG = rng.multinomial(tokens // sequence, weight, size=devices)
        for layer in range(layers):
            for g in range(len(share)):
                out[step, layer] += rng.multinomial(count_DG[:, g] * sequence * top_k, share_lGE[layer, g])
    return SourceLoads(out, top_k)


def drifting(data: Path, case: Case, steps: int, seed: int = SEED) -> SourceLoads:
    """Synthetic: popularity exp(sigma z), z an AR(1) with 0.97 a step, noise 0.3 a source (log-normal)."""
    rng = np.random.default_rng(seed)
    model, devices, sigma = case.model, case.cluster.num_devices, matched_sigma(data)
    shape = (model.num_moe_layers, devices, model.num_experts)
    z = rng.normal(size=(shape[0], 1, shape[2]))
    out = np.zeros((steps, *shape), np.int32)
    for step in range(steps):
        z = 0.97 * z + np.sqrt(1 - 0.97**2) * rng.normal(size=z.shape)
        p = np.exp(sigma * z + 0.3 * rng.normal(size=shape))
        out[step] = rng.multinomial(case.tokens * model.top_k, p / p.sum(axis=2, keepdims=True))
    return SourceLoads(out, model.top_k)


TRAFFIC = {"traces": traced, "drift": drifting}
