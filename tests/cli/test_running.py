"""Where results are written, and what a command is called."""

import os
import stat
import threading

import pytest

from ipex_sq import __main__
from ipex_sq.cli import eval_lambada
from ipex_sq.cli.flags import Parser
from ipex_sq.cli.running import check_output, write_atomically
from ipex_sq.config import QuantConfig
from ipex_sq.errors import ConfigError
from ipex_sq.hub import hub_problem


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    """As root a rename would replace /dev/null by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "result")
    reader.join()
    assert read == ["result"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_a_link_points_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "there" / "target.json")
    check_output(link)
    write_atomically(link, "result")
    assert link.is_symlink()
    assert (tmp_path / "there" / "target.json").read_text() == "result"


def test_a_command_is_called_by_its_whole_name(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/anywhere/ipex_sq/__main__.py", "compare", "--help"])
    assert Parser("", "").format_usage().startswith("usage: python -m ipex_sq compare ")
    monkeypatch.setattr("sys.argv", ["/anywhere/benchmark.py", "--help"])
    assert Parser("", "").format_usage().startswith("usage: benchmark.py ")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], None),
        (["--quant_lm_head"], True),
        (["--quant-lm-head"], True),
        (["--no_quant_lm_head"], False),
        (["--no-quant-lm-head"], False),
        (["--quant_lm_head", "--no-quant-lm-head"], False),
    ],
)
def test_a_switch_is_on_off_or_left_open(given, wanted):
    flags = Parser("", "")
    flags.add_config(QuantConfig)
    assert flags.parse_args(given).quant_lm_head is wanted
    with pytest.raises(ConfigError, match="--no_quant_lm_head"):
        flags.parse_args(["--no_quant_lm_head=yes"])


def test_every_command_is_explained(capsys):
    __main__.main([])
    lines = capsys.readouterr().out.splitlines()
    for name in __main__.COMMANDS:
        (line,) = [line for line in lines if line.split()[:1] == [name.replace("_", "-")]]
        assert len(line.split()) > 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--backend", "nativ"],
        ["--quant_lm_head"],
        ["--portable"],
    ],
)
def test_flags_that_a_float_run_would_ignore_are_refused(flags):
    with pytest.raises(ConfigError, match=f"{flags[0]} belongs to INT8"):
        eval_lambada.command(flags)


def test_an_endpoint_that_is_no_address_is_a_reason(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "foo")
    hub_problem.cache_clear()
    try:
        assert "foo does not answer" in hub_problem()
    finally:
        hub_problem.cache_clear()
