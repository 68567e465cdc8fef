"""Routing known ahead: rollouts and their rows, micro-batches dealt anew, and sharded runs on two processes."""

import copy
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.foresight_cases import MINE
from tests.train.test_owner_plans import loaded, planner

from poise.machine.cluster import from_preset
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.stepwise.regroup import even_out
from poise.stepwise.sharding import Balanced
from poise.train import Rollout, regrouped
from poise.train.foresight import MicroBatch, replay_routers
from poise.train.owned import OwnedExperts
from poise.train.owner_plans import OwnerPlans
from poise.train.schedule import Schedule
from poise.util.errors import ModelError, OptionError, TraceError


@pytest.mark.parametrize("case", MINE)
def test_case(case, launched):
    launched("tests/train/foresight_cases.py", world=2)


def rollout(lengths=(3, 1, 4), layers=2, experts=6, top_k=2, seed=0) -> Rollout:
    """Requests 0, 1, ... whose tokens come mixed, as an engine's steps have them."""
    rng = np.random.default_rng(seed)
    request = rng.permutation(np.repeat(np.arange(len(lengths)), lengths))
    picks = np.argsort(rng.random((len(request), layers, experts)), axis=2)[:, :, :top_k]
    return Rollout(RoutingTrace(picks.astype(np.int16), experts, request=request.astype(np.int32)))


def test_rows_of_whole_requests_in_a_padded_batch():
    one = rollout()
    rows = one.rows([2, 0], [5, 3], 6)  # the engine did not run the last token of request 2
    mine = [np.flatnonzero(one.trace.request == r).tolist() for r in (2, 0)]
    assert rows.tolist() == [[*mine[0], -1, -1], [*mine[1], -1, -1, -1]]
    left = one.rows([2, 0], [4, 3], padding="left")
    assert left.tolist() == [mine[0], [-1, *mine[1]]]
    for requests, lengths, words in (([2], [6], ("4 recorded", "batch 6")), ([1], [3], ("1 recorded", "batch 3")),
                                     ([7], [1], ("request 7", "0 recorded")), ([0], [3, 4], ("1 requests", "2 lengths"))):  # fmt: skip
        with pytest.raises(OptionError) as error:
            one.rows(requests, lengths)
        assert all(word in str(error.value) for word in words)
    with pytest.raises(OptionError, match="3 tokens, the batch a width of 2"):
        one.rows([0], [3], 2)


def test_counts_and_experts_of_tokens_one_by_one():
    one = rollout()
    rows = np.array([5, -1, 0, 5])
    counts = np.zeros((2, 6), int)
    for row, layer in itertools.product((5, 0, 5), range(2)):
        counts[layer, one.trace.experts[row, layer]] += 1
    assert (one.counts(rows) == counts).all()
    told = one.experts(rows)
    assert (told[[0, 2, 3]] == one.trace.experts[[5, 0, 5]]).all() and (told[1] == -1).all()


def test_a_rollout_needs_tokens(tmp_path):
    one = rollout()
    one.trace.save(tmp_path / "rollout.npz")
    assert (Rollout.load(tmp_path / "rollout.npz").trace.experts == one.trace.experts).all()
    with pytest.raises(TraceError, match="profile has loads, a rollout needs every token"):
        Rollout(LoadProfile(np.ones((2, 6))))
    one.fits(2, 6)
    with pytest.raises(ModelError, match="2 MoE layers, the model 3"):
        one.fits(3, 6)
    with pytest.raises(OptionError, match="whole numbers, got float64"):
        one.within(np.zeros(3))


class Interrupted(torch.nn.Module):
    """A router beside experts; it is interrupted where it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = OwnedExperts.__new__(OwnedExperts)
        torch.nn.Module.__init__(self.experts)
        self.experts.number, self.experts.num_experts = 0, 6
        self.now = False

    def forward(self, scores: torch.Tensor, *given: Any, **options: Any) -> Any:
        chosen = torch.topk(scores, 2, *given, **options)
        if self.now:
            raise KeyboardInterrupt
        return chosen


def micro_batch(number: int, experts_TLK: torch.Tensor) -> MicroBatch:
    return MicroBatch(number, number, np.zeros((1, 1, 6), np.int32), True, len(experts_TLK), 2, experts_TLK)


def replayed(experts_TLK: torch.Tensor) -> Interrupted:
    """Its record replayed, as in the turn of a micro-batch."""
    model = Interrupted()
    now = micro_batch(0, experts_TLK.to(torch.int16))
    object.__setattr__(model.experts, "schedule", SimpleNamespace(planner=SimpleNamespace(micro_batch=now)))
    replay_routers(model)
    return model


def test_an_interrupt_ends_the_replay():
    recorded = torch.tensor([[[4, 5]], [[5, 4]], [[4, 5]]])
    scores = torch.arange(18.0).reshape(3, 6).flip(1)
    model = replayed(recorded)
    assert model(scores).indices.sort(1)[0].tolist() == [[4, 5]] * 3
    twin = copy.deepcopy(model)
    assert twin.forward.__wrapped__.__self__ is twin and twin.forward.experts is twin.experts
    model.now = True
    with pytest.raises(KeyboardInterrupt):
        model(scores)
    assert torch.topk(scores, 2).indices.tolist() == [[0, 1]] * 3, "the record goes on deciding"


def test_a_topk_comes_in_the_order_it_was_asked_for():
    """Of the router's scores, largest first, unless ``sorted=False``; a token unknown stays the router's."""
    recorded = torch.tensor([[[4, 5]], [[5, 4]], [[-1, -1]]])
    scores = torch.arange(18.0).reshape(3, 6).requires_grad_()
    model = replayed(recorded)
    for options in ({}, {"sorted": True}):
        found = model(scores, **options)
        assert found.indices.tolist() == [[5, 4]] * 3 and torch.equal(found.values, scores.gather(1, found.indices))
    assert model(scores, sorted=False).indices[:2].tolist() == [[4, 5], [5, 4]]
    assert model(scores, 1, True, False).indices[:2].tolist() == [[4, 5], [5, 4]]
    (grad,) = torch.autograd.grad(model(scores).values[0, 0], scores)
    assert grad.nonzero().tolist() == [[0, 5]]


def test_micro_batches_are_let_go_and_planned_at_the_first_turn():
    planned = []
    planner = SimpleNamespace(foresee=lambda found: planned.append(len(found)), over=lambda _: None, micro_batch=None)
    record = torch.zeros((3, 1, 2), dtype=torch.int16)
    seen = weakref.ref(record)
    turns = Schedule._turns(SimpleNamespace(planner=planner), [micro_batch(0, record), micro_batch(1, record.clone())])
    del record
    assert not planned and next(turns) == 0 and planned == [2] and seen() is not None
    assert next(turns) == 1 and seen() is None, "it is over, and held"
    assert list(turns) == []


def schedule_of(plans: Any, told: list[Any]) -> Schedule:
    """Between two steps of one rank; where it meets the others is written down, and their owners move at once."""

    def meet(doing: str, *, numbers_X: Any = None, problem: Any = None, more: Any = ()) -> Any:
        told.append((doing, problem, more))
        if problem is not None:
            raise problem
        return np.zeros((1, 1), np.int64)

    out, here = object.__new__(Schedule), SimpleNamespace(cluster=from_preset([2, 2], "v100"), device="cpu")
    out._run = SimpleNamespace(
        settings=SimpleNamespace(sharding=Balanced(interval=100)), meeting=SimpleNamespace(meet=meet, steps=105)
    )
    out.deployment, out._owners, out._planned_at, out._due = here, plans, None, np.zeros((2, 8), np.int64)
    out.passes, out.layers = SimpleNamespace(open=list), [SimpleNamespace(num_experts=8)] * 2
    out.backward = SimpleNamespace(dropped=lambda: (True, None), let_go=lambda: None)
    out._move = lambda owner_LE: told.append(owner_LE.tolist())
    return out


@pytest.mark.parametrize("dealt", [False, True])
def test_owners_by_a_record_end_what_loads_of_the_past_have_begun(dealt):
    """Those that were found are not moved to, those that a thread plans are never taken, though none move now."""
    told: list[Any] = []
    plans = OwnerPlans(loaded(planner()))
    run = schedule_of(plans, told)
    plans.begin(Balanced(interval=100), 100)
    requests = rollout((2, 2, 2, 2), experts=8)
    if dealt:
        plans.dealt = lambda read, _: read.deal(plans.current)
        run.deal(requests, [[[0], [1], [2], [3]]])
    else:
        plans.known = lambda *_: plans.current
        run._own_ahead([micro_batch(0, torch.zeros((3, 2, 2)))])
    assert run._planned_at == 105 and run._due is None and plans.take(10_000) is None
    assert all(isinstance(one, tuple) for one in told), "owners that stay were moved"
    run._own(plans.current[:, ::-1])
    assert told[-1] == plans.current[:, ::-1].tolist()


def test_whatever_fails_on_a_rank_before_a_deal_is_told_to_the_others():
    told: list[Any] = []
    run, requests = schedule_of(OwnerPlans(planner()), told), rollout((2, 2, 2, 2), experts=8)
    groups = [[[0], [1], [2], [3]]]
    for record, named, words in (
        (None, groups, "Attribute"),
        (requests, None, "Type"),
        (requests, iter(groups), "Type"),
    ):
        with pytest.raises(OptionError, match=f"given to deal cannot be read: {words}Error"):
            run.deal(record, named)
        assert told[-1][0] == "dealing requests" and told[-1][1].__cause__ is not None


def test_ranks_that_name_other_groups_or_hold_other_records_tell_other_sums():
    """Though the deal is the same numbers: the requests that it is about are others, or are recorded otherwise."""
    told: list[Any] = []
    plans = OwnerPlans(planner())
    plans.dealt = lambda read, _: read.deal(plans.current)
    run = schedule_of(plans, told)
    groups = [[[0], [1], [2], [3]]]
    sums = []
    for seed, named in ((0, groups), (0, [[[1], [0], [2], [3]]]), (1, groups), (0, copy.deepcopy(groups))):
        run.deal(rollout((2, 2, 2, 2), experts=8, seed=seed), named)
        sums.append(dict(told[-1][2]))
    first, shuffled, recorded, again = sums
    assert first == again and len({one["the deal"] for one in sums}) == 1
    assert first["requests by micro-batch and rank"] != shuffled["requests by micro-batch and rank"]
    assert first["their recorded experts"] != recorded["their recorded experts"]


def squares(load_QX, size_Q, rank_Q, micro_Q):
    """What is to be even, by itself: loads of micro-batches, and tokens of ranks in them, over their means."""
    micros, ranks = micro_Q.max() + 1, rank_Q.max() + 1
    mean_X = load_QX.sum(axis=0) / micros
    out = 0.0
    for m in range(micros):
        out += float((ranks * (load_QX[micro_Q == m].sum(axis=0) / mean_X) ** 2 * mean_X / mean_X.sum()).sum())
        for d in range(ranks):
            out += float((size_Q[(micro_Q == m) & (rank_Q == d)].sum() / (size_Q.sum() / micros / ranks)) ** 2)
    return out


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_dealing_anew_keeps_cells_and_lowers_what_it_says(seed):
    rng = np.random.default_rng(seed)
    micros, ranks, each = (int(n) for n in rng.integers(2, 4, 3))
    where = np.array(list(itertools.product(range(micros), range(ranks), range(each))))
    micro_Q, rank_Q = where[:, 0], where[:, 1]
    load_QX = rng.integers(1, 20, (len(where), 3)).astype(float)
    size_Q = rng.integers(1, 9, len(where))
    new_Q = even_out(load_QX, size_Q, rank_Q, micro_Q)
    for m, d in itertools.product(range(micros), range(ranks)):
        assert ((new_Q == m) & (rank_Q == d)).sum() == each
    now = squares(load_QX, size_Q, rank_Q, new_Q)
    assert now <= squares(load_QX, size_Q, rank_Q, micro_Q) + 1e-9
    for q, r in itertools.combinations(range(len(where)), 2):  # no swap is left that would help
        if rank_Q[q] == rank_Q[r] and new_Q[q] != new_Q[r]:
            swapped = new_Q.copy()
            swapped[[q, r]] = swapped[[r, q]]
            assert squares(load_QX, size_Q, rank_Q, swapped) >= now - 1e-6


def test_requests_that_share_experts_are_dealt_to_different_micro_batches():
    """Four requests of one token, two for expert 0 and two for expert 1, one kind in each micro-batch at first."""
    picks = np.array([0, 0, 1, 1], np.int16)[:, None, None]
    one = Rollout(RoutingTrace(picks, 2, request=np.arange(4, dtype=np.int32)))
    new = regrouped(one, [[[0, 1]], [[2, 3]]])
    assert [sorted(int(picks[r, 0, 0]) for r in group[0]) for group in new] == [[0, 1], [0, 1]]
    assert regrouped(one, [[[0, 1]], [[2, 3]]], np.zeros((1, 2), int)) == [[[0, 1]], [[2, 3]]], "one owner: all is even"
    for groups, words in (([[[0, 1]], [[2], [3]]], "micro-batch 1 is of 2 ranks, the first of 1"),
                          ([[[0, 1]], [[1, 2]]], "4 requests are named, 3 different"), ([[[0, 9]]], "request 9 is not")):  # fmt: skip
        with pytest.raises(OptionError, match=words):
            regrouped(one, groups)
    with pytest.raises(OptionError, match=r"shape \(2, 2\), the rollout \(1, 2\)"):
        regrouped(one, [[[0]]], np.zeros((2, 2), int))
