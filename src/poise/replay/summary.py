"""What a comparison comes down to for someone with five minutes: a row a map, what the best one costs, when it pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poise.cost.perturb import GainRange
from poise.machine.settle import ground
from poise.replay.compare import NOT_WORTH, Comparison
from poise.replay.trial import TrialSetting, map_price, saved_at
from poise.replay.verdict import MS, MapPrice
from poise.routing.batch import RoutingBatch
from poise.util.words import percent

BOUND = "bound"


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """A map on one part of the traffic.

    Parameters
    ----------
    name : of the entry, or :data:`BOUND`.
    imbalance : tokens of the fullest over the mean device, mean over steps and layers.
    seconds : the MoE layers of a step of the whole model; recorded layers are taken for all.
    saved : share of that which it saves over the first row, mean and 95 % interval over steps; None: the first row, and
        the bound, of which only the mean is asked.
    """

    name: str
    imbalance: float
    seconds: float
    saved: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Rows by part of the traffic, and what the map of row ``name`` costs and needs.

    Parameters
    ----------
    parts : part -> rows, the first what runs now, the last the bound.
    steps : judged steps of a part, the same for all.
    name : of the static map that the figures below are of.
    price : of going there from what runs now.
    pay_back_steps : steps until moving there is earned; None: never.
    within : what it saves within the errors of the constants; None: not known.
    by_tokens : (tokens of a step, share of the MoE time that it saves there), ascending.
    ground : what the times rest on.
    judged_on : the part that says whether the map is worth it.
    interrupted : somebody cut the plans short: whether the map is worth it is not said.
    """

    parts: Mapping[str, tuple[SummaryRow, ...]]
    steps: int
    name: str
    price: MapPrice
    pay_back_steps: int | None
    within: GainRange | None
    by_tokens: tuple[tuple[int, float], ...]
    ground: str
    judged_on: str
    interrupted: bool = False

    def not_worth_words(self) -> str:
        """That the map is not worth it, by the rule of :meth:`poise.replay.compare.Comparison.verdict`, in a sentence;
        ``""`` where it is, or nobody can say.
        """
        if self.interrupted:
            return ""
        row = next(one for one in self.parts[self.judged_on] if one.name == self.name)
        assert row.saved is not None
        mean, low, high = row.saved
        least = None if self.within is None else self.within.least_share
        if mean >= NOT_WORTH and low > 0 and (least is None or least > 0):
            return ""
        sure = "" if least is None else f", and {percent(least)} at the least while every constant is off by its error"
        return (
            f"Not worth it here: {self.name} saves {percent(mean)}, {percent(low)} to {percent(high)} over "
            f"{self.steps} steps{sure}."
        )

    def price_words(self) -> str:
        """What it costs, in a sentence."""
        price = self.price
        cache = "" if price.cache_tokens is None else f", {price.cache_tokens:,} tokens of key/value cache"
        pays = "never" if self.pay_back_steps is None else f"after {self.pay_back_steps:,} steps"
        return (
            f"{price.moved_bytes / 2**30:.1f} GiB to move once ({MS * price.seconds:.0f} ms), paid back {pays}; "
            f"slots that take {price.slot_bytes / 2**30:.2f} GiB a GPU{cache}"
        )

    def trust_words(self) -> str:
        """How far the figures can be trusted, in a sentence or two."""
        least = ""
        if self.within is not None:
            least = f"{self.name} saves at least {percent(self.within.least_share)} while every constant is off by its "
            least += "error. "
        return f"{least}Times are modelled: {self.ground}. Nothing here ran on a GPU"

    def batches_words(self) -> str:
        """What the map gains at other batches, in a sentence."""
        each = ", ".join(f"{percent(share)} at {size:,}" for size, share in self.by_tokens)
        said = f"{self.name} as planned here saves {each} tokens a step"
        small = [f"{size:,}" for size, share in self.by_tokens if share < NOT_WORTH and not self.interrupted]
        return f"{said}: not worth it at {', '.join(small)}" if small else said

    def to_json(self) -> dict[str, Any]:
        """JSON values; milliseconds of a step, shares of the MoE time."""
        return {
            "parts": {
                part: [
                    {"name": row.name, "imbalance": row.imbalance, "ms_per_step": MS * row.seconds,
                     "saved": None if row.saved is None else list(row.saved)}
                    for row in rows
                ]
                for part, rows in self.parts.items()
            },
            "steps": self.steps,
            "map": self.name,
            "moved_bytes": self.price.moved_bytes,
            "rearrangement_seconds": self.price.seconds,
            "slot_bytes_per_rank": self.price.slot_bytes,
            "cache_tokens_lost": self.price.cache_tokens,
            "pay_back_steps": self.pay_back_steps,
            "least_share": None if self.within is None else self.within.least_share,
            "share_by_tokens": {str(size): share for size, share in self.by_tokens},
            "ground": self.ground,
        }  # fmt: skip


def summarise(
    found: Comparison, name: str, setting: TrialSetting, batch_of: Callable[[int], RoutingBatch], sizes: Sequence[int]
) -> Summary:  # fmt: skip
    """Sum up a comparison.

    Parameters
    ----------
    found : its first entry is what runs now.
    name : the static map whose price is said.
    setting : machine, with constants open where they depend on the batch, and model, for other batches.
    batch_of : judged traffic in steps of so many tokens. sizes : those that are tried, ascending.
    """
    by_name = {entry.name: entry for entry in found.entries}
    base, best = found.entries[0], by_name[name]
    scale = found.model.num_moe_layers / found.num_layers
    parts = {}
    for part in found.batches:
        rows = []
        for entry in found.entries:
            got = found.replays[entry.name, part]
            saved = None if entry is base else found.gain(entry.name, base.name, part)
            rows.append(SummaryRow(entry.name, got.imbalance, scale * float(got.step_seconds_B.mean()), saved))
        rows.append(SummaryRow(BOUND, 1.0, scale * float(found.bounds_B[part].mean()), None))
        parts[part] = tuple(rows)
    on = found.judged_on
    rows_on = {row.name: row for row in parts[on]}
    price = map_price(base.placement, best.placement, found.cluster, found.model)
    earns = rows_on[base.name].seconds - rows_on[name].seconds
    by_tokens = tuple((size, saved_at(batch_of(size), base.placement, best.placement, setting)) for size in sizes)
    return Summary(
        parts, len(found.bounds_B[on]), name, price, math.ceil(price.seconds / earns) if earns > 0 else None,
        found.within_errors(name, base.name), by_tokens, ground(found.cluster), on,
        found.interrupted,
    )  # fmt: skip
