"""The experts one rank holds in one forward pass: its own, and replicas that live until their gradients are reduced.

A replica's weights are filled by SparseAllGather, freed after the forward pass if the layer re-materialises (Hecate-RM)
and filled again before its backward. The tensors stay the same throughout: only their storage comes and goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.cost.transfers import TransferPlan, plan_transfers
from poise.runtime.experts import Bank
from poise.runtime.sparse import Pending, sparse_all_gather
from poise.train.owned import OwnedExperts
from poise.train.packing import Packing
from poise.train.settings import Deployment
from poise.util.errors import ModelError


class Ledger:
    """Bytes that live beside parameters and optimizer states, now and at most, by kind."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.peak = 0
        self.peak_parts: dict[str, int] = {}

    def add(self, kind: str, nbytes: int) -> None:
        """Count bytes that are allocated, or, negative, freed."""
        self.now[kind] = self.now.get(kind, 0) + nbytes
        total = sum(self.now.values())
        if total > self.peak:
            self.peak, self.peak_parts = total, dict(self.now)

    def reset(self) -> None:
        """Forget the peak."""
        self.peak, self.peak_parts = sum(self.now.values()), dict(self.now)


class Storage:
    """Stacked tensors [n, ...] whose memory is allocated and freed while they stay the same objects."""

    def __init__(self, bank: Bank, ledger: Ledger, kind: str) -> None:
        self.bank, self.ledger, self.kind = bank, ledger, kind
        self.nbytes = sum(tensor.nbytes for tensor in bank.values())
        self.here = False
        for tensor in bank.values():
            tensor.untyped_storage().resize_(0)

    def allocate(self) -> None:
        """Make room; what lies there is undefined."""
        if not self.here:
            for tensor in self.bank.values():
                tensor.untyped_storage().resize_(tensor.nbytes)
            self.ledger.add(self.kind, self.nbytes)
            self.here = True

    def free(self) -> None:
        """Give the bytes back."""
        if self.here:
            for tensor in self.bank.values():
                tensor.untyped_storage().resize_(0)
            self.ledger.add(self.kind, -self.nbytes)
            self.here = False

    def __del__(self) -> None:
        if self.here:
            self.ledger.add(self.kind, -self.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class LayerGradients:
    """Gradients of a layer's weights on one rank, of one backward pass.

    Parameters
    ----------
    own : by name, of the experts owned here [n, ...]; None: no token reached one.
    replicas : by expert, of each replica that computed here, one tensor a trainable weight.
    nbytes : what the ledger counts for the replicas'.
    """

    own: dict[str, Tensor | None]
    replicas: dict[int, list[Tensor]]
    nbytes: int


class Materialised:
    """Weights of one layer in one forward pass.

    When they come and go is decided by :mod:`poise.train.forward` and :mod:`poise.train.backward`.

    Parameters
    ----------
    experts : those owned here.
    deployment : where they are computed.
    ledger : what counts the bytes.
    early_ED : bool [E, D], holders known before the gate.
    plan : how they get their experts.

    It may be gathered before ranks meet, so a rank whose own weights are unfit must not raise here: the others would
    wait for what it sends. It sends zeros, and ``problem`` says why; it is for the meeting before anything is computed.
    """

    def __init__(
        self, experts: OwnedExperts, deployment: Deployment, ledger: Ledger, early_ED: NDArray[np.bool_],
        plan: TransferPlan,
    ) -> None:  # fmt: skip
        self.problem = experts.unfit()
        self.experts, self.deployment, self.ledger = experts, deployment, ledger
        self.early_ED = early_ED
        self.owner_E, self.trainable = experts.owner_E, [] if self.problem else experts.trainable
        self.parts: list[_Replicas] = []
        self.used_ED: NDArray[np.bool_] = np.zeros_like(early_ED)
        # Every pass has leaves of its own: after owners moved, a graph that is still alive may hold the old shape.
        rows = self._zeros() if self.problem else experts.rows()
        own: Bank = {name: row.requires_grad_(name in self.trainable) for name, row in rows.items()}
        self.copies: Storage | None = None
        device, dtype = deployment.device, deployment.compute_dtype
        other = any(rows.dtype != dtype or rows.device != device for rows in own.values())
        if other or deployment.packing is not None:
            like: dict[str, Any] = {"device": device, "dtype": dtype}
            bank = {name: torch.empty(rows.shape, **like).requires_grad_(name in self.trainable)
                    for name, rows in own.items()}  # fmt: skip
            self.copies = Storage(bank, ledger, "copies of owned experts")
        held = own if self.copies is None else self.copies.bank
        self._held = _OwnRows(experts.mine, held, self.trainable, own)
        self.gathered_count = 0
        self._fill_copies()
        self._add(plan, early_ED)

    def _zeros(self) -> Bank:
        there = self.deployment
        return {name: torch.zeros(len(self.experts.mine), *shape, dtype=there.compute_dtype, device=there.device)
                for name, shape in self.experts.kind.shapes.items()}  # fmt: skip

    def _fill_copies(self) -> None:
        if self.copies is not None and not self.copies.here:
            self.copies.allocate()
            packing = self.deployment.packing
            for name, masters in self._held.masters.items():
                rows = masters.detach()
                if packing is None:
                    self.copies.bank[name].data.copy_(rows)
                else:
                    packing.unpack(packing.pack(rows).to(self.deployment.device), self.copies.bank[name].data)

    def _add(self, plan: TransferPlan, holders_ED: NDArray[np.bool_]) -> None:
        if not plan.count:
            return
        experts, rank = self.experts, self.deployment.rank
        mine = [int(e) for e in np.flatnonzero(holders_ED[:, rank]) if experts.owner_E[e] != rank]
        self.parts.append(_Replicas(self._held, self.deployment, self.ledger, plan, mine))
        self.gathered_count += plan.count

    def complete(self, holders_ED: NDArray[np.bool_], used_ED: NDArray[np.bool_]) -> None:
        """After the gate: fetch holders that were not known before it; ``used_ED`` are those that compute."""
        late_ED = holders_ED & ~self.early_ED
        self.used_ED = used_ED
        if late_ED.any():
            there = self.deployment
            plan = plan_transfers(self.owner_E, late_ED, there.cluster, expert_bytes=there.expert_bytes,
                                  form=there.form)  # fmt: skip
            self._add(plan, late_ED)

    @property
    def gathered_D(self) -> NDArray[np.int64]:
        """Replicas of this layer on each rank, int64 [D]; the same on all ranks."""
        extra_D = np.zeros(self.deployment.cluster.num_devices, np.int64)
        for part in self.parts:
            extra_D += part.plan.links_DD(len(extra_D)).sum(axis=0)
        return extra_D

    @property
    def fullest_bytes(self) -> float:
        """Bytes of this layer's replicas on the rank that has most of them; the same on all ranks."""
        return float(self.gathered_D.max() * self.deployment.held_bytes)

    @property
    def gather_s(self) -> float:
        """Modelled seconds of gathering the replicas once."""
        there = self.deployment
        return sum(part.plan.seconds(there.cluster, there.expert_bytes) for part in self.parts)

    @property
    def slots(self) -> list[int]:
        """Experts held here in the order of :meth:`banks`."""
        return [*self.experts.mine, *(e for part in self.parts for e in part.mine)]

    def counts(self, count_E: NDArray[np.int64]) -> list[list[int]]:
        """Tokens of every row of every bank."""
        return [count_E[ids].tolist() for ids in (self.experts.mine, *(part.mine for part in self.parts))]

    def banks(self) -> list[Bank]:
        """Stacked weights in the order of :attr:`slots`, once they are here."""
        self.ready()
        return self._banks()

    def _banks(self) -> list[Bank]:
        return [self._held.bank, *(part.storage.bank for part in self.parts)]

    def start(self) -> None:
        """Gather again what was freed."""
        self._fill_copies()
        for part in self.parts:
            part.start()

    def ready(self) -> None:
        """Wait until all is here."""
        self.start()
        for part in self.parts:
            part.wait()

    def free(self) -> None:
        """Give up the weights; gradients will need :meth:`ready` again."""
        for part in self.parts:  # this waits until what is sent from the copies has left
            part.free()
        if self.copies is not None:
            self.copies.free()

    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are wanted: every trainable weight of every bank."""
        return [bank[name] for bank in self._banks() for name in self.trainable]

    def check_owners(self) -> None:
        """Refuse to go on if owners have moved since the forward pass.

        Raises
        ------
        ModelError : they have.
        """
        if self.experts.owner_E is not self.owner_E:
            raise ModelError(
                f"owners of layer {self.experts.number} moved after the forward pass whose backward comes now",
                hint="go backward before the next optimizer step",
            )

    def gradients(self, grads: Sequence[Tensor | None]) -> LayerGradients:
        """What belongs to whom among gradients of :meth:`leaves`; the ledger counts those of replicas from now on."""
        names = self.trainable
        own = dict(zip(names, grads[: len(names)], strict=True))
        replicas: dict[int, list[Tensor]] = {}
        at = len(names)
        for part in self.parts:
            mine, at = grads[at : at + len(names)], at + len(names)
            for row, expert in enumerate(part.mine):
                if self.used_ED[expert, self.deployment.rank]:
                    replicas[expert] = [
                        torch.zeros_like(part.storage.bank[name][row]) if grad is None else grad[row]
                        for name, grad in zip(names, mine, strict=True)
                    ]
        nbytes = sum(grad.nbytes for grad in grads[len(names) :] if grad is not None)
        self.ledger.add("replica gradients", nbytes)
        return LayerGradients(own, replicas, nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class _OwnRows:
    """Experts owned here.

    Parameters
    ----------
    mine : their numbers.
    bank : stacked weights as they are computed with, and sent unless they are packed.
    trainable : names of those that are trained.
    masters : stacked weights as they are kept, from which they are packed.
    """

    mine: list[int]
    bank: Bank
    trainable: list[str]
    masters: Bank


class _Replicas:
    """Experts gathered together: those known before the gate, or those added after it.

    Parameters
    ----------
    own : what this rank sends.
    deployment, ledger : as in :class:`Materialised`.
    plan : how all ranks get their experts.
    mine : what this rank gets.
    """

    def __init__(
        self, own: _OwnRows, deployment: Deployment, ledger: Ledger, plan: TransferPlan, mine: list[int]
    ) -> None:
        self.own, self.plan, self.mine, self.deployment = own, plan, mine, deployment
        like: dict[str, Any] = {"device": deployment.device, "dtype": deployment.compute_dtype}
        bank = {name: torch.empty(len(mine), *weight.shape[1:], **like).requires_grad_(name in own.trainable)
                for name, weight in own.bank.items()}  # fmt: skip
        self.storage = Storage(bank, ledger, "replicas")
        self.packed: _Packed | None = None
        if deployment.packing is not None:
            self.packed = _Packed(deployment.packing, own, deployment, ledger, plan, mine)
        self.gather: Pending | None = None
        self.here = False
        self.start()

    def start(self) -> None:
        """Begin to gather, unless done or begun."""
        if self.here or self.gather is not None:
            return
        self.storage.allocate()
        there, rows = self.deployment, self.rows
        if self.packed is not None:
            self.packed.pack()
            rows = self.packed.rows
        self.gather = sparse_all_gather(self.plan, there.weights_group, rows, there.device)

    def rows(self, expert: int) -> list[Tensor]:
        """Weights of an expert on this rank, replica or owned."""
        held, bank = (self.mine, self.storage.bank) if expert in self.mine else (self.own.mine, self.own.bank)
        row = held.index(expert)
        return [weight.data[row] for weight in bank.values()]

    def wait(self) -> None:
        """Until they are here."""
        if self.gather is not None:
            self.gather.wait()
            self.gather, self.here = None, True
            if self.packed is not None:
                self.packed.unpack(self.storage.bank)

    def free(self) -> None:
        """Give up the weights."""
        if self.gather is not None:
            self.gather.wait()  # nothing is unpacked that nobody computes with
            self.gather = None
            if self.packed is not None:
                self.packed.free()
        self.storage.free()
        self.here = False


class _Packed:
    """Weights of one gather as they travel: packed from masters, passed on as they came, unpacked when all are here.

    Parameters
    ----------
    packing : how.
    own : what this rank may send.
    deployment, ledger, plan, mine : as in :class:`_Replicas`.
    """

    def __init__(
        self, packing: Packing, own: _OwnRows, deployment: Deployment, ledger: Ledger, plan: TransferPlan,
        mine: list[int],
    ) -> None:  # fmt: skip
        self.packing, self.own, self.mine, self.device = packing, own, mine, deployment.device
        moves = [move for one in plan.rounds for move in one if move.source == deployment.rank]
        self.sent = sorted({move.expert for move in moves} - set(mine))
        self.banks = [
            Storage({name: torch.empty(packing.shape((len(experts), *weight.shape[1:])), dtype=packing.element,
                                       device=self.device) for name, weight in own.bank.items()},
                    ledger, "weights on the wire")
            for experts in (self.sent, mine)
        ]  # fmt: skip

    def pack(self) -> None:
        """What this rank sends first, and room for what comes."""
        for bank in self.banks:
            bank.allocate()
        if self.sent:
            for name, into in self.banks[0].bank.items():
                masters = self.own.masters[name].detach()
                rows = torch.tensor([self.own.mine.index(e) for e in self.sent], device=masters.device)
                into.copy_(self.packing.pack(masters[rows]))

    def rows(self, expert: int) -> list[Tensor]:
        """An expert's packed weights on this rank."""
        experts, storage = (self.mine, self.banks[1]) if expert in self.mine else (self.sent, self.banks[0])
        return [weight[experts.index(expert)] for weight in storage.bank.values()]

    def unpack(self, bank: Bank) -> None:
        """Fill replicas, and let go of what travelled."""
        for name, weight in bank.items():
            if len(weight):
                self.packing.unpack(self.banks[1].bank[name], weight.data)
        self.free()

    def free(self) -> None:
        """Let go of what travelled."""
        for bank in self.banks:
            bank.free()
