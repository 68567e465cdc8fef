"""Sums of a token's experts on a device, and of its devices: rounded once, forward and back."""

import numpy as np
import pytest
import torch

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


def everything_here(send_N):
    """All pairs of all tokens are computed on this rank."""
    count = TOKENS * TOP_K
    pairs = Exchange(
        torch.arange(count), [count], [count], torch.arange(count), np.array([count]), 0, count, TOP_K, None, 0
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
    out = way.around(lambda _, x_Pd: x_Pd * scale)([], given)
    rows = (x.repeat_interleave(TOP_K, 0) * scale).to(least)
    expected = (rows * weight.reshape(-1, 1).to(least)).view(TOKENS, TOP_K, WIDTH)
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5 if least != dtype else 1e3 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out, expected.sum(1).to(dtype), **close)
    out.sum().backward()
    back = (weight.reshape(-1, 1) * scale).to(least).view(TOKENS, TOP_K).sum(1, keepdim=True)
    torch.testing.assert_close(given.grad[:, :WIDTH], back.to(dtype).expand(-1, WIDTH), **close)


def test_sums_over_devices_are_rounded_once():
    sent = torch.randn(64 * TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    way = everything_here(torch.arange(TOKENS).repeat(64))
    expected = sent.float().view(64, TOKENS, WIDTH).sum(0)
    torch.testing.assert_close(way.back(sent, Came()), expected.bfloat16(), rtol=2**-8, atol=1e-5)
