"""How many experts a rank must send and receive so that step slots are filled by exchanges whose sizes no host knows.

    PYTHONPATH=src python benchmarks/fetches.py [DATA] [--steps 40]

Counted, nothing is timed. Every step's slots are filled, by the mirror of the device's fill kernel, from the loads of the step before; what
step slots hold stays there until it is replaced. Every expert has one static slot, on device e * D // E. Of all layers and steps, in experts:

``all``        every rank sends every one as many as that has step slots: D M
``pair``       as many from every rank to every one as the fullest pair of a step needs
``sum``        experts that anybody wants, summed by all ranks (an all-reduce, as a ring sends it): twice their number
``stripes``    owners deal stripes of what is wanted of them to all ranks, these send on: the busiest owner's experts, and M
"""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.common import table, write  # noqa: E402
from tests.runtime.device import mirror  # noqa: E402

from poise.routing.batch import RoutingBatch  # noqa: E402
from poise.routing.batching import make_batch  # noqa: E402
from poise.routing.files import read  # noqa: E402
from poise.stepwise.kernels import STEP, LayerSlots  # noqa: E402


def limited(expert_DS: NDArray[np.int32], slots: LayerSlots, owner_E: NDArray[np.int64], load_E: NDArray[np.int64],
            room: int) -> NDArray[np.int32]:  # fmt: skip
    """A table without what its owner has no room to send: the experts with most load go first."""
    out = expert_DS.copy()
    step = (slots.turn_DS == STEP) & (out >= 0)
    for owner in range(len(out)):
        wanted = sorted({int(e) for e in out[step] if owner_E[e] == owner}, key=lambda e: (-load_E[e], e))
        out[step & np.isin(out, wanted[room:])] = -1
    return out


def counted(
    batch: RoutingBatch, devices: int, step_slots: int, steps: int, rooms: tuple[int | None, ...]
) -> list[object]:
    """One row: see the module docstring, and the fullest device over the mean with each room."""
    experts = batch.num_experts
    owner_E = np.arange(experts) * devices // experts
    slots = LayerSlots.of(owner_E[:, None] == np.arange(devices), step_slots, np.zeros(devices, np.int32))
    loads_BLE = batch.load_BLE.astype(np.int64)[:steps]
    filled, new, pairs, distinct, owners = [], [], [], [], []
    full: dict[int | None, list[float]] = {room: [] for room in (0, *rooms)}
    for layer in range(batch.num_layers):
        held = {room: slots.expert_DS for room in rooms}
        for before_E, now_E in zip(loads_BLE[:-1, layer], loads_BLE[1:, layer], strict=True):
            for room in rooms:
                made = mirror.fill(before_E, held[room], slots.turn_DS, most_turns=32).expert_DS
                if room is not None:
                    made = limited(made, slots, owner_E, before_E, room)
                else:
                    step = (slots.turn_DS == STEP) & (made >= 0)
                    device, expert = np.nonzero(step)[0], made[step]
                    filled.append(len(expert) / devices)
                    new.append(int((made != held[None])[step].sum()) / devices)
                    pairs.append(np.bincount(owner_E[expert] * devices + device, minlength=1).max())
                    distinct.append(len(np.unique(expert)))
                    owners.append(np.bincount(owner_E[np.unique(expert)], minlength=1).max())
                held[room] = made
                full[room].append(fullest(now_E, made, slots))
            full[0].append(fullest(now_E, slots.expert_DS, slots))
    return [
        devices, step_slots, f"{np.mean(filled):.2f}", f"{np.mean(new):.2f}", devices * step_slots,
        f"{devices * np.mean(pairs):.1f} / {devices * max(pairs)}", f"{2 * np.mean(distinct):.1f} / {2 * max(distinct)}",
        f"{np.mean(owners) + step_slots:.1f} / {max(owners) + step_slots}", *(f"{np.mean(each):.3f}" for each in full.values()),
    ]  # fmt: skip


def fullest(load_E: NDArray[np.int64], expert_DS: NDArray[np.int32], slots: LayerSlots) -> float:
    """Of the exact split over a table's holders: the fullest device over the mean."""
    at = mirror.slots_of(expert_DS)
    quota = mirror.shared(load_E, at, at.held)
    mean = max(1, -(-int(load_E.sum()) // len(expert_DS)))
    return float(
        mirror.flow(quota, at, mean, 0, 4096, len(load_E)).quota_DS.sum(axis=1).max() / (load_E.sum() / len(expert_DS))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    traces = [("demo", files("poise") / "data" / "demo_trace.npz", ((4, 2), (8, 2), (16, 1), (16, 2)))]
    if options.data:
        llama = options.data / "llama4-maverick" / "anatomy.npz"
        traces.append(("Llama-4, anatomy (every fourth layer)", llama, ((8, 2), (16, 2), (32, 2))))
    rooms: tuple[int | None, ...] = (1, 2, 4, None)
    head = [
        "D",
        "M",
        "filled",
        "new",
        "all",
        "pair",
        "sum",
        "stripes",
        "static",
        *(f"room {room}" for room in rooms[:-1]),
        "any",
    ]
    parts = ["Experts that a rank receives a layer and step, mean / most; `filled`, `new`: step slots with an expert, and with another one "
             "than the step before, mean of a rank. Then the fullest device over the mean load: no replica, owners that send at most so "
             "many experts, any number."]  # fmt: skip
    for name, path, sizes in traces:
        for tokens in (512, 4096):
            batch = make_batch(read(str(path)), tokens_per_step=tokens)
            if batch.num_layers > 8:
                batch = RoutingBatch(
                    batch.load_BLE[:, ::4].copy(), batch.weight_B.copy(), batch.top_k, batch.layer_ids_L[::4].copy()
                )
            rows = [counted(batch, *size, options.steps, rooms) for size in sizes]
            parts += [
                f"## {name}, {tokens} tokens a step, {min(options.steps, batch.num_steps) - 1} steps judged",
                table(head, rows),
            ]
            print(parts[-1], flush=True)
    write("Fetching replicas by exchanges whose sizes no host knows", parts)


if __name__ == "__main__":
    main()
