"""The number of an expert's bits: another bit, order or tensor, another number."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.runtime import canary
from poise.runtime.canary import Canary, fingerprint

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)


def expert(seed, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 3, generator=made).to(dtype), torch.randn(7, generator=made).to(dtype)]


def reference(tensors):
    """The sum spelled out, in Python's own numbers."""
    total = 0
    for tensor in tensors:
        flat = tensor.contiguous().view(-1)
        bits = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[flat.element_size()]
        total *= canary.MIX
        for place, bit in enumerate(flat.view(torch.uint8).numpy().view(bits).tolist()):
            total += (bit + 1) * (2 * place + 1) * canary.STEP
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("chunk", [4, 2**20])
def test_it_is_the_sum_spelled_out(monkeypatch, dtype, chunk):
    monkeypatch.setattr(canary, "CHUNK", chunk)
    assert fingerprint(expert(1, dtype)) == reference(expert(1, dtype))


@given(st.integers(0, 99), st.sampled_from(TYPES), st.integers(0, 1), st.integers(0, 14), st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_every_single_bit_counts(seed, dtype, which, place, bit):
    mine, other = expert(seed, dtype), expert(seed, dtype)
    assert fingerprint(mine) == fingerprint(other)
    flat = other[which].view(-1).view(torch.uint8)
    flat[place % len(flat)] ^= 1 << bit
    assert fingerprint(mine) != fingerprint(other)


def test_order_and_emptiness_count():
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    numbers = [fingerprint(one) for one in ([first, second], [second, first], [first.flip(0), second], [torch.zeros(2), second],
                                            [first, torch.zeros(2)], [torch.zeros(3), second])]  # fmt: skip
    assert len(set(numbers)) == len(numbers)
    nan = [torch.tensor([float("nan"), 1.0])]
    assert fingerprint(nan) == fingerprint([nan[0].clone()])


def test_a_slice_of_a_bank_is_what_it_holds():
    """Rows of a stack, also where they are not contiguous."""
    bank = torch.randn(4, 3, 5)
    assert fingerprint([bank[2]]) == fingerprint([bank[2].clone()])
    assert fingerprint([bank.transpose(1, 2)[2]]) == fingerprint([bank[2].t().contiguous()])


def test_wrong_copies_are_named():
    experts = {(0, 1): {"w": torch.ones(3)}, (1, 0): {"w": torch.arange(3.0)}}
    number = np.zeros((2, 2), np.int64)
    for place, weights in experts.items():
        number[place] = fingerprint(list(weights.values()))
    good = Canary(number)
    assert good.wrong(experts) == []
    experts[1, 0]["w"][2] = 7
    assert good.wrong(experts) == [(1, 0)]
