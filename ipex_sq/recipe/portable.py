"""Plans that the formats of other programs can say."""

from __future__ import annotations

from ipex_sq.errors import ConfigError
from ipex_sq.recipe.plan import DYNAMIC_INT8, QuantPlan


def check_portable(plan: QuantPlan) -> None:
    """Refuse a plan that does more than fold, round inputs and multiply.

    Raises:
        ConfigError: Names the Linears and why.
    """
    problems: dict[str, list[str]] = {}
    for name in plan.int8_names:
        prescale = plan.prescale_of(name)
        if prescale is not None:
            group = plan.groups[plan.linears[name].group].group
            why = "channels in parts"
            if prescale.divisor is not None:
                why = f"not folded: {group.fold_problem or 'nothing in front can take the scale'}"
            problems.setdefault(why, []).append(name)
    if plan.names(DYNAMIC_INT8):
        problems["rounded per token"] = plan.names(DYNAMIC_INT8)
    if plan.corrects_biases:
        problems["corrected biases"] = plan.int8_names
    if problems:
        listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in problems.items())
        raise ConfigError(
            f"what the compressed-tensors layout cannot say: {listed}. Quantize without "
            "SmoothQuant, or save in our own format"
        )
