"""Where ``poise-near`` goes: targets, the way to each in batches, and what it costs to go there.

Step 1  Targets: the node-first plan of training (:mod:`poise.stepwise.poise.gathers`), on one node the surplus fill
        (:mod:`poise.stepwise.poise.surplus`), and the present holders, each improved by a descent that may add holders
        (:mod:`poise.stepwise.poise.spread`).
Step 2  The way to a target is a row of batches (:mod:`poise.stepwise.poise.batches`), what is inside nodes first or
        along with what crosses the network. Each takes windows in which the holders before it serve, less what is
        dropped for it; a way may end after any batch.
Step 3  Of all ways, the one that takes least in ``horizon`` steps, if it beats staying by ``margin``. Its first batch
        comes at once instead, exposed, if it gains twice as much as that exposes in the steps that it would take in the
        background, and in what is left of the horizon.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import compiled_price, fetch_seconds
from poise.stepwise.methods.split import spread_evenly
from poise.stepwise.poise.batches import Way, next_batch
from poise.stepwise.poise.gathers import OwnedLayer, plan_layer, tried_counts
from poise.stepwise.poise.node_split import source_tokens
from poise.stepwise.poise.outlook import Site, descended, expected_loads, improved, planned_tokens
from poise.stepwise.poise.spread import Spread, even_seconds
from poise.stepwise.poise.surplus import filled_by_work
from poise.util.compiled import plain

STAGES = 16
"""Most batches of a way."""
TARGETS = 2
"""Targets to which a way is priced."""
SURE = 2.0
"""How many times over an exposed fetch must pay: predicted gains of the first steps are too large."""
UNSEEN = 1e9
"""A window in which every gather hides: targets are chosen as if their weights were there."""


class FirstBatch(NamedTuple):
    """What to fetch next, bool [E, D] each.

    Parameters
    ----------
    coming_ED, dropped_ED : what comes, and what goes for it.
    gain_s : predicted seconds a step once it is there.
    exposed_s, steps : what it takes at once, and in the background.
    """

    coming_ED: NDArray[np.bool_]
    dropped_ED: NDArray[np.bool_]
    gain_s: float
    exposed_s: float
    steps: float

    def at_once(self, left: float) -> bool:
        """Step 3, with so many steps left of the horizon."""
        return 0.0 < self.exposed_s * SURE < self.gain_s * min(self.steps, left)


@lru_cache(maxsize=512)
def first_batch(site: Site, held: bytes, loads: bytes, horizon: float, margin: float) -> FirstBatch | None:
    """Steps 1 to 3 for holders bool [E, D] and the loads of some steps, float64 [H, E], as bytes; None: stay."""
    held_ED = site.holders(held)
    load_E = expected_loads(np.frombuffer(loads).reshape(-1, len(held_ED)))
    now_s = _seconds(site, held_ED, load_E)
    best, least = None, (1.0 - margin) * horizon * now_s
    for target_s, spread in sorted(targets(site, held_ED, load_E), key=lambda one: one[0])[:TARGETS]:
        if target_s >= (1.0 - margin) * now_s:
            break
        for inside_first in (True, False)[: site.price.cluster.num_nodes]:
            first, total_s = _price(site, held_ED, spread, load_E, inside_first, horizon)
            if first is not None and total_s < least:
                best, least = first, total_s
    return best


def _seconds(site: Site, held_ED: NDArray[np.bool_], load_E: NDArray[np.float64]) -> float:
    """Predicted seconds of holders, or of the engine's split over the static ones."""
    planned_s = planned_tokens(site, held_ED.tobytes(), load_E.tobytes()).seconds
    return min(planned_s, even_seconds(load_E.copy(), plain(site.static_ED, np.bool_), site.machine))


def targets(site: Site, held_ED: NDArray[np.bool_], load_E: NDArray[np.float64]) -> Iterator[tuple[float, Spread]]:
    """Step 1: predicted seconds and spread of each, for present holders bool [E, D] and loads float64 [E]."""
    static_ED, slots_D = site.static_ED, site.slots_D
    price = compiled_price(site.price)._replace(window_s=UNSEEN)
    sizes_N = price.machine.size_N
    starts = [held_ED]
    if len(sizes_N) > 1:
        whole_SE = spread_evenly(np.rint(load_E).astype(np.int64), len(slots_D))
        free_D, owned_ED = slots_D - static_ED.sum(axis=0), plain(static_ED, np.bool_)
        layer = OwnedLayer(source_tokens(whole_SE, price.machine), owned_ED, free_D, price)
        counts = tried_counts(site.step_slots, int(sizes_N.max()), len(static_ED))
        starts.append(plan_layer(layer, counts)[0].holders_ED)
    else:
        starts.append(filled_by_work(site.view(load_E), static_ED, site.desk)[-1])
    for start_ED in starts:
        yield descended(site, start_ED, load_E, slots_D - start_ED.sum(axis=0))


def _price(
    site: Site,
    held_ED: NDArray[np.bool_],
    target: Spread,
    load_E: NDArray[np.float64],
    inside_first: bool,
    horizon: float,
) -> tuple[FirstBatch | None, float]:
    """Step 2: the first batch of the best part of the way, and what the horizon takes."""
    window_s, price = site.price.window_s, compiled_price(site.price)
    even_s = even_seconds(load_E.copy(), plain(site.static_ED, np.bool_), site.machine)
    way = Way(target.held_ED, target.tokens_ED, site.static_ED, site.slots_D)
    at_ED, tokens_ED = held_ED, planned_tokens(site, held_ED.tobytes(), load_E.tobytes()).tokens_ED
    spent_s, left, now_s = 0.0, horizon, _seconds(site, held_ED, load_E)
    first: FirstBatch | None = None
    best: tuple[FirstBatch | None, float] = (None, math.inf)
    for _ in range(STAGES):
        coming_ED, dropped_ED = next_batch(at_ED, way, not inside_first, price)
        if inside_first and not coming_ED.any():
            coming_ED, dropped_ED = next_batch(at_ED, way, True, price)
        if not coming_ED.any():
            break
        at_ED = at_ED & ~dropped_ED
        fetch_s = fetch_seconds(at_ED, coming_ED, site.price)
        steps = max(1.0, math.ceil(fetch_s / window_s)) if window_s > 0 else math.inf
        during_s = now_s
        if dropped_ED.any():
            during_s, tokens_ED = improved(site, at_ED, tokens_ED, load_E)
        at_ED = at_ED | coming_ED
        after_s, tokens_ED = improved(site, at_ED, tokens_ED, load_E)
        during_s, after_s = min(during_s, even_s), min(after_s, even_s)
        if first is None:
            first = FirstBatch(coming_ED, dropped_ED, now_s - after_s, fetch_s - window_s, steps)
            if first.at_once(horizon):
                spent_s, steps = first.exposed_s, 0.0
        if steps > left:
            break
        spent_s, left, now_s = spent_s + steps * during_s, left - steps, after_s
        if spent_s + left * after_s < best[1]:
            best = first, spent_s + left * after_s
    return best
