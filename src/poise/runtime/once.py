"""A token to a device once: dispatch and combine of training under the data flow ``home_device_dedup``.

What travels is a copy: a token's row with its K router weights behind it, [d + K], for all of its experts on that
device. What comes back is their weighted sum, so that the weights are multiplied where the experts are, and their
gradients come back behind the tokens' own. Four exchanges of a layer carry copies in place of pairs; before the first,
one of an integer a pair says which copy, and which of its K weights, the pair is of. Its sizes are known from the plan,
and numbers of copies follow from it, so that no other one is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from poise.runtime.collectives import Arriving, SentRows
from poise.runtime.dispatch import Exchange, PairExchange, copies_of
from poise.runtime.experts import Bank
from poise.runtime.layer import RunExperts
from poise.runtime.spans import span


@dataclass(frozen=True, slots=True, eq=False)
class OnceExchange(PairExchange):
    """One rank's part; n copies come here, N leave.

    Parameters
    ----------
    pairs : the same dispatch by pairs.
    width : d, of a token.
    send_N : int64 [N] tokens in the order their copies leave.
    sent_D, got_D : copies to and from each rank.
    copy_P, weight_P : int64 [P], of each pair computed here, in the order of experts: its row among the copies that
        came, and the place of its weight in their [n * K].
    """

    pairs: Exchange
    width: int
    send_N: Tensor
    sent_D: list[int]
    got_D: list[int]
    copy_P: Tensor
    weight_P: Tensor

    def sends_ahead(self, like_Nd: Tensor) -> bool:
        """As :meth:`poise.runtime.dispatch.Exchange.sends_ahead`."""
        return self.pairs.sends_ahead(like_Nd)

    @property
    def whole(self) -> bool:
        """Whether every pair names an expert."""
        return self.pairs.whole

    @property
    def top_k(self) -> int:
        """K."""
        return self.pairs.top_k

    def beside(self, x_Td: Tensor, weight_TK: Tensor) -> Tensor:
        """Tokens as they are given here: with their router weights behind them, [T, d + K]."""
        return torch.cat([x_Td, weight_TK.to(x_Td.dtype)], dim=1)

    def around(self, run: RunExperts) -> RunExperts:
        """Experts that take copies [n, d + K] and give weighted sums [n, d]."""

        def weighted(banks: Sequence[Bank], copy_nd: Tensor) -> Tensor:
            x_nd, weight_nK = copy_nd[:, : self.width], copy_nd[:, self.width :]
            y_Pd = run(banks, _TokensOfPairs.apply(x_nd, self.copy_P))
            weight_P = weight_nK.reshape(-1).index_select(0, self.weight_P)
            return summed_into(len(x_nd), self.copy_P, wide(y_Pd) * wide(weight_P).unsqueeze(1)).to(x_nd.dtype)

        return weighted

    def tokens_there(self, x_Td: Tensor) -> Tensor:
        """Copies [n, d + K] of what :meth:`beside` gave."""
        coming = Arriving(x_Td, self.got_D, self.pairs.group, self.pairs.most)
        with span("dispatch"):
            return coming.send(x_Td.index_select(0, self.send_N), self.sent_D).wait()

    def send_pairs(self, y_Nd: Tensor) -> SentRows:
        """Begin to send rows of this rank's tokens [T, d] to where their copies went."""
        coming = self.pairs.arriving_ahead(y_Nd, self.got_D)
        return coming.send(y_Nd.index_select(0, self.send_N), self.sent_D)

    def arrived(self, sent: SentRows, prefix: str = "") -> Tensor:
        """What came of it, [n, d]."""
        with span(f"{prefix}dispatch"):
            return sent.wait()

    def goes_back(self, like_nd: Tensor) -> Tensor:
        """Forward: sums [n, d] for copies; backward: gradients of copies [n, d + K] for those of sums."""
        other = self.width if like_nd.shape[1] != self.width else self.width + self.top_k
        return like_nd.new_zeros((len(like_nd), other))

    def ask_back(self, like_nd: Tensor) -> Arriving | None:
        """Ask, before it is computed, for what :meth:`back` will bring."""
        return Arriving(self.goes_back(like_nd[:0]), self.sent_D, self.pairs.group, self.pairs.most)

    def back(self, y_nd: Tensor, asked: Arriving | None, prefix: str = "") -> Tensor:
        """Sums over the copies of this rank's tokens, [T, d or d + K]; zeros where no expert was named."""
        assert asked is not None
        with span(f"{prefix}combine"):
            sent_Nd = asked.send(y_nd, self.got_D).wait()
        tokens = self.pairs.pairs // self.top_k
        return summed_into(tokens, self.send_N, wide(sent_Nd)).to(sent_Nd.dtype)

    def by_token(self, rows: Tensor) -> Tensor:
        """As they are: :meth:`back` has summed them."""
        return rows


def wide(rows: Tensor) -> Tensor:
    """In the type that sums are made in: where the sums are narrower than float32, that one, so that they are rounded
    once, and not once a summand.
    """
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def summed_into(count: int, row_n: Tensor, y_nd: Tensor) -> Tensor:
    """Sums of rows [n, d] by the row that each is of, [count, d]."""
    return y_nd.new_zeros((count, y_nd.shape[1])).index_add_(0, row_n, y_nd)


class _TokensOfPairs(torch.autograd.Function):
    """Rows [n, d] by index [P], whose gradients are summed as :func:`wide` says."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, row_P: Tensor) -> Tensor:
        ctx.count = len(x_nd)
        ctx.save_for_backward(row_P)
        return x_nd.index_select(0, row_P)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (row_P,) = ctx.saved_tensors
        return summed_into(ctx.count, row_P, wide(grads[0])).to(grads[0].dtype), None


def once(pairs: Exchange, width: int) -> OnceExchange:
    """The same dispatch by copies of tokens of ``width`` d. Collective: one exchange of an integer a pair."""
    device, top_k, world = pairs.send_N.device, pairs.top_k, len(pairs.sent_D)
    to_P = torch.repeat_interleave(torch.arange(world, device=device), torch.tensor(pairs.sent_D, device=device))
    token_P = torch.div(pairs.send_N, top_k, rounding_mode="floor")
    to_n, token_n, copy_P = copies_of(to_P, token_P, pairs.pairs // top_k)
    sent_D = torch.bincount(to_n, minlength=world)
    first_D = sent_D.cumsum(0) - sent_D
    told_P = (copy_P - first_D[to_P]) * top_k + pairs.send_N % top_k
    coming = Arriving(told_P.unsqueeze(1), pairs.got_D, pairs.group, pairs.most)
    with span("copies"):
        came_P = coming.send(told_P.unsqueeze(1), pairs.sent_D).wait().squeeze(1)
    from_P = torch.repeat_interleave(torch.arange(world, device=device), torch.tensor(pairs.got_D, device=device))
    got_D = torch.zeros(world, dtype=torch.int64, device=device)
    got_D.scatter_reduce_(0, from_P, torch.div(came_P, top_k, rounding_mode="floor") + 1, "amax")
    weight_P = (came_P + (got_D.cumsum(0) - got_D)[from_P] * top_k).index_select(0, pairs.arrange_n)
    return OnceExchange(
        pairs, width, token_n, sent_D.tolist(), got_D.tolist(),
        torch.div(weight_P, top_k, rounding_mode="floor"), weight_P,
    )  # fmt: skip
