"""What one expert computes: the shapes of experts that poise knows, run over the experts a rank holds.

A *bank* is a dict of stacked weights, name -> [n, ...]: the experts a rank owns are one, a step's replicas another.
"""

from __future__ import annotations

import copy
import inspect
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
    hidden : width of its tokens, d.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    one: Callable[[Bank, Tensor], Tensor]
    grouped: Callable[[Bank, Tensor, Tensor], Tensor] | None
    matrices: int
    inner: int
    hidden: int

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
            if self.grouped is not None and _grouped_pays(x, self.shapes):
                ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
                out.append(self.grouped(bank, x, ends))
                continue
            rows = {name: weight.unbind(0) for name, weight in bank.items()}
            for row, part in enumerate(x.split(list(counts))):
                if len(part):
                    out.append(self.one({name: all_rows[row] for name, all_rows in rows.items()}, part))
        # autocast makes its own type on ranks that have tokens; all ranks must send the same
        return torch.cat(out).to(x_nd.dtype) if out else x_nd.new_zeros(x_nd.shape)


def _grouped_pays(x: Tensor, shapes: dict[str, tuple[int, ...]]) -> bool:
    """On a CPU a loop is as fast or faster, and float64 is refused; rows must begin at multiples of 16 bytes."""
    return x.is_cuda and x.dtype == torch.bfloat16 and all(shape[-1] % 8 == 0 for shape in shapes.values())


def recognise(module: nn.Module) -> ExpertKind:
    """The kind of an ``experts`` module; it keeps no weight of the module alive.

    Fused modules are those of Hugging Face's ``use_experts_implementation``, whose flags say how weights lie, or any
    with ``gate_up_proj`` or ``up_proj``, ``down_proj`` and ``act_fn``. Their forward is not looked at: an expert is
    taken to compute ``down(gate(up(x)))`` as that interface promises.

    Raises
    ------
    ModelError : its weights are of no known shape, or it is not called as ``experts(tokens, ids, weights)``.
    """
    if isinstance(module, nn.ModuleList):
        return _module_list(module)
    name = type(module).__name__
    shapes = {key: tuple(weight.shape[1:]) for key, weight in module.named_parameters(recurse=False)}
    inputs = [key for key in inspect.signature(type(module).forward).parameters if key != "self"]
    if len(inputs) != 3:
        raise ModelError(
            f"{name} takes {len(inputs)} inputs ({', '.join(inputs)}), experts 3",
            hint="experts are called as experts(tokens [T, d], ids [T, K], weights [T, K])",
        )
    for deeper, _ in module.named_parameters():
        if "." in deeper:
            raise ModelError(f"{name} has a weight {deeper} in a module of its own", hint="stack it: [E, ...]")
    if getattr(module, "has_post_expert_norm", False):
        raise ModelError(f"{name} normalises each expert's output, which is not supported")
    if getattr(module, "zero_expert_num", 0):
        raise ModelError(
            f"{name} has {module.zero_expert_num} identity experts beside its own, which are not run",
            hint="its traffic can be recorded and planned for",
        )
    first = "gate_up_proj" if "gate_up_proj" in shapes else "up_proj"
    plain, biased = {first, "down_proj"}, {first, "down_proj", f"{first}_bias", "down_proj_bias"}
    act = getattr(module, "act_fn", None)
    gate = getattr(module, "_apply_gate", None)
    if set(shapes) in (plain, biased) and (act is not None or gate is not None):
        transposed = bool(getattr(module, "is_transposed", hasattr(module, "limit")))
        (rows, hidden), (out, inner) = (
            shapes[key][::-1] if transposed else shapes[key] for key in (first, "down_proj")
        )
        gated = first == "gate_up_proj"
        if rows == (1 + gated) * inner and hidden == out:
            middle = _without_weights(module)._apply_gate if gate is not None and gated else _middle(act, gated)
            return ExpertKind(
                "gated" if gated else "plain", shapes, _one(first, transposed, middle),
                _grouped(first, transposed, middle), 2 + gated, inner, hidden,
            )  # fmt: skip
    raise ModelError(
        f"experts of {name} have weights {shapes or 'none of their own'}: no known shape",
        hint="gate_up_proj [E, 2h, d] and down_proj [E, d, h]; up_proj [E, h, d] and down_proj; or equal modules",
    )


def _without_weights(module: nn.Module) -> Any:
    """The same module without its weights, for the code and settings it carries."""
    shell = copy.copy(module)
    shell.__dict__["_parameters"] = {}
    return shell


def _middle(act: Any, gated: bool) -> Any:
    """What lies between the two matrices."""

    def gate_up(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        out: Tensor = act(gate) * up
        return out

    return gate_up if gated else act


def _one(first: str, transposed: bool, middle: Any) -> Any:
    def project(x: Tensor, weights: Bank, name: str) -> Tensor:
        weight, bias = weights[name], weights.get(f"{name}_bias")
        if not transposed:
            return F.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def one(weights: Bank, x: Tensor) -> Tensor:
        return project(middle(project(x, weights, first)), weights, "down_proj")

    return one


def _grouped(first: str, transposed: bool, middle: Any) -> Any:
    def project(x: Tensor, bank: Bank, name: str, ends: Tensor) -> Tensor:
        weight, bias = bank[name], bank.get(f"{name}_bias")
        out = F.grouped_mm(x, weight if transposed else weight.transpose(-2, -1), offs=ends)
        if bias is None:
            return out
        return out + bias.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)), dim=0, output_size=len(x))

    def grouped(bank: Bank, x: Tensor, ends: Tensor) -> Tensor:
        return project(middle(project(x, bank, first, ends)), bank, "down_proj", ends)

    return grouped if hasattr(F, "grouped_mm") else None


def _module_list(experts: nn.ModuleList) -> ExpertKind:
    """Equal modules, each of one input: the first one's code with each one's weights."""
    if not len(experts):
        raise ModelError("the list of experts is empty")
    template = copy.deepcopy(experts[0]).to("meta")
    shapes = {name: tuple(weight.shape) for name, weight in template.named_parameters()}
    for number, expert in enumerate(experts):
        other = {name: tuple(weight.shape) for name, weight in expert.named_parameters()}
        if type(expert) is not type(template) or other != shapes:
            raise ModelError(f"expert {number} has weights {other}, expert 0 {shapes}", hint="experts must be equal")
        if next(expert.buffers(), None) is not None:
            raise ModelError(f"expert {number} has buffers", hint="experts with buffers are not supported")
        if any(isinstance(part, nn.Dropout) and part.p > 0 for part in expert.modules()):
            raise ModelError(f"expert {number} has dropout", hint="a recomputed pass would drop other values")
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    if not matrices:
        raise ModelError(f"experts have weights {shapes}, none of them a matrix")

    def one(weights: Bank, x: Tensor) -> Tensor:
        return torch.func.functional_call(template, weights, (x,))

    total = sum(a * b for a, b in matrices)
    width = min(min(shape) for shape in matrices)
    return ExpertKind("modules", shapes, one, None, len(matrices), max(1, total // (len(matrices) * width)), width)
