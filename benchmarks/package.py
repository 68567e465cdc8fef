"""The package as others get it: built, checked, and used from its wheel in environments of its own.

Usage: python benchmarks/package.py [--no-extra | --extra NAME ...] [--python PATH ...]

Builds the source archive and, from that, the wheel; both pass ``twine check --strict``. Then for each interpreter (default:
python3.11, 3.12 and 3.13 as far as they are on the path) an environment with the core alone, and with this one for each
extra one more (default: watch, tables, dask; ray and torch are gigabytes, and asked for by name). In each the commands and
entry points run, away from the repository. Exits with 1 if one fails, and with 0 and a word where no index can be reached.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("python3.11", "python3.12", "python3.13")
EXTRAS = ("watch", "tables", "dask")
MOST_MB = 500
"""Megabytes (MiB) that the core may take with all that it needs."""
CORE = """
import subprocess, sys, tempfile
from importlib.metadata import entry_points, metadata
from importlib.resources import files
from pathlib import Path

import poise

assert (files("poise") / "py.typed").is_file()
about = metadata("poise-moe")
assert about["Version"] == poise.__version__ and "](docs/" not in about.get_payload(), "a link that an index cannot show"
for group, loaded in (("vllm.general_plugins", 1), ("sglang.srt.plugins", 1)):
    found = [one for one in entry_points(group=group) if one.name == "poise"]
    assert len(found) == loaded
    for one in found:
        one.load()()  # wanted by no variable: it does nothing
heavy = {"numba", "scipy", "torch"} & set(sys.modules)
assert not heavy, heavy
trace = str(files("poise") / "data" / "demo_trace.npz")
poise_command = str(Path(sys.executable).with_name("poise"))
with tempfile.TemporaryDirectory() as folder:
    for words in (
        [poise_command, "--version"], [poise_command, "-h"], [sys.executable, "-m", "poise", "inspect", trace, "--json"],
        [poise_command, "plan", trace, "-c", "1x4:h100", "-r", "4", "--work", "1", "--no-verdict", "-o", "p.npz"],
        [poise_command, "export", "p.npz", "--to", "sglang", "--num-hidden-layers", "8", "-o", "e.json"],
        [poise_command, "compare", trace, "-c", "1x4:h100", "-p", "contiguous", "-p", "eplb", "--steps", "2", "--html", "r.html"],
    ):
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)
    assert (Path(folder) / "e.json").stat().st_size and (Path(folder) / "r.html").stat().st_size
    refused = subprocess.run([poise_command, "record", "m", "p.jsonl", "-o", "t.npz"], cwd=folder, capture_output=True, text=True)
    torch = __import__("importlib.util").util.find_spec("torch") is not None
    assert torch or (refused.returncode == 1 and "poise-moe[torch]" in refused.stderr), refused.stderr
"""
OF_EXTRA = {
    "": "import importlib.util\nassert importlib.util.find_spec('torch') is None",
    "watch": "import prometheus_client\nfrom poise.watch.metrics import Metrics\nMetrics()",
    "tables": "import pyarrow.parquet\nimport poise.lab.calibrate.tables.source",
    "dask": "from poise.util.executors import executor_of\n"
    "if __name__ == '__main__':\n    with executor_of('dask://local:1') as e:\n        assert e.submit(abs, -1).result() == 1",
    "ray": "from poise.util.executors import executor_of\nwith executor_of('ray://local:1') as e:\n    assert e.submit(abs, -1).result() == 1",
    "device": "from poise.runtime.device.choose import kernels_for",
    "docs": "import material, mkdocstrings",
    "torch": "import poise.train, poise.serve, poise.runtime.capture",
}
"""What each extra is for, used."""


def quiet(*words: str | Path, cwd: Path | None = None) -> None:
    """Run a command; what it prints is shown if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "POISE"))}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise SystemExit(f"FAILED with {done.returncode}: {' '.join(map(str, words))[:200]}\n{done.stdout[-4000:]}")


def environment(python: str | Path, folder: Path) -> Path:
    """A new one; its interpreter."""
    quiet(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def megabytes(folder: Path) -> float:
    """What its files take, compiled ones aside, which come with use."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc") / 2**20


def build(work: Path) -> Path:
    """The wheel, from the source archive; both checked."""
    python = environment(sys.executable, work / "tools")
    done = subprocess.run([python, "-m", "pip", "install", "-q", "build", "twine", "hatchling"], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True)  # fmt: skip
    if done.returncode:
        print(f"skipped: no index gives the tools that build ({done.stderr.strip().splitlines()[-1][:200]})")
        raise SystemExit(0)
    quiet(python, "-m", "build", "--no-isolation", "-o", work / "dist", ROOT)
    quiet(python, "-m", "twine", "check", "--strict", *sorted((work / "dist").iterdir()))
    (wheel,) = (work / "dist").glob("*.whl")
    print(f"built {wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB; twine has nothing to say", flush=True)
    return wheel


def use(wheel: Path, python: str, extra: str, work: Path) -> None:
    """Install and run."""
    name = f"{Path(python).name}-{extra or 'core'}"
    folder = work / name
    inside = environment(python, folder)
    quiet(inside, "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt",
          f"poise-moe{f'[{extra}]' * bool(extra)} @ {wheel.as_uri()}")  # fmt: skip
    size = megabytes(folder)
    if not extra and size > MOST_MB:
        raise SystemExit(f"FAILED: the core takes {size:.0f} MiB, {MOST_MB} at most")
    for number, code in enumerate((CORE, OF_EXTRA[extra])):
        script = work / f"{name}-{number}.py"
        script.write_text(code)
        quiet(inside, script, cwd=work)
    print(f"{name}: fine, {size:.0f} MiB", flush=True)
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--extra", action="append", choices=[name for name in OF_EXTRA if name], help="repeat; default: the light ones"
    )
    parser.add_argument("--no-extra", action="store_true", help="the core alone")
    parser.add_argument("--python", action="append", help="repeat; default: those on the path")
    options = parser.parse_args()
    pythons = options.python or [found for name in PYTHONS if (found := shutil.which(name))] or [sys.executable]
    extras = () if options.no_extra else options.extra or EXTRAS
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        wheel = build(work)
        for python in pythons:
            use(wheel, python, "", work)
        for extra in extras:
            use(wheel, pythons[0], extra, work)


if __name__ == "__main__":
    main()
