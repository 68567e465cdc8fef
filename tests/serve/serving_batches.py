"""Cases about tokens and batches: chunks, requests that come and end, ranks without any, sampling."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch.distributed as dist
from tests.helpers import few_or
from tests.serve import models as m
from tests.serve.harness import answers, case, engine, place, plain, tiny_price

from poise.cost.traffic import DATA_FLOWS
from poise.planning.placement import Placement
from poise.serve import Engine, ServingPolicy
from poise.stepwise.registry import parse_policy
from poise.util.errors import OptionError


@case
def ranks_without_requests() -> dict:
    """One rank has every request; then a single request of one token, so that most ranks have nothing."""
    new = few_or(8, 3)
    for traffic in DATA_FLOWS:
        served = engine(traffic=traffic)
        assert served.generate(m.prompts(), new, homes=[2] * 5) == answers("olmoe", new=new)
        assert served.generate(m.prompts(1), new, homes=[1]) == answers("olmoe", new=new)[:1]
        assert served.model.cache.nbytes == 0, "all caches are freed"
    return {}


@case
def chunked_prefill() -> dict:
    """Budgets of one token to all of them give the same tokens; how many steps they take."""
    out, count = {}, few_or(5, 2)
    for traffic in ("home_node_dedup", "stay"):
        for budget in (1, 5, 64) if traffic == "stay" else few_or((1, 5, 64), (5,)):
            served = engine(traffic=traffic, budget=budget)
            assert served.generate(m.prompts(count), 8) == answers("olmoe")[:count], (traffic, budget)
            assert max(step.local_tokens for step in served.steps) <= budget
            out[f"{traffic} {budget}"] = len(served.steps)
    assert out["stay 1"] > out["stay 5"] > out["stay 64"] == 8
    return out


@case
def continuous_batching() -> dict:
    """Requests come while others run, and wait for room: at most one of a rank is live."""
    served = engine("qwen3_moe", traffic="stay", most_live=1, budget=9)
    requests, count = [], few_or(5, 3)
    for prompt in m.prompts(count):
        requests.append(served.submit(prompt, 8, home=0))
        served.step()
    while served.busy:
        served.step()
    assert [request.sampled for request in requests] == answers("qwen3_moe")[:count]
    return {"steps": len(served.steps)}


@case
def end_of_text() -> dict:
    """A token that ends a request is kept as its last."""
    full = answers("mixtral")
    eos = full[1][3]
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in full]
    assert cut != full
    for traffic in ("home", "stay"):
        assert engine("mixtral", traffic=traffic, eos=eos).generate(m.prompts(), 8) == cut
    return {}


@case
def sampling() -> dict:
    """With a seed all flows draw the same, which is not the greedy answer."""
    new = few_or(8, 4)
    draws = [engine(traffic=traffic, temperature=2.0, seed=4).generate(m.prompts(), new) for traffic in DATA_FLOWS]
    assert all(draw == draws[0] for draw in draws) and draws[0] != answers("olmoe", new=new)
    assert engine(temperature=2.0, seed=5).generate(m.prompts(), new) != draws[0]
    return {}


@case
def one_expert_twice_on_a_rank() -> dict:
    """What published EPLB may give; before and after a swap."""
    count = place("contiguous").count_LED()
    count[:, 0, 0] += 1
    count[:, 3, 2] += 2
    twice = Placement.from_counts(count)
    served = Engine(copy.deepcopy(plain("olmoe")), twice, m.machine())
    assert served.generate(m.prompts(), 8) == answers("olmoe")
    other = Placement.from_counts(np.roll(count, 1, axis=2))
    served.swap(other)
    assert served.generate(m.prompts(), 8) == answers("olmoe")
    assert len(served.swaps) == 1 and served.placement.has_duplicates
    return {}


@case
def replicas_of_the_own_rank_and_node_first() -> dict:
    """The split ``near``: the same tokens, every pair on the nearest replica, with a fast loop's passive steps too."""
    new = few_or(8, 4)
    rank, node_D = dist.get_rank(), m.machine().node_D
    kept = {}
    for traffic in ("home", "home_device_dedup", "home_node_dedup"):
        for split in ("even", "near"):
            served, pairs = engine(traffic=traffic, split=split), []
            for layer in served.experts.values():
                plain_devices = layer.split.devices

                def devices(ids_TK, layer=layer, ask=plain_devices, pairs=pairs):
                    device_TK = ask(ids_TK)
                    count_ED = layer.placement.count_LED()[layer.index]
                    pairs += [(count_ED[e], int(d)) for e, d in zip(ids_TK.ravel(), device_TK.ravel(), strict=True)]
                    return device_TK

                layer.split.devices = devices
            assert served.generate(m.prompts(), new) == answers("olmoe", new=new), (traffic, split)
            mine = (len(pairs), sum(_is_nearest(count_D, device, rank, node_D) for count_D, device in pairs),
                    sum(device == rank for _, device in pairs))  # fmt: skip
            everyone: list = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
            every, nearest, own = np.sum(everyone, axis=0).tolist()
            assert nearest == every if split == "near" else nearest < every, (split, nearest, every)
            kept[f"{traffic} {split}"] = own
        assert kept[f"{traffic} near"] > kept[f"{traffic} even"]
    passive = ServingPolicy(parse_policy("poise"), tiny_price(), step_slots=1)
    assert engine(split="near", fast=passive).generate(m.prompts(), 8) == answers("olmoe")
    for options, words in (({"traffic": "stay"}, "near.*stay"), ({"split": "exact"}, "exact")):
        with pytest.raises(OptionError, match=words):
            engine(**{"split": "near", **options})
    return kept


def _is_nearest(count_D, device, rank, node_D) -> bool:
    """Whether a holder is on the rank if it can be, else in its node if it can be."""
    if count_D[rank]:
        return device == rank
    inside = [d for d in np.flatnonzero(count_D) if node_D[d] == node_D[rank]]
    return bool(count_D[device]) and (not inside or device in inside)
