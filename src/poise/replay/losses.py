"""What each loss costs: experts without a holder, imbalance at once and after copies, and the least there can be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.cost.split import even_share
from poise.planning.losses import Loss, Losses
from poise.planning.methods.vllm_reassign import reassigned
from poise.planning.placement import Placement
from poise.planning.solve.repair import level_bound


@dataclass(frozen=True, slots=True)
class LossRow:
    """One loss. Imbalances are those of mean loads under the even split: largest over mean, mean over layers.

    Parameters
    ----------
    name, lost : of the devices.
    orphans : experts that no device holds that is left, over all layers; each is read once from the checkpoint.
    least_reads : the fewest that any placement on the rest reads: as many.
    copies : experts copied between devices that are left.
    before, first, after : imbalance before the loss, once orphans are read, and after the copies.
    bound : no placement in the slots that are left has less.
    rival : imbalance by vLLM's rule after a loss, which reads as many.
    """

    name: str
    lost: tuple[int, ...]
    orphans: int
    least_reads: int
    copies: int
    before: float
    first: float
    after: float
    bound: float
    rival: float


def loss_rows(losses: Losses, load_LE: NDArray[np.float64], speed_D: NDArray[np.float64]) -> list[LossRow]:
    """A row for every loss; ``load_LE`` float64 [L, E] are the loads judged on, ``speed_D`` float64 [D]."""
    now = imbalance(losses.before, load_LE, speed_D)
    return [_row(losses.before, loss, load_LE, speed_D, now) for loss in losses.losses]


def imbalance(placement: Placement, load_LE: NDArray[np.float64], speed_D: NDArray[np.float64]) -> float:
    """Largest over mean load of the devices by their speeds, mean over layers with tokens."""
    level_LD = np.einsum("le,led->ld", load_LE, even_share(placement.count_LED())) / speed_D
    return _over_mean(level_LD.max(axis=1), load_LE, speed_D)


def _over_mean(top_L: NDArray[np.float64], load_LE: NDArray[np.float64], speed_D: NDArray[np.float64]) -> float:
    mean_L = load_LE.sum(axis=1) / speed_D.sum()
    some = mean_L > 0
    return float((top_L[some] / mean_L[some]).mean()) if some.any() else 1.0


def _row(
    before: Placement, loss: Loss, load_LE: NDArray[np.float64], speed_D: NDArray[np.float64], now: float
) -> LossRow:
    left = np.setdiff1d(np.arange(before.num_devices), loss.lost)
    slots_D, speed = before.slots_D[left], speed_D[left]
    bound_L = np.array([level_bound(load_E, slots_D, speed) for load_E in load_LE])
    orphans = int((~(before.count_LED()[:, :, left] > 0).any(axis=2)).sum())
    rule = reassigned(before, loss.lost).after_on_rest
    return LossRow(
        loss.name, loss.lost, len(loss.reads_R3(before)), orphans, loss.copies, now,
        imbalance(loss.first_on_rest, load_LE, speed), imbalance(loss.after_on_rest, load_LE, speed),
        _over_mean(bound_L, load_LE, speed), imbalance(rule, load_LE, speed),
    )  # fmt: skip
