"""What benchmarks share: terms that add up to the step, the order of repeats, pictures that stand alone."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch.distributed as dist
from benchmarks.measured import by_term, in_turn, part_events, write_curve
from benchmarks.pictures import bar_chart, line_chart, save

from poise.lab.emulate import ExpertCurve

SVG = "{http://www.w3.org/2000/svg}"


def test_terms_add_up_to_the_step():
    fronts = np.array([[0.0, 1.0, 3.0, 7.0], [0.0, 2.0, 2.0, 5.0]])
    got = by_term(fronts, ("wait", "compute", "wait"))
    assert {name: seconds.tolist() for name, seconds in got.items()} == {"wait": [5.0, 5.0], "compute": [2.0, 0.0]}
    with pytest.raises(ValueError, match="longer"):
        by_term(fronts, ("wait", "compute"))


class Row:
    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def reset(self, warm_up):
        self.seen.append(f"{self.name} reset")

    def rehearse(self, step):
        self.seen.append(f"{self.name} rehearses {step}")


def test_every_repeat_has_all_rows_and_the_order_turns(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    seen = []
    for which, repeat, step in in_turn([Row("a", seen), Row("b", seen)], {"warm_up": 3, "steps": 2, "repeats": 2}):
        seen.append(f"{'ab'[which]} {repeat}.{step}")
    first = [f"{name} {what}" for name in "ab" for what in ("reset", "rehearses 3", "reset", "0.0", "0.1")]
    assert seen == [*first, "b reset", "b 1.0", "b 1.1", "a reset", "a 1.0", "a 1.1"]


def test_parts_without_time_are_no_events():
    events = part_events(np.array([[0.0, 1.0, 1.0, 4.0]]), ("attention", "weights", "experts"))
    assert [(one.name, one.start_s, one.seconds) for one in events] == [("attention", 0.0, 1.0), ("experts", 1.0, 3.0)]


def test_the_device_clock_reads_the_curve(tmp_path):
    write_curve(tmp_path / "curve.csv", [1, 64], [0.001, 0.003])
    assert ExpertCurve.from_csv(tmp_path / "curve.csv")([64]) == pytest.approx(0.003)


def test_a_picture_is_an_svg_file_with_its_style(tmp_path):
    lines = {"split": [(64, 1.0), (256, 1.2)], "poise": [(64, 1.1), (256, 1.4)]}
    save(tmp_path / "l.svg", line_chart(lines, "devices", "static < it"))
    save(tmp_path / "b.svg", bar_chart({"contiguous": (1.0, 1.1), "poise": (0.5, 0.4)}, ("measured", "modelled"), "s"))
    drawn, bars = (ElementTree.parse(tmp_path / name).getroot() for name in ("l.svg", "b.svg"))
    assert "--part2" in drawn.find(f"{SVG}style").text
    spots = [(float(one.get("cx")), -float(one.get("cy"))) for one in drawn.iter(f"{SVG}circle")]
    assert len(spots) == 4 and spots[0][0] == spots[2][0] < spots[1][0] and spots[3] == max(spots, key=lambda s: s[1])
    words = [one.text for one in bars.iter(f"{SVG}text")]
    assert {"contiguous", "poise", "measured", "modelled", "1.1", "0.4"} <= set(words)


def test_every_script_and_every_report_is_named_where_people_look():
    """A report that nothing links is nobody's evidence; a script that no page names is not found."""
    root = Path(__file__).parents[1]
    page = (root / "benchmarks" / "README.md").read_text()
    scripts = {path.name for path in (root / "benchmarks").glob("*.py")}
    assert not {name for name in scripts if f"`{name}`" not in page}
    assert not {name for name in re.findall(r"`(\w+\.py)`", page) if name not in scripts}
    pages = [root / "README.md", root / "benchmarks" / "README.md", *(root / "docs").rglob("*.md")]
    said = "".join(path.read_text() for path in pages)
    reports = {path.name for path in (root / "benchmarks" / "reports").iterdir() if path.suffix != ".svg"}
    assert not {name for name in reports if name not in said}
    linked = re.findall(r"reports/(\d{4}-[\w.-]+)\)", said)
    assert not set(linked) - reports
