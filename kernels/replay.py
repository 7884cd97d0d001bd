"""What an op does with its tensors, recorded once per kind of call and repeated for other tensors.

What a launcher decides (its checks, tile, grid, strides as the kernel takes them) depends on the sizes,
strides and dtypes of its tensors and on its options, and is the same whenever those are: only addresses
change. So the second call of a kind is recorded, and its steps written out as straight Python: which memory
it asks for, which of PyTorch's operations it calls on what, which compiled kernels it launches on what. From
then on a call of that kind takes these steps and decides nothing.

A call is recorded only if allocations, views, ATen's operations and our launches are all that it does, if
all tensors that these take are arguments or were made in it, and if all its arguments lie on 16 bytes, as
memory that PyTorch hands out does. The operations must be functions of their arguments, or write into what
the call made itself: one that draws random numbers, looks at values or writes into an argument forbids
repetition, and so does one that is not ATen's, unless ``open`` knows of what steps it consists. Whatever
does not fit this is run as it is, every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnets.kernels.launch import is_watched, kernels_of_driver, recorders

__all__ = ["Replayed"]

_PLAIN = (Tensor, torch.nn.Parameter)
aten = torch.ops.aten
_ALLOCATING = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
# An overload called through the dispatcher's own bindings takes its arguments apart by their schema, which
# costs three microseconds more than the Python function that takes the same ones.
_BINDINGS = {
    aten._addmm_activation.default: torch._addmm_activation,
    aten._scaled_dot_product_cudnn_attention.default: torch._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_efficient_attention.default: torch._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_flash_attention.default: torch._scaled_dot_product_flash_attention,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.clone.default: torch.clone,
    aten.convolution.default: torch.convolution,
    aten.mm.default: torch.mm,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.permute.default: torch.permute,
    aten.select.int: torch.select,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.unbind.int: torch.unbind,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}
_UNFIT_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


class _Unfit(Exception):
    """A replay would not do what was done."""


@functools.cache
def _nature(op: Any) -> str:
    """What an operation does: "allocates", "views", "computes", "writes", or "" for what is not repeated."""
    if op in _ALLOCATING:
        return "allocates"
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or _UNFIT_TAGS & {*op.tags}:
        return ""
    schema = op._schema
    if schema.is_mutable:
        return "writes"
    if len(schema.returns) == 1 and schema.returns[0].alias_info is not None:
        return "views"
    return "computes" if schema.returns else ""


def _is_random(op: Any, args: tuple, kwargs: dict) -> bool:
    """Attention is random only with dropout; of what else may be, no more is known."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    for position, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get(argument.name, 0.0)
            return given != 0.0
    return True


class _Known:
    """A tensor of the call: an argument, something made in it, or a view of either.

    Its memory begins ``offset`` bytes into that of tensor ``base``. ``number`` is its own among the call's
    tensors; None for a view that no step needed yet, made by ``origin``: (operation, args, kwargs, result).
    """

    __slots__ = ("base", "number", "offset", "origin", "tensor")

    def __init__(self, tensor: Tensor, number: int | None, base: int, offset: int = 0, origin: Any = None):
        self.tensor = tensor  # kept, so that its id stays its own
        self.number = number
        self.base = base
        self.offset = offset
        self.origin = origin


class _Step:
    """A line of the program: its source, the numbers of the tensors it reads and of those that it makes."""

    __slots__ = ("makes", "reads", "source")

    def __init__(self, source: str, reads: Sequence[int], makes: Sequence[int] = ()):
        self.source = source
        self.reads = reads
        self.makes = makes


class _Recorder(TorchDispatchMode):
    """Sees all that a call does, as a mode to PyTorch and as ``launch``'s recorder to our kernels."""

    def __init__(self, tensors: Sequence[Tensor | None], takes_addresses: bool, open: Callable):
        super().__init__()
        self.open = open
        self.known = {id(t): _Known(t, i, i) for i, t in enumerate(tensors) if t is not None}
        self.arguments = self.count = len(tensors)
        self.takes_addresses = takes_addresses
        self.steps: list[_Step] = []
        self.constants: dict[str, Any] = {}
        self.detached: list[Tensor] = []
        self.replayable = True
        self.calls = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        body = None if func.namespace == "aten" else self.open(func)
        if body is not None:  # it is what it does
            with self:
                return body(*args, **kwargs)
        result = func(*args, **kwargs)
        if self.replayable:
            try:
                self._done(func, args, kwargs, result)
            except _Unfit:
                self.replayable = False
        return result

    def cannot_replay(self) -> None:
        """Something was done that a replay would not do."""
        self.replayable = False

    def launched(self, compiled: tuple | None, grid: tuple[int, ...], args: tuple) -> None:
        """``compiled`` was launched; None for what no compiled kernel is kept of."""
        if compiled is None:
            self.replayable = False
        if not self.replayable:
            return
        try:
            reads: list[int] = []
            words = [self._launch_argument(arg, reads) for arg in args]
        except _Unfit:
            self.replayable = False
            return
        run, function, packed_metadata, _, constants, *_ = compiled
        self.launches += 1
        words = [
            *[self._constant(size) for size in (grid if len(grid) == 3 else (*grid, 1, 1)[:3])],
            "stream", self._constant(function), self._constant(packed_metadata), "None, None, None",
            *words, *map(self._constant, constants),
        ]  # fmt: skip
        self.constants[f"kept{self.launches}"] = compiled  # keeps the kernel loaded
        self.steps.append(_Step(f"{self._constant(run)}({', '.join(words)})", reads))

    def _launch_argument(self, arg: Any, reads: list[int]) -> str:
        if isinstance(arg, Tensor):
            known = self._find(arg)
            if not self.takes_addresses:
                return self._name(arg, reads)
            reads.append(known.base)
            return f"a{known.base} + {known.offset}" if known.offset else f"a{known.base}"
        if isinstance(arg, tuple) and any(isinstance(a, Tensor) for a in arg):
            raise _Unfit
        return self._constant(arg)

    def _done(self, op: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """An operation was called: a step where it is one that can be repeated."""
        nature = _nature(op)
        if nature == "allocates" and not kwargs.get("pin_memory"):
            kind = (tuple(result.shape), result.stride(), result.dtype, result.device)
            size, stride, dtype, device = map(self._constant, kind)
            number = self._made(result)
            source = f"t{number} = empty({size}, {stride}, dtype={dtype}, device={device})"
            self.steps.append(_Step(source, (), (number,)))
        elif nature == "views":
            self._viewed(op, args, kwargs, result)
        elif nature in ("computes", "writes") and not _is_random(op, args, kwargs):
            if nature == "writes":
                self._check_written(op, args, kwargs)
            self._called(op, args, kwargs, result)
        else:
            raise _Unfit

    def _viewed(self, op: Any, args: tuple, kwargs: dict, result: Any) -> None:
        source = self._find(args[0])
        if op is aten.detach.default:  # PyTorch hands out detached what somebody holds already
            self.detached.append(result)
            self.known[id(result)] = source
            return
        views = [result] if isinstance(result, Tensor) else result
        for view in views:
            if id(view) not in self.known:
                offset = source.offset + view.data_ptr() - args[0].data_ptr()
                self.known[id(view)] = _Known(view, None, source.base, offset, (op, args, kwargs, result))

    def _check_written(self, op: Any, args: tuple, kwargs: dict) -> None:
        for position, argument in enumerate(op._schema.arguments):
            if argument.is_write:
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                if not isinstance(written, Tensor) or self._find(written).base < self.arguments:
                    raise _Unfit

    def _called(self, op: Any, args: tuple, kwargs: dict, result: Any) -> None:
        if not isinstance(result, (Tensor, tuple, list)):
            if any(isinstance(arg, (Tensor, tuple, list)) for arg in (*args, *kwargs.values())):
                raise _Unfit  # something found out about a tensor
            return  # a fact, such as to which dtype two others promote
        several = not isinstance(result, Tensor)
        results = list(result) if several else [result]
        if op._schema.is_mutable and all(id(r) in self.known for r in results):
            results = []  # what it returns is what it wrote into
        for r in results:
            if isinstance(r, Tensor):
                if r.__class__ is not Tensor or r.requires_grad or id(r) in self.known:
                    raise _Unfit
            elif r is not None and r.__class__ is not int:
                raise _Unfit
        self.calls += 1
        self._call(op, args, kwargs, results, several)

    def _call(self, op: Any, args: tuple, kwargs: dict, results: list, several: bool) -> None:
        reads: list[int] = []
        words = [self._word(arg, reads) for arg in args]
        words += [f"{name}={self._word(arg, reads)}" for name, arg in kwargs.items()]
        makes = [self._made(r) if isinstance(r, Tensor) else None for r in results]
        left = ", ".join("_" if number is None else f"t{number}" for number in makes)
        left = f"{left}{',' * several} = " if makes else ""
        source = f"{left}{self._constant(_BINDINGS.get(op, op))}({', '.join(words)})"
        self.steps.append(_Step(source, reads, [number for number in makes if number is not None]))

    def _made(self, tensor: Tensor) -> int:
        """The number of a tensor that the step to be added makes."""
        number = self.count
        self.count += 1
        known = self.known.get(id(tensor))
        if known is None:
            self.known[id(tensor)] = _Known(tensor, number, number)
        else:  # a view that is needed now
            known.number = number
        return number

    def _find(self, tensor: Tensor) -> _Known:
        known = self.known.get(id(tensor))
        if known is None:
            raise _Unfit
        return known

    def _name(self, tensor: Tensor, reads: list[int]) -> str:
        """The name of a tensor in the program; a view is made where it is first needed."""
        known = self._find(tensor)
        if known.number is None:
            op, args, kwargs, result = known.origin
            several = not isinstance(result, Tensor)
            self._call(op, args, kwargs, list(result) if several else [result], several)
        reads.append(known.number)
        return f"t{known.number}"

    def _word(self, value: Any, reads: list[int]) -> str:
        if isinstance(value, Tensor):
            return self._name(value, reads)
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            return f"[{', '.join(self._word(v, reads) for v in value)}]"
        if isinstance(value, torch.Generator):
            raise _Unfit
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        """A name for a value, so that programs of other sizes share their code."""
        if value is None or value is True or value is False:
            return str(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def result_of(self, result: Any, reads: list[int]) -> str:
        """What the program returns; raises ``_Unfit`` where that is not of the call's own tensors."""
        if result is None:
            return "None"
        if isinstance(result, Tensor):
            return self._name(result, reads)
        if not isinstance(result, tuple):
            raise _Unfit
        words = "".join(f"{self.result_of(r, reads)}, " for r in result)
        if type(result) is tuple:
            return f"({words})"
        if not hasattr(result, "_make"):
            raise _Unfit
        return f"{self._constant(type(result)._make)}(({words}))"

    def program(self, result: Any, driver: Any, given: Sequence[int]) -> Callable[[tuple], Any]:
        """The call as a function of its tensors, which returns ``unfit`` for those that it does not serve.

        given: the numbers of the arguments that are not None.
        """
        reads: list[int] = []
        returned = self.result_of(result, reads)
        last = {number: i for i, step in enumerate(self.steps) for number in (*step.makes, *step.reads)}
        dies: dict[int, list[int]] = {}
        for number, i in last.items():
            if number >= self.arguments and number not in reads:
                dies.setdefault(i, []).append(number)
        lines = ["def run(tensors):", f"    {''.join(f't{i}, ' for i in range(self.arguments))}= tensors"]
        lines += [f"    a{i} = t{i}.data_ptr()" for i in given]
        lines += [
            f"    if ({' | '.join(f'a{i}' for i in given)}) & 15 or current_device() != device:",
            "        return unfit",
        ]
        if self.calls:
            lines += ["    if autocasts(device_type):", "        return unfit"]
        if self.launches:
            lines.append("    stream = current_stream(device)")
        for i, step in enumerate(self.steps):
            lines.append(f"    {step.source}")
            if self.takes_addresses:
                lines += [f"    a{number} = t{number}.data_ptr()" for number in step.makes]
            if i in dies:
                lines.append(f"    del {', '.join(f't{number}' for number in dies[i])}")
        lines.append(f"    return {returned}")
        names = {
            **self.constants,
            "autocasts": torch.is_autocast_enabled,
            "current_device": driver.get_current_device,
            "current_stream": driver.get_current_stream,
            "device": driver.get_current_device(),
            "device_type": next(iter(self.known.values())).tensor.device.type,
            "empty": torch._C._VariableFunctions.empty_strided,
            "unfit": _UNFIT,
        }
        exec(_compiled("\n".join(lines)), names)
        return names["run"]


_UNFIT = object()  # what a program returns for tensors that it does not serve


@functools.lru_cache(maxsize=1024)
def _compiled(source: str) -> CodeType:
    return compile(source, "<fastnets.kernels.replay>", "exec")


def _notes_gradients(tensors: Sequence[Tensor]) -> bool:
    """Whether operations on these tensors are recorded for a backward."""
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return False
    key = torch._C.DispatchKey.AutogradCUDA if tensors[0].is_cuda else torch._C.DispatchKey.AutogradCPU
    return not torch._C._dispatch_tls_is_dispatch_key_excluded(key)


class Replayed:
    """``function(*tensors, *options)`` for calls of one kind, called with a tuple of tensors.

    open: the computation of an operation that is not ATen's, as a function of its arguments, or None.
    """

    __slots__ = ("compiled", "function", "never", "open", "options", "program")

    def __init__(self, function: Callable, options: tuple, open: Callable = lambda op: None):
        self.function = function
        self.options = options
        self.open = open
        self.compiled: Any = None  # the driver's kernels that the program launches
        self.program: Callable[[tuple], Any] | None = None
        self.never = False  # it does what no replay would do

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> Any:
        if self.never or is_watched() or torch._C._len_torch_dispatch_stack() > 0:
            return self.function(*tensors, *self.options)
        program = self.program
        try:
            compiled = kernels_of_driver()
        except RuntimeError:  # no driver: the launcher knows what to say
            return self.function(*tensors, *self.options)
        if program is None or compiled is not self.compiled:
            return self._run_and_record(tensors, compiled)
        result = program(tensors)
        return self.function(*tensors, *self.options) if result is _UNFIT else result

    def _run_and_record(self, tensors: tuple[Tensor | None, ...], compiled: Any) -> Any:
        """The first call compiles, and fills caches; the second shows what all others will do."""
        given = [i for i, t in enumerate(tensors) if t is not None]
        own = [tensors[i] for i in given]
        fit = len({id(t) for t in own}) == len(own) > 0
        fit = fit and all(t.__class__ in _PLAIN and t.data_ptr() % 16 == 0 for t in own)
        if not fit or compiled is not self.compiled or compiled.driver is None:
            self.compiled, self.program = compiled, None
            return self.function(*tensors, *self.options)
        recorder = _Recorder(tensors, compiled.takes_addresses, self.open)
        recorders.active = recorder
        try:
            with recorder:
                result = self.function(*tensors, *self.options)
        finally:
            recorders.active = None
        self.never = True
        # PyTorch's operations cast under autocast and note gradients; our launches do neither.
        device_type = own[0].device.type
        more = recorder.calls > 0 and (torch.is_autocast_enabled(device_type) or _notes_gradients(own))
        if recorder.replayable and recorder.steps and not more:
            try:
                self.program = recorder.program(result, compiled.driver, given)
                self.never = False
            except _Unfit:
                pass
        return result
