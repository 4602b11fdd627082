"""Data sets of the hub."""

from __future__ import annotations

import os
from typing import Any

from ipex_sq.config import EMBEDDED
from ipex_sq.errors import DataError
from ipex_sq.hub import hub_problem


def hub_rows(repository: str, split: str) -> Any:
    """A split of a data set, from the hub or its cache.

    Args:
        repository: As "owner/name".
        split: As `datasets.load_dataset` takes it, slices included.

    Returns:
        Rows that are indexed by column name.

    Raises:
        DataError: It is neither reachable nor cached.
    """
    problem = hub_problem()
    if problem:
        # Read before datasets is imported: without it every request is retried for minutes.
        os.environ["HF_DATASETS_OFFLINE"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    try:
        return datasets.load_dataset(repository, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        detail = problem or str(error).strip().splitlines()[0]
        raise DataError(
            f"{repository} ({split}) is neither reachable nor cached: {detail}; pass "
            f"--dataset {EMBEDDED} or a local .jsonl"
        ) from error
