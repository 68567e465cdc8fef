"""Maps that a verdict rests on: planned on each of two windows, judged on the other, priced with all they cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import cast

import numpy as np
from numpy.typing import NDArray

from poise.cost.perturb import gain_range
from poise.cost.pricing import Pricing
from poise.cost.rest import rest_bytes, rest_seconds
from poise.cost.split import Split
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import flow_of, ground, settle
from poise.planning.budget import Budget
from poise.planning.engine_rules import EngineRules, hold
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, Progress, deal_slots
from poise.planning.provenance import Provenance
from poise.planning.solve.solve import solve
from poise.replay.breakeven import SIZES, contiguous_blocks
from poise.replay.moving import moving
from poise.replay.redealt import redealt
from poise.replay.rows import FEWER, uneven_homes
from poise.replay.verdict import MapPrice, PhaseVerdict, TriedMap, choose, decide
from poise.replay.windows import PhaseTraffic
from poise.routing.batch import RoutingBatch
from poise.routing.fingerprint import fingerprint
from poise.routing.trace import RoutingTrace
from poise.util.errors import InfeasibleError, NoResultError, OptionError
from poise.version import VERSION

TRIED_METHODS = ("eplb", "poise")
"""The engine's own first: where both save the same, it is taken."""
SLOTS_A_RANK = (0, 1, 2, 4)
MOST_PICKED = 2**28
"""Picks times devices of a batch for the break-even: larger ones are not tried."""
BREAK_EVEN_STEPS = 4
REDEALT_STEPS = 8
"""Steps of a window that are dealt anew to experts, at least: those of fewer several times."""
Maps = tuple[Placement, Placement]
Batches = tuple[RoutingBatch, RoutingBatch]


@dataclass(frozen=True, slots=True, eq=False)
class TrialSetting:
    """What all phases have in common.

    Parameters
    ----------
    cluster, model, engine : the machine as it was named (constants may be open), sizes, and who holds the maps.
    current : what runs now; None: contiguous blocks.
    redundant : numbers of redundant slots to try; None: 0, 1, 2 and 4 a rank, those that engine and memory can hold.
    context : tokens that a decoded token attends to, or of a prompt.
    seed : of the search.
    split : how tokens of replicas are split.
    """

    cluster: Cluster
    model: ModelSpec
    engine: EngineRules
    current: Placement | None = None
    redundant: int | None = None
    context: int = 4096
    seed: int = 0
    split: Split = "even"

    def slots_to_try(self, num_experts: int) -> list[int]:
        """Numbers of redundant slots, ascending.

        Raises
        ------
        OptionError : the number that was asked for is not possible on this engine, or does not fit into memory.
        """
        devices = self.cluster.num_devices
        if self.redundant is not None:
            slots_D = deal_slots(num_experts, self.redundant, devices)
            self.engine.check_slots(slots_D, num_experts)
            if self.redundant and not self.fits(int(slots_D.max())):
                raise OptionError(
                    f"{slots_D.max()} slots a rank in {self.model.num_moe_layers} layers and the rest of "
                    f"{self.model.name} take {self.held_bytes(int(slots_D.max())) / 2**30:.1f} GiB, a rank has "
                    f"{self.cluster.memory_bytes / 2**30:.1f}",
                    hint="fewer redundant slots, or more ranks",
                )
            return [self.redundant]
        least = -num_experts % devices if self.engine.equal_slots else 0
        wanted = [least + many * devices for many in SLOTS_A_RANK]
        out = []
        for many in wanted:
            total = num_experts + many
            if total > num_experts * devices or (many and not self.engine.replicas):
                continue
            if many == least or self.fits(-(-total // devices)):
                out.append(many)
        if not out:
            raise OptionError(
                f"{self.engine.name} holds every expert once, and {num_experts} experts do not divide by "
                f"{devices} ranks",
                hint="another number of ranks",
            )
        return out

    def held_bytes(self, slots: int) -> float:
        """Bytes of a rank's weights with so many slots a layer."""
        return slots * self.model.num_moe_layers * self.model.expert_bytes + rest_bytes(self.model)

    def fits(self, slots: int) -> bool:
        """Whether they leave memory for anything else."""
        return self.held_bytes(slots) < self.cluster.memory_bytes


@dataclass(frozen=True, slots=True, eq=False)
class JudgedPhase:
    """A phase with the maps that were made for it, by method and number of redundant slots."""

    traffic: PhaseTraffic
    batches: Batches
    cluster: Cluster
    current: Placement
    maps: dict[tuple[str, int], Maps]
    verdict: PhaseVerdict

    @property
    def chosen(self) -> Maps:
        """Those that the verdict's figures are of."""
        return self.maps[self.verdict.chosen.method, self.verdict.chosen.redundant]

    def with_other(self, other: JudgedPhase | None, setting: TrialSetting) -> PhaseVerdict:
        """The verdict with what its map saves in a step of another phase, if there is one."""
        if other is None:
            return self.verdict
        gains = [gain.mean() for gain in _gains(self.chosen, other.batches, other.current, other.cluster, setting)]
        return replace(self.verdict, other_phase_s=float(sum(gains)) / 2.0)


def judge_phase(
    traffic: PhaseTraffic, setting: TrialSetting, budget: Budget, *, progress: Progress | None = None
) -> JudgedPhase:  # fmt: skip
    """Plan on each window, judge on the other, and decide.

    Raises
    ------
    OptionError : what runs now, or the redundant slots asked for, do not fit cluster, engine or traffic.
    NoResultError : no method has a map for these shapes.
    """
    model, engine = setting.model, setting.engine
    batches = traffic.batch(0), traffic.batch(1)
    experts = batches[0].num_experts
    tokens = sum(batch.mean_tokens() for batch in batches) / 2.0
    cluster = settle(setting.cluster, model, tokens, engine=engine.kernels)
    current = _current(setting, batches[0], cluster)
    slots = setting.slots_to_try(experts)
    notes = [
        *traffic.notes,
        *uneven_homes(batches[1], cluster.num_devices),
        *_sampled(batches),
        *_repeated(traffic, batches),
    ]
    if not setting.fits(-(-(experts + slots[0]) // cluster.num_devices)):
        notes.append(f"{model.name} does not fit into {cluster.memory_bytes / 2**30:.0f} GiB a rank")
    plans = len(slots) * len(TRIED_METHODS) * 2
    tried: list[TriedMap] = []
    maps: dict[tuple[str, int], Maps] = {}
    for turn, many in enumerate(slots, 1):
        for method in TRIED_METHODS:
            if progress:
                progress(f"{traffic.phase}, {many} redundant, {method}", len(tried) * 2 / plans)
            try:
                found = _plans(
                    batches, method, many, cluster, setting, budget.part(1.0 / len(slots), until=turn / len(slots))
                )
            except (InfeasibleError, NoResultError) as error:
                notes.append(f"{method} with {many} redundant slots left out: {error.message}")
                continue
            maps[method, many] = found
            tried.append(TriedMap(method, many, _gains(found, batches, current, cluster, setting)))
    if not tried:
        raise NoResultError("no method has a map for these shapes: " + "; ".join(notes))
    now = [_seconds(batch, current, cluster, setting).mean() for batch in batches]
    layer_s, layers = float(sum(now)) / 2.0, model.num_moe_layers
    rest = rest_seconds(model, cluster, tokens, context=setting.context, decode=traffic.phase == "decode")
    if rest.unknown:
        notes.append(f"{model.name} does not say how large its {', '.join(rest.unknown)} are: they count nothing")
    if batches[0].num_layers < layers:
        notes.append(f"{batches[0].num_layers} of {layers} MoE layers were recorded: the others are taken to be alike")
    step_s = layers * layer_s + rest.total_s
    best = choose(tried, FEWER * step_s / layers)
    chosen = maps[best.method, best.redundant]
    worst_s = _worst(chosen, batches, current, cluster, setting)
    advice, reason = decide(best, len(tried), worst_s, layers, step_s)
    least, sizes = _break_even(traffic, chosen[0], current, setting)
    verdict = PhaseVerdict(
        traffic.phase, advice, reason, tokens, best, tuple(tried), layers, layer_s, rest, worst_s,
        map_price(current, chosen[1], cluster, model), least, sizes, None, ground(cluster),
        _with_provenance(chosen[1], traffic, best.method, setting), tuple(notes),
        _redealt_s(chosen, batches, current, cluster, setting),
    )  # fmt: skip
    return JudgedPhase(traffic, batches, cluster, current, maps, verdict)


def _with_provenance(placed: Placement, traffic: PhaseTraffic, method: str, setting: TrialSetting) -> Placement:
    """The plan of the later window, its file told what it was fitted on."""
    later = traffic.windows[1]
    about = {"traffic": later.name, "version": VERSION, "seed": str(setting.seed), "engine": setting.engine.name,
             "method": method, "phase": traffic.phase}  # fmt: skip
    if setting.split != "even":
        about["split"] = setting.split
    return replace(placed, fitted=Provenance(fingerprint(later), about))


def _current(setting: TrialSetting, batch: RoutingBatch, cluster: Cluster) -> Placement:
    """What runs now, as the engine holds it."""
    given = setting.current
    if given is None:
        return contiguous_blocks(batch, cluster)
    have = given.num_layers, given.num_experts, given.num_devices
    want = batch.num_layers, batch.num_experts, cluster.num_devices
    if have != want:
        raise OptionError(
            f"the map that runs now has [layers, experts, devices] {have}, traffic and cluster {want}",
            hint="is --current of this model and cluster?",
        )
    if (given.layer_ids_L != batch.layer_ids_L).any():
        raise OptionError(
            f"the map that runs now is of decoder layers {given.layer_ids_L.tolist()[:8]}, the traffic of "
            f"{batch.layer_ids_L.tolist()[:8]}"
        )
    return hold(given, setting.engine)[0]


def _sampled(batches: Batches) -> list[str]:
    return [f"of a window {batch.sampled} are priced" for batch in batches if batch.sampled]


def _repeated(traffic: PhaseTraffic, batches: Batches) -> list[str]:
    """Windows of which one step takes more tokens than they have: their requests are drawn again to fill it."""
    return [
        f"a step of {batch.mean_tokens():,.0f} tokens is more than the {one.num_tokens:,} of {one.name}: its requests "
        "are drawn again and again, and what others would do is not in it"
        for one, batch in zip(traffic.windows, batches, strict=True)
        if isinstance(one, RoutingTrace) and batch.mean_tokens() > one.num_tokens
    ]


def _pricing(batch: RoutingBatch, cluster: Cluster, setting: TrialSetting) -> Pricing:
    flow = cast(DataFlow, flow_of(cluster)) if batch.has_tokens else "home"
    return Pricing(cluster, setting.model, flow, setting.split)


def _plans(
    batches: Batches, method: str, redundant: int, cluster: Cluster, setting: TrialSetting, budget: Budget
) -> Maps:  # fmt: skip
    """The plans of both windows."""
    slots_D = deal_slots(batches[0].num_experts, redundant, cluster.num_devices)
    problems = [
        PlacementProblem(batch, cluster, setting.model, slots_D, price.traffic, price.split, engine=setting.engine)
        for batch in batches
        for price in (_pricing(batch, cluster, setting),)
    ]
    first, second = (
        solve(problem, method=method, time_limit_s=budget.part(0.5, until=until), seed=setting.seed).placement
        for problem, until in zip(problems, (0.5, 1.0), strict=True)
    )
    return first, second


def _seconds(batch: RoutingBatch, placed: Placement, cluster: Cluster, setting: TrialSetting) -> NDArray[np.float64]:
    """Seconds of one layer of each step, mean over layers, float64 [B]."""
    cost = _pricing(batch, cluster, setting).cost(batch, placed.count_LED())
    out: NDArray[np.float64] = cost.seconds_BL.mean(axis=1)
    return out


def _gains(
    maps: Maps, batches: Batches, current: Placement, cluster: Cluster, setting: TrialSetting
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds of one layer that each step saves under the map of the other window."""

    def gain(batch: RoutingBatch, placed: Placement) -> NDArray[np.float64]:
        return _seconds(batch, current, cluster, setting) - _seconds(batch, placed, cluster, setting)

    return gain(batches[1], maps[0]), gain(batches[0], maps[1])


def _redealt_s(maps: Maps, batches: Batches, current: Placement, cluster: Cluster, setting: TrialSetting) -> float:
    """Seconds of one layer that the maps save where other experts are hot, mean over steps of both windows."""
    groups, gains = setting.model.num_expert_groups, []
    for seed in range(ceil(REDEALT_STEPS / min(batch.num_steps for batch in batches))):
        dealt = redealt(batches[0], groups, 2 * seed), redealt(batches[1], groups, 2 * seed + 1)
        gains += [one.mean() for one in _gains(maps, dealt, current, cluster, setting)]
    return float(np.mean(gains))


def _worst(maps: Maps, batches: Batches, current: Placement, cluster: Cluster, setting: TrialSetting) -> float:
    """Mean of the least gains of both directions, each over all combinations of the constants' errors: no combination
    gives less, and some may give more.
    """
    least = [
        gain_range(batch, current.count_LED(), placed.count_LED(), _pricing(batch, cluster, setting)).least_s
        for batch, placed in ((batches[1], maps[0]), (batches[0], maps[1]))
    ]
    return sum(least) / 2.0


def map_price(current: Placement, after: Placement, cluster: Cluster, model: ModelSpec) -> MapPrice:
    """What going from one map to another costs on a cluster, for all MoE layers of a model: those of the maps are taken
    for all.
    """
    moves, scale = moving(current, after, cluster.node_D), model.num_moe_layers / after.num_layers
    more_D = after.slots_D - current.slots_D
    slot_bytes = float(more_D.max()) * model.num_moe_layers * model.expert_bytes
    cache = model.kv_bytes_per_token_layer * model.num_hidden_layers
    tokens = ceil(slot_bytes / cache) if cache > 0 else None
    return MapPrice(scale * moves.fetched * model.expert_bytes, moves.seconds(cluster, scale * model.expert_bytes),
                    slot_bytes, tokens)  # fmt: skip


def _break_even(
    traffic: PhaseTraffic, after: Placement, current: Placement, setting: TrialSetting
) -> tuple[int | None, tuple[int, ...]]:
    """Least batch from which on the first window's map gains on the second one at every larger size; sizes tried."""
    sizes = _sizes(traffic, setting)
    least = None
    for tokens in reversed(sizes):
        if saved_at(traffic.batch(1, tokens, BREAK_EVEN_STEPS), current, after, setting) <= 0:
            break
        least = tokens
    return least, tuple(sizes)


def pricing_at(batch: RoutingBatch, setting: TrialSetting) -> Pricing:
    """What prices a batch: the constants for its size."""
    cluster = settle(setting.cluster, setting.model, batch.mean_tokens(), engine=setting.engine.kernels)
    return _pricing(batch, cluster, setting)


def saved_at(batch: RoutingBatch, current: Placement, after: Placement, setting: TrialSetting) -> float:
    """Share of the MoE time that one map saves over another, with the constants for the size of this batch."""
    cluster = pricing_at(batch, setting).cluster
    now, then = (_seconds(batch, placed, cluster, setting).mean() for placed in (current, after))
    return float(1.0 - then / now)


def _sizes(traffic: PhaseTraffic, setting: TrialSetting) -> list[int]:
    """Batches that are tried; of traces, which take longer the more tokens they have, those that are not too large."""
    one = traffic.windows[1]
    if not isinstance(one, RoutingTrace):
        return list(SIZES)
    each = one.num_layers * one.top_k * setting.cluster.num_devices
    return [tokens for tokens in SIZES if tokens * each <= MOST_PICKED] or [SIZES[0]]
