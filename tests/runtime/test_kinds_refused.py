"""Experts run by their own code: what would compute something else is refused when its kind is asked for."""

from functools import partial
from types import MethodType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.runtime.expert_modules import (
    BIAS_FREE,
    D,
    E,
    Expert,
    Forever,
    H,
    Loop,
    Slotted,
    changed,
    clamped,
    doubled,
    equal,
    expert,
    listed,
    loop,
    up_first,
)
from torch import nn
from torch.nn.utils import parametrizations

from poise.runtime import probe
from poise.runtime.experts import recognise
from poise.runtime.moe import ExpertList
from poise.util.errors import ModelError


def one_of(change, number=3, make=lambda e: Expert()):
    """Equal experts, one of which is changed afterwards."""
    out = listed(make)
    change(out[number])
    return out


def normalised(self, x, ids, w):
    return Loop.forward(self, x, ids, w / w.sum(-1, keepdim=True))


def capacity(self, x, ids, w):
    """An expert takes half again its share of the tokens, and leaves the rest out."""
    kept = F.one_hot(ids, E + 1).sum(1).cumsum(0).gather(1, ids) <= 1.5 * ids.numel() / E
    return Loop.forward(self, x, ids, w * kept)


def identity_above(self, x, ids, w):
    """Ids from E on are experts that do nothing to their tokens."""
    return Loop.forward(self, x, ids, w) + x * torch.where(ids >= E, w, 0.0).sum(-1, keepdim=True)


def in_training(self, e, x, w):
    return self.single(e, x) * w * (1.01 if self.training else 1.0)


def capturing(e):
    """Its activation computes with the weights of the expert it was made for, whichever expert it is copied to."""
    out = Expert()
    out.act = lambda x: torch.tanh(x) + out.up.bias
    return out


def long_way(e):
    out = Expert()
    out.up.forward = lambda x: F.linear(x, out.up.weight, out.up.bias)
    return out


def counted(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return Expert.forward(self, x) * self.calls


def tied():
    out = listed(lambda e: Expert())
    out.extra = nn.Parameter(torch.ones(3))
    return out


def hooked(part, kind="register_forward_hook"):
    return lambda one: getattr(one.get_submodule(part), kind)(lambda *args: None)


def quantised():
    out = Loop()
    out.down_proj = nn.Parameter(torch.zeros(E, D, H, dtype=torch.int8), requires_grad=False)
    return out


class _Tuple(Expert):
    def forward(self, x):
        return super().forward(x), None


class _Counted(Expert):
    forward = counted


class _ScaledList(ExpertList):
    def forward(self, x, ids, w):
        return 3.0 * super().forward(x, ids, w)


class _OtherList(ExpertList):
    def forward(self, x, logits):
        return x


REFUSED = {
    "class of an expert": (lambda: listed(lambda e: expert(Expert.forward)()), "expert 1 differs from expert 0 in class"),
    "scale of an expert": (lambda: listed(lambda e: Expert(scale=1.0 + e)), "scale: 2.0 and 1.0"),
    "attribute of one part": (lambda: one_of(lambda one: setattr(one.down, "out_features", 9)), "down.out_features: 9 and 8"),
    "attribute of one alone": (lambda: one_of(lambda one: setattr(one, "gain", 2.0)), "gain: 2.0 and absent"),
    "activation of an expert": (lambda: listed(lambda e: Expert(act=(nn.Tanh(), nn.ReLU())[e % 2])), "act: ReLU and Tanh"),
    "constant of an activation": (lambda: listed(lambda e: Expert(act=nn.LeakyReLU(0.1 * e))), "negative_slope"),
    "function of an expert": (lambda: listed(lambda e: Expert(act=torch.tanh if e else torch.relu)), "act: <built-in"),
    "lambda with a constant": (lambda: listed(lambda e: Expert(act=(lambda x: x * 2) if e == 2 else (lambda x: x * 3))), "expert 2"),
    "closure": (lambda: listed(lambda e: Expert(act=lambda x: torch.tanh(x) * e)), "act (e): 1 and 0"),
    "default value": (lambda: listed(lambda e: Expert(act=lambda x, e=e: torch.tanh(x) * e)), "__defaults__"),
    "partial": (lambda: listed(lambda e: Expert(act=partial(F.leaky_relu, negative_slope=0.1 * e))), "negative_slope"),
    "tensor": (lambda: listed(lambda e: Expert(scale=torch.full((D,), 1.0 + e))), "scale: tensor"),
    "array in a dict": (lambda: listed(lambda e: Expert(given={"a": [np.arange(e, e + 3)]})), "given['a'][0]"),
    "subclass": (lambda: listed(lambda e: type("Sub", (Expert,), {})() if e == 4 else Expert()), "expert 4 differs"),
    "forward of one": (lambda: one_of(lambda one: setattr(one, "forward", lambda x: x)), "was replaced"),
    "forward of all": (lambda: listed(long_way), "was replaced"),
    "method of one": (lambda: one_of(lambda one: setattr(one, "extra", MethodType(lambda s, x: x, one))), "expert 3 differs"),
    "mode of one": (lambda: one_of(lambda one: one.eval()), "training: False and True"),
    "weights of another": (lambda: listed(capturing), "cannot be run|apart"),
    "what cannot be compared": (lambda: listed(lambda e: Expert(act=Slotted(1.0 + (e == 2)))), "apart"),
    "buffer": (lambda: listed(lambda e: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))), "buffers (0.1.running_mean)"),
    "spectral norm": (lambda: one_of(lambda one: parametrizations.spectral_norm(one.up)), "hooks|buffers|weights"),
    "hook": (lambda: one_of(hooked("")), "ExpertList.3 has hooks"),
    "hook of a part": (lambda: one_of(hooked("up", "register_full_backward_hook")), "ExpertList.3.up has hooks"),
    "hook of a weight": (lambda: one_of(lambda one: one.up.weight.register_hook(lambda g: g)), "gradient hook"),
    "two inputs": (lambda: equal(lambda s, x, other: x), "missing 1 required positional argument"),
    "tuple": (lambda: listed(lambda e: _Tuple()), "cannot be run on a few tokens: TypeError"),
    "tuple of a bare list": (lambda: nn.ModuleList(_Tuple() for _ in range(E)), "cannot be run on a few tokens: TypeError"),
    "other width": (lambda: listed(lambda e: nn.Linear(D, 3)), "gives (20, 3) for tokens (20, 8)|run"),
    "tokens mixed": (lambda: listed(lambda e: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, track_running_stats=False))), "more than 1 value"),
    "tokens mixed, one at a time too": (lambda: equal(lambda s, x: Expert.forward(s, x) - 0.1 * x.mean(0)), "apart"),
    "input changed": (lambda: listed(lambda e: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(D, D))), "in place"),
    "dropout for ever": (lambda: listed(lambda e: Forever()), "also when it is evaluated"),
    "state": (lambda: listed(lambda e: _Counted()), "the second time"),
    "no matrix": (lambda: listed(lambda e: nn.LayerNorm(D)), "none of them a matrix"),
    "empty list": (lambda: ExpertList([]), "empty"),
    "weight of the list": (tied, "has extra beside its experts"),
    "list that scales": (lambda: _ScaledList(Expert() for _ in range(E)), "apart"),
    "list with other inputs": (lambda: _OtherList(Expert() for _ in range(E)), "takes 2 inputs"),
    "scaled output": (lambda: loop(forward=doubled), "1 apart|0.5 apart"),
    "up before gate": (lambda: loop(inside=up_first), "apart"),
    "clamp": (lambda: loop(inside=clamped), "apart"),
    "weights before down": (lambda: loop(weigh=lambda s, e, x, w: F.linear(s.inside(F.linear(x * w, s.gate_up_proj[e])), s.down_proj[e])), "apart"),
    "squared weights": (lambda: loop(weigh=lambda s, e, x, w: s.single(e, x) * w * w), "apart"),
    "normalised weights": (lambda: loop(forward=normalised), "apart"),
    "residual": (lambda: loop(forward=lambda s, x, ids, w: x + Loop.forward(s, x, ids, w)), "apart"),
    "tiny offset": (lambda: loop(weigh=lambda s, e, x, w: s.single(e, x) * w + 1e-13), "apart"),
    "small weights left out": (lambda: loop(weigh=lambda s, e, x, w: s.single(e, x) * w * (w > 0.05)), "apart"),
    "large weights cut": (lambda: loop(weigh=lambda s, e, x, w: s.single(e, x) * w.clamp(max=1)), "apart"),
    "capacity of a quarter": (lambda: loop(forward=capacity), "apart"),
    "call of its own": (lambda: loop(__call__=lambda s, *given: 2 * Loop.__call__(s, *given)), "__call__"),
    "expert twice": (lambda: ExpertList([one := Expert(), Expert(), one]), "weights in common"),
    "part of several experts": (lambda: listed(lambda e, up=BIAS_FREE: Expert(up=up)), "weights in common"),
    "table": (lambda: loop(weigh=lambda s, e, x, w: s.single(e, x) * w * (1.0 + (e == 3))), "apart"),
    "other expert's weights": (lambda: loop(weigh=lambda s, e, x, w: s.single((e + 1) % E, x) * w), "apart"),
    "layer norm": (lambda: loop(weigh=lambda s, e, x, w: F.layer_norm(s.single(e, x), (D,)) * w), "apart"),
    "capacity": (lambda: loop(weigh=lambda s, e, x, w: s.single(e, x) * w * (torch.arange(len(x)) < 2)[:, None]), "apart"),
    "dropout for ever, stacked": (lambda: loop(weigh=lambda s, e, x, w: F.dropout(s.single(e, x), 1e-6) * w), "also when it is"),
    "only in training": (lambda: loop(weigh=in_training), "in training: 0.0099 apart"),
    "identity experts": (lambda: loop(forward=identity_above), "identity experts beside its own"),
    "detached tokens": (lambda: loop(weigh=lambda s, e, x, w: s.single(e, x.detach()) * w), "gradients of the tokens"),
    "detached router": (lambda: loop(weigh=lambda s, e, x, w: s.single(e, x) * w.detach()), "gradients of the router"),
    "detached weights": (lambda: loop(single=lambda s, e, x: F.linear(s.inside(F.linear(x, s.gate_up_proj[e])), s.down_proj[e].detach())), "gradients of down_proj"),
    "no graph": (lambda: loop(forward=torch.no_grad()(Loop.forward)), "gradients could go"),
    "input changed, stacked": (lambda: loop(forward=lambda s, x, ids, w: Loop.forward(s, x, ids, w) + 0 * x.add_(1)), "in place|apart"),
    "tuple, stacked": (lambda: loop(forward=lambda s, x, ids, w: (Loop.forward(s, x, ids, w), ids)), "gives a tuple"),
    "four inputs": (lambda: loop(forward=lambda s, x, ids, w, bias: x), "takes 4 inputs"),
    "forward replaced": (lambda: changed(Loop(), forward=lambda x, ids, w: x), "was replaced"),
    "buffer, stacked": (lambda: changed(Loop(), buffer=True), "buffers (scale)"),
    "rows": (lambda: changed(Loop(), down_proj=nn.Parameter(torch.randn(E - 1, D, H))), "4 experts by down_proj, 5 by gate_up_proj"),
    "number of experts": (lambda: Loop(num_experts=E + 1), "6 experts by num_experts, 5 by gate_up_proj"),
    "quantised": (quantised, "torch.int8"),
    "parametrized": (lambda: changed(Loop(), norm=True), "module of its own"),
    "error inside": (lambda: loop(single=lambda s, e, x: s.nothing), "cannot be run on a few tokens: AttributeError"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_compute_something_else_is_refused(name):
    make, said = REFUSED[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = make()
    with pytest.raises(ModelError) as caught:
        recognise(module)
    message = str(caught.value)
    assert any(part in message for part in said.split("|")), message


@pytest.mark.parametrize(
    "make", ["scaled output", "other expert's weights", "table", "detached tokens", "list that scales"]
)
def test_large_experts_are_probed_without_copies(make, monkeypatch):
    monkeypatch.setattr(probe, "SMALL", 0)
    with pytest.raises(ModelError):
        recognise(REFUSED[make][0]())


def test_all_that_cannot_be_compared_are_tried(monkeypatch):
    """Though they are too many or too large for all to be."""
    monkeypatch.setattr(probe, "MOST", 3)
    with pytest.raises(ModelError, match="apart"):
        recognise(listed(lambda e: Expert(act=Slotted(1.0 + (e == 3)))))
