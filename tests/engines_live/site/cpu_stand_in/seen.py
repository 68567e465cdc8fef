"""What was seen in this process: maps that ran, and how often what a run may wait for came."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

COUNTS: Counter[str] = Counter()
"""``changes`` of the live map; what else an engine's witness counts."""


class Maps:
    """A line of JSON with every map of slots to experts [L][S] that runs, in order, the one at the start first."""

    def __init__(self, path: str) -> None:
        self._path, self._last = Path(path), None

    def note(self, table: Any) -> None:
        """The map that runs now, as lists."""
        if table == self._last:
            return
        COUNTS["changes"] += self._last is not None
        self._last = table
        with self._path.open("a") as out:
            out.write(json.dumps({"map": table}) + "\n")
