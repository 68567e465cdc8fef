"""The core behind the engine plugins: the arrays of an engine's load balancer in, poise's planner, arrays out.

Every rank of an engine runs its load balancer by itself on the same loads, and all of them must come to the same map.
So nothing here looks at a clock: the search is given a number of proposals, and the time limit is what they take on
one core.

Step 1  Experts of a node. Where the engine asks for it (expert groups that divide over nodes), groups stay whole, once
        on the nodes where the map in use has them, and once packed anew by load.
Step 2  Candidates, for either: the map in use; SwiftBalance from it, which moves little; simulated annealing, the start
        of poise's search that decides balance; the engine's own algorithm (EPLB). Empty slots get the least loaded
        expert that is not on the device. Devices that are interchangeable are numbered to fetch least.
Step 3  Layer by layer the cheapest, ``horizon * seconds of a step + seconds to fetch what moves``, on modelled seconds.
        The map in use costs no fetch: where nothing gains enough, it stays. A candidate with an expert twice on a rank
        is not taken where that can be avoided.
Step 4  Experts that stay on their rank keep their slot: engines move weights by slot.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cluster import Cluster
from poise.control.controller import aligned
from poise.cost.step import batch_cost
from poise.engines.plugins.static_map import StaticMap
from poise.engines.slots import full_table, trivial_row
from poise.errors import NoResultError, OptionError
from poise.modelspec import ModelSpec
from poise.observe.batch import RoutingBatch
from poise.planning.methods import swift_balance
from poise.planning.methods.eplb import balanced_packing, rebalance_experts
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.anneal import PROPOSALS, annealed
from poise.planning.solve.search import PROPOSALS_PER_SECOND

EXPERT_TOKENS = 512.0
"""Mean tokens of an expert in a step where none is named: what a step costs against what moves cost."""
LINEAR = 128.0
"""Such steps are priced by this many at a time, so that every expert is bound by arithmetic: tokens count."""
ROUNDING = 1e-9
GRAINS, SINGLE_GRAINS = 2.0**30, 2.0**16
"""Loads count in such shares of their layer's (those of single precision in coarser ones), so that the same loads give
the same map in any unit."""
MAX_SLOTS = 65_536


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """How a plugin plans; each field has an environment variable (:meth:`from_environment`).

    Parameters
    ----------
    cluster : POISE_CLUSTER, as ``--cluster``; default: nodes and ranks of the engine, h100.
    model : POISE_MODEL, as ``--model``; default: generic sizes.
    tokens_per_step : POISE_TOKENS_PER_STEP, tokens of one step over all ranks, with ``model`` only: loads are then
        priced as they are (in decode an expert costs its weights, however few its tokens). Default: tokens count.
    time_limit_s : POISE_TIME_LIMIT_S, seconds of one core that the search may take, counted in proposals.
    horizon_steps : POISE_HORIZON_STEPS, steps that a map is expected to serve.
    static_map : POISE_STATIC_MAP, a placement or an SGLang map that is returned whatever the load.
    seed : for the search.

    Raises
    ------
    OptionError : a number is out of range.
    """

    cluster: Cluster | None = None
    model: ModelSpec | None = None
    tokens_per_step: int | None = None
    time_limit_s: float = 0.5
    horizon_steps: float = 1000.0
    static_map: StaticMap | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("time_limit_s", "horizon_steps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise OptionError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.tokens_per_step is not None and (self.tokens_per_step < 1 or self.model is None):
            raise OptionError(
                f"tokens_per_step is {self.tokens_per_step}, model {'named' if self.model else 'not named'}",
                hint="at least 1, together with a model",
            )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> PolicySettings:
        """Settings from ``POISE_*`` variables; an empty one counts as not set.

        Raises
        ------
        InputError : a variable cannot be read; a static map, cluster or model file too.
        """

        def number(name: str, default: float | None) -> Any:
            text = environ.get(name, "").strip()
            try:
                return float(text) if text else default
            except ValueError:
                raise OptionError(f"{name} must be a number, got {text[:40]!r}") from None

        def named(name: str) -> str | None:
            return environ.get(name, "").strip() or None

        cluster, model, static = named("POISE_CLUSTER"), named("POISE_MODEL"), named("POISE_STATIC_MAP")
        tokens = number("POISE_TOKENS_PER_STEP", None)
        if tokens is not None and tokens != int(tokens):
            raise OptionError(f"POISE_TOKENS_PER_STEP must be a whole number, got {tokens}")
        spec = None if model is None else ModelSpec.parse(model)
        return cls(
            None if cluster is None else Cluster.parse(cluster),
            spec,
            None if tokens is None else int(tokens),
            number("POISE_TIME_LIMIT_S", DEFAULT.time_limit_s),
            number("POISE_HORIZON_STEPS", DEFAULT.horizon_steps),
            None if static is None else StaticMap.read(Path(static), spec),
        )

    def machine(self, num_nodes: int, num_ranks: int) -> Cluster:
        """The cluster, which must have the engine's ranks."""
        if self.cluster is None:
            return Cluster.uniform(num_nodes, num_ranks // num_nodes)
        if self.cluster.num_devices != num_ranks:
            raise OptionError(f"POISE_CLUSTER has {self.cluster.num_devices} devices, the engine {num_ranks} ranks")
        return self.cluster


DEFAULT = PolicySettings()


def switched_on(environ: Mapping[str, str]) -> bool:
    """POISE_EPLB is set, and not to 0."""
    return environ.get("POISE_EPLB", "").strip().lower() not in ("", "0", "false", "off")


def rebalance(
    weight_LE: NDArray[Any],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_ranks: int,
    old_map_LS: NDArray[Any] | None = None,
    *,
    settings: PolicySettings = DEFAULT,
    single: bool = False,
) -> NDArray[np.int64]:
    """Expert of each slot, int64 [L, S]: every expert at least once; the same for the same input on any rank.

    Parameters
    ----------
    weight_LE : [L, E], load of each expert; a layer without load keeps its row.
    num_replicas : S, slots in all; slot s lies on rank s // (S / num_ranks).
    num_groups : expert groups that a node should hold whole; groups that do not divide over nodes are ignored.
    num_nodes, num_ranks : of the engine.
    old_map_LS : the map in use; one that is no valid map of these shapes counts as none.
    settings : :class:`PolicySettings`.
    single : the engine counts in floating point of single precision or less.

    Raises
    ------
    OptionError : shapes or numbers do not fit. PlacementError : the static map does not fit.
    NoResultError : what was planned is no valid map.
    """
    load = np.array(weight_LE, dtype=np.float64)
    if load.ndim != 2 or load.size == 0 or not (np.isfinite(load).all() and load.min() >= 0):
        raise OptionError(f"loads must be [layers, experts], finite and at least 0, got shape {load.shape}")
    load = _in_grains(load, SINGLE_GRAINS if single else GRAINS)
    layers, experts = load.shape
    if num_ranks < 1 or num_replicas % num_ranks or not experts <= num_replicas <= MAX_SLOTS:
        raise OptionError(f"{num_replicas} slots for {experts} experts on {num_ranks} ranks: they must divide and hold")
    if num_nodes < 1 or num_ranks % num_nodes:
        num_nodes = 1
    if settings.static_map is not None:
        return settings.static_map.rows(layers, experts, num_replicas, num_ranks)
    old = usable_map(old_map_LS, layers, experts, num_replicas)
    base = np.tile(trivial_row(experts, num_replicas).astype(np.int64), (layers, 1)) if old is None else old
    busy = np.flatnonzero(load.sum(axis=1) > 0)
    if num_ranks == 1 or busy.size == 0:
        return base
    hierarchical = num_nodes > 1 and num_groups % num_nodes == 0 and experts % num_groups == 0
    shape = _Shape(num_groups, num_nodes, num_ranks) if hierarchical else _Shape(1, 1, num_ranks)
    cluster = settings.machine(num_nodes, num_ranks)
    if hierarchical and (cluster.devices_per_node_N != num_ranks // num_nodes).any():
        raise OptionError(
            f"the engine has {num_nodes} nodes of {num_ranks // num_nodes} ranks, POISE_CLUSTER "
            f"{cluster.devices_per_node_N.tolist()}"
        )
    out = base.copy()
    out[busy] = _plan(load[busy], base[busy], old is not None, shape, cluster, settings)
    if usable_map(out, layers, experts, num_replicas) is None:
        raise NoResultError("the planned map lacks an expert")
    return out


def _in_grains(load_LE: NDArray[np.float64], grains: float) -> NDArray[np.float64]:
    """Loads as whole shares of their layer's, so that rounding in the engine's units decides nothing."""
    share_LE = load_LE / np.maximum(load_LE.max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    total_L1 = share_LE.sum(axis=1, keepdims=True)
    return np.rint(share_LE * (grains / np.where(total_L1 > 0, total_L1, 1.0)))


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


def logical_maps(map_LS: NDArray[np.int64], num_experts: int, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Slots of each expert, int64 [L, E, width], padded with -1, and how many they are, int64 [L, E]."""
    layers, slots = map_LS.shape
    order = np.argsort(map_LS, axis=1, kind="stable")
    expert = np.take_along_axis(map_LS, order, axis=1)
    row = np.arange(layers)[:, None]
    count = np.zeros((layers, num_experts), np.int64)
    np.add.at(count, (row, map_LS), 1)
    first = np.cumsum(count, axis=1) - count
    out = np.full((layers, num_experts, width), -1, np.int64)
    out[row, expert, np.arange(slots) - np.take_along_axis(first, expert, axis=1)] = order
    return out, count


def warn_once(log: logging.Logger, text: str) -> None:
    """A warning, once a process for the same text."""
    if text not in _said:
        _said.add(text)
        log.warning(text)


_said: set[str] = set()


@dataclass(frozen=True, slots=True)
class _Shape:
    """Groups, nodes that hold groups whole (1: none does), ranks."""

    groups: int
    nodes: int
    ranks: int


def _plan(
    load_LE: NDArray[np.float64], base_LS: NDArray[np.int64], known: bool, shape: _Shape, cluster: Cluster,
    settings: PolicySettings,
) -> NDArray[np.int64]:  # fmt: skip
    """Steps 1 to 4 for layers with load; ``known``: the base is the map in use."""
    layers, experts = load_LE.shape
    model = settings.model or ModelSpec.generic(experts, 1, np.arange(layers))
    pairs, steps = EXPERT_TOKENS * experts * LINEAR, settings.horizon_steps / LINEAR
    if settings.tokens_per_step is not None:
        pairs, steps = float(settings.tokens_per_step * model.top_k), settings.horizon_steps
    problem = _problem(load_LE * (pairs / load_LE.sum(axis=1))[:, None], cluster, model, base_LS.shape[1])
    found = [base_LS, *_candidates(problem, base_LS, known, shape, settings)]
    slots = base_LS.shape[1]
    maps, _, _ = rebalance_experts(load_LE, slots, shape.groups, shape.nodes, shape.ranks)
    found.append(maps)
    if known:  # step 4
        before = _placement(base_LS, problem)
        found[1:] = [
            _same_slots(base_LS, aligned(before, _placement(table, problem), cluster, whole=False))
            for table in found[1:]
        ]
    score = np.stack([_score_L(problem, table, base_LS, known, steps) for table in found])
    for row, table in zip(score[1:], found[1:], strict=True):
        if slots // shape.ranks <= experts:
            row[(_placement(table, problem).count_LED() > 1).any(axis=(1, 2))] = np.inf
    best = np.argmin(score, axis=0)
    best[score.min(axis=0) >= score[0] * (1 - ROUNDING)] = 0
    return np.stack(found)[best, np.arange(layers)]


def _problem(load_LE: NDArray[np.float64], cluster: Cluster, model: ModelSpec, slots: int) -> PlacementProblem:
    layers, devices = len(load_LE), cluster.num_devices
    batch = RoutingBatch(load_LE[None].copy(), np.ones(1), model.top_k, np.arange(layers, dtype=np.int32))
    return PlacementProblem(batch, cluster, model, np.full(devices, slots // devices))


def _placement(table_LS: NDArray[Any], problem: PlacementProblem) -> Placement:
    devices = problem.num_devices
    device_S = np.repeat(np.arange(devices, dtype=np.int32), table_LS.shape[1] // devices)
    return Placement(table_LS.astype(np.int32), device_S, problem.batch.num_experts, devices)


def _candidates(
    problem: PlacementProblem, base_LS: NDArray[np.int64], known: bool, shape: _Shape, settings: PolicySettings
) -> list[NDArray[np.int64]]:
    """SwiftBalance from the base (if known) and annealing, node by node, [L, S] each."""
    load = problem.batch.load_LE()
    packed_LNX = _packed(load, shape)
    kept_LNX, whole_L = _kept(base_LS, packed_LNX, shape)
    groupings = [packed_LNX]
    if known and not np.array_equal(kept_LNX, packed_LNX):
        groupings.insert(0, kept_LNX)
    proposals = settings.time_limit_s * PROPOSALS_PER_SECOND / len(groupings)
    out = [_by_node(problem, base_LS, grouping, settings, shape, proposals=proposals) for grouping in groupings]
    if known:
        out.insert(0, _by_node(problem, base_LS, kept_LNX, settings, shape, whole_L=whole_L))
    return out


def _by_node(
    problem: PlacementProblem, base_LS: NDArray[np.int64], expert_LNX: NDArray[np.int64], settings: PolicySettings,
    shape: _Shape, *, proposals: float = 0.0, whole_L: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:  # fmt: skip
    """A map, int64 [L, S], in which every node holds its ``expert_LNX``.

    Annealed; or, given the layers in which the base holds them so, moved to from the base.
    """
    load = problem.batch.load_LE()
    layers, nodes, each = expert_LNX.shape
    slots, ranks = base_LS.shape[1] // nodes, shape.ranks // nodes
    out = np.empty_like(base_LS)
    setting = swift_balance.SwiftBalanceSetting(share="even", max_transfers=slots // ranks)
    each_layer = max(1, int(min(PROPOSALS, proposals / (layers * nodes))))
    for node in range(nodes):
        ids_LX, here = expert_LNX[:, node], slice(node * slots, (node + 1) * slots)
        part = _problem(
            np.take_along_axis(load, ids_LX, axis=1),
            problem.cluster if nodes == 1 else _one_node(problem.cluster, node),
            replace(problem.model, num_experts=each, top_k=min(problem.model.top_k, each)), slots,
        )  # fmt: skip
        if whole_L is not None:
            local_LE = np.zeros(load.shape, np.int64)
            np.put_along_axis(local_LE, ids_LX, np.broadcast_to(np.arange(each), ids_LX.shape), axis=1)
            base = np.tile(trivial_row(each, slots).astype(np.int64), (layers, 1))
            base[whole_L] = np.take_along_axis(local_LE, base_LS[:, here], axis=1)[whole_L]
            part = replace(part, current=_placement(base, part))
            made = swift_balance.plan(part, time_limit_s=settings.time_limit_s, setting=setting).placement
        else:
            made = annealed(part, proposals=each_layer, seed=settings.seed)
        full, _ = full_table(made, engine="the engine", price_LE=part.batch.load_LE())
        out[:, here] = np.take_along_axis(ids_LX, full.astype(np.int64), axis=1)
    return out


def _one_node(cluster: Cluster, node: int) -> Cluster:
    mine = cluster.node_D == node
    return replace(cluster, node_D=np.zeros(int(mine.sum()), np.int32), speed_D=cluster.speed_D[mine])


def _packed(load_LE: NDArray[np.float64], shape: _Shape) -> NDArray[np.int64]:
    """Experts of each node, int64 [L, N, E / N]: groups packed by load."""
    layers, experts = load_LE.shape
    size = experts // shape.groups
    node_LG, _ = balanced_packing(load_LE.reshape(layers, shape.groups, size).sum(axis=2), shape.nodes)
    return _experts_of(node_LG, size, shape.nodes)


def _kept(
    base_LS: NDArray[np.int64], packed_LNX: NDArray[np.int64], shape: _Shape
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The same with groups on the nodes that hold them in the base, and in which layers these hold them whole."""
    layers, slots = base_LS.shape
    size = packed_LNX[0].size // shape.groups
    held_LGN = np.zeros((layers, shape.groups, shape.nodes), np.bool_)
    held_LGN[np.arange(layers)[:, None], base_LS // size, np.arange(slots) // (slots // shape.nodes)] = True
    whole_L = (held_LGN.sum(axis=2) == 1).all(axis=1)
    whole_L &= (held_LGN.sum(axis=1) == shape.groups // shape.nodes).all(axis=1)
    out = packed_LNX.copy()
    out[whole_L] = _experts_of(held_LGN.argmax(axis=2)[whole_L], size, shape.nodes)
    return out, whole_L


def _experts_of(node_LG: NDArray[np.int64], size: int, nodes: int) -> NDArray[np.int64]:
    node_LE = np.repeat(node_LG, size, axis=1)
    return np.argsort(node_LE, axis=1, kind="stable").reshape(len(node_LG), nodes, node_LE.shape[1] // nodes)


def _same_slots(base_LS: NDArray[np.int64], after: Placement) -> NDArray[np.int64]:
    """Step 4: the table of ``after`` with every expert that stays on its rank in the slot it has."""
    per_rank = after.num_slots // after.num_devices
    out = np.empty_like(base_LS)
    for layer, count_ED in enumerate(after.count_LED()):
        for device, want_E in enumerate(count_ED.T.copy()):
            first = device * per_rank
            row = out[layer, first : first + per_rank]
            open_slots = []
            for slot, expert in enumerate(base_LS[layer, first : first + per_rank].tolist()):
                if want_E[expert] > 0:
                    row[slot] = expert
                    want_E[expert] -= 1
                else:
                    open_slots.append(slot)
            row[open_slots] = np.repeat(np.arange(want_E.size), want_E)
    return out


def _score_L(
    problem: PlacementProblem, table_LS: NDArray[np.int64], base_LS: NDArray[np.int64], known: bool, steps: float
) -> NDArray[np.float64]:
    """Step 3: seconds of so many steps, and of the moves before them, float64 [L]."""
    cluster, model = problem.cluster, problem.model
    count = _placement(table_LS, problem).count_LED()
    cost = batch_cost(problem.batch, count, cluster, model, traffic="home", split="even")
    seconds = steps * cost.seconds_BL[0]
    if known:
        fetched_LED = (count > 0) & (_placement(base_LS, problem).count_LED() == 0)
        seconds += fetched_LED.sum(axis=1).max(axis=1) * model.expert_bytes / cluster.inter_bytes_per_s
    return seconds
