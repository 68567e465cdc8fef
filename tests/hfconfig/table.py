"""The tables of docs/models.md: ``python -m tests.hfconfig.table`` writes them anew."""

import json
from pathlib import Path

import transformers
from tests.hfconfig import families

from poise.machine.hfconfig.families import FAMILIES, REFUSED, Family

OUTCOMES = Path(__file__).parent / "outcomes.json"
STAGES = ("record", "train", "relabel", "serve")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- families: start -->", "<!-- families: end -->"
HEAD = "| `model_type` | poise | MoE layers | inner width of an expert | else |\n|---|---|---|---|---|\n"
DONE_START, DONE_END = "<!-- swept: start -->", "<!-- swept: end -->"
DONE_HEAD = f"| family | {' | '.join(STAGES)} |\n|---{'|---' * len(STAGES)}|\n"


def beside(family: Family) -> str:
    """What is special about a family."""
    said = []
    if family.matrices != 3:
        said.append(f"{family.matrices} matrices")
    said += ["biases"] if family.biases else []
    said += [f"experts work in `{family.latent}`"] if family.latent else []
    said += [f"`{family.zero}` identity experts"] if family.zero else []
    said += [f"{family.zeros} identity expert"] if family.zeros else []
    said += [f"K is {family.chosen}"] if family.chosen else []
    said += [f"only with `{family.switch}`"] if family.switch else []
    return ", ".join(said)


def line(name: str, verdict: str) -> str:
    """One row."""
    row = FAMILIES.get(name)
    if row is None:
        return f"| {name} | refused | | | {REFUSED[name]} |\n"
    width = (
        str(row.inner) if row.inner else (" = " if row.one_width else ", else ").join(f"`{key}`" for key in row.width)
    )
    return f"| {name} | {verdict} | {row.layers.says} | {width} | {beside(row)} |\n"


def verdict(name: str) -> str:
    """Agrees, refused, or what is wrong."""
    wrong, refused = families.compare(name)
    return "; ".join(wrong) or ("refused" if refused else "agrees")


def tables() -> str:
    """Both tables."""
    causal = list(families.names())
    checked = [*causal, *families.TEXT_MODELS]
    verdicts = {name: verdict(name) for name in checked}
    count = sum(verdicts[name] == "agrees" for name in causal)
    rest = sorted(name for name in {*FAMILIES, *REFUSED} if name not in verdicts)
    return (
        f"transformers {transformers.__version__}: {len(causal)} families with a causal language model, {count} agree, "
        f"{len(causal) - count} refused.\n\n{HEAD}{''.join(line(name, verdicts[name]) for name in causal)}\n"
        f"Families whose text model lies within another, checked alike:\n\n"
        f"{HEAD}{''.join(line(name, verdicts[name]) for name in families.TEXT_MODELS)}\n"
        f"Families that this release does not have, or has no model of text for; by their published keys and code:\n\n"
        f"{HEAD}{''.join(line(name, 'reads') for name in rest)}"
    )


def done() -> str:
    """What is done with every family, as :mod:`tests.hfconfig.sweep` has found it."""
    kept = json.loads(OUTCOMES.read_text("utf-8"))
    counts = ", ".join(f"{stage} {sum(row[stage] == 'yes' for row in kept.values())}" for stage in STAGES)
    rows = "".join(f"| {family} | {' | '.join(kept[family][stage] for stage in STAGES)} |\n" for family in sorted(kept))
    return f"Of {len(kept)} families: {counts}.\n\n{DONE_HEAD}{rows}"


def main() -> None:
    """Write them into the page."""
    text = PAGE.read_text("utf-8")
    for start, end, table in (START, END, tables()), (DONE_START, DONE_END, done()):
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{table}{end}{after}"
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
