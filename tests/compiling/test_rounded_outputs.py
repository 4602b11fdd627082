"""Products that give the next product's levels agree with the steps that they replace."""

import pytest
import torch
from torch import nn

from ipex_sq import QuantConfig, quantize
from ipex_sq.compiling.inductor import SharedWork, inductor
from ipex_sq.kernels.brgemm import MOST_ROWS, brgemm_built
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.models.running import run_model
from ipex_sq.models.tiny import tiny_model
from ipex_sq.recipe.plan import PreScale
from ipex_sq.recipe.qparams import ActivationQParams
from ipex_sq.system import int8_isa, usable_flags

ONE_LEVEL = 1
"""Where a number lies in the middle between two levels, its last bits decide."""

OPERATOR = "ipex_sq.int8_levels.default"

pytestmark = pytest.mark.skipif(
    "avx512_vnni" not in usable_flags(), reason="the CPU has no AVX512-VNNI"
)


def _gelu_tanh(x):
    return nn.functional.gelu(x, approximate="tanh")


def _bloom_gelu(x):
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _new_gelu(x):
    inner = (2.0 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


ACTIVATIONS = {
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": _gelu_tanh,
}
COPIES = {"no parts": None, "parts": [0, 3, 3, 63, 64, 64, 90, 95]}
"""Channels with further parts: several of one, the last column of a tile, the first of the next."""


def _linear(shape, *, biased, dtype=torch.bfloat16):
    out, size = shape
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    bias = torch.randn(out) if biased else None
    linear = Int8Linear(weight, torch.rand(out) * 2e-3 * (64 / size) ** 0.5, bias)
    linear.set_input(ActivationQParams(0.03, 100), None)
    linear.output_dtype = dtype
    assert linear.only_rows()
    return linear


def _next(width, copies, dtype=torch.bfloat16):
    """The Linear that reads the levels."""
    channels = None if copies is None else torch.tensor(copies)
    count = 0 if copies is None else len(copies)
    weight = torch.randint(-127, 128, (32, width + count), dtype=torch.int8)
    linear = Int8Linear(weight, torch.rand(32) * 1e-2, None)
    linear.set_input(ActivationQParams(0.02, 60), PreScale(torch.rand(width) + 0.5, channels))
    linear.output_dtype = dtype
    assert linear.only_rows()
    return linear


def _levels(x, linears, following, activation):
    first = linears[0]
    levels, scale = first._round(x)
    fields = ("row_weight", "row_sums", "weight_scale", "bias")
    return torch.ops.ipex_sq.int8_levels(
        *(levels, scale, first.input_zero_point),
        *([getattr(linear, name) for linear in linears] for name in fields),
        *(activation, following.multiplier, following.input_zero_point),
        *(following.channels, following.held_low, following.held_high),
    )


@pytest.mark.parametrize("copies", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_levels_are_those_of_fp32_outputs(activation, gated, biased, copies):
    torch.manual_seed(0)
    for width, rows in ((100, (1,)), (100, (3, 50)), (192, (2, 70))):
        linears = [
            _linear((width, 128), biased=biased, dtype=torch.float32) for _ in range(1 + gated)
        ]
        following = _next(width, copies)
        x = torch.randn(*rows, 128)
        outputs = ACTIVATIONS[activation](linears[0](x))
        if gated:
            outputs = outputs * linears[1](x)
        wanted, _ = following._round(outputs)
        found = _levels(x, linears, following, activation)
        assert found.shape == wanted.shape
        off = (found.int() - wanted.int()).abs()
        if rows != (1,):
            assert wanted.unique().numel() > 50
        # Copies of one channel start where the part before ends: the same middle counts for each.
        assert off.max() <= (0 if activation == "relu" and not gated else ONE_LEVEL)
        assert (off > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_that_of_float64(activation):
    following = Int8Linear(torch.ones(4, 64, dtype=torch.int8), torch.ones(4), None)
    finest = 2e-4
    for low in (-12.0, -2.0, -0.2, 0.0, 0.02, 2.0):
        # The bias alone is the output: a range of numbers that fine levels span.
        x = torch.linspace(low, low + 255 * finest * 0.98, 256).double()
        linear = Int8Linear(torch.ones(64, 4, dtype=torch.int8), torch.ones(64), None)
        assert linear.only_rows()
        exact = ACTIVATIONS[activation](x)
        zero = -round(float(exact.min()) / finest)
        following.multiplier = torch.full((64,), 1 / finest)
        following.channels = following.held_low = following.held_high = None
        following.input_zero_point = torch.tensor(zero, dtype=torch.int32)
        linear.set_input(ActivationQParams(1.0, 0), None)
        linear.bias = torch.zeros(64)
        for n in range(0, 256, 64):
            linear.bias[:] = x[n : n + 64].float()
            found = _levels(torch.zeros(1, 4), [linear], following, activation)[0].double()
            wanted = (exact[n : n + 64] / finest + zero).clamp(0, 255)
            # Half a level of rounding; 3e-6 of GELU and 3e-6 of the numbers themselves, in levels.
            most = 0.5 + (3.1e-6 + 4e-6 * x.abs().max() + 1e-6) / finest
            assert (found - wanted).abs().max() <= most


def test_an_activation_that_is_not_there_is_refused():
    linear = _linear((64, 64), biased=False)
    with pytest.raises(RuntimeError, match="no activation is named softplus"):
        _levels(torch.randn(2, 64), [linear], _next(64, None), "softplus")


class _Block(nn.Module):
    def __init__(self, activation, *, gated=False, copies=None, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.first = _linear((96, 64), biased=True, dtype=dtype)
        self.factor = _linear((96, 64), biased=False, dtype=dtype) if gated else None
        self.second = _next(96, copies, dtype)
        self.activation = activation
        if self.factor is not None:
            for name in ("multiplier", "input_scale", "input_zero_point"):
                setattr(self.factor, name, getattr(self.first, name))

    def hidden(self, x):
        hidden = self.activation(self.first(x))
        return hidden if self.factor is None else hidden * self.factor(x)

    def forward(self, x):
        return self.second(self.hidden(x))


@pytest.fixture
def operators(monkeypatch):
    """Names of the operators of each graph, after the passes."""
    torch._dynamo.reset()
    graphs = []
    passes = SharedWork.__call__

    def recorded(self, graph):
        passes(self, graph)
        graphs.append([str(node.target) for node in graph.nodes])

    monkeypatch.setattr(SharedWork, "__call__", recorded)
    with torch._inductor.config.patch(force_disable_caches=True):
        yield graphs


def _compiled(function, x):
    assert brgemm_built()
    return torch.compile(function, dynamic=True, backend=inductor)(x)


WRITTEN = {**ACTIVATIONS, "gelu of bloom": _bloom_gelu, "gelu of gpt2": _new_gelu}


@pytest.mark.parametrize(
    ("gated", "copies"), [(True, COPIES["parts"]), (False, None)], ids=["gated, parts", "plain"]
)
@pytest.mark.parametrize("activation", WRITTEN)
@torch.inference_mode()
def test_compiled_blocks_have_levels_only_between_their_products(
    activation, gated, copies, operators
):
    block = _Block(WRITTEN[activation], gated=gated, copies=copies)
    x = torch.randn(5, 7, 64).bfloat16()
    found = _compiled(block, x)
    wanted = block(x)
    assert operators[0].count(OPERATOR) == 1
    assert sum("int8_rows" in name for name in operators[0]) == 1
    # As written, outputs, activation and product are rounded to bf16, each to 0.4 %.
    assert (found - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize(
    "block",
    [
        _Block(nn.functional.softplus),
        _Block(nn.Identity()),
        _Block(nn.functional.silu, dtype=torch.float32),
    ],
    ids=["another activation", "no activation", "fp32"],
)
@torch.inference_mode()
def test_what_the_operator_does_not_do_stays_as_it_was(block, operators):
    x = torch.randn(5, 7, 64).to(block.first.output_dtype)
    found = _compiled(block, x)
    assert OPERATOR not in operators[0]
    wanted = block(x)
    assert (found - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@torch.inference_mode()
def test_an_output_that_others_read_is_written(gated, operators):
    block = _Block(torch.relu, gated=gated)
    x = torch.randn(5, 7, 64).bfloat16()

    def both(x):
        hidden = block.hidden(x)
        return hidden, block.second(hidden)

    found = _compiled(both, x)
    assert OPERATOR not in operators[0]
    for output, wanted in zip(found, both(x), strict=True):
        assert (output - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.skipif(int8_isa() != "AVX512-VNNI", reason="products of many rows are oneDNN's here")
@pytest.mark.parametrize("family", ["bert", "bloom", "falcon", "gemma2", "gpt2", "opt", "qwen3"])
def test_models_of_many_families_have_it(family, operators):
    model = tiny_model(family)
    ids = torch.randint(3, model.config.vocab_size, (8, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = quantize(model, [batch], QuantConfig(alpha=None, backend="native"))
    with torch.inference_mode():
        run_model(model, batch)
    assert operators
    assert all(graph.count(OPERATOR) == 1 for graph in operators)


@pytest.mark.skipif(int8_isa() != "AVX512-VNNI", reason="products of many rows are oneDNN's here")
def test_steps_of_generation_have_it(operators):
    model = tiny_model("llama")
    ids = torch.randint(3, model.config.vocab_size, (4, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = quantize(model, [batch], QuantConfig(alpha=None, backend="native"))
    assert len(ids) <= MOST_ROWS
    model.generate(**batch, max_new_tokens=3, pad_token_id=0, use_cache=True)

    assert operators
    assert all(graph.count(OPERATOR) == 1 for graph in operators)
