"""The forward of a whole network in inference on the CPU, taken from one program instead of its modules.

Between two operations of a network lies Python: modules, their checks, the choice of an implementation. While
it runs the other cores wait. Measured (fp32, two cores, one image): a fifth to half of the time of ResNet-50,
GoogLeNet and MobileNetV2. What it decides is the same at every call of one kind. So the second call is
recorded, operation by operation (``kernels.recording``), the third compared, and from then on the operations
are called one after the other, on the same weights.

The program of a call is right as long as nothing has changed that the Python might have looked at. So it is
taken only while

* the arguments have the kind that they had, and no gradients, compiler, tracer, mode, autocast or functorch
  are around;
* the network has the modules, parameters and buffers that it had, each with its version, every module the
  attributes and the class that it had, none of the inner ones hooks, and all are in evaluation mode;
* what chooses implementations stands as it stood, and no new generation of weights has begun
  (``fused.packing``).

And it is recorded only where all code in between is known: each module is PyTorch's own or was captured. The
first time a program's result is compared with that of the modules, bit by bit.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Hashable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastnets.fused import dispatch, packing
from fastnets.fused.batch_norm import is_inference, is_unobserved_inference
from fastnets.kernels.recording import Recorder, Unfit

__all__ = ["by_program", "describe", "forget"]

_MOST = 8  # programs of one network; the oldest goes first
_PLAIN = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_version = operator.attrgetter("_version")


class _State:
    """All of a network that its forward may look at, and whether it is still that.

    The network itself is not held: it holds what is kept for it.
    """

    def __init__(self, network: nn.Module):
        inner = list(network.modules())
        self.attributes = [vars(m) for m in inner]
        self.values = [dict(attributes) for attributes in self.attributes]
        self.classes = [m.__class__ for m in inner[1:]]
        self.inner = inner[1:]
        self.members = [vars(m)[kind] for m in inner for kind in ("_modules", "_parameters", "_buffers")]
        self.held = self._members()
        self.tensors = [t for t in self.held if isinstance(t, Tensor)]
        self.versions = None
        if all(t.__class__ in _PLAIN and not t.is_inference() for t in self.tensors):
            self.versions = self._versions()
        self.hooks = [vars(m)[kind] for m in inner[1:] for kind in _HOOKS]
        self.evaluates = not any(m.training for m in inner)
        self.patched = any("forward" in vars(m) for m in inner[1:])
        self.switches = _switches()

    def _members(self) -> list:
        return [*chain.from_iterable(map(dict.values, self.members))]

    def _versions(self) -> list[int]:
        return [*map(_version, self.tensors)]

    @property
    def serves(self) -> bool:
        """Whether a program may be recorded, or taken, in this state."""
        return self.evaluates and not self.patched and self.versions is not None and not any(self.hooks)

    def is_current(self) -> bool:
        if self.switches != _switches() or any(self.hooks):
            return False
        now = self._members()
        if len(now) != len(self.held) or not all(map(operator.is_, now, self.held)):
            return False
        if [m.__class__ for m in self.inner] != self.classes:
            return False
        try:
            if self.attributes != self.values:
                return False
        except (RuntimeError, TypeError, ValueError):  # tensors or arrays, which do not compare to one truth
            return False
        return self.versions is not None and self._versions() == self.versions


def _switches() -> tuple:
    """What a forward depends on besides its network and arguments."""
    return (
        dispatch.switches(),
        packing.generation(),
        torch._C._get_mkldnn_enabled(),
        torch.is_inference_mode_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_num_threads(),
    )


class _Program:
    """The forward for one kind of arguments, as far as it is known."""

    __slots__ = ("known", "run", "sure", "tries")

    def __init__(self):
        self.run: Callable[[tuple], object] | None = None
        self.known: dispatch.Remembered | None = None
        self.sure = False  # its result has been compared
        self.tries = 2  # the first may find weights to fold


class _Network:
    """The programs of one network, all of one state, and why there is none for the last kind of call."""

    __slots__ = ("programs", "state", "why_not")

    def __init__(self, network: nn.Module):
        self.state = _State(network)
        self.programs: dict[Hashable, _Program] = {}
        self.why_not = ""


_networks: weakref.WeakKeyDictionary[nn.Module, _Network] = weakref.WeakKeyDictionary()


def by_program(forward: Callable, is_known: Callable[[nn.Module], bool]) -> Callable:
    """``forward(self, *args)`` of a whole network, by programs wherever the top of this file allows.

    is_known: of each module of the network, whether its forward does nothing that a program would miss.
    """

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        if kwargs or not args or self.training or not is_inference() or not _takes(args[0]):
            return forward(self, *args, **kwargs)
        network = _networks.get(self)
        if network is not None:
            program = network.programs.get(_kind(args))
            sure = program is not None and program.sure
            if sure and program.known.serves(args, ()) and network.state.is_current():
                return program.run(args)
        if not all(map(is_unobserved_inference, args)) or not _distinct(args):
            return forward(self, *args)
        return _run_and_record(forward, self, args, is_known)

    return run


def forget(network: nn.Module) -> None:
    """Drop the programs of a network, and the weights that they hold."""
    _networks.pop(network, None)


def describe(network: nn.Module) -> str:
    """One sentence for reports; nothing where the network was not called in inference on the CPU."""
    found = _networks.get(network)
    if found is None:
        return ""
    count = sum(program.sure for program in found.programs.values())
    why_not = f"; not for the last kind of call: {found.why_not}" if found.why_not else ""
    if not count and not why_not:
        return ""
    return f"in inference on the CPU {count} kinds of call are taken from a program each{why_not}"


def _takes(x: object) -> bool:
    return x.__class__ is Tensor and x.device.type == "cpu" and dispatch.REMEMBERS


def _kind(args: tuple) -> Hashable:
    return tuple(
        [(x.shape, x.stride(), x.dtype, x.is_inference()) if x.__class__ is Tensor else None for x in args]
    )


def _distinct(args: tuple) -> bool:
    return len({id(x) for x in args}) == len(args)


def _run_and_record(forward: Callable, module: nn.Module, args: tuple, is_known: Callable) -> object:
    """The first call with a state fills caches, the next is recorded, the one after that compared."""
    network = _networks.get(module)
    if network is None or not network.state.is_current():
        _networks[module] = _Network(module)
        return forward(module, *args)
    program = network.programs.setdefault(_kind(args), _Program())
    while len(network.programs) > _MOST:
        del network.programs[next(iter(network.programs))]
    if program.run is not None and program.known.serves(args, ()):
        result = _run_and_compare(forward, module, args, program)
        network.why_not = "" if program.sure else "its modules give another result each time"
        return result
    if not program.tries or not network.state.serves or torch.is_autocast_enabled("cpu"):
        return forward(module, *args)
    program.tries -= 1
    for name, inner in module.named_modules():
        if not is_known(inner):
            program.tries = 0
            network.why_not = f"{name or type(module).__name__} runs code that was not captured"
            return forward(module, *args)
    recorder = Recorder(args, dispatch.body_of, holds_constants=True)
    with recorder:
        result = forward(module, *args)
    network.why_not = "it draws random numbers, looks at values or writes into its arguments"
    if recorder.replayable and network.state.is_current():
        try:
            program.run = recorder.program(result)
        except Unfit:
            network.why_not = f"it returns a {type(result).__name__}"
            return result
        program.known = dispatch.Remembered(program.run, args, ())
        network.why_not = ""
    return result


def _run_and_compare(forward: Callable, module: nn.Module, args: tuple, program: _Program) -> object:
    result = forward(module, *args)
    ours, spec = pytree.tree_flatten(program.run(args))
    theirs, their_spec = pytree.tree_flatten(result)
    if spec == their_spec and all(map(_equal, ours, theirs)):
        program.sure = True
    else:
        program.run, program.tries = None, 0
    return result


def _equal(a: object, b: object) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
