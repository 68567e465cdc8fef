"""Tables are read from a folder or a wheel, and what is no table is refused by name; the command writes constants only."""

import hashlib
import json
import zipfile

import numpy as np
import pytest
import yaml
from tests.lab.calibrate import tables_cases as cases
from typer.testing import CliRunner

from poise.cli.main import app
from poise.lab.calibrate.tables import source as source_module
from poise.lab.calibrate.tables.kernels import alpha_of, read_kernels
from poise.lab.calibrate.tables.source import INSIDE, TableSource
from poise.util.errors import NoResultError, OptionError

pytest.importorskip("pyarrow")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "made_up" / "data"
    cases.write_kernel(root, cases.rows())
    cases.write_kernel(root, cases.rows(gpu="h100", table_type="fp8_block", engine="sglang", version="0.5.14"))
    return root


def wheel_of(folder, path):
    with zipfile.ZipFile(path, "w") as out:
        for file in folder.rglob("*.parquet"):
            out.write(file, INSIDE + file.relative_to(folder).as_posix())
    return path


def test_a_folder_and_a_wheel_hold_the_same_rows(folder, tmp_path):
    wheel = wheel_of(folder, tmp_path / "aisimulate-1.2.dev3-cp311-abi3-linux.whl")
    one, two = TableSource(folder), TableSource(wheel)
    for a, b in zip(read_kernels(one), read_kernels(two), strict=True):
        assert a.name == b.name and a.version == b.version and (a.seconds_R == b.seconds_R).all()
    assert [group.name[:3] for group in read_kernels(one)] == [
        ("h100", "fp8_block", "sglang"),
        ("h200", "bf16", "vllm"),
    ]
    assert two.version == "aisimulate 1.2.dev3 (Apache-2.0)"
    assert two.sha256 == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert one.sha256 != two.sha256 and len(one.sha256) == 64


def test_the_version_of_an_unpacked_wheel_is_that_of_its_dist_info(folder):
    assert TableSource(folder).version == "aisimulate of an unknown version (Apache-2.0)"
    (folder.parent / "aisimulate-0.13.0.dist-info").mkdir()
    assert TableSource(folder).version == "aisimulate 0.13.0 (Apache-2.0)"


def test_what_was_written_is_read_back(folder):
    group = next(group for group in read_kernels(TableSource(folder)) if group.gpu == "h200")
    wanted = cases.rows()
    assert (group.shape_R4 == wanted.shape_R4).all() and (group.alpha_R == wanted.alpha_R).all()
    assert (group.ranks_R == wanted.ranks_R).all() and (group.tokens_R == wanted.tokens_R).all()
    assert group.seconds_R == pytest.approx(wanted.seconds_R)


def test_rows_of_another_form_and_of_builds_and_of_unknown_machines_are_left_out(tmp_path):
    group = cases.rows()
    data = cases.columns(group)
    data["moe_tp_size"][:7] = [2] * 7
    path = tmp_path / "h200_sxm" / "moe" / "vllm" / "0.25.0" / "moe_perf.parquet"
    cases.write(path, data)
    cases.write_kernel(tmp_path, cases.rows(kernel="k_nongated", version="0.26.0"))
    cases.write_kernel(tmp_path, cases.rows(version="dev-123"))
    cases.write(tmp_path / "abacus" / "moe" / "vllm" / "0.25.0" / "moe_perf.parquet", data)
    (found,) = read_kernels(TableSource(tmp_path))
    assert found.version == "0.25.0" and len(found.seconds_R) == len(group.seconds_R) - 7


def test_the_newest_release_that_has_half_the_rows_is_taken(tmp_path):
    group = cases.rows()
    for version, rows in (("0.24.0", 1.0), ("0.25.0", 0.6), ("0.31.0", 0.4)):
        part = np.arange(len(group.seconds_R)) % 10 < 10 * rows
        one = group.take(part)
        cases.write(tmp_path / "h200_sxm" / "moe" / "vllm" / version / "moe_perf.parquet", cases.columns(one))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poise.lab.calibrate.tables.kernels.MIN_ROWS", 50)
        (found,) = read_kernels(TableSource(tmp_path))
    assert found.version == "0.25.0"


@pytest.mark.parametrize("column", ["latency", "kernel_source", "moe_ep_size"])
def test_a_missing_column_is_named(folder, column):
    data = cases.columns(cases.rows())
    del data[column]
    cases.write(folder / "h200_sxm" / "moe" / "vllm" / "0.25.0" / "moe_perf.parquet", data)
    with pytest.raises(OptionError, match=f"h200_sxm/moe/vllm/0.25.0/moe_perf.parquet lacks the column '{column}'"):
        read_kernels(TableSource(folder))


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [("latency", float("nan"), "latency is nan"), ("latency", -1.0, "latency is -1"), ("num_tokens", 0, "num_tokens is 0"),
     ("distribution", "zipf", "distribution 'zipf'"), ("distribution", "power_law_1", "distribution 'power_law_1'")],
)  # fmt: skip
def test_an_impossible_value_is_named(folder, column, value, said):
    data = cases.columns(cases.rows())
    data[column][3] = value
    cases.write(folder / "h200_sxm" / "moe" / "vllm" / "0.25.0" / "moe_perf.parquet", data)
    with pytest.raises(OptionError, match=said):
        read_kernels(TableSource(folder))


def test_a_column_of_texts_is_no_number(folder):
    data = cases.columns(cases.rows())
    data["latency"] = [str(one) + "ms" for one in data["latency"]]
    cases.write(folder / "h200_sxm" / "moe" / "vllm" / "0.25.0" / "moe_perf.parquet", data)
    with pytest.raises(OptionError, match="latency holds something that is no number"):
        read_kernels(TableSource(folder))


@pytest.mark.parametrize("cut", [0, 100, -100])
def test_a_cut_file_is_refused(folder, cut):
    path = folder / "h200_sxm" / "moe" / "vllm" / "0.25.0" / "moe_perf.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(OptionError, match=r"0.25.0/moe_perf.parquet"):
        read_kernels(TableSource(folder))


def test_what_holds_no_tables_is_refused(tmp_path):
    with pytest.raises(OptionError, match="holds no kernel tables"):
        TableSource(tmp_path / "nothing")
    with pytest.raises(OptionError, match="has no table"):
        TableSource(tmp_path)
    (tmp_path / "no.whl").write_bytes(b"no wheel")
    with pytest.raises(OptionError, match="holds no kernel tables"):
        TableSource(tmp_path / "no.whl")
    group = cases.rows()
    cases.write_kernel(tmp_path, group.take(np.arange(30)))
    with pytest.raises(OptionError, match="no kernel of 500 rows"):
        read_kernels(TableSource(tmp_path))


def test_without_pyarrow_the_hint_says_what_to_install(folder, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(source_module.importlib, "import_module", missing)
    with pytest.raises(NoResultError, match="needs pyarrow") as told:
        read_kernels(TableSource(folder))
    assert told.value.hint == "pip install 'poise-moe[tables]'"


def test_exponents():
    assert alpha_of("balanced", "k") == 0 and alpha_of("power_law_1.01_eplb", "k") == 1.01
    assert alpha_of("power_law_2", "k") == 2


def run(*words):
    return CliRunner().invoke(app, ["calibrate", *map(str, words)])


MODEL = {
    "num_hidden_layers": 2, "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 4096, "moe_intermediate_size": 1536,
    "model_type": "qwen3_moe",
}  # fmt: skip


def test_the_command_writes_constants_of_all_kernels_and_no_row(folder, tmp_path):
    out = tmp_path / "machines.json"
    done = run("--from-tables", folder, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert list(data) == ["schema", "source", "sha256", "fitted", "kernels", "links"] and data["schema"] == 1
    assert [row["gpu"] for row in data["kernels"]] == ["h100", "h200"] and data["links"] == []
    assert all(row["error"] < 0.02 and row["rows"] == len(cases.rows().seconds_R) for row in data["kernels"])
    shown = run("--from-tables", folder, "-o", out)
    assert shown.exit_code == 0 and "vllm" in shown.output


def test_the_command_writes_a_cluster_file_of_one_model(folder, tmp_path):
    config, out = tmp_path / "config.json", tmp_path / "c.yaml"
    config.write_text(json.dumps(MODEL))
    done = run("--from-tables", folder, "--model", config, "--cluster", "2x8:h200", "-o", out)
    assert done.exit_code == 0, done.output
    text = out.read_text()
    data = yaml.safe_load(text)
    assert data["devices_per_node"] == [8, 8] and data["preset"] == "h200" and "links" not in data
    assert data["kernel"]["read_factor"] == pytest.approx(1.2, rel=0.05) and data["kernel"]["type"] == "bf16"
    assert text.startswith("# poise calibrate --from-tables") and "sha256" in text.splitlines()[0]
    assert run("--from-tables", folder, "--model", config, "--gpu", "h200", "-o", out).exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-o", "c.yaml"], 2, "constants of all kernels"),
        (["--model", "MODEL", "-o", "c.json"], 2, "a cluster file"),
        (["--model", "MODEL", "-o", "c.yaml"], 2, "which GPU"),
        (["--model", "MODEL", "--gpu", "abacus", "-o", "c.yaml"], 2, "no GPU 'abacus'"),
        (["--model", "MODEL", "--gpu", "b200", "-o", "c.yaml"], 1, "no vllm kernel on b200"),
        (["--model", "MODEL", "--gpu", "h200", "--library", "deepep-ll", "-o", "c.yaml"], 1, "no all-to-all deepep-ll"),
    ],
)
def test_what_the_tables_cannot_give_is_refused(folder, tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    done = run("--from-tables", folder, *["config.json" if word == "MODEL" else word for word in words])
    assert done.exit_code == code and said in " ".join(done.output.split()), done.output
    assert not (tmp_path / "c.yaml").exists() and not (tmp_path / "c.json").exists()
