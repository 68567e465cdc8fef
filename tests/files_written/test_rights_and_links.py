"""Modes, owners, access lists and links of a file stay when it is written anew."""

import os
import shutil
import stat
import struct
import time
from pathlib import Path

import pytest
from tests.files_written.support import FORK, NOBODY, OTHERS, as_root, names, write

from poise.util.errors import InputError, OptionError
from poise.util.files import check_new_folder, check_output, new_folder, replacing


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
