"""The machine that policies reckon with where none was given: never silently another one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from poise.machine.cluster import Cluster, from_preset
from poise.stepwise.methods.hecate import Hecate
from poise.stepwise.poise.policy import Poise
from poise.stepwise.protocol import StepPolicy
from poise.stepwise.sharding import Heterogeneous, ShardingPolicy

DEFAULT = "a100"
PRESETS = {
    r"(Tesla|NVIDIA) V100-SXM2-\d+GB": "v100", r"NVIDIA A100-SXM4-\d+GB": "a100", r"NVIDIA H100 80GB HBM3": "h100",
    r"NVIDIA H100 PCIe": "h100-pcie", r"NVIDIA H200": "h200", r"NVIDIA B200": "b200",
    r"AMD Instinct MI300X.*": "mi300x",
}  # fmt: skip
"""Presets by what PyTorch calls the device."""
TOKENS_ONLY = ("expert-parallelism", "split", "lplb", "smart-moe", "llep", "ultra-ep", "moon-ep", "full-replication")
"""Policies that never ask what anything costs."""


def device_name(mesh: DeviceMesh) -> str:
    """What this rank computes on."""
    return torch.cuda.get_device_name() if mesh.device_type == "cuda" else str(mesh.device_type)


def presumed(mesh: DeviceMesh, ranks: list[int], devices: Sequence[str]) -> Cluster:
    """Nodes from a 2-D mesh, or from the ranks' numbers; the preset of the GPU that all ranks have, else an A100's.

    A preset has the datasheet's rates, and of several nodes the network of the vendor's own machines.

    Parameters
    ----------
    mesh, ranks : the mesh, and its ranks' numbers in the whole world.
    devices : :func:`device_name` of every rank.
    """
    size = len(ranks)
    local = mesh.shape[1] if mesh.ndim == 2 else int(os.environ.get("LOCAL_WORLD_SIZE", max(ranks) + 1))
    nodes = np.arange(size) // local if mesh.ndim == 2 else np.array(ranks) // local
    if (np.diff(nodes) < 0).any():
        nodes = np.zeros(size, int)
    counts = [int(count) for count in np.unique(nodes, return_counts=True)[1]]
    return from_preset(counts, DEFAULT if unknown(devices) else preset(devices[0]) or DEFAULT)


def unknown(devices: Sequence[str]) -> str:
    """The devices, where they are not all of one kind that there is a preset of; else ""."""
    one = len({preset(name) for name in devices}) == 1
    return "" if one and preset(devices[0]) else ", ".join(sorted(set(devices)))


def preset(device: str) -> str | None:
    """The preset of a device, or None."""
    return next((name for pattern, name in PRESETS.items() if re.fullmatch(pattern, device)), None)


def warn_of_rates(devices: str, policy: StepPolicy, sharding: ShardingPolicy | None = None) -> None:
    """Say, by a UserWarning, that a policy or sharding that looks at seconds gets those of another machine.

    Parameters
    ----------
    devices : of :func:`unknown`; nothing is said where it is "".
    policy, sharding : who may reckon.
    """
    asking = [policy.name] if _asks(policy) else []
    by_window = isinstance(sharding, Heterogeneous) and not sharding.overlap
    asking += [f"sharding {sharding.name}"] if sharding is not None and (by_window or sharding.by_price) else []
    if devices and asking:
        warnings.warn(
            f"without cluster= {' and '.join(asking)} reckons with the rates of an A100, and this runs on "
            f"{devices[:200]}: replicas that would pay may not be made, and others be. Measure with `poise calibrate` "
            "and give cluster=Cluster.parse(FILE), or take policy='poise:objective=tokens', which asks no rates",
            stacklevel=3,
        )  # fmt: skip


def _asks(policy: StepPolicy) -> bool:
    """Whether a policy looks at seconds; one that is not ours may."""
    if isinstance(policy, Poise):
        return policy.objective == "seconds"
    return not policy.overlap if type(policy) is Hecate else policy.name not in TOKENS_ONLY
