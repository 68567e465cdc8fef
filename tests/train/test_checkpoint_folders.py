"""Folders of training checkpoints: what is named is whole, whenever a write ends."""

import json
import os
import pickle
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.helpers import few_or
from tests.launch import ranks
from torch import nn

from poise.train import checkpoint
from poise.train.checkpoint import export_safetensors, latest_checkpoint, load_checkpoint, save_checkpoint
from poise.util.errors import InputError, ModelError, OptionError


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of one rank, and a model without experts."""
    monkeypatch.setattr(checkpoint, "sharded_layers", lambda model: [])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield nn.Linear(2, 2)
    dist.destroy_process_group()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_those_written_last(tmp_path, alone):
    """After a return to an earlier step its number is not among the highest."""
    root = tmp_path / "run"
    for step in (10, 20, 1):
        assert save_checkpoint(root, alone, step=step, keep=2) == root / f"step-{step}"
        assert latest_checkpoint(root) == root / f"step-{step}"
    assert names(root) == ["latest", "step-1", "step-20"]
    save_checkpoint(root, alone, step=30, keep=2)
    assert names(root) == ["latest", "step-1", "step-30"]
    for step in (25, 7):
        save_checkpoint(root, alone, step=step, keep=4)
    (root / "step-1" / "scores.json").write_text("{}")  # which does not make it newer
    save_checkpoint(root, alone, step=5, keep=4)
    assert names(root) == ["latest", "step-25", "step-30", "step-5", "step-7"]
    save_checkpoint(root, alone, step=2, keep=3)
    assert names(root) == ["latest", "step-2", "step-5", "step-7"]  # by number it were 30 or 25


def test_what_latest_names_stays(tmp_path, alone):
    """By hand it was set back to a checkpoint that is not the newest."""
    root = tmp_path / "run"
    for step in (10, 20, 30):
        save_checkpoint(root, alone, step=step, keep=3)
    (root / "latest").write_text("step-10\n")
    save_checkpoint(root, alone, step=12, keep=2)
    assert names(root) == ["latest", "step-10", "step-12"]


def test_what_is_no_checkpoint_of_ours_stays(tmp_path, alone):
    for name in ("best", "step-²", "step-7.bak", "step-", ".step-x.partial", ".poise-notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").write_text("best")
    there = names(tmp_path)
    for step in (1, 2):
        save_checkpoint(tmp_path, alone, step=step, keep=1)
    assert names(tmp_path) == sorted([*there, "step-2"])


def test_a_link_to_a_checkpoint_is_followed_and_what_it_names_stays(tmp_path, alone):
    root = tmp_path / "run"
    save_checkpoint(tmp_path / "other", alone, step=3)
    root.mkdir()
    (root / "step-3").symlink_to(tmp_path / "other" / "step-3")
    (root / "latest").write_text("step-3")
    assert latest_checkpoint(root) == root / "step-3"
    for step in (3, 4):
        save_checkpoint(root, alone, step=step, keep=1)
    assert names(root) == ["latest", "step-4"] and latest_checkpoint(tmp_path / "other") is not None


def test_ended_at_any_moment_there_is_a_whole_one():
    """Before every rename, removal and opening of a file in turn, in a process of its own; what is left is cleared.

    With few examples three of five scenarios: "a new one" goes the way of "an earlier step", the first loses nothing.
    """
    scenarios = few_or((), ("one kept", "an earlier step", "the same step"))
    with tempfile.TemporaryDirectory() as folder:
        (said,) = ranks(1, "tests/train/dying_saver.py", folder, *scenarios, folder=Path(folder), timeout=600)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"scenario"')]
    counts = {line["scenario"]: line["changes"] for line in lines}
    assert len(counts) == few_or(5, 3) and all(count > 8 for count in counts.values()), counts


@pytest.mark.parametrize(
    "harm", ["no latest", "empty latest", "latest of another", "no table", "no file", "short", "table"]
)
def test_the_newest_whole_one_is_found(tmp_path, alone, harm):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, alone, step=step, keep=3)
    place, found = tmp_path / "step-3", tmp_path / "step-2"
    data = next(place.glob("*.distcp"))
    if harm == "no latest":
        (tmp_path / "latest").unlink()
        found = place
    elif harm in ("empty latest", "latest of another"):
        (tmp_path / "latest").write_text("" if harm == "empty latest" else "step-9")
        found = place
    elif harm == "no table":
        (place / ".metadata").unlink()
    elif harm == "no file":
        data.unlink()
    elif harm == "short":
        os.truncate(data, data.stat().st_size - 1)
    else:
        (place / ".metadata").write_bytes(b"no pickle")
    with pytest.warns(UserWarning, match=rf"going on from {found.name}"):
        assert latest_checkpoint(tmp_path) == found
    with pytest.warns(UserWarning, match=found.name):
        assert load_checkpoint(tmp_path, alone) == int(found.name[-1])
    save_checkpoint(tmp_path, alone, step=4, keep=2)  # broken ones do not count
    assert found.name in names(tmp_path) and "step-1" not in names(tmp_path)


def test_none_is_no_error_and_none_whole_is_one(tmp_path, alone):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "latest").write_text("step-3")
    with pytest.raises(InputError, match="step-3 is not there"):
        latest_checkpoint(tmp_path)
    (tmp_path / "step-3").mkdir()
    with pytest.raises(InputError, match="step-3 cannot be read"):
        latest_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("../step-3")
    with pytest.raises(InputError, match="latest names none"):
        latest_checkpoint(tmp_path)
    with pytest.raises(InputError):
        latest_checkpoint(tmp_path / "latest")


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, alone):
    """The kernel refuses to write more than some bytes to a file."""
    root = tmp_path / "run"
    save_checkpoint(root, alone, step=1)
    (root / ".step-7.partial").mkdir()
    large = nn.Linear(500, 500)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for step in (1, 2):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
            with pytest.raises(OptionError, match=rf"cannot write .*step-{step}: rank 0"):
                save_checkpoint(root, large, step=step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(root) == ["latest", "step-1"] and load_checkpoint(root, alone) == 1
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize(
    ("folder", "options", "said"),
    [("run", {"keep": 0}, "got 0 and 0"), ("run", {"step": -1}, "got 2 and -1"), ("file/run", {}, "cannot write to")],
)
def test_what_cannot_be_written_is_refused(tmp_path, alone, folder, options, said):
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=said):
        save_checkpoint(tmp_path / folder, alone, **options)
    assert names(tmp_path) == ["file", "store"]


class Harm:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_files_are_data(tmp_path, alone):
    """Neither the table of contents nor what is not a tensor runs code."""
    harm = Harm(tmp_path / "harmed")
    place = save_checkpoint(tmp_path / "run", alone, step=1)
    table = (place / ".metadata").read_bytes()
    (place / ".metadata").write_bytes(pickle.dumps(harm))
    with pytest.raises(InputError, match=r"names (os|posix)\.mkdir"):
        load_checkpoint(tmp_path / "run", alone)
    (place / ".metadata").write_bytes(table)
    shutil.rmtree(place)
    dcp.save({"model": alone.state_dict(), "optimizer": {}, "step": harm}, checkpoint_id=place)
    with pytest.raises(InputError, match=r"cannot load .*Weights only load failed"):
        load_checkpoint(tmp_path / "run", alone)
    assert not (tmp_path / "harmed").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path, alone):
    pair = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    adam = lambda model: torch.optim.Adam(model.parameters())  # noqa: E731
    save_checkpoint(tmp_path, pair, adam(pair))
    cases = (
        (
            nn.Sequential(nn.Linear(2, 2)),
            adam,
            r"model or the optimizer lacks \d+: model.1.bias, model.1.weight, optimizer",
        ),
        (nn.Sequential(*pair, nn.Linear(2, 2)), adam, r"the checkpoint lacks \d+: model.2.bias, model.2.weight"),
        (pair, lambda model: torch.optim.SGD(model.parameters()), r"the checkpoint lacks \d+: optimizer.param_groups"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2)), adam, r"torch.Size\(\[2, 2\]\).*torch.Size\(\[2, 3\]\)"),
    )
    for model, optimizer, said in cases:
        with pytest.raises(InputError, match=said):
            load_checkpoint(tmp_path, model, optimizer(model))
    assert load_checkpoint(tmp_path, pair) == 0  # weights without an optimizer
    save_checkpoint(tmp_path, pair, torch.optim.SGD(pair.parameters(), momentum=0.9))
    with pytest.raises(ModelError, match=r"lacks \d+: optimizer.state.0.bias.momentum_buffer"):
        load_checkpoint(tmp_path, pair, torch.optim.SGD(pair.parameters()))


def test_exports_are_whole_folders(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(checkpoint, "full_state_dict", lambda model: dict(model.state_dict()))
    export_safetensors(alone, tmp_path / "deep" / "new")
    assert names(tmp_path / "deep" / "new") == ["model.safetensors"]
    with pytest.raises(OptionError, match="not empty"):
        export_safetensors(alone, tmp_path / "deep" / "new")

    class Half(nn.Linear):
        def save_pretrained(self, place, state_dict):
            (place / "half").touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(OptionError, match="No space left"):
        export_safetensors(Half(2, 2), tmp_path / "deep" / "other")
    assert names(tmp_path / "deep") == ["new"]
