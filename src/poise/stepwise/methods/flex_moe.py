"""FlexMoE's dynamic replicas (SIGMOD 2023): expand, shrink and migrate, triggered by a balance metric.

Before the gate, from the mean of recent loads
    Step 1  Nothing while max / mean of the devices' loads stays below ``trigger``.
    Step 2  Expand: the expert with most load a replica gets one on the idlest device with a free slot. Without a free
            slot the step replica with least load a replica shrinks away first.
    Step 3  Migrate: where neither helps, a replica of the fullest device moves to the idlest one with room.
    Step 4  A change is made if its modelled saving of compute over ``horizon`` steps exceeds its fetch; at most
            ``most`` changes a step.
After the gate: tokens are split evenly over the replicas (no counts are exchanged).

No official code was found; the cost estimate is this package's roofline. Serving moves weights only. In training the
estimate has all compute passes, the tokens that all-to-alls bring to the fullest device (node, where it
shares the network port), and the gradients' all-reduce that shows; a change moves optimizer states too and pays for
them (step 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_seconds
from poise.cost.weights import STATE_RATIO, fetch_seconds
from poise.stepwise.methods.split import even_quota
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy


@dataclass(frozen=True, slots=True)
class FlexMoE(StepPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "flex-moe"
    summary: ClassVar[str] = "FlexMoE: replicas grow, shrink and move when the balance metric calls"
    keeps: ClassVar[bool] = True
    keeps_in_training: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    trigger: float = 1.2
    horizon: float = 25.0
    most: int = 8

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Steps 1 to 4."""
        load_E = view.recent_HE.mean(axis=0) if len(view.recent_HE) else view.predicted_E
        held = view.before_ED.copy()
        for _ in range(self.most):
            load_D = self._loads(load_E, held, view)
            if load_D.max() < self.trigger * load_D.mean():
                break
            changed = self._expand(load_E, held, load_D, view)
            if changed is None or self._loads(load_E, changed, view).max() >= load_D.max() * (1 - 1e-9):
                changed = self._migrate(load_E, held, load_D, view)
            if changed is None:
                break
            saved = self._seconds(load_E, held, view) - self._seconds(load_E, changed, view)
            states = STATE_RATIO if view.price.training else 1.0
            if saved * self.horizon <= states * fetch_seconds(held, changed & ~held, view.price):
                break
            held = changed
        return held

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Even split."""
        return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), holders_ED))

    def _loads(self, load_E: NDArray[np.float64], held: NDArray[np.bool_], view: LayerView) -> NDArray[np.float64]:
        out: NDArray[np.float64] = ((load_E / held.sum(axis=1))[:, None] * held).sum(axis=0)
        return out / view.price.cluster.speed_D

    def _seconds(self, load_E: NDArray[np.float64], held: NDArray[np.bool_], view: LayerView) -> float:
        cluster = view.price.cluster
        tokens = (load_E / held.sum(axis=1))[:, None] * held
        compute = float((expert_seconds(tokens, cluster, view.price.model).sum(axis=0) / cluster.speed_D).max())
        if not view.price.training:
            return compute
        price, model = view.price, view.price.model
        both = (model.dispatch_bytes_per_token + model.combine_bytes_per_token) * price.exchange_passes
        arrive_D, wire = tokens.sum(axis=0), cluster.intra_bytes_per_s
        if cluster.num_nodes > 1:
            wire = cluster.inter_bytes_per_s
            if cluster.nic_shared:
                arrive_D = np.bincount(cluster.node_D, weights=arrive_D)
        base = view.static_ED & held
        moved_E = ~base.any(axis=1)
        base[moved_E, held[moved_E].argmax(axis=1)] = True
        sync = price.exposed_seconds(fetch_seconds(base, held & ~base, price), 0.0)
        return compute * price.compute_passes + float(arrive_D.max()) * both / wire + sync

    def _expand(
        self, load_E: NDArray[np.float64], held: NDArray[np.bool_], load_D: NDArray[np.float64], view: LayerView
    ) -> NDArray[np.bool_] | None:
        """Step 2."""
        out = held.copy()
        e = int(np.argmax(np.where(held.all(axis=1), -1.0, load_E / held.sum(axis=1))))
        if held[e].all():
            return None
        fits = np.flatnonzero((held.sum(axis=0) < view.slots_D) & ~held[e])
        if not fits.size:
            each = np.where(held & ~view.static_ED & (held.sum(axis=1) > 1)[:, None],
                            (load_E / held.sum(axis=1))[:, None], np.inf)  # fmt: skip
            each[e] = np.inf
            each[:, held[e]] = np.inf
            least = int(np.argmin(each))
            if not np.isfinite(each.ravel()[least]):
                return None
            gone, d = np.unravel_index(least, each.shape)
            out[gone, d] = False
            fits = np.array([d])
        out[e, fits[np.argmin(load_D[fits])]] = True
        return out

    def _migrate(
        self, load_E: NDArray[np.float64], held: NDArray[np.bool_], load_D: NDArray[np.float64], view: LayerView
    ) -> NDArray[np.bool_] | None:
        """Step 3."""
        top = int(load_D.argmax())
        fits = np.flatnonzero(held.sum(axis=0) < view.slots_D)
        fits = fits[fits != top]
        if not fits.size:
            return None
        low = int(fits[np.argmin(load_D[fits])])
        each = load_E / held.sum(axis=1)
        can = np.flatnonzero(held[:, top] & ~held[:, low] & (each < load_D[top] - load_D[low]))
        if not can.size:
            return None
        out = held.copy()
        e = int(can[np.argmax(each[can])])
        out[e, top], out[e, low] = False, True
        return out
