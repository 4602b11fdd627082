"""Special tokens that a tokenizer puts around a text by itself."""

from __future__ import annotations

from typing import Any

from ipex_sq.errors import DataError


def added_tokens(tokenizer: Any, text: str) -> tuple[int, int]:
    """How many special tokens the tokenizer puts in front of a text, and how many behind it.

    Not by their ids: the unknown token is a special one too, and stands in texts.

    Args:
        tokenizer: Called with its defaults, and without special tokens.
        text: Any that is not empty.

    Raises:
        DataError: The text's own tokens are not found among all of them.
    """
    whole = tokenizer(text)["input_ids"]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    added = len(whole) - len(own)
    for before in range(added + 1):
        if whole[before : before + len(own)] == own:
            return before, added - before
    raise DataError(
        f"{type(tokenizer).__name__} gives {text[:30]!r} other tokens with its special tokens than "
        "without: which are the text's own cannot be told"
    )
