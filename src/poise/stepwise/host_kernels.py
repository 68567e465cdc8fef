"""The calls of :class:`poise.stepwise.kernels.StepKernels` on the host: the compiled functions of the fast loop."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.quota import make_holders, make_scratch
from poise.cost.route import locality_rows
from poise.cost.split import exact_quota
from poise.cost.weights import StepPrice
from poise.stepwise.kernels import LayerSlots, check_source
from poise.stepwise.methods.split import even_quota, exact_split
from poise.stepwise.poise.surplus import surplus_fill
from poise.stepwise.poise.work_split import passive_seconds, split_seconds
from poise.stepwise.poise.workspace import Desk, desk_of
from poise.stepwise.protocol import LayerView

NO_SOURCES = np.zeros((0, 0), np.int64)


class HostKernels:
    """One layer's calls on numpy arrays.

    Parameters
    ----------
    table : the layer's slots.
    price : machine, model and control time.
    margin : least predicted gain, as a share of the passive time, for which a layer is not left alone.

    Raises
    ------
    OptionError : a price of another number of devices.
    """

    def __init__(self, table: LayerSlots, price: StepPrice, margin: float = 0.03) -> None:
        price.check_devices(len(table.expert_DS))
        self.table, self.price, self.margin = table, price, margin
        self._static_ED = table.holders(table.expert_DS)
        self._slots = int((table.turn_DS == -1).sum(axis=1).max())

    def prepare(self, load_E: NDArray[Any], expert_DS: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """:meth:`fill`, and :meth:`decide` on the exact split over what it filled."""
        filled_DS = self.fill(load_E, expert_DS)
        speed_D = np.asarray(self.price.cluster.speed_D, np.float64)
        quota_ED = exact_quota(np.asarray(load_E, np.int64), self.table.holders(filled_DS), speed_D)
        return filled_DS, self.decide(load_E, filled_DS, quota_ED)

    def fill(self, work_E: NDArray[Any], expert_DS: NDArray[Any]) -> NDArray[np.int32]:
        """Replicas one by one (:func:`poise.stepwise.poise.surplus.surplus_fill`)."""
        held_ED, view = self.table.holders(expert_DS), self._view(work_E)
        filled_ED = surplus_fill(view, held_ED, view.predicted_E, desk_of(view))[-1]
        return self.table.with_holders(expert_DS, filled_ED)

    def split(self, load_SE: NDArray[Any], expert_DS: NDArray[Any], leave: NDArray[Any]) -> NDArray[np.int32]:
        """The exact split, started at home (:func:`poise.stepwise.methods.split.exact_split`)."""
        loads = np.ascontiguousarray(load_SE, np.int64)
        if leave[0]:
            return even_quota(loads.sum(axis=0), self._static_ED).astype(np.int32)
        held_ED, nodes = self.table.holders(expert_DS), self.table.node_D.astype(np.int64)
        ready = (make_holders(held_ED), make_scratch(*held_ED.shape))
        speed_D = np.asarray(self.price.cluster.speed_D, np.float64)
        return exact_split(loads, held_ED, speed_D, node_D=nodes, ready=ready).astype(np.int32)

    def rows(self, load_SE: NDArray[Any], quota_ED: NDArray[Any], source: int) -> NDArray[np.int32]:
        """Nearest first (:func:`poise.cost.route.locality_rows`)."""
        check_source(source, len(self.table.expert_DS))
        loads, quotas = np.ascontiguousarray(load_SE, np.int64), np.ascontiguousarray(quota_ED, np.int64)
        return locality_rows(loads, quotas, self.table.node_D, source)[0].astype(np.int32)

    def decide(self, load_E: NDArray[Any], expert_DS: NDArray[Any], quota_ED: NDArray[Any]) -> NDArray[np.int32]:
        """Both splits as :mod:`poise.stepwise.poise.work_split` prices them."""
        planned, passive = self.seconds(load_E, expert_DS, quota_ED)
        below = passive * (1.0 - self.margin) - self.margin * self.price.cluster.dispatch_wire.start_s
        return np.array([planned > below], np.int32)

    def seconds(self, load_E: NDArray[Any], expert_DS: NDArray[Any], quota_ED: NDArray[Any]) -> tuple[float, float]:
        """Predicted seconds with control of the split, and of the engine's even split over the static slots."""
        desk = self._desk(load_E)
        layer = desk.put(self.table.holders(expert_DS))
        tokens_H = quota_ED[layer.holders.expert_H, layer.holders.device_H].astype(np.float64)
        planned = split_seconds(tokens_H, NO_SOURCES, layer) + self.price.control_s
        return planned, passive_seconds(np.asarray(load_E, np.float64), desk.put(self._static_ED))

    def _desk(self, load_E: NDArray[Any]) -> Desk:
        return desk_of(self._view(load_E))

    def _view(self, load_E: NDArray[Any]) -> LayerView:
        held_ED, loads = self._static_ED, np.asarray(load_E, np.float64)
        return LayerView(
            held_ED, held_ED, loads, loads[:0, None], np.zeros_like(held_ED), self._slots, 0, 0, self.price
        )
