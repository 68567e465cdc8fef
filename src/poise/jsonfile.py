"""JSON files of others: sizes first, every defect a typed error. Values are the caller's to check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from poise.errors import InputError
from poise.files import read_bounded


def read_json(path: Path, most: int, error: type[InputError], *, hint: str = "") -> Any:
    """What a JSON file holds.

    Parameters
    ----------
    path : the file.
    most : bytes that are read at most.
    error : what is raised.
    hint : how to mend a file that cannot be read.

    Raises
    ------
    InputError : of the type ``error``: no such file, no regular file, too large, or not JSON.
    """
    data = read_bounded(path, most, error, hint=hint)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise error(f"{str(path)[:200]!r} is not JSON: {str(problem)[:200]}") from None
