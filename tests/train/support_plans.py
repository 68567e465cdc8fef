"""Cases about what is planned and counted: balance, loads, prices, budgets, policies, metrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.ranks import everywhere
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.matrix import machine
from tests.train.support_models import case
from tests.train.support_runs import EXACT, everyone, mine, pair, shard, some_owners
from torch.distributed.fsdp import MixedPrecisionPolicy

from poise.machine.cluster import Cluster
from poise.runtime.experts import ExpertKind
from poise.stepwise.methods.hecate import Hecate
from poise.stepwise.protocol import LayerView
from poise.train import fully_shard_experts
from poise.train.sharding import ShardedExperts
from poise.util.errors import OptionError


@contextmanager
def computed() -> Iterator[list[int]]:
    """Pairs that the experts of this rank really compute, one number a layer."""
    counts: list[int] = []
    run = ExpertKind.run

    def counted(self: ExpertKind, banks: Any, x: torch.Tensor) -> torch.Tensor:
        counts.append(len(x))
        return run(self, banks, x)

    with mock.patch.object(ExpertKind, "run", counted):
        yield counts


@case
def force_balance() -> dict:
    """Every rank computes as many pairs, to within one expert's; results are those of the forced ids."""
    world, rank, spread, errors = dist.get_world_size(), dist.get_rank(), {}, {}
    parts = [h.batch("hot-rank", 0, world, 5, one, torch.float64) for one in range(world)]
    forced = [
        (torch.arange(part.ids[0].numel()) + one * part.ids[0].numel()).remainder(h.EXPERTS).view(part.ids[0].shape)
        for one, part in enumerate(parts)
    ]
    whole = h.batch("hot-rank", 0, world, 5, None, torch.float64)
    dense = h.build()
    for block in dense.blocks:  # the router's weights stay, its choice does not
        block.experts.forward = lambda x, ids, w, call=block.experts.forward: call(x, torch.cat(forced), w)
    h.loss_of(dense, whole).backward()
    expected = {name: weight.grad for name, weight in dense.named_parameters()}
    for policy in ("expert-parallelism", "hecate", "poise"):
        for force in (True, False):
            model = h.build()
            run = shard(model, policy=policy, force_balance=force)
            with computed() as mine:
                loss = h.loss_of(model, parts[rank])
            (loss * world).backward()
            tokens = np.array(everywhere(mine[: h.LAYERS])).T  # [L, D]
            assert all((one.tokens_D == tokens[one.layer]).all() for one in run.metrics)
            gap = int((tokens.max(axis=1) - tokens.min(axis=1)).max())
            spread[f"{policy}, forced {force}"] = gap
            if force:
                c.average_dense(model, run)
                errors[policy] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
                one_expert = len(whole.x) * 5 // h.EXPERTS
                owned = [np.diff(np.sort(one.owner_tokens_D)[[0, -1]])[0] for one in run.metrics]
                assert max(owned) <= one_expert, owned
                assert policy == "hecate" or gap <= one_expert, spread  # hecate may spread what is even already
    assert spread["expert-parallelism, forced False"] > 2 * spread["expert-parallelism, forced True"], spread
    assert max(errors.values()) <= EXACT, errors
    return {**errors, "max - min pairs": spread}


@case
def metrics() -> dict:
    """``LayerMetrics`` are the same on all ranks and equal counts by hand, from the routing and in the experts."""
    world, rank, said = dist.get_world_size(), dist.get_rank(), {}
    for policy in ("expert-parallelism", "hecate", "full-replication"):
        for workload in few_or(("two-hot", "ragged"), ("two-hot" if policy == "expert-parallelism" else "ragged",)):
            model = h.build()
            owners = some_owners(8)
            run = shard(model, policy=policy, owners=owners)
            for step in range(2):
                data = h.batch(workload, step, world, 2, rank, torch.float64)
                with computed() as mine, torch.no_grad():
                    model(data.x, data.ids)
                tokens = np.array(everywhere(mine)).T
                lines = [
                    (one.layer, one.tokens_D.tolist(), one.owner_tokens_D.tolist(), one.replicas, one.gathered_bytes,
                     one.overload, one.owner_overload, one.why)
                    for one in run.metrics
                ]  # fmt: skip
                assert all(other == lines for other in everywhere(lines)), "ranks disagree"
                assert [line[0] for line in lines] == list(range(h.LAYERS))
                for one in run.metrics:
                    ids = h.routing(workload, step, one.layer, world, 2)
                    load = np.bincount(ids.reshape(-1), minlength=h.EXPERTS)
                    by_owner = np.array([load[owners[one.layer] == device].sum() for device in range(world)])
                    assert (one.owner_tokens_D == by_owner).all() and one.tokens_D.sum() == load.sum()
                    assert (one.tokens_D == tokens[one.layer]).all()
                    assert one.owner_overload == by_owner.max() / by_owner.mean()
                    assert one.overload == tokens[one.layer].max() / tokens[one.layer].mean()
                    assert one.gathered_bytes == one.replicas * run.schedule.deployment.expert_bytes
                    if policy == "expert-parallelism":
                        assert one.replicas == 0 and (one.tokens_D == by_owner).all()
                    if policy == "full-replication":
                        assert one.replicas == h.EXPERTS * (world - 1)
                        assert (one.tokens_D == 2 * np.array(h.tokens_of(workload, step, world))).all()
            said[f"{policy}, {workload}"] = [round(one.overload, 3) for one in run.metrics]
    return said


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
    told = everywhere(words)
    assert all(one == words for one in told), told
    assert words["a100"][0] == words["a slow machine"][0] == "False first step: no loads known"
    assert all(one.startswith("False") and "by the rates of a100" in one for one in words["a100"][-h.LAYERS :]), words
    assert words["a slow machine"][-h.LAYERS :] == ["True "] * h.LAYERS, words
    return words


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
