"""The docs as a site: every page in its menu, every link right, nothing fetched from elsewhere."""

import colorsys
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


def test_what_stands_after_a_colon_describes_and_types_are_the_signatures(site):
    html = (site / "api" / "planning" / "index.html").read_text()
    rows = [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", row)).strip() for row in re.findall(r"(?s)<tr.*?</tr>", html)]
    assert any(
        re.fullmatch(r"slot_expert_LS ?NDArray\[int32\] int32 \[L, S\], logical.* required", row) for row in rows
    )
    assert any(row.startswith("PlacementError shapes disagree") for row in rows)
    assert "__post_init__" not in html


def luminance(rgb):
    """WCAG 2.2, relative luminance."""
    return sum(
        w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        for w, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True)
    )


@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_links_can_be_read_on_their_ground(scheme):
    """4.5 is the least of WCAG for text; links take the colour of the head, which is dark in both schemes."""
    light, dark = (ROOT / "docs" / "pages.css").read_text().splitlines()[:2]
    line = light if scheme == "default" else dark
    colour = re.search(r"--md-typeset-a-color:#(\w{6})", line) or re.search(r"--md-primary-fg-color:#(\w{6})", line)
    link = [int(colour[1][i : i + 2], 16) / 255 for i in (0, 2, 4)]
    hue = int(re.search(r"--md-hue:(\d+)", dark)[1])
    ground = (1, 1, 1) if scheme == "default" else colorsys.hls_to_rgb(hue / 360, 0.14, 0.15)  # Material's own
    lighter, darker = sorted((luminance(link), luminance(ground)), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5
