"""StepPlan, what a policy may look at, and the protocol that every policy follows.

One layer of one step goes like this, on every rank alike (same inputs, same plan):

1. before the gate, a policy chooses the holders of this step from *predicted* loads: ``before_gate``. What a device
   does not hold yet is fetched while attention runs (:attr:`StepPrice.window_s`).
2. the gate gives the exact loads. ``after_gate`` may add holders (fetched in full sight) and splits the tokens.
3. holders beyond the static placement are freed at the end of the step, unless the policy ``keeps`` them (in training:
   ``keeps_in_training``): then they fill ``step_slots`` slots of *this* layer for good, where the others share one
   buffer among all layers.
4. in serving, a policy that keeps may also ask for replicas ``in_background``: they are fetched in the windows of this
   and the following steps, so that nothing is exposed, and serve once they are whole. One batch a layer at a time.
   In training nothing comes in the background: the optimizer changes every weight in every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import StepPrice
from poise.util.errors import PlacementError

MAX_ROWS = 2**25
"""Most entries of ``rows_SED`` (0.3 GB): beyond, methods with a dispatch rule of their own pass quotas only."""


@dataclass(frozen=True, slots=True, eq=False)
class Foreseen:
    """What a record of the same tokens says of a layer's step before it runs.

    Parameters
    ----------
    load_SE : int64 [D, E], tokens of each expert from each source device.
    replayed : the router's choice is replaced by the record, so that these will be the loads; else a forecast.
    """

    load_SE: NDArray[np.int64]
    replayed: bool


class Looks(NamedTuple):
    """When a planner that runs beside the steps looks at a layer's loads.

    Parameters
    ----------
    every : steps between two looks, once as many have run.
    soonest : steps between two looks until then.
    late : steps from a look to what it found being in force.
    """

    every: int
    soonest: int
    late: int


@dataclass(frozen=True, slots=True, eq=False)
class LayerView:
    """What is known of a layer when a step begins.

    Parameters
    ----------
    static_ED : bool [E, D], the slow loop's placement, redundant slots included.
    before_ED : bool [E, D], holders when the step begins: the static ones and what the policy kept.
    predicted_E : float64 [E], predicted tokens of this step; sums to the step's (token, expert) pairs.
    recent_HE : float64 [H, E], exact tokens of the last H steps, the newest last; H may be 0.
    coming_ED : bool [E, D], replicas on their way in the background; their slots are taken.
    step_slots : M, slots a device beyond the static ones.
    step, layer : numbers from 0.
    price : machine, model, window and control time.
    foreseen : loads that a record tells before the gate, or None; ``predicted_E`` is then their sum over sources.
    seen_HE : float64 [H, E], the newest loads that were known when the look in force began, of a policy that plans
        beside the steps (:meth:`StepPolicy.plans_beside`); H is 0 before its first. None: as ``recent_HE``.
    settled : no holder has come or gone since that look began.
    """

    static_ED: NDArray[np.bool_]
    before_ED: NDArray[np.bool_]
    predicted_E: NDArray[np.float64]
    recent_HE: NDArray[np.float64]
    coming_ED: NDArray[np.bool_]
    step_slots: int
    step: int
    layer: int
    price: StepPrice
    foreseen: Foreseen | None = None
    seen_HE: NDArray[np.float64] | None = None
    settled: bool = True

    @property
    def slots_D(self) -> NDArray[np.int64]:
        """Most experts a device may hold in this step, int [D]."""
        return self.static_ED.sum(axis=0) + self.step_slots

    @property
    def owner_E(self) -> NDArray[np.int64]:
        """One static holder of each expert, the first, int [E]."""
        return self.static_ED.argmax(axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """Holders and token split of one layer in one step. Arrays are read-only.

    Parameters
    ----------
    holders_ED : bool [E, D], who holds which expert while the experts run.
    quota_ED : int64 [E, D], tokens of each expert on each device; sums to the expert's tokens.
    rows_SED : int64 [D, E, D] or None: tokens from each source. None: own device, own node, remote
        (:func:`poise.cost.route.locality_rows`).
    passive : no counts were exchanged. Without rows the engine's even split over the static placement was left alone;
        with rows each source's depend on its own tokens only, or on what was known of all before the gate.
    """

    holders_ED: NDArray[np.bool_]
    quota_ED: NDArray[np.int64]
    rows_SED: NDArray[np.int64] | None = None
    passive: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("holders_ED", "quota_ED", "rows_SED"):
            array = getattr(self, name)
            if array is not None:
                array.flags.writeable = False

    def check(self, view: LayerView, load_SE: NDArray[np.int64], *, unbounded: bool = False) -> None:
        """Raise PlacementError unless every invariant holds for these exact loads (int64 [D, E]).

        ``unbounded`` leaves out the slots: for policies that take no notice of them.
        """
        load_E = load_SE.sum(axis=0)
        if self.holders_ED.shape != view.static_ED.shape or self.quota_ED.shape != view.static_ED.shape:
            raise PlacementError(
                f"plan has shapes {self.holders_ED.shape}, {self.quota_ED.shape}, not {view.static_ED.shape}"
            )
        used_D, room_D = self.holders_ED.sum(axis=0), view.slots_D
        if (used_D > room_D).any() and not unbounded:
            d = int(np.argmax(used_D - room_D))
            raise PlacementError(f"layer {view.layer}: device {d} holds {used_D[d]} experts in {room_D[d]} slots")
        if not self.holders_ED.any(axis=1).all():
            e = int(np.argmin(self.holders_ED.any(axis=1)))
            raise PlacementError(f"layer {view.layer}: expert {e} has no holder")
        if self.quota_ED.min() < 0 or (self.quota_ED[~self.holders_ED] != 0).any():
            raise PlacementError(f"layer {view.layer}: tokens on a device that does not hold their expert")
        if (self.quota_ED.sum(axis=1) != load_E).any():
            e = int(np.argmax(self.quota_ED.sum(axis=1) != load_E))
            raise PlacementError(
                f"layer {view.layer}: expert {e} has {load_E[e]} tokens, {self.quota_ED[e].sum()} planned"
            )
        if self.rows_SED is not None and (
            self.rows_SED.min() < 0
            or (self.rows_SED.sum(axis=0) != self.quota_ED).any()
            or (self.rows_SED.sum(axis=2) != load_SE).any()
        ):
            raise PlacementError(f"layer {view.layer}: rows and quotas disagree")


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """Replicas to fetch in the background, bool [E, D] each: what comes, and what is dropped at once to make room."""

    coming_ED: NDArray[np.bool_]
    dropped_ED: NDArray[np.bool_]


class StepPolicy(Protocol):
    """A step-wise method: a frozen dataclass of settings that derives from this class.

    All calls are pure functions of their arguments. A policy gives ``name``, ``summary``, ``exact`` and ``after_gate``;
    the other members have defaults. Only :class:`poise.stepwise.driver.LayerDriver` calls them.
    """

    __slots__ = ()

    name: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[bool]
    """``after_gate`` needs the exact loads of all sources: control time is paid in every step that is not passive."""
    keeps: ClassVar[bool] = False
    """In serving, holders stay from step to step (see the module docstring)."""
    keeps_in_training: ClassVar[bool] = False
    """In training, holders stay from step to step: their gradients are then reduced in every step."""
    recent: ClassVar[int] = 8
    """Most recent steps whose loads it looks at beside the prediction (:attr:`LayerView.recent_HE`)."""
    unbounded: ClassVar[bool] = False
    """Takes no notice of ``step_slots``: a plan may fill more slots than there are."""

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Holders from predicted loads, bool [E, D]; by default nothing moves."""
        return view.before_ED

    def leaves_alone(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> bool:
        """Whether ``after_gate`` will be passive whatever the exact loads are: then nobody need wait for them."""
        return False

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """The plan from exact loads, int64 [D, E] tokens of each source; fetches of holders it adds are exposed."""
        ...

    def in_background(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> Fetch | None:
        """What to start fetching in the background, if nothing is on its way; only asked of policies that keep."""
        return None

    def plans_beside(self, price: StepPrice, num_experts: int, tokens: float) -> Looks | None:
        """When a policy looks that plans beside the steps in serving, steps of so many (token, expert) pairs. None: it
        plans within the step, at no seconds of its own.
        """
        return None

    def training_plan_seconds(self, num_experts: int, num_devices: int) -> float:
        """Seconds that ``after_gate`` takes in training beside the control time that every exact method pays."""
        return 0.0
