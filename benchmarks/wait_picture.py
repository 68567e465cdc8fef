"""The picture of docs/idea.md: the devices of one layer at their tokens, before and after, on the demo's traffic.

python benchmarks/wait_picture.py docs/wait.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from pictures import save

from poise.cli.demo import compared
from poise.report import charts
from poise.report.sections.wait import drawings
from poise.report.view import View

CAPTION = 26.0


def picture(view: View) -> str:
    """Both maps of the report's first section side by side, with captions."""
    layer, _, pictures = drawings(view)
    body = "".join(
        f'<g transform="translate({index * charts.HALF} 0)">{charts.text(12, 18, f"{name}: {fullest:.2f} × mean")}'
        f'<g transform="translate(0 {CAPTION})">{inside}</g></g>'
        for index, (name, fullest, inside, _) in enumerate(pictures)
    )
    high = CAPTION + max(high for *_, high in pictures)
    return charts.svg(charts.HALF * len(pictures), high, f"Devices of layer {layer} at their tokens", body)


if __name__ == "__main__":
    save(Path(sys.argv[1]), picture(View.of(compared()[0])))
