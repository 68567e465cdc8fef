"""What gloo does with a send or receive whose work nobody holds any more, without poise.

Usage: python benchmarks/gloo_dropped_work.py

Two ranks. The first drops the work of a receive (a send) before the second has posted its side; then both exchange four
numbers under another tag. ``kept``: the same, but the work is held until the end.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import table, write

WAIT_S = 10
WAYS = ("receive dropped", "send dropped", "receive kept", "send kept")


def rank_main(rank: int, way: str, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=WAIT_S))
    mine, early, late = torch.full((4,), rank + 1.0), torch.zeros(4), torch.zeros(4)
    receives = way.startswith("receive")
    held = []
    if rank == 0:
        held.append(dist.irecv(early, 1, tag=5) if receives else dist.isend(mine, 1, tag=5))
        if way.endswith("dropped"):
            held.clear()
    dist.barrier()
    if rank == 1:
        held.append(dist.isend(mine, 0, tag=5) if receives else dist.irecv(early, 0, tag=5))
    start, spent = time.time(), time.process_time()
    try:
        for work in (dist.isend(mine, 1 - rank, tag=9), dist.irecv(late, 1 - rank, tag=9)):
            work.wait()
        said = f"got {late.tolist()}"
    except RuntimeError as error:
        said = str(error).partition("] ")[2].splitlines()[0][:90]
    said += f"; {time.time() - start:.1f} s, of the processor {time.process_time() - spent:.1f} s"
    Path(folder, str(rank)).write_text(said)
    time.sleep(0.5 if said.startswith("got") else 2.0)  # the other one's time-out, not its end
    os._exit(0)


def main() -> None:
    rows: list[list[object]] = []
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_main, (way, folder), 2)
            rows.append([way, *(Path(folder, str(rank)).read_text() for rank in (0, 1))])
    write("gloo and works that nobody holds", [
        f"Two ranks exchange four numbers, after the first one's work of another exchange was dropped, or kept; operations wait {WAIT_S} s. "
        "A message for a receive that is no more stays in the connection, which is read no further; a send that is no more is never "
        "written, nor is what is posted after it. There is no error, and gloo's thread spins.",
        table(["on rank 0", "rank 0 says", "rank 1 says"], rows),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
