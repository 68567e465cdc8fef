"""What is emulated: nodes, devices, the rates of their ports, and how much slower than life it runs."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field

from poise.machine.cluster import Cluster
from poise.util.errors import ClusterError

LIMIT_BYTES_PER_S_PER_CORE = 0.5e9
"""Sum of port rates that a core is trusted with (docs/emulation.md has the measurement behind it)."""
MIN_BYTES_PER_S = 1e6
"""Below this, one 64 KiB segment holds a port for longer than 65 ms and the rates of short messages mean nothing."""
MAX_DEVICES = 64


@dataclass(frozen=True, slots=True)
class EmulatedCluster:
    """N nodes of equally many devices, one process a device, on one machine.

    Parameters
    ----------
    nodes, devices_per_node : the shape; at most 64 devices.
    intra_bytes_per_s : egress, and ingress, of each device into its node's fabric, bytes per second of this
        machine's clock. None: not limited.
    inter_bytes_per_s : egress, and ingress, of each device's network port, or of each node's if ``nic_shared``.
        None: not limited.
    nic_shared : one network port a node instead of one a device.
    dilation : emulated seconds are this many times longer than the real cluster's. The rates above are dilated
        already; the number is kept for device clocks and for reports.
    limit_bytes_per_s : what all ports together may carry on this machine. The self-test measures it; the default is
        0.5 GB/s a core.

    Raises
    ------
    ClusterError : a value is out of range, or the ports together exceed the limit.
    """

    nodes: int
    devices_per_node: int
    intra_bytes_per_s: float | None = None
    inter_bytes_per_s: float | None = None
    nic_shared: bool = False
    dilation: float = 1.0
    limit_bytes_per_s: float = field(default_factory=lambda: LIMIT_BYTES_PER_S_PER_CORE * len(os.sched_getaffinity(0)))

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.devices_per_node < 1 or self.num_devices > MAX_DEVICES:
            raise ClusterError(
                f"{self.nodes} nodes of {self.devices_per_node} devices: an emulated cluster has 1 to {MAX_DEVICES}"
            )
        for name in ("intra_bytes_per_s", "inter_bytes_per_s"):
            rate = getattr(self, name)
            if rate is not None and not (math.isfinite(rate) and rate >= MIN_BYTES_PER_S):
                raise ClusterError(
                    f"{name} is {rate:g}, an emulated link carries at least {MIN_BYTES_PER_S:g} bytes/s",
                    hint="a smaller dilation, or None for a link without limit",
                )
        for name in ("dilation", "limit_bytes_per_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ClusterError(f"{name} must be finite and above 0, got {value!r}")
        if self.total_bytes_per_s > self.limit_bytes_per_s:
            factor = self.total_bytes_per_s / self.limit_bytes_per_s
            raise ClusterError(
                f"all ports together carry {self.total_bytes_per_s:.3g} bytes/s, "
                f"this machine holds its rates up to {self.limit_bytes_per_s:.3g}",
                hint=f"dilate {factor:.3g} times more, use fewer devices, or measure the limit with --selftest",
            )

    @classmethod
    def from_cluster(
        cls, cluster: Cluster, dilation: float, *, limit_bytes_per_s: float | None = None
    ) -> EmulatedCluster:
        """The cluster with every link ``dilation`` times slower. Latency, memory, FLOPs and device speeds stay out.

        Raises
        ------
        ClusterError : nodes differ in their number of devices, or the machine cannot carry the rates.
        """
        if not (math.isfinite(dilation) and dilation > 0):
            raise ClusterError(f"dilation must be finite and above 0, got {dilation!r}")
        counts = cluster.devices_per_node_N
        if counts.min() != counts.max():
            raise ClusterError(f"an emulated cluster has equal nodes, got {counts.min()} and {counts.max()} devices")
        limit = {} if limit_bytes_per_s is None else {"limit_bytes_per_s": limit_bytes_per_s}
        return cls(
            nodes=cluster.num_nodes,
            devices_per_node=int(counts[0]),
            intra_bytes_per_s=cluster.intra_bytes_per_s / dilation,
            inter_bytes_per_s=cluster.inter_bytes_per_s / dilation,
            nic_shared=cluster.nic_shared,
            dilation=dilation,
            **limit,
        )

    @property
    def num_devices(self) -> int:
        """D."""
        return self.nodes * self.devices_per_node

    @property
    def total_bytes_per_s(self) -> float:
        """Bytes per second when every limited port sends at its rate; ports without a peer or a limit count nothing."""
        intra = self.num_devices * (self.intra_bytes_per_s or 0.0) if self.devices_per_node > 1 else 0.0
        ports = self.nodes if self.nic_shared else self.num_devices
        return intra + (ports * (self.inter_bytes_per_s or 0.0) if self.nodes > 1 else 0.0)

    def node_of(self, rank: int) -> int:
        """Node of a device."""
        return rank // self.devices_per_node


def parse_shape(text: str) -> tuple[int, int]:
    """Nodes and devices a node of ``"2x4"``.

    Raises
    ------
    ClusterError : it is not two whole numbers with an x between them.
    """
    match = re.fullmatch(r"(\d{1,3})x(\d{1,3})", text)
    if not match:
        raise ClusterError(f"cannot read cluster {text!r}", hint="NxD, as in 2x4: 2 nodes of 4 devices")
    return int(match[1]), int(match[2])
