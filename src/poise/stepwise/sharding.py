"""Sharding: which device owns which expert in training, over all MoE layers together (FSSDP, arXiv 2502.02581).

An owner keeps an expert's parameters and optimizer states and gets its summed gradient. Memory must balance over all
layers, not in each: a layer's shard on a device may hold 0 to E experts.

Heterogeneous sharding (Hecate's Algorithm 2), from loads of all layers and the overlap degree t
    Step 1  J = the t most loaded experts of each layer (their replicas' transfer hides); J' = the rest.
    Step 2  Every device gets (sum over layers of E) / D slots.
    Step 3  Layers by their largest load, highest first; their experts of J' by load, highest first: to the least loaded
            node (tie: fewer free slots), there to the least loaded device (same tie).
    Step 4  J fills the slots that are left, arbitrarily.
    Step 5  Every ``interval`` steps, owners move (parameters and optimizer states) only if the plan changed.

Open in the source, chosen here: where the slots do not divide, the first devices get one more; the load of a node or
device is that of this layer's experts placed so far over its speed, J left out; nodes and devices without free slots
are passed over; last ties go to the lower number. Step 4 gives an expert of J to the device with a free slot that owns
fewest of the layer's J (it will send them), then the least loaded, then the one with most free slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import StepPrice
from poise.machine.cluster import Cluster
from poise.util.errors import OptionError, PlacementError

MEAN_STEPS = 20
"""Steps whose mean load owners are planned from, on ranks and in the replay: what lasts, for owners stay for long."""
LEAST_GAIN = 0.01
"""Of the modelled seconds: less is within what the next steps differ by from those that are known."""


def even_sharding(num_layers: int, num_experts: int, num_devices: int) -> NDArray[np.int64]:
    """Owner of each expert in contiguous blocks, int64 [L, E].

    Where E does not divide, the devices that own one more rotate from layer to layer: over all layers every device
    owns the same number to within one.

    Raises
    ------
    OptionError : a size below 1.
    """
    if min(num_layers, num_experts, num_devices) < 1:
        raise OptionError(
            f"sharding needs at least 1, got {num_layers} layers, {num_experts} experts, {num_devices} devices"
        )
    base, rest = divmod(num_experts, num_devices)
    out = np.empty((num_layers, num_experts), np.int64)
    for layer in range(num_layers):
        count_D = np.full(num_devices, base)
        count_D[(layer * rest + np.arange(rest)) % num_devices] += 1
        out[layer] = np.repeat(np.arange(num_devices), count_D)
    return out


def check_sharding(owner_LE: NDArray[Any], num_devices: int) -> None:
    """Raise PlacementError unless every owner exists and owned experts over all layers differ by at most one."""
    owner = np.asarray(owner_LE)
    if owner.ndim != 2 or owner.size == 0 or owner.dtype.kind not in "iu":
        raise PlacementError(f"owners must be whole numbers [layers, experts], got {owner.dtype} {owner.shape}")
    if owner.min() < 0 or owner.max() >= num_devices:
        raise PlacementError(f"owners reach {owner.min()} to {owner.max()}, there are {num_devices} devices")
    count_D = np.bincount(owner.ravel(), minlength=num_devices)
    if count_D.max() - count_D.min() > 1:
        raise PlacementError(
            f"device {count_D.argmax()} owns {count_D.max()} experts, device {count_D.argmin()} owns {count_D.min()}",
            hint="over all layers every device owns the same number to within one",
        )


def owned_ED(owner_E: NDArray[Any], num_devices: int) -> NDArray[np.bool_]:
    """One layer's owners as a placement, bool [E, D]."""
    out: NDArray[np.bool_] = np.asarray(owner_E)[:, None] == np.arange(num_devices)
    return out


def lasting_load(load_BLE: NDArray[np.float64]) -> NDArray[np.float64]:
    """What owners are planned from: mean of the last :data:`MEAN_STEPS` of the steps known, float64 [L, E].

    ``load_BLE`` float64 [B, L, E]: tokens of the steps so far, the newest last; of no step, all experts are alike.
    """
    known = load_BLE[-MEAN_STEPS:]
    return known.mean(axis=0) if len(known) else np.ones(known.shape[1:])


def moves(old_LE: NDArray[Any], new_LE: NDArray[Any]) -> NDArray[np.int64]:
    """Experts that change owner, int64 [X, 4]: layer, expert, from, to; by layer, then expert.

    Raises
    ------
    PlacementError : the shapes differ.
    """
    old, new = np.asarray(old_LE), np.asarray(new_LE)
    if old.shape != new.shape:
        raise PlacementError(f"owners of {old.shape} and {new.shape} [layers, experts] cannot be compared")
    layer, expert = np.nonzero(old != new)
    return np.stack([layer, expert, old[layer, expert], new[layer, expert]], axis=1).astype(np.int64)


def heterogeneous_sharding(load_LE: NDArray[Any], overlap: int, cluster: Cluster) -> NDArray[np.int64]:
    """Algorithm 2 (see the module docstring): owners, int64 [L, E].

    Parameters
    ----------
    load_LE : [L, E], expected tokens of each expert, any scale.
    overlap : t, experts a layer whose transfer hides; 0: all are placed by load.
    cluster : nodes and speeds.

    Raises
    ------
    OptionError : loads that are not finite [L, E] of at least 0, or a negative overlap.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    if load.ndim != 2 or load.size == 0 or not np.isfinite(load).all() or load.min() < 0:
        raise OptionError(f"loads must be finite, at least 0 and [layers, experts], got shape {load.shape}")
    if overlap < 0:
        raise OptionError(f"the overlap degree must be at least 0, got {overlap}")
    (layers, experts), devices = load.shape, cluster.num_devices
    order_LE = np.argsort(-load, axis=1, kind="stable")
    top, rest_LE = order_LE[:, :overlap], order_LE[:, overlap:]
    free_D = np.full(devices, layers * experts // devices)
    free_D[: layers * experts % devices] += 1
    owner = np.full(load.shape, -1, np.int64)
    load_LD = np.zeros((layers, devices))
    for layer in np.argsort(-load.max(axis=1), kind="stable"):
        _place(rest_LE[layer], load[layer], owner[layer], free_D, load_LD[layer], cluster)
    for layer in range(layers):
        sends_D = np.zeros(devices, np.int64)
        for e in top[layer]:
            fits = np.flatnonzero(free_D > 0)
            by = np.lexsort((fits, -free_D[fits], load_LD[layer, fits], sends_D[fits]))
            d = fits[by[0]]
            owner[layer, e] = d
            sends_D[d] += 1
            free_D[d] -= 1
    return owner


def _place(
    order_X: NDArray[np.int64], load_E: NDArray[np.float64], owner_E: NDArray[np.int64], free_D: NDArray[np.int64],
    load_D: NDArray[np.float64], cluster: Cluster,
) -> None:  # fmt: skip
    """Step 3 for one layer's experts in a given order: fills owners, free slots and loads in place."""
    node_D = cluster.node_D.astype(np.int64)
    speed_N = np.bincount(node_D, weights=cluster.speed_D)
    for e in order_X:
        free_N = np.bincount(node_D, weights=free_D)
        load_N = np.bincount(node_D, weights=load_D) / speed_N
        node = _least(load_N, free_N)
        here = np.flatnonzero(node_D == node)
        d = here[_least(load_D[here] / cluster.speed_D[here], free_D[here])]
        owner_E[e] = d
        load_D[d] += load_E[e]
        free_D[d] -= 1


def place_within(load_E: NDArray[np.float64], owner_E: NDArray[np.int64], cluster: Cluster) -> NDArray[np.int64]:
    """One layer's owners by step 3, int64 [E], where every device owns as many of its experts as in ``owner_E``."""
    out, devices = np.full(len(owner_E), -1, np.int64), cluster.num_devices
    free_D = np.bincount(owner_E, minlength=devices)
    _place(np.argsort(-load_E, kind="stable"), load_E, out, free_D, np.zeros(devices), cluster)
    return out


def _least(load_X: NDArray[np.float64], free_X: NDArray[Any]) -> int:
    """The least loaded with a free slot; ties to fewer free slots, then to the lower number."""
    fits = np.flatnonzero(free_X > 0)
    return int(fits[np.lexsort((fits, free_X[fits], load_X[fits]))[0]])


class ShardingPolicy(Protocol):
    """When owners move, and where: a frozen dataclass of settings."""

    name: ClassVar[str]

    @property
    def interval(self) -> int:
        """Steps between two calls of :meth:`plan`; 0: never after the start."""
        ...

    @property
    def by_price(self) -> bool:
        """What it plans is a proposal, taken where modelled steps are faster (:mod:`poise.stepwise.owners`)."""
        ...

    @property
    def gain(self) -> float:
        """Least share of the modelled seconds by which they must fall, if it is ``by_price`` and loads are guessed."""
        ...

    def plan(self, load_LE: NDArray[np.float64], current_LE: NDArray[np.int64], price: StepPrice) -> NDArray[np.int64]:
        """Owners, int64 [L, E], from expected loads [L, E]; equal to ``current_LE`` where nothing is to move.

        A pure function: every rank gets the same loads and finds the same owners.
        """
        ...


@dataclass(frozen=True, slots=True)
class Even:
    """Owners stay where they are (:func:`even_sharding` at the start)."""

    name: ClassVar[str] = "even"
    by_price: ClassVar[bool] = False
    gain: ClassVar[float] = 0.0
    interval: int = 0

    def plan(self, load_LE: NDArray[np.float64], current_LE: NDArray[np.int64], price: StepPrice) -> NDArray[np.int64]:
        """The owners as they are."""
        return current_LE


@dataclass(frozen=True, slots=True)
class Heterogeneous:
    """Hecate's Algorithm 2 every ``interval`` steps.

    Parameters
    ----------
    interval : steps between two plans (published: 100; 10 to 100 made no difference).
    overlap : t; 0: from the price's window, as :class:`poise.stepwise.methods.hecate.Hecate` finds it.
    by_price : a plan is taken where the modelled step is faster with it; False, as published: whatever it moves.
    gain : least share of the modelled seconds by which they must fall, where loads are not known ahead.
    """

    name: ClassVar[str] = "heterogeneous"
    interval: int = 100
    overlap: int = 0
    by_price: bool = False
    gain: float = LEAST_GAIN

    def plan(self, load_LE: NDArray[np.float64], current_LE: NDArray[np.int64], price: StepPrice) -> NDArray[np.int64]:
        """Algorithm 2."""
        t = self.overlap or price.hidden_experts()
        return heterogeneous_sharding(load_LE, min(t, load_LE.shape[1]), price.cluster)


@dataclass(frozen=True, slots=True)
class Balanced:
    """``poise``: Algorithm 2 with every expert placed by load (t = 0, an empty J: what replicas cannot mend is balanced
    too), taken where the modelled step is faster with it (:mod:`poise.stepwise.owners`).

    Parameters
    ----------
    interval : steps between two plans.
    gain : least share of the modelled seconds by which they must fall, where loads are not known ahead.
    """

    name: ClassVar[str] = "balanced"
    by_price: ClassVar[bool] = True
    interval: int = 100
    gain: float = LEAST_GAIN

    def plan(self, load_LE: NDArray[np.float64], current_LE: NDArray[np.int64], price: StepPrice) -> NDArray[np.int64]:
        """Algorithm 2 with t = 0; whether it is taken is decided by price."""
        return heterogeneous_sharding(load_LE, 0, price.cluster)
