"""Serving against the plain transformers model, all cases in one launch.

    torchrun --standalone --nproc-per-node 4 tests/serve/run_cases.py --out results.jsonl [case ...]

Every case asserts on all ranks alike and returns what it measured; the modules add theirs when they are imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.serve import serving_batches, serving_disk, serving_logits, serving_misuse, serving_swaps  # noqa: F401
from tests.serve.harness import CASES

if __name__ == "__main__":
    run_cases(CASES, read_options())
