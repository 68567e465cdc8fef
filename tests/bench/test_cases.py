"""Frozen cases: hashes that stay, traffic that is what it was, and what makes a case another one."""

import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import poise
from poise.bench.cases import SHIPPED, FrozenCase, frozen_cases, machine_facts
from poise.bench.run import chosen_cases
from poise.bench.traffic import FileTraffic, MadeTraffic, content
from poise.machine import settle
from poise.machine.cluster import Cluster
from poise.routing.files import read
from poise.routing.synthetic import WORKLOADS, workload_trace, zipf_trace
from poise.util.errors import OptionError, UnavailableError

FROZEN = dict(reversed(line.split(" ", 1)) for line in (Path(__file__).parent / "frozen.txt").read_text().splitlines())
DEMO = str(Path(poise.__file__).parent / "data" / "demo_trace.npz")


def test_no_case_changes():
    """A new case is added to frozen.txt. A hash that changes means that results of before can not be compared: where
    a constant of a machine or a size of a model was wrong, name the cases anew.
    """
    assert {name: case.digest() for name, case in frozen_cases().items()} == FROZEN
    assert len(FROZEN) == len(set(FROZEN.values())) == 100


def test_cases_that_need_nothing_are_a_third():
    free = [case for case in frozen_cases().values() if not case.needs]
    assert len(free) == 32 and {case.name.split()[0].rstrip(",") for case in free} == {
        "demo",
        *(f"W{i}" for i in range(8)),
    }


OTHER = {
    "fit": FileTraffic((SHIPPED,), "half=odd", ships=True), "judge": FileTraffic((("x.npz", "0" * 64),)), "cluster": "2x4:h200",
    "model": "mixtral-8x7b", "tokens": 2048, "redundant": 16, "traffic": "home", "split": "near", "engine": "sglang", "warm_up": 3,
    "step_slots": 1, "recorded": True, "seed": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(FrozenCase)])
def test_whatever_decides_the_figures_is_in_the_hash(name):
    case = frozen_cases()["demo, other requests, 2x4:h100, N = 1024, R = 8"]
    if name == "name":
        assert replace(case, name="another").digest() == case.digest()
    else:
        assert getattr(case, name) != OTHER[name]
        assert replace(case, **{name: OTHER[name]}).digest() != case.digest()


def test_constants_of_the_machine_are_in_the_hash(monkeypatch):
    case = frozen_cases()["demo, other requests, 2x4:h100, N = 1024, R = 8"]
    before, measured = case.digest(), settle.choose_kernel
    monkeypatch.setattr(settle, "choose_kernel", lambda *a: replace(k := measured(*a), start_s=k.start_s * 1.001))
    assert case.digest() != before
    assert set(machine_facts(Cluster.parse("1x2"))) == {field.name for field in fields(Cluster)}


def test_traffic_that_ships_is_that_of_the_file():
    even, odd = (
        FileTraffic((SHIPPED,), f"domain=python,half={half}", ships=True).load(None) for half in ("even", "odd")
    )
    whole = read(f"{DEMO}#domain=python")
    assert even.num_tokens + odd.num_tokens == whole.num_tokens
    assert sorted([*even.requests(), *odd.requests()]) == sorted(whole.requests())
    assert list(even.requests()) == list(whole.requests()[::2])


def test_a_file_that_is_another_one_or_not_there_is_refused(tmp_path):
    case = FileTraffic((("sub/t.npz", SHIPPED[1]),))
    with pytest.raises(UnavailableError, match=r"it needs sub/t\.npz"):
        case.load(None)
    with pytest.raises(UnavailableError, match="no such file"):
        case.load(tmp_path)
    (tmp_path / "sub").mkdir()
    zipf_trace(num_tokens=8, num_layers=1, num_experts=4).save(tmp_path / "sub" / "t.npz")
    with pytest.raises(UnavailableError, match=f"the case was frozen on {SHIPPED[1][:12]}"):
        case.load(tmp_path)
    shutil.copy(DEMO, tmp_path / "sub" / "t.npz")
    assert case.load(tmp_path).num_tokens == read(DEMO).num_tokens


def test_recipes_draw_what_they_drew():
    made = {case.fit for case in frozen_cases().values() if isinstance(case.fit, MadeTraffic)}
    assert len(made) == len(WORKLOADS)
    one = next(iter(made))
    assert one.load().num_experts == 64
    with pytest.raises(UnavailableError, match="draws other numbers here"):
        replace(one, sha256="0" * 64).load()
    with pytest.raises(UnavailableError, match="draws other numbers here"):
        replace(one, settings=(*one.settings[:-1], ("seed", 5))).load()


def test_the_content_hash_sees_every_array():
    trace = workload_trace("balanced", steps=2, tokens_per_step=8, num_layers=1, num_experts=8, top_k=2, ranks=2)
    known = {content(trace)}
    other = trace.experts.copy()
    other[0, 0] = other[0, 0, ::-1]
    for change in ({"experts": other}, {"request": trace.request[::-1]}, {"is_decode": ~trace.is_decode},
                   {"step": trace.step[::-1]}, {"home": trace.home[::-1]}, {"step": None}, {"home": None}):  # fmt: skip
        digest = content(replace(trace, **change))
        assert digest not in known, change
        known.add(digest)
    assert content(replace(trace, name="another")) == content(trace)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_workloads_are_as_they_are_called(workload):
    ranks, experts, steps, tokens = 4, 32, 8, 2048
    trace = workload_trace(workload, steps=steps, tokens_per_step=tokens, num_layers=2, num_experts=experts, top_k=2,
                           ranks=ranks)  # fmt: skip
    load_BE = np.stack(
        [np.bincount(trace.experts[trace.step == b, 1].ravel(), minlength=experts) for b in range(steps)]
    )
    skew_B = load_BE.max(axis=1) / load_BE.mean(axis=1)
    total_E, rank_D = load_BE.sum(axis=0), load_BE.sum(axis=0).reshape(ranks, -1).sum(axis=1)
    home_D = np.bincount(trace.home, minlength=ranks)
    assert home_D.sum() == steps * tokens
    assert (home_D.max() / home_D.mean() > 1.5) == (workload == "ragged-source")
    assert (total_E == 0).any() == (workload == "zero-load")
    hot = workload in ("hot-experts", "hot-rank", "spread-hot", "rotating")
    assert (skew_B > 2).all() == (hot or False) or workload == "zero-load"
    if workload == "balanced":
        assert skew_B.max() < 1.4
    if workload == "hot-rank":
        assert rank_D[0] > 2 * rank_D[1:].max()
    if workload == "spread-hot":
        assert rank_D.max() < 1.1 * rank_D.mean()
    if workload == "zero-load":
        assert rank_D[0] == 0
    if workload == "rotating":
        assert len({int(load_E.argsort()[-1]) for load_E in load_BE}) > 4 and total_E.max() < 2 * total_E.mean()
    if workload == "burst":
        assert list(skew_B > 4) == [step % 4 == 3 for step in range(steps)]


def test_recipes_say_what_they_cannot_make():
    more = {"steps": 1, "tokens_per_step": 4, "num_layers": 1, "num_experts": 8, "ranks": 2}
    with pytest.raises(OptionError, match="unknown workload 'balancd'"):
        workload_trace("balancd", top_k=2, **more)
    with pytest.raises(OptionError, match="3 of 8 experts get tokens, and a token takes 4"):
        workload_trace("zero-load", top_k=4, **more)


def test_cases_are_chosen_by_name_or_hash():
    assert len(chosen_cases(())) == 100
    assert [case.name for case in chosen_cases(("W2 hot-rank, 1x8",))] == ["W2 hot-rank, 1x8:h200, N = 1024, R = 0"]
    name = "demo python -> dictionary, 2x4:h100, N = 256, R = 8"
    assert [case.name for case in chosen_cases((FROZEN[name][:12],))] == [name]
    assert len(chosen_cases(("W2", "W3", "W2 hot"))) == 4
    for text in ("nothing of this kind", ""):
        with pytest.raises(OptionError, match="no case has"):
            chosen_cases((text,))
