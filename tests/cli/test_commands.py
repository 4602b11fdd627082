"""The scripts as a user runs them: one line and exit 2 for bad input, JSON last for good."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import INT8_BACKENDS, TEXTS

from ipex_sq.backends.native import NativeBackend
from ipex_sq.cli import benchmark, eval_lambada, quantize, sensitivity
from ipex_sq.cli.running import run
from ipex_sq.config import DataConfig, QuantConfig
from ipex_sq.models.tiny import tiny_model, tiny_tokenizer
from ipex_sq.report import markdown
from ipex_sq.resources import by_core


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and two text files."""
    place = tmp_path_factory.mktemp("inputs")
    tiny_model("llama").save_pretrained(place / "model")
    tiny_tokenizer(TEXTS).save_pretrained(place / "model")
    write(place / "evaluate.jsonl", TEXTS[:3])
    write(place / "calibrate.jsonl", TEXTS[3:])
    return place


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def base_flags(folder):
    return [
        "--model_name_or_path", str(folder / "model"),
        "--dataset", str(folder / "evaluate.jsonl"),
        "--calib_dataset", str(folder / "calibrate.jsonl"),
        "--calib_samples", "3",
    ]  # fmt: skip


def fails(capsys, flags, command=eval_lambada.command):
    """Run, expect exit 2 and exactly one line on stderr; return it."""
    assert run(command, flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


BAD_FLAGS = [
    (["--int8", "--sq", "--alpha", "1.5"], "between 0 and 1"),
    (["--int8", "--sq", "--alpha", "nan"], "between 0 and 1"),
    (["--int8", "--sq", "--alpha", "foo"], "number from 0 to 1, 'auto'"),
    (["--sq"], "add --int8"),
    (["--int8", "--alpha", "0.5"], "add --int8 --sq"),
    (["--kl"], "add --int8"),
    (["--weight_rounding", "gptq"], "add --int8"),
    (["--activations", "dynamic"], "--activations belongs to INT8"),
    (["--int8", "--percentile", "99"], "belongs to --observer percentile"),
    (["--int8", "--max_drop", "1.02x", "--kl"], "goes with --observer minmax"),
    (["--int8", "--backend", "natve"], "did you mean 'native'"),
    (["--compare", "--backend", "native,ipx"], "did you mean 'ipex'"),
    (["--int8", "--backend", "native,ipex"], "--compare"),
    (["--compare", "--int8"], "leave --int8"),
    (["--batch_size", "0"], "batch_size must be at least 1"),
    (["--seed", "-1"], "whole number from 0"),
    (["--seed", "99999999999999999999"], "whole number from 0"),
    (["--limit", "x"], "--limit"),
    (["--bogus"], "--bogus"),
    (["--dtype", "fp8"], "--dtype"),
    (["--output_dir", "here"], "add --int8"),
    (["--dataset", "lambda"], "did you mean 'lambada'"),
    (["--dataset", "missing.jsonl"], "no such file"),
]


@pytest.mark.parametrize(
    ("flags", "message"), BAD_FLAGS, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_bad_flags(flags, message, folder, capsys):
    keep = [] if "--dataset" in flags else base_flags(folder)
    assert message in fails(capsys, [*keep, *flags])


def test_what_a_backend_cannot_do_is_refused_before_any_model_is_loaded(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(NativeBackend, "rounds_tokens", False)
    monkeypatch.setattr("ipex_sq.evaluation.experiment.load_model", lambda *_a, **_k: 1 / 0)
    flags = [*base_flags(folder), "--compare", "--backend", "reference,native"]
    assert "rounds per tensor only" in fails(capsys, [*flags, "--activations", "mixed"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine text"}\n{"text": }\n', "bad.jsonl:2: not JSON"),
        ('{"text": ""}\n', "bad.jsonl:1: the text is empty"),
        ('{"text": "word"}\n', "bad.jsonl:1: the text has one word"),
        ("", "no documents"),
        (json.dumps({"text": " ".join(["cat"] * 200)}) + "\n", "the model has 128 positions"),
    ],
)
def test_bad_texts(content, message, folder, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    flags = ["--model_name_or_path", str(folder / "model"), "--dataset", str(path)]
    assert message in fails(capsys, flags)


def test_a_document_that_cannot_be_scored_is_refused_before_calibration(
    folder, tmp_path, capsys, monkeypatch
):
    for name in ("calibrate", "quantize_model"):
        monkeypatch.setattr(f"ipex_sq.evaluation.runs.{name}", lambda *_a, **_k: 1 / 0)
    write(tmp_path / "last.jsonl", [*TEXTS[:2], " ".join(["cat"] * 200)])
    flags = [*base_flags(folder), "--int8", "--backend", "native"]
    flags[flags.index("--dataset") + 1] = str(tmp_path / "last.jsonl")
    line = fails(capsys, flags)
    assert "document 3 has 200 tokens, the model has 128 positions" in line


def test_rows_used_twice(folder, capsys):
    flags = base_flags(folder)
    flags[5] = flags[3]
    line = fails(capsys, [*flags, "--int8", "--backend", "native"])
    assert "also evaluation rows" in line


def test_too_few_calibration_texts(folder, capsys):
    flags = [*base_flags(folder), "--int8", "--backend", "native"]
    flags[flags.index("3")] = "30"
    assert "asks for 30 texts" in fails(capsys, flags)


def test_a_folder_without_config_and_an_unknown_model(folder, tmp_path, capsys, monkeypatch):
    assert "no config.json" in fails(capsys, ["--model_name_or_path", str(tmp_path)])
    for module in ("loading", "failures"):
        monkeypatch.setattr(
            f"ipex_sq.models.{module}.hub_problem", lambda: "no network in this test"
        )
    flags = [*base_flags(folder), "--model_name_or_path", "nobody/no-such-model"]
    line = fails(capsys, flags)
    assert "no network in this test" in line
    assert "local folder" in line


def test_unreachable_hub_data_set(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("ipex_sq.data.hub_sets.hub_problem", lambda: "no network in this test")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert "neither reachable nor cached" in fails(capsys, ["--dataset", "lambada_openai"])


def _broken_copy(folder, tmp_path, change):
    shutil.copytree(folder / "model", tmp_path / "model")
    model = tiny_model("llama")
    with torch.no_grad():
        change(model)
    model.save_pretrained(tmp_path / "model")
    return ["--model_name_or_path", str(tmp_path / "model")]


def test_weights_that_are_not_finite(folder, tmp_path, capsys):
    flags = _broken_copy(folder, tmp_path, lambda m: m.model.norm.weight.fill_(float("nan")))
    line = fails(capsys, [*base_flags(folder), *flags])
    assert "'model.norm.weight'" in line
    assert "not finite" in line


def test_activations_that_are_not_finite(folder, tmp_path, capsys):
    def overflow(model):
        model.model.layers[0].input_layernorm.weight.fill_(3e38)
        model.model.layers[0].self_attn.q_proj.weight.fill_(3e38)

    flags = _broken_copy(folder, tmp_path, overflow)
    line = fails(capsys, [*base_flags(folder), *flags, "--int8", "--backend", "native"])
    assert "not finite" in line


def test_a_model_that_is_wrong_beyond_a_double_has_inf_in_the_table_and_null_in_json(
    folder, tmp_path, capsys
):
    flags = _broken_copy(folder, tmp_path, lambda m: m.lm_head.weight.mul_(1e5))
    assert run(eval_lambada.command, [*base_flags(folder), *flags]) == 0
    table, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)

    def no_json(constant):
        raise AssertionError(f"{constant} is not JSON")

    (row,) = json.loads(line, parse_constant=no_json)["results"]
    assert row["perplexity"] is None
    assert " inf " in table
    assert " inf " in markdown.result_table({"results": [row]})


def test_output_folders_that_are_not_ours(folder, tmp_path, capsys):
    flags = [*base_flags(folder), "--int8", "--backend", "native", "--output_dir"]
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in fails(capsys, [*flags, str(file)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    assert "not written by ipex_sq" in fails(capsys, [*flags, str(tmp_path / "full")])
    assert "is not writable" in fails(capsys, [*flags, "/proc/nowhere/x"])
    assert "folder is missing" in fails(
        capsys, [*base_flags(folder), "--output", str(tmp_path / "no" / "x.json")]
    )


def test_the_whole_job_on_a_tiny_model(folder, tmp_path, capsys):
    output, saved = tmp_path / "result.json", tmp_path / "int8"
    flags = [*base_flags(folder), "--int8", "--sq", "--backend", "native", "--batch-size", "2"]
    flags += ["--output", str(output), "--output_dir", str(saved)]
    assert run(eval_lambada.command, flags) == 0
    table, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    result = json.loads(line)
    assert json.loads(output.read_text()) == result
    assert "int8+sq" in table
    (row,) = result["results"]
    assert (row["int8_linears"], row["float_linears"]) == (15, 0)
    assert row["dynamic_reasons"] == {"output head": 1}
    assert result["rows"] == 3
    assert result["calibration"]["rows"] == 3
    for key in ("system", "versions", "command", "dataset_sha256", "model"):
        assert result[key]
    from ipex_sq import load

    assert load(saved).quant_plan.alpha == row["alpha"]


@pytest.fixture(scope="module")
def saved(folder):
    """An int8 folder, and the row of the run that made it."""
    place, result = folder / "int8", folder / "result.json"
    flags = [*base_flags(folder), "--int8", "--sq", "--alpha", "0.5", "--backend", "native"]
    assert run(eval_lambada.command, [*flags, f"--output_dir={place}", f"--output={result}"]) == 0
    return place, json.loads(result.read_text())["results"][0]


def test_a_saved_model_is_scored_again(folder, saved, capsys):
    place, row = saved
    flags = ["--model_path", str(place), "--dataset", str(folder / "evaluate.jsonl")]
    assert run(eval_lambada.command, flags) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    (again,) = result["results"]
    same = ("label", "backend", "precision", "alpha", "last_word_accuracy", "last_token_accuracy")
    same += ("int8_linears", "float_reasons", "dynamic_reasons", "smooth_groups", "dtype")
    assert {name: again[name] for name in same} == {name: row[name] for name in same}
    assert again["perplexity"] == pytest.approx(row["perplexity"], rel=1e-6)
    assert (again["quantize_s"], result["calibration"]) == (None, None)
    assert result["model"] == str(place)
    assert f"made from {folder / 'model'}" in out
    flags[-1] = str(folder / "calibrate.jsonl")
    assert "calibrated on 3 of the evaluation rows" in fails(capsys, flags)


def test_what_cannot_be_asked_of_a_saved_model(folder, saved, tmp_path, capsys):
    for flags, message in (
        (["--int8"], "--int8 quantizes a float model"),
        (["--compare"], "--compare quantizes a float model"),
        (["--model_name_or_path", str(folder / "model")], "--model_name_or_path has no use"),
        (["--backend", "native"], "--backend has no use"),
        (["--dtype", "bf16"], "--dtype has no use"),
        (["--output_dir", "here"], "add --int8"),
    ):
        assert message in fails(capsys, ["--model_path", str(saved[0]), *flags])
    assert "no ipex_sq.json" in fails(capsys, ["--model_path", str(folder / "model")])
    shutil.copytree(saved[0], tmp_path / "classifier")
    manifest = tmp_path / "classifier" / "ipex_sq.json"
    manifest.write_text(manifest.read_text().replace("causal-lm", "sequence-classification"))
    flags = ["--model_path", str(manifest.parent), "--dataset", str(folder / "evaluate.jsonl")]
    assert "is a sequence classifier" in fails(capsys, flags)


def test_a_saved_int8_model_is_no_float_model(saved, capsys):
    for command, flags in (
        (eval_lambada.command, ["--model_name_or_path"]),
        (eval_lambada.command, ["--int8", "--model_name_or_path"]),
        (benchmark.command, ["--model_name_or_path"]),
        (quantize.command, ["--backend", "native", "--model"]),
        (quantize.command, ["--max_memory", "8GiB", "--model"]),
        (sensitivity.command, ["--dataset", "embedded", "--model_name_or_path"]),
    ):
        line = fails(capsys, [*flags, str(saved[0])], command)
        assert "is an int8 model that ipex_sq saved" in line
        assert "--model_path" in line


def test_compare_pairs_every_row_against_fp32(folder, capsys):
    flags = [*base_flags(folder), "--compare", "--backend", "native,reference"]
    assert run(eval_lambada.command, flags) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(row["label"], row["backend"]) for row in rows] == [
        ("fp32", "torch"),
        ("int8", "native"),
        ("int8+sq", "native"),
        ("int8", "reference"),
        ("int8+sq", "reference"),
    ]
    for row in rows:
        change = 100 * (row["last_word_accuracy"] - rows[0]["last_word_accuracy"])
        assert row["delta"] == pytest.approx(change)
        assert row["delta"] == pytest.approx(100 * (row["gained"] - row["lost"]) / 3)


BRIEF = ["--rounds", "2", "--min_runs", "1", "--min_seconds", "0"]


def _benchmark(folder, capsys, *more):
    flags = ["--model_name_or_path", str(folder / "model"), "--batch_size", "2", *BRIEF, *more]
    assert run(benchmark.command, [*flags, "--sequence_length", "16"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result, result["results"]


def test_benchmark_prints_every_precision(folder, capsys):
    result, rows = _benchmark(folder, capsys, "--int8", "--backend", "native", "--logits", "last")
    assert [row["precision"] for row in rows] == ["fp32", "bf16", "bf16", "int8"]
    assert rows[0]["speedup_vs_fp32"] == 1.0
    for row in rows:
        assert row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p95_ms"]
        assert row["runs"] == len(row["samples_ms"]) == 2
        assert 0.0 < row["limit_share"] < 1.0
        assert sum(row["breakdown"].values()) == pytest.approx(1.0)
    assert all(value > 0 for value in result["limits"].values())


def test_an_int8_head_is_asked_for_and_named(folder, capsys):
    flags = ["--int8", "--backend", "native", "--quant_lm_head"]
    _, rows = _benchmark(folder, capsys, *flags)
    assert [row["head"] for row in rows] == ["fp32", "bf16", "bf16", "int8"]
    assert run(eval_lambada.command, [*base_flags(folder), *flags]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    (row,) = json.loads(line)["results"]
    assert (row["int8_linears"], row["float_linears"]) == (15, 0)
    assert row["dynamic_reasons"] == {"output head": 1}
    flags = ["--model_name_or_path", str(folder / "model"), "--quant_lm_head"]
    assert run(benchmark.command, flags) == 2
    assert "add --int8" in capsys.readouterr().err


def test_benchmark_scores_as_eval_lambada_does(folder, capsys):
    """Every document for the accuracy, though only some are timed."""
    texts = ["--dataset", str(folder / "evaluate.jsonl"), "--calib_samples", "3"]
    texts += ["--calib_dataset", str(folder / "calibrate.jsonl")]
    flags = ["--int8", "--sq", "--backend", "native"]
    result, rows = _benchmark(folder, capsys, "--workload", "lambada", *texts, *flags)
    assert result["rows"] == 3
    model = ["--model_name_or_path", str(folder / "model"), "--batch_size", "2"]
    assert run(eval_lambada.command, [*model, *texts, *flags]) == 0
    (scored,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert rows[-1]["perplexity"] == pytest.approx(scored["perplexity"], rel=1e-6)
    assert rows[-1]["accuracy"] == scored["last_word_accuracy"]
    for row in rows:
        assert row["docs_per_s"] == pytest.approx(1.5 * row["batches_per_s"])  # 3 in 2 batches
        assert row["tokens_per_s"] > row["docs_per_s"]
        assert 0.0 < row["limit_share"] < 1.0


def test_benchmark_times_a_saved_model(folder, tmp_path, capsys):
    """Made ready without its float model, and the same numbers come out."""
    saved = tmp_path / "int8"
    flags = [*base_flags(folder), "--int8", "--sq", "--backend", "native"]
    assert run(eval_lambada.command, [*flags, "--output_dir", str(saved)]) == 0
    (scored,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    texts = ["--workload", "lambada", "--dataset", str(folder / "evaluate.jsonl")]
    texts += ["--calib_dataset", str(folder / "calibrate.jsonl"), "--calib_samples", "3"]
    _, rows = _benchmark(folder, capsys, *texts, "--model_path", str(saved))
    assert [(row["label"], row["backend"]) for row in rows] == [
        ("fp32", "eager"),
        ("bf16", "eager"),
        ("bf16", "compiled"),
        ("int8+sq", "native"),
    ]
    assert rows[-1]["perplexity"] == pytest.approx(scored["perplexity"], rel=1e-6)
    assert 0.0 < rows[-1]["limit_share"] < 1.0


def test_benchmark_decodes_in_pinned_instances(folder, capsys):
    instances = min(2, len(by_core(sorted(os.sched_getaffinity(0)))))
    backend = "ipex,native" if "ipex" in INT8_BACKENDS else "native"
    flags = ["--workload", "decode", "--new_tokens", "4", "--int8", "--backend", backend]
    _, rows = _benchmark(
        folder, capsys, *flags, "--num_instances", str(instances), "--cores_per_instance", "1"
    )
    for row in rows:
        if row["backend"] == "ipex":
            assert "no key-value cache" in row["reason"]
            continue
        assert row["instances"] == instances
        assert row["cores"] == row["threads"] == 1
        assert row["runs"] == 2 * instances
        assert 0 < row["tpot_ms"] < row["p50_ms"]
        assert 0 < row["ttft_ms"] < row["p50_ms"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--cores", "9999"], "does not exist"),
        (["--num_instances", "9999"], "do not fit"),
        (["--workload", "chat"], "invalid choice"),
        (["--new_tokens", "1"], "at least 2"),
        (["--limit", "4"], "--workload lambada"),
        (["--workload", "lambada", "--random_weights", "bert-base"], "its own weights"),
        (["--workload", "lambada", "--dataset", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_benchmark_refuses_before_the_work(folder, capsys, flags, message):
    assert run(benchmark.command, ["--model_name_or_path", str(folder / "model"), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("parser", [eval_lambada.parser, benchmark.parser])
def test_help_has_examples_and_every_default(parser):
    text = " ".join(parser().format_help().split())
    assert "examples:" in text
    if parser is eval_lambada.parser:
        assert f"(default: {DataConfig().calib_samples})" in text
        assert f"(default: {QuantConfig().alpha};" in text
        for flag in ("--model-name-or-path", "--log_frequency", "--output_dir", "--kl", "--seed"):
            assert flag in text


def test_scripts_are_thin():
    root = Path(__file__).parents[2]
    for name in ("eval_lambada.py", "benchmark.py"):
        assert len((root / name).read_text().splitlines()) < 15
