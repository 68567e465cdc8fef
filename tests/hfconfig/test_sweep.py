"""Families through record, train, relabel and serve: right or refused, and as docs/models.md says."""

import json
import os

import transformers
from tests.hfconfig import families, table
from tests.launch import ranks

FEW = ("dbrx",)
"""One that is refused: in ``make test``, whose other tests do all of it with families that are known; all with POISE_FAMILIES=1."""


def wrong(kept: dict[str, dict[str, str]]) -> list[str]:
    return [f"{family}: {stage}: {said}" for family, row in kept.items() for stage, said in row.items()
            if said.startswith("WRONG")]  # fmt: skip


def test_what_is_done_with_each_family_is_what_the_docs_say(subtests, tmp_path, monkeypatch):
    kept = json.loads(table.OUTCOMES.read_text("utf-8"))
    asked = list(families.names()) if os.environ.get("POISE_FAMILIES") else FEW
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (said,) = ranks(1, "tests/hfconfig/sweep.py", *asked, folder=tmp_path, timeout=7200)
    lines = [line for line in said.splitlines() if line.startswith('{"')]
    found = {family: row for line in lines for family, row in json.loads(line).items()}
    assert set(found) == set(asked)
    for family, row in found.items():
        print(family, *row.values(), sep=" | ")
        with subtests.test(family):
            assert not wrong({family: row})
            assert row == kept.get(family, "not in outcomes.json: python -m tests.hfconfig.sweep --write --missing")


def test_the_table_of_what_is_done_is_in_the_docs():
    kept, text = json.loads(table.OUTCOMES.read_text("utf-8")), table.PAGE.read_text("utf-8")
    assert table.done() == text.split(table.DONE_START + "\n")[1].split(table.DONE_END)[0]
    assert not wrong(kept)
    assert set(kept) == set(families.names())
    if f"transformers {transformers.__version__}:" in text:
        assert set(kept) <= set(families.names())
