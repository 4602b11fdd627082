"""Which models are found to need the first token alone, and which are not."""

import copy

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from ipex_sq.models import first_token
from ipex_sq.models.first_token import find_first_token, give_values
from ipex_sq.models.tiny import DECODERS, tiny_model


class Head(transformers.BertForSequenceClassification):
    """BERT with `pooled` in the place of its pooler; its name does not end as a classifier's."""

    def forward(self, input_ids, attention_mask=None, **options):
        hidden = self.bert(input_ids, attention_mask=attention_mask, **options)[0]
        return (self.classifier(self.pooled(hidden, attention_mask)),)


class AllTokensForSequenceClassification(Head):
    def pooled(self, hidden, mask):
        return hidden.mean(dim=1)


class NanAloneForSequenceClassification(Head):
    """Large numbers change nothing, NaN does."""

    def pooled(self, hidden, mask):
        return hidden[:, 0] + 0.0 * hidden.mean(dim=1)


class LargeAloneForSequenceClassification(Head):
    """NaN changes nothing, large numbers do."""

    def __init__(self, config):
        super().__init__(config)
        last = self.bert.encoder.layer[-1]
        last.attention.output.LayerNorm = last.output.LayerNorm = nn.Identity()

    def pooled(self, hidden, mask):
        return hidden[:, 0] + (hidden[:, 1:] > 100.0).any()


class LastTokenForSequenceClassification(Head):
    def pooled(self, hidden, mask):
        return hidden[:, -1]


class FirstRealTokenForSequenceClassification(Head):
    """The first token unless texts are padded on the left."""

    def pooled(self, hidden, mask):
        return hidden[torch.arange(len(hidden)), mask.argmax(dim=1)]


class CountingForSequenceClassification(Head):
    """Reads one token only, but counts the others."""

    def pooled(self, hidden, mask):
        return hidden[:, 0] * hidden.shape[1]


class FirstTokenForSequenceClassification(Head):
    def pooled(self, hidden, mask):
        return hidden[:, 0]


class MixingForSequenceClassification(FirstTokenForSequenceClassification):
    """Its last MLP mixes tokens, so that the first depends on all once more."""

    def __init__(self, config):
        super().__init__(config)
        self.bert.encoder.layer[-1].intermediate = Mixing(config)


class Mixing(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states):
        return torch.relu(self.dense(hidden_states.roll(1, dims=1)))


OTHERS = [
    AllTokensForSequenceClassification,
    NanAloneForSequenceClassification,
    LargeAloneForSequenceClassification,
    LastTokenForSequenceClassification,
    FirstRealTokenForSequenceClassification,
    CountingForSequenceClassification,
    MixingForSequenceClassification,
]


CONFIGS = {family: tiny_model(family).config for family in ("bert", "llama", "gpt2")}


def _of_class(kind, family="bert", **settings):
    config = copy.deepcopy(CONFIGS[family])
    config.update(settings)
    torch.manual_seed(0)
    return kind(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_the_tail_is_found_behind_the_attention(family, dtype):
    model = tiny_model(family).to(dtype)
    found = find_first_token(model)
    assert found is not None
    last = model.base_model.encoder.layer[-1]
    assert found.layer is last
    assert found.tail is last.attention.output
    behind = [last.attention.output.dense, last.intermediate.dense, last.output.dense]
    outside = {id(item) for item in model.base_model.encoder.modules()}
    heads = [item for item in model.modules() if isinstance(item, nn.Linear)]
    wanted = behind + [item for item in heads if id(item) not in outside]
    if family == "electra":
        wanted.remove(model.electra.embeddings_project)  # before the layers
    assert set(found.linears) == set(wanted)


# DistilBERT adds the residual in the layer itself, after an attention that projects its output: no
# module takes both tensors. So does ALBERT, in the attention, and it runs one layer several times.
@pytest.mark.parametrize("family", ["distilbert", "albert", *DECODERS])
def test_other_families_are_left_alone(family):
    assert find_first_token(tiny_model(family)) is None


@pytest.mark.parametrize(
    ("kind", "family"),
    [("LlamaForSequenceClassification", "llama"), ("GPT2ForSequenceClassification", "gpt2")],
)
@pytest.mark.parametrize("padding", [1, None])  # without one, the head refuses several texts
def test_decoders_that_classify_are_left_alone(kind, family, padding):
    model = _of_class(getattr(transformers, kind), family, pad_token_id=padding)
    assert find_first_token(model) is None


def test_other_tasks_are_left_alone():
    """It reads the first token too, but what else its outputs are for is not known."""
    assert find_first_token(_of_class(transformers.BertForNextSentencePrediction)) is None


def test_a_head_of_ones_own_that_reads_the_first_token_is_found():
    assert find_first_token(_of_class(FirstTokenForSequenceClassification)) is not None


@pytest.mark.parametrize("kind", OTHERS)
def test_heads_and_layers_that_read_more_are_left_alone(kind):
    assert find_first_token(_of_class(kind)) is None


def test_nothing_of_the_search_is_left_behind():
    model = tiny_model("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    assert find_first_token(model) is not None
    assert not any(item._forward_hooks or item._forward_pre_hooks for item in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "kind", [FirstTokenForSequenceClassification, AllTokensForSequenceClassification]
)
def test_a_model_without_weights_is_told_by_its_structure(kind):
    real = find_first_token(_of_class(kind))
    with init_empty_weights(include_buffers=False):
        model = _of_class(kind)
    give_values(model)
    found = find_first_token(model)
    assert (found and found.path) == (real and real.path)
    assert found is None or len(found.linears) == len(real.linears)


def test_a_model_that_short_texts_change_is_left_alone():
    """BigBird runs other code on long texts, which cuts rows off; short ones exchange modules."""
    config = transformers.BigBirdConfig(**{**CONFIGS["bert"].to_dict(), "model_type": "big_bird"})
    assert config.attention_type == "block_sparse"
    model = transformers.BigBirdForSequenceClassification(config).eval()
    before = list(model.modules())
    assert find_first_token(model) is None
    assert list(model.modules()) == before
    config.attention_type = "original_full"
    model = transformers.BigBirdForSequenceClassification(config).eval()
    assert find_first_token(model) is not None


def test_an_error_of_the_model_is_not_ours(monkeypatch):
    def fails(model, batch):
        raise RuntimeError("no such model")

    monkeypatch.setattr(first_token, "run_model", fails)
    assert find_first_token(tiny_model("bert")) is None
