"""The table of the benchmark, from result files of every age."""

import json
from pathlib import Path

from ipex_sq.report.latency import latency_report

OLD = Path(__file__).parents[2] / "results" / "benchmark_smollm2_slow.json"


def test_notes_stand_above_the_table():
    result = json.loads(OLD.read_text())
    without = latency_report(result)
    assert "note:" not in without
    noted = latency_report({**result, "notes": ["CPUs share cores"]})
    assert noted.index("note: CPUs share cores") < noted.index("p50 ms")
    assert noted.replace("note: CPUs share cores\n", "") == without
