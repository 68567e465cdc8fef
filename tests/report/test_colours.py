"""Colours of a report can be told apart by everybody, on light and on dark ground."""

import re
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest

STYLE = (files("poise.report") / "page.css").read_text("utf-8")
SEES = {  # Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as it is seen
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TOGETHER = (("dispatch", "experts", "combine", "keys", "idle"), ("stay", "near", "far"), ("hot", "cold"),
            ("part0", "part1", "part2", "part3"), ("experts", "idle"))  # fmt: skip
"""Kinds that stand beside one another in a picture."""
APART, SEEN = 15.0, 3.0
"""Least distance in CIE Lab, of which 2.3 is just noticed; least contrast of what is drawn with what it is drawn on."""


def scheme(which):
    """Colours of the style sheet by name, linear RGB."""
    roots = re.findall(r":root\{([^}]*)\}", STYLE)
    pairs = [pair.split(":") for pair in roots[which].replace("\n", "").split(";") if pair.startswith("--")]
    first = dict(pair.split(":") for pair in roots[0].replace("\n", "").split(";") if pair.startswith("--"))
    named = {**first, **dict(pairs)}
    return {name[2:]: linear(value) for name, value in named.items() if value.startswith("#")}


def linear(text):
    digits = text[1:] if len(text) == 7 else "".join(2 * one for one in text[1:])
    part = np.array([int(digits[at : at + 2], 16) for at in (0, 2, 4)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    part = xyz / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(part > 0.008856, np.cbrt(part), 7.787 * part + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("who", SEES)
@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_kinds_of_a_picture_are_told_apart(which, who):
    colours = scheme(which)
    for group in TOGETHER:
        for a, b in combinations(group, 2):
            seen = [lab(np.clip(np.array(SEES[who]) @ colours[name], 0, 1)) for name in (a, b)]
            assert np.linalg.norm(seen[0] - seen[1]) >= APART, (a, b)


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_what_is_drawn_stands_out_from_its_panel(which):
    colours = scheme(which)
    for name in {name for group in TOGETHER for name in group} - {"idle"}:
        lights = sorted(0.05 + np.array([0.2126, 0.7152, 0.0722]) @ colours[one] for one in (name, "panel"))
        assert lights[1] / lights[0] >= SEEN, name
