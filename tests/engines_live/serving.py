"""What a rank's program does whatever its engine is: it answers rounds of prompts until what is waited for came.

Its only argument is a file of JSON with ``rounds`` of prompts (token ids), ``out``, and ``phases`` or null. A phase has
``rounds``, the numbers of those that are served, one after the other and again from the first. It is over when each was
served once and every rank counts at least what ``everywhere`` says, and any rank what ``anywhere`` says, since the
phase began. So a row that needs maps gets them on a machine of any speed. After MOST rounds too many it is given up,
``short``, and the run with it.

A line of JSON a round goes to ``out.rank-N``, one a phase to ``out.phases.rank-N``.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MOST = 128
"""Rounds, two rearrangements of vLLM's rows each: a planner on a quiet machine needs one."""
RANK = int(os.environ.get("RANK", 0))


def asked() -> dict[str, Any]:
    """The file's content. Whoever waits too long asks this process where it hangs, by a signal."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    return json.loads(Path(sys.argv[1]).read_text())


def alone(mine: list[int]) -> list[list[int]]:
    """What all ranks count, where there is one."""
    return [mine]


def serve(
    given: Mapping[str, Any], answers: Callable[[Sequence[Sequence[int]]], list[dict[str, Any]]],
    counts: Callable[[], Mapping[str, int]] = dict, gather: Callable[[list[int]], list[list[int]]] = alone,
) -> None:  # fmt: skip
    """Serve all phases.

    Parameters
    ----------
    given : the file's content.
    answers : (prompts) -> of each its tokens, and the log of each one's probability.
    counts : () -> how often things came on this rank.
    gather : (numbers) -> those of all ranks; every rank calls it after the same rounds.
    """
    phases = given.get("phases") or [{"rounds": list(range(len(given["rounds"])))}]
    with (
        Path(f"{given['out']}.rank-{RANK}").open("w") as out,
        Path(f"{given['out']}.phases.rank-{RANK}").open("w") as over,
    ):
        for phase in phases:
            began, served = dict(counts()), 0
            while (short := waits(phase, served, began, counts(), gather)) and served < len(phase["rounds"]) + MOST:
                number = phase["rounds"][served % len(phase["rounds"])]
                print(f"ROUND {number}", file=sys.stderr, flush=True)
                rows = answers(given["rounds"][number])
                out.write(json.dumps({"round": number, "answers": rows}) + "\n")
                out.flush()
                served += 1
            said = {"began": began, "ended": dict(counts()), "rounds": served, "short": short}
            over.write(json.dumps({"phase": said}) + "\n")
            over.flush()
            if short:
                break
    print("ROUNDS DONE", file=sys.stderr, flush=True)


def waits(
    phase: Mapping[str, Any], served: int, began: Mapping[str, int], now: Mapping[str, int],
    gather: Callable[[list[int]], list[list[int]]],
) -> bool:  # fmt: skip
    """Whether a phase goes on after so many rounds, on all ranks alike."""
    if served < len(phase["rounds"]):
        return True
    everywhere, anywhere = phase.get("everywhere", {}), phase.get("anywhere", {})
    names = sorted({*everywhere, *anywhere})
    if not names:
        return False
    came = Counter(now)
    came.subtract(began)
    each = [dict(zip(names, row, strict=True)) for row in gather([came[name] for name in names])]
    return any(min(one[name] for one in each) < least for name, least in everywhere.items()) or any(
        max(one[name] for one in each) < least for name, least in anywhere.items()
    )


def end() -> None:
    """The process, at once: what gloo's threads do when the interpreter ends is not the engine's."""
    sys.stdout.flush()
    os._exit(0)
