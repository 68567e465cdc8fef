"""``Muon`` for experts: every matrix is orthogonalised, and an owner has its experts' matrices whole.

``torch.optim.Muon`` takes parameters of two axes alone; experts are stacked, [E, a, b], and sharded [n, a, b] of those
that a rank owns. Sharding by whole experts is what makes it exact as it is: nothing of an update crosses ranks.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from poise.train.rows import ExpertRows, plain
from poise.util.errors import OptionError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Keller Jordan's Muon, as in ``torch.optim.Muon``)."""


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised matrix by matrix: the update of ``torch.optim.Muon``, over stacks of matrices as well.

    Weights with two axes are one matrix, those with more are stacks of matrices over the last two: sharded experts,
    unsharded ones that are stacked, or a list of experts after sharding. What an expert has stacked itself (gate and
    up in ``gate_up_proj``) is one matrix, as it is to every optimizer.

    Parameters
    ----------
    params : weights or groups; biases, norms and embeddings belong to another optimizer.
    lr, weight_decay, momentum, nesterov, eps : as in ``torch.optim.Muon``.
    ns_coefficients, ns_steps : of the Newton-Schulz iteration.
    adjust_lr_fn : ``original`` scales by sqrt(max(1, a / b)) of matrices as they are stored, [a, b], as PyTorch does:
        [in, out] in gpt-oss, [out, in] elsewhere; ``match_rms_adamw`` by 0.2 sqrt(max(a, b)), the same both ways.
    ns_dtype : what the iteration computes in.

    Raises
    ------
    OptionError : a weight that has no matrices, or that is not whole here (FSDP2's), or an option out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("momentum", momentum), ("ns_steps", ns_steps)):
            if not value >= 0:
                raise OptionError(f"{name} must be at least 0, got {value}")
        if adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise OptionError(f"unknown adjust_lr_fn {adjust_lr_fn!r}", hint="original or match_rms_adamw")
        super().__init__(params, {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "eps": eps,
            "ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
        })  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights, which must have matrices that are whole here."""
        super().add_param_group(param_group)
        try:
            for weight in self.param_groups[-1]["params"]:
                _check(weight)
        except OptionError:
            self.param_groups.pop()
            raise

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> Any:
        """One update of all weights that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad, memory_format=torch.preserve_format)
        if isinstance(weight, ExpertRows):
            for rows in (weight.grad, state["momentum_buffer"]):
                if isinstance(rows, ExpertRows):  # what follows is on plain tensors, which know no experts
                    weight.ownership.check(rows.ownership)
        value, grad, kept = plain(weight), plain(weight.grad), plain(state["momentum_buffer"])
        kept.lerp_(grad, 1.0 - group["momentum"])
        update = grad.lerp(kept, group["momentum"]) if group["nesterov"] else kept
        if not update.numel():
            return
        turned = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"], group["ns_dtype"])
        a, b = value.shape[-2:]
        ratio = math.sqrt(max(1.0, a / b)) if group["adjust_lr_fn"] == "original" else 0.2 * math.sqrt(max(a, b))
        value.mul_(1.0 - group["lr"] * group["weight_decay"])
        value.add_(turned.to(value.dtype), alpha=-group["lr"] * ratio)


def _check(weight: Tensor) -> None:
    axes = len(plain(weight).shape)
    if isinstance(weight, DTensor):
        raise OptionError(
            f"Muon needs whole matrices, and this rank has a part of one of {tuple(weight.shape)}",
            hint="give it run.parameters(), and the weights that FSDP2 shards to another optimizer",
        )
    if axes < 2 or (isinstance(weight, ExpertRows) and axes < 3):
        of_all = " for all experts" if isinstance(weight, ExpertRows) else ""
        raise OptionError(
            f"Muon needs matrices, got a weight of {axes} axes{of_all}",
            hint="give biases and norms to another optimizer",
        )


def orthogonalised(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """Each matrix of a stack [..., a, b] with its singular values driven towards 1 (Newton-Schulz), in ``dtype``."""
    a, b, c = coefficients
    x = matrices.to(dtype).reshape(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.flatten(-2).norm(dim=-1).clamp(min=eps)[..., None, None]
    for _ in range(steps):  # as ``torch.optim.Muon``: sums that are rounded between products double the error
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)
