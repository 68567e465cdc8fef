"""Run methods and policies on frozen cases: a comparison each, as ``poise compare`` makes it."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from poise import api
from poise.bench.cases import FrozenCase, frozen_cases
from poise.bench.results import BenchResults, BenchRow, CaseResult, SkippedCase
from poise.bench.traffic import check_folder
from poise.machine.settle import ground
from poise.planning.solve.solve import METHODS
from poise.replay.compare import IN_SAMPLE, Comparison
from poise.stepwise.registry import parse_policy
from poise.util.errors import NoResultError, OptionError, UnavailableError
from poise.util.words import close_to
from poise.version import VERSION

PACKAGES = ("numpy", "scipy", "highspy", "numba")
"""What computes, beside poise."""
BEGINNING = re.compile(r"[0-9a-f]{6,64}")
"""Of a hash, as cases are asked for."""
WORK = 60.0
"""Units of work for each plan; no clock, so that figures are the same on every machine."""


def chosen_cases(only: Sequence[str]) -> list[FrozenCase]:
    """Cases whose name has one of some texts in it, or whose hash begins with one; all without any.

    Raises
    ------
    OptionError : a text that is in none.
    """
    every = frozen_cases()
    if not only:
        return list(every.values())
    wanted = {text: {name for name, case in every.items() if text in name or _begins(case, text)} for text in only}
    for text, names in wanted.items():
        if not (text and names):
            raise OptionError(f"no case has {text!r} in its name", hint=f"{close_to(text, every)[:400]} (--list)")
    return [case for name, case in every.items() if any(name in names for names in wanted.values())]


def _begins(case: FrozenCase, text: str) -> bool:
    return BEGINNING.fullmatch(text) is not None and case.digest().startswith(text)


def run_case(
    case: FrozenCase, data: Path | None, methods: Sequence[str], policies: Sequence[str] = (), *,
    over: str | None = None, work: float = WORK,
) -> CaseResult:  # fmt: skip
    """One case.

    Parameters
    ----------
    data : folder of files that do not ship, or None.
    methods, policies : static methods, and step policies over the map of ``over`` (default: of the last method), by
        name: poise's own, and those of other packages (docs/extend.md).
    work : units of work of each plan.

    Raises
    ------
    UnavailableError : its traffic is not here. NoResultError : no method has a map. OptionError : an unknown name.
    """
    fit, judge = case.fit.load(data), case.judge.load(data)
    found = api.compare(
        judge, case.cluster, fit=fit, placements=tuple(methods), redundant=case.redundant, model=case.model,
        traffic=case.traffic, split=case.split, engine=case.engine, tokens_per_step=case.tokens_per_step, work=work,
        seed=case.seed, fast=tuple(policies), fast_over=over, step_slots=case.step_slots, warm_up=case.warm_up,
    )  # fmt: skip
    return CaseResult(
        case.name, case.digest(), case.cluster, ground(found.cluster), found.model.name, case.tokens, case.redundant,
        case.seed, len(found.bounds_B[found.judged_on]), tuple(_rows(found)), found.notes,
    )  # fmt: skip


def _rows(found: Comparison) -> Iterator[BenchRow]:
    held_out = [row for row in found.rows() if row["part"] == found.judged_on]
    for entry, row in zip(found.entries, held_out, strict=False):  # the last row is the bound
        got, fitted = (found.replays[entry.name, part] for part in (found.judged_on, IN_SAMPLE))
        spread = row["step_seconds"]
        yield BenchRow(
            entry.name, spread["mean"], spread["p99"], got.imbalance, got.imbalance_p99, float(got.bound_B.mean()),
            float(fitted.step_seconds_B.mean()), entry.seconds,
        )  # fmt: skip


def run(
    cases: Sequence[FrozenCase], data: Path | None, methods: Sequence[str], policies: Sequence[str] = (), *,
    over: str | None = None, work: float = WORK, command: str = "",
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[BenchResults]:  # fmt: skip
    """The results so far after every case, so that whoever is interrupted has them; parameters of :func:`run_case`.

    Raises
    ------
    OptionError : an unknown name of a method or policy, or no data folder.
    """
    for name in methods:
        METHODS.ask(name)
    for spec in policies:
        parse_policy(spec, model_named=True)
    check_folder(data)
    made: list[CaseResult] = []
    skipped: list[SkippedCase] = []
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    for turn, case in enumerate(cases):
        if progress:
            progress(case.name, turn / len(cases))
        try:
            made.append(run_case(case, data, methods, policies, over=over, work=work))
        except (UnavailableError, NoResultError) as error:
            hint = f" ({error.hint})" if error.hint else ""
            skipped.append(SkippedCase(case.name, case.digest(), f"{error.message}{hint}"))
        yield BenchResults(command, now, versions(), host(), work, tuple(made), tuple(skipped))


def versions() -> dict[str, str]:
    """Of poise, Python and what computes."""
    found = {"poise": VERSION, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def host() -> dict[str, str | int]:
    """The machine that plans: what its wall clock depends on, and no name of it."""
    return {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count() or 0}
