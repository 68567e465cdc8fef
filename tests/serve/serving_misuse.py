"""Cases about what is refused: placements, families, options, swaps at the wrong time, ranks that disagree."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.serve import models as m
from tests.serve.harness import answers, case, engine, place, plain

from poise.planning.placement import Placement
from poise.serve import Engine, from_folder
from poise.serve.load import from_config
from poise.serve.model import FAMILIES
from poise.util.errors import ModelError, OptionError, PlacementError


@case
def placements_of_another_shape() -> dict:
    served = engine()
    wrong = [
        Placement.from_counts(served.placement.count_LED()[:1]),
        Placement.from_devices(np.zeros((2, 6), np.int64), 4),
        Placement.from_devices(np.zeros((2, m.EXPERTS), np.int64), 3),
        Placement.from_devices(np.zeros((2, m.EXPERTS), np.int64), 4, layer_ids_L=np.array([0, 2], np.int32)),
    ]
    for other in wrong:
        with pytest.raises(PlacementError):
            served.swap(other)
        with pytest.raises((PlacementError, OptionError)):
            Engine(copy.deepcopy(plain("olmoe")), other, m.machine())
    assert not served.swapping and served.generate(m.prompts(), 8) == answers("olmoe")
    by_order = Placement.from_counts(place("replicas", "deepseek_v3").count_LED())
    Engine(copy.deepcopy(plain("deepseek_v3")), by_order, m.machine())
    return {}


@case
def unknown_families() -> dict:
    from transformers import GraniteMoeConfig, LlamaConfig

    assert "granitemoe" not in FAMILIES
    config = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    said = []
    for unknown in (GraniteMoeConfig(**config, num_local_experts=8), LlamaConfig(**config)):
        with pytest.raises(ModelError) as caught:
            Engine(from_config(unknown), place("contiguous"), m.machine())
        said.append(str(caught.value))
    assert "granitemoe" in said[0]
    with pytest.raises(ModelError, match=r"config\.json"):
        from_folder("/nowhere", place("contiguous"), 0)
    return {"said": said}


@case
def swap_while_swapping() -> dict:
    served = engine("olmoe", "contiguous")
    served.swap(place("replicas", seed=3))
    with pytest.raises(OptionError, match="on its way"):
        served.swap(place("uneven"))
    assert served.generate(m.prompts(), 8) == answers("olmoe")
    served.swap(place("contiguous"))
    with pytest.raises(OptionError):
        engine().swap(place("uneven"), bytes_per_step=0)
    return {}


@case
def wrong_options() -> dict:
    for options in ({"traffic": "teleport"}, {"budget": 0}, {"most_live": 0}, {"temperature": -1.0}):
        with pytest.raises(OptionError):
            engine(**options)
    served = engine()
    for call in (
        lambda: served.submit([], 3), lambda: served.submit([2], 0), lambda: served.submit([2], 3, home=4),
        lambda: served.generate([[2]], 3, homes=[0, 1]),
    ):  # fmt: skip
        with pytest.raises(OptionError):
            call()
    with pytest.raises(ModelError, match="in steps of"):
        served.model.model(input_ids=torch.tensor([[3]]))
    return {}


@case
def ranks_that_disagree() -> dict:
    """One rank got another prompt, of the same length: found out at the end of the step."""
    served = engine()
    served.submit([3 if served.rank else 4, 5], 3, home=0)
    with pytest.raises(OptionError, match="different tokens"):
        served.step()
    return {}
