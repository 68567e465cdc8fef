"""State, clipping, averages and hooks by PyTorch's own tools, which know nothing of sharded experts."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_cases import EXACT, fsdp, shard
from tests.train.support_memory import folder
from tests.train.support_models import case
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from poise.train import full_optimizer_state_dict, full_state_dict, load_checkpoint, parameter_groups, save_checkpoint
from poise.train.sharding import ShardedExperts
from poise.util.errors import ModelError, OptionError

STEPS = 3
Change = Callable[[nn.Module, Any, int], None]


def dense(kind: str = "gated", make: Any = None, before_step: Any = None, after: Any = None, steps: int = STEPS) -> Any:
    """Model and optimizer of a dense run on all tokens; callables see (model, step)."""
    world, model = dist.get_world_size(), h.build(kind)
    optimizer = (make or adamw)(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        h.loss_of(model, h.batch("hot-expert-a-rank", step, world, 2, None, torch.float64)).backward()
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if before_step is not None:
            before_step(model, step)
        optimizer.step()
        if after is not None:
            after(model, step)
    return model, optimizer


def adamw(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.02, weight_decay=0.1)


def train(model: nn.Module, run: Any, optimizer: Any, steps: Any, before_step: Any = None, after: Any = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        c.plain_loss("hot-expert-a-rank")(model, step).backward()
        if not isinstance(next(iter(model.parameters())), c.DTensor):
            c.average_dense(model, run)
        if before_step is not None:
            before_step(model, step)
        optimizer.step()
        if after is not None:
            after(model, step)


def error_of(model: nn.Module, expected: dict[str, Tensor]) -> float:
    """Of all weights against the dense ones, [E, ...]."""
    return c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, expected)))


def turned(run: Any) -> np.ndarray:
    """Other owners for every layer: one expert more here, one less there."""
    owners = run.owners.copy()
    owners[:, 0], owners[:, -1] = owners[:, -1].copy(), owners[:, 0].copy()
    owners[:, 1] = (owners[:, 1] + 1) % dist.get_world_size()
    return owners


def plain_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


# ---- clipping -----------------------------------------------------------------------------------------------------


@case
def stock_clip_grad_norm() -> dict:
    """``torch.nn.utils.clip_grad_norm_`` under FSDP2 and beside replicated weights, in all of its forms."""
    worst, world = 0.0, dist.get_world_size()
    for wrap in (True, False):
        whole, model = h.build(), h.build()
        h.loss_of(whole, h.batch("hot-expert-a-rank", 0, world, 2, None, torch.float64)).backward()
        run = shard(model)
        if wrap:
            fsdp(model, h.MESH(world))
        c.plain_loss("hot-expert-a-rank")(model, 0).backward()
        if not wrap:
            c.average_dense(model, run)
        kept = [(w.grad, w.grad.clone()) for one in (whole, model) for w in one.parameters() if w.grad is not None]
        for p, foreach in (  # of an empty DTensor, which a small weight leaves some ranks, PyTorch has no infinity norm
            (2.0, None),
            (2.0, False),
            (2.0, True),
            (1.0, None),
            (3.0, True),
            *(() if wrap else ((float("inf"), None),)),
        ):
            for grad, before in kept:
                grad.copy_(before)
            expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.01, norm_type=p)
            norm = c.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=p, foreach=foreach))
            clipped = h.local_rows(model, {name: w.grad for name, w in whole.named_parameters()})
            worst = max(worst, abs(norm.item() / expected.item() - 1), h.worst(c.of_all(model), clipped))
    assert c.agreed(worst) <= EXACT, worst
    said = c.raised(OptionError, lambda: [dist.all_reduce(weight.grad) for weight in model.parameters()])
    return {"error": worst, "averaged by hand": said}


@case
def norms_and_sums_are_of_all_experts() -> dict:
    """Reductions, their gradients, and what is refused: an axis of which a rank has a part."""
    whole, model = h.build(), h.build()
    shard(model)
    name = next(name for name, _ in model.named_parameters() if name.endswith("down_proj"))
    all_rows, rows = whole.get_parameter(name), model.get_parameter(name)
    reductions: dict[str, Callable[[Tensor], Tensor]] = {
        "norm": lambda w: w.norm(), "one": lambda w: torch.norm(w, 1), "inf": lambda w: torch.linalg.vector_norm(w, np.inf),
        "three": lambda w: w.norm(p=3), "sum": lambda w: (w * 2).sum(), "square": lambda w: w.square().mean(), "max": lambda w: w.max(),
        "least": lambda w: w.abs().amin(), "any": lambda w: (w > w.detach().max() * 0.99).any(),
        "all": lambda w: (w < 0.3).all(), "rows": lambda w: w.sum(dim=(1, 2)).sum() if w is all_rows else w.sum(),
    }  # fmt: skip
    for label, reduce in reductions.items():
        torch.testing.assert_close(reduce(rows), reduce(all_rows), rtol=1e-12, atol=0, msg=label)
    assert rows.numel() == all_rows.numel()
    (rows.norm() + rows.square().sum() + rows.max()).backward()
    (all_rows.norm() + all_rows.square().sum() + all_rows.max()).backward()
    error = c.agreed(h.worst(c.of_all(model), h.local_rows(model, {
        n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in whole.named_parameters()})))  # fmt: skip
    assert error <= EXACT
    for part in (
        lambda: rows.sum(dim=0),
        lambda: rows.mean(axis=0),
        lambda: rows.norm(dim=(0, 1)),
        lambda: rows.amax(-3),
    ):
        said = c.raised(OptionError, part)
        assert "axis of experts" in said
    torch.testing.assert_close(
        c.whole(rows.norm(dim=(1, 2))), h.local_rows(model, dict(whole.named_parameters()))[name].norm(dim=(1, 2))
    )
    return {"error": error}


@case
def grad_scaler_of_stock() -> dict:
    """One rank's experts overflow: every rank skips the step."""
    model = h.build()
    run = shard(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    scaler.scale(c.plain_loss("hot-expert-a-rank")(model, 0)).backward()
    c.average_dense(model, run)
    if dist.get_rank() == 1:
        next(iter(run.parameters())).grad.view(-1)[:1] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    return {}


@case
def optimizers_that_scale_by_norms() -> dict:
    """Adafactor (stacked weights) and LAMB's trust ratio, which are wrong by a rank's own norm."""

    class Lamb(torch.optim.Optimizer):
        def __init__(self, weights: Any) -> None:
            super().__init__(weights, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:
            with torch.no_grad():
                for group in self.param_groups:
                    for weight in group["params"]:
                        weight.sub_(weight.grad * (group["lr"] * weight.norm() / weight.grad.norm()))

    errors = {}
    for kind in (Lamb, torch.optim.Adafactor):
        expected, _ = dense(make=kind)
        model = h.build()
        run = shard(model)
        train(model, run, kind(model.parameters()), range(STEPS))
        errors[kind.__name__] = error_of(model, dict(expected.named_parameters()))
    assert max(errors.values()) <= EXACT, errors
    return errors


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
    dense(after=average(shadows), steps=2 * STEPS)
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
    dense(after=lambda model, _: dense_average.update_parameters(model), steps=2 * STEPS)
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


def trained(kind: str = "gated", wrap: bool = True) -> Any:
    """A model whose owners have moved, its run and its optimizer; and the dense ones."""
    whole, whole_optimizer = dense(kind)
    model = h.build(kind)
    run = shard(model)
    if wrap:
        fsdp(model, h.MESH(dist.get_world_size()))
    optimizer = adamw(parameter_groups(model))
    train(model, run, optimizer, range(1))
    run.reshard(turned(run))
    train(model, run, optimizer, range(1, STEPS))
    return model, run, optimizer, whole, whole_optimizer


def moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    return {name: optimizer.state[weight]["exp_avg"] for name, weight in model.named_parameters()}


def moments_error(model: nn.Module, optimizer: Any, whole: nn.Module, whole_optimizer: Any) -> float:
    mine = {name: c.whole(value) for name, value in moments(model, optimizer).items()}
    return c.agreed(h.worst(mine, h.local_rows(model, moments(whole, whole_optimizer))))


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
    expected, expected_optimizer = dense(steps=STEPS + 1)
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


@case
def resumed_while_frozen_or_amid_accumulation() -> dict:
    """Moments are loaded though experts are frozen, and though gradients are there."""
    whole, whole_optimizer = dense()
    model = h.build()
    run, optimizer = shard(model), adamw(parameter_groups(model))
    train(model, run, optimizer, range(STEPS))
    errors = {}
    with folder() as place:
        save_checkpoint(place, model, optimizer, step=3)
        for how in ("frozen", "with gradients"):
            fresh = h.build()
            other, new = shard(fresh, policy="poise"), adamw(parameter_groups(fresh))
            if how == "frozen":
                for weight in other.parameters():
                    weight.requires_grad_(False)
            else:
                c.plain_loss("hot-expert-a-rank")(fresh, 0).backward()
            assert load_checkpoint(place, fresh, new) == 3
            assert all(weight.requires_grad == (how != "frozen") for weight in other.parameters())
            assert how == "frozen" or all(weight.grad is not None for weight in other.parameters())
            errors[how] = moments_error(fresh, new, whole, whole_optimizer)
    assert max(errors.values()) <= EXACT, errors
    return errors


# ---- hooks and groups ---------------------------------------------------------------------------------------------


@case
def gradient_hooks_on_experts() -> dict:
    """A mask of all experts, registered before sharding or after: only the kept ones are trained."""
    keep = [0, 5]

    def arm(model: nn.Module) -> None:
        for name, weight in model.named_parameters():
            if ".experts." in name:
                mask = torch.zeros(10, *[1] * (weight.dim() - 1), dtype=weight.dtype)
                mask[keep] = 1.0
                weight.register_hook(lambda grad, mask=mask: grad * mask)

    whole = h.build()
    arm(whole)
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        h.loss_of(whole, h.batch("hot-expert-a-rank", step, dist.get_world_size(), 2, None, torch.float64)).backward()
        optimizer.step()
    errors = {}
    for when in ("before", "after"):
        model = h.build()
        if when == "before":
            arm(model)
        run = shard(model)
        if when == "after":
            arm(model)
        train(model, run, torch.optim.SGD(model.parameters(), 0.1), range(STEPS))
        errors[when] = error_of(model, dict(whole.named_parameters()))
    model.zero_grad()
    c.plain_loss("hot-expert-a-rank")(model, 0).backward()
    said = c.raised(ModelError, lambda: c.plain_loss("hot-expert-a-rank")(model, 0).backward())
    listed = h.build("list")
    next(w for name, w in listed.named_parameters() if ".experts.1." in name).register_hook(lambda grad: grad)
    assert "after fully_shard_experts" in c.raised(ModelError, lambda: shard(listed))
    assert max(errors.values()) <= EXACT, errors
    return {**errors, "said": said}


@case
def groups_by_dimensions() -> dict:
    """Weight decay for what has two dimensions or more: biases of a list of experts have one, as in the dense model."""

    def groups(weights: Any) -> torch.optim.Optimizer:
        every = list(weights)
        return torch.optim.AdamW([{"params": [w for w in every if w.dim() >= 2], "weight_decay": 0.5},
                                  {"params": [w for w in every if w.ndim < 2], "weight_decay": 0.0}], lr=0.02)  # fmt: skip

    expected, _ = dense("list", groups)
    model = h.build("list")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = shard(model)
    assert [str(one.message).partition(":")[0] for one in said] == ["experts of a list"]
    train(model, run, groups(model.parameters()), range(STEPS))
    found = [full_state_dict(model)]
    dist.broadcast_object_list(found, 0)
    error = h.worst(found[0], dict(expected.state_dict()))
    assert error <= EXACT, error
    return {"error": error}
