"""What tests of written files share: names under which no file can be written, one way to write, waiting."""

import multiprocessing
import os
import socket
import stat
import time
from pathlib import Path

import pytest

from poise.util.errors import OptionError
from poise.util.files import replacing

ROOT = os.geteuid() == 0
NOBODY, OTHERS = 65534, 1235
as_root = pytest.mark.skipif(not ROOT, reason="only root may do this")
FORK = multiprocessing.get_context("fork")
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
