"""The machine as compiled code reads it, and what compiled code says of it: an expert's seconds, ports, the fullest.

The readable evaluators are :func:`poise.cost.compute.expert_seconds` and :func:`poise.cost.links.port_seconds`; these
give the same numbers (tests/cost/test_machine.py), one device, one step, one layer at a time. Every compiled planner
prices with them.

Ports of one all-to-all are a float64 [4, D] array of what passes each device: out and in inside its node, out and in
between nodes, in token copies or in bytes of weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_times
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
    compute_s, read_s, activation_s : of an expert (:class:`poise.cost.compute.ExpertTimes`).
    start_s : of a layer's compute on a device that has tokens.
    curve_tokens_X, curve_seconds_X : knots of a measured curve, float64 [X], from one token on; X = 0: none. It goes on
        by ``compute_s`` a token.
    intra_bytes_per_s, inter_bytes_per_s : ports inside and between nodes for weights and counts.
    out_intra_s, out_inter_s, back_intra_s, back_inter_s : seconds that a token copy takes of a port, dispatched and
        combined.
    expert_bytes : of one expert's weights.
    latency_s : start-up of a collective of weights or counts.
    """

    speed_D: NDArray[np.float64]
    node_D: NDArray[np.int64]
    size_N: NDArray[np.int64]
    nic_shared: bool
    compute_s: float
    read_s: float
    activation_s: float
    start_s: float
    curve_tokens_X: NDArray[np.float64]
    curve_seconds_X: NDArray[np.float64]
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    out_intra_s: float
    out_inter_s: float
    back_intra_s: float
    back_inter_s: float
    expert_bytes: float
    latency_s: float


def make_machine(
    cluster: Cluster, model: ModelSpec, *, compute_passes: float = 1.0, exchange_passes: float = 1.0
) -> Machine:
    """The numbers of a cluster and a model; a token's seconds and bytes are those of all passes of a step."""
    times = expert_times(cluster, model)
    plain, out, back = cluster.plain_wire, cluster.dispatch_wire, cluster.combine_wire
    out_bytes = float(model.dispatch_bytes_per_token * exchange_passes)
    back_bytes = float(model.combine_bytes_per_token * exchange_passes)
    tokens_X, seconds_X = _knots(cluster, model)
    return Machine(
        speed_D=np.array(cluster.speed_D),
        node_D=cluster.node_D.astype(np.int64),
        size_N=cluster.devices_per_node_N.astype(np.int64),
        nic_shared=cluster.nic_shared,
        compute_s=float(times.compute_s * compute_passes),
        read_s=float(times.read_s * compute_passes),
        activation_s=float(times.activation_s * compute_passes),
        start_s=float(times.start_s * compute_passes),
        curve_tokens_X=tokens_X,
        curve_seconds_X=seconds_X * compute_passes,
        intra_bytes_per_s=float(plain.intra_bytes_per_s),
        inter_bytes_per_s=float(plain.inter_bytes_per_s),
        out_intra_s=out_bytes / out.intra_bytes_per_s,
        out_inter_s=out_bytes / out.inter_bytes_per_s,
        back_intra_s=back_bytes / back.intra_bytes_per_s,
        back_inter_s=back_bytes / back.inter_bytes_per_s,
        expert_bytes=float(model.expert_bytes),
        latency_s=float(plain.start_s),
    )


def _knots(cluster: Cluster, model: ModelSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens and seconds of a measured curve from one token on, float64 [X] each; empty where there is none."""
    curve = cluster.expert_curve
    if curve is None:
        return np.zeros(0), np.zeros(0)
    later = curve.tokens_X > 1.0
    scale = model.expert_parameters / curve.parameters
    tokens_X = np.concatenate(([1.0], curve.tokens_X[later]))
    return tokens_X, scale * np.concatenate(([curve.per_expert], curve.seconds_X[later]))


@compiled
def expert_work(tokens: float, machine: Machine) -> float:
    """Seconds of one expert's tokens at speed 1, as :func:`poise.cost.compute.expert_seconds` has them."""
    last = machine.curve_tokens_X.size - 1
    if last < 0:
        return max(tokens * machine.compute_s, min(tokens, 1.0) * machine.read_s) + tokens * machine.activation_s
    if tokens <= 1.0:
        return tokens * machine.curve_seconds_X[0]
    x, y = machine.curve_tokens_X, machine.curve_seconds_X
    if tokens >= x[last]:
        return y[last] + (tokens - x[last]) * machine.compute_s
    i = np.searchsorted(x, tokens)
    return y[i - 1] + (y[i] - y[i - 1]) * (tokens - x[i - 1]) / (x[i] - x[i - 1])


@compiled
def token_work(machine: Machine) -> float:
    """Seconds that one more token of a large expert takes."""
    return machine.compute_s + machine.activation_s


@compiled
def knee(machine: Machine) -> float:
    """Tokens of an expert from which reading its weights no longer counts; of a curve, in the roofline below it."""
    return machine.read_s / machine.compute_s


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
def weight_seconds(ports: tuple[float, float], machine: Machine) -> float:
    """Seconds a byte until the fullest ports inside nodes and between them are drained of weights."""
    return max(ports[0] / machine.intra_bytes_per_s, ports[1] / machine.inter_bytes_per_s)


@compiled
def dispatch_seconds(ports: tuple[float, float], machine: Machine) -> float:
    """Seconds until the fullest ports, in token copies, are drained on the way out."""
    return max(ports[0] * machine.out_intra_s, ports[1] * machine.out_inter_s)


@compiled
def combine_seconds(ports: tuple[float, float], machine: Machine) -> float:
    """The same on the way back."""
    return max(ports[0] * machine.back_intra_s, ports[1] * machine.back_inter_s)


@compiled
def exchange_seconds(ports: tuple[float, float], machine: Machine) -> float:
    """Out and, by the mirror image, back."""
    return dispatch_seconds(ports, machine) + combine_seconds(ports, machine)


@compiled
def fullest_ports(port_PD: NDArray[np.float64], machine: Machine) -> tuple[float, float]:
    """What passes the fullest port inside nodes, and the fullest between them; a shared network port takes what its
    node's devices send.
    """
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
    return intra, net


@compiled
def fullest_of_sums(
    out_D: NDArray[np.float64], in_D: NDArray[np.float64], away_N2: NDArray[np.float64], machine: Machine
) -> tuple[float, float]:
    """:func:`fullest_ports` where no pairs are known, only sums.

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
    return intra, net
