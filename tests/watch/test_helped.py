"""Whether a map helped: the words against simulation, the bets against their definition, the pairs by hand."""

import numpy as np
import pytest
from benchmarks.helped import Traffic, judged
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from poise.util.errors import OptionError
from poise.watch.helped import HelpedSettings, MapJudge, won
from poise.watch.metric_windows import MetricWindow

FAST = HelpedSettings(alpha=0.2)
"""Loose, so that few runs see a rate that is too high."""
RUNS = 30


def window(tpot, running=200.0, prompt=5000.0, at=0.0):
    return MetricWindow(at, at + 60.0, running, prompt, running / tpot, tpot)


@given(st.integers(0, 30), st.integers(0, 30))
def test_a_fortune_is_the_mean_over_all_odds_above_one_half(wins, losses):
    value, _ = quad(lambda p: 2 * (2 * p) ** wins * (2 * (1 - p)) ** losses, 0.5, 1.0, epsabs=0, epsrel=1e-9)
    assert won(wins, wins + losses) == pytest.approx(value, rel=1e-7)


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_fair_bet_wins_nothing_in_the_mean(wins, losses):
    """What makes it right at every look: after any past the fortune stays as it is in the mean."""
    bets = wins + losses
    then = (won(wins + 1, bets + 1) + won(wins, bets + 1)) / 2
    assert then == pytest.approx(won(wins, bets), rel=1e-9)


def rate(words, effect, traffic, settings=FAST, runs=RUNS, many=40):
    return sum(judged(effect, seed, traffic, settings, many).answer in words for seed in range(runs)) / runs


def most(alpha, runs=RUNS):
    """More than this is seen in one of a thousand sets of runs, if the rate is alpha."""
    return alpha + 3.1 * (alpha * (1 - alpha) / runs) ** 0.5


@pytest.mark.parametrize("traffic", [Traffic(), Traffic(noise=0.1), Traffic(drift=-1.5), Traffic(drift=1.5)])
def test_no_change_is_said_to_be_none(traffic):
    """After every window it is asked again, and the load may drift."""
    assert rate(("helped", "hurt"), 0.0, traffic) <= most(FAST.alpha)


def test_a_map_that_helps_is_not_said_not_to():
    assert rate(("did not help", "hurt"), -0.0101, Traffic(noise=0.005)) <= most(FAST.alpha)


def test_what_it_finds():
    """Power, with the settings as they are: 5 % among 2 % of noise within 120 windows, always and soon."""
    for effect, word in ((-0.05, "helped"), (0.05, "hurt")):
        found = [judged(effect, seed, Traffic()) for seed in range(8)]
        assert {one.answer for one in found} == {word} and np.median([one.after for one in found]) < 30
        assert all(abs(one.ratio - 1 - effect) < 0.03 for one in found)


def test_more_load_is_not_hurt_and_less_is_not_helped():
    """Exactly the same engine, at loads that differ within what counts as alike: TPOT follows the load."""
    for shift in (0.97, 1.03):
        judge = MapJudge([window(0.02 * (load / 200), load) for load in np.linspace(150, 250, 100)])
        for load in np.linspace(150, 250, 100) * shift:
            judge.add(window(0.02 * (load / 200), load, 5000.0 * shift))
        assert judge.judgement.answer not in ("helped", "hurt") and judge.judgement.pairs > 20


def test_pairs_are_of_like_load_and_used_once():
    judge = MapJudge([window(0.02, 100.0), window(0.02, 200.0)], HelpedSettings(tolerance=0.1))
    for running, pairs in ((150.0, 0), (205.0, 1), (205.0, 1), (119.0, 1), (109.0, 2)):
        got = judge.add(window(0.018, running))
        assert (got.pairs, got.answer) == (pairs, "cannot tell yet"), running
    assert got.ratio == pytest.approx(0.9) and got.before == 2 and got.after == 5
    judge = MapJudge([window(0.02, 100.0)])
    assert judge.add(window(0.02, 100.0, 9000.0)).pairs == 0 and "none of 1 windows" in judge.judgement.why
    assert MapJudge([]).judgement.why == "no window was seen before it"


def test_a_word_that_is_final_stays_and_one_that_is_not_may_become_worse():
    before = [window(0.02, at=60.0 * at) for at in range(40)]
    judge = MapJudge(before)
    words = [judge.add(window(0.018)).answer for _ in range(8)]
    assert words == ["cannot tell yet"] * 7 + ["helped"]  # (2 ** 9 - 1) / 9 is the first above 2 / 0.05
    assert judge.add(window(0.05)).answer == "helped" and judge.judgement.after == 8
    judge = MapJudge(before)
    words = [judge.add(window(0.022)).answer for _ in range(8)]
    assert words == ["cannot tell yet"] * 6 + ["did not help", "hurt"]
    same = MapJudge(before)
    words = [same.add(window(0.0199)).answer for _ in range(30)]  # faster, but not by 1 %
    assert words[-1] in ("did not help", "helped") and words.index("did not help") == 6 and "helped" not in words


def test_an_engine_that_changes_by_itself_is_not_judged():
    judge = MapJudge([window(0.02 if at < 20 else 0.021) for at in range(40)])
    for _ in range(30):
        judge.add(window(0.015))
    assert judge.judgement.answer == "cannot tell yet" and "differ among themselves" in judge.judgement.why


def test_what_is_said_has_the_numbers():
    judge = MapJudge([MetricWindow(0, 60, 10.0, 5.0, 500.0, 0.02, 0.7)] * 12)
    for _ in range(12):
        judge.add(MetricWindow(0, 60, 10.0, 5.0, 560.0, 0.018, 0.9))
    said = judge.judgement
    assert said.sentence() == (
        "helped: faster in 8 pairs of windows of like or more load; TPOT at like load -10.0 %; TPOT 20 -> 18 ms; "
        "throughput 500 -> 560 tokens/s; balance 0.7 -> 0.9"
    )
    json = said.to_json()
    assert json["tpot_ratio"] == pytest.approx(0.9) and json["fortunes"]["helped"] == won(8, 8)
    for bad in ({"alpha": 0.0}, {"margin": 1.0}, {"tolerance": 0.0}):
        with pytest.raises(OptionError, match="must be shares"):
            HelpedSettings(**bad)
