"""Only causal language models are scored and calibrated as such."""

import pytest
from transformers import (
    AutoConfig,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ReformerConfig,
    T5Config,
)

from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.kinds import check_causal
from ipex_sq.models.loading import float_skeleton, load_model
from ipex_sq.models.sizes import named_size
from ipex_sq.models.tiny import tiny_model

CAUSAL = [
    GPT2Config(architectures=["GPT2LMHeadModel"]),
    GPT2Config(),
    LlamaConfig(architectures=["LlamaForCausalLM"]),
    LlamaConfig(architectures=["LlamaModel"]),
    LlamaConfig(),
    BertConfig(architectures=["BertLMHeadModel"], is_decoder=True),
    BartConfig(architectures=["BartForCausalLM"], is_encoder_decoder=False, is_decoder=True),
    ReformerConfig(architectures=["ReformerModelWithLMHead"], is_decoder=True),
    AutoConfig.for_model("gemma3", architectures=["Gemma3ForConditionalGeneration"]),
]
OTHERS = [
    (BertConfig(architectures=["BertForSequenceClassification"]), "BertForSequenceClassification"),
    (BertConfig(architectures=["BertModel"]), "BertModel"),
    (BertConfig(architectures=["BertLMHeadModel"]), "BertLMHeadModel"),
    (BertConfig(), "an encoder"),
    (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "LlamaForSequence"),
    (LlamaConfig(architectures="LlamaForTokenClassification"), "LlamaForToken"),
    (BartConfig(architectures=["BartForConditionalGeneration"]), "encoder-decoder"),
    (T5Config(), "encoder-decoder"),
]


@pytest.mark.parametrize("config", CAUSAL, ids=lambda item: f"{item.model_type}")
def test_language_models(config):
    check_causal(config, "this")


@pytest.mark.parametrize(("config", "what"), OTHERS, ids=lambda item: item if item is str else "")
def test_others_are_refused_by_name(config, what):
    with pytest.raises(UnsupportedModelError, match=f"^this is .*{what}"):
        check_causal(config, "this")


def test_a_classifier_is_sent_to_its_command(tmp_path, tokenizer):
    tiny_model("bert", outliers=False).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    for read in (load_model, float_skeleton, lambda name: named_size(name, "causal-lm")):
        with pytest.raises(UnsupportedModelError, match="python -m ipex_sq evaluate"):
            read(str(tmp_path / "bert"))
