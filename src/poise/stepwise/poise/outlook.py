"""What ``poise-near`` expects of a layer: its loads, the best spread over some holders, how tokens are best sent.

Everything here is a function of bytes and numbers, kept for the steps in which they stay the same: loads are looked at
anew every few steps only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine
from poise.cost.weights import StepPrice, compiled_price
from poise.stepwise.methods.hecate import nearest_quota
from poise.stepwise.methods.split import spread_evenly
from poise.stepwise.poise.node_split import best_quotas, source_tokens
from poise.stepwise.poise.spread import Slots, Spread, descend, even_seconds, make_spread, spread_seconds
from poise.stepwise.poise.work_split import best_split, plan_seconds
from poise.stepwise.poise.workspace import Desk, HeldLayer, desk_of
from poise.stepwise.protocol import MAX_ROWS, LayerView

JUDGED = 8
"""Newest steps on which a way to send tokens is judged that was planned for those before."""
SWEEPS = 20
"""Most sweeps of a descent."""
FINE = 1e5
"""Whole tokens in which splits that are exact in whole tokens start a descent."""


class Site(NamedTuple):
    """What stays while a driver's layer runs, as a key.

    Parameters
    ----------
    static : bytes of bool [E, D], the static placement.
    step_slots, price : of the view.
    """

    static: bytes
    step_slots: int
    price: StepPrice

    def holders(self, held: bytes) -> NDArray[np.bool_]:
        """Bool [E, D] of its bytes."""
        return np.frombuffer(held, np.bool_).reshape(-1, self.price.cluster.num_devices).copy()

    @property
    def static_ED(self) -> NDArray[np.bool_]:
        """The static placement."""
        return self.holders(self.static)

    @property
    def slots_D(self) -> NDArray[np.int64]:
        """Most experts of a device, int64 [D]."""
        return self.static_ED.sum(axis=0) + self.step_slots

    def view(self, load_E: NDArray[np.float64]) -> LayerView:
        """A step before which nothing but the static placement is there, with loads float64 [E]."""
        static_ED = self.static_ED
        return LayerView(
            static_ED, static_ED, load_E, np.zeros((0, len(load_E))), np.zeros_like(static_ED), self.step_slots, 0, 0,
            self.price,
        )  # fmt: skip

    @property
    def machine(self) -> Machine:
        """The machine as compiled code reads it."""
        return compiled_price(self.price).machine

    @property
    def desk(self) -> Desk:
        """Where splits of today's loop are made."""
        return desk_of(self.view(np.zeros(len(self.static_ED))))


def site_of(view: LayerView) -> Site:
    """The site of a view."""
    return Site(view.static_ED.tobytes(), view.step_slots, view.price)


def expected_loads(load_HE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean loads of the steps [H, E], float64 [E], drawn towards their mean by what of their variance is noise.

    Noise: the variance between steps of a mean over H steps; of one step, that of a Poisson number. Without it the few
    tokens of a small batch look like hot experts.
    """
    load_E = load_HE.mean(axis=0)
    mean = load_E.mean()
    noise = mean if len(load_HE) < 2 else float(load_HE.var(axis=0, ddof=1).mean()) / len(load_HE)
    real = max(0.0, 1.0 - noise / max(float(load_E.var()), 1e-300))
    out: NDArray[np.float64] = mean + real * (load_E - mean)
    return out


def descended(
    site: Site, held_ED: NDArray[np.bool_], load_E: NDArray[np.float64], free_D: NDArray[np.int64] | None = None
) -> tuple[float, Spread]:
    """The best spread that descents from several splits end in, and its seconds.

    ``free_D`` int64 [D]: holders may be added there, and those that are not static go with their last token.
    """
    starts = [_shares(each, held_ED) * load_E[:, None] for each in _splits(site, held_ED, load_E)]
    start = min(starts, key=lambda each: spread_seconds(make_spread(each, held_ED, site.machine), site.machine))
    return _descent(site, held_ED, start, free_D)


def improved(
    site: Site, held_ED: NDArray[np.bool_], tokens_ED: NDArray[np.float64], load_E: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Seconds and tokens, float64 [E, D], of a descent from those that were planned for nearly the same holders."""
    seconds, spread = _descent(site, held_ED, _shares(tokens_ED * held_ED, held_ED) * load_E[:, None], None)
    return seconds, spread.tokens_ED


def _descent(
    site: Site, held_ED: NDArray[np.bool_], tokens_ED: NDArray[np.float64], free_D: NDArray[np.int64] | None
) -> tuple[float, Spread]:
    machine = site.machine
    spread = make_spread(tokens_ED.copy(), held_ED.copy(), machine)
    none = np.zeros(len(machine.speed_D), np.int64)
    slots = Slots(none, held_ED) if free_D is None else Slots(free_D.copy(), site.static_ED)
    before_s = spread_seconds(spread, machine)
    descend(spread, slots, SWEEPS, machine)
    after_s = spread_seconds(spread, machine)
    if after_s <= before_s:
        return after_s, spread
    return before_s, make_spread(tokens_ED, held_ED, machine)


def _shares(tokens_ED: NDArray[np.float64], held_ED: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of an expert's tokens on each device, even over its holders where it has none; float64 [E, D]."""
    share_ED = np.where(tokens_ED.sum(axis=1)[:, None] > 0, tokens_ED, held_ED)
    out: NDArray[np.float64] = np.ascontiguousarray(share_ED / share_ED.sum(axis=1, keepdims=True))
    return out


def _splits(site: Site, held_ED: NDArray[np.bool_], load_E: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Where descents start, float64 [E, D]: nearest holders, two levels, by work."""
    machine = site.machine
    fine = np.rint(load_E * (FINE / max(float(load_E.sum()), 1e-300))).astype(np.int64)
    fine_SE = spread_evenly(fine, len(machine.speed_D))
    yield nearest_quota(fine_SE, held_ED, machine.node_D).astype(np.float64)
    yield best_quotas(source_tokens(fine_SE, machine), held_ED, machine)[1].astype(np.float64)
    layer = site.desk.put(held_ED)
    plan_seconds(load_E.copy(), 0.0, layer)  # to numba an array that may not be written is another type
    yield _on_devices(layer, layer.space.tokens_H)


def _on_devices(layer: HeldLayer, tokens_H: NDArray[np.float64]) -> NDArray[np.float64]:
    holders = layer.holders
    out_ED = np.zeros((len(holders.ptr_E) - 1, len(layer.machine.speed_D)))
    out_ED[holders.expert_H, holders.device_H] = tokens_H[: len(holders.device_H)]
    return out_ED


class PlannedTokens(NamedTuple):
    """The best spread over holders for loads: its seconds, and tokens float64 [E, D]."""

    seconds: float
    tokens_ED: NDArray[np.float64]


@lru_cache(maxsize=512)
def planned_tokens(site: Site, held: bytes, load: bytes) -> PlannedTokens:
    """For holders bool [E, D] and expected loads float64 [E], as bytes."""
    seconds, spread = descended(site, site.holders(held), np.frombuffer(load))
    return PlannedTokens(seconds, spread.tokens_ED)


class Sending(NamedTuple):
    """How tokens are sent: the engine's even split over the static map, by planned shares, or split exactly.

    ``seconds`` are predicted, control included; ``tokens_ED`` float64 [E, D] is what shares are planned from.
    """

    how: Literal["even", "planned", "exact"]
    seconds: float
    tokens_ED: NDArray[np.float64]


@lru_cache(maxsize=512)
def best_sending(site: Site, held: bytes, loads: bytes, slack: float) -> Sending:
    """What would have been fastest in the newest of some steps, float64 [H, E] as bytes, planned from those before.

    Judging on the very steps that a plan was made for would favour it over the exact split, which needs no prediction.
    """
    held_ED, static_ED, machine = site.holders(held), site.static_ED, site.machine
    load_HE = np.frombuffer(loads).reshape(-1, len(held_ED))
    apart = len(load_HE) >= 2 * JUDGED
    before_HE, judged_HE = (load_HE[:-JUDGED], load_HE[-JUDGED:]) if apart else (load_HE, load_HE)
    tokens_ED = planned_tokens(site, held, expected_loads(before_HE).tobytes()).tokens_ED
    share_ED = _shares(tokens_ED, held_ED)
    layer, seconds = site.desk.put(held_ED), np.zeros(3)
    for load_E in judged_HE:
        spread = make_spread(share_ED * load_E[:, None], held_ED, machine)
        exact_SE = spread_evenly(np.rint(load_E).astype(np.int64), len(machine.speed_D))
        seconds += (even_seconds(load_E.copy(), static_ED, machine), spread_seconds(spread, machine),
                    best_split(exact_SE, slack, layer))  # fmt: skip
    even_s, planned_s, exact_s = (seconds / len(judged_HE) + (0.0, 0.0, site.price.control_s)).tolist()
    if held_ED.size * len(machine.speed_D) > MAX_ROWS:
        planned_s = np.inf
    if even_s <= min(planned_s, exact_s):
        return Sending("even", even_s, tokens_ED)
    if exact_s < planned_s:
        return Sending("exact", exact_s, tokens_ED)
    newest = planned_tokens(site, held, expected_loads(load_HE).tobytes())
    return Sending("planned", planned_s, newest.tokens_ED)
