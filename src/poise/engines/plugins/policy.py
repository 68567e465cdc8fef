"""The core behind the engine plugins: the arrays of an engine's load balancer in, poise's planner, arrays out.

Every rank of an engine runs its load balancer by itself on the same loads, and all of them must come to the same map:
ranks that do not agree send experts to where others do not wait for them. So nothing here looks at a clock (the search
is given a number of proposals, and the time limit is what they take on one core), and what cannot be planned ends in
one of two ways.

- :func:`asked` refuses, with an InputError, numbers of the engine or settings that do not fit: all ranks have the same
  ones, so all may go on alike without poise.
- :meth:`Asked.answer` fails for any other reason, memory say, that one rank alone may have. Nobody may go on from
  there: whoever calls lets it raise.
"""

from __future__ import annotations

import hashlib
import logging
import operator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.plugins.settings import DEFAULT, PolicySettings
from poise.engines.slots import trivial_row
from poise.machine.cluster import Cluster
from poise.util.errors import NoResultError, OptionError

GRAINS, SINGLE_GRAINS = 2.0**30, 2.0**16
"""Loads count in such shares of their layer's (those of single precision in coarser ones), so that the same loads give
the same map in any unit."""
MAX_SLOTS = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A call of an engine's load balancer, checked; plain frozen data.

    Parameters
    ----------
    load_LE : float64 [L, E], in grains.
    slots, groups, nodes, ranks : S, expert groups to hold whole on nodes (1 node: none), nodes, ranks.
    old_LS : the map in use, int64 [L, S], or None.
    cluster : with the engine's ranks; None where the load plays no part.
    given_LS : then the answer.
    settings : of the plugin.
    """

    load_LE: NDArray[np.float64]
    slots: int
    groups: int
    nodes: int
    ranks: int
    old_LS: NDArray[np.int64] | None
    cluster: Cluster | None
    given_LS: NDArray[np.int64] | None
    settings: PolicySettings

    def answer(self) -> NDArray[np.int64]:
        """Expert of each slot, int64 [L, S]: every expert at least once; the same for the same input on any rank.

        Raises
        ------
        NoResultError : what was planned is no valid map; and whatever a rank may die of.
        """
        if self.given_LS is not None:
            return self.given_LS.copy()
        layers, experts = self.load_LE.shape
        out = _base(self.old_LS, layers, experts, self.slots)
        busy = np.flatnonzero(self.load_LE.sum(axis=1) > 0)
        if self.cluster is not None and self.ranks > 1 and busy.size:
            shape = (self.groups, self.nodes, self.ranks) if self.nodes > 1 else (1, 1, self.ranks)
            planner = import_module("poise.engines.plugins.planner")  # numba: a static map needs none
            out[busy] = planner.plan(
                self.load_LE[busy], out[busy], self.old_LS is not None, shape, self.cluster, self.settings
            )
        if usable_map(out, layers, experts, self.slots) is None:
            raise NoResultError("the planned map lacks an expert")
        return out


def asked(
    weight_LE: NDArray[Any],
    num_replicas: int,
    num_groups: int | None,
    num_nodes: int,
    num_ranks: int,
    old_map_LS: NDArray[Any] | None = None,
    *,
    settings: PolicySettings = DEFAULT,
    single: bool = False,
) -> Asked:
    """Check a call. What it raises follows from the arguments alone, so that it is the same on all ranks.

    Parameters
    ----------
    weight_LE : [L, E], load of each expert; a layer without load keeps its row.
    num_replicas : S, slots in all; slot s lies on rank s // (S / num_ranks).
    num_groups : expert groups that a node should hold whole; None or 0: the model has none. Groups that do not divide
        over nodes are ignored, as the engines do.
    num_nodes, num_ranks : of the engine. Nodes that do not divide the ranks count as one, as in vLLM.
    old_map_LS : the map in use; one that is no valid map of these shapes counts as none.
    settings : :class:`PolicySettings`.
    single : the engine counts in floating point of single precision or less.

    Raises
    ------
    OptionError : shapes or numbers do not fit. PlacementError : the static map does not fit.
    """
    load = np.array(weight_LE, dtype=np.float64)
    if load.ndim != 2 or load.size == 0:
        raise OptionError(f"loads must be [layers, experts], got shape {load.shape}")
    wrong = np.argwhere(~(np.isfinite(load) & (load >= 0)))
    if wrong.size:
        layer, expert = wrong[0]
        raise OptionError(
            f"loads must be finite and at least 0, got {load[layer, expert]} for expert {expert} of layer {layer}"
        )
    load = _in_grains(load, SINGLE_GRAINS if single else GRAINS)
    layers, experts = load.shape
    slots, nodes, ranks = _whole("slots", num_replicas), _whole("nodes", num_nodes), _whole("ranks", num_ranks)
    groups = 1 if num_groups is None or num_groups == 0 else _whole("expert groups", num_groups)
    if slots % ranks:
        raise OptionError(f"{slots} slots do not divide over {ranks} ranks")
    if not experts <= slots <= MAX_SLOTS:
        raise OptionError(f"{slots} slots for {experts} experts: at least as many, and at most {MAX_SLOTS}")
    if ranks % nodes:
        nodes = 1
    whole = nodes > 1 and groups % nodes == 0 and experts % groups == 0
    old = usable_map(old_map_LS, layers, experts, slots)
    if settings.static_map is not None:
        given = settings.static_map.rows(layers, experts, slots, ranks)
        return Asked(load, slots, groups, 1, ranks, old, None, given, settings)
    cluster = settings.machine(nodes, ranks)
    if whole and (cluster.devices_per_node_N != ranks // nodes).any():
        raise OptionError(
            f"the engine has {nodes} nodes of {ranks // nodes} ranks, POISE_CLUSTER "
            f"{cluster.devices_per_node_N.tolist()}"
        )
    return Asked(load, slots, groups, nodes if whole else 1, ranks, old, cluster, None, settings)


def rebalance(*arguments: Any, **named: Any) -> NDArray[np.int64]:
    """Check, and answer: arguments and errors of :func:`asked` and :meth:`Asked.answer`."""
    return asked(*arguments, **named).answer()


def _whole(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be a whole number, got {value!r}") from None
    if number < 1:
        raise OptionError(f"{name} must be at least 1, got {number}")
    return number


def _base(old_LS: NDArray[np.int64] | None, layers: int, experts: int, slots: int) -> NDArray[np.int64]:
    """The map in use, a copy, or the one that engines start with."""
    if old_LS is not None:
        return old_LS.copy()
    return np.tile(trivial_row(experts, slots).astype(np.int64), (layers, 1))


def _in_grains(load_LE: NDArray[np.float64], grains: float) -> NDArray[np.float64]:
    """Loads as whole shares of their layer's, so that rounding in the engine's units decides nothing."""
    share_LE = load_LE / np.maximum(load_LE.max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    total_L1 = share_LE.sum(axis=1, keepdims=True)
    return np.rint(share_LE * (grains / np.where(total_L1 > 0, total_L1, 1.0)))


@cache
def warm_up() -> None:
    """Compile, or load, what :func:`rebalance` runs: seconds that serving should not wait for."""
    load, quick = np.arange(1.0, 17.0).reshape(2, 8), PolicySettings(time_limit_s=1e-6)
    first = rebalance(load, 12, 1, 1, 4, settings=quick)
    rebalance(load[:, ::-1], 12, 2, 2, 4, first, settings=quick)


def usable_map(map_LS: NDArray[Any] | None, layers: int, experts: int, slots: int) -> NDArray[np.int64] | None:
    """The map as int64 [L, S], or None if it is none of these shapes that holds every expert."""
    if map_LS is None or np.shape(map_LS) != (layers, slots):
        return None
    table = np.array(map_LS).astype(np.int64)
    if table.min() < 0 or table.max() >= experts:
        return None
    count = np.zeros((layers, experts), np.int64)
    np.add.at(count, (np.arange(layers)[:, None], table), 1)
    return table if count.min() > 0 else None


def logical_maps(map_LS: NDArray[Any], num_experts: int, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Slots of each expert, int64 [L, E, width], padded with -1, and how many they are, int64 [L, E].

    An empty slot of the map, -1, is no expert's.

    Raises
    ------
    OptionError : an expert has more slots than ``width``, or there is none of its number.
    """
    table = np.asarray(map_LS)
    most = int(table.max(initial=-1))
    if most >= num_experts or table.min(initial=0) < -1:
        raise OptionError(f"the map names expert {most if most >= num_experts else table.min()} of {num_experts}")
    order = np.argsort(table, axis=1, kind="stable")
    expert_LS = np.take_along_axis(table, order, axis=1)
    layer, place = np.nonzero(expert_LS >= 0)
    expert, slot = expert_LS[layer, place], order[layer, place]
    count = np.zeros((len(table), num_experts), np.int64)
    np.add.at(count, (layer, expert), 1)
    if count.max(initial=0) > width:
        raise OptionError(f"an expert has {count.max()} slots, the map of experts room for {width}")
    first = np.cumsum(count, axis=1) - count + (table < 0).sum(axis=1, keepdims=True)
    out = np.full((*count.shape, width), -1, np.int64)
    out[layer, expert, place - first[layer, expert]] = slot
    return out, count


def content(array: NDArray[Any]) -> str:
    """Twelve digits that tell arrays of different content apart: for the logs of ranks that must agree."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.float64).tobytes()).hexdigest()[:12]


def say_once(log: logging.Logger, text: str, *, level: int = logging.WARNING) -> None:
    """A line of the log, once a process for the same text."""
    if text not in _said:
        _said.add(text)
        log.log(level, text)


_said: set[str] = set()
