"""Whether a policy has something to choose before the gate: training plans nothing ahead for those that have not."""

import numpy as np
import pytest

from poise.stepwise.driver import LayerDriver
from poise.stepwise.registry import as_policy


@pytest.mark.parametrize(
    ("name", "chooses"), [("expert-parallelism", False), ("llep", False), ("poise", True), ("hecate", True)]
)
def test_policies_with_a_choice_of_their_own(name, chooses):
    held_ED = np.eye(4, dtype=bool)
    assert LayerDriver(as_policy(name), held_ED, step_slots=1, layer=0).chooses is chooses
