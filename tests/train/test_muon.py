"""Muon: as PyTorch's on every matrix, and on sharded experts as on dense ones (two processes)."""

import pytest
import torch
from tests.train.muon_cases import MINE

from poise.train import Muon
from poise.train.muon import COEFFICIENTS, orthogonalised
from poise.util.errors import OptionError


@pytest.mark.parametrize("case", MINE)
def test_case(case, launched):
    launched("tests/train/muon_cases.py", world=2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("options", [{}, {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}])
def test_a_stack_is_pytorch_s_muon_on_every_matrix(shape, options):
    """In bfloat16, as PyTorch computes; a product of a batch may differ from one alone by a rounding."""
    stacked = torch.nn.Parameter(random(3, *shape).float())
    alone = [torch.nn.Parameter(one.detach().clone()) for one in stacked]
    ours, theirs = Muon([stacked], lr=0.1, **options), torch.optim.Muon(alone, lr=0.1, **options)
    for step in range(3):
        stacked.grad = random(3, *shape, seed=1 + step).float()
        for one, grad in zip(alone, stacked.grad, strict=True):
            one.grad = grad.clone()
        ours.step(), theirs.step()
    expected = torch.stack([one.detach() for one in alone])
    moved = (expected - random(3, *shape).float()).abs().max()
    assert (stacked.detach() - expected).abs().max() < 0.03 * moved


def test_singular_values_come_near_one():
    """And singular vectors stay: against the factors of each matrix by itself."""
    for shape in ((7, 3), (3, 7)):
        matrices = random(4, *shape)
        got = orthogonalised(matrices, COEFFICIENTS, 5, 1e-7, torch.float64)
        for one, out in zip(matrices, got, strict=True):
            u, _, v = torch.linalg.svd(one, full_matrices=False)
            values = u.T @ out @ v.T
            assert (values - torch.diag(values.diag())).abs().max() < 1e-9
            assert 0.5 < values.diag().min() and values.diag().max() < 1.3


def test_what_is_no_matrix_is_refused():
    with pytest.raises(OptionError, match="1 axes"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(OptionError, match="lr must be at least 0, got -1"):
        Muon([weight], lr=-1)
    with pytest.raises(OptionError, match="unknown adjust_lr_fn 'other'"):
        Muon([weight], adjust_lr_fn="other")
    weight.grad = torch.zeros(2, 2)
    Muon([weight]).step()  # a gradient of zeros is no division by zero
    assert torch.equal(weight, torch.zeros(2, 2))
