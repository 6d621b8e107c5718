"""token_bits against closed forms and a float64 oracle written out here."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.tensor
from cases.likelihood_cases import SHAPES, example
from torch import Tensor

import fastmem
from fastmem.likelihood import local


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N,) bits in float64, a row at a time and straight from the definition."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    rows = [
        (torch.logsumexp(z, 0) - z[t]) / math.log(2) for z, t in zip(logits, targets, strict=True)
    ]
    return torch.stack(rows)


def test_uniform_logits_cost_log2_of_the_vocabulary() -> None:
    """Fails if bits are nats, or off by a constant."""
    bits = fastmem.token_bits(torch.zeros(3, 4), torch.zeros(8, 4), torch.tensor([0, 3, 7]))
    assert bits.tolist() == [3.0, 3.0, 3.0]


def test_two_tokens_by_hand() -> None:
    """Fails if another logit than the target's is taken: p = 1/4 and 3/4."""
    weight = torch.tensor([[0.0], [math.log(3)]])
    bits = fastmem.token_bits(torch.ones(2, 1), weight, torch.tensor([0, 1]))
    assert torch.allclose(bits, torch.tensor([2.0, 2 - math.log2(3)]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
def test_matches_float64(N: int, D: int, V: int, dtype: torch.dtype) -> None:
    """Fails if half precision inputs are multiplied or summed in half precision."""
    hidden, weight, targets = example(N, D, V, dtype)
    bits = fastmem.token_bits(hidden, weight, targets)
    assert bits.dtype == torch.float32
    assert bits.shape == (N,)
    assert (bits - oracle(hidden, weight, targets)).abs().max() <= 1e-4


def test_peaked_rows_are_never_negative() -> None:
    """Fails if the log-sum-exp and the target's logit come from different roundings."""
    hidden, weight, _ = example(512, 16, 64)
    hidden *= 100
    targets = (hidden @ weight.T).argmax(-1)
    bits = fastmem.token_bits(hidden, weight, targets)
    assert (bits >= 0).all()
    assert (bits - oracle(hidden, weight, targets)).abs().max() <= 1e-4


def test_a_common_offset_changes_only_rounding() -> None:
    """Fails if the maximum is subtracted from the sum but not from the target."""
    hidden, weight, targets = example(64, 8, 32)
    shifted = fastmem.token_bits(hidden, weight, targets, bias=torch.full((32,), 1e4))
    # Near 1e4 float32 logits are multiples of 2**-10.
    assert (
        shifted - fastmem.token_bits(hidden, weight, targets)
    ).abs().max() < 2 * 2**-10 / math.log(2)


def test_bias_softcap_and_temperature() -> None:
    """Fails if bias, softcap or temperature is dropped, or applied in another order."""
    hidden, weight, targets = example(37, 13, 101)
    bias = torch.linspace(-1, 1, 101)
    logits = hidden.double() @ weight.double().T + bias.double()
    logits = 3 * torch.tanh(logits / 3) / 0.7
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none") / math.log(2)
    bits = fastmem.token_bits(hidden, weight, targets, bias, softcap=3.0, temperature=0.7)
    assert (bits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("limit", [1, 101, 1010, local.MAX_LOGITS])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Fails if a chunk is dropped, swapped, or its gradient is not added: 1, 1, 10, 37 rows."""
    hidden, weight, targets = example(37, 13, 101)
    bias = torch.randn(101)
    upstream = torch.randn(37)
    whole = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    (oracle(whole[0], whole[1], targets, whole[2]) * upstream).sum().backward()
    parts = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    monkeypatch.setattr(local, "MAX_LOGITS", limit)
    bits = fastmem.token_bits(parts[0], parts[1], targets, parts[2])
    (bits * upstream).sum().backward()
    for ours, exact in zip(parts, whole, strict=True):
        assert torch.allclose(ours.grad.double(), exact.grad, atol=1e-4)


def test_no_more_logits_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a chunk has more logits than MAX_LOGITS, forward or backward."""
    sizes = []
    reference = local.reference.token_bits

    def spy(hidden: Tensor, weight: Tensor, *rest: object) -> Tensor:
        sizes.append(len(hidden) * len(weight))
        return reference(hidden, weight, *rest)

    monkeypatch.setattr(local.reference, "token_bits", spy)
    monkeypatch.setattr(local, "MAX_LOGITS", 1000)
    hidden, weight, targets = example(64, 32, 127, torch.float64)  # float32 is fused here
    fastmem.token_bits(hidden.requires_grad_(), weight, targets).sum().backward()
    assert max(sizes) <= 1000
    assert sum(sizes) == 2 * 64 * 127  # once forward, once again backward


def test_gradcheck() -> None:
    """Fails if a gradient is not the derivative, with any upstream gradient."""
    hidden, weight, targets = (t.double() if t.is_floating_point() else t for t in example(5, 3, 7))
    bias = torch.randn(7, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: fastmem.token_bits(h, w, targets, b, softcap=2.0, temperature=1.3), inputs
    )


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_each_gradient_alone(wanted: int) -> None:
    """Fails if a gradient is computed only together with another."""
    hidden, weight, targets = example(9, 4, 11)
    inputs = [hidden, weight, torch.zeros(11)]
    inputs[wanted] = inputs[wanted].clone().requires_grad_()
    fastmem.token_bits(*inputs[:2], targets, inputs[2]).sum().backward()
    assert inputs[wanted].grad is not None
    assert inputs[wanted].grad.abs().sum() > 0


def test_models_side_by_side() -> None:
    """Fails if the leading axis mixes models, or shared targets are not shared."""
    parts = [example(9, 4, 11) for _ in range(3)]
    hidden = torch.stack([p[0] * (i + 1) for i, p in enumerate(parts)])
    weight = torch.stack([p[1] for p in parts])
    targets = torch.stack([(p[2] + i) % 11 for i, p in enumerate(parts)])
    together = fastmem.token_bits(hidden, weight, targets)
    alone = [fastmem.token_bits(h, w, t) for h, w, t in zip(hidden, weight, targets, strict=True)]
    assert torch.equal(together, torch.stack(alone))
    shared = fastmem.token_bits(hidden, weight, targets[0])
    assert torch.equal(shared, fastmem.token_bits(hidden, weight, targets[:1].expand(3, 9)))


def test_leading_axes_of_hidden_alone() -> None:
    """Fails if (B, T, D) is not B · T rows."""
    hidden, weight, targets = example(12, 4, 11)
    folded = fastmem.token_bits(hidden.view(3, 4, 4), weight, targets.view(3, 4))
    assert torch.equal(folded.view(-1), fastmem.token_bits(hidden, weight, targets))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32]
)
def test_integer_types(dtype: torch.dtype) -> None:
    """Fails if a target's type changes its meaning."""
    hidden, weight, targets = example(9, 4, 11)
    expected = fastmem.token_bits(hidden, weight, targets)
    assert torch.equal(fastmem.token_bits(hidden, weight, targets.to(dtype)), expected)


def test_ignored_and_outside_targets() -> None:
    """Fails if an ignored target costs or learns, or an outside one is read or hidden."""
    hidden, weight, _ = example(5, 4, 11)
    hidden.requires_grad_()
    targets = torch.tensor([0, -100, 11, -1, 10])
    bits = fastmem.token_bits(hidden, weight, targets)
    assert bits[1] == 0
    assert bits.isnan().tolist() == [False, False, True, True, False]
    bits[:2].sum().backward()
    assert hidden.grad[0].abs().sum() > 0
    assert hidden.grad[1:].abs().sum() == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_row_stays_alone(poison: float) -> None:
    """Fails if NaN or infinity in one row reaches another row."""
    hidden, weight, targets = example(5, 4, 11)
    expected = fastmem.token_bits(hidden, weight, targets)
    hidden[2, 1] = poison
    bits = fastmem.token_bits(hidden, weight, targets)
    assert bits[2].isnan()
    keep = [0, 1, 3, 4]
    assert torch.equal(bits[keep], expected[keep])


@pytest.mark.parametrize("wanted", [(1,), (0, 1, 2)])
@pytest.mark.parametrize("models", [(), (2,)])
def test_no_rows(models: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Fails if gradients without rows are not 0, or need a gradient of hidden."""
    inputs = [torch.randn(*models, *shape) for shape in ((0, 4), (8, 4), (8,))]
    leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    targets = torch.zeros(*models, 0, dtype=torch.int64)
    fastmem.token_bits(leaves[0], leaves[1], targets, leaves[2]).sum().backward()
    for i in wanted:
        assert torch.equal(leaves[i].grad, torch.zeros_like(leaves[i]))


@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_an_ignored_row_is_still_under_any_upstream_gradient(upstream: float) -> None:
    """Fails if the 0 of an ignored row is multiplied by an infinite upstream gradient."""
    hidden, weight, _ = example(3, 4, 8)
    hidden.requires_grad_(), weight.requires_grad_()
    bits = fastmem.token_bits(hidden, weight, torch.tensor([1, -100, 2]))
    bits.backward(torch.full((3,), upstream))
    assert torch.equal(hidden.grad[1], torch.zeros(4))
    assert not hidden.grad[0].isfinite().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_bad_row_under_a_softcap_in_float64(poison: float) -> None:
    """Fails if tanh makes infinity finite, or a bad row reaches another row's bits or gradient."""
    hidden, weight, targets = example(5, 4, 11, torch.float64)
    expected = fastmem.token_bits(hidden, weight, targets, softcap=5.0)
    hidden[2, 1] = poison
    hidden.requires_grad_()
    bits = fastmem.token_bits(hidden, weight, targets, softcap=5.0)
    keep = [0, 1, 3, 4]
    assert bits[2].isnan()
    assert torch.equal(bits[keep], expected[keep])
    bits.sum().backward()
    assert hidden.grad[2].isnan().any()
    assert hidden.grad[keep].isfinite().all()
    stats = fastmem.token_stats(hidden, weight, targets, softcap=5.0, entropy=True, greedy=True)
    assert torch.equal(stats.entropy_bits.isnan(), bits.isnan())
    assert not stats.is_greedy[2]


def test_empty_and_strided() -> None:
    """Fails if N = 0 breaks, or strides are taken for contiguous."""
    hidden, weight, targets = example(12, 4, 11)
    empty = fastmem.token_bits(hidden[:0].requires_grad_(), weight, targets[:0])
    assert empty.shape == (0,)
    empty.sum().backward()
    bits = fastmem.token_bits(hidden.T.contiguous().T[::2], weight.T.contiguous().T, targets[::2])
    assert torch.allclose(bits, fastmem.token_bits(hidden, weight, targets)[::2])


def test_autocast_rounds_inputs_and_nothing_else() -> None:
    """Fails if autocast makes the logits bfloat16."""
    hidden, weight, targets = example(64, 32, 128)
    with torch.autocast("cpu", torch.bfloat16):
        bits = fastmem.token_bits(hidden, weight, targets)
    assert bits.dtype == torch.float32
    assert (bits - oracle(hidden.bfloat16(), weight.bfloat16(), targets)).abs().max() <= 1e-4


def test_autocast_leaves_float64() -> None:
    """Fails if autocast rounds float64, unlike F.linear, or lets it meet a dtype that it casts."""
    hidden, weight, targets = example(6, 4, 8, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        bits = fastmem.token_bits(hidden, weight, targets)
        assert torch.nn.functional.linear(hidden, weight).dtype == bits.dtype == torch.float64
        with pytest.raises(ValueError, match=r"hidden is torch\.float32, weight torch\.float64"):
            fastmem.token_bits(hidden.float(), weight, targets)
    assert torch.equal(bits, fastmem.token_bits(hidden, weight, targets))


H, W, T = torch.zeros(3, 4), torch.zeros(8, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((H, torch.zeros(8, 5), T), r"hidden \(3, 4\), weight \(8, 5\).*same D"),
        ((H[0], W, T), r"expected \(\.\.\., N, D\)"),
        ((H, W[:0], T), "vocabulary is empty"),
        ((H, W, T[:2]), r"targets \(2,\).*\(3,\)"),
        ((H, W, T.float()), "must be integers, not torch.float32"),
        ((H, W, T.bool()), "must be integers, not torch.bool"),
        ((H, W, T.to(torch.complex64)), "must be integers, not torch.complex64"),
        ((H, W, T.float().requires_grad_()), "must be integers, not torch.float32"),
        ((H, W, [0, 0, 0]), "targets must be a torch.Tensor, not list"),
        ((H, W.long(), T), "weight must be floating point, .* not torch.int64"),
        ((H, W, T.to("meta")), "targets is on meta, hidden on cpu"),
        ((H, W, T, torch.zeros(8).to("meta")), "bias is on meta, hidden on cpu"),
        ((H, W, T, torch.zeros(8).int()), "bias must be floating point, .* not torch.int32"),
        ((H, W, T, None, math.inf), "softcap must be above 0 and finite, not inf"),
        ((H.long(), W, T), "hidden must be floating point, .* not torch.int64"),
        ((H.to(torch.complex64), W, T), "hidden must be floating point"),
        ((H, W.double(), T), "hidden is torch.float32, weight torch.float64"),
        ((H, W.to("meta"), T), "weight is on meta, hidden on cpu"),
        ((H.numpy(), W, T), "hidden must be a torch.Tensor, not ndarray"),
        ((H.view(1, 3, 4), W.expand(2, 8, 4), T), "leading axes of hidden"),
        ((H, W, T, torch.zeros(7)), r"bias \(7,\)"),
        ((H, W, T, None, 0.0), "softcap must be above 0"),
        ((H, W, T, None, None, 0.0), "temperature must be above 0"),
        ((H, W, T, None, None, math.nan), "temperature must be above 0"),
        ((H, W, T, None, None, 1e-39), "temperature must be above 0 and finite, not 1e-39: pass"),
        ((H, W, T, None, None, 1e39), "temperature must be above 0 and finite, not 1e\\+39: pass"),
        ((H, W, T, None, 1e-39), "softcap must be above 0 and finite, not 1e-39: pass"),
        ((H, W, T, None, 1e39), "softcap must be above 0 and finite, not 1e\\+39: pass"),
        (
            (H, W, T, None, None, None),
            r"temperature must be a number, got None \(NoneType\); pass a",
        ),
        ((H, W, T, None, None, "1.0"), r"temperature must be a number, got '1.0' \(str\); pass a"),
        ((H, W, T, None, None, True), r"temperature must be a number, got True \(bool\); pass a"),
        (
            (H, W, T, None, None, torch.tensor(2.0)),
            r"temperature must be .*\(Tensor\); pass a float",
        ),
        ((H, W, T, None, None, np.ones(1)), r"temperature must be .*\(ndarray\); pass a float"),
        ((H, W, T, None, "30"), r"softcap must be a number, got '30' \(str\); pass a float"),
        ((H, W, T, None, torch.ones(3)), r"softcap must be a number, got tensor.*pass a float"),
        ((H, W, T, None, 1j), r"softcap must be a number, got 1j \(complex\); pass a float"),
        ((H, W, T, None, None, 1.0, 1.5), "ignore_index must be an int64, not 1.5"),
        (
            (H, W, T, None, None, 1.0, 2**63),
            "ignore_index must be an int64, not 9223372036854775808",
        ),
        ((H.to(torch.float8_e5m2), W, T), "hidden must be .*, not torch.float8_e5m2: use .float"),
        ((H, W, T, W[:, 0].to(torch.float8_e5m2)), "bias must be .*, not torch.float8_e5m2"),
        ((H.to_sparse(), W, T), "hidden is torch.sparse_coo: use .*to_dense"),
        ((H, W, T.to_sparse()), "targets is torch.sparse_coo: use .*to_dense"),
    ],
)
@pytest.mark.parametrize("function", [fastmem.token_bits, fastmem.token_stats])
def test_bad_input(function: Any, arguments: tuple[object, ...], message: str) -> None:
    """Fails if bad input is accepted, or the error lacks its cause and its fix."""
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [fastmem.token_bits, fastmem.token_stats])
def test_settings_are_numbers_in_every_dtype(function: Any, dtype: torch.dtype) -> None:
    """Fails if a temperature or softcap that should learn is taken and gets no gradient, or NumPy's
    numbers are refused."""
    hidden, weight, targets = example(5, 4, 7, dtype)
    for name in ("softcap", "temperature"):
        with pytest.raises(ValueError, match=f"{name} must be a number, got .*requires_grad"):
            function(hidden, weight, targets, **{name: torch.tensor(2.0, requires_grad=True)})
    for kind in (np.float32, np.float64, np.float16, np.int64):
        ours = function(hidden, weight, targets, None, kind(3), kind(2), np.int32(-100))
        right = function(hidden, weight, targets, None, 3.0, 2.0)
        assert torch.equal(torch.as_tensor(ours[0]), torch.as_tensor(right[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_cross_entropy(dtype: torch.dtype) -> None:
    """Fails if the docstring's mean of bits is another than F.cross_entropy's."""
    hidden, weight, targets = example(9, 4, 7, dtype)
    targets[::3] = -100
    bits = fastmem.token_bits(hidden, weight, targets)
    mean = bits.sum() / (targets != -100).sum()
    right = torch.nn.functional.cross_entropy(hidden @ weight.T, targets) / math.log(2)
    torch.testing.assert_close(mean, right)
    assert bits.mean() < right


@pytest.mark.filterwarnings("ignore:(?s).*quantized tensor creation")  # of torch itself
def test_quantized() -> None:
    """Fails if quantized numbers are taken for integers or floats."""
    hidden = torch.quantize_per_tensor(H, 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"hidden is quantized: use \.dequantize"):
        fastmem.token_bits(hidden, W, T)


@pytest.mark.parametrize("function", [fastmem.token_bits, fastmem.token_stats])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int8])
def test_check_raises_at_once(function: Any, dtype: torch.dtype) -> None:
    """Fails if the error lacks the place of a target outside [0, V), or refuses an ignored target
    or targets in a type that cannot hold V."""
    hidden, weight = torch.zeros(2, 3, 4), torch.zeros(300, 4)
    targets = torch.tensor([[0, 5, 100], [7, 100, 9]]).to(dtype)
    function(hidden, weight, targets, check=True)
    function(hidden, weight[:10], targets, ignore_index=100, check=True)
    with pytest.raises(ValueError, match=r"target at \(0, 2\) is 100: expected 0 to 9, .*-100"):
        function(hidden, weight[:10], targets, check=True)
    if dtype != torch.uint8:
        targets[1, 1] = -1
        with pytest.raises(ValueError, match=r"target at \(1, 1\) is -1: expected 0 to 299"):
            function(hidden, weight, targets, check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_width(dtype: torch.dtype) -> None:
    """Fails if D = 0 is refused, or its logits are not the bias."""
    hidden, weight = torch.zeros(2, 3, 0, dtype=dtype), torch.zeros(4, 0, dtype=dtype)
    assert fastmem.token_bits(hidden, weight, torch.ones(2, 3).int()).tolist() == [[2.0] * 3] * 2
    bias = torch.tensor([0.0, math.log(5), 0.0, 0.0], requires_grad=True)
    bits = fastmem.token_bits(hidden, weight, torch.ones(2, 3).int(), bias)
    assert torch.allclose(bits.detach().double(), torch.tensor(math.log2(8 / 5)).double())
    bits.sum().backward()
    assert bias.grad is not None
    assert bias.grad[1] < 0
    assert fastmem.token_stats(hidden, weight, torch.ones(2, 3).int(), lse=True).lse_bits[0, 0] == 2


def test_without_data() -> None:
    """Fails if the meta device is refused or gives other shapes."""
    for dtype in (torch.float32, torch.float64):
        hidden, weight, targets = (
            t.to("meta") for t in (torch.ones(2, 3, 4, dtype=dtype), W.to(dtype), T)
        )
        bits = fastmem.token_bits(hidden, weight, targets)
        assert (bits.shape, bits.dtype, bits.device.type) == ((2, 3), dtype, "meta")
