"""Picks of one layer that were taken for layers: [tokens, layers * K] read with too small a K, or with none.

The K picks of a token in a layer are different experts. Those of different layers are sometimes the same, unless the
layers use other experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dumps.mapping import MAX_TOP_K
from poise.util.errors import TraceError

PROOF_BITS = 16.0
"""Layers are picks of one if it would look so by chance once in 2^16 times."""
TOKENS = 4096
"""Tokens that are looked at."""


def refuse_folded(experts_TLK: NDArray[np.int16], form: str) -> None:
    """Raise TraceError where every m layers in a row never share an expert of a token, though they would by chance.

    ``form``: the name of the format, whose numbers came without their shape.
    """
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
                f"layers, say so: --format {form}",
            )


def never_alike(groups: Iterable[NDArray[Any]]) -> bool:
    """Whether no token has a number twice in a group [T, M, W], and it would if M were drawn by themselves.

    What is below 0 is no expert: it is nobody's double, and proves nothing.
    """
    bits = 0.0
    for group_TMW in groups:
        tokens, columns = group_TMW.shape[:2]
        ordered = np.sort(group_TMW.reshape(tokens, -1), axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            return False
        column_M = (group_TMW[:, at].ravel() for at in range(columns))
        share_MN = np.stack([np.bincount(column[column >= 0].astype(np.int64), minlength=int(ordered.max()) + 1)
                             for column in column_M]) / tokens  # fmt: skip
        alike = float(np.triu(share_MN @ share_MN.T, 1).sum())
        bits += tokens * alike * math.log2(math.e)
    return bits >= PROOF_BITS
