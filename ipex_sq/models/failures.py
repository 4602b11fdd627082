"""What transformers raises where it cannot load a model, as one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipex_sq.errors import CheckpointError, DataError, UnsupportedModelError
from ipex_sq.hub import hub_problem

MOST_CHARACTERS = 240
"""Of another program's message that is passed on."""


@contextmanager
def loading_errors(name: str, kind: str) -> Iterator[None]:
    """Around calls of transformers alone: all that its loaders raise on a bad model.

    Args:
        name: Of the model, as the user gave it.
        kind: What it should be.

    Raises:
        DataError: It is not found, or a file cannot be read.
        CheckpointError: Its weights are damaged, or do not fit the model of its config.json.
        UnsupportedModelError: It is of another kind, config.json describes no model, or a package
            is missing.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise _not_found(name, error) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{name}: its safetensors are damaged ({message(error)}): download or write it again"
        ) from error
    except RuntimeError as error:  # torch, of tensors
        raise CheckpointError(
            f"{name}: no model can be made of its config.json and weights: {message(error)}"
        ) from error
    except ImportError as error:
        raise UnsupportedModelError(
            f"{name} needs a package that is not installed: {message(error)}"
        ) from error
    except (TypeError, ArithmeticError, StrictDataclassError) as error:
        raise UnsupportedModelError(
            f"{name}: its config.json describes no {kind}: {message(error)}"
        ) from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{name} is not a {kind} that this transformers knows: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """Of the message; the name of the class where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def message(error: BaseException) -> str:
    """The start of the message in one line; the name of the class where there is none."""
    whole = " ".join(str(error).split()) or type(error).__name__
    return whole if len(whole) <= MOST_CHARACTERS else f"{whole[:MOST_CHARACTERS]} ..."


def _not_found(name: str, error: OSError) -> DataError:
    problem = hub_problem()
    if problem and not Path(name).exists():
        return DataError(
            f"{name} is not in the local cache and the hub is unreachable: {problem}. Pass a "
            "local folder, or leave the model out for the embedded one"
        )
    return DataError(f"{name} could not be loaded: {first_line(error)}")
