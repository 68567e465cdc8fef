"""Dispatch, experts and combine of one rank under the four data flows of :mod:`poise.cost.traffic`, executed.

What travels is a *copy*: a token's row with the ids of the experts it is for and their weights. ``home`` sends a copy a
(token, expert) pair, ``home_device_dedup`` one a destination device, ``home_node_dedup`` one a destination node, which
the device that takes it in fans out inside (DeepEP); what comes back is the weighted sum over the copy's experts. Under
``stay`` (ExFlow, arXiv 2401.08383) the token moves to where its heaviest expert runs; results of its others join it
there. A dispatch is one all-gather of sizes and one exchange of rows; the way back needs no sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from poise.cost.traffic import DATA_FLOWS, DataFlow, landing_DN
from poise.machine.cluster import Cluster
from poise.runtime.collectives import exchange, gather
from poise.runtime.dispatch import copies_of
from poise.runtime.spans import span
from poise.util.errors import OptionError

Compute = Callable[[Tensor, NDArray[np.int64]], Tensor]
"""(rows [n, d] sorted by the place of their expert, pairs of each expert int64 [E]) -> outputs [n, d]."""
NOBODY = -1


@dataclass(frozen=True, slots=True, eq=False)
class MovedTokens:
    """Tokens that live on this rank after a layer under ``stay``, sorted by tag.

    Parameters
    ----------
    h_Td : [T, d], the rows that were given to :meth:`Flow.move`.
    y_Td : [T, d], weighted sums of their experts' outputs.
    tag_T : int64 [T], their tags.
    """

    h_Td: Tensor
    y_Td: Tensor
    tag_T: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CopyRows:
    """Copies on one rank: rows, and for which experts of the token each is.

    Parameters
    ----------
    x_nd : [n, d].
    ids_nK : int64 [n, K], experts computed from this copy; -1: not this one.
    weight_nK : [n, K], router weights.
    more_nX : int64 [n, X], what else a flow sends along.
    """

    x_nd: Tensor
    ids_nK: Tensor
    weight_nK: Tensor
    more_nX: Tensor


class Flow:
    """One data flow on one rank.

    Parameters
    ----------
    traffic : which.
    cluster : who is on which node.
    num_experts : E.
    group : process group whose ranks are the cluster's devices.

    ``extra_X`` int64 [X], if set, is gathered along with the sizes of the next dispatch into ``extra_DX`` [D, X].
    ``place_E`` int64 [E] is the order in which this rank's experts want their rows (default: by number).

    Raises
    ------
    OptionError : the group has another size than the cluster, or the flow is unknown.
    """

    def __init__(self, traffic: DataFlow, cluster: Cluster, num_experts: int, group: Any = None) -> None:
        if traffic not in DATA_FLOWS:
            raise OptionError(f"unknown data flow {traffic!r}", hint=f"one of {', '.join(DATA_FLOWS)}")
        self.group = group if group is not None else dist.group.WORLD
        self.world, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        if self.world != cluster.num_devices:
            raise OptionError(f"the cluster has {cluster.num_devices} devices, the process group {self.world} ranks")
        self.traffic, self.num_experts = traffic, num_experts
        self.node_D = torch.from_numpy(cluster.node_D.astype(np.int64))
        landing = torch.from_numpy(landing_DN(cluster))[self.rank]
        self.lands_D = torch.where(self.node_D == self.node_D[self.rank], torch.arange(self.world),
                                   landing[self.node_D])  # fmt: skip
        self.place_E = torch.arange(num_experts)
        self.extra_X: Tensor | None = None
        self.extra_DX: Tensor | None = None

    def run(self, x_Td: Tensor, ids_TK: Tensor, weight_TK: Tensor, device_TK: Tensor, compute: Compute) -> Tensor:
        """Weighted sums of the experts' outputs, [T, d], under one of the ``home`` flows; T may be 0.

        Parameters
        ----------
        x_Td, ids_TK, weight_TK : this rank's tokens, their experts and router weights.
        device_TK : int64 [T, K], the device that computes each pair.
        compute : the experts of this rank.
        """
        if self.traffic == "home_node_dedup" and int(self.node_D.max()) > 0:
            return self._by_node(x_Td, ids_TK, weight_TK, device_TK, compute)
        token_n, to_n, ids_nK = _copies(ids_TK, device_TK, self.traffic != "home")
        sent = CopyRows(x_Td[token_n], ids_nK, weight_TK[token_n], ids_nK[:, :0])
        got, way = self._out(sent, to_n)
        y_nd = self._back(self._experts(got, compute), way)
        return _sum_into(torch.zeros_like(x_Td), token_n, y_nd)

    def _by_node(self, x_Td: Tensor, ids_TK: Tensor, weight_TK: Tensor, device_TK: Tensor, compute: Compute) -> Tensor:
        """Once over the network into every node, then once to each device of it."""
        via_TK = self.lands_D.to(device_TK.device)[device_TK]
        token_n, to_n, _ = _copies(ids_TK, via_TK, True)
        here_nK = via_TK[token_n] == to_n[:, None]
        ids_nK = torch.where(here_nK, ids_TK[token_n], NOBODY)
        target_nK = torch.where(here_nK, device_TK[token_n], self.rank)
        landed, first = self._out(CopyRows(x_Td[token_n], ids_nK, weight_TK[token_n], target_nK), to_n)
        active_mK = landed.ids_nK >= 0
        copy_m, to_m, ids_mK = _copies(landed.ids_nK, landed.more_nX, True, active_mK)
        fan = CopyRows(landed.x_nd[copy_m], ids_mK, landed.weight_nK[copy_m], ids_mK[:, :0])
        got, second = self._out(fan, to_m)
        y_md = self._back(self._experts(got, compute), second)
        y_nd = self._back(_sum_into(torch.zeros_like(landed.x_nd), copy_m, y_md), first)
        return _sum_into(torch.zeros_like(x_Td), token_n, y_nd)

    def move(
        self, h_Td: Tensor, ids_TK: Tensor, weight_TK: Tensor, device_TK: Tensor, tag_T: Tensor, compute: Compute
    ) -> MovedTokens:
        """``stay``: tokens go to where their first expert is computed; the experts of a token are heaviest first.

        ``tag_T`` int64 [T] names each token among those of all ranks. Other parameters as in :meth:`run`.
        """
        token_n, to_n, ids_nK = _copies(ids_TK, device_TK, True)
        along = torch.cat([tag_T[token_n, None], device_TK[token_n]], dim=1)
        got, _ = self._out(CopyRows(h_Td[token_n], ids_nK, weight_TK[token_n], along), to_n)
        y_nd = self._experts(got, compute)
        tag_n, device_nK = got.more_nX[:, 0], got.more_nX[:, 1:]
        order = torch.argsort(tag_n, stable=True)  # a rank gets at most one copy of a token
        mine = order[device_nK[order, 0] == self.rank]
        away = order[device_nK[order, 0] != self.rank]
        away = away[torch.argsort(device_nK[away, 0], stable=True)]
        sent_D = torch.bincount(device_nK[away, 0], minlength=self.world).tolist()
        joins_TD = torch.zeros(len(mine), self.world, dtype=torch.bool, device=mine.device)
        joins_TD.scatter_(1, device_nK[mine], True)
        joins_TD[:, self.rank] = False
        from_n, row_n = torch.nonzero(joins_TD.T, as_tuple=True)
        y_Td = y_nd[mine]
        if ids_TK.shape[1] > 1:
            got_D = torch.bincount(from_n, minlength=self.world).tolist()
            y_Td = _sum_into(y_Td, row_n, self._back(y_nd[away], (got_D, sent_D)))
        return MovedTokens(got.x_nd[mine], y_Td, tag_n[mine])

    def _experts(self, got: CopyRows, compute: Compute) -> Tensor:
        """Weighted sum over the experts of each copy, [n, d]."""
        copy_p, k_p = torch.nonzero(got.ids_nK >= 0, as_tuple=True)
        expert_p = got.ids_nK[copy_p, k_p]
        order = torch.argsort(self.place_E.to(expert_p.device)[expert_p], stable=True)
        copy_p, k_p = copy_p[order], k_p[order]
        count_E = torch.bincount(expert_p, minlength=self.num_experts).cpu().numpy()
        with span("experts"):
            y_pd = compute(got.x_nd[copy_p], count_E)
        weighted = (y_pd * got.weight_nK[copy_p, k_p, None]).to(y_pd.dtype)
        return _sum_into(torch.zeros_like(got.x_nd), copy_p, weighted)

    @span("dispatch")
    def _out(self, copies: CopyRows, to_n: Tensor) -> tuple[CopyRows, tuple[list[int], list[int]]]:
        """Send copies, sorted by rank; what arrives, and rows sent to and got from each rank."""
        sent_D = torch.bincount(to_n, minlength=self.world)
        mine_X = sent_D if self.extra_X is None else torch.cat([sent_D, self.extra_X])
        everyone_DX = gather(mine_X, self.group)
        way = sent_D.tolist(), everyone_DX[:, self.rank].tolist()
        if self.extra_X is not None:
            self.extra_DX, self.extra_X = everyone_DX[:, self.world :], None
        parts = (copies.x_nd, copies.weight_nK, copies.ids_nK.to(torch.int32), copies.more_nX)
        got = exchange(torch.cat([_bytes(part) for part in parts], dim=1), *way, self.group)
        out, at = [], 0
        for part in parts:
            wide = part.shape[1] * part.element_size()
            mine = part.new_empty((len(got), part.shape[1]))
            if mine.numel():
                mine.view(torch.uint8).copy_(got[:, at : at + wide])
            out.append(mine)
            at += wide
        return CopyRows(out[0], out[2].to(torch.int64), out[1], out[3]), way

    def _back(self, y_nd: Tensor, way: tuple[list[int], list[int]]) -> Tensor:
        sent_D, got_D = way
        with span("combine"):
            return exchange(y_nd, got_D, sent_D, self.group)


def _bytes(part: Tensor) -> Tensor:
    if not part.numel():
        return part.new_empty((len(part), part.shape[1] * part.element_size()), dtype=torch.uint8)
    return part.contiguous().view(torch.uint8)


def _copies(
    ids_TK: Tensor, device_TK: Tensor, dedup: bool, active_TK: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies to send, by device, then token: token int64 [n], device int64 [n], experts int64 [n, K], -1 elsewhere.

    Without ``dedup`` every pair is a copy of its own. ``active_TK`` leaves pairs out.
    """
    tokens, top_k = ids_TK.shape
    active = torch.ones_like(ids_TK, dtype=torch.bool) if active_TK is None else active_TK
    if not dedup:
        token, k = torch.nonzero(active, as_tuple=True)
        to = device_TK[token, k]
        order = torch.argsort(to, stable=True)
        token, k = token[order], k[order]
        ids = ids_TK.new_full((len(token), top_k), NOBODY)
        ids.scatter_(1, k[:, None], ids_TK[token, k, None])
        return token, to[order], ids
    token, k = torch.nonzero(active, as_tuple=True)
    to, token, _ = copies_of(device_TK[token, k], token, tokens)
    ids = torch.where((device_TK[token] == to[:, None]) & active[token], ids_TK[token], NOBODY)
    return token, to, ids


def _sum_into(out_Td: Tensor, row_n: Tensor, y_nd: Tensor) -> Tensor:
    return out_Td.index_add_(0, row_n, y_nd)
