"""A plugin that writes what each test took of the processors, with all that it started: ranks, planners, commands.

    mkdir /sys/fs/cgroup/cpuacct/NAME && echo $$ > /sys/fs/cgroup/cpuacct/NAME/tasks
    PROCESSOR_SECONDS=out.jsonl python -m pytest -p tests.processor_seconds -n 1 -q
    python -m tests.processor_seconds out.jsonl

Wall time says little on a busy machine, and ranks are children of no test. So it is the account of the control group (version 1
or 2) that pytest was started in, with nothing else in it and one worker; a line of JSON is written for each test.
"""

from __future__ import annotations

import collections
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


def account() -> Path:
    """The file of this process's control group that counts."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if "cpuacct" in names.split(","):
            return ROOT / "cpuacct" / path.lstrip("/") / "cpuacct.usage"
        if not names and (ROOT / path.lstrip("/") / "cpu.stat").exists():
            return ROOT / path.lstrip("/") / "cpu.stat"
    raise pytest.UsageError(
        "no control group counts this process's seconds: see the first lines of tests/processor_seconds.py"
    )


def seconds(file: Path) -> float:
    """So far."""
    text = file.read_text()
    return int(text) / 1e9 if text.strip().isdigit() else int(text.split()[1]) / 1e6


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Set up, call and tear down."""
    file = account()
    before = seconds(file)
    yield
    with Path(os.environ["PROCESSOR_SECONDS"]).open("a") as out:
        out.write(json.dumps([item.nodeid, round(seconds(file) - before, 4)]) + "\n")


def main(path: str, shown: int = 60) -> None:
    """The longest files and tests."""
    spent = [tuple(json.loads(line)) for line in Path(path).read_text().splitlines()]
    for part in (lambda node: node.partition("::")[0], lambda node: node.partition("[")[0]):
        of: collections.Counter[str] = collections.Counter()
        for node, took in spent:
            of[part(node)] += took
        print("\n".join(f"{took:8.2f} {name}" for name, took in of.most_common(shown)), "\n")
    print(f"{sum(took for _, took in spent):8.2f} in all, {len(spent)} tests")


if __name__ == "__main__":
    main(*sys.argv[1:2])
