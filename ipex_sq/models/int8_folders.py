"""Folders of int8 models that ipex_sq saved: how they are known from folders of float models."""

from __future__ import annotations

from pathlib import Path

from ipex_sq.config import EMBEDDED
from ipex_sq.errors import ConfigError

MANIFEST = "ipex_sq.json"


def is_checkpoint(path: str) -> bool:
    """Whether `path` is an int8 model of `save`."""
    return (Path(path) / MANIFEST).is_file()


def refuse_int8(name_or_path: str) -> None:
    """Refuse an int8 model where a float one is loaded: transformers would load it all the same.

    Raises:
        ConfigError: Says where the folder belongs.
    """
    if name_or_path != EMBEDDED and is_checkpoint(name_or_path):
        raise ConfigError(
            f"{name_or_path} is an int8 model that ipex_sq saved, but a float model is needed: "
            "pass the folder to eval_lambada.py, benchmark.py or `evaluate` as --model_path, or in "
            "Python to ipex_sq.load"
        )
