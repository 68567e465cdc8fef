"""What one active expert costs by its tokens, as measured: the curve that replaces the roofline of a cluster.

The cost model needs two properties and a curve is refused without them. Seconds *rise* with tokens, and seconds *per
token fall*: then g(a + b) <= g(a) + g(b), splitting an expert never makes its total smaller, and the bounds of
:mod:`poise.cost.bound` hold. :func:`poise.lab.calibrate.fit.fit_curve` makes the nearest such curve of noisy rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.util.errors import ClusterError

MAX_KNOTS = 4096
TOLERANCE = 1e-9
"""Relative: a curve that was written out and read back must not fail by a rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredCurve:
    """Seconds g(n) of n tokens in one active expert at speed 1: piecewise linear through the knots.

    The first segment goes on down to one token and the last one up. Below one token, an expectation, the expert is
    active with at most that probability: g(n) = n * g(1).

    Parameters
    ----------
    tokens_X : float64 [X], tokens of one active expert, rising from 1 or more; two knots or more.
    seconds_X : float64 [X], rising or level, in the end rising; per token falling or level.
    parameters : parameters of the expert that was measured; other models are scaled by theirs.
    weight_bytes : bytes of a weight it was measured with. A record: other types of weights are not rescaled.

    Raises
    ------
    ClusterError : a property above is missing; the message names the knots.
    """

    tokens_X: NDArray[np.float64]
    seconds_X: NDArray[np.float64]
    parameters: float
    weight_bytes: float = 2.0

    def __post_init__(self) -> None:
        x, y = np.array(self.tokens_X, dtype=np.float64), np.array(self.seconds_X, dtype=np.float64)
        if x.ndim != 1 or x.shape != y.shape or not 2 <= x.size <= MAX_KNOTS:
            raise ClusterError(f"a curve has 2 to {MAX_KNOTS} knots, got {x.size} tokens and {y.size} seconds")
        if not (np.isfinite(x).all() and x[0] >= 1 and (np.diff(x) > 0).all()):
            raise ClusterError(f"a curve's tokens must rise from 1 or more, got {x[:8].tolist()}")
        if not (np.isfinite(y).all() and (y > 0).all()):
            raise ClusterError(f"a curve's seconds must be finite and above 0, got {y.min():g}")
        for name in ("parameters", "weight_bytes"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise ClusterError(f"{name} of a curve must be finite and above 0, got {value!r}")
        falls = np.flatnonzero(y[1:] < y[:-1] * (1 - TOLERANCE))
        if falls.size or y[-1] <= y[-2]:
            i = int(falls[0]) if falls.size else x.size - 2
            raise ClusterError(
                f"a curve must rise: {y[i]:g} s at {x[i]:g} tokens, {y[i + 1]:g} s at {x[i + 1]:g}",
                hint="its last segment too, since it goes on; more tokens must never be faster",
            )
        dearer = np.flatnonzero(y[1:] / x[1:] > y[:-1] / x[:-1] * (1 + TOLERANCE))
        if dearer.size:
            i = int(dearer[0])
            raise ClusterError(
                f"seconds per token must fall: {y[i] / x[i]:g} at {x[i]:g} tokens, {y[i + 1] / x[i + 1]:g} at "
                f"{x[i + 1]:g}",
                hint=f"at most {y[i] / x[i] * x[i + 1]:g} s there: smaller batches one after the other take no longer",
            )
        x.flags.writeable = y.flags.writeable = False
        object.__setattr__(self, "tokens_X", x)
        object.__setattr__(self, "seconds_X", y)

    @property
    def per_token(self) -> float:
        """Least seconds per token at any number of tokens: the slope of the last segment, which goes on."""
        return float((self.seconds_X[-1] - self.seconds_X[-2]) / (self.tokens_X[-1] - self.tokens_X[-2]))

    @property
    def per_expert(self) -> float:
        """Seconds of one token, g(1): the least that an active expert costs."""
        (x0, x1), (y0, y1) = self.tokens_X[:2], self.seconds_X[:2]
        return float(y0 - (x0 - 1.0) * (y1 - y0) / (x1 - x0))

    def seconds(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds g(n) of tokens at least 0; any shape, elementwise."""
        later = self.tokens_X > 1.0
        x = np.concatenate(([0.0, 1.0], self.tokens_X[later]))
        y = np.concatenate(([0.0, self.per_expert], self.seconds_X[later]))
        beyond = np.maximum(np.asarray(tokens) - x[-1], 0.0)
        out: NDArray[np.float64] = np.interp(tokens, x, y) + self.per_token * beyond
        return out

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a cluster file."""
        return {
            "tokens": self.tokens_X.tolist(),
            "seconds": self.seconds_X.tolist(),
            "parameters": float(self.parameters),
            "weight_bytes": float(self.weight_bytes),
        }

    def __repr__(self) -> str:
        x, y = self.tokens_X, self.seconds_X
        return f"MeasuredCurve({y[0]:.3g} s at {x[0]:g} tokens to {y[-1]:.3g} s at {x[-1]:g}, {x.size} knots)"
