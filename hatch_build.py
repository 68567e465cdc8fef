"""What a package index shows: the README, whose links and pictures are of files that an index does not have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

WHERE = "Source"
"""The entry of ``[project.urls]`` under which files of the repository lie; without it there are no links to them."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")


def for_index(text: str, source: str = "") -> str:
    """A README with whole addresses; without a ``source``, links are their words and pictures are gone."""

    def instead(found: re.Match[str]) -> str:
        picture, words, place = found.groups()
        words = LINK.sub(instead, words)  # a picture that is a link
        if not source:
            return "" if picture else words
        return f"{picture}[{words}]({source.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{place})"

    return re.sub(r"\n{3,}", "\n\n", LINK.sub(instead, text))


class ReadmeHook(MetadataHookInterface):
    """Fills in ``readme``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """See :func:`for_index`."""
        text = (Path(self.root) / "README.md").read_text("utf-8")
        source = metadata.get("urls", {}).get(WHERE, "")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_index(text, source)}
