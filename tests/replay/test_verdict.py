"""The verdict on small machines where every figure can be had by hand: compute of one second a token, links that are free."""

from dataclasses import replace
from itertools import combinations
from math import ceil

import numpy as np
import pytest

import poise
from poise.api import verdict
from poise.cost.rest import rest_bytes, rest_seconds
from poise.machine.cluster import Cluster
from poise.machine.kernel import ExpertKernel
from poise.machine.model import ModelSpec, from_hf_config
from poise.machine.presets import MODELS
from poise.planning.budget import Budget
from poise.planning.placement import Placement
from poise.planning.solve.solve import solve
from poise.replay.compare import NOT_WORTH
from poise.replay.verdict import FEW_STEPS, TriedMap, choose, decide
from poise.replay.windows import split_in_time, thinned
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import InputError, ModelError, OptionError, TraceError

START_S = 100.0
CLUSTER = Cluster(
    np.zeros(2, int), np.ones(2), flops_per_s=32.0, memory_bytes_per_s=1e30, memory_bytes=1e6, intra_bytes_per_s=1e30,
    inter_bytes_per_s=1e30, intra_latency_s=START_S,
)  # fmt: skip
"""Two devices: an all-to-all takes 100 s whatever it sends, a token of an expert 1 s."""
MODEL = ModelSpec("tiny", 2, (0, 1), 4, 1, 4, 2, 2, kv_bytes_per_token_layer=3.0)
"""16 parameters an expert, so 32 FLOP a token and 32 bytes; no attention, no head."""
SKEWED, EVEN = (40.0, 40.0, 10.0, 10.0), (25.0, 25.0, 25.0, 25.0)
WORK = 0.5


def loads(*rows, layers=2, seed=None, steps=6):
    """A profile whose steps have these loads in every layer, or with a seed one load with noise."""
    if seed is not None:
        rows = np.random.default_rng(seed).uniform(0.9, 1.1, (steps, 4)) * rows[0]
    table = np.repeat(np.asarray(rows, dtype=float)[:, None], layers, axis=1)
    return LoadProfile(100 * table / table.sum(axis=2, keepdims=True))


def judge(first, second=None, **options):
    given = {"cluster": CLUSTER, "model": MODEL, "phase": "decode", "tokens_per_step": 100, "work": WORK, **options}
    return verdict(first, second, **given)


def best_halves(load_BE):
    """Experts of device 0 whose fuller half is least on the mean over steps, by going through all; and that map's seconds."""
    halves = list(combinations(range(4), 2))
    return min(halves, key=lambda half: fullest(load_BE, half).mean())


def fullest(load_BE, half):
    """Tokens of the fuller device, [B]."""
    inside = load_BE[:, list(half)].sum(axis=1)
    return np.maximum(inside, load_BE.sum(axis=1) - inside)


def test_a_planted_gain_is_found_and_is_what_brute_force_says():
    """Fails if gains are judged on the window a plan was made on, or one direction alone counts (checked by both)."""
    windows = loads(SKEWED, seed=1), loads(SKEWED, seed=2)
    got = judge(*windows, redundant=0)
    a, b = (one.load_BLE[:, 0] for one in windows)
    gains = [fullest(one, (0, 1)) - fullest(one, best_halves(other)) for one, other in ((b, a), (a, b))]
    mean = (gains[0].mean() + gains[1].mean()) / 2
    one = got.phases[0]
    assert got.advice == one.advice == "recommend_trial"
    for mine, theirs in zip(one.chosen.gains_s, gains, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)
    assert mean == pytest.approx(one.chosen.mean_s) and 25 < mean < 35
    now = (fullest(a, (0, 1)).mean() + fullest(b, (0, 1)).mean()) / 2 + 2 * START_S
    assert one.layer_s == pytest.approx(now) and one.share(one.saved_s) == pytest.approx(mean / now)
    low, high = one.interval_s
    assert low < 2 * mean < high and low > 0


def test_figures_of_the_json_follow_from_each_other():
    """Fails if a figure is of another map, in another unit, or a step has other layers than the model."""
    got = judge(loads(SKEWED, seed=1), loads(SKEWED, seed=2), redundant=2).to_json()
    one = got["phases"][0]
    needed = {"verdict", "ms_per_layer", "ms_per_step", "interval", "worst_case", "pay_back_steps", "redundant",
              "cache_tokens_lost", "schema", "cluster", "ground", "phases", "flags", "break_even_tokens"}  # fmt: skip
    assert needed <= set(got) and got["verdict"] == one["verdict"] and got["redundant"] == one["redundant"] == 2
    assert one["ms_per_step"] == pytest.approx(2 * one["ms_per_layer"]) and one["layers"] == 2
    assert one["share_of_step"] == pytest.approx(one["ms_per_step"] / one["step_ms"]["now"])
    assert sum(one["directions"]) / 2 == pytest.approx(one["ms_per_step"])
    assert one["worst_case"] < one["ms_per_step"] and one["interval"][0] < one["ms_per_step"] < one["interval"][1]
    # one slot a rank beyond what runs now, in two layers, of 32 bytes; six bytes of cache a token
    assert one["slot_bytes_per_rank"] == 64 and got["cache_tokens_lost"] == ceil(64 / 6)
    assert one["pay_back_steps"] == ceil(1e3 * one["rearrangement_seconds"] / one["ms_per_step"])
    assert one["rearrangement_seconds"] == pytest.approx(START_S) and one["moved_bytes"] % 32 == 0 < one["moved_bytes"]
    assert got["break_even_tokens"] == 64 and one["break_even_tried"][-1] == 65536
    assert {(row["method"], row["redundant"]) for row in one["tried"]} == {("eplb", 2), ("poise", 2)}


def test_the_rearrangement_is_that_of_the_later_window():
    """By hand: contiguous to one hot expert each moves one expert a rank and layer; the first window's map is contiguous.
    Fails with the earlier plan, or if layers that were not recorded are forgotten.
    """
    apart = (40.0, 10.0, 40.0, 10.0)
    got = judge(loads(apart, apart), loads(SKEWED, SKEWED), redundant=0).phases[0]
    assert got.price.moved_bytes == 2 * 2 * 32 and got.price.slot_bytes == 0 and got.price.cache_tokens == 0
    four = replace(MODEL, num_hidden_layers=4, moe_layer_ids=(0, 1, 2, 3))
    more = judge(loads(apart, apart), loads(SKEWED, SKEWED), redundant=0, model=four).phases[0]
    assert more.price.moved_bytes == 4 * 2 * 32 and more.saved_s == pytest.approx(4 * more.chosen.mean_s)
    assert any("2 of 4 MoE layers" in note for note in more.notes)


def test_a_gain_that_is_the_constants_is_no_gain():
    """Worst case: only arithmetic matters here, and its error is 0.3: the least gain is 0.7 of the nominal one."""
    windows = loads(SKEWED, seed=1), loads(SKEWED, seed=2)
    one = judge(*windows, redundant=0).phases[0]
    assert one.worst_s == pytest.approx(0.7 * one.chosen.mean_s)
    sure = replace(CLUSTER, kernel=ExpertKernel("k", "bf16", 2.0, 0.0, 1.0, 1.0, 0.0, 32.0, 1e30, 0.1))
    assert judge(*windows, redundant=0, cluster=sure).phases[0].worst_s == pytest.approx(0.9 * one.chosen.mean_s)


def test_even_traffic_is_left_alone():
    """Fails if noise of half a percent is called a gain."""
    got = judge(loads(EVEN, seed=1), loads(EVEN, seed=2))
    assert got.advice == "not_recommended_now" and not got.flags
    flat = judge(loads(*[EVEN] * 11))
    one = flat.phases[0]
    assert one.saved_s == 0 and one.pay_back_steps is None and one.break_even_tokens is None
    assert flat.advice == "not_recommended_now" and one.chosen.redundant == 0


@pytest.mark.parametrize("steps", [1, 6])
def test_experts_that_swap_are_no_gain(steps):
    """Each plan is best on its own window and useless on the other. Fails if plans are judged in-sample."""
    first, second = (40.0, 40.0, 10.0, 10.0), (40.0, 10.0, 40.0, 10.0)
    for pair in ((first, second), (second, first)):
        got = judge(*(loads(row, seed=3 + at, steps=steps) for at, row in enumerate(pair)), redundant=0)
        assert got.advice != "recommend_trial", got.sentence()


def test_one_table_a_window_is_two_samples():
    """Their range is the interval. Fails if an interval is drawn from one number, or a mean of both decides."""
    clear = judge(loads(SKEWED), loads((41.0, 39.0, 10.0, 10.0)), redundant=0)
    one = clear.phases[0]
    assert clear.advice == "recommend_trial" and one.chosen.few
    assert one.interval_s == pytest.approx(tuple(sorted(2 * g for g in one.chosen.directions_s)))
    assert any("two samples" in note for note in clear.notes)
    # planned on the first: 0 with 3, which is worse than contiguous on the second; the other way round it gains
    torn = judge(loads((41.0, 39.0, 12.0, 8.0)), loads((27.0, 24.0, 23.0, 26.0)), redundant=0)
    assert torn.advice == "insufficient_evidence" and "two samples" in torn.phases[0].reason
    assert torn.phases[0].chosen.directions_s == pytest.approx((51 - 53, 80 - 53))
    assert torn.phases[0].saved_s > NOT_WORTH * torn.phases[0].step_s


def gains(*sides):
    return TriedMap("poise", 0, tuple(np.asarray(side, dtype=float) for side in sides))


@pytest.mark.parametrize(
    ("sides", "worst", "word"),
    [
        (([3.0] * 5, [4.0] * 5), 1.0, "recommend_trial"),
        (([3.0] * 5, [4.0] * 5), 0.0, "insufficient_evidence"),
        (([0.9] * 5, [1.0] * 5), 1.0, "not_recommended_now"),
        (([9.0] * 5, [-1.0] * 5), 1.0, "insufficient_evidence"),
        (([90.0, -80.0, 1.0, 2.0], [70.0, -60.0, 0.0, 1.0]), 1.0, "insufficient_evidence"),
        (([3.0, 4.0], [4.0] * 9), 1.0, "recommend_trial"),
        (([3.0, 0.5], [4.0] * 9), 1.0, "insufficient_evidence"),
        (([0.9, -3.0], [0.5] * 9), 1.0, "not_recommended_now"),
        (([1.5, -3.0], [0.5] * 9), 1.0, "insufficient_evidence"),
    ],
)
def test_the_rule(sides, worst, word):
    """A layer of 100 s, a gain of 1 s is 1 %. Each row fails if its clause is left out of the rule."""
    assert decide(gains(*sides), 1, worst, 1, 100.0)[0] == word


def test_the_interval_knows_how_many_maps_were_tried():
    """Fails without the correction for the best of many, or if directions are not drawn on their own."""
    rng = np.random.default_rng(0)
    one = gains(rng.normal(1.0, 1.0, 40), rng.normal(3.0, 1.0, 40))
    alone, best_of = one.interval_s(1), one.interval_s(20)
    assert best_of[0] < alone[0] < one.mean_s < alone[1] < best_of[1]
    half_width = 1.96 * np.sqrt((one.gains_s[0].var() + one.gains_s[1].var()) / 40) / 2
    assert alone == pytest.approx((one.mean_s - half_width, one.mean_s + half_width), abs=0.03)
    assert gains([1.0] * FEW_STEPS, [1.0] * FEW_STEPS).few is False and gains([1.0], [1.0] * 9).few


def test_fewest_slots_within_the_tolerance():
    """And of as many slots the first, the engine's own. Fails if the best alone is taken."""
    maps = [TriedMap(method, many, (np.array([gain]), np.array([gain]))) for method, many, gain in
            (("eplb", 0, 1.0), ("eplb", 2, 4.6), ("poise", 2, 4.9), ("poise", 4, 5.0))]  # fmt: skip
    assert choose(maps, 0.0) is maps[3] and choose(maps, 0.2) is maps[2] and choose(maps, 0.5) is maps[1]


def test_slots_that_engine_and_memory_can_hold():
    """Default: 0, 1, 2 and 4 a rank. Fails if memory, or what an engine holds, is not looked at."""
    windows = loads(SKEWED), loads((41.0, 39.0, 10.0, 10.0))
    tried = lambda **options: {one.redundant for one in judge(*windows, **options).phases[0].tried}  # noqa: E731
    assert tried() == {0, 2, 4}  # 8 more on two ranks would be twice on one
    assert tried(engine="megatron") == {0}
    three = Cluster.parse("1x3:h100+datasheet")
    assert tried(cluster=three, engine="sglang") == {2, 5, 8} and tried(cluster=three) == {0, 3, 6}
    assert tried(cluster=replace(CLUSTER, memory_bytes=3 * 64 + 1.0)) == {0, 2}
    with pytest.raises(OptionError, match="slots a rank"):
        judge(*windows, redundant=4, cluster=replace(CLUSTER, memory_bytes=3 * 64 + 1.0))
    with pytest.raises(OptionError, match="every rank"):
        judge(*windows, redundant=3, engine="sglang")


def test_the_map_that_runs_now_is_what_is_beaten():
    """Fails if contiguous is the baseline whatever runs."""
    windows = loads(SKEWED, seed=1), loads(SKEWED, seed=2)
    table = np.array([[0, 2, 1, 3]] * 2)
    now = Placement(table, np.array([0, 0, 1, 1]), 4, 2, method="mine")
    got = judge(*windows, redundant=0, current=now)
    assert got.advice == "not_recommended_now" and got.current == "mine" and abs(got.phases[0].chosen.mean_s) < 3
    for bad in (
        Placement(np.array([[0, 1, 2, 3]]), np.array([0, 0, 1, 1]), 4, 2),
        Placement(table, np.array([0, 1, 2, 3]), 4, 4),
        Placement(table, np.array([0, 0, 1, 1]), 4, 2, np.array([0, 5])),
    ):
        with pytest.raises(InputError):
            judge(*windows, current=bad)


def trace(decode_hot, seed=0, requests=8, prompt=400, answer=50):
    """Prompts of which all tokens go to experts 0 and 1; answers to those, or to all alike."""
    rng = np.random.default_rng(seed)
    rows, decode, request = [], [], []
    for number in range(requests):
        rows += [rng.integers(0, 2, (prompt, 2)), rng.integers(0, 2 if decode_hot else 4, (answer, 2))]
        decode += [False] * prompt + [True] * answer
        request += [number] * (prompt + answer)
    return RoutingTrace(np.concatenate(rows), 4, np.array(request), np.array(decode))


def test_phases_have_rows_of_their_own():
    """Prefill gains, decode does not. Fails if phases are not told apart, or the figures on top are decode's."""
    got = verdict(trace(False, 1), trace(False, 2), cluster=CLUSTER, model=MODEL, redundant=0, prefill_tokens=400,
                  decode_tokens=64, work=WORK)  # fmt: skip
    prefill, decode = got.phases
    assert (prefill.phase, prefill.advice, decode.phase) == ("prefill", "recommend_trial", "decode")
    assert decode.advice == "not_recommended_now" and got.leading is prefill and got.advice == "recommend_trial"
    assert prefill.tokens == pytest.approx(400) and decode.tokens == pytest.approx(64)
    assert prefill.layer_s == pytest.approx(2 * START_S + 400, rel=0.02)
    assert prefill.other_phase_s == pytest.approx(decode.chosen.mean_s, abs=4) and "share ranks" in got.sentence()
    alone = verdict(trace(True, 1), trace(True, 2), cluster=CLUSTER, model=MODEL, redundant=0, phase="decode",
                    tokens_per_step=64, work=WORK)  # fmt: skip
    assert [one.phase for one in alone.phases] == ["decode"] and alone.advice == "recommend_trial"
    assert alone.phases[0].other_phase_s is None


def test_one_window_is_split_in_time():
    """Fails if steps of both halves are mixed, or halves are not those of time."""
    first, second = split_in_time(loads(*[SKEWED] * 3, *[EVEN] * 2))
    assert (first.load_BLE[:, 0, 0] == 40).all() and (second.load_BLE[:, 0, 0] == 25).all() and first.num_steps == 3
    whole = replace(trace(True), step=np.arange(8 * 450) // 100)
    first, second = split_in_time(whole)
    assert first.step.max() < second.step.min() and first.num_tokens == second.num_tokens == 1800
    first, second = split_in_time(trace(True))
    assert set(first.request) == {0, 1, 2, 3} and set(second.request) == {4, 5, 6, 7}
    got = judge(loads(SKEWED, seed=1, steps=9), redundant=0)
    assert got.advice == "recommend_trial" and got.to_json()["phases"][0]["judged_steps"] == [4, 5]


def test_of_long_windows_steps_are_spread_evenly():
    """Fails if the first steps are taken, or it is not said."""
    long = loads(*[EVEN] * 65, *[SKEWED] * 65)
    kept, said = thinned(long, 100)
    assert kept.num_steps == 44 and {*kept.load_BLE[:, 0, 0]} == {25.0, 40.0} and "44 of 130" in said
    steps = replace(trace(True), step=np.arange(8 * 450) // 30)
    kept, said = thinned(steps, None)
    assert len(np.unique(kept.step)) == 60 and kept.step.max() == 118 and "60 of 120" in said
    assert thinned(steps, 100) == (steps, "") and thinned(loads(SKEWED, EVEN), 100)[1] == ""
    got = judge(long, loads(SKEWED, seed=1, steps=70), redundant=0)
    assert [len(gain) for gain in got.phases[0].chosen.gains_s] == [35, 44] and "44 of 130" in got.phases[0].notes[0]


def test_recorded_steps_are_taken_as_they_are():
    """Fails if a default N replaces what was recorded."""
    whole = replace(trace(True), step=np.arange(8 * 450) // 100, is_decode=None)
    got = verdict(whole, cluster=CLUSTER, model=MODEL, redundant=0, work=WORK)
    assert [one.tokens for one in got.phases] == [100, 100] and not any("assumed" in note for note in got.notes)


def test_loads_count_every_expert_of_a_token():
    """A record that does not say K has K pairs a token. Fails if N tokens are taken for N pairs."""
    two = replace(MODEL, top_k=2)
    one = judge(loads(SKEWED, seed=1), loads(SKEWED, seed=2), redundant=0, model=two).phases[0]
    assert one.tokens == pytest.approx(100) and one.layer_s == pytest.approx(2 * START_S + 160, rel=0.05)


def test_every_plan_has_its_share_of_the_time(monkeypatch):
    """A clock on which every plan of poise takes all it is given. Fails if later plans begin when their time is over."""
    now, begun = [0.0], []

    def slow(problem, *, method, time_limit_s, seed):
        begun.append((method, time_limit_s.over("plan"), time_limit_s.seconds))
        now[0] += 0.99 * time_limit_s.seconds * (method == "poise")
        return solve(problem, method="contiguous", work=0.1)

    monkeypatch.setattr("poise.replay.trial.solve", slow)
    windows = [LoadProfile(np.rint(1000 * loads(SKEWED, seed=seed).load_BLE)) for seed in (1, 2)]
    verdict(*windows, cluster=CLUSTER, model=MODEL, time_limit_s=Budget(24.0, now=lambda: now[0]))
    poise_seconds = [seconds for method, _, seconds in begun if method == "poise"]
    assert len(poise_seconds) == 2 * 3 * 2 and sum(poise_seconds) == pytest.approx(24.0)
    assert not any(over for _, over, _ in begun)


def test_defaults_are_said():
    """N of both phases, by the rank. Fails if a default is silent."""
    windows = [LoadProfile(np.rint(1000 * loads(SKEWED, seed=seed).load_BLE)) for seed in (1, 2)]
    got = verdict(*windows, cluster=CLUSTER, model=MODEL, redundant=0, work=WORK)
    assert [one.tokens for one in got.phases] == pytest.approx([2048, 128])
    assert sum("assumed" in note for note in got.notes) == 2 and poise.verdict is verdict


def test_a_step_larger_than_its_window_is_said():
    """A step of 100 tokens of a window that has 40 draws its requests again; one of 20 does not."""
    rng = np.random.default_rng(3)
    traces = [RoutingTrace(rng.integers(0, 4, (40, 2, 1)), 4, request=np.arange(40) // 4) for _ in range(2)]
    for tokens, said in ((100, 2), (20, 0)):
        got = judge(*traces, tokens_per_step=tokens, redundant=0)
        assert sum("drawn again" in note for one in got.phases for note in one.notes) == said


def test_loads_of_fewer_tokens_than_a_step_are_said():
    """Loads of 100 tokens a layer: steps of 200 are scaled from them, those of 100 are not. Of one file it is said once."""
    two = [replace(loads(SKEWED, seed=seed), name=f"{seed}.json") for seed in (1, 2)]
    for windows, tokens, said in ((two, 200, 2), (two, 100, 0), ([loads(SKEWED, seed=1)], 200, 1)):
        notes = judge(*windows, tokens_per_step=tokens, redundant=0).notes
        assert sum("has 100 tokens a layer in a record, scaled to steps of 200" in note for note in notes) == said


def test_a_window_that_may_hold_the_earlier_one_is_said():
    rng = np.random.default_rng(5)
    first, second = (rng.integers(50, 90, (1, 2, 8)) for _ in range(2))
    model = replace(MODEL, num_experts=8)
    on = np.concatenate([first + second, first + 2 * second])
    apart = np.concatenate([2 * second, first[:, :, ::-1]])  # together above the earlier one, but records fall
    for later, said in ((first + second, 1), (second, 0), (on, 1), (apart, 0)):
        notes = judge(LoadProfile(first), LoadProfile(later), model=model, redundant=0).notes
        assert sum("is below that of" in note and "--counters running" in note for note in notes) == said


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"phase": None}, OptionError, "prefill or of decode"),
        ({"phase": "both"}, OptionError, "unknown phase"),
        ({"tokens_per_step": 0}, OptionError, "at least 1"),
        ({"decode_tokens": 7}, OptionError, "100 and 7"),
        ({"context": 0}, OptionError, "context"),
        ({"model": replace(MODEL, num_experts=8)}, ModelError, "4 experts"),
        ({"cluster": "1x0"}, InputError, "devices"),
        ({"engine": "none-such"}, OptionError, "unknown engine"),
        ({"engine": "megatron", "redundant": 2}, OptionError, "once"),
        ({"work": -1.0}, OptionError, "above 0"),
    ],
)
def test_bad_options(change, error, words):
    with pytest.raises(error, match=words):
        judge(loads(SKEWED, seed=1), loads(SKEWED, seed=2), **change)


def test_bad_windows():
    """Refused by name: the same traffic twice, one load, other layers, frequencies without N, a phase that is not there."""
    with pytest.raises(OptionError, match="not seen"):
        judge(loads(SKEWED, seed=1), loads(SKEWED, seed=1))
    with pytest.raises(OptionError, match="two windows"):
        judge(loads(SKEWED))
    with pytest.raises(OptionError, match="same layers"):
        judge(loads(SKEWED, seed=1), loads(SKEWED, layers=1, seed=2))
    shares = [LoadProfile(loads(SKEWED, seed=seed).load_BLE / 100) for seed in (1, 2)]
    with pytest.raises(OptionError, match="frequencies"):
        verdict(*shares, cluster=CLUSTER, model=MODEL)
    assert judge(*shares).phases[0].tokens == pytest.approx(100)
    prompts = trace(True, 1).select(phase="prefill")
    with pytest.raises(TraceError, match="no decode token"):
        judge(prompts, trace(True, 2))
    with pytest.raises(ModelError, match="top-1"):
        judge(RoutingTrace(np.array([[[0, 1], [1, 2]]] * 9), 4))


def test_the_rest_of_a_step_by_hand():
    """Two devices, 10 tokens each, a context of 6. Fails if a part is priced for all tokens, or for the wrong layers."""
    model = ModelSpec(
        "whole", 3, (1, 2), 4, 1, 4, 2, 2, kv_bytes_per_token_layer=8.0, shared_expert_size=3, dense_intermediate_size=5,
        vocab_size=7, attention_parameters=11, score_size=13, cached_score_size=17,
    )  # fmt: skip
    slow = replace(CLUSTER, flops_per_s=2.0, memory_bytes_per_s=1e30)
    decode = rest_seconds(model, slow, 20, context=6, decode=True)
    assert decode.attention_s == 3 * 11 * 10 and decode.scores_s == 3 * 17 * 10 * 6
    assert (
        decode.dense_s == 1 * 2 * 4 * 5 * 10 and decode.shared_s == 2 * 2 * 4 * 3 * 10 and decode.head_s == 7 * 4 * 10
    )
    prefill = rest_seconds(model, slow, 20, context=6, decode=False)
    assert prefill.scores_s == 3 * 13 * 10 * 3 and prefill.head_s == pytest.approx(7 * 4 * 10 / 6)
    read = replace(CLUSTER, flops_per_s=1e30, memory_bytes_per_s=2.0)
    bound = rest_seconds(model, read, 20, context=6, decode=True)
    assert bound.attention_s == 3 * 11 and bound.scores_s == 3 * 8 * 10 * 6 / 2 and bound.head_s == 7 * 4
    assert rest_bytes(model) == 2 * (3 * 11 + 2 * 4 * 5 + 2 * 2 * 4 * 3) + 2 * 2 * 7 * 4
    assert not decode.unknown and rest_seconds(MODEL, slow, 1, context=1, decode=True).unknown == ("attention", "head")
    half = replace(slow, speed_D=np.array([1.0, 0.5]))
    assert rest_seconds(model, half, 20, context=6, decode=True).total_s == pytest.approx(2 * decode.total_s)


def config(**more):
    """Of a config with heads of 8, hidden 16 and one dense layer of three."""
    plain = {"num_hidden_layers": 3, "num_experts": 4, "num_experts_per_tok": 1, "hidden_size": 16, "vocab_size": 9,
             "moe_intermediate_size": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    return from_hf_config({**plain, **more}, name="c")


def test_sizes_beside_the_experts_are_read_by_family():
    """By hand from the keys. Fails if a width of experts is taken for a dense one, or odd values end the reading."""
    plain = config()
    assert (plain.vocab_size, plain.shared_expert_size, plain.dense_intermediate_size) == (9, 0, 0)
    assert plain.attention_parameters == 16 * 8 * (4 + 2 + 2) + 4 * 8 * 16 and plain.score_size == 2 * 4 * 8
    deep = config(model_type="deepseek_v3", first_k_dense_replace=1, n_shared_experts=2, intermediate_size=20, kv_lora_rank=5,
                  q_lora_rank=7, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=6)  # fmt: skip
    assert (deep.shared_expert_size, deep.dense_intermediate_size) == (12, 20)
    assert deep.attention_parameters == 7 * (16 + 4 * 5) + 16 * (5 + 2) + 5 * 4 * (3 + 6) + 4 * 6 * 16
    assert deep.score_size == 4 * (3 + 2 + 6) and deep.cached_score_size == 4 * (2 * 5 + 2)
    qwen = config(model_type="qwen2_moe", shared_expert_intermediate_size=30, intermediate_size=40, mlp_only_layers=[0])
    assert (qwen.shared_expert_size, qwen.dense_intermediate_size) == (30, 40)
    llama = config(model_type="llama4", intermediate_size=6, intermediate_size_mlp=20, moe_layers=[1, 2])
    assert (llama.shared_expert_size, llama.dense_intermediate_size) == (6, 20)
    mixtral = config(model_type="mixtral", intermediate_size=6)
    assert (mixtral.shared_expert_size, mixtral.dense_intermediate_size) == (0, 0)
    odd = config(model_type="qwen3_moe", vocab_size="many", n_shared_experts=[1], num_attention_heads=4)
    assert (odd.vocab_size, odd.shared_expert_size) == (0, 0)
    scout = ModelSpec.parse("llama-4-scout")
    assert (scout.shared_expert_size, scout.dense_intermediate_size) == (8192, 0)


PUBLISHED = {
    "mixtral-8x7b": 46.7, "mixtral-8x22b": 140.6, "olmoe-1b-7b": 6.9, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235.1,
    "llama-4-maverick": 400.7, "llama-4-scout": 107.8, "deepseek-v3": 671.0, "kimi-k2": 1026.0, "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8, "glm-4.5": 355.0,
}  # fmt: skip
"""Parameters in billions, as publishers state them (model cards)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_add_up_to_the_published_size(name):
    """Experts, and everything beside them. Fails if shared experts, dense layers or a head is read wrong or left out."""
    model = ModelSpec.parse(name)
    dense = model.num_hidden_layers - model.num_moe_layers
    wide = model.num_expert_matrices * model.hidden_size
    rest = model.num_hidden_layers * model.attention_parameters + 2 * model.vocab_size * model.hidden_size
    rest += wide * (dense * model.dense_intermediate_size + model.num_moe_layers * model.shared_expert_size)
    total = model.num_moe_layers * model.num_experts * model.expert_parameters + rest
    assert name in MODELS and total / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)
