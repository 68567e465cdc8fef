"""The picture of a layer that waits: what is drawn are the loads."""

import re

import numpy as np
import pytest

import poise
from poise.report.sections import wait
from poise.report.view import View


def rows(drawing):
    """By y, the dots of each device in a drawing."""
    path = re.search(r'class="experts" d="([^"]*)"', drawing)[1]
    spots = np.array([[float(x) for x in found] for found in re.findall(r"M([\d.]+) ([\d.]+)h", path)])
    return [int((spots[:, 1] == y).sum()) for y in np.unique(spots[:, 1])]


def view(load_E, devices):
    return View.of(poise.compare(poise.LoadProfile(np.asarray(load_E, float).reshape(1, 1, -1)), f"1x{devices}",
                                 placements=["contiguous", "lpt"]))  # fmt: skip


def test_dots_are_the_loads_and_both_maps_have_one_scale():
    seen = view([60, 20, 15, 5, 4, 4, 4, 8], 4)  # contiguous: 80, 20, 8, 12; lpt: 64, 24, 19, 13
    before, after = wait.section(seen).split("<figure")[1:]
    assert rows(before) == [40, 10, 4, 6], "40 dots are 80 tokens"
    assert sorted(rows(after)) == [7, 10, 12, 32], "a share of a dot is drawn as one"
    assert "contiguous: 2.67 × mean" in before and "lpt: 2.13 × mean" in after


def test_rows_end_where_their_tokens_do():
    """Also amid a dot: whole ones would reach beyond the end of the layer."""
    seen, wide = view([60, 20, 15, 5, 4, 4, 4, 8], 4), wait.charts.HALF - wait.LEFT - wait.RIGHT
    for drawing, tokens in zip(
        wait.section(seen).split("<figure")[1:], ([8, 12, 20, 80], [13, 19, 24, 64]), strict=True
    ):
        path = re.search(r'class="experts" d="([^"]*)"', drawing)[1]
        ends = {}
        for x, y, w in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", path):
            ends[y] = max(ends.get(y, 0.0), float(x) + float(w) + 1)  # a gap of 1 on each side of a dot
        np.testing.assert_allclose(sorted(ends.values()), wait.LEFT + wide * np.array(tokens) / 80, atol=0.11)


@pytest.mark.parametrize("devices", [16, 17, 64])
def test_of_many_devices_the_fullest_of_each_map_are_drawn(devices):
    load_E = np.random.default_rng(devices).pareto(1.2, 2 * devices) + 0.1
    drawing = wait.section(view(load_E, devices))
    for picture in drawing.split("<figure")[1:]:
        assert len(rows(picture)) <= wait.MOST_ROWS
    assert max(rows(drawing.split("<figure")[1])) == wait.DOTS
    assert (f"of {devices} devices" in drawing) == (devices > wait.MOST_ROWS)
    lpt = view(load_E, devices).replay(view(load_E, devices).fixed).relative_load_LD()[0]
    assert f">{int(lpt.argmax())}<" in drawing.split("<figure")[2]
