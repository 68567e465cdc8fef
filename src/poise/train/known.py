"""What all ranks know of micro-batches to come: each rank's part of a rollout is counted, and the counts are shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from poise.train.foresight import MAX_LOADS, MicroBatch
from poise.train.meeting import tried
from poise.train.rollout import UNKNOWN, Rollout
from poise.train.run import RunState
from poise.util.errors import ModelError, OptionError

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
        picks that cannot be replayed, a forced balance, too much to know at a time, or whatever else fails while they
        are read.
    CommunicationError : ranks give different numbers of micro-batches, or do not agree on replaying.
    """
    ranks, layers, experts = run.deployment.cluster.num_devices, len(run.layers), run.layers[0].num_experts
    found, problem = tried(lambda: _counted(run, rollout, micro_batches, replay), "foresee",
                           "micro_batches is a list of int arrays on the CPU, one number a token")  # fmt: skip
    mine = found or []
    run.meeting.meet(DOING, problem=problem, more=(("micro-batches", len(mine)), ("replay", replay)))
    out = []
    for number, one in enumerate(mine):
        told = run.meeting.meet(DOING, number=number, numbers_X=one.counts_X)
        load_LSE = told[:, :-1].reshape(ranks, layers, experts).transpose(1, 0, 2).astype(np.int32)
        load_LSE.flags.writeable = False
        sure = replay and not told[:, -1].any()
        out.append(
            MicroBatch(first_key + number, number, load_LSE, sure, one.tokens, rollout.trace.top_k, one.experts_TLK)
        )
    return out


class _Mine(NamedTuple):
    """What this rank knows of one micro-batch: recorded pairs [L * E] with unknown tokens, and what it replays."""

    tokens: int
    counts_X: torch.Tensor
    experts_TLK: torch.Tensor | None


def _counted(
    run: RunState, rollout: Rollout, micro_batches: Sequence[NDArray[np.int64]], replay: bool
) -> list[_Mine]:  # fmt: skip
    layers, experts = len(run.layers), run.layers[0].num_experts
    ranks, device = run.deployment.cluster.num_devices, run.deployment.device
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
    out = []
    for given in micro_batches:
        rows_T = rollout.within(given)
        counts_X = np.append(rollout.counts(rows_T).reshape(-1), (rows_T == UNKNOWN).sum())
        replayed = torch.from_numpy(rollout.experts(rows_T)).to(device) if replay else None
        out.append(_Mine(len(rows_T), torch.from_numpy(counts_X).to(device), replayed))
    return out
