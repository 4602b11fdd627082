import pytest
import torch
from torch import nn

from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.tiny import FAMILIES, tiny_model
from ipex_sq.models.topology import find_topology, quantizable_linears

GROUPS = {
    "bloom": {("query_key_value",): True, ("dense",): False, ("dense_h_to_4h",): True},
    "opt": {("q_proj", "k_proj", "v_proj"): True, ("out_proj",): False, ("fc1",): True},
    "llama": {
        ("q_proj", "k_proj", "v_proj"): True,
        ("o_proj",): False,
        ("gate_proj", "up_proj"): True,
        ("down_proj",): False,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_and_their_producers(family, batches):
    model = tiny_model(family)
    topology = find_topology(model, batches[0])
    found = {
        tuple(sorted(name.split(".")[-1] for name in group.readers)): not group.fold_problem
        for group in topology.groups
    }
    for readers, foldable in GROUPS[family].items():
        assert found[tuple(sorted(readers))] is foldable
    grouped = [name for group in topology.groups for name in group.readers]
    assert sorted(grouped) == sorted(quantizable_linears(model)[0])
    assert topology.float_reasons == {"lm_head": "output head"}


def test_no_hook_is_left(batches):
    model = tiny_model("llama")
    find_topology(model, batches[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class _Block(nn.Module):
    """A norm whose output two things read: a Linear and, where asked, a residual."""

    def __init__(self, residual):
        super().__init__()
        self.norm, self.linear, self.residual = nn.LayerNorm(8), nn.Linear(8, 8), residual

    def forward(self, x, use_cache=False):
        y = self.norm(x)
        return (self.linear(y) + y if self.residual else self.linear(y),)


@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_that_a_residual_reads_cannot_fold(residual):
    (group,) = find_topology(_Block(residual), {"x": torch.randn(2, 8)}).groups
    assert group.producer == "norm"
    assert bool(group.fold_problem) is residual


def test_a_model_without_linears_is_refused():
    with pytest.raises(UnsupportedModelError, match="no Linear"):
        quantizable_linears(nn.Sequential(nn.LayerNorm(4)))
