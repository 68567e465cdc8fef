"""What the emulation tests need of the machine, and what they look at on it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from poise.lab.emulate import network

HERE = Path(__file__).parent
REASON = network.why_not()
shaping = pytest.mark.skipif(bool(REASON), reason=f"links cannot be shaped here: {REASON}")


def interfaces() -> set[str]:
    """Names of this namespace's interfaces, and its namespaces by name, and its queueing disciplines."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout.splitlines()
    queues = subprocess.run(["tc", "qdisc"], capture_output=True, text=True).stdout.splitlines()
    named = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
    return {line.split(":")[1].strip() for line in links} | set(queues) | set(named)


def processes_with(word: str) -> list[int]:
    """Processes, of any PID namespace, that have a word in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and word in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def descendants(pid: int) -> set[tuple[int, str]]:
    """Processes that a process started, and those they started: number and network namespace."""
    parent, space = {}, {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit():
                parent[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                space[int(folder.name)] = os.readlink(folder / "ns" / "net")
        except OSError:
            continue
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, of in parent.items() if of in found} - found
    return {(one, space[one]) for one in found - {pid} if one in space}


def net_namespaces() -> set[str]:
    """Network namespaces that any process of this machine lives in."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit():
                found.add(os.readlink(folder / "ns" / "net"))
        except OSError:
            continue
    return found
