"""Experts run by their own code: what is known of a kind, and what asking for it leaves as it was."""

import gc
import random
import weakref
from types import MethodType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.runtime.expert_modules import (
    SILU,
    D,
    Dropping,
    E,
    Expert,
    Forever,
    H,
    Loop,
    PlainExperts,
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
from poise.runtime.experts import recognise, recognise_all
from poise.runtime.moe import ExpertList, GatedExperts
from poise.util.errors import ModelError


class Held(Expert):
    """Multiplies by what stands in a place that all experts share."""

    def forward(self, x):
        return super().forward(x) * self.place["factor"]


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


@pytest.mark.parametrize("make", [lambda e: Dropping(), lambda e: nn.Sequential(Expert(), nn.Dropout(0.01)), lambda e: nn.Sequential(Expert(), nn.RReLU())])  # fmt: skip
def test_random_numbers_in_training_are_known(make):
    assert recognise(listed(make)).random


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


@pytest.mark.parametrize("make", [lambda: GatedExperts(E, D, H), lambda: listed(lambda e: Dropping()),
                                  lambda: listed(lambda e: Forever())])  # fmt: skip
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
        assert type(module[0]) is Forever
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
    assert recognise(changed(GatedExperts(E, D, H), act_fn=F.gelu)).mark != mark


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
