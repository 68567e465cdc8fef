"""The kernels equal their mirrors bit for bit in Triton's interpreter, compile for a GPU, and ask the host nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.helpers import few_or
from tests.runtime.device.cases import random_case

from poise.util.errors import OptionError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed: pip install 'poise-moe[device]'")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from poise.runtime.device import planner  # noqa: E402

ROOT = Path(__file__).parents[3]
CASES, LARGE = few_or((300, 40), (1, 0))


def ran(*words: str, **environment: str) -> str:
    """What a script of its own process prints; it ends well."""
    words = (sys.executable, "-W", "ignore", "-m", *words)
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_in_the_interpreter_they_equal_the_mirror_in_any_order_and_mutants_do_not():
    words = ("tests.runtime.device.interpreted", str(CASES), "--large", str(LARGE), *few_or(("--mutants",), ()))
    assert "all bits equal" in ran(*words, TRITON_INTERPRET="1")


def test_they_compile_for_a_gpu_that_is_not_here():
    kernels = few_or(("split", "rows", "prepare", "product", "outer"), ("rows",))
    said = ran("tests.runtime.device.compiled", *kernels)
    assert int(said.split(" cubins")[0].split()[-1]) >= len(kernels), said


class NoWord(TorchDispatchMode):
    """Refuses every operation on tensors: what allocates, copies or waits for a value is one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} inside a step")


class Launches:
    """In place of a kernel: what it was launched with."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        def launch(*tensors, **sizes):
            self.seen.append(
                (grid, [each.data_ptr() if hasattr(each, "data_ptr") else each for each in tensors], sizes)
            )

        return launch


@pytest.fixture
def layer(monkeypatch):
    """Kernels of a layer, whose launches are recorded and not run."""
    case = random_case(np.random.default_rng(0), experts=12, nodes=[2, 2], step_slots=2)
    launches = Launches()
    for name in ("prepare_kernel", "split_kernel", "rows_kernel"):
        monkeypatch.setattr(planner, name, launches)
    return planner.DeviceKernels(case.table, case.price, 1 << 16, "cpu"), launches


def decode_step(kernels, load_SE, load_E):
    """Between two steps replicas for what is expected; after the gate, the plan and this rank's row."""
    slots, leave = kernels.prepare(load_E, kernels.expert_DS)
    return kernels.rows(load_SE, kernels.split(load_SE, slots, leave), 1)


def test_a_decode_step_launches_the_same_whatever_the_counts_and_touches_no_value(layer):
    kernels, launches = layer
    load_SE, load_E = torch.zeros((4, 12), dtype=torch.int32), torch.zeros(12, dtype=torch.int32)
    with NoWord():
        decode_step(kernels, load_SE, load_E)
    first, launches.seen[:] = [*launches.seen], []
    load_SE += torch.arange(48, dtype=torch.int32).view(4, 12)
    load_E += 7
    with NoWord():
        decode_step(kernels, load_SE, load_E)
    assert launches.seen == first and len(first) == 3


@pytest.mark.parametrize("word", ["item", "cpu", "clone", "nonzero"])
def test_what_a_graph_does_not_allow_is_refused_here_too(layer, monkeypatch, word):
    kernels, _ = layer
    whole = planner.DeviceKernels.prepare

    def asks(self, load_E, expert_DS):
        getattr(load_E.sum() if word == "item" else load_E, word)()
        return whole(self, load_E, expert_DS)

    monkeypatch.setattr(planner.DeviceKernels, "prepare", asks)
    with NoWord(), pytest.raises(AssertionError, match="inside a step"):
        decode_step(kernels, torch.zeros((4, 12), dtype=torch.int32), torch.zeros(12, dtype=torch.int32))


def test_other_types_shapes_and_strides_are_refused(layer):
    kernels, _ = layer
    good = torch.zeros((4, 12), dtype=torch.int32)
    for bad in (good.long(), good[:, :11].contiguous(), torch.zeros((12, 4), dtype=torch.int32).T):
        with pytest.raises(OptionError, match="contiguous int32"):
            kernels.split(bad, kernels.expert_DS, kernels.none)


def test_numbers_that_could_overflow_are_refused():
    case = random_case(np.random.default_rng(0), experts=12, nodes=[2, 2])
    with pytest.raises(OptionError, match="pairs of a step on 4 devices are more than"):
        planner.DeviceKernels(case.table, case.price, 1 << 29, "cpu")
