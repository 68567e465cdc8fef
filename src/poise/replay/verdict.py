"""Should an engine balance its experts at all: the verdict in three words, what it rests on, and what it costs.

The words are those of vllm-ascend's RFC for a tool that decides this from a recording. Here they mean, of one phase:

    recommend_trial         the gain is at least 1 % of the whole step, above 0 in both directions and at the lower end
                            of its interval, and above 0 with every combination of the constants' errors
    not_recommended_now     the gain is below 1 % of the step
    insufficient_evidence   the gain is large enough, but the windows disagree, its interval reaches 0, or the errors of
                            the constants could turn its sign

Where a window has fewer than four steps to judge on (one recorded table is one), all judged steps must agree: each at
least 1 % for the first word, each below it for the second.

Records and the rule; plans are made and priced in :mod:`poise.replay.trial`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.cost.rest import RestSeconds
from poise.planning.placement import Placement
from poise.replay.compare import NOT_WORTH
from poise.routing.trace import Phase
from poise.util.notebook import lines_html, table_html
from poise.util.words import percent

Advice = Literal["recommend_trial", "not_recommended_now", "insufficient_evidence"]
SCHEMA = 1
FEW_STEPS = 4
"""Judged steps of a window below which all of them must agree."""
DRAWS, LEVEL = 4000, 0.95
MS = 1e3
COLUMNS = ("map", "redundant", "saved, us a layer", "saved, ms a step", "interval", "of the step")
"""Of a table of maps: what each saves."""


@dataclass(frozen=True, slots=True, eq=False)
class TriedMap:
    """What a method saves with R redundant slots, each plan judged on the window that it was not made on.

    Parameters
    ----------
    method, redundant : of both plans.
    gains_s : seconds of one layer that each judged step saves, mean over layers, float64 [B] each: planned on the first
        window and judged on the second, and the other way round.
    """

    method: str
    redundant: int
    gains_s: tuple[NDArray[np.float64], NDArray[np.float64]]

    @property
    def directions_s(self) -> tuple[float, float]:
        """Mean of each direction."""
        return float(self.gains_s[0].mean()), float(self.gains_s[1].mean())

    @property
    def mean_s(self) -> float:
        """Mean of both directions."""
        return sum(self.directions_s) / 2.0

    @property
    def few(self) -> bool:
        """The judged steps are too few to draw from: their range is the interval."""
        return min(len(gain) for gain in self.gains_s) < FEW_STEPS

    def interval_s(self, tried: int) -> tuple[float, float]:
        """Interval of the mean: 95 % over the judged steps of both directions, wider as the best of ``tried`` maps is
        asked about (Bonferroni); of few steps their range.
        """
        if self.few:
            every = np.concatenate(self.gains_s)
            return float(every.min()), float(every.max())
        rng = np.random.default_rng(0)
        drawn = [gain[rng.integers(len(gain), size=(DRAWS, len(gain)))].mean(axis=1) for gain in self.gains_s]
        tail = 50.0 * (1.0 - LEVEL) / max(1, tried)
        low, high = np.percentile((drawn[0] + drawn[1]) / 2.0, [tail, 100.0 - tail])
        return float(low), float(high)


@dataclass(frozen=True, slots=True)
class MapPrice:
    """What going to a map costs, once and for good.

    Parameters
    ----------
    moved_bytes, seconds : experts that ranks fetch, and how long the fullest port takes, all of it exposed.
    slot_bytes : memory of redundant slots on the fullest rank, beyond what runs now.
    cache_tokens : tokens of key/value cache that a rank has room for the less; None: the model's cache is not known.
    """

    moved_bytes: float
    seconds: float
    slot_bytes: float
    cache_tokens: int | None


@dataclass(frozen=True, slots=True, eq=False)
class PhaseVerdict:
    """One phase: its own steps, its own map.

    Parameters
    ----------
    phase, advice, reason : which, the word, and why in half a sentence.
    tokens : N, tokens of a step over all ranks, mean of both windows.
    chosen : the map that the figures are of. tried : all, by method and slots.
    layers : MoE layers of the model, which gains a layer are multiplied by.
    layer_s : seconds of an MoE layer as it runs now. rest : of the step beside the MoE layers.
    worst_s : least gain of a layer over the combinations of the constants' errors.
    price : of going from what runs now to the plan of the later window.
    break_even_tokens : least N of ``sizes`` from which on the map gains at every larger one; None: none.
    sizes : N that were tried.
    other_phase_s : seconds a layer that this map saves in a step of the other phase; None: no other phase was judged.
    ground : what the constants rest on. placement : the chosen map, of the later window. notes : what the reader must
        know.
    redealt_s : seconds a layer that the map saves where other experts are hot (:mod:`poise.replay.redealt`).
    """

    phase: Phase
    advice: Advice
    reason: str
    tokens: float
    chosen: TriedMap
    tried: tuple[TriedMap, ...]
    layers: int
    layer_s: float
    rest: RestSeconds
    worst_s: float
    price: MapPrice
    break_even_tokens: int | None
    sizes: tuple[int, ...]
    other_phase_s: float | None
    ground: str
    placement: Placement
    notes: tuple[str, ...] = ()
    redealt_s: float = 0.0

    @property
    def step_s(self) -> float:
        """Seconds of the whole step as it runs now."""
        return self.layers * self.layer_s + self.rest.total_s

    @property
    def saved_s(self) -> float:
        """Seconds a step that the map saves."""
        return self.layers * self.chosen.mean_s

    @property
    def interval_s(self) -> tuple[float, float]:
        """Interval of :attr:`saved_s`."""
        low, high = self.chosen.interval_s(len(self.tried))
        return self.layers * low, self.layers * high

    @property
    def pay_back_steps(self) -> int | None:
        """Steps until the rearrangement is earned; None: never."""
        return math.ceil(self.price.seconds / self.saved_s) if self.saved_s > 0 else None

    def share(self, seconds: float) -> float:
        """Of the whole step as it runs now."""
        return seconds / self.step_s

    def title(self) -> str:
        """Of a table of the maps."""
        return f"{self.phase}, {self.tokens:,.0f} tokens a step of {MS * self.step_s:.3f} ms: {self.advice}"

    def cells(self) -> list[list[str]]:
        """A row of :data:`COLUMNS` for each map that was tried."""
        out = []
        for one in self.tried:
            low, high = (MS * self.layers * end for end in one.interval_s(len(self.tried)))
            saved = self.layers * one.mean_s
            out.append([one.method, str(one.redundant), f"{1e6 * one.mean_s:.2f}", f"{MS * saved:.3f}",
                        f"{low:.3f} to {high:.3f}", percent(self.share(saved))])  # fmt: skip
        return out

    def lines(self) -> list[str]:
        """What the figures of the map mean, a sentence each."""
        price, rest, chosen = self.price, self.rest, self.chosen
        low, high = (MS * end for end in self.interval_s)
        many = " and ".join(str(len(gain)) for gain in chosen.gains_s)
        how = f"range of {many} judged steps"
        if not chosen.few:
            how = f"95 % over {many} judged steps, for the best of {len(self.tried)} maps"
        pays = "never" if self.pay_back_steps is None else f"after {_steps(self.pay_back_steps)}"
        cache = "" if price.cache_tokens is None else f", {price.cache_tokens:,} tokens of key/value cache"
        even = "at no batch tried"
        if self.break_even_tokens is not None:
            even = f"from {self.break_even_tokens:,} tokens a step on"
        out = [
            f"{chosen.method} with {chosen.redundant} redundant slots saves {MS * self.saved_s:.3f} ms a step, "
            f"{low:.3f} to {high:.3f} ({how}), at worst {MS * self.layers * self.worst_s:.3f} within the errors of the "
            "constants.",
            f"Its price: {price.slot_bytes / 2**30:.2f} GiB of slots a rank{cache}; {price.moved_bytes / 2**30:.2f} "
            f"GiB to move once, {MS * price.seconds:.1f} ms, paid back {pays}.",
            f"It gains {even} (tried: {self.sizes[0]:,} to {self.sizes[-1]:,}).",
            f"On traffic of another kind, as skewed but other experts hot, it {_saves(self.layers * self.redealt_s)}.",
        ]
        if self.other_phase_s is not None:
            out.append(f"In a step of the other phase the same map {_saves(self.layers * self.other_phase_s)}.")
        parts = {
            "attention": rest.attention_s, "scores": rest.scores_s, "dense layers": rest.dense_s,
            "shared experts": rest.shared_s, "head": rest.head_s,
        }  # fmt: skip
        told = ", ".join(f"{MS * seconds:.3f} {name}" for name, seconds in parts.items() if seconds)
        out.append(
            f"The step now: {MS * self.layers * self.layer_s:.3f} ms of MoE layers"
            + (f", and by the datasheet's roofline {told}." if told else ".")
        )
        return out

    def to_json(self) -> dict[str, Any]:
        """JSON values; milliseconds, of a layer or of a step as the name says."""
        rest = self.rest
        return {
            "phase": self.phase,
            "verdict": self.advice,
            "reason": self.reason,
            "tokens_per_step": self.tokens,
            "method": self.chosen.method,
            "redundant": self.chosen.redundant,
            "ms_per_layer": MS * self.chosen.mean_s,
            "ms_per_step": MS * self.saved_s,
            "share_of_step": self.share(self.saved_s),
            "interval": [MS * end for end in self.interval_s],
            "directions": [MS * self.layers * one for one in self.chosen.directions_s],
            "worst_case": MS * self.layers * self.worst_s,
            "judged_steps": [len(gain) for gain in self.chosen.gains_s],
            "interval_of": "range of the judged steps" if self.chosen.few else "bootstrap over judged steps",
            "layers": self.layers,
            "step_ms": {
                "now": MS * self.step_s, "moe": MS * self.layers * self.layer_s, "attention": MS * rest.attention_s,
                "scores": MS * rest.scores_s, "dense": MS * rest.dense_s, "shared": MS * rest.shared_s,
                "head": MS * rest.head_s, "unknown": list(rest.unknown),
            },
            "moved_bytes": self.price.moved_bytes,
            "rearrangement_seconds": self.price.seconds,
            "pay_back_steps": self.pay_back_steps,
            "slot_bytes_per_rank": self.price.slot_bytes,
            "cache_tokens_lost": self.price.cache_tokens,
            "break_even_tokens": self.break_even_tokens,
            "break_even_tried": list(self.sizes),
            "ms_per_step_in_other_phase": None
            if self.other_phase_s is None
            else MS * self.layers * self.other_phase_s,
            "tried": [
                {"method": one.method, "redundant": one.redundant, "ms_per_layer": MS * one.mean_s,
                 "ms_per_step": MS * self.layers * one.mean_s, "share_of_step": self.share(self.layers * one.mean_s),
                 "interval": [MS * self.layers * end for end in one.interval_s(len(self.tried))]}
                for one in self.tried
            ],
            "ms_per_step_other_experts_hot": MS * self.layers * self.redealt_s,
            "ground": self.ground,
            "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """One advice for all phases.

    Parameters
    ----------
    phases : at least one.
    engine, cluster, model, current, context : what was asked.
    flags : lines to start the engine with, where a trial is recommended.
    notes : what the reader must know.
    interrupted : somebody ended the search: maps are the best so far, and no evidence.
    """

    phases: tuple[PhaseVerdict, ...]
    engine: str
    cluster: str
    model: str
    current: str
    context: int
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def leading(self) -> PhaseVerdict:
        """The phase whose figures stand on top: of those that lead to the advice the one with the largest share."""
        mine = [one for one in self.phases if one.advice == self.advice]
        return max(mine, key=lambda one: one.share(one.saved_s))

    @property
    def advice(self) -> Advice:
        """A trial if any phase recommends one, else whether any lacks evidence."""
        words = {one.advice for one in self.phases}
        order: tuple[Advice, ...] = ("recommend_trial", "insufficient_evidence", "not_recommended_now")
        return next(word for word in order if word in words)

    def as_interrupted(self) -> Verdict:
        """The same where somebody ended the search: its maps are the best so far, from which nothing follows."""
        cut = "interrupted, and another run may end elsewhere; of the maps so far: "
        return replace(
            self, interrupted=True,
            phases=tuple(replace(one, advice="insufficient_evidence", reason=cut + one.reason) for one in self.phases),
        )  # fmt: skip

    def sentence(self) -> str:
        """The word and the reason, and where phases differ what follows for both."""
        lead = self.leading
        said = f"{self.advice}: {lead.phase}: {lead.reason}"
        others = [one for one in self.phases if one is not lead]
        said += "".join(f"; {one.phase}: {one.reason}" for one in others) + "."
        return said + (f" {self._together()}" if others and self.advice == "recommend_trial" else "")

    def _repr_html_(self) -> str:
        """For notebooks: the advice, a table a phase with what its figures mean, the notes and what it rests on."""
        parts = [lines_html([self.sentence()])]
        for one in self.phases:
            parts += [table_html(one.title(), COLUMNS, one.cells()), lines_html([*one.lines(), *one.notes])]
        return "".join(parts) + lines_html([*self.flags, *self.notes, self.basis()])

    def basis(self) -> str:
        """What all of it rests on."""
        return (
            f"{self.cluster}; model {self.model}; engine {self.engine}; now: {self.current}. Each plan is judged on "
            "the window that it was not made on. All times are modelled; the rest of the step is by the datasheet, at "
            f"{self.context:,} tokens of context."
        )

    def _together(self) -> str:
        """What a trial means for engines that run both phases on the same ranks, and so with one map."""
        lead = self.leading
        if all(one.advice == "recommend_trial" for one in self.phases):
            best = [
                f"{one.chosen.method} with {one.chosen.redundant} redundant slots in {one.phase}" for one in self.phases
            ]
            said = f"Each phase has a map of its own: {', '.join(best)}."
        else:
            said = f"Turn it on in {lead.phase} instances alone where phases run apart."
        if lead.other_phase_s is not None:
            other = _saves(lead.layers * lead.other_phase_s)
            said += f" Where they share ranks, the map of {lead.phase} {other} in a step of the other."
        return said

    def to_json(self) -> dict[str, Any]:
        """Figures of :attr:`leading` on top, those of each phase below."""
        lead = self.leading
        top = ("ms_per_layer", "ms_per_step", "share_of_step", "interval", "worst_case", "pay_back_steps", "redundant",
               "method", "cache_tokens_lost", "break_even_tokens", "ground")  # fmt: skip
        figures = lead.to_json()
        return {
            "schema": SCHEMA,
            "verdict": self.advice,
            "reason": self.sentence(),
            **{name: figures[name] for name in top},
            "figures_of": lead.phase,
            "cluster": self.cluster,
            "model": self.model,
            "engine": self.engine,
            "current": self.current,
            "context": self.context,
            "flags": list(self.flags),
            "notes": list(self.notes),
            "interrupted": self.interrupted,
            "phases": [one.to_json() for one in self.phases],
        }


def _steps(many: int) -> str:
    return f"{many:,} step{'s' * (many != 1)}"


def _saves(seconds: float) -> str:
    """What a map does to a step, in words."""
    return f"{'saves' if seconds >= 0 else 'costs'} {abs(MS * seconds):.3f} ms"


def decide(tried: TriedMap, maps: int, worst_s: float, layers: int, step_s: float) -> tuple[Advice, str]:
    """The word for a map and why; rule in the module's docstring.

    Parameters
    ----------
    maps : how many it was chosen from.
    worst_s : its least gain of a layer within the errors of the constants, seconds.
    layers, step_s : MoE layers, and seconds of the whole step as it runs now.
    """
    every = layers * np.concatenate(tried.gains_s) / step_s
    share, sides = layers * tried.mean_s / step_s, [layers * one / step_s for one in tried.directions_s]
    low, high = (layers * end / step_s for end in tried.interval_s(maps))
    saved = f"{MS * layers * tried.mean_s:.3f} ms a step, {100 * share + 0.0:.2f}% of it"
    counts = "two samples only" if len(every) == 2 else f"{len(every)} judged steps only"
    if tried.few:
        if (every < NOT_WORTH).all():
            return "not_recommended_now", f"the best map saves {saved}, and all samples say less than 1 % ({counts})"
        if not (every >= NOT_WORTH).all():
            return (
                "insufficient_evidence",
                f"{counts}, and they disagree: {percent(low)} to {percent(high)} of the step",
            )
    elif share < NOT_WORTH:
        return "not_recommended_now", f"the best map saves {saved}, less than 1 %"
    elif min(sides) <= 0:
        return "insufficient_evidence", (
            f"the windows disagree: {percent(sides[0])} of the step on one, {percent(sides[1])} on the other"
        )
    elif low <= 0:
        return "insufficient_evidence", f"the best map saves {saved}, but its interval reaches down to {percent(low)}"
    if worst_s <= 0:
        return "insufficient_evidence", (
            f"the best map saves {saved}, but within the errors of the constants it could lose "
            f"{-MS * layers * worst_s:.3f} ms: the map that runs now stays until they are measured"
        )
    least = percent(layers * worst_s / step_s)
    return "recommend_trial", (
        f"{tried.method} with {tried.redundant} redundant slots saves {saved} ({percent(low)} to "
        f"{percent(high)}{f', {counts}' if tried.few else ''}), and "
        f"at least {least} within the errors of the constants"
    )


def choose(tried: Sequence[TriedMap], tolerance_s: float) -> TriedMap:
    """The map with the fewest slots, and of those the first method, within ``tolerance_s`` a layer of the best."""
    best = max(one.mean_s for one in tried)
    return min((one for one in tried if one.mean_s >= best - tolerance_s), key=lambda one: one.redundant)
