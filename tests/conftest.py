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
