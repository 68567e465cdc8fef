"""Numbers by which a copy of an expert is known to be right before a token meets it.

A transfer that brings another expert, half a tensor or an old version answers like any other; only tokens are wrong.
So every expert has a number of all its bits from the time it was loaded, and what a copy is must have that number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.runtime.collectives import gather
from poise.util.errors import CommunicationError

CHUNK = 2**20
"""Elements that are looked at together."""
STEP, MIX = 0x9E3779B97F4A7C15 - 2**64, 0xC2B2AE3D27D4EB4F - 2**64
"""Odd numbers of 64 bits: a change of one element always changes the sum."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """A number of 64 bits that differs where a bit, the order of elements, or that of tensors differs.

    Changes of several elements go unseen once in 2^64 by chance. Floats are taken by their bits: NaNs equal themselves.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
        total *= MIX
        for start in range(0, bits.numel(), CHUNK):
            part = bits[start : start + CHUNK].to(torch.int64)
            place = torch.arange(start, start + len(part), dtype=torch.int64, device=bits.device)
            total += ((part + 1) * (place * 2 + 1) * STEP).sum()
    return int(total)


class Canary:
    """The number of every expert of every layer, the same on all ranks.

    Parameters
    ----------
    number_LE : int64 [L, E].
    """

    def __init__(self, number_LE: NDArray[np.int64]) -> None:
        self.number_LE = number_LE

    @classmethod
    def of(
        cls, held: Sequence[Sequence[int]], rows: Callable[[int, int], Sequence[Tensor]], num_experts: int, group: Any,
        device: torch.device,
    ) -> Canary:  # fmt: skip
        """From what all ranks hold; every rank calls it.

        Parameters
        ----------
        held : experts of this rank's slots, one list a layer.
        rows : (layer, slot) -> weights of an expert.
        device : where numbers travel.

        Raises
        ------
        CommunicationError : two ranks, or two slots, hold an expert with other weights; on all ranks.
        """
        mine = np.zeros((3, len(held), num_experts), np.int64)  # held, number, another number is held too
        for layer, experts in enumerate(held):
            for slot, expert in enumerate(experts):
                if expert < 0:
                    continue
                number = fingerprint(rows(layer, slot))
                mine[2, layer, expert] |= mine[0, layer, expert] and mine[1, layer, expert] != number
                mine[:2, layer, expert] = 1, number
        every = gather(torch.from_numpy(mine.ravel()).to(device), group).cpu().numpy().reshape(-1, *mine.shape)
        has, number = every[:, 0] > 0, every[:, 1]
        first = np.take_along_axis(number, has.argmax(axis=0)[None], axis=0)[0]
        wrong = (has & (number != first)) | (every[:, 2] > 0)
        if wrong.any():
            rank, layer, expert = np.argwhere(wrong)[0].tolist()
            raise CommunicationError(
                f"expert {expert} of MoE layer {layer} has other weights on rank {rank} than on rank "
                f"{int(has[:, layer, expert].argmax())}",
                hint="were all ranks loaded from one checkpoint?",
            )
        return cls(first)

    def wrong(self, arrived: Mapping[tuple[int, int], Mapping[str, Tensor]]) -> list[tuple[int, int]]:
        """(layer, expert) of copies that are not what they should be."""
        return [
            (layer, expert)
            for (layer, expert), weights in arrived.items()
            if fingerprint(list(weights.values())) != self.number_LE[layer, expert]
        ]
