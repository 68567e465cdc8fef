"""Pairs with and without EPLB: the model that made the rows predicts their ratios; rows with EPLB are never fitted."""

from dataclasses import replace

import numpy as np
import pytest
from benchmarks import tables_evidence as evidence
from benchmarks import tables_wide as wide
from tests.lab.calibrate import tables_cases as cases

from poise.lab.calibrate.tables import result
from poise.lab.calibrate.tables.source import TableSource
from poise.util.errors import OptionError

KNOWN: dict = {}


def made_up(gpu="h200"):
    grid = [
        (hidden, ranks, tokens, alpha, slots)
        for hidden in (2048, 4096, 7168) for ranks in (8, 32) for tokens in (16, 64, 512, 4096)
        for alpha in (1.01, 1.2) for slots in (-1, 256, 288)
    ]  # fmt: skip
    shape = np.array([(hidden, 1536, 256, 8) for hidden, *_ in grid])
    ranks, tokens, slots = (np.array([one[i] for one in grid]) for i in (1, 2, 4))
    alpha = np.array([one[3] for one in grid])
    rows = wide.WideRows(
        gpu, "fp8_block", "sglang", "wide-EP", "1.3.0", 1.0, shape, ranks, tokens, alpha, np.ones(len(grid)), slots
    )
    return replace(rows, seconds_R=cases.TRUE.seconds(wide.wide_work(rows, KNOWN)))


def test_the_model_of_the_rows_tells_gains_and_the_price_of_slots():
    rows = made_up()
    eplb, slots = wide.ratios(rows, wide.wide_work(rows, KNOWN))
    assert len(eplb.measured_P) == 3 * 2 * 4 * 2 * 2 and len(slots.measured_P) == 3 * 2 * 4 * 2
    told = eplb.figures()
    assert (
        told["model_mape"] < 0.01
        and told["model_sign"] == 1
        and told["measured"] == pytest.approx(told["model_mean"], rel=0.01)
    )
    assert told["datasheet_mape"] > told["model_mape"] and told["tokens_mape"] > told["model_mape"]
    assert slots.figures()["model_sign"] == 1
    assert sorted(set(eplb.tokens_each_P)) == [0.5, 2, 16, 128]
    assert set(wide.together([eplb, slots]).predicted_P) == set(wide.PREDICTORS)


def test_rows_with_eplb_and_rows_of_the_judged_shape_are_not_fitted():
    rows = made_up()
    work = wide.wide_work(rows, KNOWN)
    before = wide.ratios(rows, work)[0].predicted_P["model"]
    balanced = rows.slots_R > 0
    slower = replace(work, seconds_R=np.where(balanced, 9 * work.seconds_R, work.seconds_R))
    assert (wide.ratios(rows, slower)[0].predicted_P["model"] == before).all()
    one_shape = rows.shape_R4[:, 0] == 4096
    slower = replace(work, seconds_R=np.where(one_shape, 9 * work.seconds_R, work.seconds_R))
    after = wide.ratios(rows, slower)[0].predicted_P["model"]
    key = [
        (tuple(s), r, t, a)
        for s, r, t, a in zip(rows.shape_R4.tolist(), rows.ranks_R, rows.tokens_R, rows.alpha_R, strict=True)
    ]
    shape_P = np.array([one[0][0] for one in dict.fromkeys(key) for _ in range(2)])
    assert (after[shape_P == 4096] == before[shape_P == 4096]).all() and (
        after[shape_P != 4096] != before[shape_P != 4096]
    ).any()


def table(rows):
    number = len(rows.seconds_R)
    hidden, inner, experts, top_k = rows.shape_R4.T.tolist()
    eplb = rows.slots_R > 0
    return {
        "moe_dtype": ["fp8_block"] * number, "num_tokens": rows.tokens_R.tolist(), "hidden_size": hidden, "inter_size": inner,
        "topk": top_k, "num_experts": experts, "num_slots": np.where(eplb, rows.slots_R, 256).tolist(),
        "moe_tp_size": [1] * number, "moe_ep_size": rows.ranks_R.tolist(),
        "distribution": [f"power_law_{a:g}{'_eplb' if e else ''}" for a, e in zip(rows.alpha_R, eplb, strict=True)],
        "latency": (1e3 * rows.seconds_R).tolist(),
    }  # fmt: skip


def test_a_wide_table_is_read_and_its_figures_are_made(tmp_path):
    pytest.importorskip("pyarrow")
    rows = made_up()
    path = tmp_path / "h200_sxm" / "moe" / "trtllm" / "1.3.0" / "wideep_moe_perf.parquet"
    cases.write(path, table(rows))
    (got,) = wide.read_wide(TableSource(tmp_path))
    assert (got.slots_R == rows.slots_R).all() and (got.alpha_R == rows.alpha_R).all()
    figures = evidence.wide_figures(TableSource(tmp_path), KNOWN)
    assert figures["rows"] == len(rows.seconds_R) and figures["types"] == {"h200": "fp8_block"}
    assert figures["eplb"]["all"]["pairs"] == sum(one["pairs"] for one in figures["eplb"]["by_tokens"].values())
    bad = table(rows) | {"moe_dtype": ["fp8_block", *["nvfp4"] * (len(rows.seconds_R) - 1)]}
    cases.write(path, bad)
    with pytest.raises(OptionError, match="one known type is needed"):
        wide.read_wide(TableSource(tmp_path))


def test_figures_of_kernels_count_every_row_once():
    found = [result.judged_kernel(cases.rows(noise=0.02), cases.KNOWN)]
    figures = evidence.kernel_figures(found)
    assert sum(row["rows"] for row in figures["bands"]) == len(found[0].rows.seconds_R)
    assert figures["kernels"][0]["unseen_shapes"] == found[0].error
    shapes = evidence.shape_figures(found)
    assert len(shapes) == len(cases.SHAPES) and all(row["unseen_ranks"] < 0.06 for row in shapes)
    told = evidence.medians(figures["kernels"], shapes)
    assert told["kernels_unseen_shapes"] == found[0].error and told["kernels_datasheet_bias"] < 0


def test_two_releases_are_compared_on_balanced_rows_of_the_same_workload():
    old, new = cases.rows(version="0.9.0"), cases.rows(version="0.10.0")
    faster = replace(new, seconds_R=np.where(new.alpha_R == 0, 0.5, 9.0) * new.seconds_R)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "MIN_COMMON", 50)
        (row,) = evidence.version_figures([faster, old])
    assert (row["from"], row["to"]) == ("0.9.0", "0.10.0") and row["median"] == pytest.approx(0.5)
    assert row["rows"] == (old.alpha_R == 0).sum() and row["apart"] == pytest.approx(1.0)
