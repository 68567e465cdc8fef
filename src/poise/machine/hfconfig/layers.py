"""Which decoder layers are MoE layers: the rules that configurations state, one function a kind of key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from poise.machine.hfconfig.fields import Config, damaged, get, number, present, whole, whole_list
from poise.util.errors import ModelError

DENSE_WORDS = frozenset({"dense", "mlp"})
SPARSE_WORDS = frozenset({"sparse", "moe", "hash_moe"})
BLOCK_WORDS = frozenset({"mamba", "attention", "linear_attention", "full_attention", "mlp", "moe"})
BLOCK_LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}


@dataclass(frozen=True, slots=True)
class Rule:
    """Which layers are MoE layers.

    Parameters
    ----------
    keys : of the configuration, that the rule reads.
    says : the rule in words.
    find : ids of the MoE layers of a config with that many layers; None where the config says nothing by these keys.
    """

    keys: tuple[str, ...]
    says: str
    find: Callable[[Config, int], list[int] | None]


def every() -> Rule:
    """All layers."""
    return Rule((), "every layer", lambda config, layers: list(range(layers)))


def first_dense(key: str, default: int | None = None, freq: str = "") -> Rule:
    """All but the first ones; with ``freq`` only every n-th (counted from layer 0), or those that a list flags.

    ``default`` counts where the config lacks ``key``; None: it must have it.
    """

    def find(config: Config, layers: int) -> list[int]:
        dense = number(config, key, default=default)
        value = get(config, freq) if freq else None
        flags = _flags(value, freq, layers) if isinstance(value, list) else None
        step = 1 if flags is not None or value is None else max(1, whole(value, freq))
        return [i for i in range(dense, layers) if i % step == 0 and (flags is None or flags[i])]

    missing = "" if default is None else f" ({default} if it is missing)"
    return Rule(
        (key, freq) if freq else (key,), f"from layer `{key}`{missing}" + (f", by `{freq}`" if freq else ""), find
    )


def first_always_dense(count: int) -> Rule:
    """All but the first ``count``, whatever the config says."""
    return Rule((), f"from layer {count}", lambda config, layers: list(range(min(count, layers), layers)))


def stepped(step: str, only: str = "", dense: tuple[int, ...] = (), default: int = 1) -> Rule:
    """Every ``step``-th layer, counted from 1, but those that ``only`` lists (``dense`` where it is missing)."""

    def find(config: Config, layers: int) -> list[int]:
        every_nth = number(config, step, default=default)
        if not every_nth:
            raise ModelError(f"{step} is 0: no layer is the 0-th", hint="1 if every layer is an MoE layer")
        listed = get(config, only) if only else None
        skip = set(dense if listed is None else whole_list(listed, only))
        return [i for i in range(layers) if (i + 1) % every_nth == 0 and i not in skip]

    says = f"every `{step}`-th" + (f" but `{only}`" if only else "")
    return Rule((step, only) if only else (step,), says, find)


def periodic(defaults: tuple[int, int]) -> Rule:
    """Layers whose number leaves ``expert_layer_offset`` when divided by ``expert_layer_period``."""
    period, offset = "expert_layer_period", "expert_layer_offset"

    def find(config: Config, layers: int) -> list[int]:
        every_nth = max(1, number(config, period, default=defaults[0]))
        rest = number(config, offset, default=defaults[1])
        return [i for i in range(layers) if i % every_nth == rest]

    return Rule((period, offset), f"one in `{period}`, from `{offset}`", find)


def span(start: str, end: str, interval: str) -> Rule:
    """Every ``interval``-th layer, counted from 1, from ``start`` to ``end`` inclusive (-1: the last)."""

    def find(config: Config, layers: int) -> list[int]:
        last = get(config, end)
        stop = layers - 1 if last in (None, -1) and not isinstance(last, bool) else whole(last, end)
        first, step = number(config, start, default=1), max(1, number(config, interval, default=1))
        return [i for i in range(first, min(stop + 1, layers)) if (i + 1) % step == 0]

    return Rule((start, end, interval), f"`{start}` to `{end}`, every `{interval}`-th", find)


def words(fallback: Rule) -> Rule:
    """A list with one word a layer, dense or sparse; another rule where the config has none."""
    key = "mlp_layer_types"

    def find(config: Config, layers: int) -> list[int] | None:
        value = get(config, key)
        if value is None:
            return fallback.find(config, layers)
        known = DENSE_WORDS | SPARSE_WORDS
        if not isinstance(value, list) or any(word not in known for word in map(str, value)):
            raise damaged(f"{key} must be a list of {', '.join(sorted(known))}, got {str(value)[:120]}")
        return [i for i, word in enumerate(_of_length(value, key, layers)) if word in SPARSE_WORDS]

    return Rule((key, *fallback.keys), f"`{key}`, else {fallback.says}", find)


def listed(keys: Iterable[str], fallback: Rule) -> Rule:
    """Layers that a list (or ``"3,4,5"``) names; ids of multi-token prediction, above the last layer, are left out."""
    keys = tuple(keys)

    def find(config: Config, layers: int) -> list[int] | None:
        names = present(config, keys)
        if not names:
            return fallback.find(config, layers)
        found = [sorted(set(whole_list(get(config, name), name))) for name in names]
        if any(one != found[0] for one in found):
            raise damaged(f"{' and '.join(names)} name different layers")
        extra = number(config, "num_nextn_predict_layers", "num_mtp_layers", default=0)
        if any(not 0 <= i < layers + extra for i in found[0]):
            raise damaged(f"{names[0]} must name layers of 0..{layers - 1}, got {str(found[0])[:120]}")
        return [i for i in found[0] if i < layers]

    return Rule((*keys, *fallback.keys), f"{' or '.join(f'`{k}`' for k in keys)}, else {fallback.says}", find)


def flagged(key: str, fallback: Rule) -> Rule:
    """A list with 0 or 1 (or false, true) for every layer; another rule where the config has no list."""

    def find(config: Config, layers: int) -> list[int] | None:
        value = get(config, key)
        if not isinstance(value, list):
            return fallback.find(config, layers)
        return [i for i, flag in enumerate(_flags(value, key, layers)) if flag]

    return Rule((key, *fallback.keys), f"`{key}`, else {fallback.says}", find)


def blocks(pattern: str, lists: tuple[str, ...]) -> Rule:
    """Blocks of one kind each: letters (M, E, ``*``, -), or words of which ``moe`` is one."""

    def find(config: Config, layers: int) -> list[int] | None:
        found = block_words(config, pattern, lists)
        return None if found is None else [i for i, w in enumerate(_of_length(found, pattern, layers)) if w == "moe"]

    return Rule((pattern, *lists), f"E of `{pattern}`, or moe of `{lists[0]}`", find)


def ffn_named(rule: Rule) -> Rule:
    """The same rule of blocks; nothing where none is an MLP or has experts: they name the mixers of layers alone."""

    def find(config: Config, layers: int) -> list[int] | None:
        found = block_words(config, rule.keys[0], rule.keys[1:])
        return rule.find(config, layers) if found and {"moe", "mlp"} & set(found) else None

    return Rule(rule.keys, rule.says, find)


def block_words(config: Config, pattern: str, lists: tuple[str, ...]) -> list[str] | None:
    """The kind of every block, or None.

    Raises
    ------
    ModelError : a letter or word of another kind, or two lists that disagree.
    """
    found: list[list[str]] = []
    letters = get(config, pattern)
    if letters is not None:
        if not isinstance(letters, str) or not set(letters) <= set(BLOCK_LETTERS):
            raise damaged(f"{pattern} must be made of {' '.join(BLOCK_LETTERS)}, got {str(letters)[:120]!r}")
        found.append([BLOCK_LETTERS[letter] for letter in letters])
    for name in present(config, lists):
        value = get(config, name)
        if not isinstance(value, list) or any(word not in BLOCK_WORDS for word in map(str, value)):
            raise damaged(f"{name} must be a list of {', '.join(sorted(BLOCK_WORDS))}, got {str(value)[:120]}")
        found.append(value)
    moe = [[word == "moe" for word in one] for one in found]
    if any(one != moe[0] for one in moe):
        raise damaged(f"{', '.join(present(config, (pattern, *lists)))} describe different layers")
    return found[0] if found else None


def nothing() -> Rule:
    """The config says nothing: the end of a chain of fallbacks."""
    return Rule((), "nothing", lambda config, layers: None)


def _of_length(value: list[str], name: str, layers: int) -> list[str]:
    if len(value) != layers:
        raise damaged(f"{name} has {len(value)} entries, the model has {layers} layers")
    return value


def _flags(value: list[object], name: str, layers: int) -> list[bool]:
    if any(flag not in (0, 1) for flag in value):
        raise damaged(f"{name} must be 0 or 1 for every layer, got {str(value)[:120]}")
    if len(value) != layers:
        raise damaged(f"{name} has {len(value)} entries, the model has {layers} layers")
    return [bool(flag) for flag in value]


def only_if_said(rule: Rule, neutral: tuple[object, ...]) -> Rule:
    """The same rule; nothing where none of its keys is set, or all of them have a value that changes nothing."""

    def find(config: Config, layers: int) -> list[int] | None:
        if all(get(config, key) is None or get(config, key) in neutral for key in rule.keys):
            return None
        return rule.find(config, layers)

    return Rule(rule.keys, rule.says, find)


def unclear(key: str) -> Rule:
    """A number above 1 that families count differently (from 0 or from 1): an answer only where it is a list or 1."""

    def find(config: Config, layers: int) -> list[int] | None:
        value = get(config, key)
        if value is None or (isinstance(value, int) and value in (0, 1)):
            return None
        if isinstance(value, list):
            return [i for i, flag in enumerate(_flags(value, key, layers)) if flag]
        raise ModelError(
            f"{key} is {value!r}, which families count differently", hint="list the layers: mlp_layer_types"
        )

    return Rule((key,), f"`{key}`", find)


PLAIN: tuple[Rule, ...] = (
    words(nothing()),
    only_if_said(first_dense("first_k_dense_replace", 0), (0,)),
    only_if_said(first_dense("num_dense_layers", 0), (0,)),
    only_if_said(first_dense("dense_mlp_idx", 0), (0,)),
    only_if_said(first_dense("moe_layer_num_skipped", 0), (0,)),
    unclear("moe_layer_freq"),
    unclear("moe_layer_frequency"),
    only_if_said(stepped("decoder_sparse_step", "mlp_only_layers"), (1, [])),
    only_if_said(stepped("interleave_moe_layer_step"), (0, 1)),
    listed(("moe_layers", "moe_layers_enum", "moe_layer_list"), nothing()),
    flagged("is_moe_layer", nothing()),
    only_if_said(periodic((1, 0)), (1, 0)),
    only_if_said(span("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), ()),
    ffn_named(blocks("hybrid_override_pattern", ("layers_block_type",))),
)
"""What each key says in whatever family: they may not contradict a family's own rule, nor each other."""
