"""What if: other redundant slots, another batch, another machine. Priced beforehand; the page only chooses."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from poise.replay.compare import NOT_WORTH
from poise.replay.verdict import MS
from poise.replay.what_if import WhatIf
from poise.report import charts
from poise.util.words import percent

BOUND = "bound"


def section(found: WhatIf) -> str:
    """Three groups of choices, a bar a map, and what the best one saves; without a script the report's own setting."""
    lead = (
        "Maps planned anew for other redundant slots; at other batches and on other machines of this shape the same "
        "maps, priced again. Milliseconds are those of the recorded MoE layers of a step of the judged traffic; beside "
        "them the tokens of the fullest device over the mean."
    )
    choices = (
        ("redundant", "redundant slots", [f"{many:,}" for many in found.redundant]),
        ("tokens", "tokens a step", [f"{many:,}" for many in found.tokens]),
        ("machine", "machine", list(found.machines)),
    )
    groups = "".join(_choice(*one, at) for one, at in zip(choices, found.here, strict=True))
    figures = _figures(found)
    r, n, m = found.here
    here = figures[r][n][m]
    data = {"figures": figures, "worth": NOT_WORTH, "maps": list(found.maps)}
    body = (
        f'<figure class="panel what-if" id="what-if"><div class="choices needs-js">{groups}</div>'
        f'{_bars((*found.maps, BOUND), here)}<output aria-live="polite">{escape(_said(found.maps, here))}</output>'
        f"{charts.as_script(data)}</figure>"
    )
    return charts.section("whatif", "What if", escape(lead), body)


def _choice(key: str, words: str, options: Sequence[str], at: int) -> str:
    inputs = "".join(
        f'<label><input type="radio" name="what-if-{key}" value="{index}"{" checked" if index == at else ""}>'
        f"<span>{escape(option)}</span></label>"
        for index, option in enumerate(options)
    )
    return f"<fieldset><legend>{escape(words)}</legend>{inputs}</fieldset>"


def _figures(found: WhatIf) -> list[list[list[list[list[float | None]]]]]:
    """[R][N][M], of each map and of the bound: milliseconds and imbalance; None where there is no such map."""
    bound_RNM1 = np.stack([found.bound_RNM, np.ones_like(found.bound_RNM)], axis=-1)[..., None, :]
    maps_RNMA2 = np.stack([found.seconds_RNMA, found.imbalance_RNMA], axis=-1)
    every = np.concatenate([maps_RNMA2, bound_RNM1], axis=3)
    every[..., 0] *= MS
    return [[[[[None if np.isnan(x) else float(f"{x:.5g}") for x in pair] for pair in maps] for maps in by_m]
             for by_m in by_n] for by_n in every.tolist()]  # fmt: skip


def _bars(names: Sequence[str], figures: Sequence[Sequence[float | None]]) -> str:
    """A row a map, the bound last: its name, a bar, its figures. Nothing is told by colour alone."""
    most = max(ms or 0.0 for ms, _ in figures)
    rows = []
    for row, (name, (ms, even)) in enumerate(zip(names, figures, strict=True)):
        bound = row == len(names) - 1
        rows.append(
            f'<tr><th scope="row">{escape(charts.shorten(name))}</th><td class="track">'
            f'<i class="{"bound" if bound else "map"}" style="width:{100 * (ms or 0.0) / most:.2f}%"></i></td>'
            f'<td class="figure">{_words(ms, even, bound=bound)}</td></tr>'
        )
    return f'<table class="bars"><tbody>{"".join(rows)}</tbody></table>'


def _words(ms: float | None, even: float | None, *, bound: bool) -> str:
    if ms is None or even is None:
        return "no such map"
    return f"{ms:.2f} ms" if bound else f"{ms:.2f} ms, {even:.2f} × mean"


def _said(maps: Sequence[str], figures: Sequence[Sequence[float | None]]) -> str:
    """The sentence that page.js makes, too."""
    there = {name: ms for name, (ms, _) in zip(maps, figures, strict=False) if ms is not None}
    if maps[0] not in there:
        return f"{maps[0]} does not exist with these slots."
    best = min(there, key=there.__getitem__)
    saved = 1 - there[best] / there[maps[0]]
    if saved < NOT_WORTH:
        return f"Not worth it: nothing saves 1 % over {maps[0]}."
    return f"{best} saves {percent(saved)} over {maps[0]}."
