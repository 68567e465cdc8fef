"""The way back, in parts: never more fetches than asked, every state valid, and it ends."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.control.test_controller import controller, stream
from tests.control.test_moves import random_placement

from poise.control.back import part_back
from poise.planning.placement import Placement
from poise.util.errors import NoResultError


def turned(experts, layers=1):
    """Expert e on device e, and on the device after: without a free slot all must move at once, in a circle."""
    count_LED = np.stack([np.eye(experts, dtype=np.int64)] * layers)
    return [
        Placement.from_counts(np.roll(count_LED, by, axis=2), slots_D=np.ones(experts, np.int64),
                              layer_ids_L=np.arange(layers, dtype=np.int32), method="hand")
        for by in (0, 1)
    ]  # fmt: skip


@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans())
def test_parts_fetch_no_more_than_asked_and_arrive(seed, most, whole):
    rng = np.random.default_rng(seed)
    now, older = (random_placement(rng, 3, 8, np.array([3, 4, 3])) for _ in range(2))
    left = now.diff(older).fetched
    while left:
        try:
            part = part_back(now, older, most, whole=whole)
        except NoResultError as error:
            assert f"max_moves = {most}" in error.message and now.diff(older).fetched > most
            fewest = min(n for n in now.diff(older).fetched_L.tolist() if n > 0) if whole else most + 1
            assert fewest > most
            return
        assert 0 < now.diff(part).fetched <= most and part.diff(older).fetched < left
        assert (part.count_LED().sum(axis=2) > 0).all()
        same = [(one == other).all() for one, other in zip(now.count_LED(), part.count_LED(), strict=True)]
        done = [(one == other).all() for one, other in zip(older.count_LED(), part.count_LED(), strict=True)]
        assert not whole or all(a or b for a, b in zip(same, done, strict=True))
        now, left = part, part.diff(older).fetched


def test_a_circle_longer_than_asked_is_refused():
    now, older = turned(6)
    with pytest.raises(NoResultError, match="max_moves = 5 experts: the shortest fetches 6"):
        part_back(now, older, 5)
    assert part_back(now, older, 6) is older


def watched(**options):
    control = controller(**options)
    first = control.current
    control.observe(stream(24, 1))
    plan = control.collect()
    assert plan.accepted
    control.moved()
    return control, first


def test_parts_are_priced_as_the_whole_way():
    """A gain that one part is worth and the whole way is not: nothing is gone."""
    alone, older = watched()
    assert alone.go_back(older, 1.0, 1.0)
    whole = alone.collect()
    control, older = watched()
    most = whole.moves.fetched // 3
    control.settings = replace(control.settings, max_moves=most)
    horizon = control.settings.horizon_steps
    assert control.go_back(older, 1.0, 1.0 - 0.9 * whole.cost_seconds / horizon)
    refused = control.collect()
    assert 0 < refused.moves.fetched <= most and not refused.accepted
    assert refused.cost_seconds == pytest.approx(whole.cost_seconds)
    assert control.go_back(older, 1.0, 1.0 - 1.1 * whole.cost_seconds / horizon)
    assert control.collect().accepted


@pytest.mark.parametrize("taken", [False, True])
def test_only_a_way_that_is_taken_holds_the_plan_that_settles(taken):
    control, older = watched()
    control.test = None  # as after a drift: the next reference is being learned
    assert control.go_back(older, 2.0 if taken else 1.0, 1.0)
    assert control.collect().accepted == taken
    if taken:
        control.moved()
    control.observe(stream(24, 2))
    settled = control.collect()
    assert (settled is None) == taken and (taken or settled.reason == "settled")
