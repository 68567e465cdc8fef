"""Record the routing of any transformers MoE model with forward hooks on its routers.

Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek-V2/V3, gpt-oss, Granite-MoE: in transformers 5 the router of every family returns
(logits, weights [T, K], expert ids int64 [T, K]), possibly in another order; the hook takes the ids by their type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from poise.planning.problem import Progress
from poise.routing.trace import NO_EXPERT, RoutingTrace
from poise.util.errors import ModelError, TraceError
from poise.util.files import read_bounded
from poise.util.jsonfile import parse_json

ROUTER_NAMES = ("gate", "router")
MAX_TEXT_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and the domain it comes from."""

    text: str
    domain: str = "text"


def find_routers(model: nn.Module) -> dict[int, nn.Module]:
    """Router of each MoE layer, by decoder layer: a ``gate`` or ``router`` beside ``experts``.

    Raises
    ------
    ModelError : the model has no MoE layer of a known shape.
    """
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf not in ROUTER_NAMES or not hasattr(model.get_submodule(parent), "experts"):
            continue
        numbers = re.findall(r"\.(\d+)\.", f".{parent}.")
        if numbers:
            found[int(numbers[0])] = module
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no router beside its experts", hint="is it a Mixture-of-Experts model?"
        )
    return dict(sorted(found.items()))


def routed(output: Any) -> tuple[Tensor | None, Tensor | None]:
    """Expert ids and weights, [T, K], among what a router returns: told apart by type and shape.

    Where K = E the logits have the weights' shape as well; they come first in every family.
    """
    parts = [part.detach() for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
    ids = next((part for part in parts if part.dtype in (torch.int64, torch.int32)), None)
    if ids is None:
        return None, None
    flat = ids.reshape(-1, ids.shape[-1])
    weights = [part.reshape(-1, part.shape[-1]) for part in parts if part.is_floating_point()]
    return flat, next((part for part in reversed(weights) if part.shape == flat.shape), None)


class RouterCapture:
    """Context manager: collects expert ids [T, K], heaviest first, of every router call, by decoder layer."""

    def __init__(self, model: nn.Module) -> None:
        self.routers = find_routers(model)
        self.calls: dict[int, list[Tensor]] = {layer: [] for layer in self.routers}
        self._handles: list[Any] = []

    def __enter__(self) -> RouterCapture:
        for layer, router in self.routers.items():
            self._handles.append(router.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, layer: int) -> Any:
        def take(module: nn.Module, args: Any, output: Any) -> None:
            ids, weights = routed(output)
            if ids is None:
                raise ModelError(f"the router of layer {layer} returns no expert ids", hint="transformers >= 5 does")
            if weights is not None:
                ids = ids.gather(1, weights.argsort(dim=-1, descending=True, stable=True))
            self.calls[layer].append(ids.cpu())

        return take

    def take(self) -> NDArray[np.int64]:
        """Ids of everything since the last call, [T, L, K]; forgets them."""
        layers = [torch.cat(calls) for calls in self.calls.values()]
        for calls in self.calls.values():
            calls.clear()
        return torch.stack(layers, dim=1).numpy()


def load_model(path: str | Path) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer from a local folder; nothing is fetched, no code of it is run.

    Raises
    ------
    ModelError : the folder is missing, or transformers cannot read it.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (Path(path) / "config.json").is_file():
        raise ModelError(f"{path} has no config.json", hint="give the folder of a Hugging Face model")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"cannot load {path}: {str(error).splitlines()[0]}") from None
    return model.eval(), tokenizer


def read_prompts(paths: Sequence[str | Path], *, per_domain: int | None = None) -> list[Prompt]:
    """Prompts from ``.jsonl`` ({"text", "domain"} a line) and ``.txt`` files; ``per_domain`` of each, evenly spaced.

    Raises
    ------
    TraceError : a file is missing, too large, not UTF-8, or a line has no text.
    """
    prompts: list[Prompt] = []
    for path in map(Path, paths):
        data = read_bounded(path, MAX_TEXT_BYTES, TraceError)
        try:
            text = data.decode("utf-8")
            if path.suffix != ".jsonl":
                prompts.append(Prompt(text, path.stem))
                continue
            for number, line in enumerate(text.splitlines(), 1):
                item = parse_json(line, TraceError, infinite=True)
                if not isinstance(item, dict) or not isinstance(item.get("text"), str) or not item["text"].strip():
                    raise TraceError(f"{path}, line {number}: no text", hint='a line is {"text": ..., "domain": ...}')
                prompts.append(Prompt(item["text"], str(item.get("domain", path.stem))))
        except UnicodeDecodeError as error:
            raise TraceError(f"{path} cannot be read: {error}") from None
    if not prompts:
        raise TraceError(f"no prompts in {len(paths)} files")
    if per_domain is None:
        return prompts
    kept: list[Prompt] = []
    for domain in dict.fromkeys(prompt.domain for prompt in prompts):
        mine = [prompt for prompt in prompts if prompt.domain == domain]
        index = np.unique(np.linspace(0, len(mine) - 1, max(1, per_domain)).round().astype(int))
        kept.extend(mine[i] for i in index)
    return kept


@torch.no_grad()  # type: ignore[untyped-decorator]
def record(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 0,
    max_prompt_tokens: int = 512,
    batch_size: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> RoutingTrace:
    """Prefill every prompt, generate ``max_new_tokens`` with a key/value cache, and record each token's experts once.

    Prompts are cut to ``max_prompt_tokens`` and padded on the left in a batch; padding is not recorded, nor is the
    last sampled token, which never enters the model. Tokens after an end-of-text token are kept: they are traffic too.

    Returns
    -------
    RoutingTrace with request, domain and phase of each token; a request's tokens are in order. Picks of identity
    experts, which the config counts apart (LongCat-Flash), are -1.
    """
    if max_new_tokens < 0 or max_prompt_tokens < 1 or batch_size < 1 or temperature < 0:
        raise TraceError(f"cannot record {max_new_tokens} new, {max_prompt_tokens} prompt tokens, batch {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    names = tuple(dict.fromkeys(prompt.domain for prompt in prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = [tokenizer(prompt.text, add_special_tokens=False)["input_ids"][:max_prompt_tokens] for prompt in prompts]
    if any(not row for row in ids):
        raise TraceError(f"prompt {next(i for i, row in enumerate(ids) if not row)} has no token")
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # neighbours of a batch have similar lengths
    parts: dict[int, list[tuple[NDArray[Any], bool]]] = {index: [] for index in range(len(prompts))}
    with RouterCapture(model) as capture:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(len(ids[i]) for i in rows)
            tokens = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in rows])
            mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in rows])
            cache = None
            for turn in range(max_new_tokens + 1):
                position = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
                got = model(input_ids=tokens, attention_mask=mask, position_ids=position, past_key_values=cache,
                            use_cache=max_new_tokens > 0)  # fmt: skip
                chosen = capture.take().reshape(len(rows), tokens.shape[1], len(capture.routers), -1)
                for row, index in enumerate(rows):
                    real = mask[row, -tokens.shape[1] :].bool().numpy()
                    parts[index].append((chosen[row][real], turn > 0))
                if turn == max_new_tokens:
                    break
                cache = got.past_key_values
                tokens = _sample(got.logits[:, -1], temperature, generator)
                mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], dim=1)
            if progress:
                progress("recording", min(1.0, (start + batch_size) / len(order)))
    experts, request, decode, domain = [], [], [], []
    for index, prompt in enumerate(prompts):
        for block, is_decode in parts[index]:
            experts.append(block)
            request.append(np.full(len(block), index))
            decode.append(np.full(len(block), is_decode))
            domain.append(np.full(len(block), names.index(prompt.domain)))
    picks_TLK, real = np.concatenate(experts), _num_experts(model)
    if _config(model, "zero_expert_num"):
        picks_TLK = np.where(picks_TLK >= real, NO_EXPERT, picks_TLK)
    return RoutingTrace(
        picks_TLK.astype(np.int16),
        real,
        request=np.concatenate(request).astype(np.int32),
        is_decode=np.concatenate(decode),
        layer_ids=np.array(list(capture.routers), np.int32),
        domain=np.concatenate(domain).astype(np.int16),
        domain_names=names,
        name=type(model).__name__,
    )


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)


def _config(model: nn.Module, *names: str) -> int | None:
    """The first of these numbers that the model's config has."""
    config: Any = model.config
    config = getattr(config, "text_config", None) or config
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _num_experts(model: nn.Module) -> int:
    found = _config(model, "n_routed_experts", "num_local_experts", "num_experts")
    if found is None:
        raise ModelError("the model's config does not say how many experts it has")
    return found
