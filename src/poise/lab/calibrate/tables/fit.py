"""The four constants of a kernel, fitted to measured seconds of one rank.

    seconds = start + sum over experts of max(read_factor * expert_bytes / bandwidth, n * compute_factor * flops / peak)
              + activation_factor * (S * (2h + 3i) + 2 N h) * 2 bytes / bandwidth

with n the tokens of an expert, S the pairs on the rank, N the tokens that the kernel was given, h and i the widths: in
use, N is the tokens that dispatch brings to the rank. Least squares of the logarithm of the ratio, with a soft l1 loss:
rows last from 20 microseconds to a second, and a few are off by a multiple.

A compute factor far below 1 says that reading and arithmetic do not overlap: a token's seconds then stand in the
activation term, which is added to reading. Held to 1 or more, the model gets 288 against 256 slots wrong in 6 of 100
pairs instead of 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from poise.lab.calibrate.tables.ranks import RankLoads

START = (20e-6, 1.3, 1.5, 1.0)
"""Where the search begins; it stays within exp(-6) and exp(5) times this."""
SAMPLE = 2500
"""Rows that a fit takes: more change no constant by a percent."""


@dataclass(frozen=True, slots=True, eq=False)
class KernelWork:
    """Rows of one kernel: ideal seconds of the three terms, and what was measured.

    Parameters
    ----------
    read_R : seconds to read one expert's weights at full bandwidth.
    token_R : seconds of one token's arithmetic in one expert at the peak of the type.
    activation_R : seconds to move all inputs, intermediate values and outputs once at full bandwidth.
    loads : of the timed rank.
    seconds_R : measured.
    """

    read_R: NDArray[np.float64]
    token_R: NDArray[np.float64]
    activation_R: NDArray[np.float64]
    loads: RankLoads
    seconds_R: NDArray[np.float64]

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> KernelWork:
        """These rows only."""
        return KernelWork(
            self.read_R[index], self.token_R[index], self.activation_R[index], self.loads.take(index),
            self.seconds_R[index],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelFit:
    """Constants of a kernel; factors are measured over ideal seconds."""

    start_s: float
    read_factor: float
    compute_factor: float
    activation_factor: float

    def seconds(self, work: KernelWork) -> NDArray[np.float64]:
        """What the model says of each row, float [R]."""
        read, token = self.read_factor * work.read_R, self.compute_factor * work.token_R
        experts = read * work.loads.active_R + token * work.loads.excess(read / token)
        return self.start_s + experts + self.activation_factor * work.activation_R


DATASHEET = KernelFit(0.0, 1.0, 1.0, 0.0)
"""The roofline of a datasheet: no start, no activations, everything at its peak."""


def fit_kernel(work: KernelWork) -> KernelFit:
    """Constants that fit the rows best; of many rows, of a sample."""
    if len(work.seconds_R) > SAMPLE:
        work = work.take(np.random.default_rng(0).choice(len(work.seconds_R), SAMPLE, replace=False))
    begin = np.log(START)

    def residual(log: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(np.maximum(KernelFit(*np.exp(log).tolist()).seconds(work), 1e-9) / work.seconds_R)

    found = least_squares(
        residual, begin, bounds=(begin - 6.0, begin + 5.0), loss="soft_l1", f_scale=0.1, max_nfev=80
    )  # fmt: skip
    return KernelFit(*np.exp(found.x).tolist())
