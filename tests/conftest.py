"""Fixtures that several test packages share."""

import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.kernels import compile_all

SGLANG = "sglang==0.5.23"
VLLM = "0.33.0"

for _number, _handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # under nohup, or in the background of a script; tests send them
        signal.signal(_number, _handler)


LONGEST = tuple(
    f"tests/{name}.py"
    for name in (
        "train/test_citizens", "train/test_parity", "serve/test_serve", "train/test_runs", "train/test_elastic",
        "train/test_example",
    )
)  # fmt: skip
"""Tests that start several processes, the longest first."""


def pytest_collection_modifyitems(items):
    """The longest first on two workers: each gets one half of the items, and what is stolen comes from the end."""
    long = sorted(
        (item for item in items if item.nodeid.startswith(LONGEST)),
        key=lambda item: LONGEST.index(item.nodeid.partition("::")[0]),
    )
    rest = [item for item in items if not item.nodeid.startswith(LONGEST)]
    half = max(0, len(items) // 2 - len(long[::2]))
    items[:] = [*long[::2], *rest[:half], *long[1::2], *rest[half:]]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    """Before there are workers."""
    compile_all()


def unpacked(requirement: str, *folders: str) -> Path:
    """Folders of an engine's wheel; fetched once and kept in the temporary folder."""
    root = Path(tempfile.gettempdir()) / f"poise-{requirement.replace('==', '-')}"
    done = root / ("done-" + "+".join(folder.replace("/", ".") for folder in folders))
    if not done.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
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
