"""Is the Hugging Face hub in reach? Asked once, answered within seconds.

The hub client retries for minutes where a network swallows packets; one short request first
decides whether it is asked at all. Caches still work offline.
"""

from __future__ import annotations

import functools
import os
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 3.0


@functools.cache
def hub_problem() -> str | None:
    """Why the hub cannot be used, or None where it answers (any HTTP status is an answer)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):  # noqa: S310
            return None
    except urllib.error.HTTPError:
        return None
    except (urllib.error.URLError, OSError, ValueError) as error:
        return f"{endpoint} does not answer ({getattr(error, 'reason', error)})"
