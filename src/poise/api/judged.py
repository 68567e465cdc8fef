"""Whether an engine should balance its experts, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

from poise.api.asked import machine_of, placement_of
from poise.cost.split import Split
from poise.engines.flags import EplbSetting, eplb_flags
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget, Limit
from poise.planning.engine_rules import parse_engine
from poise.planning.placement import Placement
from poise.planning.problem import Progress
from poise.replay.trial import TrialSetting, judge_phase
from poise.replay.verdict import Verdict
from poise.replay.windows import (
    PHASES,
    check_unseen,
    check_windows,
    phase_traffic,
    recorded_phases,
    refuse_frequencies,
    split_in_time,
    verdict_notes,
    with_top_k,
)
from poise.routing.batch import Homes
from poise.routing.sources import TrafficSource, load
from poise.routing.trace import Phase, RoutingTrace
from poise.util.errors import OptionError

PREFILL_A_RANK, DECODE_A_RANK = 1024, 64
"""Tokens of a step on each rank where a verdict is asked for and none are said: on eight ranks 8,192 and 512."""
A_RANK = {"prefill": PREFILL_A_RANK, "decode": DECODE_A_RANK}


def verdict(
    window: TrafficSource | Sequence[TrafficSource],
    later: TrafficSource | Sequence[TrafficSource] | None = None,
    *,
    cluster: str | Path | Cluster,
    model: str | ModelSpec,
    current: str | Path | Placement | None = None,
    redundant: int | None = None,
    phase: Phase | None = None,
    tokens_per_step: int | None = None,
    prefill_tokens: int | None = None,
    decode_tokens: int | None = None,
    engine: str = "any",
    split: Split | None = None,
    context: int = 4096,
    homes: Homes | None = None,
    time_limit_s: Limit = 60.0,
    work: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Verdict:
    """Whether an engine should balance its experts, with how many redundant slots and by which map.

    Parameters
    ----------
    window, later : traffic of two times, recorded with EPLB off; plans are made on each and judged on the other.
        Without ``later`` one is split in time (:func:`poise.replay.windows.split_in_time`).
    cluster, model : the machine and what it serves.
    current : the map that runs now; default contiguous blocks, what engines do with EPLB off.
    redundant : R; default: 0, 1, 2 and 4 slots a rank are tried, those that engine and memory can hold.
    phase : ``prefill`` or ``decode`` alone; default both.
    tokens_per_step : N of that phase, over all ranks; without ``phase``: ``prefill_tokens``, ``decode_tokens``.
        Default: recorded steps where a trace has them, else :data:`PREFILL_A_RANK` and :data:`DECODE_A_RANK` a rank.
    engine : who holds the maps, and whose measured kernels price them.
    split : how tokens of replicas are split; default: as the engine does, else ``even``.
    context : tokens that a decoded token attends to, or that a prompt has; for the rest of the step alone.
    time_limit_s, work : seconds or units of work for all plans together. A budget that was begun may be stopped: the
        advice is ``insufficient_evidence`` then.
    executor : as for :func:`plan`.

    Raises
    ------
    InputError : the input is wrong, or both windows are the same traffic. NoResultError : no method has a map.
    """
    asked = _tokens_asked(phase, tokens_per_step, {"prefill": prefill_tokens, "decode": decode_tokens})
    machine, rules = machine_of(cluster), parse_engine(engine)
    sizes = ModelSpec.parse(model) if isinstance(model, str) else model
    parts = [with_top_k(load(item, executor), sizes.top_k) for item in (window, later) if item is not None]
    windows = split_in_time(parts[0]) if len(parts) == 1 else (parts[0], parts[1])
    check_windows(windows, sizes)
    seen = check_unseen(windows) if len(parts) == 2 else []
    phases = (recorded_phases(windows) or PHASES) if phase is None else (phase,)
    unsaid = [name for name in phases if asked[name] is None]
    recorded = all(isinstance(one, RoutingTrace) and one.step is not None for one in windows)
    if unsaid and not recorded:
        refuse_frequencies(windows)
        asked.update({name: A_RANK[name] * machine.num_devices for name in unsaid})
    placed = None if current is None else placement_of(current)
    setting = TrialSetting(machine, sizes, rules, placed, redundant, context, seed, rules.choose_split(split))
    budget = Budget.of(time_limit_s, work, executor)
    judged = []
    for turn, name in enumerate(phases, 1):
        own = budget.part(1.0 / len(phases), until=turn / len(phases))
        rows = phase_traffic(windows, name, asked[name], homes, seed)
        judged.append(judge_phase(rows, setting, own, progress=progress))
    others = judged[::-1] if len(judged) == 2 else [None]
    found = [one.with_other(other, setting) for one, other in zip(judged, others, strict=True)]
    guessed: dict[str, int] = {} if recorded else {name: A_RANK[name] for name in unsaid}
    notes = seen + verdict_notes(windows, sizes, guessed, max((many or 0 for many in asked.values()), default=0))
    notes += [said] if (said := rules.caveat(setting.split)) else []
    notes += budget.cut_words("maps")
    out = Verdict(
        tuple(found), engine, repr(machine), sizes.name,
        "contiguous blocks, EPLB off" if placed is None else placed.method, context, (), tuple(notes),
    )  # fmt: skip
    if budget.stopped:
        return out.as_interrupted()
    if out.advice != "recommend_trial":
        return out
    best = out.leading.chosen
    spec = model if isinstance(model, str) else sizes.name
    want = EplbSetting(best.method == "eplb", best.redundant, machine.num_devices, sizes.num_experts, spec)
    return replace(out, flags=eplb_flags(engine, want))


def _tokens_asked(phase: Phase | None, tokens: int | None, each: dict[Phase, int | None]) -> dict[Phase, int | None]:
    """Tokens of a step by phase: ``tokens`` of the one ``phase`` that is asked about, else those of ``each``."""
    if phase not in (None, *PHASES):
        raise OptionError(f"unknown phase {phase!r}", hint="prefill or decode")
    if tokens is not None and phase is None:
        raise OptionError(
            f"{tokens} tokens a step, but of prefill or of decode?",
            hint="--phase, or --prefill-tokens and --decode-tokens",
        )
    if phase is not None and tokens is not None:
        if each[phase] not in (None, tokens):
            raise OptionError(f"{tokens} and {each[phase]} tokens a step of {phase}", hint="give one of them")
        each = {**each, phase: tokens}
    if min((many for many in each.values() if many is not None), default=1) < 1:
        raise OptionError(f"tokens of a step must be at least 1, got {each['prefill']} and {each['decode']}")
    return each
