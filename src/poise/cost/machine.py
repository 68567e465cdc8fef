"""The machine as compiled code reads it, and what compiled code says of it: an expert's seconds, ports, the fullest.

The readable evaluators are :func:`poise.cost.compute.expert_seconds` and :func:`poise.cost.links.port_seconds`; these
give the same numbers (tests/cost/test_machine.py), one device, one step, one layer at a time. Every compiled planner
prices with them.

Ports of one all-to-all are a float64 [4, D] array of what passes each device: out and in inside its node, out and in
between nodes. Seconds are a byte's: times the bytes of a copy, or of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import roofline
from poise.cost.links import latency_seconds
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.util.compiled import compiled


class Machine(NamedTuple):
    """A cluster and a model in the numbers that compiled code needs.

    Parameters
    ----------
    speed_D, node_D : of each device, float64 and int64 [D].
    size_N : devices of each node, int64 [N].
    nic_shared : one network port a node.
    per_token, per_expert : seconds of a token's compute and of reading an expert's weights, at speed 1.
    intra_bytes_per_s, inter_bytes_per_s : ports inside and between nodes.
    out_bytes, back_bytes : of one token copy, dispatched and combined.
    expert_bytes : of one expert's weights.
    latency_s : start-up of one all-to-all.
    """

    speed_D: NDArray[np.float64]
    node_D: NDArray[np.int64]
    size_N: NDArray[np.int64]
    nic_shared: bool
    per_token: float
    per_expert: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    out_bytes: float
    back_bytes: float
    expert_bytes: float
    latency_s: float


def make_machine(
    cluster: Cluster, model: ModelSpec, *, compute_passes: float = 1.0, exchange_passes: float = 1.0
) -> Machine:
    """The numbers of a cluster and a model; a token's seconds and bytes are those of all passes of a step."""
    per_token, per_expert = (seconds * compute_passes for seconds in roofline(cluster, model))
    return Machine(
        speed_D=np.array(cluster.speed_D),
        node_D=cluster.node_D.astype(np.int64),
        size_N=cluster.devices_per_node_N.astype(np.int64),
        nic_shared=cluster.nic_shared,
        per_token=float(per_token),
        per_expert=float(per_expert),
        intra_bytes_per_s=float(cluster.intra_bytes_per_s),
        inter_bytes_per_s=float(cluster.inter_bytes_per_s),
        out_bytes=float(model.dispatch_bytes_per_token * exchange_passes),
        back_bytes=float(model.combine_bytes_per_token * exchange_passes),
        expert_bytes=float(model.expert_bytes),
        latency_s=float(latency_seconds(cluster)),
    )


@compiled
def expert_work(tokens: float, machine: Machine) -> float:
    """Seconds of one expert's tokens at speed 1, under the roofline: a measured curve is known by its two numbers."""
    return max(tokens * machine.per_token, min(tokens, 1.0) * machine.per_expert)


@compiled
def expert_works(tokens_E: NDArray[np.float64], machine: Machine) -> NDArray[np.float64]:
    """:func:`expert_work` of each expert, float64 [E]."""
    out = np.empty(tokens_E.size)
    for e in range(tokens_E.size):
        out[e] = expert_work(tokens_E[e], machine)
    return out


@compiled
def book(port_PD: NDArray[np.float64], source: int, target: int, amount: float, node_D: NDArray[np.int64]) -> None:
    """Book what goes from a device to a device on the ports it passes; nothing if it stays."""
    if target == source:
        return
    if node_D[target] == node_D[source]:
        port_PD[0, source] += amount
        port_PD[1, target] += amount
    else:
        port_PD[2, source] += amount
        port_PD[3, target] += amount


@compiled
def book_even_homes(port_PD: NDArray[np.float64], tokens_D: NDArray[np.float64], machine: Machine) -> None:
    """Ports anew where only loads are known: each device is the home of 1 / D of the tokens that any computes."""
    devices = machine.speed_D.size
    total, first = 0.0, 0
    for d in range(devices):
        total += tokens_D[d]
    for n in range(machine.size_N.size):
        size = machine.size_N[n]
        inside = 0.0
        for d in range(first, first + size):
            inside += tokens_D[d]
        for d in range(first, first + size):
            port_PD[0, d] = (inside - tokens_D[d]) / devices
            port_PD[1, d] = tokens_D[d] * (size - 1) / devices
            port_PD[2, d] = (total - inside) / devices
            port_PD[3, d] = tokens_D[d] * (devices - size) / devices
        first += size


@compiled
def wire_seconds(intra: float, net: float, machine: Machine) -> float:
    """Seconds a byte until the fullest port inside nodes and the fullest between them are both drained."""
    return max(intra / machine.intra_bytes_per_s, net / machine.inter_bytes_per_s)


@compiled
def fullest_port(port_PD: NDArray[np.float64], machine: Machine) -> float:
    """Seconds a byte until every port is drained; a shared network port takes what its node's devices send."""
    intra, net, out_sum, in_sum = 0.0, 0.0, 0.0, 0.0
    for d in range(machine.speed_D.size):
        intra = max(intra, port_PD[0, d], port_PD[1, d])
        if machine.nic_shared:
            if d == 0 or machine.node_D[d] != machine.node_D[d - 1]:
                out_sum, in_sum = 0.0, 0.0
            out_sum += port_PD[2, d]
            in_sum += port_PD[3, d]
            net = max(net, out_sum, in_sum)
        else:
            net = max(net, port_PD[2, d], port_PD[3, d])
    return wire_seconds(intra, net, machine)


@compiled
def fullest_of_sums(
    out_D: NDArray[np.float64], in_D: NDArray[np.float64], away_N2: NDArray[np.float64], machine: Machine
) -> float:
    """:func:`fullest_port` where no pairs are known, only sums.

    ``out_D``, ``in_D``: what leaves and reaches each device; ``away_N2``: the part of it that leaves and enters each
    node, float64 [N, 2]. That part is spread evenly over the node's network ports, and taken from its devices in
    proportion to their sums.
    """
    intra, net, first = 0.0, 0.0, 0
    for n in range(machine.size_N.size):
        size = machine.size_N[n]
        out_sum, in_sum = 0.0, 0.0
        for d in range(first, first + size):
            out_sum += out_D[d]
            in_sum += in_D[d]
        ports = 1.0 if machine.nic_shared else float(size)
        net = max(net, away_N2[n, 1] / ports, away_N2[n, 0] / ports)
        near_out, near_in = 1.0 - away_N2[n, 0] / max(out_sum, 1e-9), 1.0 - away_N2[n, 1] / max(in_sum, 1e-9)
        for d in range(first, first + size):
            intra = max(intra, in_D[d] * near_in, out_D[d] * near_out)
        first += size
    return wire_seconds(intra, net, machine)
