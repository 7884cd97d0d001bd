"""Counts the training step that ``torch.compile`` would run on a GPU, by the rules of ``bench.traffic``.

    print(count_compiled(model, torch.empty(32, 3, 224, 224, device="meta"), gpu="h100"))

Inductor decides what to fuse from shapes and from what it asks of the device, and writes a Python wrapper
that calls vendors' ops and Triton kernels. Here it is given the answers of a GPU out of
``kernels.device.DEVICES``, nothing is compiled further, and the wrapper runs on meta tensors:

- the ops that it calls are counted like those of eager mode (a convolution's backward reads dY twice);
- a Triton kernel reads each of its pointers once for each loop in which it loads from it, and writes each
  pointer that it stores to once: what fusion saved is not counted, what a second loop reads again is.

Autograd's tracing knows no absent GPU. It happens on CPU fakes, and the graphs are moved to CUDA before they
are lowered; nothing that Inductor does before that (decompositions, the choice of what to recompute in the
backward) depends on the device, but for autotuning, which is off.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from fastnets.bench.counter import Counter, Traffic
from fastnets.bench.passes import Cost, nbytes
from fastnets.kernels.device import Device, assume_device, current_device

__all__ = ["Graph", "count_compiled", "lower"]

_CUDA = torch.device("cuda:0")


@dataclass(frozen=True)
class Graph:
    """One lowered graph. ``inputs``: meta tensors (or numbers) by name, ``outputs``: names of its results;
    ``wrapper``: Inductor's Python.
    """

    inputs: dict[str, Any]
    outputs: tuple[str | None, ...]
    wrapper: str


def count_compiled(model: nn.Module, x: Tensor, *, gpu: str | Device | None = None) -> Traffic:
    """The traffic of ``torch.compile(model)(x)`` and its backward in train mode.

    model, x: on any device; only shapes, dtypes and strides count (channels-last ones keep Inductor from
    changing layouts). gpu: a name in ``DEVICES``; the assumed device, or an A100, if not given.

    Raises ``ValueError`` where Dynamo breaks the network into several graphs.
    """
    graph, arguments = _capture(model, x)
    held = {id(t) for t in (*model.parameters(), *model.buffers())}
    with assume_device(gpu) if gpu is not None else contextlib.nullcontext():
        forward, backward = lower(graph, arguments, current_device())
    counter = Counter(None)
    with _wrappers_on_meta(counter), torch.no_grad(), counter:
        results = dict(zip(forward.outputs, _run(forward, list(map(_like, arguments)))))
        split = len(counter.traffic.records)
        # What the forward has not made is the gradient of an output.
        passed = {name: results.get(name, like) for name, like in backward.inputs.items()}
        _run(backward, list(passed.values()))
    records = counter.traffic.records
    records[split:] = [replace(record, in_backward=True) for record in records[split:]]
    own = {f"primals_{i + 1}" for i, t in enumerate(arguments) if id(t) in held}
    kept = {
        v.untyped_storage()._cdata: v.untyped_storage().nbytes()
        for name, v in passed.items()
        if isinstance(v, Tensor) and name in results and name not in own
    }
    return Traffic(records, sum(kept.values()))


def _like(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    # Graphs are lowered inside of autograd's fake mode; its tensors could not meet those of a wrapper.
    with unset_fake_temporarily():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


# --- capturing and lowering
# ----------------------------------------------------------------------------------------------


def _capture(model: nn.Module, x: Tensor) -> tuple[torch.fx.GraphModule, list[Any]]:
    """Dynamo's graph of the training forward, and the tensors that it is called with."""
    found: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def backend(graph: torch.fx.GraphModule, _: list[Any]) -> Callable:
        def run(*arguments: Any) -> Any:
            found.append((graph, list(arguments)))
            return graph(*arguments)

        return run

    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    torch.compiler.reset()
    try:
        model.train()
        torch.compile(model, backend=backend, dynamic=False)(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        torch.compiler.reset()
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__}: Dynamo made {len(found)} graphs of it; only one is counted"
        )
    return found[0]


def lower(graph: torch.fx.GraphModule, arguments: list[Any], device: Device) -> tuple[Graph, Graph]:
    """Inductor's forward and backward for ``graph``, as written for ``device``; nothing is compiled."""
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx

    lowered: dict[bool, Graph] = {}

    def inner(module: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable:
        lowered[bool(options.get("is_backward"))] = _lower_one(module, inputs, options, device)
        return module.forward

    with FakeTensorMode():
        fakes = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).requires_grad_(t.requires_grad)
            if isinstance(t, Tensor)
            else t
            for t in arguments
        ]
    with functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False):
        compile_fx.compile_fx(graph, fakes, inner_compile=inner)
    return lowered[False], lowered[True]


def _lower_one(
    module: torch.fx.GraphModule, inputs: list[Any], options: dict[str, Any], device: Device
) -> Graph:
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    fake_mode = next(t.fake_mode for t in inputs if isinstance(t, FakeTensor))
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    likes = dict(zip(names, map(_like, inputs)))
    (output,) = next(node for node in module.graph.nodes if node.op == "output").args
    outputs = tuple(getattr(value, "name", None) for value in output)

    def to_cuda(t: Tensor) -> Tensor:
        with fake_mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_CUDA)

    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(Tensor, to_cuda, node.meta["val"])
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": _CUDA}
    module.recompile()
    inputs = tree_map_only(Tensor, to_cuda, inputs)
    with _answering_for(device), DebugContext(), V.set_fake_mode(fake_mode):
        compile_fx.record_original_output_strides(module)
        compile_fx._recursive_post_grad_passes(module, is_inference=False)
        lowering = GraphLowering(
            module,
            example_inputs=inputs,
            is_backward=bool(options.get("is_backward")),
        )
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            code, _ = lowering.codegen()
    return Graph(likes, outputs, code.value)


@contextlib.contextmanager
def _answering_for(device: Device) -> Iterator[None]:
    """What Inductor asks of the GPU while it lowers a graph is answered for ``device``."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    major, minor = divmod(device.capability, 10)
    properties = types.SimpleNamespace(
        name=device.name,
        major=major,
        minor=minor,
        multi_processor_count=device.multiprocessors,
        regs_per_multiprocessor=device.registers_per_multiprocessor,
        max_threads_per_multi_processor=device.threads_per_multiprocessor,
        max_threads_per_block=1024,
        shared_memory_per_block_optin=device.shared_memory_per_block,
        L2_cache_size=device.l2_bytes,
        warp_size=32,
        gcnArchName="",
    )
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", True),
        (torch.cuda, "device_count", 1),
        (torch.cuda, "current_device", 0),
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_capability", (major, minor)),
        (CudaInterface, "is_available", True),
        (CudaInterface, "current_device", 0),
        (CudaInterface, "get_device_properties", properties),
        (CudaInterface, "get_compute_capability", device.capability),
        (CudaInterface.Worker, "get_device_properties", properties),
        (scheduler, "has_triton", True),
        (_triton, "triton_hash_with_backend", ""),  # part of the key of Inductor's autotuning cache
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, answer in answers:
            function = staticmethod(lambda *_, answer=answer, **__: answer)
            stack.enter_context(
                mock.patch.object(owner, name, function if isinstance(owner, type) else function.__func__)
            )
        stack.enter_context(
            mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _layout_of_cudnn)
        )
        for clear in (DeviceProperties.create.cache_clear, FakeTensorMode.cache_clear):
            clear()
            stack.callback(clear)
        yield


def _layout_of_cudnn(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """Without a device PyTorch finds no cuDNN, which answers in channels-last where either operand is."""
    formats = {torch._prims_common.suggest_memory_format(t) for t in (x, weight)}
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


# --- running a wrapper on meta tensors
# ----------------------------------------------------------------------------------------------

_LOOP = re.compile(r"^\s*for \w+ in ", re.MULTILINE)
_SIGNATURE = re.compile(r"^def \w+\(([^)]*)\):", re.MULTILINE)


class _CountedKernel:
    """Stands for a Triton kernel of Inductor's: counts what a launch moves."""

    def __init__(self, counter: Counter, name: str, source: str):
        self.counter = counter
        self.name = name
        signature = _SIGNATURE.search(source)
        self.parameters = [p.split(":")[0].strip() for p in signature.group(1).split(",")]
        loops = _LOOP.split(source[signature.end() :])
        self.reads = [{p for p in self.parameters if f"tl.load({p} " in loop} for loop in loops]
        self.writes = {p for p in self.parameters if any(f"tl.store({p} " in loop for loop in loops)}

    def run(self, *arguments: Any, **_: Any) -> None:
        tensors = {p: t for p, t in zip(self.parameters, arguments) if isinstance(t, Tensor)}
        read = sum(nbytes(tensors[p]) for loop in self.reads for p in loop)
        written = sum(nbytes(tensors[p]) for p in self.writes)
        self.counter.record(f"triton.{self.name}", Cost(read, written, 1), 0)


@contextlib.contextmanager
def _wrappers_on_meta(counter: Counter) -> Iterator[None]:
    """Inside, a wrapper can be executed where there is no GPU; its kernels are counted, not compiled."""
    from torch._inductor.async_compile import AsyncCompile

    def kernel(self: AsyncCompile, name: str, source: str, **_: Any) -> _CountedKernel:
        return _CountedKernel(counter, name, source)

    with (
        mock.patch.object(AsyncCompile, "triton", kernel),
        mock.patch.object(torch.cuda, "_DeviceGuard", contextlib.nullcontext),
        mock.patch.object(torch.cuda, "set_device"),
    ):
        yield


def _run(graph: Graph, arguments: list[Any]) -> tuple[Any, ...]:
    def empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    namespace: dict[str, Any] = {"__name__": "fastnets_counted_wrapper"}
    exec(compile(graph.wrapper, "<inductor>", "exec"), namespace)
    namespace.update(
        empty_strided_cuda=empty,
        get_raw_stream=lambda device: 0,
        assert_size_stride=lambda *_: None,  # meta convolutions keep the layout of their input
        assert_alignment=lambda *_: None,
    )
    return tuple(namespace["call"](list(arguments)))
