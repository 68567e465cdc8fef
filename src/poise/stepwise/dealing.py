"""Where the requests of an optimizer step run, and who owns which expert, so that tokens stay near.

Gradient accumulation is a sum, so any dealing of a step's requests to micro-batches and data-parallel ranks gives the
same step. Where routing is known ahead, so is which requests use the same experts: dealt to one node, most of their
tokens stay in it, and a replica serves more of them.

Step 1  Nodes: requests go where most of their pairs have owners, as many to each node as before; where owners may move,
        experts of each layer then go to the node whose requests use them most, as many of each layer as before; in
        turn, until that brings no more pairs home.
Step 2  Devices of a node: its experts by load, as many of the layer as before (:func:`place_near`).
Step 3  Cells: requests of a node are swapped between its ranks and micro-batches until pairs on every owner and tokens
        of every rank are alike (:func:`poise.stepwise.regroup.even_cells`).
Step 4  As given; as given but evened out over micro-batches; dealt near the owners; dealt with owners that move; the
        second and the last with owners by price on their loads (:func:`priced_owners`): of these the one with the least
        modelled seconds, owners' move included (:mod:`poise.stepwise.owners`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from poise.machine.cluster import Cluster
from poise.stepwise.owners import OwnerSeconds, decided
from poise.stepwise.regroup import even_cells
from poise.stepwise.sharding import ShardingPolicy, owned_ED, place_within
from poise.util.errors import OptionError

ROUNDS = 24
"""Most turns of step 1."""
ModelledSeconds = Callable[["Deal"], float]
"""Modelled seconds of a step under a deal; what its owners cost to move is in."""


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """Requests of an optimizer step.

    Parameters
    ----------
    load_QLE : int32 [Q, L, E], pairs of each.
    size_Q : int64 [Q], tokens.
    """

    load_QLE: NDArray[np.int32]
    size_Q: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Deal:
    """Where requests run, int64 [Q] each, and owners, int64 [L, E]. ``name`` says how it was made."""

    name: str
    rank_Q: NDArray[np.int64]
    micro_Q: NDArray[np.int64]
    owner_LE: NDArray[np.int64]

    def sum(self) -> int:
        """A checksum: deals that differ have different ones, whatever they are called."""
        return zlib.crc32(b"".join(part.tobytes() for part in (self.rank_Q, self.micro_Q, self.owner_LE)))

    def sources(self, requests: Requests, ranks: int) -> NDArray[np.int32]:
        """Loads of every micro-batch, int32 [M, L, D, E]."""
        shape = (int(self.micro_Q.max(initial=-1)) + 1, requests.load_QLE.shape[1], ranks, requests.load_QLE.shape[2])
        out = np.zeros(shape, np.int32)
        for load_LE, rank, micro in zip(requests.load_QLE, self.rank_Q, self.micro_Q, strict=True):
            out[micro, :, rank] += load_LE
        return out


def assigned(score_XN: NDArray[np.float64], count_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """A part for each of X things, int64 [X], ``count_N`` of them in each: those with most to lose choose first."""
    if count_N.sum() != len(score_XN):
        raise OptionError(f"{len(score_XN)} things and room for {int(count_N.sum())}")
    out, left_N = np.full(len(score_XN), -1, np.int64), count_N.copy()
    open_N = np.flatnonzero(left_N > 0)
    waiting = np.arange(len(score_XN))
    while len(waiting):
        ranked = np.sort(score_XN[np.ix_(waiting, open_N)], axis=1)
        regret = ranked[:, -1] - ranked[:, -2] if len(open_N) > 1 else ranked[:, -1]
        for x in waiting[np.argsort(-regret, kind="stable")]:
            n = open_N[int(np.argmax(score_XN[x, open_N]))]
            out[x] = n
            left_N[n] -= 1
            if not left_N[n]:  # what is left has another choice, and other things to lose
                break
        open_N = np.flatnonzero(left_N > 0)
        waiting = np.flatnonzero(out < 0)
    return out


def place_near(
    load_NE: NDArray[np.float64], owner_E: NDArray[np.int64], cluster: Cluster
) -> NDArray[np.int64]:  # fmt: skip
    """One layer's owners near the nodes that use them, int64 [E]; every device owns as many as in ``owner_E``.

    ``load_NE``: pairs of each expert from requests of each node.
    """
    node_D = cluster.node_D.astype(np.int64)
    node_E = assigned(load_NE.T, np.bincount(node_D[owner_E], minlength=cluster.num_nodes))
    out, load_E = np.empty_like(owner_E), load_NE.sum(axis=0)
    for n in range(cluster.num_nodes):
        here, devices = np.flatnonzero(node_E == n), np.flatnonzero(node_D == n)
        held = np.repeat(np.arange(len(devices)), [(owner_E == d).sum() for d in devices])
        part = replace(Cluster.uniform(1, len(devices)), speed_D=np.array(cluster.speed_D)[devices])
        out[here] = devices[place_within(load_E[here], held, part)]
    return out


def at_home(requests: Requests, node_Q: NDArray[np.int64], node_LE: NDArray[np.int64]) -> int:
    """Pairs whose owner lies in their request's node."""
    total = 0
    for n in np.unique(node_Q):
        total += int((requests.load_QLE[node_Q == n].sum(axis=0, dtype=np.int64) * (node_LE == n)).sum())
    return total


def near(requests: Requests, given: Deal, cluster: Cluster, *, owners_move: bool) -> Deal:
    """Steps 1 to 3."""
    node_D, nodes = cluster.node_D.astype(np.int64), cluster.num_nodes
    node_Q, owner_LE = node_D[given.rank_Q], given.owner_LE
    count_N = np.bincount(node_Q, minlength=nodes)
    best = at_home(requests, node_Q, node_D[owner_LE])
    pairs_Q = requests.load_QLE.sum(axis=(1, 2)).clip(1)
    for _ in range(ROUNDS if nodes > 1 else 0):
        node_LE = node_D[owner_LE]
        home_QN = np.stack([np.einsum("qle,le->q", requests.load_QLE, node_LE == n) for n in range(nodes)], axis=1)
        new_Q, new_LE = assigned(home_QN / pairs_Q[:, None], count_N), owner_LE
        if owners_move:
            load_NLE = np.stack([requests.load_QLE[new_Q == n].sum(axis=0, dtype=np.float64) for n in range(nodes)])
            new_LE = np.stack([place_near(load_NLE[:, layer], owner_E, cluster)
                               for layer, owner_E in enumerate(owner_LE)])  # fmt: skip
        found = at_home(requests, new_Q, node_D[new_LE])
        if found <= best:
            break
        best, node_Q, owner_LE = found, new_Q, new_LE
    moved = _into_cells(given, node_Q, node_D)
    load_QX = _on_owners(requests, owner_LE, cluster.num_devices)
    rank_Q, micro_Q = even_cells(load_QX, requests.size_Q, moved.rank_Q, moved.micro_Q, node_Q)
    return Deal("near owners that move" if owners_move else "near owners", rank_Q, micro_Q, owner_LE)


def _into_cells(given: Deal, node_Q: NDArray[np.int64], node_D: NDArray[np.int64]) -> Deal:
    """Requests of other nodes take the cells that were left there, in order."""
    rank_Q, micro_Q = given.rank_Q.copy(), given.micro_Q.copy()
    before_Q = node_D[given.rank_Q]
    for n in np.unique(node_Q):
        come, gone = np.flatnonzero((node_Q == n) & (before_Q != n)), np.flatnonzero((before_Q == n) & (node_Q != n))
        rank_Q[come], micro_Q[come] = given.rank_Q[gone], given.micro_Q[gone]
    return Deal(given.name, rank_Q, micro_Q, given.owner_LE)


def _on_owners(requests: Requests, owner_LE: NDArray[np.int64], ranks: int) -> NDArray[np.float64]:
    """Pairs of each request on every owner of every layer, float64 [Q, L * D]."""
    parts = [requests.load_QLE[:, layer] @ owned_ED(owner_E, ranks) for layer, owner_E in enumerate(owner_LE)]
    return np.concatenate(parts, axis=1).astype(np.float64)


def deals(requests: Requests, given: Deal, cluster: Cluster, *, owners_move: bool) -> list[Deal]:
    """What step 4 chooses from, the given one first."""
    load_QX = _on_owners(requests, given.owner_LE, cluster.num_devices)
    rank_Q, micro_Q = even_cells(load_QX, requests.size_Q, given.rank_Q, given.micro_Q, given.rank_Q)
    out = [given, Deal("evened out over micro-batches", rank_Q, micro_Q, given.owner_LE),
           near(requests, given, cluster, owners_move=False)]  # fmt: skip
    return [*out, near(requests, given, cluster, owners_move=True)] if owners_move else out


def priced_owners(
    deal: Deal, requests: Requests, ranks: int, sharding: ShardingPolicy,
    seconds_for: Callable[[NDArray[np.int32]], OwnerSeconds], others: Sequence[NDArray[np.int64]] = (),
) -> Deal:  # fmt: skip
    """The same requests in the same cells with the owners that a sharding policy by price finds for their loads.

    ``seconds_for``: the price of owners on loads of every micro-batch, int32 [M, L, D, E]; ``others``: owners that are
    priced, too.
    """
    load_BLSE = deal.sources(requests, ranks)
    load_LE = load_BLSE.sum(axis=2).mean(axis=0)
    owner_LE = decided(sharding, load_LE, deal.owner_LE, seconds_for(load_BLSE), others)
    return replace(deal, name=f"{deal.name}, owners by price", owner_LE=owner_LE)


def cheapest(found: list[Deal], seconds_of: ModelledSeconds) -> Deal:
    """Step 4: the first one of the least seconds, so that nothing changes for nothing."""
    return min(found, key=seconds_of)
