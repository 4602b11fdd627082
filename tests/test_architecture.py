"""The walls of docs/architecture: import arrows, budgets, a light root."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ipex_sq"

# A room may import itself and whatever stands in a later line.
LEVELS = [
    {"__main__", "__init__"},
    {"registration"},
    {"cli"},
    {"report"},
    {"benchmarking"},
    {"evaluation"},
    {"streaming"},
    {"checkpoint"},
    {"backends"},
    {"compiling"},
    {"kernels"},
    {"models", "data"},
    {"recipe"},
    {"review_config", "benchmark_config"},
    {"config", "system", "hub", "distributed", "logs"},
    {"resources", "seeds"},
    {"errors"},
]
ONLY_IMPORTER = {
    "transformers": "models checkpoint/quantizer.py",
    "datasets": "data",
    "intel_extension_for_pytorch": "backends/ipex.py backends/inc.py",
    "neural_compressor": "backends/inc.py",
    "openvino": "benchmarking/openvino_peer.py benchmarking/openvino_generation.py",
    "nncf": (
        "benchmarking/openvino_peer.py benchmarking/openvino_generation.py "
        "benchmarking/pt2e_peer.py"
    ),
    "torchao": "benchmarking/pt2e_peer.py",
    "onnx": "benchmarking/onnxruntime_peer.py",
    "onnxruntime": "benchmarking/onnxruntime_peer.py",
    "ctranslate2": "benchmarking/ctranslate2_peer.py",
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _level(room):
    return next(index for index, rooms in enumerate(LEVELS) if room in rooms)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_arrows_point_down(path):
    room = _room(path)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "ipex_sq" and len(parts) > 1 and parts[1] != room:
            assert _level(parts[1]) > _level(room), f"{path.name} imports {name}"
        if parts[0] in ONLY_IMPORTER:
            place = str(path.relative_to(PACKAGE))
            allowed = ONLY_IMPORTER[parts[0]].split()
            assert any(place.startswith(item) for item in allowed), f"{place} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_budgets(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} is too long"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            raise AssertionError(f"print in {path.name}")


def _loaded_by(code):
    check = f"import sys; {code}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def test_importing_the_package_stays_light():
    assert _loaded_by("import ipex_sq") == "[]"


@pytest.mark.parametrize("command", ["eval_lambada", "benchmark"])
def test_help_stays_light(command):
    code = (
        f"from ipex_sq.cli.{command} import parser; parser().format_help(); "
        "import ipex_sq.cli.running"
    )
    assert _loaded_by(code) == "[]"


def test_public_names_resolve():
    import ipex_sq

    for name in ipex_sq.__all__:
        assert getattr(ipex_sq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = ipex_sq.quantise


def test_no_submodule_shadows_a_public_name():
    import ipex_sq

    here = {path.stem for path in PACKAGE.iterdir()}
    assert not here & set(ipex_sq.__all__)
