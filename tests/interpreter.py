"""Triton's interpreter, in process and made right.

``interpreter()`` runs every ``@triton.jit`` function launched inside the block with numpy, without
``TRITON_INTERPRET`` in the environment, so one process can run the same kernel interpreted and compiled.
What Triton's own interpreter (3.6 to 3.8) gets wrong or leaves out is put right for the duration:

- bfloat16 is stored there as uint16 and computed on as such. Here operands are widened to float32 and
  results rounded to nearest even, which is what the hardware does;
- a fused multiply-add rounds once;
- ``maximum`` and ``minimum`` drop NaN unless told to propagate it (3.6 always propagates);
- a masked load without ``other`` gives 0xFF bytes (NaN, -1), as undefined as on a GPU, instead of zeros;
- every address is checked against the extents of the tensors passed to the launch;
- ``range(tensor)`` works with numpy 2.4 (3.6 fails);
- patches of ``triton.language`` do not outlive the block.
"""

import contextlib
import types

import numpy as np
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget

# Imported before anything is patched: it keeps a table of language functions, of the patched ones otherwise.
from triton.compiler import code_generator  # noqa: F401
from triton.runtime import JITFunction
from triton.runtime import interpreter as I
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

Handle = I.TensorHandle
Builder = I.InterpreterBuilder


class OutOfBounds(IndexError):
    """A kernel touched an address outside of every tensor it was given."""


class InterpreterDriver:
    """Stands in for a device driver, so that launchers accept CPU tensors."""

    def get_current_target(self):
        return GPUTarget("interpreter", 0, 32)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest even; NaN stays a quiet NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    round_up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    with np.errstate(over="ignore"):
        rounded = ((bits + round_up) >> np.uint32(16)).astype(np.uint16)
    quiet = ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return np.where(np.isnan(values), quiet, rounded)


def is_bfloat16(handle) -> bool:
    return (
        isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16
    )


def as_float32(handle):
    return Handle(widen(handle.data), tl.float32) if is_bfloat16(handle) else handle


def as_bfloat16(handle):
    """Rounds the result of an operation; comparisons stay boolean."""
    if handle.data.dtype == np.bool_:
        return handle
    return Handle(narrow(handle.data), tl.bfloat16)


def through_float32(original):
    """An operation that computes on handles, given operands in float32 where they are bfloat16."""

    def operation(self, *operands):
        if not any(is_bfloat16(x) for x in operands):
            return original(self, *operands)
        return as_bfloat16(original(self, *map(as_float32, operands)))

    return operation


def cast(original):
    def cast_impl(self, source, to):
        target = to.scalar
        if is_bfloat16(source):
            if target == tl.bfloat16:
                return source
            if target == tl.float32:
                return as_float32(source)
            return original(self, as_float32(source), to)
        if target == tl.bfloat16:
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, source, to)

    return cast_impl


ORDINARY_FLOATS = (tl.bfloat16, tl.float16, tl.float32, tl.float64)


def create_fp_to_fp(original):
    def convert(self, source, to, rounding):
        ordinary = source.dtype.scalar in ORDINARY_FLOATS and to.scalar in ORDINARY_FLOATS
        if ordinary and rounding in (None, I._ir.ROUNDING_MODE.RTNE):
            return self.cast_impl(source, to)
        return original(self, source, to, rounding)

    return convert


def create_fma(original):
    def fma(self, x, y, z):
        if is_bfloat16(z):
            return as_bfloat16(fma(self, as_float32(x), as_float32(y), as_float32(z)))
        if z.data.dtype != np.float32:
            return original(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data.astype(np.float64)
        return Handle((exact + z.data).astype(np.float32), z.dtype.scalar)

    return fma


def create_dot(original):
    def dot(self, a, b, d, *rest):
        if is_bfloat16(a) or is_bfloat16(b):
            # The accumulator keeps its own type; only the operands are widened.
            return original(self, as_float32(a), as_float32(b), d, *rest)
        return original(self, a, b, d, *rest)

    return dot


def create_atomic_rmw(original):
    def atomic_rmw(self, operation, pointer, value, mask, semantics, scope):
        if is_bfloat16(value):
            raise NotImplementedError(
                "bfloat16 atomics are not interpreted; results must not use float atomics"
            )
        return original(self, operation, pointer, value, mask, semantics, scope)

    return atomic_rmw


def reduction(original):
    """A reduction or scan over a bfloat16 tensor: in float32, rounded once."""

    def reduce(self, tensors, *args, **kwargs):
        first = tensors[0] if isinstance(tensors, tuple) else tensors
        if not is_bfloat16(first.handle):
            return original(self, tensors, *args, **kwargs)
        wide = tl.core.tensor(
            as_float32(first.handle), tl.block_type(tl.float32, list(first.handle.data.shape))
        )
        result = original(self, wide, *args, **kwargs)

        def back(tensor):
            if tensor.dtype.scalar != tl.float32:
                return tensor
            kind = tl.block_type(tl.bfloat16, tensor.shape) if tensor.type.is_block() else tl.bfloat16
            return tl.core.tensor(as_bfloat16(tensor.handle), kind)

        return type(result)(map(back, result)) if isinstance(result, (tuple, list)) else back(result)

    return reduce


class Extents:
    """The address ranges a launch may touch."""

    def __init__(self):
        self.ranges: list[tuple[int, int]] = []

    def allow(self, argument) -> None:
        if isinstance(argument, tuple):
            for element in argument:
                self.allow(element)
        elif isinstance(argument, TensorDescriptor):
            self.allow(argument.base)
        elif isinstance(argument, torch.Tensor) and argument.numel():
            last = sum((n - 1) * s for n, s in zip(argument.shape, argument.stride()))
            start = argument.data_ptr()
            self.ranges.append((start, start + (last + 1) * argument.element_size()))

    def check(self, pointers: np.ndarray, mask: np.ndarray, width: int, what: str) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.uint64)
        legal = np.zeros(addresses.shape, bool)
        for start, end in self.ranges:
            legal |= (addresses >= np.uint64(start)) & (addresses <= np.uint64(end - width))
        if not legal.all():
            wild = int(addresses[~legal][0])
            nearest = min(self.ranges, key=lambda r: min(abs(wild - r[0]), abs(wild - r[1])), default=(0, 0))
            raise OutOfBounds(
                f"{what} of {width} bytes {wild - nearest[0]} bytes from the start of a tensor of "
                f"{nearest[1] - nearest[0]} bytes ({np.count_nonzero(~legal)} lanes out of bounds)"
            )


@contextlib.contextmanager
def interpreter():
    """Interprets every Triton kernel launched inside the block, on CPU tensors."""
    undo = []
    extents = Extents()

    def patch(owner, name, value):
        missing = name not in vars(owner)
        undo.append((owner, name, None if missing else vars(owner)[name], missing))
        setattr(owner, name, value)

    def masked_load(original):
        def create_masked_load(self, pointers, mask, other, cache_modifier, eviction_policy, is_volatile):
            kind = I._get_np_dtype(pointers.get_element_ty())
            extents.check(pointers.data, mask.data, kind.itemsize, "load")
            if other is None:
                garbage = np.full(pointers.data.shape + (kind.itemsize,), 0xFF, np.uint8).view(kind)[..., 0]
                other = Handle(garbage, pointers.get_element_ty())
            return original(self, pointers, mask, other, cache_modifier, eviction_policy, is_volatile)

        return create_masked_load

    def masked_store(original):
        def create_masked_store(self, pointers, value, mask, cache_modifier, eviction_policy):
            width = I._get_np_dtype(pointers.get_element_ty()).itemsize
            extents.check(pointers.data, mask.data, width, "store")
            return original(self, pointers, value, mask, cache_modifier, eviction_policy)

        return create_masked_store

    def init_arguments(original):
        def _init_args_hst(self, args, kwargs):
            host_args, host_kwargs = original(self, args, kwargs)
            extents.ranges.clear()
            for argument in (*host_args, *host_kwargs.values()):
                extents.allow(argument)
            return host_args, host_kwargs

        return _init_args_hst

    for name in ("binary_op", "unary_op", "ternary_op", "create_rsqrt", "create_erf"):
        patch(Builder, name, through_float32(getattr(Builder, name)))
    for name, wrapper in (
        ("cast_impl", cast),
        ("create_fp_to_fp", create_fp_to_fp),
        ("create_fma", create_fma),
        ("create_dot", create_dot),
        ("create_atomic_rmw", create_atomic_rmw),
        ("create_masked_load", masked_load),
        ("create_masked_store", masked_store),
    ):
        patch(Builder, name, wrapper(getattr(Builder, name)))
    patch(Builder, "create_maxnumf", lambda self, a, b: self.binary_op(a, b, np.fmax))
    patch(Builder, "create_minnumf", lambda self, a, b: self.binary_op(a, b, np.fmin))
    patch(Builder, "get_bf16", lambda self, v: Handle(narrow(np.array([v], np.float32)), tl.bfloat16))
    for owner, name in (
        (I.ReduceOps, "sum"),
        (I.ReduceOps, "min_max"),
        (I.ScanOps, "cumsum"),
        (I.ScanOps, "cumprod"),
    ):
        patch(owner, name, reduction(getattr(owner, name)))
    patch(I.GridExecutor, "_init_args_hst", init_arguments(I.GridExecutor._init_args_hst))
    patch(I.FunctionRewriter, "_compile_and_exec", compile_without_pollution)

    # One patch of the language for the whole block: Triton's own is undone after the kernel, but what device
    # functions patch on top of it is not.
    visible = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    language = I._patch_lang(visible)
    language.set_attr(tl.tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))
    nothing = types.SimpleNamespace(restore=lambda: None)
    patch(I, "_patch_lang", lambda fn: nothing)

    patch(
        JITFunction,
        "run",
        lambda self, *a, grid, warmup, **k: interpreted(self).run(*a, grid=grid, warmup=warmup, **k),
    )
    patch(JITFunction, "__call__", lambda self, *a, **k: interpreted(self)(*a, **k))
    patch(driver, "_active", InterpreterDriver())
    try:
        # Overflow to infinity and NaN are results like any other.
        with np.errstate(all="ignore"):
            yield
    finally:
        for owner, name, value, missing in reversed(undo):
            if missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        language.restore()


_interpreted: dict = {}


def interpreted(kernel: JITFunction):
    """The interpreted twin of a compiled kernel or device function."""
    if kernel.fn not in _interpreted:
        _interpreted[kernel.fn] = I.InterpretedFunction(kernel.fn)
    return _interpreted[kernel.fn]


def compile_without_pollution(self, tree):
    """Triton copies its whole interpreter module into the kernel's globals; one name of it is needed."""
    code = compile(tree, filename=self.filename, mode="exec")
    namespace = dict(self.kwargs)
    self.fn.__globals__.setdefault("interpreter_semantic", I.interpreter_semantic)
    exec(code, self.fn.__globals__, namespace)
    return namespace[self.fn.__name__]
