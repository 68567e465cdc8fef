"""The way from one placement to another, in the order in which its moves pay back, and where it stops to pay.

Step 1  Again and again the change of a layer is taken that lowers the modelled seconds of a step most per fetched
        expert: a chain of moves (:mod:`poise.control.chains`), a drop, or all that is left of the layer. After each a
        valid placement serves: an expert whose last copy leaves a device comes to another one in the same change.
Step 2  A change may pay only for what it lets follow. Changes of a layer that pay less than those behind them are made
        one with these, so that seconds saved per fetched expert only fall along a layer. Then layers are merged, best
        first: no other order of these legs has saved more at any number of fetches that is one of its own (a chain
        of each layer, as in Sidney 1975). Layers in which tokens stay depend on each other: there step 1's order holds.
Step 3  What lowers nothing is left for last, a change a layer.
Step 4  Moves take ports from tokens (:mod:`poise.control.price`). The way is gone as far as steps of a horizon save
        most beyond what they then wait.

Chains are tried one by one as far as :data:`FINE` and the clock of a budget go, layers as a whole after that: trying
takes time. Where routing groups must lie whole, layers always go as a whole: a chain could tear a group.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.control.chains import LayerMoves, after_chain, count_fetched
from poise.control.price import PortTraffic
from poise.cost.links import PortLoad, pair_ports
from poise.cost.split import even_share
from poise.planning.budget import Budget
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.effort import price_seconds, some_steps
from poise.replay.moving import moving
from poise.routing.batch import RoutingBatch
from poise.routing.trace import NO_EXPERT
from poise.util.errors import OptionError, PlacementError

SHORTLIST = 8
"""Chains of a layer that are priced in full at a time; the rest are behind them by their effect on device loads."""
MOST_LEAVERS = 4
"""Leavers of a full device that are tried for each arrival."""
FINE = 4e7
"""Slots of experts on devices, over all chains that are looked at, until layers go as a whole: seconds of one core."""


class Leg(NamedTuple):
    """A change of one layer after which a valid placement serves.

    Parameters
    ----------
    layer : row in the placement.
    fetched : experts that come to a device.
    gain_s : seconds of a step that it saves after those before it; below 0: it costs.
    count_ED : slots of each expert on each device afterwards, int [E, D].
    """

    layer: int
    fetched: int
    gain_s: float
    count_ED: NDArray[Any]

    @property
    def rate(self) -> float:
        """Seconds saved per fetched expert; a change without fetches comes before all others."""
        return self.gain_s / self.fetched if self.fetched else float(np.copysign(np.inf, self.gain_s))


@dataclass(frozen=True, slots=True, eq=False)
class Migration:
    """Changes from ``before`` to ``after``, in the order in which they pay back.

    Parameters
    ----------
    before, after : placements of one shape.
    legs : module docstring.
    gain_K, fetched_K : seconds of a step saved, and experts fetched, after none, one, ... all K legs; [K + 1].
    """

    before: Placement
    after: Placement
    legs: tuple[Leg, ...]

    @property
    def gain_K(self) -> NDArray[np.float64]:
        """Seconds of a step saved after none, one, ... all K legs, [K + 1]."""
        return np.cumsum([0.0, *(each.gain_s for each in self.legs)])

    @property
    def fetched_K(self) -> NDArray[np.int64]:
        """Experts fetched after so many."""
        return np.cumsum([0, *(each.fetched for each in self.legs)])

    def placement(self, count: int) -> Placement:
        """After the first ``count`` legs; ``after`` itself after all."""
        if count == len(self.legs):
            return self.after
        count_LED = self.before.count_LED().copy()
        for each in self.legs[:count]:
            count_LED[each.layer] = each.count_ED
        return _placed(count_LED, self.before, self.after)

    def by_layer(self) -> list[list[tuple[int, NDArray[Any]]]]:
        """Of each layer: number of each of its legs, and its slots afterwards."""
        out: list[list[tuple[int, NDArray[Any]]]] = [[] for _ in range(self.before.num_layers)]
        for number, each in enumerate(self.legs):
            out[each.layer].append((number, each.count_ED))
        return out

    def upto(self, count: int) -> Migration:
        """The way as far as its first ``count`` legs."""
        return Migration(self.before, self.placement(count), self.legs[:count])

    def delay_K(self, traffic: PortTraffic, expert_bytes: float) -> NDArray[np.float64]:
        """Seconds that steps wait in all for the moves of none, one, ... all legs, each sent on its own; [K + 1]."""
        plan = moving(self.before, self.after, traffic.cluster.node_D)
        source = [{(move.expert, move.target): move.source for move in layer} for layer in plan.transfers]
        have_LED = self.before.count_LED() > 0
        sent: list[list[tuple[int, int]]] = [[]]
        for each in self.legs:
            came = np.argwhere((each.count_ED > 0) & ~have_LED[each.layer]).tolist()
            sent.append([(source[each.layer][e, d], d) for e, d in came if (e, d) in source[each.layer]])
            have_LED[each.layer] = each.count_ED > 0
        load = pair_ports(sent, traffic.cluster)
        so_far = (np.cumsum(getattr(load, field.name), axis=0) for field in fields(PortLoad))
        return traffic.delay_s(PortLoad(*so_far), expert_bytes)

    def fetches_for(self, share: float) -> int:
        """Fewest fetches after which this share of what the whole way saves is saved; all where it saves nothing."""
        enough = self.gain_K >= share * self.gain_K[-1]
        return int(self.fetched_K[np.argmax(enough)]) if self.gain_K[-1] > 0 else int(self.fetched_K[-1])

    def pays(self, traffic: PortTraffic, expert_bytes: float, horizon_steps: float) -> int:
        """Changes to make: so many that ``horizon_steps`` steps save most beyond what they wait (step 4)."""
        net_K = horizon_steps * self.gain_K - self.delay_K(traffic, expert_bytes)
        return int(np.argmax(net_K))


def same_slots(before: Placement, after: Placement) -> NDArray[np.int64]:
    """Slots of each device, int [D]; PlacementError if the placements differ in shape or in the slots of a device."""
    before.diff(after)
    if before.num_devices != after.num_devices:
        raise PlacementError(f"{before.num_devices} devices before and {after.num_devices} after")
    mine, theirs = before.slots_D, after.slots_D
    if (mine != theirs).any():
        d = int(np.argmax(mine != theirs))
        raise PlacementError(f"device {d} has {mine[d]} slots before and {theirs[d]} after")
    return mine


def same_shape(before: Placement, after: Placement) -> bool:
    """Whether there is a way: as many devices, with the same slots."""
    return before.num_slots == after.num_slots and bool((before.slot_device_S == after.slot_device_S).all())


def paid_back(
    problem: PlacementProblem, before: Placement, after: Placement, budget: Budget, *, named: bool
) -> dict[str, Any] | None:
    """What ``poise plan --current`` says of the way: fetches, seconds of a step saved and waited for, leg by leg.

    None where there is no way that a running engine goes (other slots, or placements that are new expert ids), or
    where the budget was stopped. How far the way pays is left out where moves are free, and where what runs now tears
    routing groups that must lie whole: a stop would leave some torn.

    Parameters
    ----------
    budget : where all steps would take more than its nominal seconds, some are priced (``priced_on``); where its clock
        runs out, layers go as a whole (``cut_by_clock``).
    named : sizes are those of a model. Else what steps wait for moves is not known, nor how far the way pays.
    """
    if budget.stopped or problem.pooled or problem.engine.ids or not same_shape(before, after):
        return None
    layers = before.num_layers
    reach = layers if _skips(problem) else 3 if _depend(problem) else 1  # layers priced, and tried anew, after a leg
    tried = (SHORTLIST + 2) * reach * (before.diff(after).fetched * reach / layers + 1) + 2
    some = some_steps(problem, budget.seconds, tried * price_seconds(problem))
    made, late = migration(before, after, some, budget=budget), budget.left() <= 0
    traffic = PortTraffic.of(some.batch, before, some.pricing)
    steps, size, whole = problem.migration_steps, problem.model.expert_bytes, problem.whole
    torn = whole is not None and whole.must and bool(whole.torn_LG(before.count_LED()).any())
    out: dict[str, Any] = {
        "fetched": made.fetched_K.tolist(), "gain_seconds": made.gain_K.tolist(),
        "delay_seconds": made.delay_K(traffic, size).tolist() if named else None,
        "half": made.fetches_for(0.5), "most": made.fetches_for(0.9), "steps": steps,
        "pays": int(made.fetched_K[made.pays(traffic, size, steps)]) if named and steps > 0 and not torn else None,
    }  # fmt: skip
    if some is not problem:
        out["priced_on"] = some.batch.sampled
    if late:
        out["cut_by_clock"] = True
    return out


def migration(
    before: Placement, after: Placement, problem: PlacementProblem, *, max_moves: int | None = None,
    budget: Budget | None = None,
) -> Migration:  # fmt: skip
    """The legs from ``before`` to ``after``, priced on the problem's traffic.

    Parameters
    ----------
    max_moves : most experts fetched; the way then ends at :func:`bounded`.
    budget : once it is over, layers go as a whole; under ``stay`` in their own order.

    Raises
    ------
    PlacementError, OptionError : as :func:`bounded`.
    """
    if max_moves is not None:
        after = bounded(before, after, problem, max_moves)
    count_LED = before.count_LED().copy()
    legs = list(_legs(before, after, problem, None, budget))
    for each in legs:
        count_LED[each.layer] = each.count_ED
    if not _depend(problem):
        legs = _in_order(legs)
    every = range(before.num_layers)
    for layer in every:
        want_ED = after.count_LED()[layer]
        if (count_LED[layer] != want_ED).any():
            now, fetched = _seconds(problem, count_LED, layer, layer + 1), count_fetched(count_LED[layer], want_ED)
            count_LED[layer] = want_ED
            gain = now - _seconds(problem, count_LED, layer, layer + 1)
            legs.append(Leg(layer, fetched, gain, want_ED))
    return Migration(before, after, tuple(legs))


def _in_order(legs: list[Leg]) -> list[Leg]:
    """Step 2, of layers that do not depend on each other."""
    chains: dict[int, list[Leg]] = {}
    for each in legs:
        mine = chains.setdefault(each.layer, [])
        while mine and mine[-1].rate < each.rate:
            last = mine.pop()
            each = Leg(each.layer, last.fetched + each.fetched, last.gain_s + each.gain_s, each.count_ED)
        mine.append(each)
    return list(heapq.merge(*chains.values(), key=lambda each: -each.rate))


def bounded(before: Placement, after: Placement, problem: PlacementProblem, max_moves: int) -> Placement:
    """A placement on the way from one to the other that at most ``max_moves`` fetched experts lead to.

    Greedy: step 1, until nothing lowers the objective on the problem's traffic (:func:`poise.cost.step.batch_cost`) or
    fits. Layers are independent but for ``stay``, where a change counts in the next layer too. Called again from its
    result it goes on; ``after`` itself is returned where it fits and is as good. Without free slots experts change
    places in circles: a budget below the shortest circle leads nowhere, one that holds a layer's moves always to where
    no layer gains. Steps that empty a slot are taken only where the problem's engine may have empty slots, and parts of
    a layer only where no routing group must lie whole.

    Raises
    ------
    PlacementError : the placements differ in shape or slots, or do not fit the problem.
    OptionError : ``max_moves`` is negative.
    """
    if max_moves < 0:
        raise OptionError(f"max_moves must be at least 0, got {max_moves}")
    count_LED, want_LED = before.count_LED().copy(), after.count_LED()
    for each in _legs(before, after, problem, max_moves):
        count_LED[each.layer] = each.count_ED
    if before.diff(after).fetched <= max_moves:
        layers = before.num_layers
        if _seconds(problem, want_LED, 0, layers) <= _seconds(problem, count_LED, 0, layers):
            return after
    return _placed(count_LED, before, after)


def _placed(count_LED: NDArray[Any], before: Placement, after: Placement) -> Placement:
    return Placement.from_counts(count_LED, slots_D=before.slots_D, layer_ids_L=before.layer_ids_L, method=after.method)


def _legs(
    before: Placement, after: Placement, problem: PlacementProblem, max_moves: int | None, budget: Budget | None = None
) -> Iterator[Leg]:
    """Step 1; errors of :func:`bounded`."""
    slots_D = same_slots(before, after)
    problem.check(before)
    problem.check(after)
    count_LED, want_LED = before.count_LED().copy(), after.count_LED()
    left, layers = before.diff(after).fetched if max_moves is None else max_moves, range(before.num_layers)
    best: dict[int, Leg | None] = {}
    stale, work = set(layers), np.inf if max_moves is not None else FINE
    if problem.whole is not None and problem.whole.must:
        work = 0
    while not (_depend(problem) and budget is not None and budget.left() <= 0):
        stale |= {layer for layer, step in best.items() if step is not None and step.fetched > left}
        if work > 0:
            work -= sum(count_fetched(count_LED[each], want_LED[each]) for each in stale) * count_LED[0].size
            stale = stale if work > 0 else set(layers)
        for each in sorted(stale):
            work = 0 if budget is not None and budget.left() <= 0 else work
            best[each] = _best_leg(each, count_LED, want_LED, slots_D, problem, left, work > 0)
        able = {layer: step for layer, step in best.items() if step is not None}
        if not able:
            return
        layer = max(able, key=lambda each: (able[each].rate, able[each].gain_s, -each))
        left, count_LED[layer] = left - able[layer].fetched, able[layer].count_ED
        yield able[layer]
        stale = {layer} | ({layer - 1, layer + 1} & set(layers) if problem.traffic == "stay" else set())
        stale = set(layers) if _skips(problem) else stale


def _best_leg(
    layer: int, count_LED: NDArray[Any], want_LED: NDArray[Any], slots_D: NDArray[np.int64], problem: PlacementProblem,
    left: int, fine: bool,
) -> Leg | None:  # fmt: skip
    """The layer's best leg of ``left`` fetches at most, None if none saves anything. Not ``fine``: all of its rest."""
    have, found = count_LED[layer], None
    if (have == want_LED[layer]).all():
        return None
    load_E = problem.batch.weight_B @ problem.batch.load_BLE[:, layer]

    def roughness(count_ED: NDArray[Any]) -> float:
        return float(np.linalg.norm((load_E @ even_share(count_ED)) / problem.cluster.speed_D, 8))

    rough = roughness(have)
    steps = [want_LED[layer]] if not fine else _options(LayerMoves(have, want_LED[layer]), slots_D, load_E)
    if not problem.engine.empty_slots:  # the engine would fill what a step leaves empty
        steps = [each for each in steps if (each.sum(axis=0) >= have.sum(axis=0)).all()]
    every = [(count_fetched(have, each), each) for each in steps]
    options = [each for each in every if each[0] <= left]
    whole = [each for each in options[:1] if each[1] is steps[0]]  # if it fits, it is priced whatever its rank
    options.sort(key=lambda each: (roughness(each[1]) - rough) / max(each[0], 0.5))
    now = _seconds(problem, count_LED, layer, layer + 1)
    for fetched, option in options[:SHORTLIST] + whole:
        changed = count_LED.copy()
        changed[layer] = option
        leg = Leg(layer, fetched, now - _seconds(problem, changed, layer, layer + 1), option)
        if leg.gain_s > 1e-12 * now and (found is None or leg.rate > found.rate):
            found = leg
    return found


def _options(work: LayerMoves, slots_D: NDArray[np.int64], load_E: NDArray[np.float64]) -> list[NDArray[Any]]:
    """Counts [E, D] after every chain, with and without the copies it makes needless, every drop, and all of it."""
    have, want, room = work.have_ED, work.want_ED, (slots_D - work.have_ED.sum(axis=0)).tolist()
    chains = []
    for d, comers in enumerate(work.comers_D):
        leavers: list[int | None] = [None]
        if room[d] < 1 and work.leavers_D[d]:
            by_load = sorted(work.leavers_D[d], key=lambda x: (load_E[x] / work.copies_E[x], x))
            picks = np.unique(np.linspace(0, len(by_load) - 1, MOST_LEAVERS).round().astype(int))
            leavers = [by_load[i] for i in picks]
        chains += [work.chain(e, d, room, [1] * len(room), leaver=x) for e in sorted(comers) for x in leavers]
    options = [want]
    for links in filter(None, chains):
        after = after_chain(have, links)
        options.append(after)
        trimmed = after.copy()
        for link in links:
            for at in np.flatnonzero(trimmed[link.expert] > want[link.expert]):
                trimmed[link.expert, at] -= int(trimmed[link.expert].sum() > 1)
        if (trimmed != after).any():
            options.append(trimmed)
    for d, gone in enumerate(work.leavers_D):
        for x in (each for each in sorted(gone) if work.copies_E[each] > 1):
            options.append(have.copy())
            options[-1][x, d] -= 1
    return options


def _skips(problem: PlacementProblem) -> bool:
    """Whether tokens stay where they are over more than one layer, so that a change reaches further than the next."""
    ids = problem.batch.experts_TLK
    return problem.traffic == "stay" and ids is not None and bool((ids[:, :, 0] == NO_EXPERT).any())


def _seconds(problem: PlacementProblem, count_LED: NDArray[Any], first: int, last: int) -> float:
    """Expected seconds of a step in layers first to last - 1, and in the one behind them where it depends on them."""
    batch, stay = problem.batch, problem.traffic == "stay"
    part = slice(max(0, first - 1) if stay else first, min(batch.num_layers, last + 1) if stay else last)
    part = slice(0, batch.num_layers) if _skips(problem) else part
    experts = None if batch.experts_TLK is None else np.ascontiguousarray(batch.experts_TLK[:, part])
    some = RoutingBatch(
        batch.load_BLE[:, part], batch.weight_B, batch.top_k, batch.layer_ids_L[part], experts, batch.start_B,
        batch.request_T, batch.home_T, homes=batch.homes,
    )  # fmt: skip
    cost = problem.pricing.cost(some, count_LED[part])
    return float(batch.weight_B @ cost.seconds_BL[:, first - part.start :].sum(axis=1))


def _depend(problem: PlacementProblem) -> bool:
    """Whether a change of a layer counts in others too."""
    return problem.traffic == "stay"
