"""Which implementation of a fused op runs, and how fused ops are registered with PyTorch's dispatcher.

Every fused op has up to three implementations, all with the op's own arguments:

=============  ==============================================================================================
``triton``     our kernels, on whatever tensors come in (CUDA; or CPU under Triton's interpreter)
``library``    the vendor's call: cuDNN through ATen plus our one-pass epilogue on CUDA, oneDNN on the CPU
``reference``  the stock PyTorch composition, which defines the op
=============  ==============================================================================================

The choice, strongest first: ``with fastnets.backend(name)``, the op's own ``backend`` argument (what
``optimize(backend=...)`` set), ``FASTNETS_BACKEND``, and for ``"auto"`` the op's heuristic. A backend that
was asked for by name and cannot serve the call raises.

Where something was measured on this device (``fused.selection``), what was the fastest for a call's bucketed
shapes stands before the heuristic: see ``preferred``.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

BACKENDS = ("auto", "triton", "library", "reference")
OUR_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what our kernels take
KINDS = 4096  # of calls that an op remembers; beyond that all are decided anew
UNFOLDED = "unfolded"  # "auto" without what folds or packs weights: ``optimize(mode="training")``
UNMEASURED = "unmeasured"  # "auto" by the heuristics alone: ``optimize(select="shipped")``

# What an op's autocast rule excludes when it calls the op again.
AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

library = torch.library.Library("fastnets", "FRAGMENT")

_forced: contextvars.ContextVar[str] = contextvars.ContextVar("fastnets_backend", default="auto")
_assumed_device: contextvars.ContextVar[str] = contextvars.ContextVar("fastnets_device", default="cpu")
# Older Dynamos cannot read a ContextVar: compiled, the block has no say there.
_TRACES_CONTEXT = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 14)
IN_RANGES = os.environ.get("FASTNETS_NVTX") == "1"
_bodies: dict[torch._ops.OpOverload, Callable] = {}


class UnsupportedByBackend(ValueError):
    """The backend asked for cannot serve this call; the message says what it supports."""


def validate_backend(name: str, argument: str = "backend") -> str:
    """``name`` if it is a backend, else a ``ValueError`` that suggests the nearest one."""
    if name in BACKENDS or name == UNMEASURED:  # rewritten networks hand the latter on
        return name
    near = difflib.get_close_matches(str(name), BACKENDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument}={name!r} is not a backend{hint} (one of: {', '.join(BACKENDS)})")


_environment = validate_backend(os.environ.get("FASTNETS_BACKEND", "auto"), "FASTNETS_BACKEND")
DISABLED = os.environ.get("FASTNETS_DISABLE") == "1"  # ``optimize`` leaves networks as they are


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run fused ops by the named implementation inside the block, in this thread: for tests and debugging.

    >>> with fastnets.backend("reference"):
    ...     y = model(x)
    """
    token = _forced.set(validate_backend(name))
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def assume_device_type(device_type: str) -> Iterator[None]:
    """Let meta tensors count as "cpu" or "cuda" ones inside the block, for counting and dry runs."""
    token = _assumed_device.set(device_type)
    try:
        yield
    finally:
        _assumed_device.reset(token)


def device_type_of(x: Tensor) -> str:
    """The device type that implementations are chosen for; meta tensors count as the assumed one."""
    device_type = x.device.type
    return _assumed_device.get() if device_type == "meta" else device_type


def requested(backend_argument: str) -> str:
    """The backend in force for a call that was given ``backend_argument``."""
    forced = "auto" if torch.compiler.is_compiling() and not _TRACES_CONTEXT else _forced.get()
    if forced != "auto":
        return forced
    return backend_argument if backend_argument not in ("auto", UNFOLDED, UNMEASURED) else _environment


# --- what was measured --------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """One choice that an op left to "auto" had to make: ``preferred`` was asked, and answered ``backend``.

    shape: x's sizes, each rounded up to a power of two, and the details of the call as they are.
    candidates: the backends it can choose from, the simplest first.
    """

    op: str
    dtype: str
    shape: str
    device: torch.device
    batch: int
    backend: str
    candidates: tuple[str, ...]


Key = tuple[str, str, str]
"""(op, dtype, shape), as a :class:`Decision` has them."""

SIMPLEST_FIRST = ("reference", "library", "triton")
_REMEMBERED_CALLS = 4096

_measured: dict[
    torch.device, dict[Key, str]
] = {}  # what the store knows of each device, read when first asked
_by_call: dict[tuple, str] = {}  # the same by exact shapes, for calls that were seen
_choices = 0  # how often what is known was exchanged
_nothing_measured = False  # neither in the store nor in this process
_decisions: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar(
    "fastnets_decisions", default=None
)


def preferred(
    op: str,
    backend_argument: str,
    x: Tensor,
    *details: Hashable | list[int],
    candidates: tuple[str, ...] = SIMPLEST_FIRST,
) -> str:
    """The backend in force for a call of ``op``: ``requested``, or where that leaves it to "auto" and nothing
    forbids a look, the one that was measured to be the fastest on x's device.

    details: what else the time depends on (weights' shapes, strides, the activation's name); matched exactly,
    where x's sizes are matched in buckets. Costs a microsecond where anything was measured, else nothing.
    """
    wanted = requested(backend_argument)
    if wanted != "auto" or backend_argument != "auto":
        return wanted
    watched = _decisions.get()
    if _nothing_measured and watched is None:
        return wanted
    call = (op, x.shape, x.dtype, x.device, *[tuple(d) if d.__class__ is list else d for d in details])
    found = _by_call.get(call)
    if found is None or watched is not None:
        found = _look_up(call, x, watched, candidates)
    return found


def _look_up(call: tuple, x: Tensor, watched: list[Decision] | None, candidates: tuple[str, ...]) -> str:
    op, sizes, dtype, device, *details = call
    if device.type == "meta":
        device = _device_like(_assumed_device.get())
    key = (op, str(dtype).removeprefix("torch."), _bucketed(sizes, details))
    found = "auto" if device is None else _of_device(device).get(key, "auto")
    if found not in (*candidates, "auto"):  # of a store that somebody has edited
        found = "auto"
    if watched is not None:
        watched.append(Decision(*key, x.device, len(x) if x.dim() else 0, found, candidates))
    if len(_by_call) >= _REMEMBERED_CALLS:
        _by_call.clear()
    _by_call[call] = found
    return found


def _bucketed(sizes: Sequence[int], details: Sequence[Hashable]) -> str:
    """x's sizes in powers of two, so that a batch of 30 is served by what was measured with 32."""
    words = ["×".join(str(1 << (size - 1).bit_length() if size else 0) for size in sizes)]
    for detail in details:
        words.append("×".join(map(str, detail)) if isinstance(detail, tuple) else str(detail))
    return " ".join(words)


def _device_like(device_type: str) -> torch.device | None:
    if device_type != "cuda":
        return torch.device(device_type)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _of_device(device: torch.device) -> dict[Key, str]:
    global _nothing_measured
    table = _measured.get(device)
    if table is None:
        from fastnets.fused.choices import Store, device_name

        store, table = Store(), {}
        if store.exists():
            table = {choice[:3]: choice.backend for choice in store.read(device_name(device))}
        else:
            _nothing_measured = True
        _measured[device] = table
    return table


def adopt(device: torch.device, choices: Mapping[Key, str]) -> None:
    """From now on calls on ``device`` run the backend that ``choices`` name for them."""
    global _choices, _nothing_measured
    _choices += 1
    _of_device(device).update(choices)
    _by_call.clear()
    _nothing_measured = _nothing_measured and not choices


def forget_measurements() -> None:
    """Ask the store again at the next call."""
    global _choices, _nothing_measured
    _choices += 1
    _measured.clear()
    _by_call.clear()
    _nothing_measured = False


@contextlib.contextmanager
def decisions() -> Iterator[list[Decision]]:
    """The choices that fused ops left to "auto" make inside the block, in this thread, in order."""
    found: list[Decision] = []
    token = _decisions.set(found)
    try:
        yield found
    finally:
        _decisions.reset(token)


def ours_take(
    dtypes: Sequence[torch.dtype], wanted: str, refuses: str = "does not take", what: str = "model"
) -> bool:
    """Whether our kernels take tensors of these dtypes.

    Raises:
        UnsupportedByBackend: they do not, and were asked for by name; ``refuses`` and ``what`` word it.
    """
    others = [dtype for dtype in dtypes if dtype not in OUR_DTYPES]
    if wanted == "triton" and others:
        raise UnsupportedByBackend(
            f"backend 'triton' {refuses} {others[0]} (supported: float32, float16, bfloat16); "
            f"use backend='auto' or convert the {what}"
        )
    return not others


def triton_or_reference(
    x: Tensor, backend: str, *others: Tensor | None, op: str = "", details: tuple = (), **wording: str
) -> str:
    """The implementation of an op of x (and others) that vendors do not have: "triton" or "reference".

    op, details: for ``preferred``; without the op's name nothing that was measured is looked up.

    Raises:
        UnsupportedByBackend: see ``ours_take``, which ``wording`` is for.
    """
    wanted = requested(backend)
    if op and wanted == "auto":
        wanted = preferred(op, backend, x, *details, candidates=("reference", "triton"))
    ours = ours_take([t.dtype for t in (x, *others) if t is not None], wanted, **wording)
    if wanted in ("triton", "reference"):
        return wanted
    return "triton" if ours and device_type_of(x) == "cuda" else "reference"


def leaves_to_stock(x: Tensor, backend: str) -> bool:
    """Whether a call outside CUDA runs PyTorch's own function, as nothing else was asked for.

    Compiled, the op's own argument alone asks: Dynamo may not be able to read what ``with backend()`` sets.
    """
    if device_type_of(x) == "cuda":
        return False
    return (backend if torch.compiler.is_compiling() else requested(backend)) == "auto"


def _precision_of_fp32() -> tuple:
    backends = torch.backends
    return backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision


def kind_of(tensors: Sequence[Tensor | None], options: tuple) -> tuple:
    """All that a launcher may decide by: sizes, strides, dtypes and devices, options, and global switches."""
    kind = [*options]
    for t in tensors:
        if t is None:
            kind.append(None)
        else:
            dtype = t.dtype
            kind += (t.shape, t.stride(), dtype, t.get_device())
            if dtype is torch.float32 and t is tensors[0]:
                kind += _precision_of_fp32()
    return tuple(kind)


def switches() -> tuple:
    """What implementations are chosen by besides the call: a backend that is forced, what was measured."""
    return _forced.get(), _choices


class Remembered:
    """A call that a layer made, and how to tell that the next one is of the same kind.

    PyTorch's tensor guards compare in one microsecond what ``kind_of`` collects in five: classes, sizes,
    strides, dtypes and devices, and with the dispatch keys in force whether a mode, a tracer, functorch or
    autocast is around. Hooks, gradients, compilers and forward-mode AD are the caller's to ask for.
    """

    __slots__ = ("_check", "_options", "_precision", "_switches", "call")

    def __init__(self, call: Callable[[tuple], object], tensors: tuple[Tensor | None, ...], options: tuple):
        check = _guard_of([t for t in tensors if t is not None])
        self._check = _check_of(tuple([t is not None for t in tensors]))(check)
        self._options = options
        self._precision = _precision_of_fp32() if tensors[0].dtype is torch.float32 else None
        self._switches = switches()
        self.call = call

    def serves(self, tensors: tuple[Tensor | None, ...], options: tuple) -> bool:
        """Whether ``call(tensors)`` is what a call with these options does."""
        return (
            self._options == options
            and self._check(tensors)
            and self._switches == switches()
            and _decisions.get() is None
            and (self._precision is None or self._precision == _precision_of_fp32())
        )


def _guard_of(tensors: list[Tensor]) -> Callable[..., bool]:
    """Whether so many tensors are of the kind of these."""
    return _guards.TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    ).check


def same_kind_as(tensors: tuple[Tensor, ...]) -> Callable[[tuple], bool]:
    """Whether other arguments are tensors of the kind of these, as ``Remembered`` asks."""
    check, count = _guard_of([*tensors]), len(tensors)
    return lambda arguments: len(arguments) == count and check(*arguments)


try:
    from torch._C._dynamo import guards as _guards

    _one = torch.empty(1, device="cpu")
    _guard = _guards.TensorGuards(_one, dynamic_dims_sizes=[[1]], dynamic_dims_strides=[[1]])
    # Ranges are around what the dispatcher calls.
    REMEMBERS = _guard.check(_one) and not _guard.check(_one.double()) and not IN_RANGES
except (ImportError, AttributeError, TypeError, SystemError):  # not a public name
    REMEMBERS = False


class Memory(dict):
    """The last calls of an op's layers: for each layer (a hashable that tells it from others) one.

    What is found is to be asked whether it ``serves``: the layer may have changed, or be another's key now.
    """

    def keep(self, key: object, call: object, tensors: tuple[Tensor | None, ...], options: tuple) -> None:
        """Remember a ``kernels.replay.Replayed``, once it knows what it repeats."""
        if REMEMBERS and call is not None and (call.never or call.program is not None):
            if len(self) >= KINDS:
                self.clear()
            self[key] = Remembered(call, tensors, options)


@functools.lru_cache(maxsize=256)
def _check_of(given: tuple[bool, ...]) -> Callable[[Callable], Callable[[tuple], bool]]:
    """Of a check of the tensors that are given the check of a tuple where the others are None."""
    conditions = [f"t[{i}] is None and " for i, there in enumerate(given) if not there]
    arguments = ", ".join(f"t[{i}]" for i, there in enumerate(given) if there)
    return eval(f"lambda check: lambda t: {''.join(conditions)}check({arguments})")


def replayed(function: Callable, options: tuple) -> Callable[[tuple], object]:
    """``function(*tensors, *options)`` of a tuple of tensors, for calls of one kind: from the third on its
    launches and PyTorch's operations are repeated, see ``kernels.replay``."""
    from fastnets.kernels.replay import Replayed

    return Replayed(function, options, body_of)


def replays(tensors: int) -> Callable[[Callable], Callable]:
    """Decorates a function of so many tensors, then options, the backend last: by kinds of calls it is
    ``replayed`` on CUDA, by our kernels and by the vendor's calls, and wherever our kernels are asked for."""

    def decorate(function: Callable) -> Callable:
        kinds: dict[tuple, Callable] = {}

        def recorded(*arguments):
            """What repeats this call; None where nothing does."""
            operands, options = arguments[:tensors], arguments[tensors:]
            wanted = requested(options[-1])
            x = operands[0]
            repeats = x.is_cuda if wanted in ("auto", "library") else wanted == "triton"
            if not repeats or x.is_meta or _decisions.get() is not None:
                return None
            options = tuple([tuple(o) if o.__class__ is list else o for o in options])
            kind = kind_of(operands, (*options, wanted, _choices))
            call = kinds.get(kind)
            if call is None:
                if len(kinds) >= KINDS:
                    kinds.clear()
                call = kinds[kind] = replayed(function, options)
            return call

        @functools.wraps(function)
        def run(*arguments):
            call = recorded(*arguments)
            return function(*arguments) if call is None else call(arguments[:tensors])

        run.recorded = recorded
        return run

    return decorate


def are_decisions_watched() -> bool:
    """Whether somebody notes in this thread what is chosen, see ``decisions``."""
    return _decisions.get() is not None


def _in_range(name: str, body: Callable) -> Callable:
    """``body`` inside a range that Nsight shows; where there is no CUDA, the profiler alone sees it."""

    @functools.wraps(body)
    def run(*args, **kwargs):
        with torch.profiler.record_function(name):
            if not torch.cuda.is_available():
                return body(*args, **kwargs)
            with torch.cuda.nvtx.range(name):
                return body(*args, **kwargs)

    return run


def register(
    schema: str,
    body: Callable,
    fake: Callable,
    *,
    autograd: Callable | None = None,
    autocast: Callable | None = None,
    flops: Callable | None = None,
) -> torch._ops.OpOverload:
    """Define ``fastnets::<schema>`` with all that PyTorch's subsystems ask of an op.

    Args:
        body: the computation, for CPU and CUDA tensors. FASTNETS_NVTX=1 puts each call in an NVTX range.
        fake: shapes, dtypes and strides of the result, and the checks of the arguments.
        autograd: kernel under the Autograd key. An op without one is for calls without gradients and is
            passed straight through, which costs a microsecond instead of twenty.
        autocast: kernel under the two autocast keys; without one the op takes the dtypes as they come.
        flops: FLOP formula over shapes for ``torch.utils.flop_counter``.
    """
    name = schema.split("(")[0]
    if IN_RANGES:
        body = _in_range(f"fastnets.{name}", body)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    for key in ("CPU", "CUDA"):
        library.impl(name, body, key)
    torch.library.register_fake(f"fastnets::{name}", fake, lib=library)
    library.impl(name, autograd or torch.library.fallthrough_kernel, "Autograd")
    if autocast is not None:
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(name, autocast, key)
    packet = getattr(torch.ops.fastnets, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    _bodies[packet.default] = body
    return packet.default


def once_differentiable(backward: Callable) -> Callable:
    """For the backward of an ``autograd.Function``: differentiating through it raises.

    PyTorch's decorator of that name lets a gradient through as a constant where only the saved tensors, and
    not the incoming gradient, depend on what is differentiated: a gradient penalty would silently be wrong.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled() or not any(isinstance(r, Tensor) for r in results):
            return results
        message = b"a fused layer cannot be differentiated twice; use the stock network, see fastnets.restore"
        raises = torch._C._functions.DelayedError(message, sum(isinstance(r, Tensor) for r in results))
        found = raises(*[r.detach().requires_grad_() for r in results if isinstance(r, Tensor)])
        found = iter(found if isinstance(found, tuple) else (found,))
        return tuple(next(found) if isinstance(r, Tensor) else r for r in results)

    return wrapped


def body_of(op: torch._ops.OpOverload) -> Callable | None:
    """The computation of a fastnets op, for modes that count what it does; None for other ops."""
    return _bodies.get(op)
