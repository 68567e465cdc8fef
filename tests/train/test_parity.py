"""Sharded training equals one dense process, for every policy. ``make test-all`` runs all cells.

A pairwise sample of policies, workloads, data flows and the rest: on two ranks a part of it, with what that lacks of every policy, workload
and so on under either data flow; on four every policy once more, a smaller part on eight. With POISE_MANY=1 half of it on two ranks, the
other half on four, both with all of either data flow.
"""

import json

import pytest
from tests.helpers import few_or
from tests.launch import ranks
from tests.train.harness import WORKLOADS
from tests.train.matrix import FLOWS

from poise.stepwise.registry import POLICIES

STILL = {"expert-parallelism", "split"}
"""Policies that move no weights."""
MUTATIONS, LOW = ("divisor", "replica", "token"), few_or(("float32", "bfloat16"), ("bfloat16",))
GATHERS = few_or(("bfloat16", "float8_e4m3fn"), ("float8_e4m3fn",))
"""bfloat16 without the matrix: test_packing.py."""


def cells(world, tmp_path, *arguments):
    out = tmp_path / "cells.json"
    ranks(world, "tests/train/matrix.py", "--out", str(out), "--pairwise", *arguments, folder=tmp_path)
    return json.loads(out.read_text())["cells"]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_policy_equals_the_dense_reference(world, tmp_path):
    every, first = few_or({2: (2, 0), 4: (2, 1), 8: (8, 0)}, {2: (12, 2), 4: (12, 2), 8: (40, 2)})[world]
    whole = world in few_or({2, 4}, {2})
    more = ["--flows"] * whole or ["--policies"] * (world == 4)
    found = cells(world, tmp_path, "--every", str(every), "--first", str(first), *more)
    for factor, values in (("policy", POLICIES), ("workload", WORKLOADS)):
        for flow in FLOWS:
            assert not whole or {cell[factor] for cell in found if cell["traffic"] == flow} == set(values), (
                factor,
                flow,
            )
    assert max(cell["error"] for cell in found) <= 1e-11, max(found, key=lambda cell: cell["error"])
    if world == 4:
        assert {cell["policy"] for cell in found} == set(POLICIES)
        assert {cell["traffic"] for cell in found} == set(FLOWS)
    if world != 8:
        few = {2: {"lplb", "ultra-ep"}, 4: {"lplb", "faster-moe"}}[world]  # see no need of it in so few steps and cells
        moved = set(POLICIES) - STILL - few_or(set(), few)
        assert {cell["policy"] for cell in found if cell["gathered"]} == moved


def test_a_mutation_fails_every_cell_it_touches(tmp_path, subtests):
    found = cells(2, tmp_path, "--mutate", ",".join(MUTATIONS), "--every", str(few_or(2, 8)))
    for mutation in MUTATIONS:
        with subtests.test(mutation):
            touched = [cell for cell in found if cell["mutate"] == mutation and (mutation != "replica" or cell["lost"])]
            assert len(touched) > few_or(10, 2) and {cell["traffic"] for cell in touched} == set(FLOWS)
            assert min(cell["error"] for cell in touched) > 1e-6


def test_low_precision_differs_no_more_than_dense_runs_do(tmp_path, subtests):
    """At most 4 times what dense runs differ that add up in other orders; bfloat16 with float32 weights (float32: the slices)."""
    all_found = cells(few_or(4, 2), tmp_path, "--dtype", ",".join(LOW), "--every", "9")
    for dtype in LOW:
        with subtests.test(dtype):
            found = [cell for cell in all_found if cell["dtype"] == dtype]
            assert len(found) > 10 and len({cell["policy"] for cell in found}) > 6
            assert {cell["traffic"] for cell in found} == set(FLOWS)
            assert max(cell["error"] / cell["dense"] for cell in found) <= 4.0, found


def test_gathers_of_fewer_bits_equal_a_dense_run_on_rounded_weights(tmp_path, subtests):
    """Wherever a token is computed, it is with the same rounded weights; the masters get the gradients."""
    found = cells(few_or(4, 2), tmp_path, "--gather", ",".join(GATHERS), "--every", str(few_or(3, 9)))
    for gather in GATHERS:
        with subtests.test(gather):
            mine = [cell for cell in found if cell["gather"] == gather]
            assert len({cell["policy"] for cell in mine}) > 6 and sum(cell["gathered"] > 0 for cell in mine) > 6
            assert {cell["traffic"] for cell in mine} == set(FLOWS)
            assert max(cell["error"] for cell in mine) <= 1e-11, max(mine, key=lambda cell: cell["error"])
