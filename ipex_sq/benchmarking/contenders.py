"""What is compared: the float baselines, int8 of our backends, and what others would run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ipex_sq.backends.base import Backend
from ipex_sq.backends.native import NativeBackend
from ipex_sq.backends.quantization import check_config, quantize_model, rounding
from ipex_sq.backends.registry import choose_backend
from ipex_sq.benchmarking.peers import PEERS, Peer, build_peer, check_peer
from ipex_sq.benchmarking.subjects import Subject
from ipex_sq.benchmarking.work import Work, work_of
from ipex_sq.checkpoint.folders import read_manifest
from ipex_sq.checkpoint.plans import load_plan
from ipex_sq.checkpoint.saving import load
from ipex_sq.config import AUTO, QuantConfig
from ipex_sq.errors import ConfigError
from ipex_sq.models.loading import load_tokenizer, skeleton
from ipex_sq.models.topology import language_head

EAGER, COMPILED = "eager", "compiled"


@dataclass(frozen=True)
class Contender:
    """One model to time.

    Attributes:
        label: "fp32", "bf16", or the recipe: "int8", "int8+sq", "int8 dynamic".
        backend: "eager", "compiled", an int8 backend or a peer.
        precision: "fp32", "bf16" or "int8".
        quant: Recipe of an int8 one that is quantized now.
        checkpoint: Folder of an int8 one that is loaded.
    """

    label: str
    backend: str
    precision: str
    quant: QuantConfig | None = None
    checkpoint: str | None = None

    def __str__(self) -> str:
        """As in progress bars and messages."""
        return f"{self.label} {self.backend}"

    @property
    def peer(self) -> Peer | None:
        """The other toolkit that it is of."""
        return PEERS.get(self.backend)

    @property
    def float_precision(self) -> str:
        """What stays float runs in this precision."""
        if self.precision != "int8" or self.peer:
            return self.precision
        wanted = self.quant.dtype if self.quant else None
        return wanted or choose_backend(self.backend).backend.float_dtype

    def head_precision(self, model: nn.Module) -> str:
        """The head of the float `model` runs in this precision."""
        if self.quant is not None:
            backend = choose_backend(self.quant.backend).backend
            if isinstance(backend, Backend) and rounding(self.quant, backend, model).lm_head:
                return "int8"
        return self.float_precision


def contenders(quants: list[tuple[str, QuantConfig]], *, compare: bool) -> list[Contender]:
    """The float baselines, each with and without compilation, then the int8 models asked for.

    fp32 is compiled only to `compare`: the baseline of every speedup is fp32 as transformers runs
    it.
    """
    baselines = [("fp32", EAGER), ("fp32", COMPILED), ("bf16", EAGER), ("bf16", COMPILED)]
    found = [
        Contender(label, backend, label)
        for label, backend in baselines
        if compare or (label, backend) != ("fp32", COMPILED)
    ]
    return found + [Contender(label, item.backend, "int8", item) for label, item in quants]


def peer_contenders(names: Sequence[str]) -> list[Contender]:
    """Int8 of other toolkits, by name."""
    return [Contender(PEERS[name].label, name, "int8") for name in names]


def int8_quants(
    backends: tuple[str, ...], labels: tuple[str, ...], *, lm_head: bool | None = None
) -> list[tuple[str, QuantConfig]]:
    """Recipes to time: each label ("int8", "int8+sq") on each backend.

    Args:
        backends: Names.
        labels: "int8", "int8+sq".
        lm_head: With the head in int8; None: as `QuantConfig` decides.

    Raises:
        ConfigError: A backend whose speed says nothing, or that keeps the head float.
    """
    for name in backends:
        if choose_backend(name).backend.name in ("inc", "reference"):
            raise ConfigError(f"backend {name!r} is not timed: use native or ipex")
    alphas = {"int8": None, "int8+sq": AUTO}
    quants = [
        (label, QuantConfig(alpha=alphas[label], backend=name, quant_lm_head=lm_head))
        for name in backends
        for label in labels
    ]
    for _, quant in quants:
        check_config(quant)
    return quants


@dataclass(frozen=True)
class Prepared:
    """A model to time.

    Attributes:
        vocabulary: Number of token ids.
        tokenizer: Of a language model with weights.
        work: What its Linears do.
    """

    model: nn.Module
    vocabulary: int
    tokenizer: Any
    work: Work


def prepare(contender: Contender, subject: Subject, *, generates: bool = False) -> Prepared:
    """Load the model and put it into the form that is timed.

    Args:
        contender: Which.
        subject: What it is made of.
        generates: Whether `generate` is asked for: a peer may need another graph.
    """
    if contender.checkpoint is not None:
        return _from_checkpoint(contender, Path(contender.checkpoint))
    if contender.peer:
        check_peer(contender.backend, generates=generates)
    loaded = subject.load()
    model, batches = loaded.model, loaded.batches
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    work = work_of(model, contender.precision, contender.head_precision(model))
    if contender.peer:
        model = build_peer(contender.backend, model, batches, generates=generates)
    elif contender.quant is not None:
        model = quantize_model(model, batches, contender.quant).model
    elif contender.backend == COMPILED:
        model = NativeBackend().optimize_float(model, contender.precision, {})
    else:
        model = Backend.optimize_float(NativeBackend(), model, contender.precision, {})
    return Prepared(model, vocabulary, loaded.tokenizer, work)


def _from_checkpoint(contender: Contender, folder: Path) -> Prepared:
    """As a server starts: no float model, no calibration."""
    manifest = read_manifest(folder)
    model = load(folder)
    # Its Linears are counted in the model without weights: a traced one cannot be looked into.
    float_model = skeleton(folder, manifest["attention"], manifest["task"])
    int8_head = language_head(float_model) in load_plan(folder).int8_names
    work = work_of(float_model, contender.precision, "int8" if int8_head else manifest["dtype"])
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    return Prepared(model, vocabulary, load_tokenizer(str(folder)), work)
