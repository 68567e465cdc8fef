"""The page: verdict, pictures, table. No network, no library; every name is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from poise.evaluate.compare import IN_SAMPLE, Comparison
from poise.evaluate.report import charts
from poise.planning.placement import atomic

COLUMNS = (
    ("imbalance", "imbalance", "max / mean tokens over devices, mean over steps and layers"),
    ("imbalance_p99", "p99", "99th percentile of the same"),
    ("cross_device_share", "off device", "token-expert pairs computed on another device than the token's"),
    ("cross_node_share", "off node", "the same for nodes"),
    ("mean", "step ms", "modelled milliseconds of all MoE layers of one step, mean"),
    ("p99", "p99 ms", "99th percentile over steps"),
    ("efficiency", "efficiency", "least possible time / time, with this row's memory"),
    ("speedup", "speedup", "time of the first row / time"),
)


def write_report(comparison: Comparison, path: str | Path) -> None:
    """Write one self-contained HTML file; it appears whole or not at all.

    Raises
    ------
    PlacementError : the file cannot be written.
    """
    with atomic(Path(path)) as stream:
        stream.write(render(comparison).encode())


def render(comparison: Comparison) -> str:
    """The page as a string."""
    folder = files("poise.evaluate.report")
    page = (folder / "page.html").read_text("utf-8")
    parts = {
        "STYLE": (folder / "page.css").read_text("utf-8"),
        "SCRIPT": (folder / "page.js").read_text("utf-8"),
        "VERDICT": escape(comparison.verdict()),
        "CARDS": _cards(comparison),
        "HEAT": _heat(comparison),
        "STEPS": charts.steps_chart(_samples(comparison, comparison.judged_on)),
        "SHIFT": charts.shift_chart(_means(comparison)),
        "TABLES": "\n".join(_table(comparison, part) for part in comparison.batches),
        "FACTS": _facts(comparison),
        "JUDGED": escape(comparison.judged_on),
    }
    for key, value in parts.items():
        page = page.replace(f"{{{{{key}}}}}", value)
    return page


def best_name(comparison: Comparison) -> str:
    """The entry with the least mean step time on the judged traffic."""
    part = comparison.judged_on
    return min(
        (entry.name for entry in comparison.entries),
        key=lambda name: float(comparison.replays[name, part].step_seconds_B.mean()),
    )


def _cards(comparison: Comparison) -> str:
    part, base, best = comparison.judged_on, comparison.entries[0].name, best_name(comparison)
    first, now = comparison.replays[base, part], comparison.replays[best, part]
    cards = (
        (
            "MoE time a step",
            f"{1e3 * now.step_seconds_B.mean():.3f} ms",
            f"{base}: {1e3 * first.step_seconds_B.mean():.3f} ms",
        ),
        ("imbalance", f"{now.imbalance:.3f}", f"{base}: {first.imbalance:.3f}"),
        ("off node", f"{now.cross_node_share:.1%}", f"{base}: {first.cross_node_share:.1%}"),
        ("of the least possible time", f"{now.efficiency:.1%}", f"{base}: {first.efficiency:.1%}"),
    )
    return "".join(
        f'<div class="card"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="was">{escape(was)}</div></div>'
        for label, value, was in cards
    )


def _heat(comparison: Comparison) -> str:
    part, base, best = comparison.judged_on, comparison.entries[0].name, best_name(comparison)
    names = [base] if best == base else [base, best]
    tables = [comparison.replays[name, part].relative_load_LD() for name in names]
    top = max(float(table.max()) for table in tables)
    return "".join(
        charts.heat_map(name, table, comparison.batches[part].layer_ids_L.tolist(), top)
        for name, table in zip(names, tables, strict=True)
    )


def _samples(comparison: Comparison, part: str) -> list[tuple[str, Sequence[float]]]:
    out = [(e.name, (1e3 * comparison.replays[e.name, part].step_seconds_B).tolist()) for e in comparison.entries]
    return [*out, ("bound", (1e3 * comparison.bounds_B[part]).tolist())]


def _means(comparison: Comparison) -> list[tuple[str, list[tuple[str, float]]]]:
    """Per entry, imbalance on each part."""
    return [
        (e.name, [(part, comparison.replays[e.name, part].imbalance) for part in comparison.batches])
        for e in comparison.entries
    ]


def _cell(row: dict[str, Any], key: str) -> tuple[str, str]:
    """Sort value and text."""
    value = row["step_seconds"][key] * 1e3 if key in ("mean", "p99") else row[key]
    if value is None:
        return "", ""
    return f"{value:.9g}", f"{value:.1%}" if key.endswith("share") else f"{value:.3f}"


def _table(comparison: Comparison, part: str) -> str:
    rows = [row for row in comparison.rows() if row["judged_on"] == part]
    best = min(row["step_seconds"]["mean"] for row in rows[:-1])
    head = '<th scope="col"><button type="button">placement</button></th>' + "".join(
        f'<th scope="col" title="{escape(title)}"><button type="button">{escape(text)}</button></th>'
        for _, text, title in COLUMNS
    )
    body = []
    for row in rows:
        kind = "bound" if row["name"] == "bound" else "best" if row["step_seconds"]["mean"] == best else ""
        cells = "".join(
            f'<td data-value="{value}">{text}</td>' for value, text in (_cell(row, key) for key, _, _ in COLUMNS)
        )
        body.append(f'<tr class="{kind}"><th scope="row">{escape(row["name"])}</th>{cells}</tr>')
    caption = f"{part}: {comparison.batches[part].order}"
    note = " These methods were fitted on this traffic." if part == IN_SAMPLE else ""
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}.{note}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _facts(comparison: Comparison) -> str:
    c, m = comparison.cluster, comparison.model
    slots = comparison.slots_D
    facts = [
        f"Cluster {c!r}: {c.flops_per_s / 1e12:.0f} TFLOP/s, {c.memory_bytes_per_s / 1e9:.0f} GB/s memory, "
        f"{c.intra_bytes_per_s / 1e9:.0f} GB/s inside a node, {c.inter_bytes_per_s / 1e9:.1f} GB/s network a device.",
        f"Model {m.name}: {m.num_experts} experts, top-{m.top_k}, hidden {m.hidden_size}, "
        f"expert {m.expert_bytes / 1e6:.2f} MB, {m.flops_per_token / 1e6:.2f} MFLOP a token.",
        f"Traffic model {comparison.traffic}; token split {comparison.split}; {int(slots.sum())} slots a layer, "
        f"{int(slots.min())} to {int(slots.max())} a device.",
        "Step time is modelled, not measured: dispatch + slowest device's compute (roofline) + combine, all layers.",
        "Bound: no placement with these slots and no token split can need less on the same routing.",
        *comparison.notes,
    ]
    return "".join(f"<li>{escape(fact)}</li>" for fact in facts)
