"""The device clock in anyone's experts: two functions of autograd around what computes them, and one for attention.

Forward, what lies between the two takes as long as the curve says of its tokens per expert; backward twice as long, from
the moment the gradient of the output arrives until that of the input leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd import Function

from poise.lab.emulate import DeviceClock


@dataclass
class Device:
    """Seconds of an expert: a start, and a token; and of attention. Off until ``on`` is set."""

    start_s: float
    token_s: float
    attention_s: float
    on: bool = False
    clock: DeviceClock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = DeviceClock(lambda seconds: float(sum(seconds)))

    def seconds(self, counts: Sequence[int]) -> float:
        """Forward, of tokens per expert."""
        return sum(self.start_s + n * self.token_s for n in counts if n)

    def experts(self, run: Callable[[Tensor], Tensor], x: Tensor, counts: Sequence[int]) -> Tensor:
        """``run(x)``, whose experts get so many tokens."""
        return self._timed(run, x, self.seconds(counts)) if self.on else run(x)

    def attention(self, _: Any, __: Any, x: Tensor) -> Tensor:
        """A forward hook on what comes before attention."""
        return self._timed(lambda y: y, x, self.attention_s) if self.on else x

    def _timed(self, run: Callable[[Tensor], Tensor], x: Tensor, seconds: float) -> Tensor:
        span = _Span(self.clock, seconds)
        out: Tensor = _Leave.apply(run(_Enter.apply(x, span)), span)
        return out

    def watch(self, model: Any) -> None:
        """Attention of a Hugging Face decoder takes its time too."""
        for layer in model.model.layers:
            layer.input_layernorm.register_forward_hook(self.attention)


@dataclass
class _Span:
    clock: DeviceClock
    seconds: float
    began: float = 0.0


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, span: _Span) -> Tensor:
        ctx.span = span
        span.began = time.monotonic()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.span.clock.compute([2.0 * ctx.span.seconds], since=ctx.span.began)
        return grads[0], None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, span: _Span) -> Tensor:
        ctx.span = span
        span.clock.compute([span.seconds], since=span.began)
        return y.clone()  # no view: NeMo's experts add to what a rank without tokens got

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.span.began = time.monotonic()
        return grads[0], None
