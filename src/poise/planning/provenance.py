"""What a placement was fitted on, by whom and how: kept in its file, so that no table calls fitted traffic held-out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.routing.fingerprint import SKETCH, Fingerprint
from poise.util.errors import PlacementError
from poise.util.jsonfile import parse_json

UNITS, LOADS, ABOUT = "fitted_units", "fitted_loads", "fitted_about"
"""Members of a placement file; all three or none."""
MAX_LOADS = 1 << 20
MAX_TEXT = 4000


@dataclass(frozen=True, slots=True, eq=False)
class Provenance:
    """Where a placement comes from.

    Parameters
    ----------
    traffic : fingerprint of what it was fitted on.
    about : what people want to know: ``traffic`` (names), ``command``, ``version``, ``seed``, ``engine``, ``method``.
    """

    traffic: Fingerprint
    about: Mapping[str, str] = field(default_factory=dict)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As members of an ``.npz``."""
        text = json.dumps(dict(self.about))
        if len(text) > MAX_TEXT:
            text = json.dumps({name: value[:60] for name, value in list(self.about.items())[:8]})
        return {UNITS: self.traffic.units, LOADS: self.traffic.loads, ABOUT: np.array(text)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Provenance:
        """What :meth:`arrays` made.

        Raises
        ------
        PlacementError : the arrays are of other types or too large, or the text is no JSON object.
        """
        for name, most in ((UNITS, SKETCH), (LOADS, MAX_LOADS)):
            array = arrays[name]
            if array.dtype != np.uint64 or array.ndim != 1 or array.size > most:
                raise PlacementError(f"{name} must be uint64 [at most {most}], got {array.dtype} {array.shape}")
        try:
            about = parse_json(str(arrays[ABOUT].reshape(-1)[0]) if arrays[ABOUT].shape == () else "", PlacementError)
        except PlacementError:
            about = None
        if not isinstance(about, dict) or not all(isinstance(x, str) for x in (*about, *about.values())):
            raise PlacementError(f"{ABOUT} is no JSON object of texts")
        return cls(Fingerprint(np.unique(arrays[UNITS]), np.unique(arrays[LOADS])), about)
