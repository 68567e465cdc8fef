"""Does knowing which requests run foretell a decode step better than the steps before it do?

python benchmarks/request_outlook.py DATA [--only turn] [--running 32,256] [--layers 6] [--planned 1] [--steps 96] [--report]

Decode as a server runs it: so many requests at a time, a token of each a step; when one ends, another takes its turn
(requests of a subject, of both mixed, or of one until the judged steps begin and of the other then, in random order, again and again). What the next steps will load is told by

history   the mean of the last 24 steps, as ``poise-near`` looks at it;
requests  of each request that runs, its own picks so far, prefill included, leaning on the history as much as so many
          tokens say (``lean``, chosen on the other half of the requests);
oracle    the step's own loads.

A forecast is made ``late`` steps before the step it is of, as a planner beside the steps would. Its error is half the sum
of differences of shares, mean over layers and steps. What it is worth: each step planned for its forecast, weights free, on
a machine as measured, over EPLB's map for the other half (planners2's clairvoyant row with another's eyes).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
from common import problem, table, write
from numpy.typing import NDArray
from planners2 import HIDDEN_S, MODEL, REDUNDANT, SLOTS, Clairvoyant, Oracle, layers_of

from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import settle
from poise.planning.solve.solve import solve
from poise.replay.serving import FastLoop, replay_steps
from poise.routing.batch import RoutingBatch, count_loads
from poise.routing.batching import make_batch
from poise.routing.files import read
from poise.routing.trace import RoutingTrace

WINDOW, WARM_UP = 24, 160
"""Steps of a history, and steps until requests of all ages run."""
LEANS = (8.0, 32.0, 128.0, 512.0, 2048.0)
OWN = 128.0
"""The lean of a request on the others, where its own routing is shown."""
LATES = (1, 16)
MACHINE = "4x8:h200"


@dataclass(frozen=True)
class Decode:
    """Steps of a server, and what it knows of who runs.

    Parameters
    ----------
    batch : its ``request_T`` numbers turns: a request that runs again is another one.
    prefill_QLE : picks of each turn's prefill, float32 [Q, L, E].
    """

    batch: RoutingBatch
    prefill_QLE: NDArray[np.float32]


def decode(trace: RoutingTrace, running: int, steps: int, turn: int | None = None, seed: int = 0) -> Decode:
    """So many requests of a trace at a time; at first of every age. With a ``turn``, those of ids below it come until the
    warm-up ends, and the others then.
    """
    assert trace.request is not None and trace.is_decode is not None
    rng = np.random.default_rng(seed)
    rows = {int(r): np.flatnonzero((trace.request == r) & trace.is_decode) for r in np.unique(trace.request)}
    rows = {r: at for r, at in rows.items() if len(at)}
    before = {r: picks(trace, np.flatnonzero((trace.request == r) & ~trace.is_decode)) for r in rows}
    order: list[int] = []
    waiting = [r for r in rows if turn is None or r < turn]

    def another() -> int:
        if not order:
            order.extend(rng.permutation(waiting).tolist())
        return int(order.pop())

    turns: list[int] = [another() for _ in range(running)]
    slot, age = np.arange(running), np.array([rng.integers(len(rows[r])) for r in turns])
    known = [before[r] + picks(trace, rows[r][:a]) for r, a in zip(turns, age, strict=True)]
    token, who = [], []
    for step in range(steps):
        if turn is not None and step == WARM_UP:
            waiting, order = [r for r in rows if r >= turn], []
        for i in range(running):
            if age[i] == len(rows[turns[slot[i]]]):
                turns.append(another())
                known.append(before[turns[-1]])
                slot[i], age[i] = len(turns) - 1, 0
            token.append(rows[turns[slot[i]]][age[i]])
            age[i] += 1
        who.append(slot.copy())
    experts = np.ascontiguousarray(trace.experts[np.array(token)])
    load = count_loads(experts, np.full(steps, running), trace.num_experts)
    start = np.arange(steps + 1, dtype=np.int64) * running
    batch = RoutingBatch(load, np.full(steps, 1 / steps), trace.top_k, np.asarray(trace.layer_ids, np.int32), experts, start,
                         np.concatenate(who).astype(np.int32))  # fmt: skip
    return Decode(batch, np.stack(known))


def picks(trace: RoutingTrace, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """How often some tokens pick each expert, float32 [L, E]."""
    out = np.zeros((trace.num_layers, trace.num_experts), np.float32)
    experts = trace.experts[rows].astype(np.int64)
    np.add.at(out, (np.broadcast_to(np.arange(trace.num_layers)[None, :, None], experts.shape), experts), 1.0)
    return out


@dataclass(frozen=True, eq=False)
class Outlook:
    """A forecast, made ``late`` steps ahead; ``lean`` 0: the history."""

    name: ClassVar[str] = "outlook"
    prefill_QLE: NDArray[np.float32]
    late: int
    lean: float

    def predict_BLE(self, batch: RoutingBatch, prior_LE: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """See :class:`poise.routing.predict.Predictor`."""
        assert batch.experts_TLK is not None and batch.request_T is not None and batch.start_B is not None
        seen = self.prefill_QLE.copy()
        layer = np.arange(batch.num_layers)[None, :, None]
        out = np.ones(batch.load_BLE.shape)
        for b in range(batch.num_steps):
            now = b - self.late + 1  # the step that begins when the forecast is made: who runs in it is known
            if now < 1:
                continue
            rows = slice(batch.start_B[now - 1], batch.start_B[now])
            who, experts = batch.request_T[rows], batch.experts_TLK[rows].astype(np.int64)
            np.add.at(seen, (who[:, None, None], layer, experts), 1.0)
            mean = batch.load_BLE[max(0, now - WINDOW) : now].sum(axis=0)
            mean /= mean.sum(axis=1, keepdims=True)
            if not self.lean:
                out[b] = mean
                continue
            here = batch.request_T[slice(batch.start_B[now], batch.start_B[now + 1])]
            mine = seen[here] + self.lean * mean
            out[b] = (mine / mine.sum(axis=2, keepdims=True)).mean(axis=0)
        return out / out.sum(axis=2, keepdims=True) * batch.load_BLE.sum(axis=2, keepdims=True)


def surprise(trace: RoutingTrace, lean: float) -> tuple[float, float]:
    """Nats a pick of the second half of each request: told by all other requests, and by its own first half as well."""
    assert trace.request is not None
    whole, layer, found = picks(trace, np.arange(trace.num_tokens)), np.arange(trace.num_layers)[None, :, None], []
    for r in np.unique(trace.request):
        rows = np.flatnonzero(trace.request == r)
        first, second = rows[: len(rows) // 2], trace.experts[rows[len(rows) // 2 :]].astype(np.int64)
        others = whole - picks(trace, rows) + 0.5
        others /= others.sum(axis=1, keepdims=True)
        own = picks(trace, first) + lean * others
        own /= own.sum(axis=1, keepdims=True)
        found.append([-np.log(share[layer, second]).mean() for share in (others, own)])
    told, better = np.mean(found, axis=0).tolist()
    return told, better


def error(steps: Decode, late: int, lean: float) -> float:
    """Half the sum of differences of shares, mean over layers and the steps after the warm-up."""
    found = Outlook(steps.prefill_QLE, late, lean).predict_BLE(steps.batch)[WARM_UP:]
    load = steps.batch.load_BLE[WARM_UP:]
    return float((np.abs(found - load).sum(axis=2) / 2 / load.sum(axis=2)).mean())


def together(traces: list[RoutingTrace]) -> RoutingTrace:
    """Requests of several traces as those of one; ids of the first are what they were."""
    first, request, many = traces[0], [], 0
    for trace in traces:
        assert trace.request is not None
        request.append(trace.request.astype(np.int64) + many)
        many += int(trace.request.max()) + 1
    return replace(first, experts=np.concatenate([trace.experts for trace in traces]), request=np.concatenate(request),
                   is_decode=np.concatenate([trace.is_decode for trace in traces]), weights=None)  # fmt: skip


def some_layers(trace: RoutingTrace, rows: list[int]) -> RoutingTrace:
    """Some of a trace's layers."""
    assert trace.layer_ids is not None
    return replace(trace, experts=trace.experts[:, rows], layer_ids=trace.layer_ids[rows], weights=None)


def worth(fit: RoutingTrace, steps: Decode, given: argparse.Namespace, eyes: list[Outlook | Oracle]) -> list[float]:
    """Milliseconds of a step of all MoE layers, planned for each forecast, over EPLB's map for other requests."""
    model, running = ModelSpec.parse(MODEL), int(steps.batch.load_BLE[0, 0].sum())
    cluster = settle(Cluster.parse(MACHINE), model, running)
    made = problem(
        make_batch(fit, tokens_per_step=512), MACHINE, REDUNDANT * cluster.num_devices, traffic="home", model=MODEL
    )
    static, out = solve(made, method="eplb-global", work=1.0).placement, []
    for eye in eyes:
        loads = eye.predict_BLE(steps.batch)[WARM_UP:]
        loop = FastLoop(Clairvoyant(), SLOTS, predictor=_Told(loads), window_s=HIDDEN_S, control_s=0.0)
        got = replay_steps(steps.batch.steps_from(WARM_UP), static, loop, cluster, model, traffic="home", warm_up=0)
        out.append(1e3 * float(got.step_seconds_B.mean()) * len(model.moe_layer_ids) / given.planned)
    return out


@dataclass(frozen=True, eq=False)
class _Told:
    """Forecasts that were made on all steps, the warm-up included."""

    name: ClassVar[str] = "told"
    load_BLE: NDArray[np.float64]

    def predict_BLE(self, batch: RoutingBatch, prior_LE: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """See :class:`poise.routing.predict.Predictor`."""
        return self.load_BLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default="", help="of abstract_algebra,anatomy,both,turn")
    parser.add_argument("--running", default="32,256")
    parser.add_argument("--layers", type=int, default=6, help="of the errors")
    parser.add_argument("--planned", type=int, default=1, help="layers that are planned; 0: errors alone")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    traces = {path.stem: read(path) for path in sorted((given.data / "llama4-maverick").glob("*.npz"))}
    for name, trace in traces.items():
        told, better = surprise(some_layers(trace, layers_of(trace, given.layers)), OWN)
        print(
            f"{name}: second halves of requests {told:.3f} nats a pick by the others, {better:.3f} by their first halves, too"
        )
    rows: list[list[object]] = []
    for name, running in product(
        given.only.split(",") if given.only else (*traces, "both", "turn"), map(int, given.running.split(","))
    ):
        began = time.process_time()
        parts = [each.every_second_request() for each in ([traces[name]] if name in traces else traces.values())]
        tune, judge = (together([pair[side] for pair in parts]) for side in (0, 1))
        turns = [int(parts[0][side].request.max()) + 1 if name == "turn" else None for side in (0, 1)]
        many = [decode(some_layers(one, layers_of(one, given.layers)), running, WARM_UP + given.steps, turn)
                for one, turn in zip((tune, judge), turns, strict=True)]  # fmt: skip
        few = layers_of(judge, given.planned) if given.planned else []
        planned = decode(some_layers(judge, few), running, WARM_UP + given.steps, turns[1]) if few else None
        for late in LATES:
            lean = min(LEANS, key=lambda each: error(many[0], late, each))
            history, requests = (error(many[1], late, each) for each in (0.0, lean))
            ms: list[object] = ["", "", ""]
            if planned is not None:
                eyes = [Outlook(planned.prefill_QLE, late, 0.0), Outlook(planned.prefill_QLE, late, lean), Oracle()]
                ms = [f"{each:.3f}" for each in worth(some_layers(tune, few), planned, given, eyes)]
            rows.append([name, running, late, f"{lean:g}", f"{history:.3f}", f"{requests:.3f}", *ms])
            print(rows[-1], f"{time.process_time() - began:.0f} processor s", flush=True)
    words = (f"{MODEL}; half of the requests choose the lean and EPLB's map, the other half is judged; errors on {given.layers} layers, "
             f"{given.steps} steps after {WARM_UP}; ms a step of all MoE layers on {MACHINE} from {given.planned}, each step planned for its "
             "forecast, weights and control free.")  # fmt: skip
    head = [
        "requests of",
        "running",
        "late",
        "lean",
        "error of history",
        "of requests",
        "ms, history",
        "requests",
        "oracle",
    ]
    found = [words, table(head, rows)]
    if given.report:
        write("Requests as an outlook", found)
    else:
        print("\n\n".join(found))


if __name__ == "__main__":
    main()
