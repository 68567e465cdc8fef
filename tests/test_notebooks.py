"""What a notebook shows of results is whole and harmless, and the notebook among the examples runs."""

import ast
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.cli.test_hostile_names import ACTS, EVIL

import poise
from poise.replay.compare import Comparison
from poise.routing.synthetic import zipf_trace

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
TRACE = zipf_trace(num_tokens=400, num_layers=2, num_experts=8, top_k=2, tokens_per_request=8, seed=1)
COMMON = {"model": "mixtral-8x7b", "tokens_per_step": 64}


class Page(HTMLParser):
    """Tags and texts; a tag that does not end is an error."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.cells, self.text, self.open = [], [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    spec = poise.ModelSpec.generic(8, 2, [0, 1])
    return poise.compare(TRACE, "1x4:h100", placements=("contiguous", "lpt"), model=spec, tokens_per_step=64, work=0.1)


def test_a_solution_shows_each_term_beside_its_bound():
    solution = poise.plan(TRACE, "1x4:h100", method="lpt", tokens_per_step=64, work=0.1)
    page = Page(solution._repr_html_())
    assert page.cells[:4] == ["term", "us", "lower bound us", "gap"] and page.cells[-4] == "all"
    assert page.cells[-3] == f"{1e6 * solution.objective:.2f}" and page.cells[-2] == f"{1e6 * solution.lower_bound:.2f}"
    assert {name for name, term in solution.terms.items() if term.seconds} <= set(page.cells)
    evil = replace(solution, method=EVIL)._repr_html_()
    assert not ACTS.search(evil) and "img" not in Page(evil).tags and "<img src=x>" in Page(evil).text


def test_a_comparison_shows_what_its_table_shows(comparison):
    page = Page(comparison._repr_html_())
    assert page.tags.count("table") == len(comparison.batches) and comparison.verdict() in page.text
    assert page.cells.count("bound") == len(comparison.batches) and {"contiguous", "lpt"} <= {
        cell.split(" (")[0] for cell in page.cells
    }
    for row in comparison.rows():
        assert f"{row['efficiency']:.3f}" in page.cells and f"{1e3 * row['step_seconds']['mean']:.3f}" in page.cells
    evil = replace(comparison, notes=(EVIL,))._repr_html_()
    assert not ACTS.search(evil) and "img" not in Page(evil).tags and "<img src=x>" in Page(evil).text


def test_a_verdict_shows_its_word_its_tables_and_its_basis():
    config = poise.ModelSpec.parse("mixtral-8x7b")
    trace = zipf_trace(
        num_tokens=400, num_layers=config.num_hidden_layers, num_experts=8, top_k=2, tokens_per_request=8, seed=1
    )
    found = poise.verdict(
        trace, cluster="1x4:h100", model="mixtral-8x7b", redundant=4, phase="prefill", tokens_per_step=64, work=0.1
    )
    page = Page(found._repr_html_())
    assert (
        found.sentence() in page.text and found.basis() in page.text and page.tags.count("table") == len(found.phases)
    )
    for one in found.phases:
        assert all(line in page.text for line in one.lines()) and all(
            cell in page.cells for row in one.cells() for cell in row
        )
    evil = replace(found, notes=(EVIL,))._repr_html_()
    assert not ACTS.search(evil) and "img" not in Page(evil).tags


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebook_runs_as_it_stands(path, tmp_path, monkeypatch):
    """Cell by cell, as a kernel would: what the last expression of a cell is, is shown."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text("utf-8"))["cells"]
    names, shown = {}, []
    for cell in cells:
        assert cell["cell_type"] in ("code", "markdown") and not cell.get("outputs"), (
            "a notebook is kept without outputs"
        )
        if cell["cell_type"] == "code":
            body = ast.parse("".join(cell["source"])).body
            last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), path.name, "exec"), names)
            value = None if last is None else eval(compile(last, path.name, "eval"), names)
            if value is not None:
                shown.append(Page(value._repr_html_()))
    assert len(shown) == 2 and all(page.cells for page in shown) and (tmp_path / "placement.npz").is_file()


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["first_plan.ipynb"]
