"""The machine that policies reckon with where none is given."""

import warnings
from types import SimpleNamespace

import pytest

from poise.stepwise.registry import POLICIES, parse_policy
from poise.stepwise.sharding import Balanced, Even, Heterogeneous
from poise.train.machine import TOKENS_ONLY, presumed, unknown, warn_of_rates

MESH = SimpleNamespace(ndim=2, shape=(2, 2))


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("Tesla V100-SXM2-16GB", "v100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X OAM", "mi300x"), ("NVIDIA GH200 480GB", ""), ("NVIDIA H200 MIG 1g.18gb", ""),
        ("NVIDIA A100-PCIE-40GB", ""), ("cpu", ""),
    ],
)  # fmt: skip
def test_a_gpu_that_has_a_preset_gets_it(name, preset):
    assert unknown([name] * 4) == ("" if preset else name)
    machine = presumed(MESH, [0, 1, 2, 3], [name] * 4)
    assert machine.name == (preset or "a100") and machine.devices_per_node_N.tolist() == [2, 2]


def test_different_gpus_have_none():
    assert unknown(["NVIDIA H200", "NVIDIA B200", "NVIDIA H200"]) == "NVIDIA B200, NVIDIA H200"
    assert presumed(MESH, [0, 1, 2, 3], ["NVIDIA H200", *["NVIDIA B200"] * 3]).name == "a100"


@pytest.mark.parametrize(
    "spec", [*POLICIES, "poise:objective=tokens", "hecate:overlap=4", "hecate-calibrated:overlap=4"]
)
def test_who_reckons_with_seconds_says_so(spec):
    priced = spec not in TOKENS_ONLY and spec not in ("poise:objective=tokens", "hecate:overlap=4")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_rates("cpu", parse_policy(spec), Even())
        warn_of_rates("", parse_policy(spec), Heterogeneous())
    assert [one.category for one in seen] == [UserWarning] * priced
    assert all("rates of an A100, and this runs on cpu" in str(one.message) for one in seen)


@pytest.mark.parametrize("spec", TOKENS_ONLY)
def test_who_asks_no_price_gets_none(spec):
    """The list is true: a price of nothing at all is not looked at."""
    from tests.stepwise.test_why_none import HOT, view_of

    from poise.stepwise.methods.split import spread_evenly

    view = view_of(HOT)
    nothing = SimpleNamespace(cluster=SimpleNamespace(
        node_D=view.price.cluster.node_D, speed_D=view.price.cluster.speed_D, num_devices=4,
        devices_per_node_N=view.price.cluster.devices_per_node_N), training=True)  # fmt: skip
    object.__setattr__(view, "price", nothing)
    policy = parse_policy(spec)
    load_SE = spread_evenly(view.predicted_E.astype(int), 4)
    policy.after_gate(view, policy.before_gate(view), load_SE)


def test_sharding_by_the_window_reckons_too():
    policy = parse_policy("expert-parallelism")
    with pytest.warns(UserWarning, match="cluster= sharding heterogeneous reckons"):
        warn_of_rates("cpu", policy, Heterogeneous())
    with pytest.warns(UserWarning, match="cluster= sharding balanced reckons"):
        warn_of_rates("cpu", policy, Balanced())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sharding in (None, Even(), Heterogeneous(overlap=2)):
            warn_of_rates("cpu", policy, sharding)
