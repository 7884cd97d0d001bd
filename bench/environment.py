"""What a measurement ran on: the block that stands above every table and inside every result file."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastnets.fused.choices import cpu_name

# Variables that change how memory is allocated or how many threads run, and so the figures.
_VARIABLES = (
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
    "THP_MEM_ALLOC_ENABLE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "FASTNETS_BACKEND",
    "FASTNETS_DISABLE",
    "TRITON_INTERPRET",
)

ALLOCATORS: dict[str, dict[str, str]] = {
    "stock": {},
    # torch asks the kernel for huge pages in its own CPU allocator: far fewer page faults
    "thp": {"THP_MEM_ALLOC_ENABLE": "1"},
    # glibc keeps freed pages instead of returning them: no page faults once warm, more resident memory
    "keep-pages": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        "MALLOC_TOP_PAD_": "268435456",
    },
}
"""Allocator settings by name, as environment variables that must be set before the process starts."""


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree this file lies in, with ``+changes`` where the tree differs; None in a
    wheel.
    """
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not (Path(git("rev-parse", "--show-toplevel")) / "fastnets" / "__init__.py").exists():
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _onednn_version() -> str | None:
    match = re.search(r"(?:oneDNN|MKL-DNN) v([\w.]+)", torch.__config__.show())
    return match.group(1) if match else None


def allocator() -> str:
    """Which CPU allocator serves this process, as far as its environment tells."""
    for library in ("jemalloc", "tcmalloc", "mimalloc"):
        if library in os.environ.get("LD_PRELOAD", ""):
            return library
    for name, settings in ALLOCATORS.items():
        if settings and all(os.environ.get(key) == value for key, value in settings.items()):
            return name
    if any(key.startswith(("MALLOC_", "THP_")) or key == "GLIBC_TUNABLES" for key in os.environ):
        return "custom"
    return "stock"


def _cuda_driver() -> str | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _gpu_state(device: torch.device) -> dict[str, str]:
    """Driver and clocks of a GPU, as ``nvidia-smi`` tells them; empty where it cannot be asked."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    asked = ",".join(fields)
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        identifier = str(torch.cuda.get_device_properties(index).uuid)
        told = subprocess.run(
            ["nvidia-smi", f"--id=GPU-{identifier}", f"--query-gpu={asked}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError, AttributeError):
        return {}
    values = [value.strip() for value in told.strip().split(",")]
    return dict(zip(fields, values)) if len(values) == len(fields) else {}


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Everything about this process and machine that a reader of a figure may ask for.

    The result holds only JSON types. ``device`` is the one measured on.
    """
    import fastnets

    device = torch.device(device)
    facts: dict[str, Any] = {
        "fastnets": fastnets.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "allocator": allocator(),
        "torch": torch.__version__,
        "onednn": _onednn_version(),
        "triton": installed_version("triton"),
        "torchvision": installed_version("torchvision"),
        "timm": installed_version("timm"),
        "device": str(device),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device_name"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["device_memory_bytes"] = properties.total_memory
        facts["cuda"] = torch.version.cuda
        facts["cuda_driver"] = _cuda_driver()
        facts["gpu"] = _gpu_state(device)
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        facts["tf32_convolutions"] = torch.backends.cudnn.allow_tf32
        facts["tf32_matmul"] = torch.backends.cuda.matmul.allow_tf32
    return facts


def is_busy(facts: dict[str, Any]) -> bool:
    """Whether other processes were taking a good part of the CPUs when the facts were gathered."""
    load, cores = facts["load_average"], facts["cores"]
    return load is not None and cores is not None and load > 0.5 * cores


def summary(facts: dict[str, Any]) -> list[str]:
    """The environment block as a few lines of text."""
    device = facts.get("device_name") or f"{facts['cpu']} ({facts['cpu_capability']})"
    lines = [
        f"device     {facts['device']}: {device}",
        f"threads    {facts['threads']} of {facts['cores']} cores, load {facts['load_average']}, "
        f"allocator: {facts['allocator']}",
        f"versions   fastnets {facts['fastnets']}, torch {facts['torch']}, "
        f"triton {facts['triton'] or 'not installed'}, oneDNN {facts['onednn'] or 'unknown'}",
        f"commit     {facts['commit'] or 'not a source tree'}",
        f"system     {facts['system']}, Python {facts['python']}",
    ]
    if facts["device"].startswith("cuda"):
        lines.insert(
            1,
            f"cuda       {facts['cuda']}, driver {facts['cuda_driver']}, cuDNN {facts['cudnn']}, "
            f"sm_{facts['capability'].replace('.', '')}, TF32 convolutions "
            f"{'on' if facts['tf32_convolutions'] else 'off'}",
        )
        if facts.get("gpu"):
            lines.insert(2, "gpu        " + ", ".join(f"{k} {v}" for k, v in facts["gpu"].items()))
    if facts["environment"]:
        lines.append("variables  " + " ".join(f"{k}={v}" for k, v in facts["environment"].items()))
    return lines
