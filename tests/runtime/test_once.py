"""Sums of a token's experts on a device, and of its devices: rounded once, forward and back."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from poise.runtime.dispatch import Exchange
from poise.runtime.once import OnceExchange

TOKENS, TOP_K, WIDTH = 5, 64, 16


class Came:
    """What others have sent is what is sent."""

    def send(self, rows, sent_D):
        self.rows = rows
        return self

    def wait(self):
        return self.rows


class SumsMade(TorchDispatchMode):
    """In which types rows are added up; weights of pairs have a place each. A CPU's sums of bfloat16 are rounded once anyway; a GPU's are once a summand."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "index_add" in func.__name__ or func.__name__.startswith(("scatter_add", "index_put")):
            self.types |= {args[0].dtype} if args[0].dim() == 2 else set()
        return func(*args, **(kwargs or {}))


def everything_here(send_N):
    """All pairs of all tokens are computed on this rank."""
    count = TOKENS * TOP_K
    pairs = Exchange(
        *[torch.arange(count)] * 2,
        [count],
        [count],
        *[torch.arange(count)] * 2,
        np.array([count]),
        0,
        count,
        TOP_K,
        None,
        0,
    )
    copy_P = torch.arange(TOKENS).repeat_interleave(TOP_K)
    return OnceExchange(pairs, WIDTH, send_N, [len(send_N)], [TOKENS], copy_P, torch.arange(count))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_rounded_once(dtype):
    """As those of float32, or of the type if it is wider; gradients of tokens too."""
    generator, least = torch.Generator().manual_seed(0), torch.promote_types(dtype, torch.float32)
    way = everything_here(torch.arange(TOKENS))
    x = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = torch.rand(TOKENS, TOP_K, generator=generator).to(dtype)
    scale = torch.randn(TOKENS * TOP_K, 1, generator=generator).to(dtype)
    given = way.beside(x, weight).requires_grad_()
    with SumsMade() as made:
        out = way.around(lambda _, x_Pd: x_Pd * scale)([], given)
    rows = (x.repeat_interleave(TOP_K, 0) * scale).to(least)
    expected = (rows * weight.reshape(-1, 1).to(least)).view(TOKENS, TOP_K, WIDTH)
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5 if least != dtype else 1e3 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out, expected.sum(1).to(dtype), **close)
    assert made.types == {least}
    with SumsMade() as made:
        torch.autograd.backward(out, torch.ones_like(out))
    assert made.types == {least}
    back = (weight.reshape(-1, 1) * scale).to(least).view(TOKENS, TOP_K).sum(1, keepdim=True)
    torch.testing.assert_close(given.grad[:, :WIDTH], back.to(dtype).expand(-1, WIDTH), **close)


def test_sums_over_devices_are_rounded_once():
    sent = torch.randn(64 * TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    way = everything_here(torch.arange(TOKENS).repeat(64))
    expected = sent.float().view(64, TOKENS, WIDTH).sum(0)
    with SumsMade() as made:
        out = way.back(sent, Came())
    torch.testing.assert_close(out, expected.bfloat16(), rtol=2**-8, atol=1e-5)
    assert made.types == {torch.float32}
