"""An environment of its own for each peer, made when it is first asked for and kept outside the checkout.

``$POISE_PEERS``, else ``~/.cache/poise/peers``, has a folder for each. Half-made ones are made anew. poise itself is not
installed in them: ranks import this checkout's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from peer.protocol import Peer

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0+cpu"
DONE = "poise-complete"
SPARE = 2.0
"""Times its size must be free: pip unpacks beside what it downloads."""


def folder(peer: Peer) -> Path:
    """Where it lies, made or not."""
    kept = os.environ.get("POISE_PEERS") or Path.home() / ".cache" / "poise" / "peers"
    return Path(kept) / peer.requirements[0].replace("==", "-")


def python(peer: Peer) -> Path:
    """Its interpreter."""
    return folder(peer) / "bin" / "python"


def made(peer: Peer) -> bool:
    return (folder(peer) / DONE).exists()


def make(peer: Peer) -> None:
    """Make it if it is not there; says first what that costs.

    Raises
    ------
    SystemExit : the disk has too little room, or pip fails.
    """
    if made(peer):
        return
    place = folder(peer)
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free / 1e9
    print(
        f"{' '.join(peer.requirements)} and {TORCH} are fetched and installed, about {peer.gigabytes:g} GB in {place} "
        f"({free:.0f} GB are free; POISE_PEERS names another place); once, some minutes", flush=True,
    )  # fmt: skip
    if free < SPARE * peer.gigabytes:
        raise SystemExit(f"{free:.1f} GB are free, {SPARE * peer.gigabytes:.1f} are wanted to install {peer.name}")
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [line.partition(">")[0] for line in project["dependencies"]]
    command = [str(python(peer)), "-m", "pip", "install", "-q", "--disable-pip-version-check", TORCH]
    try:
        subprocess.run([*command, *peer.requirements, *needed, "setuptools"], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"pip could not install {peer.name} (exit code {error.returncode}); where it does not find {TORCH}, set "
            "PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds"
        ) from error
    (place / DONE).touch()


def versions(peer: Peer) -> str:
    """Of the peer, PyTorch and transformers, as installed."""
    names = [peer.requirements[0].partition("==")[0], "torch", "transformers"]
    code = "import importlib.metadata as m, sys; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    return subprocess.run(
        [str(python(peer)), "-c", code, *names], check=True, capture_output=True, text=True
    ).stdout.strip()


def gigabytes(peer: Peer) -> float:
    """On disk."""
    return sum(path.lstat().st_size for path in folder(peer).rglob("*") if path.is_file()) / 1e9
