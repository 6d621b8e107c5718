"""transformers' Trainer with and without fastmem's patch: losses, peak memory and time.

    python bench/trainer.py --json trainer.json

A small GPT-2 with a vocabulary of 50257 trains 50 steps on sources of Python's standard library,
as bytes, each way in a process of its own. Memory is what a process holds at most beside what it
held before training. The losses of all steps are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

VOCAB, LENGTH, BATCH, STEPS = 50257, 256, 16, 50


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--quick", action="store_true", help="a run that takes seconds")
    parser.add_argument("--one", choices=("patched", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(trained(options.one == "patched", quick=False)))
        return 0
    result: dict[str, Any] = {}
    for way in ("patched", "plain"):
        if options.quick:
            result[way] = trained(way == "patched", quick=True)
            continue
        command = [sys.executable, __file__, "--one", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result[way] = json.loads(done.stdout.splitlines()[-1])
    losses = [result[way].pop("losses") for way in ("patched", "plain")]
    result["steps"] = len(losses[0])
    result["largest_difference_of_losses"] = max(
        abs(ours - theirs) for ours, theirs in zip(*losses, strict=True)
    )
    for name in ("peak_bytes", "cpu_seconds"):
        result[f"{name}_ratio"] = result["patched"][name] / result["plain"][name]
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    return 0


def trained(patched: bool, quick: bool) -> dict[str, Any]:
    """Losses of the steps, the peak of memory beside what the process held before, and seconds."""
    import torch
    import transformers
    from score import peak_beside
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from fastmem.integrations.transformers import patch

    torch.manual_seed(0)
    vocab, batch, steps = (1000, 2, 3) if quick else (VOCAB, BATCH, STEPS)
    config = GPT2Config(vocab_size=vocab, n_embd=64, n_layer=2, n_head=2, n_positions=LENGTH)
    model = GPT2LMHeadModel(config)
    raw = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    cuts = range(0, len(raw) - LENGTH, LENGTH)
    rows = [torch.tensor(list(raw[begin : begin + LENGTH])) for begin in cuts]
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(patch(model) if patched else model, settings, train_dataset=data)
        begin, before = time.monotonic(), sum(os.times()[:2])
        peak = peak_beside(trainer.train)
        return {
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "peak_bytes": peak,
            "seconds": time.monotonic() - begin,
            "cpu_seconds": sum(os.times()[:2]) - before,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }


if __name__ == "__main__":
    sys.exit(main())
