"""One step device by device, as the cost model adds it: in every part of a layer all wait for the slowest.

Finer, and with other totals, is :mod:`poise.simulate.serving`, where a device waits only for what it needs. This
one explains the step time of :mod:`poise.cost.step`, to the last digit, for every data flow and for loads alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import device_compute
from poise.cost.entries import LayerEntries
from poise.cost.exchange import ExchangeModel
from poise.cost.near import layer_share, placed_tokens
from poise.cost.pricing import Pricing
from poise.cost.step import kv_seconds_per_token
from poise.cost.traffic import Copies, port_load
from poise.replay.links import device_seconds, layer_bytes
from poise.routing.batch import RoutingBatch
from poise.simulate.clockwork import Act, Busy, Clockwork, Mark, Meet

PARTS = ("keys and values", "dispatch", "experts", "combine")
"""Parts of a layer in the order they run; only ``stay`` has keys and values."""
NO_EXCHANGE = ExchangeModel(0.0, 0.0, 1.0, 1.0)
"""Exchanges are among the seconds here, so that these constants decide nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class StepLanes:
    """What every device does in one step.

    Parameters
    ----------
    busy_LDP : float64 [L, D, 4], seconds that each device works in each of :data:`PARTS`.
    """

    busy_LDP: NDArray[np.float64]

    @property
    def span_LP(self) -> NDArray[np.float64]:
        """Seconds of each part, float64 [L, 4]: those of its slowest device."""
        return self.busy_LDP.max(axis=1)

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return float(self.span_LP.sum())

    def begin_LP(self, layers: Sequence[int]) -> NDArray[np.float64]:
        """When each part of these layers begins if they run one after the other, float64 [layers, 4]."""
        devices = self.busy_LDP.shape[1]
        marks, clock = np.zeros((len(layers), devices, len(PARTS))), Clockwork(np.zeros(devices, np.int32), NO_EXCHANGE)
        for marks_DP, layer in zip(marks, layers, strict=True):
            clock.run(waiting_acts(self.busy_LDP[layer]), marks_DP)
        return marks[:, 0]

    def waiting_P(self) -> NDArray[np.float64]:
        """Share of the devices' time in the whole step that they wait in each part, float64 [4]."""
        idle_P = self.span_LP.sum(axis=0) - self.busy_LDP.mean(axis=1).sum(axis=0)
        out: NDArray[np.float64] = idle_P / max(self.seconds, 1e-300)
        return out


def waiting_acts(busy_DP: NDArray[np.float64]) -> Iterator[Act]:
    """A layer in which all wait for the slowest after every part."""
    for part in range(len(PARTS)):
        yield Mark((part,))
        yield Busy(busy_DP[:, part])
        yield Meet()


def step_lanes(batch: RoutingBatch, step: int, count_LED: NDArray[Any], pricing: Pricing) -> StepLanes:
    """Lanes of one step; other parameters and errors of :func:`poise.cost.step.batch_cost`.

    A device's seconds in an exchange are those of its fullest port (where nodes share a network port, their node's),
    and the start-up.
    """
    cluster, model, traffic = pricing.cluster, pricing.model, pricing.traffic
    busy = np.zeros((batch.num_layers, cluster.num_devices, len(PARTS)))
    out, back = cluster.dispatch_wire, cluster.combine_wire
    one = batch.at_home(cluster.num_devices).part(slice(step, step + 1))
    for part in layer_bytes(batch, count_LED, pricing, step=step):
        at, count_ED = busy[part.layer], count_LED[part.layer]
        if not one.load_BLE[0, part.layer].any():
            continue
        held = LayerEntries.of_counts(count_ED)
        share = layer_share(one, part.layer, held, cluster, pricing.split)
        tokens_ED = held.dense(placed_tokens(one, part.layer, share, held))[0]
        if traffic == "stay":
            at[:, 0] = batch.tokens_BL()[step, part.layer] * kv_seconds_per_token(cluster, model)
        at[:, 1] = out.start_s + device_seconds(port_load(Copies(part.out_BDD), cluster), cluster, out)[0]
        at[:, 2] = device_compute(tokens_ED, cluster, model)
        if traffic != "stay" or batch.top_k > 1:
            at[:, 3] = back.start_s + device_seconds(port_load(Copies(part.back_BDD), cluster), cluster, back)[0]
    return StepLanes(busy)
