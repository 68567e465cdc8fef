"""Answers of fixed inputs stay as they are: to the last digits, which compilers and processors may round otherwise."""

import json
import math

import pytest
from tests.goldens.freeze import WORK, path_of

REL = 1e-9


def differences(new, old, at=""):
    """Where two answers differ, as paths with both values."""
    if isinstance(new, dict) and isinstance(old, dict):
        for key in sorted({*new, *old}):
            yield from differences(new.get(key, "nothing"), old.get(key, "nothing"), f"{at}/{key}")
    elif isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        for number, pair in enumerate(zip(new, old, strict=True)):
            yield from differences(*pair, f"{at}/{number}")
    elif (
        isinstance(new, float) and isinstance(old, (int, float)) and math.isclose(new, old, rel_tol=REL, abs_tol=1e-18)
    ):
        return
    elif new != old:
        yield f"{at}: {new} was {old}"


@pytest.mark.parametrize("name", WORK)
def test_answers_are_as_they_were(name):
    found = list(differences(json.loads(json.dumps(WORK[name]())), json.loads(path_of(name).read_text("utf-8"))))
    assert not found, "\n".join(found[:20])


def test_a_change_is_seen():
    old = json.loads(path_of("plan").read_text("utf-8"))
    new = json.loads(path_of("plan").read_text("utf-8"))
    new["slots"][0][0], new["said"]["objective"] = -1, old["said"]["objective"] * (1 + 1e-8)
    assert len(list(differences(new, old))) == 2
