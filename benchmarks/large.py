"""Time and memory of the commands on inputs a hundred times larger than the tests': 20,000 recorded steps of 61 layers
and 256 experts, and two million tokens of as many layers, top-8.

    python benchmarks/large.py [--scale 0.1] [--only WORD ...] [--methods contiguous,eplb] [--folder FOLDER]

Makes the files (synthetic; in a temporary folder, about 11 GB at full scale, each removed once it was read), runs each
command in a process of its own, and writes reports/DATE-large.md. ``--scale`` takes so much of both, ``--only`` the rows
with one of these words in them, ``--methods`` what is compared, of which the last one plans.

The rule: resident memory stays below 3 times the file and 1 GB. Of compressed files the arrays count as they unpack, in
their own types. A process that wants far more address space than that is refused it, so the machine survives.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, EXPERTS, TOP_K = 61, 256, 8
STEPS, TOKENS, PASS = 20_000, 2_000_000, 4096
FREE = 10**9
SLACK = 8 << 30
"""Address space beyond the rule: libraries reserve what they never touch."""
PATIENCE_S = 3600
"""A command that takes longer is ended, and said to have failed."""
POISE = [sys.executable, "-m", "poise.cli"]
CLUSTER = ["--cluster", "8x8:h100"]


def steps_of(scale: float) -> int:
    return max(2, round(STEPS * scale))


def tokens_of(scale: float) -> int:
    return max(2 * PASS, round(TOKENS * scale))


def loads(scale: float) -> Iterator[np.ndarray]:
    """Steps of skewed loads that vary, uint16 [some, L, E]."""
    rng = np.random.default_rng(0)
    mean_LE = 128.0 * rng.dirichlet(np.full(EXPERTS, 0.8), LAYERS) * EXPERTS
    drawn = (
        rng.poisson(mean_LE * rng.gamma(20, 0.05, mean_LE.shape), (100, *mean_LE.shape))
        .clip(0, 60_000)
        .astype(np.uint16)
    )
    for first in range(0, steps_of(scale), len(drawn)):
        some = min(len(drawn), steps_of(scale) - first)
        yield drawn[rng.permutation(len(drawn))[:some]] + rng.integers(8, size=(some, *mean_LE.shape), dtype=np.uint16)


def experts(scale: float) -> Iterator[np.ndarray]:
    """Experts of passes of tokens, distinct ones of each, uint8 [some, L, K]."""
    rng = np.random.default_rng(1)
    first_LP = np.stack(
        [rng.permutation(EXPERTS)[(256 * rng.random(4096) ** 2).astype(int)] for _ in range(LAYERS)]
    ).astype(np.uint8)
    for at in range(0, tokens_of(scale), PASS):
        some = min(PASS, tokens_of(scale) - at)
        first = first_LP[np.arange(LAYERS), rng.integers(4096, size=(some, LAYERS))]
        stride = 2 * rng.integers(EXPERTS // 2, size=(some, LAYERS), dtype=np.uint8) + 1
        yield first[..., None] + stride[..., None] * np.arange(TOP_K, dtype=np.uint8)  # modulo 256


def npy(path: Path, parts: Callable[[float], Iterator[np.ndarray]], scale: float) -> None:
    count, first = (steps_of if parts is loads else tokens_of)(scale), next(parts(scale))
    with path.open("wb") as stream:
        _member(stream, parts(scale), count, first)


def npz(path: Path, name: str, parts: Callable[[float], Iterator[np.ndarray]], scale: float, packed: bool) -> None:
    count, first = (steps_of if parts is loads else tokens_of)(scale), next(parts(scale))
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
            _member(stream, parts(scale), count, first)
        if name == "experts":
            others = {"num_experts": np.int32(EXPERTS), "request": (np.arange(count) // 500).astype(np.int32),
                      "is_decode": np.arange(count) % 500 >= 200}  # fmt: skip
            for other, array in others.items():
                with archive.open(f"{other}.npy", "w") as stream:
                    np.lib.format.write_array(stream, np.asarray(array))


def _member(stream: Any, parts: Iterator[np.ndarray], count: int, first: np.ndarray) -> None:
    head = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (count, *first.shape[1:]),
    }
    np.lib.format.write_array_header_1_0(stream, head)
    for part in parts:
        stream.write(part.tobytes())


def load_json(path: Path, scale: float) -> None:
    with path.open("w") as stream:
        stream.write('{"logical_count": [')
        for index, part in enumerate(loads(scale)):
            stream.write(("," if index else "") + json.dumps(part.tolist())[1:-1])
        stream.write("]}")


def stat_pt(path: Path, scale: float) -> None:
    """What SGLang's recorder saves in mode ``stat``."""
    import torch

    count = torch.empty((steps_of(scale), LAYERS, EXPERTS), dtype=torch.int32)
    at = 0
    for part in loads(scale):
        count[at : at + len(part)] = torch.from_numpy(part.astype(np.int32))
        at += len(part)
    torch.save({"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None}, path)


def token_pt(path: Path, scale: float) -> None:
    """What SGLang's recorder saves in mode ``per_token``."""
    import torch

    records = []
    for index, part in enumerate(experts(scale)):
        lengths = [500] * (len(part) // 500) + ([len(part) % 500] if len(part) % 500 else [])
        records.append({
            "forward_pass_id": index, "rank": 0, "gatherer_key": "primary", "forward_mode": 1,
            "topk_ids_of_layer": torch.from_numpy(part.transpose(1, 0, 2).astype(np.int32).copy()),
            "input_ids": np.arange(len(part)).tolist(), "extend_seq_lens": lengths,
            "positions": [place for length in lengths for place in range(length)],
        })  # fmt: skip
    slots = torch.arange(EXPERTS).repeat(LAYERS, 1)
    torch.save({"records": records, "last_physical_to_logical_map": slots}, path)


FILES: dict[str, Callable[[Path, float], None]] = {
    "loads.npy": lambda path, scale: npy(path, loads, scale),
    "loads.npz": lambda path, scale: npz(path, "counts", loads, scale, False),
    "loads-packed.npz": lambda path, scale: npz(path, "counts", loads, scale, True),
    "loads.json": load_json,
    "loads.pt": stat_pt,
    "tokens.npy": lambda path, scale: npy(path, experts, scale),
    "tokens.npz": lambda path, scale: npz(path, "experts", experts, scale, False),
    "tokens-packed.npz": lambda path, scale: npz(path, "experts", experts, scale, True),
    "tokens.pt": token_pt,
}
ALL = ("inspect", "plan", "compare")
WITH = {
    "loads.npz": ALL, "loads-packed.npz": ("inspect",), "loads.json": ALL, "loads.npy": ("convert",), "loads.pt": ("convert",),
    "tokens.npz": ALL, "tokens-packed.npz": ("inspect",), "tokens.npy": ("convert",), "tokens.pt": ("convert",),
}  # fmt: skip
ROWS = [(verb, name) for name, verbs in WITH.items() for verb in verbs]
ROWS.insert(ROWS.index(("convert", "loads.npy")) + 1, ("convert to JSON", "loads.npy"))


def command(verb: str, path: Path, out: Path, methods: list[str]) -> list[str]:
    ids = ["--num-experts", str(EXPERTS)]
    if verb == "convert":
        form = ["--format", "exflow"] if path.name == "tokens.npy" else []
        return ["convert", str(path), *ids, *form, "--json", "-o", str(out / "converted.npz")]
    if verb == "convert to JSON":
        return ["convert", str(path), *ids, "--json", "-o", str(out / "converted.json")]
    cluster = [*CLUSTER, "--redundant", "32", "-n", "4096", "--time-limit", "5", "--json"]
    if verb == "plan":
        return ["plan", str(path), *cluster, "--method", methods[-1], "-o", str(out / "plan.npz")]
    if verb == "compare":
        return ["compare", str(path), *cluster, *(word for name in methods for word in ("-p", name))]
    return [verb, str(path), "--json"]


def counted(path: Path) -> int:
    """Bytes of a file, of compressed members as they unpack."""
    if path.suffix != ".npz":
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def metered(words: list[str], most: int, out: Path) -> tuple[int, float, float, int, str, str]:
    """Exit code, seconds, those of the processor, most resident bytes, stdout and the end of stderr of a command that is given ``most`` bytes."""

    def protect() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    began = time.monotonic()
    with (out / "out").open("wb") as stdout, (out / "err").open("wb") as stderr:
        child = subprocess.Popen([*POISE, *words], stdout=stdout, stderr=stderr, preexec_fn=protect)
        late = threading.Timer(PATIENCE_S, child.kill)
        late.start()
        _, status, used = os.wait4(child.pid, 0)
        late.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
    said = (out / "err").read_text("utf-8", "replace").strip()
    return (
        child.returncode,
        time.monotonic() - began,
        used.ru_utime + used.ru_stime,
        used.ru_maxrss << 10,
        (out / "out").read_text("utf-8", "replace"),
        said[-300:],
    )


def told(verb: str, text: str) -> str:
    """What the command says of the steps that it took."""
    try:
        value = json.loads(text)
    except ValueError:
        return "no result"
    if verb == "compare":
        return "; ".join(
            f"{name}: {part['steps']} of {part['drawn_from_steps'] or part['steps']} steps"
            for name, part in value["judged"].items()
        )
    if verb == "plan":
        return "; ".join(value["details"].get("notes", ["all steps"]))
    return "all"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--scale", type=float, default=1.0)
    words.add_argument("--only", nargs="+", default=[""])
    words.add_argument("--methods", default="contiguous,lpt,eplb,poise")
    words.add_argument("--folder", type=Path)
    words.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.make is not None:
        FILES[given.make.name](given.make, given.scale)
        return
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        here = Path(folder)
        code, seconds, cpu, base, _, _ = metered(["--version"], SLACK, here)
        for name in FILES:
            mine = [
                verb for verb, file in ROWS if file == name and any(word in f"{verb} {file}" for word in given.only)
            ]
            path = here / name
            if mine:
                # In a process of its own: what this one has resident would count for its children.
                subprocess.run([sys.executable, __file__, "--make", str(path), "--scale", str(given.scale)], check=True)
            for verb in mine:
                size = counted(path)
                most = 3 * size + FREE
                code, seconds, cpu, peak, out, said = metered(
                    command(verb, path, here, given.methods.split(",")), most + SLACK, here
                )
                kept = "kept" if code == 0 and peak < most else "BROKEN"
                rows.append([verb, name, f"{path.stat().st_size / 1e6:.0f}", f"{size / 1e6:.0f}", f"{seconds:.0f}", f"{cpu:.0f}",
                             f"{peak / 1e6:.0f}", f"{most / 1e6:.0f}", f"{peak / most:.2f}", kept,
                             told(verb, out) if code == 0 else f"exit {code}: {said}"])  # fmt: skip
                print(*rows[-1], flush=True)
            path.unlink(missing_ok=True)
    from common import table, write  # only here: it takes memory that would count for the children

    head = [
        "command",
        "file",
        "MB on disk",
        "MB unpacked",
        "seconds",
        "CPU s",
        "peak MB",
        "rule MB",
        "peak / rule",
        "rule",
        "steps",
    ]
    text = (
        f"{steps_of(given.scale):,} steps of {LAYERS} layers and {EXPERTS} experts (uint16; `.pt` int32), and "
        f"{tokens_of(given.scale):,} tokens of as many layers, top-{TOP_K} (uint8; `.pt` int32). MB = 10^6 bytes. "
        f"The rule: peak resident memory below 3 times the unpacked file and 1 GB; `poise --version` alone has "
        f"{base / 1e6:.0f} MB. Load average {' '.join(f'{x:.0f}' for x in os.getloadavg())} on {os.cpu_count()} cores: seconds are of the clock, CPU s "
        f"of the processor. `plan` ({given.methods.split(',')[-1]}) and `compare` ({given.methods}): {' '.join(CLUSTER)}, 32 redundant slots, -n 4096, --time-limit 5 (of a search; not of the "
        "command, which reads, starts methods, prices and, in `plan`, does half of it again for the verdict)."
    )
    write("Large inputs", [text, table(head, rows)])


if __name__ == "__main__":
    main()
