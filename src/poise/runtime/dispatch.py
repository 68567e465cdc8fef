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

from poise.runtime.collectives import Arriving, gather
from poise.runtime.spans import span
from poise.util.errors import ModelError

NO_EXPERT = -1
"""An id that names no expert (dropped by a capacity, or belonging to another rank); E means the same."""


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """One rank's part of a dispatch.

    Parameters
    ----------
    send_N : int64 [N] positions of this rank's pairs (token * K + k) in the order they leave.
    sent_D, got_D : pairs to and from each rank.
    arrange_n : int64 [n] what arrived, in the order the experts need it.
    count_E : pairs of each expert computed here, int64 [E] on the host.
    most : most pairs from any rank to another one.
    """

    send_N: Tensor
    sent_D: list[int]
    got_D: list[int]
    arrange_n: Tensor
    count_E: NDArray[np.int64]
    most: int


def all_counts(ids_TK: Tensor, num_experts: int, group: Any) -> NDArray[np.int64]:
    """Pairs of every rank and expert, int64 [D, E]: one all-gather of E numbers a rank."""
    mine = torch.bincount(ids_TK.reshape(-1), minlength=num_experts)
    return gather(mine, group).cpu().numpy()


def routed(x: Tensor, ids: Tensor, weights: Tensor, width: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """What a model gives its experts, as tokens [T, d], ids int64 [T, K] and router weights [T, K].

    Raises
    ------
    ModelError : shapes that do not fit together, tokens of another width, or ids that are no whole numbers.
    """
    hint = "experts are called as experts(tokens [T, d], ids [T, K], weights [T, K])"
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ModelError(f"expert ids are of type {ids.dtype}, not whole numbers", hint=hint)
    if not ids.dim() or not ids.shape[-1]:
        raise ModelError(f"expert ids have shape {tuple(ids.shape)}, not [T, K]", hint=hint)
    if weights.shape[-1:] != ids.shape[-1:] or weights.numel() != ids.numel():
        raise ModelError(f"router weights have shape {tuple(weights.shape)}, ids {tuple(ids.shape)}", hint=hint)
    if not x.dim() or (width is not None and x.shape[-1] != width):
        raise ModelError(f"tokens have shape {tuple(x.shape)}, experts a width of {width}", hint=hint)
    if x.shape[:-1].numel() != ids.shape[:-1].numel():
        raise ModelError(f"tokens have shape {tuple(x.shape)}, expert ids {tuple(ids.shape)}", hint=hint)
    shape = (ids.shape[:-1].numel(), ids.shape[-1])
    return x.reshape(shape[0], x.shape[-1]), ids.reshape(shape).to(torch.int64), weights.reshape(shape)


def counted(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Pairs by id, int64 [E + 4]: below -1, -1, the experts, E, above E."""
    return torch.bincount((ids_TK.reshape(-1) + 2).clamp_(0, num_experts + 3), minlength=num_experts + 4)


def named(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Which ids name an expert, bool [T, K]."""
    return (ids_TK >= 0) & (ids_TK < num_experts)


def evenly(ids_TK: Tensor, num_experts: int, rank: int) -> Tensor:
    """The same number of pairs for every expert, in place of the router's choice; ids that name no expert stay."""
    turn = torch.arange(ids_TK.numel(), device=ids_TK.device) + rank * ids_TK.numel()
    return torch.where(named(ids_TK, num_experts), (turn % num_experts).view(ids_TK.shape), ids_TK)


def out_of_range(ids_TK: Tensor, num_experts: int) -> ModelError | None:
    """What to say of ids that name neither an expert nor none; None if all do."""
    wrong = ids_TK[(ids_TK < NO_EXPERT) | (ids_TK > num_experts)]
    if not len(wrong):
        return None
    return ModelError(
        f"{len(wrong)} expert ids lie outside 0..{num_experts - 1}, as {wrong[0].item()} does",
        hint=f"-1 and {num_experts} mean no expert",
    )


def make_exchange(ids_TK: Tensor, rows_SED: NDArray[np.int64], rank: int, slots: list[int] | None = None) -> Exchange:
    """One rank's exchange, from its expert ids int64 [T, K] and pairs by source, expert and device int64 [D, E, D].

    Pairs without an expert are not sent. ``slots`` are the experts held here in the order they are computed; without
    it, by number.
    """
    device = ids_TK.device
    mine_ED, here_SE = rows_SED[rank], rows_SED[:, :, rank]
    ids = ids_TK.reshape(-1)
    if mine_ED.sum() < len(ids):
        ids = torch.where(named(ids, len(mine_ED)), ids, len(mine_ED))  # sorted behind all that is sent
    by_expert = torch.argsort(ids, stable=True)
    to = np.repeat(np.tile(np.arange(mine_ED.shape[1]), mine_ED.shape[0]), mine_ED.reshape(-1))
    by_rank = torch.from_numpy(np.argsort(to, kind="stable")).to(device)
    expert = np.repeat(np.tile(np.arange(here_SE.shape[1]), here_SE.shape[0]), here_SE.reshape(-1))
    place_E = np.zeros(here_SE.shape[1], np.int64)
    place_E[slots if slots is not None else slice(None)] = np.arange(len(place_E) if slots is None else len(slots))
    pairs_SD = rows_SED.sum(axis=1)
    np.fill_diagonal(pairs_SD, 0)
    return Exchange(
        by_expert[by_rank],
        mine_ED.sum(axis=0).tolist(),
        here_SE.sum(axis=1).tolist(),
        torch.from_numpy(np.argsort(place_E[expert], kind="stable")).to(device),
        here_SE.sum(axis=0),
        int(pairs_SD.max()),
    )


def there(x_Nd: Tensor | None, way: Exchange, coming: Arriving, prefix: str = "") -> Tensor:
    """Send pairs, in sending order, to their ranks; those that are computed here, [n, d], sorted by expert.

    ``coming`` was made for what comes (``way.got_D``); without ``x_Nd`` it has been sent. ``prefix`` is put before the
    names of its spans (:mod:`poise.runtime.spans`).
    """
    with span(f"{prefix}dispatch"):
        came = (coming if x_Nd is None else coming.send(x_Nd, way.sent_D)).wait()
    with span(f"{prefix}arrange"):
        return came.index_select(0, way.arrange_n)


def back(y_nd: Tensor, way: Exchange, coming: Arriving, prefix: str = "") -> Tensor:
    """Send results back, the reverse of :func:`there`; those of this rank's pairs, [N, d], in sending order.

    ``coming`` was made for what comes (``way.sent_D``).
    """
    out = torch.empty_like(y_nd)
    out[way.arrange_n] = y_nd
    with span(f"{prefix}combine"):
        return coming.send(out, way.got_D).wait()
