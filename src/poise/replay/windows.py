"""Two windows of traffic, apart in time, and what each phase of serving has in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.machine.model import ModelSpec
from poise.routing.batch import Homes, RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.counters import may_contain
from poise.routing.fingerprint import FITTED, fingerprint
from poise.routing.trace import LoadProfile, Phase, RoutingTrace
from poise.util.errors import ModelError, OptionError, TraceError

Windows = tuple[RoutingTrace | LoadProfile, RoutingTrace | LoadProfile]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
MOST_STEPS = 64
"""Steps of a window that are priced at most."""
LOAD_SECONDS, PICK_SECONDS = 1.6e-7, 1e-7
"""Nominal seconds to halve, batch and fingerprint traffic, a load and a pick of a token."""
SAME = 0.5
"""Share of a window in the other one from which on they are the same traffic."""


def split_in_time(traffic: RoutingTrace | LoadProfile) -> Windows:
    """One window as two: recorded steps, or recorded loads, before and after the middle; of a trace without steps the
    first half of the requests of each domain, and the others.

    Raises
    ------
    OptionError : there is but one recorded load, or one step. TraceError : a domain has one request.
    """
    if isinstance(traffic, LoadProfile):
        half = traffic.middle()
        if half is None:
            raise OptionError(
                f"{traffic.name} has 1 recorded load with tokens, and two windows are needed: one to plan on, one to "
                "judge on",
                hint="give a second window, recorded later",
            )
        return traffic.steps(slice(0, half)), traffic.steps(slice(half, None))
    if traffic.step is None:
        return traffic.split_requests()
    ids = np.unique(traffic.step)
    if len(ids) < 2:
        raise OptionError(f"{traffic.name} has 1 recorded step, and two windows are needed", hint="give a second one")
    first_T = traffic.step < ids[(len(ids) + 1) // 2]
    return traffic.rows(first_T), traffic.rows(~first_T)


def check_windows(windows: Windows, model: ModelSpec) -> None:
    """Two windows of one model.

    Raises
    ------
    OptionError : they differ in layers or experts. ModelError : they are not of this model.
    """
    shapes = [(one.num_experts, tuple(one.layer_ids.tolist())) for one in windows]
    for (experts, layers), one in zip(shapes, windows, strict=True):
        model.matches(num_experts=experts, layer_ids=np.asarray(layers))
        if one.top_k > model.top_k:
            raise ModelError(f"{one.name} has {one.top_k} experts a token, {model.name} has top-{model.top_k}",
                             hint="check --model")  # fmt: skip
    if shapes[0] != shapes[1]:
        raise OptionError(
            f"the windows have {shapes[0][0]} experts in {len(shapes[0][1])} layers and {shapes[1][0]} in "
            f"{len(shapes[1][1])}: they must be of the same layers",
            hint="record both in the same way",
        )


def check_unseen(windows: Windows) -> list[str]:
    """What to say of traffic that is in both windows, where it is little.

    Raises
    ------
    OptionError : it is half of the second one, or more.
    """
    first, second = windows
    share = fingerprint(first).share_of(fingerprint(second)) or 0.0
    if share >= SAME:
        raise OptionError(
            f"{share:.0%} of {second.name} is in {first.name} too: a gain is judged on traffic that the plan has not "
            "seen",
            hint="give two windows recorded one after the other, or one to be split",
        )
    notes = [f"{share:.0%} of the later window is in the earlier one too"] if share >= FITTED else []
    loads = [one.load_BLE for one in windows if isinstance(one, LoadProfile)]
    if len(loads) == len(windows) and _runs_on(loads[0], loads[1]):
        notes.append(
            f"no count of {second.name} is below that of {first.name}: if counters were not set back in between, the "
            "later window holds the earlier one ('poise convert BOTH --ranks steps --counters running' parts them)"
        )
    return notes


def _runs_on(earlier_BLE: NDArray[Any], later_BLE: NDArray[Any]) -> bool:
    """Whether counters may have run on from one window into the next: no count falls from any record to the next. Of
    one record each, a longer window of the same traffic looks alike.
    """
    records = [loads[b : b + 1] for loads in (earlier_BLE, later_BLE) for b in range(len(loads))]
    return all(may_contain(after, before) for before, after in pairwise(records))


def recorded_phases(windows: Windows) -> tuple[Phase, ...]:
    """Phases that have rows of their own; none where loads, or a trace of prefill alone, do not tell them apart."""
    if any(isinstance(one, LoadProfile) for one in windows):
        return ()
    flags: list[bool] = []
    for one in windows:
        assert isinstance(one, RoutingTrace)
        flags += np.unique(one.is_decode).tolist()
    if not any(flags):  # what a recorder writes that does not know
        return ()
    return PHASES if not all(flags) else ("decode",)


@dataclass(frozen=True, slots=True, eq=False)
class PhaseTraffic:
    """What one phase has in two windows.

    Parameters
    ----------
    phase : prefill or decode.
    windows : its rows, or all where the record does not tell phases apart.
    tokens : N, tokens a step; None: the recorded steps.
    notes : what was left out of the windows.
    homes, seed : as for :func:`poise.routing.batching.make_batch`.
    """

    phase: Phase
    windows: Windows
    tokens: int | None
    homes: Homes | None = None
    seed: int = 0
    notes: tuple[str, ...] = ()

    def batch(self, which: int, tokens: int | None = None, steps: int = MOST_STEPS) -> RoutingBatch:
        """Steps of window 0 or 1, of N tokens or as many as said, at most ``steps``.

        Raises
        ------
        OptionError : loads are frequencies and no N is known.
        """
        return make_batch(self.windows[which], tokens_per_step=tokens or self.tokens, max_steps=steps, seed=self.seed,
                          homes=self.homes)  # fmt: skip


def phase_traffic(windows: Windows, phase: Phase, tokens: int | None, homes: Homes | None, seed: int) -> PhaseTraffic:
    """The rows of one phase.

    Raises
    ------
    TraceError : a window that tells phases apart has none of this one.
    """
    if recorded_phases(windows):
        parts = []
        for one in windows:
            assert isinstance(one, RoutingTrace)
            if not (one.is_decode == (phase == "decode")).any():
                raise TraceError(f"{one.name} has no {phase} token", hint="--phase names the phase it has")
            parts.append(one.select(phase=phase))
        windows = parts[0], parts[1]
    thin = thinned(windows[0], tokens), thinned(windows[1], tokens)
    return PhaseTraffic(phase, (thin[0][0], thin[1][0]), tokens, homes, seed, tuple(said for _, said in thin if said))


def thinned(traffic: RoutingTrace | LoadProfile, tokens: int | None) -> tuple[RoutingTrace | LoadProfile, str]:
    """At most :data:`MOST_STEPS` recorded steps or loads, spread evenly over a window, and in words what is left out; a
    trace that is batched into steps of N ``tokens`` stays whole.
    """
    kept: RoutingTrace | LoadProfile = traffic
    if isinstance(traffic, LoadProfile):
        every = -(-traffic.num_steps // MOST_STEPS)
        kept = traffic if every == 1 else traffic.steps(slice(0, None, every))
        count, total = kept.num_steps, traffic.num_steps
    elif traffic.step is None or tokens is not None:
        return traffic, ""
    else:
        ids = np.unique(traffic.step)
        some = ids[:: -(-len(ids) // MOST_STEPS)]
        kept = traffic if len(some) == len(ids) else traffic.rows(np.isin(traffic.step, some))
        count, total = len(some), len(ids)
    said = f"{count:,} of {total:,} recorded steps of {traffic.name}, spread evenly, are planned on and judged"
    return kept, "" if count == total else said


def with_top_k(traffic: RoutingTrace | LoadProfile, top_k: int) -> RoutingTrace | LoadProfile:
    """Loads whose record does not say how many experts a token has, with the model's number."""
    if isinstance(traffic, LoadProfile) and traffic.top_k == 1:
        return replace(traffic, top_k=top_k)
    return traffic


def refuse_frequencies(windows: Sequence[RoutingTrace | LoadProfile]) -> None:
    """Raise OptionError where loads are frequencies or shares, which say nothing of a step's size."""
    for one in windows:
        if isinstance(one, LoadProfile):
            make_batch(one.steps(slice(0, MOST_STEPS)))


def verdict_notes(windows: Windows, model: ModelSpec, assumed: dict[str, int], many: int) -> list[str]:
    """What a reader must know of the traffic: sizes of steps that were ``assumed`` (phase -> tokens a rank), loads of
    fewer tokens than steps have (``many`` at most), phases that are not told apart, loads that hide what passes differ
    in, picks that are missing.
    """
    notes = [
        f"{phase}: {each} tokens a rank and step are assumed; nothing said how many" for phase, each in assumed.items()
    ]
    tables = [one for one in windows if isinstance(one, LoadProfile)]
    for one in tables:
        notes += one.notes
    for one in tables:
        tokens = float(one.load_BLE.sum(axis=2, dtype=np.float64).max()) / model.top_k
        if 1 < tokens < many:
            notes.append(
                f"{one.name} has {tokens:,.0f} tokens a layer in a record, scaled to steps of {many:,}: how uneven "
                "they are is by chance in part"
            )
    if tables:
        notes.append("loads do not tell prefill from decode: both are judged by the same")
        if max(one.num_steps for one in tables) < 2:
            notes.append("one recorded load a window: two samples, and what passes differ in is not in them")
    elif not recorded_phases(windows):
        notes.append("the traces do not say which tokens were generated: both phases are judged by all")
    if any(isinstance(one, RoutingTrace) and one.top_k < model.top_k for one in windows):
        notes.append(f"{windows[0].top_k} experts a token were recorded, {model.name} has {model.top_k}")
    return list(dict.fromkeys(notes))  # both halves of one file say the same


def much(traffic: RoutingTrace | LoadProfile) -> str:
    """How large it is, in words."""
    many, what = (traffic.num_tokens, "tokens") if isinstance(traffic, RoutingTrace) else (traffic.num_steps, "steps")
    return f"{many:,} {what}"


def some_of(traffic: RoutingTrace | LoadProfile, seconds: float) -> RoutingTrace | LoadProfile:
    """As much of the traffic, spread evenly, as takes nominal ``seconds`` to be halved, batched and fingerprinted."""
    if isinstance(traffic, LoadProfile):
        every = ceil(traffic.load_BLE.size * LOAD_SECONDS / seconds)
        return traffic if every < 2 else traffic.steps(slice(0, None, min(every, traffic.num_steps // 2)))
    every, requests = ceil(traffic.experts.size * PICK_SECONDS / seconds), traffic.requests()
    if every < 2 or len(requests) < 4 or len(traffic.domain_names) > 1:  # a domain needs two requests to be halved
        return traffic
    return traffic.rows(np.isin(traffic.request, requests[:: min(every, len(requests) // 2)]))
