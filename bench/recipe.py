"""The worth of each part of the training recipe: curves of one model with one setting changed.

    python bench/recipe.py            # the published shape 1 x 32, 250 epochs: minutes a recipe

Trains GPTs of one shape on the same data for the same epochs. A recipe that is in the JSON with the
same settings is not trained again. Writes bench/results/recipe.json and docs/figures/recipe.png;
prints a table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastmem import GPT, GPTConfig, TrainConfig, UniformSequences, train
from fastmem.base.storage import write_json
from fastmem.report.figures import COLOURS, DASHES, legend, write_figure
from fastmem.sweeps.rows import environment

ROOT = Path(__file__).parents[1]
SHAPE = GPTConfig(layers=1, width=32, heads=16, vocab=2048, length=64)
COUNT = 512
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "one rate, 0.04": {"lr": 0.04},
    "one rate, 0.02": {"lr": 0.02},
    "beta1 0.9": {"beta1": 0.9},
    "batch 64": {"batch": 64},
    "batch 512": {"batch": 512},
    "8 heads": {"heads": 8},
    "1 head": {"heads": 1},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=250)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "recipe.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "recipe")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    given = parser.parse_args(arguments)
    found = json.loads(given.out.read_text())["recipes"] if given.out.exists() else {}
    for name in given.recipes:
        settings = described(name, given.epochs)
        if found.get(name, {}).get("settings") != settings:
            found[name] = {"settings": settings, **trained(name, given.epochs)}
            here = environment(GPT(SHAPE).device)
            write_json(given.out, {**here, "count": COUNT, "recipes": found})
        print(f"{name:16} {found[name]['curve'][-1][1]:.3f} bits per parameter", flush=True)
    for path in write_figure(lambda figure: draw(figure, found), given.figure):
        if path.suffix != ".png":
            path.unlink()
    return 0


def described(name: str, epochs: float) -> dict[str, Any]:
    """The shape and all settings of a recipe, including its learning rates."""
    shape, config = recipe(name, epochs)
    return {"model": asdict(shape), "train": asdict(config.for_shape(shape))}


def recipe(name: str, epochs: float) -> tuple[GPTConfig, TrainConfig]:
    """The shape and the config of a recipe."""
    change = dict(RECIPES[name])
    shape = replace(SHAPE, heads=change.pop("heads", SHAPE.heads))
    return shape, TrainConfig(epochs=epochs, **change)


def trained(name: str, epochs: float) -> dict[str, Any]:
    """Strict bits per parameter at each scored epoch."""
    shape, config = recipe(name, epochs)
    model = GPT(shape)
    sequences = UniformSequences(COUNT, shape.length, shape.vocab)
    result = train(model, sequences, config, progress=name)
    scale = result.epochs / result.steps
    curve = [[p.step * scale, p.memorized_bits / shape.parameter_count] for p in result.curve]
    return {"curve": curve, "steps": result.steps, "seconds": result.seconds}


def draw(figure: Any, found: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    for place, (name, one) in enumerate(found.items()):
        epochs, bits = zip(*one["curve"], strict=True)
        dash = DASHES[place // len(COLOURS)]
        axes.plot(
            epochs, bits, color=COLOURS[place % len(COLOURS)], linestyle=dash, linewidth=2,
            label=f"{name}: {bits[-1]:.2f}",
        )  # fmt: skip
    axes.set(xlabel="epochs", ylabel="memorized bits per parameter, strict")
    axes.set_ylim(0)
    axes.set_title(f"1 × 32, V 2048, S 64, N {COUNT}: one setting changed")
    legend(figure, axes.get_legend_handles_labels()[0])


if __name__ == "__main__":
    sys.exit(main())
