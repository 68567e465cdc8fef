"""One step's seconds: batch + placement + machine + model -> time of every step and layer, by term."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds, expert_times
from poise.cost.entries import SlotCounts, entries_of
from poise.cost.links import PortLoad, port_seconds
from poise.cost.near import NearGroups, layer_share, placed_tokens
from poise.cost.split import Split, SplitShares, check_split
from poise.cost.traffic import Copies, DataFlow, any_of, port_load, sum_by_source
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.routing.batch import RoutingBatch
from poise.routing.trace import NO_EXPERT
from poise.util.compiled import compiled, plain
from poise.util.errors import OptionError

_CHUNK_ELEMENTS = 4_000_000
"""Largest [T, K, D], [B, E, D] or [B, L, E] array made at once; steps are taken in chunks below it."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchCost:
    """Modelled cost of B steps x L layers. A (step, layer) without tokens has zeros everywhere.

    Parameters
    ----------
    compute_BL, dispatch_BL, combine_BL, kv_BL : float64 [B, L], seconds.
    tokens_BLD : float64 [B, L, D], tokens computed on each device.
    pairs_BL : float64 [B, L], (token, expert) pairs.
    cross_device_BL, cross_node_BL : float64 [B, L], pairs computed on another device / node than the token came from.
    weights_BL, control_BL : float64 [B, L] or None, exposed weights and control time of a fast loop, seconds.
    """

    compute_BL: NDArray[np.float64]
    dispatch_BL: NDArray[np.float64]
    combine_BL: NDArray[np.float64]
    kv_BL: NDArray[np.float64]
    tokens_BLD: NDArray[np.float64]
    pairs_BL: NDArray[np.float64]
    cross_device_BL: NDArray[np.float64]
    cross_node_BL: NDArray[np.float64]
    weights_BL: NDArray[np.float64] | None = None
    control_BL: NDArray[np.float64] | None = None

    @property
    def seconds_BL(self) -> NDArray[np.float64]:
        """Modelled seconds of each (step, layer)."""
        out = self.compute_BL + self.dispatch_BL + self.combine_BL + self.kv_BL
        for extra in (self.weights_BL, self.control_BL):
            out = out if extra is None else out + extra
        return out

    def imbalance_BL(self) -> NDArray[np.float64]:
        """Max / mean tokens over devices of each (step, layer); NaN where a (step, layer) has no tokens."""
        mean = self.tokens_BLD.mean(axis=2)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(mean > 0, self.tokens_BLD.max(axis=2) / mean, np.nan)


def batch_cost(
    batch: RoutingBatch,
    counts: SlotCounts,
    cluster: Cluster,
    model: ModelSpec,
    *,
    traffic: DataFlow,
    split: Split,
) -> BatchCost:
    """Cost of every step and layer of a batch under a placement. The mathematics: :mod:`poise.planning.problem`.

    Parameters
    ----------
    batch : the traffic.
    counts : slots of each expert on each device, as entries or int [L, E, D].
    cluster, model : the machine and the model's sizes.
    traffic : data flow (:mod:`poise.cost.traffic`); a batch of loads knows only ``home``, with homes spread evenly.
    split : token split over replicas (:mod:`poise.cost.split`).

    Raises
    ------
    OptionError : the placement's shape is not the batch's and cluster's, or the flow needs tokens the batch has not.
    """
    shape = (batch.num_steps, batch.num_layers)
    out = {name: np.zeros(shape) for name in ("compute", "dispatch", "combine", "kv", "device", "node")}
    tokens_BLD = np.zeros((*shape, cluster.num_devices))
    for at, work in layer_works(batch, counts, cluster, traffic=traffic, split=split):
        tokens_BLD[at] = work.tokens_BD
        seconds_BD = work.by_device(expert_seconds(work.tokens_BH, cluster, model))
        out["compute"][at] = (seconds_BD / cluster.speed_D).max(axis=1)
        for name, load, size, wire in (
            ("dispatch", work.out, model.dispatch_bytes_per_token, cluster.dispatch_wire),
            ("combine", work.back, model.combine_bytes_per_token, cluster.combine_wire),
        ):
            out[name][at] = port_seconds(load, size, cluster, wire)
        out["device"][at], out["node"][at] = work.leave_B, work.cross_B
    pairs_BL = batch.load_BLE.sum(axis=2)
    add_constants(out, batch.tokens_BL(), batch.top_k, cluster, model, traffic)
    return BatchCost(
        out["compute"], out["dispatch"], out["combine"], out["kv"], tokens_BLD, pairs_BL, out["device"], out["node"]
    )


@dataclass(frozen=True, slots=True, eq=False)
class PlacedWork:
    """What some steps of a layer are to each device, before any constant of a machine.

    Parameters
    ----------
    device_H : device of each (expert, device) with a slot, ascending; int [H].
    tokens_BH : tokens of the expert on it, float64 [B, H].
    tokens_BD : of all experts of a device, float64 [B, D].
    out, back : token copies through every port; ``back`` where :attr:`mirrored` as they went out.
    leave_B, cross_B : pairs computed on another device and on another node than their token came from, float64 [B].
    """

    device_H: NDArray[np.int64]
    tokens_BH: NDArray[np.float64]
    tokens_BD: NDArray[np.float64]
    out: PortLoad
    back: PortLoad
    leave_B: NDArray[np.float64]
    cross_B: NDArray[np.float64]

    @property
    def mirrored(self) -> bool:
        """Whether copies come back the way they went out, so that ``back`` is ``out`` and sends where that receives."""
        return self.back is self.out

    def by_device(self, value_BH: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum over the experts of each device, float64 [B, D]."""
        return _by_device(value_BH, self.device_H, self.tokens_BD.shape[1])


def layer_works(
    batch: RoutingBatch, counts: SlotCounts, cluster: Cluster, *, traffic: DataFlow, split: Split
) -> Iterator[tuple[tuple[slice, int], PlacedWork]]:
    """Steps and layer, and the work of them, for parameters as in :func:`batch_cost`; the same errors."""
    check_inputs(batch, counts, cluster, traffic)
    check_split(split, traffic)
    placed = entries_of(counts)
    for steps, part in step_parts(batch, cluster.num_devices):
        shares, every = TokenShares(part, traffic), slice(0, part.num_steps)
        for layer in range(batch.num_layers):
            held = placed.layer(layer)
            share = layer_share(part, layer, held, cluster, split)
            shares.enter(layer, share)
            tokens_BH = placed_tokens(part, layer, share, held)
            tokens_BD = _by_device(tokens_BH, held.device_H, cluster.num_devices)
            if not part.has_tokens and isinstance(share, NearGroups):
                there = back = share.ports_of_loads(part, layer)
                cross_B = there.net_out_BD.sum(axis=1)
                leave_B = cross_B + there.intra_out_BD.sum(axis=1)
            elif not part.has_tokens:
                there = back = _ports_of_loads(tokens_BD, cluster)
                leave_B, cross_B = _leaving(tokens_BD, cluster)
            else:
                flow = layer_flow(part, layer, every, shares, cluster, traffic)
                leave_B, cross_B = flow.cross_device_B, flow.cross_node_B
                there = port_load(flow.dispatch, cluster)
                back = there if flow.combine is None else port_load(flow.combine, cluster)
            yield (steps, layer), PlacedWork(held.device_H, tokens_BH, tokens_BD, there, back, leave_B, cross_B)


def _by_device(value_BH: NDArray[np.float64], device_H: NDArray[Any], num_devices: int) -> NDArray[np.float64]:
    """Sum over the holders of each device, float64 [B, D]; ``device_H`` ascends."""
    out = np.zeros((len(value_BH), num_devices))
    first = np.flatnonzero(np.diff(device_H, prepend=-1))
    out[:, device_H[first]] = np.add.reduceat(value_BH, first, axis=1)
    return out


def _ports_of_loads(tokens_BD: NDArray[np.float64], cluster: Cluster) -> PortLoad:
    """Copies through the ports when only loads are known: every device is the home of 1 / D of all tokens."""
    share_BD, size_D = tokens_BD / cluster.num_devices, cluster.devices_per_node_N[cluster.node_D]
    inside_BD = cluster.sum_by_node(share_BD)[:, cluster.node_D]
    total_B1 = share_BD.sum(axis=1, keepdims=True)
    return PortLoad(inside_BD - share_BD, share_BD * (size_D - 1), total_B1 - inside_BD,
                    share_BD * (cluster.num_devices - size_D))  # fmt: skip


def _leaving(tokens_BD: NDArray[np.float64], cluster: Cluster) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pairs computed on another device and on another node than their home, float64 [B] each, likewise."""
    total_B, size_D = tokens_BD.sum(axis=1), cluster.devices_per_node_N[cluster.node_D]
    return total_B * (1 - 1 / cluster.num_devices), total_B - tokens_BD @ (size_D / cluster.num_devices)


def check_inputs(batch: RoutingBatch, counts: SlotCounts, cluster: Cluster, traffic: DataFlow) -> None:
    """Raise OptionError unless the shapes agree and the batch knows what the data flow needs."""
    expected = (batch.num_layers, batch.num_experts, cluster.num_devices)
    if counts.shape != expected:
        raise OptionError(f"placement [layers, experts, devices] is {counts.shape}, traffic and cluster {expected}")
    if not batch.has_tokens and traffic != "home":
        raise OptionError(
            f"traffic model {traffic!r} needs token-level routing, got loads only", hint="use --traffic home"
        )


def kv_seconds_per_token(cluster: Cluster, model: ModelSpec) -> float:
    """Seconds per new token and layer to give its keys and values to every device (``stay`` only).

    Every device takes in every other's, once over the network per device port, or per node where the port is shared.
    """
    devices, per_node = cluster.num_devices, cluster.devices_per_node_N.max()
    intra = (per_node - 1) / devices / cluster.intra_bytes_per_s
    inter = (devices - cluster.devices_per_node_N.min()) / devices / cluster.inter_bytes_per_s
    return float(model.kv_bytes_per_token_layer * max(intra, inter))


def add_constants(
    out: dict[str, NDArray[np.float64]],
    tokens_BL: NDArray[np.float64],
    top_k: int,
    cluster: Cluster,
    model: ModelSpec,
    traffic: DataFlow,
) -> None:
    """Starts and the key/value exchange of steps of ``tokens_BL`` [B, L] tokens: the same for every placement."""
    busy = tokens_BL > 0
    out["compute"] += busy * expert_times(cluster, model).start_s
    out["dispatch"] += busy * cluster.dispatch_wire.start_s
    if traffic == "stay":
        out["kv"] += tokens_BL * kv_seconds_per_token(cluster, model)
    if traffic != "stay" or top_k > 1:
        out["combine"] += busy * cluster.combine_wire.start_s


def step_chunks(batch: RoutingBatch, num_devices: int) -> list[slice]:
    """Consecutive steps whose [T, K, D], [B, E, D] and [B, L, E] arrays stay small."""
    least = batch.num_experts * max(num_devices, batch.num_layers)
    size = np.full(batch.num_steps, least)
    if batch.start_B is not None:
        size = np.maximum(np.diff(batch.start_B) * batch.top_k * num_devices, least)
    group = np.cumsum(size) // _CHUNK_ELEMENTS
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), batch.num_steps]
    return [slice(a, b) for a, b in pairwise(cuts)]


def step_parts(batch: RoutingBatch, num_devices: int) -> Iterator[tuple[slice, RoutingBatch]]:
    """The batch in the parts of :func:`step_chunks`, with the homes that its tokens have in the whole."""
    batch = batch.at_home(num_devices)
    for steps in step_chunks(batch, num_devices):
        yield steps, batch.part(steps)


@dataclass(frozen=True, slots=True, eq=False)
class LayerFlow:
    """Copies of one layer out and back (``combine`` None: the mirror image), and the pairs that leave."""

    dispatch: Copies
    combine: Copies | None
    cross_device_B: NDArray[np.float64]
    cross_node_B: NDArray[np.float64]


class TokenShares:
    """What :func:`poise.cost.near.layer_share` says of the layers that a flow needs.

    Layers are entered in order; under ``stay`` a layer is kept for as long as a token may still come from it, which is
    until the next one unless tokens compute nothing there.
    """

    def __init__(self, batch: RoutingBatch, traffic: DataFlow) -> None:
        self.came_from_TL = batch.came_from_TL() if traffic == "stay" and batch.has_tokens else None
        self._experts, self._last = batch.num_experts, np.arange(batch.num_layers)
        self._kept: dict[int, SplitShares | NearGroups] = {}
        self._dense: dict[int, NDArray[np.float64]] = {}
        if self.came_from_TL is not None:
            for layer in range(1, batch.num_layers):
                origin_T = self.came_from_TL[:, layer]
                self._last[np.unique(origin_T[origin_T >= 0]) // batch.num_experts] = layer

    def enter(self, layer: int, share: SplitShares | NearGroups) -> None:
        """Go on to a layer."""
        self._kept = {old: kept for old, kept in self._kept.items() if self._last[old] >= layer}
        self._dense = {old: dense for old, dense in self._dense.items() if old in self._kept and old != layer}
        self._kept[layer] = share

    def of(self, layer: int) -> SplitShares | NearGroups:
        """Shares of a layer that is kept."""
        return self._kept[layer]

    def of_tokens(self, layer: int, experts_TK: NDArray[Any], step_T: NDArray[Any]) -> NDArray[np.float64]:
        """Share of each of a token's experts on each device, [T, K, D]; nothing of a pick that computes nothing."""
        if layer not in self._dense:
            share = self.of(layer)
            assert not isinstance(share, NearGroups)  # only ``stay`` asks, which the split refuses
            self._dense[layer] = share.held.dense(share.share_BH)
        share_BED = self._dense[layer]
        if (experts_TK == NO_EXPERT).any():  # index -1 finds the row that is added
            share_BED = np.concatenate([share_BED, np.zeros_like(share_BED[:, :1])], axis=1)
        return share_BED[0][experts_TK] if share_BED.shape[0] == 1 else share_BED[step_T[:, None], experts_TK]

    def sources(
        self, layer: int, rows: slice, home_T: NDArray[Any], step_T: NDArray[Any], num_devices: int
    ) -> NDArray[np.float64]:
        """Where the tokens of some rows are before a layer, [T, D]; ``home_T`` and ``step_T`` are theirs alone."""
        out: NDArray[np.float64] = np.eye(num_devices)[home_T]
        if self.came_from_TL is None:
            return out
        origin_T = self.came_from_TL[rows, layer]
        for old in np.unique(origin_T[origin_T >= 0] // self._experts).tolist():
            here = origin_T // self._experts == old
            expert_TK = origin_T[here, None] % self._experts
            out[here] = self.of_tokens(old, expert_TK, step_T[here])[:, 0]
        return out


def layer_flow(
    batch: RoutingBatch,
    layer: int,
    steps: slice,
    shares: TokenShares,
    cluster: Cluster,
    traffic: DataFlow,
) -> LayerFlow:
    """What some steps of one layer send: copies by pair of devices; ``shares`` have entered the layer."""
    if batch.experts_TLK is None or batch.start_B is None:
        return _flow_of_loads(batch.part(steps), layer, shares.of(layer), steps, cluster)
    first, last = batch.start_B[steps.start], batch.start_B[steps.stop]
    num_steps = steps.stop - steps.start
    step_T = np.repeat(np.arange(num_steps), np.diff(batch.start_B[steps.start : steps.stop + 1]))
    if traffic != "stay":
        experts_TK: NDArray[Any] = batch.experts_TLK[first:last, layer]
        home_T = batch.home_of_tokens(cluster.num_devices)[first:last]
        share, node_D = shares.of(layer), cluster.node_D.astype(np.int64)
        if isinstance(share, NearGroups):
            experts_TK = share.of_tokens(experts_TK, home_T)
            share_1X = plain(share.share_X[None], np.float64)
            holders = HolderShares(plain(share.ptr_G, np.int64), plain(share.device_X, np.int64), share_1X, node_D)
        else:
            holders = _holder_shares(share, steps, node_D)
        tokens = StepTokens(plain(experts_TK, np.int32), step_T, plain(home_T, np.int32), num_steps)
        return _flow_from_home(tokens, holders, cluster, traffic)
    share_TKD = shares.of_tokens(layer, batch.experts_TLK[first:last, layer], step_T + steps.start)
    home_T = batch.home_of_tokens(cluster.num_devices)[first:last]
    source_TD = shares.sources(layer, slice(first, last), home_T, step_T + steps.start, cluster.num_devices)
    pairs_TD = share_TKD.sum(axis=1)
    pairs = sum_by_source(source_TD, pairs_TD, step_T, num_steps)
    crossing = _crossing(pairs, cluster)
    copies = pairs if batch.top_k == 1 else sum_by_source(source_TD, any_of(share_TKD), step_T, num_steps)
    join = any_of(share_TKD[:, 1:]) if batch.top_k > 1 else np.zeros_like(pairs_TD)
    return LayerFlow(Copies(copies), Copies(sum_by_source(join, share_TKD[:, 0], step_T, num_steps)), *crossing)


class StepTokens(NamedTuple):
    """Tokens of one layer in B steps: int [T, K] experts, int [T] step from 0 and home of each; B."""

    experts_TK: NDArray[Any]
    step_T: NDArray[Any]
    home_T: NDArray[Any]
    num_steps: int


class HolderShares(NamedTuple):
    """Which part of an expert's tokens each holder computes; entries H are (expert, device) pairs, sorted by expert.

    Under ``near`` the groups of :class:`poise.cost.near.NearGroups` are what is called experts here.

    Parameters
    ----------
    ptr_E : int64 [E + 1], first entry of each expert.
    device_H : int64 [H].
    share_BH : float64 [B or 1, H].
    node_D : int64 [D].
    """

    ptr_E: NDArray[np.int64]
    device_H: NDArray[np.int64]
    share_BH: NDArray[np.float64]
    node_D: NDArray[np.int64]


class SentFromHome(NamedTuple):
    """What each home sends: pairs and copies to devices, float64 [B, D, D], copies to nodes, float64 [B, D, N]."""

    pairs_BDD: NDArray[np.float64]
    copies_BDD: NDArray[np.float64]
    copies_BDN: NDArray[np.float64]


def _holder_shares(share: SplitShares, steps: slice, node_D: NDArray[np.int64]) -> HolderShares:
    """Of some steps of what was split, or of all where they are alike."""
    held, order = share.held, share.held.by_expert()
    ptr_E = np.searchsorted(held.expert_H[order], np.arange(held.num_experts + 1))
    share_BH = share.share_BH if len(share.share_BH) == 1 else share.share_BH[steps]
    return HolderShares(ptr_E, held.device_H[order], np.ascontiguousarray(share_BH[:, order]), node_D)


def _flow_from_home(tokens: StepTokens, holders: HolderShares, cluster: Cluster, traffic: DataFlow) -> LayerFlow:
    """The data flows from and to the home rank."""
    pairs, copies_BDD, copies_BDN = _send_from_home(tokens, holders, cluster.num_nodes)
    crossing = _crossing(pairs, cluster)
    if traffic == "home":
        return LayerFlow(Copies(pairs), None, *crossing)
    once_a_node = traffic == "home_node_dedup" and cluster.num_nodes > 1
    return LayerFlow(Copies(copies_BDD, copies_BDN if once_a_node else None), None, *crossing)


@compiled(nogil=True)
def _send_from_home(tokens: StepTokens, holders: HolderShares, num_nodes: int) -> SentFromHome:
    """Add up pairs and copies."""
    experts_TK, step_T, home_T, steps = tokens
    ptr_E, device_H, share_BH, node_D = holders
    devices = node_D.size
    pairs, copies = np.zeros((steps, devices, devices)), np.zeros((steps, devices, devices))
    nodes = np.zeros((steps, devices, num_nodes))
    missed_D, missed_N, share_N = np.ones(devices), np.ones(num_nodes), np.zeros(num_nodes)
    for t in range(len(experts_TK)):
        b, home = step_T[t], home_T[t]
        row = b if len(share_BH) > 1 else 0
        for expert in experts_TK[t]:
            if expert < 0:
                break
            for h in range(ptr_E[expert], ptr_E[expert + 1]):
                d, share = device_H[h], share_BH[row, h]
                pairs[b, home, d] += share
                missed_D[d] *= 1.0 - share
                share_N[node_D[d]] += share
            for h in range(ptr_E[expert], ptr_E[expert + 1]):
                n = node_D[device_H[h]]
                missed_N[n] *= 1.0 - share_N[n]
                share_N[n] = 0.0
        for expert in experts_TK[t]:
            if expert < 0:
                break
            for h in range(ptr_E[expert], ptr_E[expert + 1]):
                d = device_H[h]
                copies[b, home, d] += 1.0 - missed_D[d]
                nodes[b, home, node_D[d]] += 1.0 - missed_N[node_D[d]]
                missed_D[d], missed_N[node_D[d]] = 1.0, 1.0
    return SentFromHome(pairs, copies, nodes)


def _flow_of_loads(
    batch: RoutingBatch, layer: int, share: SplitShares | NearGroups, steps: slice, cluster: Cluster
) -> LayerFlow:
    """Copies when only loads are known, of a batch of some ``steps``: homes are spread evenly."""
    if isinstance(share, NearGroups):
        pairs = share.pairs_of_loads(batch, layer)
    else:
        held, share_BH = share.held, share.share_BH if len(share.share_BH) == 1 else share.share_BH[steps]
        tokens_BD = _by_device(batch.load_BLE[:, layer, held.expert_H] * share_BH, held.device_H, cluster.num_devices)
        shape = (batch.num_steps, *(cluster.num_devices,) * 2)
        pairs = np.broadcast_to(tokens_BD[:, None, :] / cluster.num_devices, shape)
    return LayerFlow(Copies(pairs), None, *_crossing(pairs, cluster))


def _crossing(pairs_BDD: NDArray[np.float64], cluster: Cluster) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pairs that leave their device, and their node, float64 [B] each."""
    total_B = pairs_BDD.sum(axis=(1, 2))
    return total_B - np.einsum("bdd->b", pairs_BDD), total_B - (pairs_BDD * cluster.same_node_DD).sum(axis=(1, 2))
