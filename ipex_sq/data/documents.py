"""Passages and the files they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ipex_sq.data.jsonl import read_rows
from ipex_sq.errors import DataError


class Text(Protocol):
    """Anything that is calibrated or evaluated on."""

    @property
    def text(self) -> str:
        """What the model reads."""

    @property
    def record(self) -> str:
        """All that a result depends on, for the digest."""


Item = TypeVar("Item", bound=Text)


@dataclass(frozen=True)
class Document:
    """A passage split before its last word.

    Attributes:
        context: Everything before the last word, without the space between.
        continuation: The last word, with the leading space that tokenizers join to it.
    """

    context: str
    continuation: str

    @property
    def text(self) -> str:
        """The whole passage."""
        return self.context + self.continuation

    @property
    def record(self) -> str:
        """The passage: its last word is known from it."""
        return self.text


@dataclass(frozen=True)
class TextSet(Generic[Item]):
    """Texts with their origin.

    Attributes:
        name: What was asked for, such as "lambada" or a file's name.
        split: "train", "validation", "test" or "file".
        documents: In the order of the source.
        why: Why this set, where the choice was automatic.
    """

    name: str
    split: str
    documents: tuple[Item, ...]
    why: str = ""

    @property
    def sha256(self) -> str:
        """Digest of the texts (and labels), in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.record.encode() + b"\n")
        return digest.hexdigest()

    def first(self, count: int | None) -> TextSet[Item]:
        """The set cut to its first `count` documents (None: all)."""
        return self if count is None else replace(self, documents=self.documents[:count])


def split_last_word(text: str, where: str) -> Document:
    """Split a passage before its last word.

    Raises:
        DataError: Fewer than two words; `where` says which passage.
    """
    stripped = text.strip()
    if not stripped:
        raise DataError(f"{where}: the text is empty")
    context, space, word = stripped.rpartition(" ")
    if not space or not context.strip():
        raise DataError(f"{where}: the text has one word, at least two are needed")
    return Document(context, " " + word)


def read_jsonl(path: Path) -> tuple[Document, ...]:
    """Read passages from JSON lines of `{"text"}` or `{"context", "continuation"}`.

    Raises:
        DataError: Missing or unreadable file, or a malformed line, named as file:line.
    """
    return read_rows(path, _document)


def _document(row: dict[str, Any], where: str) -> Document:
    if isinstance(row.get("text"), str):
        return split_last_word(row["text"], where)
    context, continuation = row.get("context"), row.get("continuation")
    if not isinstance(context, str) or not isinstance(continuation, str):
        raise DataError(f'{where}: needs "text", or "context" and "continuation", as strings')
    if not context.strip() or not continuation.strip():
        raise DataError(f"{where}: the context or the continuation is empty")
    return Document(context.rstrip(), " " + continuation.strip())


def row_digests(texts: Iterable[Text]) -> list[str]:
    """A short digest of each text, so that a checkpoint can name its rows without holding them."""
    return [hashlib.sha256(text.text.strip().encode()).hexdigest()[:16] for text in texts]


def check_unseen(digests: Iterable[str], evaluation: Sequence[Text], used_for: str) -> None:
    """Refuse to evaluate on texts that a model was calibrated or trained on.

    Args:
        digests: Of those texts (`row_digests`).
        evaluation: Texts to evaluate on.
        used_for: What was done with them, such as "calibrated".

    Raises:
        DataError: Says how many rows are shared, and the first.
    """
    known = set(digests)
    rows = zip(evaluation, row_digests(evaluation), strict=True)
    shared = [text.text for text, digest in rows if digest in known]
    if shared:
        raise DataError(
            f"the model was {used_for} on {len(shared)} of the evaluation rows, the first is "
            f"{shared[0][:50]!r}...: pass another --dataset"
        )


def check_disjoint(calibration: Iterable[Text], evaluation: Sequence[Text]) -> None:
    """Refuse calibration texts that are also evaluated.

    Raises:
        DataError: Says how many rows are shared, and the first.
    """
    evaluated = {document.text for document in evaluation}
    shared = [document.text for document in calibration if document.text in evaluated]
    if shared:
        raise DataError(
            f"{len(shared)} calibration row(s) are also evaluation rows, the first is "
            f"{shared[0][:50]!r}...: pass another --calib_dataset or a smaller --limit"
        )
