"""From one placement to another: rounds of moves that serve correctly throughout, those that pay most first.

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
        and a cycle is a chain of its own arrivals. Hence it ends, and nothing is fetched twice. With a migration
        (:mod:`poise.control.payback`) a round takes the chains of its first legs first, and of later ones what then
        still finds a buffer.
Step 3  Senders: holders at the start of the round; the receiver's own node first, then the one that has sent least.
Step 4  A round has turns (:mod:`poise.control.peers`), as few as can be: in a turn a device sends to one peer at most
        and receives from one at most, so no two of its transfers meet at a port.

Devices may join and leave, and have other slots after than before (:mod:`poise.control.common`): one that leaves keeps
what it holds to the last round, so it can send throughout, after others equally near. Devices that are lost cannot:
what only they held is read from the checkpoint, before all else.

Rounds are few, not proven fewest: buffers decide. Turns of a round are the fewest, those of all rounds may be more than
:attr:`MoveList.fewest_turns`, which needs as many buffers as experts come. An expert twice on a device is copied there
without a fetch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.control.chains import ChainMove, LayerMoves
from poise.control.common import CHECKPOINT, STAYS, common
from poise.control.payback import Migration
from poise.control.peers import fewest_rounds, peer_rounds
from poise.control.price import PortTraffic
from poise.cost.links import PortLoad, pair_ports, port_seconds
from poise.machine.cluster import Cluster
from poise.planning.placement import EMPTY, Placement
from poise.util.errors import OptionError

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

    @property
    def fetches(self) -> list[Move]:
        """Moves from a device to another."""
        return [move for move in self.moves if move.from_device not in (move.to_device, FROM_CHECKPOINT)]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Sender and receiver of each fetch."""
        return [(move.from_device, move.to_device) for move in self.fetches]

    def turns(self, num_devices: int) -> list[list[Move]]:
        """Fetches, so that in a turn a device sends to one peer and receives from one; the fewest turns."""
        every = self.fetches
        return [[every[number] for number in one] for one in peer_rounds(self.pairs, num_devices)]


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

    @property
    def turns(self) -> int:
        """Turns of all rounds."""
        return sum(_turns([each]) for each in self.rounds)

    @property
    def fewest_turns(self) -> int:
        """Turns that these fetches would take if all could wait in buffers: what one device sends, or receives."""
        return _turns(self.rounds)

    def seconds(self, cluster: Cluster) -> float:
        """Link seconds of all rounds, one after the other: latency and the fullest port of each; reading costs none."""
        return float(self.seconds_R(cluster).sum())

    def seconds_R(self, cluster: Cluster) -> NDArray[np.float64]:
        """Link seconds of each round if links do nothing else."""
        load, wire = self._ports(cluster), cluster.plain_wire
        busy = np.stack([load.intra_out_BD, load.net_out_BD]).any(axis=(0, 2))
        ports = port_seconds(load, self.expert_bytes, cluster, wire) if busy.any() else np.zeros(busy.size)
        return ports + busy * wire.start_s

    def delay_R(self, traffic: PortTraffic) -> NDArray[np.float64]:
        """Seconds that steps are longer in all for each round, while tokens are served (:mod:`poise.control.price`)."""
        return traffic.delay_s(self._ports(traffic.cluster), self.expert_bytes)

    def _ports(self, cluster: Cluster) -> PortLoad:
        """Experts through every port, a row a round."""
        return pair_ports([each.pairs for each in self.rounds], cluster)

    def __repr__(self) -> str:
        size = f"{self.fetched} experts fetched, {self.moved_bytes / 2**20:.1f} MiB"
        return f"MoveList({len(self.rounds)} rounds, {size}, at most {self.staging} staged a device and round)"


def _turns(rounds: Sequence[Round]) -> int:
    pairs = [pair for each in rounds for pair in each.pairs]
    return fewest_rounds(pairs, 1 + max((max(pair) for pair in pairs), default=0))


def move_list(
    before: Placement, after: Placement, *, expert_bytes: float, staging: int = 1, node_D: NDArray[Any] | None = None,
    lost: Sequence[int] = (), migration: Migration | None = None,
) -> MoveList:  # fmt: skip
    """Rounds of moves that turn one placement into the other; what holds throughout: module docstring.

    Parameters
    ----------
    before, after : placements of one model; device d of one is device d of the other.
    expert_bytes : bytes of one expert.
    staging : buffers a device, each of one expert, shared by all layers.
    node_D : int [D], node of each device of the larger placement; senders of the same node are preferred.
    lost : devices that are gone with what they held.
    migration : from ``before`` to ``after``: its legs come in their order, so that every state on the way has made the
        best of its fetches that buffers allow. None: the fewest rounds that are found.

    Raises
    ------
    PlacementError : the placements differ in layers or experts.
    OptionError : no staging buffer, expert bytes that are not above 0, or a way between other placements.
    """
    if staging < 1 or not (np.isfinite(expert_bytes) and expert_bytes > 0):
        raise OptionError(f"staging must be at least 1 and expert_bytes above 0, got {staging}, {expert_bytes}")
    if migration is not None:
        ends = (migration.before, before), (migration.after, after)
        if lost or not all(one.holds_like(other) for one, other in ends):
            raise OptionError(
                f"the way goes from {migration.before!r} to {migration.after!r}, the moves from {before!r} to {after!r}"
            )
    both = common(before, after, lost)
    before, devices, real = both.before, len(both.kind_D), both.real
    node = np.zeros(real, np.int64) if node_D is None else np.asarray(node_D)
    if node.shape != (real,):
        raise OptionError(f"node_D names {node.size} devices, the placements have {real}")
    node = np.append(node, [-1] * (devices - real))
    legs = [[] for _ in range(before.num_layers)] if migration is None else migration.by_layer()
    works = [_LayerLegs(*three) for three in zip(before.count_LED(), both.after.count_LED(), legs, strict=True)]
    slots_of_D = [np.flatnonzero(before.slot_device_S == d).tolist() for d in range(devices)]
    slots_D = np.array([len(slots) for slots in slots_of_D])
    slot_expert = before.slot_expert_LS.tolist()
    staying = np.flatnonzero(both.kind_D == STAYS).tolist()
    sent_D = np.zeros(devices, np.int64)
    rounds = []
    while not all(work.done for work in works):
        held = [work.have_ED.copy() for work in works]
        links, gone = _fill_round(works, held, slots_D, staging, real)
        done = not any(any(work.comers_D) for work in works)
        arrivals, drops = [], []
        for layer, row in enumerate(slot_expert):
            old = list(row)
            for link in links[layer]:
                slot = next(s for s in slots_of_D[link.device] if old[s] == link.leaver and row[s] == link.leaver)
                row[slot] = link.expert
                arrivals.append((layer, link.expert, slot, link.device, link.leaver != EMPTY))
            for expert, d in gone[layer] + works[layer].surplus(range(devices) if done else staying):
                slot = next(s for s in slots_of_D[d] if row[s] == expert and old[s] == expert)
                row[slot] = EMPTY
                drops += [(layer, slot)] * (d < real)
            works[layer].go_on()
        rounds.append(Round(_senders(arrivals, held, node, both.kind_D, sent_D), tuple(drops)))
    last = int(slots_D[:real].sum())
    result = replace(after, slot_expert_LS=np.array(slot_expert, np.int32)[:, :last], num_devices=real,
                     slot_device_S=before.slot_device_S[:last])  # fmt: skip
    return MoveList(tuple(rounds), result, expert_bytes, staging)


class _LayerLegs(LayerMoves):
    """One layer that goes through some placements to the last.

    Parameters
    ----------
    have_ED, want_ED : as in :class:`LayerMoves`, of the whole.
    legs : number and slots [E, D] of each placement on the way, ``want_ED`` the last; none: the whole is one, number 0.
    """

    def __init__(self, have_ED: NDArray[Any], want_ED: NDArray[Any], legs: list[tuple[int, NDArray[Any]]]) -> None:
        self._later = deque(legs or [(0, want_ED)])
        self.number, first_ED = self._later.popleft()
        super().__init__(have_ED, first_ED)

    @property
    def arrived(self) -> bool:
        """Whether the leg is done."""
        return not (any(self.comers_D) or any(self.leavers_D))

    @property
    def done(self) -> bool:
        """Whether all legs are."""
        return self.arrived and not self._later

    def between_legs(self) -> list[tuple[int, int]]:
        """What nothing replaces leaves at once where another leg follows; (expert, device) of each."""
        return self.surplus(range(len(self.comers_D))) if self._later else []

    def go_on(self) -> bool:
        """To the next leg, if this one is done and there is another."""
        if not (self.arrived and self._later):
            return False
        self.number, want_ED = self._later.popleft()
        super().__init__(self.have_ED, want_ED)
        return True


def _fill_round(
    works: list[_LayerLegs], held: list[NDArray[np.int64]], slots_D: NDArray[np.int64], staging: int, real: int
) -> tuple[list[list[ChainMove]], list[list[tuple[int, int]]]]:
    """Step 2: of each layer, the links in this round and what drops between two legs; ``works`` are as after it.

    Legs in their order; of one, experts without a device come first.
    """
    budget = [staging] * len(slots_D)
    rooms = [(slots_D - have.sum(axis=0)).tolist() for have in held]
    links: list[list[ChainMove]] = [[] for _ in works]
    gone: list[list[tuple[int, int]]] = [[] for _ in works]
    dead = [set(np.flatnonzero(~have[:, :real].any(axis=1)).tolist()) for have in held]
    every = [set(range(len(have))) for have in held]
    turn = [(work.number, layer) for layer, work in enumerate(works) if not work.arrived]
    heapify(turn)
    while turn and (any(budget) or any(map(any, rooms))):
        group = [heappop(turn)]
        while turn and turn[0][0] == group[0][0]:
            group.append(heappop(turn))
        layers = [layer for _, layer in group]
        for some in filter(any, (dead, every)):
            _take_chains(works, layers, some, held, rooms, budget, links)
        for layer in layers:
            if not any(works[layer].comers_D):
                gone[layer] += works[layer].between_legs()
                if works[layer].go_on():
                    heappush(turn, (works[layer].number, layer))
    return links, gone


def _take_chains(
    works: list[_LayerLegs], layers: list[int], some: list[set[int]], held: list[NDArray[np.int64]],
    rooms: list[list[int]], budget: list[int], links: list[list[ChainMove]],
) -> None:  # fmt: skip
    """Chains of ``layers`` that begin with ``some`` of their experts, until no buffer and no slot helps any more."""
    again = True
    while again:
        again = False
        to_come = np.array([[len(comers) for comers in works[layer].comers_D] for layer in layers]).sum(axis=0)
        for d in np.argsort(-to_come, kind="stable").tolist():
            for layer in layers:
                work = works[layer]
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
