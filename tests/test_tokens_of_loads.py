"""N tokens of recorded loads are N tokens: with the model named, N * K pairs, whoever asks."""

import numpy as np
import pytest

from poise import api
from poise.machine.model import ModelSpec
from poise.routing.trace import LoadProfile


@pytest.mark.parametrize("tokens", [512, 4096])
def test_n_counts_tokens_not_pairs(tokens):
    model = ModelSpec.parse("deepseek-r1")
    load = np.random.default_rng(0).random((4, len(model.moe_layer_ids[:2]), 256)) * 100
    profile = LoadProfile(load, layer_ids=np.array(model.moe_layer_ids[:2], np.int32))
    assert profile.top_k == 1
    got = api.compare(profile, "1x8:h200", model=model, placements=("contiguous", "lpt"), tokens_per_step=tokens)
    for batch in got.batches.values():
        np.testing.assert_allclose(batch.load_BLE.sum(axis=2).max(axis=1), tokens * model.top_k)
        np.testing.assert_allclose(batch.tokens_BL().max(axis=1), tokens)
    few, many = (
        api.plan(profile, "1x8:h200", model=model, method="lpt", tokens_per_step=n).terms["dispatch"].seconds
        for n in (tokens, 2 * tokens)
    )
    assert many > few
