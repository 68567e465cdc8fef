"""docs/recipes: every page is what benchmarks/recipes.py makes; the figures of the cheap ones are made again."""

import pytest
from benchmarks import recipes
from tests.helpers import few_or

from poise.machine.presets import MODELS

PAGES = {one.name: one for one in recipes.RECIPES}
CHEAP = ("gpt-oss-120b", "qwen3-next")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_table_makes(name):
    text = (recipes.DOCS / f"{name}.md").read_text("utf-8")
    made = recipes.made_lines(text)
    assert text == recipes.page(PAGES[name], made), "python benchmarks/recipes.py makes it"
    rows = [line for line in made if line.startswith("| ")]
    assert len(rows) == len(PAGES[name].rows) and all(row.count("|") == len(recipes.HEADS) + 1 for row in rows)
    assert PAGES[name].model in MODELS and any(line.startswith("- ") for line in made)


@pytest.mark.parametrize("name", few_or(tuple(PAGES), CHEAP))
def test_its_figures_are_what_a_verdict_says(name):
    assert recipes.figures(PAGES[name]) == recipes.made_lines((recipes.DOCS / f"{name}.md").read_text("utf-8"))


def test_every_page_is_in_the_table():
    assert {path.stem for path in recipes.DOCS.glob("*.md")} == {*PAGES, "index"}
    index = (recipes.DOCS / "index.md").read_text("utf-8")
    assert all(f"({name}.md)" in index for name in PAGES)
