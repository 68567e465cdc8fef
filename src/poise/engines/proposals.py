"""Formats of open proposals to engines, which no release writes or loads: what poise knows of each is in one table.

:mod:`poise.engines.readers` and :mod:`poise.engines.exports` take them from here; :mod:`poise.engines.vllm` writes the
files and :mod:`poise.engines.dumps.vllm_maps` reads them. Files that older versions of poise wrote are read as before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from poise.engines import vllm
from poise.engines.dump import EngineDump, ReadOptions
from poise.engines.dumps import bare, vllm_maps
from poise.engines.dumps.parts import Part
from poise.planning.placement import Placement


@dataclass(frozen=True, slots=True)
class Layers:
    """What is known of the model's layers: the MoE layers, decoder layers, those of multi-token prediction that have a
    row, routing groups.
    """

    moe: tuple[int, ...] | None = None
    decoder: int | None = None
    mtp: int = 0
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Proposal:
    """One pull request.

    Parameters
    ----------
    number : of the pull request.
    write : writes a placement; returns slots filled.
    flags : what would start the engine with the file, beside the number of ranks.
    holds, read : as in :class:`poise.engines.readers.Format`.
    mtp, unplanned : as in :class:`poise.engines.exports.Target`; None and "" for what most targets say.
    by_place : rows are found by their place among the MoE layers.
    """

    number: int
    write: Callable[[Placement, Path, Layers], int]
    flags: Callable[[Placement, Path], str]
    holds: Callable[[Part], bool]
    read: Callable[[Sequence[Part], ReadOptions], EngineDump]
    mtp: str | None = None
    unplanned: str = ""
    by_place: bool = True


def _write_34811(placement: Placement, path: Path, layers: Layers) -> int:
    vllm.write_34811(placement, path)
    return 0


def _write_53022(placement: Placement, path: Path, layers: Layers) -> int:
    return vllm.write_53022(
        placement, path, num_hidden_layers=layers.decoder, num_mtp_layers=layers.mtp, num_groups=layers.groups
    )


def _flags_53022(placement: Placement, path: Path) -> str:
    redundant = placement.redundant
    config = {"expert_map_path": str(path)} | ({"num_redundant_experts": redundant} if redundant else {})
    return f"{'--enable-eplb ' if redundant else ''}--eplb-config {quote(json.dumps(config))}"


def _flags_49572(placement: Placement, path: Path) -> str:
    config = {"num_redundant_experts": placement.redundant, "initial_expert_map_path": str(path)}
    return f"--enable-eplb --eplb-config {quote(json.dumps(config))}"


PROPOSALS: dict[str, Proposal] = {
    "vllm-34811": Proposal(
        34811,
        write=_write_34811,
        flags=lambda placement, path: f"--expert-placement-strategy custom --expert-placement-file {quote(str(path))}",
        holds=lambda part: part.container == "json" and vllm_maps.is_ranks(part.value),
        read=vllm_maps.read,
        mtp="the file has one list for all layers, and no rows",
        unplanned="the one list holds for them too",
        by_place=False,
    ),
    "vllm-49572": Proposal(
        49572,
        write=lambda placement, path, layers: vllm.write_49572(placement, path, layer_ids=layers.moe)[0],
        flags=_flags_49572,
        holds=lambda part: bare.is_bare(part) and part.container != "npz",
        read=vllm_maps.read,
    ),
    "vllm-53022": Proposal(
        53022,
        write=_write_53022,
        flags=_flags_53022,
        holds=lambda part: bare.is_bare(part) and part.container != "npz",
        read=vllm_maps.read_every_layer,
        mtp="",
        by_place=False,
    ),
}
