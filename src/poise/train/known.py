"""What all ranks know of micro-batches to come: each rank's part of a rollout is counted, and the counts are shared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from poise.train.foresight import MAX_LOADS, MicroBatch
from poise.train.rollout import UNKNOWN, Rollout
from poise.train.run import RunState
from poise.util.errors import ModelError, OptionError, PoiseError

DOING = "routing known ahead"


def known_ahead(
    run: RunState, rollout: Rollout, micro_batches: Sequence[NDArray[np.int64]], replay: bool, first_key: int
) -> list[MicroBatch]:
    """Micro-batches with the loads of all ranks. Collective: every rank gives as many, of its own tokens.

    Parameters
    ----------
    run : whose forward passes they will be.
    rollout : this rank's record.
    micro_batches : of each, which recorded token every token of this rank is, int [T] or [B, S].
    replay : the record replaces the router's choice.
    first_key : the key of the first one; the next ones count on.

    Raises
    ------
    PoiseError : on every rank, what is wrong on one: a record of other layers or experts, rows that it does not have,
        picks that cannot be replayed, a forced balance, or too much to know at a time.
    CommunicationError : ranks give different numbers of micro-batches, or do not agree on replaying.
    """
    layers, experts = len(run.layers), run.layers[0].num_experts
    ranks, device = run.deployment.cluster.num_devices, run.deployment.device
    problem: PoiseError | None = None
    rows: list[NDArray[np.int64]] = []
    replayed: list[torch.Tensor | None] = []
    try:
        if not isinstance(rollout, Rollout):
            raise ModelError(f"a rollout is a poise.train.Rollout, got {type(rollout).__name__}")
        rollout.fits(layers, experts)
        if run.settings.force_balance:
            raise OptionError("a forced balance leaves no routing to know ahead", hint="force_balance=False")
        if (numbers := len(micro_batches) * layers * ranks * experts) > MAX_LOADS:
            raise OptionError(
                f"{numbers} loads of {len(micro_batches)} micro-batches, at most {MAX_LOADS} are known at a time",
                hint="give those of one optimizer step",
            )
        rows = [rollout.within(given) for given in micro_batches]
        replayed = [torch.from_numpy(rollout.experts(rows_T)).to(device) if replay else None for rows_T in rows]
    except PoiseError as error:
        problem = error
    run.meeting.meet(DOING, problem=problem, more=(("micro-batches", len(micro_batches)), ("replay", replay)))
    out = []
    for number, (rows_T, experts_TLK) in enumerate(zip(rows, replayed, strict=True)):
        counts_LE, unknown = rollout.counts(rows_T), int((rows_T == UNKNOWN).sum())
        mine = torch.from_numpy(np.append(counts_LE.reshape(-1), unknown)).to(device)
        told = run.meeting.meet(DOING, number=number, numbers_X=mine)
        load_LSE = told[:, :-1].reshape(ranks, layers, experts).transpose(1, 0, 2).astype(np.int32)
        load_LSE.flags.writeable = False
        sure = replay and not told[:, -1].any()
        out.append(
            MicroBatch(first_key + number, number, load_LSE, sure, len(rows_T), rollout.trace.top_k, experts_TLK)
        )
    return out
