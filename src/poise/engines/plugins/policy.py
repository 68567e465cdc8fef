"""The core behind the engine plugins: the arrays of an engine's load balancer in, poise's planner, arrays out.

Every rank of an engine runs its load balancer by itself on the same loads, and all of them must come to the same map:
ranks that do not agree send experts to where others do not wait for them. So nothing here looks at a clock (the search
is given a number of proposals, and the time limit is what they take on one core), and what cannot be planned ends in
one of two ways.

- :func:`asked` refuses, with an InputError, numbers of the engine or settings that do not fit: all ranks have the same
  ones, so all may go on alike without poise.
- :meth:`Asked.answer` fails for any other reason, memory say, that one rank alone may have. Nobody may go on from
  there: whoever calls lets it raise, or has all ranks keep the map in use (:mod:`poise.engines.plugins.turns`).

Ranks may be lost. A plan is then made for the ranks that are left, as if there were no others, and the slots of the
lost ones are empty, -1.
"""

from __future__ import annotations

import hashlib
import logging
import operator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.plugins.settings import DEFAULT, PolicySettings
from poise.engines.slots import trivial_row
from poise.machine.cluster import Cluster
from poise.planning.placement import EMPTY
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
    slots, groups, nodes, ranks : S, expert groups to hold whole on nodes (1 node: none), nodes, ranks; of the ranks
        that are left.
    old_LS : the map in use, int64 [L, S], or None. Experts that only lost ranks held have been given slots.
    cluster : with the ranks that are left; None where the load plays no part.
    given_LS : then the answer, of the ranks that are left.
    settings : of the plugin.
    active_D : the ranks that are left, bool of all of them; None: all are.
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
    active_D: NDArray[np.bool_] | None = None

    def answer(self) -> NDArray[np.int64]:
        """Expert of each slot, int64 [L, S]: every expert at least once; the same for the same input on any rank.

        Raises
        ------
        NoResultError : what was planned is no valid map; and whatever a rank may die of.
        """
        return self.plan()[0]

    def plan(self) -> tuple[NDArray[np.int64], str]:
        """:meth:`answer`, and what it is worth, in words."""
        if self.given_LS is not None:
            lost = 0 if self.active_D is None else int((~self.active_D).sum())
            said = (
                f"the static map counts on {lost} ranks that are not there: the map in use stays, with every expert "
                "on the ranks that are left; poise plan --survive makes a map for each loss"
            )
            return self.on_all(self.given_LS.copy()), said if lost else ""
        layers, experts = self.load_LE.shape
        out, said = _base(self.old_LS, layers, experts, self.slots), "one rank, or nothing was computed"
        busy = np.flatnonzero(self.load_LE.sum(axis=1) > 0)
        if self.cluster is not None and self.ranks > 1 and busy.size:
            shape = (self.groups, self.nodes, self.ranks) if self.nodes > 1 else (1, 1, self.ranks)
            planner = import_module("poise.engines.plugins.planner")  # numba: a static map needs none
            made = planner.plan(
                self.load_LE[busy], out[busy], self.old_LS is not None, shape, self.cluster, self.settings
            )
            out[busy] = made.table_LS
            said = f"the map in use stays: {made.kept}"
            if not made.kept:
                said = (
                    f"gains {made.gain:.2%} of a step in {made.layers} of {layers} layers, a rank fetches at most "
                    f"{made.fetches} experts"
                )
                said += f"; {made.left} layers wait" if made.left else ""
        if usable_map(out, layers, experts, self.slots) is None:
            raise NoResultError("the planned map lacks an expert")
        return self.on_all(out), said

    def kept(self) -> NDArray[np.int64] | None:
        """The map in use, with every expert on a rank that is left; None where there is none."""
        return None if self.old_LS is None else self.on_all(self.old_LS.copy())

    def moved_on(self, table_LS: NDArray[np.int64]) -> Asked:
        """The same call with another map in use, of all ranks."""
        return replace(self, old_LS=table_LS if self.active_D is None else table_LS[:, self._left_S()])

    def on_all(self, table_LS: NDArray[np.int64]) -> NDArray[np.int64]:
        """A map of the ranks that are left, as one of all ranks."""
        if self.active_D is None:
            return table_LS
        left_S = self._left_S()
        out = np.full((len(table_LS), left_S.size), EMPTY, np.int64)
        out[:, left_S] = table_LS
        return out

    def _left_S(self) -> NDArray[np.bool_]:
        assert self.active_D is not None
        return np.repeat(self.active_D, self.slots // self.ranks)


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
    active_D: NDArray[Any] | None = None,
) -> Asked:
    """Check a call. What it raises follows from the arguments alone, so that it is the same on all ranks.

    Parameters
    ----------
    weight_LE : [L, E], load of each expert; a layer without load keeps its row.
    num_replicas : S, slots in all; slot s lies on rank s // (S / num_ranks).
    num_groups : expert groups that a node should hold whole; None or 0: the model has none. Groups that do not divide
        over nodes are ignored, as the engines do.
    num_nodes, num_ranks : of the engine. Nodes that do not divide the ranks count as one, as in vLLM.
    old_map_LS : the map in use; one that is no valid map of these shapes counts as none. With ``active_D`` only the
        shape counts: a rank that came back has empty slots, which are filled.
    settings : :class:`PolicySettings`.
    single : the engine counts in floating point of single precision or less.
    active_D : 1 or True for each of ``num_ranks`` ranks that is there, 0 for a lost one; None: all are. Then
        ``num_replicas`` counts slots of lost ranks too, as ``old_map_LS`` does, where those may name any expert, or -1.

    Raises
    ------
    OptionError : shapes or numbers do not fit, or the ranks that are left have fewer slots than there are experts.
    PlacementError : the static map does not fit.
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
    active = _active(active_D, ranks)
    if ranks % nodes:
        nodes = 1
    cluster = None if settings.static_map is not None else settings.machine(nodes, ranks)
    if active is not None:
        return _of_the_rest(load, slots, groups, old_map_LS, active, cluster, settings)
    whole = _whole_groups(settings.strategy, groups, nodes, experts)
    old = usable_map(old_map_LS, layers, experts, slots)
    if old is None and active_D is not None and old_map_LS is not None and np.shape(old_map_LS) == (layers, slots):
        old = orphans_placed(np.array(old_map_LS).astype(np.int64), load, ranks)
    if settings.static_map is not None:
        given = settings.static_map.rows(layers, experts, slots, ranks)
        return Asked(load, slots, groups, 1, ranks, old, None, given, settings)
    assert cluster is not None
    if whole and (cluster.devices_per_node_N != ranks // nodes).any():
        raise OptionError(
            f"the engine has {nodes} nodes of {ranks // nodes} ranks, POISE_CLUSTER "
            f"{cluster.devices_per_node_N.tolist()}"
        )
    return Asked(load, slots, groups, nodes if whole else 1, ranks, old, cluster, None, settings)


def _whole_groups(strategy: str, groups: int, nodes: int, experts: int) -> bool:
    """Whether expert groups stay whole on nodes."""
    fits = nodes > 1 and groups % nodes == 0 and experts % groups == 0
    if strategy == "hierarchical" and not fits:
        raise OptionError(
            f"POISE_STRATEGY=hierarchical: {groups} groups of {experts} experts do not divide over {nodes} nodes",
            hint="POISE_STRATEGY=global, or auto",
        )
    return fits and strategy != "global"


def _active(active_D: NDArray[Any] | None, ranks: int) -> NDArray[np.bool_] | None:
    """Which ranks are left, None where all are."""
    if active_D is None:
        return None
    active = np.asarray(active_D)
    if active.shape != (ranks,) or not np.isin(active, (0, 1)).all():
        raise OptionError(f"active ranks must be {ranks} numbers of 0 and 1, got {active.tolist()}"[:300])
    if not active.any():
        raise OptionError(f"none of {ranks} ranks is active")
    return None if active.all() else active.astype(np.bool_)


def _of_the_rest(
    load_LE: NDArray[np.float64], slots: int, groups: int, old_map_LS: NDArray[Any] | None,
    active_D: NDArray[np.bool_], cluster: Cluster | None, settings: PolicySettings,
) -> Asked:  # fmt: skip
    """The call of the ranks that are left; the machine's nodes count where they have as many of these each."""
    layers, experts = load_LE.shape
    each, ranks = slots // active_D.size, int(active_D.sum())
    if ranks * each < experts:
        raise OptionError(f"{ranks * each} slots on the {ranks} ranks that are left for {experts} experts")
    old = None
    if old_map_LS is not None and np.shape(old_map_LS) == (layers, slots):
        held = np.array(old_map_LS).astype(np.int64)[:, np.repeat(active_D, each)]
        old = orphans_placed(held, load_LE, ranks)
    if cluster is None:
        if old is None:
            raise OptionError(
                f"the static map is for {active_D.size} ranks, {ranks} are left",
                hint="poise plan --survive makes a map for each loss; POISE_EPLB=1 without POISE_STATIC_MAP plans anew",
            )
        return Asked(load_LE, ranks * each, groups, 1, ranks, old, None, old, settings, active_D)
    rest = cluster.without(np.flatnonzero(~active_D).tolist())
    sizes = rest.devices_per_node_N
    even = bool((sizes == sizes[0]).all())
    nodes = rest.num_nodes if even and settings.strategy != "global" else 1
    whole = nodes > 1 and groups % nodes == 0 and experts % groups == 0
    return Asked(load_LE, ranks * each, groups, nodes if whole else 1, ranks, old, rest, None, settings, active_D)


def orphans_placed(held_LS: NDArray[np.int64], load_LE: NDArray[np.float64], ranks: int) -> NDArray[np.int64]:
    """The map with every expert in it, int64 [L, S].

    Those that no slot holds, the most loaded first, come into an empty slot, else in the place of a copy, of the expert
    whose copies have least to do, on the rank that has least.

    Parameters
    ----------
    held_LS : expert of each slot; what names none is empty. As many slots as experts at least.
    """
    experts, each = load_LE.shape[1], held_LS.shape[1] // ranks
    out = np.where((held_LS < 0) | (held_LS >= experts), EMPTY, held_LS)
    for row, load_E in zip(out, load_LE, strict=True):
        count_E = np.bincount(row[row >= 0], minlength=experts)
        orphans = np.flatnonzero(count_E == 0)
        for expert in orphans[np.argsort(-load_E[orphans], kind="stable")].tolist():
            _place(row, expert, load_E, count_E, each)
        for _ in range(int((row == EMPTY).sum())):  # engines have no empty slot on a rank that is there
            there_ED = np.zeros((experts, ranks), np.bool_)
            held = row >= 0
            there_ED[row[held], np.flatnonzero(held) // each] = True
            free_D = (~held).reshape(ranks, each).any(axis=1)
            full_E = there_ED[:, free_D].all(axis=1)  # a second copy on a rank saves nothing
            worth_E = np.where(full_E, -1.0, load_E / count_E)
            _place(row, int(np.argmax(worth_E)), load_E, count_E, each, empty=True)
    return out


def _place(
    row_S: NDArray[np.int64], expert: int, load_E: NDArray[np.float64], count_E: NDArray[np.int64], each: int,
    *, empty: bool = False,
) -> None:  # fmt: skip
    """One expert into the slot that suits best; counts are kept."""
    share_E = np.append(load_E / np.maximum(count_E, 1), 0.0)  # the last: an empty slot's
    rank_S = np.arange(row_S.size) // each
    work_D = np.bincount(rank_S, weights=share_E[row_S])
    free_S = row_S == EMPTY
    if not (empty or free_S.any()):
        free_S = count_E[row_S] > 1
    there_S = np.isin(rank_S, rank_S[row_S == expert])
    order = np.lexsort((np.arange(row_S.size), work_D[rank_S], share_E[row_S], there_S, ~free_S))
    slot = int(order[0])
    if row_S[slot] != EMPTY:
        count_E[row_S[slot]] -= 1
    row_S[slot] = expert
    count_E[expert] += 1


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
    for groups, nodes in ((2, 2), (1, 1)):  # few moves from a map start where groups lie whole in it
        rebalance(load[:, ::-1], 12, groups, nodes, 4, first, settings=quick)


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
