"""Torchtitan's own modules, where its environment was made (benchmarks/peers.py --make-only)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers import many_only

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from peer import environments, titan  # noqa: E402


@many_only("torchtitan's layout on stand-ins: support_titan.py")
def test_stand_in_and_sharding_beside_the_real_source():
    if not environments.made(titan.PEER):
        pytest.skip("torchtitan's environment is not here: python benchmarks/peers.py --make-only --peers torchtitan")
    done = subprocess.run(
        [str(environments.python(titan.PEER)), "tests/train/titan_real.py"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 3
