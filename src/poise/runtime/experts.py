"""What one expert computes: the shapes of experts that poise knows, run over the experts a rank holds.

A *bank* is a dict of stacked weights, name -> [n, ...]: the experts a rank owns are one, a step's replicas another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.errors import ModelError

Bank = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ExpertKind:
    """How experts of one module compute.

    Parameters
    ----------
    name : of the shape.
    shapes : per-expert shape of every weight, in the module's order.
    one : (weights of one expert, tokens [n, d]) -> [n, d].
    grouped : (bank, tokens sorted by expert, end of each expert's tokens) -> [n, d], or None.
    matrices : weight matrices an expert has.
    inner : its inner width.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    one: Callable[[Bank, Tensor], Tensor]
    grouped: Callable[[Bank, Tensor, Tensor], Tensor] | None
    matrices: int
    inner: int

    @property
    def numel(self) -> int:
        """Parameters of one expert."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def run(self, banks: Sequence[tuple[Bank, Sequence[int]]], x_nd: Tensor) -> Tensor:
        """Outputs [n, d] of tokens sorted by bank, then row: each bank comes with the tokens of its rows."""
        out, start = [], 0
        for bank, counts in banks:
            total = sum(counts)
            if not total:
                continue
            x = x_nd[start : start + total]
            start += total
            if self.grouped is not None and _grouped_pays(x):
                ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
                out.append(self.grouped(bank, x, ends))
                continue
            rows = {name: weight.unbind(0) for name, weight in bank.items()}
            for row, part in enumerate(x.split(list(counts))):
                if len(part):
                    out.append(self.one({name: all_rows[row] for name, all_rows in rows.items()}, part))
        return torch.cat(out) if out else x_nd.new_zeros(x_nd.shape)


def _grouped_pays(x: Tensor) -> bool:
    """On a CPU a loop is as fast or faster, and float64 is refused."""
    return x.is_cuda and x.dtype == torch.bfloat16


def recognise(module: nn.Module) -> ExpertKind:
    """The kind of an ``experts`` module.

    Raises
    ------
    ModelError : its weights are of no known shape.
    """
    if isinstance(module, nn.ModuleList):
        return _module_list(module)
    shapes = {name: tuple(weight.shape[1:]) for name, weight in module.named_parameters(recurse=False)}
    act = getattr(module, "act_fn", None)
    if set(shapes) == {"gate_up_proj", "down_proj"} and act is not None:
        (rows, width), (out, inner) = shapes["gate_up_proj"], shapes["down_proj"]
        if rows == 2 * inner and width == out:
            gate = _gate_of(module) or _halves(act)
            return ExpertKind("gated", shapes, _gated(gate), _gated_grouped(gate), 3, inner)
    if set(shapes) == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}:
        (width, columns), (inner, out), gate = shapes["gate_up_proj"], shapes["down_proj"], _gate_of(module)
        if columns == 2 * inner and width == out and gate is not None:
            return ExpertKind("gpt-oss", shapes, _biased(gate), None, 3, inner)
    if set(shapes) == {"up_proj", "down_proj"} and act is not None:
        if shapes["up_proj"] == shapes["down_proj"][::-1]:
            return ExpertKind("plain", shapes, _plain(act), _plain_grouped(act), 2, shapes["up_proj"][0])
    raise ModelError(
        f"experts of {type(module).__name__} have weights {shapes or 'none of their own'}: no known shape",
        hint="gate_up_proj [E, 2h, d] and down_proj [E, d, h]; up_proj [E, h, d] and down_proj; or equal modules",
    )


def _gate_of(module: nn.Module) -> Any:
    """The module's own gating of [n, 2h] -> [n, h], free of its weights; None if it has none (transformers has)."""
    if not hasattr(module, "_apply_gate"):
        return None
    shell = copy.copy(module)
    shell._parameters = {}
    return shell._apply_gate


def _halves(act: Any) -> Any:
    def gate(gate_up: Tensor) -> Tensor:
        first, second = gate_up.chunk(2, dim=-1)
        return act(first) * second

    return gate


def _gated(gate: Any) -> Any:
    def one(weights: Bank, x: Tensor) -> Tensor:
        return F.linear(gate(F.linear(x, weights["gate_up_proj"])), weights["down_proj"])

    return one


def _gated_grouped(gate: Any) -> Any:
    def grouped(bank: Bank, x: Tensor, ends: Tensor) -> Tensor:
        inner = gate(F.grouped_mm(x, bank["gate_up_proj"].transpose(-2, -1), offs=ends))
        return F.grouped_mm(inner, bank["down_proj"].transpose(-2, -1), offs=ends)

    return grouped if hasattr(F, "grouped_mm") else None


def _plain(act: Any) -> Any:
    def one(weights: Bank, x: Tensor) -> Tensor:
        return F.linear(act(F.linear(x, weights["up_proj"])), weights["down_proj"])

    return one


def _plain_grouped(act: Any) -> Any:
    def grouped(bank: Bank, x: Tensor, ends: Tensor) -> Tensor:
        inner = act(F.grouped_mm(x, bank["up_proj"].transpose(-2, -1), offs=ends))
        return F.grouped_mm(inner, bank["down_proj"].transpose(-2, -1), offs=ends)

    return grouped if hasattr(F, "grouped_mm") else None


def _biased(apply_gate: Any) -> Any:
    def one(weights: Bank, x: Tensor) -> Tensor:
        inner = apply_gate(torch.addmm(weights["gate_up_proj_bias"], x, weights["gate_up_proj"]))
        return torch.addmm(weights["down_proj_bias"], inner, weights["down_proj"])

    return one


def _module_list(experts: nn.ModuleList) -> ExpertKind:
    """Equal modules, each of one input: the first one's code with each one's weights."""
    if not len(experts):
        raise ModelError("the list of experts is empty")
    template = experts[0]
    shapes = {name: tuple(weight.shape) for name, weight in template.named_parameters()}
    for number, expert in enumerate(experts):
        other = {name: tuple(weight.shape) for name, weight in expert.named_parameters()}
        if type(expert) is not type(template) or other != shapes:
            raise ModelError(f"expert {number} has weights {other}, expert 0 {shapes}", hint="experts must be equal")
        if next(expert.buffers(), None) is not None:
            raise ModelError(f"expert {number} has buffers", hint="experts with buffers are not supported")
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    if not matrices:
        raise ModelError(f"experts have weights {shapes}, none of them a matrix")

    code = copy.deepcopy(template).to("meta")

    def one(weights: Bank, x: Tensor) -> Tensor:
        return torch.func.functional_call(code, weights, (x,))

    total = sum(a * b for a, b in matrices)
    width = min(min(shape) for shape in matrices)
    return ExpertKind("modules", shapes, one, None, len(matrices), max(1, total // (len(matrices) * width)))
