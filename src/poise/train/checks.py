"""What :func:`poise.train.api.fully_shard_experts` looks at before it changes anything."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from poise.machine.cluster import Cluster
from poise.runtime.experts import ExpertKind, recognise_all
from poise.stepwise.protocol import StepPolicy
from poise.stepwise.registry import as_policy
from poise.stepwise.sharding import Balanced, Even, Heterogeneous, ShardingPolicy, even_sharding
from poise.train.agree import agree
from poise.train.dispatched import SEAM, lies_behind_dispatcher
from poise.train.machine import device_name, presumed, unknown
from poise.train.packing import GATHER_DTYPES
from poise.train.settings import TrainingFlow
from poise.train.sharding import ShardedExperts
from poise.train.wrappers import check_unwrapped
from poise.util.errors import ModelError, OptionError

SHARDINGS: dict[str, ShardingPolicy] = {
    "even": Even(), "heterogeneous": Heterogeneous(by_price=True), "balanced": Balanced()
}  # fmt: skip
"""By name, none moves owners that the price does not let move; published: ``Heterogeneous()``."""
FLOWS = get_args(TrainingFlow)
LOOKED_AT = "step_slots", "replica_bytes", "prefetch", "window", "rematerialise", "accumulate_bytes", "traffic"
"""Options that :func:`_check` looks at."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A model and options that fit each other, the same on all ranks.

    Parameters
    ----------
    found, again : experts by name, and the other names of each.
    kinds, trained : what an expert computes, and the names of its trained weights, by name of the experts.
    policy, sharding, machine : of the options, as objects.
    guessed : the devices, where the machine's rates are of none of them (:func:`poise.train.machine.unknown`); else "".
    owner_LE : int64 [L, E], first owners.
    top_k : experts a token, as far as the router says.
    """

    found: dict[str, nn.Module]
    again: dict[str, list[str]]
    kinds: dict[str, ExpertKind]
    trained: dict[str, list[str]]
    policy: StepPolicy
    sharding: ShardingPolicy | None
    machine: Cluster
    guessed: str
    owner_LE: NDArray[np.int64]
    top_k: int


def flattened(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh in one dimension. Collective for two, so it comes before all that may fail on one rank.

    Raises
    ------
    OptionError : more than two dimensions, or this rank is not in it: this error comes on such ranks alone.
    """
    if mesh.ndim > 2:
        raise OptionError(f"the mesh has {mesh.ndim} dimensions", hint="1, or 2: node and device in the node")
    if mesh.get_coordinate() is None:
        raise OptionError("this rank is not in the mesh")
    return mesh if mesh.ndim == 1 else mesh._flatten()


def ready(model: nn.Module, mesh: DeviceMesh, group: Any, given: dict[str, Any]) -> Ready:
    """Check a model and the options given for it on every rank; either all of them go on, or none. Collective.

    Raises
    ------
    PoiseError : on every rank, what is wrong on one of them, or what differs between two; the model is as it was.
    """
    size = dist.get_world_size(group)
    devices = [""] * size
    dist.all_gather_object(devices, device_name(mesh), group=group)

    def check() -> tuple[Ready, dict[str, Any]]:
        _check(**{key: given[key] for key in LOOKED_AT})
        policy = as_policy(given["policy"])
        machine = given["cluster"] or presumed(mesh, dist.get_process_group_ranks(group), devices)
        if machine.num_devices != size:
            raise OptionError(f"the cluster has {machine.num_devices} devices, the mesh {size} ranks")
        sharding = given["sharding"]
        if isinstance(sharding, str) and sharding not in SHARDINGS:
            raise OptionError(f"unknown sharding {sharding!r}", hint=f"one of {', '.join(SHARDINGS)}")
        sharding = SHARDINGS[sharding] if isinstance(sharding, str) else sharding
        found, again = _find(model)
        check_unwrapped(model, found.values())
        kinds, experts = _alike(model, found)
        shape = (len(found), experts)
        owners = given["owners"]
        owner_LE = even_sharding(*shape, size) if owners is None else np.asarray(owners, np.int64)
        if owner_LE.shape != shape or owner_LE.min() < 0 or owner_LE.max() >= size:
            raise OptionError(f"owners have shape {owner_LE.shape}, not {shape}, or name no rank of {size}")
        trained = {name: _trained(name, module, kinds[name]) for name, module in found.items()}
        _check_gathers(given["gather_dtype"], given["mp_policy"], next(next(iter(found.values())).parameters()).dtype)
        top_k = _top_k(model, next(iter(found)))
        guessed = unknown(devices) if given["cluster"] is None else ""
        out = Ready(found, again, kinds, trained, policy, sharding, machine, guessed, owner_LE, top_k)
        traits = _traits(out)
        return out, traits | {key: value for key, value in given.items() if key not in traits}

    return agree(check, group)


def _traits(one: Ready) -> dict[str, Any]:
    """What must be the same on all ranks, beside the options as they are given."""
    first, kind = next(iter(one.kinds.items()))
    return {
        "layers": ", ".join(one.found), "number of layers": len(one.found), "number of experts": one.owner_LE.shape[1],
        "weights": kind.shapes, "kind": kind.name, "trained weights": one.trained, "policy": one.policy,
        "sharding": one.sharding, "owners": one.owner_LE, "top_k": one.top_k, "cluster": "",
        "type of weights": next(one.found[first].parameters()).dtype,
        **{f"{field.name} of the cluster": getattr(one.machine, field.name) for field in fields(one.machine)},
        **{f"what {name} makes of the same tokens": one.kinds[name].mark for name in one.found},
    }  # fmt: skip


def _alike(model: nn.Module, found: dict[str, nn.Module]) -> tuple[dict[str, ExpertKind], int]:
    """Kinds by name, all of one shape and number of experts E; and E."""
    kinds = recognise_all(found)
    first, kind = next(iter(kinds.items()))
    counts = {name: _count(module) for name, module in found.items()}
    for name, other in kinds.items():
        if other.shapes != kind.shapes or counts[name] != counts[first]:
            raise ModelError(
                f"{name} has {counts[name]} experts of {other.shapes}, {first} {counts[first]} of {kind.shapes}",
                hint="layers of one run must be equal; shard them by separate calls",
            )
        if other.random and found[name].training:
            raise ModelError(
                f"{name} draws random numbers in training (dropout, noise): which ones would depend on who computes it",
                hint="set their probability to 0; a model that is only evaluated: model.eval() before sharding",
            )
        parent = name.rpartition(".")[0]
        for key in ("gate", "router"):
            outputs = _outputs(getattr(model.get_submodule(parent), key, None))
            allowed = {counts[name]} | ({counts[name] + 1} if other.leaves_out else set())  # one more: no expert
            if outputs is not None and not outputs & allowed:
                raise ModelError(f"{parent}.{key} has {max(outputs)} outputs, {name} {counts[name]} experts")
    return kinds, counts[first]


def _outputs(router: Any) -> set[int] | None:
    """How many outputs a router may have: a linear layer's weight has them on its first axis, another's on either."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return {len(weight)} if isinstance(router, nn.Linear) else set(weight.shape)


def _check(
    step_slots: int | None,
    replica_bytes: float | None,
    prefetch: int,
    window: int,
    rematerialise: bool | float,
    accumulate_bytes: float | None,
    traffic: str,
) -> None:
    if traffic not in FLOWS:
        raise OptionError(f"unknown data flow {traffic!r}", hint=f"one of {', '.join(FLOWS)}")
    if step_slots is not None and replica_bytes is not None:
        raise OptionError(f"step_slots {step_slots} and replica_bytes {replica_bytes:g} say the same", hint="give one")
    if accumulate_bytes is not None and not accumulate_bytes >= 0:
        raise OptionError(f"accumulate_bytes must be at least 0, got {accumulate_bytes}", hint="None: no limit")
    budget = 0.0 if isinstance(rematerialise, bool) else rematerialise
    if (step_slots or 0) < 0 or prefetch < 0 or window < 1 or budget < 0:
        raise OptionError(
            f"step_slots {step_slots}, prefetch {prefetch} and rematerialise {rematerialise} must be at least 0, "
            f"window {window} at least 1"
        )


def _check_gathers(gather_dtype: Any, mp_policy: Any, stored: torch.dtype) -> None:
    """Whether weights can be sent in a type: one that is known, of fewer bytes than they are computed with."""
    if gather_dtype is None:
        return
    if gather_dtype not in GATHER_DTYPES:
        known = ", ".join(map(str, GATHER_DTYPES))
        raise OptionError(f"unknown gather_dtype {gather_dtype!r}", hint=f"one of {known}, or None")
    computed = getattr(mp_policy, "param_dtype", None) or stored
    if gather_dtype != computed and gather_dtype.itemsize >= computed.itemsize:
        raise OptionError(
            f"weights are computed with in {computed} ({computed.itemsize} bytes) and would be gathered in "
            f"{gather_dtype} ({gather_dtype.itemsize} bytes)",
            hint="gather_dtype=None gathers them as they are computed with",
        )


def _find(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """Experts by the name under which they come first, and the other names of each (layers that share experts)."""
    found: dict[str, nn.Module] = {}
    again: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ShardedExperts):
            raise ModelError(f"{name} is sharded already")
        named = name.rpartition(".")[2] == "experts" and next(module.parameters(), None) is not None
        if lies_behind_dispatcher(model, name, module) or named:
            if type(module) is nn.ModuleList:
                raise ModelError(
                    f"{name} is a bare ModuleList, which cannot be called",
                    hint="use poise.runtime.moe.ExpertList and call it as experts(tokens, ids, weights)",
                )
            first = next((known for known, other in found.items() if other is module), None)
            if first is None:
                found[name], again[name] = module, []
            else:
                again[first].append(name)
    if not found:
        raise ModelError(f"{type(model).__name__} has no child named experts", hint="is it a Mixture-of-Experts model?")
    if nested := [name for name in found if any(name.startswith(f"{other}.") for other in found)]:
        raise ModelError(f"{nested[0]} lies in other experts", hint="experts of experts are not supported")
    uses: dict[int, str] = {}
    inside = {place for module in found.values() for weight in module.parameters() for place in _places(weight)}
    others = tuple(f"{name}." for names in again.values() for name in names)
    for owner_name, owner in model.named_modules(remove_duplicate=False):
        if f"{owner_name}.".startswith(others):
            continue  # the same experts by another name
        for key, weight in owner._parameters.items():
            name = f"{owner_name}.{key}"
            if weight is None:
                continue
            for place in inside & _places(weight):
                if uses.setdefault(place, name) != name:
                    raise ModelError(f"{name} and {uses[place]} are one parameter", hint="experts cannot share weights")
    return found, again


def _places(weight: Tensor) -> set[int]:
    """What tells a parameter from others: itself, and where it begins in memory."""
    plain = type(weight) is nn.Parameter and weight.numel() and not weight.is_meta
    return {id(weight), -weight.data_ptr()} - {0} if plain else {id(weight)}


def _trained(name: str, module: nn.Module, kind: ExpertKind) -> list[str]:
    """Names of the weights that are trained; those of a list must agree, and all must have one type."""
    lists = list(module) if isinstance(module, nn.ModuleList) else [module]
    flags = [tuple(dict(one.named_parameters())[key].requires_grad for key in kind.shapes) for one in lists]
    if len(set(flags)) > 1:
        odd = next(number for number, flag in enumerate(flags) if flag != flags[0])
        raise ModelError(f"expert {odd} of {name} is trained otherwise than expert 0", hint="set requires_grad for all")
    types = {weight.dtype for weight in module.parameters()}
    if len(types) > 1:
        raise ModelError(f"weights of {name} have types {', '.join(sorted(map(str, types)))}", hint="use one type")
    return [key for key, flag in zip(kind.shapes, flags[0], strict=True) if flag]


def _count(module: nn.Module) -> int:
    return len(module) if isinstance(module, nn.ModuleList) else len(next(module.parameters(recurse=False)))


def _top_k(model: nn.Module, experts: str) -> int:
    parent = model.get_submodule(experts.rpartition(".")[0])
    for owner in (parent, *(getattr(parent, key, None) for key in ("gate", "router", SEAM))):
        for name in ("top_k", "num_experts_per_tok"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return 1
