"""Step replicas read straight from their owners' memory: only what is wanted travels, and no host knows what.

For ranks that can address each other's memory (NVLink: PyTorch's symmetric memory gives the addresses). A program reads
from the slot table which expert it is to fetch, and from whom.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Numbers that a program copies."""


@triton.jit
def pull_kernel(
    address_ptr, expert_ptr, owner_ptr, row_ptr, column_ptr, bank_ptr, numel, first, BLOCK: tl.constexpr
):  # fmt: skip
    """Fill one step slot: ``bank[column] = bank of the owner[row]``; ``first`` is where this rank's slots begin."""
    column = tl.load(column_ptr + tl.program_id(0))
    expert = tl.load(expert_ptr + first + column)
    if expert >= 0:
        address = tl.load(address_ptr + tl.load(owner_ptr + expert))
        theirs = address.to(tl.pointer_type(bank_ptr.dtype.element_ty))
        at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(row_ptr + expert)
        part = tl.load(theirs + row * numel + at, mask=at < numel)
        tl.store(bank_ptr + column * numel + at, part, mask=at < numel)


def pull(bank: Tensor, address_D: Tensor, expert_DS: Tensor, owner_E: Tensor, row_E: Tensor, column_M: Tensor,
         rank: int) -> None:  # fmt: skip
    """Fill a rank's step slots in one launch.

    Parameters
    ----------
    bank : [S, ...], this rank's.
    address_D : int64 [D], where the banks of all ranks begin, as this rank addresses them.
    expert_DS : int32 [D, S], the slot table.
    owner_E, row_E : int64 [E], who has each expert, and in which row of its bank.
    column_M : int64 [M], step slots of this rank.
    """
    numel = bank[0].numel()
    if not len(column_M):
        return
    pull_kernel[(len(column_M), triton.cdiv(numel, BLOCK))](
        address_D, expert_DS, owner_E, row_E, column_M, bank, numel, rank * expert_DS.shape[1], BLOCK=BLOCK
    )
