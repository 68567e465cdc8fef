"""Rooms import from lower rooms only, in no circle; PyTorch stays in runtime/, train/, serve/ and scripts that ranks run."""

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from poise.cli.main import VERBS

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
TORCH = ("poise.runtime", "poise.train", "poise.serve", "poise.lab.emulate.probe", "poise.lab.calibrate.compute",
         "poise.lab.calibrate.links", "poise.lab.calibrate.ranks", "poise.engines.dumps.torch_files")  # fmt: skip
PLUGINS = {f"poise.engines.plugins.{name}" for name in ("vllm_plugin", "sglang_plugin", "policy")}
OLD_NAMES = {"test_moved.py"}
ROOMS = ("version", "moved", "util", "machine", "routing", "cost", "planning", "stepwise", "replay", "simulate", "report", "control",
         "runtime", "serve", "train", "engines", "api", "bench", "watch", "lab", "cli")  # fmt: skip
"""From the ground up: docs/vocabulary.md says what lies in each. Every module is in one of them, or is ``poise`` itself, on top."""
MOST_ARGUMENTS = 8
ALIAS = re.compile("_?[A-Z][A-Za-z]*[a-z][A-Za-z]*")


def room_of(module: str) -> int:
    """Its number; KeyError for a module that no room has."""
    parts = module.split(".")
    if parts in (["poise"], ["poise", "__main__"]):
        return len(ROOMS)
    if parts[0] != "poise" or parts[1] not in ROOMS:
        raise KeyError(module)
    return ROOMS.index(parts[1])


def place_of(module: str) -> tuple[int, bool]:
    """Its room, and within planning whether it solves problems or says what they are."""
    return room_of(module), module.startswith(("poise.planning.methods", "poise.planning.solve"))


def modules() -> dict[str, tuple[Path, ast.Module]]:
    out = {}
    for path in SRC.rglob("*.py"):
        name = ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
        out[name] = (path, ast.parse(path.read_text("utf-8")))
    return out


def imports(tree: ast.AST, known: set[str]) -> set[str]:
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            out |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            out |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and arg.value in known}
    return out


MODULES = modules()
GRAPH = {name: imports(tree, set(MODULES)) for name, (_, tree) in MODULES.items()}
GRAPH["poise.cli.main"] |= {f"poise.cli.{name}" for name in VERBS}  # by names that are made when a verb is called
NAMES_MADE = {"poise", "poise.moved", "poise.cli.main", "poise.util.extras", "poise.util.executors",
              "poise.engines.plugins.sglang_hook", "poise.engines.plugins.vllm_call", "poise.engines.plugins.vllm_canary",
              "poise.engines.plugins.vllm_policy"}  # fmt: skip
"""Modules that import by a name which is no constant: those of :data:`GRAPH`, of what callers name, of other packages."""


def test_every_module_has_a_room():
    assert {name for name in MODULES if room_of(name) == len(ROOMS)} == {"poise", "poise.__main__"}
    with pytest.raises(KeyError):
        room_of("poise.somewhere")


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of what lies above, but those that :mod:`poise` makes when it is asked for a name."""
    return [f"{name} imports {other}, which lies above it" for name, used in graph.items() for other in used & set(MODULES)
            if place_of(other) > place_of(name)]  # fmt: skip


def test_no_upward_import():
    assert not upward(GRAPH)
    for low, high in itertools.pairwise(ROOMS):
        some = {room: next(name for name in MODULES if name.split(".")[1:2] == [room]) for room in (low, high)}
        assert upward({some[low]: {some[high]}}), "the test sees nothing"
    assert upward({"poise.planning.problem": {"poise.planning.solve.search"}})


def by_made_names(tree: ast.AST) -> list[ast.Call]:
    """Imports that the graph cannot see."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [(call, getattr(call.func, "attr", getattr(call.func, "id", ""))) for call in calls]
    return [call for call, name in named if name in ("import_module", "__import__")
            and not (call.args and isinstance(call.args[0], ast.Constant))]  # fmt: skip


def test_no_import_hides_from_the_graph():
    assert {name for name, (_, tree) in MODULES.items() if by_made_names(tree)} == NAMES_MADE
    assert by_made_names(ast.parse('importlib.import_module(f"poise.{x}")')) and not by_made_names(
        ast.parse('import_module("poise.api")')
    )
    assert "poise.cli.plan" in GRAPH["poise.cli.main"] and {f"poise.cli.{name}" for name in VERBS} <= set(MODULES)


def test_what_is_beside_the_package_uses_it_by_its_names_of_today():
    """Benchmarks, examples and tests import poise and not the other way round."""
    for folder in ("benchmarks", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            used = {
                module
                for module in imports(ast.parse(path.read_text("utf-8")), set(MODULES))
                if module.split(".")[0] == "poise"
            }
            assert path.name in OLD_NAMES or used <= set(MODULES), (path, used - set(MODULES))
    for name, used in GRAPH.items():
        assert not {module.split(".")[0] for module in used} & {"benchmarks", "examples", "tests"}, name


def test_no_cycle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        for other in GRAPH[name] & set(MODULES):
            visit(other, (*path, name))
        done.add(name)

    for name in GRAPH:
        visit(name, ())


def protocols(tree: ast.Module) -> list[str]:
    """Names of classes that are protocols."""
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
            and any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)]  # fmt: skip


def test_training_calls_one_way():
    """No module of it calls one that imports it: none has a protocol in place of a class that it may not import."""
    mine = {name: tree for name, (_, tree) in MODULES.items() if name.startswith(("poise.train", "poise.runtime"))}
    assert len(mine) > 30 and not {name: found for name, tree in mine.items() if (found := protocols(tree))}
    assert protocols(ast.parse("class Weights(Protocol): ...")) == ["Weights"], "the test sees nothing"


def class_names(trees: Iterable[tuple[str, ast.Module]]) -> dict[str, list[str]]:
    """Where each class and type alias is defined; a leading underscore makes no other word of a name."""
    out: dict[str, list[str]] = {}
    for module, tree in trees:
        names = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names += [t.id for t in targets if isinstance(t, ast.Name) and ALIAS.fullmatch(t.id)]
        for name in names:
            out.setdefault(name.lstrip("_"), []).append(f"{module}.{name}")
    return out


def test_no_class_name_occurs_twice():
    """One word a thing: a reader who meets a name knows which class it is."""
    found = class_names((name, tree) for name, (_, tree) in MODULES.items())
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
    two = [(f"poise.{number}", ast.parse(text)) for number, text in enumerate(("class Rows: ...", "_Rows = list[int]"))]
    assert class_names(two) == {"Rows": ["poise.0.Rows", "poise.1._Rows"]}, "the test sees nothing"


def unclear(module: str, tree: ast.Module) -> list[str]:
    """Compiled functions that others call without types that mypy could check, or that take too many things in a row."""
    out = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or not any(
            "compiled" in ast.unparse(one) for one in node.decorator_list
        ):
            continue
        given = node.args.args
        typed = node.returns is not None and all(arg.annotation is not None for arg in given)
        if len(given) > MOST_ARGUMENTS or not (typed or node.name.startswith("_")):
            out.append(f"{module}.{node.name}")
    return out


def test_compiled_functions_say_what_they_take():
    assert not [name for module, (_, tree) in MODULES.items() for name in unclear(module, tree)]
    many = ", ".join(f"a{number}" for number in range(MOST_ARGUMENTS + 1))
    bad = ast.parse(f"@compiled\ndef f(x): ...\n@compiled(nogil=True)\ndef _g({many}): ...\n@compiled\ndef _h(x): ...")
    assert unclear("m", bad) == ["m.f", "m._g"], "the test sees nothing"


def test_torch_stays_in_runtime():
    for name, used in GRAPH.items():
        if not name.startswith(TORCH):
            assert not {module.split(".")[0] for module in used} & {"torch", "transformers"}, name


def test_poise_is_never_imported_inside_a_function():
    """But by plugins, which engines load in every process, wanted or not."""
    for name, (_, tree) in MODULES.items():
        if name in PLUGINS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert not any(module.startswith("poise") for module in imports(node, set(MODULES))), name


HEAVY = {"torch", "transformers", "numba", "llvmlite", "scipy", "highspy", "asyncio", "multiprocessing"}
LISTING = (
    "from poise.cli import main\ntry:\n    main.app({words!r})\nexcept SystemExit as end:\n    assert not end.code"
)
INSPECT = ["inspect", str(SRC / "poise" / "data" / "demo_trace.npz"), "--json"]
RESOURCES = {"importlib.abc", "importlib.resources", "tempfile"}
"""What abstract finders and loaders come with."""
LOADED = {  # what is run -> heavy modules that are then there, and may not be
    "import poise": HEAVY | RESOURCES | {"numpy", "rich", "typer"},
    "import poise.cli.main": HEAVY | {"numpy", "rich"},
    LISTING.format(words=["--help"]): HEAVY | {"numpy", "rich", "poise.cli.plan"},
    LISTING.format(words=INSPECT): HEAVY | {"poise.api", "poise.cli.plan", "rich.table", "rich.progress"},
    "import poise.cli.plan, poise.cli.compare, poise.cli.watch": {"torch", "transformers"},
}


@pytest.mark.parametrize("code", LOADED, ids=["package", "command", "help", "inspect", "planning"])
def test_what_takes_seconds_is_loaded_by_what_needs_it(code):
    """It may also be missing or broken: PyTorch is none of the core's."""
    code += "\nimport sys; print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stderr.splitlines()[-1]))
    assert not loaded & LOADED[code.partition("\nimport sys; print")[0]]
    assert "poise.version" in loaded
