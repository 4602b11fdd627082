"""What transformers is told of int8 checkpoints: its `from_pretrained` then loads them.

Imported by `ipex_sq.registration` in the middle of importing transformers: light at module level.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ipex_sq.checkpoint.folders import FORMAT_VERSION, QUANT_METHOD
from ipex_sq.errors import CheckpointError, ConfigError
from ipex_sq.models.int8_folders import MANIFEST

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
        self._look(config)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """Verify the folder, before transformers looks for weights in it (4.51)."""
        self._look(config)
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

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        del kwargs
        saved = self._open(_folder_of(checkpoint_files or _files_of_caller()))
        wanted, got = saved.manifest["dtype"], self.quantization_config.dtype
        if wanted != got:
            raise CheckpointError(
                f"the weights are of a checkpoint in {wanted}, the config is of one in {got}: "
                "leave config= out"
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
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_is_quantized"):  # FalconMamba asks, and has another last bit then
                del config._is_quantized
        return keep_savable(model)

    def _look(self, config: Any) -> None:
        """Verify the folder that the config names, where it is a checkpoint.

        Most often it is the one that is loaded. The weights may yet come from another: a subfolder,
        or that of another config.
        """
        folder = Path(config.name_or_path or "")
        if config.name_or_path and (folder / MANIFEST).is_file():
            self._open(folder)

    def _open(self, folder: Path) -> SavedModel:
        from ipex_sq.checkpoint.assembling import SavedModel

        if self._saved is None or self._saved.folder != folder:
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


def _files_of_caller() -> list[str]:
    """The weights that transformers 4.51 has chosen.

    It does not pass them on as later ones do: they are a variable of `from_pretrained`, which has
    called. None are found where a release calls it otherwise.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained" and "checkpoint_files" in frame.f_locals:
            return frame.f_locals["checkpoint_files"] or []
        frame = frame.f_back
    return []


def _folder_of(files: Sequence[str]) -> Path:
    """Where the weights are: the int8 Linears and the plan must come from there and nowhere else.

    Raises:
        CheckpointError: Nowhere, or in several folders.
    """
    folders = {Path(file).parent for file in files}
    if len(folders) != 1:
        raise CheckpointError(
            "an int8 checkpoint is one folder of files: pass it, without state_dict; of a hub "
            "name, download the whole repository"
        )
    return folders.pop()
