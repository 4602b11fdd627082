import pytest
import torch
from conftest import logits_of
from torch import nn

from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.tiny import FAMILIES, tiny_model
from ipex_sq.models.topology import find_topology, quantizable_linears

GROUPS = {
    "bloom": {("query_key_value",): True, ("dense",): False, ("dense_h_to_4h",): True},
    "opt": {
        ("q_proj", "k_proj", "v_proj"): True,
        ("out_proj",): True,
        ("fc1",): True,
        ("fc2",): True,
    },
    "llama": {
        ("q_proj", "k_proj", "v_proj"): True,
        ("o_proj",): True,
        ("gate_proj", "up_proj"): True,
        ("down_proj",): True,
    },
}


@pytest.mark.parametrize("family", GROUPS)
def test_groups_and_their_producers(family, batches):
    model = tiny_model(family)
    topology = find_topology(model, batches[:1])
    found = {
        tuple(sorted(name.split(".")[-1] for name in group.readers)): not group.fold_problem
        for group in topology.groups
    }
    for readers, foldable in GROUPS[family].items():
        assert found[tuple(sorted(readers))] is foldable
    grouped = [name for group in topology.groups for name in group.readers]
    assert sorted(grouped) == sorted(quantizable_linears(model)[0])
    assert topology.float_reasons == {"lm_head": "output head"}


@pytest.mark.parametrize(
    ("family", "reader", "producer"),
    [
        ("llama", "self_attn.o_proj", "self_attn.v_proj"),
        ("llama", "mlp.down_proj", "mlp.up_proj"),
        ("gemma2", "mlp.down_proj", "mlp.up_proj"),
        ("opt", "fc2", "fc1"),
        ("gptj", "attn.out_proj", "attn.v_proj"),
        ("bert", "attention.output.dense", "attention.self.value"),
    ],
)
def test_linears_that_take_the_scale_of_their_reader(family, reader, producer, batches):
    groups = find_topology(tiny_model(family), batches[:1]).groups
    found = {g.key: g for g in groups if g.key.endswith(reader)}
    assert found
    for key, group in found.items():
        assert group.producer == key.removesuffix(reader) + producer
        assert group.foldable


def test_heads_that_share_values_share_producer_channels(batches):
    groups = find_topology(tiny_model("llama"), batches[:1]).groups
    (group, *_) = [g for g in groups if g.key.endswith("o_proj")]
    # Two value heads of 16 channels, each read by two of the four query heads.
    first, second = torch.arange(16), torch.arange(16, 32)
    assert torch.equal(group.producer_channels, torch.cat((first, first, second, second)))


@pytest.mark.parametrize("family", ["bloom", "gpt2", "phi"])
def test_gelu_and_fused_qkv_pass_no_scale_on(family, batches):
    """A GELU bends what it is given, and a fused projection holds keys and queries as well."""
    for group in find_topology(tiny_model(family), batches[:1]).groups:
        assert group.producer_channels is None or group.producer.endswith("v_proj")


def test_experts_fold_inside_themselves_and_their_router_stays_float(batches):
    model = tiny_model("mixtral")
    topology = find_topology(model, batches)
    kinds = set(topology.float_reasons.values())
    assert kinds in ({"output head", "router"}, {"output head", "experts stacked in one weight"})
    for name, reason in topology.float_reasons.items():
        assert (reason == "router") == name.endswith("block_sparse_moe.gate")
    for group in topology.groups:
        if group.key.endswith("w2"):
            assert group.producer == group.key.replace("w2", "w3")


@pytest.mark.parametrize("family", FAMILIES)
def test_watching_and_probing_leave_the_model_alone(family, batches):
    model = tiny_model(family)
    before = logits_of(model, batches[0])
    find_topology(model, batches[:1])
    assert torch.equal(logits_of(model, batches[0]), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class _Block(nn.Module):
    """A norm whose output two things read: a Linear and, where asked, a residual."""

    def __init__(self, residual):
        super().__init__()
        self.norm, self.linear, self.residual = nn.LayerNorm(8), nn.Linear(8, 8), residual

    def forward(self, x, use_cache=False):
        y = self.norm(x)
        return (self.linear(y) + y if self.residual else self.linear(y),)


class _Gated(nn.Module):
    """up and down with a product between them; `leak` lets the output of up past down."""

    def __init__(self, leak):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down, self.leak = nn.Linear(12, 8), leak

    def forward(self, x):
        up = self.up(x)
        y = self.down(torch.sigmoid(self.gate(x)) * up)
        return (y + up[..., :8] if self.leak else y,)


@pytest.mark.parametrize("leak", [False, True])
def test_a_producer_that_something_else_reads_cannot_fold(leak):
    groups = find_topology(_Gated(leak), [{"x": torch.randn(2, 8)}]).groups
    (group,) = [group for group in groups if group.key == "down"]
    assert group.foldable is not leak
    assert group.producer == (None if leak else "up")


@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_that_a_residual_reads_cannot_fold(residual):
    (group,) = find_topology(_Block(residual), [{"x": torch.randn(2, 8)}]).groups
    assert group.producer == "norm"
    assert bool(group.fold_problem) is residual


class _Apart(nn.Module):
    """Two Linears of one input; code of its own reads the weight of one, `also` called or not."""

    def __init__(self, also):
        super().__init__()
        self.apart, self.other, self.also = nn.Linear(8, 8), nn.Linear(8, 8), also

    def forward(self, x):
        y = x @ self.apart.weight.T + self.other(x)
        return (y + self.apart(x) if self.also else y,)


@pytest.mark.parametrize("also", [False, True])
def test_a_linear_whose_weight_other_code_reads_stays_float(also):
    topology = find_topology(_Apart(also), [{"x": torch.randn(2, 8)}])
    assert topology.readers == ["other"]
    assert topology.float_reasons == {"apart": "weight read by other code than its own"}


class _ReadTwice(nn.Module):
    """up and down; code of its own reads the weight of up besides."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return (self.down(self.up(x).relu()) + self.up.weight.sum(),)


def test_a_linear_whose_weight_other_code_reads_takes_no_scale():
    (group,) = find_topology(_ReadTwice(), [{"x": torch.randn(2, 8)}]).groups
    assert (group.key, group.producer) == ("down", None)


class _Router(nn.Linear):
    """As transformers writes some: a Linear whose forward chooses experts."""

    def forward(self, x):
        return super().forward(x).topk(2)


class _Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class _OwnWay(nn.Linear):
    """As Falcon's: the same product, written otherwise."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class _Derived(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.own_way = nn.Linear(8, 8), _OwnWay(8, 8)
        self.router, self.scaled = _Router(8, 8), _Scaled(8, 8)

    def forward(self, x):
        weights, _ = self.router(x)
        return (self.plain(x) + self.own_way(x) * weights.sum() + self.scaled(x),)


def test_a_linear_whose_class_does_other_than_a_linear_stays_float():
    topology = find_topology(_Derived(), [{"x": torch.randn(2, 8)}])
    assert topology.readers == ["plain", "own_way"]
    reason = "its class does other than a Linear"
    assert topology.float_reasons == {"router": reason, "scaled": reason}


def test_a_convolution_is_no_stack_of_experts():
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "linear": nn.Linear(4, 4)})
    model.experts = nn.Parameter(torch.zeros(2, 4, 4))
    assert quantizable_linears(model)[1] == {"experts": "experts stacked in one weight"}


def test_a_tied_head_is_read_by_the_embedding_and_may_be_int8(batches):
    model = tiny_model("llama")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "lm_head" in find_topology(model, batches[:1], lm_head=True).readers


def test_linears_whose_int32_sums_could_overflow_stay_float():
    model = nn.ModuleDict({"just": nn.Linear(64900, 1), "wide": nn.Linear(65000, 1)})
    linears, reasons = quantizable_linears(model)
    assert set(linears) == {"just"}  # 66,256 columns with its copies, where 66,311 may be
    assert "overflow" in reasons["wide"]


def test_a_model_without_linears_is_refused():
    with pytest.raises(UnsupportedModelError, match="no Linear"):
        quantizable_linears(nn.Sequential(nn.LayerNorm(4)))


class _Experts(nn.Module):
    """Two Linears that share the rows, as experts do."""

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])

    def forward(self, input_ids):
        x = torch.nn.functional.one_hot(input_ids, 8).float()
        rows = [x[input_ids % 2 == expert] for expert in range(2)]
        outputs = [self.down[e](self.up[e](rows[e]).relu()) for e in range(2)]
        return (torch.cat(outputs),)


def test_an_expert_without_tokens_waits_for_a_text_that_reaches_it():
    texts = [{"input_ids": torch.tensor([ids])} for ids in ([0, 2, 4], [1, 3, 5])]
    torch.manual_seed(0)
    groups = find_topology(_Experts(), texts).groups
    assert {group.key: group.producer for group in groups} == {
        "up.0": None,
        "down.0": "up.0",
        "up.1": None,
        "down.1": "up.1",
    }
