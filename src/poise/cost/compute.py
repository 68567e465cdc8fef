"""Seconds of expert compute on one device: a roofline, a measured kernel, or the curve that was measured.

In prefill an expert is bound by arithmetic; in decode, with few tokens an expert, by reading its weights: what counts
there is the number of active experts (DESIGN 3.1, arXiv 2512.09277), and a replica that splits a small expert costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.machine.cluster import Cluster
from poise.machine.kernel import ACTIVATION_BYTES, same_type
from poise.machine.model import ModelSpec
from poise.util.errors import ClusterError


class ExpertTimes(NamedTuple):
    """Constants of ``start + sum_e (max(min(n_e, 1) * read_s, n_e * compute_s) + n_e * activation_s)``, at speed 1.

    With a measured curve these are the numbers whose roofline lies below it everywhere, and as high as one can.
    """

    read_s: float
    compute_s: float
    activation_s: float
    start_s: float


def expert_times(cluster: Cluster, model: ModelSpec) -> ExpertTimes:
    """What an expert of a model costs on a cluster.

    Raises
    ------
    ClusterError : constants are open, or the kernel was measured for weights of another type than the model's.
    """
    if cluster.open:
        raise ClusterError(
            f"{cluster.name} leaves {' and '.join(cluster.open)} open, which a model and a batch decide",
            hint="poise.machine.settle.settle chooses them; or name them, as in 2x8:h100+datasheet",
        )
    curve, kernel = cluster.expert_curve, cluster.kernel
    if curve is not None:
        scale = model.expert_parameters / curve.parameters
        return ExpertTimes(scale * curve.per_expert, scale * curve.per_token, 0.0, 0.0)
    if kernel is None:
        read = model.expert_bytes / cluster.memory_bytes_per_s
        return ExpertTimes(read, model.flops_per_token / cluster.flops_per_s, 0.0, 0.0)
    if not same_type(model.weight_bytes, kernel.weight_bytes):
        raise ClusterError(
            f"{kernel.name} was measured with {kernel.weight_bytes:g} bytes a weight, {model.name} has "
            f"{model.weight_bytes:g}",
            hint="name a kernel of the model's type ('poise machines' lists them), or the model as it is served",
        )
    moved = activation_elements(model, cluster.num_devices) * ACTIVATION_BYTES / kernel.memory_bytes_per_s
    return ExpertTimes(
        kernel.read_factor * model.expert_bytes / kernel.memory_bytes_per_s,
        kernel.compute_factor * model.flops_per_token / kernel.flops_per_s,
        kernel.activation_factor * moved,
        kernel.start_s,
    )


def activation_elements(model: ModelSpec, num_devices: int) -> float:
    """Elements that a token-expert pair moves through memory: input and output of its matrices, and its share of
    reading and writing the tokens of a device once each (2 h a token, of which a device has fewer than pairs).
    """
    inner = model.num_expert_matrices * model.expert_intermediate_size
    return 2.0 * model.expert_width + inner + 2.0 * model.expert_width * tokens_per_pair(model.top_k, num_devices)


def tokens_per_pair(top_k: int, num_devices: int) -> float:
    """Distinct tokens of a device over its token-expert pairs, were the K experts of a token on random devices."""
    return num_devices * (1.0 - (1.0 - 1.0 / num_devices) ** top_k) / top_k


def expert_seconds(tokens: NDArray[np.float64], cluster: Cluster, model: ModelSpec) -> NDArray[np.float64]:
    """Seconds to compute ``tokens`` tokens of one expert at speed 1, without the start; any shape, elementwise.

    A fraction below one token is an expectation, and the weights are then read with at most that probability. A
    measured curve replaces the constants where the cluster has one, scaled by the parameters of an expert.
    """
    curve = cluster.expert_curve
    if curve is not None:
        return curve.seconds(tokens) * (model.expert_parameters / curve.parameters)
    times = expert_times(cluster, model)
    out = np.maximum(tokens * times.compute_s, np.minimum(tokens, 1.0) * times.read_s)
    return out + tokens * times.activation_s if times.activation_s else out


def device_compute(tokens_ED: NDArray[Any], cluster: Cluster, model: ModelSpec) -> NDArray[np.float64]:
    """Seconds of one layer that each device computes, float64 [D], from the tokens of every expert on it: the start of
    the kernel where it has tokens, and its experts at its speed.
    """
    seconds = expert_seconds(tokens_ED.astype(np.float64), cluster, model).sum(axis=0) / cluster.speed_D
    start = expert_times(cluster, model).start_s
    out: NDArray[np.float64] = seconds + start * (tokens_ED > 0).any(axis=0) if start else seconds
    return out
