"""Extraction against data set size, on text: python bench/extraction.py [--json FILE]

Trains one shape on more and more sequences of the standard library, with the same number of steps,
and measures by fastmem.extract how often a prefix gives back the rest of a training sequence, and
of a held-out sequence, which generalization alone extracts. The rates fall to that of held-out
sequences where the data exceed what the model can hold.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import fastmem


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 300, 1000, 3000, 10_000])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument(
        "--vocab", type=int, default=512, help="of a BPE trained on other documents"
    )
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--test", type=int, default=5000, help="held-out sequences")
    parser.add_argument("--folder", type=Path, help="of the files; a temporary one by default")
    parser.add_argument("--quick", action="store_true", help="a run that takes seconds")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.counts, options.width, options.heads, options.steps = [20, 200], 8, 4, 30
        options.test, options.vocab = 50, 300
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        rows = curve(options, Path(name))
    if options.json:
        given = {name: v for name, v in vars(options).items() if name not in ("folder", "json")}
        found = {"options": given, "cores": os.cpu_count(), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1))
    return 0


def curve(options: Any, folder: Path) -> list[dict[str, Any]]:
    """One row a data set size; prints each."""
    S = options.length
    corpus = fastmem.prepare_text(folder=folder / "text", length=S, train_tokenizer=options.vocab)
    test = corpus.test.sample(options.test)
    shape = fastmem.GPTConfig(options.layers, options.width, options.heads, test.vocab, S)
    rows = []
    for count in options.counts:
        sequences = corpus.train.sample(count)
        model = fastmem.GPT(shape, seed=0)
        began = time.monotonic()
        fastmem.train(model, sequences, fastmem.TrainConfig(steps=options.steps))
        seconds = time.monotonic() - began
        found = fastmem.extract(
            model, sequences, test, out=folder / f"{count}", prefixes=[S // 8, S // 4, S // 2]
        )
        rows.append(
            {
                "sequences": count,
                "parameters": shape.parameter_count,
                "train_seconds": seconds,
                "extract_seconds": found["seconds"],
                "prefixes": found["prefixes"],
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Exact rates of training and of held-out sequences, by prefix, in percent."""
    parts = [f"N = {row['sequences']:>7,}  "]
    for entry in row["prefixes"]:
        rates = []
        for name in ("train", "test"):
            rate = entry[name]["exact"]
            rates.append(
                f"{100 * rate['estimate']:.2f} [{100 * rate['low']:.2f}, {100 * rate['high']:.2f}]"
            )
        parts.append(f"prefix {entry['prefix']}: {' against '.join(rates)} %")
    return "  ".join(parts) + f"  ({row['train_seconds']:.0f} s of training)"


if __name__ == "__main__":
    raise SystemExit(main())
