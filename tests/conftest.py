"""Fixtures that several test packages share."""

import collections
import functools
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import is_hypothesis_test, settings
from tests.cases import Launched, chunks
from tests.helpers import few_or
from tests.kernels import compile_all

SGLANG = "sglang==0.5.23"
ASCEND = "vllm-ascend==0.23.0"
VLLM = "0.33.0"

for _number, _handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # under nohup, or in the background of a script; tests send them
        signal.signal(_number, _handler)


LONGEST = tuple(
    f"tests/{name}.py"
    for name in (
        "train/test_support", "train/test_parity", "serve/test_serve", "serve/test_losses", "train/test_runs", "train/test_elastic",
        "train/test_example", "train/test_foresight", "train/test_muon",
    )
)  # fmt: skip
"""Tests that start several processes, the longest first."""


FEWEST, PART = 5, 5
"""Random examples that a property is tried on at least, if it asks for as many; and of how many it is tried on one."""


def fewer_examples(items):
    """A fifth of the random examples that properties ask for; with POISE_MANY=1 (pieces ``properties``) all of them."""
    for function in {item.obj for item in items if is_hypothesis_test(getattr(item, "obj", None))}:
        asked = function._hypothesis_internal_use_settings
        examples = few_or(asked.max_examples, max(min(asked.max_examples, FEWEST), asked.max_examples // PART))
        function._hypothesis_internal_use_settings = settings(asked, max_examples=examples)


def pytest_collection_modifyitems(items):
    """The longest first on two workers: each gets one half of the items, and what is stolen comes from the end. Cases
    that are launched together stay together."""
    fewer_examples(items)
    long = []
    for file in LONGEST:
        mine = [item for item in items if item.nodeid.startswith(file)]
        for _, of_one in itertools.groupby(mine, key=lambda item: item.nodeid.partition("[")[0]):
            items_of_one = list(of_one)
            together = {
                name: number for number, chunk in enumerate(chunks(chosen_cases(items_of_one))) for name in chunk
            }
            groups = itertools.groupby(items_of_one, key=lambda item: together.get(case_of(item), item.nodeid))
            long += [list(group) for _, group in groups]
    rest = [item for item in items if not item.nodeid.startswith(LONGEST)]
    first, second = ([item for group in part for item in group] for part in (long[::2], long[1::2]))
    half = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *rest[:half], *second, *rest[half:]]


def case_of(item):
    """Name of the case that an item is, "" for other items."""
    return item.callspec.params.get("case", "") if "launched" in item.fixturenames else ""


def chosen_cases(items):
    """Names of those items that are cases."""
    return [case_of(item) for item in items if case_of(item)]


@pytest.fixture(scope="session")
def _launches(tmp_path_factory):
    return Launched(lambda name: tmp_path_factory.mktemp(name))


@pytest.fixture
def launched(request, _launches):
    """``launched(script, **options)`` asserts that the test's case (its parameter ``case``) is right on all ranks."""
    mine = [
        item for item in request.session.items if item.nodeid.partition("[")[0] == request.node.nodeid.partition("[")[0]
    ]
    return functools.partial(_launches.check, names=chosen_cases(mine), name=case_of(request.node))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    """Before there are workers."""
    compile_all()


SHOWN = 15
"""Files that the report at the end of a run on workers names."""


def pytest_terminal_summary(terminalreporter, config):
    """Where the time went: a run on workers tells the seconds of theirs that each of the slowest files took, and all."""
    if not getattr(config.option, "numprocesses", None):
        return
    spent = seconds_of_files(report for reports in terminalreporter.stats.values() for report in reports)
    terminalreporter.section(
        "seconds of workers by file (waiting counts; benchmarks/slices.py is where longer things live)"
    )
    for file, seconds in sorted(spent.items(), key=lambda item: -item[1])[:SHOWN]:
        terminalreporter.line(f"{seconds:7.1f} {file}")
    terminalreporter.line(f"{sum(spent.values()):7.1f} in all")


def seconds_of_files(reports):
    """By file, of all its tests: set up, call and tear down."""
    spent = collections.Counter()
    for report in reports:
        if isinstance(report, pytest.TestReport) and not hasattr(
            report, "context"
        ):  # a subtest is in its test's seconds
            spent[report.nodeid.partition("::")[0]] += report.duration
    return spent


def unpacked(requirement: str, *folders: str, options: tuple[str, ...] = ()) -> Path:
    """Folders of an engine's wheel; fetched once and kept in the temporary folder."""
    root = Path(tempfile.gettempdir()) / f"poise-{requirement.replace('==', '-')}"
    done = root / ("done-" + "+".join(folder.replace("/", ".") for folder in folders))
    if not done.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check",
                       *options]  # fmt: skip
            got = subprocess.run([*command, "-d", folder, requirement], capture_output=True, text=True)
            if got.returncode:
                if os.environ.get("CI"):
                    pytest.fail(f"cannot fetch {requirement}: {got.stderr[-300:]}")
                pytest.skip(f"cannot fetch {requirement}: not online?")
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                for name in wheel.namelist():
                    if name.startswith(tuple(f"{folder}/" for folder in folders)):
                        wheel.extract(name, root)
        done.touch()
    return root


@pytest.fixture(scope="session")
def ascend_wheel() -> Path:
    """vllm-ascend's load-balancer code, which is Python alone, from the wheel of one platform."""
    one = ("--only-binary=:all:", "--platform", "manylinux_2_34_x86_64", "--python-version", "3.11")
    return unpacked(ASCEND, "vllm_ascend/eplb", options=one)


@pytest.fixture(scope="session")
def sglang_wheel() -> Path:
    """SGLang's expert-placement and plugin code, from its wheel."""
    return unpacked(SGLANG, "sglang/srt/eplb", "sglang/srt/plugins")


@pytest.fixture(scope="session")
def vllm_wheel() -> Callable[[str], Path]:
    """vLLM's load-balancer code of a release, from its wheel: a third of a gigabyte, so older ones only with
    POISE_WHEELS=1, or where they were fetched before."""

    def fetch(version: str) -> Path:
        there = list(Path(tempfile.gettempdir()).glob(f"poise-vllm-{version}/done-*"))
        if version != VLLM and not there and not os.environ.get("POISE_WHEELS"):
            pytest.skip(f"vllm {version} is large: fetched with POISE_WHEELS=1")
        return unpacked(f"vllm=={version}", "vllm/distributed/eplb")

    return fetch
