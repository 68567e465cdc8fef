"""In a container whose root is read-only, for a user without a home or a name, with no folder for temporary files.

The file systems are really read-only: in a mount namespace of the test's own, where the kernel lets it have one.
"""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from tests.engines.test_plugin_imports import CALL, LOAD, STUBS
from tests.helpers import few_or

import poise
from poise.planning.placement import Placement

READ_ONLY = """
mount --make-rprivate / && mount --bind "$1" "$1" || exit 99
while read -r _ point _; do
    [ "$point" = "$1" ] || mount -o remount,bind,ro "$point" 2> /dev/null
done < /proc/self/mounts
for folder in / /tmp /var/tmp /dev/shm "$2"; do
    if [ -d "$folder" ] && touch "$folder/.poise-written" 2> /dev/null; then
        rm "$folder/.poise-written"; exit 99
    fi
done
cd / && shift 2 && exec "$@"
"""
NOBODY = "import pwd\ndef unknown(*_): raise KeyError('uid')\npwd.getpwuid = pwd.getpwnam = unknown\n"
POISE = f"""{NOBODY}
import json, sys
from poise.cli.main import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        print(f"exit code {{end.code}}", file=sys.stderr)
"""
TRACE = str(Path(poise.__file__).parent / "data" / "demo_trace.npz")
PLAN = ("plan", TRACE, "--cluster", "1x4", "--method", "contiguous", "--no-verdict")


@pytest.fixture
def run(tmp_path):
    """Python code and its arguments where nothing but one folder can be written."""
    out = tmp_path / "out"
    out.mkdir()
    apart = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}

    def once(code, *arguments, **variables):
        command = [*apart, "sh", "-c", READ_ONLY, "sh", str(out), str(Path(TRACE).parent)]
        try:
            done = subprocess.run([*command, sys.executable, "-B", "-c", code, *arguments],
                                  capture_output=True, text=True, env=environ | variables)  # fmt: skip
        except FileNotFoundError:
            pytest.skip("there is no unshare")
        if done.returncode == 99 or "unshare" in done.stderr:
            pytest.skip(f"file systems cannot be made read-only here: {done.stderr[-200:]}")
        return done

    once.out = out
    return once


def test_help_a_plan_and_what_cannot_be_written(run):
    """A plan is in ``make test-all``: what it computes with is compiled anew, as the plugins' functions below."""
    whole = few_or(True, False)
    elsewhere = f"/tmp/{uuid.uuid4().hex[:8]}.npz"
    plans = [[*PLAN, "-o", str(run.out / "p.npz")], [*PLAN, "-o", elsewhere]]
    done = run(POISE, json.dumps([["--help"], *plans[not whole :]]))
    assert "calibrate" in done.stdout and "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(("exit", "error"))]
    assert said == [
        *["exit code 0"] * (1 + whole),
        f"error: cannot write '{elsewhere}': Read-only file system",
        "exit code 2",
    ]
    assert not whole or Placement.load(run.out / "p.npz").num_devices == 4
    assert [path.name for path in run.out.iterdir()] == ["p.npz"] * whole


def test_plugins(run):
    """Wanted or not; compiled functions work without a cache."""
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        done = run(NOBODY + LOAD.format(group=group) + "assert not foreign, foreign\n")
        assert done.returncode == 0, done.stderr
    Placement(np.array([[3, 0, 2, 1, 2, 0]] * 2), np.repeat([0, 1], 3), 4, 2).save(run.out / "p.npz")
    done = run(NOBODY + STUBS + LOAD.format(group="vllm.general_plugins") + CALL + "print(map_.tolist())",
               POISE_STATIC_MAP=str(run.out / "p.npz"))  # fmt: skip
    assert done.stdout.strip() == str([[3, 0, 2, 1, 2, 0]] * 2), done.stderr
    done = run(f"{NOBODY}from poise.planning.methods.eplb import replicate_experts\n"
               "import numpy as np\nprint(replicate_experts(np.array([[3.0, 1.0]]), 3)[0].tolist())")  # fmt: skip
    assert done.stdout.strip() == "[[0, 1, 0]]", done.stderr
