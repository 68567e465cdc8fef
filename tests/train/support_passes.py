"""Cases about passes through parts of a model, graphs that are kept or dropped, weights that are shared or change between."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_runs import EXACT, apart, everyone, mine, pair, shard, through
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from poise.runtime.moe import ExpertList, GatedExperts, MoE
from poise.stepwise.sharding import Heterogeneous
from poise.util.errors import ModelError, OptionError


@case
def parts_called_by_themselves() -> dict:
    """Blocks skipped or in another order, with steps between: no replica of before a step is used after it."""
    errors = {}
    for name, orders in (("skipped", ((0, 1), (0,), (0, 1))), ("reversed", ((1, 0),) * 3), ("twice", ((1, 0, 1),) * 3)):
        dense, model, run = pair(rematerialise=name == "twice", prefetch=2 if name == "twice" else 1)
        theirs, ours = (torch.optim.SGD(one.parameters(), lr=0.5) for one in (dense, model))
        worst = 0.0
        for step, blocks in enumerate(orders):
            theirs.zero_grad(), ours.zero_grad()
            through(dense, everyone(step), blocks).backward()
            through(model, mine(step), blocks).backward()
            worst = max(worst, apart(model, run, dense))
            for one in (dense, model):
                for weight in one.parameters():  # experts of a skipped block change as well
                    weight.grad = (torch.zeros_like(weight) if weight.grad is None else weight.grad) + 0.1
            theirs.step(), ours.step()
        assert len(run.metrics) <= 2
        errors[name] = worst
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def shared_experts_of_layers() -> dict:
    """Two layers with one experts module stay so; a weight of two modules is refused."""
    dense, model = h.build(), h.build()
    for one in (dense, model):
        one.blocks[1].experts = one.blocks[0].experts
    run = shard(model, rematerialise=True)
    run.set_gradient_divide_factor(1.0)
    assert model.blocks[0].experts is model.blocks[1].experts and run.owners.shape[0] == 1
    h.loss_of(dense, everyone()).backward()
    h.loss_of(model, mine()).backward()
    error = apart(model, run, dense)
    assert error <= EXACT, error
    tied = h.build()
    tied.blocks[1].experts.down_proj = tied.blocks[0].experts.down_proj
    said = c.raised(ModelError, lambda: shard(tied))
    assert "down_proj" in said
    return {"error": error, "said": said.splitlines()[0]}


@case
def ddp_of_a_parent() -> dict:
    parent = nn.Sequential(MoE(GatedExperts(8, h.WIDTH, h.INNER), h.WIDTH, 8, 2), nn.Linear(h.WIDTH, 3))
    shard(parent[0])
    wrapped = DistributedDataParallel(parent)  # eight experts on every rank count: it finds equal shapes
    said = c.raised(ModelError, lambda: wrapped(torch.ones(4, h.WIDTH)))
    return {"said": said.splitlines()[0]}


@case
def a_kept_graph_on_one_rank() -> dict:
    """One rank keeps a validation loss with its graph: owners move all the same, and its backward is refused later."""
    rank = dist.get_rank()
    _, model, run = pair(sharding=Heterogeneous(interval=2, overlap=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = h.loss_of(model, mine(9)) if rank == 0 else h.loss_of(model, mine(9)).detach()
    before = run.owners
    for step in range(4):
        optimizer.zero_grad()
        h.loss_of(model, mine(step)).backward()
        optimizer.step()
    h.loss_of(model, mine(4)).backward()
    assert (run.owners != before).any()
    flags = c.raised(OptionError, lambda: run.reshard(before)) if kept is not None else ""
    assert "backward" in flags
    return {"said": flags}


@case
def old_graph_after_a_move() -> dict:
    """A backward pass through owners that are no more is an error, not a wrong gradient."""
    _, model, run = pair()
    loss = h.loss_of(model, mine())
    run.schedule._move(run.owners[:, ::-1].copy())
    said = c.raised(ModelError, loss.backward)
    assert "moved" in said
    model.zero_grad()
    h.loss_of(model, mine(1)).backward()  # and the run goes on
    return {"said": said.splitlines()[0]}


@case
def a_rank_without_gradient_of_its_input() -> dict:
    """Experts first in the model; a rank without tokens passes a fresh empty tensor."""
    rank, model = dist.get_rank(), h.build(layers=1)
    run = shard(model)
    data = mine(layers=1)
    x = data.x.clone().requires_grad_() if rank == 0 else torch.zeros(0, h.WIDTH, dtype=torch.float64)
    ids = data.ids[0][: len(x)]
    weights = torch.full(ids.shape, 0.5, dtype=torch.float64)
    model.blocks[0].experts(x, ids, weights).sum().backward()
    assert rank or x.grad.abs().sum() > 0
    h.loss_of(model, mine(1, layers=1)).backward()
    return {"moved": run.schedule.moved_bytes}


@case
def a_layer_left_out() -> dict:
    """Replica gradients of an unsynchronised micro-batch get home though the last one skips their layer."""
    dense, model, run = pair(sharding=Heterogeneous(interval=1))
    h.loss_of(dense, everyone()).backward()
    run.set_requires_gradient_sync(False)
    h.loss_of(model, mine()).backward()
    run.set_requires_gradient_sync(True)
    through(dense, everyone(1), (0,)).backward()
    through(model, mine(1), (0,)).backward()
    error = apart(model, run, dense)
    assert error <= EXACT, error
    fresh = h.build()
    run = shard(fresh, sharding=Heterogeneous(interval=1))
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    for step in range(2):  # the second layer never ran: it has no loads to plan from
        through(fresh, mine(step), (0,)).backward()
        optimizer.step()
    return {"error": error}


@case
def odd_weights() -> dict:
    """A weight that the experts do not use; types that differ within an expert."""

    class Unused(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(h.WIDTH, h.INNER), nn.Tanh(), nn.Linear(h.INNER, h.WIDTH))
            self.extra = nn.Parameter(torch.ones(3))

    with torch.random.fork_rng():
        torch.manual_seed(5)
        dense, model = h.build("list"), h.build("list")
        for block in dense.blocks:
            block.experts = ExpertList(Unused().double() for _ in range(h.EXPERTS))
    for block, other in zip(model.blocks, dense.blocks, strict=True):
        block.experts = ExpertList(Unused().double() for _ in range(h.EXPERTS))
        block.experts.load_state_dict(other.experts.state_dict())
    run = shard(model)
    run.set_gradient_divide_factor(1.0)
    h.loss_of(dense, everyone()).backward()
    h.loss_of(model, mine()).backward()
    error = apart(model, run, dense)
    assert error <= EXACT and run.schedule.moved_bytes["reduce"] > 0, error
    mixed = h.build("list", dtype=torch.float32)
    for expert in mixed.blocks[1].experts:
        expert[0].to(torch.bfloat16)
    said = c.raised(ModelError, lambda: shard(mixed))
    assert "bfloat16" in said
    return {"error": error, "said": said.splitlines()[0]}


@case
def a_fetch_for_nothing_in_mixed_precision() -> dict:
    """Copies that replicas are sent from stay until the sending is over, though the layer does not run."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for form in ("direct", "tree"):
        model = h.build(dtype=torch.float32)
        run = shard(model, mp_policy=policy, policy="full-replication", form=form)
        for step in range(3):
            through(model, mine(step, dtype=torch.float32), (0,)).backward()
        assert run.schedule.moved_bytes["gather"] > 0
    return {}


@case
def a_part_of_a_graph_on_one_rank() -> dict:
    """One rank keeps the first block's graph, the others drop it: what is gathered for the backward is the same."""
    rank, errors = dist.get_rank(), []
    dense, model, run = pair(rematerialise=True, policy="full-replication")
    for same_pass in (True, False):
        data = mine()
        x = model.blocks[0](data.x, data.ids[0])
        kept = x if rank == 0 else x.detach()
        if not same_pass:
            run.schedule.begin()
        x = x.detach().requires_grad_()
        model.blocks[1](x, data.ids[1]).sum().backward()
        model.zero_grad(), dense.zero_grad()
        h.loss_of(dense, everyone(1)).backward()
        h.loss_of(model, mine(1)).backward()
        errors.append(apart(model, run, dense))
        del kept
    assert max(errors) <= EXACT, errors
    return {"errors": errors}


@case
def loaded_between_blocks() -> dict:
    """Weights loaded after replicas were fetched: none of the old ones is used."""
    dense, model, _ = pair(policy="full-replication")
    state = {name: 1.5 * weight for name, weight in h.build().state_dict().items()}
    with torch.no_grad():
        losses = []
        for one, data in ((dense, everyone()), (model, mine())):
            x = one.blocks[0](data.x, data.ids[0])
            one.load_state_dict(state)
            x = one.blocks[1](x, data.ids[1])
            losses.append((one.head(x) - data.target).square().sum() / data.total)
    dist.all_reduce(losses[1])
    error = abs(losses[1] / losses[0] - 1).item()
    assert c.agreed(error) <= EXACT, error
    return {"error": error}
