"""A small corpus of made-up words, and the flags of a text sweep of seconds."""

import json
import random
from pathlib import Path

WORDS = 300
_FLAGS = (
    "--length 16 --width 8 --heads 2 --seeds 0 1 --counts 20 60 --steps 60 --batch 32 --canaries 2 "
    "--reference-steps 20 40 --reference-width 16 --reference-heads 4"
)
FLAGS = _FLAGS.split()
"""Four runs, two references, and ten runs on uniform sequences."""


def documents(n: int = 200, seed: int = 0) -> list[str]:
    """n texts of 20 to 120 of 300 words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randrange(2, 7))) for _ in range(WORDS)]
    return [" ".join(rng.choices(words, k=rng.randrange(20, 120))) for _ in range(n)]


def write_documents(path: Path, n: int = 200, seed: int = 0) -> Path:
    """A .jsonl of these documents."""
    lines = [json.dumps({"text": text}) for text in documents(n, seed)]
    path.write_text("\n".join(lines) + "\n")
    return path
