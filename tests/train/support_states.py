"""Cases about state dicts, averages and copies by PyTorch's own tools, which know nothing of sharded experts."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.ranks import folder
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_runs import (
    EXACT,
    STEPS,
    adamw,
    dense_run,
    error_of,
    fsdp,
    moments,
    moments_error,
    plain_copy,
    shard,
    train,
    trained,
    turned,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from poise.train import full_optimizer_state_dict, full_state_dict, parameter_groups
from poise.train.sharding import ShardedExperts
from poise.util.errors import ModelError, OptionError

# ---- averages and copies ------------------------------------------------------------------------------------------


@case
def averages_move_with_owners() -> dict:
    """A shadow of every weight: refused when owners have moved under it, exact where it follows them."""
    shadows: dict[str, Tensor] = {}

    def average(into: dict[str, Tensor]) -> Any:
        def after(model: nn.Module, step: int) -> None:
            for name, weight in model.named_parameters():
                into[name].mul_(0.5).add_(weight.detach(), alpha=0.5)

        return after

    start = h.build()
    shadows = plain_copy(start)
    dense_run(after=average(shadows), steps=2 * STEPS)
    errors = {}
    for follows in (True, False):
        model = h.build()
        run, optimizer = shard(model), adamw(model.parameters())
        mine = plain_copy(model)
        if follows:
            run.follow(mine)
        train(model, run, optimizer, range(STEPS), after=average(mine))
        run.reshard(turned(run))
        if not follows:
            said = c.raised(ModelError, lambda: average(mine)(model, 0))  # noqa: B023
            assert "run.follow" in said
            first, second = (f"blocks.{number}.experts.down_proj" for number in (0, 1))
            new, old, other = model.get_parameter(second).detach(), mine[second], model.get_parameter(first).detach()
            c.raised(ModelError, lambda: torch.cat([other, old, new]))  # noqa: B023
            continue
        train(model, run, optimizer, range(STEPS, 2 * STEPS), after=average(mine))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(mine[name])
        errors["followed"] = error_of(model, shadows)
    said = c.raised(OptionError, lambda: run.follow([torch.zeros(3)]))
    assert errors["followed"] <= EXACT, errors
    return {**errors, "said": said}


@case
def copies_of_the_model() -> dict:
    """``deepcopy`` and ``AveragedModel``: runs of their own, which train, evaluate and follow."""
    dense_average: Any = torch.optim.swa_utils.AveragedModel(
        h.build(), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    dense_run(after=lambda model, _: dense_average.update_parameters(model), steps=2 * STEPS)
    model = h.build()
    run, optimizer = shard(model), adamw(model.parameters())
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    run.follow(averaged)
    train(model, run, optimizer, range(STEPS), after=lambda m, _: averaged.update_parameters(m))
    run.reshard(turned(run))
    train(model, run, optimizer, range(STEPS, 2 * STEPS), after=lambda m, _: averaged.update_parameters(m))
    error = error_of(averaged.module, dict(dense_average.module.named_parameters()))
    data = h.batch("hot-expert-a-rank", 9, dist.get_world_size(), 2, dist.get_rank(), torch.float64)
    with torch.no_grad():
        out, expected = averaged(data.x, data.ids), dense_average(data.x, data.ids)
    if out.numel():
        error = max(error, ((out - expected).norm() / expected.norm()).item())
    twin = copy.deepcopy(model)
    before = plain_copy(model)
    owned = {
        weight for module in twin.modules() if isinstance(module, ShardedExperts) for weight in module.parameters()
    }
    train(twin, SimpleNamespace(parameters=lambda: owned), torch.optim.SGD(twin.parameters(), 0.1), range(1))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not torch.equal(twin.head.weight, model.head.weight)
    assert c.agreed(error) <= EXACT, error
    return {"error": c.agreed(error)}


# ---- state dicts --------------------------------------------------------------------------------------------------


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@case
def whole_states_by_stock_getters() -> dict:
    """``full_state_dict=True`` of weights and optimizer: rank 0 gets what the dense run has, and every rank takes it."""
    model, _run, optimizer, whole, whole_optimizer = trained()
    weights, states = (
        get_model_state_dict(model, options=WHOLE),
        get_optimizer_state_dict(model, optimizer, options=WHOLE),
    )
    error = 0.0
    if dist.get_rank() == 0:
        error = h.worst({name: weights[name] for name in whole.state_dict()}, dict(whole.state_dict()))
        found = {name: state["exp_avg"] for name, state in states["state"].items()}
        assert all(type(value) is Tensor for value in (*weights.values(), *found.values()))
        error = max(error, h.worst(found, moments(whole, whole_optimizer)))
    assert c.agreed(error) <= EXACT, error
    errors = {"get": c.agreed(error)}
    for from_first in (True, False):
        fresh = h.build()
        other = shard(fresh, policy="poise")
        fsdp(fresh, h.MESH(dist.get_world_size()))
        new = adamw(parameter_groups(fresh))
        other.reshard(turned(other))
        boxes = [copy.deepcopy([weights, states])]  # what is set is changed
        if not from_first:
            dist.broadcast_object_list(boxes, 0)
        elif dist.get_rank():
            boxes = [[{}, {}]]
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_first)
        set_model_state_dict(fresh, boxes[0][0], options=options)
        set_optimizer_state_dict(fresh, new, boxes[0][1], options=options)
        error = max(error_of(fresh, whole.state_dict()), moments_error(fresh, new, whole, whole_optimizer))
        errors[f"set, from rank 0: {from_first}"] = error
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def chunks_by_stock_getters() -> dict:
    """``dcp.save`` and ``async_save`` of what the getters give, without poise's own functions, into other owners."""
    model, _run, optimizer, whole, whole_optimizer = trained()
    errors = {}
    with folder() as place:
        for how in ("save", "async_save"):
            state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
            if how == "save":
                dcp.save(state, checkpoint_id=str(place / how))
            else:
                dcp.async_save(state, checkpoint_id=str(place / how)).result()
            fresh = h.build()
            shard(fresh, policy="poise")
            fsdp(fresh, h.MESH(dist.get_world_size()))
            new = adamw(parameter_groups(fresh))
            into = {"model": get_model_state_dict(fresh), "optimizer": get_optimizer_state_dict(fresh, new)}
            dcp.load(into, checkpoint_id=str(place / how))
            set_model_state_dict(fresh, into["model"])
            set_optimizer_state_dict(fresh, new, into["optimizer"])
            errors[how] = max(error_of(fresh, whole.state_dict()), moments_error(fresh, new, whole, whole_optimizer))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def an_optimizer_s_own_state_dict() -> dict:
    """``full_optimizer_state_dict``, ``load_state_dict`` before the first step, and what cannot be pickled."""
    model, run, optimizer, whole, _whole_optimizer = trained(wrap=False)
    boxes = [full_optimizer_state_dict(optimizer)]
    dist.broadcast_object_list(boxes, 0)
    fresh = h.build()
    other = shard(fresh)
    fresh.load_state_dict(whole.state_dict())
    new = adamw(parameter_groups(fresh))
    new.load_state_dict(boxes[0])
    train(fresh, other, new, range(STEPS, STEPS + 1))
    expected, expected_optimizer = dense_run(steps=STEPS + 1)
    errors = {"weights": error_of(fresh, expected.state_dict()),
              "moments": moments_error(fresh, new, expected, expected_optimizer)}  # fmt: skip
    assert max(errors.values()) <= EXACT, errors
    rows = next(iter(run.parameters()))
    for value in (rows, optimizer.state[rows]["exp_avg"], model.state_dict(), optimizer.state_dict()):
        assert "pickled" in c.raised(OptionError, lambda: pickle.dumps(value))  # noqa: B023
    return errors


@case
def snapshots_in_memory() -> dict:
    """Weights and states copied, owners moved, training went on, and back: exact."""
    model, run, optimizer, whole, whole_optimizer = trained()
    kept = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    run.reshard(h.MESH and np.roll(run.owners, 1, axis=1))
    train(model, run, optimizer, range(STEPS, STEPS + 2))
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    error = max(error_of(model, whole.state_dict()), moments_error(model, optimizer, whole, whole_optimizer))
    assert error <= EXACT, error
    return {"error": error}


@case
def experts_loaded_in_part() -> dict:
    """Some experts of a list: they are taken, the others stay, and what is missing is said."""
    model, given = h.build("list"), h.build("list")
    shard(model)
    with torch.no_grad():
        for weight in given.parameters():
            weight.add_(1.0)
    expected = copy.deepcopy(h.build("list"))
    part = {name: value for name, value in given.state_dict().items() if ".experts.1." in name or ".experts.5." in name}
    assert part
    expected.load_state_dict(part, strict=False)
    missing = model.load_state_dict(part, strict=False).missing_keys
    assert any(".experts.0." in name for name in missing) and not any(".experts.1." in name for name in missing)
    found = [full_state_dict(model)]
    dist.broadcast_object_list(found, 0)
    error = h.worst(found[0], {name: value for name, value in expected.state_dict().items() if name in found[0]})
    assert error == 0.0
    first = next(iter(part))
    said = c.raised(ModelError, lambda: model.load_state_dict({first: torch.zeros(2)}, strict=False))
    return {"said": said}
