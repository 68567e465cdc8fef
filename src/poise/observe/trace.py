"""RoutingTrace: which experts each token chose, in every MoE layer. LoadProfile: how many tokens each expert got."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.errors import TraceError


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """Routing of T tokens through L MoE layers, K experts each. Arrays are read-only.

    Parameters
    ----------
    experts : int16 [T, L, K], logical expert ids, heaviest first where the recorder knew ([T, L] is read as K = 1).
    num_experts : E.
    request : int32 [T], request a token belongs to; rows of one request keep their order. Default: one request each.
    is_decode : bool [T], token was generated (else prefill). Default: all prefill.
    step : int32 [T] or None, forward pass of the token, if the recorder knew it.
    home : int32 [T] or None, home rank, if the recorder knew it.
    weights : float32 [T, L, K] or None, router weights.
    layer_ids : int32 [L], index of each MoE layer among the model's decoder layers. Default 0..L-1.
    domain : int16 [T] or None, index into domain_names.
    domain_names : names of the domains.
    name : file or generator it came from.
    """

    experts: NDArray[np.int16]
    num_experts: int
    request: NDArray[np.int32] | None = None
    is_decode: NDArray[np.bool_] | None = None
    step: NDArray[np.int32] | None = None
    home: NDArray[np.int32] | None = None
    weights: NDArray[np.float32] | None = None
    layer_ids: NDArray[np.int32] | None = None
    domain: NDArray[np.int16] | None = None
    domain_names: tuple[str, ...] = ()
    name: str = field(default="trace")
    # shape: T, L, K = experts.shape


@dataclass(frozen=True, slots=True, eq=False)
class LoadProfile:
    """Loads without tokens: how many tokens each expert got, per recorded step.

    Parameters
    ----------
    load_BLE : float64 [B, L, E], tokens of each expert in each of B recorded steps (or one whole workload, B = 1).
    layer_ids : int32 [L].
    top_k : K if known, else 1 (a token then counts K times in load_BLE).
    affinity : dict of (l, l') -> [E, E] pair counts between two recorded layers, where the file has them.
    name : file it came from.
    """

    load_BLE: NDArray[np.float64]
    layer_ids: NDArray[np.int32]
    top_k: int = 1
    name: str = field(default="profile")
