"""Routed experts per request, as engines answer with them: the best source of routing across layers. Logical ids.

SGLang (``--enable-return-routed-experts``; state_capturer/routed_experts.py, routed_experts_wire.py)
    ``meta_info.routed_experts``, in OpenAI answers ``sglext.routed_experts``: base64 of little-endian int32 (or
    ``routed_experts_dtype``) [prompt + completion - 1, num_hidden_layers, K]; dense layers are zeros. A prefix may be
    missing (``routed_experts_start_len``).
vLLM (``--enable-return-routed-experts``; fused_moe/routed_experts_capturer.py, read in the 0.32.0 wheel)
    ``choices[i].routed_experts``: base64 of an ``.npy``, uint8 up to 256 experts, else uint16, of shape
    [prompt + completion - 1, num_hidden_layers, K]: prompt and answer in one, the last token was not forwarded; dense
    layers are zeros. The first tokens of the prompt may be missing (``routed_experts_prompt_start``). The choices of
    one prompt (``n``) repeat its rows; several prompts of one request are choices too. Earlier releases (0.21) had
    ``prompt_routed_experts`` [prompt, MoE layers, K] beside choices of the answer's rows alone, as nested lists or
    ``.npy``. Captured before EPLB maps.

One answer, a list of them, or one a line.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions
from poise.engines.dumps.folded import refuse_folded
from poise.engines.dumps.mapping import BY_PLACE, decoder_layers, num_experts, routed_picks
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import id_table, integer_npy, whole
from poise.routing.trace import MAX_EXPERTS, RoutingTrace
from poise.util.errors import TraceError

KEY, PROMPT_KEY = "routed_experts", "prompt_routed_experts"
DTYPES = {"int32": "<i4", "int16": "<i2", "uint16": "<u2", "uint8": "u1"}
MAX_TOKENS = 1 << 28


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """One choice of one answer, undecoded."""

    where: str
    prompt: Any
    routed: Any
    dtype: Any
    prompt_tokens: int | None
    completion_tokens: int | None


def is_routed(value: Any) -> bool:
    """Answers with routed experts in them."""
    answers = value if isinstance(value, list) else [value]
    return bool(answers) and all(isinstance(a, dict) for a in answers) and any(_has_routes(a) for a in answers)


def _has_routes(answer: dict[str, Any]) -> bool:
    nested = [answer, *(answer.get(name) for name in ("meta_info", "sglext"))]
    choices = answer.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict):
            nested += [choice, choice.get("meta_info"), choice.get("sglext")]
    return any(isinstance(d, dict) and (d.get(KEY) is not None or d.get(PROMPT_KEY) is not None) for d in nested)


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """All answers of all files as one trace, a request each."""
    engines: set[str] = set()
    pieces: list[tuple[NDArray[np.int16], int | None]] = []
    silent = shared = 0
    for part in parts:
        answers = part.value if isinstance(part.value, list) else [part.value]
        for number, answer in enumerate(answers):
            if not isinstance(answer, dict) or not _has_routes(answer):
                silent += 1
                continue
            found = list(_answers(answer, f"{part.name}, answer {number}"))
            held = [_rows(choice, options) for choice in found]
            engines.update(engine for _, _, engine in held)
            own = _own_rows(answer, found, [(experts, decoded) for experts, decoded, _ in held])
            shared += sum(len(experts) for experts, _, _ in held) - sum(len(experts) for experts, _ in own)
            pieces += own
    pieces = [piece for piece in pieces if len(piece[0])]
    if not pieces:
        raise TraceError("no answer has routed experts", hint="start the engine with --enable-return-routed-experts")
    if len(engines) > 1:
        raise TraceError("answers of SGLang and of vLLM", hint="give those of one engine")
    shapes = sorted({piece.shape[1:] for piece, _ in pieces})
    if len(shapes) > 1:
        raise TraceError(f"answers of [layers, experts a token] {list(shapes[0])} and {list(shapes[1])}")
    notes = [f"{silent} answers without routed experts were left out"] if silent else []
    request_T = np.repeat(np.arange(len(pieces)), [len(piece) for piece, _ in pieces])
    if shared:
        notes.append(f"choices of one prompt repeat it: {shared} of its tokens were counted once")
    unknown = sum(decoded is None for _, decoded in pieces)
    if unknown:
        notes.append(f"{unknown} answers do not say how long their prompts are: all tokens are taken for prefill")
    decode_T = np.concatenate(
        [np.arange(len(piece)) >= len(piece) - (0 if unknown else decoded or 0) for piece, decoded in pieces]
    )
    engine = engines.pop()
    rows, ids, said = decoder_layers(shapes[0][0], options.model, "an answer")
    if options.model is None:
        rows, ids, said = _busy_layers([piece for piece, _ in pieces], engine)
    experts_TLK, more = routed_picks(np.concatenate([piece[:, rows] for piece, _ in pieces]), options)
    notes += more
    del pieces
    # An engine that masks identity experts leaves holes in a layer; a token that was not captured lacks whole layers.
    absent_TL = (experts_TLK < 0).all(axis=2) if options.zeros else (experts_TLK < 0).any(axis=2)
    keep_T = ~np.asarray(absent_TL).any(axis=1)
    if shapes[0][1] > 1:
        keep_T &= (experts_TLK != experts_TLK[:, :1, :1]).any(axis=(1, 2))
    if not keep_T.any():
        raise TraceError("no token has experts in every layer", hint="check --model")
    if not keep_T.all():
        notes.append(f"{(~keep_T).sum()} tokens without captured experts were left out")
    experts, more = num_experts(options, int(experts_TLK[keep_T].max()), "an answer", routers=True)
    trace = RoutingTrace(
        experts_TLK[keep_T], experts, request=request_T[keep_T].astype(np.int32),
        is_decode=decode_T[keep_T], layer_ids=ids, name=parts[0].name,
    )  # fmt: skip
    if engine == "sglang" and options.format is None:  # the other's numbers say their shape
        refuse_folded(trace.experts, "routed-experts")
    guessed = options.model is None and engine == "vllm"
    return EngineDump(engine, "routed-experts", trace=trace, recorded_layers=shapes[0][0], layers_by_place=guessed,
                      notes=(*notes, *said, *more))  # fmt: skip


def _busy_layers(
    pieces: Sequence[NDArray[np.int16]], engine: str
) -> tuple[NDArray[np.int64], NDArray[np.int32], list[str]]:
    """Without a model: layers in which some token has different experts; those without are dense."""
    busy = np.zeros(pieces[0].shape[1], bool)
    for piece_TLK in pieces:
        if piece_TLK.shape[2] > 1:
            busy |= (piece_TLK != piece_TLK[:, :, :1]).any(axis=(0, 2))
        else:
            busy |= (piece_TLK > 0).any(axis=(0, 2))  # all zeros: dense, or expert 0 for everyone
    if not busy.any():
        raise TraceError("no layer has routed experts", hint="check --top-k")
    rows = np.flatnonzero(busy)
    notes = [] if engine == "sglang" else [BY_PLACE]
    return rows, rows.astype(np.int32), notes


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _answers(answer: dict[str, Any], where: str) -> Iterator[_Choice]:
    usage, meta = _dict(answer.get("usage")), _dict(answer.get("meta_info"))
    listed = answer.get("choices")
    choices = [choice for choice in listed if isinstance(choice, dict)] if isinstance(listed, list) else []

    def one(prompt: Any, routed: Any, dtype: Any, counts: dict[str, Any]) -> _Choice:
        known = [counts.get(name) for name in ("prompt_tokens", "completion_tokens")]
        both = [None if n is None else whole("a count of tokens", n, high=MAX_TOKENS) for n in known]
        return _Choice(where, prompt, routed, dtype, *both)

    if meta.get(KEY) is not None:
        yield one(None, meta[KEY], meta.get("routed_experts_dtype"), meta)
    elif not choices:
        yield one(answer.get(PROMPT_KEY), answer.get(KEY), answer.get("routed_experts_dtype"), usage or answer)
    for index, choice in enumerate(choices):
        shared = answer.get("sglext") if index == 0 else None
        places = (choice, choice.get("meta_info"), choice.get("sglext"), shared)
        inner = [place for place in places if isinstance(place, dict) and place.get(KEY) is not None]
        prompt = choice.get(PROMPT_KEY, answer.get(PROMPT_KEY) if index == 0 else None)
        if not inner and prompt is None:
            continue
        held = inner[0] if inner else {}
        counts = held if "completion_tokens" in held else (usage if len(choices) == 1 else {})
        yield one(prompt, held.get(KEY), held.get("routed_experts_dtype"), counts)


def _rows(found: _Choice, options: ReadOptions) -> tuple[NDArray[np.int16], int | None, str]:
    """Experts of an answer, [rows, layers, K]; how many of the last rows were decoded, None: unknown; the engine."""
    try:
        routed = _decode(found.routed, found.dtype)
        prompt = _decode(found.prompt, found.dtype)
        if routed is not None and routed.ndim == 1:
            return *_flat(routed, found, options), "sglang"
        if prompt is not None and prompt.ndim == 1:
            raise TraceError(f"{PROMPT_KEY} is not [prompt, layers, experts a token]")
        if prompt is not None:
            parts = [prompt] if routed is None or not len(routed) else [prompt, routed]
            if len({p.shape[1:] for p in parts}) > 1:
                raise TraceError(f"{PROMPT_KEY} {prompt.shape[1:]} and {KEY} {parts[1].shape[1:]} disagree")
            return np.concatenate(parts), len(parts[1]) if len(parts) > 1 else 0, "vllm"
        if routed is None:
            return np.zeros((0, 1, 1), np.int16), 0, "vllm"
        return routed, _decoded(len(routed), found), "vllm"
    except TraceError as error:
        raise TraceError(f"{found.where}: {error.message}", hint=error.hint) from None


def _decode(value: Any, dtype: Any) -> NDArray[np.int16] | None:
    """Three-dimensional, or one-dimensional where the text has no shape."""
    if value is None or value in ([], ""):
        return None
    if isinstance(value, list):
        array = id_table(KEY, value, 3, low=-1, high=MAX_EXPERTS)
    elif isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except ValueError as error:
            raise TraceError(f"{KEY} is no base64: {error}") from None
        if data.startswith(b"\x93NUMPY"):
            array = id_table(KEY, integer_npy(data), 3, low=-1, high=MAX_EXPERTS)
        else:
            kind = DTYPES.get(dtype if isinstance(dtype, str) else "int32")
            if kind is None or len(data) % np.dtype(kind).itemsize:
                raise TraceError(f"{KEY} has {len(data)} bytes of type {str(dtype)[:20]!r}")
            array = id_table(KEY, np.frombuffer(data, kind), 1, low=-1, high=MAX_EXPERTS)
    else:
        raise TraceError(f"{KEY} is a {type(value).__name__}, not a list or base64")
    if array.ndim == 3 and 0 in array.shape[1:]:
        return None
    return array


def _flat(flat: NDArray[np.int16], found: _Choice, options: ReadOptions) -> tuple[NDArray[np.int16], int]:
    """SGLang's numbers, whose shape the answer does not say."""
    if found.prompt_tokens is None or found.completion_tokens is None:
        raise TraceError(
            "prompt_tokens and completion_tokens are missing", hint="keep meta_info, or usage, of the answer"
        )
    expected = max(0, found.prompt_tokens + found.completion_tokens - 1)
    decoded = max(0, found.completion_tokens - 1)
    if options.model is not None:
        layers, top_k = options.model.num_hidden_layers, options.model.top_k
        if flat.size % (layers * top_k) or flat.size > expected * layers * top_k:
            raise TraceError(
                f"{flat.size} experts for {expected} tokens, {layers} layers and top-{top_k}", hint="check --model"
            )
    else:
        if not expected or flat.size % expected or not flat.size:
            raise TraceError(f"{flat.size} experts do not spread over {expected} tokens", hint="give --model")
        if options.top_k is None:
            raise TraceError(
                f"{flat.size // expected} experts a token, which are layers times top-k", hint="give --model or --top-k"
            )
        top_k, layers = options.top_k, flat.size // expected // options.top_k
        if not layers or flat.size != expected * layers * top_k:
            raise TraceError(f"{flat.size // expected} experts a token are no multiple of top-{top_k}")
    rows = flat.reshape(-1, layers, top_k)
    return rows, min(decoded, len(rows))


def _decoded(rows: int, found: _Choice) -> int | None:
    """How many of vLLM's rows, prompt and answer in one, were decoded; None: the answer does not say."""
    prompt, completion = found.prompt_tokens, found.completion_tokens
    if prompt is None or completion is None:
        return None
    if rows == prompt + completion:
        return completion
    if rows == completion and prompt > 1:  # the answer alone
        return rows
    if completion - 1 <= rows < prompt + completion:
        return max(0, completion - 1)
    raise TraceError(f"{rows} rows for {prompt} tokens of the prompt and {completion} of the answer")


ChoiceRows = tuple[NDArray[np.int16], int | None]


def _own_rows(answer: dict[str, Any], found: list[_Choice], rows: list[ChoiceRows]) -> list[ChoiceRows]:
    """Rows of each choice of an answer, without those of a prompt that an earlier choice has.

    Raises
    ------
    TraceError : several choices, and neither token ids nor usage tell whose prompt they hold.
    """
    if len(found) < 2 or found[0].prompt is not None or any(decoded is not None for _, decoded in rows):
        return rows
    try:
        prompts = _prompts(answer, [len(experts) for experts, _ in rows])
    except TraceError as error:
        raise TraceError(f"{found[0].where}: {error.message}", hint=error.hint) from None
    out: list[ChoiceRows] = []
    seen: set[str] = set()
    for (experts, _), (name, length) in zip(rows, prompts, strict=True):
        if length is None:
            out.append((experts, None))
            continue
        out.append((experts[length:] if name in seen else experts, len(experts) - length))
        seen.add(name)
    return out


def _prompts(answer: dict[str, Any], rows: list[int]) -> list[tuple[str, int | None]]:
    """Of each choice what names its prompt, and how many of its rows are the prompt's; None: it is unknown."""
    listed = [choice for choice in answer["choices"] if isinstance(choice, dict) and _has_routes({"choices": [choice]})]
    known = [_by_ids(answer, choice, count) for choice, count in zip(listed, rows, strict=True)]
    if all(known):
        return [prompt for prompt in known if prompt is not None]
    usage = _dict(answer.get("usage"))
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if None not in counts:
        prompt, completion = (whole("a count of tokens", count, high=MAX_TOKENS) for count in counts)
        total, many = sum(rows), len(rows)
        if total == many * prompt + completion - many and min(rows) >= prompt:
            return [("the prompt", prompt)] * many
        if total in (completion, completion - many):  # answers alone
            return [(str(index), 0) for index in range(many)]
        if total == prompt + completion - many:  # a prompt each
            return [(str(index), None) for index in range(many)]
    raise TraceError(
        f"{len(rows)} choices of {sum(rows)} rows: whether they share a prompt, and how long it is, is not said",
        hint="keep usage of the answer, or ask for return_token_ids; one prompt a request",
    )


def _by_ids(answer: dict[str, Any], choice: dict[str, Any], rows: int) -> tuple[str, int] | None:
    """A choice's prompt as its token ids tell it; the last token of the answer has no row."""
    prompt, tokens = choice.get("prompt_token_ids", answer.get("prompt_token_ids")), choice.get("token_ids")
    if not isinstance(prompt, list):
        return None
    length = rows - max(0, len(tokens) - 1) if isinstance(tokens, list) else len(prompt)
    return (repr(prompt), length) if 0 <= length <= min(rows, len(prompt)) else None
