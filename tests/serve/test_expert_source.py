"""Experts read anew, one by one, from safetensors on disk: bit for bit what was saved."""

import pytest
import torch
from tests.serve.models import EXPERTS, block_of, dense, moe_layers

from poise.runtime.canary import fingerprint
from poise.serve.load import expert_source
from poise.serve.model import kinds_of
from poise.util.errors import ModelError


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_an_expert_from_disk_is_the_one_that_was_saved(tmp_path, family):
    """Names of either kind, in many files; the canary's number is that of the weights in memory."""
    model = dense(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    layers, read = moe_layers(model), expert_source(tmp_path)
    kinds = kinds_of({layer: block_of(model, layer) for layer in layers})
    seen = set()
    for layer in layers:
        experts = block_of(model, layer).experts
        for expert in range(EXPERTS):
            got = read(layer, expert, kinds[layer])
            want = {name: getattr(experts, name)[expert] for name in kinds[layer].shapes}
            assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)
            assert fingerprint(list(got.values())) == fingerprint(list(want.values()))
            seen.add(fingerprint(list(got.values())))
    assert len(seen) == EXPERTS * len(layers)


def test_what_cannot_be_read_is_said(tmp_path):
    model = dense("olmoe")
    layer = moe_layers(model)[0]
    kind = kinds_of({layer: block_of(model, layer)})[layer]
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        expert_source(tmp_path)(layer, 0, kind)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"expert {EXPERTS}"):
        expert_source(tmp_path)(layer, EXPERTS, kind)
