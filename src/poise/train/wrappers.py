"""What averages the dense rest: refused where it would make experts wrong, or leave them out.

``DistributedDataParallel`` around a parent of the model would make all ranks' experts equal; put on before experts were
sharded, it waits for weights that are gone, and averages nothing; and where it or FSDP2 averages over ranks among which
experts are not summed, these drift apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _composable_state
from torch.distributed.fsdp import FSDPModule

from poise.train.owned import OwnedExperts
from poise.util.errors import ModelError


def wrapped_well(layers: Sequence[OwnedExperts]) -> bool:
    """Whether ``DistributedDataParallel`` runs this forward pass and leaves the experts alone; False: it does not run.

    Raises
    ------
    ModelError : it manages sharded experts.
    """
    active = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if active is None:
        return False
    managed = {id(weight) for weight in active._module_parameters}
    if any(id(weight) in managed for experts in layers for weight in experts.parameters()):
        raise ModelError(
            "DistributedDataParallel manages sharded experts, and has overwritten them",
            hint="wrap the very model that was given to fully_shard_experts, or use fully_shard",
        )
    check_not_stale(active)
    if layers:
        check_ranks("DistributedDataParallel", dist.get_process_group_ranks(active.process_group), layers)
    return True


def check_plain_call() -> None:
    """Refuse transformations of functions: what ranks exchange has none.

    Raises
    ------
    ModelError : ``torch.func``, forward-mode derivatives or ``torch.jit.trace`` run the model.
    """
    by = (
        "torch.func" if torch._C._functorch.peek_interpreter_stack() is not None
        else "forward-mode differentiation" if torch.autograd.forward_ad._current_level >= 0
        else "torch.jit.trace" if torch._C._get_tracing_state() is not None
        else ""
    )  # fmt: skip
    if by:
        raise ModelError(
            f"sharded experts cannot be run by {by}", hint="call the model, and backward() or torch.autograd.grad"
        )


def check_not_stale(wrapper: Any) -> None:
    """Refuse ``DistributedDataParallel`` that waits for gradients of weights that its model has no more.

    Raises
    ------
    ModelError : it does; with ``find_unused_parameters=True`` or ``static_graph=True`` it would not wait.
    """
    here = {id(weight) for weight in wrapper.module.parameters()}
    gone = sum(id(weight) not in here for weight in wrapper._module_parameters)
    if gone and not _copes(wrapper):
        raise ModelError(
            f"DistributedDataParallel waits for {gone} weights that its model has no more",
            hint="wrap the model after fully_shard_experts, and after whatever else replaces weights",
        )


def _copes(wrapper: Any) -> bool:
    """Whether weights may get no gradient in a pass: it looks which, in every pass or in the first one for all."""
    return bool(wrapper.find_unused_parameters or wrapper.static_graph)


def check_ranks(who: str, ranks: Iterable[int], layers: Sequence[OwnedExperts]) -> None:
    """Refuse to average the dense rest over ranks that have experts of their own.

    Raises
    ------
    ModelError : experts are sharded over some of them only.
    """
    over, wanted = set(dist.get_process_group_ranks(layers[0].ownership.group)), set(ranks)
    if not wanted <= over:
        raise ModelError(
            f"{who} averages the dense rest over {len(wanted)} ranks, and experts are sharded over {len(over)}, of "
            f"which {len(wanted & over)} are among them: those of other ranks would drift apart",
            hint="give fully_shard_experts the mesh of all ranks with batches of their own; with two dimensions, too",
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_meshes(model: nn.Module, layers: Sequence[OwnedExperts], seen: tuple[int, ...] = ()) -> tuple[int, ...]:
    """As :func:`check_ranks`, of what FSDP2 does with weights of a model: in modules in it, and in those it is part of.

    It costs a walk through the model where there are other FSDP2 modules than those ``seen`` by the last call, whose
    result they are. Called by the model's own hook: a forward pass through parts of the model alone is not looked at.
    """
    sharded = _fsdp_modules(model)
    found = tuple(id(module) for module in sharded)
    if found == seen:
        return seen
    inside = {id(module) for module in model.modules()}
    for module in sharded:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # PyTorch has had one group a module, and has several
        for group in [getattr(state, "_fsdp_param_group", None)] if groups is None else groups:
            weights = getattr(group, "fsdp_params", ())
            if not any(id(getattr(_info(weight), "module", None)) in inside for weight in weights):
                continue
            ranks = _ranks_of(group)
            if ranks is not None:
                check_ranks("fully_shard", ranks, layers)
    return found


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """All of this process, or, with a PyTorch that keeps no list of them, those in a model."""
    known = getattr(_composable_state, "_module_state_mapping", None)
    return [module for module in (model.modules() if known is None else list(known)) if isinstance(module, FSDPModule)]


def _info(weight: Any) -> Any:
    return getattr(weight, "_module_info", None)


def _ranks_of(group: Any) -> list[int] | None:
    """Over which FSDP2 averages; None: a PyTorch that does not tell, or a mesh that has other dimensions beside."""
    info = getattr(group, "mesh_info", None)
    mesh = getattr(info, "mesh", None)
    if mesh is None or getattr(info, "dp_mesh_dims", None) is not None:
        return None
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def check_unwrapped(model: nn.Module, experts: Iterable[nn.Module]) -> None:
    """Refuse a model in which ``DistributedDataParallel`` would wait for the weights that are about to be replaced.

    Raises
    ------
    ModelError : it holds some of them.
    """
    replaced = {id(weight) for one in experts for weight in one.parameters()}
    for module in model.modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel) and not _copes(module):
            held = sum(id(weight) in replaced for weight in module._module_parameters)
            if held:
                raise ModelError(
                    f"DistributedDataParallel holds {held} weights of experts, and would wait for them",
                    hint="wrap the model after fully_shard_experts",
                )
