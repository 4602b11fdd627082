"""Tokenizers, and whether they are the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ipex_sq.errors import DataError

_FILES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""What tokenizers keep their vocabulary in."""


def read_tokenizer(source: str, options: dict[str, Any], name: str) -> Any:
    """The tokenizer in a folder or of a hub name.

    Args:
        source: Folder or hub name.
        options: Of `from_pretrained`.
        name: As the user gave it, for errors.

    Raises:
        DataError: There is no vocabulary: transformers 5 then makes one of special tokens, in
            which every word is the unknown one.
    """
    from transformers import AutoTokenizer

    folder = Path(source)
    lacking = folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _FILES)
    if lacking and not (folder / "tokenizer_config.json").is_file():
        raise _no_vocabulary(name)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    files = type(tokenizer).vocab_files_names.values()  # none: bytes or characters are its tokens
    lacking = lacking and bool(files) and not any((folder / file).is_file() for file in files)
    if lacking or len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise _no_vocabulary(name)
    return tokenizer


def check_vocabulary(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer with more tokens than the model embeds, added ones left out of account.

    Added tokens may lie beyond where no text has them, as paddings do: see `check_token_ids`.

    Raises:
        DataError: It is another model's.
    """
    known, embedded = int(tokenizer.vocab_size), _embedded(model)
    if embedded is not None and known > embedded:
        raise DataError(
            f"{name}: its tokenizer has {known} tokens, its model {embedded}: they are of two "
            "models, pass a folder with the model's own tokenizer"
        )


def check_token_ids(model: nn.Module, most: int) -> None:
    """Refuse texts with tokens that the model does not know.

    Args:
        model: Float or int8.
        most: The largest id in them.

    Raises:
        DataError: It is not among those that the model embeds.
    """
    embedded = _embedded(model)
    if embedded is not None and most >= embedded:
        raise DataError(
            f"the texts hold token {most}, the model knows 0 to {embedded - 1}: the tokenizer is "
            "another model's, or has added tokens that the model was not resized for"
        )


def _embedded(model: nn.Module) -> int | None:
    """Number of tokens; None of a model that says none (CANINE hashes characters)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "vocab_size", None)
    return int(found) if found else None


def _no_vocabulary(name: str) -> DataError:
    return DataError(
        f"{name} holds no tokenizer (tokenizer.json, vocab.txt, tokenizer.model): save the model's "
        "own there with save_pretrained"
    )
