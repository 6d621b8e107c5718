"""What the ranks of tests/likelihood/test_distributed.py compute: started once for each number.

N rows, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastmem
from fastmem.integrations.head import TrainedHead
from fastmem.likelihood import sharding  # noqa: F401  # rules of the operators

R, S = Replicate(), Shard
ALL = {"entropy": True, "second_moment": True, "greedy": True, "lse": True, "variance": True}


class Case(NamedTuple):
    """A problem, and how its hidden states and its weight lie on a mesh."""

    hidden: Sequence[Any]
    weight: Sequence[Any]
    shape: tuple[int, ...] = (7, 5, 13)  # N, or B and T; D; V
    mesh: tuple[int, ...] | None = None  # all ranks in a row
    scale: float = 1.0  # of hidden
    bias: bool = True
    dtype: torch.dtype = torch.float32
    hole: bool = False  # the last half of the vocabulary has a bias of -inf
    settings: Mapping[str, Any] = MappingProxyType({})

    def inputs(self) -> dict[str, Tensor | None]:
        """Full tensors, the same in every process."""
        generator = torch.Generator().manual_seed(0)
        *rows, D, V = self.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        bias = normal(V) if self.bias else None
        if bias is not None and self.hole:
            bias[V // 2 :] = -torch.inf
        targets = torch.randint(V // 2 if self.hole else V, rows, generator=generator)
        targets.view(-1)[2:3] = self.settings.get("ignore_index", -100)
        targets.view(-1)[4:5] = V  # of NaN bits, whose hidden state would get a gradient of NaN
        upstream = normal(*rows)
        upstream.view(-1)[4:5] = 0
        return {
            "hidden": (normal(*rows, D) * self.scale).to(self.dtype),
            "weight": normal(V, D).to(self.dtype),
            "targets": targets,
            "bias": bias,
            "upstream": upstream,
        }


ROWS, FSDP, WORDS = (Case([S(0)], [R]), Case([S(0)], [S(0)]), Case([R], [S(0)]))
BOTH = {
    "rows": ROWS,
    "rows_and_weight": FSDP,
    "nothing": Case([R], [R]),
    "columns": Case([S(1)], [S(1)]),
    "vocabulary": WORDS,
    "vocabulary_softcap": WORDS._replace(settings={"softcap": 3.0, "temperature": 0.7}),
    "vocabulary_ignoring_0": WORDS._replace(bias=False, settings={"ignore_index": 0}),
    "vocabulary_sharp": WORDS._replace(scale=30.0),
    "vocabulary_bfloat16": WORDS._replace(dtype=torch.bfloat16),
    "vocabulary_float64": WORDS._replace(dtype=torch.float64),  # gathered: no kernel takes it
    "vocabulary_masked": WORDS._replace(hole=True),
    "vocabulary_masked_softcap": WORDS._replace(hole=True, settings={"softcap": 3.0}),
    "few_tokens": WORDS._replace(shape=(7, 5, 3)),
    "few_rows": FSDP._replace(shape=(1, 5, 13)),
    "no_rows": FSDP._replace(shape=(0, 5, 13)),
    "vocabulary_no_rows": WORDS._replace(shape=(0, 5, 13)),
    "sequences": Case([S(1)], [S(0)], shape=(2, 5, 3, 13)),
}
PLANE = Case([S(0), R], [R, S(0)], mesh=(2, 2))
CASES: dict[int, dict[str, Case]] = {
    2: BOTH,
    4: {
        name: BOTH[name]
        for name in ("rows_and_weight", "vocabulary", "few_tokens", "few_rows", "vocabulary_masked")
    }
    | {
        "data_and_vocabulary": PLANE,
        "data_and_vocabulary_divided": PLANE._replace(weight=[S(0), S(0)]),
        "sequences_and_vocabulary": PLANE._replace(shape=(4, 2, 3, 13), hidden=[S(1), R]),
        "vocabulary_twice": PLANE._replace(hidden=[R, R], weight=[S(0), S(0)]),
        "rows_twice": PLANE._replace(hidden=[S(0), S(0)], weight=[S(0), R]),
    },
}  # fmt: skip


class Collectives(TorchDispatchMode):
    """Records each collective: its name, and how many numbers a rank puts into it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor goes first and calls what it needs
        space, _, name = op.name().replace("::_", "::").partition("::")
        if space in ("c10d", "_c10d_functional") and not name.startswith(("wait", "wrap")):
            first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            self.seen.append((name.split(".")[0].strip("_"), first.numel()))
        return op(*args, **(kwargs or {}))


def computed(case: Case) -> dict[str, Any]:
    """Bits, gradients and statistics as full tensors, and the collectives of both passes."""
    mesh = init_device_mesh("cpu", case.mesh or (dist.get_world_size(),))
    full = case.inputs()
    of_bias = [p if p == S(0) else R for p in case.weight]
    hidden = distribute_tensor(full["hidden"], mesh, case.hidden).requires_grad_()
    weight = distribute_tensor(full["weight"], mesh, case.weight).requires_grad_()
    leaves = {"dhidden": hidden, "dweight": weight}
    bias = None
    if case.bias:
        bias = leaves["dbias"] = distribute_tensor(full["bias"], mesh, of_bias).requires_grad_()
    arguments = (hidden, weight, full["targets"], bias)
    with Collectives() as forward:
        bits = fastmem.token_bits(*arguments, **case.settings)
    upstream = distribute_tensor(full["upstream"].to(bits.dtype), mesh, bits.placements)
    with Collectives() as backward:
        bits.backward(upstream)
    stats = fastmem.token_stats(*arguments, **case.settings, **ALL)
    found = {"bits": bits} | {name: x.grad for name, x in leaves.items()}
    # PyTorch 2.11 replicates the gradient of any tensor that is divided unevenly.
    if torch.__version__ >= "2.13":
        assert all(x.grad.placements == x.placements for x in leaves.values())
    found |= {f"stats_{name}": x for name, x in zip(stats._fields, stats, strict=True)}
    assert all(x.placements == bits.placements for x in stats)
    results: dict[str, Any] = {name: x.detach().full_tensor() for name, x in found.items()}
    return results | {"forward": forward.seen, "backward": backward.seen}


def on_ranks(rank: int, ranks: int, folder: Path) -> None:
    """Computes all cases and parts; rank 0 saves them."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    store = dist.FileStore(str(folder / f"store{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    try:
        results = {name: computed(case) for name, case in CASES[ranks].items()}
        results |= {part.__name__: part() for part in PARTS}
        if rank == 0:
            torch.save(results, folder / f"{ranks}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


PARTS: list[Callable[[], dict[str, Any]]] = []


def part(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    PARTS.append(function)
    return function


def line() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def words(hidden: Tensor, weight: Tensor) -> tuple[DTensor, DTensor]:
    """The pair with a divided vocabulary."""
    mesh = line()
    return tuple(  # type: ignore[return-value]
        distribute_tensor(x, mesh, [p]).requires_grad_() for x, p in ((hidden, R), (weight, S(0)))
    )


@part
def ties() -> dict[str, Any]:
    """is_greedy where tokens of several ranks have the greatest logit."""
    weight = torch.tensor([0.0, 1, 0, 3, 0, 3, 0, 3]).unsqueeze(1)
    targets = torch.arange(8)
    hidden = torch.ones(8, 1)
    flags = [
        fastmem.token_stats(*words(hidden, w), targets, greedy=True).is_greedy
        for w in (weight, torch.zeros(8, 1), -weight)
    ]
    return {"greedy": [x.full_tensor() for x in flags]}


@part
def not_finite() -> dict[str, Any]:
    """A hidden state of NaN, and one of infinity, among others."""
    case = WORDS.inputs()
    case["hidden"][1, 2], case["hidden"][5, 0] = torch.nan, torch.inf
    hidden, weight = words(case["hidden"], case["weight"])
    bits = fastmem.token_bits(hidden, weight, case["targets"])
    bits.sum().backward()
    stats = fastmem.token_stats(hidden, weight, case["targets"], **ALL)
    tensors = stats._asdict() | {"dhidden": hidden.grad, "dweight": weight.grad}
    found = {name: x.full_tensor() for name, x in tensors.items()}
    # One token of one rank. All others would be greedy.
    case = WORDS.inputs()
    case["weight"][-1, 0] = torch.nan
    best = (case["hidden"] @ case["weight"][:-1].T).argmax(-1)
    best[2] = -100
    stats = fastmem.token_stats(*words(case["hidden"], case["weight"]), best, **ALL)
    return found | {"by the last token": type(stats)._make(x.full_tensor() for x in stats)}


@part
def losses() -> dict[str, Any]:
    """Each reduction with and without weights of tokens and classes; their gradients."""
    found: dict[str, Any] = {}
    cases = {"rows": FSDP, "vocabulary": WORDS}
    cases |= {"plane": PLANE} if dist.get_world_size() == 4 else {}
    for name, case in cases.items():
        full = case.inputs()
        mesh = line() if case.mesh is None else init_device_mesh("cpu", case.mesh)
        for weighted in (False, True):
            for reduction in ("none", "mean", "sum"):
                hidden = distribute_tensor(full["hidden"], mesh, case.hidden).requires_grad_()
                weight = distribute_tensor(full["weight"], mesh, case.weight).requires_grad_()
                tokens = distribute_tensor(full["upstream"], mesh, case.hidden).requires_grad_()
                more = {"weight": full["bias"].exp(), "token_weight": tokens} if weighted else {}
                loss = fastmem.linear_cross_entropy(
                    hidden, weight, full["targets"] % 13, reduction=reduction, **more
                )
                loss.sum().backward()
                leaves = [hidden, weight, tokens] if weighted else [hidden, weight]
                found[f"{name} {weighted} {reduction}"] = [
                    loss.detach().full_tensor(), *(x.grad.full_tensor() for x in leaves)
                ]  # fmt: skip
    return found


def own_rows(x: Tensor) -> Tensor:
    return torch.tensor_split(x, dist.get_world_size())[dist.get_rank()]


@part
def plain_rows() -> dict[str, Any]:
    """Plain rows of this rank with a weight that is divided, or not."""
    full, mesh = WORDS.inputs(), line()
    found = {}
    for name, placement in {"divided": S(0), "whole": R}.items():
        hidden = own_rows(full["hidden"]).clone().requires_grad_()
        weight, bias = (
            distribute_tensor(full[key], mesh, [placement]).requires_grad_()
            for key in ("weight", "bias")
        )
        bits = fastmem.token_bits(hidden, weight, own_rows(full["targets"]), bias)
        (bits * own_rows(full["upstream"])).sum().backward()
        assert type(bits) is Tensor
        assert weight.grad.placements == (placement,)
        hidden_grad = [None] * dist.get_world_size()
        dist.all_gather_object(hidden_grad, hidden.grad)
        grads = [torch.cat(hidden_grad), weight.grad.full_tensor(), bias.grad.full_tensor()]
        found[name] = grads
    return found


class Tied(nn.Module):
    """A language model whose head is its embedding: the loss is made inside, or by the caller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(13, 8)
        self.block = nn.Linear(8, 8)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.block(self.embedding(tokens)).tanh()
        return hidden if targets is None else self.loss(hidden, targets)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return fastmem.linear_cross_entropy(hidden, self.embedding.weight, targets, reduction="sum")


def tied_gradients(model: Tied, tokens: Tensor, targets: Tensor, inside: bool) -> list[Tensor]:
    loss = model(tokens, targets) if inside else model.loss(model(tokens), targets)
    loss.backward()
    return [p.grad for p in model.parameters()]


def tied_tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randint(13, (2, 12), generator=generator))  # type: ignore[return-value]


@part
def fsdp() -> dict[str, Any]:
    """Tied embeddings under fully_shard, whose gradients are summed: as by one process."""
    tokens, targets = (own_rows(x) for x in tied_tokens())
    found: dict[str, Any] = {}
    for inside in (True, False):
        model = Tied()
        fully_shard(model.block)
        fully_shard(model, reshard_after_forward=True)
        for module in (model.block, model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        grads = tied_gradients(model, tokens, targets, inside)
        found[f"inside {inside}"] = [x.full_tensor() for x in grads]
    return found


@part
def operators() -> dict[str, Any]:
    """DTensors given to the operators themselves."""
    full, mesh = ROWS.inputs(), line()
    full["upstream"].fill_(1)
    found = {}
    for name, (rows, matrix) in {"rows": (S(0), R), "gathered": (R, S(0))}.items():
        for ahead in (True, False):
            hidden, weight = (
                distribute_tensor(full[key], mesh, [p]).requires_grad_()
                for key, p in (("hidden", rows), ("weight", matrix))
            )
            targets = distribute_tensor(full["targets"] % 13, mesh, [R])
            problem = (hidden, weight, targets, None, None, 1.0, -100)
            bits = torch.ops.fastmem.token_bits(*problem, [ahead] * 2 + [False])[0]
            bits.sum().backward()
            stats = torch.ops.fastmem.token_stats(*problem, [True, True, True, True])
            every = (bits, hidden.grad, weight.grad, *stats[1:])
            found[f"{name} {ahead}"] = [x.detach().full_tensor() for x in every]
    return found


def refused(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "accepted"


@part
def refusals() -> dict[str, str]:
    full, mesh = WORDS.inputs(), line()
    other = init_device_mesh("cpu", (dist.get_world_size(), 1))
    hidden, weight, targets = full["hidden"], full["weight"], full["targets"] % 13

    def on(x: Tensor, *placements: Any) -> DTensor:
        return distribute_tensor(x, mesh if len(placements) == 1 else other, placements)

    calls: dict[str, tuple[Any, ...]] = {
        "meshes": (on(hidden, R), on(weight, S(0), R), targets),
        "models": (on(hidden[None], R), on(weight[None], R), targets),
        "targets of plain rows": (hidden, on(weight, R), on(targets, R)),
        "only targets": (hidden, weight, on(targets, R)),
        "shapes": (on(hidden, R), on(weight[:, :4].contiguous(), S(0)), targets),
        "lengths": (on(hidden, S(0)), on(weight, S(0)), targets[:-1]),
        "types": (on(hidden, R), on(weight.double(), S(0)), targets),
    }
    found = {
        name: refused(lambda arguments=arguments: fastmem.token_bits(*arguments))  # type: ignore[misc]
        for name, arguments in calls.items()
    }
    wrong = targets.clone()
    wrong[3] = 13
    for function in (fastmem.token_bits, fastmem.token_stats):
        found[function.__name__] = refused(
            lambda f=function: f(on(hidden, R), on(weight, S(0)), wrong, check=True)  # type: ignore[misc]
        )
    head = SimpleNamespace(weight=on(weight, S(0)))
    found["head"] = refused(lambda: TrainedHead.problem(head, hidden, targets, 1.0))  # type: ignore[arg-type]
    return found


@part
def others() -> dict[str, Tensor]:
    """Bits of calls that are taken in another way: after what was refused no rank waits."""
    full, mesh = WORDS.inputs(), line()
    hidden, weight = words(full["hidden"], full["weight"])
    share = DTensor.from_local(hidden.to_local() / dist.get_world_size(), mesh, [Partial()])
    rows = distribute_tensor(full["hidden"], mesh, [S(0)])
    late = rows.redistribute(placements=[R], async_op=True)
    compiled = torch.compile(fastmem.token_bits, backend="aot_eager")
    calls = {
        "a sum": lambda: fastmem.token_bits(share, weight, full["targets"]),
        "not there yet": lambda: fastmem.token_bits(late, weight, full["targets"]),
    }
    if dist.get_world_size() == 2:  # seconds a rank
        calls["compiled"] = lambda: compiled(hidden, weight, full["targets"])
    return {name: call().detach().full_tensor() for name, call in calls.items()}


@part
def autocast() -> dict[str, Any]:
    full = WORDS.inputs()
    hidden, weight = words(full["hidden"], full["weight"])
    with torch.autocast("cpu", torch.bfloat16):
        bits = fastmem.token_bits(hidden, weight, full["targets"] % 13)
    bits.sum().backward()
    return {"found": [x.detach().full_tensor() for x in (bits, hidden.grad, weight.grad)]}
