"""Relabelled Hugging Face checkpoints: the same model with other expert ids, for engines that know no map.

The folder is read and written shard by shard in bounded memory. Tensors of single experts only change their name, so
a shard is a new header and a copy; fused experts and the router's rows change places while they are copied. Old ids
can be had back from ``poise-relabelling.json``, which :func:`load_relabelling` reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.engines.checkpoints.permutation import RELABELLING_FILE, Relabelling, load_relabelling, permutation
from poise.engines.checkpoints.tensor_names import Changes, find_changes
from poise.engines.shards import Segment, Shard, copy_segments, read_shard
from poise.machine.hfconfig.read import text_part
from poise.machine.model import MAX_CONFIG_BYTES, from_hf_config
from poise.planning.placement import Placement
from poise.planning.problem import Progress
from poise.util.errors import ModelError, OptionError, PlacementError
from poise.util.files import check_new_folder, new_folder, read_bounded
from poise.util.jsonfile import read_json

__all__ = ["RelabelReport", "load_relabelling", "relabel_checkpoint"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 2**28
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
NAMES_MODULES = ("config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files in which experts may be named, as modules that are quantised otherwise."""
OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".index.json",
)  # fmt: skip
MAX_NAMED = 6


@dataclass(frozen=True, slots=True)
class RelabelReport:
    """What was written.

    Parameters
    ----------
    files, bytes : in the new folder.
    tensors : that were renamed or whose blocks changed places, or that could have been.
    moved_experts : experts with another id, all layers together.
    notes : what a user should know.
    kept_layers : layers with experts that are not in the placement and keep their ids.
    """

    files: int
    tensors: int
    bytes: int
    moved_experts: int
    notes: tuple[str, ...]
    kept_layers: int = 0


def relabel_checkpoint(
    placement: Placement, source: str | Path, target: str | Path, *, progress: Progress | None = None
) -> RelabelReport:
    """Write a checkpoint in which device d's experts are the d-th block of ids; the model computes what it did.

    Parameters
    ----------
    placement : of the checkpoint's own expert ids; as many experts on every device, no replicas. Layers that it lacks
        keep their ids.
    source : folder with ``config.json`` and ``model.safetensors`` or shards and their index; it stays as it is.
    target : folder to make, or an empty one; it appears whole or not at all.
    progress : told of the bytes written.

    Raises
    ------
    PlacementError : as :func:`poise.engines.checkpoints.permutation.permutation`, or the placement is of another model.
    ModelError : the checkpoint is damaged, or is of a kind of which it is not known what follows expert ids.
    OptionError : as :func:`poise.util.files.check_new_folder`; the target lies within the source, or the disk is too
        small.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target)
    config = _read_object(source / "config.json", MAX_CONFIG_BYTES)
    groups = _check_model(config, placement, source)
    names, index = _shard_names(source)
    shards = [read_shard(source / name) for name in names]
    _check_index(shards, index, source)
    made = Relabelling(
        placement.layer_ids_L, permutation(placement, num_groups=groups), source.resolve().name, placement.num_devices
    )
    changes = find_changes((tensor for shard in shards for tensor in shard.tensors), made.rows())
    notes = _notes(changes, placement, groups)
    total = made
    if os.path.lexists(source / RELABELLING_FILE):
        first = load_relabelling(source / RELABELLING_FILE)
        total = made.after(first)
        notes.append(f"{source} is relabelled itself: {RELABELLING_FILE} leads back to the ids of {first.source!r}")
    others, left_out = _other_files(source, set(names) | {INDEX, RELABELLING_FILE})
    if left_out:
        more = f" and {len(left_out) - MAX_NAMED} more" if len(left_out) > MAX_NAMED else ""
        notes.append(f"weights with the old ids were left out: {', '.join(left_out[:MAX_NAMED])}{more}")
    _check_space(target.resolve().parent, shards, [source / name for name in others])

    with new_folder(target, ModelError) as scratch:
        _write_shards(shards, changes, scratch, progress)
        if index is not None:
            _write_index(source / INDEX, index, changes, scratch / INDEX)
        for name in others:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            _copy_file(source / name, scratch / name, name in map(Path, NAMES_MODULES), changes)
        (scratch / RELABELLING_FILE).write_text(total.to_json(), "utf-8")
        files = [path for path in scratch.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
    kept = sum(order is None for order in changes.paths.values())
    return RelabelReport(len(files), len(changes.names) + len(changes.rows), size, made.moved, tuple(notes), kept)


def _check_target(source: Path, target: Path) -> None:
    """The target does not exist or is empty, and does not lie in the source."""
    try:
        if not source.is_dir():
            raise ModelError(f"{source} is no folder", hint="give the folder of a Hugging Face checkpoint")
        here, there = source.resolve(), target.resolve()
        if there == here or here in there.parents:
            raise OptionError(f"{target} lies in {source}", hint="name a new folder beside it")
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise OptionError(f"cannot write {target}: {error}") from None
    check_new_folder(target, OptionError)


def _read_object(path: Path, most: int) -> dict[str, Any]:
    data = read_json(path, most, ModelError, infinite=True)
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds a {type(data).__name__}")
    return data


def _check_model(config: dict[str, Any], placement: Placement, source: Path) -> int:
    """Routing groups that new ids must keep, 1 if none; the placement has the model's experts."""
    stored = ("quantization_config", "compression_config", "expert_dtype")  # what a weight takes does not matter here
    text = {key: value for key, value in text_part(config).items() if key not in stored}
    spec = from_hf_config(text, name=source.name)
    if spec.num_experts != placement.num_experts:
        raise PlacementError(f"the placement has {placement.num_experts} experts, {source} has {spec.num_experts}")
    return spec.num_expert_groups


def _shard_names(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """Names of the safetensors files, and the index where there is one."""
    if not os.path.lexists(folder / INDEX):
        if (folder / SINGLE).is_file():
            return [SINGLE], None
        raise ModelError(
            f"{folder} has neither {SINGLE} nor {INDEX}",
            hint="other formats are not read; transformers' save_pretrained writes this one",
        )
    index = _read_object(folder / INDEX, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise ModelError(f"{folder / INDEX} names {name!r:.120}, not a safetensors file of the folder")
    names = sorted(set(weight_map.values()))
    if SINGLE not in names and (folder / SINGLE).is_file():
        raise ModelError(f"{folder} has {SINGLE} and an index that does not name it", hint="remove one of the two")
    return names, index


def _check_index(shards: list[Shard], index: dict[str, Any] | None, folder: Path) -> None:
    if index is None:
        return
    stored = {tensor.name: shard.path.name for shard in shards for tensor in shard.tensors}
    count = sum(len(shard.tensors) for shard in shards)
    named = index["weight_map"]
    if count == len(stored) and stored == named:
        return
    wrong = sorted(name for name in {*stored, *named} if stored.get(name) != named.get(name))
    if wrong:
        raise ModelError(
            f"{folder / INDEX} has {wrong[0]!r:.120} in {named.get(wrong[0])}, it lies in {stored.get(wrong[0])} "
            f"({len(wrong)} such tensors)"
        )
    raise ModelError(f"{folder}: {count - len(stored)} tensors lie in two shards")


def _notes(changes: Changes, placement: Placement, groups: int) -> list[str]:
    notes = []
    if groups > 1:
        notes.append(f"{groups} routing groups of {placement.num_experts // groups} experts are kept whole")
    kept = [path for path, order in changes.paths.items() if order is None]
    if kept:
        more = ", ..." if len(kept) > MAX_NAMED else ""
        notes.append(
            f"{len(kept)} layers with experts are not in the placement and keep their ids: "
            f"{', '.join(kept[:MAX_NAMED])}{more}"
        )
    return notes


def _other_files(folder: Path, known: set[str]) -> tuple[list[Path], list[str]]:
    """Files to copy, and weights to leave out because their ids are the old ones; both relative, sorted."""
    copied, left_out = [], []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            path = Path(root, file).relative_to(folder)
            if str(path) in known or not (folder / path).is_file():
                continue
            if file.endswith(OTHER_WEIGHTS):
                left_out.append(str(path))
            else:
                copied.append(path)
    return sorted(copied), sorted(left_out)


def _check_space(folder: Path, shards: list[Shard], others: list[Path]) -> None:
    try:
        need = sum(shard.stored for shard in shards) + sum(path.stat().st_size for path in others)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror}") from None
    if need > free:
        raise OptionError(f"the new checkpoint needs {need / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB left")


def _segments(shard: Shard, changes: Changes, data: int) -> Iterator[Segment]:
    """Ranges of a shard in the order of the new file, whose data begins at ``data``."""
    start = len(shard.header)
    for tensor in shard.tensors:
        order = changes.rows.get(tensor.name)
        if order is None:
            yield start + tensor.begin, data + tensor.begin, tensor.end - tensor.begin
            continue
        block = (tensor.end - tensor.begin) // len(order)
        for new, old in enumerate(order.tolist()):
            yield start + tensor.begin + old * block, data + tensor.begin + new * block, block


def _write_shards(shards: list[Shard], changes: Changes, folder: Path, progress: Progress | None) -> None:
    whole = max(1, sum(shard.size - len(shard.header) for shard in shards))
    done = 0
    for shard in shards:
        header = shard.renamed_header(changes.names)
        name = shard.path.name

        def tick(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(name, done / whole)

        size = len(header) + shard.size - len(shard.header)
        copy_segments(shard.path, folder / name, header, _segments(shard, changes, len(header)), size, tick)


def _write_index(old: Path, index: dict[str, Any], changes: Changes, new: Path) -> None:
    """The index with the new names, in the form in which transformers writes it."""
    if not changes.names:
        shutil.copyfile(old, new)
        return
    weight_map = {changes.names.get(name, name): shard for name, shard in index["weight_map"].items()}
    new.write_text(json.dumps({**index, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n", "utf-8")


def _copy_file(old: Path, new: Path, names_modules: bool, changes: Changes) -> None:
    if not names_modules or old.stat().st_size > MAX_CONFIG_BYTES:
        shutil.copyfile(old, new)
        return
    try:
        text = read_bounded(old, MAX_CONFIG_BYTES, ModelError).decode()
    except UnicodeDecodeError:
        raise ModelError(f"{old} is not text") from None
    new.write_bytes(changes.in_text(text, str(old)).encode())
