"""What if: the maps of a comparison with other redundant slots, at other batches, on other machines.

For other slots methods plan anew, on the machine and batch of the comparison; at other batches and on other machines
the maps stay as they are and are priced again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray

from poise.cost.bound import bound_terms
from poise.machine.cluster import Cluster, from_words
from poise.machine.settle import flow_of
from poise.planning.budget import Budget
from poise.planning.engine_rules import parse_engine
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, deal_slots
from poise.planning.solve.solve import METHODS, solve
from poise.replay.compare import IN_SAMPLE, Comparison, Entry
from poise.replay.rows import split_traffic
from poise.replay.trial import TrialSetting, pricing_at
from poise.replay.windows import with_top_k
from poise.routing.batch import Homes, RoutingBatch
from poise.routing.batching import Order, make_batch
from poise.routing.sources import TrafficSource, load
from poise.routing.trace import RoutingTrace
from poise.util.errors import InfeasibleError, NoResultError, OptionError
from poise.util.wish import Wish

SIZES, PRESETS, SLOTS_A_RANK = (256, 1024, 4096, 16384), ("a100", "h100", "h200", "b200"), (0, 1, 2)
SHOWN, STEPS = ("eplb", "poise"), 4
"""Maps beside what runs now, and judged steps of a batch that is not the comparison's own."""


@dataclass(frozen=True, slots=True, eq=False)
class WhatIf:
    """A grid of settings, with what every map costs in each.

    Parameters
    ----------
    redundant, tokens, machines : R numbers of redundant slots, N sizes of a step, M machines.
    maps : A names, the first what runs now.
    seconds_RNMA : float64, of the recorded MoE layers of a step, mean over steps; NaN where a map does not exist.
    imbalance_RNMA : float64, tokens of the fullest over the mean device, mean over steps and layers; NaN as above.
    bound_RNM : float64, seconds that no placement with these slots can beat.
    here : the setting of the comparison, by its number on each axis.
    """

    redundant: tuple[int, ...]
    tokens: tuple[int, ...]
    machines: tuple[str, ...]
    maps: tuple[str, ...]
    seconds_RNMA: NDArray[np.float64]
    imbalance_RNMA: NDArray[np.float64]
    bound_RNM: NDArray[np.float64]
    here: tuple[int, int, int]


def what_if(
    found: Comparison, setting: TrialSetting, batch_of: Callable[[int], RoutingBatch], *,
    sizes: Sequence[int] = SIZES, presets: Sequence[str] = PRESETS, time_limit_s: float = 10.0,
    work: float | None = None, executor: Executor | None = None,
    progress: Callable[[str, float], None] | None = None, wish: Wish | None = None,
) -> WhatIf:  # fmt: skip
    """Price the grid.

    Parameters
    ----------
    found : where it is, and whose fitted traffic methods plan on.
    setting : its machine, with constants open where they depend on the batch, its model, engine and split.
    batch_of : judged traffic in steps of so many tokens.
    sizes, presets : tokens of a step, and machines of the same shape, beside its own.
    time_limit_s, work, executor : for each plan.

    Raises
    ------
    OptionError : no map of it can be shown beside what runs now. NoResultError : the ``wish`` that it be ended came.
    """
    entries = [found.entries[0], *(one for one in found.entries[1:] if one.name in SHOWN and one.fast is None)]
    if len(entries) < 2:
        raise OptionError(
            f"what if is asked of {' and '.join(SHOWN)} beside what runs now, and neither is compared",
            hint=f"-p {entries[0].name} -p poise",
        )
    experts, devices = found.model.num_experts, found.cluster.num_devices
    own, size = int(found.slots_D.sum()) - experts, round(found.batches[found.judged_on].mean_tokens())
    rules = parse_engine(found.engine)
    begin = partial(Budget, time_limit_s, work=work, executor=executor, wish=wish)
    held = [many for many in {*(each * devices for each in SLOTS_A_RANK), own} if many <= experts * (devices - 1)]
    slots = sorted(many for many in held if many == own or _holds(many, experts, devices, setting))
    tokens = sorted({*sizes, size})
    machines = machines_beside(setting.cluster, presets)
    batches = {n: found.batches[found.judged_on] if n == size else batch_of(n) for n in tokens}
    shape = (len(slots), len(tokens), len(machines), len(entries))
    seconds, imbalance, bound = np.full(shape, np.nan), np.full(shape, np.nan), np.empty(shape[:3])
    fixed = found.traffic if found.traffic != flow_of(found.cluster) else None
    for r, many in enumerate(slots):
        slots_D = found.slots_D if many == own else deal_slots(experts, many, devices)
        problem = PlacementProblem(found.batches[IN_SAMPLE], found.cluster, found.model, slots_D, found.traffic,
                                   found.split, engine=rules)  # fmt: skip
        maps = []
        for turn, entry in enumerate(entries):
            if progress:
                progress(f"what if, {many} redundant slots, {entry.name}", (r + turn / len(entries)) / len(slots))
            maps.append(entry.placement if many == own else _planned(entry, problem, begin()))
        for (n, batch), (m, machine) in product(enumerate(batches.values()), enumerate(machines.values())):
            if wish is not None and wish.came:
                raise NoResultError("what if: interrupted before the last setting")
            price = pricing_at(batch, replace(setting, cluster=machine))
            price = price if fixed is None else replace(price, traffic=fixed)
            bound[r, n, m] = bound_terms(batch, price.cluster, price.model, traffic=price.traffic, slots_D=slots_D,
                                         blind=price.split != "near").seconds_BL.sum(axis=1).mean()  # fmt: skip
            for a, placed in enumerate(maps):
                if r and _stays(entries[a]):
                    seconds[r, n, m, a], imbalance[r, n, m, a] = seconds[0, n, m, a], imbalance[0, n, m, a]
                elif placed is not None:
                    cost = price.cost(batch, placed.count_LED())
                    seconds[r, n, m, a] = cost.seconds_BL.sum(axis=1).mean()
                    imbalance[r, n, m, a] = np.nanmean(cost.imbalance_BL())
    return WhatIf(
        tuple(slots), tuple(tokens), tuple(machines), tuple(one.name for one in entries), seconds, imbalance, bound,
        (slots.index(own), tokens.index(size), 0),
    )  # fmt: skip


def judged_batches(
    found: Comparison, traces: Sequence[TrafficSource], *, fit: bool, named: bool, order: Order = "interleaved",
    homes: Homes | None = None, seed: int = 0,
) -> Callable[[int], RoutingBatch]:  # fmt: skip
    """What a comparison was judged on, in steps of any size; requests are drawn again where they are too few.

    Parameters
    ----------
    traces : as they were compared. fit : other traffic was fitted on; else the first half of these was.
    named : a model was named. order, homes, seed : as they were batched.
    """
    whole = load(traces)
    whole = with_top_k(whole, found.model.top_k) if named else whole
    fitted, judged, _ = split_traffic(whole, whole if fit else None)
    part = next(iter(judged.values()), fitted)()
    steps = STEPS if order == "interleaved" and isinstance(part, RoutingTrace) else None

    def batch_of(tokens: int) -> RoutingBatch:
        made = make_batch(part, tokens_per_step=tokens, order=order, homes=homes, seed=seed, steps=steps)
        return made.at_home(found.cluster.num_devices)

    return batch_of


def _holds(many: int, experts: int, devices: int, setting: TrialSetting) -> bool:
    """Whether the engine and the memory of a device hold so many redundant slots."""
    slots_D = deal_slots(experts, many, devices)
    try:
        setting.engine.check_slots(slots_D, experts)
    except OptionError:
        return False
    return not many or setting.fits(int(slots_D.max()))


def machines_beside(own: Cluster, presets: Sequence[str]) -> dict[str, Cluster]:
    """The machine, and others of its shape, by name."""
    counts = own.devices_per_node_N.tolist()
    others = {
        name: from_words(counts, name, tensor_parallel=own.tensor_parallel)
        for name in presets
        if name not in (own.preset, own.name)
    }
    return {own.name: own, **others}


def _stays(entry: Entry) -> bool:
    """Whether the map was given, and is the same for other slots."""
    return entry.seconds is None or entry.name not in METHODS


def _planned(entry: Entry, problem: PlacementProblem, budget: Budget) -> Placement | None:
    """The map of a method for these slots; one that was given stays as it is; None: the method has none."""
    if _stays(entry):
        return entry.placement
    try:
        return solve(problem, method=entry.name, time_limit_s=budget).placement
    except (InfeasibleError, NoResultError):
        return None
