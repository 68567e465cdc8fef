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
        shape = (groups, nodes) if hierarchical else (1, 1)
        ours = rebalance_experts(weight, replicas, *shape, gpus, sums="double")  # SGLang adds up Python floats
        np.testing.assert_array_equal(ours[0], theirs[0].numpy())
        np.testing.assert_array_equal(ours[2], theirs[2].numpy())
        # Replicas of one expert carry equal loads, and torch's sort leaves the order of equals open: which of them is
        # the first in log2phy is no property of the method.
        np.testing.assert_array_equal(np.sort(ours[1], axis=2), np.sort(theirs[1].numpy(), axis=2))


def packed(weight, packs, sums):
    """Balanced packing as its paper's code has it, item by item, equal loads in order of index."""
    index, per = np.zeros(len(weight), int), len(weight) // packs
    total, size = np.zeros(packs, sums), np.zeros(packs, int)
    for item in torch.tensor(weight).sort(dim=0, descending=True, stable=True).indices.tolist():
        pack = min((p for p in range(packs) if size[p] < per), key=lambda p: total[p])
        index[item] = pack
        total[pack] = sums(total[pack] + sums(weight[item]))
        size[pack] += 1
    return index


def test_sums_are_single_precision_as_published_or_double_as_the_engines_add():
    rng, differ = np.random.default_rng(0), 0
    for _ in range(100):
        load = np.rint(rng.lognormal(7, 1.5, 160)).astype(np.float32) / rng.integers(1, 7, 160).astype(np.float32)
        single, double = (packed(load, 8, sums) for sums in (np.float32, np.float64))
        np.testing.assert_array_equal(balanced_packing(load[None], 8)[0][0], single)
        np.testing.assert_array_equal(balanced_packing(load[None], 8, "double")[0][0], double)
        differ += (single != double).any()
    assert differ > 0


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
