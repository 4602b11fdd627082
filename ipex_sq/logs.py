"""Other libraries speak up only about errors."""

from __future__ import annotations

import logging
import os
import warnings

CHATTY = (
    "httpx",
    "httpx2",
    "huggingface_hub",
    "datasets",
    "transformers",
    "torchao",
    "torch.utils.cpp_extension",  # its search for CUDA
    "torch.utils._pytree",  # how torchao registers its classes
    "IPEX",  # it puts its own `pad` into tokenizers, with advice
)


def quiet_libraries() -> None:
    """Keep from the screen what a user of this package can do nothing about.

    For programs, before they import torch: the settings of the whole process change.
    """
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's search for a GPU
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # operators that IPEX puts over torch's
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="JIT pass will be deprecated")  # of IPEX
