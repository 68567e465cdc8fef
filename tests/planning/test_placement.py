"""Placement: invariants, files, differences."""

import io
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.planning.placement import Placement
from poise.util.errors import PlacementError


@st.composite
def placements(draw, layers=2, experts=5, devices=3):
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    count = rng.random((layers, experts, devices)) < 0.3
    for layer, expert in product(range(layers), range(experts)):
        count[layer, expert, rng.integers(devices)] = True
    return Placement.from_counts(count.astype(int), layer_ids_L=np.array([3, 7], np.int32), method="drawn")


@given(placements())
@settings(max_examples=40, deadline=None)
def test_counts_and_files_round_trip(tmp_path_factory, placement):
    again = Placement.from_counts(placement.count_LED())
    np.testing.assert_array_equal(again.count_LED(), placement.count_LED())
    path = tmp_path_factory.mktemp("p") / "p.npz"
    placement.save(path)
    back = Placement.load(path)
    np.testing.assert_array_equal(back.slot_expert_LS, placement.slot_expert_LS)
    np.testing.assert_array_equal(back.slot_device_S, placement.slot_device_S)
    assert back.layer_ids_L.tolist() == [3, 7] and back.method == "drawn"


@given(placements(), placements())
@settings(max_examples=40, deadline=None)
def test_diff_counts_what_must_be_fetched(a, b):
    diff = a.diff(b)
    before, after = a.count_LED() > 0, b.count_LED() > 0
    fetched = [(x, e, d) for x, e, d in np.ndindex(before.shape) if after[x, e, d] and not before[x, e, d]]
    assert diff.fetched == len(fetched) == diff.fetched_L.sum()
    assert diff.fetched_D.tolist() == [sum(d == device for _, _, d in fetched) for device in range(3)]
    assert diff.moved_bytes(2.5) == 2.5 * len(fetched)
    assert a.diff(a).fetched == a.diff(a).dropped == 0


@given(placements(devices=2), placements(devices=4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_diff_of_more_and_of_fewer_devices(a, b, shrink):
    old, new = (b, a) if shrink else (a, b)
    diff, layers, experts = old.diff(new), range(2), range(5)
    have = {(x, e, d) for x in layers for d in range(old.num_devices) for e in old.experts_of(x, d)}
    want = {(x, e, d) for x in layers for d in range(new.num_devices) for e in new.experts_of(x, d)}
    assert {tuple(row) for row in diff.fetches_F3.tolist()} == want - have
    assert diff.fetched == len(want - have) == diff.fetched_L.sum() and diff.dropped == len(have - want)
    assert diff.fetched_D.tolist() == [sum(d == at for _, _, d in want - have) for at in range(new.num_devices)]
    stays = {(x, e) for x, e, d in have if d < new.num_devices}
    assert {tuple(row) for row in diff.leaving_O2.tolist()} == {(x, e) for x in layers for e in experts} - stays


def test_other_layers_or_experts_have_no_diff():
    a = Placement.from_devices([[0, 1], [1, 0]], 2)
    for other in ([[0, 1]], [[0, 1, 1], [1, 0, 0]]):
        with pytest.raises(PlacementError, match="cannot be compared"):
            a.diff(Placement.from_devices(other, 3))


def test_slots_of_a_device_may_be_renumbered_for_nothing():
    device = np.array([0, 0, 1, 1])
    a = Placement(np.array([[0, 1, 2, 3]]), device, 4, 2)
    b = Placement(np.array([[1, 0, 3, 2]]), device, 4, 2)
    assert a.diff(b).fetched == 0


@pytest.mark.parametrize(
    ("slots", "devices", "match"),
    [([[0, 1, 1]], [0, 0, 1], "expert 2 has no slot"), ([[0, 1, 3]], [0, 0, 1], r"0\.\.2"),
     ([[0, 1, 2]], [0, 1, 0], "non-decreasing"), ([[0, 1, 2]], [0, 0, 2], r"0\.\.1"), ([[0, 1]], [0, 0, 1], "must be")],
)  # fmt: skip
def test_broken_placements_name_what_is_wrong(slots, devices, match):
    with pytest.raises(PlacementError, match=match):
        Placement(np.array(slots), np.array(devices), 3, 2)


def test_damaged_files_give_placement_errors(tmp_path):
    path = tmp_path / "p.npz"
    Placement(np.array([[0, 1, 2, 2]]), np.array([0, 0, 1, 1]), 3, 2).save(path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    survived = 0
    for _ in range(600):
        broken = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            broken[rng.integers(len(broken))] = rng.integers(256)
        path.write_bytes(bytes(broken[: rng.integers(1, len(broken) + 1)]) if rng.random() < 0.3 else bytes(broken))
        try:
            Placement.load(path)
            survived += 1
        except PlacementError:
            pass
    assert survived < 600


def test_pickles_and_foreign_archives_are_refused(tmp_path):
    stream = io.BytesIO()
    np.savez(stream, slot_expert=np.array([{"a": 1}], dtype=object))
    (tmp_path / "p.npz").write_bytes(stream.getvalue())
    with pytest.raises(PlacementError):
        Placement.load(tmp_path / "p.npz")
    with pytest.raises(PlacementError, match="no such file"):
        Placement.load(tmp_path / "none.npz")
    with pytest.raises(PlacementError, match="cannot write"):
        Placement(np.array([[0]]), np.array([0]), 1, 1).save(tmp_path / "no" / "p.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]
