"""Every function of poise that writes a file goes the one way that keeps what was there."""

import ast
import io
import json
import os
import resource
import stat
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.engines.checkpoint_cases import EXPERTS, expert_placement
from tests.files_written.support import ROOT, names
from typer.testing import CliRunner

from poise.cli import main as cli
from poise.engines.exports import TARGETS, ExportOptions
from poise.lab.calibrate import ranks
from poise.lab.emulate import __main__ as emulate
from poise.report import page
from poise.routing.trace import RoutingTrace
from poise.simulate.perfetto import Event, write_perfetto
from poise.util.errors import InputError, OptionError


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
    "engines.plugins.child": "its answers, into the pipe of who asks",
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
        if opens and node.args and ast.unparse(node.args[0]) == "os.devnull":
            continue
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
