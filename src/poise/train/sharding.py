"""``ShardedExperts``: the module that stands in for a model's ``experts``, and what tells its run of passes and steps.

Everything begins here and goes one way: the model calls the module, the module its run
(:class:`poise.train.schedule.Schedule`), and the run what holds weights and gradients.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from poise.runtime.experts import ExpertKind, inputs_of
from poise.train.dispatched import Routed
from poise.train.owned import OwnedExperts
from poise.train.ownership import Ownership
from poise.train.schedule import Schedule
from poise.train.steps import watch_optimizers
from poise.train.wrappers import check_meshes
from poise.util.errors import ModelError


class ShardedExperts(OwnedExperts):
    """The experts that one rank owns, called as Hugging Face calls ``experts``.

    ``schedule`` is the run that all sharded layers of a model share, None until there is one. Parameters as in
    :class:`~poise.train.owned.OwnedExperts`.
    """

    def __init__(
        self, kind: ExpertKind, weights: dict[str, Tensor], trainable: list[str], ownership: Ownership
    ) -> None:
        super().__init__(kind, weights, trainable, ownership)
        self.schedule: Schedule | None = None
        self._fixed: frozenset[str] = frozenset()
        self._inputs = ["hidden_states", "top_k_index", "top_k_weights"]

    def stands_for(self, experts: nn.Module) -> None:
        """Be called as ``experts``, and refuse to be given what it had: its code runs with the constants of before."""
        self._inputs = inputs_of(experts)
        had = {key for key in (*vars(experts), *experts._modules) if not key.startswith("_") and key != "training"}
        self._fixed = frozenset(had - set(vars(self)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_fixed", ()):
            raise ModelError(f"{name} of sharded experts cannot be changed", hint="set it before fully_shard_experts")
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedExperts:
        """Of a run of its own (:meth:`poise.train.schedule.Schedule.__deepcopy__`), with all of its layers."""
        if id(self) not in memo:
            out = memo[id(self)] = object.__new__(ShardedExperts)
            rest = {key: value for key, value in self.__dict__.items() if key != "schedule"}
            out.__dict__.update(copy.deepcopy(rest, memo), schedule=None)
            out.schedule = copy.deepcopy(self.schedule, memo)
            if out.schedule is not None:
                watch_optimizers(out.schedule)
        copied: ShardedExperts = memo[id(self)]
        return copied

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """Tokens [T, d] (or [..., d]), expert ids and weights [T, K]; the weighted sum of the experts, [T, d].

        By name they are called as in the module before sharding; behind a dispatcher, with tokens and
        :class:`~poise.train.dispatched.Routed`.
        """
        if len(given) == 2 and isinstance(given[1], Routed):
            given = (given[0], *given[1])
        if len(given) + len(named) != 3 or set(named) != set(self._inputs[len(given) :]):
            raise ModelError(
                f"experts called with {len(given)} inputs and {sorted(named)}, not with {', '.join(self._inputs)}"
            )
        hidden_states, top_k_index, top_k_weights = *given, *(named[name] for name in self._inputs[len(given) :])
        if self.schedule is None:
            raise ModelError("these experts belong to no run", hint="fully_shard_experts sets them up")
        if self.training and self.kind.random:
            raise ModelError(
                "these experts draw random numbers in training (dropout, noise): they may be evaluated only",
                hint="model.eval(), or set their probability to 0 before fully_shard_experts",
            )
        self.kind.follow(self.training)
        return self.schedule.run(self, hidden_states, top_k_index, top_k_weights).view(hidden_states.shape)


class Begin:
    """The model's forward hook; a copy of the model has one of its own run."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._seen: tuple[int, ...] = ()  # FSDP2's modules

    def __call__(self, model: nn.Module, *_: Any) -> None:
        """A forward pass starts; before, it is looked at what averages the dense rest, where that is new."""
        self._seen = check_meshes(model, self.schedule.layers, self._seen)
        self.schedule.begin()
