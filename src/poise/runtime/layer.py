"""One MoE layer of one step: dispatch, experts, combine, and the same backwards, in one fixed order on all ranks.

One autograd function holds the whole of it, with the experts' own graph inside. So no rank's collectives depend on
which of its experts got tokens, or on the order in which the engine visits nodes: a rank without a token takes part in
everything. The graph inside is kept by its two ends only; under activation checkpointing it holds no activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from poise.errors import ModelError
from poise.runtime.dispatch import Exchange, back, there
from poise.runtime.experts import Bank, ExpertKind


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

    def before_backward(self) -> None:
        """The weights are needed again."""
        ...

    def after_backward(self, grads: Sequence[Tensor | None]) -> None:
        """Gradients of :meth:`leaves`."""
        ...


class _Entry(torch.autograd.Function):
    """What arrived, as the start of the graph inside; its gradient is asked for by edge."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


class LayerStep:
    """One layer in one forward pass.

    Parameters
    ----------
    kind, way, top_k, group : the experts, who sends what, K, and the process group of tokens.
    weights : the experts held here.
    counts : tokens of every row of every bank.
    """

    def __init__(
        self, kind: ExpertKind, way: Exchange, top_k: int, group: Any, weights: Weights, counts: list[list[int]]
    ) -> None:
        self.kind, self.way, self.top_k, self.group, self.weights, self.counts = (
            kind,
            way,
            top_k,
            group,
            weights,
            counts,
        )
        self.x_edge: GradientEdge | None = None
        self.y_edge: GradientEdge | None = None
        self.spent = False

    def forward(self, x_Td: Tensor, graph: bool) -> Tensor:
        """Outputs of this rank's pairs, [T * K, d]."""
        way = self.way
        x_in = there(x_Td.index_select(0, way.send_N // self.top_k), way, self.group)
        banks = list(zip(self.weights.banks(), self.counts, strict=True))
        if graph and len(x_in):
            with torch.enable_grad():
                x_work = _Entry.apply(x_in.new_zeros((), requires_grad=True), x_in)
                y_in = self.kind.run(banks, x_work)
                self.x_edge, self.y_edge = get_gradient_edge(x_work), get_gradient_edge(y_in)
        else:
            y_in = self.kind.run(banks, x_in)
        y_in = y_in.detach()
        self.weights.after_forward()
        out = y_in.new_empty((len(way.send_N), y_in.shape[1]))
        out[way.send_N] = back(y_in, way, self.group)
        return out

    def backward(self, dy_Nd: Tensor, wants_x: bool) -> Tensor | None:
        """Gradient of the tokens, [T, d]; those of the weights go to ``weights``."""
        if self.spent:
            raise ModelError(
                "the experts' graph was freed by a backward pass before this one",
                hint="pass retain_graph=True to the first",
            )
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        way, leaves, self.spent = self.way, self.weights.leaves(), not keep
        self.weights.before_backward()
        dy_in = there(dy_Nd.index_select(0, way.send_N), way, self.group)
        dx_in, grads = dy_in.new_zeros(dy_in.shape), [None] * len(leaves)
        if self.y_edge is not None and self.x_edge is not None:
            got = torch.autograd.grad(
                [self.y_edge], [self.x_edge, *leaves], [dy_in], retain_graph=keep, allow_unused=True
            )
            dx_in, grads = got[0], list(got[1:])
            if not keep:
                self.x_edge = self.y_edge = None
        self.weights.after_backward(grads)
        if not wants_x:
            return None
        dx_N = back(dx_in, way, self.group)
        out = torch.empty_like(dx_N)
        out[way.send_N] = dx_N
        return out.view(len(out) // self.top_k, self.top_k, out.shape[1]).sum(dim=1)


class RunExperts(torch.autograd.Function):
    """``apply(step, graph, tokens [T, d], *weights)``: outputs of the pairs [T * K, d].

    The weights are named so that the graph reaches the layer; their gradients are set by ``step.weights``.
    """

    @staticmethod
    def forward(ctx: Any, step: LayerStep, graph: bool, x_Td: Tensor, *weights: Tensor) -> Tensor:  # noqa: D102
        ctx.step, ctx.given = step, len(weights)
        return step.forward(x_Td, graph)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: D102
        return (None, None, ctx.step.backward(grads[0], ctx.needs_input_grad[2]), *[None] * ctx.given)
