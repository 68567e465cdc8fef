"""YAML as YAML 1.2 and JSON have it: what two readers read differently is a text, or refused."""

import json
import math

import numpy as np
import pytest

from poise.engines.readers import read_dump
from poise.machine.cluster import Cluster
from poise.util.errors import ClusterError, TraceError
from poise.util.jsonfile import parse_json, read_json
from poise.util.yamlfile import dump_yaml, parse_yaml, read_yaml

AS_WRITTEN = {
    "12:30:00": "12:30:00", "1:30": "1:30", "1_000": "1_000", "0b11": "0b11", "yes": "yes", "no": "no", "on": "on",
    "off": "off", "Y": "Y", "2026-11-29": "2026-11-29", "<<": "<<", "=": "=", ".inf": ".inf", ".nan": ".nan", "1e": "1e",
    "0x1g": "0x1g", "1.2.3": "1.2.3", "+": "+", "'017'": "017", '"1"': "1", "1e9": 1e9, "1E-3": 1e-3, "-1.5": -1.5, ".5": 0.5,
    "1.": 1.0, "0": 0, "-0": 0, "+5": 5, "17": 17, "0o17": 15, "0x1F": 31, "true": True, "False": False, "null": None, "~": None,
    "": None, "9007199254740993": 9007199254740993,
}  # fmt: skip


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_scalars(text):
    got = parse_yaml(f"x: {text}\n".encode(), ClusterError)["x"]
    assert got == AS_WRITTEN[text] and type(got) is type(AS_WRITTEN[text])


REFUSED = {
    "017": "octal", "-007": "octal", "1e999": "beyond", "9" * 401: "401 characters", "&a [1]\ny: *a": "alias",
    "!!int '1:30'": "tag", "!!python/name:os.system": "tag", "1\nx: 2": "'x' appears twice", "{1: a, 0x1: b}": "twice",
    "{[1]: 2}": "key is a list", "[" * 40 + "]" * 40: "deeper than 32", "1\n---\ny: 2": "second document", "[1": "not YAML",
    "\x00": "not YAML", "\t- a": "not YAML",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text):
    with pytest.raises(ClusterError, match=REFUSED[text]) as caught:
        parse_yaml(f"x: {text}\n".encode(), ClusterError)
    assert len(caught.value.message) < 400


def test_a_bomb_and_a_flood_cost_little(tmp_path):
    bomb = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
        f"{y}: &{y} [{','.join([f'*{x}'] * 8)}]\n" for x, y in zip("abcdefg", "bcdefgh", strict=True)
    )
    with pytest.raises(TraceError, match="alias"):
        parse_yaml(bomb.encode(), TraceError)
    with pytest.raises(TraceError, match="more than 1048576 values"):
        parse_yaml(b"[" + b"1," * (1 << 20) + b"]", TraceError)
    with pytest.raises(TraceError, match="deeper"):
        parse_yaml(b"- " * 5000 + b"1", TraceError)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterError, match=r"c\.yaml"):
        read_yaml(tmp_path / "c.yaml", 100, ClusterError)


def test_what_is_written_is_read_back():
    rng = np.random.default_rng(0)
    texts = [*AS_WRITTEN, "017", "a: b", "x\n\x1b", " ", "#", "- a", "\u2028", "1e999", "é", "0o8", "null"]
    data = {
        "texts": texts, "numbers": [0, -1, 10**18, *(10 ** rng.uniform(-300, 300, 200)).tolist()], "flags": [True, None],
        **{text: 1 for text in texts},
    }  # fmt: skip
    back = parse_yaml(dump_yaml(data).encode(), ClusterError)
    assert parse_yaml(dump_yaml({"name": "a\udcff"}).encode(), ClusterError) == {"name": "a\\udcff"}
    assert back == data and [type(x) for x in back["numbers"]] == [type(x) for x in data["numbers"]]


@pytest.mark.parametrize("value", ["12:30:00", "1_000", "017", "yes", "'1e9'", "1e999", ".inf", "!!float 1"])
def test_no_reader_of_yaml_takes_them_for_numbers(tmp_path, value):
    """A cluster's and a map's: every file of others that is read as YAML."""
    (tmp_path / "c.yaml").write_text(f"devices_per_node: 2\nflops_per_s: {value}\n")
    with pytest.raises(ClusterError, match=r"c\.yaml|flops_per_s"):
        Cluster.parse(tmp_path / "c.yaml")
    (tmp_path / "m").write_text(f"num_slots: 2\ninitial_global_assignments:\n  1: [0, {value}]\n")
    with pytest.raises(TraceError):
        read_dump(tmp_path / "m")


def test_a_name_that_looks_like_a_number_stays_a_name(tmp_path):
    for name in ("1:30", "1e9", "017", "0o17", "yes", "null", "2026-11-29"):
        made = Cluster.uniform(1, 2)
        object.__setattr__(made, "name", name)
        (tmp_path / "c.yaml").write_text(made.to_yaml())
        assert Cluster.parse(tmp_path / "c.yaml").name == name


def test_json_is_as_strict(tmp_path):
    for text, why in (
        ('{"a": 1, "a": 2}', "'a' appears twice"), ("[NaN]", "NaN is no number"), ("[-Infinity]", "-Infinity"),
        ("[1e999]", "beyond"), ("[" * 100_000, "not JSON"), ("9" * 5000, "not JSON"), ("[1", "not JSON"), ("\ud800", "JSON"),
    ):  # fmt: skip
        with pytest.raises(TraceError, match=why):
            parse_json(text, TraceError)
    assert math.isinf(
        parse_json('{"time_step_limit": [0.0, Infinity]}', TraceError, infinite=True)["time_step_limit"][1]
    )
    (tmp_path / "a.json").write_text(json.dumps({"a": [1, 2.5, None]}))
    assert read_json(tmp_path / "a.json", 100, TraceError) == {"a": [1, 2.5, None]}
    (tmp_path / "b.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(TraceError, match=r"b\.json.*twice"):
        read_json(tmp_path / "b.json", 100, TraceError)
