"""The whole parity matrix of sharded training, one launch per world size: policy x re-materialisation x K x W0-W7.

Usage: python benchmarks/parity.py [2 4 8/4 ...]    (8/4: on 8 ranks every fourth cell)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # noqa: F401  (the report names its version)

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import table, write

ROOT = Path(__file__).parents[1]
LIMIT = 1e-11


def main() -> None:
    parts, failed = [""], 0
    for word in sys.argv[1:] or ["2", "4", "8"]:
        world, _, every = word.partition("/")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "cells.json"
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
                 str(ROOT / "tests/train/matrix.py"), "--out", str(out), "--every", every or "1"], check=True, cwd=ROOT,
            )  # fmt: skip
            found = json.loads(out.read_text())
        cells = found["cells"]
        failed += sum(cell["error"] > LIMIT for cell in cells)
        rows = []
        for policy in dict.fromkeys(cell["policy"] for cell in cells):
            mine = [cell for cell in cells if cell["policy"] == policy]
            rows.append([policy, len(mine), sum(cell["gathered"] > 0 for cell in mine),
                         f"{max(cell['error'] for cell in mine):.1e}"])  # fmt: skip
        worst = max(cells, key=lambda cell: cell["error"])
        parts.insert(
            len(parts) - 1,
            f"## {world} ranks\n\n{len(cells)} cells in {found['seconds']:.0f} s; worst {worst['error']:.1e} "
            f"({worst['policy']}, {worst['workload']}, top-{worst['top_k']}, {worst['optimizer']})\n\n"
            + table(["policy", "cells", "cells that moved weights", "worst relative error"], rows),
        )
        parts[-1] = (
            f"Limit {LIMIT:g} on ||a - b|| / ||b|| of every loss, gradient, gradient norm and weight over 5 steps, "
            f"float64, against one dense process on all tokens; {failed} cells above it. Every other cell starts on "
            "random owners; the form of the sparse collectives changes from cell to cell."
        )
        write("parity", parts)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
