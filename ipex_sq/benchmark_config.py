"""Settings of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ipex_sq.config import check_choice, check_positive, setting
from ipex_sq.errors import ConfigError
from ipex_sq.seeds import parse_seed

PREFILL, DECODE, LAMBADA, CLASSIFY = "prefill", "decode", "lambada", "classify"
WORKLOADS = (PREFILL, DECODE, LAMBADA)
LOGITS = ("all", "last")
LATENCY, THROUGHPUT = "latency", "throughput"
PRESETS = (LATENCY, THROUGHPUT)
SET_BY_PRESET = ("batch_size", "num_instances", "cores_per_instance", "numa")
PEERS = ("openvino", "onnxruntime", "ctranslate2", "pt2e")
"""Other toolkits that can be timed beside our backends."""


def parse_peers(text: str) -> tuple[str, ...]:
    """Turn the text of `--peers`, names with commas between, into these names.

    Raises:
        ConfigError: An unknown one.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        check_choice("peer", name, PEERS)
    return names


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is timed, how often, and on which cores (docs/protocol.md)."""

    workload: str = setting(
        PREFILL,
        "prefill: one forward pass; decode: generate() with its key-value cache, greedy; lambada: "
        "accuracy on its documents, latency of a batch of them and documents/s. A classifier has "
        "forward passes only",
        choices=WORKLOADS,
    )
    batch_size: int = setting(16, "sequences per batch", type=int)
    sequence_length: int = setting(196, "tokens per sequence (of the prompt)", type=int)
    new_tokens: int = setting(128, "tokens to generate per sequence in decode", type=int)
    logits: str = setting(
        "all",
        "positions whose logits prefill computes: all, or last as generate() needs",
        choices=LOGITS,
    )
    padded: bool = setting(
        False,
        "rows of different lengths, from a quarter of the sequence length up, padded to it",
        action="store_true",
    )
    rounds: int = setting(3, "turns that every model gets, in rotated order", type=int)
    min_runs: int = setting(3, "least number of runs in a turn", type=int)
    min_seconds: float = setting(1.0, "least duration of a turn", type=float)
    warmup: int = setting(
        2, "least number of untimed runs; more follow until they stop getting faster", type=int
    )
    preset: str | None = setting(
        None,
        "latency: single texts, instances of 4 cores side by side; throughput: batches, one "
        "instance for each NUMA node. Both use all cores (sets --batch_size, --num_instances, "
        "--cores_per_instance and --numa)",
        choices=PRESETS,
    )
    num_instances: int = setting(
        1, "processes that run the same model side by side, each on cores of its own", type=int
    )
    cores_per_instance: int | None = setting(
        None,
        "cores of each (default: all, shared evenly; with --numa as many as fit in a node)",
        type=int,
    )
    cores: str | None = setting(
        None,
        "CPUs to use as cores, as 0-3,8 (default: one CPU of each physical core that this process "
        "may use)",
    )
    numa: bool = setting(False, "keep every instance within one NUMA node", action="store_true")
    seed: int = setting(
        42, "seed of the random token ids, and of the choice of calibration texts", type=parse_seed
    )

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "sequence_length",
            "rounds",
            "min_runs",
            "warmup",
            "num_instances",
            "cores_per_instance",
        ):
            check_positive(name, getattr(self, name))
        if not 0.0 <= self.min_seconds < float("inf"):
            raise ConfigError(f"min_seconds must be 0 or more, not {self.min_seconds}")
        if self.new_tokens < 2:
            raise ConfigError(f"new_tokens must be at least 2, not {self.new_tokens}")
        check_choice("workload", self.workload, WORKLOADS)
        check_choice("logits", self.logits, LOGITS)
        if self.preset is not None:
            check_choice("preset", self.preset, PRESETS)
            self._check_left_to_preset()

    def _check_left_to_preset(self) -> None:
        for item in fields(self):
            if item.name in SET_BY_PRESET and getattr(self, item.name) != item.default:
                raise ConfigError(f"--preset {self.preset} sets --{item.name}: leave one out")

    @property
    def pinned(self) -> bool:
        """Whether processes are bound to cores."""
        chosen = (self.cores_per_instance, self.cores)
        return self.num_instances > 1 or self.numa or any(item is not None for item in chosen)
