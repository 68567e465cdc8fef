"""Names and options that others script against: a change here is a breaking change."""

import ast
import pickle
import tomllib
from pathlib import Path

import pytest

import poise
from poise.cli.main import VERBS, command

NAMES = {
    "METHODS", "Cluster", "InfeasibleError", "InputError", "LoadProfile", "ModelSpec", "NoResultError", "Placement",
    "PlacementProblem", "POLICIES", "PoiseError", "RoutingTrace", "Solution", "compare", "make_batch", "plan", "read", "solve",
    "verdict",
}  # fmt: skip
METHODS = {
    "contiguous", "round-robin", "lpt", "eplb", "eplb-global", "moetuner", "moetuner-equal", "exflow", "grace-moe",
    "coactivation", "swift-balance", "flash-lb", "exact", "exact-balance", "surplus-fill", "poise-stay", "poise",
}  # fmt: skip
POLICIES = {
    "expert-parallelism", "split", "lplb", "faster-moe", "smart-moe", "flex-moe", "hecate", "hecate-calibrated", "llep", "ultra-ep",
    "moon-ep", "full-replication", "poise", "poise-near",
}  # fmt: skip
TRAFFIC = {"--redundant", "--model", "--traffic", "--split", "--tokens-per-step", "--order", "--time-limit", "--seed"}
OPTIONS = {
    "demo": {"--html", "--output", "--domain", "--all", "--even", "--cluster", "--redundant", "--tokens-per-step", "--time-limit", "--work", "--json"},
    "bench": {"--list", "--only", "--data", "--method", "--fast", "--fast-over", "--work", "--output", "--compare", "--html", "--json"},
    "inspect": {"--executor", "--json"},
    "plan": TRAFFIC | {"--cluster", "--output", "--method", "--work", "--pooled", "--current", "--rank-map", "--migration-steps", "--risk",
                      "--survive", "--survive-cost", "--survive-copies",
                      "--verdict", "--engine", "--keep-groups", "--homes", "--executor", "--json"},
    "compare": TRAFFIC | {"--work", "--cluster", "--placement", "--fit", "--judge", "--html", "--fast", "--fast-over",
                         "--step-slots", "--predictor", "--steps", "--warm-up", "--engine", "--keep-groups", "--homes", "--what-if", "--executor", "--json"},
    "homes": {"--cluster", "--output", "--placement-out", "--redundant", "--model", "--traffic", "--split", "--engine", "--tokens-per-step",
              "--policy", "--band", "--time-limit", "--work", "--seed", "--json"},
    "machines": {"--json"},
    "verdict": {"--cluster", "--model", "--recipe", "--current", "--redundant", "--phase", "--tokens-per-step", "--prefill-tokens",
                "--decode-tokens", "--engine", "--split", "--context", "--homes", "--time-limit", "--work", "--seed", "--executor", "--output", "--html", "--json"},
    "breakeven": {"--cluster", "--model", "--placement", "--sizes", "--step-slots", "--skew", "--steps", "--traffic",
                  "--window-us", "--control-us", "--seed", "--json"},
    "watch": {"--cluster", "--placement", "--redundant", "--model", "--traffic", "--split", "--tokens-per-step", "--window",
              "--every", "--max-moves", "--false-alarm-rate", "--horizon", "--method", "--follow", "--interval", "--output",
              "--time-limit", "--seed", "--json", "--export", "--num-hidden-layers", "--listen", "--allow-host", "--metrics", "--metrics-window", "--sglang", "--dump-dir", "--api-key",
              "--admin-api-key", "--steps-per-dump", "--delete-dumps", "--restart-seconds"},
    "convert": {"--output", "--model", "--placement", "--format", "--num-experts", "--top-k", "--zero-experts", "--relabelling",
                "--devices", "--ranks", "--allow-missing-ranks", "--counters", "--executor", "--json"},
    "verify": {"--model", "--traffic", "--recorded", "--tolerance", "--against", "--error-rate", "--balancer-off", "--ranks",
               "--allow-missing-ranks", "--json"},
    "diff": {"--model", "--cluster", "--staging", "--rank-map", "--lost", "--json"},
    "export": {"--to", "--output", "--model", "--num-hidden-layers", "--num-mtp-layers", "--model-class", "--checkpoint", "--keep-groups", "--losses", "--json"},
    "record": {"--output", "--max-new-tokens", "--max-prompt-tokens", "--requests-per-domain", "--batch-size",
               "--temperature", "--seed", "--json"},
    "calibrate": {"--output", "--model", "--hidden", "--inner", "--matrices", "--curve", "--dilation", "--seconds",
                  "--repeats", "--quick", "--find-nic", "--device", "--cluster", "--json", "--from-tables", "--gpu", "--engine",
                  "--type", "--library"},
}  # fmt: skip


def test_public_names():
    assert set(poise.__all__) == NAMES and len(NAMES) <= 20
    assert all(hasattr(poise, name) for name in NAMES)


def test_names_are_imported_when_asked_for():
    """As if they were imported: for dir, from-star, pickle, type checkers, and for what is not there."""
    assert set(dir(poise)) >= NAMES | {"__version__"}
    got = {}
    exec("from poise import *", got)
    assert {name: got[name] for name in NAMES} == {name: getattr(poise, name) for name in NAMES}
    cluster = poise.Cluster.parse("1x2")
    assert type(pickle.loads(pickle.dumps(cluster))) is poise.Cluster
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = poise.no_such_name
    checked = next(node for node in ast.walk(ast.parse(Path(poise.__file__).read_text())) if isinstance(node, ast.If))
    assert {a.name: node.module for node in checked.body for a in node.names} == poise._MODULE_OF


def test_one_version():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert poise.__version__ == project["version"]


def test_methods():
    assert set(poise.METHODS) == METHODS


def test_policies():
    assert set(poise.POLICIES) == POLICIES


def test_verbs_and_options():
    found = {
        name: {option for p in command(name).params for option in p.opts if option.startswith("--")} - {"--help"}
        for name in VERBS
    }
    assert found == OPTIONS


def test_every_verb_teaches():
    """At length, and in one line of the list of all."""
    for name, line in VERBS.items():
        assert len(command(name).help) > 60 and line.endswith(".") and len(line) <= 60
