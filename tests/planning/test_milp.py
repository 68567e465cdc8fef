"""HiGHS beside other threads: nothing of theirs on stdout is lost, nothing of HiGHS's is added."""

import subprocess
import sys

SOLVES, THREADS = 50, 3
CODE = f"""
import ctypes, os, sys, threading
import numpy as np
from poise.planning.budget import Budget
from poise.planning.solve.milp import Milp

sys.setswitchinterval(1e-5)
solved, written = threading.Event(), [0] * {THREADS}

def write(who):
    while not solved.is_set() or written[who] < 500:
        os.write(1, f"{{who}} {{written[who]}}\\n".encode())
        written[who] += 1

threads = [threading.Thread(target=write, args=(who,)) for who in range({THREADS})]
[thread.start() for thread in threads]
for seed in range({SOLVES}):
    milp = Milp()
    cost = np.random.default_rng(seed).uniform(-1, 1, 6)
    columns = milp.columns(cost)
    milp.row(1, columns, 1.0, 3)
    want = min(np.cumsum(np.sort(cost))[:3])
    assert abs(milp.solve(budget=Budget(5.0), stage="test").objective - want) < 1e-9
solved.set()
[thread.join() for thread in threads]
ctypes.CDLL(None).fflush(None)  # what C code has printed
os.write(2, " ".join(map(str, written)).encode())
"""


def test_the_whole_process_keeps_its_stdout():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    counts = [int(count) for count in done.stderr.split()]
    lines = done.stdout.splitlines()
    for who, count in enumerate(counts):
        assert [line for line in lines if line.startswith(f"{who} ")] == [f"{who} {k}" for k in range(count)]
    assert len(lines) == sum(counts)
