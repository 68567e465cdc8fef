"""Which rank sends which expert to whom in a sparse collective, in rounds. Pure: no communication here.

SparseAllGather (Hecate, arXiv 2502.02581, section 3.1). Before: every expert lies on its owner. After: every rank
holds what ``wanted_ED`` says. Every new holder receives an expert once, so that expert_bytes * (new holders) cross the
wire in every form, and no rank receives more than the experts that move (lambda S). SparseReduceScatter is the same
plan read backwards: gradients flow from every holder towards the owner and are summed on the way.

``direct``  the owner sends to every new holder, in one round: an owner of a hot expert sends many times.
``node``    once over the network into a node, then from that node's first holder to its others: two rounds.
``tree``    over the network, then inside the nodes, all who have an expert pass it on: about log2 rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from poise.cost.links import pair_ports, port_seconds
from poise.machine.cluster import Cluster
from poise.util.errors import OptionError, PlacementError

Form = Literal["auto", "direct", "node", "tree"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One expert from one rank to another."""

    expert: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """Transfers in rounds; what a round sends has arrived before it starts."""

    rounds: tuple[tuple[Transfer, ...], ...]
    form: str

    @property
    def count(self) -> int:
        """Transfers in all."""
        return sum(len(one) for one in self.rounds)

    def backwards(self) -> tuple[tuple[Transfer, ...], ...]:
        """Rounds of the reduction: from target to source, last round first.

        A round is split so that no more gradients arrive at a rank at once than the most replicas that any rank holds:
        the owner of an expert that all others hold needs no room for all of theirs.
        """
        moves = [move for one in self.rounds for move in one]
        held: dict[int, set[int]] = {}
        for move in moves:
            held.setdefault(move.target, set()).add(move.expert)
        most = max((len(experts) for experts in held.values()), default=1)
        out: list[tuple[Transfer, ...]] = []
        for one in reversed(self.rounds):
            parts: list[list[Transfer]] = []
            arrived: dict[int, int] = {}
            for move in one:
                part = arrived.get(move.source, 0) // most
                arrived[move.source] = arrived.get(move.source, 0) + 1
                while len(parts) <= part:
                    parts.append([])
                parts[part].append(Transfer(move.expert, move.target, move.source))
            out += [tuple(part) for part in parts]
        return tuple(out)

    def links_DD(self, num_devices: int) -> NDArray[np.int64]:
        """Experts from each rank to each other, int64 [D, D]."""
        out = np.zeros((num_devices, num_devices), np.int64)
        for one in self.rounds:
            for move in one:
                out[move.source, move.target] += 1
        return out

    def seconds(self, cluster: Cluster, expert_bytes: float) -> float:
        """Modelled time: each round its start-up and its fullest port."""
        return sum(_round_seconds(one, cluster, expert_bytes) for one in self.rounds)

    def back_seconds(self, cluster: Cluster, gradient_bytes: float) -> float:
        """Modelled time of the reduction, which has more rounds where an owner gets many gradients."""
        return sum(_round_seconds(one, cluster, gradient_bytes) for one in self.backwards())


def _round_seconds(moves: tuple[Transfer, ...], cluster: Cluster, expert_bytes: float) -> float:
    load = pair_ports([[(move.source, move.target) for move in moves]], cluster)
    wire = port_seconds(load, expert_bytes, cluster, cluster.plain_wire)[0]
    return float(wire + cluster.intra_latency_s + (cluster.inter_latency_s if load.net_out_BD.any() else 0.0))


def plan_transfers(
    owner_E: NDArray[np.int64],
    wanted_ED: NDArray[np.bool_],
    cluster: Cluster,
    *,
    expert_bytes: float = 1.0,
    form: Form = "auto",
) -> TransferPlan:
    """A plan that brings every expert from its owner to all of its holders.

    Parameters
    ----------
    owner_E : int64 [E], the rank each expert lies on.
    wanted_ED : bool [E, D], who is to hold it; the owner need not be among them.
    expert_bytes : bytes of one expert, for the choice of ``auto``: the form with the least modelled time.

    Raises
    ------
    PlacementError : shapes disagree. OptionError : unknown form.
    """
    if form not in get_args(Form):
        raise OptionError(f"unknown form {form!r}", hint=f"one of {', '.join(get_args(Form))}")
    if wanted_ED.shape != (len(owner_E), cluster.num_devices):
        raise PlacementError(f"holders have shape {wanted_ED.shape}, not {(len(owner_E), cluster.num_devices)}")
    moving = wanted_ED.copy()
    moving[np.arange(len(owner_E)), owner_E] = False
    if not moving.any():
        return TransferPlan((), "none")
    if form != "auto":
        return _PLANS[form](owner_E, moving, cluster.node_D)
    plans = [make(owner_E, moving, cluster.node_D) for make in _PLANS.values()]
    return min(plans, key=lambda plan: plan.seconds(cluster, expert_bytes))


def nearest_transfers(held_ED: NDArray[np.bool_], coming_ED: NDArray[np.bool_], cluster: Cluster) -> TransferPlan:
    """A plan of one round that brings each expert to its new holders from those that have it, bool [E, D] each.

    From the holder that has sent least, of the same node where there is one: what
    :func:`poise.cost.weights.fetch_seconds` prices.

    Raises
    ------
    PlacementError : nobody holds an expert that is to come.
    """
    sent_D, moves = np.zeros(cluster.num_devices, np.int64), []
    for expert, target in np.argwhere(coming_ED & ~held_ED).tolist():
        holders = np.flatnonzero(held_ED[expert]).tolist()
        if not holders:
            raise PlacementError(f"expert {expert} is to come to device {target}, and no device holds it")
        source = min(holders, key=lambda d: (cluster.node_D[d] != cluster.node_D[target], sent_D[d], d))
        sent_D[source] += 1
        moves.append(Transfer(expert, source, target))
    return TransferPlan((tuple(moves),) if moves else (), "nearest" if moves else "none")


def _direct(owner_E: NDArray[np.int64], moving_ED: NDArray[np.bool_], node_D: NDArray[np.int32]) -> TransferPlan:
    moves = tuple(Transfer(int(e), int(owner_E[e]), int(d)) for e, d in np.argwhere(moving_ED))
    return TransferPlan((moves,), "direct")


def _heads(
    owner_E: NDArray[np.int64], moving_ED: NDArray[np.bool_], node_D: NDArray[np.int32]
) -> list[tuple[int, int, list[list[int]]]]:
    """Of each moving expert: number, owner, and its new holders by node, own node first, the least busy first."""
    out, busy_D = [], np.zeros(len(node_D), np.int64)
    for e in np.flatnonzero(moving_ED.any(axis=1)):
        owner = int(owner_E[e])
        groups: dict[int, list[int]] = {int(node_D[owner]): []}
        for d in np.flatnonzero(moving_ED[e]):
            groups.setdefault(int(node_D[d]), []).append(int(d))
        for node, members in groups.items():
            members.sort(key=lambda d: (busy_D[d], d))
            if node != node_D[owner] and len(members) > 1:
                busy_D[members[0]] += len(members) - 1
        out.append((int(e), owner, list(groups.values())))
    return out


def _node(owner_E: NDArray[np.int64], moving_ED: NDArray[np.bool_], node_D: NDArray[np.int32]) -> TransferPlan:
    first, second = [], []
    for e, owner, groups in _heads(owner_E, moving_ED, node_D):
        first += [Transfer(e, owner, d) for d in groups[0]]
        for head, *rest in groups[1:]:
            first.append(Transfer(e, owner, head))
            second += [Transfer(e, head, d) for d in rest]
    return TransferPlan(tuple(tuple(one) for one in (first, second) if one), "node")


def _tree(owner_E: NDArray[np.int64], moving_ED: NDArray[np.bool_], node_D: NDArray[np.int32]) -> TransferPlan:
    rounds: list[list[Transfer]] = []
    for e, owner, groups in _heads(owner_E, moving_ED, node_D):
        heads = [owner, *(group[0] for group in groups[1:])]
        ready = {owner: 0}
        _spread(e, heads, ready, rounds)
        for i, group in enumerate(groups):
            _spread(e, [heads[i], *(d for d in group if d != heads[i])], ready, rounds)
    return TransferPlan(tuple(tuple(one) for one in rounds), "tree")


def _spread(expert: int, ranks: list[int], ready: dict[int, int], rounds: list[list[Transfer]]) -> None:
    """From the first of ``ranks`` to the others; ``ready`` is the round in which a rank can send next."""
    have = ranks[:1]
    for target in ranks[1:]:
        source = min(have, key=lambda d: (ready[d], ranks.index(d)))
        at = ready[source]
        while len(rounds) <= at:
            rounds.append([])
        rounds[at].append(Transfer(expert, source, target))
        ready[source] = ready[target] = at + 1
        have.append(target)


_PLANS = {"direct": _direct, "node": _node, "tree": _tree}
