"""Rounds in which no two transfers meet at a port: all of them, each once, and never more rounds than must be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.control.test_moves import random_placement
from tests.helpers import few_or

from poise.control.peers import fewest_rounds, peer_rounds
from poise.replay.moving import moving


def check(pairs, ranks):
    rounds = peer_rounds(pairs, ranks)
    assert sorted(number for one in rounds for number in one) == list(range(len(pairs)))
    for one in rounds:
        for way in (0, 1):
            ends = [pairs[number][way] for number in one]
            assert len(set(ends)) == len(ends) > 0
    assert len(rounds) == fewest_rounds(pairs, ranks)
    return rounds


@given(st.data(), st.integers(2, 9))
@settings(max_examples=few_or(1000, 100), deadline=None)
def test_rounds_are_the_fewest_and_collide_nowhere(data, ranks):
    rank = st.integers(0, ranks - 1)
    pairs = data.draw(st.lists(st.tuples(rank, rank).filter(lambda pair: pair[0] != pair[1]), max_size=60))
    check(pairs, ranks)


def test_a_cycle_is_one_round():
    """Ports work both ways: three ranks that pass an expert on in a circle do it at once."""
    assert check([(0, 1), (1, 2), (2, 0)], 3) == [[0, 1, 2]]
    assert check([(0, 1), (0, 2), (0, 3)], 4) == [[0], [1], [2]]
    assert peer_rounds([], 4) == [] and fewest_rounds([], 4) == 0


def test_what_comes_first_goes_early():
    """One sender, one receiver: the order given. Two independent ones: both begin with their first."""
    assert peer_rounds([(0, 1)] * 4, 2) == [[0], [1], [2], [3]]
    rounds = peer_rounds([(0, 1), (2, 3), (0, 1), (2, 3)], 4)
    assert rounds == [[0, 1], [2, 3]]


@pytest.mark.parametrize("seed", range(few_or(1000, 40)))
def test_moves_between_random_maps_take_the_fewest_rounds(seed):
    rng = np.random.default_rng(seed)
    devices, per_node = int(rng.integers(2, 17)), int(rng.integers(1, 5))
    slots_D = np.full(devices, int(rng.integers(2, 5)))
    experts = int(rng.integers(devices, slots_D.sum() + 1))
    before, after = (random_placement(rng, 3, experts, slots_D) for _ in range(2))
    node_D = np.arange(devices) // per_node
    moves = [move for layer in moving(before, after, node_D).transfers for move in layer]
    check([(move.source, move.target) for move in moves], before.num_devices)
