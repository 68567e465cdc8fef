"""Cases about exchanges of tokens: both ways in which rows travel on gloo, and what is on its way when a rank raises."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_recompute import checkpoint_retained, checkpoint_same_layer_twice
from tests.train.support_routing import (
    alone,
    experts_that_fail_on_one_rank,
    odd,
    said_by_all,
    some_pairs_without_an_expert,
)
from tests.train.support_runs import EXACT, mine, record_of_dense, shard
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from poise.runtime import collectives
from poise.util.errors import CommunicationError, ModelError


@case
def rows_that_travel_as_long_and_as_short_messages() -> dict:
    """Any splits, by messages of their own and by one collective: the same rows; and a run of training either way."""
    group, world, rank = dist.new_group(), dist.get_world_size(), dist.get_rank()
    rng, errors = np.random.default_rng(7), {}
    for most_bytes in (-1, collectives.SHORT):
        with h.messages(most_bytes):
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
    assert max(errors.values()) <= EXACT, errors
    return {str(key): error for key, error in errors.items()}


def on_its_way(run: Any) -> int:
    """Batches of tokens that nobody has waited for, on any rank."""
    return int(c.agreed(float(len(collectives._lines[run.schedule.deployment.tokens_group].held))))


@case
def a_problem_of_one_rank_leaves_nothing_on_its_way() -> dict:
    """Gradients have left when a rank says what is wrong, or what it does otherwise: all raise, and the next steps are
    right. Held by the errors' frames, what was on its way would be waited for by nobody.
    """
    said: dict[str, str] = {}

    def of_weights(model: nn.Module, run: Any) -> None:
        loss = h.loss_of(model, mine())
        torch.autograd.grad(loss, model.blocks[-1].experts.down_proj) if odd() else loss.backward()

    def unsynchronised(model: nn.Module, run: Any) -> None:
        run.set_requires_gradient_sync(not odd())
        h.loss_of(model, mine()).backward()

    for kind, wrong in ((ModelError, of_weights), (CommunicationError, unsynchronised)):
        with h.messages(-1):
            model = h.build()
            run = shard(model, policy="expert-parallelism")
            said[wrong.__name__] = c.raised(kind, partial(wrong, model, run)).splitlines()[0]
            assert on_its_way(run) == 0, wrong
            model.zero_grad()
            run.set_requires_gradient_sync(True)
            error = c.follow(model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), average=True)
            assert error <= EXACT, (wrong, error)
    return said


@case
def ranks_apart_begin_no_other_exchange() -> dict:
    """Some go backward when others go forward, or through another layer: an error on all ranks, and no time-out. Where
    gradients were on their way as messages, the run is over, as what is left would be taken for what comes next; those
    that go by a collective wait until ranks have met, so that nothing is left and the group goes on, and the run with
    it if all have begun equally many passes.
    """
    said: dict[str, str] = {}

    def forward(model: nn.Module) -> None:
        loss = h.loss_of(model, mine())
        h.loss_of(model, mine(1)) if odd() else loss.backward()

    def another_layer(model: nn.Module) -> None:
        data = mine()
        x = model.blocks[0](data.x, data.ids[0])
        y = model.blocks[1](x, data.ids[1])
        (x if odd() else y).sum().backward()

    for most_bytes in (-1, collectives.SHORT):
        for apart in (forward, another_layer):
            with h.messages(most_bytes):
                model = h.build()
                run = alone(model, "expert-parallelism")
                group = run.schedule.deployment.tokens_group
                key = f"{apart.__name__}, {most_bytes}"
                assert "out of step" in said_by_all(partial(apart, model))
                mine_1 = torch.ones(1, dtype=torch.int64)
                ones = [1] * dist.get_world_size()
                if most_bytes > 0:
                    assert collectives.gather_rows(mine_1 + dist.get_rank(), ones, group).tolist() == [
                        1 + rank for rank in range(len(ones))
                    ]
                    loss = c.plain_loss("hot-expert-a-rank")
                    if apart is forward:  # the run has counted unequally many passes: another one on the group goes on
                        assert "out of step" in said_by_all(lambda model=model: h.loss_of(model, mine(2)))
                        model = h.build()
                        run = shard(model, mesh=DeviceMesh.from_group(group, "cpu"), policy="expert-parallelism")
                    model.zero_grad()
                    error = c.follow(model, run, record_of_dense(), loss, average=True)
                    assert error <= EXACT, (key, error)
                    continue
                said[key] = said_by_all(lambda model=model: h.loss_of(model, mine(2)))
                assert "exchange nothing any more" in said[key], said
                assert said_by_all(lambda g=group, one=mine_1, n=ones: collectives.gather_rows(one, n, g)) == said[key]
    return said


@case
def all_counts_of_exchanges_agree() -> dict:
    """Both ways count: a rank that leaves out an exchange of either is seen at the next meeting."""
    said = {}
    for most_bytes in (-1, collectives.SHORT):
        with h.messages(most_bytes):
            model = h.build()
            run = alone(model, "expert-parallelism")
            group = run.schedule.deployment.tokens_group
            h.loss_of(model, mine()).backward()
            before = collectives.exchanges(group)
            assert before == 4 * h.LAYERS, before  # there and back, forward and backward
            if not odd():
                collectives.Arriving(torch.empty(0, 3), [0] * dist.get_world_size(), group, 0)
            said[str(most_bytes)] = said_by_all(lambda model=model: h.loss_of(model, mine(1)))
            expected = f"exchanges of tokens: {before} on rank 1, {before + 1} on rank 0"
            assert expected in said[str(most_bytes)], said
    return said


@case
def hard_cases_by_messages_of_their_own() -> dict:
    """The models of the tests are small, so that their rows go by one collective: here every exchange is of messages."""
    hard = (checkpoint_retained, experts_that_fail_on_one_rank, some_pairs_without_an_expert)
    with h.messages(-1):
        return {one.__name__: one() for one in few_or((*hard, checkpoint_same_layer_twice), hard)}
