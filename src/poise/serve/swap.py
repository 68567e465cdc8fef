"""From one placement to another while steps go on: weights come in rounds, then all layers switch at one step boundary.

Step 1  Every rank works out the same list: who lacks which expert of which layer, and from whom it comes (a holder in
        the same node first, then the one that has sent least; experts with the fewest holders choose first). In a round
        a rank sends to one peer and receives from one (:mod:`poise.control.peers`), an expert each; a step has one
        round, or as many as fit ``bytes_per_step``.
Step 2  Between two steps a rank waits for the round before and posts the next one, over a process group of its own. So
        a transfer has one whole step to run in, and only what is left of it then stalls the step.
        What the round before brought is compared with what its experts were when they were loaded
        (:mod:`poise.runtime.canary`).
Step 3  Nothing of the old placement goes before every rank has said, in the all-reduce of a step, that it has all. One
        copy that is not right, on any rank, and all give the swap up: the old placement serves on.
Step 4  Then rows are put in place. Experts that stay keep their row, so where a rank holds as many as before only
        what came is copied; else the layer's stack is made anew.

Memory beyond the old placement: the experts that come, and one layer's stack while it is made anew.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from poise.control.peers import peer_rounds
from poise.planning.placement import EMPTY, Placement
from poise.replay.moving import moving
from poise.runtime.canary import Canary
from poise.runtime.collectives import Batch, Operation, next_tag
from poise.runtime.experts import Bank, ExpertKind
from poise.util.errors import OptionError


class ExpertTransfer(NamedTuple):
    """One expert of one layer (its row in the placement), from a rank to a rank."""

    layer: int
    expert: int
    source: int
    target: int


@dataclass(frozen=True, slots=True, eq=False)
class SwapRecord:
    """What a swap took on this rank.

    Parameters
    ----------
    rounds : of transfers; one a step.
    steps : that ran between the call and the switch.
    fetched, sent : experts.
    bytes_fetched : weights that came.
    bytes_staged : most memory taken beyond the old placement.
    wait_s, apply_s : seconds that steps waited for transfers, and for the switch.
    worst_s : most that one step was held up.
    setup_s : seconds in the call itself.
    wrong : layer (its row in the placement) and expert of a copy that was not right, for which all ranks gave the swap
        up; None: it took place.
    """

    rounds: int
    steps: int
    fetched: int
    sent: int
    bytes_fetched: int
    bytes_staged: int
    wait_s: float
    apply_s: float
    worst_s: float
    setup_s: float
    wrong: tuple[int, int] | None = None

    @property
    def stall_s(self) -> float:
        """Seconds that tokens waited for the swap."""
        return self.wait_s + self.apply_s


def align(before: Placement, after: Placement) -> Placement:
    """``after`` with slots renumbered inside devices, so that an expert that stays on a device keeps its row."""
    slots = np.full_like(after.slot_expert_LS, EMPTY)
    for layer in range(after.num_layers):
        for device in range(after.num_devices):
            old, new = before.experts_of(layer, device), after.experts_of(layer, device)
            left = Counter(new)
            rows = [EMPTY] * len(new)
            for row, expert in enumerate(old[: len(new)]):
                if left[expert] > 0:
                    rows[row] = expert
                    left[expert] -= 1
            coming = iter(sorted(left.elements()))
            rows = [next(coming) if expert == EMPTY else expert for expert in rows]
            first = int(np.searchsorted(after.slot_device_S, device))
            slots[layer, first : first + len(rows)] = rows
    return replace(after, slot_expert_LS=slots)


def fetches(before: Placement, after: Placement, node_D: NDArray[np.int32]) -> list[ExpertTransfer]:
    """Step 1: what each rank lacks, and a holder that sends it (:func:`poise.replay.moving.moving`)."""
    plan = moving(before, after, node_D)
    return [ExpertTransfer(layer, *astuple(one)) for layer, each in enumerate(plan.transfers) for one in each]


def fill_rounds(
    moves: list[ExpertTransfer], bytes_L: list[int], num_ranks: int, bytes_per_step: int
) -> list[list[ExpertTransfer]]:
    """Step 1: transfers of each step; a rank sends, or receives, at most so many bytes, or else one expert."""
    steps: list[list[ExpertTransfer]] = []
    used = 0
    for one in peer_rounds([(move.source, move.target) for move in moves], num_ranks):
        size = max(bytes_L[moves[number].layer] for number in one)
        if not steps or used + size > bytes_per_step:
            steps.append([])
            used = 0
        steps[-1] += [moves[number] for number in one]
        used += size
    return steps


class Swap:
    """One swap on its way on one rank. The rounds are the same on all ranks, and so is when each is posted.

    Parameters
    ----------
    before, after : placements; ``after`` aligned (:func:`align`).
    banks, kinds : this rank's weights and the shapes of experts, one a layer of the placement.
    node_D : int [D], node of each rank.
    group : process group for weights alone: on NCCL what runs on one communicator is ordered.
    bytes_per_step : see step 1.
    canary : what every expert was when it was loaded.
    """

    def __init__(
        self, before: Placement, after: Placement, banks: list[Bank], kinds: list[ExpertKind],
        node_D: NDArray[np.int32], group: Any, bytes_per_step: int, canary: Canary,
    ) -> None:  # fmt: skip
        if bytes_per_step < 1:
            raise OptionError(f"bytes_per_step must be at least 1, got {bytes_per_step}")
        self.before, self.after, self.banks, self.kinds, self.group = before, after, banks, kinds, group
        self.rank = dist.get_rank(group)
        self._canary = canary
        self._unseen: list[tuple[int, int]] = []
        self.wrong: list[tuple[int, int]] = []
        self._bytes_L = [
            sum(math.prod(shape) * bank[name].element_size() for name, shape in kind.shapes.items())
            for bank, kind in zip(banks, kinds, strict=True)
        ]
        self.rounds = fill_rounds(fetches(before, after, node_D), self._bytes_L, before.num_devices, bytes_per_step)
        self.arrived: dict[tuple[int, int], Bank] = {}
        self.bytes_moved = 0
        self.wait_s, self.apply_s, self.worst_s, self.steps, self.sent = 0.0, 0.0, 0.0, 0, 0
        self._tag = next_tag(group)
        self._batch: Batch | None = None
        self._posted = 0
        self._stack_bytes = 0

    @property
    def complete(self) -> bool:
        """Whether this rank has all that it needs, and has looked at it."""
        return self._posted == len(self.rounds) and self._batch is None

    def advance(self) -> float:
        """Between two steps: wait for the round before, post the next; seconds this took (step 2)."""
        start = time.perf_counter()
        if self._batch is not None:
            self._batch.wait()
            self.wrong += self._canary.wrong({place: self.arrived[place] for place in self._unseen})
        self._batch, self._unseen = None, []
        if self._posted < len(self.rounds):
            self._batch = Batch(self._operations(self.rounds[self._posted]), self.group)
            self._posted += 1
        seconds = time.perf_counter() - start
        self.wait_s += seconds
        self.worst_s = max(self.worst_s, seconds)
        self.steps += 1
        return seconds

    def _operations(self, moves: list[ExpertTransfer]) -> list[Operation]:
        receives, sends = [], []
        for move in moves:
            bank = self.banks[move.layer]
            if move.target == self.rank:
                rows = {name: bank[name].new_empty(shape) for name, shape in self.kinds[move.layer].shapes.items()}
                self.arrived[move.layer, move.expert] = rows
                self._unseen.append((move.layer, move.expert))
                self.bytes_moved += self._bytes_L[move.layer]
                receives += [Operation(False, row, move.source, self._tag) for row in rows.values()]
            elif move.source == self.rank:
                row = self.before.experts_of(move.layer, self.rank).index(move.expert)
                self.sent += 1
                names = self.kinds[move.layer].shapes
                sends += [Operation(True, bank[name][row], move.target, self._tag) for name in names]
        return receives + sends

    def apply(self) -> Iterator[Bank]:
        """Put what came in place (step 4): layer by layer its bank, which serves by the new placement from then on.

        The bank before it holds the same memory, or may go once this one is taken.
        """
        for layer in range(self.before.num_layers):
            start = time.perf_counter()
            bank = self._layer(layer)
            self.apply_s += time.perf_counter() - start
            yield bank
        self.worst_s = max(self.worst_s, self.apply_s)

    def _layer(self, layer: int) -> Bank:
        old, new = self.before.experts_of(layer, self.rank), self.after.experts_of(layer, self.rank)
        bank = self.banks[layer]
        if old == new:
            return bank
        same = len(old) == len(new)
        out = bank if same else {name: weight.new_empty((len(new), *weight.shape[1:])) for name, weight in bank.items()}
        for row, expert in enumerate(new):
            if same and old[row] == expert:
                continue
            for name, weight in out.items():
                came = self.arrived.get((layer, expert))
                weight[row].copy_(bank[name][old.index(expert)] if came is None else came[name])
        if not same:
            self._stack_bytes = max(self._stack_bytes, sum(weight.nbytes for weight in out.values()))
        self.banks[layer] = out  # the old stack may go, before the next layer's is made
        return out

    def record(self, setup_s: float, wrong: tuple[int, int] | None = None) -> SwapRecord:
        """What it took, once applied or given up for a copy that is ``wrong``."""
        return SwapRecord(
            len(self.rounds), self.steps, len(self.arrived), self.sent, self.bytes_moved,
            self.bytes_moved + self._stack_bytes, self.wait_s, self.apply_s, self.worst_s, setup_s, wrong,
        )  # fmt: skip


def by_row(banks: Mapping[int, Bank]) -> list[Bank]:
    """Banks in the order of the placement's layers."""
    return [banks[layer] for layer in sorted(banks)]
