"""Who owns which expert of a layer of sharded experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.util.errors import ModelError


class Ownership:
    """Who owns which expert of one layer, from one move of owners to the next.

    Parameters
    ----------
    mesh : 1-D, of the ranks that share the layer.
    owner_E : int64 [E], rank of each expert.
    listed : in the unsharded model each expert has tensors of its own, so that ``dim()`` counts one axis less.
    origin : the layer, the same after a move.
    """

    def __init__(
        self, mesh: Any, owner_E: NDArray[np.int64], listed: bool = False, origin: object | None = None
    ) -> None:
        self.mesh, self.rank = mesh, int(mesh.get_local_rank())
        self.owner_E = np.array(owner_E, np.int64)
        self.owner_E.flags.writeable = False
        self.mine: list[int] = np.flatnonzero(self.owner_E == self.rank).tolist()
        self.listed, self.origin = listed, object() if origin is None else origin

    def moved(self, owner_E: NDArray[np.int64]) -> Ownership:
        """The same layer under other owners."""
        return Ownership(self.mesh, owner_E, self.listed, self.origin)

    def check(self, other: Ownership) -> None:
        """Refuse to combine rows of both, if they cannot be.

        Raises
        ------
        ModelError : they are of the same layer, and of other experts; on all ranks.
        """
        if self is not other and self.origin is other.origin and (self.owner_E != other.owner_E).any():
            expert = int(np.flatnonzero(self.owner_E != other.owner_E)[0])
            raise ModelError(
                f"rows from before and after a move of owners meet: expert {expert} is rank "
                f"{self.owner_E[expert]}'s in the one and rank {other.owner_E[expert]}'s in the other",
                hint="name averages and snapshots by run.follow(tensors), and they move with the owners",
            )

    @property
    def group(self) -> Any:
        """Process group of the mesh."""
        return self.mesh.get_group()

    def runs(self) -> list[tuple[int, int]]:
        """First expert and length of every run of numbers, one after another, that are owned here."""
        out: list[tuple[int, int]] = []
        for expert in self.mine:
            if out and sum(out[-1]) == expert:
                out[-1] = (out[-1][0], out[-1][1] + 1)
            else:
                out.append((expert, 1))
        return out

    def index(self, device: torch.device) -> Tensor:
        """The experts owned here, int64 [n]."""
        return torch.as_tensor(self.mine, dtype=torch.int64, device=device)

    def __deepcopy__(self, memo: Any) -> Ownership:
        return self
