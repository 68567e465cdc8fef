"""Weights packed in fewer bits: within the stated bounds, the same bits whoever packs, and what cannot be is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.gather_cases import MINE
from tests.train.harness import as_gathered

from poise.train.packing import BF16, E4M3, GATHER_DTYPES, Packing

KINDS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@pytest.mark.parametrize("case", MINE)
def test_case(case, launched):
    launched("tests/train/gather_cases.py", world=4)


def some(seed: int, shape=(3, 4, 7), spread: float = 4.0, dtype=torch.float32) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=rng, dtype=torch.float64)
    return (value * torch.exp(spread * torch.randn(shape, generator=rng, dtype=torch.float64))).to(dtype)


def rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    packing, out = Packing(dtype), torch.empty_like(weight)
    packed = packing.pack(weight)
    assert packed.shape == packing.shape(tuple(weight.shape)) and packed.dtype == packing.element
    assert packed.nbytes == packing.nbytes(tuple(weight.shape))
    packing.unpack(packed, out)
    return out


@given(st.integers(0, 2**31), st.floats(0, 4), st.integers(-40, 40))
@settings(max_examples=80, deadline=None)
def test_errors_are_within_the_stated_bounds(seed, spread, exponent):
    weight = torch.ldexp(some(seed, spread=spread), torch.tensor(exponent))
    assert ((rounded(weight, BF16) - weight).abs() <= 2.0**-8 * weight.abs()).all()
    most = weight.abs().amax(-1, keepdim=True)
    assert ((rounded(weight, E4M3) - weight).abs() <= torch.maximum(2.0**-4 * weight.abs(), 2.0**-17 * most)).all()


@given(st.integers(0, 2**31), st.floats(0, 2), st.integers(-20, 12))
@settings(max_examples=80, deadline=None)
def test_float16_weights_are_within_the_stated_bound(seed, spread, exponent):
    """Also where they are so small that float16 has few of them, and up to its largest number."""
    weight = torch.ldexp(some(seed, spread=spread), torch.tensor(exponent)).clamp(-65504, 65504).half()
    most, exact = weight.double().abs().amax(-1, keepdim=True), weight.double()
    off = (rounded(weight, E4M3).double() - exact).abs()
    assert (off <= torch.maximum(2.0**-4 * exact.abs(), 2.0**-17 * most) + 2.0**-25).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_weights_stay_finite(dtype):
    most = torch.finfo(dtype).max
    weight = torch.tensor([[[most, -most, 0.97 * most], [0.96 * most, 1.0, -0.5 * most]]], dtype=dtype)
    got, exact = rounded(weight, E4M3), weight.double()
    off, bound = (got.double() - exact).abs(), torch.maximum(2.0**-4 * exact.abs(), torch.tensor(2.0**-17 * most))
    assert got.isfinite().all() and (off <= bound).all()
    weight[0, 0, 0] = float("inf")
    assert rounded(weight, E4M3)[0, 0, 0].isnan(), "what is not finite is not hidden"


@given(
    st.integers(0, 2**31),
    st.sampled_from(["bfloat16", "float8_e4m3fn"]),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_it_is_the_nearest_value_of_the_type(seed, gather, dtype):
    """Against a search among all values of the type."""
    weight = some(seed, spread=1.5).to(dtype)
    assert torch.equal(rounded(weight, getattr(torch, gather)), as_gathered(weight, gather))


@given(st.integers(0, 2**31), KINDS)
@settings(max_examples=40, deadline=None)
def test_an_expert_alone_is_packed_as_among_others(seed, dtype):
    weight = some(seed, spread=1.0, dtype=dtype)
    for kind in GATHER_DTYPES:
        whole, alone = Packing(kind).pack(weight), [Packing(kind).pack(one[None])[0] for one in weight]
        assert torch.equal(whole.view(torch.uint8), torch.stack(alone).view(torch.uint8))


@pytest.mark.parametrize("dtype", GATHER_DTYPES)
def test_edges(dtype):
    zero = torch.zeros(2, 3, 5)
    assert torch.equal(rounded(zero, dtype), zero)
    numbers = torch.tensor([0.5, -4.0, 0.0])  # one number an expert
    assert torch.equal(rounded(numbers, dtype), numbers)
    assert rounded(torch.zeros(0, 3, 5), dtype).shape == (0, 3, 5)
    bad = torch.ones(1, 2, 3)
    bad[0, 0, 1] = float("nan")
    assert rounded(bad, dtype)[0, 0, 1].isnan() and torch.equal(rounded(bad, dtype)[0, 1], bad[0, 1])
    bad[0, 0, 1] = float("inf")
    assert not rounded(bad, dtype)[0, 0, 1].isfinite()
    top = torch.tensor([[448.0, 447.9, 1.0], [224.0, 2.0**-100, -224.0]])[None]
    assert rounded(top, dtype).isfinite().all()
    tiny = torch.full((1, 1, 2), 2.0**-140)
    assert (rounded(tiny, dtype) - tiny).abs().max() <= 2.0**-140
