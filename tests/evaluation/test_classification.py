"""Scores of a tiny classifier: by hand, for any batch size and order, float and int8."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import INT8_BACKENDS, TEXTS
from sklearn import metrics  # lm-eval brings it, the library has no need
from transformers import BertConfig

from ipex_sq.backends.quantization import quantize
from ipex_sq.config import EvaluationConfig, QuantConfig
from ipex_sq.data.calibration import calibration_batches
from ipex_sq.data.reviews import POLARITY, Review
from ipex_sq.errors import DataError, NumericalCheckError
from ipex_sq.evaluation.classification import ClassificationResult, evaluate_classifier, order_of
from ipex_sq.models.classifier import Classifier
from ipex_sq.models.tiny import tiny_model

LONG = " ".join(TEXTS)
REVIEWS = [Review(text, number % 2) for number, text in enumerate([*TEXTS, LONG, "the cat"])]


@pytest.fixture(scope="module")
def classifier(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 128
    return Classifier(tiny_model("bert"), tokenizer)


def _logits(classifier, text, most=128):
    ids = classifier.tokenizer(text, truncation=True, max_length=most, return_tensors="pt")
    with torch.no_grad():
        return classifier.model(input_ids=ids["input_ids"])[0][0]


def test_predictions_are_those_of_each_text_alone(classifier):
    result = evaluate_classifier(classifier, REVIEWS)
    alone = [int(_logits(classifier, review.text).argmax()) for review in REVIEWS]
    assert list(result.predicted) == alone
    assert result.truncated == 0


@pytest.mark.parametrize("backend", [None, *INT8_BACKENDS])
def test_batch_size_and_order_change_nothing(backend, classifier):
    if backend is not None:
        inputs = classifier.inputs
        batches = calibration_batches(REVIEWS[:4], classifier.tokenizer, inputs=inputs)
        config = QuantConfig(alpha=0.5, backend=backend, dtype="fp32")
        model = quantize(tiny_model("bert"), batches, config)
        classifier = replace(classifier, model=model)
    one, many = (
        evaluate_classifier(classifier, REVIEWS, EvaluationConfig(batch_size=size))
        for size in (1, 5)
    )
    turned = evaluate_classifier(classifier, REVIEWS[::-1], EvaluationConfig(batch_size=3))
    assert one.predicted == many.predicted == turned.predicted[::-1]


def test_longer_texts_are_cut_and_counted(classifier):
    result = evaluate_classifier(classifier, REVIEWS, max_length=15)
    lengths = [len(classifier.tokenizer(review.text)["input_ids"]) for review in REVIEWS]
    assert result.truncated == sum(length > 15 for length in lengths) > 0
    assert result.predicted[6] == int(_logits(classifier, LONG, 15).argmax())
    with pytest.raises(DataError, match="more than the 128 positions"):
        evaluate_classifier(classifier, REVIEWS, max_length=129)


def test_token_types_reach_the_model(classifier):
    tokenizer = copy.deepcopy(classifier.tokenizer)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    classifier = replace(classifier, tokenizer=tokenizer)
    seen = []
    handle = classifier.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    with handle:
        evaluate_classifier(classifier, REVIEWS)
    assert seen
    assert all(names >= set(tokenizer.model_input_names) for names in seen)


def test_measures_by_hand():
    result = ClassificationResult((0, 1, 1, 1), (0, 0, 1, 1), 0)
    assert result.accuracy == 0.75
    assert result.confusion_matrix(2) == [[1, 1], [0, 2]]
    assert result.f1(2) == pytest.approx(2 * 2 / (2 * 2 + 1 + 0))
    assert result.f1(3) == pytest.approx((2 / 3 + 0.8) / 2)
    assert result.stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_measures_agree_with_scikit_learn(classes):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.randint(classes - seed % 2, (2, 12), generator=generator).tolist()
        result = ClassificationResult(tuple(pairs[0]), tuple(pairs[1]), 0)
        expected = metrics.confusion_matrix(pairs[1], pairs[0], labels=range(classes))
        assert result.confusion_matrix(classes) == expected.tolist()
        average = "binary" if classes == 2 else "macro"
        f1 = metrics.f1_score(pairs[1], pairs[0], average=average, zero_division=0.0)
        assert result.f1(classes) == pytest.approx(f1, rel=1e-12)


class _Oracle(torch.nn.Module):
    """Knows the right answers; only the order, the names and the number of its classes differ."""

    def __init__(self, classes, answers):
        super().__init__()
        names = dict(enumerate(classes))
        self.config = BertConfig(id2label=names, max_position_embeddings=128)
        self._answers = answers

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(len(input_ids), self.config.num_labels)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            logits[row, self._answers[tuple(ids[mask.bool()].tolist())]] = 1.0
        return (logits,)


def _oracle(classifier, classes, right):
    """`right`: its class for label 0 and for label 1."""
    tokenizer = copy.deepcopy(classifier.tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    answers = {tuple(tokenizer(r.text)["input_ids"]): right[r.label] for r in REVIEWS}
    return Classifier(_Oracle(classes, answers), tokenizer)


NAMED = [replace(review, names=POLARITY) for review in REVIEWS]


@pytest.mark.parametrize(
    ("classes", "right"),
    [
        (["NEGATIVE", "POSITIVE"], (0, 1)),
        (["POSITIVE", "NEGATIVE"], (1, 0)),
        (["pos", "neg"], (1, 0)),
        (["LABEL_0", "LABEL_1"], (0, 1)),
        (["0", "1"], (0, 1)),
    ],
)
def test_classes_are_found_by_the_names_of_the_labels(classes, right, classifier):
    oracle = _oracle(classifier, classes, right)
    result = evaluate_classifier(oracle, NAMED)
    assert result.accuracy == 1.0
    assert result.f1(2) == 1.0
    assert order_of(oracle, NAMED) == right
    # Labels without names are indexes of the model's classes.
    assert evaluate_classifier(oracle, REVIEWS).accuracy == float(right == (0, 1))


@pytest.mark.parametrize(
    "classes",
    [
        ["negative", "neutral", "positive"],
        ["LABEL_0", "LABEL_1", "LABEL_2"],
        ["LABEL_1", "LABEL_0"],
        ["ham", "spam"],
        ["negative", "Negated"],
    ],
)
def test_classes_that_are_not_the_labels_are_refused(classes, classifier):
    oracle = _oracle(classifier, classes, (0, len(classes) - 1))
    with pytest.raises(DataError, match=rf"{classes[0]}, .* negative and positive: pass"):
        evaluate_classifier(oracle, NAMED)
    assert evaluate_classifier(oracle, REVIEWS).labels  # by index it can be scored


def test_reviews_with_and_without_names_are_not_mixed(classifier):
    with pytest.raises(DataError, match="evaluate them apart"):
        evaluate_classifier(classifier, [NAMED[0], REVIEWS[1]])


def test_what_cannot_be_scored_is_refused(classifier):
    with pytest.raises(DataError, match="no reviews"):
        evaluate_classifier(classifier, [])
    with pytest.raises(DataError, match="label 2"):
        evaluate_classifier(classifier, [Review("a", 2), Review("b", 0)])
    with pytest.raises(DataError, match="label 1"):
        evaluate_classifier(classifier, [Review("a b", 1)])
    broken = copy.deepcopy(classifier.model)
    with torch.no_grad():
        broken.classifier.bias.fill_(float("nan"))
    with pytest.raises(NumericalCheckError, match="not finite"):
        evaluate_classifier(replace(classifier, model=broken), REVIEWS)
