"""Requests dealt to ranks and micro-batches, and owners near them: what is kept, what is gained, what is chosen."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import tiny_cluster

from poise.cost.weights import training_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.stepwise.dealing import Deal, Requests, assigned, at_home, cheapest, deals, near, place_near, priced_owners
from poise.stepwise.methods.expert_parallelism import ExpertParallelism
from poise.stepwise.owners import LoadSamples, OwnerSeconds
from poise.stepwise.regroup import even_cells
from poise.stepwise.sharding import Balanced, even_sharding
from poise.util.errors import OptionError

SEEDS = st.integers(0, 2**32 - 1)
MICRO, EACH, LAYERS, EXPERTS = 3, 2, 2, 8


def case_of(seed, nodes=(2, 2)):
    """Requests of three kinds, each with experts of its own in every layer, shuffled over all cells."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, nodes)
    ranks = cluster.num_devices
    cells = np.arange(MICRO * ranks).repeat(EACH)
    kind_Q, size_Q = rng.integers(0, 3, len(cells)), rng.integers(5, 30, len(cells))
    share = rng.dirichlet(np.full(EXPERTS, 0.2), size=(LAYERS, 3))
    load = np.stack([rng.multinomial(size_Q * 2, share[layer, kind_Q]) for layer in range(LAYERS)], axis=1)
    owners = even_sharding(LAYERS, EXPERTS, ranks)
    return Requests(load.astype(np.int32), size_Q), Deal("", cells % ranks, cells // ranks, owners), cluster


def counts(deal, ranks):
    return np.bincount(deal.micro_Q * ranks + deal.rank_Q, minlength=MICRO * ranks)


@pytest.mark.parametrize("move", [False, True])
@given(SEEDS, st.sampled_from([(2, 2), (1, 2, 1), (3,)]))
@settings(max_examples=40, deadline=None)
def test_cells_and_owners_keep_their_numbers_and_pairs_come_home(move, seed, nodes):
    requests, start, cluster = case_of(seed, nodes)
    ranks, node_D = cluster.num_devices, cluster.node_D.astype(np.int64)
    for deal in deals(requests, start, cluster, owners_move=move):
        np.testing.assert_array_equal(counts(deal, ranks), EACH)
        for own, before in zip(deal.owner_LE, start.owner_LE, strict=True):
            np.testing.assert_array_equal(np.bincount(own, minlength=ranks), np.bincount(before, minlength=ranks))
        assert (deal.owner_LE == start.owner_LE).all() or (move and deal.name == "near owners that move")
        home = at_home(requests, node_D[deal.rank_Q], node_D[deal.owner_LE])
        assert home >= at_home(requests, node_D[start.rank_Q], node_D[start.owner_LE])
        loads = deal.sources(requests, ranks)
        np.testing.assert_array_equal(loads.sum(axis=(0, 2)), requests.load_QLE.sum(axis=0))
        inside = sum(loads[:, :, node_D == n].sum(axis=(0, 2))[node_D[deal.owner_LE] == n].sum() for n in set(node_D))
        assert inside == home


def test_kinds_with_experts_of_their_own_are_parted_and_owners_follow():
    """Two kinds, two nodes: every pair at home; owners that stay cannot do that."""
    cluster, rng = Cluster.uniform(2, 2), np.random.default_rng(1)
    kind_Q = rng.permutation(np.arange(24) % 2)
    load = np.zeros((24, LAYERS, EXPERTS), np.int32)
    for layer in range(LAYERS):
        mine = rng.permutation(EXPERTS).reshape(2, -1)
        for q, kind in enumerate(kind_Q):
            load[q, layer, mine[kind]] = 10
    cells = np.arange(12).repeat(2)
    requests = Requests(load, np.full(24, 20))
    start = Deal("", cells % 4, cells // 4, even_sharding(LAYERS, EXPERTS, 4))
    node_D = cluster.node_D.astype(np.int64)
    home = {}
    for move in (False, True):
        deal = near(requests, start, cluster, owners_move=move)
        home[move] = at_home(requests, node_D[deal.rank_Q], node_D[deal.owner_LE])
    assert home[True] == load.sum() > home[False] > 0.4 * load.sum()


@given(SEEDS, st.integers(1, 7), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_of_two_parts_the_best_is_chosen(seed, things, first):
    rng = np.random.default_rng(seed)
    first = min(first, things)
    score = rng.random((things, 2))
    got = assigned(score, np.array([first, things - first]))
    assert (got == 0).sum() == first
    best = max(
        sum(score[x, 0 if x in some else 1] for x in range(things)) for some in combinations(range(things), first)
    )
    assert score[np.arange(things), got].sum() == pytest.approx(best)


def test_parts_without_room_for_all_are_refused():
    with pytest.raises(OptionError, match="3 things and room for 2"):
        assigned(np.ones((3, 2)), np.array([1, 1]))
    assert assigned(np.zeros((0, 2)), np.array([0, 0])).shape == (0,)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_owners_near_their_sources_keep_every_device_s_number(seed):
    rng = np.random.default_rng(seed)
    cluster, owner = tiny_cluster(rng, (2, 1)), rng.integers(0, 3, 7)
    new = place_near(rng.exponential(size=(2, 7)), owner, cluster)
    np.testing.assert_array_equal(np.bincount(new, minlength=3), np.bincount(owner, minlength=3))


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_swaps_stay_in_their_pool_and_never_unbalance(seed):
    rng = np.random.default_rng(seed)
    cells = rng.permutation(np.arange(MICRO * 4).repeat(EACH))
    rank, micro = cells % 4, cells // 4
    pool, load, size = rank // 2, rng.random((len(cells), 5)), rng.integers(1, 50, len(cells))
    on, at = even_cells(load, size, rank, micro, pool)
    np.testing.assert_array_equal(on // 2, pool)
    np.testing.assert_array_equal(np.bincount(4 * at + on), np.bincount(4 * micro + rank))

    def uneven(rank, micro):
        tokens, pairs = np.zeros((MICRO, 4)), np.zeros((MICRO, 5))
        np.add.at(tokens, (micro, rank), size / size.sum() * MICRO * 4)
        mean = load.sum(axis=0) / MICRO
        np.add.at(pairs, micro, load / mean * np.sqrt(4 * mean / mean.sum()))
        return (tokens**2).sum() + (pairs**2).sum()

    assert uneven(on, at) <= uneven(rank, micro) + 1e-9


def test_nothing_changes_for_nothing():
    requests, start, cluster = case_of(0)
    found = deals(requests, start, cluster, owners_move=True)
    assert len(found) == 4 and len(deals(requests, start, cluster, owners_move=False)) == 3
    assert cheapest(found, lambda deal: 1.0) is start
    wanted = found[2]
    assert cheapest(found, lambda deal: 0.0 if deal is wanted else 1.0) is wanted


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_owners_by_price_are_no_slower_in_the_same_cells(seed):
    requests, start, cluster = case_of(seed)
    price = training_price(40_000, EXPERTS, cluster, ModelSpec.generic(EXPERTS, 2, np.arange(LAYERS)))
    of = lambda load: OwnerSeconds(ExpertParallelism(), 0, price, LoadSamples.of_record(load, True), MICRO)  # noqa: E731
    sharding = Balanced(interval=50)
    deal = priced_owners(start, requests, cluster.num_devices, sharding, of)
    seconds = of(start.sources(requests, cluster.num_devices))
    assert deal.rank_Q is start.rank_Q and deal.micro_Q is start.micro_Q
    if (deal.owner_LE != start.owner_LE).any():
        moved_s = seconds.move(start.owner_LE, deal.owner_LE) / sharding.interval
        assert seconds.step(deal.owner_LE) + moved_s < seconds.step(start.owner_LE)
