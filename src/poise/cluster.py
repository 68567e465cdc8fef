"""The machine: nodes, devices (EP ranks) and the ports that join them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from poise.errors import ClusterError

MAX_DEVICES = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class Cluster:
    """D devices on N nodes. A device is one EP rank: a GPU, or a tensor-parallel group of GPUs.

    Parameters
    ----------
    node_D : int [D], node of each device, non-decreasing from 0 without gaps.
    speed_D : float [D], relative speed of each device (1 = as the constants below say).
    flops_per_s : dense matrix throughput of one device in the serving dtype, FLOP/s.
    memory_bytes_per_s : memory bandwidth of one device, bytes/s.
    memory_bytes : memory of one device, bytes.
    intra_bytes_per_s : port of one device into its node's fabric, bytes/s each way.
    inter_bytes_per_s : network port, bytes/s each way, of one device, or of one node if ``nic_shared``.
    nic_shared : one network port per node instead of one per device.
    intra_latency_s, inter_latency_s : start-up seconds of an all-to-all inside a node, across nodes.
    name : preset or file it came from.
    """

    node_D: NDArray[np.int32]
    speed_D: NDArray[np.float64]
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    nic_shared: bool = False
    intra_latency_s: float = 10e-6
    inter_latency_s: float = 30e-6
    name: str = field(default="custom")

    def __post_init__(self) -> None:
        node = np.array(self.node_D, dtype=np.int32)
        speed = np.array(self.speed_D, dtype=np.float64)
        if node.ndim != 1 or not 1 <= node.size <= MAX_DEVICES:
            raise ClusterError(f"a cluster has 1 to {MAX_DEVICES} devices, got shape {node.shape}")
        if node[0] != 0 or np.any((np.diff(node) < 0) | (np.diff(node) > 1)):
            raise ClusterError("node numbers must start at 0 and rise without gaps", hint="sort devices by node")
        if speed.shape != node.shape:
            raise ClusterError(f"{speed.size} speeds for {node.size} devices")
        if not (np.isfinite(speed).all() and (speed > 0).all()):
            raise ClusterError(f"device speeds must be finite and above 0, got {speed.min():g} to {speed.max():g}")
        positive = ("flops_per_s", "memory_bytes_per_s", "memory_bytes", "intra_bytes_per_s", "inter_bytes_per_s")
        for attr in positive:
            value = getattr(self, attr)
            if not (np.isfinite(value) and value > 0):
                raise ClusterError(f"{attr} must be finite and above 0, got {value!r}")
        for attr in ("intra_latency_s", "inter_latency_s"):
            value = getattr(self, attr)
            if not (np.isfinite(value) and value >= 0):
                raise ClusterError(f"{attr} must be finite and at least 0, got {value!r}")
        node.flags.writeable = speed.flags.writeable = False
        object.__setattr__(self, "node_D", node)
        object.__setattr__(self, "speed_D", speed)

    @property
    def num_devices(self) -> int:
        """D."""
        return int(self.node_D.size)

    @property
    def num_nodes(self) -> int:
        """N."""
        return int(self.node_D[-1]) + 1

    @property
    def devices_per_node_N(self) -> NDArray[np.int64]:
        """Devices of each node, int [N]."""
        return np.bincount(self.node_D, minlength=self.num_nodes)

    @classmethod
    def parse(cls, spec: str | Path) -> Cluster:
        """``"2x8"``, ``"2x8:h100"`` (:data:`PRESETS`) or a path to a YAML file; see docs/formats.md."""
        raise NotImplementedError

    def __repr__(self) -> str:
        per_node = self.devices_per_node_N
        shape = f"{self.num_nodes}x{per_node[0]}" if (per_node == per_node[0]).all() else f"{per_node.tolist()}"
        return f"Cluster({shape} {self.name}, {self.num_devices} devices)"
