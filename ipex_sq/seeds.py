"""Seeds of what is drawn at random."""

from __future__ import annotations

from ipex_sq.errors import ConfigError

LARGEST = 2**32 - 1
"""That every generator takes: PyTorch's, NumPy's and Python's."""


def parse_seed(text: str) -> int:
    """Turn the text of `--seed` into a number from 0 to `LARGEST`.

    Raises:
        ConfigError: It is none.
    """
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed <= LARGEST:
        raise ConfigError(f"--seed takes a whole number from 0 to {LARGEST}, not {text!r}")
    return seed
