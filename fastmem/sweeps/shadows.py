"""Shadow models: models of the target's shape, trained together on random halves of sequences.

E shadow models, N sequences of S tokens, of members and of non-members.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmem.base.arguments import checked_device
from fastmem.base.lock import locked
from fastmem.base.stats import Floats
from fastmem.base.storage import (
    Row,
    check_folder,
    read_json,
    read_sealed,
    write_json,
    write_sealed,
)
from fastmem.base.terminal import say
from fastmem.data.array import from_array
from fastmem.data.order import permutation
from fastmem.data.sequences import Sequences, Tokens
from fastmem.models.engine import Precision
from fastmem.models.gpt import GPTConfig
from fastmem.models.score import sequence_bits
from fastmem.sweeps.groups import MEMORY_FRACTION, free_bytes, group_key, needed_bytes
from fastmem.sweeps.job import train_group
from fastmem.sweeps.rows import RunSpec
from fastmem.training.config import TrainConfig

SETTINGS = "shadows.json"


@dataclass(frozen=True)
class Shadows:
    """Bits of sequences by shadow models."""

    bits: Floats  # (E, N)
    is_member: NDArray[np.bool_]  # (E, N)
    """Whether the shadow model was trained on the sequence."""
    settings: Row
    """Shape, training and data of the shadow models."""


def halves(models: int, count: int, seed: int) -> NDArray[np.bool_]:  # (E, N)
    """The sequences of each shadow model: a random half, or the rest of the half before.

    Shadow models 2 j and 2 j + 1 divide the order `permutation(seed, j, count)` between them, so
    that every sequence is in exactly half of an even number of models.

    Example:
        >>> found = halves(4, count=6, seed=0)
        >>> found.sum(0), found.sum(1)
        (array([2, 2, 2, 2, 2, 2]), array([3, 3, 3, 3]))
    """
    is_member = np.zeros((models, count), dtype=np.bool_)
    for e in range(models):
        order = permutation(seed, e // 2, count)
        is_member[e, order[count // 2 :] if e % 2 else order[: count // 2]] = True
    return is_member


def check_models(models: int) -> None:
    """ValueError unless so many shadow models can share the sequences."""
    if models < 2 or models % 2:
        raise ValueError(
            f"{models} shadow models: give an even number, such as 16, so that half of them are "
            "trained on each sequence"
        )


def shadow_models(
    target: Row,
    tokens: Tokens,
    models: int,
    folder: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> Shadows:
    """Trains shadow models, and scores all sequences under each.

    Each has the target's shape and hyperparameters, and is trained as many epochs as the target, on
    its half of the sequences (`halves`); its seed follows the target's. As many train together as
    memory has room for. Bits are kept in `folder`, in a file for each model that is finished;
    models in training resume from checkpoints there.

    Args:
        target: the row of the target's training, the content of run.json.
        tokens: (N, S) tokens of members and of non-members.
        models: E, even, from 2.
        folder: of these shadow models alone.
        seed: of the halves.
        device: where to train.
        overwrite: True trains the models in the folder again.
        progress: shows a bar.

    Raises:
        ValueError: E is odd; the folder holds other files, or shadow models of another target or of
            other sequences; or a model diverged or does not fit into memory.
    """
    check_models(models)
    shape, is_member = GPTConfig(**target["model"]), halves(models, len(tokens), seed)
    pool = from_array(tokens, shape.vocab)
    runs = [_run(target, shape, tokens[side], e) for e, side in enumerate(is_member)]
    train = asdict(runs[0].train)
    settings = {"model": target["model"], "train": train, "data": pool.description(), "seed": seed}
    check_folder(folder, (SETTINGS,), "group of shadow models")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if overwrite:
            for path in (*folder.glob("*.bits"), *folder.glob("*.pt")):
                path.unlink()
            (folder / SETTINGS).unlink(missing_ok=True)
        _check_same(folder, settings)
        write_json(folder / SETTINGS, settings)
        _train_missing(runs, pool, folder, device, progress)
    bits = [np.frombuffer(read_sealed(_bits_of(folder, e))) for e in range(models)]
    return Shadows(np.stack(bits), is_member, settings)


def _run(target: Row, shape: GPTConfig, tokens: Tokens, e: int) -> RunSpec:
    """The run of shadow model e, of as many epochs as the target's, in steps."""
    own = {name: value for name, value in target["train"].items() if name != "seed"}
    seed = (target["seed"] + 1 + e) % 2**64
    train = TrainConfig(**own, seed=seed)
    steps = round(target["epochs"] * len(tokens) / train.step_batch(len(tokens)))
    budget = {"steps": max(1, steps), "epochs": None, "seconds": None, "until": "budget"}
    return RunSpec(shape, from_array(tokens, shape.vocab), replace(train, **budget))


def _check_same(folder: Path, settings: Row) -> None:
    """ValueError if the folder holds other shadow models."""
    if not (folder / SETTINGS).exists():
        return
    theirs = read_json(folder / SETTINGS)
    for name, ours in settings.items():
        if theirs[name] != ours:
            what = {"data": "other data", "seed": f"other halves (seed {theirs['seed']})"}
            raise ValueError(
                f"{folder} holds shadow models of {what.get(name, f'another target ({name})')}: "
                "give another --out, or --overwrite to train them again"
            )


def _train_missing(
    runs: Sequence[RunSpec], pool: Sequences, folder: Path, device: str, progress: bool
) -> None:
    """Trains the runs whose bits the folder lacks, as many together as fit, and writes bits."""
    place = checked_device(device)
    missing = [e for e in range(len(runs)) if not _bits_of(folder, e).exists()]
    if missing and progress:
        done = len(runs) - len(missing)
        say(f"{len(missing)} shadow models to train" + f", {done} are done" * bool(done))
    size = len(runs)
    while missing:
        need = max(needed_bytes(runs[e], place) for e in missing)
        size = min(size, max(1, int(MEMORY_FRACTION * free_bytes(place) / need)))
        key = group_key(runs[missing[0]])  # halves of an odd number differ in size
        group = [e for e in missing if group_key(runs[e]) == key][:size]
        checkpoints = [folder / f"{e:03d}.pt" for e in group]
        label = f"{len(group)} shadow models"
        done_runs = train_group([runs[e] for e in group], place, checkpoints, progress and label)
        if done_runs is None:  # too many for the memory
            size = max(1, len(group) // 2)
            continue
        for e, (row, model) in zip(group, done_runs, strict=True):
            if model is None:
                raise ValueError(f"shadow model {e + 1}: {row['error']}")
            bits = sequence_bits(model, pool, _precision(runs[e]))
            write_sealed(_bits_of(folder, e), bits.tobytes())
            (folder / f"{e:03d}.pt").unlink(missing_ok=True)
        missing = [e for e in missing if e not in group]


def _precision(run: RunSpec) -> Precision:
    """The precision of scores under the model as it is stored."""
    kept = run.train.precision
    return kept if kept in ("bf16-true", "bf16-stochastic") else "fp32"


def _bits_of(folder: Path, e: int) -> Path:
    return folder / f"{e:03d}.bits"
