"""Training to memorize: one model, or E models of one shape together.

E models, B batch, S tokens a sequence, N sequences.
"""

from collections.abc import Sequence, Sized
from pathlib import Path

import torch
from numpy.typing import ArrayLike

from fastmem.base.arguments import user_path
from fastmem.base.ranks import Stopped, current, rank_and_size
from fastmem.data.array import as_sequences
from fastmem.data.sequences import Sequences
from fastmem.models.engine import weights_dtype
from fastmem.models.flops import matmul_rate
from fastmem.models.gpt import GPT, check_model, difference, frozen, ordered
from fastmem.models.sharded import computing, device_of, is_sharded
from fastmem.training.config import TrainConfig
from fastmem.training.group import Group, Label, checkpoint_seconds
from fastmem.training.profile import phase
from fastmem.training.run_state import Diverged, RunState, TrainResult, trained_ranges

_NOT_A_SET = "a data set must be a fastmem.Sequences"


def train(
    model: GPT,
    sequences: Sequences | ArrayLike,
    config: TrainConfig | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | Label = True,
) -> TrainResult:
    """Trains the model, in place, to code the sequences in as few bits as possible.

    Minimizes `model.token_bits(batch).mean()` over batches in the order of
    `permutation(config.seed, epoch, N)`; a batch may end one epoch and begin the next. In float32
    on a CPU the C++ core computes loss and gradients in one call, else PyTorch does.

    Args:
        model: a GPT as made, trained on its device, or a `sharded_gpt`, by all ranks together. Its
            weights get the dtype of the precision: float32 (float64 stays), bfloat16 for
            "bf16-true" and "bf16-stochastic". Parameters with requires_grad False stay as they are.
            The others become views of one tensor.
        sequences: the data set, with a vocabulary and a length up to those of the model, or tokens
            as `from_array` takes them.
        config: budget, optimizer and precision.
        checkpoint: file to save the run in, every 20 seconds and at the end. If the file exists,
            the run resumes from it and ends with the same bytes (same device and threads) as a run
            that never stopped. The caller deletes the file. Ranks write a folder beside its place,
            `run.shards` of `run.pt`, and also go on from the file of a process alone.
        progress: shows a bar on a terminal and in a notebook, else a line every 30 seconds; a
            string becomes its label, or a function that makes the label from the seconds left.

    Raises:
        ValueError: arguments that do not fit each other, a checkpoint of another run, or a model
            with hooks, masks or other modules, which training would ignore.
        Diverged: a loss that is not finite, ten times the first loss, or twice the first loss for
            50 steps; names step and learning rate. Raised up to READ_STEPS steps later.

    Example:
        >>> import fastmem
        >>> model = fastmem.GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4))
        >>> sequences = fastmem.UniformSequences(8, length=4, vocab=16)
        >>> result = train(model, sequences, TrainConfig(steps=100), progress=False)
        >>> result.epochs, result.memorized_bits > 0.3 * sequences.coded_entropy_bits
        (100.0, True)

    Source: the capacity experiment of arXiv 2505.24832, section 3.
    """
    sequences = as_sequences(_NOT_A_SET, sequences)
    (outcome,) = train_many([model], [sequences], [config or TrainConfig()], [checkpoint], progress)
    if isinstance(outcome, Diverged):
        raise outcome
    return outcome


def train_many(
    models: Sequence[GPT],
    sets: Sequence[Sequences],
    configs: Sequence[TrainConfig] | None = None,
    checkpoints: Sequence[str | Path | None] | None = None,
    progress: bool | Label = True,
) -> list[TrainResult | Diverged]:
    """Trains E models of one shape together, in place, each as `train` does alone.

    Computes `[train(*run) for run in zip(models, sets, configs, checkpoints)]`, up to rounding,
    with one step of all models in one computation. A model that has spent its budget or diverged
    leaves; the other models continue.

    Args:
        models: E different models of one shape, on one device.
        sets: a data set for each model, all of one length, and of one size if smaller than the
            batch.
        configs: a config for each model, all of one precision and one batch size. Budgets in
            seconds share the clock: each model counts its part of the time.
        checkpoints: a file or None for each model; files may be of different steps.
        progress: as in `train`.

    Returns:
        For each model its result, or the Diverged that `train` would raise.

    Raises:
        ValueError: arguments that do not fit each other, or a checkpoint of another run.

    Example:
        >>> import fastmem
        >>> shape = fastmem.GPTConfig(1, 8, 2, vocab=16, length=4)
        >>> models = [fastmem.GPT(shape, seed) for seed in (0, 1)]
        >>> sets = [fastmem.UniformSequences(8, length=4, vocab=16, seed=s) for s in (0, 1)]
        >>> [r.steps for r in train_many(models, sets, [TrainConfig(steps=9)] * 2, progress=False)]
        [9, 9]
    """
    lists: dict[str, object] = {"models": models, "sets": sets}
    lists |= {} if configs is None else {"configs": configs}
    lists |= {} if checkpoints is None else {"checkpoints": checkpoints}
    for name, given in lists.items():
        if isinstance(given, str | Sequences) or not isinstance(given, Sized):
            kind = type(given).__name__
            raise ValueError(f"{name} must be a list with an entry for each model, not a {kind}")
    E = len(models)
    configs = [TrainConfig()] * E if configs is None else configs
    checkpoints = [None] * E if checkpoints is None else checkpoints
    lengths = len(models), len(sets), len(configs), len(checkpoints)
    if len(set(lengths)) > 1:
        raise ValueError(
            "expected one data set, config and checkpoint for each model, not "
            "{} models, {} sets, {} configs and {} checkpoints".format(*lengths)
        )
    sets = [as_sequences(_NOT_A_SET, one) for one in sets]
    _check_types(configs, checkpoints)
    _check_together(models, sets, configs, checkpoints)
    if not E:
        return []
    runs = [
        RunState(model, sequences, config, None if path is None else user_path(path))
        for model, sequences, config, path in zip(models, sets, configs, checkpoints, strict=True)
    ]
    group = Group(runs)
    # Autocast of the caller must not change the precision.
    device = device_of(models[0])
    with group.bar(progress) as bar, torch.autocast(device.type, enabled=False):
        try:
            group.catch_up(bar)
            while group.runs:
                with phase("step"):
                    group.step(bar)
        except Stopped:  # on all ranks, between the same two steps
            group.save()
            raise
    bfloat16 = configs[0].precision != "fp32"
    rate = matmul_rate(device, torch.bfloat16 if bfloat16 else models[0].head.dtype)
    for run in runs:
        run.close()
        run.result.mfu = run.result.flops_per_second / (rate * run.ranks)
    return [group.failures.get(run, run.result) for run in runs]


def _check_types(configs: Sequence[TrainConfig], checkpoints: Sequence[str | Path | None]) -> None:
    """ValueError for a value of the wrong type, or an invalid FASTMEM_CHECKPOINT_SECONDS."""
    for what, values, kind in (
        ("config must be a fastmem.TrainConfig", configs, TrainConfig),
        ("checkpoint must be a path or None", checkpoints, str | Path | None),
    ):
        for value in values:
            if not isinstance(value, kind):
                raise ValueError(f"a {what}, not {value!r} ({type(value).__name__})")
    checkpoint_seconds()


def _check_together(
    models: Sequence[GPT],
    sets: Sequence[Sequences],
    configs: Sequence[TrainConfig],
    checkpoints: Sequence[str | Path | None],
) -> None:
    """ValueError if the models cannot be trained together."""
    for model, config in zip(models, configs, strict=True):
        check_model(model)
        if is_sharded(model):
            _check_sharded(models, sets[0], configs[0])
            return
        if (size := rank_and_size()[1]) > 1:  # whose ranks would share the scores of one model
            raise ValueError(
                f"{size} ranks train a model of all of them: make it by fastmem.sharded_gpt, or "
                "train a GPT outside of fastmem.joined"
            )
        if changed := difference(model):
            raise ValueError(
                f"train takes a GPT as fastmem makes it, and would ignore {changed}: remove hooks, "
                "masks and wrappers before, or train with torch.optim"
            )
        _check_frozen(model, config)
    places = [p.data_ptr() for model in models for p in ordered(model).values()]
    if len({id(model) for model in models}) < len(models):
        raise ValueError("a model is there twice: make one for each run, fastmem.GPT(config, seed)")
    if len(set(places)) < len(places):
        raise ValueError("two parameters share memory: clone one, or make the models apart")
    for model, sequences, config in zip(models, sets, configs, strict=True):
        first = models[0], sets[0], configs[0]
        for what, ours, theirs in (
            ("model", model.config, first[0].config),
            ("device", model.device, first[0].device),
            ("dtype", model.head.dtype, first[0].head.dtype),
            ("frozen weights", frozen(model), frozen(first[0])),
            ("length", sequences.length, first[1].length),
            ("precision", config.precision, first[2].precision),
            ("batch", config.step_batch(sequences.count), first[2].step_batch(first[1].count)),
        ):
            if ours != theirs:
                raise ValueError(
                    f"models that are trained together need the same {what}, not {theirs} and "
                    f"{ours}: train them in two calls"
                )
    paths = [user_path(path).resolve() for path in checkpoints if path is not None]
    if len(set(paths)) < len(paths):
        raise ValueError("two models have the same checkpoint: give each model another file")


def _check_sharded(models: Sequence[GPT], sequences: Sequences, config: TrainConfig) -> None:
    """ValueError if the ranks cannot train the model."""
    model, job = models[0], current()
    if len(models) > 1:
        raise ValueError(f"{len(models)} models, but ranks train one sharded model: one a call")
    computing(model, config.precision)
    parts = job.size * model.sharding.accumulate  # type: ignore[union-attr, operator]
    if (batch := config.step_batch(sequences.count)) % parts:
        near = max(parts, batch // parts * parts)
        fix = f"batch {near}" if near <= sequences.count else f"at least {parts} sequences"
        raise ValueError(
            f"batch {batch} is not divisible by {job.size} ranks x accumulate "
            f"{model.sharding.accumulate}: try {fix}"  # type: ignore[union-attr]
        )
    _check_frozen(model, config)


def _check_frozen(model: GPT, config: TrainConfig) -> None:
    """ValueError if nothing is to be trained, or the precision would round a frozen weight."""
    if not trained_ranges(model):
        raise ValueError("every weight is frozen: call requires_grad_() of the weights to train")
    dtype = weights_dtype(model, config.precision)
    for name in frozen(model):
        p = model.get_parameter(name)
        if not torch.equal(p.to(dtype).to(p.dtype), p):
            raise ValueError(
                f"{config.precision} would round the frozen {name} from {p.dtype} to {dtype}: use "
                f"another precision, or convert the model with model.to({dtype})"
            )
