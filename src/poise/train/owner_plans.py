"""Owners that a run will have, planned by price on a thread while steps go on, and requests dealt by price."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from poise.runtime.spans import span
from poise.stepwise.dealing import Deal, cheapest, deals, priced_owners
from poise.stepwise.owners import LoadSamples, OwnerSeconds, decided
from poise.stepwise.sharding import ShardingPolicy
from poise.train.plans import RunPlanner
from poise.train.regroup import ReadGroups

OwnerTask = partial[NDArray[np.int64]]
LAG = 0.1
"""Share of the interval between two plans after which one is taken: so long its thread has."""
PRICED = 4
"""Layers, spaced evenly, on which a deal of requests is priced: it is done before every optimizer step."""


class OwnerPlans:
    """The next owners of a run: begun in one step, taken in a later one that is the same on every rank.

    A plan is a pure function of loads, owners, policy and price, which all ranks know alike.
    """

    def __init__(self, planner: RunPlanner) -> None:
        self._planner = planner
        self._pool: ThreadPoolExecutor | None = None
        self._coming: tuple[int, Future[NDArray[np.int64]]] | None = None

    @property
    def current(self) -> NDArray[np.int64]:
        """Owners now, int64 [L, E]."""
        return np.array([experts.owner_E for experts in self._planner.layers])

    def _seconds(self, pairs: float, samples: LoadSamples, micro_batches: int = 1) -> OwnerSeconds:
        settings = self._planner.settings
        return OwnerSeconds(settings.policy, settings.step_slots, self._planner.price(pairs), samples, micro_batches)

    def _task(
        self, sharding: ShardingPolicy, load_LE: NDArray[np.float64], samples: LoadSamples, micro_batches: int = 1
    ) -> OwnerTask:
        seconds = self._seconds(load_LE.sum(axis=1).mean(), samples, micro_batches)
        return partial(decided, sharding, load_LE, self.current, seconds)

    def _of_history(self, sharding: ShardingPolicy) -> OwnerTask | None:
        """What plans from the loads of the last steps; None where no layer has run."""
        history = self._planner.history
        load_LE = history.mean_LE()
        if not load_LE.any():
            return None
        samples = LoadSamples.of_history([history.of(layer) for layer in range(len(load_LE))],
                                         self._planner.deployment.cluster.num_devices)  # fmt: skip
        return self._task(sharding, load_LE, samples, history.micro_batches())

    def _proposed(self, sharding: ShardingPolicy) -> list[NDArray[np.int64]]:
        """Owners by loads of the past, which a policy by price weighs beside others."""
        task = self._of_history(sharding) if sharding.by_price else None
        return [] if task is None else [task()]

    def begin(self, sharding: ShardingPolicy, step: int) -> None:
        """Plan from the loads of the last steps; nothing where no layer has run."""
        task = self._of_history(sharding)
        if task is None:
            return

        def plan() -> NDArray[np.int64]:
            with span("owners"):
                return task()

        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "poise-owners")
        self._coming = step + int(sharding.interval * LAG), self._pool.submit(plan)

    def take(self, step: int) -> NDArray[np.int64] | None:
        """The owners that are due after a step, waited for; None: none are."""
        if self._coming is None or step < self._coming[0]:
            return None
        coming, self._coming = self._coming[1], None
        return coming.result()

    def forget(self) -> None:
        """Owners, policy or slots have changed: what was begun is not taken."""
        if self._coming is not None:
            self._coming[1].cancel()
        self._coming = None

    def known(
        self, sharding: ShardingPolicy, load_BLSE: NDArray[np.int32], replayed: bool
    ) -> NDArray[np.int64]:  # fmt: skip
        """Now, from the loads of micro-batches to come, int32 [B, L, D, E]; what loads of the past propose is priced on
        them, too.
        """
        load_LE = np.mean([load_LSE.sum(axis=1) for load_LSE in load_BLSE], axis=0)
        others = self._proposed(sharding)
        return self._task(sharding, load_LE, LoadSamples.of_record(load_BLSE, replayed), len(load_BLSE))(others=others)

    def dealt(self, read: ReadGroups, sharding: ShardingPolicy | None) -> Deal:
        """The requests of an optimizer step where its modelled seconds are least: priced on a few layers.

        ``sharding``: what owners may move by, their move spread over its interval; None: they stay.
        """
        requests, given = read.requests, read.deal(self.current)
        cluster, layers = self._planner.deployment.cluster, len(given.owner_LE)
        chosen = np.unique(np.linspace(0, layers - 1, min(layers, PRICED)).astype(np.int64))
        some, times = replace(requests, load_QLE=requests.load_QLE[:, chosen]), layers / len(chosen)
        micro_batches = read.shape[0]

        def seconds_for(load_BLSE: NDArray[np.int32]) -> OwnerSeconds:
            pairs = float(load_BLSE.sum(axis=(2, 3)).mean())
            return self._seconds(pairs, LoadSamples.of_record(load_BLSE, True), micro_batches)

        def seconds_of(deal: Deal) -> float:
            seconds = seconds_for(deal.sources(some, cluster.num_devices))
            moved_s = 0.0 if sharding is None else seconds.move(given.owner_LE, deal.owner_LE) / sharding.interval
            return times * seconds.step(deal.owner_LE[chosen]) + moved_s

        found = deals(requests, given, cluster, owners_move=sharding is not None)
        if sharding is not None:
            past = self._proposed(sharding)
            found += [priced_owners(deal, requests, cluster.num_devices, sharding, seconds_for, past)
                      for deal in (found[1], found[-1])]  # fmt: skip
        return cheapest(found, seconds_of)
