"""Intel Extension for PyTorch 2.8: its graph runs the numbers of our plan.

IPEX prepares the model and writes its settings to a file; the plan's scales go into that file,
everything but the planned Linears is set to float, and convert, trace and freeze follow. All that
touches IPEX is here: it is archived upstream, and removing this file removes it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.backends.base import DTYPES, Backend, Example
from ipex_sq.backends.native import int8_linear
from ipex_sq.compiling.compiled_layers import compiler_problem
from ipex_sq.errors import BackendUnavailableError, NumericalCheckError
from ipex_sq.kernels.brgemm import brgemm_built
from ipex_sq.kernels.head import widen_logits
from ipex_sq.models.body import BodyForTracing, ReplacedBody, replace_body
from ipex_sq.models.folding import replace_module, smoothed_linear
from ipex_sq.models.topology import language_head
from ipex_sq.recipe.plan import DYNAMIC_INT8, STATIC_INT8, LinearPlan, PreScale, QuantPlan
from ipex_sq.recipe.qparams import ActivationQParams
from ipex_sq.recipe.splitting import append_rest, before_parts
from ipex_sq.system import (
    installed_version,
    int8_isa,
    int8_problem,
    keep_freed_memory,
    usable_flags,
)

PACKAGE = "intel_extension_for_pytorch"
IPEX_VERSION = "2.8"
TRANSFORMERS_BELOW = (4, 53)
WARMUP_CALLS = 2
"""The graph compiler profiles in the first call and fuses in the second."""

LINEAR_OP = "<class 'torch.nn.modules.linear.Linear'>"


class PreparedInput(nn.Module):
    """A Linear whose input is smoothed, in parts, and fp32 even under autocast; IPEX rounds it.

    IPEX silently leaves a Linear in bf16 where its input is bf16 (seen 2026-11-22: 60 of 210 in
    SmolLM2).

    Attributes:
        inverse_scale: `[in_features]`, 1/s, or None.
        channels: `[copies]`, channels with further parts (`recipe/splitting.py`), or None.
        held_low, held_high: `[copies]`, what the parts before each copy hold, or None.
    """

    inverse_scale: Tensor | None
    channels: Tensor | None
    held_low: Tensor | None
    held_high: Tensor | None

    def __init__(
        self, linear: nn.Module, prescale: PreScale | None, activation: ActivationQParams
    ) -> None:
        super().__init__()
        self.linear = linear
        divisor, channels = (prescale.divisor, prescale.channels) if prescale else (None, None)
        held = before_parts(channels, *activation.ends) if channels is not None else (None, None)
        self.register_buffer("inverse_scale", None if divisor is None else 1.0 / divisor)
        self.register_buffer("channels", channels)
        self.register_buffer("held_low", held[0])
        self.register_buffer("held_high", held[1])

    def forward(self, x: Tensor) -> Tensor:
        """Map x `[..., in_features]` to `[..., out_features]`."""
        x = x.float()
        if self.inverse_scale is not None:
            x = x * self.inverse_scale
        if self.channels is not None:
            assert self.held_low is not None and self.held_high is not None  # noqa: S101, PT018
            x = append_rest(x, self.channels, (self.held_low, self.held_high))
        output: Tensor = self.linear(x)
        return output


class IpexBackend(Backend):
    """IPEX's graph compiler on oneDNN.

    It rounds activations per tensor only. Linears that the plan rounds per token run inside its
    graph as an operator of our own; so does a language model's head, behind the graph.
    """

    name = "ipex"
    float_dtype = "bf16"

    @property
    def rounds_tokens(self) -> bool:  # type: ignore[override]
        """Where our operator can be built."""
        return "avx512_vnni" in usable_flags() and compiler_problem() is None

    @property
    def kernels(self) -> str:  # type: ignore[override]
        """The graph compiler and the instruction set that it picks."""
        return f"IPEX oneDNN graph {int8_isa()}"

    def unsupported_reasons(self) -> list[str]:
        """Not installed, another version, a transformers it cannot intercept, old CPU."""
        version = installed_version(PACKAGE)
        if version is None:
            return ["intel-extension-for-pytorch is not installed: use requirements.txt"]
        reasons = []
        torch_release = ".".join(torch.__version__.split(".")[:2])
        if not version.startswith(IPEX_VERSION) or torch_release != IPEX_VERSION:
            found = f"IPEX {version} with torch {torch.__version__}"
            reasons.append(f"{found}: both must be {IPEX_VERSION}")
        transformers = installed_version("transformers") or "0.0"
        if tuple(int(part) for part in transformers.split(".")[:2]) >= TRANSFORMERS_BELOW:
            reasons.append(f"transformers {transformers}: IPEX works up to 4.52")
        if problem := int8_problem():
            reasons.append(problem)
        return reasons

    def lower(self, model: nn.Module, plan: QuantPlan, example: Example, dtype: str) -> nn.Module:
        """Prepare, write the plan into IPEX's settings, convert, trace, freeze.

        Raises:
            BackendUnavailableError: The plan rounds per token and our operator does not build.
            NumericalCheckError: IPEX would run other Linears in int8 than the plan says.
        """
        names, inputs = tracing_inputs(example)
        head = language_head(model)
        for name in plan.names(DYNAMIC_INT8):
            linear = _per_token_linear(model, plan, name, wide=name == head)
            replace_module(model, name, linear.to(DTYPES[dtype]))
        for name in plan.names(STATIC_INT8):
            activation = plan.linears[name].activation
            assert activation is not None  # noqa: S101
            smoothed, prescale = smoothed_linear(model, name), plan.prescale_of(name)
            replace_module(model, name, PreparedInput(smoothed, prescale, activation))
        body = BodyForTracing(model.base_model, names).eval()  # type: ignore[arg-type]
        with quiet_ipex(), torch.no_grad(), _autocast(dtype):
            frozen = _graph(body, plan, inputs, str(model.base_model_prefix))
        # Outside autocast, as it will be called: the executor profiles each setting anew, and
        # until then bf16 bits differ from call to call.
        with quiet_ipex():
            warm_up(frozen, inputs)
        return with_graph(model, frozen, dtype, names)


def _per_token_linear(model: nn.Module, plan: QuantPlan, name: str, *, wide: bool) -> nn.Module:
    linear = int8_linear(model, plan, name)
    linear.wide_output = wide
    if not linear.only_rows():
        reason = f"{name!r} cannot be rounded per token: use --activations static"
        raise BackendUnavailableError(IpexBackend.name, [reason])
    return linear


def with_graph(model: nn.Module, graph: Any, dtype: str, names: tuple[str, ...]) -> nn.Module:
    """Put a graph that takes the tensors `names` in the place of the body; in place."""
    model = replace_body(model, ReplacedBody(graph, DTYPES[dtype], names))
    widen_logits(model)
    keep_freed_memory()
    return model


def _graph(body: nn.Module, plan: QuantPlan, inputs: tuple[Any, ...], prefix: str) -> Any:
    import intel_extension_for_pytorch as ipex
    from intel_extension_for_pytorch.quantization import convert, prepare

    mapping = ipex.quantization.default_static_qconfig_mapping
    prepared = prepare(body, mapping, example_inputs=inputs, inplace=True)
    prepared(*inputs)
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "qconf.json"
        prepared.save_qconf_summary(str(settings))
        document = json.loads(settings.read_text(encoding="utf-8"))
        write_plan(document, plan, prefix)
        settings.write_text(json.dumps(document), encoding="utf-8")
        prepared.load_qconf_summary(str(settings))
    converted = convert(prepared, inplace=True)
    traced = torch.jit.trace(converted, inputs, check_trace=False)
    lowered, wanted = count_int8_linears(traced), len(plan.names(STATIC_INT8))
    if lowered != wanted:
        raise NumericalCheckError(f"IPEX runs {lowered} Linears in int8, the plan has {wanted}")
    return torch.jit.freeze(traced.eval())


def count_int8_linears(traced: Any) -> int:
    """Linears of a traced (not yet frozen) graph whose input was quantized."""
    graph = traced.inlined_graph  # a copy: its nodes live only as long as it does
    nodes = graph.findAllNodes("aten::linear", True)
    return sum(_reads_int8(node.inputsAt(0)) for node in nodes)


def _reads_int8(value: Any) -> bool:
    node = value.node()
    while node.kind() in ("aten::to", "aten::alias"):  # the cast to bf16 stands between
        node = node.inputsAt(0).node()
    return str(node.kind()) == "aten::dequantize"


def tracing_inputs(example: Example) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Names and tensors of two rows of the example, one of them padded.

    Without padding transformers drops the mask while IPEX prepares but builds it while torch
    traces, and the two would see different operators.
    """
    ids = example["input_ids"][:1].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in example:
        given["token_type_ids"] = example["token_type_ids"][:1].repeat(2, 1)
    return tuple(given), tuple(given.values())


def warm_up(graph: Any, inputs: tuple[Any, ...]) -> Any:
    """Call the graph until it is fused."""
    with torch.no_grad():
        for _ in range(WARMUP_CALLS):
            graph(*inputs)
    return graph


def load_graph(path: Path) -> Any:
    """Read a saved graph, after IPEX's operators and our own, which it may call."""
    brgemm_built()
    with quiet_ipex():
        return torch.jit.freeze(torch.jit.load(str(path)).eval())


def write_plan(document: dict[str, Any], plan: QuantPlan, prefix: str) -> None:
    """Put the plan's scales into IPEX's settings and everything else into float, in place.

    Raises:
        NumericalCheckError: IPEX does not list a Linear that the plan wants in int8.
    """
    planned = {
        f"body.{name.removeprefix(f'{prefix}.')}.linear": name for name in plan.names(STATIC_INT8)
    }
    written = set()
    for module in document.values():
        for operator in module.get("q_op_infos", {}).values():
            name = planned.get(operator["fqn"]) if operator["op_type"] == LINEAR_OP else None
            if name is None:
                _keep_float(operator)
            else:
                _write_linear(operator, plan.linears[name])
                written.add(name)
    missing = sorted(set(planned.values()) - written)
    if missing:
        raise NumericalCheckError(
            f"IPEX lists no operator for {len(missing)} planned Linear(s), the first is "
            f"{missing[0]!r}: they would run in float"
        )


def _keep_float(operator: dict[str, Any]) -> None:
    for info in (*operator["input_tensor_infos"], *operator["weight_tensor_infos"]):
        if info:
            info["inf_dtype"] = info["force_dtype"] = "torch.float32"


def _write_linear(operator: dict[str, Any], item: LinearPlan) -> None:
    assert item.activation is not None and item.weight_scale is not None  # noqa: S101, PT018
    (activation,) = operator["input_tensor_infos"]
    activation["inf_dtype"] = activation["force_dtype"] = "torch.quint8"
    activation["scale"] = [item.activation.scale]
    activation["zero_point"] = [item.activation.zero_point]
    (weight,) = operator["weight_tensor_infos"]
    weight["inf_dtype"] = "torch.qint8"
    weight["scale"] = item.weight_scale.tolist()


def _autocast(dtype: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16")


@contextlib.contextmanager
def quiet_ipex() -> Iterator[None]:
    """Import IPEX; its and the tracer's notes (folding hints, tensor-to-bool) are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Before its logger is asked for, which is of a class that IPEX brings.
        import intel_extension_for_pytorch  # noqa: F401

        logger = logging.getLogger("IPEX")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
