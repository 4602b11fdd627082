"""Load a model and its tokenizer, from the hub, a local folder or the embedded package."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipex_sq.config import EMBEDDED
from ipex_sq.errors import CheckpointError, ConfigError, DataError
from ipex_sq.hub import hub_problem
from ipex_sq.models.completeness import check_complete, check_finite, refuse_integer_weights
from ipex_sq.models.conv1d import convert_conv1d
from ipex_sq.models.embedded import embedded_folder
from ipex_sq.models.failures import first_line, loading_errors
from ipex_sq.models.int8_folders import refuse_int8
from ipex_sq.models.kinds import check_causal
from ipex_sq.models.vocabulary import check_vocabulary, read_tokenizer

CAUSAL_LM, SEQUENCE_CLASSIFICATION = "causal-lm", "sequence-classification"

COMPLETELY = {
    "use_safetensors": True,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,  # so that the loading info names them: they are refused
}
"""Options of `from_pretrained` for `check_complete`."""


def load_model(
    name_or_path: str = EMBEDDED, *, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Load a causal language model in fp32, for inference, and its tokenizer.

    Only safetensors weights are read: no pickle is opened.

    Args:
        name_or_path: "embedded", a local folder, or a hub name.
        trust_remote_code: Run code that comes with the model.

    Raises:
        DataError: The hub is unreachable or knows no such model; the folder is none; it has no
            tokenizer, or another model's.
        ConfigError: It is quantized.
        UnsupportedModelError: It is not a causal language model.
        CheckpointError: Weights are damaged, missing or of other shapes.
        NumericalCheckError: A weight is not finite.
    """
    from transformers import AutoModelForCausalLM

    refuse_int8(name_or_path)
    source, options = resolve_source(name_or_path)
    options["trust_remote_code"] = trust_remote_code
    with loading_errors(name_or_path, "causal language model"):
        float_config(source, options, name_or_path)
    tokenizer = _tokenizer(source, options, name_or_path)
    with loading_errors(name_or_path, "causal language model"):
        refuse_integer_weights(Path(source))
        model, info = AutoModelForCausalLM.from_pretrained(
            source, torch_dtype=torch.float32, **COMPLETELY, **options
        )
    check_complete(model, info, name_or_path)
    check_vocabulary(model, tokenizer, name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_finite(model)
    found: nn.Module = model.eval()
    return found, tokenizer


def load_tokenizer(name_or_path: str) -> Any:
    """The tokenizer of a model.

    Raises:
        DataError: The hub is unreachable or knows no such model; the folder is none, or has no
            tokenizer.
    """
    source, options = resolve_source(name_or_path)
    return _tokenizer(source, options, name_or_path)


def _tokenizer(source: str, options: dict[str, Any], name: str) -> Any:
    with loading_errors(name, "model with a tokenizer"):
        return read_tokenizer(source, options, name)


def resolve_source(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """Where transformers should look, and the options that keep it from waiting for the hub.

    Raises:
        DataError: A local path that is no model folder, or whose config.json names no model.
    """
    if name_or_path == EMBEDDED:
        return str(embedded_folder()), {"local_files_only": True}
    path = Path(name_or_path)
    if path.exists() or name_or_path.startswith((".", "/", "~")):
        if not (path / "config.json").is_file():
            raise DataError(
                f"{name_or_path} is not a model folder: it has no config.json. Pass a folder "
                "written by save_pretrained, a hub name, or leave the flag out"
            )
        _check_named(path / "config.json")
        return name_or_path, {"local_files_only": True}
    return name_or_path, {"local_files_only": hub_problem() is not None}


def _check_named(config: Path) -> None:
    """Transformers 4 guesses a missing type from the folder's name, in the size of its default."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # transformers says what is wrong
    if not isinstance(content, dict) or not (content.get("model_type") or content.get("auto_map")):
        raise DataError(f"{config} describes no model: it holds no model_type")


def refuse_quantized(config: Any, folder: str) -> None:
    """Refuse a quantized model where a float one is asked for.

    transformers runs it in its own way, or takes the integers for weights.

    Args:
        config: As transformers reads config.json.
        folder: Or hub name.

    Raises:
        ConfigError: Says how it is quantized, and what to pass.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    get = found.get if isinstance(found, dict) else lambda key: getattr(found, key, None)
    method = get("quant_method") or "unnamed"
    ours = "; folders of ipex_sq go with --model_path" if method == "ipex_sq" else ""
    raise ConfigError(
        f"{folder} is quantized already (quant_method {method!s} in its config.json), a float "
        f"checkpoint is needed: pass the model that it was made from{ours}"
    )


def float_config(source: str, options: dict[str, Any], name: str) -> Any:
    """The configuration of a causal language model in float, by transformers.

    Args:
        source: Folder or hub name.
        options: Of `from_pretrained`.
        name: As the user gave it, for errors.

    Raises:
        ConfigError: It is quantized.
        UnsupportedModelError: It is no causal language model.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, **options)
    refuse_quantized(config, name)
    check_causal(config, name)
    return config


def task_of(model: nn.Module) -> str:
    """CAUSAL_LM or SEQUENCE_CLASSIFICATION, by the model's class."""
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    return SEQUENCE_CLASSIFICATION if classifies else CAUSAL_LM


def skeleton(folder: Path, attention: str, task: str = CAUSAL_LM) -> nn.Module:
    """The model that `folder`'s config.json describes, parameters on the meta device.

    Buffers that no checkpoint holds (rotary frequencies) are real.

    Args:
        folder: Holds config.json.
        attention: transformers' name of the attention implementation. config.json does not keep
            it, and a config that was read back would choose another.
        task: As `task_of` gives it.

    Raises:
        CheckpointError: The folder holds no config of such a model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = _auto_class(task).from_config(config, attn_implementation=attention)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no model can be built: {first_line(error)}") from error
    return convert_conv1d(model).eval()


def float_skeleton(folder: str) -> nn.Module:
    """The language model whose fp32 weights `load_model` would load, on the meta device.

    Conv1D modules are not converted; buffers that no checkpoint holds are real.

    Raises:
        ConfigError: It is quantized.
        UnsupportedModelError: It is not a causal language model.
    """
    import transformers.modeling_utils  # noqa: F401  # before the empty weights: see sizes.py
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    options: dict[str, Any] = {"local_files_only": True}
    with loading_errors(folder, "causal language model"):
        config = float_config(folder, options, folder)
        if not hasattr(config, "dtype"):  # transformers 4: from_pretrained says it to these too
            for name in config.sub_configs:
                getattr(config, name).torch_dtype = torch.float32
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
        if (Path(folder) / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(folder, **options)
            model.generation_config = generation  # type: ignore[assignment]
    tie: Any = model.tie_weights
    tie()  # empty weights come untied
    return model.eval()


def loaded_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """How a checkpoint calls the parameters of `model`, by the model's name.

    transformers 5 renames on loading (GPT-NeoX) and joins tensors (Mixtral's experts); those that
    are joined are left out.
    """
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:  # transformers 4
        return {name: name for name in stored}
    rules = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
    found = {}
    for name in stored:
        renamed, joined = core_model_loading.rename_source_key(name, renamings, converters)
        if joined is None:
            found[renamed] = name
    return found


def load_quantized(folder: Path, attention: str, task: str) -> nn.Module:
    """The model in `folder` by transformers, whose registered quantizer reads its int8 Linears.

    Args:
        folder: Holds config.json with a `quantization_config`.
        attention: As in `skeleton`.
        task: As `task_of` gives it.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    try:
        model: nn.Module = _auto_class(task).from_pretrained(
            folder, attn_implementation=attention, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no model can be built: {first_line(error)}") from error
    return model


def _auto_class(task: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return {
        CAUSAL_LM: AutoModelForCausalLM,
        SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    }[task]
