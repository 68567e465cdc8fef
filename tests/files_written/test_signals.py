"""Commands that a signal ends while they write leave nothing behind, and what was there stays."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tests.engines.checkpoint_cases import EXPERTS, expert_placement, layers_of, write_checkpoint
from tests.files_written.support import WAIT_S, names, wait_for
from tests.helpers import few_or

from poise.cli import main as cli
from poise.cli.ending import signals_end
from poise.engines.checkpoints import checkpoint

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["poise.cli.main", "poise.lab.calibrate.ranks", "poise.runtime.capture"])


def _command(words, folder, settings):
    """A command in a process of its own, held in the midst of its write (or of its cleaning) until it is ended."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"../{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    hold = settings.get("hold", "write")

    def wait(*, until="../never"):
        Path("../said").touch()
        while not os.path.exists(until):
            time.sleep(0.005)

    save, copy, remove = np.savez_compressed, checkpoint.copy_segments, shutil.rmtree

    def half(stream, **arrays):
        stream.write(b"half" * 10_000)
        stream.flush()
        wait(until="../go")
        stream.seek(0)
        stream.truncate()
        save(stream, **arrays)

    def half_copied(source, target, *args):
        copy(source, target, *args)
        if hold == "write":
            wait(until="../go")

    def removed_late(path, **more):
        Path("../cleaning").touch()
        wait(until="../clean")
        remove(path, **more)

    np.savez_compressed, checkpoint.copy_segments = half, half_copied
    if settings.get("late"):
        shutil.rmtree = removed_late
    if settings.get("named"):
        del os.O_TMPFILE
    signal.signal(signal.SIGHUP, signal.SIG_IGN if settings.get("nohup") else signal.SIG_DFL)
    sys.argv = ["poise", *words]
    cli.main()


KEEPS = "interrupted: writing the best plan so far"
COMMANDS = {
    "convert": ["convert", "../loads.json", "-o", "out.npz"],
    "plan": ["plan", "../loads.json", "-c", "1x4", "--method", "contiguous", "--no-verdict", "-o", "out.npz"],
    "checkpoint": ["export", "../p.npz", "--to", "checkpoint", "--checkpoint", "../model", "-o", "new"],
}


@pytest.fixture
def running(tmp_path):
    """Starts a command that is held in its write; what it writes into holds an older file."""
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": np.arange(1, 17.0).reshape(1, 2, 8).tolist()}))
    expert_placement(EXPERTS, 4, layers_of("granite"), 1, 0).save(tmp_path / "p.npz")
    write_checkpoint(tmp_path / "model", "granite")
    (tmp_path / "in").mkdir()
    started = []

    def start(name, **settings):
        for path in ("said", "go", "cleaning", "clean"):
            (tmp_path / path).unlink(missing_ok=True)
        if name != "checkpoint":
            (tmp_path / "in" / "out.npz").write_bytes(b"old")
        child = SERVER.Process(target=_command, args=(COMMANDS[name], str(tmp_path / "in"), settings))
        started.append(child)
        child.start()
        wait_for(lambda: (tmp_path / "said").exists() or not child.is_alive())
        assert (tmp_path / "said").exists(), (tmp_path / "stderr").read_text()
        return child

    yield start
    for child in started:
        if child.is_alive():
            child.kill()
        child.join()


def as_before(tmp_path, name):
    assert names(tmp_path / "in") == ([] if name == "checkpoint" else ["out.npz"])
    if name != "checkpoint":
        assert (tmp_path / "in" / "out.npz").read_bytes() == b"old"


@pytest.mark.parametrize(("name", "named"), [*itertools.product(COMMANDS, [False]), ("convert", True)])
def test_signals_leave_nothing_behind(tmp_path, running, name, named):
    every = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    few = (signal.SIGHUP,) if named else (signal.SIGTERM, signal.SIGINT) if name == "plan" else every
    for number in few_or(every, few):
        child = running(name, named=named)
        os.kill(child.pid, number)
        goes_on = name == "plan" and number == signal.SIGINT  # it writes what it has; the second one ends it
        if goes_on:
            wait_for(lambda: KEEPS in (tmp_path / "stderr").read_text())
            os.kill(child.pid, number)
        child.join(WAIT_S)
        said = [line for line in (tmp_path / "stderr").read_text().splitlines() if not line.startswith("working, ")]
        assert child.exitcode == 128 + number and said[-1] == f"ended by {number.name}", said
        assert [line.partition(";")[0] for line in said[:-1]] == [KEEPS] * goes_on
        as_before(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "named"), [*itertools.product(few_or(COMMANDS, ("convert", "checkpoint")), [False]), ("convert", True)]
)
def test_kill_9_leaves_what_was_there(tmp_path, running, name, named):
    child = running(name, named=named)
    child.kill()
    child.join(WAIT_S)
    left = [path for path in names(tmp_path / "in") if path.startswith(".poise-")]
    assert len(left) == (name == "checkpoint" or named or not hasattr(os, "O_TMPFILE"))
    if name == "checkpoint":
        assert not (tmp_path / "in" / "new").exists()
    else:
        assert (tmp_path / "in" / "out.npz").read_bytes() == b"old"
    child = running(name, named=named)  # and the next one neither takes it up nor stumbles over it
    (tmp_path / "go").touch()
    child.join(WAIT_S)
    assert child.exitcode == 0, (tmp_path / "stderr").read_text()
    assert names(tmp_path / "in") == sorted([*left, "new" if name == "checkpoint" else "out.npz"])


def test_more_signals_do_not_break_the_cleaning(tmp_path, running):
    child = running("checkpoint", late=True)
    os.kill(child.pid, signal.SIGTERM)
    wait_for((tmp_path / "cleaning").exists)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(child.pid, number)
        time.sleep(0.05)
    assert child.is_alive() and names(tmp_path / "in")
    (tmp_path / "clean").touch()
    child.join(WAIT_S)
    assert child.exitcode == 128 + signal.SIGTERM
    as_before(tmp_path, "checkpoint")


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path, running):
    child = running("convert", nohup=True)
    os.kill(child.pid, signal.SIGHUP)
    time.sleep(0.05)
    (tmp_path / "go").touch()
    child.join(WAIT_S)
    assert child.exitcode == 0 and (tmp_path / "in" / "out.npz").read_bytes() != b"old"


def test_a_signal_that_was_lost_can_be_sent_again():
    """Where the first was swallowed, the next one ends the command."""
    with signals_end():
        for _ in range(2):
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
                raise AssertionError("it did not end")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
