"""A rank that says who it is; with arguments one of them misbehaves, or hangs with all others if it is rank -1. No
torch, so that it starts at once."""

import os
import sys
import time

rank = int(os.environ["RANK"])
what, who = (sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 2 else ("", -1)
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "MASTER_ADDR")
print(*(f"{name}={os.environ[name]}" for name in names))
print(f"rank {rank} speaks", file=sys.stderr)
if what == "fail" and rank == who:
    print("something broke here", file=sys.stderr)
    sys.exit(3)
if what in ("die", "gone") and rank == who:
    os.kill(os.getpid(), 9)
if what == "gone":
    time.sleep(2.5)  # longer than ranks live after a failure
    print("went on")
if what in ("fail", "die") or (what == "hang" and who in (rank, -1)):
    time.sleep(600)
