"""Whether a checkpoint holds float weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from ipex_sq.errors import UnsupportedModelError

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""As safetensors names them. 8-bit floats are scaled, as integers are."""


def refuse_integer_weights(folder: Path) -> None:
    """Refuse weights that are not float; transformers would take integers as they stand.

    Args:
        folder: Its files are read where it is one; a hub name is not looked up.

    Raises:
        UnsupportedModelError: Names the first.
        SafetensorError: A file is damaged.
    """
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if name.endswith(".weight") and dtype not in _FLOATS:
                    raise UnsupportedModelError(
                        f"{folder}: {name!r} is stored as {dtype}, so it is quantized: pass a "
                        "float checkpoint"
                    )
