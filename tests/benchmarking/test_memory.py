"""What would not fit is refused before it is allocated."""

from types import SimpleNamespace

import psutil
import pytest

from ipex_sq import resources
from ipex_sq.benchmark_config import BenchmarkConfig
from ipex_sq.benchmarking.contenders import Contender, contenders
from ipex_sq.benchmarking.memory import check_length, needed_bytes
from ipex_sq.benchmarking.subjects import RANDOM, Subject
from ipex_sq.cli import benchmark
from ipex_sq.cli.running import run
from ipex_sq.config import QuantConfig
from ipex_sq.models.sizes import named_size, shape_size
from ipex_sq.models.tiny import tiny_model

BERT = Subject("bert-base", RANDOM)


def test_sizes_are_those_of_the_models(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    size = named_size(str(tmp_path), "causal-lm")
    assert size.parameters == sum(item.numel() for item in model.parameters())
    assert size.outputs == model.config.vocab_size
    # Devlin et al. 2019, table 1: BERT base has 110 million parameters.
    assert shape_size("bert-base").parameters == pytest.approx(110e6, rel=0.01)


def test_more_of_anything_needs_more():
    timed = contenders([], compare=False)
    least = needed_bytes(timed, BERT, BenchmarkConfig())
    assert needed_bytes(timed[:1], BERT, BenchmarkConfig()) < least
    assert needed_bytes(timed, BERT, BenchmarkConfig(num_instances=2)) == 2 * least
    decoder = Subject("opt-125m", RANDOM)
    some = needed_bytes(timed, decoder, BenchmarkConfig(logits="last"))
    assert some < needed_bytes(timed, decoder, BenchmarkConfig(logits="all"))
    int8 = [Contender("int8", "native", "int8", QuantConfig(backend="native"))]
    step = needed_bytes(int8, decoder, BenchmarkConfig(workload="decode"))
    last = needed_bytes(int8, decoder, BenchmarkConfig(logits="last"))
    assert step - last == shape_size("opt-125m").parameters


@pytest.mark.parametrize("limited", [False, True])
def test_the_error_has_both_numbers(monkeypatch, tmp_path, capsys, limited):
    """Of a machine with 1 GiB, and of a container that may use 1 GiB of 512."""
    machine = SimpleNamespace(available=2**39 if limited else 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "memory.max").write_text(str(2**30) if limited else "max")
    monkeypatch.setattr(resources, "OWN_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    monkeypatch.setattr("ipex_sq.benchmarking.run.run_benchmark", lambda *_a: pytest.fail("ran"))
    assert run(benchmark.command, ["--random_weights", "bert-base"]) == 2
    message = capsys.readouterr().err
    where = "under the memory limit of this cgroup" if limited else "on this machine"
    assert f"GiB, 1.0 GiB are available {where}" in message


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["bert-base", "--sequence_length", "513"], "513 positions, bert-base has 512"),
        (["opt-125m", "--sequence_length", "2049"], "2049 positions, opt-125m has 2048"),
        (
            ["opt-125m", "--workload", "decode", "--sequence_length", "2040", "--new_tokens", "10"],
            "--sequence_length 2040 and --new_tokens 10 take 2049 positions, opt-125m has 2048",
        ),
    ],
)
def test_a_text_longer_than_the_model_is_refused_before_any_work(monkeypatch, capsys, flags, asked):
    monkeypatch.setattr("ipex_sq.benchmarking.run.run_benchmark", lambda *_a: pytest.fail("ran"))
    assert run(benchmark.command, ["--random_weights", *flags, "--batch_size", "1"]) == 2
    assert asked in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert-base", {"sequence_length": 512}),
        ("bert-base", {"sequence_length": 512, "new_tokens": 100}),
        ("opt-125m", {"sequence_length": 2040, "new_tokens": 9, "workload": "decode"}),
        ("bloom-560m", {"sequence_length": 5000}),
        ("llama-1b", {"sequence_length": 5000}),
    ],
)
def test_a_text_that_the_model_can_read_is_timed(name, settings):
    check_length(Subject(name, RANDOM), BenchmarkConfig(**settings))
