import math
import random

import pytest
import torch
from conftest import TEXTS

from ipex_sq.config import EvaluationConfig
from ipex_sq.data.documents import Document, split_last_word
from ipex_sq.errors import DataError, NumericalCheckError
from ipex_sq.evaluation.lambada import (
    LambadaResult,
    encode_documents,
    evaluate_lambada,
)
from ipex_sq.evaluation.pairing import paired_difference
from ipex_sq.models.body import logits_at
from ipex_sq.models.tiny import DECODERS, tiny_model

DOCUMENTS = [split_last_word(text, "test") for text in TEXTS] + [
    Document("the cat sat on", " the old mat"),
    Document("he", " went"),
]


def _by_hand(model, tokenizer, document):
    """One document, no batch, no padding, all logits."""
    ids = tokenizer(document.text)["input_ids"]
    context = tokenizer(document.context)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False)[0][0].double()
    targets = ids[len(context) :]
    logs = logits.log_softmax(-1)[len(context) - 1 : -1]
    greedy = [int(row.argmax()) == target for row, target in zip(logs, targets, strict=True)]
    log = sum(float(row[target]) for row, target in zip(logs, targets, strict=True))
    return all(greedy), greedy[-1], log


@pytest.mark.parametrize("family", DECODERS)
def test_equals_the_definition_one_document_at_a_time(family, tokenizer):
    model = tiny_model(family)
    result = evaluate_lambada(model, tokenizer, DOCUMENTS, EvaluationConfig(batch_size=3))
    wanted = [_by_hand(model, tokenizer, document) for document in DOCUMENTS]
    assert list(result.word_correct) == [item[0] for item in wanted]
    assert list(result.token_correct) == [item[1] for item in wanted]
    assert result.log_probability == pytest.approx([item[2] for item in wanted], abs=1e-4)


def test_neither_batch_size_nor_order_changes_a_score(tokenizer):
    model = tiny_model("llama")
    one = evaluate_lambada(model, tokenizer, DOCUMENTS, EvaluationConfig(batch_size=1))
    shuffled = list(range(len(DOCUMENTS)))
    random.Random(0).shuffle(shuffled)
    mixed = evaluate_lambada(
        model, tokenizer, [DOCUMENTS[i] for i in shuffled], EvaluationConfig(batch_size=5)
    )
    assert [one.word_correct[i] for i in shuffled] == list(mixed.word_correct)
    assert [one.log_probability[i] for i in shuffled] == pytest.approx(
        mixed.log_probability, abs=1e-4
    )


def test_perplexity_and_standard_error():
    result = LambadaResult((True, False, True, True), (True,) * 4, (-1.0, -2.0, -3.0, -2.0))
    assert result.perplexity == pytest.approx(math.exp(2.0))
    assert result.last_word_accuracy == 0.75
    spread = torch.tensor([1.0, 0.0, 1.0, 1.0]).std().item() / 2
    assert result.stderr == pytest.approx(spread)


def test_paired_difference_counts_documents():
    logs = (-1.0,) * 4
    base = LambadaResult((True, True, False, False), (True,) * 4, logs)
    new = LambadaResult((True, False, False, True), (True,) * 4, logs)
    difference = paired_difference(new, base)
    assert (difference.delta, difference.gained, difference.lost) == (0.0, 1, 1)
    spread = torch.tensor([0.0, -1.0, 0.0, 1.0]).std().item() / 2
    assert difference.stderr == pytest.approx(100 * spread)


def test_the_head_sees_only_the_rows_asked_for(unseen):
    model, picks = tiny_model("opt"), torch.tensor([0, 30, 191])
    with torch.no_grad():
        everything = model(**unseen, use_cache=False)[0]
        with logits_at(model, picks):
            picked = model(**unseen, use_cache=False)[0]
    assert picked.shape[:2] == (1, 3)
    torch.testing.assert_close(picked[0], everything.reshape(192, -1)[picks])
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_too_long_a_document_is_refused_before_the_work(tokenizer):
    long = Document(" ".join(["cat"] * 40), " mat")
    with pytest.raises(DataError, match="41 tokens, the model has 32"):
        encode_documents([long], tokenizer, 32)


def test_nothing_to_evaluate_is_refused(tokenizer):
    with pytest.raises(DataError, match="no documents"):
        encode_documents([], tokenizer)


def test_logits_that_are_not_finite_are_refused(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericalCheckError, match="not finite"):
        evaluate_lambada(model, tokenizer, DOCUMENTS)
