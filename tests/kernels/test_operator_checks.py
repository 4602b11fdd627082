"""Operators refuse what they would read or write beyond memory, and take what has no rows."""

import pytest
import torch

from ipex_sq.kernels.attention import has_kernel, kernel_for_attention
from ipex_sq.kernels.brgemm import brgemm_built, pack_rows, sum_rows

WIDTH, ROWS, OUT = 16, 3, 70
operators = torch.ops.ipex_sq

pytestmark = pytest.mark.skipif(not brgemm_built(), reason="the kernels do not build here")
with_kernel = pytest.mark.skipif(not has_kernel(), reason="there is no kernel for attention here")


def _rows(**changes):
    packed = pack_rows(torch.ones(OUT, WIDTH, dtype=torch.int8))
    arguments = {
        "levels": torch.ones(ROWS, WIDTH, dtype=torch.uint8),
        "input_scale": torch.ones(()),
        "input_zero_point": torch.zeros((), dtype=torch.int32),
        "packed": packed,
        "weight_sums": sum_rows(packed, OUT),
        "weight_scale": torch.ones(OUT),
        "bias": torch.zeros(OUT),
        "dtype": torch.float32,
    }
    return operators.int8_rows(**{**arguments, **changes})


def _static(**changes):
    arguments = {
        "x": torch.ones(ROWS, WIDTH),
        "multiplier": torch.ones(WIDTH),
        "zero_point": torch.zeros((), dtype=torch.int32),
        "channels": torch.tensor([1, 1]),
        "held_low": torch.zeros(2),
        "held_high": torch.ones(2),
    }
    return operators.round_static(**{**arguments, **changes})


def _tokens(**changes):
    arguments = {
        "x": torch.ones(ROWS, WIDTH),
        "multiplier": torch.ones(WIDTH),
        "least": 1e-8,
        "channels": torch.tensor([1, 1]),
    }
    return operators.round_tokens(**{**arguments, **changes})[0]


def _attention(**changes):
    query, key = torch.ones(2, 4, 5, 8).bfloat16(), torch.ones(2, 2, 7, 8).bfloat16()
    arguments = {"query": query, "key": key, "value": key, "mask": None, "causal": False}
    return operators.short_attention(**{**arguments, "scale": 1.0, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float16},
        {"dtype": torch.uint8},
        {"weight_sums": torch.zeros(OUT - 1, dtype=torch.int32)},
        {"weight_sums": torch.zeros(OUT)},
        {"weight_scale": torch.ones(10 * OUT)},
        {"weight_scale": torch.ones(2 * OUT)[::2]},
        {"bias": torch.zeros(3)},
        {"bias": torch.zeros(OUT).double()},
        {"input_scale": torch.ones(ROWS + 1)},
        {"input_scale": torch.ones(0)},
        {"levels": torch.ones(WIDTH, ROWS, dtype=torch.uint8).T},
        {"levels": torch.ones(ROWS, WIDTH)},
        {"packed": torch.ones(1, WIDTH // 4, 64, 4, dtype=torch.int8)},
        {"packed": torch.ones(WIDTH // 4, 2, 64, 4, dtype=torch.int8).transpose(0, 1)},
        {"packed": torch.ones(OUT, WIDTH, dtype=torch.int8)},
        {
            "levels": torch.ones(ROWS, 0, dtype=torch.uint8),
            "packed": torch.ones(2, 0, 64, 4, dtype=torch.int8),
        },
    ],
    ids=str,
)
def test_products_of_what_does_not_fit_are_refused(changes):
    assert _rows().shape == (ROWS, OUT)
    with pytest.raises(RuntimeError):
        _rows(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.ones(ROWS, WIDTH).half()},
        {"multiplier": torch.ones(2 * WIDTH)[::2]},
        {"channels": torch.tensor([3, WIDTH])},
        {"channels": torch.tensor([-1, 3])},
        {"channels": torch.tensor([3, 2])},
        {"channels": torch.tensor([3.0, 4.0])},
        {"held_low": torch.zeros(1)},
        {"held_high": None},
        {"x": torch.ones(ROWS, 0), "multiplier": torch.ones(0)},
    ],
    ids=str,
)
def test_rounding_of_what_does_not_fit_is_refused(changes):
    assert _static().shape == (ROWS, WIDTH + 2)
    with pytest.raises(RuntimeError):
        _static(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.ones(ROWS, WIDTH).half()},
        {"multiplier": torch.ones(2 * WIDTH)[::2]},
        {"multiplier": torch.ones(WIDTH - 1)},
        {"channels": torch.tensor([3, WIDTH])},
        {"channels": torch.tensor([-1, 3])},
        {"channels": torch.tensor([3, 2])},
        {"channels": torch.tensor([3.0, 4.0])},
        {"channels": torch.tensor([1, 9, 2, 9])[::2]},
        {"x": torch.ones(ROWS, 0), "multiplier": torch.ones(0)},
    ],
    ids=str,
)
def test_rounding_of_tokens_that_do_not_fit_is_refused(changes):
    assert _tokens().shape == (ROWS, WIDTH + 2)
    with pytest.raises(RuntimeError):
        _tokens(**changes)


@with_kernel
@pytest.mark.parametrize(
    "changes",
    [
        {"query": torch.ones(3, 4, 5, 8).bfloat16()},
        {"query": torch.ones(2, 3, 5, 8).bfloat16()},
        {"query": torch.ones(4, 5, 8).bfloat16()},
        {"query": torch.ones(2, 4, 5, 8)},
        {"value": torch.ones(2, 2, 7, 8)},
        {"value": torch.ones(2, 2, 6, 8).bfloat16()},
        {"mask": torch.ones(1, 1, 5, 6)},
        {"mask": torch.ones(1, 1, 2, 7)},
        {"mask": torch.ones(1, 1, 5, 7, dtype=torch.bool)},
    ],
    ids=lambda changes: str({name: (x.shape, x.dtype) for name, x in changes.items()}),
)
def test_attention_of_what_does_not_fit_is_refused(changes):
    assert _attention()[0].shape == (2, 4, 5, 8)
    with pytest.raises(RuntimeError):
        _attention(**changes)


@with_kernel
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_without_keys_is_that_of_pytorch(tokens):
    query, none = torch.ones(2, 4, tokens, 8).bfloat16(), torch.ones(2, 2, 0, 8).bfloat16()
    output, largest, sums = _attention(query=query, key=none, value=none)
    assert torch.equal(output, torch.zeros_like(query))
    assert bool(((largest + sums.log()) == -torch.inf).all())


def test_no_rows_have_no_outputs():
    assert _rows(levels=torch.ones(0, WIDTH, dtype=torch.uint8)).shape == (0, OUT)
    assert _static(x=torch.ones(0, WIDTH)).shape == (0, WIDTH + 2)
    assert _tokens(x=torch.ones(0, WIDTH)).shape == (0, WIDTH + 2)
    x, weight = torch.ones(0, WIDTH).bfloat16(), torch.ones(OUT, WIDTH).bfloat16()
    assert operators.bf16_logits(x, weight).shape == (0, OUT)


def test_more_products_than_int32_sums_hold_are_refused():
    widest = pack_rows(torch.full((OUT, 66308), 127, dtype=torch.int8))
    levels = torch.full((1, 66308), 255, dtype=torch.uint8)
    assert float(_rows(packed=widest, levels=levels)[0, 0]) == pytest.approx(66308 * 127 * 255)
    wider = pack_rows(torch.ones(OUT, 66312, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="66311 products"):
        _rows(packed=wider, levels=torch.ones(1, 66312, dtype=torch.uint8))


def test_logits_without_a_width_are_refused():
    with pytest.raises(RuntimeError, match="no width"):
        operators.bf16_logits(torch.ones(2, 0).bfloat16(), torch.ones(5, 0).bfloat16())


def test_without_onednn_int8_names_the_switch():
    with (
        torch.backends.mkldnn.flags(enabled=False),
        pytest.raises(RuntimeError, match=r"torch\.backends\.mkldnn\.enabled is False"),
    ):
        _rows()


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_without_onednn_logits_are_still_the_sums_in_fp32(rows):
    x, weight = torch.randn(2, rows, 66).bfloat16(), torch.randn(5000, 66).bfloat16()
    with torch.backends.mkldnn.flags(enabled=False):
        found = operators.bf16_logits(x, weight)
    wanted = x.double() @ weight.double().T
    assert (found - wanted).abs().max() <= 2**-19 * wanted.abs().max()


@with_kernel
@pytest.mark.parametrize("tokens", [1, 5])
def test_without_onednn_attention_is_pytorchs(tokens):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, tokens, 16).bfloat16() for heads in (4, 2, 2))
    mask = torch.randn(1, 4, 1, tokens).half()
    for more in ({"mask": mask}, {"causal": True}, {}):
        arguments = {"query": query, "key": key, "value": value, "scale": 0.2, **more}
        wanted, tops, totals = _attention(**arguments)
        with torch.backends.mkldnn.flags(enabled=False):
            found, largest, sums = _attention(**arguments)
        assert (found - wanted).abs().max() < 0.02
        assert (largest + sums.log() - tops - totals.log()).abs().max() < 0.02
        assert found.transpose(1, 2).is_contiguous()


@with_kernel
def test_without_onednn_prompts_are_pytorchs():
    query = torch.randn(2, 4, 5, 16).bfloat16()
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        wanted = attend(query, query, query)
        with kernel_for_attention():
            assert torch.equal(attend(query, query, query), wanted)
