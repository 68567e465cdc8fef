"""What engines get who load poise's plugins: nothing, unless it was asked for, and then no more than that needs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from poise.planning.placement import Placement

HEAVY = {"numba", "llvmlite", "scipy", "highspy", "rich", "typer"}
GROUPS = ("vllm.general_plugins", "sglang.srt.plugins")
STUBS = """
import sys, types
import numpy
class Policy:
    @classmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks, old=None): return weight
names = "vllm vllm.distributed vllm.distributed.eplb vllm.distributed.eplb.policy torch".split()
sys.modules.update({name: types.ModuleType(name) for name in names})
sys.modules["torch"].ones = numpy.ones
table = sys.modules["vllm.distributed.eplb.policy"].EPLB_POLICIES = {"default": Policy}
class Weight(numpy.ndarray):
    double = cpu = numpy = long = lambda self: self
    is_floating_point = lambda self: False
    new_tensor = lambda self, array: array
"""
LOAD = """
import importlib.metadata, sys
before = set(sys.modules)
for point in importlib.metadata.entry_points(group="{group}", name="poise"):
    point.load()()
foreign = {{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names - {{"poise"}}
"""
END = "import json; print(json.dumps(sorted(foreign)))"
CALL = """
map_ = table["default"].rebalance_experts(numpy.ones((2, 4)).view(Weight) * numpy.arange(1, 5), 6, 1, 1, 2, None)
foreign = {name.partition(".")[0] for name in sys.modules}
"""


def imported(code: str, **variables: str) -> list[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("POISE_")} | variables
    done = subprocess.run([sys.executable, "-c", code + END], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("variables", [{}, {"POISE_EPLB": "0", "POISE_STATIC_MAP": " "}])
def test_merely_installed_nothing_is_imported(group, variables):
    assert imported(LOAD.format(group=group), **variables) == []


def test_sglang_asked_for_a_static_map_needs_no_plugin(tmp_path):
    assert imported(LOAD.format(group=GROUPS[1]), POISE_STATIC_MAP=str(tmp_path / "none.npz")) == []


def test_a_static_map_compiles_nothing(tmp_path):
    Placement(np.array([[3, 0, 2, 1, 2, 0]] * 2), np.repeat([0, 1], 3), 4, 2).save(tmp_path / "p.npz")
    code = STUBS + LOAD.format(group=GROUPS[0])
    held = imported(code + CALL + "assert map_.tolist() == [[3, 0, 2, 1, 2, 0]] * 2\n",
                    POISE_STATIC_MAP=str(tmp_path / "p.npz"))  # fmt: skip
    assert not HEAVY & set(held)


def test_vllm_starts_before_numba_is_imported():
    """vLLM's CPU build looks into every module while it starts, and breaks on llvmlite's."""
    code = STUBS + LOAD.format(group=GROUPS[0])
    assert not HEAVY & set(imported(code, POISE_EPLB="1"))
