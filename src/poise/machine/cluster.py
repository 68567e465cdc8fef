"""The machine: nodes, devices (EP ranks) and the ports that join them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.machine.constants import DATASHEET, kernel_of, links_of, plain_link
from poise.machine.curve import MeasuredCurve
from poise.machine.kernel import AllToAllLinks, ExchangeWay, ExpertKernel
from poise.machine.presets import DEVICES
from poise.util.errors import ClusterError
from poise.util.words import close_to
from poise.util.yamlfile import dump_yaml, read_yaml

MAX_DEVICES = 65_536


class Wire(NamedTuple):
    """What carries one kind of traffic: seconds to start, bytes/s of a device's port in its node and between nodes."""

    start_s: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float


def same_node(node_D: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether two devices lie in one node, bool [D, D], by the node of each."""
    same: NDArray[np.bool_] = node_D[:, None] == node_D[None, :]
    return same


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
    peer_latency_s : start-up seconds of an all-to-all that each other device adds.
    expert_curve : seconds of an expert as measured here, in place of the roofline of ``flops_per_s`` and
        ``memory_bytes_per_s``.
    kernel : constants of a measured expert kernel, in place of that roofline; not both.
    links : measured dispatch and combine; weights and counts travel by the ports and latencies above.
    preset : of :data:`poise.machine.presets.DEVICES` that it was made from, "" if from none.
    open : ``kernel`` and ``links`` where measured constants of the preset take their place once model and batch are
        known (:func:`poise.machine.settle.settle`).
    tensor_parallel : GPUs of a device.
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
    peer_latency_s: float = 0.0
    expert_curve: MeasuredCurve | None = None
    kernel: ExpertKernel | None = None
    links: AllToAllLinks | None = None
    preset: str = ""
    open: tuple[str, ...] = ()
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if np.asarray(self.node_D).dtype.kind not in "iu":
            raise ClusterError(f"node numbers must be whole numbers, got {np.asarray(self.node_D).dtype}")
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
        for attr in LATENCIES:
            value = getattr(self, attr)
            if not (np.isfinite(value) and value >= 0):
                raise ClusterError(f"{attr} must be finite and at least 0, got {value!r}")
        if self.expert_curve is not None and not isinstance(self.expert_curve, MeasuredCurve):
            raise ClusterError(f"expert_curve must be a MeasuredCurve, got {type(self.expert_curve).__name__}")
        if self.open and self.preset not in DEVICES:
            raise ClusterError(
                f"a cluster that leaves {' and '.join(self.open)} open needs a preset, got {self.preset!r}"
            )
        if self.expert_curve is not None and self.kernel is not None:
            raise ClusterError(f"a cluster has expert_curve or kernel, got both ({self.kernel.name})")
        node.flags.writeable = speed.flags.writeable = False
        object.__setattr__(self, "node_D", node)
        object.__setattr__(self, "speed_D", speed)

    @property
    def num_devices(self) -> int:
        """D."""
        return int(self.node_D.size)

    def without(self, lost: Collection[int]) -> Cluster:
        """What is left when some devices are lost, in their order; nodes that have none left are gone.

        Raises
        ------
        ClusterError : none is left.
        """
        stays = ~np.isin(np.arange(self.num_devices), list(lost))
        node_D = np.unique(self.node_D[stays], return_inverse=True)[1].astype(np.int32)
        return replace(self, node_D=node_D, speed_D=self.speed_D[stays])

    @property
    def num_nodes(self) -> int:
        """N."""
        return int(self.node_D[-1]) + 1

    @property
    def devices_per_node_N(self) -> NDArray[np.int64]:
        """Devices of each node, int [N]."""
        return np.bincount(self.node_D, minlength=self.num_nodes)

    @property
    def first_N(self) -> NDArray[np.int64]:
        """First device of each node, int [N]."""
        return np.flatnonzero(np.diff(self.node_D, prepend=-1))

    @property
    def same_node_DD(self) -> NDArray[np.bool_]:
        """Whether two devices lie in one node, bool [D, D]."""
        return same_node(self.node_D)

    def sum_by_node(self, values: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        """Sum over the devices of each node: [..., D] -> [..., N], where ``axis`` is that of devices."""
        out: NDArray[np.float64] = np.add.reduceat(values, self.first_N, axis=axis)
        return out

    @property
    def slowest_bytes_per_s(self) -> float:
        """Of the slowest port that a weight may have to pass: the network's with several nodes, else the node's."""
        return self.inter_bytes_per_s if self.num_nodes > 1 else self.intra_bytes_per_s

    @property
    def plain_wire(self) -> Wire:
        """What carries weights and counts; its start is an all-to-all's over all devices, 0 for a single one."""
        if self.num_devices == 1:
            return Wire(0.0, self.intra_bytes_per_s, self.inter_bytes_per_s)
        start = self.intra_latency_s + (self.inter_latency_s if self.num_nodes > 1 else 0.0)
        start += self.peer_latency_s * (self.num_devices - 1)
        return Wire(start, self.intra_bytes_per_s, self.inter_bytes_per_s)

    @property
    def dispatch_wire(self) -> Wire:
        """What carries tokens to experts."""
        return self.plain_wire if self.links is None else self._wire(self.links.dispatch)

    @property
    def combine_wire(self) -> Wire:
        """What carries expert outputs back."""
        return self.plain_wire if self.links is None else self._wire(self.links.combine)

    def _wire(self, way: ExchangeWay) -> Wire:
        start, many = way.start_s + way.peer_s * (self.num_devices - 1), self.num_nodes > 1
        if many:
            start += self.inter_latency_s if way.nodes_start_s is None else way.nodes_start_s
        inter = self.inter_bytes_per_s if way.inter_bytes_per_s is None else way.inter_bytes_per_s
        return Wire(start if self.num_devices > 1 else 0.0, way.intra_bytes_per_s, inter)

    @classmethod
    def uniform(cls, nodes: int, devices_per_node: int, preset: str = "h100", *, tensor_parallel: int = 1) -> Cluster:
        """``nodes`` nodes of ``devices_per_node`` devices with a preset's datasheet (:mod:`poise.machine.presets`);
        :meth:`parse` has measured constants.

        A device may be a tensor-parallel group of several GPUs: its rates, memory and ports are theirs together.
        """
        return from_preset([devices_per_node] * nodes, preset, tensor_parallel=tensor_parallel)

    @classmethod
    def parse(cls, spec: str | Path) -> Cluster:
        """``"2x8"``, ``"2x8:h100"``, ``"2x4:h100@tp2"`` or a path to a YAML file; see docs/formats.md.

        A preset names what it is priced by: ``h100+vllm.fp8_block`` a measured kernel, ``h100+deepep-ll`` a measured
        library of all-to-alls, ``h100+vllm.fp8_block+deepep-ll`` both, ``h100+datasheet`` peaks. What is not named is
        left open until model and batch are known (:func:`poise.machine.settle.settle`).

        Raises
        ------
        ClusterError : the spec or file is malformed, or names an unknown preset, kernel or library.
        """
        text = str(spec)
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})(?::([\w.+-]+?))?(?:@tp(\d{1,3}))?", text)
        if match:
            nodes, devices, preset, group = match.groups()
            total = int(nodes) * int(devices)
            if not 1 <= total <= MAX_DEVICES:
                raise ClusterError(f"{text!r} has {total} devices, a cluster has 1 to {MAX_DEVICES}")
            return from_words([int(devices)] * int(nodes), preset or DEFAULT, tensor_parallel=int(group or 1))
        if text.endswith((".yaml", ".yml")):
            return from_yaml(Path(text))
        raise ClusterError(
            f"cannot read cluster {text!r}", hint="NxD as in 2x8, NxD:preset as in 2x8:h100, or a .yaml file"
        )

    def to_yaml(self) -> str:
        """The cluster as a YAML file that :meth:`parse` reads back as it was; every constant is written out."""
        per_node = self.devices_per_node_N.tolist()
        data: dict[str, Any] = {"name": self.name}
        if len(set(per_node)) == 1:
            data.update(nodes=len(per_node), devices_per_node=per_node[0])
        else:
            data["devices_per_node"] = per_node
        if (self.speed_D != 1).any():
            data["speed"] = self.speed_D.tolist()
        data.update({name: float(getattr(self, name)) for name in (*RATES, *LATENCIES)}, nic_shared=self.nic_shared)
        for name in ("expert_curve", "kernel", "links"):
            value = getattr(self, name)
            if value is not None:
                data[name] = value.to_dict()
        data.update(preset=self.preset, tensor_parallel=self.tensor_parallel, open=list(self.open))
        return dump_yaml(data)

    def __repr__(self) -> str:
        per_node = self.devices_per_node_N
        shape = f"{self.num_nodes}x{per_node[0]}" if (per_node == per_node[0]).all() else f"{per_node.tolist()}"
        return f"Cluster({shape} {self.name}, {self.num_devices} devices)"


MAX_YAML_BYTES = 2**20
DEFAULT = "h100"
RATES = ("flops_per_s", "memory_bytes_per_s", "memory_bytes", "intra_bytes_per_s", "inter_bytes_per_s")
KERNEL_KEYS = {"kernel", "expert_curve", "flops_per_s", "memory_bytes_per_s"}
LINK_KEYS = {"links", "intra_bytes_per_s", "intra_latency_s", "peer_latency_s"}
"""Constants of which one that is given says that the kernel, or the links, are not to be looked up. A network of one's
own goes with links that are."""
LATENCIES = ("intra_latency_s", "inter_latency_s", "peer_latency_s")
CURVE_KEYS = ("tokens", "seconds", "parameters", "weight_bytes")
YAML_KEYS = (
    "preset",
    "tensor_parallel",
    "nodes",
    "devices_per_node",
    "speed",
    "nic_shared",
    "name",
    "expert_curve",
    "kernel",
    "links",
    "open",
    *RATES,
    *LATENCIES,
)


def from_preset(
    devices_per_node: Sequence[int],
    preset: str,
    *,
    tensor_parallel: int = 1,
    speed: Sequence[float] | None = None,
    **overrides: Any,
) -> Cluster:
    """A cluster of nodes with the given device counts, a preset's constants, and overrides by field name.

    ``tensor_parallel`` multiplies the preset's constants, not the overrides: those are of one device as it is.
    """
    if preset not in DEVICES:
        raise ClusterError(f"unknown cluster preset {preset!r}", hint=close_to(preset, DEVICES))
    if not 1 <= tensor_parallel <= 64:
        raise ClusterError(f"tensor_parallel must lie in 1..64, got {tensor_parallel}")
    if not devices_per_node or min(devices_per_node) < 1 or sum(devices_per_node) > MAX_DEVICES:
        raise ClusterError(
            f"a cluster has 1 to {MAX_DEVICES} devices and at least one a node, got {list(devices_per_node)[:8]}"
        )
    constants: dict[str, Any] = {name: DEVICES[preset][name] * tensor_parallel for name in RATES}
    if overrides.get("nic_shared"):  # the node's one port does not grow with the groups behind it
        constants["inter_bytes_per_s"] = DEVICES[preset]["inter_bytes_per_s"]
    node = np.repeat(np.arange(len(devices_per_node), dtype=np.int32), devices_per_node)
    constants["name"] = preset + (f"@tp{tensor_parallel}" if tensor_parallel > 1 else "")
    constants.update(preset=preset, tensor_parallel=tensor_parallel)
    constants.update(overrides)
    return Cluster(node, np.ones(node.size) if speed is None else np.asarray(speed, dtype=np.float64), **constants)


def from_words(devices_per_node: Sequence[int], words: str, *, tensor_parallel: int = 1, **overrides: Any) -> Cluster:
    """A cluster of ``preset[+kernel][+library]``, or ``preset+datasheet`` (:meth:`Cluster.parse`).

    Raises
    ------
    ClusterError : a word is neither, or one stands twice.
    """
    preset, *more = words.split("+")
    if preset not in DEVICES:
        raise ClusterError(f"unknown cluster preset {preset!r}", hint=close_to(preset, DEVICES))
    chosen: dict[str, Any] = {}
    for word in more:
        kind = DATASHEET if word == DATASHEET else "kernel" if "." in word else "links"
        if kind in chosen or (more.count(DATASHEET) and len(more) > 1):
            raise ClusterError(f"{words!r}: {word!r} is one too many", hint="one kernel and one library, or datasheet")
        if kind == "kernel":
            chosen[kind] = kernel_of(preset, *word.split(".", 1)).times(tensor_parallel)
        elif kind == "links":
            found = links_of(preset, word, many_nodes=len(devices_per_node) > 1)
            chosen[kind] = found.times(tensor_parallel, shared=bool(overrides.get("nic_shared")))
        else:
            chosen[kind] = True
    peaks = chosen.pop(DATASHEET, False)
    given = {**chosen, **overrides}
    for kind, keys in (("kernel", KERNEL_KEYS), ("links", LINK_KEYS | {"inter_bytes_per_s", "inter_latency_s"})):
        both = sorted(overrides.keys() & keys)
        if (kind in chosen and both) or (kind in given and kind in overrides.get("open", ())):
            raise ClusterError(
                f"{words!r} has {kind} {given[kind].name}, and {', '.join(both) or 'open'} beside it",
                hint="name a measured one, or give its constants, not both",
            )
    left = {"kernel": KERNEL_KEYS, "links": LINK_KEYS}
    still = () if peaks else tuple(kind for kind, keys in left.items() if not given.keys() & keys)
    plain = None if peaks or overrides.keys() & LINK_KEYS - {"links"} else plain_link(preset)
    if plain is not None:
        chosen.update(intra_bytes_per_s=plain.intra_bytes_per_s * tensor_parallel, intra_latency_s=plain.start_s)
    more_of = {"name": words + (f"@tp{tensor_parallel}" if tensor_parallel > 1 else ""), "open": still}
    return from_preset(devices_per_node, preset, tensor_parallel=tensor_parallel, **{**more_of, **chosen, **overrides})


def from_yaml(path: Path) -> Cluster:
    """A cluster from a YAML file; the keys are listed in docs/formats.md."""
    data = read_yaml(path, MAX_YAML_BYTES, ClusterError)
    if not isinstance(data, dict):
        raise ClusterError(f"{path} must hold keys and values, got {type(data).__name__}")
    for key in data:
        if key not in YAML_KEYS:
            raise ClusterError(f"{path}: unknown key {key!r}", hint=close_to(str(key), YAML_KEYS))
    for key in (*RATES, *LATENCIES):
        if key in data:
            data[key] = _number(path, key, data[key])
    per_node = data.pop("devices_per_node", None)
    nodes = data.pop("nodes", None)
    if isinstance(per_node, list):
        counts = [_whole(path, "devices_per_node", value) for value in per_node]
        if nodes is not None and nodes != len(counts):
            raise ClusterError(f"{path}: nodes is {nodes}, devices_per_node lists {len(counts)}")
    else:
        many = _whole(path, "nodes", 1 if nodes is None else nodes)
        each = _whole(path, "devices_per_node", per_node)
        if many * each > MAX_DEVICES:
            raise ClusterError(f"{path}: {many} x {each} devices, at most {MAX_DEVICES}")
        counts = [each] * many
    speed = data.pop("speed", None)
    if speed is not None:
        if not isinstance(speed, list):
            raise ClusterError(f"{path}: speed must list one number a device, got {speed!r}")
        speed = [_number(path, "speed", value) for value in speed]
    if not isinstance(data.get("nic_shared", False), bool):
        raise ClusterError(f"{path}: nic_shared must be true or false, got {data['nic_shared']!r}")
    if "expert_curve" in data:
        data["expert_curve"] = _curve(path, data["expert_curve"])
    if "kernel" in data:
        data["kernel"] = ExpertKernel.from_dict(data["kernel"], f"{path}: kernel")
    if "links" in data:
        data["links"] = AllToAllLinks.from_dict(data["links"], f"{path}: links")
    if "open" in data:
        data["open"] = _open(path, data["open"])
    data["name"] = str(data.get("name", path.name))[:80]
    if data.get("preset") == "":  # a cluster that was made from none, with all its constants
        del data["preset"]
        missing = [key for key in RATES if key not in data]
        if missing:
            raise ClusterError(f"{path}: without a preset {missing[0]} must be given")
        group = _whole(path, "tensor_parallel", data.pop("tensor_parallel", 1))
        return replace(from_preset(counts, DEFAULT, speed=speed, **data), preset="", tensor_parallel=group)
    preset, group = str(data.pop("preset", DEFAULT)), _whole(path, "tensor_parallel", data.pop("tensor_parallel", 1))
    return from_words(counts, preset, tensor_parallel=group, speed=speed, **data)


def _open(path: Path, value: Any) -> tuple[str, ...]:
    """The list ``open``."""
    if not isinstance(value, list) or not all(one in ("kernel", "links") for one in value):
        raise ClusterError(f"{path}: open lists kernel and links, got {str(value)[:80]!r}")
    return tuple(value)


def _curve(path: Path, value: Any) -> MeasuredCurve:
    """The mapping ``expert_curve``: lists of tokens and seconds, parameters, and weight_bytes if not 2."""
    if not isinstance(value, dict):
        raise ClusterError(f"{path}: expert_curve must be a mapping, got {value!r}", hint=", ".join(CURVE_KEYS))
    unknown, missing = [key for key in value if key not in CURVE_KEYS], [k for k in CURVE_KEYS[:3] if k not in value]
    if unknown or missing:
        wrong = f"does not know {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ClusterError(f"{path}: expert_curve {wrong}", hint=f"keys: {', '.join(CURVE_KEYS)}")
    knots: list[NDArray[np.float64]] = []
    for key in CURVE_KEYS[:2]:
        if not isinstance(value[key], list):
            raise ClusterError(f"{path}: {key} of expert_curve must be a list, got {value[key]!r}")
        knots.append(np.array([_number(path, f"expert_curve {key}", one) for one in value[key]]))
    sizes = [_number(path, f"expert_curve {key}", value.get(key, 2.0)) for key in CURVE_KEYS[2:]]
    try:
        return MeasuredCurve(knots[0], knots[1], sizes[0], sizes[1])
    except ClusterError as error:
        raise ClusterError(f"{path}: {error.message}", hint=error.hint) from None


def _number(path: Path, key: str, value: Any) -> float:
    """A finite float; a text is none, whatever Python would make of it."""
    try:
        out = float(value) if type(value) in (int, float) else np.nan
    except OverflowError:
        out = np.nan
    if not np.isfinite(out):
        raise ClusterError(f"{path}: {key} must be a finite number, got {str(value)[:80]!r}")
    return out


def _whole(path: Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_DEVICES:
        raise ClusterError(f"{path}: {key} must be a whole number in 1..{MAX_DEVICES}, got {value!r}")
    return value
