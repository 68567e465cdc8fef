"""Traffic of another kind: the same steps, tokens and skew, other experts; groups stay groups; told beside the verdict."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import token_batch
from tests.replay.test_verdict import MODEL, SKEWED, judge, loads

from poise.replay.redealt import redealt
from poise.routing.batch import RoutingBatch, count_loads
from poise.util.errors import OptionError


@given(st.integers(0, 2**32 - 1), st.sampled_from([(12, 1), (12, 3), (12, 12)]))
@settings(max_examples=40, deadline=None)
def test_only_the_names_of_experts_change(seed, sizes):
    """Fails if a layer or step keeps its experts' loads apart from its tokens, or tokens of one group part."""
    rng, (experts, groups) = np.random.default_rng(seed), sizes
    ids = rng.integers(0, experts, (60, 3, 2)).astype(np.int16)
    ids[::7, :, 1] = -1
    batch = token_batch(ids, [25, 35], experts)
    got = redealt(batch, groups, seed)
    np.testing.assert_allclose(np.sort(got.load_BLE, axis=2), np.sort(batch.load_BLE, axis=2))
    np.testing.assert_array_equal(count_loads(got.experts_TLK, np.diff(batch.start_B), experts), got.load_BLE)
    np.testing.assert_array_equal(got.experts_TLK < 0, ids < 0)
    size = experts // groups
    for b, rows in enumerate((slice(0, 25), slice(25, 60))):
        for layer in range(3):
            new = {}
            for old, now in zip(
                ids[rows, layer].ravel().tolist(), got.experts_TLK[rows, layer].ravel().tolist(), strict=True
            ):
                assert new.setdefault(old, now) == now, (b, layer)
            blocks = {}
            for old, now in new.items():
                assert old < 0 or blocks.setdefault(old // size, now // size) == now // size


def test_every_step_and_layer_is_dealt_anew():
    """Over many steps each expert is as hot as any other. Fails if one permutation serves all steps, or all layers."""
    load_BLE = np.tile([97.0, 1.0, 1.0, 1.0], (400, 2, 1))
    got = redealt(RoutingBatch(load_BLE, np.full(400, 1 / 400), 1, np.arange(2, dtype=np.int32)), seed=3).load_BLE
    assert got.mean(axis=0) == pytest.approx(25.0, abs=6)
    assert (got[:, 0].argmax(axis=1) != got[:, 1].argmax(axis=1)).mean() == pytest.approx(0.75, abs=0.08)


def test_the_verdict_tells_what_a_map_does_where_other_experts_are_hot():
    """A map that parts experts 0 and 1, over blocks that keep them together: under any deal both are maps of two experts
    a device, so nothing is gained; on the windows nearly all is. Fails if the windows themselves are priced again.
    """
    one = judge(loads(SKEWED, seed=1, steps=64), loads(SKEWED, seed=2, steps=64), redundant=0).phases[0]
    assert one.chosen.mean_s == pytest.approx(30, abs=2)
    assert abs(one.redealt_s) < 6  # a mean of 256 deals whose spread is 24 s
    assert one.to_json()["ms_per_step_other_experts_hot"] == pytest.approx(2e3 * one.redealt_s)
    assert any("other experts hot" in line for line in one.lines())


@pytest.mark.parametrize(("steps", "deals"), [(1, 8), (3, 3), (16, 1)])
def test_few_steps_are_dealt_several_times(steps, deals, monkeypatch):
    """Fails if the figure of one recorded step is that of one deal, or of the same deal again and again."""
    seeds = []

    def counted(batch, groups, seed):
        seeds.append(seed)
        return redealt(batch, groups, seed)

    monkeypatch.setattr("poise.replay.trial.redealt", counted)
    judge(loads(SKEWED, seed=1, steps=steps), loads(SKEWED, seed=2, steps=steps), redundant=0)
    assert len(set(seeds)) == len(seeds) == 2 * deals


def test_groups_that_are_hot_stay_groups():
    """Both experts of a group are hot or neither: a map with one of each group a device gains the same under any deal of
    groups. Fails if the model's groups are not told, as any two experts may be hot then, and the gain is none.
    """
    model = replace(MODEL, num_expert_groups=2)
    one = judge(loads(SKEWED, seed=1, steps=16), loads(SKEWED, seed=2, steps=16), redundant=0, model=model).phases[0]
    assert one.redealt_s == pytest.approx(one.chosen.mean_s, rel=0.15) and one.chosen.mean_s > 25


def test_groups_of_unlike_sizes_are_refused():
    batch = loads(SKEWED, seed=1)
    made = RoutingBatch(batch.load_BLE, np.full(6, 1 / 6), 1, batch.layer_ids)
    with pytest.raises(OptionError, match="4 experts make no 3 routing groups"):
        redealt(made, 3)
