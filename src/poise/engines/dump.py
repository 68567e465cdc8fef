"""What an engine wrote about its own run, in one shape for all engines.

A reader (:mod:`poise.engines.readers`) turns files into one :class:`EngineDump`. ``poise convert`` keeps its traffic
(``trace`` or ``profile``), ``poise verify`` compares what it says about slots with a placement, ``poise watch`` feeds
its loads to the controller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.routing.counters import COUNTERS, Counters
from poise.routing.ranks import READINGS, Reading
from poise.routing.said import AXES, COUNTED
from poise.routing.trace import MAX_EXPERTS, LoadProfile, RoutingTrace
from poise.util.errors import OptionError, TraceError


@dataclass(frozen=True, slots=True, eq=False)
class SlotRecord:
    """What was seen of physical slots.

    Parameters
    ----------
    layer_ids_L : int32 [L], decoder layers, ascending.
    map_LS : int32 [L, S], expert in each physical slot as the engine says it runs, -1 empty; None: it does not say.
    count_BLS : float64 [B, L, S], pairs that each slot computed in each record; None: not recorded.
    maps_agree : whether all ranks and records that name a map name the same; where False, ``map_LS`` is the last one.
    num_devices : devices that share the slots evenly, in order; None: it does not say.
    """

    layer_ids_L: NDArray[np.int32]
    map_LS: NDArray[np.int32] | None = None
    count_BLS: NDArray[np.float64] | None = None
    maps_agree: bool = True
    num_devices: int | None = None

    def __post_init__(self) -> None:
        layers = len(self.layer_ids_L)
        if self.map_LS is None and self.count_BLS is None:
            raise TraceError("a record of slots says neither what they hold nor what they computed")
        shapes = [None if self.map_LS is None else self.map_LS.shape,
                  None if self.count_BLS is None else self.count_BLS.shape[1:]]  # fmt: skip
        for shape in shapes:
            if shape is not None and (len(shape) != 2 or shape[0] != layers):
                raise TraceError(f"slots of shape {shape} for {layers} layers")
        if None not in shapes and shapes[0] != shapes[1]:
            raise TraceError(f"the map has {shapes[0]} layers and slots, the counts {shapes[1]}")


@dataclass(frozen=True, slots=True, eq=False)
class BalanceLog:
    """What a log says beside each balance, line by line.

    Parameters
    ----------
    mean_B, most_B : float64 [B], the two numbers that the balance is the ratio of.
    rearranged_B : int64 [B], rearrangements seen before the line; None: the log does not count steps.
    own_balancer : the engine's own load balancer may have made maps: nothing in the log rules it out.
    """

    mean_B: NDArray[np.float64]
    most_B: NDArray[np.float64]
    rearranged_B: NDArray[np.int64] | None = None
    own_balancer: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class EngineDump:
    """One engine's record of its run. At least one of ``trace``, ``profile``, ``slots`` and ``balance_B`` is there.

    Parameters
    ----------
    engine : ``sglang``, ``vllm``, ``tensorrt-llm``, ``vllm-ascend``, ... or ``poise``.
    kind : the format, as in docs/dumps.md (``stat``, ``per-token``, ``routed-experts``, ...).
    trace : routing token by token, logical ids, MoE layers only.
    profile : loads, logical ids, MoE layers only.
    slots : what physical slots held and computed.
    balance_B : float64 [B], mean over fullest device as the engine reported it; None: it did not.
    log : the numbers behind ``balance_B``, where a log has them.
    recorded_layers : layers that the record has, those without load (dense ones) included; None: unknown.
    layers_by_place : the record names no layers and no model was given, so they are numbered by their place.
    notes : what a user should know: layers left out, rows dropped, what had to be assumed.
    placement : where the file is a placement of poise.
    """

    engine: str
    kind: str
    trace: RoutingTrace | None = None
    profile: LoadProfile | None = None
    slots: SlotRecord | None = None
    balance_B: NDArray[np.float64] | None = None
    log: BalanceLog | None = None
    recorded_layers: int | None = None
    layers_by_place: bool = False
    notes: tuple[str, ...] = field(default=())
    placement: Placement | None = None

    def __post_init__(self) -> None:
        if self.trace is None and self.profile is None and self.slots is None and self.balance_B is None:
            raise TraceError(f"{self.engine} {self.kind}: neither tokens, loads, slots nor a balance are in it")

    @property
    def traffic(self) -> RoutingTrace | LoadProfile:
        """Tokens where they are known, else loads.

        Raises
        ------
        TraceError : the dump says what slots hold, or how balanced devices were, and nothing about traffic.
        """
        found = self.trace if self.trace is not None else self.profile
        if found is None:
            what = "the balance of devices" if self.slots is None else "a map of slots"
            hint = "'poise verify' compares it with a plan"
            if self.slots is not None:
                hint += "; 'poise convert --devices D' writes it as a placement"
            raise TraceError(f"{self.engine} {self.kind}: {what}, no traffic", hint=hint)
        return found

    def __repr__(self) -> str:
        parts = [repr(self.trace)] if self.trace is not None else []
        if self.profile is not None:
            p = self.profile
            parts.append(f"loads of {p.num_steps} steps, {p.num_layers} layers, {p.num_experts} experts")
        if self.slots is not None:
            s = self.slots
            shape = s.map_LS.shape if s.map_LS is not None else s.count_BLS.shape[1:]  # type: ignore[union-attr]
            has = " and ".join(n for n, v in (("map", s.map_LS), ("counts", s.count_BLS)) if v is not None)
            parts.append(f"{has} of {shape[1]} slots in {shape[0]} layers")
        if self.balance_B is not None:
            parts.append(f"balance {float(self.balance_B.mean()):.3f} of 1, mean of {len(self.balance_B)}")
        return f"EngineDump({self.engine} {self.kind}: {'; '.join(parts)})"


@dataclass(frozen=True, slots=True, eq=False)
class ReadOptions:
    """What a dump does not say of itself.

    Parameters
    ----------
    model : which decoder layers are MoE layers, E, K.
    placement : what physical slots hold, where the dump counts slots and has no map.
    num_experts, top_k : E and K, where no model is named.
    zero_experts : identity experts, which the router names by ids from E on, where the model does not say.
    format : a format by its name (:data:`poise.engines.readers.FORMATS`) instead of detection.
    relabelling : ``poise-relabelling.json`` of the relabelled checkpoint that ran, or its folder: ids of the original
        model come out.
    ranks : what loads of several files that do not show it are: ``sum``, parts of the same passes by several ranks, or
        ``steps``, passes one after another.
    allow_missing_ranks : whether a rank that recorded nothing is a note; else it is an error.
    counters : what several records of loads are: ``steps``, each counts its own tokens, or ``running`` totals of
        counters that were not set back. None: steps, and what shows that it is none is an error.
    allow_running : whether records that seem to be running totals are a note, and read as steps; else an error.

    Raises
    ------
    OptionError : a number is out of range, or contradicts the model.
    """

    model: ModelSpec | None = None
    placement: Placement | SlotRecord | None = None
    num_experts: int | None = None
    top_k: int | None = None
    format: str | None = None
    relabelling: str | Path | None = None
    ranks: Reading | None = None
    allow_missing_ranks: bool = False
    zero_experts: int | None = None
    counters: Counters | None = None
    allow_running: bool = False

    def __post_init__(self) -> None:
        for name, value, most in (("num_experts", self.num_experts, MAX_EXPERTS), ("top_k", self.top_k, MAX_EXPERTS)):
            if value is not None and not 1 <= value <= most:
                raise OptionError(f"{name} must lie in 1..{most}, got {value}")
            known = None if self.model is None else getattr(self.model, name)
            if None not in (value, known) and value != known:
                raise OptionError(f"{name} is {value}, {self.model.name} has {known}")  # type: ignore[union-attr]
        if self.ranks not in (None, *READINGS):
            raise OptionError(f"unknown reading of ranks {self.ranks!r}", hint=f"one of {', '.join(READINGS)}")
        if self.counters not in (None, *COUNTERS):
            raise OptionError(f"unknown counters {self.counters!r}", hint=f"one of {', '.join(COUNTERS)}")
        zeros, known = self.zero_experts or 0, 0 if self.model is None else self.model.num_zero_experts
        if not 0 <= zeros <= MAX_EXPERTS:
            raise OptionError(f"zero_experts must lie in 0..{MAX_EXPERTS}, got {zeros}")
        if known and self.zero_experts not in (None, known):
            raise OptionError(f"zero_experts is {zeros}, {self.model.name} has {known}")  # type: ignore[union-attr]
        if zeros and self.experts is None and self.relabelling is None:
            raise OptionError(
                f"{zeros} identity experts behind an unknown number of experts", hint="give --num-experts, or --model"
            )

    @property
    def said(self) -> frozenset[str]:
        """What the user says of loads (:data:`poise.routing.said.SAID`): what records are, or, by the format, axes."""
        return frozenset([COUNTED] * (self.counters is not None) + [AXES] * (self.format is not None))

    @property
    def experts(self) -> int | None:
        """E if known."""
        return self.num_experts if self.model is None else self.model.num_experts

    @property
    def zeros(self) -> int:
        """Identity experts: ids E to E + zeros - 1."""
        return self.zero_experts or (0 if self.model is None else self.model.num_zero_experts)

    @property
    def zeros_open(self) -> bool:
        """E was given by hand and nothing was said of identity experts: a few ids from E on may be theirs."""
        return self.model is None and self.relabelling is None and self.zero_experts is None and bool(self.num_experts)

    @property
    def router_experts(self) -> int | None:
        """Experts that a router can name, identity experts included, if known."""
        return None if self.experts is None else self.experts + self.zeros

    @property
    def k(self) -> int | None:
        """K if known."""
        return self.top_k if self.model is None else self.model.top_k

    @property
    def slot_map(self) -> SlotRecord | None:
        """The placement as what slots hold."""
        if isinstance(self.placement, Placement):
            return slots_of(self.placement)
        return self.placement


def slots_of(placement: Placement) -> SlotRecord:
    """A placement as what its slots hold; its number of devices where they share the slots evenly."""
    each = placement.slots_D
    devices = placement.num_devices if (each == each[0]).all() else None
    return SlotRecord(placement.layer_ids_L, placement.slot_expert_LS, num_devices=devices)


def placement_of(dump: EngineDump, num_devices: int | None = None, num_experts: int | None = None) -> Placement:
    """The map of a dump as a placement.

    Parameters
    ----------
    num_devices : D that share the slots evenly, where the dump does not say.
    num_experts : E; None: the largest id and one.

    Raises
    ------
    TraceError : it has no map, or ranks report different ones.
    OptionError : the number of devices is not known, is another one, or does not divide the slots.
    PlacementError : the map is no placement: an expert has no slot.
    """
    if dump.slots is None or dump.slots.map_LS is None:
        raise TraceError(f"{dump.engine} {dump.kind} does not say what slots hold", hint="leave --devices out")
    if not dump.slots.maps_agree:
        raise TraceError(f"{dump.engine} {dump.kind}: ranks report different maps", hint="name the file of one of them")
    known = dump.slots.num_devices if dump.placement is None else dump.placement.num_devices
    if num_devices is not None and known not in (None, num_devices):
        raise OptionError(f"--devices is {num_devices}, the file is for {known}", hint="leave --devices out")
    if dump.placement is not None:
        return dump.placement
    devices, map_LS = known or num_devices or 0, dump.slots.map_LS
    if devices < 1 or map_LS.shape[1] % devices:
        raise OptionError(
            f"{map_LS.shape[1]} slots cannot be shared evenly by {devices} devices", hint="give --devices"
        )
    device_S = np.repeat(np.arange(devices, dtype=np.int32), map_LS.shape[1] // devices)
    experts = num_experts or int(map_LS.max()) + 1
    return Placement(map_LS, device_S, experts, devices, dump.slots.layer_ids_L, method=dump.engine)
