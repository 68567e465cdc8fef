"""Products of rows with the matrix of their slot: by whatever computes them, with rows that are nobody's."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from poise.runtime.device import products  # noqa: E402

SLOTS, INNER, OUT, ROWS = 4, 8, 16, 40
CODES = {"masked": products.MASKED}
if hasattr(torch.nn.functional, "grouped_mm"):  # of float32 on a CPU too
    CODES["torch"] = products.TORCH


def given(seed, dtype):
    """Rows, matrices, ends: slots without a row, and rows after the last end that are no numbers."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 12, SLOTS) * (rng.random(SLOTS) < (0.7, 1.0, 0.0)[seed % 3])
    count[-1] -= max(0, count.sum() - ROWS + 1)
    ends = torch.from_numpy(np.cumsum(count).astype(np.int32))
    x = torch.from_numpy(rng.standard_normal((ROWS, INNER))).to(dtype)
    x[ends[-1] :] = torch.nan
    return (
        x.requires_grad_(),
        torch.from_numpy(rng.standard_normal((SLOTS, INNER, OUT))).to(dtype).requires_grad_(),
        ends,
    )


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("seed", range(6))
def test_products_and_gradients_are_those_of_a_loop(name, seed):
    dtype = torch.float64 if name == "masked" else torch.float32
    x, weight, ends = given(seed, dtype)
    y = products.slot_product(x, weight, ends, CODES[name])
    (y * torch.arange(y.numel(), dtype=dtype).view(y.shape)).sum().backward()
    want, want_x, want_w = torch.zeros(ROWS, OUT).to(dtype), torch.zeros_like(x), torch.zeros_like(weight)
    dy, start = torch.arange(y.numel(), dtype=dtype).view(y.shape), 0
    for slot, end in enumerate(ends.tolist()):
        at = slice(start, end)
        want[at] = x.detach()[at] @ weight.detach()[slot]
        want_x[at] = dy[at] @ weight.detach()[slot].T
        want_w[slot] = x.detach()[at].T @ dy[at]
        start = end
    for got, wanted in ((y, want), (x.grad, want_x), (weight.grad, want_w)):
        torch.testing.assert_close(
            got, wanted, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-3 if dtype == torch.float32 else 1e-10
        )


def test_what_computes_is_chosen_by_device_type_and_width(monkeypatch):
    class On:
        is_cuda = True

        def __init__(self, dtype):
            self.dtype = dtype

    monkeypatch.setattr(products, "triton_code", lambda: "triton")
    wide, odd = torch.empty(2, 8, 16), torch.empty(2, 8, 12)
    assert products.code_for(torch.empty(1, 8), wide) is products.MASKED
    assert products.code_for(On(torch.bfloat16), wide) is products.TORCH
    for x, weight in ((On(torch.bfloat16), odd), (On(torch.float32), wide)):
        assert products.code_for(x, weight) == "triton"
