"""Names of others go out harmless: every command, fed files whose names hold markup, ESC, line feeds and bad bytes."""

import json
import os
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from poise import api
from poise.bench.results import BenchResults, BenchRow, CaseResult, SkippedCase
from poise.cli.main import VERBS, app
from poise.routing.synthetic import zipf_trace
from poise.util.words import harmless, printable

EVIL = os.fsdecode(b"[red]a[/][/]\\[b] :smile: <img src=x>&\x1b[31m\x07\r\nb\xff\xc2\x9b\xe2\x80\xae")
SHOWN = r"[red]a[/][/]\[b] :smile: <img src=x>&\x1b[31m\x07\r\nb\udcff\x9b\u202e"
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")
GOOD = {"t.npz", "l.json", "p.npz", "c.yaml", "config.json", "r.json", "r.yaml"}


def test_what_a_terminal_would_act_on_becomes_an_escape():
    assert (
        printable(EVIL) == SHOWN and printable(SHOWN) == SHOWN and printable("naïve \u4e2d\U0001f600") == "naïve 中😀"
    )
    assert harmless("a\n\tb\x1b") == "a\n\tb\\x1b" and printable("a\n\tb") == "a\\n\\tb"


def commands(at):
    """By command, the words of some calls; ``at`` gives the path of a file by the end of its name."""
    limit = ["--time-limit", 0.1]
    plan = ["--method", "lpt", "--no-verdict", *limit]
    return {
        "demo": [["--html", at("none/r.html"), *limit], ["--html", at("r.html"), "--domain", EVIL, *limit]],
        "inspect": [[at("t.npz")], [at("l.json")], [at("t.npz"), "--json"]],
        "plan": [[at("t.npz"), "-c", at("c.yaml"), "-o", at("new.npz"), *plan]],
        "compare": [
            [at("t.npz"), "-c", at("c.yaml"), "-p", "contiguous", "-p", at("p.npz"), "--html", at("r.html"), "--judge", f"{EVIL.replace('=', '')}={at('t.npz')}"],
            [at("t.npz"), "-c", "1x4", "-p", at("p.npz"), "--json"],
        ],
        "bench": [["--compare", at("r.json"), at("r.json"), *more] for more in ([], ["--json"], ["--html", at("b.html")])],
        "breakeven": [["-c", at("c.yaml"), "-m", "mixtral-8x7b", "--placement", at("p.npz"), "--sizes", 8, "--steps", 1, "--step-slots", 0, at("t.npz")]],
        "homes": [[at("t.npz"), "-c", at("c.yaml"), "-m", at("config.json"), "--work", 0.1, "-o", at("h.npz"), "--placement-out", at("q.npz"), *more] for more in ([], ["--json"])],
        "diff": [[at("p.npz"), at("p.npz"), "-c", at("c.yaml")]],
        "export": [
            [at("p.npz"), "--to", target, "--num-hidden-layers", 3, "-o", at(f"{target}.json")] for target in ("sglang", "tensorrt-llm", "vllm-ascend")
        ],
        "convert": [[at("l.json"), "-o", at("o.json")], [at("p.npz"), "-o", at("o.npz"), "--placement", at("p.npz")]],
        "record": [[at("model"), at("prompts.jsonl"), "-o", at("o.npz")]],
        "verify": [[at("p.npz"), at("p.npz")], [at("p.npz"), at("p.npz"), "--against", at("p.npz"), "--json"]],
        "watch": [[at("t.npz"), "-c", at("c.yaml"), "--once", "--method", "lpt", "-n", 20, "--window", 6, "--every", 6, "-o", at("w.npz"), *more] for more in ([], ["--json"])],
        "machines": [[at("none")]],
        "verdict": [
            [at("t.npz"), "-c", at("c.yaml"), "-m", at("config.json"), "--current", at("p.npz"), "-r", 0, "--work", 0.1, "--html", at("v.html"), "-o", at("v.npz")],
            [at("t.npz"), "-c", "1x4", "-m", at("config.json"), "-r", 0, "--work", 0.1, "--json"],
            ["--recipe", at("r.yaml")], ["--recipe", at("r.yaml"), "--json"],
        ],
        "calibrate": [["--cluster", at("c.yaml"), "--curve", at("no.csv"), "-o", at("o.yaml")]],
    }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of files with these names: as they should be, and with something else in them."""
    good, bad = (tmp_path_factory.mktemp(name) for name in ("good", "bad"))
    trace = zipf_trace(num_tokens=400, num_layers=3, num_experts=8, top_k=2)
    trace.save(good / "t.npz")
    (good / "l.json").write_text(json.dumps({"logical_count": np.arange(24).reshape(3, 8).tolist()}))
    flags = {"moe_expert_parallel_size": 4, "tensor_parallel_size": 4, "moe_config": {"load_balancer": printable(EVIL)},
             "expert\x1b[31m\u202e": 1}  # fmt: skip
    recipe = {"model": {"path": "[red]\x1b[31m"}, "backend": {"trtllm_config": {"decode": flags}}}
    (good / "r.yaml").write_text(json.dumps(recipe))
    api.plan(trace, "1x4", method="contiguous").placement.save(good / "p.npz")
    row = BenchRow(EVIL, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, None)
    case = CaseResult(EVIL, "0" * 64, EVIL, EVIL, EVIL, 1, 0, 0, 1, (row,), (EVIL,))
    BenchResults(EVIL, EVIL, {EVIL: EVIL}, {EVIL: EVIL}, 1.0, (case,), (SkippedCase(EVIL, EVIL, EVIL),)).save(
        good / "r.json"
    )
    (good / "c.yaml").write_text("nodes: 1\ndevices_per_node: 4\n")
    sizes = {
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
    }
    (good / "config.json").write_text(json.dumps(sizes))
    for name in GOOD:
        (bad / name).write_text(f"\x1b[31m[red]{{{name}: 1:30\n")
        for folder in (good, bad):
            evil = folder / f"{EVIL}{name}"  # what "[/]" has makes folders of its beginning
            evil.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(evil)
    return {"good": good, "bad": bad, "missing": good / "none"}


def test_the_list_has_every_command():
    assert set(commands(str)) == set(VERBS)


@pytest.mark.parametrize("command", commands(str))
@pytest.mark.parametrize("kind", ["good", "bad", "missing"])
def test_no_command_prints_a_name_raw(files, kind, command):
    for words in commands(lambda name: files[kind] / f"{EVIL}{name}")[command]:
        got = CliRunner().invoke(app, [command, *map(str, words)])
        assert got.exit_code in (0, 1, 2) and isinstance(got.exception, SystemExit | None), (words, got.exception)
        assert not (found := ACTS.search(got.output)), (words, found, got.output)
        assert "\udcff" not in got.output and "Traceback" not in got.output
        if "--json" in words and got.exit_code == 0:
            for line in got.stdout.splitlines() if command == "watch" else [got.stdout]:
                json.loads(line.encode("utf-8").decode("utf-8"))
        if kind == "good" and command not in ("demo", "record", "calibrate", "machines"):
            assert got.exit_code < 2, got.output
        if kind == "missing":
            assert got.exit_code == 2 and SHOWN[:12] in "".join(got.stderr.split("\n")), got.stderr


def test_a_report_has_the_names_as_text(files):
    """Also names that no encoding can say."""
    words = next(
        words for words in commands(lambda name: files["good"] / f"{EVIL}{name}")["compare"] if "--html" in words
    )
    got = CliRunner().invoke(app, ["compare", *map(str, words)])
    assert got.exit_code == 0, got.output
    page = words[words.index("--html") + 1].read_bytes().decode("utf-8")
    assert not ACTS.search(page) and "<img" not in page and "&lt;img src=x&gt;&amp;\\x1b[31m" in page
