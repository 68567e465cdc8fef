"""Four ranks: the engines' own weight movers, from their wheels, carry weights to maps of ours (``test_exports.py``)."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.engines import engine_stubs

from poise.cli.main import app
from poise.engines.plugins.policy import PolicySettings
from poise.engines.plugins.sglang_hook import around
from poise.engines.plugins.vllm_plugin import register
from poise.planning.placement import Placement

RANKS, SLOTS, EXPERTS, LAYERS, DENSE = 4, 4, 12, 3, 1
TRIVIAL = (np.arange(RANKS * SLOTS) % EXPERTS).tolist()


def weights_of(row: list[int]) -> list[torch.Tensor]:
    """Two tensors of this rank's slots that tell which expert they belong to."""
    mine = torch.tensor(row[dist.get_rank() * SLOTS : (dist.get_rank() + 1) * SLOTS], dtype=torch.float32)
    return [mine[:, None].repeat(1, 6) * 10 + 1, mine[:, None, None].repeat(1, 2, 3) * 10 + 2]


def mover(resources=None):
    """``update_expert_weights_single_layer`` of the wheel."""
    root = Path(os.environ["POISE_TEST_WHEEL"])
    engine_stubs.sglang(root, ranks=RANKS, redundant=RANKS * SLOTS - EXPERTS, resources=resources)
    return importlib.import_module("sglang.srt.eplb.expert_location_updater").update_expert_weights_single_layer


def move(old: list[int], new: list[int], per_node: int, held: list[torch.Tensor]) -> None:
    """One layer; what every slot then holds is checked."""
    buffers = [torch.empty_like(one) for one in held]
    mover()(
        routed_experts_weights=held, temp_buffers=buffers, old_physical_to_logical_map=old,
        new_physical_to_logical_map=new, num_local_physical_experts=SLOTS, num_gpu_per_node=per_node,
        rank=dist.get_rank(), world_size=RANKS,
    )  # fmt: skip
    for got, want in zip(held, weights_of(new), strict=True):
        assert torch.equal(got, want), (dist.get_rank(), got[:, 0], want[:, 0])


def exported(seed: int) -> list[list[int]]:
    """The map that ``poise export`` writes for a plan with replicas, read back from its file."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(np.concatenate([np.arange(EXPERTS), rng.permutation(EXPERTS)[:4]]))
                     for _ in range(LAYERS - DENSE)])  # fmt: skip
    folder = Path(os.environ["POISE_TEST_FOLDER"])
    plan, out = folder / f"{seed}-{dist.get_rank()}.npz", folder / f"{seed}-{dist.get_rank()}.json"
    device = np.repeat(np.arange(RANKS), SLOTS)
    Placement(rows, device, EXPERTS, RANKS, np.arange(DENSE, LAYERS)).save(plan)
    words = ["export", str(plan), "--to", "sglang", "--num-hidden-layers", str(LAYERS), "-o", str(out)]
    got = CliRunner().invoke(app, words)
    assert got.exit_code == 0, got.output
    table = json.loads(out.read_text())["physical_to_logical_map"]
    assert table[DENSE:] == rows.tolist()
    return table


def from_the_trivial_map(per_node: int) -> None:
    for row in exported(1)[DENSE:]:
        move(TRIVIAL, row, per_node, weights_of(TRIVIAL))


def from_map_to_map(per_node: int) -> None:
    held = weights_of(TRIVIAL)
    at = TRIVIAL
    for seed in range(2, 6):
        row = exported(seed)[DENSE]
        move(at, row, per_node, held)
        at = row


def maps_of_the_plugin() -> None:
    """What the hook answers to loads, all ranks alike, from the map in use."""
    in_use = exported(7)
    resources = SimpleNamespace(
        expert_location_metadata=SimpleNamespace(physical_to_logical_map_cpu=torch.tensor(in_use))
    )
    mover(resources)
    hook = around(PolicySettings(time_limit_s=0.02))
    loads = torch.from_numpy(np.random.default_rng(8).integers(1, 100, (5, LAYERS, EXPERTS)) ** 2)
    loads[:, :DENSE] = 0
    algorithms = importlib.import_module("sglang.srt.eplb.eplb_algorithms")
    maps, slots, replicas = hook(
        algorithms.rebalance_experts, tokens_per_expert=loads, num_physical_experts=RANKS * SLOTS,
        num_local_physical_experts=SLOTS, num_groups=None, num_nodes=1, algorithm=algorithms.EplbAlgorithm.deepseek,
    )  # fmt: skip
    answers: list[object] = [None] * RANKS
    dist.all_gather_object(answers, maps.tolist())
    assert answers == [maps.tolist()] * RANKS and maps.tolist() != in_use
    assert maps[:DENSE].tolist() == in_use[:DENSE]
    assert (replicas.sum(dim=1) == RANKS * SLOTS).all() and ((slots >= 0).sum(dim=2) == replicas).all()
    for layer in range(DENSE, LAYERS):
        move(in_use[layer], maps[layer].tolist(), 2, weights_of(in_use[layer]))


class Gloo:
    """A communicator as vLLM's mover wants one."""

    def __init__(self) -> None:
        self.ops: list[dist.P2POp] = []

    def add_send(self, tensors, dst_rank, expert_id):
        self.ops += [dist.P2POp(dist.isend, one.contiguous(), dst_rank) for one in tensors]

    def add_recv(self, tensors, src_rank, expert_id):
        self.ops += [dist.P2POp(dist.irecv, one, src_rank) for one in tensors]

    def set_transfer_context(self, old_indices, layer_idx):
        pass

    def execute(self):
        for request in dist.batch_isend_irecv(self.ops) if self.ops else []:
            request.wait()
        self.ops = []


def vllms_mover() -> None:
    """vLLM's default policy is replaced by the plugin; what that answers is carried out by vLLM's mover."""
    engine_stubs.vllm(Path(os.environ["POISE_TEST_VLLM"]))
    os.environ.update(POISE_EPLB="1", POISE_TIME_LIMIT_S="0.02")
    register()
    policy = importlib.import_module("vllm.distributed.eplb.policy").EPLB_POLICIES["default"]
    execute = importlib.import_module("vllm.distributed.eplb.rebalance_execute")
    at = torch.tensor([TRIVIAL] * LAYERS)
    held = [weights_of(TRIVIAL) for _ in range(LAYERS)]
    moved = 0
    for seed in range(4):
        load = torch.from_numpy(np.random.default_rng(seed).integers(1, 100, (LAYERS, EXPERTS)) ** 2).to(torch.int32)
        new = policy.rebalance_experts(load, RANKS * SLOTS, 1, 1, RANKS, at)
        execute.rearrange_expert_weights_inplace(
            at, new, held, [torch.empty_like(one) for one in held[0]], dist.group.WORLD, Gloo()
        )
        for row, mine in zip(new.tolist(), held, strict=True):
            for got, want in zip(mine, weights_of(row), strict=True):
                assert torch.equal(got, want), (dist.get_rank(), got[:, 0], want[:, 0])
        moved += int((new != at).sum())
        at = new
    assert moved > LAYERS * SLOTS


CASES = {
    "from the trivial map, one node": lambda: from_the_trivial_map(4),
    "from the trivial map, two nodes": lambda: from_the_trivial_map(2),
    "from map to map": lambda: from_map_to_map(2),
    "maps of the plugin": maps_of_the_plugin,
    "vLLM's mover": vllms_mover,
}

if __name__ == "__main__":
    run_cases(CASES, read_options())
