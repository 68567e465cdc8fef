"""What a plan of training costs: weights that hide show by the rule that policies plan with."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import tiny_cluster
from tests.stepwise.test_owners import EXPERTS, price_of, some_loads

from poise.stepwise.driver import LayerDriver
from poise.stepwise.methods.hecate import Hecate
from poise.stepwise.sharding import even_sharding, owned_ED
from poise.stepwise.step_seconds import layer_seconds


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_weights_show_by_the_rule_that_policies_plan_with(seed, again):
    """Early, late and back are taken from prices under which one of them hides or none does."""
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, (2, 2))
    load_SE = some_loads(rng, 1, 4)[0, 0].astype(np.int64)
    bare = price_of(cluster, window_s=0.0, control_s=0.0)
    driver = LayerDriver(Hecate(overlap=2), owned_ED(even_sharding(1, EXPERTS, 4)[0], 4), step_slots=2, layer=0)
    view = driver.view(0, load_SE.sum(axis=0).astype(float), np.zeros((0, EXPERTS)), bare)
    done = driver.finish(view, driver.choose(view), load_SE)

    def shown(**changes: float) -> float:
        return layer_seconds(done, load_SE, replace(bare, **changes), again=again, keeps=False).shown_s

    whole, late, late_and_back = shown(), shown(window_s=1e9), shown(window_s=1e9, dense_s=2e9)
    early, back = whole - late_and_back, late_and_back - late
    assert whole > 0 and early >= 0 and back > 0
    window_s, dense_s, share = (float(x) for x in rng.choice([0.0, 0.3, 0.7, 1.5], 3) * (early, back, 0.5))
    got = shown(window_s=window_s, dense_s=dense_s, hidden_share=share)
    hidden = min(early, window_s) + min(back, max(0.0, 2 * window_s - dense_s))
    assert got == pytest.approx(whole - (1 - share) * hidden, rel=1e-9, abs=1e-15)
