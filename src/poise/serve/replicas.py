"""Replicas that a fast loop brings to a rank: a buffer of slots, filled by sparse gathers from the experts' owners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from poise.cost.transfers import TransferPlan, nearest_transfers, plan_transfers
from poise.machine.cluster import Cluster
from poise.runtime.experts import Bank, ExpertKind
from poise.runtime.sparse import Pending, sparse_all_gather
from poise.util.errors import PlacementError


def empty_bank(kind: ExpertKind, rows: int, like: Tensor) -> Bank:
    """Weights of ``rows`` experts, not filled."""
    return {name: like.new_empty((rows, *shape)) for name, shape in kind.shapes.items()}


class StepReplicas:
    """Replicas of one layer on one rank.

    Parameters
    ----------
    bank : weights of M experts, filled here; layers whose policy keeps nothing may share one.
    owned : this rank's static rows of an expert.
    static_ED : bool [E, D], the static placement; what a step fetches comes from an expert's first holder.
    cluster, group, rank : who is where.
    """

    def __init__(
        self, bank: Bank, owned: Bank, row_of: dict[int, int], static_ED: NDArray[np.bool_], cluster: Cluster,
        group: Any, rank: int,
    ) -> None:  # fmt: skip
        self.bank, self._owned, self._row_of = bank, owned, row_of
        self._owner_E = static_ED.argmax(axis=1)
        self._static_E = static_ED[:, rank]
        self._cluster, self._group, self._rank = cluster, group, rank
        weights = list(bank.values())
        self._rows = weights[0].shape[0]
        self._device = weights[0].device
        self._bytes = float(sum(weight[0].nbytes for weight in weights)) if self._rows else 1.0
        self._slot_of: dict[int, int] = {}
        self._pending: list[Pending] = []
        self._coming: Pending | None = None

    def fetch(self, fetched_ED: NDArray[np.bool_], kept_ED: NDArray[np.bool_]) -> None:
        """Start to fetch replicas for this step; slots of what is not in ``kept_ED`` are free."""
        self._make_room(kept_ED)
        if fetched_ED.any():
            self._take_slots(fetched_ED)
            plan = plan_transfers(self._owner_E, fetched_ED, self._cluster, expert_bytes=self._bytes)
            self._pending.append(self._go(plan))

    def start(self, coming_ED: NDArray[np.bool_], kept_ED: NDArray[np.bool_]) -> None:
        """Start to fetch replicas that serve after :meth:`land`."""
        self._make_room(kept_ED)
        self._take_slots(coming_ED)
        # one round: nothing is left to post while steps go on; whoever keeps a replica may send it
        self._coming = self._go(nearest_transfers(kept_ED & ~coming_ED, coming_ED, self._cluster))

    def land(self) -> None:
        """Wait for what was started."""
        if self._coming is not None:
            self._coming.wait()
            self._coming = None

    def ready(self) -> None:
        """Wait for this step's fetches."""
        for one in self._pending:
            one.wait()
        self._pending.clear()

    def experts(self) -> list[int]:
        """Expert of each slot; -1: free."""
        out = [-1] * self._rows
        for expert, slot in self._slot_of.items():
            out[slot] = expert
        return out

    def _make_room(self, kept_ED: NDArray[np.bool_]) -> None:
        mine_E = kept_ED[:, self._rank]
        self._slot_of = {expert: slot for expert, slot in self._slot_of.items() if mine_E[expert]}

    def _take_slots(self, new_ED: NDArray[np.bool_]) -> None:
        for expert in np.flatnonzero(new_ED[:, self._rank] & ~self._static_E).tolist():
            free = sorted(set(range(self._rows)) - set(self._slot_of.values()))
            if expert not in self._slot_of and not free:
                raise PlacementError(
                    f"rank {self._rank} fetches expert {expert}, but all {self._rows} step slots are taken"
                )
            self._slot_of.setdefault(expert, free[0] if free else -1)

    def _go(self, plan: TransferPlan) -> Pending:
        return sparse_all_gather(plan, self._group, self._tensors, self._device)

    def _tensors(self, expert: int) -> Sequence[Tensor]:
        bank, row = (
            (self._owned, self._row_of[expert]) if expert in self._row_of else (self.bank, self._slot_of[expert])
        )
        return [weight[row] for weight in bank.values()]
