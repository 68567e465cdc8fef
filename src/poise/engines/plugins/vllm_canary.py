"""Weights are looked at after vLLM moved them: what a slot holds must be what its expert was when it was loaded.

A transfer that brings another expert, or half of one, answers like any other; only tokens are wrong. With
``POISE_CANARY=1`` every rank numbers the bits of its experts when the load balancer is told of the model, all ranks
learn all numbers, and after each layer's move every slot whose expert changed is numbered again
(:mod:`poise.runtime.canary`). Another number raises, before the layer's buffer is given free, on all ranks: who found
nothing would wait in the next collective for who did. So the ranks add up what they found, where vLLM has all of them:
once for all layers that are in place at once, else once a layer.

New weights from outside (a reload, a trainer's weight sync) are noticed where they come through the model's
``load_weights``; experts are then numbered anew at the next move, which itself goes unlooked. Those that are copied
into the tensors by other ways are not noticed.

vLLM says that a layer is in place by the hook ``EplbState.on_layer_committed`` of the proposal #49700; releases without
it (0.30 to 0.33 were read) do it by two functions of the module, ``_commit_eplb_maps`` and
``_commit_eplb_maps_for_layer``, which come after the weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from poise.engines.plugins.vllm_call import LOG, cpu_group, ranks_of
from poise.util.errors import CommunicationError, OptionError

STATE = "vllm.distributed.eplb.eplb_state"
HOOK, ALL, ONE = "on_layer_committed", "_commit_eplb_maps", "_commit_eplb_maps_for_layer"
KEPT = "_poise_canary"


class Witness:
    """The numbers of a model's experts, and what this rank's slots held when they were last looked at.

    Parameters
    ----------
    state : vLLM's record of a model: ``physical_to_logical_map``, and ``model`` with ``expert_weights``, a list of
        tensors [slots of a rank, ...] a layer.
    group : process group of the ranks on CPUs.

    Attributes
    ----------
    stale : this rank got other weights since experts were numbered.
    """

    def __init__(self, state: Any, group: Any) -> None:
        self.stale = False
        self._group, self._ranks = group, ranks_of(group)
        self._rank = group.rank()
        self._weights = state.model.expert_weights
        self._number(state)

    def _number(self, state: Any) -> None:
        """Number what slots hold now; every rank calls it."""
        torch, canary = importlib.import_module("torch"), importlib.import_module("poise.runtime.canary")
        self._held = [self._mine(state, layer) for layer in range(len(self._weights))]
        self._canary = canary.Canary.of(
            self._held, self._rows, int(state.model.num_logical_experts), self._group, torch.device("cpu")
        )
        self.stale = False

    def _mine(self, state: Any, layer: int) -> list[int]:
        """Experts of this rank's slots."""
        each = len(self._weights[layer][0])
        row: list[int] = state.physical_to_logical_map[layer].tolist()
        return row[self._rank * each : (self._rank + 1) * each]

    def _rows(self, layer: int, slot: int) -> list[Any]:
        return [tensor[slot] for tensor in self._weights[layer]]

    def look(self, state: Any, layers: Sequence[int]) -> list[int]:
        """Look at the slots of layers whose expert changed; returns how many they were, for each. All ranks call it.

        Raises
        ------
        CommunicationError : one holds other weights than its expert had; on all ranks.
        """
        looked, said = [], ""
        stale = self.stale
        if not stale:
            try:
                looked = [self._look(state, layer) for layer in layers]
            except Exception as error:  # also what this rank alone has: the others wait for its word
                said = str(error) or type(error).__name__
        others, found = self._ranks.total(np.array([stale, bool(said)], np.int64)).tolist()
        if others:
            LOG.warning("poise: weights were loaded since experts were numbered: this move goes unlooked")
            self._number(state)
            return [0] * len(layers)
        if found:
            raise CommunicationError(
                said or f"{found} ranks found experts with other weights after a move, this one none: see their logs",
                hint="restart; without a load balancer (--enable-eplb) nothing moves",
            )
        return looked

    def _look(self, state: Any, layer: int) -> int:
        before, now = self._held[layer], self._mine(state, layer)
        before = before if len(before) == len(now) else [-1] * len(now)
        changed = [slot for slot, expert in enumerate(now) if expert >= 0 and expert != before[slot]]
        for slot in changed:
            weights = dict(enumerate(self._rows(layer, slot)))
            if self._canary.wrong({(layer, now[slot]): weights}):
                raise CommunicationError(
                    f"layer {layer}: slot {slot} of rank {self._rank} should hold expert {now[slot]}, and holds other "
                    "weights"
                )
        self._held[layer] = now
        return len(changed)


def install() -> None:
    """Look at weights from now on, in this process.

    Raises
    ------
    OptionError : this vLLM says nowhere that a layer is in place.
    """
    module = importlib.import_module(STATE)
    state_class = module.EplbState
    hook = callable(getattr(state_class, HOOK, None))
    if not hook and not (callable(getattr(module, ALL, None)) and callable(getattr(module, ONE, None))):
        raise OptionError(
            f"POISE_CANARY: {STATE} has neither EplbState.{HOOK} nor {ALL} and {ONE}", hint="unset POISE_CANARY"
        )
    if hasattr(state_class.add_model, KEPT):
        return
    add_model = state_class.add_model

    def and_number(self: Any, *arguments: Any, **named: Any) -> Any:
        if getattr(getattr(self, "parallel_config", None), "enable_elastic_ep", False):
            raise OptionError(
                "POISE_CANARY: ranks of elastic expert parallelism come and go", hint="unset POISE_CANARY"
            )
        out = add_model(self, *arguments, **named)
        for one in self.model_states.values():
            if not hasattr(one, KEPT):
                group = cpu_group()
                if group is None:
                    raise OptionError(
                        "POISE_CANARY: vLLM has no group of ranks on CPUs, over which numbers travel",
                        hint="unset POISE_CANARY",
                    )
                witness = Witness(one, group)
                setattr(one, KEPT, witness)
                _watch(one.model, witness)
                LOG.info("poise: the weights of every expert are numbered")
        return out

    setattr(and_number, KEPT, True)
    state_class.add_model = and_number
    if hook:
        told = getattr(state_class, HOOK)

        def committed(self: Any, one: Any, layer: int, *more: Any, **named: Any) -> Any:
            out = told(self, one, layer, *more, **named)
            _look(one, [layer])
            return out

        setattr(state_class, HOOK, committed)
        return
    every, single = getattr(module, ALL), getattr(module, ONE)

    def and_look(model_state: Any, *arguments: Any, **named: Any) -> Any:
        out = every(model_state, *arguments, **named)
        _look(model_state, range(len(model_state.model.expert_weights)))
        return out

    def then_look(model_state: Any, new_physical_to_logical_map: Any, layer: int) -> Any:
        out = single(model_state, new_physical_to_logical_map=new_physical_to_logical_map, layer=layer)
        _look(model_state, [layer])
        return out

    setattr(module, ALL, and_look)
    setattr(module, ONE, then_look)


def _watch(model: Any, witness: Witness) -> None:
    """Have the witness told when the model gets weights."""
    load = getattr(model, "load_weights", None)
    if load is None:
        return

    def and_tell(*arguments: Any, **named: Any) -> Any:
        witness.stale = True
        return load(*arguments, **named)

    model.load_weights = and_tell


def _look(state: Any, layers: Sequence[int]) -> None:
    witness = getattr(state, KEPT, None)
    if witness is None:
        return
    for layer, looked in zip(layers, witness.look(state, layers), strict=True):
        if looked:
            LOG.info("poise: layer %d: %d slots hold what their experts were", layer, looked)
