"""Two result files are compared where they are of the same work, and not otherwise."""

import json
import math
from pathlib import Path

import pytest

from ipex_sq.cli import compare
from ipex_sq.cli.running import run
from ipex_sq.report.comparison import ENOUGH_RUNS, check_result, compare_results

RESULTS = sorted((Path(__file__).parents[2] / "results").glob("benchmark_*.json"))


def _row(label, backend, p50, **others):
    return {
        **dict.fromkeys(("batch", "instances"), 1),
        "tokens": 8,
        "cores": 2,
        "workload": "prefill",
        "precision": label.split("+")[0],
        "label": label,
        "backend": backend,
        "reason": "",
        "runs": 9,
        "head": "bf16",
        "p50_ms": p50,
        "p05_ms": 0.95 * p50,
        "p95_ms": 1.1 * p50,
        **others,
    }


def _result(*rows, config=(), **others):
    workload = {"workload": "prefill", "batch_size": 1, "sequence_length": 8, "new_tokens": 128}
    return {
        "model": "embedded",
        "system": {"cpu": "a CPU", "isa": "AVX2"},
        "versions": {"torch": "2.8.0"},
        "config": {**workload, "logits": "all", "padded": False, "seed": 42, **dict(config)},
        "results": list(rows or [_row("int8", "native", 10.0)]),
        **others,
    }


@pytest.fixture
def compared(tmp_path, capsys):
    def run_on(*results):
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, result in zip(paths, results, strict=True):
            path.write_text(result if isinstance(result, str) else json.dumps(result))
        code = run(compare.command, list(map(str, paths)))
        shown = capsys.readouterr()
        assert len(shown.err.splitlines()) == (1 if code else 0)
        return code, shown.err if code else shown.out

    return run_on


def test_compare_tells_a_difference_from_the_spread(compared):
    a = _result(_row("int8", "native", 10.0), _row("bf16", "eager", 20.0))
    b = _result(_row("bf16", "eager", 20.5), _row("int8", "native", 5.0))
    code, out = compared(a, b)
    assert code == 0
    rows = json.loads(out.splitlines()[-1])["results"]
    assert [(row["label"], row["verdict"]) for row in rows] == [
        ("int8", "faster"),
        ("bf16", "within the spread"),
    ]
    assert rows[0]["speedup"] == pytest.approx(2.0)


@pytest.mark.parametrize("runs", [(1, 1), (4, 100), (100, 4), (5, 5)])
def test_few_runs_tell_nothing(compared, runs):
    a, b = (_result(_row("int8", "native", ms, runs=n)) for ms, n in zip((9, 5), runs, strict=True))
    row = json.loads(compared(a, b)[1].splitlines()[-1])["results"][0]
    assert row["verdict"] == ("too few runs" if min(runs) < 5 else "faster")


def test_five_runs_rarely_lie_apart_by_chance():
    def chance(runs):
        return 2 * math.factorial(runs) ** 2 / math.factorial(2 * runs)

    assert chance(ENOUGH_RUNS) < 0.01 < chance(ENOUGH_RUNS - 1)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model": "other"}, "model (embedded and other)"),
        ({"config": {"batch_size": 2}}, "batch_size (1 and 2)"),
        ({"config": {"sequence_length": 9}}, "sequence_length (8 and 9)"),
        ({"config": {"logits": "last"}}, "logits (all and last)"),
        ({"config": {"padded": True}}, "padded (False and True)"),
        ({"dataset_sha256": "1"}, "dataset_sha256 (None and 1)"),
        ({"results": [_row("int8", "native", 9.0, instances=2)]}, "instances (1 and 2)"),
    ],
)
def test_other_work_is_refused_by_name(compared, change, names):
    code, err = compared(_result(), _result(**change))
    assert code == 2
    assert names in err


def test_new_tokens_count_in_decode_alone(compared):
    other = {"new_tokens": 16}
    assert compared(_result(), _result(config=other))[0] == 0
    row = _row("int8", "native", 9.0, workload="decode")
    code, err = compared(_result(row), _result(row, config=other))
    assert code == 2
    assert "new_tokens (128 and 16)" in err


def test_heads_of_other_precision_are_no_pair(compared):
    int8 = _row("int8", "native", 5.0, head="int8")
    code, err = compared(_result(), _result(int8))
    assert code == 2
    assert "share no row" in err
    before = {key: value for key, value in _row("bf16", "eager", 9.0).items() if key != "head"}
    assert compared(_result(before), _result(_row("bf16", "eager", 9.0)))[0] == 0


def test_other_machines_and_versions_are_said(compared):
    other = _result(versions={"torch": "2.13.0"}, system={"cpu": "another", "isa": "AVX2"})
    code, out = compared(_result(), other)
    assert code == 0
    above = out.split("verdict")[0]
    assert "system.cpu differs: A a CPU, B another" in above
    assert "versions.torch differs: A 2.8.0, B 2.13.0" in above
    assert "isa" not in above


def _changed(path, value):
    result = _result()
    holder = result
    for key in path[:-1]:
        holder = holder[key]
    if value is None:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return result


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ("", "Expecting value"),
        ("[]", "the document"),
        ('{"results": [{}]}', "model"),
        (_changed(["results"], 3), "results"),
        (_changed(["results"], []), "results"),
        (_changed(["results", 0], "row"), "results[0]"),
        (_changed(["results", 0, "label"], None), "results[0].label"),
        (_changed(["results", 0, "batch"], "16"), "results[0].batch"),
        (_changed(["results", 0, "p05_ms"], None), "results[0].p05_ms"),
        (_changed(["results", 0, "p95_ms"], "slow"), "results[0].p95_ms"),
        (_changed(["results", 0, "p50_ms"], 0), "results[0].p50_ms"),
        (_changed(["results", 0, "head"], ["int8"]), "results[0].head"),
        (_changed(["results", 0, "runs"], 2.5), "results[0].runs"),
        (_changed(["results", 0, "workload"], "training"), "training"),
        (_changed(["config"], None), "config"),
        (_changed(["config", "logits"], None), "config.logits"),
        (_changed(["config", "batch_size"], True), "config.batch_size"),
        (_changed(["versions"], []), "versions"),
        (_changed(["system"], None), "system"),
    ],
)
def test_compare_refuses_what_is_no_result(compared, bad, names):
    code, err = compared(_result(), bad)
    assert code == 2
    assert "b.json is no result" in err
    assert names in err


def test_a_row_without_figures_is_passed_over(compared):
    failed = {key: value for key, value in _row("bf16", "eager", 1.0).items() if "_ms" not in key}
    rows = (failed | {"reason": "no memory"}, _row("int8", "native", 10.0))
    code, out = compared(_result(*rows), _result(*rows))
    assert code == 0
    assert len(json.loads(out.splitlines()[-1])["results"]) == 1


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_compare_with_themselves(path):
    result = check_result(json.loads(path.read_text()), path.name)
    rows = compare_results(result, result)
    assert len(rows) == len(result["results"])
    for row in rows:
        assert row["speedup"] == 1.0
        assert row["verdict"] in ("within the spread", "too few runs")
