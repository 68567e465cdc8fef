"""Replay of training: every step-wise policy on the same routing counts under the training price.

A step = over all MoE layers: attention forward and backward + expert compute (three passes) + four all-to-alls +
exposed weights + control; + re-sharding; + the dense rest. One copy a (token, expert) pair travels (flow ``home``).

Weights. Owners come from a sharding (:mod:`poise.stepwise.sharding`); what a policy fetches is gathered and reduced in
the same step (:meth:`poise.cost.weights.StepPrice.exposed_seconds`). A policy that keeps replicas or moves experts pays
gather and reduce for each replica in every step (their gradients' all-reduce), and parameters + optimizer states
(:data:`poise.cost.weights.STATE_RATIO` times the bytes), exposed, for each that is new. Re-sharding moves the same
states, exposed; its seconds are spread over the steps until the next one, so that short replays are charged fairly.

Before the gate, policies know what ranks know (:mod:`poise.train.schedule`): as many pairs as the layer had in the step
before, and in the first step one, so that modelled attention is that of one token. Owners are planned from the same
steps as there (:func:`poise.stepwise.sharding.lasting_load`). With a record of the steps to come (:class:`Foresight`)
both are planned from it instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import device_compute
from poise.cost.route import count_sources
from poise.cost.weights import StepPrice, window_seconds
from poise.replay.serving import WARM_UP, FastLoop
from poise.replay.work import LayerWork, Rounds
from poise.routing.batch import RoutingBatch
from poise.stepwise.driver import LayerDriver
from poise.stepwise.methods.split import spread_evenly
from poise.stepwise.owners import LoadSamples, OwnerSeconds, decided
from poise.stepwise.protocol import Foreseen, LayerView
from poise.stepwise.sharding import (
    Even,
    ShardingPolicy,
    check_sharding,
    even_sharding,
    lasting_load,
    moves,
    owned_ED,
)
from poise.stepwise.step_seconds import Moves, layer_seconds, reshard_seconds
from poise.util.errors import OptionError


@dataclass(frozen=True, slots=True, eq=False)
class SourceLoads:
    """Tokens of each expert from each source device.

    Parameters
    ----------
    load_BLSE : int [B, L, D, E]; read-only.
    top_k : K.
    """

    load_BLSE: NDArray[np.int32]
    top_k: int

    def __post_init__(self) -> None:
        load = self.load_BLSE
        if load.ndim != 4 or load.size == 0 or load.dtype.kind not in "iu" or load.min() < 0:
            raise OptionError(f"source loads must be whole numbers [steps, layers, sources, experts], got {load.shape}")
        load.flags.writeable = False

    @classmethod
    def of_batch(cls, batch: RoutingBatch, num_devices: int) -> SourceLoads:
        """Counts of a batch: by home rank where tokens are known, else spread evenly over the sources."""
        out = np.zeros((batch.num_steps, batch.num_layers, num_devices, batch.num_experts), np.int32)
        home_T = batch.home_of_tokens(num_devices) if batch.has_tokens else None
        one = np.zeros((num_devices, batch.num_experts), np.int64)
        for step in range(batch.num_steps):
            for layer in range(batch.num_layers):
                if home_T is None or batch.experts_TLK is None or batch.start_B is None:
                    load_E = np.rint(batch.load_BLE[step, layer]).astype(np.int64)
                    out[step, layer] = spread_evenly(load_E, num_devices)
                    continue
                rows = slice(*batch.start_B[step : step + 2])
                count_sources(batch.experts_TLK[rows, layer], home_T[rows].astype(np.int64), one)
                out[step, layer] = one
        return cls(out, batch.top_k)

    def batch(self) -> RoutingBatch:
        """The loads without sources, for predictors."""
        load = self.load_BLSE.sum(axis=2, dtype=np.float64)
        steps, layers = load.shape[:2]
        return RoutingBatch(load, np.full(steps, 1.0 / steps), self.top_k, np.arange(layers, dtype=np.int32))

    def force_balanced(self) -> SourceLoads:
        """The same number of tokens of every source, the same for every expert: what a forced router gives."""
        total = self.load_BLSE.sum(axis=3, dtype=np.int64)
        sources, experts = self.load_BLSE.shape[2:]
        whole, rest = np.divmod(total, experts)
        turn = (np.arange(experts) - (np.arange(sources) * experts // sources)[:, None]) % experts
        out = whole[..., None] + (turn < rest[..., None])
        return SourceLoads(out.astype(np.int32), self.top_k)


@dataclass(frozen=True, slots=True, eq=False)
class Foresight:
    """What a record tells of the steps before they run.

    Parameters
    ----------
    loads : of every step, as recorded.
    replayed : the router's choice is replaced by the record (:class:`poise.stepwise.protocol.Foreseen`).
    """

    loads: SourceLoads
    replayed: bool = True

    def of(self, step: int, layer: int) -> Foreseen:
        """Of one layer in one step."""
        return Foreseen(self.loads.load_BLSE[step, layer].astype(np.int64), self.replayed)

    def coming(self, step: int, steps: int) -> NDArray[np.float64]:
        """What owners are planned from: mean loads of so many steps from one on, float64 [L, E]."""
        mean_LE: NDArray[np.float64] = self.loads.load_BLSE[step : step + steps].sum(axis=2).mean(axis=0)
        return mean_LE


@dataclass(frozen=True, slots=True, eq=False)
class TrainingReplay:
    """What training costs under a policy; steps after the warm-up.

    Parameters
    ----------
    compute_BL, exchange_BL, weights_BL, control_BL : float64 [B, L], seconds: compute, four all-to-alls, exposed
        weights (moves of owners and new kept replicas included), control.
    reshard_B : float64 [B], re-sharding, spread over its interval.
    tokens_BLD : int64 [B, L, D], tokens computed on each device.
    moved_BL, exposed_BL : float64 [B, L], bytes of weights, gradients and states that move; those that show.
    replicas_BLD : int64 [B, L, D], experts beyond the owned ones on each device.
    attention_s, rest_s : seconds a step of attention (forward and backward, all layers) and of the dense rest.
    owner_LE : int64 [L, E], owners at the end.
    moved_owners : experts that changed owner in all re-shardings, warm-up included.
    switch_BL : float64 [B, L], what moves of owners and new kept replicas take of ``weights_BL``.
    work_BL : the layers of each judged step for :func:`poise.simulate.training.rank_step`; empty unless asked for.
    """

    compute_BL: NDArray[np.float64]
    exchange_BL: NDArray[np.float64]
    weights_BL: NDArray[np.float64]
    control_BL: NDArray[np.float64]
    reshard_B: NDArray[np.float64]
    tokens_BLD: NDArray[np.int64]
    moved_BL: NDArray[np.float64]
    exposed_BL: NDArray[np.float64]
    replicas_BLD: NDArray[np.int64]
    attention_s: float
    rest_s: float
    owner_LE: NDArray[np.int64]
    moved_owners: int
    switch_BL: NDArray[np.float64]
    work_BL: tuple[tuple[LayerWork, ...], ...]

    @property
    def layers_B(self) -> NDArray[np.float64]:
        """Seconds of the MoE layers and re-sharding of each step, float64 [B]."""
        out: NDArray[np.float64] = (self.compute_BL + self.exchange_BL + self.weights_BL + self.control_BL).sum(axis=1)
        return out + self.reshard_B

    @property
    def step_seconds_B(self) -> NDArray[np.float64]:
        """Seconds of each step, float64 [B]."""
        return self.layers_B + self.attention_s + self.rest_s

    @property
    def imbalance(self) -> float:
        """Mean over steps and layers of max / mean tokens over devices."""
        mean = self.tokens_BLD.mean(axis=2)
        return float((self.tokens_BLD.max(axis=2)[mean > 0] / mean[mean > 0]).mean())


def replay_training(
    traffic: SourceLoads,
    loop: FastLoop,
    price: StepPrice,
    *,
    sharding: ShardingPolicy | None = None,
    first_reshard: int = WARM_UP,
    warm_up: int = WARM_UP,
    rest_s: float = 0.0,
    by_rank: bool = False,
    foresight: Foresight | None = None,
) -> TrainingReplay:
    """Run a policy over a batch of training steps; the first ``warm_up`` steps run but are not judged.

    Parameters
    ----------
    traffic : counts by source.
    loop : policy, step slots and predictor; seconds that were measured before the run replace the price's.
    price : of :func:`poise.cost.weights.training_price`.
    sharding : owners; they start as :func:`poise.stepwise.sharding.even_sharding`, are planned at step
        ``first_reshard`` and then every ``interval`` steps; on ranks the first time comes after ``interval`` steps.
        None: even, for good.
    rest_s : seconds of the dense rest of a step.
    by_rank : keep what every rank does (``work_BL``): a few [D, D] arrays a layer and step.
    foresight : a record of the steps; any policy's predicted loads are then those of the record, and owners are planned
        from the ``interval`` steps to come. A record that is replayed must be the traffic.

    Raises
    ------
    OptionError : shapes that disagree, a serving price, or too few steps. PlacementError : a plan breaks an invariant.
    """
    steps, layers, sources, experts = traffic.load_BLSE.shape
    if not price.training:
        raise OptionError("the replay of training needs a training price", hint="poise.cost.weights.training_price")
    if sources != price.cluster.num_devices or experts != price.model.num_experts:
        raise OptionError(
            f"traffic has {sources} sources and {experts} experts, cluster and model {price.cluster.num_devices} and"
            f" {price.model.num_experts}"
        )
    if not 0 <= warm_up < steps:
        raise OptionError(f"{warm_up} warm-up steps cannot be left out of {steps}", hint="use more steps")
    if foresight is not None:
        recorded = foresight.loads.load_BLSE
        if recorded.shape != traffic.load_BLSE.shape:
            raise OptionError(f"the record has shape {recorded.shape}, the traffic {traffic.load_BLSE.shape}")
        if foresight.replayed and not np.array_equal(recorded, traffic.load_BLSE):
            pairs = int(np.abs(recorded.astype(np.int64) - traffic.load_BLSE).sum())
            raise OptionError(
                f"the record and the traffic differ by {pairs} of {int(traffic.load_BLSE.sum(dtype=np.int64))} pairs",
                hint="routing that is replayed is the traffic; replayed=False for a forecast",
            )
    owners = even_sharding(layers, experts, sources)
    run = _TrainingRun(traffic, loop, price, sharding or Even(), owners, by_rank, foresight)
    for step in range(steps):
        run.reshard(step, first_reshard)
        for layer in range(layers):
            run.layer(step, layer)
    return run.result(warm_up, rest_s)


class _TrainingRun:
    """Arrays that a replay fills; owners, and holders that live from step to step."""

    def __init__(
        self,
        traffic: SourceLoads,
        loop: FastLoop,
        price: StepPrice,
        sharding: ShardingPolicy,
        owner_LE: NDArray[np.int64],
        by_rank: bool,
        foresight: Foresight | None = None,
    ) -> None:
        if loop.window_s is not None:
            price = replace(price, window_s=loop.window_s)
        if loop.control_s is not None:
            price = replace(price, control_s=loop.control_s)
        self.traffic, self.loop, self.price, self.sharding = traffic, loop, price, sharding
        self.owner_LE, self.moved_owners, self.foresight = owner_LE, 0, foresight
        self.keeps = loop.policy.keeps_in_training
        batch = traffic.batch()
        self.load_BLE = batch.load_BLE
        self.predicted_BLE = loop.predictor.predict_BLE(batch)
        steps, layers, devices, _ = traffic.load_BLSE.shape
        names = ("compute", "exchange", "weights", "control", "moved", "exposed", "switch")
        self.out = {name: np.zeros((steps, layers)) for name in names}
        self.tokens_BLD = np.zeros((steps, layers, devices), np.int64)
        self.replicas_BLD = np.zeros((steps, layers, devices), np.int64)
        self.reshard_B = np.zeros(steps)
        self.drivers = self._drivers()
        self.work: list[list[LayerWork]] | None = [[] for _ in range(steps)] if by_rank else None
        self.last = layers - 1

    def _drivers(self) -> list[LayerDriver]:
        """One a layer, from the present owners on."""
        devices, loop = self.price.cluster.num_devices, self.loop
        return [LayerDriver(loop.policy, owned_ED(owner_E, devices), step_slots=loop.step_slots, layer=layer)
                for layer, owner_E in enumerate(self.owner_LE)]  # fmt: skip

    def reshard(self, step: int, first: int) -> None:
        interval = self.sharding.interval
        if not interval or step < first or (step - first) % interval:
            return
        ahead, devices = self.foresight, self.price.cluster.num_devices
        if ahead is None:
            load_LE = lasting_load(self.load_BLE[:step])
            samples = LoadSamples.of_history(list(self.load_BLE[:step].swapaxes(0, 1)), devices)
        else:
            load_LE = ahead.coming(step, interval)
            samples = LoadSamples.of_record(ahead.loads.load_BLSE[step : step + interval], ahead.replayed)
        price = OwnerSeconds(self.loop.policy, self.loop.step_slots, self.price, samples)
        new = decided(self.sharding, load_LE, self.owner_LE, price)
        changed = moves(self.owner_LE, new)
        if not len(changed):
            return
        check_sharding(new, devices)
        seconds = reshard_seconds(self.owner_LE, new, self.price)
        self.reshard_B[step : step + interval] += seconds / interval
        self.owner_LE, self.moved_owners = new, self.moved_owners + len(changed)
        self.drivers = self._drivers()

    def layer(self, step: int, layer: int) -> None:
        price, cluster, driver = self.price, self.price.cluster, self.drivers[layer]
        load_SE = self.traffic.load_BLSE[step, layer].astype(np.int64)
        if not load_SE.any():
            if self.work is not None:
                none = np.zeros((cluster.num_devices,) * 2)
                self.work[step].append(LayerWork(none, none[0]))
            return
        if self.foresight is None:
            early_ED = driver.choose(self._known(step, layer))
            view = driver.view(step, self.predicted_BLE[step, layer], self.load_BLE[:step, layer], price)
        else:
            known = self.foresight.of(step, layer)
            told_E = known.load_SE.sum(axis=0).astype(np.float64)
            view = driver.view(step, told_E, self.load_BLE[:step, layer], price, known)
            early_ED = driver.choose(view)
        done = driver.finish(view, early_ED, load_SE)
        again = self._again(layer)
        cost = layer_seconds(done, load_SE, price, again=again, keeps=self.keeps)
        at, plan = (step, layer), done.plan
        self.tokens_BLD[at], self.replicas_BLD[at] = plan.quota_ED.sum(axis=0), cost.replicas_ED.sum(axis=0)
        for name, value in (
            ("compute", cost.compute_s), ("exchange", cost.exchange_s), ("weights", cost.shown_s + cost.switch_s),
            ("control", cost.control_s), ("switch", cost.switch_s), ("moved", cost.moved), ("exposed", cost.exposed),
        ):  # fmt: skip
            self.out[name][at] = value
        if self.work is not None:
            work_D = device_compute(plan.quota_ED.astype(np.float64), cluster, price.model)
            bytes_DD = np.multiply(cost.pairs_DD, float(price.model.dispatch_bytes_per_token))
            before, after, back = (_rounds(moves, size, price) for moves, size in cost.transfers)
            self.work[step].append(LayerWork(bytes_DD, work_D, before, after, back, again))

    def _known(self, step: int, layer: int) -> LayerView:
        """What a policy may look at before the gate."""
        load_BE, price = self.load_BLE[: step + 1, layer], self.price
        pairs = load_BE[-2].sum() if step else 1.0
        if not step and self.loop.window_s is None:
            price = replace(price, window_s=min(price.window_s, window_seconds(1.0, price.cluster, price.model)))
        predicted_E = self.predicted_BLE[step, layer] * (pairs / load_BE[-1].sum())
        return self.drivers[layer].view(step, predicted_E, load_BE[:-1], price)

    def _again(self, layer: int) -> bool:
        """Replicas are freed and gathered again; not of the last layer, whose backward comes at once."""
        return self.price.rematerialise and not self.keeps and layer < self.last

    def result(self, first: int, rest_s: float) -> TrainingReplay:
        out = {name: value[first:] for name, value in self.out.items()}
        attention_s = 3.0 * self.price.window_s * self.traffic.load_BLSE.shape[1]
        return TrainingReplay(
            out["compute"], out["exchange"], out["weights"], out["control"], self.reshard_B[first:],
            self.tokens_BLD[first:], out["moved"], out["exposed"], self.replicas_BLD[first:], attention_s, rest_s,
            self.owner_LE, self.moved_owners, out["switch"],
            tuple(tuple(layers) for layers in (self.work or [])[first:]),
        )  # fmt: skip


def _rounds(rounds: Moves, size: float, price: StepPrice) -> Rounds:
    """Bytes of each round, float64 [D, D]."""
    out = []
    for one in rounds:
        bytes_DD = np.zeros((price.cluster.num_devices,) * 2)
        for move in one:
            bytes_DD[move.source, move.target] += size
        out.append(bytes_DD)
    return tuple(out)
