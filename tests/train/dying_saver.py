"""Saves checkpoints in processes that are ended (as by ``kill -9``) before their first, second, ... change of a file.

python tests/train/dying_saver.py FOLDER [SCENARIO ...]: prints a line of JSON a scenario (all without a name); exits with 1 where one that was saved is lost.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from poise.train import checkpoint

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR
ENDED = 9
# name: steps that are saved first, the step whose write is ended, and how many are kept
SCENARIOS = {
    "the first of all": ((), 1, 2),
    "a new one": ((10, 20), 30, 2),
    "one kept": ((10,), 11, 1),
    "an earlier step": ((10, 20), 1, 2),
    "the same step": ((10, 20), 20, 2),
}


def in_a_process(do: Callable[[], None]) -> int:
    """Exit code of a process that does it."""
    number = os.fork()
    if not number:
        try:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            do()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def model_of(value: float) -> nn.Module:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    return model


def save(root: Path, step: int, value: float, keep: int) -> None:
    model = model_of(value)
    checkpoint.save_checkpoint(root, model, torch.optim.SGD(model.parameters(), momentum=0.9), step=step, keep=keep)


def warm_up(root: Path) -> None:
    """One save and one load here: what is imported and built when it is first needed is not for every process to do anew."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    save(root, 1, 1.0, 1)
    load(root, {1.0}, False)
    dist.destroy_process_group()


def end_before(change: int) -> None:
    """From now on the process ends before its so many-th change of a file."""
    seen = 0

    def look(event: str, given: tuple[object, ...]) -> None:
        nonlocal seen
        opened = event == "open" and isinstance(given[2], int) and given[2] & WRITES
        if opened or event in CHANGES:
            seen += 1
            if seen >= change:
                os._exit(ENDED)

    sys.addaudithook(look)


def load(root: Path, values: set[float], lost_is_fine: bool) -> None:
    """One of these values is loaded."""
    warnings.simplefilter("ignore")
    if lost_is_fine and checkpoint.latest_checkpoint(root) is None:
        return
    model = model_of(float("nan"))
    step = checkpoint.load_checkpoint(root, model, torch.optim.SGD(model.parameters(), momentum=0.9))
    found = {float(value) for weight in model.parameters() for value in weight.flatten()}
    assert len(found) == 1 and found <= values and step in {int(value) % 100 for value in found}, (step, found)


def try_all(root: Path, before: tuple[int, ...], step: int, keep: int) -> int:
    """End the write of ``step`` before every change; number of changes it makes."""
    old = float(before[-1]) if before else -1.0
    new = step + 100.0
    first = root / "first"
    first.mkdir(parents=True)

    def begin() -> None:
        for one in before:
            save(first, one, float(one), keep)

    assert in_a_process(begin) == 0
    for change in range(1, 200):
        place = shutil.copytree(first, root / str(change))

        def ended(place: Path = place, change: int = change) -> None:
            end_before(change)
            save(place, step, new, keep)

        def after(place: Path = place) -> None:
            load(place, {old, new}, not before)
            save(place, 40, 40.0, keep)
            load(place, {40.0}, False)

        code = in_a_process(ended)
        assert code in (0, ENDED), code
        left = names(place)
        assert in_a_process(after) == 0, (change, left)
        assert len(names(place)) <= keep + 1 and not any(name[0] == "." for name in names(place)), names(place)
        if code == 0:
            return change - 1
    raise AssertionError("it does not end")


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir()) if place.exists() else []


def main() -> None:
    torch.set_num_threads(1)
    checkpoint.sharded_layers = lambda model: []  # a model without experts
    warm_up(Path(sys.argv[1]) / "warm-up")
    gc.collect()
    gc.freeze()  # what all have is nothing that their collections must go through
    for name in sys.argv[2:] or SCENARIOS:
        before, step, keep = SCENARIOS[name]
        print(
            json.dumps({"scenario": name, "changes": try_all(Path(sys.argv[1]) / name, before, step, keep)}), flush=True
        )


if __name__ == "__main__":
    main()
