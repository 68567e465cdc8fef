"""The calls of :class:`poise.stepwise.kernels.StepKernels` on a GPU: one launch each, nothing that waits for the host.

Every buffer is made once; a call writes into it and returns it, so that it can be captured in a CUDA graph. What a call
returned is valid until the same call is made again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from poise.cost.weights import StepPrice
from poise.runtime.device import fill, split
from poise.runtime.device.fill import prepare_kernel
from poise.runtime.device.rows import rows_kernel
from poise.runtime.device.split import split_kernel
from poise.stepwise.kernels import LayerSlots, check_source, prices, refusal
from poise.util.errors import OptionError

MOST_ROUNDS = 4096
"""Rounds of a flow after which its split, whole in any case, is no longer improved: ``status`` says how many."""


class DeviceKernels:
    """One layer's calls on tensors.

    Parameters
    ----------
    table : the layer's slots.
    price : machine, model and control time.
    most_pairs : (token, expert) pairs that a step of the layer can have on all devices together.
    where : the device of all tensors.
    margin : least predicted gain, as a share of the passive time, for which a layer is not left alone.
    slack : thousandths by which the fullest device may lie above the optimum's bound: fewer rounds.
    most_turns : turns of the fill.
    expert_block, row_block : experts of one program of the split's counting, and of the rows.

    Attributes
    ----------
    status : int32 [4], of the last split: fullest device, proven bound, rounds.
    fill_status : int32 [4], of the last preparation: as that, and turns.
    seconds_ps : int64 [2], of the last preparation: planned and passive, picoseconds.

    Raises
    ------
    OptionError : a price of another number of devices or that the kernels do not know, or numbers that could overflow.
    """

    def __init__(
        self, table: LayerSlots, price: StepPrice, most_pairs: int, where: torch.device | str, *, margin: float = 0.03,
        slack: int = 0, most_turns: int = 32, expert_block: int = 64, row_block: int = 4,
    ) -> None:  # fmt: skip
        price.check_devices(len(table.expert_DS))
        if (why := refusal(table, price, most_pairs, margin)) is not None:
            raise OptionError(f"no device kernels: {why}", hint="the host's kernels have no such limit")
        devices, width = table.expert_DS.shape
        numbers = prices(price, margin)
        self.table, self.slack, self.most_turns = table, slack, most_turns
        experts, nodes = table.num_experts, len(table.size_N)
        self._sizes = {"D": devices, "E": experts}
        self._slots = {**self._sizes, "S": width, "D_PAD": _pad(devices), "S_PAD": _pad(width), "E_PAD": _pad(experts)}
        self._nodes = {"N": nodes, "W_PAD": _pad(int(table.size_N.max()))}
        self._shapes: dict[str, tuple[int, ...]] = {
            "DS": (devices, width), "SE": (devices, experts), "ED": (experts, devices), "E": (experts,), "1": (1,),
        }  # fmt: skip
        self._blocks = (min(expert_block, _pad(experts)), min(row_block, _pad(experts)))

        def whole(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.array(array, np.int32, order="C")).to(where)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=where)

        self.expert_DS, self._turn = whole(table.expert_DS), whole(table.turn_DS)
        self._node_of, self._size = whole(table.node_D), whole(table.size_N)
        self._first = whole(np.cumsum(table.size_N) - table.size_N)
        self._price = torch.from_numpy(numbers).to(where)
        self._split_room = empty((split.ARRAYS + 3 * nodes) * experts, dtype=torch.int64)
        self._fill_room = empty(fill.ARRAYS * experts + fill.LINES * _pad(devices), dtype=torch.int64)
        self._ticket, self.none = empty(1), empty(1)
        self._dense, self._row = empty(experts, devices), empty(experts, devices)
        self._filled, self._filled_quota, self._leave = empty(devices, width), empty(devices, width), empty(1)
        self.status, self.fill_status, self.seconds_ps = empty(4), empty(4), empty(2, dtype=torch.int64)

    def prepare(self, load_E: Tensor, expert_DS: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels (c) and (d): the slot table int32 [D, S] with replicas for expected loads int32 [E], and int32 [1],
        whether to leave the layer alone.
        """
        self._check(E=load_E, DS=expert_DS)
        prepare_kernel[(1,)](
            load_E, expert_DS, self._turn, self._node_of, self._size, self._price, self._fill_room, self._filled,
            self._filled_quota, self.fill_status, self._leave, self.seconds_ps, self.most_turns, MOST_ROUNDS,
            **self._slots, N=self._nodes["N"], COLUMNS=min(16, _pad(self._slots["D"])), num_warps=8,
        )  # fmt: skip
        return self._filled, self._leave

    def split(self, load_SE: Tensor, expert_DS: Tensor, leave: Tensor) -> Tensor:
        """Kernel (a): quotas int32 [E, D] of counts int32 [D, E]; the engine's even split where ``leave`` is set."""
        self._check(SE=load_SE, DS=expert_DS, **{"1": leave})
        block = self._blocks[0]
        split_kernel[(triton.cdiv(self._sizes["E"], block),)](
            load_SE, expert_DS, self._turn, leave, self._node_of, self._first, self._size, self._split_room,
            self._ticket, self._dense, self.status, self.slack, MOST_ROUNDS, **self._slots, **self._nodes,
            E_BLOCK=block, num_warps=8,
        )  # fmt: skip
        return self._dense

    def rows(self, load_SE: Tensor, quota_ED: Tensor, source: int) -> Tensor:
        """Kernel (b): where a source's tokens go, int32 [E, D]."""
        check_source(source, self._sizes["D"])
        self._check(SE=load_SE, ED=quota_ED)
        block = self._blocks[1]
        rows_kernel[(triton.cdiv(self._sizes["E"], block),)](
            load_SE, quota_ED, self._first, self._size, self._row, source, **self._sizes, **self._nodes,
            N_PAD=_pad(self._nodes["N"]), E_BLOCK=block, num_warps=4,
        )  # fmt: skip
        return self._row

    def _check(self, **tensors: Tensor) -> None:
        """Raise OptionError unless kernels read these as they lie; looks at no value."""
        for axes, tensor in tensors.items():
            shape = self._shapes[axes]
            if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape or not tensor.is_contiguous():
                raise OptionError(
                    f"kernels take contiguous int32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}",
                    hint="tensor.to(torch.int32).contiguous(), before the graph is captured",
                )


def _pad(size: int) -> int:
    """The next power of two, which Triton's blocks are."""
    return 1 << max(0, size - 1).bit_length()
