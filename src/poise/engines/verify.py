"""Whether the placement that was planned is the one that runs, and whether it balances as predicted. Pure.

Engines take a map and drop it in silence (docs/engines.md names cases). Evidence, strongest first:

    map      the engine says what its slots hold: compared slot by slot, layer by layer
    counts   slots and experts were both counted: the slots of an expert have to add up to its tokens
    balance  only a balance was reported: the plan explains it, and no other map that could have run does (explain.py)

A map in a file that an engine is given (and not one that it wrote) says what should run: never that it does. Measured
balance is compared with the even split of the same loads over the plan's replicas, slots that it leaves empty filled as
``poise export`` fills them. An engine that sends each source to its nearest replica is off that by its choice of
replicas, not by the map.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from poise.cost.split import even_share
from poise.engines.dump import EngineDump, SlotRecord
from poise.engines.measured import Loads, balance, by_balance, imbalance
from poise.engines.slots import trivial_row
from poise.engines.verification import RUNS, UNKNOWN, LayerFinding, MapState, Verification
from poise.planning.engine_rules import ANY, hold
from poise.planning.placement import EMPTY, Placement
from poise.util.errors import OptionError, PlacementError, TraceError

__all__ = ["RUNS", "LayerFinding", "Verification", "verify"]

MAP_FILE = "map"
"""Kind of a dump that is a map and no more."""
COUNT_TOLERANCE = 1e-6
"""Counts are whole numbers; sums of them may be rounded."""


def verify(
    placement: Placement, dump: EngineDump, *, tolerance: float = 0.05, recorded: bool | None = None,
    error_rate: float = 0.01, against: Mapping[str, Placement] | None = None, balancer_off: bool = False,
) -> Verification:  # fmt: skip
    """Compare a placement with what an engine reports while it runs.

    Parameters
    ----------
    placement, dump : plan and evidence.
    tolerance : relative, in 0..1.
    recorded : whether a map file was written by the running engine; default: a map alone was not.
    error_rate : odds that a balance is called the plan's while another of the maps runs, and that the plan is said not
        to run while it does; in [0.001, 0.5].
    against : other placements that may run instead, by name, beside those every engine may run.
    balancer_off : the engine's own load balancer makes no maps.

    Raises
    ------
    OptionError : the tolerance or error rate is out of range.
    PlacementError : the dump, or a placement to test against, is of another model or number of slots.
    TraceError : the dump has neither slots nor a balance with loads, or slots and loads of different recordings.
    """
    if not 0 <= tolerance < 1:
        raise OptionError(f"the tolerance is a part of 1, got {tolerance}", hint="0.05 for 5 %")
    if not 0.001 <= error_rate <= 0.5:
        raise OptionError(f"the error rate must lie in 0.001..0.5, got {error_rate}", hint="0.01 for 1 %")
    loads = Loads.of(dump)
    if loads is not None and loads.load_BLE.shape[2] != placement.num_experts:
        raise PlacementError(
            f"the dump counts {loads.load_BLE.shape[2]} experts, the placement has {placement.num_experts}"
        )
    if dump.slots is not None:
        run = dump.kind != MAP_FILE if recorded is None else recorded
        return _by_slots(placement, dump.slots, loads, tolerance, run, (against or {}).values())
    if loads is None or dump.balance_B is None:
        raise TraceError(
            f"{dump.engine} {dump.kind} says neither what slots hold nor how balanced devices were",
            hint="record what names slots (SGLang: per_pass), or give the traffic to a reported balance",
        )
    own = not balancer_off and (dump.log is None or dump.log.own_balancer)
    others = {name: hold(other, ANY)[0] for name, other in (against or {}).items()}
    return by_balance(hold(placement, ANY)[0], dump, loads, tolerance, error_rate, others, own)


def _by_slots(
    placement: Placement, slots: SlotRecord, loads: Loads | None, tolerance: float, recorded: bool,
    against: Collection[Placement],
) -> Verification:  # fmt: skip
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
    share_LED, plain_ED = even_share(hold(placement, ANY)[0].count_LED()), _trivial_share(placement)
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
        state: MapState = "unseen"
        wrong = 0
        if slots.map_LS is not None:
            seen_S = slots.map_LS[at[0]]
            state, wrong = _compare(plan_S, seen_S, placement.slot_device_S, placement.num_experts)
            if state == "live" and not recorded:
                state = "matches"
            if load_BE is None and count_BS is not None:
                load_BE = _by_expert(count_BS, seen_S, placement.num_experts)
            elif load_BE is not None and count_BS is not None and _same_total(count_BS, load_BE):
                if unlike := _unlike(seen_S, count_BS, load_BE):  # the map that is named did not count this
                    state, wrong = "counts disagree", unlike
        elif count_BS is not None and load_BE is not None:
            state, wrong = _add_up(plan_S, count_BS, load_BE, layer_id, _others(placement, index, against))
        if count_BS is not None and load_BE is not None and len(count_BS) != len(load_BE):
            count_BS, load_BE = count_BS.sum(axis=0, keepdims=True), load_BE.sum(axis=0, keepdims=True)
        got_BD = None if count_BS is None else _by_device(count_BS, placement)
        want_BD = None if load_BE is None else load_BE @ share_LED[index]
        plain_BD = None if load_BE is None else load_BE @ plain_ED
        for load_BD, values in ((got_BD, measured), (want_BD, predicted), (plain_BD, trivial)):
            if load_BD is not None:
                values.append(balance(load_BD))
        findings.append(LayerFinding(layer_id, state, wrong, imbalance(got_BD), imbalance(want_BD)))
    seen = [finding for finding in findings if finding.state != "unseen"]
    if not seen:
        raise TraceError(
            "the dump proves nothing about any layer of the placement",
            hint="slots without their experts: record loads too, or a mode that writes the map",
        )
    live: bool | None = None
    if recorded and (not slots.maps_agree or any(f.state not in (*RUNS, *UNKNOWN) for f in seen)):
        live = False
    elif recorded and all(f.state in RUNS for f in findings):
        live = True
    return Verification(
        "map" if slots.map_LS is not None else "counts", tuple(findings), live, _mean(measured), _mean(predicted),
        _mean(trivial), tolerance, recorded, slots.maps_agree,
    )  # fmt: skip


def _compare(
    plan_S: NDArray[np.int32], seen_S: NDArray[np.int32], device_S: NDArray[np.int32], experts: int
) -> tuple[MapState, int]:
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


def _others(placement: Placement, index: int, against: Collection[Placement]) -> list[NDArray[np.int32]]:
    """Rows that may run in a layer instead of the plan's, int32 [S] each: those that give devices other experts."""
    rows = [trivial_row(placement.num_experts, placement.num_slots)]
    layer_id = placement.layer_ids_L[index]
    for other in against:
        if other.num_slots == placement.num_slots:
            rows += list(other.slot_expert_LS[other.layer_ids_L == layer_id])
    plan_S = placement.slot_expert_LS[index]
    experts = placement.num_experts
    return [row for row in rows if _compare(plan_S, row, placement.slot_device_S, experts)[0] not in RUNS]


def _same_total(count_BS: NDArray[np.float64], load_BE: NDArray[np.float64]) -> bool:
    return bool(abs(count_BS.sum() - load_BE.sum()) <= COUNT_TOLERANCE * max(1.0, float(load_BE.sum())))


def _unlike(expert_S: NDArray[np.int32], count_BS: NDArray[np.float64], load_BE: NDArray[np.float64]) -> int:
    """Experts whose slots do not add up to their tokens, record by record where there are as many."""
    got_BE = _by_expert(count_BS, expert_S, load_BE.shape[1])
    if len(got_BE) != len(load_BE):
        got_BE, load_BE = got_BE.sum(axis=0, keepdims=True), load_BE.sum(axis=0, keepdims=True)
    off_BE = np.abs(got_BE - load_BE) > COUNT_TOLERANCE * max(1.0, float(load_BE.max()))
    return int(off_BE.any(axis=0).sum())


def _add_up(
    plan_S: NDArray[np.int32], count_BS: NDArray[np.float64], load_BE: NDArray[np.float64], layer_id: int,
    others: Sequence[NDArray[np.int32]],
) -> tuple[MapState, int]:  # fmt: skip
    """Whether the slots of each expert add up to its tokens under the plan, and under no other map."""
    if (plan_S == EMPTY).any():
        return "unseen", 0
    if not _same_total(count_BS, load_BE):
        raise TraceError(
            f"layer {layer_id}: its slots counted {count_BS.sum():.0f} pairs, the traffic has {load_BE.sum():.0f}",
            hint="slots and experts have to be counted in one recording",
        )
    if wrong := _unlike(plan_S, count_BS, load_BE):
        return "counts disagree", wrong
    if any(not _unlike(row, count_BS, load_BE) for row in others):
        return "counts fit others", 0
    return "counts agree", 0


def _by_expert(count_BS: NDArray[np.float64], expert_S: NDArray[np.int32], experts: int) -> NDArray[np.float64]:
    return count_BS @ (expert_S[:, None] == np.arange(experts)).astype(np.float64)


def _by_device(count_BS: NDArray[np.float64], placement: Placement) -> NDArray[np.float64]:
    return count_BS @ (placement.slot_device_S[:, None] == np.arange(placement.num_devices)).astype(np.float64)


def _trivial_share(placement: Placement) -> NDArray[np.float64]:
    """Of what engines run without a map: each device's share of each expert's tokens, float64 [E, D]."""
    row = trivial_row(placement.num_experts, placement.num_slots)
    trivial = Placement(row[None], placement.slot_device_S, placement.num_experts, placement.num_devices)
    return even_share(trivial.count_LED()[0])


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
