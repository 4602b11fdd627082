"""`quantize --max_memory` as a user types it."""

import json

import pytest

from ipex_sq.checkpoint.saving import load
from ipex_sq.cli import quantize
from ipex_sq.cli.running import run
from ipex_sq.models.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("float") / "tiny"
    tiny_model("llama").save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def _flags(folder, out, *more):
    few = ["--calib_samples", "8", "--calib-max-tokens", "24", "--dataset", "embedded"]
    return ["--model", str(folder), "--output_dir", str(out), *few, *more]


def test_it_quantizes_and_says_what_it_took(folder, tmp_path, capsys):
    flags = _flags(folder, tmp_path, "--max-memory", "6GiB", "--output", str(tmp_path / "r.json"))
    assert run(quantize.command, flags) == 0
    table, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert "15 Linears in int8" in table
    assert result["int8_linears"] == 15
    assert 0 < result["peak_rss_bytes"] < 6 * 2**30
    assert result["bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "tiny").glob("model*.safetensors")
    )
    assert set(result["seconds"]) == {"topology", "calibrate", "search", "write"}
    model = load(tmp_path / "tiny")
    assert model.quant_plan.calibration["dataset"] == "embedded"
    assert model.made_from["model"] == str(folder)


def test_alpha_none_and_a_number(folder, tmp_path, capsys):
    for name, flags, alpha in (("a", ["--no-sq"], None), ("b", ["--alpha", "0.5"], 0.5)):
        assert run(quantize.command, _flags(folder, tmp_path / name, "--resume", *flags)) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["alpha"] == alpha


@pytest.mark.parametrize(
    ("flag", "mode"), [("--quant_lm_head", "dynamic_int8"), ("--no-quant-lm-head", "float")]
)
def test_the_head_too_or_not(flag, mode, folder, tmp_path, capsys):
    flags = _flags(folder, tmp_path, "--max_memory", "6GiB", flag)
    assert run(quantize.command, flags) == 0
    int8 = json.loads(capsys.readouterr().out.splitlines()[-1])["int8_linears"]
    assert int8 == (15 if mode == "dynamic_int8" else 14)
    assert load(tmp_path / "tiny").quant_plan.linears["lm_head"].mode == mode


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_memory", "1MiB"], "needs about"),
        (["--max_memory", "much"], "8GiB, 500MB or in bytes"),
        (["--max_memory", "8GiB", "--no_sq", "--alpha", "0.5"], "leave --no_sq out"),
        (["--max_memory", "8GiB", "--backend", "ipex"], "--backend native, not ipex"),
        (["--max_memory", "8GiB", "--model", "nowhere"], "not a folder with config.json"),
        (["--max_memory", "8GiB", "--act_scales_path", "x.json"], "unrecognized"),
        (["--resume", "--max_memory", "8GiB", "--calib_samples", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, flags, message):
    assert run(quantize.command, _flags(folder, tmp_path / "out", *flags)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "tiny").exists()


def test_help_of_either_form(capsys):
    for flags in (["--help"], ["--max_memory", "8GiB", "--help"]):
        with pytest.raises(SystemExit):
            run(quantize.command, flags)
    first, second = capsys.readouterr().out.split("usage:")[1:]
    assert "--max_memory 8GiB --help" in first
    assert "--resume" in second
