"""Tokens that a model does not embed are refused, not looked up."""

from types import SimpleNamespace

import pytest
import torch

from ipex_sq.data.documents import Document
from ipex_sq.data.reviews import Review
from ipex_sq.errors import DataError
from ipex_sq.evaluation.classification import predict
from ipex_sq.evaluation.lambada import evaluate_lambada
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.classifier import Classifier
from ipex_sq.models.loading import load_model
from ipex_sq.models.tiny import VOCABULARY, tiny_model
from ipex_sq.models.vocabulary import check_token_ids


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY + 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    tiny_model("llama", outliers=False).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=f"has {VOCABULARY + 1} tokens, its model {VOCABULARY}"):
        load_model(str(tmp_path))


@pytest.fixture
def extended(tokenizer):
    """A tokenizer with tokens for which the model was not resized: fine where no text has them."""
    import copy

    found = copy.deepcopy(tokenizer)
    names = [f"<extra{number}>" for number in range(VOCABULARY)]
    found.add_special_tokens({"additional_special_tokens": names})
    return found


BEYOND = f"the cat sat <extra{VOCABULARY - 1}> on"


def test_added_tokens_are_refused_where_a_text_has_them(extended, tmp_path):
    tiny_model("llama", outliers=False).save_pretrained(tmp_path)
    extended.save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    assert evaluate_lambada(model, tokenizer, [Document("the cat sat", " on")]).perplexity > 0
    with pytest.raises(DataError, match=f"the model knows 0 to {VOCABULARY - 1}"):
        evaluate_lambada(model, tokenizer, [Document(BEYOND, " the")])


def test_calibration_and_classifiers_refuse_them_too(extended):
    ids = torch.tensor([extended(BEYOND)["input_ids"]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(DataError, match="another model's"):
        calibrate(tiny_model("llama", outliers=False), [batch])
    classifier = Classifier(tiny_model("bert", outliers=False), extended)
    with pytest.raises(DataError, match="another model's"):
        predict(classifier, [Review(BEYOND, 0)])


def test_models_that_embed_no_tokens_are_left_alone():
    check_token_ids(torch.nn.Linear(1, 1), 10**6)
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace()
    check_token_ids(model, 10**6)
