"""Experts run by their own code: what would compute something else is refused when its kind is asked for."""

import gc
import random
import weakref
from functools import partial
from types import MethodType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from poise.runtime import probe
from poise.runtime.experts import recognise, recognise_all
from poise.runtime.moe import ExpertList, GatedExperts, PlainExperts
from poise.util.errors import ModelError

E, D, H = 5, 8, 12
SILU, BIAS_FREE = nn.SiLU(), nn.Linear(D, H, bias=False)


class Expert(nn.Module):
    """One of a list; what varies is an attribute or a subclass."""

    def __init__(self, act=torch.tanh, **given):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, H), nn.Linear(H, D), act
        for name, value in given.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def expert(body):
    """A subclass whose forward is ``body``."""
    return type("Other", (Expert,), {"forward": body})


def listed(make, count=E):
    return ExpertList(make(e) for e in range(count))


def equal(body, count=E):
    """Experts of one such subclass."""
    kind = expert(body)
    return listed(lambda e: kind(), count)


def one_of(change, number=3, make=lambda e: Expert()):
    """Equal experts, one of which is changed afterwards."""
    out = listed(make)
    change(out[number])
    return out


class Loop(nn.Module):
    """Stacked experts as people write them: weights by the known names, and a forward with hooks for variants."""

    def __init__(self, **given):
        super().__init__()
        self.num_experts, self.act_fn = E, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * H, D))
        self.down_proj = nn.Parameter(torch.randn(E, D, H))
        for name, value in given.items():
            setattr(self, name, value)

    def inside(self, x):
        gate, up = x.chunk(2, -1)
        return self.act_fn(gate) * up

    def single(self, e, x):
        return F.linear(self.inside(F.linear(x, self.gate_up_proj[e])), self.down_proj[e])

    def weigh(self, e, x, w):
        return self.single(e, x) * w

    def forward(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.weigh(e, x[t], w[t, k, None]).to(out.dtype))
        return out


def loop(**methods):
    """A module of :class:`Loop` with other methods."""
    return type("Other", (Loop,), methods)()


def doubled(self, x, ids, w):
    return 2.0 * Loop.forward(self, x, ids, w)


def up_first(self, x):
    up, gate = x.chunk(2, -1)
    return F.silu(gate) * up


def clamped(self, x):
    gate, up = x.clamp(max=7.0).chunk(2, -1)
    return F.silu(gate) * up


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


class Held(Expert):
    """Multiplies by what stands in a place that all experts share."""

    def forward(self, x):
        return super().forward(x) * self.place["factor"]


class Slotted:
    """Nothing can be compared of it."""

    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x):
        return torch.tanh(x) * self.scale


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
    "dropout for ever": (lambda: listed(lambda e: _Forever()), "also when it is evaluated"),
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
    "forward replaced": (lambda: _with(Loop(), forward=lambda x, ids, w: x), "was replaced"),
    "buffer, stacked": (lambda: _with(Loop(), buffer=True), "buffers (scale)"),
    "rows": (lambda: _with(Loop(), down_proj=nn.Parameter(torch.randn(E - 1, D, H))), "4 experts by down_proj, 5 by gate_up_proj"),
    "number of experts": (lambda: Loop(num_experts=E + 1), "6 experts by num_experts, 5 by gate_up_proj"),
    "quantised": (quantised, "torch.int8"),
    "parametrized": (lambda: _with(Loop(), norm=True), "module of its own"),
    "error inside": (lambda: loop(single=lambda s, e, x: s.nothing), "cannot be run on a few tokens: AttributeError"),
}  # fmt: skip


class _Tuple(Expert):
    def forward(self, x):
        return super().forward(x), None


class _Forever(Expert):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.01)


class _Dropping(Expert):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.01, training=self.training)


class _Counted(Expert):
    forward = counted


class _ScaledList(ExpertList):
    def forward(self, x, ids, w):
        return 3.0 * super().forward(x, ids, w)


class _OtherList(ExpertList):
    def forward(self, x, logits):
        return x


def _with(module, buffer=False, norm=False, **given):
    for name, value in given.items():
        setattr(module, name, value)
    if buffer:
        module.register_buffer("scale", torch.ones(E))
    if norm:
        parametrizations.weight_norm(module, "down_proj")
    return module


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


def weight_normed(e):
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(D, H)), nn.Tanh(), nn.Linear(H, D))


def grouped():
    """Computes by a kernel that does not know float64."""

    def forward(self, x, ids, w):
        order = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=E + 1)[:E].cumsum(0).int()
        up = F.grouped_mm(x[order // ids.shape[1]], self.gate_up_proj.transpose(1, 2), offs=ends)
        out = torch.empty(len(order), D, dtype=x.dtype)
        out[order] = F.grouped_mm(self.inside(up), self.down_proj.transpose(1, 2), offs=ends)
        return (out.view(*ids.shape, D) * w[..., None]).sum(1)

    return loop(forward=forward)


def gate_put_on():
    """A gate of one instance, which the forward calls."""
    out = type("Other", (Loop,), {"inside": lambda s, x: s._apply_gate(x)})(limit=7.0)
    out._apply_gate = MethodType(clamped, out)
    return out


def compiled(module):
    module.compile(backend="eager")
    return module


def tied_inside(module):
    module[2] = module[0]
    return module


class Masked(Loop):
    """Knows ids that name no expert, and computes in float32."""

    def single(self, e, x):
        return super().single(e, x.float().to(x.dtype))


class Gated(Loop):
    """By the names of transformers, with the limit that some of its modules have."""

    limit = 7.0

    def _apply_gate(self, x):
        gate, up = x.clamp(max=self.limit).chunk(2, -1)
        return F.silu(gate) * up

    inside = _apply_gate


def transposed(flag):
    """Square enough that its shapes do not say how its weights lie."""
    out = type("Turned", (Loop,), {"single": lambda s, e, x: s.inside(x @ s.gate_up_proj[e]) @ s.down_proj[e]})()
    out.gate_up_proj, out.down_proj = (nn.Parameter(torch.randn(E, a, b)) for a, b in ((D, 2 * H), (H, D)))
    if flag:
        out.is_transposed = True
    return out


RIGHT = {
    "gated": lambda: GatedExperts(E, D, H),
    "plain": lambda: PlainExperts(E, D, H),
    "list": lambda: listed(lambda e: Expert()),
    "list, wide": lambda: listed(lambda e: nn.Sequential(nn.Linear(D, 3), nn.ReLU(), nn.Linear(3, D))),
    "bare list": lambda: nn.ModuleList(Expert() for _ in range(E)),
    "one expert": lambda: listed(lambda e: Expert(), 1),
    "equal lambdas": lambda: listed(lambda e: Expert(act=lambda x: torch.tanh(x) * 2)),
    "what cannot be compared, equal": lambda: listed(lambda e: Expert(act=Slotted(2.0))),
    "one activation of all": lambda: listed(lambda e, act=SILU: Expert(act=act)),
    "grouped kernels": lambda: grouped(),
    "compiled": lambda: listed(lambda e: compiled(Expert())),
    "shared part": lambda: listed(lambda e: tied_inside(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)))),
    "weight norm": lambda: listed(weight_normed),
    "dropout that drops nothing": lambda: listed(lambda e: nn.Sequential(Expert(), nn.Dropout(0.0))),
    "loop": Loop,
    "in float32": Masked,
    "gate of its own": Gated,
    "gate put on the module": lambda: gate_put_on(),
    "transposed": lambda: transposed(True),
    "transposed, not said": lambda: transposed(False),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_what_computes_the_same_is_known(name, large, monkeypatch):
    """By few copies of the weights, and as if they were too large for that."""
    if large:
        monkeypatch.setattr(probe, "SMALL", 0)
    dtype = torch.float32 if name == "grouped kernels" else torch.float64
    module = RIGHT[name]().to(dtype)
    kind = recognise(module)
    assert kind.hidden == D and not kind.random
    x = torch.randn(3, D, dtype=dtype)
    ids, w = torch.tensor([[0], [1 % len(ids_of(module))], [0]]), torch.rand(3, 1, dtype=dtype)
    got = torch.stack([kind.one(ids_of(module)[i], x[t : t + 1])[0] * w[t] for t, (i,) in enumerate(ids.tolist())])
    want = (
        torch.stack([module[i](x[t]) * w[t] for t, (i,) in enumerate(ids.tolist())])
        if name == "bare list"
        else module(x, ids, w)
    )
    limit = 1e-5 if name in ("in float32", "grouped kernels") else 1e-12
    assert torch.allclose(got, want, rtol=limit, atol=limit)


def ids_of(module):
    """Weights of every expert."""
    if isinstance(module, nn.ModuleList):
        return [dict(one.named_parameters()) for one in module]
    rows = {name: weight.unbind(0) for name, weight in module.named_parameters()}
    return [{name: row[e] for name, row in rows.items()} for e in range(E)]


@pytest.mark.parametrize(
    "make", ["scaled output", "other expert's weights", "table", "detached tokens", "list that scales"]
)
def test_large_experts_are_probed_without_copies(make, monkeypatch):
    monkeypatch.setattr(probe, "SMALL", 0)
    with pytest.raises(ModelError):
        recognise(REFUSED[make][0]())


@pytest.mark.parametrize("make", [lambda e: _Dropping(), lambda e: nn.Sequential(Expert(), nn.Dropout(0.01)), lambda e: nn.Sequential(Expert(), nn.RReLU())])  # fmt: skip
def test_random_numbers_in_training_are_known(make):
    assert recognise(listed(make)).random


def test_all_that_cannot_be_compared_are_tried(monkeypatch):
    """Though they are too many or too large for all to be."""
    monkeypatch.setattr(probe, "MOST", 3)
    with pytest.raises(ModelError, match="apart"):
        recognise(listed(lambda e: Expert(act=Slotted(1.0 + (e == 3)))))


def test_whether_the_id_above_all_means_no_expert():
    for name, known in {"loop": True, "gated": True, "list": True, "grouped kernels": False}.items():
        assert recognise(RIGHT[name]()).leaves_out == known, name


def test_random_numbers_of_stacked_experts():
    module = Loop(act_fn=nn.Sequential(nn.SiLU(), nn.Dropout(0.5)))
    kind = recognise(module)
    assert kind.random
    weights, x = {name: weight[0] for name, weight in module.named_parameters()}, torch.ones(1, D)
    kind.follow(False)
    assert torch.equal(kind.one(weights, x), kind.one(weights, x))
    kind.follow(True)
    assert not torch.equal(kind.one(weights, x), kind.one(weights, x))
    assert module.act_fn.training  # which is not the one that runs


def test_the_mode_is_followed():
    """What depends on ``training`` and is not random."""
    experts = equal(lambda s, x: Expert.forward(s, x) * (2.0 if s.training else 1.0))
    kind = recognise(experts)
    assert not kind.random
    weights = dict(experts[0].named_parameters())
    out = {}
    for mode in (True, False, True):
        kind.follow(mode)
        out.setdefault(mode, kind.one(weights, torch.ones(1, D)))
    assert torch.allclose(out[True], 2 * out[False])


@pytest.mark.parametrize("make", [lambda: GatedExperts(E, D, H), lambda: listed(lambda e: _Dropping()),
                                  lambda: listed(lambda e: _Forever())])  # fmt: skip
def test_nothing_is_left_behind(make):
    """Random numbers of everyone, modes, weights, gradients."""
    module = make()
    if isinstance(module, ExpertList):
        for one in module:
            one.down.eval()
    before = [part.training for part in module.modules()], [weight.clone() for weight in module.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    try:
        recognise(module)
    except ModelError:
        assert type(module[0]) is _Forever
    assert [part.training for part in module.modules()] == before[0]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before[1], strict=True))
    assert all(weight.grad is None and type(weight) is nn.Parameter for weight in module.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_surroundings_take_no_part():
    """Meta device, no gradients, other types: the same answer to the last digits."""
    module, mark = GatedExperts(E, D, H), recognise(GatedExperts(E, D, H)).mark
    with torch.device("meta"):
        empty = GatedExperts(E, D, H)
        assert recognise(empty).mark == recognise(module).mark == mark
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert recognise(module).mark == mark
    with torch.inference_mode():
        assert recognise(module).mark == mark
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert recognise(module.to(torch.bfloat16)).mark == mark
        with pytest.raises(ModelError):
            recognise(loop(forward=doubled))
    finally:
        torch.set_default_dtype(torch.float32)
    assert recognise(_with(GatedExperts(E, D, H), act_fn=F.gelu)).mark != mark


def test_what_is_shared_stays_so():
    """A place that experts read when they run, such as a temperature that a schedule sets."""
    place = {"factor": 1.0}
    experts = listed(lambda e: Held(place=place))
    kind, weights, x = recognise(experts), dict(experts[0].named_parameters()), torch.ones(1, D)
    before = kind.one(weights, x)
    place["factor"] = 3.0
    assert torch.allclose(kind.one(weights, x), 3 * before)


@pytest.mark.parametrize(
    "make", [lambda: GatedExperts(E, D, H), lambda: listed(lambda e: Expert()), lambda: gate_put_on()]
)
def test_no_weight_is_kept(make):
    module = make()
    weights = [weakref.ref(weight) for weight in module.parameters()]
    kind = recognise(module)
    del module
    gc.collect()
    assert kind and not any(ref() is not None for ref in weights)


def test_hooks_of_the_module_do_not_run():
    calls = []
    for module in (GatedExperts(E, D, H), listed(lambda e: Expert())):
        module.register_forward_hook(lambda *_: calls.append(1) and None)
        module.register_forward_pre_hook(lambda *_: calls.append(1) and None)
        recognise(module)
        assert not calls and module._forward_hooks


def test_layers_are_probed_once_if_they_are_alike(monkeypatch):
    tried = []
    prove = probe.prove
    monkeypatch.setattr("poise.runtime.experts.prove", lambda *given: tried.append(given) or prove(*given))
    kinds = recognise_all({str(n): GatedExperts(E, D, H) for n in range(4)})
    assert len(tried) == 1 and len({kind.mark for kind in kinds.values()}) == 1
    recognise_all({str(n): listed(lambda e: Expert(act=lambda x: x * x)) for n in range(3)})
    assert len(tried) == 2
    with pytest.raises(ModelError, match=r"^second: Other computes"):
        recognise_all({"first": Loop(), "second": loop(inside=up_first)})
    kinds = recognise_all({str(n): listed(lambda e, n=n: Expert(act=lambda x: x * n)) for n in (1, 2)})
    assert len(tried) == 6 and kinds["1"].mark != kinds["2"].mark


def test_transformers_own_implementations():
    """The plain one is what the others promise; one of the user's is what runs; a gate that only some use is refused."""
    from transformers import MixtralConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def build(implementation, kind=MixtralExperts):
        config = MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=E)
        config._experts_implementation = implementation
        out = kind(config)
        for weight in out.parameters():
            nn.init.normal_(weight)
        return out, config

    for name in ("eager", "batched_mm", "grouped_mm", None):
        module, config = build(name)
        assert recognise(module).name == "gated" and config._experts_implementation == name

    def mine(self, x, ids, w):
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, x, ids, w * w)

    ALL_EXPERTS_FUNCTIONS.register("mine", mine)
    with pytest.raises(ModelError, match="apart"):
        recognise(build("mine")[0])
    gate = type("Clamped", (MixtralExperts,), {"_apply_gate": clamped})
    with pytest.raises(ModelError, match="apart"):
        recognise(build("eager", gate)[0])


def test_the_reference_calls_each_expert_itself():
    """``ExpertList`` is what sharded runs are compared with."""
    module = listed(lambda e: expert(lambda s, x: Expert.forward(s, x) * s.scale)(scale=1.0 + e)).double()
    x, ids, w = (
        torch.randn(6, D, dtype=torch.float64),
        torch.arange(6)[:, None] % E,
        torch.ones(6, 1, dtype=torch.float64),
    )
    want = torch.stack([module[e](x[t]) for t, (e,) in enumerate(ids.tolist())])
    assert torch.allclose(module(x, ids, w), want, rtol=1e-12)
