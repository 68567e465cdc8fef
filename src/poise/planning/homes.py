"""Which rank serves which request: those that use the same experts meet where these are.

A request's *signature* is the share of each expert, layer by layer, in what is known of it when it must be given a
rank: its prefill. A table of scores says what a pick of an expert is worth on a rank, and a request goes to the rank
where its signature scores most, among those that have few tokens (:func:`route`).

``affine``   scores are what a pick costs from that rank to the holders of its expert: nothing on the rank itself, the
             node's fabric, or the network. Placement and homes are planned in turn: homes for the placement, then the
             placement for the traffic with these homes (:mod:`poise.planning.solve.with_homes`).
``grouped``  scores are centroids of groups of requests of alike signatures, as many as ranks and of as many tokens;
             nothing of the placement is known. So ELDR (arXiv 2607.00466) routes decode requests.

What a request is at home on is where its attention runs, so tokens must stay even: in every step a rank has as many as
any other, or one more, and what has no room goes elsewhere (:meth:`poise.routing.batch.RoutingBatch.evened`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.pricing import Pricing
from poise.planning.placement import MAX_CELLS, MAX_NAME, Placement
from poise.routing.npz import open_npz
from poise.routing.trace import NO_EXPERT, RoutingTrace, kept
from poise.util.errors import PlacementError, TraceError
from poise.util.files import replacing
from poise.util.room import require

POLICIES = ("affine", "grouped")
BAND = 0.1
"""A rank takes requests while it has less than so much more than the mean of the tokens of all ranks."""
ROUNDS = 20
"""Of grouping at most."""
STARTS = 5
"""Groupings that are tried."""
FORMAT = 1
MAX_LAYER = 65_535
FIELDS = ("format", "score", "layer_ids", "policy", "band")


class Signatures(NamedTuple):
    """Requests in order of appearance.

    Parameters
    ----------
    request_R : int64 [R], ids of the trace.
    share_RLE : float32 [R, L, E], picks of each expert / picks of the layer.
    tokens_R : int64 [R], all tokens.
    known_R : int64 [R], those that the signature is made of.
    """

    request_R: NDArray[np.int64]
    share_RLE: NDArray[np.float32]
    tokens_R: NDArray[np.int64]
    known_R: NDArray[np.int64]


def signatures(trace: RoutingTrace) -> Signatures:
    """Of all requests of a trace: from prefill, or from all tokens of a request that has none.

    Raises
    ------
    TraceError : they do not fit into memory.
    """
    ids, first, own_T = np.unique(trace.request, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place_T = np.argsort(order, kind="stable")[own_T]
    tokens_R = np.bincount(place_T)
    prefill_R = np.bincount(place_T, weights=~trace.is_decode) > 0
    used_T = ~trace.is_decode | ~prefill_R[place_T]
    shape = (len(ids), trace.num_layers, trace.num_experts)
    require(
        4 * prod(shape) + 8 * shape[0] * shape[2], f"signatures {list(shape)} of requests, layers, experts", TraceError
    )
    share = np.empty(shape, np.float32)
    for layer in range(trace.num_layers):
        picks_TK = trace.experts[:, layer]
        at = (place_T[:, None] * trace.num_experts + picks_TK)[used_T[:, None] & (picks_TK != NO_EXPERT)]
        count_RE = np.bincount(at, minlength=shape[0] * shape[2]).reshape(shape[0], shape[2])
        share[:, layer] = count_RE / np.maximum(count_RE.sum(axis=1, keepdims=True), 1)
    return Signatures(
        ids[order].astype(np.int64), share, tokens_R, np.bincount(place_T, weights=used_T).astype(np.int64)
    )


def at_ranks(trace: RoutingTrace, known: Signatures, rank_R: NDArray[Any]) -> RoutingTrace:
    """The trace with each request at home on its rank: ``known`` are its signatures, ``rank_R`` int [R]."""
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
        score, ids = np.asarray(self.score_DLE), np.asarray(self.layer_ids_L)
        if score.ndim != 3 or 0 in score.shape or ids.shape != score.shape[1:2]:
            raise PlacementError(f"scores must be [D, L, E] for {ids.size} layers, got {score.shape}")
        if score.dtype.kind != "f" or not (np.abs(score) <= np.finfo(np.float32).max).all():
            raise PlacementError(f"scores must be finite floats, got {score.dtype}", hint="were they planned by poise?")
        if ids.dtype.kind not in "iu" or not 0 <= ids.min() <= ids.max() <= MAX_LAYER or (ids[1:] <= ids[:-1]).any():
            raise PlacementError(f"layer ids must ascend within 0..{MAX_LAYER}, got {ids.tolist()[:8]}")
        if not 0 <= self.band < np.inf:
            raise PlacementError(f"the band must be at least 0 and finite, got {self.band}")
        if len(self.policy) > MAX_NAME or not self.policy.isprintable():
            raise PlacementError(
                f"a policy's name has at most {MAX_NAME} printable characters, got {self.policy!r:.80}"
            )
        object.__setattr__(self, "score_DLE", kept(score, np.float32))
        object.__setattr__(self, "layer_ids_L", kept(ids, np.int32))

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

    def home(self, trace: RoutingTrace, known: Signatures | None = None) -> RoutingTrace:
        """The trace with its requests at home where a router with this table would have sent them, in order of
        appearance; of each it knows the tokens of the signature alone.

        Parameters
        ----------
        known : the signatures of the trace, where they are there already.

        Raises
        ------
        TraceError : the trace is of other layers or experts.
        """
        if not np.array_equal(trace.layer_ids, self.layer_ids_L):
            raise TraceError(f"the table is of decoder layers {self.layer_ids_L.tolist()[:8]}, the traffic of "
                             f"{trace.layer_ids.tolist()[:8]}")  # fmt: skip
        known = known or signatures(trace)
        return at_ranks(trace, known, route(self.scores(known.share_RLE), known.known_R, self.band))

    def save(self, path: str | Path) -> None:
        """Write a ``.npz`` without pickles (docs/formats.md); the file appears whole or not at all.

        Raises
        ------
        PlacementError : as :func:`poise.util.files.replacing`.
        """
        with replacing(path, PlacementError) as stream:
            np.savez_compressed(stream, format=np.int32(FORMAT), score=self.score_DLE, layer_ids=self.layer_ids_L,
                                policy=np.array(self.policy), band=np.float64(self.band))  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> HomeTable:
        """Read what :meth:`save` wrote.

        Raises
        ------
        PlacementError : the file is missing, damaged, pickled, too large, of another format, or no table.
        """
        try:
            with open_npz(Path(path), ["a home table"]) as archive:
                headers = {name: archive.header(name) for name in FIELDS}
                for name, shape, kinds in (
                    ("format", (), "iu"), ("score", (None, None, None), "f"), ("layer_ids", (None,), "iu"),
                    ("policy", (), "U"), ("band", (), "f"),
                ):  # fmt: skip
                    headers[name].require(shape, kinds=kinds)
                if prod(headers["score"].shape) > MAX_CELLS:
                    raise PlacementError(f"scores {list(headers['score'].shape)} are more than {MAX_CELLS}")
                arrays = {name: archive.read(header) for name, header in headers.items()}
        except TraceError as error:
            raise PlacementError(error.message, hint=error.hint or "is it a poise home table?") from None
        if int(arrays["format"]) != FORMAT:
            raise PlacementError(f"{path} has format {int(arrays['format'])}, this version reads {FORMAT}")
        try:
            return cls(arrays["score"], arrays["layer_ids"], str(arrays["policy"]), float(arrays["band"]))
        except PlacementError as error:
            raise PlacementError(f"{path}: {error.message}", hint=error.hint) from None


def route(score_RD: NDArray[Any], tokens_R: NDArray[Any], band: float) -> NDArray[np.int64]:
    """Rank of each request, int64 [R], one after another as they come: the best among those with room.

    Room has a rank whose tokens are within (1 + band) times the mean of all, the new request's counted in the mean: so
    it never has more than that and one request. Ties go to the rank with least, then to the first.
    """
    requests, devices = score_RD.shape
    load_D = np.zeros(devices)
    out = np.zeros(requests, np.int64)
    for r in range(requests):
        full_D = load_D > (1.0 + band) * (load_D.sum() + tokens_R[r]) / devices
        out[r] = np.lexsort((load_D, -score_RD[r], full_D))[0]
        load_D[out[r]] += tokens_R[r]
    return out


def _inside_between(pricing: Pricing) -> tuple[float, float]:
    cluster, model = pricing.cluster, pricing.model
    ways = (
        (model.dispatch_bytes_per_token, cluster.dispatch_wire),
        (model.combine_bytes_per_token, cluster.combine_wire),
    )
    inside_s = sum(size / wire.intra_bytes_per_s for size, wire in ways)
    return inside_s, sum(size / wire.inter_bytes_per_s for size, wire in ways)


def pair_seconds(pricing: Pricing) -> NDArray[np.float64]:
    """Seconds of a port for a pair from device to device, out and back, float64 [D, D]; none where it stays."""
    cost_DD = np.where(pricing.cluster.same_node_DD, *_inside_between(pricing))
    np.fill_diagonal(cost_DD, 0.0)
    return cost_DD


def affine(placement: Placement, pricing: Pricing, band: float = BAND) -> HomeTable:
    """Scores from what a pick costs from a rank to the holders of its expert, in seconds of a port, out and back.

    Under the split ``near`` tokens go to the own rank, else the own node, where those hold the expert; under the others
    to any slot alike.
    """
    cost_DD = pair_seconds(pricing)
    count_LED = placement.count_LED().astype(np.float64)
    cost_LED = count_LED / np.maximum(count_LED.sum(axis=2, keepdims=True), 1) @ cost_DD
    if pricing.split == "near":
        held_LED = count_LED > 0
        inside_LED = held_LED @ pricing.cluster.same_node_DD.astype(np.float64) > 0
        inside_s = _inside_between(pricing)[0]
        cost_LED = np.where(held_LED, 0.0, np.where(inside_LED, inside_s, cost_LED))
    score_DLE = np.ascontiguousarray(-cost_LED.transpose(2, 0, 1), dtype=np.float32)
    return HomeTable(score_DLE, placement.layer_ids_L, "affine", band)


def grouped(
    known: Signatures, layer_ids_L: NDArray[np.int32], num_devices: int, *, seed: int = 0, band: float = BAND
) -> HomeTable:
    """Centroids of as many groups as ranks, of about equal tokens: k-means on signatures of length 1, whose groups take
    requests only while they have room, those first that would lose most elsewhere. The best of :data:`STARTS` counts.
    """
    rng = np.random.default_rng(seed)
    flat = known.share_RLE.reshape(len(known.share_RLE), -1).astype(np.float64)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    tried = [_grouped_once(flat, known.tokens_R, num_devices, band, rng) for _ in range(STARTS)]
    centre = max(tried, key=lambda found: found[0])[1]
    shape = (num_devices, *known.share_RLE.shape[1:])
    return HomeTable(centre.reshape(shape).astype(np.float32), layer_ids_L, "grouped", band)


def _grouped_once(
    flat: NDArray[np.float64], tokens_R: NDArray[np.int64], groups: int, band: float, rng: np.random.Generator
) -> tuple[float, NDArray[np.float64]]:
    """Likeness of requests to the centroid of their group, and centroids [D, L * E], from one start."""
    centre = flat[_apart(flat, groups, rng)]
    group = np.full(len(flat), -1)
    for _ in range(ROUNDS):
        now = _packed(flat @ centre.T, tokens_R, (1.0 + band) * tokens_R.sum() / groups)
        if (now == group).all():
            break
        group = now
        sums = np.zeros_like(centre)
        np.add.at(sums, group, flat * tokens_R[:, None])
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centre = np.where(length > 0, sums / np.maximum(length, 1e-12), centre)
    return float(tokens_R @ (flat * centre[group]).sum(axis=1)), centre


def _packed(score_RG: NDArray[np.float64], tokens_R: NDArray[np.int64], most: float) -> NDArray[np.int64]:
    """Group of each request, int64 [R]: the best that stays within ``most`` tokens, else the one with fewest."""
    load_G, out = np.zeros(score_RG.shape[1]), np.empty(len(score_RG), np.int64)
    best = np.sort(score_RG, axis=1)
    regret_R = best[:, -1] - best[:, max(-2, -best.shape[1])]
    for r in np.argsort(-regret_R, kind="stable"):
        room_G = load_G + tokens_R[r] <= most
        out[r] = np.argmax(np.where(room_G, score_RG[r], -np.inf)) if room_G.any() else np.argmin(load_G)
        load_G[out[r]] += tokens_R[r]
    return out


def _apart(flat: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows to begin with, each drawn by its squared distance to those before (k-means++)."""
    picks = [int(rng.integers(len(flat)))]
    gap = np.full(len(flat), np.inf)
    while len(picks) < count:
        gap = np.minimum(gap, np.maximum(0.0, 2.0 - 2.0 * flat @ flat[picks[-1]]))
        total = gap.sum()
        picks.append(int(rng.choice(len(flat), p=gap / total)) if total > 0 else int(rng.integers(len(flat))))
    return np.array(picks)
