import torch

from ipex_sq.recipe.alpha import ALPHA_GRID, group_errors, int8_outputs, search_alpha
from ipex_sq.recipe.observers import LinearStats


def _group(seed, outlier):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 32, generator=generator)
    x[:, 5] *= outlier
    weight = torch.randn(24, 32, generator=generator) * 0.1
    return LinearStats(x.amin(0), x.amax(0), x[:64]), [weight]


def test_smoothing_beats_plain_where_a_channel_stands_out():
    stats, weights = _group(0, outlier=100.0)
    wanted = stats.rows @ weights[0].T
    plain = (int8_outputs(stats, weights[0], None) - wanted).norm() / wanted.norm()
    assert min(group_errors(stats, weights, ALPHA_GRID)) < 0.5 * float(plain)


def test_the_search_returns_the_least_mean_error():
    groups = {"a": _group(0, 100.0), "b": _group(1, 1.0)}
    alpha, errors = search_alpha(groups)
    assert errors[alpha] == min(errors.values())
    separate = [group_errors(*groups[key], [alpha])[0] for key in groups]
    assert abs(errors[alpha] - sum(separate) / 2) < 1e-6


def test_a_rescaling_between_activations_and_weights_changes_no_error():
    # x * k and W / k leave the product alone, and the smoothing scale takes up k exactly.
    stats, weights = _group(0, outlier=10.0)
    factor = torch.logspace(-2, 2, 32)
    scaled = LinearStats(stats.minimum * factor, stats.maximum * factor, stats.rows * factor)
    before = group_errors(stats, weights, ALPHA_GRID)
    after = group_errors(scaled, [weight / factor for weight in weights], ALPHA_GRID)
    # A value on a rounding boundary may fall to the other side: a thousandth of the error.
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=2e-2, atol=0)
