"""fine-tune, generate-scales, quantize, evaluate, benchmark: they compose through files."""

import json
import shutil

import pytest
from conftest import TEXTS
from test_commands import BRIEF, fails

from ipex_sq.cli import benchmark, evaluate, fine_tune, generate_scales, quantize
from ipex_sq.cli.running import run
from ipex_sq.models.tiny import tiny_model, tiny_tokenizer

EVALUATED = [("good old house", 1), ("bad dark door", 0), ("the dog is good", 1), ("no no no", 0)]


def _write(path, rows):
    path.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows))
    return str(path)


def _json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A classifier's folder, a decoder's, and two files of reviews."""
    place = tmp_path_factory.mktemp("reviews")
    words = [*TEXTS, *(text for text, _ in EVALUATED)]
    for name, family in (("tiny-bert", "bert"), ("decoder", "llama")):
        tiny_model(family).save_pretrained(place / name)
        tokenizer = tiny_tokenizer(words)
        tokenizer.model_max_length = 128
        tokenizer.save_pretrained(place / name)
    _write(place / "train.jsonl", [(text, number % 2) for number, text in enumerate(TEXTS)])
    _write(place / "eval.jsonl", EVALUATED)
    return place


@pytest.fixture(scope="module")
def scales(place):
    """The file that generate-scales wrote."""
    path = place / "act_scales" / "tiny-bert.json"
    flags = ["--model", str(place / "tiny-bert"), "--output", str(path), "--num_samples", "6"]
    flags += ["--calib_dataset", str(place / "train.jsonl"), "--max_length", "32"]
    assert run(generate_scales.command, flags) == 0
    return path


def _quantized(place, scales, capsys, *more):
    flags = ["--model", str(place / "tiny-bert"), "--act_scales_path", str(scales)]
    flags += ["--alpha", "0.5", "--output_dir", str(place / "out"), "--backend", "native", *more]
    assert run(quantize.command, flags) == 0
    return _json(capsys)


def test_the_commands_as_the_published_example_writes_them(place, scales, capsys):
    result = _quantized(place, scales, capsys)
    assert result["int8_linears"] == 13
    assert result["alpha"] == 0.5
    folder = str(place / "out" / "tiny-bert")
    flags = ["--model_path", folder, "--dataset", str(place / "eval.jsonl")]
    assert run(evaluate.command, flags) == 0
    scored = _json(capsys)
    assert [(row["label"], row["backend"]) for row in scored["results"]] == [
        ("fp32", "torch"),
        ("int8+sq", "native"),
    ]
    for row in scored["results"]:
        assert sum(map(sum, row["confusion_matrix"])) == scored["rows"] == 4
        assert (
            row["accuracy"] == (row["confusion_matrix"][0][0] + row["confusion_matrix"][1][1]) / 4
        )
        assert row["delta"] is not None
    assert scored["results"][1]["int8_linears"] == 13
    flags = ["--model_path", folder, "--batch_size", "2", "--sequence_length", "16"]
    assert run(benchmark.command, [*flags, *BRIEF, "--padded"]) == 0
    timed = _json(capsys)["results"]
    assert [row["precision"] for row in timed] == ["fp32", "bf16", "bf16", "int8"]
    assert {row["workload"] for row in timed} == {"classify"}
    assert all(row["p90_ms"] >= row["p50_ms"] > 0 for row in timed)


def test_compare_scores_every_precision(place, capsys):
    flags = ["--model_path", str(place / "tiny-bert"), "--dataset", str(place / "eval.jsonl")]
    flags += ["--calib_dataset", str(place / "train.jsonl"), "--num_samples", "6"]
    assert run(evaluate.command, [*flags, "--compare", "--backend", "reference"]) == 0
    result = _json(capsys)
    labels = [row["label"] for row in result["results"]]
    assert labels == ["fp32", "bf16", "int8", "int8+sq"]
    assert result["classes"] == ["LABEL_0", "LABEL_1"]
    assert result["calibration"]["rows"] == 6


def _with_classes(place, folder, classes):
    """The tiny classifier with other names of its classes."""
    shutil.copytree(place / "tiny-bert", folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(enumerate(classes))
    config["label2id"] = {name: index for index, name in enumerate(classes)}
    (folder / "config.json").write_text(json.dumps(config))
    return ["--model_path", str(folder), "--dataset", "embedded", "--limit", "40"]


def test_a_head_in_another_order_is_read_by_its_names(place, tmp_path, capsys):
    accuracies = []
    for classes in (["negative", "positive"], ["POSITIVE", "NEGATIVE"]):
        assert run(evaluate.command, _with_classes(place, tmp_path / classes[0], classes)) == 0
        out = capsys.readouterr().out
        result = json.loads(out.splitlines()[-1])
        accuracies.append(result["results"][0]["accuracy"])
        assert (
            ("labels by name" in out) == ("label_mapping" in result) == (classes[0] == "POSITIVE")
        )
    assert result["label_mapping"] == {"negative": 1, "positive": 0}
    assert result["classes"] == ["NEGATIVE", "POSITIVE"]
    assert accuracies[0] + accuracies[1] == pytest.approx(1.0)  # one head, read both ways


def test_a_head_of_other_classes_is_refused_before_calibration(
    place, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ipex_sq.evaluation.runs.calibrate", lambda *_a, **_k: 1 / 0)
    monkeypatch.setattr("ipex_sq.evaluation.reviews.predict", lambda *_a, **_k: 1 / 0)
    flags = _with_classes(place, tmp_path / "other", ["ham", "spam"])
    line = fails(capsys, [*flags, "--compare", "--backend", "native"], evaluate.command)
    assert "the model's classes are ham, spam" in line


def test_rows_that_a_checkpoint_was_calibrated_on_are_refused(place, scales, capsys):
    _quantized(place, scales, capsys)
    flags = ["--model_path", str(place / "out" / "tiny-bert")]
    line = fails(capsys, [*flags, "--dataset", str(place / "train.jsonl")], evaluate.command)
    assert "calibrated on 6 of the evaluation rows" in line


def test_scales_of_another_model_are_refused(place, scales, tmp_path, capsys):
    tiny_model("bert", seed=3).save_pretrained(tmp_path / "other")
    tiny_tokenizer(TEXTS).save_pretrained(tmp_path / "other")
    flags = ["--model", str(tmp_path / "other"), "--act_scales_path", str(scales)]
    flags += ["--output_dir", str(tmp_path / "out"), "--backend", "native"]
    assert "another model" in fails(capsys, flags, quantize.command)
    assert not (tmp_path / "out" / "other").exists()


def test_other_bad_input(place, scales, tmp_path, capsys):
    model, folder = str(place / "tiny-bert"), str(place / "eval.jsonl")
    one_class = _write(tmp_path / "one.jsonl", [("a b", 1), ("c d", 1)])
    beyond = _write(tmp_path / "beyond.jsonl", [("a b", 0), ("c d", 2)])
    empty = _write(tmp_path / "empty.jsonl", [("", 0)])
    for flags, message in (
        (["--model_path", str(place / "decoder"), "--dataset", folder], "use eval_lambada.py"),
        (["--model_path", model, "--dataset", one_class], "all 2 reviews have label 1"),
        (["--model_path", model, "--dataset", beyond], "label 2, the model's head has 2"),
        (["--model_path", model, "--dataset", empty], "empty.jsonl:1: the text is empty"),
        (["--model_path", str(tmp_path), "--dataset", folder], "no config.json"),
        (["--model_path", model, "--alpha", "0.5"], "use `quantize`, or --compare"),
        (["--model_path", model, "--max_length", "999", "--dataset", folder], "128 positions"),
    ):
        assert message in fails(capsys, flags, evaluate.command)
    for flags, message in (
        (
            ["--model", model, "--weight_rounding", "gptq", "--act_scales_path", str(scales)],
            "texts",
        ),
        (["--model", model, "--alpha", "auto", "--act_scales_path", str(scales)], "pass a number"),
        (["--model", model, "--no_sq", "--alpha", "0.5"], "leave --no_sq out"),
        (["--model", model, "--act_scales_path", str(tmp_path / "no.json")], "cannot be read"),
        (["--model", str(place / "decoder")], "use eval_lambada.py"),
        (["--model", model, "--backend", "reference"], "'reference' cannot be saved"),
    ):
        out = ["--output_dir", str(tmp_path / "out")]
        out += [] if "--backend" in flags else ["--backend", "native"]
        assert message in fails(capsys, [*flags, *out], quantize.command)


def test_fine_tuning_learns_names_an_untrained_head_and_is_reused(place, tmp_path, capsys):
    from transformers import AutoModel

    headless = tmp_path / "headless"
    AutoModel.from_pretrained(place / "tiny-bert").save_pretrained(headless)
    tiny_tokenizer([text for text, _ in EVALUATED]).save_pretrained(headless)
    train = _write(
        tmp_path / "t.jsonl", [(f"{text} {n}", y) for n in "abcd" for text, y in EVALUATED]
    )
    flags = ["--model_path", str(headless), "--dataset", train, "--max_length", "32"]
    assert run(evaluate.command, flags) == 0
    captured = capsys.readouterr()
    assert "UNTRAINED HEAD" in captured.out
    assert not json.loads(captured.out.splitlines()[-1])["results"][0]["trained_head"]

    flags = ["--model", str(headless), "--train_dataset", train, "--epochs", "12"]
    flags += ["--dataset", str(place / "eval.jsonl"), "--output_dir", str(tmp_path / "tuned")]
    flags += ["--learning_rate", "0.003", "--max_length", "32"]
    assert run(fine_tune.command, flags) == 0
    assert _json(capsys)["accuracies"][-1] == 1.0
    before = (tmp_path / "tuned" / "model.safetensors").stat().st_mtime_ns
    assert run(fine_tune.command, flags) == 0
    assert (tmp_path / "tuned" / "model.safetensors").stat().st_mtime_ns == before
    capsys.readouterr()
    line = fails(
        capsys, ["--model_path", str(tmp_path / "tuned"), "--dataset", train], evaluate.command
    )
    assert "fine-tuned on 16 of the evaluation rows" in line
