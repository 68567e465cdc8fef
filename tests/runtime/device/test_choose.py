"""One interface: numba's kernels for tensors on the host, Triton's on a GPU, and the slot tables both read."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tests.runtime.device import mirror
from tests.runtime.device.cases import random_case

from poise.cost.split import exact_quota
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import settle
from poise.stepwise.host_kernels import HostKernels
from poise.stepwise.kernels import ABSENT, EMPTY, STEP, LayerSlots, prices, refusal, unsaid
from poise.util.errors import OptionError, PlacementError

torch = pytest.importorskip("torch")
from poise.runtime.device import choose  # noqa: E402

NONE = torch.zeros(1, dtype=torch.int32)


def test_on_the_host_numba_plans_a_step_and_its_plan_is_whole():
    rng = np.random.default_rng(0)
    for _ in range(20):
        case = random_case(rng)
        kernels = choose.kernels_for(NONE, case.table, case.price, case.pairs)
        assert isinstance(kernels, choose.OnHost) and "cpu" in kernels.why and not kernels.refused
        load_SE, load_E = torch.from_numpy(case.load_SE), torch.from_numpy(case.load_E)
        slots, leave = kernels.prepare(load_E, torch.from_numpy(case.expert_DS))
        plan = kernels.split(load_SE, slots, NONE)
        held = case.table.holders(slots.numpy())
        assert plan.dtype == slots.dtype == torch.int32 and (held >= case.table.holders(case.table.expert_DS)).all()
        assert (plan.numpy()[~held] == 0).all() and torch.equal(plan.sum(dim=1).int(), load_E)
        rows = [kernels.rows(load_SE, plan, source) for source in range(len(load_SE))]
        assert torch.equal(sum(rows), plan)
        assert torch.equal(torch.stack([row.sum(dim=1) for row in rows]).int(), load_SE)
        best = mirror.split(case.load_SE, slots.numpy(), case.table.turn_DS, case.table.node_D).quota_DS
        assert best.sum(axis=1).max() == plan.sum(dim=0).max()
        best = exact_quota(case.load_E, held, np.ones(len(load_SE)))
        assert leave.tolist() == HostKernels(case.table, case.price).decide(case.load_E, slots.numpy(), best).tolist()


def test_a_gpu_gets_triton_and_numba_where_triton_or_the_price_will_not_do(monkeypatch):
    case = random_case(np.random.default_rng(1), nodes=[2, 2])
    on_gpu = SimpleNamespace(is_cuda=True, device="cpu")  # as far as is looked at
    uneven = replace(case.price, cluster=replace(case.price.cluster, speed_D=np.array([1.0, 1.0, 1.0, 0.5])))
    assert unsaid(case.price) is None and "0.5" in unsaid(uneven)
    monkeypatch.setattr(choose, "DEVICE", SimpleNamespace(DeviceKernels=lambda *args, **more: (args, more)))
    assert choose.kernels_for(on_gpu, case.table, case.price, 4096) == (
        (case.table, case.price, 4096, "cpu"),
        {"margin": 0.03},
    )
    for price, pairs, said in ((uneven, 4096, "speeds"), (case.price, 1 << 29, "more than")):
        kernels = choose.kernels_for(on_gpu, case.table, price, pairs)
        assert isinstance(kernels, choose.OnHost) and said in kernels.why and kernels.refused
    monkeypatch.setattr(choose, "DEVICE", None)
    monkeypatch.setattr(choose, "WHY_NONE", "no Triton: here")
    assert choose.kernels_for(on_gpu, case.table, case.price, 4096).why == "no Triton: here"
    with pytest.raises(OptionError, match="speeds"):
        prices(uneven, 0.03)


def test_a_price_of_other_devices_is_refused():
    case = random_case(np.random.default_rng(1), nodes=[2, 2])
    fewer = case.price.without([1])
    assert fewer.cluster.node_D.tolist() == [0, 1, 1] and fewer.window_s == case.price.window_s
    with pytest.raises(OptionError, match="a price of 3 devices where 4 run"):
        choose.kernels_for(NONE, case.table, fewer, case.pairs)


def test_steps_of_real_models_go_to_the_device_and_longer_ones_to_the_host():
    """Reading weights and starting are paid once, and not for each of a step's pairs."""
    model, machine = ModelSpec.parse("deepseek-v3"), Cluster.parse("8x8:h100")
    case = random_case(np.random.default_rng(1))
    static_ED = np.arange(256)[:, None] // 4 == np.arange(64)
    table = LayerSlots.of(static_ED, 2, machine.node_D)
    for tokens, fits in ((256, True), (8192, True), (1 << 20, False)):
        price = replace(case.price, cluster=settle(machine, model, 64 * tokens), model=model)
        assert (refusal(table, price, 64 * tokens * model.top_k) is None) == fits, tokens


@pytest.mark.parametrize("source", [-1, 4, 99])
def test_a_source_that_is_none_is_refused(source):
    case = random_case(np.random.default_rng(1), nodes=[2, 2])
    kernels = choose.kernels_for(NONE, case.table, case.price, case.pairs)
    plan = kernels.split(torch.from_numpy(case.load_SE), torch.from_numpy(case.expert_DS), NONE)
    with pytest.raises(OptionError, match=f"source {source} of 4"):
        kernels.rows(torch.from_numpy(case.load_SE), plan, source)


def test_slot_tables_of_placements():
    static_ED = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0]], bool)
    table = LayerSlots.of(static_ED, 1, np.array([0, 0, 1]))
    assert table.expert_DS.tolist() == [[0, 2, EMPTY], [1, EMPTY, EMPTY], [0, EMPTY, EMPTY]]
    assert table.turn_DS.tolist() == [[0, 0, STEP], [0, STEP, ABSENT], [1, STEP, ABSENT]]
    wanted = static_ED.copy()
    wanted[1, 0] = wanted[2, 2] = True
    filled = table.with_holders(table.expert_DS, wanted)
    np.testing.assert_array_equal(table.holders(filled), wanted)
    np.testing.assert_array_equal(table.with_holders(filled, wanted), filled)
    wanted[0, 1] = wanted[2, 1] = True
    with pytest.raises(PlacementError, match="2 step replicas in 1 slots"):
        table.with_holders(filled, wanted)
    twice, none = np.array([[0, 0], [1, 2]], np.int32), np.array([[0, 1], [1, EMPTY]], np.int32)
    for expert_DS, said in ((twice, "2 times on device 0"), (none, "expert 2 has no slot")):
        with pytest.raises(PlacementError, match=said):
            LayerSlots(expert_DS, expert_DS * 0, 3, np.zeros(2, np.int32))
    with pytest.raises(PlacementError, match="lie together"):
        LayerSlots.of(static_ED, 1, np.array([0, 1, 0]))
