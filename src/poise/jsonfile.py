"""JSON files of others: sizes first, every defect a typed error. Values are the caller's to check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from poise.errors import InputError


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
    InputError : of the type ``error``: no such file, too large, or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > most:
            raise error(f"{path} has {size} bytes, at most {most} are read")
        return json.loads(path.read_bytes())
    except OSError as problem:
        raise error(f"cannot read {str(path)[:200]!r}: {problem.strerror}", hint=hint) from None
    except error:
        raise
    except (ValueError, RecursionError) as problem:
        raise error(f"{str(path)[:200]!r} is not JSON: {str(problem)[:200]}") from None
