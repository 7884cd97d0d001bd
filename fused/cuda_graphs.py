"""CUDA graphs of whole forwards: what ``optimize(cuda_graphs=True)`` does at each call of the network.

Launched one by one, the kernels of a small batch end before the host has launched the next. A CUDA graph
holds the launches of one forward and starts them all at once. One is captured for each kind of call (shapes,
strides, dtypes, device), the second time that it comes; the first runs as usual and compiles what it needs.
A replay copies the inputs to where the graph reads them, and clones its outputs: they are the caller's own.

A graph launches the same kernels on the same addresses whatever happens to the network. So it is replayed
only while every module has the class, the parameters and buffers (by address) and the mode that it had, and
the switches that choose kernels stand as they stood; weights may change in place, and where vendors' calls
folded them a new graph is captured. What a forward reads besides parameters, buffers and inputs is frozen:
call ``fastnets.refresh(model)`` after changing that. Everything else runs as usual: with gradients, in
training, under autocast, compilers, tracers, dispatch modes and functorch, with hooks on inner modules,
within another capture, on other devices than CUDA, for arguments that are not tensors, and a network whose
forward cannot be captured or writes into its inputs (a warning tells why). ``explain`` says why the last
call that ran as usual did. Moving or converting the network frees its graphs.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, cuda, nn
from torch.utils import _pytree as pytree

from fastnets.fused import dispatch, packing
from fastnets.fused.attention import switches_of_sdpa
from fastnets.fused.batch_norm import has_hooks, is_unobserved

__all__ = ["describe", "forget", "replayed"]

_MOST = 8  # graphs of one network; the one not used for longest goes first
_SEEN = 64  # kinds of calls remembered as seen once
_WARM_UPS = 2  # on the capturing stream, whose workspaces are its own
_CONSTANTS = (bool, int, float, str, type(None))
_PLAIN = (Tensor, nn.Parameter)


class _Graph:
    """One captured forward."""

    def __init__(self, network: _Network, forward: Callable, module: nn.Module, arguments: tuple):
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
                           for x in arguments]  # fmt: skip
            stream = network.capture_stream(arguments[0].device)
            stream.wait_stream(cuda.current_stream())
            with cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    forward(module, *self.inputs)
            cuda.current_stream().wait_stream(stream)
            given = [x._version for x in self.inputs]
            self.graph = cuda.CUDAGraph()
            # Other threads may allocate meanwhile, as those that pin memory for data loaders do.
            with cuda.graph(self.graph, network.pool, stream, capture_error_mode="thread_local"):
                result = forward(module, *self.inputs)
        if given != [x._version for x in self.inputs]:
            raise RuntimeError("it writes into its inputs, where a replay would write into copies")
        self.streams = {cuda.current_stream()}
        self.outputs, self.spec = pytree.tree_flatten(result)
        for leaf in self.outputs:
            if not isinstance(leaf, (Tensor, *_CONSTANTS)):
                kind = type(leaf).__name__
                raise RuntimeError(f"it returns a {kind}, which may hold tensors that a replay overwrites")
        # What is read at fixed addresses stays allocated as long as the graph: no other tensor comes to lie
        # there, and an address tells a tensor.
        self.tensors = [t.detach() for t in _tensors_of(module)]
        self.folds = any(packing.keeps(t) for t in module.parameters())

    def replay(self, arguments: tuple, stream: object) -> object:
        if stream not in self.streams:  # its work on them may not be done yet when the graph goes
            self.streams.add(stream)
            for static in self.inputs:
                static.record_stream(stream)
        for static, x in zip(self.inputs, arguments):
            static.copy_(x)
        self.graph.replay()
        outputs = [t.clone() if isinstance(t, Tensor) else t for t in self.outputs]
        return pytree.tree_unflatten(outputs, self.spec)


class _Network:
    """The graphs of one network, by kind of call; its memory pool, and what could not be captured."""

    def __init__(self):
        self.graphs: dict[tuple, tuple[list, _Graph]] = {}
        self.seen: dict[tuple, None] = {}
        self.failed = ""
        self.epoch = packing.epoch()
        self.lock = threading.RLock()  # a forward may call its own network
        self._pool = None
        self._stream = None
        self._last_stream = None

    @property
    def pool(self):
        if self._pool is None:
            self._pool = cuda.graph_pool_handle()
        return self._pool

    def capture_stream(self, device: torch.device):
        if self._stream is None or self._stream.device != device:
            self._stream = cuda.Stream(device)
        return self._stream

    def run(self, forward: Callable, module: nn.Module, arguments: tuple, state: list) -> object:
        key = (
            *[(x.shape, x.stride(), x.dtype, x.device) for x in arguments],
            dispatch.switches(), torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.enabled,
            torch.get_float32_matmul_precision(), *switches_of_sdpa(),
        )  # fmt: skip
        with self.lock:
            known = self.graphs.pop(key, None)
            if known is not None:
                before, graph = known
                if before == (_with_folded(state, module) if graph.folds else state):
                    self.graphs[key] = known  # the last used is the last to go
                    return self._replay(graph, arguments)
                del known, graph
            if key not in self.seen:
                if len(self.seen) >= _SEEN:
                    self.seen.clear()
                self.seen[key] = None
                return forward(module, *arguments)
            while len(self.graphs) >= _MOST:
                del self.graphs[next(iter(self.graphs))]
            try:
                graph = _Graph(self, forward, module, arguments)
            except RuntimeError as error:
                self.failed = str(error).strip().splitlines()[0]
                self.graphs.clear()
                warnings.warn(
                    f"fastnets: no CUDA graph of {type(module).__name__} could be captured, its kernels are "
                    f"launched one by one ({self.failed}); fastnets.refresh(model) lets it be tried again",
                    stacklevel=4,
                )  # fmt: skip
                return forward(module, *arguments)
            self.graphs[key] = (_with_folded(state, module) if graph.folds else state), graph
            return self._replay(graph, arguments)

    def _replay(self, graph: _Graph, arguments: tuple) -> object:
        # All graphs share their memory: on another stream, what the last one read and wrote must be done.
        stream = cuda.current_stream()
        if self._last_stream is not None and stream != self._last_stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream
        return graph.replay(arguments, stream)


_networks: weakref.WeakKeyDictionary[nn.Module, _Network] = weakref.WeakKeyDictionary()
_usual: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # why the last call ran so


def replayed(forward: Callable) -> Callable:
    """``forward(self, *args)`` of a whole network, by CUDA graphs wherever the top of this file allows."""

    @functools.wraps(forward)
    def graphed(self, *args, **kwargs):
        if kwargs or not args or self.training or not all(map(_may_be_copied, args)):
            return _as_usual(forward, self, args, kwargs)
        device = args[0].device
        state = None
        if all(x.device == device for x in args) and not cuda.is_current_stream_capturing():
            state = _state_of(self)
        if state is None:
            return _as_usual(forward, self, args, kwargs)
        _usual.pop(self, None)
        network = _networks.get(self)
        if network is None or (network.failed and network.epoch != packing.epoch()):
            network = _networks[self] = _Network()
        if network.failed:
            return forward(self, *args)
        with cuda.device(device):
            return network.run(forward, self, args, state)

    return graphed


def _as_usual(forward: Callable, network: nn.Module, args: tuple, kwargs: dict) -> object:
    if not torch.compiler.is_compiling():
        _usual[network] = _why_not(network, args, kwargs)
    return forward(network, *args, **kwargs)


def forget(module: nn.Module) -> None:
    """Drop the graphs of a network, and the memory that they hold."""
    _networks.pop(module, None)
    _usual.pop(module, None)


def describe(module: nn.Module) -> str:
    """One sentence for reports."""
    network = _networks.get(module)
    if network is not None and network.failed:
        return f"CUDA graphs: none, its forward cannot be captured ({network.failed})"
    count = 0 if network is None else len(network.graphs)
    usual = f"; the last call ran as usual: {_usual[module]}" if module in _usual else ""
    return f"CUDA graphs: {count} captured (inference on CUDA, from the second call of a kind on){usual}"


def _why_not(network: nn.Module, args: tuple, kwargs: dict) -> str:
    """Why a call was run as usual."""
    if kwargs:
        return f"keyword arguments ({', '.join(kwargs)}); give them by position"
    if network.training:
        return "the network is in training mode"
    if not args:
        return "no arguments"
    for i, x in enumerate(args):
        if not isinstance(x, Tensor):
            return f"argument {i} is a {type(x).__name__}, not a tensor"
        if not _on_cuda(x):
            return f"argument {i} is on {x.device}"
    if torch.is_grad_enabled():
        return "gradients are enabled; use torch.no_grad() or torch.inference_mode()"
    if torch.is_autocast_enabled(args[0].device.type):
        return "autocast is enabled; convert the network with optimize(dtype=...) instead"
    for name, module in network.named_modules():
        if module is not network and has_hooks(module):
            return f"{name} has a hook"
        if module.training:
            return f"{name} is in training mode"
    return "a compiler, tracer, mode, global hook, tensor subclass or another capture is around"


def _may_be_copied(x: object) -> bool:
    return is_unobserved(x) and _on_cuda(x) and not torch.is_autocast_enabled(x.device.type)


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def _state_of(network: nn.Module) -> list | None:
    """What a graph of the network depends on; None where it must not be captured or replayed."""
    state: list[object] = [packing.epoch()]
    modules = [network]
    for module in modules:
        if module is not network and has_hooks(module):
            return None
        if module.training:
            return None
        state.append(module.__class__)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                if tensor.__class__ not in _PLAIN:
                    return None
                state.append(tensor.data_ptr())
        modules += [child for child in module._modules.values() if child is not None]
    return state


def _with_folded(state: list, network: nn.Module) -> list:
    """The state, and all that says that folded weights are still what they were folded from."""
    return [*state, packing.generation(), *[t._version for t in _tensors_of(network)]]


def _tensors_of(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
