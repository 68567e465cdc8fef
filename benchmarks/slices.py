"""``make test-all`` in pieces of about seven minutes on two cores; CI runs one a day, so that all are run in some weeks.

Usage: python benchmarks/slices.py [--date 2026-11-29 | --piece NAME | --all | --list]

The piece of a day is its number (UTC) modulo the pieces. Exits with 1 if a command of a piece fails or takes longer
than an hour, which is no measure of this machine: a piece that hangs ends.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 3600.0
PROBLEMS = 10_000
PARTS = 4
"""Pieces of :data:`MANY`."""
MANY = (
    "tests/control/test_moves.py", "tests/control/test_payback.py", "tests/control/test_peers.py", "tests/cost/test_bound_compute.py", "tests/cost/test_bounds.py",
    "tests/cost/test_entries.py", "tests/cost/test_method_bounds.py", "tests/cost/test_quota.py", "tests/planning/test_joint.py", "tests/routing/test_homes.py",
    "tests/planning/test_home_tables.py", "tests/planning/test_slots_filled.py", "tests/stepwise/test_poise_near.py",
    "tests/engines/test_readers_hostile.py", "tests/engines/test_explain.py", "tests/routing/test_files.py", "tests/planning/test_robust.py",
    "tests/planning/test_search.py", "tests/train/test_parity.py", "tests/train/test_checkpoint_folders.py",
    "tests/lab/calibrate/test_run.py", "tests/control/test_drift.py", "tests/serve/test_losses.py",
    "tests/runtime/device/test_mirror.py", "tests/runtime/device/test_kernels.py",
    "tests/planning/test_groups.py", "tests/watch/test_effect.py", "tests/test_cookbook.py",
    "tests/control/test_controller.py", "tests/engines/test_round_trip.py", "tests/files_written/test_signals.py", "tests/test_extend.py",
    "tests/lab/emulate/test_rates.py", "tests/watch/test_unbreakable.py", "tests/test_executors.py", "tests/train/test_elastic.py",
    "tests/cli/test_demo_compiles.py", "tests/cli/test_interrupt.py", "tests/routing/test_large.py", "tests/train/test_titan.py",
    "tests/cli/test_watch.py", "tests/cli/test_read_only.py", "tests/stepwise/test_driver.py", "tests/runtime/device/test_layer.py",
)  # fmt: skip
"""Files whose random examples, cases or tests are few in ``make test`` (tests/helpers.few_or, many_only)."""


def properties() -> list[str]:
    """The other files with properties, which are tried on a fifth of their random examples in ``make test`` (tests/conftest.py)."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [str(path.relative_to(ROOT)) for path in files if "from hypothesis import" in path.read_text("utf-8")]
    return [file for file in found if file not in MANY]


CASES = ("tests/train/test_support.py", "tests/train/test_runs.py", "tests/serve/test_serve.py", "tests/train/test_foresight.py",
         "tests/train/test_muon.py", "tests/train/test_options.py", "tests/runtime/test_flows.py")  # fmt: skip
"""Files whose cases run on several processes, and do less in ``make test``."""


@dataclass(frozen=True)
class Piece:
    """A command of this interpreter, with words that the environment gets."""

    name: str
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def pieces() -> list[Piece]:
    """All of them; new ones at the end."""
    half = PROBLEMS // 2
    parity = ["2", "4/2+0", "4/2+1", *(f"8/4+{first}" for first in range(4)), "steady"]
    parity += [f"4/2+{first}:float32" for first in range(2)]
    return [
        *(
            Piece(f"engine-rules-{first}", ("benchmarks/engine_rules.py", str(half), str(first)))
            for first in (0, half)
        ),
        *(Piece(f"parity-{word}", ("benchmarks/parity.py", word)) for word in parity),
        Piece("watch-soak", ("benchmarks/watch_soak.py", "--minutes", "1", "--no-report")),
        # a third of a gigabyte each: not fetched is a skip, which the summary shows
        Piece("older-engines", ("-m", "pytest", "-q", "tests/engines/test_vllm_plugin.py"), {"POISE_WHEELS": "1", "CI": ""}),
        Piece("families", ("-m", "pytest", "-q", "-rP", "tests/hfconfig/test_sweep.py"), {"POISE_FAMILIES": "1"}),
        *(Piece(f"parity-4/2+{first}:bfloat16", ("benchmarks/parity.py", f"4/2+{first}:bfloat16")) for first in range(2)),
        *(Piece(f"properties-{first}", ("-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *properties()[first::2]),
                {"POISE_MANY": "1"}) for first in range(2)),
        Piece("package", ("benchmarks/package.py",)),
        Piece("gpu-interpreted", ("benchmarks/gpu.py", "--no-report"), {"TRITON_INTERPRET": "1"}),
        *(Piece(f"parity-{word}", ("benchmarks/parity.py", word))
          for word in (f"4/2+{first}:gathered-{sent}" for sent in ("bfloat16", "float8_e4m3fn") for first in range(2))),
        *(Piece(f"many-examples-{first}", ("-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *MANY[first::PARTS]),
                {"POISE_MANY": "1"}) for first in range(PARTS)),
        # every support case, with the parity matrix's five steps; serving by every data flow with every placement
        *(Piece(f"many-steps-{number}", ("-m", "pytest", "-q", *files), {"POISE_MANY": "1"})
          for number, files in enumerate((CASES[:1], CASES[1:]))),
    ]  # fmt: skip


def of_day(date: datetime.date) -> Piece:
    """The piece of a date."""
    every = pieces()
    return every[date.toordinal() % len(every)]


def run(piece: Piece, limit_s: float = LIMIT_S) -> bool:
    """Whether it went well; says so, and how long it took."""
    print(f"piece {piece.name}: {' '.join(piece.words)}", flush=True)
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **piece.environment}
    process = subprocess.Popen([sys.executable, *piece.words], cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit_s)
        how = "fine" if code == 0 else f"FAILED with {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        how = f"FAILED: not over after {limit_s:.0f} s"
    print(f"piece {piece.name}: {how}, {time.monotonic() - began:.0f} s", flush=True)
    return how == "fine"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--date", type=datetime.date.fromisoformat, default=datetime.datetime.now(datetime.UTC).date())
    which.add_argument("--piece", choices=[piece.name for piece in pieces()], metavar="NAME")
    which.add_argument("--all", action="store_true")
    which.add_argument("--list", action="store_true")
    options = parser.parse_args()
    every = pieces()
    if options.list:
        print("\n".join(f"{piece.name}: {' '.join(piece.words)}" for piece in every))
        return 0
    if options.all:
        chosen = every
    elif options.piece:
        chosen = [piece for piece in every if piece.name == options.piece]
    else:
        chosen = [of_day(options.date)]
        print(f"piece of {options.date}, one of {len(every)} (benchmarks/slices.py --piece {chosen[0].name})")
    failed = [piece.name for piece in chosen if not run(piece)]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
