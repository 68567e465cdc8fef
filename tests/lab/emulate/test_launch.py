"""Runs: what ranks are told, how they end, what is left behind."""

import io
import os
import random
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager

import pytest
from tests.lab.emulate.needs import HERE, descendants, interfaces, net_namespaces, processes_with, shaping

from poise.lab.emulate.launch import RankError, run
from poise.lab.emulate.spec import EmulatedCluster
from poise.util.errors import OptionError

REPORT = HERE / "report.py"
SPEC = EmulatedCluster(2, 2, 20e6, 10e6)
PATIENCE_S = 300.0
"""What comes at once on a quiet machine is waited for so long."""


def report(*args, **options):
    out, err = io.StringIO(), io.StringIO()
    return run(SPEC, REPORT, args, out=out, err=err, **options), out.getvalue(), err.getvalue()


@pytest.fixture
def token():
    """A word that only the ranks of one test have in their command line."""
    return uuid.uuid4().hex


@shaping
def test_every_rank_is_told_who_it_is_and_rank_0_streams_through():
    done, out, err = report()
    assert done.shaped and [rank.exit_code for rank in done.ranks] == [0] * 4
    for number, rank in enumerate(done.ranks):
        assert f"RANK={number} WORLD_SIZE=4 LOCAL_RANK={number % 2} LOCAL_WORLD_SIZE=2" in rank.stdout
        assert "GLOO_SOCKET_IFNAME=fab0 OMP_NUM_THREADS=1 MASTER_ADDR=10.77.0.1" in rank.stdout
        assert rank.stderr == f"rank {number} speaks\n"
    assert out == done.ranks[0].stdout and err == done.ranks[0].stderr


def test_ranks_run_on_the_interpreter_that_is_named(tmp_path):
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nOTHER=yes exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ.get('OTHER'), os.environ['RANK'])\n")
    for python, wanted in ((other, "yes"), (sys.executable, "None")):
        done = run(SPEC, script, python=python, out=io.StringIO())
        assert [rank.stdout.split() for rank in done.ranks] == [[wanted, str(rank)] for rank in range(4)]


@shaping
@pytest.mark.parametrize(
    "how, says", [("fail", "rank 2 of 4 ended with code 3"), ("die", "rank 2 of 4 was killed by signal 9")]
)
def test_a_failing_rank_ends_all_and_its_output_is_in_the_error(how, says, token):
    with pytest.raises(RankError, match=says) as caught:
        report(how, "2", token, timeout=600)  # ranks that nobody ends would sleep until then
    assert ("something broke here" if how == "fail" else "rank 2 speaks") in str(caught.value)
    assert [rank.exit_code for rank in caught.value.ranks] == [-9, -9, 3 if how == "fail" else -9, -9]
    assert not processes_with(token)


def test_ranks_that_may_die_end_nobody(empty_path):
    done, _, _ = report("gone", "2", may_die=(2,))
    assert [rank.exit_code for rank in done.ranks] == [0, 0, -9, 0]
    assert ["went on" in rank.stdout for rank in done.ranks] == [True, True, False, True]
    with pytest.raises(RankError, match="rank 2 of 4 was killed"):
        report("gone", "2", may_die=(1,))


@shaping
def test_a_hanging_rank_runs_out_of_time(token):
    for timeout in (1.5, 6.0, 24.0, 96.0):  # until the three others are over on a machine as busy as this one
        with pytest.raises(RankError, match=rf"[1-4] of 4 ranks still ran after {timeout:g} seconds") as caught:
            report("hang", "1", token, timeout=timeout)
        assert not processes_with(token)
        if "1 of 4 ranks" in str(caught.value):
            break
    assert "rank 1 speaks" in str(caught.value) and "rank 0 speaks" not in str(caught.value)


def test_wrong_input_is_refused():
    with pytest.raises(OptionError, match="no script"):
        run(SPEC, HERE / "none.py")
    with pytest.raises(OptionError, match="timeout"):
        run(SPEC, REPORT, timeout=0)
    with pytest.raises(OptionError, match="no rank 4: there are 4"):
        run(SPEC, REPORT, may_die=(3, 4))


@pytest.fixture
def empty_path(monkeypatch, tmp_path):
    """No ip, tc or unshare."""
    monkeypatch.setenv("PATH", str(tmp_path))


def test_without_tools_it_runs_on_loopback_and_says_so(empty_path, capsys):
    done, _, _ = report()
    assert not done.shaped
    assert "GLOO_SOCKET_IFNAME=lo" in done.ranks[3].stdout and "MASTER_ADDR=127.0.0.1" in done.ranks[3].stdout
    assert "NOT shaped (not found: unshare, ip, tc" in capsys.readouterr().err


def test_without_tools_a_failing_rank_ends_all_too(empty_path, token):
    with pytest.raises(RankError, match="rank 1 of 4 ended with code 3"):
        report("fail", "1", token)
    assert not processes_with(token)


def launcher(*options, **environment):
    command = [sys.executable, "-m", "poise.lab.emulate", *"--cluster 2x2 --intra 20e6 --inter 10e6".split(), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment})  # fmt: skip


def gone(token, before, family, seconds=PATIENCE_S):
    """Interfaces are as before, the family's processes and namespaces have ended, after a while."""
    spaces = {space for _, space in family} - {os.readlink("/proc/self/ns/net")}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [pid for pid, _ in family if os.path.exists(f"/proc/{pid}")]
        if not processes_with(token) and not alive and not spaces & net_namespaces() and interfaces() == before:
            return True
        time.sleep(0.05)
    return False


def family_of(process, enough=bool, seconds=PATIENCE_S):
    """What the launcher has started, once that is enough."""
    deadline = time.monotonic() + seconds
    while not enough(found := descendants(process.pid)):
        assert time.monotonic() < deadline and process.poll() is None, found
        time.sleep(0.02)
    return found


@contextmanager
def killed(process):
    """The launcher, killed at the end of the block, whatever happens in it."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@shaping
def test_a_killed_launcher_leaves_nothing_behind():
    before = interfaces()
    for moment in (random.uniform(0.0, 0.1), random.uniform(0.1, 0.4), None):  # None: once the ranks run
        token = uuid.uuid4().hex
        with killed(launcher("--", str(REPORT), "hang", "-1", token)) as process:
            family = family_of(process)
            if moment is None:  # the agent's namespace, and one a rank: they start one after the other, and none ends
                family = family_of(process, lambda found: len({space for _, space in found}) >= 5)
                assert len(processes_with(token)) >= 4
            else:
                time.sleep(moment)
                family |= descendants(process.pid)
            assert family
        assert gone(token, before, family), (moment, family)


def test_a_killed_launcher_without_shaping_ends_its_ranks(tmp_path):
    token, before = uuid.uuid4().hex, interfaces()
    with killed(launcher("--", str(REPORT), "hang", "-1", token, PATH=str(tmp_path))) as process:
        family = family_of(process, lambda found: len(found) >= 5)  # the agent and its ranks
    assert gone(token, before, family)


@shaping
def test_the_command_line_runs_a_script_and_tells_failure():
    process = launcher("--", str(REPORT), "fail", "3")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and out.startswith("RANK=0")
    assert "error: rank 3 of 4 ended with code 3" in err and "something broke here" in err


def test_the_command_line_refuses_wrong_input():
    process = launcher("--limit", "1e6", "--", str(REPORT))
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2 and not out
    assert "all ports together carry 1.2e+08 bytes/s" in err and "hint:" in err
