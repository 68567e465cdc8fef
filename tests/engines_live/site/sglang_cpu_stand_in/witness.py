"""What the engine's own tables say runs, written down when it changes."""

from __future__ import annotations

from typing import Any

import torch
from cpu_stand_in.seen import Maps


def watch(path: str) -> None:
    """Begin to."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
    from sglang.srt.model_executor.model_runner import ModelRunner

    forward, maps = ModelRunner.forward, list[Maps]()

    def then_note(self: Any, *arguments: Any, **named: Any) -> Any:
        out = forward(self, *arguments, **named)
        if not maps:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            maps.append(Maps(path.format(rank=rank)))  # of SGLang's own processes all have one path
        if (current := get_global_expert_location_metadata()) is not None:
            maps[0].note(current.physical_to_logical_map.tolist())
        return out

    ModelRunner.forward = then_note
