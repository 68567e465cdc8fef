"""docs/grafana.json: what it shows are metrics that a watch has, by labels that they have."""

import itertools
import json
import re
from pathlib import Path

from poise.watch.metrics import Metrics

BOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
ALSO = {"poise_layer_imbalance": {"layer"}, "poise_step_seconds_modelled": {"of"}}
"""Labels of metrics that have no value before the first look."""


def labels_by_name():
    found = {name: set(labels) for name, labels in ALSO.items()}
    for line in Metrics().text().decode().splitlines():
        if declared := re.match(r"# TYPE (\w+) ", line):
            found.setdefault(declared[1], set())
        elif sample := re.match(r"(\w+)(?:\{([^}]*)\})? ", line):
            found.setdefault(sample[1], set()).update(re.findall(r"(\w+)=", sample[2] or ""))
    return found


def test_every_expression_is_of_metrics_and_labels_that_are_there():
    have = labels_by_name()
    targets = [target for panel in BOARD["panels"] for target in panel["targets"]]
    assert len(targets) > 15
    for target in targets:
        named = re.findall(r"(poise_\w+)\{([^}]*)\}", target["expr"])
        assert named and target["expr"].count("poise_") == len(named), target["expr"]
        for name, labels in named:
            assert name in have, name
            assert set(re.findall(r"(\w+)=", labels)) - {"instance"} <= have[name], target["expr"]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) - {"instance"} <= have[name]


def test_panels_do_not_lie_on_each_other():
    spots = [panel["gridPos"] for panel in BOARD["panels"]]
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(spots)
    for a, b in itertools.combinations(spots, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart and max(a["x"] + a["w"], b["x"] + b["w"]) <= 24
