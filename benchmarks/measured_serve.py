"""Serving measured on emulated clusters: placements and fast loops run, beside what the cost model says of each.

    python benchmarks/measured_serve.py DATA [--repeats 20] [--scenes llama-1x8,...]

Needs root, ip and tc (docs/emulation.md). Link rates are chosen so that the contiguous placement spends the published
35.7 % of its time in all-to-alls (modelled); constants of the model come from `poise calibrate` on the same links.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from common import REPORTS, table, write
from measured import Emulation, by_term, calibration, parser, part_events, workplace, write_curve
from pictures import bar_chart, save

from poise.api import deal_slots
from poise.cost.exchange import ExchangeModel
from poise.cost.step import BatchCost, batch_cost
from poise.cost.traffic import DataFlow
from poise.lab.emulate import EmulatedCluster
from poise.machine.cluster import Cluster
from poise.machine.curve import MeasuredCurve
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import solve
from poise.replay.serving import WARM_UP, FastLoop, replay_steps
from poise.replay.static import replay
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.files import join, read
from poise.routing.synthetic import zipf_trace
from poise.routing.trace import RoutingTrace
from poise.simulate.perfetto import Event, write_perfetto
from poise.simulate.serving import ServingMark, serve_step, served_work
from poise.stepwise.registry import parse_policy

WORK = 240.0
"""Units of work a placement, eight nominal seconds: a busy machine plans the same."""
STEP_SLOTS = 2
"""Slots a device that the fast loop may fill in a step, as in the other tables."""
SHARE = 0.357
"""All-to-all's part of end-to-end time under the contiguous placement (MoETuner, arXiv 2502.06643)."""
WIDTH = 512
FLOOR_TOKENS = 9
"""Rows below which reading an expert's weights takes longer than its arithmetic. A row stands for 32 tokens, so that 512
rows are prefill with 16,384 tokens a GPU; an H100 reads weights in the time of 295 tokens."""
EXPERT_ROWS = 768
"""Bytes of an expert over bytes of a row: Llama-4's (252 MB, 10 KB) with 32 tokens a row."""


@dataclass(frozen=True)
class Scene:
    """One cluster, one traffic, one data flow.

    ``unit_s``: seconds of attention, and of a mean device's experts, in one layer. ``startup_s``: start-up of an exchange
    that is allowed for when links are chosen. ``ratio``: a device's port into its node over its network port (450 GB/s
    NVLink and 800 Gb/s network). ``rows``: name, method, redundant experts a GPU, fast loop.
    """

    name: str
    nodes: int
    devices: int
    traffic: DataFlow
    tokens_per_device: int
    num_layers: int
    steps: int
    rows: tuple[tuple[str, str, int, str], ...]
    unit_s: float = 0.12
    startup_s: float = 0.008
    ratio: float = 4.5
    in_sample: bool = False

    @property
    def world(self) -> int:
        """D."""
        return self.nodes * self.devices


FULL = (  # as published, ILP 1 leaves ILP 2 no equal memory over so few layers
    ("contiguous", "contiguous", 0, ""),
    ("EPLB, 1 redundant a GPU", "eplb", 1, ""),
    ("MoETuner, equal sizes", "moetuner-equal", 0, ""),
    ("poise static, no redundant", "poise", 0, ""),
    ("poise static, 1 redundant a GPU", "poise", 1, ""),
    ("poise + fast loop", "poise", 1, "poise"),
)
PAPER = (
    ("contiguous", "contiguous", 0, ""),
    ("MoETuner", "moetuner", 0, ""),
    ("poise static, equal slots", "poise", 0, ""),
    ("poise static, 1 redundant a GPU", "poise", 1, ""),
)
SHIFT = FULL[:2] + FULL[4:]
SCENES = {
    "llama-1x8": Scene("llama-1x8", 1, 8, "home", 512, 2, 4, FULL),
    "llama-2x4": Scene("llama-2x4", 2, 4, "home", 512, 2, 4, FULL),
    "llama-4x4": Scene("llama-4x4", 4, 4, "home", 256, 2, 4, FULL, startup_s=0.025),
    "llama-2x4-shift": Scene("llama-2x4-shift", 2, 4, "home", 512, 2, 4, SHIFT),
    "olmoe-2x4-stay": Scene("olmoe-2x4-stay", 2, 4, "stay", 512, 3, 2, FULL[:1] + FULL[2:5], unit_s=0.24),
    "paper-1x4": Scene("paper-1x4", 1, 4, "home", 512, 4, 3, PAPER, unit_s=0.06, startup_s=0.004, in_sample=True),
    "paper-2x2": Scene("paper-2x2", 2, 2, "home", 512, 4, 3, PAPER, unit_s=0.06, startup_s=0.004, in_sample=True),
}


def traces(scene: Scene, data: Path) -> tuple[RoutingTrace, RoutingTrace, str]:
    """What placements are fitted on, what they are judged on, and both in words."""
    if scene.name.startswith("llama"):
        folder = data / "llama4-maverick"
        one, other = read(folder / "abstract_algebra.npz"), read(folder / "anatomy.npz")
        assert isinstance(one, RoutingTrace) and isinstance(other, RoutingTrace)
        fit, judge = one, other
        words = "Llama-4 Maverick, top-1 of 128: fitted on one MMLU subject, judged on another"
        if not scene.name.endswith("shift"):
            halves = list(zip(one.split_requests(), other.split_requests(), strict=True))
            fit, judge = join(halves[0]), join(halves[1])
            words = (
                "Llama-4 Maverick, top-1 of 128: fitted on half of the requests of two subjects, judged on the others"
            )
    elif scene.name.startswith("olmoe"):
        fit, judge = read(Path(str(files("poise") / "data" / "demo_trace.npz"))).split_requests()
        words = (
            "the small OLMoE trained for the demo, top-4 of 32: fitted on half of the requests, judged on the others"
        )
    else:
        fit = judge = zipf_trace(num_tokens=40_000, num_layers=8, num_experts=8, top_k=2, exponent=0.7, stickiness=0.5)
        words = "synthetic, top-2 of 8 experts, Zipf 0.7, half of the tokens follow a partner: in sample, as the paper's maps"
    assert isinstance(fit, RoutingTrace) and isinstance(judge, RoutingTrace)
    return fit, judge, words


def batch_of(trace: RoutingTrace, scene: Scene, steps: int, seed: int) -> RoutingBatch:
    """Steps of equally many tokens a device; layers spread over the model (neighbours under ``stay``)."""
    whole = make_batch(trace, tokens_per_step=scene.tokens_per_device * scene.world, steps=steps, seed=seed)
    assert whole.experts_TLK is not None
    layers = np.linspace(0, whole.num_layers - 1, scene.num_layers).round().astype(int)
    if scene.traffic == "stay":
        layers = np.arange(2, 2 + scene.num_layers)
    home = np.arange(len(whole.experts_TLK)) % scene.world
    return replace(whole, load_BLE=whole.load_BLE[:, layers].copy(), experts_TLK=whole.experts_TLK[:, layers].copy(),
                   layer_ids_L=whole.layer_ids_L[layers].copy(), home_T=home.astype(np.int32))  # fmt: skip


def model_of(batch: RoutingBatch) -> ModelSpec:
    """Sizes whose bytes are those of the run: rows of 512 16-bit numbers, and on the way there ids and weights."""
    along = (4.0 + 4.0) * batch.top_k
    if batch.top_k == 1:
        along = 8.0
    inner = EXPERT_ROWS // 2
    ids = tuple(int(i) for i in batch.layer_ids_L)
    return ModelSpec("replayed", max(ids) + 1, ids, batch.num_experts, batch.top_k, WIDTH, inner, 2, 2.0,
                     2.0 + along / WIDTH, 2.0, 512.0)  # fmt: skip


def curve_knots(batch: RoutingBatch, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The device clock's curve: a roofline in tokens, and seconds, so that a mean device takes a unit."""
    per_token = scene.unit_s / (scene.tokens_per_device * batch.top_k)
    tokens = np.array([1.0, FLOOR_TOKENS, 8 * FLOOR_TOKENS, 64 * FLOOR_TOKENS, 256 * FLOOR_TOKENS])
    return tokens, np.maximum(tokens, FLOOR_TOKENS) * per_token


def links(scene: Scene, batch: RoutingBatch, model: ModelSpec, curve: MeasuredCurve, placement: Placement) -> Cluster:
    """The cluster on which the contiguous placement spends SHARE of its time in all-to-alls."""
    shape = Cluster.uniform(scene.nodes, scene.devices)
    base = replace(shape, intra_bytes_per_s=scene.ratio if scene.nodes > 1 else 1.0, inter_bytes_per_s=1.0,
                   intra_latency_s=0.0, inter_latency_s=0.0, expert_curve=curve, name=scene.name)  # fmt: skip
    cost = batch_cost(batch, placement.count_LED(), base, model, traffic=scene.traffic, split="even")
    bytes_ = float((cost.dispatch_BL + cost.combine_BL + cost.kv_BL).sum(axis=1).mean())
    seconds = float(cost.compute_BL.sum(axis=1).mean()) + scene.num_layers * scene.unit_s
    startup = 2 * scene.num_layers * scene.startup_s
    rate = bytes_ / (SHARE / (1 - SHARE) * seconds - startup)
    return replace(base, intra_bytes_per_s=base.intra_bytes_per_s * rate, inter_bytes_per_s=rate)


def plan_rows(scene: Scene, fit: RoutingBatch, cluster: Cluster, model: ModelSpec) -> list[Placement]:
    """A placement for each row."""
    out: dict[tuple[str, int], Placement] = {}
    for _, method, redundant, _ in scene.rows:
        if (method, redundant) in out:
            continue
        slots = deal_slots(fit.num_experts, redundant * scene.world, scene.world)
        case = PlacementProblem(fit, cluster, model, slots, scene.traffic, "even", method == "moetuner")
        out[method, redundant] = solve(case, method=method, work=WORK).placement
    return [out[method, redundant] for _, method, redundant, _ in scene.rows]


@dataclass
class Predicted:
    """What planners see (terms of a step, added up), and the run simulated rank by rank.

    ``marks`` float64 [1, steps, L, D, 6]; ``tokens`` int64 [steps, L, D], pairs that each rank computes.
    """

    cost: BatchCost
    marks: np.ndarray
    tokens: np.ndarray


def predict(scene: Scene, row: tuple[str, str, int, str], placement: Placement, batch: RoutingBatch, cluster: Cluster,
            model: ModelSpec, prior: np.ndarray, exchange: ExchangeModel, counts_s: float) -> Predicted:  # fmt: skip
    fast = row[3]
    loop = FastLoop(parse_policy(fast), STEP_SLOTS, window_s=scene.unit_s) if fast else None
    if loop is not None:
        cost = replay_steps(batch, placement, loop, cluster, model, traffic=scene.traffic, prior_LE=prior).cost
    else:
        judged = batch.steps_from(WARM_UP)
        cost = replay(judged, placement, cluster, model, traffic=scene.traffic, split="even").cost
    work = served_work(batch, placement, cluster, model, traffic=scene.traffic, loop=loop, prior_LE=prior)
    marks = [serve_step(layers, cluster.node_D, exchange, window_s=scene.unit_s, counts_s=counts_s)
             for layers in work[WARM_UP:]]  # fmt: skip
    tokens = np.array([[layer.tokens_D for layer in layers] for layers in work[WARM_UP:]])
    return Predicted(cost, np.stack(marks)[None], tokens)


def measure(scene: Scene, data: Path, repeats: int, folder: Path) -> dict[str, Any]:
    """Plan, calibrate, run and predict one scene."""
    fit_trace, judge_trace, words = traces(scene, data)
    steps = WARM_UP + scene.steps
    fit = batch_of(fit_trace, scene, steps, seed=1)
    batch = batch_of(judge_trace, scene, steps, seed=1 if scene.in_sample else 2)
    model = model_of(batch)
    tokens, seconds = curve_knots(batch, scene)
    curve = MeasuredCurve(tokens, seconds, model.expert_parameters)
    contiguous = plan_rows(replace(scene, rows=scene.rows[:1]), fit, Cluster.uniform(scene.nodes, scene.devices), model)
    stated = links(scene, batch.steps_from(WARM_UP), model, curve, contiguous[0])
    spec = EmulatedCluster(scene.nodes, scene.devices, stated.intra_bytes_per_s,
                           stated.inter_bytes_per_s if scene.nodes > 1 else None)  # fmt: skip
    emulation = Emulation(spec, folder, folder / "curve.csv")
    write_curve(emulation.curve, list(tokens), list(seconds))
    emulation.calibrate(model.hidden_size, model.expert_intermediate_size, 150.0)
    cluster, exchange, constants = calibration(folder)
    made = sorted(folder.glob("row*.npz"), key=lambda path: int(path.stem[3:]))
    placements = [Placement.load(path) for path in made] or plan_rows(scene, fit, cluster, model)
    prior = fit.load_LE()
    job = {
        "cluster": str(folder / "cluster.yaml"), "traffic": scene.traffic, "width": WIDTH, "model": asdict(model),
        "expert_bytes": int(model.expert_bytes), "curve": str(emulation.curve), "window_s": scene.unit_s, "repeats": repeats,
        "tokens": scene.tokens_per_device * scene.world, "warm_up": WARM_UP, "steps": scene.steps, "prior": prior.tolist(),
        "kv_bytes": int(model.kv_bytes_per_token_layer), "rows": [],
    }  # fmt: skip
    for index, (row, placement) in enumerate(zip(scene.rows, placements, strict=True)):
        path = folder / f"row{index}.npz"
        placement.save(path)
        job["rows"].append({"name": row[0], "placement": str(path), "fast": row[3], "step_slots": STEP_SLOTS})
    arrays = {"experts": batch.experts_TLK, "home": batch.home_T, "start": batch.start_B}
    got = emulation.measure("serve_rank.py", job, arrays, timeout=3600, again=False)
    if not got["shaped"]:
        raise SystemExit("the links were not shaped: nothing was measured (root, ip and tc are needed)")
    counts_s = constants["exchange"]["counts_s"]
    return {"scene": scene, "words": words, "marks": got["marks"], "tokens": got["tokens"],
            "overruns": int(got["overruns"].sum()), "stated": stated, "cluster": cluster,
            "predicted": [predict(scene, row, placement, batch, cluster, model, prior, exchange, counts_s)
                          for row, placement in zip(scene.rows, placements, strict=True)]}  # fmt: skip


def terms(marks: np.ndarray) -> dict[str, np.ndarray]:
    """Seconds of each term from marks [repeats, steps, layers, devices, 6]: ends of the last device, one after the other.

    A term lasts from when the last device is done with the one before until the last one is done with it; so terms add up
    to the step, [repeats, steps]. ``waiting_*`` count what single devices spent in all-to-alls, waiting included.
    """
    last, at = marks.max(axis=3), ServingMark
    own = marks[..., at.DISPATCHED] - marks[..., at.PLANNED] + marks[..., at.COMBINED] - marks[..., at.COMPUTED]
    compute = marks[..., at.COMPUTED] - marks[..., at.DISPATCHED]
    parts = by_term(last, ("attention", "weights", "exchange", "compute", "exchange"))
    return {
        **{name: seconds.sum(axis=2) for name, seconds in parts.items()},
        "step": last[:, :, -1, at.COMBINED] - marks[:, :, 0, :, at.START].min(axis=2),
        "exchange_tail": own.max(axis=3).sum(axis=2),
        "exchange_mean": own.mean(axis=3).sum(axis=2),
        "compute_tail": compute.max(axis=3).sum(axis=2),
        "compute_mean": compute.mean(axis=3).sum(axis=2),
    }


def planners_step(predicted: Predicted, layers: int, unit_s: float) -> np.ndarray:
    """Seconds of each step as planners see them."""
    out: np.ndarray = predicted.cost.seconds_BL.sum(axis=1) + layers * unit_s
    return out


def report(found: dict[str, Any]) -> str:
    """The tables of one scene."""
    scene, marks = found["scene"], found["marks"]
    layers = marks.shape[3]
    head = [
        "placement",
        "step, s",
        "spread",
        "p99",
        "speed",
        "all-to-all",
        "tail",
        "average",
        "compute tail",
        "average",
    ]
    error_head = ["placement", "same tokens", "step measured", "simulated", "error", "all-to-all measured", "simulated", "error",
                  "compute (slept) measured", "simulated", "error", "weights, control measured", "simulated",
                  "worst step's error", "terms added up: step", "error"]  # fmt: skip
    rows, errors, bars = [], [], {}
    first = None
    for index, (name, *_) in enumerate(scene.rows):
        got = {
            key: np.median(value, axis=0) for key, value in terms(marks[index]).items()
        }  # medians of repeats, [steps]
        whole = terms(marks[index])["step"]
        first = first or {key: value.mean() for key, value in got.items()}
        speeds = terms(marks[0])["step"].mean(axis=1) / whole.mean(axis=1)
        spread = np.percentile(whole / np.median(whole, axis=0), [5, 95])
        rows.append([name, f"{got['step'].mean():.3f}", f"{spread[0] - 1:+.1%} {spread[1] - 1:+.1%}",
                     f"{np.percentile(got['step'], 99):.3f}", f"{np.median(speeds):.3f}",
                     f"{got['exchange'].mean() / got['step'].mean():.1%}",
                     *(f"{got[key].mean() / first[key] - 1:+.1%}"
                       for key in ("exchange_tail", "exchange_mean", "compute_tail", "compute_mean"))])  # fmt: skip
        want = {key: value[0] for key, value in terms(found["predicted"][index].marks).items()}
        plain = planners_step(found["predicted"][index], layers, scene.unit_s).mean()
        same = (found["tokens"][index] == found["predicted"][index].tokens).all()
        line: list[object] = [name, "yes" if same else "NO"]
        for key in ("step", "exchange", "compute"):
            line += [
                f"{got[key].mean():.4f}",
                f"{want[key].mean():.4f}",
                f"{want[key].mean() / got[key].mean() - 1:+.1%}",
            ]
        line += [f"{got['weights'].mean():.4f}", f"{want['weights'].mean():.4f}",
                 f"{np.abs(want['step'] / got['step'] - 1).max():.1%}", f"{plain:.4f}",
                 f"{plain / got['step'].mean() - 1:+.1%}"]  # fmt: skip
        errors.append(line)
        bars[name] = (got["step"].mean(), want["step"].mean())
    other = [line[0] for line in errors if line[1] == "NO"]
    warning = (
        f"\n\n**Run and simulation gave ranks different tokens: {other}. Their errors say nothing.**" if other else ""
    )
    base, stated = found["cluster"], found["stated"]
    picture = f"measured-serve-{scene.name}.svg"
    save(REPORTS / picture, bar_chart(bars, ("measured", "simulated"), "seconds a step"))
    words = (
        f"{found['words']}. {scene.tokens_per_device} rows a device and step, {layers} layers, {marks.shape[2]} steps after "
        f"{WARM_UP} warm-up steps, {marks.shape[1]} paired repeats, flow `{scene.traffic}`. Ports set to "
        f"{stated.intra_bytes_per_s / 1e6:.1f} MB/s inside a node"
        + (f", {stated.inter_bytes_per_s / 1e6:.1f} MB/s between nodes" if scene.nodes > 1 else "")
        + f"; calibrated {base.intra_bytes_per_s / 1e6:.1f}"
        + (f" and {base.inter_bytes_per_s / 1e6:.1f}" if scene.nodes > 1 else "")
        + f" MB/s, start-up {1e3 * (base.intra_latency_s + (base.inter_latency_s if scene.nodes > 1 else 0)):.1f} ms + "
        f"{1e3 * base.peer_latency_s:.2f} ms a peer. Over-runs of the device clock: {found['overruns']}."
    )
    return (f"## {scene.name}\n\n{words}\n\n{table(head, rows)}\n\nThe simulation beside it (rank by rank, `simulate/serving.py`), seconds a step, means over "
            f"steps of medians over repeats; last, the step as planners see it, one term after the other:\n\n{table(error_head, errors)}{warning}\n\n"
            f"![measured and simulated]({picture})")  # fmt: skip


def timelines(found: dict[str, Any]) -> dict[str, list[Event]]:
    """Step 0 of the first and the last row: the repeat nearest to the median, and the simulation's."""
    scene, out = found["scene"], {}
    for index in (0, len(scene.rows) - 1):
        step = terms(found["marks"][index])["step"][:, 0]
        median = int(np.argmin(np.abs(step - np.median(step))))
        name = scene.rows[index][0]
        out[f"{name}, measured"] = events_of(found["marks"][index, median, 0])
        out[f"{name}, simulated"] = events_of(found["predicted"][index].marks[0, 0])
    return out


def events_of(marks_LDM: np.ndarray) -> list[Event]:
    """Marks of one step as events."""
    names = ("attention", "weights, control", "dispatch", "experts", "combine")
    return [event for marks_DM in marks_LDM for event in part_events(marks_DM, names)]


def main() -> None:
    words = parser(str(__doc__))
    words.add_argument("--scenes", default=",".join(SCENES))
    words.add_argument("--steps", type=int)
    words.add_argument(
        "--timelines", type=Path, help="folder for a step of each scene, measured and simulated (ui.perfetto.dev)"
    )
    options = words.parse_args()
    for name in options.scenes.split(","):
        scene = SCENES[name] if options.steps is None else replace(SCENES[name], steps=options.steps)
        with workplace(None if options.keep is None else options.keep / name) as folder:
            found = measure(scene, options.data, options.repeats, folder)
        text = report(found)
        if options.timelines is not None:
            write_perfetto(options.timelines / f"serve-{name}.json", timelines(found))
        write("Serving, measured on an emulated cluster", [text], f"-{name}")


if __name__ == "__main__":
    main()
