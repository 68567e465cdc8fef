"""What moves cost while tokens are served: how long steps wait for what a round sends through each port.

An exchange of tokens (dispatch or combine of one layer) lasts ``X`` seconds, one port is busy with it for ``x <= X``.
While weights pass through that port too, tokens and weights have half of it each, as if either were one flow. So the
exchange then lasts max(X, 2 x), of which max(X, 2 x) - x is left to weights. In the rest of the step all of the port is
theirs. With sums over the exchanges of a step of ``T`` seconds

    in a step   T + sum max(0, 2 x - X) - sum x   seconds of weights pass,   and it is longer by   sum max(0, 2 x - X).

A port that is busy for half of every exchange or less delays nothing. One that is full in exchanges that take a third
of the step delays tokens by a third of the link seconds of what passes. Ports work at once: what the one that delays
most delays is the price.

What is left out makes this more than it is: tokens come in several flows, which get more than half, and of a step only
the MoE layers are known here. Less than it is: weights of several senders that meet at a port are as many flows. In
the turns of :func:`poise.control.peers.peer_rounds` none meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.cost.links import PortLoad, network_ports, port_seconds
from poise.cost.pricing import Pricing
from poise.cost.step import layer_works
from poise.machine.cluster import Cluster, Wire
from poise.planning.placement import Placement
from poise.routing.batch import RoutingBatch


@dataclass(frozen=True, slots=True, eq=False)
class PortTraffic:
    """How much tokens wait for weights at every port, in the mean of a batch.

    Parameters
    ----------
    cluster : the machine.
    share_PD : seconds that steps are longer in all for a second in which weights pass through a port, float64 [4, D]:
        out and in inside a node, out and in between nodes (where a node shares a port, that of each of its devices).
    """

    cluster: Cluster
    share_PD: NDArray[np.float64]

    @classmethod
    def of(cls, batch: RoutingBatch, placement: Placement, pricing: Pricing) -> PortTraffic:
        """Of a placement that serves a batch; errors as of :func:`poise.cost.step.batch_cost`."""
        cluster, model, count_LED = pricing.cluster, pricing.model, placement.count_LED()
        busy_PD, longer_PD = np.zeros((2, 4, cluster.num_devices))
        for (steps, _), work in layer_works(batch, count_LED, cluster, traffic=pricing.traffic, split=pricing.split):
            for load, size, wire, mirrored in (
                (work.out, model.dispatch_bytes_per_token, cluster.dispatch_wire, False),
                (work.back, model.combine_bytes_per_token, cluster.combine_wire, work.mirrored),
            ):
                busy_PBD = np.stack(_ports(load, cluster)) * size / _rate_P11(wire)
                busy_PBD = busy_PBD[[1, 0, 3, 2]] if mirrored else busy_PBD
                all_B1 = port_seconds(load, size, cluster, wire)[:, None]
                busy_PD += np.einsum("b,pbd->pd", batch.weight_B[steps], busy_PBD)
                longer_PD += np.einsum("b,pbd->pd", batch.weight_B[steps], np.maximum(0.0, 2.0 * busy_PBD - all_B1))
        step_s = float(batch.weight_B @ pricing.cost(batch, count_LED).seconds_BL.sum(axis=1))
        return cls(cluster, share_of(step_s, busy_PD, longer_PD))

    def delay_s(self, load: PortLoad, expert_bytes: float) -> NDArray[np.float64]:
        """Seconds that steps are longer in all while these experts pass, float64 [B]; formula: module docstring.

        Parameters
        ----------
        load : experts through every port, [B, D] each: B rounds, or lists of moves.
        """
        port_s = np.stack(_ports(load, self.cluster)) * expert_bytes / _rate_P11(self.cluster.plain_wire)
        delay: NDArray[np.float64] = (port_s * self.share_PD[:, None, :]).max(axis=(0, 2))
        return delay


def share_of(step_s: float, busy_PD: NDArray[np.float64], longer_PD: NDArray[np.float64]) -> NDArray[np.float64]:
    """The formula of the module docstring: T, sum of x, sum of max(0, 2 x - X)."""
    passes_PD = step_s + longer_PD - busy_PD
    return np.divide(longer_PD, passes_PD, out=np.zeros_like(passes_PD), where=longer_PD > 0)


def _ports(load: PortLoad, cluster: Cluster) -> list[NDArray[np.float64]]:
    """Copies through the ports that each device sends and receives by, [B, D] each."""
    net = [load.net_out_BD, load.net_in_BD]
    if cluster.nic_shared:
        net = [network_ports(each, cluster)[:, cluster.node_D] for each in net]
    return [load.intra_out_BD, load.intra_in_BD, *net]


def _rate_P11(wire: Wire) -> NDArray[np.float64]:
    return np.repeat([wire.intra_bytes_per_s, wire.inter_bytes_per_s], 2)[:, None, None]
