"""What transformers is told of int8 checkpoints: its `from_pretrained` then loads them.

Imported by `ipex_sq.registration` in the middle of importing transformers: light at module level.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ipex_sq.checkpoint.folders import FORMAT_VERSION, QUANT_METHOD
from ipex_sq.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from ipex_sq.checkpoint.assembling import SavedModel

_HOSTS = {"None", "cpu", "auto", "balanced", "balanced_low_0", "sequential"}

logger = logging.getLogger(__name__)


@register_quantization_config(QUANT_METHOD)
class Int8Config(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """`quantization_config` in config.json.

    Attributes:
        format_version: Of the folder.
        backend: That runs it.
        dtype: Precision of what stayed float, "fp32" or "bf16".
    """

    def __init__(self, format_version: int = 0, backend: str = "", dtype: str = "") -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.backend = backend
        self.dtype = dtype

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read it; the version first, as another one may hold anything.

        Raises:
            CheckpointError: Another format version, or a field is missing.
        """
        version = config_dict.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {version}, this ipex_sq reads {FORMAT_VERSION}"
            )
        try:
            config = cls(version, config_dict["backend"], config_dict["dtype"])
        except KeyError as error:
            raise CheckpointError(f"quantization_config in config.json lacks {error}") from None
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer(QUANT_METHOD)
class Int8Quantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Steps of `from_pretrained` around transformers' loading of what stayed float.

    transformers 4.51 and 5 name some of them differently; both call the ones they know.
    """

    requires_calibration = True
    requires_parameters_quantization = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._saved: SavedModel | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot run here.

        Raises:
            BackendUnavailableError: The backend of the checkpoint cannot.
        """
        from ipex_sq.backends.registry import choose_backend

        del args, kwargs
        choose_backend(self.quantization_config.backend)

    def update_attn_implementation(self, config: Any) -> Any:
        """Verify the folder, before transformers looks for weights in it (5.x)."""
        self._open(config)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """Verify the folder, before transformers looks for weights in it (4.51)."""
        self._open(config)
        return config

    def update_dtype(self, dtype: Any) -> Any:
        """The precision of the checkpoint, whatever was asked for (5.x)."""
        own = self._dtype
        if dtype not in (None, "auto", own):
            logger.warning("%s was asked for: an int8 checkpoint keeps its %s", dtype, own)
        return own

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """fp32, in which the saved model was built too: 4.51 computes tables (GPT-J's) in this one.

        What is loaded keeps the precision of the checkpoint: see `update_expected_keys`.
        """
        self.update_dtype(torch_dtype)
        return torch.float32

    def update_expected_keys(self, model: Any, expected_keys: Any, loaded_keys: Any) -> Any:
        """The keys unchanged; from here on 4.51 casts what it loads to what the config says."""
        del loaded_keys
        model.config._pre_quantization_dtype = model.config.torch_dtype = self._dtype
        return expected_keys

    @property
    def _dtype(self) -> Any:
        from ipex_sq.backends.base import DTYPES

        return DTYPES[self.quantization_config.dtype]

    def update_device_map(self, device_map: Any) -> None:
        """None: everything is on the CPU.

        Raises:
            ConfigError: Another device was asked for.
        """
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        elsewhere = sorted({str(place) for place in places} - _HOSTS)
        if elsewhere:
            raise ConfigError(f"int8 checkpoints run on the CPU, not on {elsewhere[0]}")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        saved = self._open(model.config)
        if saved is None:
            raise CheckpointError(
                f"{model.config.name_or_path!r} is not a folder: download the whole repository "
                "and pass the folder"
            )
        saved.prepare(model)
        model._keys_to_ignore_on_load_unexpected = {".*"}  # `prepare` has found those that matter
        return model

    def update_unexpected_keys(self, model: Any, unexpected_keys: list[str], prefix: str) -> Any:
        """None: `SavedModel.prepare` has found those that matter."""
        del model, unexpected_keys, prefix
        return []

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from ipex_sq.checkpoint.saving import keep_savable

        del kwargs
        assert self._saved is not None  # noqa: S101
        self._saved.fill(model)
        return keep_savable(model)

    def _open(self, config: Any) -> SavedModel | None:
        from ipex_sq.checkpoint.assembling import SavedModel

        folder = Path(config.name_or_path or "")
        if self._saved is None and config.name_or_path and folder.is_dir():
            self._saved = SavedModel(folder)
        return self._saved

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Yes: `save_pretrained` of these models is `ipex_sq.save`."""
        del safe_serialization
        return True

    @property
    def is_trainable(self) -> bool:
        """No."""
        return False
