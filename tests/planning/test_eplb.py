"""EPLB's maps against the published function, as it ships in SGLang's wheel."""

import importlib.util
import sys
from itertools import product

import numpy as np
import pytest

from poise.errors import OptionError
from poise.planning.methods.eplb import balanced_packing, rebalance_experts


@pytest.fixture(scope="module")
def published(sglang_wheel):
    path = sglang_wheel / "sglang/srt/eplb/eplb_algorithms/deepseek.py"
    spec = importlib.util.spec_from_file_location("published_eplb", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["published_eplb"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("layers", "experts", "replicas", "groups", "nodes", "gpus"),
    [(2, 8, 8, 1, 1, 4), (3, 16, 24, 4, 2, 8), (2, 12, 16, 4, 2, 8), (2, 64, 72, 8, 4, 8), (4, 256, 320, 8, 8, 64),
     (4, 256, 320, 8, 4, 32), (1, 6, 9, 3, 3, 9)],
)  # fmt: skip
@pytest.mark.parametrize("hierarchical", [True, False])
def test_maps_equal_the_published_ones(published, layers, experts, replicas, groups, nodes, gpus, hierarchical):
    import torch

    for seed in range(5):
        weight = np.random.default_rng(seed).lognormal(sigma=1.0, size=(layers, experts)) * 1000
        theirs = published.rebalance_experts(
            torch.tensor(weight[None]), replicas, replicas // gpus, groups, nodes, enable_hierarchical=hierarchical
        ) if "enable_hierarchical" in published.rebalance_experts.__code__.co_varnames else None  # fmt: skip
        if theirs is None:
            pytest.fail("the published function has another signature")
        ours = rebalance_experts(weight, replicas, groups if hierarchical else 1, nodes if hierarchical else 1, gpus)
        for mine, other in zip(ours, theirs, strict=True):
            other = other.numpy()
            width = min(mine.shape[-1], other.shape[-1])
            np.testing.assert_array_equal(mine[..., :width], other[..., :width])


def test_packing_is_balanced_in_number():
    pack, rank = balanced_packing(np.random.default_rng(0).random((3, 12)), 4)
    for x in range(3):
        assert (np.bincount(pack[x]) == 3).all()
        assert {(p, r) for p, r in zip(pack[x], rank[x], strict=True)} == set(product(range(4), range(3)))


def test_numbers_that_do_not_divide():
    with pytest.raises(OptionError, match="10 is not a multiple of 4"):
        rebalance_experts(np.ones((1, 8)), 10, 1, 1, 4)
    with pytest.raises(OptionError, match="4 replicas cannot hold 8"):
        rebalance_experts(np.ones((1, 8)), 4, 1, 1, 4)
