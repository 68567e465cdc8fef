"""Build the text of the demo model: five domains, a split by document, and a byte-level BPE tokenizer.

Text comes from two Debian packages (fetched with ``apt-get download``, unpacked, never installed) and from
the Python standard library of the interpreter that runs this file. No text leaves the build folder: only the
routing ids of the trained model are shipped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DOMAINS = ("english", "german", "japanese", "dictionary", "python")
LANGUAGES = {"english": "en-US", "german": "de-DE", "japanese": "ja-JP"}
PACKAGES = ("debian-handbook", "dict-gcide")
EOT, PAD = "<|endoftext|>", "<|pad|>"
BLOCK_TEXTS = frozenset({"p", "div", "li", "h1", "h2", "h3", "h4", "h5", "pre", "tr", "dt", "dd", "br", "table"})
SKIPPED_MODULES = frozenset({"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text of one domain; ``unit`` is what the split keeps whole (chapter, block or module)."""

    domain: str
    unit: str
    text: str


class _PageText(HTMLParser):
    """Plain text of one handbook page, without head, navigation or page title bars."""

    VOID = frozenset({"br", "img", "hr", "meta", "link", "input", "col"})
    HIDDEN = frozenset({"docnav", "toc", "banner"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.stack: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCK_TEXTS:
            self.parts.append("\n")
        if tag in self.VOID:
            return
        named = dict(attrs)
        kind = [*(named.get("class") or "").split(), named.get("id") or ""]
        hidden = tag in {"head", "script", "style"} or bool(self.HIDDEN.intersection(kind))
        self.stack.append(hidden or bool(self.stack and self.stack[-1]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCK_TEXTS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if self.stack:
            self.stack.pop()
        if tag in BLOCK_TEXTS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not (self.stack and self.stack[-1]):
            self.parts.append(data)

    def text(self) -> str:
        lines = (re.sub(r"[ \t\r\f\v\xa0\u200b]+", " ", line).strip() for line in "".join(self.parts).split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def fetch_packages(build: Path) -> dict[str, str]:
    """Download and unpack the Debian packages; returns their versions."""
    for tool in ("apt-get", "dpkg", "dpkg-deb"):
        if shutil.which(tool) is None:
            sys.exit(
                f"error: '{tool}' was not found. The demo text comes from Debian packages: run this on Debian or "
                f"Ubuntu, or put the .deb files of {', '.join(PACKAGES)} in {build / 'deb'} on a machine that has dpkg."
            )
    folder, root = build / "deb", build / "root"
    folder.mkdir(parents=True, exist_ok=True)
    versions: dict[str, str] = {}
    for name in PACKAGES:
        if not list(folder.glob(f"{name}_*.deb")):
            got = subprocess.run(["apt-get", "download", name], cwd=folder, capture_output=True, text=True)
            if got.returncode:
                sys.exit(f"error: apt-get download {name} failed (run 'apt-get update' first?):\n{got.stderr}")
        deb = sorted(folder.glob(f"{name}_*.deb"))[-1]
        subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
        shown = subprocess.run(["dpkg-deb", "-f", str(deb), "Version"], check=True, capture_output=True, text=True)
        versions[name] = shown.stdout.strip()
    return versions


def chapter_of_page(index_html: str) -> dict[str, str]:
    """Map each page of the handbook to the chapter page it follows in the table of contents."""
    chapters: dict[str, str] = {}
    current = ""
    for page in re.findall(r'href="([\w.-]+\.html)(?:#[^"]*)?"', index_html):
        if page in chapters or page == "index.html":
            continue
        if not page.startswith("sect."):
            current = page.removesuffix(".html")
        chapters[page] = current
    return chapters


def read_handbook(root: Path) -> list[Document]:
    """Every page of the handbook in each language, with its chapter as the unit of the split."""
    html = root / "usr/share/doc/debian-handbook/html"
    chapters = chapter_of_page((html / LANGUAGES["english"] / "index.html").read_text("utf-8"))
    documents = []
    for domain, folder in LANGUAGES.items():
        for page, chapter in chapters.items():
            path = html / folder / page
            if not path.is_file():
                continue
            parser = _PageText()
            parser.feed(path.read_text("utf-8"))
            if len(text := parser.text()) > 400:
                documents.append(Document(domain, chapter, text))
    return documents


def read_dictionary(root: Path, max_bytes: int) -> list[Document]:
    """Dictionary entries in blocks of about 8 kB; sixteen contiguous blocks make one unit of the split."""
    data = gzip.decompress((root / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode("utf-8", "replace")
    entries = re.split(r"\n\n(?=\S)", data[data.index("\nA \\") if "\nA \\" in data else 20_000 :])
    blocks, current, size = [], [], 0
    for entry in entries:
        current.append(entry.strip("\n"))
        size += len(entry)
        if size > 8_000:
            blocks.append("\n\n".join(current))
            current, size = [], 0
    units = [blocks[start : start + 16] for start in range(0, len(blocks), 16)]
    keep = max(1, min(len(units), max_bytes // (16 * 8_000)))
    picked = np.linspace(0, len(units) - 1, keep).round().astype(int)
    return [Document("dictionary", f"block{unit:04d}", text) for unit in picked for text in units[unit]]


def read_stdlib(max_bytes: int, rng: np.random.Generator) -> list[Document]:
    """Standard-library sources; a top-level module or package is the unit of the split."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIPPED_MODULES.intersection(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            files.append((parts[0].removesuffix(".py"), path))
    units = sorted({unit for unit, _ in files})
    documents, size = [], 0
    for unit in rng.permutation(units):
        for path in (path for name, path in files if name == unit):
            text = path.read_text("utf-8", "replace")
            if 400 < len(text) < 200_000:
                documents.append(Document("python", str(unit), text))
                size += len(text)
        if size > max_bytes:
            break
    return documents


def choose_held_out(documents: list[Document], share: float, rng: np.random.Generator) -> set[str]:
    """Units, drawn at random, that together hold about ``share`` of the bytes (no unit above the rest of it)."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.unit] = sizes.get(document.unit, 0) + len(document.text.encode())
    want, chosen, have = share * sum(sizes.values()), set(), 0
    for unit in rng.permutation(sorted(sizes)):
        if have + sizes[str(unit)] <= 1.15 * want:
            chosen.add(str(unit))
            have += sizes[str(unit)]
        if have >= 0.85 * want:
            break
    return chosen


def split(documents: list[Document], share: float, rng: np.random.Generator) -> tuple[list[Document], list[Document]]:
    """Split by whole units; the same chapters are held out in every language, so no translation leaks."""
    english = [document for document in documents if document.domain == "english"]
    chapters = choose_held_out(english, share, rng)
    held: dict[str, set[str]] = dict.fromkeys(LANGUAGES, chapters)
    for domain in ("dictionary", "python"):
        held[domain] = choose_held_out([item for item in documents if item.domain == domain], share, rng)
    train = [item for item in documents if item.unit not in held[item.domain]]
    test = [item for item in documents if item.unit in held[item.domain]]
    return train, test


def train_tokenizer(documents: list[Document], vocab: int, rng: np.random.Generator) -> PreTrainedTokenizerFast:
    """Byte-level BPE on an equal number of bytes of each domain's train text."""
    texts: list[str] = []
    for domain in DOMAINS:
        mine = [item.text for item in documents if item.domain == domain]
        budget = 1_200_000
        for pick in rng.permutation(len(mine)):
            texts.append(mine[pick])
            budget -= len(mine[pick].encode())
            if budget < 0:
                break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, pad_token=PAD, padding_side="left"
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Token ids of all texts in order, each led by the end-of-text token; shape [tokens], uint16."""
    pieces: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        pieces.append(tokenizer.eos_token_id)
        pieces.extend(ids)
    return np.asarray(pieces, dtype=np.uint16)


def build(out: Path, seed: int, vocab: int, share: float, max_bytes: int) -> dict[str, object]:
    """Write tokenizer, train ids and held-out documents to ``out``; returns the summary."""
    rng = np.random.default_rng(seed)
    versions = fetch_packages(out)
    documents = read_handbook(out / "root") + read_dictionary(out / "root", max_bytes) + read_stdlib(max_bytes, rng)
    train, test = split(documents, share, rng)
    tokenizer = train_tokenizer(train, vocab, rng)
    tokenizer.save_pretrained(out / "tokenizer")
    summary: dict[str, object] = {
        "seed": seed,
        "vocab": len(tokenizer),
        "packages": versions,
        "python": sys.version.split()[0],
        "domains": {},
    }
    for domain in DOMAINS:
        ids = encode(tokenizer, [item.text for item in train if item.domain == domain])
        np.save(out / f"train_{domain}.npy", ids)
        held = [item for item in test if item.domain == domain]
        summary["domains"][domain] = {
            "train_tokens": int(ids.size),
            "train_documents": sum(item.domain == domain for item in train),
            "held_out_documents": len(held),
            "held_out_tokens": int(encode(tokenizer, [item.text for item in held]).size),
            "held_out_units": sorted({item.unit for item in held}),
        }
    with (out / "held_out.jsonl").open("w", encoding="utf-8") as stream:
        for item in test:
            stream.write(json.dumps({"domain": item.domain, "text": item.text}, ensure_ascii=False) + "\n")
    (out / "corpus.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo_text"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--held-out", type=float, default=0.09, help="share of each domain that is held out")
    parser.add_argument("--max-bytes", type=int, default=5_000_000, help="most text of dictionary and python each")
    args = parser.parse_args()
    print(json.dumps(build(args.out, args.seed, args.vocab, args.held_out, args.max_bytes), indent=2))


if __name__ == "__main__":
    main()
