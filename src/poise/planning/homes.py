"""Which rank serves which request: those that use the same experts meet where these are.

A request's *signature* is the share of each expert, layer by layer, in what is known of it when it must be given a
rank: its prefill. A table of scores says what a pick of an expert is worth on a rank, and a request goes to the rank
where its signature scores most, among those that have few tokens (:func:`route`).

``affine``   scores are what a pick costs from that rank to the holders of its expert: nothing on the rank itself, the
             node's fabric, or the network. Placement and homes are planned in turn: homes for the placement, then the
             placement for the traffic with these homes (:func:`plan_homes`).
``grouped``  scores are centroids of groups of requests of alike signatures, as many as ranks and of as many tokens;
             nothing of the placement is known. So ELDR (arXiv 2607.00466) routes decode requests.

What a request is at home on is where its attention runs, so tokens must stay even: in every step a rank has as many as
any other, or one more, and what has no room goes elsewhere (:meth:`poise.routing.batch.RoutingBatch.evened`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.routing.trace import NO_EXPERT, RoutingTrace
from poise.util.errors import OptionError, TraceError

BAND = 0.1
"""A rank takes requests while it has less than so much more than the mean of the tokens of all ranks."""
ROUNDS = 20
"""Of grouping at most."""


class Signatures(NamedTuple):
    """Requests in order of appearance.

    Parameters
    ----------
    request_R : int64 [R], ids of the trace.
    share_RLE : float32 [R, L, E], picks of each expert / picks of the layer.
    tokens_R : int64 [R], all tokens.
    """

    request_R: NDArray[np.int64]
    share_RLE: NDArray[np.float32]
    tokens_R: NDArray[np.int64]


def signatures(trace: RoutingTrace) -> Signatures:
    """Of all requests of a trace: from prefill, or from all tokens of a request that has none."""
    assert trace.request is not None and trace.is_decode is not None
    ids, first, own_T = np.unique(trace.request, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place_T = np.argsort(order, kind="stable")[own_T]
    tokens_R = np.bincount(place_T)
    prefill_R = np.bincount(place_T, weights=~trace.is_decode) > 0
    used_T = ~trace.is_decode | ~prefill_R[place_T]
    share = np.zeros((len(ids), trace.num_layers, trace.num_experts), np.float32)
    for layer in range(trace.num_layers):
        token, pick = np.nonzero(used_T[:, None] & (trace.experts[:, layer] != NO_EXPERT))
        np.add.at(share[:, layer], (place_T[token], trace.experts[token, layer, pick]), 1.0)
    share /= np.maximum(share.sum(axis=2, keepdims=True), 1.0)
    return Signatures(ids[order].astype(np.int64), share, tokens_R)


def at_ranks(trace: RoutingTrace, known: Signatures, rank_R: NDArray[Any]) -> RoutingTrace:
    """The trace with each request at home on its rank: ``known`` are its signatures, ``rank_R`` int [R]."""
    assert trace.request is not None
    order = np.argsort(known.request_R)
    home_T = np.asarray(rank_R)[order][np.searchsorted(known.request_R[order], trace.request)]
    return replace(trace, home=home_T.astype(np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class HomeTable:
    """What a router needs.

    Parameters
    ----------
    score_DLE : float32 [D, L, E], worth of a pick of an expert of a layer on each rank.
    layer_ids_L : int32 [L], decoder layers.
    policy : how it was made.
    band : see :data:`BAND`.
    """

    score_DLE: NDArray[np.float32]
    layer_ids_L: NDArray[np.int32]
    policy: str
    band: float = BAND

    def __post_init__(self) -> None:
        if self.score_DLE.ndim != 3 or self.score_DLE.shape[1] != self.layer_ids_L.size:
            raise OptionError(
                f"scores must be [D, L, E] for {self.layer_ids_L.size} layers, got {self.score_DLE.shape}"
            )
        if not (np.isfinite(self.score_DLE).all() and 0 <= self.band < np.inf):
            raise OptionError(f"scores must be finite and the band at least 0, got a band of {self.band}")

    @property
    def num_devices(self) -> int:
        """D."""
        return len(self.score_DLE)

    def scores(self, share_RLE: NDArray[np.float32]) -> NDArray[np.float32]:
        """Worth of each rank to requests, float32 [R, D].

        Raises
        ------
        TraceError : signatures are of other layers or experts.
        """
        if share_RLE.shape[1:] != self.score_DLE.shape[1:]:
            raise TraceError(f"signatures are of {share_RLE.shape[1:]} layers, experts, the table of "
                             f"{self.score_DLE.shape[1:]}")  # fmt: skip
        flat = share_RLE.reshape(len(share_RLE), -1) @ self.score_DLE.reshape(self.num_devices, -1).T
        return np.asarray(flat, np.float32)


def route(score_RD: NDArray[Any], tokens_R: NDArray[Any], band: float) -> NDArray[np.int64]:
    """Rank of each request, int64 [R], one after another as they come: the best among those with room.

    Room has a rank whose tokens stay within (1 + band) times the mean of all, the new request's counted, or that has
    least. Ties go to the rank with least.
    """
    requests, devices = score_RD.shape
    load_D = np.zeros(devices)
    out = np.zeros(requests, np.int64)
    for r in range(requests):
        most = (1.0 + band) * (load_D.sum() + tokens_R[r]) / devices
        room_D = (load_D + tokens_R[r] <= most) | (load_D == load_D.min())
        order = np.lexsort((load_D, -score_RD[r], ~room_D))
        out[r] = order[0]
        load_D[out[r]] += tokens_R[r]
    return out


def affine(placement: Placement, cluster: Cluster, pair_s: tuple[float, float], *, near: bool) -> HomeTable:
    """Scores from what a pick costs from a rank to the holders of its expert.

    Parameters
    ----------
    pair_s : seconds of a pair over a port inside the node, and between nodes.
    near : tokens go to the own rank, else the own node, where those hold the expert; else to any slot alike.
    """
    assert placement.layer_ids_L is not None
    count_LED = placement.count_LED().astype(np.float64)
    share_LED = count_LED / np.maximum(count_LED.sum(axis=2, keepdims=True), 1)
    devices = cluster.num_devices
    same_DD = cluster.node_D[:, None] == cluster.node_D[None, :]
    cost_DD = np.where(same_DD, pair_s[0], pair_s[1]) * (1 - np.eye(devices))
    cost_LED = share_LED @ cost_DD
    if near:
        held_LED = count_LED > 0
        inside_LED = held_LED @ same_DD > 0
        cost_LED = np.where(held_LED, 0.0, np.where(inside_LED, pair_s[0], cost_LED))
    return HomeTable(np.ascontiguousarray(-cost_LED.transpose(2, 0, 1), dtype=np.float32), placement.layer_ids_L, "affine")


def grouped(known: Signatures, layer_ids_L: NDArray[np.int32], num_devices: int, seed: int = 0) -> HomeTable:
    """Centroids of as many groups as ranks, of about equal tokens: k-means on signatures of length 1, whose groups take
    requests only while they have room, those first that would lose most elsewhere.
    """
    rng = np.random.default_rng(seed)
    flat = known.share_RLE.reshape(len(known.share_RLE), -1).astype(np.float64)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    centre = flat[_apart(flat, num_devices, rng)]
    group = np.full(len(flat), -1)
    for _ in range(ROUNDS):
        score = flat @ centre.T
        best = np.sort(score, axis=1)
        order = np.argsort(-(best[:, -1] - best[:, -2] if num_devices > 1 else best[:, -1]), kind="stable")
        now = np.empty(len(flat), np.int64)
        now[order] = route(score[order], known.tokens_R[order], BAND)
        if (now == group).all():
            break
        group = now
        sums = np.zeros_like(centre)
        np.add.at(sums, group, flat * known.tokens_R[:, None])
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centre = np.where(length > 0, sums / np.maximum(length, 1e-12), centre)
    shape = (num_devices, *known.share_RLE.shape[1:])
    return HomeTable(centre.reshape(shape).astype(np.float32), layer_ids_L, "grouped")


def _apart(flat: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows to begin with, each drawn by its squared distance to those before (k-means++)."""
    picks = [int(rng.integers(len(flat)))]
    gap = np.full(len(flat), np.inf)
    while len(picks) < count:
        gap = np.minimum(gap, np.maximum(0.0, 2.0 - 2.0 * flat @ flat[picks[-1]]))
        total = gap.sum()
        picks.append(int(rng.choice(len(flat), p=gap / total)) if total > 0 else int(rng.integers(len(flat))))
    return np.array(picks)
