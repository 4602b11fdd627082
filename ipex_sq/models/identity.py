"""What a model and a tokenizer are, as digests."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def model_sha256(model: nn.Module) -> str:
    """Digest of the names, shapes and bits of the base model's parameters; its head is left out.

    Statistics of the body do not depend on the head.
    """
    base = getattr(model, "base_model", model)
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of the vocabulary and the special tokens."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.special_tokens_map.items())]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
