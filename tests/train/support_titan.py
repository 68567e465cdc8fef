"""Cases: torchtitan's module layout under ``fully_shard_experts`` (tests/train/titan_model.py)."""

from __future__ import annotations

import copy
import operator
import tempfile
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.train import harness as h
from tests.train import support_models as c
from tests.train import titan_model as titan
from tests.train.support_models import case
from tests.train.support_runs import EXACT, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from poise.routing.trace import RoutingTrace
from poise.train import Rollout
from poise.train.dispatched import PassThrough
from poise.util.errors import ModelError, OptionError

EXPERTS = "layers.0.moe.routed_experts.inner_experts"


def biases(model: Any) -> torch.Tensor:
    return torch.stack([block.moe.expert_bias_E for block in model.layers.values()])


@case
def titan_layout() -> dict:
    """Parity with a dense run, whose balancing bias moves by the loads of all: routing follows it in both."""
    rank, world, errors = dist.get_rank(), dist.get_world_size(), {}
    dense = titan.build()
    record = c.dense_record(dense, lambda m, s: titan.loss_of(m, s, world), 4, lambda m, s: titan.update_expert_bias(m))
    assert biases(dense).abs().max() > 0.02
    moved = 0
    for policy, again in (("hecate", False), ("poise", True)):
        model = titan.build()
        run = shard(model, policy=policy, rematerialise=again)
        assert run.owners.shape == (2, 6) and run.schedule.planner.top_k == 2
        assert isinstance(model.layers["0"].moe.routed_experts.token_dispatcher, PassThrough)
        model.layers["0"].moe.init_buffers()
        errors[policy] = c.follow(
            model, run, record, lambda m, s: titan.loss_of(m, s, world, rank), average=True,
            after=lambda m, s: titan.update_expert_bias(m, dist.group.WORLD),
        )  # fmt: skip
        assert torch.equal(biases(model), biases(dense))
        moved += run.schedule.moved_bytes["gather"]
    assert max(errors.values()) <= EXACT, errors
    assert moved > 0, "no replica was ever made"
    return errors


@case
def titan_in_bfloat16() -> dict:
    """Experts that compute in bfloat16 whatever they are given do so here: no further apart than their rounding."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dense, model, exact = (titan.build(torch.float32, short=short) for short in (True, True, False))
    run = shard(model)
    wanted, rounded = titan.loss_of(dense, 0, world), titan.loss_of(exact, 0, world)
    wanted.backward()
    loss = titan.loss_of(model, 0, world, rank)
    loss.backward()
    c.average_dense(model, run)
    mean = loss.detach().double()
    dist.all_reduce(mean)
    error = abs(mean.item() / world - wanted.item()) / wanted.item()
    off = abs(rounded.item() - wanted.item()) / wanted.item()
    gate, other = (m.layers["0"].moe.router.gate.weight.grad for m in (model, dense))
    apart = c.agreed(float((gate - other).norm() / other.norm()))
    assert error <= 1e-6 < off, (error, off)  # what rounding to bfloat16 costs is far more: it was rounded
    assert apart <= 1e-3, apart
    return {"loss": error, "gradient": apart, "of rounding": off}


@case
def titan_checkpoints() -> dict:
    """A checkpoint of torchtitan's, sharded as FSDP does, loads by its names; and one of ours loads into its model."""
    world = dist.get_world_size()
    theirs, model = titan.build(), titan.build()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.1)
    mesh = init_device_mesh("cpu", (world,))
    state = {name: distribute_tensor(value.detach(), mesh, [Shard(0)]) if value.dim() else value
             for name, value in theirs.state_dict().items()}  # fmt: skip
    run = shard(model)
    assert set(model.state_dict()) == set(theirs.state_dict())
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder, 0)
    dcp.save(state, checkpoint_id=f"{folder[0]}/theirs")
    into = model.state_dict()
    dcp.load(into, checkpoint_id=f"{folder[0]}/theirs")
    model.load_state_dict(into)
    wanted = dict(theirs.named_parameters())
    for name, weight in model.named_parameters():
        mine = run.schedule.layers[0].mine if name.startswith(EXPERTS) else None
        if "inner_experts" not in name or mine is not None:
            whole = wanted[name] if mine is None else wanted[name][mine]
            assert torch.equal(c.whole(weight), whole), name
    dcp.save(model.state_dict(), checkpoint_id=f"{folder[0]}/ours")
    fresh = titan.build()
    again = fresh.state_dict()
    dcp.load(again, checkpoint_id=f"{folder[0]}/ours")
    assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())
    return {"tensors": len(again)}


def follows(router: nn.Module, ids_BLK: torch.Tensor) -> Any:
    """The router's forward with given experts, written down a second time."""

    def forward(x_BLD: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores_BLE = torch.sigmoid(router.gate(x_BLD))
        scores_BLK = scores_BLE.gather(-1, ids_BLK)
        return scores_BLK / (scores_BLK.sum(-1, keepdim=True) + 1e-20), ids_BLK, scores_BLE

    return forward


@case
def titan_replay() -> dict:
    """A record is replayed though the router lies one module above the experts: losses and gradients of a dense run."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dense, model = titan.build(), titan.build()
    batch = titan.tokens(0, world)[0].shape[:2]
    picks = np.argsort(np.random.default_rng(3).random((batch.numel(), 2, 6)), axis=2)[:, :, :2]
    for layer, block in enumerate(dense.layers.values()):
        block.moe.router.forward = follows(block.moe.router, torch.from_numpy(picks[:, layer].copy()).view(*batch, 2))
    titan.loss_of(dense, 0, world).backward()
    run = shard(model)
    mine = np.arange(batch.numel()).reshape(world, -1)[rank]
    for _ in run.foresee(Rollout(RoutingTrace(picks.astype(np.int16), 6)), [mine]):
        titan.loss_of(model, 0, world, rank).backward()
    c.average_dense(model, run)
    wanted = {name: weight.grad for name, weight in dense.named_parameters()}
    error = c.agreed(h.worst(c.of_all(model), h.local_rows(model, wanted)))
    assert error <= EXACT, error
    return {"error": error}


@case
def titan_refusals() -> dict:
    """A mesh of torchtitan's own expert parallelism; sorted tokens without a dispatcher; a copy trains on its own."""
    model = titan.build()
    shard(model)
    seam = model.layers["0"].moe.routed_experts.token_dispatcher
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    said = c.raised(OptionError, lambda: seam.wire_meshes(ep_mesh=mesh))
    seam.wire_meshes(ep_mesh=None)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = titan.GroupedExperts(16, 24, 6)

    bare = c.raised(ModelError, lambda: shard(Bare()))
    assert "token_dispatcher" in bare and f"{dist.get_world_size()} ranks" in said
    early = titan.build()
    for place in ("moe.routed_experts.token_dispatcher", "moe.routed_experts", "moe"):
        owner = operator.attrgetter(place)(early.layers["0"])
        owner.score_before_experts = True
        told = c.raised(ModelError, lambda: shard(early))
        assert "weights tokens before its experts" in told, told
        owner.score_before_experts = False
    shard(early)
    twin = copy.deepcopy(model)
    losses = [titan.loss_of(m, 0, dist.get_world_size(), dist.get_rank()) for m in (model, twin)]
    assert torch.equal(*losses)
    return {"said": said.splitlines()[0], "bare": bare.splitlines()[0]}
