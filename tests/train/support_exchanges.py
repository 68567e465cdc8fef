"""Cases about exchanges of tokens: both ways in which rows travel on gloo, and what is on its way when a rank raises."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_runs import EXACT, mine, record_of_dense, shard

from poise.runtime import collectives
from poise.util.errors import ModelError


@case
def rows_that_travel_as_long_and_as_short_messages() -> dict:
    """Any splits, by messages of their own and by one collective: the same rows; and a run of training either way."""
    group, world, rank = dist.new_group(), dist.get_world_size(), dist.get_rank()
    rng = np.random.default_rng(7)
    short, errors = collectives.SHORT, {}
    try:
        for most_bytes in (-1, short):
            collectives.SHORT = most_bytes
            for rows_DD in (
                rng.integers(0, 5, (world, world)),
                np.zeros((world, world), int),
                np.eye(world, dtype=int),
            ):
                all_DD = [[torch.arange(n * 3.0).view(n, 3) + 100 * s + 10 * d for d, n in enumerate(row)]
                          for s, row in enumerate(rows_DD.tolist())]  # fmt: skip
                coming = collectives.Arriving(torch.empty(0, 3), rows_DD[:, rank].tolist(), group, int(rows_DD.max()))
                got = coming.send(torch.cat(all_DD[rank]), rows_DD[rank].tolist()).wait()
                assert torch.equal(got, torch.cat([all_DD[s][rank] for s in range(world)]))
            model = h.build()
            run = shard(model, policy="full-replication", rematerialise=True)
            errors[most_bytes] = c.follow(
                model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), average=True
            )
    finally:
        collectives.SHORT = short
    assert max(errors.values()) <= EXACT, errors
    return {str(key): error for key, error in errors.items()}


@case
def a_problem_of_one_rank_leaves_nothing_on_its_way() -> dict:
    """Gradients have left when a rank says what is wrong with its backward: all raise, and the next steps are right."""
    short, model = collectives.SHORT, h.build()
    run = shard(model, policy="expert-parallelism")

    def backward() -> None:
        loss = h.loss_of(model, mine())
        torch.autograd.grad(loss, model.blocks[-1].experts.down_proj) if dist.get_rank() == 1 else loss.backward()

    try:
        collectives.SHORT = -1
        said = c.raised(ModelError, backward)
        model.zero_grad()
        error = c.follow(model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), average=True)
    finally:
        collectives.SHORT = short
    assert error <= EXACT, error
    return {"error": error, "said": said.splitlines()[0]}
