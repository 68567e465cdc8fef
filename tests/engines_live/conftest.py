"""Runs that several rows look at, and the table of rows.

``POISE_ENGINES_REPORT=FILE`` writes the table; ``POISE_ENGINES_RUNS=FOLDER`` keeps the runs, and judges those that it has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tests.engines_live import report
from tests.engines_live.environment import ENGINE
from tests.engines_live.runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The engine's runs by name, each made when a row asks for it first."""
    if not ENGINE.made:
        pytest.fail(f"{ENGINE.folder} is not there: make test-engines, or python -m tests.engines_live.environment")
    kept = os.environ.get("POISE_ENGINES_RUNS")
    return Runs(ENGINE, Path(kept) if kept else tmp_path_factory.mktemp("engines"))


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[[float, str], None]:
    """``row(seconds, said)`` puts what was seen, beside the test's own sentence, into the table."""

    def note(seconds: float, said: str) -> None:
        request.node.user_properties.append(("row", (round(seconds), said)))

    return note


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rows that others are compared with come first."""
    items.sort(key=lambda item: "test_vllm" not in item.nodeid and "test_sglang" not in item.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _reports().append(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    sentences = {}
    for item in session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        sentences[item.nodeid] = (item.function.__doc__ or item.name).strip().splitlines()[0].format(**params)
    if file := os.environ.get("POISE_ENGINES_REPORT"):
        report.write(Path(file), report.rows(_reports(), sentences))


@cache
def _reports() -> list[pytest.TestReport]:
    return []
