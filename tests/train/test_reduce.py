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
            trainable=list(names), experts=SimpleNamespace(number=0), used_ED=np.eye(2, dtype=bool)
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
