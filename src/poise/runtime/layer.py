"""One MoE layer of one step: dispatch, experts, combine, and the same backwards, with the experts' own graph inside.

The stages are called one by one, in the same order on all ranks, by whoever decides what happens between them
(:mod:`poise.train.schedule`): a rank without a token takes part in every stage, so that no rank's collectives depend on
which of its experts got tokens. Under activation checkpointing the forward pass builds no graph inside; the
recomputation does, before the backward of the layer needs it, and with the tensors themselves: saved-tensor hooks that
run in the inner backward, a task of its own for autograd, would compute the layer a second time, and only on ranks that
have tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from poise.runtime.collectives import Arriving, SentRows
from poise.runtime.dispatch import PairExchange
from poise.runtime.experts import Bank
from poise.runtime.spans import BACKWARD, span
from poise.util.errors import ModelError

RunExperts = Callable[[Sequence[Bank], Tensor], Tensor]
"""(banks, what arrived [n, d]) -> outputs [n, d]."""
RunBackward = Callable[[Tensor, Callable[[], bool]], Tensor]
"""(gradients of the outputs [T * K, d], whether weights get gradients) -> gradients of the tokens [T, d]."""


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
    way, run : who sends what, and the experts.
    """

    def __init__(self, way: PairExchange, run: RunExperts) -> None:
        self.way, self.run = way, run
        # the two ends of the experts' graph on this rank, None without tokens
        self._x_edge: GradientEdge | None = None
        self._y_edge: GradientEdge | None = None
        self._asked: Arriving | None = None
        self._gradients: SentRows | None = None

    def dispatch(self, x_Td: Tensor) -> Tensor:
        """Tokens of this rank to what is computed here, [n, d]."""
        return self._asked_back(self.way.tokens_there(x_Td))

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
        with span("experts"):
            try:
                if not (graph and len(x_in)):
                    return self.run(banks, x_in), None
                as_is = saved_tensors_hooks(_same, _same) if recomputed else nullcontext()
                with torch.enable_grad(), as_is:
                    x_work = _GraphEntry.apply(x_in.new_zeros((), requires_grad=True), x_in)
                    y_in = self.run(banks, x_work)
                    self._x_edge, self._y_edge = get_gradient_edge(x_work), get_gradient_edge(y_in)
                return y_in, None
            except Exception as error:
                return self.way.goes_back(x_in).fill_(torch.nan), error

    def combine(self, y_in: Tensor) -> Tensor:
        """Outputs of this rank's pairs, [T * K, d]; zeros where no expert was named."""
        return self.way.back(y_in.detach(), self._take())

    def send_gradients(self, dy_Nd: Tensor) -> SentRows:
        """Begin to send gradients of this rank's pairs [T * K, d] to where their experts are."""
        self._gradients = self.way.send_pairs(dy_Nd)
        return self._gradients

    def dispatch_gradients(self) -> Tensor:
        """Gradients of what is computed here, [n, d], once they have come."""
        sent, self._gradients = self._gradients, None
        assert sent is not None
        return self._asked_back(self.way.arrived(sent, BACKWARD))

    def compute_gradients(
        self, dy_in: Tensor, leaves: Sequence[Tensor], *, keep: bool
    ) -> tuple[Tensor, list[Tensor | None], Exception | None]:
        """Gradients of what arrived [n, d] and of the leaves (None: no token reached it), and the error, if any.

        ``keep`` keeps the graph inside for another backward pass.
        """
        dx_in = self.way.goes_back(dy_in)
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
                failed, dx_in = error, dx_in.fill_(torch.nan)
                grads = [torch.full_like(leaf, torch.nan) for leaf in leaves]
        if not keep:
            self._x_edge = self._y_edge = None
        return dx_in, grads, failed

    def combine_gradients(self, dx_in: Tensor) -> Tensor:
        """Gradients of this rank's tokens, [T, d]."""
        return self.way.by_token(self.way.back(dx_in, self._take(), BACKWARD))

    def _asked_back(self, came: Tensor) -> Tensor:
        self._asked = self.way.ask_back(came)  # while experts compute
        return came

    def _take(self) -> Arriving | None:
        asked, self._asked = self._asked, None
        return asked


class LayerFunction(torch.autograd.Function):
    """``apply(forward, backward, tokens [T, d], *weights)``: outputs of the pairs, [T * K, d].

    All of a layer is one function, so that the order of its collectives is that of ``backward``, and not the order in
    which the engine visits nodes. The weights are named so that the graph reaches the layer; their gradients are set by
    ``backward``. The empty tensor that is saved makes checkpointing compute the layer again before its backward, tokens
    or not.
    """

    @staticmethod
    def forward(
        ctx: Any, forward: Callable[[Tensor], Tensor], backward: RunBackward, x_Td: Tensor, *weights: Tensor
    ) -> Tensor:
        """Outputs of the pairs; the stages build the graph inside."""
        ctx.back, ctx.given = backward, len(weights)
        ctx.save_for_backward(x_Td.new_empty(0))
        return forward(x_Td)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of the tokens; None for all else."""
        ctx.saved_tensors  # noqa: B018
        again = torch.is_grad_enabled()
        with torch.no_grad():
            dx_Td = ctx.back(grads[0], partial(_accumulates, ctx, again))
        return (None, None, dx_Td, *[None] * ctx.given)


def _accumulates(ctx: Any, again: bool) -> bool:
    """Whether this pass adds to the weights' gradients: ``torch.autograd.grad`` by something else does not.

    ``again`` : a graph of this backward pass is wanted. PyTorch's own ``once_differentiable`` says so where all of that
    graph goes backward, and leaves its part out where ``torch.autograd.grad`` asks for the rest.

    Raises
    ------
    ModelError : it is asked to return them, or for derivatives of its derivatives.
    """
    if again:
        raise ModelError(
            "derivatives of derivatives of sharded experts are not computed", hint="leave out create_graph=True"
        )
    leaves = [node for node, _ in ctx.next_functions[len(ctx.next_functions) - ctx.given :] if node is not None]
    try:
        return any([torch._C._will_engine_execute_node(node) for node in leaves])
    except RuntimeError:
        raise ModelError(
            "gradients of sharded experts come into .grad of their owners, and cannot be returned",
            hint="call backward() in place of torch.autograd.grad by expert weights",
        ) from None


def _same(tensor: Tensor) -> Tensor:
    return tensor
