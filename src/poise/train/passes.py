"""Forward passes whose backward is to come, and which of them activation checkpointing computes again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.runtime.layer import LayerStep
from poise.runtime.recompute import Region
from poise.train.foresight import MicroBatch
from poise.train.materialize import Materialised
from poise.util.errors import ModelError


@dataclass(eq=False, slots=True, weakref_slot=True)
class Pass:
    """One layer in one forward pass: what its backward, or its recomputation under checkpointing, needs again.

    Parameters
    ----------
    layer : its number.
    ids_TK : what the router chose, as it was given.
    step : the stages of the layer.
    weights : the experts that are held.
    number : of the forward pass.
    exchange : number of its exchange of tokens: no other pass has the same.
    frames : the checkpoints around it.
    before : the layer before it in the same forward pass, whose backward comes next; the same on all ranks.
    kept_bytes : of its replicas, if they stay from the forward pass to the backward within a budget.
    done : its backward is over.
    node : its place in the graph.
    micro_batch : whose routing was known ahead.
    """

    layer: int
    ids_TK: Tensor
    step: LayerStep
    weights: Materialised
    number: int
    exchange: int
    frames: list[weakref.ref[Any]]
    before: Pass | None = None
    kept_bytes: float = 0.0
    done: bool = False
    node: Callable[[], Any] = lambda: None
    micro_batch: MicroBatch | None = None

    def out_of_turn(self, now: MicroBatch | None) -> ModelError | None:
        """What to say where it is computed again and would not be routed as before: a record was replayed only then, or
        is replayed only now, or another one.
        """
        then = self.micro_batch if self.micro_batch is not None and self.micro_batch.replays else None
        if then is (now if now is not None and now.replays else None):
            return None
        whose = "a pass outside of the loop" if self.micro_batch is None else f"micro-batch {self.micro_batch.number}"
        other = "none" if now is None else f"micro-batch {now.number}"
        return ModelError(
            f"layer {self.layer} of {whose} is computed again while {other} of the rollout runs",
            hint="under activation checkpointing, call backward() where the forward pass ran: in the same turn of "
            "run.foresee(...), or outside of its loop",
        )

    @property
    def comes(self) -> bool:
        """Whether the backward pass that runs will reach it, and has not."""
        node = self.node()
        return not self.done and node is not None and torch._C._will_engine_execute_node(node)


class Passes:
    """All passes that are alive. Graphs keep them; this object keeps only the last one of the forward pass that runs.

    ``number`` counts forward passes of the model in which a layer ran; ``layer`` is the one that ran last in this one,
    -1 before the first, None when the next layer that runs begins a new forward pass.
    """

    def __init__(self) -> None:
        self.number = 0
        self.layer: int | None = None
        self._refs: list[weakref.ref[Pass]] = []
        self._last: Pass | None = None
        self._turns: weakref.WeakKeyDictionary[Any, dict[tuple[int, int], int]] = weakref.WeakKeyDictionary()

    def open(self) -> list[Pass]:
        """Those whose backward is to come, oldest first."""
        return [one for ref in self._refs if (one := ref()) is not None and not one.done]

    def begin(self) -> None:
        """A forward pass of the model starts."""
        self._last, self.layer = None, -1

    def begins_with(self, layer: int) -> bool:
        """Whether this layer, which runs now, is the first of a forward pass that nothing else has begun."""
        return self.layer is None or layer <= self.layer

    def count(self) -> None:
        """A layer is about to run: with the first one the forward pass gets its number."""
        self.number += self.layer == -1

    def end(self) -> None:
        """No layer that runs from now on belongs to this forward pass."""
        self.layer = None

    def add(self, one: Pass) -> None:
        """A forward pass of a layer that may go backward."""
        self._refs = [ref for ref in self._refs if ref() is not None]
        if self._last is not None and self._last.layer == one.layer - 1:
            one.before = self._last
        self._last = one
        self._refs.append(weakref.ref(one))

    def again(self, layer: int, ids_TK: Tensor, region: Region) -> Pass:
        """The pass that is computed again: the router may decide ties otherwise, plan and splits must be the same.

        Of several passes of the layer it is one of the same checkpoint, even one whose backward is over, as its graph
        may have been kept; several of one checkpoint are computed again in the order in which they ran. Where no
        checkpoint is known, it is the open pass with the most equal ids.

        Raises
        ------
        ModelError : there is none.
        """
        known = [one for ref in self._refs if (one := ref()) is not None and one.layer == layer]
        for frame in region.frames:
            found = [one for one in known if any(ref() is frame for ref in one.frames)]
            if found:
                one = found[min(self._turn(frame, layer), len(found) - 1)]
                alive = [ref for ref in one.frames if ref() is not None]
                new = [f for f in region.frames if not any(ref() is f for ref in alive)]
                one.frames = [*alive, *(weakref.ref(f) for f in new)]  # a checkpoint inside of this one is new
                return one
        found = [one for one in known if not one.done and one.ids_TK.shape == ids_TK.shape]
        if not found:
            raise ModelError(
                f"layer {layer} is computed in the backward pass, but no forward pass of it is open",
                hint="checkpoint with use_reentrant=False",
            )
        same = [int((one.ids_TK == ids_TK).sum()) if len(found) > 1 else 0 for one in found]
        return found[max(range(len(found)), key=lambda i: (same[i], i))]

    def _turn(self, frame: Any, layer: int) -> int:
        """How often a layer was computed again in a checkpoint, in this backward pass."""
        turns, key = self._turns.setdefault(frame, {}), (torch._C._current_graph_task_id(), layer)
        turns[key] = turns.get(key, -1) + 1
        return turns[key]
