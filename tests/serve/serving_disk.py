"""Cases about models from disk and from their configs."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.serve import models as m
from tests.serve.harness import answers, case, place, plain

from poise.cost.traffic import DATA_FLOWS
from poise.serve import Engine, from_folder
from poise.serve.load import from_config


@case
def served_from_disk() -> dict:
    """A checkpoint of every family: experts of the rank's slots alone are read where they are stored one by one."""
    out = {}
    for family in few_or(("mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"), ("mixtral", "gpt_oss")):
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder, src=0)
        if dist.get_rank() == 0:
            plain(family).save_pretrained(folder[0], max_shard_size="60KB")
        dist.barrier()
        parts = from_folder(folder[0], place("replicas", family), dtype=torch.float64)
        held = [len(parts.placement.experts_of(row, dist.get_rank())) for row in range(len(parts.banks))]
        assert [len(next(iter(bank.values()))) for bank in parts.banks.values()] == held
        kept = sum(weight.numel() for weight in parts.model.parameters())
        dense = sum(weight.numel() for name, weight in plain(family).named_parameters() if ".experts." not in name)
        assert kept == dense
        served = Engine(parts, parts.placement, m.machine(), traffic="stay")
        assert served.generate(m.prompts(), 8) == answers(family), family
        out[family] = held
        dist.barrier()
    return out


@case
def bfloat16_from_disk() -> dict:
    """Stored in float32, served in bfloat16; the correction bias stays in float32 as in transformers."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder, src=0)
    if dist.get_rank() == 0:
        m.dense("deepseek_v3", torch.float32).save_pretrained(folder[0])
    dist.barrier()
    parts = from_folder(folder[0], place("uneven", "deepseek_v3"), dist.get_rank(), dtype=torch.bfloat16)
    types = {name: weight.dtype for name, weight in parts.model.state_dict().items()}
    assert types.pop("model.layers.1.mlp.gate.e_score_correction_bias") == torch.float32
    assert types.pop("model.layers.2.mlp.gate.e_score_correction_bias") == torch.float32
    assert set(types.values()) == {torch.bfloat16}
    assert {weight.dtype for bank in parts.banks.values() for weight in bank.values()} == {torch.bfloat16}
    tokens = {}
    for traffic in few_or(DATA_FLOWS, DATA_FLOWS[::3]):
        parts = from_folder(folder[0], place("uneven", "deepseek_v3"), dist.get_rank(), dtype=torch.bfloat16)
        tokens[traffic] = Engine(parts, parts.placement, m.machine(), traffic=traffic).generate(m.prompts(), 4)
    return {traffic: got == tokens["home"] for traffic, got in tokens.items()}


@case
def the_same_from_config_on_every_rank() -> dict:
    torch.manual_seed(dist.get_rank())
    before = torch.random.get_rng_state()
    model = from_config(m.CONFIGS["olmoe"], seed=7)
    assert torch.equal(before, torch.random.get_rng_state())
    total = torch.stack([weight.detach().double().sum() for weight in model.parameters()]).sum()
    low, high = total.clone(), total.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    assert low == high
    return {}
