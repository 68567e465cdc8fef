"""Axes of pictures say what they are."""

import re

import numpy as np

from poise.report import charts


def cells(down, across, rows=("0", "1"), columns=("0", "1", "2")):
    shape = (len(rows), len(columns))
    return charts.Grid("caption", rows, columns, ("hot",), np.zeros(shape, int), np.ones(shape), np.ones(shape), "{v}",
                       down, across)  # fmt: skip


def test_a_grid_says_what_its_rows_and_columns_are():
    drawn = charts.grid(cells("from", "to device"))
    words = {
        found[3]: (float(found[1]), float(found[2]))
        for found in re.finditer(r'<text x="([\d.-]+)" y="([\d.-]+)"[^>]*>([^<]*)</text>', drawn)
    }
    assert {"from \u2193", "to device \u2192"} <= set(words)
    left, top = map(float, re.search(r'class="cells" transform="translate\(([\d.]+) ([\d.]+)\)', drawn).groups())
    assert words["from \u2193"][0] < left and words["from \u2193"][1] < top
    assert words["to device \u2192"][1] < top - 11, "above the names of the columns"
    assert left >= 6.5 * len("from \u2193"), "it is not cut off"
