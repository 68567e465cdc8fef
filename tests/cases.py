"""Cases that need several ranks, all in one launch: what the ranks run, and the test that reads what they wrote."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.launch import leave, torchrun


def read_options(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Names of cases, and the file that results go to."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def run_cases(cases: Mapping[str, Callable[[], Any]], given: argparse.Namespace, *, timeout_s: float = 60.0) -> None:
    """The ranks' side: every case, a line of JSON each; ends when a case fails on some ranks only."""
    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    for name in given.cases or cases:
        start, failed, result = time.time(), "", None
        try:
            result = cases[name]()
        except Exception:
            failed = traceback.format_exc()[-3000:]
        line = {"case": name, "rank": dist.get_rank(), "seconds": round(time.time() - start, 2)}
        if failed or dist.get_rank() == 0:
            with Path(given.out).open("a") as file:
                file.write(json.dumps({**line, "failed": failed, "result": result}) + "\n")
        flags: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(flags, bool(failed))
        if any(flags) and not all(flags):  # the others may still wait for this rank
            sys.exit(f"{name} failed on some ranks only: {flags}")
    leave()


def judge(script: str, cases: Collection[str], out: Path, subtests: Any, *, timeout: float = 300.0) -> None:
    """The test's side: one launch on four ranks (a fixture would run it on every worker), a subtest a case."""
    said = torchrun(4, script, "--out", str(out), check=False, timeout=timeout)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    passed = {line["case"] for line in lines if not line["failed"]}
    for case in cases:
        failed = [f"rank {line['rank']}: {line['failed']}" for line in lines if line["case"] == case and line["failed"]]
        with subtests.test(case):
            assert not failed, "\n".join(failed)
            assert case in passed, f"{case} did not run\n{said[-3000:]}"
