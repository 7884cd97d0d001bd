"""Every shipped kernel and config run on the GPU itself, on inputs that rounding has no say on.

The ahead-of-time lane (``bench.static``) knows every kernel's representative calls, on meta tensors. Here the
same calls get real memory: inputs are small integers, outputs start as NaN. A case is right when

- it leaves no NaN or infinity in its result,
- a hundred repetitions give the same bits (a race shows as bits that move), and
- all configs of one call agree, up to the rounding of the result's dtype.

That the calls compute the right thing is shown elsewhere, against PyTorch (``bench.verify``).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastnets.bench.static import Case

__all__ = ["NativeResult", "disagreements", "run_case"]


@dataclass
class NativeResult:
    """What one case did on the device: ``status`` is "passed", "failed", "refused" or "skipped"."""

    module: str
    name: str
    config: str
    status: str
    note: str = ""
    repeats: int = 0
    sample: list[tuple[tuple[int, ...], list[float]]] | None = None  # of every result: see ``_sampled``
    tolerance: float = 0.0

    @property
    def call(self) -> tuple[str, str]:
        return self.module, self.name


class _OnDevice(TorchFunctionMode):
    """Tensors asked for on the meta device are made on ``device``, filled with small integers."""

    def __init__(self, inputs: _Inputs):
        super().__init__()
        self.inputs = inputs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) != "meta":
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": self.inputs.device})
        self.inputs.fill(made)
        return made


class _Inputs:
    """The same values for the same tensor in every repetition: they are kept by order of creation."""

    def __init__(self, device: torch.device):
        self.device = device
        self.kept: list[Tensor] = []
        self.restart()

    def restart(self) -> None:
        self.filled: set[int] = set()
        self.next = 0

    def fill(self, tensor: Tensor) -> None:
        self.filled.add(tensor.untyped_storage().data_ptr())
        if self.next == len(self.kept):
            self.kept.append(self._values(tensor, self.next))
        tensor.copy_(self.kept[self.next])
        self.next += 1

    def _values(self, tensor: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        if tensor.dtype == torch.uint8:  # bits of masks, places in pooling windows
            return torch.randint(256, tensor.shape, generator=generator, device=self.device).to(torch.uint8)
        if not tensor.is_floating_point():  # class indices, offsets, seeds: nothing that points outside
            return torch.zeros_like(tensor)
        low = 1 if tensor.dim() <= 1 else -2  # vectors may be variances
        drawn = torch.randint(low, 4, tensor.shape, generator=generator, device=self.device)
        return drawn.to(tensor.dtype)

    def observe(self, launch: Any) -> None:
        """Fills what a kernel reads and nobody has written: inputs made by ``empty_like`` and the like."""
        for tensor in launch.reads:
            if tensor.untyped_storage().data_ptr() not in self.filled:
                self.fill(tensor)
        self.filled.update(t.untyped_storage().data_ptr() for t in launch.writes)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def run_case(
    case: Case, device: torch.device | str, repeats: int = 100, limit_bytes: int = 4 << 30
) -> NativeResult:
    """Runs one case ``repeats`` times on ``device``; what touches more than ``limit_bytes`` is skipped."""
    from fastnets.bench.static import observed
    from fastnets.kernels.launch import UnsupportedConfig, observe_launches

    call = importlib.import_module(f"fastnets.kernels.{case.module}").representative_calls()[case.call]
    result = NativeResult(case.module, case.name, str(case.config), "passed")
    try:
        planned = observed(call.thunk, case.config, case.capability)
    except UnsupportedConfig as reason:
        result.status, result.note = "refused", str(reason)
        return result
    moved = sum(launch.bytes for launch in planned)
    if moved > limit_bytes:
        result.status, result.note = "skipped", f"touches {moved / 2**30:.1f} GiB"
        return result
    inputs = _Inputs(torch.device(device))
    first: list[Tensor] | None = None
    for repetition in range(repeats):
        inputs.restart()
        written: list[Tensor] = []

        def observe(launch, written=written):
            inputs.observe(launch)
            written[:] = launch.writes

        with _poisoned_memory(), observe_launches(observe), _OnDevice(inputs):
            returned = call.thunk(case.config)
        found = [t for t in pytree.tree_leaves(returned) if isinstance(t, Tensor)] or written
        if first is None:
            first = [t.clone() for t in found]
            if not all(torch.isfinite(t).all() for t in first if t.is_floating_point()):
                result.status, result.note = "failed", "NaN or infinity in the result"
                return result
        elif not all(torch.equal(a, b) for a, b in zip(first, found)):
            result.status, result.note = "failed", f"other bits in repetition {repetition + 1}"
            return result
        result.repeats = repetition + 1
    result.sample = [_sampled(t) for t in first]
    result.tolerance = max((_rounding(t) for t in first), default=0.0)
    return result


def _sampled(tensor: Tensor) -> tuple[tuple[int, ...], list[float]]:
    """The tensor's shape, and its norm and its values at 64 places spread over it."""
    flat = tensor.detach().flatten()
    places = torch.linspace(0, max(flat.numel() - 1, 0), min(64, flat.numel())).long().to(flat.device)
    return tuple(tensor.shape), [float(flat.double().norm()), *flat[places].double().tolist()]


def _rounding(tensor: Tensor) -> float:
    return float(torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else 0.0


def disagreements(results: list[NativeResult]) -> list[str]:
    """Calls whose configs gave different results, in words. What is kept per tile has no common shape, and is
    not compared.
    """
    found = []
    by_call: dict[tuple[str, str], list[NativeResult]] = {}
    for result in results:
        if result.status == "passed" and result.sample is not None:
            by_call.setdefault(result.call, []).append(result)
    for (module, name), same in by_call.items():
        reference = same[0]
        for other in same[1:]:
            allowed = 4 * max(reference.tolerance, 64 * torch.finfo(torch.float32).eps)
            off = max((_distance(a, b) for a, b in zip(reference.sample, other.sample)), default=0.0)
            if off > allowed:
                found.append(f"{module}: {name}: {other.config} is {off:.1e} from {reference.config}")
    return found


def _distance(a: tuple[tuple[int, ...], list[float]], b: tuple[tuple[int, ...], list[float]]) -> float:
    """The largest difference of two samples, relative to the value or to the mean size of all values."""
    (shape, ours), (other_shape, theirs) = a, b
    if shape != other_shape:
        return 0.0
    typical = ours[0] / max(torch.Size(shape).numel(), 1) ** 0.5
    return max((abs(x - y) / (abs(x) + typical + 1e-30) for x, y in zip(ours, theirs)), default=0.0)
