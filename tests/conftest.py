"""Fixtures that several test packages share."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from tests.kernels import compile_all

WHEEL = "sglang==0.5.23"


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


@pytest.fixture(scope="session")
def sglang_wheel() -> Path:
    """SGLang's expert-placement code, unpacked from its wheel; fetched once and kept in the temporary folder."""
    root = Path(tempfile.gettempdir()) / f"poise-{WHEEL.replace('==', '-')}"
    done = root / "done"
    if not done.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--disable-pip-version-check",
                "-d",
                folder,
            ]
            got = subprocess.run([*command, WHEEL], capture_output=True, text=True)
            if got.returncode:
                if os.environ.get("CI"):
                    pytest.fail(f"cannot fetch {WHEEL}: {got.stderr[-300:]}")
                pytest.skip(f"cannot fetch {WHEEL}: not online?")
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                for name in wheel.namelist():
                    if name.startswith("sglang/srt/eplb/"):
                        wheel.extract(name, root)
        done.touch()
    return root
