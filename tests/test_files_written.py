"""Files that poise writes: whole or as they were, whoever reads, writes beside, kills, or fills the disk."""

import ast
import errno
import io
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import typer
from tests.engines.checkpoint_cases import EXPERTS, expert_placement, layers_of, write_checkpoint
from typer.testing import CliRunner

from poise import api
from poise.cli import main as cli
from poise.cli.ending import signals_end
from poise.engines.checkpoints import checkpoint
from poise.engines.exports import TARGETS, ExportOptions
from poise.lab.calibrate import ranks
from poise.lab.emulate import __main__ as emulate
from poise.report import page
from poise.routing.trace import RoutingTrace
from poise.simulate.perfetto import Event, write_perfetto
from poise.util.errors import InputError, OptionError, TraceError
from poise.util.files import check_new_folder, check_output, new_folder, replacing

ROOT = os.geteuid() == 0
NOBODY, OTHERS = 65534, 1235
as_root = pytest.mark.skipif(not ROOT, reason="only root may do this")
FORK = multiprocessing.get_context("fork")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["poise.cli.main", "poise.lab.calibrate.ranks", "poise.runtime.capture"])
WAIT_S = 120


def write(path, data=b"new", error=OptionError):
    with replacing(path, error) as stream:
        stream.write(data)


def names(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


def wait_for(happened):
    end = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(params=["nameless", "named"])
def way(request, monkeypatch):
    """Files without a name where the system has them, and the way of one that has none."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


# -- whole or as it was


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


@contextmanager
def at_most(count):
    """No file of this process may have more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _trace(path):
    RoutingTrace(np.zeros((500, 1, 1), np.int16), 8).save(path)


def _placed():
    return expert_placement(EXPERTS, 4, [1, 2], 1, 0)


def _cli(*words):
    """A command whose output path comes last; a refusal of the command is raised as what it stands for."""

    def run(path):
        got = CliRunner().invoke(cli.app, [*map(str, words), str(path)])
        if got.exit_code:
            assert got.exit_code == 2 and got.stderr.startswith("error:"), (got.stderr, got.exception)
            raise OptionError(got.stderr)

    return run


def _convert(suffix):
    def run(path):
        source = Path(path).parent.parent / "loads.json"
        if not source.exists():
            source.write_text(json.dumps({"logical_count": np.arange(16.0).reshape(1, 2, 8).tolist()}))
        with _ending_in(path, suffix) as named:
            _cli("convert", source, "-o")(named)

    return run


@contextmanager
def _ending_in(path, suffix):
    """A link of another name to the same place, as some writers go by the name."""
    link = Path(path).parent.parent / f"link{suffix}"
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    yield link


def _calibrate(path):
    class Result:
        notes = ()

        def to_yaml(self):
            return "nodes: 1\n" * 20

        def to_json(self):
            return {}

    with pytest.MonkeyPatch.context() as patch, _ending_in(path, ".yaml") as named:
        patch.setattr(ranks, "calibrate", lambda plan, say: Result())
        _cli("calibrate", "--json", "-o")(named)


def _emulate(path):
    class Result:
        inconclusive = ""

        def to_json(self):
            return "{}" * 100

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulate, "selftest", lambda *args, **more: Result())
        patch.setattr(sys, "stderr", io.StringIO())
        if emulate.main(["--cluster", "1x2", "--selftest", "--output", str(path)]):
            raise OptionError("it said why")


def _report(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "render", lambda *args: "<html>" * 100)
        page.write_report(None, path)


def _export(name):
    return lambda path: TARGETS[name].write(_placed(), Path(path), ExportOptions(num_hidden_layers=3))


WRITERS = {
    "trace": _trace, "placement": lambda path: _placed().save(path), "report": _report, "convert .json": _convert(".json"),
    "convert .npz": _convert(".npz"), "calibrate": _calibrate, "emulate": _emulate,
    "timeline": lambda path: write_perfetto(path, {"a": [Event("x", 0, 0.0, 1.0)]}),
    **{f"export {name}": _export(name) for name, target in TARGETS.items() if not target.folder and name != "vllm-34811"},
    "export vllm-34811": lambda path: TARGETS["vllm-34811"].write(
        expert_placement(EXPERTS, 4, [1], 1, 0), Path(path), ExportOptions()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_leaves_what_was_there_and_refuses_what_is_no_file(tmp_path, name, umask):
    """Each writes once, fails with the disk full, and meets a pipe and a device; nothing is lost and nothing left."""
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "file"
    WRITERS[name](path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    whole = path.read_bytes()
    path.write_bytes(b"old" * 1000)
    with pytest.raises(InputError), at_most(16):
        WRITERS[name](path)
    assert path.read_bytes() == b"old" * 1000
    WRITERS[name](path)
    assert len(path.read_bytes()) == len(whole)
    path.unlink()
    for make in (os.mkfifo, *([lambda path: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))] if ROOT else [])):
        make(path)
        before = path.lstat()
        with pytest.raises(InputError):
            WRITERS[name](path)
        after = path.lstat()
        assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
        path.unlink()
    assert names(folder) == []


OTHERWISE = {
    "util.files": "the writer itself",
    "engines.shards": "into the folder of a checkpoint that has no name yet",
    "engines.checkpoints.checkpoint": "into the folder of a checkpoint that has no name yet",
    "train.checkpoint": "into the folder of a checkpoint that has no name yet",
    "lab.emulate.agent": "settings of its own network in /proc",
    "watch.service": "a trial in a folder of its own",
}
CALLS = {"write_text", "write_bytes", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "mkstemp", "mkdtemp", "rename",
         "renames", "save_file", "save_pretrained", "copyfile", "copy", "copytree", "tofile", "savetxt", "fdopen", "dump"}  # fmt: skip
MODULES = {"os": {"replace", "rename"}, "shutil": {"move"}, "np": {"save"}, "torch": {"save"}, "dcp": {"save"}}
PLAIN = {"copy", "dump", "rename"}
"""Also names of methods that write nothing: they count on these modules and on paths."""


def _writes(tree):
    """Lines that write a file by themselves."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        owner = called.value.id if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) else ""
        words = [
            arg.value for arg in (*node.args, *(key.value for key in node.keywords)) if isinstance(arg, ast.Constant)
        ]
        opens = name == "open" and any(isinstance(word, str) and set(word) <= set("wxab+t") and set(word) & set("wxa+")
                                       for word in words)  # fmt: skip
        if (
            opens
            or name in MODULES.get(owner, ())
            or (name in CALLS and (name not in PLAIN or owner in ("shutil", "json")))
        ):
            yield node.lineno


def test_no_module_writes_files_by_itself():
    root = Path(cli.__file__).parent.parent
    found = {}
    for path in root.rglob("*.py"):
        lines = list(_writes(ast.parse(path.read_text("utf-8"))))
        if lines:
            found[".".join(path.relative_to(root).with_suffix("").parts)] = lines
    assert set(found) <= set(OTHERWISE), {name: lines for name, lines in found.items() if name not in OTHERWISE}
    assert {"util.files", "engines.shards", "train.checkpoint"} <= set(found)


# -- what it is like afterwards


def test_modes(tmp_path, way, umask):
    write(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    for mode in (0o600, 0o604, 0o666, 0o755):
        (tmp_path / "old").write_bytes(b"old")
        (tmp_path / "old").chmod(mode)
        write(tmp_path / "old")
        assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == mode and (tmp_path / "old").read_bytes() == b"new"
    with new_folder(tmp_path / "folder", OptionError) as made:
        (made / "file").touch()
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty").chmod(0o2701)
    with new_folder(tmp_path / "empty", OptionError) as made:
        (made / "file").touch()
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o2701 and names(tmp_path / "empty") == ["file"]


def test_what_is_being_written_is_nobody_elses(tmp_path, way):
    (tmp_path / "old").touch(0o600)
    with replacing(tmp_path / "old", OptionError) as stream:
        assert stat.S_IMODE(os.fstat(stream.fileno()).st_mode) == 0o600
    (tmp_path / "folder").mkdir(0o700)
    with new_folder(tmp_path / "folder", OptionError) as made:
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


@as_root
def test_owner_and_group_stay(tmp_path, way):
    (tmp_path / "old").touch(0o640)
    os.chown(tmp_path / "old", NOBODY, OTHERS)
    write(tmp_path / "old")
    told = (tmp_path / "old").stat()
    assert (told.st_uid, told.st_gid, stat.S_IMODE(told.st_mode)) == (NOBODY, OTHERS, 0o640)


def _as_nobody(do, path, said):
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.umask(0)
    try:
        do(path)
        said.send("")
    except InputError as error:
        said.send(str(error))


def nobody(do, path):
    """What a user without rights is told."""
    here, there = FORK.Pipe()
    child = FORK.Process(target=_as_nobody, args=(do, path, there))
    child.start()
    there.close()
    said = here.recv()
    child.join()
    return said


@pytest.fixture
def open_folder():
    """A folder in which everyone may write, beside all that is the test's own."""
    place = Path("/tmp") / f"poise-test-{os.getpid()}-{time.monotonic_ns()}"
    place.mkdir()
    place.chmod(0o777)
    yield place
    shutil.rmtree(place)


@as_root
@pytest.mark.parametrize(("mode", "kept"), [(0o642, 0o602), (0o666, 0o666), (0o606, 0o606), (0o662, 0o622)])
def test_where_the_group_cannot_stay_nobody_reads_who_could_not(open_folder, mode, kept):
    path = open_folder / "old"
    path.touch()
    path.chmod(mode)
    assert nobody(write, path) == ""
    told = path.stat()
    assert (told.st_uid, told.st_gid, stat.S_IMODE(told.st_mode)) == (NOBODY, NOBODY, kept)


@as_root
def test_what_a_user_may_not_write(open_folder):
    (open_folder / "readonly").touch(0o444)
    (open_folder / "closed").mkdir(0o755)
    (open_folder / "sticky").mkdir()
    (open_folder / "sticky").chmod(0o1777)
    (open_folder / "sticky" / "theirs").touch()
    (open_folder / "sticky" / "theirs").chmod(0o666)
    for path, why in [("readonly", "may not be written"), ("closed/new", "Permission denied"), ("sticky/theirs", "belongs to user 0"),
                      ("closed/no/such", "no folder")]:  # fmt: skip
        for do in (write, lambda path: check_output(path, OptionError)):
            assert why in nobody(do, open_folder / path), path
    assert "Permission denied" in nobody(
        lambda path: check_new_folder(path, OptionError), open_folder / "closed" / "new"
    )
    assert nobody(write, open_folder / "sticky" / "mine") == ""


ACL = "system.posix_acl_access"
# version, then who, what and id: owner rw, user NOBODY r, group nothing, mask r, others nothing
LIST = struct.pack(
    "<I" + "HHI" * 5, 2, 1, 6, 2**32 - 1, 2, 4, NOBODY, 4, 0, 2**32 - 1, 16, 4, 2**32 - 1, 32, 0, 2**32 - 1
)


def test_access_lists_stay_and_those_of_the_folder_do_not_come(tmp_path, way):
    (tmp_path / "old").touch(0o600)
    try:
        os.setxattr(tmp_path / "old", ACL, LIST)
    except OSError as error:
        pytest.skip(f"no access lists here: {error.strerror}")
    write(tmp_path / "old")
    assert os.getxattr(tmp_path / "old", ACL) == LIST
    (tmp_path / "plain").touch()
    (tmp_path / "plain").chmod(0o640)
    os.setxattr(tmp_path, "system.posix_acl_default", LIST)
    write(tmp_path / "plain")
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o640
    with pytest.raises(OSError):
        os.getxattr(tmp_path / "plain", ACL)


# -- links


def test_links(tmp_path, way):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"old")
    (tmp_path / "one").symlink_to("real/file")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "dangling").symlink_to("real/new")
    (tmp_path / "folder").symlink_to("real")
    write(tmp_path / "two", b"1")
    assert (
        (tmp_path / "real" / "file").read_bytes() == b"1"
        and (tmp_path / "two").is_symlink()
        and (tmp_path / "one").is_symlink()
    )
    write(tmp_path / "dangling", b"2")
    assert (tmp_path / "real" / "new").read_bytes() == b"2" and (tmp_path / "dangling").is_symlink()
    write(tmp_path / "folder" / "third", b"3")
    write(os.path.join(tmp_path, "folder", "..", "fourth"), b"4")  # .. of the folder, not of the link
    assert names(tmp_path / "real") == ["file", "new", "third"] and (tmp_path / "fourth").read_bytes() == b"4"
    os.link(tmp_path / "fourth", tmp_path / "hard")
    write(tmp_path / "fourth", b"5")
    assert ((tmp_path / "fourth").read_bytes(), (tmp_path / "hard").read_bytes()) == (b"5", b"4")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for check in (check_output, check_new_folder):
        with pytest.raises(OptionError, match="loop of links"):
            check(tmp_path / "a", OptionError)
    (tmp_path / "later").symlink_to("real/later")
    with new_folder(tmp_path / "later", OptionError) as made:
        (made / "file").touch()
    assert (tmp_path / "later").is_symlink() and names(tmp_path / "real" / "later") == ["file"]
    with pytest.raises(OptionError, match="a folder, not a file"):
        write(tmp_path / "folder")


def test_names_relative_and_odd(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "-", "ü \n\x1b[1m", "x" * 255, os.fsdecode(b"\xff"), "./a", "../" + tmp_path.name + "/b"):
        write(name)
        assert Path(name).read_bytes() == b"new"
    for name in ("", ".", "..", "no/such", "plain/", "plain/x", "a\0b", "\ud800", "x" * 256):
        for check in (check_output, check_new_folder, lambda name, error: write(name)):
            if (check, name) != (check_new_folder, "plain/"):
                with pytest.raises(OptionError, match=r"cannot write"):
                    check(name, OptionError)


# -- what is no file


def special(tmp_path):
    """Names under which no file can be written, and what they are called."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    yield from [("pipe", "a pipe"), ("socket", "a socket"), ("folder", "a folder"), ("link", "a pipe"), ("null", "a device"),
                ("/dev/null", "a device"), ("/dev/full", "a device"), ("no/such/file", "no folder"), ("pipe/x", "no folder"),
                ("/proc/self/comm", "a process"), ("/proc/sys/kernel/domainname", "a process"), ("/proc/new", "a process")]  # fmt: skip
    if ROOT:
        os.mknod(tmp_path / "node", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        yield "node", "a device"


def test_what_is_no_file_is_refused_and_stays(tmp_path, way):
    for name, kind in special(tmp_path):
        path = tmp_path / name
        before = path.stat() if path.exists() else None
        for do in (check_output, lambda path, error: write(path, error=error)):
            with pytest.raises(TraceError, match=f"cannot write .*{kind}") as caught:
                do(path, TraceError)
            assert caught.value.hint
        if before is not None:
            assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_open_files_of_a_process_are_refused(tmp_path):
    """What ``> file`` opened would be replaced under the shell's hands."""
    with (tmp_path / "out").open("wb") as stream:
        for name in (
            f"/dev/fd/{stream.fileno()}",
            f"/proc/self/fd/{stream.fileno()}",
            f"/proc/{os.getpid()}/fd/{stream.fileno()}",
        ):
            with pytest.raises(OptionError, match="open file of a process"):
                check_output(name, OptionError)
        code = "from poise.util.errors import OptionError; from poise.util.files import check_output; check_output('/dev/stdout', OptionError)"
        got = subprocess.run([sys.executable, "-c", code], stdout=stream, stderr=subprocess.PIPE, text=True)
        assert got.returncode == 1 and "OptionError: cannot write '/dev/stdout'" in got.stderr
        folder = os.open(tmp_path, os.O_RDONLY)
        write(f"/proc/self/fd/{folder}/through")  # a file like any other, in an open folder
        os.close(folder)
    assert names(tmp_path) == ["out", "through"] and (tmp_path / "out").read_bytes() == b""


@as_root
def test_what_is_mounted_is_refused_before_the_work(tmp_path):
    """As containers have it: a file or an empty folder of the host, mounted by itself. A rename onto it fails."""
    for name, check in (("a file\\", check_output), ("a folder", check_new_folder)):
        place, source = tmp_path / name, tmp_path / f"source of {name}"
        for path in (place, source):
            path.touch() if check is check_output else path.mkdir()
        done = subprocess.run(["mount", "--bind", source, place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr[:80]}")
        try:
            with pytest.raises(OptionError, match="a mount cannot be replaced"):
                check(place, OptionError)
        finally:
            subprocess.run(["umount", place], check=True)
        check(place, OptionError)


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


# -- folders


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


# -- commands

WRITES = {
    "demo": ["--html"], "plan": ["--output"], "compare": ["--html"], "convert": ["--output"], "export": ["--output"],
    "record": ["--output"], "calibrate": ["--output"], "watch": ["--output", "--export"],
}  # fmt: skip
READS = {"--against", "--traffic", "--current", "--placement", "--relabelling", "--checkpoint", "--curve", "--dump-dir"}
NEEDS = {
    "plan": ["missing.npz", "-c", "1x4"], "compare": ["missing.npz", "-c", "1x4"], "convert": ["missing"], "demo": [],
    "export": ["missing.npz", "--to", "sglang"], "record": ["missing", "missing.txt"], "calibrate": [],
    "watch": ["missing.npz", "-c", "1x4"],
}  # fmt: skip


def test_every_option_that_names_a_file_is_known_here():
    """A new command or option that takes a path is put into one of the tables, and so is tried below."""
    commands = typer.main.get_command(cli.app).commands
    for verb in cli.app.registered_commands:
        name = verb.callback.__name__
        options = {param.name: param.opts[0] for param in commands[name].params if param.opts[0].startswith("-")}
        paths = {
            options[key]
            for key, hint in get_type_hints(verb.callback).items()
            if "Path" in str(hint) and key in options
        }
        assert paths <= {*WRITES.get(name, ()), *READS}, name
        assert set(WRITES.get(name, ())) <= set(options.values()), name
    assert set(WRITES) <= set(commands)


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in WRITES.items() for option in options])
def test_commands_refuse_what_cannot_be_written_before_any_work(tmp_path, monkeypatch, name, option):
    """What they read is not there: had they looked at it first, they would say so. Some read nothing and work at once."""

    def too_early(*args, **more):
        raise AssertionError("work before the refusal")

    monkeypatch.setattr(api, "compare", too_early)
    monkeypatch.setattr(ranks, "calibrate", too_early)
    monkeypatch.chdir(tmp_path)
    for path, kind in special(tmp_path):
        for more in ([], ["--to", "checkpoint", "--checkpoint", "missing"]) if name == "export" else ([],):
            if more and kind == "a folder":
                continue
            value = f"sglang:{path}" if option == "--export" else path
            got = CliRunner().invoke(cli.app, [name, *NEEDS[name], *more, option, value])
            said = " ".join(got.stderr.split())
            assert got.exit_code == 2 and said.startswith("error: cannot write"), (path, got.output, got.exception)
            assert kind in said and "hint:" in said
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_the_emulator_refuses_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(emulate, "selftest", None)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        assert emulate.main(["--cluster", "1x2", "--selftest", "--output", str(path)]) == 2
        assert "cannot write" in capsys.readouterr().err


# -- signals


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
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        child = running(name, named=named)
        os.kill(child.pid, number)
        child.join(WAIT_S)
        said = (tmp_path / "stderr").read_text().splitlines()
        assert child.exitcode == 128 + number and said == [f"ended by {number.name}"], said
        as_before(tmp_path, name)


@pytest.mark.parametrize(("name", "named"), [*itertools.product(COMMANDS, [False]), ("convert", True)])
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
