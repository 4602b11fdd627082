import copy

import pytest
from conftest import TEXTS

from ipex_sq.backends.quantization import quantize
from ipex_sq.backends.reference import ReferenceBackend
from ipex_sq.config import QuantConfig, parse_drop
from ipex_sq.data.calibration import calibration_batches
from ipex_sq.data.documents import Document
from ipex_sq.errors import ConfigError
from ipex_sq.evaluation.lambada import evaluate_lambada
from ipex_sq.evaluation.max_drop import Search, plan_within_drop
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.folding import apply_smoothing, correct_biases
from ipex_sq.models.tiny import tiny_model

DOCUMENTS = [
    Document(context, f" {word}") for context, word in (text.rsplit(" ", 1) for text in TEXTS)
]


@pytest.fixture(scope="module")
def search(tokenizer):
    model = tiny_model("llama")
    stats = calibrate(model, calibration_batches(DOCUMENTS, tokenizer))
    return Search(model, tokenizer, DOCUMENTS, stats)


def _out_of_static(search, max_drop):
    config = QuantConfig(alpha=None, max_drop=max_drop, backend="reference")
    decided = plan_within_drop(search, config, ReferenceBackend())
    return len(decided.int8_names) - len(decided.names("static_int8")), decided


@pytest.mark.parametrize("ratio", [10.0, 1.005, 1.0005])
def test_the_plan_keeps_the_bound(search, ratio):
    """The last one needs layers out of static int8; the first none."""
    count, decided = _out_of_static(search, f"{ratio}x")
    assert ratio == 1.005 or (count > 0) is (ratio < 1.005)
    model = copy.deepcopy(search.model)
    decided, _ = apply_smoothing(model, decided, search.stats.example)
    correct_biases(model, decided)
    int8 = ReferenceBackend().lower(model, decided, search.stats.example, "fp32")
    # The search measures with the int8 kernels: only rounding ties differ.
    assert _perplexity(search, int8) <= 1.0005 * ratio * _perplexity(search, search.model)


def _perplexity(search, model):
    return evaluate_lambada(model, search.tokenizer, DOCUMENTS).perplexity


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
