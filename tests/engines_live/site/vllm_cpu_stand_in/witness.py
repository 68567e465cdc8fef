"""What the engine's own tables say runs, written down when it changes, and what came of its calls of poise, counted.

Counts: ``changes`` of the live map; ``turns``, calls that poise answered; ``settled``, answers that came to run in
whole; turns by their word (WORDS), with ``in time`` those that had the planner's map, and from a fault on by the word
behind FAULT.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cpu_stand_in.seen import COUNTS, Maps

from poise.engines.plugins import turns
from poise.engines.plugins.vllm_call import Planning

WORDS = {
    turns.NEW: "new", turns.STAYS: "stays", turns.FIRST: "first", turns.LATE: "late", turns.FAILED: "failed",
    turns.OTHER: "other", turns.GIVEN_UP: "given up", turns.MIXED: "mixed",
}  # fmt: skip
FAULT = "since the fault: "


def watch(path: str) -> None:
    """Begin to."""
    from vllm.distributed.eplb.eplb_state import EplbState

    add_model, step, planned, take = EplbState.add_model, EplbState.step, Planning.table, turns.Turns.take
    maps, answers = Maps(path), list[Any]()

    def note(state: Any) -> None:
        table = next(iter(state.model_states.values())).physical_to_logical_map
        maps.note(table.tolist())
        if answers and np.array_equal(answers[-1], table.numpy()):
            answers.clear()
            COUNTS["settled"] += 1

    def and_note(self: Any, *arguments: Any, **named: Any) -> None:
        add_model(self, *arguments, **named)
        note(self)

    def then_note(self: Any, *arguments: Any, **named: Any) -> None:
        step(self, *arguments, **named)
        note(self)

    def and_count(self: Planning, call: Any) -> Any:
        out = planned(self, call)
        answers.append(out)
        COUNTS["turns"] += 1
        return out

    def and_count_words(self: turns.Turns, *arguments: Any, **named: Any) -> Any:
        taken = take(self, *arguments, **named)
        word = WORDS[taken.word]
        COUNTS[word] += 1
        COUNTS["in time"] += word in ("new", "stays")
        if COUNTS["faults"]:
            COUNTS[FAULT + word] += 1
        return taken

    EplbState.add_model, EplbState.step = and_note, then_note
    Planning.table, turns.Turns.take = and_count, and_count_words
