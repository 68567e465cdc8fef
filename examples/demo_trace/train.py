"""Train the small mixture-of-experts language model of the demo trace on one CPU core.

With ``--last-balance`` the weight of the balance loss falls, so that experts are kept alive at first and may specialise
later, as DeepSeek-V3's do (arXiv 2412.19437, section 4.2: no balancing bias in the last part). The first layer keeps
the first weight: it routes by the token alone, and there experts that are once out of use never came back.

The model is a stock ``OlmoeForCausalLM``. Two things differ from the library's own training path: the balance
loss is taken for each layer alone (the stock one averages over layers, so a single layer can collapse while the
loss reads as perfect), and experts run as a loop over contiguous slices, which is fastest for fp32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import DOMAINS
from torch import Tensor
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


@dataclass(frozen=True)
class Options:
    """Everything that decides the run; written to metrics.json as it is."""

    minutes: float
    threads: int
    seed: int
    batch: int
    length: int
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    heads: int
    learning_rate: float
    weight_decay: float
    balance: float
    last_balance: float
    z_loss: float


def sliced_experts(module: torch.nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Experts over token rows sorted by expert: one gather in, one scatter out; hidden [T, D], index [T, K]."""
    k = index.shape[1]
    order = torch.argsort(index.reshape(-1), stable=True)
    counts = torch.bincount(index.reshape(-1), minlength=module.num_experts).tolist()
    rows = torch.div(order, k, rounding_mode="floor")
    outputs = []
    for expert, part in enumerate(hidden[rows].split(counts)):
        if part.shape[0]:
            gate, up = F.linear(part, module.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(module.act_fn(gate) * up, module.down_proj[expert]))
    mixed = torch.cat(outputs) * weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden).index_add(0, rows, mixed)


ALL_EXPERTS_FUNCTIONS.register("sliced", sliced_experts)


def build_model(options: Options, vocab: int, pad: int, eos: int) -> OlmoeForCausalLM:
    """An OLMoE with random weights, sized by the options."""
    config = OlmoeConfig(
        vocab_size=vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        max_position_embeddings=2 * options.length,
        router_aux_loss_coef=0.0,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=eos,
        eos_token_id=eos,
    )
    return OlmoeForCausalLM(config)


def batches(text: Path, options: Options) -> Iterator[Tensor]:
    """Endless batches [batch, length] of train ids with an equal number of sequences of each domain."""
    rng = np.random.default_rng(options.seed)
    ids = {domain: np.load(text / f"train_{domain}.npy") for domain in DOMAINS}
    turn = 0
    while True:
        rows = []
        for _ in range(options.batch):
            domain = ids[DOMAINS[turn % len(DOMAINS)]]
            start = int(rng.integers(0, domain.size - options.length))
            rows.append(domain[start : start + options.length].astype(np.int64))
            turn += 1
        yield torch.from_numpy(np.stack(rows))


def held_out_windows(text: Path, tokenizer: object, length: int, most: int) -> dict[str, Tensor]:
    """Per domain, windows [n, length] of the held-out documents in order, at most ``most`` tokens."""
    pieces: dict[str, list[int]] = {domain: [] for domain in DOMAINS}
    with (text / "held_out.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            item = json.loads(line)
            ids = tokenizer(item["text"], add_special_tokens=False, verbose=False)["input_ids"]
            pieces[item["domain"]].extend([tokenizer.eos_token_id, *ids])
    windows = {}
    for domain, ids in pieces.items():
        n = min(len(ids), most) // length
        windows[domain] = torch.tensor(ids[: n * length]).view(n, length)
    return windows


def router_losses(logits: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The Switch balance loss [L] of each layer, the mean z-loss, and the shares [L, E] of the loads.

    The balance loss of one layer is E * sum_e share_e * mean_probability_e, which is 1 when even.
    """
    balance, z, shares = [], [], []
    for layer in logits:
        probabilities = layer.float().softmax(-1)
        experts = layer.shape[-1]
        picked = torch.bincount(layer.topk(top_k, dim=-1).indices.reshape(-1), minlength=experts)
        share = picked.float() / picked.sum()
        balance.append(experts * (share * probabilities.mean(0)).sum())
        z.append(layer.float().logsumexp(-1).square().mean())
        shares.append(share)
    return torch.stack(balance), torch.stack(z).mean(), torch.stack(shares)


def schedule(done: float, peak: float) -> float:
    """Learning rate when a share ``done`` of the wall-time budget is spent: short warmup, then cosine to 5 %."""
    warm = 0.02
    if done < warm:
        return peak * (0.05 + 0.95 * done / warm)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm) / (1 - warm)))))


@torch.no_grad()
def held_out_loss(model: OlmoeForCausalLM, windows: dict[str, Tensor], batch: int) -> dict[str, float]:
    """Mean loss per domain in nats per predicted token."""
    model.eval()
    losses = {}
    for domain, rows in windows.items():
        total = 0.0
        for part in rows.split(batch):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1]
            total += float(
                F.cross_entropy(logits.reshape(-1, logits.shape[-1]), part[:, 1:].reshape(-1), reduction="sum")
            )
        losses[domain] = total / (rows.shape[0] * (rows.shape[1] - 1))
    model.train()
    return losses


class Bigram:
    """Two interpolated bigram models over train ids; the better one (on a train slice) is the baseline."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def counts(self, ids: list[np.ndarray]) -> np.ndarray:
        pairs = sum(
            np.bincount(part[:-1].astype(np.int64) * self.vocab + part[1:], minlength=self.vocab**2) for part in ids
        )
        return pairs.reshape(self.vocab, self.vocab).astype(np.float64)

    def kneser_ney(self, counts: np.ndarray, discount: float) -> np.ndarray:
        """Interpolated Kneser-Ney, table [previous, next]."""
        follows = (counts > 0).sum(0) + 0.1
        lower = follows / follows.sum()
        total = counts.sum(1, keepdims=True)
        kinds = (counts > 0).sum(1, keepdims=True)
        table = np.maximum(counts - discount, 0) + discount * kinds * lower
        return np.where(total > 0, table / np.maximum(total, 1), lower)

    def jelinek_mercer(self, counts: np.ndarray, weight: float) -> np.ndarray:
        """Bigram mixed with an add-0.1 unigram, table [previous, next]."""
        unigram = (counts.sum(0) + 0.1) / (counts.sum() + 0.1 * self.vocab)
        total = counts.sum(1, keepdims=True)
        return np.where(total > 0, weight * counts / np.maximum(total, 1) + (1 - weight) * unigram, unigram)

    def fit(self, ids: list[np.ndarray]) -> tuple[np.ndarray, str]:
        """Tune on the last 5 % of each id array, then refit the best one on all of them."""
        cuts = [int(0.95 * part.size) for part in ids]
        counts = self.counts([part[:cut] for part, cut in zip(ids, cuts, strict=True)])
        kinds = [("kneser_ney", d) for d in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)]
        kinds += [("jelinek_mercer", w) for w in (0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98)]
        scores = {}
        for name, value in kinds:
            table = getattr(self, name)(counts, value)
            parts = [part[cut:] for part, cut in zip(ids, cuts, strict=True)]
            # Domains weigh the same, as they do in the held-out mean.
            scores[name, value] = float(np.mean([-np.log(table[part[:-1], part[1:]]).mean() for part in parts]))
        name, value = min(scores, key=scores.__getitem__)
        return getattr(self, name)(self.counts(ids), value), f"{name}({value})"


def bigram_losses(text: Path, windows: dict[str, Tensor], vocab: int) -> dict[str, object]:
    """Bigram loss on the very pairs that the model predicts; one table for all, and one that is told the domain."""
    bigram = Bigram(vocab)
    ids = {domain: np.load(text / f"train_{domain}.npy") for domain in DOMAINS}
    table, kind = bigram.fit(list(ids.values()))

    def loss(of: np.ndarray, rows: Tensor) -> float:
        pairs = rows.numpy()
        return float(-np.log(of[pairs[:, :-1], pairs[:, 1:]]).mean())

    mixed = {domain: loss(table, rows) for domain, rows in windows.items()}
    told = {domain: loss(bigram.fit([ids[domain]])[0], rows) for domain, rows in windows.items()}
    one, per = float(np.mean(list(mixed.values()))), float(np.mean(list(told.values())))
    best = told if per < one else mixed
    return {
        "kind": f"{kind}, fitted per domain" if per < one else f"{kind}, one table",
        "all": min(one, per),
        "domains": best,
        "one_table": {"all": one, "domains": mixed},
        "fitted_per_domain": {"all": per, "domains": told},
    }


def save(model: OlmoeForCausalLM, tokenizer: object, out: Path, metrics: dict[str, object]) -> None:
    """Write a checkpoint so that ``out`` is at every moment either the old one or the new one."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def parameter_groups(model: OlmoeForCausalLM, decay: float) -> list[dict[str, object]]:
    """Weight decay on matrices only."""
    named = [item for item in model.named_parameters() if item[1].requires_grad]
    matrices = [value for name, value in named if value.ndim > 1 and "embed" not in name]
    rest = [value for name, value in named if value.ndim <= 1 or "embed" in name]
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def report(step: int, tokens: int, elapsed: float, loss: float, parts: tuple[float, float], shares: Tensor) -> None:
    """One line for the run, one for the balance: per layer the heaviest and lightest load over the mean."""
    relative = shares * shares.shape[1]
    dead = (relative < 0.01).sum(1).tolist()
    print(
        f"step {step} {elapsed / 60:.1f} min {tokens / 1e6:.2f} M tokens {tokens / elapsed:.0f} tok/s "
        f"loss {loss:.4f} balance {parts[0]:.3f} z {parts[1]:.2f}\n"
        f"   max {' '.join(f'{v:.2f}' for v in relative.max(1).values)} | "
        f"min {' '.join(f'{v:.2f}' for v in relative.min(1).values)} | dead {dead}",
        flush=True,
    )


def train(text: Path, out: Path, options: Options, experts: str, save_minutes: float, held_tokens: int) -> None:
    """Train until the wall-time budget is spent, then measure and save."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    model = build_model(options, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    model.set_experts_implementation(experts)
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), betas=(0.9, 0.95), eps=1e-8)
    windows = held_out_windows(text, tokenizer, options.length, held_tokens)
    metrics: dict[str, object] = {
        "options": asdict(options),
        "config": model.config.to_diff_dict(),
        "parameters": sum(value.numel() for value in model.parameters()),
        "corpus": json.loads((text / "corpus.json").read_text("utf-8")),
        "bigram": bigram_losses(text, windows, len(tokenizer)),
        "torch": torch.__version__,
        "final": False,
    }
    print(f"parameters {metrics['parameters'] / 1e6:.2f} M, bigram {metrics['bigram']['all']:.4f}", flush=True)
    start = saved = said = time.monotonic()
    smooth, loads, tokens = 0.0, torch.zeros(options.layers, options.experts), 0
    for step, ids in enumerate(batches(text, options)):
        elapsed = time.monotonic() - start
        if elapsed > options.minutes * 60:
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule(elapsed / (options.minutes * 60), options.learning_rate)
        got = model(input_ids=ids, use_cache=False, output_router_logits=True)
        language = F.cross_entropy(got.logits[:, :-1].reshape(-1, got.logits.shape[-1]), ids[:, 1:].reshape(-1))
        balance, z, shares = router_losses(got.router_logits, options.top_k)
        falls = options.last_balance / options.balance if options.balance else 1.0
        weight = torch.full_like(balance, options.balance)
        weight[1:] *= falls ** (elapsed / (options.minutes * 60))
        (language + (weight * balance).mean() + options.z_loss * z).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        keep = min(0.98, step / (step + 1))
        smooth = keep * smooth + (1 - keep) * float(language.detach())
        loads = keep * loads + (1 - keep) * shares
        now = time.monotonic()
        if now - said > 15:
            report(step + 1, tokens, now - start, smooth, (float(balance.detach().mean()), float(z.detach())), loads)
            said = now
        if now - saved > save_minutes * 60:
            save(
                model,
                tokenizer,
                out,
                {**metrics, "tokens": tokens, "minutes": (now - start) / 60, "train_loss": smooth},
            )
            saved = now
    minutes = (time.monotonic() - start) / 60
    losses = held_out_loss(model, windows, options.batch)
    metrics |= {
        "final": True,
        "tokens": tokens,
        "steps": step,
        "minutes": minutes,
        "train_loss": smooth,
        "model": {"all": float(np.mean(list(losses.values()))), "domains": losses},
        "held_out_tokens": {domain: rows.numel() for domain, rows in windows.items()},
    }
    save(model, tokenizer, out, metrics)
    print(f"done: model {metrics['model']['all']:.4f} bigram {metrics['bigram']['all']:.4f} {losses}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, default=Path("build/demo_text"))
    parser.add_argument("--out", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--minutes", type=float, default=65.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--intermediate", type=int, default=64)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.02, help="weight of the balance loss")
    parser.add_argument(
        "--last-balance",
        type=float,
        help="and at the end, to which it falls by equal factors, but in the first layer; default: the same",
    )
    parser.add_argument("--z-loss", type=float, default=0.001)
    parser.add_argument("--experts-implementation", default="sliced", choices=("sliced", "eager"))
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--held-tokens", type=int, default=40_000, help="most held-out tokens measured per domain")
    args = vars(parser.parse_args())
    if args["last_balance"] is None:
        args["last_balance"] = args["balance"]
    own = {name: args.pop(name) for name in ("text", "out", "experts_implementation", "save_minutes", "held_tokens")}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    train(
        own["text"], own["out"], Options(**args), own["experts_implementation"], own["save_minutes"], own["held_tokens"]
    )


if __name__ == "__main__":
    main()
