"""What the engine's own tables say runs, written down when it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_maps(path: str) -> None:
    """A line of JSON with every map of slots to experts [L][S] that runs, in order, the one at the start first."""
    from vllm.distributed.eplb.eplb_state import EplbState

    add_model, step = EplbState.add_model, EplbState.step
    last: list[Any] = []

    def note(state: Any) -> None:
        table = next(iter(state.model_states.values())).physical_to_logical_map.tolist()
        if last != [table]:
            last[:] = [table]
            with Path(path).open("a") as out:
                out.write(json.dumps({"map": table}) + "\n")

    def and_note(self: Any, *arguments: Any, **named: Any) -> None:
        add_model(self, *arguments, **named)
        note(self)

    def then_note(self: Any, *arguments: Any, **named: Any) -> None:
        step(self, *arguments, **named)
        note(self)

    EplbState.add_model, EplbState.step = and_note, then_note
