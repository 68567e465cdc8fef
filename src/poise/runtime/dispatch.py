"""Dispatch and combine: every (token, expert) pair to the rank the plan names and back, by one uneven all-to-all each.

No token is dropped; ranks and experts without tokens are fine. Pairs leave sorted by (rank, expert) and are computed
sorted by (expert, source), so that an expert's tokens lie together and the order is the same in every run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.runtime.collectives import Arriving, SentRows, exchanges, gather, is_short, on_gloo
from poise.runtime.spans import span
from poise.util.errors import ModelError

NO_EXPERT = -1
"""An id that names no expert (dropped by a capacity, or belonging to another rank); E means the same."""


class PairExchange(ABC):
    """Pairs of this rank to their experts and back; n rows are computed here.

    ====================================================  ======================================
    :class:`Exchange`                                     exact sizes, which the host knows
    :class:`poise.runtime.once.OnceExchange`              the same, a token to a device once
    :class:`poise.runtime.device.padded.PaddedExchange`   sizes that stay on the device, padded
    ====================================================  ======================================
    """

    __slots__ = ()

    @property
    @abstractmethod
    def whole(self) -> bool:
        """Whether it is known that every pair names an expert."""

    @abstractmethod
    def tokens_there(self, x_Td: Tensor) -> Tensor:
        """Tokens of this rank to what is computed here, [n, d], sorted by expert."""

    def sends_ahead(self, like_Nd: Tensor) -> bool:
        """Whether :meth:`send_pairs` may begin before it is known that all ranks do."""
        return False

    @abstractmethod
    def send_pairs(self, y_Nd: Tensor) -> SentRows:
        """Begin to send rows of this rank's pairs [T * K, d] to where their experts are; :meth:`arrived` takes it."""

    @abstractmethod
    def arrived(self, sent: SentRows, prefix: str = "") -> Tensor:
        """What comes of it is computed here, [n, d], sorted by expert.

        ``prefix`` is put before the names of spans (:mod:`poise.runtime.spans`).
        """

    @abstractmethod
    def ask_back(self, like_nd: Tensor) -> Arriving | None:
        """Ask, before it is computed, for what :meth:`back` will bring; like rows that were computed here."""

    @abstractmethod
    def back(self, y_nd: Tensor, asked: Arriving | None, prefix: str = "") -> Tensor:
        """The reverse: rows of all this rank's pairs, [T * K, d]; zeros where no expert was named."""

    @abstractmethod
    def by_token(self, rows: Tensor) -> Tensor:
        """What :meth:`back` brought, summed over the pairs of each token, [T, d]."""

    def goes_back(self, like_nd: Tensor) -> Tensor:
        """Zeros of the shape of what goes back for rows like these; for what is computed, its gradient's."""
        return like_nd.new_zeros(like_nd.shape)


def summed(rows_Nd: Tensor, top_k: int) -> Tensor:
    """Rows of pairs [T * K, d], summed over each token's, [T, d]."""
    return rows_Nd.view(len(rows_Nd) // top_k, top_k, rows_Nd.shape[1]).sum(dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class Exchange(PairExchange):
    """One rank's part of a dispatch; the sizes that its collectives take are on the host.

    Parameters
    ----------
    send_N : int64 [N] positions of this rank's pairs (token * K + k) in the order they leave.
    sent_D, got_D : pairs to and from each rank.
    left_N : the reverse of ``send_N``; None where some pairs name no expert.
    arrange_n, came_n : int64 [n] what arrived, in the order the experts need it, and the reverse.
    count_E : pairs of each expert computed here, int64 [E] on the host.
    most : most pairs from any rank to another one.
    pairs, top_k, group : T * K, K, and the process group of tokens.
    number : exchanges of tokens that had begun before it was made: no other one of the group has the same.
    """

    send_N: Tensor
    left_N: Tensor | None
    sent_D: list[int]
    got_D: list[int]
    arrange_n: Tensor
    came_n: Tensor
    count_E: NDArray[np.int64]
    most: int
    pairs: int
    top_k: int
    group: Any
    number: int

    def sends_ahead(self, like_Nd: Tensor) -> bool:
        """On gloo long rows are messages with a number of their own. A collective, as of short rows, is for ranks that
        are all in it: apart, they would end the process by rows of other sizes.
        """
        return not (on_gloo(self.group) and is_short(like_Nd, self.most))

    def arriving_ahead(self, like_Nd: Tensor, got_D: list[int] | None = None) -> Arriving:
        """What comes of :meth:`send_pairs` of all ranks, of rows like these."""
        number = self.number if self.sends_ahead(like_Nd) else None
        return Arriving(like_Nd, self.got_D if got_D is None else got_D, self.group, self.most, number)

    @property
    def whole(self) -> bool:
        """Whether every pair names an expert."""
        return self.left_N is not None

    def tokens_there(self, x_Td: Tensor) -> Tensor:
        """Tokens of this rank to what is computed here, [n, d], sorted by expert."""
        coming = Arriving(x_Td, self.got_D, self.group, self.most)
        sent_Nd = x_Td.index_select(0, self.send_N // self.top_k)
        with span("dispatch"):
            coming.send(sent_Nd, self.sent_D).wait()
        return self._arranged(coming, "")

    def send_pairs(self, y_Nd: Tensor) -> SentRows:
        """Begin to send rows of this rank's pairs [T * K, d] to where their experts are; :meth:`arrived` takes it."""
        return self.arriving_ahead(y_Nd).send(y_Nd.index_select(0, self.send_N), self.sent_D)

    def arrived(self, sent: SentRows, prefix: str = "") -> Tensor:
        """What comes of it is computed here, [n, d], sorted by expert."""
        with span(f"{prefix}dispatch"):
            sent.wait()
        return self._arranged(sent, prefix)

    def ask_back(self, like_nd: Tensor) -> Arriving | None:
        """Ask, before it is computed, for what :meth:`back` will bring; like rows that were computed here."""
        return Arriving(like_nd, self.sent_D, self.group, self.most)

    def back(self, y_nd: Tensor, asked: Arriving | None, prefix: str = "") -> Tensor:
        """The reverse: rows of all this rank's pairs, [T * K, d]; zeros where no expert was named."""
        assert asked is not None
        as_came = y_nd.index_select(0, self.came_n)
        with span(f"{prefix}combine"):
            sent_Nd = asked.send(as_came, self.got_D).wait()
        if self.left_N is not None:
            return sent_Nd.index_select(0, self.left_N)
        return sent_Nd.new_zeros((self.pairs, sent_Nd.shape[1])).index_copy_(0, self.send_N, sent_Nd)

    def by_token(self, rows: Tensor) -> Tensor:
        """What :meth:`back` brought, summed over the pairs of each token, [T, d]."""
        return summed(rows, self.top_k)

    def _arranged(self, sent: SentRows, prefix: str) -> Tensor:
        with span(f"{prefix}arrange"):
            return sent.wait().index_select(0, self.arrange_n)


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


def copies_of(to_P: Tensor, token_P: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs int64 [P] of one token of T for one rank are one copy: rank and token of each copy int64 [n], sorted by
    rank, then token, and the copy of each pair int64 [P].
    """
    tokens = max(1, tokens)
    copies, copy_P = torch.unique(to_P * tokens + token_P, return_inverse=True)
    return torch.div(copies, tokens, rounding_mode="floor"), copies % tokens, copy_P


def make_exchange(
    ids_TK: Tensor, rows_SED: NDArray[np.int64], rank: int, group: Any, slots: list[int] | None = None
) -> Exchange:
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
    arrange = np.argsort(place_E[expert], kind="stable")
    came = np.empty_like(arrange)
    came[arrange] = np.arange(len(arrange))
    pairs_SD = rows_SED.sum(axis=1)
    np.fill_diagonal(pairs_SD, 0)
    send_N = by_expert[by_rank]
    whole = len(send_N) == len(ids)
    return Exchange(
        send_N,
        torch.empty_like(send_N).scatter_(0, send_N, torch.arange(len(ids), device=device)) if whole else None,
        mine_ED.sum(axis=0).tolist(),
        here_SE.sum(axis=1).tolist(),
        torch.from_numpy(arrange).to(device),
        torch.from_numpy(came).to(device),
        here_SE.sum(axis=0),
        int(pairs_SD.max()),
        ids_TK.numel(),
        ids_TK.shape[1],
        group,
        exchanges(group),
    )
