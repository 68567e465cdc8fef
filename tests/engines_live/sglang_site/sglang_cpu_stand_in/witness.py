"""What the engine's own tables say runs, written down when it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_maps(path: str) -> None:
    """A line of JSON with every map of slots to experts [layers][S] that runs, in order, the one at the start first."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
    from sglang.srt.model_executor.model_runner import ModelRunner

    forward = ModelRunner.forward
    last: list[Any] = []

    def then_note(self: Any, *arguments: Any, **named: Any) -> Any:
        out = forward(self, *arguments, **named)
        current = get_global_expert_location_metadata()
        table = None if current is None else current.physical_to_logical_map.tolist()
        if table is not None and last != [table]:
            last[:] = [table]
            with Path(path).open("a") as lines:
                lines.write(json.dumps({"map": table}) + "\n")
        return out

    ModelRunner.forward = then_note
