"""A small model and data set, and what to compare two runs by."""

from dataclasses import asdict

from fastmem import GPT, GPTConfig, TrainConfig, TrainResult, UniformSequences, train

SHAPE = GPTConfig(layers=1, width=16, heads=4, vocab=32, length=8)
SET = UniformSequences(count=20, length=8, vocab=32)


def run(config: TrainConfig, **more: object) -> tuple[GPT, TrainResult]:
    model = GPT(SHAPE)
    return model, train(model, SET, config, progress=False, **more)


def weights(model: GPT) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def timeless(result: TrainResult) -> dict[str, object]:
    facts = asdict(result)
    for name in ("seconds", "tokens_per_second", "flops_per_second", "mfu"):
        del facts[name]
    for point in [*facts["curve"], *facts["stages"]]:
        del point["seconds"]
    return facts
