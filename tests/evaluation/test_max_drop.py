import copy

import pytest
import torch
from conftest import TEXTS

from ipex_sq.backends.quantization import quantize
from ipex_sq.backends.reference import ReferenceBackend
from ipex_sq.config import QuantConfig, parse_drop
from ipex_sq.data.calibration import calibration_batches
from ipex_sq.data.documents import Document, TextSet
from ipex_sq.errors import ConfigError
from ipex_sq.evaluation.experiment import HELD_OUT, hold_out
from ipex_sq.evaluation.max_drop import Search, plan_within_drop
from ipex_sq.evaluation.next_tokens import predict_tokens
from ipex_sq.evaluation.pairing import paired_difference
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.folding import apply_smoothing
from ipex_sq.models.rounding import round_weights
from ipex_sq.models.tiny import tiny_model

DOCUMENTS = [
    Document(context, f" {word}") for context, word in (text.rsplit(" ", 1) for text in TEXTS)
]


@pytest.fixture(scope="module")
def search(tokenizer):
    """Measured on text drawn from the model itself, which it predicts better than int8 does."""
    model = tiny_model("llama")
    stats = calibrate(model, calibration_batches(DOCUMENTS, tokenizer))
    torch.manual_seed(0)
    prompts = torch.arange(2, 66)[:, None]
    with torch.no_grad():
        ids = model.generate(prompts, max_new_tokens=40, do_sample=True, top_k=0)
    return Search(model, stats, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


def _out_of_static(search, max_drop):
    config = QuantConfig(alpha=None, max_drop=max_drop, backend="reference")
    decided = plan_within_drop(search, config, ReferenceBackend())
    return len(decided.int8_names) - len(decided.names("static_int8")), decided


def _int8(search, decided):
    model = copy.deepcopy(search.model)
    decided, _ = apply_smoothing(model, decided, search.stats.example)
    round_weights(model, decided, search.stats)
    return ReferenceBackend().lower(model, decided, search.stats.example, "fp32")


def _scores(search, model):
    return predict_tokens(model, search.held_out)


@pytest.mark.parametrize("ratio", [10.0, 1.002, 1.0005])
def test_the_plan_keeps_the_bound(search, ratio):
    """The last one needs layers out of static int8; the first none."""
    count, decided = _out_of_static(search, f"{ratio}x")
    assert ratio == 1.002 or (count > 0) is (ratio < 1.002)
    fp32 = _scores(search, search.model)
    # The search measures with the int8 kernels: only rounding ties differ.
    assert _scores(search, _int8(search, decided)).perplexity <= 1.0002 * ratio * fp32.perplexity


def test_points_are_of_next_token_accuracy(search):
    _, decided = _out_of_static(search, "0.5")
    scores, fp32 = _scores(search, _int8(search, decided)), _scores(search, search.model)
    assert paired_difference(scores, fp32).delta >= -0.6


def test_layers_left_out_say_why(search):
    count, decided = _out_of_static(search, "1.0005x")
    assert decided.reasons("dynamic_int8") == {"to meet --max_drop": count}


@pytest.mark.parametrize("text", ["", "abc", "-1", "0.9x", "nan", "infx"])
def test_nonsense_is_refused(text):
    with pytest.raises(ConfigError, match="--max_drop takes"):
        QuantConfig(max_drop=text)


def test_both_units():
    assert parse_drop("0.5").points == 0.5
    assert parse_drop("1.02x").ratio == 1.02


def test_quantize_alone_has_no_documents_to_measure_on(batches):
    with pytest.raises(ConfigError, match="documents"):
        quantize(tiny_model("llama"), batches, QuantConfig(max_drop="1", backend="reference"))


def test_the_texts_to_measure_on_are_not_calibrated_on():
    texts = TextSet("file", "file", tuple(DOCUMENTS))
    calibrated, held_out = hold_out(texts)
    assert not set(calibrated.documents) & set(held_out.documents)
    assert {*calibrated.documents, *held_out.documents} == set(DOCUMENTS)
    with pytest.raises(ConfigError, match="at least"):
        hold_out(texts.first(HELD_OUT - 1))
