"""Weights as they travel when gathers are of fewer bits than what is computed with (``gather_dtype``).

Owners keep their weights as they are (masters; optimizers and checkpoints see no others). What is computed with, on the
owner as on every replica, is the master packed and unpacked again: the same bits wherever a token goes, so that a plan
never changes a result. Gradients are those of the rounded weights and are added to the masters' (straight through).

``bfloat16``       the nearest one: off by at most 2^-8 of the weight, while that is a normal number and at most
                   3.39e38, bfloat16's largest (beyond it is infinite).
``float8_e4m3fn``  a row (all but the last axis) has one exponent, a byte: the power of two that brings its largest
                   entry into [224, 448). An entry is off by at most 2^-4 of itself or 2^-17 of the row's largest,
                   whichever is more, where that largest is above 1e-30 and below 5e38 (less has no such exponent, nor
                   has more). Powers of two, so that scaling rounds nothing but float16: its numbers are 2^-24 apart
                   below 6.1e-5, so that 2^-25 comes to the bound. What would be rounded beyond the type of the
                   weights (float16: above 63488) is the type's largest number, 65504, within the bound; never infinite.

Other trainers' names: ``fp8_param_gather`` (Megatron-FSDP), ``enable_fsdp_float8_all_gather`` (torchao, which scales by
tensor and multiplies in fp8: here only the wire is of fp8), ``zero_quantized_weights`` (ZeRO++, arXiv 2306.10209).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
LEAST_EXPONENT, MOST_EXPONENT = -126, 127
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
GATHER_DTYPES = (BF16, E4M3)


@dataclass(frozen=True, slots=True)
class Packing:
    """How weights are packed.

    Parameters
    ----------
    dtype : one of :data:`GATHER_DTYPES`.
    """

    dtype: torch.dtype

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of packed weights of a shape [n, ...]; a weight of one number an expert, [n], is a row of one."""
        shape = shape if len(shape) > 1 else (*shape, 1)
        return (*shape[:-1], shape[-1] + 1) if self.dtype == E4M3 else shape

    @property
    def element(self) -> torch.dtype:
        """Type of packed tensors."""
        return torch.uint8 if self.dtype == E4M3 else self.dtype

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes on the wire of weights of a shape [n, ...]."""
        return torch.Size(self.shape(shape)).numel() * self.element.itemsize

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def pack(self, weight: Tensor) -> Tensor:
        """Weights [n, ...] as they are sent; a NaN or an infinite entry comes out as NaN (infinite in bfloat16)."""
        rows = weight if weight.dim() > 1 else weight.unsqueeze(-1)
        if self.dtype != E4M3:
            return rows.to(self.dtype)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        wide = wide.masked_fill(~wide.isfinite(), torch.nan)  # the cast makes 448 of an infinite one
        exponent = torch.frexp(wide.abs().amax(-1, keepdim=True) / E4M3_MAX).exponent
        exponent = exponent.clamp(LEAST_EXPONENT, MOST_EXPONENT)
        small = torch.ldexp(wide, -exponent).to(E4M3)
        return torch.cat([small.view(torch.uint8), exponent.to(torch.int8).view(torch.uint8)], dim=-1)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def unpack(self, packed: Tensor, into: Tensor) -> None:
        """Fill weights [n, ...] with what was packed."""
        rows = into if into.dim() > 1 else into.unsqueeze(-1)
        if self.dtype != E4M3:
            rows.copy_(packed)
            return
        wide = torch.promote_types(into.dtype, torch.float32)
        exponent = packed[..., -1:].contiguous().view(torch.int8).to(torch.int32)
        small = packed[..., :-1].contiguous().view(E4M3).to(wide)
        most = torch.finfo(into.dtype).max  # a largest entry is rounded up to the next power of two at most
        rows.copy_(torch.ldexp(small, exponent).clamp(-most, most))
