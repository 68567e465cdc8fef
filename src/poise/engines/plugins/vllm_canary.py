"""Weights are looked at after vLLM moved them: what a slot holds must be what its expert was when it was loaded.

A transfer that brings another expert, or half of one, answers like any other; only tokens are wrong. With
``POISE_CANARY=1`` every rank numbers the bits of its experts when the load balancer is told of the model, all ranks
learn all numbers, and after each layer's move every slot whose expert changed is numbered again
(:mod:`poise.runtime.canary`). Another number raises, before the layer's buffer is given free.

vLLM says that a layer is in place by the hook ``EplbState.on_layer_committed`` of the proposal #49700; releases without
it (0.30 to 0.33 were read) do it by two functions of the module, ``_commit_eplb_maps`` and
``_commit_eplb_maps_for_layer``, which come after the weights.
"""

from __future__ import annotations

import importlib
from typing import Any

from poise.engines.plugins.vllm_call import LOG, cpu_group
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
    """

    def __init__(self, state: Any, group: Any) -> None:
        torch, canary = importlib.import_module("torch"), importlib.import_module("poise.runtime.canary")
        self._rank = group.rank()
        self._weights = state.model.expert_weights
        self._held = [self._mine(state, layer) for layer in range(len(self._weights))]
        self._canary = canary.Canary.of(
            self._held, self._rows, int(state.model.num_logical_experts), group, torch.device("cpu")
        )

    def _mine(self, state: Any, layer: int) -> list[int]:
        """Experts of this rank's slots."""
        each = len(self._weights[layer][0])
        row: list[int] = state.physical_to_logical_map[layer].tolist()
        return row[self._rank * each : (self._rank + 1) * each]

    def _rows(self, layer: int, slot: int) -> list[Any]:
        return [tensor[slot] for tensor in self._weights[layer]]

    def look(self, state: Any, layer: int) -> int:
        """Look at the slots of a layer whose expert changed; returns how many they were.

        Raises
        ------
        CommunicationError : one holds other weights than its expert had.
        """
        before, now = self._held[layer], self._mine(state, layer)
        before = before if len(before) == len(now) else [-1] * len(now)
        changed = [slot for slot, expert in enumerate(now) if expert >= 0 and expert != before[slot]]
        for slot in changed:
            weights = dict(enumerate(self._rows(layer, slot)))
            if self._canary.wrong({(layer, now[slot]): weights}):
                raise CommunicationError(
                    f"layer {layer}: slot {slot} of rank {self._rank} should hold expert {now[slot]}, and holds other "
                    "weights",
                    hint="restart; without a load balancer (--enable-eplb) nothing moves",
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
        out = add_model(self, *arguments, **named)
        for one in self.model_states.values():
            if not hasattr(one, KEPT):
                group = cpu_group()
                setattr(one, KEPT, Witness(one, group))
                LOG.info("poise: the weights of every expert are numbered")
        return out

    setattr(and_number, KEPT, True)
    state_class.add_model = and_number
    if hook:
        told = getattr(state_class, HOOK)

        def committed(self: Any, one: Any, layer: int, *more: Any, **named: Any) -> Any:
            out = told(self, one, layer, *more, **named)
            _look(one, layer)
            return out

        setattr(state_class, HOOK, committed)
        return
    every, single = getattr(module, ALL), getattr(module, ONE)

    def and_look(model_state: Any, *arguments: Any, **named: Any) -> Any:
        out = every(model_state, *arguments, **named)
        for layer in range(len(model_state.model.expert_weights)):
            _look(model_state, layer)
        return out

    def then_look(model_state: Any, new_physical_to_logical_map: Any, layer: int) -> Any:
        out = single(model_state, new_physical_to_logical_map=new_physical_to_logical_map, layer=layer)
        _look(model_state, layer)
        return out

    setattr(module, ALL, and_look)
    setattr(module, ONE, then_look)


def _look(state: Any, layer: int) -> None:
    witness = getattr(state, KEPT, None)
    if witness is not None:
        looked = witness.look(state, layer)
        if looked:
            LOG.info("poise: layer %d: %d slots hold what their experts were", layer, looked)
