"""Files that others name: pipes, devices and folders are refused by every reader, at once and in little memory."""

import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engines.checkpoint_cases import write_checkpoint
from tests.launch import processes

from poise.util.errors import ClusterError, InputError, ModelError, OptionError
from poise.util.files import open_regular, read_bounded
from poise.util.jsonfile import read_json

READERS = """
import json, resource, shutil, signal, sys
from pathlib import Path
import numpy as np
from poise import Cluster, Placement
from poise.lab.emulate.clock import ExpertCurve
from poise.engines import sglang
from poise.engines.checkpoints.checkpoint import relabel_checkpoint
from poise.engines.checkpoints.permutation import load_relabelling
from poise.engines.plugins.static_map import StaticMap
from poise.engines.readers import ReadOptions, read_dump
from poise.engines.shards import read_shard
from poise.util.errors import InputError
from poise.machine.model import ModelSpec
from poise.routing.files import read
from poise.runtime.capture import read_prompts
from poise.serve.load import Checkpoint

place, checkpoint = Path(sys.argv[1]), Path(sys.argv[2])
plan = Placement(np.arange(8)[None], np.repeat(np.arange(4), 2), 8, 4, np.array([1]))


def index(name, file):
    folder = place / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder)
    (folder / name).unlink(missing_ok=True)
    Path(file).rename(folder / name)
    try:
        relabel_checkpoint(plan, folder, place / "new")
    finally:
        (folder / name).rename(file)


def served(file):
    folder = place / "served"
    folder.mkdir(exist_ok=True)
    Path(file).rename(folder / "model.safetensors")
    try:
        Checkpoint(folder).__enter__()
    finally:
        (folder / "model.safetensors").rename(file)


ENTRIES = {
    "config": (".json", ModelSpec.parse), "cluster": (".yaml", Cluster.parse), "placement": (".npz", Placement.load),
    "trace": (".npz", read), "loads": (".json", read),
    "dump": (".pt", read_dump), "dump asked for": (".npy", lambda f: read_dump(f, options=ReadOptions(format="exflow"))),
    "static map": (".npz", lambda f: StaticMap.read(Path(f), None)), "static json": (".json", lambda f: StaticMap.read(Path(f), None)),
    "relabelling": (".json", load_relabelling), "sglang": (".json", lambda f: sglang.read(f, num_devices=2)),
    "shard": (".safetensors", lambda f: read_shard(Path(f))), "curve": (".csv", ExpertCurve.from_csv),
    "prompts": (".jsonl", lambda f: read_prompts([f])), "served": ("", served),
    "index": ("", lambda f: index("model.safetensors.index.json", f)),
    "config of a checkpoint": ("", lambda f: index("config.json", f)),
    "old relabelling": ("", lambda f: index("poise-relabelling.json", f)),
}
with open("/proc/self/statm") as stream:
    used = int(stream.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for name, (suffix, entry) in ENTRIES.items():
    for kind in sys.argv[3:]:
        signal.alarm(30)  # kills: nothing may wait
        file = place / (kind + suffix)
        (place / kind).rename(file)
        try:
            entry(str(file))
            said = "read"
        except InputError as error:
            said = "refused" if error.message else "no message"
        except BaseException as error:
            said = repr(error)[:200]
        file.rename(place / kind)
        print(json.dumps([name, kind, said]))
"""


def make(folder, kind):
    path = folder / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    return path


def test_every_reader_refuses_what_is_no_file(tmp_path):
    kinds = ["pipe", "zeros", "loop"]
    for kind in kinds:
        make(tmp_path, kind)
    checkpoint = write_checkpoint(tmp_path / "model", "granite")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "readers.py").write_text(READERS)
    ((code, said),) = processes(1, str(tmp_path / "run" / "readers.py"), str(tmp_path), str(checkpoint), *kinds,
                                folder=tmp_path / "run", timeout=1200)  # fmt: skip
    assert code == 0, said[-2300:]
    lines = [json.loads(line) for line in said.splitlines()]
    assert len(lines) == 18 * len(kinds)
    assert not [line for line in lines if line[2] != "refused"]


@pytest.mark.parametrize(
    "kind, said",
    [("pipe", "a pipe"), ("zeros", "a device"), ("folder", "a folder"), ("socket", "a socket"), ("loop", "symbolic links"),
     ("none", "no such file"), ("a\0b", "null"), ("a" * 5000, "too long")],
)  # fmt: skip
def test_the_error_is_the_callers_and_names_what_it_is(tmp_path, kind, said):
    path = make(tmp_path, kind)
    for ask in (lambda: read_bounded(path, 10, ClusterError, hint="h"), lambda: open_regular(path, ClusterError, hint="h").__enter__(),
                lambda: read_json(path, 10, ClusterError, hint="h")):  # fmt: skip
        with pytest.raises(ClusterError, match=said) as caught:
            ask()
        assert caught.value.hint == "h" and len(caught.value.message) < 400


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "f").chmod(0)
    with pytest.raises(ModelError, match="Permission denied"):
        read_bounded(tmp_path / "f", 10, ModelError)


@given(data=st.binary(max_size=40), most=st.integers(0, 40))
def test_no_more_than_the_limit(tmp_path_factory, data, most):
    path = tmp_path_factory.getbasetemp() / "bounded"
    path.write_bytes(data)
    if len(data) <= most:
        assert read_bounded(path, most, InputError) == data
    else:
        with pytest.raises(InputError, match=f"{len(data)} bytes, at most {most} are read"):
            read_bounded(path, most, InputError)


def test_a_size_of_zero_is_not_believed():
    """Files of /proc say 0 bytes and give many."""
    with pytest.raises(OptionError, match="more than 20 bytes, at most 20 are read"):
        read_bounded("/proc/self/status", 20, OptionError)
    assert b"Pid:" in read_bounded("/proc/self/status", 1 << 20, OptionError)


def test_errors_while_it_is_read_are_the_callers(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(ModelError, match="Input/output error"), open_regular(tmp_path / "f", ModelError):
        raise OSError(5, "Input/output error")
