"""Methods and policies of other packages: the package of docs/extend.md as written there, and broken ones."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from tests.helpers import few_or
from tests.launch import processes, ranks

from poise.planning.problem import Method
from poise.planning.solve.checked import checked_method
from poise.routing.synthetic import zipf_trace
from poise.stepwise.checked import checked_policy
from poise.stepwise.registry import OWN as OWN_POLICIES
from poise.util.errors import OptionError, PluginError
from poise.util.registry import Registry

PAGE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text("utf-8")
FILES = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE))
COMMANDS = [shlex.split(line) for line in re.search(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)[1].splitlines()]
METHODS, POLICIES = "poise.methods", "poise.policies"


def install(site: Path, package: str, groups: dict[str, dict[str, str]], files: dict[str, str]) -> None:
    """As pip leaves a package on the path."""
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [line for group, points in groups.items()
             for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))]  # fmt: skip
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, text in files.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)


def install_page(site: Path) -> None:
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    install(site, project["name"], project["entry-points"],
            {name: text for name, text in FILES.items() if name.endswith(".py")})  # fmt: skip


POISE = """
import os, sys
sys.path.insert(0, os.path.abspath("site"))
os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
from poise.cli.main import main
main()
"""


def poise_command(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """``poise words`` in the folder, with its site; forked from a process that has imported poise and looked at no package."""
    (folder / "command.py").write_text(f"import os\nos.chdir({str(folder)!r})\n{POISE}")
    ((code, said),) = processes(1, str(folder / "command.py"), *words, folder=folder, timeout=600)
    return subprocess.CompletedProcess(words, code, said, (folder / "stderr").read_text())


def python(folder: Path, *words: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder,
                          env=os.environ | {"PYTHONPATH": path})  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "site").mkdir()
    save_trace(tmp_path)
    return tmp_path


def save_trace(folder: Path) -> None:
    zipf_trace(num_tokens=2000, num_layers=2, num_experts=16, top_k=2, exponent=1.0).save(folder / "trace.npz")


def test_the_package_of_the_page_works_as_written(folder):
    install_page(folder / "site")
    assert {words[1] for words in COMMANDS} == {"plan", "bench", "compare"}
    for name, text in FILES.items():
        assert len(text.splitlines()) <= 40, name
    for words in COMMANDS:
        done = poise_command(folder, *words[1:])
        assert done.returncode == 0, done.stderr
        assert "left out:" not in done.stdout
    for row in ("snake  ", r"snake \+ hottest  ", r"snake \+ +│"):  # the last goes over two lines
        assert re.search(rf"^│ {row}", done.stdout, re.M), row
    assert "hottest:most=2" in done.stdout
    assert (folder / "placement.npz").exists()
    rows = json.loads((folder / "results.json").read_text())["cases"][0]["rows"]
    assert [row["method"] for row in rows] == ["contiguous", "snake", "snake + hottest"]
    named = python(folder, "-c", "import poise; print(list(poise.METHODS)[-1], list(poise.POLICIES)[-1])")
    assert named.stdout.split() == ["snake", "hottest"]


TRAIN = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from poise.machine.cluster import Cluster
from poise.runtime.moe import GatedExperts
from poise.train import fully_shard_experts
dist.init_process_group("gloo", init_method="file://" + FILE, rank=0, world_size=1)
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(16, 4)
        self.gate.top_k = 2
        self.experts = GatedExperts(4, 16, 8)
    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        return self.experts(x, ids, weights)
model = Block()
mesh = init_device_mesh("cpu", (1,))
run = fully_shard_experts(model, mesh=mesh, policy="hottest:most=2", step_slots=1, cluster=Cluster.uniform(1, 1))
model(torch.randn(16, 16)).sum().backward()
print(run.schedule.settings.policy)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "forked", few_or([True, False], [True]), ids=lambda forked: "forked" if forked else "installed before Python began"
)
def test_training_takes_the_policy_by_its_name(folder, forked):
    install_page(folder / "site")
    own = "" if not forked else f"import sys; sys.path.insert(0, {str(folder / 'site')!r})"
    (folder / "train.py").write_text(f"{own}\nFILE = {str(folder / 'store')!r}{TRAIN}")
    if forked:
        (said,) = ranks(1, str(folder / "train.py"), folder=folder)
    else:
        done = python(folder, "train.py")
        assert done.returncode == 0, done.stderr
        said = done.stdout
    assert said.splitlines()[-1:] == ["Hottest(most=2)"], said


GOOD = "from poise.planning.problem import Method, MethodResult\nfrom poise.planning.methods import lpt\n"
BROKEN = {  # a module's text, and what is said of it
    "raise RuntimeError('no licence')": "cannot be imported.*no licence",
    "raise SystemExit(3)": "cannot be imported.*SystemExit",
    "x = 1": "cannot be imported",
    "METHOD = 3": "of type int, not poise.planning.problem.Method",
    f"{GOOD}METHOD = Method(lambda problem: None, 'no time limit')": "cannot be called as",
    f"{GOOD}METHOD = Method(3, 'nothing to call')": "cannot be called as",
    f"{GOOD}METHOD = Method(lpt.plan, None)": "summary must be a text",
    f"{GOOD}METHOD = Method(lambda problem, **_: 1 / 0, 'fails')": "failed: ZeroDivisionError",
    f"{GOOD}METHOD = Method(lambda problem, **_: None, 'nothing')": "returned NoneType",
    f"{GOOD}from dataclasses import replace\nMETHOD = Method(lambda p, **_: MethodResult("
    "lpt.plan(replace(p, slots_D=p.slots_D + 1), time_limit_s=1.0).placement), 'takes more slots')": "in 4 slots",
}  # fmt: skip
COMPARE = ("compare", "trace.npz", "--cluster", "1x4:h100", "-p", "contiguous", "-p", "lpt")


@pytest.fixture(scope="module")
def compared_with_broken_ones(tmp_path_factory):
    """One command that is asked for all broken methods, each of a package of its own."""
    folder = tmp_path_factory.mktemp("broken")
    save_trace(folder)
    for number, text in enumerate(BROKEN):
        install(folder / "site", f"their-thing-{number}", {METHODS: {f"theirs-{number}": f"their_thing_{number}:METHOD"}},
                {f"their_thing_{number}.py": text})  # fmt: skip
    return poise_command(
        folder, *COMPARE, *(word for number in range(len(BROKEN)) for word in ("-p", f"theirs-{number}"))
    )


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=list(BROKEN.values()))
def test_a_broken_method_is_a_note_and_our_own_rows_stand(compared_with_broken_ones, number):
    done, package = compared_with_broken_ones, f"their-thing-{number}"
    notes = re.split(r"(?=theirs-\d+ left out: )", " ".join(done.stdout.split()))
    assert done.returncode == 0, done.stderr
    assert re.search("│ contiguous .*│ lpt ", notes[0]), notes[0]
    said = "".join(note for note in notes if note.startswith(f"theirs-{number} "))
    wrong = list(BROKEN.values())[number]
    assert re.search(f"theirs-{number} left out: method 'theirs-{number}' of package {package}.*{wrong}", said), said
    whole = "".join(notes)
    assert whole.count(f"{package} cannot") + whole.count(f"theirs-{number} left out") <= 2
    assert f"mend or uninstall {package}" in said
    assert "Traceback" not in done.stderr


def test_a_plan_by_a_broken_method_ends_with_its_package_and_no_file(folder):
    install(folder / "site", "their-thing", {METHODS: {"theirs": "their_thing:METHOD"}}, {"their_thing.py": "1 / 0"})
    done = poise_command(folder, "plan", "trace.npz", "--cluster", "1x4:h100", "--method", "theirs", "-o", "out.npz")
    assert done.returncode == 2 and not (folder / "out.npz").exists()
    assert "package their-thing cannot be imported" in " ".join(done.stderr.split())
    assert "hint: mend or uninstall their-thing" in done.stderr and "Traceback" not in done.stderr


def test_packages_that_are_merely_there_stop_nothing(folder):
    """Neither a taken name nor one that two offer; it is said once, and no code of them runs."""
    site = folder / "site"
    loud = {"loud.py": "print('imported')\nMETHOD = 3"}
    install(site, "first", {METHODS: {"lpt": "loud:METHOD", "both": "loud:METHOD"}}, loud)
    install(site, "second", {METHODS: {"both": "loud:METHOD"}}, {})
    done = python(folder, "-m", "poise.cli", *COMPARE, "-p", "both")
    said = " ".join(done.stderr.split())
    assert done.returncode == 0 and "imported" not in done.stdout and "Traceback" not in said
    assert said.count("package first offers a method 'lpt'") == 1
    assert "both left out: method 'both' is offered 2 times, by first and second" in " ".join(done.stdout.split())
    unknown = poise_command(folder, *COMPARE, "-p", "nobody")
    assert unknown.returncode == 2 and "is neither a method nor" in unknown.stderr


def test_policies_that_are_broken_or_fail_on_the_way_are_notes_and_other_rows_stand(folder):
    """One is no policy; one passes on the small layer of the check, which is step 0, and fails then."""
    no_policy = {"no_policy.py": "class Policy: pass"}
    install(folder / "site", "no-policy", {POLICIES: {"theirs": "no_policy:Policy"}}, no_policy)
    late = FILES["my_placements/hottest.py"].replace("whole_E, rest_E", "1 / (3 - view.step); whole_E, rest_E")
    install(folder / "site", "their-thing", {POLICIES: {"hottest": "their_thing:Hottest"}}, {"their_thing.py": late})
    done = poise_command(folder, *COMPARE, "--fast", "hottest", "--fast", "theirs", "--fast", "split", "--step-slots", "1",
                  "--warm-up", "1")  # fmt: skip
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and "│ lpt + split" in said, done.stderr
    assert "theirs left out: policy 'theirs' of package no-policy is not the class of a frozen dataclass" in said
    assert "lpt + hottest left out: policy 'hottest' of their_thing failed: ZeroDivisionError" in said
    assert "│ lpt + hottest" not in said and "Traceback" not in done.stderr


def page_policy():
    scope = {"__name__": "hottest"}
    sys.modules["hottest"] = type(sys)("hottest")
    exec(FILES["my_placements/hottest.py"], scope)
    return scope["Hottest"]


def wrong_policies():
    import dataclasses

    import numpy as np

    good = page_policy()

    def but(**members):
        return dataclasses.dataclass(frozen=True)(type("Hottest", (good,), members))

    def early(change):
        return but(before_gate=lambda self, view: change(good.before_gate(self, view)))

    def late(change):
        return but(
            after_gate=lambda self, view, holders_ED, load_SE: change(
                good.after_gate(self, view, holders_ED, load_SE), load_SE
            )
        )

    def lose(plan, load_SE):
        quota_ED = plan.quota_ED.copy()
        quota_ED[0] = 0
        return dataclasses.replace(plan, quota_ED=quota_ED)

    def write(plan, load_SE):
        load_SE[:] = 0
        return plan

    return {
        "no class": (good(), "not the class of a frozen dataclass"),
        "not frozen": (dataclasses.dataclass(type("Loose", (), {})), "not the class of a frozen dataclass"),
        "a setting without default": (dataclasses.make_dataclass("Needy", [("x", int)], frozen=True), "needs a default"),
        "no member": (but(exact=None), "has no exact of type bool"),
        "no summary": (but(summary=3), "has no summary of type str"),
        "another name": (but(name="other"), "calls itself 'other'"),
        "fewer parameters": (but(after_gate=lambda self, view: None), r"has no after_gate\(view, holders_ED, load_SE\)"),
        "int holders": (early(lambda held: held.astype(int)), "no bool array"),
        "holders of another shape": (early(lambda held: held.T), "no bool array"),
        "more than the slots": (early(np.ones_like), "in 4 slots"),
        "an expert nowhere": (early(np.zeros_like), "no holder|fails"),
        "tokens lost": (late(lose), "tokens"),
        "no plan": (late(lambda plan, load_SE: plan.quota_ED), "not a StepPlan"),
        "changes its input": (late(write), "must be pure"),
        "raises": (late(lambda plan, load_SE: 1 / 0), "ZeroDivisionError"),
    }  # fmt: skip


@pytest.mark.parametrize("case", wrong_policies())
def test_what_is_checked_of_a_policy(case):
    found, said = wrong_policies()[case]
    with pytest.raises(PluginError, match=f"policy 'hottest' of package theirs .*({said})") as caught:
        checked_policy("hottest", "theirs", found)
    assert "uninstall theirs" in caught.value.hint


def test_the_checks_pass_what_is_right():
    assert checked_policy("hottest", "mine", page_policy()).name == "hottest"
    for name in ("expert-parallelism", "hecate", "llep"):  # of our own, those that compile nothing large
        assert checked_policy(name, "poise", type(OWN_POLICIES[name])) == OWN_POLICIES[name]
    method = checked_method("good", "mine", Method(lambda problem, *, time_limit_s, seed, progress: None, "fine"))
    assert method.summary == "fine"


def test_poises_own_are_found_without_a_look_at_packages(monkeypatch):
    def looked(*args, **kwargs):
        raise AssertionError("packages were looked at")

    monkeypatch.setattr("poise.util.registry.distributions", looked)
    names = Registry("thing", "poise.things", {"ours": 1}, looked)
    assert names["ours"] == 1 and "ours" in names
    with pytest.raises(AssertionError, match="looked at"):
        names["other"]


def test_a_list_leaves_out_what_is_broken_and_says_so_once(tmp_path, monkeypatch):
    install(tmp_path, "theirs-one", {"poise.things": {"bad": "no_such_module_at_all:x", "good": "json:dumps"}}, {})
    install(tmp_path, "theirs-two", {"poise.things": {"no equals sign": ""}}, {})
    text = tmp_path / "theirs_two-1.0.dist-info" / "entry_points.txt"
    text.write_text(text.read_text().replace(" = ", ""))
    monkeypatch.syspath_prepend(str(tmp_path))
    names = Registry("thing", "poise.things", {"ours": 1}, lambda name, package, found: (package, found.__name__))
    with pytest.warns(UserWarning) as said:
        assert list(names) == ["ours", "good"] and len(names) == 2
    two = sorted(str(one.message) for one in said)
    assert len(two) == 2 and two[0].startswith("the entry points of package theirs-two cannot be read")
    assert two[1].startswith("thing 'bad' of package theirs-one cannot be imported")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dict(names) == {"ours": 1, "good": ("theirs-one", "dumps")}
        for _ in range(2):
            with pytest.raises(PluginError, match="theirs-one"):
                names["bad"]
        with pytest.raises(OptionError, match="unknown thing 'x'") as caught:
            names.ask("x")
    assert caught.value.hint == "one of ours, good"
