"""What the heuristics know of a GPU: the figures of the one at hand, or of one named in its absence.

Nothing is queried at import. ``current_device(tensor)`` asks ``torch.cuda`` for tensors on CUDA; elsewhere
(meta tensors, an interpreter) it answers with the device of ``with assume_device("h100"):``, and with an
A100 at last.

Sources of the table: NVIDIA's CUDA C++ programming guide (limits per compute capability) and the data
sheets of the products (multiprocessors, memory bandwidth, dense tensor-core rates with fp32 accumulation).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["DEVICES", "Device", "assume_device", "current_device", "device_for_capability"]

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Device:
    """One GPU, as far as launch decisions ask.

    Shared memory in bytes (``per_block`` is the opt-in maximum), bandwidth in GB/s, rates in dense TFLOP/s.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_memory_per_block: int
    shared_memory_per_multiprocessor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    l2_bytes: int
    dram_bandwidth: float
    tensor_tflops: float
    fp32_tflops: float
    registers_per_multiprocessor: int = 65536
    registers_per_block: int = 65536
    registers_per_thread: int = 255

    def __hash__(self) -> int:
        # Of what tells devices apart: the whole would be hashed at every look-up of a plan.
        return hash((self.name, self.multiprocessors))

    def blocks_resident(self, num_warps: int, shared_bytes: int = 0, registers_per_thread: int = 32) -> int:
        """Blocks that fit one multiprocessor at once; 0 where one does not fit at all."""
        if shared_bytes > self.shared_memory_per_block or registers_per_thread > self.registers_per_thread:
            return 0
        # Registers are handed out per warp, in units of 256.
        per_warp = -(-registers_per_thread * 32 // 256) * 256
        by_registers = self.registers_per_multiprocessor // per_warp // num_warps
        by_threads = self.threads_per_multiprocessor // (32 * num_warps)
        # From sm_80 on the driver keeps 1 KiB of every block for itself.
        reserved = KIB if self.capability >= 80 else 0
        by_shared = self.shared_memory_per_multiprocessor // max(shared_bytes + reserved, 1)
        return min(by_registers, by_threads, by_shared, self.blocks_per_multiprocessor)


# capability: (opt-in shared memory per block, per multiprocessor, threads, blocks per multiprocessor)
_LIMITS = {
    75: (64 * KIB, 64 * KIB, 1024, 16),
    80: (163 * KIB, 164 * KIB, 2048, 32),
    86: (99 * KIB, 100 * KIB, 1536, 16),
    89: (99 * KIB, 100 * KIB, 1536, 24),
    90: (227 * KIB, 228 * KIB, 2048, 32),
    100: (227 * KIB, 228 * KIB, 2048, 32),
    103: (227 * KIB, 228 * KIB, 2048, 32),
    120: (99 * KIB, 100 * KIB, 1536, 24),
}


def _device(name, capability, multiprocessors, l2_mib, dram_bandwidth, tensor_tflops, fp32_tflops) -> Device:
    return Device(
        name,
        capability,
        multiprocessors,
        *_LIMITS[capability],
        l2_bytes=int(l2_mib * MIB),
        dram_bandwidth=dram_bandwidth,
        tensor_tflops=tensor_tflops,
        fp32_tflops=fp32_tflops,
    )


DEVICES: dict[str, Device] = {
    "t4": _device("t4", 75, 40, 4, 320, 65, 8.1),
    "a100": _device("a100", 80, 108, 40, 1555, 312, 19.5),
    "a10": _device("a10", 86, 72, 6, 600, 125, 31.2),
    "rtx3090": _device("rtx3090", 86, 82, 6, 936, 71, 35.6),
    "rtx4090": _device("rtx4090", 89, 128, 72, 1008, 165, 82.6),
    "l40s": _device("l40s", 89, 142, 96, 864, 362, 91.6),
    "h100": _device("h100", 90, 132, 50, 3350, 989, 66.9),
    "h200": _device("h200", 90, 132, 50, 4800, 989, 66.9),
    "b200": _device("b200", 100, 148, 126, 8000, 2250, 80),
    "rtx5090": _device("rtx5090", 120, 170, 96, 1792, 209, 104.8),
}

# The product that stands for a compute capability when only that is known.
_BY_CAPABILITY = {75: "t4", 80: "a100", 86: "a10", 89: "rtx4090", 90: "h100", 100: "b200", 120: "rtx5090"}

_assumed: list[Device] = []
# The query function the cached answers came from: an emulator that replaces it empties the cache.
_queried: tuple[object, dict[int, Device]] = (None, {})


def device_for_capability(capability: int) -> Device:
    """The product that stands for ``capability`` (80, 90, ...): the nearest one below if it is not listed."""
    known = [c for c in _BY_CAPABILITY if c <= capability]
    if not known:
        raise ValueError(f"compute capability {capability} is not supported (Triton needs 75 or later)")
    return DEVICES[_BY_CAPABILITY[max(known)]]


@contextlib.contextmanager
def assume_device(device: str | int | Device) -> Iterator[Device]:
    """Tensors that are on no GPU are planned for ``device`` inside: a name, a capability or a Device."""
    if isinstance(device, str):
        if device not in DEVICES:
            raise ValueError(f"unknown device {device!r} (known: {', '.join(sorted(DEVICES))})")
        device = DEVICES[device]
    elif isinstance(device, int):
        device = device_for_capability(device)
    _assumed.append(device)
    try:
        yield device
    finally:
        _assumed.pop()


def current_device(tensor: torch.Tensor | None = None) -> Device:
    """The GPU that a launch on ``tensor`` is planned for.

    A CUDA tensor's own device; else the assumed one; else the current CUDA device where there is one; else
    an A100.
    """
    if tensor is not None and tensor.is_cuda and not tensor.is_meta:
        return _query(tensor.get_device())
    if _assumed:
        return _assumed[-1]
    if torch.cuda.is_available():
        return _query(torch.cuda.current_device())
    return DEVICES["a100"]


def _query(index: int) -> Device:
    global _queried
    source = torch.cuda.get_device_properties
    if _queried[0] is not source:
        _queried = (source, {})
    known = _queried[1]
    device = known.get(index)
    if device is None:
        device = known[index] = _from_properties(source(index))
    return device


def _from_properties(properties) -> Device:
    capability = 10 * properties.major + properties.minor
    model = properties.name.lower().replace(" ", "")
    named = [d for d in DEVICES.values() if d.name in model and d.capability == capability]
    # "a10" is also in "a100": the longest name wins.
    base = max(named, key=lambda d: len(d.name)) if named else device_for_capability(capability)
    scale = properties.multi_processor_count / base.multiprocessors
    return dataclasses.replace(
        base,
        name=base.name if named else properties.name,
        capability=capability,
        multiprocessors=properties.multi_processor_count,
        shared_memory_per_block=properties.shared_memory_per_block_optin,
        shared_memory_per_multiprocessor=properties.shared_memory_per_multiprocessor,
        threads_per_multiprocessor=properties.max_threads_per_multi_processor,
        registers_per_multiprocessor=properties.regs_per_multiprocessor,
        l2_bytes=properties.L2_cache_size,
        # A part with fewer multiprocessors is taken as slower in proportion; only ratios of these are used.
        dram_bandwidth=base.dram_bandwidth if named else base.dram_bandwidth * scale,
        tensor_tflops=base.tensor_tflops * scale,
        fp32_tflops=base.fp32_tflops * scale,
    )
