"""Models for serving: random weights from a config, or a folder of safetensors, of which a rank reads its experts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from poise.planning.placement import Placement
from poise.runtime.capture import find_routers
from poise.runtime.experts import Bank, ExpertKind
from poise.serve.model import Parts, StandIn, block_of, check_family, check_placement, kinds_of, take_apart
from poise.util.errors import ModelError, PlacementError
from poise.util.files import regular_size
from poise.util.jsonfile import read_json

MAX_INDEX_BYTES = 64 << 20
RENAMED = (("block_sparse_moe.", "mlp."),)
"""What transformers renames when it reads a checkpoint of the known families."""
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(?:(\d+)\.)?(\w+)(?:\.weight)?")
ON_DISK = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""Tensors of one expert in a checkpoint that make up each weight in memory, in either naming."""


def from_config(config: Any, *, seed: int = 0, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model with random weights, the same on every rank; the caller's random state stays as it is.

    Raises
    ------
    ModelError : transformers knows no causal language model for the config.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32).eval()
        except ValueError as error:
            raise ModelError(f"no model for {type(config).__name__}: {str(error).splitlines()[0][:200]}") from None


def from_folder(
    path: str | Path, placement: Placement, rank: int | None = None, *, dtype: torch.dtype | None = None
) -> Parts:
    """A model from a local folder of safetensors; nothing is fetched, no code of it is run.

    A rank reads the dense weights and the experts of its slots. Where experts are stored in a way that is not known
    (gpt-oss), the whole model is read and taken apart: memory then holds all experts for a while.

    Parameters
    ----------
    path : what ``save_pretrained`` wrote.
    placement, rank : which experts are this rank's; default: of this process among all.
    dtype : of the weights; default: as stored.

    Raises
    ------
    ModelError : the folder cannot be read, or is of an unknown family.
    PlacementError : the placement is for another model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(path)
    rank = dist.get_rank() if rank is None else rank
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json", hint="give the folder of a Hugging Face model")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
        check_family(model)
        kinds = kinds_of({layer: block_of(model, layer) for layer in find_routers(model)})
        first = block_of(model, next(iter(kinds))).experts
        check_placement(placement, list(kinds), len(next(first.parameters())), placement.num_devices)
        if (folder / "model.safetensors.index.json").is_file() or (folder / "model.safetensors").is_file():
            with Checkpoint(folder) as stored:
                if all(stored.has_experts(layer, kind) for layer, kind in kinds.items()):
                    return _sparse(model, kinds, stored, placement, rank)
        whole = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=dtype or "auto"
        )
    except (ModelError, PlacementError):
        raise
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"cannot load {folder}: {str(error).splitlines()[0][:300]}") from None
    return take_apart(whole, placement, rank)


def expert_source(path: str | Path) -> Callable[[int, int, ExpertKind], Bank]:
    """Reads one expert anew from a local folder of safetensors: (decoder layer, expert, kind) -> weights.

    Raises, when it is called
    -------------------------
    ModelError : the folder cannot be read, or stores experts in a way that is not known.
    """

    def read(layer: int, expert: int, kind: ExpertKind) -> Bank:
        with Checkpoint(Path(path)) as stored:
            return {name: stored.expert(layer, expert, name) for name in kind.shapes}

    return read


class Checkpoint:
    """Tensors of a folder by the names they have in memory; a tensor is read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.is_file():
            named = read_json(index, MAX_INDEX_BYTES, ModelError)
            weight_map = named.get("weight_map") if isinstance(named, dict) else None
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ModelError(f"{index} has no weight_map of names")
            files = sorted(set(weight_map.values()))
        self._files = files
        self._open: Any = ExitStack()
        self._where: dict[str, tuple[Any, str]] = {}

    def __enter__(self) -> Checkpoint:
        for name in self._files:
            if Path(name).name != name:
                raise ModelError(f"{self.folder}: the index names {name!r}, not a file of the folder")
            regular_size(self.folder / name, ModelError)  # the library would wait for a pipe
            stored = self._open.enter_context(safe_open(self.folder / name, "pt"))
            for key in stored.keys():
                known = key
                for old, new in RENAMED:
                    known = known.replace(old, new)
                self._where[known] = (stored, key)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        stored, key = self._where[name]
        tensor: Tensor = stored.get_tensor(key)
        return tensor

    def names(self) -> Iterator[str]:
        """Of all tensors but those of experts."""
        return (name for name in self._where if not EXPERT.fullmatch(name))

    def has_experts(self, layer: int, kind: ExpertKind) -> bool:
        """Whether experts of a layer are stored in a known way."""
        return set(kind.shapes) == set(ON_DISK) and all(self._sources(layer, 0, name) for name in kind.shapes)

    def _sources(self, layer: int, expert: int, name: str) -> list[str]:
        start = f"model.layers.{layer}.mlp.experts.{expert}."
        for names in ON_DISK[name]:
            found = [f"{start}{part}.weight" for part in names]
            if all(each in self._where for each in found):
                return found
        return []

    def expert(self, layer: int, expert: int, name: str) -> Tensor:
        """One weight of one expert, as it lies in memory."""
        sources = self._sources(layer, expert, name)
        if not sources:
            raise ModelError(f"{self.folder} has no {name} of layer {layer}, expert {expert}")
        return torch.cat([self.read(source) for source in sources])


def _sparse(model: Any, kinds: dict[int, ExpertKind], stored: Checkpoint, placement: Placement, rank: int) -> Parts:
    """Fill a model that lies on no device with its dense weights, and read this rank's experts."""
    banks: dict[int, Bank] = {}
    for row, (layer, kind) in enumerate(kinds.items()):
        block = block_of(model, layer)
        kept = next(block.experts.parameters()).dtype
        banks[layer] = {name: torch.empty((0, *shape), dtype=kept) for name, shape in kind.shapes.items()}
        held = placement.experts_of(row, rank)
        for name in kind.shapes if held else ():
            banks[layer][name] = torch.stack([stored.expert(layer, e, name).to(kept) for e in held])
        block.experts = StandIn()
    kept_apart = _kept_in_float32(model)
    filled = {}
    for name, empty in model.state_dict().items():
        if name in stored._where:
            dtype = torch.float32 if kept_apart and kept_apart.search(name) else empty.dtype
            filled[name] = stored.read(name).to(dtype)
    result = model.load_state_dict(filled, strict=False, assign=True)
    model.tie_weights()
    for name, module in list(model.named_modules()):  # rotary frequencies are computed, not stored
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)) and hasattr(module, "config"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(module.config))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left or result.unexpected_keys:
        raise ModelError(f"{stored.folder} lacks {len(left)} tensors, the first {left[:1]}")
    return Parts(model.eval().requires_grad_(False), kinds, banks, placement)


def _kept_in_float32(model: Any) -> re.Pattern[str] | None:
    """Names that transformers keeps in float32 when the rest is of a shorter type."""
    if model.dtype not in (torch.float16, torch.bfloat16):
        return None
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if model.dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(re.escape(name) for name in sorted(names))) if names else None
