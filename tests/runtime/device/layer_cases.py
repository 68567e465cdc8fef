"""The layer without a host on real processes: against one dense process and the path with sizes on the host."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.cases import read_options, run_cases
from tests.runtime.device.mirror import MirrorKernels
from tests.runtime.device.traced import GraphRules
from tests.runtime.expert_modules import PlainExperts

from poise.cost.route import rows_into
from poise.cost.weights import step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.runtime.device import layer as code
from poise.runtime.device.choose import kernels_for
from poise.runtime.device.layer import DeviceLayer
from poise.runtime.device.padded import RowCapacity
from poise.runtime.device.products import slot_product
from poise.runtime.device.slot_weights import SlotWeights
from poise.runtime.dispatch import all_counts, make_exchange
from poise.runtime.experts import recognise
from poise.runtime.layer import LayerStep
from poise.runtime.moe import GatedExperts
from poise.stepwise.kernels import LayerSlots
from poise.util.errors import CapacityError, CommunicationError, ModelError, OptionError

EXPERTS, WIDTH, INNER, TOKENS, TOP_K = 12, 8, 6, 10, 3
LIMIT = 1e-11


class Biased(GatedExperts):
    """As gpt-oss: with biases."""

    def __init__(self, num_experts, hidden_size, inner_size):
        super().__init__(num_experts, hidden_size, inner_size)
        self.gate_up_proj_bias = torch.nn.Parameter(torch.randn(num_experts, 2 * inner_size))
        self.down_proj_bias = torch.nn.Parameter(torch.randn(num_experts, hidden_size))

    def expert(self, e, x_nd):
        gate, up = (x_nd @ self.gate_up_proj[e].T + self.gate_up_proj_bias[e]).chunk(2, dim=-1)
        return (self.act_fn(gate) * up) @ self.down_proj[e].T + self.down_proj_bias[e]


KINDS = {"plain": PlainExperts, "gated": GatedExperts, "biased": Biased}


def dense(name: str):
    """The same experts on every rank."""
    torch.manual_seed(7)
    return KINDS[name](EXPERTS, WIDTH, INNER).double()


def table(seed: int, step_slots: int, doubled: bool = False) -> LayerSlots:
    """Every expert once, on a device drawn at random; ``doubled``: some twice."""
    make, world = np.random.default_rng(seed), dist.get_world_size()
    static_ED = np.zeros((EXPERTS, world), bool)
    static_ED[np.arange(EXPERTS), make.permutation(EXPERTS) % world] = True
    if doubled:
        static_ED |= make.random(static_ED.shape) < 0.3
    return LayerSlots.of(static_ED, step_slots, np.arange(world) // 2)


def tokens(seed: int, step: int, rank: int, skew: float):
    """One rank's tokens; some name no expert, some twice the same, and one rank has none at all."""
    make, world = np.random.default_rng([seed, step, rank]), dist.get_world_size()
    law = (np.arange(EXPERTS) + step) % EXPERTS + 1.0
    law = law**-skew / (law**-skew).sum()
    ids = np.stack([make.choice(EXPERTS, TOP_K, replace=seed % 3 == 1, p=law) for _ in range(TOKENS)])
    ids[make.random(ids.shape) < 0.1] = -1
    ids[make.random(ids.shape) < 0.05] = EXPERTS
    if rank == (seed + step) % (world + 1):
        ids[:] = -1
    x, router = make.normal(size=(TOKENS, WIDTH)), make.uniform(0.1, 1.0, size=(TOKENS, TOP_K))
    return torch.from_numpy(x), torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(router)


def made(
    name: str,
    seed: int,
    step_slots: int,
    *,
    doubled: bool = False,
    trained: bool = True,
    mirrored: bool = True,
    sent: int | None = None,
    **options,
):
    """A layer, its dense module, its slots."""
    whole, slots, rank = dense(name), table(seed, step_slots, doubled), dist.get_rank()
    mine = slots.expert_DS[rank][slots.turn_DS[rank] >= 0]
    weights = SlotWeights(
        slots,
        {key: weight.detach()[mine].requires_grad_(trained) for key, weight in whole.named_parameters()},
        dist.group.WORLD,
        sent=sent,
    )
    world = dist.get_world_size()
    price = step_price(200.0, EXPERTS, Cluster.uniform(world // 2, 2), ModelSpec.generic(EXPERTS, TOP_K, np.arange(1)))
    pairs = world * TOKENS * TOP_K
    kernels = MirrorKernels(slots, price) if mirrored else kernels_for(torch.zeros(1), slots, price, pairs)
    options = {"tokens": TOKENS, "top_k": TOP_K, "group": dist.group.WORLD} | options
    return DeviceLayer(recognise(whole), kernels, slots, weights, **options), whole, slots


def close(got, want, what: str) -> None:
    error = (got - want).abs().max().item() if want.numel() else 0.0
    assert error <= LIMIT * max(1.0, want.abs().max().item() if want.numel() else 0.0), (what, error)


def gradients_of_all(whole, batches, loss_of):
    """Of the dense module, over the tokens of all ranks."""
    whole.zero_grad()
    for x, ids, router in batches:
        backward(whole(x, ids, router))
    return {key: weight.grad for key, weight in whole.named_parameters()}


def loss_of(y):
    return (y * torch.arange(1.0, y.numel() + 1, dtype=y.dtype).view(y.shape)).sum() + (y**2).sum()


def backward(y) -> None:
    if y.requires_grad:  # the dense module's does not where no token names an expert
        loss_of(y).backward()


def parity(
    name: str, step_slots: int, skew: float, capacity: RowCapacity | None = None, sent: int | None = None
) -> str:
    """Three steps of a trainer: outputs, gradients of tokens, router weights and experts, and weights after SGD."""
    world, rank = dist.get_world_size(), dist.get_rank()
    replicas = 0
    for seed in range(3):
        layer, whole, slots = made(name, seed, step_slots, capacity=capacity, sent=sent)
        mine = slots.expert_DS[rank][slots.turn_DS[rank] >= 0]
        optimizers = [torch.optim.SGD(each, lr=0.05) for each in (layer.weights.owned.values(), whole.parameters())]
        for step in range(3):
            batches = [tokens(seed, step, other, skew) for other in range(world)]
            x, ids, router = batches[rank]
            if step:
                layer.prepare()
                layer.leave.zero_()  # the price of so small a layer would leave it alone
                replicas += int((layer.expert_DS.numpy() >= 0).sum() - (slots.expert_DS >= 0).sum())
                assert sent is None or most_sent(layer, slots) == sent
            ends = (
                [each.clone().requires_grad_() for each in (x, router)],
                [each.clone().requires_grad_() for each in (x, router)],
            )
            got, want = layer(ends[0][0], ids, ends[0][1]), whole(ends[1][0], ids, ends[1][1])
            close(got, want, "outputs")
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(got).backward()
            backward(want)
            for mine_end, their_end, what in zip(*ends, ("tokens", "router weights"), strict=True):
                close(
                    mine_end.grad,
                    torch.zeros_like(their_end) if their_end.grad is None else their_end.grad,
                    f"gradients of {what}",
                )
            wanted = gradients_of_all(whole, batches, loss_of)
            for key, weight in layer.weights.owned.items():
                close(weight.grad, wanted[key][mine], f"gradients of {key}")
            for optimizer in optimizers:
                optimizer.step()
            for key, weight in whole.named_parameters():
                close(layer.weights.owned[key].detach(), weight.detach()[mine], key)
                close(layer.weights.bank[key][: len(mine)], weight.detach()[mine], f"{key} in slots")
            layer.check()
    assert bool(replicas) == bool(step_slots), replicas
    return f"{replicas} replicas"


def most_sent(layer: DeviceLayer, slots: LayerSlots) -> int:
    """Experts in step slots of the owner that has most of them."""
    step = np.unique(layer.expert_DS.numpy()[(slots.turn_DS == -1) & (layer.expert_DS.numpy() >= 0)])
    return int(np.bincount(slots.holders(slots.expert_DS)[step].argmax(axis=1)).max())


def present_path(name: str, skew: float) -> None:
    """The same rows over the exchange that the host knows: the same outputs, and gradients of tokens."""
    world, rank = dist.get_world_size(), dist.get_rank()
    layer, whole, slots = made(name, 3, 2, mirrored=False)
    x, ids, router = tokens(3, 0, rank, skew)
    layer.prepare(torch.from_numpy(np.random.default_rng(1).integers(0, 50, EXPERTS).astype(np.int32)))
    layer.leave.zero_()
    y = layer(x.clone().requires_grad_(), ids, router)
    load_SE = all_counts(torch.where((ids >= 0) & (ids < EXPERTS), ids, EXPERTS), EXPERTS + 1, dist.group.WORLD)[:, :-1]
    quota_ED = layer.kernels.split(torch.from_numpy(load_SE.astype(np.int32)), layer.expert_DS, layer.leave).numpy()
    rows_SED, work = np.zeros((world, EXPERTS, world), np.int64), np.zeros((2, world), np.int64)
    rows_into(
        np.ascontiguousarray(load_SE),
        quota_ED.astype(np.int64),
        slots.node_D.astype(np.int64),
        -1,
        work[0],
        work[1],
        rows_SED,
    )
    here = [int(e) for e in layer.expert_DS[rank] if e >= 0]
    way = make_exchange(ids, rows_SED, rank, dist.group.WORLD, here)
    bank = {key: weight.detach()[here] for key, weight in whole.named_parameters()}
    counts = [way.count_E[here].tolist()]
    stages = LayerStep(way, partial(layer.kind.run_counted, counts))
    y_in, failed = stages.compute(stages.dispatch(x), [bank], graph=True, recomputed=False)
    assert failed is None
    out = stages.combine(y_in).view(TOKENS, TOP_K, WIDTH)
    named = (ids >= 0) & (ids < EXPERTS)
    close(y, (out * router.masked_fill(~named, 0)[..., None]).sum(1), "outputs")


def too_little_room(which: str) -> None:
    """Rows that do not fit are no rows that are left out: NaN on every rank, forward and backward, and an error."""
    enough = RowCapacity.enough(TOKENS, TOP_K, dist.get_world_size())
    room = RowCapacity(4, enough.computed) if which == "pair" else RowCapacity(enough.pair, 6)
    layer, whole, _ = made("gated", 2, 1, capacity=room)
    x, ids, router = tokens(2, 0, dist.get_rank(), 1.0)
    x.requires_grad_()
    y = layer(x, ids, router)
    named = ((ids >= 0) & (ids < EXPERTS)).any(1)
    assert y.isnan().any(1)[named].all(), "a step that had no room looks whole"
    y.sum().backward()
    assert x.grad.isnan().all() and all(weight.grad.isnan().all() for weight in layer.weights.owned.values())
    needed = layer.need.tolist()
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, needed)
    assert told == [needed] * len(told)
    try:
        layer.check()
    except CapacityError as error:
        assert str(needed[which != "pair"]) in error.message, error
    else:
        raise AssertionError("nobody is told")
    layer.check()  # told once
    fits = RowCapacity(*needed)
    parity_once(made("gated", 2, 1, capacity=fits)[0], whole, (x.detach(), ids, router))


def parity_once(layer, whole, batch) -> None:
    close(layer(*batch), whole(*batch), "outputs")
    layer.check()


def just_enough() -> None:
    """Room of the most that a step needs, of both kinds, and one row less of each."""
    layer, whole, _ = made("plain", 4, 2)
    batch = tokens(4, 1, dist.get_rank(), 1.5)
    parity_once(layer, whole, batch)
    layer(*batch)
    pair, computed = layer.need.tolist()
    parity_once(made("plain", 4, 2, capacity=RowCapacity(pair, computed))[0], whole, batch)
    for room in (RowCapacity(pair - 1, computed), RowCapacity(pair, computed - 1)):
        tight = made("plain", 4, 2, capacity=room)[0]
        assert tight(*batch).isnan().any() or not ((batch[1] >= 0) & (batch[1] < EXPERTS)).any()
        try:
            tight.check()
        except CapacityError:
            continue
        raise AssertionError(room)


def served() -> None:
    """Without gradients, with experts in several static slots; so small a layer is left alone, and planned when told to."""
    left = []
    for seed in range(4):
        layer, whole, _ = made("gated", seed, 2, doubled=True, trained=False)
        for step in range(3):
            batch = tokens(seed, step, dist.get_rank(), 0.0 if step == 1 else 2.0)
            with torch.no_grad():
                parity_once(layer, whole, batch)
            layer.prepare()
            left.append(int(layer.leave))
            layer.leave.fill_(step % 2)
    assert all(left), left


def fewer_tokens() -> None:
    """A step of fewer tokens than the layer was made for, where it may have them: less padding, the same outputs, and
    room for every routing.
    """
    layer, whole, _ = made("gated", 1, 2, trained=False, fewer=True)
    for count in (TOKENS, 4, 1):
        batch = [each[:count] for each in tokens(1, count, dist.get_rank(), 3.0)]
        with GraphRules() as rules, torch.no_grad():
            y = layer(*batch)
        close(y, whole(*batch), "outputs")
        widest = max(
            shape[0] for name, shapes in rules.seen for shape in shapes if len(shape) == 2 and shape[1] == WIDTH
        )
        assert widest <= dist.get_world_size() * count * TOP_K + 1, widest
        layer.check()


def refused() -> None:
    """What it does not do is said, on all ranks."""
    layer, _whole, slots = made("plain", 0, 1)
    for error, make, said in (
        (ModelError, lambda: layer(*(each.repeat(2, 1) for each in tokens(0, 0, 0, 1.0))), "the layer was made for"),
        (ModelError, lambda: layer(*(each[:1] for each in tokens(0, 0, 0, 1.0))), "fills up with ids of -1"),
        (CommunicationError, lambda: made("plain", 0, 1, capacity=RowCapacity(3 + dist.get_rank(), 9)), "has sizes"),
        (CommunicationError, lambda: made("plain", 0, 1, sent=1 + dist.get_rank()), "experts an owner sends"),
        (ModelError, lambda: SlotWeights(slots, {"up": torch.zeros(EXPERTS + 1, 2)}, dist.group.WORLD), "static slots"),
    ):
        try:
            make()
        except error as told:
            assert said in str(told), told
        else:
            raise AssertionError(said)
    doubled = made("plain", 1, 1, doubled=True)[0]
    try:
        loss_of(doubled(*tokens(1, 0, dist.get_rank(), 1.0))).backward()
    except OptionError as told:
        assert "several static slots" in told.message
    else:
        raise AssertionError("copies that are trained apart")


def asked_for_too_much() -> None:
    """A slot table by hand that asks an owner for all its experts, and it sends one: that one, and the others leave."""
    layer, whole, slots = made("plain", 0, 2, trained=False, sent=1)
    world, static = dist.get_world_size(), layer.weights.static
    step_DM = np.nonzero(slots.turn_DS == -1)[1].reshape(world, 2)
    mine = [[int(e) for e in slots.expert_DS[d] if e >= 0] for d in range(world)]
    wanted = torch.from_numpy(slots.expert_DS.copy())
    for device in range(world):
        for at, slot in enumerate(step_DM[device]):
            wanted[device, slot] = mine[(device + 1) % world][at]
    load_E = torch.zeros(EXPERTS, dtype=torch.int32)
    load_E[[each[1] for each in mine]] = 5
    layer.expert_DS.copy_(wanted)
    layer.weights.fetch(layer.expert_DS, load_E)
    bank, rank = layer.weights.ready(), dist.get_rank()
    assert (layer.expert_DS >= 0).sum() == EXPERTS + world
    held = [(slot, int(e)) for slot, e in enumerate(layer.expert_DS[rank]) if slot >= static and e >= 0]
    assert [e for _, e in held] == [mine[(rank + 1) % world][1]]
    for slot, expert in held:
        for key, weight in whole.named_parameters():
            assert torch.equal(bank[key][slot], weight[expert]), key
    batch = tokens(0, 1, rank, 2.0)
    close(layer(*batch), whole(*batch), "outputs")
    layer.check()


def changed_between() -> None:
    """Replicas may not change between a forward pass and its backward."""
    layer, _, _ = made("plain", 0, 2)
    x, ids, router = tokens(0, 1, dist.get_rank(), 2.0)
    y = layer(x.requires_grad_(), ids, router)
    layer.prepare()
    try:
        loss_of(y).backward()
    except RuntimeError as told:
        assert "modified by an inplace operation" in str(told), told
    else:
        raise AssertionError("a backward pass over other weights")


class _Fails(torch.autograd.Function):
    """What rank 1 cannot go backward through once it is asked to."""

    @staticmethod
    def forward(ctx, x, trap):
        ctx.trap = trap
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        if ctx.trap["set"] and dist.get_rank() == 1:
            raise FloatingPointError("backward")
        return grads[0], None


def failing_backward() -> None:
    """Nobody waits for a rank whose experts fail: the others' sums have its NaN, it raises, and the next step is right."""
    trap = {"set": True}
    layer, whole, _ = made("gated", 1, 2, product=lambda *given: _Fails.apply(slot_product(*given), trap))
    rank, world = dist.get_rank(), dist.get_world_size()
    layer.load_E.copy_(torch.arange(EXPERTS) ** 2)
    layer.prepare()
    layer.leave.zero_()
    batches = [tokens(1, 3, other, 1.0) for other in range(world)]
    try:
        loss_of(layer(batches[rank][0].requires_grad_(), *batches[rank][1:])).backward()
        assert rank != 1, "an error that nobody sees"
    except FloatingPointError:
        assert rank == 1
    grads = [weight.grad for weight in layer.weights.owned.values()]
    hurt = [None] * world
    dist.all_gather_object(hurt, any(grad.isnan().any().item() for grad in grads))
    assert hurt[1] and sum(hurt) > 1, hurt  # rank 1 computed for an owner elsewhere, too
    trap["set"] = False
    for weight in layer.weights.owned.values():
        weight.grad = None
    loss_of(layer(*batches[rank])).backward()
    wanted = gradients_of_all(whole, batches, loss_of)
    mine = [int(e) for e in layer.expert_DS[rank]][: layer.weights.static]
    for key, weight in layer.weights.owned.items():
        close(weight.grad, wanted[key][mine], f"gradients of {key}")
    layer.check()


def prepared_apart() -> None:
    """Ranks whose slots, or flags, differ: NaN on all of them, the same error, and the next step together is right."""
    rank, apart = dist.get_rank(), []
    for what in ("counts", "flag", "nothing"):
        layer, whole, slots = made("plain", 2, 2, trained=False)
        batch = tokens(2, 4, rank, 1.0)
        with torch.no_grad():
            for odd in (what, "nothing"):
                load_E = torch.arange(EXPERTS, dtype=torch.int32)
                layer.expert_DS.copy_(torch.from_numpy(slots.expert_DS))
                layer.prepare(load_E.flip(0) if odd == "counts" and rank == 1 else load_E)
                layer.leave.fill_(int(odd == "flag" and rank == 1))
                y = layer(*batch)
                if odd == "nothing":
                    close(y, whole(*batch), "outputs")
                    layer.check()
                    continue
                named = ((batch[1] >= 0) & (batch[1] < EXPERTS)).any(1)
                assert y.isnan().any(1)[named].all(), "ranks that do not agree on what a slot is"
                try:
                    layer.check()
                except CommunicationError as error:
                    apart.append(error.message)
                else:
                    raise AssertionError("nobody is told")
    assert len(apart) == 2


def traced() -> None:
    """Whatever the routing, a step does the same operations in the same shapes, and none that a graph does not allow."""
    layer, _, _ = made("biased", 5, 2)
    rank, seen = dist.get_rank(), []
    for step, skew in ((0, 0.0), (1, 3.0), (2, 1.0)):
        x, ids, router = tokens(5, step, rank, skew)
        x, router = x.requires_grad_(), router.requires_grad_()
        for weight in layer.weights.owned.values():
            weight.grad = None
        with GraphRules() as rules:
            layer.prepare()
            y = layer(x, ids, router)
            loss_of(y).backward()
        layer.check()
        seen.append(rules.seen)
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) > 100
    whole = code.pairs_of
    for asks in (lambda ids: ids[ids >= 0], lambda ids: ids.max().item(), lambda ids: ids.nonzero()):
        code.pairs_of = lambda ids_TK, experts, asks=asks: (asks(ids_TK), whole(ids_TK, experts))[1]
        try:
            with GraphRules():
                layer._planned(ids)
        except AssertionError:
            continue
        finally:
            code.pairs_of = whole
        raise AssertionError("a step that asks the host is not seen")


CASES = {
    **{f"parity, {name}, {slots} step slots, skew {skew:g}": partial(parity, name, slots, skew)
       for name, slots, skew in (("plain", 2, 1.5), ("gated", 3, 0.5), ("biased", 1, 2.5), ("gated", 0, 1.0))},
    "parity, gated, 3 step slots, owners send one expert": partial(parity, "gated", 3, 0.5, sent=1),
    "present path": partial(present_path, "gated", 1.5),
    "too little room for a pair of ranks": partial(too_little_room, "pair"),
    "too little room on a device": partial(too_little_room, "computed"),
    "just enough room": just_enough,
    "served": served,
    "fewer tokens": fewer_tokens,
    "asked for too much": asked_for_too_much,
    "refused": refused,
    "changed between": changed_between,
    "failing backward": failing_backward,
    "prepared apart": prepared_apart,
    "traced": traced,
}  # fmt: skip

if __name__ == "__main__":
    run_cases(CASES, read_options())
