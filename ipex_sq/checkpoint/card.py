"""The README.md of a checkpoint: what the model is, how it was made and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipex_sq.recipe.plan import DYNAMIC_INT8, FLOAT, STATIC_INT8, QuantPlan

_HEADER = """\
---
library_name: transformers
tags: [int8, w8a8, smoothquant, ipex_sq, cpu]{base}
---
# {name}

{model}in int8 (W8A8) for Xeon CPUs, made by ipex_sq {ipex_sq} on its `{backend}` backend.
"""

_TRANSFORMERS = """
```python
import ipex_sq  # tells transformers of the format
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/to/{name}")
```
"""

_IPEX = """
```python
import ipex_sq

model = ipex_sq.load("path/to/{name}")
```
"""


def model_card(plan: QuantPlan, manifest: Mapping[str, Any], name: str) -> str:
    """The card, in the form that the Hugging Face hub shows.

    Args:
        plan: What the model executes.
        manifest: Of the checkpoint; `made_from` may hold `model` and `measured`.
        name: Of the folder.
    """
    origin = str(manifest["made_from"].get("model", ""))
    public = bool(origin) and not Path(origin).is_absolute()
    kind = manifest["architecture"].rpartition("For")[2]
    fields = {
        "name": name,
        "model": f"{origin} " if public else "",
        "base": f"\nbase_model: {origin}" if public and "/" in origin else "",
        "backend": manifest["backend"],
        "ipex_sq": manifest["ipex_sq"],
        "auto_class": "AutoModelForCausalLM"
        if kind != "SequenceClassification"
        else "AutoModelForSequenceClassification",
    }
    usage = _TRANSFORMERS if manifest["backend"] == "native" else _IPEX
    sections = [(_HEADER + usage).format(**fields), _recipe(plan, manifest["dtype"])]
    sections.append(_accuracy(manifest["made_from"].get("measured", {})))
    versions = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())
    return "\n".join([*sections, f"Versions: {versions}.\n"])


def _recipe(plan: QuantPlan, dtype: str) -> str:
    counts = {mode: len(plan.names(mode)) for mode in (STATIC_INT8, DYNAMIC_INT8, FLOAT)}
    floats = ", ".join(f"{count} {reason}" for reason, count in plan.reasons(FLOAT).items())
    smoothing = "none" if plan.alpha is None else f"SmoothQuant, alpha {plan.alpha}"
    if plan.alpha_range and isinstance(plan.alpha, str):
        low, high = plan.alpha_range
        smoothing += f" ({low:g} to {high:g})"
    texts = plan.calibration
    source = ", ".join(f"{key} {value}" for key, value in texts.items() if _is_short(value))
    return "\n".join(
        [
            "## Recipe\n",
            f"- Linears: {counts[STATIC_INT8]} static int8, {counts[DYNAMIC_INT8]} int8 with "
            f"inputs rounded per token, {counts[FLOAT]} float ({floats or 'none'}); {dtype} "
            "elsewhere",
            f"- Smoothing: {smoothing}",
            f"- Weights: int8 per output channel, rounded by {plan.weight_rounding}; activations: "
            f"uint8, ranges by {plan.observer}",
            f"- Calibration: {source or 'unknown'}\n",
        ]
    )


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 40)


def _accuracy(measured: Mapping[str, Any]) -> str:
    rows = [f"| {key.replace('_', ' ')} | {value} |" for key, value in measured.items()]
    table = ["| measured | |", "|---|---|", *rows] if rows else ["Not measured when it was saved."]
    return "\n".join(["## Accuracy\n", *table, ""])
