"""What operations on rows of sharded experts give is the same on every rank, however many experts it owns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from poise.train import local_rows
from poise.train.ownership import Ownership
from poise.train.rows import ExpertRows, StackedRows, rows_of
from poise.util.errors import CommunicationError, OptionError

EXPERTS, A, B = 7, 4, 5
OWNED = (0, 1, 2, 4)


class Mesh:
    """One rank of a group in which nothing is sent."""

    device_type = "cpu"

    def get_local_rank(self) -> int:
        return 0

    def get_group(self) -> Any:
        return dist.group.WORLD


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def rows(owned: int, *axes: int, listed: bool = False, dtype: torch.dtype = torch.float64) -> ExpertRows:
    owner_E = np.ones(EXPERTS, np.int64)
    owner_E[:owned] = 0
    numbers = torch.randn(owned, *(axes or (A, B)), dtype=torch.float64, generator=torch.Generator().manual_seed(owned))
    return rows_of(numbers.to(dtype), Ownership(Mesh(), owner_E, listed))


def what(operation: Callable[[Any], Any], weight: ExpertRows) -> str:
    """What an operation gives: ``kept`` rows, snapshots ``before`` them, ``all``, plain tensors ``mine``, or an error."""
    try:
        out = operation(weight)
    except OptionError:
        return "refused"
    out = out[0] if isinstance(out, (tuple, list)) and not isinstance(out, torch.Size) and len(out) else out
    if isinstance(out, ExpertRows):
        assert out.shape[0] == weight.shape[0] and out.ownership is weight.ownership
        return "kept"
    if isinstance(out, StackedRows):
        return "before"
    return "all" if not isinstance(out, torch.Tensor) or not out.dim() else "mine"


KEPT: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda w: (w * 2 + w).abs().sqrt_() / 3, "matrix beside": lambda w: w + torch.ones(A, B),
    "mask of all": lambda w: w * torch.ones(EXPERTS, 1, 1), "compared": lambda w: (w > 0) & (w <= 1) | ~(w == 2),
    "reflected": lambda w: 1 - 2 / (3**w) + (-w) % 2 + 2 // (w + 9), "where": lambda w: torch.where(w > 0, w, 0.0),
    "clamped": lambda w: w.clamp(-1, 1).nan_to_num_().masked_fill(w > 0, 0.0), "gated": lambda w: F.silu(w) + F.gelu(w),
    "copied": lambda w: w.clone().detach().contiguous().cpu().float(), "data": lambda w: w.data,
    "like": lambda w: torch.zeros_like(w) + torch.full_like(w, 2.0), "folded": lambda w: w.view(len(w), -1),
    "shape of all": lambda w: w.reshape(EXPERTS, -1), "inferred": lambda w: w.view(-1, A * B),
    "flattened within": lambda w: w.flatten(1).unflatten(1, (A, B)), "more axes": lambda w: w.unsqueeze(-1).squeeze(-1),
    "squeezed": lambda w: w.unsqueeze(1).squeeze(), "first squeezed": lambda w: w.squeeze(0), "turned": lambda w: w.mT,
    "transposed": lambda w: w.transpose(1, 2).permute(0, 2, 1), "moved within": lambda w: w.movedim(1, 2),
    "expanded": lambda w: w.mean(dim=1, keepdim=True).expand(-1, A, B), "repeated": lambda w: w.repeat(1, 2, 1),
    "norms": lambda w: w.norm(dim=(1, 2)), "matrix norms": lambda w: torch.linalg.matrix_norm(w),
    "norms by axis": lambda w: torch.linalg.norm(w, dim=2), "spectra": lambda w: torch.linalg.svdvals(w),
    "vector of vectors": lambda w: w.norm(dim=(1, 2)) / w.abs().amax((1, 2)), "spread": lambda w: w.var(-1, True, True),
    "largest": lambda w: w.argmax(-1), "two largest": lambda w: w.topk(2), "sorted": lambda w: w.sort(dim=1),
    "soft": lambda w: w.softmax(-1).cumsum(1).flip(2), "rolled": lambda w: w.roll(1, 2), "unit": lambda w: F.normalize(w, dim=2),
    "products": lambda w: w @ w.mT @ w @ torch.ones(B, dtype=w.dtype), "einsum": lambda w: torch.einsum("eab,ecb->eac", w, w),
    "joined": lambda w: torch.cat([w, w], dim=1), "beside": lambda w: torch.stack([w, w], -1), "column": lambda w: w[:, :, 1],
    "last": lambda w: w[..., 0], "chosen": lambda w: w.select(2, 1), "chunks": lambda w: w.chunk(2, dim=2),
    "diagonals": lambda w: w.diagonal(dim1=1, dim2=2), "apart": lambda w: F.mse_loss(w, w + 1, reduction="none"),
    "larger": lambda w: torch.max(w, torch.ones(EXPERTS, 1, 1, dtype=w.dtype)), "copied out": lambda w: torch.zeros(w.shape).copy_(w),
    "triangle": lambda w: w.tril(), "snapshots": lambda w: torch.stack([w, w + 1]).mean(0),
    "largest of two": lambda w: torch.cat([w.unsqueeze(0), w.abs().unsqueeze_(0)], 0).amax(0),
}  # fmt: skip
OF_ALL: dict[str, Callable[[Any], Any]] = {
    "sum": lambda w: w.sum(), "mean": lambda w: w.mean(), "norm": lambda w: w.norm(), "linalg": lambda w: torch.linalg.norm(w),
    "deviation": lambda w: w.std(), "variance": lambda w: w.var(), "max": lambda w: w.max(), "amin": lambda w: w.amin(),
    "any": lambda w: (w > 0).any(), "all": lambda w: (w > 0).all(), "equal": lambda w: torch.equal(w, w), "count": lambda w: w.numel(),
    "near": lambda w: torch.allclose(w, w + 1), "turned": lambda w: w.mT.norm(), "norm of norms": lambda w: w.norm(dim=(1, 2)).norm(),
    "norm of a vector": lambda w: torch.linalg.norm(w.sum((1, 2)), 2), "of products": lambda w: (w @ torch.ones(B, dtype=w.dtype)).norm(),
    "diagonal": lambda w: w.diagonal(dim1=1, dim2=2).sum(), "of a row": lambda w: w.select(1, 1).sum(),
}  # fmt: skip
MINE: dict[str, Callable[[Any], Any]] = {
    "slice": lambda w: w[0:3], "part": lambda w: w.narrow(0, 0, 0), "some": lambda w: w[torch.zeros(len(w), dtype=torch.bool)],
    "local": local_rows, "of index": lambda w: w.index_select(0, torch.zeros(0, dtype=torch.int64)),
    "flat": lambda w: local_rows(w).flatten(), "cast": lambda w: torch.zeros(3).to(w), "cast as": lambda w: torch.zeros(len(w), A, B).type_as(w),
}  # fmt: skip
REFUSED: dict[str, Callable[[Any], Any]] = {
    "flatten": lambda w: w.flatten(), "view": lambda w: w.view(-1), "of length": lambda w: w.view(w.numel()),
    "matrix": lambda w: w.view(-1, B), "ravel": lambda w: w.ravel(), "of T": lambda w: w.T, "t": lambda w: w.sum(2).t(),
    "moved": lambda w: w.movedim(0, 1), "transposed": lambda w: w.transpose(0, 1), "permuted": lambda w: w.permute(2, 0, 1),
    "joined": lambda w: torch.cat([w, w]), "snapshots' norm": lambda w: torch.stack([w, w]).norm(),
    "snapshots moved": lambda w: torch.stack([w, w]).transpose(0, 1), "as one": lambda w: w[None].flatten(),
    "diagonal": lambda w: w.diagonal(), "histogram": lambda w: torch.histogram(w, 3), "histc": lambda w: torch.histc(w),
    "loss": lambda w: F.mse_loss(w, w + 1), "of cosines": lambda w: F.cosine_embedding_loss(w.sum(2), w.sum(2), torch.ones(())),
    "margin": lambda w: F.margin_ranking_loss(w, w, torch.ones(())), "hinge": lambda w: F.hinge_embedding_loss(w, w.sign()),
    "nll": lambda w: F.gaussian_nll_loss(w, w, w.abs()), "matrix norm": lambda w: torch.linalg.matrix_norm(w, dim=(0, 1)),
    "norm along": lambda w: torch.linalg.norm(w, dim=0), "rolled": lambda w: w.roll(1), "sum along": lambda w: w.sum(0),
    "kept axes": lambda w: w.amax(0, keepdim=True),
    "median": lambda w: w.median(), "quantile": lambda w: w.quantile(0.5), "argmax": lambda w: w.norm(dim=(1, 2)).argmax(),
    "sorted": lambda w: w.sort(0), "soft": lambda w: w.softmax(0), "einsum": lambda w: torch.einsum("eab,eab->", w, w),
    "contracted": lambda w: torch.einsum("eab,eac->abc", w, w), "dot": lambda w: w.sum((1, 2)).dot(w.sum((1, 2))),
    "outer": lambda w: torch.outer(w.sum((1, 2)), w.sum((1, 2))), "product": lambda w: torch.ones(3, len(w), dtype=w.dtype) @ w.sum(2),
    "linear": lambda w: F.linear(torch.ones(B, dtype=w.dtype), w.sum(1)), "of a mask": lambda w: w[w > 0], "number": lambda w: w.sum((1, 2)).item(),
    "truth": lambda w: bool(w.sum((1, 2))), "in": lambda w: 3.0 in w, "unique": lambda w: w.unique(), "nonzero": lambda w: w.nonzero(),
    "expanded": lambda w: w.sum(1).expand(6, -1, -1), "twice": lambda w: w.repeat(2, 1, 1), "trace": lambda w: w.sum(2).trace(),
    "dropout": lambda w: F.dropout(w, 0.5), "bernoulli": lambda w: torch.bernoulli(w.sigmoid()), "poisson": lambda w: torch.poisson(w.abs()),
    "misaligned": lambda w: w.sum(2) + w, "longer": lambda w: w + torch.ones(3, 1, 1, 1), "other rows": lambda w: w + torch.ones(6, A, B),
    "distance": lambda w: torch.cdist(w.sum(2), w.sum(2)), "gathered": lambda w: w.gather(0, torch.zeros(1, A, B, dtype=torch.int64)),
    "pruning": lambda w: nn.utils.parameters_to_vector([w]), "fans": lambda w: nn.init.xavier_uniform_(w.clone()),
    "scaled": lambda w: w.clone().normal_(0, 1 / w.size(0)), "bernoulli of rows": lambda w: torch.zeros(1).bernoulli_(w),
    "copied into more": lambda w: torch.zeros(3, A, B).copy_(w), "larger": lambda w: torch.max(w, torch.ones(6, A, B, dtype=w.dtype)),
    "bounds": lambda w: torch.bucketize(torch.ones(3), w.sum((1, 2))), "within": lambda w: torch.isin(torch.ones(3), w),
    "mean by hand": lambda w: w.sum((1, 2)) / w.size(0), "from the first": lambda w: w[None, 0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "name", "operation"),
    [(wanted, name, one) for wanted, table in (("kept", KEPT), ("all", OF_ALL), ("mine", MINE), ("refused", REFUSED))
     for name, one in table.items()],
    ids=lambda one: one if isinstance(one, str) else "",
)  # fmt: skip
def test_every_rank_gives_the_same_answer(wanted, name, operation):
    assert {owned: what(operation, rows(owned)) for owned in OWNED} == dict.fromkeys(OWNED, wanted)


@pytest.mark.parametrize("owned", OWNED)
def test_weights_of_all_experts_beside_rows_give_each_its_own(owned):
    """Of a dense model: its parameters are as good as plain tensors, one by one and in lists."""
    dense = nn.Parameter(torch.randn(EXPERTS, A, B, dtype=torch.float64))
    mine = dense.detach()[:owned]
    with torch.no_grad():
        for made in (
            rows(owned).copy_(dense), rows(owned).lerp_(dense, 1.0), rows(owned).mul_(0).add_(dense),
            torch._foreach_lerp([rows(owned)], [dense], 1.0)[0], torch._foreach_add([rows(owned) * 0], [dense])[0],
        ):  # fmt: skip
            assert isinstance(made, ExpertRows)
            torch.testing.assert_close(local_rows(made), mine)
        several = [rows(owned), torch.zeros(3, dtype=torch.float64)]
        torch._foreach_copy_(several, [dense, torch.ones(3, dtype=torch.float64)])
    assert torch.equal(local_rows(several[0]), mine) and several[1].sum() == 3


@pytest.mark.parametrize(
    "asked", [torch.norm, torch.sum, lambda w: w.abs().max(), lambda w: w.std(), torch.Tensor.mean]
)
def test_what_one_rank_alone_asks_of_all_experts_is_a_typed_error(asked, monkeypatch):
    def lonely(*_args, **_kwargs):
        raise RuntimeError("Timed out waiting 8000ms for recv operation to complete")

    monkeypatch.setattr(dist, "all_reduce", lonely)
    with pytest.raises(CommunicationError, match="on rank 0: Timed out waiting 8000ms") as caught:
        asked(rows(2))
    assert "every rank asks" in caught.value.hint and "local_rows" in caught.value.hint


def test_other_errors_of_a_reduction_keep_their_own_words(monkeypatch):
    def wrong(*_args, **_kwargs):
        raise RuntimeError("Invalid scalar type")

    monkeypatch.setattr(dist, "all_reduce", wrong)
    with pytest.raises(RuntimeError, match="Invalid scalar type") as caught:
        torch.norm(rows(2))
    assert not isinstance(caught.value, CommunicationError)


def test_an_index_is_no_row_though_it_is_as_long():
    square = rows(4, 4, 5)
    assert what(lambda w: w.select(0, 1), square) == "mine" == what(lambda w: w[1], square)


def test_half_precision_sums_do_not_overflow():
    wide = rows(4, 200, 100)
    half = wide.to(torch.float16)
    scaled = rows_of(local_rows(half) * 30 + 60, half.ownership)
    exact = rows_of(local_rows(scaled).double(), half.ownership)
    for ask in (torch.std, torch.var, torch.mean):
        got = ask(scaled)
        assert got.dtype is torch.float16 and float(got) == pytest.approx(float(ask(exact)), rel=1e-3)


@pytest.mark.parametrize("args", [(80, {"high": 90}), (80, 90, {}), ({"low": 80, "high": 90},)])
def test_random_integers_keep_their_least(args):
    *given, named = args
    drawn = local_rows(torch.randint_like(rows(4), *given, **named))
    assert drawn.min() >= 80 and drawn.max() < 90


@pytest.mark.parametrize("fill", [nn.init.xavier_uniform_, nn.init.xavier_normal_, nn.init.kaiming_normal_,
                                  lambda w: nn.init.kaiming_normal_(w, mode="fan_out")])  # fmt: skip
def test_fans_of_a_list_are_those_of_one_expert(fill):
    """However deep a caller is, whatever modes of PyTorch are on."""

    class Nested(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    weight, whole = rows(2, 30, 50, listed=True), [torch.empty(30, 50, dtype=torch.float64) for _ in range(EXPERTS)]
    torch.manual_seed(3)
    with Nested(), Nested(), Nested(), Nested(), Nested(), Nested():
        fill(weight)
    torch.manual_seed(3)
    for one in whole:
        fill(one)
    assert torch.equal(local_rows(weight), torch.stack(whole[:2]))
    assert nn.init._calculate_fan_in_and_fan_out(weight) == (50, 30)


def test_numbers_of_experts_are_sent_and_shown():
    vector = rows(2).norm(dim=(1, 2))
    dist.all_gather([torch.zeros(2, dtype=torch.float64) for _ in range(2)], vector)
    assert vector.cpu().numpy().shape == (2,) and len(vector.tolist()) == 2
    with pytest.raises(OptionError, match="other experts") as error:
        dist.all_reduce(vector)
    assert "poise.train.local_rows" in error.value.hint


VARIANTS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    f"{kind.__name__} {named}": lambda p, kind=kind, named=named: kind(p, lr=0.01, **named)
    for kind, every in {
        torch.optim.SGD: [{"momentum": 0.9, "nesterov": True}, {"fused": True}], torch.optim.Adam: [{"amsgrad": True}, {"fused": True}],
        torch.optim.AdamW: [{}, {"fused": True}], torch.optim.NAdam: [{}], torch.optim.RAdam: [{}], torch.optim.Adamax: [{}],
        torch.optim.Adagrad: [{}, {"fused": True}], torch.optim.Adadelta: [{}], torch.optim.ASGD: [{}], torch.optim.Rprop: [{}],
        torch.optim.RMSprop: [{"centered": True, "momentum": 0.5}], torch.optim.Adafactor: [{}],
    }.items()
    for plain in every
    for named in [plain, *([{**plain, "foreach": True}] if "fused" not in plain else []),
                  *([{**plain, "differentiable": True}] if "fused" not in plain and kind is not torch.optim.Adafactor else [])]
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_optimizer_of_pytorch_steps_as_on_plain_weights(variant):
    """On one rank that owns all, whose sums over the ranks are its own."""
    start, optimizers, weights = local_rows(rows(EXPERTS)), [], []
    apart = "differentiable" in variant  # which PyTorch allows on no leaf
    for sharded in (False, True):
        owner = rows(EXPERTS).ownership
        weight = nn.Parameter(rows_of(start.clone(), owner) if sharded else start.clone(), requires_grad=not apart)
        optimizers.append(VARIANTS[variant]([weight]))
        weights.append(weight)
        for step in range(3):
            grad = start.roll(step + 1, 2) * (step + 1)
            weight.grad = rows_of(grad, owner) if sharded else grad
            with torch.no_grad():
                optimizers[-1].step()
    torch.testing.assert_close(local_rows(weights[1]), weights[0].detach(), rtol=1e-12, atol=0)
    assert isinstance(weights[1].data, ExpertRows)
