"""README's commands and code exist and its Python blocks run."""

import json
import re
from pathlib import Path

import pytest

from ipex_sq.cli import (
    benchmark,
    compare,
    eval_lambada,
    evaluate,
    families,
    fine_tune,
    generate_scales,
    import_scales,
    plant_outliers,
    quantize,
    quantize_streamed,
    random_weights,
    sensitivity,
)
from ipex_sq.report.markdown import result_table, with_tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
SHELL = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.strip()
]
PARSERS = {
    "eval_lambada.py": eval_lambada.parser,
    "benchmark.py": benchmark.parser,
    "-m ipex_sq sensitivity": sensitivity.parser,
    "-m ipex_sq plant-outliers": plant_outliers.parser,
    "-m ipex_sq families": families.parser,
    "-m ipex_sq fine-tune": fine_tune.parser,
    "-m ipex_sq generate-scales": generate_scales.parser,
    "-m ipex_sq import-scales": import_scales.parser,
    "-m ipex_sq quantize": quantize.parser,
    "-m ipex_sq quantize --max_memory": quantize_streamed.parser,
    "-m ipex_sq random-weights": random_weights.parser,
    "-m ipex_sq evaluate": evaluate.parser,
    "-m ipex_sq benchmark": benchmark.parser,
    "-m ipex_sq compare": compare.parser,
}


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("python ")])
def test_flags_in_readme_exist(line):
    command = line.removeprefix("python ")
    script = max((name for name in PARSERS if command.startswith(name)), key=len)
    start = script.replace(" --max_memory", "")
    PARSERS[script]().parse_args(command.removeprefix(start).split())


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_make_targets_in_readme_exist(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.real
@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(document):
    """After a new result: python -m ipex_sq tables README.md, and docs/results.md."""
    text = document.read_text()
    made = with_tables(text, lambda name: json.loads((document.parent / name).read_text()))
    assert made == text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_number_has_a_result_file(document):
    for name in re.findall(r"results/[\w.-]+\.json", document.read_text()):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("benchmark_smollm2_decode_1_slow", {"ttft_ms": ".0f", "tpot_ms": ".1f"}),
        ("benchmark_smollm2_lambada_peers_slow", {"accuracy": ".2%", "p50_ms": ".0f"}),
        ("benchmark_smollm2_slow", {"p50_ms": ".0f"}),
    ],
)
def test_a_table_has_what_its_workload_is_judged_by(name, fields):
    result = json.loads((ROOT / f"results/{name}.json").read_text())
    lines = result_table(result).splitlines()[2:]
    for line, row in zip(lines, result["results"], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert {format(row[field], style) for field, style in fields.items()} <= set(cells)
