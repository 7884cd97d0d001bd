"""Launchers' calls recorded once per kind and repeated, see ``kernels.recording``.

The second call of a kind is recorded, the first compiles what it launches. A call is recorded only if all
tensors that its steps take are arguments or were made in it, and if all its arguments lie on 16 bytes, as
memory that PyTorch hands out does. Whatever does not fit is run as it is, every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnets.kernels.launch import is_watched, kernels_of_driver, recorders
from fastnets.kernels.recording import UNFIT, Recorder, Unfit, notes_gradients

__all__ = ["Replayed"]

_PLAIN = (Tensor, torch.nn.Parameter)


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
        return self.function(*tensors, *self.options) if result is UNFIT else result

    def _run_and_record(self, tensors: tuple[Tensor | None, ...], compiled: Any) -> Any:
        """The first call compiles, and fills caches; the second shows what all others will do."""
        given = [i for i, t in enumerate(tensors) if t is not None]
        own = [tensors[i] for i in given]
        fit = len({id(t) for t in own}) == len(own) > 0
        fit = fit and all(t.__class__ in _PLAIN and t.data_ptr() % 16 == 0 for t in own)
        if not fit or compiled is not self.compiled or compiled.driver is None:
            self.compiled, self.program = compiled, None
            return self.function(*tensors, *self.options)
        recorder = Recorder(tensors, self.open, takes_addresses=compiled.takes_addresses)
        recorders.active = recorder
        try:
            with recorder:
                result = self.function(*tensors, *self.options)
        finally:
            recorders.active = None
        self.never = True
        # PyTorch's operations cast under autocast and note gradients; our launches do neither.
        device_type = own[0].device.type
        more = recorder.calls > 0 and (torch.is_autocast_enabled(device_type) or notes_gradients(own))
        if recorder.replayable and recorder.steps and not more:
            try:
                self.program = recorder.program(result, compiled.driver)
                self.never = False
            except Unfit:
                pass
        return result
