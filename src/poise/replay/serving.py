"""Replay of a fast loop: step by step, layer by layer, whole tokens, everything it moves priced."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from poise.cost.bound import bound_terms
from poise.cost.compute import device_compute
from poise.cost.links import port_seconds
from poise.cost.route import assign_tokens, count_sources, locality_pairs, locality_rows, token_copies
from poise.cost.split import Split
from poise.cost.step import BatchCost, add_constants, batch_cost, check_inputs
from poise.cost.traffic import Copies, DataFlow, port_load
from poise.cost.weights import StepPrice, step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.replay.static import Replay
from poise.routing.batch import RoutingBatch
from poise.routing.predict import Predictor, SlidingMean
from poise.stepwise.driver import LayerDriver, Outcome
from poise.stepwise.methods.split import spread_evenly
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy
from poise.util.errors import NoResultError, OptionError
from poise.util.wish import Wish

WARM_UP = 5
"""Steps that fill predictors and kept replicas before judging starts."""
DEFAULT_PREDICTOR: Predictor = SlidingMean()


@dataclass(frozen=True, slots=True, eq=False)
class FastLoop:
    """A step-wise method and what it may use.

    Parameters
    ----------
    policy : the method.
    step_slots : M, slots a device beyond the static placement's.
    predictor : loads before the gate.
    window_s, control_s : measured seconds that replace the modelled ones (:func:`poise.cost.weights.step_price`).
    engine_split : how the engine splits tokens where the policy leaves them to it, ``even`` or ``near``.
    """

    policy: StepPolicy
    step_slots: int
    predictor: Predictor = DEFAULT_PREDICTOR
    window_s: float | None = None
    control_s: float | None = None
    engine_split: Split = "even"

    def __post_init__(self) -> None:
        if self.step_slots < 0:
            raise OptionError(f"step slots must be at least 0, got {self.step_slots}")


def replay_steps(
    batch: RoutingBatch,
    placement: Placement,
    loop: FastLoop,
    cluster: Cluster,
    model: ModelSpec,
    *,
    traffic: DataFlow,
    warm_up: int = WARM_UP,
    prior_LE: NDArray[np.float64] | None = None,
    wish: Wish | None = None,
) -> Replay:
    """Run a fast loop over a batch; the first ``warm_up`` steps run but are not judged.

    The static placement is what holds between steps. Sources are the tokens' home ranks (under ``stay`` the devices
    where their heaviest expert of the layer before ran); load-only batches have their tokens spread evenly over all.
    A passive plan without rows costs what the static placement costs under the engine's own split.

    Raises
    ------
    OptionError : shapes that disagree, or too few steps. PlacementError : a plan breaks an invariant.
    NoResultError : the ``wish`` that it be ended came before the last step.
    """
    count_LED = placement.count_LED()
    check_inputs(batch, count_LED, cluster, traffic)
    batch = batch.at_home(cluster.num_devices)
    price = step_price(float(batch.tokens_BL().max(axis=1).mean()), batch.num_experts, cluster, model,
                       window_s=loop.window_s, control_s=loop.control_s)  # fmt: skip
    run = _ServingRun(batch, count_LED, loop, price, traffic)
    predicted = loop.predictor.predict_BLE(batch, prior_LE)
    for step in range(batch.num_steps):
        if wish is not None and wish.came:
            raise NoResultError(f"interrupted before step {step + 1} of {batch.num_steps}")
        run.step(step, predicted[step])
    judged = batch.steps_from(warm_up)
    slots_D = np.minimum((count_LED > 0).sum(axis=1).max(axis=0) + loop.step_slots, batch.num_experts)
    bound = bound_terms(judged, cluster, model, traffic=traffic, slots_D=slots_D, blind=False)
    return Replay(run.cost(warm_up), bound.seconds_BL.sum(axis=1), run.moved_BL[warm_up:].sum(axis=1))


class _ServingRun:
    """Arrays that a replay fills, and the holders that live from step to step."""

    def __init__(
        self,
        batch: RoutingBatch,
        count_LED: NDArray[np.int32],
        loop: FastLoop,
        price: StepPrice,
        traffic: DataFlow,
    ) -> None:
        self.batch, self.loop, self.price, self.traffic, self.count_LED = batch, loop, price, traffic, count_LED
        self.drivers = [
            LayerDriver(loop.policy, static_ED, step_slots=loop.step_slots, layer=layer)
            for layer, static_ED in enumerate(count_LED > 0)
        ]
        shape = (batch.num_steps, batch.num_layers)
        names = ("compute", "dispatch", "combine", "kv", "device", "node", "weights", "control")
        self.out = {name: np.zeros(shape) for name in names}
        self.tokens_BLD = np.zeros((*shape, price.cluster.num_devices))
        self.moved_BL, self.tokens_BL = np.zeros(shape), batch.tokens_BL()
        self.home_T = batch.home_of_tokens(price.cluster.num_devices) if batch.has_tokens else None

    @cached_property
    def static(self) -> BatchCost:
        """What passive plans cost; made when the first one comes."""
        price = self.price
        return batch_cost(self.batch, self.count_LED, price.cluster, price.model, traffic=self.traffic,
                          split=self.loop.engine_split)  # fmt: skip

    def step(self, step: int, predicted_LE: NDArray[np.float64]) -> None:
        batch, cluster = self.batch, self.price.cluster
        rows = slice(0, 0) if batch.start_B is None else slice(*batch.start_B[step : step + 2])
        source_T = None if self.home_T is None else self.home_T[rows].astype(np.int64)
        for layer in range(batch.num_layers):
            load_E = np.rint(batch.load_BLE[step, layer]).astype(np.int64)
            if not load_E.any():
                continue
            if source_T is None or batch.experts_TLK is None:
                load_SE = spread_evenly(load_E, cluster.num_devices)
            else:
                load_SE = np.zeros((cluster.num_devices, batch.num_experts), np.int64)
                experts_TK = batch.experts_TLK[rows, layer]
                count_sources(experts_TK, source_T, load_SE)
            driver = self.drivers[layer]
            view = driver.view(step, predicted_LE[layer], batch.load_BLE[:step, layer], self.price)
            plan = self._book(driver.finish(view, driver.choose(view), load_SE))
            flow, device_TK = plan.rows_SED, None
            if source_T is not None and self.traffic != "home":
                flow = locality_rows(load_SE, plan.quota_ED, cluster.node_D) if flow is None else flow
                device_TK = np.empty(experts_TK.shape, np.int64)
                assign_tokens(experts_TK, source_T, flow.copy(), device_TK)
            if flow is None:
                pairs_DD = locality_pairs(load_SE, plan.quota_ED, cluster.node_D)
            else:
                pairs_DD = flow.sum(axis=1)
            self._price(view, plan, pairs_DD.astype(np.float64), source_T, device_TK)
            if self.traffic == "stay" and device_TK is not None and source_T is not None:
                source_T = np.where(device_TK[:, 0] < 0, source_T, device_TK[:, 0])

    def _book(self, done: Outcome) -> StepPlan:
        """The layer's plan; weights and control time are booked."""
        at = (done.view.step, done.view.layer)
        self.out["weights"][at] = max(0.0, done.early_s - self.price.window_s) + done.late_s
        self.out["control"][at] = done.control_s
        self.moved_BL[at] = float(done.fetched) * self.price.model.expert_bytes
        return done.plan

    def _price(
        self,
        view: LayerView,
        plan: StepPlan,
        pairs_DD: NDArray[np.float64],
        source_T: NDArray[np.int64] | None,
        device_TK: NDArray[np.int64] | None,
    ) -> None:
        cluster, model, at = self.price.cluster, self.price.model, (view.step, view.layer)
        if plan.passive and plan.rows_SED is None:  # the same figures as the static row
            for name in ("compute", "dispatch", "combine", "kv"):
                self.out[name][at] = getattr(self.static, f"{name}_BL")[at]
            self.out["device"][at] = self.static.cross_device_BL[at]
            self.out["node"][at] = self.static.cross_node_BL[at]
            self.tokens_BLD[at] = self.static.tokens_BLD[at]
            return
        self.tokens_BLD[at] = plan.quota_ED.sum(axis=0)
        self.out["compute"][at] = device_compute(plan.quota_ED, cluster, model).max()
        there = back = Copies(pairs_DD[None])
        if device_TK is not None and source_T is not None:
            there, back = token_copies(device_TK, source_T, cluster, self.traffic)
        out_load = port_load(there, cluster)
        back_load = out_load if back is there else port_load(back, cluster)
        self.out["dispatch"][at] = port_seconds(
            out_load, model.dispatch_bytes_per_token, cluster, cluster.dispatch_wire
        )[0]
        self.out["combine"][at] = port_seconds(back_load, model.combine_bytes_per_token, cluster, cluster.combine_wire)[
            0
        ]
        self.out["device"][at] = pairs_DD.sum() - np.trace(pairs_DD)
        self.out["node"][at] = pairs_DD.sum() - (pairs_DD * cluster.same_node_DD).sum()
        once = {name: np.zeros((1, 1)) for name in ("compute", "dispatch", "combine", "kv")}
        add_constants(once, self.tokens_BL[at][None, None], self.batch.top_k, cluster, model, self.traffic)
        for name in ("dispatch", "combine", "kv"):  # the start of compute is in a device's own
            self.out[name][at] += once[name][0, 0]

    def cost(self, first: int) -> BatchCost:
        """What the steps from ``first`` on cost."""
        out = {name: value[first:] for name, value in self.out.items()}
        return BatchCost(
            out["compute"], out["dispatch"], out["combine"], out["kv"], self.tokens_BLD[first:],
            self.batch.load_BLE[first:].sum(axis=2), out["device"], out["node"], out["weights"], out["control"],
        )  # fmt: skip
