"""Dispatch and combine: every (token, expert) pair to the rank the plan names and back, by one uneven all-to-all each.

No token is dropped; ranks and experts without tokens are fine. Pairs leave sorted by (rank, expert) and are computed
sorted by (expert, source), so that an expert's tokens lie together and the order is the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.runtime.collectives import exchange, gather


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """One rank's part of a dispatch.

    Parameters
    ----------
    send_N : int64 [N] positions of this rank's pairs (token * K + k) in the order they leave.
    sent_D, got_D : pairs to and from each rank.
    arrange_n : int64 [n] what arrived, in the order the experts need it.
    count_E : pairs of each expert computed here, int64 [E] on the host.
    """

    send_N: Tensor
    sent_D: list[int]
    got_D: list[int]
    arrange_n: Tensor
    count_E: NDArray[np.int64]


def all_counts(ids_TK: Tensor, num_experts: int, group: Any) -> NDArray[np.int64]:
    """Pairs of every rank and expert, int64 [D, E]: one all-gather of E numbers a rank."""
    mine = torch.bincount(ids_TK.reshape(-1), minlength=num_experts)
    return gather(mine, group).cpu().numpy()


def make_exchange(ids_TK: Tensor, rows_SED: NDArray[np.int64], rank: int, slots: list[int] | None = None) -> Exchange:
    """From this rank's expert ids int64 [T, K] and everyone's pairs by source, expert and device int64 [D, E, D].

    ``slots`` are the experts held here in the order they are computed; without it, by number.
    """
    device = ids_TK.device
    mine_ED, here_SE = rows_SED[rank], rows_SED[:, :, rank]
    by_expert = torch.argsort(ids_TK.reshape(-1), stable=True)
    to = np.repeat(np.tile(np.arange(mine_ED.shape[1]), mine_ED.shape[0]), mine_ED.reshape(-1))
    by_rank = torch.from_numpy(np.argsort(to, kind="stable")).to(device)
    expert = np.repeat(np.tile(np.arange(here_SE.shape[1]), here_SE.shape[0]), here_SE.reshape(-1))
    place_E = np.zeros(here_SE.shape[1], np.int64)
    place_E[slots if slots is not None else slice(None)] = np.arange(len(place_E) if slots is None else len(slots))
    return Exchange(
        by_expert[by_rank],
        mine_ED.sum(axis=0).tolist(),
        here_SE.sum(axis=1).tolist(),
        torch.from_numpy(np.argsort(place_E[expert], kind="stable")).to(device),
        here_SE.sum(axis=0),
    )


def there(x_Nd: Tensor, way: Exchange, group: Any) -> Tensor:
    """Pairs in sending order to their ranks; what is computed here, [n, d], sorted by expert."""
    return exchange(x_Nd, way.sent_D, way.got_D, group).index_select(0, way.arrange_n)


def back(y_nd: Tensor, way: Exchange, group: Any) -> Tensor:
    """The reverse of :func:`there`: [N, d] in sending order."""
    out = torch.empty_like(y_nd)
    out[way.arrange_n] = y_nd
    return exchange(out, way.got_D, way.sent_D, group)
