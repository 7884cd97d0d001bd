"""The one way a kernel is launched.

``launch`` guards the device, reports to whoever observes (traffic counting, the ahead-of-time lane), leaves
meta tensors to the observers alone, and says plainly when nothing here could run the kernel.

Triton binds, specialises and looks up its compiled kernel anew at every launch, which for kernels of sixty
arguments takes longer than many kernels run. So a compiled kernel is kept under all that it was specialised
on (``_signature``), and from its second launch on handed its arguments directly.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction
from triton.runtime.driver import driver

__all__ = [
    "DTYPES",
    "Config",
    "Launch",
    "RepresentativeCall",
    "UnsupportedConfig",
    "launch",
    "observe_launches",
    "tiles",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the tensors that kernels read and write


class UnsupportedConfig(ValueError):
    """The config cannot serve this call: a shape, dtype or device that it does not allow."""


class Config:
    """Compile-time choices of one launch: tile sizes and flags by name, warps per block, pipeline stages.

    Hashable and comparable. ``config["BLOCK_M"]``, ``config.BLOCK_M`` and ``config.get("SPLIT_K", 1)`` read
    it; ``config.replace(num_stages=3)`` gives a changed copy.
    """

    __slots__ = ("_hash", "maxnreg", "meta", "num_stages", "num_warps", "options")

    def __init__(self, *, num_warps: int = 4, num_stages: int = 2, maxnreg: int | None = None, **meta: Any):
        self.meta: dict[str, Any] = meta
        self.num_warps = num_warps
        self.num_stages = num_stages
        self.maxnreg = maxnreg
        # What Triton takes as launch options; built once, a launch is a few microseconds.
        self.options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if maxnreg is not None:
            self.options["maxnreg"] = maxnreg
        self._hash = hash((num_warps, num_stages, maxnreg, tuple(sorted(meta.items()))))

    def __getitem__(self, name: str) -> Any:
        return self.meta[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.meta[name]
        except KeyError:
            raise AttributeError(f"config has no {name!r} (it has {', '.join(self.meta)})") from None

    def __reduce__(self):
        return _rebuild_config, (self.num_warps, self.num_stages, self.maxnreg, self.meta)

    def get(self, name: str, default: Any = None) -> Any:
        return self.meta.get(name, default)

    def replace(self, **changes: Any) -> Config:
        """A copy with these tile sizes or options changed."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}
        return Config(**{**options, **self.meta, **changes})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Config):
            return NotImplemented
        return self.options == other.options and self.meta == other.meta

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return "Config(" + ", ".join(f"{k}={v}" for k, v in {**self.meta, **self.options}.items()) + ")"


def _rebuild_config(num_warps, num_stages, maxnreg, meta) -> Config:
    return Config(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg, **meta)


@dataclass
class Launch:
    """One kernel launch as an observer sees it.

    ``args`` are the kernel's positional arguments, ``constexprs`` everything passed by name (the config's
    tile sizes included), ``reads``/``writes`` the tensors it moves, ``bytes`` each of those once in full,
    ``flops`` the work it stands for (a multiply-add is two).
    """

    kernel: Any
    name: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    config: Config
    reads: tuple[torch.Tensor, ...]
    writes: tuple[torch.Tensor, ...]
    flops: int
    bytes_read: int = field(init=False)
    bytes_written: int = field(init=False)

    def __post_init__(self):
        self.bytes_read = sum(t.numel() * t.element_size() for t in self.reads)
        self.bytes_written = sum(t.numel() * t.element_size() for t in self.writes)

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class RepresentativeCall:
    """A call that stands for a class of shapes: ``thunk(config)`` runs it on meta tensors."""

    name: str
    thunk: Callable[[Config | None], Any]


# Process-wide, because autograd launches backward kernels from its own threads.
_observers: tuple[Callable[[Launch], None], ...] = ()
_observers_lock = threading.Lock()


@contextlib.contextmanager
def observe_launches(callback: Callable[[Launch], None]) -> Iterator[None]:
    """``callback(Launch)`` is called before every launch inside the block, also for meta tensors."""
    global _observers
    with _observers_lock:
        _observers = (*_observers, callback)
    try:
        yield
    finally:
        with _observers_lock:
            position = len(_observers) - 1 - _observers[::-1].index(callback)
            _observers = _observers[:position] + _observers[position + 1 :]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    config: Config,
    reads: Sequence[torch.Tensor | None] = (),
    writes: Sequence[torch.Tensor],
    flops: int = 0,
    **constexprs: Any,
) -> None:
    """Runs ``kernel[grid](*args, **constexprs, **config)`` on the device of ``writes[0]``.

    kernel: a ``@triton.jit`` function, native or interpreted.
    grid: 1 to 3 ints; nothing is launched where one is zero.
    reads, writes: the tensors moved, for observers (``None`` entries are dropped); ``writes`` must name one.

    On meta and fake tensors only the observers see the launch. Raises ``RuntimeError`` where no Triton
    driver can run the kernel on these tensors.
    """
    if 0 in grid:
        return
    if _observers:
        record = Launch(
            kernel,
            kernel_name(kernel),
            tuple(grid),
            args,
            {**config.meta, **constexprs},
            config,
            tuple(t for t in reads if t is not None),
            tuple(t for t in writes if t is not None),
            flops,
        )
        for observer in _observers:
            observer(record)
    anchor = writes[0]
    recorder = recorders.active
    if anchor.is_meta or isinstance(anchor, FakeTensor):
        if recorder is not None:
            recorder.cannot_replay()
        return
    if anchor.is_cuda:
        index = anchor.get_device()
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                _run(kernel, grid, args, config, constexprs)
            if recorder is not None:
                recorder.cannot_replay()
            return
    elif isinstance(kernel, JITFunction):
        _require_driver_for(anchor, kernel)
    if _observers or recorder is not None:
        # An interpreter or emulator moves tensors by PyTorch ops, which a counting mode is not to see.
        with _disable_current_modes():
            compiled = _run(kernel, grid, args, config, constexprs)
        if recorder is not None:
            recorder.launched(compiled, grid, args)
        return
    _run(kernel, grid, args, config, constexprs)


class Recorders(threading.local):
    """Who wants to know what this thread launches, compiled: see ``replay``."""

    active: Any = None


recorders = Recorders()


# --- launching what is compiled already ---------------------------------------------------------------------

_KEPT = 8192  # compiled kernels known by their signatures; beyond that all are found again through Triton


class _Compiled:
    """The compiled kernels of one Triton driver by what they were specialised on.

    ``takes_addresses``: the driver is Triton's own for CUDA, which takes a pointer as a number, too, and then
    does not ask the CUDA driver whose it is.
    """

    __slots__ = ("driver", "kernels", "specialises_as_cuda", "takes_addresses")

    def __init__(self, active: Any):
        self.driver = active
        self.kernels: dict[tuple, tuple] = {}
        self.takes_addresses = type(active).__module__ == "triton.backends.nvidia.driver"
        # Another backend may look at more of an argument than _signature does.
        self.specialises_as_cuda = active is not None and active.get_current_target().backend == "cuda"


_compiled = _Compiled(None)


def kernels_of_driver() -> _Compiled:
    """What was compiled for the driver that is active now."""
    global _compiled
    compiled, active = _compiled, driver.active
    if compiled.driver is not active:
        compiled = _compiled = _Compiled(active)
    return compiled


def is_watched() -> bool:
    """Whether anybody is to be told of each launch: an observer, or a profiler's hook."""
    return bool(_observers) or _launch_is_hooked()


def _run(kernel: Any, grid: tuple[int, ...], args: tuple, config: Config, constexprs: dict) -> tuple | None:
    """``kernel[grid](*args, **config.meta, **constexprs, **config.options)``, past the binder where known.

    Returns what is kept of the compiled kernel, None where nothing is.
    """
    key = found = None
    if kernel.__class__ is JITFunction and not kernel.pre_run_hooks and not _launch_is_hooked():
        compiled = kernels_of_driver()
        active = compiled.driver
        signature = _signature(args) if compiled.specialises_as_cuda else None
        if signature is not None:
            device = active.get_current_device()
            key = (id(kernel), config, device, signature, *constexprs, *constexprs.values())
            found = compiled.kernels.get(key)
            if found is not None:
                run, function, packed_metadata, pointers, constants, *_ = found
                if pointers:
                    args = list(args)
                    for i in pointers:
                        args[i] = args[i].data_ptr()
                x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
                stream = active.get_current_stream(device)
                run(x, y, z, stream, function, packed_metadata, None, None, None, *args, *constants)
                return found
    result = kernel[grid](*args, **config.meta, **constexprs, **config.options)
    if key is not None and isinstance(result, CompiledKernel):
        if len(compiled.kernels) >= _KEPT:
            compiled.kernels.clear()
        by_name = {**config.meta, **constexprs}
        constants = tuple([by_name.get(p.name, p.default) for p in kernel.params[len(args) :]])
        pointers = ()
        if compiled.takes_addresses:
            pointers = tuple([i for i, a in enumerate(args) if isinstance(a, Tensor)])
        # The kernel is kept with the rest, so that its id stays its own.
        found = compiled.kernels[key] = (
            result.run, result.function, result.packed_metadata, pointers, constants, kernel
        )  # fmt: skip
    return found


def _signature(args: tuple) -> tuple | None:
    """All that Triton specialises on in these arguments; None where there is something else among them.

    It looks at the dtype of a tensor and whether its address divides by 16, at the class of a float, and at
    an integer's range, whether it is 1 and whether it divides by 16. Integers stand here for themselves.
    """
    try:
        return tuple(
            [
                a if a.__class__ is int or a is None
                else float if a.__class__ is float
                else _SIGNATURES[a.__class__](a)
                for a in args
            ]
        )  # fmt: skip
    except KeyError:
        return None


def _signature_of_tuple(values: tuple) -> tuple:
    signature = _signature(values)
    if signature is None:
        raise KeyError
    return signature


def _of_tensor(x: Tensor) -> tuple:
    return x.dtype, x.data_ptr() % 16 == 0, x.get_device()


_SIGNATURES: dict[type, Callable[[Any], tuple]] = {
    Tensor: _of_tensor,
    torch.nn.Parameter: _of_tensor,
    bool: lambda value: (bool, value),
    tuple: lambda values: (tuple, *_signature_of_tuple(values)),
}


def _launch_is_hooked() -> bool:
    """Whether a profiler wants to be told of each launch."""
    hook = knobs.runtime.launch_enter_hook
    if hook is not None and getattr(hook, "calls", True):
        return True
    hook = knobs.runtime.launch_exit_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def tiles(extent: int, tile: int) -> int:
    """Tiles that cover an extent. (``triton.cdiv`` on the host costs microseconds.)"""
    return -(-extent // tile)


def kernel_name(kernel: Any) -> str:
    """The Python name of a kernel, compiled or interpreted."""
    return getattr(kernel, "fn", kernel).__name__


def _require_driver_for(tensor: torch.Tensor, kernel: JITFunction) -> None:
    """An emulator or a CPU driver may serve CPU tensors; Triton's own GPU drivers may not."""
    try:
        active = driver.active
        native = type(active).__module__.startswith("triton.backends.")
        if not native or active.get_current_target().backend not in ("cuda", "hip"):
            return
        fact = f"Triton's active driver is for {active.get_current_target().backend}"
    except RuntimeError as error:
        fact = f"Triton {triton.__version__} has no driver here: {error}"
    raise RuntimeError(
        f"{kernel_name(kernel)}: cannot run on a tensor on {tensor.device} ({fact}). Move the tensors to a "
        'CUDA device, use backend="library" or "reference", or set TRITON_INTERPRET=1 to run kernels in the '
        "interpreter."
    )
