"""All-to-alls of known constants are found again; a label that was fitted is not judged."""

from dataclasses import replace

import numpy as np
import pytest
from tests.lab.calibrate import tables_cases as cases

from poise.lab.calibrate.tables import alltoall, result
from poise.lab.calibrate.tables.alltoall import AllToAllFit, AllToAllRows, LinkRows
from poise.lab.calibrate.tables.source import TableSource
from poise.util.errors import OptionError

ONE_NODE = AllToAllFit(12e-6, 0.0, 0.0, 250e9, None)
NODES = AllToAllFit(13e-6, 0.15e-6, 6e-6, 250e9, 48e9)
TOKENS = np.array([1, 8, 64, 512, 4096], float)


def node_rows(true=ONE_NODE, noise=0.0):
    size, tokens = (one.reshape(-1) for one in np.meshgrid([2048.0, 4096.0, 7168.0], TOKENS))
    bare = AllToAllRows(
        np.full(15, 7.0), np.zeros(15, bool), 7 * tokens * size, np.zeros(15), np.ones(15), size.astype(int)
    )
    seconds = true.seconds(bare) * np.exp(noise * np.random.default_rng(0).standard_normal(15))
    return replace(bare, seconds_R=seconds)


def nodes_rows(true=NODES):
    nodes, tokens = (one.reshape(-1) for one in np.meshgrid([1.0, 2.0, 4.0, 8.0], TOKENS))
    copies = 8 * 7168 * tokens
    bare = AllToAllRows(
        8 * nodes - 1, nodes > 1, copies * 7 / (8 * nodes), copies * (nodes - 1) / nodes, np.ones(20), nodes.astype(int)
    )
    return replace(bare, seconds_R=true.seconds(bare))


def test_start_and_rate_of_one_node_are_found_again():
    fit = alltoall.judged_exchange(node_rows())
    assert fit.start_s == pytest.approx(12e-6, rel=0.01) and fit.intra_bytes_per_s == pytest.approx(250e9, rel=0.01)
    assert fit.inter_bytes_per_s is None and fit.peer_s == 0 and fit.nodes_start_s == 0 and fit.error < 0.01
    assert alltoall.judged_exchange(node_rows(noise=0.1)).error < 0.2


def test_constants_of_several_nodes_are_found_again():
    fit = alltoall.fit_exchange_rows(nodes_rows())
    for name in ("start_s", "peer_s", "nodes_start_s", "intra_bytes_per_s", "inter_bytes_per_s"):
        assert getattr(fit, name) == pytest.approx(getattr(NODES, name), rel=0.05), name


def test_a_label_is_judged_by_the_others_alone():
    rows = node_rows(noise=0.05)
    before = alltoall.held_out_exchange(rows)
    wild = np.where(rows.label_R == 4096, 30 * rows.seconds_R, rows.seconds_R)
    after = alltoall.held_out_exchange(replace(rows, seconds_R=wild))
    here = rows.label_R == 4096
    assert (after[here] == before[here]).all() and (after[~here] != before[~here]).all()
    assert np.isnan(alltoall.judged_exchange(rows.take(here)).error), "nothing to judge by"


def test_what_is_not_known_is_left_out_of_a_cluster_file():
    node = result.links_to_dict(LinkRows("h200", "deepep-ll", "node", "1", node_rows(), node_rows()))
    assert set(node["dispatch"]) == {"start_s", "peer_s", "intra_bytes_per_s", "error"} and node["name"] == "deepep-ll"
    many = result.links_to_dict(LinkRows("h200", "deepep-ll", "nodes", "1", nodes_rows(), nodes_rows()))
    assert set(many["combine"]) == {
        "start_s",
        "peer_s",
        "nodes_start_s",
        "intra_bytes_per_s",
        "inter_bytes_per_s",
        "error",
    }
    entry = result.link_entry(LinkRows("h200", "deepep-ll", "nodes", "1", nodes_rows(), nodes_rows()))
    assert entry["doubtful"] and entry["rows"] == 20 and list(entry["dispatch"]) == list(entry["combine"])


def ranks_hit_by_trying(experts, top_k, ranks, rng):
    own = experts // ranks
    return np.mean([len(set(rng.choice(experts, top_k, replace=False) // own)) for _ in range(20_000)])


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(256, 8, 8), (8, 2, 8), (16, 1, 4), (64, 6, 4), (8, 8, 4)])
def test_mean_number_of_ranks_that_a_token_reaches(experts, top_k, ranks):
    got = alltoall.ranks_hit(np.array([float(experts)]), np.array([float(top_k)]), ranks)[0]
    assert got == pytest.approx(ranks_hit_by_trying(experts, top_k, ranks, np.random.default_rng(0)), rel=0.02)


def deepep_table(start_us, gb_per_s, version, folder):
    grid = [(h, n, k, e) for h in (2048, 7168) for k, e in ((8, 256), (4, 128)) for n in (1, 32, 1024)]
    hidden, tokens, top_k, experts = np.array(grid, float).T
    sent = tokens * top_k * 7 / 8
    cases.write(folder / "h200_sxm" / "comm" / "sglang" / version / "wideep_deepep_ll_perf.parquet", {
        "node_num": [1] * len(grid), "hidden_size": hidden.tolist(), "num_token": tokens.tolist(), "num_topk": top_k.tolist(),
        "num_experts": experts.tolist(),
        "dispatch_avg_t_us": (start_us + sent * (hidden * (1 + 4 / 128) + 16) / gb_per_s / 1e3).tolist(),
        "combine_avg_t_us": (start_us + sent * 2 * hidden / gb_per_s / 1e3).tolist(),
    })  # fmt: skip


def nccl_table(folder):
    sizes = [256 * 4**i for i in range(10)]
    data = {"op_name": [], "nccl_dtype": [], "num_gpus": [], "message_size": [], "latency": []}
    for op in ("alltoall", "all_reduce"):
        for kind, item in (("half", 2), ("int8", 1)):
            for gpus in (4, 8):
                for size in sizes:
                    seconds = 9e-6 + size * item * (gpus - 1) / gpus / 270e9
                    for key, value in zip(data, (op, kind, gpus, size, seconds * 1e3), strict=True):
                        data[key].append(value)
    cases.write(folder / "h200_sxm" / "comm" / "nccl" / "2.29.2" / "nccl_perf.parquet", data)


def domain_table(folder):
    grid = [(way, ep, n) for way in ("dispatch", "combine", "prepare") for ep in (2, 4, 8, 16) for n in (1, 64, 4096)]
    seconds = [
        15e-6 + 0.2e-6 * (ep - 1) + n * min(ep, 8) * (1 - 1 / ep) * 7168 * (0.5625 if way == "dispatch" else 2) / 650e9
        for way, ep, n in grid
    ]
    cases.write(folder / "gb200" / "comm" / "trtllm" / "1.3.0" / "trtllm_alltoall_perf.parquet", {
        "op_name": [f"alltoall_{way}" for way, _, _ in grid], "kernel_source": ["NVLinkOneSided"] * len(grid),
        "moe_dtype": ["nvfp4"] * len(grid), "num_tokens": [n for _, _, n in grid], "hidden_size": [7168] * len(grid),
        "topk": [8] * len(grid), "moe_ep_size": [ep for _, ep, _ in grid], "latency": [1e3 * one for one in seconds],
    })  # fmt: skip


def test_tables_of_libraries_are_read_and_the_newest_release_counts(tmp_path):
    pytest.importorskip("pyarrow")
    deepep_table(40.0, 100.0, "0.5.9", tmp_path)
    deepep_table(10.0, 250.0, "0.5.12", tmp_path)
    nccl_table(tmp_path)
    domain_table(tmp_path)
    found = {(rows.gpu, rows.library): rows for rows in alltoall.read_links(TableSource(tmp_path))}
    assert set(found) == {("h200", "deepep-ll"), ("h200", "nccl"), ("gb200", "one-sided")}
    wanted = {"deepep-ll": (10e-6, 250e9, 0.0), "nccl": (9e-6, 270e9, 0.0), "one-sided": (15e-6, 650e9, 0.2e-6)}
    for (_, library), rows in found.items():
        start, rate, peer = wanted[library]
        for one in (rows.dispatch, rows.combine):
            fit = alltoall.judged_exchange(one)
            assert fit.start_s == pytest.approx(start, rel=0.02) and fit.intra_bytes_per_s == pytest.approx(
                rate, rel=0.02
            )
            assert fit.peer_s == pytest.approx(peer, rel=0.05) and fit.error < 0.03
    assert found["h200", "deepep-ll"].version == "0.5.12" and not found["h200", "deepep-ll"].doubtful
    assert (found["gb200", "one-sided"].dispatch.peers_R >= 3).all()


def test_a_table_of_exchanges_that_lacks_a_column_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    cases.write(tmp_path / "h200_sxm" / "comm" / "nccl" / "2" / "nccl_perf.parquet", {"op_name": ["alltoall"]})
    with pytest.raises(OptionError, match="lacks the column 'nccl_dtype'"):
        alltoall.read_links(TableSource(tmp_path))
