"""What state dicts show in place of a rank's rows: one tensor [E, ...], of which this rank has a part.

To PyTorch it is a DTensor, so that its own tools do with it what they do with FSDP2's: gather it whole, write and read
it in chunks, stage it. It claims to be replicated, as ``full_tensor`` gives the same on every rank: a true placement
would have to say which rows lie where, and PyTorch knows only even blocks in order. ``torch.distributed.checkpoint``
sees one chunk a run of experts with numbers that follow one another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from poise.runtime.collectives import gather_rows
from poise.train.ownership import Ownership
from poise.train.rows import TENSORS_OF_TENSORS, ExpertRows, plain, plainly, refused, rows_of
from poise.train.wholes import plain_name
from poise.util.errors import ModelError, OptionError


class ExpertShards(DTensor):
    """All experts' tensor [E, ...], of which ``rows`` [n, ...] lie here; made by :func:`shards_of`."""

    ownership: Ownership

    @property
    def rows(self) -> ExpertRows:
        """Those of this rank, not a copy."""
        return rows_of(self._local_tensor, self.ownership)

    def full_tensor(self, **_: Any) -> Tensor:
        """All experts, on every rank. Collective."""
        return all_rows(self._local_tensor, self.ownership)

    def redistribute(self, *_: Any, **__: Any) -> DTensor:
        """All experts, as a replicated DTensor. Collective."""
        mesh = self.ownership.mesh
        return DTensor.from_local(self.full_tensor(), mesh, [Replicate()] * mesh.ndim, run_check=False)

    def to_local(self, **_: Any) -> Tensor:
        """Rows of this rank."""
        return self.rows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", str(func))
        one = next((value for value in args if isinstance(value, cls)), None)
        if one is None:  # in a list, or by name
            raise undefined(name)
        fact = getattr(getattr(func, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else ""
        if fact in TENSORS_OF_TENSORS:
            if name == "__set__" or fact not in ("data", "grad"):  # as a DTensor they would be this rank's rows alone
                raise undefined(fact)
            return None if fact == "grad" else shards_of(one._local_tensor, one.ownership)
        if name in ("__get__", "__set__") or name in READ:
            with plainly():
                return func(*args, **kwargs)
        if name == "copy_" and one is args[0]:
            source = args[1]
            one.rows.copy_(source.rows if isinstance(source, cls) else source)
            return one
        if name in ALIKE and one is args[0]:
            with plainly():
                local = getattr(one._local_tensor, name)(*args[1:], **kwargs)
            return shards_of(local, one.ownership)
        if name in LIKE and one is args[0]:
            with plainly():
                return shards_of(func(one._local_tensor, *args[1:], **kwargs), one.ownership)
        if name == "new_empty":  # a tensor whose storage the caller sets
            with plainly():
                return shards_of(
                    one._local_tensor.new_empty((0, *one._local_tensor.shape[1:]), **kwargs), one.ownership
                )
        if name == "data_ptr":
            return 0
        raise undefined(name)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return shards_of(args[0]._local_tensor, args[0].ownership)
        raise undefined(str(getattr(func, "overloadpacket", func)).rpartition(".")[2])  # as torch.tensor comes here

    def __tensor_flatten__(self) -> Any:
        raise undefined("taking apart")

    def __deepcopy__(self, memo: Any) -> ExpertShards:
        if id(self) not in memo:
            memo[id(self)] = shards_of(plain(self._local_tensor).clone(), self.ownership)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise refused("pickled")

    def __repr__(self, **_: Any) -> str:
        shape = (len(self.ownership.owner_E), *self._local_tensor.shape[1:])
        return f"ExpertShards({shape}, {self._local_tensor.dtype}, here={self.ownership.mine})"

    # ---- the protocol of torch.distributed.checkpoint -------------------------------------------------------------

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """One chunk a run of experts owned here."""
        properties = TensorProperties.create_from_tensor(plain(self._local_tensor))
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """One chunk a run of experts owned here."""
        rest = self._local_tensor.shape[1:]
        return [
            ChunkStorageMetadata(torch.Size([first, *[0] * len(rest)]), torch.Size([count, *rest]))
            for first, count in self.ownership.runs()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        """The run of experts at an offset."""
        first, runs = int(index.offset[0]), dict(self.ownership.runs())
        row = self.ownership.mine.index(first)
        chunk = plain(self._local_tensor)[row : row + runs[first]]
        return chunk if len(runs) == 1 else chunk.as_subclass(OneOfSeveral)


class OneOfSeveral(torch.Tensor):
    """A chunk beside which this rank has others of the same tensor.

    PyTorch's writer of safetensors keeps the last chunk of a tensor that a rank has, and writes zeros for the others.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if plain_name(func) in ("layout", "data_ptr", "numpy"):
            raise OptionError(
                "this rank owns experts in several runs of their numbers, and safetensors by "
                "torch.distributed.checkpoint take one run a rank",
                hint="poise.train.export_safetensors; or dcp.save without HuggingFaceStorageWriter",
            )
        return super().__torch_function__(func, types, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).as_subclass(Tensor).__reduce_ex__(protocol)


def undefined(name: str) -> OptionError:
    """What is said where a rank would answer with its own experts in the name of all."""
    return OptionError(
        f"{name} is not defined for a state dict's tensor of experts that lie on several ranks",
        hint="poise.train.full_state_dict or get_model_state_dict(full_state_dict=True), on all ranks, gives all "
        "of them; Hugging Face's Trainer: poise.train.hf.ShardedExpertsMixin",
    )


READ = {"size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "is_contiguous",
        "is_floating_point", "is_complex",
        "storage_offset", "get_device", "has_names", "is_inference", "__hash__", "__len__"}  # fmt: skip
"""What tells about the tensor of all experts without its numbers."""
ALIKE = {"detach", "clone", "to", "cpu", "cuda", "contiguous", "pin_memory", "float", "double", "half", "bfloat16",
         "requires_grad_"}  # fmt: skip
"""What makes the same tensor elsewhere or of another type."""
LIKE = {"empty_like", "zeros_like"}


def shards_of(rows: Tensor, ownership: Ownership) -> ExpertShards:
    """Rows [n, ...] of an ownership as the tensor [E, ...] of all experts; not a copy."""
    local = plain(rows)
    shape = torch.Size([len(ownership.owner_E), *local.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(ownership.mesh, (Replicate(),), tensor_meta=TensorMeta(shape, stride, local.dtype))
    out: ExpertShards = DTensor.__new__(ExpertShards, local, spec, requires_grad=False)
    out.ownership = ownership
    return out


def all_rows(rows: Tensor, ownership: Ownership) -> Tensor:
    """The tensor [E, ...] of all experts on every rank, from each rank's rows. Collective."""
    local = plain(rows)
    device = torch.device(ownership.mesh.device_type)
    counts = [int((ownership.owner_E == rank).sum()) for rank in range(ownership.mesh.size())]
    came = gather_rows(local.to(device).contiguous(), counts, ownership.group)
    order = torch.as_tensor(ownership.owner_E.argsort(kind="stable"), device=device)
    out = torch.empty_like(came)
    out[order] = came
    return out.to(local.device)


def own_rows(value: Tensor, ownership: Ownership, name: str) -> ExpertRows:
    """Rows of this rank from a tensor of all experts, however it is given; of other owners, by way of all ranks.

    Raises
    ------
    ModelError : it has another number of experts, or is a DTensor that is split otherwise.
    """
    if isinstance(value, (ExpertShards, ExpertRows)):
        rows = value.rows if isinstance(value, ExpertShards) else value
        if (value.ownership.owner_E == ownership.owner_E).all():
            return rows_of(plain(rows), ownership)
        value = all_rows(rows, value.ownership)
    elif isinstance(value, DTensor):
        value = value.full_tensor()
    if not value.dim() or value.shape[0] != len(ownership.owner_E):
        raise ModelError(
            f"{name} has shape {tuple(value.shape)}, the model {len(ownership.owner_E)} experts",
            hint="give the tensor of all experts, [E, ...]",
        )
    return rows_of(plain(value)[ownership.index(value.device)], ownership)
