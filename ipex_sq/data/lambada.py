"""Text sets by name: LAMBADA from the hub, the embedded passages, or a local file."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from ipex_sq.config import EMBEDDED
from ipex_sq.data.documents import Document, TextSet, read_jsonl, split_last_word
from ipex_sq.data.hub_sets import hub_rows
from ipex_sq.errors import DataError, unknown_name

HUB_SETS = {
    "lambada": ("cimec/lambada", {"calibration": "train", "evaluation": "validation"}),
    "lambada_openai": ("EleutherAI/lambada_openai", {"calibration": "test", "evaluation": "test"}),
}
"""Hub name and the split for each purpose. lambada_openai has a test split only."""

EMBEDDED_FILES = {"calibration": "calibration.jsonl", "evaluation": "cloze.jsonl"}


def load_lambada(name: str = "auto", *, purpose: str = "evaluation") -> TextSet[Document]:
    """Load passages to evaluate or to calibrate on.

    Args:
        name: "lambada", "lambada_openai", "embedded", a path ending in .jsonl, or "auto":
            lambada where the hub or its cache answers, else embedded.
        purpose: "evaluation" or "calibration"; chooses the split.

    Raises:
        DataError: Unreachable, missing or malformed.
        ConfigError: Unknown name.
    """
    if name == "auto":
        return _automatic(purpose)
    if name == EMBEDDED:
        return _embedded(purpose)
    if name in HUB_SETS:
        return _from_hub(name, purpose)
    if name.endswith((".jsonl", ".json")) or Path(name).exists():
        return TextSet(Path(name).name, "file", read_jsonl(Path(name)))
    raise unknown_name("dataset", name, ("auto", EMBEDDED, *HUB_SETS, "FILE.jsonl"))


def default_calibration(evaluation: TextSet[Document]) -> TextSet[Document]:
    """Calibration texts where none were named: lambada's train split for it, else embedded."""
    name = "lambada" if evaluation.name == "lambada" else EMBEDDED
    return load_lambada(name, purpose="calibration")


def _automatic(purpose: str) -> TextSet[Document]:
    try:
        return replace(_from_hub("lambada", purpose), why="auto: lambada is reachable")
    except DataError as error:
        return replace(_embedded(purpose), why=f"auto: {error}")


def _embedded(purpose: str) -> TextSet[Document]:
    file = resources.files("ipex_sq.data") / "texts" / EMBEDDED_FILES[purpose]
    with resources.as_file(file) as path:
        return TextSet(EMBEDDED, purpose, read_jsonl(path))


def _from_hub(name: str, purpose: str) -> TextSet[Document]:
    repository, splits = HUB_SETS[name]
    split = splits[purpose]
    rows = hub_rows(repository, split)
    return TextSet(name, split, _documents(rows["text"], f"{repository} {split}"))


def _documents(texts: Any, where: str) -> tuple[Document, ...]:
    return tuple(split_last_word(text, f"{where} row {row}") for row, text in enumerate(texts))
