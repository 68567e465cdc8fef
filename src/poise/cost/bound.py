"""Lower bounds: seconds that no placement with these slots, and no token split, can beat on the same routing.

Each bound is a relaxation that keeps one reason why time is needed; the largest counts. ``g`` is the roofline or
measured curve of :func:`poise.cost.compute.expert_seconds`; it is subadditive (:mod:`poise.machine.curve` refuses other
curves), so splitting an expert never makes its total smaller.

Compute of a layer (:mod:`poise.cost.bound_compute`)
    averaging       sum_e g(n_e) / sum_d speed_d
    single expert   g(n_e) / (sum of the c fastest speeds), c = min(D, S - E + 1) the most replicas an expert can have
    without spare slots (S = E: nothing can be split, every slot is taken), from loads sorted downwards:
    pigeonhole      k D + 1 experts on D devices: one holds k + 1 of them
    slot counting   the heaviest expert's device is filled up with at least the lightest ones
    whole reads     of at most n replicas of an expert of n tokens one computes a token or more, and g(1) at least. For
                    none to, replicas must be more than n, which takes floor(n) of the spare slots: of A experts with a
                    token that leaves A', and some device has at least ceil(A' / D) of them (with unequal speeds, each
                    as many as finish first)
    filled slots    (even split, one placement for all steps, engines that know no empty slot) all S slots hold experts:
                    min over replica counts r, sum_e r_e = S, of sum_e r_e g(n_e / r_e), over sum_d speed_d. r g(n / r)
                    rises with r, as g(n) / n falls; the minimum is exact, by dynamic programming
Traffic of a layer
    a device or node keeps at most the s heaviest of its own flows local (s = its slots), and all of them together at
    most each expert's heaviest flow and the heaviest S - E others; the rest leaves through its ports (the fullest
    takes at least the mean), at most min(K, s of the receiver) pairs a copy where copies are deduplicated. Under
    ``stay`` a token came from where its heaviest expert of the layer before ran (or of an earlier one, where it
    computed nothing since): an expert shares its device with at most s of those.
    Where only loads are known and a split does not look at sources, each device is the home of 1 / D of the tokens that
    any computes: so the tokens of the fullest device, bounded as its compute (with g(n) = n), pass its ports.

All hold under any split of tokens over replicas, source-aware or not, but for the last one and for filled slots: the
even and the exact split do not look at sources (``blind``), a fast loop does. What joins compute and traffic of one
placement: :mod:`poise.planning.solve.joint`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.bound_compute import compute_bound, reads_bound
from poise.cost.compute import expert_seconds, expert_times
from poise.cost.step import kv_seconds_per_token, step_parts
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster, Wire
from poise.machine.model import ModelSpec
from poise.routing.batch import RoutingBatch
from poise.routing.trace import NO_EXPERT


@dataclass(frozen=True, slots=True, eq=False)
class BoundTerms:
    """Lower bounds per term, float64 seconds, [B, L] each."""

    compute_BL: NDArray[np.float64]
    dispatch_BL: NDArray[np.float64]
    combine_BL: NDArray[np.float64]
    kv_BL: NDArray[np.float64]

    @property
    def seconds_BL(self) -> NDArray[np.float64]:
        """Bound on the whole layer: terms are bounded one by one, so it holds for their sum."""
        return self.compute_BL + self.dispatch_BL + self.combine_BL + self.kv_BL


def bound_terms(
    batch: RoutingBatch,
    cluster: Cluster,
    model: ModelSpec,
    *,
    traffic: DataFlow,
    slots_D: NDArray[Any],
    spare: int | None = None,
    blind: bool = True,
) -> BoundTerms:
    """Bounds per term on every step and layer.

    ``slots_D`` (int [D]) are the most experts a device can hold in a layer, ``spare`` the most slots a layer can have
    beyond one per expert (default: what slots_D leave). The placement may differ from step to step, so the mean over
    steps bounds every static plan too. ``blind``: the split does not look at where tokens come from; it matters only
    where homes are not known.
    """
    spare = int(np.minimum(slots_D, batch.num_experts).sum()) - batch.num_experts if spare is None else spare
    parts = [
        _terms(part, cluster, model, traffic, slots_D, spare, blind)
        for _, part in step_parts(batch, cluster.num_devices)
    ]
    return BoundTerms(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(BoundTerms)))


def _terms(
    batch: RoutingBatch, cluster: Cluster, model: ModelSpec, traffic: DataFlow, slots_D: NDArray[Any], spare: int,
    blind: bool,
) -> BoundTerms:  # fmt: skip
    shape = (batch.num_steps, batch.num_layers)
    load = batch.load_BLE.reshape(-1, batch.num_experts)
    compute = compute_bound(expert_seconds(load, cluster, model), slots_D, cluster.speed_D, spare=spare)
    one_token = float(expert_seconds(np.ones(1), cluster, model)[0])
    compute = np.maximum(compute, reads_bound(load, one_token, slots_D, cluster.speed_D, spare=spare)).reshape(shape)
    tokens_BL = batch.tokens_BL()
    busy: NDArray[Any] = tokens_BL > 0
    compute += busy * expert_times(cluster, model).start_s
    out, back = cluster.dispatch_wire, cluster.combine_wire
    room = _Room(np.asarray(slots_D), max(0, spare), blind)
    port = _port_bound(batch, cluster, out, traffic, room)
    dispatch = busy * out.start_s + port * model.dispatch_bytes_per_token
    combine = busy * (back.start_s if traffic != "stay" or batch.top_k > 1 else 0.0)
    if traffic != "stay":
        if back[1:] != out[1:]:
            port = _port_bound(batch, cluster, back, traffic, room)
        combine += port * model.combine_bytes_per_token
    kv = np.zeros(shape)
    if traffic == "stay":
        kv += tokens_BL * kv_seconds_per_token(cluster, model)
    return BoundTerms(compute, dispatch, combine, kv)


class _Room(NamedTuple):
    """What placements and splits may do: slots of each device, int [D], spare ones of a layer, blind to sources."""

    slots_D: NDArray[Any]
    spare: int
    blind: bool


def _port_bound(
    batch: RoutingBatch, cluster: Cluster, wire: Wire, traffic: DataFlow, room: _Room
) -> NDArray[np.float64]:
    """Bound on max over ports of copies / (bytes/s), float64 [B, L]; multiply by bytes per copy."""
    out = np.zeros((batch.num_steps, batch.num_layers))
    if cluster.num_devices == 1:
        return out
    if batch.experts_TLK is None:
        for layer in range(batch.num_layers):
            out[:, layer] = _spread_bound(batch.load_BLE[:, layer], cluster, wire, room)
        return out
    step_T = batch.step_T()
    home_T = batch.home_of_tokens(cluster.num_devices)
    came_from_TL = batch.came_from_TL() if traffic == "stay" else None
    for layer in range(batch.num_layers):
        experts = batch.experts_TLK[:, layer]
        if came_from_TL is not None and layer > 0:
            came_from_T = came_from_TL[:, layer]
            out[:, layer] = _stay_bound(experts, came_from_T, home_T, step_T, batch, cluster, wire, room.slots_D)
        else:
            flow = _flows(home_T, experts, step_T, (batch.num_steps, cluster.num_devices, batch.num_experts))
            out[:, layer] = _home_bound(flow, batch.top_k, cluster, wire, traffic, room)
    return out


def _spread_bound(load_BE: NDArray[np.float64], cluster: Cluster, wire: Wire, room: _Room) -> NDArray[np.float64]:
    """:func:`_port_bound` of one layer, float64 [B], where homes are spread evenly over devices."""
    if not room.blind:  # tokens are whole, so what a device is the home of is rounded
        flow = np.floor(load_BE / cluster.num_devices)[:, None].repeat(cluster.num_devices, axis=1)
        return _home_bound(flow, 1, cluster, wire, "home", room)
    bound = load_BE.sum(axis=1) * _spread_homes_rate(cluster, wire)
    size_D = cluster.devices_per_node_N[cluster.node_D]
    inside_D = (size_D - 1) / cluster.num_devices / wire.intra_bytes_per_s
    away_D = (cluster.num_devices - size_D) / cluster.num_devices / wire.inter_bytes_per_s
    each_D = inside_D if cluster.nic_shared else np.maximum(inside_D, away_D)
    if (each_D > 0).all():  # a token computed on d takes so long of its port
        bound = np.maximum(bound, compute_bound(load_BE, room.slots_D, 1 / each_D, spare=room.spare))
    if cluster.nic_shared and cluster.num_nodes > 1:
        slots_N = np.bincount(cluster.node_D, weights=room.slots_D).astype(np.int64)
        bound = np.maximum(bound, compute_bound(load_BE, slots_N, 1 / away_D[cluster.first_N], spare=room.spare))
    return bound


def _spread_homes_rate(cluster: Cluster, wire: Wire) -> float:
    """Seconds-per-byte bound for one pair when homes are spread evenly: its home is elsewhere with known odds.

    Each device takes in (1 - 1/D) of its tokens, of which the part from other nodes by the network; the fullest
    port is at least the average one.
    """
    devices, per_node = cluster.num_devices, cluster.devices_per_node_N
    intra = (per_node.min() - 1) / devices / devices / wire.intra_bytes_per_s
    ports = cluster.num_nodes if cluster.nic_shared else devices
    net = (devices - per_node.max()) / devices / ports / wire.inter_bytes_per_s
    return float(max(intra, net))


def _flows(
    source_T: NDArray[Any], experts_TK: NDArray[Any], step_T: NDArray[Any], shape: tuple[int, int, int]
) -> NDArray[np.float64]:
    """Pairs from each source to each expert in each step, float64 [B, sources, E]."""
    flat = ((step_T[:, None] * shape[1] + source_T[:, None]) * shape[2] + experts_TK)[experts_TK != NO_EXPERT]
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape).astype(np.float64)


def _top_sum(flow: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Sum of the ``count`` largest along the last axis."""
    size = flow.shape[-1]
    if count >= size:
        return flow.sum(axis=-1)
    if count <= 0:
        return np.zeros(flow.shape[:-1])
    out: NDArray[np.float64] = np.partition(flow, size - count, axis=-1)[..., size - count :].sum(axis=-1)
    return out


def _most_local(flow_BSE: NDArray[np.float64], spare: int) -> NDArray[np.float64]:
    """Most pairs that can be computed where they come from: every expert somewhere once, ``spare`` more copies."""
    once = flow_BSE.max(axis=1).sum(axis=1)
    if spare <= 0 or flow_BSE.shape[1] == 1:
        return once
    others = np.sort(flow_BSE, axis=1)[:, :-1].reshape(len(flow_BSE), -1)
    out: NDArray[np.float64] = once + _top_sum(others, min(spare, others.shape[1]))
    return out


def _home_bound(
    flow: NDArray[np.float64], top_k: int, cluster: Cluster, wire: Wire, traffic: DataFlow, room: _Room
) -> NDArray[np.float64]:
    """:func:`_port_bound` of one layer, float64 [B]; ``flow``: pairs from each home to each expert, [B, D, E]."""
    devices, slots_D, spare = cluster.num_devices, room.slots_D, room.spare
    node_slots = np.bincount(cluster.node_D, weights=slots_D).astype(np.int64)
    per_copy, per_net_copy = 1, 1
    if traffic in ("home_device_dedup", "stay"):
        per_copy = per_net_copy = max(1, min(top_k, int(slots_D.max())))
    elif traffic == "home_node_dedup":
        per_net_copy = max(1, min(top_k, int(node_slots.max())))
        per_copy = per_net_copy if cluster.num_nodes > 1 else max(1, min(top_k, int(slots_D.max())))
    rate = wire.intra_bytes_per_s + (wire.inter_bytes_per_s if cluster.num_nodes > 1 else 0.0)
    bound = np.zeros(len(flow))
    net_B = np.zeros((len(flow), cluster.num_nodes))
    for d in range(devices):
        total = flow[:, d].sum(axis=-1)
        bound = np.maximum(bound, (total - _top_sum(flow[:, d], int(slots_D[d]))) / per_copy / rate)
        leaves = (total - _top_sum(flow[:, d], int(node_slots[cluster.node_D[d]]))) / per_net_copy
        port = net_B[:, cluster.node_D[d]]
        net_B[:, cluster.node_D[d]] = port + leaves if cluster.nic_shared else np.maximum(port, leaves)
    total_B = flow.sum(axis=(1, 2))
    bound = np.maximum(bound, (total_B - _most_local(flow, spare)) / per_copy / rate / devices)
    leaves_B = (total_B - _most_local(cluster.sum_by_node(flow, axis=1), spare)) / per_net_copy
    ports = cluster.num_nodes if cluster.nic_shared else devices
    net_B = np.maximum(net_B, leaves_B[:, None] / ports)
    return np.maximum(bound, net_B.max(axis=1) / wire.inter_bytes_per_s)


def _stay_bound(
    experts_TK: NDArray[Any],
    came_from_T: NDArray[np.int64],
    home_T: NDArray[Any],
    step_T: NDArray[Any],
    batch: RoutingBatch,
    cluster: Cluster,
    wire: Wire,
    slots_D: NDArray[Any],
) -> NDArray[np.float64]:
    """Pairs that must cross / D over the widest pair of ports: the fullest device sends at least the average."""
    most, experts = int(slots_D.max()), batch.num_experts
    rate = wire.intra_bytes_per_s + (wire.inter_bytes_per_s if cluster.num_nodes > 1 else 0.0)
    crossing_B = np.zeros(batch.num_steps)
    bounds = np.searchsorted(step_T, np.arange(batch.num_steps + 1))
    for b in range(batch.num_steps):
        step = slice(bounds[b], bounds[b + 1])
        origin_T, ids_TK, none_T = came_from_T[step], experts_TK[step], np.zeros(step.stop - step.start, np.int64)
        for old in np.unique(origin_T // experts):  # -1: the tokens still at home
            rows = origin_T // experts == old
            at_T, sources = (home_T[step], cluster.num_devices) if old < 0 else (origin_T % experts, experts)
            flow = _flows(at_T[rows], ids_TK[rows], none_T[rows], (1, sources, experts))[0]
            kept = _top_sum(flow, most).sum()
            kept = kept if old < 0 else min(kept, _top_sum(flow.T, most).sum())
            crossing_B[b] += flow.sum() - kept
    return np.asarray(crossing_B / max(1, min(batch.top_k, most)) / cluster.num_devices / rate)
