"""Cases that need several ranks, many in one launch: what the ranks run, and the test that reads what they wrote.

A case that fails, hangs, or ends a rank is that case's failure alone: its launch is over, with what every rank did last
and the stacks of its threads, and the cases after it run in a new one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests import journal, proven
from tests.launch import Ranks, leave

DELAYS = "POISE_TEST_DELAYS"
"""Names the seed of :func:`tests.journal.delay` to the ranks."""
START_S = 120.0
"""What a launch may take until its first case, beside a case's own limit: imports, on a busy machine."""
MOST_LAUNCHES = 8
LAST = 12
"""Operations of a rank that are shown of those that are done."""


def read_options(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Names of cases, and the file that results go to."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def run_cases(cases: Mapping[str, Callable[[], Any]], given: argparse.Namespace, *, timeout_s: float = 60.0) -> None:
    """The ranks' side: every case, a line of JSON when all ranks are done with it; ends after one that failed."""
    out, rank, world = Path(given.out), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    book = journal.keep(out.with_suffix(f".rank-{rank}"))
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", "experts of a list: one that gets no token")
    proven.remember()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    if os.environ.get(DELAYS):
        journal.delay(int(os.environ[DELAYS]))

    def write(**line: Any) -> None:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    for name in given.cases or cases:
        book.case, start, spent, failed, result = name, time.time(), time.process_time(), "", None
        try:
            result = cases[name]()
        except Exception:
            failed = traceback.format_exc()[-3000:]
            write(case=name, rank=rank, failed=failed)
        told: list[bool] = [False] * world
        dist.all_gather_object(told, bool(failed))
        if rank == 0:
            seconds = {"seconds": round(time.time() - start, 2), "cpu": round(time.process_time() - spent, 2)}
            write(case=name, ended=True, **seconds, result=result)
        if any(told):  # what it has left undone is not for the next case to find out
            break
    leave()


def verdicts(
    script: str, cases: Collection[str], folder: Path, *, world: int = 4, limit_s: float = 180.0,
    grace_s: float = 5.0, timeout: float = 1500.0, env: Mapping[str, str] | None = None,
) -> dict[str, str]:  # fmt: skip
    """What is wrong with every case, "" where nothing is; as many launches as it takes.

    Parameters
    ----------
    script : calls :func:`run_cases`.
    limit_s : of a case: longer than operations of its groups wait.
    grace_s : the others may wait so long when a rank has failed or ended: they may be about to say the same.
    timeout : seconds for all launches; cases that were not begun by then have not passed.
    """
    todo, found, until = list(cases), dict.fromkeys(cases, "did not run"), time.monotonic() + timeout
    for number in range(MOST_LAUNCHES):
        if not todo or time.monotonic() > until:
            break
        place = folder / f"launch-{number}"
        place.mkdir(parents=True)
        ended, wrong = _launch(world, script, todo, place / "results.jsonl", limit_s, grace_s, until, env)
        found.update(ended)
        if wrong and len(ended) < len(todo):
            found[todo[len(ended)]] = wrong
        todo = todo[len(ended) + bool(wrong) :]
    return found


def _launch(
    world: int, script: str, cases: list[str], out: Path, limit_s: float, grace_s: float, until: float,
    env: Mapping[str, str] | None,
) -> tuple[dict[str, str], str]:  # fmt: skip
    """One launch: what is wrong with each case that all ranks were done with; and with the one amid which it ended."""
    with Ranks(world, script, "--out", str(out), *cases, folder=out.parent, env=env) as ranks:
        seen, since, trouble = 0, time.monotonic() + START_S, 0.0
        while any(code is None for code in ranks.codes()):
            time.sleep(0.1)
            lines, now = _lines(out), time.monotonic()
            ended = sum("ended" in line for line in lines)
            if ended > seen:
                seen, since, trouble = ended, now, 0.0
            done = ended == len(cases)
            alone = any(code is not None for code in ranks.codes()) or (
                not done and any(line["case"] == cases[ended] for line in lines)
            )
            trouble = (trouble or now) if alone and ranks.waiting() else 0.0
            if now - since > limit_s or now > until or (trouble and now - trouble > grace_s):
                if done:  # nothing is left but to end
                    break
                ranks.stacks([out.with_suffix(f".stacks-{rank}") for rank in range(world)])
                break
        codes = ranks.codes()
    lines = _lines(out)
    names = [line["case"] for line in lines if "ended" in line]
    failed = {name: "\n".join(_failures(lines, name)) for name in names}
    if len(names) == len(cases) or (names and failed[names[-1]]):
        return failed, ""
    case = cases[len(names)]
    told = [f"exit code {code}" if code is not None else "did not end" for code in codes]
    return failed, "\n".join([
        f"{case} was not done on all ranks: {', '.join(told)}", *_failures(lines, case),
        *(_last_of(out, rank, ranks.said(rank)) for rank in range(world)),
    ])  # fmt: skip


def _lines(out: Path) -> list[dict[str, Any]]:
    """What the ranks have written; the last line may be on its way."""
    text = out.read_text() if out.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _failures(lines: list[dict[str, Any]], case: str) -> list[str]:
    return [f"rank {line['rank']}: {line['failed']}" for line in lines if line["case"] == case and "failed" in line]


def _last_of(out: Path, rank: int, said: str) -> str:
    """What a rank left undone, did last, printed, and where its threads are."""
    book, stacks = out.with_suffix(f".rank-{rank}"), out.with_suffix(f".stacks-{rank}")
    undone, done = journal.read(book)
    parts = {"left undone": undone[-2 * LAST :], "done before": done[-LAST:], "said": said.splitlines()[-LAST:],
             "stacks": stacks.read_text().splitlines()[-120:] if stacks.exists() else []}  # fmt: skip
    return "\n".join(f"-- rank {rank}, {name}:\n" + "\n".join(text) for name, text in parts.items() if text)


TOGETHER = 20
"""Cases of a launch where each is a test of its own."""


def chunks(names: Sequence[str]) -> list[list[str]]:
    """Cases that are launched together, in order."""
    return [list(names[first : first + TOGETHER]) for first in range(0, len(names), TOGETHER)]


class Launched:
    """Cases that are tests of their own: the first of some that is asked for launches those as well."""

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self._folder = folder
        self._found: dict[tuple[str, str], str] = {}

    def check(self, script: str, names: Sequence[str], name: str, **options: Any) -> None:
        """Assert that nothing is wrong with the case ``name``, one of those that are to be run."""
        if (script, name) not in self._found:
            together = next(chunk for chunk in chunks(names) if name in chunk)
            todo = together[together.index(name) :]  # the others may have been run by another worker
            found = verdicts(script, todo, self._folder(name), **options)
            self._found.update({(script, case): wrong for case, wrong in found.items()})
        wrong = self._found[script, name]
        assert not wrong, wrong


def judge(script: str, cases: Collection[str], folder: Path, subtests: Any, **options: Any) -> None:
    """The test's side: launches on four ranks (a fixture would run them on every worker), a subtest a case."""
    for case, wrong in verdicts(script, cases, folder, **options).items():
        with subtests.test(case):
            assert not wrong, wrong
