"""A reported balance against the maps that could have given it. Pure: :mod:`poise.engines.explain` has the rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.candidates import PLAN, TRIVIAL, could_run
from poise.engines.dump import EngineDump
from poise.engines.explain import (
    PARTS,
    Explanation,
    Measure,
    MeasuredTraffic,
    Reported,
    copies_of,
    explained,
    measures_of,
    steady,
)  # fmt: skip
from poise.engines.verification import LayerFinding, Verification
from poise.planning.placement import Placement
from poise.routing.profile import load_LE
from poise.routing.trace import RoutingTrace
from poise.util.errors import TraceError


@dataclass(frozen=True, slots=True, eq=False)
class Loads:
    """Tokens of experts [B, L, E] of decoder layers [L]; K (None: unknown); the same tokens in at most PARTS parts."""

    load_BLE: NDArray[np.float64]
    layer_ids_L: NDArray[np.int32]
    top_k: int | None
    parts_GLE: NDArray[np.float64]

    @classmethod
    def of(cls, dump: EngineDump) -> Loads | None:
        """The dump's; None: it has none."""
        if dump.profile is not None:
            load_BLE, top_k = dump.profile.load_BLE.astype(np.float64), dump.profile.top_k
            parts = np.array_split(np.arange(len(load_BLE)), min(PARTS, len(load_BLE)))
            part_GLE = np.stack([load_BLE[part].sum(axis=0) for part in parts])
            return cls(load_BLE, dump.profile.layer_ids, None if top_k == 1 else top_k, part_GLE)
        if dump.trace is not None:
            trace = dump.trace
            step = (
                np.zeros(trace.num_tokens, np.int64)
                if trace.step is None
                else np.unique(trace.step, return_inverse=True)[1]
            )
            group = np.unique(trace.request, return_inverse=True)[1] % PARTS
            load_BLE, part_GLE = (_counted(trace, key) for key in (step, group))
            return cls(load_BLE, trace.layer_ids, int(trace.experts.shape[2]), part_GLE)
        return None

    def layer(self, layer_id: int) -> NDArray[np.float64] | None:
        """Loads of one decoder layer, [B, E]; None: it was not recorded."""
        at = np.flatnonzero(self.layer_ids_L == layer_id)
        return self.load_BLE[:, at[0]] if at.size else None


def _counted(trace: RoutingTrace, key_T: NDArray[Any]) -> NDArray[np.float64]:
    """Loads of the tokens of each key, in the order of keys, [B, L, E]."""
    order = np.argsort(key_T, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(key_T[order])) + 1)
    return np.stack([load_LE(trace.experts[part], trace.num_experts) for part in parts]).astype(np.float64)


def by_balance(
    placement: Placement, dump: EngineDump, loads: Loads, tolerance: float, error_rate: float,
    against: Mapping[str, Placement], own_balancer: bool,
) -> Verification:  # fmt: skip
    """What a reported balance proves; parameters as of :func:`poise.engines.verify.verify`.

    ``own_balancer``: the engine's own load balancer may have made maps. The plan runs if it explains the balance and
    nothing else does; it does not if it does not and something else does.

    Raises
    ------
    PlacementError : a placement to test against is of another model.
    TraceError : the traffic has no layer of the placement.
    """
    shares = could_run(placement, loads.layer_ids_L, loads.parts_GLE.sum(axis=0), against, own_balancer=own_balancer)
    seen, ids = loads.layer_ids_L.tolist(), placement.layer_ids_L.tolist()
    if not set(ids) & set(seen):
        raise TraceError(f"the traffic has layers {seen[:6]}, none of the placement's")
    plan = {layer_id: loads.load_BLE[:, at] @ shares[PLAN][0][at] for at, layer_id in enumerate(seen)}
    findings = tuple(LayerFinding(layer_id, "unseen", predicted=imbalance(plan.get(layer_id))) for layer_id in ids)
    late, notes = _late(dump)
    found: dict[str, Explanation] = {}
    alike = False
    flat = {f"{name}#{i}": share for name, each in shares.items() for i, share in enumerate(each)}
    for reported, traffic in _readings(dump, loads, placement.num_devices, late):
        given = explained(reported, traffic, flat, error_rate=error_rate, tolerance=tolerance)
        for one in given:
            name = one.name.rpartition("#")[0]
            if name not in found or (one.explains, one.p_value) > (found[name].explains, found[name].p_value):
                found[name] = replace(one, name=name)
        if given[0].explains:
            alike |= steady(reported, traffic, shares[PLAN][0], error_rate=error_rate)
    others = [one.name for one in found.values() if one.explains and one.name != PLAN]
    live: bool | None = None
    if found[PLAN].explains and not others and alike:
        live = True
    elif not found[PLAN].explains and others:
        live = False
    return Verification(
        "balance", findings, live, reported.balance, found[PLAN].balance, found[TRIVIAL].balance, tolerance,
        notes=tuple(notes), explanations=tuple(found.values()), error_rate=error_rate,
    )  # fmt: skip


def _late(dump: EngineDump) -> tuple[NDArray[np.int64], list[str]]:
    """Which of the reported balances count: the later half, after the first rearrangement if one is seen."""
    assert dump.balance_B is not None
    notes = ["the engine reported one balance for all layers: which of them run the plan it does not say"]
    total = len(dump.balance_B)
    at = np.arange(total)
    if dump.log is not None and dump.log.rearranged_B is not None:
        after = np.flatnonzero(dump.log.rearranged_B > 0)
        at = after if after.size else at
        if not after.size:
            notes.append("the step counter of the log never starts anew: no rearrangement came while it was written")
    at = at[len(at) // 2 :]  # before a map is taken, the trivial one runs
    if len(at) < total:
        notes.append(f"of {total} reported balances the last {len(at)} count")
    return at, notes


def _readings(
    dump: EngineDump, loads: Loads, devices: int, late: NDArray[np.int64]
) -> list[tuple[Reported, MeasuredTraffic]]:
    """What the reported numbers may be of, with the traffic as it bears on them."""
    assert dump.balance_B is not None
    balance_B, layers = dump.balance_B[late], len(loads.layer_ids_L)
    many = loads.load_BLE[late] if len(loads.load_BLE) == len(dump.balance_B) > 1 else None
    whole = MeasuredTraffic(loads.parts_GLE, loads.top_k)
    if dump.engine != "vllm":
        if dump.kind == "stat":  # a mean over the very steps that were counted
            many = loads.load_BLE
        reported = Reported("ratio", np.ones(len(balance_B)), balance_B,
                            dense=max(0, (dump.recorded_layers or 0) - layers))  # fmt: skip
        return [(reported, replace(whole, passes_BLE=many))]
    if dump.log is None:
        names: tuple[Measure, ...] = ("ranks", "layers")
        whole = replace(whole, passes_BLE=many)
        return [(Reported(name, 1.0 / balance_B, np.ones(len(balance_B))), whole) for name in names]
    copies = copies_of(dump.log.most_B, devices)
    most_B, mean_B = dump.log.most_B[late] / copies, dump.log.mean_B[late] / copies
    out = []
    for name, pairs_B in measures_of(mean_B, layers, devices, loads.top_k).items():
        same = many is not None and np.allclose(many.sum(axis=2).mean(axis=1), pairs_B, rtol=0.01)
        out.append((Reported(name, most_B, mean_B, pairs_B), replace(whole, passes_BLE=many if same else None)))
    return out


def balance(load_BD: NDArray[np.float64]) -> float:
    """Mean over fullest device, mean over records with tokens; 1 without any."""
    busy = load_BD[load_BD.sum(axis=1) > 0]
    return float((busy.mean(axis=1) / busy.max(axis=1)).mean()) if len(busy) else 1.0


def imbalance(load_BD: NDArray[np.float64] | None) -> float | None:
    """Fullest over mean device, mean over records with tokens; None without any."""
    if load_BD is None:
        return None
    busy = load_BD[load_BD.sum(axis=1) > 0]
    return float((busy.max(axis=1) / busy.mean(axis=1)).mean()) if len(busy) else None
