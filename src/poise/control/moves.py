"""From one placement to another: rounds of moves that serve correctly throughout, and the best part under a budget.

A round: every move of it copies an expert from a device that holds it to a slot that is empty, or into one of the
receiver's ``staging`` buffers when the slot is in use. The old slots serve all the while. Then all devices flip at
once: staged experts take their slots, dropped ones leave theirs.

Step 1  A device with more to come than empty slots must give one up. Its *leavers* are the experts that the new
        placement does not want there. A leaver with another copy can go; one without can go when its copy arrives
        elsewhere in the same round, which may need room there in turn. So arrivals form chains, and the shortest chain
        of each arrival is found by breadth-first search over devices. It ends at an empty slot, at a leaver with
        another copy, or by coming back to the expert it started with.
Step 2  A round takes chains, devices with most to come first, until no staging buffer is left that helps. There
        always is a chain while something is to come: without one, the devices reached by the search would be full,
        each with as many leavers as arrivals, none of them held elsewhere, so following leavers would close a cycle,
        and a cycle is a chain of its own arrivals. Hence it ends, and nothing is fetched twice.
Step 3  Senders: holders at the start of the round; the receiver's own node first, then the one that has sent least.

Devices may join and leave, and have other slots after than before (:mod:`poise.control.common`): one that leaves keeps
what it holds to the last round, so it can send throughout, after others equally near. Devices that are lost cannot:
what only they held is read from the checkpoint, before all else.

Rounds are few, not proven fewest. An expert twice on a device is copied there without a fetch.
:func:`bounded` takes the chains, one by one, that lower the modelled seconds most per fetched expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.control.chains import ChainMove, LayerMoves
from poise.control.common import CHECKPOINT, STAYS, common
from poise.cost.links import PortLoad, port_seconds
from poise.cost.split import even_share
from poise.machine.cluster import Cluster
from poise.planning.placement import EMPTY, Placement
from poise.planning.problem import PlacementProblem
from poise.routing.batch import RoutingBatch
from poise.routing.trace import NO_EXPERT
from poise.util.errors import OptionError, PlacementError

SHORTLIST = 8
"""Chains of a layer that are priced in full at a time; the rest are behind them by their effect on device loads."""
MOST_LEAVERS = 4
"""Leavers of a full device that are tried for each arrival."""
FROM_CHECKPOINT = -1
"""Sender of an expert that no device holds any more."""


class Move(NamedTuple):
    """One expert of one layer to one slot; ``staged``: by way of a staging buffer, since the slot is in use."""

    layer: int
    expert: int
    slot: int
    from_device: int
    to_device: int
    staged: bool


class Round(NamedTuple):
    """Moves that run and take effect together, and the slots (layer, slot) that are empty from then on."""

    moves: tuple[Move, ...]
    drops: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class MoveList:
    """Rounds in order, and the placement they lead to: ``after``, slots renumbered inside devices.

    Where devices or slots change, ``result`` has all devices and slots of before and after, those that go empty.
    """

    rounds: tuple[Round, ...]
    result: Placement
    expert_bytes: float
    staging: int

    @property
    def fetched(self) -> int:
        """Experts that go from a device to another."""
        return sum(move.from_device != move.to_device for each in self.rounds for move in each.moves) - self.read

    @property
    def read(self) -> int:
        """Experts that are read from the checkpoint."""
        return sum(move.from_device == FROM_CHECKPOINT for each in self.rounds for move in each.moves)

    @property
    def moved_bytes(self) -> float:
        """Bytes that go from a device to another."""
        return self.fetched * self.expert_bytes

    def seconds(self, cluster: Cluster) -> float:
        """Link seconds of all rounds, one after the other: latency and the fullest port of each; reading costs none."""
        port = np.zeros((4, len(self.rounds), cluster.num_devices))
        for at, each in enumerate(self.rounds):
            for _, _, _, source, target, _ in each.moves:
                if source not in (target, FROM_CHECKPOINT):
                    kind = 0 if cluster.node_D[source] == cluster.node_D[target] else 2
                    port[[kind, kind + 1], at, [source, target]] += 1
        busy = port.any(axis=(0, 2))
        wire = cluster.plain_wire
        ports = port_seconds(PortLoad(*port), self.expert_bytes, cluster, wire) if busy.any() else np.zeros(busy.size)
        return float((ports + busy * wire.start_s).sum())

    def __repr__(self) -> str:
        size = f"{self.fetched} experts fetched, {self.moved_bytes / 2**20:.1f} MiB"
        return f"MoveList({len(self.rounds)} rounds, {size}, at most {self.staging} staged a device and round)"


def same_slots(before: Placement, after: Placement) -> NDArray[np.int64]:
    """Slots of each device, int [D]; PlacementError if the placements differ in shape or in the slots of a device."""
    before.diff(after)
    if before.num_devices != after.num_devices:
        raise PlacementError(f"{before.num_devices} devices before and {after.num_devices} after")
    mine = np.bincount(before.slot_device_S, minlength=before.num_devices)
    theirs = np.bincount(after.slot_device_S, minlength=after.num_devices)
    if (mine != theirs).any():
        d = int(np.argmax(mine != theirs))
        raise PlacementError(f"device {d} has {mine[d]} slots before and {theirs[d]} after")
    return mine


def move_list(
    before: Placement, after: Placement, *, expert_bytes: float, staging: int = 1, node_D: NDArray[Any] | None = None,
    lost: Sequence[int] = (),
) -> MoveList:  # fmt: skip
    """Rounds of moves that turn one placement into the other; what holds throughout: module docstring.

    Parameters
    ----------
    before, after : placements of one model; device d of one is device d of the other.
    expert_bytes : bytes of one expert.
    staging : buffers a device, each of one expert, shared by all layers.
    node_D : int [D], node of each device of the larger placement; senders of the same node are preferred.
    lost : devices that are gone with what they held.

    Raises
    ------
    PlacementError : the placements differ in layers or experts.
    OptionError : no staging buffer, or expert bytes that are not above 0.
    """
    if staging < 1 or not (np.isfinite(expert_bytes) and expert_bytes > 0):
        raise OptionError(f"staging must be at least 1 and expert_bytes above 0, got {staging}, {expert_bytes}")
    both = common(before, after, lost)
    before, devices, real = both.before, len(both.kind_D), both.real
    node = np.zeros(real, np.int64) if node_D is None else np.asarray(node_D)
    if node.shape != (real,):
        raise OptionError(f"node_D names {node.size} devices, the placements have {real}")
    node = np.append(node, [-1] * (devices - real))
    works = [LayerMoves(*pair) for pair in zip(before.count_LED(), both.after.count_LED(), strict=True)]
    slots_of_D = [np.flatnonzero(before.slot_device_S == d).tolist() for d in range(devices)]
    slots_D = np.array([len(slots) for slots in slots_of_D])
    slot_expert = before.slot_expert_LS.tolist()
    staying = np.flatnonzero(both.kind_D == STAYS).tolist()
    sent_D = np.zeros(devices, np.int64)
    rounds = []
    while any(any(work.comers_D) or any(work.leavers_D) for work in works):
        held = [work.have_ED.copy() for work in works]
        links = _fill_round(works, held, slots_D, staging, real)
        done = not any(any(work.comers_D) for work in works)
        arrivals, drops = [], []
        for layer, row in enumerate(slot_expert):
            old = list(row)
            for link in links[layer]:
                slot = next(s for s in slots_of_D[link.device] if old[s] == link.leaver and row[s] == link.leaver)
                row[slot] = link.expert
                arrivals.append((layer, link.expert, slot, link.device, link.leaver != EMPTY))
            for expert, d in works[layer].surplus(range(devices) if done else staying):
                slot = next(s for s in slots_of_D[d] if row[s] == expert and old[s] == expert)
                row[slot] = EMPTY
                drops += [(layer, slot)] * (d < real)
        rounds.append(Round(_senders(arrivals, held, node, both.kind_D, sent_D), tuple(drops)))
    last = int(slots_D[:real].sum())
    result = replace(after, slot_expert_LS=np.array(slot_expert, np.int32)[:, :last], num_devices=real,
                     slot_device_S=before.slot_device_S[:last])  # fmt: skip
    return MoveList(tuple(rounds), result, expert_bytes, staging)


def _fill_round(
    works: list[LayerMoves], held: list[NDArray[np.int64]], slots_D: NDArray[np.int64], staging: int, real: int
) -> list[list[ChainMove]]:
    """Step 2: the links of each layer in this round; ``works`` are as after it. Experts without a device come first."""
    budget = [staging] * len(slots_D)
    rooms = [(slots_D - have.sum(axis=0)).tolist() for have in held]
    links: list[list[ChainMove]] = [[] for _ in works]
    dead = [set(np.flatnonzero(~have[:, :real].any(axis=1)).tolist()) for have in held]
    every = [set(range(len(have))) for have in held]
    for some in filter(any, (dead, every)):
        again = True
        while again:
            again = False
            to_come = np.array([[len(comers) for comers in work.comers_D] for work in works]).sum(axis=0)
            for d in np.argsort(-to_come, kind="stable").tolist():
                for layer, work in enumerate(works):
                    for expert in sorted(work.comers_D[d] & some[layer]):
                        if budget[d] < 1 and rooms[layer][d] < 1:
                            break
                        # A second copy on a device is made from the first, which must have been there.
                        twice = work.have_ED[expert, d] > 0 and held[layer][expert, d] == 0
                        if expert not in work.comers_D[d] or twice:
                            continue
                        chain = work.chain(expert, d, rooms[layer], budget)
                        for link in chain:
                            (rooms[layer] if link.leaver == EMPTY else budget)[link.device] -= 1
                        work.apply(chain)
                        links[layer] += chain
                        again = again or bool(chain)
    return links


def _senders(
    arrivals: list[tuple[int, int, int, int, bool]], held: list[NDArray[np.int64]], node_D: NDArray[Any],
    kind_D: NDArray[np.int64], sent_D: NDArray[np.int64],
) -> tuple[Move, ...]:  # fmt: skip
    """Step 3, those with the fewest holders first; ``sent_D`` counts over all rounds and breaks ties."""
    holders = [np.flatnonzero(held[layer][expert]) for layer, expert, *_ in arrivals]
    now_D = np.zeros_like(sent_D)
    moves = []
    for at in sorted(range(len(arrivals)), key=lambda i: len(holders[i])):
        layer, expert, slot, device, staged = arrivals[at]
        source = device
        if device not in holders[at]:
            source = min(
                holders[at].tolist(),
                key=lambda s: (node_D[s] != node_D[device], kind_D[s], now_D[s], sent_D[s], s),
            )
            now_D[source] += 1
            sent_D[source] += 1
            source = FROM_CHECKPOINT if kind_D[source] == CHECKPOINT else source
        moves.append(Move(layer, expert, slot, source, device, staged))
    return tuple(moves)


def bounded(before: Placement, after: Placement, problem: PlacementProblem, max_moves: int) -> Placement:
    """A placement on the way from one to the other that at most ``max_moves`` fetched experts lead to.

    Greedy: again and again the chain, drop or whole rest of a layer that lowers the objective on the problem's traffic
    (:func:`poise.cost.step.batch_cost`) most per fetched expert, until none lowers it or fits. Layers are independent
    but for ``stay``, where a change counts in the next layer too. Called again from its result it goes on; ``after``
    itself is returned where it fits and is as good. Without free slots experts change places in circles: a budget
    below the shortest circle leads nowhere, one that holds a layer's moves always to where no layer gains. Steps that
    empty a slot are taken only where the problem's engine may have empty slots.

    Raises
    ------
    PlacementError : the placements differ in shape or slots, or do not fit the problem.
    OptionError : ``max_moves`` is negative.
    """
    if max_moves < 0:
        raise OptionError(f"max_moves must be at least 0, got {max_moves}")
    slots_D = same_slots(before, after)
    problem.check(before)
    problem.check(after)
    count_LED, want_LED = before.count_LED(), after.count_LED()
    left, layers = max_moves, range(before.num_layers)
    best: dict[int, tuple[float, int, NDArray[Any]] | None] = {}
    stale = set(layers)
    while True:
        stale |= {layer for layer, step in best.items() if step is not None and step[1] > left}
        best |= {each: _best_step(each, count_LED, want_LED, slots_D, problem, left) for each in sorted(stale)}
        able = {layer: step for layer, step in best.items() if step is not None}
        if not able:
            break
        layer = max(able, key=lambda each: (able[each][0], -each))
        left, count_LED[layer] = left - able[layer][1], able[layer][2]
        stale = {layer} | ({layer - 1, layer + 1} & set(layers) if problem.traffic == "stay" else set())
        stale = set(layers) if _skips(problem) else stale
    if before.diff(after).fetched <= max_moves:
        if _seconds(problem, want_LED, 0, len(layers)) <= _seconds(problem, count_LED, 0, len(layers)):
            return after
    return Placement.from_counts(count_LED, slots_D=slots_D, layer_ids_L=before.layer_ids_L, method=after.method)


def _best_step(
    layer: int, count_LED: NDArray[Any], want_LED: NDArray[Any], slots_D: NDArray[np.int64], problem: PlacementProblem,
    left: int,
) -> tuple[float, int, NDArray[Any]] | None:  # fmt: skip
    """Seconds saved per fetched expert, experts fetched and counts [E, D] after the layer's best step; None if none."""
    have, found = count_LED[layer], None
    load_E = problem.batch.weight_B @ problem.batch.load_BLE[:, layer]

    def roughness(count_ED: NDArray[Any]) -> float:
        return float(np.linalg.norm((load_E @ even_share(count_ED)) / problem.cluster.speed_D, 8))

    rough = roughness(have)
    steps = _options(LayerMoves(have, want_LED[layer]), slots_D, load_E)
    if not problem.engine.empty_slots:  # the engine would fill what a step leaves empty
        steps = [each for each in steps if (each.sum(axis=0) >= have.sum(axis=0)).all()]
    every = [(int(((each > 0) & (have == 0)).sum()), each) for each in steps]
    options = [each for each in every if each[0] <= left]
    whole = [each for each in options[:1] if each[1] is steps[0]]  # if it fits, it is priced whatever its rank
    options.sort(key=lambda each: (roughness(each[1]) - rough) / max(each[0], 0.5))
    now = _seconds(problem, count_LED, layer, layer + 1)
    for fetched, option in options[:SHORTLIST] + whole:
        changed = count_LED.copy()
        changed[layer] = option
        gain = now - _seconds(problem, changed, layer, layer + 1)
        if gain > 1e-12 * now and (found is None or gain / max(fetched, 1e-9) > found[0]):
            found = (gain / max(fetched, 1e-9), fetched, option)
    return found


def _options(work: LayerMoves, slots_D: NDArray[np.int64], load_E: NDArray[np.float64]) -> list[NDArray[Any]]:
    """Counts [E, D] after every chain, with and without the copies it makes needless, every drop, and all of it."""
    have, want, room = work.have_ED, work.want_ED, (slots_D - work.have_ED.sum(axis=0)).tolist()
    chains = []
    for d, comers in enumerate(work.comers_D):
        leavers: list[int | None] = [None]
        if room[d] < 1 and work.leavers_D[d]:
            by_load = sorted(work.leavers_D[d], key=lambda x: (load_E[x] / work.copies_E[x], x))
            picks = np.unique(np.linspace(0, len(by_load) - 1, MOST_LEAVERS).round().astype(int))
            leavers = [by_load[i] for i in picks]
        chains += [work.chain(e, d, room, [1] * len(room), leaver=x) for e in sorted(comers) for x in leavers]
    if (have == want).all():
        return []
    options = [want]
    for links in filter(None, chains):
        after = have.copy()
        for link in links:
            after[link.expert, link.device] += 1
            if link.leaver != EMPTY:
                after[link.leaver, link.device] -= 1
        options.append(after)
        trimmed = after.copy()
        for link in links:
            for at in np.flatnonzero(trimmed[link.expert] > want[link.expert]):
                trimmed[link.expert, at] -= int(trimmed[link.expert].sum() > 1)
        if (trimmed != after).any():
            options.append(trimmed)
    for d, gone in enumerate(work.leavers_D):
        for x in (each for each in sorted(gone) if work.copies_E[each] > 1):
            options.append(have.copy())
            options[-1][x, d] -= 1
    return options


def _skips(problem: PlacementProblem) -> bool:
    """Whether tokens stay where they are over more than one layer, so that a change reaches further than the next."""
    ids = problem.batch.experts_TLK
    return problem.traffic == "stay" and ids is not None and bool((ids[:, :, 0] == NO_EXPERT).any())


def _seconds(problem: PlacementProblem, count_LED: NDArray[Any], first: int, last: int) -> float:
    """Expected seconds of a step in layers first to last - 1, and in the one behind them where it depends on them."""
    batch, stay = problem.batch, problem.traffic == "stay"
    part = slice(max(0, first - 1) if stay else first, min(batch.num_layers, last + 1) if stay else last)
    part = slice(0, batch.num_layers) if _skips(problem) else part
    experts = None if batch.experts_TLK is None else np.ascontiguousarray(batch.experts_TLK[:, part])
    some = RoutingBatch(
        batch.load_BLE[:, part], batch.weight_B, batch.top_k, batch.layer_ids_L[part], experts, batch.start_B,
        batch.request_T, batch.home_T, homes=batch.homes,
    )  # fmt: skip
    cost = problem.pricing.cost(some, count_LED[part])
    return float(batch.weight_B @ cost.seconds_BL[:, first - part.start :].sum(axis=1))
