"""What other libraries put on the screen."""

import subprocess
import sys

import pytest
from conftest import LANE

NOISY = "intel_extension_for_pytorch" if LANE == "ipex" else "torchao"


def _said(program):
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return done.stderr


@pytest.mark.parametrize("name", ["transformers", NOISY])
def test_programs_keep_other_libraries_off_the_screen(name):
    settings = "from ipex_sq.cli.running import configure_logging; configure_logging(); "
    assert _said(f"{settings} import {name}") == ""


@pytest.mark.skipif(LANE != "ipex", reason="no IPEX goes with this torch; the ipex lane runs it")
def test_ipex_can_warn_after_it_was_imported_quietly():
    """Its own class of logger takes the kind of a warning, which others refuse."""
    program = """
import logging
from ipex_sq.backends.ipex import quiet_ipex
with quiet_ipex():
    pass
from intel_extension_for_pytorch.utils._logger import WarningType
logging.getLogger("IPEX").warning("seen", _type=WarningType.NotSupported)
"""
    assert "seen" in _said(program)
