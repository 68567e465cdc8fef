"""Loads drawn anew by the collector's rules: they add up, and the oracle's placement is greedy."""

import numpy as np
import pytest
from benchmarks import tables_wide as wide
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.lab.calibrate.tables import loads
from poise.lab.calibrate.tables.ranks import KNOTS_X, Workload, rank_loads, rank_vector

SHAPES = st.tuples(
    st.integers(1, 300), st.sampled_from([(8, 2), (16, 1), (60, 4), (64, 6), (128, 8)]), st.sampled_from([1, 2, 4]),
    st.sampled_from([0.6, 1.01, 1.2, 2.0]), st.integers(0, 99),
)  # fmt: skip


@settings(deadline=None)
@given(SHAPES)
def test_a_drawn_load_sums_to_all_pairs_and_no_expert_has_more_than_all_tokens(case):
    tokens, (experts, top_k), ranks, alpha, seed = case
    for draw in (loads.power_law_load, wide.old_power_law_load):
        count = draw(tokens, experts, top_k, ranks, alpha, np.random.default_rng(seed))
        assert count.sum() == tokens * top_k and count.min() >= 0 and count.max() <= tokens
        by_rank = count.reshape(ranks, -1).sum(axis=1)
        assert by_rank[0] == by_rank.max(), "the fullest rank is the one that is timed"
    slots = experts + 2 * ranks
    slot = wide.eplb_load(tokens, experts, top_k, ranks, alpha, slots, np.random.default_rng(seed))
    assert slot.shape == (slots,) and slot.sum() == tokens * top_k and slot.min() >= 0


@settings(deadline=None)
@given(st.integers(1, 200), st.sampled_from([(8, 2), (60, 4), (64, 8), (384, 6)]), st.sampled_from([1, 2, 4]))
def test_a_balanced_load_of_all_ranks_sums_to_all_pairs(tokens, shape, ranks):
    experts, top_k = shape
    whole, different = loads.balanced_load(tokens, experts, top_k, 1)
    assert whole.sum() == tokens * top_k and different == tokens and whole.max() <= tokens
    part, here = loads.balanced_load(tokens, experts, top_k, ranks)
    assert (part == whole[: experts // ranks]).all() and here <= min(tokens, part.sum())
    if tokens % experts == 0:
        assert (whole == tokens * top_k // experts).all()


def raised_one_by_one(count_RE, add_R, cap):
    count_RE, left = count_RE.copy(), []
    for row, add in zip(count_RE, add_R, strict=True):
        while add and (row < cap).any():
            row[int(row.argmin())] += 1
            add -= 1
        left.append(add)
    return count_RE, left


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_raising_the_lowest_at_once_is_raising_them_one_by_one(seed):
    rng = np.random.default_rng(seed)
    cap = int(rng.integers(1, 9))
    count, add = rng.integers(0, cap + 1, (3, 5)), rng.integers(0, 30, 3)
    got, left = loads._raise_lowest(count, add, cap)
    wanted, rest = raised_one_by_one(count, add, cap)
    assert (got == wanted).all() and left.tolist() == rest


def in_turn_one_by_one(count_RE, pairs, cap):
    count_RE, rank, stuck = count_RE.copy(), 0, 0
    while pairs and stuck < len(count_RE):
        row = count_RE[rank % len(count_RE)]
        if (row < cap).any():
            row[int(row.argmin())] += 1
            pairs, stuck = pairs - 1, 0
        else:
            stuck += 1
        rank += 1
    return count_RE


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_pairs_that_go_to_ranks_in_turn_end_where_one_by_one_puts_them(seed):
    """Totals of ranks: where some are full, who gets the last pair of a round may differ by one."""
    rng = np.random.default_rng(seed)
    cap = int(rng.integers(1, 9))
    count, pairs = rng.integers(0, cap + 1, (4, 3)), int(rng.integers(0, 40))
    got, wanted = loads._in_turn(count, pairs, cap), in_turn_one_by_one(count, pairs, cap)
    assert got.sum() == wanted.sum() and (got >= count).all() and got.max() <= max(cap, count.max())
    assert np.abs(got.sum(axis=1) - wanted.sum(axis=1)).max() <= 1


def eplb_by_looking_at_all(load_E, slots, ranks):
    """Every step looks at everything: no heap, no sort."""
    replicas = [1] * len(load_E)
    for _ in range(slots - len(load_E)):
        each = [load / count for load, count in zip(load_E, replicas, strict=True)]
        replicas[each.index(max(each))] += 1
    left = [load / count for load, count in zip(load_E, replicas, strict=True) for _ in range(count)]
    held = [[] for _ in range(ranks)]
    while left:
        load = left.pop(left.index(max(left)))
        open_ranks = [rank for rank in range(ranks) if len(held[rank]) < slots // ranks]
        held[min(open_ranks, key=lambda rank: (sum(held[rank]), rank))].append(load)
    return held


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_eplb_is_the_greedy_oracle(seed):
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(1, 5))
    load, slots = rng.integers(0, 40, 4 * ranks), 6 * ranks
    got, wanted = wide.eplb_slots(load, slots, ranks), eplb_by_looking_at_all(load.tolist(), slots, ranks)
    assert got.shape == (ranks, 6) and got.sum() == pytest.approx(load.sum())
    assert sorted(got.sum(axis=1)) == pytest.approx(sorted(sum(row) for row in wanted))
    assert got[0].sum() == pytest.approx(max(sum(row) for row in wanted)), "the fullest rank comes first"


def test_eplb_beats_what_it_was_given_and_a_slot_more_never_hurts_the_fullest_expert():
    load = np.array([90, 5, 5, 0, 0, 0, 0, 0])
    assert wide.eplb_slots(load, 8, 2)[0].sum() == 90
    assert wide.eplb_slots(load, 10, 2)[0].sum() == 60, "three replicas of 30, two of them on one rank"


def dealt(load_E, own, tokens, top_k):
    """Column by column, experts one after the other from the fullest: the matrix written out."""
    order = np.argsort(-load_E, kind="stable")
    matrix = np.repeat(order, load_E[order]).reshape(top_k, tokens).T
    assert all(len(set(row)) == top_k for row in matrix.tolist())
    return int((matrix < own).any(axis=1).sum())


@settings(deadline=None)
@given(SHAPES)
def test_different_tokens_are_those_of_the_matrix(case):
    tokens, (experts, top_k), ranks, alpha, seed = case
    count = loads.power_law_load(tokens, experts, top_k, ranks, alpha, np.random.default_rng(seed))
    own = experts // ranks
    assert loads.different_tokens(count, own, tokens) == dealt(count, own, tokens, top_k)


def test_excess_between_knots_gives_the_sum_of_maxima():
    work = Workload(777, 64, 6, 4, 1.2)
    loads_of = rank_loads([work], {})
    count = np.array([1, 3, 8, 300])
    vector = np.concatenate([[count.sum(), 4, 0], np.maximum(count[:, None] - KNOTS_X, 0).sum(axis=0)])
    one = rank_loads([work], {work: vector})
    for read, token in ((2.0, 1.0), (8.0, 1.0), (1.0, 2.0), (3.0, 0.02)):
        total = read * one.active_R + token * one.excess(np.array([read / token]))
        # between knots the excess is taken for straight, which it is below it: never too small, and close
        exact = np.maximum(read, token * count).sum()
        assert exact - 1e-9 <= total[0] <= 1.03 * exact
    assert loads_of.pairs_R[0] <= 777 * 6 and loads_of.tokens_R[0] <= 777


def test_the_same_workload_is_drawn_once_and_the_same():
    known = {}
    work = Workload(50, 64, 6, 4, 1.01)
    first = rank_loads([work, work, Workload(50, 64, 6, 4, 0.0)], known)
    assert len(known) == 2 and first.pairs_R[0] == first.pairs_R[1]
    assert (rank_vector(work) == known[work]).all()
    old = work._replace(slots=-1)
    assert (wide.wide_vector(old) != known[work]).any(), "the old rule is another draw"
    with pytest.raises(AssertionError):
        rank_vector(old)
