"""One command that proves the kernels of the device on a GPU and measures them, in at most four minutes on one H200.

    PYTHONPATH=src python benchmarks/gpu.py [--seconds 200] [--no-report] [--gpu h200]

What it needs is in the repository, and numpy, numba, scipy, PyTorch and Triton. Without a GPU, ``TRITON_INTERPRET=1`` runs parts 1, 5
and 6 at small sizes and says that the others were not run: no figure of a GPU is written. Ends with 1 where a number is wrong.

1. The kernels against their mirrors on fresh random layers, bit for bit; on a GPU also from a captured graph.
2. Median and 99th percentile of each kernel, alone, and of a decode step's three launches in a captured graph.
3. Grouped GEMM at skewed loads, beside what the machine's measured constants said before it ran.
4. A copy on a stream of its own beside that GEMM: what each loses.
5. The layer without a host: against float64 on the CPU, forward and backward; from captured graphs, and its time.
6. poise.train with a world of one: against the CPU, memory against the allocator's count, a timeline of streams.

All predictions are made, and printed, before the first part runs. Parts stop where the seconds end, and say so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

if find_spec("highspy") is None:  # not to be had on every machine, and nothing here solves a programme
    sys.modules["highspy"] = MagicMock(Highs=object, kHighsInf=float("inf"))
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import gpu_layers  # noqa: E402
from tests.runtime.device.cases import Case, random_case  # noqa: E402
from tests.runtime.device.interpreted import NAMES, expected, run, tensor  # noqa: E402

from poise.cost.compute import expert_times  # noqa: E402
from poise.machine.cluster import Cluster  # noqa: E402
from poise.machine.model import ModelSpec  # noqa: E402
from poise.machine.settle import settle  # noqa: E402
from poise.runtime.device.planner import DeviceKernels  # noqa: E402

SIZES = [(experts, devices) for experts in (64, 128, 256, 512) for devices in (8, 32, 64, 256)]
HIDDEN, INTER, LOCAL = 4096, 1536, 32
"""Of the experts of a rank in part 3: Qwen3-235B's sizes, bf16."""
COPIED, BESIDE = 16, 16384
"""Part 4: experts that are copied, and tokens that are computed meanwhile."""


def layer(rng, experts: int, devices: int) -> Case:
    return random_case(
        rng, experts=experts, nodes=[8] * (devices // 8) or [devices], step_slots=2, most=4096, filled=0.0
    )


def correctness(rng, where: str, cases: int, seconds: float) -> dict[str, Any]:
    """Part 1."""
    began, done, wide = time.monotonic(), 0, 0
    for number in range(cases):
        if time.monotonic() - began > seconds:
            break
        large = where == "cuda" and number % 4 == 3
        case = layer(rng, *SIZES[number // 4 % len(SIZES)]) if large else random_case(rng, most=2000)
        source = int(rng.integers(len(case.load_SE)))
        want = expected(case, source)
        for blocks in ((64, 4), (16, 8)):
            got = run(case, source, blocks, where)
            for name, one, other in zip(NAMES, got, want, strict=False):
                if not np.array_equal(one, other):
                    return {"cases": done, "wrong": f"case {number} of {case.load_SE.shape}: {name} differs"}
        done, wide = done + 1, wide + large
    return {"cases": done, "wide": wide, "wrong": None, "asked": cases}


def captured(rng, where: str) -> dict[str, Any]:
    """Part 1, from a graph: captured with some counts, replayed with others, against the mirrors."""
    case, other = layer(rng, 128, 32), layer(rng, 128, 32)
    case = case._replace(load_SE=other.load_SE)
    kernels = DeviceKernels(case.table, case.price, max(1, case.pairs), where)
    load_SE, load_E = tensor(np.zeros_like(case.load_SE), where), tensor(np.zeros_like(case.load_E), where)
    step(kernels, load_SE, load_E)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan, row = step(kernels, load_SE, load_E)
    load_SE.copy_(tensor(case.load_SE, where))
    load_E.copy_(tensor(case.load_E, where))
    graph.replay()
    want = expected(case, 1)
    found = dict(zip(NAMES, want, strict=True))
    leave = bool(found["leave"][0])
    good = np.array_equal(plan.cpu().numpy(), found["left" if leave else "split"])
    return {"equal": bool(good and (leave or np.array_equal(row.cpu().numpy(), found["rows"])))}


def step(kernels: DeviceKernels, load_SE, load_E):
    """A decode step's three launches: one between steps, two after the gate."""
    slots, leave = kernels.prepare(load_E, kernels.expert_DS)
    plan = kernels.split(load_SE, slots, leave)
    return plan, kernels.rows(load_SE, plan, 1)


def microseconds(call, draws: int) -> list[float]:
    """Median and 99th percentile of single calls between events."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(draws)]
    for first, last in pairs:
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    times = [1e3 * first.elapsed_time(last) for first, last in pairs]
    return [float(each) for each in np.percentile(times, [50, 99])]


def timings(rng, seconds: float) -> list[dict[str, Any]]:
    """Part 2."""
    began, rows = time.monotonic(), []
    for experts, devices in SIZES:
        if time.monotonic() - began > seconds:
            break
        rows.append({"E": experts, "D": devices, **timed(layer(rng, experts, devices))})
    return rows


def timed(case: Case) -> dict[str, Any]:
    """Of one size: each kernel alone, the split also with slack, and the graph."""
    load_SE, load_E = tensor(case.load_SE, "cuda"), tensor(case.load_E, "cuda")
    row: dict[str, Any] = {}
    loose, kernels = (
        DeviceKernels(case.table, case.price, max(1, case.pairs), "cuda", slack=slack) for slack in (10, 0)
    )
    plan, _ = step(kernels, load_SE, load_E)
    slots, _ = kernels.prepare(load_E, kernels.expert_DS)
    for name, each in (("split", kernels), ("split_1%", loose)):
        row[name] = microseconds(lambda each=each: each.split(load_SE, slots, each.none), 100)
        row[f"{name}_rounds"] = int(each.status[2])
    row["rows"] = microseconds(lambda: kernels.rows(load_SE, plan, 1), 100)
    row["prepare"] = microseconds(lambda: kernels.prepare(load_E, kernels.expert_DS), 50)
    row["fill_turns"] = int(kernels.fill_status[3])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(kernels, load_SE, load_E)
    row["graph"] = microseconds(graph.replay, 100)
    return row


def predicted(rng, gpu: str) -> dict[str, Any]:
    """What parts 3, 4 and 5 are held against, by the machine's constants."""
    model = ModelSpec("experts", 1, (0,), LOCAL, 8, HIDDEN, INTER, kv_bytes_per_token_layer=2048.0)
    cluster = settle(Cluster.parse(f"1x1:{gpu}+vllm.bf16"), model, BESIDE)  # links, which one device does not have
    times = expert_times(cluster, model)

    def seconds(count) -> float:
        work = np.maximum(np.minimum(count, 1) * times.read_s, count * times.compute_s)
        return times.start_s + float((work + count * times.activation_s).sum())

    rows: list[dict[str, Any]] = []
    for tokens in (64, 512, 4096, 32768):
        for skew in (0.0, 1.0, 2.0):
            weight = np.exp(skew * rng.standard_normal(LOCAL))
            count = rng.multinomial(tokens, weight / weight.sum())
            rows.append({"tokens": tokens, "skew": skew, "count": count.tolist(), "predicted_us": 1e6 * seconds(count)})
    copied = 2 * COPIED * 3 * INTER * HIDDEN * 2  # read and written, bf16
    experts_s, copy_s = seconds(np.full(LOCAL, BESIDE // LOCAL)), copied / cluster.memory_bytes_per_s
    beside = {
        "experts_us": 1e6 * experts_s,
        "device_copy_us": 1e6 * copy_s,
        "device_both_us": 1e6 * max(experts_s, copy_s),
    }
    return {"grouped": rows, "overlap": beside, "layers": gpu_layers.predictions(gpu, rng)}


def grouped(rows: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Part 3."""
    up = torch.randn(LOCAL, 2 * INTER, HIDDEN, dtype=torch.bfloat16, device="cuda") * 0.02
    down = torch.randn(LOCAL, HIDDEN, INTER, dtype=torch.bfloat16, device="cuda") * 0.02
    began = time.monotonic()
    for row in rows:
        if time.monotonic() - began > seconds:
            break
        x = torch.randn(row["tokens"], HIDDEN, dtype=torch.bfloat16, device="cuda")
        ends = torch.tensor(np.cumsum(row["count"]), dtype=torch.int32, device="cuda")
        experts = experts_call(x, up, down, ends)
        row["measured_us"], row["p99_us"] = microseconds(experts, 50)
        row["error"] = row["predicted_us"] / row["measured_us"] - 1.0
        row["parity"] = parity(x, up, down, row["count"], experts())
    return rows


def experts_call(x, up, down, ends):
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def call():
        gate, value = grouped_mm(x, up.transpose(1, 2), offs=ends).chunk(2, dim=1)
        return grouped_mm(torch.nn.functional.silu(gate) * value, down.transpose(1, 2), offs=ends)

    return call


def parity(x, up, down, count, got) -> float:
    """Relative distance from float64 on the CPU, over the busiest expert."""
    expert = int(np.argmax(count))
    first = int(np.sum(count[:expert]))
    last = first + min(int(count[expert]), 64)
    gate, value = (x[first:last].double().cpu() @ up[expert].double().cpu().T).chunk(2, dim=1)
    want = (torch.nn.functional.silu(gate) * value) @ down[expert].double().cpu().T
    return float((got[first:last].double().cpu() - want).norm() / want.norm())


def overlap() -> dict[str, float]:
    """Part 4: microseconds of a copy and of experts, alone and beside each other."""
    up = torch.randn(LOCAL, 2 * INTER, HIDDEN, dtype=torch.bfloat16, device="cuda") * 0.02
    down = torch.randn(LOCAL, HIDDEN, INTER, dtype=torch.bfloat16, device="cuda") * 0.02
    x = torch.randn(BESIDE, HIDDEN, dtype=torch.bfloat16, device="cuda")
    experts = experts_call(
        x, up, down, torch.arange(1, LOCAL + 1, dtype=torch.int32, device="cuda") * (BESIDE // LOCAL)
    )
    source = torch.randn(COPIED, 3 * INTER, HIDDEN, dtype=torch.bfloat16, device="cuda")
    host, target, stream = source.cpu().pin_memory(), torch.empty_like(source), torch.cuda.Stream()
    out = {"experts_us": microseconds(experts, 50)[0]}
    for name, weights in (("device", source), ("host", host)):

        def copy(weights=weights):
            target.copy_(weights, non_blocking=True)

        def beside(copy=copy):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                copy()
            experts()

        def both(beside=beside):
            beside()
            torch.cuda.current_stream().wait_stream(stream)

        out[f"{name}_copy_us"] = microseconds(copy, 20)[0]
        out[f"{name}_experts_beside_us"] = microseconds(beside, 20)[0]
        out[f"{name}_both_us"] = microseconds(both, 20)[0]
        torch.cuda.synchronize()
    return out


def table(rows: list[dict[str, Any]], leave_out: tuple[str, ...] = ()) -> str:
    """Rows of the same keys as markdown."""
    keys = [key for key in rows[0] if key not in leave_out] if rows else []
    shown = [[" / ".join(f"{x:.1f}" for x in v) if isinstance(v, list) else f"{v:.4g}" if isinstance(v, float) else str(v)
              for v in (row.get(key, "not run") for key in keys)] for row in rows]  # fmt: skip
    lines = [
        "| " + " | ".join(keys) + " |",
        "|" + "---:|" * len(keys),
        *("| " + " | ".join(row) + " |" for row in shown),
    ]
    return "\n".join(lines)


def report(result: dict[str, Any], machine: str) -> str:
    """What is written and printed."""
    today = datetime.date.today().isoformat()
    parts = [f"# Kernels of the device\n\n{today}. {machine}."]
    right = result["correctness"]
    parts.append(f"**1. Against the mirrors, bit for bit**: {right['cases']} of {right.get('asked', '?')} random layers, wrong: {right['wrong'] or 'none'}.")  # fmt: skip
    if "timings" in result:
        parts.append(f"From a captured graph, with other counts than it was captured with: {'equal' if result['captured']['equal'] else 'WRONG'}.")  # fmt: skip
        parts.append(
            "**2. Microseconds, median / 99th percentile**; `graph`: prepare, split, rows.\n\n"
            + table(result["timings"])
        )
        parts.append("**3. Grouped GEMM**, predicted before it ran\n\n" + table(result["grouped"], ("count",)))
        said = {f"predicted {key}": value for key, value in result["predicted"]["overlap"].items()}
        parts.append("**4. A copy beside it**\n\n" + table([{**said, **result["overlap"]}]))
    else:
        parts.append(
            "Parts 2 to 4 were not run: there is no GPU here, and the interpreter's time says nothing. Parts 1, 5 and 6 ran at small sizes on "
            "a CPU, and so say that numbers are right, and nothing of time, memory order, graphs or streams."
        )
    layers, train = result["layers"], result["train"]
    parts.append(f"**5. The layer without a host** ({verdict(layers)}), relative distance from float64 on the CPU:\n\n" + table([layers.get("parity", {})]))  # fmt: skip
    if layers.get("sizes"):
        parts.append("`predicted_us`: the experts alone; what the graph takes more is planning, sorting and padding.\n\n" + table(layers["sizes"]))  # fmt: skip
    told = {key: value for key, value in train.items() if key not in ("streams", "right", "error", "seconds")}
    parts.append(f"**6. poise.train with a world of one** ({verdict(train)})\n\n" + table([told]))
    if gpu := train.get("streams"):
        parts.append(table(gpu))
    return "\n\n".join(parts) + "\n"


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Streams without how long they were busy."""
    return [{key: value for key, value in row.items() if not key.endswith("_us")} for row in rows]


def verdict(part: dict[str, Any]) -> str:
    return "right" if part.get("right") else f"WRONG{': ' + part['error'] if 'error' in part else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--cases", type=int, help="of part 1; default: 400 on a GPU, 8 in the interpreter")
    parser.add_argument("--gpu", default="h200", help="whose measured constants predict part 3")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        print("no GPU: TRITON_INTERPRET=1 runs part 1 on this CPU", file=sys.stderr)
        return 2
    where = "cpu" if interpreted else "cuda"
    seed = time.time_ns() % 2**32
    rng, limit = np.random.default_rng(seed), options.seconds
    name = "Triton's interpreter" if interpreted else torch.cuda.get_device_name()
    triton = sys.modules["triton"].__version__
    machine = f"{name}, seed {seed}, Python {platform.python_version()}, torch {torch.__version__}, triton {triton}"
    cases = options.cases or (8 if interpreted else 400)
    result: dict[str, Any] = {"machine": machine}
    if not interpreted:  # figures of a GPU, even if only said beforehand, stand beside what one measured
        result["predicted"] = predicted(rng, options.gpu)
        print(json.dumps(result), flush=True)
    result["correctness"] = correctness(rng, where, cases, 0.3 * limit)
    good = result["correctness"]["wrong"] is None and result["correctness"]["cases"] > 0
    if not interpreted:
        result["captured"] = captured(rng, where)
        good = good and result["captured"]["equal"]
    rows = result.get("predicted", {}).get("layers", [])
    result["layers"] = gpu_layers.tried(gpu_layers.hostless, rng, where, rows, microseconds)
    result["train"] = gpu_layers.tried(gpu_layers.trained, rng, where)
    if interpreted and "streams" in result["train"]:
        result["train"]["streams"] = timeless(result["train"]["streams"])
    good = good and result["layers"]["right"] and result["train"]["right"]
    if not interpreted:
        result["timings"] = timings(rng, 0.25 * limit)
        result["grouped"] = grouped(result["predicted"]["grouped"], 0.1 * limit)
        result["overlap"] = overlap()
    text = report(result, machine)
    print(text)
    if not options.no_report:
        path = ROOT / "benchmarks" / "reports" / f"{datetime.date.today().isoformat()}-gpu"
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
