"""Configurations of every MoE family of the installed transformers, against the models that transformers builds of them."""

import pytest
import transformers
from tests.hfconfig import families, table

from poise.machine.hfconfig.families import FAMILIES, REFUSED


@pytest.mark.parametrize("family", [*families.names(), *families.TEXT_MODELS])
def test_agrees_with_transformers_or_is_refused(family):
    """E, K, MoE layers, parameters of an expert and identity experts, on small configs and on the default one."""
    wrong, refused = families.compare(family)
    assert not wrong
    assert bool(refused) == (family in REFUSED) and (family in FAMILIES) != (family in REFUSED)


def test_the_reason_of_the_refusal_is_true():
    _, _, model = families.build("jetmoe", families.published("jetmoe"))
    stacks = [name for name, p in model.named_parameters() if p.dim() == 3 and name.startswith("model.layers.0.")]
    assert {"self_attention", "mlp"} <= {part for name in stacks for part in name.split(".")}


def test_the_table_in_the_docs_is_what_the_tests_find():
    text = table.PAGE.read_text("utf-8")
    if f"transformers {transformers.__version__}:" not in text:
        pytest.skip("the table is of another release of transformers")
    assert table.tables() == text.split(table.START + "\n")[1].split(table.END)[0]
