"""Pipes, devices, sockets, mounts and open files are refused, by commands before any work."""

import os
import stat
import subprocess
import sys
from typing import get_type_hints

import pytest
from tests.files_written.support import as_root, names, special, write
from typer.testing import CliRunner

from poise import api
from poise.cli import main as cli
from poise.lab.calibrate import ranks
from poise.lab.emulate import __main__ as emulate
from poise.util.errors import OptionError, TraceError
from poise.util.files import check_new_folder, check_output


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


WRITES = {
    "demo": ["--html", "--output"], "plan": ["--output"], "compare": ["--html"], "convert": ["--output"], "export": ["--output"],
    "record": ["--output"], "calibrate": ["--output"], "watch": ["--output", "--export"],
    "verdict": ["--output", "--html"], "homes": ["--output", "--placement-out"], "bench": ["--output", "--html"],
}  # fmt: skip
READS = {"--against", "--traffic", "--current", "--placement", "--relabelling", "--checkpoint", "--losses", "--curve", "--dump-dir",
         "--from-tables", "--data", "--recipe"}  # fmt: skip
NEEDS = {
    "plan": ["missing.npz", "-c", "1x4"], "compare": ["missing.npz", "-c", "1x4"], "convert": ["missing"], "demo": [],
    "export": ["missing.npz", "--to", "sglang"], "record": ["missing", "missing.txt"], "calibrate": [],
    "watch": ["missing.npz", "-c", "1x4"], "verdict": ["missing.npz", "-c", "1x4", "-m", "deepseek-v3"],
    "homes": ["missing.npz", "-c", "1x4"], "bench": ["--compare", "missing.json", "missing.json"],
}  # fmt: skip


def test_every_option_that_names_a_file_is_known_here():
    """A new command or option that takes a path is put into one of the tables, and so is tried below."""
    for name in cli.VERBS:
        verb = cli.command(name)
        options = {param.name: param.opts[0] for param in verb.params if param.opts[0].startswith("-")}
        paths = {
            options[key]
            for key, hint in get_type_hints(verb.callback).items()
            if "Path" in str(hint) and key in options
        }
        assert paths <= {*WRITES.get(name, ()), *READS}, name
        assert set(WRITES.get(name, ())) <= set(options.values()), name
        assert name != "plan" or paths == {"--output", "--current"}, "the test sees nothing"
    assert set(WRITES) <= set(cli.VERBS)


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
