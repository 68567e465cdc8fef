"""What others get: metadata, the README of an index, papers beside the code. Built and used: benchmarks/package.py."""

import re
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from benchmarks.package import CORE, EXTRAS, OF_EXTRA
from benchmarks.slices import pieces

import poise

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture
def hook(monkeypatch):
    """hatch_build.py, without hatchling."""
    plugin = ModuleType("hatchling.metadata.plugin.interface")
    plugin.MetadataHookInterface = object
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    spec = spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_index_shows_no_link_that_it_cannot_follow(hook):
    text = "a\n\n![b](docs/c.png)\n\n[d](docs/e.md#f), [![g](h.svg)](i.md), [j](https://k/l), [m](#n) and x[0](1)"
    assert hook.for_index(text) == "a\n\nd, , [j](https://k/l), [m](#n) and x0"
    whole = hook.for_index(text, "https://host/o/p/")
    assert (
        "![b](https://host/o/p/raw/HEAD/docs/c.png)" in whole and "[d](https://host/o/p/blob/HEAD/docs/e.md#f)" in whole
    )
    readme = hook.for_index((ROOT / "README.md").read_text("utf-8"))
    assert not re.search(r"\]\((?!https?://|#)", readme) and len(readme) > 1000


def test_the_hook_is_what_the_build_takes(hook):
    metadata: dict = {"urls": {"Source": "https://host/o/p"}}
    made = hook.ReadmeHook()
    made.root = str(ROOT)
    made.update(metadata)
    assert metadata["readme"]["content-type"] == "text/markdown" and "https://host/o/p/" in metadata["readme"]["text"]
    assert PROJECT["dynamic"] == ["readme"] and "readme" not in PROJECT


def test_types_and_versions_are_said():
    assert (Path(poise.__file__).parent / "py.typed").is_file() and "Typing :: Typed" in PROJECT["classifiers"]
    said = {one.rsplit(" ", 1)[1] for one in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", one)}
    assert said == {"3.11"}, "what was run"
    assert PROJECT["requires-python"] == ">=3.11"
    assert not [one for one in PROJECT["classifiers"] if "License ::" in one], (
        "the licence is an expression, and index refuse both"
    )


def test_the_core_has_no_pytorch():
    needs = {re.split(r"[><=\[ ]", one)[0] for one in PROJECT["dependencies"]}
    assert not needs & {"torch", "transformers", "accelerate", "safetensors"}
    assert set(OF_EXTRA) - {""} == set(PROJECT["optional-dependencies"]) - {"dev", "all"} and set(EXTRAS) <= set(
        OF_EXTRA
    )
    compile(CORE, "core", "exec")
    for code in OF_EXTRA.values():
        compile(code, "extra", "exec")


def test_the_package_is_built_and_used_on_some_day():
    assert [piece.words for piece in pieces() if "benchmarks/package.py" in piece.words] == [("benchmarks/package.py",)]


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (
        cited["version"] == poise.__version__
        and cited["title"].startswith("poise")
        and cited["license"] == PROJECT["license"]
    )
    assert {"cff-version", "message", "authors", "type"} <= set(cited) and cited["authors"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "docs/install.md"])
def test_pages_name_files_that_are_there(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", path.read_text("utf-8"))
    named = re.findall(r"`((?:src|tests|benchmarks|docs|examples)/[\w./-]+)`", path.read_text("utf-8"))
    assert links + named and not [link for link in links if not (path.parent / link).exists()]
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def test_the_changelog_tells_of_this_version():
    assert f"## {poise.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
