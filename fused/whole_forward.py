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
from fastnets.fused.batch_norm import has_hooks, is_inference, is_unobserved_inference
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

    __slots__ = (
        *("attributes", "values", "inner", "classes", "members", "held", "tensors", "versions", "hooks"),
        *("serves", "switches"),
    )

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        self.attributes = [vars(m) for m in modules]
        self.values = [dict(attributes) for attributes in self.attributes]
        self.inner = modules[1:]
        self.classes = [*map(type, self.inner)]
        self.members = [vars(m)[kind] for m in modules for kind in ("_modules", "_parameters", "_buffers")]
        self.held = self._members()
        self.hooks = [vars(m)[kind] for m in self.inner for kind in _HOOKS]
        self.switches = _switches()
        self.tensors = [t for t in self.held if isinstance(t, Tensor)]
        plain = all(t.__class__ in _PLAIN and not t.is_inference() for t in self.tensors)
        self.versions = self._versions() if plain else []
        # Whether a program may be recorded, or taken, in this state.
        self.serves = plain and not any(map(has_hooks, self.inner)) and not any(m.training for m in modules)

    def _members(self) -> list:
        return [*chain.from_iterable(map(dict.values, self.members))]

    def _versions(self) -> list[int]:
        return [*map(_version, self.tensors)]

    def is_current(self) -> bool:
        if not self.serves:  # which hooks keep it from more often than the rest
            return any(self.hooks)
        held = self.held
        now = self._members()
        if len(now) != len(held) or not all(map(operator.is_, now, held)) or any(self.hooks):
            return False
        if self.switches != _switches() or [*map(type, self.inner)] != self.classes:
            return False
        try:
            return self.attributes == self.values and self._versions() == self.versions
        except (RuntimeError, TypeError, ValueError):  # tensors or arrays, which do not compare to one truth
            return False


def _switches() -> tuple:
    """What a forward depends on besides its network and arguments."""
    return (
        dispatch.switches(),
        dispatch.are_decisions_watched(),
        packing.generation(),
        torch._C._get_mkldnn_enabled(),
        torch.is_inference_mode_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )


class _Program:
    """The forward for one kind of arguments, as far as it is known."""

    __slots__ = ("fits", "run", "sure", "tries")

    def __init__(self):
        self.run: Callable[[tuple], object] | None = None
        self.fits: Callable[[tuple], bool] | None = None
        self.sure = False  # its result has been compared
        self.tries = 2  # the first may find weights to fold


class _Network:
    """The programs of one network, all of one state, and why there is none for the last kind of call."""

    __slots__ = ("last", "of", "programs", "state", "why_not")

    def __init__(self, network: nn.Module):
        self.of = weakref.ref(network, functools.partial(packing.drop_dead, _networks.pop, id(network)))
        self.state = _State(network)
        self.programs: dict[Hashable, _Program] = {}
        self.last: _Program | None = None  # the one that served the last call, compared
        self.why_not = ""


_networks: dict[int, _Network] = {}  # by identity, which is found sooner than a weak key


def _network_of(module: nn.Module) -> _Network | None:
    network = _networks.get(id(module))
    return network if network is not None and network.of() is module else None


def by_program(forward: Callable, is_known: Callable[[nn.Module], bool]) -> Callable:
    """``forward(self, *args)`` of a whole network, by programs wherever the top of this file allows.

    is_known: of each module of the network, whether its forward does nothing that a program would miss.
    """

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        if kwargs or not args or not is_inference():
            return forward(self, *args, **kwargs)
        network = _network_of(self)
        last = None if network is None else network.last
        if last is not None and last.fits(args) and network.state.is_current():
            return last.run(args)
        if self.training or not all(map(_takes, args)) or len({id(x) for x in args}) < len(args):
            return forward(self, *args)
        return _run_and_record(forward, self, network, args, is_known)

    return run


def forget(module: nn.Module) -> None:
    """Drop the programs of a network, and the weights that they hold."""
    _networks.pop(id(module), None)


def describe(module: nn.Module) -> str:
    """One sentence for reports; nothing where the network was not called in inference on the CPU."""
    network = _network_of(module)
    if network is None:
        return ""
    count = sum(program.sure for program in network.programs.values())
    why_not = f"; not for the last kind of call: {network.why_not}" if network.why_not else ""
    if not count and not why_not:
        return ""
    return f"in inference on the CPU {count} kinds of call are taken from a program each{why_not}"


def _takes(x: object) -> bool:
    return dispatch.REMEMBERS and is_unobserved_inference(x) and not torch.is_autocast_enabled("cpu")


def _kind(args: tuple[Tensor, ...]) -> Hashable:
    return tuple([(x.shape, x.stride(), x.dtype, x.is_inference()) for x in args])


def _run_and_record(
    forward: Callable, module: nn.Module, network: _Network | None, args: tuple, is_known: Callable
) -> object:
    """The first call with a state fills caches, the next is recorded, the one after that compared."""
    if network is None or not network.state.is_current():
        _networks[id(module)] = _Network(module)
        return forward(module, *args)
    kind = _kind(args)
    program = network.programs.setdefault(kind, _Program())
    while len(network.programs) > _MOST:
        del network.programs[next(iter(network.programs))]
    if program.run is not None and program.fits(args):
        if program.sure:
            network.last = program
            return program.run(args)
        result = _run_and_compare(forward, module, args, program)
        network.why_not = "" if program.sure else "its modules give another result each time"
        return result
    if not program.tries or not network.state.serves:
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
        program.fits = dispatch.same_kind_as(args)
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
