"""Planning needs nothing that Linux alone has: it runs where that is taken away, as it would on macOS."""

import subprocess
import sys
from pathlib import Path

import poise

TRACE = Path(poise.__file__).parent / "data" / "demo_trace.npz"
ELSEWHERE = """
import os, sys
GONE = ["O_TMPFILE", "O_PATH", "getxattr", "setxattr", "removexattr", "listxattr", "sched_getaffinity", "sched_setaffinity", "memfd_create",
        "unshare", "setns", "pidfd_open", "copy_file_range", "splice", "eventfd", "posix_fadvise"]
for name in GONE:
    if hasattr(os, name):
        delattr(os, name)
def no_proc(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))
ismount = os.path.ismount
os.path.ismount = lambda path: False if str(path).startswith("/proc") else ismount(path)
import numpy, scipy, rich, typer, multiprocessing  # what others do at import is theirs
sys.addaudithook(no_proc)
from poise.cli.main import app
trace = sys.argv[1]
for words in (
    ["inspect", trace, "--json"],
    ["plan", trace, "-c", "1x4", "--method", "contiguous", "--no-verdict", "--work", "0.1", "-n", "2048", "-o", "p.npz"],
    ["plan", trace, "-c", "1x4", "--method", "round-robin", "--no-verdict", "--work", "0.1", "-n", "2048", "-o", "p.npz"],
    ["export", "p.npz", "--to", "sglang", "--num-hidden-layers", "8", "-o", "e.json"],
    ["diff", "p.npz", "p.npz"],
):
    try:
        app(words)
    except SystemExit as end:
        if end.code:
            raise
"""


def test_plans_are_made_and_written_without_what_linux_alone_has(tmp_path):
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(TRACE)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "p.npz"], "nothing is left beside"


def test_what_is_taken_away_is_gone(tmp_path):
    code = ELSEWHERE.partition("from poise")[0] + "open('/proc/self/status')"
    done = subprocess.run([sys.executable, "-c", code, "x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "FileNotFoundError" in done.stderr, "the test sees nothing"
