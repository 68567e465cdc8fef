"""Whether the placement that was planned is the one that runs, and whether it balances as predicted. Pure.

Engines take a map and drop it in silence (docs/engines.md names cases). Evidence, strongest first:

    map      the engine says what its slots hold: compared slot by slot, layer by layer
    counts   slots and experts were both counted: the slots of an expert have to add up to its tokens
    balance  only a balance was reported: it lies nearer to what the plan gives on this traffic, or to the trivial map

A map in a file that an engine is given (and not one that it wrote) says what should run: never that it does. Measured
balance is compared with the even split of the same loads over the plan's replicas. An engine that sends each source to
its nearest replica is off that by its choice of replicas, not by the map.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from poise.cost.split import even_share
from poise.engines.dump import EngineDump, SlotRecord
from poise.engines.slots import trivial_row
from poise.errors import OptionError, PlacementError, TraceError
from poise.observe.profile import load_LE
from poise.planning.placement import EMPTY, Placement

State = Literal["live", "reordered", "trivial map", "other map", "counts agree", "counts disagree", "unseen"]
Evidence = Literal["map", "counts", "balance"]
RUNS: tuple[State, ...] = ("live", "reordered", "counts agree")
"""States in which every device holds what was planned for it."""
MAP_FILE = "map"
"""Kind of a dump that is a map and no more."""
COUNT_TOLERANCE = 1e-6
"""Counts are whole numbers; sums of them may be rounded."""


@dataclass(frozen=True, slots=True)
class LayerFinding:
    """One layer of the placement.

    Parameters
    ----------
    layer_id : decoder layer.
    state : what is known of its map.
    wrong : slots that hold another expert than planned (map), or experts whose slots do not add up (counts).
    measured, predicted : imbalance, fullest over mean device, mean over records; None: the dump does not tell.
    """

    layer_id: int
    state: State
    wrong: int = 0
    measured: float | None = None
    predicted: float | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """What a dump proves about a placement.

    Parameters
    ----------
    evidence : the strongest there is.
    layers : one finding a layer of the placement.
    live : whether the plan runs in every layer; None: the evidence does not tell.
    measured, predicted, trivial : balance, mean over fullest device, mean over layers and records: as it was, as the
        plan should give on this traffic, and as the map without a plan would; None: the dump does not tell.
    tolerance : relative, of balances that count as equal.
    recorded : the evidence comes from a run, not from a file that was made for one.
    maps_agree : ranks report one map.
    """

    evidence: Evidence
    layers: tuple[LayerFinding, ...]
    live: bool | None
    measured: float | None = None
    predicted: float | None = None
    trivial: float | None = None
    tolerance: float = 0.05
    recorded: bool = True
    maps_agree: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def as_predicted(self) -> bool | None:
        """Whether the measured balance is the predicted one or better; None: one of them is unknown."""
        if self.measured is None or self.predicted is None:
            return None
        return self.measured >= self.predicted * (1.0 - self.tolerance)

    def sentence(self) -> str:
        """The verdict in words."""
        head = self._by_balance() if self.evidence == "balance" else self._by_slots()
        if self.measured is not None and self.predicted is not None:
            how = "as predicted" if self.as_predicted else "worse than predicted"
            head += f"; balance {self.measured:.3f} of 1, {self.predicted:.3f} predicted: {how}"
        return head

    def _by_balance(self) -> str:
        if self.live is None:
            return "not decided: the reported balance does not tell the plan from the map without a plan"
        if self.live:
            return "the plan seems to run: the reported balance is nearer to its own than to the trivial map's"
        return "the plan does not seem to run: the reported balance is the trivial map's"

    def _by_slots(self) -> str:
        seen = [layer for layer in self.layers if layer.state != "unseen"]
        bad = [layer for layer in seen if layer.state not in RUNS]
        if not self.maps_agree:
            return "ranks report different maps: no plan runs on all of them"
        if bad:
            trivial = sum(layer.state == "trivial map" for layer in bad)
            what = "does not run" if self.recorded else "is not what the file holds"
            head = f"the plan {what} in {len(bad)} of {len(seen)} layers"
            return head + (f", {trivial} of them the trivial map" if trivial else "")
        where = (
            f"all {len(seen)} layers" if len(seen) == len(self.layers) else f"{len(seen)} of {len(self.layers)} layers"
        )
        if not self.recorded:
            return f"the file holds the plan in {where}; whether the engine runs it, it does not say"
        return f"the plan runs in {where}" + ("; the others were not seen" if len(seen) < len(self.layers) else "")


def verify(
    placement: Placement, dump: EngineDump, *, tolerance: float = 0.05, recorded: bool | None = None
) -> Verification:
    """Compare a placement with what an engine reports while it runs.

    Parameters
    ----------
    placement, dump : plan and evidence.
    tolerance : relative, in 0..1.
    recorded : whether a map file was written by the running engine; default: a map alone was not.

    Raises
    ------
    OptionError : the tolerance is out of range.
    PlacementError : the dump is of another model or number of slots.
    TraceError : the dump has neither slots nor a balance with loads.
    """
    if not 0 <= tolerance < 1:
        raise OptionError(f"the tolerance is a part of 1, got {tolerance}", hint="0.05 for 5 %")
    loads = _Loads.of(dump)
    if loads is not None and loads.load_BLE.shape[2] != placement.num_experts:
        raise PlacementError(
            f"the dump counts {loads.load_BLE.shape[2]} experts, the placement has {placement.num_experts}"
        )
    if dump.slots is not None:
        run = dump.kind != MAP_FILE if recorded is None else recorded
        return _by_slots(placement, dump.slots, loads, tolerance, run)
    if loads is None or dump.balance_B is None:
        raise TraceError(
            f"{dump.engine} {dump.kind} says neither what slots hold nor how balanced devices were",
            hint="record what names slots (SGLang: per_pass), or give the traffic to a reported balance",
        )
    return _by_balance(placement, dump, loads, tolerance)


@dataclass(frozen=True, slots=True, eq=False)
class _Loads:
    """Tokens of experts, float64 [B, L, E], of decoder layers [L]."""

    load_BLE: NDArray[np.float64]
    layer_ids_L: NDArray[np.int32]

    @classmethod
    def of(cls, dump: EngineDump) -> _Loads | None:
        if dump.profile is not None:
            assert dump.profile.layer_ids is not None
            return cls(dump.profile.load_BLE, dump.profile.layer_ids)
        if dump.trace is not None:
            assert dump.trace.layer_ids is not None
            trace = dump.trace
            step = (
                np.zeros(trace.num_tokens, np.int64)
                if trace.step is None
                else np.unique(trace.step, return_inverse=True)[1]
            )
            order = np.argsort(step, kind="stable")
            parts = np.split(order, np.flatnonzero(np.diff(step[order])) + 1)
            load = np.stack([load_LE(trace.experts[part], trace.num_experts) for part in parts])
            return cls(load.astype(np.float64), dump.trace.layer_ids)
        return None

    def layer(self, layer_id: int) -> NDArray[np.float64] | None:
        """[B, E], or None."""
        at = np.flatnonzero(self.layer_ids_L == layer_id)
        return self.load_BLE[:, at[0]] if at.size else None


def _by_slots(
    placement: Placement, slots: SlotRecord, loads: _Loads | None, tolerance: float, recorded: bool
) -> Verification:
    width = slots.map_LS.shape[1] if slots.map_LS is not None else slots.count_BLS.shape[2]  # type: ignore[union-attr]
    if width != placement.num_slots:
        raise PlacementError(
            f"the engine runs {width} slots a layer, the placement has {placement.num_slots}",
            hint="was it started with the number of redundant experts that the export named?",
        )
    if slots.map_LS is not None and int(slots.map_LS.max(initial=0)) >= placement.num_experts:
        raise PlacementError(
            f"the engine's map names expert {slots.map_LS.max()}, the placement has {placement.num_experts}"
        )
    assert placement.layer_ids_L is not None
    share_LED, plain_ED = even_share(placement.count_LED()), _trivial_share(placement)
    findings: list[LayerFinding] = []
    measured: list[float] = []
    predicted: list[float] = []
    trivial: list[float] = []
    for index, layer_id in enumerate(placement.layer_ids_L.tolist()):
        at = np.flatnonzero(slots.layer_ids_L == layer_id)
        if not at.size:
            findings.append(LayerFinding(layer_id, "unseen"))
            continue
        plan_S = placement.slot_expert_LS[index]
        load_BE = None if loads is None else loads.layer(layer_id)
        count_BS = None if slots.count_BLS is None else slots.count_BLS[:, at[0]]
        state: State = "unseen"
        wrong = 0
        if slots.map_LS is not None:
            state, wrong = _compare(plan_S, slots.map_LS[at[0]], placement.slot_device_S, placement.num_experts)
            if load_BE is None and count_BS is not None:
                load_BE = _by_expert(count_BS, slots.map_LS[at[0]], placement.num_experts)
        elif count_BS is not None and load_BE is not None:
            state, wrong = _add_up(plan_S, count_BS, load_BE)
        if count_BS is not None and load_BE is not None and len(count_BS) != len(load_BE):
            count_BS, load_BE = count_BS.sum(axis=0, keepdims=True), load_BE.sum(axis=0, keepdims=True)
        got_BD = None if count_BS is None else _by_device(count_BS, placement)
        want_BD = None if load_BE is None else load_BE @ share_LED[index]
        plain_BD = None if load_BE is None else load_BE @ plain_ED
        for load_BD, values in ((got_BD, measured), (want_BD, predicted), (plain_BD, trivial)):
            if load_BD is not None:
                values.append(_balance(load_BD))
        findings.append(LayerFinding(layer_id, state, wrong, _imbalance(got_BD), _imbalance(want_BD)))
    seen = [finding for finding in findings if finding.state != "unseen"]
    if not seen:
        raise TraceError(
            "the dump proves nothing about any layer of the placement",
            hint="slots without their experts: record loads too, or a mode that writes the map",
        )
    live: bool | None = slots.maps_agree and all(f.state in RUNS for f in seen)
    if live and (not recorded or len(seen) < len(findings)):
        live = None
    return Verification(
        "map" if slots.map_LS is not None else "counts", tuple(findings), live, _mean(measured), _mean(predicted),
        _mean(trivial), tolerance, recorded, slots.maps_agree,
    )  # fmt: skip


def _by_balance(placement: Placement, dump: EngineDump, loads: _Loads, tolerance: float) -> Verification:
    assert dump.balance_B is not None and placement.layer_ids_L is not None
    place = {layer_id: index for index, layer_id in enumerate(placement.layer_ids_L.tolist())}
    share_LED, plain_ED = even_share(placement.count_LED()), _trivial_share(placement)
    planned_LBD, trivial_LBD = [], []
    for at, layer_id in enumerate(loads.layer_ids_L.tolist()):  # a layer that was not planned runs the trivial map
        load_BE = loads.load_BLE[:, at]
        trivial_LBD.append(load_BE @ plain_ED)
        planned_LBD.append(load_BE @ share_LED[place[layer_id]] if layer_id in place else trivial_LBD[-1])
    known = dict(zip(loads.layer_ids_L.tolist(), planned_LBD, strict=True))
    if not place.keys() & known.keys():
        raise TraceError(f"the traffic has layers {loads.layer_ids_L.tolist()[:6]}, none of the placement's")
    findings = [LayerFinding(layer_id, "unseen", predicted=_imbalance(known.get(layer_id))) for layer_id in place]
    as_engine = _vllm_balance if dump.engine == "vllm" else _sglang_balance
    dense = max(0, (dump.recorded_layers or 0) - len(known)) if dump.engine == "sglang" else 0
    mean, plain = (as_engine(np.stack(load_LBD), dense) for load_LBD in (planned_LBD, trivial_LBD))
    late_B = dump.balance_B[len(dump.balance_B) // 2 :]  # before a map is taken, the trivial one runs
    got = float(late_B.mean())
    live: bool | None = None
    if abs(mean - plain) > tolerance * max(mean, plain):
        live = abs(got - mean) < abs(got - plain)
    notes = ["the engine reported one balance for all layers: which of them run the plan it does not say"]
    if len(late_B) < len(dump.balance_B):
        notes.append(f"of {len(dump.balance_B)} reported balances the later {len(late_B)} count")
    if not live and len(dump.balance_B) > len(loads.load_BLE):
        live = None
        notes.append(
            f"{len(dump.balance_B)} passes were reported, of the traffic {len(loads.load_BLE)}: single passes are less "
            "balanced than many together, so a low balance proves nothing"
        )
    return Verification("balance", tuple(findings), live, got, mean, plain, tolerance, notes=tuple(notes))


def _sglang_balance(load_LBD: NDArray[np.float64], dense: int) -> float:
    """Mean over fullest device, mean over layers (dense ones count as 1) and passes."""
    each = [_balance(load_BD) for load_BD in load_LBD]
    return float((np.sum(each) + dense) / (len(each) + dense))


def _vllm_balance(load_LBD: NDArray[np.float64], dense: int) -> float:
    """Mean rank over fullest, both summed over layers before they are divided; mean over passes."""
    mean_B, most_B = load_LBD.mean(axis=2).sum(axis=0), load_LBD.max(axis=2).sum(axis=0)
    return float((mean_B[most_B > 0] / most_B[most_B > 0]).mean())


def _compare(
    plan_S: NDArray[np.int32], seen_S: NDArray[np.int32], device_S: NDArray[np.int32], experts: int
) -> tuple[State, int]:
    """State of a layer's map; empty planned slots may hold anything, since engines fill them."""
    meant = plan_S != EMPTY
    wrong = int((plan_S != seen_S)[meant].sum())
    if not wrong:
        return "live", 0
    for device in np.unique(device_S):
        here = device_S == device
        missing = np.bincount(plan_S[here & meant], minlength=experts)
        missing -= np.bincount(seen_S[here & (seen_S != EMPTY)], minlength=experts)
        if (missing > 0).any():
            trivial = trivial_row(experts, len(plan_S))
            return ("trivial map" if (seen_S == trivial).all() else "other map"), wrong
    return "reordered", wrong


def _add_up(
    plan_S: NDArray[np.int32], count_BS: NDArray[np.float64], load_BE: NDArray[np.float64]
) -> tuple[State, int]:
    """Whether the slots of each expert add up to its tokens over all records."""
    if (plan_S == EMPTY).any():
        return "unseen", 0
    got_E = _by_expert(count_BS, plan_S, load_BE.shape[1]).sum(axis=0)
    want_E = load_BE.sum(axis=0)
    wrong = int((np.abs(got_E - want_E) > COUNT_TOLERANCE * max(1.0, float(want_E.max()))).sum())
    return ("counts disagree", wrong) if wrong else ("counts agree", 0)


def _by_expert(count_BS: NDArray[np.float64], expert_S: NDArray[np.int32], experts: int) -> NDArray[np.float64]:
    return count_BS @ (expert_S[:, None] == np.arange(experts)).astype(np.float64)


def _by_device(count_BS: NDArray[np.float64], placement: Placement) -> NDArray[np.float64]:
    return count_BS @ (placement.slot_device_S[:, None] == np.arange(placement.num_devices)).astype(np.float64)


def _trivial_share(placement: Placement) -> NDArray[np.float64]:
    """Of what engines run without a map: each device's share of each expert's tokens, float64 [E, D]."""
    row = trivial_row(placement.num_experts, placement.num_slots)
    trivial = Placement(row[None], placement.slot_device_S, placement.num_experts, placement.num_devices)
    return even_share(trivial.count_LED()[0])


def _balance(load_BD: NDArray[np.float64]) -> float:
    """Mean over fullest device, mean over records with tokens; 1 without any."""
    busy = load_BD[load_BD.sum(axis=1) > 0]
    return float((busy.mean(axis=1) / busy.max(axis=1)).mean()) if len(busy) else 1.0


def _imbalance(load_BD: NDArray[np.float64] | None) -> float | None:
    """Fullest over mean device, mean over records with tokens; None without any."""
    if load_BD is None:
        return None
    busy = load_BD[load_BD.sum(axis=1) > 0]
    return float((busy.max(axis=1) / busy.mean(axis=1)).mean()) if len(busy) else None


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
