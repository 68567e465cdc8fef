"""Rows that name a token: whether each is a choice of it, told from how many rows tokens have in a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from poise.engines.dumps.csv_text import CsvText
from poise.engines.dumps.json_rows import JsonRows
from poise.engines.dumps.mapping import MAX_TOP_K
from poise.util.errors import TraceError

BARE = "token"
"""A column of this name may be a token's number, or say how many tokens an expert has."""
OF_A_TOKEN = re.compile(r"(token|tok|position|pos)(_?(id|idx|index|pos))?")
"""Where a column names the token, a row is one choice of it."""
OF_A_REQUEST = re.compile(r"(request|req|seq|sample)(_?(id|idx|index|pos))?|phase")
"""What tells tokens of the same number apart."""
WEIGHT = re.compile(r"((router|gate|gating|topk|top_k|expert|routing)_?)?(weight|prob|probability|score|logit)s?")
"""What a router gave a choice, or every expert."""
LEAST_TOKENS = 3
"""Of fewer, counts may well be as often the same as tokens have choices."""
NAMES = "call a column of tokens 'count', and one that says which 'token_id'"


def check_choices(
    name: str, text: CsvText | JsonRows, heads: Sequence[str], column: Mapping[str, NDArray[np.float64]],
    experts: int | None,
) -> None:  # fmt: skip
    """Refuse rows that name tokens and are no choices of theirs, or may be none.

    A choice has K - 1 others of its token in its layer, of different experts, and there are experts that the token did
    not choose. Rows with a router's number are checked for it, and those with a column ``token``, which may be a count.

    Parameters
    ----------
    name, text : the file, for messages, and its text.
    heads : names of the columns, plain.
    column : those with a role, [rows].
    experts : E, if it is known.

    Raises
    ------
    TraceError : tokens have different numbers of rows in a layer, name an expert twice, or have one for every expert; a
        weight is 0; or ``token`` may be a count.
    """
    weights = [at for at, head in enumerate(heads) if WEIGHT.fullmatch(head)]
    if not any(map(OF_A_TOKEN.fullmatch, heads)) or not (weights or BARE in heads):
        return
    codes = [code(column[role]) for role in ("layer", "step", "rank") if role in column]
    told = [code(text.words(name, at)) for at, head in enumerate(heads) if OF_A_REQUEST.fullmatch(head)]
    codes += [one for one in told if one.max() + 1 < len(one)]  # else it numbers the rows
    whose = together(codes)
    token = together([code(text.words(name, at)) for at, head in enumerate(heads) if OF_A_TOKEN.fullmatch(head)])
    group = together([whose, token])
    rows, twice = np.bincount(group), _twice(group, column["expert"])
    least, most, known = int(rows.min()), int(rows.max()), max(len(np.unique(column["expert"])), experts or 0)
    if BARE in heads:
        layer = code(column["layer"])
        tokens = int(token.max()) + 1
        alike = together([layer, token]).max() + 1 == tokens * (int(layer.max()) + 1)
        if least < max(2, most) or twice or not alike or tokens < LEAST_TOKENS:
            raise TraceError(
                f"{name}: column 'token' may say how many it has, or which one chose it: in a layer {least} to {most} "
                "rows have the same number, and tokens have as many choices each, 2 or more, in every layer",
                hint=NAMES,
            )
    hint = "leave the rows of the K experts that each token chose" if weights else NAMES
    if twice:
        raise TraceError(f"{name}: a token names an expert {twice} times in a layer, a choice is named once", hint=hint)
    if least < most:
        raise TraceError(f"{name}: a token has {least} rows in a layer, another {most}", hint=hint)
    if most > MAX_TOP_K or most >= known:
        raise TraceError(
            f"{name}: each token has {most} rows in a layer, of {known} experts: numbers of a router for all of them, "
            f"or more choices than {MAX_TOP_K}",
            hint=hint,
        )
    for at in weights:
        given = text.numbers(name, [at])[:, 0]
        if zeros := int(np.count_nonzero((given == 0) | np.isnan(given))):
            raise TraceError(
                f"{name}: {heads[at]} is 0 or none in {zeros} of {len(given)} rows: what was not chosen?", hint=hint
            )


def code(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers from 0 on for the different values, [rows]."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def together(codes: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Numbers from 0 on for the different rows of several :func:`code`, [rows]."""
    found = codes[0]
    for one in codes[1:]:
        found = np.unique(found * (one.max() + 1) + one, return_inverse=True)[1].astype(np.int64)
    return found


def _twice(group: NDArray[np.int64], expert: NDArray[np.float64]) -> int:
    """How often a group names the expert that it names most, 0: once."""
    most = int(np.bincount(together([group, code(expert)])).max())
    return most if most > 1 else 0
