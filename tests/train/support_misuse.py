"""Cases about uses that are easy to get wrong: each is right, or says what is wrong, on every rank."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.matrix import machine
from tests.train.support_cases import EXACT, shard
from tests.train.support_models import case
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from poise.machine.cluster import Cluster
from poise.runtime.moe import ExpertList, GatedExperts, MoE
from poise.stepwise.methods.hecate import Hecate
from poise.stepwise.protocol import LayerView
from poise.stepwise.sharding import Heterogeneous
from poise.train import fully_shard_experts
from poise.train.sharding import ShardedExperts
from poise.util.errors import ModelError, OptionError


def mine(
    step: int = 0, workload: str = "hot-expert-a-rank", layers: int = h.LAYERS, dtype: torch.dtype = torch.float64
) -> h.Batch:
    return h.batch(workload, step, dist.get_world_size(), 2, dist.get_rank(), dtype, layers)


def everyone(step: int = 0, workload: str = "hot-expert-a-rank") -> h.Batch:
    return h.batch(workload, step, dist.get_world_size(), 2, None, torch.float64)


def through(model: nn.Module, data: h.Batch, blocks: tuple[int, ...]) -> Tensor:
    """The loss by calling parts of the model: the model's own hooks do not run."""
    x = data.x
    for number in blocks:
        x = model.blocks[number](x, data.ids[number])
    return (model.head(x) - data.target).square().sum() / data.total


def pair(kind: str = "gated", **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    dense, model = h.build(kind), h.build(kind)
    run = shard(model, **options)
    run.set_gradient_divide_factor(1.0)
    return dense, model, run


def apart(model: nn.Module, run: Any, dense: nn.Module) -> float:
    """Largest relative error of any gradient on any rank."""
    h.reduce_dense(model, run)
    wanted = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in dense.named_parameters()}
    return c.agreed(h.worst(c.of_all(model), h.local_rows(model, wanted)))


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
def frozen_and_thawed() -> dict:
    """``requires_grad`` is looked at in every pass; experts of a list must agree."""
    dense, model, run = pair()
    for weight in run.parameters():
        weight.requires_grad_(False)
    h.loss_of(model, mine()).backward()
    assert all(weight.grad is None for weight in run.parameters())
    for weight in run.parameters():
        weight.requires_grad_(True)
    model.zero_grad()
    h.loss_of(dense, everyone(1)).backward()
    h.loss_of(model, mine(1)).backward()
    error = apart(model, run, dense)
    assert error <= EXACT, error
    some = h.build("list")
    some.blocks[0].experts[3].requires_grad_(False)
    said = c.raised(ModelError, lambda: shard(some))
    assert "expert 3" in said
    return {"error": error, "said": said.splitlines()[0]}


@case
def optimizers_and_owners() -> dict:
    """Built too early: said. Never attached: its states move with owners all the same."""
    early = h.build()
    optimizer = torch.optim.AdamW(early.parameters())
    run = shard(early)
    first = c.raised(OptionError, lambda: run.attach(optimizer))
    h.loss_of(early, mine()).backward()
    second = c.raised(OptionError, optimizer.step)
    dense, model, run = pair()
    theirs, ours = h.make_optimizer("adamw", dense), h.make_optimizer("adamw", model)
    for step in range(4):
        theirs.zero_grad(), ours.zero_grad()
        h.loss_of(dense, everyone(step)).backward()
        h.loss_of(model, mine(step)).backward()
        h.reduce_dense(model, run)
        for weight in dense.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        theirs.step(), ours.step()
        if step == 1:
            run.reshard(run.owners[:, ::-1].copy())
    full = {name: weight.detach() for name, weight in dense.named_parameters()}
    error = c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, full)))
    assert error <= EXACT, error
    return {"error": error, "said": [first.splitlines()[0], second.splitlines()[0]]}


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
def loads_of_iterations() -> dict:
    """Evaluation does not enter the prediction; micro-batches of a step are one entry."""
    model = h.build()
    run = shard(model)
    h.loss_of(model, mine(0, "two-hot")).backward()
    model.zero_grad()
    before = run.schedule.planner.view(0)
    with torch.no_grad():
        for step in range(3):
            h.loss_of(model, mine(step, "half-idle"))
    after = run.schedule.planner.view(0)
    assert (before.predicted_E == after.predicted_E).all() and before.step == after.step == 1
    run.set_requires_gradient_sync(False)
    for step in range(3):
        run.set_requires_gradient_sync(step == 2)
        h.loss_of(model, mine(step, "hot-expert-a-rank")).backward()
    counts = [np.bincount(everyone(step).ids[0].flatten(), minlength=h.EXPERTS) for step in range(3)]
    assert run.schedule.planner.history.passes(0) == 3
    history = run.schedule.planner.history.of(0)
    assert len(history) == 2 and np.allclose(history[1], np.mean(counts, axis=0))
    return {"entries": len(history)}


@case
def prices_and_wires() -> dict:
    """Gradients in a wider type cost more; K is what the router chose; hooks of the experts still run."""
    model = h.build(dtype=torch.float32)
    calls: list[int] = []
    for block in model.blocks:
        block.gate.top_k = 7  # wrong, and mended by the first pass
        block.experts.register_forward_hook(lambda *_: calls.append(1) and None)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    run = shard(model, mp_policy=policy, form="direct")
    h.loss_of(model, mine(dtype=torch.float32)).backward()
    h.loss_of(model, mine(1, dtype=torch.float32)).backward()
    schedule = run.schedule
    price = schedule.planner.price(100)
    assert price.gradient_ratio == 2.0 and not price.fan_out and schedule.planner.top_k == 2
    assert len(calls) == 4
    assert schedule.deployment.gradient_bytes == 2 * schedule.deployment.expert_bytes
    assert schedule.moved_bytes["gather"] > 0
    return {"moved": schedule.moved_bytes}


@case
def a_budget_is_a_bound() -> dict:
    """Replicas that are kept stay within the budget also when there are suddenly more of them."""

    class More(Hecate):
        count = 1

        def before_gate(self, view: LayerView) -> np.ndarray:
            out = view.before_ED.copy()
            for d in range(out.shape[1]):
                out[np.flatnonzero(~out[:, d])[: More.count], d] = True
            return out

    world = dist.get_world_size()
    slow = Cluster(np.arange(world, dtype=np.int32), np.ones(world), 1e12, 1e12, 1e9, 1e3, 1e3)
    model = h.build(layers=3)
    expert = 3 * h.WIDTH * h.INNER * 8
    run = shard(model, policy=More(), rematerialise=2.0 * expert, step_slots=4, cluster=slow)
    kept = []
    for step, count in enumerate((1, 1, 4)):
        More.count = count
        run.schedule.restart()  # what was planned ahead knows nothing of it
        loss = h.loss_of(model, mine(step, layers=3))
        kept.append(run.schedule.budget.used_bytes / expert)
        loss.backward()
        assert run.schedule.budget.used_bytes == 0
    assert kept == [0.0, 2.0, 0.0], kept
    return {"kept": kept}


@case
def a_policy_object_with_other_slots() -> dict:
    """Plans made ahead are not used after the policy changed."""
    _, model, run = pair(policy="full-replication")
    h.loss_of(model, mine()).backward()
    run.set_policy("expert-parallelism")
    h.loss_of(model, mine(1)).backward()
    assert all(one.replicas == 0 for one in run.metrics)
    run.set_policy(replace(Hecate(), overlap=1), step_slots=1)
    h.loss_of(model, mine(2)).backward()
    assert all(0 < one.replicas <= dist.get_world_size() for one in run.metrics)
    return {"replicas": [one.replicas for one in run.metrics]}


@case
def what_is_no_policy() -> dict:
    """An object that looks like one, or a class: refused when sharding and later, and the run is as it was."""
    said = {}
    _, model, run = pair(policy="full-replication")
    for given in (object(), Hecate):
        said[str(given)[:6]] = c.raised(OptionError, lambda given=given: shard(h.build(), policy=given))
        assert "StepPolicy" in c.raised(OptionError, lambda given=given: run.set_policy(given))
    h.loss_of(model, mine()).backward()
    assert all(one.replicas > 0 for one in run.metrics)
    assert all("StepPolicy" in words for words in said.values())
    return {}


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


@case
def arrays_and_optimizers_that_change() -> dict:
    """The caller's array of owners is not the run's; an optimizer that takes another's place counts steps as well."""
    world = dist.get_world_size()
    owners = np.arange(h.LAYERS * h.EXPERTS).reshape(h.LAYERS, -1) % world
    model = h.build()
    run = shard(model, owners=owners, sharding=Heterogeneous(interval=2, overlap=1))
    owners[:] = owners[:, ::-1].copy()
    assert c.agreed(float(run.reshard(owners))) > 0 and (run.owners == owners).all()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(7):
        h.loss_of(model, mine(step)).backward()
        optimizer.step()
        if step == 0:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert run.schedule.steps == 7 and len([ref for ref in run.schedule.moves.optimizers if ref() is not None]) == 1
    assert (run.owners != owners).any()
    said = c.raised(OptionError, lambda: run.set_policy("hecate", step_slots=-1))
    return {"steps": run.schedule.steps, "said": said}


@case
def micro_batches_without_telling() -> dict:
    """Two forward passes, then two backward passes, as pipelines do: one iteration, ended by the optimizer."""
    model = h.build()
    run = shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        losses = [h.loss_of(model, mine(2 * step + part)) for part in (0, 1)]
        for loss in losses:
            loss.backward()
        optimizer.step()
    history = run.schedule.planner.history
    # without an optimizer that is known, the first backward pass ends the first iteration
    assert len(history.of(0)) == 3 and history.seen(0) == 3 and run.schedule.steps == 3, len(history.of(0))
    return {"entries": len(history.of(0))}


@case
def runs_that_end_while_optimizers_step() -> dict:
    """Runs are collected at any moment, also amid the hooks of a step; those that are left still know of it."""
    model = h.build()
    run = shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gone = [shard(h.build()) for _ in range(4)]
    handle = register_optimizer_step_post_hook(lambda *_: (gone and gone.pop(), gc.collect()) and None)
    try:
        for step in range(4):
            h.loss_of(model, mine(step)).backward()
            optimizer.step()
    finally:
        handle.remove()
    assert not gone and run.schedule.steps == 4
    return {"steps": run.schedule.steps}


@case
def rates_of_another_machine() -> dict:
    """Without ``cluster=`` on a CPU: said on every rank before anything is changed, and the metrics say what came of it."""
    world, rank = dist.get_world_size(), dist.get_rank()

    def warned(do: Callable[[], Any]) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            do()
        return [str(one.message) for one in seen if one.category is UserWarning]

    model, mesh = h.build(), h.MESH(world)
    try:
        fully_shard_experts(model, mesh=mesh)  # a warning is an error in these cases
    except UserWarning as warning:
        assert "poise reckons with the rates of an A100, and this runs on cpu" in str(warning)
    else:
        raise AssertionError("nothing is said")
    assert not any(isinstance(module, ShardedExperts) for module in model.modules())
    run = fully_shard_experts(model, mesh=mesh, policy="expert-parallelism")  # asks no rates
    assert len(warned(lambda: run.set_policy("poise"))) == 1 and not warned(lambda: run.set_policy("llep"))
    words: dict[str, list[str]] = {}
    for name in ("a100", "a slow machine"):
        model = h.build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if name == "a100" else "error")
            run = fully_shard_experts(model, mesh=mesh, cluster=None if name == "a100" else machine(world))
        words[name] = []
        run.schedule.planner.window_s = 1e-9  # as for a gather that nothing hides
        for step in range(3):
            h.loss_of(model, h.batch("hot-expert-a-rank", step, world, 2, rank, torch.float64)).backward()
            words[name] += [f"{one.replicas > 0} {one.why}" for one in run.metrics]
    told: list[Any] = [None] * world
    dist.all_gather_object(told, words)
    assert all(one == words for one in told), told
    assert words["a100"][0] == words["a slow machine"][0] == "False first step: no loads known"
    assert all(one.startswith("False") and "by the rates of a100" in one for one in words["a100"][-h.LAYERS :]), words
    assert words["a slow machine"][-h.LAYERS :] == ["True "] * h.LAYERS, words
    return words
