"""What is planned for each layer of a run, and from what: loads of the last iterations, prices, plans made ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from poise.cost.route import locality_rows
from poise.cost.transfers import TransferPlan, plan_transfers
from poise.cost.weights import HIDDEN_SHARE, StepPrice, dense_gradient_seconds, training_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.runtime.spans import span
from poise.stepwise.driver import LayerDriver
from poise.stepwise.protocol import LayerView, StepPlan
from poise.stepwise.sharding import owned_ED
from poise.stepwise.step_seconds import exchange_seconds, once_seconds
from poise.train.ahead import Plan, PlanAhead
from poise.train.foresight import MicroBatch
from poise.train.history import LoadHistory
from poise.train.owned import OwnedExperts
from poise.train.settings import Deployment, Settings


class RunPlanner:
    """The same plans on every rank, as all of them know the same.

    Parameters
    ----------
    layers : owned experts in the order they run: who owns what.
    settings, deployment, model : policy, machine and sizes that it reckons with.
    top_k : experts a token, until the first forward pass tells.

    ``history`` holds the loads, ``drivers`` the policy's state of every layer. ``window_s`` is the time of attention
    that a gather can hide behind: given, or measured on the run, or None (modelled). ``micro_batch`` is the one that
    runs, where its routing is known ahead; ``foresees``: that of the last training pass was.
    """

    def __init__(
        self, layers: Sequence[OwnedExperts], settings: Settings, deployment: Deployment, model: ModelSpec, top_k: int
    ) -> None:
        self.layers, self.settings, self.deployment, self.model = layers, settings, deployment, model
        self.top_k, self.window_s = top_k, settings.window_s
        self.history = LoadHistory(len(layers), layers[0].num_experts)
        self.drivers = self._new_drivers()
        self._ahead, self._version = PlanAhead(), 0
        self.micro_batch: MicroBatch | None = None
        self.foresees = False
        self._once: dict[tuple[int, int], bool] = {}  # by layer and power of its tokens: once to a device, or by pairs

    def _new_drivers(self) -> list[LayerDriver]:
        """One a layer, from the present owners, policy and slots on."""
        settings, devices = self.settings, self.deployment.cluster.num_devices
        return [LayerDriver(settings.policy, owned_ED(experts.owner_E, devices), step_slots=settings.step_slots,
                            layer=layer, window=settings.window)
                for layer, experts in enumerate(self.layers)]  # fmt: skip

    def restart(self, settings: Settings) -> None:
        """Owners or settings have changed: policies keep no replicas from before, and plans made ahead are dropped."""
        self.settings = settings
        self.drivers = self._new_drivers()
        self._version += 1
        self._once.clear()

    def measured(self, window_s: float) -> None:
        """The window is known from the run; plans made ahead with another one are dropped."""
        self.window_s = window_s
        self._version += 1

    def view(self, layer: int, pairs: float | None = None, micro_batch: MicroBatch | None = None) -> LayerView:
        """What the policy may look at in a pass of so many (token, expert) pairs; default: as many as in the last, or
        as in the record of a micro-batch.
        """
        driver, loads_HE, step = self.drivers[layer], self.history.of(layer), self.history.seen(layer)
        if micro_batch is None:
            total = pairs if pairs is not None else float(self.history.pairs_L[layer])
            return driver.view(step, driver.predict(loads_HE, total), loads_HE, self.price(total))
        known = micro_batch.of(layer)
        told_E = known.load_SE.sum(axis=0).astype(np.float64)
        price = self.price(pairs if pairs is not None else float(told_E.sum()))
        return driver.view(step, told_E, loads_HE, price, known)

    def price(self, pairs: float) -> StepPrice:
        """Machine, model and window; the tokens count in powers of two, so that it seldom changes."""
        there = self.deployment
        tokens = 2.0 ** self._power(pairs)
        ratio, again = there.gradient_bytes / there.expert_bytes, self.settings.rematerialise is not False
        return _price(tokens, self.layers[0].num_experts, there.cluster, self.model, again, self.window_s, ratio,
                      there.form != "direct", there.expert_bytes / there.held_bytes,
                      there.reduce_dtype.itemsize)  # fmt: skip

    def _power(self, pairs: float) -> int:
        """Of two, that is nearest to so many pairs' tokens."""
        return round(float(np.log2(max(1.0, pairs / self.top_k))))

    def early_plan(self, layer: int) -> Plan:
        """Replicas that are gathered before the gate, and how: planned ahead, or now."""
        driver = self.drivers[layer]
        if not driver.chooses:
            return driver.held_ED.copy(), self._route(layer)(driver.held_ED)
        now = self.micro_batch
        key = layer if now is None else (now.key, layer)
        return self._ahead.get(key, self._version) or self._early_task(layer, now)()

    def finish(
        self, layer: int, early_ED: NDArray[np.bool_], load_SE: NDArray[np.int64], *, keep: bool
    ) -> tuple[StepPlan, NDArray[np.int64], LayerView]:
        """The plan of a pass, its pairs by source, expert and device int64 [D, E, D], and what the policy saw.

        ``early_ED`` bool [E, D] are the holders before the gate, ``load_SE`` int64 [D, E] the counts; ``keep`` lets the
        policy keep its replicas for later passes.
        """
        view = self.view(layer, load_SE.sum(), self.micro_batch)
        plan = self.drivers[layer].finish(view, early_ED, load_SE, keep=keep).plan
        rows = plan.rows_SED
        if rows is None:
            rows = locality_rows(load_SE, plan.quota_ED, self.deployment.cluster.node_D)
        return plan, rows, view

    def travels_once(self, layer: int, rows_SED: NDArray[np.int64], *, keep: bool) -> bool:
        """Whether a token of a layer goes to a device once, and not a row a pair; the same on all ranks.

        Parameters
        ----------
        layer : which.
        rows_SED : int64 [D, E, D], pairs of this pass. Which of them are of one token no other rank knows: under
            ``auto`` they are reckoned with as independent.
        keep : a training pass, whose answer holds for passes of as many tokens, in powers of two, until owners or
            settings change.
        """
        if self.settings.traffic != "auto":
            return self.settings.traffic == "home_device_dedup"
        pairs_DD = rows_SED.sum(axis=1)
        pairs = int(pairs_DD.sum())
        known = layer, self._power(pairs)
        if known in self._once:
            return self._once[known]
        price = self.price(pairs)
        pays = once_seconds(pairs_DD, self.top_k, price) < exchange_seconds(pairs_DD, price)
        if keep and pairs:
            self._once[known] = pays
        return pays

    def learn(self, layer: int, load_E: NDArray[np.int64]) -> None:
        """Loads of a training pass; the first of an iteration is planned from at once."""
        self.history.record(layer, load_E)
        self.foresees = self.micro_batch is not None
        if self.history.passes(layer) == 1 and not self.foresees:  # of several, the end of the iteration plans anew
            self.plan_ahead(layer)

    def end_iteration(self) -> None:
        """No more passes belong to it."""
        for layer in self.history.close():
            if not self.foresees:
                self.plan_ahead(layer)

    def plan_ahead(self, layer: int) -> None:
        """Begin, on a thread, to plan the replicas of the next forward pass: all is known that will be. A policy that
        chooses none has nothing to plan.
        """
        if self.drivers[layer].chooses:
            self._ahead.start(layer, self._version, self._early_task(layer))

    def foresee(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Begin, on a thread, to plan the replicas of all layers of micro-batches whose routing is known."""
        if self.settings.policy.keeps_in_training or not self.drivers[0].chooses:
            return  # what is held by then is not known, or stays
        for one in micro_batches:
            for layer in range(len(self.layers)):
                self._ahead.start((one.key, layer), self._version, self._early_task(layer, one))

    def over(self, micro_batch: MicroBatch) -> None:
        """No more passes are of it."""
        for layer in range(len(self.layers)):
            self._ahead.forget((micro_batch.key, layer))
        if self.micro_batch is micro_batch:
            self.micro_batch = None

    def _route(self, layer: int) -> Callable[[NDArray[np.bool_]], TransferPlan]:
        there = self.deployment
        return partial(plan_transfers, self.layers[layer].owner_E, cluster=there.cluster,
                       expert_bytes=there.expert_bytes, form=there.form)  # fmt: skip

    def _early_task(self, layer: int, micro_batch: MicroBatch | None = None) -> Callable[[], Plan]:
        driver, route = self.drivers[layer], self._route(layer)
        view = self.view(layer, micro_batch=micro_batch)

        def plan() -> Plan:
            with span("early plan"):
                early_ED = driver.choose(view)
                return early_ED, route(early_ED)

        return plan


@lru_cache(maxsize=64)
def _price(
    tokens: float,
    num_experts: int,
    cluster: Cluster,
    model: ModelSpec,
    rematerialise: bool,
    window_s: float | None,
    gradient_ratio: float,
    fan_out: bool,
    gather_ratio: float,
    gradient_bytes: int,
) -> StepPrice:
    return training_price(tokens, num_experts, cluster, model, rematerialise=rematerialise, window_s=window_s,
                          gradient_ratio=gradient_ratio, fan_out=fan_out, gather_ratio=gather_ratio,
                          hidden_share=HIDDEN_SHARE,
                          dense_s=dense_gradient_seconds(cluster, model, gradient_bytes))  # fmt: skip
