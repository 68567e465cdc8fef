"""Bytes on every link and seconds of every port, from the cost model's own copies.

:mod:`poise.cost.step` keeps the fullest port of a layer. This module keeps all of them: which port is it, and who sends
to whom?
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.entries import LayerEntries
from poise.cost.links import PortLoad, network_ports
from poise.cost.near import layer_share
from poise.cost.pricing import Pricing
from poise.cost.split import check_split
from poise.cost.step import TokenShares, check_inputs, layer_flow, step_chunks
from poise.cost.traffic import Copies, landing_DN, port_load
from poise.machine.cluster import Cluster, Wire
from poise.routing.batch import RoutingBatch


@dataclass(frozen=True, slots=True, eq=False)
class LayerBytes:
    """Bytes of one layer in some steps, from sender to receiver; the diagonal stays on its device.

    Parameters
    ----------
    layer, steps : which.
    out_BDD, back_BDD : float64 [B, D, D], dispatch and combine.
    """

    layer: int
    steps: slice
    out_BDD: NDArray[np.float64]
    back_BDD: NDArray[np.float64]


def layer_bytes(
    batch: RoutingBatch, count_LED: NDArray[Any], pricing: Pricing, *, step: int | None = None
) -> Iterator[LayerBytes]:
    """Every layer of every step, or of one step; parameters and errors of :func:`poise.cost.step.batch_cost`."""
    cluster, model = pricing.cluster, pricing.model
    check_inputs(batch, count_LED, cluster, pricing.traffic)
    check_split(pricing.split, pricing.traffic)
    shares = TokenShares(batch, pricing.traffic)
    for layer in range(batch.num_layers):
        shares.enter(layer, layer_share(batch, layer, LayerEntries.of_counts(count_LED[layer]), cluster, pricing.split))
        for steps in step_chunks(batch, cluster.num_devices) if step is None else [slice(step, step + 1)]:
            flow = layer_flow(batch, layer, steps, shares, cluster, pricing.traffic)
            out = wire_BDD(flow.dispatch, cluster)
            back = out.transpose(0, 2, 1) if flow.combine is None else wire_BDD(flow.combine, cluster)
            yield LayerBytes(layer, steps, out * model.dispatch_bytes_per_token, back * model.combine_bytes_per_token)


def wire_BDD(copies: Copies, cluster: Cluster) -> NDArray[np.float64]:
    """Copies over each link, float64 [B, D, D]: what is sent once per node goes by way of the device it lands on."""
    if copies.node_BDN is None:
        return copies.device_BDD
    node_D, landing = cluster.node_D, landing_DN(cluster)
    wire: NDArray[np.float64] = copies.device_BDD * cluster.same_node_DD
    for node in range(cluster.num_nodes):
        inside, away = np.flatnonzero(node_D == node), np.flatnonzero(node_D != node)
        wire[:, away, landing[away, node]] += copies.node_BDN[:, away, node]
        lands = landing[away, node] == inside[:, None]
        fan = lands @ copies.device_BDD[:, away[:, None], inside]
        wire[:, inside[:, None], inside] += fan * ~np.eye(len(inside), dtype=bool)
    return wire


def kind_seconds(load: PortLoad, cluster: Cluster, wire: Wire) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds until each device's port inside the node and its network port are drained, float64 [B, D] each.

    From bytes, without the start; a network port that a node's devices share counts as each one's.
    """
    intra = np.maximum(load.intra_out_BD, load.intra_in_BD) / wire.intra_bytes_per_s
    net = np.maximum(network_ports(load.net_out_BD, cluster), network_ports(load.net_in_BD, cluster))
    return intra, (net[:, cluster.node_D] if cluster.nic_shared else net) / wire.inter_bytes_per_s


def device_seconds(load: PortLoad, cluster: Cluster, wire: Wire) -> NDArray[np.float64]:
    """Seconds until all of a device's own ports are drained, float64 [B, D], from bytes; without the start."""
    return np.maximum(*kind_seconds(load, cluster, wire))


class Fullest(NamedTuple):
    """The port that is busy longest: its kind, ``out`` or ``in``, its device (or node), its seconds a step."""

    kind: str
    way: str
    port: int
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Ports:
    """Seconds a step that every port of one kind is busy.

    Parameters
    ----------
    kind : ``inside the node`` or ``network``.
    owner : who has such a port, ``device`` or ``node``.
    out_2P, in_2P : float64 [2, P], sending and receiving, dispatch first, then combine.
    """

    kind: str
    owner: str
    out_2P: NDArray[np.float64]
    in_2P: NDArray[np.float64]

    def fullest(self) -> Fullest:
        """The fullest of these ports."""
        ways = (("out", self.out_2P.sum(axis=0)), ("in", self.in_2P.sum(axis=0)))
        every = [Fullest(self.kind, way, int(x.argmax()), float(x.max())) for way, x in ways]
        return max(every, key=lambda one: one.seconds)


@dataclass(frozen=True, slots=True, eq=False)
class LinkBytes:
    """Bytes over every link in a step: mean over steps, all layers together.

    Parameters
    ----------
    out_DD, back_DD : float64 [D, D], dispatch and combine, from sender to receiver; the diagonal stays on its device.
    cluster : the machine.
    """

    out_DD: NDArray[np.float64]
    back_DD: NDArray[np.float64]
    cluster: Cluster

    @property
    def bytes_DD(self) -> NDArray[np.float64]:
        """Both ways together."""
        return self.out_DD + self.back_DD

    def by_class(self) -> tuple[float, float, float]:
        """Bytes a step that stay on their device, go over links inside a node, and over the network."""
        total = self.bytes_DD
        near = float((total * self.cluster.same_node_DD).sum())
        stay = float(np.trace(total))
        return stay, near - stay, float(total.sum()) - near

    def ports(self) -> tuple[Ports, ...]:
        """Ports into the nodes' fabrics and, where there are several nodes, into the network."""
        cluster = self.cluster
        wires = (cluster.dispatch_wire, cluster.combine_wire)
        loads = [port_load(Copies(x_DD[None]), cluster) for x_DD in (self.out_DD, self.back_DD)]
        near = [np.concatenate([getattr(x, name) / w.intra_bytes_per_s for x, w in zip(loads, wires, strict=True)])
                for name in ("intra_out_BD", "intra_in_BD")]  # fmt: skip
        inside = Ports("inside the node", "device", near[0], near[1])
        if cluster.num_nodes == 1:
            return (inside,)
        far = [np.concatenate([network_ports(getattr(x, name), cluster) / w.inter_bytes_per_s
                               for x, w in zip(loads, wires, strict=True)])
               for name in ("net_out_BD", "net_in_BD")]  # fmt: skip
        return inside, Ports("network", "node" if cluster.nic_shared else "device", far[0], far[1])


def link_bytes(batch: RoutingBatch, count_LED: NDArray[Any], pricing: Pricing) -> LinkBytes:
    """Mean bytes of a step; parameters and errors of :func:`poise.cost.step.batch_cost`.

    Keys and values, which ``stay`` gives to every device, are not in it: they are the same for every placement.
    """
    out_DD, back_DD = np.zeros((2, pricing.cluster.num_devices, pricing.cluster.num_devices))
    for part in layer_bytes(batch, count_LED, pricing):
        out_DD += part.out_BDD.sum(axis=0)
        back_DD += part.back_BDD.sum(axis=0)
    return LinkBytes(out_DD / batch.num_steps, back_DD / batch.num_steps, pricing.cluster)
