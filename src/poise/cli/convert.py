"""poise convert: what an engine wrote, as a trace, a load profile or a placement."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from poise.cli import options as o
from poise.engines.dump import EngineDump, SlotRecord, placement_of
from poise.engines.readers import FORMATS, ReadOptions, read_dump, read_slot_map
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.routing.counters import COUNTERS
from poise.routing.files import IDLE
from poise.routing.ranks import READINGS
from poise.routing.said import SAID
from poise.routing.trace import LoadProfile, row_blocks
from poise.util.errors import OptionError, TraceError
from poise.util.executors import executor_of
from poise.util.files import replacing


def convert(
    dumps: Annotated[list[Path], typer.Argument(help="Files or folders that an engine wrote in one run.")],
    output: Annotated[
        Path,
        o.flag("output", "Trace (.npz), load profile (.json, .npz) or placement (.npz) to write."),
    ],
    model: o.Model = None,
    placement: Annotated[
        Path | None, typer.Option(help="Placement or engine's map that ran, for dumps that count slots without a map.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help=f"Instead of detection: {', '.join(FORMATS)}.", show_default=False)
    ] = None,
    num_experts: Annotated[int | None, typer.Option(help="E, where no model is named.")] = None,
    top_k: Annotated[int | None, typer.Option(help="K, where no model is named.")] = None,
    zero_experts: Annotated[
        int | None,
        typer.Option(
            help="Identity experts, which compute nothing: ids from E on are theirs. Where the model does not say."
        ),
    ] = None,
    relabelling: Annotated[
        Path | None, typer.Option(help="poise-relabelling.json of the checkpoint that ran, or its folder.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            help="Write the map of a dump as a placement on so many devices (.npz); a file with a map "
            "alone that says how many needs no number."
        ),
    ] = None,
    ranks: o.Ranks = None,
    allow_missing_ranks: o.AllowMissingRanks = False,
    counters: Annotated[
        str | None,
        typer.Option(help="What records of loads are: steps, or running totals of counters that were never set back."),
    ] = None,
    executor: o.Executor = "serial",
    json: o.Json = False,
) -> None:
    """Turn an engine's dump into a routing trace or a load profile; the format is told from the content.

    Example: poise convert dumps/ --model deepseek-v3 -o trace.npz
    """
    with o.errors():
        o.writable(output)
        spec = None if model is None else ModelSpec.parse(model)
        ran = None if placement is None else _placement(placement, ReadOptions(spec))
        options = ReadOptions(
            spec, ran, num_experts, top_k, form, relabelling, o.one_of("reading of ranks", ranks, READINGS),
            allow_missing_ranks or devices is not None,  # the map is in the file of any rank
            zero_experts, o.one_of("counters", counters, COUNTERS),
        )  # fmt: skip
        with executor_of(executor) as workers:
            dump = read_dump(dumps, options=options, executor=workers)
        for note in dump.notes:
            o.talk.print(note)
        if devices is not None or _is_placement(dump):
            wrote = _write_placement(dump, devices, options, output)
        else:
            wrote = _write_traffic(dump, output)
        if json:
            o.print_json("convert", {
                "engine": dump.engine, "kind": dump.kind, "wrote": wrote, "file": str(output), **_facts(dump),
                "notes": list(dump.notes),
            })  # fmt: skip
        else:
            o.out.print(repr(dump))
        o.talk.print(f"wrote {output}")


def _placement(path: Path, options: ReadOptions) -> Placement | SlotRecord:
    """A placement of poise, or any map that is read."""
    if path.suffix == ".npz":
        return Placement.load(path)
    return read_slot_map(path, options=options)


def _write_traffic(dump: EngineDump, output: Path) -> str:
    traffic = dump.traffic
    if isinstance(traffic, LoadProfile):
        _write_profile(traffic, output, dump.recorded_layers)
        return "profile"
    if output.suffix != ".npz":
        raise OptionError(f"{output} would hold a trace", hint="name it .npz")
    traffic.save(output)
    return "trace"


def _write_profile(profile: LoadProfile, output: Path, recorded_layers: int | None) -> None:
    """``.json``: one row a decoder layer, zeros where nothing was recorded. ``.npz``: counts and their layers.

    What was said of the numbers is said in the file.
    """
    ids = profile.layer_ids
    if output.suffix == ".npz":
        idle: dict[str, Any] = {} if profile.idle_BL is None else {IDLE: profile.idle_BL}
        said: dict[str, Any] = {key: np.array(SAID[key]) for key in sorted(profile.said)}
        with replacing(output, TraceError) as stream:
            np.savez_compressed(stream, counts=profile.load_BLE, layers=ids, **idle, **said)
        return
    if output.suffix != ".json":
        raise OptionError(f"{output} would hold a load profile", hint="name it .json or .npz")
    layers = max(int(ids.max()) + 1, recorded_layers or 0)
    tables: dict[str, NDArray[Any]] = {"logical_count": profile.load_BLE}
    if profile.idle_BL is not None:
        tables[IDLE] = profile.idle_BL
    with replacing(output, TraceError) as stream:
        for index, (name, table) in enumerate(tables.items()):
            stream.write((", " if index else "{").encode() + jsonlib.dumps(name).encode() + b": ")
            stream.writelines(_rows(table, ids, layers))
        stream.writelines(
            f", {jsonlib.dumps(key)}: {jsonlib.dumps(SAID[key])}".encode() for key in sorted(profile.said)
        )
        stream.write(b"}")


def _rows(table: NDArray[Any], ids: NDArray[np.int32], layers: int) -> Iterator[bytes]:
    """A table [B, L, ...] as JSON, one step after another, with a row for each of ``layers`` decoder layers."""
    whole = all((table[rows] == np.floor(table[rows])).all() for rows in row_blocks(table, 8))
    for step, row in enumerate(table):
        full = np.zeros((layers, *row.shape[1:]), np.int64 if whole else np.float64)
        full[ids] = row
        before = "" if len(table) == 1 else ", " if step else "["
        yield (before + jsonlib.dumps(full.tolist())).encode()
    yield b"]" if len(table) > 1 else b""


def _is_placement(dump: EngineDump) -> bool:
    """It has a map and no traffic, and says on how many devices."""
    if dump.placement is not None:
        return True
    known = dump.slots is not None and dump.slots.num_devices is not None
    return known and dump.trace is None and dump.profile is None


def _write_placement(dump: EngineDump, devices: int | None, options: ReadOptions, output: Path) -> str:
    made = placement_of(dump, devices, options.experts)
    if output.suffix != ".npz":
        raise OptionError(f"{output} would hold a placement", hint="name it .npz")
    made.save(output)
    return "placement"


def _facts(dump: EngineDump) -> dict[str, Any]:
    out: dict[str, Any] = {"recorded_layers": dump.recorded_layers}
    if dump.trace is not None:
        t = dump.trace
        out["trace"] = {"tokens": t.num_tokens, "requests": len(t.requests()), "decoded": int(t.is_decode.sum()),
                        "layers": t.layer_ids.tolist(), "experts": t.num_experts, "top_k": t.top_k}  # fmt: skip
    if dump.profile is not None:
        p = dump.profile
        out["profile"] = {"steps": p.num_steps, "layers": p.layer_ids.tolist(), "experts": p.num_experts,
                          "pairs": float(p.load_BLE.sum(dtype=np.float64))}  # fmt: skip
    if dump.slots is not None:
        s = dump.slots
        width = (s.map_LS if s.map_LS is not None else s.count_BLS).shape[-1]  # type: ignore[union-attr]
        out["slots"] = {"layers": s.layer_ids_L.tolist(), "slots": int(width), "map": s.map_LS is not None,
                        "counts": s.count_BLS is not None}  # fmt: skip
    if dump.balance_B is not None:
        out["balance"] = {"records": len(dump.balance_B), "mean": float(dump.balance_B.mean())}
    return out
