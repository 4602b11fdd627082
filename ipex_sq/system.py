"""What this machine is and which versions run: the card that every result carries."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ipex_sq.errors import ConfigError
from ipex_sq.resources import cpu_quota, memory_limit

VERSIONED_PACKAGES = (
    "torch",
    "intel_extension_for_pytorch",
    "neural_compressor_pt",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
)

X86 = ("x86_64", "AMD64")
"""As `platform.machine` calls x86-64 on Linux and Windows."""

EXACT_INT8_ISA = ("AMX", "AVX512-VNNI", "AVX2-VNNI")
"""Instruction sets that add u8 x s8 products in 32 bits. Older ones saturate at 16."""


@dataclass(frozen=True)
class SystemCard:
    """The machine a result was measured on.

    Attributes:
        cpu: Model name as the kernel gives it.
        isa: Widest int8 instruction set that oneDNN can use: "AMX",
            "AVX512-VNNI", "AVX2-VNNI", "AVX512", "AVX2" or "none"; another
            machine than x86-64 by its name.
        bf16: True where bf16 has instructions of its own.
        cores: Physical cores.
        threads: That torch uses within an operator, in the process that wrote the result.
            Rows of the benchmark have their own.
        memory_bytes: Installed memory.
        memory_limit_bytes: That the cgroups of this process (a container) allow, or None.
        cpu_quota: CPU time that they allow, in cores, or None.
        allocator: What LD_PRELOAD puts in the place of the C library's, or "libc".
    """

    cpu: str
    isa: str
    bf16: bool
    cores: int
    threads: int
    memory_bytes: int
    memory_limit_bytes: int | None
    cpu_quota: float | None
    allocator: str
    platform: str

    @classmethod
    def read(cls) -> SystemCard:
        """Read the card of this machine (imports torch)."""
        import psutil
        import torch

        return cls(
            cpu=_cpu_name(),
            isa=int8_isa(),
            bf16=has_bf16_instructions(),
            cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
            threads=torch.get_num_threads(),
            memory_bytes=psutil.virtual_memory().total,
            memory_limit_bytes=memory_limit(),
            cpu_quota=cpu_quota(),
            allocator=_allocator(),
            platform=platform.platform(aliased=True, terse=True),
        )

    def as_dict(self) -> dict[str, object]:
        """The card as plain data, for JSON."""
        return asdict(self)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of <malloc.h>: how much freed memory stays, and from which size on a tensor is a mapping."""

_MOST_INT = 2**31 - 1


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first CPU, as Linux names them; empty elsewhere."""
    for line in _cpuinfo():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


_AMX = {"amx_tile", "amx_int8", "amx_bf16"}
_BF16 = _AMX | {"avx512_bf16"}
_AVX512 = _BF16 | {"avx512_vnni", "avx512bw"}
_NOT_USED = {
    "AVX512_CORE_FP16": _AMX,
    "AVX10_1_512": _AMX,
    "AVX512_CORE_BF16": _AMX,
    "AVX512_CORE_VNNI": _BF16,
    "AVX512_CORE": _BF16 | {"avx512_vnni", "avx_vnni"},
    "AVX2_VNNI_2": _AVX512,
    "AVX2_VNNI": _AVX512,
    "AVX2": _AVX512 | {"avx_vnni"},
    "AVX": _AVX512 | {"avx_vnni", "avx2"},
    "SSE41": _AVX512 | {"avx_vnni", "avx2"},
}
"""Flags that oneDNN leaves alone for each value of ONEDNN_MAX_CPU_ISA."""


def usable_flags() -> frozenset[str]:
    """Flags of the CPU that oneDNN may use: the user may have taken some away."""
    return cpu_flags() - _NOT_USED.get(_isa_cap().upper(), frozenset())


def _isa_cap() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))


def int8_isa() -> str:
    """Widest int8 instruction set that oneDNN may use on this CPU (see `SystemCard`)."""
    if platform.machine() not in X86:
        return platform.machine() or "none"
    flags = usable_flags()
    if {"amx_tile", "amx_int8"} <= flags:
        return "AMX"
    names = {"avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX2-VNNI", "avx512bw": "AVX512"}
    names |= {"avx2": "AVX2"}
    return next((name for flag, name in names.items() if flag in flags), "none")


def int8_problem() -> str | None:
    """Why this CPU cannot add int8 products exactly; None where it can."""
    isa = int8_isa()
    if isa in EXACT_INT8_ISA:
        return None
    cap = f" with ONEDNN_MAX_CPU_ISA={_isa_cap()}" if usable_flags() != cpu_flags() else ""
    if platform.machine() not in X86:
        found = f"this is {isa}"
    elif not cpu_flags():
        found = "of this one /proc/cpuinfo says nothing"
    elif isa == "none":
        found = f"this one has no AVX2{cap}"
    else:
        found = f"this one has {isa} only{cap}: int8 sums would saturate"
    return f"int8 needs an x86-64 CPU with AVX512-VNNI, AVX2-VNNI or AMX, {found}"


def has_bf16_instructions() -> bool:
    """True where oneDNN may multiply bf16 in hardware (AVX512-BF16 or AMX)."""
    return bool({"avx512_bf16", "amx_bf16"} & usable_flags())


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages of the field that are installed."""
    found = {name: installed_version(name) for name in VERSIONED_PACKAGES}
    installed = {name: version for name, version in found.items() if version is not None}
    return {"python": platform.python_version(), **installed}


def installed_version(package: str) -> str | None:
    """Version of a package, without importing it; None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command_line() -> str:
    """The command that runs, the script by its name only: paths of a machine tell nobody else."""
    script = Path(sys.argv[0]).name.replace("__main__.py", "-m ipex_sq")
    return " ".join(["python", script, *sys.argv[1:]])


def provenance() -> dict[str, Any]:
    """What every result carries about its making: `system`, `versions` and `command`."""
    return {
        "system": SystemCard.read().as_dict(),
        "versions": package_versions(),
        "command": command_line(),
    }


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """Turn "8GiB", "500MB" or a number of bytes into bytes.

    Raises:
        ConfigError: It is none of these, or not positive.
    """
    parts = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", text.strip().lower())
    try:
        size = int(float(parts[1]) * _UNITS[parts[2]]) if parts else 0
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"a size is written as 8GiB, 500MB or in bytes, not {text!r}")
    return size


def reset_peak_rss() -> None:
    """Make `peak_rss_bytes` count from now, without what is freed and kept.

    On Linux; elsewhere the peak stays the process's.
    """
    give_freed_memory_back()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_rss_bytes() -> int:
    """Largest resident memory since `reset_peak_rss`, in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _process_peak()
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else _process_peak()


def cache_directory() -> Path:
    """Where converted models live: `$IPEX_SQ_CACHE`, else `~/.cache/ipex_sq`."""
    chosen = os.environ.get("IPEX_SQ_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "ipex_sq"


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next batch.

    glibc gives large tensors back to the system and asks for them again in every layer: in the
    INT8 forward of SmolLM2, 16 x 196 tokens, 325,000 page faults took a third of the time.
    Does nothing for another allocator, or where the user has set glibc's up.
    """
    libc = _glibc()
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if libc is None or chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    # The second setting alone would make it worse: it freezes the first where it stands. Before
    # glibc 2.35 that takes no more than 32 MiB, and larger tensors are mapped anew.
    if any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in (_MOST_INT, 32 * 2**20)):
        libc.mallopt(_M_TRIM_THRESHOLD, _MOST_INT)


def give_freed_memory_back() -> None:
    """Return to the system what this process has freed and kept, as before a long sleep."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc and allocates."""
    if sys.platform != "linux" or _allocator() != "libc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _process_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _allocator() -> str:
    preloaded = [Path(item).name for item in os.environ.get("LD_PRELOAD", "").split(":")]
    return next((name for name in preloaded if "malloc" in name), "libc")


def _cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
