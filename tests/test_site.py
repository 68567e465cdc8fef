"""The docs as a site: every page in its menu, every link right, nothing fetched from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def menu(items):
    for item in items:
        if isinstance(item, str):
            yield item
        else:
            for value in item.values():
                yield from [value] if isinstance(value, str) else menu(value)


def test_every_page_is_in_the_menu_once():
    pages = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == pages


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    made = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr  # --strict: a link to a page that is not there, or an unknown name
    return folder


def test_reports_are_pages_and_links_to_other_files_are_text(site):
    results = (site / "results" / "index.html").read_text()
    links = re.findall(r'href="(\.\./reports/[^"#]+)"', results)
    assert links and all((site / "results" / link / "index.html").exists() for link in links)
    assert 'href="../../src' not in results and not re.search(r'href="[^"]*\.py"', results)


def test_nothing_is_fetched_from_another_host(site):
    for page in ("index.html", "idea/index.html", "api/index.html"):
        html = (site / page).read_text()
        assert not re.search(
            r'<(?:script|img|link rel="(?:stylesheet|preconnect|icon)")[^>]*(?:src|href)="(?:https?:)?//', html
        )


def test_functions_are_described_from_their_docstrings(site):
    html = (site / "api" / "index.html").read_text()
    assert "tokens_per_step" in html and 'id="poise.plan"' in html and ":func:<code>" not in html
