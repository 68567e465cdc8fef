"""Serving on four processes equals the plain transformers model (run_cases.py)."""

import pytest
from tests.helpers import few_or
from tests.serve.models import dense, moe_layers, placement
from tests.serve.run_cases import CASES
from tests.serve.serving_logits import LIKE
from torch import nn

from poise.machine.cluster import Cluster
from poise.serve import Engine
from poise.serve.model import block_of, take_apart
from poise.util.errors import ModelError, OptionError


@pytest.mark.parametrize("case", few_or(list(CASES), [name for name in CASES if name not in LIKE]))
def test_case(case, launched):
    launched("tests/serve/run_cases.py")


def test_what_is_left_out_is_like_a_case_that_is_not():
    assert set(LIKE) < set(CASES) and set(LIKE.values()) <= set(CASES) - set(LIKE)


def test_without_a_process_group_it_is_refused():
    with pytest.raises(OptionError, match="2 devices, and there is no process group"):
        Engine(nn.Module(), None, Cluster.parse("1x2"))


def test_experts_of_another_code_are_refused():
    model = dense("mixtral")
    plain = type(block_of(model, 0).experts)
    for layer in moe_layers(model):
        block_of(model, layer).experts.__class__ = type(
            "Doubled", (plain,), {"forward": lambda s, x, ids, w: 2 * plain.forward(s, x, ids, w)}
        )
    with pytest.raises(ModelError, match="the experts of layer 0: Doubled computes something else"):
        take_apart(model, placement("contiguous", moe_layers(model), 4), 0)
