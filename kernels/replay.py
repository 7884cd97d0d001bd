"""The launches of an op, recorded once per kind of call and repeated for other tensors.

What a launcher decides (its checks, tile, grid, strides as the kernel takes them) depends on the sizes,
strides and dtypes of its tensors and on its options, and is the same whenever those are: only addresses
change. So the second call of a kind is recorded: which memory it asks for, and which compiled kernels it
launches on what. From then on a call of that kind allocates and launches, and decides nothing.

A call is recorded only if allocations, views and launches are all that it does, if
everything it launches on is an argument or was allocated in it, and if all its arguments lie on 16 bytes, as
memory that PyTorch hands out does. Whatever does not fit this is run as it is, every time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
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


class _Launch:
    """A compiled kernel with its grid and arguments; ``slots`` are (position, number of a tensor, offset)."""

    __slots__ = ("args", "compiled", "function", "grid", "packed_metadata", "run", "slots")

    def __init__(self, compiled: tuple, grid: tuple[int, ...], args: Sequence, slots: list[tuple]):
        self.run, self.function, self.packed_metadata, _, constants, *_ = compiled
        self.compiled = compiled  # keeps the kernel loaded
        self.grid = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        self.args = [*args, *constants]
        self.slots = slots


class _Program:
    """What one kind of call does: allocations, launches, and which tensors it returns."""

    __slots__ = ("allocations", "device", "launches", "result")

    def __init__(self, device: Any, allocations: list, launches: list[_Launch], result: Any):
        self.device = device
        self.allocations = allocations
        self.launches = launches
        self.result = result


class _Recorder(TorchDispatchMode):
    """Sees all that a call does, as a mode to PyTorch and as ``launch``'s recorder to our kernels."""

    def __init__(self, tensors: Sequence[Tensor | None], takes_addresses: bool):
        super().__init__()
        # By id: the number of the tensor that it is or views, bytes from its beginning, itself (so that the
        # id stays its own), whether it is a view. PyTorch hands out detached what somebody holds already.
        self.known = {id(t): (i, 0, t, False) for i, t in enumerate(tensors) if t is not None}
        self.count = len(tensors)
        self.takes_addresses = takes_addresses
        self.allocations: list[tuple] = []
        self.launches: list[_Launch] = []
        self.replayable = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        if func in _ALLOCATING:
            self.known[id(result)] = (self.count, 0, result, False)
            self.count += 1
            self.allocations.append((tuple(result.shape), result.stride(), result.dtype, result.device))
        elif len(returned) == 1 and returned[0].alias_info is not None and not func._schema.is_mutable:
            source = self.known.get(id(args[0]))
            for view in (result,) if isinstance(result, Tensor) else result:
                if source is None or view.dtype != args[0].dtype:
                    self.replayable = False
                elif id(view) not in self.known:
                    offset = source[1] + view.data_ptr() - args[0].data_ptr()
                    self.known[id(view)] = (
                        source[0],
                        offset,
                        view,
                        source[3] or func is not aten.detach.default,
                    )
        else:
            self.replayable = False
        return result

    def cannot_replay(self) -> None:
        """Something was done that a replay would not do."""
        self.replayable = False

    def launched(self, compiled: tuple | None, grid: tuple[int, ...], args: tuple) -> None:
        """``compiled`` was launched; None for what no compiled kernel is kept of."""
        slots = []
        for position, arg in enumerate(args):
            if isinstance(arg, Tensor):
                number, offset, *_ = self.known.get(id(arg), (None, 0))
                if number is None or (offset and not self.takes_addresses):
                    self.replayable = False
                slots.append((position, number, offset))
            elif isinstance(arg, tuple) and any(isinstance(a, Tensor) for a in arg):
                self.replayable = False
        if compiled is None or not self.replayable:
            self.replayable = False
            return
        self.launches.append(
            _Launch(compiled, grid, [None if isinstance(a, Tensor) else a for a in args], slots)
        )

    def number_of(self, result: Any) -> Any:
        """``result`` with each tensor's number in its place; raises ``KeyError`` for views and strangers."""
        if result is None:
            return None
        if isinstance(result, Tensor):
            number, _, _, is_view = self.known[id(result)]
            if is_view:
                raise KeyError(number)
            return number
        if type(result) is tuple:
            return _Several(tuple, [self.number_of(r) for r in result])
        if isinstance(result, tuple) and hasattr(result, "_make"):
            return _Several(type(result)._make, [self.number_of(r) for r in result])
        raise KeyError(type(result))


class _Several:
    """Several results: ``make`` of their numbers' tensors."""

    __slots__ = ("make", "numbers")

    def __init__(self, make: Callable, numbers: list):
        self.make = make
        self.numbers = numbers

    def of(self, tensors: list) -> Any:
        return self.make(
            [None if n is None else tensors[n] if n.__class__ is int else n.of(tensors) for n in self.numbers]
        )


class Replayed:
    """``function(*tensors, *options)`` for calls of one kind, called with a tuple of tensors."""

    __slots__ = ("compiled", "function", "never", "options", "program")

    def __init__(self, function: Callable, options: tuple):
        self.function = function
        self.options = options
        self.compiled: Any = None  # the driver's kernels that the program launches
        self.program: _Program | None = None
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
        active = compiled.driver
        device = program.device
        memory = [*tensors]
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        if bits & 15 or active.get_current_device() != device:
            return self.function(*tensors, *self.options)
        for size, stride, dtype, place in program.allocations:
            made = torch.empty_strided(size, stride, dtype=dtype, device=place)
            memory.append(made)
            addresses.append(made.data_ptr())
        if not compiled.takes_addresses:
            addresses = memory
        stream = active.get_current_stream(device)
        for launch in program.launches:
            args = launch.args.copy()
            for position, number, offset in launch.slots:
                args[position] = addresses[number] + offset if offset else addresses[number]
            launch.run(*launch.grid, stream, launch.function, launch.packed_metadata, None, None, None, *args)
        result = program.result
        return memory[result] if result.__class__ is int else result.of(memory)

    def _run_and_record(self, tensors: tuple[Tensor | None, ...], compiled: Any) -> Any:
        """The first call compiles, and fills caches; the second shows what all others will do."""
        given = [t for t in tensors if t is not None]
        distinct = len({id(t) for t in given}) == len(given)
        fit = distinct and all(t.__class__ in _PLAIN and t.data_ptr() % 16 == 0 for t in given)
        if not fit or compiled is not self.compiled or compiled.driver is None:
            self.compiled, self.program = compiled, None
            return self.function(*tensors, *self.options)
        recorder = _Recorder(tensors, compiled.takes_addresses)
        recorders.active = recorder
        try:
            with recorder:
                result = self.function(*tensors, *self.options)
        finally:
            recorders.active = None
        self.never = True
        if recorder.replayable and recorder.launches:
            with contextlib.suppress(KeyError):
                numbers = recorder.number_of(result)
                device = compiled.driver.get_current_device()
                self.program = _Program(device, recorder.allocations, recorder.launches, numbers)
                self.never = False
        return result
