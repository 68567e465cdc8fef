"""RoutingBatch: the traffic of B steps in the one form that cost, planning and replay read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.routing.trace import NO_EXPERT, finite
from poise.util.compiled import compiled, plain
from poise.util.errors import TraceError

Homes = Literal["equal", "by-request"]
HOMES: tuple[Homes, ...] = ("equal", "by-request")


@dataclass(frozen=True, slots=True, eq=False)
class RoutingBatch:
    """Traffic of B steps. Arrays are read-only.

    Parameters
    ----------
    load_BLE : float64 [B, L, E], tokens of each expert (a token counts once for each of its K experts).
    weight_B : float64 [B], weight of each step in an expectation, summing to 1.
    top_k : K.
    layer_ids_L : int32 [L], index of each MoE layer among the model's decoder layers.
    experts_TLK : int16 [T, L, K] or None where only loads are known; rows sorted by step, heaviest expert first. -1 is
        a pick that computes nothing; those of a token come behind its others.
    start_B : int64 [B + 1]; the tokens of step b are rows start_B[b]:start_B[b + 1].
    request_T : int32 [T] or None.
    home_T : int32 [T] or None, recorded home rank.
    order : how the steps were made, in words (printed under every table).
    drawn_from : so many steps there are, of which these are a sample; None: these are all.
    homes : how tokens without a recorded home rank are dealt to ranks (:meth:`home_of_tokens`).
    domain_R : int16 [R] or None, domain of each request that ``request_T`` numbers.
    """

    load_BLE: NDArray[np.float64]
    weight_B: NDArray[np.float64]
    top_k: int
    layer_ids_L: NDArray[np.int32]
    experts_TLK: NDArray[np.int16] | None = None
    start_B: NDArray[np.int64] | None = None
    request_T: NDArray[np.int32] | None = None
    home_T: NDArray[np.int32] | None = None
    order: str = ""
    drawn_from: int | None = None
    homes: Homes = "equal"
    domain_R: NDArray[np.int16] | None = None

    def __post_init__(self) -> None:
        load = self.load_BLE
        if load.ndim != 3 or 0 in load.shape:
            raise TraceError(f"loads must be [B, L, E] and not empty, got shape {load.shape}")
        if not finite(load) or load.min() < 0:
            raise TraceError("loads must be finite and at least 0")
        if self.weight_B.shape != load.shape[:1] or self.layer_ids_L.shape != load.shape[1:2]:
            raise TraceError(
                f"{self.weight_B.size} weights and {self.layer_ids_L.size} layer ids for {load.shape[:2]} steps, layers"
            )
        if self.experts_TLK is not None:
            if self.start_B is None or self.start_B.size != load.shape[0] + 1:
                raise TraceError(f"step offsets must have {load.shape[0] + 1} entries")
            if self.experts_TLK.shape[1:] != (load.shape[1], self.top_k):
                raise TraceError(f"experts {self.experts_TLK.shape} for {load.shape[1]} layers, top-{self.top_k}")
        if self.domain_R is not None:
            top = -1 if self.request_T is None else int(self.request_T.max(initial=-1))
            if self.request_T is None or top >= self.domain_R.size or self.request_T.min(initial=0) < 0:
                raise TraceError(
                    f"domains of {self.domain_R.size} requests, and the requests of the tokens reach {top}",
                    hint="request_T numbers them from 0",
                )
        for name in ("load_BLE", "weight_B", "layer_ids_L", "experts_TLK", "start_B", "request_T", "home_T",
                     "domain_R"):  # fmt: skip
            arr = getattr(self, name)
            if arr is not None:
                arr.flags.writeable = False

    @property
    def num_steps(self) -> int:
        """B."""
        return int(self.load_BLE.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.load_BLE.shape[1])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load_BLE.shape[2])

    @property
    def has_tokens(self) -> bool:
        """Token-level routing is known, not only loads."""
        return self.experts_TLK is not None

    def tokens_BL(self) -> NDArray[np.float64]:
        """Tokens of each step, float64 [B, L], 0 in a layer where none of them computes; of loads, pairs / K."""
        pairs_BL = self.load_BLE.sum(axis=2)
        if self.start_B is None:
            return np.asarray(pairs_BL / self.top_k)
        return np.asarray((pairs_BL > 0) * np.diff(self.start_B)[:, None].astype(np.float64))

    def step_T(self) -> NDArray[np.int64]:
        """Step of each token, int64 [T].

        Raises
        ------
        TraceError : no tokens are known.
        """
        if self.start_B is None:
            raise TraceError("tokens need token-level routing", hint="give a routing trace, not a load profile")
        return np.repeat(np.arange(self.num_steps), np.diff(self.start_B))

    def weight_T(self) -> NDArray[np.float64]:
        """Weight of each token's step, float64 [T]; errors as :meth:`step_T`."""
        return self.weight_B[self.step_T()]

    def mean_tokens(self) -> float:
        """Tokens of a step, of the layer that has most, mean over steps."""
        return float(self.weight_B @ self.tokens_BL().max(axis=1))

    def came_from_TL(self) -> NDArray[np.int64]:
        """Where ``stay`` traffic finds a token before each layer, int64 [T, L].

        The flat index ``layer * E + expert`` of the heaviest expert of the last layer in which the token computed
        anything, -1 for its home rank.

        Raises
        ------
        TraceError : no tokens are known.
        """
        if self.experts_TLK is None:
            raise TraceError("token moves need token-level routing", hint="give a routing trace, not a load profile")
        first_TL = self.experts_TLK[:, :, 0].astype(np.int64)
        out = np.full(first_TL.shape, -1, np.int64)
        for layer in range(1, self.num_layers):
            here_T = first_TL[:, layer - 1]
            out[:, layer] = np.where(here_T < 0, out[:, layer - 1], here_T + (layer - 1) * self.num_experts)
        return out

    def load_LE(self) -> NDArray[np.float64]:
        """Expected load of one step, float64 [L, E]."""
        return np.einsum("b,ble->le", self.weight_B, self.load_BLE)

    def steps_from(self, first: int) -> RoutingBatch:
        """The batch without its first ``first`` steps; weights sum to 1 again.

        Raises
        ------
        TraceError : no step would be left.
        """
        if first == 0:
            return self
        if not 0 < first < self.num_steps:
            raise TraceError(
                f"{first} steps cannot be left out of {self.num_steps}", hint="use more tokens or shorter steps"
            )
        return self.part(slice(first, self.num_steps))

    @property
    def sampled(self) -> str:
        """That only a part of the steps is here, in words; ``""`` where all are."""
        return "" if self.drawn_from is None else f"{self.num_steps:,} of {self.drawn_from:,} steps"

    def part(self, steps: slice) -> RoutingBatch:
        """Some consecutive steps, not copied; weights sum to 1 again."""
        weight = self.weight_B[steps]
        weight = weight / weight.sum() if weight.any() else np.full(len(weight), 1.0 / len(weight))
        first, last = (0, 0) if self.start_B is None else self.start_B[[steps.start, steps.stop]].tolist()

        def rows(array: NDArray[Any] | None) -> Any:
            return None if array is None else array[first:last]

        return RoutingBatch(
            self.load_BLE[steps], weight, self.top_k, self.layer_ids_L, rows(self.experts_TLK),
            None if self.start_B is None else self.start_B[steps.start : steps.stop + 1] - first,
            rows(self.request_T), rows(self.home_T), self.order, self.drawn_from, self.homes, self.domain_R,
        )  # fmt: skip

    def home_of_tokens(self, num_devices: int) -> NDArray[np.int32]:
        """Home rank of each token, int32 [T]: as recorded, else dealt to ranks.

        ``equal``: every rank has as many tokens of a step as any other, or one more, as attention data parallelism
        keeps it. A request stays on its rank for as long as that has room; what has none goes to the rank with most.
        ``by-request``: requests in turn, however many tokens they have, so that some ranks have far more than others.

        Raises
        ------
        TraceError : no tokens are known, or a recorded home rank is not below ``num_devices``.
        """
        if self.experts_TLK is None:
            raise TraceError("home ranks need token-level routing", hint="give a routing trace, not a load profile")
        if self.home_T is not None:
            if self.home_T.size and not 0 <= self.home_T.min() <= self.home_T.max() < num_devices:
                raise TraceError(f"home ranks reach {self.home_T.max()}, the cluster has {num_devices} devices")
            return self.home_T
        if self.request_T is None:
            return (np.arange(len(self.experts_TLK)) % num_devices).astype(np.int32)
        if self.homes == "by-request":
            return (self.request_T % num_devices).astype(np.int32)
        assert self.start_B is not None
        request_T = self.request_T
        if request_T.size and request_T.max() >= 4 * request_T.size:
            request_T = np.unique(request_T, return_inverse=True)[1].astype(np.int32)
        out: NDArray[np.int32] = _equal_homes(plain(request_T, np.int32), plain(self.start_B, np.int64), num_devices)
        return out

    def evened(self, num_devices: int) -> RoutingBatch:
        """The batch with recorded home ranks as wishes: in every step all ranks have as many tokens, or one more.

        A rank takes tokens that want it first; those that find no room go to the rank with most.

        Raises
        ------
        TraceError : no home ranks are recorded, or one is not below ``num_devices``.
        """
        if self.home_T is None or self.start_B is None:
            raise TraceError("no home ranks are recorded that could be evened out")
        wish_T = plain(self.home_of_tokens(num_devices), np.int32)
        return replace(self, home_T=_evened(wish_T, plain(self.start_B, np.int64), num_devices))

    def at_home(self, num_devices: int) -> RoutingBatch:
        """The batch with its home ranks fixed for so many devices, so that parts of it have those of the whole."""
        return replace(self, home_T=self.home_of_tokens(num_devices)) if self.has_tokens else self

    def fullest_home(self, num_devices: int) -> float:
        """Tokens of the fullest home rank over the mean, mean over steps; 1 where homes are equal up to rounding."""
        if not self.has_tokens or self.start_B is None:
            return 1.0
        size_B = np.diff(self.start_B)
        flat = self.step_T() * num_devices + self.home_of_tokens(num_devices)
        count_BD = np.bincount(flat, minlength=self.num_steps * num_devices).reshape(self.num_steps, num_devices)
        return float((count_BD.max(axis=1) / np.maximum(np.ceil(size_B / num_devices), 1.0)).mean())


def count_loads(experts_TLK: NDArray[np.int16], size_B: NDArray[Any], num_experts: int) -> NDArray[np.float64]:
    """Tokens of every expert in consecutive steps of so many tokens, float64 [B, L, E]."""
    steps, layers = len(size_B), experts_TLK.shape[1]
    step_T = np.repeat(np.arange(steps), size_B)
    out = np.empty((steps, layers, num_experts))
    for layer in range(layers):
        ids = experts_TLK[:, layer]
        flat = (step_T[:, None] * num_experts + ids)[ids != NO_EXPERT]
        out[:, layer] = np.bincount(flat, minlength=steps * num_experts).reshape(steps, num_experts)
    return out


@compiled
def _rooms(size, turn, room_D):  # type: ignore[no-untyped-def]
    """Tokens that each rank takes of a step; the rest of a step that does not divide goes to ranks in turn."""
    devices = room_D.size
    room_D[:] = size // devices
    for i in range(size % devices):
        room_D[(turn + i) % devices] += 1
    return (turn + size) % devices


@compiled
def _evened(rank_T, start_B, num_devices):  # type: ignore[no-untyped-def]
    """Home ranks of :meth:`RoutingBatch.evened`."""
    out = np.full(rank_T.size, -1, np.int32)
    room_D = np.empty(num_devices, np.int64)
    turn = 0
    for b in range(start_B.size - 1):
        turn = _rooms(start_B[b + 1] - start_B[b], turn, room_D)
        for t in range(start_B[b], start_B[b + 1]):
            if room_D[rank_T[t]] > 0:
                room_D[rank_T[t]] -= 1
                out[t] = rank_T[t]
        for t in range(start_B[b], start_B[b + 1]):
            if out[t] < 0:
                out[t] = np.argmax(room_D)
                room_D[out[t]] -= 1
    return out


@compiled
def _equal_homes(request_T, start_B, num_devices):  # type: ignore[no-untyped-def]
    """Home ranks of :meth:`RoutingBatch.home_of_tokens` under ``equal``; steps that do not divide give their rest to
    ranks in turn.
    """
    out = np.empty(request_T.size, np.int32)
    rank_R = np.full(request_T.max() + 1 if request_T.size else 0, -1, np.int32)
    room_D = np.empty(num_devices, np.int64)
    turn = 0
    for b in range(start_B.size - 1):
        turn = _rooms(start_B[b + 1] - start_B[b], turn, room_D)
        for t in range(start_B[b], start_B[b + 1]):
            request = request_T[t]
            rank = rank_R[request]
            if rank < 0 or room_D[rank] == 0:
                rank = np.argmax(room_D)
                if rank_R[request] < 0:
                    rank_R[request] = rank
            room_D[rank] -= 1
            out[t] = rank
    return out
