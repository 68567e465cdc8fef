"""EPLB's maps against the published function, as it ships in SGLang's wheel."""

import importlib.util
import sys
from itertools import product

import numpy as np
import pytest
import torch

from poise.planning.methods.eplb import balanced_packing, rebalance_experts
from poise.util.errors import OptionError


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
    for seed in range(5):
        weight = np.random.default_rng(seed).lognormal(sigma=1.0, size=(layers, experts)) * 1000
        theirs = published.rebalance_experts(torch.tensor(weight), replicas, groups, nodes, gpus, hierarchical)
        ours = rebalance_experts(weight, replicas, groups if hierarchical else 1, nodes if hierarchical else 1, gpus)
        np.testing.assert_array_equal(ours[0], theirs[0].numpy())
        np.testing.assert_array_equal(ours[2], theirs[2].numpy())
        # Replicas of one expert carry equal loads, and torch's sort leaves the order of equals open: which of them is
        # the first in log2phy is no property of the method.
        np.testing.assert_array_equal(np.sort(ours[1], axis=2), np.sort(theirs[1].numpy(), axis=2))


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
