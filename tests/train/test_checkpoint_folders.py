"""Folders of training checkpoints: what is named is whole, whenever a write ends."""

import shutil

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from poise.errors import InputError, OptionError
from poise.train import checkpoint
from poise.train.checkpoint import export_safetensors, latest_checkpoint, save_checkpoint


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of one rank, and a model without experts."""
    monkeypatch.setattr(checkpoint, "sharded_layers", lambda model: [])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield nn.Linear(2, 2)
    dist.destroy_process_group()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_checkpoint_just_written_is_never_the_one_removed(tmp_path, alone):
    """After a return to an earlier step its number is not among the highest."""
    root = tmp_path / "run"
    for step in (10, 20, 30):
        save_checkpoint(root, alone, step=step)
    assert names(root) == ["latest", "step-20", "step-30"]
    assert latest_checkpoint(save_checkpoint(root, alone, step=5).parent) == root / "step-5"
    assert names(root) == ["latest", "step-20", "step-30", "step-5"]


@pytest.mark.parametrize("after", range(1, 7))
def test_a_step_written_anew_and_killed_leaves_a_whole_one(tmp_path, alone, monkeypatch, after):
    """Ended before the first, second, ... change of a name or removal of a folder."""
    root = tmp_path / "run"
    place = save_checkpoint(root, alone, step=1)
    whole = names(place)
    done = 0

    def counted(real):
        def call(*args, **more):
            nonlocal done
            done += 1
            if done >= after:
                raise KeyboardInterrupt
            return real(*args, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(checkpoint.Path, "rename", counted(checkpoint.Path.rename))
        with pytest.raises((KeyboardInterrupt, CheckpointException)):  # torch's own rename is among them
            save_checkpoint(root, alone, step=1)
    found = latest_checkpoint(root)
    assert found is not None and names(found) == whole
    assert save_checkpoint(root, alone, step=1) == place and latest_checkpoint(root) == place
    assert names(root) == ["latest", "step-1"]


def test_what_is_named_and_nowhere_is_an_error(tmp_path):
    (tmp_path / "latest").write_text("step-3")
    with pytest.raises(InputError, match="not there"):
        latest_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("../step-3")
    (tmp_path / ".step-3.old").mkdir()
    with pytest.raises(InputError, match="not there"):
        latest_checkpoint(tmp_path)


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
