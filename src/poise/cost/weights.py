"""What a fast loop costs beside dispatch and compute: weights that move in a step, the window that hides them, control.

Exposed weights (DESIGN 3.1) = max(0, seconds of what is fetched before the gate - window) + seconds of what is fetched
after it. Control = exchange of counts + planning + synchronisation, paid whenever a plan needs the exact loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from poise.cluster import Cluster
from poise.cost.links import latency_seconds
from poise.modelspec import ModelSpec

PLAN_SECONDS_BASE, PLAN_SECONDS_PER_PAIR = 10e-6, 14e-9
"""Three splits and one rank's row: seconds, and seconds per (expert, device), after benchmarks/fast_loop.py."""
SYNC_SECONDS = 5e-6
"""Handing counts to the planner and its plan to the kernels, once a layer."""


@dataclass(frozen=True, slots=True)
class StepPrice:
    """Machine, model and the constants that only a fast loop pays. Seconds.

    Parameters
    ----------
    cluster, model : the machine and the model's sizes.
    window_s : time before the gate of each MoE layer in which weights can move unseen.
    control_s : exchange of counts, planning and synchronisation of one layer.
    """

    cluster: Cluster
    model: ModelSpec
    window_s: float
    control_s: float


def attention_parameters(model: ModelSpec) -> float:
    """Query and output maps of the hidden size, key and value maps of the cache's width (16-bit entries)."""
    return model.hidden_size * (2.0 * model.hidden_size + model.kv_bytes_per_token_layer / 2.0)


def window_seconds(tokens: float, cluster: Cluster, model: ModelSpec) -> float:
    """Attention of all decoder layers since the last MoE layer: projections only, a roofline; float seconds.

    ``tokens`` are those of a step, spread evenly over the devices (data-parallel attention). Scores, norms and dense
    layers are left out, so it is the least that can be hidden.
    """
    parameters = attention_parameters(model) * model.num_hidden_layers / model.num_moe_layers
    compute = 2.0 * parameters * tokens / cluster.num_devices / cluster.flops_per_s
    return max(compute, 2.0 * parameters / cluster.memory_bytes_per_s)


def control_seconds(num_experts: int, cluster: Cluster) -> float:
    """One all-gather of E counts from every rank, the exact split, and a synchronisation."""
    devices = cluster.num_devices
    wire = cluster.inter_bytes_per_s if cluster.num_nodes > 1 else cluster.intra_bytes_per_s
    exchange = latency_seconds(cluster) + 4.0 * num_experts * (devices - 1) / wire
    return exchange + SYNC_SECONDS + PLAN_SECONDS_BASE + PLAN_SECONDS_PER_PAIR * num_experts * devices


def step_price(
    tokens: float,
    num_experts: int,
    cluster: Cluster,
    model: ModelSpec,
    *,
    window_s: float | None = None,
    control_s: float | None = None,
) -> StepPrice:
    """The price of a fast loop at N tokens a step; a measured window or control time replaces the modelled one."""
    return StepPrice(
        cluster,
        model,
        window_seconds(tokens, cluster, model) if window_s is None else window_s,
        control_seconds(num_experts, cluster) if control_s is None else control_s,
    )


@njit(cache=True)
def _fetch_ports(held_ED, fetched_ED, node_D):  # type: ignore[no-untyped-def]
    """Experts through every port, float64 [4, D] (out and in inside a node, out and in between nodes)."""
    experts, devices = held_ED.shape
    port = np.zeros((4, devices))
    sent = np.zeros(devices)
    for e in range(experts):
        for d in range(devices):
            if not fetched_ED[e, d]:
                continue
            best = -1
            for s in range(devices):
                if held_ED[e, s] and s != d:
                    near, best_near = node_D[s] == node_D[d], best >= 0 and node_D[best] == node_D[d]
                    if best < 0 or (near and not best_near) or (near == best_near and sent[s] < sent[best]):
                        best = s
            if best < 0:
                continue
            sent[best] += 1.0
            kind = 0 if node_D[best] == node_D[d] else 2
            port[kind, best] += 1.0
            port[kind + 1, d] += 1.0
    return port


def fetch_seconds(held_ED: NDArray[np.bool_], fetched_ED: NDArray[np.bool_], price: StepPrice) -> float:
    """Seconds to bring experts to the devices that fetch them, all at once; 0 if none moves.

    Each copy comes from the holder that has sent least, of the same node where there is one; no relays. The fullest
    port decides.
    """
    if not fetched_ED.any():
        return 0.0
    cluster = price.cluster
    port = _fetch_ports(held_ED, fetched_ED, cluster.node_D.astype(np.int64))
    net = port[2:]
    if cluster.nic_shared:
        starts = np.flatnonzero(np.diff(cluster.node_D, prepend=-1))
        net = np.add.reduceat(net, starts, axis=1)
    seconds = max(port[:2].max() / cluster.intra_bytes_per_s, net.max() / cluster.inter_bytes_per_s)
    return float(seconds * price.model.expert_bytes + latency_seconds(cluster))
