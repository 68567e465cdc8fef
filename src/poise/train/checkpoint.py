"""Checkpoints keyed by logical expert: saved at one world size and sharding, loaded at any other, or without poise.

In ``torch.distributed.checkpoint`` an expert weight is one tensor [E, ...] under the name it has in the unsharded
model, in chunks of one expert; so are its optimizer states. A checkpoint is written beside its place and moved there
when complete: an interrupted write leaves the one before as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from poise.errors import InputError, ModelError, OptionError
from poise.files import check_new_folder, new_folder, read_bounded, replacing
from poise.train.gradients import sharded_layers
from poise.train.sharding import ShardedExperts

LATEST = "latest"
MAX_NAME_BYTES = 4096


class ExpertShards(torch.Tensor):
    """The experts that one rank owns, shown to ``torch.distributed.checkpoint`` as part of a tensor [E, ...]."""

    local: Tensor
    mine: list[int]

    @staticmethod
    def __new__(cls, local: Tensor, mine: list[int], num_experts: int) -> ExpertShards:  # noqa: D102
        shape = (num_experts, *local.shape[1:])
        out: ExpertShards = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        out.local, out.mine = local, list(mine)
        return out

    def __init__(self, local: Tensor, mine: list[int], num_experts: int) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].local, args[0].mine, args[0].shape[0])
        raise OptionError(f"{func} is not defined for experts that lie on several ranks", hint="use .local")

    def __repr__(self, **_: Any) -> str:
        return f"ExpertShards({tuple(self.shape)}, {self.dtype}, here={self.mine})"

    def _chunk(self, expert: int) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([expert, *[0] * (self.dim() - 1)]), torch.Size([1, *self.shape[1:]]))

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """One chunk an expert owned here."""
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, self._chunk(expert).offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(self._chunk(expert), properties, self.size()),
            )
            for expert in self.mine
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """One chunk an expert owned here."""
        return [self._chunk(expert) for expert in self.mine]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        """The expert at an offset."""
        row = self.mine.index(int(index.offset[0]))
        return self.local[row : row + 1]


def speak_of_experts(experts: ShardedExperts) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of the module speak of all E experts."""

    def show(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for attribute in module._attribute.values():
            key = prefix + attribute
            if key in state:
                state[key] = ExpertShards(state[key], module.mine, module.num_experts)

    def take(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if module.schedule is not None:
            module.schedule.weights_changed()
        for name, attribute in module._attribute.items():
            key = prefix + attribute
            value = state.get(key)
            if module.listed:  # before what is there under the stacked name: torch's loader puts local weights there
                rows = [state.pop(f"{prefix}{e}.{name}", None) for e in range(module.num_experts)]
                if all(row is not None for row in rows):
                    value = torch.stack([row for row in rows if row is not None])
            if isinstance(value, ExpertShards):
                if value.mine != module.mine:
                    raise ModelError(f"{key} holds experts {value.mine}, this rank owns {module.mine}")
                state[key] = value.local
            elif isinstance(value, Tensor):
                if value.shape[0] != module.num_experts:
                    raise ModelError(f"{key} has {value.shape[0]} experts, the model {module.num_experts}")
                state[key] = value[torch.as_tensor(module.mine, dtype=torch.int64, device=value.device)]

    experts.register_state_dict_post_hook(show)
    experts.register_load_state_dict_pre_hook(take)


def _shown(model: nn.Module, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of model and optimizer in which expert tensors are :class:`ExpertShards`."""
    weights, states = get_state_dict(model, optimizer)
    owners = {
        f"{prefix}.{attribute}": module
        for prefix, module in model.named_modules() if isinstance(module, ShardedExperts)
        for attribute in module._attribute.values()
    }  # fmt: skip

    def shown(name: str, value: Any) -> Any:
        module = owners.get(name)
        if module is None or not isinstance(value, Tensor) or not value.dim() or value.shape[0] != len(module.mine):
            return value
        return ExpertShards(value, module.mine, module.num_experts)

    inner: Any = states.get("state", {})  # the optimizer's own dicts: they are not to be changed
    seen = {name: {key: shown(name, value) for key, value in values.items()} for name, values in inner.items()}
    return weights, {**states, "state": seen}


def _local(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _local(value) for key, value in tree.items()}
    return tree.local if isinstance(tree, ExpertShards) else tree


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    keep: int = 2,
) -> Path:
    """Write ``folder/step-N`` and name it in ``folder/latest``; older ones beyond ``keep`` are removed. Collective.

    Raises
    ------
    OptionError : ``keep`` below 1.
    """
    if keep < 1:
        raise OptionError(f"keep must be at least 1, got {keep}")
    sharded_layers(model)
    root = Path(folder)
    place, partial = root / f"step-{step}", root / f".step-{step}.partial"
    weights, states = _shown(model, () if optimizer is None else optimizer)
    aside = _aside(place)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
        if aside.is_dir() and not place.is_dir():  # a write of this step was ended between its two renames
            aside.rename(place)
        shutil.rmtree(aside, ignore_errors=True)
    dist.barrier()
    dcp.save({"model": weights, "optimizer": states, "step": step}, checkpoint_id=str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        if place.is_dir():
            place.rename(aside)
        partial.rename(place)
        shutil.rmtree(aside, ignore_errors=True)
        with replacing(root / LATEST, OptionError) as note:
            note.write(place.name.encode())
        numbered = sorted((int(p.name[5:]), p) for p in root.glob("step-*") if p.name[5:].isdigit())
        for _, old in numbered[:-keep]:
            if old != place:  # which is not the highest number after a return to an earlier step
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return place


def _aside(place: Path) -> Path:
    """Where a complete checkpoint waits while another of the same step takes its place."""
    return place.with_name(f".{place.name}.old")


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    note = Path(folder) / LATEST
    if not note.is_file():
        return None
    name = read_bounded(note, MAX_NAME_BYTES, InputError).decode("utf-8", "replace").strip()
    place = Path(folder) / name
    if "/" not in name and not place.is_dir() and _aside(place).is_dir():  # ended while the step was written anew
        return _aside(place)
    if "/" in name or not place.is_dir():
        raise InputError(f"{note} names {name[:80]!r}, which is not there")
    return place


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Load the newest checkpoint of a folder, whatever world size and sharding wrote it; its step. Collective.

    Raises
    ------
    InputError : there is none.
    """
    place = latest_checkpoint(folder)
    if place is None:
        raise InputError(f"{folder} holds no complete checkpoint")
    weights, states = _shown(model, () if optimizer is None else optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": states, "step": 0}
    dcp.load(state, checkpoint_id=str(place))
    set_state_dict(model, () if optimizer is None else optimizer, model_state_dict=state["model"],
                   optim_state_dict=_local(state["optimizer"]))  # fmt: skip
    return int(state["step"])


@torch.no_grad()  # type: ignore[untyped-decorator]
def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The unsharded model's weights on the CPU of rank 0 (None elsewhere), one tensor at a time. Collective."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ShardedExperts)}
    schedule = next(iter(layers.values())).schedule if layers else None
    if schedule is None:
        sharded_layers(model)
        raise ModelError("these experts belong to no run")
    first, out = dist.get_rank(schedule.tokens_group) == 0, {}
    for key, value in model.state_dict().items():
        if isinstance(value, ExpertShards):
            prefix, _, attribute = key.rpartition(".")
            module = layers[prefix]
            full = _collect(value, module, schedule.weights_group)
            name = next(n for n, a in module._attribute.items() if a == attribute)
            if full is not None and module.listed:
                out.update({f"{prefix}.{e}.{name}": full[e].clone() for e in range(len(full))})
            elif full is not None:
                out[key] = full
        else:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if first:
                out[key] = whole.detach().cpu().clone()
    return out if first else None


def _collect(value: ExpertShards, module: ShardedExperts, group: Any) -> Tensor | None:
    """All experts on rank 0."""
    rank = dist.get_rank(group)
    full = torch.empty(value.shape, dtype=value.dtype) if rank == 0 else None
    for e, owner in enumerate(module.owner_E.tolist()):
        row = value.local[module.mine.index(e)].contiguous() if owner == rank else None
        if owner and rank == 0:
            row = torch.empty(value.shape[1:], dtype=value.dtype, device=value.device)
            dist.recv(row, dist.get_global_rank(group, owner), group)
        elif owner and row is not None:
            dist.send(row, dist.get_global_rank(group, 0), group)
        if full is not None and row is not None:
            full[e] = row.cpu()
    return full


def export_safetensors(model: nn.Module, folder: str | Path) -> Path:
    """The unsharded model as safetensors, by rank 0: as Hugging Face names it where the model can save itself.

    Collective. A model with ``save_pretrained`` is written with its config; any other as ``model.safetensors``. The
    folder appears whole or not at all.

    Raises
    ------
    OptionError : on all ranks: the folder exists and is not empty, or cannot be written.
    """
    place = Path(folder)

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
    state = full_state_dict(model)
    _on_first(write)
    return place


def _on_first(do: Callable[[], None]) -> None:
    """Have rank 0 do something with files; what it cannot is an error on all ranks, which else would wait for it."""
    said: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            do()
        except (OSError, OptionError) as error:
            said = [str(error)]
    dist.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise OptionError(said[0])
