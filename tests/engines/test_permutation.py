"""New expert ids from placements, with and without routing groups, and the file that remembers them."""

import json
from itertools import permutations

import numpy as np
import pytest

from poise.engines.checkpoints.permutation import Relabelling, keep_groups, load_relabelling, permutation
from poise.planning.placement import Placement
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import PlacementError, TraceError


def random_placement(rng, layers: int, experts: int, devices: int) -> Placement:
    device = np.stack([rng.permutation(np.arange(experts) * devices // experts) for _ in range(layers)])
    return Placement.from_devices(device, devices, layer_ids_L=np.arange(layers) * 2 + 1)


@pytest.mark.parametrize("experts, devices", [(8, 1), (8, 4), (12, 3), (6, 6)])
def test_blocks_are_what_devices_hold(experts, devices):
    placement = random_placement(np.random.default_rng(experts), 5, experts, devices)
    order = permutation(placement)
    for layer in range(5):
        blocks = order[layer].reshape(devices, -1)
        for device in range(devices):
            assert set(blocks[device].tolist()) == set(placement.experts_of(layer, device))
            assert (np.diff(blocks[device]) > 0).all()
    contiguous = Placement.from_devices(np.arange(experts)[None] * devices // experts, devices)
    np.testing.assert_array_equal(permutation(contiguous), [np.arange(experts)])


def test_what_is_no_permutation_is_refused():
    halves = np.array([0, 0, 0, 1, 1, 1])
    with pytest.raises(PlacementError, match="6 slots for 4 experts"):
        permutation(Placement(np.array([[0, 1, 2, 3, 0, 1]]), halves, 4, 2))
    with pytest.raises(PlacementError, match="6 slots for 4 experts") as caught:
        permutation(Placement(np.array([[0, 1, -1, 2, 3, -1]]), halves, 4, 2))
    assert "--redundant 0" in caught.value.hint
    with pytest.raises(PlacementError, match="5 experts on 2 devices, 2 to 3 on each"):
        permutation(Placement(np.array([[0, 1, 2, 3, 4]]), halves[1:], 5, 2))
    with pytest.raises(PlacementError, match="4 experts on 3 devices, 0 to 2 on each"):
        permutation(Placement(np.array([[0, 1, 2, 3]]), np.array([0, 0, 1, 1]), 4, 3))


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16])
def test_groups_may_trade_places_and_experts_may_within_them(devices):
    """16 experts in 4 groups of 4, on devices that hold 4 groups to a quarter of one."""
    rng = np.random.default_rng(devices)
    for _ in range(20):
        new = np.concatenate([group * 4 + rng.permutation(4) for group in rng.permutation(4)])
        placement = Placement(new[None], np.arange(16) * devices // 16, 16, devices)
        order = permutation(placement, num_groups=4)
        assert all(len(set(block.tolist())) == 1 for block in order.reshape(4, 4) // 4)
        for device in range(devices):
            assert set(order.reshape(devices, -1)[device].tolist()) == set(placement.experts_of(0, device))


def test_torn_groups_are_named():
    # layer 5: devices 2 and 3 (block 1) hold 4 5 | 6 8, one of group 2
    rows = np.array([np.arange(16), [0, 1, 2, 3, 4, 5, 6, 8, 7, 9, 10, 11, 12, 13, 14, 15]])
    placement = Placement(rows, np.arange(16) // 2, 16, 8, np.array([3, 5]))
    with pytest.raises(
        PlacementError, match="layer 5: devices 2 to 3 together hold a part of routing group 1 and of group 2"
    ) as caught:
        permutation(placement, num_groups=4)
    assert "1 of 2 layers" in str(caught.value) and "keep_groups(placement, 4)" in caught.value.hint
    alone = Placement(rows, np.arange(16) // 4, 16, 4, np.array([3, 5]))
    with pytest.raises(PlacementError, match="layer 5: device 1 holds a part of routing group 1 and of group 2"):
        permutation(alone, num_groups=4)
    with pytest.raises(PlacementError, match="16 experts cannot be 3"):
        permutation(placement, num_groups=3)
    three = Placement(np.arange(12)[None], np.arange(12) // 4, 12, 3)
    with pytest.raises(PlacementError, match="devices of 4 experts and routing groups of 6 do not line up"):
        permutation(three, num_groups=2)
    with pytest.raises(PlacementError, match="do not line up"):
        keep_groups(three, 2)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_keeping_groups_moves_as_few_experts_as_possible(devices):
    rng = np.random.default_rng(devices)
    size, groups, experts = 2, 4, 8
    for _ in range(8):
        placement = random_placement(rng, 2, experts, devices)
        kept = keep_groups(placement, groups)
        permutation(kept, num_groups=groups)
        assert kept.layer_ids_L.tolist() == [1, 3]
        for layer in range(2):
            least = experts
            for new in permutations(range(groups)):  # which group lies in each block
                blocks = [[size * g + i for i in range(size)] for g in new]
                for swaps in range(2**groups):  # and the order within it
                    ids = [e for b, block in enumerate(blocks) for e in (block[::-1] if swaps >> b & 1 else block)]
                    moved = sum(e not in placement.experts_of(layer, n * devices // experts) for n, e in enumerate(ids))
                    least = min(least, moved)
            assert placement.diff(kept).fetched_L[layer] == least
    same = Placement.from_devices(np.arange(8)[None] * devices // 8, devices)
    assert same.diff(keep_groups(same, groups)).fetched == 0


def test_traffic_comes_back_in_the_old_ids():
    rng = np.random.default_rng(0)
    placement = random_placement(rng, 3, 8, 8)
    new = Relabelling(placement.layer_ids_L, permutation(placement), "model")
    old = np.stack([[rng.permutation(8)[:2] for _ in range(4)] for _ in range(20)])  # layer 2 has no new ids
    layers = np.array([1, 2, 3, 5])
    place = {layer: np.argsort(row) for layer, row in new.rows().items()}
    seen = np.stack([place.get(int(layer), np.arange(8))[old[:, at]] for at, layer in enumerate(layers)], axis=1)
    assert (seen != old).any()
    back = new.original(RoutingTrace(seen, 8, layer_ids=layers))
    np.testing.assert_array_equal(back.experts, old)
    counts = [[np.bincount(ids[:, at].ravel(), minlength=8) for at in range(4)] for ids in (old, seen)]
    back = new.original(LoadProfile(np.array(counts[1]), layers))
    np.testing.assert_array_equal(back.load_BLE[0], counts[0])
    with pytest.raises(TraceError, match="9 experts, the relabelling 8"):
        new.original(RoutingTrace(seen, 9, layer_ids=layers))


def test_relabellings_undo_and_follow_each_other():
    rng = np.random.default_rng(1)
    first = Relabelling(np.array([0, 2]), np.stack([rng.permutation(6) for _ in range(2)]), "a")
    then = Relabelling(np.array([2, 3]), np.stack([rng.permutation(6) for _ in range(2)]), "b")
    both = then.after(first)
    assert both.source == "a" and both.layer_ids_L.tolist() == [0, 2, 3]
    names = np.array(list("uvwxyz"))  # of experts in old ids; new[n] = old[order[n]]
    middle = names[first.order_LE[1]]
    assert names[both.order_LE[1]].tolist() == middle[then.order_LE[0]].tolist()
    assert first.inverse().after(first).moved == 0 and first.moved > 0
    np.testing.assert_array_equal(permutation(first.placement()), first.order_LE)
    with pytest.raises(PlacementError, match="5 experts get new ids, the first relabelling has 6"):
        Relabelling(np.array([0]), np.arange(5)[None]).after(first)


def test_the_file_is_checked(tmp_path):
    good = Relabelling(np.array([1, 4]), np.array([[1, 0, 2], [2, 1, 0]]), "model")
    path = tmp_path / "poise-relabelling.json"
    path.write_text(good.to_json())
    for where in (path, tmp_path):
        back = load_relabelling(where)
        assert back.to_json() == good.to_json() and back.source == "model"
    data = json.loads(good.to_json())
    for change, match in [
        ({"version": 2}, "format"), ({"num_experts": True}, "num_experts"), ({"num_experts": 4}, "must list 4"),
        ({"layers": {}}, "layers"), ({"layers": {"-1": [0, 1, 2]}}, "no layer"), ({"source": 3}, "source"),
        ({"layers": {"1": [0, 0, 2]}}, "layer 1: the old ids are no permutation"),
        ({"layers": {"1": [0, 1.0, 2]}}, "must list"), ({"layers": {"1": [0, 2**70, 2]}}, "must list"),
        ({"layers": {"1": [0, 1, 2], "01": [0, 1, 2]}}, None),
    ]:  # fmt: skip
        path.write_text(json.dumps({**data, **change}))
        if match is None:
            assert load_relabelling(path).layer_ids_L.tolist() == [1]
            continue
        with pytest.raises(PlacementError, match=match):
            load_relabelling(path)
    for text in (b"", b"[" * 100_000, b"\xff\xfe", b"[]", b"{"):
        path.write_bytes(text)
        with pytest.raises(PlacementError):
            load_relabelling(path)
    with pytest.raises(PlacementError, match="cannot read"):
        load_relabelling(tmp_path / "none.json")
