"""Why megatron-core is no row on a CPU: the lines of its wheel that ask for a CUDA device where nothing is chosen.

    pip download --no-deps --python-version 3.12 --only-binary :all: megatron-core==0.19.2
    python benchmarks/peer/megatron.py megatron_core-0.19.2-*.whl

Prints ``file:line statement`` for each; exits with 1 if one is not there any more, as then it may run.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from pathlib import Path

FOLDER = "megatron/core/transformer/moe"
STOPS = (
    ("router.py", "gating", "torch.cuda.current_device"),
    ("token_dispatcher.py", "__init__", "torch.cuda.Stream"),
)
"""File, function, and what it calls: the router's forward pass on weights that lie on the CPU, and the constructor of the
all-to-all dispatcher."""


def calls(source: str, function: str, called: str) -> list[int]:
    """Lines in functions of a name at which something is called."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            out += [
                one.lineno for one in ast.walk(node) if isinstance(one, ast.Call) and ast.unparse(one.func) == called
            ]
    return sorted(out)


def main() -> int:
    missing = 0
    with zipfile.ZipFile(Path(sys.argv[1])) as wheel:
        for file, function, called in STOPS:
            source = wheel.read(f"{FOLDER}/{file}").decode("utf-8")
            found = calls(source, function, called)
            missing += not found
            lines = source.splitlines()
            for line in found:
                print(f"{file}:{line} {lines[line - 1].strip()}")
            if not found:
                print(f"{file}: {function} calls no {called}: it may run on a CPU now")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
