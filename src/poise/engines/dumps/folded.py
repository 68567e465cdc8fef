"""Picks of one layer that were taken for layers: [tokens, layers * K] read with too small a K, or with none.

The K picks of a token in a layer are different experts. Those of different layers are sometimes the same, unless the
layers use other experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dumps.mapping import MAX_TOP_K
from poise.util.errors import TraceError

PROOF_BITS = 16.0
"""Layers are picks of one if it would look so by chance once in 2^16 times."""
TOKENS = 4096
"""Tokens that are looked at."""


def refuse_folded(experts_TLK: NDArray[np.int16]) -> None:
    """Raise TraceError where every m layers in a row never share an expert of a token, though they would by chance."""
    picks_TLK = experts_TLK[:: max(1, len(experts_TLK) // TOKENS)]
    _, layers, width = picks_TLK.shape
    for merged in range(min(layers, MAX_TOP_K // width), 1, -1):
        if layers % merged:
            continue
        groups = (picks_TLK[:, first : first + merged] for first in range(0, layers, merged))
        if never_alike([group for group in groups if (group != group[:1]).any()]):  # else they are dense
            raise TraceError(
                f"read as {layers} layers of {width} experts a token, they seem to be {layers // merged} layers of "
                f"{merged * width}: no token has an expert twice in {merged * width} columns, layer by layer",
                hint=f"check --top-k ({merged * width}?), or store [tokens, layers, experts a token]; if they are "
                "layers, name the format by --format",
            )


def never_alike(groups: Sequence[NDArray[Any]]) -> bool:
    """Whether no token has a number twice in a group [T, M, W], and it would if M were drawn by themselves."""
    bits = 0.0
    for group_TMW in groups:
        tokens, columns = group_TMW.shape[:2]
        ordered = np.sort(group_TMW.reshape(tokens, -1), axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            return False
        share_MN = np.stack([np.bincount(group_TMW[:, at].ravel(), minlength=int(ordered.max()) + 1)
                             for at in range(columns)]) / tokens  # fmt: skip
        alike = float(np.triu(share_MN @ share_MN.T, 1).sum())
        bits += tokens * alike * math.log2(math.e)
    return bits >= PROOF_BITS
