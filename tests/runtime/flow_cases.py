"""Data flows on real processes: outputs against one process, and what is sent against the cost model."""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.helpers import few_or

from poise.cost.route import token_copies
from poise.cost.traffic import DATA_FLOWS, port_load
from poise.cost.weights import step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.runtime import flows
from poise.runtime.experts import ExpertKind
from poise.serve.layer import ServedLayer
from poise.serve.split import ServingPolicy
from poise.stepwise.registry import parse_policy

EXPERTS, WIDTH, INNER = 12, 8, 6
POLICIES = ("split", "hecate", "hecate-calibrated", "llep", "ultra-ep", "moon-ep", "poise", "poise:objective=tokens")


@cache
def kind() -> ExpertKind:
    def one(bank, x):
        return torch.tanh(x @ bank["up"].T) @ bank["down"].T

    return ExpertKind("plain", {"up": (INNER, WIDTH), "down": (WIDTH, INNER)}, one, None, 2, INNER, WIDTH)


@cache
def weights() -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(7)
    return {name: torch.randn(EXPERTS, *shape, generator=make, dtype=torch.float64)
            for name, shape in kind().shapes.items()}  # fmt: skip


def dense(x, ids, router):
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for k in range(ids.shape[1]):
            bank = {name: rows[ids[t, k]] for name, rows in weights().items()}
            out[t] += router[t, k] * kind().one(bank, x[t : t + 1])[0]
    return out


def tokens(seed: int, rank: int, world: int, top_k: int, skew: float):
    """This rank's tokens; one rank has none."""
    make = np.random.default_rng([seed, rank])
    count = 0 if rank == seed % (world + 1) else int(make.integers(1, 30))
    law = np.arange(1, EXPERTS + 1) ** -skew
    ids = np.array([make.choice(EXPERTS, top_k, replace=False, p=law / law.sum()) for _ in range(count)])
    x, router = make.normal(size=(count, WIDTH)), make.uniform(0.1, 1.0, size=(count, top_k))
    return (torch.from_numpy(x), torch.from_numpy(ids.reshape(count, top_k).astype(np.int64)), torch.from_numpy(router))


def placement(seed: int, world: int, redundant: int) -> Placement:
    make = np.random.default_rng(seed)
    slots = np.concatenate([make.permutation(EXPERTS), make.choice(EXPERTS, redundant, replace=False)])
    return Placement(
        slots[None].astype(np.int32), np.sort(np.arange(len(slots)) % world).astype(np.int32), EXPERTS, world
    )


class Wire:
    """Copies this rank sends and gets through each exchange of rows."""

    def __init__(self) -> None:
        self.legs: list[tuple[list[int], list[int]]] = []
        self.real = flows.exchange

    def __call__(self, x, sent, got, group):
        self.legs.append((list(sent), list(got)))
        return self.real(x, sent, got, group)


def check(traffic: str, seed: int, fast: ServingPolicy | None, top_k: int, cluster: Cluster, wire: Wire) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    where = placement(seed, world, (0, 4, 8)[seed % 3])
    mine = where.slot_expert_LS[0, where.slot_device_S == rank]
    bank = {name: rows[mine].clone() for name, rows in weights().items()}
    layer = ServedLayer(0, kind(), bank, where, cluster, traffic=traffic, fast=fast)
    for step in range(4 if fast else 1):
        x, ids, router = tokens(seed * 10 + step, rank, world, top_k, 1.2)
        layer.prefetch(top_k * sum(len(tokens(seed * 10 + step, r, world, top_k, 1.2)[0]) for r in range(world)))
        wire.legs.clear()
        device = layer.devices(ids)
        layer.devices = lambda ids, device=device: device  # planned once: the counts are exchanged once
        y = dense(x, ids, router)
        tag = torch.arange(len(x)) * world + rank
        if traffic == "stay":
            order = router.argsort(dim=-1, descending=True, stable=True)
            device.copy_(device.gather(1, order))
            got = layer.move(x, ids, router, tag, lambda rows: rows)
            everyone: list = [None] * world
            dist.all_gather_object(
                everyone, {int(t): (a, b, int(d)) for t, a, b, d in zip(tag, x, y, device[:, 0], strict=True)}
            )
            known = {t: v for one in everyone for t, v in one.items()}
            assert sorted(got.tag_T.tolist()) == got.tag_T.tolist()
            assert set(got.tag_T.tolist()) == {t for t, v in known.items() if v[2] == rank}
            for t, h, out in zip(got.tag_T.tolist(), got.h_Td, got.y_Td, strict=True):
                assert torch.equal(h, known[t][0]) and torch.allclose(out, known[t][1], rtol=1e-12, atol=1e-12)
        else:
            out = layer.run(x, ids, router)
            assert torch.allclose(out, y, rtol=1e-12, atol=1e-12), (out - y).abs().max()
        del layer.devices
        compare_wire(traffic, device, rank, cluster, wire)


def compare_wire(traffic: str, device, rank: int, cluster: Cluster, wire: Wire) -> None:
    """The copies that went over every port are the cost model's."""
    world = cluster.num_devices
    everyone: list = [None] * world
    dist.all_gather_object(everyone, (device.numpy(), wire.legs))
    devices = np.concatenate([one[0] for one in everyone])
    sources = np.repeat(np.arange(world), [len(one[0]) for one in everyone])
    out, back = token_copies(devices, sources, cluster, traffic)
    legs = len(wire.legs)
    forth = range(2 if traffic == "home_node_dedup" and cluster.num_nodes > 1 else 1)
    for copies, which, mirrored in ((out, forth, False), (back, range(len(forth), legs), traffic != "stay")):
        sent = np.array([[one[1][leg][0] for leg in which] for one in everyone])  # [D, legs, D]
        sent = sent.sum(axis=1) if len(which) else np.zeros((world, world))
        same = cluster.node_D[:, None] == cluster.node_D[None, :]
        want = port_load(copies, cluster)
        sent = sent.T if mirrored else sent
        off = sent * ~np.eye(world, dtype=bool)
        assert np.array_equal((off * same).sum(axis=1), want.intra_out_BD[0]), traffic
        assert np.array_equal((off * same).sum(axis=0), want.intra_in_BD[0]), traffic
        assert np.array_equal((off * ~same).sum(axis=1), want.net_out_BD[0]), traffic
        assert np.array_equal((off * ~same).sum(axis=0), want.net_in_BD[0]), traffic


def flow(traffic: str, policy: str | None, top_k: int) -> None:
    """Three placements and batches; of a policy one in ``make test``, not the same for all."""
    cluster, wire = Cluster.uniform(2, dist.get_world_size() // 2), Wire()
    model = ModelSpec.generic(EXPERTS, 2, np.arange(1))
    flows.exchange = wire
    try:
        one = POLICIES.index(policy) % 3 if policy else 0
        for seed in range(3) if policy is None else few_or(range(3), (one,)):
            price = step_price(200.0, EXPERTS, cluster, model, window_s=1e-3, control_s=1e-9)
            fast = None if policy is None else ServingPolicy(parse_policy(policy), price, step_slots=3)
            check(traffic, seed, fast, top_k, cluster, wire)
    finally:
        flows.exchange = wire.real


WHICH = [(traffic, None, top_k) for traffic in DATA_FLOWS for top_k in (1, 2, 3)]
UNLIKE = ("home", "home_node_dedup", "stay")
"""Flows whose rows take other ways; every policy runs over each of them in turn, in ``make test`` over one."""
WHICH += [
    (traffic, policy, 2) for number, policy in enumerate(POLICIES) for traffic in few_or(UNLIKE, (UNLIKE[number % 3],))
]
CASES = {f"{one[0]}, {one[1] or 'even'}, top-{one[2]}": partial(flow, *one) for one in WHICH}

if __name__ == "__main__":
    run_cases(CASES, read_options())
