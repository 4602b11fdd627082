"""Smoothing a float model in place, and the proof that it did not change.

The scale of a smooth group goes into the norm or Linear that produced the tensor (fold) or becomes
a multiplication in front of its Linears (pre-scale). Afterwards every Linear's output and the
logits must equal those before: a fold that fails becomes a pre-scale, and if that does not mend it
`NumericalCheckError` names the Linear.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.errors import NumericalCheckError
from ipex_sq.models.running import run_model
from ipex_sq.recipe.hooks import hooked
from ipex_sq.recipe.plan import FOLD, GroupPlan, PreScale, QuantPlan, producer_scale
from ipex_sq.recipe.splitting import append_copies, number_of_parts

EQUIVALENCE_TOLERANCE = 1e-3
"""Largest relative change ||after - before|| / ||before|| of a Linear's output or of the logits.

fp32 rounding through 30 layers of SmolLM2-135M, whose inputs reach 3,000, measures near 1e-5; a
fold into the wrong norm measures above 0.1.
"""

_PROBE_TOLERANCE = 1e-4


class PreScaledLinear(nn.Module):
    """A float Linear whose input is divided by the smoothing scale first.

    Each part of a channel gets an equal share. Backends round inputs in their own way and look at
    the Linear alone.

    Attributes:
        linear: Holds the smoothed weight, `[out_features, in_features + copies]`.
        inverse_scale: `[in_features]`, 1 / (s * parts); without s where the producer has taken it.
        channels: `[copies]`, or None.
    """

    inverse_scale: Tensor
    channels: Tensor | None

    def __init__(self, linear: nn.Linear, prescale: PreScale) -> None:
        super().__init__()
        self.linear = linear
        copies = 0 if prescale.channels is None else len(prescale.channels)
        divisor = number_of_parts(prescale.channels, linear.in_features - copies)
        if prescale.divisor is not None:
            divisor = divisor * prescale.divisor
        self.register_buffer("inverse_scale", (1.0 / divisor).to(linear.weight.dtype))
        self.register_buffer("channels", prescale.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x `[..., in_features]` to `[..., out_features]`."""
        output: Tensor = self.linear(append_copies(x * self.inverse_scale, self.channels))
        return output

    @property
    def weight(self) -> Tensor:
        """The smoothed weight, for code that asks a Linear for its dtype or device."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, which smoothing leaves alone."""
        return self.linear.bias


def fold_form(norm: nn.Module, features: int) -> str | None:
    """How a norm's output is scaled through its weight, found by trying it on a copy.

    Returns:
        "direct" (weight and bias are divided), "offset" (the norm multiplies by 1 + weight), or
        None where neither scales the output.
    """
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape != (features,):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, features, generator=generator, dtype=weight.dtype)
    scale = torch.rand(features, generator=generator) + 0.5
    with torch.no_grad():
        wanted = norm(x) / scale
        for form in ("direct", "offset"):
            trial = copy.deepcopy(norm)
            fold_scale(trial, scale, form)
            if _relative_change(wanted, trial(x)) < _PROBE_TOLERANCE:
                return form
    return None


def fold_scale(norm: nn.Module, scale: Tensor, form: str) -> None:
    """Divide the output of `norm` by `scale` `[features]` through its parameters, in place."""
    with torch.no_grad():
        weight = norm.weight
        assert isinstance(weight, Tensor)  # noqa: S101
        divided = (weight + 1.0) / scale - 1.0 if form == "offset" else weight / scale
        weight.copy_(divided)
        bias = getattr(norm, "bias", None)
        if bias is not None:
            bias.div_(scale)


def apply_smoothing(
    model: nn.Module, plan: QuantPlan, example: Mapping[str, Tensor]
) -> tuple[QuantPlan, float]:
    """Smooth `model` in place as `plan` says, and prove that it computes what it did.

    A fold that changes an output is undone and replaced by a pre-scale.

    Args:
        model: Float model; its norms and Linears are changed.
        plan: Says where each scale goes.
        example: A calibration batch.

    Returns:
        The plan as it was carried out (failed folds say so in `fold_problem`), and the largest
        relative change seen (0.0 where the plan smooths nothing).

    Raises:
        NumericalCheckError: A Linear's output or the logits changed beyond `EQUIVALENCE_TOLERANCE`,
            and no fold is left that could be the cause.
    """
    _untie(model, plan)
    smoothed = [item for item in plan.groups.values() if item.scale is not None]
    if not smoothed:
        return plan, 0.0
    before = _outputs(model, plan, example)
    for item in smoothed:
        _smooth_group(model, plan, item)
    while True:
        changes = _changes(before, _outputs(model, plan, example), plan)
        failed = [name for name, change in changes.items() if not change <= EQUIVALENCE_TOLERANCE]
        if not failed:
            return plan, max(changes.values())
        problem = f"the fold changed {failed[0]!r} by {changes[failed[0]]:.2g}"
        suspect = _suspect(plan, failed[0])
        if suspect is None:
            raise NumericalCheckError(
                f"smoothing changed {failed[0]!r} by {changes[failed[0]]:.2g} (relative; at most "
                f"{EQUIVALENCE_TOLERANCE:g} is rounding): its smooth group is wrong. Nothing was "
                "quantized; report the model"
            )
        plan = _undo_fold(model, plan, suspect, problem)


def _untie(model: nn.Module, plan: QuantPlan) -> None:
    """Give an int8 head that shares the weight of the embeddings one of its own."""
    shared = Counter(id(module.weight) for module in model.modules() if _has_parameter(module))
    for name in plan.int8_names:
        linear = smoothed_linear(model, name)
        if shared[id(linear.weight)] > 1:
            linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
            config: Any = model.config
            config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False


def _has_parameter(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), Tensor)


def _smooth_group(model: nn.Module, plan: QuantPlan, item: GroupPlan) -> None:
    assert item.scale is not None  # noqa: S101
    for name in item.group.readers:
        linear = smoothed_linear(model, name)
        smoothed = append_copies(linear.weight.detach() * item.scale, item.channels)
        linear.weight = nn.Parameter(smoothed, requires_grad=linear.weight.requires_grad)
        linear.in_features = smoothed.shape[1]
        prescale = plan.prescale_of(name)
        if prescale is not None:
            replace_module(model, name, PreScaledLinear(linear, prescale))
    if item.placement == FOLD:
        _scale_producer(model, item, 1)


def _scale_producer(model: nn.Module, item: GroupPlan, sign: int) -> None:
    """Divide the producer's output by the group's scale (`sign` 1), or undo it (-1)."""
    assert item.scale is not None and item.group.producer is not None  # noqa: S101, PT018
    if item.group.producer_channels is not None:
        linear = smoothed_linear(model, item.group.producer)
        divide_rows(linear, producer_scale(item, linear.out_features).pow(sign))
        return
    norm = model.get_submodule(item.group.producer)
    form = fold_form(norm, item.scale.numel())
    if form is None:
        raise NumericalCheckError(
            f"{item.group.producer!r} cannot take the scale of {item.group.key!r}: scaling "
            "its weight does not scale its output"
        )
    fold_scale(norm, item.scale.pow(sign), form)


def divide_rows(linear: nn.Linear, scale: Tensor) -> None:
    """Divide the output of `linear` by `scale` `[out_features]`, in place."""
    with torch.no_grad():
        linear.weight.div_(scale[:, None])
        if linear.bias is not None:
            linear.bias.div_(scale)


def _suspect(plan: QuantPlan, failed: str) -> str | None:
    """The fold behind a changed output: of its own group, else the last one before it."""
    folds = [key for key, item in plan.groups.items() if item.placement == FOLD]
    own = plan.linears[failed].group if failed in plan.linears else ""
    if own in folds:
        return own
    order = list(plan.groups)
    earlier = order[: order.index(own)] if own in order else order
    found = [key for key in folds if key in earlier]
    return found[-1] if found else None


def _undo_fold(model: nn.Module, plan: QuantPlan, key: str, problem: str) -> QuantPlan:
    _scale_producer(model, plan.groups[key], -1)
    plan = plan.without_fold(key, problem)
    for name in plan.groups[key].group.readers:
        prescale = plan.prescale_of(name)
        assert prescale is not None  # noqa: S101
        replace_module(model, name, PreScaledLinear(smoothed_linear(model, name), prescale))
    return plan


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at path `name` of `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def replace_linear(model: nn.Module, name: str, linear: nn.Module) -> None:
    """Put `linear` in the place of the Linear at path `name`, behind its pre-scale."""
    prescaled = isinstance(model.get_submodule(name), PreScaledLinear)
    replace_module(model, f"{name}.linear" if prescaled else name, linear)


def smoothed_linear(model: nn.Module, name: str) -> nn.Linear:
    """The Linear at path `name`, whether or not a pre-scale stands in front of it."""
    module = model.get_submodule(name)
    inner = module.linear if isinstance(module, PreScaledLinear) else module
    assert isinstance(inner, nn.Linear)  # noqa: S101
    return inner


def _outputs(model: nn.Module, plan: QuantPlan, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with _record_outputs(model, plan.int8_names) as outputs, torch.no_grad():
        outputs["logits"] = run_model(model, example)
    return outputs


@contextmanager
def _record_outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    outputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output.detach().clone()

        return hook

    with hooked(model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names):
        yield outputs


def _changes(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], plan: QuantPlan
) -> dict[str, float]:
    """Relative change of every output, in order of execution."""
    changes = {}
    for name, wanted in before.items():
        scale = plan.output_scale(name, wanted.shape[-1])
        changes[name] = _relative_change(wanted if scale is None else wanted / scale, after[name])
    return changes


def _relative_change(before: Tensor, after: Tensor) -> float:
    reference = before.float().norm().clamp(min=1e-12)
    return float((after.float() - before.float()).norm() / reference)
