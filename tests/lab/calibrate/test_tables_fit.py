"""Known constants are found again, and no row that was fitted is judged."""

from dataclasses import replace

import numpy as np
import pytest
from tests.lab.calibrate import tables_cases as cases

from poise.lab.calibrate.tables import result
from poise.lab.calibrate.tables.defaults import UNTUNED, default_kernels, untuned
from poise.lab.calibrate.tables.fit import DATASHEET, KernelFit, fit_kernel
from poise.lab.calibrate.tables.judge import bias, folds, held_out_seconds, mape
from poise.lab.calibrate.tables.kernels import given_tokens, kernel_work, peak_of
from poise.machine.model import ModelSpec
from poise.util.errors import NoResultError


def constants(fit):
    return np.array([fit.start_s, fit.read_factor, fit.compute_factor, fit.activation_factor])


@pytest.mark.parametrize("true", [cases.TRUE, KernelFit(80e-6, 1.05, 3.0, 1.0)])
@pytest.mark.parametrize("table_type", ["bfloat16", "fp8_block"])
def test_known_constants_are_found_again(true, table_type):
    group = cases.rows(true=true, table_type=table_type)
    fit = fit_kernel(kernel_work(group, cases.KNOWN))
    assert constants(fit) == pytest.approx(constants(true), rel=0.02)


def test_noise_and_a_few_wild_rows_move_them_little():
    group = cases.rows(noise=0.05)
    group.seconds_R[::97] *= 4
    fit = fit_kernel(kernel_work(group, cases.KNOWN))
    assert constants(fit) == pytest.approx(constants(cases.TRUE), rel=0.25)
    work = kernel_work(group, cases.KNOWN)
    assert mape(fit.seconds(work), cases.TRUE.seconds(work)) < 0.05


def test_the_datasheet_is_too_fast_on_rows_with_a_start():
    work = kernel_work(cases.rows(), cases.KNOWN)
    assert bias(DATASHEET.seconds(work), work.seconds_R) < -0.3


def test_no_row_that_was_fitted_is_judged():
    """Each row's own seconds stand in for its name: what a fit is given and what it judges have none in common."""
    group = cases.rows()
    work = replace(kernel_work(group, cases.KNOWN), seconds_R=np.arange(len(group.seconds_R)) + 1.0)
    for labels in (group.shape_R4, group.ranks_R):
        fold, fitted, judged = folds(labels), [], []

        class Spy(KernelFit):
            def seconds(self, rows, fitted=fitted, judged=judged):
                judged.append(set(rows.seconds_R.tolist()))
                assert not judged[-1] & fitted[-1]
                return rows.seconds_R

        def fit(rows, fitted=fitted, kind=Spy):
            fitted.append(set(rows.seconds_R.tolist()))
            return kind(*constants(cases.TRUE).tolist())

        out = held_out_seconds(work, fold, fit)
        assert len(fitted) == 2 and set.union(*judged) == set(work.seconds_R.tolist())
        assert (out == work.seconds_R).all()
        for one in np.unique(labels, axis=0):
            same = (labels == one).reshape(len(labels), -1).all(axis=1)
            assert len(set(fold[same])) == 1, "a shape is never in two folds"


def test_a_judged_row_does_not_move_its_own_prediction():
    group = cases.rows(noise=0.02)
    work = kernel_work(group, cases.KNOWN)
    before = held_out_seconds(work, folds(group.shape_R4))
    row = 5
    seconds = work.seconds_R.copy()
    seconds[row] *= 50
    after = held_out_seconds(replace(work, seconds_R=seconds), folds(group.shape_R4))
    same = folds(group.shape_R4) == folds(group.shape_R4)[row]
    assert (after[same] == before[same]).all() and (after[~same] != before[~same]).any()


def test_one_label_leaves_nothing_to_judge_by():
    group = cases.rows()
    part = group.take(group.ranks_R == 2)
    out = held_out_seconds(kernel_work(part, cases.KNOWN), folds(part.ranks_R))
    assert np.isnan(out).all()


def test_errors_of_made_up_rows_are_small_and_say_where_they_are_of():
    one = result.judged_kernel(cases.rows(noise=0.03), cases.KNOWN)
    assert one.error < 0.05 and one.power_law_error < 0.05
    row = result.kernel_entries([one])[0]
    assert set(row) == {
        "gpu", "type", "engine", "kernel", "version", "default", "rows", "shapes", "weight_bytes", "start_s", "read_factor",
        "compute_factor", "activation_factor", "error", "power_law_error",
    }  # fmt: skip
    assert row["default"] and row["shapes"] == len(cases.SHAPES) and row["start_s"] == pytest.approx(30e-6, rel=0.1)
    balanced = cases.rows()
    balanced = balanced.take(balanced.alpha_R == 0)
    assert result.kernel_entries([result.judged_kernel(balanced, cases.KNOWN)])[0]["power_law_error"] is None


def test_the_default_is_the_kernel_of_most_shapes_the_automatic_choice_and_never_an_untuned_one():
    most, few = cases.rows(kernel="most"), cases.rows(kernel="few")
    few = few.take((few.shape_R4 == few.shape_R4[0]).all(axis=1))
    assert default_kernels([(few, cases.TRUE), (most, cases.TRUE)]) == {most.name}
    slow = replace(cases.TRUE, read_factor=8.0)
    assert untuned(slow) and not untuned(cases.TRUE) and cases.TRUE.read_factor < UNTUNED
    assert default_kernels([(few, cases.TRUE), (most, slow)]) == {few.name}
    assert default_kernels([(most, slow)]) == set()
    auto, other = cases.rows(engine="trtllm", kernel="x_cutlass"), cases.rows(engine="trtllm", kernel="x_min_latency")
    part = auto.take(auto.ranks_R == 1)
    assert default_kernels([(part, cases.TRUE), (other, cases.TRUE)]) == {auto.name}


def test_tokens_that_a_kernel_was_given_follow_the_engine():
    for engine, version, local in (("vllm", "0.25.0", False), ("sglang", "0.5.10", False), ("sglang", "0.5.14", True)):
        group = cases.rows(engine=engine, version=version)
        work = kernel_work(group, cases.KNOWN)
        given = given_tokens(group, work.loads)
        random = group.alpha_R > 0
        assert (given[~random] == group.tokens_R[~random]).all()
        assert (given[random] == (work.loads.tokens_R if local else group.tokens_R)[random]).all()


def test_peaks_are_those_of_the_type_or_the_next_larger_one():
    assert peak_of("b200", 0.5625) == 9000e12 and peak_of("h200", 0.5625) == 1979e12
    assert peak_of("h200", 1.0) == 1979e12 and peak_of("h200", 2.0) == 989e12


SPEC = ModelSpec("made-up", 2, (0, 1), 128, 8, 4096, 1536, weight_bytes=2.0)


def test_one_model_is_refitted_on_its_own_rows():
    other = replace(cases.TRUE, read_factor=2.0)
    group, far = cases.rows(), cases.rows(true=other)
    mine = (group.shape_R4 == (4096, 1536, 128, 8)).all(axis=1)
    mixed = replace(group, seconds_R=np.where(mine, group.seconds_R, far.seconds_R))
    one = result.kernel_of_model([mixed], SPEC, "h200", "vllm", None, cases.KNOWN)
    assert one.rows == mine.sum() and one.fit.read_factor == pytest.approx(1.2, rel=0.05) and one.error < 0.02
    data = one.to_dict()
    assert data["type"] == "bf16" and data["flops_per_s"] == 989e12 and data["memory_bytes_per_s"] == 4800e9
    assert set(data) == {
        "name", "type", "weight_bytes", "start_s", "read_factor", "compute_factor", "activation_factor", "flops_per_s",
        "memory_bytes_per_s", "error",
    }  # fmt: skip


def test_the_type_nearest_to_the_models_is_taken_and_a_missing_one_is_refused():
    groups = [cases.rows(), cases.rows(table_type="fp8_block")]
    small = replace(SPEC, weight_bytes=1.0)
    assert result.kernel_of_model(groups, small, "h200", "vllm", None, cases.KNOWN).type == "fp8_block"
    assert result.kernel_of_model(groups, small, "h200", "vllm", "bf16", cases.KNOWN).type == "bf16"
    with pytest.raises(NoResultError, match="no vllm kernel of type nvfp4 on h200") as told:
        result.kernel_of_model(groups, small, "h200", "vllm", "nvfp4", cases.KNOWN)
    assert "bf16, fp8_block" in told.value.hint
    with pytest.raises(NoResultError, match="4096 x 1000, 128 of them"):
        result.kernel_of_model(groups, replace(SPEC, expert_intermediate_size=1000), "h200", "vllm", None, {})
