"""Micro-batches whose routing is known ahead, and the replacing of a router's choice by what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from poise.stepwise.protocol import Foreseen
from poise.train.dispatched import router_place
from poise.train.owned import OwnedExperts
from poise.train.rollout import UNKNOWN
from poise.util.errors import ModelError

SORTED = 4
"""Place of ``sorted`` among the arguments of ``torch.topk``."""
MAX_LOADS = 2**28
"""Most numbers (micro-batches x layers x ranks x experts) that are known ahead at a time: 1 GB."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One micro-batch, known before it runs.

    Parameters
    ----------
    key : tells it from all others of the run.
    number : its place among those that were given together.
    load_LSE : int32 [L, D, E], recorded pairs of every layer, rank and expert; the same on all ranks.
    sure : its routing is replayed and every token of every rank is known: these will be the loads.
    tokens, top_k : of this rank as recorded, unknown ones counted, and experts of each.
    experts_TLK : int16 [T, L, K], what this rank replays; -1: unknown. None: nothing is replayed.
    """

    key: int
    number: int
    load_LSE: NDArray[np.int32]
    sure: bool
    tokens: int
    top_k: int
    experts_TLK: Tensor | None = None

    @property
    def replays(self) -> bool:
        """Whether the record replaces the router's choice."""
        return self.experts_TLK is not None

    def of(self, layer: int) -> Foreseen:
        """What is known of a layer."""
        return Foreseen(self.load_LSE[layer].astype(np.int64), self.sure)

    def problem(self, layer: int, ids_TK: Tensor) -> ModelError | None:
        """What is wrong with a layer's tokens and experts on this rank; None: they are those of the record, or may
        differ from it.
        """
        tokens, top_k = ids_TK.shape
        if tokens != self.tokens:
            return ModelError(
                f"micro-batch {self.number} of the rollout has {self.tokens} tokens on this rank, layer {layer} gets "
                f"{tokens}",
                hint="what else the model runs (an evaluation) belongs outside of the loop over run.foresee(...)",
            )
        if top_k != self.top_k:
            return ModelError(
                f"the rollout has {self.top_k} experts a token, the router of layer {layer} names {top_k}"
            )
        if self.experts_TLK is None:
            return None
        recorded_TK = self.experts_TLK[:, layer].long()
        known_T = recorded_TK[:, 0] != UNKNOWN
        other = int(((recorded_TK.sort(1)[0] != ids_TK.sort(1)[0]).any(1) & known_T).sum())
        if not other:
            return None
        return ModelError(
            f"layer {layer}: the router sends {other} of {int(known_T.sum())} recorded tokens to other experts than "
            "the rollout did, and was not made to replay it",
            hint="replayed is a torch.topk over all experts in the forward of the module that holds them (behind a "
            "dispatcher: the module around both); replay=False takes the record as a forecast",
        )


class _Chosen(TorchFunctionMode):
    """``torch.topk`` over all experts gives recorded experts, and the scores that the router has for these, in order.

    Everything before and after it is the router's own: gradients flow into the scores.
    """

    def __init__(self, recorded_TK: Tensor, num_experts: int) -> None:
        super().__init__()
        self.recorded_TK, self.num_experts = recorded_TK, num_experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        found = func(*args, **kwargs)
        scores = args[0] if args else kwargs["input"]
        tokens, top_k = self.recorded_TK.shape
        across = scores.dim() > 0 and scores.shape[-1] == self.num_experts and found.indices.shape[-1] == top_k
        if not across or scores.shape[:-1].numel() != tokens or found.indices.shape[:-1] != scores.shape[:-1]:
            return found  # over groups of experts, or something else
        recorded = self.recorded_TK.view(found.indices.shape)
        ids = torch.where(recorded == UNKNOWN, found.indices, recorded)
        values = scores.gather(-1, ids)
        if kwargs.get("sorted", args[SORTED] if len(args) > SORTED else True):
            values, order = values.sort(dim=-1, descending=True, stable=True)
            ids = ids.gather(-1, order)
        return torch.return_types.topk((values, ids))


class _Replaying:
    """Stands for the forward of the module that has a router and sharded experts: while it runs, the record decides.

    A ``with``, and no hooks of the module: those are not called after a KeyboardInterrupt, and the record would go on
    deciding.

    Parameters
    ----------
    forward : of the module.
    experts : its sharded experts, of any run.
    """

    def __init__(self, forward: Callable[..., Any], experts: OwnedExperts) -> None:
        self.__wrapped__ = forward  # where ``inspect.signature`` looks
        self.experts = experts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass, or its recomputation."""
        schedule: Any = getattr(self.experts, "schedule", None)
        now: MicroBatch | None = None if schedule is None else schedule.planner.micro_batch
        if now is None or now.experts_TLK is None:
            return self.__wrapped__(*args, **kwargs)
        with _Chosen(now.experts_TLK[:, self.experts.number].long(), self.experts.num_experts):
            return self.__wrapped__(*args, **kwargs)


def replay_routers(model: nn.Module) -> None:
    """Let the record decide in every module of a model that holds sharded experts, itself or behind a dispatcher."""
    done: set[tuple[int, int]] = set()
    for name, experts in list(model.named_modules(remove_duplicate=False)):
        if isinstance(experts, OwnedExperts):
            module: Any = model.get_submodule(router_place(model, name))
            if (pair := (id(module), id(experts))) not in done:  # layers may share experts, or be one under two names
                done.add(pair)
                module.forward = _Replaying(module.forward, experts)
