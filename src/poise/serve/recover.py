"""Going on after ranks were lost: an engine of those that are left, by placements that were made beforehand.

Step 1  Every rank that is left says in the store that it is there, and waits for the others: those that wait for a rank
        that is not lost, but has left its step, learn of it when their operation times out. The first to have waited
        long enough writes down who is left: that holds.
Step 2  They make a process group of their own.
Step 3  Experts without a holder are read anew, each by the one rank that the loss names, and compared with what they
        were when they were loaded. Where one rank cannot, all raise. All others lie where they lay: serving can go on.
Step 4  Books are made one: ranks may be a step apart. A request keeps its keys and values where all agree that its home
        has them; what was at home on a lost rank runs again from its prompt, with the tokens it had, on the rank that
        has fewest. Tokens that were sampled stay.
Step 5  The copies that balance the rest come by a swap (:mod:`poise.serve.swap`) while steps go on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from poise.planning.losses import Loss, Losses
from poise.runtime.experts import Bank, ExpertKind
from poise.serve.engine import Engine
from poise.serve.model import Parts
from poise.serve.requests import Book, Request
from poise.util.errors import CommunicationError, PlacementError, told

ExpertSource = Callable[[int, int, ExpertKind], Bank]
"""(decoder layer, expert, kind) -> weights of one expert, as they were loaded."""
MARGIN_S, UNKNOWN = 10.0, timedelta(minutes=30)
"""Beyond the time-out, and that of a group that does not say its own: PyTorch's default."""


def recover(
    engine: Engine, losses: Losses, source: ExpertSource, *, gone: Sequence[int] = (), wait_s: float | None = None,
    store: Any = None,
) -> Engine:  # fmt: skip
    """The engine that goes on, after a step of ``engine`` raised CommunicationError; all ranks that are left call it.

    Its swap to the balanced placement is on its way; requests are those of the old engine, the same objects. A fast
    loop goes on at the price of the devices that are left, with the room that it was given last.

    Parameters
    ----------
    losses : what was prepared for the placement that serves.
    source : where experts are read anew (:func:`poise.serve.load.expert_source`).
    gone : ranks that are known to be lost, by who watches processes: nobody waits for them. All ranks are told alike.
    wait_s : how long a rank may take to say that it is there; default: the time-out of the group, and ten seconds.
    store : key-value store that all reach; default: the process group's. It must not lie on a lost rank.

    Raises
    ------
    CommunicationError : no rank is lost, this one was given up by the others, or what was read is not what was served.
    OptionError : nothing was prepared for these ranks.
    PlacementError : another placement serves than the losses are for.
    Whatever ``source`` raises on a rank, on that rank; CommunicationError with its words on the others.
    """
    ranks = dist.get_process_group_ranks(engine.group)
    engine.stop()
    if wait_s is None:
        wait_s = MARGIN_S + (engine.timeout or UNKNOWN).total_seconds()
    here = _left(engine, store if store is not None else dist.distributed_c10d._get_default_store(), gone, wait_s)
    lost = [rank for rank in range(len(ranks)) if rank not in here]
    if not lost:
        raise CommunicationError(f"all {len(ranks)} ranks are there: none was lost", hint="start the engine anew")
    if engine.placement.count_LED().tolist() != losses.before.count_LED().tolist():
        raise PlacementError("another placement serves than the losses were prepared for")
    loss = losses.of(lost)
    group = dist.new_group([ranks[rank] for rank in here], backend=dist.get_backend(engine.group),
                           use_local_synchronization=True, timeout=engine.timeout)  # fmt: skip
    first = loss.first_on_rest
    parts = Parts(engine.model.model, engine.kinds, _agreed(lambda: _banks(engine, loss, source), here, group), first)
    fast = None if engine.fast is None else replace(engine.fast, price=engine.fast.price.without(lost))
    new = Engine(
        parts, first, engine.cluster.without(lost), traffic=engine.traffic, split=engine.split, fast=fast,
        group=group, budget=engine.book.budget, most_live=engine.book.most_live, temperature=engine.temperature,
        seed=engine.seed, eos=engine.eos, clock=engine.clock,
    )  # fmt: skip
    new.model.cache = engine.model.cache
    new.book = _book(engine, new, here)
    new.steps.extend(engine.steps)
    if loss.copies:
        new.swap(loss.after_on_rest)
    return new


def _left(engine: Engine, store: Any, gone: Sequence[int], wait_s: float) -> list[int]:
    """Step 1: ranks of the engine's group that are left."""
    key = f"poise-left/{engine.group.group_name}/"
    names = [f"{key}{rank}" for rank in range(engine.ranks)]
    store.set(names[engine.rank], b"1")
    until, wanted = time.monotonic() + wait_s, [name for rank, name in enumerate(names) if rank not in gone]
    while time.monotonic() < until and not store.check(wanted) and not store.check([f"{key}all"]):
        time.sleep(0.02)
    mine = [rank for rank, name in enumerate(names) if store.check([name])]
    agreed: list[int] = json.loads(store.compare_set(f"{key}all", "", json.dumps(mine)))
    if engine.rank not in agreed:
        raise CommunicationError(f"rank {engine.rank} came too late: ranks {agreed} went on without it")
    return agreed


def _agreed(made: Callable[[], dict[int, Bank]], here: list[int], group: Any) -> dict[int, Bank]:
    """What is made on this rank, once all others have made theirs; else all raise: one its own error, whatever that is,
    the others what it says.
    """
    out: dict[int, Bank] = {}
    problem: Exception | None = None
    try:
        out = made()
    except Exception as error:  # also what a source raises that is not poise's: a file that is gone, no memory
        problem = error
    words: list[str | None] = [None] * len(here)
    dist.all_gather_object(words, None if problem is None else told(problem), group=group)
    if problem is not None:
        raise problem
    for rank, said in zip(here, words, strict=True):
        if said is not None:
            raise CommunicationError(f"rank {rank} cannot go on: {said}")
    return out


def _banks(engine: Engine, loss: Loss, source: ExpertSource) -> dict[int, Bank]:
    """Step 3: weights of this rank's slots of ``loss.first``."""
    out: dict[int, Bank] = {}
    for row, layer in enumerate(engine.layers):
        bank, kind = engine.experts[layer].bank, engine.kinds[layer]
        old, new = engine.placement.experts_of(row, engine.rank), loss.first.experts_of(row, engine.rank)
        rows: dict[str, list[Tensor]] = {name: [] for name in bank}
        for expert in new:
            if expert in old:
                mine = {name: weight[old.index(expert)] for name, weight in bank.items()}
            else:
                came = source(layer, expert, kind)
                mine = {name: came[name].to(weight) for name, weight in bank.items()}
                if engine.canary.wrong({(row, expert): {name: mine[name] for name in kind.shapes}}):
                    raise CommunicationError(
                        f"expert {expert} of layer {layer} was read anew and is not what was served"
                    )
            for name, weight in mine.items():
                rows[name].append(weight)
        out[layer] = {
            name: torch.stack(rows[name]) if new else weight[:0].clone() for name, weight in bank.items()
        }  # fmt: skip
    return out


def _book(engine: Engine, new: Engine, here: list[int]) -> Book:
    """Step 4: one book for the ranks that are left."""
    old = engine.book
    live = {number for queue in old.live for number in queue}
    mine = [{number: (request.tokens, request.cached, number in live) for number, request in old.requests.items()}]
    said: list[Any] = [None] * new.ranks
    dist.all_gather_object(said, mine[0], group=new.group)
    book = Book(new.ranks, old.budget, old.most_live, dict(old.requests))
    number_of = {rank: number for number, rank in enumerate(here)}
    load_R = np.zeros(new.ranks, np.int64)
    again: list[Request] = []
    for number, request in sorted(old.requests.items()):
        every = [each[number] for each in said]
        furthest = max(range(len(every)), key=[len(tokens) for tokens, _, _ in every].__getitem__)
        request.tokens[:] = every[furthest][0]
        held, home = all(each[2] for each in every), number_of.get(request.home)
        opened = number in live and (engine.traffic == "stay" or request.home == engine.rank)
        done = len(request.tokens) == request.room or (
            len(request.tokens) > request.prompt and request.tokens[-1] == engine.eos
        )
        if done or not held or (home is None and engine.traffic != "stay"):
            if opened:
                engine.model.cache.close(number)
            request.cached = len(request.tokens) if done else 0
        else:
            request.cached = min(cached for _, cached, _ in every)
        if done:
            continue
        if home is None:
            again.append(request)
            continue
        request.home = home
        load_R[home] += 1
        (book.live if held else book.waiting)[home].append(number)
    for request in again:
        request.home = int(load_R.argmin())
        load_R[request.home] += 1
        kept = engine.traffic == "stay" and all(each[request.number][2] for each in said)
        (book.live if kept else book.waiting)[request.home].append(request.number)
    return book
