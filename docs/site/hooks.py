"""What the site does with pages that were written for the repository: links that leave ``docs``, and Sphinx's roles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "benchmarks" / "reports"
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
ROLE = re.compile(r":(?:func|class|data|attr|meth|mod|exc|ref):<code>")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Dated reports are pages, too: figures link to them."""
    for path in sorted(REPORTS.glob("*.md")):
        files.append(File.generated(config, f"reports/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links out of ``docs``: to a report, to its page; to any other file of the repository, its path as text."""
    uri = page.file.src_uri
    folder = REPORTS if uri.startswith("reports/") else (ROOT / "docs" / uri).parent

    def link(found: re.Match[str]) -> str:
        words, target = found[1], found[2].partition("#")[0]
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT / "docs") and not uri.startswith("reports/"):
            return found[0]
        up = "../" * uri.count("/")
        if path.parent == REPORTS and path.suffix == ".md":
            return f"[{words}]({up}reports/{path.name})"
        if path.is_relative_to(ROOT / "docs"):
            return f"[{words}]({up}{path.relative_to(ROOT / 'docs')})"
        if not path.exists():
            raise FileNotFoundError(f"{uri} links to {found[2]}, which is not there")
        name = str(path.relative_to(ROOT))
        return words if words.strip("`") == name else f"{words} (`{name}`)"

    return LINK.sub(link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name functions as Sphinx does; here the name alone is shown."""
    return ROLE.sub("<code>", html).replace("<code>~", "<code>")
