"""Results of a run on frozen cases: one schema, in JSON, and what several of them say together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poise.util.errors import NoResultError, OptionError
from poise.util.files import write_whole
from poise.util.jsonfile import read_json
from poise.util.words import percent

SCHEMA = 1
"""One more where a key goes or means something else; docs/trace-format.md has the keys."""
MAX_BYTES = 64 << 20
MOST_CASES, MOST_ROWS, MOST_TEXT = 10_000, 1_000, 2_000
LEAST_SECONDS, MOST_NUMBER = 1e-12, 1e18
LOST = 0.005
"""Lead of the best of all others from which a case is lost."""
ROW_HEADS = ("method", "ms", "over the bound", "imbalance", "p99", "ms, fitted", "planning s")
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class BenchRow:
    """A method on a case, judged on traffic that it was not given.

    Parameters
    ----------
    method : its name; of a step policy ``MAP + POLICY``.
    seconds, seconds_p99 : modelled, the MoE layers of a step that were recorded: mean and 99th percentile over steps.
    imbalance, imbalance_p99 : tokens of the fullest over the mean device, mean and 99th percentile over steps, layers.
    bound_seconds : that no placement with the memory of this row can beat, mean over steps.
    fitted_seconds : as ``seconds``, on the traffic that the method was given.
    plan_seconds : wall clock of planning; None for a policy, which plans in every step.
    """

    method: str
    seconds: float
    seconds_p99: float
    imbalance: float
    imbalance_p99: float
    bound_seconds: float
    fitted_seconds: float
    plan_seconds: float | None

    def cells(self) -> list[str]:
        """Under :data:`ROW_HEADS`."""
        return [
            self.method, f"{1e3 * self.seconds:.3f}",
            f"{self.seconds / self.bound_seconds:.3f}" if self.bound_seconds else "", f"{self.imbalance:.3f}",
            f"{self.imbalance_p99:.2f}", f"{1e3 * self.fitted_seconds:.3f}",
            "" if self.plan_seconds is None else f"{self.plan_seconds:.1f}",
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class CaseResult:
    """A case with its rows.

    Parameters
    ----------
    name, hash : of the case.
    machine : the machine that is modelled, as the case names it, and what its times rest on.
    model : preset, or ``generic``.
    tokens, redundant, seed : of the case.
    steps : judged steps.
    rows : in the order in which they were asked for.
    notes : what a reader must know, methods that are left out too.
    """

    name: str
    hash: str
    machine: str
    ground: str
    model: str
    tokens: int
    redundant: int
    seed: int
    steps: int
    rows: tuple[BenchRow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SkippedCase:
    """A case that was asked for and could not be run here, and why."""

    name: str
    hash: str
    reason: str


@dataclass(frozen=True, slots=True)
class BenchResults:
    """What ``poise bench -o`` writes.

    Parameters
    ----------
    command : line that made it. made : when, in UTC.
    versions : of poise, Python and what computes. host : the machine that planned.
    work : units of work that each method had for each plan.
    cases, skipped : what ran, and what did not.
    """

    command: str
    made: str
    versions: Mapping[str, str]
    host: Mapping[str, Any]
    work: float
    cases: tuple[CaseResult, ...]
    skipped: tuple[SkippedCase, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values, the schema first."""
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the file; it appears whole or not at all.

        Raises
        ------
        OptionError : it cannot be written.
        """
        write_whole(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", OptionError)

    @classmethod
    def load(cls, path: str | Path) -> BenchResults:
        """Read a file that anybody may have written.

        Raises
        ------
        OptionError : no such file, of another schema, or not as the schema says.
        """
        data = read_json(Path(path), MAX_BYTES, OptionError, hint="'poise bench -o results.json' writes one")
        try:
            return _results(data)
        except OptionError as error:
            raise OptionError(f"{str(path)[:200]!r}: {error.message}", hint=error.hint) from None


def _results(data: Any) -> BenchResults:
    found = _object(data, "a results file")
    schema = found.get("schema")
    if schema != SCHEMA:
        raise OptionError(f"schema {str(schema)[:40]!r}, this poise reads {SCHEMA}", hint="run the cases again")
    cases = tuple(_case(one) for one in _list(found, "cases", MOST_CASES))
    names = [case.name for case in cases]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise OptionError(f"case {twice!r} comes twice")
    skipped = tuple(
        SkippedCase(*(_text(_object(one, "a skipped case"), key) for key in ("name", "hash", "reason")))
        for one in _list(found, "skipped", MOST_CASES)
    )
    versions, host = (_object(found.get(key), key) for key in ("versions", "host"))
    return BenchResults(
        _text(found, "command"), _text(found, "made"), {str(key): str(value) for key, value in versions.items()},
        host, _number(found, "work"), cases, skipped,
    )  # fmt: skip


def _case(data: Any) -> CaseResult:
    found = _object(data, "a case")
    name, digest, machine, ground, model = (_text(found, key) for key in ("name", "hash", "machine", "ground", "model"))
    if not HASH.fullmatch(digest):
        raise OptionError(f"case {name!r} has hash {digest[:80]!r}, which is no sha256")
    tokens, redundant, seed, steps = (_whole(found, key) for key in ("tokens", "redundant", "seed", "steps"))
    rows = tuple(_row(one) for one in _list(found, "rows", MOST_ROWS))
    methods = [row.method for row in rows]
    if twice := next((one for one in methods if methods.count(one) > 1), ""):
        raise OptionError(f"case {name!r} has method {twice!r} twice")
    notes = tuple(note for note in _list(found, "notes", MOST_ROWS) if isinstance(note, str))
    return CaseResult(name, digest, machine, ground, model, tokens, redundant, seed, steps, rows, notes)


def _row(data: Any) -> BenchRow:
    found = _object(data, "a row")
    keys = ("seconds", "seconds_p99", "imbalance", "imbalance_p99", "bound_seconds", "fitted_seconds")
    numbers = {key: _number(found, key, LEAST_SECONDS if key == "seconds" else 0.0) for key in keys}
    plan = None if found.get("plan_seconds") is None else _number(found, "plan_seconds")
    return BenchRow(_text(found, "method"), **numbers, plan_seconds=plan)


def _object(data: Any, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise OptionError(f"{what} must be an object, got {str(data)[:40]!r}")
    return data


def _list(found: dict[str, Any], key: str, most: int) -> list[Any]:
    value = found.get(key)
    if not isinstance(value, list) or len(value) > most:
        raise OptionError(f"{key} must be a list of at most {most}, got {str(value)[:40]!r}")
    return value


def _text(found: dict[str, Any], key: str) -> str:
    value = found.get(key)
    if not isinstance(value, str) or len(value) > MOST_TEXT:
        raise OptionError(f"{key} must be a text of at most {MOST_TEXT} characters, got {str(value)[:40]!r}")
    return value


def _number(found: dict[str, Any], key: str, least: float = 0.0) -> float:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= MOST_NUMBER:
        raise OptionError(f"{key} must be a number from {least:g} to {MOST_NUMBER:g}, got {str(value)[:40]!r}")
    return float(value)


def _whole(found: dict[str, Any], key: str) -> int:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise OptionError(f"{key} must be a whole number of at least 0, got {str(value)[:40]!r}")
    return value


@dataclass(frozen=True, slots=True)
class Standing:
    """A method against the best of all others, over cases that it has a figure for.

    Parameters
    ----------
    name : of the method. cases : how many.
    lost : those in which the best of all others, which nobody can know beforehand, is more than :data:`LOST` faster.
    lead, worst : over that best: mean, and least.
    """

    name: str
    cases: int
    lost: int
    lead: float
    worst: float

    def cells(self) -> list[str]:
        """As a table shows it."""
        return [self.name, str(self.cases), str(self.lost), percent(self.lead), percent(self.worst)]


STANDING_HEADS = ("method", "cases", "lost to the best of all others", "lead over it, mean", "worst")


def standings(times: Sequence[Mapping[str, float]]) -> list[Standing]:
    """Every method of any case: those of the most cases first, and of them the fewest lost.

    Parameters
    ----------
    times : of each case, seconds of a step by method; a case with one method says nothing.
    """
    out = []
    for name in dict.fromkeys(name for case in times for name in case):
        leads = np.array(
            [
                1 - case[name] / min(case[other] for other in case if other != name)
                for case in times
                if name in case and len(case) > 1
            ]
        )
        if leads.size:
            lost = int((leads < -LOST).sum())
            out.append(Standing(name, leads.size, lost, float(leads.mean()), float(leads.min())))
    return sorted(out, key=lambda one: (-one.cases, one.lost, -one.lead))


@dataclass(frozen=True, slots=True)
class ComparedResults:
    """Results files side by side.

    Parameters
    ----------
    names : a name each.
    results : the files.
    cases : those that all files have, in the order of the first.
    notes : what differs between the files and may matter.
    """

    names: tuple[str, ...]
    results: tuple[BenchResults, ...]
    cases: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, results: Sequence[BenchResults], names: Sequence[str]) -> ComparedResults:
        """Put files side by side.

        Raises
        ------
        OptionError : fewer than two files, or a case that is another one in another file.
        NoResultError : no case is in all of them.
        """
        if len(results) < 2:
            raise OptionError(f"a comparison needs at least 2 results files, got {len(results)}")
        known: dict[str, tuple[str, str]] = {}
        for name, one in zip(names, results, strict=True):
            for case in one.cases:
                file, digest = known.setdefault(case.name, (name, case.hash))
                if digest != case.hash:
                    raise OptionError(
                        f"case {case.name!r} is {digest[:12]}... in {file} and {case.hash[:12]}... in {name}: its "
                        "traffic, machine or model is another one",
                        hint="run both with the cases of one release",
                    )
        both = [name for name in known if all(any(case.name == name for case in one.cases) for one in results)]
        if not both:
            raise NoResultError(f"no case is in all of {', '.join(names)}", hint="run the same --only")
        return cls(tuple(names), tuple(results), tuple(both), tuple(_differences(names, results, both, len(known))))

    def rows(self, case: str) -> dict[str, BenchRow]:
        """Of a case, rows by ``file: method``."""
        return {
            f"{name}: {row.method}": row
            for name, one in zip(self.names, self.results, strict=True)
            for row in next(found for found in one.cases if found.name == case).rows
        }

    def standings(self) -> list[Standing]:
        """Of every method of every file."""
        return standings([{name: row.seconds for name, row in self.rows(case).items()} for case in self.cases])

    def changes(self) -> list[tuple[str, str, float, float]]:
        """Of what the first file and another one have both: file, method, share of time that the other one saves, mean
        over cases, and the least.
        """
        first, out = self.results[0], []
        of_first = {(case.name, row.method): row.seconds for case in first.cases for row in case.rows}
        for name, one in zip(self.names[1:], self.results[1:], strict=True):
            saved: dict[str, list[float]] = {}
            for case in one.cases:
                for row in case.rows:
                    if case.name in self.cases and (before := of_first.get((case.name, row.method))):
                        saved.setdefault(row.method, []).append(1 - row.seconds / before)
            out += [(name, method, float(np.mean(shares)), min(shares)) for method, shares in saved.items()]
        return out

    def sentence(self) -> str:
        """What it comes down to."""
        found = self.standings()
        if not found:
            return f"{len(self.cases)} cases, and no two methods to compare."
        best = found[0]
        fewer = sum(one.cases < best.cases for one in found)
        left = f" {fewer} methods have fewer cases and are not ranked with it." if fewer else ""
        return (
            f"{best.name} is lost least often: {best.lost} of {best.cases} cases by more than {percent(LOST)} to the "
            f"best of all others; lead over it {percent(best.lead)} in the mean, {percent(best.worst)} at worst.{left}"
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "files": list(self.names), "sentence": self.sentence(), "notes": list(self.notes),
            "standings": [asdict(one) for one in self.standings()],
            "changes": [
                {"file": file, "method": method, "saved_mean": mean, "saved_least": least}
                for file, method, mean, least in self.changes()
            ],
            "cases": [
                {"name": case, "rows": {name: asdict(row) for name, row in self.rows(case).items()}}
                for case in self.cases
            ],
        }  # fmt: skip


def _differences(
    names: Sequence[str], results: Sequence[BenchResults], both: Sequence[str], known: int
) -> list[str]:  # fmt: skip
    out = []
    if len(both) < known:
        out.append(f"{known - len(both)} of {known} cases are not in every file: they are left out")
    for what, values in (
        ("units of work a plan", [f"{one.work:g}" for one in results]),
        ("versions of poise", [one.versions.get("poise", "unknown") for one in results]),
        ("versions of numpy", [one.versions.get("numpy", "unknown") for one in results]),
    ):
        if len(set(values)) > 1:
            each = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
            out.append(f"{what} differ: {each}")
    return out
