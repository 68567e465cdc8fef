"""What benchmarks/peers.py gives all rows alike: the model and its routing, the clock in experts, and what the report doubts."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from peer import clock, megatron, model, titan
from peer.environments import folder, make

SHAPE = model.Shape(hidden=32, inner=32, experts=8, layers=2, length=16)


def chosen(made, ids):
    """Pairs of each expert, [L, E], and tokens before the routers, by layer."""
    seen, inputs = [], []

    def look(_, given, out):
        inputs.append(given[0])
        seen.append(out[2])

    hooks = [layer.mlp.gate.register_forward_hook(look) for layer in made.model.layers]
    model.loss_of(made, ids)
    for hook in hooks:
        hook.remove()
    return np.array([one.flatten().bincount(minlength=SHAPE.experts).numpy() for one in seen]), inputs


def test_biases_route_tokens_by_the_shares_that_are_asked():
    made = model.build(SHAPE)
    falling = 1.0 / np.arange(1, SHAPE.experts + 1)
    share_LE = np.stack([falling, falling[::-1]]) / falling.sum()
    ids = model.tokens(SHAPE, 0, 4)

    def far(count_LE):
        return np.abs(count_LE / count_LE.sum(axis=1, keepdims=True) - share_LE).sum(axis=1).max()

    before, inputs = chosen(made, ids)
    assert all((x[:, 0] > 0.05).all() for x in inputs), "coordinate 0 is the same sign for all tokens"
    bias_LE = model.fitted(made, SHAPE, share_LE, 4)
    after, _ = chosen(made, ids)
    assert far(after) < 0.25 < far(before)
    model.set_biases([layer.mlp.gate.weight for layer in made.model.layers], 0 * bias_LE)
    assert far(chosen(made, ids)[0]) > 0.25


def test_ranks_have_their_part_of_the_same_tokens():
    every = model.tokens(SHAPE, 3, 2)
    assert torch.equal(every, torch.cat([model.tokens(SHAPE, 3, 2, rank) for rank in range(2)]))
    assert not torch.equal(every, model.tokens(SHAPE, 4, 2))


def test_the_clock_takes_what_tokens_cost_and_changes_no_number():
    device = clock.Device(start_s=1e-3, token_s=1e-4, attention_s=0.0)
    x = torch.randn(5, 3, dtype=torch.float64)
    grads = []
    for on in (False, True):
        device.on = on
        a = x.clone().requires_grad_()
        device.experts(lambda tokens: tokens.square() * 3, a, [2, 0, 3]).sum().backward()
        grads.append(a.grad)
    assert torch.equal(*grads)
    asked = [one.asked_s for one in device.clock.computed]
    assert asked == pytest.approx([2e-3 + 5e-4, 4e-3 + 1e-3])  # forward, and twice that backward


def test_what_stops_megatron_is_found_in_its_function_alone():
    source = "def gating(self):\n    x = 1\n    y = torch.cuda.current_device()\ndef other(self):\n    torch.cuda.current_device()\n"
    assert megatron.calls(source, "gating", "torch.cuda.current_device") == [3]
    assert megatron.calls(source, "gating", "torch.cuda.Stream") == []


def test_an_environment_is_not_begun_where_the_disk_is_too_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("POISE_PEERS", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e9))
    with pytest.raises(SystemExit, match=r"1\.0 GB are free, 6\.0"):
        make(titan.PEER)
    assert "about 3 GB" in capsys.readouterr().out and not folder(titan.PEER).exists()
