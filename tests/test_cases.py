"""A case that fails, hangs or ends a rank is that case's failure alone, and names what every rank left undone."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.cases import verdicts
from tests.files_written.support import wait_for
from tests.launch import Ranks

SCRIPT = "tests/broken_cases.py"


def part(text, rank, what):
    """What is said of one rank."""
    return text.partition(f"-- rank {rank}, {what}:\n")[2].partition("\n-- rank")[0]


def test_a_failure_on_all_ranks(tmp_path):
    found = verdicts(SCRIPT, ["fails_alike", "fine"], tmp_path, world=2)
    assert found["fails_alike"].count("ArithmeticError: on every rank") == 2 and found["fine"] == "", found


def test_a_rank_that_fails_ends_or_is_killed_alone(tmp_path):
    found = verdicts(SCRIPT, ["fails_on_one", "goes_away", "is_killed", "fine"], tmp_path, world=2, grace_s=1.0)
    one = found["fails_on_one"]
    assert "ArithmeticError: on one rank" in one and "did not end, did not end" in one
    assert "waiting  fails_on_one: recv 0 peer 0 tag 77 12 B" in part(one, 1, "left undone")
    assert "in fails_on_one" in part(one, 1, "stacks") and "in fails_on_one" not in part(one, 0, "stacks")
    assert "exit code 0, " in found["goes_away"] and "exit code -9, " in found["is_killed"]
    assert found["fine"] == "", found


def test_a_rank_that_is_silent(tmp_path):
    found = verdicts(SCRIPT, ["fine", "hangs_in_c", "fine_too"], tmp_path, world=2, limit_s=5.0)
    silent = found["hangs_in_c"]
    assert "in hangs_in_c" in part(silent, 0, "stacks")
    assert "hangs_in_c: all" in part(silent, 1, "left undone")
    assert found["fine"] == found["fine_too"] == "", found


def test_what_was_not_begun_in_time_has_not_passed(tmp_path):
    assert verdicts(SCRIPT, ["fine"], tmp_path, world=2, timeout=0.0) == {"fine": "did not run"}


def states(pid):
    """Of the threads of a process."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            found.append(path.read_text().rpartition(") ")[2][0])
    return found


def test_a_rank_that_has_ended_and_is_not_told_of_yet_does_not_wait(tmp_path):
    """What forked it is late: to take that for a rank that waits would end the launch."""
    with Ranks(1, SCRIPT, "--out", str(tmp_path / "results.jsonl"), "fine", folder=tmp_path) as ranks:
        (process,) = ranks.running
        parent = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()[1])
        os.kill(parent, signal.SIGSTOP)
        try:
            wait_for(lambda: states(process.pid) == ["Z"])
            assert ranks.codes() == [None] and not ranks.waiting()
        finally:
            os.kill(parent, signal.SIGCONT)
        assert process.wait(120) == 0
