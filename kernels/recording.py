"""What a call does with its tensors, written down once and repeated for other tensors.

What a call decides depends on the sizes, strides and dtypes of its tensors and on its options, and is the
same whenever those are: only addresses change. So its steps are written out as straight Python: which memory
it asks for, which of PyTorch's operations it calls on what, which compiled kernels it launches on what. A
program of these steps decides nothing.

Two take such programs: ``kernels.replay`` of a launcher's calls, ``fused.whole_forward`` of a network's.

A call can be repeated only if allocations, views, operations of ATen and of PyTorch's CPU libraries, and our
launches are all that it does. The operations must be functions of their arguments, or write into what the
call made itself: one that draws random numbers, looks at values or writes into an argument forbids
repetition, and so does any other, unless ``open`` knows of what steps it consists.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# PyTorch's own operations; the latter two on the CPU alone.
_NAMESPACES = ("aten", "mkldnn", "mkl")
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
    aten.add_.Tensor: Tensor.add_,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.clamp_min_.default: torch.clamp_min_,
    aten.clone.default: torch.clone,
    aten.convolution.default: torch.convolution,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.permute.default: torch.permute,
    aten.relu_.default: torch.relu_,
    aten.select.int: torch.select,
    aten.sigmoid_.default: torch.sigmoid_,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.unbind.int: torch.unbind,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}
# Element by element: what writes the same values where it has just read.
_IN_PLACE = {
    aten.add.Tensor: Tensor.add_,
    aten.addcmul.default: Tensor.addcmul_,
    aten.gelu.default: aten.gelu_.default._op,
    aten.hardsigmoid.default: aten.hardsigmoid_.default._op,
    aten.hardswish.default: aten.hardswish_.default._op,
    aten.hardtanh.default: aten.hardtanh_.default._op,
    aten.leaky_relu.default: aten.leaky_relu_.default._op,
    aten.mul.Tensor: Tensor.mul_,
    aten.relu.default: torch.relu_,
    aten.sigmoid.default: torch.sigmoid_,
    aten.silu.default: aten.silu_.default._op,
    aten.tanh.default: torch.tanh_,
}
_UNFIT_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


class Unfit(Exception):
    """A replay would not do what was done."""


class _Recorders(threading.local):
    """The recorders that are modes of this thread now."""

    count = 0


_recorders = _Recorders()


def is_seen_by_modes() -> bool:
    """Whether a dispatch mode sees what is called. A recorder is none: what it sees is to be what is done
    where nobody looks on."""
    return torch._C._len_torch_dispatch_stack() > _recorders.count


@functools.cache
def _nature(op: Any) -> str:
    """What an operation does: "allocates", "views", "restrides", "computes", "writes", or "" for what is not
    repeated."""
    if op in _ALLOCATING:
        return "allocates"
    if op is aten.as_strided_.default:
        return "restrides"
    if not isinstance(op, torch._ops.OpOverload) or op.namespace not in _NAMESPACES:
        return ""
    if _UNFIT_TAGS & {*op.tags} and op is not aten.index.Tensor:
        return ""
    schema = op._schema
    if schema.is_mutable:
        return "writes"
    if len(schema.returns) == 1 and schema.returns[0].alias_info is not None:
        return "views"
    return "computes" if schema.returns else ""


def _is_random(op: Any, args: tuple, kwargs: dict) -> bool:
    """Dropout is random in training, attention with dropout; of what else may be, no more is known."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    for position, argument in enumerate(op._schema.arguments):
        if argument.name in ("dropout_p", "train", "training"):
            given = (
                args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            )
            return bool(given)
    return True


def _counts_values(op: Any, args: tuple) -> bool:
    """Whether the sizes of the result depend on values: those of a mask do, positions do not."""
    if op is not aten.index.Tensor:
        return False
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


class _Known:
    """A tensor of the call: an argument, something made in it, a constant, or a view of one of these.

    Its memory begins ``offset`` bytes into that of tensor ``base`` (-1: of a constant). ``number`` is its own
    among the call's tensors; None for a constant, which has a ``name``, and for a view that no step needed
    yet, made by ``origin``: (operation, args, kwargs, results, several), with what is known of the tensors in
    their places.
    """

    __slots__ = ("base", "name", "number", "offset", "origin")

    def __init__(self, number: int | None, base: int, offset: int = 0, name: str = ""):
        self.number = number
        self.base = base
        self.offset = offset
        self.name = name
        self.origin: Any = None


class _Step:
    """A line of the program: its source, the numbers of the tensors it reads and of those that it makes.

    in_place: the line that overwrites tensor ``overwrites``, which serves if that is not read again.
    """

    __slots__ = ("in_place", "makes", "overwrites", "reads", "source")

    def __init__(self, source: str, reads: Sequence[int], makes: Sequence[int] = ()):
        self.source = source
        self.reads = reads
        self.makes = makes
        self.in_place = ""
        self.overwrites = -1


class Recorder(TorchDispatchMode):
    """Sees all that a call does, as a mode to PyTorch and as ``launch``'s recorder to our kernels.

    It holds none of the call's tensors: what asks whether it alone does so gets the answer of any other call.

    open: the computation of an operation that is not PyTorch's, as a function of its arguments, or None.
    holds_constants: a tensor that is neither an argument nor made in the call is the same in every call, and
        held by the program. Otherwise it forbids repetition.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        open: Callable,
        *,
        takes_addresses: bool = False,
        holds_constants: bool = False,
    ):
        super().__init__()
        self.open = open
        self.known: dict[int, tuple[weakref.ref, _Known]] = {}
        self.alike: dict[tuple, _Known] = {}  # by what tells tensors of one memory apart
        self.given = [i for i, t in enumerate(tensors) if t is not None]
        for i in self.given:
            self._know(tensors[i], self._alike(tensors[i], _Known(i, i)))
        self.arguments = self.count = len(tensors)
        self.bases: dict[int, int] = {}  # by numbers
        self.device_type = tensors[self.given[0]].device.type
        self.takes_addresses = takes_addresses
        self.holds_constants = holds_constants
        self.steps: list[_Step] = []
        self.constants: dict[str, Any] = {}
        self.replayable = True
        self.calls = self.launches = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler to keep it away from a mode: two seconds and 70 MiB."""
        return False

    def __enter__(self):
        _recorders.count += 1
        return super().__enter__()

    def __exit__(self, *error):
        _recorders.count -= 1
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        body = None if func.namespace in _NAMESPACES else self.open(func)
        if body is not None:  # it is what it does
            with self:
                return body(*args, **kwargs)
        result = func(*args, **kwargs)
        if self.replayable:
            try:
                self._done(func, args, kwargs, result)
            except Unfit:
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
        except Unfit:
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
                return self._name(known, reads)
            if known.base < 0:
                return f"{self._name(known, reads)}.data_ptr()"
            reads.append(known.base)
            return f"a{known.base} + {known.offset}" if known.offset else f"a{known.base}"
        if isinstance(arg, tuple) and any(isinstance(a, Tensor) for a in arg):
            raise Unfit
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
        elif nature in ("views", "computes") and self._viewed(op, args, kwargs, result):
            pass
        elif nature and not _is_random(op, args, kwargs) and not _counts_values(op, args):
            if nature in ("writes", "restrides"):
                self._check_written(op, args, kwargs)
            if nature == "restrides":  # before that, whatever was to look at the old sizes has done so
                self._check_no_views_wait(self._find(args[0]).base)
            self._called(op, args, kwargs, result)
        else:
            raise Unfit

    def _viewed(self, op: Any, args: tuple, kwargs: dict, result: Any) -> bool:
        """Note views; False where the operation has made none."""
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if not args or not isinstance(args[0], Tensor):
            return False
        if not all(isinstance(view, Tensor) and _shares_memory(view, args[0]) for view in results):
            return False
        source = self._find(args[0])
        if op is aten.detach.default:  # PyTorch hands out detached what somebody holds already
            self._know(result, source)
            return True
        views = []
        for view in results:
            if not self._is_known(view):
                offset = 0
                if self.takes_addresses:
                    offset = source.offset + view.data_ptr() - args[0].data_ptr()
                self._know(view, self._alike(view, _Known(None, source.base, offset)))
            views.append(self._find(view))
        for view in views:
            if view.number is None and view.origin is None and not view.name:
                found = self._in_place_of_tensors((args, kwargs))
                view.origin = (op, *found, views, not isinstance(result, Tensor))
        return True

    def _check_written(self, op: Any, args: tuple, kwargs: dict) -> None:
        for position, argument in enumerate(op._schema.arguments):
            if argument.is_write:
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                if not isinstance(written, Tensor) or self._find(written).base < self.arguments:
                    raise Unfit

    def _check_no_views_wait(self, base: int) -> None:
        self.alike = {place: known for place, known in self.alike.items() if place[0] != base}
        for _, known in self.known.values():
            if known.base == base and known.origin is not None and known.number is None:
                raise Unfit

    def _called(self, op: Any, args: tuple, kwargs: dict, result: Any) -> None:
        if not isinstance(result, (Tensor, tuple, list)):
            if any(isinstance(arg, (Tensor, tuple, list)) for arg in (*args, *kwargs.values())):
                raise Unfit  # something found out about a tensor
            return  # a fact, such as to which dtype two others promote
        several = not isinstance(result, Tensor)
        results = list(result) if several else [result]
        old = [r for r in results if isinstance(r, Tensor) and self._is_known(r)]
        if old and len(old) < len(results):
            raise Unfit
        if old and not op._schema.is_mutable:
            return  # it handed back what it was given
        if old:
            results = []  # what it returns is what it wrote into
        given = [arg for arg in pytree.tree_leaves((args, kwargs)) if isinstance(arg, Tensor)]
        for r in results:
            if isinstance(r, Tensor):
                if (
                    r.__class__ is not Tensor
                    or r.requires_grad
                    or any(_shares_memory(r, arg) for arg in given)
                ):
                    raise Unfit
            elif r is not None and r.__class__ is not int:
                raise Unfit
        self.calls += 1
        found = self._in_place_of_tensors((args, kwargs))
        makes = [self._known_of_made(r) if isinstance(r, Tensor) else None for r in results]
        self._call(op, *found, makes, several)
        if op in _IN_PLACE and not several and results:
            self._offer_in_place(op, args, kwargs, results[0])

    def _offer_in_place(self, op: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
        """Let the last step overwrite its first operand, if that is all of a tensor of the call's own."""
        if op is aten.mul.Tensor and isinstance(args[1], Tensor) and args[0].shape != result.shape:
            args = (args[1], args[0], *args[2:])
        x, known = args[0], self._find(args[0])
        alike = (x.shape, x.stride(), x.dtype) == (result.shape, result.stride(), result.dtype)
        others = [self._find(arg) for arg in (*args[1:], *kwargs.values()) if isinstance(arg, Tensor)]
        own = known.number is not None and known.number == known.base >= self.arguments
        if not alike or not own or any(other.base == known.base for other in others):
            return
        step, reads = self.steps[-1], []
        words = self._words(*self._in_place_of_tensors((args, kwargs)), reads)
        step.in_place = f"t{step.makes[0]} = {self._constant(_IN_PLACE[op])}({words})"
        step.overwrites = known.base

    def _call(self, op: Any, args: tuple, kwargs: dict, makes: list[_Known | None], several: bool) -> None:
        reads: list[int] = []
        words = self._words(args, kwargs, reads)
        numbers = [None if known is None else self._numbered(known) for known in makes]
        left = ", ".join("_" if number is None else f"t{number}" for number in numbers)
        left = f"{left}{',' * several} = " if numbers else ""
        source = f"{left}{self._constant(_BINDINGS.get(op, op._op))}({words})"
        self.steps.append(_Step(source, reads, [number for number in numbers if number is not None]))

    def _made(self, tensor: Tensor) -> int:
        """The number of a tensor that the step to be added makes."""
        return self._numbered(self._known_of_made(tensor))

    def _known_of_made(self, tensor: Tensor) -> _Known:
        known = _Known(None, self.count)
        self._numbered(known)
        self._know(tensor, self._alike(tensor, known))
        return known

    def _alike(self, tensor: Tensor, known: _Known) -> _Known:
        """The first of the call's tensors that is the same part of the same memory, seen in the same way."""
        if known.base < 0 or tensor.layout is not torch.strided:
            return known
        place = (known.base, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        return self.alike.setdefault(place, known)

    def _numbered(self, known: _Known) -> int:
        if known.number is None:
            known.number = self.count
            self.count += 1
            self.bases[known.number] = known.base
        return known.number

    def _know(self, tensor: Tensor, known: _Known) -> None:
        self.known[id(tensor)] = weakref.ref(tensor), known

    def _is_known(self, tensor: Tensor) -> bool:
        entry = self.known.get(id(tensor))  # of another tensor, maybe, that is gone
        return entry is not None and entry[0]() is tensor

    def _find(self, tensor: Tensor) -> _Known:
        if self._is_known(tensor):
            return self.known[id(tensor)][1]
        if not self.holds_constants:
            raise Unfit
        known = _Known(None, -1, name=self._constant(tensor))
        self._know(tensor, known)
        return known

    def _in_place_of_tensors(self, value: Any) -> Any:
        """A nest of arguments, with what is known of tensors where they are."""
        if isinstance(value, Tensor):
            return self._find(value)
        if isinstance(value, dict):
            return {name: self._in_place_of_tensors(v) for name, v in value.items()}
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(self._in_place_of_tensors(v) for v in value)
        if isinstance(value, torch.Generator):
            raise Unfit
        return value

    def _name(self, known: _Known, reads: list[int]) -> str:
        """The name of a tensor in the program; a view is made where it is first needed."""
        if known.name:
            return known.name
        if known.number is None:
            self._call(*known.origin)
        reads.append(known.number)
        return f"t{known.number}"

    def _words(self, args: tuple, kwargs: dict, reads: list[int]) -> str:
        words = [self._word(arg, reads) for arg in args]
        return ", ".join([*words, *(f"{name}={self._word(arg, reads)}" for name, arg in kwargs.items())])

    def _word(self, value: Any, reads: list[int]) -> str:
        if isinstance(value, _Known):
            return self._name(value, reads)
        if isinstance(value, (list, tuple)) and any(isinstance(v, _Known) for v in value):
            return f"[{', '.join(self._word(v, reads) for v in value)}]"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        """A name for a value, so that programs of other sizes share their code."""
        if value is None or value is True or value is False:
            return str(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def result_of(self, result: Any, reads: list[int]) -> str:
        """What the program returns; raises ``Unfit`` where that is not of the call's own tensors."""
        if result is None:
            return "None"
        if isinstance(result, Tensor):
            return self._name(self._find(result), reads)
        if type(result) in (dict, OrderedDict):
            pairs = [f"({self._constant(k)}, {self.result_of(v, reads)})" for k, v in result.items()]
            return f"{self._constant(type(result))}([{', '.join(pairs)}])"
        if not isinstance(result, (tuple, list)):
            raise Unfit
        words = "".join(f"{self.result_of(r, reads)}, " for r in result)
        if type(result) is tuple:
            return f"({words})"
        if type(result) is list:
            return f"[{words}]"
        if not hasattr(result, "_make"):
            raise Unfit
        return f"{self._constant(type(result)._make)}(({words}))"

    def _last_readers(self, returned: Sequence[int]) -> dict[int, int]:
        """For each tensor the last step that reads it or a view of it; beyond all for what is returned."""
        last: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            for number in step.reads:
                last[self.bases.get(number, number)] = i
        return last | {self.bases.get(number, number): len(self.steps) for number in returned}

    def program(self, result: Any, driver: Any = None) -> Callable[[tuple], Any]:
        """The call as a function of its tensors, which returns ``UNFIT`` for those that it does not serve.

        driver: Triton's, for a program that launches or is tied to its device.
        """
        reads: list[int] = []
        returned = self.result_of(result, reads)
        last = {number: i for i, step in enumerate(self.steps) for number in (*step.makes, *step.reads)}
        dies: dict[int, list[int]] = {}
        for number, i in last.items():
            if number >= self.arguments and number not in reads:
                dies.setdefault(i, []).append(number)
        last_of_base = self._last_readers(reads)
        lines = ["def run(tensors):", f"    {''.join(f't{i}, ' for i in range(self.arguments))}= tensors"]
        names = {**self.constants, "empty": torch._C._VariableFunctions.empty_strided, "unfit": UNFIT}
        if driver is not None:
            lines += [f"    a{i} = t{i}.data_ptr()" for i in self.given]
            lines += [
                f"    if ({' | '.join(f'a{i}' for i in self.given)}) & 15 or current_device() != device:",
                "        return unfit",
            ]
            if self.calls:
                lines += ["    if autocasts(device_type):", "        return unfit"]
            if self.launches:
                lines.append("    stream = current_stream(device)")
            names |= {
                "autocasts": torch.is_autocast_enabled,
                "current_device": driver.get_current_device,
                "current_stream": driver.get_current_stream,
                "device": driver.get_current_device(),
                "device_type": self.device_type,
            }
        for i, step in enumerate(self.steps):
            overwrites = step.in_place and last_of_base[step.overwrites] == i
            lines.append(f"    {step.in_place if overwrites else step.source}")
            if self.takes_addresses:
                lines += [f"    a{number} = t{number}.data_ptr()" for number in step.makes]
            if i in dies:
                lines.append(f"    del {', '.join(f't{number}' for number in dies[i])}")
        lines.append(f"    return {returned}")
        exec(_compiled("\n".join(lines)), names)
        return names.pop("run")  # which would be a cycle, and live until the collector finds it


UNFIT = object()  # what a program returns for tensors that it does not serve


@functools.lru_cache(maxsize=1024)
def _compiled(source: str) -> CodeType:
    return compile(source, "<fastnets.kernels.recording>", "exec")


def notes_gradients(tensors: Sequence[Tensor]) -> bool:
    """Whether operations on these tensors are recorded for a backward."""
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return False
    key = torch._C.DispatchKey.AutogradCUDA if tensors[0].is_cuda else torch._C.DispatchKey.AutogradCPU
    return not torch._C._dispatch_tls_is_dispatch_key_excluded(key)
