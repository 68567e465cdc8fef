"""poise verdict as a command: first line, JSON, page, flags, and what it refuses."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import poise
from poise.cli.main import app
from poise.routing.fingerprint import fingerprint

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "src" / "poise" / "data" / "demo_trace.npz"
EXPERTS = 32


def run(*words):
    return CliRunner().invoke(app, ["verdict", *map(str, words)])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two windows of tables of gpt-oss-20b's 32 experts, in which the first quarter has half of all tokens, and even ones."""
    folder = tmp_path_factory.mktemp("windows")
    share = np.where(np.arange(EXPERTS) < EXPERTS // 4, 2.0, 2.0 / 3.0)
    for name, weight, seed in (
        ("a", share, 1),
        ("b", share, 2),
        ("even_a", np.ones(EXPERTS), 3),
        ("even_b", np.ones(EXPERTS), 4),
    ):
        rng = np.random.default_rng(seed)
        table = rng.multinomial(200_000, weight / weight.sum(), size=(6, 4))
        (folder / f"{name}.json").write_text(json.dumps({"logical_count": table.tolist()}))
    return folder


BASE = ("--cluster", "1x8:h200", "--model", "gpt-oss-20b", "--work", 1)


def test_text_json_and_page_say_the_same(files):
    """The word first; then figures, costs and flags. Fails if text, JSON or page is of another verdict."""
    words = (
        files / "a.json",
        files / "b.json",
        *BASE,
        "--phase",
        "prefill",
        "-n",
        16384,
        "--engine",
        "sglang",
        "-r",
        8,
    )
    text, page = run(*words, "--html", files / "page.html"), files / "page.html"
    assert text.exit_code == 0, text.output
    found = json.loads(run(*words, "--json").stdout)
    assert text.stdout.startswith(f"recommend_trial: {found['reason'].partition(': ')[2][:40]}")
    assert "saved, ms a step" in text.stdout and " 0.000 " not in text.stdout.partition("The step now")[2]
    assert found["verdict"] == "recommend_trial" and found["schema"] == 1 and found["redundant"] == 8
    one = found["phases"][0]
    assert found["figures_of"] == one["phase"] == "prefill" and one["tokens_per_step"] == pytest.approx(16384)
    assert (
        one["ms_per_step"] == pytest.approx(24 * one["ms_per_layer"]) and found["interval"][0] > 0 < found["worst_case"]
    )
    assert "sglang.mxfp4" in one["ground"] and "deepep-normal" in one["ground"]
    html = page.read_text("utf-8")
    for shown in (
        f"{one['ms_per_step']:.3f} ms",
        "recommend_trial",
        f"{found['cache_tokens_lost']:,} tokens",
        *found["flags"],
    ):
        assert shown in text.stdout and shown.replace("'", "&#x27;").replace('"', "&quot;") in html
    assert "<script src" not in html and html.count("<section id=") == 2
    assert re.search(r"note: 4 of 24 MoE layers were recorded", text.stdout)


def test_flags_are_those_of_the_engine(files):
    """Fails if flags are of another engine or R."""
    words = (files / "a.json", files / "b.json", *BASE, "--phase", "prefill", "-n", 16384, "-r", 8, "--json")
    for engine, flag in (("vllm", '"num_redundant_experts": 8'), ("sglang", "--ep-num-redundant-experts 8"),
                         ("tensorrt-llm", "load_balancer"), ("vllm-ascend", "eplb_config")):  # fmt: skip
        got = json.loads(run(*words, "--engine", engine).stdout)
        assert got["verdict"] == "recommend_trial" and flag in " ".join(got["flags"]), got["reason"]
    from_any = " ".join(json.loads(run(*words).stdout)["flags"])
    assert "vLLM" in from_any and "SGLang" in from_any and "TensorRT-LLM" in from_any


def test_the_map_that_was_priced_is_what_is_written(files, monkeypatch, tmp_path):
    """Only poise is tried here, so it is chosen. Fails if the file is of the earlier window or of other slots, or no
    engine's export takes it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("poise.replay.trial.TRIED_METHODS", ("poise",))
    words = (
        files / "a.json",
        files / "b.json",
        *BASE,
        "--phase",
        "prefill",
        "-n",
        16384,
        "-r",
        8,
        "--engine",
        "sglang",
    )
    done = run(*words, "--json", "-o", "placement.npz")
    export, start = json.loads(done.stdout)["flags"]
    made = poise.Placement.load(tmp_path / "placement.npz")
    assert made.num_slots == EXPERTS + 8 and made.fitted.about["traffic"].endswith("b.json")
    later = fingerprint(poise.read(files / "b.json"))
    assert (
        made.fitted.traffic.share_of(later) == 1
        and made.fitted.traffic.share_of(fingerprint(poise.read(files / "a.json"))) == 0
    )
    assert CliRunner().invoke(app, shlex.split(export)[1:]).exit_code == 0
    assert (tmp_path / "experts.json").exists() and "--init-expert-location experts.json" in start


def test_even_traffic_gets_no_flags(files):
    got = run(files / "even_a.json", files / "even_b.json", *BASE, "--phase", "prefill", "-n", 16384)
    assert got.exit_code == 0 and got.stdout.startswith("not_recommended_now") and "\nset: " not in got.stdout


@pytest.fixture(scope="module")
def of_the_page():
    """The page, and what its command says as it stands, but for how long is searched and the number of slots."""
    page = (ROOT / "docs" / "verdict.md").read_text("utf-8")
    (command,) = re.findall(r"```sh\n(.*?)\n```", page)
    words = [*shlex.split(command.replace("--work 60", "--work 1"))[1:], "--redundant", "8", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        got = CliRunner().invoke(app, words)
    assert got.exit_code == 0, got.output
    assert DEMO.relative_to(ROOT).as_posix() in words
    return page, json.loads(got.stdout)


def test_the_demo_trace_has_both_phases(of_the_page):
    """Split in time, each phase by its own rows. Fails if one phase is left out or a default is silent."""
    _, found = of_the_page
    assert [one["phase"] for one in found["phases"]] == ["prefill", "decode"]
    assert [one["tokens_per_step"] for one in found["phases"]] == pytest.approx([8192, 512], rel=0.05)
    assert all(one["ms_per_step_in_other_phase"] is not None for one in found["phases"])
    assert len([note for note in found["notes"] if "assumed" in note]) == 2


def test_the_page_of_the_docs_runs(of_the_page):
    """And the keys of JSON that it names are those that come."""
    page, found = of_the_page
    named = set(re.findall(r"`(\w+)`", page.partition("## JSON")[2]))
    assert named - {"verdict"} <= found.keys() | found["phases"][0].keys() and found.keys() <= named


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.json", "b.json", "even_a.json"], "one or two windows"),
        (["a.json", "a.json"], "not seen"),
        (["none.json"], "none.json"),
        (["a.json", "-n", "10"], "prefill or of decode"),
        (["a.json", "--phase", "chat"], "unknown phase"),
        (["a.json", "--context", "0"], "context"),
        (["a.json", "--redundant", "-1"], "at least 0"),
        (["a.json", "--engine", "sglang", "--redundant", "3"], "every rank"),
        (["a.json", "--current", "a.json"], "a.json"),
        (["a.json", "--homes", "away"], "unknown homes"),
        (["a.json", "--html", "none/page.html"], "none"),
        (["a.json", "--output", "none/map.npz"], "none"),
    ],
)
def test_refused_in_words(files, monkeypatch, words, said):
    monkeypatch.chdir(files)
    got = run(*words, *BASE)
    assert got.exit_code == 2 and said in " ".join(got.stderr.split()), got.output
    assert "Traceback" not in got.output


def test_frequencies_need_n(files, tmp_path):
    """As for every command. Fails if a share is taken for tokens."""
    for name in ("a", "b"):
        table = np.array(json.loads((files / f"{name}.json").read_text())["logical_count"])
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"logical_count": (table / table.sum(2, keepdims=True)).tolist()})
        )
    words = (tmp_path / "a.json", tmp_path / "b.json", *BASE)
    refused = run(*words)
    assert refused.exit_code == 2 and "frequencies" in refused.stderr
    assert run(*words, "--phase", "decode", "-n", 512, "-r", 0).exit_code == 0
