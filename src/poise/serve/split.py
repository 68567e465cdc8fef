"""Which device computes each of a rank's (token, expert) pairs: the engine's split, or a fast loop's plan."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.cost.route import assign_tokens, deal_evenly, locality_rows
from poise.cost.weights import StepPrice
from poise.routing.predict import WINDOW
from poise.runtime.dispatch import all_counts
from poise.runtime.flows import Flow
from poise.serve.replicas import StepReplicas
from poise.stepwise.driver import LayerDriver, Outcome
from poise.stepwise.protocol import LayerView, StepPolicy
from poise.util.errors import OptionError


class TokenSplit(Protocol):
    """A way to split one layer's tokens."""

    def prefetch(self, tokens: int | None) -> None:
        """Called before attention: begin to fetch what the layer is expected to need."""
        ...

    def devices(self, ids_TK: Tensor) -> Tensor:
        """Device of each pair, int64 [T, K]; all ranks call it together."""
        ...

    def finish(self) -> None:
        """After the experts have run."""
        ...


class EvenSplit:
    """Each replica gets the same share: what engines do by default. No communication.

    Parameters
    ----------
    count_ED : int [E, D], slots of each expert on each device that this rank's tokens may go to: all, or under ``near``
        those of :func:`poise.cost.near.near_count`.
    rank : this rank; ranks begin at different replicas.
    """

    def __init__(self, count_ED: NDArray[Any], rank: int) -> None:
        self._count_ED, self._rank = count_ED, rank

    def prefetch(self, tokens: int | None) -> None:
        """Nothing to fetch."""

    def devices(self, ids_TK: Tensor) -> Tensor:
        """The pairs of an expert are dealt over its replicas in turn."""
        device_TK = deal_evenly(ids_TK.cpu().numpy(), self._count_ED, self._rank)
        return torch.from_numpy(device_TK).to(ids_TK.device)

    def finish(self) -> None:
        """Nothing goes on in the background."""


@dataclass(frozen=True, slots=True, eq=False)
class ServingPolicy:
    """A step-wise policy in serving.

    Parameters
    ----------
    policy : any of :data:`poise.stepwise.registry.POLICIES`; its plans are the simulator's.
    price : machine and model it plans with.
    step_slots : M, slots a device and layer beyond the static placement's (one buffer for all layers if the policy
        keeps no replica from step to step).
    window : steps whose mean load is the prediction.
    prior_LE : loads known before the first step, float64 [L, E] of any scale; default: all experts alike.
    """

    policy: StepPolicy
    price: StepPrice
    step_slots: int = 1
    window: int = WINDOW
    prior_LE: NDArray[np.float64] | None = None


def check_loop(price: StepPrice, prior_LE: NDArray[np.float64] | None, shape_LE: tuple[int, int], ranks: int) -> None:
    """Raise OptionError unless a policy was priced for so many ranks, and its known loads are of these L and E."""
    price.check_devices(ranks)
    if prior_LE is None:
        return
    if prior_LE.shape != shape_LE:
        raise OptionError(f"prior loads have shape {prior_LE.shape}, the model has [layers, experts] {shape_LE}")
    if not np.isfinite(prior_LE).all() or (prior_LE < 0).any():
        raise OptionError(f"prior loads of {prior_LE.min()} to {prior_LE.max()}", hint="at least 0, and numbers")


class PlannedSplit:
    """The plan of a fast loop, the same on all ranks: one all-gather of counts a layer.

    Parameters
    ----------
    loop, layer, count_ED : the policy, this layer's place in it, and slots of each expert on each device.
    own : the engine's split.
    flow : carries the counts along where the policy leaves the engine's split alone.
    replicas : takes and brings the replicas that plans ask for.
    """

    def __init__(
        self, loop: ServingPolicy, layer: int, count_ED: NDArray[Any], own: EvenSplit, flow: Flow,
        replicas: StepReplicas,
    ) -> None:  # fmt: skip
        static_ED = count_ED > 0
        self._driver = LayerDriver(
            loop.policy, static_ED, step_slots=loop.step_slots, layer=layer, window=loop.window,
            prior_E=None if loop.prior_LE is None else loop.prior_LE[layer],
        )  # fmt: skip
        self._price, self._flow, self._rank, self._replicas = loop.price, flow, flow.rank, replicas
        self._own = own
        self._recent: deque[NDArray[np.float64]] = deque(maxlen=max(loop.policy.recent, loop.window))
        self._step = 0
        self._view: LayerView | None = None
        self._early_ED = static_ED
        self.outcome: Outcome | None = None

    def prefetch(self, tokens: int | None) -> None:
        """Plan from predicted loads, start to fetch. ``tokens``: pairs of this step, all ranks; default: as before."""
        driver, experts = self._driver, len(self._early_ED)
        loads_HE = np.array(self._recent).reshape(-1, experts)
        if tokens is None:
            tokens = int(loads_HE[-1].sum()) if len(loads_HE) else experts
        self._view = driver.view(self._step, driver.predict(loads_HE, tokens), loads_HE, self._price)
        self._early_ED = driver.choose(self._view)
        self._replicas.fetch(self._early_ED & ~self._view.before_ED, self._early_ED | self._view.coming_ED)

    def devices(self, ids_TK: Tensor) -> Tensor:
        """Counts of all ranks, the plan, and the devices it names for this rank's pairs.

        A policy that says beforehand that it waits for no counts gets them along with the dispatch.
        """
        if self._view is None:
            self.prefetch(None)
        assert self._view is not None
        experts = len(self._early_ED)
        self.outcome = None
        if self._driver.needs_no_loads(self._view, self._early_ED):
            counts_E = self._flow.extra_X = torch.bincount(ids_TK.reshape(-1), minlength=experts)
            row_ED = self._driver.unaided_row(self._view, self._early_ED, counts_E.cpu().numpy(), self._rank)
            return self._own.devices(ids_TK) if row_ED is None else self._along(ids_TK, row_ED)
        load_SE = all_counts(ids_TK, experts, self._flow.group)
        view, plan = self._view, self._plan(load_SE).plan
        self._replicas.fetch(plan.holders_ED & ~self._early_ED, plan.holders_ED | view.coming_ED)
        if plan.rows_SED is not None:
            return self._along(ids_TK, plan.rows_SED[self._rank])
        node_D = self._price.cluster.node_D
        return self._along(ids_TK, locality_rows(load_SE, plan.quota_ED, node_D, self._rank)[0])

    def _along(self, ids_TK: Tensor, row_ED: NDArray[np.int64]) -> Tensor:
        """Devices of this rank's pairs, of which ``row_ED`` says how many go where."""
        # at this rank's place among the sources; zeros take no memory until they are written
        rows_SED = np.zeros((self._rank + 1, *row_ED.shape), np.int64)
        rows_SED[self._rank] = row_ED
        device_TK = np.empty(tuple(ids_TK.shape), np.int64)
        ids = ids_TK.cpu().numpy()
        assign_tokens(ids, np.full(len(ids), self._rank), rows_SED, device_TK)
        return torch.from_numpy(device_TK).to(ids_TK.device)

    def _plan(self, load_SE: NDArray[np.int64]) -> Outcome:
        assert self._view is not None
        view, self._view = self._view, None
        self.outcome = self._driver.finish(view, self._early_ED, load_SE)
        self._recent.append(load_SE.sum(axis=0).astype(np.float64))
        self._step += 1
        return self.outcome

    def finish(self) -> None:
        """Start, or take in, what comes in the background: slots that this step used are free now."""
        outcome = self.outcome
        if outcome is None:
            assert self._flow.extra_DX is not None
            outcome = self._plan(self._flow.extra_DX.cpu().numpy())
        if outcome.started_ED is not None:
            self._replicas.start(outcome.started_ED, self._driver.held_ED | outcome.started_ED)
        if outcome.landed_ED is not None:
            self._replicas.land()
