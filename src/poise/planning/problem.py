"""PlacementProblem and Solution: the mathematics.

Sets
    b in B scenarios (steps drawn from the fitted traffic, weight w[b]), l in L MoE layers, e in E experts,
    d in D devices with slots[d] slots a layer.
Decision
    count[l, e, d] = slots of expert e on device d in layer l (0 or 1; published methods may put 2).
Split (recourse; after the placement, per scenario and layer)
    n[b, l, e, d] = tokens of e computed on d. ``even``: load[b, l, e] * count[l, e, d] / sum_d count[l, e, d],
    the expectation of an engine that picks a replica at random. ``near``: those of a source device that holds e stay
    there, else those of its node go evenly to the node's slots, else to all (:mod:`poise.cost.near`). ``exact``:
    integer, minimising the largest n / speed over devices.
Objective (seconds; DESIGN 3.1)
    sum_b w[b] * mean_l ( dispatch + max_d compute(d) + combine + kv )
    compute(d) = start + 1 / speed[d] * sum_e (max(n * compute, min(n, 1) * read) + n * activations): the constants of a
    measured kernel, or read and compute alone of a datasheet (poise.cost.compute)
    dispatch, combine = start + max over ports of bytes / bandwidth under a traffic model (poise.cost.traffic)
Subject to
    every expert has a slot in every layer; a device holds at most slots[d] experts in every layer, or, ``pooled``,
    at most L * slots[d] over all layers (MoETuner's memory constraint). Engines know no empty slot: unless the rules
    are ``none``, every slot holds an expert, and none lies twice on a device (:mod:`poise.planning.engine_rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds
from poise.cost.entries import HeldEntries, SlotCounts, entries_of, picked_layers
from poise.cost.pricing import Pricing
from poise.cost.split import SPLITS, Split, check_split
from poise.cost.traffic import DATA_FLOWS, DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import settle
from poise.planning.engine_rules import ANY, NONE, EngineRules
from poise.planning.groups import WholeGroups
from poise.planning.losses import Losses
from poise.planning.placement import Placement
from poise.routing.batch import RoutingBatch
from poise.util.errors import NoResultError, OptionError, PlacementError
from poise.util.notebook import lines_html, table_html
from poise.util.words import percent

Risk = Literal["mean", "worst", "cvar"]
RISKS: tuple[Risk, ...] = ("mean", "worst", "cvar")
CVAR_TAIL = 0.25
"""Weight of the scenarios that ``cvar`` averages over."""
Progress = Callable[[str, float], None]
"""Called by long work with a stage and the share of it done, 0 to 1."""


@dataclass(frozen=True, slots=True, eq=False)
class PlacementProblem:
    """Traffic, machine, model and memory: everything a method may look at. Notation: module docstring.

    Parameters
    ----------
    batch : the fitted traffic; its steps are the scenarios.
    cluster, model : the machine and the model's sizes; constants that the cluster leaves open are settled for this
        model and batch (:func:`poise.machine.settle.settle`).
    slots_D : int [D], slots of each device in every layer.
    traffic : traffic model (load-only batches know only ``home``).
    split : how tokens of a replicated expert are split.
    pooled : slots are counted over all layers together instead of layer by layer.
    current : the placement in use, which methods with bounded moves start from, and moves are priced against. For more
        or fewer devices too: device d of it is device d here (:mod:`poise.planning.elastic`).
    migration_steps : steps over which ``poise`` writes off the fetches from ``current``; 0: moving is free.
    risk : what ``poise`` minimises over scenarios: their ``mean``, the ``worst`` one, or ``cvar``, the mean of the
        worst quarter.
    engine : what the engine can hold (:mod:`poise.planning.engine_rules`). No engine counts slots over all layers
        together: a ``pooled`` problem has the rules ``none``.
    whole : routing groups that lie whole (:mod:`poise.planning.groups`); None: they need not. Under an engine that
        takes new expert ids, those of a model with routing groups always do. Groups that only may lie whole need not
        fit.

    Raises
    ------
    OptionError : the engine cannot have these slots, slots do not hold the experts, or not with groups whole, the
        traffic model needs tokens that the batch has not, or the split knows no sources under it.
    """

    batch: RoutingBatch
    cluster: Cluster
    model: ModelSpec
    slots_D: NDArray[np.int64]
    traffic: DataFlow = "home"
    split: Split = "even"
    pooled: bool = False
    current: Placement | None = None
    migration_steps: float = 0.0
    risk: Risk = "mean"
    engine: EngineRules = ANY
    whole: WholeGroups | None = None

    def __post_init__(self) -> None:
        slots = np.array(self.slots_D, dtype=np.int64)
        experts, devices = self.batch.num_experts, self.cluster.num_devices
        if slots.shape != (devices,) or slots.min() < 0:
            raise OptionError(f"slots_D must be {devices} counts of at least 0, got {slots.tolist()[:8]}")
        if slots.sum() < experts:
            raise OptionError(
                f"{slots.sum()} slots on {devices} devices cannot hold {experts} experts",
                hint=f"give at least {-(-experts // devices)} slots a device",
            )
        if not self.pooled and np.minimum(slots, experts).sum() < experts:
            raise OptionError(f"slots {slots.tolist()[:8]} hold fewer than {experts} different experts")
        if self.pooled and self.engine not in (ANY, NONE):
            raise OptionError(
                f"slots counted over all layers together, which {self.engine.name} cannot hold", hint="--engine none"
            )
        if self.pooled:
            object.__setattr__(self, "engine", NONE)
        self.engine.check_slots(slots, experts)
        if self.engine.ids and self.model.num_expert_groups > 1 and (self.whole is None or self.whole.where != "ids"):
            object.__setattr__(self, "whole", self._groups_in_ids())
        if self.whole is not None:
            self._check_groups(self.whole, slots)
        if self.traffic not in DATA_FLOWS:
            raise OptionError(f"unknown traffic model {self.traffic!r}", hint=f"one of {', '.join(DATA_FLOWS)}")
        if self.split not in SPLITS:
            raise OptionError(f"unknown split {self.split!r}", hint=f"one of {', '.join(SPLITS)}")
        check_split(self.split, self.traffic)
        if self.traffic != "home" and not self.batch.has_tokens:
            raise OptionError(
                f"traffic model {self.traffic!r} needs token-level routing, got loads only", hint="use --traffic home"
            )
        if self.risk not in RISKS:
            raise OptionError(f"unknown risk {self.risk!r}", hint=f"one of {', '.join(RISKS)}")
        if not 0 <= self.migration_steps < np.inf:
            raise OptionError(f"migration steps must be at least 0 and finite, got {self.migration_steps}")
        self.model.matches(num_experts=experts, layer_ids=self.batch.layer_ids_L)
        if self.current is not None:
            have, want = (self.current.num_layers, self.current.num_experts), (self.batch.num_layers, experts)
            if have != want:
                raise OptionError(f"the current placement has [layers, experts] {have}, the problem {want}")
        machine = settle(self.cluster, self.model, self.batch.mean_tokens(), engine=self.engine.kernels)
        object.__setattr__(self, "cluster", machine)
        slots.flags.writeable = False
        object.__setattr__(self, "slots_D", slots)

    def _groups_in_ids(self) -> WholeGroups:
        """What an engine that takes new expert ids asks for."""
        if self.whole is not None:
            raise OptionError(
                f"{self.engine.name} takes new expert ids, which keep groups whole in blocks of ids, not on nodes",
                hint="leave --keep-groups out",
            )
        return WholeGroups.in_ids(self.batch.num_experts, self.model.num_expert_groups, self.num_devices)

    def _check_groups(self, whole: WholeGroups, slots_D: NDArray[np.int64]) -> None:
        if self.pooled:
            raise OptionError("groups are kept whole layer by layer, not with slots over all layers together")
        have, want = (whole.num_experts, len(whole.place_D)), (self.batch.num_experts, self.num_devices)
        if have != want:
            raise OptionError(f"groups of [experts, devices] {have}, the problem has {want}")
        if whole.must:
            whole.room(slots_D, filled=not self.engine.empty_slots)

    @property
    def place_D(self) -> NDArray[np.int64]:
        """Place of each device that a group must not leave, int64 [D]: all are one where none has to be whole."""
        free = self.whole is None or not self.whole.must
        return np.zeros(self.num_devices, np.int64) if free or self.whole is None else self.whole.place_D

    @property
    def pricing(self) -> Pricing:
        """What prices a step."""
        return Pricing(self.cluster, self.model, self.traffic, self.split)

    def work_LE(self) -> NDArray[np.float64]:
        """Seconds of each expert at speed 1, mean of the steps, float64 [L, E]."""
        work_BLE = expert_seconds(self.batch.load_BLE, self.cluster, self.model)
        return np.asarray(np.einsum("b,ble->le", self.batch.weight_B, work_BLE))

    def seconds_L(self, counts: SlotCounts) -> NDArray[np.float64]:
        """Seconds of each layer under a placement, mean of the steps, float64 [L]."""
        return np.asarray(self.batch.weight_B @ self.pricing.cost(self.batch, counts).seconds_BL)

    def fastest_layers(self, options: Sequence[SlotCounts]) -> HeldEntries:
        """Each layer from the option that is fastest there."""
        held = [entries_of(option) for option in options]
        return picked_layers(held, np.stack([self.seconds_L(each) for each in held]).argmin(axis=0))

    def tokens_for(self, method: str) -> NDArray[np.int16]:
        """Experts of every token, int16 [T, L, K], for a method that cannot plan without.

        Raises
        ------
        NoResultError : the batch has loads only.
        """
        if self.batch.experts_TLK is None:
            raise NoResultError(f"{method} needs token-level routing, got loads only",
                                hint="give a routing trace, not a load profile")  # fmt: skip
        return self.batch.experts_TLK

    def risk_seconds(self, seconds_B: NDArray[np.float64]) -> float:
        """Mean, worst, or mean of the worst quarter (by weight) of scenario times, float64 [B]."""
        weight = self.batch.weight_B
        if self.risk == "mean":
            return float(weight @ seconds_B)
        if self.risk == "worst":
            return float(seconds_B[weight > 0].max())
        order = np.argsort(-seconds_B)
        taken = np.diff(np.minimum(np.cumsum(weight[order]), CVAR_TAIL), prepend=0.0)
        return float(taken @ seconds_B[order] / taken.sum())

    def migration_seconds(self, placement: Placement) -> float:
        """Seconds a step and layer that moving to ``placement`` costs: fetches of the fullest device over the steps."""
        if self.current is None or self.migration_steps <= 0:
            return 0.0
        fetched = float(self.current.diff(placement).fetched_D.max())
        return (
            fetched
            * self.model.expert_bytes
            / self.cluster.slowest_bytes_per_s
            / self.migration_steps
            / self.batch.num_layers
        )

    @property
    def num_devices(self) -> int:
        """D."""
        return self.cluster.num_devices

    @property
    def spare_slots(self) -> int:
        """Slots beyond one per expert that one layer can have."""
        beyond = int(self.slots_D.sum()) - self.batch.num_experts
        return beyond * self.batch.num_layers if self.pooled else beyond

    @property
    def layer_slots_D(self) -> NDArray[np.int64]:
        """Most experts a device can hold in one layer, int [D]."""
        most = self.slots_D * self.batch.num_layers if self.pooled else self.slots_D
        return np.minimum(most, self.batch.num_experts)

    def placed(self, held: SlotCounts, method: str) -> Placement:
        """A method's placement, from the slots of each expert on each device ([L, E, D], or what is not 0 of it), in
        the slots of this problem; where those are pooled, a device has as many as its fullest layer needs.
        """
        slots_D = None if self.pooled else self.slots_D
        return Placement.from_entries(
            entries_of(held), slots_D=slots_D, layer_ids_L=self.batch.layer_ids_L, method=method
        )

    def check(self, placement: Placement) -> None:
        """Raise PlacementError unless the placement fits this problem's shapes and slots."""
        want = (self.batch.num_layers, self.batch.num_experts, self.num_devices)
        have = (placement.num_layers, placement.num_experts, placement.num_devices)
        if want != have:
            raise PlacementError(f"placement has [layers, experts, devices] {have}, the problem {want}")
        used_LD = placement.entries().used_LD()
        used, room = used_LD.max(axis=0), self.slots_D
        if self.pooled:
            used, room = used_LD.sum(axis=0), self.slots_D * want[0]
        if (used > room).any():
            d = int(np.argmax(used - room))
            raise PlacementError(f"device {d} holds {used[d]} experts in {room[d]} slots")

    def keeps_groups(self, placement: Placement) -> bool:
        """Whether every group that must lie whole does."""
        return not self._torn(placement).size

    def check_groups(self, placement: Placement) -> None:
        """Raise PlacementError if a group that must lie whole does not."""
        torn = self._torn(placement)
        if torn.size:
            assert self.whole is not None
            raise PlacementError(
                f"layer {placement.layer_ids_L[torn[0, 0]]}: routing group {torn[0, 1]} lies in several places, and "
                f"{len(torn)} of {placement.num_layers * self.whole.num_groups} groups of all layers do"
            )

    def _torn(self, placement: Placement) -> NDArray[np.int64]:
        """Layer and group of those that must lie whole and do not, int64 [n, 2]."""
        if self.whole is None or not self.whole.must:
            return np.empty((0, 2), np.int64)
        return np.argwhere(self.whole.torn_LG(placement.count_LED()))


@dataclass(frozen=True, slots=True)
class MethodResult:
    """What a method returns: a placement and what it wants to say about it (JSON values, e.g. its own bounds)."""

    placement: Placement
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Method:
    """A static method.

    Parameters
    ----------
    plan : called as ``plan(problem, time_limit_s=..., seed=..., progress=...)``; gives a MethodResult.
    summary : one line on it.
    pooled : its memory is counted over all layers together.
    fitted : it looks at traffic.
    """

    plan: Callable[..., MethodResult]
    summary: str
    pooled: bool = False
    fitted: bool = True


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the objective, seconds per layer and step: its value and a lower bound no plan can beat."""

    seconds: float
    lower_bound: float


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A placement, re-evaluated by code that shares nothing with the search, with bounds.

    Parameters
    ----------
    placement, method : what was found, by whom.
    terms : ``compute``, ``dispatch``, ``combine``, ``kv``: mean seconds per layer and step, and their bounds.
    imbalance : mean over scenarios and layers of max / mean tokens (in-sample).
    seconds : planning time.
    details : what the method says about itself.
    joint_bound : seconds per layer and step no placement can beat, all terms together
        (:mod:`poise.planning.solve.joint`); 0 where none was looked for.
    losses : what was made beforehand for losses of devices or nodes, where that was asked for.
    """

    placement: Placement
    method: str
    terms: dict[str, Term]
    imbalance: float
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    joint_bound: float = 0.0
    losses: Losses | None = None

    @property
    def objective(self) -> float:
        """Expected seconds per layer and step."""
        return sum(term.seconds for term in self.terms.values())

    @property
    def lower_bound(self) -> float:
        """Seconds per layer and step no placement can beat: the bounds of all terms, or the joint one if it is more."""
        return max(sum(term.lower_bound for term in self.terms.values()), self.joint_bound)

    @property
    def gap(self) -> float:
        """(objective - lower_bound) / objective."""
        return (self.objective - self.lower_bound) / self.objective if self.objective > 0 else 0.0

    def __repr__(self) -> str:
        terms = ", ".join(f"{name} {1e6 * t.seconds:.1f}" for name, t in self.terms.items() if t.seconds > 0)
        return (
            f"Solution({self.method}: {1e6 * self.objective:.1f} us a layer ({terms}), gap {percent(self.gap)}, "
            f"imbalance {self.imbalance:.3f}, {self.seconds:.2f} s)"
        )

    def _repr_html_(self) -> str:
        """For notebooks: each term beside its bound."""
        named = [(name, term.seconds, term.lower_bound) for name, term in self.terms.items() if term.seconds > 0]
        rows = [
            [name, f"{1e6 * seconds:.2f}", f"{1e6 * bound:.2f}", percent(1 - bound / seconds if seconds else 0.0)]
            for name, seconds, bound in (*named, ("all", self.objective, self.lower_bound))
        ]
        said = f"imbalance {self.imbalance:.3f} (max / mean tokens, in-sample), planned in {self.seconds:.2f} s"
        caption = f"{self.method}: modelled time of one MoE layer and step"
        return table_html(caption, ("term", "us", "lower bound us", "gap"), rows) + lines_html(
            [said, repr(self.placement)]
        )


def equal_sizes(num_experts: int, slots_D: NDArray[Any]) -> NDArray[np.int64]:
    """Experts of each device in every layer, int [D]: as equal as slots allow, the first devices get the rest."""
    sizes = np.zeros(len(slots_D), np.int64)
    for _ in range(num_experts):
        fits = np.flatnonzero(sizes < slots_D)
        sizes[fits[np.argmin(sizes[fits])]] += 1
    return sizes


def deal_slots(num_experts: int, redundant: int, num_devices: int) -> NDArray[np.int64]:
    """E + R slots over D devices, as evenly as possible, int64 [D].

    Raises
    ------
    OptionError : R is negative, or there are more slots than experts on every device.
    """
    if redundant < 0:
        raise OptionError(f"redundant slots must be at least 0, got {redundant}")
    if num_experts + redundant > num_experts * num_devices:
        raise OptionError(
            f"{redundant} redundant slots: {num_devices} devices can use at most {num_experts * (num_devices - 1)}"
        )
    slots = np.full(num_devices, (num_experts + redundant) // num_devices, np.int64)
    slots[: (num_experts + redundant) % num_devices] += 1
    return slots
