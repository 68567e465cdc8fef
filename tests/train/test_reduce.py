"""Gradients of replicas on one rank: what is refused counts no bytes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from poise.train.materialize import LayerGradients, Ledger
from poise.train.reduce import ReplicaGradients
from poise.util.errors import ModelError


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float32])
def test_weights_frozen_amid_a_step_are_refused_and_leave_no_bytes_counted(wire):
    """Also where copies in a wider type take the place of gradients."""
    ledger, deployment = Ledger(), SimpleNamespace(reduce_dtype=wire, compute_dtype=torch.bfloat16)
    kept = ReplicaGradients([SimpleNamespace()], deployment, ledger)

    def add(*names: str) -> None:
        rows = {1: [torch.ones(5, dtype=torch.bfloat16) for _ in names]}
        nbytes = sum(row.nbytes for row in rows[1])
        weights = SimpleNamespace(
            trainable=list(names),
            experts=SimpleNamespace(number=0),
            used_ED=np.eye(2, dtype=bool),
            gathered_D=np.ones(2),
        )
        ledger.add("replica gradients", nbytes)  # as the layer's backward pass counts them
        kept.add(weights, LayerGradients({}, rows, nbytes), 1.0)

    add("up", "down")
    before = dict(ledger.now)
    assert before == {"replica gradients": 2 * 5 * wire.itemsize}
    with pytest.raises(ModelError, match=r"layer 0 trained \['up', 'down'\], now \['up'\]"):
        add("up")
    assert ledger.now == before
    kept.forget()
    assert ledger.now == {"replica gradients": 0}


def test_several_micro_batches_count_what_lives():
    """The same expert's gradients are added up; another's are kept apart from the stack they came in. Oracle: sets."""
    ledger, devices = Ledger(), 3
    deployment = SimpleNamespace(reduce_dtype=torch.float32, compute_dtype=torch.float32, gradient_bytes=20.0)
    kept = ReplicaGradients([SimpleNamespace()], deployment, ledger)
    owner_E, held = np.zeros(4, np.int64), [set() for _ in range(devices)]
    for holders in ([(1, 1), (2, 1)], [(1, 1), (3, 1)], [(3, 2), (3, 1)]):  # (expert, device); this one is device 1
        used_ED = np.zeros((4, devices), bool)
        used_ED[:, 0] = True  # the owner computes, too
        for expert, device in holders:
            used_ED[expert, device] = True
            held[device].add(expert)
        stack = torch.ones(2, 5)
        rows = {e: [stack[at]] for at, (e, device) in enumerate(holders) if device == 1}
        gathered_D = used_ED[:, 1:].sum(axis=0)
        weights = SimpleNamespace(trainable=["up"], experts=SimpleNamespace(number=0), used_ED=used_ED, owner_E=owner_E,
                                  gathered_D=np.array([0, *gathered_D]))  # fmt: skip
        ledger.add("replica gradients", 20 * len(rows))
        kept.add(weights, LayerGradients({}, rows, 20 * len(rows)), 1.0)
        most = 20 * max(map(len, held))
        assert ledger.now == {"replica gradients": 20 * len(held[1])}
        assert kept.beyond(most - 1) and not kept.beyond(most) and not kept.beyond(None)
    assert [kept._kept[0].rows[e][0][0].item() for e in (1, 2, 3)] == [2.0, 1.0, 2.0]
