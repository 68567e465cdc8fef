"""How far a fit is off on rows that it never saw."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from poise.lab.calibrate.tables.fit import KernelFit, KernelWork, fit_kernel


def folds(label_R: NDArray[np.generic], count: int = 2) -> NDArray[np.int64]:
    """Fold of each row, by its label: the sorted labels are dealt to the folds in turn. One fold if there is one
    label.
    """
    labels, which_R = np.unique(label_R, return_inverse=True, axis=0)
    return np.arange(len(labels))[which_R.reshape(-1)] % count


def held_out_seconds(
    work: KernelWork, fold_R: NDArray[np.int64], fit: Callable[[KernelWork], KernelFit] = fit_kernel
) -> NDArray[np.float64]:
    """Each row as predicted by the constants that were fitted to the other folds; NaN where there is no other."""
    out = np.full(len(fold_R), np.nan)
    for fold in np.unique(fold_R):
        judged = fold_R == fold
        if not judged.all():
            out[judged] = fit(work.take(~judged)).seconds(work.take(judged))
    return out


def mape(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    """Mean absolute relative error; NaN without rows."""
    return float(np.abs(predicted / measured - 1.0).mean()) if len(measured) else float("nan")


def bias(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    """Mean relative error: below 0 is too fast."""
    return float((predicted / measured - 1.0).mean()) if len(measured) else float("nan")
