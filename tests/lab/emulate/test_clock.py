"""The device clock and its curves."""

import pytest

from poise.lab.emulate import clock as module
from poise.lab.emulate.clock import DeviceClock, ExpertCurve
from poise.util.errors import OptionError

TABLE = [(8, 4, 40e-6), (16, 4, 48e-6), (64, 4, 96e-6)]
"""10, 12, 24 us an expert at 2, 4, 16 tokens: 8 us fixed and 1 us a token."""


def test_a_curve_goes_through_its_table_and_charges_active_experts_only():
    curve = ExpertCurve.from_table(TABLE)
    for tokens, active, seconds in TABLE:
        assert curve([tokens / active] * active + [0, 0]) == pytest.approx(seconds)
    assert curve.fixed_seconds == pytest.approx(8e-6)
    assert curve([]) == 0 and curve([0, 0]) == 0


def test_between_below_and_above_the_knots_the_segments_go_on():
    curve = ExpertCurve.from_table(TABLE)
    assert curve([1]) == pytest.approx(9e-6)
    assert curve([10]) == pytest.approx(18e-6)
    assert curve([116]) == pytest.approx(124e-6)
    assert curve([1, 10, 116]) == pytest.approx(curve([1]) + curve([10]) + curve([116]))


def test_a_flat_start_is_memory_bound():
    curve = ExpertCurve([1, 64, 128], [5e-6, 5e-6, 10e-6])
    assert curve.fixed_seconds == pytest.approx(5e-6) and curve([3]) == pytest.approx(5e-6)
    assert ExpertCurve([1, 2], [1e-6, 5e-6]).fixed_seconds == 0


def test_rows_that_disagree_are_averaged_and_told():
    curve = ExpertCurve.from_table([(2, 2, 18e-6), (1, 1, 11e-6), (4, 1, 12e-6)])
    assert curve([1]) == pytest.approx(10e-6)
    assert curve.spread == pytest.approx(0.1)


def test_curves_are_read_from_csv(tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("gpu,tokens,active_experts,seconds\n" + "".join(f"x,{t},{a},{s}\n" for t, a, s in TABLE))
    assert ExpertCurve.from_csv(path)([10]) == pytest.approx(18e-6)
    path.write_text("tokens,seconds\n1,2\n")
    with pytest.raises(OptionError, match="active_experts"):
        ExpertCurve.from_csv(path)
    path.write_text("tokens,active_experts,seconds\n1,2,fast\n")
    with pytest.raises(OptionError, match="no table of numbers"):
        ExpertCurve.from_csv(path)
    with pytest.raises(OptionError, match="cannot read"):
        ExpertCurve.from_csv(tmp_path / "none.csv")


@pytest.mark.parametrize(
    "rows", [[], [(1, 1, 1e-6)], [(2, 2, 1e-6), (3, 3, 1e-6)], [(1, 1, 0.0), (2, 1, 1.0)], [(1, 2)]]
)
def test_tables_that_are_no_curve_are_refused(rows):
    with pytest.raises(OptionError):
        ExpertCurve.from_table(rows)


def test_computing_takes_as_long_as_the_curve_says_times_the_dilation():
    clock = DeviceClock(ExpertCurve.from_table(TABLE), dilation=400)
    for tokens, asked in (([2, 2, 2, 2], 40e-6 * 400), ([0, 16], 24e-6 * 400)):
        for _ in range(5):
            done = clock.compute(tokens)
            assert done.asked_s == pytest.approx(asked) and not done.overran
            assert done.late_s >= 0
    report = clock.report()
    assert report["count"] == 10 and report["overruns"] == 0  # how late it is, the self-test measures


class Still:
    """A clock that only sleeping moves; wake-ups are late."""

    def __init__(self, late=0.0):
        self.now, self.late = 100.0, late

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds + self.late


def test_real_arithmetic_counts_against_the_deadline_and_overruns_are_told(monkeypatch):
    still = Still(late=0.001)
    monkeypatch.setattr(module, "time", still)
    clock = DeviceClock(lambda tokens: 0.5)
    start = clock.now()
    still.now += 0.05
    done = clock.compute([1], since=start)
    assert done.worked_s == pytest.approx(0.05) and not done.overran and done.late_s == pytest.approx(0.001)
    assert still.now - start == pytest.approx(0.501)
    assert clock.report()["late_p99_s"] == pytest.approx(0.001)

    clock = DeviceClock(lambda tokens: 0.03)
    start = clock.now()
    still.now += 0.05
    done = clock.compute([1], since=start)
    assert done.overran and done.late_s == pytest.approx(0.02)
    report = clock.report()
    assert report["overruns"] == 1 and report["worst_overrun_s"] == pytest.approx(0.02)


def test_a_curve_that_gives_no_time_is_refused():
    with pytest.raises(OptionError, match="nan seconds"):
        DeviceClock(lambda tokens: float("nan")).compute([1])
    with pytest.raises(OptionError, match="dilation"):
        DeviceClock(lambda tokens: 1.0, dilation=0)
