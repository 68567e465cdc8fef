"""What a stranger meets first: help, completion, near misses, names of files and models, the form of what is printed."""

import ast
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import poise.cli
from poise import api
from poise.cli import terminal
from poise.cli.main import VERBS, app
from poise.cli.terminal import errors, out, print_json
from poise.machine.hfconfig.cached import cache_folder
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.routing.synthetic import zipf_trace
from poise.util.errors import ModelError
from poise.util.words import close_to, closest

CONFIG = {
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
}
PLAN = ("--method", "contiguous", "--no-verdict", "--time-limit", "0.1")


def run(*words, **more):
    return CliRunner().invoke(app, [*map(str, words)], **more)


def python(*words, **environ):
    done = subprocess.run(
        [sys.executable, "-m", "poise", *words], capture_output=True, text=True, env={**os.environ, **environ}
    )
    return done.stdout, done.stderr, done.returncode


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    trace = zipf_trace(num_tokens=400, num_layers=3, num_experts=8, top_k=2)
    trace.save(folder / "trace.npz")
    (folder / "loads.json").write_text(json.dumps({"logical_count": np.arange(1, 25).reshape(3, 8).tolist()}))
    api.plan(trace, "1x4", method="contiguous").placement.save(folder / "plan.npz")
    return folder


def test_help_is_short_for_everything_and_the_list_is_whole():
    listed = run("-h")
    assert (
        listed.exit_code == 0
        and listed.stdout == run("--help").stdout
        and "..." not in listed.stdout.split("Commands:")[1]
    )
    for name, line in VERBS.items():
        assert f"  {name} " in listed.stdout and line in listed.stdout
        got = run(name, "-h")
        assert got.exit_code == 0 and "-h, --help" in got.stdout and f"Usage: poise {name}" in got.stdout


def test_python_m_poise_and_completion_are_the_command():
    assert python("--version")[0].startswith("poise ")
    asked = {"_POISE_COMPLETE": "complete_bash", "COMP_WORDS": "poise ver", "COMP_CWORD": "1"}
    assert python(**asked)[0].split() == ["verdict", "verify"]
    asked |= {"COMP_WORDS": "poise inspect --ex", "COMP_CWORD": "2"}
    assert python(**asked)[0].split() == ["--executor"]
    assert {"--install-completion", "--show-completion"} <= set(run("-h").stdout.split())


@pytest.mark.parametrize("words", [["inspect", "--\x1b[31m"], ["machines", "a", "b\x1b]0;x\x07"], ["\x1b[31m"], ["plan", "-r", "\x1b"],
                                   ["--\x9b1m"], ["inspect", "--json=\x1b[2J"]])  # fmt: skip
def test_what_is_wrong_with_the_words_is_told_harmlessly(words):
    got = run(*words)
    assert got.exit_code == 2 and "Error" in got.stderr and not {"\x1b", "\x07", "\x9b"} & set(got.output)


def test_a_verb_that_is_misspelt_is_named():
    assert "Did you mean 'compare'" in run("compar").stderr


def test_close_words_in_any_case():
    assert (
        closest("EPLB", ["lpt", "eplb", "eplb-global"]) == "eplb"
        and closest("zzz", ["lpt"]) == ""
        and closest("a", []) == ""
    )
    assert (
        close_to("Poise-Nera", ["poise", "poise-near"]) == "did you mean poise-near?"
        and close_to("x", ["lpt"]) == "one of lpt"
    )


MISSES = [
    (["plan", "trace.npz", "-c", "2x4:h10", "-o", "o.npz"], "did you mean h100?"),
    (["plan", "trace.npz", "-c", "1x4", "-o", "o.npz", "--method", "EPLB"], "did you mean eplb?"),
    (["plan", "trace.npz", "-c", "1x4", "-o", "o.npz", "--engine", "slang"], "did you mean sglang?"),
    (["plan", "trace.npz", "-c", "1x4", "-o", "o.npz", "--risk", "wrost"], "did you mean worst?"),
    (["plan", "trace.npz", "-c", "1x4", "-o", "o.npz", "-m", "Qwen3-235B-A22"], "did you mean qwen3-235b-a22b?"),
    (["plan", "trac.npz", "-c", "1x4", "-o", "o.npz"], "did you mean trace.npz?"),
    (["plan", "trace.npz", "-c", "1x4", "-o", "o.npz", "--current", "{folder}/paln.npz"], "did you mean {folder}/plan.npz?"),
    (["compare", "trace.npz", "-c", "1x4", "-p", "contigous"], "did you mean contiguous?"),
    (["compare", "trace.npz", "-c", "1x4", "-p", "contiguous", "--fast", "poise-nearr"], "did you mean poise-near?"),
    (["compare", "trace.npz", "-c", "1x4", "-p", "contiguous", "--fast", "hecate:overlp=1"], "did you mean overlap?"),
    (["compare", "trace.npz", "-c", "1x4", "-p", "contiguous", "--fast", "split", "--predictor", "means"], "did you mean mean?"),
    (["convert", "loads.json", "-o", "o.npz", "--format", "sglan"], "did you mean sglang"),
    (["export", "plan.npz", "--to", "sglng", "-o", "o.json"], "did you mean sglang?"),
    (["machines", "h10"], "did you mean h100?"),
    (["demo", "--domain", "pyton"], "did you mean python?"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "hint"), MISSES, ids=[f"{words[0]} {words[-1].rsplit('/')[-1]}" for words, _ in MISSES]
)
def test_near_misses_are_named(files, monkeypatch, words, hint):
    monkeypatch.chdir(files)
    got = run(*(word.format(folder=files) for word in words))
    assert got.exit_code == 2 and f"hint: {hint.format(folder=files)}" in got.stderr.replace("\n", ""), got.output
    assert not (files / "o.npz").exists()


def test_a_file_that_nothing_is_near_has_no_guess(files):
    assert "did you mean" not in run("inspect", files / "something-else").stderr
    assert "did you mean" not in run("inspect", files / "no folder" / "trace.npz").stderr


def cached(hub, model, revision="abc", main="abc", config=CONFIG):
    place = hub / f"models--{model.replace('/', '--')}"
    (place / "snapshots" / revision).mkdir(parents=True)
    (place / "snapshots" / revision / "config.json").write_text(json.dumps(config))
    if main:
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(main)
    return place


def test_ids_of_hugging_face_are_read_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "some/model")
    assert ModelSpec.parse("some/model").num_experts == 8 and ModelSpec.parse("some/model").name == "some/model"
    place = cached(tmp_path, "some/other", "one", main="two")
    cached(tmp_path, "some/other", "two", main="", config=CONFIG | {"num_experts": 16})
    os.utime(place / "snapshots" / "one" / "config.json", (4e9, 4e9))
    assert ModelSpec.parse("some/other").num_experts == 16  # that of main
    (place / "refs" / "main").write_text("../../../elsewhere")
    assert ModelSpec.parse("some/other").num_experts == 8  # the last that came
    with pytest.raises(ModelError, match=r"no config of 'Qwen/Qwen3-235B-A22B'.*cache") as caught:
        ModelSpec.parse("Qwen/Qwen3-235B-A22B")
    assert (
        caught.value.hint.startswith("hf download Qwen/Qwen3-235B-A22B ")
        and "preset qwen3-235b-a22b" in caught.value.hint
    )
    with pytest.raises(ModelError, match="unknown model"):
        ModelSpec.parse("some/model/more")


def test_the_cache_is_where_hugging_face_says(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "huggingface" / "hub"
    for name, below in (
        ("XDG_CACHE_HOME", "huggingface/hub"),
        ("HF_HOME", "hub"),
        ("HUGGINGFACE_HUB_CACHE", "."),
        ("HF_HUB_CACHE", "."),
    ):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert cache_folder() == tmp_path / name / below


@pytest.mark.parametrize("words", [
    ["plan", "trace.npz", "-c", "1x4", *PLAN, "-o"],
    ["homes", "trace.npz", "-c", "1x4", "-m", "mixtral-8x7b", "-o"],
    ["verdict", "trace.npz", "-c", "1x4", "-m", "mixtral-8x7b", "-o"],
    ["watch", "trace.npz", "-c", "1x4", "-o"],
    ["record", "model", "prompts.jsonl", "-o"],
    ["demo", "-o"],
])  # fmt: skip
def test_a_file_of_the_wrong_ending_is_refused_before_the_work(files, monkeypatch, words):
    monkeypatch.chdir(files)
    got = run(*words, "p.json")
    assert got.exit_code == 2 and "'p.json' does not end in .npz" in got.stderr and "hint: name it p.npz" in got.stderr
    assert not (files / "p.json").exists()


def test_vllm_needs_no_export(files, tmp_path):
    got = run("export", files / "plan.npz", "--to", "vllm", "-o", tmp_path / "o.json")
    said = " ".join(got.stderr.split())
    assert (
        got.exit_code == 2
        and "vllm loads no file" in said
        and "POISE_STATIC_MAP=" in said
        and not (tmp_path / "o.json").exists()
    )


KEYS = {  # of version 1: what goes or means something else makes it 2, and is changed here; what is new is added
    "inspect": "name layers experts tokens requests top_k decode_share domains per_layer",
    "bench": "command made versions host work cases skipped",
    "plan": "method objective lower_bound gap seconds imbalance cut_by_clock interrupted terms details moves verdict",
    "convert": "engine kind wrote file recorded_layers profile notes",
    "diff": "fetched dropped moved_bytes links link_seconds most_on_device rounds ranks layers most",
    "export": "engine file filled_slots slots redundant devices unplanned_layers command notes",
    "machines": "source fitted presets kernels links",
    "compare": "rows verdict judged cluster ground model traffic split engine defaults slots notes",
    "watch": "event",
}  # fmt: skip


def test_every_json_says_what_it_is_and_its_version(files, tmp_path):
    of_verb = {
        "inspect": [files / "trace.npz"],
        "bench": ["--only", "W0 balanced, 1x8", "--method", "contiguous", "--work", 1],
        "plan": [files / "trace.npz", "-c", "1x4", *PLAN, "-o", tmp_path / "p.npz"],
        "convert": [files / "loads.json", "-o", tmp_path / "l.npz"],
        "diff": [files / "plan.npz", files / "plan.npz"],
        "export": [files / "plan.npz", "--to", "sglang", "--num-hidden-layers", 3, "-o", tmp_path / "e.json"],
        "machines": [],
        "compare": [files / "trace.npz", "-c", "1x4", "-p", "contiguous", "--steps", 2],
        "watch": [files / "trace.npz", "-c", "1x4", "--once", "--method", "lpt", "-n", 20, "--window", 6, "--every", 6],
    }  # fmt: skip
    for verb, words in of_verb.items():
        got = run(verb, *words, "--json")
        assert got.exit_code == 0, got.output
        for text in got.stdout.splitlines() if verb == "watch" else [got.stdout]:
            said = json.loads(text)
            assert next(iter(said)) == "schema" and said.pop("schema") == terminal.SCHEMAS[verb] == 1
            assert set(KEYS[verb].split()) <= set(said) and said, (verb, list(said))


def test_every_verb_prints_under_its_own_name():
    kinds = {}
    for path in Path(poise.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", ""))
            if name in ("print_json", "named") and path.name != "terminal.py":
                kinds[path.stem] = node.args[0].value
    assert kinds == {
        "tables": "calibrate-tables",
        "watch_output": "watch",
        "demo": "compare",
        "verdict_recipe": "verdict",
    } | {name: name for name in VERBS if name not in ("demo", "watch")}
    assert set(kinds.values()) == set(terminal.SCHEMAS)


def test_without_a_terminal_progress_is_lines(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "EVERY_S", 0.01)
    said = ""
    with terminal.progress() as report:
        report("search", 0.42)
        while "search 42%" not in said:
            said += capsys.readouterr().err
        terminal.COMPILATION._open.append(("who", 0.0))
        while "compiling function" not in said:
            said += capsys.readouterr().err
        terminal.COMPILATION._open.pop()
    monkeypatch.setattr(terminal, "EVERY_S", 1000.0)
    capsys.readouterr()
    with terminal.progress() as report:
        report("search", 1.0)
    assert capsys.readouterr().err == "", "work that is done soon says nothing"


def test_a_plan_can_be_read_by_the_name_it_was_given(files, tmp_path):
    got = run("plan", files / "trace.npz", "-c", "1x4", *PLAN, "-o", tmp_path / "p.npz")
    assert got.exit_code == 0 and Placement.load(tmp_path / "p.npz").num_experts == 8


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_stream_that_takes_nothing_is_an_error_in_a_line(files):
    """Closed, full, or read no further by who asked for it."""

    inspect = f"inspect {shlex.quote(str(files / 'loads.json'))}"

    def ends(how, verb=inspect):
        words = f"exec {shlex.quote(sys.executable)} -m poise {verb} {how}"
        done = subprocess.run(["sh", "-c", words], capture_output=True, text=True)
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
        return done.returncode, done.stderr

    assert ends(">&-") == (0, "")
    for verb in (inspect, f"{inspect} --json", "--help"):
        status, said = ends(">/dev/full", verb)
        assert status == 1 and said.startswith("error: cannot write what is to be said: [Errno 28]")
    assert ends("2>&-")[0] == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("words", ["--version", "plan --help", "machines", "machines --json"])
def test_so_it_is_whatever_says_it(monkeypatch, capsys, words):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            app(words.split(), prog_name="poise")
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("error: cannot write what is to be said: [Errno 28]")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("write", [lambda: out.print("x"), lambda: print_json("plan", {})])
def test_what_is_said_is_written_at_once_and_a_fault_of_the_program_is_none_of_a_stream(monkeypatch, capsys, write):
    """Else Python writes when it ends, where nobody tells what went wrong."""

    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(typer.Exit), errors():
        write()
    assert "cannot write what is to be said" in capsys.readouterr().err
    with pytest.raises(OSError, match="of no stream"), errors():
        raise OSError("of no stream")
    monkeypatch.undo()
    out.print("next")
    assert capsys.readouterr().out == "next\n", "what could not be said is over"


def test_another_file_of_poise_is_named_for_what_it_is(files):
    for words, said in (
        (("plan", "plan.npz", "-c", "1x4", "-o", "out.npz"), "hint: it is an expert placement: was another"),
        (("inspect", "plan.npz"), "hint: it is an expert placement: was another"),
        (("diff", "trace.npz", "plan.npz"), "hint: it is a routing trace: was another"),
        (("export", "trace.npz", "--to", "npz", "-o", "out.npz"), "hint: it is a routing trace: was another"),
        (("export", "loads.json", "--to", "npz", "-o", "out.npz"), "loads.json is no .npz"),
    ):
        done = run(*[files / word if "." in word else word for word in words])
        assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.stderr
    plan = dict(np.load(files / "plan.npz"))
    del plan["method"]
    for arrays, words in (
        (plan, ("diff", "less.npz", "plan.npz")),
        ({"cross": np.ones((1, 8, 8))}, ("inspect", "less.npz")),
    ):
        np.savez(files / "less.npz", **arrays)  # of the kind that is asked for
        said = " ".join(run(*[files / word if "." in word else word for word in words]).stderr.split())
        assert "is missing" in said and "damaged" in said and "was another" not in said
    cut = files / "cut.npz"
    cut.write_bytes((files / "plan.npz").read_bytes()[:500])
    assert "it may be truncated" in run("diff", cut, cut).stderr
