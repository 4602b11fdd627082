"""Samples of Linears that read more or fewer rows than a text has tokens."""

import pytest
import torch
from torch import nn

from ipex_sq.recipe.plan import SmoothGroup
from ipex_sq.recipe.samples import record_samples


class _Sorted(nn.Module):
    """Tokens above zero go to one expert, the others to another, and all to a third Linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.above, self.below, self.all = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
        self.pooled = nn.Linear(4, 3)

    def forward(self, x):
        parts = [self.above(x[x[:, 0] > 0]), self.below(x[x[:, 0] <= 0]), self.all(x)]
        return sum(part.sum() for part in parts) + self.pooled(x[:1]).sum()


NAMES = ("above", "below", "all", "pooled")


def _sampled(inputs):
    model = _Sorted()
    groups = [SmoothGroup((name,), None, "") for name in NAMES]
    with record_samples(model, groups, sum(map(len, inputs))) as recorder:
        for x in inputs:
            model(x.requires_grad_()).backward()
            recorder.predictions += len(x)
    return recorder.finish()


def test_an_expert_that_no_token_was_sent_to_has_no_sample():
    samples = _sampled([torch.ones(5, 4), torch.ones(7, 4)])
    assert set(samples) == {"above", "all", "pooled"}


def test_texts_without_tokens_for_an_expert_are_left_out():
    samples = _sampled([torch.ones(5, 4), -torch.ones(7, 4), torch.ones(2, 4)])
    assert len(samples["above"].inputs) == len(samples["above"].gradients) == 7
    assert len(samples["above"].thinned(2).inputs) >= 2
    assert torch.equal(samples["below"].inputs, -torch.ones(7, 4))


@pytest.mark.parametrize("length", [3, 300])
def test_weights_count_the_rows_that_were_seen(length):
    """Rows per prediction: as many as tokens, but one of a text for what reads the first alone."""
    samples = _sampled([torch.ones(length, 4) for _ in range(8)])
    rows = {name: len(item.inputs) * item.weight for name, item in samples.items()}
    assert rows["above"] == rows["all"] == pytest.approx(1.0)
    assert rows["pooled"] == pytest.approx(1 / length)


class _Positions(nn.Module):
    """A Linear that reads a parameter, as DeBERTa's of relative positions do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(6, 4), requires_grad=False)
        self.read = nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x):
        read = self.read(self.table)
        read += 1  # in place, as models may
        return x @ read.T


def test_a_linear_that_reads_a_parameter_has_gradients():
    model, x = _Positions(), torch.randn(2, 3, requires_grad=True)
    group = SmoothGroup(("read",), None, "")
    with record_samples(model, [group], 2) as recorder:
        output = model(x)
        output.sum().backward()
    assert torch.equal(output, model(x))
    sample = recorder.finish()["read"]
    assert len(sample.inputs) == 6
    torch.testing.assert_close(sample.gradients, x.detach().sum(0).expand(6, 3))
