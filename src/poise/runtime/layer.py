"""One MoE layer of one step: dispatch, experts, combine, and the same backwards, with the experts' own graph inside.

The stages are called one by one, in the same order on all ranks, by whoever decides what happens between them
(:mod:`poise.train.schedule`): a rank without a token takes part in every stage, so that no rank's collectives depend on
which of its experts got tokens. Under activation checkpointing the forward pass builds no graph inside; the
recomputation does, before the backward of the layer needs it, and with the tensors themselves: saved-tensor hooks that
run in the inner backward, a task of its own for autograd, would compute the layer a second time, and only on ranks that
have tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from poise.runtime.collectives import Arriving
from poise.runtime.dispatch import Exchange, back, there
from poise.runtime.experts import Bank, ExpertKind
from poise.runtime.spans import BACKWARD, span


class _GraphEntry(torch.autograd.Function):
    """What arrived, as the start of the graph inside; its gradient is asked for by edge."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


class LayerStep:
    """One layer in one forward pass, its recomputation and its backward.

    An error of the experts' code is returned and not raised, as other ranks wait for what this one sends: they get NaN,
    and the caller raises the error after :meth:`combine` or :meth:`combine_gradients`.

    Parameters
    ----------
    kind, way, top_k, group : the experts, who sends what, K, and the process group of tokens.
    counts : tokens of every row of every bank.
    """

    def __init__(self, kind: ExpertKind, way: Exchange, top_k: int, group: Any, counts: list[list[int]]) -> None:
        self.kind, self.way, self.top_k, self.group, self.counts = kind, way, top_k, group, counts
        # the two ends of the experts' graph on this rank, None without tokens
        self._x_edge: GradientEdge | None = None
        self._y_edge: GradientEdge | None = None
        self._coming: Arriving | None = None

    def dispatch(self, x_Td: Tensor) -> Tensor:
        """Tokens of this rank to what is computed here, [n, d]."""
        self._coming = Arriving(x_Td, self.way.got_D, self.group, self.way.most)
        return self._there(x_Td.index_select(0, self.way.send_N // self.top_k))

    def compute(
        self, x_in: Tensor, banks: Sequence[Bank], *, graph: bool, recomputed: bool
    ) -> tuple[Tensor, Exception | None]:
        """Outputs of the experts, [n, d], and the error of their code, if any.

        Parameters
        ----------
        x_in : what :meth:`dispatch` returned.
        banks : stacked weights in the order of the exchange's slots.
        graph : whether to build the graph inside.
        recomputed : whether activation checkpointing computes the layer again.
        """
        rows = list(zip(banks, self.counts, strict=True))
        with span("experts"):
            try:
                if not (graph and len(x_in)):
                    return self.kind.run(rows, x_in), None
                as_is = saved_tensors_hooks(_same, _same) if recomputed else nullcontext()
                with torch.enable_grad(), as_is:
                    x_work = _GraphEntry.apply(x_in.new_zeros((), requires_grad=True), x_in)
                    y_in = self.kind.run(rows, x_work)
                    self._x_edge, self._y_edge = get_gradient_edge(x_work), get_gradient_edge(y_in)
                return y_in, None
            except Exception as error:
                return torch.full_like(x_in, torch.nan), error

    def combine(self, y_in: Tensor, tokens: int) -> Tensor:
        """Outputs of this rank's pairs, [T * K, d]; zeros where no expert was named."""
        return self._of_pairs(back(y_in.detach(), self.way, self._take()), tokens)

    def send_gradients(self, dy_Nd: Tensor) -> Arriving:
        """Begin to send gradients of this rank's pairs [T * K, d] to where their experts are."""
        self._coming = Arriving(dy_Nd, self.way.got_D, self.group, self.way.most)
        return self._coming.send(dy_Nd.index_select(0, self.way.send_N), self.way.sent_D)

    def dispatch_gradients(self) -> Tensor:
        """Gradients of what is computed here, [n, d], once they have come."""
        return self._there(None, BACKWARD)

    def compute_gradients(
        self, dy_in: Tensor, leaves: Sequence[Tensor], *, keep: bool
    ) -> tuple[Tensor, list[Tensor | None], Exception | None]:
        """Gradients of what arrived [n, d] and of the leaves (None: no token reached it), and the error, if any.

        ``keep`` keeps the graph inside for another backward pass.
        """
        dx_in = dy_in.new_zeros(dy_in.shape)
        grads: list[Tensor | None] = [None] * len(leaves)
        if self._x_edge is None or self._y_edge is None:
            return dx_in, grads, None
        failed: Exception | None = None
        with span(f"{BACKWARD}experts"):
            try:
                got = torch.autograd.grad(
                    [self._y_edge], [self._x_edge, *leaves], [dy_in], retain_graph=keep, allow_unused=True
                )
                dx_in, grads = got[0], list(got[1:])
            except Exception as error:
                failed, dx_in = error, torch.full_like(dy_in, torch.nan)
                grads = [torch.full_like(leaf, torch.nan) for leaf in leaves]
        if not keep:
            self._x_edge = self._y_edge = None
        return dx_in, grads, failed

    def combine_gradients(self, dx_in: Tensor, tokens: int) -> Tensor:
        """Gradients of this rank's tokens, [T, d]."""
        out = self._of_pairs(back(dx_in, self.way, self._take(), BACKWARD), tokens)
        return out.view(tokens, self.top_k, out.shape[1]).sum(dim=1)

    def _there(self, x_Nd: Tensor | None, prefix: str = "") -> Tensor:
        came = there(x_Nd, self.way, self._take(), prefix)
        self._coming = Arriving(came, self.way.sent_D, self.group, self.way.most)  # asked for while experts compute
        return came

    def _take(self) -> Arriving:
        """What this rank has asked for."""
        coming, self._coming = self._coming, None
        assert coming is not None
        return coming

    def _of_pairs(self, sent_Nd: Tensor, tokens: int) -> Tensor:
        """Rows in sending order as rows of all pairs, [T * K, d]; zeros where no expert was named."""
        pairs = tokens * self.top_k
        out = sent_Nd.new_empty if pairs == len(sent_Nd) else sent_Nd.new_zeros
        all_Nd = out((pairs, sent_Nd.shape[1]))
        all_Nd[self.way.send_N] = sent_Nd
        return all_Nd


def _same(tensor: Tensor) -> Tensor:
    return tensor
