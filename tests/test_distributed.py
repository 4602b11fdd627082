"""Processes of torchrun: results of a single one, one line for an error, no hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TEXTS

from ipex_sq.cli import benchmark, eval_lambada
from ipex_sq.distributed import owners
from ipex_sq.errors import ConfigError
from ipex_sq.models.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
TIMES = {
    "seconds", "quantize_s", "warm_up_s", "evaluate_s", "docs_per_s", "peak_rss_bytes",
}  # fmt: skip


def torchrun(count, *arguments):
    """Start processes that share the machine's cores; the test fails where they hang."""
    starter = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    return python(*starter, *arguments)


def python(*arguments):
    """In a process of its own: IPEX, once imported, puts kernels with other last bits in place."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    tiny_model("llama").save_pretrained(place / "model")
    tiny_tokenizer(TEXTS).save_pretrained(place / "model")
    cut = [" ".join(text.split()[start:]) for text in TEXTS[3:] for start in range(4)]
    for name, texts in (("evaluate", TEXTS[:3]), ("calibrate", cut)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (place / f"{name}.jsonl").write_text(lines)
    return [
        "--model_name_or_path", str(place / "model"), "--batch_size", "1",
        "--dataset", str(place / "evaluate.jsonl"),
        "--calib_dataset", str(place / "calibrate.jsonl"), "--calib_samples", "12",
        "--compare", "--backend", "reference",
    ]  # fmt: skip


@pytest.mark.parametrize("more", [["--kl"], ["--max_drop", "1.0001x"]], ids=str)
def test_two_processes_print_what_one_does(flags, more, tmp_path):
    output = tmp_path / "result.json"
    script = ROOT / "eval_lambada.py"
    alone = json.loads(python(script, *flags, *more).stdout.splitlines()[-1])
    done = torchrun(2, script, *flags, *more, "--output", output)
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 1
    shared = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(output.read_text()) == shared
    assert (alone["processes"], shared["processes"]) == (1, 2)
    for one, two in zip(alone["results"], shared["results"], strict=True):
        assert {key: one[key] for key in one if key not in TIMES} == {
            key: two[key] for key in two if key not in TIMES
        }
    assert [row["label"] for row in shared["results"]] == ["fp32", "int8", "int8+sq"]


SCRIPT = """
import os, signal, sys
from ipex_sq.cli.running import run
from ipex_sq.distributed import collect, gather, rank, share
from ipex_sq.errors import DataError

def command(arguments):
    if arguments == ["raise"] and rank() == 1:
        raise DataError("text 7 is bad")
    if arguments == ["die"] and rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    shared = list(share([5, 1, 7, 2, 2], lambda item: (item, rank()), size=abs))
    line = f"{shared} {gather(rank())} {collect(rank(), 1)}\\n"
    os.write(2, line.encode())  # whole: print would mix the lines of two processes

sys.exit(run(command))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_results_are_in_the_order_of_the_items_on_every_process(script):
    done = torchrun(2, script)
    shared = [(5, 1), (1, 1), (7, 0), (2, 1), (2, 0)]
    lines = [line for line in done.stderr.splitlines() if line.startswith("[(")]
    assert sorted(lines) == [f"{shared} [0, 1] [0, 1]", f"{shared} [0, 1] []"]


@pytest.mark.parametrize(
    ("what", "line", "code"),
    [("raise", "error: text 7 is bad", 2), ("die", "error: another process of this run", -9)],
)
def test_an_error_of_one_process_ends_all_with_one_line(script, what, line, code):
    done = torchrun(2, script, what)
    assert done.returncode != 0
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(line)
    assert f"(exitcode: {code})" in done.stderr


def test_work_is_spread_evenly(monkeypatch):
    assert owners([3, 1, 2]) == [0, 0, 0]
    _started(monkeypatch, 2)
    sizes = [1, 1, 1, 9] * 4
    loads = [0, 0]
    for owner, size in zip(owners(sizes), sizes, strict=True):
        loads[owner] += size
    assert loads == [24, 24]


def test_other_commands_refuse_several_processes(monkeypatch):
    benchmark.parser().parse_args([])
    _started(monkeypatch, 2)
    eval_lambada.parser().parse_args([])
    with pytest.raises(ConfigError, match="without torchrun"):
        benchmark.parser().parse_args([])


def _started(monkeypatch, count):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", count), ("RANK", 0)):
        monkeypatch.setenv(name, str(value))
