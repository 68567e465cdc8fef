"""The weights behind one rank's slots: static ones for good, step slots from their owners, on a stream of its own.

How experts travel so that no host needs to know which: :mod:`poise.runtime.device.stripes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from poise.runtime.collectives import exchange_equal, twin
from poise.runtime.device.stripes import Stripes, step_slots_of
from poise.runtime.experts import Bank
from poise.stepwise.kernels import EMPTY, LayerSlots
from poise.util.errors import ModelError, OptionError


class SlotWeights:
    """Stacked weights [S, ...] by name, one row a slot of this rank.

    Parameters
    ----------
    table : the layer's slots; static ones of a device come first.
    weights : of the experts in this rank's static slots, in their order [n, ...].
    group : process group of the ranks.
    sent : O, experts that one owner can send for all step slots together, the same on every rank; default: 2 M. A rank
        sends O + M experts for its layer's step slots, whatever they hold.
    weights_group : the same ranks, over whose connections replicas travel; default: connections of their own.

    Attributes
    ----------
    bank : what slots hold; step slots hold zeros until they are first filled.
    owned : parameters of the static slots, rows of the same memory: what an optimizer changes, the slots have.

    Raises
    ------
    ModelError : not as many rows as this rank has static slots.
    OptionError : devices with different numbers of step slots.
    """

    def __init__(
        self, table: LayerSlots, weights: Mapping[str, Tensor], group: Any, *, sent: int | None = None,
        weights_group: Any = None,
    ) -> None:  # fmt: skip
        rank, (devices, width) = dist.get_rank(group), table.expert_DS.shape
        step_DM = step_slots_of(table)
        self.static, self.sent = int((table.turn_DS[rank] >= 0).sum()), Stripes.usual(table) if sent is None else sent
        self.rank, self.single = rank, bool((table.turn_DS <= 0).all())
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

        self._step_DM = torch.from_numpy(step_DM).to(where)
        self._experts = table.num_experts
        self._stripes: Stripes | None = None
        if step_DM.size and devices > 1:
            own = twin(group) if weights_group is None else weights_group
            self._stripes = Stripes(table, rank, where, self.sent, partial(exchange_equal, group=own))
        self._stream = torch.cuda.Stream(where) if where.type == "cuda" else None
        self._coming = False  # what a stream is to wait for; in a graph only what the graph itself has begun

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def fetch(self, expert_DS: Tensor, load_E: Tensor) -> None:
        """Fill this rank's step slots as the slot table int32 [D, S] says; :meth:`ready` waits for it.

        The table loses what owners have no room to send, and is not to change before :meth:`ready`: of an owner,
        experts with most load int32 [E] stay. Between a backward pass and the next forward: what a graph has saved must
        not change.
        """
        if self._stripes is None:
            return
        expert_DM = self._expert_DM(expert_DS)
        fits_DM = self._stripes.fitting(expert_DM, load_E)
        expert_DS.scatter_(1, self._step_DM, torch.where(fits_DM, expert_DM, EMPTY).to(expert_DS.dtype))
        with self._aside():  # whatever it makes is made on that stream
            route = self._stripes.route(self._expert_DM(expert_DS))
            for weight in self.bank.values():
                weight.index_copy_(0, self._step_DM[self.rank], self._stripes.fetched(route, weight))

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
        route = None if self._stripes is None else self._stripes.route(self._expert_DM(expert_DS))
        for name, grad in grad_S.items():
            total = torch.cat([grad[: self.static], grad.new_zeros(1, *grad.shape[1:])])
            if self._stripes is not None and route is not None:
                replicas = grad.index_select(0, self._step_DM[self.rank])
                total.index_add_(0, route.row_O, self._stripes.summed(route, replicas))
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
