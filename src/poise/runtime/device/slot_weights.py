"""The weights behind one rank's slots: static ones for good, step slots from their owners, on a stream of its own.

Every rank sends every other as many experts as that has step slots, whichever they are: what travels is D times what is
wanted, and no host needs to know what. Gradients of replicas go back the same way and are added by rank, so that sums
are the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from poise.runtime.collectives import exchange_equal, twin
from poise.runtime.experts import Bank
from poise.stepwise.kernels import STEP, LayerSlots
from poise.util.errors import ModelError, OptionError


class SlotWeights:
    """Stacked weights [S, ...] by name, one row a slot of this rank.

    Parameters
    ----------
    table : the layer's slots; static ones of a device come first.
    weights : of the experts in this rank's static slots, in their order [n, ...].
    group : process group of the ranks; replicas travel over connections of their own.

    Attributes
    ----------
    bank : what slots hold; step slots hold zeros until they are first filled.
    owned : parameters of the static slots, rows of the same memory: what an optimizer changes, the slots have.

    Raises
    ------
    ModelError : not as many rows as this rank has static slots.
    OptionError : devices with different numbers of step slots.
    """

    def __init__(self, table: LayerSlots, weights: Mapping[str, Tensor], group: Any) -> None:
        rank, (devices, width) = dist.get_rank(group), table.expert_DS.shape
        step_D = (table.turn_DS == STEP).sum(axis=1)
        if (step_D != step_D[0]).any():
            raise OptionError(
                f"{step_D.min()} to {step_D.max()} step slots a device", hint="every device has the same number of them"
            )
        self.count, self.static = int(step_D[0]), int((table.turn_DS[rank] >= 0).sum())
        self.rank, self.devices, self.single = rank, devices, bool((table.turn_DS <= 0).all())
        where = next(iter(weights.values())).device
        for name, weight in weights.items():
            if len(weight) != self.static:
                raise ModelError(f"{len(weight)} experts in {name}, and rank {rank} has {self.static} static slots")
        self.bank: Bank = {}
        self.owned: dict[str, nn.Parameter] = {}
        for name, weight in weights.items():
            shape = torch.Size((width, *weight.shape[1:]))
            self.bank[name] = weight.detach().new_zeros(shape)
            self.bank[name][: self.static] = weight.detach()
            self.owned[name] = nn.Parameter(self.bank[name][: self.static], weight.requires_grad)

        owner_E, place_E = np.zeros((2, table.num_experts + 1), np.int64)
        device, slot = np.nonzero(table.turn_DS == 0)
        owner_E[table.expert_DS[device, slot]], place_E[table.expert_DS[device, slot]] = device, slot
        row_E = np.where(owner_E == rank, place_E, self.static)
        row_E[-1] = self.static
        self._owner_E, self._row_E = (torch.from_numpy(each).to(where) for each in (owner_E, row_E))
        step_DM = np.nonzero(table.turn_DS == STEP)[1].reshape(devices, self.count)
        self._step_DM = torch.from_numpy(step_DM).to(where)
        self._turn_M = torch.arange(self.count, device=where)
        self._experts = table.num_experts
        self._group = twin(group) if self.count and devices > 1 else None
        self._stream = torch.cuda.Stream(where) if where.type == "cuda" else None
        self._coming = False  # what a stream is to wait for; in a graph only what the graph itself has begun

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def fetch(self, expert_DS: Tensor) -> None:
        """Fill this rank's step slots as the slot table int32 [D, S] says; :meth:`ready` waits for it.

        Between a backward pass and the next forward: what a graph has saved must not change.
        """
        if self._group is None:
            return
        with self._aside():  # whatever it makes is made on that stream
            expert_DM = self._expert_DM(expert_DS)
            from_M = self._owner_E.index_select(0, expert_DM[self.rank]) * self.count + self._turn_M
            row_X = self._row_E.index_select(0, expert_DM.view(-1)).clamp(max=max(self.static - 1, 0))
            for weight in self.bank.values():
                came = exchange_equal(weight.index_select(0, row_X), self._group)
                weight.index_copy_(0, self._step_DM[self.rank], came.index_select(0, from_M))

    def ready(self) -> Bank:
        """The bank, once replicas are here. Before a graph is captured that has no :meth:`fetch`, call it once."""
        if self._stream is not None and self._coming:
            self._coming = False
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return self.bank

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def add_gradients(self, grad_S: Mapping[str, Tensor], expert_DS: Tensor) -> None:
        """Gradients of this rank's slots [S, ...] into ``.grad`` of their owners, everywhere.

        Raises
        ------
        OptionError : an expert has several static slots, so more than one owner.
        """
        if not self.single:
            raise OptionError(
                "an expert has several static slots, and each would be trained alone",
                hint="one static slot an expert in training; more copies in step slots",
            )
        expert_DM = self._expert_DM(expert_DS)
        own_M = self._owner_E.index_select(0, expert_DM[self.rank])
        row_DM = self._row_E.index_select(0, expert_DM.view(-1)).view(self.devices, self.count)
        for name, grad in grad_S.items():
            total = torch.cat([grad[: self.static], grad.new_zeros(1, *grad.shape[1:])])
            if self._group is not None:
                sent = grad.new_zeros(self.devices * self.count, *grad.shape[1:])
                replicas = grad.index_select(0, self._step_DM[self.rank])
                sent.index_copy_(0, own_M * self.count + self._turn_M, replicas)
                came = exchange_equal(sent, self._group).view(self.devices, self.count, *grad.shape[1:])
                for device in range(self.devices):  # no expert twice on one: the order of the sum is that of ranks
                    total.index_add_(0, row_DM[device], came[device])
            weight = self.owned[name]
            weight.grad = total[:-1] if weight.grad is None else weight.grad.add_(total[:-1])

    def _expert_DM(self, expert_DS: Tensor) -> Tensor:
        """Experts of all step slots, int64 [D, M]; E where one is empty."""
        expert_DM = expert_DS.gather(1, self._step_DM).to(torch.int64)
        return torch.where(expert_DM >= 0, expert_DM, self._experts)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream of its own, after what the current one was given so far."""
        if self._stream is None:
            yield
            return
        self._coming = True
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
