"""The table of rows that were run, as a dated report."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.engines_live.environment import ENGINE, SGLANG, Engine

PACKAGES = ("torch", "transformers", "numba", "numpy")


@dataclass(frozen=True)
class Row:
    """A test: what it asks, how it ended, seconds of its engine's run (0: another row's), what was seen."""

    asked: str
    result: str
    seconds: int
    seen: str


def rows(reports: Sequence[pytest.TestReport], sentences: Mapping[str, str]) -> list[Row]:
    """A row a test, in the order in which they ran."""
    out: dict[str, Row] = {}
    for one in reports:
        if one.when != "call" and one.passed:
            continue
        seconds, seen = next((value for name, value in one.user_properties if name == "row"), (0, ""))
        out[one.nodeid] = Row(sentences.get(one.nodeid, one.nodeid), one.outcome, seconds, seen)
    return list(out.values())


def beside(engine: Engine) -> str:
    """An engine, and what its environment has."""
    return ", ".join(
        [engine.requirement.replace("==", " "), *(" ".join(one) for one in engine.versions(*PACKAGES).items())]
    )


def write(path: Path, made: Sequence[Row]) -> None:
    """Markdown."""
    versions = "; ".join(beside(engine) for engine in (ENGINE, SGLANG) if engine.made)
    passed = sum(row.result == "passed" for row in made)
    lines = [
        f"# Engines that ran, {datetime.date.today().isoformat()}", "",
        f"`make test-engines`: {passed} of {len(made)} rows as asked. {versions}; Python {platform.python_version()}. Seconds are of the",
        f"engine's run, start included, on {os.cpu_count()} cores; a row without any looks at the run of another.", "",
        "| row | result | seconds | seen |", "|---|---|---|---|",
        *(f"| {row.asked} | {row.result} | {row.seconds or ''} | {row.seen} |" for row in made), "",
    ]  # fmt: skip
    path.write_text("\n".join(lines))
