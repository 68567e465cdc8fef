"""Gradients of replicas, from a layer's backward pass until the owners have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.cost.transfers import plan_transfers
from poise.runtime.sparse import sparse_reduce_scatter
from poise.train.materialize import LayerGradients, Ledger, Materialised
from poise.train.owned import OwnedExperts
from poise.train.settings import Deployment
from poise.util.errors import ModelError


@dataclass
class Kept:
    """A layer's replica gradients on this rank, of one or several micro-batches.

    Parameters
    ----------
    rows : by expert, one tensor a trainable weight.
    names : the trainable weights.
    holders_ED : bool [E, D], who has gradients; the same on all ranks.
    kept_D : int64 [D], experts whose gradients lie on each rank that does not own them; the same on all ranks.
    nbytes : what the ledger counts for them.
    """

    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    holders_ED: NDArray[np.bool_] | None = None
    kept_D: NDArray[np.int64] | None = None
    nbytes: int = 0


class ReplicaGradients:
    """They are kept until they are reduced, layer by layer; a reduction runs while the backward pass goes on.

    Parameters
    ----------
    layers : owned experts of every layer, who take the sums.
    deployment : how gradients travel.
    ledger : what counts their bytes.
    """

    def __init__(self, layers: Sequence[OwnedExperts], deployment: Deployment, ledger: Ledger) -> None:
        self.layers, self.deployment, self.ledger = layers, deployment, ledger
        self.reductions: list[Reduction] = []
        self._kept = [Kept() for _ in layers]

    @property
    def waiting(self) -> bool:
        """Whether some wait for a synchronised backward pass, or are on their way; the same on all ranks."""
        return bool(self.reductions or self.layers_waiting)

    @property
    def layers_waiting(self) -> int:
        """Layers of which some wait for a synchronised backward pass; the same on all ranks."""
        return sum(kept.holders_ED is not None for kept in self._kept)

    def remember(self) -> None:
        """A backward pass is over after which some wait: what drops owners' gradients from now on is seen."""
        for layer, name in self._names():
            self.layers[layer].watch_gradient(name)

    def dropped(self) -> tuple[int, int]:
        """Of how many weights whose replicas' gradients wait this rank's own gradient was dropped since
        (``zero_grad``: :mod:`poise.train.marks`), and how many there are.

        Raises
        ------
        ModelError : a weight was replaced.
        """
        names = self._names()
        return sum(self.layers[layer].gradient_dropped(name) for layer, name in names), len(names)

    def _names(self) -> list[tuple[int, str]]:
        return [(at, name) for at, kept in enumerate(self._kept) if kept.holders_ED is not None for name in kept.names]

    def beyond(self, limit_bytes: float | None) -> bool:
        """Whether the rank that keeps most gradients keeps more bytes than that; the same on all ranks."""
        if limit_bytes is None:
            return False
        kept_D = sum(kept.kept_D for kept in self._kept if kept.kept_D is not None)
        return bool(np.max(kept_D, initial=0) * self.deployment.gradient_bytes > limit_bytes)

    def add(self, weights: Materialised, gradients: LayerGradients, scale: float) -> None:
        """Gradients of one micro-batch times ``scale``."""
        if not weights.trainable:
            return
        wire, kept, nbytes = self.deployment.reduce_dtype, self._kept[weights.experts.number], gradients.nbytes
        if kept.holders_ED is not None and kept.names != weights.trainable:
            self.ledger.add("replica gradients", -nbytes)  # they are let go with the error
            raise ModelError(
                f"layer {weights.experts.number} trained {kept.names}, now {weights.trainable}, within one step",
                hint="change requires_grad between steps",
            )
        sent = {e: [_scaled(row, scale, wire) for row in rows] for e, rows in gradients.replicas.items()}
        copied = wire != self.deployment.compute_dtype  # copies in the wider type took their place
        for e in [e for e in sent if e in kept.rows]:
            for into, row in zip(kept.rows[e], sent.pop(e), strict=True):
                into.add_(row)
        if kept.rows and not copied:  # rows of a stack of which the others have been added hold all of it
            sent, copied = {e: [row.clone() for row in rows] for e, rows in sent.items()}, True
        if copied:
            own = sum(row.nbytes for rows in sent.values() for row in rows)
            self.ledger.add("replica gradients", own - nbytes)
            nbytes = own
        kept.rows |= sent
        kept.names, kept.nbytes = weights.trainable, kept.nbytes + nbytes
        used_ED = weights.used_ED
        if kept.holders_ED is None or kept.kept_D is None:
            kept.holders_ED, kept.kept_D = used_ED.copy(), weights.gathered_D
            return
        new_ED = used_ED & ~kept.holders_ED
        new_ED[np.arange(len(new_ED)), weights.owner_E] = False
        kept.holders_ED, kept.kept_D = kept.holders_ED | used_ED, kept.kept_D + new_ED.sum(axis=0)

    def reduce(self, layer: int) -> int:
        """Start to send a layer's gradients to the owners; how many experts' gradients cross between ranks."""
        kept = self._kept[layer]
        if kept.holders_ED is None:
            return 0
        self._kept[layer] = Kept()
        if kept.kept_D is not None and not kept.kept_D.any():  # on no rank: nothing to agree on, or to send
            return 0
        self.reductions.append(Reduction(self.layers[layer], self.deployment, self.ledger, kept))
        return self.reductions[-1].count

    def wait(self) -> None:
        """Until the owners have what is on its way."""
        for reduction in self.reductions:
            reduction.wait()
        self.reductions.clear()

    def forget(self) -> None:
        """A backward pass failed: end what is on its way, adding nothing."""
        for reduction in self.reductions:
            reduction.discard()
        self.reductions.clear()
        self.ledger.add("replica gradients", -sum(kept.nbytes for kept in self._kept))
        self._kept = [Kept() for _ in self._kept]


class Reduction:
    """One layer's gradients on their way."""

    def __init__(self, experts: OwnedExperts, deployment: Deployment, ledger: Ledger, kept: Kept) -> None:
        assert kept.holders_ED is not None
        self.kept, self.experts, self.ledger = kept, experts, ledger
        plan = plan_transfers(experts.owner_E, kept.holders_ED, deployment.cluster,
                              expert_bytes=deployment.gradient_bytes, form=deployment.form)  # fmt: skip
        self.count = plan.count
        self.pending = sparse_reduce_scatter(
            plan, deployment.weights_group, self._rows, deployment.reduce_dtype, deployment.device,
            partial(ledger.add, "arriving gradients"),
        )  # fmt: skip

    def _rows(self, expert: int) -> list[Tensor]:
        if expert in self.kept.rows:
            return self.kept.rows[expert]
        row = self.experts.mine.index(expert)
        return [self.experts.gradient(name)[row] for name in self.kept.names]

    def discard(self) -> None:
        """End it, adding nothing: the backward pass that it belongs to failed."""
        shapes = [self.experts.kind.shapes[name] for name in self.kept.names]
        device = next(iter(self.experts.rows().values())).device
        self.pending.rows = lambda e: self.kept.rows.get(e) or [torch.zeros(shape, device=device) for shape in shapes]
        self.wait()

    def wait(self) -> None:
        """Until the owners have them."""
        self.pending.wait()
        self.kept.rows = {}
        self.ledger.add("replica gradients", -self.kept.nbytes)
        self.kept.nbytes = 0


def _scaled(row: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return row.to(dtype) if scale == 1.0 else row.to(dtype).mul_(scale)
