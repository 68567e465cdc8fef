"""Requests of an optimizer step dealt anew to its micro-batches, from the routing that a rollout recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.regroup import even_out
from poise.stepwise.sharding import owned_ED
from poise.train.rollout import Rollout
from poise.util.errors import OptionError

MicroBatches = Sequence[Sequence[Sequence[int]]]
"""Requests of every micro-batch and rank: ``groups[micro_batch][rank]``."""


def regrouped(rollout: Rollout, groups: MicroBatches, owners: NDArray[np.int64] | None = None) -> list[list[list[int]]]:
    """The same requests in micro-batches that load the ranks alike.

    Every request stays on its rank, and every rank has as many requests in each micro-batch as before, so that only
    *when* a request runs changes: gradients that are accumulated over the step are the same sum where the loss is
    normalised by the tokens (or requests) of the whole step. A loss that is a mean over each micro-batch's own tokens
    weighs requests by their neighbours, which are others then. Give all requests to one rank to leave open who trains
    on which, and deal each micro-batch to ranks after it. A pure function: ranks that hold the same rollout find the
    same groups (:func:`poise.stepwise.regroup.even_out`).

    Parameters
    ----------
    rollout : holds all of the requests.
    groups : requests of every micro-batch and rank, ``groups[micro_batch][rank]``.
    owners : int64 [L, E], who owns what (:attr:`poise.train.FssdpExperts.owners`): pairs on owners are made alike;
        without it pairs of experts.

    Raises
    ------
    OptionError : micro-batches of different numbers of ranks, a request that is named twice or not recorded, or owners
        of another shape.
    """
    ranks = len(groups[0]) if groups else 0
    for number, group in enumerate(groups):
        if len(group) != ranks:
            raise OptionError(f"micro-batch {number} is of {len(group)} ranks, the first of {ranks}")
    where = [
        (m, d, request) for m, group in enumerate(groups) for d, requests in enumerate(group) for request in requests
    ]
    trace, named = rollout.trace, [request for _, _, request in where]
    if len(set(named)) < len(named):
        raise OptionError(f"{len(named)} requests are named, {len(set(named))} different ones")
    shape = (trace.num_layers, trace.num_experts)
    if owners is not None and owners.shape != shape:
        raise OptionError(f"owners have shape {owners.shape}, the rollout {shape}")
    request_T = np.asarray(trace.request)
    order_T = np.argsort(request_T, kind="stable")
    first_Q = np.searchsorted(request_T[order_T], named)
    last_Q = np.searchsorted(request_T[order_T], named, side="right")
    size_Q = (last_Q - first_Q).astype(np.int64)
    if size_Q.size and not size_Q.all():
        raise OptionError(f"request {named[int(np.argmin(size_Q))]} is not among the {len(trace.requests())} recorded")
    loads = []
    for first, last in zip(first_Q, last_Q, strict=True):
        load_LE = rollout.counts(order_T[first:last])
        if owners is not None:
            load_LE = np.stack(
                [load @ owned_ED(own, int(owners.max()) + 1) for load, own in zip(load_LE, owners, strict=True)]
            )
        loads.append(load_LE.reshape(-1).astype(np.float64))
    micro_Q = np.array([m for m, _, _ in where], np.int64)
    rank_Q = np.array([d for _, d, _ in where], np.int64)
    new_Q = even_out(np.array(loads).reshape(len(where), -1), size_Q, rank_Q, micro_Q)
    out: list[list[list[int]]] = [[[] for _ in range(ranks)] for _ in groups]
    for request, m, d in zip(named, new_Q.tolist(), rank_Q.tolist(), strict=True):
        out[m][d].append(request)
    return out
