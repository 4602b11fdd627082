"""Sizes of models are known before anything is loaded."""

import subprocess
import sys


def test_a_size_is_found_in_a_process_that_has_imported_nothing_else():
    code = "from ipex_sq.models.sizes import shape_size; print(shape_size('opt-125m').parameters)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "125239296", done.stderr
