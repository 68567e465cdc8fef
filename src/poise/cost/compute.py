"""Seconds of expert compute on one device: a roofline, or the curve that was measured.

In prefill an expert is bound by arithmetic; in decode, with few tokens an expert, by reading its weights: what counts
there is the number of active experts (DESIGN 3.1, arXiv 2512.09277), and a replica that splits a small expert costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec


def roofline(cluster: Cluster, model: ModelSpec) -> tuple[float, float]:
    """Seconds per token in one expert, and seconds to read one expert's weights, at speed 1.

    With a measured curve: the two numbers whose roofline lies below the curve everywhere and as high as one can.
    Compiled kernels know only these. Where reading and computing do not overlap, the curve is up to twice as high.
    """
    curve = cluster.expert_curve
    if curve is None:
        return model.flops_per_token / cluster.flops_per_s, model.expert_bytes / cluster.memory_bytes_per_s
    scale = model.expert_parameters / curve.parameters
    return scale * curve.per_token, scale * curve.per_expert


def expert_seconds(tokens: NDArray[np.float64], cluster: Cluster, model: ModelSpec) -> NDArray[np.float64]:
    """Seconds to compute ``tokens`` tokens of one expert at speed 1; any shape, elementwise.

    ``max(n * flops_per_token / flops, min(n, 1) * expert_bytes / bandwidth)``: a fraction below one token is an
    expectation, and the weights are then read with at most that probability. A measured curve replaces it where the
    cluster has one, scaled by the parameters of an expert.
    """
    curve = cluster.expert_curve
    if curve is not None:
        return curve.seconds(tokens) * (model.expert_parameters / curve.parameters)
    per_token, per_expert = roofline(cluster, model)
    return np.maximum(tokens * per_token, np.minimum(tokens, 1.0) * per_expert)


def device_compute(tokens_ED: NDArray[Any], cluster: Cluster, model: ModelSpec) -> NDArray[np.float64]:
    """Seconds that each device computes, float64 [D], from the tokens of every expert on it."""
    work_ED = expert_seconds(tokens_ED.astype(np.float64), cluster, model)
    out: NDArray[np.float64] = work_ED.sum(axis=0) / cluster.speed_D
    return out
