"""What the cases of ``run_cases.py`` share: plain answers, placements, engines, prices for which replicas pay."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch.distributed as dist
from tests.ranks import registry
from tests.serve import models as m

from poise.cost.weights import StepPrice, fetch_seconds, step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.serve import Engine

EXACT = 1e-9
"""Of float64 runs; measured errors are 1e-15. Norms pass through float32, where a last bit may flip."""
CASES, case = registry()


@cache
def plain(family: str) -> Any:
    return m.dense(family)


NEW = {"olmoe": 12}
"""Tokens that any case asks of a family; of the others :data:`USUAL`."""
USUAL = 8


@cache
def _longest(family: str) -> list[list[int]]:
    return [m.plain_greedy(plain(family), prompt, NEW.get(family, USUAL)) for prompt in m.prompts()]


def answers(family: str, new: int = USUAL) -> list[list[int]]:
    """Of :func:`tests.serve.models.prompts`; the first tokens of a longer answer are a shorter one."""
    assert new <= NEW.get(family, USUAL)
    return [row[:new] for row in _longest(family)]


def remember() -> None:
    """Plain models and their answers, once for all ranks that are forked from this process: no gradient is needed."""
    for family in m.CONFIGS:
        _longest(family)


def place(kind: str, family: str = "olmoe", seed: int = 0) -> Placement:
    return m.placement(kind, m.moe_layers(plain(family)), dist.get_world_size(), seed)


def engine(family: str = "olmoe", kind: str = "replicas", **options: Any) -> Engine:
    return Engine(copy.deepcopy(plain(family)), place(kind, family), m.machine(), **options)


def banks(served: Engine) -> list[Any]:
    return [served.experts[layer].bank for layer in sorted(served.experts)]


def tiny_price(fetches: float = 0.0) -> StepPrice:
    """``fetches``: steps that one expert takes in the background; 0: it comes at once."""
    model = ModelSpec("tiny", 2, (0, 1), m.EXPERTS, m.TOP_K, hidden_size=32, expert_intermediate_size=16,
                      num_expert_matrices=3, dispatch_bytes=8.0, combine_bytes=8.0, kv_bytes_per_token_layer=1.0)  # fmt: skip
    price = step_price(8, m.EXPERTS, slow_machine(), model, window_s=1.0, control_s=0.0)
    if not fetches:
        return price
    none, one = np.zeros((m.EXPERTS, 4), bool), np.zeros((m.EXPERTS, 4), bool)
    none[:, 0], one[0, 1] = True, True
    return replace(price, window_s=fetch_seconds(none, one, price) / fetches)


def slow_machine() -> Cluster:
    """For which replicas pay even for these few tokens."""
    return Cluster(np.array([0, 0, 1, 1], np.int32), np.ones(4), 1e6, 1e6, 1e9, 1e12, 1e12,
                   intra_latency_s=1e-9, inter_latency_s=1e-9)  # fmt: skip
