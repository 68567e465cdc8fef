"""Measured constants: what a cluster names, what is chosen for it, what is refused, and that files keep them."""

from dataclasses import replace

import numpy as np
import pytest

from poise.cost.compute import device_compute, expert_seconds, expert_times, tokens_per_pair
from poise.machine.cluster import Cluster
from poise.machine.constants import ENGINES, derated_kernel, gpu_of, kernel_of, links_of, peak_of, tables
from poise.machine.kernel import AllToAllLinks, ExchangeWay, ExpertKernel
from poise.machine.model import ModelSpec
from poise.machine.presets import DEVICES, PEAKS
from poise.machine.settle import LOW_LATENCY_TOKENS, flow_of, ground, settle
from poise.planning.engine_rules import parse_engine
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import solve
from poise.replay.static import replay
from poise.routing.batch import RoutingBatch
from poise.util.errors import ClusterError

MAVERICK, DEEPSEEK = ModelSpec.parse("llama-4-maverick"), ModelSpec.parse("deepseek-r1")


def test_every_kernel_and_library_can_be_named():
    for row in tables().kernels:
        assert row["gpu"] in DEVICES and row["gpu"] in PEAKS and row["engine"] in ENGINES
        if row["default"]:
            kernel = Cluster.parse(f"1x8:{row['gpu']}+{row['engine']}.{row['type']}").kernel
            assert kernel.read_factor == row["read_factor"] and kernel.start_s == row["start_s"]
    for row in tables().links:
        links = Cluster.parse(f"1x8:{row['gpu']}+{row['library']}").links
        assert links.dispatch.intra_bytes_per_s > 0


def test_links_say_what_they_send():
    """By library, or as a file says; anything else is refused."""
    assert flow_of(Cluster.parse("2x8:h200+deepep-ll")) == flow_of(Cluster.parse("1x8:h100+nccl")) == "home"
    assert flow_of(Cluster.parse("1x8:gb200+one-sided")) == "home_device_dedup"
    assert (
        flow_of(Cluster.parse("2x8:h200+deepep-normal"))
        == flow_of(Cluster.parse("2x8:h200+datasheet"))
        == "home_node_dedup"
    )
    way = ExchangeWay(1e-5, 1e9)
    links = AllToAllLinks("mine", way, way, flow="home_device_dedup")
    assert AllToAllLinks.from_dict(links.to_dict(), "links") == links
    with pytest.raises(ClusterError, match="'stay'"):
        AllToAllLinks.from_dict({**links.to_dict(), "flow": "stay"}, "links")


def test_eight_bits_on_a_machine_without_them():
    """An A100 has no fp8: weights of a byte are computed with in 16 bits."""
    assert peak_of("a100", 1.0) == peak_of("a100", 2.0) == DEVICES["a100"]["flops_per_s"]
    assert peak_of("h100", 1.0) > 1.9 * peak_of("h100", 2.0)


def test_at_most_one_kernel_is_the_default():
    names = [(row["gpu"], row["engine"], row["type"]) for row in tables().kernels if row["default"]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("1x8:h200+vllm.fp9", "no kernel vllm.fp9 was measured on h200"),
        ("1x8:h200+nothing", "unknown library 'nothing'"),
        ("1x8:h200+vllm.bf16+vllm.fp8_block", "one too many"),
        ("1x8:h200+nccl+deepep-ll", "one too many"),
        ("1x8:h200+datasheet+nccl", "one too many"),
        ("1x8:h200+datasheet+datasheet", "one too many"),
        ("1x8:h201", "unknown cluster preset"),
        ("1x8:mi300x+vllm.bf16", "nothing|no kernel"),
    ],
)
def test_what_is_not_known_is_refused(spec, says):
    with pytest.raises(ClusterError, match=says):
        Cluster.parse(spec)


def test_a_cluster_that_names_all_is_final():
    cluster = Cluster.parse("2x8:h200+vllm.fp8_block+deepep-ll")
    assert cluster.open == () and settle(cluster, DEEPSEEK, 512) is cluster
    sheet = Cluster.parse("2x8:h200+datasheet")
    assert sheet.open == () and sheet.kernel is None and sheet.links is None
    assert sheet.intra_bytes_per_s == DEVICES["h200"]["intra_bytes_per_s"]


def test_type_and_library_follow_model_and_batch():
    cluster = Cluster.parse("1x8:h200")
    assert cluster.open == ("kernel", "links")
    few, many = (settle(cluster, DEEPSEEK, 8 * (LOW_LATENCY_TOKENS + more)) for more in (0, 1))
    assert few.kernel == many.kernel == kernel_of("h200", "vllm", "fp8_block")
    assert few.links == links_of("h200", "deepep-ll", many_nodes=False)
    assert many.links == links_of("h200", "deepep-normal", many_nodes=False)
    assert settle(cluster, MAVERICK, 8).kernel.type == "bf16"
    assert settle(cluster, MAVERICK, 8, engine="trtllm").kernel == kernel_of("h200", "trtllm", "bf16")
    named = Cluster.parse("1x8:h200+nccl")
    assert named.open == ("kernel",) and settle(named, MAVERICK, 8).links == named.links


def test_what_was_not_measured_is_the_datasheet_derated():
    cluster = settle(Cluster.parse("2x8:mi300x"), MAVERICK, 512)
    assert cluster.kernel == derated_kernel("mi300x", 2.0) and "derated" in ground(cluster)
    assert cluster.kernel.flops_per_s == DEVICES["mi300x"]["flops_per_s"]
    assert cluster.links.dispatch.intra_bytes_per_s < DEVICES["mi300x"]["intra_bytes_per_s"]
    n = np.array([1.0, 100.0, 10_000.0])
    assert (
        expert_seconds(n, cluster, MAVERICK) > expert_seconds(n, Cluster.parse("2x8:mi300x+datasheet"), MAVERICK)
    ).all()


def test_networks_of_a_preset_scale_the_measured_port():
    fast, slow = (settle(Cluster.parse(f"2x8:{name}"), MAVERICK, 64) for name in ("h100", "h100-100g"))
    assert gpu_of("h100-100g") == "h100" and fast.kernel.flops_per_s == slow.kernel.flops_per_s
    ratio = DEVICES["h100"]["inter_bytes_per_s"] / DEVICES["h100-100g"]["inter_bytes_per_s"]
    assert fast.dispatch_wire.inter_bytes_per_s == pytest.approx(ratio * slow.dispatch_wire.inter_bytes_per_s)


def test_a_kernel_of_another_type_is_refused_where_it_is_priced():
    cluster = Cluster.parse("1x8:h200+vllm.fp8_block")
    with pytest.raises(ClusterError, match="1 bytes a weight, llama-4-maverick has 2"):
        expert_seconds(np.ones(1), settle(cluster, MAVERICK, 64), MAVERICK)


def test_open_constants_are_never_priced():
    with pytest.raises(ClusterError, match="leaves kernel and links open"):
        expert_seconds(np.ones(1), Cluster.parse("1x8:h200"), MAVERICK)


def test_the_form_by_hand():
    """start + read, computed and moved bytes of every active expert, at the device's speed (DESIGN 3.1)."""
    kernel = ExpertKernel("k", "bf16", 2.0, 7.0, 2.0, 3.0, 5.0, 100.0, 10.0)
    cluster = Cluster(np.array([0, 0]), np.array([1.0, 2.0]), 1.0, 1.0, 1.0, 1.0, 1.0, kernel=kernel)
    model = ModelSpec("m", 1, (0,), 4, 2, 4, 3)
    read, compute = 2.0 * 3 * 4 * 3 * 2 / 10.0, 3.0 * 2 * 3 * 4 * 3 / 100.0
    moved = 5.0 * 2.0 * (2 * 4 + 3 * 3 + 2 * 4 * 0.75) / 10.0  # 3 of 4 pairs of two devices are a token's first there
    tokens_ED = np.array([[3.0, 0], [1, 0], [40, 8], [0, 0.5]])
    one = read + 3 * moved + read + moved + max(read, 40 * compute) + 40 * moved
    two = max(read, 8 * compute) + 8 * moved + 0.5 * max(read, compute) + 0.5 * moved
    assert tokens_per_pair(2, 2) == 0.75
    np.testing.assert_allclose(device_compute(tokens_ED, cluster, model), [7 + one, 7 + two / 2])
    idle = device_compute(np.zeros((4, 2)), cluster, model)
    assert (idle == 0).all() and expert_times(cluster, model).start_s == 7


def test_a_start_of_each_way_and_its_peers():
    links = AllToAllLinks("l", ExchangeWay(1.0, 8.0, 2.0, 0.5, 4.0), ExchangeWay(2.0, 4.0))
    cluster = Cluster(np.array([0, 0, 1]), np.ones(3), 1.0, 1.0, 1.0, 9.0, 3.0, intra_latency_s=0.25, inter_latency_s=0.5,
                      links=links)  # fmt: skip
    assert cluster.dispatch_wire == (1.0 + 0.5 * 2 + 4.0, 8.0, 2.0)
    assert cluster.combine_wire == (2.0 + 0.5, 4.0, 3.0)  # what was not measured between nodes is the cluster's own
    assert cluster.plain_wire == (0.75, 9.0, 3.0)
    alone = Cluster(np.array([0]), np.ones(1), 1.0, 1.0, 1.0, 9.0, 3.0, links=links)
    assert alone.dispatch_wire.start_s == alone.plain_wire.start_s == 0


@pytest.mark.parametrize(
    "spec", ["2x4:h200", "2x4:h200+vllm.fp8_block", "2x2:gb200+one-sided@tp2", "1x4:a100+datasheet"]
)
def test_files_keep_constants(tmp_path, spec):
    cluster = Cluster.parse(spec)
    path = tmp_path / "c.yaml"
    for one in (cluster, settle(cluster, replace(DEEPSEEK, weight_bytes=1.0), 64)):
        path.write_text(one.to_yaml())
        again = Cluster.parse(path)
        for name in ("kernel", "links", "open", "preset", "tensor_parallel", "name", "plain_wire", "dispatch_wire"):
            assert getattr(again, name) == getattr(one, name), name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kernel: 3", "must be a mapping"),
        ("kernel: {name: k}", "lacks 'type'"),
        ("kernel: {name: k, speed: 2}", "does not know 'speed'"),
        ("links: {name: l, dispatch: {start_s: 1}, combine: {}}", "lacks 'intra_bytes_per_s'"),
        ("links: {name: l, dispatch: {start_s: x, intra_bytes_per_s: 1}, combine: {start_s: 1, intra_bytes_per_s: 1}}", "start_s"),
        ("links: {name: l, dispatch: {start_s: 1, intra_bytes_per_s: 0}, combine: {start_s: 1, intra_bytes_per_s: 1}}", "above 0"),
        ("open: kernel", "open lists"),
        ("open: [doors]", "open lists"),
        ("preset: h200+vllm.fp9", "no kernel"),
    ],
)  # fmt: skip
def test_broken_files_are_cluster_errors(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(f"devices_per_node: 2\n{text}\n")
    with pytest.raises(ClusterError, match=says):
        Cluster.parse(tmp_path / "c.yaml")


def test_a_file_with_own_rates_is_taken_at_its_word(tmp_path):
    (tmp_path / "c.yaml").write_text("devices_per_node: 2\npreset: h200\nflops_per_s: 1e12\nintra_bytes_per_s: 1e9\n")
    cluster = Cluster.parse(tmp_path / "c.yaml")
    assert cluster.open == () and cluster.dispatch_wire.intra_bytes_per_s == 1e9
    (tmp_path / "c.yaml").write_text("devices_per_node: 2\npreset: h200\nflops_per_s: 1e12\n")
    assert Cluster.parse(tmp_path / "c.yaml").open == ("links",)


def test_a_problem_settles_its_cluster_for_its_engine():
    load = np.full((2, 1, 128), 4.0)
    batch = RoutingBatch(load, np.full(2, 0.5), 1, np.array([1], np.int32))
    problem = PlacementProblem(
        batch, Cluster.parse("1x8:h200"), MAVERICK, np.full(8, 16), engine=parse_engine("tensorrt-llm")
    )
    assert problem.cluster.kernel == kernel_of("h200", "trtllm", "bf16")
    assert problem.cluster.links.name == "deepep-ll"
    with pytest.raises(ClusterError, match="open"):
        replay(batch, solve(problem, method="lpt").placement, Cluster.parse("1x8:h200"), MAVERICK, traffic="home",
               split="even")  # fmt: skip
