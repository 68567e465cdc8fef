"""Measured constants of one rank: its expert kernel, and the all-to-alls before and after it.

Fitted to public tables of kernel times (:mod:`poise.lab.calibrate.tables`), or read from a cluster file. A device's
time in one layer is (DESIGN 3.1)

    start + sum over its active experts e of (max(min(n_e, 1) * read_e, n_e * compute) + n_e * activations)

with ``read_e`` the seconds to read an expert's weights, ``compute`` those of a token's arithmetic at the peak of the
kernel's type, ``activations`` those to move its inputs, intermediate values and outputs; each with a fitted factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Self

from poise.util.errors import ClusterError

ACTIVATION_BYTES = 2.0
"""Bytes of an element of what experts take and give, in the activation term of the fit."""
MOST = 1e300
SAME_TYPE = 0.1
"""How far a model's bytes a weight may be from the kernel's: scales of blocks are counted by some and not by others."""
FLOWS = ("home", "home_device_dedup", "home_node_dedup")
"""What a library may send: a token's copy to every expert, once to a device, once to a node (poise.cost.traffic)."""
UNKNOWN_ERROR = 0.3
"""Relative error of constants whose own is not known."""


def same_type(weight_bytes: float, other: float) -> bool:
    """Whether weights of so many bytes may be of one type."""
    return abs(weight_bytes / other - 1.0) <= SAME_TYPE


def _positive(about: str, value: Any, *, over: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST and value == value
    if not good or value < 0 or (over and value == 0):
        raise ClusterError(f"{about} must be finite and {'above' if over else 'at least'} 0, got {value!r}")


def _below_one(about: str, value: float) -> None:
    if value >= 1:
        raise ClusterError(f"{about} is a relative one and must be below 1, got {value!r}")


def _known_keys(kind: type, about: str, data: Any) -> dict[str, Any]:
    """The entries of a mapping from a file, or ClusterError that names the key that is unknown or missing."""
    if not isinstance(data, Mapping):
        raise ClusterError(f"{about} must be a mapping, got {str(data)[:80]!r}")
    names = [field.name for field in fields(kind)]
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    unknown, missing = [key for key in data if key not in names], [key for key in needed if key not in data]
    if unknown or missing:
        wrong = f"does not know {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ClusterError(f"{about} {wrong}", hint=f"keys: {', '.join(names)}")
    return dict(data)


@dataclass(frozen=True, slots=True)
class ExpertKernel:
    """The grouped expert kernel of one rank, as measured.

    Parameters
    ----------
    name : where it was measured, e.g. ``vllm.fp8_block``.
    type : of its weights: bf16, fp8, fp8_block, nvfp4, mxfp4, int4, ...
    weight_bytes : bytes of a weight in that type.
    start_s : seconds of a layer that depend on no load: launches, sorting.
    read_factor, compute_factor, activation_factor : measured over ideal seconds of the three terms.
    flops_per_s, memory_bytes_per_s : the ideal: peak of the type and memory bandwidth of one device.
    error : mean relative error on shapes that were not fitted; 0.3 where it is not known.
    """

    name: str
    type: str
    weight_bytes: float
    start_s: float
    read_factor: float
    compute_factor: float
    activation_factor: float
    flops_per_s: float
    memory_bytes_per_s: float
    error: float = UNKNOWN_ERROR

    def __post_init__(self) -> None:
        for attr in ("weight_bytes", "read_factor", "compute_factor", "flops_per_s", "memory_bytes_per_s"):
            _positive(f"{attr} of kernel {self.name}", getattr(self, attr), over=True)
        for attr in ("start_s", "activation_factor", "error"):
            _positive(f"{attr} of kernel {self.name}", getattr(self, attr))
        _below_one(f"error of kernel {self.name}", self.error)

    def times(self, group: int) -> ExpertKernel:
        """The kernel on a device of ``group`` GPUs: their rates together, the start of one."""
        return replace(self, flops_per_s=self.flops_per_s * group, memory_bytes_per_s=self.memory_bytes_per_s * group)

    @classmethod
    def from_dict(cls, data: Any, about: str) -> Self:
        """From a mapping in a file; ``about`` names the place in errors."""
        found = _known_keys(cls, about, data)
        return cls(**{**found, "name": str(found["name"])[:80], "type": str(found["type"])[:40]})

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a cluster file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ExchangeWay:
    """One direction of the exchange of tokens, as measured.

    Parameters
    ----------
    start_s, peer_s, nodes_start_s : seconds that it takes whatever is sent: in all, for each other device, and once
        more where devices are on several nodes.
    intra_bytes_per_s, inter_bytes_per_s : of a device's port inside its node and between nodes; None: not measured,
        the cluster's own.
    error : mean relative error; 0.3 where it is not known.
    """

    start_s: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float | None = None
    peer_s: float = 0.0
    nodes_start_s: float | None = None
    error: float = UNKNOWN_ERROR

    def __post_init__(self) -> None:
        _positive("intra_bytes_per_s of an all-to-all", self.intra_bytes_per_s, over=True)
        if self.inter_bytes_per_s is not None:
            _positive("inter_bytes_per_s of an all-to-all", self.inter_bytes_per_s, over=True)
        for attr in ("start_s", "peer_s", "error"):
            _positive(f"{attr} of an all-to-all", getattr(self, attr))
        _below_one("error of an all-to-all", self.error)
        if self.nodes_start_s is not None:
            _positive("nodes_start_s of an all-to-all", self.nodes_start_s)

    def times(self, group: int, *, shared: bool = False) -> ExchangeWay:
        """Of devices of ``group`` GPUs; a ``shared`` port of a node does not grow with them."""
        inter = self.inter_bytes_per_s
        inter = inter if inter is None or shared else inter * group
        return replace(self, intra_bytes_per_s=self.intra_bytes_per_s * group, inter_bytes_per_s=inter)


@dataclass(frozen=True, slots=True)
class AllToAllLinks:
    """Dispatch and combine of one library, e.g. ``deepep-ll`` (DeepEP's low-latency kernels).

    Parameters
    ----------
    name : where it was measured.
    dispatch, combine : the two directions.
    doubtful : what is said of the network rests on rows of doubtful origin.
    flow : what it sends, one of :data:`FLOWS`.
    """

    name: str
    dispatch: ExchangeWay
    combine: ExchangeWay
    doubtful: bool = False
    flow: str = "home_node_dedup"

    def __post_init__(self) -> None:
        if self.flow not in FLOWS:
            raise ClusterError(f"flow of an all-to-all is {str(self.flow)[:40]!r}", hint=f"one of {', '.join(FLOWS)}")

    def times(self, group: int, *, shared: bool = False) -> AllToAllLinks:
        """The same between devices of ``group`` GPUs: their ports together, the start of one."""
        ways = [way.times(group, shared=shared) for way in (self.dispatch, self.combine)]
        return replace(self, dispatch=ways[0], combine=ways[1])

    def inside_nodes(self) -> AllToAllLinks:
        """The same without what was measured between nodes: there the cluster's own port and start count."""
        ways = [replace(way, inter_bytes_per_s=None, nodes_start_s=None) for way in (self.dispatch, self.combine)]
        return replace(self, dispatch=ways[0], combine=ways[1], doubtful=False)

    @classmethod
    def from_dict(cls, data: Any, about: str) -> Self:
        """From a mapping in a file; ``about`` names the place in errors."""
        found = _known_keys(cls, about, data)
        out, back = (
            ExchangeWay(**_known_keys(ExchangeWay, f"{about} {way}", found[way])) for way in ("dispatch", "combine")
        )
        more = {"flow": found["flow"]} if "flow" in found else {}
        return cls(str(found["name"])[:80], out, back, bool(found.get("doubtful", False)), **more)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a cluster file."""
        return asdict(self)
