"""One MoE layer of one step: dispatch, experts, combine, and the same backwards, in one fixed order on all ranks.

One autograd function holds the whole of it, with the experts' own graph inside. So no rank's collectives depend on
which of its experts got tokens, or on the order in which the engine visits nodes: a rank without a token takes part in
everything. Under activation checkpointing the forward pass builds no graph inside; the recomputation does, before the
backward of the layer needs it, and with real tensors: unpacked in the inner backward, a task of its own for autograd,
they would be computed a second time, and only on ranks that have tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from poise.runtime.dispatch import Exchange, back, there
from poise.runtime.experts import Bank, ExpertKind
from poise.util.errors import ModelError


class Weights(Protocol):
    """The experts a rank holds in a step."""

    def banks(self) -> Sequence[Bank]:
        """Stacked weights, once they are here; the order of the exchange's slots."""
        ...

    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are wanted."""
        ...

    def after_forward(self) -> None:
        """The experts have run."""
        ...

    def together(self, accumulates: Callable[[], bool]) -> bool:
        """All ranks go backward through this layer, or none; whether gradients of the weights are asked for."""
        ...

    def before_backward(self) -> None:
        """The weights are needed again."""
        ...

    def after_backward(self, grads: Sequence[Tensor | None] | None) -> None:
        """Gradients of :meth:`leaves`; None: this backward pass asks for those of the tokens alone."""
        ...


class _GraphEntry(torch.autograd.Function):
    """What arrived, as the start of the graph inside; its gradient is asked for by edge."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


@dataclass(slots=True)
class Inner:
    """The two ends of the experts' graph on one rank, None without tokens; shared with the layer's recomputation."""

    x_edge: GradientEdge | None = None
    y_edge: GradientEdge | None = None


class LayerStep:
    """One layer in one forward pass.

    Parameters
    ----------
    kind, way, top_k, group : the experts, who sends what, K, and the process group of tokens.
    weights : the experts held here.
    counts : tokens of every row of every bank.
    inner : where the graph inside is kept.
    """

    def __init__(
        self,
        kind: ExpertKind,
        way: Exchange,
        top_k: int,
        group: Any,
        weights: Weights,
        counts: list[list[int]],
        inner: Inner,
    ) -> None:
        self.kind, self.way, self.top_k, self.group = kind, way, top_k, group
        self.weights, self.counts, self.inner = weights, counts, inner

    def forward(self, x_Td: Tensor, graph: bool, recomputed: bool) -> Tensor:
        """Outputs of this rank's pairs, [T * K, d]; ``graph``: build the graph inside."""
        way, inner = self.way, self.inner
        x_in = there(x_Td.index_select(0, way.send_N // self.top_k), way, self.group)
        banks = list(zip(self.weights.banks(), self.counts, strict=True))
        failed: Exception | None = None
        try:
            if graph and len(x_in):
                as_is = saved_tensors_hooks(_same, _same) if recomputed else nullcontext()
                with torch.enable_grad(), as_is:
                    x_work = _GraphEntry.apply(x_in.new_zeros((), requires_grad=True), x_in)
                    y_in = self.kind.run(banks, x_work)
                    inner.x_edge, inner.y_edge = get_gradient_edge(x_work), get_gradient_edge(y_in)
            else:
                y_in = self.kind.run(banks, x_in)
        except Exception as error:  # others wait for these tokens: they get them, and learn of it when all meet again
            failed, y_in = error, torch.full_like(x_in, torch.nan)
        out = self._of_pairs(back(y_in.detach(), way, self.group), len(x_Td))
        if failed is not None:
            raise failed
        self.weights.after_forward()  # plans and fetches for later layers: once the combine is on its way
        return out

    def _of_pairs(self, sent_Nd: Tensor, tokens: int) -> Tensor:
        """Rows in sending order as rows of all pairs, [T * K, d]; zeros where no expert was named."""
        pairs = tokens * self.top_k
        out = sent_Nd.new_empty if pairs == len(sent_Nd) else sent_Nd.new_zeros
        all_Nd = out((pairs, sent_Nd.shape[1]))
        all_Nd[self.way.send_N] = sent_Nd
        return all_Nd

    def backward(self, dy_Nd: Tensor, accumulates: Callable[[], bool]) -> Tensor:
        """Gradient of the tokens, [T, d]; those of the weights, if they are to be, go to ``weights``."""
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        accumulate = self.weights.together(accumulates)
        way, leaves, inner = self.way, self.weights.leaves() if accumulate else [], self.inner
        self.weights.before_backward()
        dy_in = there(dy_Nd.index_select(0, way.send_N), way, self.group)
        dx_in = dy_in.new_zeros(dy_in.shape)
        grads: list[Tensor | None] = [None] * len(leaves)
        failed: Exception | None = None
        if inner.y_edge is not None and inner.x_edge is not None:
            try:
                got = torch.autograd.grad(
                    [inner.y_edge], [inner.x_edge, *leaves], [dy_in], retain_graph=keep, allow_unused=True
                )
                dx_in, grads = got[0], list(got[1:])
            except Exception as error:  # as forward
                failed, dx_in = error, torch.full_like(dy_in, torch.nan)
                grads = [torch.full_like(leaf, torch.nan) for leaf in leaves]
            if not keep:
                inner.x_edge = inner.y_edge = None
        self.weights.after_backward(grads if accumulate else None)
        tokens = len(dy_Nd) // self.top_k
        out = self._of_pairs(back(dx_in, way, self.group), tokens)
        if failed is not None:
            raise failed
        return out.view(tokens, self.top_k, out.shape[1]).sum(dim=1)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class RunExperts(torch.autograd.Function):
    """``apply(step, graph, recomputed, tokens [T, d], *weights)``: outputs of the pairs [T * K, d].

    The weights are named so that the graph reaches the layer; their gradients are set by ``step.weights``. The empty
    tensor that is saved makes checkpointing compute the layer again before its backward, tokens or not.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, step: LayerStep, graph: bool, recomputed: bool, x_Td: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.step, ctx.given = step, len(weights)
        ctx.save_for_backward(x_Td.new_empty(0))
        return step.forward(x_Td, graph, recomputed)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: D102
        ctx.saved_tensors  # noqa: B018
        return (None, None, None, ctx.step.backward(grads[0], partial(_accumulates, ctx)), *[None] * ctx.given)


def _accumulates(ctx: Any) -> bool:
    """Whether this pass adds to the weights' gradients: ``torch.autograd.grad`` by something else does not.

    Raises
    ------
    ModelError : it is asked to return them.
    """
    leaves = [node for node, _ in ctx.next_functions[len(ctx.next_functions) - ctx.given :] if node is not None]
    try:
        return any([torch._C._will_engine_execute_node(node) for node in leaves])
    except RuntimeError:
        raise ModelError(
            "gradients of sharded experts come into .grad of their owners, and cannot be returned",
            hint="call backward() in place of torch.autograd.grad by expert weights",
        ) from None
