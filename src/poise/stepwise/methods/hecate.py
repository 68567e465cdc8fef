"""Hecate's sparse materialisation (arXiv 2502.02581, section 3, Algorithm 1) and its dispatch rule.

Before the gate, from F, the mean load of the last w = 5 steps (the predictor's task)
    Step 1  t = min(window * bandwidth / expert bytes, E), m = min(M, t): integers.
    Step 2  t <= m: the t most loaded experts go to all devices.
    Step 3  else D * m places are dealt among the t most loaded in proportion to their load; an expert's replicas go to
            nodes that lack it and devices with most free slots first.
After the gate
    Step 4  Dispatch: a token stays where its expert is; else to the devices of its node that hold it, evenly; else
            to the others, evenly. No counts are exchanged.
    Step 5  (``hecate-calibrated``) Algorithm 1 once more with the true loads and the memory left; its replicas are
            fetched, exposed, if the modelled compute they save exceeds that time. In training: if the compute and
            all-to-alls of all passes that they save exceed what they expose, their way back included.

Open in the source, chosen here: places are rounded by largest remainder over the t experts' own loads, at most D each;
ties go to the lower number; bandwidth is the network's where there are several nodes; with several static replicas
all count as holders. Above ``MAX_ROWS`` entries a plan keeps its quotas only, and sources are matched to them by
locality, which differs from step 4 in which of a node's holders a source sends to. Serving moves weights only,
training would add optimizer states at re-sharding (Algorithm 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds
from poise.cost.links import port_seconds
from poise.cost.traffic import Copies, port_load
from poise.cost.weights import StepPrice, fetch_seconds
from poise.stepwise.protocol import MAX_ROWS, LayerView, StepPlan, StepPolicy
from poise.util.compiled import compiled


@compiled
def _nearest(load_SE, holders_ED, node_D, rows_SED, quota_ED):  # type: ignore[no-untyped-def]
    """Rows, or, where they have no room (size 0), quotas alone."""
    devices, experts = load_SE.shape
    with_rows, nodes = rows_SED.size > 0, node_D[-1] + 1
    device_X, first_N, many_N = np.zeros(devices, np.int64), np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
    for e in range(experts):
        anywhere = 0
        many_N[:] = 0
        for d in range(devices):
            if holders_ED[e, d]:
                if many_N[node_D[d]] == 0:
                    first_N[node_D[d]] = anywhere
                device_X[anywhere] = d
                anywhere += 1
                many_N[node_D[d]] += 1
        for s in range(devices):
            load = load_SE[s, e]
            if load == 0:
                continue
            if holders_ED[e, s]:
                quota_ED[e, s] += load
                if with_rows:
                    rows_SED[s, e, s] = load
                continue
            near = many_N[node_D[s]]
            count, first = (near, first_N[node_D[s]]) if near > 0 else (anywhere, 0)
            whole, rest = load // count, load % count
            for rank in range(count):
                d = device_X[first + rank]
                give = whole + (1 if (rank - s) % count < rest else 0)
                quota_ED[e, d] += give
                if with_rows:
                    rows_SED[s, e, d] = give


def nearest_rows(load_SE: NDArray[np.int64], holders_ED: NDArray[np.bool_], node_D: NDArray[Any]) -> NDArray[np.int64]:
    """Step 4, int64 [D, E, D]: what does not divide is dealt on in turn, from the source's own number on."""
    rows = np.zeros((len(node_D), *holders_ED.shape), np.int64)
    _fill_rows(load_SE, holders_ED, node_D, rows)
    return rows


def nearest_quota(load_SE: NDArray[np.int64], holders_ED: NDArray[np.bool_], node_D: NDArray[Any]) -> NDArray[np.int64]:
    """Sum over sources of :func:`nearest_rows`, int64 [E, D], without the rows."""
    return _fill_rows(load_SE, holders_ED, node_D, np.zeros((0, 0, 0), np.int64))


def _fill_rows(
    load_SE: NDArray[np.int64], holders_ED: NDArray[np.bool_], node_D: NDArray[Any], rows_SED: NDArray[np.int64]
) -> NDArray[np.int64]:
    quota = np.zeros(holders_ED.shape, np.int64)
    # copies: to numba an array that may not be written is another type
    load, holders, nodes = load_SE.copy(), holders_ED.copy(), np.array(node_D, np.int64)
    _nearest(load, holders, nodes, rows_SED, quota)
    return quota


def materialise(
    load_E: NDArray[np.float64], held_ED: NDArray[np.bool_], free_D: NDArray[np.int64], t: int, m: int,
    node_D: NDArray[Any],
) -> NDArray[np.bool_]:  # fmt: skip
    """Steps 2 and 3: holders with the replicas of Algorithm 1, bool [E, D]."""
    out, free = held_ED.copy(), np.minimum(free_D, m)
    devices = len(node_D)
    top = np.argsort(-load_E, kind="stable")[:t]
    if t <= m:
        wanted = dict.fromkeys(top.tolist(), devices)
    else:
        exact = load_E[top] / max(float(load_E[top].sum()), 1e-300) * devices * m
        places = np.floor(exact).astype(np.int64)
        for i in np.argsort(-(exact - places), kind="stable")[: devices * m - int(places.sum())]:
            places[i] += 1
        wanted = dict(zip(top.tolist(), np.minimum(places, devices).tolist(), strict=True))
    for e, count in wanted.items():
        for _ in range(count):
            fits = np.flatnonzero((free > 0) & ~out[e])
            if not fits.size:
                break
            on_node = np.bincount(node_D, weights=out[e], minlength=int(node_D.max()) + 1)[node_D[fits]]
            d = fits[np.lexsort((fits, -free[fits], on_node > 0))[0]]
            out[e, d] = True
            free[d] -= 1
    return out


@dataclass(frozen=True, slots=True)
class Hecate(StepPolicy):
    """Steps 1 to 4.

    Parameters
    ----------
    overlap : t, most experts whose transfer the window hides; 0: from the window.
    """

    name: ClassVar[str] = "hecate"
    summary: ClassVar[str] = "Hecate: sparse materialisation from predicted loads, nearest replica"
    exact: ClassVar[bool] = False
    overlap: int = 0

    def limits(self, view: LayerView) -> tuple[int, int]:
        """T and m."""
        t = min(self.overlap or view.price.hidden_experts(), len(view.predicted_E))
        return t, min(view.step_slots, t)

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Steps 1 to 3."""
        t, m = self.limits(view)
        free = view.slots_D - view.before_ED.sum(axis=0)
        return materialise(view.predicted_E, view.before_ED, free, t, m, view.price.cluster.node_D)

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Step 4."""
        node_D = view.price.cluster.node_D
        if holders_ED.size * len(load_SE) > MAX_ROWS:
            return StepPlan(holders_ED, nearest_quota(load_SE, holders_ED, node_D))
        rows = nearest_rows(load_SE, holders_ED, node_D)
        return StepPlan(holders_ED, rows.sum(axis=0), rows)


@dataclass(frozen=True, slots=True)
class HecateCalibrated(Hecate):
    """Steps 1 to 5."""

    name: ClassVar[str] = "hecate-calibrated"
    summary: ClassVar[str] = "Hecate with calibration after the gate"
    exact: ClassVar[bool] = True

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Steps 4 and 5."""
        price, node_D = view.price, view.price.cluster.node_D
        t, m = self.limits(view)
        free = view.slots_D - holders_ED.sum(axis=0)
        more = materialise(load_SE.sum(axis=0).astype(np.float64), holders_ED, free, t, m, node_D)
        rows = {False: nearest_rows(load_SE, holders_ED, node_D), True: nearest_rows(load_SE, more, node_D)}
        late_s = fetch_seconds(holders_ED, more & ~holders_ED, price)
        seconds = {key: self._seconds(value, price) for key, value in rows.items()}
        if price.training:
            early_s = fetch_seconds(view.before_ED, holders_ED & ~view.before_ED, price)
            late_s = price.exposed_seconds(early_s, late_s) - price.exposed_seconds(early_s, 0.0)
        pays = seconds[False] - seconds[True] > late_s
        chosen = bool(pays and (more & ~holders_ED).any())
        return StepPlan(more if chosen else holders_ED, rows[chosen].sum(axis=0), rows[chosen])

    def _seconds(self, rows_SED: NDArray[np.int64], price: StepPrice) -> float:
        """Modelled compute; in training all passes of compute and all-to-alls."""
        cluster = price.cluster
        work_ED = expert_seconds(rows_SED.sum(axis=0).astype(np.float64), cluster, price.model)
        compute = float((work_ED.sum(axis=0) / cluster.speed_D).max())
        if not price.training:
            return compute
        load = port_load(Copies(rows_SED.sum(axis=1)[None].astype(np.float64)), cluster)
        out = port_seconds(load, price.model.dispatch_bytes_per_token, cluster, cluster.dispatch_wire)[0]
        back = port_seconds(load, price.model.combine_bytes_per_token, cluster, cluster.combine_wire)[0]
        return compute * price.compute_passes + float(out + back) * price.exchange_passes
