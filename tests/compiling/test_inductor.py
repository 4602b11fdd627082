"""Compiled layers compute once what several readers of a tensor need."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ipex_sq.compiling.inductor import every_operation_once, inductor, products_together
from ipex_sq.kernels.brgemm import brgemm_built, pack_rows, sum_rows


def _graph(function, *inputs):
    return make_fx(function, tracing_mode="symbolic")(*inputs)


def _count(module, name):
    return sum(name in str(node.target) for node in module.graph.nodes)


def test_readers_of_one_tensor_share_its_rounding():
    def reader(x, channels, weight):
        levels = torch.round(x * 10)
        return torch.cat((levels, levels[..., channels]), dim=-1) @ weight

    def layer(x, channels, first, second):
        return reader(x, channels, first) + 2 * reader(x, channels, second)

    inputs = torch.randn(5, 8), torch.tensor([1, 1, 3]), *torch.randn(2, 11, 4)
    module = _graph(layer, *inputs)
    before = module(*inputs)
    every_operation_once(module.graph)
    module.recompile()
    assert torch.equal(module(*inputs), before)
    assert {name: _count(module, name) for name in ("round", "cat", "index", "mm")} == {
        "round": 1,
        "cat": 1,
        "index": 1,
        "mm": 2,
    }


def test_other_arguments_make_another_operation():
    module = _graph(lambda x: x.sum(0) * x.sum(1) + x.sum(0), torch.randn(4, 4))
    every_operation_once(module.graph)
    assert _count(module, "sum") == 2


def test_a_whole_number_is_not_its_float():
    """They are equal in Python, and give results of other types."""
    module = _graph(lambda x: (x * 1).to(torch.float64) + x * 1.0, torch.arange(4))
    every_operation_once(module.graph)
    module.recompile()
    assert _count(module, "mul") == 2


def test_what_is_random_returned_or_has_memory_of_its_own_stays_twice():
    def twice(x):
        noise = torch.rand_like(x) - torch.rand_like(x)
        copies = x.clone() * x.clone().neg()
        return x + 1, x + 1, noise * copies

    x = torch.randn(4, 4)
    module = _graph(twice, x)
    every_operation_once(module.graph)
    module.recompile()
    assert _count(module, "rand_like") == 2
    assert _count(module, "clone") == 2
    first, second, noise = module(x)
    assert first.data_ptr() != second.data_ptr()
    assert noise.any()


def _few_rows(generator, outputs, dtype=torch.float32, bias=True):
    """A function of levels, scale and zero point, and the tensors of its weight."""
    weight = torch.randint(-127, 128, (outputs, 8), dtype=torch.int8, generator=generator)
    packed = pack_rows(weight)
    tensors = [packed, sum_rows(packed, outputs), torch.rand(outputs, generator=generator)]
    tensors += [torch.randn(outputs, generator=generator)] * bias

    def run(levels, scale, zero_point, packed, sums, scales, biases=None):
        rows = torch.ops.ipex_sq.int8_rows
        return rows(levels, scale, zero_point, packed, sums, scales, biases, dtype)

    return run, tensors


def test_products_of_the_same_levels_are_one_call():
    assert brgemm_built()
    generator = torch.Generator().manual_seed(0)
    kinds = [(70, torch.float32, True), (3, torch.float32, False), (5, torch.bfloat16, True)]
    products = [_few_rows(generator, *kind) for kind in kinds]
    counts = [len(tensors) for _, tensors in products]

    def layer(levels, other, scale, zero_point, *tensors):
        rest = iter(tensors)
        outputs = []
        for (run, _), count in zip(products, counts, strict=True):
            weight = [next(rest) for _ in range(count)]
            outputs += [run(x, scale, zero_point, *weight) for x in (levels, other)]
        return outputs

    levels = torch.randint(0, 256, (2, 4, 8), dtype=torch.uint8, generator=generator)
    flat = [tensor for _, tensors in products for tensor in tensors]
    inputs = *levels, torch.tensor(0.1), torch.tensor(7, dtype=torch.int32), *flat
    module = _graph(layer, *inputs)
    before = module(*inputs)
    products_together(module.graph)
    module.graph.lint()
    module.recompile()
    assert all(torch.equal(*pair) for pair in zip(module(*inputs), before, strict=True))
    # Of each of the two inputs the two in fp32 are joined, and the one in bf16 is not.
    assert _count(module, "int8_rows_together") == 2
    assert _count(module, "int8_rows.default") == 2


def test_tanh_is_that_of_torch_to_fp32_wherever_it_is_asked():
    edges = torch.tensor([0.0, -0.0, 1e-20, 20.0, -20.0, 1e4, -3e38, torch.inf, -torch.inf])
    x = torch.cat((torch.linspace(-12, 12, 4096), edges, torch.tensor([torch.nan])))
    compiled = torch.compile(torch.tanh, dynamic=True, backend=inductor)
    # Half the distance of two fp32 numbers below 1, twice: of the quotient and of the difference.
    torch.testing.assert_close(compiled(x), x.tanh(), rtol=0, atol=2**-22, equal_nan=True)
