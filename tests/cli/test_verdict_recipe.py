"""``poise verdict --recipe``: from a file to what its expert settings leave."""

import json

import numpy as np
import pytest
import yaml
from tests.engines.test_recipes import SRT
from typer.testing import CliRunner

from poise import api
from poise.cli.main import app
from poise.engines.slots import trivial_placement

LAYERS, EXPERTS = 4, 256


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    rng = np.random.default_rng(0)
    share = np.stack([rng.permutation(np.arange(1, EXPERTS + 1.0) ** -0.4) for _ in range(LAYERS)])
    for name in ("a", "b"):
        load = share * np.exp(0.2 * rng.normal(size=share.shape))
        rows = np.zeros((61, EXPERTS), int)
        rows[3 : 3 + LAYERS] = np.round(load / load.sum(1, keepdims=True) * 8 * 32768)
        (folder / f"{name}.json").write_text(json.dumps({"logical_count": rows.tolist()}))
    (folder / "r.yaml").write_text(yaml.safe_dump(SRT, sort_keys=False))
    return folder


def say(*words):
    got = CliRunner().invoke(app, ["verdict", *map(str, words)])
    return got.exit_code, " ".join(got.stdout.split()), " ".join(got.stderr.split())


def test_without_a_recording_it_says_what_is_set(files):
    code, out, _ = say("--recipe", files / "r.yaml")
    assert code == 0 and out.count("name a recording, or two") == 2
    assert "prefill, sglang, 8 expert-parallel ranks, 32 redundant slots a layer, EPLB off and no map" in out
    assert "not read: --weird-expert-flag" in out
    slots = 32 / 8 * 58 * 3 * 7168 * 2048 / 2**30  # fp8
    assert f"take {slots:.2f} GiB a rank" in out
    assert out.count("Its model deepseek-ai/DeepSeek-R1-0528 is taken for the preset deepseek-r1.") == 2


def test_it_says_what_its_model_is_taken_for(files):
    script = files / "r.sh"
    script.write_text(
        "vllm serve zai-org/GLM-4.5-Air -tp 8 --enable-expert-parallel --enable-eplb --num-redundant-experts 8"
    )
    _, out, _ = say("--recipe", script)
    assert "Its model zai-org/GLM-4.5-Air is no preset: --model says what it is." in out and "GiB" not in out
    _, out, _ = say("--recipe", script, "-m", "glm-4.5", "--json")
    (one,) = json.loads(out)["recipe"]
    assert (one["preset"], one["priced_as"]) == ("", "glm-4.5") and "is taken for glm-4.5." in one["lines"][1]
    many = one["slot_bytes_per_rank"]
    script.write_text(script.read_text() + " -pp 2")
    assert (
        json.loads(say("--recipe", script, "-m", "glm-4.5", "--json")[1])["recipe"][0]["slot_bytes_per_rank"]
        == many / 2
    )


def test_of_unknown_settings_no_verdict_is_given(files):
    script = files / "u.sh"
    script.write_text(
        "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --tp 8 --trust-remote-code $E"
    )
    code, out, _ = say("--recipe", script)
    assert code == 0 and "what it sets of experts is unknown, $E may hold any flag" in out and "GiB" not in out
    code, _, error = say(files / "a.json", files / "b.json", "--recipe", script, "-c", "1x8:h200")
    assert code == 2 and "what the recipe sets of experts is unknown: $E" in error


def answered(files, *words):
    """The one instance that was asked about."""
    got = CliRunner().invoke(app, [*map(str, ["verdict", files / "a.json", files / "b.json", "--recipe", files / "r.yaml",
                                              "--work", 0.2, "--json", *words])])  # fmt: skip
    assert got.exit_code == 0, got.stderr
    (one,) = json.loads(got.stdout)["recipe"]
    return one, " ".join(one["lines"])


def test_what_it_leaves_is_the_verdict_from_what_runs(files):
    one, out = answered(files, "-c", "2x4:h200", "--phase", "prefill", "--prefill-tokens", 8192)
    first = api.load(files / "a.json")
    start = trivial_placement(EXPERTS, EXPERTS + 32, 8, first.layer_ids)
    want = api.verdict(files / "a.json", files / "b.json", cluster="2x4:h200", model="deepseek-r1", current=start,
                       phase="prefill", tokens_per_step=8192, engine="sglang", work=0.2)  # fmt: skip
    assert one["verdicts"][0]["ms_per_step"] == pytest.approx(want.to_json()["ms_per_step"])
    assert f"leave {1e3 * want.phases[0].saved_s:.3f} ms" in out and want.advice in out


def test_with_its_own_eplb_it_says_what_that_leaves(files):
    one, out = answered(files, "-c", "12x4:h200", "--phase", "decode", "--decode-tokens", 4096)
    phase = one["verdicts"][0]["phases"][0]
    by = {tried["method"]: tried["ms_per_step"] for tried in phase["tried"]}
    assert {tried["redundant"] for tried in phase["tried"]} == {32}
    assert f"it leaves {max(by.values()) - by['eplb']:.3f} ms" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "a verdict needs a recording and --cluster and --model"),
        (("a.json",), "a verdict needs --cluster and --model"),
        (
            ("a.json", "--recipe", "r.yaml", "-c", "1x4:h200", "--phase", "prefill"),
            "over 8 ranks, the cluster has 4 devices",
        ),
        (("a.json", "--recipe", "r.yaml", "-c", "2x4:h200"), "over 48 ranks, the cluster has 8 devices"),
        (("--recipe", "r.yaml", "-r", "8"), "says what a recipe leaves"),
        (("--recipe", "none.yaml"), "none.yaml"),
        (
            ("--recipe", "r.yaml", "-m", "qwen3-235b-a22b"),
            "128 experts and 32 redundant slots are not shared evenly by 48",
        ),
    ],
)
def test_what_is_refused(files, words, said):
    code, _, error = say(*(files / word if word.endswith((".json", ".yaml")) else word for word in words))
    assert code == 2 and said in error, error
