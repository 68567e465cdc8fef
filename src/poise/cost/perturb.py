"""How far a gain may be trusted: what it is at the constants as they are, and at its worst within their errors.

Five constants are wrong each on its own: reading weights, arithmetic and activations of an expert, ports inside nodes
and between them. Every one is taken at its value, and faster and slower by its error: 3^5 = 243 machines. Starts are
the same for all placements and cancel. What one machine's constants say of another placement's time is not in it: only
that the constants are off.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds, expert_times
from poise.cost.entries import SlotCounts
from poise.cost.links import fullest_ports
from poise.cost.pricing import Pricing
from poise.cost.step import kv_seconds_per_token, layer_works
from poise.machine.cluster import Cluster
from poise.machine.kernel import UNKNOWN_ERROR
from poise.machine.model import ModelSpec
from poise.routing.batch import RoutingBatch


class GainRange(NamedTuple):
    """Seconds of a layer that one placement saves over another, mean over steps and layers: at the constants as they
    are, and the least and most over all combinations of their errors. Shares are of the first placement's time on the
    same machine, starts included.
    """

    nominal_s: float
    least_s: float
    most_s: float
    nominal_share: float
    least_share: float
    most_share: float


class ConstantErrors(NamedTuple):
    """Relative errors of the constants of an expert kernel, and of ports inside nodes and between them."""

    kernel: float
    inside: float
    between: float


def constant_errors(cluster: Cluster) -> ConstantErrors:
    """Held out where the constants were measured, else :data:`poise.machine.kernel.UNKNOWN_ERROR`: so for a network
    port of a datasheet, or of doubtful rows, too.
    """
    kernel = UNKNOWN_ERROR if cluster.kernel is None else cluster.kernel.error
    links = cluster.links
    inside = UNKNOWN_ERROR if links is None else max(links.dispatch.error, links.combine.error)
    known = links is not None and links.dispatch.inter_bytes_per_s is not None and not links.doubtful
    return ConstantErrors(kernel, inside, inside if known else UNKNOWN_ERROR)


def gain_range(
    batch: RoutingBatch, old: SlotCounts, new: SlotCounts, pricing: Pricing, *, after: RoutingBatch | None = None
) -> GainRange:
    """What the placement ``new`` saves over ``old`` on a batch, by :func:`constant_errors`.

    Parameters
    ----------
    batch, pricing : the traffic, and what prices a step of it.
    old, new : slots, as entries or int [L, E, D].
    after : what ``new`` runs, where that is not the same: the same steps with other homes.

    Raises
    ------
    OptionError : see :func:`poise.cost.step.batch_cost`.
    """
    levels = [(1.0, 1.0 - error, 1.0 + error) for error in constant_errors(pricing.cluster)]
    first = _seconds(batch, old, pricing, levels)
    second = _seconds(batch if after is None else after, new, pricing, levels)
    saved, share = first - second, 1.0 - second / first
    return GainRange(*(float(x) for x in (saved[0], saved.min(), saved.max(), share[0], share.min(), share.max())))


def _seconds(
    batch: RoutingBatch, counts: SlotCounts, pricing: Pricing, levels: list[tuple[float, float, float]]
) -> NDArray[np.float64]:
    """Mean seconds of a layer on each machine, float64 [243]; the first is the one that is given."""
    kernel, inside, between = levels
    cluster, model = pricing.cluster, pricing.model
    computes, exchanges = list(product(kernel, repeat=3)), list(product(inside, between))
    compute_C, exchange_X = np.zeros(len(computes)), np.zeros(len(exchanges))
    for (steps, _), work in layer_works(batch, counts, cluster, traffic=pricing.traffic, split=pricing.split):
        weight_B = batch.weight_B[steps]
        for c, factors in enumerate(computes):
            seconds_BH = _expert_seconds(work.tokens_BH, cluster, model, factors)
            compute_C[c] += weight_B @ (work.by_device(seconds_BH) / cluster.speed_D).max(axis=1)
        for load, size, wire in (
            (work.out, model.dispatch_bytes_per_token, cluster.dispatch_wire),
            (work.back, model.combine_bytes_per_token, cluster.combine_wire),
        ):
            intra_B, net_B = fullest_ports(load, cluster)
            for x, (near, far) in enumerate(exchanges):
                longest_B = np.maximum(intra_B * near / wire.intra_bytes_per_s, net_B * far / wire.inter_bytes_per_s)
                exchange_X[x] += weight_B @ longest_B * size
    start = expert_times(cluster, model).start_s + cluster.dispatch_wire.start_s
    if pricing.traffic != "stay" or batch.top_k > 1:
        start += cluster.combine_wire.start_s
    if pricing.traffic == "stay":
        tokens = float(batch.weight_B @ batch.tokens_BL().sum(axis=1))
        exchange_X += [tokens * kv_seconds_per_token(_slower(cluster, *ways), model) for ways in exchanges]
    both = (compute_C[:, None] + exchange_X[None, :]).ravel() / batch.num_layers
    busy = float(batch.weight_B @ (batch.tokens_BL() > 0).mean(axis=1))
    return np.asarray(both + busy * start)


def _slower(cluster: Cluster, near: float, far: float) -> Cluster:
    """The cluster with its ports slower by these factors."""
    ports = cluster.intra_bytes_per_s / near, cluster.inter_bytes_per_s / far
    return replace(cluster, intra_bytes_per_s=ports[0], inter_bytes_per_s=ports[1])


def _expert_seconds(
    tokens: NDArray[np.float64], cluster: Cluster, model: ModelSpec, factors: tuple[float, ...]
) -> NDArray[np.float64]:
    """:func:`poise.cost.compute.expert_seconds` with reading, arithmetic and activations off by these factors; of a
    curve that was measured as a whole, all of it by the first.
    """
    read, compute, activation = factors
    if cluster.expert_curve is not None:
        return expert_seconds(tokens, cluster, model) * read
    times = expert_times(cluster, model)
    longest = np.maximum(tokens * times.compute_s * compute, np.minimum(tokens, 1.0) * times.read_s * read)
    return np.asarray(longest + tokens * times.activation_s * activation)
