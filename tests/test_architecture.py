"""Imports go downwards only, in no circle, and PyTorch stays in runtime/, train/, serve/ and scripts that ranks run."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "src"
TORCH = ("poise.runtime", "poise.train", "poise.serve", "poise.emulate.probe", "poise.calibrate.compute", "poise.calibrate.links",
         "poise.calibrate.ranks", "poise.engines.dumps.torch_files")  # fmt: skip
PLUGINS = {f"poise.engines.plugins.{name}" for name in ("vllm_plugin", "sglang_plugin", "policy")}
LAYERS = [
    {"poise.compiled", "poise.errors", "poise.extras", "poise.files", "poise.room", "poise.words", "poise.version"}
    | {"poise.jsonfile", "poise.yamlfile", "poise.presets", "poise.curve", "poise.cluster", "poise.modelspec"}
    | {"poise.hfconfig"},
    {"poise.observe"},
    {"poise.cost"},
    {"poise.planning.placement", "poise.planning.problem", "poise.planning"},
    {"poise.planning.methods", "poise.planning.solve"},
    {"poise.policies"},
    {"poise.evaluate"},
    {"poise.control"},
    {"poise.runtime"},
    {"poise.train", "poise.serve"},
    {"poise.engines", "poise.calibrate", "poise.watch", "poise.api", "poise.cli", "poise"},
]


def layer_of(module: str) -> int:
    best = max((name for layer in LAYERS for name in layer if f"{module}.".startswith(f"{name}.")), key=len)
    return next(i for i, layer in enumerate(LAYERS) if best in layer)


def modules() -> dict[str, tuple[Path, ast.Module]]:
    out = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
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


def test_the_table_covers_the_package():
    assert len(MODULES) > 40
    for name in MODULES:
        layer_of(name)


def test_no_upward_import():
    for name, used in GRAPH.items():
        for other in used & set(MODULES):
            if layer_of(name) < len(LAYERS) - 1:
                assert layer_of(other) <= layer_of(name), f"{name} imports {other}, which lies above it"


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


def test_import_poise_is_free_of_torch():
    """Nor do its commands before they are asked for what needs it: it takes seconds, and may be missing or broken."""
    code = "import sys, poise.cli.main; "
    code += "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
