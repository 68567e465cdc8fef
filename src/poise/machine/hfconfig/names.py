"""Which expert weights a list of module names covers: names, parts of names, globs and regular expressions.

Checkpoints call experts by different names. Those ways to call them that the list itself uses are tried; it was written
for one model, and names nothing in the others.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from poise.util.errors import ModelError

ROOT = "model.layers"
BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "moe", "mixer", "ffn")
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
MOST_CHARACTERS = 300
MOST_SAMPLED = 2
MOST_BY_REPETITIONS = {0: 300, 1: 300, 2: 300, 3: 10, 4: 2}
"""Patterns that are tried at most, by the number of their repetitions: those of strangers could take forever."""
_UNSAFE = re.compile(r"\)[*+{]|\\[1-9]|[*+}][*+{]|\[\[|--|&&|~~|\|\|")
HINT = "remove quantization_config to price 16-bit weights"
_UP_TO_LAYERS = re.compile(r"^.*?(?=\blayers\.)")


@dataclass(slots=True)
class _Patterns:
    """Sorted: parts of names, compiled patterns, and what they mention."""

    plain: set[str] = field(default_factory=set)
    compiled: list[re.Pattern[str]] = field(default_factory=list)
    roots: set[str] = field(default_factory=lambda: {ROOT})
    blocks: set[str] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)
    repetitions: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """The names that the experts of a model may have.

    Parameters
    ----------
    moe : ids of the MoE layers.
    num_experts : E.
    matrices : of one expert; 2: it has no gate.
    """

    moe: Sequence[int]
    num_experts: int
    matrices: int

    def covered(self, patterns: Iterable[str], *, regular: bool = False) -> bool | None:
        """Whether the patterns name all experts (True), none (False) or some (None).

        A pattern is a name or a part of one, from dot to dot; with ``*`` a glob of a whole name; after ``re:``, or all
        of them if ``regular``, a regular expression that matches from the start of a name.

        Raises
        ------
        ModelError : a pattern that could take forever, or too many of them.
        """
        found = _sorted(patterns, regular)
        verdicts: set[bool | None] = set()
        for style in self._styles(found) if found.plain or found.compiled else ():
            hits = [_hit(name, found) for name in style]
            verdicts.add(all(hits) if all(hits) or not any(hits) else None)
        return None if None in verdicts else True in verdicts

    def _styles(self, found: _Patterns) -> Iterator[list[str]]:
        experts = self._sample(found.numbers)
        for root in sorted(found.roots):
            for block in sorted(found.blocks) or BLOCKS[:1]:
                at = [f"{root}.{layer}.{block}" for layer in self.moe]
                for names in PROJECTIONS:
                    used = names if self.matrices > 2 else names[1:]
                    yield [f"{base}.experts.{e}.{name}" for base in at for e in experts for name in used]
                    if block == "moe":  # Step: the matrices of all experts lie in the block itself
                        yield [f"{base}.{name}" for base in at for name in used]
                yield [f"{base}.experts.{name}" for base in at for name in ("gate_up_proj", "down_proj")]
                yield [f"{base}.experts" for base in at]

    def _sample(self, numbers: set[int]) -> list[int]:
        """Experts to look at: the ends, and some that are named and some that are not."""
        named = sorted(i for i in numbers if i < self.num_experts)
        others = [i for i in range(min(self.num_experts, 1000)) if i not in numbers]
        return sorted({0, self.num_experts - 1, *named[:MOST_SAMPLED], *others[:MOST_SAMPLED]})


def _sorted(patterns: Iterable[str], regular: bool) -> _Patterns:
    found = _Patterns()
    for text in dict.fromkeys(map(str, patterns)):
        bare = text.replace("\\", "")
        found.numbers |= {int(i) for i in re.findall(r"experts\.(\d{1,6})\b", bare)}
        found.blocks |= {block for block in BLOCKS if re.search(rf"(?<![a-z]){block}(?![a-z])", bare)}
        if text.startswith("re:") or regular:
            root = re.match(r"(?:re:)?\^?([\w.]+\.)(?=layers\.)", bare)
            found.roots |= {f"{root[1]}layers"} if root else set()
            _add(found, text.removeprefix("re:"), trusted=False)
        elif any(character in text for character in "*?["):
            _add(found, fnmatch.translate(_UP_TO_LAYERS.sub("*", text))[:-2] + r"(\..*)?\Z", trusted=True)
        else:
            found.plain.add(_UP_TO_LAYERS.sub("", text).strip(".").removesuffix(".weight"))
    return found


def _hit(name: str, found: _Patterns) -> bool:
    if found.plain and not found.plain.isdisjoint(_parts(name)):
        return True
    return any(one.match(name) for one in found.compiled)


def _parts(name: str) -> list[str]:
    """Every run of whole components: of ``a.b.c``: a, a.b, a.b.c, b, ..."""
    ends = [i for i, character in enumerate(name) if character == "."]
    starts, stops = [0, *(i + 1 for i in ends)], [*ends, len(name)]
    return [name[a:b] for a in starts for b in stops if b > a]


def _add(found: _Patterns, text: str, *, trusted: bool) -> None:
    """A regular expression of a stranger: no repeated groups, few repetitions, so that matching stays fast."""
    repetitions = len(re.findall(r"(?<!\\)[*+{]", text)) - trusted
    found.repetitions.append(repetitions)
    most = MOST_BY_REPETITIONS.get(repetitions, 0)
    unsafe = not trusted and _UNSAFE.search(text) is not None
    if len(text) > MOST_CHARACTERS or unsafe or found.repetitions.count(repetitions) > most:
        raise ModelError(f"a pattern of module names that poise does not try: {text[:120]!r}", hint=HINT)
    try:
        found.compiled.append(re.compile(text))
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{text[:120]!r} is no pattern of module names: {error}", hint=HINT) from None
