"""Checkpoints keyed by logical expert: saved at one world size and sharding, loaded at any other, or without poise.

In ``torch.distributed.checkpoint`` an expert weight is one tensor [E, ...] under the name it has in the unsharded
model, in chunks of experts that follow one another; so are its optimizer states. Where checkpoints lie, and why one is
whole however a write ends: :mod:`poise.train.folders`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from poise.train.folders import clear, commit, newest, partial_of
from poise.train.gradients import sharded_layers
from poise.train.rows import plain, plainly, rows_of
from poise.train.sharding import ShardedExperts
from poise.train.shards import ExpertShards, own_rows, shards_of
from poise.train.stored import CheckpointReader, Planner, fault
from poise.util.errors import InputError, ModelError, OptionError, PoiseError, told
from poise.util.files import check_new_folder, new_folder

T = TypeVar("T")
COMPILED = "_orig_mod."
"""In names of what lies in modules that ``torch.compile`` has wrapped."""


def speak_of_experts(experts: ShardedExperts) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of the module speak of all E experts."""

    def show(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for attribute in module._attribute.values():
            key = prefix + attribute
            if key in state:
                state[key] = shards_of(state[key], module.ownership)

    def take(
        module: Any, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *_: Any
    ) -> None:
        if module.schedule is not None:
            module.schedule.weights_changed()
        for name, attribute in module._attribute.items():
            key = prefix + attribute
            if module.listed:  # before what is there under the stacked name: torch's loader puts local weights there
                rows = {e: state.pop(f"{prefix}{e}.{name}", None) for e in range(module.num_experts)}
                if any(row is not None for row in rows.values()):
                    missing += [f"{prefix}{e}.{name}" for e, row in rows.items() if row is None]
                    state[key] = _some_rows(module, name, rows, key)
                    continue
            if isinstance(state.get(key), Tensor):
                state[key] = own_rows(state[key], module.ownership, key)

    experts.register_state_dict_post_hook(show)
    experts.register_load_state_dict_pre_hook(take)


def _some_rows(module: ShardedExperts, name: str, rows: dict[int, Tensor | None], key: str) -> Tensor:
    """Rows of this rank, with those experts replaced that are given; the others stay."""
    shape = module.kind.shapes[name]
    for e, row in rows.items():
        if row is not None and row.shape != shape:
            raise ModelError(f"expert {e} of {key} has shape {tuple(row.shape)}, the model {shape}")
    here = module.rows()[name]
    out = [here[at] if (row := rows[e]) is None else row.detach().to(here) for at, e in enumerate(module.mine)]
    if here.is_meta:
        out = [row for e in module.mine if (row := rows[e]) is not None]
        if len(out) < len(module.mine):
            raise ModelError(f"{key} is on the meta device and {len(module.mine) - len(out)} experts are not given")
    return rows_of(torch.stack(out) if out else here, module.ownership)


@contextmanager
def _all_trained(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Let all weights be trained and have no gradient for a while: PyTorch loads states of such weights only."""
    weights = [] if optimizer is None else [weight for group in optimizer.param_groups for weight in group["params"]]
    with plainly():
        frozen = [weight for weight in weights if not weight.requires_grad]
        grads = [(weight, weight.grad) for weight in weights if weight.grad is not None]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        for weight, _ in grads:
            weight.grad = None
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for weight, grad in grads:
            weight.grad = grad


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    keep: int = 2,
) -> Path:
    """Write ``folder/step-N`` and name it in ``folder/latest``; all but the ``keep`` newest are removed. Collective.

    What was there stays until the new one is whole; the newest are those written last, whatever their numbers.

    Raises
    ------
    OptionError : on all ranks: ``keep`` below 1, ``step`` below 0 or not the same on all ranks; or a rank cannot write
        its part. The folder is then as it was.
    """
    root = Path(folder)

    def check() -> tuple[int, int]:
        if keep < 1 or step < 0:
            raise OptionError(f"keep must be at least 1 and step at least 0, got {keep} and {step}")
        sharded_layers(model)
        return step, keep

    said = _everywhere(check)
    if len(set(said)) > 1:
        raise OptionError(f"ranks write step and keep {' or '.join(map(str, sorted(set(said))))}")
    weights, states = get_state_dict(model, () if optimizer is None else optimizer)
    _on_first(lambda: clear(root, fault))
    try:
        dcp.save({"model": weights, "optimizer": states, "step": step}, checkpoint_id=str(partial_of(root, step)))
        _on_first(lambda: commit(root, step, keep, fault))
    except (dcp.CheckpointException, PoiseError) as error:
        with suppress(PoiseError):
            _on_first(lambda: clear(root, fault))
        raise _typed(error, f"cannot write {root / f'step-{step}'}", OptionError) from None
    return root / f"step-{step}"


def _typed(error: BaseException, what: str, kind: type[InputError]) -> BaseException:
    """What torch raises on all ranks when one of them fails, as an error of poise; an interrupt stays what it is."""
    if not isinstance(error, dcp.CheckpointException):
        return error
    rank, (cause, _) = min(error.failures.items())
    if not isinstance(cause, Exception):
        return error
    if isinstance(cause, PoiseError):
        return type(cause)(f"{what}: {cause.message}", hint=cause.hint)
    return kind(f"{what}: rank {rank}: {told(cause)}")


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that ``latest`` names, or, with a warning, the newest whole one if that is not whole; or None.

    Raises
    ------
    InputError : there are some, and none is whole.
    """
    return newest(Path(folder), fault)


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Load the newest checkpoint of a folder, whatever world size and sharding wrote it; its step. Collective.

    Its files are read as data: what they hold beside tensors, numbers and words is refused.

    Raises
    ------
    InputError : on all ranks: there is none, or it cannot be read. ModelError : it is of another model or optimizer.
        Weights may have been overwritten then.
    """
    place = _on_first(lambda: latest_checkpoint(folder))
    if place is None:
        raise InputError(f"{folder} holds no complete checkpoint")
    optimizers = () if optimizer is None else optimizer
    place = Path(folder) / place.name
    with _all_trained(optimizer):
        weights, states = get_state_dict(model, optimizers)
        state: dict[str, Any] = {"model": weights, "optimizer": states, "step": 0}
        try:
            dcp.load(state, storage_reader=CheckpointReader(place), planner=Planner())
        except dcp.CheckpointException as error:
            raise _typed(error, f"cannot load {place}", InputError) from None
        set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


@torch.no_grad()  # type: ignore[untyped-decorator]
def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The unsharded model's weights on the CPU of rank 0 (None elsewhere), one tensor at a time. Collective."""
    layers = {module.ownership.origin: module for module in sharded_layers(model)}  # wrappers change names, not these
    schedule = next(iter(layers.values())).schedule
    if schedule is None:
        raise ModelError("these experts belong to no run")
    first, out = schedule.deployment.rank == 0, dict[str, Any]()
    for key, value in model.state_dict().items():
        if isinstance(value, ExpertShards):
            prefix, _, attribute = key.rpartition(".")
            module = layers[value.ownership.origin]
            full = _collect(value.rows, module, schedule.deployment.weights_group)
            name = next(n for n, a in module._attribute.items() if a == attribute)
            if full is not None and module.listed:
                out.update({f"{prefix}.{e}.{name}": full[e].clone() for e in range(len(full))})
            elif full is not None:
                out[key] = full
        else:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if first:
                out[key] = whole.detach().cpu().clone() if isinstance(whole, Tensor) else whole  # of get_extra_state
    return out if first else None


def _collect(rows: Tensor, module: ShardedExperts, group: Any) -> Tensor | None:
    """All experts on rank 0, one after the other."""
    rank, local = dist.get_rank(group), plain(rows)
    full = torch.empty((module.num_experts, *local.shape[1:]), dtype=local.dtype) if rank == 0 else None
    for e, owner in enumerate(module.owner_E.tolist()):
        row = local[module.mine.index(e)].contiguous() if owner == rank else None
        if owner and rank == 0:
            row = torch.empty(local.shape[1:], dtype=local.dtype, device=local.device)
            dist.recv(row, dist.get_global_rank(group, owner), group)
        elif owner and row is not None:
            dist.send(row, dist.get_global_rank(group, 0), group)
        if full is not None and row is not None:
            full[e] = row.cpu()
    return full


def export_safetensors(model: nn.Module, folder: str | Path) -> Path:
    """The unsharded model as safetensors, by rank 0: as Hugging Face names it where the model can save itself.

    Collective. A model with ``save_pretrained`` is written with its config; any other as ``model.safetensors``.
    Wrappers of it or of its parts (``DistributedDataParallel``, ``torch.compile``) leave no trace in the names. The
    folder appears whole or not at all.

    Raises
    ------
    OptionError : on all ranks: the folder exists and is not empty, or cannot be written.
    """
    place = Path(folder)
    while isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch._dynamo.OptimizedModule)):
        model = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model._orig_mod

    def check() -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        check_new_folder(place, OptionError)

    def write() -> None:
        assert state is not None
        with new_folder(place, OptionError) as scratch:
            if hasattr(model, "save_pretrained"):
                model.save_pretrained(scratch, state_dict=state)
            else:
                from safetensors.torch import save_file

                whole = {name: tensor.contiguous() for name, tensor in state.items()}
                save_file(whole, str(scratch / "model.safetensors"))

    _on_first(check)
    full = full_state_dict(model)
    inner = _data_parallel(model)
    state = None if full is None else {_own_name(name, inner): value for name, value in full.items()}
    _on_first(write)
    return place


def _data_parallel(model: nn.Module) -> list[str]:
    """Names in a state dict of what lies in ``DistributedDataParallel`` around parts of a model, innermost first."""
    parts = (name for name, part in model.named_modules() if isinstance(part, nn.parallel.DistributedDataParallel))
    return sorted((f"{name.replace(_CHECKPOINT_PREFIX, '')}.module." for name in parts), key=len, reverse=True)


def _own_name(name: str, inner: list[str]) -> str:
    for start in inner:
        if name.startswith(start):
            name = start.removesuffix("module.") + name.removeprefix(start)
    return name.replace(COMPILED, "")


def _everywhere(do: Callable[[], T]) -> list[T]:
    """The result of a call on every rank; an error on one is raised on all, as the others would wait for it."""
    said: list[Any] = [None] * dist.get_world_size()
    try:
        mine: Any = do()
    except PoiseError as error:
        mine = error
    except Exception as error:
        mine = OptionError(told(error))
    dist.all_gather_object(said, mine)
    for rank, one in enumerate(said):
        if isinstance(one, PoiseError):
            raise mine if isinstance(mine, PoiseError) else type(one)(f"rank {rank}: {one.message}", hint=one.hint)
    return said


def _on_first(do: Callable[[], T]) -> T:
    """The result of a call on rank 0, on all ranks."""
    first = dist.get_rank() == 0
    found: list[T] = _everywhere(lambda: do() if first else cast(T, None))
    return found[0]
