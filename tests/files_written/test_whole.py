"""Files and folders are whole or as they were, whoever reads, writes beside, interrupts, or fills the disk."""

import errno
import os
import subprocess
from contextlib import suppress

import pytest
from tests.engines.checkpoint_cases import EXPERTS, expert_placement, layers_of, write_checkpoint
from tests.files_written.support import FORK, as_root, names, write

from poise.engines.checkpoints import checkpoint
from poise.util.errors import InputError, OptionError, TraceError
from poise.util.files import new_folder, replacing


def _write_many(path, byte, times):
    for _ in range(times):
        write(path, bytes([byte]) * 300_000)


def test_several_writers_and_a_reader_at_once(tmp_path, way):
    path = tmp_path / "out"
    write(path, b"0" * 300_000)
    writers = [FORK.Process(target=_write_many, args=(path, byte, 40)) for byte in b"abc"]
    for writer in writers:
        writer.start()
    reads, seen = 0, set()
    while reads < 200 or any(writer.is_alive() for writer in writers):
        data = path.read_bytes()
        assert len(data) == 300_000 and data.count(data[0]) == len(data)
        seen.add(data[:1])
        reads += 1
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and names(tmp_path) == ["out"]
    assert path.read_bytes()[:1] in (b"a", b"b", b"c")


def test_what_raises_leaves_what_was_there(tmp_path, way):
    path = tmp_path / "out"
    for before in (None, b"old"):
        if before:
            path.write_bytes(before)
        for raised in (KeyboardInterrupt, SystemExit, RuntimeError, MemoryError):
            with pytest.raises(raised), replacing(path, OptionError) as stream:
                stream.write(b"x" * 100_000)
                raise raised
        with pytest.raises(TraceError, match=r"cannot write .*No space left"), replacing(path, TraceError) as stream:
            raise OSError(errno.ENOSPC, "No space left on device")
        assert names(tmp_path) == (["out"] if before else [])
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("step", ["fsync", "link", "replace", "fchmod", "unlink"])
def test_a_signal_at_any_step_leaves_one_whole_file(tmp_path, way, step, monkeypatch):
    """Raised after the call, where Python looks for signals, and before it."""
    for late in (False, True):
        path = tmp_path / "out"
        path.write_bytes(b"old")
        real = getattr(os, step)

        def interrupted(*args, late=late, real=real, **more):
            if late:
                real(*args, **more)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, step, interrupted)
            with suppress(KeyboardInterrupt):
                write(path)
        assert path.read_bytes() in (b"old", b"new")
        left = [name for name in names(tmp_path) if name != "out"]
        assert not left or step == "unlink", left


@as_root
def test_a_full_disk(tmp_path, way):
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr[:80]}")
    try:
        (place / "out").write_bytes(b"old" * 1000)
        for _ in range(3):
            with pytest.raises(OptionError, match="No space left"):
                write(place / "out", b"x" * 2**20)
            assert names(place) == ["out"] and (place / "out").read_bytes() == b"old" * 1000
        source = write_checkpoint(tmp_path / "model", "granite")
        (source / "large.txt").write_bytes(b"x" * 2**20)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="No space left"):
            patch.setattr(checkpoint, "_check_space", lambda *args: None)
            checkpoint.relabel_checkpoint(
                expert_placement(EXPERTS, 4, layers_of("granite"), 1, 0), source, place / "new"
            )
        assert names(place) == ["out"]
        write(place / "out", b"y" * 100_000)
    finally:
        subprocess.run(["umount", place], check=True)


def test_folders_appear_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new"
    for raised in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(raised), new_folder(target, OptionError) as made:
            (made / "deep" / "er").mkdir(parents=True)
            (made / "deep" / "er" / "file").touch()
            assert not target.exists()
            raise raised
    (tmp_path / ".poise-0123456789ab").mkdir()  # of a run that was killed: nobody takes it up
    (tmp_path / ".poise-0123456789ab" / "stale").touch()
    with new_folder(target, OptionError) as made:
        (made / "file").touch()
    assert names(target) == ["file"] and names(tmp_path) == [".poise-0123456789ab", "new"]
    with pytest.raises(OptionError, match="not empty"), new_folder(target, OptionError):
        raise AssertionError("no work before it is refused")
    with pytest.raises(OptionError, match="cannot write"), new_folder(tmp_path / "two", OptionError) as made:
        (made / "mine").touch()
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / "theirs").touch()  # another was faster
    assert names(tmp_path / "two") == ["theirs"] and names(tmp_path) == [".poise-0123456789ab", "new", "two"]
