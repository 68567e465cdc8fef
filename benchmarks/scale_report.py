"""The report of benchmarks/scale.py: tables, plots and words. No result stands in the words."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import numpy as np
from common import REPORTS, table
from pictures import line_chart, save
from scale_cases import DECODE, DRIFT, EFFORT, PREFILL, SEED, WARM_UP, Case, Phase
from scale_rows import FAST, FAST_TO, MODELS, MOETUNER_TO, TUNED_TO, WORK, Row

from poise.cost.weights import PLAN_SECONDS_BASE, PLAN_SECONDS_PER_PAIR

Key = tuple[str, str, int]
Found = dict[Key, tuple[str, list[Row]]]
Series = dict[str, list[tuple[float, float]]]
NAMES = {"deepseek-v3": "DeepSeek-V3", "kimi-k2": "Kimi-K2 (synthetic loads)"}
SHOWN = ("split", "hecate", "ultra-ep", "moon-ep", "poise")
CURVE_DEVICES, CURVE_TOKENS = (64, 256, 1024), (16, 64, 256, 1024, 4096, 16384)
HEAD = ["policy", "ms a layer", "static / it", "planning free", "planning as here", "compute", "exchange", "weights",
        "control", "efficiency", "max / mean", "sets the layer", "lost to lag", "same device", "plan ahead ms", "/ layer",
        "plan after gate ms", "/ layer", "setting"]  # fmt: skip


def find(rows: list[Row], name: str) -> Row | None:
    """The row of that name."""
    return next((row for row in rows if row.name == name), None)


def must(found: Found, key: Key) -> Row:
    """The best static row."""
    best, rows = found[key]
    return next(row for row in rows if row.name == best)


def cells(row: Row, base: float) -> list[object]:
    """A row of the long tables."""
    ms = {key: f"{1e3 * value:.3f}" for key, value in row.cost.items()}
    fast = row.name.startswith("+")
    return [row.name, f"{1e3 * row.seconds:.3f}", f"{base / row.seconds:.2f}",
            f"{base / row.planned_free:.2f}" if row.cost["planning"] else "",
            f"{base / row.planned_here:.2f}" if row.cost["planning"] else "", ms["compute"], ms["exchange"], ms["weights"],
            f"{1e3 * (row.cost['control'] + row.cost['planning']):.3f}", f"{row.efficiency:.2f}", f"{row.imbalance:.2f}",
            row.sets, f"{row.lost:.0%}", f"{row.same:.0%}", f"{1e3 * row.before_s:.2f}", f"{row.before_s / row.seconds:.2g}",
            f"{1e3 * row.after_s:.2f}" if fast else "", f"{row.after_s / row.seconds:.2g}" if fast else "", row.setting]  # fmt: skip


def speedups(found: Found, model: str, phase: str, names: Iterable[str]) -> Series:
    """Best static time / policy time by devices."""
    out: Series = {}
    for (m, p, devices), (best, rows) in found.items():
        base = find(rows, best)
        for name in names:
            row = find(rows, f"+ {name}")
            if (m, p) == (model, phase) and base and row:
                out.setdefault(name, []).append((devices, base.seconds / row.seconds))
    return out


def summary_table(found: Found, model: str, phase: str) -> str:
    """Milliseconds of the maps and speedup of the policies, by devices."""
    keys = [key for key in found if key[:2] == (model, phase)]
    names = list(dict.fromkeys(row.name for key in keys for row in found[key][1]))
    lines: list[list[object]] = []
    for name in names:
        line: list[object] = [name]
        for key in keys:
            best, rows = found[key]
            row, base = find(rows, name), find(rows, best)
            assert base
            if row is None:
                line.append("not run")
            elif name.startswith("+"):
                line.append(f"{base.seconds / row.seconds:.2f}")
            else:
                line.append(f"**{1e3 * row.seconds:.2f}**" if name == best else f"{1e3 * row.seconds:.2f}")
        lines.append(line)
    return table(["row", *(str(key[2]) for key in keys)], lines)


def lag_table(found: Found) -> str:
    """Who lags under the best static map and under the best policy over it."""
    lines: list[list[object]] = []
    for (model, phase, devices), (best, rows) in found.items():
        base = find(rows, best)
        fast = min((row for row in rows if row.name.startswith("+")), key=lambda row: row.seconds)
        assert base
        lines.append([f"{model} {phase}", devices, best, base.sets, f"{base.lost:.0%}", f"{base.same:.0%}",
                      f"{base.imbalance:.2f}", fast.name, f"{base.seconds / fast.seconds:.2f}", fast.sets,
                      f"{fast.lost:.0%}", f"{fast.imbalance:.2f}"])  # fmt: skip
    return table(["case", "devices", "best static", "sets the layer", "lost to lag", "same device", "max / mean",
                  "fastest policy", "static / it", "sets the layer", "lost to lag", "max / mean"], lines)  # fmt: skip


def pays_from(points: list[tuple[float, float]]) -> str:
    """Least size from which on it gains 1 % at every larger one."""
    good = [y >= 1.01 for _, y in points]
    steady = [x for i, (x, _) in enumerate(points) if all(good[i:])]
    return f"{steady[0]:g}" if steady else "not steadily" if any(good) else "never"


def curve_table(curves: dict[int, Series]) -> str:
    """A line for each number of devices and policy."""
    lines: list[list[object]] = []
    for devices, series in curves.items():
        for name, points in series.items():
            lines.append([devices, name, *(f"{y:.2f}" for _, y in points), pays_from(points)])
    return table(["devices", "policy", *(str(x) for x in CURVE_TOKENS), "pays from"], lines)


def planning_table(found: Found, phase: str) -> str:
    """Milliseconds of planning a layer by devices, DeepSeek-V3."""
    keys = [key for key in found if key[:2] == (MODELS[0], phase)]
    charged = [PLAN_SECONDS_BASE + PLAN_SECONDS_PER_PAIR * 256 * key[2] for key in keys]
    lines: list[list[object]] = [["the layer itself, best static map", *(f"{1e3 * must(found, key).seconds:.2f}" for key in keys)],
                                 ["charged after the gate by the model", *(f"{1e3 * s:.2f}" for s in charged)]]  # fmt: skip
    for name in FAST:
        rows = [find(found[key][1], f"+ {name}") for key in keys]
        lines.append([f"{name}, after the gate", *(f"{1e3 * row.after_s:.2f}" if row else "not run" for row in rows)])
        if name in ("hecate", "poise"):
            said = [f"{1e3 * row.before_s:.1f} ({1e3 * row.worst_s:.0f})" if row else "not run" for row in rows]
            lines.append([f"{name}, ahead, mean (worst)", *said])
    for name in ("lpt", "eplb-global", "poise"):
        rows = [find(found[key][1], name) for key in keys]
        lines.append([f"static {name}, once", *(f"{1e3 * row.before_s:.1f}" if row else "not run" for row in rows)])
    return table(["ms a layer", *(str(key[2]) for key in keys)], lines)


def planning_chart(found: Found) -> Series:
    """log10 of (planning seconds / layer seconds) by devices, DeepSeek-V3 prefill."""
    out: Series = {}
    for (model, phase, devices), (_, rows) in found.items():
        for name in ("split", "llep", "ultra-ep", "moon-ep", "poise"):
            row = find(rows, f"+ {name}")
            if row and (model, phase) == (MODELS[0], "prefill"):
                share = (row.before_s + row.after_s) / row.seconds
                out.setdefault(name, []).append((devices, float(np.log10(share))))
    return out


def plot(name: str, series: Series, x_label: str, y_label: str) -> str:
    """Writes a plot; its markdown."""
    path = REPORTS / f"{datetime.date.today().isoformat()}-scale-{name}.svg"
    save(path, line_chart(series, x_label, y_label))
    return f"![{y_label}]({path.name})"


def slot_words() -> str:
    """The slot rule, spelt out."""
    slots = {model: [int(Case(model, d, PREFILL).slots_D[0]) for d in EFFORT] for model in MODELS}
    return "; ".join(f"{NAMES[model].split(' ')[0]} {', '.join(map(str, counts))}" for model, counts in slots.items())


def phase_words(phase: Phase) -> str:
    return f"{phase.name}: {phase.tokens} tokens a device, fitted on {' and '.join(phase.fit)}, judged on {phase.judge}"


CAVEAT = """\
**On paper only.** Every number is modelled. The model has been measured on emulated machines of up to 8 ranks (the reports `measured_*`), never at these sizes; kernels and ports have constants that others measured on H100s (docs/calibrate.md), flows are `home` (no deduplication),
the drift from step to step is assumed, and Kimi-K2's loads are synthetic. Read ratios, not milliseconds; only planning
seconds are measured, on this CPU, in processor seconds of a machine that others use too. Few layers and steps are judged at the large sizes: differences of 5 % mean nothing.

What was found: docs/log.md."""
SPEED = (
    "Static rows: modelled ms a layer (bold: the least under the even split; the policies run over that map). Policies (+): "
    "that map's time / the policy's; above 1 it pays. Static rows with the exact split pay no control time: what a split "
    "that costs nothing would do."
)
LAG = (
    "Sets the layer: the largest of compute, exchange (the port class of its fullest device), latency, exposed weights, "
    "control and planning, and its share of the layer. Lost to lag: what of the layer the fullest device's compute and port "
    "take beyond the mean device's. Same device: how often one device is the fullest of both."
)
BREAK_EVEN = (
    "DeepSeek-V3, decode loads, one layer, EPLB's map; its time under the even split / the policy's. Pays from: tokens a "
    "device from which on it gains 1 % or more. `poise` was not run at 1024 (planning)."
)
PLANNING = (
    "Processor time on this CPU, one core, judged steps; Python around compiled kernels. After the gate: on the critical path, "
    "every layer; the model charges the same 10 us + 14 ns x E x D to every policy that needs exact loads (Hecate needs "
    "none). Ahead: before the gate and in the background, not charged at all: hidden only where it takes less than the "
    "layer; the worst is over all steps, warm-up included. Hecate and LPLB build the rows of all sources up to 256 devices "
    "(a rank needs one), beyond that quotas only."
)
SLOTS = (
    "DeepSeek-V3, EPLB's map, two layers: the slot rule, one and two slots a device more. A slot more a device is 44 MB a "
    "layer, 2.6 GB over 58 layers, taken from the key/value cache. `poise` keeps its step replicas, so its M = 1 costs as much; "
    "UltraEP, LLEP and MoonEP share one buffer among the layers. The exact columns pay no control time."
)
DEDUP = (
    "DeepSeek-V3 decode, one layer, two judged steps of synthetic tokens: Gumbel scores on the log shares, the 4 of 8 groups "
    "with the best two experts, the top 8 of those; homes in turn. "
    "Policies (M = 1): static time / theirs. Under `home_node_dedup` copies land on the device with the sender's index, so "
    "the network lags by node, not by device."
)
DRIFTS = (
    "DeepSeek-V3 prefill, one layer, EPLB's map; the standard deviation of the logarithm of an expert's popularity about its "
    "workload's share."
)
PLANNED = (
    "DeepSeek-V3 prefill, both fitted workloads, counted work (30 units are a nominal second): the same plan on every machine. "
    "Processor seconds of one core, wall seconds on a machine that others use. Gap: to the bound per term. Judged on another workload, two steps."
)
ROWS = (
    "Milliseconds, means over the judged steps and layers. Static / it: as charged; planning free: the exact policies' counts "
    "are exchanged but planning takes no time; planning as here: with the seconds measured after the gate. Exchange without "
    "latency (2 x 40 us). Plan ahead: static maps, once; policies, every step. Setting: best of the published grid."
)


def machines() -> str:
    """Kernels and links that the cases get."""
    return ", ".join(dict.fromkeys(Case(MODELS[0], 64, phase).cluster.name for phase in (PREFILL, DECODE)))


def how() -> str:
    """Traffic, machines and effort, spelt out."""
    effort = ", ".join(f"{d} devices {layers} and {steps}" for d, (layers, steps) in EFFORT.items())
    return "\n".join([
        f"- Loads: DeepSeek-R1's recorded counts. {phase_words(PREFILL)}; {phase_words(DECODE)}. A map is fitted on the workloads' shares "
        "scaled to a step, one scenario each.",
        f"- Kimi-K2: synthetic. Per layer the 256 experts are sorted by mean share over the five workloads; that curve is read at "
        "384 equally spaced quantiles (log-linear); each new expert takes the workload / mean ratios of the recorded expert "
        f"nearest in rank, so the drift between workloads is kept; renumbered at random (seed {SEED}).",
        f"- Steps: share x exp({DRIFT} z), z a standard normal AR(1) with 0.97 a step, at most 1/8; then a multinomial draw of "
        f"D x tokens x 8 pairs (seeds {SEED}, {SEED + 1}). The drift is an assumption: no step-level counts of these models are public.",
        "- Only loads are known, so traffic is `home` (a copy for each token and expert), homes spread evenly.",
        f"- Machines: N x 8 H100 as measured (`poise.machine.settle`): {machines()}; start-up is the same at every size.",
        f"- Slots a device: the fewest, the same on all devices, that leave an eighth of the experts redundant, as DeepSeek's 32 of 256. For "
        f"{', '.join(map(str, EFFORT))} devices: {slot_words()}. From 512 devices on: one expert a device, as in DeepSeek's "
        "decoding with EP320; at 2048 an expert has 8 (5.3) copies on average.",
        f"- Judged layers (spread over the 58 recorded) and steps: {effort}; {WARM_UP} steps of warm-up.",
        f"- Step-wise policies: M = 1 or 2 step slots (1 above 512 devices; poise above 128), best of each published grid on two "
        f"judged steps of one layer, chosen anew for every case up to {TUNED_TO} devices, beyond that as at {TUNED_TO}. Tuned and chosen on judged traffic, which favours "
        "the rivals; so is the best static map.",
        f"- Not run: MoETuner's ILPs above {MOETUNER_TO} devices (clusters of one expert) and on the synthetic loads; poise's fast loop above "
        f"{FAST_TO[DECODE]} (decode) and {FAST_TO[PREFILL]} (prefill): planning ahead takes seconds a layer, and at 2048 the plans it compares "
        "would not fit into memory (4 GB); `poise-near`, which plans beside the steps and wants hundreds of them (benchmarks/planners2.py).",
        f"- poise's maps of rows have {WORK:g} units of work a layer, a nominal second; those of planning times what `--work` says in all.",
        "- EPLB is hierarchical where groups or experts divide by nodes: DeepSeek-V3 (8 groups) on 64 devices only.",
    ])  # fmt: skip


def text(found: Found, curves: dict[int, Series], tables: dict[str, str], plots: dict[str, str]) -> list[str]:
    """The report."""
    out = [CAVEAT]
    if found:
        out += ["## Speed by devices", SPEED]
        for model, phase in dict.fromkeys(key[:2] for key in found):
            out += [f"### {NAMES[model]}, {phase}", summary_table(found, model, phase)]
        out += [plots["prefill"], plots["decode"], "## Who is the straggler", LAG, lag_table(found)]
    if curves:
        out += ["## Where policies stop paying", BREAK_EVEN, curve_table(curves)]
        out += [plots[f"tokens-{d}"] for d in curves]
    if "planning" in tables:
        out += ["## Planned whole", PLANNED, tables["planning"]]
    if found:
        out += ["## Planning", PLANNING, "### Prefill", planning_table(found, "prefill"), "### Decode",
                planning_table(found, "decode"), plots["planning"]]  # fmt: skip
    for name, head, words in (("slots", "More slots instead", SLOTS), ("drift", "How much hangs on the drift", DRIFTS),
                              ("dedup", "Deduplicating flows", DEDUP)):  # fmt: skip
        if name in tables:
            out += [f"## {head}", words, tables[name]]
    out += ["## How", how()]
    if found:
        out += ["## Every row", ROWS]
    for key, (_, rows) in found.items():
        base = must(found, key).seconds
        out += [f"### {NAMES[key[0]]}, {key[1]}, {key[2]} devices", table(HEAD, [cells(row, base) for row in rows])]
    return out


def draw(found: Found, curves: dict[int, Series]) -> dict[str, str]:
    """All plots, by name."""
    out = {}
    for phase in ("prefill", "decode") if found else ():
        series = speedups(found, MODELS[0], phase, SHOWN)
        out[phase] = plot(phase, series, "devices", f"DeepSeek-V3 {phase}: best static map's time / policy's")
    for devices, lines in curves.items():
        series = {name: lines[name] for name in SHOWN if name in lines}
        out[f"tokens-{devices}"] = plot(f"tokens-{devices}", series, "tokens a device",
                                        f"DeepSeek-V3, {devices} devices: static time / policy's")  # fmt: skip
    if found:
        label = "log10 of planning time / layer time, DeepSeek-V3 prefill"
        out["planning"] = plot("planning", planning_chart(found), "devices", label)
    return out
