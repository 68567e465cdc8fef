"""Owners by price: experts change owner only where the modelled step is faster with the new ones, their move included.

A sharding policy proposes owners by loads (:mod:`poise.stepwise.sharding`). Even loads are not a fast step: replicas
even out what owners leave, and who owns a hot expert sends it. So proposals are priced as steps are
(:mod:`poise.stepwise.step_seconds`: compute, dispatch and combine, gathers and reductions round by round with their
ports, control) under the policy and the slots of the run.

Step 1  Proposals: the policy's owners; others that the caller knows of; even ones; the policy's own rule inside each
        layer, where every device owns as many experts of the layer as it does now, in those layers in which that gains
        by itself.
Step 2  Each is priced on samples of loads: a new driver plans every layer, as after a move.
Step 3  The one with the least seconds, a share of its move's added (the move over ``interval`` steps), is taken if that
        is less than the present owners' seconds: by more than ``gain`` of them where the loads are of steps that are
        over, and the next ones a guess. Else nothing moves.

A pure function of what all ranks know alike: they decide alike, and so that no decision raises the modelled time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import StepPrice
from poise.stepwise.driver import LayerDriver
from poise.stepwise.methods.split import spread_evenly
from poise.stepwise.protocol import Foreseen, StepPolicy
from poise.stepwise.sharding import ShardingPolicy, even_sharding, owned_ED, place_within
from poise.stepwise.step_seconds import layer_seconds, reshard_seconds

SAMPLES = 3
"""Steps that are over that owners are priced on: every one is planned anew for every proposal."""
KNOWN_SAMPLES = 8
"""Micro-batches that are known ahead that they are priced on: these will run, so each left out is a guess."""


@dataclass(frozen=True, eq=False)
class LoadSamples:
    """What owners are priced on.

    Parameters
    ----------
    load_LBSE : of every layer, int64 [B, D, E] or of no step: tokens of each expert from each source.
    known : these are loads of steps to come, that policies are told of, and whether routing is replayed; None: of
        steps that are over, from whose mean policies predict.
    """

    load_LBSE: Sequence[NDArray[np.int64]]
    known: bool | None = None

    @classmethod
    def of_history(cls, load_LBE: Sequence[NDArray[np.float64]], devices: int) -> LoadSamples:
        """The last of each layer's steps, float64 [B, E]: spread evenly over the sources, which nobody has kept."""
        recent = [np.rint(load_BE[-SAMPLES:]).astype(np.int64) for load_BE in load_LBE]
        spread = [np.array([spread_evenly(load_E, devices) for load_E in load_BE]) for load_BE in recent]
        return cls([one.reshape(-1, devices, load.shape[1]) for one, load in zip(spread, recent, strict=True)])

    @classmethod
    def of_record(cls, load_BLSE: NDArray[np.int32], replayed: bool) -> LoadSamples:
        """Of micro-batches that are known, int32 [B, L, D, E]: all, or as many as may be, spaced evenly among them."""
        count = len(load_BLSE)
        chosen = np.unique(np.linspace(0, count - 1, min(count, KNOWN_SAMPLES)).astype(np.int64))
        return cls(list(load_BLSE[chosen].astype(np.int64).swapaxes(0, 1)), replayed)

    def mean_LE(self) -> NDArray[np.float64]:
        """Mean tokens of each expert, float64 [L, E]; zeros for a layer without steps."""
        return np.array([load.sum(axis=1).mean(axis=0) if len(load) else np.zeros(load.shape[2])
                         for load in self.load_LBSE])  # fmt: skip


@dataclass(frozen=True, eq=False)
class OwnerSeconds:
    """Seconds of the MoE layers of a step under owners.

    Parameters
    ----------
    policy, step_slots : of the run.
    price : machine, model and window of a step.
    samples : the loads, of a micro-batch each.
    micro_batches : how many there are in a step.
    """

    policy: StepPolicy
    step_slots: int
    price: StepPrice
    samples: LoadSamples
    micro_batches: int = 1
    _found: dict[tuple[int, bytes], float] = field(default_factory=dict)

    @cached_property
    def _predicted_LE(self) -> NDArray[np.float64]:
        return self.samples.mean_LE()

    def layer(self, layer: int, owner_E: NDArray[np.int64]) -> float:
        """Of one layer, mean over the samples. What a policy that keeps replicas pays for new ones is left out: it pays
        that once.
        """
        key = layer, owner_E.tobytes()
        if key not in self._found:
            self._found[key] = self._priced(layer, owner_E)
        return self._found[key]

    def _priced(self, layer: int, owner_E: NDArray[np.int64]) -> float:
        price, policy, known = self.price, self.policy, self.samples.known
        owned, total, count = owned_ED(owner_E, price.cluster.num_devices), 0.0, 0
        last = len(self.samples.load_LBSE) - 1
        again = price.rematerialise and not policy.keeps_in_training and layer < last
        for step, load_SE in enumerate(self.samples.load_LBSE[layer]):
            pairs = load_SE.sum()
            if not pairs:
                continue
            driver = LayerDriver(policy, owned, step_slots=self.step_slots, layer=layer)
            none = np.zeros((0, len(owner_E)))
            if known is None:
                mean_E = self._predicted_LE[layer]
                view = driver.view(step, mean_E * (pairs / mean_E.sum()), none, price)
            else:
                told_E = load_SE.sum(axis=0).astype(np.float64)
                view = driver.view(step, told_E, none, price, Foreseen(load_SE, known))
            done = driver.finish(view, driver.choose(view), load_SE)
            cost = layer_seconds(done, load_SE, price, again=again, keeps=policy.keeps_in_training)
            total += cost.total_s - cost.switch_s
            count += 1
        return total / max(count, 1)

    def step(self, owner_LE: NDArray[np.int64]) -> float:
        """Of all layers and micro-batches."""
        return self.micro_batches * sum(self.layer(layer, owner_E) for layer, owner_E in enumerate(owner_LE))

    def move(self, old_LE: NDArray[np.int64], new_LE: NDArray[np.int64]) -> float:
        """Of the one time that experts go to new owners, all layers at once."""
        return float(reshard_seconds(old_LE, new_LE, self.price))


def decided(
    sharding: ShardingPolicy, load_LE: NDArray[np.float64], current_LE: NDArray[np.int64], seconds: OwnerSeconds,
    others: Sequence[NDArray[np.int64]] = (),
) -> NDArray[np.int64]:  # fmt: skip
    """The owners from now on, int64 [L, E]; ``current_LE`` where nothing is to move.

    Parameters
    ----------
    sharding : what proposes them. One that is not ``by_price`` is followed as it is.
    load_LE : float64 [L, E], what it proposes from.
    current_LE : int64 [L, E], the owners now.
    seconds : the price.
    others : int64 [L, E] each, owners that are priced, too.
    """
    proposed = sharding.plan(load_LE, current_LE, seconds.price)
    if not sharding.by_price or not sharding.interval:
        return proposed
    now_s = seconds.step(current_LE)
    (layers, experts), devices = current_LE.shape, seconds.price.cluster.num_devices
    even_LE = even_sharding(layers, experts, devices)
    guessed = seconds.samples.known is None
    best_LE, best_s = current_LE, now_s * (1.0 - sharding.gain if guessed else 1.0)
    for other_LE in (proposed, *others, even_LE, _layer_by_layer(load_LE, current_LE, seconds, sharding.interval)):
        moving = (other_LE != current_LE).any()
        if moving:
            moved_s = seconds.step(other_LE) + seconds.move(current_LE, other_LE) / sharding.interval
            if moved_s < best_s:
                best_LE, best_s = other_LE, moved_s
    return best_LE


def _layer_by_layer(
    load_LE: NDArray[np.float64], current_LE: NDArray[np.int64], seconds: OwnerSeconds, interval: int
) -> NDArray[np.int64]:
    """Owners that are changed in those layers only in which that gains more than the layer's own move."""
    out_LE = current_LE.copy()
    for layer, owner_E in enumerate(current_LE):
        new_E = place_within(load_LE[layer], owner_E, seconds.price.cluster)
        moved_s = seconds.move(owner_E[None], new_E[None]) / interval / seconds.micro_batches
        if (new_E != owner_E).any() and seconds.layer(layer, new_E) + moved_s < seconds.layer(layer, owner_E):
            out_LE[layer] = new_E
    return out_LE
