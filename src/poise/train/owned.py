"""Experts of one layer, owned whole by ranks: parameters and gradients of those that one rank owns.

Ownership is at expert granularity and any plan over all layers is allowed (:mod:`poise.stepwise.sharding`). A rank's
experts are stacked in parameters [n, ...], by expert number, that know which experts they are
(:mod:`poise.train.rows`): ragged ownership is never shown as a ``Shard(0)`` DTensor, whose offsets would be wrong.
``state_dict`` speaks of all experts (:mod:`poise.train.shards`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from poise.runtime.experts import Bank, ExpertKind
from poise.train.marks import dropped, watch
from poise.train.ownership import Ownership
from poise.train.rows import ExpertRows, plain, plainly, rows_of
from poise.util.errors import ModelError


def stacked(experts: nn.Module, kind: ExpertKind) -> dict[str, Tensor]:
    """All experts' weights, name -> [E, ...], from a fused module or a list of modules."""
    if isinstance(experts, nn.ModuleList):
        return {name: torch.stack([dict(one.named_parameters())[name].detach() for one in experts])
                for name in kind.shapes}  # fmt: skip
    return {name: weight.detach() for name, weight in experts.named_parameters(recurse=False)}


def _taken(name: str) -> ModelError:
    return ModelError(
        f"{name} of sharded experts is not what they were sharded with: replaced, taken away, or computed from others "
        "(parametrisation, pruning, an adapter)",
        hint="adapt other modules; experts' weights change in place, or before fully_shard_experts",
    )


class OwnedExperts(nn.Module):
    """The experts of one layer that one rank owns.

    Parameters
    ----------
    kind : how an expert computes.
    weights : all experts' weights, name -> [E, ...] (or on the meta device); this rank keeps its rows.
    trainable : names of the weights that are trained.
    ownership : the owner of every expert.

    ``number`` is the layer's place among the MoE layers of its run, -1 until it has one.
    """

    def __init__(
        self, kind: ExpertKind, weights: dict[str, Tensor], trainable: list[str], ownership: Ownership
    ) -> None:
        super().__init__()
        self.kind, self.ownership = kind, ownership
        self.num_experts = len(ownership.owner_E)
        self._attribute = {name: name.replace(".", "__") for name in kind.shapes}
        for name in kind.shapes:
            row = rows_of(weights[name][ownership.index(weights[name].device)].clone(), ownership)
            self.register_parameter(self._attribute[name], nn.Parameter(row, requires_grad=name in trainable))
        self.number = -1
        self._empty = {name for name in kind.shapes if weights[name].is_meta}  # on the meta device, or not filled yet

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module; weights that get memory and no numbers (``to_empty``) are NaN until they have some."""
        without = self._on_meta()
        out = super()._apply(fn, recurse)
        given = without - self._on_meta()
        for name in given:
            self.rows()[name].fill_(torch.nan)
        self._empty |= given
        return out

    def _on_meta(self) -> set[str]:
        found = {name: self._parameters.get(attribute) for name, attribute in self._attribute.items()}
        return {name for name, weight in found.items() if weight is not None and weight.is_meta}

    def unfit(self) -> ModelError | None:
        """Why these weights cannot be computed with or sent: replaced, of another shape or type of numbers, without
        numbers. One rank may have such alone, so it is told where ranks meet.
        """
        try:
            self.check_rows()
            self._check_filled()
        except ModelError as error:
            return error
        return None

    def check_rows(self) -> None:
        """Refuse weights that are not rows of the experts owned here, with numbers or without.

        Raises
        ------
        ModelError : a weight was replaced, or given other numbers of another shape or type.
        """
        for name, rows in self.rows().items():
            wanted = (len(self.mine), *self.kind.shapes[name])
            if rows.shape != wanted:
                raise ModelError(
                    f"{name} of sharded experts has the shape {tuple(rows.shape)}, {len(self.mine)} experts owned here "
                    f"{wanted}",
                    hint="change weights in place, or load a state dict of all experts",
                )
            if not rows.is_floating_point():
                raise ModelError(
                    f"{name} of sharded experts has numbers of type {rows.dtype}, which have no gradients",
                    hint="weights are floating point; of fewer bits on the wire: gather_dtype",
                )

    def _check_filled(self) -> None:
        """Refuse weights that have no memory, or got memory and no numbers since."""
        for name in sorted(self._empty):
            rows = self.rows()[name]
            without = len(rows) if rows.is_meta else int(rows.isnan().flatten(1).all(1).sum()) if rows.numel() else 0
            if without:
                raise ModelError(
                    f"{name} of experts that were sharded on the meta device has no numbers for {without} of the "
                    f"{len(rows)} experts here",
                    hint="to_empty(device=...), then load_state_dict or set_model_state_dict with all experts, or fill "
                    "run.parameters(); init_weights and reset_parameters of the model do not reach experts",
                )
        self._empty.clear()

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("_attribute", {}).values():
            raise _taken(name)
        super().__delattr__(name)

    def _weight(self, name: str) -> Any:
        weight = self._parameters.get(self._attribute[name])
        if not isinstance(weight, ExpertRows):
            raise _taken(name)
        return weight

    @property
    def owner_E(self) -> NDArray[np.int64]:
        """Rank of each expert, int64 [E]."""
        return self.ownership.owner_E

    @property
    def mine(self) -> list[int]:
        """The experts that this rank owns."""
        return self.ownership.mine

    @property
    def listed(self) -> bool:
        """Whether the unsharded experts are a list of modules."""
        return self.ownership.listed

    def owned(self) -> Bank:
        """Parameters of this rank, name -> [n, ...]."""
        return {name: self._weight(name) for name in self._attribute}

    def rows(self) -> Bank:
        """The parameters as ordinary tensors outside of any graph, to compute with."""
        return {name: plain(weight) for name, weight in self.owned().items()}

    @property
    def trainable(self) -> list[str]:
        """Names of the weights that are trained."""
        weights = self.owned()
        with plainly():
            return [name for name, weight in weights.items() if weight.requires_grad]

    def gradient(self, name: str) -> Tensor:
        """Gradient of an owned weight, zeros until something is added: every expert gets one in every step."""
        weight = self._weight(name)
        with plainly():
            if weight.grad is None:
                weight.grad = rows_of(torch.zeros_like(weight), self.ownership)
            grad: Tensor = weight.grad.detach()
        return grad

    def watch_gradient(self, name: str) -> None:
        """From now on what drops the gradient of an owned weight is seen."""
        watch(self._weight(name))

    def gradient_dropped(self, name: str) -> bool:
        """Whether the gradient of an owned weight was dropped since it is watched, or there is none."""
        return dropped(self._weight(name))

    def takes(self, name: str, grad: Tensor) -> bool:
        """Whether a new gradient can become the weight's own without a copy: the first of a step, of the same type."""
        weight = self._weight(name)
        with plainly():
            return weight.grad is None and grad.dtype == weight.dtype and grad.device == weight.device

    def add_gradient(self, name: str, grad: Tensor | None, scale: float) -> None:
        """Add ``scale * grad``."""
        weight = self._weight(name)
        if grad is not None and self.takes(name, grad):
            with plainly():
                weight.grad = rows_of(grad.contiguous().mul_(scale), self.ownership)
            return
        into = self.gradient(name)
        if grad is not None:
            into.add_(grad.to(into.device), alpha=scale)

    def extra_repr(self) -> str:
        """Which experts lie here."""
        return f"{self.kind.name}, experts={self.num_experts}, owned here={self.mine}"
