"""Cases about tools that know nothing of sharded experts, put on in another order, over other ranks, or around them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.ranks import folder
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_runs import EXACT, adamw, everyone, mine, shard, train
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from poise.train import (
    export_safetensors,
    full_state_dict,
    load_checkpoint,
    local_rows,
    save_checkpoint,
    update_correction_bias,
)
from poise.train.wrappers import check_meshes
from poise.util.errors import ModelError, OptionError


def whole(model: nn.Module) -> dict[str, Any]:
    """All weights, on every rank."""
    found = [full_state_dict(model)]
    dist.broadcast_object_list(found, 0)
    return found[0] or {}


# ---- state dicts --------------------------------------------------------------------------------------------------


@case
def tensors_of_a_state_dict_are_of_all_experts() -> dict:
    """Or refused: attributes, constructors and lists of them, which PyTorch would answer with this rank's rows."""
    model = h.build()
    shard(model)
    key = "blocks.0.experts.down_proj"
    one, expected = model.state_dict()[key], whole(model)[key]
    assert torch.equal(one.data.full_tensor(), expected) and torch.equal(one.data.detach().full_tensor(), expected)
    assert one.grad is None and one.shape == expected.shape and not one.is_meta

    def copied() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own, for any tensor
            return torch.tensor(one)

    refused: dict[str, Callable[[], Any]] = {
        "T": lambda: one.T, "mT": lambda: one.mT, "real": lambda: one.real, "tensor": copied,
        "stack": lambda: torch.stack([one, one]), "foreach": lambda: torch._foreach_mul([one], 1.0),
        "set": lambda: setattr(one, "data", expected), "flatten": lambda: one.__tensor_flatten__(),
    }  # fmt: skip
    return {name: c.raised(OptionError, action).splitlines()[0] for name, action in refused.items()}


@case
def consolidated_safetensors_have_all_experts() -> dict:
    """PyTorch's writer of safetensors keeps one chunk a tensor and rank: right with one, refused with several."""
    from safetensors.torch import load_file

    world, errors = dist.get_world_size(), {}
    mixed = np.arange(h.LAYERS * h.EXPERTS).reshape(h.LAYERS, -1) % world
    with folder() as place:
        for name, owners in (("blocks", None), ("mixed", mixed)):
            model = h.build()
            shard(model, owners=owners)
            writer = HuggingFaceStorageWriter(str(place / name), save_distributed=True, enable_consolidation=True)
            if owners is not None:
                try:
                    dcp.save(model.state_dict(), storage_writer=writer)
                except dcp.CheckpointException as error:
                    kinds = {type(cause) for cause, _ in error.failures.values()}
                    assert kinds == {OptionError}, kinds
                    errors[name] = 0.0
                continue
            dcp.save(model.state_dict(), storage_writer=writer)
            dist.barrier()
            (file,) = [file for file in os.listdir(place / name) if file.endswith(".safetensors")]
            expected = dict(h.build().state_dict())
            errors[name] = h.worst(load_file(place / name / file), expected)
            fresh = h.build()
            with torch.no_grad():
                for weight in fresh.parameters():
                    weight.zero_()
            shard(fresh, owners=mixed)
            state = fresh.state_dict()
            dcp.load(state, storage_reader=HuggingFaceStorageReader(str(place / name)))
            fresh.load_state_dict(state)
            errors["read"] = h.worst(whole(fresh), expected)
        dcp.save(model.state_dict(), checkpoint_id=str(place / "chunks"))  # several chunks a rank are fine elsewhere
        again = h.build()
        shard(again)
        state = again.state_dict()
        dcp.load(state, checkpoint_id=str(place / "chunks"))
    assert errors == {"blocks": 0.0, "read": 0.0, "mixed": 0.0}, errors
    return errors


class Extra(nn.Module):
    """State that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        self.got = state


def wrapped_blocks(model: nn.Module) -> nn.Module:
    for number, block in enumerate(model.blocks):
        model.blocks[number] = checkpoint_wrapper(block)
    return model


def wrapped_experts(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.experts = checkpoint_wrapper(block.experts)
    return model


def data_parallel_head(model: nn.Module) -> nn.Module:
    model.head = DistributedDataParallel(model.head)
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="eager")
    return model


@case
def exports_of_wrapped_models() -> dict:
    """Wrappers around a model, its blocks or experts, and state that is no tensor: all weights, by their own names."""
    from safetensors.torch import load_file

    expected, errors = dict(h.build().state_dict()), {}
    wraps: dict[str, Callable[[nn.Module], Any]] = {
        "data parallel head": data_parallel_head, "data parallel": DistributedDataParallel, "compiled": lambda m: torch.compile(m, backend="eager"),
        "compiled blocks": compiled_blocks, "checkpointed blocks": wrapped_blocks,
        "checkpointed experts": wrapped_experts,
    }  # fmt: skip
    with folder() as place:
        for name, wrap in wraps.items():
            model = h.build()
            shard(model)
            around = wrap(model)
            assert set(whole(around)) == set(around.state_dict())
            around.load_state_dict(whole(around))
            there = export_safetensors(around, place / name.replace(" ", "-"))
            dist.barrier()
            found = load_file(there / "model.safetensors")
            assert set(found) == set(expected), (name, set(found) ^ set(expected))
            errors[name] = h.worst(found, expected)
        assert any(isinstance(module, CheckpointWrapper) for module in model.modules())
        model = h.build()
        model.extra = Extra()
        shard(model)
        assert whole(model)["extra._extra_state"] == {"seen": 3}
        model.load_state_dict(whole(model))
        optimizer = adamw(model.parameters())
        save_checkpoint(place / "extra", model, optimizer, step=1)
        assert load_checkpoint(place / "extra", model, optimizer) == 1
    assert c.agreed(max(errors.values())) == 0.0, errors
    return errors


# ---- what averages the dense rest ---------------------------------------------------------------------------------


@case
def wrapped_before_experts_are_sharded() -> dict:
    """``DistributedDataParallel`` would wait for weights that are gone, and average nothing meanwhile."""
    around = DistributedDataParallel(h.build())
    said = [c.raised(ModelError, lambda: shard(around))]
    shard(around.module)
    data = mine()
    said.append(c.raised(ModelError, lambda: around(data.x, data.ids)))
    assert all("wrap the model after" in one for one in said), said
    around = DistributedDataParallel(Parent(h.build()))
    shard(around.module.model)
    around.module.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    assert "that its model has no more" in c.raised(ModelError, lambda: around(data.x, data.ids))
    errors = {}
    for kind in ("find_unused_parameters", "static_graph"):  # these do not wait
        model, expected = h.build(), h.build()
        around = DistributedDataParallel(model, **{kind: True})
        run = shard(model)
        for step in range(3):  # a static graph is looked at in the first
            for one, batch in ((around, mine(step)), (expected, everyone(step))):
                one.zero_grad()
                one(batch.x, batch.ids).sum().backward()
            errors[f"{kind}, {step}"] = c.agreed(h.worst(
                {"head": model.head.weight.grad * dist.get_world_size()}, {"head": expected.head.weight.grad}
            ))  # fmt: skip
        assert run.metrics
    error = max(errors.values())
    assert error <= EXACT, errors
    return {"error": error, "said": [one.splitlines()[0] for one in said]}


class Parent(nn.Module):
    """A model as a part of another."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones((), dtype=torch.float64).view(1))

    def forward(self, *given: Any) -> Tensor:
        return self.model(*given) * self.scale


def states_of_older_releases(sharded: nn.Module, layers: Any) -> list[str]:
    """FSDP2 has had one group a module, and may have none that is known: the first is looked at, the other let be."""
    (group,) = sharded._get_fsdp_state()._fsdp_param_groups
    mesh_info = SimpleNamespace(mesh=group.mesh_info.mesh)  # dp_mesh_dims is new
    one = SimpleNamespace(_fsdp_param_group=SimpleNamespace(fsdp_params=group.fsdp_params, mesh_info=mesh_info))
    said = []
    for state, refused in ((one, True), (SimpleNamespace(_fsdp_param_group=None), False), (SimpleNamespace(), False),
                           (SimpleNamespace(_fsdp_param_groups=[SimpleNamespace()]), False)):  # fmt: skip
        with mock.patch.object(type(sharded), "_get_fsdp_state", lambda self, state=state: state):
            if refused:
                said.append(c.raised(ModelError, lambda: check_meshes(sharded, layers)))
            else:
                check_meshes(sharded, layers)
    return said


@case
def averaged_over_more_ranks_than_experts() -> dict:
    """Experts over pairs of ranks, the dense rest over all four: experts of the pairs would drift apart."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    data, said = mine(), []
    for around in ("ddp", "fully_shard", "flat"):
        model = h.build()
        shard(model, mesh=mesh["shard"])
        called: Any = model
        if around == "ddp":
            called = DistributedDataParallel(model)
        else:
            fully_shard(model, mesh=mesh if around == "fully_shard" else h.MESH(4))
        said.append(c.raised(ModelError, lambda: called(data.x, data.ids)))  # noqa: B023
        assert "over 4 ranks, and experts are sharded over 2" in said[-1], said

    for when in ("a parent", "after a pass", "a parent after a pass"):
        model = h.build()
        shard(model, mesh=mesh["shard"])
        called = Parent(model)
        if "after" in when:
            called(data.x, data.ids).sum().backward()
        fully_shard(called if "parent" in when else model, mesh=h.MESH(4))
        said.append(c.raised(ModelError, lambda: called(data.x, data.ids)))  # noqa: B023
        assert "over 4 ranks, and experts are sharded over 2" in said[-1], (when, said)
    model, other = h.build(), h.build().head
    run = shard(model, mesh=mesh["shard"])
    fully_shard(other, mesh=h.MESH(4))  # none of the model's weights
    model(data.x, data.ids).sum().backward()
    said += states_of_older_releases(other, run.schedule.layers)
    around = DistributedDataParallel(model, process_group=mesh["shard"].get_group())
    around(data.x, data.ids).sum().backward()
    return {"said": [one.splitlines()[0] for one in said]}


# ---- what runs the model ------------------------------------------------------------------------------------------


@case
def transformed_by_functions() -> dict:
    """``torch.func``, forward mode and traces are refused on all ranks before anything is sent; then it goes on."""
    model, dense, data = h.build(), h.build(), mine()
    shard(model)

    def out(x: Tensor) -> Tensor:
        return model(x, data.ids)

    def forward_mode() -> None:
        with torch.autograd.forward_ad.dual_level():
            out(torch.autograd.forward_ad.make_dual(data.x, data.x))

    ways: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(lambda x: out(x).sum())(data.x),
        "vmap": lambda: torch.func.vmap(out)(data.x[None]), "forward mode": forward_mode,
        "trace": lambda: torch.jit.trace(model, (data.x, data.ids)),
    }  # fmt: skip
    said = {name: c.raised(ModelError, way).splitlines()[0] for name, way in ways.items()}
    assert all(one.startswith("sharded experts cannot be run by") for one in said.values()), said
    found, expected = out(data.x).detach(), dense(data.x, data.ids).detach()
    error = c.agreed(float((found - expected).abs().max()) if len(found) else 0.0)
    assert error <= EXACT, error
    return {"error": error, **said}


@case
def weights_without_numbers() -> dict:
    """On the meta device, or ``to_empty`` and what initialises modules, which experts are none of: refused."""

    class Filling(nn.Linear):
        filled = False

        def reset_parameters(self) -> None:
            if not self.weight.is_meta:
                super().reset_parameters()

    with torch.device("meta"):
        model = h.build()
        model.head = Filling(h.WIDTH, model.head.out_features).double()
    run, data = shard(model), mine()
    said = [c.raised(ModelError, lambda: model(data.x, data.ids))]
    model.to_empty(device="cpu")
    model.head.reset_parameters()
    said.append(c.raised(ModelError, lambda: model(data.x, data.ids)))
    assert all("has no numbers" in one for one in said), said
    first = next(weight for weight in model.parameters() if any(weight is one for one in run.parameters()))
    with torch.no_grad():
        for weight in model.parameters():
            weight.data.normal_(std=0.1)  # whatever fills them
        local_rows(first)[:1] = torch.nan  # all but one expert
    said.append(c.raised(ModelError, lambda: model(data.x, data.ids)))
    assert "has no numbers for 1 of the" in said[-1], said
    with torch.no_grad():
        local_rows(first).normal_(std=0.1)
    h.loss_of(model, data).backward()
    assert all(weight.grad.isfinite().all() for weight in run.parameters())
    model.load_state_dict(h.build().state_dict())
    found, expected = model(data.x, data.ids).detach(), h.build()(data.x, data.ids).detach()
    error = c.agreed(float((found - expected).abs().max()) if len(found) else 0.0)
    assert error <= EXACT, error
    return {"error": error, "said": [one.splitlines()[0] for one in said]}


# ---- loops and optimizers of one's own ----------------------------------------------------------------------------


@case
def loads_of_iterations_by_hand() -> dict:
    """Gradients made zeros by hand, or after a step that was left out: the bias moves by one iteration's loads."""
    rate, wrong = 1e-3, {}
    for how in ("zero_", "zero_grad", "none"):
        model = h.build(dtype=torch.float32)
        for block in model.blocks:
            block.register_buffer("e_score_correction_bias", torch.zeros(h.EXPERTS))
        shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        bad = 0
        for step in range(3):
            data = mine(step, dtype=torch.float32)
            h.loss_of(model, data).backward()
            load_E = torch.bincount(data.ids[0].flatten(), minlength=h.EXPERTS).float()
            dist.all_reduce(load_E)
            before = model.blocks[0].e_score_correction_bias.clone()
            update_correction_bias(model, rate)
            moved = (model.blocks[0].e_score_correction_bias - before).sign()
            bad += int((moved != torch.sign(load_E.mean() - load_E)).sum())
            if how == "zero_grad":
                optimizer.zero_grad(set_to_none=False)
            for weight in model.parameters() if how != "zero_grad" else ():
                if weight.grad is None:
                    continue
                weight.data.sub_(weight.grad, alpha=0.01)
                if how == "zero_":
                    weight.grad.zero_()
                else:
                    weight.grad = None
        wrong[how] = bad
    assert not any(wrong.values()), wrong
    return wrong


@case
def axes_of_a_list_of_experts() -> dict:
    """``dim()`` is one expert's and ``shape`` the rows': axes from the last are exact, from the first are refused."""
    model, dense = h.build("list"), h.build("list")
    run = shard(model)
    run.set_gradient_divide_factor(1.0)
    h.loss_of(model, mine()).backward()
    h.loss_of(dense, everyone()).backward()
    experts, error = model.blocks[0].experts, 0.0
    weight = next(one for one in experts.parameters() if one.dim() == 2)
    grad, wanted = weight.grad, [dense.blocks[0].experts[e][0].weight.grad for e in experts.mine]
    ways: list[tuple[Callable[[Tensor, int], Tensor], ...]] = [
        (lambda g, dim: g.mean(dim=dim, keepdim=True),), (lambda g, dim: g.norm(2, dim=dim, keepdim=True),),
        (lambda g, dim: g.softmax(dim=dim),), (lambda g, dim: torch.cumsum(g, dim),),
        (lambda g, dim: torch.linalg.vector_norm(g, dim=(dim,), keepdim=True),), (lambda g, dim: g.amax(dim),),
    ]  # fmt: skip
    for (way,) in ways:
        found = way(grad, -1)
        for row, one in enumerate(wanted):
            if one is not None:
                error = max(error, float((found[row] - way(one, -1)).abs().max()))
        said = c.raised(OptionError, lambda: way(grad, 1))  # noqa: B023
        assert "counted from the first" in said, said

    class Scaled(torch.optim.SGD):
        """Scales by the largest number of a weight's gradient: of one expert in the dense model."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for one in group["params"]:
                    one.grad.div_(one.grad.abs().max())
            return super().step(closure)

    said = c.raised(OptionError, lambda: Scaled(run.parameters(), 0.1).step())
    assert "are one weight here" in said, said
    assert c.agreed(error) <= EXACT, error
    return {"error": c.agreed(error), "said": said.splitlines()[0]}


@case
def adafactor_of_hugging_face() -> dict:
    """Factors with an axis less than their weight, which ``to`` follows in type alone: exact on stacked experts."""
    from transformers.optimization import Adafactor

    model, dense = h.build(), h.build()
    run = shard(model)
    optimizers = [Adafactor(one.parameters(), lr=0.02, scale_parameter=True, relative_step=False, warmup_init=False)
                  for one in (model, dense)]  # fmt: skip
    train(model, run, optimizers[0], range(3))
    for step in range(3):
        optimizers[1].zero_grad()
        h.loss_of(dense, everyone(step)).backward()
        optimizers[1].step()
    error = c.agreed(h.worst(whole(model), dict(dense.state_dict())))
    assert error <= EXACT, error
    said = c.raised(OptionError, lambda: save_checkpoint(Path("never"), model, optimizers[0]))
    return {"error": error, "said": said.splitlines()[0]}
