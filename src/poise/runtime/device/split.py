"""Kernel (a): a step's counts over given holders, exactly, or the engine's even split where a flag says so.

Step 1  Programs of some experts each count tokens of every expert and node. The last to end goes on alone: what the
        others left does not depend on who that is.
Step 2  Start: tokens stay on their device; others of a node go in equal parts to the node's holders; what is left, in
        equal parts to all holders, and what does not divide to the first.
Step 3  :mod:`poise.runtime.device.flow`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from poise.runtime.device.flow import ARRAYS as FLOW_ARRAYS
from poise.runtime.device.flow import flow
from poise.runtime.device.slots import dealt, placed

FLOW_ROOM = tl.constexpr(FLOW_ARRAYS)
ARRAYS = FLOW_ARRAYS + 4
"""int64 [E] arrays of working memory beside three of [N, E]: as the flow, and load, placed, holders, first holder."""


@triton.jit
def count_block(load_ptr, first_ptr, size_ptr, room_ptr, D: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
                W_PAD: tl.constexpr, E_BLOCK: tl.constexpr):  # fmt: skip
    """Tokens of this program's experts by node, and in all; the rest of their working memory emptied."""
    each = tl.program_id(0) * E_BLOCK + tl.arange(0, E_BLOCK)
    here = each < E
    within = tl.arange(0, W_PAD)
    node_ptr = room_ptr + (FLOW_ROOM + 4) * E
    none = tl.zeros((E_BLOCK,), tl.int64)
    total = tl.zeros((E_BLOCK,), tl.int64)
    for n in range(N):
        device = tl.load(first_ptr + n) + within
        inside = (within < tl.load(size_ptr + n))[:, None] & here[None, :]
        tokens = tl.sum(tl.load(load_ptr + device[:, None] * E + each[None, :], mask=inside, other=0), axis=0)
        tl.store(node_ptr + n * E + each, tokens.to(tl.int64), mask=here)
        tl.store(node_ptr + (N + n) * E + each, none, mask=here)
        tl.store(node_ptr + (2 * N + n) * E + each, none, mask=here)
        total += tokens
    tl.store(room_ptr + FLOW_ROOM * E + each, total, mask=here)
    tl.store(room_ptr + (FLOW_ROOM + 1) * E + each, none, mask=here)
    tl.store(room_ptr + (FLOW_ROOM + 2) * E + each, none, mask=here)
    tl.store(room_ptr + (FLOW_ROOM + 3) * E + each, none + D, mask=here)


@triton.jit
def started(load_ptr, node_of_ptr, expert, held, device, room_ptr, E: tl.constexpr, N: tl.constexpr):
    """Step 2: int32 [D_PAD, S_PAD]."""
    placed_ptr, holders_ptr = room_ptr + (FLOW_ROOM + 1) * E, room_ptr + (FLOW_ROOM + 2) * E
    first_ptr, node_ptr = room_ptr + (FLOW_ROOM + 3) * E, room_ptr + (FLOW_ROOM + 4) * E
    tokens = tl.load(room_ptr + FLOW_ROOM * E + expert, mask=held, other=0)
    own = tl.load(load_ptr + device * E + expert, mask=held, other=0).to(tl.int64)
    at = node_ptr + tl.load(node_of_ptr + device, mask=held, other=0) * E + expert
    tl.atomic_add(at + N * E, own, mask=held)
    tl.atomic_add(at + 2 * N * E, tl.full(expert.shape, 1, tl.int64), mask=held)
    tl.atomic_add(holders_ptr + expert, tl.full(expert.shape, 1, tl.int64), mask=held)
    tl.atomic_min(first_ptr + expert, device.to(tl.int64), mask=held)
    tl.debug_barrier()
    others = tl.load(at, mask=held, other=0) - tl.load(at + N * E, mask=held, other=0)
    near = own + others // tl.load(at + 2 * N * E, mask=held, other=1)
    tl.atomic_add(placed_ptr + expert, near, mask=held)
    tl.debug_barrier()
    left = tokens - tl.load(placed_ptr + expert, mask=held, other=0)
    holders = tl.load(holders_ptr + expert, mask=held, other=1)
    is_first = tl.load(first_ptr + expert, mask=held, other=-1) == device
    quota = near + left // holders + tl.where(is_first, left % holders, 0)
    return tl.where(held, quota, 0).to(tl.int32)


@triton.jit
def split_kernel(
    load_ptr, expert_ptr, turn_ptr, leave_ptr, node_of_ptr, first_ptr, size_ptr, room_ptr, ticket_ptr, dense_ptr,
    status_ptr, slack, most_rounds, D: tl.constexpr, S: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    D_PAD: tl.constexpr, S_PAD: tl.constexpr, E_PAD: tl.constexpr, W_PAD: tl.constexpr, E_BLOCK: tl.constexpr,
):  # fmt: skip
    """See the module docstring; arrays as in :meth:`poise.runtime.device.planner.DeviceKernels.split`."""
    count_block(load_ptr, first_ptr, size_ptr, room_ptr, D, E, N, W_PAD, E_BLOCK)
    each = tl.program_id(0) * E_BLOCK + tl.arange(0, E_BLOCK)
    across = tl.arange(0, D_PAD)
    zero = tl.zeros((E_BLOCK, D_PAD), tl.int32)
    tl.store(dense_ptr + each[:, None] * D + across[None, :], zero, mask=(each < E)[:, None] & (across < D)[None, :])
    tl.debug_barrier()
    turn_here = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    if turn_here == tl.num_programs(0) - 1:
        tl.store(ticket_ptr, 0)
        device, _slot, index, inside = placed(D_PAD, S_PAD, D, S)
        expert = tl.load(expert_ptr + index, mask=inside, other=-1)
        held = expert >= 0
        expert = tl.where(held, expert, 0)
        bound = tl.zeros((), tl.int32)
        rounds = tl.zeros((), tl.int32)
        if tl.load(leave_ptr) != 0:
            turn = tl.load(turn_ptr + index, mask=inside, other=-1)
            tokens = tl.load(room_ptr + FLOW_ROOM * E + expert, mask=held, other=0)
            quota = dealt(room_ptr, tokens, expert, held, turn, E, E_PAD).to(tl.int32)
        else:
            quota = started(load_ptr, node_of_ptr, expert, held, device, room_ptr, E, N)
            total = tl.sum(tl.sum(quota, axis=1), axis=0)
            quota, bound, rounds = flow(
                quota, expert, held, (total + D - 1) // D, slack, most_rounds, room_ptr, E, E_PAD
            )
        tl.store(dense_ptr + expert * D + device, quota, mask=held)
        tl.store(status_ptr, tl.max(tl.sum(quota, axis=1), axis=0))
        tl.store(status_ptr + 1, bound)
        tl.store(status_ptr + 2, rounds)
