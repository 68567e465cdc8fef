"""Requests of an optimizer step dealt anew to its micro-batches and ranks, from the routing that a rollout recorded."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.dealing import Deal, Requests
from poise.stepwise.regroup import even_out
from poise.stepwise.sharding import owned_ED
from poise.train.rollout import Rollout
from poise.util.errors import OptionError

MicroBatches = Sequence[Sequence[Sequence[int]]]
"""Requests of every micro-batch and rank: ``groups[micro_batch][rank]``."""


def regrouped(rollout: Rollout, groups: MicroBatches, owners: NDArray[np.int64] | None = None) -> list[list[list[int]]]:
    """The same requests in micro-batches that load the ranks alike.

    Every request stays on its rank, and every rank has as many requests in each micro-batch as before, so that only
    *when* a request runs changes (:meth:`poise.train.FssdpExperts.deal` changes *where*, too): gradients that are
    accumulated over the step are the same sum where the loss is normalised by the tokens (or requests) of the whole
    step. A loss that is a mean over each micro-batch's own tokens weighs requests by their neighbours, which are others
    then. A pure function: ranks that hold the same rollout find the same groups
    (:func:`poise.stepwise.regroup.even_out`).

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
    read = read_groups(rollout, groups)
    shape = (rollout.trace.num_layers, rollout.trace.num_experts)
    if owners is not None and owners.shape != shape:
        raise OptionError(f"owners have shape {owners.shape}, the rollout {shape}")
    load_QLE = read.requests.load_QLE.astype(np.float64)
    if owners is not None:
        ranks = int(owners.max()) + 1
        load_QLE = np.stack([load_QLE[:, layer] @ owned_ED(own, ranks) for layer, own in enumerate(owners)], axis=1)
    load_QX = load_QLE.reshape(len(read.named), -1)
    new_Q = even_out(load_QX, read.requests.size_Q, read.rank_Q, read.micro_Q)
    return read.groups(read.rank_Q, new_Q)


class ReadGroups(NamedTuple):
    """Groups as arrays over their requests: names, loads and sizes, rank and micro-batch of each; how many of these."""

    named: list[int]
    requests: Requests
    rank_Q: NDArray[np.int64]
    micro_Q: NDArray[np.int64]
    shape: tuple[int, int]

    def groups(self, rank_Q: NDArray[np.int64], micro_Q: NDArray[np.int64]) -> list[list[list[int]]]:
        """The requests in other cells."""
        out: list[list[list[int]]] = [[[] for _ in range(self.shape[1])] for _ in range(self.shape[0])]
        for request, m, d in zip(self.named, micro_Q.tolist(), rank_Q.tolist(), strict=True):
            out[m][d].append(request)
        return out

    def sums(self) -> tuple[tuple[str, int], ...]:
        """Checksums of what ranks that deal together have to hold alike: the groups, and what is recorded of them."""
        where = repr((self.shape, self.named, self.rank_Q.tolist(), self.micro_Q.tolist()))
        recorded = zlib.crc32(self.requests.load_QLE.tobytes(), zlib.crc32(self.requests.size_Q.tobytes()))
        return ("requests by micro-batch and rank", zlib.crc32(where.encode())), ("their recorded experts", recorded)

    def deal(self, owner_LE: NDArray[np.int64]) -> Deal:
        """As they are given."""
        return Deal("as given", self.rank_Q, self.micro_Q, owner_LE)


def read_groups(rollout: Rollout, groups: MicroBatches) -> ReadGroups:
    """Requests of micro-batches and ranks, with their loads.

    Raises
    ------
    OptionError : micro-batches of different numbers of ranks, or a request that is named twice or not recorded.
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
    request_T = np.asarray(trace.request)
    order_T = np.argsort(request_T, kind="stable")
    first_Q = np.searchsorted(request_T[order_T], named)
    last_Q = np.searchsorted(request_T[order_T], named, side="right")
    size_Q = (last_Q - first_Q).astype(np.int64)
    if size_Q.size and not size_Q.all():
        raise OptionError(f"request {named[int(np.argmin(size_Q))]} is not among the {len(trace.requests())} recorded")
    load_QLE = np.zeros((len(named), trace.num_layers, trace.num_experts), np.int32)
    for q, (first, last) in enumerate(zip(first_Q, last_Q, strict=True)):
        load_QLE[q] = rollout.counts(order_T[first:last])
    micro_Q = np.array([m for m, _, _ in where], np.int64)
    rank_Q = np.array([d for _, d, _ in where], np.int64)
    return ReadGroups(named, Requests(load_QLE, size_Q), rank_Q, micro_Q, (len(groups), ranks))
