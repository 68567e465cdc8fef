"""A machine that others keep busy, as a formula: right numbers, or inconclusive; on a quiet one not a word."""

import itertools
import json
import types

import numpy as np
import pytest
from typer.testing import CliRunner

from poise.cli.main import app
from poise.lab.calibrate import compute, links, ranks
from poise.lab.calibrate.fit import fit_links
from poise.lab.calibrate.links import CalibrationRanks, Effort, _Case, measure_links
from poise.lab.calibrate.patterns import port_bytes
from poise.lab.emulate import clock, quiet
from poise.machine.cluster import Cluster
from poise.util.errors import NoResultError

FIXED_S, TOKEN_S, DILATION = 2e-6, 1e-7, 1000.0


class World:
    """A clock that only sleeping moves, with wake-ups that are late, and the cores' work of others."""

    def __init__(self, monkeypatch, late=(), others=0.0, told=True):
        self.now, self.waited, self.late, self.others = clock.time.monotonic(), 0.0, iter(late), others
        self.began, self.told = self.now, told
        fake = types.SimpleNamespace(monotonic=self.clock, perf_counter=self.clock, sleep=self.sleep)
        for module in (clock, compute, links, quiet):
            monkeypatch.setattr(module, "time", fake)
        for module in (compute, links, quiet):
            monkeypatch.setattr(module, "waits_s", lambda: {"1": self.waited} if self.told else {})
        monkeypatch.setattr(quiet, "own_s", lambda: 0.0)
        cores = len(quiet.os.sched_getaffinity(0))
        monkeypatch.setattr(quiet, "busy_s", lambda: (self.now - self.began) * self.others * cores if told else None)

    def clock(self):
        return self.now

    def sleep(self, seconds):
        late = next(self.late, 0.0) * seconds
        self.now, self.waited = self.now + seconds + late, self.waited + late


def calibrate(tmp_path, seconds="30"):
    path, csv = tmp_path / "c.yaml", tmp_path / "curve.csv"
    csv.write_text(
        "tokens,active_experts,seconds\n" + "".join(f"{t},1,{FIXED_S + TOKEN_S * t}\n" for t in (8, 32, 128))
    )
    arguments = [
        "calibrate",
        "--hidden",
        "16",
        "--inner",
        "8",
        "--quick",
        "--repeats",
        "3",
        "--seconds",
        seconds,
        "--json",
    ]
    done = CliRunner().invoke(
        app, [*arguments, "--curve", str(csv), "--dilation", str(DILATION), "-o", str(path)],
        env={"RANK": None, "WORLD_SIZE": None},
    )  # fmt: skip
    return done, path


def check_right(path, rel=1e-6):
    curve = Cluster.parse(path).expert_curve
    for tokens, seconds in zip(curve.tokens_X, curve.seconds_X, strict=True):
        assert seconds == pytest.approx(DILATION * (FIXED_S + TOKEN_S * tokens), rel=rel), tokens
    return curve.tokens_X[-1]


def test_on_a_quiet_machine_numbers_are_right_and_nothing_is_said(tmp_path, monkeypatch):
    World(monkeypatch)
    done, path = calibrate(tmp_path)
    assert done.exit_code == 0 and check_right(path) == 256
    told = json.loads(done.stdout)
    assert [note for note in told["notes"] if "links were not measured" not in note] == []
    assert told["machine"]["others"] == 0 and all(row["steady"] for row in told["compute"]["rows"])
    assert "inconclusive" not in done.output.lower() and "others took 0%" in path.read_text()


def test_repeats_that_waited_are_left_out(tmp_path, monkeypatch):
    """Two of three are three times too long: a median over all would be."""
    World(monkeypatch, late=itertools.cycle([2.0, 0.0, 2.0]), others=0.7)
    done, path = calibrate(tmp_path, seconds="100")
    assert done.exit_code == 0, done.stderr
    assert check_right(path) == 256 and "others took 70% of the cores" in path.read_text()


def test_a_machine_without_a_quiet_moment_is_inconclusive_and_nothing_is_written(tmp_path, monkeypatch):
    World(monkeypatch, late=itertools.repeat(0.5), others=0.7)
    done, path = calibrate(tmp_path)
    assert done.exit_code == 1 and not done.stdout and not path.exists()
    said = " ".join(done.stderr.split())
    assert "inconclusive, experts: 6 of 6 rows" in said and "70% of the cores" in said and "hint:" in said


def test_late_by_its_own_doing_is_measured(tmp_path, monkeypatch):
    World(monkeypatch, late=itertools.repeat(0.5), others=0.0)
    done, path = calibrate(tmp_path)
    assert done.exit_code == 0 and not all(row["steady"] for row in json.loads(done.stdout)["compute"]["rows"])
    check_right(path, rel=0.51)


def test_repeats_that_differ_are_inconclusive_where_the_system_tells_nothing(tmp_path, monkeypatch):
    World(monkeypatch, late=itertools.cycle([0.0, 1.0]), told=False)
    done, path = calibrate(tmp_path)
    assert done.exit_code == 1 and "nothing tells what others did" in " ".join(done.stderr.split())
    assert not path.exists()


def test_a_curve_that_time_has_cut_says_so(tmp_path, monkeypatch):
    """At a load of 14 a calibration ended with 128 of 256 tokens, and the last knot was read as the other's."""
    World(monkeypatch)
    done, path = calibrate(tmp_path, seconds="1.5")
    assert done.exit_code == 0 and check_right(path) < 256
    assert any("time was up at" in note and "of 256 tokens" in note for note in json.loads(done.stdout)["notes"])
    assert "time was up at" in path.read_text()


class Two(CalibrationRanks):
    """Two ranks of which this is one, and the other the same."""

    def agree(self, *numbers):
        return list(numbers)


class Wires:
    """Start-up and bytes over a rate; ``late`` of each repeat comes on top, as waiting."""

    def __init__(self, late):
        self.late = late

    def __call__(self, found):
        self.ranks = found
        return self

    def seconds(self, ports):
        return 1e-3 + ports.intra / 30e6

    def case(self, name, bytes_DD, effort, tries=2):
        ports = port_bytes(bytes_DD, self.ranks.node_D)
        return _Case(name, bytes_DD.astype(np.int64), ports, 1, self.seconds(ports))

    def run(self, rows_DD, rounds):
        seconds, late = self.seconds(port_bytes(rows_DD.astype(float), self.ranks.node_D)), next(self.late)
        links.time.sleep(4 * seconds)
        return ((seconds * (1 + late), seconds * late),) * 2


def measured(monkeypatch, late):
    monkeypatch.setattr(links, "_Runner", Wires(iter(late)))
    return measure_links(Two(np.zeros(2, np.int32), None, began=clock.time.monotonic()), Effort(20.0, repeats=3))


@pytest.mark.parametrize("late", [itertools.repeat(0.0), itertools.cycle([1.0, 0.0, 1.0])])
def test_links_are_right_where_enough_repeats_were_left_alone(late, monkeypatch):
    World(monkeypatch)
    rows = measured(monkeypatch, late)
    found = fit_links(rows)
    assert all(row.steady for row in rows) and found.constants["intra_bytes_per_s"] == pytest.approx(30e6, rel=1e-3)
    assert ranks._judge_links(found, rows, 0.9) == []


def test_links_that_waited_all_the_time_are_inconclusive_if_others_were_there(monkeypatch):
    World(monkeypatch)
    rows = measured(monkeypatch, itertools.repeat(1.0))
    found = fit_links(rows)
    assert not any(row.steady for row in rows)
    with pytest.raises(NoResultError, match=r"inconclusive, intra_bytes_per_s: \d of \d rows .* 90% of the cores"):
        ranks._judge_links(found, rows, 0.9)
    assert ranks._judge_links(found, rows, 0.05) == []
    short = [
        links.replace(row, steady=not row.steady if long else False)
        for row, long in zip(rows, found.long_R, strict=True)
    ]
    [note] = ranks._judge_links(found, short, 0.9)
    assert note.startswith("start-up times are those of a busy machine")
