"""The summary on a machine where every figure can be had by hand: a token of an expert takes a second, links are fast."""

import math
from dataclasses import replace

import numpy as np
import pytest

from poise import api
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.engine_rules import parse_engine
from poise.planning.placement import Placement
from poise.replay.compare import IN_SAMPLE
from poise.replay.summary import BOUND, summarise
from poise.replay.trial import TrialSetting
from poise.routing.batching import make_batch
from poise.routing.trace import LoadProfile

CLUSTER = Cluster(
    np.zeros(2, int), np.ones(2), flops_per_s=32.0, memory_bytes_per_s=1e30, memory_bytes=1e6, intra_bytes_per_s=6400.0,
    inter_bytes_per_s=6400.0,
)  # fmt: skip
MODEL = ModelSpec("tiny", 3, (0, 1, 2), 4, 1, 4, 2, 2, kv_bytes_per_token_layer=3.0)
"""16 parameters an expert: 32 FLOP a token, 32 bytes to move in 5 ms. Three layers, of which one is recorded."""
SKEWED = (40.0, 40.0, 10.0, 10.0)


def summary(loads=SKEWED, placements=("contiguous", "poise"), name="poise", sizes=(10, 100)):
    profile = LoadProfile(np.tile(np.array(loads), (6, 1, 1)), top_k=1)
    found = api.compare(profile, CLUSTER, placements=placements, model=MODEL, tokens_per_step=100, work=0.5)
    setting = TrialSetting(CLUSTER, MODEL, parse_engine("any"), split=found.split)
    batches = {size: make_batch(profile, tokens_per_step=size, steps=2).at_home(2) for size in sizes}
    return found, summarise(found, name, setting, batches.__getitem__, sizes)


def test_every_figure_by_hand():
    found, got = summary()
    part = found.judged_on
    before, after, bound = got.parts[part]
    assert [before.name, after.name, bound.name] == ["contiguous", "poise", BOUND] and part != IN_SAMPLE
    assert (before.imbalance, after.imbalance) == pytest.approx((80 / 50, 1.0))
    by_row = {row["name"]: row["step_seconds"]["mean"] for row in found.rows() if row["part"] == part}
    assert before.seconds == pytest.approx(3 * by_row["contiguous"]), "one of three layers is recorded"
    assert before.seconds - after.seconds == pytest.approx(3 * (80 - 50), rel=0.1), "but for what the links take"
    assert after.saved == pytest.approx((1 - after.seconds / before.seconds,) * 3), "all steps are alike"
    moved = got.price.moved_bytes / 32
    assert moved == round(moved) and 3 <= moved <= 6, "one or both devices fetch an expert in each of three layers"
    assert got.pay_back_steps == math.ceil(got.price.seconds / (before.seconds - after.seconds)) == 1
    assert got.price.slot_bytes == 0 and got.price.cache_tokens == 0
    assert got.steps == 3 and bound.seconds <= after.seconds


def test_what_is_not_worth_it_is_said():
    found, got = summary()
    assert not got.not_worth_words()
    part = got.judged_on
    assert part == found.judged_on
    row = next(one for one in got.parts[part] if one.name == got.name)

    def saving(mean, low, high):
        rows = tuple(replace(one, saved=(mean, low, high)) if one is row else one for one in got.parts[part])
        return replace(got, parts={**got.parts, part: rows}).not_worth_words()

    assert saving(0.004, 0.002, 0.006).startswith("Not worth it here: poise saves 0.4%, 0.2% to 0.6% over 3 steps")
    assert "Not worth it" in saving(0.2, -0.01, 0.4) and not saving(0.01, 0.001, 0.02)
    unsure = replace(got, within=got.within._replace(least_share=0.0))
    assert unsure.not_worth_words().endswith(", and 0.0% at the least while every constant is off by its error.")


def test_other_batches_are_judged_by_themselves():
    _, got = summary(sizes=(10, 100, 1000))
    assert [size for size, _ in got.by_tokens] == [10, 100, 1000]
    assert all(share == pytest.approx(1 - 50 / 80, rel=0.2) for _, share in got.by_tokens)
    assert "not worth it" not in got.batches_words()
    worse = replace(got, by_tokens=((10, -0.02), (100, 0.005), (1000, 0.3)))
    assert worse.batches_words().endswith(
        "-2.0% at 10, 0.5% at 100, 30.0% at 1,000 tokens a step: not worth it at 10, 100"
    )


def test_a_map_that_loses_never_pays_back():
    bad = Placement.from_devices(np.array([[0, 1, 1, 0]]), 2, layer_ids_L=np.array([0]), method="even")
    skew = Placement.from_devices(np.array([[0, 0, 1, 1]]), 2, layer_ids_L=np.array([0]), method="skew")
    _, got = summary(placements=(bad, skew), name="skew")
    assert got.pay_back_steps is None and "paid back never" in got.price_words()
    assert got.within is not None and got.within.least_share < 0 and got.to_json()["pay_back_steps"] is None
