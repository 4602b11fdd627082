"""A scales file keeps every bit and is refused for another model."""

import json

import pytest
import torch
from conftest import TEXTS

from ipex_sq.backends.quantization import plan
from ipex_sq.config import QuantConfig
from ipex_sq.errors import CheckpointError
from ipex_sq.models.calibration import calibrate, stats_from_scales
from ipex_sq.models.identity import model_sha256, tokenizer_sha256
from ipex_sq.models.tiny import tiny_model, tiny_tokenizer
from ipex_sq.recipe.plan_files import plan_to_json
from ipex_sq.recipe.scales_files import scales_from_json, scales_to_json


@pytest.fixture(scope="module")
def written(batches, tokenizer):
    model = tiny_model("bert")
    stats = calibrate(model, batches, {"dataset": "test"}, samples=False)
    identities = (
        {"name": "tiny", "sha256": model_sha256(model)},
        {"sha256": tokenizer_sha256(tokenizer)},
    )
    return stats, scales_to_json(stats, *identities)


def test_every_bit_survives(written):
    stats, text = written
    scales = scales_from_json(text, "file")
    for name, item in stats.linears.items():
        assert torch.equal(scales.linears[name].minimum, item.minimum)
        assert torch.equal(scales.linears[name].maximum, item.maximum)
    assert scales.source == stats.source
    assert scales.source["dataset"] == "test"


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 0.8])
def test_one_file_gives_the_plan_of_a_calibration_for_every_alpha(written, alpha, tokenizer):
    stats, text = written
    model, config = tiny_model("bert"), QuantConfig(alpha=alpha, backend="reference")
    read = stats_from_scales(model, scales_from_json(text, "file"), tokenizer)
    assert plan_to_json(plan(model, read, config)) == plan_to_json(plan(model, stats, config))


def test_another_model_or_tokenizer_is_refused(written, tokenizer):
    scales = scales_from_json(written[1], "file")
    with pytest.raises(CheckpointError, match="another model"):
        stats_from_scales(tiny_model("bert", seed=1), scales, tokenizer)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        stats_from_scales(tiny_model("bert"), scales, tiny_tokenizer(TEXTS[:2]))


def test_another_head_is_accepted(written, tokenizer):
    """Statistics of the body do not depend on it."""
    model = tiny_model("bert")
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    stats_from_scales(model, scales_from_json(written[1], "file"), tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "no scales file"),
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.pop("linears"), "damaged"),
        (lambda d: next(iter(d["linears"].values())).update(max=[-9.0] * 64), "contradict"),
        (lambda d: next(iter(d["linears"].values())).update(absmax=[0.5] * 64), "contradict"),
        (lambda d: next(iter(d["linears"].values())).pop("min"), "damaged"),
    ],
)
def test_a_damaged_file_is_refused(written, change, message):
    document = json.loads(written[1])
    change(document)
    with pytest.raises(CheckpointError, match=message):
        scales_from_json(json.dumps(document), "file")
    with pytest.raises(CheckpointError, match="no JSON"):
        scales_from_json(written[1][:-20], "file")
