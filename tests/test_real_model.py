"""SmolLM2-135M-Instruct on the embedded passages: the claims of README, on a subset."""

import math

import pytest
from conftest import INT8_BACKENDS

from ipex_sq import (
    DataConfig,
    EvaluationConfig,
    QuantConfig,
    calibration_batches,
    evaluate_lambada,
    load_model,
)
from ipex_sq.backends.quantization import quantize_model
from ipex_sq.data.calibration import choose_texts
from ipex_sq.data.lambada import load_lambada
from ipex_sq.models.calibration import calibrate

pytestmark = pytest.mark.real
DOCUMENTS = load_lambada("embedded").documents[:96]


@pytest.fixture(scope="module")
def stats():
    model, tokenizer = load_model()
    texts = load_lambada("embedded", purpose="calibration").documents
    chosen = choose_texts(texts, 64, DataConfig.seed)
    return calibrate(model, calibration_batches(chosen, tokenizer))


@pytest.fixture(scope="module")
def fp32():
    model, tokenizer = load_model()
    return model, tokenizer, evaluate_lambada(model, tokenizer, DOCUMENTS)


@pytest.mark.parametrize("backend", INT8_BACKENDS)
def test_smoothquant_restores_what_plain_int8_loses(backend, stats, fp32):
    _, tokenizer, baseline = fp32
    scores = {}
    for alpha in (None, "auto"):
        model, _ = load_model()
        quantized = quantize_model(model, stats, QuantConfig(alpha=alpha, backend=backend))
        assert quantized.int8_linears == (210 if alpha is None else 211)  # with the head
        scores[alpha] = evaluate_lambada(quantized.model, tokenizer, DOCUMENTS)
    assert scores[None].perplexity > 2 * baseline.perplexity
    assert scores["auto"].perplexity < 1.15 * baseline.perplexity
    # Three standard errors of a paired difference over 96 documents are 8 points.
    assert scores["auto"].last_word_accuracy > baseline.last_word_accuracy - 0.08
    assert scores[None].last_word_accuracy < baseline.last_word_accuracy - 0.08


def _lm_eval(model, tokenizer, batch_size):
    """Accuracy and perplexity of the last word as lm-evaluation-harness computes them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32"
    )
    requests = [
        Instance("loglikelihood", {}, (document.context, document.continuation), index)
        for index, document in enumerate(DOCUMENTS)
    ]
    scored = harness.loglikelihood(requests, disable_tqdm=True)
    accuracy = sum(greedy for _, greedy in scored) / len(scored)
    return accuracy, math.exp(-sum(log for log, _ in scored) / len(scored))


def test_agrees_with_lm_eval_in_fp32(fp32):
    model, tokenizer, ours = fp32
    accuracy, perplexity = _lm_eval(model, tokenizer, 16)
    assert ours.last_word_accuracy == pytest.approx(accuracy, abs=1e-3)
    assert ours.perplexity == pytest.approx(perplexity, rel=1e-3)


def test_lm_eval_runs_our_int8_model(stats):
    model, tokenizer = load_model()
    int8 = quantize_model(model, stats, QuantConfig(backend="native", dtype="fp32")).model
    # One document at a time: with padding, attention differs in its last bits and int8 rounding
    # turns some of that into other levels (0.5 % of perplexity on these documents).
    ours = evaluate_lambada(int8, tokenizer, DOCUMENTS, EvaluationConfig(batch_size=1))
    accuracy, perplexity = _lm_eval(int8, tokenizer, 1)
    assert ours.last_word_accuracy == pytest.approx(accuracy, abs=1e-3)
    assert ours.perplexity == pytest.approx(perplexity, rel=1e-3)
