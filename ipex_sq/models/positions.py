"""How long a text a model can read before it fails."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ipex_sq.errors import DataError

TABLES = ("position_embeddings", "embed_positions", "wpe")
"""How models call a table with a row for each position."""

BIAS_TABLES = ("mpt",)
"""Models that make a bias for each position when they run, as many as the configuration says."""


def position_limit(model: nn.Module) -> int | None:
    """Most tokens of a text; None where positions are computed as needed.

    Rotary embeddings and BLOOM's biases run beyond what the configuration says, learned embeddings
    and stored tables do not.

    Args:
        model: On any device: shapes alone are read.
    """
    found = [_rows(item) for name, item in model.named_modules() if _is_table(name, item)]
    found += [len(table) for module in model.modules() for table in _plain_tables(module)]
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) in BIAS_TABLES:
        found.append(int(config.max_seq_len))
    return min(found, default=None)


def check_length(model: nn.Module, tokens: int) -> None:
    """Refuse texts that a model has no positions for.

    Args:
        model: Float or int8.
        tokens: Of the longest text.

    Raises:
        DataError: It would fail in the middle of its work.
    """
    positions = position_limit(model)
    if positions is not None and tokens > positions:
        raise DataError(
            f"a text has {tokens} tokens, the model {positions} positions: cut texts to them "
            "(--calib_max_tokens, --max_length)"
        )


def _is_table(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and _last(name) in TABLES


def _plain_tables(module: nn.Module) -> list[Tensor]:
    """GPT-J's: a buffer, with transformers 4 an attribute."""
    held = [getattr(module, name, None) for name in TABLES]
    return [table for table in held if isinstance(table, Tensor)]


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _rows(table: nn.Embedding) -> int:
    """Those of text: OPT leaves the first two out, RoBERTa all up to the padding index."""
    if table.padding_idx is not None:
        return table.num_embeddings - table.padding_idx - 1
    return table.num_embeddings - int(getattr(table, "offset", 0))
