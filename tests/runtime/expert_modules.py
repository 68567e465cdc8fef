"""Modules of experts, listed and stacked, as people write them; tests vary their parts."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from poise.runtime.moe import DenseExperts, ExpertList

E, D, H = 5, 8, 12
SILU, BIAS_FREE = nn.SiLU(), nn.Linear(D, H, bias=False)


class PlainExperts(DenseExperts):
    """Experts of two matrices: ``down(act(up(x)))``."""

    def __init__(self, num_experts, hidden_size, inner_size):
        super().__init__()
        self.act_fn = F.gelu
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size))
        for weight in (self.up_proj, self.down_proj):
            if not weight.is_meta:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def expert(self, e, x_nd):
        return F.linear(self.act_fn(F.linear(x_nd, self.up_proj[e])), self.down_proj[e])


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


class Slotted:
    """Nothing can be compared of it."""

    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x):
        return torch.tanh(x) * self.scale


class Forever(Expert):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.01)


class Dropping(Expert):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.01, training=self.training)


def changed(module, buffer=False, norm=False, **given):
    for name, value in given.items():
        setattr(module, name, value)
    if buffer:
        module.register_buffer("scale", torch.ones(E))
    if norm:
        parametrizations.weight_norm(module, "down_proj")
    return module
