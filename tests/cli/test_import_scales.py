"""Published activation scales become a scales file, and nothing else does."""

import json

import pytest
import torch
from conftest import TEXTS
from test_commands import fails
from torch import nn

from ipex_sq.backends.quantization import plan, quantize
from ipex_sq.cli import eval_lambada, import_scales
from ipex_sq.cli.running import run
from ipex_sq.config import QuantConfig
from ipex_sq.errors import CalibrationError
from ipex_sq.models.calibration import calibrate, stats_from_scales
from ipex_sq.models.loading import load_model
from ipex_sq.models.running import run_model
from ipex_sq.models.tiny import tiny_model, tiny_tokenizer
from ipex_sq.recipe.scales_files import scales_from_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("opt") / "model"
    tiny_model("opt").save_pretrained(place)
    tiny_tokenizer(TEXTS).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def published(folder, batches):
    """Gathered as the published files were: every Linear's input, the head's too."""
    model, _ = load_model(str(folder))
    absmax = {}

    def hook_for(name):
        def hook(_module, args):
            seen = args[0].reshape(-1, args[0].shape[-1]).abs().amax(dim=0)
            absmax[name] = torch.maximum(absmax.get(name, seen), seen)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook_for(name))
    with torch.no_grad():
        for batch in batches:
            run_model(model, batch)
    assert "lm_head" in absmax
    return absmax


def _flags(folder, tmp_path, content):
    path = tmp_path / "act_scales.pt"
    torch.save(content, path)
    return [str(path), "--model", str(folder), "--output", str(tmp_path / "out" / "scales.json")]


def test_an_imported_file_smooths_as_a_calibration_does(
    folder, published, tmp_path, capsys, batches, monkeypatch
):
    assert run(import_scales.command, _flags(folder, tmp_path, published)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["linears"], result["left_out"]) == (12, ["lm_head"])
    scales = scales_from_json((tmp_path / "out" / "scales.json").read_text(), "file")
    assert "symmetric" in scales.source["ranges"]
    model, tokenizer = load_model(str(folder))
    stats = stats_from_scales(model, scales, tokenizer)
    for name, item in stats.linears.items():
        assert torch.equal(item.act_absmax, published[name])
        assert torch.equal(item.minimum, -item.maximum)
    monkeypatch.setattr("ipex_sq.models.calibration.calibration_dtype", lambda: torch.float32)
    config = QuantConfig(alpha=0.5, backend="reference")
    gathered = plan(model, calibrate(model, batches, samples=False, hessians=False), config)
    imported = plan(model, stats, config)
    assert imported.calibration["texts"] is None
    for key, item in imported.groups.items():
        torch.testing.assert_close(item.scale, gathered.groups[key].scale, rtol=1e-4, atol=0)
    int8 = quantize(model, stats, config)
    assert run_model(int8, batches[0]).isfinite().all()
    with pytest.raises(CalibrationError, match="needs samples"):
        plan(model, stats, QuantConfig(backend="reference", weight_rounding="nearest"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"model.decoder.layers.0.fc3": torch.ones(64)}, "did you mean 'model.dec"),
        (lambda d: {f"x.{name}": item for name, item in d.items()}, "and 10 more"),
        (lambda d: {name: item[:-1] for name, item in d.items()}, "63 channels where"),
        (lambda d: dict(list(d.items())[2:]), "it lacks 'model.decoder.layers.0"),
        (lambda d: d | {"lm_head": torch.full((64,), float("nan"))}, "'lm_head' is no vector"),
        (lambda d: d | {"lm_head": -torch.ones(64)}, "finite, 0 or more"),
        (lambda d: d | {"lm_head": [1.0]}, "'lm_head' is no vector"),
        (lambda d: list(d.values()), "no dict of tensors"),
        (lambda d: {}, "no dict of tensors"),
        (lambda d: {"lm_head": print}, "more than tensors"),
    ],
)
def test_another_file_is_refused(folder, published, tmp_path, capsys, change, message):
    flags = _flags(folder, tmp_path, change(published))
    assert message in fails(capsys, flags, import_scales.command)
    assert not (tmp_path / "out" / "scales.json").exists()


def test_a_file_that_is_no_torch_file_or_cut_off(folder, published, tmp_path, capsys):
    flags = _flags(folder, tmp_path, published)
    path = tmp_path / "act_scales.pt"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", whole[:4]):
        path.write_bytes(content)
        assert str(path) in fails(capsys, flags, import_scales.command)
    path.unlink()
    assert "cannot be read" in fails(capsys, flags, import_scales.command)


def _lambada(folder, *flags):
    return ["--model_name_or_path", str(folder), "--dataset", "embedded", "--limit", "4", *flags]


def test_eval_lambada_takes_the_file(folder, published, tmp_path, capsys):
    assert run(import_scales.command, _flags(folder, tmp_path, published)) == 0
    capsys.readouterr()
    scales = ["--act-scales-path", str(tmp_path / "out" / "scales.json")]
    flags = _lambada(folder, "--int8", "--sq", "--backend", "native", *scales)
    assert run(eval_lambada.command, flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = result["results"]
    assert (row["alpha"], row["weight_rounding"], row["int8_linears"]) == (0.5, "nearest", 12)
    assert result["calibration"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--act_scales_path belongs to INT8"),
        (["--int8", "--sq", "--alpha", "auto"], "--alpha auto is searched on texts"),
        (["--int8", "--sq", "--weight_rounding", "gptq"], "GPTQ needs texts"),
        (["--int8", "--kl"], "--observer minmax"),
        (["--int8", "--backend", "native"], "cannot be read"),
    ],
)
def test_what_a_file_is_not_enough_for(folder, tmp_path, capsys, flags, message):
    missing = ["--act_scales_path", str(tmp_path / "missing.json")]
    assert message in fails(capsys, _lambada(folder, *flags, *missing), eval_lambada.command)
