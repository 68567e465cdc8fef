"""Predictors: the loads of a step from what is known before its gates, i.e. earlier steps and who is in this one.

All are causal by construction: row b of the result reads loads of steps before b only, and of step b no more than how
many tokens each request has in it (a server knows that before the forward pass).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from poise.routing.batch import RoutingBatch
from poise.routing.trace import NO_EXPERT
from poise.util.errors import OptionError

WINDOW = 5
"""Steps whose mean load is the prediction (Hecate, arXiv 2502.02581, section 3: w = 5)."""


class Predictor(Protocol):
    """Settings of a prediction."""

    name: ClassVar[str]

    def predict_BLE(self, batch: RoutingBatch, prior_LE: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Predicted tokens, float64 [B, L, E], each (step, layer) summing to its number of pairs.

        Where picks may compute nothing, it is the number that the steps before let expect.

        ``prior_LE`` [L, E] are loads known before the first step, any scale (default: all experts alike).
        """
        ...


def mean_share(load: NDArray[np.float64], window: int, prior: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sliding mean: each expert's share of the last ``window`` steps' tokens, float64 [..., E].

    Parameters
    ----------
    load : float64 [H, ..., E], tokens of the steps before, the newest last; H may be 0.
    prior : [..., E], loads of any scale that stand in where no step is known.
    """
    return _share(load[-window:].sum(axis=0) if len(load) else prior)


def _share(load: NDArray[np.float64]) -> NDArray[np.float64]:
    total = load.sum(axis=-1, keepdims=True)
    out: NDArray[np.float64] = np.where(total > 0, load / np.maximum(total, 1e-300), 1.0 / load.shape[-1])
    return out


def _prior(batch: RoutingBatch, prior_LE: NDArray[np.float64] | None) -> NDArray[np.float64]:
    shape = (batch.num_layers, batch.num_experts)
    if prior_LE is not None and prior_LE.shape != shape:
        raise OptionError(f"prior loads have shape {prior_LE.shape}, the batch has [layers, experts] {shape}")
    return np.ones(shape) if prior_LE is None else prior_LE


def _scaled(share_BLE: NDArray[np.float64], batch: RoutingBatch) -> NDArray[np.float64]:
    out: NDArray[np.float64] = share_BLE * _pairs_BL(batch)[:, :, None]
    return out


def _pairs_BL(batch: RoutingBatch) -> NDArray[np.float64]:
    """Pairs of each step as they are known before its gates: where picks may compute nothing, by the steps before."""
    pairs_BL = np.asarray(batch.load_BLE.sum(axis=2))
    if batch.start_B is None or batch.experts_TLK is None or not (batch.experts_TLK == NO_EXPERT).any():
        return pairs_BL
    tokens_B = np.diff(batch.start_B).astype(np.float64)
    before_BL = np.cumsum(pairs_BL, axis=0) - pairs_BL
    before_B = np.cumsum(tokens_B) - tokens_B
    each_BL = np.where(before_B[:, None] > 0, before_BL / np.maximum(before_B, 1.0)[:, None], float(batch.top_k))
    return np.asarray(tokens_B[:, None] * each_BL)


@dataclass(frozen=True, slots=True)
class SlidingMean:
    """Mean of the last ``window`` steps' loads (:func:`mean_share`)."""

    name: ClassVar[str] = "mean"
    window: int = WINDOW

    def predict_BLE(self, batch: RoutingBatch, prior_LE: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """See :class:`Predictor`."""
        prior = _prior(batch, prior_LE)
        shares = [mean_share(batch.load_BLE[:b], self.window, prior) for b in range(batch.num_steps)]
        return _scaled(np.stack(shares), batch)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Exponentially weighted mean: each older step counts ``decay`` times the next younger."""

    name: ClassVar[str] = "exponential"
    decay: float = 0.8

    def predict_BLE(self, batch: RoutingBatch, prior_LE: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """See :class:`Predictor`."""
        out = np.empty(batch.load_BLE.shape)
        out[0] = _share(_prior(batch, prior_LE))
        level = np.zeros(out.shape[1:])
        for b in range(1, batch.num_steps):
            level = self.decay * level + batch.load_BLE[b - 1]
            out[b] = _share(level)
        return _scaled(out, batch)


@dataclass(frozen=True, slots=True)
class RequestMix:
    """Each request's own routing so far, weighted by its tokens in this step; young requests lean on the mean.

    A request with n tokens so far counts n / (n + ``prior_tokens``), the sliding mean of ``window`` steps the rest.
    Without requests (load profiles) it is the sliding mean.
    """

    name: ClassVar[str] = "requests"
    prior_tokens: float = 32.0
    window: int = WINDOW

    def predict_BLE(self, batch: RoutingBatch, prior_LE: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """See :class:`Predictor`."""
        mean = SlidingMean(self.window).predict_BLE(batch, prior_LE)
        if batch.request_T is None or batch.experts_TLK is None or batch.start_B is None:
            return mean
        layers, experts = batch.num_layers, batch.num_experts
        requests = int(batch.request_T.max()) + 1
        seen = np.zeros((requests, layers * experts), np.float32)
        known = np.zeros(requests)
        offset = np.arange(layers)[None, :, None] * experts
        out = np.empty_like(mean)
        for b in range(batch.num_steps):
            rows = slice(batch.start_B[b], batch.start_B[b + 1])
            here, tokens = np.unique(batch.request_T[rows], return_counts=True)
            own = known[here] / (known[here] + self.prior_tokens)
            weight = np.where(known[here] > 0, tokens * own / np.maximum(known[here], 1.0), 0.0)
            mine = (weight @ seen[here]).reshape(layers, experts)
            rest = (tokens * (1.0 - own)).sum() / max(1, tokens.sum())
            out[b] = mine + rest * mean[b]
            ids = batch.experts_TLK[rows]
            flat, who = ids.astype(np.int64) + offset, np.broadcast_to(batch.request_T[rows, None, None], ids.shape)
            np.add.at(seen, (who[ids != NO_EXPERT], flat[ids != NO_EXPERT]), 1.0)
            np.add.at(known, batch.request_T[rows], 1.0)
        return out


PREDICTORS: dict[str, Predictor] = {p.name: p for p in (SlidingMean(), Exponential(), RequestMix())}
