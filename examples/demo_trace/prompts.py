"""Cut the held-out documents into prompts: windows of characters at even distances, the same number for each domain."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, default=Path("build/demo_text/held_out.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("build/demo_prompts.jsonl"))
    parser.add_argument("--per-domain", type=int, default=60)
    parser.add_argument("--characters", type=int, default=900)
    args = parser.parse_args()
    documents: dict[str, list[str]] = {}
    for line in args.text.read_text("utf-8").splitlines():
        item = json.loads(line)
        documents.setdefault(item["domain"], []).append(item["text"])
    with args.out.open("w", encoding="utf-8") as stream:
        for domain, texts in documents.items():
            whole = "\n\n".join(texts)
            last = len(whole) - args.characters
            for start in np.linspace(0, last, args.per_domain).astype(int):
                text = whole[start : start + args.characters]
                stream.write(json.dumps({"text": text, "domain": domain}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
