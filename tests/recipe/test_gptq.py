import pytest
import torch
from torch import nn

from ipex_sq.errors import CalibrationError
from ipex_sq.recipe import gptq
from ipex_sq.recipe.gptq import (
    HessianRecorder,
    _feedback,
    gptq_weight,
    one_thread,
    picked_rows,
    record_hessians,
    smoothed_hessian,
)
from ipex_sq.recipe.qparams import quantize_weight, weight_scale


def _inputs(channels, tokens=400, seed=0):
    """Channels that depend on each other and differ in size, as in a network."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    size = torch.rand(channels, generator=generator) * 10 + 0.1
    return torch.randn(tokens, channels, generator=generator) @ mixing * size


def _weight(channels, outputs=24, seed=1):
    return torch.randn(outputs, channels, generator=torch.Generator().manual_seed(seed))


def _output_error(x, weight, levels, steps):
    return float((x @ (levels.float() * steps[:, None] - weight).T).pow(2).sum())


@pytest.mark.parametrize("channels", [1, 3, 48, 150])
@pytest.mark.parametrize("seed", [0, 1])
def test_output_errors_are_smaller_than_rounded_to_nearest(channels, seed):
    x, weight = _inputs(channels, seed=seed), _weight(channels, seed=seed + 1)
    steps = weight_scale(weight)
    nearest = _output_error(x, weight, quantize_weight(weight, steps), steps)
    levels = gptq_weight(weight, steps, x.T @ x)
    assert levels.dtype == torch.int8
    assert int(levels.abs().max()) <= 127
    assert _output_error(x, weight, levels, steps) <= (0.8 if channels > 3 else 1.0) * nearest


@pytest.mark.parametrize("numbers", [1, 7 * 40, 24 * 40 - 1])
def test_many_rows_are_rounded_in_parts(numbers, monkeypatch):
    x, weight = _inputs(40), _weight(40)
    steps = weight_scale(weight)
    whole = gptq_weight(weight, steps, x.T @ x)
    monkeypatch.setattr(gptq, "NUMBERS_AT_ONCE", numbers)
    parts = gptq_weight(weight, steps, x.T @ x)
    # Products of fewer rows add up in another order: a weight on a tie may go the other way.
    assert parts.shape == whole.shape
    assert (parts != whole).float().mean() < 0.01


def test_it_is_the_algorithm_of_the_paper(monkeypatch):
    """Written there with the inverse Hessian and errors pushed on, here pulled from H itself."""
    monkeypatch.setattr(gptq, "TOGETHER", 1)
    x, weight = _inputs(40).double(), _weight(40).double()
    steps = weight_scale(weight).double()
    hessian = x.T @ x
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian + gptq.DAMPING * hessian.diagonal().mean() * torch.eye(40).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    left, wanted = weight[:, order].clone(), torch.empty(24, 40).double()
    for channel in range(40):
        wanted[:, channel] = (left[:, channel] / steps).round().clamp(-127, 127)
        error = (left[:, channel] - wanted[:, channel] * steps) / upper[channel, channel]
        left[:, channel:] -= error[:, None] * upper[channel, channel:]
    levels = gptq_weight(weight.float(), steps.float(), hessian.float())
    same = (levels.double() == wanted[:, order.argsort()]).double().mean()
    assert same > 0.99  # ties apart


def test_independent_channels_are_rounded_to_nearest():
    weight = _weight(70)
    steps = weight_scale(weight)
    for size in (torch.rand(70) + 0.1, torch.zeros(70)):  # zero: an expert that no token reached
        assert torch.equal(
            gptq_weight(weight, steps, torch.diag(size)), quantize_weight(weight, steps)
        )


def _recorded(batches, channels):
    linear = nn.Linear(channels, 4)
    with record_hessians({"a": linear}, sum(map(len, batches))) as recorders, torch.no_grad():
        for x in batches:
            linear(x)
    return recorders["a"].finish()


def test_the_hessian_is_the_sum_over_tokens(monkeypatch):
    x = _inputs(32, tokens=100)
    monkeypatch.setattr(gptq, "ROWS_PER_CHANNEL", 100)
    monkeypatch.setattr(gptq, "MOST_WAITING", 30)  # several products
    found, wanted = _recorded(list(x.split(20)), 32), x.T @ x
    size = wanted.diagonal().sqrt()
    # Rounding a channel to 254 levels of its range: a hundredth of its size at most.
    assert float(((found - wanted) / size / size[:, None]).abs().max()) < 0.01


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_give_their_own_hessian(rows):
    x = _inputs(16, tokens=rows)
    wanted = x.T @ x
    found = _recorded([x], 16)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.01 * float(wanted.abs().max()))


def test_a_hessian_without_a_root_is_an_error_with_advice():
    weight = _weight(4)
    with pytest.raises(CalibrationError, match=r"'here'.*more texts"):
        gptq_weight(weight, weight_scale(weight), -10 * torch.eye(4) + 9, name="here")


@pytest.mark.parametrize("length", [64, 89, 100, 128, 144, 512])
@pytest.mark.parametrize("every", [8, 10, 16, 128])
def test_every_position_of_texts_is_taken_alike(length, every):
    texts = 512
    places = picked_rows(0, length * texts, every)
    assert abs(len(places) - length * texts / every) <= 1
    assert int(places.diff().min()) > 0
    counts = torch.bincount(places % length, minlength=length).double()
    fair = texts / every  # counts vary as those of a Poisson distribution at most
    assert float((counts - fair).square().mean()) < 1.5 * fair
    assert float(counts.max()) < fair + 6 * fair**0.5 + 2


def test_the_same_rows_are_picked_wherever_batches_are_cut():
    whole = picked_rows(0, 1000, 7)
    parts = [picked_rows(start, stop, 7) for start, stop in ((0, 3), (3, 4), (4, 500), (500, 1000))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(picked_rows(5, 9, 1), torch.arange(5, 9))


def test_as_many_tokens_are_taken_however_they_are_batched():
    x = _inputs(8, tokens=97)
    whole = _recorded([x], 8)
    parts = _recorded([x[:50], x[50:53], x[53:]], 8)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-3)
    assert float(whole.trace()) < 0.5 * float(x.pow(2).sum())


def test_an_expert_without_rows_has_a_hessian_of_zeros():
    found = HessianRecorder(64, 128 * 128)
    found.begin(1)
    found.observe(torch.empty(0, 64))
    assert torch.equal(found.finish(), torch.zeros(64, 64))
    alone = HessianRecorder(64, 128 * 128)
    for start in range(0, 128 * 128, 128):  # reached, but few of its rows are picked or none
        alone.begin(start)
        alone.observe(torch.ones(1, 64))
    assert bool(alone.finish().isfinite().all())


def test_smoothing_the_hessian_is_smoothing_the_inputs():
    x, scale = _inputs(16), torch.rand(16) + 0.5
    smoothed = x / scale
    found = smoothed_hessian(x.T @ x, scale)
    torch.testing.assert_close(found, smoothed.T @ smoothed, rtol=1e-4, atol=1.0)
    assert torch.equal(smoothed_hessian(x.T @ x, None), x.T @ x)


def test_the_sum_does_not_depend_on_who_saw_which_batch():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, 512, generator=generator) for rows in (700, 531, 907, 400)]
    tokens = sum(map(len, batches))
    alone = HessianRecorder(512, tokens)
    both = [HessianRecorder(512, tokens, at_once=False) for _ in range(2)]
    before = 0
    for number, batch in enumerate(batches):
        for recorder in (alone, both[number % 2]):
            recorder.begin(before)
            recorder.observe(batch)
        before += len(batch)
    both[1].kept += both[0].kept
    assert torch.equal(both[1].finish(), alone.finish())


def test_rounding_does_not_depend_on_the_number_of_threads():
    """MKL's Cholesky does: weights, and with them accuracy, would be those of one machine."""
    inputs = torch.randn(2000, 576, generator=torch.Generator().manual_seed(0))
    hessian = inputs.T @ inputs
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(_feedback(hessian))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(item, found[0]) for item in found)
    with pytest.raises(ValueError, match="inside"), one_thread():
        raise ValueError("inside")
    assert torch.get_num_threads() == threads
