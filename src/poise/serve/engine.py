"""Serve requests on several ranks: continuous batching, expert parallelism by any placement, placements that change.

All ranks call the same things in the same order, with the same prompts; each comes to the same tokens. A step runs the
tokens of all ranks together and ends with one small all-reduce: what was sampled, and who waits for weights.
"""

from __future__ import annotations

import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from poise.cost.split import Split
from poise.cost.traffic import DATA_FLOWS, DataFlow
from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.runtime.canary import Canary
from poise.runtime.collectives import lost, timeout_of, twin
from poise.runtime.device.padded import RowCapacity
from poise.serve.hostless import HostlessLayer, HostlessPolicy
from poise.serve.layer import Clock, ServedExperts, ServedLayer
from poise.serve.model import Parts, ServedModel, check_placement, take_apart
from poise.serve.replicas import empty_bank
from poise.serve.requests import Book, Request, pick
from poise.serve.split import ServingPolicy, check_loop
from poise.serve.swap import Swap, SwapRecord, align, by_row
from poise.util.errors import CommunicationError, OptionError

NONE = -1
RECORDS = 100_000
"""Steps whose records are kept."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step on one rank.

    Parameters
    ----------
    seconds : all of it, the stall included.
    tokens, local_tokens : that ran on all ranks, and that started on this one.
    sampled : new tokens of all requests.
    stall_s : seconds it waited for a swap of placements.
    swapping : whether weights were on their way.
    """

    seconds: float
    tokens: int
    local_tokens: int
    sampled: int
    stall_s: float
    swapping: bool


class Engine:
    """One rank of a served model.

    Parameters
    ----------
    model : a causal language model with all its experts (it is taken apart), or the parts that
        :func:`poise.serve.from_folder` read for this placement.
    placement : expert of every slot; devices are ranks.
    cluster : which ranks share a node.
    traffic : ``home``, ``home_device_dedup``, ``home_node_dedup`` or ``stay``.
    split : how replicas share tokens: ``even``, or ``near``, own rank and node first.
    fast : a step-wise policy with step replicas and its own token split; None: static. A :class:`HostlessPolicy` plans
        where weights lie, without the host on a GPU.
    group : process group whose ranks are the cluster's devices; default: all.
    budget : most tokens of one rank in a step; longer prompts run in chunks.
    most_live : most requests of one rank that hold keys and values at a time.
    temperature, seed : 0: greedy. Else tokens are drawn by seed, request and position, so alike under every flow.
    eos : token that ends a request; None: all run to their last token.
    clock : of an emulated device (:mod:`poise.lab.emulate`).

    Raises
    ------
    ModelError : a family that is not known, or experts of no known shape.
    PlacementError : a placement for another model or number of ranks.
    OptionError : an option out of range, or a fast loop that is priced for another number of devices.

    Warns
    -----
    RuntimeWarning : a layer without the host whose GPU's kernels refuse: the host plans it.
    """

    def __init__(
        self,
        model: nn.Module | Parts,
        placement: Placement,
        cluster: Cluster,
        *,
        traffic: DataFlow = "home",
        split: Split = "even",
        fast: ServingPolicy | HostlessPolicy | None = None,
        group: Any = None,
        budget: int = 512,
        most_live: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        eos: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise OptionError(
                f"the cluster has {cluster.num_devices} devices, and there is no process group",
                hint="torchrun starts the ranks, torch.distributed.init_process_group joins them",
            )
        self.group = group if group is not None else dist.group.WORLD
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if traffic not in DATA_FLOWS:
            raise OptionError(f"unknown data flow {traffic!r}", hint=f"one of {', '.join(DATA_FLOWS)}")
        if cluster.num_devices != self.ranks:
            raise OptionError(f"the cluster has {cluster.num_devices} devices, the process group {self.ranks} ranks")
        if not temperature >= 0:
            raise OptionError(f"temperature must be at least 0, got {temperature}")
        parts = model if isinstance(model, Parts) else take_apart(model, placement, self.rank)
        self.layers = sorted(parts.kinds)
        self._num_experts = placement.num_experts
        check_placement(placement, self.layers, parts.placement.num_experts, self.ranks)
        if (parts.placement.slot_expert_LS.tolist(), parts.placement.slot_device_S.tolist()) != (
            placement.slot_expert_LS.tolist(), placement.slot_device_S.tolist()
        ):  # fmt: skip
            raise OptionError("the parts were read for another placement", hint="give both the same one")
        self.placement, self.cluster, self.traffic, self.split = placement, cluster, traffic, split
        self.temperature, self.seed, self.eos, self.fast, self.clock = temperature, seed, eos, fast, clock
        self.book = Book(self.ranks, budget, most_live)
        self.kinds = parts.kinds
        like = next(iter(parts.banks[self.layers[0]].values()))
        kind = self.kinds[self.layers[0]]
        alike = all(other.shapes == kind.shapes for other in self.kinds.values())
        self._weights_group = None if fast is None else twin(self.group)
        config: Any = parts.model.config
        self._hostless: list[HostlessLayer] = []
        self.experts: dict[int, ServedExperts] = {}
        self._told_why: str | None = None
        if fast is not None:
            check_loop(fast.price, fast.prior_LE, (len(self.layers), self._num_experts), self.ranks)
        if isinstance(fast, HostlessPolicy):
            fast.check(traffic, split, clock is not None)
        if isinstance(fast, HostlessPolicy) and fast.runs_on(like):
            top_k = int(config.num_experts_per_tok)
            self._hostless = [
                HostlessLayer(row, self.kinds[layer], parts.banks[layer], placement, cluster, fast, tokens=budget,
                              top_k=top_k, group=self.group, weights_group=self._weights_group)
                for row, layer in enumerate(self.layers)
            ]  # fmt: skip
            self.experts = dict(zip(self.layers, self._hostless, strict=True))
            self._tell_why()
        else:
            loop = fast.elsewhere() if isinstance(fast, HostlessPolicy) else fast
            step_bank = empty_bank(kind, loop.step_slots, like) if loop is not None and alike else None
            self.experts = {
                layer: ServedLayer(row, self.kinds[layer], parts.banks[layer], placement, cluster, traffic=traffic,
                                   split=split, group=self.group, weights_group=self._weights_group, fast=loop,
                                   step_bank=step_bank, clock=clock)
                for row, layer in enumerate(self.layers)
            }  # fmt: skip
        self.model = ServedModel(parts, self.experts, traffic, self.group)
        self.steps: deque[StepRecord] = deque(maxlen=RECORDS)
        self.swaps: list[SwapRecord] = []
        self._swap: Swap | None = None
        self._setup_s = 0.0
        self.remember_weights()

    @property
    def busy(self) -> bool:
        """Whether a request is not done."""
        return self.book.busy

    @property
    def swapping(self) -> bool:
        """Whether a swap is on its way."""
        return self._swap is not None

    @property
    def timeout(self) -> timedelta | None:
        """How long operations of the group wait; None where its backend does not say."""
        return timeout_of(self.group)

    def submit(self, prompt: Sequence[int], max_new_tokens: int, *, home: int | None = None) -> Request:
        """Take in a request, on all ranks alike; it starts with the next step. ``home``: its rank, default in turn."""
        return self.book.add([int(token) for token in prompt], max_new_tokens, home)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        homes: Sequence[int] | None = None,
        before_step: Callable[[Engine], None] | None = None,
    ) -> list[list[int]]:
        """Submit and run to the end: the sampled tokens of each prompt, the same on every rank.

        ``before_step`` is called with the engine before each step, on all ranks, and may swap placements.
        """
        if homes is not None and len(homes) != len(prompts):
            raise OptionError(f"{len(homes)} homes for {len(prompts)} prompts")
        mine = [
            self.submit(prompt, max_new_tokens, home=None if homes is None else homes[i])
            for i, prompt in enumerate(prompts)
        ]
        while self.busy:
            if before_step is not None:
                before_step(self)
            self.step()
        return [request.sampled for request in mine]

    def step(self) -> StepRecord:
        """Run one step with all other ranks; without tokens it only brings a swap forward.

        Raises
        ------
        CommunicationError : a rank was lost.
        OptionError : ranks were given different requests.
        CapacityError : a layer without the host had no room, on all ranks; the step can be run again with more
            (:meth:`give_room`).
        """
        start = time.perf_counter()
        swap = self._swap
        stall = swap.advance() if swap is not None else 0.0
        for request in self.book.admit():
            if self.traffic == "stay" or request.home == self.rank:
                self.model.cache.open(request.number, request.room)
        batch = self.book.batch()
        ends = self.book.ends(batch)
        want = batch.last_tags()[ends]
        mine = torch.full((len(want) + 2,), NONE, dtype=torch.int64)
        if batch.num_tokens:
            tags, logits = self.model.forward(batch, want)
            for place, row in zip(np.searchsorted(want, tags).tolist(), logits, strict=True):
                chunk = batch.chunks[ends[place]]
                position = chunk.first + len(chunk.tokens)
                mine[place] = pick(row, self.temperature, self.seed, chunk.request, position)
        mine[-2] = int(swap is not None and not swap.complete)
        if swap is not None and swap.wrong:
            layer, expert = swap.wrong[0]
            mine[-1] = layer * self._num_experts + expert
        *tokens, incomplete, wrong = self._agree(mine, batch.token_T)
        sampled = {batch.chunks[i].request: token for i, token in zip(ends, tokens, strict=True)}
        for request in self.book.advance(batch, sampled, self.eos):
            if self.traffic == "stay" or request.home == self.rank:
                self.model.cache.close(request.number)
        if swap is not None and wrong != NONE:
            self._give_up(swap, divmod(wrong, self._num_experts))
        elif swap is not None and not incomplete:
            stall += self._switch(swap)
        record = StepRecord(
            time.perf_counter() - start, batch.num_tokens, len(batch.tags(self.rank)), len(sampled), stall,
            swap is not None,
        )  # fmt: skip
        self.steps.append(record)
        return record

    def _agree(self, mine: Tensor, token_T: Any) -> list[int]:
        """The largest of each number over the ranks. Ranks whose steps differ, and layers without the host that had no
        room, are found out here.
        """
        check = zlib.crc32(token_T.tobytes())
        both = torch.cat([mine, torch.tensor([check, -check])]).to(self.model.device)
        if self._hostless:  # read here, where the host waits in any case
            needs_L2 = torch.stack([served.layer.need for served in self._hostless])
            both = torch.cat([needs_L2.amax(0).to(both), both])
            for served in self._hostless:
                served.layer.need.zero_()
        try:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        except RuntimeError as error:
            raise CommunicationError(*lost(error)) from error
        *agreed, high, low = (int(value) for value in both.tolist())
        if high != -low:
            raise OptionError("ranks run different tokens", hint="submit the same requests on all ranks, in one order")
        if self._hostless:
            pair, computed, *agreed = agreed
            self._hostless[0].layer.judge(pair, computed)
        return agreed

    def swap(self, placement: Placement, *, bytes_per_step: int = 2**26) -> None:
        """Start to move to another placement, on all ranks alike, between two steps; see :mod:`poise.serve.swap`.

        Steps go on meanwhile; all layers switch at the end of a later one, the same on all ranks. Slots may be
        renumbered inside ranks: ``placement`` of the engine then tells. Where a copy is not what its expert was when it
        was loaded, all ranks keep the old placement: a warning says so, and the last of ``swaps``.

        Parameters
        ----------
        placement : of the same model and ranks; slots a rank may differ.
        bytes_per_step : most that one rank sends, or receives, in one step (but one expert at least).

        Raises
        ------
        OptionError : a swap is on its way.
        PlacementError : the placement is for another model or number of ranks, or layers without the host cannot serve
            by it.
        """
        if self._swap is not None:
            raise OptionError("a swap is on its way already", hint="step until `swapping` is False")
        start = time.perf_counter()
        check_placement(placement, self.layers, self._num_experts, self.ranks)
        after = align(self.placement, placement)
        for served in self.experts.values():
            served.check(after)
        if self._weights_group is None:
            self._weights_group = twin(self.group)
        banks = by_row({layer: served.bank for layer, served in self.experts.items()})
        kinds = [self.kinds[layer] for layer in self.layers]
        self._swap = Swap(self.placement, after, banks, kinds, self.cluster.node_D, self._weights_group,
                          bytes_per_step, self.canary)  # fmt: skip
        self._setup_s = time.perf_counter() - start

    def give_room(self, capacity: RowCapacity | None = None) -> None:
        """Other room for rows of tokens in layers without the host, on all ranks alike, between two steps.

        None: enough for every routing.
        """
        if isinstance(self.fast, HostlessPolicy):
            self.fast = replace(self.fast, capacity=capacity)
        for served in self._hostless:
            served.give_room(capacity)

    def remember_weights(self) -> None:
        """Take the weights as they are for right, on all ranks: copies must equal them. Called again after whoever
        changes them, between two steps and outside of a swap.

        Raises
        ------
        CommunicationError : replicas of an expert differ.
        """
        banks = [self.experts[layer].bank for layer in self.layers]
        held = [self.placement.experts_of(row, self.rank) for row in range(len(banks))]

        def weights(layer: int, slot: int) -> list[Tensor]:
            return [banks[layer][name][slot] for name in self.kinds[self.layers[layer]].shapes]

        self.canary = Canary.of(held, weights, self._num_experts, self.group, self.model.device)

    def stop(self) -> None:
        """Leave the model to another engine on this rank; a swap on its way is forgotten."""
        self._swap = None
        self.model.detach()

    def _give_up(self, swap: Swap, wrong: tuple[int, int]) -> None:
        """A copy is not right on some rank: the old placement serves on, on all."""
        layer, expert = wrong
        warnings.warn(
            f"the swap was given up: a copy of expert {expert} of MoE layer {layer} is not what was loaded",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip
        self._swap = None
        self.swaps.append(swap.record(self._setup_s, wrong))

    def _switch(self, swap: Swap) -> float:
        """All ranks have all: from the next step on the new placement serves.

        Rows are written over where a layer has as many as before, so what may fail comes before the first of them.
        """
        start = time.perf_counter()
        ready = [self.experts[layer].ready_for(swap.after) for layer in self.layers]
        for served in self.experts.values():
            served.settle()
        for serve, bank in zip(ready, swap.apply(), strict=True):
            serve(bank)
        self.placement = swap.after
        self._tell_why()
        self._swap = None
        self.swaps.append(swap.record(self._setup_s))
        return time.perf_counter() - start

    def _tell_why(self) -> None:
        """Warn once where the host plans layers that were to do without it."""
        why = next((served.why for served in self._hostless if served.why is not None), None)
        if why is not None and why != self._told_why:
            warnings.warn(f"the host plans layers that were to do without it: {why}", RuntimeWarning, stacklevel=3)
        self._told_why = why
