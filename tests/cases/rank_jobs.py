"""Jobs of several ranks on one CPU, each rank a process that runs a function of this file.

    torchrun --nproc-per-node 2 tests/cases/rank_jobs.py NAME JSON

The function gets the ranks and one JSON value; rank 0 prints what it returns as JSON.
"""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastmem
from fastmem.base import ranks
from fastmem.base.ranks import Ranks
from fastmem.cli import job as cli_job, main as cli_main
from fastmem.models import flops, score
from fastmem.models.gpt import fill
from fastmem.training import group, sharded_checkpoint
from fastmem.training.config import TrainConfig
from fastmem.training.sharded_optimizer import ShardedAdamW

SHAPE = fastmem.GPTConfig(2, 24, 4, vocab=50, length=12)
DATA = fastmem.UniformSequences(40, length=12, vocab=50, seed=1)
STEPS = 24
CONFIG = TrainConfig(steps=STEPS, batch=16)
FLAGS = [
    "train", "--layers", "2", "--width", "24", "--heads", "4", "--vocab", "50", "--length", "12",
    "--count", "40", "--data-seed", "1", "--steps", f"{STEPS}", "--batch", "16",
]  # fmt: skip

PATHS = [f"{Path(__file__).parents[1]}", *sys.path]


class Ended(NamedTuple):
    """How the ranks of a job ended."""

    codes: list[int]
    result: Any
    errors: list[str]
    """Standard error of each rank."""


def launched(
    size: int, name: str, argument: Any = None, script: str = __file__, **environment: str
) -> Ended:
    """Starts the ranks of a job as torchrun would, but forked from a process that has imported
    everything, and waits for them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cases.rank_jobs", "cases.score_jobs", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = environment | {"WORLD_SIZE": f"{size}", "LOCAL_WORLD_SIZE": f"{size}"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, f"out{rank}") for rank in range(size)]
        errors = [Path(folder, f"err{rank}") for rank in range(size)]
        ends = []
        for rank in range(size):
            own = shared | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            streams = f"{outs[rank]}", f"{errors[rank]}"
            of = own, Path(script).stem, name, argument, streams
            ends.append(context.Process(target=forked, args=of))
            ends[-1].start()
        ends[0].join(120)
        for end in ends:  # once rank 0 has ended, torchrun would kill the others
            end.join(8)
            end.kill()
            end.join()
        result = None
        with suppress(ValueError, IndexError):
            result = json.loads(outs[0].read_text().splitlines()[-1])
        codes = [-1 if end.exitcode is None else end.exitcode for end in ends]
        return Ended(codes, result, [path.read_text() for path in errors])


def forked(
    environment: dict[str, str], module: str, name: str, argument: Any, streams: tuple[str, str]
) -> None:
    """A rank: a process with this environment and these files for its output."""
    os.environ.update(environment)
    for number, path in zip((1, 2), streams, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    # What the modules read when they were imported.
    ranks.COLLECTIVE_SECONDS = environment.get("FASTMEM_COLLECTIVE_SECONDS", "300")
    group.CHECKPOINT_SECONDS = environment.get("FASTMEM_CHECKPOINT_SECONDS", "20")
    run(vars(importlib.import_module(f"cases.{module}")), name, argument)


def at_step(step: int, rank: int, action: Callable[[ShardedAdamW], None]) -> None:
    """Does something on one rank before it takes a step."""
    update, taken = ShardedAdamW.update, [0]

    def counted(self: ShardedAdamW) -> None:
        taken[0] += 1
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if taken[0] == step and os.environ.get("RANK", "0") == f"{rank}" and not restarted:
            action(self)
        update(self)

    ShardedAdamW.update = counted  # type: ignore[method-assign]


def failing(_: ShardedAdamW) -> None:
    raise OSError(5, "Input/output error", "a file")


def command(argument: dict[str, Any]) -> None:
    """fastmem with these flags; stops, or dies, before a step on one rank."""
    actions: dict[str, Callable[[ShardedAdamW], None]] = {
        "stop": lambda _: os.kill(os.getpid(), signal.SIGTERM),
        "die": lambda _: os._exit(9),
        "sleep": lambda _: time.sleep(60),
        "fail": failing,
    }
    if "action" in argument:
        at_step(argument["step"], argument["rank"], actions[argument["action"]])
    cli_main.main(argument["flags"])


def trained(job: Ranks | None, precision: Any, **sharding: Any) -> dict[str, Any]:
    """The bits of the curve, and the weights after the last step."""
    config = TrainConfig(steps=STEPS, batch=16, precision=precision)
    if job is None:
        model = fastmem.GPT(SHAPE, 3)
    else:
        model = fastmem.sharded_gpt(SHAPE, 3, precision, fastmem.Sharding(**sharding))
    result = fastmem.train(model, DATA, config, progress=False)
    whole = [p.full_tensor() if job else p for p in model.parameters()]
    weights = [p.detach().double().square().sum().item() for p in whole]
    return {"bits": [point.memorized_bits for point in result.curve], "weights": weights}


def all_trained(job: Ranks | None, ways: bool = False) -> dict[str, Any]:
    """Each precision; ways: each recomputation, and accumulation."""
    found = {p: trained(job, p) for p in ("fp32", "bf16-mixed", "bf16-true", "bf16-stochastic")}
    if ways:
        for recompute in ("attention", "block"):
            found[recompute] = trained(job, "fp32", recompute=recompute)
        found["accumulate"] = trained(job, "fp32", accumulate=4)
    return found if job is None else found | {"update": updated()}


def offloaded(job: Ranks, _: None) -> dict[str, Any]:
    """Bits with the weights in the memory of the rank's device, and of the host; these places."""
    flops.MATMUL_SIZES["cuda"] = (64,)  # a GPU's would take tests/host_cuda half a minute
    ways: list[dict[str, Any]] = [{}, {"offload": True, "recompute": "block", "accumulate": 2}]
    models = [fastmem.sharded_gpt(SHAPE, sharding=fastmem.Sharding(**way)) for way in ways]
    places = [{p.to_local().device.type for p in model.parameters()} for model in models]  # type: ignore[operator]
    return {
        "bits": [trained(job, "fp32", **way)["bits"] for way in ways],
        "places": [[*place] for place in places],
    }


def updated() -> list[float]:
    """Weights after three updates with stochastic rounding by known gradients."""
    model = fastmem.sharded_gpt(SHAPE, 3, "bf16-stochastic")
    config = TrainConfig(precision="bf16-stochastic", clip=1e9, seed=5).for_shape(SHAPE)
    optimizer = ShardedAdamW(model, config, None)
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
            fill(p.grad, torch.randn(p.shape, generator=draw).to(p.dtype))
        optimizer.step([1e-3])
    return [p.full_tensor().detach().double().sum().item() for p in model.parameters()]


def read(job: Ranks, folder: str) -> dict[str, Any]:
    """What becomes of a model whose last forward pass gathered weights: a file, a stopped score."""
    model = fastmem.sharded_gpt(SHAPE)
    tokens = DATA.to_torch(job.device, slice(0, 2))
    with torch.no_grad():
        before = model.token_bits(tokens)
    model.to_hf(folder)
    found = {"file": bool(torch.equal(before, fastmem.GPT.from_hf(folder).token_bits(tokens)))}
    score.score_batch = lambda *_: 5
    with torch.no_grad():
        model.token_bits(tokens)
    path = Path(folder, "run.pt")
    inner = fastmem.GPT.token_bits

    def stopping(self: fastmem.GPT, tokens: Any) -> torch.Tensor:
        if job.rank == 1 and not torch.is_grad_enabled():
            signal.raise_signal(signal.SIGTERM)
        return inner(self, tokens)

    fastmem.GPT.token_bits = stopping  # type: ignore[method-assign]
    with suppress(ranks.Stopped):
        fastmem.train(model, DATA, CONFIG, path, progress=False)
    fastmem.GPT.token_bits = inner  # type: ignore[method-assign]
    found["kept"] = len([*Path(folder, "run.shards").glob("step-*/run.pt")]) == 1
    result = fastmem.train(fastmem.sharded_gpt(SHAPE, 5), DATA, CONFIG, path, progress=False)
    return found | {"memorized": result.memorized_bits}


def misused(job: Ranks, folder: str) -> dict[str, Any]:
    """The error of each misuse, by name."""
    found: dict[str, Any] = {}

    def tried(name: str, work: Callable[[], Any]) -> None:
        try:
            work()
            found[name] = None
        except (ValueError, OSError, fastmem.Diverged) as error:
            found[name] = f"{type(error).__name__}: {error}"

    def model(**sharding: Any) -> fastmem.GPT:
        return fastmem.sharded_gpt(SHAPE, 3, "fp32", fastmem.Sharding(**sharding))

    def train(of: fastmem.GPT, path: Path | None = None, **config: Any) -> None:
        fastmem.train(of, DATA, TrainConfig(**{"steps": 4, "batch": 16, **config}), path, False)

    def same(**seen: str) -> None:
        job.check_same(cli_job.FIXES, **seen)

    other = f"{job.rank}"
    tried("batch", lambda: train(model(), batch=15))
    tried("accumulate", lambda: train(model(accumulate=3), batch=16))
    tried("precision", lambda: train(model(), precision="bf16-mixed"))
    tried("joined", lambda: ranks.joined("cpu").__enter__())
    tried("code", lambda: same(code=other))
    data = fastmem.UniformSequences(8, 4, 16, job.rank)
    tried("data", lambda: cli_job.check_same(job, data))
    tried("alone", lambda: train(fastmem.GPT(SHAPE)))
    few = fastmem.UniformSequences(1, 12, 50)
    tried("few", lambda: fastmem.train(model(), few, CONFIG, progress=False))
    group.CHECKPOINT_SECONDS = 20 + job.rank
    tried("command", lambda: cli_job.check_same(job))
    group.CHECKPOINT_SECONDS = 20
    tried("recompute", lambda: fastmem.Sharding(recompute="all"))  # type: ignore[arg-type]
    first, second = (cli_job.one_folder(Path(folder, "one"), False, ()) for _ in range(2))
    tried("shared", first.__enter__)
    tried("twice", second.__enter__)
    own = Path(folder, f"of-{job.rank}")
    tried("folder", lambda: cli_job.one_folder(own, False, ()).__enter__())
    path = Path(folder, "run.pt")
    train(model(), path)
    wide = fastmem.GPTConfig(1, 8, 2, vocab=50, length=12)
    tried("shape", lambda: train(fastmem.sharded_gpt(wide), path))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    write = sharded_checkpoint.FileSystemWriter.write_data
    if job.rank == 1:
        sharded_checkpoint.FileSystemWriter.write_data = full  # type: ignore[method-assign]
    tried("disk", lambda: train(model(), Path(folder, "full.pt")))
    sharded_checkpoint.FileSystemWriter.write_data = write  # type: ignore[method-assign]
    found["full"] = sorted(p.name for p in Path(folder, "full.shards").glob("step-*"))

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error", "the name")

    sharded_checkpoint.ShardedCheckpoint._complete, complete = (  # type: ignore[method-assign]
        fail,
        sharded_checkpoint.ShardedCheckpoint._complete,
    )
    group.CHECKPOINT_SECONDS = "0"
    tried("name", lambda: train(model(), Path(folder, "named.pt")))
    sharded_checkpoint.ShardedCheckpoint._complete = complete  # type: ignore[method-assign]

    def spoil(optimizer: ShardedAdamW) -> None:
        optimizer._locals[-1].fill_(float("nan"))

    at_step(2, 1, spoil)
    tried("nan", lambda: train(model(), steps=100))
    return found


def run(functions: dict[str, Any], name: str, argument: Any) -> None:
    """Runs a function on this rank; rank 0 prints what it returns as JSON."""
    if name == "command":
        command(argument)
    with ranks.joined(os.environ.get("RANKS_DEVICE", "cpu")) as job:
        found = functions[name](job, argument)
        if job.rank == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    run(globals(), sys.argv[1], json.loads(sys.argv[2]))
