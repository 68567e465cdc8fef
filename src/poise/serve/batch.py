"""The tokens of one step on all ranks, and the keys and values of those before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.util.errors import OptionError


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request that run in one step: part of its prompt, or the one it sampled last.

    Parameters
    ----------
    request : its number.
    home : rank where it starts.
    first : position of the first of these tokens.
    tokens : their ids.
    """

    request: int
    home: int
    first: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """Tokens of one step on all ranks, sorted by home rank; a token's *tag* is its row, T of them.

    Parameters
    ----------
    chunks : one a request, sorted by home rank.
    num_ranks : D.
    start_C : int64 [C + 1], first tag of each chunk.
    token_T, position_T, home_T : int64 [T].
    fullest : tokens of the rank that has most.
    """

    chunks: tuple[Chunk, ...]
    num_ranks: int
    start_C: NDArray[np.int64] = field(init=False)
    token_T: NDArray[np.int64] = field(init=False)
    position_T: NDArray[np.int64] = field(init=False)
    home_T: NDArray[np.int64] = field(init=False)
    fullest: int = field(init=False)

    def __post_init__(self) -> None:
        sizes = np.array([len(chunk.tokens) for chunk in self.chunks], np.int64)
        homes = np.array([chunk.home for chunk in self.chunks], np.int64)
        if (np.diff(homes) < 0).any() or (sizes < 1).any():
            raise OptionError("chunks must be sorted by home rank and hold at least one token each")
        parts = [np.arange(chunk.first, chunk.first + len(chunk.tokens)) for chunk in self.chunks]
        values = {
            "start_C": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            "token_T": np.array([token for chunk in self.chunks for token in chunk.tokens], np.int64),
            "position_T": np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64),
            "home_T": np.repeat(homes, sizes),
            "fullest": int(np.bincount(homes, sizes).max(initial=0)),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_T)

    def tags(self, rank: int) -> NDArray[np.int64]:
        """Tags whose home is ``rank``, ascending."""
        return np.flatnonzero(self.home_T == rank)

    def last_tags(self) -> NDArray[np.int64]:
        """Tag of the last token of each chunk, int64 [C]."""
        return self.start_C[1:] - 1


class KeyValueCache:
    """Keys and values of requests, by layer; room for a whole request is reserved when it is opened."""

    def __init__(self) -> None:
        self._room: dict[int, int] = {}
        self._blocks: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}

    def open(self, request: int, room: int) -> None:
        """Reserve ``room`` positions in every layer; memory is taken with the first write."""
        self._room[request] = room
        self._blocks[request] = {}

    def close(self, request: int) -> None:
        """Free a request."""
        del self._room[request], self._blocks[request]

    def write(self, layer: int, request: int, first: int, keys: Tensor, values: Tensor) -> None:
        """Store keys [n, H, Dk] and values [n, H, Dv] of the positions from ``first`` on."""
        if first + len(keys) > self._room[request]:
            raise OptionError(f"request {request} has room for {self._room[request]} tokens, not {first + len(keys)}")
        blocks = self._blocks[request]
        if layer not in blocks:
            blocks[layer] = (_block(keys, self._room[request]), _block(values, self._room[request]))
        for block, new in zip(blocks[layer], (keys, values), strict=True):
            block[:, first : first + len(new)] = new.transpose(0, 1)

    def read(self, layer: int, request: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys [H, stop - start, Dk] and values [H, stop - start, Dv]; views."""
        keys, values = self._blocks[request][layer]
        return keys[:, start:stop], values[:, start:stop]

    @property
    def nbytes(self) -> int:
        """Bytes reserved by all open requests."""
        return sum(part.nbytes for blocks in self._blocks.values() for pair in blocks.values() for part in pair)


def _block(like_nHD: Tensor, room: int) -> Tensor:
    return like_nHD.new_empty((like_nHD.shape[1], room, like_nHD.shape[2]))


def as_ids(values: Sequence[int] | NDArray[np.int64], device: torch.device) -> Tensor:
    """An int64 tensor on a device."""
    return torch.as_tensor(np.asarray(values, np.int64)).to(device)
