"""Moves between placements: who fetches what from whom, priced by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import random_count

from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.replay.moving import moving
from poise.util.errors import PlacementError


@given(st.integers(0, 2**32 - 1), st.sampled_from([(2, 4), (4, 2), (3, 4), (4, 3)]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ranks_that_leave_send_last_and_lost_ones_never(seed, sizes, lost):
    rng, node = np.random.default_rng(seed), np.sort(np.random.default_rng(seed).integers(0, 2, 4))
    before, after = (Placement.from_counts(random_count(rng, 2, 6, devices)) for devices in sizes)
    gone = range(sizes[1], sizes[0]) if lost else ()
    moves, diff = moving(before, after, node, lost=gone), before.diff(after)
    assert (moves.fetched, moves.dropped) == (diff.fetched, diff.dropped)
    reads = {tuple(row) for row in np.argwhere(moves.reads_LED).tolist()}
    sent = {(x, move.expert, move.target) for x, each in enumerate(moves.transfers) for move in each}
    assert sent | reads == {tuple(row) for row in diff.fetches_F3.tolist()} and not sent & reads
    orphans = {tuple(row) for row in diff.leaving_O2.tolist()}
    assert {(x, e) for x, e, _ in reads} == (orphans if lost else set())
    for x, each in enumerate(moves.transfers):
        for move in each:
            holders = [d for d in range(sizes[0]) if move.expert in before.experts_of(x, d) and d not in gone]
            rank = [(node[d] != node[move.target], d >= sizes[1]) for d in holders]
            assert rank[holders.index(move.source)] == min(rank)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["1x4", "2x2", "4x1"]))
@settings(max_examples=40, deadline=None)
def test_everything_arrives_from_a_holder_and_nothing_twice(seed, spec):
    rng, cluster = np.random.default_rng(seed), Cluster.parse(spec)
    before, after = (Placement.from_counts(random_count(rng, 3, 6, 4)) for _ in range(2))
    moves, diff = moving(before, after, cluster.node_D), before.diff(after)
    assert moves.arrive_LD.sum(axis=1).tolist() == diff.fetched_L.tolist()
    assert moves.arrive_LD.sum(axis=0).tolist() == diff.fetched_D.tolist()
    assert (moves.fetched, moves.dropped) == (diff.fetched, diff.dropped)
    have, want = before.count_LED() > 0, after.count_LED() > 0
    node = cluster.node_D
    for layer, transfers in enumerate(moves.transfers):
        now = have[layer].copy()
        for move in transfers:
            assert have[layer, move.expert, move.source] and not now[move.expert, move.target]
            near = node[np.flatnonzero(have[layer, move.expert])] == node[move.target]
            assert near.any() == (node[move.source] == node[move.target])
            now[move.expert, move.target] = True
        assert (now & want[layer] == want[layer]).all() and (now.sum() - have[layer].sum()) == len(transfers)
    links = moves.links_DD()
    near, far = moves.by_link(cluster)
    assert near + far == links.sum() == moves.fetched
    assert far == sum(links[a, b] for a in range(4) for b in range(4) if node[a] != node[b])


def test_seconds_by_hand():
    cluster = Cluster(np.array([0, 0, 1, 1]), np.ones(4), 1.0, 1.0, 1.0, intra_bytes_per_s=10.0, inter_bytes_per_s=2.0,
                      intra_latency_s=0.5, inter_latency_s=0.25)  # fmt: skip
    before = Placement.from_devices([[0, 0, 1, 1, 2, 2, 3, 3]], 4)
    near = Placement.from_devices([[1, 0, 0, 1, 2, 2, 3, 3]], 4)
    moves = moving(before, near, cluster.node_D)
    assert moves.fetched == 2 and moves.by_link(cluster) == (2, 0)
    assert moves.seconds(cluster, 20.0) == pytest.approx(20 / 10 + 0.5)
    far = Placement.from_devices([[3, 3, 1, 1, 2, 2, 0, 1]], 4)  # two from 0 to 3, one each from 3 to 0 and to 1
    moves = moving(before, far, cluster.node_D)
    assert moves.by_link(cluster) == (0, 4) and moves.most(3) == [0]
    assert moves.seconds(cluster, 20.0) == pytest.approx(2 * 20 / 2 + 0.75)
    same = moving(before, before, cluster.node_D)
    assert same.fetched == same.seconds(cluster, 20.0) == 0 and same.most(3) == []


def test_a_copy_nearby_is_preferred_and_senders_take_turns():
    before = Placement.from_counts(np.array([[[1, 1, 0, 0, 0, 0]], [[0, 0, 1, 1, 1, 0]]]))
    after = Placement.from_counts(np.array([[[1, 1, 1, 1, 0, 0]], [[0, 0, 1, 1, 1, 1]]]))
    (first, second), (third,) = moving(before, after).transfers
    assert {first.source, second.source} == {0, 1} and third.source in (2, 3, 4)
    (third,) = moving(before, after, np.array([0, 0, 0, 1, 2, 2])).transfers[1]
    assert third.source == 4


def test_placements_of_different_models_are_refused():
    first = Placement.from_devices([[0, 1], [1, 0]], 2)
    for other, word in (
        (Placement.from_devices([[0, 1, 1], [1, 0, 0]], 2), "3"),
        (Placement.from_devices([[0, 1], [1, 0]], 2, layer_ids_L=np.array([0, 4])), "4"),
    ):
        with pytest.raises(PlacementError, match="cannot be compared") as caught:
            moving(first, other)
        assert word in str(caught.value)
    with pytest.raises(PlacementError, match="3 devices"):
        moving(first, first, np.zeros(3))
